//! What the OpenAPI document says of answers that are put together member by member. `tests/api/openapi.rs` compares them with what is sent.

use chrono::{DateTime, Utc};
use serde_json::Value;

use crate::mission::Status as MissionStatus;
use crate::task::{ExpectedOutcome, Outcome, Phase, RetryPolicy, Status, TaskResult};

/// What finished work is judged by.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "it describes what `Expectation` reads and shows")]
#[schema(as = Expectation)]
pub struct ExpectationShape {
    /// `llm_review`; the other types need a workspace, and are refused until there is one.
    #[schema(rename = "type", value_type = String, example = "llm_review")]
    kind: String,
    /// What the reviewers look for; without it `dimensions` are required.
    criteria: Option<String>,
    /// What they score, in place of accuracy, completeness and quality.
    dimensions: Option<Vec<DimensionShape>>,
    /// The least weighted score that passes; 3 when absent.
    #[schema(minimum = 1, maximum = 5)]
    threshold: Option<f64>,
    /// `estimated` when the threshold may be corrected, else `firm`.
    confidence: Option<crate::task::Confidence>,
}

/// Something that reviewers score.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "it describes what `Expectation` reads and shows")]
#[schema(as = Dimension)]
pub struct DimensionShape {
    /// What it is called.
    name: String,
    /// What it is about.
    description: Option<String>,
    /// How much it counts; at least one counts more than nothing.
    #[schema(minimum = 0, maximum = 1)]
    weight: f64,
    /// What each score from 1 to 5 means.
    rubric: Option<Value>,
}

