//! `/v1/missions` (contract 2.8.9). The routes that edit a mission's parts are in [`super::mission_parts`].

use axum::extract::{Extension, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::agents;
use super::auth::Presented;
use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Listed, MaybeJson, Page, Path, Query};
use super::follow_mission;
use super::sessions::Deleted;
use super::shapes::MissionShape;
use super::tasks::TaskView;
use crate::app::App;
use crate::event::timestamp;
use crate::ids::{self, Id};
use crate::lifecycle::mission::{self as missions, MissionChange, NewMission};
use crate::lifecycle::schedule::NewSchedule;
use crate::lifecycle::{LifecycleError, mission::Execution};
use crate::mission::{BarrierList, CatchUp, Document, Overlap, Status, Timing};
use crate::store::{
    BarrierRow, BarrierState, MissionRow, MissionRunRow, ProjectDb, StoreError, Tally,
};

/// What a mission is made of (contract 2.8.1). Every fault of it is reported at once, in `details`.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "it describes what `Document::parse` reads")]
#[schema(rename_all = "camelCase", as = MissionFields)]
pub struct MissionFields {
    /// The goal, which every agent reads.
    prompt: Option<String>,
    /// What every agent is given; or a text that holds a whole mission document.
    #[schema(value_type = Option<Object>)]
    data: Option<Value>,
    /// 1 to 2,000 of `{title, description, assignTo, dependsOn?, expectations?, expectedOutcomes?, maxRetries?, priority?,
    /// sideEffects?, maxDuration?, retryPolicy?}`.
    #[schema(value_type = Vec<Object>)]
    tasks: Value,
    /// Agents that come and go with the mission: `{name?, volatile?, agents: [{name, role?, model?, …}]}`.
    #[schema(value_type = Option<Object>)]
    team: Option<Value>,
    /// The least score of its tasks and of all of it; 3 when absent.
    #[schema(minimum = 1, maximum = 5)]
    quality_threshold: Option<f64>,
    /// When it must have ended; then it fails.
    deadline: Option<DateTime<Utc>>,
    /// Cron of five fields, or a date.
    schedule: Option<String>,
    /// From when on the schedule is not due any more.
    end_date: Option<DateTime<Utc>>,
    /// `{name, afterTasks, blocksTasks, message?}`: people look at what there is before it goes on.
    #[schema(value_type = Option<Vec<Object>>)]
    checkpoints: Option<Value>,
    /// `{name, afterTasks, blocksTasks, minScore?, requireAllPassed?, condition?}`: it goes on when what there is is good enough.
    #[schema(value_type = Option<Vec<Object>>)]
    quality_gates: Option<Value>,
    /// `{name, afterTasks, blocksTasks, duration}`: it goes on after a while (ISO 8601).
    #[schema(value_type = Option<Vec<Object>>)]
    delays: Option<Value>,
    /// Kept for others to read.
    #[schema(value_type = Option<Object>)]
    notifications: Option<Value>,
    /// Whose it is.
    user: Option<String>,
}

/// A new mission.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct CreateMission {
    /// Unique in the project.
    #[schema(min_length = 1, max_length = 500)]
    pub name: Option<String>,
    /// `draft`; with a `schedule`, `scheduled` or `recurring`, which is told by the schedule when absent.
    #[schema(value_type = Option<Status>)]
    pub status: Option<String>,
    /// The rest.
    #[serde(flatten)]
    #[schema(value_type = MissionFields)]
    pub fields: Map<String, Value>,
}

/// A change to a mission: what is absent stays, what is null goes. A run that is under way keeps its definition.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct UpdateMission {
    /// Another name.
    #[schema(min_length = 1, max_length = 500)]
    pub name: Option<String>,
    /// `draft`; or `paused` and `active`, to hold a run and let it go on.
    #[schema(value_type = Option<Status>)]
    pub status: Option<String>,
    /// The rest.
    #[serde(flatten)]
    #[schema(value_type = Option<Object>)]
    pub fields: Map<String, Value>,
}

/// A mission (contract 2.8.1): in lists without its tasks and what is between them.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = MissionShape)]
pub struct MissionView(Value);

