//! Gates: where people must say yes, and the expressions that decide when (contract 2.11).

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::expression::{check_expression, holds};
use super::{Status, Task};

/// Where a gate can stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = GateHook)]
pub enum Hook {
    /// Before a new task may wait for its turn.
    #[serde(rename = "task:create")]
    TaskCreate,
    /// Before an agent begins.
    #[serde(rename = "task:spawn", alias = "task:assign")]
    TaskSpawn,
    /// Before the engine has a task assigned, begun, reviewed or done, and, where an attempt did not succeed, before it is tried again or fails for
    /// good: `data.from` and `data.to` say which.
    #[serde(rename = "task:transition")]
    TaskTransition,
    /// Before a task is done.
    #[serde(rename = "task:complete")]
    TaskComplete,
    /// Before a task fails for good.
    #[serde(rename = "task:fail")]
    TaskFail,
    /// Before a full retry.
    #[serde(rename = "task:retry")]
    TaskRetry,
    /// Before the work is judged.
    #[serde(rename = "assessment:run")]
    AssessmentRun,
    /// After it was judged, before the verdict counts.
    #[serde(rename = "assessment:complete")]
    AssessmentComplete,
    /// Before a run of a mission begins.
    #[serde(rename = "mission:execute")]
    MissionExecute,
    /// Before a run of a mission whose tasks have all ended is over.
    #[serde(rename = "mission:complete")]
    MissionComplete,
    /// Before a mission's quality gate lets go on what it holds back.
    #[serde(rename = "quality:gate")]
    QualityGate,
    /// Before a deadline that has passed takes effect on a task or a mission.
    #[serde(rename = "quality:sla")]
    QualitySla,
    /// Before a schedule begins a run of its mission.
    #[serde(rename = "schedule:trigger")]
    ScheduleTrigger,
}

impl Hook {
    /// The hook of this name.
    pub fn of(name: &str) -> Option<Self> {
        Self::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(name))
            .ok()
    }

    /// Its name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TaskCreate => "task:create",
            Self::TaskSpawn => "task:spawn",
            Self::TaskTransition => "task:transition",
            Self::TaskComplete => "task:complete",
            Self::TaskFail => "task:fail",
            Self::TaskRetry => "task:retry",
            Self::AssessmentRun => "assessment:run",
            Self::AssessmentComplete => "assessment:complete",
            Self::MissionExecute => "mission:execute",
            Self::MissionComplete => "mission:complete",
            Self::QualityGate => "quality:gate",
            Self::QualitySla => "quality:sla",
            Self::ScheduleTrigger => "schedule:trigger",
        }
    }
}

/// Who decides at a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum GateHandler {
    /// The condition alone: where it holds, the way is closed.
    Auto,
    /// A person, where the condition holds or there is none.
    Human,
}

/// What happens to a request that nobody answers in time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ApprovalTimeoutAction)]
pub enum OnTimeout {
    /// As if approved.
    Approve,
    /// The task fails; the mission does not begin, stays where it is, or fails.
    #[default]
    Reject,
}

/// What the database calls them.
pub const ON_TIMEOUT: [(OnTimeout, &str); 2] = [
    (OnTimeout::Approve, "approve"),
    (OnTimeout::Reject, "reject"),
];

/// When a gate is closed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = GateCondition)]
pub struct Condition {
    /// CEL over `data`, `task` and `mission`; true closes the gate.
    #[schema(max_length = 2048)]
    pub expression: String,
}

/// A gate of the project's settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = ApprovalGate)]
pub struct Gate {
    /// Unique among the project's gates.
    pub id: String,
    /// For people to read.
    pub name: String,
    /// Who decides.
    pub handler: GateHandler,
    /// Where it stands.
    pub hook: Hook,
    /// When it is closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub condition: Option<Condition>,
    /// For other systems to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notify_channels: Option<Vec<String>>,
    /// Milliseconds until `timeoutAction`; 0 or absent is never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// What then happens.
    #[serde(default)]
    pub timeout_action: OnTimeout,
    /// Lower ones decide first; 50 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    /// How often a task may be rejected; 3 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_revisions: Option<u32>,
    /// Whether the request shows what the run left behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub include_outcomes: Option<bool>,
}

