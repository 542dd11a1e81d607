//! Polpo: one binary and one Postgres that give any product an agent backend.
//!
//! The modules in reading order: [`config`] holds the settings, [`cli`] runs a role, [`app`] is what all
//! share; [`api`] speaks HTTP, [`tools`] are what agents can call on the server, [`agent`] runs a turn,
//! [`work`] runs tasks, [`lifecycle`] is what can be done to one; [`llm`] speaks to model providers, [`store`] to
//! Postgres; [`task`], [`mission`], [`webhook`], [`event`], [`ids`], [`net`] and [`seal`] are plain values.

pub mod agent;
pub mod api;
pub mod app;
pub mod cli;
pub mod config;
pub mod dev;
pub mod embedded;
pub mod event;
pub mod ids;
pub mod lifecycle;
pub mod llm;
pub mod mission;
pub mod net;
pub mod seal;
pub mod store;
pub mod task;
pub mod tools;
pub mod webhook;
pub mod work;
