//! What an agent does: prompt, model, tools, model, answer.
//!
//! [`turn`] is pulled by its caller and writes nothing; it knows neither HTTP nor who pulls.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};

use crate::llm::{
    FinishReason, Message, ModelEvent, ModelRequest, Provider, ProviderError, ProviderState,
    ToolCall, ToolChoice, Usage,
};

mod compact;
mod format;
mod prompt;
mod toolbox;

pub use compact::Compaction;
pub use format::{FormatError, OutputFormat};
pub use prompt::{Persona, system_prompt};
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

/// The most bytes of one answer, and the most tools that it calls: whoever serves a model may never come to an end.
const LONGEST_ANSWER: usize = 32 * 1024 * 1024;
const MOST_CALLS: usize = 1_000;

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

/// How a step is asked for again that its provider has broken off: what was done before it is not done again.
#[derive(Debug, Clone)]
pub struct Again {
    /// How long to rest before each further try; a provider that asks for more gets it.
    pub pauses: Vec<Duration>,
    /// Whether words can be taken back ([`TurnEvent::Broken`]), and there is time: then also a step is waited for that is refused at the moment.
    pub takes_back: bool,
}

impl Again {
    /// How long to rest after a failure; `None` when to ask again would not help, or not soon.
    fn rest(&self, error: &ProviderError, pause: Duration) -> Option<Duration> {
        match error {
            ProviderError::RateLimited {
                retry_after: Some(wish),
            } => Some(pause.max(*wish)).filter(|rest| *rest <= LONGEST_REST),
            // Whoever waits for the words has waited long enough.
            ProviderError::Idle(_) if !self.takes_back => None,
            error => error.is_transient().then_some(pause),
        }
    }
}

/// The longest rest that a provider may ask for in the middle of a turn.
const LONGEST_REST: Duration = Duration::from_secs(300);

fn has_worked(messages: &[Message]) -> bool {
    messages
        .iter()
        .any(|message| matches!(message, Message::Assistant { .. }))
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
                let mut pauses = again.pauses.iter();
                let (step, mut words) = 'step: loop {
                    let mut places = Places::new(&callers);
                    let mut words = Words::of(&format);
                    // Whether the model has begun to answer, and whether the caller has heard of it.
                    let (mut begun, mut heard) = (false, false);
                    let mut call = Box::pin(call_model(&*provider, request.clone()));
                    let error = loop {
                        let event = match call.next().await {
                            Some(Ok(Called::Begun)) => {
                                begun = true;
                                compactor.fits();
                                continue;
                            }
                            Some(Ok(Called::Ended(step))) => break 'step (step, words),
                            Some(Ok(Called::Said(event))) => event,
                            Some(Err(error)) => break error,
                            None => break ProviderError::Protocol("the call ended without an end".to_owned()),
                        };
                        let Some(event) = words.hear(event) else { continue };
                        if follows && matches!(event, ModelEvent::Text(_)) {
                            follows = false;
                            yield TurnEvent::Paragraph;
                        }
                        if let Some(event) = places.route(event) {
                            heard = true;
                            yield event;
                        }
                    };
                    drop(call);
                    if matches!(error, ProviderError::ContextTooLong) && compactor.insist(&request) {
                        continue 'turn;
                    }
                    // A call that nobody began to answer has been tried several times already. What was done before it is worth waiting for.
                    let worth_it = begun || (again.takes_back && has_worked(&request.messages));
                    let pause = pauses.next().filter(|_| worth_it && (again.takes_back || !heard));
                    let Some(pause) = pause.and_then(|pause| again.rest(&error, *pause)) else {
                        Err(error)?
                    };
                    tracing::warn!(model = request.model, "a step of a turn is asked for again: {}", error.told());
                    if heard {
                        yield TurnEvent::Broken;
                    }
                    tokio::time::sleep(pause).await;
                };
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
            if matches!(request.tool_choice, Some(ToolChoice::Required | ToolChoice::Named(_))) {
                request.tool_choice = None;
            }
        }
    }
}

