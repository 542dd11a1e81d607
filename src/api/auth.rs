//! Who asks: a project by its key, or the admin by the server's token.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use uuid::Uuid;

use super::error::ApiError;
use super::limit::Allowance;
use super::patience::within;
use crate::app::App;
use crate::seal::sha256;
use crate::store::{ProjectDb, StoreError, World};

/// Admits the holder of a project's key, and places that project's [`ProjectDb`] in the request.
///
/// The admin token is admitted too if `x-project-id` names a project, to its live world.
pub async fn project(
    State(app): State<App>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let opened = open(&app, request.headers());
    let (caller, door) = within(&app, opened).await?;
    if let Some(presented) = Presented::of(&app, request.headers(), door.project()) {
        request.extensions_mut().insert(presented);
    }
    let allowance = app.limits.take(caller);
    request.extensions_mut().insert(door);
    let mut response = match &allowance {
        Allowance::Refused { retry_after, .. } => {
            axum::response::IntoResponse::into_response(ApiError::RateLimited {
                message: "Too many requests for this API key. Slow down.".to_owned(),
                retry_after: *retry_after,
            })
        }
        Allowance::Unlimited | Allowance::Granted { .. } => next.run(request).await,
    };
    allowance.write(response.headers_mut());
    Ok(response)
}

/// What a request came with, for answers that outlive the check of it.
#[derive(Debug, Clone, Copy)]
pub enum Presented {
    /// A project's key.
    Key {
        /// The world that it opens.
        world: World,
        /// What is known of it.
        hash: [u8; 32],
    },
    /// The admin's token, with a project.
    Admin(Uuid),
}

impl Presented {
    fn of(app: &App, headers: &HeaderMap, project: Uuid) -> Option<Self> {
        let key = credential(headers)?;
        if app.is_admin(key) {
            return Some(Self::Admin(project));
        }
        let (world, hash) = (world_of(key)?, sha256(key));
        Some(Self::Key { world, hash })
    }

    /// What its holder is told when it opens nothing any more.
    pub fn refusal(self) -> ApiError {
        match self {
            Self::Key { .. } => ApiError::InvalidApiKey,
            Self::Admin(project) => ApiError::missing("Project", &project.to_string()),
        }
    }

    /// Whether it opens nothing any more. A database that is away does not say so.
    pub async fn is_revoked(self, app: &App) -> bool {
        let opened = match self {
            Self::Key { world, hash } => {
                let opened = app.db.authenticate(world, hash);
                app.db.in_time(opened).await.map(drop)
            }
            Self::Admin(project) => {
                let opened = app.db.admin_door(project);
                app.db.in_time(opened).await.map(drop)
            }
        };
        matches!(opened, Err(StoreError::NotFound))
    }
}

/// Admits the admin.
pub async fn admin(
    State(app): State<App>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let token = credential(request.headers()).ok_or(ApiError::Unauthorized)?;
    if !app.is_admin(token) {
        return Err(ApiError::Unauthorized);
    }
    Ok(next.run(request).await)
}

async fn open(app: &App, headers: &HeaderMap) -> Result<(Uuid, ProjectDb), ApiError> {
    let key = credential(headers).ok_or(ApiError::Unauthorized)?;
    if app.is_admin(key) {
        let project = headers
            .get("x-project-id")
            .and_then(|id| id.to_str().ok())
            .ok_or(ApiError::Unauthorized)?;
        let id = project
            .parse()
            .map_err(|_| ApiError::missing("Project", project))?;
        return match app.db.admin_door(id).await {
            Ok(door) => Ok((id, door)),
            Err(StoreError::NotFound) => Err(ApiError::missing("Project", project)),
            Err(error) => Err(error.into()),
        };
    }
    let world = world_of(key).ok_or(ApiError::InvalidApiKey)?;
    match app.db.authenticate(world, sha256(key)).await {
        Ok(opened) => Ok(opened),
        Err(StoreError::NotFound) => Err(ApiError::InvalidApiKey),
        Err(error) => Err(error.into()),
    }
}

/// The world is in the key's prefix, and nowhere else.
fn world_of(key: &str) -> Option<World> {
    if key.starts_with("sk_live_") {
        Some(World::Live)
    } else if key.starts_with("sk_test_") {
        Some(World::Test)
    } else {
        None
    }
}

/// `Authorization: Bearer …`, or `x-api-key` when there is no `Authorization`. Never the query string,
/// which ends up in logs (contract 1.2).
fn credential(headers: &HeaderMap) -> Option<&str> {
    let text = match headers.get(header::AUTHORIZATION) {
        Some(value) => {
            let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
            if !scheme.eq_ignore_ascii_case("bearer") {
                return None;
            }
            token
        }
        None => headers.get("x-api-key")?.to_str().ok()?,
    };
    Some(text.trim()).filter(|token| !token.is_empty())
}
