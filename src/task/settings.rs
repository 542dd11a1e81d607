//! What a project decides for all its tasks (contract 2.6.3 and 2.6.4, design 0.1): flat, each with its default.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::expression::check_meaning;
use super::gate::{Gate, LONGEST_TIME, NAME, check_channels};

/// A project's settings. What was never set has its default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
#[schema(as = ProjectSettings)]
pub struct Settings {
    /// The model of agents that name none.
    pub default_model: Option<String>,
    /// The model of reviewers; the agent's own when absent.
    pub judge_model: Option<String>,
    /// The model that answers questions, rewrites descriptions and judges blocked tasks; the default model when absent.
    pub orchestrator_model: Option<String>,
    /// Full retries of a task that says nothing of it.
    #[schema(maximum = 100)]
    pub max_retries: u32,
    /// Attempts to mend before a full retry.
    #[schema(maximum = 100)]
    pub max_fix_attempts: u32,
    /// Questions of an agent that are answered.
    #[schema(maximum = 100)]
    pub max_question_rounds: u32,
    /// Verdicts on one blocked task.
    #[schema(maximum = 100)]
    pub max_resolution_attempts: u32,
    /// Repetitions of an assessment in which every reviewer failed.
    #[schema(maximum = 100)]
    pub max_assessment_retries: u32,
    /// The longest run of a task that says nothing of it, in milliseconds; 0 is no limit.
    pub task_timeout: u64,
    /// Silence of a run, in milliseconds, after which people are warned; after twice as much it is killed.
    #[schema(minimum = 1)]
    pub stale_threshold: u64,
    /// Whether wrong `estimated` expectations are corrected.
    pub auto_correct_expectations: bool,
    /// The most tasks at once; absent is no limit.
    #[schema(minimum = 1)]
    pub max_concurrency: Option<u32>,
    /// What happens when a task's deadline passes.
    pub violation_action: Violation,
    /// What happens when retries are used up.
    pub escalation_policy: Option<Escalation>,
    /// Where people must say yes.
    pub approval_gates: Vec<Gate>,
    /// Whether missions bring the agents of their teams along.
    pub enable_volatile_teams: bool,
    /// When those agents go.
    pub volatile_cleanup: Cleanup,
    /// Whether schedules begin missions.
    pub enable_scheduler: bool,
    /// Whether chats tell `session:created` and `message:added`. It costs each turn a third more.
    pub chat_events: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            default_model: None,
            judge_model: None,
            orchestrator_model: None,
            max_retries: 3,
            max_fix_attempts: 2,
            max_question_rounds: 2,
            max_resolution_attempts: 2,
            max_assessment_retries: 1,
            task_timeout: 1_800_000,
            stale_threshold: 300_000,
            auto_correct_expectations: true,
            max_concurrency: None,
            violation_action: Violation::Notify,
            escalation_policy: None,
            approval_gates: Vec::new(),
            enable_volatile_teams: true,
            volatile_cleanup: Cleanup::OnComplete,
            enable_scheduler: true,
            chat_events: false,
        }
    }
}

/// When the agents that a mission brought along go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = VolatileCleanup)]
pub enum Cleanup {
    /// When its run ends.
    OnComplete,
    /// When someone deletes them.
    Manual,
}

/// What happens when a deadline passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Violation {
    /// An event.
    Notify,
    /// An event, and the task fails.
    Fail,
}

/// What happens to a task whose retries are used up, step by step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = EscalationPolicy)]
pub struct Escalation {
    /// What it is called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The steps; taken in the order of `level`.
    pub levels: Vec<EscalationLevel>,
}

