//! `/v1/models`: the agents, as OpenAI lists models.

use serde::Serialize;

use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Path};
use crate::store::{AgentRow, StoreError};

/// The agents as models.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ModelList {
    /// Always `list`.
    pub object: &'static str,
    /// The agents by name.
    pub data: Vec<ModelView>,
}

/// An agent as a model.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ModelView {
    /// The agent's name, which `model` takes.
    pub id: String,
    /// Always `model`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: i64,
    /// Always `polpo`.
    pub owned_by: &'static str,
    /// The agent's name, for clients that show one.
    pub name: String,
}

impl From<&AgentRow> for ModelView {
    fn from(agent: &AgentRow) -> Self {
        Self {
            id: agent.name.clone(),
            object: "model",
            created: agent.created_at.timestamp(),
            owned_by: "polpo",
            name: agent.name.clone(),
        }
    }
}

/// List the agents as models.
#[utoipa::path(get, path = "/models", tag = "Models",
    responses((status = 200, description = "The agents by name", body = ModelList)))]
pub async fn list_models(Door(db): Door) -> Result<Json<ModelList>, ApiError> {
    let agents = db.agents(None, None, 1000).await?;
    Ok(Json(ModelList {
        object: "list",
        data: agents.iter().map(ModelView::from).collect(),
    }))
}

/// Read one agent as a model.
#[utoipa::path(get, path = "/models/{id}", tag = "Models", params(("id" = String, Path, description = "The agent's name or id")),
    responses((status = 200, description = "The agent", body = ModelView), (status = 404, description = "No such agent", body = ErrorBody)))]
pub async fn read_model(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<ModelView>, ApiError> {
    match db.agent(&id).await {
        Err(StoreError::NotFound) => Err(ApiError::missing("Model", &id)),
        agent => Ok(Json(agent?.as_ref().into())),
    }
}