/// A run that has begun.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ExecutionView {
    /// Its tasks, each after what it needs.
    pub tasks: Vec<TaskView>,
    /// Their group.
    pub group: String,
}

impl From<Execution> for ExecutionView {
    fn from(execution: Execution) -> Self {
        Self {
            tasks: execution.tasks.into_iter().map(TaskView::from).collect(),
            group: execution.group,
        }
    }
}

/// The longest name, in characters.
const NAME: usize = 500;

pub(super) fn mission_id(id: &str) -> Result<Id<ids::Mission>, ApiError> {
    id.parse().map_err(|_| missing(id))
}

/// Names are a frequent mistake here (contract 4), so the sentence says what is meant.
fn missing(id: &str) -> ApiError {
    ApiError::NotFound(format!(
        "Mission \"{id}\" not found. Missions are addressed by their id, `msn_…`."
    ))
}

pub(super) fn refused(error: LifecycleError, id: &str) -> ApiError {
    match error {
        LifecycleError::Store(StoreError::NotFound) => missing(id),
        error => super::tasks::refused(error, id),
    }
}

fn name_of(name: Option<String>, faults: &mut Vec<String>) -> String {
    match name {
        Some(name) if name.chars().count() > NAME => {
            faults.push(format!("name: at most {NAME} characters"));
            String::new()
        }
        Some(name) if !name.trim().is_empty() => name,
        _ => {
            faults.push("name: required".to_owned());
            String::new()
        }
    }
}

/// Reads a definition with its graph and its team; every fault.
fn definition(app: &App, members: &Map<String, Value>, faults: &mut Vec<String>) -> Document {
    match Document::check(members) {
        Ok((document, _)) => {
            faults.extend(team_faults(app, &document));
            document
        }
        Err(found) => {
            faults.extend(found);
            Document::default()
        }
    }
}

/// What is wrong with the agents of a mission's team, which are agents like others.
pub(super) fn team_faults(app: &App, document: &Document) -> Vec<String> {
    let mut faults = Vec::new();
    let members = document.team.iter().flat_map(|team| &team.agents);
    for (index, member) in members.enumerate() {
        let checks = [
            agents::check_name("name", &member.name),
            agents::check(app, &member.fields),
        ];
        for error in checks.into_iter().filter_map(Result::err) {
            faults.push(format!("team.agents[{index}].{error}"));
        }
    }
    faults
}

/// The schedule that a definition asks for. A date is due once, cron again and again, unless the status says otherwise.
fn schedule_of(
    members: &mut Map<String, Value>,
    status: Option<Status>,
    end_date: Option<DateTime<Utc>>,
    faults: &mut Vec<String>,
) -> Option<NewSchedule> {
    let expression = match members.remove("schedule") {
        None | Some(Value::Null) => return None,
        Some(Value::String(expression)) => expression,
        Some(_) => {
            faults.push("schedule: must be cron of five fields, or a date".to_owned());
            return None;
        }
    };
    let recurring = match status {
        Some(Status::Recurring) => true,
        Some(Status::Scheduled) => false,
        _ => Timing::parse(&expression, None, true).is_ok(),
    };
    if let Err(error) = Timing::parse(&expression, None, recurring) {
        faults.push(format!("schedule: {}", error.message));
    }
    Some(NewSchedule {
        expression,
        timezone: None,
        recurring,
        enabled: status != Some(Status::Draft),
        end_date,
        deadline_offset_ms: None,
        catch_up: CatchUp::default(),
        overlap: Overlap::default(),
    })
}

fn end_date_of(
    members: &mut Map<String, Value>,
    faults: &mut Vec<String>,
) -> Option<Option<DateTime<Utc>>> {
    match members.remove("endDate")? {
        Value::Null => Some(None),
        value => {
            let date = value
                .as_str()
                .and_then(|text| DateTime::parse_from_rfc3339(text).ok());
            if date.is_none() {
                faults.push("endDate: must be a date such as 2026-04-07T12:00:00Z".to_owned());
            }
            Some(date.map(|date| date.with_timezone(&Utc)))
        }
    }
}

