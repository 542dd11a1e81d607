//! The program itself: its settings, its log, and how several of it share a database.

use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};

use polpo::store::migrate;
use reqwest::StatusCode;
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};

use crate::harness::{ADMIN, Reply, Upstream, answer, database, empty_database, eventually};

const MASTER_KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// The program with these settings and no others.
fn polpo(role: &str, settings: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polpo"));
    command
        .arg(role)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .envs(settings.iter().copied())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

async fn ended(role: &str, settings: &[(&str, &str)]) -> Output {
    polpo(role, settings).output().await.unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Everything that `serve` needs, with these in place of some.
fn settings<'a>(database_url: &'a str, others: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut settings = vec![
        ("DATABASE_URL", database_url),
        ("POLPO_MASTER_KEY", MASTER_KEY),
        ("POLPO_ADMIN_TOKEN", ADMIN),
        ("POLPO_BIND", "127.0.0.1:0"),
        ("POLPO_ACQUIRE_TIMEOUT_MS", "500"),
    ];
    settings.retain(|(name, _)| others.iter().all(|(other, _)| other != name));
    settings.extend(others);
    settings
}

#[tokio::test]
async fn a_wrong_setting_ends_the_start_with_one_sentence_that_names_it() {
    let url = database().await;
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for (name, value) in [
        ("DATABASE_URL", ""),
        ("DATABASE_URL", "somewhere"),
        ("DATABASE_URL", "postgres://polpo@127.0.0.1:1/polpo"),
        ("POLPO_MASTER_KEY", ""),
        ("POLPO_MASTER_KEY", "0011"),
        ("POLPO_MASTER_KEY", &"xy".repeat(32)),
        ("POLPO_ADMIN_TOKEN", "short"),
        ("POLPO_BIND", &taken),
        ("POLPO_BIND", "everywhere"),
        ("POLPO_RATE_LIMIT", "abc"),
        ("POLPO_WORLD_CONNECTIONS", "0"),
        ("POLPO_LOG", "polpo=loud"),
        ("POLPO_LOG_FORMAT", "verse"),
        ("POLPO_SHARE_PROVIDER_KEYS", "perhaps"),
        ("POLPO_CORS_ORIGINS", "app.example.com"),
        ("POLPO_CORS_ORIGINS", "https://app.example.com/"),
        ("POLPO_CORS_ORIGINS", "*"),
    ] {
        let output = ended("serve", &settings(&url, &[(name, value)])).await;
        let sentence = said(&output);
        assert!(!output.status.success(), "{name}={value}");
        assert_eq!(sentence.lines().count(), 1, "{sentence}");
        assert!(
            sentence.starts_with("polpo: ") && sentence.contains(name),
            "{sentence}"
        );
        assert!(output.stdout.is_empty());
    }
    for name in ["DATABASE_URL", "POLPO_MASTER_KEY"] {
        let mut without = settings(&url, &[]);
        without.retain(|(other, _)| *other != name);
        let output = ended("serve", &without).await;
        assert!(!output.status.success());
        assert!(
            said(&output).contains(&format!("{name} is not set")),
            "{}",
            said(&output)
        );
    }
    for value in ["", "postgres://polpo@127.0.0.1:1/polpo"] {
        let output = ended("migrate", &[("DATABASE_URL", value)]).await;
        assert!(!output.status.success());
        assert!(said(&output).contains("DATABASE_URL"), "{}", said(&output));
    }
}

#[tokio::test]
async fn processes_that_migrate_at_once_all_succeed_and_leave_one_set() {
    let url = empty_database().await;
    let one = settings(&url, &[]);
    let (a, b, c, d, within) = tokio::join!(
        ended("migrate", &one),
        ended("migrate", &one),
        ended("migrate", &one),
        ended("migrate", &one),
        migrate(&url),
    );
    within.unwrap();
    for output in [a, b, c, d] {
        assert!(output.status.success(), "{}", said(&output));
    }
    let mut database = PgConnection::connect(&url).await.unwrap();
    for (schema, migrations) in [
        ("platform", "platform"),
        ("production", "world"),
        ("sandbox", "world"),
    ] {
        let directory = format!("{}/migrations/{migrations}", env!("CARGO_MANIFEST_DIR"));
        let expected = std::fs::read_dir(directory).unwrap().count();
        let statement = format!("select count(*) from {schema}._sqlx_migrations where success");
        let applied: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(statement))
            .fetch_one(&mut database)
            .await
            .unwrap();
        assert_eq!(usize::try_from(applied).unwrap(), expected, "{schema}");
    }
    let tables: Vec<(String, String)> =
        sqlx::query_as("select schemaname, tablename from pg_tables where schemaname in ('platform', 'production', 'sandbox', 'public')")
            .fetch_all(&mut database)
            .await
            .unwrap();
    let of = |schema: &str| {
        let mut names: Vec<&String> = tables
            .iter()
            .filter(|(of, _)| of == schema)
            .map(|(_, name)| name)
            .collect();
        names.sort();
        names
    };
    assert!(!of("production").is_empty());
    assert_eq!(of("production"), of("sandbox"));
    assert!(of("public").is_empty(), "nothing lies outside our schemas");
}

