//! The status machine of a task (contract 2.6.2): the one place where a status changes.

use serde::{Deserialize, Serialize};

/// Where a task stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = TaskStatus)]
pub enum Status {
    /// Not to be worked on yet.
    Draft,
    /// Waits for its turn, its needs, or its next attempt.
    Pending,
    /// Waits for a person.
    AwaitingApproval,
    /// An agent has it.
    Assigned,
    /// The agent works on it.
    InProgress,
    /// What the agent did is being judged.
    Review,
    /// Finished, for good unless it is assessed again.
    Done,
    /// Given up, unless it is retried by hand.
    Failed,
}

impl Status {
    /// All of them, in the order of a task's life.
    pub const ALL: [Self; 8] = [
        Self::Draft,
        Self::Pending,
        Self::AwaitingApproval,
        Self::Assigned,
        Self::InProgress,
        Self::Review,
        Self::Done,
        Self::Failed,
    ];

    /// The word for it on the wire and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Draft => "draft",
            Self::Pending => "pending",
            Self::AwaitingApproval => "awaiting_approval",
            Self::Assigned => "assigned",
            Self::InProgress => "in_progress",
            Self::Review => "review",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }

    /// The status with this word.
    pub fn of(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == word)
    }

    /// Whether nothing more happens by itself.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Done | Self::Failed)
    }

    /// Whether an agent is at it.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Assigned | Self::InProgress | Self::Review)
    }

    /// The table of contract 2.6.2.
    pub fn allows(self, to: Self) -> bool {
        use Status::{
            Assigned, AwaitingApproval, Done, Draft, Failed, InProgress, Pending, Review,
        };
        matches!(
            (self, to),
            (Draft | Failed, Pending)
                | (Pending, Assigned | AwaitingApproval)
                | (AwaitingApproval, Assigned | Pending | Done | Failed)
                | (Assigned, InProgress | AwaitingApproval)
                | (InProgress, Review | Failed | AwaitingApproval)
                | (Review, Done | Failed | AwaitingApproval)
        )
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A step that the machine does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a task cannot go from `{from}` to `{to}`")]
pub struct IllegalStep {
    /// Where it stands.
    pub from: Status,
    /// Where it was to go.
    pub to: Status,
}

/// The engine's own ways around the table; none of them counts as a retry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bypass {
    /// The review failed and the agent is to mend its work.
    Fix,
    /// The agent asked instead of working, and was answered.
    Answered,
    /// It is held, or its process ended before its agent began: it waits again.
    Released,
    /// Its retries are used up, and someone else is to try.
    Escalated,
    /// Its retries are used up, and a person is to look at it.
    HandedToPerson,
    /// A second assessment of finished work failed.
    ReassessedBadly,
    /// Its deadline has passed, it was killed, or it can never begin.
    Stopped,
    /// A gate stands before its creation.
    GatedAtCreation,
}

impl Bypass {
    /// Where it leads from there; `None` where it does not apply.
    pub(super) fn from(self, status: Status) -> Option<Status> {
        use Status::{AwaitingApproval, Done, Draft, Failed, Pending, Review};
        match self {
            Self::Fix | Self::Answered => (status == Review).then_some(Pending),
            Self::Released => status.is_active().then_some(Pending),
            Self::Escalated => (status != Done && status != Draft).then_some(Pending),
            Self::HandedToPerson => (status != Done && status != Draft).then_some(AwaitingApproval),
            Self::ReassessedBadly => (status == Done).then_some(Failed),
            Self::Stopped => (!status.is_terminal()).then_some(Failed),
            Self::GatedAtCreation => (status == Draft).then_some(AwaitingApproval),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_contracts() {
        let table = [
            ("draft", vec!["pending"]),
            ("pending", vec!["assigned", "awaiting_approval"]),
            (
                "awaiting_approval",
                vec!["assigned", "pending", "done", "failed"],
            ),
            ("assigned", vec!["in_progress", "awaiting_approval"]),
            ("in_progress", vec!["review", "failed", "awaiting_approval"]),
            ("review", vec!["done", "failed", "awaiting_approval"]),
            ("done", vec![]),
            ("failed", vec!["pending"]),
        ];
        for (from, allowed) in table {
            let from = Status::of(from).unwrap();
            for to in Status::ALL {
                assert_eq!(
                    from.allows(to),
                    allowed.contains(&to.as_str()),
                    "{from} {to}"
                );
            }
        }
    }

    #[test]
    fn a_status_reads_back_what_it_writes() {
        for status in Status::ALL {
            assert_eq!(Status::of(status.as_str()), Some(status));
            assert_eq!(serde_json::json!(status), status.as_str());
        }
        assert_eq!(Status::of("active"), None);
    }
}
