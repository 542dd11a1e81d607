//! Anthropic's Messages API, version 2023-06-01.

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::http::{HttpClient, error_object};
use super::state::{Owner, Weight};
use super::{
    Effort, FinishReason, Message, ModelEvent, ModelRequest, ModelStream, Part, Provider,
    ProviderError, ProviderState, ToolCall, ToolChoice, Usage,
};

/// The API wants a limit; this is what every model of before 4.6 can write.
const USUAL_TOKENS: u32 = 8192;
/// The same of later ones, which may think without being asked, and within the limit.
const USUAL_TOKENS_THINKING: u32 = 32_000;
/// The least that the API takes for thinking.
const LEAST_THINKING: u32 = 1024;

/// Anthropic, or a gateway that speaks its format.
#[derive(Debug)]
pub(super) struct Anthropic {
    client: HttpClient,
    base_url: String,
    key: SecretString,
    guarded: bool,
}

impl Anthropic {
    pub(super) fn new(
        client: HttpClient,
        base_url: String,
        key: SecretString,
        guarded: bool,
    ) -> Self {
        Self {
            client,
            base_url,
            key,
            guarded,
        }
    }
}

impl Anthropic {
    /// Asks, and gives back the states of the owner that is named.
    async fn ask(
        &self,
        request: &ModelRequest,
        given_back: Option<&Owner>,
    ) -> Result<BoxStream<'static, Result<String, ProviderError>>, ProviderError> {
        let post = self
            .client
            .of(self.guarded)
            .post(format!("{}/v1/messages", self.base_url))
            .header("x-api-key", self.key.expose_secret())
            .header("anthropic-version", "2023-06-01")
            .json(&body(request, given_back)?);
        let permit = request.permit.as_deref();
        Ok(self.client.events(post, permit, &self.key).await?.boxed())
    }
}

#[async_trait]
impl Provider for Anthropic {
    async fn stream(&self, request: ModelRequest) -> Result<ModelStream, ProviderError> {
        let of = Owner::new("anthropic", &self.base_url, &self.key, &request.model);
        let gives_back = request.gives_back(&of);
        let answer = match self.ask(&request, Some(&of)).await {
            // Its newer models take their thoughts back only with all that stood before them, and memories and tools may have changed.
            Err(ProviderError::Rejected(_)) if gives_back => self.ask(&request, None).await,
            answer => answer,
        };
        let mut events = answer?;
        let mut reader = Reader {
            key: self.key.clone(),
            ..Reader::default()
        };
        let stream = async_stream::try_stream! {
            while let Some(data) = events.next().await {
                if let Some(event) = reader.read(&data?)? {
                    yield event;
                }
                if reader.stopped {
                    break;
                }
            }
            for event in reader.finish(of)? {
                yield event;
            }
        };
        Ok(stream.boxed())
    }
}

