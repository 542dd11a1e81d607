//! Barriers: what stands between the tasks of a mission's run.

use chrono::{DateTime, Utc};
use serde_json::Value;
use uuid::Uuid;

use super::{ProjectDb, ProjectTx, Result, to_micros};
use crate::ids::{self, Id};
use crate::mission::{Barrier, BarrierList};
use crate::task::{Document as TaskDocument, Place, Task};

/// How a barrier stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarrierState {
    /// What it follows has not ended.
    Waiting,
    /// A checkpoint that waits for people, a delay that has begun.
    Active,
    /// A gate that is closed.
    Failed,
    /// It holds nothing back any more.
    Passed,
}

impl BarrierState {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Active => "active",
            Self::Failed => "failed",
            Self::Passed => "passed",
        }
    }

    fn of(word: &str) -> Self {
        match word {
            "waiting" => Self::Waiting,
            "active" => Self::Active,
            "failed" => Self::Failed,
            _ => Self::Passed,
        }
    }
}

/// A barrier of a run.
#[derive(Debug, Clone)]
pub struct BarrierRow {
    /// Its id.
    pub id: Id<ids::Barrier>,
    /// The run.
    pub place: Place,
    /// The group of the run.
    pub group: String,
    /// What kind it is.
    pub list: BarrierList,
    /// Its name.
    pub name: String,
    /// How it stands.
    pub state: BarrierState,
    /// Its definition, as [`Barrier::view`] has it.
    pub document: Value,
    /// Why a gate is closed.
    pub reason: Option<String>,
    /// When it was reached.
    pub reached_at: Option<DateTime<Utc>>,
    /// When a delay is over.
    pub expires_at: Option<DateTime<Utc>>,
}

impl BarrierRow {
    /// Whether it pauses its mission: a checkpoint that waits for people, or a gate that is closed.
    pub fn pauses(&self) -> bool {
        match self.state {
            BarrierState::Failed => true,
            BarrierState::Active => self.list == BarrierList::Checkpoints,
            BarrierState::Waiting | BarrierState::Passed => false,
        }
    }
}

struct Stored {
    id: Uuid,
    mission_id: Uuid,
    run: i32,
    group_label: String,
    kind: String,
    name: String,
    state: String,
    document: Value,
    reason: Option<String>,
    reached_at: Option<DateTime<Utc>>,
    expires_at: Option<DateTime<Utc>>,
}

impl From<Stored> for BarrierRow {
    fn from(stored: Stored) -> Self {
        let list = BarrierList::ALL
            .into_iter()
            .find(|list| list.as_str() == stored.kind);
        Self {
            id: stored.id.into(),
            place: Place {
                mission: stored.mission_id.into(),
                run: stored.run,
            },
            group: stored.group_label,
            // The column's check admits these words only.
            list: list.unwrap_or(BarrierList::Checkpoints),
            name: stored.name,
            state: BarrierState::of(&stored.state),
            document: stored.document,
            reason: stored.reason,
            reached_at: stored.reached_at,
            expires_at: stored.expires_at,
        }
    }
}

/// A barrier of a new run, and the tasks that it has to do with.
#[derive(Debug)]
pub struct NewBarrier<'a> {
    /// Its definition.
    pub barrier: &'a Barrier,
    /// The tasks that it follows.
    pub follows: Vec<Id<ids::Task>>,
    /// The tasks that it holds back.
    pub holds: Vec<Id<ids::Task>>,
}

impl ProjectDb {
    /// The barriers of a run that have been reached and hold something back, by name.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn reached_barriers(&self, place: Place) -> Result<Vec<BarrierRow>> {
        let stored = sqlx::query_as!(
            Stored,
            "select b.id, b.mission_id, b.run, r.group_label, b.kind, b.name, b.state, b.document, b.reason, b.reached_at, b.expires_at
            from barriers b
            join mission_runs r on r.project_id = b.project_id and r.mission_id = b.mission_id and r.number = b.run
            where b.project_id = $1 and b.mission_id = $2 and b.run = $3 and b.state in ('active', 'failed')
            order by b.kind, b.name
            limit 1000",
            self.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(stored.into_iter().map(BarrierRow::from).collect())
    }

    /// The project's barriers of a kind that are active, the earliest first, at most `limit` after `after`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn active_barriers(
        &self,
        list: BarrierList,
        after: Option<Id<ids::Barrier>>,
        limit: i64,
    ) -> Result<Vec<BarrierRow>> {
        let stored = sqlx::query_as!(
            Stored,
            "select b.id, b.mission_id, b.run, r.group_label, b.kind, b.name, b.state, b.document, b.reason, b.reached_at, b.expires_at
            from barriers b
            join mission_runs r on r.project_id = b.project_id and r.mission_id = b.mission_id and r.number = b.run
            where b.project_id = $1 and b.kind = $2 and b.state = 'active' and r.ended_at is null and ($3::uuid is null or b.id > $3)
            order by b.id
            limit $4",
            self.project,
            list.as_str(),
            after.map(Id::uuid),
            limit
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(stored.into_iter().map(BarrierRow::from).collect())
    }
}

