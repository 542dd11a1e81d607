//! Tools that the server runs for its agents.

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{
    Reply, TestApp, answer, called, chunk, ending, eventually, frames, said, spoken,
};

async fn ask(app: &TestApp, stream: bool) -> (u16, String, String) {
    let response = app
        .chat(json!({"agent": "noor", "stream": stream, "messages": [{"role": "user", "content": "hi"}]}))
        .send()
        .await
        .unwrap();
    let status = response.status().as_u16();
    let session = response
        .headers()
        .get("x-session-id")
        .map(|id| id.to_str().unwrap().to_owned());
    (
        status,
        session.unwrap_or_default(),
        response.text().await.unwrap(),
    )
}

/// What a stream tells of a tool in the end.
async fn last_tool(app: &TestApp) -> Value {
    let (_, _, text) = ask(app, true).await;
    let mut told = frames(&text)
        .into_iter()
        .map(|frame| frame["choices"][0]["tool_call"].clone());
    told.rfind(Value::is_object).unwrap()
}

async fn own_memory(app: &TestApp) -> String {
    let body = answer(app.get("/v1/memory/agent/noor")).await.1;
    body["content"].as_str().unwrap().to_owned()
}

/// The tools that the model was shown last.
fn shown(app: &TestApp) -> Vec<String> {
    let asked = app.upstream.asked();
    let tools = asked.last().unwrap()["tools"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    tools
        .iter()
        .map(|tool| tool["function"]["name"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn a_stream_shows_a_tool_at_work_and_then_the_answer() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    app.upstream.will(Reply::Stream(called(&[(
        "call_1",
        "memory_save",
        &["{\"content\":", "\"Likes tea\"}"],
    )])));
    app.upstream.will_say("I will remember that.");
    let (status, session, text) = ask(&app, true).await;
    assert_eq!(status, 200);
    let frames = frames(&text);
    let tools: Vec<&Value> = frames
        .iter()
        .map(|frame| &frame["choices"][0]["tool_call"])
        .filter(|tool| tool.is_object())
        .collect();
    assert_eq!(
        tools,
        [
            &json!({"id": "call_1", "name": "memory_save", "state": "preparing"}),
            &json!({"id": "call_1", "name": "memory_save", "state": "calling", "arguments": {"content": "Likes tea"}}),
            &json!({"id": "call_1", "name": "memory_save", "state": "completed", "arguments": {"content": "Likes tea"}, "result": "Saved."}),
        ]
    );
    assert!(
        frames
            .iter()
            .all(|frame| frame["choices"][0]["delta"].get("tool_calls").is_none())
    );
    assert_eq!(frames[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(spoken(&frames), "I will remember that.");
    assert_eq!(
        frames.last().unwrap()["choices"][0]["finish_reason"],
        "stop"
    );
    assert_eq!(own_memory(&app).await, "Likes tea");

    let asked = app.upstream.asked();
    assert_eq!(asked.len(), 2);
    let told = asked[1]["messages"].as_array().unwrap();
    assert_eq!(told[told.len() - 2]["tool_calls"][0]["id"], "call_1");
    assert_eq!(
        told[told.len() - 1],
        json!({"role": "tool", "tool_call_id": "call_1", "content": "Saved."})
    );

    // The session goes on with all of it.
    app.upstream.will_say("Tea.");
    let request = app.chat(
        json!({"agent": "noor", "messages": [{"role": "user", "content": "What do I like?"}]}),
    );
    assert_eq!(answer(request.header("x-session-id", session)).await.0, 200);
    let roles: Vec<String> = app.upstream.asked()[2]["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|message| message["role"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(
        roles,
        ["system", "user", "assistant", "tool", "assistant", "user"]
    );
}

#[tokio::test]
async fn a_plain_answer_holds_what_was_said_before_and_after_a_tool_and_the_usage_of_both_calls() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    let mut first = vec![chunk(
        &json!({"role": "assistant", "content": "Let me look."}),
        None,
    )];
    first.push(chunk(&json!({"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "memory_get", "arguments": "{}"}}]}), None));
    first.extend(ending("tool_calls"));
    app.upstream.will(Reply::Stream(first));
    app.upstream.will_say("Nothing there.");
    let (status, _, text) = ask(&app, false).await;
    let body: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(status, 200, "{body}");
    let message = &body["choices"][0]["message"];
    assert_eq!(message["content"], "Let me look.\n\nNothing there.");
    assert!(message.get("tool_calls").is_none());
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["usage"]["total_tokens"], 36);
}

#[tokio::test]
async fn the_servers_tools_run_and_the_callers_go_out() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    app.upstream.will(Reply::Stream(called(&[
        (
            "call_1",
            "memory_append",
            &["{\"content\":\"asked for stock\"}"],
        ),
        ("call_2", "get_stock", &["{\"sku\":", "\"A7\"}"]),
    ])));
    let tool = json!([{"type": "function", "function": {"name": "get_stock", "parameters": {"type": "object"}}}]);
    let ask = json!({"agent": "noor", "stream": true, "tools": tool, "messages": [{"role": "user", "content": "A7?"}]});
    let response = app.chat(ask).send().await.unwrap();
    let session = response.headers()["x-session-id"]
        .to_str()
        .unwrap()
        .to_owned();
    let frames = frames(&response.text().await.unwrap());
    let calls: Vec<&Value> = frames
        .iter()
        .filter_map(|frame| frame["choices"][0]["delta"]["tool_calls"].as_array())
        .flatten()
        .collect();
    assert_eq!(calls[0]["index"], 0, "{calls:?}");
    assert_eq!(calls[0]["id"], "call_2");
    let arguments: String = calls
        .iter()
        .filter_map(|call| call["function"]["arguments"].as_str())
        .collect();
    assert_eq!(arguments, "{\"sku\":\"A7\"}");
    assert_eq!(
        frames.last().unwrap()["choices"][0]["finish_reason"],
        "tool_calls"
    );
    assert!(
        own_memory(&app).await.ends_with("Z] asked for stock\n"),
        "{}",
        own_memory(&app).await
    );

    app.upstream.will_say("There are 3.");
    let result = json!({"agent": "noor", "tools": tool, "messages": [{"role": "tool", "tool_call_id": "call_2", "content": "3"}]});
    let (status, body) = answer(app.chat(result).header("x-session-id", session)).await;
    assert_eq!(status, 200, "{body}");
    let told = app.upstream.asked()[1]["messages"].clone();
    let results: Vec<(&Value, &Value)> = told
        .as_array()
        .unwrap()
        .iter()
        .filter(|message| message["role"] == "tool")
        .map(|message| (&message["tool_call_id"], &message["content"]))
        .collect();
    assert_eq!(
        results,
        [
            (&json!("call_1"), &json!("Saved.")),
            (&json!("call_2"), &json!("3"))
        ]
    );
}

#[tokio::test]
async fn allowed_tools_decides_what_the_model_sees_and_may_call() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    let cases = [
        (Value::Null, 4),
        (json!([]), 0),
        (json!(["memory_*"]), 4),
        (json!(["memory_get", "read"]), 1),
        (json!(["*"]), 5),
        (json!(["http_fetch", "memory_get"]), 2),
        (json!(["memory_get*"]), 1),
    ];
    for (allowed, count) in cases {
        answer(app.patch("/v1/agents/noor", json!({"allowedTools": allowed}))).await;
        app.upstream.will_say("hello");
        assert_eq!(ask(&app, false).await.0, 200);
        assert_eq!(shown(&app).len(), count, "{allowed}");
    }
    assert_eq!(shown(&app), ["memory_get"]);

    for (name, arguments, expected) in [
        (
            "memory_save",
            "{\"content\":\"x\"}",
            "no tool `memory_save`",
        ),
        ("rm", "{}", "no tool `rm`"),
        ("memory_get", "{\"scope\":", "cannot be used"),
        ("memory_get", "{\"scope\":\"all\"}", "cannot be used"),
    ] {
        app.upstream
            .will(Reply::Stream(called(&[("c", name, &[arguments])])));
        app.upstream.will_say("I cannot.");
        let last = last_tool(&app).await;
        assert_eq!(last["state"], "error");
        let (_, sessions) = answer(app.get("/v1/chat/sessions?limit=1")).await;
        let session = sessions["sessions"][0]["id"].as_str().unwrap();
        let path = format!("/v1/chat/sessions/{session}/messages");
        let (_, stored) = answer(app.get(&path)).await;
        let call = &stored["messages"][1]["toolCalls"][0];
        assert_eq!(
            (&call["state"], &call["result"]),
            (&json!("error"), &last["result"])
        );
        assert!(
            last["result"].as_str().unwrap().contains(expected),
            "{last}"
        );
        let told = app.upstream.asked().last().unwrap()["messages"]
            .as_array()
            .unwrap()
            .last()
            .unwrap()
            .clone();
        assert!(
            told["content"].as_str().unwrap().contains(expected),
            "{told}"
        );
    }
    assert_eq!(own_memory(&app).await, "");
}

#[tokio::test]
async fn the_memory_tools_read_add_and_replace_in_both_memories() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    let shared = json!({"content": "Dates are ISO. Dates matter."});
    answer(app.request(Method::PUT, "/v1/memory").json(&shared)).await;
    for (name, arguments, state, result) in [
        ("memory_get", json!({}), "completed", "The memory is empty."),
        (
            "memory_get",
            json!({"scope": "shared"}),
            "completed",
            "Dates are ISO. Dates matter.",
        ),
        (
            "memory_update",
            json!({"scope": "shared", "find": "Dates", "replace": "Days"}),
            "completed",
            "Saved.",
        ),
        (
            "memory_get",
            json!({"scope": "shared"}),
            "completed",
            "Days are ISO. Days matter.",
        ),
        (
            "memory_update",
            json!({"find": "nothing", "replace": "x"}),
            "error",
            "does not hold that passage",
        ),
        (
            "memory_update",
            json!({"find": "", "replace": "x"}),
            "error",
            "must not be empty",
        ),
        (
            "memory_save",
            json!({"content": "x".repeat(256 * 1024 + 1)}),
            "error",
            "256 KiB",
        ),
        (
            "memory_save",
            json!({"scope": "shared", "content": "a".repeat(200 * 1024)}),
            "completed",
            "Saved.",
        ),
        (
            // More than Postgres could hold in memory.
            "memory_update",
            json!({"scope": "shared", "find": "a", "replace": "b".repeat(8 * 1024)}),
            "error",
            "256 KiB",
        ),
        (
            "memory_append",
            json!({"content": " \n"}),
            "error",
            "nothing to add",
        ),
        (
            "memory_append",
            json!({"content": "a\u{0}b"}),
            "completed",
            "Saved.",
        ),
        (
            "memory_append",
            json!({"content": "second"}),
            "completed",
            "Saved.",
        ),
    ] {
        app.upstream.will(Reply::Stream(called(&[(
            "c",
            name,
            &[&arguments.to_string()],
        )])));
        app.upstream.will_say("done");
        let last = last_tool(&app).await;
        assert_eq!(last["state"], state, "{name}: {}", last["result"]);
        assert!(last["result"].as_str().unwrap().contains(result), "{last}");
    }
    let lines = own_memory(&app).await;
    let lines: Vec<&str> = lines
        .lines()
        .map(|line| line.split_once("] ").unwrap().1)
        .collect();
    assert_eq!(lines, ["a\u{fffd}b", "second"]);
}

#[tokio::test]
async fn a_model_that_only_calls_tools_is_stopped_and_the_caller_told() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    for _ in 0..21 {
        app.upstream
            .will(Reply::Stream(called(&[("c", "memory_get", &["{}"])])));
    }
    let (status, _, text) = ask(&app, false).await;
    assert_eq!(status, 502, "{text}");
    assert!(
        text.contains("over and over") && text.contains("provider_error"),
        "{text}"
    );
    assert_eq!(app.upstream.asked().len(), 20);
}

#[tokio::test]
async fn a_callers_tool_may_not_have_the_name_of_a_servers() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    let tool = json!([{"type": "function", "function": {"name": "memory_get", "parameters": {"type": "object"}}}]);
    let ask =
        json!({"agent": "noor", "tools": tool, "messages": [{"role": "user", "content": "hi"}]});
    let (status, body) = answer(app.chat(ask.clone())).await;
    assert_eq!(
        (status.as_u16(), &body["code"]),
        (400, &json!("bad_request")),
        "{body}"
    );
    answer(app.patch("/v1/agents/noor", json!({"allowedTools": []}))).await;
    app.upstream.will_say("hello");
    assert_eq!(answer(app.chat(ask)).await.0, 200);
}

#[tokio::test]
async fn a_caller_that_leaves_after_a_tool_ran_leaves_a_session_that_goes_on() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    app.upstream.will(Reply::Stream(called(&[(
        "call_1",
        "memory_save",
        &["{\"content\":\"x\"}"],
    )])));
    let beginning = said("one two");
    app.upstream.will(Reply::Hang(beginning[..2].to_vec()));
    let mut response = app
        .chat(json!({"agent": "noor", "stream": true, "messages": [{"role": "user", "content": "hi"}]}))
        .send()
        .await
        .unwrap();
    let session = response.headers()["x-session-id"]
        .to_str()
        .unwrap()
        .to_owned();
    let mut heard = String::new();
    while !heard.contains("one") {
        heard.push_str(std::str::from_utf8(&response.chunk().await.unwrap().unwrap()).unwrap());
    }
    drop(response);
    let path = format!("/v1/chat/sessions/{session}/messages");
    eventually("the turn is recorded", || async {
        answer(app.get(&path)).await.0 == 200
    })
    .await;
    app.upstream.will_say("on we go");
    let request =
        app.chat(json!({"agent": "noor", "messages": [{"role": "user", "content": "go on"}]}));
    assert_eq!(answer(request.header("x-session-id", session)).await.0, 200);
    let told = app.upstream.asked().last().unwrap()["messages"].clone();
    let roles: Vec<&str> = told
        .as_array()
        .unwrap()
        .iter()
        .map(|message| message["role"].as_str().unwrap())
        .collect();
    assert_eq!(
        roles,
        ["system", "user", "assistant", "tool", "assistant", "user"],
        "{told}"
    );
    assert_eq!(told[4]["content"], "one ");
}

/// What `http_fetch` gives the model: its state and result.
async fn fetch(app: &TestApp, arguments: Value) -> (String, String) {
    let last = last_tool(app).await;
    assert_eq!(last["arguments"], arguments);
    (
        last["state"].as_str().unwrap().to_owned(),
        last["result"].as_str().unwrap().to_owned(),
    )
}

fn will_fetch(app: &TestApp, arguments: &Value) {
    let call = called(&[("c", "http_fetch", &[&arguments.to_string()])]);
    app.upstream.will(Reply::Stream(call));
}

#[tokio::test]
async fn http_fetch_returns_status_type_and_body_and_follows_redirects() {
    let app = TestApp::start_with(&["--private-fetches", "true"]).await;
    app.agent("noor").await;
    answer(app.patch("/v1/agents/noor", json!({"allowedTools": ["http_fetch"]}))).await;
    let page = format!("{}/page", app.upstream.url);
    let plain = |status, headers, body: &str| Reply::Plain(status, headers, body.to_owned());

    let get = json!({"url": page});
    will_fetch(&app, &get);
    app.upstream
        .will(plain(302, vec![("location", "/other")], ""));
    app.upstream
        .will(plain(200, vec![("content-type", "text/plain")], "hello"));
    app.upstream.will_say("done");
    let told = fetch(&app, get.clone()).await;
    let expected = "HTTP 200 OK\ncontent-type: text/plain\n\nhello".to_owned();
    assert_eq!(told, ("completed".to_owned(), expected));

    let post = json!({"url": page, "method": "post", "headers": {"content-type": "application/json", "x-a": "b"}, "body": "{\"n\":1}"});
    will_fetch(&app, &post);
    app.upstream.will(plain(404, vec![], &"x".repeat(100_000)));
    app.upstream.will_say("done");
    let (state, result) = fetch(&app, post).await;
    assert_eq!(state, "completed");
    assert!(
        result.starts_with("HTTP 404 Not Found\n"),
        "{}",
        &result[..60]
    );
    assert!(result.ends_with("x\n[cut here: it is longer]") && result.len() < 66_000);
    let asked = app.upstream.asked();
    let at = asked
        .iter()
        .position(|body| *body == json!({"n": 1}))
        .unwrap();
    assert_eq!(app.upstream.headers()[at]["x-a"], "b");

    will_fetch(&app, &get);
    for _ in 0..6 {
        app.upstream
            .will(plain(302, vec![("location", "/again")], ""));
    }
    app.upstream.will_say("done");
    let (state, result) = fetch(&app, get).await;
    assert_eq!(state, "error");
    assert!(result.contains("redirects too often"), "{result}");
}

#[tokio::test]
async fn what_a_model_sets_for_one_origin_no_other_sees() {
    let app = TestApp::start_with(&["--private-fetches", "true"]).await;
    app.agent("noor").await;
    answer(app.patch("/v1/agents/noor", json!({"allowedTools": ["http_fetch"]}))).await;
    let here = app.upstream.url.replace("localhost", "127.0.0.1");
    let there = here.replace("127.0.0.1", "localhost");
    for (to, sees) in [(format!("{here}/b"), true), (format!("{there}/b"), false)] {
        let post = json!({
            "url": format!("{here}/a?token=t"), "method": "POST", "body": "{\"n\":1}",
            "headers": {"x-api-key": "S3", "content-type": "application/json"},
        });
        for (status, keeps_body) in [(307, true), (302, false)] {
            will_fetch(&app, &post);
            let moved = vec![("location", String::leak(to.clone()) as &str)];
            app.upstream
                .will(Reply::Plain(status, moved, String::new()));
            app.upstream
                .will(Reply::Plain(200, vec![], "hello".to_owned()));
            app.upstream.will_say("done");
            let (state, result) = fetch(&app, post.clone()).await;
            assert_eq!(
                (state.as_str(), result.ends_with("hello")),
                ("completed", true)
            );
            let second = app.upstream.asked().len() - 2;
            let headers = &app.upstream.headers()[second];
            assert_eq!(headers.contains_key("x-api-key"), sees, "{to} {status}");
            assert_eq!(headers.contains_key("content-type"), keeps_body);
            assert!(!headers.contains_key("referer"));
            let body = &app.upstream.asked()[second];
            assert_eq!(*body == json!({"n": 1}), keeps_body, "{to} {status}");
        }
    }
}

#[tokio::test]
async fn http_fetch_reaches_nothing_private_and_no_other_protocol() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    answer(app.patch("/v1/agents/noor", json!({"allowedTools": ["http_*"]}))).await;
    let port = app.upstream.url.rsplit(':').next().unwrap().to_owned();
    for (arguments, expected) in [
        (json!({"url": app.upstream.url}), "Private addresses"),
        (
            json!({"url": format!("http://localhost:{port}/")}),
            "no public address",
        ),
        (
            json!({"url": "http://169.254.169.254/latest/meta-data"}),
            "Private addresses",
        ),
        (json!({"url": "file:///etc/passwd"}), "Only http and https"),
        (json!({"url": "nonsense"}), "not a URL"),
        (
            json!({"url": "http://example.com", "method": "CONNECT"}),
            "`method` may not be CONNECT",
        ),
        (
            json!({"url": "http://example.com", "headers": {"Host": "inside"}}),
            "`host` cannot be set",
        ),
        (
            json!({"url": "http://example.com", "headers": {"a b": "c"}}),
            "not valid",
        ),
        (json!({}), "missing field `url`"),
    ] {
        will_fetch(&app, &arguments);
        app.upstream.will_say("I cannot.");
        let (state, result) = fetch(&app, arguments).await;
        assert_eq!(state, "error", "{result}");
        assert!(result.contains(expected), "{result}");
    }
    // Only the model was asked, twice each time.
    assert_eq!(app.upstream.asked().len(), 18);
}

