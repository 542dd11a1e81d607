//! What everybody shares, and the life of the server: start, serve, drain.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::api;
use crate::config::{Config, ConfigError};
use crate::ids::{Id, Webhook};
use crate::llm::{Credential, ProjectCredentials, Provider, Providers, ResolveError, Usage};
use crate::mission::Document;
use crate::seal::{self, Seal, SealError, sha256};
use crate::store::{
    AgentRow, CallUsage, Db, KeyRow, NewKey, PoolSettings, ProjectDb, Result as StoreResult,
    SealedSecret, StoreError, Topic, World,
};
use crate::task::Settings;
use crate::tools::Fetcher;
use crate::webhook::Reach;
use crate::work::{self, Poster};

/// The model of an agent that names none.
pub const DEFAULT_MODEL: &str = "echo";

/// How long a turn that is stopped may take to say so and to be recorded.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What a process does. Several processes on one database share the work in any mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Answer requests and do what no request waits for.
    All,
    /// Answer requests only. Some other process must be `all` or `worker`.
    Api,
    /// Do what no request waits for, and answer health checks only.
    Worker,
}

/// The few things that everybody shares. Cheap to clone.
#[derive(Debug, Clone)]
pub struct App(Arc<Shared>);

/// What an [`App`] points to.
#[derive(Debug)]
pub struct Shared {
    /// The settings.
    pub config: Config,
    /// The database.
    pub db: Db,
    /// The models.
    pub providers: Providers,
    /// The client of the tool `http_fetch`.
    pub fetcher: Fetcher,
    /// The client of webhooks' couriers.
    pub poster: Poster,
    /// The event streams' feeds.
    pub feeds: api::events::Feeds,
    /// The request rates.
    pub limits: api::limit::Limits,
    /// Turns under way: they outlive their requests, and shutdown waits for them.
    pub turns: TaskTracker,
    /// Trips when the server begins to stop.
    pub stopping: CancellationToken,
    /// Trips when the time for streams to end is over.
    pub stop_turns: CancellationToken,
    /// When the server started.
    pub started: Instant,
    /// The OpenAPI document, as it is served.
    pub openapi: Bytes,
    seal: Seal,
    admin: Option<[u8; 32]>,
}

impl std::ops::Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl App {
    /// Puts the program together from its settings. Reaches for nothing yet.
    ///
    /// # Errors
    /// One sentence naming the setting at fault.
    pub fn new(config: Config, providers: Providers) -> anyhow::Result<Self> {
        let seal = Seal::new(config.master_key()?).map_err(|error| match error {
            SealError::Malformed => anyhow::Error::new(ConfigError("POLPO_MASTER_KEY must be 64 hexadecimal digits: make one with `openssl rand -hex 32`.".to_owned())),
            error => error.into(),
        })?;
        let settings = PoolSettings {
            world_connections: config.world_connections,
            platform_connections: config.platform_connections,
            acquire_timeout: config.acquire_timeout(),
            patience: config.database_patience(),
        };
        let db = Db::open(config.database_url()?, settings).map_err(|error| {
            ConfigError(format!("DATABASE_URL is not a Postgres URL: {error}."))
        })?;
        if config.mute {
            db.mute();
        }
        let admin = config
            .admin_token()?
            .map(|token| sha256(token.expose_secret()));
        config.cors_origins()?;
        let openapi = api::openapi()
            .to_json()
            .context("the OpenAPI document cannot be written")?;
        let fetcher =
            Fetcher::new(config.private_fetches).context("the HTTP client cannot start")?;
        let reach = Reach {
            http: config.webhook_http,
            private: config.private_webhooks,
        };
        let timeout = Duration::from_millis(config.webhook_timeout_ms);
        let poster = Poster::new(reach, timeout).context("the HTTP client cannot start")?;
        Ok(Self(Arc::new(Shared {
            fetcher,
            poster,
            feeds: api::events::Feeds::default(),
            limits: api::limit::Limits::new(config.rate_limit),
            db,
            providers,
            turns: TaskTracker::new(),
            stopping: CancellationToken::new(),
            stop_turns: CancellationToken::new(),
            started: Instant::now(),
            openapi: openapi.into(),
            seal,
            admin,
            config,
        })))
    }

    /// Serves until `stop` resolves; then accepts nothing more, lets streams end within the drain time, and ends.
    pub async fn serve(self, role: Role, listener: TcpListener, stop: impl Future<Output = ()>) {
        let router = match role {
            Role::All | Role::Api => api::router(self.clone()),
            Role::Worker => api::health_router(self.clone()),
        };
        let stall = Duration::from_millis(self.config.stall_ms);
        let server = api::server::serve(listener, router, stall, self.stopping.clone());
        let served = async {
            match role {
                Role::Api => server.await,
                Role::All | Role::Worker => drop(tokio::join!(server, work::run(self.clone()))),
            }
        };
        let drained = async {
            stop.await;
            self.stopping.cancel();
            tracing::info!(
                "stopping: streams have {} s to end",
                self.config.drain_timeout().as_secs()
            );
            tokio::time::sleep(self.config.drain_timeout()).await;
            // Whoever is still talking is told so, and recorded as interrupted.
            self.stop_turns.cancel();
            tokio::time::sleep(LAST_WORDS).await;
        };
        tokio::select! {
            () = served => {}
            () = drained => tracing::warn!("some connections or tasks had to be cut"),
            () = self.upkeep(role) => {}
        }
        self.stop_turns.cancel();
        self.turns.close();
        if tokio::time::timeout(Duration::from_secs(5), self.turns.wait())
            .await
            .is_err()
        {
            tracing::warn!("some turns could not be recorded in time");
        }
        if let Err(error) = self.db.record_key_use().await {
            tracing::debug!("the last uses of keys are not recorded: {error}");
        }
        self.db.close().await;
    }

