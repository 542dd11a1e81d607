//! HTTP: turns requests into calls and results into JSON. No SQL and no loop live here.

use std::time::Instant;

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};
use tracing::Instrument;
use utoipa::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::config::Config;
use error::ApiError;

pub mod activity;
pub mod agents;
pub mod approvals;
pub mod auth;
pub mod chat;
pub mod conversation;
pub mod error;
pub mod events;
pub mod extract;
mod follow;
mod follow_mission;
pub mod health;
pub mod limit;
pub mod memory;
pub mod mission_parts;
pub mod missions;
pub mod models;
pub mod openai;
pub mod patience;
pub mod platform;
pub mod playbooks;
pub mod schedules;
pub mod server;
pub mod sessions;
pub mod settings;
pub mod shapes;
mod sse;
pub mod task_bodies;
pub mod tasks;
pub mod teams;
mod transcript;
pub mod turn;
pub mod webhooks;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Polpo",
        description = "Agents for any product: chat with them as with OpenAI. Errors are `{error, code}`; OpenAI's SDKs get OpenAI's shape on the chat and model routes.",
    ),
    modifiers(&SecuritySchemes),
    security(("bearerAuth" = [])),
)]
struct Document;

struct SecuritySchemes;

impl utoipa::Modify for SecuritySchemes {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_default();
        for (name, description) in [
            ("bearerAuth", "A project's key: sk_live_… or sk_test_…"),
            ("adminToken", "The server's admin token"),
        ] {
            let mut scheme = Http::new(HttpAuthScheme::Bearer);
            scheme.description = Some(description.to_owned());
            components.add_security_scheme(name, SecurityScheme::Http(scheme));
        }
    }
}

/// The routes of missions and of when they run.
fn mission_routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(missions::list_missions, missions::create_mission))
        .routes(routes!(missions::list_resumable))
        .routes(routes!(missions::list_checkpoints))
        .routes(routes!(missions::list_delays))
        .routes(routes!(
            missions::read_mission,
            missions::update_mission,
            missions::delete_mission
        ))
        .routes(routes!(missions::execute_mission))
        .routes(routes!(missions::resume_mission))
        .routes(routes!(missions::abort_mission))
        .routes(routes!(missions::read_report))
        .routes(routes!(missions::resume_checkpoint))
        .routes(routes!(mission_parts::add_task))
        .routes(routes!(mission_parts::reorder_tasks))
        .routes(routes!(
            mission_parts::change_task,
            mission_parts::remove_task
        ))
        .routes(routes!(mission_parts::add_checkpoint))
        .routes(routes!(
            mission_parts::change_checkpoint,
            mission_parts::remove_checkpoint
        ))
        .routes(routes!(mission_parts::add_gate))
        .routes(routes!(
            mission_parts::change_gate,
            mission_parts::remove_gate
        ))
        .routes(routes!(mission_parts::add_delay))
        .routes(routes!(
            mission_parts::change_delay,
            mission_parts::remove_delay
        ))
        .routes(routes!(mission_parts::add_member))
        .routes(routes!(
            mission_parts::change_member,
            mission_parts::remove_member
        ))
        .routes(routes!(mission_parts::set_notifications))
        .routes(routes!(
            schedules::list_schedules,
            schedules::create_schedule
        ))
        .routes(routes!(
            schedules::read_schedule,
            schedules::update_schedule,
            schedules::delete_schedule
        ))
}

/// The routes of a project's key.
fn project_routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .merge(mission_routes())
        .routes(routes!(chat::create_completion))
        .routes(routes!(models::list_models))
        .routes(routes!(models::read_model))
        .routes(routes!(sessions::list_sessions))
        .routes(routes!(sessions::import_session))
        .routes(routes!(sessions::rename_session, sessions::delete_session))
        .routes(routes!(sessions::read_messages))
        .routes(routes!(agents::list_agents, agents::create_agent))
        .routes(routes!(
            agents::read_agent,
            agents::update_agent,
            agents::delete_agent
        ))
        .routes(routes!(memory::read_memory, memory::save_memory))
        .routes(routes!(
            memory::read_agent_memory,
            memory::save_agent_memory
        ))
        .routes(routes!(agents::list_processes))
        .routes(routes!(activity::read_process_activity))
        .routes(routes!(
            tasks::list_tasks,
            tasks::create_task,
            tasks::delete_tasks
        ))
        .routes(routes!(
            tasks::read_task,
            tasks::update_task,
            tasks::delete_task
        ))
        .routes(routes!(tasks::run_task))
        .routes(routes!(tasks::execute_task))
        .routes(routes!(tasks::pause_task))
        .routes(routes!(tasks::kill_task))
        .routes(routes!(tasks::force_fail_task))
        .routes(routes!(tasks::retry_task))
        .routes(routes!(tasks::reassess_task))
        .routes(routes!(tasks::queue_task))
        .routes(routes!(activity::read_activity))
        .routes(routes!(approvals::list_approvals))
        .routes(routes!(approvals::read_approval))
        .routes(routes!(approvals::approve))
        .routes(routes!(approvals::reject))
        .routes(routes!(approvals::revise))
        .routes(routes!(events::read_events))
        .routes(routes!(events::stream_events))
        .routes(routes!(settings::read_settings, settings::update_settings))
        .routes(routes!(settings::update_settings_alias))
        .routes(routes!(playbooks::list_playbooks, playbooks::save_playbook))
        .routes(routes!(
            playbooks::read_playbook,
            playbooks::delete_playbook
        ))
        .routes(routes!(playbooks::list_templates, playbooks::save_template))
        .routes(routes!(
            playbooks::read_template,
            playbooks::delete_template
        ))
        .routes(routes!(playbooks::run_playbook))
        .routes(routes!(playbooks::run_template))
        .routes(routes!(teams::list_teams, teams::create_team))
        .routes(routes!(teams::read_team, teams::update_team))
        .routes(routes!(teams::delete_team))
        .routes(routes!(teams::list_teams_alias, teams::create_team_alias))
        .routes(routes!(teams::update_team_alias, teams::delete_team_alias))
        .routes(routes!(webhooks::list_webhooks, webhooks::create_webhook))
        .routes(routes!(
            webhooks::read_webhook,
            webhooks::update_webhook,
            webhooks::delete_webhook
        ))
        .routes(routes!(webhooks::rotate_secret))
        .routes(routes!(webhooks::list_deliveries))
        .routes(routes!(webhooks::read_delivery))
        .routes(routes!(webhooks::redeliver))
}

