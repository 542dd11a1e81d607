//! `memory_get`, `memory_save`, `memory_append` and `memory_update` (contract 2.13).

use chrono::{SecondsFormat, Utc};
use serde::Deserialize;
use serde_json::{Value, json};

use super::arguments;
use crate::llm::{Tool, ToolCall};
use crate::store::{MEMORY_LIMIT, MemoryOwner, ProjectDb, StoreError};

const NAMES: [&str; 4] = [
    "memory_get",
    "memory_save",
    "memory_append",
    "memory_update",
];

pub(super) fn is_one(name: &str) -> bool {
    NAMES.contains(&name)
}

/// Reading does no harm, nor does saying again what a memory is to hold.
pub(super) fn is_repeatable(call: &ToolCall) -> bool {
    matches!(call.name.as_str(), "memory_get" | "memory_save")
}

pub(super) fn is_at_hand(db: &ProjectDb, agent: &str, call: &ToolCall) -> bool {
    call.name == "memory_get" && db.memories_at_hand(agent).is_some()
}

/// Whose memory a call is about.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Scope {
    /// The agent's own.
    #[default]
    Agent,
    /// The one that all agents of the project share.
    Shared,
}

#[derive(Debug, Deserialize)]
struct Get {
    #[serde(default)]
    scope: Scope,
}

#[derive(Debug, Deserialize)]
struct Text {
    content: String,
    #[serde(default)]
    scope: Scope,
}

#[derive(Debug, Deserialize)]
struct Update {
    find: String,
    replace: String,
    #[serde(default)]
    scope: Scope,
}

pub(super) fn tools() -> Vec<Tool> {
    let tool = |name: &str, description: &str, mut properties: Value, required: &[&str]| {
        // Gemini takes an enum of nothing but strings, and wants to be told.
        properties["scope"] = json!({"type": "string", "enum": ["agent", "shared"]});
        Tool {
            name: name.to_owned(),
            description: Some(description.to_owned()),
            parameters: json!({"type": "object", "properties": properties, "required": required}),
        }
    };
    let content = || json!({"content": {"type": "string"}});
    let [get, save, append, update] = NAMES;
    vec![
        // These words are part of every prompt, and paid for each time: what one says, the others need not.
        tool(
            get,
            "Read a memory: your own (scope `agent`, the default) or the one that all agents share (`shared`).",
            json!({}),
            &[],
        ),
        tool(
            save,
            "Replace a whole memory with a Markdown text.",
            content(),
            &["content"],
        ),
        tool(
            append,
            "Add a line to a memory, stamped with the time.",
            content(),
            &["content"],
        ),
        tool(
            update,
            "Replace an exact passage of a memory wherever it occurs.",
            json!({"find": {"type": "string"}, "replace": {"type": "string"}}),
            &["find", "replace"],
        ),
    ]
}

pub(super) async fn call(db: &ProjectDb, agent: &str, call: &ToolCall) -> Result<String, String> {
    let owner = |scope| match scope {
        Scope::Agent => MemoryOwner::Agent(agent),
        Scope::Shared => MemoryOwner::Project,
    };
    let done = match call.name.as_str() {
        "memory_get" => {
            let Get { scope } = arguments(call)?;
            let memories = db.in_time(db.memories_now(agent)).await.map_err(explain)?;
            let memory = match scope {
                Scope::Agent => &memories.own,
                Scope::Shared => &memories.shared,
            };
            return Ok(memory
                .clone()
                .unwrap_or_else(|| "The memory is empty.".to_owned()));
        }
        "memory_save" => {
            let Text { content, scope } = arguments(call)?;
            db.in_time(db.save_memory(owner(scope), &clean(&content)))
                .await
        }
        "memory_append" => {
            let Text { content, scope } = arguments(call)?;
            if content.trim().is_empty() {
                return Err("There is nothing to add: `content` must not be empty.".to_owned());
            }
            let at = Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true);
            let line = format!("[{at}] {}\n", clean(&content).trim_end());
            db.in_time(db.append_memory(owner(scope), &line)).await
        }
        _ => {
            let Update {
                find,
                replace,
                scope,
            } = arguments(call)?;
            if find.is_empty() {
                return Err("`find` must not be empty.".to_owned());
            }
            let (find, replace) = (clean(&find), clean(&replace));
            db.in_time(db.replace_in_memory(owner(scope), &find, &replace))
                .await
        }
    };
    done.map(|()| "Saved.".to_owned()).map_err(explain)
}

/// Postgres stores no NUL character.
fn clean(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// What the model is told. A failure that is ours is logged here, where it ends.
fn explain(error: StoreError) -> String {
    match error {
        StoreError::NotFound => {
            "The memory does not hold that passage. Read it with `memory_get`.".to_owned()
        }
        error if error.is_memory_too_large() => format!(
            "The memory would be larger than {} KiB. Shorten it with `memory_save`.",
            MEMORY_LIMIT / 1024
        ),
        error => {
            tracing::warn!("a memory tool failed: {:#}", anyhow::Error::new(error));
            "The memory cannot be reached at the moment.".to_owned()
        }
    }
}
