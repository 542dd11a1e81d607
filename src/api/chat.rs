//! `POST /v1/chat/completions`: one turn with an agent, streamed or collected.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use chrono::Utc;
use serde_json::Value;
use tokio::sync::mpsc;

use super::conversation::Conversation;
use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json};
use super::openai::{
    ChatChoice, ChatCompletion, ChatRequest, ChunkWriter, assistant_message, finish_word,
    usage_object,
};
use super::patience::within;
use super::sse::event_stream;
use super::turn::{self, Said, Turn};
use crate::agent::{Answer, Course, OutputFormat, Persona, Repair, Toolbox, system_prompt};
use crate::app::{self, App, ModelError};
use crate::ids::{Id, Run, Session};
use crate::llm::{Effort, Message, ModelEvent, ModelRequest, Provider, Tool};
use crate::store::{AgentRow, Memories, ProjectDb, StoreError};
use crate::tools::ServerTools;

/// How many stored messages go before a new one; older ones stay stored but are not sent.
const HISTORY: i64 = 200;

/// Chat with an agent, as with OpenAI.
#[utoipa::path(
    post,
    path = "/chat/completions",
    tag = "Chat",
    request_body = ChatRequest,
    params(
        ("x-session-id" = Option<String>, Header, description = "The session to continue, or `new`"),
    ),
    responses(
        (status = 200, description = "The answer, or its stream", content(
            (ChatCompletion = "application/json"),
            (String = "text/event-stream"),
        ), headers(("x-session-id" = String, description = "The session"), ("x-polpo-run-id" = String, description = "The run"))),
        (status = 400, description = "A parameter is missing or wrong", body = ErrorBody),
        (status = 404, description = "No such agent or session", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
        (status = 502, description = "The model's provider failed", body = ErrorBody),
        (status = 504, description = "The model's provider was silent", body = ErrorBody),
    )
)]
pub async fn create_completion(
    State(app): State<App>,
    Door(db): Door,
    headers: HeaderMap,
    Json(mut request): Json<ChatRequest>,
) -> Result<Response, ApiError> {
    let conversation = Conversation::new(&mut request)?;
    let streams = request.stream.unwrap_or(false);
    let usage = request.stream_options.as_ref();
    let usage = usage
        .and_then(|options| options.include_usage)
        .unwrap_or(false);
    let prepared = prepare(&app, db, &headers, request, conversation);
    let Prepared {
        turn,
        provider,
        request,
        format,
        toolbox,
    } = within(&app, prepared).await?;
    let structured = !matches!(format, OutputFormat::Text);
    let head = Head::new(&turn, &turn.agent);
    let repair = if streams { Repair::Never } else { Repair::Once };
    let course = Course::chat(format, repair);
    let mut said = turn::begin(&app, turn, provider, request, course, toolbox);
    let response = if streams {
        stream_answer(said, &head, usage, app.config.keep_alive()).await?
    } else {
        collect_answer(&mut said, &head, structured)
            .await?
            .into_response()
    };
    Ok(head.write(response))
}

/// All that a turn needs.
struct Prepared {
    turn: Turn,
    provider: Arc<dyn Provider>,
    request: ModelRequest,
    format: OutputFormat,
    toolbox: Arc<ServerTools>,
}

/// Finds who answers, with what, and what was said before.
async fn prepare(
    app: &App,
    db: ProjectDb,
    headers: &HeaderMap,
    mut request: ChatRequest,
    conversation: Conversation,
) -> Result<Prepared, ApiError> {
    let agent = answering_agent(&db, &request).await?;
    let (provider, model_name, model) = resolve_model(app, &db, &agent).await?;
    let format = OutputFormat::new(&conversation.response_format).map_err(|error| {
        ApiError::invalid(
            "response_format",
            format!("The schema cannot be used: {error}."),
        )
    })?;
    let (session, continues) = asked_session(headers, &request)?;
    let history = if continues {
        history(&db, session, conversation.whole).await?
    } else {
        Vec::new()
    };
    let toolbox = Arc::new(ServerTools::of(db.clone(), &agent, app.fetcher.clone()));
    refuse_clashes(&conversation, toolbox.tools())?;
    let memories = db.memories(&agent.name).await?;
    let new_messages = conversation.messages[conversation.told_before..].to_vec();
    let turn = Turn {
        db,
        run: Id::new(),
        session,
        continues,
        title: title_of(&new_messages),
        agent: agent.clone(),
        end_user: request.user.take().filter(|user| !user.is_empty()),
        metadata: conversation.metadata.clone(),
        new_messages,
        model_name,
        started_at: Utc::now(),
    };
    let request = ModelRequest {
        whole: !request.stream.unwrap_or(false),
        ..model_request(&agent, &memories, model, conversation, history)
    };
    Ok(Prepared {
        turn,
        provider,
        request,
        format,
        toolbox,
    })
}

