//! Starts everything, drives each system in turn, round after round, and prints what came of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use polpo::embedded::{Cluster, Durability};
use serde_json::{Value, json};

use crate::load::{Measured, Target};
use crate::process::{Server, cpu_seconds, cpu_seconds_of_tree, resident_mb};
use crate::report::{Report, percentile};
use crate::{missions, tasks, webhooks};

#[derive(Args)]
pub(crate) struct Options {
    /// The polpo to measure.
    #[arg(long)]
    polpo: PathBuf,
    /// Where the database goes; removed afterwards.
    #[arg(long)]
    home: PathBuf,
    /// How often each system is driven.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Streams held at once; 0 leaves them out.
    #[arg(long, default_value_t = 2000)]
    held: usize,
    /// Seconds of the engine's sustained load; 0 leaves it out.
    #[arg(long, default_value_t = 60)]
    sustained: u64,
    /// Measure the engine alone.
    #[arg(long)]
    only_tasks: bool,
    /// Measure webhooks alone.
    #[arg(long)]
    only_webhooks: bool,
    /// Measure missions and schedules alone.
    #[arg(long)]
    only_missions: bool,
    /// Schedules that are due in the same second; 0 leaves them out.
    #[arg(long, default_value_t = 10_000)]
    schedules: usize,
    /// Requests of each closed loop.
    #[arg(long, default_value_t = 4000)]
    requests: usize,
}

pub(crate) const ADMIN: &str = "benchmark-admin-token";
const SYSTEMS: &[&str] = &["direct", "pass", "reference", "polpo"];

struct System {
    name: &'static str,
    target: Target,
    pid: Option<u32>,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let cluster = Cluster::start(&options.home, Durability::Full).await?;
    let measured = measure(&options, &cluster).await;
    cluster.stop().await?;
    measured
}

async fn measure(options: &Options, cluster: &Cluster) -> anyhow::Result<()> {
    let postgres = cluster.pid().context("the database ended")?;
    cluster.ensure_database("reference")?;
    cluster.ensure_database("polpo")?;
    polpo::store::migrate(&cluster.url("polpo")).await?;
    let me = std::env::current_exe()?;
    let upstream = Server::start(&me, &["upstream", "--port", "4801"], &[], 4801).await?;
    if options.only_tasks {
        return tasks::measure(&options.polpo, cluster, &upstream.url, options.sustained).await;
    }
    if options.only_webhooks {
        return webhooks::measure(&options.polpo, cluster, &upstream.url).await;
    }
    if options.only_missions {
        return measure_missions(options, cluster, &upstream.url).await;
    }
    let pass = Server::start(
        &me,
        &["proxy", "--port", "4802", "--upstream", &upstream.url],
        &[],
        4802,
    )
    .await?;
    let database = cluster.url("reference");
    let arguments = [
        "proxy",
        "--port",
        "4803",
        "--upstream",
        &upstream.url,
        "--database-url",
        &database,
    ];
    let reference = Server::start(&me, &arguments, &[], 4803).await?;
    let (polpo, key) = start_polpo(&options.polpo, cluster, &upstream.url).await?;

    let client = reqwest::Client::builder()
        .tcp_nodelay(true)
        .pool_max_idle_per_host(64)
        .build()?;
    let system = |name, server: &Server, key: &str| {
        let target = Target {
            client: client.clone(),
            url: server.url.clone(),
            key: key.to_owned(),
        };
        Ok::<_, anyhow::Error>(System {
            name,
            target,
            pid: Some(server.pid()?),
        })
    };
    let systems = [
        system("direct", &upstream, "k")?,
        system("pass", &pass, "k")?,
        system("reference", &reference, "k")?,
        system("polpo", &polpo, &key)?,
    ];

    let mut report = Report::default();
    tokio::time::sleep(Duration::from_secs(1)).await;
    for system in systems.iter().filter(|system| system.name != "direct") {
        report.add(
            "idle resident MB",
            system.name,
            resident_mb(system.pid.unwrap_or(0)),
        );
    }
    report.add(
        "start to first answer, in milliseconds",
        "polpo",
        polpo.start_ms,
    );
    report.add(
        "start to first answer, in milliseconds",
        "reference",
        reference.start_ms,
    );
    for system in &systems {
        system
            .target
            .closed_loop("short", false, 8, 200, 4)
            .await
            .with_context(|| system.name)?;
    }
    for round in 1..=options.rounds {
        for system in &systems {
            eprintln!("round {round}: {}", system.name);
            drive(options, system, postgres, &mut report)
                .await
                .with_context(|| format!("{} failed", system.name))?;
        }
    }
    if options.held > 0 {
        for system in &systems {
            eprintln!("{} held streams: {}", options.held, system.name);
            hold(options, system, &mut report)
                .await
                .with_context(|| format!("{} failed", system.name))?;
        }
    }
    report.print(SYSTEMS);
    // The engine has the machine for itself.
    drop((pass, reference, polpo));
    tasks::measure(&options.polpo, cluster, &upstream.url, options.sustained).await?;
    webhooks::measure(&options.polpo, cluster, &upstream.url).await?;
    measure_missions(options, cluster, &upstream.url).await
}

