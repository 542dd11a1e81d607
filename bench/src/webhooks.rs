//! Measures webhooks: how many deliveries a second a quick receiver gets and how late, what a dead one beside it changes, and
//! what both cost the engine.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use polpo::embedded::Cluster;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::process::{Server, cpu_seconds, cpu_seconds_of_tree};
use crate::report::percentile;
use crate::run::settings;
use crate::tasks::{Project, done, polpo_time_us, row};
use crate::upstream::now_us;

const PORT: u16 = 4809;
/// Events a second of the paced load.
const PACE: u64 = 400;
const PACED: usize = 4_000;
const FLOOD: usize = 10_000;

/// Milliseconds from an event's stamp to its arrival.
type Arrivals = mpsc::UnboundedReceiver<f64>;

/// A receiver that answers at once.
async fn quick() -> anyhow::Result<(String, Arrivals)> {
    let (sender, arrivals) = mpsc::unbounded_channel();
    let take = async |State(sender): State<mpsc::UnboundedSender<f64>>, body: Bytes| {
        let now = now_us();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let at = body["timestamp"].as_str().and_then(polpo_time_us);
        let late = at.map_or(f64::NAN, |at| now.saturating_sub(at) as f64 / 1000.0);
        let _ = sender.send(late);
        StatusCode::NO_CONTENT
    };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/", listener.local_addr()?);
    let listener =
        axum::serve::ListenerExt::tap_io(listener, |stream| drop(stream.set_nodelay(true)));
    let router = Router::new().fallback(take).with_state(sender);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok((url, arrivals))
}

/// A receiver that takes connections and never answers. Returns how many it took.
async fn dead() -> anyhow::Result<(String, Arc<AtomicUsize>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/", listener.local_addr()?);
    let taken = Arc::new(AtomicUsize::new(0));
    let count = taken.clone();
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::Relaxed);
            kept.push(stream);
        }
    });
    Ok((url, taken))
}

/// Drives webhooks and prints what came of it.
pub(crate) async fn measure(polpo: &Path, cluster: &Cluster, upstream: &str) -> anyhow::Result<()> {
    cluster.ensure_database("webhooks")?;
    let database = cluster.url("webhooks");
    polpo::store::migrate(&database).await?;
    let postgres = cluster.pid().context("the database ended")?;
    let mut variables = settings(&database, "127.0.0.1:4809", upstream);
    variables.push(("POLPO_WEBHOOK_HTTP", "true".to_owned()));
    variables.push(("POLPO_PRIVATE_WEBHOOKS", "true".to_owned()));
    let server = Server::start(polpo, &["serve"], &variables, PORT).await?;
    let pid = server.pid()?;
    println!("\n{:<50}{:>12}{:>20}", "webhooks", "measured", "published");
    for with_dead in [false, true] {
        let beside = if with_dead {
            "beside a dead one"
        } else {
            "alone"
        };
        let project = Project::make(&server.url, beside).await?;
        let (url, mut arrivals) = quick().await?;
        listen(&project, &url, "*").await?;
        let (url, taken) = dead().await?;
        if with_dead {
            listen(&project, &url, "*").await?;
        }
        drive(&project, "warm", 200, None, &mut arrivals).await?;
        let (_, late) = drive(&project, "paced", PACED, Some(PACE), &mut arrivals).await?;
        row(
            &format!("{PACE} a second, {beside}: stamp to arrival ms, p50"),
            percentile(&late, 50.0),
        );
        row("  p99", percentile(&late, 99.0));
        let (own, with_database) = (cpu_seconds(pid), cpu_seconds_of_tree(postgres));
        let (elapsed, _) = drive(&project, "flood", FLOOD, None, &mut arrivals).await?;
        row(
            &format!("as many as there are, {beside}: a second"),
            FLOOD as f64 / elapsed.as_secs_f64(),
        );
        let own = cpu_seconds(pid) - own;
        let with_database = own + cpu_seconds_of_tree(postgres) - with_database;
        let thousands = FLOOD as f64 / 1000.0;
        row(
            "  CPU s per 1,000, polpo, making them included",
            own / thousands,
        );
        row("  with Postgres", with_database / thousands);
        ensure!(
            with_dead == (taken.load(Ordering::Relaxed) > 0),
            "the dead one is not where it should be"
        );
    }
    backlog(&server).await?;
    for (round, label) in [
        "no webhook",
        "a quick one",
        "a quick and a dead one",
        "no webhook, again",
    ]
    .into_iter()
    .enumerate()
    {
        engine(&server, round, label).await?;
    }
    Ok(())
}

async fn listen(project: &Project, url: &str, events: &str) -> anyhow::Result<Value> {
    let new = json!({"url": url, "events": [events]});
    project.post("/v1/webhooks", &new).await
}

