//! The queue: fair between projects, in order within one, and never two at once.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use polpo::ids::Id;
use polpo::store::{
    Holder, Job, Lane, Lease, ProjectDb, ProjectTx, Room, RunStatus, StoreError, World,
};
use polpo::task::{Bypass, Status};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::harness::{
    Reply, TestApp, answer, called, eventually, last_text, results, said, waiting,
};

#[tokio::test]
async fn what_a_process_holds_that_stopped_in_the_middle_of_a_change_is_let_go() {
    let app = TestApp::start_with(&["--role-of-test", "api"]).await;
    app.agent("noor").await;
    let task = app.task("held", json!({})).await;
    let claimed = app
        .app
        .db
        .claim(
            World::Live,
            Lane::Engine,
            Holder::new(1),
            Uuid::nil(),
            &Room::of(1),
        )
        .await
        .unwrap();
    let mut stopped = claimed.leases[0].db.begin();
    stopped.lock_task(task.parse().unwrap()).await.unwrap();
    // It waits for the lock, which is Postgres' to take away.
    let change = app.patch(&format!("/v1/tasks/{task}"), json!({"priority": 2}));
    let (status, body) = answer(change).await;
    assert_eq!(status, 200, "{body}");
    let late = stopped.commit().await;
    assert!(late.is_err(), "{late:?}");
}

/// Claims a task's job without a worker, and ends the task on what it looked like then: not committed yet.
async fn assumed_end(app: &TestApp, task: &str) -> (Lease, ProjectTx) {
    let db = &app.app.db;
    let room = Room::of(10);
    let claimed = db.claim(
        World::Live,
        Lane::Engine,
        Holder::new(1),
        Uuid::nil(),
        &room,
    );
    let lease = claimed.await.unwrap().leases.remove(0);
    let mut known = lease.db.task(task.parse().unwrap()).await.unwrap();
    let mut tx = lease.db.begin();
    tx.assume(&lease, &known);
    known.bypass(Bypass::Stopped);
    tx.end_run(Id::new(), RunStatus::Finished, None);
    tx.call_off(lease.job).await.unwrap();
    tx.save_task(&mut known).await.unwrap();
    (lease, tx)
}

#[tokio::test]
async fn what_was_decided_from_something_that_has_changed_is_not_written() {
    let app = TestApp::start_with(&["--role-of-test", "api"]).await;
    app.agent("noor").await;
    for disturbed_by in [
        "nothing",
        "a change",
        "one that needs it",
        "another's lease",
    ] {
        let task = app.task(disturbed_by, json!({})).await;
        let (lease, tx) = assumed_end(&app, &task).await;
        match disturbed_by {
            "a change" => {
                let change = app.patch(&format!("/v1/tasks/{task}"), json!({"description": "e"}));
                assert_eq!(answer(change).await.0, 200);
            }
            "one that needs it" => {
                app.task("needs it", json!({"dependsOn": [task], "draft": true}))
                    .await;
            }
            "another's lease" => {
                let mut other = lease.db.begin();
                other
                    .enqueue(lease.job, 1.0, Duration::from_secs(60))
                    .await
                    .unwrap();
                other.commit().await.unwrap();
            }
            _ => {}
        }
        let committed = tx.commit().await;
        let now = lease.db.task(task.parse().unwrap()).await.unwrap().status();
        if disturbed_by == "nothing" {
            assert!(committed.is_ok(), "{committed:?}");
            assert_eq!(now, Status::Failed);
        } else {
            assert!(
                matches!(committed, Err(StoreError::Stale)),
                "{disturbed_by}: {committed:?}"
            );
            assert_eq!(now, Status::Pending, "{disturbed_by}");
        }
        let told = app.events("task:transition").await;
        assert_eq!(told.len(), 1, "{disturbed_by}: {told:?}");
    }
}

#[tokio::test]
async fn a_task_does_not_end_unseen_by_one_that_comes_to_need_it_at_that_moment() {
    let app = TestApp::start_with(&["--role-of-test", "api"]).await;
    app.agent("noor").await;
    let task = app.task("need", json!({})).await;
    let other = app.task("other", json!({"draft": true})).await;
    let (_, tx) = assumed_end(&app, &task).await;
    let connect = async || PgConnection::connect(&app.database_url).await.unwrap();
    let (mut one, mut watch) = (connect().await, connect().await);
    // As whoever creates a task does that needs it.
    let mut create = one.begin().await.unwrap();
    let uuid = |id: &str| id.parse::<Id<polpo::ids::Task>>().unwrap().uuid();
    sqlx::query("update production.tasks set needed = true where id = $1")
        .bind(uuid(&task))
        .execute(&mut *create)
        .await
        .unwrap();
    sqlx::query("insert into production.dependencies select project_id, $1, $2 from production.tasks where id = $1")
        .bind(uuid(&other))
        .bind(uuid(&task))
        .execute(&mut *create)
        .await
        .unwrap();
    let committed = async {
        eventually("the end waits", async || waiting(&mut watch).await > 0).await;
        create.commit().await.unwrap();
    };
    let (ended, ()) = tokio::join!(tx.commit(), committed);
    assert!(matches!(ended, Err(StoreError::Stale)), "{ended:?}");
}

