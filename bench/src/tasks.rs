//! Measures the engine: what it adds to the model's own time, how many tasks it finishes, how soon it goes on after a
//! kill, and how late an event is. There is nothing to compare with in the same run, so these are absolute figures.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use polpo::embedded::Cluster;
use polpo::ids::{self, Id};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::sync::mpsc;

use crate::process::{Server, cpu_seconds, cpu_seconds_of_tree, resident_mb};
use crate::report::percentile;
use crate::run::{ADMIN, settings};
use crate::upstream::{Asked, Waited, now_us};

/// One project of a running polpo.
#[derive(Clone)]
pub(crate) struct Project {
    pub(crate) client: reqwest::Client,
    pub(crate) url: String,
    pub(crate) key: String,
}

/// A frame of the event stream, and when it came.
pub(crate) struct Told {
    pub(crate) name: String,
    pub(crate) payload: Value,
    pub(crate) at_us: u64,
}

impl Project {
    pub(crate) async fn make(url: &str, name: &str) -> anyhow::Result<Self> {
        let client = reqwest::Client::builder().tcp_nodelay(true).build()?;
        let post = async |path: &str, token: &str, body: Value| -> anyhow::Result<Value> {
            let request = client
                .post(format!("{url}{path}"))
                .bearer_auth(token)
                .json(&body);
            Ok(request.send().await?.error_for_status()?.json().await?)
        };
        let organization = post("/v1/orgs", ADMIN, json!({"name": name})).await?;
        let project = post(
            "/v1/projects",
            ADMIN,
            json!({"orgId": organization["id"], "name": name}),
        )
        .await?;
        let scopes = json!([{"type": "project", "projectId": project["id"]}]);
        let key = post("/v1/api-keys", ADMIN, json!({"scopes": scopes})).await?;
        let key = key["key"].as_str().context("no key")?.to_owned();
        for model in [
            "agent-1-50",
            "agent-51-50",
            "agent-51-50-save",
            "agent-6-50",
            "agent-1-0",
            "agent-200-50",
            "agent-400-0",
        ] {
            post(
                "/v1/agents",
                &key,
                json!({"name": model, "model": format!("openai:{model}"), "maxTurns": 500}),
            )
            .await?;
        }
        Ok(Self {
            client,
            url: url.to_owned(),
            key,
        })
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let request = self
            .client
            .post(format!("{}{path}", self.url))
            .bearer_auth(&self.key)
            .json(body);
        let response = request.send().await?;
        let status = response.status();
        let text = response.text().await?;
        ensure!(status.is_success(), "{path}: {status}: {text}");
        Ok(serde_json::from_str(&text)?)
    }

    pub(crate) async fn create(&self, agent: &str, title: &str) -> anyhow::Result<String> {
        let task = json!({"title": title, "description": title, "assignTo": agent});
        let task = self.post("/v1/tasks", &task).await?;
        Ok(task["id"].as_str().context("no id")?.to_owned())
    }

    /// Follows events; ends when the receiver is dropped.
    pub(crate) async fn follow(
        &self,
        filter: &str,
    ) -> anyhow::Result<mpsc::UnboundedReceiver<Told>> {
        let request = self
            .client
            .get(format!("{}/v1/events?filter={filter}", self.url))
            .bearer_auth(&self.key);
        let mut body = request.send().await?.error_for_status()?.bytes_stream();
        // The first piece says that the stream is live.
        body.next().await.context("the event stream ended")??;
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut text = String::new();
            while let Some(Ok(piece)) = body.next().await {
                let at_us = now_us();
                text.push_str(&String::from_utf8_lossy(&piece));
                while let Some(end) = text.find("\n\n") {
                    let frame: String = text.drain(..end + 2).collect();
                    let line = |key: &str| {
                        frame
                            .lines()
                            .find_map(|line| line.strip_prefix(key))
                            .unwrap_or_default()
                            .to_owned()
                    };
                    let (name, data) = (line("event: "), line("data: "));
                    if name.is_empty() || data.is_empty() {
                        continue;
                    }
                    let payload = serde_json::from_str(&data).unwrap_or_default();
                    if sender
                        .send(Told {
                            name,
                            payload,
                            at_us,
                        })
                        .is_err()
                    {
                        return;
                    }
                }
            }
        });
        Ok(receiver)
    }
}