    /// Wakes who waits for a place that nobody has: whoever left it may have been lost before it could wake the next.
    async fn wake_parked_jobs(&self) -> StoreResult<()> {
        for world in World::ALL {
            if self.db.wake_parked_jobs(world).await? > 0 {
                self.db.ring(Topic::Jobs(world));
                self.db.ring(Topic::Timers(world));
            }
            self.db.wake_resumed_projects(world).await?;
        }
        Ok(())
    }

    /// Tells of chat turns whose process was lost before it could.
    async fn tell_left_untold(&self) -> StoreResult<()> {
        for world in World::ALL {
            self.db.tell_left_untold(world).await?;
        }
        Ok(())
    }

    /// Has Postgres know how large tables have become.
    async fn look_at_grown_tables(&self) -> StoreResult<()> {
        for world in World::ALL {
            self.db.look_at_grown_tables(world).await?;
        }
        Ok(())
    }

    /// Deletes events that are older than they are kept, and deliveries that ended so long ago.
    async fn prune_events(&self) -> StoreResult<()> {
        let kept = chrono::Duration::hours(i64::from(self.config.event_retention_hours));
        // By the database's clock, which wrote when they were made: one of ours that is ahead would delete what is to be kept.
        let oldest = self.db.in_time(self.db.now()).await? - kept;
        for world in World::ALL {
            let db = &self.db;
            while db.in_time(db.prune_events(world, oldest)).await? > 0 {}
            while db.in_time(db.prune_deliveries(world, oldest)).await? > 0 {}
        }
        Ok(())
    }

    /// What goes on beside the requests. Ends only by being dropped.
    fn upkeep(&self, role: Role) -> impl Future<Output = ()> + Send + 'static {
        let app = self.clone();
        async move {
            let sweep = async {
                let mut interval = tokio::time::interval(Duration::from_secs(10));
                loop {
                    interval.tick().await;
                    app.limits.sweep();
                    let done = async {
                        let db = &app.db;
                        db.in_time(db.record_key_use()).await?;
                        db.in_time(app.tell_left_untold()).await?;
                        if role != Role::Api {
                            db.in_time(app.look_at_grown_tables()).await?;
                            db.in_time(app.wake_parked_jobs()).await?;
                            db.in_time(db.prune_changes()).await?;
                            app.prune_events().await?;
                        }
                        StoreResult::Ok(())
                    };
                    if let Err(error) = done.await {
                        tracing::warn!("upkeep of the database failed, trying again: {error}");
                    }
                }
            };
            tokio::join!(app.db.follow_changes(), app.db.carry_wakeups(), sweep);
        }
    }
}

impl Shared {
    /// Whether this is the admin's token. Compared by hash, so the time taken tells nothing of it.
    pub fn is_admin(&self, token: &str) -> bool {
        self.admin
            .is_some_and(|admin| constant_time_eq(&admin, &sha256(token)))
    }

    /// Makes a key and stores its hash; the key itself is returned and kept nowhere.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is no such project.
    pub async fn issue_key(
        &self,
        project: Uuid,
        name: &str,
        world: World,
    ) -> StoreResult<(KeyRow, String)> {
        let prefix = match world {
            World::Live => "sk_live_",
            World::Test => "sk_test_",
        };
        let secret = seal::random_secret().expect("the system has random bytes");
        let key = format!("{prefix}{secret}");
        let shown = &key[..prefix.len() + 4];
        let new = NewKey {
            project,
            name,
            world,
            hash: sha256(&key),
            prefix: shown,
            last_four: &key[key.len() - 4..],
        };
        let row = self.db.create_key(&new).await.map_err(|error| {
            if error.is_constraint("api_keys_project_fkey") {
                StoreError::NotFound
            } else {
                error
            }
        })?;
        Ok((row, key))
    }

    /// Seals a provider's key for a project.
    ///
    /// # Errors
    /// When the system has no random bytes.
    pub fn seal_credential(
        &self,
        project: Uuid,
        provider: &str,
        key: &SecretString,
    ) -> Result<(String, Vec<u8>), SealError> {
        Ok((
            self.seal.id().to_owned(),
            self.seal.seal(&place(project, provider), key)?,
        ))
    }

