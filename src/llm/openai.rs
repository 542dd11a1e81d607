//! OpenAI's chat completions, and everything compatible with them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use reqwest::header::CONTENT_TYPE;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::http::{HttpClient, error_object};
use super::responses::{self, AskedThere};
use super::state::{Owner, Weight};
use super::{
    Effort, FinishReason, Message, ModelEvent, ModelRequest, ModelStream, Part, Provider,
    ProviderError, ProviderState, ResponseFormat, ToolCall, ToolChoice, Usage,
};

/// Where a compatible provider departs from OpenAI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dialect {
    /// What the limit of tokens is called.
    max_tokens: &'static str,
    /// What the seed is called.
    seed: &'static str,
    /// Whether it takes a JSON schema.
    json_schema: bool,
    /// Whether it takes `logit_bias`.
    logit_bias: bool,
    /// Whether answers must come with what was thought before them, be it nothing, once there are tools, and `thinking` can be switched off
    /// (`DeepSeek`, "Thinking mode").
    thoughts_with_calls: bool,
    /// Whether it is Google's. From its third generation on calls of tools must be signed ("Thought signatures"); before it, JSON cannot be asked for
    /// beside tools.
    google: bool,
}

impl Dialect {
    pub(super) const OPENAI: Self = Self {
        max_tokens: "max_completion_tokens",
        seed: "seed",
        json_schema: true,
        logit_bias: true,
        thoughts_with_calls: false,
        google: false,
    };
    pub(super) const COMPATIBLE: Self = Self {
        max_tokens: "max_tokens",
        ..Self::OPENAI
    };
    pub(super) const GOOGLE: Self = Self {
        google: true,
        ..Self::COMPATIBLE
    };
    pub(super) const MISTRAL: Self = Self {
        seed: "random_seed",
        logit_bias: false,
        ..Self::COMPATIBLE
    };
    pub(super) const DEEPSEEK: Self = Self {
        json_schema: false,
        logit_bias: false,
        thoughts_with_calls: true,
        ..Self::COMPATIBLE
    };
}

/// A provider that speaks OpenAI's format.
#[derive(Debug)]
pub(super) struct OpenAi {
    pub(super) client: HttpClient,
    /// The provider's name, which its states bear.
    pub(super) name: String,
    pub(super) base_url: String,
    pub(super) key: SecretString,
    pub(super) dialect: Dialect,
    pub(super) guarded: bool,
    /// Which models answer through the Responses API alone.
    pub(super) asked_there: Arc<AskedThere>,
}

impl OpenAi {
    /// A request to be sent, with the key.
    pub(super) fn post(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<(reqwest::RequestBuilder, usize), ProviderError> {
        let body = serde_json::to_vec(body).map_err(|error| {
            ProviderError::Protocol(format!("the request cannot be written: {error}"))
        })?;
        let bytes = body.len();
        let mut post = self
            .client
            .of(self.guarded)
            .post(format!("{}/{path}", self.base_url))
            .header(CONTENT_TYPE, "application/json")
            .body(body);
        if !self.key.expose_secret().is_empty() {
            post = post.bearer_auth(self.key.expose_secret());
        }
        Ok((post, bytes))
    }

    /// Whose the states are that come with this model's answers.
    pub(super) fn of(&self, model: &str) -> Owner {
        Owner::new(&self.name, &self.base_url, &self.key, model)
    }

    /// Asks where the model is to be asked, and gives back the states of the owner that is named.
    async fn ask(
        &self,
        request: &ModelRequest,
        given_back: Option<&Owner>,
    ) -> Result<ModelStream, ProviderError> {
        let uses_tools = !request.tools.is_empty();
        if self
            .asked_there
            .has(&self.base_url, &request.model, uses_tools)
        {
            return responses::stream(self, request, given_back).await;
        }
        match self.complete(request, given_back).await {
            // OpenAI's newer models think, and use no tools here while they do. It says so, and where they are to be asked.
            Err(ProviderError::Rejected(reason)) if reason.contains("v1/responses") => {
                self.asked_there
                    .add(&self.base_url, &request.model, uses_tools);
                responses::stream(self, request, given_back).await
            }
            answer => answer,
        }
    }

    async fn complete(
        &self,
        request: &ModelRequest,
        given_back: Option<&Owner>,
    ) -> Result<ModelStream, ProviderError> {
        let of = self.of(&request.model);
        let always = self.dialect.thoughts_with_calls && !request.tools.is_empty();
        let (post, prompt_bytes) = self.post(
            "chat/completions",
            &body(request, self.dialect, given_back)?,
        )?;
        let permit = request.permit.as_deref();
        let mut reader = Reader {
            key: self.key.clone(),
            whole: request.whole,
            keeps: always,
            ..Reader::default()
        };
        if request.whole {
            let mut events = reader.read(&self.client.answer(post, permit, &self.key).await?)?;
            events.extend(reader.finish(prompt_bytes, of)?);
            return Ok(futures::stream::iter(events).map(Ok).boxed());
        }
        let mut events = self.client.events(post, permit, &self.key).await?.boxed();
        let stream = async_stream::try_stream! {
            while let Some(data) = events.next().await {
                let data = data?;
                if data == "[DONE]" {
                    break;
                }
                for event in reader.read(data.as_bytes())? {
                    yield event;
                }
            }
            for event in reader.finish(prompt_bytes, of)? {
                yield event;
            }
        };
        Ok(stream.boxed())
    }
}

#[async_trait]
impl Provider for OpenAi {
    async fn stream(&self, request: ModelRequest) -> Result<ModelStream, ProviderError> {
        let of = self.of(&request.model);
        match self.ask(&request, Some(&of)).await {
            // A gateway may give what it does not take back, or have lost what it sealed.
            Err(ProviderError::Rejected(_)) if request.gives_back(&of) => {
                self.ask(&request, None).await
            }
            answer => answer,
        }
    }

