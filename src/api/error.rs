//! Everything a caller can be told when a request does not succeed.

use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;

use crate::agent::TurnError;
use crate::app::CredentialsError;
use crate::llm::ProviderError;
use crate::store::StoreError;

/// Why a request was refused. The variant fixes status and code (contract 1.4); `Display` is the public sentence.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// No credential, or not in a form we know.
    #[error("Authentication required: send your project's key as `Authorization: Bearer sk_…`.")]
    Unauthorized,
    /// A key that opens nothing.
    #[error("This API key is unknown or was revoked.")]
    InvalidApiKey,
    /// A thing that does not exist, or is another's.
    #[error("{0}")]
    NotFound(String),
    /// It was there, and is not kept any more.
    #[error("{0}")]
    Gone(String),
    /// A parameter is missing or wrong.
    #[error("{message}")]
    BadRequest {
        /// What to change.
        message: String,
        /// The parameter at fault.
        param: Option<String>,
    },
    /// A document with several faults, which are told all at once.
    #[error("{message}")]
    Faults {
        /// What was not valid.
        message: String,
        /// What to change, a sentence each.
        details: Vec<String>,
    },
    /// The path exists, the method does not.
    #[error("This path does not take this method: see the `Allow` header.")]
    MethodNotAllowed,
    /// The body is over the limit.
    #[error("The request body is larger than this server accepts.")]
    TooLarge,
    /// The body is not JSON.
    #[error("Send the body as JSON with `Content-Type: application/json`.")]
    UnsupportedMediaType,
    /// It clashes with what is there.
    #[error("{0}")]
    Conflict(String),
    /// Too many requests, ours or the provider's limit.
    #[error("{message}")]
    RateLimited {
        /// Whose limit it is.
        message: String,
        /// When to come back.
        retry_after: Duration,
    },
    /// The provider failed, refused our credentials, or said nothing we understand.
    #[error("{0}")]
    Provider(String),
    /// The provider was silent for too long.
    #[error("The model's provider did not answer in time. Try again.")]
    ProviderTimeout,
    /// The database is away, for the moment.
    #[error("The server cannot reach its database. Try again in a moment.")]
    Unavailable(#[source] anyhow::Error),
    /// A defect of ours.
    #[error("Internal server error")]
    Internal(#[source] anyhow::Error),
}

/// A failed request's answer before it takes the shape that its caller reads.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub struct ErrorBody {
    /// A sentence that says what to do next.
    pub error: String,
    /// One of contract 1.4's codes.
    pub code: &'static str,
    /// Everything that is wrong with a document, a sentence each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<Vec<String>>,
    #[serde(skip)]
    kind: &'static str,
    #[serde(skip)]
    param: Option<String>,
}

