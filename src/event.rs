//! What can be told of a project: names and payloads of the event stream (contract 2.9.2).

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Map, Value};

/// Something that happened. Its time is added when it is stored, so every payload has one.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// One of the catalogue's names.
    pub name: &'static str,
    /// What the catalogue says of it.
    pub payload: Map<String, Value>,
}

impl Event {
    /// An event whose payload is a JSON object.
    ///
    /// # Panics
    /// When `payload` is no object.
    pub fn new(name: &'static str, payload: Value) -> Self {
        let Value::Object(payload) = payload else {
            panic!("the payload of {name} must be an object");
        };
        Self { name, payload }
    }

    /// The payload as JSON text, with its `timestamp`.
    pub fn into_text(self, at: DateTime<Utc>) -> String {
        let mut payload = self.payload;
        payload.insert("timestamp".to_owned(), Value::String(timestamp(at)));
        Value::Object(payload).to_string()
    }
}

/// The id of the event with this number in its project.
pub fn id(seq: i64) -> String {
    format!("evt_{seq:05}")
}

/// ISO 8601 in UTC with milliseconds (contract 1.7).
pub fn timestamp(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// Whether an event of this name passes a filter: comma-separated names, `*` at the end of one for any rest,
/// blanks around commas do not count (contract 2.9). An empty filter admits everything.
pub fn passes(filter: &str, name: &str) -> bool {
    let mut patterns = filter
        .split(',')
        .map(str::trim)
        .filter(|pattern| !pattern.is_empty())
        .peekable();
    patterns.peek().is_none()
        || patterns.any(|pattern| match pattern.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => pattern == name,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_takes_names_prefixes_and_everything() {
        for (filter, name, expected) in [
            ("", "task:created", true),
            (" , ", "task:created", true),
            ("*", "task:created", true),
            ("task:*", "task:retry:blocked", true),
            ("task:*", "agent:spawned", false),
            ("agent:* , task:created", "task:created", true),
            ("task:created", "task:created:twice", false),
            ("task", "task:created", false),
        ] {
            assert_eq!(passes(filter, name), expected, "{filter} {name}");
        }
    }

    #[test]
    fn every_payload_has_its_time() {
        let at = DateTime::from_timestamp_millis(1_775_563_200_123).unwrap_or_default();
        let event = Event::new("task:removed", serde_json::json!({"taskId": "t"}));
        assert_eq!(
            event.into_text(at),
            r#"{"taskId":"t","timestamp":"2026-04-07T12:00:00.123Z"}"#
        );
    }
}
