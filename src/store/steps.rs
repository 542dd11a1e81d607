//! Steps of runs: what an agent has finished, so that a successor goes on from there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::events::EventColumns;
use super::jobs::{LEASE, LONG_ENOUGH, held};
use super::{CallUsage, Lease, ProjectDb, ProjectTx, Result, Stream, Topic};
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
#[derive(Debug)]
pub struct NewStep<'a> {
    /// Its place in the run, from 0.
    pub number: i32,
    /// What kind it is.
    pub kind: StepKind,
    /// What it came to.
    pub body: &'a Value,
    /// What its model call used.
    pub usage: Option<&'a CallUsage>,
    /// The tool call that may begin after it.
    pub under_way: Option<&'a str>,
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

/// A step as the columns of a statement, with the job that it is done for and what is told of it.
#[derive(Debug)]
struct StepColumns {
    job: &'static str,
    subject: Uuid,
    lease: i64,
    run: Uuid,
    number: i32,
    kind: &'static str,
    body: Value,
    under_way: Option<String>,
    usage: Option<CallUsage>,
    events: EventColumns,
}

impl StepColumns {
    fn new(lease: &Lease, run: Id<Run>, step: &NewStep<'_>, events: Vec<Event>) -> Self {
        let (job, subject) = lease.job.columns();
        Self {
            job,
            subject,
            lease: lease.number(),
            run: run.uuid(),
            number: step.number,
            kind: step.kind.as_str(),
            body: step.body.clone(),
            under_way: step.under_way.map(str::to_owned),
            usage: step.usage.cloned(),
            events: EventColumns::new(events),
        }
    }

    fn tokens(&self, count: fn(&CallUsage) -> u64) -> Option<i64> {
        self.usage
            .as_ref()
            .map(|usage| i64::try_from(count(usage)).unwrap_or(i64::MAX))
    }
}

/// Steps as the columns of a statement that records them all.
struct BatchColumns<'a> {
    jobs: Vec<&'static str>,
    subjects: Vec<Uuid>,
    leases: Vec<i64>,
    runs: Vec<Uuid>,
    numbers: Vec<i32>,
    kinds: Vec<&'static str>,
    bodies: Vec<&'a Value>,
    under_way: Vec<Option<&'a str>>,
    at: Vec<DateTime<Utc>>,
    calls: Vec<Uuid>,
    models: Vec<Option<&'a str>>,
    prompt: Vec<Option<i64>>,
    completion: Vec<Option<i64>>,
    cached: Vec<Option<i64>>,
    reasoning: Vec<Option<i64>>,
    estimated: Vec<Option<bool>>,
    /// Which of the steps an event tells of, from 1.
    event_places: Vec<i64>,
    event_names: Vec<&'static str>,
    event_payloads: Vec<&'a str>,
}

impl<'a> BatchColumns<'a> {
    fn new(steps: &[&'a StepColumns]) -> Self {
        let tokens = |count: fn(&CallUsage) -> u64| -> Vec<Option<i64>> {
            steps.iter().map(|step| step.tokens(count)).collect()
        };
        let usages = || steps.iter().map(|step| step.usage.as_ref());
        Self {
            jobs: steps.iter().map(|step| step.job).collect(),
            subjects: steps.iter().map(|step| step.subject).collect(),
            leases: steps.iter().map(|step| step.lease).collect(),
            runs: steps.iter().map(|step| step.run).collect(),
            numbers: steps.iter().map(|step| step.number).collect(),
            kinds: steps.iter().map(|step| step.kind).collect(),
            bodies: steps.iter().map(|step| &step.body).collect(),
            under_way: steps.iter().map(|step| step.under_way.as_deref()).collect(),
            at: steps.iter().map(|step| step.events.at).collect(),
            calls: steps.iter().map(|_| Uuid::now_v7()).collect(),
            models: usages()
                .map(|usage| usage.map(|usage| usage.model.as_str()))
                .collect(),
            prompt: tokens(|usage| usage.prompt_tokens),
            completion: tokens(|usage| usage.completion_tokens),
            cached: tokens(|usage| usage.cached_tokens),
            reasoning: tokens(|usage| usage.reasoning_tokens),
            estimated: usages()
                .map(|usage| usage.map(|usage| usage.estimated))
                .collect(),
            event_places: (1..)
                .zip(steps)
                .flat_map(|(place, step)| step.events.names.iter().map(move |_| place))
                .collect(),
            event_names: steps
                .iter()
                .flat_map(|step| step.events.names.iter().copied())
                .collect(),
            event_payloads: steps
                .iter()
                .flat_map(|step| step.events.payloads.iter().map(String::as_str))
                .collect(),
        }
    }
}

/// A step that waits to be recorded with others, and who is told whether it was.
#[derive(Debug)]
struct WaitingStep {
    step: Arc<StepColumns>,
    answer: oneshot::Sender<bool>,
}

/// Steps that wait for their project's log, each by its log. Those that wait when its turn comes are recorded in one statement, so that ten
/// tasks that hear from their models at once cost few commits in a row.
#[derive(Debug, Default)]
pub(super) struct Together(Mutex<HashMap<Stream, Vec<WaitingStep>>>);

const POISONED: &str = "nothing panics while it holds the steps that wait";

impl Together {
    /// Adds a step; true for the first, for which someone must wait for the log's turn.
    fn add(&self, stream: Stream, step: WaitingStep) -> bool {
        let mut waiting = self.0.lock().expect(POISONED);
        let steps = waiting.entry(stream).or_default();
        steps.push(step);
        steps.len() == 1
    }

