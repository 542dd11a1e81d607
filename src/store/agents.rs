//! Agents: who answers.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use sqlx::types::Json;
use uuid::Uuid;

use super::{ProjectDb, ProjectTx, Result, StoreError};
use crate::ids::{Agent, Id};
use crate::task::Place;

/// An agent as it is stored.
#[derive(Debug, Clone)]
pub struct AgentRow {
    /// Its id.
    pub id: Id<Agent>,
    /// Its name, unique in the project.
    pub name: String,
    /// The team it is in.
    pub team: String,
    /// Every other field, as it was given.
    pub definition: Map<String, Value>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
}

impl AgentRow {
    /// A member of its definition that is a whole number, if it has it.
    pub fn number(&self, member: &str) -> Option<u64> {
        self.definition.get(member)?.as_u64()
    }
}

/// An agent to be made.
#[derive(Debug)]
pub struct NewAgent<'a> {
    /// Its name.
    pub name: &'a str,
    /// The team to put it in.
    pub team: &'a str,
    /// Every other field.
    pub definition: &'a Map<String, Value>,
}

struct Stored {
    id: Uuid,
    name: String,
    team: String,
    definition: Json<Map<String, Value>>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl From<Stored> for AgentRow {
    fn from(stored: Stored) -> Self {
        Self {
            id: stored.id.into(),
            name: stored.name,
            team: stored.team,
            definition: stored.definition.0,
            created_at: stored.created_at,
            updated_at: stored.updated_at,
        }
    }
}

impl ProjectDb {
    /// The project's agents by name, of one team or of all, after the name `after`, at most `limit`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn agents(
        &self,
        team: Option<&str>,
        after: Option<&str>,
        limit: i64,
    ) -> Result<Vec<AgentRow>> {
        let stored = sqlx::query_as!(
            Stored,
            r#"select id, name, team, definition as "definition: Json<Map<String, Value>>", created_at, updated_at
            from agents
            where project_id = $1
              and ($2::text is null or team = $2)
              and ($3::text is null or name > $3)
            order by name
            limit $4"#,
            self.project,
            team,
            after,
            limit
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(stored.into_iter().map(AgentRow::from).collect())
    }

    /// The agent with this name or id. No round trip on a warm path.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn agent(&self, name_or_id: &str) -> Result<Arc<AgentRow>> {
        if let Some(agent) = self.warm.agent(self.project, self.world, name_or_id) {
            return Ok(agent);
        }
        let generation = self.warm.generation();
        let id = name_or_id.parse::<Id<Agent>>().ok().map(Id::uuid);
        let stored = sqlx::query_as!(
            Stored,
            r#"select id, name, team, definition as "definition: Json<Map<String, Value>>", created_at, updated_at
            from agents
            where project_id = $1
              and (name = $2 or id = $3)
            order by name = $2 desc
            limit 1"#,
            self.project,
            name_or_id,
            id
        )
        .fetch_one(&self.aside)
        .await?;
        let agent = Arc::new(AgentRow::from(stored));
        self.warm.keep_agent(
            generation,
            self.project,
            self.world,
            name_or_id,
            agent.clone(),
        );
        Ok(agent)
    }
}

