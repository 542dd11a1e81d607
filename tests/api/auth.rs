use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use sqlx::{Connection, Executor, PgConnection};

use crate::harness::{ADMIN, TestApp, answer, eventually};

#[tokio::test]
async fn a_missing_a_malformed_and_an_unknown_key_are_told_apart() {
    let app = TestApp::start().await;
    let ask = |authorization: Option<&str>| {
        let request = app.client.get(format!("{}/v1/agents", app.url));
        match authorization {
            Some(value) => request.header("authorization", value),
            None => request,
        }
    };
    for (authorization, code) in [
        (None, "unauthorized"),
        (Some("Bearer "), "unauthorized"),
        (Some("Basic abc"), "unauthorized"),
        (Some("Bearer sk_live_unknown"), "invalid_api_key"),
        (Some("Bearer pk_live_unknown"), "invalid_api_key"),
    ] {
        let (status, body) = answer(ask(authorization)).await;
        assert_eq!(
            (status.as_u16(), body["code"].as_str()),
            (401, Some(code)),
            "{authorization:?}"
        );
    }
    let swapped = format!("Bearer {}", app.live.replace("sk_live_", "sk_test_"));
    assert_eq!(answer(ask(Some(&swapped))).await.0, 401);
    let (status, _) = answer(
        app.client
            .get(format!("{}/v1/agents", app.url))
            .header("x-api-key", &app.live),
    )
    .await;
    assert_eq!(status, 200);
    let (status, _) = answer(
        app.client
            .get(format!("{}/v1/agents?apiKey={}", app.url, app.live)),
    )
    .await;
    assert_eq!(status, 401);
}

#[tokio::test]
async fn project_keys_and_the_admin_token_open_different_doors() {
    let app = TestApp::start().await;
    let (status, body) = answer(app.get("/v1/orgs")).await;
    assert_eq!(
        (status.as_u16(), body["code"].as_str()),
        (401, Some("unauthorized"))
    );
    assert_eq!(answer(app.admin(Method::GET, "/v1/agents")).await.0, 401);
    let named = app
        .admin(Method::GET, "/v1/agents")
        .header("x-project-id", &app.project);
    assert_eq!(answer(named).await.0, 200);
    for other in ["00000000-0000-7000-8000-000000000000", "nonsense"] {
        let (status, _) = answer(
            app.admin(Method::GET, "/v1/agents")
                .header("x-project-id", other),
        )
        .await;
        assert_eq!(status, 404);
    }
}

#[tokio::test]
async fn the_worlds_of_one_project_are_apart() {
    let app = TestApp::start().await;
    app.agent("only-live").await;
    let (status, _) = answer(
        app.client
            .get(format!("{}/v1/agents/only-live", app.url))
            .bearer_auth(&app.test),
    )
    .await;
    assert_eq!(status, 404);
    let (_, list) = answer(
        app.client
            .get(format!("{}/v1/agents", app.url))
            .bearer_auth(&app.test),
    )
    .await;
    assert_eq!(list, json!([]));
    // The admin reaches the live one.
    let admin = app
        .admin(Method::GET, "/v1/agents/only-live")
        .header("x-project-id", &app.project);
    assert_eq!(answer(admin).await.0, 200);
}

