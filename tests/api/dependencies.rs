//! Tasks that need others (contract 2.6.4).

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::harness::{Reply, TestApp, answer, eventually, last_text, said};
use crate::tasks::{names, start};

#[tokio::test]
async fn a_diamond_of_tasks_runs_in_order_by_id_and_by_title() {
    let app = start().await;
    app.upstream
        .answers(|request| Reply::Stream(said(&last_text(request, "user"))));
    let top = app.task("top", json!({"draft": true})).await;
    let left = app.task("left", json!({"dependsOn": [top]})).await;
    let right = app.task("right", json!({"dependsOn": ["top"]})).await;
    let bottom = app
        .task("bottom", json!({"dependsOn": ["left", right]}))
        .await;
    assert_eq!(app.read(&left).await["status"], "pending");
    answer(app.post(&format!("/v1/tasks/{top}/queue"), json!({}))).await;
    app.until(&bottom, "done").await;
    let asked: Vec<String> = app
        .upstream
        .asked()
        .iter()
        .map(|request| last_text(request, "user"))
        .collect();
    assert_eq!(
        (asked[0].as_str(), asked[3].as_str()),
        ("Do top", "Do bottom")
    );
    assert_eq!(asked.len(), 4);
}

/// A task that has failed and may be tried again, and one that needs it and has just been handed over. The model must refuse `Do first`.
async fn failed_and_needed(app: &TestApp, others: Value) -> (String, String) {
    let mut first = json!({"draft": true, "maxRetries": 0});
    first
        .as_object_mut()
        .unwrap()
        .extend(others.as_object().unwrap().clone());
    let first = app.task("first", first).await;
    let second = json!({"dependsOn": [first], "draft": true});
    let second = app.task("second", second).await;
    answer(app.post(&format!("/v1/tasks/{first}/queue"), json!({}))).await;
    app.until(&first, "failed").await;
    let path = format!("/v1/tasks/{first}");
    // The model refuses nothing else, so that another attempt succeeds.
    let again = json!({"maxRetries": 1, "description": "Do first again"});
    answer(app.patch(&path, again)).await;
    answer(app.post(&format!("/v1/tasks/{second}/queue"), json!({}))).await;
    (first, second)
}

#[tokio::test]
async fn what_needs_a_failed_task_gets_a_verdict() {
    for (verdict, expected) in [
        (
            json!({"action": "absorb", "reason": "r", "description": "Do it alone"}).to_string(),
            "done",
        ),
        (
            json!({"action": "retry", "reason": "r", "description": ""}).to_string(),
            "done",
        ),
        (
            json!({"action": "fail", "reason": "no use", "description": ""}).to_string(),
            "failed",
        ),
        ("Hm.".to_owned(), "failed"),
    ] {
        let app = start().await;
        answer(app.patch("/v1/config", json!({"orchestratorModel": "openai:decider"}))).await;
        let given = verdict.clone();
        app.upstream.answers(move |request| {
            if request["model"] == "decider" {
                Reply::Stream(said(&given))
            } else if last_text(request, "user") == "Do first" {
                Reply::Plain(400, vec![], "{}".to_owned())
            } else {
                Reply::Stream(said("Done."))
            }
        });
        let (first, second) = failed_and_needed(&app, json!({})).await;
        let task = app.until(&second, expected).await;
        let told = names(&app, "deadlock:*").await;
        assert!(told.contains(&"deadlock:detected".to_owned()), "{told:?}");
        if verdict.contains("absorb") {
            assert_eq!(task["description"], "Do it alone");
            assert_eq!(task["dependsOn"], json!([]));
        }
        if verdict.contains("retry") {
            assert_eq!(app.read(&first).await["retries"], 1);
            assert_eq!(names(&app, "task:retry").await.len(), 1);
        }
        if expected == "failed" {
            assert!(
                told.contains(&"deadlock:unresolvable".to_owned()),
                "{told:?}"
            );
        }
    }
    // What it needs is gone.
    let app = start().await;
    let first = app.task("first", json!({"draft": true})).await;
    let second = app.task("second", json!({"dependsOn": ["first"]})).await;
    answer(app.delete(&format!("/v1/tasks/{first}"))).await;
    let failed = app.until(&second, "failed").await;
    assert!(
        failed["result"]["cause"]
            .as_str()
            .unwrap()
            .contains("not there"),
        "{failed}"
    );
}

