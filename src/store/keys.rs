//! API keys: what opens a project.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Db, ProjectDb, Result, StoreError, World};

/// The SHA-256 of a key, which is all of it that is stored.
pub type KeyHash = [u8; 32];

/// A key without its secret.
#[derive(Debug, Clone)]
pub struct KeyRow {
    /// Its id.
    pub id: Uuid,
    /// The project it opens.
    pub project_id: Uuid,
    /// What its owner calls it.
    pub name: String,
    /// The world it opens: `live` or `test`.
    pub environment: String,
    /// The letters it begins with.
    pub prefix: String,
    /// The four letters it ends with.
    pub last_four: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last opened a request, to some ten seconds.
    pub last_used_at: Option<DateTime<Utc>>,
}

/// A key to be stored.
#[derive(Debug)]
pub struct NewKey<'a> {
    /// The project it opens.
    pub project: Uuid,
    /// What its owner calls it.
    pub name: &'a str,
    /// The world it opens.
    pub world: World,
    /// Its hash.
    pub hash: KeyHash,
    /// The letters it begins with.
    pub prefix: &'a str,
    /// The four letters it ends with.
    pub last_four: &'a str,
}

impl Db {
    /// The door that a key opens, and the key's id. No round trip for a key seen in the last second or so.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when the key is unknown, revoked, of the other world, or its project is not active.
    pub async fn authenticate(&self, world: World, hash: KeyHash) -> Result<(Uuid, ProjectDb)> {
        let key = match self.warm.key(&hash) {
            Some(key) => key,
            None => self.load_key(hash).await?,
        };
        if key.environment != world.as_str() {
            return Err(StoreError::NotFound);
        }
        self.warm.note_use(key.id);
        Ok((key.id, self.project(key.project_id, world)))
    }

    async fn load_key(&self, hash: KeyHash) -> Result<Arc<KeyRow>> {
        let generation = self.warm.generation();
        let key = sqlx::query_as!(
            KeyRow,
            "select k.id, k.project_id, k.name, k.environment, k.prefix, k.last_four, k.created_at, k.last_used_at
            from api_keys k
            join projects p on p.id = k.project_id
            where k.hash = $1
              and p.status = 'active'",
            &hash[..]
        )
        .fetch_one(&self.platform)
        .await?;
        let key = Arc::new(key);
        self.warm.keep_key(generation, hash, key.clone());
        Ok(key)
    }

    /// A project's keys after `after` by id, at most `limit`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn keys(
        &self,
        project: Uuid,
        after: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<KeyRow>> {
        Ok(sqlx::query_as!(
            KeyRow,
            "select id, project_id, name, environment, prefix, last_four, created_at, last_used_at
            from api_keys
            where project_id = $1
              and ($2::uuid is null or id > $2)
            order by id
            limit $3",
            project,
            after,
            limit
        )
        .fetch_all(&self.platform)
        .await?)
    }

    /// Stores a key.
    ///
    /// # Errors
    /// Constraint `api_keys_project_fkey` when there is no such project.
    pub async fn create_key(&self, new: &NewKey<'_>) -> Result<KeyRow> {
        Ok(sqlx::query_as!(
            KeyRow,
            "insert into api_keys (id, project_id, name, environment, hash, prefix, last_four)
            values ($1, $2, $3, $4, $5, $6, $7)
            returning id, project_id, name, environment, prefix, last_four, created_at, last_used_at",
            Uuid::now_v7(),
            new.project,
            new.name,
            new.world.as_str(),
            &new.hash[..],
            new.prefix,
            new.last_four
        )
        .fetch_one(&self.platform)
        .await?)
    }

    /// Revokes a key: it is gone, and refused from now on.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn revoke_key(&self, id: Uuid) -> Result<()> {
        let project = sqlx::query_scalar!(
            r#"with revoked as (
                delete from api_keys where id = $1 returning project_id
            ), told as (
                insert into changes (project_id) select project_id from revoked
            )
            select project_id as "project_id!" from revoked"#,
            id
        )
        .fetch_one(&self.platform)
        .await?;
        self.warm.forget(project);
        Ok(())
    }
}