#[tokio::test]
async fn postgres_looks_at_tables_that_have_come_to_have_rows() {
    let app = TestApp::start_with(&["--role-of-test", "api"]).await;
    app.agent("noor").await;
    app.task("a", json!({"draft": true})).await;
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let known = "select relname::text from pg_class
        where relnamespace = 'production'::regnamespace and relname in ('tasks', 'missions') and reltuples >= 0";
    let before: Vec<String> = sqlx::query_scalar(known)
        .fetch_all(&mut database)
        .await
        .unwrap();
    assert_eq!(before, Vec::<String>::new());
    app.app.db.look_at_grown_tables(World::Live).await.unwrap();
    let after: Vec<String> = sqlx::query_scalar(known)
        .fetch_all(&mut database)
        .await
        .unwrap();
    assert_eq!(after, ["tasks"], "the other has no rows");
    let pages = "select relpages from pg_class where oid = 'production.tasks'::regclass";
    for grows in [false, true, false] {
        let small: i32 = sqlx::query_scalar(pages)
            .fetch_one(&mut database)
            .await
            .unwrap();
        if grows {
            sqlx::query(
                "insert into production.tasks (project_id, id, title, assign_to, status, document, created_at, updated_at)
                select project_id, gen_random_uuid(), 't' || n, assign_to, status, document, created_at, updated_at
                from production.tasks cross join generate_series(1, 100) as n",
            )
            .execute(&mut database)
            .await
            .unwrap();
        }
        app.app.db.look_at_grown_tables(World::Live).await.unwrap();
        let large: i32 = sqlx::query_scalar(pages)
            .fetch_one(&mut database)
            .await
            .unwrap();
        assert_eq!(large > small, grows, "{small} pages, then {large}");
    }
}

#[tokio::test]
async fn a_change_is_made_while_steps_wait_for_someone_who_holds_their_jobs() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    let answered = Arc::new(Notify::new());
    let gate = answered.clone();
    app.upstream.answers(move |request| {
        if results(request) == 0 {
            let call = called(&[("call_1", "memory_get", &["{}"])]);
            Reply::Pause(vec![], gate.clone(), call)
        } else {
            Reply::Stream(said("Done."))
        }
    });
    let mut tasks = Vec::new();
    for number in 0..3 {
        tasks.push(app.task(&format!("task {number}"), json!({})).await);
    }
    eventually("all are asked", async || app.upstream.asked().len() == 3).await;
    let mut other = PgConnection::connect(&app.database_url).await.unwrap();
    let mut change = other.begin().await.unwrap();
    let held = sqlx::query("select from production.jobs for update")
        .execute(&mut *change)
        .await
        .unwrap();
    assert_eq!(held.rows_affected(), 3);
    answered.notify_waiters();
    let mut watch = PgConnection::connect(&app.database_url).await.unwrap();
    eventually("their steps wait", async || waiting(&mut watch).await >= 2).await;
    let one_more = app.task("one more", json!({"draft": true}));
    tokio::time::timeout(Duration::from_secs(20), one_more)
        .await
        .expect("nothing keeps it from being made");
    change.rollback().await.unwrap();
    for task in tasks {
        app.until(&task, "done").await;
    }
}

/// Takes hold of `first`, kills the task, and says whether `second` is free while the kill waits for the first.
async fn is_free_while_a_kill_waits(app: &TestApp, task: &str, first: &str, second: &str) -> bool {
    let connect = async || PgConnection::connect(&app.database_url).await.unwrap();
    let (mut one, mut other, mut watch) = (connect().await, connect().await, connect().await);
    let mut change = one.begin().await.unwrap();
    let hold = |table: &str, how: &str| {
        sqlx::AssertSqlSafe(format!("select from production.{table} for update {how}"))
    };
    sqlx::raw_sql(hold(first, ""))
        .execute(&mut *change)
        .await
        .unwrap();
    let kill = answer(app.post(&format!("/v1/tasks/{task}/kill"), json!({})));
    let looked = async {
        eventually("the kill waits", async || waiting(&mut watch).await > 0).await;
        let mut look = other.begin().await.unwrap();
        let held = sqlx::raw_sql(hold(second, "nowait"))
            .execute(&mut *look)
            .await;
        look.rollback().await.unwrap();
        change.rollback().await.unwrap();
        held.is_ok()
    };
    let ((status, body), free) = tokio::join!(kill, looked);
    assert_eq!(status, 200, "{body}");
    free
}

#[tokio::test]
async fn a_kill_takes_hold_of_the_job_before_the_run_as_whoever_records_a_step() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    app.upstream.will(Reply::Hang(vec![]));
    let task = app.task("long", json!({})).await;
    eventually("it is at work", async || app.upstream.asked().len() == 1).await;
    assert!(is_free_while_a_kill_waits(&app, &task, "jobs", "runs").await);
}

