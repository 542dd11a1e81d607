//! The two proxies to compare with: a bare one, and the reference.

use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use futures::StreamExt;
use serde_json::Value;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::net::TcpListener;

struct Proxy {
    client: reqwest::Client,
    upstream: String,
    database: Option<PgPool>,
}

pub(crate) async fn serve(
    port: u16,
    upstream: String,
    database_url: Option<String>,
) -> anyhow::Result<()> {
    let database = match database_url {
        None => None,
        Some(url) => {
            let pool = PgPoolOptions::new()
                .max_connections(16)
                .test_before_acquire(false)
                .connect(&url)
                .await?;
            sqlx::raw_sql(
                "create table if not exists lookups (id int primary key, name text not null);
                insert into lookups values (1, 'one') on conflict do nothing;
                create table if not exists answers (id uuid primary key, question text not null, answer text not null)",
            )
            .execute(&pool)
            .await?;
            Some(pool)
        }
    };
    let client = reqwest::Client::builder().tcp_nodelay(true).build()?;
    let proxy = Arc::new(Proxy {
        client,
        upstream,
        database,
    });
    let router = Router::new()
        .route("/v1/chat/completions", post(forward))
        .route("/health", get(|| async { "ok" }))
        .with_state(proxy);
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    let listener =
        axum::serve::ListenerExt::tap_io(listener, |stream| drop(stream.set_nodelay(true)));
    Ok(axum::serve(listener, router).await?)
}

async fn forward(State(proxy): State<Arc<Proxy>>, body: Bytes) -> Response {
    match answer(&proxy, body).await {
        Ok(response) => response,
        Err(error) => (axum::http::StatusCode::BAD_GATEWAY, format!("{error:#}")).into_response(),
    }
}

async fn answer(proxy: &Arc<Proxy>, body: Bytes) -> anyhow::Result<Response> {
    let url = format!("{}/v1/chat/completions", proxy.upstream);
    let Some(database) = proxy.database.clone() else {
        let response = proxy
            .client
            .post(url)
            .header(CONTENT_TYPE, "application/json")
            .body(body)
            .send()
            .await?;
        let kind = response
            .headers()
            .get(CONTENT_TYPE)
            .cloned()
            .context("no content type")?;
        return Ok((
            [(CONTENT_TYPE, kind)],
            Body::from_stream(response.bytes_stream()),
        )
            .into_response());
    };
    let request: Value = serde_json::from_slice(&body)?;
    sqlx::query_scalar::<_, String>("select name from lookups where id = $1")
        .bind(1)
        .fetch_one(&database)
        .await?;
    let response = proxy.client.post(url).json(&request).send().await?;
    let question = request["messages"].to_string();
    if request["stream"] != true {
        let parsed: Value = response.json().await?;
        store(
            &database,
            &question,
            parsed["choices"][0]["message"]["content"]
                .as_str()
                .unwrap_or_default(),
        )
        .await?;
        return Ok(axum::Json(parsed).into_response());
    }
    let kind = [(CONTENT_TYPE, "text/event-stream")];
    Ok((
        kind,
        Body::from_stream(rewritten(response, database, question)),
    )
        .into_response())
}

/// Every event parsed and written again, and the whole stored before `[DONE]`.
fn rewritten(
    response: reqwest::Response,
    database: PgPool,
    question: String,
) -> impl futures::Stream<Item = anyhow::Result<Bytes>> {
    async_stream::try_stream! {
        let mut pieces = response.bytes_stream();
        let mut held = Vec::new();
        let mut said = String::new();
        while let Some(piece) = pieces.next().await {
            held.extend_from_slice(&piece?);
            let mut out = Vec::new();
            while let Some(end) = held.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = held.drain(..end + 2).collect();
                let data = event.strip_prefix(b"data: ").unwrap_or(&event).trim_ascii_end();
                if data == b"[DONE]" {
                    store(&database, &question, &said).await?;
                    out.extend_from_slice(b"data: [DONE]\n\n");
                    continue;
                }
                let parsed: Value = serde_json::from_slice(data)?;
                said.push_str(parsed["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
                out.extend_from_slice(b"data: ");
                serde_json::to_writer(&mut out, &parsed)?;
                out.extend_from_slice(b"\n\n");
            }
            if !out.is_empty() {
                yield Bytes::from(out);
            }
        }
    }
}

async fn store(database: &PgPool, question: &str, answer: &str) -> anyhow::Result<()> {
    sqlx::query("insert into answers (id, question, answer) values ($1, $2, $3)")
        .bind(uuid::Uuid::now_v7())
        .bind(question)
        .bind(answer)
        .execute(database)
        .await?;
    Ok(())
}
