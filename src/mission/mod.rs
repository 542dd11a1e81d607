//! Missions as values: when they run and what they are made from. No I/O.

mod duration;
mod playbook;
mod schedule;

pub use duration::parse_duration;
pub use playbook::{Filled, MOST_PLAYBOOKS, Parameter, ParameterType, Playbook};
pub use schedule::{
    CatchUp, Cron, Decision, Overlap, Schedule, SkipReason, Standing, Timing, TimingError,
};
