//! A project's settings, as they were set.

use std::sync::Arc;

use serde_json::{Map, Value};
use sqlx::types::Json;

use super::{ProjectDb, ProjectTx, Result};
use crate::task::Settings;

impl ProjectDb {
    /// The settings. No round trip on a warm path.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn settings(&self) -> Result<Arc<Settings>> {
        if let Some(settings) = self.warm.settings(self.project, self.world) {
            return Ok(settings);
        }
        let generation = self.warm.generation();
        let body = sqlx::query_scalar!(
            r#"select body as "body: Json<Map<String, Value>>" from settings where project_id = $1"#,
            self.project
        )
        .fetch_optional(&self.aside)
        .await?;
        // They were checked when they were set, perhaps by a newer version.
        let settings = body
            .map(|Json(body)| Settings::restored(&body))
            .unwrap_or_default();
        let settings = Arc::new(settings);
        self.warm
            .keep_settings(generation, self.project, self.world, settings.clone());
        Ok(settings)
    }
}

impl ProjectTx {
    /// What was set, held against other changes until the commit.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn lock_settings(&mut self) -> Result<Map<String, Value>> {
        self.write_kept_task().await?;
        sqlx::query!(
            "insert into settings (project_id, body) values ($1, '{}') on conflict (project_id) do nothing",
            self.db.project
        )
        .execute(self.open().await?)
        .await?;
        let body = sqlx::query_scalar!(
            r#"select body as "body: Json<Map<String, Value>>" from settings where project_id = $1 for update"#,
            self.db.project
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(body.0)
    }

    /// Puts settings in place of the earlier ones.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn save_settings(&mut self, body: &Map<String, Value>) -> Result<()> {
        self.changes = true;
        sqlx::query!(
            "update settings set body = $2, updated_at = now() where project_id = $1",
            self.db.project,
            Json(body) as _
        )
        .execute(self.open().await?)
        .await?;
        Ok(())
    }
}