#[tokio::test]
async fn a_database_ahead_or_behind_is_not_served() {
    let empty = empty_database().await;
    let output = ended("serve", &settings(&empty, &[])).await;
    assert!(!output.status.success());
    assert!(
        said(&output).contains("run `polpo migrate`"),
        "{}",
        said(&output)
    );

    for schema in ["platform", "production", "sandbox"] {
        let url = database().await;
        let mut database = PgConnection::connect(&url).await.unwrap();
        let behind = format!(
            "delete from {schema}._sqlx_migrations where version = (select max(version) from {schema}._sqlx_migrations)"
        );
        let ahead = format!(
            "insert into {schema}._sqlx_migrations (version, description, success, checksum, execution_time) values (9999, 'of a later version', true, '', 0)"
        );

        database.execute(sqlx::AssertSqlSafe(ahead)).await.unwrap();
        for role in ["serve", "migrate"] {
            let output = ended(role, &settings(&url, &[])).await;
            assert!(!output.status.success(), "{role}, {schema}");
            assert!(
                said(&output).contains("migrated by a newer polpo"),
                "{}",
                said(&output)
            );
        }

        database
            .execute(sqlx::AssertSqlSafe(format!(
                "delete from {schema}._sqlx_migrations where version = 9999"
            )))
            .await
            .unwrap();
        database.execute(sqlx::AssertSqlSafe(behind)).await.unwrap();
        let output = ended("serve", &settings(&url, &[])).await;
        assert!(!output.status.success(), "{schema}");
        assert!(
            said(&output).contains("run `polpo migrate`"),
            "{}",
            said(&output)
        );
    }
}

/// A running program, and what it has written so far.
struct Process {
    child: Child,
    out: Arc<Mutex<String>>,
    log: Arc<Mutex<String>>,
}

impl Process {
    fn start(role: &str, settings: &[(&str, &str)]) -> Self {
        let mut child = polpo(role, settings)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let out = gather(child.stdout.take().unwrap());
        let log = gather(child.stderr.take().unwrap());
        Self { child, out, log }
    }

    /// Where it listens, once it does.
    async fn url(&mut self) -> String {
        let found = |text: &str, before: &str| {
            let (_, after) = text.split_once(before)?;
            Some(
                after
                    .chars()
                    .take_while(|c| !c.is_whitespace() && *c != '/')
                    .collect::<String>(),
            )
        };
        eventually("it listens", || async {
            self.log().contains("listening on http://")
                || self.out().contains("curl http://")
                || self.log().contains("polpo: ")
        })
        .await;
        let address = found(&self.log(), "listening on http://")
            .or_else(|| found(&self.out(), "Polpo is at http://"));
        format!(
            "http://{}",
            address.unwrap_or_else(|| panic!("{}", self.log()))
        )
    }

    fn out(&self) -> String {
        self.out.lock().unwrap().clone()
    }

    fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().unwrap().to_string();
        let sent = std::process::Command::new("kill")
            .args([name, &pid])
            .status()
            .unwrap();
        assert!(sent.success());
    }
}