#[tokio::test]
async fn a_kill_takes_hold_of_the_missions_run_before_the_job_as_whoever_lets_tasks_begin() {
    let app = TestApp::start_with(&["--role-of-test", "api"]).await;
    app.agent("noor").await;
    let tasks = json!([{"title": "a", "description": "Do it", "assignTo": "noor"}]);
    let mission = app.mission("m", json!({"tasks": tasks})).await;
    app.execute(&mission).await;
    let (_, tasks) = answer(app.get("/v1/tasks")).await;
    let task = tasks[0]["id"].as_str().unwrap();
    assert!(is_free_while_a_kill_waits(&app, task, "mission_runs", "jobs").await);
}

#[tokio::test]
async fn a_heartbeat_waits_for_nobody_who_has_hold_of_a_job() {
    let app = TestApp::start_with(&["--role-of-test", "api"]).await;
    app.agent("noor").await;
    for title in ["held", "free"] {
        app.task(title, json!({})).await;
    }
    let (db, holder) = (&app.app.db, Holder::new(1));
    let claimed = db
        .claim(World::Live, Lane::Engine, holder, Uuid::nil(), &Room::of(2))
        .await
        .unwrap();
    let mut leases: Vec<i64> = claimed.leases.iter().map(Lease::number).collect();
    leases.sort_unstable();
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    sqlx::query("update production.jobs set due_at = clock_timestamp()")
        .execute(&mut database)
        .await
        .unwrap();
    let mut change = database.begin().await.unwrap();
    sqlx::query("select from production.jobs where lease = $1 for update")
        .bind(leases[0])
        .execute(&mut *change)
        .await
        .unwrap();
    let beat = db.extend_all(World::Live, holder, &leases);
    let mut kept = tokio::time::timeout(Duration::from_secs(20), beat)
        .await
        .expect("it waits for no one")
        .unwrap();
    kept.sort_unstable();
    assert_eq!(kept, leases);
    let extended: Vec<i64> =
        sqlx::query_scalar("select lease from production.jobs where due_at > clock_timestamp()")
            .fetch_all(&mut *change)
            .await
            .unwrap();
    assert_eq!(extended, leases[1..]);
    change.rollback().await.unwrap();
    // Of what is another's nothing is kept.
    let others = db.extend_all(World::Live, Holder::new(2), &leases).await;
    assert_eq!(others.unwrap(), Vec::<i64>::new());
}

/// Another tenant, with an agent of its own.
struct Other<'a> {
    app: &'a TestApp,
    key: String,
}

impl<'a> Other<'a> {
    async fn new(app: &'a TestApp) -> Self {
        let db = &app.app.db;
        let organization = db.create_organization("Other", "other").await.unwrap();
        let project = db.create_project(organization.id, "Other", "other");
        let project = project.await.unwrap().id;
        let (_, key) = app.app.issue_key(project, "k", World::Live).await.unwrap();
        let other = Self { app, key };
        let agent = json!({"name": "single", "model": "openai:scripted"});
        other.post("/v1/agents", agent).await;
        other
    }

    async fn task(&self, title: &str, description: &str) {
        let task = json!({"title": title, "description": description, "assignTo": "single"});
        self.post("/v1/tasks", task).await;
    }

    async fn post(&self, path: &str, body: Value) {
        let request = self.app.client.post(format!("{}{path}", self.app.url));
        let (status, body) = answer(request.bearer_auth(&self.key).json(&body)).await;
        assert_eq!(status, 201, "{body}");
    }
}

#[tokio::test]
async fn a_tenant_whose_models_are_silent_leaves_others_a_place() {
    let app = TestApp::start_with(&["--worker-slots", "4"]).await;
    app.agent("noor").await;
    app.upstream
        .answers(|request| match last_text(request, "user").as_str() {
            "Just one" => Reply::Stream(said("Done.")),
            _ => Reply::Hang(vec![]),
        });
    let other = Other::new(&app).await;
    let mut silent = Vec::new();
    for number in 0..8 {
        silent.push(app.task(&format!("silent {number}"), json!({})).await);
    }
    let asked = async |count: usize| app.upstream.asked().len() == count;
    eventually("three of them are under way", async || asked(3).await).await;
    other.task("one", "Just one").await;
    eventually("the other tenant's is begun", async || asked(4).await).await;
    // Whoever leaves makes room for the next: what was left out of a claim is not forgotten.
    for (killed, task) in silent.iter().enumerate().take(3) {
        answer(app.post(&format!("/v1/tasks/{task}/kill"), json!({}))).await;
        let count = 5 + killed;
        eventually("the next is under way", async || asked(count).await).await;
    }
    app.stop.cancel();
}

