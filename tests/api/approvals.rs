//! Where people must say yes (contract 2.11).

use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::assessments::{is_review, scored};
use crate::harness::{Reply, TestApp, answer, eventually, last_text, said};

/// A server whose project has these gates, and whose model repeats what it is asked.
pub(crate) async fn with_gates(gates: Value) -> TestApp {
    let app = TestApp::start_with(&["--retry-backoff-ms", "1"]).await;
    app.agent("noor").await;
    app.upstream.answers(|request| {
        if is_review(request) {
            scored(request, 5.0)
        } else if last_text(request, "user").contains("break") {
            Reply::Plain(400, vec![], "{}".to_owned())
        } else {
            Reply::Stream(said(&format!("I did: {}", last_text(request, "user"))))
        }
    });
    let (status, body) = answer(app.patch("/v1/config", json!({"approvalGates": gates}))).await;
    assert_eq!(status, 200, "{body}");
    app
}

pub(crate) fn gate(hook: &str, others: Value) -> Value {
    let mut gate =
        json!({"id": hook, "name": format!("Gate {hook}"), "handler": "human", "hook": hook});
    gate.as_object_mut()
        .unwrap()
        .extend(others.as_object().unwrap().clone());
    gate
}

/// The request that a task waits for.
async fn waiting(app: &TestApp, task: &str) -> Value {
    app.until(task, "awaiting_approval").await;
    answer(app.get(&format!("/v1/approvals?taskId={task}&status=pending")))
        .await
        .1[0]
        .clone()
}

pub(crate) async fn decide(
    app: &TestApp,
    request: &Value,
    deed: &str,
    body: Value,
) -> (u16, Value) {
    let path = format!("/v1/approvals/{}/{deed}", request["id"].as_str().unwrap());
    let (status, body) = answer(app.post(&path, body)).await;
    (status.as_u16(), body)
}

#[tokio::test]
async fn a_gate_at_every_hook_stops_a_task_until_someone_says_yes() {
    for (hook, title) in [
        ("task:create", "work"),
        ("task:spawn", "work"),
        ("task:assign", "work"),
        ("task:transition", "work"),
        ("task:complete", "work"),
        ("task:retry", "break"),
        ("task:fail", "break"),
        ("assessment:run", "work"),
        ("assessment:complete", "work"),
    ] {
        let app = with_gates(json!([gate(hook, json!({}))])).await;
        let retries = i32::from(hook == "task:retry");
        let id = app.task(
                title,
                json!({"maxRetries": retries, "expectations": [{"type": "llm_review", "criteria": "Is it good?"}]}),
            ).await;
        let request = waiting(&app, &id).await;
        assert_eq!(
            (&request["gateId"], &request["taskId"]),
            (&json!(hook), &json!(id)),
            "{hook}"
        );
        assert!(
            request["id"].as_str().unwrap().starts_with("apr_")
                && request["requestedAt"].is_string()
        );
        if title == "break" {
            // What failed gets another attempt with the yes.
            app.upstream.answers(|request| {
                if is_review(request) {
                    scored(request, 5.0)
                } else {
                    Reply::Stream(said("Fine now."))
                }
            });
        }
        let (status, approved) = decide(
            &app,
            &request,
            "approve",
            json!({"resolvedBy": "mina", "note": "ok"}),
        )
        .await;
        assert_eq!(status, 200, "{approved}");
        assert_eq!(
            (
                &approved["status"],
                &approved["resolvedBy"],
                &approved["note"]
            ),
            (&json!("approved"), &json!("mina"), &json!("ok"))
        );
        app.until(&id, "done").await;
        let told: Vec<String> = app
            .events("approval:*")
            .await
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(told, ["approval:requested", "approval:resolved"], "{hook}");
        let (status, body) = decide(&app, &request, "approve", json!({})).await;
        assert_eq!((status, &body["code"]), (409, &json!("conflict")));
    }
}

