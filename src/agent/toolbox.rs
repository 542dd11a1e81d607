//! Tools that run on the server while a turn goes on.

use std::sync::Arc;

use async_trait::async_trait;

use crate::llm::{Tool, ToolCall};

/// What an agent may call without its caller's help.
#[async_trait]
pub trait Toolbox: Send + Sync + std::fmt::Debug {
    /// The tools that the model is shown.
    fn tools(&self) -> &[Arc<Tool>];

    /// Runs a call, whatever its name, and returns what the model reads.
    ///
    /// # Errors
    /// What the model reads when it did not work; it may try again or do something else.
    async fn call(&self, call: &ToolCall) -> Result<String, String>;

    /// Whether a call that may have been done already can be done again without harm.
    fn is_repeatable(&self, call: &ToolCall) -> bool;

    /// Whether a call's result is known in this process: to run it asks nobody, changes nothing and takes no time, so nobody could tell whether it
    /// was run before or after the message that asks for it was recorded. Such a call is repeatable too.
    fn is_at_hand(&self, call: &ToolCall) -> bool;
}

/// A call of a server's tool, and how far it has come.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolUse {
    /// The call. Its arguments are whole once it is [`ToolState::Calling`].
    pub call: ToolCall,
    /// How far it has come.
    pub state: ToolState,
}

/// How far a tool call has come; the states of contract 2.1.7.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolState {
    /// The model is writing its arguments.
    Preparing,
    /// It is about to run.
    Calling,
    /// It returned this.
    Completed(String),
    /// It failed, and the model is told so.
    Failed(String),
}

impl ToolState {
    /// What the model reads, once there is something.
    pub fn result(&self) -> Option<&str> {
        match self {
            Self::Preparing | Self::Calling => None,
            Self::Completed(result) | Self::Failed(result) => Some(result),
        }
    }
}
