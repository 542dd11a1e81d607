//! Measures missions and schedules: what a hop of a chain costs, what a mission adds to its tasks, and how soon ten thousand
//! schedules fire that are due in the same second.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use chrono::{DateTime, SecondsFormat};
use futures::stream::{self, StreamExt, TryStreamExt};
use polpo::embedded::Cluster;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::sync::mpsc;

use crate::process::{Server, cpu_seconds, cpu_seconds_of_tree};
use crate::report::percentile;
use crate::run::settings;
use crate::tasks::{Project, Told, row};
use crate::upstream::now_us;

/// An agent whose model answers at once.
const AGENT: &str = "agent-1-0";
/// Tasks of the chain.
const LINKS: usize = 200;
/// Tasks side by side.
const WIDE: usize = 1_000;
/// Schedules are made in less than a hundredth of a second each, on a busy machine too: they must be by the instant at which they
/// are due.
const MADE_A_SECOND: u64 = 100;
/// Projects that the schedules are spread over: first many, then all of them in one.
const SPREADS: [usize; 2] = [20, 1];

type Events = mpsc::UnboundedReceiver<Told>;

/// Drives missions and schedules and prints what came of it.
pub(crate) async fn measure(
    polpo: &Path,
    cluster: &Cluster,
    upstream: &str,
    rounds: u32,
    schedules: usize,
) -> anyhow::Result<()> {
    cluster.ensure_database("missions")?;
    let database = cluster.url("missions");
    polpo::store::migrate(&database).await?;
    let variables = settings(&database, "127.0.0.1:4811", upstream);
    let first = Server::start(polpo, &["serve"], &variables, 4811).await?;
    println!("\n{:<50}{:>12}{:>20}", "missions", "measured", "published");
    let project = Project::make(&first.url, "Missions").await?;
    let mut events = project.follow("task:completed,mission:completed").await?;
    chain(&project, &mut events, rounds).await?;
    wide(&project, &mut events, rounds).await?;
    drop(events);
    if schedules == 0 {
        return Ok(());
    }
    let variables = settings(&database, "127.0.0.1:4812", upstream);
    let second = Server::start(polpo, &["serve"], &variables, 4812).await?;
    let postgres = cluster.pid().context("the database ended")?;
    for spread in SPREADS {
        due_at_once(&[&first, &second], postgres, &database, spread, schedules).await?;
    }
    Ok(())
}

fn task(title: &str, needs: &[String]) -> Value {
    json!({"title": title, "description": "d", "assignTo": AGENT, "dependsOn": needs})
}

/// Makes a mission and returns its id.
async fn define(project: &Project, name: &str, tasks: &[Value]) -> anyhow::Result<String> {
    let mission = json!({"name": name, "tasks": tasks});
    let mission = project.post("/v1/missions", &mission).await?;
    Ok(mission["id"].as_str().context("no id")?.to_owned())
}

/// Begins a mission and returns when that was asked for.
async fn execute(project: &Project, mission: &str) -> anyhow::Result<u64> {
    let began = now_us();
    let path = format!("/v1/missions/{mission}/execute");
    project.post(&path, &json!({})).await?;
    Ok(began)
}

/// When each of so many tasks was done, in their order; and the end of their mission, if they have one.
async fn ends(events: &mut Events, tasks: usize, in_mission: bool) -> anyhow::Result<Vec<u64>> {
    let mut done = Vec::with_capacity(tasks);
    let mut open = in_mission;
    while done.len() < tasks || open {
        let told = tokio::time::timeout(Duration::from_secs(120), events.recv());
        let told = told.await.context("a task is not done")?;
        let told = told.context("the event stream ended")?;
        if told.name == "mission:completed" {
            ensure!(told.payload["allPassed"] == true, "a mission failed");
            open = false;
        } else {
            done.push(told.at_us);
        }
    }
    Ok(done)
}