/// Drives the engine and prints what came of it.
pub(crate) async fn measure(
    polpo: &Path,
    cluster: &Cluster,
    upstream: &str,
    sustained: u64,
) -> anyhow::Result<()> {
    cluster.ensure_database("engine")?;
    let database = cluster.url("engine");
    polpo::store::migrate(&database).await?;
    let postgres = cluster.pid().context("the database ended")?;
    let server = Server::start(
        polpo,
        &["serve"],
        &settings(&database, "127.0.0.1:4806", upstream),
        4806,
    )
    .await?;
    let project = Project::make(&server.url, "Engine").await?;
    println!(
        "\n{:<50}{:>12}{:>20}",
        "the engine", "measured", "published"
    );
    let mut events = project.follow("task:completed").await?;
    own_time(&project, &mut events, upstream).await?;
    sustain(&project, &mut events, server.pid()?, postgres, sustained).await?;
    events_in_time(&project, &server).await?;
    drop(events);
    resume(polpo, &project, server, &database, upstream).await
}

/// How much something was at the start and at the end.
fn row_pair(name: &str, start: f64, end: f64) {
    println!(
        "{name:<50}{:>12}{:>20}",
        format!("{start:.1}, {end:.1}"),
        "-"
    );
}

pub(crate) fn row(name: &str, value: f64) {
    println!("{name:<50}{value:>12.2}{:>20}", "-");
}

/// A row beside the figure that the original has published for the same work.
fn row_beside(name: &str, value: f64, published: &str) {
    println!("{name:<50}{value:>12.2}{published:>20}");
}

/// Waits for so many tasks to be done.
pub(crate) async fn done(
    events: &mut mpsc::UnboundedReceiver<Told>,
    count: usize,
) -> anyhow::Result<()> {
    for _ in 0..count {
        let told = tokio::time::timeout(Duration::from_secs(120), events.recv())
            .await
            .context("a task is not done")?;
        ensure!(
            told.context("the event stream ended")?.name == "task:completed",
            "another event"
        );
    }
    Ok(())
}

/// The milliseconds that the provider had, since this was last asked, of the task that it had longest.
async fn model_ms(upstream: &str) -> anyhow::Result<f64> {
    let waited: Waited = reqwest::get(format!("{upstream}/waited"))
        .await?
        .json()
        .await?;
    let longest = waited.values().max().context("no model was asked")?;
    Ok(Duration::from_micros(*longest).as_secs_f64() * 1000.0)
}

/// What some tasks at once take beyond the model's own time, in milliseconds.
async fn own_ms(
    project: &Project,
    events: &mut mpsc::UnboundedReceiver<Told>,
    upstream: &str,
    agent: &str,
    titles: &[String],
) -> anyhow::Result<f64> {
    let began = Instant::now();
    futures::future::try_join_all(titles.iter().map(|title| project.create(agent, title))).await?;
    done(events, titles.len()).await?;
    let took = began.elapsed().as_secs_f64() * 1000.0;
    Ok(took - model_ms(upstream).await?)
}

async fn own_time(
    project: &Project,
    events: &mut mpsc::UnboundedReceiver<Told>,
    upstream: &str,
) -> anyhow::Result<()> {
    // The first rounds make connections and plans, which a server that is in use has.
    let mut rounds = async |agent: &str, at_once: usize, warm: usize, rounds: usize| {
        let mut own = Vec::new();
        for round in 0..warm + rounds {
            let titles: Vec<String> = (0..at_once)
                .map(|number| format!("{agent} {at_once} {round} {number}"))
                .collect();
            let ms = own_ms(project, events, upstream, agent, &titles).await?;
            if round >= warm {
                own.push(ms);
            }
        }
        anyhow::Ok(own)
    };
    let one = rounds("agent-1-50", 1, 20, 60).await?;
    row_beside(
        "one task of one call, own ms, p50",
        percentile(&one, 50.0),
        "105",
    );
    row("one task of one call, own ms, p99", percentile(&one, 99.0));
    let long = rounds("agent-51-50", 1, 0, 5).await?;
    row_beside("50 tool turns, own ms", percentile(&long, 50.0), "970");
    let long = rounds("agent-51-50-save", 1, 0, 5).await?;
    row(
        "  of a tool that writes, in a commit of its own",
        percentile(&long, 50.0),
    );
    let ten = rounds("agent-6-50", 10, 5, 15).await?;
    row_beside(
        "ten at once of five turns, above the model, ms",
        percentile(&ten, 50.0),
        "930",
    );
    Ok(())
}

