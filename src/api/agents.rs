//! `/v1/agents` (contract 2.4).

use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Json, Listed, Page, Path, Query, plain};
use crate::app::App;
use crate::ids::{self, Id};
use crate::llm::Effort;
use crate::store::{AgentRow, NewAgent, ProcessRow, StoreError};

/// The fields of an agent that a caller sets. What is stored is what was given; this is what it must look like.
#[derive(Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct AgentFields {
    /// Its job.
    pub role: Option<String>,
    /// `provider:model`, `provider/model`, or a bare model id; absent is the project's default.
    pub model: Option<String>,
    /// Its instructions.
    pub system_prompt: Option<String>,
    /// Names or wildcards of the tools it may use.
    pub allowed_tools: Option<Vec<String>>,
    /// Paths it may touch.
    pub allowed_paths: Option<Vec<String>>,
    /// Its skills by name.
    pub skills: Option<Vec<String>>,
    /// The most turns of one task.
    #[schema(minimum = 1)]
    pub max_turns: Option<u32>,
    /// The most tasks at once.
    #[schema(minimum = 1)]
    pub max_concurrency: Option<u32>,
    /// How many tokens its model can read; known for the usual models.
    #[schema(minimum = 1000)]
    pub context_window: Option<u64>,
    /// How much it thinks first: `off`, `minimal`, `low`, `medium`, `high` or `xhigh`.
    #[schema(value_type = Option<String>)]
    pub reasoning: Option<Effort>,
    /// The agent that its failures go to; an empty text clears it.
    pub reports_to: Option<String>,
    /// Who it is.
    pub identity: Option<Identity>,
    /// Whether it belongs to a mission and goes with it.
    pub volatile: Option<bool>,
    /// The group that owns a volatile agent.
    pub mission_group: Option<String>,
    /// Its persistent browser profile.
    pub browser_profile: Option<String>,
    /// Where it may send mail.
    pub email_allowed_domains: Option<Vec<String>>,
    /// Registry: its version.
    pub version: Option<String>,
    /// Registry: its author.
    pub author: Option<String>,
    /// Registry: its tags.
    pub tags: Option<Vec<String>>,
    /// `subprocess` or `in-process`.
    pub execution_mode: Option<String>,
}

/// Who an agent is.
#[derive(Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    /// The name it goes by.
    pub display_name: Option<String>,
    /// Its title.
    pub title: Option<String>,
    /// Its company.
    pub company: Option<String>,
    /// Its address.
    pub email: Option<String>,
    /// Its story.
    pub bio: Option<String>,
    /// Where it lives, as an IANA zone.
    pub timezone: Option<String>,
    /// Path of its picture.
    pub avatar: Option<String>,
    /// How it sounds.
    pub tone: Option<String>,
    /// What it is like.
    pub personality: Option<String>,
    /// Its accounts, text to text.
    pub socials: Option<std::collections::BTreeMap<String, String>>,
    /// What it does: texts, or `{area, description, priority?}`.
    pub responsibilities: Option<Vec<Responsibility>>,
}

/// One thing that an agent does.
#[derive(Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(untagged)]
pub enum Responsibility {
    /// In a line.
    Line(String),
    /// In full.
    Full {
        /// What it is about.
        area: String,
        /// What there is to do.
        description: String,
        /// `critical`, `high`, `medium` or `low`.
        priority: Option<Priority>,
    },
}

/// How much a responsibility matters.
#[derive(Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Before all.
    Critical,
    /// Much.
    High,
    /// Some.
    Medium,
    /// Little.
    Low,
}

/// Everything that may stand in an agent beside its name and team. The last line's are stored for others to read.
const FIELDS: &[&str] = &[
    "role",
    "model",
    "systemPrompt",
    "allowedTools",
    "allowedPaths",
    "skills",
    "maxTurns",
    "maxConcurrency",
    "contextWindow",
    "reasoning",
    "reportsTo",
    "identity",
    "volatile",
    "missionGroup",
    "browserProfile",
    "emailAllowedDomains",
    "version",
    "author",
    "tags",
    "executionMode",
    "image_model",
    "video_model",
    "vision_model",
    "transcribe_model",
    "tts_model",
    "search_provider",
    "sandbox",
    "allowedModelProfiles",
    "modelRouting",
    "runtime",
    "assignedLoops",
    "executionRouter",
    "mcpServers",
];

