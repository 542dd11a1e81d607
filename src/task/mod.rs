//! Tasks as values: what a task is, how it moves, and what follows a failure. No I/O.
//!
//! A [`Task`]'s status is private: it changes through [`Task::go`], [`Task::bypass`] and [`Task::retry`] alone, and each change
//! leaves its event in the task, to be stored in the same commit.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::event::{Event, timestamp};
use crate::ids::{self, Id};

mod expectation;
mod expression;
mod gate;
mod policy;
mod review;
mod settings;
mod status;

pub use expectation::{
    Confidence, Dimension, Expectation, ExpectedOutcome, Outcome, OutcomeKind, refuse_metrics,
};
pub use expression::{check_expression, holds};
pub use gate::{Closed, Gate, GateHandler, Hook, LONGEST_TIME, ON_TIMEOUT, OnTimeout};
pub use policy::{Failure, Follow, Level, backoff};
pub use review::{
    Assessment, Check, DEFAULT_THRESHOLD, REVIEWERS, Review, Score, Trigger, answer_schema,
    assessment, default_dimensions, feedback, instructions, judge, material, may_correct_threshold,
    read_answer,
};
pub use settings::{
    Cleanup, Escalation, EscalationLevel, Handler, Settings, SettingsError, Violation,
};
pub use status::{Bypass, IllegalStep, Status};

/// What goes on in a task (contract 2.6.1); absent when nothing does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = TaskPhase)]
pub enum Phase {
    /// The agent works.
    Execution,
    /// Its work is judged.
    Review,
    /// The agent mends its work.
    Fix,
    /// The agent was answered and works on.
    Clarification,
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The agent had said all it wanted to.
    Finished,
    /// It used up its turns.
    MaxTurns,
    /// The task's date passed.
    Deadline,
    /// The run took longer than it may.
    Timeout,
    /// Someone stopped it.
    Killed,
    /// Something broke: `cause` says what.
    Error,
}

/// What the last run came to (contract 2.6.1, design 0.1).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TaskResult {
    /// 0 when the agent finished, else 1.
    pub exit_code: i32,
    /// The text of its last answer.
    pub stdout: String,
    /// What went wrong, in a sentence.
    pub stderr: String,
    /// Milliseconds from the run's start to its end.
    pub duration: i64,
    /// Why it ended.
    pub reason: EndReason,
    /// What broke, as the provider or the engine told it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// How it was judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Assessment>)]
    pub assessment: Option<Value>,
    /// How it was judged before, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<Assessment>)]
    pub assessment_history: Vec<Value>,
}

impl TaskResult {
    /// The result of work that ended without an answer; the assessments of earlier work are kept.
    pub fn without_answer(
        reason: EndReason,
        sentence: &str,
        cause: Option<String>,
        before: Option<Self>,
    ) -> Self {
        Self {
            exit_code: 1,
            stdout: String::new(),
            stderr: sentence.to_owned(),
            duration: 0,
            reason,
            cause,
            assessment: None,
            assessment_history: Self::history(before),
        }
    }

    /// The assessments of earlier work, oldest first, as far as they are kept.
    pub fn history(before: Option<Self>) -> Vec<Value> {
        before
            .map(|mut before| {
                let newest = before.assessment.take();
                before.remember(newest);
                before.assessment_history
            })
            .unwrap_or_default()
    }

    /// Adds assessments to those of earlier work, and forgets what is not kept of them.
    pub fn remember(&mut self, assessments: impl IntoIterator<Item = Value>) {
        let history = &mut self.assessment_history;
        history.extend(assessments);
        let forgotten = history.len().saturating_sub(MOST_ASSESSMENTS);
        history.drain(..forgotten);
        let brief = history.len().saturating_sub(WHOLE_ASSESSMENTS);
        for assessment in &mut history[..brief] {
            review::leave_texts_out(assessment);
        }
    }
}

/// The most assessments of earlier work that a task keeps: the newest. Of all but the newest [`WHOLE_ASSESSMENTS`] it keeps the scores, without
/// what the reviewers wrote. Every event that shows the task carries all of this, and whoever likes has work judged again as often as they like.
const MOST_ASSESSMENTS: usize = 20;
/// How many of them are kept with what the reviewers wrote.
const WHOLE_ASSESSMENTS: usize = 3;

