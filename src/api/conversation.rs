//! What a chat request asks for, checked: the conversation, the tools, and how to answer.

use serde_json::{Value, json};

use super::error::ApiError;
use super::openai::{ChatMessage, ChatRequest, ChatTool, Content, ContentPart, Stop};
use crate::llm::{Effort, Message, Part, ResponseFormat, Sampling, Tool, ToolCall, ToolChoice};

/// A chat request that can be answered.
#[derive(Debug)]
pub struct Conversation {
    /// The texts of system and developer messages, in order.
    pub context: Vec<String>,
    /// Everything else that was said.
    pub messages: Vec<Message>,
    /// How many of `messages` came before: the rest is new, and is stored.
    pub told_before: usize,
    /// Whether `messages` is the whole conversation rather than its newest part (design 0.1).
    pub whole: bool,
    /// The caller's tools.
    pub tools: Vec<Tool>,
    /// Which of them must be called.
    pub tool_choice: Option<ToolChoice>,
    /// Whether several may be called at once.
    pub parallel_tool_calls: Option<bool>,
    /// What the answer must be.
    pub response_format: ResponseFormat,
    /// How the model picks its words.
    pub sampling: Sampling,
    /// How much it thinks first.
    pub reasoning: Option<Effort>,
    /// The caller's own labels.
    pub metadata: Value,
}

impl Conversation {
    /// Checks a request. Values that cannot be honoured are refused by name, never dropped.
    ///
    /// # Errors
    /// 400 naming the parameter.
    pub fn new(request: &mut ChatRequest) -> Result<Self, ApiError> {
        refuse_unsupported(request)?;
        let given = request
            .messages
            .take()
            .filter(|messages| !messages.is_empty());
        let given = given.ok_or_else(|| {
            ApiError::invalid("messages", "`messages` must hold at least one message.")
        })?;
        let mut context = Vec::new();
        let mut messages = Vec::with_capacity(given.len());
        for (index, message) in given.into_iter().enumerate() {
            match read_message(index, message)? {
                Message::System { content } => context.push(content),
                message => messages.push(message),
            }
        }
        let last_answer = messages
            .iter()
            .rposition(|message| matches!(message, Message::Assistant { .. }));
        let tools = read_tools(request.tools.take().unwrap_or_default())?;
        Ok(Self {
            context,
            told_before: last_answer.map_or(0, |index| index + 1),
            whole: last_answer.is_some(),
            messages,
            tool_choice: read_tool_choice(request.tool_choice.as_ref(), &tools)?,
            parallel_tool_calls: request.parallel_tool_calls.filter(|_| !tools.is_empty()),
            tools,
            response_format: read_response_format(request.response_format.as_ref())?,
            sampling: read_sampling(request)?,
            reasoning: read_effort(request.reasoning_effort.as_deref())?,
            metadata: read_metadata(request.metadata.take())?,
        })
    }
}

fn refuse_unsupported(request: &ChatRequest) -> Result<(), ApiError> {
    let refused = [
        (
            "n",
            request.n.is_some_and(|n| n != 1),
            "Only one answer is given: leave `n` out.",
        ),
        (
            "logprobs",
            request.logprobs == Some(true),
            "Log probabilities are not supported: leave `logprobs` out.",
        ),
        (
            "top_logprobs",
            request.top_logprobs.is_some_and(|n| n > 0),
            "Log probabilities are not supported: leave `top_logprobs` out.",
        ),
        (
            "functions",
            has_items(request.functions.as_ref()),
            "`functions` is superseded: use `tools`.",
        ),
        (
            "function_call",
            request
                .function_call
                .as_ref()
                .is_some_and(|call| !call.is_null() && call != "auto" && call != "none"),
            "`function_call` is superseded: use `tool_choice`.",
        ),
        (
            "modalities",
            request
                .modalities
                .as_ref()
                .is_some_and(|modes| modes.iter().any(|mode| mode != "text")),
            "Answers are text: leave `modalities` out.",
        ),
    ];
    match refused.into_iter().find(|(_, refused, _)| *refused) {
        Some((param, _, sentence)) => Err(ApiError::invalid(param, sentence)),
        None => Ok(()),
    }
}