fn ms(from_us: u64, to_us: u64) -> f64 {
    to_us.saturating_sub(from_us) as f64 / 1000.0
}

/// From the last of `ends` to `began`.
fn until_last(began: u64, ends: &[u64]) -> f64 {
    ms(began, ends.iter().copied().max().unwrap_or(began))
}

/// Tasks one after another; the first round warms up.
async fn chain(project: &Project, events: &mut Events, rounds: u32) -> anyhow::Result<()> {
    let (mut whole, mut slowest) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let title = |link: usize| format!("chain {round} {link}");
        let tasks: Vec<Value> = (0..LINKS)
            .map(|link| {
                let needs: Vec<String> = link.checked_sub(1).map(title).into_iter().collect();
                task(&title(link), &needs)
            })
            .collect();
        let mission = define(project, &format!("chain {round}"), &tasks).await?;
        let began = execute(project, &mission).await?;
        let ends = ends(events, LINKS, true).await?;
        if round > 0 {
            whole.push(until_last(began, &ends) / LINKS as f64);
            let hops = ends.windows(2).map(|pair| ms(pair[0], pair[1]));
            slowest.push(hops.fold(0.0, f64::max));
        }
    }
    row(
        &format!("a chain of {LINKS} tasks, ms per hop"),
        percentile(&whole, 50.0),
    );
    row("  the worst round", percentile(&whole, 100.0));
    row("  the slowest hop", percentile(&slowest, 50.0));
    Ok(())
}

/// The same tasks side by side in a mission and outside of one. Compared twice: from the first request to the last end, where a
/// mission is one request and the others are one each; and, without any request in it, from the end of a task that all of them
/// wait for, so that one commit owes them all in either case.
async fn wide(project: &Project, events: &mut Events, rounds: u32) -> anyhow::Result<()> {
    let mut table: HashMap<&str, Vec<f64>> = HashMap::new();
    for round in 0..=rounds {
        let asked = (
            wide_in_mission(project, events, &format!("wide {round}")).await?,
            wide_outside(project, events, &format!("loose {round}")).await?,
        );
        let owed = (
            freed_in_mission(project, events, &format!("freed {round}")).await?,
            freed_outside(project, events, &format!("let go {round}")).await?,
        );
        // The first round warms up.
        if round == 0 {
            continue;
        }
        for (name, value) in [
            ("asked in", asked.0),
            ("asked out", asked.1),
            ("asked ratio", asked.0 / asked.1),
            ("owed in", owed.0),
            ("owed out", owed.1),
            ("owed ratio", owed.0 / owed.1),
        ] {
            table.entry(name).or_default().push(value);
        }
    }
    let median = |name: &str| {
        table
            .get(name)
            .map_or(f64::NAN, |all| percentile(all, 50.0))
    };
    row(
        &format!("{WIDE} tasks in a mission, execute to end, ms"),
        median("asked in"),
    );
    row(
        "  outside, 16 POSTs at once to end, ms",
        median("asked out"),
    );
    row("  mission / outside", median("asked ratio"));
    row(
        &format!("{WIDE} tasks in a mission, owed to end, ms"),
        median("owed in"),
    );
    row("  outside, owed to end, ms", median("owed out"));
    row("  mission / outside", median("owed ratio"));
    Ok(())
}

async fn wide_in_mission(
    project: &Project,
    events: &mut Events,
    name: &str,
) -> anyhow::Result<f64> {
    let tasks: Vec<Value> = (0..WIDE)
        .map(|number| task(&format!("{name} {number}"), &[]))
        .collect();
    let mission = define(project, name, &tasks).await?;
    let began = execute(project, &mission).await?;
    Ok(until_last(began, &ends(events, WIDE, true).await?))
}

async fn wide_outside(project: &Project, events: &mut Events, name: &str) -> anyhow::Result<f64> {
    let began = now_us();
    let (made, ended) = tokio::join!(post_all(project, name, &[]), ends(events, WIDE, false));
    made?;
    Ok(until_last(began, &ended?))
}

