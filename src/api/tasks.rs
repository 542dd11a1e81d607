//! `/v1/tasks` (contract 2.6.6).

use axum::extract::{Extension, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::agents::Removed;
use super::auth::Presented;
use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Listed, MaybeJson, Page, Path, Query};
use super::follow;
use super::settings::check_model;
use super::shapes::TaskShape;
use super::task_bodies::{CreateTask, StopTask, UpdateTask, status_of};
use crate::app::App;
use crate::ids::{self, Id};
use crate::lifecycle::{self, LifecycleError};
use crate::store::{ProjectDb, StoreError, TaskFilter};
use crate::task::{RetryPolicy, Status, Task};

/// A task (contract 2.6.1).
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = TaskShape)]
pub struct TaskView(Value);

impl From<Task> for TaskView {
    fn from(task: Task) -> Self {
        Self(task.view())
    }
}

/// Which tasks.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(rename_all = "camelCase")]
pub struct TaskQuery {
    /// Those that stand there.
    #[param(value_type = Option<Status>)]
    pub status: Option<String>,
    /// Those with this label.
    pub group: Option<String>,
    /// Those of this agent.
    pub assign_to: Option<String>,
    /// Deleting: all of them.
    pub all: Option<bool>,
}

/// The name of the agent whose tasks are asked for: tasks have their agent by its name.
async fn agent_asked_for(db: &ProjectDb, query: &TaskQuery) -> Result<Option<String>, ApiError> {
    let Some(agent) = &query.assign_to else {
        return Ok(None);
    };
    match db.agent(agent).await {
        Ok(agent) => Ok(Some(agent.name.clone())),
        Err(StoreError::NotFound) => Ok(Some(agent.clone())),
        Err(error) => Err(error.into()),
    }
}

/// A group is a label, or a mission's id (contract 2.6.6).
fn grouped(group: Option<&str>) -> TaskFilter<'_> {
    let mission = group.and_then(|group| group.parse().ok());
    TaskFilter {
        group: group.filter(|_| mission.is_none()),
        mission,
        ..TaskFilter::default()
    }
}

pub(super) fn task_id(id: &str) -> Result<Id<ids::Task>, ApiError> {
    id.parse().map_err(|_| ApiError::missing("Task", id))
}

pub(super) fn refused(error: LifecycleError, id: &str) -> ApiError {
    match error {
        LifecycleError::Store(StoreError::NotFound) => ApiError::missing("Task", id),
        LifecycleError::Store(error) => error.into(),
        LifecycleError::Illegal(step) => {
            ApiError::Conflict(format!("This cannot be done: {step}."))
        }
        LifecycleError::IllegalForMission(step) => {
            ApiError::Conflict(format!("This cannot be done: {step}."))
        }
        LifecycleError::Conflict(sentence) => ApiError::Conflict(sentence),
        LifecycleError::Missing(sentence) => ApiError::NotFound(sentence),
        LifecycleError::Faults(faults) => ApiError::faults(faults),
        LifecycleError::Invalid { param, message } => ApiError::invalid(param, message),
    }
}

/// Refuses a policy that would give the work to an agent that does not exist, or to a model of a provider that nobody knows.
async fn check_policy(app: &App, db: &ProjectDb, policy: &RetryPolicy) -> Result<(), ApiError> {
    if let Some(agent) = &policy.fallback_agent {
        match db.agent(agent).await {
            Ok(_) => {}
            Err(StoreError::NotFound) => {
                let sentence =
                    format!("`retryPolicy.fallbackAgent`: there is no agent \"{agent}\".");
                return Err(ApiError::invalid("retryPolicy", sentence));
            }
            Err(error) => return Err(error.into()),
        }
    }
    if let Some(model) = &policy.escalate_model {
        let place = ("retryPolicy", "retryPolicy.escalateModel");
        check_model(app, db, place, model).await?;
    }
    Ok(())
}

