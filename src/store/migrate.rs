//! Brings the three schemas to this program's version, and says whether they are.

use std::str::FromStr;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, Executor, PgConnection};

use super::Db;

static PLATFORM: Migrator = sqlx::migrate!("migrations/platform");
static WORLD: Migrator = sqlx::migrate!("migrations/world");

/// Held while migrating, so that processes that start together take turns. Any fixed number would do.
const LOCK: i64 = 0x706f_6c70_6f00;

/// Why the database was not migrated.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// An older program must not touch a newer database.
    #[error("it was migrated by a newer polpo: run that version")]
    Ahead,
    /// It cannot be reached, or refuses.
    // No `#[source]`: its words hold its causes already.
    #[error("{0}")]
    Failed(MigrateError),
}

impl From<MigrateError> for MigrationError {
    fn from(error: MigrateError) -> Self {
        match error {
            MigrateError::VersionMissing(_) => Self::Ahead,
            error => Self::Failed(error),
        }
    }
}

impl From<sqlx::Error> for MigrationError {
    fn from(error: sqlx::Error) -> Self {
        Self::Failed(error.into())
    }
}

/// Applies what is missing to all three schemas. Safe to run from several processes at once.
///
/// # Errors
/// [`MigrationError`].
pub async fn migrate(url: &str) -> Result<(), MigrationError> {
    let mut connection = PgConnectOptions::from_str(url)?.connect().await?;
    sqlx::query("select pg_advisory_lock($1)")
        .bind(LOCK)
        .execute(&mut connection)
        .await?;
    apply(
        &mut connection,
        "create schema if not exists platform",
        "set search_path = platform",
        &PLATFORM,
    )
    .await?;
    apply(
        &mut connection,
        "create schema if not exists production",
        "set search_path = production",
        &WORLD,
    )
    .await?;
    apply(
        &mut connection,
        "create schema if not exists sandbox",
        "set search_path = sandbox",
        &WORLD,
    )
    .await?;
    // The lock goes with the session.
    connection.close().await?;
    Ok(())
}

async fn apply(
    connection: &mut PgConnection,
    create: &'static str,
    enter: &'static str,
    migrator: &Migrator,
) -> Result<(), MigrateError> {
    connection.execute(create).await?;
    connection.execute(enter).await?;
    migrator.run(connection).await
}

/// Connects once, so that what keeps the program from its database is told in Postgres' own words; a pool
/// would only say that it had to wait.
///
/// # Errors
/// Why the database cannot be reached.
pub async fn reach(url: &str) -> Result<(), sqlx::Error> {
    let connection = PgConnectOptions::from_str(url)?.connect().await?;
    connection.close().await
}

/// How the database stands to this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrationState {
    /// Every migration of this program, and no other, is applied.
    Current,
    /// Some are missing: run `polpo migrate`.
    Behind,
    /// It has some that this program does not know: run a newer program.
    Ahead,
}

/// Compares the newest applied migration of each schema with this program's.
///
/// # Errors
/// When the database cannot be reached. A database never migrated is [`MigrationState::Behind`].
pub async fn migration_state(db: &Db) -> Result<MigrationState, sqlx::Error> {
    let mut state = MigrationState::Current;
    for (pool, migrator) in [
        (&db.platform, &PLATFORM),
        (&db.live, &WORLD),
        (&db.test, &WORLD),
    ] {
        let applied: Result<Option<i64>, sqlx::Error> =
            sqlx::query_scalar("select max(version) from _sqlx_migrations where success")
                .fetch_one(pool)
                .await;
        let applied = match applied {
            Ok(version) => version,
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01") => None,
            Err(error) => return Err(error),
        };
        let newest = migrator.iter().map(|migration| migration.version).max();
        if applied > newest {
            return Ok(MigrationState::Ahead);
        }
        if applied < newest {
            state = MigrationState::Behind;
        }
    }
    Ok(state)
}
