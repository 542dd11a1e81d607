//! Processes that die in mid-mission: every task is done once, every barrier is passed once, and the report is right.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use chrono::{SecondsFormat, Utc};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::crashes::Fleet;
use crate::harness::{answer, database, eventually, last_text};
use crate::webhooks::Receiver;

const SERVE: &str = "serve --acquire-timeout-ms 5000 --webhook-pause-ms 50";
/// Nobody hears of what such a process commits: as if each commit were its last deed.
const MUTE: &str = "serve --acquire-timeout-ms 5000 --webhook-pause-ms 50 --mute true";

/// The tasks of a mission and what each needs.
const TASKS: [(&str, &[&str]); 10] = [
    ("begin", &[]),
    ("one", &["begin"]),
    ("two", &["begin"]),
    ("three", &["begin"]),
    ("four", &["begin"]),
    ("join", &["one", "two", "three", "four"]),
    ("checked", &["join"]),
    ("beside", &["join"]),
    ("later", &["checked"]),
    ("last", &["later", "beside"]),
];

/// What the barriers of a mission tell, each once.
const BARRIERS: [(&str, &str, &str); 5] = [
    ("checkpoint:reached", "checkpointName", "look"),
    ("checkpoint:resumed", "checkpointName", "look"),
    ("delay:started", "delayName", "rest"),
    ("delay:expired", "delayName", "rest"),
    ("quality:gate:passed", "gateName", "good"),
];

fn definition(name: &str) -> Value {
    let titled = |title: &str| format!("{name} {title}");
    let all = |titles: &[&str]| titles.iter().map(|title| titled(title)).collect::<Vec<_>>();
    let tasks: Vec<Value> = TASKS
        .iter()
        .map(|(title, needs)| json!({"title": titled(title), "description": titled(title), "assignTo": "a", "dependsOn": all(needs)}))
        .collect();
    json!({"name": name, "tasks": tasks,
        "checkpoints": [{"name": "look", "afterTasks": all(&["join"]), "blocksTasks": all(&["checked"])}],
        "delays": [{"name": "rest", "afterTasks": all(&["checked"]), "blocksTasks": all(&["later"]), "duration": "PT0.4S"}],
        "qualityGates": [{"name": "good", "afterTasks": all(&["later"]), "blocksTasks": all(&["last"]), "requireAllPassed": true}]})
}

impl Fleet {
    /// Asks a process, by its place.
    async fn ask(
        &self,
        place: usize,
        method: Method,
        path: &str,
        body: Value,
    ) -> (StatusCode, Value) {
        let (_, url) = &self.processes[place];
        let request = reqwest::Client::new()
            .request(method, format!("{url}{path}"))
            .bearer_auth(&self.key)
            .json(&body);
        answer(request).await
    }

    async fn make(&self, path: &str, body: Value) -> Value {
        let (status, body) = self.ask(0, Method::POST, path, body).await;
        assert_eq!(status, 201, "{body}");
        body
    }

    /// Everything that was told, in its order.
    async fn log(&self) -> Vec<(String, String, Value)> {
        let mut database = PgConnection::connect(&self.database_url).await.unwrap();
        let rows: Vec<(String, String, String)> = sqlx::query_as(
            "select 'evt_' || lpad(seq::text, 5, '0'), name, payload from production.events order by project_id, seq",
        )
        .fetch_all(&mut database)
        .await
        .unwrap();
        rows.into_iter()
            .map(|(id, name, payload)| (id, name, serde_json::from_str(&payload).unwrap()))
            .collect()
    }

    async fn completed(&self) -> usize {
        let mut database = PgConnection::connect(&self.database_url).await.unwrap();
        let (count,): (i64,) =
            sqlx::query_as("select count(*) from production.missions where status = 'completed'")
                .fetch_one(&mut database)
                .await
                .unwrap();
        usize::try_from(count).unwrap()
    }

    /// Lets one mission past a checkpoint that it waits at; whether there was any.
    async fn let_one_pass(&self, place: usize) -> bool {
        let (status, waiting) = self
            .ask(place, Method::GET, "/v1/missions/checkpoints", json!(null))
            .await;
        assert_eq!(status, 200, "{waiting}");
        let Some(first) = waiting.as_array().unwrap().first() else {
            return false;
        };
        let path = format!(
            "/v1/missions/{}/checkpoints/look/resume",
            first["missionId"].as_str().unwrap()
        );
        let (status, body) = self.ask(place, Method::POST, &path, json!({})).await;
        assert_eq!(status, 200, "{body}");
        true
    }