impl ProjectTx {
    /// Makes an agent.
    ///
    /// # Errors
    /// Constraints `agents_name_key` and `agents_team_fkey`.
    pub async fn create_agent(&mut self, new: &NewAgent<'_>) -> Result<AgentRow> {
        self.changes = true;
        let stored = sqlx::query_as!(
            Stored,
            r#"insert into agents (project_id, id, name, team, definition)
            values ($1, $2, $3, $4, $5)
            returning id, name, team, definition as "definition: Json<Map<String, Value>>", created_at, updated_at"#,
            self.db.project,
            Id::<Agent>::new().uuid(),
            new.name,
            new.team,
            Json(new.definition) as _
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(stored.into())
    }

    /// The agent with this name or id, held against other changes until the commit.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn lock_agent(&mut self, name_or_id: &str) -> Result<AgentRow> {
        self.write_kept_task().await?;
        let id = name_or_id.parse::<Id<Agent>>().ok().map(Id::uuid);
        let stored = sqlx::query_as!(
            Stored,
            r#"select id, name, team, definition as "definition: Json<Map<String, Value>>", created_at, updated_at
            from agents
            where project_id = $1
              and (name = $2 or id = $3)
            order by name = $2 desc
            limit 1
            for update"#,
            self.db.project,
            name_or_id,
            id
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(stored.into())
    }

    /// Makes an agent, unless there is one of its name.
    ///
    /// # Errors
    /// Constraint `agents_team_fkey`.
    pub async fn create_agent_unless_there(&mut self, new: &NewAgent<'_>) -> Result<()> {
        self.changes = true;
        sqlx::query!(
            "insert into agents (project_id, id, name, team, definition)
            values ($1, $2, $3, $4, $5)
            on conflict (project_id, name) do nothing",
            self.db.project,
            Id::<Agent>::new().uuid(),
            new.name,
            new.team,
            Json(new.definition) as _
        )
        .execute(self.open().await?)
        .await?;
        Ok(())
    }

    /// The names and ids of the agents that are called by one of these, names or ids; they cannot go before the commit.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn agents_named(
        &mut self,
        names_or_ids: &[String],
    ) -> Result<Vec<(String, Id<Agent>)>> {
        let ids: Vec<Uuid> = names_or_ids
            .iter()
            .filter_map(|id| id.parse::<Id<Agent>>().ok().map(Id::uuid))
            .collect();
        let rows = sqlx::query!(
            "select name, id from agents where project_id = $1 and (name = any($2) or id = any($3)) order by name for key share",
            self.db.project,
            names_or_ids,
            &ids
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| (row.name, row.id.into()))
            .collect())
    }

    /// The agents that go with a mission's run, held until the commit: those that it brought along, and those that others brought and
    /// its tasks used, so that whoever ends last sees them.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn volatile_agents(&mut self, group: &str, place: Place) -> Result<Vec<AgentRow>> {
        let stored = sqlx::query_as!(
            Stored,
            r#"select id, name, team, definition as "definition: Json<Map<String, Value>>", created_at, updated_at
            from agents
            where project_id = $1 and definition -> 'volatile' = 'true'::jsonb
              and (definition ->> 'missionGroup' = $2 or name in (
                select assign_to from tasks where project_id = $1 and mission_id = $3 and mission_run = $4
              ))
            order by name
            for update"#,
            self.db.project,
            group,
            place.mission.uuid(),
            place.run
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(stored.into_iter().map(AgentRow::from).collect())
    }

    /// The group of some unfinished task of an agent: its own title when it has none.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn unfinished_group(&mut self, agent: &str) -> Result<Option<String>> {
        Ok(sqlx::query_scalar!(
            r#"select coalesce(group_label, title) as "group!" from tasks
            where project_id = $1 and assign_to = $2 and status not in ('done', 'failed')
            order by id
            limit 1"#,
            self.db.project,
            agent
        )
        .fetch_optional(self.open().await?)
        .await?)
    }

    /// Puts an agent's fields and team in place of the earlier ones.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; constraint `agents_team_fkey`.
    pub async fn update_agent(
        &mut self,
        id: Id<Agent>,
        team: &str,
        definition: &Map<String, Value>,
    ) -> Result<AgentRow> {
        self.changes = true;
        let stored = sqlx::query_as!(
            Stored,
            r#"update agents
            set team = $3, definition = $4, updated_at = now()
            where project_id = $1 and id = $2
            returning id, name, team, definition as "definition: Json<Map<String, Value>>", created_at, updated_at"#,
            self.db.project,
            id.uuid(),
            team,
            Json(definition) as _
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(stored.into())
    }

    /// Removes the agent with this name or id. Its sessions stay.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn delete_agent(&mut self, name_or_id: &str) -> Result<()> {
        self.changes = true;
        let agent = self.lock_agent(name_or_id).await?;
        let deleted = sqlx::query!(
            "delete from agents where project_id = $1 and id = $2",
            self.db.project,
            agent.id.uuid()
        )
        .execute(self.open().await?)
        .await?;
        if deleted.rows_affected() == 0 {
            Err(StoreError::NotFound)
        } else {
            Ok(())
        }
    }
}
