//! Runs of tasks, and what their models are saying. Their steps are in `steps.rs`.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::closing::{BegunRun, EndedRun};
use super::turns::token_column;
use super::{CallUsage, NewStep, ProjectDb, ProjectTx, Result, RunStatus, Topic, to_micros};
use crate::ids::{self, Agent, Id, Run};
use crate::task::{Status, Task};

/// What a model has said of a step that is not finished.
#[derive(Debug, Clone)]
pub struct Words {
    /// The task.
    pub task: Id<ids::Task>,
    /// The run.
    pub run: Id<Run>,
    /// The step's number.
    pub step: i32,
    /// The text so far.
    pub text: String,
}

/// A task's run as something that was said.
#[derive(Debug, Clone)]
pub struct TranscriptRow {
    /// Whose it is.
    pub task: Id<ids::Task>,
    /// What that is called.
    pub title: String,
    /// Who worked on it, if the agent is still there.
    pub agent: Option<String>,
    /// What the agent was told.
    pub said: Option<String>,
    /// When it began.
    pub started_at: DateTime<Utc>,
}

/// A run of a task.
#[derive(Debug, Clone)]
pub struct RunRow {
    /// Its id.
    pub id: Id<Run>,
    /// How it stands.
    pub status: String,
    /// When it began.
    pub started_at: DateTime<Utc>,
    /// When it ended.
    pub ended_at: Option<DateTime<Utc>>,
    /// What its agent was told.
    pub said: Option<String>,
}

/// A task that an agent is at.
#[derive(Debug, Clone)]
pub struct ProcessRow {
    /// The agent.
    pub agent: String,
    /// The task.
    pub task: Id<ids::Task>,
    /// The operating system's number of the server process.
    pub pid: i64,
    /// When the run began.
    pub started_at: DateTime<Utc>,
    /// When it last came further.
    pub last_update: DateTime<Utc>,
    /// The tool that it used last.
    pub last_tool: Option<String>,
    /// How many tools it has used.
    pub tool_calls: i64,
    /// How many tokens it has used.
    pub total_tokens: i64,
}

impl ProjectDb {
    /// Records what a call used that is no step: it is put down to the last run of the task that it was about, with a
    /// number below those of steps. A task that never ran has nothing to put it down to.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn record_call(&self, task: Id<ids::Task>, usage: &CallUsage) -> Result<()> {
        let mut tx = self.pool.begin().await?;
        // In a statement of its own: whoever has waited for the row must see what was recorded meanwhile.
        let run = sqlx::query_scalar!(
            "select id from runs where project_id = $1 and task_id = $2 order by id desc limit 1 for no key update",
            self.project,
            task.uuid()
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(run) = run else {
            return Ok(tx.rollback().await?);
        };
        sqlx::query!(
            "insert into model_calls (project_id, run_id, number, id, model, prompt_tokens, completion_tokens,
                                     cached_tokens, reasoning_tokens, estimated)
            select $1, $2, coalesce(min(number), 0) - 1, $3, $4, $5, $6, $7, $8, $9
            from model_calls
            where project_id = $1 and run_id = $2 and number < 0",
            self.project,
            run,
            Uuid::now_v7(),
            usage.model,
            token_column(usage.prompt_tokens),
            token_column(usage.completion_tokens),
            token_column(usage.cached_tokens),
            token_column(usage.reasoning_tokens),
            usage.estimated
        )
        .execute(&mut *tx)
        .await?;
        Ok(tx.commit().await?)
    }

    /// A run.
    ///
    /// # Errors
    /// [`super::StoreError::NotFound`].
    pub async fn run(&self, run: Id<Run>) -> Result<RunRow> {
        Ok(sqlx::query_as!(
            RunRow,
            "select id, status, started_at, ended_at, said from runs where project_id = $1 and id = $2",
            self.project,
            run.uuid()
        )
        .fetch_one(&self.pool)
        .await?)
    }

    /// A task's run, to be shown as a conversation.
    ///
    /// # Errors
    /// [`super::StoreError::NotFound`]; a chat turn's run is none.
    pub async fn transcript(&self, run: Id<Run>) -> Result<TranscriptRow> {
        Ok(sqlx::query_as!(
            TranscriptRow,
            r#"select t.id as task, t.title, a.name as "agent?", r.said, r.started_at
            from runs r
            join tasks t on t.project_id = r.project_id and t.id = r.task_id
            left join agents a on a.project_id = r.project_id and a.id = r.agent_id
            where r.project_id = $1 and r.id = $2"#,
            self.project,
            run.uuid()
        )
        .fetch_one(&self.pool)
        .await?)
    }

    /// What the models of several tasks have said of steps that are not finished.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn words_of_tasks(&self, tasks: &[Id<ids::Task>]) -> Result<Vec<Words>> {
        let tasks: Vec<Uuid> = tasks.iter().map(|task| task.uuid()).collect();
        let rows = sqlx::query!(
            "select task_id, run_id, step, text from words where project_id = $1 and task_id = any($2) order by task_id",
            self.project,
            &tasks
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| Words {
                task: row.task_id.into(),
                run: row.run_id.into(),
                step: row.step,
                text: row.text,
            })
            .collect())
    }

    /// Writes down more of what a model is saying, for those who listen elsewhere.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn write_words(
        &self,
        task: Id<ids::Task>,
        run: Id<Run>,
        step: i32,
        text: &str,
    ) -> Result<()> {
        sqlx::query!(
            "insert into words (project_id, task_id, run_id, step, text) values ($1, $2, $3, $4, $5)
            on conflict (project_id, task_id) do update
            set run_id = excluded.run_id, step = excluded.step, text = excluded.text",
            self.project,
            task.uuid(),
            run.uuid(),
            step,
            text
        )
        .execute(&self.pool)
        .await?;
        self.bell.ring(Topic::Words(task.uuid()));
        Ok(())
    }

    /// What a run's model has said of a step that is not finished: the step's number, and the text.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn words(&self, task: Id<ids::Task>, run: Id<Run>) -> Result<Option<(i32, String)>> {
        let row = sqlx::query!(
            "select step, text from words where project_id = $1 and task_id = $2 and run_id = $3",
            self.project,
            task.uuid(),
            run.uuid()
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(|row| (row.step, row.text)))
    }

    /// The tasks that agents are at, the longest running first, at most 1,000.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn processes(&self) -> Result<Vec<ProcessRow>> {
        Ok(sqlx::query_as!(
            ProcessRow,
            r#"select t.assign_to as agent, t.id as task, coalesce(r.started_by, 0) as "pid!", r.started_at,
                coalesce(s.last_update, r.started_at) as "last_update!",
                (select body ->> 'name' from steps
                 where project_id = $1 and run_id = r.id and kind = 'tool' order by number desc limit 1) as last_tool,
                coalesce(s.tool_calls, 0) as "tool_calls!",
                (select coalesce(sum(prompt_tokens + completion_tokens), 0)::bigint from model_calls
                 where project_id = $1 and run_id = r.id) as "total_tokens!"
            from tasks t
            join runs r on r.project_id = t.project_id and r.id = t.run_id
            left join lateral (
                select max(created_at) as last_update, count(*) filter (where kind = 'tool') as tool_calls
                from steps where project_id = $1 and run_id = r.id
            ) s on true
            where t.project_id = $1 and t.status in ('assigned', 'in_progress', 'review')
            order by r.started_at, t.id
            limit 1000"#,
            self.project
        )
        .fetch_all(&self.pool)
        .await?)
    }
}

