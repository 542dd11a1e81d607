//! A chat turn under way: pulled and recorded by a task of its own, heard by the response.
//!
//! The task outlives the response. A caller that leaves stops the model within moments, and what was
//! said and used is still recorded. The channel between the two is short, so a slow reader holds the
//! model up instead of filling memory.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{Stream, StreamExt};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::error::ApiError;
use super::openai::ChunkWriter;
use crate::agent::{self, Answer, Course, Step, ToolState, ToolUse, Toolbox, TurnError, TurnEvent};
use crate::app::{App, call_usage};
use crate::ids::{Id, Run, Session};
use crate::llm::{FinishReason, Message, ModelEvent, ModelRequest, Part, Provider, Usage};
use crate::store::{
    AgentRow, CallUsage, NewMessage, ProjectDb, Result as StoreResult, RunStatus, StoreError,
    TurnRecord,
};

/// How long a reader may take nothing before it counts as gone.
const STALL: Duration = Duration::from_secs(120);
/// How long a turn waits for a database that is away before its answer is given up, and how often it looks.
const AWAY: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_millis(250);
/// Pieces that wait for a slow reader.
const WAITING: usize = 64;
/// A piece of more bytes waits alone.
const LARGE: usize = 4096;

/// What a response hears of its turn. Ends with one `Finished` or `Failed`.
#[derive(Debug)]
pub enum Said {
    /// More of the answer.
    Delta(ModelEvent),
    /// A tool of the server comes further.
    Tool(ToolUse),
    /// What was said so far does not count.
    Restarted,
    /// The whole answer is stored.
    Finished {
        /// Why the model stopped.
        reason: FinishReason,
        /// What the turn used.
        usage: Usage,
    },
    /// There is no whole answer.
    Failed(ApiError),
}

impl Said {
    /// The bytes of what varies in it.
    fn size(&self) -> usize {
        match self {
            Self::Delta(event) => event.bytes(),
            Self::Tool(tool) => tool.call.arguments.len() + tool.state.result().map_or(0, str::len),
            Self::Restarted | Self::Finished { .. } | Self::Failed(_) => 0,
        }
    }
}

/// One turn: who talks to whom, and what is new in it.
#[derive(Debug)]
pub struct Turn {
    /// Where it is recorded.
    pub db: ProjectDb,
    /// The run's id.
    pub run: Id<Run>,
    /// The session it belongs to.
    pub session: Id<Session>,
    /// Whether the session is there already.
    pub continues: bool,
    /// The session's title if it is new.
    pub title: Option<String>,
    /// Who answers.
    pub agent: Arc<AgentRow>,
    /// The caller's own user.
    pub end_user: Option<String>,
    /// The caller's own labels.
    pub metadata: Value,
    /// What the caller said that is not stored yet.
    pub new_messages: Vec<Message>,
    /// The model as the agent names it.
    pub model_name: String,
    /// When the turn began.
    pub started_at: DateTime<Utc>,
}

/// What a turn's task knows of it so far.
#[derive(Debug, Default)]
struct Progress {
    /// What the model is saying.
    answer: Answer,
    steps: Vec<Step>,
    /// What is to be stored: the model's messages and the results of the server's tools.
    said: Vec<Message>,
    /// The server's tool calls that have not returned, by their ids.
    open: Vec<String>,
    /// Tokens of the prompt if the provider never gets to say.
    prompt_estimate: u64,
}

/// Starts a turn and returns its ear. Dropping the ear is leaving.
pub fn begin(
    app: &App,
    turn: Turn,
    provider: Arc<dyn Provider>,
    request: ModelRequest,
    course: Course,
    toolbox: Arc<dyn Toolbox>,
) -> mpsc::Receiver<Said> {
    let (sender, receiver) = mpsc::channel(WAITING);
    let stop = app.stop_turns.clone();
    let span = tracing::info_span!(
        "turn", run = %turn.run, project = %turn.db.project(), agent = turn.agent.name, model = turn.model_name
    );
    let turn = async move {
        let mut progress = Progress {
            prompt_estimate: estimate_prompt(&request),
            ..Progress::default()
        };
        let events = agent::turn(provider, request, course, toolbox);
        let outcome = tokio::select! {
            outcome = listen(events, &sender, &mut progress) => outcome,
            () = stop.cancelled() => Outcome::Failed(ApiError::Unavailable(anyhow::anyhow!("the server is stopping"))),
        };
        conclude(&turn, outcome, progress, &sender, &stop).await;
    };
    app.turns.spawn(turn.instrument(span));
    receiver
}

