//! Webhooks (contract 2.10): what is delivered, in which order, how often, signed by what, and to whom.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use polpo::store::World;
use ring::hmac;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::net::TcpListener;

use crate::harness::{TestApp, Upstream, answer, database, eventually};
use crate::processes::{Process, furnish, settings};

/// A request that a receiver got.
#[derive(Debug, Clone)]
pub(crate) struct Post {
    headers: HeaderMap,
    text: String,
    pub(crate) body: Value,
}

impl Post {
    fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }

    pub(crate) fn event(&self) -> &str {
        self.body["id"].as_str().unwrap()
    }

    fn task(&self) -> &str {
        self.body["data"]["taskId"].as_str().unwrap()
    }

    /// How many of its signatures are this secret's.
    fn signed_by(&self, secret: &str) -> usize {
        let key = STANDARD
            .decode(secret.strip_prefix("whsec_").unwrap())
            .unwrap();
        let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
        let signed = format!(
            "{}.{}.{}",
            self.header("webhook-id"),
            self.header("webhook-timestamp"),
            self.text
        );
        let signatures = self.header("webhook-signature").split(' ');
        let valid = signatures.filter(|signature| {
            let bytes = STANDARD
                .decode(signature.strip_prefix("v1,").unwrap())
                .unwrap();
            hmac::verify(&key, signed.as_bytes(), &bytes).is_ok()
        });
        valid.count()
    }
}

/// What a receiver does with a request.
#[derive(Debug, Clone)]
enum Reaction {
    Answer(u16),
    Redirect(String),
    /// Takes it and never answers.
    Silence,
}

type Rule = Arc<dyn Fn(&Post) -> Reaction + Send + Sync>;

/// A system that is told of events.
#[derive(Clone)]
pub(crate) struct Receiver {
    pub(crate) url: String,
    posts: Arc<Mutex<Vec<Post>>>,
    rule: Arc<Mutex<Rule>>,
}

impl Receiver {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let receiver = Self {
            url: format!("http://{}/hook", listener.local_addr().unwrap()),
            posts: Arc::default(),
            rule: Arc::new(Mutex::new(Arc::new(|_| Reaction::Answer(204)))),
        };
        let router = Router::new().fallback(take).with_state(receiver.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        receiver
    }

    fn will(&self, rule: impl Fn(&Post) -> Reaction + Send + Sync + 'static) {
        *self.rule.lock().unwrap() = Arc::new(rule);
    }

    pub(crate) fn posts(&self) -> Vec<Post> {
        self.posts.lock().unwrap().clone()
    }

    fn count(&self) -> usize {
        self.posts.lock().unwrap().len()
    }

    /// Waits until there are so many requests, and returns them.
    async fn until(&self, count: usize) -> Vec<Post> {
        let what = format!("{count} requests came");
        eventually(&what, async || self.count() >= count).await;
        self.posts()
    }
}

async fn take(State(receiver): State<Receiver>, headers: HeaderMap, bytes: Bytes) -> Response {
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    let body = serde_json::from_str(&text).unwrap();
    let post = Post {
        headers,
        text,
        body,
    };
    let rule = receiver.rule.lock().unwrap().clone();
    let reaction = rule(&post);
    receiver.posts.lock().unwrap().push(post);
    match reaction {
        Reaction::Answer(status) => {
            (StatusCode::from_u16(status).unwrap(), "noted").into_response()
        }
        Reaction::Redirect(to) => (StatusCode::FOUND, [("location", to)]).into_response(),
        Reaction::Silence => std::future::pending().await,
    }
}

/// A server whose couriers are in a hurry.
async fn start(settings: &[&str]) -> TestApp {
    let quick = ["--webhook-pause-ms", "20"];
    let settings: Vec<&str> = quick.iter().chain(settings).copied().collect();
    let app = TestApp::start_with(&settings).await;
    app.agent("noor").await;
    app
}

/// Makes a webhook; the answer.
async fn hook(app: &TestApp, receiver: &Receiver, events: &[&str]) -> Value {
    let new = json!({"url": receiver.url, "events": events});
    let (status, made) = answer(app.post("/v1/webhooks", new)).await;
    assert_eq!(status, 201, "{made}");
    made
}

fn path(hook: &Value, rest: &str) -> String {
    format!("/v1/webhooks/{}{rest}", hook["id"].as_str().unwrap())
}

async fn draft(app: &TestApp, title: &str) -> String {
    app.task(title, json!({"draft": true})).await
}

/// One more event of a task.
async fn touch(app: &TestApp, task: &str, text: &str) {
    let change = json!({"description": text});
    let (status, body) = answer(app.patch(&format!("/v1/tasks/{task}"), change)).await;
    assert_eq!(status, 200, "{body}");
}

/// The webhook once its deliveries have ended.
async fn settled(app: &TestApp, hook: &Value) {
    eventually("nothing is pending", async || {
        let (_, pending) = answer(app.get(&path(hook, "/deliveries?status=pending"))).await;
        pending == json!([])
    })
    .await;
}

