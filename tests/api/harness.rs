//! A server with a database of its own, and an upstream that plays a script.

use std::collections::VecDeque;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use clap::Parser;
use futures::StreamExt;
use polpo::app::{App, Role};
use polpo::config::Config;
use polpo::embedded::{Cluster, Durability};
use polpo::llm::{ClientSettings, Credential, HttpClient, ProjectCredentials, Providers};
use polpo::store::{World, migrate};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};
use tokio::net::TcpListener;
use tokio::sync::{Notify, OnceCell};
use tokio_util::sync::CancellationToken;

pub(crate) const ADMIN: &str = "an-admin-token-for-tests";

static CLUSTER: OnceCell<Cluster> = OnceCell::const_new();
static DATABASES: AtomicU32 = AtomicU32::new(0);

/// The cluster of this process, with a migrated database to clone.
async fn cluster() -> &'static Cluster {
    CLUSTER
        .get_or_init(|| async {
            let _ = rustls::crypto::ring::default_provider().install_default();
            let home = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("postgres");
            let cluster = Cluster::start(&home, Durability::None).await.unwrap();
            let server = cluster.pid().unwrap();
            // Nothing is dropped when a test process ends, so a shell waits for that and ends the server.
            let watch = format!(
                "while kill -0 {}; do sleep 1; done; kill -INT {server}",
                std::process::id()
            );
            #[expect(
                clippy::zombie_processes,
                reason = "it outlives us: that is its purpose"
            )]
            Command::new("sh")
                .args(["-c", &watch])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let mut admin = PgConnection::connect(&cluster.url("postgres"))
                .await
                .unwrap();
            // The databases of the run before are kept until now, as evidence.
            let old: Vec<String> =
                sqlx::query_scalar("select datname from pg_database where datname like 'test_%'")
                    .fetch_all(&mut admin)
                    .await
                    .unwrap();
            for name in old {
                admin
                    .execute(sqlx::AssertSqlSafe(format!(
                        "drop database {name} with (force)"
                    )))
                    .await
                    .unwrap();
            }
            cluster.ensure_database("test_template").unwrap();
            migrate(&cluster.url("test_template")).await.unwrap();
            cluster
        })
        .await
}

/// A new, migrated database without a row.
pub(crate) async fn database() -> String {
    copy_of("test_template").await
}

/// A new database with nothing in it.
pub(crate) async fn empty_database() -> String {
    copy_of("template1").await
}

async fn copy_of(template: &str) -> String {
    let cluster = cluster().await;
    let name = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
    let mut admin = PgConnection::connect(&cluster.url("postgres"))
        .await
        .unwrap();
    admin
        .execute(sqlx::AssertSqlSafe(format!(
            "create database {name} template {template}"
        )))
        .await
        .unwrap();
    cluster.url(&name)
}

/// How many connections to the database of this one wait for a lock.
pub(crate) async fn waiting(watch: &mut PgConnection) -> i64 {
    sqlx::query_scalar(
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
    )
    .fetch_one(watch)
    .await
    .unwrap()
}

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    config: Config,
}

/// A server under test. Its background tasks end with the test's runtime.
pub(crate) struct TestApp {
    pub(crate) app: App,
    pub(crate) url: String,
    pub(crate) database_url: String,
    pub(crate) project: String,
    pub(crate) live: String,
    pub(crate) test: String,
    pub(crate) upstream: Upstream,
    pub(crate) client: reqwest::Client,
    pub(crate) stop: CancellationToken,
}

impl TestApp {
    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// A server with further command-line settings.
    pub(crate) async fn start_with(settings: &[&str]) -> Self {
        let database_url = database().await;
        let upstream = Upstream::start().await;
        let (app, url, stop) = serve(&database_url, &upstream, settings).await;
        let organization = app.db.create_organization("Test", "test").await.unwrap();
        let project = app
            .db
            .create_project(organization.id, "Test", "test")
            .await
            .unwrap()
            .id;
        let (_, live) = app.issue_key(project, "live", World::Live).await.unwrap();
        let (_, test) = app.issue_key(project, "test", World::Test).await.unwrap();
        let client = reqwest::Client::new();
        Self {
            app,
            url,
            database_url,
            project: project.to_string(),
            live,
            test,
            upstream,
            client,
            stop,
        }
    }

