//! `polpo dev`: everything a newcomer needs, made once and kept.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, json};
use tokio::net::TcpListener;
use uuid::Uuid;

use crate::app::{App, Role};
use crate::config::Config;
use crate::embedded::{Cluster, Durability, abandoned};
use crate::seal::{new_master_key, random_secret, sha256};
use crate::store::{NewAgent, ProjectDb, StoreError, World, migrate};

/// Organization and project of a development server.
const SLUG: &str = "dev";
/// The agent that every world begins with.
const AGENT: &str = "assistant";

/// Runs a development server until `stop` resolves.
///
/// # Errors
/// Whatever keeps it from starting, as a sentence with its causes.
pub async fn run(
    mut config: Config,
    build: impl FnOnce(Config) -> anyhow::Result<App>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let cluster = Cluster::start(&config.home, Durability::Full)
        .await
        .context("the database cannot start")?;
    for data in abandoned() {
        tracing::warn!(
            "{} holds the database of a POLPO_HOME that is gone; remove it if that one is not coming back",
            data.display()
        );
    }
    let served = serve(&mut config, &cluster, build, stop).await;
    let stopped = cluster
        .stop()
        .await
        .context("the database did not stop well");
    served.and(stopped)
}

async fn serve(
    config: &mut Config,
    cluster: &Cluster,
    build: impl FnOnce(Config) -> anyhow::Result<App>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    cluster.ensure_database("polpo")?;
    let url = cluster.url("polpo");
    migrate(&url)
        .await
        .context("the database cannot be migrated")?;
    let settings = Settings::read(&config.home)?;
    config.database_url = Some(url.into());
    config.private_base_urls = true;
    config.private_webhooks = true;
    config.webhook_http = true;
    if config.master_key.is_none() {
        config.master_key = Some(kept_master_key(&config.home)?);
    }
    if config.admin_token.is_none() {
        let kept = settings.values.get("POLPO_ADMIN_TOKEN").cloned();
        config.admin_token = Some(kept.map_or_else(random_secret, Ok)?.into());
    }
    let app = build(config.clone())?;
    let bind = app.config.bind;
    let listener = TcpListener::bind(bind)
        .await
        .with_context(|| format!("POLPO_BIND={bind} cannot be listened on"))?;
    let base_url = format!("http://{}/v1", listener.local_addr()?);
    let keys = settings.ensure(&app, &base_url).await?;
    println!(
        "Polpo is at {base_url}. Your keys are in {}. Try it:\n",
        settings.path.display()
    );
    println!(
        "  curl {base_url}/chat/completions -H 'Authorization: Bearer {}' -H 'Content-Type: application/json' \
         -d '{{\"agent\":\"{AGENT}\",\"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}]}}'\n",
        keys.live
    );
    app.serve(Role::All, listener, stop).await;
    Ok(())
}

fn kept_master_key(home: &Path) -> anyhow::Result<SecretString> {
    let path = home.join("master.key");
    match fs::read_to_string(&path) {
        Ok(key) => Ok(key.trim().into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = new_master_key()?;
            write_secret(&path, &format!("{}\n", key.expose_secret()))?;
            Ok(key)
        }
        Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
    }
}

/// Writes a file that only its owner may read, whole or not at all.
fn write_secret(path: &Path, text: &str) -> anyhow::Result<()> {
    let draft = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut file = fs::File::options()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&draft)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    write().with_context(|| format!("{} cannot be written", path.display()))
}

/// `dev.env`: what a newcomer's shell needs.
#[derive(Debug)]
struct Settings {
    path: PathBuf,
    values: HashMap<String, String>,
}

#[derive(Debug)]
struct Keys {
    project: Uuid,
    live: String,
    test: String,
}

