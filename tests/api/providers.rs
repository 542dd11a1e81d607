//! What becomes of a provider's trouble, and how Anthropic's format is spoken.

use std::time::Duration;

use axum::body::Bytes;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpSocket;

use crate::harness::{Reply, TestApp, Upstream, answer, chunk, ending, frames, said, spoken};

fn hello(streams: bool) -> Value {
    json!({"agent": "a", "stream": streams, "messages": [{"role": "user", "content": "Hello"}]})
}

async fn start() -> TestApp {
    let app = TestApp::start().await;
    app.agent("a").await;
    app
}

#[tokio::test]
async fn a_refusal_before_the_first_word_is_an_ordinary_error() {
    let app = start().await;
    let openai = |message: &str, code: &str| {
        json!({"error": {"message": message, "type": "invalid_request_error", "code": code}})
            .to_string()
    };
    for (reply, status, code, needle) in [
        (
            Reply::Plain(
                401,
                vec![],
                openai(
                    "Incorrect API key provided: sk-1234567890abcdef",
                    "invalid_api_key",
                ),
            ),
            502,
            "provider_error",
            "refused its key",
        ),
        (
            Reply::Plain(403, vec![], String::new()),
            502,
            "provider_error",
            "refused its key",
        ),
        (
            Reply::Plain(400, vec![], openai("Unknown model", "model_not_found")),
            400,
            "bad_request",
            "Unknown model",
        ),
        (
            Reply::Plain(
                400,
                vec![],
                openai(
                    "This model's maximum context length is 10 tokens",
                    "context_length_exceeded",
                ),
            ),
            400,
            "bad_request",
            "too long",
        ),
        (
            Reply::Plain(429, vec![("retry-after", "3600")], String::new()),
            429,
            "rate_limited",
            "limiting",
        ),
        (
            Reply::Plain(
                301,
                vec![("location", "http://127.0.0.1:1/")],
                String::new(),
            ),
            502,
            "provider_error",
            "could not be read",
        ),
        (
            Reply::Plain(
                200,
                vec![("content-type", "text/html")],
                "<html>".to_owned(),
            ),
            502,
            "provider_error",
            "could not be read",
        ),
        (
            Reply::Stream(vec![Bytes::from_static(b"data: garbage\n\n")]),
            502,
            "provider_error",
            "could not be read",
        ),
        (
            Reply::Stream(vec![Bytes::from_static(
                b"data: {\"error\":{\"message\":\"overloaded\",\"type\":\"server_error\"}}\n\n",
            )]),
            502,
            "provider_error",
            "unavailable",
        ),
        (Reply::Hang(vec![]), 504, "provider_timeout", "in time"),
    ] {
        for streams in [false, true] {
            app.upstream.will(reply.clone());
            let response = app.chat(hello(streams)).send().await.unwrap();
            let retry_after = response.headers().get("retry-after").cloned();
            assert_eq!(response.status(), status, "{needle}");
            let body: Value = response.json().await.unwrap();
            assert_eq!(body["code"], code, "{needle}");
            let sentence = body["error"].as_str().unwrap();
            assert!(
                sentence.contains(needle) && !sentence.contains("sk-1234"),
                "{sentence}"
            );
            if status == 429 {
                assert_eq!(retry_after.unwrap(), "3600");
            }
        }
    }
    let (_, sessions) = answer(app.get("/v1/chat/sessions")).await;
    assert_eq!(
        sessions,
        json!({"sessions": []}),
        "nothing was said, so nothing is kept"
    );
}

#[tokio::test]
async fn trouble_after_the_first_word_ends_the_stream_in_one_error_frame() {
    let app = start().await;
    let some: Vec<Bytes> = said("some words ").into_iter().take(3).collect();
    for (reply, code) in [
        (Reply::Stream(some.clone()), "provider_error"),
        (Reply::Cut(some.clone()), "provider_error"),
        (Reply::Hang(some.clone()), "provider_timeout"),
        (Reply::Stream([some.clone(), vec![Bytes::from_static(b"data: {\"error\":{\"message\":\"slow down\",\"code\":\"rate_limit_exceeded\"}}\n\n")]].concat()), "rate_limited"),
    ] {
        app.upstream.will(reply.clone());
        let frames = frames(&app.chat(hello(true)).send().await.unwrap().text().await.unwrap());
        let (last, before) = frames.split_last().unwrap();
        assert_eq!(spoken(before), "some words ");
        assert_eq!(last["error"]["code"], code);
        assert!(last["error"]["message"].is_string() && last["error"]["type"].is_string());
        assert!(before.iter().all(|frame| frame["choices"][0]["finish_reason"].is_null()));

        app.upstream.will(reply);
        assert!(answer(app.chat(hello(false))).await.0.as_u16() >= 429);
    }
    assert_eq!(
        app.upstream.asked().len(),
        8,
        "nothing is asked again after the first word"
    );
    let (_, sessions) = answer(app.get("/v1/chat/sessions?limit=1")).await;
    let id = sessions["sessions"][0]["id"].as_str().unwrap();
    let (_, stored) = answer(app.get(&format!("/v1/chat/sessions/{id}/messages"))).await;
    assert_eq!(stored["messages"][1]["content"], "some words ");
    assert_eq!(stored["messages"][1]["interrupted"], true);
}

