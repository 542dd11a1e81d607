//! Settings: every knob, its default, and its environment variable.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use secrecy::{ExposeSecret, SecretString};

/// Where the server listens unless it is told otherwise.
pub const BIND: &str = "127.0.0.1:3890";

/// How the server runs.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// The Postgres to use, as `postgres://…`. `polpo dev` brings its own.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<SecretString>,

    /// Where to listen.
    #[arg(long, env = "POLPO_BIND", default_value = BIND)]
    pub bind: std::net::SocketAddr,

    /// Where `polpo dev` keeps its database and keys.
    #[arg(long, env = "POLPO_HOME", default_value = ".polpo")]
    pub home: PathBuf,

    /// Seals stored credentials: 64 hexadecimal digits. `polpo dev` makes and keeps its own.
    #[arg(long, env = "POLPO_MASTER_KEY", hide_env_values = true)]
    pub master_key: Option<SecretString>,

    /// Opens the platform routes: at least 16 characters. `polpo dev` makes and keeps its own.
    #[arg(long, env = "POLPO_ADMIN_TOKEN", hide_env_values = true)]
    pub admin_token: Option<SecretString>,

    /// Requests per second of one key; 0 is no limit.
    #[arg(long, env = "POLPO_RATE_LIMIT", default_value_t = 10)]
    pub rate_limit: u32,

    /// The most database connections to each of the two worlds, beside a few for the engine. A process has some 36 in all.
    #[arg(long, env = "POLPO_WORLD_CONNECTIONS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub world_connections: u32,

    /// The most database connections to the platform's tables.
    #[arg(long, env = "POLPO_PLATFORM_CONNECTIONS", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub platform_connections: u32,

    /// How long a request waits for a database connection, in milliseconds.
    #[arg(long, env = "POLPO_ACQUIRE_TIMEOUT_MS", default_value_t = 5_000)]
    pub acquire_timeout_ms: u64,

    /// How long requests, and what goes on beside them, wait for a database that does not answer, in milliseconds.
    #[arg(long, env = "POLPO_DATABASE_PATIENCE_MS", default_value_t = 30_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub database_patience_ms: u64,

    /// How long to wait for a connection to a model's provider, in milliseconds.
    #[arg(long, env = "POLPO_CONNECT_TIMEOUT_MS", default_value_t = 10_000)]
    pub connect_timeout_ms: u64,

    /// How long a model's provider may be silent, in milliseconds.
    #[arg(long, env = "POLPO_IDLE_TIMEOUT_MS", default_value_t = 120_000)]
    pub idle_timeout_ms: u64,

    /// How long a model's provider may take for an answer that is not streamed, in milliseconds.
    #[arg(long, env = "POLPO_ANSWER_TIMEOUT_MS", default_value_t = 600_000)]
    pub answer_timeout_ms: u64,

    /// How long streams may go on after SIGTERM, in milliseconds.
    #[arg(long, env = "POLPO_DRAIN_TIMEOUT_MS", default_value_t = 30_000)]
    pub drain_timeout_ms: u64,

    /// How long a stream may be silent before a comment goes out, in milliseconds. Fixed but for tests.
    #[arg(long, hide = true, default_value_t = 15_000)]
    pub keep_alive_ms: u64,

    /// The largest request body, in bytes.
    #[arg(long, env = "POLPO_BODY_LIMIT", default_value_t = 20 * 1024 * 1024)]
    pub body_limit: usize,

    /// Origins whose pages may call the API, separated by commas. None by default: keys belong on servers.
    #[arg(long, env = "POLPO_CORS_ORIGINS", value_delimiter = ',')]
    pub cors_origins: Vec<String>,

    /// Whether projects without a key of their own use the server's keys for model providers.
    #[arg(long, env = "POLPO_SHARE_PROVIDER_KEYS", default_value_t = true, action = clap::ArgAction::Set)]
    pub share_provider_keys: bool,

    /// Whether a project's own base URLs may be private or loopback addresses. `polpo dev` allows it.
    #[arg(long, env = "POLPO_PRIVATE_BASE_URLS", default_value_t = false, action = clap::ArgAction::Set)]
    pub private_base_urls: bool,

    /// Whether the tool `http_fetch` may reach private, loopback and link-local addresses.
    #[arg(long, env = "POLPO_PRIVATE_FETCHES", default_value_t = false, action = clap::ArgAction::Set)]
    pub private_fetches: bool,

    /// Whether webhooks may be at http URLs. `polpo dev` allows it.
    #[arg(long, env = "POLPO_WEBHOOK_HTTP", default_value_t = false, action = clap::ArgAction::Set)]
    pub webhook_http: bool,

    /// Whether webhooks may be at private, loopback and link-local addresses. `polpo dev` allows it.
    #[arg(long, env = "POLPO_PRIVATE_WEBHOOKS", default_value_t = false, action = clap::ArgAction::Set)]
    pub private_webhooks: bool,

    /// How long a delivery is tried again, and a webhook may fail before it is disabled, in hours.
    #[arg(long, env = "POLPO_WEBHOOK_RETRY_HOURS", default_value_t = 72, value_parser = clap::value_parser!(u32).range(1..=8_760))]
    pub webhook_retry_hours: u32,

    /// The same in milliseconds, in its place. For tests.
    #[arg(long, hide = true)]
    pub webhook_retry_ms: Option<u64>,

    /// How long a receiver may take to answer a delivery, in milliseconds. Fixed but for tests.
    #[arg(long, hide = true, default_value_t = 10_000)]
    pub webhook_timeout_ms: u64,

    /// The pause before a delivery is tried again for the first time, in milliseconds. Fixed but for tests.
    #[arg(long, hide = true, default_value_t = 5_000)]
    pub webhook_pause_ms: u64,

    /// The most jobs that this process does at once.
    #[arg(long, env = "POLPO_WORKER_SLOTS", default_value_t = 256, value_parser = slots)]
    pub worker_slots: usize,

    /// The pause before the first retry of a task, in milliseconds; it doubles with each.
    #[arg(long, env = "POLPO_RETRY_BACKOFF_MS", default_value_t = 1_000)]
    pub retry_backoff_ms: u64,

    /// How long the event log is kept, in hours.
    #[arg(long, env = "POLPO_EVENT_RETENTION_HOURS", default_value_t = 168, value_parser = clap::value_parser!(u32).range(1..))]
    pub event_retention_hours: u32,

    /// How often an event stream that is silent sends a heartbeat, in milliseconds. Fixed but for tests.
    #[arg(long, hide = true, default_value_t = 30_000)]
    pub heartbeat_ms: u64,

    /// How long a client may take nothing of an answer before its connection is cut, in milliseconds. Fixed but for tests.
    #[arg(long, hide = true, default_value_t = 60_000)]
    pub stall_ms: u64,

    /// Whether nobody is woken by what this process commits, as if it had died right after. For tests.
    #[arg(long, hide = true, default_value_t = false, action = clap::ArgAction::Set)]
    pub mute: bool,

    /// How the log is written.
    #[arg(long, env = "POLPO_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What is logged, as `tracing` filters have it: `info`, `polpo=debug`, …
    #[arg(
        long,
        env = "POLPO_LOG",
        default_value = "info,sqlx::postgres::notice=warn"
    )]
    pub log: String,
}