#[tokio::test]
async fn work_whose_judgement_was_held_up_is_not_done_again() {
    let app = with_gates(json!([gate("assessment:run", json!({}))])).await;
    let expectations = json!([{"type": "llm_review", "criteria": "Is it good?"}]);
    let id = app
        .task("work", json!({"expectations": expectations}))
        .await;
    let request = waiting(&app, &id).await;
    decide(&app, &request, "approve", json!({})).await;
    app.until(&id, "done").await;
    let runs = app
        .upstream
        .asked()
        .into_iter()
        .filter(|request| !is_review(request));
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn a_condition_decides_and_an_automatic_gate_needs_one() {
    let heavy =
        json!({"condition": {"expression": "task.priority > 4.0 && task.title.startsWith('h')"}});
    let app = with_gates(json!([
        gate("task:spawn", heavy),
        gate("task:complete", json!({"handler": "auto"})),
    ]))
    .await;
    let light = app.task("light", json!({"priority": 9})).await;
    app.until(&light, "done").await;
    let id = app.task("heavy", json!({"priority": 9})).await;
    waiting(&app, &id).await;
    assert_eq!(
        answer(app.get("/v1/approvals?status=approved")).await.1,
        json!([])
    );
    assert_eq!(answer(app.get("/v1/approvals?status=perhaps")).await.0, 400);
}

#[tokio::test]
async fn a_rejection_sends_the_task_back_with_feedback_as_often_as_the_gate_allows() {
    let app = with_gates(json!([gate(
        "task:complete",
        json!({"maxRevisions": 1, "includeOutcomes": true})
    )]))
    .await;
    let id = app.task("work", json!({})).await;
    let request = waiting(&app, &id).await;
    for body in [json!({}), json!({"feedback": " "})] {
        assert_eq!(decide(&app, &request, "reject", body).await.0, 400);
    }
    let (status, rejected) = decide(
        &app,
        &request,
        "reject",
        json!({"feedback": "Shorter, please"}),
    )
    .await;
    assert_eq!(status, 200, "{rejected}");
    assert_eq!(
        (
            &rejected["status"],
            &rejected["note"],
            &rejected["resolvedBy"]
        ),
        (
            &json!("rejected"),
            &json!("Shorter, please"),
            &json!("user")
        )
    );
    eventually("it was done again", async || {
        app.read(&id).await["result"]["stdout"]
            .as_str()
            .unwrap_or_default()
            .contains("Shorter, please")
    })
    .await;
    let again = waiting(&app, &id).await;
    let task = app.read(&id).await;
    assert_eq!(
        (
            &task["revisionCount"],
            &task["originalDescription"],
            &task["retries"]
        ),
        (&json!(1), &json!("Do work"), &json!(0))
    );
    let (status, body) = decide(&app, &again, "revise", json!({"feedback": "Once more"})).await;
    assert_eq!((status, &body["code"]), (409, &json!("conflict")));
    assert_eq!(app.events("approval:rejected").await.len(), 1);
    assert_eq!(decide(&app, &again, "approve", json!({})).await.0, 200);
    app.until(&id, "done").await;
}

#[tokio::test]
async fn nobody_answering_counts_as_the_gate_says() {
    for (action, hook, end) in [
        ("approve", "task:spawn", "done"),
        ("approve", "task:complete", "done"),
        ("reject", "task:complete", "failed"),
    ] {
        let app = with_gates(json!([gate(
            hook,
            json!({"timeoutMs": 100, "timeoutAction": action})
        )]))
        .await;
        let id = app.task("work", json!({})).await;
        app.until(&id, end).await;
        let request = answer(app.get(&format!("/v1/approvals?taskId={id}")))
            .await
            .1[0]
            .clone();
        assert_eq!(
            (&request["status"], &request["resolvedBy"]),
            (&json!("timeout"), &json!("timeout")),
            "{action}"
        );
        let (_, told) = app.events("approval:timeout").await.pop().unwrap();
        assert_eq!(
            (&told["action"], &told["requestId"]),
            (&json!(action), &request["id"])
        );
    }
}

#[tokio::test]
async fn gates_stand_one_behind_the_other_in_their_order() {
    let app = with_gates(json!([
        {"id": "late", "name": "L", "handler": "human", "hook": "task:spawn"},
        {"id": "early", "name": "E", "handler": "human", "hook": "task:spawn", "priority": 1},
    ]))
    .await;
    let id = app.task("work", json!({})).await;
    for expected in ["early", "late"] {
        let mut request = Value::Null;
        eventually("someone is asked", async || {
            request = waiting(&app, &id).await;
            request["gateId"] == expected
        })
        .await;
        decide(&app, &request, "approve", json!({})).await;
    }
    app.until(&id, "done").await;
}

#[tokio::test]
async fn a_killed_task_waits_for_nobody() {
    let app = with_gates(json!([gate("task:spawn", json!({}))])).await;
    let id = app.task("work", json!({})).await;
    let request = waiting(&app, &id).await;
    answer(app.post(&format!("/v1/tasks/{id}/kill"), json!({}))).await;
    assert_eq!(decide(&app, &request, "approve", json!({})).await.0, 409);
    assert_eq!(app.read(&id).await["status"], "failed");
    let (_, told) = app.events("approval:resolved").await.pop().unwrap();
    assert_eq!(
        (&told["requestId"], &told["resolvedBy"]),
        (&request["id"], &json!("engine"))
    );
    for deed in ["approve", "reject"] {
        let path = format!("/v1/approvals/apr_01a20e9a7fa5709989a9da919772fa8a/{deed}");
        assert_eq!(
            answer(app.post(&path, json!({"feedback": "f"}))).await.0,
            404
        );
    }
}

#[tokio::test]
async fn a_draft_meets_the_gate_before_its_creation_however_it_is_submitted() {
    let app = with_gates(json!([gate("task:create", json!({}))])).await;
    for (number, deed) in ["queue", "run", "patch"].into_iter().enumerate() {
        let id = app
            .task(&format!("work {number}"), json!({"draft": true}))
            .await;
        assert_eq!(app.read(&id).await["status"], "draft");
        let (status, body) = if deed == "patch" {
            answer(app.patch(&format!("/v1/tasks/{id}"), json!({"status": "pending"}))).await
        } else {
            answer(app.post(&format!("/v1/tasks/{id}/{deed}"), json!({}))).await
        };
        assert_eq!(status, 200, "{deed}: {body}");
        assert_eq!(app.read(&id).await["status"], "awaiting_approval", "{deed}");
        assert!(app.upstream.asked().len() == number, "{deed}");
        let request = waiting(&app, &id).await;
        decide(&app, &request, "approve", json!({})).await;
        app.until(&id, "done").await;
    }
}

#[tokio::test]
async fn an_approved_retry_is_counted_told_and_handed_over_like_any() {
    let app = with_gates(json!([gate("task:retry", json!({}))])).await;
    app.agent("boss").await;
    let policy = json!({"escalateAfter": 1, "fallbackAgent": "boss"});
    let id = app
        .task("break", json!({"maxRetries": 1, "retryPolicy": policy}))
        .await;
    let request = waiting(&app, &id).await;
    assert_eq!(decide(&app, &request, "approve", json!({})).await.0, 200);
    let task = app.until(&id, "failed").await;
    assert_eq!(
        (&task["retries"], &task["assignTo"]),
        (&json!(1), &json!("boss"))
    );
    assert_eq!(app.events("task:retry").await.len(), 1);
}

#[tokio::test]
async fn a_request_that_nobody_answers_fails_the_task_and_its_result_says_so() {
    for hook in ["task:spawn", "task:complete"] {
        let app = with_gates(json!([gate(hook, json!({"timeoutMs": 50}))])).await;
        let id = app.task("work", json!({})).await;
        let result = app.until(&id, "failed").await["result"].clone();
        assert_eq!(
            (&result["reason"], &result["exitCode"]),
            // What the agent did, it did.
            (&json!("error"), &json!(i32::from(hook == "task:spawn"))),
            "{hook}"
        );
        for member in ["stderr", "cause"] {
            let said = result[member].as_str().unwrap();
            assert!(said.contains("in time"), "{hook}: {result}");
        }
    }
}

#[tokio::test]
async fn no_level_of_an_escalation_acts_once_a_person_is_asked_or_has_answered() {
    for (time, deed) in [
        (None, "approve"),
        (Some(60_000), "approve"),
        (Some(60_000), "reject"),
        (Some(60_000), "patch"),
    ] {
        let app = with_gates(json!([])).await;
        let levels = json!([
            {"level": 1, "handler": "orchestrator", "timeoutMs": 60_000},
            {"level": 2, "handler": "human", "timeoutMs": time},
        ]);
        let settings = json!({"escalationPolicy": {"levels": levels}, "orchestratorModel": "echo"});
        assert_eq!(answer(app.patch("/v1/config", settings)).await.0, 200);
        let id = app.task("break", json!({"maxRetries": 0})).await;
        let request = waiting(&app, &id).await;
        let mut database = PgConnection::connect(&app.database_url).await.unwrap();
        let timers = "select count(*) from production.jobs where kind = 'escalation'";
        let owed: i64 = sqlx::query_scalar(timers)
            .fetch_one(&mut database)
            .await
            .unwrap();
        assert_eq!(owed, i64::from(time.is_some()));
        app.upstream.answers(|_| Reply::Hang(vec![]));
        if deed == "patch" {
            let pending = json!({"status": "pending"});
            answer(app.patch(&format!("/v1/tasks/{id}"), pending)).await;
            assert_eq!(app.owed("escalation").await, 0);
            continue;
        }
        let (status, body) = decide(&app, &request, deed, json!({"feedback": "better"})).await;
        assert_eq!(status, 200, "{body}");
        let owed: i64 = sqlx::query_scalar(timers)
            .fetch_one(&mut database)
            .await
            .unwrap();
        assert_eq!(owed, 0, "{deed}");
        let (_, told) = app.events("escalation:resolved").await.pop().unwrap();
        let action = if deed == "approve" {
            "approved"
        } else {
            "rejected"
        };
        assert_eq!(
            (&told["level"], &told["action"]),
            (&json!(2), &json!(action))
        );
    }
}

#[tokio::test]
async fn no_level_of_an_escalation_takes_a_question_at_a_gate_away() {
    let app = with_gates(json!([gate("task:create", json!({}))])).await;
    let levels = json!([{"level": 1, "handler": "orchestrator", "timeoutMs": 60_000}]);
    let settings = json!({"escalationPolicy": {"levels": levels}});
    assert_eq!(answer(app.patch("/v1/config", settings)).await.0, 200);
    let id = app.task("work", json!({})).await;
    let request = waiting(&app, &id).await;
    // As an escalated task that is stopped at a gate, and whose level has had its time.
    app.sql(
        "update production.tasks set document = jsonb_set(document, '{escalationLevel}', '1');
        insert into production.jobs (project_id, kind, subject, ready, due_at)
        select project_id, 'escalation', id, true, clock_timestamp() from production.tasks"
            .to_owned(),
    )
    .await;
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let owed_later = "select exists (select from production.jobs
        where kind = 'escalation' and due_at > clock_timestamp() + interval '50 s')";
    eventually("the level has its time anew", async || {
        sqlx::query_scalar(owed_later)
            .fetch_one(&mut database)
            .await
            .unwrap()
    })
    .await;
    assert_eq!(decide(&app, &request, "approve", json!({})).await.0, 200);
    app.until(&id, "done").await;
}