/// List tasks, oldest first.
#[utoipa::path(get, path = "/tasks", tag = "Tasks", params(TaskQuery, Page),
    responses((status = 200, description = "The tasks", body = Vec<TaskView>)))]
pub async fn list_tasks(
    Door(db): Door,
    Query(query): Query<TaskQuery>,
    Query(page): Query<Page>,
) -> Result<Response, ApiError> {
    let size = page.size()?;
    let status = status_of(query.status.as_deref())?;
    let agent = agent_asked_for(&db, &query).await?;
    let filter = TaskFilter {
        status,
        assign_to: agent.as_deref(),
        ..grouped(query.group.as_deref())
    };
    let found = db.tasks(filter, page.after()?, size).await?;
    let mut kept = form_urlencoded::Serializer::new(String::new());
    for (key, value) in [
        ("status", &query.status),
        ("group", &query.group),
        ("assignTo", &query.assign_to),
    ] {
        if let Some(value) = value {
            kept.append_pair(key, value);
        }
    }
    let kept = kept.finish();
    let path = if kept.is_empty() {
        "/v1/tasks".to_owned()
    } else {
        format!("/v1/tasks?{kept}")
    };
    let views = found.tasks.into_iter().map(TaskView::from).collect();
    let listed = Listed::page(views, found.may_be_more, size, &path, |task: &TaskView| {
        task.0["id"].as_str().unwrap_or_default().to_owned()
    });
    Ok(listed.into_response())
}

/// Hand an agent a task. It begins at once unless it is a draft or needs others.
#[utoipa::path(post, path = "/tasks", tag = "Tasks", request_body = CreateTask,
    responses(
        (status = 201, description = "The task", body = TaskView),
        (status = 400, description = "A field is missing or wrong", body = ErrorBody),
        (status = 409, description = "An unfinished task has this title", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn create_task(
    State(app): State<App>,
    Door(db): Door,
    Json(new): Json<CreateTask>,
) -> Result<(StatusCode, Json<TaskView>), ApiError> {
    let settings = db.settings().await?;
    let new = new.into_new(settings.max_retries)?;
    if let Some(policy) = &new.document.retry_policy {
        check_policy(&app, &db, policy).await?;
    }
    let task = lifecycle::create(&db, new)
        .await
        .map_err(|error| refused(error, ""))?;
    Ok((StatusCode::CREATED, Json(task.into())))
}

/// Delete tasks by filter.
#[utoipa::path(delete, path = "/tasks", tag = "Tasks", params(TaskQuery),
    responses((status = 200, description = "How many are gone", body = Object)))]
pub async fn delete_tasks(
    Door(db): Door,
    Query(query): Query<TaskQuery>,
) -> Result<Json<Value>, ApiError> {
    let status = status_of(query.status.as_deref())?;
    let agent = agent_asked_for(&db, &query).await?;
    let filtered = status.is_some() || query.group.is_some() || agent.is_some();
    let refusal = match (query.all == Some(true), filtered) {
        (false, false) => "Name a `status`, a `group` or an agent (`assignTo`), or set `all=true`.",
        (true, true) => {
            "`all=true` deletes every task, whatever its `status`, `group` or `assignTo`. Leave out one or the other."
        }
        _ => "",
    };
    if !refusal.is_empty() {
        return Err(ApiError::BadRequest {
            message: refusal.to_owned(),
            param: None,
        });
    }
    let filter = TaskFilter {
        status,
        assign_to: agent.as_deref(),
        ..grouped(query.group.as_deref())
    };
    let deleted = lifecycle::delete_all(&db, filter)
        .await
        .map_err(|error| refused(error, ""))?;
    Ok(Json(json!({"deleted": deleted})))
}

/// Read a task.
#[utoipa::path(get, path = "/tasks/{id}", tag = "Tasks", params(("id" = String, Path, description = "Its id")),
    responses((status = 200, description = "The task", body = TaskView), (status = 404, description = "No such task", body = ErrorBody)))]