/// A tool of the caller's may not have the name of one that the server runs (contract 2.1.9).
fn refuse_clashes(conversation: &Conversation, servers: &[Arc<Tool>]) -> Result<(), ApiError> {
    let clash = conversation
        .tools
        .iter()
        .find(|tool| servers.iter().any(|other| other.name == tool.name));
    match clash {
        Some(tool) => Err(ApiError::invalid(
            "tools",
            format!(
                "`{}` is a tool of the server that this agent has: rename yours, or take it out of the agent's `allowedTools`.",
                tool.name
            ),
        )),
        None => Ok(()),
    }
}

/// What every form of the answer tells about it.
#[derive(Debug)]
struct Head {
    id: String,
    created: i64,
    model: String,
    fingerprint: String,
    session: Id<Session>,
    run: Id<Run>,
}

impl Head {
    fn new(turn: &Turn, agent: &AgentRow) -> Self {
        Self {
            id: format!("chatcmpl-{}", turn.run.uuid().simple()),
            created: turn.started_at.timestamp(),
            model: agent.name.clone(),
            fingerprint: format!("fp_{:x}", agent.updated_at.timestamp_micros()),
            session: turn.session,
            run: turn.run,
        }
    }

    fn write(&self, mut response: Response) -> Response {
        let headers = response.headers_mut();
        for (name, value) in [
            ("x-session-id", self.session.to_string()),
            ("x-polpo-run-id", self.run.to_string()),
        ] {
            headers.insert(name, HeaderValue::try_from(value).expect("an id is ASCII"));
        }
        response
    }
}

/// `agent`, else `model` (design 0.1).
async fn answering_agent(db: &ProjectDb, request: &ChatRequest) -> Result<Arc<AgentRow>, ApiError> {
    let named = [&request.agent, &request.model]
        .into_iter()
        .flatten()
        .find(|name| !name.is_empty());
    let Some(name) = named else {
        return Err(ApiError::invalid(
            "agent",
            "Name the agent that answers in `agent`, or in `model`.",
        ));
    };
    match db.agent(name).await {
        Err(StoreError::NotFound) => Err(ApiError::missing("Agent", name)),
        result => Ok(result?),
    }
}

/// Who serves the agent's model, the model as the agent names it, and as its provider does.
async fn resolve_model(
    app: &App,
    db: &ProjectDb,
    agent: &AgentRow,
) -> Result<(Arc<dyn Provider>, String, String), ApiError> {
    let settings = db.settings().await?;
    let name = app::model_of(agent, &settings);
    let (provider, model) = app.resolve(db, name).await.map_err(|error| match error {
        ModelError::Credentials(error) => error.into(),
        ModelError::Unusable(error) => ApiError::invalid(
            "model",
            format!(
                "The model of agent \"{}\" cannot be used: {error}.",
                agent.name
            ),
        ),
    })?;
    Ok((provider, name.to_owned(), model))
}

/// The header, else `sessionId` in the body; absent or `new` opens one (contract 2.1.5).
fn asked_session(
    headers: &HeaderMap,
    request: &ChatRequest,
) -> Result<(Id<Session>, bool), ApiError> {
    let header = headers
        .get("x-session-id")
        .map(|value| value.to_str().unwrap_or_default());
    match header
        .or(request.session_id.as_deref())
        .filter(|id| !id.is_empty())
    {
        None | Some("new") => Ok((Id::new(), false)),
        Some(id) => id
            .parse()
            .map(|id| (id, true))
            .map_err(|_| ApiError::missing("Session", id)),
    }
}

/// What was said before. Nothing when the caller sent it all, but then too the session must exist.
async fn history(
    db: &ProjectDb,
    session: Id<Session>,
    whole: bool,
) -> Result<Vec<Message>, ApiError> {
    let rows = if whole {
        Vec::new()
    } else {
        db.messages(session, None, HISTORY).await?
    };
    if rows.is_empty() {
        match db.session(session).await {
            Err(StoreError::NotFound) => {
                return Err(ApiError::missing("Session", &session.to_string()));
            }
            result => drop(result?),
        }
    }
    let messages: Result<Vec<Message>, _> = rows
        .into_iter()
        .map(|row| serde_json::from_value(row.body))
        .collect();
    let mut messages = messages.map_err(|error| {
        ApiError::Internal(anyhow::Error::new(error).context("a stored message cannot be read"))
    })?;
    // A tool's result means nothing to a model that does not see the call.
    let first = messages
        .iter()
        .position(|message| !matches!(message, Message::Tool { .. }))
        .unwrap_or(messages.len());
    messages.drain(..first);
    Ok(messages)
}