fn status_of(word: Option<&str>, faults: &mut Vec<String>) -> Option<Status> {
    let word = word?;
    let status = Status::of(word);
    if status.is_none() {
        let known: Vec<&str> = Status::ALL.iter().map(|status| status.as_str()).collect();
        faults.push(format!("status: must be one of {}", known.join(", ")));
    }
    status
}

fn checked(faults: Vec<String>) -> Result<(), ApiError> {
    if faults.is_empty() {
        Ok(())
    } else {
        Err(ApiError::faults(faults))
    }
}

fn read_new(app: &App, new: CreateMission) -> Result<NewMission, ApiError> {
    let mut faults = Vec::new();
    let mut members = new.fields;
    if let Err(found) = Document::lift(&mut members) {
        faults.extend(found);
        members.remove("data");
    }
    let lifted = members
        .remove("name")
        .and_then(|name| name.as_str().map(str::to_owned));
    let name = name_of(new.name.or(lifted), &mut faults);
    let lifted = members
        .remove("status")
        .and_then(|status| status.as_str().map(str::to_owned));
    let status = status_of(new.status.or(lifted).as_deref(), &mut faults);
    let end_date = end_date_of(&mut members, &mut faults).flatten();
    let schedule = schedule_of(&mut members, status, end_date, &mut faults);
    match (status, &schedule) {
        (None | Some(Status::Draft), _)
        | (Some(Status::Scheduled | Status::Recurring), Some(_)) => {}
        (Some(Status::Scheduled | Status::Recurring), None) => {
            faults.push("schedule: required with this `status`".to_owned());
        }
        (Some(status), _) => {
            faults.push(format!("status: a new mission cannot be `{status}`"));
        }
    }
    if end_date.is_some() && schedule.is_none() {
        faults.push("endDate: needs a `schedule`".to_owned());
    }
    let document = definition(app, &members, &mut faults);
    checked(faults)?;
    Ok(NewMission {
        name,
        document,
        schedule,
    })
}

/// A mission with its definition and its newest run.
pub(super) async fn show(db: &ProjectDb, id: Id<ids::Mission>) -> Result<MissionView, ApiError> {
    let mut row = db
        .mission(id)
        .await
        .map_err(|error| refused(error.into(), &id.to_string()))?;
    // In the order of the contract, which the database does not keep.
    if let Ok(document) = Document::parse(&row.definition) {
        row.definition = document.members();
    }
    let mut view = view(&row);
    let run = match db.mission_run(id, None).await {
        Ok(run) => Some(run),
        Err(StoreError::NotFound) => None,
        Err(error) => return Err(error.into()),
    };
    if let Some(run) = run {
        let tally = db.tally(run.place).await?;
        let barriers = if row.mission.status().is_running() {
            db.reached_barriers(run.place).await?
        } else {
            Vec::new()
        };
        view["run"] = run_view(&run, &tally, &barriers);
    }
    Ok(MissionView(view))
}

fn view(row: &MissionRow) -> Value {
    let mission = &row.mission;
    let mut view = json!({
        "id": mission.id, "name": mission.name, "status": mission.status(),
        "executionCount": mission.execution_count, "taskCount": row.task_count,
    });
    let members = view.as_object_mut().expect("it was made as an object");
    let optional = [
        ("reason", json!(mission.reason)),
        ("schedule", json!(row.schedule)),
        ("endDate", json!(row.end_date.map(timestamp))),
    ];
    members.extend(
        optional
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(name, value)| (name.to_owned(), value)),
    );
    members.extend(row.definition.clone());
    members.insert("createdAt".to_owned(), json!(timestamp(mission.created_at)));
    members.insert("updatedAt".to_owned(), json!(timestamp(mission.updated_at)));
    view
}

fn run_view(run: &MissionRunRow, tally: &[Tally], barriers: &[BarrierRow]) -> Value {
    let tasks: Map<String, Value> = tally
        .iter()
        .map(|tally| (tally.status.clone(), json!(tally.count)))
        .collect();
    let waiting: Vec<Value> = barriers.iter().map(waiting_view).collect();
    json!({
        "number": run.place.run, "group": run.group, "startedAt": timestamp(run.started_at),
        "endedAt": run.ended_at.map(timestamp), "deadline": run.deadline.map(timestamp),
        "tasks": tasks, "waitingFor": waiting,
    })
}

