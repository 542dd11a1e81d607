//! What an agent does: prompt, model, tools, model, answer.
//!
//! [`turn`] is pulled by its caller and writes nothing; it knows neither HTTP nor who pulls.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};

use crate::llm::{
    FinishReason, Message, ModelEvent, ModelRequest, Provider, ProviderError, ProviderState,
    ToolCall, Usage,
};

mod compact;
mod format;
mod prompt;
mod step;
mod toolbox;

pub use compact::Compaction;
pub use format::{FormatError, OutputFormat};
pub use prompt::{Persona, system_prompt};
pub use step::Again;
use step::{Stepping, ask_for_step};
pub use toolbox::{ToolState, ToolUse, Toolbox};

/// The most calls of the model in one turn of a chat (contract 2.1.6).
pub const MODEL_CALLS: u32 = 20;

/// What happens in a turn, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum TurnEvent {
    /// More of the answer, as the model says it. Never [`ModelEvent::State`] or [`ModelEvent::Finished`], and of tool calls only the
    /// caller's, counted from 0 among themselves.
    Delta(ModelEvent),
    /// The words that come next follow others, said before a tool was called: they are a paragraph of their own.
    Paragraph,
    /// A tool of the server comes further.
    Tool(ToolUse),
    /// The answer so far does not count: the model is asked once more.
    Restarted,
    /// What was said of the step under way does not count: its provider has broken off, and is asked again.
    Broken,
    /// It is asked for again after so long.
    Resting(Duration),
    /// One call of the model has ended. The server's tools that it calls run after this.
    Step(Step),
    /// The conversation was shortened so that it fits the model.
    Compacted(Compaction),
}

/// What one call of the model came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Its answer, always [`Message::Assistant`].
    pub message: Message,
    /// Why it stopped.
    pub reason: FinishReason,
    /// What it used.
    pub usage: Usage,
}

/// Why a turn ended without an answer.
#[derive(Debug, thiserror::Error)]
pub enum TurnError {
    /// The provider failed.
    #[error(transparent)]
    Provider(#[from] ProviderError),
    /// The answer is not what `response_format` asks for.
    #[error("the model's answer does not fit `response_format`: {0}")]
    Format(#[from] FormatError),
    /// The model called tools as often as it may and gave no answer.
    #[error("the agent called tools {0} times over without an answer")]
    TooManyCalls(u32),
}

impl TurnError {
    /// What happened, for whoever waits for the turn.
    pub fn told(&self) -> String {
        match self {
            Self::Provider(error) => error.told(),
            error => error.to_string(),
        }
    }
}

/// What may be done about an answer of the wrong format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: what was streamed cannot be taken back.
    Never,
    /// The model is told what is wrong and asked once more.
    Once,
}

/// How a turn is to go.
#[derive(Debug, Clone)]
pub struct Course {
    /// What its answer must be.
    pub format: OutputFormat,
    /// What may be done about an answer that is not.
    pub repair: Repair,
    /// The most calls of the model.
    pub calls: u32,
    /// Calls of the server's tools, at the end of the conversation, that have no result yet: where a turn
    /// that was cut off goes on.
    pub open: Vec<ToolCall>,
    /// How many tokens the model can read; the conversation is shortened before it has more. `None` leaves it alone.
    pub window: Option<u64>,
    /// What is done about a provider that breaks off.
    pub again: Again,
}

impl Course {
    /// A turn of a chat.
    pub fn chat(format: OutputFormat, repair: Repair) -> Self {
        Self {
            format,
            repair,
            calls: MODEL_CALLS,
            open: Vec::new(),
            window: None,
            again: Again {
                pauses: vec![Duration::from_millis(250)],
                takes_back: false,
            },
        }
    }
}

/// One turn of an agent: asks the model, runs the server's tools that it calls, asks again, checks the
/// answer's format, and ends with an answer or with calls of the caller's tools.
///
/// `request.tools` are the caller's; the toolbox's are added. Nothing happens between two pulls, so what a
/// caller records before it pulls on is on record before it happens. Dropping the stream stops the model.
pub fn turn(
    provider: Arc<dyn Provider>,
    mut request: ModelRequest,
    course: Course,
    toolbox: Arc<dyn Toolbox>,
) -> impl Stream<Item = Result<TurnEvent, TurnError>> + Send {
    async_stream::try_stream! {
        let Course { format, repair, calls: most, mut open, window, again } = course;
        let callers: HashSet<String> = request.tools.iter().map(|tool| tool.name.clone()).collect();
        request.tools.extend_from_slice(toolbox.tools());
        let enforced = provider.supports_format(&request);
        format.prepare(&mut request, enforced);
        let mut repairs_left = u8::from(repair == Repair::Once);
        let mut compactor = compact::Compactor::new(window);
        // Whether the next words follow others, said before a tool was called.
        let mut follows = false;
        let mut asked = 0;
        'turn: loop {
            let calls = if open.is_empty() {
                if asked == most {
                    Err(TurnError::TooManyCalls(most))?;
                }
                asked += 1;
                while let Some(compaction) = compactor.shorten(&*provider, &mut request).await? {
                    yield TurnEvent::Compacted(compaction);
                }
                let mut paragraph = false;
                let mut stepping = Box::pin(ask_for_step(&*provider, &request, &callers, &format, &again, follows));
                let (step, mut words) = loop {
                    match stepping.next().await {
                        Some(Ok(Stepping::Begun)) => compactor.fits(),
                        Some(Ok(Stepping::Event(event))) => {
                            paragraph = match event {
                                TurnEvent::Paragraph => true,
                                TurnEvent::Broken => false,
                                _ => paragraph,
                            };
                            yield event;
                        }
                        Some(Ok(Stepping::Ended(step, words))) => break (step, words),
                        Some(Err(ProviderError::ContextTooLong)) if compactor.insist(&request) => continue 'turn,
                        Some(Err(error)) => Err(error)?,
                        None => Err(ProviderError::Protocol("the step ended without an end".to_owned()))?,
                    }
                };
                drop(stepping);
                follows &= !paragraph;
                let checked = format.check(&step);
                let message = step.message.clone();
                let calls = step.calls_to_run(&callers);
                if calls.is_none() && let Some(event) = words.release() {
                    yield TurnEvent::Delta(event);
                }
                yield TurnEvent::Step(step);
                if let Err(error) = checked {
                    if repairs_left == 0 {
                        Err(error)?;
                    } else {
                        repairs_left -= 1;
                        request.messages.push(message);
                        request.messages.push(error.request_to_repair());
                        yield TurnEvent::Restarted;
                        continue;
                    }
                }
                let Some(calls) = calls else { return };
                if message.text().is_some() {
                    if matches!(format, OutputFormat::Text) {
                        follows = true;
                    } else if repair == Repair::Never && words.were_told() {
                        Err(FormatError::said_before_a_tool())?;
                    }
                }
                request.messages.push(message);
                calls
            } else {
                Calls { ours: std::mem::take(&mut open), theirs: false }
            };
            for call in calls.ours {
                yield TurnEvent::Tool(ToolUse { call: call.clone(), state: ToolState::Calling });
                let state = match toolbox.call(&call).await {
                    Ok(result) => ToolState::Completed(result),
                    Err(result) => ToolState::Failed(result),
                };
                request.messages.push(Message::Tool {
                    tool_call_id: call.id.clone(),
                    content: state.result().unwrap_or_default().to_owned(),
                    failed: matches!(state, ToolState::Failed(_)),
                });
                yield TurnEvent::Tool(ToolUse { call, state });
            }
            if calls.theirs {
                return;
            }
            // What had to be called has been called: forced again, the model could never answer.
            if request.forces_a_call() {
                request.tool_choice = None;
            }
        }
    }
}

