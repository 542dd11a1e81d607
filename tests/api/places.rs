//! Places: how many tasks an agent and a project have at once, and that whoever waits for one gets it.

use std::sync::Arc;
use std::time::Duration;

use polpo::store::{Topic, World};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::sync::Notify;

use crate::harness::{
    Reply, TestApp, answer, called, eventually, last_text, results, said, waiting,
};

/// A server whose agent `noor` has one place, and `boss` many. Tasks whose title begins with "hang" never end.
async fn start() -> TestApp {
    let app = TestApp::start_with(&["--retry-backoff-ms", "1"]).await;
    app.agent("noor").await;
    app.agent("boss").await;
    let (status, body) = answer(app.patch("/v1/agents/noor", json!({"maxConcurrency": 1}))).await;
    assert_eq!(status, 200, "{body}");
    app.upstream.answers(|request| {
        if last_text(request, "user").contains("hang") {
            Reply::Hang(vec![])
        } else {
            Reply::Stream(said("Done."))
        }
    });
    app
}

async fn configure(app: &TestApp, settings: Value) {
    let (status, body) = answer(app.patch("/v1/config", settings)).await;
    assert_eq!(status, 200, "{body}");
}

/// Waits until so many jobs wait for a place of an agent.
async fn parked(app: &TestApp, agent: &str, count: i64) {
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    for _ in 0..400 {
        let waiting: i64 =
            sqlx::query_scalar("select count(*) from production.jobs where parked_on = $1")
                .bind(agent)
                .fetch_one(&mut database)
                .await
                .unwrap();
        if waiting == count {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("there were never {count} jobs that wait for {agent}");
}

/// Waits until a task is done, for less time than it takes the slow look to make a lost wake-up good.
async fn soon_done(app: &TestApp, task: &str) {
    eventually("it is done", async || {
        app.read(task).await["status"] == "done"
    })
    .await;
}

/// The request that a task waits for, answered with yes.
async fn approve(app: &TestApp, task: &str) {
    app.until(task, "awaiting_approval").await;
    let path = format!("/v1/approvals?taskId={task}&status=pending");
    let request = answer(app.get(&path)).await.1[0]["id"].clone();
    let path = format!("/v1/approvals/{}/approve", request.as_str().unwrap());
    assert_eq!(answer(app.post(&path, json!({}))).await.0, 200);
}

#[tokio::test]
async fn a_task_that_changes_hands_frees_the_place_of_the_agent_that_had_it() {
    let app = start().await;
    let go_on = Arc::new(Notify::new());
    // The first attempt fails when it may; the second, by another agent, never ends.
    app.upstream.will(Reply::Pause(
        vec![],
        go_on.clone(),
        vec![axum::body::Bytes::from_static(
            b"data: {\"error\":{\"message\":\"no\"}}\n\n",
        )],
    ));
    let policy = json!({"escalateAfter": 1, "fallbackAgent": "boss"});
    let first = app.task("hang", json!({"retryPolicy": policy})).await;
    eventually("it is at work", async || app.upstream.asked().len() == 1).await;
    let second = app.task("second", json!({})).await;
    parked(&app, "noor", 1).await;
    go_on.notify_waiters();
    soon_done(&app, &second).await;
    assert_eq!(app.read(&first).await["assignTo"], "boss");
}

#[tokio::test]
async fn an_escalation_in_the_middle_of_a_run_frees_the_place() {
    let app = start().await;
    let levels = json!([
        {"level": 1, "handler": "orchestrator", "timeoutMs": 400},
        {"level": 2, "handler": "agent", "target": "boss"},
    ]);
    let policy = json!({"levels": levels});
    configure(
        &app,
        json!({"escalationPolicy": policy, "orchestratorModel": "openai:decider"}),
    )
    .await;
    app.upstream
        .will(Reply::Plain(400, vec![], "{}".to_owned()));
    let words = json!({"description": "Do it again, and hang on to it."}).to_string();
    app.upstream.will(Reply::Stream(said(&words)));
    let first = app.task("first", json!({"maxRetries": 0})).await;
    eventually("it is at work again", async || {
        app.upstream.asked().len() == 3
    })
    .await;
    let second = app.task("second", json!({})).await;
    soon_done(&app, &second).await;
    assert_eq!(app.read(&first).await["assignTo"], "boss");
}

#[tokio::test]
async fn a_place_that_the_next_one_cannot_use_goes_to_the_one_after() {
    let app = start().await;
    let gate = json!({"id": "g", "name": "G", "handler": "human", "hook": "task:spawn",
        "condition": {"expression": "task.title == 'gated'"}});
    configure(&app, json!({"approvalGates": [gate]})).await;
    let first = app.task("hang", json!({})).await;
    eventually("it is at work", async || app.upstream.asked().len() == 1).await;
    let gated = app.task("gated", json!({"priority": 9})).await;
    let last = app.task("last", json!({})).await;
    parked(&app, "noor", 2).await;
    answer(app.post(&format!("/v1/tasks/{first}/kill"), json!({}))).await;
    soon_done(&app, &last).await;
    assert_eq!(app.read(&gated).await["status"], "awaiting_approval");
}

#[tokio::test]
async fn a_task_that_waits_for_a_place_and_is_given_to_another_agent_begins() {
    let app = start().await;
    app.task("hang", json!({})).await;
    eventually("it is at work", async || app.upstream.asked().len() == 1).await;
    let waiting = app.task("waiting", json!({})).await;
    parked(&app, "noor", 1).await;
    answer(app.patch(&format!("/v1/tasks/{waiting}"), json!({"assignTo": "boss"}))).await;
    soon_done(&app, &waiting).await;
}

#[tokio::test]
async fn a_lost_wake_up_is_made_good() {
    let app = start().await;
    let first = app.task("hang", json!({})).await;
    eventually("it is at work", async || app.upstream.asked().len() == 1).await;
    let waiting = app.task("waiting", json!({})).await;
    parked(&app, "noor", 1).await;
    // The server looks too, every ten seconds: what counts is where the job is, not whose look found it.
    let db = &app.app.db;
    db.wake_parked_jobs(World::Live).await.unwrap();
    parked(&app, "noor", 1).await;
    // Whoever had the place is gone, and has woken nobody.
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    sqlx::raw_sql("update production.tasks set status = 'failed' where title = 'hang'")
        .execute(&mut database)
        .await
        .unwrap();
    assert_eq!(app.read(&first).await["status"], "failed");
    db.wake_parked_jobs(World::Live).await.unwrap();
    db.ring(Topic::Jobs(World::Live));
    soon_done(&app, &waiting).await;
}

#[tokio::test]
async fn a_yes_does_not_begin_a_task_before_what_it_needs() {
    let app = start().await;
    let gate = json!({"id": "g", "name": "G", "handler": "human", "hook": "task:create",
        "condition": {"expression": "task.title == 'gated'"}});
    configure(&app, json!({"approvalGates": [gate]})).await;
    let first = app.task("first", json!({"draft": true})).await;
    let gated = app.task("gated", json!({"dependsOn": [first]})).await;
    approve(&app, &gated).await;
    app.until(&gated, "pending").await;
    // It takes nobody's place while it waits.
    let other = app.task("other", json!({})).await;
    soon_done(&app, &other).await;
    answer(app.post(&format!("/v1/tasks/{first}/queue"), json!({}))).await;
    soon_done(&app, &gated).await;
}

#[tokio::test]
async fn a_yes_does_not_make_room() {
    let app = start().await;
    let gate = json!({"id": "g", "name": "G", "handler": "human", "hook": "task:spawn",
        "condition": {"expression": "task.title == 'gated'"}});
    configure(&app, json!({"approvalGates": [gate]})).await;
    let gated = app.task("gated", json!({})).await;
    app.until(&gated, "awaiting_approval").await;
    let busy = app.task("hang", json!({})).await;
    eventually("it is at work", async || app.upstream.asked().len() == 1).await;
    approve(&app, &gated).await;
    parked(&app, "noor", 1).await;
    assert_eq!(app.upstream.asked().len(), 1);
    answer(app.post(&format!("/v1/tasks/{busy}/kill"), json!({}))).await;
    soon_done(&app, &gated).await;
}

#[tokio::test]
async fn a_deadline_is_kept_while_every_place_is_taken() {
    let app = TestApp::start_with(&["--worker-slots", "1"]).await;
    app.agent("noor").await;
    configure(&app, json!({"violationAction": "fail"})).await;
    app.upstream.answers(|_| Reply::Hang(vec![]));
    let soon = (chrono::Utc::now() + std::time::Duration::from_millis(600)).to_rfc3339();
    let busy = app
        .task("busy", json!({"priority": 9, "deadline": soon}))
        .await;
    let failed = app.until(&busy, "failed").await;
    assert_eq!(failed["result"]["reason"], "deadline");
}

#[tokio::test]
async fn the_work_of_a_suspended_project_rests_until_it_is_active_again() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    app.upstream.answers(|request| {
        let words = if results(request) < 3 {
            called(&[("c", "memory_get", &["{}"])])
        } else {
            said("Done.")
        };
        Reply::Slow(std::time::Duration::from_millis(200), words)
    });
    let task = app.task("long", json!({})).await;
    eventually("it is at work", async || app.upstream.asked().len() == 1).await;
    let status = async |status: &str| {
        let path = format!("/v1/projects/{}", app.project);
        let request = app
            .admin(Method::PATCH, &path)
            .json(&json!({"status": status}));
        assert_eq!(answer(request).await.0, 200);
    };
    status("suspended").await;
    parked(&app, "/suspended", 1).await;
    assert_eq!(app.upstream.asked().len(), 1);
    status("active").await;
    app.until(&task, "done").await;
    assert_eq!(app.upstream.asked().len(), 4);
}

#[tokio::test]
async fn a_process_without_its_lock_claims_nothing() {
    let app = TestApp::start_with(&["--role-of-test", "api"]).await;
    app.agent("noor").await;
    app.upstream.answers(|_| Reply::Stream(said("Done.")));
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let away = "alter function pg_catalog.pg_try_advisory_lock(bigint) rename to away";
    sqlx::raw_sql(away).execute(&mut database).await.unwrap();
    let task = app.task("early", json!({})).await;
    app.another_process().await;
    // Longer than it takes to look a few times.
    tokio::time::sleep(std::time::Duration::from_millis(1_200)).await;
    assert_eq!(app.upstream.asked().len(), 0);
    let back = "alter function pg_catalog.away(bigint) rename to pg_try_advisory_lock";
    sqlx::raw_sql(back).execute(&mut database).await.unwrap();
    app.until(&task, "done").await;
}

/// A paused mission with a task that waits for the end of the pause, and what its job is parked on.
async fn paused_mission(app: &TestApp) -> (String, String) {
    let tasks = json!(
        // Either may be the one that gets the place.
        ["hang", "hang too"]
            .map(|title| json!({"title": title, "description": title, "assignTo": "noor"}))
    );
    let mission = app.mission("m", json!({"tasks": tasks})).await;
    app.execute(&mission).await;
    eventually("one is at work", async || app.upstream.asked().len() == 1).await;
    parked(app, "noor", 1).await;
    let key = format!("mission:{}", mission.trim_start_matches("msn_"));
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "update production.missions set status = 'paused';
        update production.jobs set parked_on = '{key}' where parked_on = 'noor'"
    )))
    .execute(&mut database)
    .await
    .unwrap();
    (mission, key)
}

