//! Processes that die, hang and lose their database: no task is lost, no finished step is done again.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use polpo::embedded::{Cluster, Durability};
use polpo::store::migrate;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::assessments::{is_review, scored};
use crate::harness::{
    Reply, Upstream, answer, called, database, eventually, last_text, results, said, waiting,
};
use crate::processes::{Process, furnish, settings};

/// A turn of a task, by the task's description.
pub(crate) type Turn = (String, usize);

/// Server processes on one database, and the provider that they share.
pub(crate) struct Fleet {
    pub(crate) database_url: String,
    pub(crate) upstream: Upstream,
    pub(crate) key: String,
    pub(crate) processes: Vec<(Process, String)>,
    role: &'static str,
    /// What was on record at each kill, and how often the provider had been asked until then.
    pub(crate) recorded: Vec<(HashSet<Turn>, usize)>,
}

/// A provider whose agents use a tool so often, each call taking a while, and whose reviewers are slower.
async fn slow_upstream(turns: usize) -> Upstream {
    let upstream = Upstream::start().await;
    upstream.answers(move |request| {
        if is_review(request) {
            let Reply::Stream(words) = scored(request, 5.0) else {
                unreachable!("a review is a stream")
            };
            return Reply::Slow(Duration::from_millis(150), words);
        }
        let words = if results(request) < turns {
            called(&[("c", "memory_get", &["{}"])])
        } else {
            said("Done.")
        };
        Reply::Slow(Duration::from_millis(30), words)
    });
    upstream
}

impl Fleet {
    async fn start(size: usize, turns: usize) -> Self {
        let database_url = database().await;
        Self::on(database_url, size, turns, "serve").await
    }

