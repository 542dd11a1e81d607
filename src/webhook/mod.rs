//! What a webhook is: what it listens to, where it may be, what it is sent, and when it is tried again. Pure.

use std::borrow::Cow;
use std::time::Duration;

use reqwest::Url;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::event;
use crate::net::is_private_literal;

mod queue;
mod signature;

pub use queue::{Item, Queue};
pub use signature::{Signer, new_secret};

/// The most webhooks of a project (contract 2.10).
pub const MOST: i64 = 10;
/// The longest URL, in bytes.
pub const URL_LIMIT: usize = 2_048;
/// The most patterns of one webhook.
pub const PATTERNS: usize = 100;
/// The largest body that is sent, in bytes (design 0.1).
pub const BODY_LIMIT: usize = 256 * 1024;
/// The longest pause between two tries of a delivery.
const LONGEST: Duration = Duration::from_hours(6);
/// The longest rest of a receiver that fails whatever it is sent.
const LONGEST_REST: Duration = Duration::from_mins(1);
/// Failures in a row after which a receiver is taken to fail whatever it is sent.
const PATIENCE: i32 = 8;

/// What events can begin with.
const NAMESPACES: &[&str] = &[
    "task",
    "mission",
    "agent",
    "assessment",
    "approval",
    "schedule",
    "escalation",
    "sla",
    "checkpoint",
    "delay",
    "quality",
    "deadlock",
    "orchestrator",
    "session",
    "message",
    "webhook",
    "config",
];

/// Checks what a webhook is to listen to: `*`, `<namespace>:*`, or events' names (contract 2.10).
///
/// # Errors
/// A sentence that says what to change.
pub fn check_events(patterns: &[String]) -> Result<(), String> {
    if patterns.is_empty() {
        return Err("`events` must name at least one event, such as `task:*`.".to_owned());
    }
    if patterns.len() > PATTERNS {
        return Err(format!("`events` may have at most {PATTERNS} patterns."));
    }
    patterns.iter().try_for_each(|pattern| check_event(pattern))
}

fn check_event(pattern: &str) -> Result<(), String> {
    if pattern == "*" {
        return Ok(());
    }
    let form = || {
        let shown: String = pattern.chars().take(80).collect();
        format!(
            "`events` may not hold `{shown}`: write `*`, a namespace such as `task:*`, or an event's name such as `task:completed`."
        )
    };
    let (namespace, rest) = pattern.split_once(':').ok_or_else(form)?;
    let is_word = |word: &str| {
        !word.is_empty()
            && word
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
    };
    let well_formed = rest == "*" || rest.split(':').all(is_word);
    if !well_formed || !is_word(namespace) || pattern.len() > 100 {
        return Err(form());
    }
    if NAMESPACES.contains(&namespace) {
        Ok(())
    } else {
        Err(format!(
            "`events` names the namespace `{namespace}`, which there is not: it must be one of {}.",
            NAMESPACES.join(", ")
        ))
    }
}

/// The pattern as SQL's `like` has it, so that the database leaves out what nobody listens to.
pub fn as_like(pattern: &str) -> String {
    let (prefix, any) = match pattern.strip_suffix('*') {
        Some(prefix) => (prefix, "%"),
        None => (pattern, ""),
    };
    let escaped = prefix
        .replace('\\', r"\\")
        .replace('%', r"\%")
        .replace('_', r"\_");
    format!("{escaped}{any}")
}

/// Where webhooks may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// At http URLs too.
    pub http: bool,
    /// At private, loopback and link-local addresses too.
    pub private: bool,
}

/// Checks where a webhook is. Names are looked up with each delivery; addresses are seen here.
///
/// # Errors
/// A sentence that says what to change.
pub fn check_url(text: &str, reach: Reach) -> Result<Url, String> {
    if text.len() > URL_LIMIT {
        return Err(format!("`url` must be at most {URL_LIMIT} bytes."));
    }
    let url = Url::parse(text).map_err(|error| format!("`url` is not a URL: {error}."))?;
    match url.scheme() {
        "https" => {}
        "http" if reach.http => {}
        _ => return Err("`url` must be an https URL.".to_owned()),
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err("`url` must name a host.".to_owned());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("`url` may not hold a user or a password: deliveries are signed.".to_owned());
    }
    let is_local = url.host_str().is_some_and(|host| {
        let host = host.trim_end_matches('.');
        host.eq_ignore_ascii_case("localhost") || host.to_ascii_lowercase().ends_with(".localhost")
    });
    if !reach.private && (is_private_literal(&url) || is_local) {
        return Err("`url` may not be a private address.".to_owned());
    }
    Ok(url)
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Subject<'a> {
    #[serde(borrow)]
    task_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    mission_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    schedule_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    request_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    entity_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    session_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    webhook_id: Option<Cow<'a, str>>,
}

