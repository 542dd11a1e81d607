//! Names of things: prefixed, time-ordered, and typed.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

/// The unique name of one thing, printed as `agt_0197f4c2d0a97c1e…`.
///
/// A UUID of version 7 inside, so ids sort by creation and serve as page cursors.
/// `Id<Agent>` and `Id<Session>` are different types: they cannot be swapped by accident.
pub struct Id<K>(Uuid, PhantomData<fn() -> K>);

/// What an [`Id`] can name, with the prefix it is printed with.
pub trait Kind {
    /// The letters before the underscore.
    const PREFIX: &'static str;
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal,)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub enum $name {}
        impl Kind for $name { const PREFIX: &'static str = $prefix; }
    )*};
}

kinds! {
    /// An agent of a project.
    Agent = "agt",
    /// A conversation with an agent.
    Session = "sess",
    /// One message of a session.
    Message = "msg",
    /// One turn of the agent loop.
    Run = "run",
    /// A task.
    Task = "task",
    /// A mission.
    Mission = "msn",
    /// A mission's schedule.
    Schedule = "sch",
    /// What stands between tasks of a mission's run.
    Barrier = "bar",
    /// A request for a person's yes.
    Approval = "apr",
    /// What a run left behind.
    Outcome = "out",
    /// Another system that is told of events.
    Webhook = "wh",
    /// An event on its way to a webhook.
    Delivery = "whd",
}

/// The text is not an id of the expected kind.
///
/// Callers answer it as they answer an id that does not exist: 404.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an id of this kind")]
pub struct InvalidId;

impl<K> Id<K> {
    /// A new id, later than every id this process made before.
    #[expect(
        clippy::new_without_default,
        reason = "a default id would be a random one"
    )]
    pub fn new() -> Self {
        Self(Uuid::now_v7(), PhantomData)
    }

    /// The id as the database stores it.
    pub fn uuid(self) -> Uuid {
        self.0
    }
}

impl<K> From<Uuid> for Id<K> {
    fn from(uuid: Uuid) -> Self {
        Self(uuid, PhantomData)
    }
}

impl From<Id<Run>> for Id<Session> {
    /// The transcript of a task's run goes by the run's own id.
    fn from(run: Id<Run>) -> Self {
        run.0.into()
    }
}

impl From<Id<Session>> for Id<Run> {
    /// The run whose transcript it would be.
    fn from(session: Id<Session>) -> Self {
        session.0.into()
    }
}

impl<K: Kind> FromStr for Id<K> {
    type Err = InvalidId;

    /// Reads only the form that [`fmt::Display`] writes, so one thing has one spelling.
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let hex = text
            .strip_prefix(K::PREFIX)
            .and_then(|rest| rest.strip_prefix('_'))
            .filter(|hex| hex.len() == 32 && !hex.bytes().any(|byte| byte.is_ascii_uppercase()))
            .ok_or(InvalidId)?;
        Uuid::try_parse(hex).map(Self::from).map_err(|_| InvalidId)
    }
}

impl<K: Kind> fmt::Display for Id<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}", K::PREFIX, self.0.simple())
    }
}

impl<K: Kind> fmt::Debug for Id<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<K> Clone for Id<K> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K> Copy for Id<K> {}

impl<K> PartialEq for Id<K> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl<K> Eq for Id<K> {}

impl<K> PartialOrd for Id<K> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<K> Ord for Id<K> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}

impl<K> Hash for Id<K> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl<K: Kind> Serialize for Id<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, K: Kind> Deserialize<'de> for Id<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_what_it_prints() {
        let id = Id::<Agent>::new();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(
            serde_json::from_value::<Id<Agent>>(serde_json::json!(id)).unwrap(),
            id
        );
    }

    #[test]
    fn another_kind_or_spelling_is_refused() {
        let hex = Id::<Agent>::new().uuid().simple().to_string();
        let upper = "0197F4C2D0A97C1E8A3B5C6D7E8F9A0B";
        for text in [
            format!("sess_{hex}"),
            format!("agt{hex}"),
            format!("agt_{}", &hex[1..]),
            format!("agt_{upper}"),
            format!("agt_{}z", &hex[1..]),
            hex,
            String::new(),
        ] {
            assert_eq!(text.parse::<Id<Agent>>(), Err(InvalidId), "{text}");
        }
    }

    #[test]
    fn later_ids_sort_after_earlier_ones() {
        let ids: Vec<_> = (0..1000).map(|_| Id::<Run>::new()).collect();
        assert!(ids.is_sorted());
    }
}