/// The first of `ends` is what the others waited for.
fn since_first(ends: &[u64]) -> f64 {
    until_last(ends.first().copied().unwrap_or_default(), ends)
}

async fn freed_in_mission(
    project: &Project,
    events: &mut Events,
    name: &str,
) -> anyhow::Result<f64> {
    let first = format!("{name} first");
    let tasks: Vec<Value> = [task(&first, &[])]
        .into_iter()
        .chain(
            (0..WIDE).map(|number| task(&format!("{name} {number}"), std::slice::from_ref(&first))),
        )
        .collect();
    let mission = define(project, name, &tasks).await?;
    execute(project, &mission).await?;
    Ok(since_first(&ends(events, WIDE + 1, true).await?))
}

async fn freed_outside(project: &Project, events: &mut Events, name: &str) -> anyhow::Result<f64> {
    let first = json!({"title": format!("{name} first"), "description": "d", "assignTo": AGENT, "draft": true});
    let first = project.post("/v1/tasks", &first).await?;
    let first = first["id"].as_str().context("no id")?.to_owned();
    post_all(project, name, std::slice::from_ref(&first)).await?;
    project
        .post(&format!("/v1/tasks/{first}/queue"), &json!({}))
        .await?;
    Ok(since_first(&ends(events, WIDE + 1, false).await?))
}

/// Makes the tasks outside of a mission, 16 at once.
async fn post_all(project: &Project, name: &str, needs: &[String]) -> anyhow::Result<()> {
    at_once(WIDE, |number| {
        let task = task(&format!("{name} {number}"), needs);
        async move { project.post("/v1/tasks", &task).await.map(drop) }
    })
    .await
}

/// Does something so many times, 16 at once.
async fn at_once<F>(count: usize, deed: impl Fn(usize) -> F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let deeds = stream::iter(0..count).map(deed).buffer_unordered(16);
    deeds.try_collect().await
}

/// Missions of one task each whose schedules are due at the same instant, with two processes on the database.
async fn due_at_once(
    servers: &[&Server; 2],
    postgres: u32,
    database: &str,
    spread: usize,
    count: usize,
) -> anyhow::Result<()> {
    let mut projects = Vec::new();
    for number in 0..spread {
        let url = &servers[number % servers.len()].url;
        projects.push(Project::make(url, &format!("Due {number} of {spread}")).await?);
    }
    let ahead = 20 + count as u64 / MADE_A_SECOND;
    let instant = (now_us() / 1_000_000 + ahead) * 1_000_000;
    let began = now_us();
    make_due(&projects, instant, count).await?;
    let left = ms(now_us(), instant);
    ensure!(left > 2_000.0, "the schedules were not made in time");
    let mut events = Vec::new();
    for project in &projects {
        let filter = "schedule:triggered,schedule:skipped,schedule:failed,mission:completed";
        events.push(project.follow(filter).await?);
    }
    eprintln!(
        "{count} schedules in {spread} projects, made in {:.0} s, due in {:.0} s",
        ms(began, now_us()) / 1000.0,
        left / 1000.0
    );
    tokio::time::sleep(Duration::from_micros(instant.saturating_sub(now_us()))).await;
    let cpu = || -> anyhow::Result<[f64; 3]> {
        let [one, other] = [servers[0].pid()?, servers[1].pid()?].map(cpu_seconds);
        Ok([one, other, cpu_seconds_of_tree(postgres)])
    };
    let before = cpu()?;
    let fired = fired(events, count).await?;
    let after = cpu()?;
    check_once(database, instant, count).await?;
    let of = format!("{count} schedules, {spread} projects");
    row(
        &format!("{of}: first firing, s"),
        ms(instant, fired.first) / 1000.0,
    );
    row("  last firing, s", ms(instant, fired.last) / 1000.0);
    row(
        "  all their missions completed, s",
        ms(instant, fired.completed) / 1000.0,
    );
    row("  fired twice or not at all", fired.wrong as f64);
    row("  CPU s, one process", after[0] - before[0]);
    row("  CPU s, the other", after[1] - before[1]);
    row("  CPU s, Postgres", after[2] - before[2]);
    Ok(())
}

