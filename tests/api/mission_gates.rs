//! Where people must say yes to what becomes of a mission (contract 2.11).

use std::sync::Arc;

use reqwest::StatusCode;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::sync::Notify;

use crate::approvals::{decide, gate, with_gates};
use crate::harness::{
    Reply, TestApp, answer, called, eventually, frames, last_text, results, said,
};

impl TestApp {
    /// The requests that wait for an answer about a mission.
    async fn asked_of(&self, mission: &str) -> Vec<Value> {
        let path = format!("/v1/approvals?missionId={mission}&status=pending");
        answer(self.get(&path)).await.1.as_array().unwrap().clone()
    }

    /// The one request about a mission, once it is there.
    async fn request_of(&self, mission: &str) -> Value {
        eventually("someone is asked", async || {
            !self.asked_of(mission).await.is_empty()
        })
        .await;
        let mut requests = self.asked_of(mission).await;
        assert_eq!(requests.len(), 1, "{requests:?}");
        requests.remove(0)
    }

    /// How many requests are to time out.
    async fn times_out(&self) -> i64 {
        let mut database = PgConnection::connect(&self.database_url).await.unwrap();
        sqlx::query_scalar("select count(*) from production.jobs where kind = 'approval'")
            .fetch_one(&mut database)
            .await
            .unwrap()
    }

    /// The names of a mission's events, in order.
    async fn told_of(&self, mission: &str, filter: &str) -> Vec<String> {
        let events = self.events(filter).await.into_iter();
        events
            .filter(|(_, payload)| payload["missionId"] == mission)
            .map(|(name, _)| name)
            .collect()
    }
}

fn one_task() -> Value {
    json!({"tasks": [{"title": "T", "description": "work", "assignTo": "noor"}]})
}

