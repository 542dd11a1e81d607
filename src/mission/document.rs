//! What a mission is made of: its tasks, and what stands between them (contract 2.8.1 to 2.8.6).

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::duration::parse_duration;
use super::reader::Reader;
use crate::event::timestamp;
use crate::task::{
    DEFAULT_THRESHOLD, Expectation, ExpectedOutcome, RetryPolicy, check_expression, refuse_metrics,
};

/// The most tasks of a mission.
pub const MOST_TASKS: usize = 2_000;
/// The most checkpoints, delays or gates of a mission.
const MOST_BARRIERS: usize = 200;
/// The most members of a mission's team.
const MOST_MEMBERS: usize = 50;
/// The longest title or name, in characters.
const NAME: usize = 500;
/// Where the order of the tasks is set, beside the tasks' own addresses.
const REORDER: &str = "reorder";
/// The longest description, in bytes: every event of a task shows it.
const DESCRIPTION: usize = 128 * 1024;
/// The longest prompt, in bytes, and the largest `data`: every task's model reads both.
const CONTEXT: usize = 64 * 1024;

/// A task of a mission before there is one (contract 2.8.2).
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TaskDefinition {
    /// Unique in its mission.
    pub title: String,
    /// The instructions.
    pub description: String,
    /// The agent that does it.
    pub assign_to: String,
    /// Titles of tasks that must be done first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub depends_on: Vec<String>,
    /// What the work must be like.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub expectations: Vec<Expectation>,
    /// What the work must leave behind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_outcomes: Option<Vec<ExpectedOutcome>>,
    /// Full retries; the project's default when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_retries: Option<u32>,
    /// How much it matters; 1 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<f64>,
    /// Whether it touches the outside world.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub side_effects: bool,
    /// The longest run in milliseconds; 0 is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_duration: Option<u64>,
    /// How it changes hands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_policy: Option<RetryPolicy>,
    /// Kept for others to read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notifications: Option<Value>,
}

impl TaskDefinition {
    fn read(mut reader: Reader<'_, '_>) -> Self {
        let description = reader.needed_text("description", usize::MAX);
        if description.len() > DESCRIPTION {
            let what = format!("at most {} KiB", DESCRIPTION / 1024);
            reader.fault("description", &what);
        }
        let expectations = reader.get("expectations").cloned().unwrap_or_default();
        let expectations = Expectation::parse_all(&expectations).unwrap_or_else(|error| {
            reader.fault_as_told(&error);
            Vec::new()
        });
        let outcomes = reader.get("expectedOutcomes").cloned().unwrap_or_default();
        let expected_outcomes = ExpectedOutcome::parse_all(&outcomes).unwrap_or_else(|error| {
            reader.fault_as_told(&error);
            None
        });
        let metrics = reader.get("metrics").cloned().unwrap_or_default();
        if let Err(error) = refuse_metrics(&metrics) {
            reader.fault_as_told(&error);
        }
        let title = reader.needed_text("title", NAME);
        if title == REORDER {
            reader.fault("title", "\"reorder\" is a word of the API: choose another");
        }
        Self {
            title,
            assign_to: reader.needed_text("assignTo", NAME),
            depends_on: reader.texts("dependsOn").unwrap_or_default(),
            max_retries: reader
                .whole("maxRetries", 0, 100)
                .and_then(|retries| u32::try_from(retries).ok()),
            priority: reader.number("priority", -1e6, 1e6),
            side_effects: reader.flag("sideEffects").unwrap_or(false),
            max_duration: reader.whole("maxDuration", 0, u64::from(u32::MAX) * 1_000),
            retry_policy: reader.typed("retryPolicy"),
            notifications: reader.get("notifications").cloned(),
            description,
            expectations,
            expected_outcomes,
        }
    }
}

/// What a barrier does when it is reached.
#[derive(Debug, Clone, PartialEq)]
pub enum BarrierKind {
    /// People look at what there is before it goes on (contract 2.8.4).
    Checkpoint,
    /// It goes on when what there is is good enough (contract 2.8.5).
    Gate(Gate),
    /// It goes on after a while (contract 2.8.6): an ISO 8601 duration.
    Delay(String),
}

