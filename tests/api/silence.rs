//! A database host that is gone without a word: its connections neither answer nor end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::watch;

use crate::harness::{Reply, TestApp, eventually, said};

/// A way to the database on which, once it is cut, nothing comes through any more but by new connections.
struct Line {
    url: String,
    cut: Arc<watch::Sender<u32>>,
}

impl Line {
    async fn to(database_url: &str) -> Self {
        let (rest, sockets) = database_url.split_once("?host=").unwrap();
        let name = rest.rsplit('/').next().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!(
            "postgres://postgres@{}/{name}",
            listener.local_addr().unwrap()
        );
        let socket = format!("{sockets}/.s.PGSQL.5432");
        let cut = Arc::new(watch::Sender::new(0));
        let cuts = cut.clone();
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut cut = cuts.subscribe();
                let socket = socket.clone();
                tokio::spawn(async move {
                    let mut far = UnixStream::connect(socket).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        // From here on both ends are held, and nothing is carried.
                        _ = cut.changed() => std::future::pending().await,
                    }
                });
            }
        });
        Self { url, cut }
    }

    fn cut(&self) {
        self.cut.send_modify(|cuts| *cuts += 1);
    }
}

#[tokio::test]
async fn an_engine_finds_its_way_back_to_a_database_that_went_away_without_a_word() {
    let app = TestApp::start_with(&["--role-of-test", "api"]).await;
    app.agent("noor").await;
    let line = Line::to(&app.database_url).await;
    let patience = [
        "--database-patience-ms",
        "1000",
        "--acquire-timeout-ms",
        "1000",
    ];
    app.another_process_by(&line.url, &patience).await;
    app.upstream
        .answers(|_| Reply::Slow(Duration::from_millis(200), said("Done.")));
    let before = app.task("before", json!({})).await;
    app.until(&before, "done").await;
    // What is under way meets dead connections at its next statement; what comes later finds none that lives.
    for number in 0..3 {
        let mut tasks = Vec::new();
        for place in 0..6 {
            let title = format!("under way {number} {place}");
            tasks.push(app.task(&title, json!({})).await);
        }
        let asked = app.upstream.asked().len();
        eventually("they are under way", async || {
            app.upstream.asked().len() > asked.saturating_sub(3)
        })
        .await;
        line.cut();
        let began = Instant::now();
        tasks.push(app.task(&format!("after {number}"), json!({})).await);
        for task in &tasks {
            while app.read(task).await["status"] != "done" {
                assert!(
                    began.elapsed() < Duration::from_secs(90),
                    "the engine waits for connections that are dead"
                );
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        eprintln!("all was done after {} ms", began.elapsed().as_millis());
    }
}