/// A new agent.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct CreateAgent {
    /// 1 to 64 letters, digits, `_`, `-` or `.`, unique in the project.
    #[schema(
        min_length = 1,
        max_length = 64,
        pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )]
    pub name: Option<String>,
    /// The team it joins; the first team when absent.
    pub team: Option<String>,
    /// The rest.
    #[serde(flatten)]
    #[schema(value_type = AgentFields)]
    pub fields: Map<String, Value>,
}

/// A change to an agent: what is absent stays, what is null goes, `identity` is merged member by member.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub struct UpdateAgent {
    /// Must be the agent's own name: agents are not renamed.
    pub name: Option<String>,
    /// The team it moves to.
    pub team: Option<String>,
    /// The rest.
    #[serde(flatten)]
    #[schema(value_type = AgentFields)]
    pub fields: Map<String, Value>,
}

/// An agent.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct AgentView {
    /// `agt_…`.
    #[schema(value_type = String)]
    pub id: Id<ids::Agent>,
    /// Its name.
    pub name: String,
    /// Its team.
    pub team: String,
    /// Everything that was set.
    #[serde(flatten)]
    #[schema(value_type = AgentFields)]
    pub fields: Map<String, Value>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
}

impl From<AgentRow> for AgentView {
    fn from(row: AgentRow) -> Self {
        Self {
            id: row.id,
            name: row.name,
            team: row.team,
            fields: row.definition,
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }
}

/// Which team.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub struct TeamQuery {
    /// A team's name.
    pub team: Option<String>,
}

/// Something is gone.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Removed {
    /// Always true.
    pub removed: bool,
}

/// List the agents of all teams.
#[utoipa::path(get, path = "/agents", tag = "Agents", params(Page),
    responses((status = 200, description = "The agents by name", body = Vec<AgentView>), (status = 400, body = ErrorBody, description = "A parameter is wrong")))]
pub async fn list_agents(
    Door(db): Door,
    Query(page): Query<Page>,
) -> Result<Listed<AgentView>, ApiError> {
    let size = page.size()?;
    let rows = db.agents(None, page.after.as_deref(), size).await?;
    let views = rows.into_iter().map(AgentView::from).collect();
    Ok(Listed::new(
        views,
        size,
        "/v1/agents",
        |agent: &AgentView| agent.name.clone(),
    ))
}

/// Create an agent.
#[utoipa::path(post, path = "/agents", tag = "Agents", params(TeamQuery), request_body = CreateAgent,
    responses(
        (status = 201, description = "The agent", body = AgentView),
        (status = 400, description = "A field is wrong", body = ErrorBody),
        (status = 404, description = "No such team", body = ErrorBody),
        (status = 409, description = "The name is taken", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn create_agent(
    State(app): State<App>,
    Door(db): Door,
    Query(query): Query<TeamQuery>,
    Json(new): Json<CreateAgent>,
) -> Result<(StatusCode, Json<AgentView>), ApiError> {
    let name = new.name.as_deref().unwrap_or_default();
    check_name("name", name)?;
    let mut definition = Map::new();
    merge(&mut definition, new.fields);
    check(&app, &definition)?;
    let mut tx = db.begin();
    let team = match query.team.or(new.team) {
        Some(team) => team,
        None => tx.first_team().await?,
    };
    let agent = tx
        .create_agent(&NewAgent {
            name,
            team: &team,
            definition: &definition,
        })
        .await
        .map_err(|error| refused(error, name, &team))?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(agent.into())))
}

/// Read an agent.
#[utoipa::path(get, path = "/agents/{name}", tag = "Agents", params(("name" = String, Path, description = "Its name or id")),
    responses((status = 200, description = "The agent", body = AgentView), (status = 404, description = "No such agent", body = ErrorBody)))]
pub async fn read_agent(
    Door(db): Door,
    Path(name): Path<String>,
) -> Result<Json<AgentView>, ApiError> {
    let agent = db
        .agent(&name)
        .await
        .map_err(|error| missing(error, &name))?;
    Ok(Json(AgentRow::clone(&agent).into()))
}

/// Change an agent.
#[utoipa::path(patch, path = "/agents/{name}", tag = "Agents", params(("name" = String, Path, description = "Its name or id")),
    request_body = UpdateAgent,
    responses(
        (status = 200, description = "The agent", body = AgentView),
        (status = 400, description = "A field is wrong", body = ErrorBody),
        (status = 404, description = "No such agent or team", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
    ))]
