//! Missions as values: what a mission is, how it moves, what its parts have to do with each other, when it runs. No I/O.
//!
//! A [`Mission`]'s status is private: it changes through [`Mission::go`] alone, which leaves its event in the mission, to be
//! stored in the same commit.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use crate::event::Event;
use crate::ids::{self, Id};

mod document;
mod duration;
mod edit;
mod plan;
mod playbook;
mod quality;
mod reader;
mod schedule;
mod status;

pub use document::{
    Barrier, BarrierKind, BarrierList, Document, Gate, MOST_TASKS, Member, TaskDefinition, Team,
};
pub use duration::parse_duration;
pub use edit::EditError;
pub use plan::{Links, Plan};
pub use playbook::{Filled, MOST_PLAYBOOKS, Parameter, ParameterType, Playbook};
pub use quality::{Judgement, TaskEnd, Verdict, mean_score, report};
pub use schedule::{
    CatchUp, Cron, Decision, Overlap, Schedule, SkipReason, Standing, Timing, TimingError,
};
pub use status::{IllegalStep, Status};

/// A mission, without its definition, and what has happened to it since it was read.
#[derive(Debug, Clone)]
pub struct Mission {
    /// Its id.
    pub id: Id<ids::Mission>,
    /// Its name, unique in the project.
    pub name: String,
    /// Why it stands where it does, in a sentence, where that is not plain.
    pub reason: Option<String>,
    /// Runs that were begun.
    pub execution_count: i32,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
    status: Status,
    events: Vec<Event>,
}

impl Mission {
    /// A new draft.
    pub fn new(name: String, now: DateTime<Utc>) -> Self {
        Self {
            id: Id::new(),
            name,
            reason: None,
            execution_count: 0,
            created_at: now,
            updated_at: now,
            status: Status::Draft,
            events: Vec::new(),
        }
    }

    /// The same mission with the status that is stored: for the store alone.
    #[must_use]
    pub fn restored(mut self, status: Status) -> Self {
        self.status = status;
        self
    }

    /// Where it stands.
    pub fn status(&self) -> Status {
        self.status
    }

    /// Takes a step of the table.
    ///
    /// # Errors
    /// When the table does not have it; nothing is changed then.
    pub fn go(&mut self, to: Status, reason: Option<String>) -> Result<(), IllegalStep> {
        let from = self.status;
        if !from.allows(to) {
            return Err(IllegalStep { from, to });
        }
        self.status = to;
        self.reason = reason;
        let told = json!({"name": self.name, "from": from, "to": to, "reason": self.reason});
        self.tell("mission:transition", told);
        Ok(())
    }

    /// Adds what has happened to it. Members that are null are left out.
    pub fn tell(&mut self, name: &'static str, payload: Value) {
        let mut whole = json!({"missionId": self.id});
        if let (Some(whole), Value::Object(members)) = (whole.as_object_mut(), payload) {
            whole.extend(members.into_iter().filter(|(_, value)| !value.is_null()));
        }
        self.events.push(Event::new(name, whole));
    }

    /// Adds that its definition changed.
    pub fn tell_saved(&mut self) {
        let told = json!({"name": self.name, "status": self.status});
        self.tell("mission:saved", told);
    }

    /// Takes what has happened to it, to be stored with it.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }
}

/// The group of a mission's run (contract 2.8.3): its name, with a number from the second on.
pub fn group(name: &str, run: i32) -> String {
    if run <= 1 {
        name.to_owned()
    } else {
        format!("{name} #{run}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_step_changes_and_tells_nothing() {
        let mut mission = Mission::new("m".to_owned(), Utc::now());
        assert!(mission.go(Status::Paused, None).is_err());
        assert_eq!(mission.status(), Status::Draft);
        assert!(mission.take_events().is_empty());
        mission.go(Status::Active, None).unwrap();
        let events = mission.take_events();
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].payload["from"], "draft");
        assert!(!events[0].payload.contains_key("reason"));
    }

    #[test]
    fn the_first_run_has_the_missions_name_and_later_ones_a_number() {
        assert_eq!(
            (group("m", 1), group("m", 2)),
            ("m".to_owned(), "m #2".to_owned())
        );
    }
}