#[tokio::test]
async fn a_tenant_with_many_tasks_does_not_delay_anothers_one() {
    let app = TestApp::start_with(&["--worker-slots", "4"]).await;
    app.agent("noor").await;
    app.upstream
        .answers(|_| Reply::Slow(Duration::from_millis(10), said("Done.")));
    let other = Other::new(&app).await;
    // Ten thousand become ready at once.
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    sqlx::query(
        "with many as (
            insert into production.tasks (project_id, id, title, assign_to, status, document, created_at, updated_at)
            select $1, gen_random_uuid(), 'many ' || number, 'noor', 'pending',
                   jsonb_build_object('description', 'Do many'), now(), now()
            from generate_series(1, 10000) as number
            returning id
        )
        insert into production.jobs (project_id, kind, subject, ready, due_at)
        select $1, 'task', id, true, now() from many",
    )
    .bind(app.project.parse::<Uuid>().unwrap())
    .execute(&mut database)
    .await
    .unwrap();
    while app.upstream.asked().len() < 20 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let before = app.upstream.asked().len();
    other.task("one", "Just one").await;
    let place = loop {
        let asked = app.upstream.asked();
        if let Some(place) = asked
            .iter()
            .position(|request| last_text(request, "user") == "Just one")
        {
            break place;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    let overtaken = place.saturating_sub(before);
    eprintln!("{overtaken} of ten thousand tasks of the other tenant began before it");
    // Those whose place was taken when it came, and a claim or two.
    assert!(overtaken < 20, "{overtaken}");
    app.stop.cancel();
}

#[tokio::test]
async fn the_highest_priority_goes_first() {
    let app = TestApp::start_with(&["--worker-slots", "1"]).await;
    app.agent("noor").await;
    app.upstream
        .answers(|_| Reply::Slow(Duration::from_millis(5), said("Done.")));
    let gate = app.task("gate", json!({"draft": true})).await;
    let mut last = String::new();
    for (title, priority) in [
        ("low", 0.5),
        ("high", 7.0),
        ("middle", 2.0),
        ("high too", 7.0),
        ("lowest", 0.1),
    ] {
        last = app
            .task(title, json!({"priority": priority, "dependsOn": ["gate"]}))
            .await;
    }
    answer(app.post(&format!("/v1/tasks/{gate}/queue"), json!({}))).await;
    app.until(&last, "done").await;
    let order: Vec<String> = app
        .upstream
        .asked()
        .iter()
        .skip(1)
        .map(|request| last_text(request, "user"))
        .collect();
    assert_eq!(
        order,
        ["Do high", "Do high too", "Do middle", "Do low", "Do lowest"]
    );
}

#[tokio::test]
async fn limits_of_an_agent_and_of_the_project_are_kept_and_nobody_waits_for_ever() {
    for (agent, project) in [(Some(2), None), (None, Some(3)), (Some(3), Some(2))] {
        let app = TestApp::start().await;
        app.agent("noor").await;
        answer(app.patch("/v1/agents/noor", json!({"maxConcurrency": agent}))).await;
        answer(app.patch("/v1/config", json!({"maxConcurrency": project}))).await;
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (counted, highest) = (now.clone(), most.clone());
        app.upstream.answers(move |_| {
            let count = counted.fetch_add(1, Ordering::SeqCst) + 1;
            highest.fetch_max(count, Ordering::SeqCst);
            let counted = counted.clone();
            // Counted down a little before the answer is there: what is counted is less than what is under way.
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(15)).await;
                counted.fetch_sub(1, Ordering::SeqCst);
            });
            Reply::Slow(Duration::from_millis(20), said("Done."))
        });
        // All become ready at once.
        let first = app.task("first", json!({"draft": true})).await;
        let mut ids = Vec::new();
        for number in 0..20 {
            let needs = json!({"dependsOn": [first]});
            ids.push(app.task(&format!("t{number}"), needs).await);
        }
        answer(app.post(&format!("/v1/tasks/{first}/queue"), json!({}))).await;
        for id in &ids {
            app.until(id, "done").await;
        }
        let limit = agent.into_iter().chain(project).min().unwrap();
        assert_eq!(most.load(Ordering::SeqCst), limit, "{agent:?} {project:?}");
    }
}

/// A task can be deleted in the moment in which another's end owes it its turn: both are right, and a job is left.
#[tokio::test]
async fn a_job_of_what_was_deleted_is_dropped() {
    let app = TestApp::start().await;
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    for (kind, lane) in [
        ("task", 0_i16),
        ("blocked", 0),
        ("reassess", 0),
        ("deadline", 2),
        ("escalation", 2),
        ("mission_deadline", 2),
        ("delay", 2),
    ] {
        sqlx::query(
            "insert into production.jobs (project_id, kind, subject, ready, due_at, lane)
            values ($1, $2, gen_random_uuid(), true, now(), $3)",
        )
        .bind(app.project.parse::<Uuid>().unwrap())
        .bind(kind)
        .bind(lane)
        .execute(&mut database)
        .await
        .unwrap();
    }
    eventually("no job is left", async || {
        let left: i64 = sqlx::query_scalar("select count(*) from production.jobs")
            .fetch_one(&mut database)
            .await
            .unwrap();
        left == 0
    })
    .await;
}

