//! The event stream (contract 2.9).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use polpo::store::{Holder, Lane, Room, World};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::harness::{TestApp, answer, eventually};

/// One frame: its id, its name, its data.
type Frame = (String, String, String);

/// A reader of a stream.
struct Reader {
    body: futures::stream::BoxStream<'static, Option<Vec<u8>>>,
    text: String,
    ended: bool,
}

impl Reader {
    async fn open(app: &TestApp, url: &str, query: &str, last: Option<&str>) -> Self {
        let mut request = app
            .client
            .get(format!("{url}/v1/events{query}"))
            .bearer_auth(&app.live);
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        let body = response
            .bytes_stream()
            .map(|piece| piece.ok().map(|piece| piece.to_vec()))
            .boxed();
        let mut reader = Self {
            body,
            text: String::new(),
            ended: false,
        };
        // What happens after this is heard live.
        assert!(reader.block().await.starts_with(": connected"));
        reader
    }

    /// The next block of lines, comments and heartbeats too.
    async fn block(&mut self) -> String {
        loop {
            if let Some(end) = self.text.find("\n\n") {
                return self.text.drain(..end + 2).collect();
            }
            let piece = tokio::time::timeout(Duration::from_secs(10), self.body.next())
                .await
                .expect("the stream is silent");
            match piece.flatten() {
                Some(piece) => self.text += std::str::from_utf8(&piece).unwrap(),
                None => {
                    self.ended = true;
                    return String::new();
                }
            }
        }
    }

    async fn frame(&mut self) -> Frame {
        loop {
            let block = self.block().await;
            assert!(!self.ended, "the stream ended");
            let line = |key: &str| {
                block
                    .lines()
                    .find_map(|line| line.strip_prefix(key))
                    .unwrap_or_default()
                    .to_owned()
            };
            if block.contains("\nid: ") {
                return (line("id: "), line("event: "), line("data: "));
            }
        }
    }
}

fn number(id: &str) -> i64 {
    id.strip_prefix("evt_").unwrap().parse().unwrap()
}

async fn write(app: &TestApp, url: &str, title: &str) {
    let task = json!({"title": title, "description": "d", "assignTo": "noor", "draft": true});
    let (status, body) = answer(
        app.client
            .post(format!("{url}/v1/tasks"))
            .bearer_auth(&app.live)
            .json(&task),
    )
    .await;
    assert_eq!(status, 201, "{body}");
}

/// So many events of so many bytes, of which nobody is woken. There must be one already.
async fn events_of(app: &TestApp, count: usize, bytes: usize) {
    let statements = format!(
        "insert into production.events (project_id, seq, name, payload, at)
        select project_id, n, 'task:updated', '{{\"x\":\"' || repeat('x', {bytes}) || '\"}}', now()
        from production.event_heads, generate_series(last + 1, last + {count}) as n;
        update production.event_heads set last = last + {count}"
    );
    app.sql(statements).await;
}

#[tokio::test]
async fn a_frame_has_a_name_data_with_a_time_and_an_id() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    let mut reader = Reader::open(&app, &app.url, "", None).await;
    write(&app, &app.url, "one").await;
    let (id, name, data) = reader.frame().await;
    assert_eq!((id.as_str(), name.as_str()), ("evt_00001", "task:created"));
    let data: Value = serde_json::from_str(&data).unwrap();
    assert!(data["timestamp"].as_str().unwrap().ends_with('Z'));
    assert_eq!(data["task"]["title"], "one");
    let mut aliased = Reader::open(&app, &app.url, "/stream?lastEventId=evt_00000", None).await;
    assert_eq!(aliased.frame().await.0, "evt_00001");
}