impl Settings {
    fn read(home: &Path) -> anyhow::Result<Self> {
        let path = home.join("dev.env");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => {
                return Err(error).with_context(|| format!("{} cannot be read", path.display()));
            }
        };
        let values = text
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
            .collect();
        Ok(Self { path, values })
    }

    /// Makes what is missing; a second start finds everything and changes nothing.
    async fn ensure(&self, app: &App, base_url: &str) -> anyhow::Result<Keys> {
        let kept = self.kept_keys(app).await?;
        let keys = match kept {
            Some(keys) => keys,
            None => self.seed(app).await?,
        };
        let admin = app
            .config
            .admin_token
            .as_ref()
            .map_or("", |token| token.expose_secret());
        let project = keys.project.to_string();
        let wanted = [
            ("POLPO_URL", base_url),
            ("POLPO_API_KEY", &keys.live),
            ("POLPO_TEST_API_KEY", &keys.test),
            ("POLPO_ADMIN_TOKEN", admin),
            ("POLPO_PROJECT_ID", project.as_str()),
        ];
        if wanted
            .iter()
            .any(|(name, value)| self.values.get(*name).map(String::as_str) != Some(*value))
        {
            let lines: String = wanted
                .iter()
                .map(|(name, value)| format!("{name}={value}\n"))
                .collect();
            write_secret(&self.path, &lines)?;
        }
        Ok(keys)
    }

    /// The keys on file, if they open anything: the data may be newer than the file, or gone.
    async fn kept_keys(&self, app: &App) -> anyhow::Result<Option<Keys>> {
        let (Some(live), Some(test)) = (
            self.values.get("POLPO_API_KEY"),
            self.values.get("POLPO_TEST_API_KEY"),
        ) else {
            return Ok(None);
        };
        let mut projects = Vec::new();
        for (world, key) in [(World::Live, live), (World::Test, test)] {
            match app.db.authenticate(world, sha256(key)).await {
                Ok((_, door)) => projects.push(door.project()),
                Err(StoreError::NotFound) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(Keys {
            project: projects[0],
            live: live.clone(),
            test: test.clone(),
        }))
    }

    async fn seed(&self, app: &App) -> anyhow::Result<Keys> {
        let known = app
            .db
            .projects(None, None, 1000)
            .await?
            .into_iter()
            .find(|project| project.slug == SLUG);
        let project = match known {
            Some(project) => {
                println!(
                    "The data is there but its keys are not in {}: new ones are made.",
                    self.path.display()
                );
                project.id
            }
            None => new_project(app).await?,
        };
        let mut keys = Vec::new();
        for world in World::ALL {
            let (_, key) = app.issue_key(project, "dev", world).await?;
            let (_, door) = app.db.authenticate(world, sha256(&key)).await?;
            ensure_agent(&door).await?;
            keys.push(key);
        }
        let [live, test] = <[String; 2]>::try_from(keys).expect("there are two worlds");
        Ok(Keys {
            project,
            live,
            test,
        })
    }
}

async fn new_project(app: &App) -> anyhow::Result<Uuid> {
    let known = app
        .db
        .organizations(None, 1000)
        .await?
        .into_iter()
        .find(|organization| organization.slug == SLUG);
    let organization = match known {
        // An earlier start was killed between the two.
        Some(organization) => organization,
        None => app.db.create_organization("Development", SLUG).await?,
    };
    Ok(app
        .db
        .create_project(organization.id, "Development", SLUG)
        .await?
        .id)
}

async fn ensure_agent(door: &ProjectDb) -> anyhow::Result<()> {
    match door.agent(AGENT).await {
        Ok(_) => return Ok(()),
        Err(StoreError::NotFound) => {}
        Err(error) => return Err(error.into()),
    }
    let definition = Map::from_iter([
        ("role".to_owned(), json!("Helpful assistant")),
        ("model".to_owned(), json!(crate::app::DEFAULT_MODEL)),
    ]);
    let mut tx = door.begin();
    let team = tx.first_team().await?;
    tx.create_agent(&NewAgent {
        name: AGENT,
        team: &team,
        definition: &definition,
    })
    .await?;
    tx.commit().await?;
    Ok(())
}