/// What a quality gate asks; all of it must hold.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gate {
    /// The least mean score, 1 to 5.
    pub min_score: Option<f64>,
    /// Whether no task may have failed.
    pub require_all_passed: bool,
    /// CEL over scores, outcomes and statuses.
    pub condition: Option<String>,
}

/// Something between tasks: what it follows, and what it holds back.
#[derive(Debug, Clone, PartialEq)]
pub struct Barrier {
    /// Unique among the mission's barriers of its kind.
    pub name: String,
    /// Titles of the tasks that it follows.
    pub after_tasks: Vec<String>,
    /// Titles of the tasks that it holds back.
    pub blocks_tasks: Vec<String>,
    /// What it does.
    pub kind: BarrierKind,
    /// For people to read.
    pub message: Option<String>,
    /// For other systems to read.
    pub notify_channels: Option<Vec<String>>,
}

/// The kinds of barriers, each with the member of the document that lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BarrierList {
    /// `checkpoints`
    Checkpoints,
    /// `qualityGates`
    Gates,
    /// `delays`
    Delays,
}

impl BarrierList {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Checkpoints, Self::Gates, Self::Delays];

    /// The member of the document.
    pub fn member(self) -> &'static str {
        match self {
            Self::Checkpoints => "checkpoints",
            Self::Gates => "qualityGates",
            Self::Delays => "delays",
        }
    }

    /// What one of them is called in sentences.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Checkpoints => "Checkpoint",
            Self::Gates => "Quality gate",
            Self::Delays => "Delay",
        }
    }

    /// The word for one of them in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Checkpoints => "checkpoint",
            Self::Gates => "gate",
            Self::Delays => "delay",
        }
    }
}

impl Barrier {
    /// The list that it stands in.
    pub fn list(&self) -> BarrierList {
        match self.kind {
            BarrierKind::Checkpoint => BarrierList::Checkpoints,
            BarrierKind::Gate(_) => BarrierList::Gates,
            BarrierKind::Delay(_) => BarrierList::Delays,
        }
    }

    /// How long a delay takes.
    pub fn pause(&self) -> Option<Duration> {
        match &self.kind {
            BarrierKind::Delay(text) => parse_duration(text).ok(),
            _ => None,
        }
    }

    fn read(list: BarrierList, mut reader: Reader<'_, '_>) -> Self {
        let kind = match list {
            BarrierList::Checkpoints => BarrierKind::Checkpoint,
            BarrierList::Delays => {
                let text = reader.needed_text("duration", 100);
                if !text.is_empty()
                    && let Err(error) = parse_duration(&text)
                {
                    reader.fault("duration", &error);
                }
                BarrierKind::Delay(text)
            }
            BarrierList::Gates => {
                let gate = Gate {
                    min_score: reader.number("minScore", 1.0, 5.0),
                    require_all_passed: reader.flag("requireAllPassed").unwrap_or(false),
                    condition: reader.text("condition", 2_048),
                };
                if let Some(Err(reason)) = gate.condition.as_deref().map(check_expression) {
                    reader.fault("condition", &reason);
                }
                BarrierKind::Gate(gate)
            }
        };
        let mut titles = |member: &str| {
            let before = reader.get(member).is_some();
            let titles = reader.texts(member).unwrap_or_default();
            if titles.is_empty() {
                let what = if before {
                    "must name at least one task"
                } else {
                    "required"
                };
                reader.fault(member, what);
            }
            titles
        };
        let (after_tasks, blocks_tasks) = (titles("afterTasks"), titles("blocksTasks"));
        Self {
            name: reader.needed_text("name", NAME),
            after_tasks,
            blocks_tasks,
            kind,
            message: reader.text("message", 2_000),
            notify_channels: reader.texts("notifyChannels"),
        }
    }

