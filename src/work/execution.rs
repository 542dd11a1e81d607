//! A run of a task: the agent loop of a chat turn, with every finished step on record before anything happens that could be noticed.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};

use super::record::{Recorder, replay, without_nul};
use super::surroundings::surroundings;
use super::task::{Hold, commit, model, pass, pause};
use super::{Held, Result, WorkError};
use crate::agent::{
    self, Course, OutputFormat, Persona, Repair, Step, Toolbox, TurnError, TurnEvent, system_prompt,
};
use crate::lifecycle::{self, after_failure};
use crate::llm::{
    Effort, FinishReason, Message, ModelRequest, Part, ProviderError, ToolCall, context_window,
};
use crate::store::{AgentRow, NewStep, ProjectTx, RunStatus, Topic};
use crate::task::{EndReason, Failure, Phase, Settings, Status, Task, TaskResult};
use crate::tools::ServerTools;

/// Turns of an agent that names no limit (contract 2.4.1).
const MAX_TURNS: u32 = 150;
/// The longest rest that a provider can ask for between two attempts.
const LONGEST_REST: Duration = Duration::from_secs(3_600);
/// Words are written down for listeners this often.
const WORDS: Duration = Duration::from_millis(100);

/// How a run ended.
#[derive(Debug)]
struct Ending {
    reason: EndReason,
    /// What went wrong, in a sentence.
    sentence: String,
    /// What broke.
    cause: Option<String>,
    /// The milliseconds that it had, where they were used up.
    most: Option<u64>,
    /// How long the provider wants to be left alone.
    rest: Duration,
}

impl Ending {
    fn finished() -> Self {
        Self {
            reason: EndReason::Finished,
            sentence: String::new(),
            cause: None,
            most: None,
            rest: Duration::ZERO,
        }
    }

    fn limit(reason: EndReason, sentence: String) -> Self {
        Self {
            reason,
            sentence,
            cause: None,
            most: None,
            rest: Duration::ZERO,
        }
    }

    fn timeout(most: u64, sentence: String) -> Self {
        Self {
            most: Some(most),
            ..Self::limit(EndReason::Timeout, sentence)
        }
    }

    fn error(cause: String) -> Self {
        Self {
            reason: EndReason::Error,
            sentence: cause.clone(),
            cause: Some(cause),
            most: None,
            rest: Duration::ZERO,
        }
    }
}

