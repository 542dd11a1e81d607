//! The program itself: its settings, its log, and how several of it share a database.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use polpo::store::migrate;
use reqwest::StatusCode;
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

use crate::harness::{
    ADMIN, Reply, Upstream, answer, database, empty_database, eventually, frames, spoken,
};

const MASTER_KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// The program with these arguments and settings and no others.
pub(crate) fn polpo(role: &str, settings: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polpo"));
    command
        .args(role.split(' '))
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
pub(crate) fn settings<'a>(
    database_url: &'a str,
    others: &[(&'a str, &'a str)],
) -> Vec<(&'a str, &'a str)> {
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
    // It lets whoever connects wait.
    let silent = format!("postgres://polpo@{taken}/polpo");
    for (name, value) in [
        ("DATABASE_URL", ""),
        ("DATABASE_URL", "somewhere"),
        ("DATABASE_URL", "postgres://polpo@127.0.0.1:1/polpo"),
        ("DATABASE_URL", &silent),
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
pub(crate) struct Process {
    pub(crate) child: Child,
    out: Arc<Mutex<String>>,
    log: Arc<Mutex<String>>,
}

impl Process {
    pub(crate) fn start(role: &str, settings: &[(&str, &str)]) -> Self {
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
    pub(crate) async fn url(&mut self) -> String {
        let found = |text: &str, before: &str| {
            let (_, after) = text.split_once(before)?;
            Some(
                after
                    .chars()
                    .take_while(|c| !c.is_whitespace() && *c != '/')
                    .collect::<String>(),
            )
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.log().contains("listening on http://") && !self.out().contains("curl http://") {
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "{ended:?}: {}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
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

    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn signal(&self, name: &str) {
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
pub(crate) async fn furnish(url: &str, upstream: &Upstream, provider_key: &str) -> String {
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

#[tokio::test]
async fn a_worker_answers_health_checks_and_no_requests() {
    let url = database().await;
    let mut worker = Process::start("serve --role worker", &settings(&url, &[]));
    let address = worker.url().await;
    for (path, expected) in [("/ready", 200), ("/v1/health", 200), ("/v1/agents", 404)] {
        let (status, body) = answer(reqwest::Client::new().get(format!("{address}{path}"))).await;
        assert_eq!(status, expected, "{path}: {body}");
    }
    let output = ended(
        "health",
        &[("POLPO_BIND", address.trim_start_matches("http://"))],
    )
    .await;
    assert!(output.status.success(), "{}", said(&output));
}

#[tokio::test]
async fn sigterm_lets_streams_end_and_ends_those_that_do_not() {
    let url = database().await;
    let upstream = Upstream::start().await;
    let others = [
        ("POLPO_DRAIN_TIMEOUT_MS", "1000"),
        ("POLPO_PRIVATE_BASE_URLS", "true"),
    ];
    let mut process = Process::start("serve", &settings(&url, &others));
    let at = process.url().await;
    let key = furnish(&at, &upstream, "k").await;
    let client = reqwest::Client::new();
    let begin = async |reply| {
        upstream.will(reply);
        let body =
            json!({"agent": "a", "stream": true, "messages": [{"role": "user", "content": "Go"}]});
        let request = client
            .post(format!("{at}/v1/chat/completions"))
            .bearer_auth(&key)
            .json(&body);
        let mut response = request.send().await.unwrap();
        let begun = response.chunk().await.unwrap().unwrap();
        (begun, response)
    };
    let words = crate::harness::said("to the end");
    let notify = Arc::new(tokio::sync::Notify::new());
    let (before, after) = words.split_at(2);
    let (short_begun, short) = begin(Reply::Pause(
        before.to_vec(),
        notify.clone(),
        after.to_vec(),
    ))
    .await;
    let (stuck_begun, stuck) = begin(Reply::Hang(before.to_vec())).await;

    process.signal("-TERM");
    let address = at.strip_prefix("http://").unwrap();
    eventually("nothing more is accepted", || async {
        TcpStream::connect(address).await.is_err()
    })
    .await;
    notify.notify_one();
    let short = [short_begun, short.bytes().await.unwrap()].concat();
    let short = frames(std::str::from_utf8(&short).unwrap());
    assert_eq!(spoken(&short), "to the end");
    assert_eq!(short.last().unwrap()["choices"][0]["finish_reason"], "stop");
    let stuck = [stuck_begun, stuck.bytes().await.unwrap()].concat();
    let stuck = frames(std::str::from_utf8(&stuck).unwrap());
    assert_eq!(spoken(&stuck), "to ");
    assert_eq!(stuck.last().unwrap()["error"]["code"], "internal_error");
    assert!(process.child.wait().await.unwrap().success());

    let mut database = PgConnection::connect(&url).await.unwrap();
    let said: Vec<(String, bool)> = sqlx::query_as(
        "select body ->> 'content', interrupted from production.messages where body ->> 'role' = 'assistant' order by interrupted",
    )
    .fetch_all(&mut database)
    .await
    .unwrap();
    assert_eq!(
        said,
        [("to the end".to_owned(), false), ("to ".to_owned(), true)]
    );
}

/// A home of a development server, removed with its cluster whatever becomes of the test.
struct Home(PathBuf);

impl Home {
    fn new(name: &str) -> Self {
        let home = Self(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name));
        home.remove();
        home
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.0.join(name)).unwrap()
    }

    fn remove(&self) {
        let elsewhere = std::fs::read_to_string(self.0.join("postgres.path"));
        let cluster = elsewhere.map_or_else(|_| self.0.join("postgres"), |path| path.trim().into());
        let pid = std::fs::read_to_string(cluster.join("data/postmaster.pid")).unwrap_or_default();
        if let Some(pid) = pid.lines().next() {
            let _ = std::process::Command::new("kill")
                .args(["-QUIT", pid])
                .status();
        }
        let _ = std::fs::remove_file(cluster.with_extension("home"));
        let _ = std::fs::remove_dir_all(cluster);
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.remove();
    }
}

fn shell(script: &str) -> String {
    let output = std::process::Command::new("sh")
        .args(["-euc", script])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{script}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn a_development_server_finds_everything_in_place_after_a_stop_and_after_a_kill() {
    let home = Home::new("development");
    let path = home.0.to_str().unwrap().to_owned();
    let mut bind = "127.0.0.1:0".to_owned();
    let mut kept: Option<(String, String)> = None;
    let client = reqwest::Client::new();
    for (round, end) in ["-TERM", "-KILL", "-INT"].into_iter().enumerate() {
        let mut process = Process::start("dev", &[("POLPO_HOME", &path), ("POLPO_BIND", &bind)]);
        let at = process.url().await;
        at.strip_prefix("http://").unwrap().clone_into(&mut bind);
        let now = (home.read("dev.env"), home.read("master.key"));
        assert!(
            kept.as_ref().is_none_or(|before| *before == now),
            "start {round}"
        );
        kept = Some(now);
        for name in ["dev.env", "master.key"] {
            let mode = std::fs::metadata(home.0.join(name))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }

        let sourced = shell(&format!(
            "set -a; . '{path}/dev.env'; set +a; sh -c 'echo $POLPO_URL $POLPO_API_KEY $POLPO_TEST_API_KEY $POLPO_ADMIN_TOKEN'"
        ));
        let [url, live, test, admin] = sourced.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("{sourced}")
        };
        assert_eq!(url, format!("{at}/v1"));
        for key in [live, test] {
            let agent = answer(
                client
                    .get(format!("{url}/agents/assistant"))
                    .bearer_auth(key),
            )
            .await;
            assert_eq!((agent.0.as_u16(), &agent.1["model"]), (200, &json!("echo")));
        }
        let (_, projects) = answer(client.get(format!("{url}/orgs")).bearer_auth(admin)).await;
        assert_eq!(projects.as_array().unwrap().len(), 1, "{projects}");

        let out = process.out();
        let pasted = out
            .lines()
            .find(|line| line.trim_start().starts_with("curl "))
            .unwrap();
        let answered: Value = serde_json::from_str(&shell(&format!("{pasted} -sS"))).unwrap();
        let content = answered["choices"][0]["message"]["content"]
            .as_str()
            .unwrap();
        assert!(content.starts_with("You said: Hello"), "{content}");
        let (_, listed) =
            answer(client.get(format!("{url}/chat/sessions")).bearer_auth(live)).await;
        assert_eq!(
            listed["sessions"].as_array().unwrap().len(),
            round + 1,
            "{listed}"
        );

        process.signal(end);
        let status = process.child.wait().await.unwrap();
        assert_eq!(status.success(), end != "-KILL");
    }
}