    /// It as the document has it, and as its list shows it.
    pub fn view(&self) -> Value {
        let mut view = json!({
            "name": self.name, "afterTasks": self.after_tasks, "blocksTasks": self.blocks_tasks,
        });
        match &self.kind {
            BarrierKind::Checkpoint => {}
            BarrierKind::Delay(duration) => view["duration"] = json!(duration),
            BarrierKind::Gate(gate) => {
                if let Some(score) = gate.min_score {
                    view["minScore"] = json!(score);
                }
                if gate.require_all_passed {
                    view["requireAllPassed"] = json!(true);
                }
                if let Some(condition) = &gate.condition {
                    view["condition"] = json!(condition);
                }
            }
        }
        if let Some(message) = &self.message {
            view["message"] = json!(message);
        }
        if let Some(channels) = &self.notify_channels {
            view["notifyChannels"] = json!(channels);
        }
        view
    }

    /// Reads one as [`Barrier::view`] wrote it.
    pub fn of_view(list: BarrierList, view: &Value) -> Option<Self> {
        let mut faults = Vec::new();
        let barrier = Self::read(
            list,
            Reader::new(String::new(), view.as_object()?, &mut faults),
        );
        faults.is_empty().then_some(barrier)
    }
}

/// A member of a mission's team.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// The agent's name.
    pub name: String,
    /// Every other field of the agent.
    pub fields: Map<String, Value>,
}

/// The agents that a mission brings along.
#[derive(Debug, Clone, PartialEq)]
pub struct Team {
    /// What it is called.
    pub name: Option<String>,
    /// Whether its agents go when the mission ends.
    pub volatile: bool,
    /// Its agents.
    pub agents: Vec<Member>,
}

impl Team {
    /// `{name, volatile, agents}`, or a plain list of agents, which is volatile.
    fn read(value: &Value, faults: &mut Vec<String>) -> Option<Self> {
        let listed;
        let members = match value {
            Value::Object(members) => members,
            Value::Array(_) => {
                listed = Map::from_iter([("agents".to_owned(), value.clone())]);
                &listed
            }
            _ => {
                faults
                    .push("team: must be an object with `agents`, or a list of agents".to_owned());
                return None;
            }
        };
        let mut reader = Reader::new("team.".to_owned(), members, faults);
        let name = reader.text("name", NAME);
        let volatile = reader.flag("volatile").unwrap_or(true);
        let objects = reader.objects("agents", MOST_MEMBERS);
        let mut agents: Vec<Member> = Vec::with_capacity(objects.len());
        for (path, object) in objects {
            let mut reader = Reader::new(path, object, faults);
            let name = reader.needed_text("name", 64);
            if agents.iter().any(|other| other.name == name) {
                reader.fault("name", &format!("\"{name}\" occurs twice"));
            }
            let mut fields = object.clone();
            fields.remove("name");
            fields.retain(|_, value| !value.is_null());
            agents.push(Member { name, fields });
        }
        Some(Self {
            name,
            volatile,
            agents,
        })
    }

    fn view(&self) -> Value {
        let agents: Vec<Value> = self
            .agents
            .iter()
            .map(|member| {
                let mut agent = Map::from_iter([("name".to_owned(), json!(member.name))]);
                agent.extend(member.fields.clone());
                Value::Object(agent)
            })
            .collect();
        let mut view = json!({"volatile": self.volatile, "agents": agents});
        if let Some(name) = &self.name {
            view["name"] = json!(name);
        }
        view
    }
}

/// A mission's definition. It was checked when it came in, member by member; [`super::Plan`] checks what its parts
/// have to do with each other.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Document {
    /// The goal, which every agent reads.
    pub prompt: Option<String>,
    /// What every agent is given.
    pub data: Option<Map<String, Value>>,
    /// The tasks, in their order.
    pub tasks: Vec<TaskDefinition>,
    /// The agents that it brings along.
    pub team: Option<Team>,
    /// The least score of its tasks, and of all of it; 3 when absent.
    pub quality_threshold: Option<f64>,
    /// When it must have ended.
    pub deadline: Option<DateTime<Utc>>,
    /// What stands between the tasks.
    pub barriers: Vec<Barrier>,
    /// Kept for others to read.
    pub notifications: Option<Value>,
    /// Whose it is.
    pub user: Option<String>,
}

