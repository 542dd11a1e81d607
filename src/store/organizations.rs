//! Organizations: who owns projects.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Db, Result};

/// An organization.
#[derive(Debug, Clone)]
pub struct OrganizationRow {
    /// Its id.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// Its unique short name.
    pub slug: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

impl Db {
    /// Organizations after `after` by id, at most `limit`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn organizations(
        &self,
        after: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<OrganizationRow>> {
        Ok(sqlx::query_as!(
            OrganizationRow,
            "select id, name, slug, created_at
            from organizations
            where $1::uuid is null or id > $1
            order by id
            limit $2",
            after,
            limit
        )
        .fetch_all(&self.platform)
        .await?)
    }

    /// Makes an organization.
    ///
    /// # Errors
    /// Constraint `organizations_slug_key` when the slug is taken.
    pub async fn create_organization(&self, name: &str, slug: &str) -> Result<OrganizationRow> {
        Ok(sqlx::query_as!(
            OrganizationRow,
            "insert into organizations (id, name, slug)
            values ($1, $2, $3)
            returning id, name, slug, created_at",
            Uuid::now_v7(),
            name,
            slug
        )
        .fetch_one(&self.platform)
        .await?)
    }
}
