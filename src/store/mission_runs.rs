//! Runs of missions, and the tasks of a run.
//!
//! A run's row is the lock under which it is decided what becomes of the run: whoever ends a task of it, lifts a barrier
//! or ends the run holds it until the commit. Under it, what is asked of the run's other tasks is true.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::types::Json;
use uuid::Uuid;

use super::tasks::Stored as StoredTask;
use super::{ProjectDb, ProjectTx, Result, to_micros};
use crate::ids::{self, Id, Schedule};
use crate::task::{Document as TaskDocument, Place, Task};

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

/// A task of a run, as others of the run are told of it.
#[derive(Debug, Clone)]
pub struct Sibling {
    /// Its title.
    pub title: String,
    /// Where it stands.
    pub status: String,
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

/// Where a job of a mission's task waits while the mission is paused.
pub(super) fn parking(mission: Id<ids::Mission>) -> String {
    // No agent's name has a colon.
    format!("mission:{}", mission.uuid().simple())
}

impl ProjectDb {
    /// The same as [`ProjectTx::unpark_mission`] for those jobs that someone else had hold of, and may have left as they were. After the
    /// commit and one by one, so that nobody waits for us whom we wait for.
    pub(super) async fn unpark_rest(&self, mission: Id<ids::Mission>) -> Result<()> {
        let parked = sqlx::query!(
            "select kind, subject from jobs where project_id = $1 and parked_on = $2 order by kind, subject limit 1000",
            self.project,
            parking(mission)
        )
        .fetch_all(&self.pool)
        .await?;
        for job in parked {
            sqlx::query!(
                "update jobs set ready = true, due_at = clock_timestamp(), parked_on = null
                where project_id = $1 and kind = $2 and subject = $3 and parked_on = $4
                  and not exists (select from missions where project_id = $1 and id = $5 and status = 'paused')",
                self.project,
                job.kind,
                job.subject,
                parking(mission),
                mission.uuid()
            )
            .execute(&self.pool)
            .await?;
        }
        self.bell.ring(super::Topic::Jobs(self.world));
        Ok(())
    }

    /// The tasks of a run that agents are at.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn active_tasks_of_run(&self, place: Place) -> Result<Vec<Task>> {
        let stored = sqlx::query_as!(
            StoredTask,
            r#"select id, title, assign_to, status, held, group_label, run_id, mission_id, mission_run, document as "document: Json<TaskDocument>", created_at, updated_at
            from tasks
            where project_id = $1 and mission_id = $2 and mission_run = $3 and status in ('assigned', 'in_progress', 'review')
            order by id"#,
            self.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(stored.into_iter().map(StoredTask::into_task).collect())
    }

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

