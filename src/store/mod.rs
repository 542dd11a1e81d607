//! Postgres: all SQL of the program, one file per resource.
//!
//! Nothing outside this room can reach a pool. Rows of a project are reached through
//! [`ProjectDb`] alone, which comes from a valid key or from the platform's admin.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Executor, PgConnection, PgPool};
use uuid::Uuid;

use crate::event::Event;
use crate::ids::{Id, Mission};

mod agents;
mod approvals;
mod barriers;
mod closing;
mod credentials;
mod deliveries;
mod dependencies;
mod events;
mod jobs;
mod keys;
mod memories;
mod migrate;
mod mission_runs;
mod mission_tasks;
mod missions;
mod organizations;
mod parking;
mod playbooks;
mod projects;
mod runs;
mod schedules;
mod sessions;
mod settings;
mod silence;
mod statistics;
mod steps;
mod tasks;
mod teams;
mod turns;
mod wake;
mod warm;
mod webhooks;

pub use agents::{AgentRow, NewAgent};
pub use approvals::{ApprovalRow, NewApproval, Waiting, Withdrawn};
pub use barriers::{BarrierRow, BarrierState, NewBarrier};
use closing::{Assumed, Closing};
pub use credentials::{CredentialRow, SealedCredential};
pub use deliveries::{
    AttemptRow, DeliveryFilter, DeliveryRow, Health, NewAttempt, NewDelivery, Route,
};
pub use dependencies::{Need, NeedResult};
use events::Logs;
pub use events::{EventPage, EventRange, EventRow, HeardRow, Stream};
pub use jobs::{Claimed, Holder, Job, LEASE, LONG_ENOUGH, Lane, Lease, Room, Standing, until};
pub use keys::{KeyHash, KeyRow, NewKey};
pub use memories::{MEMORY_LIMIT, Memories, MemoryOwner};
pub use migrate::{MigrationError, MigrationState, migrate, migration_state, reach};
pub use mission_runs::{MissionRunRow, NewMissionRun, Outlook, Tally};
pub use mission_tasks::Sibling;
pub use missions::MissionRow;
pub use organizations::OrganizationRow;
pub use parking::{SUSPENDED, SWITCHED_OFF};
pub use playbooks::PlaybookSummary;
pub use projects::{ProjectRow, ProjectStatus};
pub use runs::{ProcessRow, RunRow, TranscriptRow, Words};
pub use schedules::ScheduleRow;
pub use sessions::{MessageRow, NewMessage, SessionFilter, SessionRow};
use silence::Silence;
pub use steps::{NewStep, StepKind, StepRow};
pub use tasks::{DeletedTask, TaskFilter, TaskPage, storable};
pub use teams::TeamRow;
pub use turns::{CallUsage, RunStatus, TurnRecord};
use wake::Bell;
pub use wake::Topic;
use warm::Warm;
pub use webhooks::{NewWebhook, SealedSecret, WebhookRow};

/// Which of a project's two data sets a key opens. Decided by the key, never by a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum World {
    /// Production data, opened by `sk_live_` keys.
    Live,
    /// The sandbox, opened by `sk_test_` keys.
    Test,
}

impl World {
    /// Both, in the order in which they are migrated.
    pub const ALL: [Self; 2] = [Self::Live, Self::Test];

    fn schema(self) -> &'static str {
        match self {
            Self::Live => "production",
            Self::Test => "sandbox",
        }
    }

    /// The word for it on the wire and in the `api_keys` table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Test => "test",
        }
    }
}

/// Why the store did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No such row, or it is another project's, which is the same to the caller.
    #[error("not found")]
    NotFound,
    /// Someone else has the job, or it was called off: what was done for it must not be written.
    #[error("the lease is lost")]
    LeaseLost,
    /// What the change was made from has changed since, or the lease is lost: it is to be made again from what is there now, see
    /// [`ProjectTx::assume`]. Nothing was written.
    #[error("it has changed since it was read")]
    Stale,
    /// A constraint, by its name, refuses the change.
    #[error("constraint {0} refuses the change")]
    Constraint(String),
    /// The database cannot be reached or has no connection to spare; it may soon.
    #[error("the database is unavailable: {0}")]
    Unavailable(sqlx::Error),
    /// Anything else, which is a defect of ours.
    #[error("the database refused a statement: {0}")]
    Unexpected(sqlx::Error),
}

