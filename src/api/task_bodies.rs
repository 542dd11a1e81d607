//! What callers send about tasks: read, checked, and made into what `lifecycle` takes (contract 2.6.1).

use chrono::{DateTime, Datelike, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::ApiError;
use super::extract::{given, plain};
use super::shapes::ExpectationShape;
use crate::lifecycle::{NewTask, TaskChange};
use crate::task::{
    Document, Expectation, ExpectedOutcome, LONGEST_TIME, RetryPolicy, Status, Task, read_as_shown,
    refuse_metrics,
};

/// A new task. Other members (`notifications`, `user`, `loop`, `executionMode`, `sandbox`, `routing`) are kept as given.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CreateTask {
    /// What it is called; unique among unfinished tasks.
    #[schema(value_type = String, min_length = 1, max_length = 500)]
    pub title: Option<String>,
    /// The instructions.
    #[schema(value_type = String, min_length = 1)]
    pub description: Option<String>,
    /// The agent that does it.
    #[schema(value_type = String, min_length = 1)]
    pub assign_to: Option<String>,
    /// Ids or titles of tasks that must be done first.
    pub depends_on: Option<Vec<String>>,
    /// What the work is judged by.
    #[schema(value_type = Option<Vec<ExpectationShape>>)]
    pub expectations: Option<Value>,
    /// What it is to leave behind.
    #[schema(value_type = Option<Vec<ExpectedOutcome>>)]
    pub expected_outcomes: Option<Value>,
    /// None until there is a sandbox.
    #[schema(value_type = Option<Vec<Object>>)]
    pub metrics: Option<Value>,
    /// Full retries before it fails.
    #[schema(maximum = 100)]
    pub max_retries: Option<u32>,
    /// Higher runs first; 1 when absent.
    pub priority: Option<f64>,
    /// Whether it touches the outside world: then a person says yes before it is done.
    pub side_effects: Option<bool>,
    /// The longest run in milliseconds; 0 is no limit.
    pub max_duration: Option<u64>,
    /// How it changes hands when it fails.
    #[schema(value_type = Option<RetryPolicy>)]
    pub retry_policy: Option<Value>,
    /// A label that it shares with others.
    #[schema(max_length = 200)]
    pub group: Option<String>,
    /// Whether it is not to be worked on yet.
    pub draft: Option<bool>,
    /// When it must be done.
    pub deadline: Option<DateTime<Utc>>,
    /// The rest.
    #[serde(flatten)]
    #[schema(ignore)]
    pub others: Map<String, Value>,
}

/// Members that are kept for others to read.
const KEPT: [&str; 6] = [
    "notifications",
    "user",
    "loop",
    "executionMode",
    "sandbox",
    "routing",
];
/// The longest title, in characters.
const TITLE: usize = 500;
/// The longest name of an agent, a model or a group, in bytes.
const NAME: usize = 200;
/// The longest reason, in characters.
const REASON: usize = 2_000;
/// The most of a member that is a list or an object, in bytes of JSON.
const MEMBER: usize = 32 * 1024;
/// The most of a task, in bytes of JSON: every event of it shows all.
const WHOLE: usize = 256 * 1024;
/// The longest description, in bytes: every event of the task shows it.
const DESCRIPTION: usize = 128 * 1024;

impl CreateTask {
    /// The new task, checked.
    ///
    /// # Errors
    /// 400 that names the member at fault.
    pub(super) fn into_new(self, default_retries: u32) -> Result<NewTask, ApiError> {
        let title = required("title", self.title)?;
        if title.chars().count() > TITLE {
            return Err(ApiError::invalid(
                "title",
                format!("title: at most {TITLE} characters"),
            ));
        }
        let description = required("description", self.description)?;
        check_description(&description)?;
        let assign_to = required("assignTo", self.assign_to)?;
        let list = |param: &str, error: String| ApiError::invalid(param, error);
        let expectations = Expectation::parse_all(&self.expectations.unwrap_or_default())
            .map_err(|error| list("expectations", error))?;
        let expected_outcomes =
            ExpectedOutcome::parse_all(&self.expected_outcomes.unwrap_or_default())
                .map_err(|error| list("expectedOutcomes", error))?;
        refuse_metrics(&self.metrics.unwrap_or_default())
            .map_err(|error| list("metrics", error))?;
        let max_retries = retries("maxRetries", self.max_retries)?.unwrap_or(default_retries);
        let depends_on = self.depends_on.unwrap_or_default();
        if depends_on.len() > 100 {
            return Err(ApiError::invalid(
                "dependsOn",
                "`dependsOn` may name at most 100 tasks.",
            ));
        }
        let mut extras = self.others;
        extras.retain(|key, value| KEPT.contains(&key.as_str()) && !value.is_null());
        check_extras(&extras)?;
        if let Some(expected) = &expected_outcomes {
            check_size("expectedOutcomes", expected, MEMBER)?;
        }
        check_size("expectations", &expectations, MEMBER)?;
        let retry_policy = retry_policy(self.retry_policy)?;
        check_length("group", self.group.as_deref(), NAME)?;
        check_length("assignTo", Some(&assign_to), NAME)?;
        for need in &depends_on {
            check_length("dependsOn", Some(need), TITLE)?;
        }
        check_times(self.max_duration, self.deadline)?;
        let new = NewTask {
            title,
            assign_to,
            group: self.group.filter(|group| !group.is_empty()),
            draft: self.draft.unwrap_or(false),
            document: Document {
                description,
                depends_on,
                expectations,
                expected_outcomes,
                priority: self.priority.unwrap_or(1.0),
                max_retries,
                side_effects: self.side_effects.unwrap_or(false),
                max_duration: self.max_duration,
                retry_policy,
                deadline: self.deadline,
                extras,
                ..Document::default()
            },
        };
        check_size("task", &new.document, WHOLE)?;
        Ok(new)
    }
}