/// Runs a task's agent from the last recorded step to its end. `begun` is when the run began, if nothing of it is on record.
pub(super) async fn execute(
    held: &Held,
    task: Task,
    begun: Option<DateTime<Utc>>,
) -> Result<Option<Task>> {
    let db = &held.lease.db;
    let settings = db.settings().await?;
    let Some(run) = task.run else {
        return Err(WorkError::Defect(anyhow::anyhow!(
            "a task in progress has no run"
        )));
    };
    let agent = match db.agent(&task.assign_to).await {
        Ok(agent) => agent,
        Err(crate::store::StoreError::NotFound) => {
            let ending = Ending::error(format!(
                "There is no agent \"{}\" any more.",
                task.assign_to
            ));
            let recorder = Recorder::new(held, &task, run, String::new());
            return conclude(held, task, &settings, recorder, ending, Utc::now()).await;
        }
        Err(error) => return Err(error.into()),
    };
    let before = match begun {
        Some(_) => None,
        None => Some(db.run(run).await?),
    };
    let started_at = match (&before, begun) {
        (Some(row), _) => row.started_at,
        (None, begun) => begun.unwrap_or_else(Utc::now),
    };
    let (provider, model_name, model_id) = match model(held, &task, &agent, &settings).await? {
        Ok(model) => model,
        Err(cause) => {
            let recorder = Recorder::new(held, &task, run, String::new());
            return conclude(
                held,
                task,
                &settings,
                recorder,
                Ending::error(cause),
                started_at,
            )
            .await;
        }
    };
    let expects_outcomes = task
        .document
        .expected_outcomes
        .as_ref()
        .is_some_and(|expected| !expected.is_empty());
    let fetcher = held.app.fetcher.clone();
    let toolbox: Arc<dyn Toolbox> = Arc::new(ServerTools::in_task(
        db.clone(),
        &agent,
        fetcher,
        expects_outcomes,
    ));
    let mut recorder = Recorder::new(held, &task, run, model_name.clone());
    recorder.toolbox = Some(toolbox.clone());
    // A task that this one needed may have written to them, a moment ago and elsewhere.
    let memories = db.memories_now(&agent.name).await?;
    let around = surroundings(db, &task).await?;
    // Whoever takes a run over says what was said, whatever the description is by now.
    let said = before.as_ref().and_then(|row| row.said.clone());
    let first = Message::User {
        content: vec![Part::Text {
            text: said.unwrap_or_else(|| task.document.description.clone()),
        }],
    };
    let (messages, open) = match &before {
        Some(row) => replay(&mut recorder, row, first, &*toolbox).await?,
        None => (vec![first], Vec::new()),
    };
    let request = ModelRequest {
        model: model_id,
        system: Some(prompt(&task, &agent, &memories, around)),
        messages,
        reasoning: effort(&agent),
        permit: Some(held.proof.clone()),
        ..ModelRequest::default()
    };
    let most = agent.definition.get("maxTurns").and_then(Value::as_u64);
    let most = most.map_or(MAX_TURNS, |most| u32::try_from(most).unwrap_or(u32::MAX));
    let window = agent
        .definition
        .get("contextWindow")
        .and_then(Value::as_u64);
    let course = Course {
        format: OutputFormat::Text,
        repair: Repair::Never,
        calls: most.saturating_sub(recorder.turns),
        open,
        window: Some(window.unwrap_or_else(|| context_window(&model_name))),
    };
    let events = agent::turn(provider, request, course, toolbox);
    let followed = follow(held, &mut recorder, &task, &settings, events, started_at);
    let ending = match followed.await? {
        Followed::Ended(TurnEnd::Limit(mut ending)) => {
            if ending.reason == EndReason::MaxTurns {
                ending.sentence =
                    format!("The agent used all of its {most} turns and gave no answer.");
            }
            ending
        }
        Followed::Ended(TurnEnd::Whole(step)) => ending_of(&step),
        Followed::HandedOver => return Ok(None),
    };
    conclude(held, task, &settings, recorder, ending, started_at).await
}

fn effort(agent: &AgentRow) -> Option<Effort> {
    let word = agent.definition.get("reasoning")?;
    serde_json::from_value(word.clone()).ok()
}

/// A whole answer, or one that was cut off: that is no success.
fn ending_of(step: &Step) -> Ending {
    match step.reason {
        FinishReason::Stop | FinishReason::ToolCalls => Ending::finished(),
        FinishReason::Length => {
            Ending::error("The model's answer was cut off at its token limit.".to_owned())
        }
        FinishReason::ContentFilter => {
            Ending::error("The provider's filter cut the model's answer off.".to_owned())
        }
    }
}

/// The instructions before the task's description.
fn prompt(
    task: &Task,
    agent: &AgentRow,
    memories: &crate::store::Memories,
    around: Vec<String>,
) -> String {
    let text = |key: &str| agent.definition.get(key).and_then(Value::as_str);
    let persona = Persona {
        name: &agent.name,
        role: text("role"),
        system_prompt: text("systemPrompt"),
        identity: agent.definition.get("identity"),
        shared_memory: memories.shared.as_deref(),
        own_memory: memories.own.as_deref(),
    };
    let mut context = vec![format!(
        "You work alone on the task \"{}\" until it is finished; your last answer is its result.",
        task.title
    )];
    context.extend(around);
    if let Some(expected) = task
        .document
        .expected_outcomes
        .as_ref()
        .filter(|expected| !expected.is_empty())
    {
        context.push(format!(
            "Hand over these outcomes with `register_outcome`, under these labels: {}",
            json!(expected)
        ));
    }
    if let Some(feedback) = &task.document.feedback {
        let before = task
            .document
            .result
            .as_ref()
            .map(|result| result.stdout.as_str())
            .filter(|said| !said.is_empty());
        let mut said = format!("An earlier attempt was not good enough: {feedback}");
        if let Some(before) = before {
            said += &format!("\nIts result was:\n<earlier-result>\n{before}\n</earlier-result>");
        }
        context.push(said);
    }
    system_prompt(persona, &context)
}

enum TurnEnd {
    Whole(Step),
    Limit(Ending),
}

enum Followed {
    Ended(TurnEnd),
    HandedOver,
}

