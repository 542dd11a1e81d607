//! What can be told of a project: names and payloads of the event stream (contract 2.9.2).

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Map, Value, json};

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

/// A deadline, in the words of the events that tell of it (contract 2.6.4, SLA).
#[derive(Debug)]
pub struct Deadline {
    /// Whose it is.
    pub of: String,
    /// What that is: `task` or `mission`.
    pub kind: &'static str,
    /// When it is.
    pub at: DateTime<Utc>,
}

impl Deadline {
    fn told(&self, members: &Value) -> Value {
        let mut told =
            json!({"entityId": self.of, "entityType": self.kind, "deadline": timestamp(self.at)});
        if let (Some(told), Some(members)) = (told.as_object_mut(), members.as_object()) {
            told.extend(members.clone());
        }
        told
    }

    /// `sla:warning`: most of the time since `began` has passed.
    pub fn nears(&self, began: DateTime<Utc>, now: DateTime<Utc>) -> Value {
        let (whole, elapsed) = (self.at - began, now - began);
        #[expect(clippy::cast_precision_loss, reason = "it is a share, for people")]
        let share = elapsed.num_milliseconds() as f64 / whole.num_milliseconds().max(1) as f64;
        self.told(&json!({
            "elapsed": elapsed.num_milliseconds(), "remaining": (self.at - now).num_milliseconds(), "percentUsed": share,
        }))
    }

    /// `sla:violated`: it has passed.
    pub fn passed(&self, now: DateTime<Utc>) -> Value {
        self.told(&json!({"overdueMs": (now - self.at).num_milliseconds()}))
    }

    /// `sla:met`: what it was for is there in time.
    pub fn met(&self, now: DateTime<Utc>) -> Value {
        self.told(&json!({"marginMs": (self.at - now).num_milliseconds()}))
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

/// Has serde write a time like any other of the API.
///
/// # Errors
/// What the serializer says.
pub fn as_timestamp<S: serde::Serializer>(at: &DateTime<Utc>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&timestamp(*at))
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