#[tokio::test]
async fn a_need_that_cannot_be_tried_again_is_asked_about_once() {
    let app = start().await;
    answer(app.patch("/v1/config", json!({"orchestratorModel": "openai:decider"}))).await;
    let verdict = json!({"action": "retry", "reason": "r", "description": ""}).to_string();
    app.upstream.answers(move |request| {
        if request["model"] == "decider" {
            Reply::Slow(Duration::from_millis(400), said(&verdict))
        } else {
            Reply::Plain(400, vec![], "{}".to_owned())
        }
    });
    let (_, second) = failed_and_needed(&app, json!({})).await;
    let verdicts = || {
        let asked = app.upstream.asked();
        let verdicts = asked.iter().filter(|asked| asked["model"] == "decider");
        verdicts.count()
    };
    eventually("the orchestrator is asked", async || verdicts() == 1).await;
    // Its title is another's before it can come back.
    app.task("first", json!({"draft": true})).await;
    let failed = app.until(&second, "failed").await;
    assert!(
        failed["result"]["cause"]
            .as_str()
            .unwrap()
            .contains("cannot be tried again"),
        "{failed}"
    );
    assert_eq!(verdicts(), 1);
}

/// A server whose orchestrator gives this verdict about tasks that cannot begin, and whose agents stay at theirs.
async fn with_verdict(verdict: &'static str) -> TestApp {
    let app = start().await;
    answer(app.patch("/v1/config", json!({"orchestratorModel": "openai:decider"}))).await;
    app.upstream.answers(move |request| {
        if request["model"] == "decider" {
            let verdict = json!({"action": verdict, "reason": "r", "description": "Do it alone"});
            Reply::Stream(said(&verdict.to_string()))
        } else if last_text(request, "user") == "Do first" {
            Reply::Plain(400, vec![], "{}".to_owned())
        } else if last_text(request, "user").contains("stay") {
            Reply::Hang(vec![])
        } else {
            Reply::Stream(said("Done."))
        }
    });
    app
}

#[tokio::test]
async fn a_task_that_is_failed_by_hand_while_it_runs_leaves_nobody_waiting() {
    let app = with_verdict("absorb").await;
    let first = app.task("stay", json!({})).await;
    let second = app.task("second", json!({"dependsOn": [first]})).await;
    app.until(&first, "in_progress").await;
    let failed = app.patch(&format!("/v1/tasks/{first}"), json!({"status": "failed"}));
    assert_eq!(answer(failed).await.0, 200);
    app.until(&second, "done").await;
}

#[tokio::test]
async fn a_need_in_a_mission_that_is_over_cannot_be_tried_again() {
    let app = with_verdict("retry").await;
    let tasks = json!([{"title": "stay", "description": "stay", "assignTo": "noor"}]);
    let mission = app.mission("over", json!({"tasks": tasks})).await;
    assert_eq!(app.execute(&mission).await.0, 200);
    let inside = answer(app.get(&format!("/v1/tasks?group={mission}")))
        .await
        .1;
    let outside = app
        .task("outside", json!({"dependsOn": [inside[0]["id"]]}))
        .await;
    answer(app.post(&format!("/v1/missions/{mission}/abort"), json!({}))).await;
    let failed = app.until(&outside, "failed").await;
    let cause = failed["result"]["cause"].as_str().unwrap();
    assert!(cause.contains("cannot be tried again"), "{cause}");
    let asked = app.upstream.asked();
    let verdicts = asked.iter().filter(|asked| asked["model"] == "decider");
    assert_eq!(verdicts.count(), 1);
}

#[tokio::test]
async fn a_need_is_tried_again_whatever_tasks_of_missions_are_called() {
    let app = with_verdict("retry").await;
    let tasks = json!([{"title": "first", "description": "stay", "assignTo": "noor"}]);
    let mission = app.mission("alike", json!({"tasks": tasks})).await;
    assert_eq!(app.execute(&mission).await.0, 200);
    let (_, second) = failed_and_needed(&app, json!({})).await;
    app.until(&second, "done").await;
}