impl Progress {
    fn note(&mut self, tool: &ToolUse) {
        match &tool.state {
            ToolState::Preparing => self.open.push(tool.call.id.clone()),
            ToolState::Calling => {}
            ToolState::Completed(result) | ToolState::Failed(result) => {
                self.open.retain(|id| *id != tool.call.id);
                self.said.push(Message::Tool {
                    tool_call_id: tool.call.id.clone(),
                    content: result.clone(),
                    failed: matches!(tool.state, ToolState::Failed(_)),
                });
            }
        }
    }

    /// Whether the model is being asked, rather than done or waiting for a tool.
    fn waits_for_the_model(&self) -> bool {
        self.open.is_empty() && !matches!(self.said.last(), Some(Message::Assistant { .. }))
    }

    /// Everything that was said. Providers refuse a call without a result, so those of the server's tools
    /// that were cut off get one; an answer that was cut off keeps its text alone.
    fn into_messages(self) -> Vec<Message> {
        let mut messages = self.said;
        let called = messages.iter().rev().find_map(|message| match message {
            Message::Assistant { tool_calls, .. } => Some(tool_calls.clone()),
            _ => None,
        });
        for call in called.unwrap_or_default() {
            if self.open.contains(&call.id) {
                messages.push(Message::Tool {
                    tool_call_id: call.id,
                    content: "Interrupted: it may or may not have been done.".to_owned(),
                    failed: true,
                });
            }
        }
        if !self.answer.text().is_empty() {
            messages.push(Message::Assistant {
                content: Some(self.answer.text().to_owned()),
                tool_calls: Vec::new(),
                state: None,
            });
        }
        messages
    }
}

/// An answer as it is stored. Of one that was cut off the calls are left out: the last of them is half a call, and none was made.
fn kept(step: &Step) -> Message {
    match (&step.message, step.reason) {
        (
            Message::Assistant { content, .. },
            FinishReason::Length | FinishReason::ContentFilter,
        ) => Message::Assistant {
            content: Some(content.clone().unwrap_or_default()),
            tool_calls: Vec::new(),
            state: None,
        },
        (message, _) => message.clone(),
    }
}

enum Outcome {
    Finished,
    Left,
    Failed(ApiError),
}

async fn listen(
    events: impl Stream<Item = Result<TurnEvent, TurnError>>,
    sender: &mpsc::Sender<Said>,
    progress: &mut Progress,
) -> Outcome {
    let mut events = pin!(events);
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            // The model may be silent while its caller leaves.
            () = sender.closed() => return Outcome::Left,
        };
        let said = match event {
            None => return Outcome::Finished,
            Some(Err(error)) => return Outcome::Failed(error.into()),
            Some(Ok(TurnEvent::Delta(delta))) => {
                progress.answer.push(&delta);
                Said::Delta(delta)
            }
            Some(Ok(TurnEvent::Paragraph)) => Said::Delta(ModelEvent::Text("\n\n".to_owned())),
            Some(Ok(TurnEvent::Tool(tool))) => {
                progress.note(&tool);
                Said::Tool(tool)
            }
            // A chat's words are not taken back: its steps are asked for again only before the first.
            Some(Ok(TurnEvent::Broken | TurnEvent::Resting(_))) => continue,
            Some(Ok(TurnEvent::Restarted)) => {
                progress.said.pop();
                Said::Restarted
            }
            // A chat's course has no window: its history is bounded already.
            Some(Ok(TurnEvent::Compacted(_))) => continue,
            Some(Ok(TurnEvent::Step(step))) => {
                progress.answer = Answer::default();
                progress.said.push(kept(&step));
                progress.steps.push(step);
                continue;
            }
        };
        if !tell(sender, said).await {
            return Outcome::Left;
        }
    }
}