fn has_items(value: Option<&Value>) -> bool {
    value.is_some_and(|value| {
        !value.is_null() && value.as_array().is_none_or(|items| !items.is_empty())
    })
}

fn read_message(index: usize, message: ChatMessage) -> Result<Message, ApiError> {
    let at = |member: &str| format!("messages[{index}].{member}");
    match message.role.as_str() {
        "system" | "developer" => Ok(Message::System {
            content: read_text(&at("content"), message.content)?,
        }),
        "user" => Ok(Message::User {
            content: read_parts(&at("content"), message.content)?,
        }),
        "assistant" => {
            let tool_calls: Vec<ToolCall> = message
                .tool_calls
                .unwrap_or_default()
                .into_iter()
                .map(|call| ToolCall {
                    id: call.id,
                    name: call.function.name,
                    arguments: call.function.arguments,
                })
                .collect();
            let content = match message.content {
                None if tool_calls.is_empty() => {
                    return Err(ApiError::invalid(
                        &at("content"),
                        format!("`{}` is required without `tool_calls`.", at("content")),
                    ));
                }
                None => None,
                content => Some(read_text(&at("content"), content)?),
            };
            Ok(Message::Assistant {
                content,
                tool_calls,
                state: None,
            })
        }
        "tool" => {
            let tool_call_id = message
                .tool_call_id
                .filter(|id| !id.is_empty())
                .ok_or_else(|| {
                    ApiError::invalid(
                        &at("tool_call_id"),
                        format!(
                            "`{}` must name the call that this answers.",
                            at("tool_call_id")
                        ),
                    )
                })?;
            Ok(Message::Tool {
                tool_call_id,
                content: read_text(&at("content"), message.content)?,
                failed: false,
            })
        }
        _ => Err(ApiError::invalid(
            &at("role"),
            format!(
                "`{}` must be `system`, `developer`, `user`, `assistant` or `tool`.",
                at("role")
            ),
        )),
    }
}

fn read_text(at: &str, content: Option<Content>) -> Result<String, ApiError> {
    let mut texts = Vec::new();
    for part in read_parts(at, content)? {
        match part {
            Part::Text { text } => texts.push(text),
            Part::Image { .. } => {
                return Err(ApiError::invalid(
                    at,
                    format!("`{at}` may hold text only; images go into user messages."),
                ));
            }
        }
    }
    Ok(texts.join("\n"))
}

fn read_parts(at: &str, content: Option<Content>) -> Result<Vec<Part>, ApiError> {
    match content {
        None => Err(ApiError::invalid(
            at,
            format!("`{at}` is required: text, or an array of parts."),
        )),
        Some(Content::Text(text)) => Ok(vec![Part::Text { text }]),
        Some(Content::Parts(parts)) if parts.is_empty() => Err(ApiError::invalid(
            at,
            format!("`{at}` must hold at least one part."),
        )),
        Some(Content::Parts(parts)) => parts
            .into_iter()
            .enumerate()
            .map(|(index, part)| read_part(&format!("{at}[{index}]"), part))
            .collect(),
    }
}

fn read_part(at: &str, part: ContentPart) -> Result<Part, ApiError> {
    match (part.kind.as_str(), part.text, part.image_url) {
        ("text", Some(text), _) => Ok(Part::Text { text }),
        ("text", None, _) => Err(ApiError::invalid(at, format!("`{at}.text` is required."))),
        ("image_url", _, Some(image))
            if image.url.starts_with("data:image/") || image.url.starts_with("https://") =>
        {
            Ok(Part::Image { url: image.url })
        }
        ("image_url", ..) => Err(ApiError::invalid(
            at,
            format!("`{at}.image_url.url` must be an https URL or an image's data URL."),
        )),
        ("file", ..) => Err(ApiError::invalid(
            at,
            "File parts are not supported yet: send the file's text as a `text` part.",
        )),
        _ => Err(ApiError::invalid(
            at,
            format!("`{at}.type` must be `text` or `image_url`."),
        )),
    }
}

