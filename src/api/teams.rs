//! `/v1/agents/teams` and `/v1/teams` (contract 2.5).

use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

use super::agents::{AgentView, Removed, check_name};
use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Listed, Page, Path, Query};
use crate::store::{ProjectDb, StoreError, TeamRow};

/// A team with its agents.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct TeamView {
    /// Its name.
    pub name: String,
    /// What it is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Its agents by name.
    pub agents: Vec<AgentView>,
}

/// A new team.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct CreateTeam {
    /// 1 to 64 letters, digits, `_`, `-` or `.`, unique in the project.
    #[schema(min_length = 1, max_length = 64)]
    pub name: Option<String>,
    /// What it is for.
    pub description: Option<String>,
}

/// A change to a team.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UpdateTeam {
    /// Its name until now; when absent, `name` is, and only the description changes.
    pub old_name: Option<String>,
    /// Its name from now on.
    pub name: Option<String>,
    /// What it is for; absent leaves it.
    pub description: Option<String>,
}

/// Which team.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub struct NameQuery {
    /// A team's name.
    pub name: Option<String>,
}

/// The most agents that a team is shown with; all are in `GET /v1/agents`.
const SHOWN: i64 = 1000;

async fn view(db: &ProjectDb, row: TeamRow) -> Result<TeamView, ApiError> {
    let agents = db.agents(Some(&row.name), None, SHOWN).await?;
    Ok(TeamView {
        name: row.name,
        description: row.description,
        agents: agents.into_iter().map(AgentView::from).collect(),
    })
}

fn missing(error: StoreError, name: &str) -> ApiError {
    match error {
        StoreError::NotFound => ApiError::missing("Team", name),
        error if error.is_constraint("teams_pkey") => ApiError::Conflict(format!(
            "Team \"{name}\" exists already. Choose another name."
        )),
        error => error.into(),
    }
}

async fn list(db: &ProjectDb, page: &Page, path: &str) -> Result<Listed<TeamView>, ApiError> {
    let size = page.size()?;
    let rows = db.teams(page.after.as_deref(), size).await?;
    let mut views: Vec<TeamView> = rows
        .into_iter()
        .map(|row| TeamView {
            name: row.name,
            description: row.description,
            agents: Vec::new(),
        })
        .collect();
    // One statement for the agents of all teams rather than one each.
    for agent in db.agents(None, None, SHOWN).await? {
        if let Some(team) = views.iter_mut().find(|team| team.name == agent.team) {
            team.agents.push(agent.into());
        }
    }
    Ok(Listed::new(views, size, path, |team: &TeamView| {
        team.name.clone()
    }))
}

async fn rename(
    db: &ProjectDb,
    old_name: &str,
    change: &UpdateTeam,
) -> Result<Json<TeamView>, ApiError> {
    let name = change.name.as_deref().unwrap_or(old_name);
    check_name("name", name)?;
    let mut tx = db.begin();
    let row = tx
        .update_team(old_name, name, change.description.as_deref())
        .await
        .map_err(|error| match error {
            StoreError::NotFound => ApiError::missing("Team", old_name),
            error => missing(error, name),
        })?;
    tx.commit().await?;
    Ok(Json(view(db, row).await?))
}

/// List the teams with their agents.
#[utoipa::path(get, path = "/agents/teams", tag = "Teams", params(Page),
    responses((status = 200, description = "The teams, oldest first", body = Vec<TeamView>), (status = 400, body = ErrorBody, description = "A parameter is wrong")))]
pub async fn list_teams(
    Door(db): Door,
    Query(page): Query<Page>,
) -> Result<Listed<TeamView>, ApiError> {
    list(&db, &page, "/v1/agents/teams").await
}

/// List the teams with their agents, by the shorter path.
#[utoipa::path(get, path = "/teams", tag = "Teams", params(Page),
    responses((status = 200, description = "The teams, oldest first", body = Vec<TeamView>), (status = 400, body = ErrorBody, description = "A parameter is wrong")))]
pub async fn list_teams_alias(
    Door(db): Door,
    Query(page): Query<Page>,
) -> Result<Listed<TeamView>, ApiError> {
    list(&db, &page, "/v1/teams").await
}

/// Read one team; the first when no name is given, null when there is none.
#[utoipa::path(get, path = "/agents/team", tag = "Teams", params(NameQuery),
    responses((status = 200, description = "The team", body = Option<TeamView>)))]
