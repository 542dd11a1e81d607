//! The command line: one role per subcommand.

use std::error::Error;
use std::io::IsTerminal;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context;
use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, Parser, Subcommand};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use uuid::Uuid;

use crate::app::{App, Role};
use crate::config::{BIND, Config, ConfigError, LogFormat};
use crate::llm::{ClientSettings, Credential, HttpClient, KNOWN, ProjectCredentials, Providers};
use crate::store::{MigrationState, World, migrate, migration_state, reach};
use crate::{api, dev, store};

/// An agent backend: one binary and one Postgres.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

impl Cli {
    /// Reads the command line and the environment. Help and a malformed command line end the process here.
    ///
    /// # Errors
    /// One sentence naming the environment variable that cannot be read.
    pub fn read() -> anyhow::Result<Self> {
        Self::try_parse().map_err(|error| match unreadable_variable(&error) {
            Some(error) => error.into(),
            None => error.exit(),
        })
    }
}

/// clap names the flag of a wrong value, which whoever set its variable has never seen.
fn unreadable_variable(error: &clap::Error) -> Option<ConfigError> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let flag = text(ContextKind::InvalidArg)?.strip_prefix("--")?;
    let value = text(ContextKind::InvalidValue)?;
    let serve = Cli::command();
    let variable = serve
        .find_subcommand("serve")?
        .get_arguments()
        .find(|argument| argument.get_long() == flag.split(' ').next())?
        .get_env()?;
    if std::env::var_os(variable).is_none_or(|set| set != value) {
        return None;
    }
    let reason = match (error.get(ContextKind::ValidValue), error.source()) {
        (Some(ContextValue::Strings(valid)), _) => {
            format!("it must be one of {}", valid.join(", "))
        }
        (_, Some(source)) => source.to_string(),
        (_, None) => "it is malformed".to_owned(),
    };
    Some(ConfigError(format!(
        "{}={value} cannot be used: {reason}.",
        variable.display()
    )))
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a development server with a database of its own and a first agent.
    Dev {
        #[command(flatten)]
        config: Box<Config>,
    },
    /// Serve the API on the Postgres that `DATABASE_URL` names.
    Serve {
        /// What this process does.
        #[arg(long, value_enum, default_value_t = Role::All)]
        role: Role,
        #[command(flatten)]
        config: Box<Config>,
    },
    /// Bring the database to this program's version.
    Migrate {
        #[command(flatten)]
        config: Box<Config>,
    },
    /// Ask the server on this machine whether it can work.
    Health {
        /// Where it listens.
        #[arg(long, env = "POLPO_BIND", default_value = BIND)]
        bind: SocketAddr,
    },
    /// Print the OpenAPI document.
    Openapi,
    /// Manage API keys.
    #[command(subcommand)]
    Keys(Keys),
    /// Manage projects.
    #[command(subcommand)]
    Projects(Projects),
}

/// How long a server may take to say whether it is ready: longer than it waits for a database connection.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(8);

#[derive(Debug, Subcommand)]
enum Keys {
    /// Make a key and print it, this once.
    Create {
        /// The project that it opens.
        #[arg(long)]
        project: Uuid,
        /// What to call it.
        #[arg(long, default_value = "key")]
        name: String,
        /// Whether it opens the sandbox rather than production.
        #[arg(long)]
        test: bool,
        #[command(flatten)]
        config: Box<Config>,
    },
    /// List a project's keys.
    List {
        /// The project.
        #[arg(long)]
        project: Uuid,
        #[command(flatten)]
        config: Box<Config>,
    },
    /// Revoke a key.
    Revoke {
        /// The key's id.
        id: Uuid,
        #[command(flatten)]
        config: Box<Config>,
    },
}

#[derive(Debug, Subcommand)]
enum Projects {
    /// Make a project, and its organization unless one is named.
    Create {
        /// Its name.
        name: String,
        /// Its unique short name.
        #[arg(long)]
        slug: String,
        /// The organization that owns it.
        #[arg(long)]
        org: Option<Uuid>,
        #[command(flatten)]
        config: Box<Config>,
    },
    /// List the projects.
    List {
        #[command(flatten)]
        config: Box<Config>,
    },
}

/// Runs the command line.
///
/// # Errors
/// Whatever keeps the command from doing its work, as one sentence with its causes.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    // Only an earlier call can make this fail, and then a provider is in place.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Runtime::new().context("the runtime cannot start")?;
    match cli.command {
        Command::Openapi => {
            println!("{}", api::openapi().to_pretty_json()?);
            Ok(())
        }
        Command::Health { bind } => runtime.block_on(health(bind)),
        Command::Serve { role, config } => runtime.block_on(serve(role, *config)),
        Command::Dev { config } => runtime.block_on(async {
            start_log(&config)?;
            dev::run(*config, build, stop_signal()?).await
        }),
        Command::Migrate { config } => runtime.block_on(async {
            migrate(config.database_url()?)
                .await
                .context("DATABASE_URL names a database that cannot be migrated")?;
            println!("The database is at this program's version.");
            Ok(())
        }),
        Command::Keys(keys) => runtime.block_on(manage_keys(keys)),
        Command::Projects(projects) => runtime.block_on(manage_projects(projects)),
    }
}

