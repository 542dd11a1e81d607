use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::harness::{TestApp, answer, eventually};

#[tokio::test]
async fn an_organization_a_project_and_a_key_lead_to_a_conversation() {
    let app = TestApp::start().await;
    let post = |path: &str, body: Value| app.admin(Method::POST, path).json(&body);
    let (status, org) = answer(post("/v1/orgs", json!({"name": "Acme GmbH"}))).await;
    assert_eq!(status, 201);
    assert!(org["slug"].as_str().unwrap().starts_with("acme-gmbh-"));
    let (status, project) = answer(post(
        "/v1/projects",
        json!({"orgId": org["id"], "name": "Docs robots", "slug": "docs-robots"}),
    ))
    .await;
    assert_eq!(
        (status.as_u16(), project["status"].as_str()),
        (201, Some("active"))
    );
    let scopes = json!([{"type": "project", "projectId": project["id"]}]);
    let (status, live) = answer(post(
        "/v1/api-keys",
        json!({"name": "ci", "scopes": scopes}),
    ))
    .await;
    assert_eq!(
        (
            status.as_u16(),
            live["mode"].as_str(),
            live["name"].as_str()
        ),
        (201, Some("live"), Some("ci"))
    );
    let (_, test) = answer(post(
        "/v1/api-keys",
        json!({"scopes": scopes, "mode": "test"}),
    ))
    .await;
    for (key, prefix) in [(&live, "sk_live_"), (&test, "sk_test_")] {
        let key = key["key"].as_str().unwrap();
        assert!(key.starts_with(prefix));
        assert_eq!(
            answer(
                app.client
                    .get(format!("{}/v1/agents", app.url))
                    .bearer_auth(key)
            )
            .await
            .1,
            json!([])
        );
    }
    let keys = format!("/v1/api-keys?projectId={}", project["id"].as_str().unwrap());
    eventually("the key's use is noted", || async {
        app.app.db.record_key_use().await.unwrap();
        answer(app.admin(Method::GET, &keys))
            .await
            .1
            .as_array()
            .unwrap()
            .iter()
            .all(|key| key["lastUsedAt"].is_string())
    })
    .await;
    let (_, listed) = answer(app.admin(Method::GET, &keys)).await;
    let text = listed.to_string();
    assert!(
        !text.contains(live["key"].as_str().unwrap()),
        "the secret is shown once"
    );
    assert!(
        live["key"]
            .as_str()
            .unwrap()
            .ends_with(listed[0]["lastFour"].as_str().unwrap())
    );
    assert!(
        live["key"]
            .as_str()
            .unwrap()
            .starts_with(listed[0]["prefix"].as_str().unwrap())
    );

    let listing = format!("/v1/projects?orgId={}", org["id"].as_str().unwrap());
    assert_eq!(
        answer(app.admin(Method::GET, &listing)).await.1,
        json!([project])
    );
    let path = format!("/v1/projects/{}", project["id"].as_str().unwrap());
    let (_, renamed) = answer(
        app.admin(Method::PATCH, &path)
            .json(&json!({"name": "Robots"})),
    )
    .await;
    assert_eq!(
        (renamed["name"].as_str(), renamed["slug"].as_str()),
        (Some("Robots"), Some("docs-robots"))
    );
}