#[tokio::test]
async fn many_answers_at_once_get_by_with_few_connections() {
    let few = ["--world-connections", "2", "--acquire-timeout-ms", "120000"];
    let app = TestApp::start_with(&few).await;
    app.agent("noor").await;
    app.upstream.answers(|_| Reply::Stream(said("Done.")));
    let gates = json!([gate("task:create", json!({}))]);
    answer(app.patch("/v1/config", json!({"approvalGates": gates}))).await;
    let id = app.task("work", json!({})).await;
    let request = waiting(&app, &id).await;
    assert_eq!(decide(&app, &request, "approve", json!({})).await.0, 200);
    let again = (0..16).map(|_| decide(&app, &request, "approve", json!({})));
    for (status, _) in futures::future::join_all(again).await {
        assert_eq!(status, 409);
    }
}

#[tokio::test]
async fn every_gate_on_the_way_is_asked_about_once() {
    let of = |hook: &str, id: &str| gate(hook, json!({"id": id}));
    let app = with_gates(json!([
        of("task:create", "editor"),
        of("task:create", "lawyer"),
        of("task:spawn", "budget"),
        of("task:spawn", "safety"),
        of("task:complete", "legal"),
        of("task:complete", "finance"),
    ]))
    .await;
    let id = app.task("work", json!({"sideEffects": true})).await;
    for (expected, hook) in [
        ("editor", "task:create"),
        ("lawyer", "task:create"),
        ("budget", "task:spawn"),
        ("safety", "task:spawn"),
        ("legal", "task:complete"),
        ("finance", "task:complete"),
        ("side-effects", "task:complete"),
    ] {
        let mut request = Value::Null;
        eventually("someone is asked", async || {
            let path = format!("/v1/approvals?taskId={id}&status=pending");
            request = answer(app.get(&path)).await.1[0].clone();
            request["gateId"] == expected
        })
        .await;
        assert_eq!(request["payload"]["hook"], hook);
        assert_eq!(decide(&app, &request, "approve", json!({})).await.0, 200);
    }
    app.until(&id, "done").await;
    assert_eq!(app.upstream.asked().len(), 1);
    let told = app.events("approval:requested").await;
    assert_eq!(told.len(), 7);
}