fn model_request(
    agent: &AgentRow,
    memories: &Memories,
    model: String,
    conversation: Conversation,
    mut messages: Vec<Message>,
) -> ModelRequest {
    let text = |key: &str| agent.definition.get(key).and_then(Value::as_str);
    let persona = Persona {
        name: &agent.name,
        role: text("role"),
        system_prompt: text("systemPrompt"),
        identity: agent.definition.get("identity"),
        shared_memory: memories.shared.as_deref(),
        own_memory: memories.own.as_deref(),
    };
    let own_effort =
        text("reasoning").and_then(|word| serde_json::from_value::<Effort>(word.into()).ok());
    let stored = !messages.is_empty();
    messages.extend(conversation.messages);
    if stored {
        answer_open_calls(&mut messages);
    }
    ModelRequest {
        model,
        system: Some(system_prompt(persona, &conversation.context)),
        messages,
        tools: conversation.tools.into_iter().map(Arc::new).collect(),
        tool_choice: conversation.tool_choice,
        parallel_tool_calls: conversation.parallel_tool_calls,
        response_format: conversation.response_format,
        sampling: conversation.sampling,
        reasoning: conversation.reasoning.or(own_effort),
        whole: false,
        permit: None,
    }
}

/// Gives each call of a tool that nobody has answered a result that says so: providers refuse a conversation without one, and a caller may have gone on
/// without.
fn answer_open_calls(messages: &mut Vec<Message>) {
    let mut whole = Vec::with_capacity(messages.len());
    let mut open: Vec<String> = Vec::new();
    let unanswered = |open: &mut Vec<String>, whole: &mut Vec<Message>| {
        whole.extend(open.drain(..).map(|tool_call_id| Message::Tool {
            tool_call_id,
            content: "Not run: nobody has answered this call.".to_owned(),
            failed: true,
        }));
    };
    for message in messages.drain(..) {
        match &message {
            Message::Tool { tool_call_id, .. } => open.retain(|id| id != tool_call_id),
            Message::Assistant { tool_calls, .. } => {
                unanswered(&mut open, &mut whole);
                open = tool_calls.iter().map(|call| call.id.clone()).collect();
            }
            Message::User { .. } | Message::System { .. } => unanswered(&mut open, &mut whole),
        }
        whole.push(message);
    }
    unanswered(&mut open, &mut whole);
    *messages = whole;
}

/// The first 60 characters of what the user said first (contract 2.1.5).
fn title_of(messages: &[Message]) -> Option<String> {
    let text = messages.iter().find_map(|message| match message {
        Message::User { content } => content.iter().find_map(|part| match part {
            crate::llm::Part::Text { text } => Some(text.trim()),
            crate::llm::Part::Image { .. } => None,
        }),
        _ => None,
    })?;
    Some(text.chars().take(60).collect()).filter(|title: &String| !title.is_empty())
}

async fn collect_answer(
    said: &mut mpsc::Receiver<Said>,
    head: &Head,
    structured: bool,
) -> Result<Json<ChatCompletion>, ApiError> {
    let mut answer = Answer::default();
    let mut reasoning = String::new();
    loop {
        match said.recv().await {
            Some(Said::Delta(ModelEvent::Reasoning(piece))) => reasoning.push_str(&piece),
            Some(Said::Delta(event)) => answer.push(&event),
            // What was said beside a call of the server's is no part of a JSON answer.
            Some(Said::Tool(_)) if structured => answer = Answer::default(),
            Some(Said::Tool(_)) => {}
            Some(Said::Restarted) => {
                answer = Answer::default();
                reasoning.clear();
            }
            Some(Said::Finished { reason, usage }) => {
                return Ok(Json(ChatCompletion {
                    id: head.id.clone(),
                    object: "chat.completion",
                    created: head.created,
                    model: head.model.clone(),
                    system_fingerprint: head.fingerprint.clone(),
                    choices: vec![ChatChoice {
                        index: 0,
                        message: assistant_message(&answer.into_message(), &reasoning),
                        logprobs: None,
                        finish_reason: finish_word(reason),
                    }],
                    usage: usage_object(usage),
                }));
            }
            Some(Said::Failed(error)) => return Err(error),
            None => return Err(turn::gone()),
        }
    }
}

/// Answers with the stream once the model has begun, or has been silent for as long as a keep-alive:
/// a failure until then is an ordinary error answer.
async fn stream_answer(
    mut said: mpsc::Receiver<Said>,
    head: &Head,
    include_usage: bool,
    keep_alive: Duration,
) -> Result<Response, ApiError> {
    let first = match tokio::time::timeout(keep_alive, said.recv()).await {
        Ok(Some(Said::Failed(error))) => return Err(error),
        Ok(None) => return Err(turn::gone()),
        Ok(first) => first,
        Err(_silent) => None,
    };
    let writer = ChunkWriter::new(
        &head.id,
        head.created,
        &head.model,
        &head.fingerprint,
        include_usage,
    );
    let body = Body::from_stream(turn::frames(writer, first, said, keep_alive));
    Ok(event_stream(body))
}
