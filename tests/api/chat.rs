use std::time::Duration;

use futures::StreamExt;
use serde_json::{Value, json};
use sqlx::Connection;

use crate::harness::{Reply, TestApp, answer, called, chunk, eventually, frames, said, spoken};

fn hello(agent: &str) -> Value {
    json!({"agent": agent, "messages": [{"role": "user", "content": "Hello"}]})
}

fn streamed(mut body: Value) -> Value {
    body["stream"] = json!(true);
    body
}

#[tokio::test]
async fn a_plain_answer_is_openais_object_and_is_stored() {
    let app = TestApp::start().await;
    app.agent("writer").await;
    app.upstream.will_say("Good day to you");
    let response = app.chat(hello("writer")).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let session = response.headers()["x-session-id"]
        .to_str()
        .unwrap()
        .to_owned();
    assert!(
        response.headers()["x-polpo-run-id"]
            .to_str()
            .unwrap()
            .starts_with("run_")
    );
    let mut body: Value = response.json().await.unwrap();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    body["id"] = json!("id");
    body["created"] = json!(0);
    body["system_fingerprint"] = json!("fp");
    assert_eq!(
        body,
        json!({"id": "id", "object": "chat.completion", "created": 0, "model": "writer", "system_fingerprint": "fp",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "Good day to you", "refusal": null}, "logprobs": null, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18,
                "prompt_tokens_details": {"cached_tokens": 3}, "completion_tokens_details": {"reasoning_tokens": 2}}})
    );
    let (_, stored) = answer(app.get(&format!("/v1/chat/sessions/{session}/messages"))).await;
    assert_eq!(stored["session"]["title"], "Hello");
    assert_eq!(stored["session"]["agent"], "writer");
    assert_eq!(stored["messages"][0]["content"], "Hello");
    assert_eq!(stored["messages"][1]["content"], "Good day to you");
}

#[tokio::test]
async fn a_stream_says_the_role_the_words_the_reason_the_usage_and_done() {
    let app = TestApp::start().await;
    app.agent("writer").await;
    app.upstream.will_say("one two three");
    let mut body = streamed(hello("writer"));
    body["stream_options"] = json!({"include_usage": true});
    let response = app.chat(body).send().await.unwrap();
    assert!(
        response.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/event-stream")
    );
    let session = response.headers()["x-session-id"]
        .to_str()
        .unwrap()
        .to_owned();
    let text = response.text().await.unwrap();
    assert!(text.lines().all(|line| line.is_empty()
        || line.starts_with("data: ")
        || line.starts_with(": keep-alive")));
    let frames = frames(&text);
    assert_eq!(frames[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(spoken(&frames), "one two three");
    let usage = frames.last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["total_tokens"], 18);
    assert_eq!(
        frames[frames.len() - 2]["choices"][0]["finish_reason"],
        "stop"
    );
    // [DONE] was read, so it is stored.
    let (_, stored) = answer(app.get(&format!("/v1/chat/sessions/{session}/messages"))).await;
    assert_eq!(stored["messages"][1]["content"], "one two three");
}

#[tokio::test]
async fn the_model_reads_the_agent_the_callers_context_and_the_conversation() {
    let app = TestApp::start().await;
    let agent = json!({"name": "noor", "role": "Writer", "model": "openai:gpt-x", "systemPrompt": "Be brief.", "identity": {"tone": "Plain"}});
    answer(app.post("/v1/agents", agent)).await;
    app.upstream.will_say("ok");
    let body = json!({"model": "noor", "temperature": 0.2, "top_p": 1, "max_tokens": 50, "stop": "END", "seed": 4, "presence_penalty": 0,
        "user": "u1", "messages": [
        {"role": "system", "content": "The reader is a child."},
        {"role": "developer", "content": [{"type": "text", "text": "Use metric units."}]},
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}}]}]});
    assert_eq!(answer(app.chat(body)).await.0, 200);
    let asked = app.upstream.asked().remove(0);
    assert_eq!(asked["model"], "gpt-x");
    assert_eq!(asked["temperature"], 0.2);
    assert_eq!(asked["max_completion_tokens"], 50);
    assert_eq!(asked["stop"], json!(["END"]));
    assert_eq!(asked["seed"], 4);
    assert!(asked.get("top_p").is_none() && asked.get("presence_penalty").is_none());
    assert_eq!(
        asked["messages"],
        json!([
            {"role": "system", "content": "You are noor. Your role: Writer.\nTone: Plain\n\nBe brief.\n\nThe reader is a child.\n\nUse metric units."},
            {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]}
        ])
    );
    assert_eq!(
        app.upstream.headers()[0]["authorization"],
        "Bearer server-key"
    );
}