    fn supports_format(&self, request: &ModelRequest) -> bool {
        let beside_tools = !request.tools.is_empty();
        let refused = self.dialect.google && beside_tools && !must_be_signed(&request.model);
        self.dialect.json_schema && !refused
    }
}

/// A tool as OpenAI writes it.
#[derive(Serialize)]
struct WrittenTool<'a> {
    r#type: &'static str,
    function: WrittenFunction<'a>,
}

#[derive(Serialize)]
struct WrittenFunction<'a> {
    name: &'a str,
    parameters: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<&'a str>,
}

/// The request's body. Tools are written as they stand: they go out with every request, and a copy of them as
/// values would cost more than all the rest.
#[derive(Serialize)]
struct Body<'a> {
    #[serde(flatten)]
    settings: Map<String, Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tools: Vec<WrittenTool<'a>>,
}

fn body<'a>(
    request: &'a ModelRequest,
    dialect: Dialect,
    of: Option<&Owner>,
) -> Result<Body<'a>, ProviderError> {
    let tools = request.tools.iter().map(|tool| WrittenTool {
        r#type: "function",
        function: WrittenFunction {
            name: &tool.name,
            parameters: &tool.parameters,
            description: tool.description.as_deref(),
        },
    });
    Ok(Body {
        settings: settings(request, dialect, of)?,
        tools: tools.collect(),
    })
}