async fn serve(role: Role, config: Config) -> anyhow::Result<()> {
    start_log(&config)?;
    let bind = config.bind;
    let app = build(config)?;
    let unreachable = "DATABASE_URL names a database that cannot be reached";
    tokio::time::timeout(
        app.config.acquire_timeout(),
        reach(app.config.database_url()?),
    )
    .await
    .context("it does not answer")
    .context(unreachable)?
    .context(unreachable)?;
    match migration_state(&app.db).await.context(unreachable)? {
        MigrationState::Current => {}
        MigrationState::Behind => {
            return Err(ConfigError(
                "The database needs migrating: run `polpo migrate` first.".to_owned(),
            )
            .into());
        }
        MigrationState::Ahead => {
            return Err(ConfigError(
                "The database was migrated by a newer polpo: run that version.".to_owned(),
            )
            .into());
        }
    }
    let listener = TcpListener::bind(bind)
        .await
        .with_context(|| format!("POLPO_BIND={bind} cannot be listened on"))?;
    tracing::info!("listening on http://{}", listener.local_addr()?);
    app.serve(role, listener, stop_signal()?).await;
    Ok(())
}

/// Succeeds when the server at `bind` is ready. Needs no other setting, so that a container can ask.
async fn health(bind: SocketAddr) -> anyhow::Result<()> {
    // A server that listens everywhere listens here too.
    let address = match bind.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let url = format!("http://{}/ready", SocketAddr::new(address, bind.port()));
    let answer = reqwest::Client::builder()
        .no_proxy()
        .timeout(HEALTH_TIMEOUT)
        .build()
        .context("the HTTP client cannot start")?
        .get(&url)
        .send()
        .await
        .map_err(reqwest::Error::without_url)
        .with_context(|| format!("no server answers at {url}"))?;
    let code = answer.status();
    if code == reqwest::StatusCode::OK {
        return Ok(());
    }
    let said: serde_json::Value = answer.json().await.unwrap_or_default();
    let status = said["status"].as_str().unwrap_or("it is no polpo");
    Err(anyhow::anyhow!(
        "the server at {url} is not ready ({code}): {status}"
    ))
}

/// Puts the program together with the providers that the environment has keys for.
fn build(config: Config) -> anyhow::Result<App> {
    let settings = ClientSettings {
        connect_timeout: Duration::from_millis(config.connect_timeout_ms),
        idle_timeout: Duration::from_millis(config.idle_timeout_ms),
        answer_timeout: Duration::from_millis(config.answer_timeout_ms),
        private_base_urls: config.private_base_urls,
    };
    let client = HttpClient::new(settings).context("the HTTP client cannot start")?;
    let providers = Providers::new(client, server_credentials(), config.share_provider_keys);
    App::new(config, providers)
}

/// The server's own provider keys, from the providers' official variables.
#[expect(
    clippy::disallowed_methods,
    reason = "the providers' names and not ours decide these variables: they are a table, not fields"
)]
fn server_credentials() -> ProjectCredentials {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    KNOWN
        .iter()
        .filter_map(|known| {
            let base_url = variable(known.base_url_variable);
            let key = variable(known.key_variable);
            // A server of one's own may need no key, but has to be somewhere that the operator means.
            if key.is_none() && !(known.keyless && base_url.is_some()) {
                return None;
            }
            Some((
                known.name.to_owned(),
                Credential {
                    key: key.unwrap_or_default().into(),
                    base_url,
                },
            ))
        })
        .collect()
}

fn start_log(config: &Config) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log)
        .map_err(|error| ConfigError(format!("POLPO_LOG is not a log filter: {error}.")))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Colours are for people: in a file they hide the words between them.
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .try_init(),
    }
    .map_err(|error| anyhow::anyhow!("the log cannot start: {error}"))
}

/// Resolves at SIGTERM or Ctrl-C.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate =
        signal(SignalKind::terminate()).context("SIGTERM cannot be listened for")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be listened for")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

async fn manage_keys(keys: Keys) -> anyhow::Result<()> {
    match keys {
        Keys::Create {
            project,
            name,
            test,
            config,
        } => {
            let app = build(*config)?;
            let world = if test { World::Test } else { World::Live };
            let (row, key) = app
                .issue_key(project, &name, world)
                .await
                .context("the key cannot be made")?;
            println!("{} {key}", row.id);
        }
        Keys::List { project, config } => {
            for key in build(*config)?.db.keys(project, None, 1000).await? {
                println!(
                    "{} {} {}…{} {}",
                    key.id, key.environment, key.prefix, key.last_four, key.name
                );
            }
        }
        Keys::Revoke { id, config } => {
            build(*config)?
                .db
                .revoke_key(id)
                .await
                .with_context(|| format!("key {id} cannot be revoked"))?;
            println!("{id} opens nothing any more, within a second on every server.");
        }
    }
    Ok(())
}

async fn manage_projects(projects: Projects) -> anyhow::Result<()> {
    match projects {
        Projects::Create {
            name,
            slug,
            org,
            config,
        } => {
            let app = build(*config)?;
            let org = match org {
                Some(org) => org,
                None => {
                    app.db
                        .create_organization(&name, &slug)
                        .await
                        .context("the organization cannot be made")?
                        .id
                }
            };
            let project: store::ProjectRow = app
                .db
                .create_project(org, &name, &slug)
                .await
                .context("the project cannot be made")?;
            println!("{} {}", project.id, project.slug);
        }
        Projects::List { config } => {
            for project in build(*config)?.db.projects(None, None, 1000).await? {
                println!("{} {} {}", project.id, project.slug, project.name);
            }
        }
    }
    Ok(())
}
