//! Runs of missions.
//!
//! A run's row is the lock under which it is decided what becomes of the run: whoever ends a task of it, lifts a barrier
//! or ends the run holds it until the commit. Under it, what is asked of the run's other tasks is true.

use chrono::{DateTime, Utc};
use serde_json::Value;
use uuid::Uuid;

use super::{ProjectDb, ProjectTx, Result, to_micros};
use crate::ids::{self, Id, Schedule};
use crate::task::Place;

/// A run of a mission.
#[derive(Debug, Clone)]
pub struct MissionRunRow {
    /// Which.
    pub place: Place,
    /// The label of its tasks.
    pub group: String,
    /// The schedule that began it.
    pub schedule: Option<Id<Schedule>>,
    /// The least score of all of it.
    pub quality_threshold: f64,
    /// Whether it brought agents along that go when it ends.
    pub volatile_team: bool,
    /// When it must have ended.
    pub deadline: Option<DateTime<Utc>>,
    /// Whether people were warned of that.
    pub sla_warned: bool,
    /// Whether it was paused by hand.
    pub held: bool,
    /// When it began.
    pub started_at: DateTime<Utc>,
    /// When it ended.
    pub ended_at: Option<DateTime<Utc>>,
    /// What it came to.
    pub report: Option<Value>,
}

/// A run to be begun.
#[derive(Debug)]
pub struct NewMissionRun<'a> {
    /// Which.
    pub place: Place,
    /// The label of its tasks.
    pub group: &'a str,
    /// The schedule that begins it.
    pub schedule: Option<Id<Schedule>>,
    /// What its tasks are told.
    pub context: &'a Value,
    /// The least score of all of it.
    pub quality_threshold: f64,
    /// Whether it brings agents along that go when it ends.
    pub volatile_team: bool,
    /// When it must have ended.
    pub deadline: Option<DateTime<Utc>>,
    /// When it begins.
    pub started_at: DateTime<Utc>,
}

/// How many tasks of a run stand where.
#[derive(Debug, Clone)]
pub struct Tally {
    /// A task's status.
    pub status: String,
    /// How many stand there.
    pub count: i64,
}

/// What has to be looked at when a task of a run has ended.
#[derive(Debug, Clone, Copy)]
pub struct Outlook {
    /// Whether barriers may be reached.
    pub barriers: bool,
    /// Whether tasks of the run wait for it.
    pub inside: bool,
    /// Whether tasks outside of the mission wait for it.
    pub outside: bool,
    /// Whether the run has tasks that have not ended.
    pub unfinished: bool,
}

struct StoredRun {
    mission_id: Uuid,
    number: i32,
    group_label: String,
    schedule_id: Option<Uuid>,
    quality_threshold: f64,
    volatile_team: bool,
    deadline: Option<DateTime<Utc>>,
    sla_warned: bool,
    held: bool,
    started_at: DateTime<Utc>,
    ended_at: Option<DateTime<Utc>>,
    report: Option<Value>,
}

impl From<StoredRun> for MissionRunRow {
    fn from(stored: StoredRun) -> Self {
        Self {
            place: Place {
                mission: stored.mission_id.into(),
                run: stored.number,
            },
            group: stored.group_label,
            schedule: stored.schedule_id.map(Id::from),
            quality_threshold: stored.quality_threshold,
            volatile_team: stored.volatile_team,
            deadline: stored.deadline,
            sla_warned: stored.sla_warned,
            held: stored.held,
            started_at: stored.started_at,
            ended_at: stored.ended_at,
            report: stored.report,
        }
    }
}

impl ProjectDb {
    /// A mission's run by its number, or its newest.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn mission_run(
        &self,
        mission: Id<ids::Mission>,
        number: Option<i32>,
    ) -> Result<MissionRunRow> {
        let stored = sqlx::query_as!(
            StoredRun,
            "select mission_id, number, group_label, schedule_id, quality_threshold, volatile_team, deadline, sla_warned,
                held, started_at, ended_at, report
            from mission_runs
            where project_id = $1 and mission_id = $2 and ($3::integer is null or number = $3)
            order by number desc
            limit 1",
            self.project,
            mission.uuid(),
            number
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(stored.into())
    }

    /// How many tasks of a run stand where.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn tally(&self, place: Place) -> Result<Vec<Tally>> {
        Ok(sqlx::query_as!(
            Tally,
            r#"select status, count(*) as "count!" from tasks
            where project_id = $1 and mission_id = $2 and mission_run = $3
            group by status
            order by status"#,
            self.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// What the tasks of a run are told: the mission's name, prompt and data.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn mission_context(&self, place: Place) -> Result<Value> {
        Ok(sqlx::query_scalar!(
            "select context from mission_runs where project_id = $1 and mission_id = $2 and number = $3",
            self.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_one(&self.aside)
        .await?)
    }

    /// Whether nothing of a run can go on before a person has said something: it or some of its tasks wait for one or are paused, and
    /// no other is worked on or due.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn waits_for_people(&self, place: Place) -> Result<bool> {
        Ok(sqlx::query_scalar!(
            r#"select (exists (
                select from tasks
                where project_id = $1 and mission_id = $2 and mission_run = $3
                  and (status = 'awaiting_approval' or (status = 'pending' and held))
            ) or exists (
                select from approvals
                where project_id = $1 and mission_id = $2 and mission_run = $3 and hook = 'mission:complete' and status = 'pending'
            )) and not exists (
                select from barriers where project_id = $1 and mission_id = $2 and run = $3 and kind = 'delay' and state = 'active'
            ) and not exists (
                select from tasks
                where project_id = $1 and mission_id = $2 and mission_run = $3 and status in ('assigned', 'in_progress', 'review')
            ) and not exists (
                select from tasks t
                join jobs j on j.project_id = t.project_id and j.subject = t.id and j.kind in ('task', 'blocked')
                where t.project_id = $1 and t.mission_id = $2 and t.mission_run = $3 and t.status = 'pending'
            ) as "waits!""#,
            self.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_one(&self.pool)
        .await?)
    }
}