    /// Whatever happened: each mission ran once from its beginning to its end.
    async fn judge(&self, missions: usize, scheduled: usize) {
        let count = missions * TASKS.len();
        self.settle(i64::try_from(count).unwrap(), 1).await;
        eventually("all missions are completed", async || {
            self.completed().await == missions
        })
        .await;
        let (_, list) = self.ask(0, Method::GET, "/v1/missions", json!(null)).await;
        let list = list.as_array().unwrap().clone();
        assert_eq!(list.len(), missions);
        let log = self.log().await;
        let told = |name: &str, id: &Value| -> Vec<&Value> {
            let of = log
                .iter()
                .filter(|(_, told, event)| told == name && event["missionId"] == *id);
            of.map(|(_, _, event)| event).collect()
        };
        for mission in &list {
            let id = &mission["id"];
            assert_eq!(
                (&mission["status"], &mission["executionCount"]),
                (&json!("completed"), &json!(1))
            );
            for name in ["mission:executed", "mission:completed"] {
                assert_eq!(told(name, id).len(), 1, "{name}");
            }
            for (name, member, barrier) in BARRIERS {
                let events = told(name, id);
                assert_eq!(events.len(), 1, "{name}");
                assert_eq!(events[0][member], barrier);
            }
            let path = format!("/v1/missions/{}/report", id.as_str().unwrap());
            let (status, report) = self.ask(0, Method::GET, &path, json!(null)).await;
            assert_eq!(status, 200);
            assert_eq!(report["allPassed"], true);
            let done: HashSet<&str> = report["tasks"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|task| task["status"] == "done")
                .map(|task| task["title"].as_str().unwrap())
                .collect();
            let name = mission["name"].as_str().unwrap();
            assert_eq!(
                done,
                TASKS
                    .iter()
                    .map(|(title, _)| format!("{name} {title}"))
                    .collect::<Vec<_>>()
                    .iter()
                    .map(String::as_str)
                    .collect()
            );
            assert_eq!(told("mission:completed", id)[0]["report"], report);
            in_order(&log, id, name);
        }
        for name in ["schedule:triggered", "schedule:completed"] {
            let told = log.iter().filter(|(_, told, _)| told == name).count();
            assert_eq!(told, scheduled, "{name}");
        }
    }
}

/// No task was begun before what it needs was done and what held it back let it go.
fn in_order(log: &[(String, String, Value)], mission: &Value, name: &str) {
    let place = |what: &dyn Fn(&str, &Value) -> bool| {
        let mut found = log
            .iter()
            .enumerate()
            .filter(|(_, (_, told, event))| what(told, event));
        let (place, _) = found.next().unwrap();
        assert!(found.next().is_none());
        place
    };
    let mut ids: HashMap<String, String> = HashMap::new();
    for (_, told, event) in log {
        if told == "task:created" {
            let task = &event["task"];
            ids.insert(
                task["title"].as_str().unwrap().to_owned(),
                task["id"].as_str().unwrap().to_owned(),
            );
        }
    }
    let moved = |title: &str, to: &str| {
        let id = &ids[&format!("{name} {title}")];
        place(&|told, event| {
            told == "task:transition" && event["taskId"] == json!(id) && event["to"] == to
        })
    };
    for (title, needs) in TASKS {
        let begun = moved(title, "in_progress");
        for need in needs {
            assert!(
                moved(need, "done") < begun,
                "{title} was begun before {need} was done"
            );
        }
    }
    for (passed, held) in [
        ("checkpoint:resumed", "checked"),
        ("delay:expired", "later"),
        ("quality:gate:passed", "last"),
    ] {
        let passed = place(&|told, event| told == passed && event["missionId"] == *mission);
        assert!(
            passed < moved(held, "in_progress"),
            "{held} was begun before it was let go"
        );
    }
}