async fn make_due(projects: &[Project], instant: u64, count: usize) -> anyhow::Result<()> {
    let seconds = i64::try_from(instant / 1_000_000)?;
    let at = DateTime::from_timestamp(seconds, 0).context("no such instant")?;
    let at = at.to_rfc3339_opts(SecondsFormat::Secs, true);
    at_once(count, |number| {
        let project = &projects[number % projects.len()];
        let name = format!("due {number}");
        let mission = json!({"name": name, "schedule": at, "tasks": [task(&name, &[])]});
        async move { project.post("/v1/missions", &mission).await.map(drop) }
    })
    .await
}

/// What was told of the firings; times are when the reader heard of them.
#[derive(Default)]
struct Fired {
    first: u64,
    last: u64,
    completed: u64,
    /// Missions that fired more than once or never.
    wrong: usize,
}

/// Waits until all have fired and all their missions are completed, and a little for what should not come.
async fn fired(events: Vec<Events>, count: usize) -> anyhow::Result<Fired> {
    let (sender, mut all) = mpsc::unbounded_channel();
    for mut events in events {
        let sender = sender.clone();
        tokio::spawn(async move {
            while let Some(told) = events.recv().await {
                if sender.send(told).is_err() {
                    return;
                }
            }
        });
    }
    let mut fired = Fired::default();
    let mut times: HashMap<String, usize> = HashMap::new();
    let mut completed = 0;
    loop {
        let patience = if completed < count { 60 } else { 3 };
        let Ok(told) = tokio::time::timeout(Duration::from_secs(patience), all.recv()).await else {
            break;
        };
        let told = told.context("the event streams ended")?;
        match told.name.as_str() {
            "schedule:triggered" => {
                let mission = told.payload["missionId"].as_str().context("no mission")?;
                *times.entry(mission.to_owned()).or_default() += 1;
                if fired.first == 0 {
                    fired.first = told.at_us;
                }
                fired.last = told.at_us;
            }
            "mission:completed" => {
                completed += 1;
                fired.completed = told.at_us;
            }
            other => anyhow::bail!("{other}: {}", told.payload),
        }
    }
    ensure!(
        completed == count,
        "{completed} of {count} missions completed"
    );
    let once = times.values().filter(|times| **times == 1).count();
    fired.wrong = count.saturating_sub(once);
    Ok(fired)
}

/// What the database says: every mission was executed once, as was its task.
async fn check_once(database: &str, instant: u64, count: usize) -> anyhow::Result<()> {
    let pool = PgPool::connect(database).await?;
    let (missions, runs, tasks): (i64, i64, i64) = sqlx::query_as(
        "with due as (
            select s.project_id, s.mission_id from production.schedules s
            where s.expression::timestamptz = to_timestamp($1)
        )
        select (select count(*) from due join production.missions m on m.project_id = due.project_id and m.id = due.mission_id
                where m.execution_count = 1 and m.status = 'completed'),
            (select count(*) from due join production.mission_runs r on r.project_id = due.project_id and r.mission_id = due.mission_id),
            (select count(*) from due join production.tasks t on t.project_id = due.project_id and t.mission_id = due.mission_id
                where t.status = 'done')",
    )
    .bind((instant / 1_000_000) as f64)
    .fetch_one(&pool)
    .await?;
    pool.close().await;
    let count = i64::try_from(count)?;
    ensure!(
        (missions, runs, tasks) == (count, count, count),
        "of {count} missions {missions} were executed once, in {runs} runs, with {tasks} tasks done"
    );
    Ok(())
}
