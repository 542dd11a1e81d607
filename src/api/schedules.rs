//! `/v1/schedules` (contract 2.12).

use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Listed, Page, Path, Query, given};
use super::missions::mission_id;
use super::sessions::Deleted;
use crate::event::timestamp;
use crate::ids::{self, Id};
use crate::lifecycle::LifecycleError;
use crate::lifecycle::schedule::{self, NewSchedule, ScheduleChange};
use crate::mission::{CatchUp, Overlap};
use crate::store::{ProjectDb, ScheduleRow, StoreError};

/// How many of a schedule's next times are shown.
const SHOWN: usize = 5;

/// A new schedule; it takes the place of an earlier one of the same mission.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CreateSchedule {
    /// The mission.
    pub mission_id: Option<String>,
    /// Cron of five fields (minute, hour, day, month, weekday; all of them must match), or a date.
    pub expression: Option<String>,
    /// Whether it is due again and again.
    pub recurring: Option<bool>,
    /// Whether it is due at all; yes when absent.
    pub enabled: Option<bool>,
    /// The zone of its clock, by its IANA name; UTC when absent.
    pub timezone: Option<String>,
    /// From when on it is not due any more; then the mission is completed.
    pub end_date: Option<DateTime<Utc>>,
    /// How long a run that it begins may take, in milliseconds; then the mission fails.
    #[schema(minimum = 1)]
    pub deadline_offset_ms: Option<i64>,
    /// What becomes of times that were missed while no process ran: `latest` makes up for them with one run, `skip` does not.
    pub catch_up: Option<CatchUp>,
    /// What becomes of a time that comes while a run is under way: `skip` leaves it out, `queue` has one run follow.
    pub overlap: Option<Overlap>,
}

/// A change to a schedule: what is absent stays, what is null goes.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UpdateSchedule {
    /// Another expression.
    pub expression: Option<String>,
    /// Whether it is due again and again.
    pub recurring: Option<bool>,
    /// Whether it is due at all.
    pub enabled: Option<bool>,
    /// Another zone.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<String>)]
    pub timezone: Option<Option<String>>,
    /// Another end.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<DateTime<Utc>>)]
    pub end_date: Option<Option<DateTime<Utc>>>,
    /// Another limit.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<i64>, minimum = 1)]
    pub deadline_offset_ms: Option<Option<i64>>,
    /// What becomes of times that were missed.
    pub catch_up: Option<CatchUp>,
    /// What becomes of a time that comes while a run is under way.
    pub overlap: Option<Overlap>,
}

/// A schedule.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScheduleView {
    /// `sch_…`.
    #[schema(value_type = String)]
    pub schedule_id: Id<ids::Schedule>,
    /// The mission.
    #[schema(value_type = String)]
    pub mission_id: Id<ids::Mission>,
    /// Cron, or a date.
    pub expression: String,
    /// The zone of its clock.
    pub timezone: String,
    /// Whether it is due again and again.
    pub recurring: bool,
    /// Whether it is due at all.
    pub enabled: bool,
    /// From when on it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_date: Option<String>,
    /// How long a run that it begins may take, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_offset_ms: Option<i64>,
    /// What becomes of times that were missed.
    pub catch_up: CatchUp,
    /// What becomes of a time that comes while a run is under way.
    pub overlap: Overlap,
    /// When it last began a run.
    pub last_run_at: Option<String>,
    /// When it is due.
    pub next_run_at: Option<String>,
    /// When it is due, five times.
    pub next_runs: Vec<String>,
    /// When it was made.
    pub created_at: String,
}

impl From<ScheduleRow> for ScheduleView {
    fn from(row: ScheduleRow) -> Self {
        let next = schedule::upcoming(&row, Utc::now(), SHOWN);
        Self {
            schedule_id: row.id,
            mission_id: row.mission,
            timezone: row.timezone.unwrap_or_else(|| "UTC".to_owned()),
            expression: row.expression,
            recurring: row.recurring,
            enabled: row.enabled,
            end_date: row.end_date.map(timestamp),
            deadline_offset_ms: row.deadline_offset_ms,
            catch_up: row.catch_up,
            overlap: row.overlap,
            last_run_at: row.last_run_at.map(timestamp),
            next_run_at: row.next_run_at.map(timestamp),
            next_runs: next.into_iter().map(timestamp).collect(),
            created_at: timestamp(row.created_at),
        }
    }
}

fn refused(error: LifecycleError, id: &str) -> ApiError {
    match error {
        LifecycleError::Store(StoreError::NotFound) => ApiError::missing("Schedule", id),
        error => super::missions::refused(error, id),
    }
}

fn offset(given: Option<i64>) -> Result<Option<i64>, ApiError> {
    // A hundred years; more is beyond what dates can hold.
    match given {
        Some(offset) if !(1..=3_155_760_000_000).contains(&offset) => Err(ApiError::invalid(
            "deadlineOffsetMs",
            "`deadlineOffsetMs` must be from 1 to 3155760000000 milliseconds.",
        )),
        given => Ok(given),
    }
}