pub async fn read_task(Door(db): Door, Path(id): Path<String>) -> Result<Json<TaskView>, ApiError> {
    let task = db
        .task(task_id(&id)?)
        .await
        .map_err(|error| refused(error.into(), &id))?;
    Ok(Json(task.into()))
}

/// Change a task.
#[utoipa::path(patch, path = "/tasks/{id}", tag = "Tasks", params(("id" = String, Path, description = "Its id")), request_body = UpdateTask,
    responses(
        (status = 200, description = "The task", body = TaskView),
        (status = 400, description = "A field is wrong", body = ErrorBody),
        (status = 404, description = "No such task", body = ErrorBody),
        (status = 409, description = "Not in this state", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn update_task(
    State(app): State<App>,
    Door(db): Door,
    Path(id): Path<String>,
    Json(change): Json<UpdateTask>,
) -> Result<Json<TaskView>, ApiError> {
    let task = db.task(task_id(&id)?).await;
    let task = task.map_err(|error| refused(error.into(), &id))?;
    let change = change.into_change(&task)?;
    // Who sends back what was read changes nothing of it, whatever has become of the agent since.
    if let Some(Some(policy)) = &change.retry_policy
        && Some(policy) != task.document.retry_policy.as_ref()
    {
        check_policy(&app, &db, policy).await?;
    }
    let task = lifecycle::update(&db, task.id, change)
        .await
        .map_err(|error| refused(error, &id))?;
    Ok(Json(task.into()))
}

/// Delete a task; its run is stopped.
#[utoipa::path(delete, path = "/tasks/{id}", tag = "Tasks", params(("id" = String, Path, description = "Its id")),
    responses((status = 200, description = "It is gone", body = Removed), (status = 404, description = "No such task", body = ErrorBody)))]
pub async fn delete_task(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<Removed>, ApiError> {
    lifecycle::delete(&db, task_id(&id)?)
        .await
        .map_err(|error| refused(error, &id))?;
    Ok(Json(Removed { removed: true }))
}

/// How a task is run.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct RunTask {
    /// Whether the agent's words come as a stream of chunks.
    pub stream: Option<bool>,
}

