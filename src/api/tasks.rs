//! `/v1/tasks` (contract 2.6.6).

use axum::extract::{Extension, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Datelike, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::agents::Removed;
use super::auth::Presented;
use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Listed, MaybeJson, Page, Path, Query};
use super::follow;
use super::shapes::{ExpectationShape, TaskShape};
use crate::app::App;
use crate::event::timestamp;
use crate::ids::{self, Id};
use crate::lifecycle::{self, LifecycleError, NewTask, TaskChange};
use crate::store::{ProjectDb, StepKind, StoreError, TaskFilter};
use crate::task::{
    Document, Expectation, ExpectedOutcome, LONGEST_TIME, RetryPolicy, Status, Task, refuse_metrics,
};

/// A new task. Other members (`notifications`, `user`, `loop`, `executionMode`, `sandbox`, `routing`) are kept as given.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CreateTask {
    /// What it is called; unique among unfinished tasks.
    #[schema(value_type = String, min_length = 1, max_length = 500)]
    pub title: Option<String>,
    /// The instructions.
    #[schema(value_type = String, min_length = 1)]
    pub description: Option<String>,
    /// The agent that does it.
    #[schema(value_type = String, min_length = 1)]
    pub assign_to: Option<String>,
    /// Ids or titles of tasks that must be done first.
    pub depends_on: Option<Vec<String>>,
    /// What the work is judged by.
    #[schema(value_type = Option<Vec<ExpectationShape>>)]
    pub expectations: Option<Value>,
    /// What it is to leave behind.
    #[schema(value_type = Option<Vec<ExpectedOutcome>>)]
    pub expected_outcomes: Option<Value>,
    /// None until there is a sandbox.
    #[schema(value_type = Option<Vec<Object>>)]
    pub metrics: Option<Value>,
    /// Full retries before it fails.
    #[schema(maximum = 100)]
    pub max_retries: Option<u32>,
    /// Higher runs first; 1 when absent.
    pub priority: Option<f64>,
    /// Whether it touches the outside world: then a person says yes before it is done.
    pub side_effects: Option<bool>,
    /// The longest run in milliseconds; 0 is no limit.
    pub max_duration: Option<u64>,
    /// How it changes hands when it fails.
    pub retry_policy: Option<RetryPolicy>,
    /// A label that it shares with others.
    #[schema(max_length = 200)]
    pub group: Option<String>,
    /// Whether it is not to be worked on yet.
    pub draft: Option<bool>,
    /// When it must be done.
    pub deadline: Option<DateTime<Utc>>,
    /// The rest.
    #[serde(flatten)]
    #[schema(ignore)]
    pub others: Map<String, Value>,
}

/// Members that are kept for others to read.
const KEPT: [&str; 6] = [
    "notifications",
    "user",
    "loop",
    "executionMode",
    "sandbox",
    "routing",
];
/// The longest title, in characters.
const TITLE: usize = 500;
/// The longest name of an agent, a model or a group, in bytes.
const NAME: usize = 200;
/// The longest reason, in characters.
const REASON: usize = 2_000;
/// The most of a member that is a list or an object, in bytes of JSON.
const MEMBER: usize = 32 * 1024;
/// The most of a task, in bytes of JSON: every event of it shows all.
const WHOLE: usize = 256 * 1024;
/// The longest description, in bytes: every event of the task shows it.
const DESCRIPTION: usize = 128 * 1024;

