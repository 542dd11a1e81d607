//! A project's settings (contract 2.6.3, design 0.1).

use serde_json::{Value, json};

use crate::harness::{TestApp, answer};

async fn read(app: &TestApp) -> Value {
    answer(app.get("/v1/config")).await.1
}

#[tokio::test]
async fn settings_have_defaults_are_changed_one_by_one_and_go_back() {
    let app = TestApp::start().await;
    let defaults = read(&app).await;
    for (setting, value) in [
        ("maxRetries", json!(3)),
        ("maxFixAttempts", json!(2)),
        ("maxQuestionRounds", json!(2)),
        ("maxResolutionAttempts", json!(2)),
        ("maxAssessmentRetries", json!(1)),
        ("taskTimeout", json!(1_800_000)),
        ("staleThreshold", json!(300_000)),
        ("autoCorrectExpectations", json!(true)),
        ("maxConcurrency", Value::Null),
        ("violationAction", json!("notify")),
        ("approvalGates", json!([])),
    ] {
        assert_eq!(defaults[setting], value, "{setting}");
    }
    let (status, changed) = answer(app.patch(
        "/v1/config",
        json!({"maxRetries": 5, "defaultModel": "openai:gpt-5"}),
    ))
    .await;
    assert_eq!(status, 200, "{changed}");
    assert_eq!(read(&app).await, changed);
    let (_, changed) = answer(app.patch("/v1/config/settings", json!({"maxRetries": null}))).await;
    assert_eq!(
        (&changed["maxRetries"], &changed["defaultModel"]),
        (&json!(3), &json!("openai:gpt-5"))
    );
    assert_eq!(app.events("config:reloaded").await.len(), 2);
    // The sandbox has its own.
    let sandbox = app
        .client
        .get(format!("{}/v1/config", app.url))
        .bearer_auth(&app.test);
    assert_eq!(answer(sandbox).await.1["defaultModel"], Value::Null);
}

#[tokio::test]
async fn a_setting_that_is_unknown_or_wrong_is_refused_and_nothing_changes() {
    let app = TestApp::start().await;
    for change in [
        json!({"maxRetry": 1}),
        json!({"maxRetry": null}),
        json!({"maxRetries": "many"}),
        json!({"maxRetries": 7, "staleThreshold": 0}),
        json!({"defaultModel": "nobody-knows"}),
        json!({"violationAction": "shout"}),
        json!({"approvalGates": [{"id": "g", "name": "G", "handler": "human", "hook": "task:spawn", "condition": {"expression": "1 +"}}]}),
        json!({"escalationPolicy": {"levels": [{"level": 1, "handler": "cat"}]}}),
        json!([]),
    ] {
        let (status, body) = answer(app.patch("/v1/config", change.clone())).await;
        assert_eq!(
            (status.as_u16(), &body["code"]),
            (400, &json!("bad_request")),
            "{change}: {body}"
        );
    }
    assert_eq!(read(&app).await["maxRetries"], 3);
}

#[tokio::test]
async fn an_agent_without_a_model_has_the_projects() {
    let app = TestApp::start().await;
    answer(app.post("/v1/agents", json!({"name": "plain"}))).await;
    answer(app.patch(
        "/v1/config",
        json!({"defaultModel": "openai:chosen", "maxRetries": 1}),
    ))
    .await;
    app.upstream.will_say("Hello.");
    let chat = json!({"agent": "plain", "messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(answer(app.chat(chat)).await.0, 200);
    assert_eq!(app.upstream.asked()[0]["model"], "chosen");
    let task = json!({"title": "t", "description": "d", "assignTo": "plain", "draft": true});
    assert_eq!(answer(app.post("/v1/tasks", task)).await.1["maxRetries"], 1);
}