pub async fn read_team(
    Door(db): Door,
    Query(query): Query<NameQuery>,
) -> Result<Json<Option<TeamView>>, ApiError> {
    let row = match query.name {
        None => db.teams(None, 1).await?.into_iter().next(),
        Some(name) => match db.team(&name).await {
            Err(StoreError::NotFound) => None,
            found => Some(found?),
        },
    };
    Ok(Json(match row {
        Some(row) => Some(view(&db, row).await?),
        None => None,
    }))
}

/// Create a team.
#[utoipa::path(post, path = "/agents/teams", tag = "Teams", request_body = CreateTeam,
    responses(
        (status = 201, description = "The team", body = TeamView),
        (status = 400, description = "A field is wrong", body = ErrorBody),
        (status = 409, description = "The name is taken", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn create_team(
    Door(db): Door,
    Json(new): Json<CreateTeam>,
) -> Result<(StatusCode, Json<TeamView>), ApiError> {
    let name = new.name.as_deref().unwrap_or_default();
    check_name("name", name)?;
    let mut tx = db.begin();
    let row = tx
        .create_team(name, new.description.as_deref())
        .await
        .map_err(|error| missing(error, name))?;
    tx.commit().await?;
    let team = TeamView {
        name: row.name,
        description: row.description,
        agents: Vec::new(),
    };
    Ok((StatusCode::CREATED, Json(team)))
}

/// Create a team, by the shorter path.
#[utoipa::path(post, path = "/teams", tag = "Teams", request_body = CreateTeam,
    responses(
        (status = 201, description = "The team", body = TeamView),
        (status = 400, description = "A field is wrong", body = ErrorBody),
        (status = 409, description = "The name is taken", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn create_team_alias(
    door: Door,
    new: Json<CreateTeam>,
) -> Result<(StatusCode, Json<TeamView>), ApiError> {
    create_team(door, new).await
}

/// Rename a team or describe it anew; its agents move along.
#[utoipa::path(patch, path = "/agents/team", tag = "Teams", request_body = UpdateTeam,
    responses(
        (status = 200, description = "The team", body = TeamView),
        (status = 400, description = "A field is wrong", body = ErrorBody),
        (status = 404, description = "No such team", body = ErrorBody),
        (status = 409, description = "The name is taken", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn update_team(
    Door(db): Door,
    Json(change): Json<UpdateTeam>,
) -> Result<Json<TeamView>, ApiError> {
    let named = change
        .old_name
        .as_deref()
        .or(change.name.as_deref())
        .unwrap_or_default();
    if named.is_empty() {
        return Err(ApiError::invalid(
            "name",
            "`name` is required, and `oldName` to rename.",
        ));
    }
    rename(&db, named, &change).await
}

/// Rename a team or describe it anew, by its path.
#[utoipa::path(patch, path = "/teams/{name}", tag = "Teams", params(("name" = String, Path, description = "Its name")), request_body = UpdateTeam,
    responses(
        (status = 200, description = "The team", body = TeamView),
        (status = 400, description = "A field is wrong", body = ErrorBody),
        (status = 404, description = "No such team", body = ErrorBody),
        (status = 409, description = "The name is taken", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn update_team_alias(
    Door(db): Door,
    Path(name): Path<String>,
    Json(change): Json<UpdateTeam>,
) -> Result<Json<TeamView>, ApiError> {
    rename(&db, &name, &change).await
}

/// Delete a team; its agents move to `default`. The last team stays.
#[utoipa::path(delete, path = "/agents/teams/{name}", tag = "Teams", params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "It is gone", body = Removed),
        (status = 404, description = "No such team", body = ErrorBody),
        (status = 409, description = "It is the last one", body = ErrorBody),
    ))]
pub async fn delete_team(
    Door(db): Door,
    Path(name): Path<String>,
) -> Result<Json<Removed>, ApiError> {
    let mut tx = db.begin();
    if !tx
        .delete_team(&name)
        .await
        .map_err(|error| missing(error, &name))?
    {
        return Err(ApiError::Conflict(format!(
            "Team \"{name}\" is the last one. Create another before deleting it."
        )));
    }
    tx.commit().await?;
    Ok(Json(Removed { removed: true }))
}

/// Delete a team, by the shorter path.
#[utoipa::path(delete, path = "/teams/{name}", tag = "Teams", params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "It is gone", body = Removed),
        (status = 404, description = "No such team", body = ErrorBody),
        (status = 409, description = "It is the last one", body = ErrorBody),
    ))]
pub async fn delete_team_alias(door: Door, name: Path<String>) -> Result<Json<Removed>, ApiError> {
    delete_team(door, name).await
}
