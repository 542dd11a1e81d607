//! A project's settings (contract 2.6.3, design 0.1).

use reqwest::Method;
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

#[tokio::test]
async fn what_is_wrong_is_said_with_its_place_and_in_the_words_of_json() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    let level = |level: Value| json!({"escalationPolicy": {"levels": [level]}});
    let when = |expression: &str| {
        let condition = json!({"expression": expression});
        json!({"approvalGates": [{"id": "g", "name": "G", "handler": "human", "hook": "task:spawn", "condition": condition}]})
    };
    for (path, change, words) in [
        (
            "/v1/config",
            json!({"approvalGates": [1]}),
            "`approvalGates[0]` cannot be used: invalid type: integer `1`, expected an object.",
        ),
        (
            "/v1/config",
            json!({"approvalGates": [{"id": "g", "name": "G", "handler": 1, "hook": "task:spawn"}]}),
            "`approvalGates[0].handler`",
        ),
        (
            "/v1/config",
            json!({"escalationPolicy": []}),
            "`escalationPolicy` cannot be used: a list stands where an object belongs.",
        ),
        (
            "/v1/config",
            level(json!({"level": 1, "handler": "human", "timeoutMS": 5})),
            "`escalationPolicy.levels[0]` has no member `timeoutMS`",
        ),
        (
            "/v1/config",
            level(json!({"level": 1, "handler": "agent"})),
            "`target`",
        ),
        (
            "/v1/config",
            json!({"maxRetries": 1.5}),
            "expected a whole number",
        ),
        ("/v1/config", when("unknownvar == 1"), "`unknownvar`"),
        ("/v1/config", when("nosuchfn(task)"), "`nosuchfn`"),
        ("/v1/config", when("1"), "true or false"),
        ("/v1/config", when("\"x\""), "true or false"),
        (
            "/v1/agents/noor",
            json!({"maxTurns": -1}),
            "expected a whole number",
        ),
        (
            "/v1/agents/noor",
            json!({"identity": {"title": 1}}),
            "`identity.title`",
        ),
        (
            "/v1/agents/noor",
            json!({"identity": {"responsibilities": [{"area": 1}]}}),
            "`identity.responsibilities` is not valid: it has none of its known forms.",
        ),
    ] {
        let (status, body) = answer(app.patch(path, change.clone())).await;
        assert_eq!(status, 400, "{change}: {body}");
        let told = body["error"].as_str().unwrap();
        assert!(told.contains(words), "{change}: {told}");
        for word in ["struct", "u32", "enum", "variant", "map"] {
            assert!(!told.contains(word), "{change}: {told}");
        }
    }
    assert_eq!(read(&app).await["approvalGates"], json!([]));
}

#[tokio::test]
async fn a_model_is_of_a_provider_that_the_server_or_the_project_knows() {
    let app = TestApp::start().await;
    for setting in ["defaultModel", "judgeModel", "orchestratorModel"] {
        let change = json!({setting: "acme:house"});
        let (status, body) = answer(app.patch("/v1/config", change)).await;
        assert_eq!(status, 400, "{body}");
        let told = body["error"].as_str().unwrap();
        assert!(
            told.contains(setting) && told.contains("names no known provider"),
            "{told}"
        );
    }
    // It is known, whether or not there is a key.
    let keyless = json!({"judgeModel": "groq:llama"});
    assert_eq!(answer(app.patch("/v1/config", keyless)).await.0, 200);
    let byok = json!({"projectId": app.project, "provider": "acme", "key": "k", "baseUrl": format!("{}/v1", app.upstream.url)});
    let set = app.admin(Method::POST, "/v1/byok").json(&byok);
    assert!(answer(set).await.0.is_success());
    let own = json!({"judgeModel": "acme:house"});
    assert_eq!(answer(app.patch("/v1/config", own)).await.0, 200);
}