impl ProjectTx {
    /// A run as it stands, not held.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn mission_run_as_it_stands(&mut self, place: Place) -> Result<MissionRunRow> {
        let stored = sqlx::query_as!(
            StoredRun,
            "select mission_id, number, group_label, schedule_id, quality_threshold, volatile_team, deadline, sla_warned,
                held, started_at, ended_at, report
            from mission_runs
            where project_id = $1 and mission_id = $2 and number = $3",
            self.db.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(stored.into())
    }

    /// Begins a run, and withdraws the requests for approval that another beginning waited for. They are returned.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn begin_mission_run(
        &mut self,
        new: &NewMissionRun<'_>,
    ) -> Result<Vec<Id<ids::Approval>>> {
        let withdrawn = sqlx::query_scalar!(
            "with begun as (
                insert into mission_runs (project_id, mission_id, number, group_label, schedule_id, context, quality_threshold,
                    volatile_team, deadline, started_at)
                values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
            ), withdrawn as (
                update approvals
                set status = 'rejected', resolved_at = clock_timestamp(), resolved_by = 'engine', note = 'A run has begun without it.'
                where project_id = $1 and mission_id = $2 and mission_run is null and status = 'pending'
                returning id
            ), called_off as (
                delete from jobs using withdrawn
                where jobs.project_id = $1 and jobs.kind = 'approval' and jobs.subject = withdrawn.id
            )
            select id from withdrawn",
            self.db.project,
            new.place.mission.uuid(),
            new.place.run,
            new.group,
            new.schedule.map(Id::uuid),
            new.context,
            new.quality_threshold,
            new.volatile_team,
            new.deadline,
            to_micros(new.started_at)
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(withdrawn.into_iter().map(Id::from).collect())
    }

    /// A run, held until the commit: what becomes of it is decided under this lock.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn lock_mission_run(&mut self, place: Place) -> Result<MissionRunRow> {
        let stored = sqlx::query_as!(
            StoredRun,
            "select mission_id, number, group_label, schedule_id, quality_threshold, volatile_team, deadline, sla_warned,
                held, started_at, ended_at, report
            from mission_runs
            where project_id = $1 and mission_id = $2 and number = $3
            for no key update",
            self.db.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(stored.into())
    }

    /// What the tasks of a run are told of its mission: see [`ProjectDb::mission_context`].
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn mission_context(&mut self, place: Place) -> Result<Value> {
        Ok(sqlx::query_scalar!(
            "select context from mission_runs where project_id = $1 and mission_id = $2 and number = $3",
            self.db.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_one(self.open().await?)
        .await?)
    }

    /// Stores a run's marks: warned, held, ended, with its report.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn save_mission_run(
        &mut self,
        run: &MissionRunRow,
        passed: Option<bool>,
    ) -> Result<()> {
        sqlx::query!(
            "update mission_runs set sla_warned = $4, held = $5, ended_at = $6, passed = $7, report = $8, deadline = $9
            where project_id = $1 and mission_id = $2 and number = $3",
            self.db.project,
            run.place.mission.uuid(),
            run.place.run,
            run.sla_warned,
            run.held,
            run.ended_at.map(to_micros),
            passed,
            run.report,
            run.deadline
        )
        .execute(self.open().await?)
        .await?;
        Ok(())
    }

    /// What has to be looked at now that a task of a run has ended. The run must be held. Tasks begin in the order of their ids, so
    /// an unfinished one is looked for among the later ones first.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn outlook(&mut self, place: Place, ended: Id<ids::Task>) -> Result<Outlook> {
        Ok(sqlx::query_as!(
            Outlook,
            r#"select
                exists (select from barriers where project_id = $1 and mission_id = $2 and run = $3 and state in ('waiting', 'failed')) as "barriers!",
                exists (
                    select from dependencies d
                    join tasks t on t.project_id = d.project_id and t.id = d.task_id
                    where d.project_id = $1 and d.needs_id = $4 and t.mission_id is not null
                ) as "inside!",
                exists (
                    select from dependencies d
                    join tasks t on t.project_id = d.project_id and t.id = d.task_id
                    where d.project_id = $1 and d.needs_id = $4 and t.mission_id is null
                ) as "outside!",
                exists (
                    select from tasks
                    where project_id = $1 and mission_id = $2 and mission_run = $3 and status not in ('done', 'failed') and id > $4
                ) or exists (
                    select from tasks
                    where project_id = $1 and mission_id = $2 and mission_run = $3 and status not in ('done', 'failed')
                ) as "unfinished!""#,
            self.db.project,
            place.mission.uuid(),
            place.run,
            ended.uuid()
        )
        .fetch_one(self.open().await?)
        .await?)
    }
}
