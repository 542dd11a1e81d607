//! Driven by the OpenAPI document: a new route is under these tests as soon as it is registered.

use std::collections::HashMap;

use polpo::store::World;
use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{TestApp, answer, eventually};

/// Every documented path with its methods.
async fn routes(app: &TestApp) -> Vec<(Method, String, bool)> {
    let document = answer(app.client.get(format!("{}/v1/openapi.json", app.url)))
        .await
        .1;
    assert_eq!(
        document["openapi"]
            .as_str()
            .unwrap()
            .split('.')
            .take(2)
            .collect::<Vec<_>>(),
        ["3", "1"]
    );
    let mut routes = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let Ok(method) = method.to_uppercase().parse::<Method>() else {
                continue;
            };
            let open = operation["security"] == json!([{}]);
            routes.push((method, path.clone(), open));
        }
    }
    assert!(routes.len() > 25, "{routes:?}");
    routes
}

#[tokio::test]
async fn every_route_without_a_key_is_401() {
    let app = TestApp::start().await;
    for (method, path, open) in routes(&app).await {
        let path = path
            .replace("{id}", "x")
            .replace("{name}", "x")
            .replace("{provider}", "x")
            .replace("{taskId}", "x")
            .replace("{title}", "x")
            .replace("{member}", "x")
            .replace("{deliveryId}", "x");
        for prefix in ["", "/api"] {
            let request = app
                .client
                .request(method.clone(), format!("{}{prefix}{path}", app.url))
                .json(&json!({}));
            let (status, _) = answer(request).await;
            assert_eq!(
                status,
                if open { 200 } else { 401 },
                "{method} {prefix}{path}"
            );
        }
    }
}