/// Hands a piece to the response; false when its reader is gone or takes nothing. A large piece waits until
/// all before it are taken, so that what waits for a slow reader is bounded in bytes too.
async fn tell(sender: &mpsc::Sender<Said>, said: Said) -> bool {
    if said.size() <= LARGE {
        return sender.send_timeout(said, STALL).await.is_ok();
    }
    match tokio::time::timeout(STALL, sender.reserve_many(WAITING)).await {
        Ok(Ok(mut places)) => {
            places
                .next()
                .expect("as many places as were asked for")
                .send(said);
            true
        }
        Ok(Err(_)) | Err(_) => false,
    }
}

/// Records the turn, then tells its end: an answer that was told as finished is stored.
async fn conclude(
    turn: &Turn,
    outcome: Outcome,
    progress: Progress,
    sender: &mpsc::Sender<Said>,
    stop: &CancellationToken,
) {
    let (status, interrupted) = match &outcome {
        Outcome::Finished => (RunStatus::Finished, false),
        Outcome::Left => (RunStatus::Interrupted, true),
        Outcome::Failed(_) => (RunStatus::Failed, true),
    };
    let calls = calls(&turn.model_name, &progress, status);
    let usage = progress
        .steps
        .iter()
        .fold(Usage::default(), |mut sum, step| {
            sum += step.usage;
            sum
        });
    let reason = progress
        .steps
        .last()
        .map_or(FinishReason::Stop, |step| step.reason);
    let said = progress.into_messages();
    // A failure before the first word leaves no conversation behind; a caller that left early does.
    let keep = !said.is_empty() || status == RunStatus::Interrupted;
    let messages = if keep {
        stored_messages(turn, said, interrupted)
    } else {
        Ok(Vec::new())
    };
    let recorded = match messages {
        Ok(messages) => record(turn, &messages, &calls, status, stop).await,
        Err(error) => Err(error),
    };
    let last = match (outcome, recorded) {
        (Outcome::Failed(error), Ok(())) => Said::Failed(error),
        (Outcome::Failed(error), Err(unrecorded)) => {
            tracing::error!("a failed turn could not be recorded: {unrecorded:?}");
            Said::Failed(error)
        }
        (Outcome::Finished, Ok(())) => Said::Finished { reason, usage },
        (Outcome::Finished, Err(error)) => Said::Failed(error),
        (Outcome::Left, Ok(())) => return,
        (Outcome::Left, Err(error)) => {
            tracing::error!("an interrupted turn could not be recorded: {error:?}");
            return;
        }
    };
    // Nobody listens any more: then nobody needs to know.
    let _ = sender.send(last).await;
}

async fn record(
    turn: &Turn,
    messages: &[NewMessage],
    calls: &[CallUsage],
    status: RunStatus,
    stop: &CancellationToken,
) -> Result<(), ApiError> {
    let ended_at = Utc::now();
    let mut lost = false;
    // What a model said was paid for: a database that is away for a moment does not cost it.
    let deadline = Instant::now() + AWAY;
    loop {
        let recorded = try_record(turn, messages, calls, status, ended_at);
        match turn.db.in_time(recorded).await {
            Err(error) if lost && error.is_recorded_turn() => return Ok(()),
            Err(StoreError::Unavailable(error))
                if Instant::now() < deadline && !stop.is_cancelled() =>
            {
                tracing::warn!("a turn cannot be recorded yet, trying again: {error}");
                lost = true;
                tokio::time::sleep(AGAIN).await;
            }
            Err(StoreError::NotFound) => {
                return Err(ApiError::missing("Session", &turn.session.to_string()));
            }
            recorded => return Ok(recorded?),
        }
    }
}