/// What was wrong with an attempt, in a sentence, by what the next is to make of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wrong {
    /// Its work was not good enough.
    Work(String),
    /// It came to a limit before its work was finished.
    Limit(String),
    /// Its provider failed, or the server, or the reviewers: nothing that the next could do better.
    Surroundings(String),
}

impl Wrong {
    /// The sentence.
    pub fn sentence(&self) -> &str {
        match self {
            Self::Work(sentence) | Self::Limit(sentence) | Self::Surroundings(sentence) => sentence,
        }
    }
}

/// How a task changes hands when it fails (contract 2.6.4).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetryPolicy {
    /// From this attempt on it is someone else's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub escalate_after: Option<u32>,
    /// Whose; the agent's `reportsTo` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback_agent: Option<String>,
    /// The model that escalated attempts run with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub escalate_model: Option<String>,
}

/// How deep JSON may be nested that is stored. What is stored stands some levels deeper than it came, and all of it must be read again: the parser
/// stops at 128.
pub const DEEPEST: usize = 64;

/// Whether JSON text is nested more than `most` deep. Of what is no JSON it says something or other.
pub fn is_deeper_than(text: &[u8], most: usize) -> bool {
    let (mut depth, mut quoted, mut escaped) = (0_usize, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'[' | b'{' if !quoted => {
                depth += 1;
                if depth > most {
                    return true;
                }
            }
            b']' | b'}' if !quoted => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

/// The beginning of a text that a model is to read, of at most `most` bytes, and that it was cut if it was.
pub fn cut(mut text: String, most: usize) -> String {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most));
        text.push_str("\n[cut here: it is longer]");
    }
    text
}

/// Reads a value as something that is shown as it is written. Serde takes a list of an object's members for the object; callers do not mean it.
///
/// # Errors
/// What is wrong with it; ends a sentence.
pub fn read_as_shown<T: Serialize + serde::de::DeserializeOwned>(
    value: &Value,
) -> Result<T, String> {
    fn is_alike(given: &Value, read: &Value) -> bool {
        match (given, read) {
            (Value::Array(_), Value::Object(_)) => false,
            (Value::Array(given), Value::Array(read)) => given
                .iter()
                .zip(read)
                .all(|(given, read)| is_alike(given, read)),
            (Value::Object(given), Value::Object(read)) => given
                .iter()
                .all(|(member, given)| read.get(member).is_none_or(|read| is_alike(given, read))),
            _ => true,
        }
    }
    let read = T::deserialize(value).map_err(|error| error.to_string())?;
    if !is_alike(value, &json!(read)) {
        return Err("a list stands where an object belongs".to_owned());
    }
    Ok(read)
}

/// Everything of a task that nothing searches for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Document {
    /// The instructions as they stand.
    pub description: String,
    /// The instructions before the first rewrite.
    pub original_description: Option<String>,
    /// What goes on.
    pub phase: Option<Phase>,
    /// Titles or ids, as they were given.
    pub depends_on: Vec<String>,
    /// What the work must be like.
    #[serde(with = "stored_expectations")]
    pub expectations: Vec<Expectation>,
    /// What the work must leave behind.
    pub expected_outcomes: Option<Vec<ExpectedOutcome>>,
    /// How much it matters: higher runs first.
    pub priority: f64,
    /// Full retries before it fails.
    pub max_retries: u32,
    /// Full retries used.
    pub retries: u32,
    /// Attempts to mend since the last full retry.
    pub fix_attempts: u32,
    /// Questions answered.
    pub question_rounds: u32,
    /// Verdicts on it as a blocked task.
    pub resolution_attempts: u32,
    /// Defects of the engine in a row.
    pub defects: u32,
    /// Rejections by people.
    pub revision_count: u32,
    /// Whether it touches the outside world.
    pub side_effects: bool,
    /// The longest that one run may take, in milliseconds; 0 is no limit, absent the project's.
    pub max_duration: Option<u64>,
    /// How it changes hands.
    pub retry_policy: Option<RetryPolicy>,
    /// When it must be done.
    pub deadline: Option<DateTime<Utc>>,
    /// Members that are kept for others to read: `notifications`, `user`, `loop`, ….
    pub extras: Map<String, Value>,
    /// What the run left behind.
    pub outcomes: Vec<Outcome>,
    /// The transcript of the last run.
    pub session: Option<Id<ids::Session>>,
    /// What the last run came to.
    pub result: Option<TaskResult>,
    /// What the next run is told of the attempts before it.
    pub feedback: Option<String>,
    /// Whether that is about an attempt that came to a limit, and not about its work.
    pub at_limit: bool,
    /// What its next assessment is called.
    pub trigger: Option<String>,
    /// The model that it runs with in place of its agent's.
    pub model: Option<String>,
    /// The level of the escalation policy that it has reached.
    pub escalation_level: Option<u32>,
    /// Gates that let it through in this attempt.
    pub passed_gates: Vec<String>,
    /// Whether the last answer may be a question.
    pub may_be_question: bool,
    /// Whether a level of the escalation policy is still to act.
    pub escalation_owed: bool,
    /// Whether people were warned of its deadline, and told that it passed.
    pub sla_warned: bool,
    /// See `sla_warned`.
    pub sla_violated: bool,
}