/// One-call tasks with an instant model, as many as there is time for, with at most some hundred unfinished.
async fn sustain(
    project: &Project,
    events: &mut mpsc::UnboundedReceiver<Told>,
    pid: u32,
    postgres: u32,
    seconds: u64,
) -> anyhow::Result<()> {
    if seconds == 0 {
        return Ok(());
    }
    let until = Instant::now() + Duration::from_secs(seconds);
    let open = Arc::new(tokio::sync::Semaphore::new(200));
    let created = Arc::new(AtomicUsize::new(0));
    let mut creators = Vec::new();
    for creator in 0..8 {
        let (project, open, created) = (project.clone(), open.clone(), created.clone());
        creators.push(tokio::spawn(async move {
            let mut number = 0;
            while Instant::now() < until {
                open.acquire().await?.forget();
                project
                    .create("agent-1-0", &format!("s {creator} {number}"))
                    .await?;
                created.fetch_add(1, Ordering::Relaxed);
                number += 1;
            }
            anyhow::Ok(())
        }));
    }
    let (own, database) = (cpu_seconds(pid), cpu_seconds_of_tree(postgres));
    let start = resident_mb(pid);
    let (began, mut finished, mut early) = (Instant::now(), 0usize, 0.0);
    while Instant::now() < until {
        if tokio::time::timeout_at(until.into(), done(events, 1))
            .await
            .is_ok_and(|done| done.is_ok())
        {
            finished += 1;
            open.add_permits(1);
        }
        if early == 0.0 && began.elapsed() > Duration::from_secs(seconds / 4) {
            early = resident_mb(pid);
        }
    }
    let elapsed = began.elapsed().as_secs_f64();
    let late = resident_mb(pid);
    let (own, database) = (
        cpu_seconds(pid) - own,
        cpu_seconds_of_tree(postgres) - database,
    );
    open.add_permits(100_000);
    for creator in creators {
        creator.await??;
    }
    let left = created.load(Ordering::Relaxed) - finished;
    done(events, left).await?;
    row(
        "one-call tasks finished per second",
        finished as f64 / elapsed,
    );
    row("  CPU s per 1,000, polpo", own / finished as f64 * 1000.0);
    row(
        "  CPU s per 1,000, with Postgres",
        (own + database) / finished as f64 * 1000.0,
    );
    row_pair("  resident MB, at the start and at the end", start, late);
    row("  resident MB after a quarter", early);
    Ok(())
}

/// 200 events a second with 1,000 readers attached to the same project, who wait for an event that does not come.
async fn events_in_time(project: &Project, server: &Server) -> anyhow::Result<()> {
    const IDLE: usize = 1_000;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = resident_mb(server.pid()?);
    let mut idle = Vec::new();
    for _ in 0..IDLE / 50 {
        let some = (0..50).map(|_| project.follow("mission:aborted"));
        idle.extend(futures::future::try_join_all(some).await?);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    row(
        "an idle event reader, kB",
        (resident_mb(server.pid()?) - before) * 1024.0 / IDLE as f64,
    );
    let mut events = project.follow("task:created").await?;
    let writer = {
        let project = project.clone();
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(5));
            for number in 0..2_000 {
                ticks.tick().await;
                let project = project.clone();
                tokio::spawn(async move {
                    let task = json!({"title": format!("e {number}"), "description": "d", "assignTo": "agent-1-0", "draft": true});
                    project.post("/v1/tasks", &task).await
                });
            }
        })
    };
    let mut late = Vec::new();
    for _ in 0..2_000 {
        let told = tokio::time::timeout(Duration::from_secs(30), events.recv())
            .await?
            .context("the event stream ended")?;
        let at = told.payload["timestamp"].as_str().context("no timestamp")?;
        let at_us = polpo_time_us(at).context("no time")?;
        late.push(told.at_us.saturating_sub(at_us) as f64 / 1000.0);
    }
    writer.await?;
    row(
        "  after 2,000 events that are not for them, kB",
        (resident_mb(server.pid()?) - before) * 1024.0 / IDLE as f64,
    );
    row(
        "200 events a second, stamp to frame ms, p50",
        percentile(&late, 50.0),
    );
    row(
        "200 events a second, stamp to frame ms, p99",
        percentile(&late, 99.0),
    );
    drop(idle);
    Ok(())
}