/// The mission of a schedule that is named by its own id or the mission's.
async fn mission_of(db: &ProjectDb, id: &str) -> Result<Id<ids::Mission>, ApiError> {
    let (own, mission) = (id.parse().ok(), id.parse().ok());
    if own.is_none() && mission.is_none() {
        return Err(ApiError::missing("Schedule", id));
    }
    match db.schedule(own, mission).await {
        Ok(row) => Ok(row.mission),
        Err(error) => Err(refused(error.into(), id)),
    }
}

/// List schedules, oldest first, each with when it is due.
#[utoipa::path(get, path = "/schedules", tag = "Schedules", params(Page),
    responses((status = 200, description = "The schedules", body = Vec<ScheduleView>)))]
pub async fn list_schedules(
    Door(db): Door,
    Query(page): Query<Page>,
) -> Result<Listed<ScheduleView>, ApiError> {
    let size = page.size()?;
    let rows = db.schedules(page.after()?, size).await?;
    let views = rows.into_iter().map(ScheduleView::from).collect();
    Ok(Listed::new(
        views,
        size,
        "/v1/schedules",
        |schedule: &ScheduleView| schedule.schedule_id.to_string(),
    ))
}

/// Have a mission begin by itself.
#[utoipa::path(post, path = "/schedules", tag = "Schedules", request_body = CreateSchedule,
    responses(
        (status = 201, description = "The schedule", body = ScheduleView),
        (status = 400, description = "A field is missing or wrong, or the date has passed", body = ErrorBody),
        (status = 404, description = "No such mission", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn create_schedule(
    Door(db): Door,
    Json(new): Json<CreateSchedule>,
) -> Result<(StatusCode, Json<ScheduleView>), ApiError> {
    let required = |param: &str| ApiError::invalid(param, format!("{param}: required"));
    let mission = new.mission_id.ok_or_else(|| required("missionId"))?;
    let id = mission_id(&mission)?;
    let expression = new.expression.ok_or_else(|| required("expression"))?;
    let recurring = new.recurring.ok_or_else(|| {
        ApiError::invalid(
            "recurring",
            "recurring: required, `true` to run again and again, `false` to run once",
        )
    })?;
    let new = NewSchedule {
        expression,
        timezone: new.timezone,
        recurring,
        enabled: new.enabled.unwrap_or(true),
        end_date: new.end_date,
        deadline_offset_ms: offset(new.deadline_offset_ms)?,
        catch_up: new.catch_up.unwrap_or_default(),
        overlap: new.overlap.unwrap_or_default(),
    };
    let schedule = schedule::set(&db, id, new)
        .await
        .map_err(|error| super::missions::refused(error, &mission))?;
    Ok((StatusCode::CREATED, Json(schedule.into())))
}

/// Read a schedule.
#[utoipa::path(get, path = "/schedules/{id}", tag = "Schedules", params(("id" = String, Path, description = "Its id, or the mission's")),
    responses((status = 200, description = "The schedule", body = ScheduleView), (status = 404, description = "No such schedule", body = ErrorBody)))]
pub async fn read_schedule(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<ScheduleView>, ApiError> {
    let mission = mission_of(&db, &id).await?;
    let row = db.schedule(None, Some(mission)).await;
    Ok(Json(
        row.map_err(|error| refused(error.into(), &id))?.into(),
    ))
}

/// Change a schedule.
#[utoipa::path(patch, path = "/schedules/{id}", tag = "Schedules", params(("id" = String, Path, description = "Its id, or the mission's")), request_body = UpdateSchedule,
    responses(
        (status = 200, description = "The schedule", body = ScheduleView),
        (status = 400, description = "A field is wrong, or the date has passed", body = ErrorBody),
        (status = 404, description = "No such schedule", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn update_schedule(
    Door(db): Door,
    Path(id): Path<String>,
    Json(change): Json<UpdateSchedule>,
) -> Result<Json<ScheduleView>, ApiError> {
    let mission = mission_of(&db, &id).await?;
    let change = ScheduleChange {
        expression: change.expression,
        timezone: change.timezone,
        recurring: change.recurring,
        enabled: change.enabled,
        end_date: change.end_date,
        deadline_offset_ms: match change.deadline_offset_ms {
            Some(given) => Some(offset(given)?),
            None => None,
        },
        catch_up: change.catch_up,
        overlap: change.overlap,
    };
    let row = schedule::update(&db, mission, change)
        .await
        .map_err(|error| refused(error, &id))?;
    Ok(Json(row.into()))
}

/// Remove a schedule; its mission is a draft again.
#[utoipa::path(delete, path = "/schedules/{id}", tag = "Schedules", params(("id" = String, Path, description = "Its id, or the mission's")),
    responses((status = 200, description = "It is gone", body = Deleted), (status = 404, description = "No such schedule", body = ErrorBody)))]
pub async fn delete_schedule(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    let mission = mission_of(&db, &id).await?;
    schedule::delete(&db, mission)
        .await
        .map_err(|error| refused(error, &id))?;
    Ok(Json(Deleted { deleted: true }))
}