/// Run a task: a draft is queued, a paused one goes on. With `stream`, the words of its run follow, whichever process
/// runs it, from the run's beginning; closing the stream does not stop the task.
#[utoipa::path(post, path = "/tasks/{id}/run", tag = "Tasks", params(("id" = String, Path, description = "Its id")), request_body = Option<RunTask>,
    responses(
        (status = 200, description = "The task, or its stream", content((TaskView = "application/json"), (String = "text/event-stream"))),
        (status = 404, description = "No such task", body = ErrorBody),
        (status = 409, description = "It has ended", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn run_task(
    State(app): State<App>,
    Door(db): Door,
    Path(id): Path<String>,
    presented: Option<Extension<Presented>>,
    MaybeJson(how): MaybeJson<RunTask>,
) -> Result<Response, ApiError> {
    let task = task_id(&id)?;
    let streams = how.stream == Some(true);
    if streams {
        // Before the run begins, so that it writes its words down from the first.
        follow::announce(&app, task);
    }
    let task = lifecycle::run(&db, task)
        .await
        .map_err(|error| refused(error, &id))?;
    if streams {
        let presented = presented.map(|Extension(presented)| presented);
        Ok(follow::stream(app, db, task, presented))
    } else {
        Ok(Json(TaskView::from(task)).into_response())
    }
}

/// The same under its older name.
#[utoipa::path(post, path = "/tasks/{id}/execute", tag = "Tasks", params(("id" = String, Path, description = "Its id")), request_body = Option<RunTask>,
    responses(
        (status = 200, description = "The task, or its stream", content((TaskView = "application/json"), (String = "text/event-stream"))),
        (status = 404, description = "No such task", body = ErrorBody),
        (status = 409, description = "It has ended", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn execute_task(
    app: State<App>,
    door: Door,
    id: Path<String>,
    presented: Option<Extension<Presented>>,
    how: MaybeJson<RunTask>,
) -> Result<Response, ApiError> {
    run_task(app, door, id, presented, how).await
}

/// Pause a task: its run is stopped, and it waits until it is run again.
#[utoipa::path(post, path = "/tasks/{id}/pause", tag = "Tasks", params(("id" = String, Path, description = "Its id")),
    responses(
        (status = 200, description = "The task", body = TaskView),
        (status = 404, description = "No such task", body = ErrorBody),
        (status = 409, description = "Not in this state", body = ErrorBody),
    ))]
pub async fn pause_task(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<TaskView>, ApiError> {
    let task = lifecycle::pause(&db, task_id(&id)?)
        .await
        .map_err(|error| refused(error, &id))?;
    Ok(Json(task.into()))
}

/// Stop a task for good.
#[utoipa::path(post, path = "/tasks/{id}/kill", tag = "Tasks", params(("id" = String, Path, description = "Its id")), request_body = Option<StopTask>,
    responses(
        (status = 200, description = "It has ended", body = Object),
        (status = 404, description = "No such task", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn kill_task(
    Door(db): Door,
    Path(id): Path<String>,
    MaybeJson(why): MaybeJson<StopTask>,
) -> Result<Json<Value>, ApiError> {
    lifecycle::kill(&db, task_id(&id)?, why.reason()?)
        .await
        .map_err(|error| refused(error, &id))?;
    Ok(Json(json!({"killed": true})))
}

/// Fail a task by hand.
#[utoipa::path(post, path = "/tasks/{id}/force-fail", tag = "Tasks", params(("id" = String, Path, description = "Its id")), request_body = Option<StopTask>,
    responses(
        (status = 200, description = "It has ended", body = Object),
        (status = 404, description = "No such task", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn force_fail_task(
    Door(db): Door,
    Path(id): Path<String>,
    MaybeJson(why): MaybeJson<StopTask>,
) -> Result<Json<Value>, ApiError> {
    lifecycle::force_fail(&db, task_id(&id)?, why.reason()?)
        .await
        .map_err(|error| refused(error, &id))?;
    Ok(Json(json!({"failed": true})))
}

/// Try a failed task again.
#[utoipa::path(post, path = "/tasks/{id}/retry", tag = "Tasks", params(("id" = String, Path, description = "Its id")),
    responses(
        (status = 200, description = "It is pending", body = Object),
        (status = 404, description = "No such task", body = ErrorBody),
        (status = 409, description = "It has not failed", body = ErrorBody),
    ))]
pub async fn retry_task(Door(db): Door, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    lifecycle::retry(&db, task_id(&id)?)
        .await
        .map_err(|error| refused(error, &id))?;
    Ok(Json(json!({"retried": true})))
}

/// Have finished work judged again, in the background: `assessment:completed` tells how.
#[utoipa::path(post, path = "/tasks/{id}/reassess", tag = "Tasks", params(("id" = String, Path, description = "Its id")),
    responses(
        (status = 200, description = "It will be", body = Object),
        (status = 404, description = "No such task", body = ErrorBody),
        (status = 409, description = "It is not finished", body = ErrorBody),
    ))]
pub async fn reassess_task(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    lifecycle::reassess(&db, task_id(&id)?)
        .await
        .map_err(|error| refused(error, &id))?;
    Ok(Json(json!({"reassessed": true})))
}

/// Make a draft wait for its turn.
#[utoipa::path(post, path = "/tasks/{id}/queue", tag = "Tasks", params(("id" = String, Path, description = "Its id")),
    responses(
        (status = 200, description = "It is pending", body = Object),
        (status = 404, description = "No such task", body = ErrorBody),
        (status = 409, description = "It is no draft", body = ErrorBody),
    ))]
pub async fn queue_task(Door(db): Door, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    lifecycle::queue(&db, task_id(&id)?)
        .await
        .map_err(|error| refused(error, &id))?;
    Ok(Json(json!({"queued": true})))
}
