//! `register_outcome`: an agent hands over what its task leaves behind (contract 2.6.5).

use std::sync::atomic::{AtomicUsize, Ordering};

use chrono::{DateTime, Utc};
use reqwest::Url;
use serde::Deserialize;
use serde_json::{Value, json};

use super::arguments;
use crate::ids::{self, Id};
use crate::llm::{Tool, ToolCall};
use crate::task::{ExpectedOutcome, Outcome, OutcomeKind};

pub(super) const NAME: &str = "register_outcome";

/// The most bytes of an outcome's text or data.
const LARGEST: usize = 256 * 1024;

/// The longest label, in characters, that the task does not ask for itself.
const LABEL: usize = 200;

/// The most bytes of all outcomes of a run.
const ALL: usize = 1024 * 1024;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Register {
    #[serde(rename = "type")]
    kind: OutcomeKind,
    label: String,
    text: Option<String>,
    url: Option<String>,
    data: Option<Value>,
    path: Option<String>,
    mime_type: Option<String>,
    #[serde(default)]
    tags: Vec<String>,
}

pub(super) fn tool() -> Tool {
    let text = || json!({"type": "string"});
    Tool {
        name: NAME.to_owned(),
        description: Some("Hand over a result of your task: a `text`, a `url`, or `data` for json, under a label.".to_owned()),
        parameters: json!({
            "type": "object", "required": ["type", "label"],
            "properties": {
                "type": {"enum": ["text", "url", "json", "file", "media"]},
                "label": text(), "text": text(), "url": text(), "data": {}, "path": text(), "mimeType": text(),
                "tags": {"type": "array", "items": {"type": "string"}},
            },
        }),
    }
}

/// Takes what a call hands over, unless the task expects something else under its label.
/// `so_far` are the bytes of what the run has handed over.
pub(super) fn call(
    call: &ToolCall,
    expected: &[ExpectedOutcome],
    so_far: &AtomicUsize,
) -> Result<String, String> {
    let outcome = outcome_of(call, Utc::now())?;
    let same: Vec<&ExpectedOutcome> = expected
        .iter()
        .filter(|one| one.label == outcome.label)
        .collect();
    if same.is_empty() && outcome.label.chars().count() > LABEL {
        return Err(format!(
            "`label` may have {LABEL} characters at most: choose a short name, and hand the rest over as `text`."
        ));
    }
    if same.is_empty() || same.iter().any(|one| one.is_met_by(&outcome)) {
        // A task is told whole with each of its events, and judged whole.
        let size = json!(outcome).to_string().len();
        if so_far.fetch_add(size, Ordering::Relaxed) + size > ALL {
            so_far.fetch_sub(size, Ordering::Relaxed);
            return Err(format!(
                "The outcomes of a run may have {} KiB in all: hand over less, or a `url` where more is.",
                ALL / 1024
            ));
        }
        return Ok(format!("\"{}\" is registered.", outcome.label));
    }
    let kinds: Vec<&str> = same.iter().map(|one| one.kind.as_str()).collect();
    Err(format!(
        "The outcome \"{}\" is expected as `{}`: hand it over as that.",
        outcome.label,
        kinds.join("` or `")
    ))
}

