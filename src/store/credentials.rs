//! A project's own keys for model providers, sealed.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Db, ProjectDb, Result, StoreError};

/// A credential as its owner may see it.
#[derive(Debug, Clone)]
pub struct CredentialRow {
    /// The provider's name.
    pub provider: String,
    /// What its owner calls it.
    pub label: Option<String>,
    /// Where the provider is, when not at its usual place.
    pub base_url: Option<String>,
    /// The key with its middle left out.
    pub masked_key: String,
    /// When it was set.
    pub updated_at: DateTime<Utc>,
}

/// A credential as the server uses it, still sealed.
#[derive(Debug, Clone)]
pub struct SealedCredential {
    /// The provider's name.
    pub provider: String,
    /// Where the provider is, when not at its usual place.
    pub base_url: Option<String>,
    /// Which master key sealed it.
    pub sealed_with: String,
    /// The sealed key.
    pub sealed_key: Vec<u8>,
}

impl Db {
    /// Sets a project's credential for one provider, in place of an earlier one.
    ///
    /// # Errors
    /// Constraint `credentials_project_fkey` when there is no such project.
    pub async fn set_credential(
        &self,
        project: Uuid,
        credential: &SealedCredential,
        label: Option<&str>,
        masked_key: &str,
    ) -> Result<CredentialRow> {
        let row = sqlx::query_as!(
            CredentialRow,
            r#"with stored as (
                insert into credentials (project_id, provider, label, base_url, masked_key, sealed_with, sealed_key)
                values ($1, $2, $3, $4, $5, $6, $7)
                on conflict (project_id, provider) do update
                set label = excluded.label, base_url = excluded.base_url, masked_key = excluded.masked_key,
                    sealed_with = excluded.sealed_with, sealed_key = excluded.sealed_key, updated_at = now()
                returning *
            ), told as (
                insert into changes (project_id) select project_id from stored
            )
            select provider as "provider!", label, base_url, masked_key as "masked_key!", updated_at as "updated_at!"
            from stored"#,
            project,
            credential.provider,
            label,
            credential.base_url,
            masked_key,
            credential.sealed_with,
            credential.sealed_key
        )
        .fetch_one(&self.platform)
        .await?;
        self.warm.forget(project);
        Ok(row)
    }

    /// A project's credentials by provider; there are few, and a provider has one.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn credentials(&self, project: Uuid) -> Result<Vec<CredentialRow>> {
        Ok(sqlx::query_as!(
            CredentialRow,
            "select provider, label, base_url, masked_key, updated_at
            from credentials
            where project_id = $1
            order by provider
            limit 1000",
            project
        )
        .fetch_all(&self.platform)
        .await?)
    }

    /// Removes a project's credential for a provider.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn delete_credential(&self, project: Uuid, provider: &str) -> Result<()> {
        let deleted = sqlx::query!(
            "with gone as (
                delete from credentials where project_id = $1 and provider = $2 returning project_id
            )
            insert into changes (project_id) select project_id from gone",
            project,
            provider
        )
        .execute(&self.platform)
        .await?;
        self.warm.forget(project);
        if deleted.rows_affected() == 0 {
            Err(StoreError::NotFound)
        } else {
            Ok(())
        }
    }

    /// The credentials that a request of this project may use. No round trip on a warm path.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn sealed_credentials(&self, door: &ProjectDb) -> Result<Arc<Vec<SealedCredential>>> {
        if let Some(credentials) = self.warm.credentials(door.project) {
            return Ok(credentials);
        }
        let generation = self.warm.generation();
        let credentials = sqlx::query_as!(
            SealedCredential,
            "select provider, base_url, sealed_with, sealed_key
            from credentials
            where project_id = $1
            order by provider
            limit 1000",
            door.project
        )
        .fetch_all(&self.platform)
        .await?;
        let credentials = Arc::new(credentials);
        self.warm
            .keep_credentials(generation, door.project, credentials.clone());
        Ok(credentials)
    }
}