fn gather(from: impl AsyncRead + Unpin + Send + 'static) -> Arc<Mutex<String>> {
    let text = Arc::new(Mutex::new(String::new()));
    let into = text.clone();
    tokio::spawn(async move {
        let mut lines = BufReader::new(from).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let mut text = into.lock().unwrap();
            text.push_str(&line);
            text.push('\n');
        }
    });
    text
}

/// A project, its key, and an agent on the scripted upstream under a key of the project's own.
async fn furnish(url: &str, upstream: &Upstream, provider_key: &str) -> String {
    let client = reqwest::Client::new();
    let admin = |path: &str, body: Value| {
        client
            .post(format!("{url}/v1{path}"))
            .bearer_auth(ADMIN)
            .json(&body)
    };
    let (_, org) = answer(admin("/orgs", json!({"name": "Org", "slug": "org"}))).await;
    let (_, project) = answer(admin(
        "/projects",
        json!({"orgId": org["id"], "name": "P", "slug": "p"}),
    ))
    .await;
    let scope = json!([{"type": "project", "projectId": project["id"]}]);
    let (status, key) = answer(admin("/api-keys", json!({"name": "k", "scopes": scope}))).await;
    assert_eq!(status, StatusCode::CREATED, "{key}");
    let key = key["key"].as_str().unwrap().to_owned();
    let byok = json!({"projectId": project["id"], "provider": "openai", "key": provider_key, "baseUrl": format!("{}/v1", upstream.url)});
    let (status, body) = answer(admin("/byok", byok)).await;
    assert!(status.is_success(), "{body}");
    let agent = json!({"name": "a", "model": "openai:scripted"});
    let (status, body) = answer(
        client
            .post(format!("{url}/v1/agents"))
            .bearer_auth(&key)
            .json(&agent),
    )
    .await;
    assert_eq!(status, StatusCode::CREATED, "{body}");
    key
}

#[tokio::test]
async fn the_log_holds_neither_secrets_nor_what_is_said() {
    let url = database().await;
    let upstream = Upstream::start().await;
    let provider_key = "provider-key-5f2c9e";
    let client = reqwest::Client::new();
    let mut known_key = None;
    for level in ["debug", "info"] {
        let others = [("POLPO_LOG", level), ("POLPO_PRIVATE_BASE_URLS", "true")];
        let mut process = Process::start("serve", &settings(&url, &others));
        let at = process.url().await;
        let key = match known_key {
            Some(key) => key,
            None => furnish(&at, &upstream, provider_key).await,
        };
        upstream.will_say("the marmot answers");
        let refusal = json!({"error": {"message": "the weasel refuses"}}).to_string();
        upstream.will(Reply::Plain(400, vec![], refusal));
        for (path, status) in [
            ("/v1/chat/completions?token=in-the-query", 200),
            ("/v1/chat/completions", 400),
        ] {
            let body = json!({"agent": "a", "user": "the-user", "stream": true, "messages": [{"role": "user", "content": "the hamster asks"}]});
            let request = client
                .post(format!("{at}{path}"))
                .bearer_auth(&key)
                .json(&body);
            assert_eq!(answer(request).await.0, status);
        }
        process.signal("-TERM");
        assert!(process.child.wait().await.unwrap().success());
        let log = process.log();
        for secret in [
            &key["sk_live_".len()..],
            provider_key,
            ADMIN,
            MASTER_KEY,
            "marmot",
            "weasel",
            "hamster",
            "the-user",
            "in-the-query",
        ] {
            assert!(!log.contains(secret), "`{secret}` is in the log:\n{log}");
        }
        assert!(!log.contains('\u{1b}'), "no terminal, no colours");
        let told: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("duration_ms"))
            .collect();
        let chats: Vec<&&str> = told
            .iter()
            .filter(|line| line.contains("/v1/chat/completions"))
            .collect();
        assert_eq!(chats.len(), 2, "{log}");
        for (chat, status) in chats.into_iter().zip(["status=200", "status=400"]) {
            for part in [" INFO ", "request_id=req_", "method=POST", status] {
                assert!(chat.contains(part), "{part}: {chat}");
            }
        }
        if level == "info" {
            assert_eq!(told.len(), 2, "one line a request:\n{log}");
        }
        known_key = Some(key);
    }
}
