//! What a task's run said, read like a session (contract 2.6.1, `sessionId`).

use serde_json::{Value, json};
use uuid::Uuid;

use super::activity::redact;
use super::error::ApiError;
use super::sessions::{SessionMessages, SessionView, missing, views};
use crate::ids::{self, Id, Run};
use crate::llm::{Message, Part};
use crate::store::{MessageRow, ProjectDb, StepKind, StepRow};

/// The messages of a run, those of its newest `limit` before `before`, oldest first.
///
/// # Errors
/// 404 when no task's run has this id.
pub(super) async fn transcript(
    db: &ProjectDb,
    session: Id<ids::Session>,
    before: Option<Id<ids::Message>>,
    limit: i64,
) -> Result<SessionMessages, ApiError> {
    let run = Id::<Run>::from(session);
    let row = db
        .transcript(run)
        .await
        .map_err(|error| missing(error, &session.to_string()))?;
    let steps = db.all_steps(run).await?;
    let updated_at = steps.last().map_or(row.started_at, |step| step.created_at);
    let told = row.said.map(|said| {
        let content = vec![Part::Text { text: said }];
        (json!(Message::User { content }), row.started_at)
    });
    let said = steps
        .into_iter()
        .filter_map(|step| Some((message(&step)?, step.created_at)));
    let messages: Vec<MessageRow> = told
        .into_iter()
        .chain(said)
        .zip(1..)
        .map(|((body, created_at), place)| MessageRow {
            id: name(run, place),
            body,
            interrupted: false,
            created_at,
        })
        .collect();
    let session = SessionView {
        id: session,
        title: Some(row.title),
        agent: row.agent,
        user: None,
        metadata: json!({"taskId": row.task}),
        message_count: i32::try_from(messages.len()).unwrap_or(i32::MAX),
        created_at: row.started_at,
        updated_at,
    };
    let mut page: Vec<MessageRow> = messages
        .into_iter()
        .rev()
        .filter(|message| before.is_none_or(|before| message.id.uuid() < before.uuid()))
        .take(usize::try_from(limit).unwrap_or_default())
        .collect();
    page.reverse();
    Ok(SessionMessages {
        session,
        messages: views(page)?,
    })
}

/// Messages of a run have no ids of their own: they are numbered from the run's.
fn name(run: Id<Run>, place: u128) -> Id<ids::Message> {
    Uuid::from_u128(run.uuid().as_u128().wrapping_add(place)).into()
}

/// What was said in a step, without secrets.
fn message(step: &StepRow) -> Option<Value> {
    let mut body = step.body.clone();
    redact(&mut body);
    match step.kind {
        StepKind::Model => Some(body["message"].take()),
        StepKind::Tool => Some(json!(Message::Tool {
            tool_call_id: body["toolCallId"].as_str().unwrap_or_default().to_owned(),
            content: body["content"].as_str().unwrap_or_default().to_owned(),
            failed: body["state"] == "error",
        })),
        StepKind::Compaction | StepKind::Review => None,
    }
}
