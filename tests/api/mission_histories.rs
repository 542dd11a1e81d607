//! Whatever people do to missions while the engine is at them: nothing hangs, nothing is left behind, nothing begins too early.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio_util::sync::CancellationToken;

use crate::assessments::{is_review, scored};
use crate::harness::{Reply, TestApp, answer, last_text, said};

/// A task of a random mission: what it needs among those before it, and what its agent and its reviewers are like.
#[derive(Debug, Clone)]
struct Part {
    needs: Vec<prop::sample::Index>,
    fails: bool,
    reviewed: bool,
}

/// What stands before a task.
#[derive(Debug, Clone, Copy)]
struct Wall {
    kind: usize,
    before: usize,
}

/// What people do.
#[derive(Debug, Clone, Copy)]
enum Deed {
    /// A route of a mission, with a body.
    Mission(&'static str, usize),
    /// A status by hand.
    Status(&'static str, usize),
    /// A checkpoint is passed.
    Pass(usize),
    /// A route of a task.
    Task(&'static str, usize),
    Delete(usize),
    /// A process stops, and another starts.
    Restart,
    /// Some time goes by.
    Rest(u64),
}

fn missions() -> impl Strategy<Value = Vec<(Vec<Part>, Vec<Wall>)>> {
    let part = (
        prop::collection::vec(any::<prop::sample::Index>(), 0..3),
        prop::bool::weighted(0.15),
        prop::bool::weighted(0.3),
    )
        .prop_map(|(needs, fails, reviewed)| Part {
            needs,
            fails,
            reviewed,
        });
    let wall = (0..3usize, 0..12usize).prop_map(|(kind, before)| Wall { kind, before });
    let mission = (
        prop::collection::vec(part, 2..8),
        prop::collection::vec(wall, 0..4),
    );
    prop::collection::vec(mission, 1..4)
}

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let routes = vec!["execute", "resume", "retry", "abort"];
    let of_task = vec!["kill", "retry", "pause", "run", "reassess", "force-fail"];
    let statuses = vec!["draft", "paused", "paused", "active", "completed"];
    let deed = prop_oneof![
        6 => (prop::sample::select(routes), 0..9usize).prop_map(|(route, mission)| Deed::Mission(route, mission)),
        3 => (prop::sample::select(statuses), 0..9usize).prop_map(|(status, mission)| Deed::Status(status, mission)),
        4 => (0..9usize).prop_map(Deed::Pass),
        8 => (prop::sample::select(of_task), 0..40usize).prop_map(|(route, task)| Deed::Task(route, task)),
        2 => (0..40usize).prop_map(Deed::Delete),
        1 => Just(Deed::Restart),
        6 => (0..40u64).prop_map(Deed::Rest),
    ];
    prop::collection::vec(deed, 5..60)
}

/// A mission's definition, and by the title of each task what stands before it.
fn definition(number: usize, parts: &[Part], walls: &[Wall]) -> Value {
    let title = |task: usize| format!("m{number} t{task}");
    let mut needs: Vec<HashSet<usize>> = Vec::new();
    for (task, part) in parts.iter().enumerate() {
        let of: HashSet<usize> = part
            .needs
            .iter()
            .filter(|_| task > 0)
            .map(|need| need.index(task))
            .collect();
        needs.push(of);
    }
    let tasks: Vec<Value> = parts
        .iter()
        .enumerate()
        .map(|(task, part)| {
            let words = if part.fails { "Fail" } else { "Do" };
            let titles: Vec<String> = needs[task].iter().map(|need| title(*need)).collect();
            let expectations = if part.reviewed { json!([{"type": "llm_review", "criteria": "good"}]) } else { json!([]) };
            json!({"title": title(task), "description": format!("{words} {}", title(task)), "assignTo": "noor", "dependsOn": titles, "expectations": expectations})
        })
        .collect();
    let lists = ["checkpoints", "qualityGates", "delays"];
    let mut mission = json!({"name": format!("m{number}"), "tasks": tasks});
    for (place, wall) in walls.iter().enumerate() {
        let task = wall.before % parts.len();
        if needs[task].is_empty() {
            continue;
        }
        let after: Vec<String> = needs[task].iter().map(|need| title(*need)).collect();
        let mut barrier =
            json!({"name": format!("b{place}"), "afterTasks": after, "blocksTasks": [title(task)]});
        match wall.kind {
            1 => barrier["requireAllPassed"] = json!(true),
            2 => barrier["duration"] = json!("PT0.03S"),
            _ => {}
        }
        let list = &mut mission[lists[wall.kind]];
        if list.is_null() {
            *list = json!([]);
        }
        list.as_array_mut().unwrap().push(barrier);
    }
    mission
}

/// A number that depends on a text and on how often it was asked for.
fn dice(text: &str, counts: &std::sync::Mutex<HashMap<String, usize>>) -> usize {
    let mut counts = counts.lock().unwrap();
    let count = counts.entry(text.to_owned()).or_default();
    *count += 1;
    text.bytes().fold(*count * 7, |sum, byte| {
        (sum * 31 + usize::from(byte)) % 1009
    })
}

struct World {
    app: TestApp,
    others: Vec<CancellationToken>,
    missions: Vec<String>,
    definitions: Vec<Value>,
}

impl World {
    async fn begin(missions: &[(Vec<Part>, Vec<Wall>)]) -> Self {
        let app = TestApp::start_with(&["--retry-backoff-ms", "1"]).await;
        app.agent("noor").await;
        answer(app.patch("/v1/agents/noor", json!({"maxConcurrency": 3}))).await;
        let settings = json!({"maxRetries": 0, "maxFixAttempts": 0, "maxResolutionAttempts": 1,
            "orchestratorModel": "openai:scripted", "judgeModel": "openai:scripted"});
        let (status, body) = answer(app.patch("/v1/config", settings)).await;
        assert_eq!(status, 200, "{body}");
        let counts = std::sync::Mutex::default();
        app.upstream.answers(move |request| {
            let text = last_text(request, "user");
            if is_review(request) {
                let score = if dice(&text, &counts).is_multiple_of(4) {
                    1.0
                } else {
                    4.5
                };
                return scored(request, score);
            }
            if last_text(request, "system").starts_with("A task waits for another") {
                let action = ["absorb", "retry", "fail"][dice(&text, &counts) % 3];
                let verdict =
                    json!({"action": action, "reason": "so it fell", "description": "Do it alone"});
                return Reply::Stream(said(&verdict.to_string()));
            }
            if text.starts_with("Fail") && !dice(&text, &counts).is_multiple_of(3) {
                return Reply::Plain(400, vec![], "{}".to_owned());
            }
            let pause = u64::try_from(dice(&text, &counts) % 16).unwrap();
            Reply::Slow(Duration::from_millis(pause), said("Done."))
        });
        let others = vec![app.another_process_with_stop().await];
        let mut world = Self {
            app,
            others,
            missions: Vec::new(),
            definitions: Vec::new(),
        };
        for (number, (parts, walls)) in missions.iter().enumerate() {
            let definition = definition(number, parts, walls);
            let made = world
                .app
                .mission(&format!("m{number}"), definition.clone())
                .await;
            assert_eq!(world.app.execute(&made).await.0, 200);
            world.missions.push(made);
            world.definitions.push(definition);
        }
        world
    }

    /// Does something that may be refused, and must not break.
    async fn attempt(&self, what: &str, request: reqwest::RequestBuilder) {
        let (status, body) = answer(request).await;
        assert!(
            [200, 400, 404, 409].contains(&status.as_u16()),
            "{what}: {status} {body}"
        );
    }

    async fn pick(&self, task: usize) -> Option<String> {
        let (_, tasks) = answer(self.app.get("/v1/tasks")).await;
        let tasks = tasks.as_array().unwrap().clone();
        let id = tasks.get(task % tasks.len().max(1))?["id"].as_str()?;
        Some(id.to_owned())
    }

    async fn act(&mut self, deed: Deed) {
        let app = &self.app;
        let mission = |number: usize| &self.missions[number % self.missions.len()];
        let what = format!("{deed:?}");
        match deed {
            Deed::Mission(route, number) => {
                let (route, body) = match route {
                    "retry" => ("resume", json!({"retryFailed": true})),
                    route => (route, json!({})),
                };
                let path = format!("/v1/missions/{}/{route}", mission(number));
                self.attempt(&what, app.post(&path, body)).await;
            }
            Deed::Status(status, number) => {
                let path = format!("/v1/missions/{}", mission(number));
                self.attempt(&what, app.patch(&path, json!({"status": status})))
                    .await;
            }
            Deed::Pass(which) => {
                let (_, waiting) = answer(app.get("/v1/missions/checkpoints")).await;
                let waiting = waiting.as_array().unwrap();
                if let Some(found) = waiting.get(which % waiting.len().max(1)) {
                    let (id, name) = (
                        found["missionId"].as_str().unwrap(),
                        found["checkpointName"].as_str().unwrap(),
                    );
                    let path = format!("/v1/missions/{id}/checkpoints/{name}/resume");
                    self.attempt(&what, app.post(&path, json!({}))).await;
                }
            }
            Deed::Task(route, task) => {
                if let Some(id) = self.pick(task).await {
                    let path = format!("/v1/tasks/{id}/{route}");
                    self.attempt(&what, app.post(&path, json!({}))).await;
                }
            }
            Deed::Delete(task) => {
                if let Some(id) = self.pick(task).await {
                    self.attempt(&what, app.delete(&format!("/v1/tasks/{id}")))
                        .await;
                }
            }
            Deed::Restart => {
                self.others.pop().unwrap().cancel();
                self.others.push(self.app.another_process_with_stop().await);
            }
            Deed::Rest(milliseconds) => {
                tokio::time::sleep(Duration::from_millis(milliseconds)).await
            }
        }
    }

    /// Tasks that people have laid aside go on.
    async fn release(&self) {
        let (_, tasks) = answer(self.app.get("/v1/tasks?status=pending")).await;
        for task in tasks.as_array().unwrap() {
            if task["held"] == true {
                let path = format!("/v1/tasks/{}/run", task["id"].as_str().unwrap());
                self.attempt("release", self.app.post(&path, json!({})))
                    .await;
            }
        }
    }

    /// Waits until the engine has nothing to do: nothing is worked on, and all that is owed waits for the end of a pause.
    async fn quiet(&self) {
        let mut database = PgConnection::connect(&self.app.database_url).await.unwrap();
        for _ in 0..600 {
            let (busy,): (bool,) = sqlx::query_as(
                "select exists (select from production.tasks where status in ('assigned', 'in_progress', 'review'))
                    or exists (select from production.jobs where parked_on is null or parked_on not like 'mission:%')",
            )
            .fetch_one(&mut database)
            .await
            .unwrap();
            if !busy {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the engine never rests: {:?}", self.jobs().await);
    }

    /// What is owed, for a failure's message.
    async fn jobs(&self) -> Vec<String> {
        let mut database = PgConnection::connect(&self.app.database_url).await.unwrap();
        sqlx::query_scalar(
            "select concat_ws(' ', j.kind, j.ready, j.parked_on, j.holder, t.title, t.status, t.held)
            from production.jobs j left join production.tasks t on t.id = j.subject",
        )
        .fetch_all(&mut database)
        .await
        .unwrap()
    }

    async fn standing(&self) -> Vec<(String, Value)> {
        let mut standing = Vec::new();
        for id in &self.missions {
            let mission = self.app.read_mission(id).await;
            standing.push((mission["status"].as_str().unwrap().to_owned(), mission));
        }
        standing
    }

    /// Whatever was done: what can go on does, what cannot says so, and all comes to an end when people let it.
    async fn end(&self) {
        for _ in 0..30 {
            self.release().await;
            self.quiet().await;
            let standing = self.standing().await;
            let active: Vec<_> = standing
                .iter()
                .filter(|(status, _)| status == "active")
                .collect();
            let (_, tasks) = answer(self.app.get("/v1/tasks")).await;
            if !active.is_empty() {
                let jobs = self.jobs().await;
                panic!("these hang: {active:#?} {tasks:#} {jobs:?}");
            }
            let paused: Vec<&Value> = standing
                .iter()
                .filter(|(status, _)| status == "paused")
                .map(|(_, mission)| mission)
                .collect();
            if paused.is_empty() {
                return;
            }
            for mission in paused {
                assert!(
                    mission["reason"].is_string(),
                    "it does not say why it is paused: {mission}"
                );
                let path = format!("/v1/missions/{}/resume", mission["id"].as_str().unwrap());
                let (status, body) = answer(self.app.post(&path, json!({}))).await;
                assert_eq!(status, 200, "{body}");
            }
        }
        panic!("they never end: {:#?}", self.standing().await);
    }

    async fn judge(&self) {
        let mut database = PgConnection::connect(&self.app.database_url).await.unwrap();
        let (jobs, unfinished): (i64, i64) = sqlx::query_as(
            "select (select count(*) from production.jobs), (select count(*) from production.tasks where status not in ('done', 'failed'))",
        )
        .fetch_one(&mut database)
        .await
        .unwrap();
        assert_eq!((jobs, unfinished), (0, 0));
        let mut history = History::default();
        for (name, event) in self.app.events("*").await {
            history.hear(&name, &event, &self.definitions);
        }
        for (number, id) in self.missions.iter().enumerate() {
            let mission = self.app.read_mission(id).await;
            assert_eq!(json!(history.missions[id]), mission["status"], "m{number}");
        }
    }
}

/// What the events told so far, and what must be true of it.
#[derive(Default)]
struct History {
    missions: HashMap<String, String>,
    tasks: HashMap<String, Seen>,
    /// By group and title.
    ids: HashMap<(String, String), String>,
    /// Barriers by group, name and event.
    told: HashSet<(String, String, String)>,
}

struct Seen {
    group: String,
    title: String,
    status: String,
    was_done: bool,
    /// It was put so that it does without what failed.
    alone: bool,
}

impl History {
    fn hear(&mut self, name: &str, event: &Value, definitions: &[Value]) {
        let text = |member: &str| event[member].as_str().unwrap_or_default().to_owned();
        match name {
            "mission:saved" => {
                self.missions
                    .entry(text("missionId"))
                    .or_insert_with(|| "draft".to_owned());
            }
            "mission:transition" => {
                let at = self.missions.insert(text("missionId"), text("to")).unwrap();
                assert_eq!(at, text("from"), "{event}");
            }
            "task:created" => {
                let task = &event["task"];
                let of = |member: &str| task[member].as_str().unwrap().to_owned();
                self.ids.insert((of("group"), of("title")), of("id"));
                let seen = Seen {
                    group: of("group"),
                    title: of("title"),
                    status: of("status"),
                    was_done: false,
                    alone: false,
                };
                self.tasks.insert(of("id"), seen);
            }
            "deadlock:resolved" if event["action"] == "absorb" => {
                self.tasks
                    .get_mut(event["taskId"].as_str().unwrap())
                    .unwrap()
                    .alone = true;
            }
            "task:transition" => {
                let (id, to) = (text("taskId"), text("to"));
                assert_eq!(self.tasks[&id].status, text("from"), "{event}");
                if to == "in_progress" {
                    self.begins(&id, definitions);
                }
                let seen = self.tasks.get_mut(&id).unwrap();
                seen.was_done |= to == "done";
                seen.status = to;
            }
            "checkpoint:reached"
            | "checkpoint:resumed"
            | "delay:started"
            | "delay:expired"
            | "quality:gate:passed" => {
                let barrier = ["checkpointName", "delayName", "gateName"]
                    .map(text)
                    .concat();
                let new = self.told.insert((text("group"), barrier, name.to_owned()));
                assert!(new, "it was told twice: {name} {event}");
            }
            _ => {}
        }
    }

    fn begins(&self, id: &str, definitions: &[Value]) {
        let seen = &self.tasks[id];
        let number: usize = seen.title[1..].split(' ').next().unwrap().parse().unwrap();
        let mission = &definitions[number];
        let defined = mission["tasks"]
            .as_array()
            .unwrap()
            .iter()
            .find(|task| task["title"] == json!(seen.title))
            .unwrap();
        for need in defined["dependsOn"].as_array().unwrap() {
            let need = &self.ids[&(seen.group.clone(), need.as_str().unwrap().to_owned())];
            assert!(
                seen.alone || self.tasks[need].was_done,
                "{} began before what it needs was done",
                seen.title
            );
        }
        for (list, passed) in [
            ("checkpoints", "checkpoint:resumed"),
            ("delays", "delay:expired"),
            ("qualityGates", "quality:gate:passed"),
        ] {
            for barrier in mission[list].as_array().into_iter().flatten() {
                if barrier["blocksTasks"]
                    .as_array()
                    .unwrap()
                    .contains(&json!(seen.title))
                {
                    let name = barrier["name"].as_str().unwrap().to_owned();
                    let told = (seen.group.clone(), name, passed.to_owned());
                    assert!(
                        self.told.contains(&told),
                        "{} began before {told:?}",
                        seen.title
                    );
                }
            }
        }
    }
}

async fn live_through(missions: Vec<(Vec<Part>, Vec<Wall>)>, deeds: Vec<Deed>) {
    let mut world = World::begin(&missions).await;
    for deed in deeds {
        world.act(deed).await;
    }
    world.end().await;
    world.judge().await;
}

#[test]
fn whatever_people_do_to_missions_none_hangs_and_nothing_begins_too_early() {
    let mut runner = TestRunner::new(Config {
        cases: 16,
        failure_persistence: None,
        max_shrink_iters: 20,
        ..Config::default()
    });
    runner
        .run(&(missions(), deeds()), |(missions, deeds)| {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(live_through(missions, deeds));
            Ok(())
        })
        .unwrap();
}
