//! Schedules: when missions begin by themselves.

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use sqlx::types::Json;
use uuid::Uuid;

use super::{Job, ProjectDb, ProjectTx, Result, to_micros};
use crate::ids::{Id, Mission, Schedule};
use crate::mission::{CatchUp, Overlap};

/// A mission's schedule.
#[derive(Debug, Clone)]
pub struct ScheduleRow {
    /// Its id.
    pub id: Id<Schedule>,
    /// The mission.
    pub mission: Id<Mission>,
    /// Cron or a date, as it was given.
    pub expression: String,
    /// The zone of its clock; UTC when absent.
    pub timezone: Option<String>,
    /// Whether it is due again and again.
    pub recurring: bool,
    /// Whether it is due at all.
    pub enabled: bool,
    /// From when on it is not.
    pub end_date: Option<DateTime<Utc>>,
    /// How long a run that it begins may take, in milliseconds.
    pub deadline_offset_ms: Option<i64>,
    /// What becomes of missed occurrences.
    pub catch_up: CatchUp,
    /// What becomes of occurrences while a run is under way.
    pub overlap: Overlap,
    /// Whether an occurrence waits for the run under way to end.
    pub queued: bool,
    /// When it last began a run.
    pub last_run_at: Option<DateTime<Utc>>,
    /// When it is due.
    pub next_run_at: Option<DateTime<Utc>>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

struct Stored {
    id: Uuid,
    mission_id: Uuid,
    expression: String,
    timezone: Option<String>,
    recurring: bool,
    enabled: bool,
    end_date: Option<DateTime<Utc>>,
    deadline_offset_ms: Option<i64>,
    catch_up: String,
    overlap: String,
    queued: bool,
    last_run_at: Option<DateTime<Utc>>,
    next_run_at: Option<DateTime<Utc>>,
    created_at: DateTime<Utc>,
}

impl From<Stored> for ScheduleRow {
    fn from(stored: Stored) -> Self {
        Self {
            id: stored.id.into(),
            mission: stored.mission_id.into(),
            expression: stored.expression,
            timezone: stored.timezone,
            recurring: stored.recurring,
            enabled: stored.enabled,
            end_date: stored.end_date,
            deadline_offset_ms: stored.deadline_offset_ms,
            catch_up: if stored.catch_up == "skip" {
                CatchUp::Skip
            } else {
                CatchUp::Latest
            },
            overlap: if stored.overlap == "queue" {
                Overlap::Queue
            } else {
                Overlap::Skip
            },
            queued: stored.queued,
            last_run_at: stored.last_run_at,
            next_run_at: stored.next_run_at,
            created_at: stored.created_at,
        }
    }
}

fn catch_up_word(catch_up: CatchUp) -> &'static str {
    match catch_up {
        CatchUp::Latest => "latest",
        CatchUp::Skip => "skip",
    }
}

fn overlap_word(overlap: Overlap) -> &'static str {
    match overlap {
        Overlap::Skip => "skip",
        Overlap::Queue => "queue",
    }
}