    /// Another process on the same database.
    pub(crate) async fn another_process(&self) -> String {
        let (_, url, _) = serve(&self.database_url, &self.upstream, &[]).await;
        url
    }

    /// Another process, which reaches the database by a way of its own.
    pub(crate) async fn another_process_by(&self, database_url: &str, settings: &[&str]) {
        serve(database_url, &self.upstream, settings).await;
    }

    /// Another process on the same database, and what stops it.
    pub(crate) async fn another_process_with_stop(&self) -> CancellationToken {
        let quick = ["--retry-backoff-ms", "1", "--drain-timeout-ms", "100"];
        serve(&self.database_url, &self.upstream, &quick).await.2
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client
            .request(method, format!("{}{path}", self.url))
            .bearer_auth(&self.live)
    }

    pub(crate) fn get(&self, path: &str) -> RequestBuilder {
        self.request(Method::GET, path)
    }

    pub(crate) fn post(&self, path: &str, body: Value) -> RequestBuilder {
        self.request(Method::POST, path).json(&body)
    }

    pub(crate) fn patch(&self, path: &str, body: Value) -> RequestBuilder {
        self.request(Method::PATCH, path).json(&body)
    }

    pub(crate) fn delete(&self, path: &str) -> RequestBuilder {
        self.request(Method::DELETE, path)
    }

    pub(crate) fn admin(&self, method: Method, path: &str) -> RequestBuilder {
        self.client
            .request(method, format!("{}{path}", self.url))
            .bearer_auth(ADMIN)
    }

    /// An agent on the scripted upstream.
    pub(crate) async fn agent(&self, name: &str) {
        let (status, body) = answer(self.post(
            "/v1/agents",
            json!({"name": name, "model": "openai:scripted"}),
        ))
        .await;
        assert_eq!(status, 201, "{body}");
    }

    /// A task for `noor`, with further members; its id.
    pub(crate) async fn task(&self, title: &str, others: Value) -> String {
        let mut task =
            json!({"title": title, "description": format!("Do {title}"), "assignTo": "noor"});
        task.as_object_mut()
            .unwrap()
            .extend(others.as_object().unwrap().clone());
        let (status, body) = answer(self.post("/v1/tasks", task)).await;
        assert_eq!(status, 201, "{body}");
        body["id"].as_str().unwrap().to_owned()
    }

    /// A task as it stands.
    pub(crate) async fn read(&self, id: &str) -> Value {
        answer(self.get(&format!("/v1/tasks/{id}"))).await.1
    }

