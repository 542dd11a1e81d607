//! OpenAI's Responses API, for the models that use tools nowhere else.
//!
//! Nothing is left with OpenAI: each request holds the whole conversation, and what a model thought goes out with it, sealed.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use futures::StreamExt;
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::http::error_object;
use super::openai::OpenAi;
use super::state::{Owner, Weight};
use super::{
    Effort, FinishReason, Message, ModelEvent, ModelRequest, ModelStream, Part, ProviderError,
    ProviderState, ResponseFormat, ToolCall, ToolChoice, Usage,
};

/// Which models, at which base URL, said that they are to be asked here, with tools or without. Forgotten with the process; to learn it again is one refusal.
#[derive(Debug, Default)]
pub(super) struct AskedThere(Mutex<HashSet<(String, String, bool)>>);

impl AskedThere {
    /// Tenants name models as they like.
    const MOST: usize = 1_000;

    pub(super) fn has(&self, base_url: &str, model: &str, uses_tools: bool) -> bool {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        !known.is_empty() && known.contains(&(base_url.to_owned(), model.to_owned(), uses_tools))
    }

    pub(super) fn add(&self, base_url: &str, model: &str, uses_tools: bool) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= Self::MOST {
            known.clear();
        }
        known.insert((base_url.to_owned(), model.to_owned(), uses_tools));
    }
}

/// Asks a model, and gives back the states of the owner that is named. The answer is streamed in any case: its events are those of a whole one.
///
/// # Errors
/// As [`super::Provider::stream`].
pub(super) async fn stream(
    provider: &OpenAi,
    request: &ModelRequest,
    given_back: Option<&Owner>,
) -> Result<ModelStream, ProviderError> {
    let of = provider.of(&request.model);
    let (post, prompt_bytes) = provider.post("responses", &body(request, given_back)?)?;
    let permit = request.permit.as_deref();
    let events = provider.client.events(post, permit, &provider.key).await?;
    let mut events = events.boxed();
    let mut reader = Reader {
        key: provider.key.clone(),
        ..Reader::default()
    };
    let stream = async_stream::try_stream! {
        while reader.ending.is_none() {
            let Some(data) = events.next().await else { break };
            if let Some(event) = reader.read(&data?)? {
                yield event;
            }
        }
        for event in reader.finish(prompt_bytes, of)? {
            yield event;
        }
    };
    Ok(stream.boxed())
}

fn body(request: &ModelRequest, of: Option<&Owner>) -> Result<Value, ProviderError> {
    let sampling = &request.sampling;
    for (param, set) in [
        ("stop", !sampling.stop.is_empty()),
        ("seed", sampling.seed.is_some()),
        ("presence_penalty", sampling.presence_penalty.is_some()),
        ("frequency_penalty", sampling.frequency_penalty.is_some()),
        ("logit_bias", sampling.logit_bias.is_some()),
    ] {
        if set {
            return Err(ProviderError::Unsupported(param));
        }
    }
    let mut body = Map::new();
    let mut set = |key: &str, value: Value| {
        if !value.is_null() {
            body.insert(key.to_owned(), value);
        }
    };
    set("model", json!(request.model));
    set("stream", json!(true));
    set("store", json!(false));
    set("include", json!(["reasoning.encrypted_content"]));
    set("instructions", json!(request.system));
    let input = request.messages.iter().flat_map(|said| items(said, of));
    set("input", input.collect());
    if !request.tools.is_empty() {
        let tools = request.tools.iter().map(|tool| {
            // What is not said here is strict, and strict ones take fewer schemas.
            json!({"type": "function", "name": tool.name, "description": tool.description,
                   "parameters": tool.parameters, "strict": false})
        });
        set("tools", tools.collect());
    }
    set(
        "tool_choice",
        match &request.tool_choice {
            None => Value::Null,
            Some(ToolChoice::None) => json!("none"),
            Some(ToolChoice::Auto) => json!("auto"),
            Some(ToolChoice::Required) => json!("required"),
            Some(ToolChoice::Named(name)) => json!({"type": "function", "name": name}),
        },
    );
    set("parallel_tool_calls", json!(request.parallel_tool_calls));
    set("text", format(&request.response_format));
    set("temperature", json!(sampling.temperature));
    set("top_p", json!(sampling.top_p));
    set("max_output_tokens", json!(sampling.max_tokens));
    set(
        "reasoning",
        match request.reasoning {
            None => Value::Null,
            Some(Effort::Off) => json!({"effort": "none"}),
            Some(effort) => json!({"effort": effort}),
        },
    );
    Ok(Value::Object(body))
}