pub async fn update_agent(
    State(app): State<App>,
    Door(db): Door,
    Path(name): Path<String>,
    Json(change): Json<UpdateAgent>,
) -> Result<Json<AgentView>, ApiError> {
    let mut tx = db.begin();
    let agent = tx
        .lock_agent(&name)
        .await
        .map_err(|error| missing(error, &name))?;
    if change.name.is_some_and(|name| name != agent.name) {
        return Err(ApiError::invalid(
            "name",
            "An agent keeps its name: create another one and delete this one.",
        ));
    }
    let mut definition = agent.definition;
    merge(&mut definition, change.fields);
    check(&app, &definition)?;
    let team = change.team.unwrap_or(agent.team);
    let agent = tx
        .update_agent(agent.id, &team, &definition)
        .await
        .map_err(|error| refused(error, &name, &team))?;
    // It may take more tasks at once now; those that wait look for themselves.
    tx.unpark_all().await?;
    tx.commit().await?;
    Ok(Json(agent.into()))
}

/// Delete an agent. Its sessions stay.
#[utoipa::path(delete, path = "/agents/{name}", tag = "Agents", params(("name" = String, Path, description = "Its name or id")),
    responses(
        (status = 200, description = "It is gone", body = Removed),
        (status = 404, description = "No such agent", body = ErrorBody),
        (status = 409, description = "It has unfinished tasks", body = ErrorBody),
    ))]
pub async fn delete_agent(
    Door(db): Door,
    Path(name): Path<String>,
) -> Result<Json<Removed>, ApiError> {
    let mut tx = db.begin();
    let agent = tx
        .lock_agent(&name)
        .await
        .map_err(|error| missing(error, &name))?;
    if tx.has_unfinished_tasks(&agent.name).await? {
        return Err(ApiError::Conflict(format!(
            "Agent \"{}\" has tasks that are not finished. Wait for them, kill them, or give them to another agent.",
            agent.name
        )));
    }
    tx.delete_agent(&name)
        .await
        .map_err(|error| missing(error, &name))?;
    tx.commit().await?;
    Ok(Json(Removed { removed: true }))
}

/// What an agent is at.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProcessView {
    /// The agent.
    pub agent_name: String,
    /// The number of the server process that runs it.
    pub pid: i64,
    /// The task.
    #[schema(value_type = String)]
    pub task_id: Id<ids::Task>,
    /// When the run began.
    pub started_at: DateTime<Utc>,
    /// Always true: what has ended is not listed.
    pub alive: bool,
    /// How far it is.
    pub activity: ActivityView,
}

/// How far a run is.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ActivityView {
    /// The tool that was used last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_tool: Option<String>,
    /// None until there is a sandbox.
    pub files_created: Vec<String>,
    /// None until there is a sandbox.
    pub files_edited: Vec<String>,
    /// How many tools were used.
    pub tool_calls: i64,
    /// How many tokens were used.
    pub total_tokens: i64,
    /// When it last came further.
    pub last_update: DateTime<Utc>,
}

/// List what agents are at.
#[utoipa::path(get, path = "/agents/processes", tag = "Agents",
    responses((status = 200, description = "The longest running first, at most 1,000", body = Vec<ProcessView>)))]
pub async fn list_processes(Door(db): Door) -> Result<Json<Vec<ProcessView>>, ApiError> {
    let rows = db.processes().await?;
    let view = |row: ProcessRow| ProcessView {
        agent_name: row.agent,
        pid: row.pid,
        task_id: row.task,
        started_at: row.started_at,
        alive: true,
        activity: ActivityView {
            last_tool: row.last_tool,
            files_created: Vec::new(),
            files_edited: Vec::new(),
            tool_calls: row.tool_calls,
            total_tokens: row.total_tokens,
            last_update: row.last_update,
        },
    };
    Ok(Json(rows.into_iter().map(view).collect()))
}

/// Puts the known fields of a change over those there are.
fn merge(definition: &mut Map<String, Value>, change: Map<String, Value>) {
    for (key, value) in change {
        if !FIELDS.contains(&key.as_str()) {
            continue;
        }
        match (key.as_str(), value) {
            (_, Value::Null) => drop(definition.remove(&key)),
            ("reportsTo", Value::String(name)) if name.is_empty() => drop(definition.remove(&key)),
            ("identity", Value::Object(members)) => {
                let identity = definition.entry(key).or_insert_with(|| json!({}));
                if let Some(identity) = identity.as_object_mut() {
                    for (member, value) in members {
                        if value.is_null() {
                            identity.remove(&member);
                        } else {
                            identity.insert(member, value);
                        }
                    }
                }
            }
            (_, value) => drop(definition.insert(key, value)),
        }
    }
}