/// When a run is to be stopped, and why, unless it ends by itself.
struct Limits {
    timeout: Option<(Instant, Ending)>,
    stale: Duration,
    quiet_since: Instant,
    warned: bool,
}

impl Limits {
    fn new(task: &Task, settings: &Settings, started_at: DateTime<Utc>) -> Self {
        let most = task.document.max_duration.unwrap_or(settings.task_timeout);
        let passed = (Utc::now() - started_at).to_std().unwrap_or_default();
        let timeout = (most > 0).then(|| {
            let left = Duration::from_millis(most).saturating_sub(passed);
            let sentence = format!("The run took longer than the {most} ms it may.");
            (Instant::now() + left, Ending::timeout(most, sentence))
        });
        Self {
            timeout,
            stale: Duration::from_millis(settings.stale_threshold),
            quiet_since: Instant::now(),
            warned: false,
        }
    }

    /// When to look at the limits next.
    fn next(&self) -> Instant {
        let patience = if self.warned {
            self.stale * 2
        } else {
            self.stale
        };
        let stale = self.quiet_since + patience;
        self.timeout
            .as_ref()
            .map_or(stale, |(at, _)| stale.min(*at))
    }
}

/// Pulls a turn to its end, records its steps, and keeps an eye on everything that may stop it.
async fn follow(
    held: &Held,
    recorder: &mut Recorder<'_>,
    task: &Task,
    settings: &Settings,
    events: impl futures::Stream<Item = std::result::Result<TurnEvent, TurnError>>,
    started_at: DateTime<Utc>,
) -> Result<Followed> {
    let app = &held.app;
    if !held.is_surely_ours().await? {
        return Err(WorkError::LeaseLost);
    }
    let mut events = pin!(events);
    let mut limits = Limits::new(task, settings, started_at);
    let mut stopped = app.db.wait(Topic::Stop(task.id.uuid()));
    let mut listeners = app.db.wait(Topic::Listener(task.id.uuid()));
    loop {
        let words_due = recorder.words_due(WORDS);
        tokio::select! {
            biased;
            () = held.lost.cancelled() => return Err(WorkError::LeaseLost),
            event = events.next() => match event {
                None => {
                    let whole = recorder.take_last().map_or_else(
                        || TurnEnd::Limit(Ending::error("The agent gave no answer.".to_owned())),
                        TurnEnd::Whole,
                    );
                    return Ok(Followed::Ended(whole));
                }
                Some(Err(TurnError::Provider(ProviderError::NotPermitted))) => {
                    return Err(WorkError::LeaseLost);
                }
                Some(Err(error)) => return Ok(Followed::Ended(TurnEnd::Limit(broken(&error)))),
                Some(Ok(event)) => {
                    limits.quiet_since = Instant::now();
                    limits.warned = false;
                    if recorder.note(event).await? {
                        if held.should_rest().await {
                            let between = Some(recorder.run);
                            held.lease.db.hand_over(&held.lease, between).await?;
                            return Ok(Followed::HandedOver);
                        }
                        // A model is asked next, or a tool called.
                        if !held.is_surely_ours().await? {
                            return Err(WorkError::LeaseLost);
                        }
                    }
                }
            },
            () = app.stop_turns.cancelled() => {
                recorder.write().await?;
                held.lease.db.hand_over(&held.lease, None).await?;
                return Ok(Followed::HandedOver);
            }
            _ = stopped.changed() => {
                if held.is_known_to_be_lost().await? {
                    return Err(WorkError::LeaseLost);
                }
            }
            _ = listeners.changed() => recorder.write_words().await,
            () = sleep_until(words_due.unwrap_or_else(Instant::now)), if words_due.is_some() => recorder.write_words().await,
            () = sleep_until(limits.next()) => {
                if let Some(ending) = overdue(held, task, &mut limits).await? {
                    return Ok(Followed::Ended(TurnEnd::Limit(ending)));
                }
            }
        }
    }
}

fn broken(error: &TurnError) -> Ending {
    match error {
        TurnError::TooManyCalls(_) => Ending::limit(EndReason::MaxTurns, error.to_string()),
        error => Ending {
            rest: rest_after(error),
            ..Ending::error(without_nul(&error.to_string()))
        },
    }
}