pub(crate) fn polpo_time_us(text: &str) -> Option<u64> {
    let at = chrono::DateTime::parse_from_rfc3339(text).ok()?;
    u64::try_from(at.timestamp_micros()).ok()
}

/// Two processes on one database, either of which may be away.
struct Pair<'a> {
    polpo: &'a Path,
    database: &'a str,
    upstream: &'a str,
    servers: [Option<Server>; 2],
}

const PORTS: [u16; 2] = [4806, 4807];

impl Pair<'_> {
    /// Starts those that are away.
    async fn complete(&mut self) -> anyhow::Result<()> {
        for (server, port) in self.servers.iter_mut().zip(PORTS) {
            if server.is_none() {
                let variables =
                    settings(self.database, &format!("127.0.0.1:{port}"), self.upstream);
                *server = Some(Server::start(self.polpo, &["serve"], &variables, port).await?);
            }
        }
        Ok(())
    }

    /// Which of them is at a task.
    async fn at(&self, project: &Project, task: &str) -> anyhow::Result<usize> {
        let request = project
            .client
            .get(format!("{}/v1/agents/processes", project.url))
            .bearer_auth(&project.key);
        let listed: Value = request.send().await?.json().await?;
        let pid = listed
            .as_array()
            .into_iter()
            .flatten()
            .find(|one| one["taskId"] == task)
            .and_then(|one| one["pid"].as_u64());
        let pid = u32::try_from(pid.context("nobody runs the task")?)?;
        let is_it = |server: &Option<Server>| {
            server
                .as_ref()
                .is_some_and(|server| server.pid().is_ok_and(|own| own == pid))
        };
        self.servers
            .iter()
            .position(is_it)
            .context("another process runs the task")
    }
}

/// How often turns were asked for, and how often such as were on record already.
#[derive(Default)]
struct Turns {
    asked: usize,
    repeated: usize,
}

impl Turns {
    /// Counts a task's. A turn's answer is on record from the time of its step on; whoever asks for it then repeats it.
    async fn count(&mut self, pair: &Pair<'_>, id: &str, title: &str) -> anyhow::Result<()> {
        let task = id.parse::<Id<ids::Task>>()?.uuid();
        let pool = PgPool::connect(pair.database).await?;
        let recorded: Vec<i64> = sqlx::query_scalar(
            "select (extract(epoch from s.created_at) * 1000000)::bigint
            from production.tasks t
            join production.steps s on s.project_id = t.project_id and s.run_id = t.run_id
            where t.id = $1 and s.kind = 'model'
            order by s.number",
        )
        .bind(task)
        .fetch_all(&pool)
        .await?;
        pool.close().await;
        ensure!(!recorded.is_empty(), "no turn is on record");
        for (at, turn) in asked(pair.upstream, title).await? {
            let recorded = recorded.get(usize::try_from(turn)?);
            self.asked += 1;
            self.repeated +=
                usize::from(recorded.is_some_and(|recorded| *recorded < at.cast_signed()));
        }
        Ok(())
    }
}

/// Stops the process that runs a long task, in three ways, and looks when its model is asked again.
async fn resume(
    polpo: &Path,
    project: &Project,
    server: Server,
    database: &str,
    upstream: &str,
) -> anyhow::Result<()> {
    let mut pair = Pair {
        polpo,
        database,
        upstream,
        servers: [Some(server), None],
    };
    let mut turns = Turns::default();
    killed(&mut pair, project, &mut turns).await?;
    hung(&mut pair, project, &mut turns).await?;
    restarted(&mut pair, project, &mut turns).await?;
    row("  turns asked for in all of these", turns.asked as f64);
    row("  turns asked for though on record", turns.repeated as f64);
    Ok(())
}

