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
    let (began, body) = (Instant::now(), Incoming::default());
    let request = match *request.method() {
        Method::GET | Method::HEAD => request,
        _ => request.map(|whole| body.watch(whole)),
    };
    let mut answer = std::pin::pin!(next.run(request));
    let mut unanswered = Unanswered::new(&app);
    unanswered.body = Some(body.clone());
    loop {
        // A slow caller is no slow database, but does not hold us up for ever.
        let since = body.last().unwrap_or(began).min(began + LONGEST_BODY);
        match tokio::time::timeout_at(since + patience, &mut answer).await {
            Ok(response) => {
                unanswered.answered = true;
                return Ok(response);
            }
            Err(_)
                if body.last().is_some_and(|last| last > since) && since < began + LONGEST_BODY => {
            }
            Err(_) if body.is_under_way() => return Err(too_slow()),
            Err(_late) => return Err(late(patience)),
        }
    }
}

/// How long a body may take to come in.
const LONGEST_BODY: Duration = Duration::from_secs(600);

/// What is known of a request's body.
#[derive(Debug, Clone, Default)]
struct Incoming(Arc<Mutex<Progress>>);

#[derive(Debug, Default)]
struct Progress {
    /// When the last of it came.
    last: Option<Instant>,
    /// Whether someone reads it, and there is more to come.
    under_way: bool,
}

impl Incoming {
    const POISONED: &str = "nothing panics while it holds a time";

    fn last(&self) -> Option<Instant> {
        self.0.lock().expect(Self::POISONED).last
    }

    fn is_under_way(&self) -> bool {
        self.0.lock().expect(Self::POISONED).under_way
    }

    fn note(&self, under_way: bool) {
        let last = Some(Instant::now());
        *self.0.lock().expect(Self::POISONED) = Progress { last, under_way };
    }

    fn watch(&self, body: Body) -> Body {
        let incoming = self.clone();
        let mut pieces = body.into_data_stream();
        Body::from_stream(async_stream::stream! {
            incoming.note(true);
            while let Some(piece) = pieces.next().await {
                incoming.note(true);
                yield piece;
            }
            incoming.note(false);
        })
    }
}

fn too_slow() -> ApiError {
    ApiError::BadRequest {
        message: "The body did not come in time. Send it faster, or in smaller parts.".to_owned(),
        param: None,
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
    app: &App,
    deed: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    let patience = app.config.database_patience();
    let mut deed = std::pin::pin!(deed);
    let mut unanswered = Unanswered::new(app);
    match tokio::time::timeout(patience, deed.as_mut()).await {
        Ok(done) => {
            unanswered.answered = true;
            done
        }
        Err(_late) => Err(late(patience)),
    }
}

/// Something that waits for the database. If it is given up, or whoever wanted it leaves, after some time without an answer, the connection that it leaves behind may
/// be dead. To be dropped before what it waits for, so to be declared after it.
struct Unanswered<'a> {
    app: &'a App,
    began: Instant,
    /// What comes in before anything is asked of the database, for which a slow caller is to blame.
    body: Option<Incoming>,
    answered: bool,
}

impl<'a> Unanswered<'a> {
    fn new(app: &'a App) -> Self {
        Self {
            app,
            began: Instant::now(),
            body: None,
            answered: false,
        }
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        let body = self.body.as_ref();
        let since = body.and_then(Incoming::last).unwrap_or(self.began);
        let comes_in = body.is_some_and(Incoming::is_under_way);
        if !self.answered && !comes_in && since.elapsed() > LONG {
            self.app.db.suspect();
        }
    }
}

/// How long the database takes for nothing when it is well.
const LONG: Duration = Duration::from_secs(1);