impl CreateTask {
    fn into_new(self, default_retries: u32) -> Result<NewTask, ApiError> {
        let title = required("title", self.title)?;
        if title.chars().count() > TITLE {
            return Err(ApiError::invalid(
                "title",
                format!("title: at most {TITLE} characters"),
            ));
        }
        let description = required("description", self.description)?;
        check_description(&description)?;
        let assign_to = required("assignTo", self.assign_to)?;
        let list = |param: &str, error: String| ApiError::invalid(param, error);
        let expectations = Expectation::parse_all(&self.expectations.unwrap_or_default())
            .map_err(|error| list("expectations", error))?;
        let expected_outcomes =
            ExpectedOutcome::parse_all(&self.expected_outcomes.unwrap_or_default())
                .map_err(|error| list("expectedOutcomes", error))?;
        refuse_metrics(&self.metrics.unwrap_or_default())
            .map_err(|error| list("metrics", error))?;
        let max_retries = retries("maxRetries", self.max_retries)?.unwrap_or(default_retries);
        let depends_on = self.depends_on.unwrap_or_default();
        if depends_on.len() > 100 {
            return Err(ApiError::invalid(
                "dependsOn",
                "`dependsOn` may name at most 100 tasks.",
            ));
        }
        let mut extras = self.others;
        extras.retain(|key, value| KEPT.contains(&key.as_str()) && !value.is_null());
        check_extras(&extras)?;
        if let Some(expected) = &expected_outcomes {
            check_size("expectedOutcomes", expected, MEMBER)?;
        }
        check_size("expectations", &expectations, MEMBER)?;
        check_size("retryPolicy", &self.retry_policy, 1024)?;
        check_length("group", self.group.as_deref(), NAME)?;
        check_length("assignTo", Some(&assign_to), NAME)?;
        for need in &depends_on {
            check_length("dependsOn", Some(need), TITLE)?;
        }
        check_times(self.max_duration, self.deadline)?;
        let new = NewTask {
            title,
            assign_to,
            group: self.group.filter(|group| !group.is_empty()),
            draft: self.draft.unwrap_or(false),
            document: Document {
                description,
                depends_on,
                expectations,
                expected_outcomes,
                priority: self.priority.unwrap_or(1.0),
                max_retries,
                side_effects: self.side_effects.unwrap_or(false),
                max_duration: self.max_duration,
                retry_policy: self.retry_policy,
                deadline: self.deadline,
                extras,
                ..Document::default()
            },
        };
        check_size("description", &new.document, WHOLE)?;
        Ok(new)
    }
}

fn check_length(param: &str, text: Option<&str>, most: usize) -> Result<(), ApiError> {
    match text {
        Some(text) if text.chars().count() > most => {
            let sentence = format!("`{param}` must be at most {most} characters.");
            Err(ApiError::invalid(param, sentence))
        }
        _ => Ok(()),
    }
}

/// Whatever a task holds goes out again with each of its events.
fn check_size(param: &str, value: &impl Serialize, most: usize) -> Result<(), ApiError> {
    let size = serde_json::to_vec(value).map_or(usize::MAX, |text| text.len());
    if size > most {
        let sentence = format!("`{param}` is too long: {size} bytes, of {most} in all.");
        return Err(ApiError::invalid(param, sentence));
    }
    Ok(())
}

fn check_extras(extras: &Map<String, Value>) -> Result<(), ApiError> {
    for (member, value) in extras {
        let fits = match member.as_str() {
            "notifications" => value.is_object(),
            _ => value.is_object() || value.is_string(),
        };
        if !fits {
            let sentence = format!("`{member}` must be an object.");
            return Err(ApiError::invalid(member, sentence));
        }
        check_size(member, value, MEMBER)?;
    }
    Ok(())
}

fn check_times(max_duration: Option<u64>, deadline: Option<DateTime<Utc>>) -> Result<(), ApiError> {
    if max_duration > Some(LONGEST_TIME) {
        let sentence = format!("`maxDuration` must be at most {LONGEST_TIME} milliseconds.");
        return Err(ApiError::invalid("maxDuration", sentence));
    }
    if deadline.is_some_and(|deadline| !(1970..=9999).contains(&deadline.year())) {
        return Err(ApiError::invalid(
            "deadline",
            "`deadline` must be between the years 1970 and 9999.",
        ));
    }
    Ok(())
}

