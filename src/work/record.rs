//! The record of a run: what is written as it goes on, and how a successor reads it.

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::conclusion::Patience;
use super::execution::open_calls;
use super::{Held, Result, WorkError};
use crate::agent::{Compaction, Step, ToolState, ToolUse, Toolbox, TurnEvent};
use crate::app::call_usage;
use crate::event::Event;
use crate::ids::{self, Id, Run};
use crate::llm::{Message, ModelEvent, ToolCall, Usage};
use crate::store::{CallUsage, NewStep, RunRow, StepKind, StoreError, storable};
use crate::task::{Outcome, Task};
use crate::tools::{outcome_of, registers_outcome};

/// The most steps that one commit records.
const KEPT: usize = 16;

/// Writes a run down, step by step.
#[derive(Debug)]
pub(super) struct Recorder<'a> {
    held: &'a Held,
    task: Id<ids::Task>,
    agent: String,
    /// The run.
    pub(super) run: Id<Run>,
    model: String,
    /// The number of the next step.
    number: i32,
    /// Model calls so far.
    pub(super) turns: u32,
    /// Tool calls so far.
    pub(super) tool_calls: usize,
    /// The text of the last answer.
    pub(super) answer: String,
    /// What was handed over.
    pub(super) outcomes: Vec<Outcome>,
    /// What can be called, where an agent is at work.
    toolbox: Option<Arc<dyn Toolbox>>,
    /// Calls of the last answer that have no result.
    waiting: Vec<ToolCall>,
    /// Steps that are recorded with the next one, and what is told of them.
    kept: Vec<NewStep>,
    told: Vec<Event>,
    /// The step that ends the run: it is recorded with the end.
    last: Option<Step>,
    /// What the model is saying.
    said: String,
    /// How much of it listeners have, and since when.
    written: usize,
    written_at: Option<Instant>,
}

impl<'a> Recorder<'a> {
    pub(super) fn new(held: &'a Held, task: &Task, run: Id<Run>) -> Self {
        Self {
            held,
            task: task.id,
            agent: task.assign_to.clone(),
            run,
            model: String::new(),
            number: 0,
            turns: 0,
            tool_calls: 0,
            answer: String::new(),
            outcomes: Vec::new(),
            toolbox: None,
            waiting: Vec::new(),
            kept: Vec::new(),
            told: Vec::new(),
            last: None,
            said: String::new(),
            written: 0,
            written_at: None,
        }
    }

    /// Says what the agent works with.
    pub(super) fn work_with(&mut self, model: &str, toolbox: Arc<dyn Toolbox>) {
        model.clone_into(&mut self.model);
        self.toolbox = Some(toolbox);
    }

    /// Takes in an event of the turn; true when a step is on record because of it.
    pub(super) async fn note(&mut self, event: TurnEvent) -> Result<bool> {
        match event {
            TurnEvent::Delta(ModelEvent::Text(text)) => {
                self.said.push_str(&text);
                Ok(false)
            }
            TurnEvent::Broken => {
                self.said.clear();
                self.written = 0;
                Ok(false)
            }
            TurnEvent::Delta(_)
            | TurnEvent::Paragraph
            | TurnEvent::Resting(_)
            | TurnEvent::Restarted => Ok(false),
            TurnEvent::Step(step) => self.note_step(step).await,
            TurnEvent::Tool(tool) => self.note_tool(tool).await,
            TurnEvent::Compacted(compaction) => {
                self.note_compaction(&compaction).await.map(|()| true)
            }
        }
    }

    async fn note_step(&mut self, mut step: Step) -> Result<bool> {
        clean(&mut step.message);
        self.turns += 1;
        self.said.clear();
        self.written = 0;
        self.answer = step.message.text().unwrap_or_default().to_owned();
        if step.first_call().is_none() {
            self.last = Some(step);
            return Ok(false);
        }
        if let Message::Assistant { tool_calls, .. } = &step.message {
            self.waiting.clone_from(tool_calls);
        }
        let body = model_body(&step)?;
        let usage = self.usage(step.usage);
        self.keep(StepKind::Model, body, Some(usage));
        self.write_before_next().await
    }

