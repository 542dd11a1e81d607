//! `/v1/chat/sessions` (contract 2.2).

use std::collections::HashMap;

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Page, Path, Query};
use super::transcript::transcript;
use crate::ids::{self, Id};
use crate::llm::{Message, Part, ToolCall};
use crate::store::{MessageRow, NewMessage, SessionFilter, SessionRow, StoreError};

/// A conversation.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SessionView {
    /// `sess_…`.
    #[schema(value_type = String)]
    pub id: Id<ids::Session>,
    /// What it is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// The agent that answered first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// The caller's own user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The caller's own labels.
    #[schema(value_type = Object)]
    pub metadata: Value,
    /// How many messages it has.
    pub message_count: i32,
    /// When it was opened.
    pub created_at: DateTime<Utc>,
    /// When something was last said.
    pub updated_at: DateTime<Utc>,
}

impl From<SessionRow> for SessionView {
    fn from(row: SessionRow) -> Self {
        Self {
            id: row.id,
            title: row.title,
            agent: row.agent,
            user: row.end_user,
            metadata: row.metadata,
            message_count: row.message_count,
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }
}

/// The sessions of a project.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct SessionList {
    /// Latest activity first.
    pub sessions: Vec<SessionView>,
}

/// What was said in a session.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct SessionMessages {
    /// The session.
    pub session: SessionView,
    /// Its newest messages, oldest first; earlier ones with `?before=`.
    pub messages: Vec<MessageView>,
}

/// A message of a session.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct MessageView {
    /// `msg_…`.
    #[schema(value_type = String)]
    pub id: Id<ids::Message>,
    /// `user` or `assistant`.
    pub role: &'static str,
    /// Its text.
    pub content: String,
    /// When it was said.
    pub ts: DateTime<Utc>,
    /// The tools that an answer called, with what they returned.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallView>,
    /// Whether the answer was cut short.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub interrupted: bool,
}

/// A tool call of an answer.
#[derive(Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ToolCallView {
    /// Its id.
    pub id: String,
    /// The tool.
    pub name: String,
    /// What it was called with.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub arguments: Option<Value>,
    /// What it returned.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub result: Option<Value>,
    /// `calling`, `completed` or `error`.
    #[serde(default = "completed")]
    pub state: String,
}

/// The state of a call whose tool failed.
const FAILED: &str = "error";

fn completed() -> String {
    "completed".to_owned()
}

/// A title.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct RenameSession {
    /// 1 to 200 characters.
    #[schema(min_length = 1, max_length = 200)]
    pub title: Option<String>,
}

/// It has another title now.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Renamed {
    /// Always true.
    pub renamed: bool,
}

/// It is gone.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Deleted {
    /// Always true.
    pub deleted: bool,
}

/// A conversation that was led elsewhere.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct ImportSession {
    /// What to call it.
    pub title: Option<String>,
    /// The agent that answered in it.
    pub agent: Option<String>,
    /// What was said, oldest first: at most 10,000 messages.
    pub messages: Option<Vec<ImportMessage>>,
}

/// A message of an imported conversation.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImportMessage {
    /// `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
    /// The tools that an answer called.
    pub tool_calls: Option<Vec<ToolCallView>>,
}

/// The imported conversation.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Imported {
    /// `sess_…`.
    #[schema(value_type = String)]
    pub session_id: Id<ids::Session>,
    /// How many messages it has.
    pub imported: usize,
}

/// The message that a page ends before.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub struct MessagePage {
    /// How many at most: 1 to 1,000.
    #[param(minimum = 1, maximum = 1000, default = 1000)]
    pub limit: Option<i64>,
    /// Only messages before this one.
    pub before: Option<String>,
}

/// List sessions, latest activity first. `metadata.<key>=` keeps those with that label.
#[utoipa::path(get, path = "/chat/sessions", tag = "Sessions",
    params(Page, ("user" = Option<String>, Query, description = "Only of this user")),
    responses((status = 200, description = "The sessions", body = SessionList), (status = 400, description = "A parameter is wrong", body = ErrorBody)))]