#[tokio::test]
async fn a_webhook_is_made_read_listed_and_deleted_and_shows_its_secret_once() {
    let app = start(&[]).await;
    let receiver = Receiver::start().await;
    let made = hook(&app, &receiver, &["task:*", "agent:spawned"]).await;
    assert!(made["id"].as_str().unwrap().starts_with("wh_"), "{made}");
    assert!(made["secret"].as_str().unwrap().starts_with("whsec_"));
    assert_eq!(
        (&made["url"], &made["events"], &made["enabled"]),
        (
            &json!(receiver.url),
            &json!(["task:*", "agent:spawned"]),
            &json!(true)
        )
    );
    let mut known = made.clone();
    known.as_object_mut().unwrap().remove("secret");
    assert_eq!(answer(app.get("/v1/webhooks")).await.1, json!([known]));
    assert_eq!(answer(app.get(&path(&made, ""))).await.1, known);
    let (_, rotated) = answer(app.post(&path(&made, "/rotate-secret"), json!({}))).await;
    assert_ne!(rotated["secret"], made["secret"]);
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let stored: Vec<Vec<u8>> =
        sqlx::query_scalar("select sealed_secret || previous_secret from production.webhooks")
            .fetch_all(&mut database)
            .await
            .unwrap();
    assert!(!stored[0].windows(6).any(|window| window == b"whsec_"));
    let (status, body) = answer(app.delete(&path(&made, ""))).await;
    assert_eq!((status.as_u16(), body), (200, json!({"deleted": true})));
    assert_eq!(answer(app.delete(&path(&made, ""))).await.0, 404);
    assert_eq!(answer(app.get("/v1/webhooks")).await.1, json!([]));
}

#[tokio::test]
async fn a_project_has_ten_webhooks_at_most_even_when_they_are_made_at_once() {
    let app = start(&[]).await;
    let new = json!({"url": "http://127.0.0.1:9/", "events": ["sla:*"]});
    let made =
        futures::future::join_all((0..14).map(|_| answer(app.post("/v1/webhooks", new.clone()))))
            .await;
    let refused: Vec<&Value> = made
        .iter()
        .filter(|(status, _)| *status == 400)
        .map(|(_, body)| body)
        .collect();
    assert_eq!(refused.len(), 4);
    assert!(refused[0]["error"].as_str().unwrap().contains("10"));
    let (_, listed) = answer(app.get("/v1/webhooks")).await;
    assert_eq!(listed.as_array().unwrap().len(), 10);
    let (_, page) = answer(app.get("/v1/webhooks?limit=3")).await;
    let after = page[2]["id"].as_str().unwrap();
    let (_, rest) = answer(app.get(&format!("/v1/webhooks?after={after}"))).await;
    assert_eq!(rest.as_array().unwrap().len(), 7);
    // The sandbox has its own.
    let sandbox = app
        .client
        .post(format!("{}/v1/webhooks", app.url))
        .bearer_auth(&app.test)
        .json(&new);
    assert_eq!(answer(sandbox).await.0, 201);
}

#[tokio::test]
async fn bad_input_is_refused_with_a_sentence_and_nothing_is_stored() {
    let app = start(&[]).await;
    let url = "https://example.com/hook";
    let long = format!("https://example.com/{}", "x".repeat(2_048));
    let many = vec!["task:*"; 101];
    for new in [
        json!({}),
        json!({"url": url}),
        json!({"events": ["*"]}),
        json!({"url": url, "events": []}),
        json!({"url": url, "events": many}),
        json!({"url": url, "events": "task:*"}),
        json!({"url": url, "events": ["task"]}),
        json!({"url": url, "events": ["ta*"]}),
        json!({"url": url, "events": ["tasks:*"]}),
        json!({"url": 5, "events": ["*"]}),
        json!({"url": "example.com", "events": ["*"]}),
        json!({"url": "ftp://example.com", "events": ["*"]}),
        json!({"url": "https://user:pass@example.com", "events": ["*"]}),
        json!({"url": long, "events": ["*"]}),
        json!([]),
    ] {
        let (status, body) = answer(app.post("/v1/webhooks", new.clone())).await;
        assert_eq!(
            (status.as_u16(), &body["code"]),
            (400, &json!("bad_request")),
            "{new}"
        );
        assert!(body["error"].as_str().unwrap().len() > 10, "{body}");
    }
    let (_, body) =
        answer(app.post("/v1/webhooks", json!({"url": url, "events": ["watcher:*"]}))).await;
    assert!(
        body["error"]
            .as_str()
            .unwrap()
            .contains("task, mission, agent"),
        "{body}"
    );
    assert_eq!(answer(app.get("/v1/webhooks")).await.1, json!([]));

    let new = json!({"url": url, "events": ["mission:*"]});
    let (_, made) = answer(app.post("/v1/webhooks", new)).await;
    let (_, before) = answer(app.get(&path(&made, ""))).await;
    for change in [
        json!({"url": "nonsense"}),
        json!({"events": []}),
        json!({"events": ["nonsense"], "enabled": false}),
        json!({"enabled": "no"}),
    ] {
        let (status, _) = answer(app.patch(&path(&made, ""), change.clone())).await;
        assert_eq!(status, 400, "{change}");
    }
    for overlap in [json!(-1), json!(169), json!("long")] {
        let body = json!({"overlapHours": overlap});
        let (status, _) = answer(app.post(&path(&made, "/rotate-secret"), body)).await;
        assert_eq!(status, 400, "{overlap}");
    }
    for query in ["status=perhaps", "limit=0", "after=nonsense"] {
        let (status, _) = answer(app.get(&path(&made, &format!("/deliveries?{query}")))).await;
        assert_eq!(status, 400, "{query}");
    }
    assert_eq!(answer(app.get(&path(&made, ""))).await.1, before);
    let none = "whd_01a20e9a7fa5709989a9da919772fa8a";
    for id in ["nonsense", "wh_01a20e9a7fa5709989a9da919772fa8a"] {
        let at = format!("/v1/webhooks/{id}");
        for request in [
            app.get(&at),
            app.patch(&at, json!({"enabled": true})),
            app.delete(&at),
            app.post(&format!("{at}/rotate-secret"), json!({})),
            app.get(&format!("{at}/deliveries")),
            app.get(&format!("{at}/deliveries/{none}")),
            app.post(&format!("{at}/deliveries/{none}/redeliver"), json!({})),
        ] {
            let (status, body) = answer(request).await;
            assert_eq!(
                (status.as_u16(), &body["code"]),
                (404, &json!("not_found")),
                "{id}: {body}"
            );
        }
    }
    for id in ["nonsense", none] {
        let at = path(&made, &format!("/deliveries/{id}"));
        assert_eq!(answer(app.get(&at)).await.0, 404);
        let again = app.post(&format!("{at}/redeliver"), json!({}));
        assert_eq!(answer(again).await.0, 404);
    }
}