#[tokio::test]
async fn what_people_stopped_or_what_touches_the_world_is_not_tried_again_for_others() {
    // One that was killed.
    let app = with_verdict("retry").await;
    let first = app.task("stay", json!({})).await;
    let second = app.task("second", json!({"dependsOn": [first]})).await;
    app.until(&first, "in_progress").await;
    answer(app.post(&format!("/v1/tasks/{first}/kill"), json!({}))).await;
    app.until(&second, "failed").await;
    assert_eq!(app.read(&first).await["retries"], 0);
    // One that acts on the outside world, and whose gate nobody opened.
    let app = with_verdict("retry").await;
    let gate = json!({"id": "g", "name": "G", "handler": "human", "hook": "task:complete", "timeoutMs": 1});
    answer(app.patch("/v1/config", json!({"approvalGates": [gate]}))).await;
    let touches = json!({"sideEffects": true, "description": "Act"});
    let (first, second) = failed_and_needed(&app, touches).await;
    app.until(&second, "failed").await;
    assert_eq!(app.read(&first).await["retries"], 0);
    let asked = app.upstream.asked();
    let acted = asked
        .iter()
        .filter(|asked| last_text(asked, "user") == "Act");
    assert_eq!(acted.count(), 1);
}

#[tokio::test]
async fn a_gate_before_retries_stands_before_those_for_others_too() {
    let app = with_verdict("retry").await;
    let gate = json!({"id": "g", "name": "G", "handler": "human", "hook": "task:retry"});
    answer(app.patch("/v1/config", json!({"approvalGates": [gate]}))).await;
    let soon = chrono::Utc::now() + chrono::TimeDelta::hours(1);
    let (first, second) = failed_and_needed(&app, json!({"deadline": soon})).await;
    app.until(&first, "awaiting_approval").await;
    assert_eq!(app.owed("deadline").await, 1);
    let path = "/v1/approvals?status=pending";
    let request = answer(app.get(path)).await.1[0].clone();
    assert_eq!(
        (&request["gateId"], &request["taskId"]),
        (&json!("g"), &json!(first))
    );
    let path = format!("/v1/approvals/{}/approve", request["id"].as_str().unwrap());
    assert_eq!(answer(app.post(&path, json!({}))).await.0, 200);
    app.until(&second, "done").await;
    assert_eq!(app.read(&first).await["retries"], 1);
}

#[tokio::test]
async fn nobody_judges_a_task_that_is_paused() {
    let app = with_verdict("absorb").await;
    let first = app.task("stay", json!({})).await;
    let second = app.task("second", json!({"dependsOn": [first]})).await;
    answer(app.post(&format!("/v1/tasks/{second}/pause"), json!({}))).await;
    answer(app.post(&format!("/v1/tasks/{first}/kill"), json!({}))).await;
    eventually("it is looked at", async || app.owed("blocked").await == 0).await;
    assert_eq!(app.read(&second).await["status"], "pending");
    answer(app.post(&format!("/v1/tasks/{second}/run"), json!({}))).await;
    app.until(&second, "done").await;
}

#[tokio::test]
async fn of_two_failed_needs_both_are_tried_again_or_none() {
    for (first_retries, expected) in [(0, "failed"), (1, "done")] {
        let app = with_verdict("retry").await;
        let mut needs = Vec::new();
        for title in ["one", "two"] {
            let task = json!({"description": "Do first", "maxRetries": 0});
            let id = app.task(title, task).await;
            app.until(&id, "failed").await;
            needs.push(id);
        }
        for (id, retries) in needs.iter().zip([first_retries, 1]) {
            let path = format!("/v1/tasks/{id}");
            let again = json!({"maxRetries": retries, "description": "Do it again"});
            answer(app.patch(&path, again)).await;
        }
        let id = app.task("third", json!({"dependsOn": needs})).await;
        app.until(&id, expected).await;
        let second = app.read(&needs[1]).await;
        assert_eq!(second["retries"], first_retries, "{second}");
    }
}