#[tokio::test]
async fn a_session_is_continued_with_the_new_message_alone_or_with_all_of_them() {
    let app = TestApp::start().await;
    app.agent("writer").await;
    app.upstream.will_say("first answer");
    let session = app.chat(hello("writer")).send().await.unwrap().headers()["x-session-id"]
        .to_str()
        .unwrap()
        .to_owned();
    let go_on = |messages: Value| {
        app.chat(json!({"agent": "writer", "messages": messages}))
            .header("x-session-id", &session)
    };

    app.upstream.will_say("second answer");
    assert_eq!(
        go_on(json!([{"role": "user", "content": "More"}]))
            .send()
            .await
            .unwrap()
            .headers()["x-session-id"],
        session.as_str()
    );
    app.upstream.will_say("third answer");
    let whole = json!([
        {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "first answer, edited"},
        {"role": "user", "content": "And more"}]);
    answer(go_on(whole.clone())).await;

    let asked = app.upstream.asked();
    let heard = |turn: usize| asked[turn]["messages"].as_array().unwrap()[1..].to_vec();
    assert_eq!(heard(1), json!([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "first answer"}, {"role": "user", "content": "More"}]).as_array().unwrap().clone());
    assert_eq!(heard(2), whole.as_array().unwrap().clone());
    let (_, stored) = answer(app.get(&format!("/v1/chat/sessions/{session}/messages"))).await;
    let said: Vec<&str> = stored["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|message| message["content"].as_str().unwrap())
        .collect();
    assert_eq!(
        said,
        [
            "Hello",
            "first answer",
            "More",
            "second answer",
            "And more",
            "third answer"
        ]
    );
    assert_eq!(stored["session"]["messageCount"], 6);

    for unknown in ["sess_01a20d0d0f4f71ef9b057aa524c34b0e", "nonsense"] {
        let (status, body) =
            answer(app.chat(hello("writer")).header("x-session-id", unknown)).await;
        assert_eq!(
            (status.as_u16(), body["error"].as_str().unwrap()),
            (404, format!("Session \"{unknown}\" not found").as_str())
        );
    }
    app.upstream.will_say("fresh");
    let fresh = app
        .chat(hello("writer"))
        .header("x-session-id", "new")
        .send()
        .await
        .unwrap();
    assert_ne!(fresh.headers()["x-session-id"], session.as_str());
}