    async fn note_tool(&mut self, tool: ToolUse) -> Result<bool> {
        let (content, failed) = match tool.state {
            ToolState::Preparing | ToolState::Calling => return Ok(false),
            ToolState::Completed(content) => (content, false),
            ToolState::Failed(content) => (content, true),
        };
        let tool = ToolCall {
            arguments: without_nul(&tool.call.arguments),
            ..tool.call
        };
        self.tool_calls += 1;
        // Nothing keeps a provider from giving two calls of an answer one id.
        if let Some(place) = self.waiting.iter().position(|call| call.id == tool.id) {
            self.waiting.remove(place);
        }
        let mut body = tool_body(&tool, &content, failed);
        if registers_outcome(&tool)
            && !failed
            && let Ok(outcome) = outcome_of(&tool, Utc::now())
        {
            body["outcome"] = json!(outcome);
            self.outcomes.push(outcome);
        }
        self.keep(StepKind::Tool, body, None);
        self.write_before_next().await
    }

    async fn note_compaction(&mut self, compaction: &Compaction) -> Result<()> {
        let body = json!({
            "messages": compaction.messages, "cleared": compaction.cleared, "summary": compaction.summary,
            "tokensBefore": compaction.tokens_before, "tokensAfter": compaction.tokens_after,
        });
        let usage = compaction.usage.map(|usage| self.usage(usage));
        self.keep(StepKind::Compaction, body, usage);
        self.write().await
    }

    fn usage(&self, usage: Usage) -> CallUsage {
        call_usage(&self.model, usage)
    }

    /// Keeps a step to be recorded, with the intent to begin the next call.
    fn keep(&mut self, kind: StepKind, mut body: Value, usage: Option<CallUsage>) {
        storable(&mut body);
        let next = self.waiting.first();
        self.told.extend(next.map(|call| {
            let told = json!({"taskId": self.task, "agentName": self.agent, "tool": call.name});
            Event::new("agent:activity", told)
        }));
        self.kept.push(NewStep {
            number: self.number,
            kind,
            body,
            usage,
            under_way: next.map(|call| call.id.clone()),
        });
        self.number += 1;
    }

    /// Records what is kept before something happens that could be noticed, and says whether it did. A result that is at hand is no such thing: it
    /// goes into the commit of the message that asks for it.
    async fn write_before_next(&mut self) -> Result<bool> {
        let next = self.waiting.first().zip(self.toolbox.as_ref());
        let at_hand = next.is_some_and(|(call, toolbox)| toolbox.is_at_hand(call));
        if at_hand && self.kept.len() < KEPT {
            return Ok(false);
        }
        self.write().await?;
        Ok(true)
    }

    /// Records what is kept. A database that is away is waited for.
    pub(super) async fn write(&mut self) -> Result<()> {
        if self.kept.is_empty() {
            return Ok(());
        }
        let (steps, told) = (
            std::mem::take(&mut self.kept),
            std::mem::take(&mut self.told),
        );
        record(self.held, self.run, &steps, &told).await
    }

    /// The step that ended the turn.
    pub(super) fn last(&self) -> Option<&Step> {
        self.last.as_ref()
    }

    /// The step that ended the turn, as it is recorded with the run's end.
    pub(super) fn last_step(&self) -> Option<NewStep> {
        let step = self.last.as_ref()?;
        let mut body = model_body(step).ok()?;
        storable(&mut body);
        Some(NewStep {
            number: self.number,
            kind: StepKind::Model,
            body,
            usage: Some(self.usage(step.usage)),
            under_way: None,
        })
    }

    /// When the next words are due for whoever listens.
    pub(super) fn words_due(&self, pause: Duration) -> Option<Instant> {
        let new = self.said.len() > self.written && self.held.app.db.is_followed(self.task.uuid());
        new.then(|| self.written_at.map_or_else(Instant::now, |at| at + pause))
    }

    /// Writes the words down for whoever listens. They are worth nothing once the step is recorded, so a failure is
    /// not worth more than a line.
    pub(super) async fn write_words(&mut self) {
        if self.said.len() > self.written {
            let text = self.said.replace('\0', "\u{fffd}");
            let db = &self.held.lease.db;
            let written = db.write_words(self.task, self.run, self.number, &text);
            if let Err(error) = db.in_time(written).await {
                tracing::debug!("a task's words are not shown as they come: {error}");
            }
            self.written = self.said.len();
            self.written_at = Some(Instant::now());
        }
    }
}