fn body(request: &ModelRequest, of: Option<&Owner>) -> Result<Value, ProviderError> {
    let sampling = &request.sampling;
    for (param, set) in [
        ("seed", sampling.seed.is_some()),
        ("presence_penalty", sampling.presence_penalty.is_some()),
        ("frequency_penalty", sampling.frequency_penalty.is_some()),
        ("logit_bias", sampling.logit_bias.is_some()),
        (
            "temperature",
            sampling
                .temperature
                .is_some_and(|temperature| temperature > 1.0),
        ),
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
    let adaptive = thinks_adaptively(&request.model);
    // With a number of tokens to think, the API wants the calls since the user last spoke to begin with what was thought: where that is missing, it does
    // not think until the caller speaks again.
    // And while it thinks it cannot be made to call a tool.
    let effort = request.reasoning.filter(|_| {
        !request.forces_a_call() && (adaptive || begins_with_thoughts(&request.messages, of))
    });
    let most = most_tokens(&request.model).unwrap_or(u32::MAX);
    let usual = if adaptive {
        USUAL_TOKENS_THINKING
    } else {
        USUAL_TOKENS
    };
    let answer_tokens = sampling.max_tokens.unwrap_or(usual.min(most));
    // What thinking adds is cut where the model's limit is.
    let thinking = effort
        .and_then(thinking_tokens)
        .map(|tokens| tokens.min(most.saturating_sub(answer_tokens)))
        .filter(|tokens| *tokens >= LEAST_THINKING);
    set("model", json!(request.model));
    set("stream", json!(true));
    // Thinking counts into the limit, and the limit must be above it.
    set(
        "max_tokens",
        json!(answer_tokens.saturating_add(thinking.unwrap_or(0))),
    );
    set("system", json!(request.system));
    let mut said = messages(&request.messages, of);
    if !request.tools.is_empty() {
        remember_prefix(&mut said);
    }
    set("messages", said);
    match (effort, thinking) {
        (Some(effort), _) if adaptive && effort != Effort::Off => {
            // Left to itself it does not tell what it thinks.
            set(
                "thinking",
                json!({"type": "adaptive", "display": "summarized"}),
            );
            set("output_config", json!({"effort": effort_word(effort)}));
        }
        (_, Some(tokens)) => set(
            "thinking",
            json!({"type": "enabled", "budget_tokens": tokens}),
        ),
        _ => {}
    }
    // While it thinks, the API takes no other temperature than its own.
    if thinking.is_none() {
        set("temperature", json!(sampling.temperature));
    } else if sampling
        .temperature
        .is_some_and(|temperature| (temperature - 1.0).abs() > f64::EPSILON)
    {
        return Err(ProviderError::Unsupported("temperature"));
    }
    set("top_p", json!(sampling.top_p));
    if !sampling.stop.is_empty() {
        set("stop_sequences", json!(sampling.stop));
    }
    if !request.tools.is_empty() {
        let tools = request.tools.iter().map(|tool| {
            let mut object = json!({"name": tool.name, "input_schema": tool.parameters});
            object["input_schema"]["type"] = json!("object");
            if let Some(description) = &tool.description {
                object["description"] = json!(description);
            }
            object
        });
        set("tools", tools.collect());
        set("tool_choice", tool_choice(request));
    }
    Ok(Value::Object(body))
}

/// Whether a model decides itself how long it thinks, and refuses a number of tokens: Claude from 4.6 on ("Adaptive thinking"). Older ones,
/// and what others serve in this format, take a number.
fn thinks_adaptively(model: &str) -> bool {
    let Some((_, name)) = model.split_once("claude-") else {
        return false;
    };
    // `opus-4-7`, `sonnet-4-5-20250929`, `3-7-sonnet-latest`, `opus-4-20250514`
    let mut version = name
        .split(['-', '.', '@', ':'])
        .filter_map(|part| part.parse::<u32>().ok())
        .filter(|number| *number < 1_000);
    match version.next() {
        Some(major) => (major, version.next().unwrap_or(0)) >= (4, 6),
        None => true,
    }
}

/// The most that a model writes, thinking included ("Models overview"), of those that we know.
fn most_tokens(model: &str) -> Option<u32> {
    let model = model.rsplit('/').next().unwrap_or(model);
    let known = [
        ("claude-3-7", 64_000),
        ("claude-3", 8192),
        ("claude-opus-4-5", 64_000),
        ("claude-opus-4-6", 128_000),
        ("claude-opus-4-7", 128_000),
        ("claude-opus-4", 32_000),
        ("claude-sonnet-4", 64_000),
        ("claude-haiku-4", 64_000),
    ];
    known
        .iter()
        .find(|(prefix, _)| model.starts_with(prefix))
        .map(|(_, tokens)| *tokens)
}

fn effort_word(effort: Effort) -> &'static str {
    match effort {
        Effort::Off | Effort::Minimal | Effort::Low => "low",
        Effort::Medium => "medium",
        Effort::High => "high",
        Effort::Xhigh => "max",
    }
}