/// How long the provider asks for, within reason: what it refuses meanwhile would use the retries up.
fn rest_after(error: &TurnError) -> Duration {
    match error {
        TurnError::Provider(ProviderError::RateLimited { retry_after }) => {
            retry_after.unwrap_or_default().min(LONGEST_REST)
        }
        _ => Duration::ZERO,
    }
}

/// Whether the run must end now; or a warning that it has said nothing for long.
async fn overdue(held: &Held, task: &Task, limits: &mut Limits) -> Result<Option<Ending>> {
    let now = Instant::now();
    let elapsed = limits.quiet_since.elapsed().as_millis();
    if let Some((_, ending)) = limits.timeout.take_if(|(at, _)| *at <= now) {
        return Ok(Some(ending));
    }
    if now < limits.next() {
        return Ok(None);
    }
    let action = if limits.warned { "killed" } else { "warning" };
    let mut tx = held.lease.db.begin();
    tx.extend(&held.lease).await?;
    let told = json!({"taskId": task.id, "agentName": task.assign_to, "idleMs": elapsed, "action": action});
    tx.emit(crate::event::Event::new("agent:stale", told));
    tx.commit().await?;
    if limits.warned {
        let most = u64::try_from((limits.stale * 2).as_millis()).unwrap_or(u64::MAX);
        let sentence = format!("The run said nothing for {elapsed} ms.");
        return Ok(Some(Ending::timeout(most, sentence)));
    }
    limits.warned = true;
    Ok(None)
}

/// Whether an answer may be a question instead of work (contract 2.6.3, step 5).
fn may_be_question(answer: &str, tool_calls: usize) -> bool {
    let lines: Vec<&str> = answer
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let last = &lines[lines.len().saturating_sub(3)..];
    answer.len() <= 2_000 && tool_calls < 5 && last.iter().any(|line| line.contains('?'))
}

/// Ends a run: its last step, its result, and what follows, in one commit.
async fn conclude(
    held: &Held,
    task: Task,
    settings: &Settings,
    mut recorder: Recorder<'_>,
    ending: Ending,
    started_at: DateTime<Utc>,
) -> Result<Option<Task>> {
    let succeeded = ending.reason == EndReason::Finished;
    recorder.write().await?;
    let last = recorder.last_step();
    let mut patience = Patience::default();
    // What a mission's task leads to is read from what is held.
    let mut hold = match task.mission {
        None => Hold::Later,
        Some(_) => Hold::Now,
    };
    loop {
        let concluded = try_conclude(
            held,
            hold,
            &task,
            settings,
            &recorder,
            last.clone(),
            &ending,
            started_at,
            succeeded,
        )
        .await;
        match concluded {
            Err(WorkError::Stale) => hold = Hold::Now,
            Err(WorkError::Unavailable(error)) => patience.wait(held, error).await?,
            concluded => return concluded,
        }
    }
}

/// A database that is away for a moment must not cost an answer that was paid for.
#[derive(Debug, Default)]
pub(super) struct Patience(u32);

impl Patience {
    pub(super) async fn wait(&mut self, held: &Held, error: anyhow::Error) -> Result<()> {
        self.0 += 1;
        if self.0 > 150 || held.lost.is_cancelled() || held.app.stop_turns.is_cancelled() {
            return Err(WorkError::Unavailable(error));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        Ok(())
    }
}

#[expect(
    clippy::too_many_arguments,
    reason = "one commit holds all that a run came to"
)]
async fn try_conclude(
    held: &Held,
    hold: Hold,
    before: &Task,
    settings: &Settings,
    recorder: &Recorder<'_>,
    last: Option<NewStep>,
    ending: &Ending,
    started_at: DateTime<Utc>,
    succeeded: bool,
) -> Result<Option<Task>> {
    let db = &held.lease.db;
    let mut tx = db.begin();
    let mut task = match hold {
        Hold::Later => {
            tx.assume(&held.lease, before);
            before.clone().restored(before.status())
        }
        Hold::Now => tx.lock_task_under(&held.lease, before.id).await?,
    };
    if task.status() != Status::InProgress || task.run != before.run {
        return Err(WorkError::LeaseLost);
    }
    let status = if succeeded {
        RunStatus::Finished
    } else {
        RunStatus::Failed
    };
    tx.end_run(recorder.run, status, last);
    tell_end(&mut task, recorder, ending, started_at);
    if !succeeded {
        return fail(held, tx, task, settings, ending).await;
    }
    task.document.may_be_question = may_be_question(&recorder.answer, recorder.tool_calls)
        && task.document.question_rounds < settings.max_question_rounds;
    task.document.phase = Some(Phase::Review);
    task.go(Status::Review)
        .map_err(|error| WorkError::Defect(error.into()))?;
    let missing = missing_outcomes(&task);
    if !missing.is_empty() {
        let feedback = format!(
            "These required outcomes were not handed over with `register_outcome`: {}.",
            missing.join(", ")
        );
        let aftermath = after_failure(
            &mut tx,
            db,
            &mut task,
            settings,
            Failure::Review,
            feedback,
            pause(held),
        )
        .await?;
        return commit(held, tx, task, aftermath).await;
    }
    if task.document.expectations.is_empty() && !task.document.may_be_question {
        let aftermath = pass(held, &mut tx, &mut task, settings).await?;
        return commit(held, tx, task, aftermath).await;
    }
    lifecycle::save(&mut tx, db, &mut task).await?;
    tx.commit().await?;
    Ok(Some(task))
}