fn required(param: &str, value: Option<String>) -> Result<String, ApiError> {
    value
        .filter(|value| !value.trim().is_empty())
        .ok_or_else(|| ApiError::invalid(param, format!("{param}: required")))
}

fn check_description(description: &str) -> Result<(), ApiError> {
    if description.len() > DESCRIPTION {
        let sentence = format!("`description` must be at most {} KiB.", DESCRIPTION / 1024);
        return Err(ApiError::invalid("description", sentence));
    }
    Ok(())
}

fn retries(param: &str, given: Option<u32>) -> Result<Option<u32>, ApiError> {
    match given {
        Some(retries) if retries > 100 => {
            let sentence = format!("`{param}` must be from 0 to 100.");
            Err(ApiError::invalid(param, sentence))
        }
        given => Ok(given),
    }
}

/// A change to a task; what is absent stays.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UpdateTask {
    /// Other instructions.
    pub description: Option<String>,
    /// Another agent.
    pub assign_to: Option<String>,
    /// A step of the status machine: `pending`, `assigned`, `done` or `failed` where it allows.
    #[schema(value_type = Option<Status>)]
    pub status: Option<String>,
    /// Other expectations, while the task is not worked on.
    #[schema(value_type = Option<Vec<Object>>)]
    pub expectations: Option<Value>,
    /// Another count of retries used.
    #[schema(maximum = 100)]
    pub retries: Option<u32>,
    /// Another limit of retries.
    #[schema(maximum = 100)]
    pub max_retries: Option<u32>,
    /// Whether it touches the outside world.
    pub side_effects: Option<bool>,
    /// Another weight.
    pub priority: Option<f64>,
}

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

fn status_of(word: Option<&str>) -> Result<Option<Status>, ApiError> {
    let Some(word) = word else { return Ok(None) };
    Status::of(word).map(Some).ok_or_else(|| {
        let known: Vec<&str> = Status::ALL.iter().map(|status| status.as_str()).collect();
        ApiError::invalid(
            "status",
            format!("`status` must be one of {}.", known.join(", ")),
        )
    })
}

/// A group is a label, or a mission's id (contract 2.6.6).
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
    let tasks = db.tasks(filter, page.after()?, size).await?;
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
    let views = tasks.into_iter().map(TaskView::from).collect();
    let listed = Listed::new(views, size, &path, |task: &TaskView| {
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
    Door(db): Door,
    Json(new): Json<CreateTask>,
) -> Result<(StatusCode, Json<TaskView>), ApiError> {
    let settings = db.settings().await?;
    let new = new.into_new(settings.max_retries)?;
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
    Door(db): Door,
    Path(id): Path<String>,
    Json(change): Json<UpdateTask>,
) -> Result<Json<TaskView>, ApiError> {
    let filled = |param: &str, value: Option<String>| match value {
        Some(value) if value.trim().is_empty() => Err(ApiError::invalid(
            param,
            format!("`{param}` must not be empty."),
        )),
        value => Ok(value),
    };
    let expectations = match &change.expectations {
        None | Some(Value::Null) => None,
        Some(given) => Some(
            Expectation::parse_all(given)
                .map_err(|error| ApiError::invalid("expectations", error))?,
        ),
    };
    if let Some(description) = &change.description {
        check_description(description)?;
    }
    check_size("expectations", &expectations, MEMBER)?;
    check_length("assignTo", change.assign_to.as_deref(), NAME)?;
    let change = TaskChange {
        description: filled("description", change.description)?,
        assign_to: filled("assignTo", change.assign_to)?,
        status: status_of(change.status.as_deref())?,
        expectations,
        retries: retries("retries", change.retries)?,
        max_retries: retries("maxRetries", change.max_retries)?,
        side_effects: change.side_effects,
        priority: change.priority,
    };
    let task = lifecycle::update(&db, task_id(&id)?, change)
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

/// Why something is stopped.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct StopTask {
    /// For people to read.
    #[schema(max_length = 2000)]
    pub reason: Option<String>,
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
    check_length("reason", why.reason.as_deref(), REASON)?;
    lifecycle::kill(&db, task_id(&id)?, why.reason.as_deref())
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
    check_length("reason", why.reason.as_deref(), REASON)?;
    lifecycle::force_fail(&db, task_id(&id)?, why.reason.as_deref())
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

/// What a task's last run did, step by step.
#[utoipa::path(get, path = "/tasks/{id}/activity", tag = "Tasks", params(("id" = String, Path, description = "Its id")),
    responses((status = 200, description = "The steps", body = Object), (status = 404, description = "No such task", body = ErrorBody)))]