#[tokio::test]
async fn a_transition_gate_stands_at_every_step_that_the_engine_takes() {
    for (from, to, title, hook) in [
        ("pending", "assigned", "work", "task:spawn"),
        ("assigned", "in_progress", "work", "task:spawn"),
        ("in_progress", "review", "work", "assessment:run"),
        ("review", "done", "work", "task:complete"),
        ("failed", "pending", "break", "task:retry"),
        ("in_progress", "failed", "break", "task:fail"),
    ] {
        let condition = format!("data.from == '{from}' && data.to == '{to}'");
        let stands = json!({"condition": {"expression": condition}});
        let app = with_gates(json!([gate("task:transition", stands)])).await;
        let retries = i32::from(to == "pending");
        let id = app.task(title, json!({"maxRetries": retries})).await;
        let request = waiting(&app, &id).await;
        assert_eq!(
            (&request["gateId"], &request["payload"]["hook"]),
            (&json!("task:transition"), &json!(hook)),
            "{from} {to}"
        );
        let asked = app.upstream.asked().len();
        app.upstream.answers(|_| Reply::Stream(said("Fine now.")));
        assert_eq!(decide(&app, &request, "approve", json!({})).await.0, 200);
        let task = app.until(&id, "done").await;
        // Work that was there is not done again.
        let again = usize::from(!matches!(to, "review" | "done"));
        assert_eq!(app.upstream.asked().len(), asked + again, "{from} {to}");
        assert_eq!(task["retries"], retries);
        assert_eq!(app.events("approval:requested").await.len(), 1);
    }
}

