//! Playbooks, by their names.

use serde_json::Value;
use sqlx::types::Json;

use super::{ProjectDb, ProjectTx, Result, StoreError};

/// What a list shows of a playbook.
#[derive(Debug, Clone)]
pub struct PlaybookSummary {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub description: String,
    /// What can be filled in, as it was checked.
    pub parameters: Value,
}

impl ProjectDb {
    /// At most `limit` playbooks by name, from the one after `after`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn playbooks(&self, after: Option<&str>, limit: i64) -> Result<Vec<PlaybookSummary>> {
        // The bodies stay where they are: they are up to a megabyte each.
        Ok(sqlx::query_as!(
            PlaybookSummary,
            r#"select name, body->>'description' as "description!", body->'parameters' as "parameters!"
            from playbooks
            where project_id = $1 and ($2::text is null or name > $2)
            order by name
            limit $3"#,
            self.project,
            after,
            limit
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// One playbook's body.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn playbook(&self, name: &str) -> Result<Value> {
        Ok(sqlx::query_scalar!(
            "select body from playbooks where project_id = $1 and name = $2",
            self.project,
            name
        )
        .fetch_one(&self.pool)
        .await?)
    }
}

impl ProjectTx {
    /// Makes a playbook or puts it in place of the one with its name. `false` when the project has `most` others, and
    /// nothing is stored.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn save_playbook(&mut self, name: &str, body: &Value, most: i64) -> Result<bool> {
        // One at a time in a project, or two could both be the last.
        sqlx::query!(
            r#"select pg_advisory_xact_lock(hashtextextended($1, 0))::text as "locked""#,
            format!("playbooks of {}", self.db.project)
        )
        .fetch_one(self.open().await?)
        .await?;
        let saved = sqlx::query!(
            "insert into playbooks (project_id, name, body)
            select $1, $2, $3
            where (select count(*) from playbooks where project_id = $1 and name <> $2) < $4
            on conflict (project_id, name) do update set body = excluded.body, updated_at = now()",
            self.db.project,
            name,
            Json(body) as _,
            most
        )
        .execute(self.open().await?)
        .await?;
        Ok(saved.rows_affected() > 0)
    }

    /// Removes a playbook.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn delete_playbook(&mut self, name: &str) -> Result<()> {
        let deleted = sqlx::query!(
            "delete from playbooks where project_id = $1 and name = $2",
            self.db.project,
            name
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