impl Escalation {
    fn check(&self) -> Result<(), String> {
        let names = self
            .levels
            .iter()
            .map(|level| &level.target)
            .chain([&self.name]);
        if names.flatten().any(|name| name.len() > NAME) {
            return Err(format!(
                "`escalationPolicy`: `name` and `target` must be at most {NAME} bytes."
            ));
        }
        for level in &self.levels {
            let named = level.target.as_deref().unwrap_or_default();
            if level.handler == Handler::Agent && named.trim().is_empty() {
                return Err(format!(
                    "`escalationPolicy`: level {} has the handler `agent`, and must name the agent in `target`.",
                    level.level
                ));
            }
            if level.timeout_ms > Some(LONGEST_TIME) {
                return Err(format!(
                    "`escalationPolicy`: `timeoutMs` must be at most {LONGEST_TIME}."
                ));
            }
            check_channels(level.notify_channels.as_deref())
                .map_err(|message| format!("`escalationPolicy`: {message}"))?;
        }
        Ok(())
    }
}

/// What an escalation policy can have.
const POLICY: &[&str] = &["name", "levels"];
/// What one of its levels can have.
const LEVEL: &[&str] = &["level", "handler", "target", "timeoutMs", "notifyChannels"];

/// Refuses members of an escalation policy that do not exist. Only who sets a policy is asked: one that is stored must stay readable.
fn check_members(policy: &Value) -> Result<(), String> {
    let levels = policy["levels"].as_array().into_iter().flatten();
    let levels = levels.enumerate().map(|(index, level)| {
        let place = format!("escalationPolicy.levels[{index}]");
        (place, level, LEVEL)
    });
    let whole = ("escalationPolicy".to_owned(), policy, POLICY);
    for (place, value, members) in std::iter::once(whole).chain(levels) {
        let mut given = value.as_object().into_iter().flat_map(Map::keys);
        if let Some(unknown) = given.find(|member| !members.contains(&member.as_str())) {
            return Err(format!(
                "`{place}` has no member `{unknown}`: it can have `{}`.",
                members.join("`, `")
            ));
        }
    }
    Ok(())
}

/// One step of an escalation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct EscalationLevel {
    /// Its place.
    pub level: u32,
    /// Who acts.
    pub handler: Handler,
    /// For `agent`: which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// After so many milliseconds without a result the next level acts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// For other systems to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notify_channels: Option<Vec<String>>,
}

/// Who acts on an escalated task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = EscalationHandler)]
pub enum Handler {
    /// Another agent tries.
    Agent,
    /// A model rewrites the instructions.
    Orchestrator,
    /// A person decides.
    Human,
}

/// Why settings cannot be used: the setting at fault and a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SettingsError {
    /// The setting.
    pub setting: String,
    /// What is wrong with it.
    pub message: String,
}

/// More of anything in one project's settings is a mistake.
const MOST: usize = 50;

impl Settings {
    /// Reads settings from the members that were set. `in_words` says what a parser says as callers understand it.
    ///
    /// # Errors
    /// Which one cannot be used, and why.
    pub fn read(
        body: &Map<String, Value>,
        in_words: fn(String) -> String,
    ) -> Result<Self, SettingsError> {
        for (setting, value) in body {
            let alone = Value::Object(Map::from_iter([(setting.clone(), value.clone())]));
            if let Err(said) = super::read_as_shown::<Self>(&alone) {
                let (place, said) = culprit(setting, value, said);
                let message = format!("`{place}` cannot be used: {}.", in_words(said));
                return Err(fault(setting, message));
            }
        }
        if let Some(policy) = body.get("escalationPolicy") {
            check_members(policy).map_err(|message| fault("escalationPolicy", message))?;
        }
        let settings: Self = serde_json::from_value(Value::Object(body.clone()))
            .map_err(|error| fault("settings", in_words(error.to_string())))?;
        settings.check()?;
        Ok(settings)
    }

    /// Reads settings as they are stored, by whatever version: what is unknown or cannot be read has its default, and
    /// takes nothing else with it. Gates that cannot be read are closed.
    pub fn restored(body: &Map<String, Value>) -> Self {
        let mut readable = Map::new();
        let mut gates = Vec::new();
        for (setting, value) in body {
            if setting == "approvalGates" {
                gates = match value {
                    Value::Array(gates) => gates.iter().filter_map(Gate::restored).collect(),
                    Value::Null => Vec::new(),
                    unreadable => Gate::restored(unreadable).into_iter().collect(),
                };
                continue;
            }
            let alone = Map::from_iter([(setting.clone(), value.clone())]);
            match serde_json::from_value::<Self>(Value::Object(alone)) {
                Ok(_) => drop(readable.insert(setting.clone(), value.clone())),
                Err(error) => {
                    tracing::warn!("the stored setting `{setting}` cannot be read: {error}");
                }
            }
        }
        let mut settings: Self =
            serde_json::from_value(Value::Object(readable)).unwrap_or_default();
        settings.approval_gates = gates;
        settings
    }

