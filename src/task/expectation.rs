//! What the work must be like, and what it must leave behind (contract 2.7.1 and 2.6.5).

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::event::as_timestamp;

/// Whether the engine may correct an expectation that turns out to be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Confidence {
    /// It may not.
    Firm,
    /// It may.
    Estimated,
}

/// One thing that a reviewer scores.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Dimension {
    /// Its name, unique in its expectation.
    pub name: String,
    /// What it is about.
    pub description: String,
    /// How much it counts: 0 to 1.
    pub weight: f64,
    /// What each score means: `"1"` to `"5"`, or one text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rubric: Option<Value>,
}

/// A condition that finished work is judged by.
#[derive(Debug, Clone, PartialEq)]
pub enum Expectation {
    /// Reviewers score it.
    LlmReview {
        /// What they look for.
        criteria: Option<String>,
        /// What they score; the default dimensions when empty.
        dimensions: Vec<Dimension>,
        /// The least weighted score that passes, 1 to 5.
        threshold: Option<f64>,
        /// Whether the threshold may be corrected.
        confidence: Confidence,
    },
}

/// The most expectations of a task, dimensions of one, and expected outcomes.
const MOST: usize = 20;

/// What must be there before commands can be run.
const NO_SANDBOX: &str =
    "needs a workspace and a shell, which this server does not have yet: use `llm_review`";

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value
        .get(key)
        .and_then(Value::as_str)
        .filter(|text| !text.trim().is_empty())
}

impl Expectation {
    /// Reads a list of expectations; absent and null are none.
    ///
    /// # Errors
    /// A sentence that names the one at fault. Nothing is ever dropped silently.
    pub fn parse_all(value: &Value) -> Result<Vec<Self>, String> {
        let items = match value {
            Value::Null => return Ok(Vec::new()),
            Value::Array(items) if items.len() <= MOST => items,
            _ => {
                return Err(format!(
                    "`expectations` must be a list of at most {MOST} objects."
                ));
            }
        };
        let read = |(index, item)| {
            Self::parse(item).map_err(|error| format!("`expectations[{index}]`: {error}."))
        };
        items.iter().enumerate().map(read).collect()
    }

    /// Reads one expectation, by its canonical names or their aliases.
    ///
    /// # Errors
    /// What is wrong with it; ends a sentence.
    pub fn parse(value: &Value) -> Result<Self, String> {
        match value.get("type").and_then(Value::as_str) {
            Some("llm_review") => {}
            Some(kind @ ("test" | "script" | "file_exists")) => {
                return Err(format!("`{kind}` {NO_SANDBOX}"));
            }
            Some(kind) => {
                return Err(format!(
                    "there is no type `{kind}`: it is `llm_review`, `test`, `script` or `file_exists`"
                ));
            }
            None => return Err("`type` is missing".to_owned()),
        }
        let criteria = text(value, "criteria")
            .or_else(|| text(value, "prompt"))
            .map(str::to_owned);
        let dimensions = match value.get("dimensions") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(items)) if items.len() <= MOST => {
                items.iter().map(dimension).collect::<Result<Vec<_>, _>>()?
            }
            Some(_) => {
                return Err(format!(
                    "`dimensions` must be a list of at most {MOST} objects"
                ));
            }
        };
        for (index, one) in dimensions.iter().enumerate() {
            if dimensions[..index]
                .iter()
                .any(|other| other.name == one.name)
            {
                return Err(format!("the dimension \"{}\" occurs twice", one.name));
            }
        }
        if criteria.is_none() && dimensions.is_empty() {
            return Err(
                "an `llm_review` needs `criteria` or at least one of `dimensions`".to_owned(),
            );
        }
        if !dimensions.is_empty() && dimensions.iter().all(|one| one.weight == 0.0) {
            return Err("at least one of the `dimensions` needs a `weight` above 0".to_owned());
        }
        let threshold = match value.get("threshold") {
            None | Some(Value::Null) => None,
            Some(threshold) => Some(
                threshold
                    .as_f64()
                    .filter(|threshold| (1.0..=5.0).contains(threshold))
                    .ok_or("`threshold` must be a number from 1 to 5")?,
            ),
        };
        let confidence = match value.get("confidence") {
            None | Some(Value::Null) => Confidence::Firm,
            Some(word) => Confidence::deserialize(word)
                .map_err(|_| "`confidence` must be `firm` or `estimated`")?,
        };
        Ok(Self::LlmReview {
            criteria,
            dimensions,
            threshold,
            confidence,
        })
    }
}