/// Everything in the body but the tools.
fn settings(
    request: &ModelRequest,
    dialect: Dialect,
    of: Option<&Owner>,
) -> Result<Map<String, Value>, ProviderError> {
    let system = request
        .system
        .iter()
        .map(|text| json!({"role": "system", "content": text}));
    let said = request.messages.iter().map(|said| {
        let mut written = message(said);
        if let Message::Assistant { tool_calls, .. } = said {
            give_back(of.and_then(|of| said.state_for(of)), &mut written);
            let thinks = dialect.thoughts_with_calls && !request.tools.is_empty();
            if thinks && written.get("reasoning_content").is_none() {
                written["reasoning_content"] = json!("");
            }
            if dialect.google && !tool_calls.is_empty() && must_be_signed(&request.model) {
                sign(&mut written);
            }
        }
        written
    });
    let messages: Vec<Value> = system.chain(said).collect();
    let mut body = Map::new();
    let mut set = |key: &str, value: Value| {
        if !value.is_null() {
            body.insert(key.to_owned(), value);
        }
    };
    set("model", json!(request.model));
    set("messages", Value::Array(messages));
    if !request.whole {
        set("stream", json!(true));
        set("stream_options", json!({"include_usage": true}));
    }
    set(
        "tool_choice",
        match &request.tool_choice {
            None => Value::Null,
            Some(ToolChoice::None) => json!("none"),
            Some(ToolChoice::Auto) => json!("auto"),
            Some(ToolChoice::Required) => json!("required"),
            Some(ToolChoice::Named(name)) => {
                json!({"type": "function", "function": {"name": name}})
            }
        },
    );
    set("parallel_tool_calls", json!(request.parallel_tool_calls));
    set(
        "response_format",
        match &request.response_format {
            ResponseFormat::Text => Value::Null,
            ResponseFormat::JsonObject => json!({"type": "json_object"}),
            ResponseFormat::JsonSchema {
                name,
                description,
                schema,
                strict,
            } => {
                let mut wish = json!({"name": name, "schema": schema});
                for (key, value) in [
                    ("description", json!(description)),
                    ("strict", json!(strict)),
                ] {
                    if !value.is_null() {
                        wish[key] = value;
                    }
                }
                json!({"type": "json_schema", "json_schema": wish})
            }
        },
    );
    let sampling = &request.sampling;
    set("temperature", json!(sampling.temperature));
    set("top_p", json!(sampling.top_p));
    set(dialect.max_tokens, json!(sampling.max_tokens));
    set(dialect.seed, json!(sampling.seed));
    set("presence_penalty", json!(sampling.presence_penalty));
    set("frequency_penalty", json!(sampling.frequency_penalty));
    if !sampling.stop.is_empty() {
        set("stop", json!(sampling.stop));
    }
    match &sampling.logit_bias {
        Some(_) if !dialect.logit_bias => return Err(ProviderError::Unsupported("logit_bias")),
        bias => set("logit_bias", json!(bias)),
    }
    // These think when they are not asked, and while they do they cannot be made to call a tool.
    let silenced = dialect.thoughts_with_calls
        && (request.forces_a_call() || request.reasoning == Some(Effort::Off));
    if silenced {
        set("thinking", json!({"type": "disabled"}));
    }
    set(
        "reasoning_effort",
        match request.reasoning {
            // Models that do not reason refuse the parameter; not to ask is not to think.
            None | Some(Effort::Off) => Value::Null,
            Some(_) if silenced => Value::Null,
            Some(Effort::Xhigh) if dialect.google => json!(Effort::High),
            effort => json!(effort),
        },
    );
    Ok(body)
}

/// Writes what a provider wants back into the answer that it came with: beside its text, and into its calls.
fn give_back(state: Option<&Value>, answer: &mut Value) {
    let members = state.and_then(Value::as_object).into_iter().flatten();
    for (name, value) in members {
        if name == "calls" {
            for (place, extra) in value.as_object().into_iter().flatten() {
                let place: Option<usize> = place.parse().ok();
                if let Some(call) = place.and_then(|place| answer["tool_calls"].get_mut(place)) {
                    call["extra_content"] = extra.clone();
                }
            }
        } else {
            answer[name.as_str()] = value.clone();
        }
    }
}

/// Whether a model refuses calls without a signature: Gemini from its third generation on.
fn must_be_signed(model: &str) -> bool {
    let generation = model
        .rsplit('/')
        .next()
        .and_then(|name| name.strip_prefix("gemini-"));
    generation.is_some_and(|rest| !rest.starts_with("1.") && !rest.starts_with("2."))
}

/// Says of an answer's first call that there is no signature, if there is none: another model made it, or it is older than signatures.
fn sign(answer: &mut Value) {
    let first = &mut answer["tool_calls"][0];
    if first.get("extra_content").is_none() {
        // Google's own word for it.
        first["extra_content"] =
            json!({"google": {"thought_signature": "skip_thought_signature_validator"}});
    }
}

fn message(message: &Message) -> Value {
    match message {
        Message::System { content } => json!({"role": "system", "content": content}),
        Message::User { content } => match content.as_slice() {
            [Part::Text { text }] => json!({"role": "user", "content": text}),
            parts => json!({"role": "user", "content": parts.iter().map(part).collect::<Vec<_>>()}),
        },
        Message::Assistant {
            content,
            tool_calls,
            ..
        } => {
            let mut object = json!({"role": "assistant", "content": content});
            if !tool_calls.is_empty() {
                object["tool_calls"] = tool_calls.iter().map(written_call).collect();
            }
            object
        }
        Message::Tool {
            tool_call_id,
            content,
            ..
        } => {
            json!({"role": "tool", "tool_call_id": tool_call_id, "content": content})
        }
    }
}

fn written_call(call: &ToolCall) -> Value {
    json!({"id": call.id, "type": "function",
           "function": {"name": call.name, "arguments": call.arguments}})
}

