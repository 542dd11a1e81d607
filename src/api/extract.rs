//! What handlers ask of a request, with our own errors.

use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

use super::error::ApiError;
use crate::store::ProjectDb;
use crate::task::{DEEPEST, is_deeper_than};

/// A JSON body, in and out.
#[derive(Debug)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            return Err(ApiError::UnsupportedMediaType);
        }
        let bytes = read_body(request, state).await?;
        parse(&bytes).map(Self)
    }
}

/// A JSON body that may be absent, which is the same as an empty object.
#[derive(Debug)]
pub struct MaybeJson<T>(pub T);

impl<T: DeserializeOwned + Default, S: Send + Sync> FromRequest<S> for MaybeJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let typed = is_json(request.headers());
        let bytes = read_body(request, state).await?;
        if bytes.is_empty() {
            Ok(Self(T::default()))
        } else if typed {
            parse(&bytes).map(|body: Option<T>| Self(body.unwrap_or_default()))
        } else {
            Err(ApiError::UnsupportedMediaType)
        }
    }
}

async fn read_body<S: Send + Sync>(request: Request, state: &S) -> Result<Bytes, ApiError> {
    let bytes = Bytes::from_request(request, state)
        .await
        .map_err(|rejection| {
            if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
                ApiError::TooLarge
            } else {
                ApiError::BadRequest {
                    message: cause(&rejection),
                    param: None,
                }
            }
        })?;
    if has_nul(&bytes) {
        let message = "Text may not hold NUL characters (\\u0000).".to_owned();
        return Err(ApiError::BadRequest {
            message,
            param: None,
        });
    }
    Ok(bytes)
}

fn parse<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, ApiError> {
    // serde would take an array for an object whose members are in their order.
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        return Err(ApiError::BadRequest {
            message: "The request cannot be read: a JSON object is expected, not an array."
                .to_owned(),
            param: None,
        });
    }
    if is_deeper_than(bytes, DEEPEST) {
        return Err(ApiError::BadRequest {
            message: format!("The request is nested more than {DEEPEST} deep."),
            param: None,
        });
    }
    axum::Json::from_bytes(bytes)
        .map(|axum::Json(value)| value)
        .map_err(|rejection: JsonRejection| ApiError::BadRequest {
            message: cause(&rejection),
            param: None,
        })
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .unwrap_or_default();
    let kind = kind
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}

/// Whether a JSON text holds an escaped NUL, which Postgres cannot store. A backslash that is itself escaped escapes nothing.
fn has_nul(json: &[u8]) -> bool {
    let mut at = 0;
    while let Some(found) = json[at..]
        .windows(6)
        .position(|window| window == b"\\u0000")
    {
        let found = at + found;
        let backslashes = json[..found]
            .iter()
            .rev()
            .take_while(|byte| **byte == b'\\')
            .count();
        if backslashes % 2 == 0 {
            return true;
        }
        at = found + 1;
    }
    false
}

/// The innermost cause says what is wrong and where; the outer ones say that something is.
fn cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    format!(
        "The request cannot be read: {}",
        plain(innermost.to_string())
    )
}

/// What a date is to be.
const A_DATE: &str = "a date and time with its zone is expected, such as 2026-04-07T12:00:00Z";

/// What a parser says in Rust's words, in JSON's.
pub(super) fn plain(mut said: String) -> String {
    for (rust, json) in [
        ("expected u8", "expected a whole number from 0 to 255"),
        ("expected u16", "expected a whole number, 0 or more"),
        ("expected u32", "expected a whole number, 0 or more"),
        ("expected u64", "expected a whole number, 0 or more"),
        ("expected usize", "expected a whole number, 0 or more"),
        ("expected i32", "expected a whole number"),
        ("expected i64", "expected a whole number"),
        ("expected f64", "expected a number"),
        ("expected a sequence", "expected an array"),
        ("expected a map", "expected an object"),
        ("invalid type: sequence", "invalid type: array"),
        ("invalid type: map", "invalid type: object"),
        ("invalid type: unit", "invalid type: null"),
        ("expected string or map", "expected a string"),
        ("unknown variant", "unknown value"),
        (
            "invalid digit found in string",
            "a whole number is expected",
        ),
        // What chrono says of a date.
        ("premature end of input", A_DATE),
        ("input contains invalid characters", A_DATE),
        ("input is out of range", A_DATE),
        ("trailing input", A_DATE),
    ] {
        if said.contains(rust) {
            said = said.replace(rust, json);
        }
    }
    // `data did not match any variant of untagged enum Responsibility`.
    let untagged = "data did not match any variant of untagged enum ";
    if let Some(at) = said.find(untagged) {
        let rest = &said[at + untagged.len()..];
        let name = rest.find(' ').unwrap_or(rest.len());
        said = format!(
            "{}it has none of its known forms{}",
            &said[..at],
            &rest[name..]
        );
    }
    // `expected struct CreateTask with 8 elements`, `expected internally tagged enum Expectation`.
    for kind in ["expected struct ", "expected internally tagged enum "] {
        if let Some(at) = said.find(kind) {
            let rest = &said[at + kind.len()..];
            let name = rest.find(' ').unwrap_or(rest.len());
            let after = &rest[name..];
            let after = match after.strip_prefix(" with ") {
                Some(counted) => counted.find(" at ").map_or("", |at| &counted[at..]),
                None => after,
            };
            said = format!("{}expected an object{after}", &said[..at]);
        }
    }
    said
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

/// The parameters of the path, percent-decoded.
#[derive(Debug)]
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        axum::extract::Path::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Path(value)| Self(value))
            // What does not parse names nothing.
            .map_err(|_: PathRejection| ApiError::NotFound("Not found".to_owned()))
    }
}