#[tokio::test]
async fn client_tools_go_out_in_pieces_and_their_results_come_back() {
    let app = TestApp::start().await;
    app.agent("weather").await;
    let tools = json!([
        {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}},
        {"type": "function", "function": {"name": "now"}}]);
    let mut body = streamed(hello("weather"));
    body["tools"] = tools.clone();
    body["tool_choice"] = json!({"type": "function", "function": {"name": "get_weather"}});
    body["parallel_tool_calls"] = json!(true);
    app.upstream.will(Reply::Stream(called(&[
        ("call_1", "get_weather", &["{\"ci", "ty\":\"Turin\"}"]),
        ("call_2", "now", &["{}"]),
    ])));
    let response = app.chat(body.clone()).send().await.unwrap();
    let session = response.headers()["x-session-id"]
        .to_str()
        .unwrap()
        .to_owned();
    let frames = frames(&response.text().await.unwrap());
    assert_eq!(
        frames[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": null})
    );
    let calls: Vec<&Value> = frames
        .iter()
        .filter_map(|frame| frame["choices"][0]["delta"]["tool_calls"].get(0))
        .collect();
    assert_eq!(
        *calls[0],
        json!({"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ""}})
    );
    assert_eq!(
        *calls[1],
        json!({"index": 0, "function": {"arguments": "{\"ci"}})
    );
    assert_eq!(
        *calls[3],
        json!({"index": 1, "id": "call_2", "type": "function", "function": {"name": "now", "arguments": ""}})
    );
    assert_eq!(
        frames.last().unwrap()["choices"][0]["finish_reason"],
        "tool_calls"
    );
    let asked = app.upstream.asked().remove(0);
    assert_eq!(asked["tools"][0], tools[0]);
    assert_eq!(asked["tool_choice"]["function"]["name"], "get_weather");

    // The results alone, in the session.
    app.upstream.will_say("21 degrees");
    let results = json!({"agent": "weather", "tools": tools, "messages": [
        {"role": "tool", "tool_call_id": "call_1", "content": "21"}, {"role": "tool", "tool_call_id": "call_2", "content": "noon"}]});
    let (status, body) = answer(app.chat(results).header("x-session-id", &session)).await;
    assert_eq!(
        (
            status.as_u16(),
            body["choices"][0]["message"]["content"].as_str()
        ),
        (200, Some("21 degrees"))
    );
    let heard = app.upstream.asked().remove(1);
    assert_eq!(
        heard["messages"][2]["tool_calls"][0]["function"]["arguments"],
        "{\"city\":\"Turin\"}"
    );
    assert_eq!(
        heard["messages"][3],
        json!({"role": "tool", "tool_call_id": "call_1", "content": "21"})
    );
    let (_, stored) = answer(app.get(&format!("/v1/chat/sessions/{session}/messages"))).await;
    assert_eq!(
        stored["messages"][1]["toolCalls"][0],
        json!({"id": "call_1", "name": "get_weather", "arguments": {"city": "Turin"}, "result": "21", "state": "completed"})
    );
    assert_eq!(stored["messages"][2]["content"], "21 degrees");
}

#[tokio::test]
async fn a_plain_answer_of_the_wrong_format_is_repaired_once_and_then_refused() {
    let app = TestApp::start().await;
    app.agent("json").await;
    let mut body = hello("json");
    body["response_format"] = json!({"type": "json_schema", "json_schema": {"name": "city", "strict": true,
        "schema": {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}}});
    app.upstream.will_say("{\"town\":1}");
    app.upstream.will_say("{\"city\": \"Turin\"}");
    let (status, answered) = answer(app.chat(body.clone())).await;
    assert_eq!(
        (
            status.as_u16(),
            answered["choices"][0]["message"]["content"].as_str()
        ),
        (200, Some("{\"city\": \"Turin\"}"))
    );
    assert_eq!(
        answered["usage"]["total_tokens"], 36,
        "both calls are paid for"
    );
    let asked = app.upstream.asked();
    assert_eq!(asked[0]["response_format"]["json_schema"]["name"], "city");
    assert_eq!(asked[1]["messages"].as_array().unwrap().len(), 4);

    app.upstream.will_say("not json");
    app.upstream.will_say("still not");
    let (status, refused) = answer(app.chat(body.clone())).await;
    assert_eq!(
        (status.as_u16(), refused["code"].as_str()),
        (502, Some("provider_error"))
    );

    // A stream cannot be taken back: it ends in the error frame.
    app.upstream.will_say("not json");
    let frames = frames(
        &app.chat(streamed(body))
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap(),
    );
    assert_eq!(frames.last().unwrap()["error"]["code"], "provider_error");

    let mut remote = hello("json");
    remote["response_format"] = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1:9/schema.json"}}});
    assert_eq!(answer(app.chat(remote)).await.0, 400);
}

#[tokio::test]
async fn what_cannot_be_honoured_is_refused_by_name() {
    let app = TestApp::start().await;
    app.agent("a").await;
    let user = json!([{"role": "user", "content": "hi"}]);
    for (change, needle) in [
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (
            json!({"messages": [{"role": "wizard", "content": "hi"}]}),
            "messages[0].role",
        ),
        (
            json!({"messages": [{"role": "user"}]}),
            "messages[0].content",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "video"}]}]}),
            "messages[0].content[0]",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "file", "file_id": "a"}]}]}),
            "File parts",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]}),
            "https",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "x"}]}),
            "tool_call_id",
        ),
        (json!({"messages": "hi"}), "read"),
        (json!({"temperature": 3}), "temperature"),
        (json!({"top_p": -1}), "top_p"),
        (json!({"n": 2}), "`n`"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (
            json!({"max_tokens": 5, "max_completion_tokens": 6}),
            "max_tokens",
        ),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"functions": [{"name": "f"}]}), "functions"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (
            json!({"tools": [{"type": "function", "function": {"name": "bad name"}}]}),
            "name",
        ),
        (
            json!({"tools": [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "F"}}]}),
            "repeats",
        ),
        (
            json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}),
            "parameters",
        ),
        (
            json!({"response_format": {"type": "xml"}}),
            "response_format",
        ),
        (json!({"reasoning_effort": "galactic"}), "reasoning_effort"),
        (json!({"metadata": {"a": 1}}), "metadata"),
        (json!({"agent": null}), "agent"),
    ] {
        let mut body = json!({"agent": "a", "messages": user});
        body.as_object_mut()
            .unwrap()
            .extend(change.as_object().unwrap().clone());
        let (status, body) = answer(app.chat(body)).await;
        assert_eq!(
            (status.as_u16(), body["code"].as_str()),
            (400, Some("bad_request")),
            "{change}"
        );
        assert!(
            body["error"].as_str().unwrap().contains(needle),
            "{change}: {body}"
        );
    }
    assert!(app.upstream.asked().is_empty());
    // OpenAI's defaults, nulls and unknown members are no trouble.
    app.upstream.will_say("ok");
    let lenient = json!({"agent": "a", "messages": user, "n": 1, "logprobs": false, "top_logprobs": 0, "tools": [], "tool_choice": "auto",
        "temperature": null, "stop": null, "response_format": {"type": "text"}, "functions": null, "store": true, "service_tier": "auto", "unheard_of": {}});
    assert_eq!(answer(app.chat(lenient)).await.0, 200);
}

