//! The tools that the server runs for its agents, and which of them an agent may use.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, LazyLock};

use async_trait::async_trait;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::agent::Toolbox;
use crate::llm::{Tool, ToolCall};
use crate::store::{AgentRow, ProjectDb};
use crate::task::{DEEPEST, ExpectedOutcome, cut, is_deeper_than};

mod http_fetch;
mod memory;
mod register_outcome;

pub use http_fetch::Fetcher;
pub use register_outcome::{outcome_of, registers_outcome};

/// Every tool there is, described once: a description is some hundred small values, and goes out with every request.
static TOOLS: LazyLock<Vec<Arc<Tool>>> = LazyLock::new(|| {
    let mut tools = memory::tools();
    tools.push(http_fetch::tool());
    tools.push(register_outcome::tool());
    tools.into_iter().map(Arc::new).collect()
});

/// The most bytes of a result that the model reads; the rest is cut, and the model is told so.
const RESULT_LIMIT: usize = 64 * 1024;

/// Whether an agent with this `allowedTools` may use a tool. `*` stands for any characters. Without a list
/// these are the memory tools, and `register_outcome` in a task (design 0.1).
fn is_allowed(allowed: Option<&Value>, tool: &str) -> bool {
    match allowed.and_then(Value::as_array) {
        None => memory::is_one(tool) || tool == register_outcome::NAME,
        Some(patterns) => patterns
            .iter()
            .filter_map(Value::as_str)
            .any(|pattern| matches(pattern, tool)),
    }
}

/// Each piece between stars is found as early as it can be, so that no pattern of a tenant's takes longer than the name is long.
fn matches(pattern: &str, name: &str) -> bool {
    let mut pieces = pattern.split('*');
    let first = pieces.next().unwrap_or_default();
    let Some(last) = pieces.next_back() else {
        return pattern == name;
    };
    let Some(mut rest) = name.strip_prefix(first) else {
        return false;
    };
    for piece in pieces {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// One agent's tools, for one turn.
#[derive(Debug)]
pub struct ServerTools {
    db: ProjectDb,
    agent: String,
    fetcher: Fetcher,
    tools: Vec<Arc<Tool>>,
    expected: Vec<ExpectedOutcome>,
    /// The bytes of what was handed over.
    handed_over: AtomicUsize,
}

impl ServerTools {
    /// The tools that an agent's `allowedTools` admits in a chat.
    pub fn of(db: ProjectDb, agent: &AgentRow, fetcher: Fetcher) -> Self {
        let mut tools = Self::in_task(db, agent, fetcher, Vec::new());
        tools
            .tools
            .retain(|tool| tool.name != register_outcome::NAME);
        tools
    }

    /// The tools that an agent's `allowedTools` admits in a task, and `register_outcome` where the task expects outcomes: they could not be
    /// handed over without it.
    pub fn in_task(
        db: ProjectDb,
        agent: &AgentRow,
        fetcher: Fetcher,
        expected: Vec<ExpectedOutcome>,
    ) -> Self {
        let expects_outcomes = !expected.is_empty();
        let allowed = agent.definition.get("allowedTools");
        let tools = TOOLS
            .iter()
            .filter(|tool| {
                is_allowed(allowed, &tool.name)
                    || (expects_outcomes && tool.name == register_outcome::NAME)
            })
            .cloned()
            .collect();
        Self {
            db,
            agent: agent.name.clone(),
            fetcher,
            tools,
            expected,
            handed_over: AtomicUsize::new(0),
        }
    }

    fn has(&self, call: &ToolCall) -> bool {
        self.tools.iter().any(|tool| tool.name == call.name)
    }
}

#[async_trait]
impl Toolbox for ServerTools {
    fn tools(&self) -> &[Arc<Tool>] {
        &self.tools
    }

    async fn call(&self, call: &ToolCall) -> Result<String, String> {
        if !self.has(call) {
            let names: Vec<&str> = self.tools.iter().map(|tool| tool.name.as_str()).collect();
            return Err(format!(
                "There is no tool `{}` for you. Yours are: {}.",
                call.name,
                names.join(", ")
            ));
        }
        match call.name.as_str() {
            http_fetch::NAME => self.fetcher.call(call).await,
            register_outcome::NAME => {
                register_outcome::call(call, &self.expected, &self.handed_over)
            }
            _ => memory::call(&self.db, &self.agent, call).await,
        }
        .map(|result| cut(result, RESULT_LIMIT))
    }

    fn is_repeatable(&self, call: &ToolCall) -> bool {
        match call.name.as_str() {
            _ if !self.has(call) => true,
            http_fetch::NAME => http_fetch::only_reads(call),
            // What it does is recorded with its result, so a call without one has done nothing.
            register_outcome::NAME => true,
            _ => memory::is_repeatable(call),
        }
    }

    fn is_at_hand(&self, call: &ToolCall) -> bool {
        match call.name.as_str() {
            // The model is told that it has no such tool.
            _ if !self.has(call) => true,
            http_fetch::NAME => false,
            register_outcome::NAME => true,
            _ => memory::is_at_hand(&self.db, &self.agent, call),
        }
    }
}

/// Reads a call's arguments; an empty text is an empty object, as models have it.
fn arguments<T: DeserializeOwned>(call: &ToolCall) -> Result<T, String> {
    let text = match call.arguments.trim() {
        "" => "{}",
        text => text,
    };
    if is_deeper_than(text.as_bytes(), DEEPEST) {
        return Err(format!(
            "The arguments of `{}` are nested more than {DEEPEST} deep.",
            call.name
        ));
    }
    serde_json::from_str(text)
        .map_err(|error| format!("The arguments of `{}` cannot be used: {error}.", call.name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, name, expected) in [
            ("memory_get", "memory_get", true),
            ("memory_get", "memory_gets", false),
            ("memory_*", "memory_get", true),
            ("memory_*", "http_fetch", false),
            ("*", "anything", true),
            ("*_get", "memory_get", true),
            ("m*_*t", "memory_get", true),
            ("m*_*t", "memory_got_it", true),
            ("m*x", "memory_get", false),
            ("", "memory_get", false),
            ("m*get*get", "memory_get", false),
            ("*et*", "memory_get", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
        // Whatever a tenant writes is decided at once.
        assert!(!matches(&("*".repeat(199) + "x"), "memory_get"));
    }

    #[test]
    fn without_a_list_an_agent_has_the_memory_tools_and_with_an_empty_one_none() {
        assert!(is_allowed(None, "memory_append"));
        assert!(!is_allowed(None, "http_fetch"));
        assert!(!is_allowed(Some(&json!([])), "memory_append"));
    }

    #[test]
    fn a_long_result_is_cut_where_a_character_ends_and_says_so() {
        let long = "é".repeat(RESULT_LIMIT);
        let cut = cut(format!("a{long}"), RESULT_LIMIT);
        assert!(cut.len() < RESULT_LIMIT + 64);
        assert!(cut.ends_with("é\n[cut here: it is longer]"));
    }
}