    /// Waits until a task stands there, and returns it.
    pub(crate) async fn until(&self, id: &str, status: &str) -> Value {
        let mut task = Value::Null;
        for _ in 0..400 {
            task = self.read(id).await;
            if task["status"] == status {
                return task;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("it never came to be {status}: {task}");
    }

    /// The events of the project so far, by name, that pass a filter.
    pub(crate) async fn events(&self, filter: &str) -> Vec<(String, Value)> {
        let mut database = PgConnection::connect(&self.database_url).await.unwrap();
        let rows: Vec<(String, String)> =
            sqlx::query_as("select name, payload from production.events order by project_id, seq")
                .fetch_all(&mut database)
                .await
                .unwrap();
        rows.into_iter()
            .filter(|(name, _)| polpo::event::passes(filter, name))
            .map(|(name, payload)| (name, serde_json::from_str(&payload).unwrap()))
            .collect()
    }

    /// How many jobs of a kind are owed.
    pub(crate) async fn owed(&self, kind: &str) -> i64 {
        let mut database = PgConnection::connect(&self.database_url).await.unwrap();
        sqlx::query_scalar("select count(*) from production.jobs where kind = $1")
            .bind(kind)
            .fetch_one(&mut database)
            .await
            .unwrap()
    }

    pub(crate) fn chat(&self, body: Value) -> RequestBuilder {
        self.post("/v1/chat/completions", body)
    }
}

async fn serve(
    database_url: &str,
    upstream: &Upstream,
    settings: &[&str],
) -> (App, String, CancellationToken) {
    let fixed = [
        "polpo",
        "--database-url",
        database_url,
        "--admin-token",
        ADMIN,
        "--rate-limit",
        "0",
        "--private-base-urls",
        "true",
        "--private-webhooks",
        "true",
        "--webhook-http",
        "true",
        "--master-key",
        "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff",
        "--idle-timeout-ms",
        "2000",
        "--world-connections",
        "4",
        "--platform-connections",
        "2",
    ];
    // A setting of the test replaces the fixed one.
    let mut arguments: Vec<&str> = Vec::new();
    // Not a setting: whether the server has an engine.
    let (roles, settings): (Vec<_>, Vec<_>) = settings
        .chunks(2)
        .partition(|pair| pair[0] == "--role-of-test");
    let role = if roles.is_empty() {
        Role::All
    } else {
        Role::Api
    };
    let mut pairs: Vec<(&str, &str)> = fixed[1..]
        .chunks(2)
        .map(|pair| (pair[0], pair[1]))
        .collect();
    for pair in settings {
        pairs.retain(|(name, _)| *name != pair[0]);
        pairs.push((pair[0], pair[1]));
    }
    arguments.push("polpo");
    arguments.extend(pairs.iter().flat_map(|(name, value)| [*name, *value]));
    let config = Arguments::parse_from(arguments).config;
    let client = HttpClient::new(ClientSettings {
        connect_timeout: Duration::from_secs(2),
        idle_timeout: Duration::from_millis(config.idle_timeout_ms),
        answer_timeout: Duration::from_millis(config.answer_timeout_ms),
        private_base_urls: config.private_base_urls,
    })
    .unwrap();
    let server = ["openai", "anthropic", "google", "deepseek"].map(|provider| {
        let credential = Credential {
            key: "server-key".to_owned().into(),
            base_url: Some(match provider {
                "anthropic" => upstream.url.clone(),
                _ => format!("{}/v1", upstream.url),
            }),
        };
        (provider.to_owned(), credential)
    });
    let server = ProjectCredentials::from(server);
    let shared = config.share_provider_keys;
    let app = App::new(config, Providers::new(client, server, shared)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let served = app.clone();
    tokio::spawn(async move {
        served
            .serve(role, listener, async move { stopped.cancelled().await })
            .await;
    });
    (app, url, stop)
}

/// Sends a request and reads its answer as JSON.
pub(crate) async fn answer(request: RequestBuilder) -> (StatusCode, Value) {
    let response = request.send().await.unwrap();
    let status = response.status();
    let text = response.text().await.unwrap();
    (
        status,
        serde_json::from_str(&text).unwrap_or(Value::String(text)),
    )
}

/// The `data:` frames of a stream, without `[DONE]`, which must be the last.
pub(crate) fn frames(text: &str) -> Vec<Value> {
    let mut frames: Vec<&str> = text
        .split("\n\n")
        .filter(|frame| !frame.is_empty() && !frame.starts_with(':'))
        .collect();
    assert_eq!(frames.pop(), Some("data: [DONE]"), "{text}");
    frames
        .into_iter()
        .map(|frame| serde_json::from_str(frame.strip_prefix("data: ").unwrap()).unwrap())
        .collect()
}

/// The text of a stream's frames.
pub(crate) fn spoken(frames: &[Value]) -> String {
    frames
        .iter()
        .filter_map(|frame| frame["choices"][0]["delta"]["content"].as_str())
        .collect()
}

/// Waits until something is so; fails after some seconds.
pub(crate) async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    for _ in 0..200 {
        if check().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("it never came to be that {what}");
}

/// What the upstream does with one request.
#[derive(Clone)]
pub(crate) enum Reply {
    /// An event stream of these bytes, in these pieces, then a proper end.
    Stream(Vec<Bytes>),
    /// The same, after a while.
    Slow(Duration, Vec<Bytes>),
    /// The same, after a while during which this is kept: it is dropped before the answer begins, or when its asker leaves.
    Kept(Arc<dyn std::any::Any + Send + Sync>, Duration, Vec<Bytes>),
    /// The same, then silence.
    Hang(Vec<Bytes>),
    /// The same, then silence until this is notified, then these.
    Pause(Vec<Bytes>, Arc<Notify>, Vec<Bytes>),
    /// The same, then the connection is cut.
    Cut(Vec<Bytes>),
    /// A stream of this many times these bytes.
    Flood(usize, Bytes),
    /// A plain answer.
    Plain(u16, Vec<(&'static str, &'static str)>, String),
}

/// What an upstream answers to a request, whenever it comes.
type Rule = Arc<dyn Fn(&Value) -> Reply + Send + Sync>;

/// A provider that plays a script and remembers what it was asked.
#[derive(Clone)]
pub(crate) struct Upstream {
    pub(crate) url: String,
    script: Arc<Mutex<VecDeque<Reply>>>,
    rule: Arc<Mutex<Option<Rule>>>,
    asked: Arc<Mutex<Vec<(HeaderMap, Value)>>>,
    left: Arc<AtomicBool>,
    flooded: Arc<AtomicUsize>,
}

impl Upstream {
    pub(crate) async fn start() -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    /// One that listens there.
    pub(crate) fn on(listener: TcpListener) -> Self {
        let upstream = Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            script: Arc::default(),
            rule: Arc::default(),
            asked: Arc::default(),
            left: Arc::default(),
            flooded: Arc::default(),
        };
        let router = Router::new().fallback(play).with_state(upstream.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        upstream
    }

    pub(crate) fn will(&self, reply: Reply) {
        self.script.lock().unwrap().push_back(reply);
    }

    /// Answers by what it is asked, when nothing is scripted: work in the background asks in no fixed order.
    pub(crate) fn answers(&self, rule: impl Fn(&Value) -> Reply + Send + Sync + 'static) {
        *self.rule.lock().unwrap() = Some(Arc::new(rule));
    }

    /// Will say this, a word a chunk.
    pub(crate) fn will_say(&self, text: &str) {
        self.will(Reply::Stream(said(text)));
    }

    /// The bodies of the requests so far.
    pub(crate) fn asked(&self) -> Vec<Value> {
        self.asked
            .lock()
            .unwrap()
            .iter()
            .map(|(_, body)| body.clone())
            .collect()
    }

    /// The headers of the requests so far.
    pub(crate) fn headers(&self) -> Vec<HeaderMap> {
        self.asked
            .lock()
            .unwrap()
            .iter()
            .map(|(headers, _)| headers.clone())
            .collect()
    }

    /// How many bytes of a flood were taken so far.
    pub(crate) fn flooded(&self) -> usize {
        self.flooded.load(Ordering::SeqCst)
    }

    /// Whether a caller left before its answer ended, since this was last asked.
    pub(crate) fn was_left(&self) -> bool {
        self.left.swap(false, Ordering::SeqCst)
    }
}

/// Tells when an answer is dropped before its end.
struct Leaving(Arc<AtomicBool>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

async fn play(State(upstream): State<Upstream>, headers: HeaderMap, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let whole = body["stream"] != true;
    let scripted = upstream.script.lock().unwrap().pop_front();
    let rule = upstream.rule.lock().unwrap().clone();
    let reply = scripted.or_else(|| rule.map(|rule| rule(&body)));
    upstream.asked.lock().unwrap().push((headers, body));
    let pieces = |pieces: Vec<Bytes>| {
        futures::stream::iter(pieces).then(|piece| async {
            tokio::task::yield_now().await;
            Ok::<_, std::io::Error>(piece)
        })
    };
    let body = match reply {
        None => {
            return (
                axum::http::StatusCode::NOT_IMPLEMENTED,
                "nothing is scripted",
            )
                .into_response();
        }
        Some(Reply::Plain(status, headers, body)) => {
            let mut response =
                (axum::http::StatusCode::from_u16(status).unwrap(), body).into_response();
            for (name, value) in headers {
                response.headers_mut().insert(name, value.parse().unwrap());
            }
            return response;
        }
        Some(Reply::Kept(kept, pause, said)) => {
            tokio::time::sleep(pause).await;
            drop(kept);
            if whole {
                Body::from(folded(&said))
            } else {
                Body::from_stream(pieces(said))
            }
        }
        Some(Reply::Slow(pause, said)) => {
            tokio::time::sleep(pause).await;
            if whole {
                Body::from(folded(&said))
            } else {
                Body::from_stream(pieces(said))
            }
        }
        Some(Reply::Stream(said)) if whole => Body::from(folded(&said)),
        Some(Reply::Stream(said)) => Body::from_stream(pieces(said)),
        Some(Reply::Flood(times, piece)) => {
            let flooded = upstream.flooded;
            Body::from_stream(futures::stream::iter(0..times).map(move |_| {
                flooded.fetch_add(piece.len(), Ordering::SeqCst);
                Ok::<_, std::io::Error>(piece.clone())
            }))
        }
        Some(Reply::Pause(before, notify, after)) => {
            let pause = futures::stream::once(async move {
                notify.notified().await;
                Ok(Bytes::new())
            });
            Body::from_stream(pieces(before).chain(pause).chain(pieces(after)))
        }
        Some(Reply::Cut(said)) => {
            let cut = futures::stream::once(async {
                tokio::time::sleep(Duration::from_millis(50)).await;
                Err(std::io::Error::other("cut"))
            });
            Body::from_stream(pieces(said).chain(cut))
        }
        Some(Reply::Hang(said)) => {
            let leaving = Leaving(upstream.left);
            let silence = futures::stream::once(async move {
                let _leaving = leaving;
                std::future::pending().await
            });
            Body::from_stream(pieces(said).chain(silence))
        }
    };
    let kind = if whole {
        "application/json"
    } else {
        "text/event-stream"
    };
    ([("content-type", kind)], body).into_response()
}

/// A stream's chunks as the answer in one piece that OpenAI gives to those who do not stream.
fn folded(said: &[Bytes]) -> String {
    let text = String::from_utf8(said.concat()).unwrap();
    let mut whole = json!({"id": "chatcmpl-up", "object": "chat.completion", "created": 1, "model": "scripted"});
    let mut choice = json!({"index": 0, "message": {"role": "assistant", "content": null}, "finish_reason": null});
    for data in text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .filter(|data| *data != "[DONE]")
    {
        let Ok(chunk) = serde_json::from_str::<Value>(data) else {
            return data.to_owned();
        };
        if chunk.get("error").is_some() {
            return data.to_owned();
        }
        let delta = &chunk["choices"][0]["delta"];
        for key in ["content", "reasoning_content", "reasoning"] {
            if let Some(piece) = delta[key].as_str() {
                let key = if key == "reasoning" {
                    "reasoning_content"
                } else {
                    key
                };
                let before = choice["message"][key].as_str().unwrap_or_default();
                choice["message"][key] = json!(format!("{before}{piece}"));
            }
        }
        if let Some(pieces) = delta["reasoning_details"].as_array() {
            if !choice["message"]["reasoning_details"].is_array() {
                choice["message"]["reasoning_details"] = json!([]);
            }
            let so_far = choice["message"]["reasoning_details"].as_array_mut();
            so_far.unwrap().extend(pieces.iter().cloned());
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            if !choice["message"]["tool_calls"].is_array() {
                choice["message"]["tool_calls"] = json!([]);
            }
            let calls = choice["message"]["tool_calls"].as_array_mut().unwrap();
            if call["id"].is_string() {
                calls.push(call.clone());
            } else {
                let arguments = &mut calls.last_mut().unwrap()["function"]["arguments"];
                *arguments = json!(format!(
                    "{}{}",
                    arguments.as_str().unwrap(),
                    call["function"]["arguments"].as_str().unwrap()
                ));
            }
        }
        if chunk["choices"][0]["finish_reason"].is_string() {
            choice["finish_reason"] = chunk["choices"][0]["finish_reason"].clone();
        }
        if chunk["usage"].is_object() {
            whole["usage"] = chunk["usage"].clone();
        }
    }
    whole["choices"] = json!([choice]);
    whole.to_string()
}

/// The text of a request's last message of a role.
pub(crate) fn last_text(request: &Value, role: &str) -> String {
    let messages = request["messages"].as_array().unwrap();
    let Some(last) = messages.iter().rfind(|message| message["role"] == role) else {
        return String::new();
    };
    match &last["content"] {
        Value::String(text) => text.clone(),
        parts => parts[0]["text"].as_str().unwrap_or_default().to_owned(),
    }
}

/// How many tool results a request shows.
pub(crate) fn results(request: &Value) -> usize {
    let messages = request["messages"].as_array().unwrap();
    messages
        .iter()
        .filter(|message| message["role"] == "tool")
        .count()
}

/// A chunk of OpenAI's stream.
pub(crate) fn chunk(delta: &Value, finish: Option<&str>) -> Bytes {
    let chunk = json!({"id": "chatcmpl-up", "object": "chat.completion.chunk", "created": 1, "model": "scripted",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]});
    Bytes::from(format!("data: {chunk}\n\n"))
}

/// The end of OpenAI's stream.
pub(crate) fn ending(finish: &str) -> Vec<Bytes> {
    let usage = json!({"id": "chatcmpl-up", "object": "chat.completion.chunk", "created": 1, "model": "scripted", "choices": [],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18,
            "prompt_tokens_details": {"cached_tokens": 3}, "completion_tokens_details": {"reasoning_tokens": 2}}});
    vec![
        chunk(&json!({}), Some(finish)),
        Bytes::from(format!("data: {usage}\n\n")),
        Bytes::from_static(b"data: [DONE]\n\n"),
    ]
}

/// OpenAI's stream of a text, a word a chunk.
pub(crate) fn said(text: &str) -> Vec<Bytes> {
    let words = text
        .split_inclusive(' ')
        .map(|word| chunk(&json!({"content": word}), None));
    [chunk(&json!({"role": "assistant", "content": ""}), None)]
        .into_iter()
        .chain(words)
        .chain(ending("stop"))
        .collect()
}

/// OpenAI's stream of tool calls: id and name first, arguments in pieces.
pub(crate) fn called(calls: &[(&str, &str, &[&str])]) -> Vec<Bytes> {
    let mut chunks = vec![chunk(&json!({"role": "assistant", "content": null}), None)];
    for (index, (id, name, pieces)) in calls.iter().enumerate() {
        chunks.push(chunk(&json!({"tool_calls": [{"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}]}), None));
        for piece in *pieces {
            chunks.push(chunk(
                &json!({"tool_calls": [{"index": index, "function": {"arguments": piece}}]}),
                None,
            ));
        }
    }
    chunks.extend(ending("tool_calls"));
    chunks
}

/// Waits until another process has done a task, and returns it.
pub(crate) async fn done_elsewhere(app: &TestApp, url: &str, id: &str) -> Value {
    for _ in 0..400 {
        let request = app
            .client
            .get(format!("{url}/v1/tasks/{id}"))
            .bearer_auth(&app.live);
        let task = answer(request).await.1;
        if task["status"] == "done" {
            return task;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("it was never done");
}