    pub(crate) async fn on(
        database_url: String,
        size: usize,
        turns: usize,
        role: &'static str,
    ) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let upstream = slow_upstream(turns).await;
        let mut fleet = Self {
            database_url,
            upstream,
            key: String::new(),
            processes: Vec::new(),
            role,
            recorded: Vec::new(),
        };
        for _ in 0..size {
            fleet.add(role).await;
        }
        fleet.key = furnish(&fleet.processes[0].1, &fleet.upstream, "k").await;
        fleet
    }

    pub(crate) async fn add(&mut self, role: &str) {
        let others = [
            ("POLPO_PRIVATE_BASE_URLS", "true"),
            ("POLPO_PRIVATE_WEBHOOKS", "true"),
            ("POLPO_WEBHOOK_HTTP", "true"),
            ("POLPO_RATE_LIMIT", "0"),
            ("POLPO_WORKER_SLOTS", "4"),
            ("POLPO_WORLD_CONNECTIONS", "6"),
        ];
        let mut process = Process::start(role, &settings(&self.database_url, &others));
        let url = process.url().await;
        self.processes.push((process, url));
    }

    /// Makes a task through any process that lives.
    async fn task(&self, title: &str, others: Value) -> String {
        let mut task = json!({"title": title, "description": title, "assignTo": "a"});
        task.as_object_mut()
            .unwrap()
            .extend(others.as_object().unwrap().clone());
        let (_, url) = self.processes.last().unwrap();
        let request = reqwest::Client::new()
            .post(format!("{url}/v1/tasks"))
            .bearer_auth(&self.key)
            .json(&task);
        let (status, body) = answer(request).await;
        assert_eq!(status, 201, "{body}");
        body["id"].as_str().unwrap().to_owned()
    }

    /// What has been recorded of the models' turns.
    async fn turns(&self) -> HashSet<Turn> {
        let mut database = PgConnection::connect(&self.database_url).await.unwrap();
        let rows: Vec<(String, i64)> = sqlx::query_as(
            "select t.title, row_number() over (partition by s.run_id order by s.number) - 1
            from production.steps s
            join production.runs r on r.project_id = s.project_id and r.id = s.run_id
            join production.tasks t on t.project_id = r.project_id and t.id = r.task_id
            where s.kind = 'model'",
        )
        .fetch_all(&mut database)
        .await
        .unwrap();
        rows.into_iter()
            .map(|(title, turn)| (title, usize::try_from(turn).unwrap()))
            .collect()
    }

    /// Kill -9, and a look at what was on record.
    pub(crate) async fn kill(&mut self) -> Instant {
        let (mut process, _) = self.processes.remove(0);
        process.signal("-KILL");
        process.child.wait().await.unwrap();
        let killed = Instant::now();
        // First what is recorded, then how often was asked: what is recorded may not be asked for after that.
        let turns = self.turns().await;
        self.recorded.push((turns, self.upstream.asked().len()));
        killed
    }

    async fn statuses(&self) -> HashMap<String, i64> {
        let mut database = PgConnection::connect(&self.database_url).await.unwrap();
        let rows: Vec<(String, i64)> =
            sqlx::query_as("select status, count(*) from production.tasks group by 1")
                .fetch_all(&mut database)
                .await
                .unwrap();
        rows.into_iter().collect()
    }

    /// Waits until every task is done, and counts what was lost, repeated, or recorded twice.
    pub(crate) async fn settle(&self, tasks: i64, turns: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.statuses().await != HashMap::from([("done".to_owned(), tasks)]) {
            assert!(
                Instant::now() < deadline,
                "lost: {:?}",
                self.statuses().await
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let asked: Vec<Turn> = self
            .upstream
            .asked()
            .iter()
            .filter(|request| !is_review(request))
            .map(|request| (last_text(request, "user"), results(request)))
            .collect();
        let mut repeated = 0;
        for (recorded, before) in &self.recorded {
            repeated += asked
                .iter()
                .skip(*before)
                .filter(|turn| recorded.contains(turn))
                .count();
        }
        let mut database = PgConnection::connect(&self.database_url).await.unwrap();
        let (models, tools, runs, leftovers): (i64, i64, i64, i64) = sqlx::query_as(
            "select (select count(*) from production.steps where kind = 'model'),
                    (select count(*) from production.steps where kind = 'tool'),
                    (select count(*) from production.runs where task_id is not null),
                    (select count(*) from production.jobs where kind <> 'webhook')",
        )
        .fetch_one(&mut database)
        .await
        .unwrap();
        let per_task = i64::try_from(turns).unwrap();
        eprintln!(
            "{} kills, {tasks} tasks: {} model calls for {models} turns, {repeated} recorded ones repeated",
            self.recorded.len(),
            asked.len()
        );
        assert_eq!(repeated, 0);
        // Each step is on record once, in the one run that its task had.
        assert_eq!(
            (runs, models, tools),
            (tasks, tasks * (per_task + 1), tasks * per_task)
        );
        assert_eq!(leftovers, 0);
    }
}

#[tokio::test]
async fn processes_that_are_killed_over_and_over_lose_and_repeat_nothing() {
    for size in [2, 1] {
        let mut fleet = Fleet::start(size, 6).await;
        for number in 0..24 {
            fleet.task(&format!("t{number}"), json!({})).await;
        }
        let (mut kills, mut longest) = (0, Duration::ZERO);
        while fleet.statuses().await.get("done") != Some(&24) && kills < 10 {
            tokio::time::sleep(Duration::from_millis(250)).await;
            let asked = fleet.upstream.asked().len();
            let mut since = fleet.kill().await;
            kills += 1;
            if size == 1 {
                fleet.add("serve").await;
                since = Instant::now();
            }
            let unfinished = fleet.statuses().await.get("done") != Some(&24);
            let asked = asked.max(fleet.recorded.last().unwrap().1);
            if unfinished {
                // Whoever is left may have had all its answers by then.
                eventually("it goes on", async || {
                    fleet.upstream.asked().len() > asked
                        || fleet.statuses().await.get("done") == Some(&24)
                })
                .await;
                longest = longest.max(since.elapsed());
            }
            if size == 2 {
                fleet.add("serve").await;
            }
        }
        assert!(kills >= 4, "{kills}");
        // With a process left, its own tasks go on all the time: scripts/bench measures how soon it takes over.
        if size == 1 {
            eprintln!("restarted, the next model request came at most {longest:?} after the start");
            assert!(longest < Duration::from_secs(3));
        }
        fleet.settle(24, 6).await;
    }
}

#[tokio::test]
async fn a_kill_in_the_middle_of_an_assessment_asks_no_reviewer_twice() {
    let mut fleet = Fleet::start(2, 0).await;
    let expectations =
        json!([{"type": "llm_review", "criteria": "a"}, {"type": "llm_review", "criteria": "b"}]);
    for number in 0..6 {
        fleet
            .task(&format!("t{number}"), json!({"expectations": expectations}))
            .await;
    }
    let mut database = PgConnection::connect(&fleet.database_url).await.unwrap();
    let reviews = "select t.title, count(*) from production.steps s
        join production.runs r on r.project_id = s.project_id and r.id = s.run_id
        join production.tasks t on t.project_id = r.project_id and t.id = r.task_id
        where s.kind = 'review' group by 1";
    let asked_about = |fleet: &Fleet, title: &str| {
        let asked = fleet.upstream.asked();
        asked
            .iter()
            .filter(|request| {
                is_review(request)
                    && last_text(request, "user").contains(&format!("<task>\n{title}\n"))
            })
            .count()
    };
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(180)).await;
        fleet.kill().await;
        let recorded: HashMap<String, i64> = sqlx::query_as::<_, (String, i64)>(reviews)
            .fetch_all(&mut database)
            .await
            .unwrap()
            .into_iter()
            .collect();
        let before: HashMap<String, usize> = recorded
            .keys()
            .map(|title| (title.clone(), asked_about(&fleet, title)))
            .collect();
        fleet.add("serve").await;
        tokio::time::sleep(Duration::from_millis(700)).await;
        for (title, count) in recorded {
            let since = asked_about(&fleet, &title) - before[&title];
            assert!(
                since + usize::try_from(count).unwrap() <= 6,
                "{title}: {since} asked anew, {count} were on record"
            );
        }
    }
    fleet.settle(6, 0).await;
    let counts: Vec<(String, i64)> = sqlx::query_as(reviews)
        .fetch_all(&mut database)
        .await
        .unwrap();
    assert!(counts.iter().all(|(_, count)| *count == 6), "{counts:?}");
}

