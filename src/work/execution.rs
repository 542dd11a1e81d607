//! A run of a task: the agent loop of a chat turn, with every finished step on record before anything happens that could be noticed.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};

use super::conclusion::{Conclusion, Ending};
use super::record::{Recorder, replay};
use super::surroundings::surroundings;
use super::task::{agent_with_model, pause};
use super::{Held, Result, WorkError};
use crate::agent::{
    self, Again, Course, OutputFormat, Persona, Repair, Toolbox, TurnError, TurnEvent,
    system_prompt,
};
use crate::llm::{Effort, Message, ModelRequest, Part, ProviderError, ToolCall, context_window};
use crate::store::{AgentRow, RunRow, Topic};
use crate::task::{EndReason, Settings, Task};
use crate::tools::ServerTools;

/// Turns of an agent that names no limit (contract 2.4.1).
const MAX_TURNS: u32 = 150;
/// Words are written down for listeners this often.
const WORDS: Duration = Duration::from_millis(100);

/// Runs a task's agent from the last recorded step to its end. `begun` is when the run began, if nothing of it is on record.
pub(super) async fn execute(
    held: &Held,
    task: Task,
    begun: Option<DateTime<Utc>>,
) -> Result<Option<Task>> {
    let db = &held.lease.db;
    let settings = db.settings().await?;
    let no_run = || WorkError::Defect(anyhow::anyhow!("a task in progress has no run"));
    let run = task.run.ok_or_else(no_run)?;
    let (row, started_at) = match begun {
        Some(begun) => (None, begun),
        None => {
            let row = db.run(run).await?;
            let started_at = row.started_at;
            (Some(row), started_at)
        }
    };
    let mut conclusion = Conclusion {
        held,
        settings: &settings,
        recorder: Recorder::new(held, &task, run),
        ending: Ending::error(String::new()),
        started_at,
    };
    let (agent, model) = match agent_with_model(held, &task, &settings).await? {
        Ok(found) => found,
        Err(cause) => {
            conclusion.ending = Ending::error(cause);
            return conclusion.record(task).await;
        }
    };
    let toolbox = toolbox(held, &task, &agent);
    conclusion.recorder.work_with(&model.name, toolbox.clone());
    let (messages, open) = said(&mut conclusion.recorder, &task, row.as_ref(), &*toolbox).await?;
    let request = ModelRequest {
        model: model.id,
        system: Some(prompt(held, &task, &agent).await?),
        messages,
        reasoning: effort(&agent),
        permit: Some(held.proof.clone()),
        ..ModelRequest::default()
    };
    let most = most_turns(&agent);
    let window = agent.number("contextWindow");
    let course = Course {
        format: OutputFormat::Text,
        repair: Repair::Never,
        calls: most.saturating_sub(conclusion.recorder.turns),
        open,
        window: Some(window.unwrap_or_else(|| context_window(&model.name))),
        again: again(held),
    };
    let events = agent::turn(model.provider, request, course, toolbox);
    let recorder = &mut conclusion.recorder;
    match follow(held, recorder, &task, &settings, events, started_at).await? {
        Followed::Ended(ending) => {
            conclusion.ending = ending.unless_empty(&recorder.answer, recorder.tool_calls);
        }
        Followed::HandedOver => return Ok(None),
    }
    if conclusion.ending.reason == EndReason::MaxTurns {
        conclusion.ending.sentence =
            format!("The agent used all of its {most} turns and gave no answer.");
    }
    conclusion.record(task).await
}

fn effort(agent: &AgentRow) -> Option<Effort> {
    let word = agent.definition.get("reasoning")?;
    serde_json::from_value(word.clone()).ok()
}

/// How a step is asked for again: after pauses like those between attempts, which would do all of its work anew.
pub(super) fn again(held: &Held) -> Again {
    Again {
        pauses: (0..3).map(|tries| pause(held)(tries)).collect(),
        takes_back: true,
    }
}

fn most_turns(agent: &AgentRow) -> u32 {
    let most = agent.number("maxTurns");
    most.map_or(MAX_TURNS, |most| u32::try_from(most).unwrap_or(u32::MAX))
}