pub async fn read_activity(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let task = db
        .task(task_id(&id)?)
        .await
        .map_err(|error| refused(error.into(), &id))?;
    let session = task.document.session;
    let (run, entries) = match task.run.or(session.map(Id::from)) {
        Some(run) => (
            match db.run(run).await {
                Ok(run) => json!({
                    "id": run.id, "status": run.status, "startedAt": timestamp(run.started_at),
                    "endedAt": run.ended_at.map(timestamp),
                }),
                Err(StoreError::NotFound) => Value::Null,
                Err(error) => return Err(error.into()),
            },
            entries(&db.all_steps(run).await?),
        ),
        None => (Value::Null, Vec::new()),
    };
    let resolution = session.map_or("missing", |_| "explicit");
    Ok(Json(json!({
        "task": task.view(), "run": run, "sessionId": session, "sessionResolution": resolution, "entries": entries,
    })))
}

/// The steps of a run as log entries, without secrets.
pub(super) fn entries(steps: &[crate::store::StepRow]) -> Vec<Value> {
    steps
        .iter()
        .map(|step| {
            let event = match step.kind {
                StepKind::Model => "assistant",
                StepKind::Tool => "tool",
                StepKind::Compaction => "compaction",
                StepKind::Review => "review",
            };
            let mut data = step.body.clone();
            redact(&mut data);
            json!({"ts": timestamp(step.created_at), "event": event, "step": step.number, "data": data})
        })
        .collect()
}

const SECRET: [&str; 7] = [
    "pass",
    "secret",
    "token",
    "key",
    "auth",
    "password",
    "credential",
];

/// Hides what tools were given under names that sound secret (contract 2.4.2), in arguments that are JSON text too.
pub(super) fn redact(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(redact),
        Value::Object(members) => {
            for (name, member) in members.iter_mut() {
                let lower = name.to_lowercase();
                match member {
                    Value::String(text) if name == "arguments" => {
                        if let Ok(mut parsed) = serde_json::from_str::<Value>(text) {
                            redact(&mut parsed);
                            *text = parsed.to_string();
                        }
                    }
                    member if SECRET.iter().any(|word| lower.contains(word)) => hide(member),
                    member => redact(member),
                }
            }
        }
        _ => {}
    }
}

/// Hides every text of something whose name sounds secret. The counts of a model's tokens are no secret, and are numbers.
fn hide(value: &mut Value) {
    match value {
        Value::String(text) => "[REDACTED]".clone_into(text),
        Value::Array(items) => items.iter_mut().for_each(hide),
        Value::Object(members) => members.values_mut().for_each(hide),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_sounds_secret_is_hidden_in_arguments_too() {
        let mut body = json!({
            "name": "http_fetch", "usage": {"prompt_tokens": 7},
            "arguments": r#"{"url":"https://a","headers":{"Authorization":"Bearer x"},"apiKey":"y","apiKeys":["y"],"auth":{"value":"y"}}"#,
        });
        redact(&mut body);
        assert_eq!(body["usage"]["prompt_tokens"], 7);
        let text = body.to_string();
        assert!(
            !text.contains("Bearer x") && !text.contains("\\\"y\\\"") && text.contains("https://a"),
            "{text}"
        );
    }
}
