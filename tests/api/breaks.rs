//! A provider that breaks off in the middle: what was done before is not done again.

use serde_json::{Value, json};

use crate::harness::{Reply, TestApp, answer, called, chunk, ending, frames, said, spoken};

async fn start() -> TestApp {
    let app = TestApp::start_with(&["--retry-backoff-ms", "1"]).await;
    app.agent("noor").await;
    app
}

fn appends() -> Reply {
    Reply::Stream(called(&[(
        "c1",
        "memory_append",
        &["{\"content\":\"seen\"}"],
    )]))
}

#[tokio::test]
async fn a_step_that_is_broken_off_is_asked_for_again_and_the_steps_before_it_stand() {
    let app = start().await;
    let overloaded = || Reply::Plain(503, vec![], "{}".to_owned());
    let busy = || Reply::Plain(429, vec![("retry-after", "0.01")], "{}".to_owned());
    for (number, breaks) in [
        vec![Reply::Cut(vec![chunk(
            &json!({"content": "Half a "}),
            None,
        )])],
        vec![overloaded(), overloaded(), overloaded()],
        vec![busy(), busy(), busy()],
    ]
    .into_iter()
    .enumerate()
    {
        let before = app.upstream.asked().len();
        let broken = breaks.len();
        app.upstream.will(appends());
        for reply in breaks {
            app.upstream.will(reply);
        }
        app.upstream.will_say("Done.");
        let id = app.task(&format!("t{number}"), json!({})).await;
        let task = app.until(&id, "done").await;
        assert_eq!(task["retries"], 0, "{task}");
        assert_eq!(task["result"]["stdout"], "Done.");
        assert_eq!(app.upstream.asked().len() - before, broken + 2);
        let memory = answer(app.get("/v1/memory/agent/noor")).await.1;
        let lines = memory["content"].as_str().unwrap().matches("seen").count();
        assert_eq!(lines, number + 1, "{memory}");
    }
}

#[tokio::test]
async fn a_provider_that_goes_on_breaking_off_ends_the_attempt_with_its_cause() {
    let app = start().await;
    app.upstream.answers(|request| {
        match request["messages"].as_array().unwrap().last().unwrap()["role"].as_str() {
            Some("tool") => Reply::Cut(vec![chunk(&json!({"content": "Half a "}), None)]),
            _ => appends(),
        }
    });
    let id = app.task("t", json!({"maxRetries": 0})).await;
    let task = app.until(&id, "failed").await;
    assert_eq!(task["result"]["reason"], "error");
    // The first step, and four tries of the second.
    assert_eq!(app.upstream.asked().len(), 5);
}

#[tokio::test]
async fn a_chat_is_asked_again_before_its_first_word_and_not_after_it() {
    let app = start().await;
    let hello = |stream: bool| json!({"agent": "noor", "stream": stream, "messages": [{"role": "user", "content": "Hi"}]});
    app.upstream.will(Reply::Cut(vec![chunk(
        &json!({"role": "assistant", "content": ""}),
        None,
    )]));
    app.upstream.will_say("Hello.");
    let text = app.chat(hello(true)).send().await.unwrap().text().await;
    assert_eq!(spoken(&frames(&text.unwrap())), "Hello.");
    app.upstream
        .will(Reply::Cut(vec![chunk(&json!({"content": "Half"}), None)]));
    let text = app.chat(hello(true)).send().await.unwrap().text().await;
    assert!(text.unwrap().contains("provider_error"));
    assert_eq!(app.upstream.asked().len(), 3);
}

#[tokio::test]
async fn what_is_said_before_a_tool_is_no_part_of_a_streamed_json_answer() {
    let app = start().await;
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}});
    let hello = json!({"agent": "noor", "stream": true, "response_format": format, "messages": [{"role": "user", "content": "Hi"}]});
    let mut reply = vec![
        chunk(&json!({"content": "I look "}), None),
        chunk(&json!({"content": "first."}), None),
    ];
    reply.extend(called(&[("c1", "memory_get", &["{}"])]));
    app.upstream.will(Reply::Stream(reply));
    app.upstream.will_say("{\"a\": 1}");
    let text = app.chat(hello.clone()).send().await.unwrap().text().await;
    assert_eq!(spoken(&frames(&text.unwrap())), "{\"a\": 1}");
    // The answer itself is told as it comes, and told though it is none.
    let pieces = [" {\"a\"", ": 1}"].map(|piece| chunk(&json!({"content": piece}), None));
    let reply = pieces.into_iter().chain(ending("stop")).collect();
    app.upstream.will(Reply::Stream(reply));
    let text = app
        .chat(hello.clone())
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    let words: Vec<Value> = frames(&text)
        .into_iter()
        .filter(|frame| frame["choices"][0]["delta"]["content"].is_string())
        .collect();
    assert!(words.len() >= 2, "{text}");
    app.upstream.will(Reply::Stream(said("No JSON at all.")));
    let text = app.chat(hello).send().await.unwrap().text().await.unwrap();
    assert_eq!(spoken(&frames(&text)), "No JSON at all.", "{text}");
    assert!(text.contains("it is not JSON"), "{text}");
}

#[tokio::test]
async fn a_rest_that_a_provider_is_given_is_no_silence_of_the_run() {
    let app = TestApp::start_with(&["--retry-backoff-ms", "2000"]).await;
    app.agent("noor").await;
    let quick = json!({"staleThreshold": 400});
    assert_eq!(answer(app.patch("/v1/config", quick)).await.0, 200);
    app.upstream.will(appends());
    app.upstream.will(Reply::Cut(vec![chunk(
        &json!({"content": "Half a "}),
        None,
    )]));
    app.upstream.will_say("Done.");
    let id = app.task("t", json!({"maxRetries": 0})).await;
    let task = app.until(&id, "done").await;
    assert_eq!(task["result"]["reason"], "finished");
    assert!(app.events("agent:stale").await.is_empty());
}