#[tokio::test]
async fn what_is_delivered_is_what_the_log_tells_signed_and_in_its_order() {
    let app = start(&[]).await;
    let (all, some) = (Receiver::start().await, Receiver::start().await);
    draft(&app, "before").await;
    let everything = hook(&app, &all, &["*"]).await;
    hook(&app, &some, &["task:updated", "agent:*"]).await;
    let task = draft(&app, "a").await;
    for number in 0..5 {
        touch(&app, &task, &format!("text {number}")).await;
    }
    some.until(5).await;
    let posts = all.until(6).await;
    settled(&app, &everything).await;
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let log: Vec<(i64, String, String)> = sqlx::query_as(
        "select seq, name, payload from production.events where seq > 1 order by seq",
    )
    .fetch_all(&mut database)
    .await
    .unwrap();
    assert_eq!(log.len(), posts.len());
    for ((seq, name, payload), post) in log.iter().zip(&posts) {
        let payload: Value = serde_json::from_str(payload).unwrap();
        assert_eq!(
            post.body,
            json!({"id": format!("evt_{seq:05}"), "type": name, "event": name,
                "timestamp": payload["timestamp"], "data": payload})
        );
        assert_eq!(post.signed_by(everything["secret"].as_str().unwrap()), 1);
        let stamp: i64 = post.header("webhook-timestamp").parse().unwrap();
        assert!((chrono::Utc::now().timestamp() - stamp).abs() < 60);
        assert_eq!(post.header("content-type"), "application/json");
        assert!(post.header("user-agent").starts_with("Polpo-Webhooks/"));
    }
    assert!(
        some.posts()
            .iter()
            .all(|post| post.body["type"] == "task:updated")
    );
    let ids: HashSet<String> = all
        .posts()
        .iter()
        .chain(&some.posts())
        .map(|post| post.header("webhook-id").to_owned())
        .collect();
    assert_eq!(ids.len(), 11, "an id for each receiver and event");

    let (_, page) = answer(app.get(&path(&everything, "/deliveries?limit=4"))).await;
    let page = page.as_array().unwrap().clone();
    let after = page[3]["id"].as_str().unwrap();
    let next = format!("/deliveries?status=delivered&after={after}");
    let (_, rest) = answer(app.get(&path(&everything, &next))).await;
    let listed: Vec<&Value> = page.iter().chain(rest.as_array().unwrap()).collect();
    let told: Vec<&str> = posts.iter().rev().map(Post::event).collect();
    assert_eq!(
        listed
            .iter()
            .map(|one| one["event_id"].as_str().unwrap())
            .collect::<Vec<_>>(),
        told
    );
    let attempt = &listed[0]["attempts"][0];
    assert_eq!(
        (
            &attempt["number"],
            &attempt["status_code"],
            &attempt["error"]
        ),
        (&json!(1), &json!(204), &Value::Null)
    );
    let one = format!("/deliveries/{}", listed[0]["id"].as_str().unwrap());
    let (_, shown) = answer(app.get(&path(&everything, &one))).await;
    assert_eq!(shown["body"], posts[5].body);
    assert_eq!(shown["status"], "delivered");
}

#[tokio::test]
async fn events_of_one_thing_stay_in_order_and_things_do_not_wait_for_each_other() {
    let app = start(&[]).await;
    let receiver = Receiver::start().await;
    let made = hook(&app, &receiver, &["task:*"]).await;
    let (broken, well) = (draft(&app, "broken").await, draft(&app, "well").await);
    receiver.until(2).await;
    settled(&app, &made).await;
    let failing = broken.clone();
    receiver.will(move |post| Reaction::Answer(if post.task() == failing { 500 } else { 200 }));
    for number in 0..4 {
        touch(&app, &broken, &format!("b{number}")).await;
        touch(&app, &well, &format!("w{number}")).await;
    }
    eventually("the others are delivered", async || {
        let posts = receiver.posts();
        posts.iter().filter(|post| post.task() == well).count() == 5
    })
    .await;
    // Of what fails nothing but the first is tried.
    let tried: HashSet<String> = receiver.posts()[2..]
        .iter()
        .filter(|post| post.task() == broken)
        .map(|post| post.event().to_owned())
        .collect();
    assert!(tried.len() <= 1, "{tried:?}");
    let (_, pending) = answer(app.get(&path(&made, "/deliveries?status=pending"))).await;
    assert_eq!(pending.as_array().unwrap().len(), 4);
    receiver.will(|_| Reaction::Answer(200));
    settled(&app, &made).await;
    let mut seqs: HashMap<String, Vec<String>> = HashMap::new();
    for post in receiver.posts() {
        let of = seqs.entry(post.task().to_owned()).or_default();
        of.push(post.event().to_owned());
    }
    for (task, seqs) in seqs {
        assert!(seqs.is_sorted(), "{task}: {seqs:?}");
        let unique: HashSet<&String> = seqs.iter().collect();
        assert_eq!(unique.len(), 5);
    }
}