    fn check(&self) -> Result<(), SettingsError> {
        for (setting, value) in [
            ("maxRetries", self.max_retries),
            ("maxFixAttempts", self.max_fix_attempts),
            ("maxQuestionRounds", self.max_question_rounds),
            ("maxResolutionAttempts", self.max_resolution_attempts),
            ("maxAssessmentRetries", self.max_assessment_retries),
        ] {
            if value > 100 {
                return Err(fault(
                    setting,
                    format!("`{setting}` must be from 0 to 100."),
                ));
            }
        }
        if self.stale_threshold == 0 {
            return Err(fault(
                "staleThreshold",
                "`staleThreshold` must be at least 1.".to_owned(),
            ));
        }
        if self.max_concurrency == Some(0) {
            return Err(fault(
                "maxConcurrency",
                "`maxConcurrency` must be at least 1.".to_owned(),
            ));
        }
        for (setting, time) in [
            ("taskTimeout", self.task_timeout),
            ("staleThreshold", self.stale_threshold),
        ] {
            if time > LONGEST_TIME {
                let message = format!("`{setting}` must be at most {LONGEST_TIME} milliseconds.");
                return Err(fault(setting, message));
            }
        }
        for (setting, model) in [
            ("defaultModel", &self.default_model),
            ("judgeModel", &self.judge_model),
            ("orchestratorModel", &self.orchestrator_model),
        ] {
            if model.as_ref().is_some_and(|model| model.len() > NAME) {
                let message = format!("`{setting}` must be at most {NAME} bytes.");
                return Err(fault(setting, message));
            }
        }
        if let Some(policy) = &self.escalation_policy {
            policy
                .check()
                .map_err(|message| fault("escalationPolicy", message))?;
            let mut levels: Vec<u32> = policy.levels.iter().map(|level| level.level).collect();
            levels.sort_unstable();
            levels.dedup();
            if levels.len() != policy.levels.len() || levels.is_empty() || levels.len() > MOST {
                return Err(fault(
                    "escalationPolicy",
                    format!(
                        "`escalationPolicy.levels` must be 1 to {MOST} steps with a `level` of their own each."
                    ),
                ));
            }
        }
        self.check_gates()
            .map_err(|message| fault("approvalGates", message))
    }

    fn check_gates(&self) -> Result<(), String> {
        let gates = &self.approval_gates;
        if gates.len() > MOST {
            return Err(format!("`approvalGates` must be at most {MOST}."));
        }
        for (index, gate) in gates.iter().enumerate() {
            if gates[..index].iter().any(|other| other.id == gate.id) {
                return Err(format!(
                    "`approvalGates` must have an `id` of its own each; \"{}\" occurs twice.",
                    gate.id
                ));
            }
            let fault = gate.check().and_then(|()| match &gate.condition {
                None => Ok(()),
                Some(condition) => check_meaning(&condition.expression)
                    .map_err(|reason| format!("`condition.expression`: {reason}.")),
            });
            fault.map_err(|message| format!("`approvalGates[{index}]`: {message}"))?;
        }
        Ok(())
    }
}

/// What of a setting cannot be read, as closely as can be told, and what the parser says of it. `said` is what it says of the whole.
fn culprit(setting: &str, value: &Value, said: String) -> (String, String) {
    let sound_gate = json!({"id": "g", "name": "g", "handler": "human", "hook": "task:spawn"});
    let sound_level = json!({"level": 1, "handler": "human"});
    let part = match setting {
        "approvalGates" => first_culprit::<Gate>(setting, value, &sound_gate),
        "escalationPolicy" if value.is_array() => Some((setting.to_owned(), LISTED.to_owned())),
        "escalationPolicy" => first_culprit::<EscalationLevel>(
            "escalationPolicy.levels",
            &value["levels"],
            &sound_level,
        ),
        _ => None,
    };
    part.unwrap_or_else(|| (setting.to_owned(), said))
}