async fn try_record(
    turn: &Turn,
    messages: &[NewMessage],
    calls: &[CallUsage],
    status: RunStatus,
    ended_at: DateTime<Utc>,
) -> StoreResult<()> {
    let settings = turn.db.settings().await?;
    let record = TurnRecord {
        tells: settings.chat_events,
        run: turn.run,
        session: turn.session,
        continues: turn.continues,
        title: turn.title.as_deref(),
        agent: (turn.agent.id, &turn.agent.name),
        end_user: turn.end_user.as_deref(),
        metadata: &turn.metadata,
        messages,
        calls,
        status,
        started_at: turn.started_at,
        ended_at,
    };
    turn.db.record_turn(&record).await
}

fn stored_messages(
    turn: &Turn,
    said: Vec<Message>,
    interrupted: bool,
) -> Result<Vec<NewMessage>, ApiError> {
    let now = Utc::now();
    let last = said
        .iter()
        .rposition(|message| matches!(message, Message::Assistant { .. }));
    let asked = turn
        .new_messages
        .iter()
        .cloned()
        .map(|message| (message, false, turn.started_at));
    asked
        .chain(
            said.into_iter()
                .enumerate()
                .map(|(index, message)| (message, interrupted && Some(index) == last, now)),
        )
        .map(|(message, interrupted, created_at)| {
            let mut body =
                serde_json::to_value(message).map_err(|error| ApiError::Internal(error.into()))?;
            replace_nul(&mut body);
            Ok(NewMessage {
                body,
                interrupted,
                created_at,
            })
        })
        .collect()
}

/// Postgres stores no NUL character; a model that says one must not cost the turn.
fn replace_nul(value: &mut Value) {
    match value {
        Value::String(text) if text.contains('\0') => *text = text.replace('\0', "\u{fffd}"),
        Value::Array(items) => items.iter_mut().for_each(replace_nul),
        Value::Object(members) => members.values_mut().for_each(replace_nul),
        _ => {}
    }
}

fn calls(model: &str, progress: &Progress, status: RunStatus) -> Vec<CallUsage> {
    let told = progress.steps.iter().map(|step| step.usage);
    // A call that was cut off never told what it used. One whose caller left was paid for,
    // even if the answer, asked for in one piece, was never seen.
    let left = status == RunStatus::Interrupted && progress.waits_for_the_model();
    let cut_off = !progress.answer.is_empty() || left;
    let cut = cut_off.then(|| Usage {
        prompt_tokens: progress.prompt_estimate,
        completion_tokens: estimate(progress.answer.text().len()),
        estimated: true,
        ..Usage::default()
    });
    told.chain(cut)
        .map(|usage| call_usage(model, usage))
        .collect()
}

/// One token per four bytes, the rule of thumb that contract 2.1.6 names.
fn estimate(bytes: usize) -> u64 {
    (bytes as u64).div_ceil(4)
}

fn estimate_prompt(request: &ModelRequest) -> u64 {
    let said: usize = request
        .messages
        .iter()
        .map(|message| match message {
            Message::System { content } | Message::Tool { content, .. } => content.len(),
            Message::Assistant { content, .. } => content.as_ref().map_or(0, String::len),
            Message::User { content } => content
                .iter()
                .map(|part| match part {
                    Part::Text { text } => text.len(),
                    Part::Image { .. } => 0,
                })
                .sum(),
        })
        .sum();
    estimate(said + request.system.as_ref().map_or(0, String::len))
}

/// What is answered when a turn's task ended without a word, which only a panic in it does.
pub fn gone() -> ApiError {
    ApiError::Internal(anyhow::anyhow!("the turn ended without an outcome"))
}

