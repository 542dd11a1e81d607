//! How long a request may wait for a database that neither answers nor fails.

use std::time::Duration;

use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;

use super::error::ApiError;
use crate::app::App;

/// Answers 503 to a request that has waited for too long. Not to those that may take their time: a chat's answer is a model's, and what is deleted
/// may be much.
///
/// # Errors
/// [`ApiError::Unavailable`].
pub async fn bound(
    State(app): State<App>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let route = request.extensions().get::<MatchedPath>();
    let chats = route.is_some_and(|route| route.as_str().ends_with("/chat/completions"));
    if chats || request.method() == Method::DELETE {
        return Ok(next.run(request).await);
    }
    within(app.config.database_patience(), async {
        Ok(next.run(request).await)
    })
    .await
}

/// Does what needs the database alone, unless it takes too long.
///
/// # Errors
/// [`ApiError::Unavailable`], or what `deed` fails with.
pub async fn within<T>(
    patience: Duration,
    deed: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(patience, deed).await {
        Ok(done) => done,
        Err(_late) => Err(ApiError::Unavailable(anyhow::anyhow!(
            "the database has not answered for {} ms",
            patience.as_millis()
        ))),
    }
}