fn format(wish: &ResponseFormat) -> Value {
    match wish {
        ResponseFormat::Text => Value::Null,
        ResponseFormat::JsonObject => json!({"format": {"type": "json_object"}}),
        ResponseFormat::JsonSchema {
            name,
            description,
            schema,
            strict,
        } => {
            let mut format = json!({"type": "json_schema", "name": name, "schema": schema, "strict": strict.unwrap_or(false)});
            if let Some(description) = description {
                format["description"] = json!(description);
            }
            json!({"format": format})
        }
    }
}

/// A message as the items that it is here.
fn items(message: &Message, of: Option<&Owner>) -> Vec<Value> {
    match message {
        Message::System { content } => vec![json!({"role": "developer", "content": content})],
        Message::User { content } => {
            let parts: Vec<Value> = content.iter().map(part).collect();
            vec![json!({"role": "user", "content": parts})]
        }
        Message::Tool {
            tool_call_id,
            content,
            ..
        } => {
            vec![
                json!({"type": "function_call_output", "call_id": tool_call_id, "output": content}),
            ]
        }
        Message::Assistant {
            content,
            tool_calls,
            ..
        } => {
            let given = of.and_then(|of| message.state_for(of));
            match given.and_then(Value::as_array) {
                Some(given) => given
                    .iter()
                    .filter_map(|item| given_back(item, tool_calls))
                    .collect(),
                None => {
                    let text = content.iter().filter(|text| !text.is_empty());
                    text.map(|text| json!({"role": "assistant", "content": text}))
                        .chain(tool_calls.iter().map(call))
                        .collect()
                }
            }
        }
    }
}

/// An item as it was given; of a call only its id is kept, the rest stands in the message.
fn given_back(item: &Value, calls: &[ToolCall]) -> Option<Value> {
    if item["type"] != "function_call" {
        return Some(item.clone());
    }
    let made = calls
        .iter()
        .find(|call| item["call_id"] == call.id.as_str());
    made.map(call)
}