async fn fail(
    held: &Held,
    mut tx: ProjectTx,
    mut task: Task,
    settings: &Settings,
    ending: &Ending,
) -> Result<Option<Task>> {
    if let Some(timeout) = ending.most {
        let elapsed = task
            .document
            .result
            .as_ref()
            .map_or(0, |result| result.duration);
        task.tell(
            "task:timeout",
            json!({"elapsed": elapsed, "timeout": timeout}),
        );
    }
    let feedback = ending.sentence.clone();
    let backoff = pause(held);
    let aftermath = after_failure(
        &mut tx,
        &held.lease.db,
        &mut task,
        settings,
        Failure::Run,
        feedback,
        |retries| backoff(retries).max(ending.rest),
    )
    .await?;
    commit(held, tx, task, aftermath).await
}

fn tell_end(task: &mut Task, recorder: &Recorder<'_>, ending: &Ending, started_at: DateTime<Utc>) {
    let history = TaskResult::history(task.document.result.take());
    let result = TaskResult {
        exit_code: i32::from(ending.reason != EndReason::Finished),
        stdout: recorder.answer.clone(),
        stderr: ending.sentence.clone(),
        duration: (Utc::now() - started_at).num_milliseconds(),
        reason: ending.reason,
        cause: ending.cause.clone(),
        assessment: None,
        assessment_history: history,
    };
    task.document.outcomes.clone_from(&recorder.outcomes);
    task.document.defects = 0;
    lifecycle::tell_run_ended(task, recorder.run, &result);
    task.document.result = Some(result);
}

fn missing_outcomes(task: &Task) -> Vec<String> {
    let expected = task.document.expected_outcomes.iter().flatten();
    expected
        .filter(|expected| {
            expected.required
                && !task
                    .document
                    .outcomes
                    .iter()
                    .any(|outcome| outcome.label == expected.label)
        })
        .map(|expected| format!("\"{}\"", expected.label))
        .collect()
}

/// The calls of the last answer that have no result yet.
pub(super) fn open_calls(messages: &[Message]) -> Vec<ToolCall> {
    let Some(last) = messages
        .iter()
        .rposition(|message| matches!(message, Message::Assistant { .. }))
    else {
        return Vec::new();
    };
    let Message::Assistant { tool_calls, .. } = &messages[last] else {
        return Vec::new();
    };
    let mut open = tool_calls.clone();
    for message in &messages[last..] {
        if let Message::Tool { tool_call_id, .. } = message
            && let Some(answered) = open.iter().position(|call| call.id == *tool_call_id)
        {
            open.remove(answered);
        }
    }
    open
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_answer_that_ends_in_a_question_may_be_one() {
        let long = format!("{}?", "x".repeat(2_000));
        for (answer, tool_calls, expected) in [
            ("Which colour?", 0, true),
            ("Which colour?\n\n", 4, true),
            ("Which colour?", 5, false),
            ("Why?\na\nb\nc", 0, false),
            ("It is blue.", 0, false),
            (long.as_str(), 0, false),
            ("", 0, false),
        ] {
            assert_eq!(
                may_be_question(answer, tool_calls),
                expected,
                "{answer:.20}"
            );
        }
    }
}