#[tokio::test]
async fn another_project_and_the_other_world_see_nothing() {
    let app = TestApp::start().await;
    // What is there to be seen.
    answer(app.post(
        "/v1/agents",
        json!({"name": "secret-agent", "role": "hidden"}),
    ))
    .await;
    answer(app.post("/v1/agents/teams", json!({"name": "secret-team"}))).await;
    let chat = json!({"agent": "secret-agent", "user": "secret-user", "messages": [{"role": "user", "content": "secret-words"}]});
    for path in ["/v1/memory", "/v1/memory/agent/secret-agent"] {
        let memory = json!({"content": "secret-memory"});
        assert_eq!(
            answer(app.request(Method::PUT, path).json(&memory)).await.0,
            200
        );
    }
    let session = app.chat(chat).send().await.unwrap().headers()["x-session-id"]
        .to_str()
        .unwrap()
        .to_owned();
    let agent_id = answer(app.get("/v1/agents/secret-agent")).await.1["id"]
        .as_str()
        .unwrap()
        .to_owned();

    let draft = json!({"title": "secret-task", "description": "secret-words", "assignTo": "secret-agent", "draft": true});
    let task = answer(app.post("/v1/tasks", draft)).await.1["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let gate =
        json!({"id": "secret-gate", "name": "secret", "handler": "human", "hook": "task:create"});
    answer(app.patch("/v1/config", json!({"approvalGates": [gate]}))).await;
    let gated =
        json!({"title": "secret-gated", "description": "secret-words", "assignTo": "secret-agent"});
    answer(app.post("/v1/tasks", gated)).await;
    let approval = answer(app.get("/v1/approvals")).await.1[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();

    let mission = json!({"name": "secret-mission", "prompt": "secret-words", "schedule": "0 0 1 1 *",
        "team": [{"name": "secret-member"}],
        "tasks": [
            {"title": "secret-one", "description": "secret-words", "assignTo": "secret-agent"},
            {"title": "secret-two", "description": "secret-words", "assignTo": "secret-agent", "dependsOn": ["secret-one"]},
        ],
        "checkpoints": [{"name": "secret-barrier", "afterTasks": ["secret-one"], "blocksTasks": ["secret-two"]}],
        "qualityGates": [{"name": "secret-barrier", "afterTasks": ["secret-one"], "blocksTasks": ["secret-two"]}],
        "delays": [{"name": "secret-barrier", "afterTasks": ["secret-one"], "blocksTasks": ["secret-two"], "duration": "PT1H"}]});
    let (status, mission) = answer(app.post("/v1/missions", mission)).await;
    assert_eq!(status, 201, "{mission}");
    let mission_id = mission["id"].as_str().unwrap().to_owned();
    let schedule = answer(app.get("/v1/schedules")).await.1[0]["scheduleId"]
        .as_str()
        .unwrap()
        .to_owned();
    let playbook =
        json!({"name": "secret-playbook", "description": "secret-words", "mission": {"tasks": []}});
    assert_eq!(answer(app.post("/v1/playbooks", playbook)).await.0, 201);
    let hook = json!({"url": "http://127.0.0.1:9/secret-hook", "events": ["task:created"]});
    let webhook = answer(app.post("/v1/webhooks", hook)).await.1["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let told = json!({"title": "secret-told", "description": "secret-words", "assignTo": "secret-agent", "draft": true});
    answer(app.post("/v1/tasks", told)).await;
    let mut delivery = String::new();
    eventually("there is a delivery", async || {
        let (_, listed) = answer(app.get(&format!("/v1/webhooks/{webhook}/deliveries"))).await;
        delivery = listed[0]["id"].as_str().unwrap_or_default().to_owned();
        !delivery.is_empty()
    })
    .await;

    let organization = app
        .app
        .db
        .create_organization("Other", "other")
        .await
        .unwrap();
    let other = app
        .app
        .db
        .create_project(organization.id, "Other", "other")
        .await
        .unwrap()
        .id;
    let (_, stranger) = app
        .app
        .issue_key(other, "stranger", World::Live)
        .await
        .unwrap();
    let bodies: HashMap<&str, Value> = [
        ("/v1/chat/sessions/{id}", json!({"title": "mine now"})),
        ("/v1/agents/{name}", json!({"role": "mine now"})),
        ("/v1/teams/{name}", json!({"description": "mine now"})),
        ("/v1/tasks/{id}", json!({"description": "mine now"})),
        ("/v1/approvals/{id}/reject", json!({"feedback": "mine now"})),
        ("/v1/approvals/{id}/revise", json!({"feedback": "mine now"})),
        ("/v1/missions/{id}", json!({"prompt": "mine now"})),
        (
            "/v1/missions/{id}/tasks/reorder",
            json!({"titles": ["secret-one", "secret-two"]}),
        ),
        ("/v1/schedules/{id}", json!({"enabled": false})),
        ("/v1/webhooks/{id}", json!({"enabled": false})),
        ("/v1/memory", json!({"content": "mine now"})),
        ("/v1/memory/agent/{name}", json!({"content": "mine now"})),
    ]
    .into();
    for key in [&stranger, &app.test] {
        for (method, path, open) in routes(&app).await {
            let platform = ["/v1/orgs", "/v1/projects", "/v1/api-keys", "/v1/byok"]
                .iter()
                .any(|prefix| path.starts_with(prefix));
            // The event streams never end: `events.rs` looks at them.
            if open || platform || path.starts_with("/v1/events") {
                continue;
            }
            let names: &[&str] = match path.as_str() {
                path if path.contains("/sessions/{id}") => &[&session],
                path if path.contains("/teams/{name}") => &["secret-team"],
                path if path.contains("/tasks/{id}") || path.contains("{taskId}") => &[&task],
                path if path.contains("/approvals/{id}") => &[&approval],
                path if path.contains("/missions/{id}") => &[&mission_id],
                path if path.contains("/schedules/{id}") => &[&schedule, &mission_id],
                path if path.contains("/playbooks/") || path.contains("/templates/") => {
                    &["secret-playbook"]
                }
                path if path.contains("/webhooks/{id}") => &[&webhook],
                path if path.contains('{') => &["secret-agent", &agent_id],
                _ => &[""],
            };
            for name in names {
                let part = if path.contains("/missions/") {
                    "secret-barrier"
                } else {
                    name
                };
                let real = path
                    .replace("{id}", name)
                    .replace("{name}", part)
                    .replace("{title}", "secret-one")
                    .replace("{member}", "secret-member")
                    .replace("{taskId}", name)
                    .replace("{deliveryId}", &delivery);
                let nothing = json!({});
                let request = app
                    .client
                    .request(method.clone(), format!("{}{real}", app.url))
                    .bearer_auth(key)
                    .json(bodies.get(path.as_str()).unwrap_or(&nothing));
                let (status, body) = answer(request).await;
                // A memory need not exist to be read (contract 2.13), nor a process (2.4.2): a stranger's is empty.
                let empty = path.starts_with("/v1/memory/") || path.contains("/processes/");
                if path.contains('{') && !empty {
                    assert_eq!(
                        (status.as_u16(), body["code"].as_str()),
                        (404, Some("not_found")),
                        "{method} {real}: {body}"
                    );
                } else {
                    // The name that was asked for is no secret.
                    let body = body.to_string().replace(name, "");
                    assert!(!body.contains("secret"), "{method} {real}: {body}");
                }
            }
        }
        let mut chat =
            json!({"agent": "secret-agent", "messages": [{"role": "user", "content": "hi"}]});
        let ask = |body: &Value| {
            app.client
                .post(format!("{}/v1/chat/completions", app.url))
                .bearer_auth(key)
                .json(body)
        };
        assert_eq!(answer(ask(&chat)).await.0, 404);
        // With an agent of its own, the session is still a stranger's.
        answer(
            app.client
                .post(format!("{}/v1/agents", app.url))
                .bearer_auth(key)
                .json(&json!({"name": "own"})),
        )
        .await;
        chat["agent"] = json!("own");
        assert_eq!(
            answer(ask(&chat).header("x-session-id", &session)).await.0,
            404
        );
    }
    // And nothing was changed.
    assert_eq!(
        answer(app.get("/v1/agents/secret-agent")).await.1["role"],
        "hidden"
    );
    for path in ["/v1/memory", "/v1/memory/agent/secret-agent"] {
        assert_eq!(answer(app.get(path)).await.1["content"], "secret-memory");
    }
    let untouched = app.read(&task).await;
    assert_eq!(
        (&untouched["status"], &untouched["description"]),
        (&json!("draft"), &json!("secret-words"))
    );
    let hook = answer(app.get(&format!("/v1/webhooks/{webhook}"))).await.1;
    assert_eq!(hook["enabled"], true, "{hook}");
    let waiting = answer(app.get("/v1/approvals?status=pending")).await.1;
    assert_eq!(waiting[0]["id"], json!(approval));
    assert_eq!(
        answer(app.get(&format!("/v1/missions/{mission_id}")))
            .await
            .1,
        mission
    );
    let (_, read) = answer(app.get(&format!("/v1/chat/sessions/{session}/messages"))).await;
    assert_eq!(read["session"]["title"], "secret-words");
    assert_eq!(
        answer(app.get("/v1/agents/teams"))
            .await
            .1
            .as_array()
            .unwrap()
            .len(),
        2
    );
}