impl ProjectDb {
    /// Schedules after `after`, oldest first, at most `limit`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn schedules(
        &self,
        after: Option<Id<Schedule>>,
        limit: i64,
    ) -> Result<Vec<ScheduleRow>> {
        let stored = sqlx::query_as!(
            Stored,
            "select id, mission_id, expression, timezone, recurring, enabled, end_date, deadline_offset_ms, catch_up, overlap,
                queued, last_run_at, next_run_at, created_at
            from schedules
            where project_id = $1 and ($2::uuid is null or id > $2)
            order by id
            limit $3",
            self.project,
            after.map(Id::uuid),
            limit
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(stored.into_iter().map(ScheduleRow::from).collect())
    }

    /// A schedule's mission, with its definition.
    ///
    /// # Errors
    /// [`super::StoreError::NotFound`].
    pub async fn scheduled_mission(
        &self,
        id: Id<Schedule>,
    ) -> Result<(Id<Mission>, Map<String, Value>)> {
        let row = sqlx::query!(
            r#"select m.id, m.document as "definition: Json<Map<String, Value>>"
            from schedules s join missions m on m.project_id = s.project_id and m.id = s.mission_id
            where s.project_id = $1 and s.id = $2"#,
            self.project,
            id.uuid()
        )
        .fetch_one(&self.pool)
        .await?;
        Ok((row.id.into(), row.definition.0))
    }

    /// A schedule by its own id or its mission's.
    ///
    /// # Errors
    /// [`super::StoreError::NotFound`].
    pub async fn schedule(
        &self,
        id: Option<Id<Schedule>>,
        mission: Option<Id<Mission>>,
    ) -> Result<ScheduleRow> {
        // Not `id = … or mission_id = …`: for that Postgres reads all schedules of the project.
        let stored = sqlx::query_as!(
            Stored,
            "select id, mission_id, expression, timezone, recurring, enabled, end_date, deadline_offset_ms, catch_up, overlap,
                queued, last_run_at, next_run_at, created_at
            from schedules
            where project_id = $1
              and mission_id = coalesce($3, (select mission_id from schedules where project_id = $1 and id = $2))",
            self.project,
            id.map(Id::uuid),
            mission.map(Id::uuid)
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(stored.into())
    }
}

impl ProjectTx {
    /// A mission's schedule, held until the commit; the mission must be held before.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn schedule_of(&mut self, mission: Id<Mission>) -> Result<Option<ScheduleRow>> {
        let stored = sqlx::query_as!(
            Stored,
            "select id, mission_id, expression, timezone, recurring, enabled, end_date, deadline_offset_ms, catch_up, overlap,
                queued, last_run_at, next_run_at, created_at
            from schedules
            where project_id = $1 and mission_id = $2
            for no key update",
            self.db.project,
            mission.uuid()
        )
        .fetch_optional(self.open().await?)
        .await?;
        Ok(stored.map(ScheduleRow::from))
    }

    /// Stores a schedule, new or changed.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn save_schedule(&mut self, schedule: &mut ScheduleRow) -> Result<()> {
        schedule.created_at = to_micros(schedule.created_at);
        schedule.end_date = schedule.end_date.map(to_micros);
        schedule.last_run_at = schedule.last_run_at.map(to_micros);
        sqlx::query!(
            "insert into schedules (project_id, id, mission_id, expression, timezone, recurring, enabled, end_date, deadline_offset_ms,
                catch_up, overlap, queued, last_run_at, next_run_at, created_at, updated_at)
            values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, clock_timestamp())
            on conflict (project_id, id) do update
            set expression = excluded.expression, timezone = excluded.timezone, recurring = excluded.recurring,
                enabled = excluded.enabled, end_date = excluded.end_date, deadline_offset_ms = excluded.deadline_offset_ms,
                catch_up = excluded.catch_up, overlap = excluded.overlap, queued = excluded.queued,
                last_run_at = excluded.last_run_at, next_run_at = excluded.next_run_at, updated_at = excluded.updated_at",
            self.db.project,
            schedule.id.uuid(),
            schedule.mission.uuid(),
            schedule.expression,
            schedule.timezone,
            schedule.recurring,
            schedule.enabled,
            schedule.end_date,
            schedule.deadline_offset_ms,
            catch_up_word(schedule.catch_up),
            overlap_word(schedule.overlap),
            schedule.queued,
            schedule.last_run_at,
            schedule.next_run_at,
            schedule.created_at
        )
        .execute(self.open().await?)
        .await?;
        Ok(())
    }

    /// Removes a mission's schedule with what is owed for it; whether there was one.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn delete_schedule_of(&mut self, mission: Id<Mission>) -> Result<bool> {
        let deleted = sqlx::query_scalar!(
            "delete from schedules where project_id = $1 and mission_id = $2 returning id",
            self.db.project,
            mission.uuid()
        )
        .fetch_optional(self.open().await?)
        .await?;
        if let Some(id) = deleted {
            self.call_off(Job::Schedule(id.into())).await?;
        }
        Ok(deleted.is_some())
    }
}
