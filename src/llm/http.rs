//! How adapters reach their providers: one client, bounded waits, and failures sorted by what to do about them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{Stream, StreamExt};
use rand::RngExt;
use reqwest::header::{CONTENT_TYPE, RETRY_AFTER};
use reqwest::{RequestBuilder, Response, StatusCode, Url};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::sse::Decoder;
use super::{Permit, ProviderError};
use crate::net::{PublicOnly, is_private_literal};

/// How long requests to providers may take, and where they may go.
#[derive(Debug, Clone, Copy)]
pub struct ClientSettings {
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// How long a provider may be silent in a stream, or before it begins.
    pub idle_timeout: Duration,
    /// How long a provider may take for an answer in one piece, all of which is silence.
    pub answer_timeout: Duration,
    /// Whether a tenant's base URL may be a private or loopback address.
    pub private_base_urls: bool,
}

/// The clients that all adapters share, so that connections are shared too.
#[derive(Debug, Clone)]
pub struct HttpClient {
    open: reqwest::Client,
    guarded: reqwest::Client,
    settings: ClientSettings,
}

/// How often a request is tried before the first word of its answer.
const ATTEMPTS: u32 = 3;
/// How long all waits between tries may take together (design 0.1).
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest answer in one piece.
const ANSWER: usize = 32 * 1024 * 1024;
/// The most of a provider's refusal that is read.
const REFUSAL: usize = 64 * 1024;

impl HttpClient {
    /// Makes the clients. The process must have a TLS provider installed.
    ///
    /// # Errors
    /// When the system's certificates cannot be loaded.
    pub fn new(settings: ClientSettings) -> Result<Self, reqwest::Error> {
        let builder = || {
            reqwest::Client::builder()
                .connect_timeout(settings.connect_timeout)
                .redirect(reqwest::redirect::Policy::none())
                .tcp_nodelay(true)
                .user_agent(concat!("polpo/", env!("CARGO_PKG_VERSION")))
        };
        let open = builder().build()?;
        let guarded = if settings.private_base_urls {
            open.clone()
        } else {
            // A proxy would look the name up for us, past the guard.
            builder()
                .no_proxy()
                .dns_resolver(Arc::new(PublicOnly))
                .build()?
        };
        Ok(Self {
            open,
            guarded,
            settings,
        })
    }

    /// The client for a base URL: guarded if a tenant chose it.
    pub(super) fn of(&self, chosen_by_tenant: bool) -> &reqwest::Client {
        if chosen_by_tenant {
            &self.guarded
        } else {
            &self.open
        }
    }

    /// Whether tenants may have the server reach private addresses.
    pub(super) fn reaches_private_addresses(&self) -> bool {
        self.settings.private_base_urls
    }

    /// Whether a tenant may use this base URL; a sentence why not.
    pub(super) fn check_base_url(&self, base_url: &str) -> Result<(), String> {
        let url =
            Url::parse(base_url).map_err(|error| format!("`baseUrl` is not a URL: {error}."))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err("`baseUrl` must be an http or https URL.".to_owned());
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("`baseUrl` may not hold credentials.".to_owned());
        }
        if !self.settings.private_base_urls && is_private_literal(&url) {
            return Err("`baseUrl` may not be a private address.".to_owned());
        }
        Ok(())
    }

    /// Sends a request until its answer begins well, and returns its events. Whatever a refusal quotes of `key` is left out.
    ///
    /// Connection failures, 429 and 5xx are tried again; once the answer has begun, nothing is.
    pub(super) async fn events(
        &self,
        request: RequestBuilder,
        permit: Option<&dyn Permit>,
        key: &SecretString,
    ) -> Result<impl Stream<Item = Result<String, ProviderError>> + Send + use<>, ProviderError>
    {
        let idle = self.settings.idle_timeout;
        let response = self.send(request, permit, key, idle).await?;
        expect_type(&response, "text/event-stream")?;
        Ok(events(response.bytes_stream().boxed(), idle))
    }

    /// Sends a request and returns its answer, JSON in one piece. Tried again like [`HttpClient::events`].
    pub(super) async fn answer(
        &self,
        request: RequestBuilder,
        permit: Option<&dyn Permit>,
        key: &SecretString,
    ) -> Result<Vec<u8>, ProviderError> {
        let silence = self.settings.answer_timeout;
        let response = self.send(request, permit, key, silence).await?;
        expect_type(&response, "application/json")?;
        let mut pieces = response.bytes_stream();
        let mut body = Vec::new();
        let idle = self.settings.idle_timeout;
        while let Some(piece) = tokio::time::timeout(idle, pieces.next())
            .await
            .map_err(|_| ProviderError::Idle(idle))?
        {
            body.extend_from_slice(
                &piece.map_err(|error| ProviderError::Unavailable(error.without_url().into()))?,
            );
            if body.len() > ANSWER {
                return Err(ProviderError::Protocol(
                    "the answer is longer than 32 MiB".to_owned(),
                ));
            }
        }
        Ok(body)
    }

    /// Waits `silence` for the head of each try's answer, and asks for its permit before each.
    async fn send(
        &self,
        request: RequestBuilder,
        permit: Option<&dyn Permit>,
        key: &SecretString,
        silence: Duration,
    ) -> Result<Response, ProviderError> {
        let mut patience = PATIENCE;
        let mut attempt = 1;
        loop {
            let tried = request.try_clone().ok_or_else(|| {
                ProviderError::Protocol("the request cannot be repeated".to_owned())
            })?;
            if let Some(permit) = permit
                && !permit.is_valid().await
            {
                return Err(ProviderError::NotPermitted);
            }
            let error = match tokio::time::timeout(silence, tried.send()).await {
                Err(_) => return Err(ProviderError::Idle(silence)),
                Ok(Ok(response)) if response.status() == StatusCode::OK => return Ok(response),
                Ok(Ok(response)) => refusal(response, key).await,
                Ok(Err(error)) => ProviderError::Unavailable(error.without_url().into()),
            };
            let wait = match &error {
                ProviderError::RateLimited {
                    retry_after: Some(wait),
                } => *wait,
                _ => backoff(attempt),
            };
            if !error.is_transient() || attempt == ATTEMPTS || wait > patience {
                return Err(error);
            }
            tokio::time::sleep(wait).await;
            patience -= wait;
            attempt += 1;
        }
    }
}