/// The parameters of the query.
#[derive(Debug)]
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        axum::extract::Query::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Query(value)| Self(value))
            .map_err(|rejection: QueryRejection| ApiError::BadRequest {
                message: cause(&rejection),
                param: None,
            })
    }
}

/// The door to the project that the request's key opens. Placed by [`super::auth`].
#[derive(Debug)]
pub struct Door(pub ProjectDb);

impl<S: Send + Sync> FromRequestParts<S> for Door {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        // A route outside the auth layer has no door; it must not open one.
        parts
            .extensions
            .get::<ProjectDb>()
            .cloned()
            .map(Self)
            .ok_or(ApiError::Unauthorized)
    }
}

/// Tells null from absent, for members of a change that can be cleared.
pub(super) fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Option<T>>, D::Error> {
    Option::<T>::deserialize(deserializer).map(Some)
}

/// Which part of a list is asked for.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Page {
    /// How many at most: 1 to 1,000.
    #[param(minimum = 1, maximum = 1000, default = 1000)]
    pub limit: Option<i64>,
    /// The last item of the page before: its id, or its number where it has none.
    pub after: Option<String>,
}

/// The most items that a list has, and how many it has unless asked for fewer.
const MOST: i64 = 1000;

impl Page {
    /// The page's size.
    ///
    /// # Errors
    /// 400 when it is out of bounds.
    pub fn size(&self) -> Result<i64, ApiError> {
        match self.limit {
            None => Ok(MOST),
            Some(limit) if (1..=MOST).contains(&limit) => Ok(limit),
            Some(_) => Err(ApiError::invalid(
                "limit",
                format!("`limit` must be from 1 to {MOST}."),
            )),
        }
    }

    /// The item the page begins after.
    ///
    /// # Errors
    /// 400 when it is no id of this list.
    pub fn after<T: std::str::FromStr>(&self) -> Result<Option<T>, ApiError> {
        let parsed = self.after.as_deref().map(str::parse).transpose();
        parsed.map_err(|_| {
            ApiError::invalid("after", "`after` must be the id of an item of this list.")
        })
    }
}

/// A list, with a link to its next page (RFC 8288) when it may have one.
#[derive(Debug)]
pub struct Listed<T> {
    /// The page's items.
    pub items: Vec<T>,
    /// Where the next page is.
    pub next: Option<String>,
}

impl<T> Listed<T> {
    /// A page of `size` of the list at `path`; a full page may have another after its last item.
    pub fn new(items: Vec<T>, size: i64, path: &str, last: impl Fn(&T) -> String) -> Self {
        let full = i64::try_from(items.len()).is_ok_and(|count| count >= size);
        Self::page(items, full, size, path, last)
    }

    /// The same of a page that may be cut off before it is full.
    pub fn page(
        items: Vec<T>,
        may_be_more: bool,
        size: i64,
        path: &str,
        last: impl Fn(&T) -> String,
    ) -> Self {
        let next = items.last().filter(|_| may_be_more).map(|item| {
            let separator = if path.contains('?') { '&' } else { '?' };
            format!(
                "<{path}{separator}limit={size}&after={}>; rel=\"next\"",
                last(item)
            )
        });
        Self { items, next }
    }
}

impl<T: Serialize> IntoResponse for Listed<T> {
    fn into_response(self) -> Response {
        with_next(axum::Json(self.items).into_response(), self.next)
    }
}

/// An answer with a link to the next page of what is in it.
pub(super) fn with_next(mut response: Response, next: Option<String>) -> Response {
    if let Some(link) = next.and_then(|next| next.parse().ok()) {
        response.headers_mut().insert(header::LINK, link);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_parser_says_is_said_in_the_words_of_json() {
        for (said, expected) in [
            (
                "invalid type: string \"x\", expected u32 at line 1 column 9",
                "invalid type: string \"x\", expected a whole number, 0 or more at line 1 column 9",
            ),
            (
                "invalid type: integer `1`, expected struct CreateTask at line 1 column 1",
                "invalid type: integer `1`, expected an object at line 1 column 1",
            ),
            (
                "invalid length 1, expected struct Escalation with 2 elements at line 1 column 3",
                "invalid length 1, expected an object at line 1 column 3",
            ),
            (
                "data did not match any variant of untagged enum Responsibility at line 1 column 3",
                "it has none of its known forms at line 1 column 3",
            ),
            (
                "invalid type: integer `1`, expected string or map",
                "invalid type: integer `1`, expected a string",
            ),
            ("missing field `title`", "missing field `title`"),
        ] {
            assert_eq!(plain(said.to_owned()), expected);
        }
    }
}