/// What [`super::read_as_shown`] says of a list of an object's members.
const LISTED: &str = "a list stands where an object belongs";

/// The first entry of a list that cannot be read, or the member that spoils it: one that `sound`, an entry that can be read, cannot
/// have either.
fn first_culprit<T: Serialize + DeserializeOwned>(
    place: &str,
    list: &Value,
    sound: &Value,
) -> Option<(String, String)> {
    let entries = list.as_array()?;
    entries.iter().enumerate().find_map(|(index, entry)| {
        let said = super::read_as_shown::<T>(entry).err()?;
        let place = format!("{place}[{index}]");
        if entry.is_array() {
            return Some((place, LISTED.to_owned()));
        }
        for (member, value) in entry.as_object().into_iter().flatten() {
            let mut changed = sound.clone();
            changed[member.as_str()] = value.clone();
            if let Err(said) = super::read_as_shown::<T>(&changed) {
                return Some((format!("{place}.{member}"), said));
            }
        }
        Some((place, said))
    })
}

fn fault(setting: &str, message: String) -> SettingsError {
    SettingsError {
        setting: setting.to_owned(),
        message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(body: &Value) -> Result<Settings, SettingsError> {
        Settings::read(body.as_object().unwrap(), std::convert::identity)
    }

    fn read(body: &Value) -> Result<Settings, String> {
        attempt(body).map_err(|error| error.setting)
    }

    #[test]
    fn what_is_not_set_has_its_default_and_what_is_unknown_is_refused() {
        assert_eq!(read(&json!({})), Ok(Settings::default()));
        assert_eq!(read(&json!({"maxRetries": 0})).unwrap().max_retries, 0);
        for (body, setting) in [
            (json!({"maxRetry": 1}), "maxRetry"),
            (json!({"maxRetries": -1}), "maxRetries"),
            (json!({"maxRetries": 101}), "maxRetries"),
            (json!({"taskTimeout": "1 h"}), "taskTimeout"),
            (json!({"staleThreshold": 0}), "staleThreshold"),
            (json!({"maxConcurrency": 0}), "maxConcurrency"),
            (json!({"taskTimeout": u64::MAX}), "taskTimeout"),
            (json!({"staleThreshold": u64::MAX}), "staleThreshold"),
            (json!({"judgeModel": "m".repeat(201)}), "judgeModel"),
            (
                json!({"escalationPolicy": {"levels": [{"level": 1, "handler": "human", "timeoutMs": u64::MAX}]}}),
                "escalationPolicy",
            ),
            (
                json!({"approvalGates": [{"id": "g", "name": "G", "handler": "human", "hook": "task:spawn", "timeoutMs": u64::MAX}]}),
                "approvalGates",
            ),
            (
                json!({"approvalGates": [{"id": "g".repeat(201), "name": "G", "handler": "human", "hook": "task:spawn"}]}),
                "approvalGates",
            ),
            (json!({"violationAction": "shout"}), "violationAction"),
            (
                json!({"escalationPolicy": {"levels": []}}),
                "escalationPolicy",
            ),
            (
                json!({"escalationPolicy": {"levels": [{"level": 1, "handler": "cat"}]}}),
                "escalationPolicy",
            ),
            (
                json!({"escalationPolicy": {"levels": [{"level": 1, "handler": "human"}, {"level": 1, "handler": "human"}]}}),
                "escalationPolicy",
            ),
            (
                json!({"approvalGates": [{"id": "g", "name": "G", "handler": "human", "hook": "task:forget"}]}),
                "approvalGates",
            ),
            (
                json!({"approvalGates": [{"id": "g", "name": "G", "handler": "human", "hook": "task:spawn", "condition": {"expression": "task."}}]}),
                "approvalGates",
            ),
            (
                json!({"approvalGates": [{"id": "g", "name": "G", "handler": "human", "hook": "task:spawn"}, {"id": "g", "name": "G", "handler": "human", "hook": "task:spawn"}]}),
                "approvalGates",
            ),
        ] {
            assert_eq!(read(&body), Err(setting.to_owned()), "{body}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        let level = |level: Value| json!({"escalationPolicy": {"levels": [level]}});
        let gate = |member: &str, value: Value| {
            let mut gate =
                json!({"id": "g", "name": "G", "handler": "human", "hook": "task:spawn"});
            gate[member] = value;
            json!({"approvalGates": [gate]})
        };
        for (body, words) in [
            (
                gate("hook", json!("task:forget")),
                "`approvalGates[0].hook`",
            ),
            (
                gate("maxRevisions", json!(-1)),
                "`approvalGates[0].maxRevisions`",
            ),
            (gate("quorum", json!(2)), "`approvalGates[0].quorum`"),
            (json!({"approvalGates": [1]}), "`approvalGates[0]`"),
            (json!({"approvalGates": [{"id": "g"}]}), "missing field"),
            (
                json!({"approvalGates": [["g", "G", "human", "task:spawn"]]}),
                "a list stands",
            ),
            (
                gate("condition", json!({"expression": "1"})),
                "`approvalGates[0]`: `condition.expression`: it is always",
            ),
            (json!({"escalationPolicy": []}), "a list stands"),
            (
                json!({"escalationPolicy": {"levels": [], "level": 1}}),
                "`escalationPolicy` has no member `level`",
            ),
            (
                level(json!({"level": 1, "handler": "human", "timeoutMS": 5})),
                "`escalationPolicy.levels[0]` has no member `timeoutMS`: it can have `level`",
            ),
            (
                level(json!({"level": 1, "handler": "cat"})),
                "`escalationPolicy.levels[0].handler`",
            ),
            (level(json!({"level": 1, "handler": "agent"})), "`target`"),
            (
                level(json!({"level": 1, "handler": "agent", "target": " "})),
                "`target`",
            ),
        ] {
            let error = attempt(&body).unwrap_err();
            assert!(error.message.contains(words), "{body}: {error}");
        }
    }

    #[test]
    fn a_stored_policy_stays_whatever_else_is_in_it() {
        let level = json!({"level": 1, "handler": "agent", "timeoutMS": 5});
        let stored = json!({"escalationPolicy": {"levels": [level], "since": 1}});
        let policy = Settings::restored(stored.as_object().unwrap()).escalation_policy;
        assert_eq!(policy.unwrap().levels.len(), 1);
    }

    #[test]
    fn what_cannot_be_read_of_stored_settings_takes_nothing_else_with_it_and_opens_no_gate() {
        let stored = json!({
            "maxRetries": 7, "fromTomorrow": true, "staleThreshold": "long",
            "approvalGates": [
                {"id": "good", "name": "G", "handler": "auto", "hook": "task:create", "condition": {"expression": "false"}},
                {"id": "newer", "name": "N", "handler": "auto", "hook": "task:complete", "quorum": 2, "condition": {"expression": "false"}},
                {"id": "elsewhere", "name": "E", "handler": "human", "hook": "moon:rise"},
                {"id": "hookless", "handler": "human"},
            ],
        });
        let settings = Settings::restored(stored.as_object().unwrap());
        assert_eq!(settings.max_retries, 7);
        assert_eq!(
            settings.stale_threshold,
            Settings::default().stale_threshold
        );
        let seen: Vec<(&str, &str, bool)> = settings
            .approval_gates
            .iter()
            .map(|gate| {
                (
                    gate.id.as_str(),
                    gate.hook.as_str(),
                    gate.if_closed(&json!({})).is_some(),
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("good", "task:create", false),
                ("newer", "task:complete", true),
                ("hookless", "task:spawn", true),
            ]
        );
        let nonsense = json!({"approvalGates": "none"});
        let settings = Settings::restored(nonsense.as_object().unwrap());
        assert!(settings.approval_gates[0].if_closed(&json!({})).is_some());
    }
}
