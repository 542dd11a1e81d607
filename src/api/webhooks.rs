//! `/v1/webhooks`: other systems that are told of events (contract 2.10). Its objects are in snake case, as published.

use std::collections::HashMap;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Listed, MaybeJson, Page, Path, Query};
use crate::app::App;
use crate::event::{id as event_id, timestamp};
use crate::ids::{Delivery, Id, Webhook};
use crate::store::{
    AttemptRow, DeliveryFilter, DeliveryRow, NewWebhook, ProjectDb, SealedSecret, StoreError,
    WebhookRow,
};
use crate::webhook::{MOST, check_events, check_url, new_secret};

/// A webhook.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct WebhookView {
    /// Its id.
    pub id: String,
    /// Where it is.
    pub url: String,
    /// What it listens to.
    pub events: Vec<String>,
    /// Whether it is told of events.
    pub enabled: bool,
    /// Why it is not, if that was not your will.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disabled_reason: Option<String>,
    /// Since when every try has failed, if the last one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failing_since: Option<String>,
    /// Until when the secret before signs as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous_secret_until: Option<String>,
    /// What signs its deliveries. Shown this once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
    /// When it was made.
    pub created_at: String,
    /// When it was changed last.
    pub updated_at: String,
}

impl From<WebhookRow> for WebhookView {
    fn from(row: WebhookRow) -> Self {
        let now = chrono::Utc::now();
        let overlap = row.previous_until.filter(|until| *until > now);
        Self {
            id: row.id.to_string(),
            url: row.url,
            events: row.events,
            enabled: row.enabled,
            disabled_reason: row.disabled_reason,
            failing_since: row.failing_since.map(timestamp),
            previous_secret_until: overlap.map(timestamp),
            secret: None,
            created_at: timestamp(row.created_at),
            updated_at: timestamp(row.updated_at),
        }
    }
}

/// A new webhook.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct CreateWebhook {
    /// Where it is: an https URL of at most 2,048 bytes.
    #[schema(max_length = 2048)]
    pub url: Option<String>,
    /// What it listens to: `*`, namespaces such as `task:*`, or events' names.
    #[schema(min_items = 1, max_items = 100)]
    pub events: Option<Vec<String>>,
}

/// A change to a webhook; what is absent stays.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct UpdateWebhook {
    /// Where it is.
    #[schema(max_length = 2048)]
    pub url: Option<String>,
    /// What it listens to.
    #[schema(min_items = 1, max_items = 100)]
    pub events: Option<Vec<String>>,
    /// Whether it is told of events. One that is enabled hears of what happens from then on; what was on its way to one
    /// that is disabled is given up.
    pub enabled: Option<bool>,
}

/// How a secret gives way to the next.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct RotateSecret {
    /// How long the secret before signs as well, in hours: 24 when absent.
    #[serde(alias = "overlap_hours")]
    #[schema(minimum = 0, maximum = 168, default = 24)]
    pub overlap_hours: Option<f64>,
}

/// That a webhook is gone.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Deleted {
    /// Always true.
    pub deleted: bool,
}

/// An event on its way to a webhook.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct DeliveryView {
    /// Its id, which is sent as `webhook-id`, the same with every try.
    pub id: String,
    /// The webhook.
    pub webhook_id: String,
    /// The event's id.
    pub event_id: String,
    /// The event's name.
    pub event: String,
    /// `pending`, `delivered` or `failed`.
    pub status: String,
    /// How often it was tried.
    pub attempt_count: i32,
    /// The last tries, at most 20, oldest first.
    pub attempts: Vec<AttemptView>,
    /// When it is tried next.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_attempt_at: Option<String>,
    /// When it was made.
    pub created_at: String,
    /// When it was delivered or given up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<String>,
    /// What is sent. Not in lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub body: Option<Value>,
}

/// One try of a delivery.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct AttemptView {
    /// The how manieth, from 1.
    pub number: i32,
    /// When.
    pub at: String,
    /// The receiver's status; null when there was no answer.
    pub status_code: Option<i32>,
    /// Why it failed; null when it did not.
    pub error: Option<String>,
    /// How long it took.
    pub duration_ms: i32,
    /// The beginning of the receiver's answer.
    pub response: Option<String>,
}

