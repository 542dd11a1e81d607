//! Structured output: asks for JSON, and checks that JSON came.

use serde_json::Value;

use super::Step;
use crate::llm::{FinishReason, Message, ModelRequest, Part, ResponseFormat};

/// What an answer's text must be, ready to be checked.
#[derive(Debug, Clone, Default)]
pub enum OutputFormat {
    /// Anything.
    #[default]
    Text,
    /// One JSON object.
    JsonObject,
    /// JSON that a schema accepts.
    Schema {
        /// The schema as it was given, for the prompt.
        schema: Value,
        /// The same, compiled.
        validator: std::sync::Arc<jsonschema::Validator>,
    },
}

/// How an answer misses its format; a sentence for the model and for the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FormatError(String);

impl FormatError {
    /// Nothing but the final answer may be said where JSON is to come, and a stream cannot take words back.
    pub(super) fn said_before_a_tool() -> Self {
        Self("there is text before a tool was called".to_owned())
    }

    /// What the model is told so that it can answer again.
    pub(super) fn request_to_repair(&self) -> Message {
        let text = format!(
            "Your answer cannot be used: {self}. Answer again with the corrected JSON and nothing else."
        );
        Message::User {
            content: vec![Part::Text { text }],
        }
    }
}

impl OutputFormat {
    /// Reads what the caller asks for. References to other documents are never followed.
    ///
    /// # Errors
    /// When the schema is not a JSON Schema.
    pub fn new(format: &ResponseFormat) -> Result<Self, FormatError> {
        match format {
            ResponseFormat::Text => Ok(Self::Text),
            ResponseFormat::JsonObject => Ok(Self::JsonObject),
            ResponseFormat::JsonSchema { schema, .. } => {
                let validator = jsonschema::validator_for(schema)
                    .map_err(|error| FormatError(error.to_string()))?;
                Ok(Self::Schema {
                    schema: schema.clone(),
                    validator: std::sync::Arc::new(validator),
                })
            }
        }
    }

    /// Puts the wish into the prompt where the provider cannot be asked for it.
    pub(super) fn prepare(&self, request: &mut ModelRequest, provider_enforces: bool) {
        if provider_enforces {
            return;
        }
        let wish = match self {
            Self::Text => return,
            Self::JsonObject => {
                "Answer with one JSON object and nothing else: no prose, no code fence.".to_owned()
            }
            Self::Schema { schema, .. } => format!(
                "Answer with JSON that this JSON Schema accepts and nothing else: no prose, no code fence.\n{schema}"
            ),
        };
        request.response_format = ResponseFormat::Text;
        let system = request.system.get_or_insert_default();
        if !system.is_empty() {
            system.push_str("\n\n");
        }
        system.push_str(&wish);
    }

    /// Whether a finished answer is what was asked for. An answer that calls tools is not final,
    /// and one that was cut off is told by its finish reason.
    pub(super) fn check(&self, step: &Step) -> Result<(), FormatError> {
        let Message::Assistant {
            content,
            tool_calls,
            ..
        } = &step.message
        else {
            return Ok(());
        };
        if step.reason != FinishReason::Stop || !tool_calls.is_empty() || matches!(self, Self::Text)
        {
            return Ok(());
        }
        let value: Value = serde_json::from_str(content.as_deref().unwrap_or_default())
            .map_err(|error| FormatError(format!("it is not JSON ({error})")))?;
        match self {
            Self::Text => Ok(()),
            Self::JsonObject if value.is_object() => Ok(()),
            Self::JsonObject => Err(FormatError("it is JSON but not an object".to_owned())),
            Self::Schema { validator, .. } => validator
                .validate(&value)
                .map_err(|error| FormatError(format!("at `{}` {error}", error.instance_path()))),
        }
    }
}