#[tokio::test]
async fn what_waits_for_a_paused_mission_is_found_when_nobody_wakes_it() {
    let app = start().await;
    let (_, key) = paused_mission(&app).await;
    // The server looks too, every ten seconds: what counts is where the job is, not whose look found it.
    let db = &app.app.db;
    db.wake_parked_jobs(World::Live).await.unwrap();
    parked(&app, &key, 1).await;
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    sqlx::raw_sql("update production.missions set status = 'active'")
        .execute(&mut database)
        .await
        .unwrap();
    db.wake_parked_jobs(World::Live).await.unwrap();
    parked(&app, &key, 0).await;
}

#[tokio::test]
async fn what_waits_for_a_paused_mission_is_woken_also_when_someone_had_hold_of_it() {
    let app = start().await;
    let (mission, key) = paused_mission(&app).await;
    let hold = format!("select from production.jobs where parked_on = '{key}' for update");
    let someone = Uncommitted::change(&app, &hold).await;
    let path = format!("/v1/missions/{mission}/resume");
    let resume = answer(app.post(&path, json!({})));
    let ((status, body), ()) = tokio::join!(resume, someone.end_when_it_is_waited_for());
    assert_eq!(status, 200, "{body}");
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let left: i64 = sqlx::query_scalar("select count(*) from production.jobs where parked_on = $1")
        .bind(&key)
        .fetch_one(&mut database)
        .await
        .unwrap();
    assert_eq!(left, 0);
}