fn part(part: &Part) -> Value {
    match part {
        Part::Text { text } => json!({"type": "text", "text": text}),
        Part::Image { url } => json!({"type": "image_url", "image_url": {"url": url}}),
    }
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<ChunkUsage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    /// In a stream it is called `delta`, in a whole answer `message`.
    #[serde(default, alias = "message", deserialize_with = "or_default")]
    delta: Delta,
    finish_reason: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Delta {
    content: Option<Content>,
    reasoning_content: Option<String>,
    reasoning: Option<String>,
    /// OpenRouter's record of what was thought, in pieces.
    reasoning_details: Option<Vec<Value>>,
    tool_calls: Option<Vec<CallDelta>>,
}

#[derive(Deserialize)]
struct CallDelta {
    index: Option<usize>,
    id: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    function: FunctionDelta,
    /// Where Google's signature stands.
    extra_content: Option<Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct FunctionDelta {
    name: Option<String>,
    #[serde(deserialize_with = "arguments")]
    arguments: Option<String>,
}

/// What null stands for too.
fn or_default<'de, T: Default + Deserialize<'de>, D: serde::Deserializer<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(from)?.unwrap_or_default())
}

/// What is said: a text, as OpenAI has it, or parts of which some are the model's thinking, as Mistral sends them.
#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

#[derive(Deserialize)]
struct ContentPart {
    #[serde(default)]
    text: String,
    #[serde(default, deserialize_with = "or_default")]
    thinking: Vec<ContentPart>,
}

impl Content {
    /// What is thought, and what is said.
    fn split(self) -> (String, String) {
        let parts = match self {
            Self::Text(text) => return (String::new(), text),
            Self::Parts(parts) => parts,
        };
        let (mut thought, mut said) = (String::new(), String::new());
        for part in parts {
            said.push_str(&part.text);
            for part in part.thinking {
                thought.push_str(&part.text);
            }
        }
        (thought, said)
    }
}

/// JSON text, as OpenAI has it; or the object itself, as some that speak its format send it.
fn arguments<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(match Option::<Value>::deserialize(from)? {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(text),
        Some(given) => Some(given.to_string()),
    })
}

#[derive(Deserialize)]
struct ChunkUsage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    #[serde(default)]
    total_tokens: u64,
    prompt_tokens_details: Option<PromptDetails>,
    completion_tokens_details: Option<CompletionDetails>,
}

#[derive(Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct CompletionDetails {
    reasoning_tokens: Option<u64>,
}

/// Reads the chunks of one answer.
#[derive(Default)]
struct Reader {
    /// What an error in the middle may quote.
    key: SecretString,
    /// Ours by the provider's index: some count from 1, or give every call the same one.
    calls: HashMap<usize, usize>,
    begun: usize,
    /// Calls that were given no arguments so far.
    bare: BTreeSet<usize>,
    reason: Option<FinishReason>,
    usage: Option<Usage>,
    said_bytes: usize,
    /// Whether the answer comes in one piece.
    whole: bool,
    /// Whether its state is kept though it calls no tools.
    keeps: bool,
    state: State,
    weight: Weight,
}

/// What is wanted back with an answer, as it comes.
#[derive(Default, Serialize)]
struct State {
    /// What was thought, under the one name of several whose owners want it back.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reasoning_details: Vec<Map<String, Value>>,
    /// By the call's place in the answer.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    calls: BTreeMap<usize, Value>,
}

impl State {
    fn is_empty(&self) -> bool {
        self.reasoning_content.is_none()
            && self.reasoning_details.is_empty()
            && self.calls.is_empty()
    }

    /// Adds what comes of the record: an entry, or a piece that goes on with the last one, which bears its number.
    fn add_detail(&mut self, piece: Map<String, Value>, whole: bool) {
        let number = piece.get("index").filter(|number| !number.is_null());
        let goes_on = |last: &Map<String, Value>| {
            !whole
                && number.is_some_and(|number| last.get("index") == Some(number))
                && piece
                    .get("type")
                    .is_none_or(|kind| last.get("type") == Some(kind))
        };
        let last = self.reasoning_details.last_mut();
        let Some(last) = last.filter(|last| goes_on(last)) else {
            self.reasoning_details.push(piece);
            return;
        };
        for (name, value) in piece {
            match (name.as_str(), last.get_mut(&name), value) {
                ("text" | "summary" | "data", Some(Value::String(so_far)), Value::String(more)) => {
                    so_far.push_str(&more)
                }
                (_, Some(_), Value::Null) => {}
                (_, _, value) => {
                    last.insert(name, value);
                }
            }
        }
    }
}