impl ApiError {
    /// A 400 that names its parameter.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::BadRequest {
            message: message.into(),
            param: Some(param.to_owned()),
        }
    }

    /// A 400 that tells every fault of a document.
    pub fn faults(details: Vec<String>) -> Self {
        const TOLD: usize = 20;
        const LISTED: usize = 100;
        let mut message = details[..details.len().min(TOLD)].join("; ");
        if details.len() > TOLD {
            message += "; and more, in `details`";
        }
        let mut details = details;
        let more = details.len().saturating_sub(LISTED);
        details.truncate(LISTED);
        if more > 0 {
            details.push(format!("and {more} more"));
        }
        Self::Faults { message, details }
    }

    /// A 404 for a named thing.
    pub fn missing(what: &str, name: &str) -> Self {
        Self::NotFound(format!("{what} \"{name}\" not found"))
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Unauthorized | Self::InvalidApiKey => StatusCode::UNAUTHORIZED,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Gone(_) => StatusCode::GONE,
            Self::BadRequest { .. } | Self::Faults { .. } => StatusCode::BAD_REQUEST,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::RateLimited { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Provider(_) => StatusCode::BAD_GATEWAY,
            Self::ProviderTimeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The code and OpenAI's type for it.
    fn codes(&self) -> (&'static str, &'static str) {
        match self {
            Self::Unauthorized => ("unauthorized", "authentication_error"),
            Self::InvalidApiKey => ("invalid_api_key", "authentication_error"),
            Self::NotFound(_) | Self::Gone(_) => ("not_found", "not_found_error"),
            Self::BadRequest { .. }
            | Self::Faults { .. }
            | Self::MethodNotAllowed
            | Self::TooLarge
            | Self::UnsupportedMediaType => ("bad_request", "invalid_request_error"),
            Self::Conflict(_) => ("conflict", "conflict_error"),
            Self::RateLimited { .. } => ("rate_limited", "rate_limit_error"),
            Self::Provider(_) => ("provider_error", "provider_error"),
            Self::ProviderTimeout => ("provider_timeout", "provider_error"),
            Self::Unavailable(_) | Self::Internal(_) => ("internal_error", "server_error"),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } => Some(*retry_after),
            Self::Unavailable(_) => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    /// The error as the one frame that ends a broken stream: the nested form, which every SDK raises
    /// (`message`, `type`, `code`).
    pub fn stream_frame(&self) -> String {
        self.log();
        let (code, kind) = self.codes();
        json!({"error": {"message": self.to_string(), "type": kind, "code": code}}).to_string()
    }

    /// Once, where it is answered; the caller sees none of it.
    fn log(&self) {
        match self {
            Self::Internal(error) => tracing::error!("a request failed: {error:#}"),
            Self::Unavailable(error) => tracing::warn!("a request cannot be served now: {error:#}"),
            _ => {}
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound => Self::NotFound("Not found".to_owned()),
            StoreError::Unavailable(_) => Self::Unavailable(error.into()),
            StoreError::LeaseLost
            | StoreError::Stale
            | StoreError::Constraint(_)
            | StoreError::Unexpected(_) => Self::Internal(error.into()),
        }
    }
}

impl From<CredentialsError> for ApiError {
    fn from(error: CredentialsError) -> Self {
        match error {
            CredentialsError::Store(error) => error.into(),
            error @ CredentialsError::Sealed { .. } => Self::Internal(error.into()),
        }
    }
}

impl From<ProviderError> for ApiError {
    /// Design decision 14: never a bare 500 for somebody else's failure.
    fn from(error: ProviderError) -> Self {
        if !matches!(
            error,
            ProviderError::Rejected(_) | ProviderError::Unsupported(_)
        ) {
            tracing::warn!("a model call failed: {}", causes(&error));
        }
        match error {
            ProviderError::Credentials => Self::Provider(
                "The model's provider refused its key. Set a valid one for this provider."
                    .to_owned(),
            ),
            ProviderError::ContextTooLong => Self::invalid(
                "messages",
                "The conversation is too long for this model. Shorten it or start a new session.",
            ),
            ProviderError::Rejected(reason) => Self::BadRequest {
                message: format!("The model's provider rejected the request: {reason}"),
                param: None,
            },
            ProviderError::Unsupported(param) => Self::invalid(
                param,
                format!("`{param}` is not supported by this agent's model. Leave it out."),
            ),
            ProviderError::RateLimited { retry_after } => Self::RateLimited {
                message: "The model's provider is limiting requests. Try again later.".to_owned(),
                retry_after: retry_after.unwrap_or(Duration::from_secs(1)),
            },
            ProviderError::Unavailable(_) | ProviderError::NotPermitted => {
                Self::Provider("The model's provider is unavailable. Try again.".to_owned())
            }
            ProviderError::Idle(_) => Self::ProviderTimeout,
            ProviderError::Protocol(_) => Self::Provider(
                "The model's provider sent an answer that could not be read. Try again.".to_owned(),
            ),
        }
    }
}

/// The whole chain of causes, for the operator's log.
fn causes(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

impl From<TurnError> for ApiError {
    fn from(error: TurnError) -> Self {
        match error {
            TurnError::Provider(error) => error.into(),
            TurnError::TooManyCalls(_) => Self::Provider(
                "The agent called its tools over and over and gave no answer. Change its prompt, or take tools out of its `allowedTools`.".to_owned(),
            ),
            TurnError::Format(error) => Self::Provider(format!(
                "The model's answer does not fit `response_format`: {error}."
            )),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.log();
        let (code, kind) = self.codes();
        let (param, details) = match &self {
            Self::BadRequest { param, .. } => (param.clone(), None),
            Self::Faults { details, .. } => (None, Some(details.clone())),
            _ => (None, None),
        };
        let body = ErrorBody {
            error: self.to_string(),
            code,
            details,
            kind,
            param,
        };
        let mut response = (self.status(), axum::Json(&body)).into_response();
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after() {
            // Rounded up: a caller that comes back on the second must find the door open.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if matches!(self, Self::Conflict(_)) {
            // The OpenAI SDKs retry a 409 unless they are told not to.
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        response.extensions_mut().insert(body);
        response
    }
}

/// Gives errors on the OpenAI-compatible routes the shape that the OpenAI family of SDKs reads, to those SDKs
/// (design decision 2): they throw the message of a flat error away.
pub async fn shape_for_sdks(request: Request, next: Next) -> Response {
    let nested = reads_nested_errors(request.headers()) && is_openai_route(request.uri().path());
    let response = next.run(request).await;
    let Some(body) = response
        .extensions()
        .get::<ErrorBody>()
        .filter(|_| nested)
        .cloned()
    else {
        return response;
    };
    let mut shaped = json!({
        "error": {"message": body.error, "type": body.kind, "param": body.param, "code": body.code},
        "code": body.code,
        "message": body.error,
    });
    if let Some(details) = body.details {
        shaped["details"] = json!(details);
    }
    let (mut parts, _) = response.into_parts();
    parts.headers.remove(header::CONTENT_LENGTH);
    (parts.status, parts.headers, axum::Json(shaped)).into_response()
}

fn is_openai_route(path: &str) -> bool {
    let path = path.strip_prefix("/api").unwrap_or(path);
    path == "/v1/chat/completions" || path == "/v1/models" || path.starts_with("/v1/models/")
}

fn reads_nested_errors(headers: &HeaderMap) -> bool {
    let agent = headers
        .get(header::USER_AGENT)
        .and_then(|agent| agent.to_str().ok())
        .unwrap_or_default();
    headers.contains_key("x-stainless-lang")
        || ["OpenAI/", "ai/", "ai-sdk", "langchainjs-openai/"]
            .iter()
            .any(|family| agent.starts_with(family))
}