/// Missions begun by hand and by their schedules, while one process after the other is killed.
async fn survive(size: usize, role: &'static str, least: u64) {
    const MISSIONS: usize = 6;
    const SCHEDULED: usize = 2;
    let mut fleet = Fleet::on(database().await, size, 1, role).await;
    let receiver = Receiver::start().await;
    fleet
        .make(
            "/v1/webhooks",
            json!({"url": receiver.url, "events": ["*"]}),
        )
        .await;
    let known = fleet.log().await.len();
    for number in 0..MISSIONS {
        let made = fleet
            .make("/v1/missions", definition(&format!("m{number}")))
            .await;
        let id = made["id"].as_str().unwrap();
        if number < SCHEDULED {
            let due = Utc::now()
                + chrono::Duration::milliseconds(400 + 500 * i64::try_from(number).unwrap());
            let due = due.to_rfc3339_opts(SecondsFormat::Millis, true);
            let once = json!({"missionId": id, "expression": due, "recurring": false, "deadlineOffsetMs": 120_000});
            fleet.make("/v1/schedules", once).await;
        } else {
            let (status, body) = fleet
                .ask(
                    0,
                    Method::POST,
                    &format!("/v1/missions/{id}/execute"),
                    json!({}),
                )
                .await;
            assert_eq!(status, 200, "{body}");
        }
    }
    let (mut kills, began) = (0, Instant::now());
    while fleet.completed().await < MISSIONS {
        assert!(
            began.elapsed() < Duration::from_secs(90),
            "they hang: {:?}",
            fleet.log().await.last()
        );
        // At moments that have nothing to do with each other; and half of the time in the very moment after a person let one pass.
        let passed = kills % 2 == 0 && fleet.let_one_pass(0).await;
        if !passed {
            tokio::time::sleep(Duration::from_millis(30 + 67 * kills % 210)).await;
        }
        if kills < 40 {
            fleet.kill().await;
            kills += 1;
            fleet.add(role).await;
        }
    }
    assert!(kills >= least, "{kills}");
    fleet.judge(MISSIONS, SCHEDULED).await;
    // Whoever is told of everything has missed nothing.
    let log = fleet.log().await;
    let missing = || {
        let got: HashSet<(String, String)> = receiver
            .posts()
            .iter()
            .map(|post| {
                (
                    post.event().to_owned(),
                    post.body["type"].as_str().unwrap().to_owned(),
                )
            })
            .collect();
        let told = log.iter().skip(known);
        told.filter(|(id, name, _)| !got.contains(&(id.clone(), name.clone())))
            .count()
    };
    let began = Instant::now();
    while missing() > 0 {
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "{} are missing",
            missing()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    eprintln!(
        "{kills} kills, {MISSIONS} missions, {} events in {} deliveries",
        log.len() - known,
        receiver.posts().len()
    );
}

#[tokio::test]
async fn missions_of_processes_that_are_killed_over_and_over_do_every_task_once() {
    survive(2, SERVE, 8).await;
}

#[tokio::test]
async fn missions_of_a_single_process_that_is_killed_and_started_again_do_every_task_once() {
    survive(1, SERVE, 8).await;
}

#[tokio::test]
async fn missions_go_on_though_every_process_dies_before_it_has_woken_anyone() {
    survive(2, MUTE, 8).await;
}

#[tokio::test]
async fn a_checkpoint_passed_by_a_process_that_dies_at_once_is_passed_and_the_next_task_begins() {
    let api = "serve --acquire-timeout-ms 5000 --role api --mute true";
    let mut fleet = Fleet::on(database().await, 1, 1, api).await;
    fleet
        .add("serve --acquire-timeout-ms 5000 --role worker")
        .await;
    for round in 0..5 {
        let name = format!("m{round}");
        let made = fleet.make("/v1/missions", definition(&name)).await;
        let id = made["id"].as_str().unwrap();
        let path = format!("/v1/missions/{id}/execute");
        assert_eq!(fleet.ask(0, Method::POST, &path, json!({})).await.0, 200);
        eventually("it waits", async || {
            let (_, mission) = fleet
                .ask(0, Method::GET, &format!("/v1/missions/{id}"), json!(null))
                .await;
            mission["status"] == "paused"
        })
        .await;
        assert!(fleet.let_one_pass(0).await);
        fleet.kill().await;
        let since = Instant::now();
        let next = format!("{name} checked");
        eventually("the worker goes on", async || {
            fleet
                .upstream
                .asked()
                .iter()
                .any(|request| last_text(request, "user") == next)
        })
        .await;
        assert!(since.elapsed() < Duration::from_secs(3));
        fleet.add(api).await;
        // The process that answers is the first.
        fleet.processes.swap(0, 1);
    }
    eventually("all are completed", async || fleet.completed().await == 5).await;
    fleet.judge(5, 0).await;
}