fn check_length(param: &str, text: Option<&str>, most: usize) -> Result<(), ApiError> {
    match text {
        Some(text) if text.chars().count() > most => {
            let sentence = format!("`{param}` must be at most {most} characters.");
            Err(ApiError::invalid(param, sentence))
        }
        _ => Ok(()),
    }
}

/// Whatever a task holds goes out again with each of its events.
fn check_size(param: &str, value: &impl Serialize, most: usize) -> Result<(), ApiError> {
    let size = serde_json::to_vec(value).map_or(usize::MAX, |text| text.len());
    if size > most {
        let sentence = format!("`{param}` is too long: {size} bytes, of {most} in all.");
        return Err(ApiError::invalid(param, sentence));
    }
    Ok(())
}

fn check_extras(extras: &Map<String, Value>) -> Result<(), ApiError> {
    for (member, value) in extras {
        let fits = match member.as_str() {
            _ if value.is_null() => true,
            "notifications" => value.is_object(),
            _ => value.is_object() || value.is_string(),
        };
        if !fits {
            let text = if member == "notifications" {
                ""
            } else {
                " or a text"
            };
            let sentence = format!("`{member}` must be an object{text}.");
            return Err(ApiError::invalid(member, sentence));
        }
        check_size(member, value, MEMBER)?;
    }
    Ok(())
}

fn check_times(max_duration: Option<u64>, deadline: Option<DateTime<Utc>>) -> Result<(), ApiError> {
    if max_duration > Some(LONGEST_TIME) {
        let sentence = format!("`maxDuration` must be at most {LONGEST_TIME} milliseconds.");
        return Err(ApiError::invalid("maxDuration", sentence));
    }
    if deadline.is_some_and(|deadline| !(1970..=9999).contains(&deadline.year())) {
        return Err(ApiError::invalid(
            "deadline",
            "`deadline` must be between the years 1970 and 9999.",
        ));
    }
    Ok(())
}

fn required(param: &str, value: Option<String>) -> Result<String, ApiError> {
    value
        .filter(|value| !value.trim().is_empty())
        .ok_or_else(|| ApiError::invalid(param, format!("{param}: required")))
}

fn check_description(description: &str) -> Result<(), ApiError> {
    if description.len() > DESCRIPTION {
        let sentence = format!("`description` must be at most {} KiB.", DESCRIPTION / 1024);
        return Err(ApiError::invalid("description", sentence));
    }
    Ok(())
}

fn retry_policy(given: Option<Value>) -> Result<Option<RetryPolicy>, ApiError> {
    let Some(given) = given.filter(|given| !given.is_null()) else {
        return Ok(None);
    };
    check_size("retryPolicy", &given, 1024)?;
    match read_as_shown(&given) {
        Ok(policy) => Ok(Some(policy)),
        Err(error) => {
            let sentence = format!("`retryPolicy`: {}.", plain(error));
            Err(ApiError::invalid("retryPolicy", sentence))
        }
    }
}

fn retries(param: &str, given: Option<u32>) -> Result<Option<u32>, ApiError> {
    match given {
        Some(retries) if retries > 100 => {
            let sentence = format!("`{param}` must be from 0 to 100.");
            Err(ApiError::invalid(param, sentence))
        }
        given => Ok(given),
    }
}