#[tokio::test]
async fn readers_that_come_and_go_see_each_event_once_and_in_order() {
    let app = Arc::new(TestApp::start().await);
    app.agent("noor").await;
    let elsewhere = app.another_process().await;
    let (writers, each) = (8, 40);
    let whole: i64 = writers * each;
    let mut tasks = Vec::new();
    for writer in 0..writers {
        let (app, elsewhere) = (app.clone(), elsewhere.clone());
        tasks.push(tokio::spawn(async move {
            let url = if writer % 2 == 0 {
                app.url.clone()
            } else {
                elsewhere
            };
            for event in 0..each {
                write(&app, &url, &format!("{writer} {event}")).await;
            }
        }));
    }
    for reader in 0..6_i64 {
        let (app, elsewhere) = (app.clone(), elsewhere.clone());
        tasks.push(tokio::spawn(async move {
            let mut seen: Vec<i64> = Vec::new();
            // Each leaves after another number of events, and comes back in another way to another process.
            let mut patience = 3 + reader * 7;
            while seen.len() < usize::try_from(whole).unwrap() {
                let last = format!("evt_{:05}", seen.last().unwrap_or(&0));
                let url = if patience % 2 == 0 {
                    &app.url
                } else {
                    &elsewhere
                };
                let mut stream = match patience % 3 {
                    0 => Reader::open(&app, url, "", Some(&last)).await,
                    1 => Reader::open(&app, url, &format!("?lastEventId={last}"), None).await,
                    _ => Reader::open(&app, url, &format!("?after={last}"), None).await,
                };
                for _ in 0..patience {
                    if seen.len() == usize::try_from(whole).unwrap() {
                        break;
                    }
                    seen.push(number(&stream.frame().await.0));
                }
                patience = (patience * 5 + 3) % 61 + 1;
            }
            assert_eq!(seen, (1..=whole).collect::<Vec<_>>());
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn filters_hold_for_what_was_and_for_what_comes() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    write(&app, &app.url, "one").await;
    answer(app.delete("/v1/tasks?all=true")).await;
    let mut removed = Reader::open(&app, &app.url, "?filter=task:removed", Some("evt_0")).await;
    let mut all = Reader::open(
        &app,
        &app.url,
        "?filter=%20agent:*%20,%20task:*",
        Some("evt_0"),
    )
    .await;
    write(&app, &app.url, "two").await;
    answer(app.delete("/v1/tasks?all=true")).await;
    assert_eq!(
        (removed.frame().await.0, removed.frame().await.0),
        ("evt_00002".to_owned(), "evt_00004".to_owned())
    );
    for expected in 1..=4 {
        assert_eq!(number(&all.frame().await.0), expected);
    }
}

#[tokio::test]
async fn a_silent_stream_beats_and_a_stopping_server_says_where_to_go_on() {
    let app = TestApp::start_with(&["--heartbeat-ms", "50"]).await;
    let mut reader = Reader::open(&app, &app.url, "", None).await;
    assert_eq!(reader.block().await, "event: heartbeat\ndata: \n\n");
    app.stop.cancel();
    let mut last = String::new();
    while !reader.ended {
        let block = reader.block().await;
        if !block.is_empty() {
            last = block;
        }
    }
    assert_eq!(
        last,
        ": closed: the server is stopping; go on with Last-Event-ID: evt_00000\n\n"
    );
}

#[tokio::test]
async fn an_id_that_is_none_is_400_and_one_that_is_pruned_410() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    for title in ["one", "two", "three"] {
        write(&app, &app.url, title).await;
    }
    for id in ["evt_00004", "evt_x", "msg_1", "-1", "evt_-1"] {
        let request = app.get("/v1/events").header("last-event-id", id);
        assert_eq!(answer(request).await.0, 400, "{id}");
    }
    let now = chrono::Utc::now();
    assert_eq!(app.app.db.prune_events(World::Live, now).await.unwrap(), 3);
    write(&app, &app.url, "four").await;
    for id in ["evt_00000", "evt_00002"] {
        let (status, body) = answer(app.get("/v1/events").header("last-event-id", id)).await;
        assert_eq!((status.as_u16(), &body["code"]), (410, &json!("not_found")));
        assert!(
            body["error"].as_str().unwrap().contains("evt_00003"),
            "{body}"
        );
    }
    let mut reader = Reader::open(&app, &app.url, "", Some("evt_00003")).await;
    assert_eq!(reader.frame().await.0, "evt_00004");
}

/// Has chats tell events.
async fn chats_tell(app: &TestApp) {
    let (status, body) = answer(app.patch("/v1/config", json!({"chatEvents": true}))).await;
    assert_eq!(status, 200, "{body}");
}

#[tokio::test]
async fn chats_tell_nothing_unless_they_are_to() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    for tells in [false, true] {
        if tells {
            chats_tell(&app).await;
        }
        app.upstream.will_say("Hello.");
        let said = json!({"agent": "noor", "messages": [{"role": "user", "content": "Hi"}]});
        assert_eq!(answer(app.chat(said)).await.0, 200);
    }
    eventually("the second is told of", async || {
        !app.events("message:*").await.is_empty()
    })
    .await;
    assert_eq!(app.events("session:*,message:*").await.len(), 3);
}

#[tokio::test]
async fn what_is_said_in_chats_is_told_in_order_and_once() {
    let app = TestApp::start().await;
    chats_tell(&app).await;
    app.agent("noor").await;
    let mut reader = Reader::open(&app, &app.url, "?filter=session:*,message:*", None).await;
    let mut session = String::new();
    for turn in 0..2 {
        app.upstream.will_say("Hello.");
        let said = json!({"agent": "noor", "messages": [{"role": "user", "content": "Hi"}]});
        let mut request = app.chat(said);
        if turn > 0 {
            request = request.header("x-session-id", &session);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        let header = response.headers()["x-session-id"].to_str().unwrap();
        header.clone_into(&mut session);
    }
    let mut told = Vec::new();
    for _ in 0..5 {
        let (_, name, data) = reader.frame().await;
        let data: Value = serde_json::from_str(&data).unwrap();
        assert_eq!(data["sessionId"], session.as_str(), "{data}");
        assert!(data["timestamp"].is_string());
        told.push((name, data));
    }
    let names: Vec<String> = told
        .iter()
        .map(|(name, data)| format!("{name} {}", data["role"].as_str().unwrap_or("-")))
        .collect();
    let expected = [
        "session:created -",
        "message:added user",
        "message:added assistant",
        "message:added user",
        "message:added assistant",
    ];
    assert_eq!(names, expected);
    let stored = answer(app.get(&format!("/v1/chat/sessions/{session}/messages")))
        .await
        .1;
    let ids: Vec<&Value> = stored["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|message| &message["id"])
        .collect();
    let told_ids: Vec<&Value> = told[1..]
        .iter()
        .map(|(_, data)| &data["messageId"])
        .collect();
    assert_eq!(told_ids, ids);
    let import = json!({"title": "Old", "messages": [{"role": "user", "content": "a"}]});
    let imported = answer(app.post("/v1/chat/sessions/import", import)).await.1;
    let (_, name, data) = reader.frame().await;
    let data: Value = serde_json::from_str(&data).unwrap();
    assert_eq!(name, "session:created");
    assert_eq!(data["sessionId"], imported["sessionId"]);
    assert_eq!(
        (&data["title"], &data["messageCount"]),
        (&json!("Old"), &json!(1))
    );
}

#[tokio::test]
async fn chats_of_a_process_that_is_gone_are_told_by_another() {
    // It is as good as gone: whatever it has to say after its commits is lost.
    let app = TestApp::start_with(&["--mute", "true"]).await;
    chats_tell(&app).await;
    app.agent("noor").await;
    app.upstream.will_say("Hello.");
    let said = json!({"agent": "noor", "messages": [{"role": "user", "content": "Hi"}]});
    assert_eq!(answer(app.chat(said)).await.0, 200);
    let db = &app.app.db;
    eventually("all is told", async || {
        db.tell_left_untold(World::Live).await.unwrap();
        app.events("session:*,message:*").await.len() == 3
    })
    .await;
    db.tell_left_untold(World::Live).await.unwrap();
    assert_eq!(app.events("session:*,message:*").await.len(), 3);
}

#[tokio::test]
async fn nobody_else_hears_anything() {
    let app = TestApp::start().await;
    app.agent("noor").await;
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
    let (_, stranger) = app.app.issue_key(other, "s", World::Live).await.unwrap();
    let heard = Arc::new(AtomicBool::new(false));
    let done = CancellationToken::new();
    for key in [&stranger, &app.test] {
        let response = app
            .client
            .get(format!("{}/v1/events", app.url))
            .bearer_auth(key)
            .send()
            .await
            .unwrap();
        let (heard, done) = (heard.clone(), done.clone());
        let mut body = response.bytes_stream();
        assert!(
            body.next()
                .await
                .unwrap()
                .unwrap()
                .starts_with(b": connected")
        );
        tokio::spawn(async move {
            tokio::select! {
                _ = body.next() => heard.store(true, Ordering::SeqCst),
                () = done.cancelled() => {}
            }
        });
        let request = app
            .client
            .get(format!("{}/v1/events", app.url))
            .bearer_auth(key)
            .header("last-event-id", "evt_00001");
        assert_eq!(answer(request).await.0, 400);
    }
    let mut own = Reader::open(&app, &app.url, "", None).await;
    write(&app, &app.url, "secret").await;
    own.frame().await;
    assert!(!heard.load(Ordering::SeqCst));
    done.cancel();
    let closed = app
        .client
        .request(Method::GET, format!("{}/v1/events", app.url));
    assert_eq!(answer(closed).await.0, 401);
}

#[tokio::test]
async fn a_stream_of_the_admins_ends_with_its_project() {
    for (method, change) in [
        (Method::PATCH, json!({"status": "suspended"})),
        (Method::DELETE, json!({})),
    ] {
        let app = TestApp::start().await;
        let request = app.admin(Method::GET, "/v1/events");
        let response = request
            .header("x-project-id", &app.project)
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), 200);
        let path = format!("/v1/projects/{}", app.project);
        assert_eq!(answer(app.admin(method, &path).json(&change)).await.0, 200);
        let whole = tokio::time::timeout(Duration::from_secs(10), response.text()).await;
        let text = whole.expect("the stream ends").unwrap();
        assert!(
            text.contains(": closed: the project is suspended or gone"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_heartbeat_names_the_last_event_where_the_filter_let_none_through() {
    let app = TestApp::start_with(&["--heartbeat-ms", "100"]).await;
    app.agent("noor").await;
    let mut reader = Reader::open(&app, &app.url, "?filter=approval:*", None).await;
    assert_eq!(reader.block().await, "event: heartbeat\ndata: \n\n");
    write(&app, &app.url, "one").await;
    loop {
        let block = reader.block().await;
        if block != "event: heartbeat\ndata: \n\n" {
            assert_eq!(block, "event: heartbeat\ndata: \nid: evt_00001\n\n");
            break;
        }
    }
    assert_eq!(reader.block().await, "event: heartbeat\ndata: \n\n");
}

#[tokio::test]
async fn a_reader_that_is_too_slow_is_told_the_last_event_that_it_was_sent() {
    let app = TestApp::start_with(&["--stall-ms", "6000"]).await;
    app.agent("noor").await;
    write(&app, &app.url, "one").await;
    events_of(&app, 400, 100_000).await;
    let response = app.get("/v1/events?after=evt_00000").send().await.unwrap();
    let mut pieces = response.bytes_stream();
    let mut text = Vec::new();
    let mut pause = Some(Duration::from_millis(4_000));
    while let Some(Ok(piece)) = pieces.next().await {
        text.extend_from_slice(&piece);
        if let Some(pause) = pause.take_if(|_| text.len() > 1_000_000) {
            tokio::time::sleep(pause).await;
        }
    }
    let text = String::from_utf8(text).unwrap();
    let seen = text.matches("\nid: evt_").count();
    assert!(seen < 400, "{seen}");
    assert!(text.ends_with(&format!(
        ": closed: too slow; go on with Last-Event-ID: evt_{seen:05}\n\n"
    )));
}

#[tokio::test]
async fn an_empty_id_hides_no_other() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    write(&app, &app.url, "one").await;
    write(&app, &app.url, "two").await;
    let mut reader = Reader::open(&app, &app.url, "?lastEventId=evt_00001", Some("")).await;
    assert_eq!(reader.frame().await.0, "evt_00002");
    let query = "?lastEventId=&after=evt_00001";
    let mut reader = Reader::open(&app, &app.url, query, None).await;
    assert_eq!(reader.frame().await.0, "evt_00002");
}

#[tokio::test]
async fn a_reader_that_catches_up_is_stopped_when_its_key_is_revoked() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    write(&app, &app.url, "one").await;
    // So many that it is still behind when the key goes.
    events_of(&app, 4_000, 20_000).await;
    let response = app.get("/v1/events?after=evt_00000").send().await.unwrap();
    assert_eq!(response.status(), 200);
    let keys = app.admin(
        Method::GET,
        &format!("/v1/api-keys?projectId={}", app.project),
    );
    let keys = answer(keys).await.1;
    let live = keys
        .as_array()
        .unwrap()
        .iter()
        .find(|key| key["name"] == "live");
    let path = format!("/v1/api-keys/{}", live.unwrap()["id"].as_str().unwrap());
    let mut pieces = response.bytes_stream();
    let mut text = Vec::new();
    let mut revoked = false;
    while let Some(piece) = pieces.next().await {
        text.extend_from_slice(&piece.unwrap());
        if !revoked && text.len() > 1_000_000 {
            assert_eq!(answer(app.admin(Method::DELETE, &path)).await.0, 200);
            revoked = true;
            tokio::time::sleep(Duration::from_millis(1_500)).await;
        }
    }
    let text = String::from_utf8(text).unwrap();
    let seen = text.matches("\nid: evt_").count();
    assert!((1..4000).contains(&seen), "{seen}");
    assert!(text.ends_with(&format!(
        ": closed: the key was revoked; go on with Last-Event-ID: evt_{seen:05}\n\n"
    )));
}

#[tokio::test]
async fn a_stream_ends_when_its_key_is_revoked() {
    let app = TestApp::start().await;
    let mut reader = Reader::open(&app, &app.url, "", None).await;
    let keys = answer(app.admin(
        Method::GET,
        &format!("/v1/api-keys?projectId={}", app.project),
    ))
    .await
    .1;
    let key = keys
        .as_array()
        .unwrap()
        .iter()
        .find(|key| key["name"] == "live")
        .unwrap()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        answer(app.admin(Method::DELETE, &format!("/v1/api-keys/{key}")))
            .await
            .0
            .is_success()
    );
    assert_eq!(
        reader.block().await,
        ": closed: the key was revoked; go on with Last-Event-ID: evt_00000\n\n"
    );
}

#[tokio::test]
async fn a_reader_that_takes_nothing_holds_nobody_up_and_is_told_everything_or_where_to_go_on() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    let mut stuck = Reader::open(&app, &app.url, "", None).await;
    let mut quick = Reader::open(&app, &app.url, "", None).await;
    let description = "x".repeat(20_000);
    for event in 0..600 {
        let task = json!({"title": format!("{event}"), "description": description, "assignTo": "noor", "draft": true});
        answer(app.post("/v1/tasks", task)).await;
        assert_eq!(number(&quick.frame().await.0), event + 1);
    }
    // It fell behind the feed, so it reads the log: nothing was kept for it, and nothing is missing.
    for event in 0..600 {
        assert_eq!(number(&stuck.frame().await.0), event + 1);
    }
    eventually("it is live again", async || {
        write(&app, &app.url, "after").await;
        true
    })
    .await;
    assert_eq!(number(&stuck.frame().await.0), 601);
}

#[tokio::test]
async fn the_first_reader_of_a_project_misses_nothing_that_happens_as_it_comes() {
    let app = TestApp::start().await;
    app.agent("noor").await;
    for round in 1..=40 {
        let (last, title) = (format!("evt_{:05}", round - 1), format!("{round}"));
        let (mut reader, ()) = tokio::join!(
            Reader::open(&app, &app.url, "", Some(&last)),
            write(&app, &app.url, &title)
        );
        // Nothing else happens that would show it what it has missed.
        let frame = tokio::time::timeout(Duration::from_secs(4), reader.frame()).await;
        assert_eq!(number(&frame.expect("it was missed").0), round);
        drop(reader);
        // The next one is the first again once the server has seen this one leave.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_reader_that_takes_too_little_is_told_and_one_that_takes_nothing_is_cut_off() {
    let app = TestApp::start_with(&["--stall-ms", "8000"]).await;
    app.agent("noor").await;
    let mut readers = Vec::new();
    for pause in [4_300, 8_500] {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(64 * 1024).unwrap();
        let address = app.url.strip_prefix("http://").unwrap();
        let mut reader = socket.connect(address.parse().unwrap()).await.unwrap();
        let head = format!(
            "GET /v1/events HTTP/1.1\r\nhost: polpo\r\nauthorization: Bearer {}\r\nconnection: close\r\n\r\n",
            app.live
        );
        reader.write_all(head.as_bytes()).await.unwrap();
        let mut start = [0; 15];
        reader.read_exact(&mut start).await.unwrap();
        readers.push((pause, reader));
    }
    // All at once, so that it is known since when they are not taken.
    write(&app, &app.url, "one").await;
    events_of(&app, 100, 120_000).await;
    write(&app, &app.url, "two").await;
    let since = tokio::time::Instant::now();
    for (pause, mut reader) in readers {
        tokio::time::sleep_until(since + Duration::from_millis(pause)).await;
        let mut text = Vec::new();
        // It ends by itself, in order or not.
        let ended = reader.read_to_end(&mut text);
        let ended = tokio::time::timeout(Duration::from_secs(20), ended).await;
        assert!(ended.is_ok(), "it went on");
        let text = String::from_utf8_lossy(&text);
        assert_eq!(text.contains(": closed: too slow"), pause < 8_000);
    }
}

#[tokio::test]
async fn a_page_of_the_log_is_bounded_in_bytes_too_and_leaves_nothing_out() {
    let app = TestApp::start_with(&["--role-of-test", "api"]).await;
    app.agent("noor").await;
    app.task("t", json!({})).await;
    let db = &app.app.db;
    let (holder, room) = (Holder::new(1), Room::of(1));
    let claimed = db.claim(World::Live, Lane::Engine, holder, Uuid::nil(), &room);
    let log = claimed.await.unwrap().leases.remove(0).db;
    events_of(&app, 600, 10_000).await;
    let last = log.event_range().await.unwrap().last;
    let (mut after, mut pages) = (0, 0);
    loop {
        let page = log.events_after(after).await.unwrap();
        let bytes: usize = page.rows.iter().map(|row| row.payload.len()).sum();
        assert!(bytes < 1_100_000, "{bytes}");
        let numbers: Vec<i64> = page.rows.iter().map(|row| row.seq).collect();
        let expected: Vec<i64> = (after + 1..).take(numbers.len()).collect();
        assert_eq!(numbers, expected);
        after = *numbers.last().unwrap();
        pages += 1;
        if page.is_last {
            break;
        }
    }
    assert!(after == last && pages >= 6, "{pages}");
    // One that is larger than a page is a page.
    events_of(&app, 2, 3_000_000).await;
    let page = log.events_after(after).await.unwrap();
    assert!(page.rows.len() == 1 && !page.is_last);
    let page = log.events_after(after + 1).await.unwrap();
    assert!(page.rows.len() == 1 && page.is_last);
}
