//! How couriers reach receivers: one request, bounded in time, place and answer.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::redirect::Policy;

use crate::net::PublicOnly;
use crate::webhook::{Reach, check_url};

/// The most of a receiver's answer that is kept, in bytes.
const EXCERPT: usize = 1_024;
/// How long the body of an answer may take whose status is known.
const PATIENCE: Duration = Duration::from_secs(1);

/// The client that posts to webhooks. Names are checked where they are looked up, so what was checked is what is
/// connected to; redirects are answers like any other.
#[derive(Debug, Clone)]
pub struct Poster {
    client: reqwest::Client,
    reach: Reach,
    timeout: Duration,
}

/// What came of one request.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status_code: Option<u16>,
    pub(super) error: Option<String>,
    pub(super) response: Option<String>,
    pub(super) took: Duration,
}

impl Poster {
    /// Makes the client. The process must have a TLS provider installed.
    ///
    /// # Errors
    /// When the system's certificates cannot be loaded.
    pub fn new(reach: Reach, timeout: Duration) -> Result<Self, reqwest::Error> {
        let builder = reqwest::Client::builder()
            .timeout(timeout)
            .redirect(Policy::none())
            .https_only(!reach.http)
            .tcp_nodelay(true)
            .pool_idle_timeout(Duration::from_secs(30))
            .user_agent(concat!("Polpo-Webhooks/", env!("CARGO_PKG_VERSION")))
            // A proxy would look the name up for us, past the guard.
            .no_proxy();
        let builder = if reach.private {
            builder
        } else {
            builder.dns_resolver(Arc::new(PublicOnly))
        };
        Ok(Self {
            client: builder.build()?,
            reach,
            timeout,
        })
    }

    /// Where webhooks may be.
    pub fn reach(&self) -> Reach {
        self.reach
    }

    /// Posts JSON, and waits for the answer as long as a receiver may take.
    pub(super) async fn post(&self, url: &str, headers: HeaderMap, body: String) -> Answer {
        let began = Instant::now();
        let mut answer = match check_url(url, self.reach) {
            Ok(url) => {
                let request = self.client.post(url).headers(headers);
                let request = request.header(CONTENT_TYPE, "application/json").body(body);
                self.send(request).await
            }
            Err(sentence) => failed(sentence),
        };
        answer.took = began.elapsed();
        answer
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let response = match request.send().await {
            Ok(response) => response,
            Err(error) => return failed(self.explain(&error)),
        };
        let status = response.status();
        let mut said = Vec::new();
        let mut pieces = response.bytes_stream();
        let read = async {
            while let Some(Ok(piece)) = pieces.next().await {
                said.extend_from_slice(&piece);
                if said.len() > EXCERPT {
                    break;
                }
            }
        };
        // The status says it all; what else is said may stay away.
        let _ = tokio::time::timeout(PATIENCE, read).await;
        Answer {
            status_code: Some(status.as_u16()),
            error: refusal(status),
            response: (!said.is_empty()).then(|| excerpt(&said)),
            took: Duration::ZERO,
        }
    }

    fn explain(&self, error: &reqwest::Error) -> String {
        if error.is_timeout() {
            return format!("It did not answer within {} s.", self.timeout.as_secs_f64());
        }
        let innermost = std::iter::successors(error.source(), |&error| error.source()).last();
        let reason = innermost.map_or_else(|| "no reason is known".to_owned(), ToString::to_string);
        let deed = if error.is_connect() {
            "It cannot be connected to"
        } else {
            "The request failed"
        };
        excerpt(format!("{deed}: {reason}.").as_bytes())
    }
}

fn failed(sentence: String) -> Answer {
    Answer {
        status_code: None,
        error: Some(sentence),
        response: None,
        took: Duration::ZERO,
    }
}

fn refusal(status: reqwest::StatusCode) -> Option<String> {
    if status.is_success() {
        None
    } else if status.is_redirection() {
        Some("It redirects, which is not followed: set the webhook's `url` anew.".to_owned())
    } else {
        Some(format!("It answered {status}."))
    }
}

/// The beginning of a text that others wrote, as it can be stored.
fn excerpt(text: &[u8]) -> String {
    let cut = &text[..text.len().min(EXCERPT)];
    let mut text = String::from_utf8_lossy(cut).replace('\0', "\u{fffd}");
    while text.len() > EXCERPT {
        text.pop();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excerpt_is_short_and_can_be_stored() {
        assert_eq!(excerpt(b"a\0b\xff"), "a\u{fffd}b\u{fffd}");
        assert!(excerpt(&[0xff; 5_000]).len() <= EXCERPT);
        assert_eq!(excerpt("é".repeat(600).as_bytes()), "é".repeat(512));
    }
}
