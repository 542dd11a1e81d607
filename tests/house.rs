//! The source tree's own rules.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use serde_json::Value;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn files(directory: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path, ending));
        } else if path
            .extension()
            .is_some_and(|extension| extension == ending)
        {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Which rooms a room may know. What is not listed may know them all.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("ids", &[]),
    ("seal", &[]),
    ("config", &[]),
    ("net", &[]),
    ("llm", &["net"]),
    ("event", &[]),
    ("task", &["ids", "event"]),
    ("mission", &["ids", "event", "task"]),
    ("webhook", &["ids", "event", "net", "seal"]),
    ("store", &["ids", "event", "mission", "task", "webhook"]),
    ("lifecycle", &["ids", "event", "mission", "store", "task"]),
    ("embedded", &["seal"]),
    ("agent", &["llm", "ids"]),
    (
        "api",
        &[
            "app",
            "config",
            "lifecycle",
            "mission",
            "tools",
            "agent",
            "llm",
            "store",
            "mission",
            "task",
            "event",
            "ids",
            "seal",
            "webhook",
        ],
    ),
    // The API and the engine never meet: what both do to tasks is in `lifecycle`.
    (
        "work",
        &[
            "app",
            "lifecycle",
            "mission",
            "tools",
            "agent",
            "llm",
            "store",
            "task",
            "event",
            "ids",
            "net",
            "seal",
            "webhook",
        ],
    ),
    ("tools", &["agent", "ids", "llm", "net", "store", "task"]),
    (
        "app",
        &[
            "api", "config", "ids", "llm", "mission", "store", "seal", "task", "tools", "webhook",
            "work",
        ],
    ),
];

#[test]
fn rooms_import_downwards_only() {
    let source = root().join("src");
    for file in files(&source, "rs") {
        let relative = file.strip_prefix(&source).unwrap().with_extension("");
        let room = relative.iter().next().unwrap().to_str().unwrap();
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| *name == room) else {
            continue;
        };
        for (number, line) in fs::read_to_string(&file).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap();
            for (_, after) in code
                .match_indices("crate::")
                .map(|(at, found)| code.split_at(at + found.len()))
            {
                let known: String = after
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                let fine = known.is_empty() || known == room || allowed.contains(&known.as_str());
                assert!(
                    fine,
                    "{}:{}: `{room}` may not know `{known}`: see MAY_IMPORT",
                    file.display(),
                    number + 1
                );
            }
        }
    }
}

#[test]
fn only_the_store_knows_sql() {
    for file in files(&root().join("src"), "rs") {
        if !file.starts_with(root().join("src/store")) {
            let text = fs::read_to_string(&file).unwrap();
            assert!(
                !text.contains("sqlx::query"),
                "{} holds SQL: it belongs into src/store",
                file.display()
            );
        }
    }
}

/// The tables of the two worlds, from their migrations.
fn tenant_tables() -> Vec<String> {
    let mut tables = Vec::new();
    for file in files(&root().join("migrations/world"), "sql") {
        for line in fs::read_to_string(file).unwrap().lines() {
            let line = line.replace("create unlogged table", "create table");
            if let Some(rest) = line.strip_prefix("create table ") {
                tables.push(rest.split_whitespace().next().unwrap().to_owned());
            }
        }
    }
    assert!(tables.len() >= 6, "{tables:?}");
    tables
}

fn checked_statements() -> Vec<String> {
    let statements: Vec<String> = files(&root().join(".sqlx"), "json")
        .into_iter()
        .map(|file| {
            let data: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
            data["query"].as_str().unwrap().to_owned()
        })
        .collect();
    assert!(statements.len() > 30);
    statements
}

/// Statements that may touch every project's rows, by how they begin.
const FOR_ALL_PROJECTS: &[&str] = &[
    "select 'platform' as \"schema!\"",
    "delete from changes where at <",
    // Leases: a process claims the work of all projects, each with the door to its own.
    "update jobs set ready = true, holder = null\n            where not ready and due_at",
    "select min(due_at) as at",
    "with holders as (",
    "update jobs set due_at = clock_timestamp() + make_interval(secs => $3",
];

#[test]
fn a_statement_on_a_tenant_table_names_the_project() {
    let tables = tenant_tables();
    for statement in checked_statements() {
        let words: Vec<&str> = statement
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .collect();
        let touched = tables.iter().find(|table| words.contains(&table.as_str()));
        if let Some(table) = touched.filter(|_| {
            !FOR_ALL_PROJECTS
                .iter()
                .any(|known| statement.starts_with(known))
        }) {
            assert!(
                words.contains(&"project_id"),
                "a statement on {table} does not name the project:\n{statement}"
            );
        }
    }
}

#[test]
fn no_statement_names_a_schema() {
    for statement in checked_statements() {
        let names_one = ["platform.", "production.", "sandbox."]
            .iter()
            .any(|schema| statement.contains(schema));
        assert!(
            !names_one
                || FOR_ALL_PROJECTS
                    .iter()
                    .any(|known| statement.starts_with(known)),
            "a plain name cannot reach another world, this can:\n{statement}"
        );
    }
}

#[test]
fn tenant_tables_lead_with_the_project() {
    let text: String = files(&root().join("migrations/world"), "sql")
        .iter()
        .map(|file| fs::read_to_string(file).unwrap())
        .collect();
    for table in text.split("create table ").skip(1) {
        let name = table.split_whitespace().next().unwrap();
        let body = table.split(");").next().unwrap();
        let keyed = body.contains("primary key (project_id, ")
            || body.contains("project_id uuid primary key");
        assert!(
            keyed || name == "changes",
            "{name}'s primary key must lead with project_id"
        );
        for reference in body.split("foreign key ").skip(1) {
            assert!(
                reference.starts_with("(project_id, "),
                "a foreign key of {name} must carry project_id"
            );
        }
    }
}

#[test]
fn env_example_lists_every_setting() {
    let text = fs::read_to_string(root().join(".env.example")).unwrap();
    let listed: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.trim_start_matches(['#', ' ']).split_once('='))
        .map(|(name, _)| name)
        .filter(|name| {
            !name.is_empty()
                && name
                    .chars()
                    .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
        })
        .collect();
    let command = polpo::cli::Cli::command();
    let serve = command.find_subcommand("serve").unwrap();
    let settings: Vec<String> = serve
        .get_arguments()
        .filter_map(|argument| Some(argument.get_env()?.to_str()?.to_owned()))
        .collect();
    let providers = polpo::llm::KNOWN
        .iter()
        .flat_map(|known| [known.key_variable, known.base_url_variable]);
    let expected: BTreeSet<&str> = settings
        .iter()
        .map(String::as_str)
        .chain(providers)
        .collect();
    assert_eq!(listed, expected);
}

#[test]
fn the_openapi_document_is_as_it_was() {
    insta::assert_snapshot!(polpo::api::openapi().to_pretty_json().unwrap());
}
