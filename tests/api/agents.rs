use serde_json::{Value, json};

use crate::harness::{TestApp, answer};

#[tokio::test]
async fn an_agent_comes_back_as_it_was_given() {
    let app = TestApp::start().await;
    let given = json!({
        "name": "release-notes", "role": "Technical writer", "model": "anthropic:claude-sonnet-4-5", "systemPrompt": "Be brief.",
        "allowedTools": ["read", "browser_*"], "allowedPaths": ["docs"], "skills": ["style-guide"], "maxTurns": 60, "maxConcurrency": 2,
        "reasoning": "low", "reportsTo": "docs-lead", "volatile": false, "missionGroup": "g", "browserProfile": "p",
        "emailAllowedDomains": ["example.com"], "version": "1", "author": "me", "tags": ["a"], "image_model": "x", "mcpServers": {"a": {"url": "https://example.com"}},
        "identity": {"displayName": "Noor Haddad", "title": "Writer", "tone": "Plain and brief", "socials": {"web": "https://example.com"},
            "responsibilities": ["Changelog", {"area": "Docs", "description": "Keep guides current", "priority": "high"}]}
    });
    let mut sent = given.clone();
    sent["unheard_of"] = json!(1);
    let (status, created) = answer(app.post("/v1/agents", sent)).await;
    assert_eq!(status, 201, "{created}");
    for (key, value) in given.as_object().unwrap() {
        assert_eq!(&created[key], value, "{key}");
    }
    assert!(created.get("unheard_of").is_none());
    assert_eq!(created["team"], "default");
    let id = created["id"].as_str().unwrap();
    assert!(id.starts_with("agt_"));
    for path in [
        format!("/v1/agents/{id}"),
        "/v1/agents/release-notes".to_owned(),
        "/v1/agents/release%2Dnotes".to_owned(),
    ] {
        assert_eq!(answer(app.get(&path)).await.1, created);
    }
    assert_eq!(answer(app.get("/v1/agents")).await.1, json!([created]));
}

#[tokio::test]
async fn a_change_replaces_merges_and_clears() {
    let app = TestApp::start().await;
    let first = json!({"name": "a", "role": "r", "reportsTo": "b", "maxTurns": 5, "identity": {"title": "T", "tone": "x"}});
    let (_, created) = answer(app.post("/v1/agents", first)).await;
    let id = created["id"].as_str().unwrap();
    let change = json!({"role": null, "reportsTo": "", "systemPrompt": "new", "identity": {"tone": "y", "title": null}, "name": "a"});
    let (status, changed) = answer(app.patch(&format!("/v1/agents/{id}"), change)).await;
    assert_eq!(status, 200);
    assert!(changed.get("role").is_none() && changed.get("reportsTo").is_none());
    assert_eq!(
        (&changed["systemPrompt"], &changed["maxTurns"]),
        (&json!("new"), &json!(5))
    );
    assert_eq!(changed["identity"], json!({"tone": "y"}));
    assert_eq!(answer(app.get("/v1/agents/a")).await.1, changed);
    assert_eq!(
        answer(app.patch("/v1/agents/a", json!({"name": "b"})))
            .await
            .0,
        400
    );
    assert_eq!(
        answer(app.patch("/v1/agents/ghost", json!({}))).await.0,
        404
    );
    assert_eq!(
        answer(app.patch("/v1/agents/a", json!({"team": "nowhere"})))
            .await
            .0,
        404
    );
    assert_eq!(
        answer(app.delete("/v1/agents/a")).await.1,
        json!({"removed": true})
    );
    assert_eq!(answer(app.delete("/v1/agents/a")).await.0, 404);
}