mod stored_expectations {
    //! What is stored was checked when it came in.
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Expectation;

    pub(super) fn serialize<S: Serializer>(
        expectations: &[Expectation],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        expectations.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Expectation>, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        Expectation::parse_all(&value).map_err(D::Error::custom)
    }
}

/// The events that show the whole task.
const SHOWN_IN: [&str; 4] = [
    "task:created",
    "task:updated",
    "task:transition",
    "task:completed",
];

/// The run of a mission that a task belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// The mission.
    pub mission: Id<ids::Mission>,
    /// The number of its run, from 1.
    pub run: i32,
}

/// A task, and what has happened to it since it was read.
#[derive(Debug, Clone)]
pub struct Task {
    /// Its id.
    pub id: Id<ids::Task>,
    /// What it is called.
    pub title: String,
    /// The agent that works on it.
    pub assign_to: String,
    /// Whether it is paused.
    pub held: bool,
    /// A label that it shares with others.
    pub group: Option<String>,
    /// The mission that it belongs to.
    pub mission: Option<Place>,
    /// Its last run.
    pub run: Option<Id<ids::Run>>,
    /// The rest.
    pub document: Document,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
    status: Status,
    /// Where it stood when it was read.
    was: Status,
    /// The agent whose place it had or waited for when it was read.
    was_with: Option<String>,
    events: Vec<Event>,
}

impl Task {
    /// A new task. It begins as a draft; [`Task::go`] makes it pending.
    pub fn new(title: String, assign_to: String, document: Document, now: DateTime<Utc>) -> Self {
        Self {
            id: Id::new(),
            title,
            assign_to,
            held: false,
            group: None,
            mission: None,
            run: None,
            document,
            created_at: now,
            updated_at: now,
            status: Status::Draft,
            was: Status::Draft,
            was_with: None,
            events: Vec::new(),
        }
    }

    /// The same task with the status that is stored: for the store alone.
    #[must_use]
    pub fn restored(mut self, status: Status) -> Self {
        self.status = status;
        self.was = status;
        let waits = status == Status::Pending && !self.held;
        self.was_with = (waits || status.is_active()).then(|| self.assign_to.clone());
        self
    }

    /// The agent whose place it had or waited for when it was read, and does so no more: someone else may have it.
    pub fn left_agent(&self) -> Option<&str> {
        let agent = self.was_with.as_deref()?;
        let waits = self.status == Status::Pending && !self.held && self.assign_to == agent;
        let stays = self.status.is_active() || (waits && !self.was.is_active());
        (!stays).then_some(agent)
    }

    /// Whether it had ended when it was read, and has been taken up again.
    pub fn was_taken_up_again(&self) -> bool {
        self.was.is_terminal() && !self.status.is_terminal()
    }

    /// Where it stands.
    pub fn status(&self) -> Status {
        self.status
    }

