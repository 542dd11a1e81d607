//! The routes that edit the parts of a mission's definition (contract 2.8.9). Whatever an edit leaves is checked as a whole.

use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Path};
use super::missions::{MissionView, mission_id, refused, show, team_faults};
use crate::app::App;
use crate::lifecycle::mission as missions;
use crate::mission::{BarrierList, Document, EditError};
use crate::store::ProjectDb;

/// The members of a part, as the mission's definition has them; in a change what is absent stays and what is null goes.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = Object)]
pub struct Part(Map<String, Value>);

/// The order of a mission's tasks.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct Order {
    /// Every title, once.
    pub titles: Vec<String>,
}

/// Rules for other systems to read.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct Notifications {
    /// `{rules, inherit?}`, or null for none.
    #[schema(value_type = Option<Object>)]
    pub notifications: Option<Value>,
}

async fn edit(
    db: &ProjectDb,
    id: &str,
    edit: impl FnOnce(&Document) -> Result<Document, EditError> + Send,
) -> Result<Json<MissionView>, ApiError> {
    let mission = mission_id(id)?;
    missions::edit(db, mission, edit)
        .await
        .map_err(|error| refused(error, id))?;
    Ok(Json(show(db, mission).await?))
}

/// An edit of the team, whose members are agents like others.
async fn edit_team(
    app: &App,
    db: &ProjectDb,
    id: &str,
    change: impl FnOnce(&Document) -> Result<Document, EditError> + Send,
) -> Result<Json<MissionView>, ApiError> {
    edit(db, id, |document| {
        let edited = change(document)?;
        match team_faults(app, &edited) {
            faults if faults.is_empty() => Ok(edited),
            faults => Err(EditError::Faults(faults)),
        }
    })
    .await
}

/// Add a task.
#[utoipa::path(post, path = "/missions/{id}/tasks", tag = "Missions", params(("id" = String, Path, description = "The mission's id")), request_body = Part,
    responses(
        (status = 201, description = "The mission", body = MissionView),
        (status = 400, description = "The definition would be faulty", body = ErrorBody),
        (status = 404, description = "No such mission", body = ErrorBody),
        (status = 409, description = "The title is taken", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn add_task(
    Door(db): Door,
    Path(id): Path<String>,
    Json(Part(task)): Json<Part>,
) -> Result<(StatusCode, Json<MissionView>), ApiError> {
    let mission = edit(&db, &id, |document| document.add_task(task)).await?;
    Ok((StatusCode::CREATED, mission))
}

/// Change a task; a new title takes the old one's place everywhere.
#[utoipa::path(patch, path = "/missions/{id}/tasks/{title}", tag = "Missions",
    params(("id" = String, Path, description = "The mission's id"), ("title" = String, Path, description = "The task's title")), request_body = Part,
    responses(
        (status = 200, description = "The mission", body = MissionView),
        (status = 400, description = "The definition would be faulty", body = ErrorBody),
        (status = 404, description = "No such mission or task", body = ErrorBody),
        (status = 409, description = "The title is taken", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn change_task(
    Door(db): Door,
    Path((id, title)): Path<(String, String)>,
    Json(Part(change)): Json<Part>,
) -> Result<Json<MissionView>, ApiError> {
    edit(&db, &id, |document| document.change_task(&title, change)).await
}

/// Remove a task, and its title wherever it is named.
#[utoipa::path(delete, path = "/missions/{id}/tasks/{title}", tag = "Missions",
    params(("id" = String, Path, description = "The mission's id"), ("title" = String, Path, description = "The task's title")),
    responses(
        (status = 200, description = "The mission", body = MissionView),
        (status = 404, description = "No such mission or task", body = ErrorBody),
        (status = 409, description = "It is the last task", body = ErrorBody),
    ))]
pub async fn remove_task(
    Door(db): Door,
    Path((id, title)): Path<(String, String)>,
) -> Result<Json<MissionView>, ApiError> {
    edit(&db, &id, |document| document.remove_task(&title)).await
}

/// Put the tasks in another order.
#[utoipa::path(put, path = "/missions/{id}/tasks/reorder", tag = "Missions", params(("id" = String, Path, description = "The mission's id")), request_body = Order,
    responses(
        (status = 200, description = "The mission", body = MissionView),
        (status = 400, description = "Not every title once", body = ErrorBody),
        (status = 404, description = "No such mission", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn reorder_tasks(
    Door(db): Door,
    Path(id): Path<String>,
    Json(order): Json<Order>,
) -> Result<Json<MissionView>, ApiError> {
    edit(&db, &id, |document| document.reorder(&order.titles)).await
}

macro_rules! barrier_routes {
    ($list:expr, $path:literal, $one:literal, $add:ident, $add_doc:literal, $change:ident, $change_doc:literal, $remove:ident, $remove_doc:literal) => {
        #[doc = $add_doc]
        #[utoipa::path(post, path = $path, tag = "Missions", params(("id" = String, Path, description = "The mission's id")), request_body = Part,
            responses(
                (status = 201, description = "The mission", body = MissionView),
                (status = 400, description = "The definition would be faulty", body = ErrorBody),
                (status = 404, description = "No such mission", body = ErrorBody),
                (status = 409, description = "The name is taken", body = ErrorBody),
                (status = 413, description = "The body is too large", body = ErrorBody),
                (status = 415, description = "The body is not JSON", body = ErrorBody),
            ))]
        pub async fn $add(
            Door(db): Door,
            Path(id): Path<String>,
            Json(Part(barrier)): Json<Part>,
        ) -> Result<(StatusCode, Json<MissionView>), ApiError> {
            let mission = edit(&db, &id, |document| document.add_barrier($list, barrier)).await?;
            Ok((StatusCode::CREATED, mission))
        }

        #[doc = $change_doc]
        #[utoipa::path(patch, path = $one, tag = "Missions",
            params(("id" = String, Path, description = "The mission's id"), ("name" = String, Path, description = "Its name")), request_body = Part,
            responses(
                (status = 200, description = "The mission", body = MissionView),
                (status = 400, description = "The definition would be faulty", body = ErrorBody),
                (status = 404, description = "No such mission, or nothing of this name", body = ErrorBody),
                (status = 409, description = "The name is taken", body = ErrorBody),
                (status = 413, description = "The body is too large", body = ErrorBody),
                (status = 415, description = "The body is not JSON", body = ErrorBody),
            ))]
        pub async fn $change(
            Door(db): Door,
            Path((id, name)): Path<(String, String)>,
            Json(Part(change)): Json<Part>,
        ) -> Result<Json<MissionView>, ApiError> {
            edit(&db, &id, |document| document.change_barrier($list, &name, change)).await
        }

        #[doc = $remove_doc]
        #[utoipa::path(delete, path = $one, tag = "Missions",
            params(("id" = String, Path, description = "The mission's id"), ("name" = String, Path, description = "Its name")),
            responses(
                (status = 200, description = "The mission", body = MissionView),
                (status = 404, description = "No such mission, or nothing of this name", body = ErrorBody),
            ))]
        pub async fn $remove(
            Door(db): Door,
            Path((id, name)): Path<(String, String)>,
        ) -> Result<Json<MissionView>, ApiError> {
            edit(&db, &id, |document| document.remove_barrier($list, &name)).await
        }
    };
}