    /// Seals what signs a webhook's deliveries.
    ///
    /// # Errors
    /// When the system has no random bytes.
    pub fn seal_webhook_secret(
        &self,
        project: Uuid,
        webhook: Id<Webhook>,
        secret: &SecretString,
    ) -> Result<SealedSecret, SealError> {
        Ok(SealedSecret {
            sealed_with: self.seal.id().to_owned(),
            sealed: self
                .seal
                .seal(&place_of_webhook(project, webhook), secret)?,
        })
    }

    /// Opens what signs a webhook's deliveries.
    ///
    /// # Errors
    /// [`SealError::Foreign`].
    pub fn open_webhook_secret(
        &self,
        project: Uuid,
        webhook: Id<Webhook>,
        secret: &SealedSecret,
    ) -> Result<SecretString, SealError> {
        self.seal
            .open(&place_of_webhook(project, webhook), &secret.sealed)
    }

    /// The project's own provider keys, opened.
    ///
    /// # Errors
    /// When the database cannot be reached, or a key was sealed under another master key.
    pub async fn credentials(
        &self,
        door: &ProjectDb,
    ) -> Result<ProjectCredentials, CredentialsError> {
        let sealed = self.db.sealed_credentials(door).await?;
        let mut own = ProjectCredentials::default();
        for credential in sealed.iter() {
            let place = place(door.project(), &credential.provider);
            let key = self
                .seal
                .open(&place, &credential.sealed_key)
                .map_err(|_| CredentialsError::Sealed {
                    provider: credential.provider.clone(),
                    sealed_with: credential.sealed_with.clone(),
                })?;
            own.insert(
                credential.provider.clone(),
                Credential {
                    key,
                    base_url: credential.base_url.clone(),
                },
            );
        }
        Ok(own)
    }
}

/// What calls of a model used, as it is stored.
pub fn call_usage(model: &str, usage: Usage) -> CallUsage {
    CallUsage {
        model: model.to_owned(),
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
        cached_tokens: usage.cached_tokens,
        reasoning_tokens: usage.reasoning_tokens,
        estimated: usage.estimated,
    }
}

/// The model that an agent runs with, as it or its project names it.
pub fn model_of<'a>(agent: &'a AgentRow, settings: &'a Settings) -> &'a str {
    model_in(&agent.definition, settings)
}

fn model_in<'a>(definition: &'a Map<String, Value>, settings: &'a Settings) -> &'a str {
    definition
        .get("model")
        .and_then(Value::as_str)
        .or(settings.default_model.as_deref())
        .unwrap_or(DEFAULT_MODEL)
}

/// Why a model cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The project's provider keys cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// Nobody serves it; ends a sentence.
    #[error(transparent)]
    Unusable(#[from] ResolveError),
}

impl Shared {
    /// Who serves a model for a project, and the model's name there.
    ///
    /// # Errors
    /// [`ModelError`].
    pub async fn resolve(
        &self,
        door: &ProjectDb,
        model: &str,
    ) -> Result<(Arc<dyn Provider>, String), ModelError> {
        let own = self.credentials(door).await?;
        Ok(self.providers.resolve(model, &own)?)
    }
}

impl Shared {
    /// Why a mission cannot be executed because of its agents' models: a sentence, or nothing. Agents that do not exist are not
    /// this one's concern.
    ///
    /// # Errors
    /// When the database cannot be reached, or a key was sealed under another master key.
    pub async fn unusable_model(
        &self,
        door: &ProjectDb,
        document: &Document,
    ) -> Result<Option<String>, CredentialsError> {
        let settings = door.settings().await?;
        let agents: BTreeSet<&str> = document
            .tasks
            .iter()
            .map(|task| task.assign_to.as_str())
            .collect();
        let mut models: BTreeMap<String, &str> = BTreeMap::new();
        for name in agents {
            let model = match door.agent(name).await {
                Ok(agent) => model_of(&agent, &settings).to_owned(),
                Err(StoreError::NotFound) => {
                    let members = document.team.iter().flat_map(|team| &team.agents);
                    let mut found = members.filter(|member| member.name == name);
                    let Some(member) = found.next() else { continue };
                    model_in(&member.fields, &settings).to_owned()
                }
                Err(error) => return Err(error.into()),
            };
            models.entry(model).or_insert(name);
        }
        for (model, agent) in models {
            match self.resolve(door, &model).await {
                Ok(_) => {}
                Err(ModelError::Unusable(error)) => {
                    return Ok(Some(format!(
                        "The model \"{model}\" of the agent \"{agent}\" cannot be used: {error}."
                    )));
                }
                Err(ModelError::Credentials(error)) => return Err(error),
            }
        }
        Ok(None)
    }
}

/// Why a project's provider keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// They cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// One was sealed under another master key.
    #[error(
        "the key for {provider} was sealed under master key {sealed_with}, which this server does not have"
    )]
    Sealed {
        /// Whose key it is.
        provider: String,
        /// The master key's name.
        sealed_with: String,
    },
}

fn place(project: Uuid, provider: &str) -> String {
    format!("{project}/{provider}")
}

fn place_of_webhook(project: Uuid, webhook: Id<Webhook>) -> String {
    format!("{project}/{webhook}")
}

fn constant_time_eq(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter()
        .zip(b)
        .fold(0, |difference, (a, b)| difference | (a ^ b))
        == 0
}
