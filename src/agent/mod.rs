//! What an agent does: prompt, model, answer.
//!
//! [`turn`] is pulled by its caller and writes nothing; it knows neither HTTP nor who pulls.

use std::sync::Arc;

use futures::{Stream, StreamExt};

use crate::llm::{
    FinishReason, Message, ModelEvent, ModelRequest, Provider, ProviderError, ToolCall, Usage,
};

mod format;
mod prompt;

pub use format::{FormatError, OutputFormat};
pub use prompt::{Persona, system_prompt};

/// What happens in a turn, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum TurnEvent {
    /// More of the answer, as the model says it. Never [`ModelEvent::Finished`].
    Delta(ModelEvent),
    /// The answer so far does not count: the model is asked once more.
    Restarted,
    /// One call of the model has ended.
    Step(Step),
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
}

/// What may be done about an answer of the wrong format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: what was streamed cannot be taken back.
    Never,
    /// The model is told what is wrong and asked once more.
    Once,
}

/// One turn of an agent: asks the model, checks the answer's format, and ends.
///
/// Nothing happens between two pulls. Dropping the stream stops the model.
pub fn turn(
    provider: Arc<dyn Provider>,
    mut request: ModelRequest,
    format: OutputFormat,
    repair: Repair,
) -> impl Stream<Item = Result<TurnEvent, TurnError>> + Send {
    async_stream::try_stream! {
        format.prepare(&mut request, provider.supports_json_schema());
        let mut repairs_left = u8::from(repair == Repair::Once);
        loop {
            let mut answer = Answer::default();
            let mut stream = provider.stream(request.clone()).await?;
            let step = loop {
                let event = stream.next().await.ok_or_else(|| {
                    ProviderError::Protocol("the stream ended without a finish".to_owned())
                })??;
                match event {
                    ModelEvent::Finished { reason, usage } => break answer.into_step(reason, usage),
                    delta => {
                        answer.push(&delta);
                        yield TurnEvent::Delta(delta);
                    }
                }
            };
            drop(stream);
            let checked = format.check(&step);
            let message = step.message.clone();
            yield TurnEvent::Step(step);
            match checked {
                Ok(()) => break,
                Err(error) if repairs_left > 0 => {
                    repairs_left -= 1;
                    request.messages.push(message);
                    request.messages.push(error.request_to_repair());
                    yield TurnEvent::Restarted;
                }
                Err(error) => Err(error)?,
            }
        }
    }
}

/// An answer being put together from its pieces.
#[derive(Debug, Default, Clone)]
pub struct Answer {
    text: String,
    tool_calls: Vec<ToolCall>,
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