impl Reader {
    /// Reads a chunk, or a whole answer, which is a chunk that says everything.
    fn read(&mut self, data: &[u8]) -> Result<Vec<ModelEvent>, ProviderError> {
        let chunk: Chunk = serde_json::from_slice(data).map_err(|error| {
            ProviderError::Protocol(format!("it is not a chat completion: {error}"))
        })?;
        if let Some(error) = chunk.error.filter(|error| !error.is_null()) {
            return Err(
                error_object(&json!({"error": error}), &self.key).unwrap_or_else(|| {
                    ProviderError::Protocol("an error without a message".to_owned())
                }),
            );
        }
        if let Some(usage) = chunk.usage {
            // Some leave what was thought out of the completion, but not out of the sum.
            let told = usage.prompt_tokens.saturating_add(usage.completion_tokens);
            let untold = usage.total_tokens.saturating_sub(told);
            self.usage = Some(Usage {
                prompt_tokens: usage.prompt_tokens,
                completion_tokens: usage.completion_tokens.saturating_add(untold),
                cached_tokens: usage
                    .prompt_tokens_details
                    .and_then(|details| details.cached_tokens)
                    .unwrap_or(0),
                reasoning_tokens: usage
                    .completion_tokens_details
                    .and_then(|details| details.reasoning_tokens)
                    .unwrap_or(untold),
                estimated: false,
            });
        }
        let mut events = Vec::new();
        for choice in chunk.choices.into_iter().take(1) {
            let delta = choice.delta;
            let (thought, said) = delta.content.map(Content::split).unwrap_or_default();
            if let Some(thought) = &delta.reasoning_content {
                self.weight.add_bytes(thought.len())?;
                let so_far = self.state.reasoning_content.get_or_insert_default();
                so_far.push_str(thought);
            }
            for piece in delta.reasoning_details.into_iter().flatten() {
                self.weight.add(&piece)?;
                if let Value::Object(piece) = piece {
                    self.state.add_detail(piece, self.whole);
                }
            }
            let reasoning = delta.reasoning_content.or(delta.reasoning);
            let thought = reasoning.filter(|text| !text.is_empty()).unwrap_or(thought);
            if !thought.is_empty() {
                events.push(ModelEvent::Reasoning(thought));
            }
            if !said.is_empty() {
                events.push(ModelEvent::Text(said));
            }
            for mut call in delta.tool_calls.into_iter().flatten() {
                // Whole answers, and some providers' streams, number calls by their place.
                call.index = call.index.or(call.id.is_some().then_some(self.begun));
                self.read_call(call, &mut events)?;
            }
            if let Some(word) = choice.finish_reason {
                self.reason = Some(reason_of(&word));
            }
        }
        for event in &events {
            self.said_bytes += event.bytes();
        }
        Ok(events)
    }

    fn read_call(
        &mut self,
        call: CallDelta,
        events: &mut Vec<ModelEvent>,
    ) -> Result<(), ProviderError> {
        let theirs = call.index.unwrap_or(self.begun.saturating_sub(1));
        let starts = call.function.name.filter(|name| !name.is_empty());
        // A name begins a call, unless it repeats that of the call under way.
        let index = match (self.calls.get(&theirs), starts) {
            (Some(index), None) => *index,
            (Some(index), Some(_)) if call.id.as_deref().is_none_or(str::is_empty) => *index,
            (_, Some(name)) => {
                let index = self.begun;
                self.begun += 1;
                self.calls.insert(theirs, index);
                self.bare.insert(index);
                let id = call
                    .id
                    .filter(|id| !id.is_empty())
                    .unwrap_or_else(|| format!("call_{}", uuid::Uuid::now_v7().simple()));
                events.push(ModelEvent::ToolCallStarted { index, id, name });
                index
            }
            (None, None) => {
                return Err(ProviderError::Protocol(
                    "a tool call's arguments came before its name".to_owned(),
                ));
            }
        };
        if let Some(extra) = call.extra_content.filter(|extra| !extra.is_null()) {
            self.weight.add(&extra)?;
            self.state.calls.insert(index, extra);
        }
        if let Some(piece) = call.function.arguments.filter(|piece| !piece.is_empty()) {
            self.bare.remove(&index);
            events.push(ModelEvent::ToolCallArguments { index, piece });
        }
        Ok(())
    }