fn waiting_view(barrier: &BarrierRow) -> Value {
    json!({
        "kind": barrier.list.as_str(), "name": barrier.name,
        "state": if barrier.state == BarrierState::Failed { "closed" } else { "reached" },
        "reason": barrier.reason, "since": barrier.reached_at.map(timestamp), "until": barrier.expires_at.map(timestamp),
    })
}

/// Which missions.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub struct MissionQuery {
    /// Those that stand there.
    #[param(value_type = Option<Status>)]
    pub status: Option<String>,
}

fn listed(rows: &[MissionRow], size: i64, path: &str) -> Response {
    let views = rows.iter().map(|row| MissionView(view(row))).collect();
    Listed::new(views, size, path, |mission: &MissionView| {
        mission.0["id"].as_str().unwrap_or_default().to_owned()
    })
    .into_response()
}

/// List missions, newest first, without their tasks.
#[utoipa::path(get, path = "/missions", tag = "Missions", params(MissionQuery, Page),
    responses((status = 200, description = "The missions", body = Vec<MissionView>)))]
pub async fn list_missions(
    Door(db): Door,
    Query(query): Query<MissionQuery>,
    Query(page): Query<Page>,
) -> Result<Response, ApiError> {
    let size = page.size()?;
    let mut faults = Vec::new();
    let status = status_of(query.status.as_deref(), &mut faults);
    checked(faults)?;
    let rows = db.missions(status, false, page.after()?, size).await?;
    let path = match status {
        Some(status) => format!("/v1/missions?status={status}"),
        None => "/v1/missions".to_owned(),
    };
    Ok(listed(&rows, size, &path))
}

/// Create a mission.
#[utoipa::path(post, path = "/missions", tag = "Missions", request_body = CreateMission,
    responses(
        (status = 201, description = "The mission", body = MissionView),
        (status = 400, description = "The definition is faulty: `details` has every fault", body = ErrorBody),
        (status = 409, description = "The name is taken", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn create_mission(
    State(app): State<App>,
    Door(db): Door,
    Json(new): Json<CreateMission>,
) -> Result<(StatusCode, Json<MissionView>), ApiError> {
    let new = read_new(&app, new)?;
    let mission = missions::create(&db, new)
        .await
        .map_err(|error| refused(error, ""))?;
    Ok((StatusCode::CREATED, Json(show(&db, mission.id).await?)))
}

/// Read a mission with its definition and where its newest run stands.
#[utoipa::path(get, path = "/missions/{id}", tag = "Missions", params(("id" = String, Path, description = "Its id")),
    responses((status = 200, description = "The mission", body = MissionView), (status = 404, description = "No such mission", body = ErrorBody)))]