barrier_routes!(
    BarrierList::Checkpoints,
    "/missions/{id}/checkpoints",
    "/missions/{id}/checkpoints/{name}",
    add_checkpoint,
    "Add a checkpoint.",
    change_checkpoint,
    "Change a checkpoint.",
    remove_checkpoint,
    "Remove a checkpoint."
);
barrier_routes!(
    BarrierList::Gates,
    "/missions/{id}/quality-gates",
    "/missions/{id}/quality-gates/{name}",
    add_gate,
    "Add a quality gate.",
    change_gate,
    "Change a quality gate.",
    remove_gate,
    "Remove a quality gate."
);
barrier_routes!(
    BarrierList::Delays,
    "/missions/{id}/delays",
    "/missions/{id}/delays/{name}",
    add_delay,
    "Add a delay.",
    change_delay,
    "Change a delay.",
    remove_delay,
    "Remove a delay."
);

/// Add a member to the team.
#[utoipa::path(post, path = "/missions/{id}/team", tag = "Missions", params(("id" = String, Path, description = "The mission's id")), request_body = Part,
    responses(
        (status = 201, description = "The mission", body = MissionView),
        (status = 400, description = "The definition would be faulty", body = ErrorBody),
        (status = 404, description = "No such mission", body = ErrorBody),
        (status = 409, description = "The name is taken", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn add_member(
    State(app): State<App>,
    Door(db): Door,
    Path(id): Path<String>,
    Json(Part(member)): Json<Part>,
) -> Result<(StatusCode, Json<MissionView>), ApiError> {
    let mission = edit_team(&app, &db, &id, |document| document.add_member(member)).await?;
    Ok((StatusCode::CREATED, mission))
}

/// Change a member of the team.
#[utoipa::path(patch, path = "/missions/{id}/team/{member}", tag = "Missions",
    params(("id" = String, Path, description = "The mission's id"), ("member" = String, Path, description = "The member's name")), request_body = Part,
    responses(
        (status = 200, description = "The mission", body = MissionView),
        (status = 400, description = "The definition would be faulty", body = ErrorBody),
        (status = 404, description = "No such mission or member", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn change_member(
    State(app): State<App>,
    Door(db): Door,
    Path((id, member)): Path<(String, String)>,
    Json(Part(change)): Json<Part>,
) -> Result<Json<MissionView>, ApiError> {
    edit_team(&app, &db, &id, |document| {
        document.change_member(&member, change)
    })
    .await
}

/// Remove a member of the team.
#[utoipa::path(delete, path = "/missions/{id}/team/{member}", tag = "Missions",
    params(("id" = String, Path, description = "The mission's id"), ("member" = String, Path, description = "The member's name")),
    responses(
        (status = 200, description = "The mission", body = MissionView),
        (status = 404, description = "No such mission or member", body = ErrorBody),
    ))]
pub async fn remove_member(
    Door(db): Door,
    Path((id, member)): Path<(String, String)>,
) -> Result<Json<MissionView>, ApiError> {
    edit(&db, &id, |document| document.remove_member(&member)).await
}

/// Set a mission's notification rules, which are kept for other systems to read.
#[utoipa::path(put, path = "/missions/{id}/notifications", tag = "Missions", params(("id" = String, Path, description = "The mission's id")), request_body = Notifications,
    responses(
        (status = 200, description = "The mission", body = MissionView),
        (status = 400, description = "They are no object", body = ErrorBody),
        (status = 404, description = "No such mission", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn set_notifications(
    Door(db): Door,
    Path(id): Path<String>,
    Json(body): Json<Notifications>,
) -> Result<Json<MissionView>, ApiError> {
    edit(&db, &id, |document| {
        document.with_notifications(body.notifications)
    })
    .await
}