/// A gate that stands in the way.
#[derive(Debug, Clone)]
pub struct Closed {
    /// Which.
    pub gate: Gate,
    /// Why its condition could not be told, if that is what closed it.
    pub fault: Option<String>,
    /// What its condition has seen beside the task; `None` for a gate of the server's own, which has none and stands at no hook of its own.
    pub data: Option<Value>,
}

impl From<Gate> for Closed {
    fn from(gate: Gate) -> Self {
        Self {
            gate,
            fault: None,
            data: None,
        }
    }
}

/// Rejections of one task when a gate says nothing of it.
const MAX_REVISIONS: u32 = 3;

/// The longest name of a gate, of a channel, or of an agent or a model in a setting, in bytes.
pub(super) const NAME: usize = 200;
/// The longest time that can be set, in milliseconds: a year and a day.
pub const LONGEST_TIME: u64 = 366 * 24 * 60 * 60 * 1000;

/// Checks whom a gate or a level names for others to read.
pub(super) fn check_channels(channels: Option<&[String]>) -> Result<(), String> {
    let channels = channels.unwrap_or_default();
    if channels.len() > 50 || channels.iter().any(|channel| channel.len() > NAME) {
        return Err(format!(
            "`notifyChannels` must be at most 50, of at most {NAME} bytes each."
        ));
    }
    Ok(())
}

impl Gate {
    /// The gate that a person's level of the escalation policy is (contract 2.6.4).
    pub const ESCALATION: &str = "escalation";
    /// The gate of [`Gate::side_effects`].
    pub const SIDE_EFFECTS: &str = "side-effects";

    /// The gate that every task with `sideEffects` passes before it is done.
    pub fn side_effects() -> Self {
        Self {
            id: Self::SIDE_EFFECTS.to_owned(),
            name: "Side effects".to_owned(),
            handler: GateHandler::Human,
            hook: Hook::TaskComplete,
            condition: None,
            notify_channels: None,
            timeout_ms: None,
            timeout_action: OnTimeout::Reject,
            priority: None,
            max_revisions: None,
            include_outcomes: Some(true),
        }
    }

    /// How often a task may be rejected at it.
    pub fn revisions(&self) -> u32 {
        self.max_revisions.unwrap_or(MAX_REVISIONS)
    }

    pub(super) fn check(&self) -> Result<(), String> {
        if self.id.is_empty() || self.name.is_empty() {
            return Err("`id` and `name` must not be empty.".to_owned());
        }
        if [Self::ESCALATION, Self::SIDE_EFFECTS].contains(&self.id.as_str()) {
            return Err(format!(
                "`id` \"{}\" is a gate that there is already.",
                self.id
            ));
        }
        if self.id.len() > NAME || self.name.len() > NAME {
            return Err(format!("`id` and `name` must be at most {NAME} bytes."));
        }
        if self.timeout_ms > Some(LONGEST_TIME) {
            return Err(format!("`timeoutMs` must be at most {LONGEST_TIME}."));
        }
        check_channels(self.notify_channels.as_deref())?;
        match &self.condition {
            None => Ok(()),
            Some(condition) => check_expression(&condition.expression)
                .map_err(|reason| format!("`condition.expression`: {reason}.")),
        }
    }

    /// A gate as it is stored, by whatever version: what cannot be read of it is left out, and closes it for all that it
    /// may have let through. `None` where this version has no such hook.
    pub(super) fn restored(value: &Value) -> Option<Self> {
        if let Ok(gate) = Self::deserialize(value) {
            return Some(gate);
        }
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        let hook = match value.get("hook") {
            Some(hook @ Value::String(_)) => Hook::deserialize(hook).ok()?,
            _ => Hook::TaskSpawn,
        };
        let id = text("id").unwrap_or("unreadable").to_owned();
        tracing::warn!(gate = id, "a stored gate cannot be read: it is closed");
        Some(Self {
            name: text("name").unwrap_or(&id).to_owned(),
            id,
            hook,
            ..Self::side_effects()
        })
    }