/// The answer as server-sent events: what has been said since the last write goes out in one piece.
pub fn frames(
    writer: ChunkWriter,
    first: Option<Said>,
    mut said: mpsc::Receiver<Said>,
    keep_alive: Duration,
) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
    // What is logged of the stream's end is logged of its request.
    let span = tracing::Span::current();
    async_stream::stream! {
        let mut text = String::new();
        let mut begun = false;
        let mut batch: Vec<Said> = first.into_iter().collect();
        loop {
            for said in batch.drain(..) {
                if !begun && matches!(said, Said::Delta(_) | Said::Tool(_) | Said::Finished { .. }) {
                    begun = true;
                    writer.role(&mut text, matches!(said, Said::Delta(ModelEvent::ToolCallStarted { .. })));
                }
                match said {
                    Said::Delta(event) => writer.delta(&mut text, &event),
                    Said::Tool(tool) => writer.tool(&mut text, &tool),
                    // Never happens: a stream is not repaired, for it cannot be taken back.
                    Said::Restarted => {}
                    Said::Finished { reason, usage } => {
                        writer.finish(&mut text, reason, usage);
                        yield Ok(Bytes::from(text));
                        return;
                    }
                    Said::Failed(error) => {
                        ChunkWriter::fail(&mut text, &span.in_scope(|| error.stream_frame()));
                        yield Ok(Bytes::from(text));
                        return;
                    }
                }
            }
            if !text.is_empty() {
                yield Ok(Bytes::from(std::mem::take(&mut text)));
            }
            match tokio::time::timeout(keep_alive, said.recv_many(&mut batch, WAITING)).await {
                Ok(0) => {
                    ChunkWriter::fail(&mut text, &span.in_scope(|| gone().stream_frame()));
                    yield Ok(Bytes::from(text));
                    return;
                }
                Ok(_) => {}
                Err(_silent) => text.push_str(": keep-alive\n\n"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn stream_of(said: Vec<Said>) -> String {
        let (sender, receiver) = mpsc::channel(WAITING);
        for said in said {
            sender.send(said).await.unwrap();
        }
        drop(sender);
        let writer = ChunkWriter::new("chatcmpl-1", 7, "a", "fp_1", false);
        let pieces = frames(writer, None, receiver, Duration::from_secs(15));
        let bytes: Vec<u8> = pieces
            .map(Result::unwrap)
            .collect::<Vec<Bytes>>()
            .await
            .concat();
        String::from_utf8(bytes).unwrap()
    }

    #[tokio::test]
    async fn a_turn_that_panics_ends_its_stream_in_the_error_frame() {
        for (said, frames) in [
            (vec![], 2),
            (vec![Said::Delta(ModelEvent::Text("so far".to_owned()))], 4),
        ] {
            let text = stream_of(said).await;
            let found: Vec<&str> = text.trim_end().split("\n\n").collect();
            assert_eq!(found.len(), frames, "{text}");
            assert_eq!(found[frames - 1], "data: [DONE]");
            let error: Value =
                serde_json::from_str(found[frames - 2].strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(error["error"]["code"], "internal_error");
        }
    }

    #[tokio::test]
    async fn an_answer_without_a_word_is_a_whole_stream_all_the_same() {
        let (reason, usage) = (FinishReason::Stop, Usage::default());
        let text = stream_of(vec![Said::Finished { reason, usage }]).await;
        assert!(text.contains(r#""delta":{"role":"assistant","content":""}"#));
        assert!(text.contains(r#""finish_reason":"stop""#) && text.ends_with("data: [DONE]\n\n"));
    }

    #[tokio::test]
    async fn a_large_piece_waits_until_those_before_it_are_taken() {
        use futures::FutureExt;
        let (sender, mut receiver) = mpsc::channel(WAITING);
        let large = || Said::Delta(ModelEvent::Text("x".repeat(LARGE + 1)));
        let small = || Said::Delta(ModelEvent::Text("x".to_owned()));
        assert_eq!(tell(&sender, large()).now_or_never(), Some(true));
        assert_eq!(tell(&sender, small()).now_or_never(), Some(true));
        assert_eq!(tell(&sender, large()).now_or_never(), None);
        receiver.recv().await.unwrap();
        assert_eq!(tell(&sender, large()).now_or_never(), None);
        receiver.recv().await.unwrap();
        assert_eq!(tell(&sender, large()).now_or_never(), Some(true));
        drop(receiver);
        assert_eq!(tell(&sender, large()).now_or_never(), Some(false));
    }
}