#[tokio::test]
async fn an_unknown_agent_is_404_in_the_shape_that_each_caller_reads() {
    let app = TestApp::start().await;
    let flat = json!({"error": "Agent \"ghost\" not found", "code": "not_found"});
    assert_eq!(
        answer(app.chat(hello("ghost"))).await,
        (reqwest::StatusCode::NOT_FOUND, flat)
    );
    for (header, value) in [
        ("x-stainless-lang", "python"),
        ("user-agent", "ai-sdk/openai-compatible/3.0"),
        ("user-agent", "OpenAI/JS 7"),
        ("user-agent", "ai/7"),
    ] {
        let (status, body) = answer(app.chat(hello("ghost")).header(header, value)).await;
        assert_eq!(status, 404);
        assert_eq!(body["error"]["message"], "Agent \"ghost\" not found");
        assert_eq!(body["error"]["type"], "not_found_error");
        assert_eq!(body["code"], "not_found");
    }
    let (_, native) = answer(
        app.get("/v1/agents/ghost")
            .header("x-stainless-lang", "python"),
    )
    .await;
    assert!(native["error"].is_string());
}

/// The newest session's messages, once there are some.
async fn newest_messages(app: &TestApp) -> Value {
    let newest = || async {
        let (_, list) = answer(app.get("/v1/chat/sessions?limit=1")).await;
        list["sessions"][0]["id"].as_str().map(str::to_owned)
    };
    eventually("the turn is stored", || async { newest().await.is_some() }).await;
    let path = format!("/v1/chat/sessions/{}/messages", newest().await.unwrap());
    answer(app.get(&path)).await.1["messages"].take()
}

#[tokio::test]
async fn a_reader_that_leaves_stops_the_model_and_what_was_said_is_kept() {
    let app = TestApp::start().await;
    app.agent("writer").await;
    let mut words = said("half an answer ");
    words.truncate(4);
    app.upstream.will(Reply::Hang(words));
    let mut pieces = app
        .chat(streamed(hello("writer")))
        .send()
        .await
        .unwrap()
        .bytes_stream();
    let mut heard = String::new();
    while !heard.contains("answer") {
        heard.push_str(&String::from_utf8_lossy(
            &pieces.next().await.unwrap().unwrap(),
        ));
    }
    let left = std::time::Instant::now();
    drop(pieces);
    eventually("the upstream is left", || async { app.upstream.was_left() }).await;
    assert!(left.elapsed() < Duration::from_secs(1));
    let messages = newest_messages(&app).await;
    assert_eq!(messages[1]["content"], "half an answer ");
    assert_eq!(messages[1]["interrupted"], true);
}

#[tokio::test]
async fn a_caller_that_waits_for_a_plain_answer_may_leave_too() {
    let app = TestApp::start().await;
    app.agent("writer").await;
    app.upstream.will(Reply::Hang(vec![]));
    app.chat(hello("writer"))
        .timeout(Duration::from_millis(300))
        .send()
        .await
        .unwrap_err();
    eventually("the upstream is left", || async { app.upstream.was_left() }).await;
    let messages = newest_messages(&app).await;
    assert_eq!(
        (
            messages.as_array().unwrap().len(),
            messages[0]["content"].as_str()
        ),
        (1, Some("Hello"))
    );
}