/// A runtime of one history: its servers and their connections end with it.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// What can happen to the queue.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// A job is owed, or owed anew.
    Enqueue(usize),
    /// A process claims some.
    Claim(usize, usize),
    /// A process finishes a job that it believes it has.
    Complete(usize, usize),
    /// A process gives one back.
    PutOff(usize, usize),
    /// A process is gone.
    Crash(usize),
    /// Someone looks for jobs of processes that are gone.
    TakeOver,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => (0..6usize).prop_map(Act::Enqueue),
        4 => (0..3usize, 1..4usize).prop_map(|(process, most)| Act::Claim(process, most)),
        3 => (0..3usize, 0..6usize).prop_map(|(process, which)| Act::Complete(process, which)),
        2 => (0..3usize, 0..6usize).prop_map(|(process, which)| Act::PutOff(process, which)),
        1 => (0..3usize).prop_map(Act::Crash),
        1 => Just(Act::TakeOver),
    ];
    prop::collection::vec(act, 1..50)
}

/// The queue of one history, and what must be true of it.
struct History {
    app: TestApp,
    doors: Vec<ProjectDb>,
    jobs: Vec<Uuid>,
    owed: BTreeSet<usize>,
    processes: Vec<Process>,
}

struct Process {
    holder: Holder,
    standing: polpo::store::Standing,
    leases: Vec<Lease>,
}

impl History {
    async fn begin(doors: Vec<ProjectDb>, app: TestApp) -> Self {
        let mut processes = Vec::new();
        for _ in 0..3 {
            processes.push(Process::start(&app).await);
        }
        let jobs = (0..6).map(|_| Uuid::now_v7()).collect();
        Self {
            app,
            doors,
            jobs,
            owed: BTreeSet::new(),
            processes,
        }
    }

    fn number(&self, lease: &Lease) -> usize {
        let Job::Blocked(task) = lease.job else {
            panic!("{:?}", lease.job)
        };
        self.jobs
            .iter()
            .position(|job| *job == task.uuid())
            .unwrap()
    }

    async fn act(&mut self, act: Act) {
        match act {
            Act::Enqueue(job) => {
                let mut tx = self.doors[job % self.doors.len()].begin();
                tx.enqueue(Job::Blocked(Id::from(self.jobs[job])), 1.0, Duration::ZERO)
                    .await
                    .unwrap();
                tx.commit().await.unwrap();
                self.owed.insert(job);
            }
            Act::Claim(process, most) => {
                let holder = self.processes[process].holder;
                let claimed = self
                    .app
                    .app
                    .db
                    .claim(
                        World::Test,
                        Lane::Engine,
                        holder,
                        Uuid::nil(),
                        &Room::of(most),
                    )
                    .await
                    .unwrap();
                assert!(claimed.leases.len() <= most);
                for lease in &claimed.leases {
                    assert!(
                        self.owed.contains(&self.number(lease)),
                        "a job that nobody owes was claimed"
                    );
                }
                self.processes[process].leases.extend(claimed.leases);
            }
            Act::Complete(process, which) => {
                let Some(lease) = self.pick(process, which) else {
                    return;
                };
                let mut tx = lease.db.begin();
                match tx.complete(&lease).await {
                    Ok(()) => {
                        tx.commit().await.unwrap();
                        let number = self.number(&lease);
                        assert!(self.owed.remove(&number), "a job was done twice");
                    }
                    Err(error) => assert!(matches!(error, StoreError::LeaseLost), "{error}"),
                }
            }
            Act::PutOff(process, which) => {
                let Some(lease) = self.pick(process, which) else {
                    return;
                };
                let mut tx = lease.db.begin();
                match tx.put_off(&lease, Duration::ZERO).await {
                    Ok(()) => tx.commit().await.unwrap(),
                    Err(error) => assert!(matches!(error, StoreError::LeaseLost), "{error}"),
                }
            }
            Act::Crash(process) => {
                // What it had claimed it still believes in: it may as well be one that only lost its connection.
                let next = Process::start(&self.app).await;
                let gone = std::mem::replace(&mut self.processes[process], next);
                drop(gone.standing);
                self.processes[process].leases = gone.leases;
            }
            Act::TakeOver => {
                self.app
                    .app
                    .db
                    .free_orphaned_jobs(World::Test)
                    .await
                    .unwrap();
            }
        }
    }

    fn pick(&mut self, process: usize, which: usize) -> Option<Lease> {
        let leases = &mut self.processes[process].leases;
        (!leases.is_empty()).then(|| leases.swap_remove(which % leases.len()))
    }