/// More at once would only wait for each other.
fn slots(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(slots) if (1..=10_000).contains(&slots) => Ok(slots),
        _ => Err("it must be from 1 to 10000".to_owned()),
    }
}

/// How the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs: a JSON object a line.
    Json,
}

/// A setting is missing or wrong: one sentence that names it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

impl Config {
    /// The database's URL.
    ///
    /// # Errors
    /// When it is not set.
    pub fn database_url(&self) -> Result<&str, ConfigError> {
        let url = self
            .database_url
            .as_ref()
            .map(ExposeSecret::expose_secret)
            .filter(|url| !url.is_empty());
        url.ok_or_else(|| ConfigError("DATABASE_URL is not set: give the Postgres to use, as postgres://user:password@host/database.".to_owned()))
    }

    /// The master key.
    ///
    /// # Errors
    /// When it is not set. Its form is checked where it is used.
    pub fn master_key(&self) -> Result<&SecretString, ConfigError> {
        self.master_key.as_ref().ok_or_else(|| {
            ConfigError("POLPO_MASTER_KEY is not set: make one with `openssl rand -hex 32` and keep it safe.".to_owned())
        })
    }

    /// The admin token.
    ///
    /// # Errors
    /// When it is too short to be a secret.
    pub fn admin_token(&self) -> Result<Option<&SecretString>, ConfigError> {
        match &self.admin_token {
            Some(token) if token.expose_secret().len() < 16 => {
                Err(ConfigError("POLPO_ADMIN_TOKEN is shorter than 16 characters: make one with `openssl rand -hex 32`.".to_owned()))
            }
            token => Ok(token.as_ref()),
        }
    }

    /// The origins whose pages may call the API.
    ///
    /// # Errors
    /// When one is not an origin: a browser sends scheme, host and port, and would never match anything else.
    pub fn cors_origins(&self) -> Result<Vec<&str>, ConfigError> {
        let given = self.cors_origins.iter().map(|origin| origin.trim());
        given
            .filter(|origin| !origin.is_empty())
            .map(|origin| {
                let is_one = reqwest::Url::parse(origin)
                    .is_ok_and(|url| url.origin().ascii_serialization() == origin);
                is_one.then_some(origin).ok_or_else(|| {
                    ConfigError(format!("POLPO_CORS_ORIGINS holds \"{origin}\", which is not an origin such as https://app.example.com."))
                })
            })
            .collect()
    }

    /// How long a request waits for a database connection.
    pub fn acquire_timeout(&self) -> Duration {
        Duration::from_millis(self.acquire_timeout_ms)
    }

    /// How long anyone waits for a database that does not answer.
    pub fn database_patience(&self) -> Duration {
        Duration::from_millis(self.database_patience_ms)
    }

    /// How long a delivery is tried again, and a webhook may fail before it is disabled.
    pub fn webhook_patience(&self) -> Duration {
        let hours = Duration::from_hours(u64::from(self.webhook_retry_hours));
        self.webhook_retry_ms.map_or(hours, Duration::from_millis)
    }

    /// How long a stream may be silent before a comment goes out.
    pub fn keep_alive(&self) -> Duration {
        Duration::from_millis(self.keep_alive_ms)
    }

    /// How long streams may go on after SIGTERM.
    pub fn drain_timeout(&self) -> Duration {
        Duration::from_millis(self.drain_timeout_ms)
    }
}