/// A draft with a need that someone is queueing.
async fn being_queued(app: &TestApp, need: &str) -> (String, Uncommitted) {
    let draft = app
        .task("next", json!({"draft": true, "dependsOn": [need]}))
        .await;
    let queue = "update production.tasks set status = 'pending' where title = 'next'";
    (draft, Uncommitted::change(app, queue).await)
}

#[tokio::test]
async fn what_is_queued_while_its_need_ends_begins() {
    let app = start().await;
    app.upstream.answers(|_| {
        Reply::Slow(
            std::time::Duration::from_millis(200),
            said("It takes its time, so much of it that what follows can be put in place."),
        )
    });
    let need = app.task("need", json!({})).await;
    let (draft, change) = being_queued(&app, &need).await;
    assert_ne!(app.read(&need).await["status"], "done");
    change.end_when_it_is_waited_for().await;
    app.until(&draft, "done").await;
}

#[tokio::test]
async fn what_is_queued_while_its_need_is_removed_gets_a_verdict() {
    let app = start().await;
    let need = app.task("need", json!({"draft": true})).await;
    let (draft, change) = being_queued(&app, &need).await;
    let path = format!("/v1/tasks/{need}");
    let removal = answer(app.delete(&path));
    let ((status, body), ()) = tokio::join!(removal, change.end_when_it_is_waited_for());
    assert_eq!(status, 200, "{body}");
    let failed = app.until(&draft, "failed").await;
    let cause = failed["result"]["stderr"].as_str().unwrap();
    assert!(cause.contains("not there"), "{failed}");
}

