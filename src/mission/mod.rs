//! Missions as values: when they run and what they are made from. No I/O.

mod duration;

pub use duration::parse_duration;