#[tokio::test]
async fn a_process_that_dies_between_commit_and_wake_up_leaves_its_work_to_others() {
    // It dies before it has woken anyone: nobody hears of what it commits.
    let mute = "serve --role api --mute true";
    let mut fleet = Fleet::on(database().await, 1, 1, mute).await;
    fleet.add("serve --role worker").await;
    // The process that answers requests is the first; the worker only hears of them.
    fleet.processes.swap(0, 1);
    for round in 0..5 {
        fleet.task(&format!("t{round}"), json!({})).await;
        let (mut api, _) = fleet.processes.pop().unwrap();
        api.signal("-KILL");
        api.child.wait().await.unwrap();
        let answered = Instant::now();
        let asked = |fleet: &Fleet| {
            fleet
                .upstream
                .asked()
                .iter()
                .any(|request| last_text(request, "user") == format!("t{round}"))
        };
        eventually("the worker begins", async || asked(&fleet)).await;
        assert!(answered.elapsed() < Duration::from_secs(3));
        fleet.add(fleet.role).await;
    }
    fleet.settle(5, 1).await;
}

#[tokio::test]
async fn a_process_that_hangs_is_replaced_when_its_lease_is_over_and_writes_nothing_after() {
    let mut fleet = Fleet::start(1, 40).await;
    fleet.task("t", json!({})).await;
    eventually("it is at work", async || fleet.upstream.asked().len() > 5).await;
    fleet.processes[0].0.signal("-STOP");
    let hung = Instant::now();
    let turns = fleet.turns().await;
    let before = fleet.upstream.asked().len();
    fleet.recorded.push((turns, before));
    fleet.add("serve").await;
    while fleet.upstream.asked().len() <= before {
        assert!(hung.elapsed() < Duration::from_secs(30));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    eprintln!("a hung process was replaced after {:?}", hung.elapsed());
    assert!(
        hung.elapsed() < Duration::from_secs(11),
        "{:?}",
        hung.elapsed()
    );
    fleet.processes[0].0.signal("-CONT");
    fleet.settle(1, 40).await;
}

#[tokio::test]
async fn a_process_that_hung_asks_for_no_turn_that_another_has_on_record() {
    let mut fleet = Fleet::start(1, 40).await;
    fleet.task("t", json!({})).await;
    eventually("it is at work", async || fleet.upstream.asked().len() > 1).await;
    let mut database = PgConnection::connect(&fleet.database_url).await.unwrap();
    let mut watch = PgConnection::connect(&fleet.database_url).await.unwrap();
    // It is stopped while it waits to hear that a tool's result is on record, after which it asks its model.
    loop {
        let mut hold = database.begin().await.unwrap();
        sqlx::query("select from production.runs for update")
            .execute(&mut *hold)
            .await
            .unwrap();
        eventually("a step waits", async || waiting(&mut watch).await > 0).await;
        fleet.processes[0].0.signal("-STOP");
        let newest = async || -> (i32, String) {
            let mut database = PgConnection::connect(&fleet.database_url).await.unwrap();
            sqlx::query_as("select number, kind from production.steps order by number desc limit 1")
                .fetch_one(&mut database)
                .await
                .unwrap()
        };
        let (before, _) = newest().await;
        hold.rollback().await.unwrap();
        eventually("it is on record", async || newest().await.0 > before).await;
        if newest().await.1 == "tool" {
            break;
        }
        fleet.processes[0].0.signal("-CONT");
    }
    fleet.add("serve").await;
    fleet.settle(1, 40).await;
    fleet
        .recorded
        .push((fleet.turns().await, fleet.upstream.asked().len()));
    fleet.processes[0].0.signal("-CONT");
    // Long enough for it to ask.
    tokio::time::sleep(Duration::from_millis(500)).await;
    fleet.settle(1, 40).await;
}

#[tokio::test]
async fn a_process_that_hung_while_it_waited_to_ask_again_asks_no_more() {
    let mut fleet = Fleet::start(1, 3).await;
    let wait = vec![("retry-after", "2")];
    fleet.upstream.will(Reply::Plain(429, wait, String::new()));
    fleet.task("t", json!({})).await;
    eventually("it is told to wait", async || {
        fleet.upstream.asked().len() == 1
    })
    .await;
    fleet.processes[0].0.signal("-STOP");
    fleet.add("serve").await;
    fleet.settle(1, 3).await;
    assert_eq!(fleet.upstream.asked().len(), 5);
    fleet.processes[0].0.signal("-CONT");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(fleet.upstream.asked().len(), 5);
}

#[tokio::test]
async fn sigterm_hands_tasks_over_at_their_next_step() {
    let mut fleet = Fleet::start(1, 40).await;
    for number in 0..4 {
        fleet.task(&format!("t{number}"), json!({})).await;
    }
    eventually("they are at work", async || {
        fleet.upstream.asked().len() > 20
    })
    .await;
    fleet.add("serve").await;
    let (mut process, _) = fleet.processes.remove(0);
    process.signal("-TERM");
    let asked = Instant::now();
    assert!(
        process.child.wait().await.unwrap().success(),
        "{}",
        process.log()
    );
    assert!(
        asked.elapsed() < Duration::from_secs(5),
        "{:?}",
        asked.elapsed()
    );
    fleet.settle(4, 40).await;
    // Whoever hands over ends its step first: no answer was paid for in vain.
    assert_eq!(fleet.upstream.asked().len(), 4 * 41);
}

#[tokio::test]
async fn a_database_that_stops_and_starts_under_load_loses_nothing() {
    let home = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(home.path(), Durability::None).await.unwrap();
    cluster.ensure_database("crash").unwrap();
    let url = cluster.url("crash");
    migrate(&url).await.unwrap();
    let fleet = Fleet::on(url.clone(), 2, 12, "serve").await;
    for number in 0..12 {
        fleet.task(&format!("t{number}"), json!({})).await;
    }
    let mut cluster = Some(cluster);
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        cluster.take().unwrap().stop().await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let again = Cluster::start(home.path(), Durability::None).await.unwrap();
        assert_eq!(again.url("crash"), url);
        cluster = Some(again);
    }
    fleet.settle(12, 12).await;
    // What was on its way while the database was away was waited for, and nobody took it over.
    assert_eq!(fleet.upstream.asked().len(), 12 * 13);
    drop(fleet);
    cluster.unwrap().stop().await.unwrap();
}