#[tokio::test]
async fn a_mission_begins_when_every_gate_before_it_is_open() {
    let second = json!({"id": "second", "priority": 60});
    let dear = json!({"id": "dear", "condition": {"expression": "data.taskCount > 1"}});
    let app = with_gates(json!([
        gate("mission:execute", json!({})),
        gate("mission:execute", second),
        gate("mission:execute", dear),
    ]))
    .await;
    let mission = app.mission("m", one_task()).await;
    let (status, body) = app.execute(&mission).await;
    assert_eq!(
        (status, &body["code"]),
        (StatusCode::CONFLICT, &json!("conflict"))
    );
    let request = app.request_of(&mission).await;
    assert!(
        body["error"]
            .as_str()
            .unwrap()
            .contains(request["id"].as_str().unwrap()),
        "{body}"
    );
    assert_eq!(
        (
            &request["missionId"],
            &request["gateId"],
            request.get("taskId")
        ),
        (&json!(mission), &json!("mission:execute"), None)
    );
    assert_eq!(
        request["payload"]["data"],
        json!({"taskCount": 1, "scheduleId": null})
    );
    let waiting = app.read_mission(&mission).await;
    assert_eq!(waiting["status"], "draft");
    assert!(
        waiting["reason"]
            .as_str()
            .unwrap()
            .contains("waits for approval"),
        "{waiting}"
    );

    // Nobody is asked about what cannot be done.
    app.agent("ghost").await;
    let of_ghost = json!({"tasks": [{"title": "T", "description": "t", "assignTo": "ghost"}]});
    let impossible = app.mission("impossible", of_ghost).await;
    assert_eq!(answer(app.delete("/v1/agents/ghost")).await.0, 200);
    assert_eq!(app.execute(&impossible).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(app.asked_of(&impossible).await, Vec::<Value>::new());

    // Who asks again is told the same, and nobody else is asked.
    assert_eq!(app.execute(&mission).await.0, StatusCode::CONFLICT);
    assert_eq!(app.request_of(&mission).await, request);
    // It belongs to no task.
    let (status, _) = decide(&app, &request, "reject", json!({"feedback": "no"})).await;
    assert_eq!(status, 409);
    assert_eq!(app.request_of(&mission).await, request);

    let (status, granted) = decide(&app, &request, "approve", json!({"note": "go"})).await;
    assert_eq!((status, &granted["status"]), (200, &json!("approved")));
    let request = app.request_of(&mission).await;
    assert_eq!(request["gateId"], "second");
    // The first gate stays open for what waits at the second.
    assert_eq!(app.execute(&mission).await.0, StatusCode::CONFLICT);
    assert_eq!(app.request_of(&mission).await, request);
    assert_eq!(app.read_mission(&mission).await["status"], "draft");
    assert_eq!(decide(&app, &request, "approve", json!({})).await.0, 200);
    app.mission_until(&mission, "completed").await;
    assert_eq!(app.asked_of(&mission).await, Vec::<Value>::new());
    assert_eq!(
        app.told_of(&mission, "approval:*").await,
        [
            "approval:requested",
            "approval:resolved",
            "approval:requested",
            "approval:resolved"
        ]
    );
    let (status, _) = decide(&app, &request, "approve", json!({})).await;
    assert_eq!(status, 409);
}

#[tokio::test]
async fn a_request_falls_away_with_what_it_was_for() {
    let app = with_gates(json!([gate(
        "mission:execute",
        json!({"timeoutMs": 60_000})
    )]))
    .await;
    let begun = app.mission("begun", one_task()).await;
    let deleted = app.mission("deleted", one_task()).await;
    let scheduled = json!({"schedule": "0 0 1 1 *"});
    let called_off = json!({"tasks": one_task()["tasks"], "schedule": scheduled["schedule"]});
    let called_off = app.mission("called off", called_off).await;
    for mission in [&begun, &deleted, &called_off] {
        assert_eq!(app.execute(mission).await.0, StatusCode::CONFLICT);
    }
    let request = app.request_of(&begun).await;
    assert_eq!(
        answer(app.patch("/v1/config", json!({"approvalGates": []})))
            .await
            .0,
        200
    );
    assert_eq!(app.execute(&begun).await.0, StatusCode::OK);
    let path = format!("/v1/approvals/{}", request["id"].as_str().unwrap());
    let withdrawn = answer(app.get(&path)).await.1;
    assert_eq!(
        (&withdrawn["status"], &withdrawn["resolvedBy"]),
        (&json!("rejected"), &json!("engine"))
    );
    assert_eq!(
        app.told_of(&begun, "approval:*").await,
        ["approval:requested", "approval:resolved"]
    );
    let abort = format!("/v1/missions/{called_off}/abort");
    assert_eq!(answer(app.post(&abort, json!({}))).await.0, 200);
    assert_eq!(
        answer(app.delete(&format!("/v1/missions/{deleted}")))
            .await
            .0,
        200
    );
    assert_eq!(
        answer(app.get("/v1/approvals?status=pending")).await.1,
        json!([])
    );
    assert_eq!(app.times_out().await, 0);
}

#[tokio::test]
async fn a_run_is_over_when_someone_says_so() {
    let app = with_gates(json!([gate("mission:complete", json!({}))])).await;
    let mission = app.mission("m", one_task()).await;
    // A stream of its words ends where only a person can go on.
    let path = format!("/v1/missions/{mission}/execute");
    let streamed = app
        .post(&path, json!({"stream": true}))
        .send()
        .await
        .unwrap();
    let frames = frames(&streamed.text().await.unwrap());
    assert_eq!(
        frames.last().unwrap()["mission"]["status"],
        "active",
        "{frames:?}"
    );
    let request = app.request_of(&mission).await;
    assert_eq!(
        request["payload"]["data"],
        json!({"allPassed": true, "avgScore": null, "taskCount": 1})
    );
    assert!(app.told_of(&mission, "mission:completed").await.is_empty());
    assert_eq!(decide(&app, &request, "approve", json!({})).await.0, 200);
    let ended = app.read_mission(&mission).await;
    assert_eq!(ended["status"], "completed");
    assert_eq!(app.told_of(&mission, "mission:completed").await.len(), 1);
}

#[tokio::test]
async fn a_run_that_goes_on_asks_again_when_it_has_ended() {
    let app = with_gates(json!([gate(
        "mission:complete",
        json!({"timeoutMs": 60_000})
    )]))
    .await;
    let task = json!({"tasks": [{"title": "T", "description": "break", "assignTo": "noor", "maxRetries": 0}]});
    let mission = app.mission("m", task).await;
    app.execute(&mission).await;
    let first = app.request_of(&mission).await;
    assert_eq!(first["payload"]["data"]["allPassed"], false);
    let resume = format!("/v1/missions/{mission}/resume");
    let (status, _) = answer(app.post(&resume, json!({"retryFailed": true}))).await;
    assert_eq!(status, 200);
    eventually("someone else is asked", async || {
        let requests = app.asked_of(&mission).await;
        requests.len() == 1 && requests[0]["id"] != first["id"]
    })
    .await;
    let again = app.request_of(&mission).await;
    assert_eq!(decide(&app, &again, "approve", json!({})).await.0, 200);
    app.mission_until(&mission, "failed").await;
    assert_eq!(app.times_out().await, 0);
}

#[tokio::test]
async fn a_quality_gate_that_is_good_enough_waits_for_a_person() {
    let app = with_gates(json!([gate("quality:gate", json!({}))])).await;
    let graph = json!({
        "tasks": [
            {"title": "A", "description": "work", "assignTo": "noor"},
            {"title": "B", "description": "work", "assignTo": "noor", "dependsOn": ["A"]},
        ],
        "qualityGates": [{"name": "good", "afterTasks": ["A"], "blocksTasks": ["B"]}],
    });
    let mission = app.mission("m", graph.clone()).await;
    app.execute(&mission).await;
    let paused = app.mission_until(&mission, "paused").await;
    let request = app.request_of(&mission).await;
    assert!(
        paused["reason"]
            .as_str()
            .unwrap()
            .contains(request["id"].as_str().unwrap()),
        "{paused}"
    );
    assert_eq!(
        request["payload"]["data"],
        json!({"gateName": "good", "avgScore": null})
    );
    assert!(app.told_of(&mission, "quality:gate:*").await.is_empty());
    assert_eq!(decide(&app, &request, "approve", json!({})).await.0, 200);
    app.mission_until(&mission, "completed").await;
    assert_eq!(
        app.told_of(&mission, "quality:gate:*").await,
        ["quality:gate:passed"]
    );

    // Whoever has the mission go on all the same has answered.
    let mission = app.mission("n", graph).await;
    app.execute(&mission).await;
    app.mission_until(&mission, "paused").await;
    let resume = format!("/v1/missions/{mission}/resume");
    assert_eq!(answer(app.post(&resume, json!({}))).await.0, 200);
    app.mission_until(&mission, "completed").await;
    assert_eq!(app.asked_of(&mission).await, Vec::<Value>::new());
}

#[tokio::test]
async fn nobody_answering_about_a_mission_counts_as_the_gate_says() {
    let timed = |hook: &str, action: &str, timeout: u64| {
        let name = format!("{hook} {action}");
        let condition = json!({"expression": format!("mission.name == '{name}'")});
        let others = json!({"id": name, "timeoutMs": timeout, "timeoutAction": action, "condition": condition});
        gate(hook.split(' ').next().unwrap(), others)
    };
    let app = with_gates(json!([
        timed("mission:execute", "reject", 20),
        timed("mission:execute", "approve", 20),
        timed("mission:execute later", "approve", 500),
        timed("mission:complete", "reject", 20),
        timed("mission:complete", "approve", 20),
        timed("quality:gate", "reject", 20),
    ]))
    .await;
    for (name, ends, reason) in [
        ("mission:execute reject", "draft", "Nobody answered"),
        ("mission:execute approve", "completed", ""),
        ("mission:complete reject", "failed", "Nobody answered"),
        ("mission:complete approve", "completed", ""),
        ("quality:gate reject", "paused", "Nobody answered"),
    ] {
        let mut graph = one_task();
        if name.starts_with("quality") {
            let held_back =
                json!({"title": "B", "description": "b", "assignTo": "noor", "dependsOn": ["T"]});
            graph["tasks"].as_array_mut().unwrap().push(held_back);
            graph["qualityGates"] =
                json!([{"name": "g", "afterTasks": ["T"], "blocksTasks": ["B"]}]);
        }
        let mission = app.mission(name, graph).await;
        app.execute(&mission).await;
        eventually("its time is over", async || {
            !app.told_of(&mission, "approval:timeout").await.is_empty()
        })
        .await;
        let ended = app.mission_until(&mission, ends).await;
        let why = ended["reason"].as_str().unwrap_or_default();
        assert!(
            why.contains(reason) && why.is_empty() == reason.is_empty(),
            "{name}: {ended}"
        );
    }
    // What cannot be done when its time is over is not done, and the mission says why.
    app.agent("ada").await;
    let of_another = json!({"tasks": [{"title": "T", "description": "work", "assignTo": "ada"}]});
    let mission = app
        .mission("mission:execute later approve", of_another)
        .await;
    assert_eq!(app.execute(&mission).await.0, StatusCode::CONFLICT);
    assert_eq!(answer(app.delete("/v1/agents/ada")).await.0, 200);
    eventually("its time is over", async || {
        !app.told_of(&mission, "approval:timeout").await.is_empty()
    })
    .await;
    let left = app.read_mission(&mission).await;
    assert_eq!(left["status"], "draft");
    assert!(left["reason"].as_str().unwrap().contains("ada"), "{left}");
    assert_eq!(app.times_out().await, 0);
}

#[tokio::test]
async fn a_scheduled_run_waits_for_a_person_and_later_ones_do_not_pile_up() {
    let app = with_gates(json!([gate("schedule:trigger", json!({}))])).await;
    let mut graph = one_task();
    graph["schedule"] = json!("0 0 1 1 *");
    let mission = app.mission("m", graph).await;
    // By hand there is no schedule to ask about.
    assert_eq!(app.execute(&mission).await.0, StatusCode::OK);
    app.mission_until(&mission, "recurring").await;
    app.make_due(1.0).await;
    let request = app.request_of(&mission).await;
    assert_eq!(app.read_mission(&mission).await["status"], "recurring");
    app.make_due(1.0).await;
    eventually("the next time is left out", async || {
        let skipped = app.events("schedule:skipped").await;
        skipped
            .iter()
            .any(|(_, told)| told["reason"] == "awaiting_approval")
    })
    .await;
    assert_eq!(app.request_of(&mission).await, request);
    assert_eq!(decide(&app, &request, "approve", json!({})).await.0, 200);
    eventually("it has run twice", async || {
        app.told_of(&mission, "mission:completed").await.len() == 2
    })
    .await;
    assert_eq!(
        app.told_of(&mission, "schedule:*").await.last().unwrap(),
        "schedule:completed"
    );
    assert!(app.read_mission(&mission).await["executionCount"] == 2);
}

#[tokio::test]
async fn a_schedule_that_is_changed_ends_or_goes_takes_its_question_along() {
    let app = with_gates(json!([gate(
        "schedule:trigger",
        json!({"timeoutMs": 60_000})
    )]))
    .await;
    for change in ["delete", "disable", "change", "end"] {
        let mut graph = one_task();
        graph["schedule"] = json!("0 0 1 1 *");
        let mission = app.mission(change, graph).await;
        app.make_due(1.0).await;
        let request = app.request_of(&mission).await;
        let path = format!("/v1/schedules/{mission}");
        let changed = match change {
            "delete" => answer(app.delete(&path)).await,
            "disable" => answer(app.patch(&path, json!({"enabled": false}))).await,
            "change" => answer(app.patch(&path, json!({"expression": "0 0 2 2 *"}))).await,
            _ => {
                app.sql("update production.schedules set end_date = clock_timestamp() - interval '1 second'".to_owned()).await;
                app.make_due(0.0).await;
                app.mission_until(&mission, "completed").await;
                (StatusCode::OK, Value::Null)
            }
        };
        assert!(changed.0.is_success(), "{change}: {changed:?}");
        assert_eq!(
            app.asked_of(&mission).await,
            Vec::<Value>::new(),
            "{change}"
        );
        assert_eq!(decide(&app, &request, "approve", json!({})).await.0, 409);
        assert_eq!(app.read_mission(&mission).await["executionCount"], 0);
        app.sql(
            "delete from production.schedules; delete from production.jobs where kind = 'schedule'"
                .to_owned(),
        )
        .await;
    }
    assert_eq!(app.times_out().await, 0);
}

#[tokio::test]
async fn a_single_date_that_nobody_approves_of_fails_its_mission() {
    let app = with_gates(json!([gate("schedule:trigger", json!({"timeoutMs": 20}))])).await;
    let mut graph = one_task();
    graph["schedule"] = json!("2098-01-01T00:00:00Z");
    let mission = app.mission("m", graph).await;
    app.make_due(1.0).await;
    let failed = app.mission_until(&mission, "failed").await;
    assert!(
        failed["reason"]
            .as_str()
            .unwrap()
            .contains("Nobody answered"),
        "{failed}"
    );
    let skipped = app.events("schedule:skipped").await;
    assert_eq!(skipped[0].1["reason"], "not_approved");
}

#[tokio::test]
async fn an_overdue_task_goes_on_from_where_it_is_when_someone_lets_it() {
    let app = with_gates(json!([gate("quality:sla", json!({}))])).await;
    let settings = json!({"violationAction": "fail"});
    answer(app.patch("/v1/config", settings)).await;
    app.upstream.answers(|request| {
        let words = match results(request) {
            0 => called(&[("c", "memory_get", &["{}"])]),
            1 => return Reply::Slow(std::time::Duration::from_millis(700), said("late")),
            _ => said("Done."),
        };
        Reply::Stream(words)
    });
    let deadline = chrono::Utc::now() + chrono::Duration::milliseconds(300);
    let id = app
        .task("t", json!({"deadline": deadline.to_rfc3339()}))
        .await;
    app.until(&id, "awaiting_approval").await;
    let path = format!("/v1/approvals?taskId={id}&status=pending");
    let request = answer(app.get(&path)).await.1[0].clone();
    assert_eq!(request["gateId"], "quality:sla");
    assert_eq!(app.events("sla:violated").await.len(), 1);
    let before = app.upstream.asked().len();
    app.upstream.answers(|_| Reply::Stream(said("Done.")));
    assert_eq!(decide(&app, &request, "approve", json!({})).await.0, 200);
    app.until(&id, "done").await;
    let asked = app.upstream.asked();
    // What was on record was not asked for again.
    assert_eq!(
        (asked.len(), results(asked.last().unwrap())),
        (before + 1, 1)
    );
    assert_eq!(last_text(asked.last().unwrap(), "user"), "Do t");
}

#[tokio::test]
async fn an_overdue_task_that_did_not_run_waits_as_it_did() {
    let app = with_gates(json!([
        gate("quality:sla", json!({})),
        gate("task:spawn", json!({}))
    ]))
    .await;
    answer(app.patch("/v1/config", json!({"violationAction": "fail"}))).await;
    let late = json!({"deadline": "2099-01-01T00:00:00Z"});
    let passes = async || {
        app.sql(
            "update production.tasks set document = jsonb_set(document, '{deadline}', to_jsonb(now() - interval '1 second'));
            update production.jobs set due_at = clock_timestamp() where kind = 'deadline'"
                .to_owned(),
        )
        .await;
    };
    let asked = async |id: &str, gate: &str| {
        let path = format!("/v1/approvals?taskId={id}&status=pending");
        let mut found = Value::Null;
        eventually("someone is asked", async || {
            found = answer(app.get(&path)).await.1[0].clone();
            found["gateId"] == gate
        })
        .await;
        found
    };
    // Someone is asked already: it is not failed under their hands.
    let id = app.task("asked", late.clone()).await;
    let spawn = asked(&id, "task:spawn").await;
    passes().await;
    eventually("it is overdue", async || {
        !app.events("sla:violated").await.is_empty()
    })
    .await;
    assert_eq!(app.until(&id, "awaiting_approval").await["id"], json!(id));
    decide(&app, &spawn, "approve", json!({})).await;
    app.until(&id, "done").await;

    // One that is held stays held.
    let needed = app.task("needed", json!({"draft": true})).await;
    let mut needs = late;
    needs["dependsOn"] = json!([needed]);
    let id = app.task("held", needs).await;
    let pause = answer(app.post(&format!("/v1/tasks/{id}/pause"), json!({}))).await;
    assert_eq!(pause.0, 200);
    passes().await;
    let sla = asked(&id, "quality:sla").await;
    assert_eq!(decide(&app, &sla, "approve", json!({})).await.0, 200);
    assert_eq!(app.read(&id).await["status"], "pending");
    answer(app.patch("/v1/config", json!({"approvalGates": []}))).await;
    answer(app.post(&format!("/v1/tasks/{needed}/queue"), json!({}))).await;
    app.until(&needed, "done").await;
    assert_eq!(app.read(&id).await["status"], "pending");
    answer(app.post(&format!("/v1/tasks/{id}/run"), json!({}))).await;
    app.until(&id, "done").await;
}

#[tokio::test]
async fn an_overdue_mission_goes_on_until_someone_is_asked_in_vain() {
    let of = |name: &str, others: Value| {
        let mut gate = gate("quality:sla", others);
        gate["id"] = json!(name);
        gate["condition"] = json!({"expression": format!("mission.name == '{name}'")});
        gate
    };
    let app = with_gates(json!([
        of("work", json!({})),
        of("slow", json!({"timeoutMs": 300})),
    ]))
    .await;
    let answers = Arc::new(Notify::new());
    let goes_on = answers.clone();
    app.upstream
        .answers(move |_| Reply::Pause(Vec::new(), goes_on.clone(), said("Done.")));
    for (description, ends) in [("work", "completed"), ("slow", "failed")] {
        let deadline = chrono::Utc::now() + chrono::Duration::milliseconds(200);
        let mission = json!({
            "tasks": [{"title": "T", "description": description, "assignTo": "noor"}],
            "deadline": deadline.to_rfc3339(),
        });
        let mission = app.mission(description, mission).await;
        app.execute(&mission).await;
        let request = app.request_of(&mission).await;
        assert_eq!(request["payload"]["data"]["entityType"], "mission");
        if ends == "completed" {
            assert_eq!(app.read_mission(&mission).await["status"], "active");
            answers.notify_one();
        }
        let ended = app.mission_until(&mission, ends).await;
        assert_eq!(app.asked_of(&mission).await, Vec::<Value>::new());
        assert_eq!(ended["reason"].is_string(), ends == "failed", "{ended}");
    }
    assert_eq!(app.times_out().await, 0);
}