impl StoreError {
    /// Whether a memory would have become larger than [`MEMORY_LIMIT`].
    pub fn is_memory_too_large(&self) -> bool {
        self.is_constraint(memories::SIZE)
    }

    /// Whether the named constraint refused the change.
    pub fn is_constraint(&self, name: &str) -> bool {
        matches!(self, Self::Constraint(constraint) if constraint == name)
    }

    /// Whether a turn was not recorded because it is on record: it was, and only the answer got lost. Its session is written before its run.
    pub fn is_recorded_turn(&self) -> bool {
        self.is_constraint("sessions_pkey") || self.is_constraint("runs_pkey")
    }

    /// Whether a step was not recorded because it is on record: it was, and only the answer got lost. Whichever of its rows is written
    /// first is the one that is refused.
    pub fn is_recorded_step(&self) -> bool {
        self.is_constraint("steps_pkey") || self.is_constraint("model_calls_pkey")
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::RowNotFound => Self::NotFound,
            sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::Io(_) => {
                Self::Unavailable(error)
            }
            sqlx::Error::Database(database) => match (database.constraint(), database.code()) {
                (Some(constraint), _) => Self::Constraint(constraint.to_owned()),
                // Classes 08 (connection), 40 (a deadlock was broken up), 53 (resources) and 57 (operator
                // intervention: shutdown, start-up); and a transaction that was idle for too long.
                (None, Some(code))
                    if ["08", "40", "53", "57", "25P03"]
                        .iter()
                        .any(|class| code.starts_with(class)) =>
                {
                    Self::Unavailable(error)
                }
                _ => Self::Unexpected(error),
            },
            _ => Self::Unexpected(error),
        }
    }
}

/// The result of a statement.
pub type Result<T> = std::result::Result<T, StoreError>;

/// How many connections the program may hold, and how long a request waits for one.
#[derive(Debug, Clone, Copy)]
pub struct PoolSettings {
    /// The most connections to each of the two worlds.
    pub world_connections: u32,
    /// The most connections to the platform's tables.
    pub platform_connections: u32,
    /// How long a request waits for a connection before it is answered 503.
    pub acquire_timeout: Duration,
    /// How long anyone waits for an answer, see [`Db::in_time`].
    pub patience: Duration,
}

/// The connections to a world for what is read in the middle of a change. Most of that is known without asking.
const ASIDE: u32 = 2;
/// The connections to a world for the engine's claims and leases, which must not wait behind the work that they hand out. Not those above: a
/// heartbeat waits for a change that holds the job's row, and that change may have something to read.
const CLAIMS: u32 = 3;

/// A transaction whose process has stopped in the middle of it is ended before the leases of that process can be, see [`LONG_ENOUGH`]: what
/// it holds would keep others from taking over. Nothing of ours rests in a transaction.
const ABANDONED: &str = "set idle_in_transaction_session_timeout = '5s'";

/// A connection that was idle for so long is asked whether it lives before it is used.
const RESTED: Duration = Duration::from_secs(1);

/// The database: one pool per schema, each with its `search_path` fixed at connect,
/// so a plain table name never reaches another schema (`tests/house.rs` refuses qualified ones).
#[derive(Debug, Clone)]
pub struct Db {
    platform: PgPool,
    live: PgPool,
    test: PgPool,
    /// See [`ProjectDb::aside`].
    live_aside: PgPool,
    test_aside: PgPool,
    /// See [`CLAIMS`].
    live_claims: PgPool,
    test_claims: PgPool,
    /// For the connections that are kept for as long as the process lives, and are nobody else's before or after: one listens, one holds its lock.
    standing: PgConnectOptions,
    silence: Arc<Silence>,
    warm: Arc<Warm>,
    bell: Arc<Bell>,
    logs: Arc<Logs>,
}