    fn finish(self, prompt_bytes: usize, of: Owner) -> Result<Vec<ModelEvent>, ProviderError> {
        let Some(reason) = self.reason else {
            return Err(ProviderError::Protocol(
                "the stream was cut before its finish".to_owned(),
            ));
        };
        // What it says of calls is less than whether there are any.
        let reason = match reason {
            FinishReason::Stop if self.begun > 0 => FinishReason::ToolCalls,
            FinishReason::ToolCalls if self.begun == 0 => FinishReason::Stop,
            reason => reason,
        };
        let usage = self.usage.unwrap_or(Usage {
            prompt_tokens: (prompt_bytes as u64).div_ceil(4),
            completion_tokens: (self.said_bytes as u64).div_ceil(4),
            estimated: true,
            ..Usage::default()
        });
        // No arguments are none of them, which is JSON too.
        let mut events: Vec<ModelEvent> = self
            .bare
            .into_iter()
            .map(|index| ModelEvent::ToolCallArguments {
                index,
                piece: "{}".to_owned(),
            })
            .collect();
        if (self.begun > 0 || self.keeps) && !self.state.is_empty() {
            let value = json!(self.state);
            events.push(ModelEvent::State(ProviderState::new(of, value)));
        }
        events.push(ModelEvent::Finished { reason, usage });
        Ok(events)
    }
}

fn reason_of(word: &str) -> FinishReason {
    match word {
        "length" | "model_length" => FinishReason::Length,
        "tool_calls" | "function_call" => FinishReason::ToolCalls,
        "content_filter" => FinishReason::ContentFilter,
        _ => FinishReason::Stop,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_without_calls_did_not_end_with_them() {
        let mut reader = Reader::default();
        let owner = Owner::new("openai", "", &SecretString::default(), "m");
        let chunk =
            json!({"choices": [{"delta": {"content": "Hi"}, "finish_reason": "tool_calls"}]});
        reader.read(chunk.to_string().as_bytes()).unwrap();
        let [ModelEvent::Finished { reason, .. }] = reader.finish(0, owner).unwrap()[..] else {
            panic!("it has finished")
        };
        assert_eq!(reason, FinishReason::Stop);
    }

    #[test]
    fn what_was_thought_counts_where_only_the_sum_tells_of_it_and_no_arguments_are_json() {
        let mut reader = Reader::default();
        let owner = Owner::new("google", "", &SecretString::default(), "m");
        let chunk = json!({"choices": [{"delta": {"tool_calls": [{"id": "c", "function": {"name": "look", "arguments": ""}}]}, "finish_reason": "tool_calls"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 30, "total_tokens": 150}});
        reader.read(chunk.to_string().as_bytes()).unwrap();
        let [
            ModelEvent::ToolCallArguments { piece, .. },
            ModelEvent::Finished { usage, .. },
        ] = &reader.finish(0, owner).unwrap()[..]
        else {
            panic!("it has finished")
        };
        assert_eq!(
            (
                piece.as_str(),
                usage.completion_tokens,
                usage.reasoning_tokens
            ),
            ("{}", 50, 20)
        );
    }

    #[test]
    fn an_error_in_the_middle_quotes_no_key() {
        let mut reader = Reader {
            key: SecretString::from("gsk_4711abc"),
            ..Reader::default()
        };
        let error = json!({"error": {"message": "gsk_4711abc is over its quota."}});
        let error = reader.read(error.to_string().as_bytes()).unwrap_err();
        assert!(
            error.to_string().ends_with("[key] is over its quota."),
            "{error}"
        );
    }

    #[test]
    fn content_may_be_parts_of_which_some_are_thoughts() {
        for (content, thought, said) in [
            (json!("Hi"), "", "Hi"),
            (json!([{"type": "text", "text": "Hi"}]), "", "Hi"),
            (
                json!([{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Hi"}]),
                "Hm.",
                "Hi",
            ),
        ] {
            let chunk = json!({"choices": [{"delta": {"content": content}}]});
            let chunk: Chunk = serde_json::from_value(chunk).unwrap();
            let [choice] = chunk.choices.try_into().ok().unwrap();
            let content = choice.delta.content.unwrap();
            assert_eq!(content.split(), (thought.to_owned(), said.to_owned()));
        }
        for chunk in [
            json!({"choices": [{"delta": null}]}),
            json!({"choices": [{"delta": {"tool_calls": [{"function": null}]}}]}),
        ] {
            assert!(serde_json::from_value::<Chunk>(chunk).is_ok());
        }
    }
}