impl Document {
    /// Reads a definition.
    ///
    /// # Errors
    /// Every fault, each with its place.
    pub fn parse(members: &Map<String, Value>) -> Result<Self, Vec<String>> {
        match Self::read(members) {
            (document, faults) if faults.is_empty() => Ok(document),
            (_, faults) => Err(faults),
        }
    }

    /// Reads as much of a definition as can be read, and every fault of the rest.
    pub(super) fn read(members: &Map<String, Value>) -> (Self, Vec<String>) {
        let mut faults = Vec::new();
        let mut reader = Reader::new(String::new(), members, &mut faults);
        let prompt = reader.text("prompt", usize::MAX);
        if prompt.as_ref().is_some_and(|prompt| prompt.len() > CONTEXT) {
            reader.fault("prompt", &format!("at most {} KiB", CONTEXT / 1024));
        }
        let data = match reader.get("data") {
            None => None,
            Some(Value::Object(data)) => Some(data.clone()),
            Some(_) => {
                reader.fault(
                    "data",
                    "must be an object, or a text that holds a whole mission document",
                );
                None
            }
        };
        if data
            .as_ref()
            .is_some_and(|data| json!(data).to_string().len() > CONTEXT)
        {
            reader.fault("data", &format!("at most {} KiB", CONTEXT / 1024));
        }
        let notifications = reader.get("notifications").cloned();
        if notifications
            .as_ref()
            .is_some_and(|value| !value.is_object())
        {
            reader.fault("notifications", "must be an object with `rules`");
        }
        let mut document = Self {
            prompt,
            data,
            notifications,
            quality_threshold: reader.number("qualityThreshold", 1.0, 5.0),
            deadline: reader.date("deadline"),
            user: reader.text("user", NAME),
            ..Self::default()
        };
        if reader.get("tasks").is_none() {
            reader.fault("tasks", "required");
        }
        let tasks = reader.objects("tasks", MOST_TASKS);
        let lists =
            BarrierList::ALL.map(|list| (list, reader.objects(list.member(), MOST_BARRIERS)));
        let team = reader.get("team");
        for (path, members) in tasks {
            let task = TaskDefinition::read(Reader::new(path, members, &mut faults));
            document.tasks.push(task);
        }
        for (list, barriers) in lists {
            for (path, members) in barriers {
                let barrier = Barrier::read(list, Reader::new(path, members, &mut faults));
                document.barriers.push(barrier);
            }
        }
        document.team = team.and_then(|team| Team::read(team, &mut faults));
        (document, faults)
    }

    /// Puts the members of a document that came as a text in `data` in their places (contract 2.8.1): what stands
    /// beside it goes before what stands in it.
    ///
    /// # Errors
    /// When the text holds no such document.
    pub fn lift(members: &mut Map<String, Value>) -> Result<(), Vec<String>> {
        let Some(Value::String(text)) = members.get("data") else {
            return Ok(());
        };
        match serde_json::from_str::<Value>(text) {
            Ok(Value::Object(inner)) if inner.contains_key("tasks") => {
                members.remove("data");
                for (name, value) in inner {
                    members.entry(name).or_insert(value);
                }
                Ok(())
            }
            Ok(_) => Err(vec![
                "data: a text must hold a mission document with `tasks`".to_owned(),
            ]),
            Err(error) => Err(vec![format!("data: the text is not JSON: {error}")]),
        }
    }

    /// Its members, canonical: what is stored, and what the API shows.
    pub fn members(&self) -> Map<String, Value> {
        let barriers = |list| -> Vec<Value> {
            let of_list = self
                .barriers
                .iter()
                .filter(|barrier| barrier.list() == list);
            of_list.map(Barrier::view).collect()
        };
        let mut members = Map::new();
        let all = [
            ("prompt", json!(self.prompt)),
            ("data", json!(self.data)),
            ("tasks", json!(self.tasks)),
            ("team", json!(self.team.as_ref().map(Team::view))),
            ("qualityThreshold", json!(self.threshold())),
            ("deadline", json!(self.deadline.map(timestamp))),
            ("checkpoints", json!(barriers(BarrierList::Checkpoints))),
            ("qualityGates", json!(barriers(BarrierList::Gates))),
            ("delays", json!(barriers(BarrierList::Delays))),
            ("notifications", json!(self.notifications)),
            ("user", json!(self.user)),
        ];
        for (name, value) in all {
            if !value.is_null() {
                members.insert(name.to_owned(), value);
            }
        }
        members
    }