fn read_tools(tools: Vec<ChatTool>) -> Result<Vec<Tool>, ApiError> {
    if tools.len() > 128 {
        return Err(ApiError::invalid(
            "tools",
            "`tools` may hold at most 128 tools.",
        ));
    }
    let mut read: Vec<Tool> = Vec::with_capacity(tools.len());
    for (index, tool) in tools.into_iter().enumerate() {
        let at = |member: &str| format!("tools[{index}].{member}");
        if tool.kind != "function" {
            return Err(ApiError::invalid(
                &at("type"),
                format!("`{}` must be `function`.", at("type")),
            ));
        }
        let name = tool.function.name;
        if !is_tool_name(&name) {
            let at = at("function.name");
            return Err(ApiError::invalid(
                &at,
                format!("`{at}` must be 1 to 64 letters, digits, `_` or `-`."),
            ));
        }
        if read
            .iter()
            .any(|other| other.name.eq_ignore_ascii_case(&name))
        {
            let at = at("function.name");
            return Err(ApiError::invalid(
                &at,
                format!("`{at}` repeats the name `{name}`."),
            ));
        }
        let parameters = tool
            .function
            .parameters
            .unwrap_or_else(|| json!({"type": "object", "properties": {}}));
        let is_object = parameters
            .as_object()
            .is_some_and(|schema| schema.get("type").is_none_or(|kind| kind == "object"));
        if !is_object {
            let at = at("function.parameters");
            return Err(ApiError::invalid(
                &at,
                format!("`{at}` must be a JSON Schema of type `object`."),
            ));
        }
        read.push(Tool {
            name,
            description: tool.function.description,
            parameters,
        });
    }
    Ok(read)
}

fn is_tool_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
}

fn read_tool_choice(
    choice: Option<&Value>,
    tools: &[Tool],
) -> Result<Option<ToolChoice>, ApiError> {
    let invalid = |sentence: &str| Err(ApiError::invalid("tool_choice", sentence));
    let Some(choice) = choice.filter(|choice| !choice.is_null()) else {
        return Ok(None);
    };
    let read = match choice.as_str() {
        Some("none") => ToolChoice::None,
        Some("auto") => ToolChoice::Auto,
        Some("required") => ToolChoice::Required,
        _ => match choice.pointer("/function/name").and_then(Value::as_str) {
            Some(name) if tools.iter().any(|tool| tool.name == name) => {
                ToolChoice::Named(name.to_owned())
            }
            Some(_) => return invalid("`tool_choice` must name one of `tools`."),
            None => {
                return invalid(
                    "`tool_choice` must be `none`, `auto`, `required`, or {\"type\":\"function\",\"function\":{\"name\":…}}.",
                );
            }
        },
    };
    match (tools.is_empty(), &read) {
        (false, _) => Ok(Some(read)),
        (true, ToolChoice::None | ToolChoice::Auto) => Ok(None),
        (true, _) => invalid("`tool_choice` needs `tools`."),
    }
}

fn read_response_format(format: Option<&Value>) -> Result<ResponseFormat, ApiError> {
    let invalid = |sentence: &str| Err(ApiError::invalid("response_format", sentence));
    let Some(format) = format.filter(|format| !format.is_null()) else {
        return Ok(ResponseFormat::Text);
    };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(ResponseFormat::Text),
        Some("json_object") => Ok(ResponseFormat::JsonObject),
        Some("json_schema") => {
            let Some(wish) = format.get("json_schema").and_then(Value::as_object) else {
                return invalid("`response_format.json_schema` is required.");
            };
            let Some(name) = wish
                .get("name")
                .and_then(Value::as_str)
                .filter(|name| is_tool_name(name))
            else {
                return invalid(
                    "`response_format.json_schema.name` must be 1 to 64 letters, digits, `_` or `-`.",
                );
            };
            let Some(schema) = wish.get("schema").filter(|schema| schema.is_object()) else {
                return invalid("`response_format.json_schema.schema` must be a JSON Schema.");
            };
            Ok(ResponseFormat::JsonSchema {
                name: name.to_owned(),
                description: wish
                    .get("description")
                    .and_then(Value::as_str)
                    .map(str::to_owned),
                schema: schema.clone(),
                strict: wish.get("strict").and_then(Value::as_bool),
            })
        }
        _ => invalid("`response_format.type` must be `text`, `json_object` or `json_schema`."),
    }
}