pub async fn list_sessions(
    Door(db): Door,
    Query(page): Query<Page>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Response, ApiError> {
    let size = page.size()?;
    let labels: Map<String, Value> = query
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix("metadata.")?.to_owned(), json!(value))))
        .collect();
    let filter = SessionFilter {
        end_user: query.get("user").map(String::as_str),
        metadata: (!labels.is_empty()).then_some(Value::Object(labels)),
        after: page.after()?,
    };
    let sessions: Vec<SessionView> = db
        .sessions(&filter, size)
        .await?
        .into_iter()
        .map(SessionView::from)
        .collect();
    let full = i64::try_from(sessions.len()).is_ok_and(|count| count == size);
    let link = sessions
        .last()
        .filter(|_| full)
        .map(|last| next_link(&query, size, &last.id.to_string()));
    let mut headers = HeaderMap::new();
    if let Some(link) = link.and_then(|link| HeaderValue::try_from(link).ok()) {
        headers.insert(header::LINK, link);
    }
    Ok((headers, Json(SessionList { sessions })).into_response())
}

/// The next page, with the same filters.
fn next_link(query: &HashMap<String, String>, size: i64, last: &str) -> String {
    let mut parameters: Vec<(&str, &str)> = query
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .filter(|(key, _)| *key == "user" || key.starts_with("metadata."))
        .collect();
    parameters.sort_unstable();
    let size = size.to_string();
    parameters.extend([("limit", size.as_str()), ("after", last)]);
    let query = form_urlencoded::Serializer::new(String::new())
        .extend_pairs(parameters)
        .finish();
    format!("</v1/chat/sessions?{query}>; rel=\"next\"")
}

/// Read what was said in a session, or in a task's last run (`sessionId` of the task).
#[utoipa::path(get, path = "/chat/sessions/{id}/messages", tag = "Sessions",
    params(("id" = String, Path, description = "The session"), MessagePage),
    responses((status = 200, description = "The session and its messages", body = SessionMessages), (status = 400, description = "A parameter is wrong", body = ErrorBody), (status = 404, description = "No such session", body = ErrorBody)))]
pub async fn read_messages(
    Door(db): Door,
    Path(id): Path<String>,
    Query(page): Query<MessagePage>,
) -> Result<Json<SessionMessages>, ApiError> {
    let session = parse(&id)?;
    let before = Page {
        limit: page.limit,
        after: page.before,
    };
    let (before, size) = (before.after()?, before.size()?);
    let row = match db.session(session).await {
        Ok(row) => row,
        Err(StoreError::NotFound) => {
            return Ok(Json(transcript(&db, session, before, size).await?));
        }
        Err(error) => return Err(error.into()),
    };
    let messages = db.messages(session, before, size).await?;
    Ok(Json(SessionMessages {
        session: row.into(),
        messages: views(messages)?,
    }))
}

/// Give a session another title.
#[utoipa::path(patch, path = "/chat/sessions/{id}", tag = "Sessions",
    params(("id" = String, Path, description = "The session")), request_body = RenameSession,
    responses(
        (status = 200, description = "Done", body = Renamed),
        (status = 400, description = "The title is missing or too long", body = ErrorBody),
        (status = 404, description = "No such session", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn rename_session(
    Door(db): Door,
    Path(id): Path<String>,
    Json(change): Json<RenameSession>,
) -> Result<Json<Renamed>, ApiError> {
    let session = parse(&id)?;
    let title = change.title.unwrap_or_default();
    if !(1..=200).contains(&title.chars().count()) {
        return Err(ApiError::invalid(
            "title",
            "`title` must be 1 to 200 characters.",
        ));
    }
    db.rename_session(session, &title)
        .await
        .map_err(|error| missing(error, &id))?;
    Ok(Json(Renamed { renamed: true }))
}

/// Delete a session with its messages.
#[utoipa::path(delete, path = "/chat/sessions/{id}", tag = "Sessions",
    params(("id" = String, Path, description = "The session")),
    responses((status = 200, description = "It is gone", body = Deleted), (status = 404, description = "No such session", body = ErrorBody)))]
pub async fn delete_session(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    db.delete_session(parse(&id)?)
        .await
        .map_err(|error| missing(error, &id))?;
    Ok(Json(Deleted { deleted: true }))
}

