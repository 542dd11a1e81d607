//! The OpenAPI document says of the main objects what the server sends.

use serde_json::{Value, json};

use crate::approvals::{decide, gate, with_gates};
use crate::assessments::{is_review, scored};
use crate::harness::{Reply, TestApp, answer, called, results, said};

/// Checks that an object is what the document says, and has no member that it does not name.
fn conforms(document: &Value, schema: &str, object: &Value) {
    let all = json!({
        "$ref": format!("#/components/schemas/{schema}"), "components": document["components"],
    });
    let validator = jsonschema::validator_for(&all).unwrap();
    let faults: Vec<String> = validator
        .iter_errors(object)
        .map(|fault| format!("{}: {fault}", fault.instance_path()))
        .collect();
    assert!(faults.is_empty(), "{schema}: {faults:?}\n{object}");
    let named = &document["components"]["schemas"][schema]["properties"];
    for member in object.as_object().unwrap().keys() {
        assert!(named.get(member).is_some(), "{schema} has a `{member}`");
    }
}

async fn document(app: &TestApp) -> Value {
    answer(app.get("/v1/openapi.json")).await.1
}

#[tokio::test]
async fn tasks_and_requests_look_as_the_document_says() {
    let app = with_gates(json!([gate("task:complete", json!({}))])).await;
    let document = document(&app).await;
    app.upstream.answers(|request| {
        if is_review(request) {
            scored(request, 4.0)
        } else if results(request) == 0 {
            let outcome = r#"{"type":"text","label":"Notes","text":"abc"}"#;
            Reply::Stream(called(&[("c", "register_outcome", &[outcome])]))
        } else {
            Reply::Stream(said("Done."))
        }
    });
    let first = app.task("first", json!({"draft": true})).await;
    conforms(&document, "Task", &app.read(&first).await);
    let everything = json!({
        "expectations": [{"type": "llm_review", "criteria": "c", "threshold": 2, "confidence": "estimated"},
            {"type": "llm_review", "dimensions": [{"name": "d", "description": "d", "weight": 1, "rubric": {"1": "bad"}}]}],
        "expectedOutcomes": [{"type": "text", "label": "Notes", "tags": ["a"]}],
        "maxDuration": 60_000, "retryPolicy": {"escalateAfter": 2, "fallbackAgent": "noor"}, "sideEffects": true,
        "deadline": "2099-01-01T00:00:00Z", "group": "g", "priority": 2.5, "user": "u", "loop": {"a": 1},
        "notifications": {"onDone": []}, "sandbox": "s", "routing": {}, "executionMode": "m",
    });
    let id = app.task("everything", everything).await;
    for _ in 0..2 {
        app.until(&id, "awaiting_approval").await;
        let path = format!("/v1/approvals?taskId={id}&status=pending");
        let request = answer(app.get(&path)).await.1[0].clone();
        conforms(&document, "Approval", &request);
        let (status, resolved) = decide(&app, &request, "approve", json!({"note": "n"})).await;
        assert_eq!(status, 200);
        conforms(&document, "Approval", &resolved);
    }
    let task = app.until(&id, "done").await;
    conforms(&document, "Task", &task);
    conforms(&document, "TaskResult", &task["result"]);
    conforms(&document, "Assessment", &task["result"]["assessment"]);
    conforms(&document, "Outcome", &task["outcomes"][0]);
}

#[tokio::test]
async fn missions_look_as_the_document_says() {
    let app = TestApp::with_noor(&[]).await;
    let document = document(&app).await;
    let task = |title: &str, needs: &[&str]| json!({"title": title, "description": "d", "assignTo": "noor", "dependsOn": needs});
    let everything = json!({
        "prompt": "p", "data": {"a": 1}, "tasks": [task("A", &[]), task("B", &["A"])], "qualityThreshold": 1,
        "checkpoints": [{"name": "look", "afterTasks": ["A"], "blocksTasks": ["B"]}],
        "delays": [{"name": "wait", "afterTasks": ["A"], "blocksTasks": ["B"], "duration": "PT1S"}],
        "qualityGates": [{"name": "good", "afterTasks": ["A"], "blocksTasks": ["B"]}],
        "deadline": "2099-01-01T00:00:00Z", "user": "u", "notifications": {},
        "team": {"agents": [{"name": "temp", "model": "echo"}]},
    });
    let id = app.mission("m", everything).await;
    conforms(&document, "Mission", &app.read_mission(&id).await);
    assert_eq!(app.execute(&id).await.0, 200);
    let paused = app.mission_until(&id, "paused").await;
    conforms(&document, "Mission", &paused);
    conforms(&document, "MissionRun", &paused["run"]);
    let listed = answer(app.get("/v1/missions")).await.1;
    conforms(&document, "Mission", &listed[0]);
    let tasks = answer(app.get(&format!("/v1/tasks?group={id}"))).await.1;
    for task in tasks.as_array().unwrap() {
        conforms(&document, "Task", task);
    }
}
