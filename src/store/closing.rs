//! What a change writes last: a task with the begin or the end of its run, and its events, in one statement right before the commit.
//!
//! Most of what the engine pays is round trips. So what nobody reads again within a change is kept until its end, and written together
//! with the events that tell of it, whose numbers must be taken last in any case. Where that is all there is, there is no transaction
//! around it either: what the change was decided from is looked at in the same statement ([`ProjectTx::assume`]).

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use super::events::EventColumns;
use super::turns::token_column;
use super::{CallUsage, Job, Lease, NewStep, ProjectTx, Result, StoreError};
use crate::task::{Document, Task};

/// What is kept until the end. Boxed, because most changes keep nothing, and are passed about by value.
#[derive(Debug, Default)]
pub(super) struct Closing {
    /// A new task, and whether its first step is owed.
    pub(super) made: Option<Box<(TaskColumns, bool)>>,
    /// A task as it stands now. Written so only with the begin or the end of its run; it must be held.
    pub(super) saved: Option<Box<TaskColumns>>,
    /// A run that begins.
    pub(super) begun: Option<Box<BegunRun>>,
    /// A run that ends.
    pub(super) ended: Option<Box<EndedRun>>,
    /// The job that fences the change is done.
    pub(super) done: bool,
}

/// What a change takes for granted: that its job's lease is still there, and its task as it was read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Assumed {
    task: Uuid,
    updated_at: DateTime<Utc>,
    job: Job,
    lease: i64,
}

/// A task as the columns of a statement.
#[derive(Debug)]
pub(super) struct TaskColumns {
    pub(super) id: Uuid,
    pub(super) title: String,
    pub(super) assign_to: String,
    pub(super) status: &'static str,
    pub(super) held: bool,
    pub(super) group: Option<String>,
    pub(super) run: Option<Uuid>,
    pub(super) document: Document,
    pub(super) created_at: DateTime<Utc>,
    pub(super) updated_at: DateTime<Utc>,
    /// Whether it ends with this change, so that those who need it are to be woken.
    pub(super) ends: bool,
}

impl TaskColumns {
    pub(super) fn of(task: &Task, ends: bool) -> Self {
        Self {
            id: task.id.uuid(),
            title: task.title.clone(),
            assign_to: task.assign_to.clone(),
            status: task.status().as_str(),
            held: task.held,
            group: task.group.clone(),
            run: task.run.map(crate::ids::Id::uuid),
            document: task.document.clone(),
            created_at: task.created_at,
            updated_at: task.updated_at,
            ends,
        }
    }
}

/// A run that begins.
#[derive(Debug)]
pub(super) struct BegunRun {
    pub(super) id: Uuid,
    pub(super) task: Uuid,
    pub(super) agent: Uuid,
    pub(super) said: String,
    pub(super) at: DateTime<Utc>,
}

/// A run that ends, with its last step if that is not recorded yet.
#[derive(Debug)]
pub(super) struct EndedRun {
    pub(super) id: Uuid,
    pub(super) status: &'static str,
    pub(super) last: Option<NewStep>,
}

impl Closing {
    fn is_empty(&self) -> bool {
        self.made.is_none() && self.begun.is_none() && self.ended.is_none()
    }

    /// Whether a task is written with what is kept already: it comes with the begin or the end of its run.
    pub(super) fn takes(&self, task: &TaskColumns) -> bool {
        let with_run = self.begun.is_some() || self.ended.is_some();
        with_run && self.saved.as_ref().is_none_or(|saved| saved.id == task.id)
    }

    /// Whether all of it is one statement, which needs no transaction. What is assumed is looked at by those of runs alone.
    fn is_one_statement(&self, assumes: bool) -> bool {
        match (&self.begun, &self.ended) {
            (Some(_), None) => assumes && !self.done,
            (None, Some(_)) => assumes,
            _ => !assumes && self.saved.is_none() && !self.done && self.begun.is_none(),
        }
    }
}

impl ProjectTx {
    /// Takes for granted that a lease is there still, and its task as it was read: nothing is asked before something has to be, and where
    /// all that is written is the begin or the end of a run it is asked in the statement that writes it. Whoever gets
    /// [`StoreError::Stale`] looks again, with [`ProjectTx::lock_task_under`].
    pub fn assume(&mut self, lease: &Lease, task: &Task) {
        self.fenced = Some((lease.job, lease.number()));
        self.assumed = Some(Assumed {
            task: task.id.uuid(),
            updated_at: task.updated_at,
            job: lease.job,
            lease: lease.number(),
        });
    }

