//! A stream under strain: silence, and readers that do not read.

use std::time::Duration;

use axum::body::Bytes;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use crate::harness::{Reply, TestApp, chunk, eventually, said};

fn asking() -> Value {
    json!({"agent": "a", "stream": true, "messages": [{"role": "user", "content": "Hello"}]})
}

#[tokio::test]
async fn a_comment_keeps_a_silent_stream_alive() {
    let app = TestApp::start_with(&["--keep-alive-ms", "20", "--idle-timeout-ms", "60000"]).await;
    app.agent("a").await;
    for (before, first) in [
        (Vec::new(), ": keep-alive\n\n"),
        (said("Well, ").into_iter().take(2).collect(), "data: {"),
    ] {
        app.upstream.will(Reply::Hang(before));
        let mut response = app.chat(asking()).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let mut text = String::new();
        while text.matches(": keep-alive\n\n").count() < 3 {
            let piece = response.chunk().await.unwrap().unwrap();
            text.push_str(std::str::from_utf8(&piece).unwrap());
        }
        assert!(text.starts_with(first), "{text}");
        let other: Vec<&str> = text
            .lines()
            .filter(|line| {
                !line.is_empty() && !line.starts_with("data: {") && *line != ": keep-alive"
            })
            .collect();
        assert!(other.is_empty(), "{other:?}");
    }
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_the_model_up() {
    // What the program holds is far less; the system keeps up to some megabytes for each of the two connections.
    const MOST: usize = 32 * 1024 * 1024;
    let app = TestApp::start().await;
    app.agent("a").await;
    let piece = chunk(&json!({"content": "x".repeat(4096)}), None);
    app.upstream
        .will(Reply::Flood(200 * 1024 * 1024 / piece.len(), piece));

    // A socket of its own, whose buffer the system cannot let grow.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 * 1024).unwrap();
    let address = app.url.strip_prefix("http://").unwrap();
    let mut reader = socket.connect(address.parse().unwrap()).await.unwrap();
    let body = asking().to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: polpo\r\nauthorization: Bearer {}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n",
        app.live,
        body.len()
    );
    reader
        .write_all(format!("{head}{body}").as_bytes())
        .await
        .unwrap();
    let mut status = [0; 15];
    reader.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 200 OK");

    let mut taken = 0;
    let mut quiet = 0;
    while quiet < 5 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = app.upstream.flooded();
        assert!(
            now < MOST,
            "{now} bytes were taken for a reader that took none"
        );
        quiet = if now == taken { quiet + 1 } else { 0 };
        taken = now;
    }
    assert!(taken > 0);

    // It goes on as soon as it is read again.
    let mut read = vec![0; 64 * 1024];
    while app.upstream.flooded() < taken + 4 * 1024 * 1024 {
        assert!(reader.read(&mut read).await.unwrap() > 0);
    }
    drop(reader);
    eventually("the turn of a reader that left is over", || async {
        app.app.turns.is_empty()
    })
    .await;
}

#[tokio::test]
async fn an_upstream_that_stops_in_the_middle_of_an_event_ends_in_an_error() {
    let app = TestApp::start().await;
    app.agent("a").await;
    app.upstream.will(Reply::Stream(vec![
        chunk(&json!({"content": "so far"}), None),
        Bytes::from_static(b"data: {\"choices\":[{\"delta\":{\"content\":\" so go"),
    ]));
    let text = app
        .chat(asking())
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    let frames = crate::harness::frames(&text);
    assert_eq!(frames.last().unwrap()["error"]["code"], "provider_error");
}

#[tokio::test]
async fn an_answer_that_never_ends_is_given_up() {
    let app = TestApp::start_with(&["--retry-backoff-ms", "1"]).await;
    app.agent("a").await;
    app.agent("noor").await;
    let text = "x".repeat(256 * 1024);
    let piece = chunk(&json!({"content": text}), None);
    app.upstream
        .answers(move |_| Reply::Flood(1_000_000, piece.clone()));
    let answered = app
        .chat(asking())
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    assert!(answered.contains("provider_error") && answered.len() < 40_000_000);
    let id = app.task("work", json!({"maxRetries": 0})).await;
    let failed = app.until(&id, "failed").await;
    let cause = failed["result"]["cause"].as_str().unwrap();
    assert!(cause.contains("longer than"), "{cause}");
}
