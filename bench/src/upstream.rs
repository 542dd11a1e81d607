//! A provider that answers at once, or a token every 50 ms. The model's name says which and how much:
//! `short` is 8 tokens, `stream-64` is 64, `paced-200` is 200 at 20 a second. `agent-6-50` calls a tool five times and then
//! answers, 50 ms each time.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use futures::stream;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// The text of an answer of so many tokens.
pub(crate) fn text(tokens: usize) -> String {
    (0..tokens).map(token).collect()
}

fn token(number: usize) -> String {
    format!("token{number} ")
}

pub(crate) fn now_us() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("it is after 1970");
    u64::try_from(now.as_micros()).expect("it is before the year 586512")
}

pub(crate) async fn serve(port: u16) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    let listener =
        axum::serve::ListenerExt::tap_io(listener, |stream| drop(stream.set_nodelay(true)));
    let router = Router::new()
        .route("/v1/chat/completions", post(answer))
        .route("/asked", axum::routing::get(asked))
        .route("/waited", axum::routing::get(waited))
        .route("/health", axum::routing::get(|| async { "ok" }));
    Ok(axum::serve(listener, router).await?)
}

async fn answer(body: Bytes) -> Response {
    let request: Value = serde_json::from_slice(&body).unwrap_or_default();
    let model = request["model"].as_str().unwrap_or_default();
    if let Some(agent) = model.strip_prefix("agent-") {
        return work(agent, &request).await;
    }
    let tokens = model
        .rsplit_once('-')
        .and_then(|(_, count)| count.parse().ok())
        .unwrap_or(8);
    if request["stream"] != true {
        return axum::Json(json!({"id": "chatcmpl-up", "object": "chat.completion", "created": 1, "model": model,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text(tokens)}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": tokens + 10}}))
        .into_response();
    }
    let paced = model.starts_with("paced");
    let body = if paced {
        Body::from_stream(paced_frames(tokens))
    } else {
        Body::from_stream(stream::iter(burst_frames(tokens)))
    };
    ([(CONTENT_TYPE, "text/event-stream")], body).into_response()
}

/// When the provider was asked about the tasks that are there to be resumed, and for which of their turns.
pub(crate) type Asked = HashMap<String, Vec<(u64, u64)>>;

static ASKED: Mutex<Option<Asked>> = Mutex::new(None);

/// Microseconds that the provider has had of each task: its pauses, which are never as short as they are meant to be.
pub(crate) type Waited = HashMap<String, u64>;

static WAITED: Mutex<Option<Waited>> = Mutex::new(None);

async fn waited() -> axum::Json<Waited> {
    let waited = WAITED
        .lock()
        .map(|mut waited| waited.take())
        .unwrap_or_default();
    axum::Json(waited.unwrap_or_default())
}

async fn asked() -> axum::Json<Asked> {
    let asked = ASKED.lock().map(|asked| asked.clone()).unwrap_or_default();
    axum::Json(asked.unwrap_or_default())
}

/// A turn of an agent: so many model calls in all, so many milliseconds each. Those before the last read a memory, or save one.
async fn work(agent: &str, request: &Value) -> Response {
    let (calls, pause) = agent.split_once('-').unwrap_or(("1", "0"));
    let (pause, tool) = match pause.strip_suffix("-save") {
        Some(pause) => (
            pause,
            json!({"name": "memory_save", "arguments": "{\"content\":\"x\"}"}),
        ),
        None => (pause, json!({"name": "memory_get", "arguments": "{}"})),
    };
    let number = |text: &str| text.parse::<u64>().unwrap_or_default();
    let messages = request["messages"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    let results = messages
        .iter()
        .filter(|message| message["role"] == "tool")
        .count() as u64;
    let title = messages
        .iter()
        .find(|message| message["role"] == "user")
        .and_then(|message| match &message["content"] {
            Value::String(text) => Some(text.clone()),
            parts => parts[0]["text"].as_str().map(str::to_owned),
        });
    if let Some(title) = title.as_ref().filter(|title| title.starts_with("res"))
        && let Ok(mut asked) = ASKED.lock()
    {
        asked
            .get_or_insert_default()
            .entry(title.clone())
            .or_default()
            .push((now_us(), results));
    }
    let pause = Duration::from_millis(number(pause));
    if !pause.is_zero() {
        let began = Instant::now();
        tokio::time::sleep(pause).await;
        if let (Some(title), Ok(mut waited)) = (title, WAITED.lock()) {
            let took = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            *waited.get_or_insert_default().entry(title).or_default() += took;
        }
    }
    let (delta, finish) = if results + 1 < number(calls) {
        let call = json!({"index": 0, "id": format!("call_{results}"), "type": "function",
            "function": tool});
        (
            json!({"role": "assistant", "tool_calls": [call]}),
            "tool_calls",
        )
    } else {
        (json!({"role": "assistant", "content": "Done."}), "stop")
    };
    let usage = json!({"id": "chatcmpl-up", "object": "chat.completion.chunk", "created": 1, "model": "up", "choices": [],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}});
    let body = [
        &chunk(&delta, None)[..],
        &chunk(&json!({}), Some(finish))[..],
        format!("data: {usage}\n\ndata: [DONE]\n\n").as_bytes(),
    ]
    .concat();
    ([(CONTENT_TYPE, "text/event-stream")], body).into_response()
}

fn chunk(delta: &Value, finish: Option<&str>) -> Bytes {
    let chunk = json!({"id": "chatcmpl-up", "object": "chat.completion.chunk", "created": 1, "model": "up",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]});
    Bytes::from(format!("data: {chunk}\n\n"))
}

fn ending(tokens: usize) -> Bytes {
    let usage = json!({"id": "chatcmpl-up", "object": "chat.completion.chunk", "created": 1, "model": "up", "choices": [],
        "usage": {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": tokens + 10}});
    let stop = chunk(&json!({}), Some("stop"));
    Bytes::from(
        [
            &stop[..],
            format!("data: {usage}\n\ndata: [DONE]\n\n").as_bytes(),
        ]
        .concat(),
    )
}

fn burst_frames(tokens: usize) -> Vec<Result<Bytes, std::io::Error>> {
    let words = (0..tokens).map(|number| chunk(&json!({"content": token(number)}), None));
    let begin = chunk(&json!({"role": "assistant", "content": ""}), None);
    [begin]
        .into_iter()
        .chain(words)
        .chain([ending(tokens)])
        .map(Ok)
        .collect()
}

/// Each token is the time at which it was sent, so that its reader can tell how long it took.
fn paced_frames(tokens: usize) -> impl futures::Stream<Item = Result<Bytes, std::io::Error>> {
    async_stream::stream! {
        yield Ok(chunk(&json!({"role": "assistant", "content": ""}), None));
        let mut interval = tokio::time::interval(Duration::from_millis(50));
        for _ in 0..tokens {
            interval.tick().await;
            yield Ok(chunk(&json!({"content": format!("{} ", now_us())}), None));
        }
        yield Ok(ending(tokens));
    }
}