#[tokio::test]
async fn a_passing_failure_is_tried_again_before_the_first_word() {
    let app = start().await;
    for failure in [
        Reply::Plain(500, vec![], String::new()),
        Reply::Plain(503, vec![], String::new()),
        Reply::Plain(429, vec![("retry-after", "0")], String::new()),
    ] {
        app.upstream.will(failure);
        app.upstream.will_say("at last");
        let (status, body) = answer(app.chat(hello(false))).await;
        assert_eq!(
            (
                status.as_u16(),
                body["choices"][0]["message"]["content"].as_str()
            ),
            (200, Some("at last"))
        );
    }
    for _ in 0..3 {
        app.upstream.will(Reply::Plain(500, vec![], String::new()));
    }
    let (status, body) = answer(app.chat(hello(false))).await;
    assert_eq!(
        (status.as_u16(), body["code"].as_str()),
        (502, Some("provider_error"))
    );
    assert_eq!(app.upstream.asked().len(), 9);
}

#[tokio::test]
async fn a_stream_in_any_pieces_reads_the_same() {
    let app = start().await;
    let text = "è — one two ";
    let whole: Vec<u8> = said(text).concat();
    let crlf = String::from_utf8(whole.clone())
        .unwrap()
        .replace('\n', "\r\n")
        .into_bytes();
    let large = "x".repeat(1024 * 1024);
    for (pieces, expect) in [
        (
            whole
                .chunks(1)
                .map(Bytes::copy_from_slice)
                .collect::<Vec<_>>(),
            text,
        ),
        (vec![Bytes::from(crlf)], text),
        (
            vec![Bytes::from(
                [&b": comment\nevent: x\nid: 1\n\n"[..], &whole].concat(),
            )],
            text,
        ),
        (
            [
                vec![chunk(&json!({"content": large}), None)],
                ending("stop"),
            ]
            .concat(),
            large.as_str(),
        ),
        // Without `[DONE]`, a finish reason is end enough.
        (
            said("done ").into_iter().rev().skip(1).rev().collect(),
            "done ",
        ),
    ] {
        app.upstream.will(Reply::Stream(pieces));
        let frames = frames(
            &app.chat(hello(true))
                .send()
                .await
                .unwrap()
                .text()
                .await
                .unwrap(),
        );
        assert_eq!(spoken(&frames), expect);
        assert_eq!(
            frames.last().unwrap()["choices"][0]["finish_reason"],
            "stop"
        );
    }
}

