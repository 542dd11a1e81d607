use serde_json::{Value, json};

use crate::harness::{TestApp, answer};

async fn talk(app: &TestApp, body: Value) -> String {
    let mut request =
        json!({"agent": "assistant", "messages": [{"role": "user", "content": "Hello"}]});
    request
        .as_object_mut()
        .unwrap()
        .extend(body.as_object().unwrap().clone());
    let response = app.chat(request).send().await.unwrap();
    assert_eq!(response.status(), 200);
    response.headers()["x-session-id"]
        .to_str()
        .unwrap()
        .to_owned()
}

async fn listed(app: &TestApp, query: &str) -> Vec<String> {
    let (status, body) = answer(app.get(&format!("/v1/chat/sessions{query}"))).await;
    assert_eq!(status, 200, "{body}");
    body["sessions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|session| session["id"].as_str().unwrap().to_owned())
        .collect()
}

async fn start() -> TestApp {
    let app = TestApp::start().await;
    answer(app.post("/v1/agents", json!({"name": "assistant"}))).await;
    app
}

#[tokio::test]
async fn sessions_are_listed_by_activity_user_and_label() {
    let app = start().await;
    let first = talk(
        &app,
        json!({"user": "u1", "metadata": {"plan": "pro", "region": "eu"}}),
    )
    .await;
    let second = talk(&app, json!({"user": "u2", "metadata": {"plan": "pro"}})).await;
    let third = talk(&app, json!({})).await;
    assert_eq!(
        listed(&app, "").await,
        [third.clone(), second.clone(), first.clone()]
    );
    assert_eq!(listed(&app, "?user=u1").await, [first.as_str()]);
    assert_eq!(
        listed(&app, "?metadata.plan=pro").await,
        [second.clone(), first.clone()]
    );
    assert_eq!(
        listed(&app, "?metadata.plan=pro&metadata.region=eu").await,
        [first.as_str()]
    );
    assert!(listed(&app, "?user=nobody").await.is_empty());
    assert_eq!(
        listed(&app, &format!("?limit=1&after={third}")).await,
        [second.as_str()]
    );
    let page = app
        .get("/v1/chat/sessions?limit=1&metadata.plan=pro")
        .send()
        .await
        .unwrap();
    assert_eq!(
        page.headers()["link"],
        format!("</v1/chat/sessions?metadata.plan=pro&limit=1&after={second}>; rel=\"next\"")
            .as_str()
    );
    assert_eq!(
        answer(app.get("/v1/chat/sessions?after=nonsense")).await.0,
        400
    );
    // Saying something moves a session to the front.
    app.chat(json!({"agent": "assistant", "messages": [{"role": "user", "content": "again"}]}))
        .header("x-session-id", &first)
        .send()
        .await
        .unwrap();
    assert_eq!(listed(&app, "?limit=1").await, [first]);
}

#[tokio::test]
async fn a_session_is_renamed_read_in_pages_and_deleted() {
    let app = start().await;
    let id = talk(
        &app,
        json!({"messages": [{"role": "user", "content": "x".repeat(100)}]}),
    )
    .await;
    let path = format!("/v1/chat/sessions/{id}");
    let (_, read) = answer(app.get(&format!("{path}/messages"))).await;
    assert_eq!(read["session"]["title"], "x".repeat(60));
    assert_eq!(
        answer(app.patch(&path, json!({"title": "Changes"})))
            .await
            .1,
        json!({"renamed": true})
    );
    assert_eq!(answer(app.patch(&path, json!({"title": ""}))).await.0, 400);
    assert_eq!(answer(app.patch(&path, json!({}))).await.0, 400);
    let (_, newest) = answer(app.get(&format!("{path}/messages?limit=1"))).await;
    assert_eq!(
        (
            newest["session"]["title"].as_str(),
            newest["messages"][0]["role"].as_str()
        ),
        (Some("Changes"), Some("assistant"))
    );
    let before = newest["messages"][0]["id"].as_str().unwrap();
    let (_, older) = answer(app.get(&format!("{path}/messages?limit=1&before={before}"))).await;
    assert_eq!(older["messages"][0]["role"], "user");
    assert_eq!(answer(app.delete(&path)).await.1, json!({"deleted": true}));
    for gone in [
        app.get(&format!("{path}/messages")),
        app.delete(&path),
        app.patch(&path, json!({"title": "x"})),
        app.get("/v1/chat/sessions/nonsense/messages"),
    ] {
        assert_eq!(answer(gone).await.0, 404);
    }
}

#[tokio::test]
async fn a_conversation_from_elsewhere_goes_on_here() {
    let app = TestApp::start().await;
    app.agent("writer").await;
    let messages = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "toolCalls": [{"id": "c1", "name": "weather", "arguments": {"city": "Turin"}, "result": "21", "state": "completed"}]},
        {"role": "assistant", "content": "21 degrees"}]);
    let (status, imported) = answer(app.post(
        "/v1/chat/sessions/import",
        json!({"title": "Old", "agent": "writer", "messages": messages}),
    ))
    .await;
    assert_eq!(status, 201);
    let id = imported["sessionId"].as_str().unwrap();
    let (_, read) = answer(app.get(&format!("/v1/chat/sessions/{id}/messages"))).await;
    assert_eq!(read["messages"][1]["toolCalls"][0]["result"], "21");
    assert_eq!(read["messages"][2]["content"], "21 degrees");
    app.upstream.will_say("yes");
    answer(
        app.chat(json!({"agent": "writer", "messages": [{"role": "user", "content": "Still?"}]}))
            .header("x-session-id", id),
    )
    .await;
    let heard = app.upstream.asked().remove(0);
    let roles: Vec<&str> = heard["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|message| message["role"].as_str().unwrap())
        .collect();
    assert_eq!(
        roles,
        ["system", "user", "assistant", "tool", "assistant", "user"]
    );
    for wrong in [
        json!({}),
        json!({"messages": "x"}),
        json!({"messages": [{"role": "system", "content": "x"}]}),
    ] {
        assert_eq!(
            answer(app.post("/v1/chat/sessions/import", wrong)).await.0,
            400
        );
    }
}