    /// Takes what has happened to it, to be stored with it. Those that show the task show it as it is stored, but for where it stood on the
    /// way there.
    pub fn take_events(&mut self) -> Vec<Event> {
        let mut events = std::mem::take(&mut self.events);
        let mut shown = events
            .iter_mut()
            .filter(|event| SHOWN_IN.contains(&event.name));
        let Some(first) = shown.next() else {
            return events;
        };
        let view = self.view();
        for event in std::iter::once(first).chain(shown) {
            let mut view = view.clone();
            if let Some(to) = event.payload.get("to") {
                view["status"] = to.clone();
            }
            event.payload.insert("task".to_owned(), view);
        }
        events
    }

    /// Adds what has happened to it.
    pub fn tell(&mut self, name: &'static str, payload: Value) {
        let mut whole = json!({"taskId": self.id});
        if let (Some(whole), Value::Object(members)) = (whole.as_object_mut(), payload) {
            whole.extend(members);
        }
        self.events.push(Event::new(name, whole));
    }

    /// Tells of a new task. It comes into being where it stands: it has not moved.
    pub fn tell_created(&mut self) {
        self.events.clear();
        self.tell("task:created", json!({}));
    }

    /// Adds the event that a field changed.
    pub fn tell_updated(&mut self) {
        self.tell("task:updated", json!({}));
    }

    /// Takes a step of the table.
    ///
    /// # Errors
    /// When the table does not have it; nothing is changed then.
    pub fn go(&mut self, to: Status) -> Result<(), IllegalStep> {
        let from = self.status;
        if !from.allows(to) {
            return Err(IllegalStep { from, to });
        }
        if (from, to) == (Status::Failed, Status::Pending) {
            self.document.retries += 1;
        }
        self.enter(to);
        Ok(())
    }

    /// Takes one of the engine's own ways. False when it does not apply from here, and nothing is changed.
    pub fn bypass(&mut self, bypass: Bypass) -> bool {
        match bypass.from(self.status) {
            Some(to) => {
                self.enter(to);
                true
            }
            None => false,
        }
    }

    /// Ends this attempt and begins the next: `failed` and on to `pending`, told as one change, because
    /// between two attempts a task is pending (design 0.1).
    ///
    /// # Errors
    /// When the task cannot fail from here.
    pub fn retry(&mut self) -> Result<(), IllegalStep> {
        let from = self.status;
        if from != Status::Failed && !from.allows(Status::Failed) {
            return Err(IllegalStep {
                from,
                to: Status::Failed,
            });
        }
        self.document.retries += 1;
        self.enter(Status::Pending);
        Ok(())
    }

    /// A passing second assessment of failed work: through every state to `done`, each told (contract 2.6.6).
    pub fn redeem(&mut self) -> bool {
        if self.status != Status::Failed {
            return false;
        }
        self.document.retries += 1;
        if let Some(result) = &mut self.document.result {
            // It says no more why the work was not good.
            result.stderr.clear();
            result.cause = None;
        }
        for status in [
            Status::Pending,
            Status::Assigned,
            Status::InProgress,
            Status::Review,
            Status::Done,
        ] {
            self.enter(status);
        }
        true
    }

    fn enter(&mut self, to: Status) {
        let from = std::mem::replace(&mut self.status, to);
        if to.is_terminal() {
            self.document.phase = None;
            self.held = false;
        }
        let payload = json!({"from": from, "to": to, "agentName": self.assign_to});
        self.tell("task:transition", payload);
        if to == Status::Done {
            // What was wrong on the way is no part of the task.
            self.document.feedback = None;
            let payload = json!({"status": to, "agentName": self.assign_to});
            self.tell("task:completed", payload);
        }
    }

    /// What its agent is told to do: the description, and what was wrong with the attempt before (contract 2.6.4).
    pub fn instructions(&self) -> String {
        let description = &self.document.description;
        match &self.document.feedback {
            None => description.clone(),
            Some(feedback) if self.document.at_limit => {
                format!(
                    "{description}\n\nAn earlier attempt came to a limit before it was finished: {feedback}"
                )
            }
            Some(feedback) => {
                format!("{description}\n\nAn earlier attempt was not good enough: {feedback}")
            }
        }
    }