/// What thinking adds to the limit, and how much of it older models are given.
fn thinking_tokens(effort: Effort) -> Option<u32> {
    match effort {
        Effort::Off => None,
        Effort::Minimal => Some(LEAST_THINKING),
        Effort::Low => Some(2048),
        Effort::Medium => Some(8192),
        Effort::High => Some(16384),
        Effort::Xhigh => Some(24576),
    }
}

fn tool_choice(request: &ModelRequest) -> Value {
    let serial = request.parallel_tool_calls == Some(false);
    let mut choice = match &request.tool_choice {
        None if !serial => return Value::Null,
        None | Some(ToolChoice::Auto) => json!({"type": "auto"}),
        Some(ToolChoice::None) => return json!({"type": "none"}),
        Some(ToolChoice::Required) => json!({"type": "any"}),
        Some(ToolChoice::Named(name)) => json!({"type": "tool", "name": name}),
    };
    if serial {
        choice["disable_parallel_tool_use"] = json!(true);
    }
    choice
}

/// Whether what was thought before the first call since the user last spoke can be given back, if there is one. Before later ones nothing is thought
/// by models that are given a number of tokens.
fn begins_with_thoughts(messages: &[Message], of: Option<&Owner>) -> bool {
    messages
        .iter()
        .rev()
        .take_while(|message| !matches!(message, Message::User { .. } | Message::System { .. }))
        .filter(|message| matches!(message, Message::Assistant { tool_calls, .. } if !tool_calls.is_empty()))
        .last()
        .is_none_or(|first| of.is_some_and(|of| first.state_for(of).is_some()))
}