/// Bring a conversation from elsewhere.
#[utoipa::path(post, path = "/chat/sessions/import", tag = "Sessions", request_body = ImportSession,
    responses(
        (status = 201, description = "The session", body = Imported),
        (status = 400, description = "A field is wrong", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn import_session(
    Door(db): Door,
    Json(import): Json<ImportSession>,
) -> Result<(StatusCode, Json<Imported>), ApiError> {
    let given = import
        .messages
        .ok_or_else(|| ApiError::invalid("messages", "`messages` must be an array."))?;
    if given.len() > 10_000 {
        return Err(ApiError::invalid(
            "messages",
            "`messages` may hold at most 10,000 messages.",
        ));
    }
    let mut messages = Vec::with_capacity(given.len());
    for (index, message) in given.into_iter().enumerate() {
        messages.extend(stored(index, message)?);
    }
    let imported = messages.len();
    let mut tx = db.begin();
    let session_id = tx
        .import_session(import.title.as_deref(), import.agent.as_deref(), &messages)
        .await?;
    tx.commit().await?;
    Ok((
        StatusCode::CREATED,
        Json(Imported {
            session_id,
            imported,
        }),
    ))
}

/// An imported message as a conversation led here would have stored it: tool results are messages of their own.
fn stored(index: usize, message: ImportMessage) -> Result<Vec<NewMessage>, ApiError> {
    let calls = message.tool_calls.unwrap_or_default();
    let mut conversation = match message.role.as_str() {
        "user" => vec![Message::User {
            content: vec![Part::Text {
                text: message.content,
            }],
        }],
        "assistant" => vec![Message::Assistant {
            content: (!message.content.is_empty() || calls.is_empty()).then_some(message.content),
            tool_calls: calls
                .iter()
                .map(|call| ToolCall {
                    id: call.id.clone(),
                    name: call.name.clone(),
                    arguments: call
                        .arguments
                        .clone()
                        .map_or_else(|| "{}".to_owned(), text_of),
                })
                .collect(),
            state: None,
        }],
        _ => {
            let at = format!("messages[{index}].role");
            return Err(ApiError::invalid(
                &at,
                format!("`{at}` must be `user` or `assistant`."),
            ));
        }
    };
    conversation.extend(calls.into_iter().filter_map(|call| {
        Some(Message::Tool {
            tool_call_id: call.id,
            content: text_of(call.result?),
            failed: call.state == FAILED,
        })
    }));
    let now = Utc::now();
    conversation
        .into_iter()
        .map(|message| {
            let body =
                serde_json::to_value(message).map_err(|error| ApiError::Internal(error.into()))?;
            Ok(NewMessage {
                body,
                interrupted: false,
                created_at: now,
            })
        })
        .collect()
}

fn text_of(value: Value) -> String {
    match value {
        Value::String(text) => text,
        value => value.to_string(),
    }
}

fn parse(id: &str) -> Result<Id<ids::Session>, ApiError> {
    id.parse().map_err(|_| ApiError::missing("Session", id))
}

pub(super) fn missing(error: StoreError, id: &str) -> ApiError {
    match error {
        StoreError::NotFound => ApiError::missing("Session", id),
        error => error.into(),
    }
}

/// The messages as the contract shows them: tool results stand with the calls they answer.
pub(super) fn views(rows: Vec<MessageRow>) -> Result<Vec<MessageView>, ApiError> {
    let mut views: Vec<MessageView> = Vec::with_capacity(rows.len());
    for row in rows {
        let message: Message = serde_json::from_value(row.body).map_err(|error| {
            ApiError::Internal(anyhow::Error::new(error).context("a stored message cannot be read"))
        })?;
        let (role, content, tool_calls) = match message {
            Message::User { content } => ("user", texts(content), Vec::new()),
            Message::Assistant {
                content,
                tool_calls,
                ..
            } => (
                "assistant",
                content.unwrap_or_default(),
                tool_calls.into_iter().map(call_view).collect(),
            ),
            Message::Tool {
                tool_call_id,
                content,
                failed,
            } => {
                let calls = views
                    .iter_mut()
                    .rev()
                    .flat_map(|view| view.tool_calls.iter_mut());
                if let Some(call) = calls.into_iter().find(|call| call.id == tool_call_id) {
                    call.result = Some(json!(content));
                    call.state = if failed {
                        FAILED.to_owned()
                    } else {
                        completed()
                    };
                }
                continue;
            }
            Message::System { .. } => continue,
        };
        views.push(MessageView {
            id: row.id,
            role,
            content,
            ts: row.created_at,
            tool_calls,
            interrupted: row.interrupted,
        });
    }
    Ok(views)
}

fn texts(parts: Vec<Part>) -> String {
    let texts: Vec<String> = parts
        .into_iter()
        .filter_map(|part| match part {
            Part::Text { text } => Some(text),
            Part::Image { .. } => None,
        })
        .collect();
    texts.join("\n")
}

fn call_view(call: ToolCall) -> ToolCallView {
    let arguments = serde_json::from_str(&call.arguments).unwrap_or(Value::String(call.arguments));
    ToolCallView {
        id: call.id,
        name: call.name,
        arguments: Some(arguments),
        result: None,
        state: "calling".to_owned(),
    }
}