#[tokio::test]
async fn of_two_gates_before_a_review_each_is_asked_about() {
    let to_review = |id: &str| {
        let condition = json!({"expression": "data.to == 'review'"});
        gate("task:transition", json!({"id": id, "condition": condition}))
    };
    let app = with_gates(json!([
        to_review("one"),
        to_review("two"),
        gate("assessment:run", json!({})),
    ]))
    .await;
    // There is nothing to judge it by, so nobody is asked about its judgement.
    let id = app.task("work", json!({})).await;
    for expected in ["one", "two"] {
        let mut request = Value::Null;
        eventually("someone is asked", async || {
            request = waiting(&app, &id).await;
            request["gateId"] == expected
        })
        .await;
        assert_eq!(decide(&app, &request, "approve", json!({})).await.0, 200);
    }
    app.until(&id, "done").await;
    assert_eq!(app.upstream.asked().len(), 1);
    assert_eq!(app.events("approval:requested").await.len(), 2);
}

#[tokio::test]
async fn a_task_that_is_taken_past_its_gate_by_hand_works_anew_where_it_had_failed() {
    for (hook, status, title, again) in [
        ("task:retry", "pending", "break", 0),
        ("task:fail", "assigned", "break", 0),
        ("task:complete", "assigned", "work", 1),
        ("task:spawn", "assigned", "work", 0),
    ] {
        let app = with_gates(json!([gate(hook, json!({}))])).await;
        let retries = i32::from(hook == "task:retry");
        let id = app.task(title, json!({"maxRetries": retries})).await;
        waiting(&app, &id).await;
        let asked = app.upstream.asked().len();
        app.upstream.answers(|_| Reply::Stream(said("Fine now.")));
        let step = app.patch(&format!("/v1/tasks/{id}"), json!({"status": status}));
        let (answered, body) = answer(step).await;
        assert_eq!(answered, 200, "{hook}: {body}");
        if again > 0 {
            // Nobody has seen what was done since.
            eventually("it was done anew", async || {
                app.upstream.asked().len() > asked
            })
            .await;
            let request = waiting(&app, &id).await;
            decide(&app, &request, "approve", json!({})).await;
        }
        app.until(&id, "done").await;
        // From its beginning: nothing of the run before is in the conversation.
        let asked = &app.upstream.asked()[asked..];
        assert_eq!(asked.len(), 1, "{hook}");
        assert_eq!(asked[0]["messages"].as_array().unwrap().len(), 2, "{hook}");
        let requested = app.events("approval:requested").await.len();
        assert_eq!(requested, 1 + again, "{hook}");
    }
}

#[tokio::test]
async fn work_on_the_outside_world_is_asked_about_whoever_has_it_done_anew() {
    let app = with_gates(json!([])).await;
    let id = app.task("work", json!({"sideEffects": true})).await;
    waiting(&app, &id).await;
    let assigned = app.patch(&format!("/v1/tasks/{id}"), json!({"status": "assigned"}));
    assert_eq!(answer(assigned).await.0, 200);
    eventually("it was done anew", async || app.upstream.asked().len() == 2).await;
    waiting(&app, &id).await;
    // And a second failure is asked about like the first.
    let app = with_gates(json!([gate("task:retry", json!({}))])).await;
    let id = app.task("break", json!({"maxRetries": 2})).await;
    waiting(&app, &id).await;
    let assigned = app.patch(&format!("/v1/tasks/{id}"), json!({"status": "assigned"}));
    assert_eq!(answer(assigned).await.0, 200);
    eventually("it was tried again", async || {
        app.upstream.asked().len() == 2
    })
    .await;
    waiting(&app, &id).await;
}

#[tokio::test]
async fn whoever_is_asked_because_a_condition_cannot_be_told_reads_why() {
    let broken = json!({"condition": {"expression": "task.budget.left < 5"}});
    let app = with_gates(json!([gate("task:spawn", broken)])).await;
    let id = app.task("work", json!({})).await;
    let request = waiting(&app, &id).await;
    let fault = request["payload"]["fault"].as_str().unwrap();
    assert!(
        fault.contains("cannot be evaluated") && fault.contains("budget"),
        "{fault}"
    );
    decide(&app, &request, "approve", json!({})).await;
    app.until(&id, "done").await;
}

