//! Model providers and their wire formats.
//!
//! Every adapter turns one vendor's stream into the same few [`ModelEvent`]s;
//! nothing above this room has ever seen a vendor's JSON, and of ours it imports only `net`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use serde_json::Value;

mod anthropic;
mod echo;
mod http;
mod openai;
mod providers;
mod responses;
mod sse;
mod state;

pub use echo::Echo;
pub use http::{ClientSettings, HttpClient};
pub use providers::{Credential, KNOWN, Known, ProjectCredentials, Providers, ResolveError};
pub use state::ProviderState;

/// Someone who sells or runs models.
#[async_trait]
pub trait Provider: Send + Sync + fmt::Debug {
    /// Asks the model and returns its answer as it is produced.
    ///
    /// Dropping the stream stops the call. Failures before the first event are the `Err`
    /// of this call; later ones are the last item of the stream.
    ///
    /// # Errors
    /// Whatever keeps the model from beginning to answer, as a [`ProviderError`].
    async fn stream(&self, request: ModelRequest) -> Result<ModelStream, ProviderError>;

    /// Whether [`ResponseFormat`] reaches the model as a setting in such a request; where it does not, it belongs into the prompt.
    fn supports_format(&self, _request: &ModelRequest) -> bool {
        false
    }
}

/// A model's answer in pieces; a whole one ends with exactly one [`ModelEvent::Finished`].
pub type ModelStream = BoxStream<'static, Result<ModelEvent, ProviderError>>;

/// The right to ask, which may be lost while a request waits for another try, or while its process is stopped.
#[async_trait]
pub trait Permit: Send + Sync + fmt::Debug {
    /// Whether the request may leave. Asked right before each try.
    async fn is_valid(&self) -> bool;
}

/// What a model is asked, in no vendor's words.
#[derive(Debug, Clone, Default)]
pub struct ModelRequest {
    /// The model's name as its provider knows it, without the provider's prefix.
    pub model: String,
    /// The instructions that stand before the conversation.
    pub system: Option<String>,
    /// The conversation, oldest first.
    pub messages: Vec<Message>,
    /// What the model may call.
    pub tools: Vec<Arc<Tool>>,
    /// Whether it must call something; `None` leaves it to the model.
    pub tool_choice: Option<ToolChoice>,
    /// Whether it may call several tools in one answer; `None` is the provider's default.
    pub parallel_tool_calls: Option<bool>,
    /// What the answer's text must be.
    pub response_format: ResponseFormat,
    /// How it picks its words.
    pub sampling: Sampling,
    /// How long it may think first; `None` leaves the provider's default.
    pub reasoning: Option<Effort>,
    /// Whether the answer is of use only as a whole. An adapter may then ask for it in one piece,
    /// which is cheaper for everybody; it yields the same events all the same.
    pub whole: bool,
    /// Without it the request does not leave this process; `None` asks for none.
    pub permit: Option<Arc<dyn Permit>>,
}

impl ModelRequest {
    /// Whether the model must call a tool.
    pub fn forces_a_call(&self) -> bool {
        matches!(
            self.tool_choice,
            Some(ToolChoice::Required | ToolChoice::Named(_))
        )
    }

    /// Whether it has a state of this owner's to give back.
    fn gives_back(&self, of: &state::Owner) -> bool {
        self.messages
            .iter()
            .any(|said| said.state_for(of).is_some())
    }
}

/// Which tool a model must call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// None at all.
    None,
    /// Any or none, as it likes.
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

/// What an answer's text must be.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum ResponseFormat {
    /// Anything.
    #[default]
    Text,
    /// One JSON object.
    JsonObject,
    /// JSON that a schema describes.
    JsonSchema {
        /// 1 to 64 characters of `[A-Za-z0-9_-]`.
        name: String,
        /// What it is for, for the model to read.
        description: Option<String>,
        /// The JSON Schema.
        schema: Value,
        /// Whether the provider is asked to enforce it.
        strict: Option<bool>,
    },
}

/// How a model picks its words; `None` is the provider's default.
///
/// An adapter that cannot send a value that is set refuses the request with
/// [`ProviderError::Unsupported`]; it never drops it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sampling {
    /// 0 to 2.
    pub temperature: Option<f64>,
    /// 0 to 1.
    pub top_p: Option<f64>,
    /// The most tokens to write, reasoning included.
    pub max_tokens: Option<u32>,
    /// Texts that end the answer; empty for none.
    pub stop: Vec<String>,
    /// Asks for the same answer to the same request.
    pub seed: Option<i64>,
    /// -2 to 2.
    pub presence_penalty: Option<f64>,
    /// -2 to 2.
    pub frequency_penalty: Option<f64>,
    /// From a token's number to -100 to 100.
    pub logit_bias: Option<Value>,
}

/// How much a model thinks before it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effort {
    /// Not at all.
    Off,
    /// As little as it can.
    Minimal,
    /// A little.
    Low,
    /// Some.
    Medium,
    /// Much.
    High,
    /// As much as it can.
    Xhigh,
}

/// One message of a conversation, tagged by its role.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "lowercase")]
pub enum Message {
    /// Instructions from the caller.
    System {
        /// The instructions.
        content: String,
    },
    /// What a person said.
    User {
        /// Text and images in order.
        content: Vec<Part>,
    },
    /// What the model answered.
    Assistant {
        /// Its text; absent when it only called tools.
        content: Option<String>,
        /// The tools it called, in order.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        tool_calls: Vec<ToolCall>,
        /// What its provider wants back.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        state: Option<ProviderState>,
    },
    /// What a tool returned.
    Tool {
        /// The call that this answers.
        tool_call_id: String,
        /// The result as the model reads it.
        content: String,
        /// Whether the tool failed, and the result says how.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        failed: bool,
    },
}

