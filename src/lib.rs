//! Polpo: one binary and one Postgres that give any product an agent backend.
//!
//! The modules in reading order: [`ids`] names things, [`llm`] speaks to model providers.

pub mod ids;
pub mod llm;
pub mod store;