#[tokio::test]
async fn a_level_that_nobody_answers_in_its_time_is_timed_out_and_the_next_acts() {
    let app = with_gates(json!([])).await;
    app.agent("boss").await;
    let levels = json!([
        {"level": 1, "handler": "human", "timeoutMs": 100},
        {"level": 2, "handler": "agent", "target": "boss"},
    ]);
    let settings = json!({"escalationPolicy": {"levels": levels}});
    assert_eq!(answer(app.patch("/v1/config", settings)).await.0, 200);
    let id = app.task("break", json!({"maxRetries": 0})).await;
    let task = app.until(&id, "failed").await;
    assert_eq!(task["assignTo"], "boss");
    let request = answer(app.get(&format!("/v1/approvals?taskId={id}")))
        .await
        .1[0]
        .clone();
    assert_eq!(
        (
            &request["gateId"],
            &request["status"],
            &request["resolvedBy"]
        ),
        (&json!("escalation"), &json!("timeout"), &json!("timeout"))
    );
    let (_, told) = app.events("approval:timeout").await.pop().unwrap();
    assert_eq!(
        (&told["requestId"], &told["action"]),
        (&request["id"], &json!("reject"))
    );
    assert!(app.events("approval:resolved").await.is_empty());
}

#[tokio::test]
async fn finished_work_that_is_sent_back_by_hand_is_done_again() {
    let app = with_gates(json!([])).await;
    let id = app.task("work", json!({"sideEffects": true})).await;
    waiting(&app, &id).await;
    let again = json!({"status": "pending"});
    let (status, task) = answer(app.patch(&format!("/v1/tasks/{id}"), again)).await;
    assert_eq!((status.as_u16(), &task["status"]), (200, &json!("pending")));
    eventually("its agent worked again", async || {
        app.upstream.asked().len() == 2
    })
    .await;
    waiting(&app, &id).await;
}

#[tokio::test]
async fn the_gates_that_there_are_already_cannot_be_made() {
    let app = with_gates(json!([])).await;
    for id in ["side-effects", "escalation"] {
        let gates = json!({"approvalGates": [gate("task:spawn", json!({"id": id}))]});
        let (status, body) = answer(app.patch("/v1/config", gates)).await;
        assert_eq!(
            (status.as_u16(), &body["code"]),
            (400, &json!("bad_request"))
        );
    }
}

#[tokio::test]
async fn a_yes_before_the_first_attempt_makes_it_no_other() {
    let app = with_gates(json!([gate("task:spawn", json!({}))])).await;
    let expectations = json!([{"type": "llm_review", "criteria": "Is it good?"}]);
    let id = app
        .task("work", json!({"expectations": expectations}))
        .await;
    let request = waiting(&app, &id).await;
    decide(&app, &request, "approve", json!({})).await;
    let task = app.until(&id, "done").await;
    assert_eq!(task["result"]["assessment"]["trigger"], "initial");
}

#[tokio::test]
async fn a_verdict_that_a_gate_held_up_is_told_once() {
    let app = with_gates(json!([gate("assessment:complete", json!({}))])).await;
    let expectations = json!([{"type": "llm_review", "criteria": "Is it good?"}]);
    let id = app
        .task("work", json!({"expectations": expectations}))
        .await;
    let request = waiting(&app, &id).await;
    decide(&app, &request, "approve", json!({})).await;
    let task = app.until(&id, "done").await;
    assert_eq!(task["result"].get("assessmentHistory"), None);
    assert_eq!(app.events("assessment:completed").await.len(), 1);
    let reviews = app.upstream.asked();
    assert_eq!(
        reviews.iter().filter(|request| is_review(request)).count(),
        3
    );
}

#[tokio::test]
async fn a_no_before_a_task_may_begin_is_followed_by_another_question() {
    let app = with_gates(json!([gate("task:create", json!({"maxRevisions": 1}))])).await;
    let id = app.task("work", json!({})).await;
    let request = waiting(&app, &id).await;
    let no = json!({"feedback": "Not on a Friday"});
    let (status, body) = decide(&app, &request, "reject", no.clone()).await;
    assert_eq!(status, 200, "{body}");
    let again = waiting(&app, &id).await;
    assert_ne!(again["id"], request["id"]);
    assert_eq!(again["gateId"], "task:create");
    let described = again["payload"]["task"]["description"].as_str().unwrap();
    assert!(described.contains("Not on a Friday"), "{again}");
    assert_eq!((app.owed("task").await, app.upstream.asked().len()), (0, 0));
    // As often as the gate allows.
    assert_eq!(decide(&app, &again, "reject", no).await.0, 409);
    assert_eq!(decide(&app, &again, "approve", json!({})).await.0, 200);
    app.until(&id, "done").await;
    let asked = app.upstream.asked();
    assert_eq!(asked.len(), 1);
    assert!(last_text(&asked[0], "user").contains("Not on a Friday"));
}

