//! What providers want back with the results of tools, and the formats of their newer models.

use axum::body::Bytes;
use serde_json::{Value, json};

use crate::harness::{Reply, TestApp, answer, called, chunk, ending, said};

async fn agent(app: &TestApp, model: &str, others: Value) {
    let mut body = json!({"name": "a", "model": model});
    for (name, value) in others.as_object().unwrap() {
        body[name] = value.clone();
    }
    let (status, body) = answer(app.post("/v1/agents", body)).await;
    assert_eq!(status, 201, "{body}");
}

fn weather() -> Value {
    json!([{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}])
}

/// Asks for the weather, answers the call in the session, and returns the second request.
async fn answer_a_call(app: &TestApp) -> Value {
    answer_a_call_in_session(app).await.0
}

async fn answer_a_call_in_session(app: &TestApp) -> (Value, String) {
    let first = app
        .chat(json!({"agent": "a", "tools": weather(), "messages": [{"role": "user", "content": "Weather?"}]}))
        .send()
        .await
        .unwrap();
    let session = first.headers()["x-session-id"].to_str().unwrap().to_owned();
    let told: Value = first.json().await.unwrap();
    let message = &told["choices"][0]["message"];
    let call = &message["tool_calls"][0];
    assert_eq!(call["function"]["name"], "get_weather", "{told}");
    // The caller is shown nothing that it would have to send back.
    assert!(
        message.get("state").is_none() && call.get("extra_content").is_none(),
        "{told}"
    );
    let result = json!({"agent": "a", "tools": weather(), "messages": [{"role": "tool", "tool_call_id": call["id"], "content": "Sun"}]});
    let (status, body) = answer(app.chat(result).header("x-session-id", &session)).await;
    assert_eq!(status, 200, "{body}");
    let (_, stored) = answer(app.get(&format!("/v1/chat/sessions/{session}/messages"))).await;
    assert!(!stored.to_string().contains("sealed"), "{stored}");
    (app.upstream.asked().pop().unwrap(), session)
}