    /// Holds what was assumed, first in the transaction.
    pub(super) async fn prove(
        &self,
        connection: &mut PgConnection,
        assumed: &Assumed,
    ) -> Result<()> {
        let (kind, subject) = assumed.job.columns();
        // The task first, then the job, like everyone.
        let held = sqlx::query_scalar!(
            r#"with task as (
                select id from tasks where project_id = $1 and id = $2 and updated_at = $3
                for no key update
            ), held as (
                select lease from jobs
                where project_id = $1 and kind = $4 and subject = $5 and lease = $6
                for update
            )
            select (select count(*) from held) as "held!" from task"#,
            self.db.project,
            assumed.task,
            assumed.updated_at,
            kind,
            subject,
            assumed.lease
        )
        .fetch_optional(connection)
        .await?;
        match held {
            Some(1..) => Ok(()),
            _ => Err(StoreError::Stale),
        }
    }

    /// Writes what was kept, and the events, and commits. From the events to the commit no other transaction of the project can append.
    pub(super) async fn close(&mut self) -> Result<()> {
        let alone = self.tx.is_none() && self.closing.is_one_statement(self.assumed.is_some());
        if alone && self.closing.is_empty() && self.events.is_empty() {
            return Ok(());
        }
        let mut connection = None;
        if alone {
            connection = Some(self.db.pool.acquire().await?);
        } else {
            self.open().await?;
        }
        // The connection first: those who have one wait for a turn.
        let turn = match self.events.is_empty() {
            true => None,
            false => self.db.turn_at_the_log().await,
        };
        let closing = std::mem::take(&mut self.closing);
        let events = EventColumns::new(std::mem::take(&mut self.events));
        self.tells |= events.count() > 0;
        if let Some(connection) = &mut connection {
            let written = self.write_last(connection, &closing, &events).await?;
            drop(turn);
            return if written {
                Ok(())
            } else {
                Err(StoreError::Stale)
            };
        }
        let mut tx = self.begun().await?;
        if !self.write_last(&mut tx, &closing, &events).await? {
            // Others need the task that ends: they are woken, and the rest is written without it.
            self.tx = Some(tx);
            if let Some(task) = &closing.saved {
                self.write_task(task).await?;
            }
            let rest = Closing {
                saved: None,
                ..closing
            };
            tx = self.begun().await?;
            self.write_last(&mut tx, &rest, &events).await?;
        }
        tx.commit().await?;
        drop(turn);
        Ok(())
    }

    /// Writes a task that was kept, before something is held that comes after tasks in everyone's order: it may have others to wake.
    pub(super) async fn write_kept_task(&mut self) -> Result<()> {
        match self.closing.saved.take() {
            Some(task) => self.write_task(&task).await,
            None => Ok(()),
        }
    }

    /// False, with nothing written, where others need a task that ends, or something is not as it was assumed.
    async fn write_last(
        &self,
        connection: &mut PgConnection,
        closing: &Closing,
        events: &EventColumns,
    ) -> Result<bool> {
        if let Some(run) = &closing.ended {
            return self.write_end(connection, run, closing, events).await;
        }
        if closing.done {
            self.delete_fenced(connection).await?;
        }
        if let Some(run) = &closing.begun {
            let saved = closing.saved.as_deref();
            return self.write_begin(connection, run, saved, events).await;
        } else if let Some(made) = &closing.made {
            let (task, owed) = &**made;
            self.write_made(connection, task, *owed, events).await?;
        } else {
            self.append(connection, events).await?;
        }
        Ok(true)
    }

    /// A new task, its first step if that is owed, and what is told of it.
    async fn write_made(
        &self,
        connection: &mut PgConnection,
        task: &TaskColumns,
        owed: bool,
        events: &EventColumns,
    ) -> Result<()> {
        sqlx::query!(
            "with made as (
                insert into tasks (project_id, id, title, assign_to, status, held, group_label, run_id, document, created_at, updated_at)
                values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $10)
            ), owed as (
                insert into jobs (project_id, kind, subject, priority, ready, due_at, lease)
                select $1, 'task', $2, $12, true, clock_timestamp(), nextval('leases') where $11::boolean
            ), head as (
                insert into event_heads (project_id, last) select $1, $13::bigint where $13::bigint > 0
                on conflict (project_id) do update set last = event_heads.last + excluded.last
                returning last
            )
            insert into events (project_id, seq, name, payload, at)
            select $1, head.last - $13::bigint + e.number, e.name, e.payload, $16
            from head cross join unnest($14::text[], $15::text[]) with ordinality as e (name, payload, number)",
            self.db.project,
            task.id,
            task.title,
            task.assign_to,
            task.status,
            task.held,
            task.group,
            task.run,
            Json(&task.document) as _,
            task.created_at,
            owed,
            task.document.priority,
            events.count(),
            &events.names as _,
            &events.payloads,
            events.at
        )
        .execute(connection)
        .await?;
        Ok(())
    }

    /// A run that begins, the task as it stands with it, and what is told of both; false, with nothing written, where something is not as
    /// it was assumed.
    async fn write_begin(
        &self,
        connection: &mut PgConnection,
        run: &BegunRun,
        saved: Option<&TaskColumns>,
        events: &EventColumns,
    ) -> Result<bool> {
        let assumed = self.assumed.as_ref();
        let (kind, subject) = assumed.map(|assumed| assumed.job.columns()).unzip();
        // What depends on a parameter alone is kept where the planner cannot see it: it would plan anew each time.
        let written = sqlx::query_scalar!(
            r#"with given as materialized (
                select $19::timestamptz is not null as assumes
            ), task as (
                select t.id from tasks t, given
                where given.assumes and t.project_id = $1 and t.id = $10 and t.updated_at = $19
                for no key update of t
            ), held as (
                select j.lease from task, jobs j
                where j.project_id = $1 and j.kind = $20::text and j.subject = $21::uuid and j.lease = $22::bigint
                for update of j
            ), fine as (
                select 1 as one from given where not given.assumes or exists (select from held)
            ), saved as (
                update tasks set assign_to = $3, status = $4, held = $5, run_id = $6, document = $7, updated_at = $8
                from fine
                where project_id = $1 and id = $2::uuid
            ), began as (
                insert into runs (project_id, id, task_id, agent_id, status, started_at, started_by, said)
                select $1, $9, $10, $11, 'running', $12, $13, $14 from fine
            ), head as (
                insert into event_heads (project_id, last) select $1, $15::bigint from fine where $15::bigint > 0
                on conflict (project_id) do update set last = event_heads.last + excluded.last
                returning last
            ), told as (
                insert into events (project_id, seq, name, payload, at)
                select $1, head.last - $15::bigint + e.number, e.name, e.payload, $18
                from head cross join unnest($16::text[], $17::text[]) with ordinality as e (name, payload, number)
            )
            select count(*) as "count!" from fine"#,
            self.db.project,
            saved.map(|task| task.id),
            saved.map(|task| task.assign_to.as_str()),
            saved.map(|task| task.status),
            saved.map(|task| task.held),
            saved.and_then(|task| task.run),
            saved.map(|task| Json(&task.document)) as _,
            saved.map(|task| task.updated_at),
            run.id,
            run.task,
            run.agent,
            run.at,
            i64::from(std::process::id()),
            run.said,
            events.count(),
            &events.names as _,
            &events.payloads,
            events.at,
            assumed.map(|assumed| assumed.updated_at),
            kind,
            subject,
            assumed.map(|assumed| assumed.lease)
        )
        .fetch_one(connection)
        .await?;
        Ok(written > 0)
    }

    /// A run that ends, the task and the job that end with it, and what is told of them; false, with nothing written, where others need
    /// a task that ends, or something is not as it was assumed. None can come to need the task unseen: it is held, or its row would have
    /// another version by now (`needed`).
    async fn write_end(
        &self,
        connection: &mut PgConnection,
        run: &EndedRun,
        closing: &Closing,
        events: &EventColumns,
    ) -> Result<bool> {
        let saved = closing.saved.as_deref();
        let last = run.last.as_ref();
        let usage = last.and_then(|step| step.usage.as_ref());
        let tokens = |count: fn(&CallUsage) -> u64| usage.map(|usage| token_column(count(usage)));
        let assumed = self.assumed.as_ref();
        let (kind, subject) = self.fenced.map(|(job, _)| job.columns()).unzip();
        // What depends on a parameter alone is kept where the planner cannot see it: it would plan anew each time.
        let written = sqlx::query_scalar!(
            r#"with given as materialized (
                select $9::boolean as ends, $29::timestamptz is not null as assumes
            ), task as (
                select t.id from tasks t, given
                where given.assumes and t.project_id = $1 and t.id = $30::uuid and t.updated_at = $29
                  and not (given.ends and t.needed)
                for no key update of t
            ), held as (
                select j.lease from task, jobs j
                where j.project_id = $1 and j.kind = $22::text and j.subject = $23::uuid and j.lease = $24::bigint
                for update of j
            ), fine as (
                select 1 as one from given
                where (not given.assumes or exists (select from held))
                  and (not given.ends or not exists (select from dependencies where project_id = $1 and needs_id = $2::uuid))
            ), saved as (
                update tasks set assign_to = $3, status = $4, held = $5, run_id = $6, document = $7, updated_at = $8
                from fine
                where project_id = $1 and id = $2::uuid
            ), ended as (
                update runs set status = $11, ended_at = clock_timestamp()
                from fine
                where project_id = $1 and id = $10 and status = 'running'
                returning task_id
            ), spoken as (
                delete from words using ended where words.project_id = $1 and words.task_id = ended.task_id
            ), stepped as (
                insert into steps (project_id, run_id, number, kind, body, created_at)
                select $1, $10, $12::integer, $13, $14, clock_timestamp() from ended where $12::integer is not null
            ), called as (
                insert into model_calls (project_id, run_id, number, id, model, prompt_tokens, completion_tokens,
                                         cached_tokens, reasoning_tokens, estimated)
                select $1, $10, $12::integer, $15, $16, $17, $18, $19, $20, $21 from ended where $16::text is not null
            ), settled as (
                delete from jobs using fine
                where $31::boolean and project_id = $1 and kind = $22::text and subject = $23::uuid and lease = $24::bigint
            ), head as (
                insert into event_heads (project_id, last) select $1, $25::bigint from fine where $25::bigint > 0
                on conflict (project_id) do update set last = event_heads.last + excluded.last
                returning last
            ), told as (
                insert into events (project_id, seq, name, payload, at)
                select $1, head.last - $25::bigint + e.number, e.name, e.payload, $28
                from head cross join unnest($26::text[], $27::text[]) with ordinality as e (name, payload, number)
            )
            select count(*) as "count!" from fine"#,
            self.db.project,
            saved.map(|task| task.id),
            saved.map(|task| task.assign_to.as_str()),
            saved.map(|task| task.status),
            saved.map(|task| task.held),
            saved.and_then(|task| task.run),
            saved.map(|task| Json(&task.document)) as _,
            saved.map(|task| task.updated_at),
            saved.is_some_and(|task| task.ends),
            run.id,
            run.status,
            last.map(|step| step.number),
            last.map(|step| step.kind.as_str()),
            last.map(|step| &step.body),
            Uuid::now_v7(),
            usage.map(|usage| usage.model.as_str()),
            tokens(|usage| usage.prompt_tokens),
            tokens(|usage| usage.completion_tokens),
            tokens(|usage| usage.cached_tokens),
            tokens(|usage| usage.reasoning_tokens),
            usage.map(|usage| usage.estimated),
            kind,
            subject,
            self.fenced.map(|(_, lease)| lease),
            events.count(),
            &events.names as _,
            &events.payloads,
            events.at,
            assumed.map(|assumed| assumed.updated_at),
            assumed.map(|assumed| assumed.task),
            closing.done
        )
        .fetch_one(connection)
        .await?;
        Ok(written > 0)
    }

    async fn delete_fenced(&self, connection: &mut PgConnection) -> Result<()> {
        if let Some((job, lease)) = self.fenced {
            let (kind, subject) = job.columns();
            sqlx::query!(
                "delete from jobs where project_id = $1 and kind = $2 and subject = $3 and lease = $4",
                self.db.project,
                kind,
                subject,
                lease
            )
            .execute(connection)
            .await?;
        }
        Ok(())
    }
}
