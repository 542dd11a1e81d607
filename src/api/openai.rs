//! The chat completion as OpenAI writes it: request, answer, and stream chunks.

use std::fmt::Write;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::agent::{ToolState, ToolUse};
use crate::llm::{FinishReason, Message, ModelEvent, Usage};

/// `POST /v1/chat/completions` (contract 2.1.2). Unknown members are ignored.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[schema(as = ChatCompletionRequest)]
pub struct ChatRequest {
    /// The agent that answers, by name or id.
    pub agent: Option<String>,
    /// Names the agent when `agent` does not, as OpenAI clients do.
    pub model: Option<String>,
    /// The new message, or the whole conversation.
    #[schema(min_items = 1)]
    pub messages: Option<Vec<ChatMessage>>,
    /// Whether the answer is streamed.
    pub stream: Option<bool>,
    /// What else the stream holds.
    pub stream_options: Option<StreamOptions>,
    /// 0 to 2.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// 0 to 1.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// The most tokens to answer with.
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
    /// The same under its newer name.
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<u32>,
    /// Texts that end the answer: one, or up to four.
    #[schema(value_type = Option<Object>)]
    pub stop: Option<Stop>,
    /// Asks for the same answer to the same request.
    pub seed: Option<i64>,
    /// -2 to 2.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f64>,
    /// -2 to 2.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f64>,
    /// From a token's number to -100 to 100.
    #[schema(value_type = Option<Object>)]
    pub logit_bias: Option<Value>,
    /// Only 1.
    pub n: Option<u32>,
    /// Only false.
    pub logprobs: Option<bool>,
    /// Only 0.
    pub top_logprobs: Option<u32>,
    /// Only `["text"]`.
    pub modalities: Option<Vec<String>>,
    /// How much the model thinks first.
    pub reasoning_effort: Option<String>,
    /// Tools that the caller runs.
    #[schema(max_items = 128)]
    pub tools: Option<Vec<ChatTool>>,
    /// `none`, `auto`, `required`, or one tool by name.
    #[schema(value_type = Option<Object>)]
    pub tool_choice: Option<Value>,
    /// Whether one answer may call several tools.
    pub parallel_tool_calls: Option<bool>,
    /// `text`, `json_object`, or `json_schema` with a schema.
    #[schema(value_type = Option<Object>)]
    pub response_format: Option<Value>,
    /// The caller's own user, stored on the session.
    pub user: Option<String>,
    /// The caller's own labels, stored on the session: at most 16.
    #[schema(value_type = Option<Object>)]
    pub metadata: Option<Value>,
    /// The session to continue, when the `x-session-id` header is absent.
    #[serde(rename = "sessionId")]
    pub session_id: Option<String>,
    /// Superseded by `tools`, and refused.
    #[schema(value_type = Option<Object>)]
    pub functions: Option<Value>,
    /// Superseded by `tool_choice`, and refused.
    #[schema(value_type = Option<Object>)]
    pub function_call: Option<Value>,
}

/// What else a stream holds.
#[derive(Debug, Clone, Copy, Default, Deserialize, utoipa::ToSchema)]
pub struct StreamOptions {
    /// Whether its last chunk tells the usage.
    pub include_usage: Option<bool>,
}

/// One text or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Stop {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

/// A message of the conversation (contract 2.1.3).
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Text, parts, or null beside tool calls.
    #[schema(value_type = Option<Object>)]
    pub content: Option<Content>,
    /// For `tool`: the call that this answers.
    pub tool_call_id: Option<String>,
    /// For `assistant`: the tools it called.
    pub tool_calls: Option<Vec<ChatToolCall>>,
}

/// A message's content.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Text and images in order.
    Parts(Vec<ContentPart>),
}

/// A part of a message's content.
#[derive(Debug, Deserialize)]
pub struct ContentPart {
    /// `text` or `image_url`.
    #[serde(rename = "type")]
    pub kind: String,
    /// For `text`.
    pub text: Option<String>,
    /// For `image_url`.
    pub image_url: Option<ImageUrl>,
}

/// Where an image is.
#[derive(Debug, Deserialize)]
pub struct ImageUrl {
    /// A data URL or an https URL.
    pub url: String,
}

/// A tool call in the conversation.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
pub struct ChatToolCall {
    /// The call's id.
    pub id: String,
    /// Always `function`.
    #[serde(rename = "type", default = "function")]
    pub kind: String,
    /// What was called.
    pub function: ChatFunctionCall,
}

fn function() -> String {
    "function".to_owned()
}

/// What a tool call calls.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
pub struct ChatFunctionCall {
    /// The tool's name.
    pub name: String,
    /// JSON text.
    #[serde(default = "empty_object")]
    pub arguments: String,
}

