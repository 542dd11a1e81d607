//! One step of a turn: a call of the model, made again where its provider breaks off.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures::{Stream, StreamExt};

use super::{Answer, OutputFormat, Step, ToolState, ToolUse, TurnEvent};
use crate::llm::{Message, ModelEvent, ModelRequest, Provider, ProviderError, ToolCall};

/// The most bytes of one answer, and the most tools that it calls: whoever serves a model may never come to an end.
const LONGEST_ANSWER: usize = 32 * 1024 * 1024;
const MOST_CALLS: usize = 1_000;

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
            } => {
                let longest = if self.takes_back {
                    LONGEST_REST
                } else {
                    SHORT_REST
                };
                Some(pause.max(*wish)).filter(|rest| *rest <= longest)
            }
            // Whoever waits for the words has waited long enough.
            ProviderError::Idle(_) if !self.takes_back => None,
            error => error.is_transient().then_some(pause),
        }
    }
}

/// The longest rest that a provider may ask for in the middle of a turn, whose place is taken meanwhile: a longer one ends the attempt, and comes between it
/// and the next.
const LONGEST_REST: Duration = Duration::from_secs(60);
/// The same where someone waits for the words.
const SHORT_REST: Duration = Duration::from_secs(2);

fn has_worked(messages: &[Message]) -> bool {
    messages
        .iter()
        .any(|message| matches!(message, Message::Assistant { .. }))
}

/// How a step comes about.
pub(super) enum Stepping {
    /// The provider answers.
    Begun,
    /// What is told of it as it comes.
    Event(TurnEvent),
    /// It has ended, with words that may have been held back.
    Ended(Step, Words),
}

/// Asks for a step, and again where its provider breaks off. `follows` says whether its words follow others.
pub(super) fn ask_for_step<'a>(
    provider: &'a dyn Provider,
    request: &'a ModelRequest,
    callers: &'a HashSet<String>,
    format: &'a OutputFormat,
    again: &'a Again,
    follows: bool,
) -> impl Stream<Item = Result<Stepping, ProviderError>> + Send + 'a {
    async_stream::try_stream! {
        let mut pauses = again.pauses.iter();
        loop {
            let mut places = Places::new(callers);
            let mut words = Words::of(format);
            let mut follows = follows;
            // Whether the model has begun to answer, and whether the caller has heard of it.
            let (mut begun, mut heard) = (false, false);
            let mut call = Box::pin(call_model(provider, request.clone()));
            let error = loop {
                let event = match call.next().await {
                    Some(Ok(Called::Begun)) => {
                        begun = true;
                        yield Stepping::Begun;
                        continue;
                    }
                    Some(Ok(Called::Ended(step))) => {
                        yield Stepping::Ended(step, words);
                        return;
                    }
                    Some(Ok(Called::Said(event))) => event,
                    Some(Err(error)) => break error,
                    None => break ProviderError::Protocol("the call ended without an end".to_owned()),
                };
                let Some(event) = words.hear(event) else { continue };
                if follows && matches!(event, ModelEvent::Text(_)) {
                    follows = false;
                    yield Stepping::Event(TurnEvent::Paragraph);
                }
                if let Some(event) = places.route(event) {
                    heard = true;
                    yield Stepping::Event(event);
                }
            };
            drop(call);
            // A call that nobody began to answer has been tried several times already. What was done before it is worth waiting for.
            let worth_it = begun || (again.takes_back && has_worked(&request.messages));
            let pause = pauses.next().filter(|_| worth_it && (again.takes_back || !heard));
            let Some(pause) = pause.and_then(|pause| again.rest(&error, *pause)) else {
                Err(error)?
            };
            tracing::warn!(model = request.model, "a step of a turn is asked for again: {}", error.told());
            if heard {
                yield Stepping::Event(TurnEvent::Broken);
            }
            yield Stepping::Event(TurnEvent::Resting(pause));
            tokio::time::sleep(pause).await;
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
pub(super) struct Words {
    waiting: String,
    held: bool,
    /// Whether what waits has begun as no JSON does.
    prose: bool,
    told: bool,
}

impl Words {
    fn of(format: &OutputFormat) -> Self {
        Self {
            waiting: String::new(),
            held: !matches!(format, OutputFormat::Text),
            prose: false,
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
        // All that waits are blanks, unless it is prose.
        let begins = text.trim_start().chars().next();
        self.waiting += &text;
        if self.prose {
            return None;
        }
        // All JSON but a bare word, which could be prose.
        if matches!(begins?, '{' | '[' | '"' | '-' | '0'..='9') {
            return self.release();
        }
        self.prose = true;
        None
    }

    /// What was held back.
    pub(super) fn release(&mut self) -> Option<ModelEvent> {
        self.held = false;
        let waiting = std::mem::take(&mut self.waiting);
        self.told |= !waiting.is_empty();
        (!waiting.is_empty()).then_some(ModelEvent::Text(waiting))
    }

    pub(super) fn were_told(&self) -> bool {
        self.told
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
