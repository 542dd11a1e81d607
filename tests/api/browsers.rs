//! Pages of other origins: refused unless the server is told to let them in.

use reqwest::header::HeaderMap;
use reqwest::{Method, Response};

use crate::harness::TestApp;

async fn ask(app: &TestApp, method: Method, origin: &str) -> Response {
    app.request(method, "/v1/chat/sessions")
        .header("origin", origin)
        .header("access-control-request-method", "POST")
        .header(
            "access-control-request-headers",
            "authorization, content-type, x-session-id",
        )
        .send()
        .await
        .unwrap()
}

fn list(headers: &HeaderMap, name: &str) -> Vec<String> {
    let text = headers[name].to_str().unwrap();
    text.split(',')
        .map(|item| item.trim().to_ascii_lowercase())
        .collect()
}

fn says_nothing_of_origins(response: &Response) -> bool {
    let mut names = response.headers().keys();
    !names.any(|name| name.as_str().starts_with("access-control-"))
}

#[tokio::test]
async fn pages_are_told_nothing_by_default() {
    let app = TestApp::start().await;
    for method in [Method::GET, Method::OPTIONS] {
        let response = ask(&app, method, "https://app.example.com").await;
        assert!(says_nothing_of_origins(&response), "{response:?}");
    }
}

#[tokio::test]
async fn listed_origins_may_ask_and_read_the_headers_they_need() {
    let origins = "https://app.example.com,http://localhost:5173";
    let app = TestApp::start_with(&["--cors-origins", origins, "--rate-limit", "100"]).await;
    for origin in ["https://app.example.com", "http://localhost:5173"] {
        let preflight = ask(&app, Method::OPTIONS, origin).await;
        assert_eq!(preflight.status(), 200);
        let headers = preflight.headers();
        assert_eq!(headers["access-control-allow-origin"], origin);
        assert!(list(headers, "access-control-allow-methods").contains(&"post".to_owned()));
        for needed in ["authorization", "content-type", "x-session-id"] {
            assert!(list(headers, "access-control-allow-headers").contains(&needed.to_owned()));
        }

        let answer = ask(&app, Method::GET, origin).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["access-control-allow-origin"], origin);
        let exposed = list(answer.headers(), "access-control-expose-headers");
        for needed in [
            "x-session-id",
            "x-request-id",
            "x-ratelimit-limit",
            "x-ratelimit-remaining",
            "retry-after",
        ] {
            assert!(
                exposed.contains(&needed.to_owned()),
                "{needed}: {exposed:?}"
            );
        }

        // A page must be able to read why it was refused.
        let refused = app
            .client
            .get(format!("{}/v1/agents", app.url))
            .header("origin", origin);
        let refused = refused.send().await.unwrap();
        assert_eq!(refused.status(), 401);
        assert_eq!(refused.headers()["access-control-allow-origin"], origin);
    }
    for method in [Method::GET, Method::OPTIONS] {
        let stranger = ask(&app, method, "https://evil.example.com").await;
        assert!(
            !stranger
                .headers()
                .contains_key("access-control-allow-origin")
        );
    }
}