fn expect_type(response: &Response, expected: &str) -> Result<(), ProviderError> {
    let kind = response
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .unwrap_or_default();
    if kind.starts_with(expected) {
        Ok(())
    } else {
        Err(ProviderError::Protocol(format!(
            "expected `{expected}`, got `{}`",
            shortened(kind, 80)
        )))
    }
}

/// A quarter of a second, doubling, with full jitter, so that those who failed together do not return together.
fn backoff(attempt: u32) -> Duration {
    let most = 250 * (1 << attempt.min(6));
    Duration::from_millis(rand::rng().random_range(50..=most))
}

fn events(
    mut bytes: impl Stream<Item = reqwest::Result<Bytes>> + Send + Unpin,
    idle: Duration,
) -> impl Stream<Item = Result<String, ProviderError>> + Send {
    async_stream::try_stream! {
        let mut decoder = Decoder::default();
        while let Some(piece) = tokio::time::timeout(idle, bytes.next()).await.map_err(|_| ProviderError::Idle(idle))? {
            let piece = piece.map_err(|error| ProviderError::Unavailable(error.without_url().into()))?;
            decoder.push(&piece).map_err(|error| ProviderError::Protocol(error.to_string()))?;
            while let Some(data) = decoder.next() {
                yield data;
            }
        }
    }
}

/// What a status other than 200 means.
async fn refusal(response: Response, key: &SecretString) -> ProviderError {
    let status = response.status();
    let retry_after = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| wait_of(value.trim(), Utc::now()));
    match status.as_u16() {
        401 | 403 => ProviderError::Credentials,
        429 => ProviderError::RateLimited { retry_after },
        413 => ProviderError::ContextTooLong,
        408 | 500.. => ProviderError::Unavailable(format!("status {status}").into()),
        400..=499 => rejection(&read_some(response).await, key),
        _ => ProviderError::Protocol(format!("status {status}")),
    }
}

/// A wait as `Retry-After` gives it: in seconds, or as the date that it ends at.
fn wait_of(value: &str, now: DateTime<Utc>) -> Option<Duration> {
    if let Ok(seconds) = value.parse() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let end = DateTime::parse_from_rfc2822(value).ok()?;
    // A date that has passed asks for no wait.
    Some((end.to_utc() - now).to_std().unwrap_or_default())
}

async fn read_some(response: Response) -> Vec<u8> {
    let mut body = Vec::new();
    let mut pieces = response.bytes_stream();
    let read = async {
        while let Some(Ok(piece)) = pieces.next().await {
            body.extend_from_slice(&piece);
            if body.len() >= REFUSAL {
                break;
            }
        }
    };
    // A refusal whose reason does not arrive is a refusal all the same.
    let _ = tokio::time::timeout(Duration::from_secs(5), read).await;
    body
}

/// Reads `{"error": {"message", "code"}}`, which all providers send in some form.
fn rejection(body: &[u8], key: &SecretString) -> ProviderError {
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    // Google's compatible endpoint puts its one error into an array.
    let value = match value {
        Value::Array(mut errors) if !errors.is_empty() => errors.swap_remove(0),
        value => value,
    };
    error_object(&value, key)
        .unwrap_or_else(|| ProviderError::Rejected("it gave no reason".to_owned()))
}