/// What a call of the model comes to.
enum Called {
    /// The provider answers.
    Begun,
    Said(ModelEvent),
    Ended(Step),
}

/// Calls the model once.
fn call_model(
    provider: &dyn Provider,
    request: ModelRequest,
) -> impl Stream<Item = Result<Called, ProviderError>> + Send {
    async_stream::try_stream! {
        let mut stream = provider.stream(request).await?;
        yield Called::Begun;
        let (mut answer, mut said) = (Answer::default(), 0);
        loop {
            let event = stream.next().await.ok_or_else(|| {
                ProviderError::Protocol("the stream ended without a finish".to_owned())
            })??;
            if let ModelEvent::Finished { reason, usage } = event {
                yield Called::Ended(answer.into_step(reason, usage));
                return;
            }
            answer.push(&event);
            said += event.bytes();
            if said > LONGEST_ANSWER || answer.tool_calls.len() > MOST_CALLS {
                Err(ProviderError::Protocol(format!(
                    "it is longer than {LONGEST_ANSWER} bytes, or calls more than {MOST_CALLS} tools"
                )))?;
            }
            yield Called::Said(event);
        }
    }
}

/// The words of a step where JSON is to come. A model may say first what it is about to do and then call a tool: such words are held back until
/// it is known whether they are the answer.
struct Words {
    waiting: String,
    held: bool,
    told: bool,
}

impl Words {
    fn of(format: &OutputFormat) -> Self {
        Self {
            waiting: String::new(),
            held: !matches!(format, OutputFormat::Text),
            told: false,
        }
    }

    /// What may be told of an event.
    fn hear(&mut self, event: ModelEvent) -> Option<ModelEvent> {
        let ModelEvent::Text(text) = event else {
            return Some(event);
        };
        if !self.held {
            self.told = true;
            return Some(ModelEvent::Text(text));
        }
        self.waiting += &text;
        let begins = self.waiting.trim_start().chars().next()?;
        // All JSON but a bare word, which could be prose.
        let is_json = matches!(begins, '{' | '[' | '"' | '-' | '0'..='9');
        if is_json { self.release() } else { None }
    }

    /// What was held back.
    fn release(&mut self) -> Option<ModelEvent> {
        self.held = false;
        let waiting = std::mem::take(&mut self.waiting);
        self.told |= !waiting.is_empty();
        (!waiting.is_empty()).then_some(ModelEvent::Text(waiting))
    }

    fn were_told(&self) -> bool {
        self.told
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

/// Tells the caller's tool calls from the server's as they come in pieces.
struct Places<'a> {
    callers: &'a HashSet<String>,
    /// From the model's index of a call to its place among the caller's.
    of_callers: HashMap<usize, usize>,
}

impl<'a> Places<'a> {
    fn new(callers: &'a HashSet<String>) -> Self {
        Self {
            callers,
            of_callers: HashMap::new(),
        }
    }

    /// What is told of an event; nothing of the arguments of the server's calls.
    fn route(&mut self, event: ModelEvent) -> Option<TurnEvent> {
        match event {
            ModelEvent::ToolCallStarted { index, id, name } if self.callers.contains(&name) => {
                let place = self.of_callers.len();
                self.of_callers.insert(index, place);
                Some(TurnEvent::Delta(ModelEvent::ToolCallStarted {
                    index: place,
                    id,
                    name,
                }))
            }
            ModelEvent::ToolCallStarted { id, name, .. } => Some(TurnEvent::Tool(ToolUse {
                call: ToolCall {
                    id,
                    name,
                    arguments: String::new(),
                },
                state: ToolState::Preparing,
            })),
            ModelEvent::ToolCallArguments { index, piece } => {
                let index = *self.of_callers.get(&index)?;
                Some(TurnEvent::Delta(ModelEvent::ToolCallArguments {
                    index,
                    piece,
                }))
            }
            ModelEvent::State(_) => None,
            event => Some(TurnEvent::Delta(event)),
        }
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
