//! Steps of runs: what an agent has finished, so that a successor goes on from there.

use chrono::{DateTime, Utc};
use serde_json::Value;
use uuid::Uuid;

use super::events::EventColumns;
use super::jobs::{LEASE, LONG_ENOUGH, held};
use super::turns::token_column;
use super::{CallUsage, Lease, ProjectDb, ProjectTx, Result, Topic};
use crate::event::Event;
use crate::ids::{Id, Run};

/// What kind of step it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    /// A model's message.
    Model,
    /// A tool's result.
    Tool,
    /// What became of earlier steps when they outgrew the model's window.
    Compaction,
    /// A reviewer's verdict.
    Review,
}

impl StepKind {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Tool => "tool",
            Self::Compaction => "compaction",
            Self::Review => "review",
        }
    }

    fn of(word: &str) -> Self {
        match word {
            "model" => Self::Model,
            "tool" => Self::Tool,
            "compaction" => Self::Compaction,
            _ => Self::Review,
        }
    }
}

/// A step to be recorded.
#[derive(Debug, Clone)]
pub struct NewStep {
    /// Its place in the run, from 0.
    pub number: i32,
    /// What kind it is.
    pub kind: StepKind,
    /// What it came to.
    pub body: Value,
    /// What its model call used.
    pub usage: Option<CallUsage>,
    /// The tool call that may begin after it.
    pub under_way: Option<String>,
}

/// A step as it is stored.
#[derive(Debug, Clone)]
pub struct StepRow {
    /// Its place in the run.
    pub number: i32,
    /// What kind it is.
    pub kind: StepKind,
    /// What it came to.
    pub body: Value,
    /// The tool call that may have begun after it.
    pub under_way: Option<String>,
    /// When it was recorded.
    pub created_at: DateTime<Utc>,
}