#[tokio::test]
async fn wrong_agents_are_refused_by_field() {
    let app = TestApp::start().await;
    let long = "x".repeat(65);
    for (body, field) in [
        (json!({}), "name"),
        (json!({"name": ""}), "name"),
        (json!({"name": "a b"}), "name"),
        (json!({"name": "-a"}), "name"),
        (json!({"name": "teams"}), "name"),
        (json!({"name": long}), "name"),
        (json!({"name": "a", "model": "mystery"}), "model"),
        (json!({"name": "a", "model": {"primary": "x"}}), "model"),
        (json!({"name": "a", "role": 3}), "role"),
        (json!({"name": "a", "maxTurns": 0}), "maxTurns"),
        (json!({"name": "a", "maxTurns": -1}), "maxTurns"),
        (json!({"name": "a", "reasoning": "hard"}), "reasoning"),
        (json!({"name": "a", "allowedTools": "all"}), "allowedTools"),
        (json!({"name": "a", "allowedTools": [""]}), "allowedTools"),
        (
            json!({"name": "a", "allowedTools": ["Bash Tool"]}),
            "allowedTools",
        ),
        (json!({"name": "a", "identity": {"title": 3}}), "identity"),
    ] {
        let (status, answered) = answer(app.post("/v1/agents", body.clone())).await;
        assert_eq!(
            (status.as_u16(), answered["code"].as_str()),
            (400, Some("bad_request")),
            "{body}"
        );
        assert!(
            answered["error"].as_str().unwrap().contains(field),
            "{answered}"
        );
    }
    assert_eq!(answer(app.get("/v1/agents")).await.1, json!([]));
    answer(app.post("/v1/agents", json!({"name": "a"}))).await;
    let response = app
        .post("/v1/agents", json!({"name": "a"}))
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 409);
    assert_eq!(response.headers()["x-should-retry"], "false");
    assert_eq!(response.json::<Value>().await.unwrap()["code"], "conflict");
    assert_eq!(
        answer(app.post("/v1/agents?team=nowhere", json!({"name": "b"})))
            .await
            .0,
        404
    );
}

#[tokio::test]
async fn lists_are_bounded_and_linked() {
    let app = TestApp::start().await;
    for name in ["a", "b", "c"] {
        app.agent(name).await;
    }
    let response = app.get("/v1/agents?limit=2").send().await.unwrap();
    assert_eq!(
        response.headers()["link"],
        "</v1/agents?limit=2&after=b>; rel=\"next\""
    );
    assert_eq!(
        response
            .json::<Value>()
            .await
            .unwrap()
            .as_array()
            .unwrap()
            .len(),
        2
    );
    let rest = app.get("/v1/agents?limit=2&after=b").send().await.unwrap();
    assert!(!rest.headers().contains_key("link"));
    assert_eq!(rest.json::<Value>().await.unwrap()[0]["name"], "c");
}

#[tokio::test]
async fn teams_group_agents_and_hand_them_on() {
    let app = TestApp::start().await;
    assert_eq!(answer(app.get("/v1/agents/team")).await.1, Value::Null);
    app.agent("first").await;
    let (status, team) = answer(app.post(
        "/v1/agents/teams",
        json!({"name": "docs", "description": "Writers"}),
    ))
    .await;
    assert_eq!(
        (status.as_u16(), team),
        (
            201,
            json!({"name": "docs", "description": "Writers", "agents": []})
        )
    );
    assert_eq!(
        answer(app.post("/v1/teams", json!({"name": "docs"})))
            .await
            .0,
        409
    );
    answer(app.post("/v1/agents?team=docs", json!({"name": "by-query"}))).await;
    answer(app.post("/v1/agents", json!({"name": "by-body", "team": "docs"}))).await;

    let (status, renamed) = answer(app.patch(
        "/v1/agents/team",
        json!({"oldName": "docs", "name": "writers"}),
    ))
    .await;
    assert_eq!(status, 200);
    assert_eq!(renamed["description"], "Writers");
    let names: Vec<&str> = renamed["agents"]
        .as_array()
        .unwrap()
        .iter()
        .map(|agent| agent["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["by-body", "by-query"]);
    assert_eq!(
        answer(app.patch(
            "/v1/agents/team",
            json!({"name": "writers", "description": "New"})
        ))
        .await
        .1["description"],
        "New"
    );
    assert_eq!(
        answer(app.patch("/v1/teams/writers", json!({"name": "default"})))
            .await
            .0,
        409
    );
    assert_eq!(
        answer(app.patch("/v1/agents/team", json!({"oldName": "ghost", "name": "x"})))
            .await
            .0,
        404
    );
    let list = answer(app.get("/v1/agents/teams")).await.1;
    assert_eq!(list, answer(app.get("/v1/teams")).await.1);
    assert_eq!(
        (
            list[0]["name"].as_str(),
            list[1]["agents"].as_array().unwrap().len()
        ),
        (Some("default"), 2)
    );

    assert_eq!(
        answer(app.delete("/v1/agents/teams/writers")).await.1,
        json!({"removed": true})
    );
    assert_eq!(
        answer(app.get("/v1/agents/team?name=default")).await.1["agents"]
            .as_array()
            .unwrap()
            .len(),
        3
    );
    assert_eq!(answer(app.delete("/v1/teams/writers")).await.0, 404);
    let (status, body) = answer(app.delete("/v1/agents/teams/default")).await;
    assert_eq!(
        (status.as_u16(), body["code"].as_str()),
        (409, Some("conflict"))
    );
}
