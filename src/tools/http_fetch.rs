//! `http_fetch`: reads the web, or calls it.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION};
use reqwest::redirect::Policy;
use reqwest::{Method, Response, StatusCode, Url};
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
        let builder = reqwest::Client::builder()
            // They are followed here, where it is known what the model has set, see [`Request::redirected`].
            .redirect(Policy::none())
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
        let request = Request::of(arguments(call)?)?;
        match tokio::time::timeout(TIME_LIMIT, self.fetch(request)).await {
            Ok(fetched) => fetched,
            Err(_late) => Err(format!(
                "It did not answer within {} s.",
                TIME_LIMIT.as_secs()
            )),
        }
    }

    async fn fetch(&self, mut request: Request) -> Result<String, String> {
        for _ in 0..=REDIRECTS {
            check(&request.url, self.private)?;
            let response = request
                .send(&self.client)
                .await
                .map_err(|error| explain(&error))?;
            match redirect_of(&response)? {
                Some(to) => request = request.redirected(response.status(), to),
                None => return read(response).await,
            }
        }
        Err("It cannot be fetched: it redirects too often.".to_owned())
    }
}

/// One request of a fetch.
#[derive(Debug)]
struct Request {
    method: Method,
    url: Url,
    headers: HeaderMap,
    body: Option<String>,
}

impl Request {
    fn of(fetch: Fetch) -> Result<Self, String> {
        let url =
            Url::parse(&fetch.url).map_err(|error| format!("`url` is not a URL: {error}."))?;
        let method = fetch.method.as_deref().unwrap_or("GET").to_uppercase();
        let method = match method.as_str() {
            "GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" => method
                .parse::<Method>()
                .map_err(|error| error.to_string())?,
            _ => return Err(format!("`method` may not be {method}.")),
        };
        Ok(Self {
            method,
            url,
            headers: headers(&fetch.headers)?,
            body: fetch.body,
        })
    }

    async fn send(&self, client: &reqwest::Client) -> reqwest::Result<Response> {
        let request = client
            .request(self.method.clone(), self.url.clone())
            .headers(self.headers.clone());
        match &self.body {
            Some(body) => request.body(body.clone()).send().await,
            None => request.send().await,
        }
    }

    /// The request that a redirect asks for (RFC 9110, 15.4). No header that the model has set for one origin goes to another, for it may be a
    /// credential under any name, but for those that say what is sent and what is wanted.
    fn redirected(self, status: StatusCode, to: Url) -> Self {
        let becomes_get = match status {
            StatusCode::SEE_OTHER => self.method != Method::HEAD,
            StatusCode::MOVED_PERMANENTLY | StatusCode::FOUND => self.method == Method::POST,
            _ => false,
        };
        let stays = self.url.origin() == to.origin();
        let (method, body) = if becomes_get {
            (Method::GET, None)
        } else {
            (self.method, self.body)
        };
        let mut headers = self.headers;
        if !stays {
            let kept = [CONTENT_TYPE, ACCEPT].map(|name| {
                let value = headers.get(&name).cloned();
                (name, value)
            });
            headers = HeaderMap::new();
            for (name, value) in kept {
                headers.extend(value.map(|value| (name, value)));
            }
        }
        if becomes_get {
            headers.remove(CONTENT_TYPE);
        }
        Self {
            method,
            url: to,
            headers,
            body,
        }
    }
}

/// Where an answer leads on to, if it does.
fn redirect_of(response: &Response) -> Result<Option<Url>, String> {
    let to = match response.status() {
        StatusCode::MOVED_PERMANENTLY
        | StatusCode::FOUND
        | StatusCode::SEE_OTHER
        | StatusCode::TEMPORARY_REDIRECT
        | StatusCode::PERMANENT_REDIRECT => response.headers().get(LOCATION),
        _ => None,
    };
    let Some(to) = to else { return Ok(None) };
    let to = to.to_str().ok().and_then(|to| response.url().join(to).ok());
    let to = to.ok_or("It cannot be fetched: it redirects to what is no URL.")?;
    Ok(Some(to))
}

/// Status, content type and body as the model reads them.
async fn read(response: Response) -> Result<String, String> {
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