fn dimension(value: &Value) -> Result<Dimension, String> {
    let name = text(value, "name")
        .ok_or("a dimension needs a `name`")?
        .to_owned();
    let weight = value
        .get("weight")
        .and_then(Value::as_f64)
        .filter(|weight| (0.0..=1.0).contains(weight))
        .ok_or_else(|| format!("the dimension \"{name}\" needs a `weight` from 0 to 1"))?;
    let rubric = match value.get("rubric") {
        None | Some(Value::Null) => None,
        Some(rubric @ Value::String(_)) => Some(rubric.clone()),
        Some(Value::Object(scores))
            if scores.iter().all(|(score, text)| {
                ["1", "2", "3", "4", "5"].contains(&score.as_str()) && text.is_string()
            }) =>
        {
            Some(Value::Object(scores.clone()))
        }
        Some(_) => {
            return Err(format!(
                "the `rubric` of \"{name}\" must map \"1\" to \"5\" to texts"
            ));
        }
    };
    Ok(Dimension {
        description: text(value, "description").unwrap_or_default().to_owned(),
        name,
        weight,
        rubric,
    })
}

impl Serialize for Expectation {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self::LlmReview {
            criteria,
            dimensions,
            threshold,
            confidence,
        } = self;
        let mut members = Map::from_iter([("type".to_owned(), json!("llm_review"))]);
        if let Some(criteria) = criteria {
            members.insert("criteria".to_owned(), json!(criteria));
        }
        if !dimensions.is_empty() {
            members.insert("dimensions".to_owned(), json!(dimensions));
        }
        if let Some(threshold) = threshold {
            members.insert("threshold".to_owned(), json!(threshold));
        }
        members.insert("confidence".to_owned(), json!(confidence));
        members.serialize(serializer)
    }
}

/// Metrics are commands, and commands need a sandbox.
///
/// # Errors
/// A sentence, for any metric.
pub fn refuse_metrics(value: &Value) -> Result<(), String> {
    match value {
        Value::Null => Ok(()),
        Value::Array(metrics) if metrics.is_empty() => Ok(()),
        _ => Err("`metrics`: a metric is a command, which needs a workspace and a shell that this server does not have yet.".to_owned()),
    }
}

/// What kind of thing a run leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OutcomeKind {
    /// A file.
    File,
    /// A text.
    Text,
    /// An address.
    Url,
    /// Data.
    Json,
    /// A picture, a sound, a film.
    Media,
}

/// What a run is to leave behind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExpectedOutcome {
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: OutcomeKind,
    /// What it is called.
    #[schema(min_length = 1)]
    pub label: String,
    /// What it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Where it is to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Its media type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mime_type: Option<String>,
    /// Whether the work is not done without it.
    #[serde(default = "yes")]
    pub required: bool,
    /// Labels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
}

fn yes() -> bool {
    true
}

impl OutcomeKind {
    /// Its name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Text => "text",
            Self::Url => "url",
            Self::Json => "json",
            Self::Media => "media",
        }
    }
}

impl ExpectedOutcome {
    /// Whether this is it: by its label, and as the kind of thing that it is to be.
    pub fn is_met_by(&self, outcome: &Outcome) -> bool {
        (self.kind, self.label.as_str()) == (outcome.kind, outcome.label.as_str())
    }