#[tokio::test]
async fn a_revoked_key_is_refused_at_once_here_and_within_a_second_elsewhere() {
    let app = TestApp::start().await;
    let elsewhere = app.another_process().await;
    let ask = |url: &str| {
        app.client
            .get(format!("{url}/v1/agents"))
            .bearer_auth(&app.live)
            .send()
    };
    // Warm in both processes.
    for _ in 0..3 {
        assert_eq!(ask(&app.url).await.unwrap().status(), 200);
        assert_eq!(ask(&elsewhere).await.unwrap().status(), 200);
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    let (_, keys) = answer(app.admin(
        Method::GET,
        &format!("/v1/api-keys?projectId={}", app.project),
    ))
    .await;
    let id = keys
        .as_array()
        .unwrap()
        .iter()
        .find(|key| key["mode"] == "live")
        .unwrap()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let (status, body) = answer(app.admin(Method::DELETE, &format!("/v1/api-keys/{id}"))).await;
    assert_eq!((status.as_u16(), &body), (200, &json!({"revoked": true})));
    let revoked = std::time::Instant::now();
    assert_eq!(ask(&app.url).await.unwrap().status(), 401);
    eventually("the other process refuses the key", || async {
        ask(&elsewhere).await.unwrap().status() == 401
    })
    .await;
    assert!(
        revoked.elapsed() < Duration::from_secs(1),
        "{:?}",
        revoked.elapsed()
    );
}

#[tokio::test]
async fn a_process_that_cannot_hear_of_changes_trusts_nothing_it_knows() {
    let app = TestApp::start().await;
    let agents = || async { answer(app.get("/v1/agents")).await.0.as_u16() };
    assert_eq!(agents().await, 200);
    // From here on no process hears of the revocation; they can only stop believing themselves.
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    database
        .execute("alter table platform.changes rename to lost; delete from platform.api_keys where environment = 'live'")
        .await
        .unwrap();
    eventually("the key is refused", || async { agents().await == 401 }).await;
    // Whoever may come in is still let in, from the database.
    let sandbox = app.client.get(format!("{}/v1/agents", app.url));
    assert_eq!(answer(sandbox.bearer_auth(&app.test)).await.0, 200);
}

#[tokio::test]
async fn a_changed_agent_is_seen_at_once_here_and_soon_elsewhere() {
    let app = TestApp::start().await;
    app.agent("a").await;
    let elsewhere = app.another_process().await;
    let role = |url: String| {
        let request = app
            .client
            .get(format!("{url}/v1/agents/a"))
            .bearer_auth(&app.live);
        async move { answer(request).await.1["role"].clone() }
    };
    assert!(role(elsewhere.clone()).await.is_null());
    answer(app.patch("/v1/agents/a", json!({"role": "changed"}))).await;
    assert_eq!(role(app.url.clone()).await, "changed");
    eventually("the other process sees the change", || async {
        role(elsewhere.clone()).await == "changed"
    })
    .await;
}

#[tokio::test]
async fn suspended_and_deleted_projects_refuse_their_keys() {
    let app = TestApp::start().await;
    let project = format!("/v1/projects/{}", app.project);
    app.agent("a").await;
    answer(
        app.admin(Method::PATCH, &project)
            .json(&json!({"status": "suspended"})),
    )
    .await;
    let (status, body) = answer(app.get("/v1/agents")).await;
    assert_eq!(
        (status.as_u16(), body["code"].as_str()),
        (401, Some("invalid_api_key"))
    );
    answer(
        app.admin(Method::PATCH, &project)
            .json(&json!({"status": "active"})),
    )
    .await;
    assert_eq!(answer(app.get("/v1/agents")).await.0, 200);
    let (status, body) = answer(app.admin(Method::DELETE, &project)).await;
    assert_eq!((status.as_u16(), &body), (200, &json!({"deleted": true})));
    assert_eq!(answer(app.get("/v1/agents")).await.0, 401);
    assert_eq!(answer(app.admin(Method::GET, &project)).await.0, 404);
    assert_eq!(answer(app.admin(Method::DELETE, &project)).await.0, 404);
}

#[tokio::test]
async fn a_key_over_its_rate_is_told_when_to_come_back() {
    let app = TestApp::start_with(&["--rate-limit", "3"]).await;
    let first = app.get("/v1/agents").send().await.unwrap();
    assert_eq!(first.headers()["x-ratelimit-limit"], "3");
    assert_eq!(first.headers()["x-ratelimit-remaining"], "2");
    let mut refused = None;
    for _ in 0..6 {
        let response = app.get("/v1/agents").send().await.unwrap();
        if response.status() == 429 {
            refused = Some(response);
            break;
        }
    }
    let refused = refused.expect("seven at once are more than three a second");
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(refused.headers()["x-ratelimit-remaining"], "0");
    assert_eq!(
        refused.json::<serde_json::Value>().await.unwrap()["code"],
        "rate_limited"
    );
    // Another key has a rate of its own.
    let other = app
        .client
        .get(format!("{}/v1/agents", app.url))
        .bearer_auth(&app.test);
    assert_eq!(answer(other).await.0, 200);
}

#[tokio::test]
async fn answers_outside_the_resources_are_json_too() {
    let app = TestApp::start().await;
    for (method, path, status) in [
        (Method::GET, "/nowhere", 404),
        (Method::GET, "/v1/nowhere", 404),
        (Method::GET, "/v1/agents/%00", 404),
        (Method::PUT, "/v1/agents", 405),
        (Method::GET, "/v1/agents?limit=0", 400),
        (Method::GET, "/v1/agents?limit=many", 400),
        (Method::GET, "/api/v1/agents", 200),
        (Method::GET, "/health", 200),
        (Method::GET, "/v1/health", 200),
        (Method::GET, "/ready", 200),
    ] {
        let response = app.request(method.clone(), path).send().await.unwrap();
        assert_eq!(response.status(), status, "{method} {path}");
        assert!(
            response.headers()["x-request-id"]
                .to_str()
                .unwrap()
                .starts_with("req_")
        );
        if status == 405 {
            assert!(
                response.headers()["allow"]
                    .to_str()
                    .unwrap()
                    .contains("POST")
            );
        }
        response.json::<serde_json::Value>().await.unwrap();
    }
    let (status, _) = answer(app.request(Method::POST, "/v1/agents").body("name=a")).await;
    assert_eq!(status, 415);
    let (status, body) = answer(
        app.request(Method::POST, "/v1/agents")
            .header("content-type", "application/json")
            .body("{"),
    )
    .await;
    assert_eq!(
        (status.as_u16(), body["code"].as_str()),
        (400, Some("bad_request"))
    );
    let small = TestApp::start_with(&["--body-limit", "1000"]).await;
    let (status, body) =
        answer(small.post("/v1/agents", json!({"name": "a", "role": "x".repeat(2000)}))).await;
    assert_eq!(
        (status.as_u16(), body["code"].as_str()),
        (413, Some("bad_request"))
    );
    assert_ne!(ADMIN, app.live);
}

#[tokio::test]
async fn a_database_that_is_away_is_503_and_never_an_open_door() {
    let app = TestApp::start_with(&["--acquire-timeout-ms", "300"]).await;
    assert_eq!(answer(app.get("/v1/agents")).await.0, 200);
    app.app.db.close().await;
    eventually("the warm key is not trusted any more", || async {
        answer(app.get("/v1/agents")).await.0 == 503
    })
    .await;
    let response = app.get("/v1/models").send().await.unwrap();
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(
        response.json::<serde_json::Value>().await.unwrap()["code"],
        "internal_error"
    );
    assert_eq!(answer(app.get("/ready")).await.0, 503);
    assert_eq!(answer(app.get("/health")).await.0, 200);
}