impl ProjectTx {
    /// Begins a run of a task, whose agent is told `said`. Written with the commit.
    pub fn begin_run(
        &mut self,
        run: Id<Run>,
        task: Id<ids::Task>,
        agent: Id<Agent>,
        said: &str,
        at: DateTime<Utc>,
    ) {
        self.closing.begun = Some(Box::new(BegunRun {
            id: run.uuid(),
            task: task.uuid(),
            agent: agent.uuid(),
            said: said.to_owned(),
            at: to_micros(at),
        }));
    }

    /// A run that was paused goes on, with what its agent is told now; its time begins anew.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn go_on_with_run(&mut self, run: Id<Run>, said: &str) -> Result<()> {
        sqlx::query!(
            "update runs set status = 'running', ended_at = null, started_at = clock_timestamp(), started_by = $3, said = $4
            where project_id = $1 and id = $2",
            self.db.project,
            run.uuid(),
            i64::from(std::process::id()),
            said
        )
        .execute(self.open().await?)
        .await?;
        Ok(())
    }

    /// Another process goes on with a run.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn take_over_run(&mut self, run: Id<Run>) -> Result<()> {
        sqlx::query!(
            "update runs set started_by = $3 where project_id = $1 and id = $2",
            self.db.project,
            run.uuid(),
            i64::from(std::process::id())
        )
        .execute(self.open().await?)
        .await?;
        Ok(())
    }

    /// When the runs began in which agents are at these tasks.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn runs_began(&mut self, tasks: &[Task]) -> Result<HashMap<Id<Run>, DateTime<Utc>>> {
        let at_work = tasks
            .iter()
            .filter(|task| task.status() == Status::InProgress);
        let runs: Vec<Uuid> = at_work.filter_map(|task| task.run).map(Id::uuid).collect();
        if runs.is_empty() {
            return Ok(HashMap::new());
        }
        let rows = sqlx::query!(
            "select id, started_at from runs where project_id = $1 and id = any($2) order by id",
            self.db.project,
            &runs
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| (row.id.into(), row.started_at))
            .collect())
    }

    /// Ends a run that has not ended, with its last step if that is not recorded yet. Written with the commit.
    pub fn end_run(&mut self, run: Id<Run>, status: RunStatus, last: Option<NewStep>) {
        self.closing.ended = Some(Box::new(EndedRun {
            id: run.uuid(),
            status: status.as_str(),
            last,
        }));
    }
}