#[tokio::test]
async fn a_task_that_waits_before_its_creation_is_not_begun_by_hand_unasked() {
    let app = with_gates(json!([gate("task:create", json!({}))])).await;
    let id = app.task("work", json!({})).await;
    let request = waiting(&app, &id).await;
    let path = format!("/v1/tasks/{id}");
    let (status, body) = answer(app.patch(&path, json!({"status": "pending"}))).await;
    assert_eq!((status.as_u16(), &body["code"]), (409, &json!("conflict")));
    let said = body["error"].as_str().unwrap();
    assert!(
        said.contains("Gate task:create") && said.contains(&id),
        "{said}"
    );
    // The same person is still asked the same.
    assert_eq!(waiting(&app, &id).await["id"], request["id"]);
    assert_eq!((app.owed("task").await, app.upstream.asked().len()), (0, 0));
    // Where no gate stands any more there is nothing to ask.
    let open = json!({"approvalGates": []});
    assert_eq!(answer(app.patch("/v1/config", open)).await.0, 200);
    let (status, body) = answer(app.patch(&path, json!({"status": "pending"}))).await;
    assert_eq!(status, 200, "{body}");
    app.until(&id, "done").await;
}

#[tokio::test]
async fn an_overdue_task_that_was_rejected_goes_on_when_someone_says_yes() {
    let app = with_gates(json!([gate("quality:sla", json!({}))])).await;
    app.upstream.answers(|_| Reply::Hang(vec![]));
    let deadline = chrono::Utc::now() + chrono::Duration::milliseconds(300);
    let late = json!({"deadline": deadline.to_rfc3339()});
    let id = app.task("work", late).await;
    let request = waiting(&app, &id).await;
    let before = app.upstream.asked().len();
    app.upstream.answers(|_| Reply::Stream(said("Done.")));
    let no = json!({"feedback": "Only the summary"});
    let (status, body) = decide(&app, &request, "reject", no).await;
    assert_eq!(status, 200, "{body}");
    let again = waiting(&app, &id).await;
    assert_ne!(again["id"], request["id"]);
    assert_eq!(
        (&again["gateId"], &again["payload"]["data"]["entityType"]),
        (&json!("quality:sla"), &json!("task"))
    );
    let pending = app.patch(&format!("/v1/tasks/{id}"), json!({"status": "pending"}));
    assert_eq!(answer(pending).await.0, 409);
    assert_eq!(app.owed("task").await, 0);
    assert_eq!(app.upstream.asked().len(), before);
    assert_eq!(decide(&app, &again, "approve", json!({})).await.0, 200);
    app.until(&id, "done").await;
    let asked = app.upstream.asked();
    assert_eq!(asked.len(), before + 1);
    assert!(last_text(asked.last().unwrap(), "user").contains("Only the summary"));
}

#[tokio::test]
async fn whoever_is_asked_reads_at_which_gate_and_what_it_saw() {
    for (to, title, hook, seen) in [
        (
            "done",
            "work",
            "task:complete",
            json!({"from": "review", "to": "done", "agent": "noor"}),
        ),
        (
            "in_progress",
            "work",
            "task:spawn",
            json!({"from": "assigned", "to": "in_progress", "agent": "noor"}),
        ),
        (
            "pending",
            "break",
            "task:retry",
            json!({"from": "failed", "to": "pending", "agent": "noor", "attempt": 1}),
        ),
    ] {
        let condition = json!({"expression": format!("data.to == '{to}'")});
        let stands = gate("task:transition", json!({"condition": condition}));
        let app = with_gates(json!([stands])).await;
        let id = app.task(title, json!({"maxRetries": 1})).await;
        let mut payload = waiting(&app, &id).await["payload"].clone();
        assert_eq!(
            (&payload["hook"], &payload["gateHook"]),
            (&json!(hook), &json!("task:transition"))
        );
        let data = payload["data"].as_object_mut().unwrap();
        let reason = data.remove("reason");
        assert_eq!(reason.is_some(), title == "break", "{to}");
        assert_eq!(json!(data), seen);
    }
    // The server's own gates stand where the task is stopped.
    let app = with_gates(json!([])).await;
    let id = app.task("break", json!({"sideEffects": true})).await;
    let payload = waiting(&app, &id).await["payload"].clone();
    assert_eq!(
        (&payload["gateHook"], &payload["data"]),
        (&json!("task:retry"), &json!({}))
    );
}