impl ProjectDb {
    /// Records steps of a run and keeps the lease for longer if much of it is used up, with what is told of them, in one statement and so in one
    /// commit. At most one of them may be a model's: an answer is recorded alone, or with the first results of what it calls.
    ///
    /// # Errors
    /// [`super::StoreError::LeaseLost`]; nothing is recorded then.
    pub async fn record_steps(
        &self,
        lease: &Lease,
        run: Id<Run>,
        steps: &[NewStep],
        events: Vec<Event>,
    ) -> Result<()> {
        let (kind, subject) = lease.job.columns();
        let numbers: Vec<i32> = steps.iter().map(|step| step.number).collect();
        let kinds: Vec<&str> = steps.iter().map(|step| step.kind.as_str()).collect();
        let bodies: Vec<String> = steps.iter().map(|step| step.body.to_string()).collect();
        let under_way: Vec<Option<&str>> =
            steps.iter().map(|step| step.under_way.as_deref()).collect();
        let asked = steps.iter().find(|step| step.usage.is_some());
        let usage = asked.and_then(|step| step.usage.as_ref());
        let events = EventColumns::new(events);
        let tells = events.count() > 0;
        // The connection first: those who have one wait for a turn.
        let mut connection = self.pool.acquire().await?;
        let _turn = match tells {
            true => self.turn_at_the_log().await,
            false => None,
        };
        let tokens = |count: fn(&CallUsage) -> u64| usage.map(|usage| token_column(count(usage)));
        let recorded = sqlx::query_scalar!(
            r#"with held as (
                select project_id, due_at from jobs
                where project_id = $1 and kind = $21 and subject = $2 and lease = $3
                for update
            ), extended as (
                update jobs set due_at = clock_timestamp() + make_interval(secs => $4)
                from held
                where jobs.project_id = $1 and kind = $21 and subject = $2
                  and held.due_at < clock_timestamp() + make_interval(secs => $22)
            ), stepped as (
                insert into steps (project_id, run_id, number, kind, body, under_way, created_at)
                select $1, $5, s.number, s.kind, s.body::jsonb, s.under_way, $10
                from held cross join unnest($6::integer[], $7::text[], $8::text[], $9::text[]) as s (number, kind, body, under_way)
            ), called as (
                insert into model_calls (project_id, run_id, number, id, model, prompt_tokens, completion_tokens,
                                         cached_tokens, reasoning_tokens, estimated)
                select $1, $5, $23::integer, $11, $12, $13, $14, $15, $16, $17 from held where $12::text is not null
            ), head as (
                insert into event_heads (project_id, last) select $1, $18::bigint from held where $18::bigint > 0
                on conflict (project_id) do update set last = event_heads.last + excluded.last
                returning last
            ), told as (
                insert into events (project_id, seq, name, payload, at)
                select $1, head.last - $18::bigint + e.number, e.name, e.payload, $10
                from head cross join unnest($19::text[], $20::text[]) with ordinality as e (name, payload, number)
            )
            select count(*) as "count!" from held"#,
            self.project,
            subject,
            lease.number(),
            LEASE.as_secs_f64(),
            run.uuid(),
            &numbers,
            &kinds as _,
            &bodies,
            &under_way as _,
            events.at,
            Uuid::now_v7(),
            usage.map(|usage| usage.model.as_str()),
            tokens(|usage| usage.prompt_tokens),
            tokens(|usage| usage.completion_tokens),
            tokens(|usage| usage.cached_tokens),
            tokens(|usage| usage.reasoning_tokens),
            usage.map(|usage| usage.estimated),
            events.count(),
            &events.names as _,
            &events.payloads,
            kind,
            LONG_ENOUGH.as_secs_f64(),
            asked.map(|step| step.number)
        )
        .fetch_one(&mut *connection)
        .await?;
        held(recorded.unsigned_abs())?;
        if tells {
            self.bell.ring(Topic::Events(self.world, self.project));
        }
        self.bell.ring_if_followed(subject);
        Ok(())
    }

    /// A run's steps from `from` on, in order, at most `limit`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn steps(&self, run: Id<Run>, from: i32, limit: i64) -> Result<Vec<StepRow>> {
        let rows = sqlx::query!(
            "select number, kind, body, under_way, created_at from steps
            where project_id = $1 and run_id = $2 and number >= $3
            order by number
            limit $4",
            self.project,
            run.uuid(),
            from,
            limit
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| StepRow {
                number: row.number,
                kind: StepKind::of(&row.kind),
                body: row.body,
                under_way: row.under_way,
                created_at: row.created_at,
            })
            .collect())
    }

    /// The steps of several runs, each from its number on, in order, at most 1,000, and whether there may be more.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn steps_of_runs(
        &self,
        from: &[(Id<Run>, i32)],
    ) -> Result<(Vec<(Id<Run>, StepRow)>, bool)> {
        const AT_ONCE: i64 = 1_000;
        let (runs, numbers): (Vec<Uuid>, Vec<i32>) = from
            .iter()
            .map(|(run, number)| (run.uuid(), *number))
            .unzip();
        let rows = sqlx::query!(
            "select s.run_id, s.number, s.kind, s.body, s.under_way, s.created_at
            from unnest($2::uuid[], $3::integer[]) as f (run_id, number)
            join steps s on s.project_id = $1 and s.run_id = f.run_id and s.number >= f.number
            order by s.run_id, s.number
            limit $4",
            self.project,
            &runs,
            &numbers,
            AT_ONCE
        )
        .fetch_all(&self.pool)
        .await?;
        let more = i64::try_from(rows.len()).is_ok_and(|count| count == AT_ONCE);
        let steps = rows
            .into_iter()
            .map(|row| {
                let step = StepRow {
                    number: row.number,
                    kind: StepKind::of(&row.kind),
                    body: row.body,
                    under_way: row.under_way,
                    created_at: row.created_at,
                };
                (row.run_id.into(), step)
            })
            .collect();
        Ok((steps, more))
    }

    /// All steps of a run, in order.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn all_steps(&self, run: Id<Run>) -> Result<Vec<StepRow>> {
        const AT_ONCE: i64 = 500;
        let mut steps: Vec<StepRow> = Vec::new();
        loop {
            let from = steps.last().map_or(0, |step| step.number + 1);
            let more = self.steps(run, from, AT_ONCE).await?;
            let whole = more.len() == usize::try_from(AT_ONCE).unwrap_or(usize::MAX);
            steps.extend(more);
            if !whole {
                return Ok(steps);
            }
        }
    }

    /// A call of a run may begin after its last step, which says nothing of it or that another may.
    ///
    /// # Errors
    /// [`super::StoreError::LeaseLost`]; nothing is written then.
    pub async fn mark_under_way(&self, lease: &Lease, run: Id<Run>, call: &str) -> Result<()> {
        let (kind, subject) = lease.job.columns();
        let marked = sqlx::query!(
            "with held as (
                select 1 from jobs
                where project_id = $1 and kind = $2 and subject = $3 and lease = $4
                for update
            )
            update steps set under_way = $6
            from held
            where project_id = $1 and run_id = $5
              and number = (select max(number) from steps where project_id = $1 and run_id = $5)",
            self.project,
            kind,
            subject,
            lease.number(),
            run.uuid(),
            call
        )
        .execute(&self.pool)
        .await?;
        held(marked.rows_affected())
    }
}

impl ProjectTx {
    /// The next call of a run has not begun after all.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn nothing_under_way(&mut self, run: Id<Run>) -> Result<()> {
        sqlx::query!(
            "update steps set under_way = null
            where project_id = $1 and run_id = $2
              and number = (select max(number) from steps where project_id = $1 and run_id = $2)",
            self.db.project,
            run.uuid()
        )
        .execute(self.open().await?)
        .await?;
        Ok(())
    }
}