#[tokio::test]
async fn a_caller_that_leaves_while_a_tool_runs_leaves_a_marked_answer_and_a_result_that_says_so() {
    let app = TestApp::start_with(&["--private-fetches", "true"]).await;
    app.agent("noor").await;
    answer(app.patch("/v1/agents/noor", json!({"allowedTools": ["http_fetch"]}))).await;
    will_fetch(&app, &json!({"url": app.upstream.url}));
    app.upstream.will(Reply::Hang(vec![]));
    let mut response = app
        .chat(json!({"agent": "noor", "stream": true, "messages": [{"role": "user", "content": "hi"}]}))
        .send()
        .await
        .unwrap();
    let session = response.headers()["x-session-id"]
        .to_str()
        .unwrap()
        .to_owned();
    let mut heard = String::new();
    while !heard.contains("calling") {
        heard.push_str(std::str::from_utf8(&response.chunk().await.unwrap().unwrap()).unwrap());
    }
    drop(response);
    let path = format!("/v1/chat/sessions/{session}/messages");
    eventually("the turn is recorded", || async {
        answer(app.get(&path)).await.0 == 200
    })
    .await;
    let message = answer(app.get(&path)).await.1["messages"][1].clone();
    assert_eq!(message["interrupted"], true, "{message}");
    assert!(
        message["toolCalls"][0]["result"]
            .as_str()
            .unwrap()
            .starts_with("Interrupted"),
        "{message}"
    );

    app.upstream.will_say("on we go");
    let request =
        app.chat(json!({"agent": "noor", "messages": [{"role": "user", "content": "go on"}]}));
    assert_eq!(answer(request.header("x-session-id", session)).await.0, 200);
    let told = app.upstream.asked().last().unwrap()["messages"].clone();
    let roles: Vec<&str> = told
        .as_array()
        .unwrap()
        .iter()
        .map(|message| message["role"].as_str().unwrap())
        .collect();
    assert_eq!(
        roles,
        ["system", "user", "assistant", "tool", "user"],
        "{told}"
    );
}

#[tokio::test]
async fn where_json_is_asked_for_words_before_a_tool_do_not_count_and_break_a_stream() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    for stream in [false, true] {
        let mut first = vec![chunk(
            &json!({"role": "assistant", "content": "Let me look."}),
            None,
        )];
        first.push(chunk(&json!({"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "memory_get", "arguments": "{}"}}]}), None));
        first.extend(ending("tool_calls"));
        app.upstream.will(Reply::Stream(first));
        if !stream {
            app.upstream.will_say("{\"found\":false}");
        }
        let ask = json!({"agent": "noor", "stream": stream, "response_format": {"type": "json_object"},
            "messages": [{"role": "user", "content": "hi"}]});
        let text = app.chat(ask).send().await.unwrap().text().await.unwrap();
        if stream {
            let last = frames(&text).pop().unwrap();
            assert_eq!(last["error"]["code"], "provider_error", "{text}");
        } else {
            let body: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(
                body["choices"][0]["message"]["content"],
                "{\"found\":false}"
            );
        }
    }
}