impl Message {
    /// What a model said in it, unless it only called tools.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Assistant { content, .. } => content.as_deref().filter(|text| !text.is_empty()),
            _ => None,
        }
    }
}

/// A piece of a user's message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// Plain text.
    Text {
        /// The text.
        text: String,
    },
    /// A picture by `https:` address or as a `data:` URL.
    Image {
        /// Its address.
        url: String,
    },
}

/// A call of a tool by the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    /// The provider's id of this call.
    pub id: String,
    /// The tool's name.
    pub name: String,
    /// JSON text as the model wrote it; it may not parse.
    pub arguments: String,
}

/// A tool that the model may call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tool {
    /// 1 to 64 characters of `[A-Za-z0-9_-]`.
    pub name: String,
    /// What it does, for the model to read.
    pub description: Option<String>,
    /// A JSON Schema of type `object`.
    pub parameters: Value,
}

/// What a model can say, whoever sells it.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelEvent {
    /// More of the answer's text.
    Text(String),
    /// More of the reasoning before the answer.
    Reasoning(String),
    /// The model begins a tool call; its arguments follow in pieces.
    ToolCallStarted {
        /// The call's place in the answer, from 0.
        index: usize,
        /// The provider's id of the call.
        id: String,
        /// The tool's name.
        name: String,
    },
    /// More of a begun tool call's arguments.
    ToolCallArguments {
        /// The call's place in the answer.
        index: usize,
        /// The next piece of its JSON text.
        piece: String,
    },
    /// What the provider wants back in later requests. Right before the end, if at all.
    State(ProviderState),
    /// The end of a whole answer.
    Finished {
        /// Why the model stopped.
        reason: FinishReason,
        /// What it used.
        usage: Usage,
    },
}

impl ModelEvent {
    /// The bytes of what varies in it.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Text(text) | Self::Reasoning(text) => text.len(),
            Self::ToolCallArguments { piece, .. } => piece.len(),
            Self::ToolCallStarted { name, .. } => name.len(),
            Self::State(state) => state.size(),
            Self::Finished { .. } => 0,
        }
    }
}

/// Why a model stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// It had said all it wanted to.
    Stop,
    /// It reached the token limit.
    Length,
    /// It waits for the results of its tool calls.
    ToolCalls,
    /// The provider's filter cut it off.
    ContentFilter,
}

/// Tokens of one model call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens read, cached ones included.
    pub prompt_tokens: u64,
    /// Tokens written, reasoning included.
    pub completion_tokens: u64,
    /// How many of the read ones came from the provider's cache.
    pub cached_tokens: u64,
    /// How many of the written ones were reasoning.
    pub reasoning_tokens: u64,
    /// Whether we estimated the counts because the provider gave none.
    pub estimated: bool,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, more: Self) {
        // Providers name these numbers.
        let add = |sum: &mut u64, more| *sum = sum.saturating_add(more);
        add(&mut self.prompt_tokens, more.prompt_tokens);
        add(&mut self.completion_tokens, more.completion_tokens);
        add(&mut self.cached_tokens, more.cached_tokens);
        add(&mut self.reasoning_tokens, more.reasoning_tokens);
        self.estimated = self.estimated || more.estimated;
    }
}

/// How many tokens a model can read, by its name; a cautious number for those we do not know.
pub fn context_window(model: &str) -> u64 {
    let bare = model.rsplit([':', '/']).next().unwrap_or(model);
    let known = [
        ("claude-", 200_000),
        ("gpt-5", 400_000),
        ("gpt-4.1", 1_000_000),
        ("gemini-", 1_000_000),
        ("o1", 200_000),
        ("o3", 200_000),
        ("o4-", 200_000),
        ("grok-4", 256_000),
    ];
    known
        .iter()
        .find(|(prefix, _)| bare.starts_with(prefix))
        .map_or(128_000, |(_, tokens)| *tokens)
}

/// Why a model did not answer; the variant says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// The provider refused our credentials: page whoever owns them.
    #[error("the provider refused the credentials")]
    Credentials,
    /// The conversation does not fit the model: shorten it.
    #[error("the conversation is too long for the model")]
    ContextTooLong,
    /// The provider will not take this request: tell the client why.
    #[error("the provider rejected the request: {0}")]
    Rejected(String),
    /// The adapter cannot send a setting: tell the client to leave it out.
    #[error("`{0}` is not supported by this model's provider")]
    Unsupported(&'static str),
    /// Too many requests: wait.
    #[error("the provider limits our requests")]
    RateLimited {
        /// How long the provider asks us to wait.
        retry_after: Option<Duration>,
    },
    /// The provider cannot be reached or is broken: try again.
    #[error("the provider is unavailable")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Silence for longer than the idle limit.
    #[error("the provider was silent for {} s", .0.as_secs())]
    Idle(Duration),
    /// The answer cannot be read.
    #[error("the provider's answer could not be read: {0}")]
    Protocol(String),
    /// The request's [`Permit`] is not valid any more: nothing was asked.
    #[error("the right to ask the model was lost")]
    NotPermitted,
}

impl ProviderError {
    /// What happened, with what lies under it: nothing of it is the provider's own text, or secret.
    pub fn told(&self) -> String {
        let cause = std::iter::successors(std::error::Error::source(self), |error| error.source());
        match cause.last() {
            Some(cause) => format!("{self}: {cause}"),
            None => self.to_string(),
        }
    }

    /// Whether the same request may succeed a little later.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::RateLimited { .. } | Self::Unavailable(_) | Self::Idle(_)
        )
    }
}