    fn take(&self, stream: Stream) -> Vec<WaitingStep> {
        let mut waiting = self.0.lock().expect(POISONED);
        waiting.remove(&stream).unwrap_or_default()
    }
}

impl ProjectDb {
    /// Records a step and keeps the lease for longer if much of it is used up, with what is told of it, in one statement and so in one
    /// commit. Steps that would queue for the project's log are recorded together.
    ///
    /// # Errors
    /// [`super::StoreError::LeaseLost`]; nothing is recorded then.
    pub async fn record_step(
        &self,
        lease: &Lease,
        run: Id<Run>,
        step: &NewStep<'_>,
        events: Vec<Event>,
    ) -> Result<()> {
        let step = StepColumns::new(lease, run, step, events);
        if step.events.count() == 0 {
            self.record(&mut *self.pool.acquire().await?, &step).await?;
        } else if let Some(turn) = self.free_turn_at_the_log()
            && let Some(mut connection) = self.pool.try_acquire()
        {
            self.record(&mut connection, &step).await?;
            drop(turn);
        } else {
            self.record_with_others(step).await?;
        }
        self.bell.ring_if_followed(lease.job.subject());
        Ok(())
    }

    async fn record(&self, connection: &mut PgConnection, step: &StepColumns) -> Result<()> {
        let usage = step.usage.as_ref();
        let events = &step.events;
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
                select $1, $5, $6, $7, $8, $9, $10 from held
            ), called as (
                insert into model_calls (project_id, run_id, number, id, model, prompt_tokens, completion_tokens,
                                         cached_tokens, reasoning_tokens, estimated)
                select $1, $5, $6, $11, $12, $13, $14, $15, $16, $17 from held where $12::text is not null
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
            step.subject,
            step.lease,
            LEASE.as_secs_f64(),
            step.run,
            step.number,
            step.kind,
            step.body,
            step.under_way,
            events.at,
            Uuid::now_v7(),
            usage.map(|usage| usage.model.as_str()),
            step.tokens(|usage| usage.prompt_tokens),
            step.tokens(|usage| usage.completion_tokens),
            step.tokens(|usage| usage.cached_tokens),
            step.tokens(|usage| usage.reasoning_tokens),
            usage.map(|usage| usage.estimated),
            events.count(),
            &events.names as _,
            &events.payloads,
            step.job,
            LONG_ENOUGH.as_secs_f64()
        )
        .fetch_one(connection)
        .await?;
        held(recorded.unsigned_abs())?;
        if events.count() > 0 {
            self.bell.ring(Topic::Events(self.world, self.project));
        }
        Ok(())
    }

    /// Records a step together with those of other tasks of the project that wait for the log too. One that is not recorded so, because
    /// something has hold of its job or because one of the others is at fault, is recorded alone.
    async fn record_with_others(&self, step: StepColumns) -> Result<()> {
        let step = Arc::new(step);
        let (answer, recorded) = oneshot::channel();
        let waiting = WaitingStep {
            step: step.clone(),
            answer,
        };
        if self.together.add(self.stream(), waiting) {
            let db = self.clone();
            // On its own: whoever leads the others may be dropped.
            tokio::spawn(async move { db.record_those_who_wait().await });
        }
        if let Ok(true) = recorded.await {
            return Ok(());
        }
        // The connection first: those who have one wait for a turn.
        let mut connection = self.pool.acquire().await?;
        let turn = self.turn_at_the_log().await;
        let recorded = self.record(&mut connection, &step).await;
        drop(turn);
        recorded
    }