/// Records steps of a run that a job's lease is about. A database that is away is waited for.
pub(super) async fn record(
    held: &Held,
    run: Id<Run>,
    steps: &[NewStep],
    events: &[Event],
) -> Result<()> {
    let Held { lease, proof, .. } = held;
    let mut patience = Patience::default();
    let mut lost = false;
    loop {
        let asked = Instant::now();
        let recorded = lease.db.record_steps(lease, run, steps, events.to_vec());
        match lease.db.in_time(recorded).await {
            Ok(()) => {
                proof.is_from(asked);
                return Ok(());
            }
            // They were recorded, and only the answer got lost.
            Err(error) if lost && error.is_recorded_step() => return Ok(()),
            Err(StoreError::Unavailable(error)) => {
                lost = true;
                patience.wait(held, error.into()).await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Postgres stores no NUL character, and what a model says ends up in many places. Arguments are JSON text.
fn clean(message: &mut Message) {
    if let Message::Assistant {
        content,
        tool_calls,
        ..
    } = message
    {
        if let Some(content) = content {
            *content = content.replace('\0', "\u{fffd}");
        }
        for call in tool_calls {
            call.arguments = without_nul(&call.arguments);
        }
    }
}

/// JSON text that stands for no NUL character.
pub(super) fn without_nul(json: &str) -> String {
    json.replace('\0', "\u{fffd}").replace("\\u0000", "\\ufffd")
}

fn model_body(step: &Step) -> Result<Value> {
    let message =
        serde_json::to_value(&step.message).map_err(|error| WorkError::Defect(error.into()))?;
    Ok(json!({"message": message, "finishReason": step.reason, "usage": step.usage}))
}

fn tool_body(call: &ToolCall, content: &str, failed: bool) -> Value {
    json!({
        "toolCallId": call.id, "name": call.name, "arguments": call.arguments, "content": content,
        "state": if failed { "error" } else { "completed" },
    })
}

/// Reads what a run has on record: the conversation so far, and the calls that are still to be made. A call that
/// may have been made already and cannot be repeated without harm is answered as what it is: unknown.
pub(super) async fn replay(
    recorder: &mut Recorder<'_>,
    run: &RunRow,
    first: Message,
    toolbox: &dyn Toolbox,
) -> Result<(Vec<Message>, Vec<ToolCall>)> {
    let db = &recorder.held.lease.db;
    let steps = db.all_steps(run.id).await?;
    let mut messages = vec![first];
    let unreadable = |error: serde_json::Error| {
        WorkError::Defect(anyhow::Error::new(error).context("a step cannot be read"))
    };
    let mut under_way = None;
    for step in steps {
        recorder.number = step.number + 1;
        under_way = step.under_way;
        match step.kind {
            StepKind::Model => {
                recorder.turns += 1;
                messages.push(
                    serde_json::from_value(step.body["message"].clone()).map_err(unreadable)?,
                );
            }
            StepKind::Tool => {
                recorder.tool_calls += 1;
                if let Some(outcome) = step.body.get("outcome") {
                    recorder
                        .outcomes
                        .push(serde_json::from_value(outcome.clone()).map_err(unreadable)?);
                }
                messages.push(Message::Tool {
                    tool_call_id: step.body["toolCallId"]
                        .as_str()
                        .unwrap_or_default()
                        .to_owned(),
                    content: step.body["content"].as_str().unwrap_or_default().to_owned(),
                    failed: step.body["state"] == "error",
                });
            }
            StepKind::Compaction => {
                messages =
                    serde_json::from_value(step.body["messages"].clone()).map_err(unreadable)?;
            }
            StepKind::Review => {}
        }
    }
    let mut open = open_calls(&messages);
    recorder.waiting.clone_from(&open);
    let unknown = open
        .iter()
        .position(|call| Some(&call.id) == under_way.as_ref());
    if unknown.is_none()
        && let Some(next) = open.first().filter(|call| !toolbox.is_repeatable(call))
    {
        // Whoever handed the run over took back that it may have begun; now it may begin.
        db.mark_under_way(&recorder.held.lease, run.id, &next.id)
            .await?;
    }
    if let Some(call) = unknown
        .filter(|index| !toolbox.is_repeatable(&open[*index]))
        .map(|index| open.remove(index))
    {
        let content =
            "Interrupted: it may or may not have been done. Find out before you do it again."
                .to_owned();
        messages.push(Message::Tool {
            tool_call_id: call.id.clone(),
            content: content.clone(),
            failed: true,
        });
        let state = ToolState::Failed(content);
        recorder
            .note(TurnEvent::Tool(ToolUse { call, state }))
            .await?;
    }
    Ok((messages, open))
}