/// The routes of the admin token.
fn platform_routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(
            platform::list_organizations,
            platform::create_organization
        ))
        .routes(routes!(platform::list_projects, platform::create_project))
        .routes(routes!(
            platform::read_project,
            platform::update_project,
            platform::delete_project
        ))
        .routes(routes!(platform::list_keys, platform::create_key))
        .routes(routes!(platform::revoke_key))
        .routes(routes!(
            platform::set_credential,
            platform::list_credentials
        ))
        .routes(routes!(platform::delete_credential))
}

/// The document that describes every route under `/v1`.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let routes = OpenApiRouter::<App>::new()
        .merge(project_routes())
        .merge(platform_routes())
        .routes(routes!(health::health));
    let (_, mut document) = OpenApiRouter::with_openapi(Document::openapi())
        .nest("/v1", routes)
        .split_for_parts();
    document.info.version = env!("CARGO_PKG_VERSION").to_owned();
    add_common_answers(&mut document);
    document
}

/// What any route with a key may answer, written once.
fn add_common_answers(document: &mut utoipa::openapi::OpenApi) {
    use utoipa::openapi::{ContentBuilder, Ref, RefOr, ResponseBuilder};
    let answer = |description: &str| {
        let content = ContentBuilder::new()
            .schema(Some(RefOr::Ref(Ref::from_schema_name("ErrorBody"))))
            .build();
        RefOr::T(
            ResponseBuilder::new()
                .description(description)
                .content("application/json", content)
                .build(),
        )
    };
    for (path, item) in &mut document.paths.paths {
        if path.ends_with("/health") {
            continue;
        }
        let operations = [
            &mut item.get,
            &mut item.post,
            &mut item.patch,
            &mut item.put,
            &mut item.delete,
        ];
        for operation in operations.into_iter().flatten() {
            for (status, description) in [
                ("400", "A parameter is missing or wrong"),
                ("401", "The key is missing, unknown or revoked"),
                ("429", "Too many requests: see `Retry-After`"),
                ("500", "A defect of the server"),
                ("503", "The database cannot be reached: see `Retry-After`"),
            ] {
                operation
                    .responses
                    .responses
                    .entry(status.to_owned())
                    .or_insert_with(|| answer(description));
            }
        }
    }
}

/// Everything the server answers.
pub fn router(app: App) -> Router {
    let (project, _) = project_routes().split_for_parts();
    let (platform, _) = platform_routes().split_for_parts();
    let v1 = Router::new()
        .merge(project.route_layer(middleware::from_fn_with_state(app.clone(), auth::project)))
        .merge(platform.route_layer(middleware::from_fn_with_state(app.clone(), auth::admin)))
        .route("/health", get(health::health))
        .route("/openapi.json", get(serve_openapi))
        .layer(middleware::from_fn_with_state(app.clone(), patience::bound));
    let router = Router::new()
        // The self-hosted layout of older clients (contract 1.1).
        .nest("/api/v1", v1.clone())
        .nest("/v1", v1)
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .fallback(|| async {
            ApiError::NotFound(
                "This path does not exist. The API is under /v1, see /v1/openapi.json.".to_owned(),
            )
        })
        .method_not_allowed_fallback(|| async { ApiError::MethodNotAllowed });
    with_layers(router, &app.config).with_state(app)
}

/// What every answer goes through, from the inside out.
fn with_layers<S: Clone + Send + Sync + 'static>(router: Router<S>, config: &Config) -> Router<S> {
    let router = router
        .layer(DefaultBodyLimit::max(config.body_limit))
        // Inside the others, so that the 500 is shaped, logged and readable from a page like any answer.
        .layer(CatchPanicLayer::custom(answer_panic))
        .layer(middleware::from_fn(error::shape_for_sdks));
    let router = match cors(&config.cors_origins().unwrap_or_default()) {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.layer(middleware::from_fn(log_request))
}

