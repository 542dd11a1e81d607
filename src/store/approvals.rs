//! Approvals: what waits for a person's yes.

use chrono::{DateTime, Utc};
use serde_json::Value;
use uuid::Uuid;

use super::{ProjectDb, ProjectTx, Result};
use crate::ids::{self, Approval, Id, Mission};

/// A request for approval.
#[derive(Debug, Clone)]
pub struct ApprovalRow {
    /// Its id.
    pub id: Id<Approval>,
    /// The task that waits.
    pub task_id: Option<Uuid>,
    /// The mission that waits, or whose the task is.
    pub mission_id: Option<Uuid>,
    /// Which of its runs waits.
    pub mission_run: Option<i32>,
    /// What is let through, where it is no task that waits.
    pub particulars: Option<Value>,
    /// The gate that stands in its way.
    pub gate_id: String,
    /// What that is called.
    pub gate_name: String,
    /// Where it stands.
    pub hook: String,
    /// `pending`, `approved`, `rejected` or `timeout`.
    pub status: String,
    /// What there is to be seen.
    pub payload: Value,
    /// `approve` or `reject`.
    pub timeout_action: String,
    /// How often the task may be rejected.
    pub max_revisions: i32,
    /// When it was asked.
    pub requested_at: DateTime<Utc>,
    /// When it was answered.
    pub resolved_at: Option<DateTime<Utc>>,
    /// By whom.
    pub resolved_by: Option<String>,
    /// What they said.
    pub note: Option<String>,
}

/// Who waits for an answer.
#[derive(Debug, Clone, Copy)]
pub enum Waiting<'a> {
    /// A task.
    Task(Id<ids::Task>),
    /// A mission.
    Mission {
        /// Which.
        id: Id<Mission>,
        /// Its run, if one has begun.
        run: Option<i32>,
        /// What is to be let through.
        particulars: &'a Value,
    },
}

impl Waiting<'_> {
    fn columns(&self) -> (Option<Uuid>, Option<Uuid>, Option<i32>, Option<&Value>) {
        match *self {
            Self::Task(task) => (Some(task.uuid()), None, None, None),
            Self::Mission {
                id,
                run,
                particulars,
            } => (None, Some(id.uuid()), run, Some(particulars)),
        }
    }
}

/// Which requests of a mission are withdrawn.
#[derive(Debug, Clone, Copy)]
pub enum Withdrawn<'a> {
    /// Those that are about the beginning of a run.
    BeforeRuns,
    /// Those that are about a run that this schedule begins.
    Of(Id<ids::Schedule>),
    /// Those of a run at a hook.
    At(i32, &'a str),
    /// Those of a run for a quality gate.
    For(i32, Id<ids::Barrier>),
}

/// A request to be made.
#[derive(Debug)]
pub struct NewApproval<'a> {
    /// Its id.
    pub id: Id<Approval>,
    /// Who waits.
    pub waiting: Waiting<'a>,
    /// The gate.
    pub gate_id: &'a str,
    /// Its name.
    pub gate_name: &'a str,
    /// Where it stands.
    pub hook: &'a str,
    /// What there is to be seen.
    pub payload: &'a Value,
    /// What happens when nobody answers.
    pub timeout_action: &'a str,
    /// How often the task may be rejected.
    pub max_revisions: i32,
}

