//! `/v1/playbooks` and `/v1/templates` (contract 2.17).

use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Listed, MaybeJson, Page, Path, Query};
use super::missions::{MissionView, refused, show, team_faults};
use super::sessions::Deleted;
use crate::app::App;
use crate::lifecycle;
use crate::mission::{Document, MOST_PLAYBOOKS, Parameter, Playbook};
use crate::store::{PlaybookSummary, ProjectDb, StoreError};

/// What a list shows of a playbook.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct PlaybookView {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub description: String,
    /// What can be filled in.
    #[schema(value_type = Vec<Parameter>)]
    pub parameters: Value,
    /// Where it is, below `/v1`.
    pub path: String,
}

/// A playbook is saved.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct SavedPlaybook {
    /// Its name.
    pub name: String,
    /// Where it is, below `/v1`.
    pub path: String,
}

impl From<PlaybookSummary> for PlaybookView {
    fn from(row: PlaybookSummary) -> Self {
        Self {
            path: path_of(&row.name),
            name: row.name,
            description: row.description,
            parameters: row.parameters,
        }
    }
}

fn path_of(name: &str) -> String {
    format!("playbooks/{name}")
}

fn missing(error: StoreError, name: &str) -> ApiError {
    match error {
        StoreError::NotFound => ApiError::missing("Playbook", name),
        error => error.into(),
    }
}

async fn list(db: &ProjectDb, page: &Page, path: &str) -> Result<Listed<PlaybookView>, ApiError> {
    let size = page.size()?;
    let rows = db.playbooks(page.after.as_deref(), size).await?;
    let views = rows.into_iter().map(PlaybookView::from).collect();
    Ok(Listed::new(views, size, path, |playbook: &PlaybookView| {
        playbook.name.clone()
    }))
}

/// List the playbooks.
#[utoipa::path(get, path = "/playbooks", tag = "Playbooks", params(Page),
    responses((status = 200, description = "The playbooks, by name", body = Vec<PlaybookView>), (status = 400, body = ErrorBody, description = "A parameter is wrong")))]
pub async fn list_playbooks(
    Door(db): Door,
    Query(page): Query<Page>,
) -> Result<Listed<PlaybookView>, ApiError> {
    list(&db, &page, "/v1/playbooks").await
}

/// List the playbooks, by their older name.
#[utoipa::path(get, path = "/templates", tag = "Playbooks", params(Page),
    responses((status = 200, description = "The playbooks, by name", body = Vec<PlaybookView>), (status = 400, body = ErrorBody, description = "A parameter is wrong")))]
pub async fn list_templates(
    Door(db): Door,
    Query(page): Query<Page>,
) -> Result<Listed<PlaybookView>, ApiError> {
    list(&db, &page, "/v1/templates").await
}

/// Read a playbook.
#[utoipa::path(get, path = "/playbooks/{name}", tag = "Playbooks", params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "The playbook", body = Playbook),
        (status = 404, description = "No such playbook", body = ErrorBody),
    ))]
pub async fn read_playbook(
    Door(db): Door,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let body = db.playbook(&name).await;
    Ok(Json(body.map_err(|error| missing(error, &name))?))
}

/// Read a playbook, by its older name.
#[utoipa::path(get, path = "/templates/{name}", tag = "Playbooks", params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "The playbook", body = Playbook),
        (status = 404, description = "No such playbook", body = ErrorBody),
    ))]
pub async fn read_template(door: Door, name: Path<String>) -> Result<Json<Value>, ApiError> {
    read_playbook(door, name).await
}

/// Create a playbook, or replace the one with its name. A project keeps at most 500.
#[utoipa::path(post, path = "/playbooks", tag = "Playbooks", request_body = Playbook,
    responses(
        (status = 201, description = "It is saved", body = SavedPlaybook),
        (status = 400, description = "Fields are wrong: all are in `details`; or there are 500 others", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn save_playbook(
    Door(db): Door,
    Json(body): Json<Value>,
) -> Result<(StatusCode, Json<SavedPlaybook>), ApiError> {
    let playbook = Playbook::parse(&body).map_err(|details| ApiError::Faults {
        message: "The playbook is not valid: see `details`.".to_owned(),
        details,
    })?;
    let mut tx = db.begin();
    if !tx
        .save_playbook(&playbook.name, &json!(playbook), MOST_PLAYBOOKS)
        .await?
    {
        return Err(ApiError::BadRequest {
            message: format!(
                "A project keeps at most {MOST_PLAYBOOKS} playbooks. Delete one before adding another."
            ),
            param: None,
        });
    }
    tx.commit().await?;
    let saved = SavedPlaybook {
        path: path_of(&playbook.name),
        name: playbook.name,
    };
    Ok((StatusCode::CREATED, Json(saved)))
}

/// Create a playbook, or replace the one with its name, by its older name.
#[utoipa::path(post, path = "/templates", tag = "Playbooks", request_body = Playbook,
    responses(
        (status = 201, description = "It is saved", body = SavedPlaybook),
        (status = 400, description = "Fields are wrong: all are in `details`; or there are 500 others", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn save_template(
    door: Door,
    body: Json<Value>,
) -> Result<(StatusCode, Json<SavedPlaybook>), ApiError> {
    save_playbook(door, body).await
}

/// Delete a playbook. Missions that were made from it stay.
#[utoipa::path(delete, path = "/playbooks/{name}", tag = "Playbooks", params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "It is gone", body = Deleted),
        (status = 404, description = "No such playbook", body = ErrorBody),
    ))]
pub async fn delete_playbook(
    Door(db): Door,
    Path(name): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    let mut tx = db.begin();
    tx.delete_playbook(&name)
        .await
        .map_err(|error| missing(error, &name))?;
    tx.commit().await?;
    Ok(Json(Deleted { deleted: true }))
}

/// Delete a playbook, by its older name.
#[utoipa::path(delete, path = "/templates/{name}", tag = "Playbooks", params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "It is gone", body = Deleted),
        (status = 404, description = "No such playbook", body = ErrorBody),
    ))]