/// A change to a task; what is absent stays. `user`, `loop`, `notifications`, `executionMode`, `sandbox` and `routing` can be changed too.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UpdateTask {
    /// Other instructions.
    pub description: Option<String>,
    /// Another agent.
    pub assign_to: Option<String>,
    /// A step of the status machine: `pending`, `assigned`, `done` or `failed` where it allows.
    #[schema(value_type = Option<Status>)]
    pub status: Option<String>,
    /// Other expectations, while the task is not worked on.
    #[schema(value_type = Option<Vec<Object>>)]
    pub expectations: Option<Value>,
    /// Other outcomes, from the task's next run on; null: none.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<Vec<ExpectedOutcome>>)]
    pub expected_outcomes: Option<Option<Value>>,
    /// None until there is a sandbox.
    #[schema(value_type = Option<Vec<Object>>)]
    pub metrics: Option<Value>,
    /// Another count of retries used.
    #[schema(maximum = 100)]
    pub retries: Option<u32>,
    /// Another limit of retries.
    #[schema(maximum = 100)]
    pub max_retries: Option<u32>,
    /// Whether it touches the outside world.
    pub side_effects: Option<bool>,
    /// Another weight.
    pub priority: Option<f64>,
    /// Another limit of its next run in milliseconds; 0 is no limit, null the project's.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    pub max_duration: Option<Option<u64>>,
    /// Who else takes it up when it fails; null: nobody.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<RetryPolicy>)]
    pub retry_policy: Option<Option<Value>>,
    /// Another date; null: none.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<DateTime<Utc>>)]
    pub deadline: Option<Option<DateTime<Utc>>>,
    /// The rest.
    #[serde(flatten)]
    #[schema(ignore)]
    pub others: Map<String, Value>,
}

/// Members that stay as they were made. To say them again is no change.
const FIXED: [&str; 6] = [
    "id",
    "title",
    "dependsOn",
    "group",
    "missionId",
    "createdAt",
];

impl UpdateTask {
    /// The change of a task, checked.
    ///
    /// # Errors
    /// 400 that names the member at fault, among them those that cannot be changed.
    pub(super) fn into_change(self, task: &Task) -> Result<TaskChange, ApiError> {
        let view = task.view();
        for member in FIXED {
            let unchanged = |value: &Value| Some(value) == view.get(member) || value.is_null();
            if !self.others.get(member).is_none_or(unchanged) {
                let sentence = format!("`{member}` cannot be changed: make another task.");
                return Err(ApiError::invalid(member, sentence));
            }
        }
        // What is shown holds what was wrong with the attempt before: sent back as it is, it is no other description.
        let description = self
            .description
            .filter(|given| view["description"] != **given);
        let invalid = |param: &'static str| move |error: String| ApiError::invalid(param, error);
        let expectations = match self.expectations.filter(|given| !given.is_null()) {
            None => None,
            Some(given) => Some(Expectation::parse_all(&given).map_err(invalid("expectations"))?),
        };
        let expected_outcomes = match self.expected_outcomes {
            None => None,
            Some(given) => {
                let parsed = ExpectedOutcome::parse_all(&given.unwrap_or_default());
                Some(parsed.map_err(invalid("expectedOutcomes"))?)
            }
        };
        refuse_metrics(&self.metrics.unwrap_or_default()).map_err(invalid("metrics"))?;
        if let Some(description) = &description {
            check_description(description)?;
        }
        let mut extras = self.others;
        extras.retain(|key, _| KEPT.contains(&key.as_str()));
        check_extras(&extras)?;
        check_size("expectations", &expectations, MEMBER)?;
        check_size("expectedOutcomes", &expected_outcomes, MEMBER)?;
        let retry_policy = self.retry_policy.map(retry_policy).transpose()?;
        check_length("assignTo", self.assign_to.as_deref(), NAME)?;
        check_times(self.max_duration.flatten(), self.deadline.flatten())?;
        Ok(TaskChange {
            description: filled("description", description)?,
            assign_to: filled("assignTo", self.assign_to)?,
            status: status_of(self.status.as_deref())?,
            expectations,
            expected_outcomes,
            retries: retries("retries", self.retries)?,
            max_retries: retries("maxRetries", self.max_retries)?,
            side_effects: self.side_effects,
            priority: self.priority,
            max_duration: self.max_duration,
            retry_policy,
            deadline: self.deadline,
            extras,
        })
    }
}

fn filled(param: &str, value: Option<String>) -> Result<Option<String>, ApiError> {
    match value {
        Some(value) if value.trim().is_empty() => {
            let sentence = format!("`{param}` must not be empty.");
            Err(ApiError::invalid(param, sentence))
        }
        value => Ok(value),
    }
}

/// Why something is stopped.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct StopTask {
    /// For people to read.
    #[schema(max_length = 2000)]
    pub reason: Option<String>,
}

impl StopTask {
    /// The reason, if one is given: an empty one is none.
    ///
    /// # Errors
    /// 400 for one that is too long.
    pub(super) fn reason(&self) -> Result<Option<&str>, ApiError> {
        check_length("reason", self.reason.as_deref(), REASON)?;
        let reason = self.reason.as_deref();
        Ok(reason.filter(|reason| !reason.trim().is_empty()))
    }
}

/// The status with this word.
///
/// # Errors
/// 400 that names all of them.
pub(super) fn status_of(word: Option<&str>) -> Result<Option<Status>, ApiError> {
    let Some(word) = word else { return Ok(None) };
    Status::of(word).map(Some).ok_or_else(|| {
        let known: Vec<&str> = Status::ALL.iter().map(|status| status.as_str()).collect();
        ApiError::invalid(
            "status",
            format!("`status` must be one of {}.", known.join(", ")),
        )
    })
}