impl From<AttemptRow> for AttemptView {
    fn from(row: AttemptRow) -> Self {
        Self {
            number: row.number,
            at: timestamp(row.at),
            status_code: row.status_code,
            error: row.error,
            duration_ms: row.duration_ms,
            response: row.response,
        }
    }
}

/// Which deliveries.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub struct DeliveryQuery {
    /// `pending`, `delivered` or `failed`.
    pub status: Option<String>,
}

fn webhook_id(id: &str) -> Result<Id<Webhook>, ApiError> {
    id.parse().map_err(|_| ApiError::missing("Webhook", id))
}

fn delivery_id(id: &str) -> Result<Id<Delivery>, ApiError> {
    id.parse().map_err(|_| ApiError::missing("Delivery", id))
}

fn found<T>(result: Result<T, StoreError>, what: &str, id: &str) -> Result<T, ApiError> {
    result.map_err(|error| match error {
        StoreError::NotFound => ApiError::missing(what, id),
        error => error.into(),
    })
}

fn checked_url(app: &App, url: &str) -> Result<(), ApiError> {
    check_url(url, app.poster.reach())
        .map(drop)
        .map_err(|sentence| ApiError::invalid("url", sentence))
}

fn checked_events(events: &[String]) -> Result<(), ApiError> {
    check_events(events).map_err(|sentence| ApiError::invalid("events", sentence))
}

fn fresh_secret(
    app: &App,
    db: &ProjectDb,
    id: Id<Webhook>,
) -> Result<(SecretString, SealedSecret), ApiError> {
    let internal = |error: crate::seal::SealError| ApiError::Internal(error.into());
    let secret = new_secret().map_err(internal)?;
    let sealed = app
        .seal_webhook_secret(db.project(), id, &secret)
        .map_err(internal)?;
    Ok((secret, sealed))
}

fn with_secret(row: WebhookRow, secret: &SecretString) -> WebhookView {
    WebhookView {
        secret: Some(secret.expose_secret().to_owned()),
        ..row.into()
    }
}

/// List the webhooks, oldest first.
#[utoipa::path(get, path = "/webhooks", tag = "Webhooks", params(Page),
    responses((status = 200, description = "The webhooks", body = Vec<WebhookView>)))]
pub async fn list_webhooks(Door(db): Door, Query(page): Query<Page>) -> Result<Response, ApiError> {
    let size = page.size()?;
    let rows = db.webhooks(page.after()?, size).await?;
    let views: Vec<WebhookView> = rows.into_iter().map(WebhookView::from).collect();
    let last = |view: &WebhookView| view.id.clone();
    Ok(Listed::new(views, size, "/v1/webhooks", last).into_response())
}

/// Make a webhook: it is told of what happens from now on. The answer shows its secret, this once.
#[utoipa::path(post, path = "/webhooks", tag = "Webhooks", request_body = CreateWebhook,
    responses(
        (status = 201, description = "The webhook, with its secret", body = WebhookView),
        (status = 400, description = "A member is missing or wrong, or there are ten already", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn create_webhook(
    State(app): State<App>,
    Door(db): Door,
    Json(new): Json<CreateWebhook>,
) -> Result<(StatusCode, Json<WebhookView>), ApiError> {
    let url = new
        .url
        .ok_or_else(|| ApiError::invalid("url", "url: required"))?;
    let events = new
        .events
        .ok_or_else(|| ApiError::invalid("events", "events: required"))?;
    checked_url(&app, &url)?;
    checked_events(&events)?;
    let id = Id::new();
    let (secret, sealed) = fresh_secret(&app, &db, id)?;
    let mut tx = db.begin();
    if tx.count_webhooks().await? >= MOST {
        return Err(ApiError::BadRequest {
            message: format!("A project has at most {MOST} webhooks. Delete one first."),
            param: None,
        });
    }
    let new = NewWebhook {
        id,
        url: &url,
        events: &events,
        secret: &sealed,
    };
    let row = tx.create_webhook(&new).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(with_secret(row, &secret))))
}

/// Read a webhook.
#[utoipa::path(get, path = "/webhooks/{id}", tag = "Webhooks", params(("id" = String, Path, description = "Its id")),
    responses((status = 200, description = "The webhook", body = WebhookView), (status = 404, description = "No such webhook", body = ErrorBody)))]
