//! What runs did, step by step (contract 2.4.2 and 2.6.6), without secrets.

use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Listed, Page, Path, Query, with_next};
use super::tasks::{refused, task_id};
use crate::event::timestamp;
use crate::ids::{Id, Run};
use crate::store::{ProjectDb, StepKind, StepRow, StoreError};

/// What a task's last run did, step by step: `entries` are paged by the number of their step.
#[utoipa::path(get, path = "/tasks/{id}/activity", tag = "Tasks", params(("id" = String, Path, description = "Its id"), Page),
    responses(
        (status = 200, description = "The steps", body = Object),
        (status = 400, description = "No such page", body = ErrorBody),
        (status = 404, description = "No such task", body = ErrorBody),
    ))]
pub async fn read_activity(
    Door(db): Door,
    Path(id): Path<String>,
    Query(page): Query<Page>,
) -> Result<Response, ApiError> {
    let task = db
        .task(task_id(&id)?)
        .await
        .map_err(|error| refused(error.into(), &id))?;
    let session = task.document.session;
    let mut run = Value::Null;
    let mut listed = Listed {
        items: Vec::new(),
        next: None,
    };
    if let Some(last) = task.run.or(session.map(Id::from)) {
        match db.run(last).await {
            Ok(row) => {
                run = json!({
                    "id": row.id, "status": row.status, "startedAt": timestamp(row.started_at),
                    "endedAt": row.ended_at.map(timestamp),
                });
            }
            Err(StoreError::NotFound) => {}
            Err(error) => return Err(error.into()),
        }
        listed = entries(&db, last, &page, &format!("/v1/tasks/{id}/activity")).await?;
    }
    let resolution = session.map_or("missing", |_| "explicit");
    let activity = json!({
        "task": task.view(), "run": run, "sessionId": session, "sessionResolution": resolution, "entries": listed.items,
    });
    Ok(with_next(Json(activity).into_response(), listed.next))
}

/// What the last run of a task did; nothing when there is no such run.
#[utoipa::path(get, path = "/agents/processes/{taskId}/activity", tag = "Agents", params(("taskId" = String, Path, description = "The task's id"), Page),
    responses(
        (status = 200, description = "Its steps", body = Vec<Object>),
        (status = 400, description = "No such page", body = ErrorBody),
    ))]
pub async fn read_process_activity(
    Door(db): Door,
    Path(task_id): Path<String>,
    Query(page): Query<Page>,
) -> Result<Response, ApiError> {
    let run = match task_id.parse() {
        Ok(id) => match db.task(id).await {
            Ok(task) => task.run,
            Err(StoreError::NotFound) => None,
            Err(error) => return Err(error.into()),
        },
        Err(_) => None,
    };
    let path = format!("/v1/agents/processes/{task_id}/activity");
    match run {
        Some(run) => Ok(entries(&db, run, &page, &path).await?.into_response()),
        None => Ok(Json(Vec::<Value>::new()).into_response()),
    }
}

/// A page of a run's steps, as log entries.
async fn entries(
    db: &ProjectDb,
    run: Id<Run>,
    page: &Page,
    path: &str,
) -> Result<Listed<Value>, ApiError> {
    let size = page.size()?;
    let from = page
        .after::<i32>()?
        .map_or(0, |after| after.saturating_add(1));
    let steps = db.steps(run, from, size).await?;
    let listed = Listed::new(steps, size, path, |step| step.number.to_string());
    Ok(Listed {
        items: listed.items.iter().map(entry).collect(),
        next: listed.next,
    })
}

fn entry(step: &StepRow) -> Value {
    let event = match step.kind {
        StepKind::Model => "assistant",
        StepKind::Tool => "tool",
        StepKind::Compaction => "compaction",
        StepKind::Review => "review",
    };
    let mut data = step.body.clone();
    let said = match step.kind {
        StepKind::Compaction => data["messages"]
            .as_array_mut()
            .map_or(&mut [][..], Vec::as_mut_slice),
        _ => data
            .get_mut("message")
            .map_or(&mut [][..], std::slice::from_mut),
    };
    for message in said.iter_mut().filter_map(Value::as_object_mut) {
        // What a provider wants back is its own, and sealed.
        message.remove("state");
    }
    redact(&mut data);
    json!({"ts": timestamp(step.created_at), "event": event, "step": step.number, "data": data})
}

const SECRET: [&str; 7] = [
    "pass",
    "secret",
    "token",
    "key",
    "auth",
    "password",
    "credential",
];

/// Hides what tools were given under names that sound secret (contract 2.4.2), in arguments that are JSON text too.
pub(super) fn redact(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(redact),
        Value::Object(members) => {
            for (name, member) in members.iter_mut() {
                let lower = name.to_lowercase();
                match member {
                    Value::String(text) if name == "arguments" => {
                        if let Ok(mut parsed) = serde_json::from_str::<Value>(text) {
                            redact(&mut parsed);
                            *text = parsed.to_string();
                        }
                    }
                    member if SECRET.iter().any(|word| lower.contains(word)) => hide(member),
                    member => redact(member),
                }
            }
        }
        _ => {}
    }
}

/// Hides every text of something whose name sounds secret. The counts of a model's tokens are no secret, and are numbers.
fn hide(value: &mut Value) {
    match value {
        Value::String(text) => "[REDACTED]".clone_into(text),
        Value::Array(items) => items.iter_mut().for_each(hide),
        Value::Object(members) => members.values_mut().for_each(hide),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_sounds_secret_is_hidden_in_arguments_too() {
        let mut body = json!({
            "name": "http_fetch", "usage": {"prompt_tokens": 7},
            "arguments": r#"{"url":"https://a","headers":{"Authorization":"Bearer x"},"apiKey":"y","apiKeys":["y"],"auth":{"value":"y"}}"#,
        });
        redact(&mut body);
        assert_eq!(body["usage"]["prompt_tokens"], 7);
        let text = body.to_string();
        assert!(
            !text.contains("Bearer x") && !text.contains("\\\"y\\\"") && text.contains("https://a"),
            "{text}"
        );
    }
}