fn toolbox(held: &Held, task: &Task, agent: &AgentRow) -> Arc<dyn Toolbox> {
    let (db, fetcher) = (held.lease.db.clone(), held.app.fetcher.clone());
    let expected = task.document.expected_outcomes.clone().unwrap_or_default();
    Arc::new(ServerTools::in_task(db, agent, fetcher, expected))
}

/// The conversation as far as it is on record, and the calls of its last answer that have no result.
async fn said(
    recorder: &mut Recorder<'_>,
    task: &Task,
    row: Option<&RunRow>,
    toolbox: &dyn Toolbox,
) -> Result<(Vec<Message>, Vec<ToolCall>)> {
    // Whoever takes a run over says what was said, whatever the description is by now.
    let before = row.and_then(|row| row.said.clone());
    let text = before.unwrap_or_else(|| task.instructions());
    let content = vec![Part::Text { text }];
    let first = Message::User { content };
    match row {
        Some(row) => replay(recorder, row, first, toolbox).await,
        None => Ok((vec![first], Vec::new())),
    }
}

/// The instructions before the task's description.
async fn prompt(held: &Held, task: &Task, agent: &AgentRow) -> Result<String> {
    let db = &held.lease.db;
    // A task that this one needed may have written to them, a moment ago and elsewhere.
    let memories = db.memories_now(&agent.name).await?;
    let around = surroundings(db, task).await?;
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
    let earlier = task.document.result.as_ref().map(|result| &result.stdout);
    if let Some(said) = earlier.filter(|said| task.document.feedback.is_some() && !said.is_empty())
    {
        context.push(format!(
            "The result of the earlier attempt was:\n<earlier-result>\n{said}\n</earlier-result>"
        ));
    }
    Ok(system_prompt(persona, &context))
}

/// How far a turn was followed.
enum Followed {
    /// To its end.
    Ended(Ending),
    /// Until another process was to go on with it.
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

/// What comes while a turn is followed.
enum Heard {
    Event(Option<std::result::Result<TurnEvent, TurnError>>),
    /// A limit is to be looked at.
    Time,
    /// The job is another's.
    Lost,
    /// The server stops.
    Stopping,
    /// The run is to stop, perhaps.
    Stopped,
    /// Someone listens, or is owed words.
    Listener,
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
        let heard = held.pulse.away(async {
            tokio::select! {
                biased;
                () = held.lost.cancelled() => Heard::Lost,
                // Before what is said: a model that never stops must not keep the time from being looked at.
                () = sleep_until(limits.next()) => Heard::Time,
                event = events.next() => Heard::Event(event),
                () = app.stop_turns.cancelled() => Heard::Stopping,
                _ = stopped.changed() => Heard::Stopped,
                _ = listeners.changed() => Heard::Listener,
                () = sleep_until(words_due.unwrap_or_else(Instant::now)), if words_due.is_some() => Heard::Listener,
            }
        });
        match heard.await {
            Heard::Lost => return Err(WorkError::LeaseLost),
            Heard::Time => {
                if let Some(ending) = overdue(held, task, &mut limits).await? {
                    return Ok(Followed::Ended(ending));
                }
            }
            Heard::Event(event) => match event {
                None => {
                    let nothing = || Ending::error("The agent gave no answer.".to_owned());
                    let ending = recorder.last().map_or_else(nothing, Ending::of);
                    return Ok(Followed::Ended(ending));
                }
                Some(Err(TurnError::Provider(ProviderError::NotPermitted))) => {
                    return Err(WorkError::LeaseLost);
                }
                Some(Err(error)) => {
                    tracing::warn!(
                        project = %held.lease.db.project(), task = %task.id, run = %recorder.run, agent = task.assign_to,
                        "a task's run is broken off: {}", error.told()
                    );
                    return Ok(Followed::Ended(Ending::broken(&error)));
                }
                Some(Ok(event)) => {
                    // A rest that a provider is given is no silence.
                    let rest = match &event {
                        TurnEvent::Resting(rest) => *rest,
                        _ => Duration::ZERO,
                    };
                    limits.quiet_since = Instant::now() + rest;
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
            Heard::Stopping => {
                recorder.write().await?;
                held.lease.db.hand_over(&held.lease, None).await?;
                return Ok(Followed::HandedOver);
            }
            Heard::Stopped => {
                if held.is_known_to_be_lost().await? {
                    return Err(WorkError::LeaseLost);
                }
            }
            Heard::Listener => recorder.write_words().await,
        }
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
