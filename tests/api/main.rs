//! The API through a real socket, against a real Postgres and a provider that plays a script.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(
    clippy::needless_pass_by_value,
    reason = "`json!` in place reads better than a reference to it"
)]

mod harness;

mod agents;
mod approvals;
mod assessments;
mod auth;
mod breaks;
mod browsers;
mod chat;
mod crashes;
mod deadlines;
mod dependencies;
mod engine;
mod events;
mod isolation;
mod memory;
mod mission_crashes;
mod mission_gates;
mod mission_histories;
mod missions;
mod openapi;
mod places;
mod platform;
mod playbooks;
mod processes;
mod provider_states;
mod providers;
mod schedules;
mod sessions;
mod settings;
mod silence;
mod steps;
mod streams;
mod tasks;
mod tools;
mod webhooks;