/// The conversation in alternating turns: neighbours of one role are joined, and what tools returned is said by the user.
fn messages(messages: &[Message], of: Option<&Owner>) -> Value {
    let mut turns: Vec<(&'static str, Vec<Value>)> = Vec::new();
    for message in messages {
        let (role, blocks) = match message {
            Message::System { content } => ("user", vec![text_block(content)]),
            Message::User { content } => ("user", content.iter().map(part).collect()),
            Message::Tool {
                tool_call_id,
                content,
                failed,
            } => {
                let mut result =
                    json!({"type": "tool_result", "tool_use_id": tool_call_id, "content": content});
                if *failed {
                    result["is_error"] = json!(true);
                }
                ("user", vec![result])
            }
            Message::Assistant {
                content,
                tool_calls,
                ..
            } => {
                let given = of.and_then(|of| message.state_for(of));
                let given = given.and_then(Value::as_array);
                let blocks = match given {
                    Some(given) => given
                        .iter()
                        .filter_map(|block| given_back(block, tool_calls))
                        .collect(),
                    None => content
                        .iter()
                        .map(|text| text_block(text))
                        .filter(|block| !is_blank(block))
                        .chain(tool_calls.iter().map(tool_use))
                        .collect(),
                };
                ("assistant", blocks)
            }
        };
        match turns.last_mut() {
            Some((last, said)) if *last == role => said.extend(blocks),
            _ if blocks.is_empty() => {}
            _ => turns.push((role, blocks)),
        }
    }
    turns
        .into_iter()
        .map(|(role, content)| json!({"role": role, "content": content}))
        .collect()
}

/// Has the provider keep what it has read, up to the last that the user said ("Prompt caching"): each step of an agent at work reads all of it again, for a tenth of
/// the price.
fn remember_prefix(messages: &mut Value) {
    let last = messages.as_array_mut().and_then(|said| said.last_mut());
    let last = last.filter(|message| message["role"] == "user");
    let block = last.and_then(|message| message["content"].as_array_mut()?.last_mut());
    if let Some(block) = block.filter(|block| !is_blank(block)) {
        block["cache_control"] = json!({"type": "ephemeral"});
    }
}

/// A block as it was given; of a call only its id is kept, the rest stands in the message.
fn given_back(block: &Value, calls: &[ToolCall]) -> Option<Value> {
    match block["type"].as_str() {
        Some("tool_use") => {
            let made = calls.iter().find(|call| block["id"] == call.id.as_str());
            made.map(tool_use)
        }
        _ => (!is_blank(block)).then(|| block.clone()),
    }
}

/// Whether it is a text that says nothing, which the API refuses.
fn is_blank(block: &Value) -> bool {
    block["type"] == "text"
        && block["text"]
            .as_str()
            .is_none_or(|text| text.trim().is_empty())
}

fn tool_use(call: &ToolCall) -> Value {
    // The API takes objects alone. A call that was cut off, or another model's, must not make a conversation unusable for good.
    let input = serde_json::from_str::<Map<String, Value>>(&call.arguments).unwrap_or_default();
    json!({"type": "tool_use", "id": call.id, "name": call.name, "input": input})
}

fn text_block(text: &str) -> Value {
    json!({"type": "text", "text": text})
}

fn part(part: &Part) -> Value {
    match part {
        Part::Text { text } => text_block(text),
        Part::Image { url } => match url
            .strip_prefix("data:")
            .and_then(|rest| rest.split_once(";base64,"))
        {
            Some((media_type, data)) => {
                json!({"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}})
            }
            None => json!({"type": "image", "source": {"type": "url", "url": url}}),
        },
    }
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event {
    MessageStart {
        message: Start,
    },
    ContentBlockStart {
        content_block: Value,
    },
    ContentBlockDelta {
        delta: Delta,
    },
    ContentBlockStop,
    MessageDelta {
        delta: End,
        usage: Option<EventUsage>,
    },
    MessageStop,
    Error {
        error: Value,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Start {
    usage: EventUsage,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Delta {
    #[serde(rename = "text_delta")]
    Text { text: String },
    #[serde(rename = "thinking_delta")]
    Thinking { thinking: String },
    #[serde(rename = "signature_delta")]
    Signature { signature: String },
    #[serde(rename = "input_json_delta")]
    InputJson { partial_json: String },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct End {
    stop_reason: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct EventUsage {
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
    cache_read_input_tokens: Option<u64>,
}

/// Reads the events of one answer. Blocks come one after the other, so a call's pieces belong to the last one begun.
#[derive(Default)]
struct Reader {
    /// What an error in the middle may quote.
    key: SecretString,
    calls: usize,
    /// Whether the block under way is a call that was given no arguments so far.
    bare: bool,
    /// What the answer consists of, as it was given; of calls the id alone.
    blocks: Vec<Value>,
    weight: Weight,
    usage: Usage,
    uncached: u64,
    written_to_cache: u64,
    reason: Option<FinishReason>,
    stopped: bool,
}

impl Reader {
    fn read(&mut self, data: &str) -> Result<Option<ModelEvent>, ProviderError> {
        let event: Event = serde_json::from_str(data).map_err(|error| {
            ProviderError::Protocol(format!("an event is not of the Messages API: {error}"))
        })?;
        Ok(match event {
            Event::MessageStart { message } => {
                self.count(&message.usage);
                None
            }
            Event::ContentBlockStart { content_block } => self.begin(content_block)?,
            Event::ContentBlockDelta { delta } => match delta {
                Delta::Text { text } => {
                    self.add("text", &text)?;
                    Some(ModelEvent::Text(text))
                }
                Delta::Thinking { thinking } => {
                    self.add("thinking", &thinking)?;
                    Some(ModelEvent::Reasoning(thinking)).filter(|event| event.bytes() > 0)
                }
                Delta::Signature { signature } => {
                    self.add("signature", &signature)?;
                    None
                }
                Delta::InputJson { partial_json } if partial_json.is_empty() => None,
                Delta::InputJson { partial_json } => {
                    self.bare = false;
                    let index = self.calls.checked_sub(1).ok_or_else(|| {
                        ProviderError::Protocol(
                            "a tool call's arguments came before its name".to_owned(),
                        )
                    })?;
                    Some(ModelEvent::ToolCallArguments {
                        index,
                        piece: partial_json,
                    })
                }
                Delta::Other => None,
            },
            // No arguments are none of them, which is JSON too.
            Event::ContentBlockStop if std::mem::take(&mut self.bare) => {
                Some(ModelEvent::ToolCallArguments {
                    index: self.calls.saturating_sub(1),
                    piece: "{}".to_owned(),
                })
            }
            Event::ContentBlockStop => None,
            Event::MessageDelta { delta, usage } => {
                if let Some(usage) = usage {
                    self.count(&usage);
                }
                if let Some(word) = delta.stop_reason {
                    self.reason = Some(reason_of(&word));
                }
                None
            }
            Event::MessageStop => {
                self.stopped = true;
                None
            }
            Event::Error { error } => {
                return Err(
                    error_object(&json!({"error": error}), &self.key).unwrap_or_else(|| {
                        ProviderError::Protocol("an error without a message".to_owned())
                    }),
                );
            }
            Event::Other => None,
        })
    }

    fn begin(&mut self, block: Value) -> Result<Option<ModelEvent>, ProviderError> {
        self.weight.add(&block)?;
        if block["type"] != "tool_use" {
            self.blocks.push(block);
            return Ok(None);
        }
        let text = |key: &str| block[key].as_str().unwrap_or_default().to_owned();
        self.blocks
            .push(json!({"type": "tool_use", "id": block["id"]}));
        self.calls += 1;
        self.bare = true;
        Ok(Some(ModelEvent::ToolCallStarted {
            index: self.calls - 1,
            id: text("id"),
            name: text("name"),
        }))
    }

    /// Adds to a member of the last block.
    fn add(&mut self, member: &str, more: &str) -> Result<(), ProviderError> {
        self.weight.add_bytes(more.len())?;
        let Some(block) = self.blocks.last_mut().and_then(Value::as_object_mut) else {
            return Ok(());
        };
        match block.get_mut(member) {
            Some(Value::String(so_far)) => so_far.push_str(more),
            _ => {
                block.insert(member.to_owned(), json!(more));
            }
        }
        Ok(())
    }

    /// Counts are totals so far; those not named stay.
    fn count(&mut self, usage: &EventUsage) {
        self.uncached = usage.input_tokens.unwrap_or(self.uncached);
        self.written_to_cache = usage
            .cache_creation_input_tokens
            .unwrap_or(self.written_to_cache);
        self.usage.cached_tokens = usage
            .cache_read_input_tokens
            .unwrap_or(self.usage.cached_tokens);
        self.usage.completion_tokens = usage.output_tokens.unwrap_or(self.usage.completion_tokens);
    }

    fn finish(self, of: Owner) -> Result<Vec<ModelEvent>, ProviderError> {
        let reason = self.reason.ok_or_else(|| {
            ProviderError::Protocol("the stream was cut before its finish".to_owned())
        })?;
        let cache = self
            .written_to_cache
            .saturating_add(self.usage.cached_tokens);
        let prompt_tokens = self.uncached.saturating_add(cache);
        let mut events = Vec::new();
        let thought = |block: &Value| {
            block["type"]
                .as_str()
                .is_some_and(|kind| kind.ends_with("thinking"))
        };
        if self.calls > 0 && self.blocks.iter().any(thought) {
            let value = Value::Array(self.blocks);
            events.push(ModelEvent::State(ProviderState::new(of, value)));
        }
        events.push(ModelEvent::Finished {
            reason,
            usage: Usage {
                prompt_tokens,
                ..self.usage
            },
        });
        Ok(events)
    }
}

fn reason_of(word: &str) -> FinishReason {
    match word {
        "max_tokens" | "model_context_window_exceeded" => FinishReason::Length,
        "tool_use" => FinishReason::ToolCalls,
        "refusal" => FinishReason::ContentFilter,
        _ => FinishReason::Stop,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_that_failed_is_told_as_one() {
        for failed in [false, true] {
            let result = Message::Tool {
                tool_call_id: "t".to_owned(),
                content: "It is not there.".to_owned(),
                failed,
            };
            let written = messages(&[result], None);
            let told = written[0]["content"][0].get("is_error").cloned();
            assert_eq!(told, failed.then_some(json!(true)));
        }
    }

    fn owner(model: &str) -> Owner {
        Owner::new("anthropic", "", &SecretString::default(), model)
    }

    fn called(arguments: &str) -> Message {
        Message::Assistant {
            content: None,
            tool_calls: vec![crate::llm::ToolCall {
                id: "t".to_owned(),
                name: "look".to_owned(),
                arguments: arguments.to_owned(),
            }],
            state: None,
        }
    }

    #[test]
    fn half_a_call_does_not_make_a_conversation_unusable() {
        for arguments in ["", "{\"a\": ", "[1]", "null"] {
            let written = messages(&[called(arguments)], None);
            assert_eq!(written[0]["content"][0]["input"], json!({}), "{arguments}");
        }
        let written = messages(&[called(r#"{"a": 1}"#)], None);
        assert_eq!(written[0]["content"][0]["input"], json!({"a": 1}));
    }

    #[test]
    fn an_answer_with_its_thoughts_keeps_to_the_limit_of_its_model() {
        let tools = vec![std::sync::Arc::new(crate::llm::Tool {
            name: "look".to_owned(),
            description: None,
            parameters: json!({}),
        })];
        let ask = |model: &str, max_tokens, tool_choice| {
            let request = ModelRequest {
                model: model.to_owned(),
                tools: tools.clone(),
                tool_choice,
                reasoning: Some(Effort::Xhigh),
                sampling: crate::llm::Sampling {
                    max_tokens,
                    ..crate::llm::Sampling::default()
                },
                ..ModelRequest::default()
            };
            let body = body(&request, None).unwrap();
            let thinking = body["thinking"]["budget_tokens"].as_u64();
            (body["max_tokens"].as_u64().unwrap(), thinking)
        };
        assert_eq!(ask("claude-opus-4-1", None, None), (32_000, Some(23_808)));
        assert_eq!(ask("claude-opus-4-1", Some(31_500), None), (31_500, None));
        assert_eq!(ask("claude-sonnet-4-5", None, None), (32_768, Some(24_576)));
        // What must call a tool does not think.
        let forced = Some(ToolChoice::Required);
        assert_eq!(ask("claude-sonnet-4-5", None, forced), (8192, None));
    }

    #[test]
    fn models_are_told_how_much_to_think_in_the_words_of_their_generation() {
        for (model, expect) in [
            ("claude-3-7-sonnet-latest", false),
            ("claude-opus-4-20250514", false),
            ("claude-opus-4-1", false),
            ("claude-sonnet-4-5-20250929", false),
            ("claude-opus-4-6", true),
            ("claude-sonnet-4-6@20260217", true),
            ("anthropic/claude-opus-4.7", true),
            ("claude-haiku-5", true),
            ("claude-mythos-preview", true),
            ("deepseek-chat", false),
        ] {
            assert_eq!(thinks_adaptively(model), expect, "{model}");
        }
    }

    #[test]
    fn it_thinks_on_amid_calls_where_its_thoughts_are_known() {
        let said = || Message::User {
            content: vec![Part::Text {
                text: "hi".to_owned(),
            }],
        };
        let result = || Message::Tool {
            tool_call_id: "t".to_owned(),
            content: "42".to_owned(),
            failed: false,
        };
        let thought = |of: &str| {
            let mut message = called("{}");
            if let Message::Assistant { state, .. } = &mut message {
                *state = Some(ProviderState::new(owner(of), json!([])));
            }
            message
        };
        for (conversation, expect) in [
            (vec![said()], true),
            (vec![said(), called("{}"), result()], false),
            (vec![said(), thought("me"), result()], true),
            (vec![said(), thought("another"), result()], false),
            (
                vec![said(), thought("me"), result(), called("{}"), result()],
                true,
            ),
            (
                vec![said(), called("{}"), result(), thought("me"), result()],
                false,
            ),
            (vec![said(), called("{}"), result(), said()], true),
        ] {
            let me = owner("me");
            assert_eq!(begins_with_thoughts(&conversation, Some(&me)), expect);
        }
    }
}