    /// Has the next attempt told what was wrong with this one. Where that was none of the agent's doing it is told what it would have been
    /// told before.
    pub fn learn(&mut self, wrong: &Wrong) {
        let (feedback, at_limit) = match wrong {
            Wrong::Work(sentence) => (sentence, false),
            Wrong::Limit(sentence) => (sentence, true),
            Wrong::Surroundings(_) => return,
        };
        self.document.feedback = Some(feedback.clone());
        self.document.at_limit = at_limit;
    }

    /// Why its last attempt failed, in a sentence: a run that broke says it itself, and of work what its agent is told.
    pub fn trouble(&self) -> &str {
        let result = self.document.result.as_ref();
        let broke = result.filter(|result| result.exit_code != 0 && !result.stderr.is_empty());
        broke
            .map(|result| result.stderr.as_str())
            .or(self.document.feedback.as_deref())
            .unwrap_or_default()
    }

    /// Whether reviewers were asked about its work and none gave a verdict that it failed by.
    pub fn is_unjudged(&self) -> bool {
        let result = self.document.result.as_ref();
        let verdict = result.and_then(|result| result.assessment.as_ref());
        verdict.is_some_and(review::says_nothing)
    }

    /// Replaces the instructions; the first ones are kept.
    pub fn rewrite(&mut self, description: String) {
        let before = std::mem::replace(&mut self.document.description, description);
        self.document.original_description.get_or_insert(before);
    }

