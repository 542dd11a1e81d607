//! `/v1/memory` (contract 2.13).

use serde::{Deserialize, Serialize};

use super::agents::check_name;
use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Path};
use crate::ids::{Agent, Id};
use crate::store::{MEMORY_LIMIT, MemoryOwner, ProjectDb, StoreError};

/// A memory.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct MemoryView {
    /// Whether anything was ever saved.
    pub exists: bool,
    /// The text; empty when there is none.
    pub content: String,
    /// The agent whose memory it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
}

/// A memory's new text.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct SaveMemory {
    /// The whole text, at most 256 KiB; may be empty.
    pub content: String,
}

/// A memory is saved.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Saved {
    /// Always true.
    pub saved: bool,
    /// The agent whose memory it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
}

/// Read what all agents share.
#[utoipa::path(get, path = "/memory", tag = "Memory",
    responses((status = 200, description = "The memory", body = MemoryView)))]
pub async fn read_memory(Door(db): Door) -> Result<Json<MemoryView>, ApiError> {
    read(&db, None).await
}

/// Replace what all agents share.
#[utoipa::path(put, path = "/memory", tag = "Memory", request_body = SaveMemory,
    responses(
        (status = 200, description = "It is saved", body = Saved),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn save_memory(
    Door(db): Door,
    Json(new): Json<SaveMemory>,
) -> Result<Json<Saved>, ApiError> {
    save(&db, None, &new.content).await
}

/// Read what an agent remembers.
#[utoipa::path(get, path = "/memory/agent/{name}", tag = "Memory", params(("name" = String, Path, description = "The agent's name")),
    responses(
        (status = 200, description = "The memory", body = MemoryView),
        (status = 404, description = "The path names nothing", body = ErrorBody),
    ))]
pub async fn read_agent_memory(
    Door(db): Door,
    Path(name): Path<String>,
) -> Result<Json<MemoryView>, ApiError> {
    let name = name_of(&db, name).await?;
    read(&db, Some(name)).await
}

/// An agent's name, where its id stands for it. A memory's agent need not exist.
async fn name_of(db: &ProjectDb, name: String) -> Result<String, ApiError> {
    if name.parse::<Id<Agent>>().is_err() {
        return Ok(name);
    }
    match db.agent(&name).await {
        Ok(agent) => Ok(agent.name.clone()),
        Err(StoreError::NotFound) => Ok(name),
        Err(error) => Err(error.into()),
    }
}

/// Replace what an agent remembers. The agent need not exist yet.
#[utoipa::path(put, path = "/memory/agent/{name}", tag = "Memory", params(("name" = String, Path, description = "The agent's name")),
    request_body = SaveMemory,
    responses(
        (status = 200, description = "It is saved", body = Saved),
        (status = 404, description = "The path names nothing", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn save_agent_memory(
    Door(db): Door,
    Path(name): Path<String>,
    Json(new): Json<SaveMemory>,
) -> Result<Json<Saved>, ApiError> {
    check_name("name", &name)?;
    let name = name_of(&db, name).await?;
    save(&db, Some(name), &new.content).await
}

fn owner(agent: Option<&str>) -> MemoryOwner<'_> {
    agent.map_or(MemoryOwner::Project, MemoryOwner::Agent)
}

async fn read(db: &ProjectDb, agent: Option<String>) -> Result<Json<MemoryView>, ApiError> {
    let content = db.memory(owner(agent.as_deref())).await?;
    Ok(Json(MemoryView {
        exists: content.is_some(),
        content: content.unwrap_or_default(),
        agent,
    }))
}

async fn save(
    db: &ProjectDb,
    agent: Option<String>,
    content: &str,
) -> Result<Json<Saved>, ApiError> {
    db.save_memory(owner(agent.as_deref()), content)
        .await
        .map_err(too_large)?;
    Ok(Json(Saved { saved: true, agent }))
}

fn too_large(error: StoreError) -> ApiError {
    if error.is_memory_too_large() {
        ApiError::invalid(
            "content",
            format!(
                "`content` may be at most {} KiB: agents read all of it on every run.",
                MEMORY_LIMIT / 1024
            ),
        )
    } else {
        error.into()
    }
}