/// The tool calls of one answer.
struct Calls {
    /// Those that the server runs.
    ours: Vec<ToolCall>,
    /// Whether there are others, for the caller to run.
    theirs: bool,
}

impl Step {
    /// Whether the server is to run tools that it calls, when its caller has none: then the turn goes on after it.
    pub fn first_call(&self) -> Option<&ToolCall> {
        match &self.message {
            Message::Assistant { tool_calls, .. }
                if matches!(self.reason, FinishReason::ToolCalls | FinishReason::Stop) =>
            {
                tool_calls.first()
            }
            _ => None,
        }
    }

    /// What the server is to run; `None` ends the turn. An answer that was cut off may hold half a call.
    fn calls_to_run(&self, callers: &HashSet<String>) -> Option<Calls> {
        let Message::Assistant { tool_calls, .. } = &self.message else {
            return None;
        };
        let (theirs, ours): (Vec<_>, Vec<_>) = tool_calls
            .iter()
            .cloned()
            .partition(|call| callers.contains(&call.name));
        let whole = matches!(self.reason, FinishReason::ToolCalls | FinishReason::Stop);
        (whole && !ours.is_empty()).then_some(Calls {
            ours,
            theirs: !theirs.is_empty(),
        })
    }
}

/// An answer being put together from its pieces.
#[derive(Debug, Default, Clone)]
pub struct Answer {
    text: String,
    tool_calls: Vec<ToolCall>,
    state: Option<ProviderState>,
}

impl Answer {
    /// Adds a piece.
    pub fn push(&mut self, event: &ModelEvent) {
        match event {
            ModelEvent::Text(text) => self.text.push_str(text),
            ModelEvent::ToolCallStarted { id, name, .. } => self.tool_calls.push(ToolCall {
                id: id.clone(),
                name: name.clone(),
                arguments: String::new(),
            }),
            ModelEvent::ToolCallArguments { index, piece } => {
                if let Some(call) = self.tool_calls.get_mut(*index) {
                    call.arguments.push_str(piece);
                }
            }
            ModelEvent::State(state) => self.state = Some(state.clone()),
            ModelEvent::Reasoning(_) | ModelEvent::Finished { .. } => {}
        }
    }

    /// Whether nothing was said or called yet.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tool_calls.is_empty()
    }

    /// The text so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The answer as a message of the conversation.
    pub fn into_message(self) -> Message {
        let content = (!self.text.is_empty() || self.tool_calls.is_empty()).then_some(self.text);
        Message::Assistant {
            content,
            tool_calls: self.tool_calls,
            state: self.state,
        }
    }

    fn into_step(self, reason: FinishReason, usage: Usage) -> Step {
        Step {
            message: self.into_message(),
            reason,
            usage,
        }
    }
}
