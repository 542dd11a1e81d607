//! A run's steps: each on record before something happens that could be noticed.

use std::collections::HashMap;
use std::time::Duration;

use polpo::event::Event;
use polpo::store::{CallUsage, Holder, Lane, Lease, NewStep, Room, StepKind, StoreError, World};
use reqwest::Method;
use serde_json::json;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::harness::{
    Reply, TestApp, answer, called, done_elsewhere, eventually, last_text, results, said, waiting,
};

/// The steps of the only run, in order: the words for what each is, gathered by the commit that recorded them.
async fn commits(app: &TestApp) -> Vec<Vec<String>> {
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let steps: Vec<(String, String)> = sqlx::query_as(
        "select xmin::text, coalesce(body ->> 'name', kind) from production.steps order by number",
    )
    .fetch_all(&mut database)
    .await
    .unwrap();
    steps
        .chunk_by(|one, next| one.0 == next.0)
        .map(|commit| commit.iter().map(|(_, word)| word.clone()).collect())
        .collect()
}

#[tokio::test]
async fn what_is_at_hand_is_recorded_with_what_asks_for_it_and_all_else_before_it_begins() {
    let app = TestApp::start_with(&[]).await;
    app.agent("noor").await;
    let outcome = r#"{"type":"text","label":"Notes","text":"abc"}"#;
    app.upstream.will(Reply::Stream(called(&[
        ("c1", "register_outcome", &[outcome]),
        ("c2", "memory_save", &[r#"{"content":"seen"}"#]),
        ("c3", "not_a_tool", &["{}"]),
        ("c4", "memory_append", &[r#"{"content":"twice"}"#]),
    ])));
    app.upstream.will_say("Done.");
    let id = app.task("tools", json!({})).await;
    let task = app.until(&id, "done").await;
    assert_eq!(task["outcomes"][0]["text"], "abc");
    assert_eq!(
        commits(&app).await,
        [
            vec!["model", "register_outcome"],
            vec!["memory_save", "not_a_tool"],
            vec!["memory_append"],
            vec!["model"],
        ]
    );
    let told = app.events("agent:activity").await;
    let tools: Vec<&str> = told
        .iter()
        .map(|(_, payload)| payload["tool"].as_str().unwrap())
        .collect();
    assert_eq!(
        tools,
        [
            "register_outcome",
            "memory_save",
            "not_a_tool",
            "memory_append"
        ]
    );
}

#[tokio::test]
async fn a_memory_is_at_hand_while_a_process_knows_that_nobody_else_changes_it() {
    let app = TestApp::start_with(&[]).await;
    app.agent("noor").await;
    app.upstream.answers(|request| match results(request) {
        0 => Reply::Stream(called(&[("c1", "memory_get", &["{}"])])),
        _ => Reply::Stream(said("Done.")),
    });
    let together = async |title: &str| {
        let id = app.task(title, json!({})).await;
        app.until(&id, "done").await;
        let together = commits(&app).await[0].len() == 2;
        answer(app.delete(&format!("/v1/tasks/{id}"))).await;
        together
    };
    eventually("it knows that it is alone", async || {
        together("alone").await
    })
    .await;
    app.another_process().await;
    eventually("each knows of the other", async || {
        !together("with another").await
    })
    .await;
}

/// Records a step for each of some jobs at once, with two events each, and says how each went, by its task.
async fn record_at_once(leases: &[Lease], number: i32) -> HashMap<Uuid, Result<(), StoreError>> {
    let body = json!({"message": {"role": "assistant", "content": "x"}});
    let usage = CallUsage {
        model: "m".to_owned(),
        prompt_tokens: 1,
        completion_tokens: 2,
        cached_tokens: 0,
        reasoning_tokens: 0,
        estimated: false,
    };
    let recorded = leases.iter().map(async |lease| {
        let step = NewStep {
            number,
            kind: StepKind::Model,
            body: body.clone(),
            usage: Some(usage.clone()),
            under_way: Some("c".to_owned()),
        };
        let task = lease.job.subject();
        let told = [1, 2].map(|of_step| {
            Event::new(
                "agent:activity",
                json!({"task": task, "step": number, "number": of_step}),
            )
        });
        let db = &lease.db;
        let recorded = db
            .record_steps(lease, task.into(), &[step], told.into())
            .await;
        (task, recorded)
    });
    futures::future::join_all(recorded)
        .await
        .into_iter()
        .collect()
}

#[tokio::test]
async fn steps_that_come_together_are_recorded_once_each_and_told_in_a_piece() {
    let app = TestApp::start_with(&["--role-of-test", "api"]).await;
    app.agent("noor").await;
    for number in 0..12 {
        app.task(&format!("t{number}"), json!({})).await;
    }
    let db = &app.app.db;
    let room = Room::of(12);
    let claimed = db.claim(
        World::Live,
        Lane::Engine,
        Holder::new(1),
        Uuid::nil(),
        &room,
    );
    let leases = claimed.await.unwrap().leases;
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    sqlx::raw_sql(
        "insert into production.runs (project_id, id, task_id, agent_id, status, started_at)
        select t.project_id, t.id, t.id, a.id, 'running', now() from production.tasks t, production.agents a",
    )
    .execute(&mut database)
    .await
    .unwrap();
    let mut counted = async || -> (i64, i64) {
        sqlx::query_as(
            "select count(*), (select count(*) from production.model_calls) from production.steps",
        )
        .fetch_one(&mut database)
        .await
        .unwrap()
    };
    let recorded = record_at_once(&leases, 0).await;
    assert!(recorded.values().all(Result::is_ok), "{recorded:?}");
    assert_eq!(counted().await, (12, 12));

    // A step that is there already, and a job that is someone else's, are no fault of the others.
    record_at_once(&leases[..1], 1).await;
    let (there, lost) = (leases[0].job.subject(), leases[1].job.subject());
    let mut tx = leases[1].db.begin();
    tx.call_off(leases[1].job).await.unwrap();
    tx.commit().await.unwrap();
    for (task, recorded) in record_at_once(&leases, 1).await {
        if task == there {
            let error = recorded.unwrap_err();
            assert!(error.is_recorded_step(), "{error:?}");
        } else if task == lost {
            assert!(
                matches!(recorded, Err(StoreError::LeaseLost)),
                "{recorded:?}"
            );
        } else {
            recorded.unwrap();
        }
    }
    assert_eq!(counted().await, (23, 23));
    let told = app.events("agent:activity").await;
    assert_eq!(told.len(), 46);
    // What one step tells stays together.
    for pair in told.chunks(2) {
        let (first, second) = (&pair[0].1, &pair[1].1);
        assert_eq!(
            (&first["task"], &first["step"]),
            (&second["task"], &second["step"])
        );
        assert_eq!(
            (&first["number"], &second["number"]),
            (&json!(1), &json!(2))
        );
    }
}

#[tokio::test]
async fn many_steps_of_a_project_get_by_with_few_connections() {
    // Whoever waits for a connection waits for long, so that two that wait for each other are not told apart by time.
    let app =
        TestApp::start_with(&["--world-connections", "3", "--acquire-timeout-ms", "120000"]).await;
    app.agent("noor").await;
    app.upstream.answers(|request| {
        let number = results(request);
        Reply::Stream(if number < 6 {
            called(&[(&format!("call_{number}"), "memory_get", &["{}"])])
        } else {
            said("Done.")
        })
    });
    let mut tasks = Vec::new();
    for number in 0..16 {
        tasks.push(app.task(&format!("task {number}"), json!({})).await);
    }
    for task in tasks {
        app.until(&task, "done").await;
    }
}

#[tokio::test]
async fn a_call_that_had_not_begun_when_the_server_stopped_is_not_in_doubt() {
    let app = TestApp::start_with(&["--retry-backoff-ms", "1"]).await;
    app.agent("noor").await;
    let arguments = r#"{"content":"once"}"#;
    app.upstream.will(Reply::Slow(
        Duration::from_millis(300),
        called(&[("c1", "memory_append", &[arguments])]),
    ));
    app.upstream.will_say("Done.");
    let id = app.task("t", json!({})).await;
    eventually("it is at work", async || app.upstream.asked().len() == 1).await;
    app.stop.cancel();
    let elsewhere = app.another_process().await;
    done_elsewhere(&app, &elsewhere, &id).await;
    let memory = app
        .client
        .get(format!("{elsewhere}/v1/memory/agent/noor"))
        .bearer_auth(&app.live);
    let memory = answer(memory).await.1["content"].clone();
    assert_eq!(memory.as_str().unwrap().matches("once").count(), 1);
    let asked = app.upstream.asked();
    assert_eq!(asked.len(), 2);
    assert!(!last_text(&asked[1], "tool").contains("Interrupted"));
}

#[tokio::test]
async fn a_call_that_begins_after_a_hand_over_is_in_doubt_again() {
    let app = TestApp::start_with(&["--retry-backoff-ms", "1"]).await;
    app.agent("noor").await;
    let memory = app
        .request(Method::PUT, "/v1/memory/agent/noor")
        .json(&json!({"content": "before"}));
    assert_eq!(answer(memory).await.0, 200);
    app.upstream.will(Reply::Slow(
        Duration::from_millis(300),
        called(&[("c1", "memory_append", &[r#"{"content":"once"}"#])]),
    ));
    app.upstream.will_say("Done.");
    let id = app.task("t", json!({})).await;
    eventually("it is at work", async || app.upstream.asked().len() == 1).await;
    let described = app.patch(&format!("/v1/tasks/{id}"), json!({"description": "Else"}));
    assert_eq!(answer(described).await.0, 200);
    app.stop.cancel();
    let mut someone = PgConnection::connect(&app.database_url).await.unwrap();
    sqlx::raw_sql("begin; select from production.memories for update")
        .execute(&mut someone)
        .await
        .unwrap();
    let elsewhere = app.another_process().await;
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    eventually("the call is begun and waits", async || {
        waiting(&mut database).await == 1
    })
    .await;
    let under_way: Option<String> =
        sqlx::query_scalar("select under_way from production.steps where number = 0")
            .fetch_one(&mut database)
            .await
            .unwrap();
    assert_eq!(under_way.as_deref(), Some("c1"));
    sqlx::raw_sql("commit").execute(&mut someone).await.unwrap();
    done_elsewhere(&app, &elsewhere, &id).await;
    // The run is told what it was told in the beginning.
    let asked = app.upstream.asked();
    assert_eq!(last_text(&asked[1], "user"), "Do t");
}