    /// The least score of its tasks and of all of it.
    pub fn threshold(&self) -> f64 {
        self.quality_threshold.unwrap_or(DEFAULT_THRESHOLD)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: &Value) -> Result<Document, Vec<String>> {
        Document::parse(value.as_object().unwrap())
    }

    #[test]
    fn a_document_reads_back_what_it_writes() {
        let given = json!({
            "prompt": "Publish", "data": {"version": "2.4.0"}, "qualityThreshold": 3.5, "deadline": "2026-04-07T12:00:00.000Z",
            "team": [{"name": "checker", "model": "echo"}],
            "tasks": [
                {"title": "A", "description": "a", "assignTo": "x", "priority": 2, "maxRetries": 1,
                 "expectations": [{"type": "llm_review", "criteria": "c"}]},
                {"title": "B", "description": "b", "assignTo": "checker", "dependsOn": ["A"], "sideEffects": true},
            ],
            "checkpoints": [{"name": "c", "afterTasks": ["A"], "blocksTasks": ["B"], "message": "Look"}],
            "delays": [{"name": "d", "afterTasks": ["A"], "blocksTasks": ["B"], "duration": "PT1M"}],
            "qualityGates": [{"name": "g", "afterTasks": ["A"], "blocksTasks": ["B"], "minScore": 4, "condition": "data.avgScore > 3.0"}],
        });
        let document = parse(&given).unwrap();
        assert!(document.team.as_ref().unwrap().volatile);
        let members = document.members();
        assert_eq!(members["team"]["agents"][0]["model"], "echo");
        assert_eq!(Document::parse(&members), Ok(document));
    }

    #[test]
    fn every_fault_is_reported_with_its_place() {
        let faults = parse(&json!({
            "qualityThreshold": 6, "deadline": "tomorrow", "data": 3, "team": {"agents": [{}]},
            "tasks": [{"title": " ", "description": 3, "maxRetries": -1, "expectations": [{"type": "test"}], "dependsOn": "A"}, 7],
            "checkpoints": [{"name": "c", "blocksTasks": []}],
            "delays": [{"name": "d", "afterTasks": ["a"], "blocksTasks": ["b"], "duration": "soon"}],
            "qualityGates": [{"afterTasks": ["a"], "blocksTasks": ["b"], "condition": "data."}],
        }))
        .unwrap_err();
        for place in [
            "qualityThreshold: ",
            "deadline: ",
            "data: ",
            "team.agents[0].name: required",
            "tasks[0].title: required",
            "tasks[0].description: must be a text",
            "tasks[0].assignTo: required",
            "tasks[0].maxRetries: ",
            "tasks[0].`expectations[0]`: `test`",
            "tasks[0].dependsOn: ",
            "tasks[1]: must be an object",
            "checkpoints[0].afterTasks: required",
            "checkpoints[0].blocksTasks: must name",
            "delays[0].duration: ",
            "qualityGates[0].name: required",
            "qualityGates[0].condition: it is not CEL",
        ] {
            assert!(
                faults.iter().any(|fault| fault.starts_with(place)),
                "{place} is missing in {faults:#?}"
            );
        }
        assert_eq!(faults.len(), 16, "{faults:#?}");
        assert_eq!(parse(&json!({})).unwrap_err(), ["tasks: required"]);
    }

    #[test]
    fn a_document_in_a_text_is_lifted_into_its_places() {
        let inner = json!({"prompt": "inner", "tasks": []}).to_string();
        let mut members = json!({"name": "m", "prompt": "outer", "data": inner});
        let members = members.as_object_mut().unwrap();
        Document::lift(members).unwrap();
        assert_eq!(
            json!(members),
            json!({"name": "m", "prompt": "outer", "tasks": []})
        );
        for text in ["{", "3", "{}"] {
            let mut members = Map::from_iter([("data".to_owned(), json!(text))]);
            assert!(Document::lift(&mut members).is_err(), "{text}");
        }
    }
}