/// The failure that an `error` member tells of, if there is one. `key` is what a provider may quote back and nobody is to read.
pub(super) fn error_object(value: &Value, key: &SecretString) -> Option<ProviderError> {
    let error = value.get("error").filter(|error| !error.is_null())?;
    let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default();
    let message = error.as_str().unwrap_or_else(|| text("message"));
    let (code, kind) = (text("code"), text("type"));
    let lower = message.to_ascii_lowercase();
    let too_long = ["context_length_exceeded", "string_above_max_length"].contains(&code)
        || [
            "maximum context length",
            "prompt is too long",
            "context window",
            "too many tokens",
            "maximum number of tokens",
            "exceed context limit",
        ]
        .iter()
        .any(|sign| lower.contains(sign));
    Some(match (code, kind) {
        _ if too_long => ProviderError::ContextTooLong,
        ("rate_limit_exceeded", _) | (_, "rate_limit_error") => {
            ProviderError::RateLimited { retry_after: None }
        }
        (_, "overloaded_error" | "api_error" | "server_error") => {
            ProviderError::Unavailable(kind.to_owned().into())
        }
        (_, "authentication_error" | "permission_error") => ProviderError::Credentials,
        _ if lower.contains("api key not valid") => ProviderError::Credentials,
        _ => ProviderError::Rejected(shortened(&without_secrets(message, key), 300)),
    })
}

/// A provider that quotes our key back, or part of it, must not have it passed on.
fn without_secrets(message: &str, key: &SecretString) -> String {
    let mut message = message.to_owned();
    // Where no key is needed one such as `none` is set.
    if key.expose_secret().len() >= 8 {
        message = message.replace(key.expose_secret(), "[key]");
    }
    let words = message.split_inclusive(char::is_whitespace).map(|word| {
        let secret = word.len() >= 16
            && (word.contains("sk-")
                || word.contains("key-")
                || word.contains("AIza")
                || word.contains('*'));
        if secret { "[key] " } else { word }
    });
    words.collect()
}

fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        text.to_owned()
    } else {
        text.chars().take(most).chain(['…']).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_told_in_seconds_or_as_a_date() {
        let now = "2026-01-05T10:00:00Z".parse().unwrap();
        for (value, expect) in [
            ("7", Some(7_000)),
            ("0.25", Some(250)),
            ("Mon, 05 Jan 2026 10:00:20 GMT", Some(20_000)),
            ("Mon, 05 Jan 2026 09:00:00 GMT", Some(0)),
            ("-3", None),
            ("soon", None),
            ("", None),
        ] {
            let expect = expect.map(Duration::from_millis);
            assert_eq!(wait_of(value, now), expect, "{value}");
        }
    }

    #[test]
    fn a_rejection_tells_its_reason_but_no_key() {
        let none = SecretString::default();
        let body = br#"{"error":{"message":"Incorrect API key provided: sk-abcdefghijklmnop. See the docs.","type":"invalid_request_error","code":null}}"#;
        let ProviderError::Rejected(reason) = rejection(body, &none) else {
            panic!("not rejected")
        };
        assert_eq!(reason, "Incorrect API key provided: [key] See the docs.");
        // Whatever a key looks like, the one that the request went out with is not passed on.
        let key = SecretString::from("gsk_4711abc");
        let body = br#"{"error":{"message":"The key 'gsk_4711abc' is no good."}}"#;
        let ProviderError::Rejected(reason) = rejection(body, &key) else {
            panic!("not rejected")
        };
        assert_eq!(reason, "The key '[key]' is no good.");
        assert!(matches!(
            rejection(b"<html>", &none),
            ProviderError::Rejected(_)
        ));
        // As Google sends it.
        let body = br#"[{"error":{"code":400,"message":"Invalid value at 'tools'","status":"INVALID_ARGUMENT"}}]"#;
        let ProviderError::Rejected(reason) = rejection(body, &none) else {
            panic!("not rejected")
        };
        assert_eq!(reason, "Invalid value at 'tools'");
        let body = br#"[{"error":{"code":400,"message":"API key not valid. Please pass a valid API key."}}]"#;
        assert!(matches!(rejection(body, &none), ProviderError::Credentials));
        let body = br#"[{"error":{"message":"The input token count (9) exceeds the maximum number of tokens allowed (8)."}}]"#;
        assert!(matches!(
            rejection(body, &none),
            ProviderError::ContextTooLong
        ));
        let body = br#"{"error":{"message":"This model's maximum context length is 8192 tokens.","code":"context_length_exceeded"}}"#;
        assert!(matches!(
            rejection(body, &none),
            ProviderError::ContextTooLong
        ));
    }
}
