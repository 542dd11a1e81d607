//! The status machine of a mission (contract 2.8.8).

use serde::{Deserialize, Serialize};

/// Where a mission stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = MissionStatus)]
pub enum Status {
    /// Begins when it is executed.
    Draft,
    /// Begins once, at a date.
    Scheduled,
    /// Begins again and again.
    Recurring,
    /// Its tasks are under way.
    Active,
    /// Nothing of it begins until it is resumed.
    Paused,
    /// Its last run came to what it should.
    Completed,
    /// Its last run did not.
    Failed,
    /// It was called off.
    Cancelled,
}

impl Status {
    /// All of them, in the order of a mission's life.
    pub const ALL: [Self; 8] = [
        Self::Draft,
        Self::Scheduled,
        Self::Recurring,
        Self::Active,
        Self::Paused,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
    ];

    /// The word for it on the wire and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Draft => "draft",
            Self::Scheduled => "scheduled",
            Self::Recurring => "recurring",
            Self::Active => "active",
            Self::Paused => "paused",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The status with this word.
    pub fn of(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == word)
    }

    /// Whether a run of it is under way.
    pub fn is_running(self) -> bool {
        matches!(self, Self::Active | Self::Paused)
    }

    /// Whether a run can begin (contract 2.8.3).
    pub fn can_execute(self) -> bool {
        self.allows(Self::Active) && self != Self::Paused
    }

    /// The steps there are. Beside the table of contract 2.8.8: a run may end while it is paused (a deadline, tasks failed by
    /// hand); schedules come and go with any mission that does not run; and what has ended can be made a draft again.
    pub fn allows(self, to: Self) -> bool {
        use Status::{Active, Cancelled, Completed, Draft, Failed, Paused, Recurring, Scheduled};
        match self {
            Draft => matches!(to, Scheduled | Recurring | Active),
            Scheduled | Recurring => {
                matches!(
                    to,
                    Draft | Scheduled | Recurring | Active | Completed | Failed | Cancelled
                ) && self != to
            }
            Active => matches!(
                to,
                Paused | Completed | Failed | Recurring | Scheduled | Cancelled
            ),
            Paused => matches!(
                to,
                Active | Completed | Failed | Recurring | Scheduled | Cancelled
            ),
            Completed => matches!(to, Draft | Scheduled | Recurring),
            Failed | Cancelled => matches!(to, Draft | Scheduled | Recurring | Active),
        }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A step that the machine does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a mission cannot go from `{from}` to `{to}`")]
pub struct IllegalStep {
    /// Where it stands.
    pub from: Status,
    /// Where it was to go.
    pub to: Status,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_of_the_contract_are_there() {
        use Status::{Active, Cancelled, Completed, Draft, Failed, Paused, Recurring, Scheduled};
        for (from, to) in [
            (Draft, Scheduled),
            (Draft, Recurring),
            (Draft, Active),
            (Failed, Active),
            (Cancelled, Active),
            (Scheduled, Active),
            (Recurring, Active),
            (Scheduled, Draft),
            (Recurring, Draft),
            (Scheduled, Completed),
            (Recurring, Completed),
            (Active, Paused),
            (Paused, Active),
            (Active, Completed),
            (Active, Failed),
            (Active, Recurring),
            (Active, Scheduled),
            (Active, Cancelled),
            (Paused, Cancelled),
        ] {
            assert!(from.allows(to), "{from} {to}");
        }
    }

    #[test]
    fn only_what_has_not_begun_or_went_wrong_can_be_executed() {
        for status in Status::ALL {
            let can = matches!(
                status,
                Status::Draft
                    | Status::Scheduled
                    | Status::Recurring
                    | Status::Failed
                    | Status::Cancelled
            );
            assert_eq!(status.can_execute(), can, "{status}");
            assert!(!status.allows(status), "{status}");
            assert_eq!(Status::of(status.as_str()), Some(status));
        }
    }
}