    /// This gate if it stands in the way. A condition that cannot be evaluated closes it: better a question too many than an action that
    /// nobody allowed. Whoever is asked is told so.
    pub(super) fn if_closed(&self, context: &Value) -> Option<Closed> {
        let fault = match (&self.condition, self.handler) {
            (None, GateHandler::Human) => None,
            (None, GateHandler::Auto) => return None,
            (Some(condition), _) => match holds(&condition.expression, context) {
                Ok(false) => return None,
                Ok(true) => None,
                Err(reason) => Some(reason),
            },
        };
        Some(Closed {
            gate: self.clone(),
            fault,
            data: context.get("data").cloned(),
        })
    }

    /// The gate that stands in a task's way at a hook, if one does. Conditions see `data` besides the task.
    pub fn closed(gates: &[Self], hook: Hook, task: &Task, data: &Value) -> Option<Closed> {
        let passed = &task.document.passed_gates;
        Self::first_closed(gates, hook, passed, || context(task, hook, data))
    }

    /// The gate that stands in a task's way to another status: at one of the hooks before such a step, the first of them first.
    pub fn closed_at_step(
        gates: &[Self],
        hooks: &[Hook],
        task: &Task,
        (from, to): (Status, Status),
        data: &Value,
    ) -> Option<Closed> {
        if gates.is_empty() {
            return None;
        }
        let mut step = json!({"from": from, "to": to, "agent": task.assign_to});
        if let (Some(step), Some(data)) = (step.as_object_mut(), data.as_object()) {
            step.extend(data.clone());
        }
        hooks
            .iter()
            .find_map(|hook| Self::closed(gates, *hook, task, &step))
    }

    /// The gate that stands in a mission's way at a hook, if one does: none of those in `passed`. `mission` is what conditions see of it.
    pub fn closed_for_mission(
        gates: &[Self],
        hook: Hook,
        passed: &[String],
        mission: &Value,
        data: &Value,
    ) -> Option<Closed> {
        Self::first_closed(
            gates,
            hook,
            passed,
            || json!({"data": data, "task": {}, "mission": mission, "hook": hook.as_str()}),
        )
    }

    fn first_closed(
        gates: &[Self],
        hook: Hook,
        passed: &[String],
        context: impl FnOnce() -> Value,
    ) -> Option<Closed> {
        let mut there: Vec<&Self> = gates
            .iter()
            .filter(|gate| gate.hook == hook && !passed.contains(&gate.id))
            .collect();
        if there.is_empty() {
            return None;
        }
        there.sort_by_key(|gate| gate.priority.unwrap_or(50));
        let seen = context();
        there.into_iter().find_map(|gate| gate.if_closed(&seen))
    }
}

/// What expressions can see of a task.
fn context(task: &Task, hook: Hook, data: &Value) -> Value {
    let mission = task.mission.map_or_else(
        || json!({}),
        |place| json!({"id": place.mission, "group": task.group, "run": place.run}),
    );
    json!({"data": data, "task": task.view(), "mission": mission, "hook": hook.as_str()})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(handler: &str, expression: Option<&str>) -> Gate {
        let condition = expression.map(|expression| json!({"expression": expression}));
        let gate = json!({"id": "g", "name": "G", "handler": handler, "hook": "task:spawn", "condition": condition});
        serde_json::from_value(gate).unwrap()
    }

    #[test]
    fn a_gate_is_closed_where_its_condition_holds_or_cannot_be_told() {
        let context = json!({"data": {"n": 3}, "task": {"priority": 5.0, "title": "Publish it", "tags": ["a"]}, "mission": {}});
        for (handler, expression, closed) in [
            ("human", None, true),
            ("auto", None, false),
            ("human", Some("task.priority > 4.0"), true),
            ("human", Some("task.priority > 5.0"), false),
            ("auto", Some("task.title.startsWith('Publish')"), true),
            ("auto", Some("data.n == 4"), false),
            ("auto", Some("'a' in task.tags"), true),
            ("auto", Some("task.nothing.here == 1"), true),
            ("auto", Some("data.n"), true),
        ] {
            assert_eq!(
                gate(handler, expression).if_closed(&context).is_some(),
                closed,
                "{handler} {expression:?}"
            );
        }
        let fault = |expression| {
            let closed = gate("auto", Some(expression)).if_closed(&context);
            closed.unwrap().fault
        };
        assert_eq!(fault("task.priority > 4.0"), None);
        assert!(fault("task.nothing.here == 1").is_some());
    }
}