#[expect(clippy::needless_pass_by_value, reason = "the layer hands it over")]
fn answer_panic(panic: Box<dyn std::any::Any + Send>) -> Response {
    let message = panic.downcast_ref::<String>().map(String::as_str);
    let message = message
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    ApiError::Internal(anyhow::anyhow!("a handler panicked: {message}")).into_response()
}

/// What a process answers that takes no requests: whether it is alive and can work.
pub fn health_router(app: App) -> Router {
    Router::new()
        .route("/health", get(health::health))
        .route("/v1/health", get(health::health))
        .route("/ready", get(health::ready))
        .fallback(|| async {
            ApiError::NotFound(
                "This process is a worker: ask one that serves with `--role all` or `api`."
                    .to_owned(),
            )
        })
        .layer(middleware::from_fn(log_request))
        .with_state(app)
}

async fn serve_openapi(State(app): State<App>) -> Response {
    (
        [(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        )],
        app.openapi.clone(),
    )
        .into_response()
}

fn cors(origins: &[&str]) -> Option<CorsLayer> {
    let origins: Vec<HeaderValue> = origins
        .iter()
        .filter_map(|origin| origin.parse().ok())
        .collect();
    if origins.is_empty() {
        return None;
    }
    let exposed = [
        "x-session-id",
        "x-polpo-run-id",
        "x-request-id",
        "x-ratelimit-limit",
        "x-ratelimit-remaining",
        "retry-after",
    ];
    Some(
        CorsLayer::new()
            .allow_origin(AllowOrigin::list(origins))
            .allow_methods([
                Method::GET,
                Method::POST,
                Method::PATCH,
                Method::PUT,
                Method::DELETE,
            ])
            .allow_headers([
                header::AUTHORIZATION,
                header::CONTENT_TYPE,
                HeaderName::from_static("x-session-id"),
            ])
            .expose_headers(exposed.map(HeaderName::from_static)),
    )
}

/// Names each request, and writes one line about it: never its body, its query, or a credential.
async fn log_request(request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = format!("req_{}", uuid::Uuid::now_v7().simple());
    let method = request.method().clone();
    // The route rather than the path: paths hold names that callers chose.
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "unknown".to_owned(), |path| path.as_str().to_owned());
    let span = tracing::info_span!("request", request_id = %id);
    let mut response = match nul_in(request.uri()) {
        Some(error) => error.into_response(),
        None => next.run(request).instrument(span.clone()).await,
    };
    span.in_scope(|| {
        tracing::info!(
            method = %method,
            route,
            status = response.status().as_u16(),
            duration_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            "request"
        );
    });
    response.headers_mut().insert(
        "x-request-id",
        HeaderValue::try_from(id).expect("a request id is ASCII"),
    );
    response
}

/// Postgres has no NUL character: a path with one names nothing, and no filter can hold one.
fn nul_in(uri: &axum::http::Uri) -> Option<ApiError> {
    if uri.path().contains("%00") {
        Some(ApiError::NotFound("Not found".to_owned()))
    } else if uri.query().is_some_and(|query| query.contains("%00")) {
        Some(ApiError::BadRequest {
            message: "The query may not hold NUL characters.".to_owned(),
            param: None,
        })
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::StatusCode;
    use clap::Parser;
    use tower::ServiceExt;

    use super::*;

    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        config: Config,
    }

    #[tokio::test]
    async fn a_panic_is_a_500_with_an_id_and_the_next_request_is_answered() {
        let arguments = ["polpo", "--cors-origins", "https://app.example.com"];
        let config = Arguments::parse_from(arguments).config;
        let routes = Router::new()
            .route(
                "/v1/models",
                get(|| async { panic!("no {}", "reason") as &str }),
            )
            .route("/well", get(|| async { "well" }));
        let router = with_layers::<()>(routes, &config);
        let ask = |path: &str, agent: &str| {
            let request = Request::get(path)
                .header("user-agent", agent.to_owned())
                .header("origin", "https://app.example.com")
                .body(Body::empty())
                .unwrap();
            router.clone().oneshot(request)
        };
        for (agent, message) in [("curl/8", "/error"), ("OpenAI/Python 2", "/error/message")] {
            let response = ask("/v1/models", agent).await.unwrap();
            assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
            let id = response.headers()["x-request-id"].to_str().unwrap();
            assert!(id.starts_with("req_"), "{id}");
            assert!(
                response
                    .headers()
                    .contains_key("access-control-allow-origin")
            );
            let body = to_bytes(response.into_body(), 1000).await.unwrap();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body["code"], "internal_error");
            assert_eq!(body.pointer(message).unwrap(), "Internal server error");
        }
        assert_eq!(
            ask("/well", "curl/8").await.unwrap().status(),
            StatusCode::OK
        );
    }
}