/// What a call hands over.
///
/// # Errors
/// What the model reads when it hands over nothing.
pub fn outcome_of(call: &ToolCall, at: DateTime<Utc>) -> Result<Outcome, String> {
    let given: Register = arguments(call)?;
    if given.label.trim().is_empty() {
        return Err("`label` must not be empty.".to_owned());
    }
    let needed = match given.kind {
        OutcomeKind::Text => given.text.is_some().then_some(()).ok_or("text"),
        OutcomeKind::Url => given.url.is_some().then_some(()).ok_or("url"),
        OutcomeKind::Json => given.data.is_some().then_some(()).ok_or("data"),
        OutcomeKind::File | OutcomeKind::Media => (given.url.is_some() || given.path.is_some())
            .then_some(())
            .ok_or("url` or `path"),
    };
    needed.map_err(|member| format!("An outcome of this type needs `{member}`."))?;
    // Whoever reads the outcome may follow it.
    let is_web =
        |url: &str| Url::parse(url).is_ok_and(|url| matches!(url.scheme(), "http" | "https"));
    if given.url.as_deref().is_some_and(|url| !is_web(url)) {
        return Err(
            "`url` must be a whole http or https URL, such as https://example.com/report. Hand over anything else as `text`."
                .to_owned(),
        );
    }
    let size = given.text.as_ref().map_or(0, String::len)
        + given.data.as_ref().map_or(0, |data| data.to_string().len());
    if size > LARGEST {
        return Err(format!(
            "An outcome may have {} KiB at most.",
            LARGEST / 1024
        ));
    }
    Ok(Outcome {
        id: Id::<ids::Outcome>::new().to_string(),
        kind: given.kind,
        label: given.label,
        path: given.path,
        mime_type: given.mime_type,
        size: given.text.as_ref().map(|text| text.len() as u64),
        text: given.text,
        url: given.url,
        data: given.data,
        produced_by: Some(NAME.to_owned()),
        produced_at: at,
        tags: given.tags,
    })
}

/// Whether a call is of this tool.
pub fn registers_outcome(call: &ToolCall) -> bool {
    call.name == NAME
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outcomes_of_a_run_are_bounded_together() {
        let so_far = AtomicUsize::new(0);
        let register = |length: usize| {
            let arguments = json!({"type": "text", "label": "l", "text": "x".repeat(length)});
            let one = ToolCall {
                id: "c".to_owned(),
                name: NAME.to_owned(),
                arguments: arguments.to_string(),
            };
            call(&one, &[], &so_far)
        };
        for _ in 0..4 {
            assert!(register(LARGEST - 1_000).is_ok());
        }
        assert!(register(LARGEST - 1_000).unwrap_err().contains("in all"));
        assert!(register(100).is_ok());
    }

    #[test]
    fn only_a_label_that_the_task_asks_for_may_be_long() {
        let register = |length: usize, expected: &[ExpectedOutcome]| {
            let arguments = json!({"type": "text", "label": "l".repeat(length), "text": "x"});
            let one = ToolCall {
                id: "c".to_owned(),
                name: NAME.to_owned(),
                arguments: arguments.to_string(),
            };
            call(&one, expected, &AtomicUsize::new(0))
        };
        assert!(register(LABEL, &[]).is_ok());
        assert!(register(LABEL + 1, &[]).unwrap_err().contains("`label`"));
        let expected = json!([{"type": "text", "label": "l".repeat(LABEL + 1)}]);
        let expected = ExpectedOutcome::parse_all(&expected).unwrap().unwrap();
        assert!(register(LABEL + 1, &expected).is_ok());
    }

    #[test]
    fn an_outcome_must_hold_what_its_type_says() {
        let register = |arguments: Value| {
            let call = ToolCall {
                id: "c".to_owned(),
                name: NAME.to_owned(),
                arguments: arguments.to_string(),
            };
            outcome_of(&call, Utc::now())
        };
        assert_eq!(
            register(json!({"type": "text", "label": "Notes", "text": "abc"}))
                .unwrap()
                .size,
            Some(3)
        );
        for (arguments, word) in [
            (json!({"type": "text", "label": "Notes"}), "text"),
            (
                json!({"type": "json", "label": "Notes", "text": "x"}),
                "data",
            ),
            (json!({"type": "url", "label": "Notes"}), "url"),
            (
                json!({"type": "url", "label": "l", "url": "javascript:alert(1)"}),
                "https://",
            ),
            (
                json!({"type": "url", "label": "l", "url": "not a url"}),
                "https://",
            ),
            (
                json!({"type": "media", "label": "l", "url": "file:///etc/passwd"}),
                "https://",
            ),
            (json!({"type": "text", "label": " ", "text": "x"}), "label"),
            (json!({"type": "smell", "label": "l"}), "smell"),
            (
                json!({"type": "text", "label": "l", "text": "x".repeat(LARGEST + 1)}),
                "KiB",
            ),
        ] {
            assert!(register(arguments).unwrap_err().contains(word), "{word}");
        }
    }
}
