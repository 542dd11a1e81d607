//! What agents remember (contract 2.13).

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{Reply, TestApp, answer, called, eventually, results, said};

async fn save(app: &TestApp, path: &str, content: &str) -> (u16, Value) {
    let request = app.request(Method::PUT, path);
    let (status, body) = answer(request.json(&json!({"content": content}))).await;
    (status.as_u16(), body)
}

#[tokio::test]
async fn a_memory_is_read_as_it_was_saved() {
    let app = TestApp::start().await;
    let (status, body) = answer(app.get("/v1/memory")).await;
    assert_eq!(
        (status.as_u16(), body),
        (200, json!({"exists": false, "content": ""}))
    );
    let text = "# Conventions\n- Dates are ISO\n";
    assert_eq!(
        save(&app, "/v1/memory", text).await,
        (200, json!({"saved": true}))
    );
    assert_eq!(
        answer(app.get("/v1/memory")).await.1,
        json!({"exists": true, "content": text})
    );

    let path = "/v1/memory/agent/not-there-yet";
    assert_eq!(
        answer(app.get(path)).await.1,
        json!({"exists": false, "content": "", "agent": "not-there-yet"})
    );
    let saved = json!({"saved": true, "agent": "not-there-yet"});
    assert_eq!(save(&app, path, "").await, (200, saved));
    assert_eq!(
        answer(app.get(path)).await.1,
        json!({"exists": true, "content": "", "agent": "not-there-yet"})
    );
}

#[tokio::test]
async fn a_memory_without_content_or_too_large_is_refused_and_nothing_stored() {
    let app = TestApp::start().await;
    assert_eq!(save(&app, "/v1/memory", "before").await.0, 200);
    for body in [
        json!({}),
        json!({"content": null}),
        json!({"content": 7}),
        json!({"content": "a\u{0}b"}),
    ] {
        let (status, answer) = answer(app.request(Method::PUT, "/v1/memory").json(&body)).await;
        assert_eq!(
            (status.as_u16(), &answer["code"]),
            (400, &json!("bad_request")),
            "{body}"
        );
    }
    let (status, body) = save(&app, "/v1/memory", &"x".repeat(256 * 1024 + 1)).await;
    assert_eq!(status, 400, "{body}");
    assert!(body["error"].as_str().unwrap().contains("256 KiB"));
    assert_eq!(
        save(&app, "/v1/memory", &"x".repeat(256 * 1024)).await.0,
        200
    );
    assert_eq!(save(&app, "/v1/memory", "before").await.0, 200);
    assert_eq!(save(&app, "/v1/memory/agent/a%20name", "x").await.0, 400);
}

#[tokio::test]
async fn every_turn_of_an_agent_begins_with_its_memories() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    app.agent("other").await;
    let other_process = app.another_process().await;
    let system = || {
        app.upstream.asked().last().unwrap()["messages"][0]["content"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let chat = |agent: &str| {
        app.chat(json!({"agent": agent, "messages": [{"role": "user", "content": "hi"}]}))
    };
    app.upstream.will_say("hello");
    answer(chat("noor")).await;
    assert!(!system().contains("memory>"), "{}", system());

    save(&app, "/v1/memory", "Dates are ISO").await;
    save(&app, "/v1/memory/agent/noor", "Likes tea").await;
    app.upstream.will_say("hello");
    answer(chat("noor")).await;
    assert!(
        system().ends_with("<shared-memory>\nDates are ISO\n</shared-memory>\n\n<agent-memory>\nLikes tea\n</agent-memory>"),
        "{}",
        system()
    );
    app.upstream.will_say("hello");
    answer(chat("other")).await;
    assert!(
        system().contains("Dates are ISO") && !system().contains("tea"),
        "{}",
        system()
    );

    // Another process, warm with the old text, sees a change within a second.
    let there = || {
        app.client
            .post(format!("{other_process}/v1/chat/completions"))
            .bearer_auth(&app.live)
            .json(&json!({"agent": "other", "messages": [{"role": "user", "content": "hi"}]}))
    };
    app.upstream.will_say("hello");
    answer(there()).await;
    assert!(system().contains("Dates are ISO"));
    save(&app, "/v1/memory", "Dates are Roman").await;
    eventually("the other process sees the new memory", || async {
        app.upstream.will_say("hello");
        answer(there()).await;
        system().contains("Dates are Roman")
    })
    .await;
}

#[tokio::test]
async fn an_agent_at_work_reads_what_another_process_wrote_a_moment_ago() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    let other_process = app.another_process().await;
    app.upstream.answers(|request| {
        Reply::Stream(if results(request) == 0 {
            called(&[("c", "memory_get", &["{\"scope\":\"shared\"}"])])
        } else {
            said("Done.")
        })
    });
    for round in 0..5 {
        let content = format!("Dates are {round}");
        let saved = app
            .client
            .put(format!("{other_process}/v1/memory"))
            .bearer_auth(&app.live)
            .json(&json!({"content": content}));
        assert_eq!(answer(saved).await.0, 200);
        let id = app.task("t", json!({"assignTo": "noor"})).await;
        app.until(&id, "done").await;
        let asked = app.upstream.asked();
        let messages = &asked.last().unwrap()["messages"];
        let system = messages[0]["content"].as_str().unwrap();
        assert!(system.contains(&content), "{system}");
        let result = messages.as_array().unwrap().last().unwrap();
        assert_eq!(result["content"], content);
    }
}

#[tokio::test]
async fn an_agents_id_stands_for_its_name() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    let agent = answer(app.get("/v1/agents/noor")).await.1;
    let path = format!("/v1/memory/agent/{}", agent["id"].as_str().unwrap());
    let saved = app
        .request(Method::PUT, &path)
        .json(&json!({"content": "x"}));
    assert_eq!(
        answer(saved).await.1,
        json!({"saved": true, "agent": "noor"})
    );
    for path in [path.as_str(), "/v1/memory/agent/noor"] {
        let memory = answer(app.get(path)).await.1;
        assert_eq!(
            (&memory["content"], &memory["agent"]),
            (&json!("x"), &json!("noor"))
        );
    }
    let array = app.request(Method::PUT, "/v1/memory").json(&json!(["x"]));
    let (status, body) = answer(array).await;
    assert_eq!(status, 400);
    assert!(body["error"].as_str().unwrap().contains("object"), "{body}");
}