/// What an event is about, by its payload: its task, else its mission, and so on; else its own name.
pub fn resource(name: &str, payload: &str) -> String {
    let subject: Subject = serde_json::from_str(payload).unwrap_or_default();
    let about = subject
        .task_id
        .or(subject.mission_id)
        .or(subject.schedule_id)
        .or(subject.request_id)
        .or(subject.entity_id)
        .or(subject.session_id)
        .or(subject.webhook_id);
    about.map_or_else(|| name.to_owned(), Cow::into_owned)
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Stamp<'a> {
    #[serde(borrow)]
    timestamp: Option<Cow<'a, str>>,
}

/// What is sent of an event. A payload that makes it larger than [`BODY_LIMIT`] is trimmed, and the body says so.
pub fn body(seq: i64, name: &str, payload: &str) -> String {
    let stamp: Stamp = serde_json::from_str(payload).unwrap_or_default();
    let stamp = Value::from(stamp.timestamp.as_deref().unwrap_or_default());
    let id = event::id(seq);
    let name = Value::from(name);
    let head = format!(r#"{{"id":"{id}","type":{name},"event":{name},"timestamp":{stamp}"#);
    if head.len() + payload.len() + 16 <= BODY_LIMIT {
        return format!(r#"{head},"data":{payload}}}"#);
    }
    let whole: Map<String, Value> = serde_json::from_str(payload).unwrap_or_default();
    let data = Value::Object(trimmed(&whole, BODY_LIMIT / 4));
    format!(r#"{head},"truncated":true,"data":{data}}}"#)
}

/// The longest text in a trimmed payload.
const SHORT: usize = 1_024;

/// The members of an object that are small, ids first, within about so many bytes.
fn trimmed(whole: &Map<String, Value>, room: usize) -> Map<String, Value> {
    let mut left = room;
    let mut kept = Map::new();
    let is_id = |name: &str| name == "id" || name.ends_with("Id");
    for ids in [true, false] {
        for (name, value) in whole.iter().filter(|(name, _)| is_id(name) == ids) {
            let value = match value {
                Value::String(text) if text.len() > SHORT => continue,
                Value::Array(_) if value.to_string().len() > SHORT => continue,
                Value::Object(members) => Value::Object(trimmed(members, left / 2)),
                value => value.clone(),
            };
            let size = name.len() + value.to_string().len() + 4;
            if size <= left {
                left -= size;
                kept.insert(name.clone(), value);
            }
        }
    }
    kept
}

/// The pause after the `attempts`-th try of a delivery has failed: `first`, three times as long with each, at most six
/// hours. `chance`, from 0 to 1, spreads it over a fifth in both directions.
pub fn backoff(first: Duration, attempts: i32, chance: f64) -> Duration {
    let times = u32::try_from(attempts.saturating_sub(1)).unwrap_or_default();
    let grown = first.saturating_mul(3u32.saturating_pow(times.min(20)));
    grown.min(LONGEST).mul_f64(0.8 + 0.4 * chance)
}

/// How long everything for a receiver rests after its last `failures` tries have failed, whatever they were about.
/// Without it each new event would be one more try of a receiver that is dead.
pub fn rest(first: Duration, failures: i32) -> Duration {
    match u32::try_from(failures - PATIENCE) {
        Ok(beyond) => first
            .saturating_mul(2u32.saturating_pow(beyond.min(20)))
            .min(LONGEST_REST),
        Err(_few) => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const CLOSED: Reach = Reach {
        http: false,
        private: false,
    };
    const OPEN: Reach = Reach {
        http: true,
        private: true,
    };

    #[test]
    fn patterns_are_a_star_a_namespace_or_a_name() {
        for fine in ["*", "task:*", "task:retry:blocked", "sla:met", "webhook:*"] {
            assert_eq!(check_events(&[fine.to_owned()]), Ok(()), "{fine}");
        }
        for wrong in [
            "",
            "task",
            "task:",
            ":*",
            "tasks:*",
            "task:*:x",
            "ta*",
            "task:a b",
            "task:*,agent:*",
            "Task:*",
        ] {
            assert!(check_events(&[wrong.to_owned()]).is_err(), "{wrong}");
        }
        assert!(check_events(&[]).is_err());
        let sentence = check_events(&["watcher:*".to_owned()]).unwrap_err();
        assert!(sentence.contains("task, mission"), "{sentence}");
        for (pattern, like) in [
            ("*", "%"),
            ("task:*", "task:%"),
            ("task:a_b", r"task:a\_b"),
            (r"100%\", r"100\%\\"),
        ] {
            assert_eq!(as_like(pattern), like);
        }
    }

    #[test]
    fn a_url_is_public_and_https_unless_settings_open_more() {
        for url in ["https://example.com/hook?x=1", "https://1.1.1.1:8443/"] {
            assert!(check_url(url, CLOSED).is_ok(), "{url}");
        }
        for url in [
            "http://example.com/",
            "https://127.0.0.1/",
            "https://[::1]/",
            "https://10.0.0.1/",
            "https://2130706433/",
            "https://localhost/",
            "https://a.localhost./",
        ] {
            assert!(check_url(url, CLOSED).is_err(), "{url}");
            assert!(check_url(url, OPEN).is_ok(), "{url}");
        }
        let long = format!("https://example.com/{}", "x".repeat(URL_LIMIT));
        for url in [
            "",
            "example.com",
            "ftp://example.com/",
            "https://user@example.com/",
            "https://:secret@example.com/",
            "https://",
            &long,
        ] {
            assert!(check_url(url, OPEN).is_err(), "{url}");
        }
    }

    #[test]
    fn an_event_is_about_the_first_of_its_ids() {
        for (payload, expected) in [
            (json!({"missionId": "m", "taskId": "t"}), "t"),
            (json!({"missionId": "m", "scheduleId": "s"}), "m"),
            (json!({"scheduleId": "s", "entityId": "e"}), "s"),
            (json!({"requestId": "\"q\""}), "\"q\""),
            (json!({"sessionId": "s"}), "s"),
            (json!({"taskIds": ["a"]}), "some:event"),
        ] {
            assert_eq!(resource("some:event", &payload.to_string()), expected);
        }
    }

    #[test]
    fn a_body_has_the_events_id_and_name_and_its_payload_as_it_is() {
        let payload = r#"{"taskId":"t","from":"pending","timestamp":"2026-04-07T12:00:02.000Z"}"#;
        assert_eq!(
            body(317, "task:transition", payload),
            format!(
                r#"{{"id":"evt_00317","type":"task:transition","event":"task:transition","timestamp":"2026-04-07T12:00:02.000Z","data":{payload}}}"#
            )
        );
    }

    #[test]
    fn a_body_that_is_too_large_keeps_ids_and_what_is_small() {
        let large = "x".repeat(BODY_LIMIT);
        let many: Map<String, Value> = (0..20_000)
            .map(|number| (format!("m{number}"), json!(number)))
            .collect();
        for payload in [
            json!({"big": large, "taskId": "t", "timestamp": "now",
                "task": {"description": large, "id": "t", "title": "T", "tags": ["a"]}}),
            json!({"many": many, "title": "T", "taskId": "t", "timestamp": "now", "task": many}),
            json!({"list": vec![1; BODY_LIMIT], "taskId": "t", "timestamp": "now"}),
        ] {
            let text = body(1, "task:created", &payload.to_string());
            assert!(text.len() <= BODY_LIMIT, "{}", text.len());
            let sent: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(sent["truncated"], true);
            assert_eq!(
                (&sent["id"], &sent["timestamp"]),
                (&json!("evt_00001"), &json!("now"))
            );
            assert_eq!(sent["data"]["taskId"], "t");
            assert!(sent["data"]["big"].is_null());
        }
        let payload = json!({"task": {"description": large, "id": "t", "tags": ["a"]}});
        let sent: Value =
            serde_json::from_str(&body(1, "task:created", &payload.to_string())).unwrap();
        assert_eq!(sent["data"]["task"], json!({"id": "t", "tags": ["a"]}));
    }

    #[test]
    fn pauses_grow_threefold_up_to_six_hours_and_spread() {
        let first = Duration::from_secs(5);
        for (attempts, chance, seconds) in [
            (1, 0.5, 5.0),
            (2, 0.5, 15.0),
            (3, 0.5, 45.0),
            (1, 0.0, 4.0),
            (1, 1.0, 6.0),
            (9, 0.5, 21_600.0),
            (1_000, 0.5, 21_600.0),
        ] {
            let pause = backoff(first, attempts, chance).as_secs_f64();
            assert!(
                (pause - seconds).abs() < 1e-6,
                "{attempts}, {chance}: {pause}"
            );
        }
        let second = Duration::from_secs(1);
        for (failures, seconds) in [(0, 0), (7, 0), (8, 1), (9, 2), (14, 60), (i32::MAX, 60)] {
            assert_eq!(rest(second, failures).as_secs(), seconds, "{failures}");
        }
    }
}