fn empty_object() -> String {
    "{}".to_owned()
}

/// A tool that the caller runs.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct ChatTool {
    /// Always `function`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The tool.
    pub function: ChatFunction,
}

/// A tool's name, purpose and parameters.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct ChatFunction {
    /// 1 to 64 characters of `[A-Za-z0-9_-]`.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// A JSON Schema of type `object`.
    #[schema(value_type = Option<Object>)]
    pub parameters: Option<Value>,
}

/// A whole answer (contract 2.1.6).
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ChatCompletion {
    /// `chatcmpl-…`.
    pub id: String,
    /// Always `chat.completion`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: i64,
    /// The agent that answered.
    pub model: String,
    /// Changes when the agent does.
    pub system_fingerprint: String,
    /// Always one.
    pub choices: Vec<ChatChoice>,
    /// What it used.
    #[schema(value_type = Object)]
    pub usage: Value,
}

/// The answer itself.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ChatChoice {
    /// Always 0.
    pub index: u32,
    /// What the agent said.
    #[schema(value_type = Object)]
    pub message: Value,
    /// Always null: log probabilities are refused.
    #[schema(value_type = Option<Object>)]
    pub logprobs: Option<Value>,
    /// `stop`, `length`, `tool_calls` or `content_filter`.
    pub finish_reason: &'static str,
}

/// OpenAI's word for why a model stopped.
pub fn finish_word(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::ToolCalls => "tool_calls",
        FinishReason::ContentFilter => "content_filter",
    }
}

/// OpenAI's usage object.
pub fn usage_object(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    })
}

/// OpenAI's assistant message.
pub fn assistant_message(message: &Message, reasoning: &str) -> Value {
    let mut object = Map::new();
    object.insert("role".to_owned(), json!("assistant"));
    if let Message::Assistant {
        content,
        tool_calls,
        ..
    } = message
    {
        object.insert("content".to_owned(), json!(content));
        object.insert("refusal".to_owned(), Value::Null);
        if !tool_calls.is_empty() {
            let calls: Vec<Value> = tool_calls
                .iter()
                .map(|call| {
                    json!({"id": call.id, "type": "function",
                           "function": {"name": call.name, "arguments": call.arguments}})
                })
                .collect();
            object.insert("tool_calls".to_owned(), Value::Array(calls));
        }
    }
    if !reasoning.is_empty() {
        object.insert("reasoning_content".to_owned(), json!(reasoning));
    }
    Value::Object(object)
}

/// Writes a stream's frames. What all chunks share is written once and copied.
#[derive(Debug)]
pub struct ChunkWriter {
    before: String,
    after: &'static str,
    include_usage: bool,
}

impl ChunkWriter {
    /// A writer of chunks of one answer.
    pub fn new(
        id: &str,
        created: i64,
        model: &str,
        fingerprint: &str,
        include_usage: bool,
    ) -> Self {
        let before = format!(
            "data: {{\"id\":{},\"object\":\"chat.completion.chunk\",\"created\":{created},\"model\":{},\"system_fingerprint\":{},\"choices\":[",
            quoted(id),
            quoted(model),
            quoted(fingerprint)
        );
        // As OpenAI has it: with usage asked for, every chunk but the last has a null one.
        let after = if include_usage {
            ",\"usage\":null}\n\n"
        } else {
            "}\n\n"
        };
        Self {
            before,
            after,
            include_usage,
        }
    }

    fn chunk(&self, into: &mut String, delta: &str, finish: Option<&str>) {
        into.push_str(&self.before);
        into.push_str("{\"index\":0,\"delta\":");
        into.push_str(delta);
        into.push_str(",\"logprobs\":null,\"finish_reason\":");
        match finish {
            Some(reason) => into.push_str(&quoted(reason)),
            None => into.push_str("null"),
        }
        into.push_str("}]");
        into.push_str(self.after);
    }

    /// The first chunk, which names the role. As OpenAI has it, an answer that begins with a tool call has no content.
    pub fn role(&self, into: &mut String, calls: bool) {
        let content = if calls { "null" } else { "\"\"" };
        let delta = format!("{{\"role\":\"assistant\",\"content\":{content}}}");
        self.chunk(into, &delta, None);
    }

