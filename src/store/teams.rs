//! Teams: names that group a project's agents.

use chrono::{DateTime, Utc};

use super::{ProjectDb, ProjectTx, Result, StoreError};

/// A team.
#[derive(Debug, Clone)]
pub struct TeamRow {
    /// Its name, unique in the project.
    pub name: String,
    /// What it is for.
    pub description: Option<String>,
    /// When it was made; the earliest is the project's first team.
    pub created_at: DateTime<Utc>,
}

impl ProjectDb {
    /// The project's teams, oldest first, at most `limit`, after the team named `after`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn teams(&self, after: Option<&str>, limit: i64) -> Result<Vec<TeamRow>> {
        Ok(sqlx::query_as!(
            TeamRow,
            "select name, description, created_at
            from teams
            where project_id = $1
              and ($2::text is null
                   or (created_at, name) > (select created_at, name from teams where project_id = $1 and name = $2))
            order by created_at, name
            limit $3",
            self.project,
            after,
            limit
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// One team.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn team(&self, name: &str) -> Result<TeamRow> {
        Ok(sqlx::query_as!(
            TeamRow,
            "select name, description, created_at from teams where project_id = $1 and name = $2",
            self.project,
            name
        )
        .fetch_one(&self.pool)
        .await?)
    }
}

impl ProjectTx {
    /// Makes a team.
    ///
    /// # Errors
    /// Constraint `teams_pkey` when the name is taken.
    pub async fn create_team(&mut self, name: &str, description: Option<&str>) -> Result<TeamRow> {
        self.changes = true;
        Ok(sqlx::query_as!(
            TeamRow,
            "insert into teams (project_id, name, description)
            values ($1, $2, $3)
            returning name, description, created_at",
            self.db.project,
            name,
            description
        )
        .fetch_one(self.open().await?)
        .await?)
    }

    /// The project's first team, made as `default` when it has none.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn first_team(&mut self) -> Result<String> {
        let first = sqlx::query_scalar!(
            "select name from teams where project_id = $1 order by created_at, name limit 1",
            self.db.project
        )
        .fetch_optional(self.open().await?)
        .await?;
        match first {
            Some(name) => Ok(name),
            None => self.ensure_default_team().await,
        }
    }

    async fn ensure_default_team(&mut self) -> Result<String> {
        sqlx::query!(
            "insert into teams (project_id, name, description)
            values ($1, 'default', 'Default team')
            on conflict (project_id, name) do nothing",
            self.db.project
        )
        .execute(self.open().await?)
        .await?;
        Ok("default".to_owned())
    }

    /// Renames a team or describes it anew; its agents move along. `None` leaves a value as it is.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; constraint `teams_pkey` when the new name is taken.
    pub async fn update_team(
        &mut self,
        old_name: &str,
        name: &str,
        description: Option<&str>,
    ) -> Result<TeamRow> {
        self.changes = true;
        Ok(sqlx::query_as!(
            TeamRow,
            "update teams
            set name = $3, description = coalesce($4, description)
            where project_id = $1 and name = $2
            returning name, description, created_at",
            self.db.project,
            old_name,
            name,
            description
        )
        .fetch_one(self.open().await?)
        .await?)
    }

    /// Removes a team; its agents move to `default`, or, when it is that team itself, to the first of the others.
    /// `false` when it is the last team, which stays.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn delete_team(&mut self, name: &str) -> Result<bool> {
        self.changes = true;
        let teams = sqlx::query_scalar!(
            "select name from teams where project_id = $1 order by created_at, name for update",
            self.db.project
        )
        .fetch_all(self.open().await?)
        .await?;
        if !teams.iter().any(|team| team == name) {
            return Err(StoreError::NotFound);
        }
        let Some(other) = teams.iter().find(|team| *team != name) else {
            return Ok(false);
        };
        let heir = if name == "default" {
            other.clone()
        } else {
            self.ensure_default_team().await?
        };
        sqlx::query!(
            "update agents set team = $3, updated_at = now() where project_id = $1 and team = $2",
            self.db.project,
            name,
            heir
        )
        .execute(self.open().await?)
        .await?;
        sqlx::query!(
            "delete from teams where project_id = $1 and name = $2",
            self.db.project,
            name
        )
        .execute(self.open().await?)
        .await?;
        Ok(true)
    }
}