    /// Reads a list of them; absent and null are `None`.
    ///
    /// # Errors
    /// A sentence that names the one at fault.
    pub fn parse_all(value: &Value) -> Result<Option<Vec<Self>>, String> {
        let items = match value {
            Value::Null => return Ok(None),
            Value::Array(items) if items.len() <= MOST => items,
            _ => {
                return Err(format!(
                    "`expectedOutcomes` must be a list of at most {MOST} objects."
                ));
            }
        };
        let read = |(index, item)| match super::read_as_shown::<Self>(item) {
            Ok(outcome) if outcome.label.trim().is_empty() => Err(format!(
                "`expectedOutcomes[{index}].label` must not be empty."
            )),
            Ok(outcome) => Ok(outcome),
            Err(error) => Err(format!("`expectedOutcomes[{index}]`: {error}.")),
        };
        items
            .iter()
            .enumerate()
            .map(read)
            .collect::<Result<Vec<_>, _>>()
            .map(Some)
    }
}

/// What a run left behind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// `out_…`.
    pub id: String,
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: OutcomeKind,
    /// What it is called.
    pub label: String,
    /// Where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Its media type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mime_type: Option<String>,
    /// Its size in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// The text itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The address itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The data itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
    /// The tool that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub produced_by: Option<String>,
    /// When it was made.
    #[serde(serialize_with = "as_timestamp")]
    pub produced_at: DateTime<Utc>,
    /// Labels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_are_read_and_canonical_names_are_given_back() {
        let given = json!([{"type": "llm_review", "prompt": "Is it short?", "weight": 3, "threshold": 4,
            "dimensions": [{"name": "brevity", "description": "d", "weight": 0.5, "rubric": {"1": "long", "5": "short"}}]}]);
        let read = Expectation::parse_all(&given).unwrap();
        let shown = json!(read);
        assert_eq!(shown[0]["criteria"], "Is it short?");
        assert_eq!(shown[0]["confidence"], "firm");
        assert!(shown[0].get("weight").is_none() && shown[0].get("prompt").is_none());
        assert_eq!(Expectation::parse_all(&shown), Ok(read));
    }

    #[test]
    fn what_is_neither_canonical_nor_an_alias_is_refused_by_name() {
        for (given, word) in [
            (json!({}), "type"),
            (json!({"type": "vibes"}), "vibes"),
            (json!({"type": "test", "command": "true"}), "shell"),
            (json!({"type": "script", "command": "true"}), "shell"),
            (json!({"type": "file_exists", "paths": ["a"]}), "shell"),
            (json!({"type": "llm_review"}), "criteria"),
            (json!({"type": "llm_review", "criteria": " "}), "criteria"),
            (
                json!({"type": "llm_review", "criteria": "c", "threshold": 0.9}),
                "threshold",
            ),
            (
                json!({"type": "llm_review", "criteria": "c", "threshold": "4"}),
                "threshold",
            ),
            (
                json!({"type": "llm_review", "criteria": "c", "confidence": "sure"}),
                "confidence",
            ),
            (
                json!({"type": "llm_review", "dimensions": [{"name": "a"}]}),
                "weight",
            ),
            (
                json!({"type": "llm_review", "dimensions": [{"weight": 1}]}),
                "name",
            ),
            (
                json!({"type": "llm_review", "dimensions": [{"name": "a", "weight": 1}, {"name": "a", "weight": 1}]}),
                "twice",
            ),
            (
                json!({"type": "llm_review", "dimensions": [{"name": "a", "weight": 1, "rubric": {"6": "x"}}]}),
                "rubric",
            ),
            (json!("llm_review"), "type"),
        ] {
            let error = Expectation::parse_all(&json!([given])).unwrap_err();
            assert!(
                error.contains(word) && error.starts_with("`expectations[0]`"),
                "{error}"
            );
        }
        assert!(Expectation::parse_all(&json!({})).is_err());
        assert!(
            refuse_metrics(&json!([{"name": "m"}])).is_err() && refuse_metrics(&json!([])).is_ok()
        );
    }

    #[test]
    fn expected_outcomes_need_a_kind_and_a_label() {
        let read = ExpectedOutcome::parse_all(&json!([{"type": "text", "label": "Notes"}]))
            .unwrap()
            .unwrap();
        assert!(read[0].required);
        for given in [
            json!([{"type": "text"}]),
            json!([{"type": "smell", "label": "l"}]),
            json!([{"type": "text", "label": " "}]),
            json!("x"),
        ] {
            assert!(ExpectedOutcome::parse_all(&given).is_err(), "{given}");
        }
    }
}
