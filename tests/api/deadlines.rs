//! Deadlines of tasks (contract 2.6.4, SLA).

use std::time::Duration;

use serde_json::json;
use sqlx::{Connection, PgConnection};

use crate::approvals::{gate, with_gates};
use crate::harness::{Reply, TestApp, answer, eventually};
use crate::tasks::{names, start};

#[tokio::test]
async fn a_deadline_warns_is_violated_and_is_met() {
    let app = start().await;
    let soon = || (chrono::Utc::now() + Duration::from_millis(600)).to_rfc3339();
    app.upstream.will(Reply::Hang(vec![]));
    let late = app
        .task("late", json!({"deadline": soon(), "maxRetries": 0}))
        .await;
    eventually("it is violated", async || {
        names(&app, "sla:*").await == ["sla:warning", "sla:violated"]
    })
    .await;
    assert_eq!(app.read(&late).await["status"], "in_progress");
    let (_, told) = app.events("sla:violated").await.pop().unwrap();
    assert_eq!(
        (&told["entityId"], &told["entityType"]),
        (&json!(late), &json!("task"))
    );
    answer(app.post(&format!("/v1/tasks/{late}/kill"), json!({}))).await;

    answer(app.patch("/v1/config", json!({"violationAction": "fail"}))).await;
    app.upstream.will(Reply::Hang(vec![]));
    let failing = app.task("failing", json!({"deadline": soon()})).await;
    assert_eq!(
        app.until(&failing, "failed").await["result"]["reason"],
        "deadline"
    );

    app.upstream.will_say("In time.");
    let met = app
        .task("met", json!({"deadline": "2099-01-01T00:00:00Z"}))
        .await;
    app.until(&met, "done").await;
    assert_eq!(names(&app, "sla:met").await.len(), 1);
}

#[tokio::test]
async fn a_failed_task_that_is_put_back_has_its_deadline_watched_again() {
    let app = start().await;
    app.upstream
        .will(Reply::Plain(400, vec![], "{}".to_owned()));
    let id = app
        .task(
            "t",
            json!({"maxRetries": 0, "deadline": "2099-01-01T00:00:00Z"}),
        )
        .await;
    app.until(&id, "failed").await;
    app.upstream.will(Reply::Hang(vec![]));
    let path = format!("/v1/tasks/{id}");
    let (status, body) = answer(app.patch(&path, json!({"status": "pending"}))).await;
    assert_eq!(status, 200, "{body}");
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let timers: i64 =
        sqlx::query_scalar("select count(*) from production.jobs where kind = 'deadline'")
            .fetch_one(&mut database)
            .await
            .unwrap();
    assert_eq!(timers, 1);
}

/// Lets the deadlines of all tasks have passed.
async fn pass(app: &TestApp) {
    app.sql(
        "update production.tasks set document = jsonb_set(document, '{deadline}', to_jsonb(now() - interval '1 second'));
        update production.jobs set due_at = clock_timestamp(), ready = false where kind = 'deadline'"
            .to_owned(),
    )
    .await;
}

#[tokio::test]
async fn nobody_is_asked_about_an_overdue_draft() {
    let app = with_gates(json!([gate("quality:sla", json!({}))])).await;
    let late = json!({"draft": true, "deadline": "2099-01-01T00:00:00Z"});
    let id = app.task("draft", late).await;
    pass(&app).await;
    eventually("it is overdue", async || {
        !app.events("sla:violated").await.is_empty()
    })
    .await;
    assert_eq!(app.read(&id).await["status"], "draft");
    let requests = answer(app.get("/v1/approvals")).await.1;
    assert_eq!(requests, json!([]));
}

#[tokio::test]
async fn what_is_due_does_not_wait_for_what_someone_has_hold_of() {
    let app = start().await;
    for title in ["held", "other"] {
        let late = json!({"draft": true, "deadline": "2099-01-01T00:00:00Z"});
        app.task(title, late).await;
    }
    // Both come due at once.
    app.sql(
        "update production.tasks set document = jsonb_set(document, '{deadline}', to_jsonb(now()));
        update production.jobs set due_at = clock_timestamp() + interval '1.5 s' where kind = 'deadline'"
            .to_owned(),
    )
    .await;
    let mut someone = PgConnection::connect(&app.database_url).await.unwrap();
    sqlx::raw_sql(
        "begin;
        select from production.jobs j join production.tasks t on t.id = j.subject
        where t.title = 'held' and j.kind = 'deadline' for update of j",
    )
    .execute(&mut someone)
    .await
    .unwrap();
    let overdue = async || app.events("sla:violated").await.len();
    eventually("the other is overdue", async || overdue().await == 1).await;
    sqlx::raw_sql("commit").execute(&mut someone).await.unwrap();
    eventually("both are", async || overdue().await == 2).await;
}