    /// Waits for a turn at the log, then records whatever steps wait by then.
    async fn record_those_who_wait(&self) {
        let connection = self.pool.acquire().await;
        let turn = self.turn_at_the_log().await;
        let waiting = self.together.take(self.stream());
        // Whoever gets no answer tries alone, and meets the same fault.
        let Ok(mut connection) = connection else {
            return;
        };
        let steps: Vec<&StepColumns> = waiting.iter().map(|waiting| &*waiting.step).collect();
        let recorded = match self.record_all(&mut connection, &steps).await {
            Ok(recorded) => recorded,
            Err(error) => {
                tracing::debug!("steps are recorded one by one: {error}");
                return;
            }
        };
        drop(turn);
        self.bell.ring(Topic::Events(self.world, self.project));
        for (place, waiting) in (1..).zip(waiting) {
            // Who has gone needs no answer.
            let _ = waiting.answer.send(recorded.contains(&place));
        }
    }

    /// Records steps of several tasks in one commit, and says which, by their places from 1. Jobs that others have hold of are left out:
    /// whoever holds one may wait for another of them.
    async fn record_all(
        &self,
        connection: &mut PgConnection,
        steps: &[&StepColumns],
    ) -> Result<Vec<i64>> {
        let columns = BatchColumns::new(steps);
        Ok(sqlx::query_scalar!(
            r#"with given as materialized (
                select * from unnest($2::text[], $3::uuid[], $4::bigint[], $5::uuid[], $6::integer[], $7::text[], $8::jsonb[], $9::text[],
                        $10::timestamptz[], $11::uuid[], $12::text[], $13::bigint[], $14::bigint[], $15::bigint[], $16::bigint[], $17::boolean[])
                    with ordinality as g (job, subject, lease, run, number, kind, body, under_way, at, call, model, prompt, completion,
                                          cached, reasoning, estimated, place)
            ), held as materialized (
                select g.*, j.due_at
                from given g
                join jobs j on j.project_id = $1 and j.kind = g.job and j.subject = g.subject and j.lease = g.lease
                for update of j skip locked
            ), extended as (
                update jobs set due_at = clock_timestamp() + make_interval(secs => $21)
                from held
                where jobs.project_id = $1 and jobs.kind = held.job and jobs.subject = held.subject
                  and held.due_at < clock_timestamp() + make_interval(secs => $22)
            ), stepped as (
                insert into steps (project_id, run_id, number, kind, body, under_way, created_at)
                select $1, run, number, kind, body, under_way, at from held
            ), called as (
                insert into model_calls (project_id, run_id, number, id, model, prompt_tokens, completion_tokens,
                                         cached_tokens, reasoning_tokens, estimated)
                select $1, run, number, call, model, prompt, completion, cached, reasoning, estimated from held where model is not null
            ), news as (
                select row_number() over (order by e.number) as number, count(*) over () as count, e.name, e.payload, held.at
                from unnest($18::bigint[], $19::text[], $20::text[]) with ordinality as e (place, name, payload, number)
                join held on held.place = e.place
            ), head as (
                insert into event_heads (project_id, last) select $1, count(*) from news having count(*) > 0
                on conflict (project_id) do update set last = event_heads.last + excluded.last
                returning last
            ), told as (
                insert into events (project_id, seq, name, payload, at)
                select $1, head.last - news.count + news.number, news.name, news.payload, news.at from head cross join news
            )
            select place as "place!" from held"#,
            self.project,
            &columns.jobs as _,
            &columns.subjects,
            &columns.leases,
            &columns.runs,
            &columns.numbers,
            &columns.kinds as _,
            &columns.bodies as _,
            &columns.under_way as _,
            &columns.at,
            &columns.calls,
            &columns.models as _,
            &columns.prompt as _,
            &columns.completion as _,
            &columns.cached as _,
            &columns.reasoning as _,
            &columns.estimated as _,
            &columns.event_places,
            &columns.event_names as _,
            &columns.event_payloads as _,
            LEASE.as_secs_f64(),
            LONG_ENOUGH.as_secs_f64()
        )
        .fetch_all(connection)
        .await?)
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