impl Db {
    /// What the database's clock says.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub async fn now(&self) -> Result<DateTime<Utc>> {
        let now = sqlx::query_scalar!(r#"select clock_timestamp() as "now!""#);
        Ok(now.fetch_one(&self.platform).await?)
    }

    /// Opens the pools. Connections are made when they are first needed.
    ///
    /// # Errors
    /// When `url` is not a Postgres URL.
    pub fn open(url: &str, settings: PoolSettings) -> std::result::Result<Self, sqlx::Error> {
        let options = PgConnectOptions::from_str(url)?.application_name("polpo");
        let silence = Arc::new(Silence::new(settings.patience));
        let pool = |schema: &'static str, most: u32| {
            let (rested, returned) = (silence.clone(), silence.clone());
            PgPoolOptions::new()
                .max_connections(most)
                .acquire_timeout(settings.acquire_timeout)
                // To ask each time would cost every statement a round trip. One that has rested may have died of a database that was restarted, or of
                // something between us and it; nobody's request is to find that out.
                .test_before_acquire(false)
                .before_acquire(move |connection, at| {
                    let silence = rested.clone();
                    Box::pin(async move {
                        Ok(at.idle_for < RESTED || silence.check_rested(connection).await?)
                    })
                })
                .after_release(move |connection, _| {
                    let silence = returned.clone();
                    Box::pin(async move { silence.check_returned(connection).await })
                })
                .after_connect(move |connection, _| {
                    Box::pin(async move {
                        let set = match schema {
                            "platform" => "set search_path = platform",
                            "production" => "set search_path = production",
                            _ => "set search_path = sandbox",
                        };
                        connection.execute(set).await?;
                        connection.execute(ABANDONED).await.map(drop)
                    })
                })
                .connect_lazy_with(options.clone())
        };
        Ok(Self {
            platform: pool("platform", settings.platform_connections),
            live: pool(World::Live.schema(), settings.world_connections),
            test: pool(World::Test.schema(), settings.world_connections),
            live_aside: pool(World::Live.schema(), ASIDE),
            test_aside: pool(World::Test.schema(), ASIDE),
            live_claims: pool(World::Live.schema(), CLAIMS),
            test_claims: pool(World::Test.schema(), CLAIMS),
            standing: options,
            silence: silence.clone(),
            warm: Arc::default(),
            bell: Arc::default(),
            logs: Arc::default(),
        })
    }

    fn world(&self, world: World) -> &PgPool {
        match world {
            World::Live => &self.live,
            World::Test => &self.test,
        }
    }

    fn claims(&self, world: World) -> &PgPool {
        match world {
            World::Live => &self.live_claims,
            World::Test => &self.test_claims,
        }
    }

    /// Closes every connection, after the statements under way.
    pub async fn close(&self) {
        tokio::join!(
            self.platform.close(),
            self.live.close(),
            self.test.close(),
            self.live_aside.close(),
            self.test_aside.close(),
            self.live_claims.close(),
            self.test_claims.close()
        );
    }

    /// The door to one project's rows. Private: it opens only for a key or the admin.
    fn project(&self, project: Uuid, world: World) -> ProjectDb {
        ProjectDb {
            pool: self.world(world).clone(),
            aside: match world {
                World::Live => self.live_aside.clone(),
                World::Test => self.test_aside.clone(),
            },
            project,
            world,
            silence: self.silence.clone(),
            warm: self.warm.clone(),
            bell: self.bell.clone(),
            logs: self.logs.clone(),
        }
    }
}

/// One project's rows in one world: the only door to tenant tables.
#[derive(Debug, Clone)]
pub struct ProjectDb {
    pool: PgPool,
    /// For what is read while a change of ours may be open: were it read through `pool`, changes that have all of its connections
    /// would wait for one more, and so for each other.
    aside: PgPool,
    project: Uuid,
    world: World,
    silence: Arc<Silence>,
    warm: Arc<Warm>,
    bell: Arc<Bell>,
    logs: Arc<Logs>,
}