async fn measure_missions(
    options: &Options,
    cluster: &Cluster,
    upstream: &str,
) -> anyhow::Result<()> {
    let (rounds, schedules) = (options.rounds, options.schedules);
    missions::measure(&options.polpo, cluster, upstream, rounds, schedules).await
}

async fn drive(
    options: &Options,
    system: &System,
    postgres: u32,
    report: &mut Report,
) -> anyhow::Result<()> {
    let alone = system
        .target
        .closed_loop("short", false, 8, options.requests / 4, 1)
        .await?;
    report.add(
        "one at a time, p50 ms",
        system.name,
        percentile(&alone.latencies_ms, 50.0),
    );
    report.add(
        "one at a time, p99 ms",
        system.name,
        percentile(&alone.latencies_ms, 99.0),
    );
    let paced = system.target.open_loop("short", 8, 20, 5).await?;
    report.add(
        "20 a second, p50 ms",
        system.name,
        percentile(&paced.latencies_ms, 50.0),
    );
    report.add(
        "20 a second, p99 ms",
        system.name,
        percentile(&paced.latencies_ms, 99.0),
    );
    for (label, model, streams, tokens, requests) in [
        ("short answers", "short", false, 8, options.requests),
        (
            "64-token streams",
            "stream-64",
            true,
            64,
            options.requests / 2,
        ),
    ] {
        let pid = system.pid.unwrap_or(0);
        let (own, database) = (cpu_seconds(pid), cpu_seconds_of_tree(postgres));
        let Measured { elapsed, .. } = system
            .target
            .closed_loop(model, streams, tokens, requests, 16)
            .await?;
        let (own, database) = (
            cpu_seconds(pid) - own,
            cpu_seconds_of_tree(postgres) - database,
        );
        let thousands = requests as f64 / 1000.0;
        report.add(
            &format!("{label}, 16 at once, per second"),
            system.name,
            requests as f64 / elapsed.as_secs_f64(),
        );
        report.add(
            &format!("{label}, CPU s per 1,000"),
            system.name,
            own / thousands,
        );
        report.add(
            &format!("{label}, the same with Postgres"),
            system.name,
            (own + database) / thousands,
        );
    }
    Ok(())
}

async fn hold(options: &Options, system: &System, report: &mut Report) -> anyhow::Result<()> {
    let pid = system.pid.unwrap_or(0);
    let held = system.target.held_streams(options.held, 200);
    let mut most = 0.0_f64;
    let sampled = async {
        loop {
            tokio::time::sleep(Duration::from_millis(250)).await;
            most = most.max(resident_mb(pid));
        }
    };
    let measured = tokio::select! {
        measured = held => measured?,
        never = sampled => never,
    };
    report.add(
        "held streams, token delay p50 ms",
        system.name,
        percentile(&measured.latencies_ms, 50.0),
    );
    report.add(
        "held streams, token delay p99 ms",
        system.name,
        percentile(&measured.latencies_ms, 99.0),
    );
    report.add("held streams, resident MB", system.name, most);
    Ok(())
}

/// What a polpo under measurement is set to.
pub(crate) fn settings(database: &str, bind: &str, upstream: &str) -> Vec<(&'static str, String)> {
    let fixed = [
        ("DATABASE_URL", database.to_owned()),
        ("POLPO_BIND", bind.to_owned()),
        (
            "POLPO_MASTER_KEY",
            "00112233445566778899aabbccddeeff".repeat(2),
        ),
        ("POLPO_ADMIN_TOKEN", ADMIN.to_owned()),
        ("POLPO_LOG_FORMAT", "json".to_owned()),
        // The limit is on, and high: it is counted, not met.
        ("POLPO_RATE_LIMIT", "1000000".to_owned()),
        ("OPENAI_API_KEY", "server-key".to_owned()),
        ("OPENAI_BASE_URL", format!("{upstream}/v1")),
    ];
    fixed.into()
}

async fn start_polpo(
    program: &Path,
    cluster: &Cluster,
    upstream: &str,
) -> anyhow::Result<(Server, String)> {
    let database = cluster.url("polpo");
    let variables = settings(&database, "127.0.0.1:4804", upstream);
    let server = Server::start(program, &["serve"], &variables, 4804).await?;
    let client = reqwest::Client::new();
    let post = async |path: &str, token: &str, body: Value| -> anyhow::Result<Value> {
        let request = client
            .post(format!("{}{path}", server.url))
            .bearer_auth(token)
            .json(&body);
        Ok(request.send().await?.error_for_status()?.json().await?)
    };
    let organization = post("/v1/orgs", ADMIN, json!({"name": "Bench"})).await?;
    let project = post(
        "/v1/projects",
        ADMIN,
        json!({"orgId": organization["id"], "name": "Bench"}),
    )
    .await?;
    let scopes = json!([{"type": "project", "projectId": project["id"]}]);
    let key = post("/v1/api-keys", ADMIN, json!({"scopes": scopes})).await?;
    let key = key["key"].as_str().context("no key")?.to_owned();
    for model in ["short", "stream-64", "paced-200"] {
        post(
            "/v1/agents",
            &key,
            json!({"name": model, "model": format!("openai:{model}")}),
        )
        .await?;
    }
    Ok((server, key))
}
