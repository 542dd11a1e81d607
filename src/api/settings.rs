//! `/v1/config`: a project's settings (contract 2.6.3, design 0.1).

use axum::extract::State;
use serde_json::{Map, Value, json};

use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, plain};
use crate::app::{App, CredentialsError, ModelError};
use crate::event::Event;
use crate::llm::ResolveError;
use crate::store::ProjectDb;
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
    // What another version has stored is not this caller's fault, nor what has become of a provider since.
    let set = change
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(setting, value)| (setting.clone(), value.clone()));
    let given = check(&set.collect())?;
    for (setting, model) in [
        ("defaultModel", &given.default_model),
        ("judgeModel", &given.judge_model),
        ("orchestratorModel", &given.orchestrator_model),
    ] {
        if let Some(model) = model {
            check_model(&app, &db, (setting, setting), model).await?;
        }
    }
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
    let settings = Settings::restored(&body);
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
    Settings::read(body, plain).map_err(|error| ApiError::invalid(&error.setting, error.message))
}

/// Refuses a model of a provider that neither the server nor the project knows. A provider without a key may get one later.
/// `param` is the member of the request, `place` what in it names the model.
pub(super) async fn check_model(
    app: &App,
    db: &ProjectDb,
    (param, place): (&str, &str),
    model: &str,
) -> Result<(), ApiError> {
    let is_unknown = match app.resolve(db, model).await {
        Err(ModelError::Unusable(ResolveError::Unknown(_))) => true,
        // Which providers the project has cannot be told; its own might be meant.
        Err(ModelError::Credentials(CredentialsError::Sealed { .. })) => {
            !app.providers.knows(model)
        }
        Err(ModelError::Credentials(error)) => return Err(error.into()),
        Ok(_) | Err(ModelError::Unusable(_)) => false,
    };
    if !is_unknown {
        return Ok(());
    }
    Err(ApiError::invalid(
        param,
        format!(
            "`{place}` \"{model}\" names no known provider: write `provider:model`, with a provider that the server or the project has."
        ),
    ))
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