fn read_sampling(request: &mut ChatRequest) -> Result<Sampling, ApiError> {
    let within = |param: &str, value: Option<f64>, least: f64, most: f64| match value {
        Some(value) if !(least..=most).contains(&value) => Err(ApiError::invalid(
            param,
            format!("`{param}` must be from {least} to {most}."),
        )),
        value => Ok(value),
    };
    let stop = match request.stop.take() {
        None => Vec::new(),
        Some(Stop::One(text)) => vec![text],
        Some(Stop::Several(texts)) => texts,
    };
    if stop.len() > 4 || stop.iter().any(String::is_empty) {
        return Err(ApiError::invalid(
            "stop",
            "`stop` must be a text, or up to four, none of them empty.",
        ));
    }
    let max_tokens = match (request.max_completion_tokens, request.max_tokens) {
        (Some(newer), Some(older)) if newer != older => {
            return Err(ApiError::invalid(
                "max_tokens",
                "`max_tokens` and `max_completion_tokens` are one setting: send one of them.",
            ));
        }
        (newer, older) => newer.or(older),
    };
    if max_tokens == Some(0) {
        return Err(ApiError::invalid(
            "max_tokens",
            "`max_tokens` must be at least 1.",
        ));
    }
    let nonzero = |value: Option<f64>| value.filter(|value| *value != 0.0);
    Ok(Sampling {
        // 1 is OpenAI's default of both: the same as leaving it out, also for providers that cannot be sent it.
        temperature: within("temperature", request.temperature, 0.0, 2.0)?,
        top_p: within("top_p", request.top_p, 0.0, 1.0)?.filter(|value| *value < 1.0),
        max_tokens,
        stop,
        seed: request.seed,
        presence_penalty: nonzero(within(
            "presence_penalty",
            request.presence_penalty,
            -2.0,
            2.0,
        )?),
        frequency_penalty: nonzero(within(
            "frequency_penalty",
            request.frequency_penalty,
            -2.0,
            2.0,
        )?),
        logit_bias: request
            .logit_bias
            .take()
            .filter(|bias| bias.as_object().is_some_and(|bias| !bias.is_empty())),
    })
}

fn read_effort(effort: Option<&str>) -> Result<Option<Effort>, ApiError> {
    match effort {
        None => Ok(None),
        Some("none") => Ok(Some(Effort::Off)),
        Some(word) => serde_json::from_value(json!(word)).map(Some).map_err(|_| {
            ApiError::invalid(
                "reasoning_effort",
                "`reasoning_effort` must be `none`, `minimal`, `low`, `medium`, `high` or `xhigh`.",
            )
        }),
    }
}

fn read_metadata(metadata: Option<Value>) -> Result<Value, ApiError> {
    let Some(metadata) = metadata.filter(|metadata| !metadata.is_null()) else {
        return Ok(json!({}));
    };
    let fits = metadata.as_object().is_some_and(|labels| {
        labels.len() <= 16
            && labels.iter().all(|(key, value)| {
                key.chars().count() <= 64
                    && value
                        .as_str()
                        .is_some_and(|value| value.chars().count() <= 512)
            })
    });
    if fits {
        Ok(metadata)
    } else {
        Err(ApiError::invalid(
            "metadata",
            "`metadata` must be an object of at most 16 texts: keys up to 64 characters, values up to 512.",
        ))
    }
}