#[tokio::test]
async fn the_platform_refuses_what_is_wrong_by_name() {
    let app = TestApp::start().await;
    let nobody = "00000000-0000-7000-8000-000000000000";
    for (method, path, body, status) in [
        (
            Method::POST,
            "/v1/orgs".to_owned(),
            json!({"name": "x"}),
            400,
        ),
        (
            Method::POST,
            "/v1/orgs".to_owned(),
            json!({"name": "Acme", "slug": "Not A Slug"}),
            400,
        ),
        (
            Method::POST,
            "/v1/orgs".to_owned(),
            json!({"name": "Acme", "slug": "test"}),
            409,
        ),
        (Method::GET, "/v1/projects".to_owned(), Value::Null, 400),
        (
            Method::POST,
            "/v1/projects".to_owned(),
            json!({"name": "x"}),
            400,
        ),
        (
            Method::POST,
            "/v1/projects".to_owned(),
            json!({"orgId": nobody, "name": "x"}),
            404,
        ),
        (
            Method::GET,
            format!("/v1/projects/{nobody}"),
            Value::Null,
            404,
        ),
        (
            Method::GET,
            "/v1/projects/nonsense".to_owned(),
            Value::Null,
            404,
        ),
        (
            Method::PATCH,
            format!("/v1/projects/{}", app.project),
            json!({"status": "deleted"}),
            400,
        ),
        (
            Method::PATCH,
            format!("/v1/projects/{}", app.project),
            json!({"name": ""}),
            400,
        ),
        (
            Method::POST,
            "/v1/api-keys".to_owned(),
            json!({"name": "k"}),
            400,
        ),
        (
            Method::POST,
            "/v1/api-keys".to_owned(),
            json!({"scopes": [{"type": "project", "projectId": nobody}]}),
            404,
        ),
        (
            Method::POST,
            "/v1/api-keys".to_owned(),
            json!({"scopes": [{"type": "project", "projectId": app.project}], "mode": "prod"}),
            400,
        ),
        (Method::GET, "/v1/api-keys".to_owned(), Value::Null, 400),
        (
            Method::DELETE,
            format!("/v1/api-keys/{nobody}"),
            Value::Null,
            404,
        ),
        (Method::GET, "/v1/byok".to_owned(), Value::Null, 400),
        (
            Method::POST,
            "/v1/byok".to_owned(),
            json!({"projectId": app.project, "provider": "openai"}),
            400,
        ),
        (
            Method::POST,
            "/v1/byok".to_owned(),
            json!({"projectId": app.project, "provider": "unknown", "key": "k"}),
            400,
        ),
        (
            Method::POST,
            "/v1/byok".to_owned(),
            json!({"projectId": nobody, "provider": "openai", "key": "k"}),
            404,
        ),
    ] {
        let mut request = app.admin(method.clone(), &path);
        if !body.is_null() {
            request = request.json(&body);
        }
        let (answered, text) = answer(request).await;
        assert_eq!(answered, status, "{method} {path} {body}: {text}");
        assert!(text["error"].is_string() && text["code"].is_string());
    }
}

#[tokio::test]
async fn a_deleted_project_leaves_no_row_behind() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    app.upstream
        .answers(|_| crate::harness::Reply::Stream(crate::harness::said("Done.")));
    app.chat(json!({"agent": "noor", "messages": [{"role": "user", "content": "hi"}]}))
        .send()
        .await
        .unwrap();
    let tasks = json!([{"title": "A", "description": "a", "assignTo": "noor"}, {"title": "B", "description": "b", "assignTo": "noor", "dependsOn": ["A"]}]);
    let barrier = json!([{"name": "b", "afterTasks": ["A"], "blocksTasks": ["B"]}]);
    let mission = json!({"tasks": tasks, "checkpoints": barrier, "schedule": "0 0 1 1 *"});
    let mission = app.mission("m", mission).await;
    app.execute(&mission).await;
    app.mission_until(&mission, "paused").await;
    for (path, body) in [
        (
            "/v1/playbooks",
            json!({"name": "p", "description": "p", "mission": {"tasks": tasks}}),
        ),
        (
            "/v1/webhooks",
            json!({"url": "http://127.0.0.1:9/", "events": ["*"]}),
        ),
        (
            "/v1/tasks",
            json!({"title": "T", "description": "t", "assignTo": "noor"}),
        ),
    ] {
        assert_eq!(answer(app.post(path, body)).await.0, 201, "{path}");
    }
    answer(
        app.request(Method::PUT, "/v1/memory")
            .json(&json!({"content": "m"})),
    )
    .await;
    let path = format!("/v1/projects/{}", app.project);
    assert_eq!(answer(app.admin(Method::DELETE, &path)).await.0, 200);
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let tables: Vec<(String,)> = sqlx::query_as(
        "select table_name::text from information_schema.columns
        where table_schema = 'production' and column_name = 'project_id' and table_name <> 'changes' order by 1",
    )
    .fetch_all(&mut database)
    .await
    .unwrap();
    assert!(tables.len() > 20, "{tables:?}");
    for (table,) in tables {
        let count = format!("select count(*) from production.{table}");
        let (left,): (i64,) = sqlx::query_as(sqlx::AssertSqlSafe(count))
            .fetch_one(&mut database)
            .await
            .unwrap();
        assert_eq!(left, 0, "{table}");
    }
}
