//! `/v1/approvals` (contract 2.11).

use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Listed, MaybeJson, Page, Path, Query};
use super::shapes::ApprovalShape;
use super::tasks::refused;
use crate::ids::{Approval, Id};
use crate::lifecycle::{self, NotResolved};
use crate::store::{ApprovalRow, StoreError};

/// A request for approval.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = ApprovalShape)]
pub struct ApprovalView(Value);

/// Which requests.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(rename_all = "camelCase")]
pub struct ApprovalQuery {
    /// `pending`, `approved`, `rejected` or `timeout`.
    pub status: Option<String>,
    /// Those of this task.
    pub task_id: Option<String>,
    /// Those of this mission and its tasks.
    pub mission_id: Option<String>,
}

/// A yes.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Approve {
    /// Who says so; `user` when absent.
    #[schema(max_length = 200)]
    pub resolved_by: Option<String>,
    /// What they say.
    #[schema(max_length = 20000)]
    pub note: Option<String>,
}

/// A no.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Reject {
    /// What is to be done better.
    #[schema(value_type = String, min_length = 1, max_length = 20000)]
    pub feedback: Option<String>,
    /// Another name for `feedback`, which may be absent then and counts where both are given.
    #[schema(max_length = 20000)]
    pub reason: Option<String>,
    /// Who says so; `user` when absent.
    #[schema(max_length = 200)]
    pub resolved_by: Option<String>,
}

fn approval_id(id: &str) -> Result<Id<Approval>, ApiError> {
    id.parse().map_err(|_| ApiError::missing("Approval", id))
}

fn not_resolved(error: NotResolved, id: &str) -> ApiError {
    match error {
        NotResolved::Missing => ApiError::missing("Approval", id),
        NotResolved::Conflict(sentence) => ApiError::Conflict(sentence),
        NotResolved::Failed(error) => refused(error, id),
    }
}

fn short(param: &str, text: Option<&str>, most: usize) -> Result<(), ApiError> {
    match text {
        Some(text) if text.chars().count() > most => Err(ApiError::invalid(
            param,
            format!("`{param}` must be at most {most} characters."),
        )),
        _ => Ok(()),
    }
}

/// List requests, oldest first.
#[utoipa::path(get, path = "/approvals", tag = "Approvals", params(ApprovalQuery, Page),
    responses((status = 200, description = "The requests", body = Vec<ApprovalView>)))]
pub async fn list_approvals(
    Door(db): Door,
    Query(query): Query<ApprovalQuery>,
    Query(page): Query<Page>,
) -> Result<Response, ApiError> {
    let size = page.size()?;
    if let Some(status) = query.status.as_deref()
        && !["pending", "approved", "rejected", "timeout"].contains(&status)
    {
        return Err(ApiError::invalid(
            "status",
            "`status` must be one of pending, approved, rejected, timeout.",
        ));
    }
    let task = query.task_id.as_deref().map(str::parse).transpose();
    let mission = query.mission_id.as_deref().map(str::parse).transpose();
    let (Ok(task), Ok(mission)) = (task, mission) else {
        // No such task or mission has no requests.
        return Ok(Json(Vec::<Value>::new()).into_response());
    };
    let rows = db
        .approvals(query.status.as_deref(), task, mission, page.after()?, size)
        .await?;
    let mut kept = form_urlencoded::Serializer::new(String::new());
    for (key, value) in [
        ("status", &query.status),
        ("taskId", &query.task_id),
        ("missionId", &query.mission_id),
    ] {
        if let Some(value) = value {
            kept.append_pair(key, value);
        }
    }
    let kept = kept.finish();
    let path = if kept.is_empty() {
        "/v1/approvals".to_owned()
    } else {
        format!("/v1/approvals?{kept}")
    };
    let views: Vec<Value> = rows.iter().map(ApprovalRow::view).collect();
    let last = |view: &Value| view["id"].as_str().unwrap_or_default().to_owned();
    Ok(Listed::new(views, size, &path, last).into_response())
}

/// Read a request.
#[utoipa::path(get, path = "/approvals/{id}", tag = "Approvals", params(("id" = String, Path, description = "Its id")),
    responses((status = 200, description = "The request", body = ApprovalView), (status = 404, description = "No such request", body = ErrorBody)))]
pub async fn read_approval(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<ApprovalView>, ApiError> {
    match db.approval(approval_id(&id)?).await {
        Err(StoreError::NotFound) => Err(ApiError::missing("Approval", &id)),
        row => Ok(Json(ApprovalView(row?.view()))),
    }
}

/// Say yes: what waited for it goes on.
#[utoipa::path(post, path = "/approvals/{id}/approve", tag = "Approvals", params(("id" = String, Path, description = "Its id")), request_body = Option<Approve>,
    responses(
        (status = 200, description = "The request", body = ApprovalView),
        (status = 404, description = "No such request", body = ErrorBody),
        (status = 409, description = "It is answered already, or what it lets through cannot be done any more", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn approve(
    Door(db): Door,
    Path(id): Path<String>,
    MaybeJson(yes): MaybeJson<Approve>,
) -> Result<Json<ApprovalView>, ApiError> {
    short("resolvedBy", yes.resolved_by.as_deref(), 200)?;
    short("note", yes.note.as_deref(), 20_000)?;
    let by = yes.resolved_by.as_deref().unwrap_or("user");
    let row = lifecycle::approve(&db, approval_id(&id)?, by, yes.note.as_deref())
        .await
        .map_err(|error| not_resolved(error, &id))?;
    Ok(Json(ApprovalView(row.view())))
}

/// Say no, with feedback: the task is done again.
#[utoipa::path(post, path = "/approvals/{id}/reject", tag = "Approvals", params(("id" = String, Path, description = "Its id")), request_body = Reject,
    responses(
        (status = 200, description = "The request", body = ApprovalView),
        (status = 400, description = "There is no feedback", body = ErrorBody),
        (status = 404, description = "No such request", body = ErrorBody),
        (status = 409, description = "It is answered already, or was rejected too often", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn reject(
    Door(db): Door,
    Path(id): Path<String>,
    MaybeJson(no): MaybeJson<Reject>,
) -> Result<Json<ApprovalView>, ApiError> {
    let approval = approval_id(&id)?;
    let feedback = [no.feedback.as_deref(), no.reason.as_deref()]
        .into_iter()
        .flatten()
        .find(|feedback| !feedback.trim().is_empty());
    let feedback = feedback.ok_or_else(|| ApiError::invalid("feedback", "feedback: required"))?;
    short("feedback", Some(feedback), 20_000)?;
    short("resolvedBy", no.resolved_by.as_deref(), 200)?;
    let by = no.resolved_by.as_deref().unwrap_or("user");
    let row = lifecycle::reject(&db, approval, by, feedback)
        .await
        .map_err(|error| not_resolved(error, &id))?;
    Ok(Json(ApprovalView(row.view())))
}

/// Say no, by the older name.
#[utoipa::path(post, path = "/approvals/{id}/revise", tag = "Approvals", params(("id" = String, Path, description = "Its id")), request_body = Reject,
    responses(
        (status = 200, description = "The request", body = ApprovalView),
        (status = 400, description = "There is no feedback", body = ErrorBody),
        (status = 404, description = "No such request", body = ErrorBody),
        (status = 409, description = "It is answered already, or was rejected too often", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn revise(
    door: Door,
    id: Path<String>,
    no: MaybeJson<Reject>,
) -> Result<Json<ApprovalView>, ApiError> {
    reject(door, id, no).await
}