#[tokio::test]
async fn a_task_that_is_let_past_its_gate_by_hand_is_approved_by_whoever_did_it() {
    for (hook, to) in [
        ("task:create", "assigned"),
        ("task:spawn", "assigned"),
        ("task:complete", "done"),
    ] {
        let app = with_gates(json!([gate(hook, json!({}))])).await;
        let id = app.task("work", json!({})).await;
        let request = waiting(&app, &id).await;
        let step = app.patch(&format!("/v1/tasks/{id}"), json!({"status": to}));
        let (status, body) = answer(step).await;
        assert_eq!(status, 200, "{hook}: {body}");
        let path = format!("/v1/approvals/{}", request["id"].as_str().unwrap());
        let resolved = answer(app.get(&path)).await.1;
        let (_, told) = app.events("approval:resolved").await.pop().unwrap();
        assert_eq!(told["requestId"], request["id"]);
        for shown in [resolved, told] {
            assert_eq!(
                (&shown["status"], &shown["resolvedBy"]),
                (&json!("approved"), &json!("user")),
                "{hook}"
            );
        }
        app.until(&id, "done").await;
    }
}

#[tokio::test]
async fn a_rejection_may_call_its_feedback_a_reason() {
    let app = with_gates(json!([gate("task:complete", json!({}))])).await;
    for (number, (body, note)) in [
        (json!({"reason": "Too long"}), "Too long"),
        (json!({"feedback": " ", "reason": "Too long"}), "Too long"),
        (
            json!({"feedback": "Cut it", "reason": "Too long"}),
            "Cut it",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let id = app.task(&format!("work {number}"), json!({})).await;
        let request = waiting(&app, &id).await;
        let blank = json!({"reason": " "});
        assert_eq!(decide(&app, &request, "reject", blank).await.0, 400);
        let (status, rejected) = decide(&app, &request, "reject", body).await;
        assert_eq!((status, &rejected["note"]), (200, &json!(note)));
    }
}

#[tokio::test]
async fn a_retry_by_hand_is_told_like_any() {
    let app = with_gates(json!([])).await;
    let id = app.task("break", json!({"maxRetries": 0})).await;
    app.until(&id, "failed").await;
    for (attempt, deed) in [(1, "retry"), (2, "patch")] {
        let again = if deed == "retry" {
            app.post(&format!("/v1/tasks/{id}/retry"), json!({}))
        } else {
            app.patch(&format!("/v1/tasks/{id}"), json!({"status": "pending"}))
        };
        let (status, body) = answer(again).await;
        assert_eq!(status, 200, "{deed}: {body}");
        assert_eq!(app.until(&id, "failed").await["retries"], attempt);
        let told = app.events("task:retry").await;
        assert_eq!(told.len(), attempt, "{deed}");
        let (_, last) = &told[attempt - 1];
        assert_eq!(
            (&last["taskId"], &last["attempt"], &last["maxRetries"]),
            (&json!(id), &json!(attempt), &json!(0))
        );
    }
}

#[tokio::test]
async fn a_level_of_an_escalation_is_resolved_once() {
    for (handler, deed, action) in [
        ("orchestrator", "", "reformulated"),
        ("human", "approve", "approved"),
        ("human", "patch", "completed"),
    ] {
        let app = with_gates(json!([])).await;
        let settings = json!({
            "escalationPolicy": {"levels": [{"level": 1, "handler": handler}]},
            "orchestratorModel": "openai:decider",
        });
        assert_eq!(answer(app.patch("/v1/config", settings)).await.0, 200);
        let mends = handler == "orchestrator";
        app.upstream.answers(move |request| {
            let rewritten = last_text(request, "user").contains("[Escalation");
            if request["model"] == "decider" {
                let better = json!({"description": "Do it again, but slowly this time."});
                Reply::Stream(said(&better.to_string()))
            } else if mends && rewritten {
                Reply::Stream(said("Done."))
            } else {
                Reply::Plain(400, vec![], "{}".to_owned())
            }
        });
        let id = app.task("hard", json!({"maxRetries": 0})).await;
        if handler == "human" {
            let request = waiting(&app, &id).await;
            app.upstream.answers(|_| Reply::Stream(said("Done.")));
            if deed == "approve" {
                assert_eq!(decide(&app, &request, deed, json!({})).await.0, 200);
            } else {
                let done = app.patch(&format!("/v1/tasks/{id}"), json!({"status": "done"}));
                assert_eq!(answer(done).await.0, 200);
            }
        }
        app.until(&id, "done").await;
        let told: Vec<Value> = app
            .events("escalation:resolved")
            .await
            .into_iter()
            .map(|(_, told)| told["action"].clone())
            .collect();
        assert_eq!(told, [json!(action)], "{handler} {deed}");
    }
}