pub async fn read_mission(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<MissionView>, ApiError> {
    Ok(Json(show(&db, mission_id(&id)?).await?))
}

/// Change a mission.
#[utoipa::path(patch, path = "/missions/{id}", tag = "Missions", params(("id" = String, Path, description = "Its id")), request_body = UpdateMission,
    responses(
        (status = 200, description = "The mission", body = MissionView),
        (status = 400, description = "The definition would be faulty: `details` has every fault", body = ErrorBody),
        (status = 404, description = "No such mission", body = ErrorBody),
        (status = 409, description = "The name is taken, or the status cannot be set by hand", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn update_mission(
    State(app): State<App>,
    Door(db): Door,
    Path(id): Path<String>,
    Json(change): Json<UpdateMission>,
) -> Result<Json<MissionView>, ApiError> {
    let id = mission_id(&id)?;
    let row = db
        .mission(id)
        .await
        .map_err(|error| refused(error.into(), &id.to_string()))?;
    let change = read_change(&app, change, &row)?;
    missions::update(&db, id, change)
        .await
        .map_err(|error| refused(error, &id.to_string()))?;
    Ok(Json(show(&db, id).await?))
}

fn read_change(
    app: &App,
    change: UpdateMission,
    row: &MissionRow,
) -> Result<MissionChange, ApiError> {
    let mut faults = Vec::new();
    let mut members = change.fields;
    if let Err(found) = Document::lift(&mut members) {
        faults.extend(found);
        members.remove("data");
    }
    for member in [
        "name",
        "status",
        "id",
        "executionCount",
        "taskCount",
        "createdAt",
        "updatedAt",
        "run",
        "reason",
    ] {
        members.remove(member);
    }
    let name = change.name.map(|name| name_of(Some(name), &mut faults));
    let status = status_of(change.status.as_deref(), &mut faults);
    let end_date = end_date_of(&mut members, &mut faults);
    let removed = members.get("schedule").is_some_and(Value::is_null);
    let waits = match status.or(Some(row.mission.status())) {
        waits @ Some(Status::Scheduled | Status::Recurring) => waits,
        _ => None,
    };
    let end = end_date.unwrap_or(row.end_date);
    let schedule = schedule_of(&mut members, waits, end, &mut faults);
    if end_date.flatten().is_some() && schedule.is_none() && (removed || row.schedule.is_none()) {
        faults.push("endDate: needs a `schedule`".to_owned());
    }
    if status == Some(Status::Draft) && schedule.is_some() {
        faults.push("status: a mission that is to begin by itself is no draft; leave one of `status` and `schedule` out".to_owned());
    }
    if !members.is_empty() {
        let mut whole = row.definition.clone();
        whole.extend(members.clone());
        definition(app, &whole, &mut faults);
    }
    checked(faults)?;
    let changes_schedule = removed || schedule.is_some();
    Ok(MissionChange {
        name,
        definition: members,
        // A schedule puts the mission where it waits.
        status: status.filter(|status| {
            schedule.is_none() || !matches!(status, Status::Scheduled | Status::Recurring)
        }),
        schedule: match schedule {
            Some(schedule) => Some(Some(schedule)),
            None if removed => Some(None),
            None => None,
        },
        end_date: end_date.filter(|_| !changes_schedule && row.schedule.is_some()),
    })
}

/// Delete a mission with its tasks; what runs is stopped.
#[utoipa::path(delete, path = "/missions/{id}", tag = "Missions", params(("id" = String, Path, description = "Its id")),
    responses(
        (status = 200, description = "It is gone", body = Deleted),
        (status = 404, description = "No such mission", body = ErrorBody),
        (status = 409, description = "It was executed meanwhile", body = ErrorBody),
    ))]
pub async fn delete_mission(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    missions::delete(&db, mission_id(&id)?)
        .await
        .map_err(|error| refused(error, &id))?;
    Ok(Json(Deleted { deleted: true }))
}

/// How a mission is executed.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct ExecuteMission {
    /// Whether the words of its agents come as a stream of chunks.
    pub stream: Option<bool>,
}