impl ProjectTx {
    /// Stores the barriers of a new run.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn create_barriers(&mut self, place: Place, new: &[NewBarrier<'_>]) -> Result<()> {
        for barrier in new {
            let id = Id::<ids::Barrier>::new();
            let ids = |tasks: &[Id<ids::Task>]| -> Vec<Uuid> {
                tasks.iter().map(|task| task.uuid()).collect()
            };
            sqlx::query!(
                "insert into barriers (project_id, id, mission_id, run, kind, name, state, document)
                values ($1, $2, $3, $4, $5, $6, 'waiting', $7)",
                self.db.project,
                id.uuid(),
                place.mission.uuid(),
                place.run,
                barrier.barrier.list().as_str(),
                barrier.barrier.name,
                barrier.barrier.view()
            )
            .execute(self.open().await?)
            .await?;
            sqlx::query!(
                "with followed as (
                    insert into barrier_follows (project_id, barrier_id, task_id) select $1, $2, unnest($3::uuid[])
                )
                insert into barrier_holds (project_id, barrier_id, task_id) select $1, $2, unnest($4::uuid[])",
                self.db.project,
                id.uuid(),
                &ids(&barrier.follows),
                &ids(&barrier.holds)
            )
            .execute(self.open().await?)
            .await?;
        }
        Ok(())
    }

    /// The barriers that are reached: all that they follow has ended, and, but for delays, some task that they hold back waits for
    /// nothing else. Of those that concern the task that has `moved`, that is, ended or was taken up again; without one, of all.
    /// Closed gates are among them. The run must be held.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn barriers_reached(
        &mut self,
        place: Place,
        moved: Option<Id<ids::Task>>,
    ) -> Result<Vec<BarrierRow>> {
        let stored = sqlx::query_as!(
            Stored,
            "select b.id, b.mission_id, b.run, r.group_label, b.kind, b.name, b.state, b.document, b.reason, b.reached_at, b.expires_at
            from barriers b
            join mission_runs r on r.project_id = b.project_id and r.mission_id = b.mission_id and r.number = b.run
            where b.project_id = $1 and b.mission_id = $2 and b.run = $3 and b.state in ('waiting', 'failed')
              and (
                $4::uuid is null
                or exists (select from barrier_follows f where f.project_id = $1 and f.task_id = $4 and f.barrier_id = b.id)
                or exists (select from barrier_holds h where h.project_id = $1 and h.task_id = $4 and h.barrier_id = b.id)
                or exists (
                    select from dependencies d
                    join barrier_holds h on h.project_id = d.project_id and h.task_id = d.task_id
                    where d.project_id = $1 and d.needs_id = $4 and h.barrier_id = b.id
                )
              )
              and not exists (
                select from barrier_follows f
                join tasks t on t.project_id = f.project_id and t.id = f.task_id
                where f.project_id = $1 and f.barrier_id = b.id and t.status not in ('done', 'failed')
              )
              and (
                b.kind = 'delay'
                or exists (
                    select from barrier_holds h
                    join tasks waiting on waiting.project_id = h.project_id and waiting.id = h.task_id
                    where h.project_id = $1 and h.barrier_id = b.id and waiting.status not in ('done', 'failed') and not exists (
                        select from dependencies d
                        join tasks t on t.project_id = d.project_id and t.id = d.needs_id
                        where d.project_id = $1 and d.task_id = h.task_id and t.status not in ('done', 'failed')
                    )
                )
              )
            order by b.id",
            self.db.project,
            place.mission.uuid(),
            place.run,
            moved.map(Id::uuid)
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(stored.into_iter().map(BarrierRow::from).collect())
    }

    /// A barrier by its id.
    ///
    /// # Errors
    /// [`super::StoreError::NotFound`].
    pub async fn barrier(&mut self, id: Id<ids::Barrier>) -> Result<BarrierRow> {
        let stored = sqlx::query_as!(
            Stored,
            "select b.id, b.mission_id, b.run, r.group_label, b.kind, b.name, b.state, b.document, b.reason, b.reached_at, b.expires_at
            from barriers b
            join mission_runs r on r.project_id = b.project_id and r.mission_id = b.mission_id and r.number = b.run
            where b.project_id = $1 and b.id = $2",
            self.db.project,
            id.uuid()
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(stored.into())
    }

    /// The barriers of a run that have been reached and hold something back, in their order. The run must be held.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn reached_barriers(&mut self, place: Place) -> Result<Vec<BarrierRow>> {
        let stored = sqlx::query_as!(
            Stored,
            "select b.id, b.mission_id, b.run, r.group_label, b.kind, b.name, b.state, b.document, b.reason, b.reached_at, b.expires_at
            from barriers b
            join mission_runs r on r.project_id = b.project_id and r.mission_id = b.mission_id and r.number = b.run
            where b.project_id = $1 and b.mission_id = $2 and b.run = $3 and b.state in ('active', 'failed')
            order by b.id",
            self.db.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(stored.into_iter().map(BarrierRow::from).collect())
    }

    /// Closed gates that follow a task: it has been taken up again, so they wait for it. Says which.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn reopen_gates(
        &mut self,
        place: Place,
        task: Id<ids::Task>,
    ) -> Result<Vec<Id<ids::Barrier>>> {
        let reopened = sqlx::query_scalar!(
            "update barriers set state = 'waiting', reason = null
            from barrier_follows f
            where barriers.project_id = $1 and barriers.mission_id = $2 and barriers.run = $3 and barriers.state = 'failed'
              and f.project_id = $1 and f.barrier_id = barriers.id and f.task_id = $4
            returning barriers.id",
            self.db.project,
            place.mission.uuid(),
            place.run,
            task.uuid()
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(reopened.into_iter().map(Id::from).collect())
    }

    /// Stores how a barrier stands.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn save_barrier(&mut self, barrier: &BarrierRow) -> Result<()> {
        sqlx::query!(
            "update barriers set state = $3, reason = $4, reached_at = $5, expires_at = $6
            where project_id = $1 and id = $2",
            self.db.project,
            barrier.id.uuid(),
            barrier.state.as_str(),
            barrier.reason,
            barrier.reached_at.map(to_micros),
            barrier.expires_at.map(to_micros)
        )
        .execute(self.open().await?)
        .await?;
        Ok(())
    }

    /// A barrier holds nothing back any more: what can begin now is owed. The run must be held.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn free_held_tasks(&mut self, barrier: &BarrierRow) -> Result<()> {
        let freed = sqlx::query_scalar!(
            "delete from barrier_holds where project_id = $1 and barrier_id = $2 returning task_id",
            self.db.project,
            barrier.id.uuid()
        )
        .fetch_all(self.open().await?)
        .await?;
        self.wake_tasks_of_run(barrier.place, None, &freed).await
    }

    /// Whether something may hold a task back, or its mission be paused: to be asked again under the lock that it is a matter of.
    ///
    /// # Errors
    /// [`super::StoreError::NotFound`].
    pub async fn may_rest(
        &mut self,
        task: Id<ids::Task>,
        mission: Id<ids::Mission>,
    ) -> Result<bool> {
        Ok(sqlx::query_scalar!(
            r#"select status = 'paused'
                or exists (select from barrier_holds where project_id = $1 and task_id = $3) as "may!"
            from missions where project_id = $1 and id = $2"#,
            self.db.project,
            mission.uuid(),
            task.uuid()
        )
        .fetch_one(self.open().await?)
        .await?)
    }

    /// Whether something holds a task back.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn is_held_back(&mut self, task: Id<ids::Task>) -> Result<bool> {
        Ok(sqlx::query_scalar!(
            r#"select exists (select from barrier_holds where project_id = $1 and task_id = $2) as "held!""#,
            self.db.project,
            task.uuid()
        )
        .fetch_one(self.open().await?)
        .await?)
    }

    /// The tasks that a barrier follows, in their order.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn followed_tasks(&mut self, barrier: Id<ids::Barrier>) -> Result<Vec<Task>> {
        let stored = sqlx::query_as!(
            super::tasks::Stored,
            r#"select t.id, t.title, t.assign_to, t.status, t.held, t.group_label, t.run_id, t.mission_id, t.mission_run,
                t.document as "document: sqlx::types::Json<TaskDocument>", t.created_at, t.updated_at
            from barrier_follows f
            join tasks t on t.project_id = f.project_id and t.id = f.task_id
            where f.project_id = $1 and f.barrier_id = $2
            order by t.id"#,
            self.db.project,
            barrier.uuid()
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(stored
            .into_iter()
            .map(super::tasks::Stored::into_task)
            .collect())
    }

    /// Calls off what waits in a run that has ended: the timers of its deadline and its delays, and requests for approval, which are
    /// withdrawn and returned.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn call_off_what_waits(&mut self, place: Place) -> Result<Vec<Id<ids::Approval>>> {
        let withdrawn = sqlx::query_scalar!(
            "with withdrawn as (
                update approvals
                set status = 'rejected', resolved_at = clock_timestamp(), resolved_by = 'engine', note = 'The run has ended without it.'
                where project_id = $1 and mission_id = $2 and mission_run = $3 and status = 'pending'
                returning id
            ), called_off as (
                delete from jobs using (
                    select 'mission_deadline' as kind, $2::uuid as subject
                    union all
                    select 'delay', id from barriers where project_id = $1 and mission_id = $2 and run = $3
                    union all
                    select 'approval', id from withdrawn
                ) timers
                where jobs.project_id = $1 and jobs.kind = timers.kind and jobs.subject = timers.subject
            )
            select id from withdrawn",
            self.db.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(withdrawn.into_iter().map(Id::from).collect())
    }
}