pub async fn read_webhook(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<WebhookView>, ApiError> {
    let row = found(db.webhook(webhook_id(&id)?).await, "Webhook", &id)?;
    Ok(Json(row.into()))
}

/// Change a webhook.
#[utoipa::path(patch, path = "/webhooks/{id}", tag = "Webhooks", params(("id" = String, Path, description = "Its id")), request_body = UpdateWebhook,
    responses(
        (status = 200, description = "The webhook", body = WebhookView),
        (status = 400, description = "A member is wrong", body = ErrorBody),
        (status = 404, description = "No such webhook", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn update_webhook(
    State(app): State<App>,
    Door(db): Door,
    Path(id): Path<String>,
    Json(change): Json<UpdateWebhook>,
) -> Result<Json<WebhookView>, ApiError> {
    let webhook = webhook_id(&id)?;
    if let Some(url) = &change.url {
        checked_url(&app, url)?;
    }
    if let Some(events) = &change.events {
        checked_events(events)?;
    }
    let mut tx = db.begin();
    let (url, events) = (change.url.as_deref(), change.events.as_deref());
    let changed = tx.update_webhook(webhook, url, events).await;
    found(changed, "Webhook", &id)?;
    match change.enabled {
        Some(true) => tx.enable_webhook(webhook).await?,
        Some(false) => drop(tx.disable_webhook(webhook, None).await?),
        None => {}
    }
    tx.commit().await?;
    let row = found(db.webhook(webhook).await, "Webhook", &id)?;
    Ok(Json(row.into()))
}

/// Delete a webhook and its deliveries.
#[utoipa::path(delete, path = "/webhooks/{id}", tag = "Webhooks", params(("id" = String, Path, description = "Its id")),
    responses((status = 200, description = "It is gone", body = Deleted), (status = 404, description = "No such webhook", body = ErrorBody)))]
pub async fn delete_webhook(
    Door(db): Door,
    Path(id): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    let webhook = webhook_id(&id)?;
    let mut tx = db.begin();
    found(tx.delete_webhook(webhook).await, "Webhook", &id)?;
    tx.commit().await?;
    Ok(Json(Deleted { deleted: true }))
}

/// Give a webhook a new secret. The answer shows it, this once; the one before signs as well for a while.
#[utoipa::path(post, path = "/webhooks/{id}/rotate-secret", tag = "Webhooks", params(("id" = String, Path, description = "Its id")), request_body = Option<RotateSecret>,
    responses(
        (status = 200, description = "The webhook, with its new secret", body = WebhookView),
        (status = 400, description = "The overlap is out of bounds", body = ErrorBody),
        (status = 404, description = "No such webhook", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn rotate_secret(
    State(app): State<App>,
    Door(db): Door,
    Path(id): Path<String>,
    MaybeJson(rotate): MaybeJson<RotateSecret>,
) -> Result<Json<WebhookView>, ApiError> {
    let webhook = webhook_id(&id)?;
    let hours = rotate.overlap_hours.unwrap_or(24.0);
    if !(0.0..=168.0).contains(&hours) {
        return Err(ApiError::invalid(
            "overlapHours",
            "`overlapHours` must be from 0 to 168.",
        ));
    }
    let overlap = Duration::from_secs_f64(hours * 3600.0);
    let (secret, sealed) = fresh_secret(&app, &db, webhook)?;
    let mut tx = db.begin();
    let rotated = tx.rotate_secret(webhook, &sealed, overlap).await;
    let row = found(rotated, "Webhook", &id)?;
    tx.commit().await?;
    Ok(Json(with_secret(row, &secret)))
}

/// The deliveries as they are shown, each with its tries.
async fn delivery_views(
    db: &ProjectDb,
    webhook: Id<Webhook>,
    rows: Vec<DeliveryRow>,
) -> Result<Vec<DeliveryView>, ApiError> {
    let ids: Vec<Id<Delivery>> = rows.iter().map(|row| row.id).collect();
    let mut attempts: HashMap<Id<Delivery>, Vec<AttemptView>> = HashMap::new();
    for row in db.attempts(&ids).await? {
        attempts.entry(row.delivery).or_default().push(row.into());
    }
    let view = |row: DeliveryRow| DeliveryView {
        id: row.id.to_string(),
        webhook_id: webhook.to_string(),
        event_id: event_id(row.seq),
        event: row.event,
        status: row.status,
        attempt_count: row.attempts,
        attempts: attempts.remove(&row.id).unwrap_or_default(),
        next_attempt_at: row.next_at.map(timestamp),
        created_at: timestamp(row.created_at),
        ended_at: row.ended_at.map(timestamp),
        body: None,
    };
    Ok(rows.into_iter().map(view).collect())
}

/// List a webhook's deliveries, newest first, each with its tries. They are kept as long as events are.
#[utoipa::path(get, path = "/webhooks/{id}/deliveries", tag = "Webhooks", params(("id" = String, Path, description = "The webhook's id"), DeliveryQuery, Page),
    responses((status = 200, description = "The deliveries", body = Vec<DeliveryView>), (status = 404, description = "No such webhook", body = ErrorBody)))]
pub async fn list_deliveries(
    Door(db): Door,
    Path(id): Path<String>,
    Query(query): Query<DeliveryQuery>,
    Query(page): Query<Page>,
) -> Result<Response, ApiError> {
    let webhook = webhook_id(&id)?;
    let size = page.size()?;
    let status = query.status.as_deref();
    if status.is_some_and(|status| !["pending", "delivered", "failed"].contains(&status)) {
        return Err(ApiError::invalid(
            "status",
            "`status` must be one of pending, delivered, failed.",
        ));
    }
    let which = DeliveryFilter {
        webhook,
        status,
        before: page.after()?,
        limit: size,
    };
    found(db.webhook(webhook).await, "Webhook", &id)?;
    let rows = db.deliveries(which).await?;
    let views = delivery_views(&db, webhook, rows).await?;
    let path = format!("/v1/webhooks/{webhook}/deliveries");
    let path = status.map_or(path.clone(), |status| format!("{path}?status={status}"));
    let last = |view: &DeliveryView| view.id.clone();
    Ok(Listed::new(views, size, &path, last).into_response())
}

async fn one_delivery(
    db: &ProjectDb,
    webhook: &str,
    delivery: &str,
) -> Result<DeliveryView, ApiError> {
    let id = webhook_id(webhook)?;
    let found = found(
        db.delivery(id, delivery_id(delivery)?).await,
        "Delivery",
        delivery,
    )?;
    let (row, body) = found;
    let mut views = delivery_views(db, id, vec![row]).await?;
    let mut view = views
        .pop()
        .ok_or_else(|| ApiError::missing("Delivery", delivery))?;
    view.body = serde_json::from_str(&body).ok();
    Ok(view)
}

/// Read a delivery, with what it sends.
#[utoipa::path(get, path = "/webhooks/{id}/deliveries/{deliveryId}", tag = "Webhooks",
    params(("id" = String, Path, description = "The webhook's id"), ("deliveryId" = String, Path, description = "Its id")),
    responses((status = 200, description = "The delivery", body = DeliveryView), (status = 404, description = "No such delivery", body = ErrorBody)))]
