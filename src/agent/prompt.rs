//! The instructions that stand before a conversation.

use std::fmt::Write;

use serde_json::Value;

/// Who an agent is, in the words its owner chose.
#[derive(Debug, Clone, Copy, Default)]
pub struct Persona<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its job.
    pub role: Option<&'a str>,
    /// Its own instructions.
    pub system_prompt: Option<&'a str>,
    /// The `identity` object of contract 2.4.1.
    pub identity: Option<&'a Value>,
    /// What all agents of its project remember.
    pub shared_memory: Option<&'a str>,
    /// What it alone remembers.
    pub own_memory: Option<&'a str>,
}

/// The prompt of an agent. What the caller adds in system messages comes last: it is context, not a replacement
/// (contract 2.1.3).
pub fn system_prompt(persona: Persona<'_>, caller_context: &[String]) -> String {
    let identity = persona.identity;
    let text = |key: &str| {
        identity
            .and_then(|identity| identity.get(key))
            .and_then(Value::as_str)
    };
    let name = text("displayName").unwrap_or(persona.name);
    let mut prompt = match persona.role {
        Some(role) => format!("You are {name}. Your role: {role}."),
        None => format!("You are {name}."),
    };
    for (key, label) in [
        ("title", "Title"),
        ("company", "Company"),
        ("email", "Email"),
        ("bio", "About you"),
        ("timezone", "Time zone"),
        ("tone", "Tone"),
        ("personality", "Personality"),
    ] {
        if let Some(value) = text(key) {
            let _ = write!(prompt, "\n{label}: {value}");
        }
    }
    let responsibilities = identity
        .and_then(|identity| identity.get("responsibilities"))
        .and_then(Value::as_array);
    for (number, responsibility) in responsibilities.into_iter().flatten().enumerate() {
        if number == 0 {
            prompt.push_str("\nResponsibilities:");
        }
        prompt.push_str("\n- ");
        prompt.push_str(&responsibility_line(responsibility));
    }
    if let Some(instructions) = persona.system_prompt {
        prompt.push_str("\n\n");
        prompt.push_str(instructions);
    }
    // The tags of contract 2.6.3.
    for (tag, memory) in [
        ("shared-memory", persona.shared_memory),
        ("agent-memory", persona.own_memory),
    ] {
        if let Some(memory) = memory {
            let _ = write!(prompt, "\n\n<{tag}>\n{}\n</{tag}>", memory.trim_end());
        }
    }
    for context in caller_context {
        prompt.push_str("\n\n");
        prompt.push_str(context);
    }
    prompt
}

fn responsibility_line(responsibility: &Value) -> String {
    let text = |key: &str| responsibility.get(key).and_then(Value::as_str);
    match (responsibility.as_str(), text("area"), text("description")) {
        (Some(line), _, _) => line.to_owned(),
        (None, area, description) => {
            let mut line = [area, description]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
                .join(": ");
            if let Some(priority) = text("priority") {
                let _ = write!(line, " ({priority} priority)");
            }
            line
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_names_the_agent_its_duties_and_then_the_callers_context() {
        let identity = serde_json::json!({
            "displayName": "Noor", "tone": "Plain",
            "responsibilities": ["Changelog", {"area": "Docs", "description": "Keep guides current", "priority": "high"}]
        });
        let persona = Persona {
            name: "release-notes",
            role: Some("Technical writer"),
            system_prompt: Some("Be brief."),
            identity: Some(&identity),
            shared_memory: Some("- Dates are ISO\n"),
            own_memory: Some("2.4 is out"),
        };
        assert_eq!(
            system_prompt(persona, &["The reader is a child.".to_owned()]),
            "You are Noor. Your role: Technical writer.\nTone: Plain\nResponsibilities:\n- Changelog\n\
             - Docs: Keep guides current (high priority)\n\nBe brief.\n\n\
             <shared-memory>\n- Dates are ISO\n</shared-memory>\n\n<agent-memory>\n2.4 is out\n</agent-memory>\n\nThe reader is a child."
        );
        assert_eq!(
            system_prompt(
                Persona {
                    name: "a",
                    ..Persona::default()
                },
                &[]
            ),
            "You are a."
        );
    }
}