/// Execute a mission. With `stream`, the words of its tasks follow as they come, each chunk with its `task`, until the mission
/// ends or waits for a person; closing the stream does not stop the mission.
#[utoipa::path(post, path = "/missions/{id}/execute", tag = "Missions", params(("id" = String, Path, description = "Its id")), request_body = Option<ExecuteMission>,
    responses(
        (status = 200, description = "The tasks, or their stream", content((ExecutionView = "application/json"), (String = "text/event-stream"))),
        (status = 400, description = "An agent does not exist, or its model cannot be used", body = ErrorBody),
        (status = 404, description = "No such mission", body = ErrorBody),
        (status = 409, description = "It runs already, or is completed", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn execute_mission(
    State(app): State<App>,
    Door(db): Door,
    Path(id): Path<String>,
    presented: Option<Extension<Presented>>,
    MaybeJson(how): MaybeJson<ExecuteMission>,
) -> Result<Response, ApiError> {
    let mission = mission_id(&id)?;
    check_models(&app, &db, mission).await?;
    let follower = follower(&app, &db, how.stream, presented).await?;
    let execution = missions::execute(&db, mission)
        .await
        .map_err(|error| refused(error, &id))?;
    Ok(match follower {
        Some(follower) => follower.stream(execution.place),
        None => Json(ExecutionView::from(execution)).into_response(),
    })
}

/// What will follow the run, placed before the run begins so that it hears all of it.
async fn follower(
    app: &App,
    db: &ProjectDb,
    stream: Option<bool>,
    presented: Option<Extension<Presented>>,
) -> Result<Option<follow_mission::Follower>, ApiError> {
    if stream != Some(true) {
        return Ok(None);
    }
    let presented = presented.map(|Extension(presented)| presented);
    let follower = follow_mission::Follower::new(app, db, presented).await?;
    Ok(Some(follower))
}

pub(super) async fn check_models(
    app: &App,
    db: &ProjectDb,
    id: Id<ids::Mission>,
) -> Result<(), ApiError> {
    let row = db
        .mission(id)
        .await
        .map_err(|error| refused(error.into(), &id.to_string()))?;
    let document = Document::parse(&row.definition).map_err(ApiError::faults)?;
    match app.unusable_model(db, &document).await? {
        Some(sentence) => Err(ApiError::invalid("model", sentence)),
        None => Ok(()),
    }
}

/// How a mission is resumed.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ResumeMission {
    /// Whether its failed tasks are tried again.
    pub retry_failed: Option<bool>,
    /// Whether the words of its agents come as a stream of chunks.
    pub stream: Option<bool>,
}

/// Have a mission go on: past the checkpoints and gates that pause it, or from where it failed.
#[utoipa::path(post, path = "/missions/{id}/resume", tag = "Missions", params(("id" = String, Path, description = "Its id")), request_body = Option<ResumeMission>,
    responses(
        (status = 200, description = "What is before it, or its stream", content((Object = "application/json"), (String = "text/event-stream"))),
        (status = 404, description = "No such mission", body = ErrorBody),
        (status = 409, description = "It is neither under way, paused nor failed", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn resume_mission(
    State(app): State<App>,
    Door(db): Door,
    Path(id): Path<String>,
    presented: Option<Extension<Presented>>,
    MaybeJson(how): MaybeJson<ResumeMission>,
) -> Result<Response, ApiError> {
    let mission = mission_id(&id)?;
    let follower = follower(&app, &db, how.stream, presented).await?;
    let resumed = missions::resume(&db, mission, how.retry_failed == Some(true))
        .await
        .map_err(|error| refused(error, &id))?;
    match follower {
        Some(follower) => {
            let run = db.mission_run(mission, None).await?;
            Ok(follower.stream(run.place))
        }
        None => {
            let told = json!({"retried": resumed.retried, "pending": resumed.pending});
            Ok(Json(told).into_response())
        }
    }
}

/// Call a mission off: what is under way is stopped, its schedule goes.
#[utoipa::path(post, path = "/missions/{id}/abort", tag = "Missions", params(("id" = String, Path, description = "Its id")),
    responses(
        (status = 200, description = "How many tasks were stopped", body = Object),
        (status = 404, description = "No such mission", body = ErrorBody),
        (status = 409, description = "It does not run", body = ErrorBody),
    ))]
pub async fn abort_mission(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let aborted = missions::abort(&db, mission_id(&id)?)
        .await
        .map_err(|error| refused(error, &id))?;
    Ok(Json(json!({"aborted": aborted})))
}

/// List missions that can be resumed: under way or failed, with tasks that are pending or failed.
#[utoipa::path(get, path = "/missions/resumable", tag = "Missions", params(Page),
    responses((status = 200, description = "The missions", body = Vec<MissionView>)))]
pub async fn list_resumable(
    Door(db): Door,
    Query(page): Query<Page>,
) -> Result<Response, ApiError> {
    let size = page.size()?;
    let rows = db.missions(None, true, page.after()?, size).await?;
    Ok(listed(&rows, size, "/v1/missions/resumable"))
}

/// List the checkpoints that missions wait at, the earliest first.
#[utoipa::path(get, path = "/missions/checkpoints", tag = "Missions", params(Page),
    responses((status = 200, description = "The checkpoints", body = Vec<Object>)))]
pub async fn list_checkpoints(
    Door(db): Door,
    Query(page): Query<Page>,
) -> Result<Response, ApiError> {
    list_barriers(
        &db,
        &page,
        BarrierList::Checkpoints,
        "/v1/missions/checkpoints",
    )
    .await
}

