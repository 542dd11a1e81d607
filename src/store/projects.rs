//! Projects: the tenants.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Db, ProjectDb, Result, StoreError, World};

/// A project.
#[derive(Debug, Clone)]
pub struct ProjectRow {
    /// Its id.
    pub id: Uuid,
    /// The organization it belongs to.
    pub org_id: Uuid,
    /// Its name.
    pub name: String,
    /// Its unique short name.
    pub slug: String,
    /// Whether its keys open anything.
    pub status: ProjectStatus,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
}

/// Whether a project's keys open anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProjectStatus {
    /// They do.
    Active,
    /// They are refused until the project is active again.
    Suspended,
    /// They are refused while its rows are being purged.
    Deleted,
}

impl ProjectStatus {
    fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Suspended => "suspended",
            Self::Deleted => "deleted",
        }
    }
}

impl From<String> for ProjectStatus {
    /// The column's check admits these words only; a stranger counts as suspended, the safe side.
    fn from(text: String) -> Self {
        match text.as_str() {
            "active" => Self::Active,
            "deleted" => Self::Deleted,
            _ => Self::Suspended,
        }
    }
}

impl Db {
    /// Projects after `after` by id, of one organization or of all, at most `limit`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn projects(
        &self,
        org: Option<Uuid>,
        after: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<ProjectRow>> {
        Ok(sqlx::query_as!(
            ProjectRow,
            "select id, org_id, name, slug, status, created_at, updated_at
            from projects
            where ($1::uuid is null or org_id = $1)
              and ($2::uuid is null or id > $2)
            order by id
            limit $3",
            org,
            after,
            limit
        )
        .fetch_all(&self.platform)
        .await?)
    }

    /// One project.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn project_row(&self, id: Uuid) -> Result<ProjectRow> {
        Ok(sqlx::query_as!(
            ProjectRow,
            "select id, org_id, name, slug, status, created_at, updated_at from projects where id = $1",
            id
        )
        .fetch_one(&self.platform)
        .await?)
    }

    /// Makes a project.
    ///
    /// # Errors
    /// Constraints `projects_slug_key` and `projects_org_fkey`.
    pub async fn create_project(&self, org: Uuid, name: &str, slug: &str) -> Result<ProjectRow> {
        Ok(sqlx::query_as!(
            ProjectRow,
            "insert into projects (id, org_id, name, slug)
            values ($1, $2, $3, $4)
            returning id, org_id, name, slug, status, created_at, updated_at",
            Uuid::now_v7(),
            org,
            name,
            slug
        )
        .fetch_one(&self.platform)
        .await?)
    }

    /// Renames a project or changes its status; `None` leaves a value as it is.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn update_project(
        &self,
        id: Uuid,
        name: Option<&str>,
        status: Option<ProjectStatus>,
    ) -> Result<ProjectRow> {
        let row = sqlx::query_as!(
            ProjectRow,
            r#"with changed as (
                update projects
                set name = coalesce($2, name), status = coalesce($3, status), updated_at = now()
                where id = $1
                returning *
            ), told as (
                insert into changes (project_id) select id from changed
            )
            select id as "id!", org_id as "org_id!", name as "name!", slug as "slug!", status as "status!",
                   created_at as "created_at!", updated_at as "updated_at!"
            from changed"#,
            id,
            name,
            status.map(ProjectStatus::as_str)
        )
        .fetch_one(&self.platform)
        .await?;
        self.warm.forget(id);
        if status == Some(ProjectStatus::Active) {
            for world in World::ALL {
                self.project(id, world).wake_resumed().await?;
            }
        }
        Ok(row)
    }

    /// Whether a project's work rests: it is suspended, or gone. No round trip on a warm path.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn is_suspended(&self, project: Uuid) -> Result<bool> {
        if let Some(suspended) = self.warm.suspended(project) {
            return Ok(suspended);
        }
        let generation = self.warm.generation();
        let active = sqlx::query_scalar!(
            r#"select exists (select from projects where id = $1 and status = 'active') as "active!""#,
            project
        )
        .fetch_one(&self.platform)
        .await?;
        self.warm.keep_suspended(generation, project, !active);
        Ok(!active)
    }

    /// Removes a project and everything of it. Its keys are refused from the first step on.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]. A failure half-way leaves the project `deleted`; the same call again ends it.
    pub async fn purge_project(&self, id: Uuid) -> Result<()> {
        self.update_project(id, None, Some(ProjectStatus::Deleted))
            .await?;
        for world in World::ALL {
            self.project(id, world).purge().await?;
        }
        let deleted = sqlx::query!("delete from projects where id = $1", id)
            .execute(&self.platform)
            .await?;
        if deleted.rows_affected() == 0 {
            Err(StoreError::NotFound)
        } else {
            Ok(())
        }
    }

    /// The door to an active project's live world, for the admin.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is no such active project.
    pub async fn admin_door(&self, id: Uuid) -> Result<ProjectDb> {
        let row = self.project_row(id).await?;
        match row.status {
            ProjectStatus::Active => Ok(self.project(id, World::Live)),
            ProjectStatus::Suspended | ProjectStatus::Deleted => Err(StoreError::NotFound),
        }
    }
}

impl ProjectDb {
    async fn purge(&self) -> Result<()> {
        let mut tx = self.pool.begin().await?;
        // In the order in which deeds lock rows: some may still be going on. What belongs to these goes with them.
        sqlx::query!("delete from tasks where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        sqlx::query!("delete from missions where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        sqlx::query!("delete from jobs where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        sqlx::query!("delete from webhooks where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        sqlx::query!("delete from approvals where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        sqlx::query!("delete from words where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        sqlx::query!("delete from runs where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        sqlx::query!(
            "delete from model_calls where project_id = $1",
            self.project
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query!("delete from playbooks where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        sqlx::query!("delete from agents where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        sqlx::query!("delete from teams where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        sqlx::query!("delete from settings where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        sqlx::query!("delete from sessions where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        sqlx::query!("delete from memories where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        sqlx::query!(
            "delete from event_heads where project_id = $1",
            self.project
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query!("delete from events where project_id = $1", self.project)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(())
    }
}