#[tokio::test]
async fn usage_is_estimated_when_the_provider_gives_none() {
    let app = start().await;
    app.upstream.will(Reply::Stream(vec![
        chunk(&json!({"content": "eight by"}), None),
        chunk(&json!({}), Some("stop")),
    ]));
    let (_, body) = answer(app.chat(hello(false))).await;
    assert_eq!(body["usage"]["completion_tokens"], 2);
    assert!(body["usage"]["prompt_tokens"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn reasoning_is_passed_on_beside_the_answer() {
    let app = start().await;
    let thought = vec![
        chunk(&json!({"reasoning_content": "let me "}), None),
        chunk(&json!({"reasoning": "think"}), None),
    ];
    app.upstream
        .will(Reply::Stream([thought, said("yes")].concat()));
    let (_, body) = answer(app.chat(hello(false))).await;
    assert_eq!(
        body["choices"][0]["message"]["reasoning_content"],
        "let me think"
    );
    assert_eq!(body["choices"][0]["message"]["content"], "yes");
}

#[tokio::test]
async fn a_projects_own_key_goes_before_the_servers_and_stays_its_own() {
    let app = start().await;
    let byok = format!("/v1/byok?projectId={}", app.project);
    let own = json!({"provider": "house", "key": "own-key-1234567890", "baseUrl": format!("{}/v1", app.upstream.url), "label": "Ours"});
    let (status, set) = answer(app.admin(Method::POST, &byok).json(&own)).await;
    assert_eq!(status, 201);
    assert_eq!(
        (set["maskedKey"].as_str(), set.get("key")),
        (Some("own-…7890"), None)
    );
    answer(app.patch("/v1/agents/a", json!({"model": "house:small"}))).await;
    app.upstream.will_say("from the house");
    assert_eq!(
        answer(app.chat(hello(false))).await.1["choices"][0]["message"]["content"],
        "from the house"
    );
    assert_eq!(
        app.upstream.headers()[0]["authorization"],
        "Bearer own-key-1234567890"
    );
    assert_eq!(app.upstream.asked()[0]["model"], "small");
    let (_, list) = answer(app.admin(Method::GET, &byok)).await;
    assert_eq!(list["data"][0]["maskedKey"], "own-…7890");
    let (status, _) = answer(app.admin(
        Method::DELETE,
        &format!("/v1/byok/house?projectId={}", app.project),
    ))
    .await;
    assert_eq!(status, 200);
    let (status, body) = answer(app.chat(hello(false))).await;
    assert_eq!(status, 400);
    assert!(body["error"].as_str().unwrap().contains("house"), "{body}");
    assert_eq!(
        answer(app.admin(
            Method::DELETE,
            &format!("/v1/byok/house?projectId={}", app.project)
        ))
        .await
        .0,
        404
    );
}

#[tokio::test]
async fn a_tenants_base_url_cannot_reach_inside() {
    let app = TestApp::start_with(&["--private-base-urls", "false"]).await;
    let byok = format!("/v1/byok?projectId={}", app.project);
    let set = |base_url: &str| {
        app.admin(Method::POST, &byok)
            .json(&json!({"provider": "inside", "key": "k", "baseUrl": base_url}))
    };
    for base_url in [
        "http://127.0.0.1:5432",
        "http://[::1]/v1",
        "http://169.254.169.254/latest",
        "http://10.0.0.1",
        "ftp://example.com",
        "nonsense",
        "http://u:p@example.com",
    ] {
        let (status, _) = answer(set(base_url)).await;
        assert_eq!(status, 400, "{base_url}");
    }
    // A name is looked up when it is used.
    let port = app.upstream.url.rsplit_once(':').unwrap().1;
    assert_eq!(
        answer(set(&format!("http://localhost:{port}/v1"))).await.0,
        201
    );
    answer(app.post("/v1/agents", json!({"name": "a", "model": "inside:m"}))).await;
    let (status, body) = answer(app.chat(hello(false))).await;
    assert_eq!(
        (status.as_u16(), body["code"].as_str()),
        (502, Some("provider_error"))
    );
    assert!(app.upstream.asked().is_empty());
    // Nor does a provider that needs no key, unless the operator says where it is.
    answer(app.patch("/v1/agents/a", json!({"model": "ollama:qwen3"}))).await;
    let (status, body) = answer(app.chat(hello(false))).await;
    assert_eq!(status, 400, "{body}");
    assert!(
        body["error"].as_str().unwrap().contains("OLLAMA_BASE_URL"),
        "{body}"
    );
}

fn event(kind: &str, mut data: Value) -> Bytes {
    data["type"] = json!(kind);
    Bytes::from(format!("event: {kind}\ndata: {data}\n\n"))
}

#[tokio::test]
async fn anthropics_format_is_spoken_both_ways() {
    let app = TestApp::start().await;
    answer(app.post(
        "/v1/agents",
        json!({"name": "a", "model": "claude-sonnet-4-5", "reasoning": "low"}),
    ))
    .await;
    app.upstream.will(Reply::Stream(vec![
        event("message_start", json!({"message": {"id": "msg_1", "role": "assistant", "content": [], "usage": {"input_tokens": 10, "cache_creation_input_tokens": 5, "cache_read_input_tokens": 20, "output_tokens": 1}}})),
        event("content_block_start", json!({"index": 0, "content_block": {"type": "thinking", "thinking": ""}})),
        event("ping", json!({})),
        event("content_block_delta", json!({"index": 0, "delta": {"type": "thinking_delta", "thinking": "Weather, then."}})),
        event("content_block_delta", json!({"index": 0, "delta": {"type": "signature_delta", "signature": "x"}})),
        event("content_block_stop", json!({"index": 0})),
        event("content_block_start", json!({"index": 1, "content_block": {"type": "text", "text": ""}})),
        event("content_block_delta", json!({"index": 1, "delta": {"type": "text_delta", "text": "Let me look."}})),
        event("content_block_stop", json!({"index": 1})),
        event("content_block_start", json!({"index": 2, "content_block": {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}}})),
        event("content_block_delta", json!({"index": 2, "delta": {"type": "input_json_delta", "partial_json": ""}})),
        event("content_block_delta", json!({"index": 2, "delta": {"type": "input_json_delta", "partial_json": "{\"city\":"}})),
        event("content_block_delta", json!({"index": 2, "delta": {"type": "input_json_delta", "partial_json": "\"Turin\"}"}})),
        event("content_block_stop", json!({"index": 2})),
        event("message_delta", json!({"delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 30}})),
        event("message_stop", json!({})),
    ]));
    let tools = json!([{"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]);
    let mut body = json!({"agent": "a", "tools": tools, "tool_choice": "auto", "parallel_tool_calls": false, "max_tokens": 100, "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "t0", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "t0", "content": "which city?"},
        {"role": "user", "content": "Turin"}]});
    let (status, answered) = answer(app.chat(body.clone())).await;
    assert_eq!(status, 200, "{answered}");
    let message = &answered["choices"][0]["message"];
    assert_eq!(message["content"], "Let me look.");
    assert_eq!(message["reasoning_content"], "Weather, then.");
    assert_eq!(
        message["tool_calls"][0],
        json!({"id": "toolu_1", "type": "function", "function": {"name": "get_weather", "arguments": "{\"city\":\"Turin\"}"}})
    );
    assert_eq!(answered["choices"][0]["finish_reason"], "tool_calls");
    assert_eq!(
        answered["usage"],
        json!({"prompt_tokens": 35, "completion_tokens": 30, "total_tokens": 65, "prompt_tokens_details": {"cached_tokens": 20}, "completion_tokens_details": {"reasoning_tokens": 0}})
    );

    let asked = app.upstream.asked().remove(0);
    let headers = app.upstream.headers().remove(0);
    assert_eq!(
        (
            headers["x-api-key"].to_str().unwrap(),
            headers["anthropic-version"].to_str().unwrap()
        ),
        ("server-key", "2023-06-01")
    );
    assert_eq!(asked["system"], "You are a.");
    assert_eq!(
        asked["thinking"],
        json!({"type": "enabled", "budget_tokens": 2048})
    );
    assert_eq!(asked["max_tokens"], 2148);
    assert_eq!(
        asked["tool_choice"],
        json!({"type": "auto", "disable_parallel_tool_use": true})
    );
    assert_eq!(
        asked["tools"][0]["input_schema"]["properties"]["city"]["type"],
        "string"
    );
    assert_eq!(
        asked["messages"],
        json!([
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}, {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t0", "name": "get_weather", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t0", "content": "which city?"}, {"type": "text", "text": "Turin", "cache_control": {"type": "ephemeral"}}]}
        ])
    );

    // What the API has no word for is refused, not dropped.
    body["seed"] = json!(1);
    let (status, refused) = answer(app.chat(body)).await;
    assert_eq!(status, 400);
    assert!(refused["error"].as_str().unwrap().contains("`seed`"));
}

#[tokio::test]
async fn anthropics_trouble_is_sorted_too() {
    let app = TestApp::start().await;
    answer(app.post(
        "/v1/agents",
        json!({"name": "a", "model": "anthropic:claude-x"}),
    ))
    .await;
    let begun = || {
        vec![
            event(
                "message_start",
                json!({"message": {"usage": {"input_tokens": 1, "output_tokens": 1}}}),
            ),
            event(
                "content_block_delta",
                json!({"index": 0, "delta": {"type": "text_delta", "text": "so far"}}),
            ),
        ]
    };
    let overloaded = event(
        "error",
        json!({"error": {"type": "overloaded_error", "message": "Overloaded"}}),
    );
    for (reply, code) in [
        (
            Reply::Stream([begun(), vec![overloaded]].concat()),
            "provider_error",
        ),
        (Reply::Stream(begun()), "provider_error"),
        (Reply::Cut(begun()), "provider_error"),
    ] {
        app.upstream.will(reply);
        let frames = frames(
            &app.chat(hello(true))
                .send()
                .await
                .unwrap()
                .text()
                .await
                .unwrap(),
        );
        assert_eq!(frames.last().unwrap()["error"]["code"], code);
    }
    let too_long = json!({"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 tokens > 8 maximum"}}).to_string();
    app.upstream.will(Reply::Plain(400, vec![], too_long));
    let (status, body) = answer(app.chat(hello(false))).await;
    assert_eq!(
        (status.as_u16(), body["code"].as_str()),
        (400, Some("bad_request"))
    );
    for (word, reason) in [
        ("end_turn", "stop"),
        ("max_tokens", "length"),
        ("refusal", "content_filter"),
        ("stop_sequence", "stop"),
    ] {
        let end = vec![
            event(
                "message_delta",
                json!({"delta": {"stop_reason": word}, "usage": {"output_tokens": 2}}),
            ),
            event("message_stop", json!({})),
        ];
        app.upstream.will(Reply::Stream([begun(), end].concat()));
        assert_eq!(
            answer(app.chat(hello(false))).await.1["choices"][0]["finish_reason"],
            reason
        );
    }
}

#[tokio::test]
async fn a_wish_that_anthropic_has_no_setting_for_goes_into_the_prompt() {
    let app = TestApp::start().await;
    let agent = json!({"name": "a", "model": "anthropic:claude-x"});
    assert_eq!(answer(app.post("/v1/agents", agent)).await.0, 201);
    let says = |text: &str| {
        Reply::Stream(vec![
            event(
                "message_start",
                json!({"message": {"usage": {"input_tokens": 1, "output_tokens": 1}}}),
            ),
            event(
                "content_block_delta",
                json!({"index": 0, "delta": {"type": "text_delta", "text": text}}),
            ),
            event(
                "message_delta",
                json!({"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}}),
            ),
            event("message_stop", json!({})),
        ])
    };
    let schema =
        json!({"type": "object", "required": ["city"], "properties": {"city": {"const": "Turin"}}});
    let mut body = hello(false);
    body["response_format"] =
        json!({"type": "json_schema", "json_schema": {"name": "city", "schema": schema}});
    app.upstream.will(says("{\"city\": \"Rome\"}"));
    app.upstream.will(says("{\"city\": \"Turin\"}"));
    let (status, answered) = answer(app.chat(body)).await;
    assert_eq!(status, 200, "{answered}");
    let said = answered["choices"][0]["message"]["content"].as_str();
    assert_eq!(said, Some("{\"city\": \"Turin\"}"));

    let asked = app.upstream.asked();
    assert_eq!(asked.len(), 2);
    for request in &asked {
        assert!(request.get("response_format").is_none());
        let system = request["system"].as_str().unwrap();
        assert!(
            system.starts_with("You are a.") && system.contains(&schema.to_string()),
            "{system}"
        );
    }
    let messages = asked[1]["messages"].as_array().unwrap();
    assert_eq!(messages[1]["role"], "assistant");
    assert!(messages[2].to_string().contains("/city"), "{}", messages[2]);

    let mut body = hello(false);
    body["response_format"] = json!({"type": "json_object"});
    app.upstream.will(says("{}"));
    assert_eq!(answer(app.chat(body)).await.0, 200);
    let system = app.upstream.asked()[2]["system"].clone();
    assert!(system.as_str().unwrap().contains("one JSON object"));
}

/// An address whose connections are refused until the socket listens.
fn deaf_socket() -> (TcpSocket, String) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    (socket, address)
}

async fn agent_at(app: &TestApp, address: &str) {
    let byok = json!({"projectId": app.project, "provider": "mine", "key": "k", "baseUrl": format!("http://{address}/v1")});
    let (status, body) = answer(app.admin(Method::POST, "/v1/byok").json(&byok)).await;
    assert!(status.is_success(), "{body}");
    let agent = json!({"name": "a", "model": "mine:model"});
    assert_eq!(answer(app.post("/v1/agents", agent)).await.0, 201);
}

#[tokio::test]
async fn a_refused_connection_is_tried_again_and_then_told() {
    let app = TestApp::start().await;
    let (socket, address) = deaf_socket();
    agent_at(&app, &address).await;
    let (status, body) = answer(app.chat(hello(true))).await;
    assert_eq!(
        (status.as_u16(), body["code"].as_str()),
        (502, Some("provider_error"))
    );

    let listens = async {
        // The first try comes sooner and the second no sooner than 50 ms after it.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let upstream = Upstream::on(socket.listen(8).unwrap());
        upstream.will_say("just woke up");
    };
    let ((status, body), ()) = tokio::join!(answer(app.chat(hello(false))), listens);
    assert_eq!(status, 200, "{body}");
}

#[tokio::test]
async fn a_connection_that_ends_before_an_answer_is_tried_again() {
    let app = TestApp::start().await;
    let (socket, address) = deaf_socket();
    agent_at(&app, &address).await;
    let listener = socket.listen(8).unwrap();
    tokio::spawn(async move {
        for _ in 0..2 {
            drop(listener.accept().await.unwrap());
        }
        Upstream::on(listener).will_say("third time lucky");
    });
    let (status, body) = answer(app.chat(hello(false))).await;
    assert_eq!(
        (
            status.as_u16(),
            body["choices"][0]["message"]["content"].as_str()
        ),
        (200, Some("third time lucky")),
        "{body}"
    );
}