    /// A piece of the answer.
    pub fn delta(&self, into: &mut String, event: &ModelEvent) {
        let delta = match event {
            ModelEvent::Text(text) => format!("{{\"content\":{}}}", quoted(text)),
            ModelEvent::Reasoning(text) => format!("{{\"reasoning_content\":{}}}", quoted(text)),
            ModelEvent::ToolCallStarted { index, id, name } => json!({"tool_calls": [
                {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
            ]})
            .to_string(),
            ModelEvent::ToolCallArguments { index, piece } => {
                json!({"tool_calls": [{"index": index, "function": {"arguments": piece}}]}).to_string()
            }
            ModelEvent::State(_) | ModelEvent::Finished { .. } => return,
        };
        self.chunk(into, &delta, None);
    }

    /// A tool of the server comes further: an empty delta, with the `tool_call` of contract 2.1.7 beside it.
    pub fn tool(&self, into: &mut String, tool: &ToolUse) {
        let (state, result) = match &tool.state {
            ToolState::Preparing => ("preparing", None),
            ToolState::Calling => ("calling", None),
            ToolState::Completed(result) => ("completed", Some(result)),
            ToolState::Failed(result) => ("error", Some(result)),
        };
        let mut shown = json!({"id": tool.call.id, "name": tool.call.name, "state": state});
        if tool.state != ToolState::Preparing {
            // Arguments that do not parse are shown as the text that they are.
            match serde_json::from_str::<Value>(&tool.call.arguments) {
                Ok(arguments) => shown["arguments"] = arguments,
                Err(_) => shown["argumentsText"] = json!(tool.call.arguments),
            }
        }
        if let Some(result) = result {
            shown["result"] = json!(result);
        }
        into.push_str(&self.before);
        let _ = write!(
            into,
            "{{\"index\":0,\"delta\":{{}},\"logprobs\":null,\"finish_reason\":null,\"tool_call\":{shown}}}]"
        );
        into.push_str(self.after);
    }

    /// The end of a whole answer: why, what it used if that was asked for, and `[DONE]`.
    pub fn finish(&self, into: &mut String, reason: FinishReason, usage: Usage) {
        self.chunk(into, "{}", Some(finish_word(reason)));
        if self.include_usage {
            into.push_str(&self.before);
            let _ = write!(into, "],\"usage\":{}}}\n\n", usage_object(usage));
        }
        into.push_str("data: [DONE]\n\n");
    }

    /// The end of a broken answer.
    pub fn fail(into: &mut String, error_frame: &str) {
        let _ = write!(into, "data: {error_frame}\n\ndata: [DONE]\n\n");
    }
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(text: &str) -> Vec<Value> {
        let frames = text.split("\n\n").filter(|frame| !frame.is_empty());
        frames
            .map(|frame| {
                serde_json::from_str(frame.strip_prefix("data: ").unwrap()).unwrap_or(Value::Null)
            })
            .collect()
    }

    #[test]
    fn every_chunk_is_fully_formed() {
        let writer = ChunkWriter::new("chatcmpl-1", 7, "a \"quoted\" name", "fp_1", true);
        let mut text = String::new();
        writer.role(&mut text, false);
        writer.delta(&mut text, &ModelEvent::Text("line\n\"two\"".to_owned()));
        writer.delta(
            &mut text,
            &ModelEvent::ToolCallStarted {
                index: 0,
                id: "c1".to_owned(),
                name: "f".to_owned(),
            },
        );
        writer.delta(
            &mut text,
            &ModelEvent::ToolCallArguments {
                index: 0,
                piece: "{\"a\":".to_owned(),
            },
        );
        writer.finish(
            &mut text,
            FinishReason::ToolCalls,
            Usage {
                prompt_tokens: 2,
                completion_tokens: 3,
                ..Usage::default()
            },
        );
        let frames = frames(&text);
        assert_eq!(frames.len(), 7);
        for frame in &frames[..5] {
            assert_eq!(frame["id"], "chatcmpl-1");
            assert_eq!(frame["object"], "chat.completion.chunk");
            assert_eq!(frame["created"], 7);
            assert_eq!(frame["model"], "a \"quoted\" name");
            assert_eq!(frame["choices"][0]["index"], 0);
            assert!(frame["choices"][0]["delta"].is_object());
            assert!(frame["usage"].is_null() && frame.get("usage").is_some());
        }
        assert_eq!(frames[0]["choices"][0]["delta"]["role"], "assistant");
        assert_eq!(frames[1]["choices"][0]["delta"]["content"], "line\n\"two\"");
        assert_eq!(
            frames[2]["choices"][0]["delta"]["tool_calls"][0]["function"]["name"],
            "f"
        );
        assert_eq!(
            frames[3]["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"],
            "{\"a\":"
        );
        assert_eq!(frames[4]["choices"][0]["finish_reason"], "tool_calls");
        assert_eq!(frames[5]["choices"], json!([]));
        assert_eq!(frames[5]["usage"]["total_tokens"], 5);
        assert!(text.ends_with("data: [DONE]\n\n"));
    }
}