/// A task.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "it describes `Task::view`")]
#[schema(rename_all = "camelCase", as = Task)]
pub struct TaskShape {
    /// `task_…`.
    id: String,
    /// What it is called.
    title: String,
    /// The instructions as they stand.
    description: String,
    /// The instructions as they were given, once they have been rewritten.
    #[schema(nullable = false)]
    original_description: Option<String>,
    /// The agent that does it, by its name.
    assign_to: String,
    /// Where it stands.
    status: Status,
    /// What goes on in it.
    #[schema(nullable = false)]
    phase: Option<Phase>,
    /// Whether it was paused.
    #[schema(nullable = false)]
    held: Option<bool>,
    /// Higher runs first.
    priority: f64,
    /// What must be done first, as it was named.
    depends_on: Vec<String>,
    /// What the work is judged by.
    expectations: Vec<ExpectationShape>,
    /// None until there is a workspace.
    #[schema(value_type = Vec<Object>)]
    metrics: Vec<Value>,
    /// What it is to leave behind.
    #[schema(nullable = false)]
    expected_outcomes: Option<Vec<ExpectedOutcome>>,
    /// What it has left behind.
    outcomes: Vec<Outcome>,
    /// Full retries so far.
    retries: u32,
    /// Full retries before it fails.
    max_retries: u32,
    /// Attempts to mend so far.
    fix_attempts: u32,
    /// Questions that were answered.
    question_rounds: u32,
    /// Verdicts on it while it could not begin.
    resolution_attempts: u32,
    /// How often a person has rejected it.
    revision_count: u32,
    /// Whether it touches the outside world.
    side_effects: bool,
    /// The longest run in milliseconds; 0 is no limit.
    #[schema(nullable = false)]
    max_duration: Option<u64>,
    /// How it changes hands when it fails.
    #[schema(nullable = false)]
    retry_policy: Option<RetryPolicy>,
    /// When it must be done.
    #[schema(nullable = false)]
    deadline: Option<DateTime<Utc>>,
    /// A label that it shares with others.
    #[schema(nullable = false)]
    group: Option<String>,
    /// The mission that it is part of.
    #[schema(nullable = false)]
    mission_id: Option<String>,
    /// Its newest run.
    #[schema(nullable = false)]
    run_id: Option<String>,
    /// What was said in its newest run that has ended, to be read as a session.
    #[schema(nullable = false)]
    session_id: Option<String>,
    /// What the last run came to.
    #[schema(nullable = false)]
    result: Option<TaskResult>,
    /// Kept as given.
    notifications: Option<Value>,
    /// Kept as given.
    user: Option<Value>,
    /// Kept as given.
    #[schema(rename = "loop")]
    looped: Option<Value>,
    /// Kept as given.
    execution_mode: Option<Value>,
    /// Kept as given.
    sandbox: Option<Value>,
    /// Kept as given.
    routing: Option<Value>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

/// A request for a person's yes.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "it describes `ApprovalRow::view`")]
#[schema(rename_all = "camelCase", as = Approval)]
pub struct ApprovalShape {
    /// `apr_…`.
    id: String,
    /// The gate; `side-effects` and `escalation` are the server's own.
    gate_id: String,
    /// What the gate is called.
    gate_name: String,
    /// The task that waits.
    #[schema(nullable = false)]
    task_id: Option<String>,
    /// The mission that waits, or that the task is part of.
    #[schema(nullable = false)]
    mission_id: Option<String>,
    /// `pending`, `approved`, `rejected` or `timeout`.
    #[schema(example = "pending")]
    status: String,
    /// What it is about: the task or the mission as it was when this was asked, and what conditions have seen beside it.
    #[schema(value_type = Object)]
    payload: Value,
    requested_at: DateTime<Utc>,
    /// When it was answered.
    #[schema(nullable = false)]
    resolved_at: Option<DateTime<Utc>>,
    /// Who has answered; `engine` where it became pointless, `timeout` where nobody did.
    #[schema(nullable = false)]
    resolved_by: Option<String>,
    /// What they said.
    #[schema(nullable = false)]
    note: Option<String>,
}

/// A mission: in lists without its tasks and what is between them.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "it describes what a mission looks like")]
#[schema(rename_all = "camelCase", as = Mission)]
pub struct MissionShape {
    /// `msn_…`.
    id: String,
    /// Unique in the project.
    name: String,
    /// Where it stands.
    status: MissionStatus,
    /// Why it stands there, where that is not obvious.
    #[schema(nullable = false)]
    reason: Option<String>,
    /// How often it was executed.
    execution_count: i32,
    /// How many tasks its definition has.
    task_count: i32,
    /// Its newest run.
    #[schema(nullable = false)]
    run: Option<MissionRunShape>,
    /// The goal, which every agent reads.
    #[schema(nullable = false)]
    prompt: Option<String>,
    /// What every agent is given.
    #[schema(value_type = Option<Object>)]
    data: Option<Value>,
    /// What it is made of; in lists there are none.
    #[schema(value_type = Option<Vec<Object>>)]
    tasks: Option<Value>,
    /// Agents that come and go with it.
    #[schema(value_type = Option<Object>)]
    team: Option<Value>,
    /// The least score of its tasks and of all of it; 3 when absent.
    #[schema(minimum = 1, maximum = 5)]
    quality_threshold: Option<f64>,
    /// When it must have ended; then it fails.
    deadline: Option<DateTime<Utc>>,
    /// Cron of five fields, or a date.
    schedule: Option<String>,
    /// From when on the schedule is not due any more.
    end_date: Option<DateTime<Utc>>,
    /// Where people look at what there is before it goes on.
    #[schema(value_type = Option<Vec<Object>>)]
    checkpoints: Option<Value>,
    /// Where it goes on when what there is is good enough.
    #[schema(value_type = Option<Vec<Object>>)]
    quality_gates: Option<Value>,
    /// Where it goes on after a while.
    #[schema(value_type = Option<Vec<Object>>)]
    delays: Option<Value>,
    /// Kept as given.
    notifications: Option<Value>,
    /// Whose it is.
    user: Option<String>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

/// A mission's run.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "it describes what a mission's run looks like")]
#[schema(rename_all = "camelCase", as = MissionRun)]
pub struct MissionRunShape {
    /// Counted from 1.
    number: i32,
    /// The group of its tasks.
    group: String,
    started_at: DateTime<Utc>,
    ended_at: Option<DateTime<Utc>>,
    /// When it must have ended.
    deadline: Option<DateTime<Utc>>,
    /// How many of its tasks stand where.
    #[schema(value_type = Object)]
    tasks: Value,
    /// What holds it up: `{kind, name, state, reason, since, until}`.
    #[schema(value_type = Vec<Object>)]
    waiting_for: Vec<Value>,
}