async fn draft(project: &Project, title: String) -> anyhow::Result<Value> {
    let task = json!({"title": title, "description": "d", "assignTo": "agent-1-0", "draft": true});
    project.post("/v1/tasks", &task).await
}

/// Makes so many events, each of another task, and waits until they have arrived. Returns how long that took, and how late
/// each was.
async fn drive(
    project: &Project,
    name: &str,
    count: usize,
    pace: Option<u64>,
    arrivals: &mut Arrivals,
) -> anyhow::Result<(Duration, Vec<f64>)> {
    let began = Instant::now();
    let next = Arc::new(AtomicUsize::new(0));
    let mut makers = Vec::new();
    for _ in 0..16 {
        let (project, next, name) = (project.clone(), next.clone(), name.to_owned());
        makers.push(tokio::spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return anyhow::Ok(());
                }
                if let Some(pace) = pace {
                    let due = Duration::from_secs_f64(number as f64 / pace as f64);
                    tokio::time::sleep_until((began + due).into()).await;
                }
                draft(&project, format!("{name} {number}")).await?;
            }
        }));
    }
    let mut late = Vec::new();
    for _ in 0..count {
        let arrived = tokio::time::timeout(Duration::from_secs(60), arrivals.recv());
        late.push(
            arrived
                .await
                .context("a delivery is missing")?
                .context("the receiver ended")?,
        );
    }
    let elapsed = began.elapsed();
    for maker in makers {
        maker.await??;
    }
    Ok((elapsed, late))
}

/// What waits in the log while a webhook's server is away, and how fast it is made up for.
async fn backlog(server: &Server) -> anyhow::Result<()> {
    let project = Project::make(&server.url, "Backlog").await?;
    let (url, mut arrivals) = quick().await?;
    let (unheard, _) = dead().await?;
    let made = listen(&project, &unheard, "*").await?;
    let path = format!("/v1/webhooks/{}", made["id"].as_str().context("no id")?);
    let mut makers = Vec::new();
    for maker in 0..16 {
        let project = project.clone();
        makers.push(tokio::spawn(async move {
            for number in 0..FLOOD / 16 {
                draft(&project, format!("b {maker} {number}")).await?;
            }
            anyhow::Ok(())
        }));
    }
    for maker in makers {
        maker.await??;
    }
    let request = project
        .client
        .patch(format!("{}{path}", project.url))
        .bearer_auth(&project.key)
        .json(&json!({"url": url}));
    request.send().await?.error_for_status()?;
    let count = FLOOD / 16 * 16;
    let mut began = None;
    for _ in 0..count {
        let arrived = tokio::time::timeout(Duration::from_secs(60), arrivals.recv());
        arrived.await.context("a delivery is missing")?;
        began.get_or_insert_with(Instant::now);
    }
    let elapsed = began.context("nothing came")?.elapsed();
    row(
        "a backlog, once the receiver is back: a second",
        count as f64 / elapsed.as_secs_f64(),
    );
    Ok(())
}

/// One-call tasks with an instant model, while webhooks are told of each that is done.
async fn engine(server: &Server, round: usize, label: &str) -> anyhow::Result<()> {
    const TASKS: usize = 6_000;
    let project = Project::make(&server.url, &format!("Engine {round}")).await?;
    let (url, mut arrivals) = quick().await?;
    if matches!(round, 1 | 2) {
        listen(&project, &url, "task:completed").await?;
    }
    if round == 2 {
        listen(&project, &dead().await?.0, "task:completed").await?;
    }
    let mut events = project.follow("task:completed").await?;
    let open = Arc::new(tokio::sync::Semaphore::new(200));
    let began = Instant::now();
    let makers: Vec<_> = (0..8)
        .map(|maker| {
            let (project, open) = (project.clone(), open.clone());
            tokio::spawn(async move {
                for number in 0..TASKS / 8 {
                    open.acquire().await?.forget();
                    project
                        .create("agent-1-0", &format!("{maker} {number}"))
                        .await?;
                }
                anyhow::Ok(())
            })
        })
        .collect();
    for _ in 0..TASKS {
        done(&mut events, 1).await?;
        open.add_permits(1);
    }
    let elapsed = began.elapsed().as_secs_f64();
    for maker in makers {
        maker.await??;
    }
    row(
        &format!("one-call tasks a second, {label}"),
        TASKS as f64 / elapsed,
    );
    if matches!(round, 1 | 2) {
        for _ in 0..TASKS {
            let arrived = tokio::time::timeout(Duration::from_secs(60), arrivals.recv());
            if arrived.await.context("a delivery is missing")?.is_none() {
                bail!("the receiver ended");
            }
        }
        row(
            "  deliveries a second meanwhile",
            TASKS as f64 / began.elapsed().as_secs_f64(),
        );
    }
    Ok(())
}