impl ProjectDb {
    /// Requests after `after`, oldest first, at most `limit`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn approvals(
        &self,
        status: Option<&str>,
        task: Option<Id<ids::Task>>,
        mission: Option<Id<Mission>>,
        after: Option<Id<Approval>>,
        limit: i64,
    ) -> Result<Vec<ApprovalRow>> {
        Ok(sqlx::query_as!(
            ApprovalRow,
            r#"select a.id, a.task_id, coalesce(a.mission_id, t.mission_id) as mission_id, a.mission_run, a.particulars, a.gate_id,
                    a.gate_name, a.hook, a.status, a.payload, a.timeout_action, a.max_revisions, a.requested_at, a.resolved_at,
                    a.resolved_by, a.note
            from approvals a
            left join tasks t on t.project_id = a.project_id and t.id = a.task_id
            where a.project_id = $1
              and ($2::text is null or a.status = $2)
              and ($3::uuid is null or a.task_id = $3)
              and ($4::uuid is null or a.mission_id = $4 or t.mission_id = $4)
              and ($5::uuid is null or a.id > $5)
            order by a.id
            limit $6"#,
            self.project,
            status,
            task.map(Id::uuid),
            mission.map(Id::uuid),
            after.map(Id::uuid),
            limit
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// One request.
    ///
    /// # Errors
    /// [`super::StoreError::NotFound`].
    pub async fn approval(&self, id: Id<Approval>) -> Result<ApprovalRow> {
        Ok(sqlx::query_as!(
            ApprovalRow,
            "select a.id, a.task_id, coalesce(a.mission_id, t.mission_id) as mission_id, a.mission_run, a.particulars, a.gate_id,
                    a.gate_name, a.hook, a.status, a.payload, a.timeout_action, a.max_revisions, a.requested_at, a.resolved_at,
                    a.resolved_by, a.note
            from approvals a
            left join tasks t on t.project_id = a.project_id and t.id = a.task_id
            where a.project_id = $1 and a.id = $2",
            self.project,
            id.uuid()
        )
        .fetch_one(&self.pool)
        .await?)
    }
}

impl ProjectTx {
    /// Makes a request.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn create_approval(&mut self, new: &NewApproval<'_>) -> Result<()> {
        let (task, mission, run, particulars) = new.waiting.columns();
        sqlx::query!(
            "insert into approvals (project_id, id, task_id, mission_id, mission_run, particulars, gate_id, gate_name, hook, status, payload,
                timeout_action, max_revisions, requested_at)
            values ($1, $2, $3, $4, $5, $6, $7, $8, $9, 'pending', $10, $11, $12, clock_timestamp())",
            self.db.project,
            new.id.uuid(),
            task,
            mission,
            run,
            particulars,
            new.gate_id,
            new.gate_name,
            new.hook,
            new.payload,
            new.timeout_action,
            new.max_revisions
        )
        .execute(self.open().await?)
        .await?;
        Ok(())
    }

    /// Answers a request that waits; `None` when it does not wait any more.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn resolve_approval(
        &mut self,
        id: Id<Approval>,
        status: &str,
        by: &str,
        note: Option<&str>,
    ) -> Result<Option<ApprovalRow>> {
        Ok(sqlx::query_as!(
            ApprovalRow,
            "update approvals
            set status = $3, resolved_at = clock_timestamp(), resolved_by = $4, note = $5
            where project_id = $1 and id = $2 and status = 'pending'
            returning id, task_id, coalesce(mission_id, (
                    select t.mission_id from tasks t where t.project_id = approvals.project_id and t.id = approvals.task_id
                )) as mission_id, mission_run, particulars, gate_id, gate_name, hook, status, payload, timeout_action, max_revisions,
                requested_at, resolved_at, resolved_by, note",
            self.db.project,
            id.uuid(),
            status,
            by,
            note
        )
        .fetch_optional(self.open().await?)
        .await?)
    }

    /// What has become of a request.
    ///
    /// # Errors
    /// [`super::StoreError::NotFound`].
    pub async fn approval_status(&mut self, id: Id<Approval>) -> Result<String> {
        Ok(sqlx::query_scalar!(
            "select status from approvals where project_id = $1 and id = $2",
            self.db.project,
            id.uuid()
        )
        .fetch_one(self.open().await?)
        .await?)
    }

    /// The gate at which a task waits for a person, and the hook there, if it does. The task must be held.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn pending_gate(&mut self, task: Id<ids::Task>) -> Result<Option<(String, String)>> {
        let asked = sqlx::query!(
            "select gate_id, hook from approvals
            where project_id = $1 and task_id = $2 and status = 'pending'
            order by requested_at desc
            limit 1",
            self.db.project,
            task.uuid()
        )
        .fetch_optional(self.open().await?)
        .await?;
        Ok(asked.map(|row| (row.gate_id, row.hook)))
    }

    /// Closes the requests of a task that nobody has answered and nobody can any more, and returns which. `status`, `by` and `note` are what
    /// they show from then on.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn close_approvals(
        &mut self,
        task: Id<ids::Task>,
        status: &str,
        by: &str,
        note: &str,
    ) -> Result<Vec<Id<Approval>>> {
        let gone = sqlx::query_scalar!(
            "with gone as (
                update approvals
                set status = $3, resolved_at = clock_timestamp(), resolved_by = $4, note = $5
                where project_id = $1 and task_id = $2 and status = 'pending'
                returning id
            ), called_off as (
                delete from jobs using gone where jobs.project_id = $1 and jobs.kind = 'approval' and jobs.subject = gone.id
            )
            select id from gone",
            self.db.project,
            task.uuid(),
            status,
            by,
            note
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(gone.into_iter().map(Id::from).collect())
    }

    /// The request of a mission that waits at one of these hooks, for a quality gate if one is given, if there is one. The mission must be held.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn pending_approval(
        &mut self,
        mission: Id<Mission>,
        run: Option<i32>,
        hooks: &[&str],
        barrier: Option<Id<ids::Barrier>>,
    ) -> Result<Option<Id<Approval>>> {
        let found = sqlx::query_scalar!(
            "select id from approvals
            where project_id = $1 and mission_id = $2 and mission_run is not distinct from $3 and hook = any($4)
              and (particulars ->> 'barrier') is not distinct from $5 and status = 'pending'
            order by id
            limit 1",
            self.db.project,
            mission.uuid(),
            run,
            hooks as _,
            barrier.map(|barrier| barrier.to_string())
        )
        .fetch_optional(self.open().await?)
        .await?;
        Ok(found.map(Id::from))
    }

    /// Withdraws requests of a mission that goes on without them, and returns which. The mission must be held.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn withdraw_mission_approvals(
        &mut self,
        mission: Id<Mission>,
        which: Withdrawn<'_>,
    ) -> Result<Vec<Id<Approval>>> {
        let (run, hook, particular) = match which {
            Withdrawn::BeforeRuns => (None, None, None),
            Withdrawn::Of(schedule) => (None, None, Some(("schedule", schedule.to_string()))),
            Withdrawn::At(run, hook) => (Some(run), Some(hook), None),
            Withdrawn::For(run, barrier) => {
                (Some(run), None, Some(("barrier", barrier.to_string())))
            }
        };
        let (key, value) = particular.unzip();
        let gone = sqlx::query_scalar!(
            "with gone as (
                update approvals
                set status = 'rejected', resolved_at = clock_timestamp(), resolved_by = 'engine', note = 'The mission went on without it.'
                where project_id = $1 and mission_id = $2 and mission_run is not distinct from $3 and status = 'pending'
                  and ($4::text is null or hook = $4)
                  and ($5::text is null or particulars ->> $5 = $6)
                returning id
            ), called_off as (
                delete from jobs using gone where jobs.project_id = $1 and jobs.kind = 'approval' and jobs.subject = gone.id
            )
            select id from gone",
            self.db.project,
            mission.uuid(),
            run,
            hook,
            key,
            value
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(gone.into_iter().map(Id::from).collect())
    }
}