    /// The tasks of a run in their order, at most `limit`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn siblings(&self, place: Place, limit: i64) -> Result<Vec<Sibling>> {
        // A run that is asked for as a range can only be ordered by its own index; of a project that it knows little of, Postgres
        // would rather walk all tasks.
        Ok(sqlx::query_as!(
            Sibling,
            "select title, status from tasks
            where project_id = $1 and mission_id = $2 and mission_run between $3 and $3
            order by mission_run, id
            limit $4",
            self.project,
            place.mission.uuid(),
            place.run,
            limit
        )
        .fetch_all(&self.pool)
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

    /// How many tasks of a run are pending.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn pending_tasks(&mut self, place: Place) -> Result<usize> {
        let pending = sqlx::query_scalar!(
            r#"select count(*) as "count!" from tasks
            where project_id = $1 and mission_id = $2 and mission_run = $3 and status = 'pending'"#,
            self.db.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(usize::try_from(pending).unwrap_or_default())
    }

    /// Owes a verdict on the tasks outside of missions that wait for one of these, which have failed.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn judge_dependents_outside(&mut self, failed: &[Id<ids::Task>]) -> Result<()> {
        let failed: Vec<Uuid> = failed.iter().map(|id| id.uuid()).collect();
        let waiting = self.hold_dependents(&failed, true).await?;
        self.judge_blocked(waiting).await
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

    /// Stores the tasks of a new run, what each needs, and owes the ones in `ready`.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn create_tasks_of_run(
        &mut self,
        tasks: &mut [Task],
        needs: &[(Id<ids::Task>, Id<ids::Task>)],
        ready: &[Id<ids::Task>],
    ) -> Result<()> {
        for task in &mut *tasks {
            task.created_at = to_micros(task.created_at);
            task.updated_at = task.created_at;
            self.events.append(&mut task.take_events());
        }
        let column = |of: fn(&Task) -> String| -> Vec<String> { tasks.iter().map(of).collect() };
        let ids: Vec<Uuid> = tasks.iter().map(|task| task.id.uuid()).collect();
        let missions: Vec<Option<Uuid>> = tasks
            .iter()
            .map(|task| task.mission.map(|place| place.mission.uuid()))
            .collect();
        let runs: Vec<Option<i32>> = tasks
            .iter()
            .map(|task| task.mission.map(|place| place.run))
            .collect();
        let groups: Vec<Option<String>> = tasks.iter().map(|task| task.group.clone()).collect();
        let documents: Vec<Json<&TaskDocument>> =
            tasks.iter().map(|task| Json(&task.document)).collect();
        let at: Vec<DateTime<Utc>> = tasks.iter().map(|task| task.created_at).collect();
        let ready: BTreeSet<Id<ids::Task>> = ready.iter().copied().collect();
        let (owed, priorities): (Vec<Uuid>, Vec<f64>) = tasks
            .iter()
            .filter(|task| ready.contains(&task.id))
            .map(|task| (task.id.uuid(), task.document.priority))
            .unzip();
        sqlx::query!(
            "with made as (
                insert into tasks (project_id, id, title, assign_to, status, group_label, mission_id, mission_run, document, created_at, updated_at)
                select $1, t.id, t.title, t.assign_to, t.status, t.group_label, t.mission_id, t.mission_run, t.document, t.at, t.at
                from unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::uuid[], $8::integer[], $9::jsonb[], $10::timestamptz[])
                    as t (id, title, assign_to, status, group_label, mission_id, mission_run, document, at)
            )
            insert into jobs (project_id, kind, subject, priority, ready, due_at, lease)
            select $1, 'task', owed.id, owed.priority, true, clock_timestamp(), nextval('leases')
            from unnest($11::uuid[], $12::double precision[]) as owed (id, priority)",
            self.db.project,
            &ids,
            &column(|task| task.title.clone()),
            &column(|task| task.assign_to.clone()),
            &column(|task| task.status().as_str().to_owned()),
            &groups as _,
            &missions as _,
            &runs as _,
            &documents as _,
            &at,
            &owed,
            &priorities
        )
        .execute(self.open().await?)
        .await?;
        let (dependents, needed): (Vec<Uuid>, Vec<Uuid>) = needs
            .iter()
            .map(|(task, need)| (task.uuid(), need.uuid()))
            .unzip();
        if !dependents.is_empty() {
            sqlx::query!(
            "insert into dependencies (project_id, task_id, needs_id)
            select $1, d.task_id, d.needs_id from unnest($2::uuid[], $3::uuid[]) as d (task_id, needs_id)",
            self.db.project,
            &dependents,
            &needed
        )
        .execute(self.open().await?)
        .await?;
        }
        self.rings_jobs |= !owed.is_empty();
        Ok(())
    }

    /// Owes those of a run's tasks that can begin or can never begin now that one has ended or a barrier has passed: the tasks
    /// that need `ended`, or those in `freed`. The run must be held.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn wake_tasks_of_run(
        &mut self,
        place: Place,
        ended: Option<Id<ids::Task>>,
        freed: &[Uuid],
    ) -> Result<()> {
        let owed = sqlx::query!(
            "with named as (
                select task_id as id from dependencies where project_id = $1 and needs_id = $4
                union
                select unnest($5::uuid[])
            ), waiting as (
                select t.id, (t.document ->> 'priority')::double precision as priority, t.held,
                    exists (
                        select from dependencies d
                        left join tasks n on n.project_id = d.project_id and n.id = d.needs_id
                        where d.project_id = $1 and d.task_id = t.id and coalesce(n.status, 'failed') = 'failed'
                    ) as hopeless,
                    exists (
                        select from dependencies d
                        join tasks n on n.project_id = d.project_id and n.id = d.needs_id
                        where d.project_id = $1 and d.task_id = t.id and n.status not in ('done', 'failed')
                    ) as waits
                from named
                cross join lateral (
                    select id, mission_id, mission_run, status, held, document from tasks
                    where project_id = $1 and id = named.id limit 1
                ) t
                where t.mission_id = $2 and t.mission_run = $3 and t.status = 'pending'
                  and not exists (select from barrier_holds h where h.project_id = $1 and h.task_id = t.id)
            )
            insert into jobs (project_id, kind, subject, priority, ready, due_at, lease)
            select $1, case when hopeless then 'blocked' else 'task' end, id, priority, true, clock_timestamp(), nextval('leases')
            from waiting
            where hopeless or not (waits or held)
            order by id
            on conflict do nothing",
            self.db.project,
            place.mission.uuid(),
            place.run,
            ended.map(Id::uuid),
            freed
        )
        .execute(self.open().await?)
        .await?;
        self.rings_jobs |= owed.rows_affected() > 0;
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

    /// Whether a run has tasks that have not ended. The run must be held.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn has_unfinished(&mut self, place: Place) -> Result<bool> {
        Ok(sqlx::query_scalar!(
            r#"select exists (
                select from tasks
                where project_id = $1 and mission_id = $2 and mission_run = $3 and status not in ('done', 'failed')
            ) as "exists!""#,
            self.db.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_one(self.open().await?)
        .await?)
    }

    /// How many tasks of a run have not ended. The run must be held.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn count_unfinished(&mut self, place: Place) -> Result<usize> {
        let count = sqlx::query_scalar!(
            r#"select count(*) as "count!" from tasks
            where project_id = $1 and mission_id = $2 and mission_run = $3 and status not in ('done', 'failed')"#,
            self.db.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(usize::try_from(count).unwrap_or_default())
    }

    /// All tasks of a run, in their order.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn tasks_of_run(&mut self, place: Place) -> Result<Vec<Task>> {
        // A definition has a bounded number of tasks. For the range see `siblings`.
        let stored = sqlx::query_as!(
            StoredTask,
            r#"select id, title, assign_to, status, held, group_label, run_id, mission_id, mission_run, document as "document: Json<TaskDocument>", created_at, updated_at
            from tasks
            where project_id = $1 and mission_id = $2 and mission_run between $3 and $3
            order by mission_run, id"#,
            self.db.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(stored.into_iter().map(StoredTask::into_task).collect())
    }

    /// Those tasks of a run that have not ended, or those that failed; in the order of their ids, held until the commit.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn lock_tasks_of_run(&mut self, place: Place, failed: bool) -> Result<Vec<Task>> {
        let stored = sqlx::query_as!(
            StoredTask,
            r#"select id, title, assign_to, status, held, group_label, run_id, mission_id, mission_run, document as "document: Json<TaskDocument>", created_at, updated_at
            from tasks
            where project_id = $1 and mission_id = $2 and mission_run = $3
              and ((status = 'failed') = $4) and status <> 'done'
            order by id
            for no key update"#,
            self.db.project,
            place.mission.uuid(),
            place.run,
            failed
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(stored.into_iter().map(StoredTask::into_task).collect())
    }

    /// Stores tasks that were ended together, calls off what is owed for them, ends their runs and stops those under way. Their
    /// requests for approval are withdrawn before.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn save_ended_tasks(&mut self, tasks: &mut [Task]) -> Result<()> {
        // Later than before, whatever the clock says: it tells versions apart.
        let last = tasks.iter().map(|task| task.updated_at).max();
        let next = last.map(|at| at + chrono::TimeDelta::microseconds(1));
        let at = next.map_or_else(Utc::now, |next| to_micros(Utc::now()).max(next));
        for task in &mut *tasks {
            task.updated_at = at;
        }
        let ids: Vec<Uuid> = tasks.iter().map(|task| task.id.uuid()).collect();
        let statuses: Vec<String> = tasks
            .iter()
            .map(|task| task.status().as_str().to_owned())
            .collect();
        let documents: Vec<Json<&TaskDocument>> =
            tasks.iter().map(|task| Json(&task.document)).collect();
        sqlx::query!(
            "update tasks set status = t.status, document = t.document, held = false, updated_at = $5
            from unnest($2::uuid[], $3::text[], $4::jsonb[]) as t (id, status, document)
            where tasks.project_id = $1 and tasks.id = t.id",
            self.db.project,
            &ids,
            &statuses,
            &documents as _,
            at
        )
        .execute(self.open().await?)
        .await?;
        sqlx::query!(
            "with stopped as (
                update runs set status = 'interrupted', ended_at = clock_timestamp()
                where project_id = $1 and task_id = any($2) and status = 'running'
            )
            delete from jobs where project_id = $1 and subject = any($2)",
            self.db.project,
            &ids
        )
        .execute(self.open().await?)
        .await?;
        for task in tasks {
            self.events.append(&mut task.take_events());
        }
        self.stops.extend(ids);
        Ok(())
    }

    /// Everything of a mission that waits for the end of a pause looks again.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn unpark_mission(&mut self, mission: Id<ids::Mission>) -> Result<()> {
        let parked = parking(mission);
        self.unpark(&parked, i64::MAX).await?;
        let left = sqlx::query_scalar!(
            r#"select exists (select from jobs where project_id = $1 and parked_on = $2) as "left!""#,
            self.db.project,
            parked
        )
        .fetch_one(self.open().await?)
        .await?;
        if left {
            self.left_parked.push(mission);
        }
        Ok(())
    }

    /// Lays a job aside until its mission's pause ends.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`].
    pub async fn park_for_mission(
        &mut self,
        lease: &super::Lease,
        mission: Id<ids::Mission>,
    ) -> Result<()> {
        self.park(lease, &parking(mission)).await
    }
}