pub async fn read_delivery(
    Door(db): Door,
    Path((id, delivery)): Path<(String, String)>,
) -> Result<Json<DeliveryView>, ApiError> {
    Ok(Json(one_delivery(&db, &id, &delivery).await?))
}

/// Make a delivery once more, under the same `webhook-id`; one that is pending is tried at once.
#[utoipa::path(post, path = "/webhooks/{id}/deliveries/{deliveryId}/redeliver", tag = "Webhooks",
    params(("id" = String, Path, description = "The webhook's id"), ("deliveryId" = String, Path, description = "Its id")),
    responses(
        (status = 202, description = "It is on its way", body = DeliveryView),
        (status = 404, description = "No such delivery", body = ErrorBody),
        (status = 409, description = "The webhook is disabled", body = ErrorBody),
    ))]
pub async fn redeliver(
    Door(db): Door,
    Path((id, delivery)): Path<(String, String)>,
) -> Result<(StatusCode, Json<DeliveryView>), ApiError> {
    let (webhook, wanted) = (webhook_id(&id)?, delivery_id(&delivery)?);
    let row = found(db.webhook(webhook).await, "Webhook", &id)?;
    if !row.enabled {
        return Err(ApiError::Conflict(
            "The webhook is disabled. Enable it first.".to_owned(),
        ));
    }
    let mut tx = db.begin();
    let again = tx.redeliver(webhook, wanted).await;
    found(again, "Delivery", &delivery)?;
    tx.commit().await?;
    let view = one_delivery(&db, &id, &delivery).await?;
    Ok((StatusCode::ACCEPTED, Json(view)))
}
