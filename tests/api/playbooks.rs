//! Playbooks (contract 2.17).

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};

use crate::harness::{TestApp, answer};

fn playbook(name: &str) -> Value {
    json!({
        "name": name, "description": "Fix one issue",
        "mission": {"tasks": [{"title": "Fix {{issue}}", "description": "Fix it", "assignTo": "noor"}]},
        "parameters": [{"name": "issue", "description": "What is broken", "required": true}],
    })
}

async fn save(app: &TestApp, name: &str) {
    let (status, body) = answer(app.post("/v1/playbooks", playbook(name))).await;
    assert_eq!(status, 201, "{body}");
}

async fn names(app: &TestApp) -> Vec<String> {
    let (_, list) = answer(app.get("/v1/playbooks")).await;
    let list = list.as_array().unwrap().iter();
    list.map(|item| item["name"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn a_playbook_is_created_read_listed_replaced_and_deleted_by_both_of_its_paths() {
    let app = TestApp::start().await;
    for base in ["/v1/playbooks", "/v1/templates"] {
        let one = format!("{base}/bug-fix");
        assert_eq!(answer(app.get(base)).await.1, json!([]));
        let (status, saved) = answer(app.post(base, playbook("bug-fix"))).await;
        assert_eq!(
            (status.as_u16(), saved),
            (201, json!({"name": "bug-fix", "path": "playbooks/bug-fix"}))
        );

        let mut whole = playbook("bug-fix");
        whole["parameters"][0]["type"] = json!("string");
        let (status, read) = answer(app.get(&one)).await;
        assert_eq!((status.as_u16(), &read), (200, &whole));
        assert_eq!(
            answer(app.get(base)).await.1,
            json!([{"name": "bug-fix", "description": "Fix one issue", "parameters": whole["parameters"], "path": "playbooks/bug-fix"}])
        );

        // What was read can be sent back, and replaces it.
        whole["description"] = json!("Fix it well");
        whole["tags"] = json!(["code"]);
        whole["mission"] = json!(whole["mission"].to_string());
        assert_eq!(answer(app.post(base, whole.clone())).await.0, 201);
        let (_, read) = answer(app.get(&one)).await;
        assert_eq!(read["description"], "Fix it well");
        assert_eq!(read["mission"], playbook("bug-fix")["mission"]);
        assert_eq!(names(&app).await, ["bug-fix"]);

        // The sandbox has its own.
        let sandbox = app
            .client
            .get(format!("{}{one}", app.url))
            .bearer_auth(&app.test);
        assert_eq!(answer(sandbox).await.0, 404);

        let (status, deleted) = answer(app.delete(&one)).await;
        assert_eq!((status.as_u16(), deleted), (200, json!({"deleted": true})));
        for method in [Method::GET, Method::DELETE] {
            let (status, body) = answer(app.request(method, &one)).await;
            assert_eq!(
                (status.as_u16(), body),
                (
                    404,
                    json!({"error": "Playbook \"bug-fix\" not found", "code": "not_found"})
                )
            );
        }
    }
}

#[tokio::test]
async fn a_list_comes_by_name_in_pages() {
    let app = TestApp::start().await;
    for name in ["c", "a", "e", "b", "d"] {
        save(&app, name).await;
    }
    for base in ["/v1/playbooks", "/v1/templates"] {
        let (mut path, mut seen) = (format!("{base}?limit=2"), Vec::new());
        loop {
            let response = app.get(&path).send().await.unwrap();
            let link = response.headers().get("link").cloned();
            let page: Value = response.json().await.unwrap();
            let page = page.as_array().unwrap();
            seen.extend(page.iter().map(|item| item["name"].clone()));
            let Some(link) = link else {
                break;
            };
            assert_eq!(page.len(), 2);
            let link = link.to_str().unwrap().strip_prefix('<').unwrap();
            path = link.split_once('>').unwrap().0.to_owned();
            assert!(path.starts_with(base), "{path}");
        }
        assert_eq!(json!(seen), json!(["a", "b", "c", "d", "e"]));
        for query in ["limit=0", "limit=1001", "limit=x", "after=%00"] {
            let (status, body) = answer(app.get(&format!("{base}?{query}"))).await;
            assert_eq!(
                (status.as_u16(), &body["code"]),
                (400, &json!("bad_request")),
                "{query}"
            );
        }
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_playbook_is_told_at_once_and_nothing_is_stored() {
    let app = TestApp::start().await;
    save(&app, "bug-fix").await;
    for base in ["/v1/playbooks", "/v1/templates"] {
        let bad = json!({"name": "bug-fix", "mission": [], "parameters": [{"name": "a b", "description": "d", "type": "date"}]});
        let (status, body) = answer(app.post(base, bad)).await;
        assert_eq!(
            (status.as_u16(), &body["code"], &body["error"]),
            (
                400,
                &json!("bad_request"),
                &json!("The playbook is not valid: see `details`.")
            )
        );
        let details = body["details"].as_array().unwrap();
        for part in [
            "`description`",
            "`mission`",
            "`parameters[0].name`",
            "`parameters[0].type`",
        ] {
            let named = |detail: &&Value| detail.as_str().unwrap().contains(part);
            assert_eq!(details.iter().filter(named).count(), 1, "{part}: {body}");
        }
        assert_eq!(details.len(), 4, "{body}");

        let mut large = playbook("large");
        large["mission"]["prompt"] = json!("x".repeat(1024 * 1024));
        for bad in [
            json!({}),
            json!([]),
            json!("text"),
            Value::Null,
            playbook("Not Kebab"),
            playbook("nul\u{0}"),
            large,
        ] {
            let (status, body) = answer(app.post(base, bad)).await;
            assert_eq!(
                (status.as_u16(), &body["code"]),
                (400, &json!("bad_request")),
                "{body}"
            );
        }
        let text = app.request(Method::POST, base).body("{}");
        assert_eq!(answer(text).await.0, 415);
        let broken = app
            .request(Method::POST, base)
            .header("content-type", "application/json")
            .body("{");
        assert_eq!(answer(broken).await.0, 400);
        let huge = app.post(base, json!({"name": "x".repeat(21 * 1024 * 1024)}));
        assert_eq!(answer(huge).await.0, 413);
        for name in ["missing", "Not%20Kebab", "%00", "%FF"] {
            for method in [Method::GET, Method::DELETE] {
                let (status, body) = answer(app.request(method, &format!("{base}/{name}"))).await;
                assert_eq!(
                    (status.as_u16(), &body["code"]),
                    (404, &json!("not_found")),
                    "{name}"
                );
            }
        }
    }
    assert_eq!(names(&app).await, ["bug-fix"]);
    let (_, read) = answer(app.get("/v1/playbooks/bug-fix")).await;
    assert_eq!(read["description"], "Fix one issue");
}

#[tokio::test]
async fn a_project_keeps_500_and_can_still_replace_one() {
    let app = TestApp::start().await;
    save(&app, "first").await;
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let fill = "insert into production.playbooks (project_id, name, body)
        select project_id, 'p-' || n, body from production.playbooks, generate_series(1, 498) n";
    database.execute(fill).await.unwrap();
    // Of those who ask for the last place at once, one has it.
    let asked = ["x", "y", "z"].map(|name| answer(app.post("/v1/playbooks", playbook(name))));
    let answers = futures::future::join_all(asked).await;
    let made = answers.iter().filter(|(status, _)| *status == 201).count();
    assert_eq!(made, 1, "{answers:?}");
    let (_, refused) = answers.iter().find(|(status, _)| *status == 400).unwrap();
    assert_eq!(
        *refused,
        json!({"error": "A project keeps at most 500 playbooks. Delete one before adding another.", "code": "bad_request"})
    );
    assert_eq!(names(&app).await.len(), 500);
    save(&app, "first").await;
    assert_eq!(answer(app.delete("/v1/playbooks/p-7")).await.0, 200);
    save(&app, "one-more").await;
}
