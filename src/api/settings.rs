//! `/v1/config`: a project's settings (contract 2.6.3, design 0.1).

use axum::extract::State;
use serde_json::{Map, Value, json};

use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json};
use crate::app::App;
use crate::event::Event;
use crate::task::Settings;

/// Read the project's settings, defaults included.
#[utoipa::path(get, path = "/config", tag = "Config",
    responses((status = 200, description = "The settings", body = Settings)))]
pub async fn read_settings(Door(db): Door) -> Result<Json<Value>, ApiError> {
    Ok(Json(json!(*db.settings().await?)))
}

/// Change settings: what is absent stays, what is null has its default again.
#[utoipa::path(patch, path = "/config", tag = "Config", request_body = Settings,
    responses(
        (status = 200, description = "The settings", body = Settings),
        (status = 400, description = "A setting is unknown or wrong", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn update_settings(
    State(app): State<App>,
    Door(db): Door,
    Json(change): Json<Map<String, Value>>,
) -> Result<Json<Value>, ApiError> {
    let mut tx = db.begin();
    let mut body = tx.lock_settings().await?;
    for (setting, value) in &change {
        // A setting that does not exist is refused even if it is to be cleared.
        if value.is_null() {
            body.remove(setting);
            let alone = Map::from_iter([(setting.clone(), Value::Null)]);
            if json!(Settings::default()).get(setting).is_none() {
                check(&alone)?;
            }
        } else {
            body.insert(setting.clone(), value.clone());
        }
    }
    // What another version has stored is not this caller's fault.
    let set = change.into_iter().filter(|(_, value)| !value.is_null());
    check(&set.collect())?;
    let settings = Settings::restored(&body);
    for (setting, model) in [
        ("defaultModel", &settings.default_model),
        ("judgeModel", &settings.judge_model),
        ("orchestratorModel", &settings.orchestrator_model),
    ] {
        if let Some(model) = model.as_deref().filter(|model| !app.providers.knows(model)) {
            return Err(ApiError::invalid(
                setting,
                format!("`{setting}` \"{model}\" names no known provider: write `provider:model`."),
            ));
        }
    }
    tx.save_settings(&body).await?;
    tx.emit(Event::new("config:reloaded", json!({})));
    // There may be more places now; who waits for one looks for itself.
    tx.unpark_all().await?;
    if settings.enable_scheduler {
        tx.unpark_schedules().await?;
    }
    tx.commit().await?;
    Ok(Json(json!(settings)))
}

fn check(body: &Map<String, Value>) -> Result<Settings, ApiError> {
    Settings::read(body).map_err(|error| ApiError::invalid(&error.setting, error.message))
}

/// Change settings, by the newer path.
#[utoipa::path(patch, path = "/config/settings", tag = "Config", request_body = Settings,
    responses(
        (status = 200, description = "The settings", body = Settings),
        (status = 400, description = "A setting is unknown or wrong", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn update_settings_alias(
    app: State<App>,
    door: Door,
    change: Json<Map<String, Value>>,
) -> Result<Json<Value>, ApiError> {
    update_settings(app, door, change).await
}