fn call(call: &ToolCall) -> Value {
    json!({"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments})
}

fn part(part: &Part) -> Value {
    match part {
        Part::Text { text } => json!({"type": "input_text", "text": text}),
        Part::Image { url } => json!({"type": "input_image", "image_url": url}),
    }
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Event {
    #[serde(
        rename = "response.output_text.delta",
        alias = "response.refusal.delta"
    )]
    Text {
        #[serde(default)]
        output_index: u64,
        delta: String,
    },
    /// OpenAI gives it to those who ask, and verified ones at that; others who speak this format give it unasked.
    #[serde(
        rename = "response.reasoning_text.delta",
        alias = "response.reasoning_summary_text.delta"
    )]
    Reasoning { delta: String },
    #[serde(rename = "response.output_item.added")]
    Added { output_index: u64, item: Value },
    #[serde(rename = "response.function_call_arguments.delta")]
    Arguments { output_index: u64, delta: String },
    #[serde(rename = "response.output_item.done")]
    Done { item: Value },
    #[serde(
        rename = "response.completed",
        alias = "response.incomplete",
        alias = "response.failed"
    )]
    Ended { response: Ending },
    #[serde(rename = "error")]
    Error {
        code: Option<String>,
        message: Option<String>,
        error: Option<Value>,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Ending {
    #[serde(default)]
    status: String,
    error: Option<Value>,
    incomplete_details: Option<Incomplete>,
    usage: Option<EndUsage>,
}

#[derive(Deserialize)]
struct Incomplete {
    reason: Option<String>,
}

#[derive(Deserialize)]
struct EndUsage {
    #[serde(default)]
    input_tokens: u64,
    #[serde(default)]
    output_tokens: u64,
    input_tokens_details: Option<InputDetails>,
    output_tokens_details: Option<OutputDetails>,
}

#[derive(Deserialize)]
struct InputDetails {
    cached_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct OutputDetails {
    reasoning_tokens: Option<u64>,
}

/// Reads the events of one answer.
#[derive(Default)]
struct Reader {
    /// What an error may quote.
    key: SecretString,
    /// Ours by the item's place in the answer.
    calls: HashMap<u64, usize>,
    /// The places of messages that tell what the model is about to do: no part of its answer.
    asides: HashSet<u64>,
    /// Whether a part of the answer has begun.
    answers: bool,
    /// The items as they were given, in their order.
    items: Vec<Value>,
    weight: Weight,
    said_bytes: usize,
    ending: Option<Ending>,
}

impl Reader {
    fn read(&mut self, data: &str) -> Result<Option<ModelEvent>, ProviderError> {
        let event: Event = serde_json::from_str(data).map_err(|error| {
            ProviderError::Protocol(format!("an event is not of the Responses API: {error}"))
        })?;
        let event = match event {
            Event::Text {
                output_index,
                delta,
            } if self.asides.contains(&output_index) => Some(ModelEvent::Reasoning(delta)),
            Event::Text { delta, .. } => Some(ModelEvent::Text(delta)),
            Event::Reasoning { delta } => Some(ModelEvent::Reasoning(delta)),
            Event::Added { output_index, item } => self.begin(output_index, &item),
            Event::Arguments {
                output_index,
                delta,
            } => {
                let index = *self.calls.get(&output_index).ok_or_else(|| {
                    ProviderError::Protocol(
                        "a tool call's arguments came before its name".to_owned(),
                    )
                })?;
                Some(ModelEvent::ToolCallArguments {
                    index,
                    piece: delta,
                })
            }
            Event::Done { item } => {
                self.keep(item)?;
                None
            }
            Event::Ended { response } => {
                if let Some(error) = response.error.as_ref().filter(|error| !error.is_null()) {
                    return Err(self.failure(error));
                }
                if ["failed", "cancelled"].contains(&response.status.as_str()) {
                    return Err(ProviderError::Protocol(
                        "the response failed without a reason".to_owned(),
                    ));
                }
                self.ending = Some(response);
                None
            }
            Event::Error {
                code,
                message,
                error,
            } => {
                let error = error.unwrap_or_else(|| json!({"code": code, "message": message}));
                return Err(self.failure(&error));
            }
            Event::Other => None,
        };
        self.said_bytes += event.as_ref().map_or(0, ModelEvent::bytes);
        Ok(event)
    }

    fn begin(&mut self, place: u64, item: &Value) -> Option<ModelEvent> {
        if item["type"] == "message" {
            if item["phase"] == "commentary" {
                self.asides.insert(place);
                return None;
            }
            // An answer of several parts: each is a paragraph of its own.
            let follows = std::mem::replace(&mut self.answers, true);
            return follows.then(|| ModelEvent::Text("\n\n".to_owned()));
        }
        if item["type"] != "function_call" {
            return None;
        }
        let index = self.calls.len();
        self.calls.insert(place, index);
        let text = |key: &str| item[key].as_str().unwrap_or_default().to_owned();
        Some(ModelEvent::ToolCallStarted {
            index,
            id: text("call_id"),
            name: text("name"),
        })
    }

    fn keep(&mut self, item: Value) -> Result<(), ProviderError> {
        let item = match item["type"].as_str() {
            Some("function_call") => json!({"type": "function_call", "call_id": item["call_id"]}),
            Some("reasoning" | "message") => item,
            _ => return Ok(()),
        };
        self.weight.add(&item)?;
        self.items.push(item);
        Ok(())
    }

    fn failure(&self, error: &Value) -> ProviderError {
        let told = error_object(&json!({"error": error}), &self.key);
        match error["code"].as_str() {
            Some("server_error") => ProviderError::Unavailable("server_error".into()),
            _ => told.unwrap_or_else(|| {
                ProviderError::Protocol("an error without a message".to_owned())
            }),
        }
    }

    fn finish(self, prompt_bytes: usize, of: Owner) -> Result<Vec<ModelEvent>, ProviderError> {
        let Some(ending) = self.ending else {
            return Err(ProviderError::Protocol(
                "the stream was cut before its finish".to_owned(),
            ));
        };
        let cut = ending.incomplete_details.and_then(|cut| cut.reason);
        let reason = match (ending.status.as_str(), cut.as_deref()) {
            ("incomplete", Some("content_filter")) => FinishReason::ContentFilter,
            ("incomplete", _) => FinishReason::Length,
            _ if self.calls.is_empty() => FinishReason::Stop,
            _ => FinishReason::ToolCalls,
        };
        let mut events = Vec::new();
        let thought = self.items.iter().any(|item| item["type"] == "reasoning");
        if thought && !self.calls.is_empty() {
            let value = Value::Array(self.items);
            events.push(ModelEvent::State(ProviderState::new(of, value)));
        }
        let usage = ending.usage.map_or_else(
            || Usage {
                prompt_tokens: (prompt_bytes as u64).div_ceil(4),
                completion_tokens: (self.said_bytes as u64).div_ceil(4),
                estimated: true,
                ..Usage::default()
            },
            |usage| Usage {
                prompt_tokens: usage.input_tokens,
                completion_tokens: usage.output_tokens,
                cached_tokens: usage
                    .input_tokens_details
                    .and_then(|details| details.cached_tokens)
                    .unwrap_or(0),
                reasoning_tokens: usage
                    .output_tokens_details
                    .and_then(|details| details.reasoning_tokens)
                    .unwrap_or(0),
                estimated: false,
            },
        );
        events.push(ModelEvent::Finished { reason, usage });
        Ok(events)
    }
}