/// A call whose first chunk says more than OpenAI's does.
fn call_with(thought: Option<&str>, extra: &Value) -> Vec<Bytes> {
    let mut call = json!({"index": 0, "id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}});
    if !extra.is_null() {
        call["extra_content"] = extra.clone();
    }
    thought
        .into_iter()
        .flat_map(|thought| thought.split_inclusive(' '))
        .map(|word| chunk(&json!({"reasoning_content": word}), None))
        .chain([chunk(&json!({"tool_calls": [call]}), None)])
        .chain(ending("tool_calls"))
        .collect()
}

#[tokio::test]
async fn deepseek_gets_its_thoughts_back_and_an_empty_one_where_there_was_none() {
    let app = TestApp::start().await;
    agent(&app, "deepseek-v4-pro", json!({})).await;
    for (thought, expect) in [(Some("It is sealed."), "It is sealed."), (None, "")] {
        app.upstream
            .will(Reply::Stream(call_with(thought, &Value::Null)));
        app.upstream.will_say("Sunny.");
        let asked = answer_a_call(&app).await;
        let message = asked["messages"].as_array().unwrap().iter().rev().nth(1);
        assert_eq!(message.unwrap()["reasoning_content"], expect, "{asked}");
        assert!(asked.get("thinking").is_none());
    }
    // Once there are tools it wants them of every answer, those without calls too.
    let thoughts = [
        chunk(&json!({"reasoning_content": "Sun is sealed."}), None),
        chunk(&json!({"content": "Sunny."}), None),
    ];
    let reply = thoughts.into_iter().chain(ending("stop")).collect();
    app.upstream
        .will(Reply::Stream(call_with(None, &Value::Null)));
    app.upstream.will(Reply::Stream(reply));
    let (asked, session) = answer_a_call_in_session(&app).await;
    assert_eq!(asked["messages"].as_array().unwrap().len(), 4, "{asked}");
    app.upstream.will_say("Still sunny.");
    let next = json!({"agent": "a", "tools": weather(), "messages": [{"role": "user", "content": "And now?"}]});
    answer(app.chat(next).header("x-session-id", session)).await;
    let asked = app.upstream.asked().pop().unwrap();
    let thoughts: Vec<&Value> = asked["messages"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|message| message["role"] == "assistant")
        .map(|message| &message["reasoning_content"])
        .collect();
    assert_eq!(thoughts, ["", "Sun is sealed."], "{asked}");
    // Left alone it thinks; it has a switch.
    let body = json!({"agent": "a", "reasoning_effort": "none", "messages": [{"role": "user", "content": "Hi"}]});
    app.upstream.will_say("Hi.");
    answer(app.chat(body)).await;
    let asked = app.upstream.asked().pop().unwrap();
    assert_eq!(asked["thinking"], json!({"type": "disabled"}));
}

#[tokio::test]
async fn gemini_gets_its_signatures_back_and_a_word_in_their_place_where_there_is_none() {
    let signature = json!({"google": {"thought_signature": "sealed"}});
    let none = json!({"google": {"thought_signature": "skip_thought_signature_validator"}});
    for (model, given, expect) in [
        ("gemini-3-pro", &signature, &signature),
        ("gemini-3-pro", &Value::Null, &none),
        ("gemini-2.5-flash", &Value::Null, &Value::Null),
    ] {
        let app = TestApp::start().await;
        agent(&app, model, json!({})).await;
        app.upstream.will(Reply::Stream(call_with(None, given)));
        app.upstream.will_say("Sunny.");
        let asked = answer_a_call(&app).await;
        let message = asked["messages"].as_array().unwrap().iter().rev().nth(1);
        let call = &message.unwrap()["tool_calls"][0];
        assert_eq!(&call["extra_content"], expect, "{asked}");
    }
}

#[tokio::test]
async fn a_task_goes_on_with_what_its_model_wants_back_and_another_model_is_not_given_it() {
    let app = TestApp::start().await;
    agent(&app, "gemini-3-pro", json!({})).await;
    let signature = json!({"google": {"thought_signature": "sealed"}});
    let call = json!({"index": 0, "id": "c1", "type": "function", "extra_content": signature, "function": {"name": "memory_get", "arguments": "{}"}});
    let mut answer_with_call = vec![chunk(&json!({"tool_calls": [call]}), None)];
    answer_with_call.extend(ending("tool_calls"));
    app.upstream.will(Reply::Stream(answer_with_call));
    app.upstream.will_say("Done.");
    let id = app.task("Look", json!({"assignTo": "a"})).await;
    let task = app.until(&id, "done").await;
    let asked = app.upstream.asked();
    assert_eq!(
        asked[1]["messages"][2]["tool_calls"][0]["extra_content"], signature,
        "{}",
        asked[1]
    );
    let (_, activity) = answer(app.get(&format!("/v1/tasks/{id}/activity"))).await;
    assert!(!activity.to_string().contains("sealed"), "{activity}");
    let tool = activity["entries"]
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["event"] == "tool");
    assert!(tool.unwrap()["data"].get("message").is_none(), "{activity}");
    let session = task["sessionId"].as_str().unwrap();
    let (_, told) = answer(app.get(&format!("/v1/chat/sessions/{session}/messages"))).await;
    assert!(
        told.to_string().contains("memory_get") && !told.to_string().contains("sealed"),
        "{told}"
    );

    // In a conversation that goes on with another model, its own word takes the place of what it cannot read.
    app.upstream
        .will(Reply::Stream(call_with(None, &signature)));
    let first = app
        .chat(json!({"agent": "a", "tools": weather(), "messages": [{"role": "user", "content": "Weather?"}]}))
        .send()
        .await
        .unwrap();
    let session = first.headers()["x-session-id"].to_str().unwrap().to_owned();
    answer(app.patch("/v1/agents/a", json!({"model": "gemini-4-argon"}))).await;
    app.upstream.will_say("Sunny.");
    let result = json!({"agent": "a", "tools": weather(), "messages": [{"role": "tool", "tool_call_id": "c1", "content": "Sun"}]});
    answer(app.chat(result).header("x-session-id", &session)).await;
    let asked = app.upstream.asked().pop().unwrap();
    assert!(
        !asked.to_string().contains("sealed")
            && asked.to_string().contains("skip_thought_signature"),
        "{asked}"
    );
}

#[tokio::test]
async fn the_record_of_thoughts_that_comes_in_pieces_goes_back_whole() {
    let app = TestApp::start().await;
    agent(&app, "openai:scripted", json!({})).await;
    let detail = |piece: Value| chunk(&json!({"reasoning_details": [piece]}), None);
    let mut reply = vec![
        detail(json!({"type": "reasoning.text", "index": 0, "text": "It is ", "format": "f"})),
        detail(json!("nonsense")),
        detail(json!({"type": "reasoning.text", "index": 0, "text": "sealed."})),
        detail(json!({"type": "reasoning.text", "index": 0, "text": null, "signature": "s"})),
        detail(json!({"type": "reasoning.encrypted", "index": 1, "data": "x"})),
        detail(json!({"type": "reasoning.encrypted", "data": "y"})),
        detail(json!({"type": "reasoning.encrypted", "data": "z"})),
    ];
    reply.extend(called(&[("c1", "memory_get", &["{}"])]));
    // A task's model is asked for a stream, whose pieces are put together.
    app.upstream.will(Reply::Stream(reply.clone()));
    app.upstream.will_say("Done.");
    let id = app.task("Look", json!({"assignTo": "a"})).await;
    app.until(&id, "done").await;
    let asked = app.upstream.asked().pop().unwrap();
    assert_eq!(
        asked["messages"][2]["reasoning_details"],
        json!([
            {"type": "reasoning.text", "index": 0, "text": "It is sealed.", "format": "f", "signature": "s"},
            {"type": "reasoning.encrypted", "index": 1, "data": "x"},
            {"type": "reasoning.encrypted", "data": "y"},
            {"type": "reasoning.encrypted", "data": "z"},
        ])
    );

    // In an answer of one piece each entry is one.
    let reply = vec![
        detail(json!({"type": "reasoning.text", "index": 0, "text": "a"})),
        detail(json!({"type": "reasoning.text", "index": 0, "text": "b"})),
    ];
    let reply = reply
        .into_iter()
        .chain(called(&[("c1", "get_weather", &["{}"])]));
    app.upstream.will(Reply::Stream(reply.collect()));
    app.upstream.will_say("Sunny.");
    let asked = answer_a_call(&app).await;
    let message = asked["messages"].as_array().unwrap().iter().rev().nth(1);
    let details = message.unwrap()["reasoning_details"].as_array();
    assert_eq!(details.unwrap().len(), 2, "{asked}");
}

#[tokio::test]
async fn who_does_not_take_back_what_it_gave_is_asked_without_it() {
    let app = TestApp::start().await;
    agent(&app, "openai:scripted", json!({})).await;
    app.upstream.answers(|request| {
        let answers = request["messages"].as_array().unwrap().iter();
        let results = answers.clone().filter(|message| message["role"] == "tool");
        if results.count() == 0 {
            return Reply::Stream(call_with(Some("Hm."), &Value::Null));
        }
        if request.to_string().contains("reasoning_content") {
            let refusal =
                json!({"error": {"message": "Extra inputs are not permitted: reasoning_content"}});
            return Reply::Plain(422, vec![], refusal.to_string());
        }
        Reply::Stream(said("Sunny."))
    });
    answer_a_call(&app).await;
    assert_eq!(app.upstream.asked().len(), 3);
}

#[tokio::test]
async fn what_is_kept_of_an_answer_is_bounded() {
    let app = TestApp::start().await;
    agent(&app, "openai:scripted", json!({})).await;
    let piece = json!({"reasoning_details": [{"type": "reasoning.encrypted", "data": "x".repeat(1024 * 1024)}]});
    app.upstream.will(Reply::Flood(10_000, chunk(&piece, None)));
    let hello =
        json!({"agent": "a", "stream": true, "messages": [{"role": "user", "content": "Hi"}]});
    let told = app.chat(hello).send().await.unwrap().text().await.unwrap();
    assert!(told.contains("provider_error"), "{told}");
    assert!(app.upstream.flooded() < 100 * 1024 * 1024);
}

fn event(kind: &str, mut data: Value) -> Bytes {
    data["type"] = json!(kind);
    Bytes::from(format!("event: {kind}\ndata: {data}\n\n"))
}

/// Claude thinks, says something, and calls a tool.
fn claude_calls() -> Vec<Bytes> {
    vec![
        event(
            "message_start",
            json!({"message": {"usage": {"input_tokens": 10, "output_tokens": 1}}}),
        ),
        event(
            "content_block_start",
            json!({"index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}}),
        ),
        event(
            "content_block_delta",
            json!({"index": 0, "delta": {"type": "thinking_delta", "thinking": "It is "}}),
        ),
        event(
            "content_block_delta",
            json!({"index": 0, "delta": {"type": "thinking_delta", "thinking": "sealed."}}),
        ),
        event(
            "content_block_delta",
            json!({"index": 0, "delta": {"type": "signature_delta", "signature": "s"}}),
        ),
        event("content_block_stop", json!({"index": 0})),
        event(
            "content_block_start",
            json!({"index": 1, "content_block": {"type": "redacted_thinking", "data": "x"}}),
        ),
        event("content_block_stop", json!({"index": 1})),
        event(
            "content_block_start",
            json!({"index": 2, "content_block": {"type": "text", "text": ""}}),
        ),
        event(
            "content_block_delta",
            json!({"index": 2, "delta": {"type": "text_delta", "text": "Let me look."}}),
        ),
        event("content_block_stop", json!({"index": 2})),
        event(
            "content_block_start",
            json!({"index": 3, "content_block": {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {}}}),
        ),
        event(
            "content_block_delta",
            json!({"index": 3, "delta": {"type": "input_json_delta", "partial_json": "{\"in\":\"Turin\"}"}}),
        ),
        event("content_block_stop", json!({"index": 3})),
        event(
            "message_delta",
            json!({"delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 30}}),
        ),
        event("message_stop", json!({})),
    ]
}

/// Claude calls a tool without arguments.
fn claude_calls_bare() -> Vec<Bytes> {
    vec![
        event(
            "message_start",
            json!({"message": {"usage": {"input_tokens": 10, "output_tokens": 1}}}),
        ),
        event(
            "content_block_start",
            json!({"index": 0, "content_block": {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {}}}),
        ),
        event("content_block_stop", json!({"index": 0})),
        event(
            "message_delta",
            json!({"delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 30}}),
        ),
        event("message_stop", json!({})),
    ]
}

#[tokio::test]
async fn a_call_without_arguments_has_none_of_them_in_json() {
    let app = TestApp::start().await;
    agent(&app, "claude-sonnet-4-5", json!({})).await;
    app.upstream.will(Reply::Stream(claude_calls_bare()));
    let hello = json!({"agent": "a", "tools": weather(), "messages": [{"role": "user", "content": "Weather?"}]});
    let (_, told) = answer(app.chat(hello)).await;
    let call = &told["choices"][0]["message"]["tool_calls"][0];
    assert_eq!(call["function"]["arguments"], "{}", "{told}");
}

#[tokio::test]
async fn gemini_is_told_the_type_of_each_enum_and_asked_for_json_in_the_prompt_where_tools_forbid_it()
 {
    let app = TestApp::start().await;
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}});
    for (number, (model, in_prompt)) in [("gemini-2.5-flash", true), ("gemini-3-pro", false)]
        .into_iter()
        .enumerate()
    {
        let name = format!("a{number}");
        let (status, _) =
            answer(app.post("/v1/agents", json!({"name": name, "model": model}))).await;
        assert_eq!(status, 201);
        app.upstream.will_say("{}");
        let hello = json!({"agent": name, "response_format": format, "messages": [{"role": "user", "content": "Hi"}]});
        assert_eq!(answer(app.chat(hello)).await.0, 200);
        let asked = app.upstream.asked().pop().unwrap();
        assert_eq!(asked["response_format"].is_null(), in_prompt, "{asked}");
        let scope = &asked["tools"][0]["function"]["parameters"]["properties"]["scope"];
        assert_eq!(scope["type"], "string", "{asked}");
    }
}

fn claude_says(text: &str) -> Vec<Bytes> {
    vec![
        event(
            "message_start",
            json!({"message": {"usage": {"input_tokens": 10, "output_tokens": 1}}}),
        ),
        event(
            "content_block_start",
            json!({"index": 0, "content_block": {"type": "text", "text": ""}}),
        ),
        event(
            "content_block_delta",
            json!({"index": 0, "delta": {"type": "text_delta", "text": text}}),
        ),
        event(
            "message_delta",
            json!({"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}}),
        ),
        event("message_stop", json!({})),
    ]
}

#[tokio::test]
async fn claude_gets_its_thoughts_back_as_they_were_and_thinks_on() {
    for (model, thinking, effort) in [
        (
            "claude-sonnet-4-5",
            json!({"type": "enabled", "budget_tokens": 8192}),
            Value::Null,
        ),
        (
            "claude-opus-4-7",
            json!({"type": "adaptive", "display": "summarized"}),
            json!({"effort": "medium"}),
        ),
    ] {
        let app = TestApp::start().await;
        agent(&app, model, json!({"reasoning": "medium"})).await;
        app.upstream.will(Reply::Stream(claude_calls()));
        app.upstream.will(Reply::Stream(claude_says("Sunny.")));
        let asked = answer_a_call(&app).await;
        assert_eq!(
            asked["messages"][1]["content"],
            json!([
                {"type": "thinking", "thinking": "It is sealed.", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"in": "Turin"}},
            ])
        );
        // Some take them back only with all that stood before: then they are asked without.
        app.upstream.answers(|request| {
            if request.to_string().contains("sealed") {
                let refusal = json!({"type": "error", "error": {"type": "invalid_request_error", "message": "messages.1.content.0: Invalid signature in thinking block."}});
                return Reply::Plain(400, vec![], refusal.to_string());
            }
            Reply::Stream(claude_says("Sunny."))
        });
        app.upstream.will(Reply::Stream(claude_calls()));
        answer_a_call(&app).await;
        for asked in app.upstream.asked().into_iter().take(4) {
            assert_eq!(
                (&asked["thinking"], &asked["output_config"]),
                (&thinking, &effort)
            );
        }
    }
}

/// OpenAI's newer models: no tools with chat completions, and the place to ask instead.
fn refuses_tools(request: &Value) -> Reply {
    if request["input"].is_null() && request["tools"].is_null() {
        return Reply::Stream(said("Without tools."));
    }
    if request["input"].is_null() {
        let refusal = json!({"error": {"message": "Function tools with reasoning_effort are not supported for gpt-5.6 in /v1/chat/completions. To use function tools, use /v1/responses or set reasoning_effort to 'none'.", "type": "invalid_request_error", "param": "reasoning_effort", "code": null}});
        return Reply::Plain(400, vec![], refusal.to_string());
    }
    let usage = json!({"input_tokens": 11, "input_tokens_details": {"cached_tokens": 3}, "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 18});
    let end = |status: &str| {
        event(
            &format!("response.{status}"),
            json!({"response": {"status": status, "error": null, "incomplete_details": null, "usage": usage}}),
        )
    };
    let answered = request["input"]
        .as_array()
        .unwrap()
        .iter()
        .any(|item| item["type"] == "function_call_output");
    let mut reply = vec![
        event(
            "response.created",
            json!({"response": {"status": "in_progress"}}),
        ),
        event(
            "response.output_item.added",
            json!({"output_index": 0, "item": {"type": "reasoning", "id": "rs_1", "summary": []}}),
        ),
        event(
            "response.reasoning_summary_text.delta",
            json!({"item_id": "rs_1", "output_index": 0, "summary_index": 0, "delta": "Hm."}),
        ),
        event(
            "response.output_item.done",
            json!({"output_index": 0, "item": {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "sealed"}}),
        ),
    ];
    if answered {
        reply.extend([
            event("response.output_item.added", json!({"output_index": 1, "item": {"type": "message", "id": "m", "role": "assistant", "content": []}})),
            event("response.output_text.delta", json!({"item_id": "m", "output_index": 1, "content_index": 0, "delta": "Sun"})),
            event("response.output_text.delta", json!({"item_id": "m", "output_index": 1, "content_index": 0, "delta": "ny."})),
            event("response.output_item.done", json!({"output_index": 1, "item": {"type": "message", "id": "m", "role": "assistant", "content": [{"type": "output_text", "text": "Sunny."}]}})),
        ]);
    } else {
        reply.extend([
            event("response.output_item.added", json!({"output_index": 1, "item": {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "get_weather", "arguments": ""}})),
            event("response.function_call_arguments.delta", json!({"item_id": "fc_1", "output_index": 1, "delta": "{\"in\":"})),
            event("response.function_call_arguments.delta", json!({"item_id": "fc_1", "output_index": 1, "delta": "\"Turin\"}"})),
            event("response.function_call_arguments.done", json!({"item_id": "fc_1", "output_index": 1, "arguments": "{\"in\":\"Turin\"}"})),
            event("response.output_item.done", json!({"output_index": 1, "item": {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "get_weather", "arguments": "{\"in\":\"Turin\"}"}})),
        ]);
    }
    reply.push(end("completed"));
    Reply::Stream(reply)
}

#[tokio::test]
async fn a_model_that_uses_tools_with_the_responses_api_alone_is_asked_there() {
    let app = TestApp::start().await;
    agent(&app, "openai:gpt-5.6", json!({"reasoning": "low"})).await;
    app.upstream.answers(refuses_tools);
    let asked = answer_a_call(&app).await;
    // Once it has said so it is not asked elsewhere again.
    let all = app.upstream.asked();
    let elsewhere = all.iter().filter(|asked| asked["input"].is_null()).count();
    assert_eq!((all.len(), elsewhere), (3, 1));
    assert_eq!(
        asked["input"],
        json!([
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "sealed"},
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{\"in\":\"Turin\"}"},
            {"type": "function_call_output", "call_id": "c1", "output": "Sun"},
        ])
    );
    assert_eq!(
        (
            &asked["store"],
            &asked["include"],
            &asked["reasoning"],
            &asked["stream"]
        ),
        (
            &json!(false),
            &json!(["reasoning.encrypted_content"]),
            &json!({"effort": "low"}),
            &json!(true)
        )
    );
    assert!(
        asked["instructions"]
            .as_str()
            .unwrap()
            .starts_with("You are a.")
    );
    let tool = asked["tools"]
        .as_array()
        .unwrap()
        .iter()
        .find(|tool| tool["name"] == "get_weather")
        .unwrap();
    assert_eq!(
        (&tool["type"], &tool["strict"]),
        (&json!("function"), &json!(false))
    );
}

#[tokio::test]
async fn what_the_responses_api_says_is_told_as_of_any_model() {
    let app = TestApp::start().await;
    agent(&app, "openai:gpt-5.6", json!({})).await;
    app.upstream.answers(refuses_tools);
    let hello = |more: Value| {
        let mut body = json!({"agent": "a", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": null, "tool_calls": [{"id": "c0", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}]}, {"role": "tool", "tool_call_id": "c0", "content": "Sun"}]});
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        app.chat(body)
    };
    let (status, told) = answer(hello(json!({"max_tokens": 50, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}, "temperature": 0.5}))).await;
    // It is no JSON, which is found out about it as about any other.
    assert_eq!(status, 502, "{told}");
    let asked = app.upstream.asked();
    assert_eq!(
        asked[1]["text"],
        json!({"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": false}})
    );
    assert_eq!(
        (&asked[1]["max_output_tokens"], &asked[1]["temperature"]),
        (&json!(50), &json!(0.5))
    );

    let (status, told) = answer(hello(json!({}))).await;
    assert_eq!(status, 200, "{told}");
    assert_eq!(told["choices"][0]["message"]["content"], "Sunny.");
    assert_eq!(told["choices"][0]["finish_reason"], "stop");
    assert_eq!(told["choices"][0]["message"]["reasoning_content"], "Hm.");
    assert_eq!(
        told["usage"],
        json!({"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18, "prompt_tokens_details": {"cached_tokens": 3}, "completion_tokens_details": {"reasoning_tokens": 2}})
    );

    // What it has no word for is refused by name, but not to those who use no tools.
    let (status, told) = answer(hello(json!({"stop": ["x"]}))).await;
    assert_eq!(status, 400);
    assert!(told["error"].as_str().unwrap().contains("`stop`"), "{told}");
    let bare = json!({"name": "bare", "model": "openai:gpt-5.6", "allowedTools": []});
    answer(app.post("/v1/agents", bare)).await;
    let (_, told) = answer(hello(json!({"agent": "bare", "stop": ["x"]}))).await;
    assert_eq!(
        told["choices"][0]["message"]["content"], "Without tools.",
        "{told}"
    );

    let message = |place: u64, phase: Value, text: &str| {
        let item = json!({"type": "message", "id": "m", "role": "assistant", "phase": phase, "content": []});
        [
            event(
                "response.output_item.added",
                json!({"output_index": place, "item": item}),
            ),
            event(
                "response.output_text.delta",
                json!({"output_index": place, "delta": text}),
            ),
        ]
    };
    let parts = [
        message(0, json!("commentary"), "I look."),
        message(1, json!("final_answer"), "Sun."),
        message(2, Value::Null, "And wind."),
    ];
    let end = json!({"response": {"status": "completed"}});
    let reply = parts
        .concat()
        .into_iter()
        .chain([event("response.completed", end)]);
    app.upstream.will(Reply::Stream(reply.collect()));
    let (_, told) = answer(hello(json!({}))).await;
    let told = &told["choices"][0]["message"];
    assert_eq!(
        (&told["content"], &told["reasoning_content"]),
        (&json!("Sun.\n\nAnd wind."), &json!("I look."))
    );

    let failed = |error: Value| {
        vec![event(
            "response.failed",
            json!({"response": {"status": "failed", "error": error}}),
        )]
    };
    let cut = |reason: &str| {
        Reply::Stream(vec![
            event(
                "response.output_text.delta",
                json!({"output_index": 0, "delta": "So far"}),
            ),
            event(
                "response.incomplete",
                json!({"response": {"status": "incomplete", "incomplete_details": {"reason": reason}}}),
            ),
        ])
    };
    for (reply, status, needle) in [
        (
            failed(json!({"code": "server_error", "message": "Oops."})),
            502,
            "unavailable",
        ),
        (
            failed(json!({"code": "rate_limit_exceeded", "message": "Slow down."})),
            429,
            "limit",
        ),
        (
            failed(json!({"code": "invalid_prompt", "message": "No server-key for this."})),
            400,
            "No [key] for this.",
        ),
        (
            vec![event(
                "error",
                json!({"code": "invalid_prompt", "message": "No."}),
            )],
            400,
            "No.",
        ),
        (
            vec![event("response.created", json!({}))],
            502,
            "could not be read",
        ),
        (failed(Value::Null), 502, "could not be read"),
    ] {
        // Again and again: what may pass is asked for once more.
        app.upstream.answers(move |_| Reply::Stream(reply.clone()));
        let (got, told) = answer(hello(json!({}))).await;
        assert_eq!(got, status, "{told}");
        assert!(told["error"].as_str().unwrap().contains(needle), "{told}");
    }
    for (reply, finish) in [
        (cut("max_output_tokens"), "length"),
        (cut("content_filter"), "content_filter"),
    ] {
        app.upstream.will(reply);
        let (_, told) = answer(hello(json!({}))).await;
        assert_eq!(told["choices"][0]["finish_reason"], finish, "{told}");
        assert_eq!(told["choices"][0]["message"]["content"], "So far");
    }
}
