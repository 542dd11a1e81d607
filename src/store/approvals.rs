//! Approvals: what waits for a person's yes.

use chrono::{DateTime, Utc};
use serde_json::Value;
use uuid::Uuid;

use super::{ProjectDb, ProjectTx, Result};
use crate::ids::{self, Approval, Id};

/// A request for approval.
#[derive(Debug, Clone)]
pub struct ApprovalRow {
    /// Its id.
    pub id: Id<Approval>,
    /// The task that waits.
    pub task_id: Option<Uuid>,
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

/// A request to be made.
#[derive(Debug)]
pub struct NewApproval<'a> {
    /// Its id.
    pub id: Id<Approval>,
    /// The task that waits.
    pub task: Id<ids::Task>,
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
        after: Option<Id<Approval>>,
        limit: i64,
    ) -> Result<Vec<ApprovalRow>> {
        Ok(sqlx::query_as!(
            ApprovalRow,
            "select id, task_id, gate_id, gate_name, hook, status, payload, timeout_action, max_revisions,
                    requested_at, resolved_at, resolved_by, note
            from approvals
            where project_id = $1
              and ($2::text is null or status = $2)
              and ($3::uuid is null or task_id = $3)
              and ($4::uuid is null or id > $4)
            order by id
            limit $5",
            self.project,
            status,
            task.map(Id::uuid),
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
            "select id, task_id, gate_id, gate_name, hook, status, payload, timeout_action, max_revisions,
                    requested_at, resolved_at, resolved_by, note
            from approvals where project_id = $1 and id = $2",
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
        sqlx::query!(
            "insert into approvals (project_id, id, task_id, gate_id, gate_name, hook, status, payload, timeout_action, max_revisions, requested_at)
            values ($1, $2, $3, $4, $5, $6, 'pending', $7, $8, $9, clock_timestamp())",
            self.db.project,
            new.id.uuid(),
            new.task.uuid(),
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
            returning id, task_id, gate_id, gate_name, hook, status, payload, timeout_action, max_revisions,
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

    /// Withdraws the requests of a task that ended or went on without them, and returns which.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn withdraw_approvals(&mut self, task: Id<ids::Task>) -> Result<Vec<Id<Approval>>> {
        let gone = sqlx::query_scalar!(
            "with gone as (
                update approvals
                set status = 'rejected', resolved_at = clock_timestamp(), resolved_by = 'engine', note = 'The task went on without it.'
                where project_id = $1 and task_id = $2 and status = 'pending'
                returning id
            ), called_off as (
                delete from jobs using gone where jobs.project_id = $1 and jobs.kind = 'approval' and jobs.subject = gone.id
            )
            select id from gone",
            self.db.project,
            task.uuid()
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(gone.into_iter().map(Id::from).collect())
    }
}
