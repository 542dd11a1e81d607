//! `http_fetch`: reads the web, or calls it.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::redirect::Policy;
use reqwest::{Method, Url};
use serde::Deserialize;
use serde_json::json;

use super::{RESULT_LIMIT, arguments};
use crate::llm::{Tool, ToolCall};
use crate::net::{PublicOnly, is_private_literal};

pub(super) const NAME: &str = "http_fetch";

/// How long a fetch may take in all, redirects included.
const TIME_LIMIT: Duration = Duration::from_secs(30);
const REDIRECTS: usize = 5;
/// What a model may not set: whom it speaks to is the URL's word, and how is the client's.
const RESERVED: [&str; 6] = [
    "host",
    "connection",
    "content-length",
    "transfer-encoding",
    "upgrade",
    "te",
];

/// The client that fetches for agents. It reaches nothing private unless a setting opens it, neither at first
/// nor on a redirect: names are checked where they are looked up, so what was checked is what is connected to.
#[derive(Debug, Clone)]
pub struct Fetcher {
    client: reqwest::Client,
    private: bool,
}

#[derive(Debug, Deserialize)]
struct Fetch {
    url: String,
    method: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    body: Option<String>,
}

/// Whether a call asks for something and changes nothing.
pub(super) fn only_reads(call: &ToolCall) -> bool {
    arguments::<Fetch>(call).is_ok_and(|fetch| {
        let method = fetch.method.as_deref().unwrap_or("GET");
        method.eq_ignore_ascii_case("GET") || method.eq_ignore_ascii_case("HEAD")
    })
}

impl Fetcher {
    /// Makes the client; `private` opens private, loopback and link-local addresses. The process must have a
    /// TLS provider installed.
    ///
    /// # Errors
    /// When the system's certificates cannot be loaded.
    pub fn new(private: bool) -> Result<Self, reqwest::Error> {
        let policy = Policy::custom(move |hop| {
            if hop.previous().len() > REDIRECTS {
                hop.error("it redirects too often")
            } else {
                match check(hop.url(), private) {
                    Ok(()) => hop.follow(),
                    Err(sentence) => hop.error(sentence),
                }
            }
        });
        let builder = reqwest::Client::builder()
            .timeout(TIME_LIMIT)
            .redirect(policy)
            .user_agent(concat!("polpo/", env!("CARGO_PKG_VERSION")));
        let builder = if private {
            builder
        } else {
            // A proxy would look the name up for us, past the guard.
            builder.no_proxy().dns_resolver(Arc::new(PublicOnly))
        };
        Ok(Self {
            client: builder.build()?,
            private,
        })
    }

    /// Runs a call and returns status, content type and body as the model reads them. Any status is a result.
    /// Of a body no more is read than a result may hold.
    pub(super) async fn call(&self, call: &ToolCall) -> Result<String, String> {
        let fetch: Fetch = arguments(call)?;
        let url =
            Url::parse(&fetch.url).map_err(|error| format!("`url` is not a URL: {error}."))?;
        check(&url, self.private)?;
        let method = fetch.method.as_deref().unwrap_or("GET").to_uppercase();
        let method = match method.as_str() {
            "GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" => method
                .parse::<Method>()
                .map_err(|error| error.to_string())?,
            _ => return Err(format!("`method` may not be {method}.")),
        };
        let mut request = self
            .client
            .request(method, url)
            .headers(headers(&fetch.headers)?);
        if let Some(body) = fetch.body {
            request = request.body(body);
        }
        let response = request.send().await.map_err(|error| explain(&error))?;
        let mut result = format!("HTTP {}\n", response.status());
        if let Some(kind) = response
            .headers()
            .get("content-type")
            .and_then(|kind| kind.to_str().ok())
        {
            let _ = writeln!(result, "content-type: {kind}");
        }
        result.push('\n');
        let mut body = Vec::new();
        let mut pieces = response.bytes_stream();
        while let Some(piece) = pieces.next().await {
            body.extend_from_slice(&piece.map_err(|error| explain(&error))?);
            if body.len() > RESULT_LIMIT {
                break;
            }
        }
        match readable(&body, body.len() > RESULT_LIMIT) {
            Some(text) => result.push_str(text),
            None => result.push_str("[not text]"),
        }
        Ok(result)
    }
}

/// Whether a URL may be fetched, at first or on a redirect; a sentence why not.
fn check(url: &Url, private: bool) -> Result<(), String> {
    if !matches!(url.scheme(), "http" | "https") {
        Err("Only http and https URLs can be fetched.".to_owned())
    } else if !url.username().is_empty() || url.password().is_some() {
        Err("The URL may not hold credentials: send them in `headers`.".to_owned())
    } else if !private && is_private_literal(url) {
        Err("Private addresses cannot be fetched.".to_owned())
    } else {
        Ok(())
    }
}

fn headers(given: &BTreeMap<String, String>) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in given {
        let known = name.parse::<HeaderName>().ok();
        let pair = known.zip(HeaderValue::from_str(value).ok());
        match pair {
            Some((name, _)) if RESERVED.contains(&name.as_str()) => {
                return Err(format!("The header `{name}` cannot be set."));
            }
            Some((name, value)) => drop(headers.insert(name, value)),
            None => return Err(format!("The header `{name}` is not valid.")),
        }
    }
    Ok(headers)
}

/// The body as text. One that was not read to its end may end within a character.
fn readable(body: &[u8], cut: bool) -> Option<&str> {
    match std::str::from_utf8(body) {
        Ok(text) => Some(text),
        Err(error) if cut && error.error_len().is_none() => {
            std::str::from_utf8(&body[..error.valid_up_to()]).ok()
        }
        Err(_) => None,
    }
}

/// The innermost cause says what went wrong.
fn explain(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return format!("It did not answer within {} s.", TIME_LIMIT.as_secs());
    }
    let mut cause: &dyn Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    format!("It cannot be fetched: {cause}.")
}

pub(super) fn tool() -> Tool {
    Tool {
        name: NAME.to_owned(),
        description: Some(format!(
            "Fetch an http or https URL. Returns status, content type and body, the body cut after {} KiB.",
            RESULT_LIMIT / 1024
        )),
        parameters: json!({
            "type": "object",
            "properties": {
                "url": {"type": "string"},
                "method": {"type": "string", "enum": ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"], "description": "GET when absent."},
                "headers": {"type": "object", "additionalProperties": {"type": "string"}},
                "body": {"type": "string"},
            },
            "required": ["url"],
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_not_be_fetched_is_refused_at_first_and_on_a_redirect() {
        let refused = |url: &str| check(&Url::parse(url).unwrap(), false).is_err();
        for url in [
            "http://127.0.0.1/",
            "http://169.254.169.254/latest/meta-data",
            "http://[fe80::1]/",
            "file:///etc/passwd",
            "ftp://example.com/",
            "https://user:secret@example.com/",
        ] {
            assert!(refused(url), "{url}");
        }
        assert!(!refused("https://example.com/a?b=c"));
        assert!(check(&Url::parse("http://127.0.0.1/").unwrap(), true).is_ok());
    }

    #[test]
    fn a_body_is_text_or_said_not_to_be() {
        assert_eq!(readable("né".as_bytes(), false), Some("né"));
        assert_eq!(readable(&"né".as_bytes()[..2], true), Some("n"));
        assert_eq!(readable(&"né".as_bytes()[..2], false), None);
        assert_eq!(readable(&[0xff, 0xfe, 0], true), None);
    }
}