/// List the delays that missions wait for, the earliest first.
#[utoipa::path(get, path = "/missions/delays", tag = "Missions", params(Page),
    responses((status = 200, description = "The delays", body = Vec<Object>)))]
pub async fn list_delays(Door(db): Door, Query(page): Query<Page>) -> Result<Response, ApiError> {
    list_barriers(&db, &page, BarrierList::Delays, "/v1/missions/delays").await
}

async fn list_barriers(
    db: &ProjectDb,
    page: &Page,
    list: BarrierList,
    path: &str,
) -> Result<Response, ApiError> {
    let size = page.size()?;
    let rows = db.active_barriers(list, page.after()?, size).await?;
    let views: Vec<Value> = rows.iter().map(reached_view).collect();
    let last = |view: &Value| view["id"].as_str().unwrap_or_default().to_owned();
    Ok(Listed::new(views, size, path, last).into_response())
}

fn reached_view(barrier: &BarrierRow) -> Value {
    let mut view =
        json!({"id": barrier.id, "missionId": barrier.place.mission, "group": barrier.group});
    match barrier.list {
        BarrierList::Delays => {
            view["delayName"] = json!(barrier.name);
            view["delay"] = barrier.document.clone();
            view["startedAt"] = json!(barrier.reached_at.map(timestamp));
            view["expiresAt"] = json!(barrier.expires_at.map(timestamp));
        }
        _ => {
            view["checkpointName"] = json!(barrier.name);
            view["checkpoint"] = barrier.document.clone();
            view["reachedAt"] = json!(barrier.reached_at.map(timestamp));
        }
    }
    view
}

/// Let a mission past a checkpoint that it waits at.
#[utoipa::path(post, path = "/missions/{id}/checkpoints/{name}/resume", tag = "Missions",
    params(("id" = String, Path, description = "The mission's id"), ("name" = String, Path, description = "The checkpoint's name")), request_body = Option<ExecuteMission>,
    responses(
        (status = 200, description = "It goes on, or its stream", content((Object = "application/json"), (String = "text/event-stream"))),
        (status = 404, description = "No such mission, or it does not wait there", body = ErrorBody),
        (status = 409, description = "It was executed again meanwhile", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn resume_checkpoint(
    State(app): State<App>,
    Door(db): Door,
    Path((id, name)): Path<(String, String)>,
    presented: Option<Extension<Presented>>,
    MaybeJson(how): MaybeJson<ExecuteMission>,
) -> Result<Response, ApiError> {
    let mission = mission_id(&id)?;
    let follower = follower(&app, &db, how.stream, presented).await?;
    missions::resume_checkpoint(&db, mission, &name)
        .await
        .map_err(|error| refused(error, &id))?;
    match follower {
        Some(follower) => {
            let run = db.mission_run(mission, None).await?;
            Ok(follower.stream(run.place))
        }
        None => Ok(Json(json!({"resumed": true})).into_response()),
    }
}

/// Which run.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ReportQuery {
    /// Its number, from 1; the newest when absent.
    #[param(minimum = 1)]
    pub run: Option<i32>,
}

/// Read what a run came to.
#[utoipa::path(get, path = "/missions/{id}/report", tag = "Missions", params(("id" = String, Path, description = "The mission's id"), ReportQuery),
    responses(
        (status = 200, description = "The report", body = Object),
        (status = 404, description = "No such mission or run, or the run has not ended", body = ErrorBody),
    ))]
pub async fn read_report(
    Door(db): Door,
    Path(id): Path<String>,
    Query(query): Query<ReportQuery>,
) -> Result<Json<Value>, ApiError> {
    let mission = mission_id(&id)?;
    db.mission(mission)
        .await
        .map_err(|error| refused(error.into(), &id))?;
    let report = match db.mission_run(mission, query.run).await {
        Ok(run) => run.report,
        Err(StoreError::NotFound) => None,
        Err(error) => return Err(error.into()),
    };
    report.map(Json).ok_or_else(|| {
        ApiError::NotFound(
            "There is no report: the mission has no such run, or the run has not ended. The event `mission:completed` tells when it has."
                .to_owned(),
        )
    })
}