#[tokio::test]
async fn a_need_that_is_done_leaves_nobody_waiting_for_one_that_has_failed() {
    let app = with_verdict("fail").await;
    let failed = app
        .task(
            "failed",
            json!({"description": "Do first", "maxRetries": 0}),
        )
        .await;
    app.until(&failed, "failed").await;
    let other = app.task("other", json!({"draft": true})).await;
    let id = app
        .task("third", json!({"dependsOn": [failed, other]}))
        .await;
    app.until(&id, "failed").await;
    // As if the verdict had been lost, or had let only one of two failed needs go on.
    app.sql(format!(
        "update production.tasks set status = 'pending' where id = '{}'",
        uuid::Uuid::parse_str(id.trim_start_matches("task_")).unwrap()
    ))
    .await;
    answer(app.post(&format!("/v1/tasks/{other}/queue"), json!({}))).await;
    app.until(&other, "done").await;
    app.until(&id, "failed").await;
}

#[tokio::test]
async fn many_verdicts_on_what_needs_one_task_are_all_recorded() {
    const MANY: usize = 12;
    let app = with_verdict("fail").await;
    let first = app
        .task("first", json!({"draft": true, "maxRetries": 0}))
        .await;
    let mut others = Vec::new();
    for number in 0..MANY {
        let needs = json!({"dependsOn": [first]});
        others.push(app.task(&format!("other {number}"), needs).await);
    }
    answer(app.post(&format!("/v1/tasks/{first}/queue"), json!({}))).await;
    for id in others {
        app.until(&id, "failed").await;
    }
    let asked = app.upstream.asked();
    let verdicts = asked.iter().filter(|asked| asked["model"] == "decider");
    assert_eq!(verdicts.count(), MANY);
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let recorded: i64 =
        sqlx::query_scalar("select count(*) from production.model_calls where number < 0")
            .fetch_one(&mut database)
            .await
            .unwrap();
    assert_eq!(usize::try_from(recorded), Ok(MANY));
}

#[tokio::test]
async fn two_failed_needs_of_one_title_are_not_tried_again_together() {
    let app = with_verdict("retry").await;
    let mut needs = Vec::new();
    for _ in 0..2 {
        let task = json!({"description": "Do first", "maxRetries": 0});
        let id = app.task("build", task).await;
        app.until(&id, "failed").await;
        needs.push(id);
    }
    for id in &needs {
        let path = format!("/v1/tasks/{id}");
        answer(app.patch(&path, json!({"maxRetries": 1}))).await;
    }
    let id = app.task("third", json!({"dependsOn": needs})).await;
    let failed = app.until(&id, "failed").await;
    let cause = failed["result"]["cause"].as_str().unwrap();
    assert!(cause.contains("cannot be tried again"), "{cause}");
    let asked = app.upstream.asked();
    let verdicts: Vec<&Value> = asked
        .iter()
        .filter(|asked| asked["model"] == "decider")
        .collect();
    assert_eq!(verdicts.len(), 1);
    // Whoever decides reads of both.
    assert_eq!(
        last_text(verdicts[0], "user").matches("<failed>").count(),
        2
    );
}

#[tokio::test]
async fn without_an_orchestrator_the_model_of_the_tasks_agent_gives_the_verdict() {
    let app = start().await;
    app.upstream.answers(|request| {
        if last_text(request, "system").starts_with("A task waits for others") {
            let verdict = json!({"action": "absorb", "reason": "r", "description": "Do it alone"});
            Reply::Stream(said(&verdict.to_string()))
        } else if last_text(request, "user") == "Do first" {
            Reply::Plain(400, vec![], "{}".to_owned())
        } else {
            Reply::Stream(said("Done."))
        }
    });
    let (_, second) = failed_and_needed(&app, json!({})).await;
    let task = app.until(&second, "done").await;
    assert_eq!(task["description"], "Do it alone");
    let asked = app.upstream.asked();
    let verdict = asked
        .iter()
        .find(|request| last_text(request, "system").starts_with("A task waits for others"));
    assert_eq!(verdict.unwrap()["model"], "scripted");
}

#[tokio::test]
async fn a_need_whose_provider_failed_is_tried_again_as_it_was_told() {
    let app = with_verdict("retry").await;
    let (first, second) = failed_and_needed(&app, json!({})).await;
    app.until(&second, "done").await;
    assert_eq!(app.read(&first).await["retries"], 1);
    let asked = app.upstream.asked();
    let told: Vec<String> = asked
        .iter()
        .map(|request| last_text(request, "user"))
        .filter(|told| told.starts_with("Do first"))
        .collect();
    assert_eq!(told, ["Do first", "Do first again"]);
}
