//! Whether the server is alive, and whether it can work.

use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use std::time::Duration;

use super::extract::Json;
use crate::app::App;
use crate::store::{MigrationState, migration_state};

/// The server is alive.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Health {
    /// Always `ok`.
    pub status: &'static str,
    /// The server's version.
    pub version: &'static str,
    /// Seconds since it started.
    pub uptime: u64,
}

/// Whether the server can work.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Readiness {
    /// `ready`, or what is missing.
    pub status: &'static str,
}

/// Whether the server is alive. Needs no key.
#[utoipa::path(get, path = "/health", tag = "Health", security(()),
    responses((status = 200, description = "It is", body = Health)))]
pub async fn health(State(app): State<App>) -> Json<Health> {
    Json(Health {
        status: "ok",
        version: env!("CARGO_PKG_VERSION"),
        uptime: app.started.elapsed().as_secs(),
    })
}

/// How long the database may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether the server can work: its database answers and is at its version. Needs no key.
pub async fn ready(State(app): State<App>) -> (StatusCode, Json<Readiness>) {
    let state = tokio::time::timeout(PATIENCE, migration_state(&app.db)).await;
    let (code, status) = match state {
        Ok(Ok(MigrationState::Current)) if app.stopping.is_cancelled() => {
            (StatusCode::SERVICE_UNAVAILABLE, "stopping")
        }
        Ok(Ok(MigrationState::Current)) => (StatusCode::OK, "ready"),
        Ok(Ok(MigrationState::Behind)) => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the database needs `polpo migrate`",
        ),
        Ok(Ok(MigrationState::Ahead)) => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the database is ahead of this program",
        ),
        Ok(Err(error)) => {
            tracing::warn!("not ready: {error}");
            (
                StatusCode::SERVICE_UNAVAILABLE,
                "the database cannot be reached",
            )
        }
        Err(_late) => {
            tracing::warn!("not ready: the database does not answer");
            (
                StatusCode::SERVICE_UNAVAILABLE,
                "the database does not answer",
            )
        }
    };
    (code, Json(Readiness { status }))
}