#[tokio::test]
async fn nul_characters_do_not_break_the_store() {
    let app = TestApp::start().await;
    app.agent("writer").await;
    app.upstream.will(Reply::Stream(
        [
            vec![chunk(&json!({"content": "a\u{0}b"}), None)],
            crate::harness::ending("stop"),
        ]
        .concat(),
    ));
    let (status, body) = answer(app.chat(hello("writer"))).await;
    assert_eq!(
        (
            status.as_u16(),
            body["choices"][0]["message"]["content"].as_str()
        ),
        (200, Some("a\u{0}b"))
    );
    let asked = json!({"agent": "writer", "messages": [{"role": "user", "content": "x\u{0}y"}], "user": "u\u{0}", "metadata": {"k": "\u{0}"}});
    let (status, _) = answer(app.chat(asked)).await;
    assert_eq!(status, 400);
    let (status, _) = answer(app.post("/v1/agents", json!({"name": "n", "role": "x\u{0}"}))).await;
    assert_eq!(status, 400);
    // A backslash before the letters u0000 is just text.
    app.upstream.will_say("ok");
    let text = json!({"agent": "writer", "messages": [{"role": "user", "content": "\\u0000"}]});
    assert_eq!(answer(app.chat(text)).await.0, 200);
}

#[tokio::test]
async fn echo_needs_no_provider_and_agents_are_models() {
    let app = TestApp::start().await;
    answer(app.post("/v1/agents", json!({"name": "assistant"}))).await;
    let (status, body) = answer(
        app.chat(json!({"model": "assistant", "messages": [{"role": "user", "content": "hi"}]})),
    )
    .await;
    assert_eq!(status, 200);
    assert!(
        body["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .contains("offline model")
    );
    let (_, models) = answer(app.get("/v1/models")).await;
    assert_eq!(
        (models["object"].as_str(), models["data"][0]["id"].as_str()),
        (Some("list"), Some("assistant"))
    );
    assert_eq!(
        answer(app.get("/v1/models/assistant")).await.1["object"],
        "model"
    );
    assert_eq!(answer(app.get("/v1/models/ghost")).await.0, 404);
}

#[tokio::test]
async fn stopping_lets_streams_end_and_accepts_nothing_new() {
    let app = TestApp::start().await;
    app.agent("writer").await;
    app.upstream.will_say("to the very end");
    let response = app.chat(streamed(hello("writer"))).send().await.unwrap();
    app.stop.cancel();
    assert_eq!(
        spoken(&frames(&response.text().await.unwrap())),
        "to the very end"
    );
    eventually("nothing is accepted", || async {
        reqwest::get(format!("{}/health", app.url)).await.is_err()
    })
    .await;
}

#[tokio::test]
async fn an_answer_that_was_paid_for_outlives_connections_that_have_died() {
    for stream in [false, true] {
        let app = TestApp::start().await;
        app.agent("noor").await;
        // The connections are there, and idle.
        app.upstream.will_say("Hello.");
        assert_eq!(app.chat(hello("noor")).send().await.unwrap().status(), 200);
        app.upstream
            .will(Reply::Slow(Duration::from_millis(600), said("Paid")));
        let mut body = hello("noor");
        body["stream"] = json!(stream);
        let asked = tokio::spawn(app.chat(body).send());
        eventually("the model is asked", async || {
            app.upstream.asked().len() == 2
        })
        .await;
        app.sql(
            "select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and pid <> pg_backend_pid()"
                .to_owned(),
        )
        .await;
        let response = asked.await.unwrap().unwrap();
        assert_eq!(response.status(), 200);
        let text = response.text().await.unwrap();
        assert!(text.contains("Paid") && !text.contains("error"), "{text}");
        let newest = newest_messages(&app).await.to_string();
        assert!(newest.contains("Paid"), "{newest}");
        assert_eq!(app.upstream.asked().len(), 2);
    }
}

#[tokio::test]
async fn a_connection_that_died_while_it_rested_costs_nobody_a_request() {
    let app = TestApp::start().await;
    for _ in 0..3 {
        assert_eq!(answer(app.get("/v1/tasks")).await.0, 200);
    }
    app.sql(
        "select pg_terminate_backend(pid) from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid()"
            .to_owned(),
    )
    .await;
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    for path in ["/v1/tasks", "/v1/tasks", "/v1/memory", "/ready"] {
        assert_eq!(answer(app.get(path)).await.0, 200, "{path}");
    }
}

#[tokio::test]
async fn a_database_that_does_not_answer_is_503_in_time() {
    let app = TestApp::start_with(&["--database-patience-ms", "1000"]).await;
    app.agent("noor").await;
    let mut database = sqlx::PgConnection::connect(&app.database_url)
        .await
        .unwrap();
    let mut held = database.begin().await.unwrap();
    sqlx::query("lock table production.sessions, production.tasks in access exclusive mode")
        .execute(&mut *held)
        .await
        .unwrap();
    let task = json!({"title": "t", "description": "d", "assignTo": "noor", "draft": true});
    for request in [app.get("/v1/tasks"), app.post("/v1/tasks", task)] {
        let (status, body) = answer(request).await;
        assert_eq!(
            (status.as_u16(), &body["code"]),
            (503, &json!("internal_error")),
            "{body}"
        );
    }
    let session = "sess_01a20e9a7fa5709989a9da919772fa8a";
    let continued = app.chat(hello("noor")).header("x-session-id", session);
    assert_eq!(answer(continued).await.0, 503);
    assert!(app.upstream.asked().is_empty());
    held.rollback().await.unwrap();
    assert_eq!(answer(app.get("/v1/tasks")).await.0, 200);
}

#[tokio::test]
async fn a_slow_caller_is_no_slow_database() {
    let app = TestApp::start_with(&["--database-patience-ms", "1000"]).await;
    let body = json!({"content": "x".repeat(100)}).to_string();
    let pieces = body
        .into_bytes()
        .chunks(20)
        .map(<[u8]>::to_vec)
        .collect::<Vec<_>>();
    let slowly = futures::stream::iter(pieces).then(async |piece| {
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok::<_, std::io::Error>(piece)
    });
    let saved = app
        .request(reqwest::Method::PUT, "/v1/memory")
        .header("content-type", "application/json")
        .body(reqwest::Body::wrap_stream(slowly));
    assert_eq!(
        answer(saved).await,
        (reqwest::StatusCode::OK, json!({"saved": true}))
    );
}

#[tokio::test]
async fn a_session_goes_on_after_a_call_that_nobody_answered_or_that_was_cut_off() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    let tool = json!({"type": "function", "function": {"name": "ask", "parameters": {}}});
    let mut first = hello("noor");
    first["tools"] = json!([tool]);
    app.upstream
        .will(Reply::Stream(called(&[("c1", "ask", &["{}"])])));
    let response = app.chat(first.clone()).send().await.unwrap();
    let session = response.headers()["x-session-id"]
        .to_str()
        .unwrap()
        .to_owned();
    // The next time it is cut off in the middle of a call.
    app.upstream.will(Reply::Stream(vec![
        chunk(&json!({"tool_calls": [{"index": 0, "id": "c2", "function": {"name": "ask", "arguments": "{\"a"}}]}), None),
        chunk(&json!({}), Some("length")),
    ]));
    app.upstream.will_say("Here.");
    for _ in 0..2 {
        let next = app.chat(first.clone()).header("x-session-id", &session);
        assert_eq!(answer(next).await.0, 200);
    }
    let asked = app.upstream.asked();
    let roles = |request: &Value| -> Vec<String> {
        let messages = request["messages"].as_array().unwrap();
        let roles = messages
            .iter()
            .map(|message| message["role"].as_str().unwrap());
        roles.map(str::to_owned).collect()
    };
    assert_eq!(
        roles(&asked[1]),
        ["system", "user", "assistant", "tool", "user"]
    );
    assert_eq!(asked[1]["messages"][3]["tool_call_id"], "c1");
    assert_eq!(
        roles(&asked[2]),
        [
            "system",
            "user",
            "assistant",
            "tool",
            "user",
            "assistant",
            "user"
        ]
    );
    assert_eq!(asked[2]["messages"][5].get("tool_calls"), None);
}

#[tokio::test]
async fn what_is_nested_too_deep_to_be_read_again_is_refused() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    let deep = |depth: usize| "{\"a\":".repeat(depth) + "1" + &"}".repeat(depth);
    for (depth, expected) in [(60, 201), (126, 400)] {
        let body = format!(
            r#"{{"title":"t{depth}","description":"d","assignTo":"noor","draft":true,"notifications":{}}}"#,
            deep(depth)
        );
        let request = app
            .request(reqwest::Method::POST, "/v1/tasks")
            .header("content-type", "application/json")
            .body(body);
        assert_eq!(answer(request).await.0, expected, "{depth}");
    }
    assert_eq!(answer(app.get("/v1/tasks")).await.0, 200);
}