pub(super) fn check(app: &App, definition: &Map<String, Value>) -> Result<(), ApiError> {
    for (key, value) in definition {
        // Each member of an identity by itself, so that the one at fault is named.
        let members = value.as_object().filter(|_| key == "identity");
        for (member, value) in members.into_iter().flatten() {
            let alone = Value::Object(Map::from_iter([(member.clone(), value.clone())]));
            let place = format!("identity.{member}");
            check_alone(key, &place, json!({"identity": alone}))?;
        }
        let alone = Value::Object(Map::from_iter([(key.clone(), value.clone())]));
        check_alone(key, key, alone)?;
    }
    let tools = definition.get("allowedTools").and_then(Value::as_array);
    if tools.is_some_and(|tools| tools.len() > TOOLS) {
        return Err(ApiError::invalid(
            "allowedTools",
            format!("`allowedTools` must be at most {TOOLS}."),
        ));
    }
    for tool in tools.into_iter().flatten().filter_map(Value::as_str) {
        check_tool(tool)?;
    }
    for key in ["maxTurns", "maxConcurrency"] {
        if definition.get(key).is_some_and(|value| value == 0) {
            return Err(ApiError::invalid(
                key,
                format!("`{key}` must be at least 1."),
            ));
        }
    }
    if definition
        .get("contextWindow")
        .and_then(Value::as_u64)
        .is_some_and(|tokens| !(1_000..=100_000_000).contains(&tokens))
    {
        return Err(ApiError::invalid(
            "contextWindow",
            "`contextWindow` must be from 1,000 to 100,000,000.",
        ));
    }
    match definition.get("model").and_then(Value::as_str) {
        Some(model) if !app.providers.knows(model) => Err(ApiError::invalid(
            "model",
            format!("`model` \"{model}\" names no known provider: write `provider:model`."),
        )),
        _ => Ok(()),
    }
}

fn check_alone(key: &str, place: &str, alone: Value) -> Result<(), ApiError> {
    match serde_json::from_value::<AgentFields>(alone) {
        Ok(_) => Ok(()),
        Err(error) => {
            let sentence = format!("`{place}` is not valid: {}.", plain(error.to_string()));
            Err(ApiError::invalid(key, sentence))
        }
    }
}

/// The most entries of `allowedTools`.
const TOOLS: usize = 200;

/// A tool's name, or a pattern for some (contract 2.4.1). One that this server does not have may be another's, or one that is to come.
fn check_tool(tool: &str) -> Result<(), ApiError> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_-*.:".contains(&byte);
    if (1..=200).contains(&tool.len()) && tool.bytes().all(fits) {
        return Ok(());
    }
    Err(ApiError::invalid(
        "allowedTools",
        format!(
            "`allowedTools`: \"{tool:.40}\" is no tool's name, nor a pattern such as `memory_*`."
        ),
    ))
}

/// Names are addresses: they stand in paths, in `model` and in `assignTo`.
pub(super) fn check_name(param: &str, name: &str) -> Result<(), ApiError> {
    let well_formed = (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
        && name.as_bytes()[0].is_ascii_alphanumeric();
    if !well_formed {
        return Err(ApiError::invalid(
            param,
            format!(
                "`{param}` must be 1 to 64 letters, digits, `.`, `_` or `-`, the first a letter or digit."
            ),
        ));
    }
    if ["teams", "team", "processes"].contains(&name) {
        return Err(ApiError::invalid(
            param,
            format!("`{param}` \"{name}\" is a word of the API: choose another."),
        ));
    }
    Ok(())
}

fn missing(error: StoreError, name: &str) -> ApiError {
    match error {
        StoreError::NotFound => ApiError::missing("Agent", name),
        error => error.into(),
    }
}

fn refused(error: StoreError, name: &str, team: &str) -> ApiError {
    if error.is_constraint("agents_name_key") {
        ApiError::Conflict(format!(
            "Agent \"{name}\" exists already. Change it with PATCH, or choose another name."
        ))
    } else if error.is_constraint("agents_team_fkey") {
        ApiError::missing("Team", team)
    } else {
        error.into()
    }
}