/// Someone who has changed something, or taken hold of it, and has not committed yet.
struct Uncommitted {
    change: PgConnection,
    watch: PgConnection,
}

impl Uncommitted {
    async fn change(app: &TestApp, statement: &str) -> Self {
        let mut change = PgConnection::connect(&app.database_url).await.unwrap();
        let statement = sqlx::AssertSqlSafe(format!("begin; {statement}"));
        sqlx::raw_sql(statement).execute(&mut change).await.unwrap();
        let watch = PgConnection::connect(&app.database_url).await.unwrap();
        Self { change, watch }
    }

    async fn end_when_it_is_waited_for(mut self) {
        eventually("someone waits for it", async || {
            waiting(&mut self.watch).await > 0
        })
        .await;
        sqlx::raw_sql("commit")
            .execute(&mut self.change)
            .await
            .unwrap();
    }
}

/// In which order the tasks of an app began.
async fn begun(app: &TestApp) -> Vec<String> {
    let spawned = app.events("agent:spawned").await;
    let titles = spawned.iter().map(|(_, payload)| &payload["taskTitle"]);
    titles
        .map(|title| title.as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn who_waits_for_a_place_gets_it_by_priority_and_then_by_age() {
    for (whose, waits) in [
        ("agent", "for its end"),
        ("project", "for its end"),
        ("agent", "for it"),
        ("project", "for it"),
    ] {
        let app = TestApp::start_with(&[]).await;
        app.agent("noor").await;
        let limit = json!({"maxConcurrency": 1});
        match whose {
            "agent" => answer(app.patch("/v1/agents/noor", limit)).await,
            _ => answer(app.patch("/v1/config", limit)).await,
        };
        app.upstream.answers(move |request| {
            if last_text(request, "user").contains("first") {
                Reply::Slow(Duration::from_millis(1_000), said("Done."))
            } else {
                Reply::Stream(said("Done."))
            }
        });
        let first = app.task("first", json!({})).await;
        app.until(&first, "in_progress").await;
        let needs = match waits {
            // All become ready in one commit, and are claimed together.
            "for it" => json!([first]),
            _ => json!([]),
        };
        let mut tasks = Vec::new();
        for priority in [6, 1, 5, 2, 5, 4, 3] {
            let title = format!("t{} {priority}", tasks.len());
            let others = json!({"priority": priority, "dependsOn": needs});
            tasks.push(app.task(&title, others).await);
        }
        for task in &tasks {
            app.until(task, "done").await;
        }
        assert_eq!(
            begun(&app).await,
            [
                "first", "t0 6", "t2 5", "t4 5", "t5 4", "t6 3", "t3 2", "t1 1"
            ],
            "{whose}'s place, waiting {waits}"
        );
    }
}