pub async fn delete_template(door: Door, name: Path<String>) -> Result<Json<Deleted>, ApiError> {
    delete_playbook(door, name).await
}

/// What a playbook is filled in with.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct RunPlaybook {
    /// Texts, numbers, true and false, by parameter.
    #[schema(value_type = Option<Object>)]
    pub params: Option<Value>,
}

/// A mission that was made from a playbook and executed.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct PlaybookRun {
    /// The mission.
    pub mission: MissionView,
    /// How many tasks it has.
    pub tasks: usize,
    /// Their group.
    pub group: String,
    /// What was passed over.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Fill a playbook in and execute what it makes: a mission of its name, with a number from the second on.
#[utoipa::path(post, path = "/playbooks/{name}/run", tag = "Playbooks", params(("name" = String, Path, description = "Its name")), request_body = Option<RunPlaybook>,
    responses(
        (status = 201, description = "The mission", body = PlaybookRun),
        (status = 400, description = "Parameters are wrong, or what they make: all is in `details`", body = ErrorBody),
        (status = 404, description = "No such playbook", body = ErrorBody),
        (status = 409, description = "The mission was made and waits for approval", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn run_playbook(
    State(app): State<App>,
    Door(db): Door,
    Path(name): Path<String>,
    MaybeJson(body): MaybeJson<RunPlaybook>,
) -> Result<(StatusCode, Json<PlaybookRun>), ApiError> {
    let stored = db.playbook(&name).await;
    let stored = stored.map_err(|error| missing(error, &name))?;
    let playbook = Playbook::parse(&stored).map_err(ApiError::faults)?;
    let params = match body.params {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(params)) => params,
        Some(_) => {
            return Err(ApiError::invalid(
                "params",
                "`params` must be an object of texts, numbers, true and false.",
            ));
        }
    };
    let filled = playbook.fill(&params).map_err(|details| ApiError::Faults {
        message: format!("Parameters are not valid: {}", details.join("; ")),
        details,
    })?;
    let mut members = filled.mission;
    members.insert("prompt".to_owned(), json!(filled.summary));
    let (document, _) = Document::check(&members).map_err(ApiError::faults)?;
    match team_faults(&app, &document) {
        faults if faults.is_empty() => {}
        faults => return Err(ApiError::faults(faults)),
    }
    if let Some(sentence) = app.unusable_model(&db, &document).await? {
        return Err(ApiError::invalid("model", sentence));
    }
    let (mission, execution) = lifecycle::mission::launch(&db, &playbook.name, &document)
        .await
        .map_err(|error| refused(error, ""))?;
    let run = PlaybookRun {
        mission: show(&db, mission.id).await?,
        tasks: execution.tasks.len(),
        group: execution.group,
        warnings: filled.warnings,
    };
    Ok((StatusCode::CREATED, Json(run)))
}

/// Fill a playbook in and execute what it makes, by its older name.
#[utoipa::path(post, path = "/templates/{name}/run", tag = "Playbooks", params(("name" = String, Path, description = "Its name")), request_body = Option<RunPlaybook>,
    responses(
        (status = 201, description = "The mission", body = PlaybookRun),
        (status = 400, description = "Parameters are wrong, or what they make: all is in `details`", body = ErrorBody),
        (status = 404, description = "No such playbook", body = ErrorBody),
        (status = 409, description = "The mission was made and waits for approval", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn run_template(
    app: State<App>,
    door: Door,
    name: Path<String>,
    body: MaybeJson<RunPlaybook>,
) -> Result<(StatusCode, Json<PlaybookRun>), ApiError> {
    run_playbook(app, door, name, body).await
}
