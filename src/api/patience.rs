//! How long a request may wait for a database that neither answers nor fails.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use futures::StreamExt;
use tokio::time::Instant;

use super::error::ApiError;
use crate::app::App;

/// Answers 503 to a request that has waited for too long since the last of it came in. Not to those that may take their time: a chat's answer is a
/// model's, and what is deleted may be much. What the database was asked for may still be done.
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
    let patience = app.config.database_patience();
    let heard = Heard::default();
    let request = match *request.method() {
        Method::GET | Method::HEAD => request,
        _ => request.map(|body| heard.listen(body)),
    };
    let mut answer = std::pin::pin!(next.run(request));
    loop {
        match tokio::time::timeout_at(heard.last() + patience, &mut answer).await {
            Ok(response) => return Ok(response),
            Err(_) if heard.last() + patience > Instant::now() => {}
            Err(_late) => return Err(late(patience)),
        }
    }
}

/// When the last of a request's body came in: a slow caller is no slow database.
#[derive(Debug, Clone)]
struct Heard(Arc<Mutex<Instant>>);

impl Default for Heard {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }
}

impl Heard {
    const POISONED: &str = "nothing panics while it holds a time";

    fn last(&self) -> Instant {
        *self.0.lock().expect(Self::POISONED)
    }

    fn listen(&self, body: Body) -> Body {
        let heard = self.clone();
        Body::from_stream(body.into_data_stream().inspect(move |_| {
            *heard.0.lock().expect(Self::POISONED) = Instant::now();
        }))
    }
}

fn late(patience: Duration) -> ApiError {
    ApiError::Unavailable(anyhow::anyhow!(
        "the database has not answered for {} ms",
        patience.as_millis()
    ))
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
        Err(_late) => Err(late(patience)),
    }
}