/// Kill -9, and another process.
async fn killed(pair: &mut Pair<'_>, project: &Project, turns: &mut Turns) -> anyhow::Result<()> {
    let mut late = Vec::new();
    for round in 0..5 {
        pair.complete().await?;
        let title = format!("resume {round}");
        let id = project.create("agent-200-50", &title).await?;
        tokio::time::sleep(Duration::from_millis(700)).await;
        let at = pair.at(project, &id).await?;
        let killed = now_us();
        // Dropping it is kill -9.
        drop(pair.servers[at].take());
        late.push(asked_after(pair.upstream, &title, killed).await?);
        pair.complete().await?;
        turns.count(pair, &id, &title).await?;
        through_any(project, &id).await?;
    }
    row_beside(
        "kill to next model request, other process, ms",
        percentile(&late, 50.0),
        "1300 to 1600",
    );
    row("  the worst of five", percentile(&late, 100.0));
    Ok(())
}

/// A process that neither goes on nor dies, and another one: while it waits for a model, and in the midst of its commits.
async fn hung(pair: &mut Pair<'_>, project: &Project, turns: &mut Turns) -> anyhow::Result<()> {
    for (agent, after, label) in [
        (
            "agent-200-50",
            700,
            "hang to next model request, other process, ms",
        ),
        (
            "agent-400-0",
            200,
            "the same amid commits, an instant model, ms",
        ),
    ] {
        let mut late = Vec::new();
        for round in 0..3 {
            pair.complete().await?;
            let title = format!("resume {agent} {round}");
            let id = project.create(agent, &title).await?;
            tokio::time::sleep(Duration::from_millis(after)).await;
            let at = pair.at(project, &id).await?;
            let pid = pair.servers[at].as_ref().context("it is away")?.pid()?;
            signal(pid, "STOP").await?;
            let asked = asked_after(pair.upstream, &title, now_us()).await;
            signal(pid, "CONT").await?;
            // Never is a figure too.
            late.push(asked.unwrap_or(f64::INFINITY));
            // It finds out by itself that the task is another's.
            tokio::time::sleep(Duration::from_secs(1)).await;
            turns.count(pair, &id, &title).await?;
            // The instant ones may be done.
            let _ = project
                .post(&format!("/v1/tasks/{id}/kill"), &json!({}))
                .await;
        }
        row(label, percentile(&late, 50.0));
        row("  the worst of three", percentile(&late, 100.0));
    }
    Ok(())
}

async fn signal(pid: u32, name: &str) -> anyhow::Result<()> {
    let status = tokio::process::Command::new("kill")
        .args([format!("-{name}"), pid.to_string()])
        .status()
        .await?;
    ensure!(status.success(), "no signal can be sent");
    Ok(())
}

/// Kill -9, and the same process again.
async fn restarted(
    pair: &mut Pair<'_>,
    project: &Project,
    turns: &mut Turns,
) -> anyhow::Result<()> {
    let mut late = Vec::new();
    for round in 0..5 {
        pair.servers[1] = None;
        let title = format!("restart {round}");
        let id = project.create("agent-200-50", &title).await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        pair.servers[0] = None;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let started = now_us();
        let variables = settings(pair.database, "127.0.0.1:4806", pair.upstream);
        let server = Server::start(pair.polpo, &["serve"], &variables, PORTS[0]).await?;
        pair.servers[0] = Some(server);
        late.push(asked_after(pair.upstream, &title, started).await?);
        turns.count(pair, &id, &title).await?;
        through_any(project, &id).await?;
    }
    row(
        "start to next model request, restarted, ms",
        percentile(&late, 50.0),
    );
    row("  the worst of five", percentile(&late, 100.0));
    Ok(())
}

/// Ends a task that has served its purpose.
async fn through_any(project: &Project, id: &str) -> anyhow::Result<()> {
    for _ in 0..100 {
        if project
            .post(&format!("/v1/tasks/{id}/kill"), &json!({}))
            .await
            .is_ok()
        {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("a task cannot be killed")
}

/// When the provider was asked about a task, and for which turn.
async fn asked(upstream: &str, title: &str) -> anyhow::Result<Vec<(u64, u64)>> {
    let mut asked: Asked = reqwest::get(format!("{upstream}/asked"))
        .await?
        .json()
        .await?;
    Ok(asked.remove(title).unwrap_or_default())
}

/// Milliseconds from an instant to the next time that the provider was asked about a task.
async fn asked_after(upstream: &str, title: &str, after_us: u64) -> anyhow::Result<f64> {
    for _ in 0..2_000 {
        let asked = asked(upstream, title).await?;
        if let Some((at, _)) = asked.into_iter().find(|(at, _)| *at > after_us) {
            return Ok((at - after_us) as f64 / 1000.0);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bail!("the task was not gone on with")
}