    /// Whatever happened: of several who believe that they have a job one at most does, and every job can be done.
    async fn end(mut self) {
        let mut live: HashMap<usize, usize> = HashMap::new();
        let believed: Vec<Lease> = self
            .processes
            .iter_mut()
            .flat_map(|process| process.leases.drain(..))
            .collect();
        for lease in &believed {
            let mut tx = lease.db.begin();
            if tx.extend(lease).await.is_ok() {
                *live.entry(self.number(lease)).or_default() += 1;
            }
        }
        assert!(live.values().all(|count| *count == 1), "{live:?}");
        for process in std::mem::take(&mut self.processes) {
            drop(process.standing);
        }
        // A connection that is closed gives its lock back in a moment.
        let last = Process::start(&self.app).await;
        for _ in 0..200 {
            self.app
                .app
                .db
                .free_orphaned_jobs(World::Test)
                .await
                .unwrap();
            let claimed = self
                .app
                .app
                .db
                .claim(
                    World::Test,
                    Lane::Engine,
                    last.holder,
                    Uuid::nil(),
                    &Room::of(10),
                )
                .await
                .unwrap();
            for lease in claimed.leases {
                let mut tx = lease.db.begin();
                tx.complete(&lease).await.unwrap();
                tx.commit().await.unwrap();
                let number = self.number(&lease);
                assert!(self.owed.remove(&number));
            }
            if self.owed.is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("jobs were lost: {:?}", self.owed);
    }
}

impl Process {
    async fn start(app: &TestApp) -> Self {
        let holder = Holder::new(rand::random());
        let standing = app.app.db.hold(holder).await.unwrap();
        Self {
            holder,
            standing,
            leases: Vec::new(),
        }
    }
}

#[test]
fn no_history_of_claims_and_crashes_loses_a_job_or_does_one_twice() {
    let mut runner = TestRunner::new(Config {
        cases: 24,
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(&acts(), |acts| {
            runtime().block_on(async {
                // No engine of its own: the history is the only one that claims.
                let app = TestApp::start_with(&["--role-of-test", "api"]).await;
                let mut doors = Vec::new();
                let organization = app.app.db.create_organization("O", "o").await.unwrap();
                for name in ["a", "b"] {
                    let project = app
                        .app
                        .db
                        .create_project(organization.id, name, name)
                        .await
                        .unwrap()
                        .id;
                    let (_, key) = app.app.issue_key(project, "k", World::Test).await.unwrap();
                    let hash = ring::digest::digest(&ring::digest::SHA256, key.as_bytes());
                    let hash = hash.as_ref().try_into().unwrap();
                    doors.push(app.app.db.authenticate(World::Test, hash).await.unwrap().1);
                }
                let mut history = History::begin(doors, app).await;
                for act in acts {
                    history.act(act).await;
                }
                history.end().await;
            });
            Ok(())
        })
        .unwrap();
}

/// What people do to tasks while the engine is at them.
#[derive(Debug, Clone, Copy)]
enum Deed {
    /// A new task, which may need an earlier one, wait for a yes, or be a draft.
    Create(u8),
    /// One of the routes, on one of the tasks.
    Do(&'static str, usize),
    /// Another priority, or another agent.
    Patch(u8, usize),
    /// An answer to one of the requests.
    Answer(&'static str, usize),
    /// A process stops, and another starts.
    Restart,
}

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let routes = ["kill", "pause", "run", "retry", "queue", "force-fail"];
    let deed = prop_oneof![
        5 => any::<u8>().prop_map(Deed::Create),
        5 => (prop::sample::select(routes.to_vec()), 0..20usize).prop_map(|(route, task)| Deed::Do(route, task)),
        2 => (any::<u8>(), 0..20usize).prop_map(|(change, task)| Deed::Patch(change, task)),
        2 => (prop::sample::select(vec!["approve", "reject"]), 0..20usize).prop_map(|(answer, request)| Deed::Answer(answer, request)),
        1 => Just(Deed::Restart),
    ];
    prop::collection::vec(deed, 10..40)
}

/// How many calls of each task's model are under way, and the most there ever were.
type Calls = Arc<std::sync::Mutex<HashMap<String, (usize, usize)>>>;

/// A call of a task's model that is under way: from before it is looked at until its answer begins, or its asker leaves.
struct Call {
    calls: Calls,
    task: String,
}

impl Call {
    fn begin(calls: &Calls, task: &str) -> Self {
        let mut counts = calls.lock().unwrap();
        let (now, most) = counts.entry(task.to_owned()).or_default();
        *now += 1;
        *most = (*most).max(*now);
        drop(counts);
        Self {
            calls: calls.clone(),
            task: task.to_owned(),
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.calls.lock().unwrap().get_mut(&self.task).unwrap().0 -= 1;
    }
}

async fn live_through(deeds: Vec<Deed>) {
    let app = TestApp::start_with(&["--retry-backoff-ms", "1"]).await;
    app.agent("noor").await;
    app.agent("boss").await;
    answer(app.patch("/v1/agents/noor", json!({"maxConcurrency": 2}))).await;
    let gate = json!({"id": "g", "name": "G", "handler": "human", "hook": "task:spawn",
        "condition": {"expression": "task.title.endsWith('gated')"}});
    let settings = json!({"maxConcurrency": 3, "approvalGates": [gate]});
    assert_eq!(answer(app.patch("/v1/config", settings)).await.0, 200);
    let calls = Calls::default();
    let counted = calls.clone();
    app.upstream.answers(move |request| {
        let text = last_text(request, "user");
        // The calls of one task come one after the other, whichever process makes them.
        let call = Arc::new(Call::begin(&counted, &text));
        if text.contains("fails") {
            Reply::Plain(400, vec![], "{}".to_owned())
        } else {
            Reply::Kept(call, Duration::from_millis(8), said("Done."))
        }
    });
    let mut others = vec![app.another_process_with_stop().await];
    let mut tasks: Vec<String> = Vec::new();
    let mut stopped = BTreeSet::new();
    let requests = async || {
        answer(app.get("/v1/approvals?status=pending"))
            .await
            .1
            .as_array()
            .unwrap()
            .clone()
    };
    for (number, deed) in deeds.into_iter().enumerate() {
        match deed {
            Deed::Create(shape) => {
                let needs: Vec<&String> = tasks
                    .iter()
                    .filter(|_| shape & 4 != 0)
                    .rev()
                    .take(1)
                    .collect();
                let fails = if shape & 8 != 0 { "fails" } else { "works" };
                let gated = if shape & 48 == 16 { "gated" } else { "free" };
                let others = json!({
                    "draft": shape & 3 == 0, "sideEffects": shape & 16 != 0 && shape & 32 != 0, "dependsOn": needs, "maxRetries": shape >> 6,
                    "priority": shape % 7,
                });
                tasks.push(app.task(&format!("{number} {fails} {gated}"), others).await);
            }
            Deed::Do(route, task) if !tasks.is_empty() => {
                let id = &tasks[task % tasks.len()];
                let (status, body) =
                    answer(app.post(&format!("/v1/tasks/{id}/{route}"), json!({}))).await;
                assert!(status == 200 || status == 409, "{route}: {status} {body}");
                // Whoever stops a run does not wait for it to notice: the next may begin before.
                if ["kill", "pause", "force-fail"].contains(&route) {
                    let task = app.read(id).await;
                    stopped.insert(
                        task["originalDescription"]
                            .as_str()
                            .or(task["description"].as_str())
                            .unwrap()
                            .to_owned(),
                    );
                }
            }
            Deed::Patch(change, task) if !tasks.is_empty() => {
                let id = &tasks[task % tasks.len()];
                let change = if change & 1 == 0 {
                    json!({"priority": change})
                } else {
                    json!({"assignTo": if change & 2 == 0 { "noor" } else { "boss" }})
                };
                let (status, body) = answer(app.patch(&format!("/v1/tasks/{id}"), change)).await;
                assert!(status == 200 || status == 409, "{status} {body}");
            }
            Deed::Answer(word, request) => {
                let waiting = requests().await;
                if !waiting.is_empty() {
                    let id = waiting[request % waiting.len()]["id"]
                        .as_str()
                        .unwrap()
                        .to_owned();
                    let (status, body) = answer(app.post(
                        &format!("/v1/approvals/{id}/{word}"),
                        json!({"feedback": "again"}),
                    ))
                    .await;
                    assert!(status == 200 || status == 409, "{word}: {status} {body}");
                }
            }
            Deed::Restart => {
                others.pop().unwrap().cancel();
                others.push(app.another_process_with_stop().await);
            }
            Deed::Do(..) | Deed::Patch(..) => {}
        }
    }
    // Whoever waits for a person gets an answer; then everything comes to an end by itself.
    let mut standing = HashMap::new();
    for _ in 0..400 {
        standing.clear();
        for id in &tasks {
            let task = app.read(id).await;
            let status = task["status"].as_str().unwrap().to_owned();
            match status.as_str() {
                "draft" => {
                    drop(answer(app.post(&format!("/v1/tasks/{id}/queue"), json!({}))).await)
                }
                "pending" if task["held"] == true => {
                    drop(answer(app.post(&format!("/v1/tasks/{id}/run"), json!({}))).await)
                }
                "awaiting_approval" => {
                    for request in requests().await {
                        let id = request["id"].as_str().unwrap();
                        answer(app.post(&format!("/v1/approvals/{id}/approve"), json!({}))).await;
                    }
                    // What fails again and again waits again and again.
                    if app.read(id).await["title"]
                        .as_str()
                        .unwrap()
                        .contains("fails")
                    {
                        answer(app.post(&format!("/v1/tasks/{id}/kill"), json!({}))).await;
                    }
                }
                _ => {}
            }
            *standing.entry(status).or_insert(0) += 1;
        }
        if standing
            .keys()
            .all(|status| status == "done" || status == "failed")
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(
        standing
            .keys()
            .all(|status| status == "done" || status == "failed"),
        "lost: {standing:?}"
    );
    let calls = calls.lock().unwrap().clone();
    for (text, (_, most)) in calls {
        let undisturbed = !stopped.iter().any(|one| text.starts_with(one));
        assert!(most == 1 || !undisturbed, "{text} was run twice at once");
    }
    // Each task's way is whole: every change begins where the one before ended.
    let mut at: HashMap<String, String> = HashMap::new();
    for (name, payload) in app.events("task:created,task:transition").await {
        let id = payload["taskId"].as_str().unwrap().to_owned();
        if name == "task:created" {
            at.insert(id, payload["task"]["status"].as_str().unwrap().to_owned());
        } else {
            assert_eq!(at[&id], payload["from"], "{id}");
            at.insert(id, payload["to"].as_str().unwrap().to_owned());
        }
    }
}

#[test]
fn whatever_people_do_every_task_ends_and_none_is_run_twice_at_once() {
    let mut runner = TestRunner::new(Config {
        cases: 16,
        failure_persistence: None,
        max_shrink_iters: 20,
        ..Config::default()
    });
    runner
        .run(&deeds(), |deeds| {
            runtime().block_on(live_through(deeds));
            Ok(())
        })
        .unwrap();
}

#[tokio::test]
async fn both_worlds_are_worked_for_at_once_and_never_mix() {
    const EACH: usize = 12;
    let app = TestApp::start().await;
    app.upstream
        .answers(|request| Reply::Stream(said(&last_text(request, "user"))));
    let to = |world: &str, path: &str, body: Value| {
        let key = if world == "live" {
            &app.live
        } else {
            &app.test
        };
        let request = app.client.post(format!("{}{path}", app.url));
        answer(request.bearer_auth(key).json(&body))
    };
    let agent = json!({"name": "noor", "model": "openai:gpt-5", "allowedTools": []});
    for world in ["live", "test"] {
        assert_eq!(to(world, "/v1/agents", agent.clone()).await.0, 201);
    }
    let all = (0..EACH * 2).map(|number| {
        let world = if number % 2 == 0 { "live" } else { "test" };
        let task =
            json!({"title": format!("{world} {number}"), "description": world, "assignTo": "noor"});
        to(world, "/v1/tasks", task)
    });
    for (status, body) in futures::future::join_all(all).await {
        assert_eq!(status, 201, "{body}");
    }
    for (world, key) in [("live", &app.live), ("test", &app.test)] {
        let list = || app.client.get(format!("{}/v1/tasks", app.url));
        eventually("all are done", async || {
            let tasks = answer(list().bearer_auth(key)).await.1;
            let tasks = tasks.as_array().unwrap();
            assert_eq!(tasks.len(), EACH);
            tasks.iter().all(|task| task["status"] == "done")
        })
        .await;
        for task in answer(list().bearer_auth(key)).await.1.as_array().unwrap() {
            assert_eq!(task["result"]["stdout"], world, "{task}");
        }
    }
    assert_eq!(app.upstream.asked().len(), EACH * 2);
}

/// Ends the connection that holds a process' lock, as a proxy between it and its database may.
async fn take_locks(app: &TestApp) -> i64 {
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let taken = "select count(pg_terminate_backend(pid)) from pg_locks
        where locktype = 'advisory' and granted and pid <> pg_backend_pid()
          and database = (select oid from pg_database where datname = current_database())";
    sqlx::query_scalar(taken)
        .fetch_one(&mut database)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_process_that_loses_its_lock_takes_another_and_no_step_is_recorded_twice() {
    for processes in [1, 2] {
        let app = TestApp::start_with(&["--retry-backoff-ms", "1"]).await;
        app.agent("noor").await;
        let mut others = Vec::new();
        for _ in 1..processes {
            others.push(app.another_process_with_stop().await);
        }
        app.upstream
            .answers(|_| Reply::Slow(Duration::from_millis(1_500), said("Here.")));
        let id = app.task("work", json!({})).await;
        eventually("the model is asked", async || {
            app.upstream.asked().len() == 1
        })
        .await;
        let mut taken = 0;
        eventually("every process has a lock", async || {
            taken += take_locks(&app).await;
            taken >= processes
        })
        .await;
        let task = app.until(&id, "done").await;
        assert_eq!(
            (&task["result"]["stdout"], &task["retries"]),
            (&json!("Here."), &json!(0))
        );
        let activity = answer(app.get(&format!("/v1/tasks/{id}/activity"))).await.1;
        assert_eq!(activity["entries"].as_array().unwrap().len(), 1);
        assert_eq!(app.events("agent:completed").await.len(), 1);
        assert!(app.upstream.asked().len() <= 2);
        // And it works on.
        app.upstream.answers(|_| Reply::Stream(said("There.")));
        let next = app.task("next", json!({})).await;
        app.until(&next, "done").await;
    }
}

#[tokio::test]
async fn leases_of_the_two_worlds_with_one_number_are_both_kept() {
    let app = TestApp::start_with(&["--idle-timeout-ms", "60000"]).await;
    let agent = json!({"name": "noor", "model": "openai:gpt-5", "allowedTools": []});
    // Longer than a lease that nobody extends.
    app.upstream
        .answers(|_| Reply::Slow(Duration::from_secs(11), said("Here.")));
    app.sql(
        "alter sequence production.leases restart with 1000; alter sequence sandbox.leases restart with 1000"
            .to_owned(),
    )
    .await;
    let mut ids = Vec::new();
    for key in [&app.live, &app.test] {
        let post = |path: &str, body: &Value| {
            let request = app.client.post(format!("{}{path}", app.url));
            answer(request.bearer_auth(key).json(body))
        };
        assert_eq!(post("/v1/agents", &agent).await.0, 201);
        let task = json!({"title": "t", "description": "d", "assignTo": "noor"});
        ids.push((key, post("/v1/tasks", &task).await.1["id"].clone()));
    }
    for (key, id) in ids {
        let path = format!("{}/v1/tasks/{}", app.url, id.as_str().unwrap());
        let mut task = Value::Null;
        for _ in 0..300 {
            task = answer(app.client.get(&path).bearer_auth(key)).await.1;
            if task["status"] == "done" {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(task["status"], "done", "{task}");
    }
    assert_eq!(app.upstream.asked().len(), 2);
}