    /// The task as the API shows it (contract 2.6.1).
    pub fn view(&self) -> Value {
        let document = &self.document;
        let mut view = json!({
            "id": self.id,
            "title": self.title,
            "description": self.instructions(),
            "assignTo": self.assign_to,
            "status": self.status,
            "priority": document.priority,
            "dependsOn": document.depends_on,
            "expectations": document.expectations,
            "metrics": [],
            "retries": document.retries,
            "maxRetries": document.max_retries,
            "fixAttempts": document.fix_attempts,
            "questionRounds": document.question_rounds,
            "resolutionAttempts": document.resolution_attempts,
            "revisionCount": document.revision_count,
            "sideEffects": document.side_effects,
            "outcomes": document.outcomes,
        });
        let first = document.feedback.is_some().then_some(&document.description);
        let original = document.original_description.as_ref().or(first);
        let optional = [
            ("phase", json!(document.phase)),
            ("group", json!(self.group)),
            ("missionId", json!(self.mission.map(|place| place.mission))),
            ("originalDescription", json!(original)),
            ("expectedOutcomes", json!(document.expected_outcomes)),
            ("maxDuration", json!(document.max_duration)),
            ("retryPolicy", json!(document.retry_policy)),
            ("deadline", json!(document.deadline.map(timestamp))),
            ("runId", json!(self.run)),
            ("sessionId", json!(document.session)),
            ("result", json!(document.result)),
        ];
        let members = view.as_object_mut().expect("it was made as an object");
        for (key, value) in optional {
            if !value.is_null() {
                members.insert(key.to_owned(), value);
            }
        }
        if self.held {
            members.insert("held".to_owned(), json!(true));
        }
        for (key, value) in &document.extras {
            members.entry(key.clone()).or_insert_with(|| value.clone());
        }
        members.insert("createdAt".to_owned(), json!(timestamp(self.created_at)));
        members.insert("updatedAt".to_owned(), json!(timestamp(self.updated_at)));
        view
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn task() -> Task {
        Task::new(
            "t".to_owned(),
            "a".to_owned(),
            Document::default(),
            Utc::now(),
        )
    }

    #[derive(Debug, Clone, Copy)]
    enum Act {
        Go(Status),
        Bypass(Bypass),
        Retry,
        Redeem,
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let bypasses = [
            Bypass::Fix,
            Bypass::Answered,
            Bypass::Released,
            Bypass::Escalated,
            Bypass::HandedToPerson,
            Bypass::ReassessedBadly,
            Bypass::Stopped,
            Bypass::GatedAtCreation,
        ];
        let act = prop_oneof![
            6 => prop::sample::select(Status::ALL.to_vec()).prop_map(Act::Go),
            2 => prop::sample::select(bypasses.to_vec()).prop_map(Act::Bypass),
            1 => Just(Act::Retry),
            1 => Just(Act::Redeem),
        ];
        prop::collection::vec(act, 0..60)
    }

    proptest! {
        /// Whatever is tried: every change is told once and follows the one before, only retries count as
        /// retries, and a refused step changes nothing.
        #[test]
        fn no_history_breaks_the_machine(acts in acts()) {
            let mut task = task();
            let mut told = Status::Draft;
            for act in acts {
                let (before, retries) = (task.status(), task.document.retries);
                let (took, counts) = match act {
                    Act::Go(to) => (task.go(to).is_ok(), before == Status::Failed),
                    Act::Bypass(bypass) => (task.bypass(bypass), false),
                    Act::Retry => (task.retry().is_ok(), true),
                    Act::Redeem => (task.redeem(), true),
                };
                prop_assert_eq!(task.document.retries, retries + u32::from(took && counts));
                let events = task.take_events();
                let changes: Vec<&Event> = events.iter().filter(|event| event.name == "task:transition").collect();
                prop_assert_eq!(!changes.is_empty(), took);
                prop_assert!(changes.len() <= 1 || matches!(act, Act::Redeem));
                for change in changes {
                    prop_assert_eq!(&change.payload["from"], told.as_str());
                    prop_assert_eq!(&change.payload["task"]["status"], &change.payload["to"]);
                    told = Status::of(change.payload["to"].as_str().unwrap()).unwrap();
                }
                prop_assert_eq!(task.status(), told);
                if !took {
                    prop_assert_eq!(task.status(), before);
                }
                let completed = events.iter().any(|event| event.name == "task:completed");
                prop_assert_eq!(completed, took && task.status() == Status::Done);
                if task.status().is_terminal() {
                    prop_assert!(task.document.phase.is_none());
                }
            }
        }
    }

    #[test]
    fn depth_is_counted_outside_of_texts() {
        for (text, depth) in [
            ("7", 0),
            ("[[], {}]", 2),
            (r#"{"a[[[": "\"[[[", "b": [1]}"#, 2),
        ] {
            assert!(
                depth == 0 || is_deeper_than(text.as_bytes(), depth - 1),
                "{text}"
            );
            assert!(!is_deeper_than(text.as_bytes(), depth), "{text}");
        }
    }

    #[test]
    fn done_is_left_only_by_a_bad_reassessment() {
        for to in Status::ALL {
            assert!(!Status::Done.allows(to));
        }
        let mut task = task().restored(Status::Done);
        assert!(task.retry().is_err() && !task.bypass(Bypass::Stopped));
        assert!(task.bypass(Bypass::ReassessedBadly));
        assert_eq!(task.status(), Status::Failed);
    }

    #[test]
    fn a_place_is_left_by_whoever_had_it_or_waits_for_it_no_more() {
        let read = |status| task().restored(status);
        let mut waiting = read(Status::Pending);
        assert_eq!(waiting.left_agent(), None);
        waiting.assign_to = "b".to_owned();
        assert_eq!(waiting.left_agent(), Some("a"));
        let mut paused = read(Status::Pending);
        paused.held = true;
        assert_eq!(paused.left_agent(), Some("a"));
        let mut begun = read(Status::Pending);
        begun.go(Status::Assigned).unwrap();
        assert_eq!(begun.left_agent(), None);
        let mut retried = read(Status::InProgress);
        assert_eq!(retried.left_agent(), None);
        retried.retry().unwrap();
        retried.assign_to = "b".to_owned();
        assert_eq!(retried.left_agent(), Some("a"));
        assert_eq!(read(Status::AwaitingApproval).left_agent(), None);
    }

    #[test]
    fn the_first_description_is_kept_through_every_rewrite() {
        let mut task = task();
        task.document.description = "one".to_owned();
        task.rewrite("two".to_owned());
        task.rewrite("three".to_owned());
        assert_eq!(task.document.original_description.as_deref(), Some("one"));
        assert_eq!(task.view()["description"], "three");
        task.document.feedback = Some("too long".to_owned());
        let view = task.view();
        assert_eq!(view["originalDescription"], "one");
        let told = view["description"].as_str().unwrap();
        assert!(told.starts_with("three\n\n") && told.ends_with("too long"));
    }
}