#[tokio::test]
async fn turns_at_once_keep_their_messages_adjacent() {
    let app = start().await;
    let id = talk(&app, json!({})).await;
    let turns = (0..12).map(|turn| {
        let body = json!({"agent": "assistant", "messages": [{"role": "user", "content": format!("turn {turn}")}]});
        answer(app.chat(body).header("x-session-id", &id))
    });
    for (status, _) in futures::future::join_all(turns).await {
        assert_eq!(status, 200);
    }
    let (_, read) = answer(app.get(&format!("/v1/chat/sessions/{id}/messages"))).await;
    assert_eq!(read["session"]["messageCount"], 26);
    for pair in read["messages"].as_array().unwrap().chunks(2) {
        let said = pair[0]["content"].as_str().unwrap();
        assert!(
            pair[1]["content"]
                .as_str()
                .unwrap()
                .starts_with(&format!("You said: {said}\n")),
            "{pair:?}"
        );
    }
}

#[tokio::test]
async fn a_session_deleted_under_a_turn_ends_it_in_an_error() {
    let app = TestApp::start().await;
    app.agent("writer").await;
    app.upstream.will_say("first");
    let first = app
        .chat(json!({"agent": "writer", "messages": [{"role": "user", "content": "hi"}]}))
        .send()
        .await
        .unwrap();
    let id = first.headers()["x-session-id"].to_str().unwrap().to_owned();
    app.upstream
        .will(crate::harness::Reply::Stream(crate::harness::said(
            &"word ".repeat(3000),
        )));
    let turn = app.chat(json!({"agent": "writer", "stream": true, "messages": [{"role": "user", "content": "go on"}]})).header("x-session-id", &id).send().await.unwrap();
    assert_eq!(
        answer(app.delete(&format!("/v1/chat/sessions/{id}")))
            .await
            .0,
        200
    );
    let frames = crate::harness::frames(&turn.text().await.unwrap());
    assert_eq!(frames.last().unwrap()["error"]["code"], "not_found");
}

#[tokio::test]
async fn a_filter_that_no_stored_text_can_match_is_refused() {
    let app = start().await;
    for query in [
        "user=%00",
        "user=a%00b",
        "metadata.k=%00",
        "metadata.%00=k",
        "after=%00",
    ] {
        let (status, body) = answer(app.get(&format!("/v1/chat/sessions?{query}"))).await;
        assert_eq!(
            (status.as_u16(), body["code"].as_str()),
            (400, Some("bad_request")),
            "{query}"
        );
    }
    for path in [
        "/v1/chat/sessions/%00/messages",
        "/v1/agents/a%00b",
        "/v1/models/%00",
    ] {
        assert_eq!(answer(app.get(path)).await.0, 404, "{path}");
    }
    let import = json!({"title": "x\u{0}", "messages": []});
    assert_eq!(
        answer(app.post("/v1/chat/sessions/import", import)).await.0,
        400
    );
}