#[tokio::test]
async fn a_second_try_does_not_wait_for_a_request_that_hangs() {
    let app = start(&[]).await;
    let receiver = Receiver::start().await;
    hook(&app, &receiver, &["task:*"]).await;
    let hangs = draft(&app, "hangs").await;
    receiver.until(1).await;
    let answers = Mutex::new(vec![Reaction::Answer(200), Reaction::Answer(500)]);
    receiver.will(move |post| {
        if post.task() == hangs {
            Reaction::Silence
        } else {
            answers.lock().unwrap().pop().unwrap()
        }
    });
    let (_, tasks) = answer(app.get("/v1/tasks")).await;
    touch(&app, tasks[0]["id"].as_str().unwrap(), "b").await;
    receiver.until(2).await;
    let began = Instant::now();
    draft(&app, "well").await;
    receiver.until(4).await;
    assert!(began.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn a_failed_delivery_is_tried_again_under_the_same_id_and_redirects_are_failures() {
    let app = start(&[]).await;
    let (receiver, elsewhere) = (Receiver::start().await, Receiver::start().await);
    let made = hook(&app, &receiver, &["task:*"]).await;
    let answers = Mutex::new(vec![
        Reaction::Answer(201),
        Reaction::Redirect(elsewhere.url.clone()),
        Reaction::Answer(503),
        Reaction::Answer(404),
    ]);
    receiver.will(move |_| answers.lock().unwrap().pop().unwrap());
    draft(&app, "a").await;
    let posts = receiver.until(4).await;
    settled(&app, &made).await;
    let ids: HashSet<&str> = posts.iter().map(|post| post.header("webhook-id")).collect();
    assert_eq!(ids.len(), 1);
    let secret = made["secret"].as_str().unwrap();
    assert!(posts.iter().all(|post| post.signed_by(secret) == 1));
    assert!(posts.iter().all(|post| post.text == posts[0].text));
    assert_eq!(elsewhere.count(), 0);
    let (_, listed) = answer(app.get(&path(&made, "/deliveries"))).await;
    let delivery = &listed[0];
    let codes: Vec<&Value> = delivery["attempts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|attempt| &attempt["status_code"])
        .collect();
    assert_eq!(codes, [404, 503, 302, 201]);
    assert_eq!(
        (&delivery["status"], &delivery["attempt_count"]),
        (&json!("delivered"), &json!(4))
    );
    assert_eq!(delivery["attempts"][0]["response"], "noted");
    for failed in 0..3 {
        assert!(delivery["attempts"][failed]["error"].is_string());
    }
    let (_, hook) = answer(app.get(&path(&made, ""))).await;
    assert_eq!(hook["failing_since"], Value::Null);
}

#[tokio::test]
async fn no_answer_and_no_connection_are_failures_that_say_so() {
    let app = start(&["--webhook-timeout-ms", "100"]).await;
    let receiver = Receiver::start().await;
    let made = hook(&app, &receiver, &["task:*"]).await;
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", closed.local_addr().unwrap());
    drop(closed);
    let new = json!({"url": url, "events": ["task:*"]});
    let (_, gone) = answer(app.post("/v1/webhooks", new)).await;
    receiver.will(|_| Reaction::Silence);
    draft(&app, "a").await;
    for (hook, reason) in [(&made, "answer within 0.1 s"), (&gone, "connected to")] {
        let mut delivery = Value::Null;
        eventually("it was tried twice", async || {
            let (_, listed) = answer(app.get(&path(hook, "/deliveries?status=pending"))).await;
            delivery = listed[0].clone();
            delivery["attempt_count"].as_i64() >= Some(2)
        })
        .await;
        let attempt = &delivery["attempts"][0];
        assert_eq!(attempt["status_code"], Value::Null);
        let error = attempt["error"].as_str().unwrap();
        assert!(error.contains(reason), "{error}");
        assert!(delivery["next_attempt_at"].is_string());
        let (_, shown) = answer(app.get(&path(hook, ""))).await;
        assert!(shown["failing_since"].is_string());
    }
    receiver.will(|_| Reaction::Answer(200));
    settled(&app, &made).await;
}

#[tokio::test]
async fn a_dead_receiver_delays_neither_another_nor_another_project_nor_a_task() {
    let app = start(&[]).await;
    let (dead, well) = (Receiver::start().await, Receiver::start().await);
    dead.will(|_| Reaction::Silence);
    for _ in 0..3 {
        hook(&app, &dead, &["*"]).await;
    }
    hook(&app, &well, &["task:created"]).await;
    for number in 0..40 {
        draft(&app, &format!("t{number}")).await;
    }
    well.until(40).await;
    // Each of the dead got its share at once, and has answered nothing.
    assert_eq!(dead.until(12).await.len(), 12);
    app.upstream.will_say("Done.");
    let id = app.task("work", json!({})).await;
    app.until(&id, "done").await;
    let sandbox = |path: &str, body: Value| {
        app.client
            .post(format!("{}{path}", app.url))
            .bearer_auth(&app.test)
            .json(&body)
    };
    let other = Receiver::start().await;
    let new = json!({"url": other.url, "events": ["*"]});
    answer(sandbox("/v1/webhooks", new)).await;
    answer(sandbox(
        "/v1/agents",
        json!({"name": "noor", "model": "echo"}),
    ))
    .await;
    let task = json!({"title": "t", "description": "t", "assignTo": "noor", "draft": true});
    assert_eq!(answer(sandbox("/v1/tasks", task)).await.0, 201);
    let posts = other.until(1).await;
    assert_eq!(posts[0].body["data"]["task"]["title"], "t");
    assert!(
        well.posts()
            .iter()
            .all(|post| post.body["data"]["task"]["title"] != "t"),
        "worlds hear nothing of each other"
    );
}

#[tokio::test]
async fn an_answer_of_410_disables_and_says_so_and_enabling_begins_anew() {
    let app = start(&[]).await;
    let (receiver, witness) = (Receiver::start().await, Receiver::start().await);
    let made = hook(&app, &receiver, &["*"]).await;
    hook(&app, &witness, &["webhook:*"]).await;
    receiver.will(|_| Reaction::Answer(410));
    draft(&app, "a").await;
    let told = witness.until(1).await;
    assert_eq!(told[0].body["type"], "webhook:disabled");
    assert_eq!(
        (
            &told[0].body["data"]["webhookId"],
            &told[0].body["data"]["url"]
        ),
        (&made["id"], &made["url"])
    );
    let (_, shown) = answer(app.get(&path(&made, ""))).await;
    assert_eq!(shown["enabled"], false);
    assert!(
        shown["disabled_reason"].as_str().unwrap().contains("410"),
        "{shown}"
    );
    assert_eq!(told[0].body["data"]["reason"], shown["disabled_reason"]);
    let (_, failed) = answer(app.get(&path(&made, "/deliveries?status=failed"))).await;
    assert_eq!(failed[0]["attempts"][0]["status_code"], 410);
    let again = format!(
        "/deliveries/{}/redeliver",
        failed[0]["id"].as_str().unwrap()
    );
    let (status, body) = answer(app.post(&path(&made, &again), json!({}))).await;
    assert_eq!((status.as_u16(), &body["code"]), (409, &json!("conflict")));

    receiver.will(|_| Reaction::Answer(200));
    draft(&app, "while it was disabled").await;
    let (_, shown) = answer(app.patch(&path(&made, ""), json!({"enabled": true}))).await;
    assert_eq!(
        (&shown["enabled"], &shown["disabled_reason"]),
        (&json!(true), &Value::Null)
    );
    let after = draft(&app, "after").await;
    let posts = receiver.until(2).await;
    assert_eq!(posts[1].task(), after);
    assert_eq!(posts.len(), 2);
}

#[tokio::test]
async fn one_that_fails_for_the_whole_time_is_disabled_and_what_waited_is_given_up() {
    let app = start(&["--webhook-retry-ms", "400"]).await;
    let (receiver, witness) = (Receiver::start().await, Receiver::start().await);
    let made = hook(&app, &receiver, &["task:*"]).await;
    hook(&app, &witness, &["webhook:disabled"]).await;
    receiver.will(|_| Reaction::Answer(500));
    let task = draft(&app, "a").await;
    touch(&app, &task, "b").await;
    let began = Instant::now();
    let told = witness.until(1).await;
    assert!(began.elapsed() > Duration::from_millis(300));
    assert_eq!(told[0].body["data"]["webhookId"], made["id"]);
    let (_, shown) = answer(app.get(&path(&made, ""))).await;
    assert_eq!(shown["enabled"], false);
    let (_, failed) = answer(app.get(&path(&made, "/deliveries?status=failed"))).await;
    assert_eq!(failed.as_array().unwrap().len(), 2);
    let posts = receiver.posts();
    assert!(posts.len() >= 3, "{}", posts.len());
    let first = posts[0].event();
    assert!(posts.iter().all(|post| post.event() == first));
}

#[tokio::test]
async fn a_delivery_is_given_up_in_the_end_and_those_behind_it_go_on() {
    let app = start(&["--webhook-retry-ms", "300"]).await;
    let receiver = Receiver::start().await;
    let made = hook(&app, &receiver, &["task:*"]).await;
    receiver.will(|post| {
        let refused =
            post.body["type"] == "task:created" && post.body["data"]["task"]["title"] == "bad";
        Reaction::Answer(if refused { 400 } else { 200 })
    });
    let bad = draft(&app, "bad").await;
    touch(&app, &bad, "later").await;
    let well = draft(&app, "well").await;
    eventually("those behind it are delivered", async || {
        // What succeeds in the meantime says that the receiver lives.
        touch(&app, &well, "still").await;
        receiver
            .posts()
            .iter()
            .any(|post| post.task() == bad && post.body["type"] == "task:updated")
    })
    .await;
    let (_, failed) = answer(app.get(&path(&made, "/deliveries?status=failed"))).await;
    assert_eq!(failed.as_array().unwrap().len(), 1, "{failed}");
    assert_eq!(failed[0]["event"], "task:created");
    let tries = failed[0]["attempt_count"].as_i64().unwrap();
    assert!(tries >= 3, "{tries}");
    assert_eq!(answer(app.get(&path(&made, ""))).await.1["enabled"], true);
}

#[tokio::test]
async fn both_secrets_sign_during_the_overlap_and_the_old_one_not_after_it() {
    let app = start(&[]).await;
    let receiver = Receiver::start().await;
    let made = hook(&app, &receiver, &["task:*"]).await;
    let old = made["secret"].as_str().unwrap();
    let task = draft(&app, "a").await;
    receiver.until(1).await;
    let (status, rotated) = answer(app.post(
        &path(&made, "/rotate-secret"),
        json!({"overlapHours": 1.0 / 3600.0}),
    ))
    .await;
    assert_eq!(status, 200, "{rotated}");
    assert!(rotated["previous_secret_until"].is_string());
    let new = rotated["secret"].as_str().unwrap();
    touch(&app, &task, "b").await;
    let post = receiver.until(2).await.pop().unwrap();
    assert_eq!((post.signed_by(old), post.signed_by(new)), (1, 1));
    let mut number = 0;
    eventually("the old one signs no more", async || {
        number += 1;
        touch(&app, &task, &format!("c{number}")).await;
        let last = receiver.posts().pop().unwrap();
        assert_eq!(last.signed_by(new), 1);
        last.signed_by(old) == 0
    })
    .await;
    let (_, newest) =
        answer(app.post(&path(&made, "/rotate-secret"), json!({"overlapHours": 0}))).await;
    assert_eq!(newest["previous_secret_until"], Value::Null);
    let newest = newest["secret"].as_str().unwrap();
    settled(&app, &made).await;
    let before = receiver.count();
    touch(&app, &task, "d").await;
    let post = receiver.until(before + 1).await.pop().unwrap();
    assert_eq!((post.signed_by(newest), post.signed_by(new)), (1, 0));
    let (_, plain) = answer(app.post(&path(&made, "/rotate-secret"), json!(null))).await;
    let until: chrono::DateTime<chrono::Utc> = plain["previous_secret_until"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let hours = (until - chrono::Utc::now()).num_minutes();
    assert!((1_435..=1_440).contains(&hours), "{hours}");
}

#[tokio::test]
async fn a_redelivery_has_the_same_id_and_nothing_waits_for_it() {
    let app = start(&[]).await;
    let receiver = Receiver::start().await;
    let made = hook(&app, &receiver, &["task:*"]).await;
    let task = draft(&app, "a").await;
    let first = receiver.until(1).await.pop().unwrap();
    settled(&app, &made).await;
    let refused = first.event().to_owned();
    receiver.will(move |post| Reaction::Answer(if post.event() == refused { 500 } else { 200 }));
    let id = first.header("webhook-id");
    let (status, again) = answer(app.post(
        &path(&made, &format!("/deliveries/{id}/redeliver")),
        json!({}),
    ))
    .await;
    assert_eq!(status, 202, "{again}");
    let second = receiver.until(2).await.pop().unwrap();
    assert_eq!(second.header("webhook-id"), id);
    assert_eq!(second.text, first.text);
    // It fails, and later events of the same task are delivered all the same.
    touch(&app, &task, "b").await;
    eventually("the next one is delivered", async || {
        receiver
            .posts()
            .iter()
            .any(|post| post.body["type"] == "task:updated")
    })
    .await;
    receiver.will(|_| Reaction::Answer(200));
    settled(&app, &made).await;
    let (_, shown) = answer(app.get(&path(&made, &format!("/deliveries/{id}")))).await;
    assert_eq!(shown["status"], "delivered");
    assert!(shown["attempt_count"].as_i64().unwrap() >= 3, "{shown}");
}

#[tokio::test]
async fn a_delivery_that_waits_long_is_tried_at_once_when_someone_says_so() {
    let app = start(&["--webhook-pause-ms", "3600000"]).await;
    let receiver = Receiver::start().await;
    let made = hook(&app, &receiver, &["task:*"]).await;
    receiver.will(|_| Reaction::Answer(500));
    draft(&app, "a").await;
    let id = receiver.until(1).await[0].header("webhook-id").to_owned();
    let at = path(&made, &format!("/deliveries/{id}"));
    eventually("it waits", async || {
        answer(app.get(&at)).await.1["attempt_count"] == 1
    })
    .await;
    receiver.will(|_| Reaction::Answer(200));
    let again = app.post(&format!("{at}/redeliver"), json!({}));
    assert_eq!(answer(again).await.0, 202);
    receiver.until(2).await;
    settled(&app, &made).await;
}

#[tokio::test]
async fn a_change_holds_for_the_next_delivery() {
    let app = start(&[]).await;
    let (before, after) = (Receiver::start().await, Receiver::start().await);
    let made = hook(&app, &before, &["task:created"]).await;
    let task = draft(&app, "a").await;
    before.until(1).await;
    let change = json!({"url": after.url, "events": ["task:updated"]});
    let (status, shown) = answer(app.patch(&path(&made, ""), change)).await;
    assert_eq!(status, 200, "{shown}");
    draft(&app, "b").await;
    touch(&app, &task, "c").await;
    let posts = after.until(1).await;
    assert_eq!(posts[0].body["type"], "task:updated");
    settled(&app, &made).await;
    answer(app.patch(&path(&made, ""), json!({"enabled": false}))).await;
    touch(&app, &task, "d").await;
    answer(app.patch(&path(&made, ""), json!({"enabled": true}))).await;
    touch(&app, &task, "e").await;
    let posts = after.until(2).await;
    assert_eq!(posts[1].body["data"]["task"]["description"], "e");
    answer(app.delete(&path(&made, ""))).await;
    touch(&app, &task, "f").await;
    let last = Receiver::start().await;
    hook(&app, &last, &["task:updated"]).await;
    touch(&app, &task, "g").await;
    last.until(1).await;
    assert_eq!((before.count(), after.count()), (1, 2));
}

#[tokio::test]
async fn serve_reaches_neither_http_nor_private_addresses() {
    let app = start(&["--webhook-http", "false", "--private-webhooks", "false"]).await;
    let receiver = Receiver::start().await;
    for url in [
        receiver.url.as_str(),
        "http://example.com/",
        "https://127.0.0.1/",
        "https://10.0.0.1/",
        "https://[::1]/",
        "https://localhost/",
        "https://2130706433/",
    ] {
        let new = json!({"url": url, "events": ["*"]});
        let (status, body) = answer(app.post("/v1/webhooks", new)).await;
        assert_eq!(status, 400, "{url}: {body}");
    }
    let new = json!({"url": "https://1.1.1.1/", "events": ["task:*"]});
    let (status, made) = answer(app.post("/v1/webhooks", new)).await;
    assert_eq!(status, 201, "{made}");
    let change = json!({"url": receiver.url});
    assert_eq!(answer(app.patch(&path(&made, ""), change)).await.0, 400);
    // What was stored while more was open is refused with each try, an address and a name alike.
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let secure = receiver.url.replace("http://", "https://");
    for (number, url) in [
        receiver.url.clone(),
        secure.clone(),
        secure.replace("127.0.0.1", "ip6-localhost"),
    ]
    .into_iter()
    .enumerate()
    {
        answer(app.patch(&path(&made, ""), json!({"enabled": false}))).await;
        sqlx::query("update production.webhooks set url = $1")
            .bind(&url)
            .execute(&mut database)
            .await
            .unwrap();
        answer(app.patch(&path(&made, ""), json!({"enabled": true}))).await;
        draft(&app, &format!("t{number}")).await;
        let mut error = String::new();
        eventually("it was tried", async || {
            let (_, listed) = answer(app.get(&path(&made, "/deliveries?status=pending"))).await;
            let tried = &listed[0]["attempts"][0]["error"];
            error = tried.as_str().unwrap_or_default().to_owned();
            tried.is_string()
        })
        .await;
        let expected = ["https", "private address", "cannot be connected to"][number];
        assert!(error.contains(expected), "{url}: {error}");
    }
    assert_eq!(receiver.count(), 0);
}

/// Puts an event into the log as a process does that dies before it can wake anyone.
async fn tell_silently(app: &TestApp, payload: &Value) {
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    sqlx::query(
        "with head as (
            insert into production.event_heads (project_id, last) values ($1::uuid, 1)
            on conflict (project_id) do update set last = production.event_heads.last + 1
            returning last
        )
        insert into production.events (project_id, seq, name, payload, at)
        select $1::uuid, last, 'task:updated', $2, now() from head",
    )
    .bind(&app.project)
    .bind(payload.to_string())
    .execute(&mut database)
    .await
    .unwrap();
}

#[tokio::test]
async fn a_large_payload_is_trimmed_and_says_so() {
    let app = start(&[]).await;
    let receiver = Receiver::start().await;
    let made = hook(&app, &receiver, &["task:*"]).await;
    let payload = json!({"taskId": "task_x", "task": {"id": "task_x", "title": "T", "description": "x".repeat(300_000)},
        "timestamp": "2026-04-07T12:00:02.000Z"});
    tell_silently(&app, &payload).await;
    draft(&app, "wakes").await;
    let posts = receiver.until(2).await;
    let large = posts.iter().find(|post| post.task() == "task_x").unwrap();
    assert!(large.text.len() < 256 * 1024);
    assert_eq!(large.signed_by(made["secret"].as_str().unwrap()), 1);
    assert_eq!(large.body["truncated"], true);
    assert_eq!(
        large.body["data"]["task"],
        json!({"id": "task_x", "title": "T"})
    );
    let small = posts.iter().find(|post| post.task() != "task_x").unwrap();
    assert_eq!(small.body["truncated"], Value::Null);
}

#[tokio::test]
async fn what_happens_waits_in_the_log_while_a_receiver_fails_and_is_all_delivered_after() {
    let app = start(&[]).await;
    let receiver = Receiver::start().await;
    let made = hook(&app, &receiver, &["task:*"]).await;
    receiver.will(|_| Reaction::Answer(500));
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    sqlx::query(
        "with head as (
            insert into production.event_heads (project_id, last) values ($1::uuid, 3000)
            on conflict (project_id) do update set last = production.event_heads.last + 3000
            returning last - 3000 as before
        )
        insert into production.events (project_id, seq, name, payload, at)
        select $1::uuid, before + number, 'task:updated', format('{\"taskId\":\"t%s\"}', number), now()
        from head cross join generate_series(1, 3000) as number",
    )
    .bind(&app.project)
    .execute(&mut database)
    .await
    .unwrap();
    draft(&app, "wakes").await;
    receiver.until(12).await;
    let stored: i64 = sqlx::query_scalar("select count(*) from production.deliveries")
        .fetch_one(&mut database)
        .await
        .unwrap();
    assert!((12..2_000).contains(&stored), "{stored}");
    receiver.will(|_| Reaction::Answer(200));
    let began = Instant::now();
    loop {
        let events: HashSet<String> = receiver
            .posts()
            .iter()
            .map(|post| post.event().to_owned())
            .collect();
        if events.len() == 3_001 {
            break;
        }
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "{}",
            events.len()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    settled(&app, &made).await;
}

#[tokio::test]
async fn an_event_whose_process_died_before_it_woke_anyone_is_delivered_all_the_same() {
    let app = start(&[]).await;
    let receiver = Receiver::start().await;
    hook(&app, &receiver, &["task:*"]).await;
    draft(&app, "a").await;
    receiver.until(1).await;
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    eventually("the courier rests", async || {
        let resting: i64 = sqlx::query_scalar(
            "select count(*) from production.jobs where kind = 'webhook' and holder is null and not ready",
        )
        .fetch_one(&mut database)
        .await
        .unwrap();
        resting == 1
    })
    .await;
    tell_silently(&app, &json!({"taskId": "t"})).await;
    let began = Instant::now();
    while receiver.count() < 2 {
        assert!(began.elapsed() < Duration::from_secs(15));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // And a courier that rests is woken at once by a process that lives.
    eventually("the courier rests", async || {
        let resting: i64 = sqlx::query_scalar(
            "select count(*) from production.jobs where kind = 'webhook' and holder is null and not ready",
        )
        .fetch_one(&mut database)
        .await
        .unwrap();
        resting == 1
    })
    .await;
    let began = Instant::now();
    draft(&app, "b").await;
    receiver.until(3).await;
    eprintln!("a resting courier delivered after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn what_has_ended_is_pruned_and_what_is_pending_is_not() {
    let app = start(&["--webhook-pause-ms", "3600000"]).await;
    let receiver = Receiver::start().await;
    let made = hook(&app, &receiver, &["task:*"]).await;
    draft(&app, "a").await;
    receiver.until(1).await;
    settled(&app, &made).await;
    receiver.will(|_| Reaction::Answer(500));
    draft(&app, "b").await;
    receiver.until(2).await;
    let now = chrono::Utc::now();
    for (oldest, left) in [
        (now - chrono::Duration::hours(1), 2),
        (now + chrono::Duration::hours(1), 1),
    ] {
        app.app
            .db
            .prune_deliveries(World::Live, oldest)
            .await
            .unwrap();
        let (_, listed) = answer(app.get(&path(&made, "/deliveries"))).await;
        assert_eq!(listed.as_array().unwrap().len(), left, "{listed}");
    }
    let (_, listed) = answer(app.get(&path(&made, "/deliveries"))).await;
    assert_eq!(listed[0]["status"], "pending");
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let tries: i64 = sqlx::query_scalar(
        "select count(*) from production.delivery_attempts a where not exists
            (select from production.deliveries d where d.id = a.delivery_id)",
    )
    .fetch_one(&mut database)
    .await
    .unwrap();
    assert_eq!(tries, 0);
}

#[tokio::test]
async fn a_project_that_is_deleted_takes_its_webhooks_along() {
    let app = start(&[]).await;
    let receiver = Receiver::start().await;
    receiver.will(|_| Reaction::Answer(500));
    hook(&app, &receiver, &["*"]).await;
    draft(&app, "a").await;
    receiver.until(1).await;
    let gone = app.admin(
        reqwest::Method::DELETE,
        &format!("/v1/projects/{}", app.project),
    );
    assert!(answer(gone).await.0.is_success());
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let left: i64 = sqlx::query_scalar(
        "select (select count(*) from production.webhooks) + (select count(*) from production.deliveries)
            + (select count(*) from production.delivery_attempts) + (select count(*) from production.jobs)",
    )
    .fetch_one(&mut database)
    .await
    .unwrap();
    assert_eq!(left, 0);
}

/// Processes on one database.
struct Servers {
    url: String,
    running: Vec<(Process, String)>,
}

impl Servers {
    async fn add(&mut self) {
        let others = [
            ("POLPO_PRIVATE_BASE_URLS", "true"),
            ("POLPO_PRIVATE_WEBHOOKS", "true"),
            ("POLPO_WEBHOOK_HTTP", "true"),
            ("POLPO_RATE_LIMIT", "0"),
            ("POLPO_WORLD_CONNECTIONS", "6"),
        ];
        let role = "serve --webhook-pause-ms 50";
        let mut process = Process::start(role, &settings(&self.url, &others));
        let url = process.url().await;
        self.running.push((process, url));
    }

    async fn kill(&mut self) {
        let (mut process, _) = self.running.remove(0);
        process.signal("-KILL");
        process.child.wait().await.unwrap();
    }
}

#[tokio::test]
async fn processes_that_are_killed_while_they_deliver_lose_nothing_and_keep_the_order() {
    let mut servers = Servers {
        url: database().await,
        running: Vec::new(),
    };
    servers.add().await;
    servers.add().await;
    let upstream = Upstream::start().await;
    let key = furnish(&servers.running[0].1, &upstream, "k").await;
    let client = reqwest::Client::new();
    let (receiver, other) = (Receiver::start().await, Receiver::start().await);
    // Some of the answers are failures, some are late: kills come in the middle of deliveries.
    let count = Mutex::new(0);
    receiver.will(move |_| {
        let mut count = count.lock().unwrap();
        *count += 1;
        Reaction::Answer(if *count % 9 == 0 { 500 } else { 200 })
    });
    for receiver in [&receiver, &other] {
        let request = client
            .post(format!("{}/v1/webhooks", servers.running[0].1))
            .bearer_auth(&key)
            .json(&json!({"url": receiver.url, "events": ["*"]}));
        assert_eq!(answer(request).await.0, 201);
    }
    let tasks: Mutex<Vec<String>> = Mutex::default();
    for round in 0..6 {
        let at = servers.running.last().unwrap().1.clone();
        let told = async {
            for number in 0..12 {
                let task = json!({"title": format!("t{round}-{number}"), "description": "d", "assignTo": "a", "draft": true});
                let request = client
                    .post(format!("{at}/v1/tasks"))
                    .bearer_auth(&key)
                    .json(&task);
                let (status, made) = answer(request).await;
                assert_eq!(status, 201, "{made}");
                tasks
                    .lock()
                    .unwrap()
                    .push(made["id"].as_str().unwrap().to_owned());
                let known = tasks.lock().unwrap().clone();
                for task in known.iter().rev().take(6) {
                    let change = json!({"description": format!("{round} {number}")});
                    let request = client
                        .patch(format!("{at}/v1/tasks/{task}"))
                        .bearer_auth(&key)
                        .json(&change);
                    assert_eq!(answer(request).await.0, 200);
                }
            }
        };
        let before = receiver.count();
        let killed = async {
            // In the middle of this round's deliveries.
            eventually("some are delivered", async || {
                receiver.count() >= before + 20
            })
            .await;
            servers.kill().await;
        };
        tokio::join!(told, killed);
        servers.add().await;
    }
    let mut database = PgConnection::connect(&servers.url).await.unwrap();
    let log: Vec<(String, String)> = sqlx::query_as(
        "select 'evt_' || lpad(seq::text, 5, '0'), name from production.events where name like 'task:%' order by seq",
    )
    .fetch_all(&mut database)
    .await
    .unwrap();
    assert!(log.len() > 400, "{}", log.len());
    let began = Instant::now();
    for receiver in [&receiver, &other] {
        let missing = || {
            let got: HashSet<(String, String)> = receiver
                .posts()
                .iter()
                .map(|post| {
                    let name = post.body["type"].as_str().unwrap();
                    (post.event().to_owned(), name.to_owned())
                })
                .collect();
            log.iter().filter(|event| !got.contains(*event)).count()
        };
        while missing() > 0 {
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "{} are missing",
                missing()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // Whatever was repeated: the first time, each came after those before it.
        let mut highest: HashMap<String, String> = HashMap::new();
        let mut seen: HashSet<String> = HashSet::new();
        for post in receiver.posts() {
            if seen.insert(post.event().to_owned()) {
                let before = highest.insert(post.task().to_owned(), post.event().to_owned());
                assert!(before.is_none_or(|before| before.as_str() < post.event()));
            }
        }
        let mut ids: HashMap<String, HashSet<String>> = HashMap::new();
        for post in receiver.posts() {
            let of = ids.entry(post.event().to_owned()).or_default();
            of.insert(post.header("webhook-id").to_owned());
        }
        assert!(ids.values().all(|ids| ids.len() == 1));
        eprintln!(
            "6 kills, {} events: {} requests",
            log.len(),
            receiver.count()
        );
    }
}