impl ProjectDb {
    /// The project whose rows these are.
    pub fn project(&self) -> Uuid {
        self.project
    }

    /// The world whose rows these are.
    pub fn world(&self) -> World {
        self.world
    }

    /// A change. Everything done through it commits together or not at all. Its transaction begins with the first statement, so
    /// that a change of one statement needs none.
    pub fn begin(&self) -> ProjectTx {
        ProjectTx {
            tx: None,
            db: self.clone(),
            closing: Closing::default(),
            fenced: None,
            assumed: None,
            events: Vec::new(),
            called_off: Vec::new(),
            left_parked: Vec::new(),
            stops: Vec::new(),
            changed: Vec::new(),
            tells: false,
            rings_jobs: false,
            rings_couriers: false,
            rings_timers: false,
            changes: false,
        }
    }
}

/// A change to one project.
#[derive(Debug)]
pub struct ProjectTx {
    tx: Option<sqlx::Transaction<'static, sqlx::Postgres>>,
    db: ProjectDb,
    /// What is written last, with the events.
    closing: Closing,
    /// The job and its lease that fence this change: its row is locked, or will be with the first statement.
    fenced: Option<(Job, i64)>,
    /// What the change takes for granted, until a statement has proved it.
    assumed: Option<Assumed>,
    /// What the commit tells.
    events: Vec<Event>,
    /// Jobs that are owed no longer.
    called_off: Vec<Job>,
    /// Missions that go on, of whose parked jobs someone else had hold.
    left_parked: Vec<Id<Mission>>,
    /// Tasks whose runs are to stop.
    stops: Vec<Uuid>,
    /// Tasks that have changed, for those who follow one.
    changed: Vec<Uuid>,
    /// Whether events were stored.
    tells: bool,
    /// Whether there is work that was not there before.
    rings_jobs: bool,
    /// The same of couriers.
    rings_couriers: bool,
    /// Whether there are timers that were not there before.
    rings_timers: bool,
    /// Whether warm entries are out of date.
    changes: bool,
}

impl ProjectTx {
    /// The transaction's connection; the transaction begins if it has not.
    async fn open(&mut self) -> Result<&mut PgConnection> {
        let tx = self.begun().await?;
        Ok(self.tx.insert(tx))
    }

    /// The transaction, to be kept or committed.
    async fn begun(&mut self) -> Result<sqlx::Transaction<'static, sqlx::Postgres>> {
        if let Some(tx) = self.tx.take() {
            return Ok(tx);
        }
        let mut tx = self.db.pool.begin().await?;
        if let Some(assumed) = self.assumed.take() {
            self.prove(&mut tx, &assumed).await?;
        }
        Ok(tx)
    }

    /// Commits with the events gathered, forgets what this process knew of the project if that has changed
    /// (other processes follow from the `changes` row), and wakes whoever waits for what is committed.
    ///
    /// # Errors
    /// When the database does not confirm the commit.
    pub async fn commit(mut self) -> Result<()> {
        if self.changes {
            sqlx::query!(
                "insert into changes (project_id) values ($1)",
                self.db.project
            )
            .execute(self.open().await?)
            .await?;
        }
        let closed = self.close().await;
        if self.changes {
            // Whatever the answer: it may have been lost after the commit.
            self.db.warm.forget(self.db.project);
        }
        closed?;
        let topics: Vec<Topic> = self.topics().collect();
        let changed = std::mem::take(&mut self.changed);
        let left_parked = std::mem::take(&mut self.left_parked);
        for topic in topics {
            self.db.bell.ring(topic);
        }
        for task in changed {
            self.db.bell.ring_if_followed(task);
        }
        for mission in left_parked {
            if let Err(error) = self.db.unpark_rest(mission).await {
                // It is committed; the look at all parked jobs finds them (`Db::wake_parked_jobs`).
                tracing::warn!(%mission, "jobs stay parked for a while: {error}");
            }
        }
        Ok(())
    }
}

/// The instant that `Utc::now` gives, cut to what Postgres keeps, so that a row reads back as it was written.
fn to_micros(at: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(at.timestamp_micros()).unwrap_or(at)
}
