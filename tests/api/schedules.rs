//! Schedules as a caller sees them, and when they begin missions (contract 2.12).

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use polpo::ids::{self, Id};
use polpo::lifecycle::schedule::{Fired, fire};
use polpo::store::{Holder, Job, Lane, Lease, Room, World};
use reqwest::StatusCode;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::harness::{Reply, TestApp, answer, eventually, last_text, said};

fn at(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

fn soon(milliseconds: i64) -> String {
    let at = Utc::now() + chrono::Duration::milliseconds(milliseconds);
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

fn instant(value: &Value) -> DateTime<Utc> {
    at(value
        .as_str()
        .unwrap_or_else(|| panic!("no instant: {value}")))
}

/// A server whose model does what it is told, or fails when it is told to `Fail`.
async fn start(settings: &[&str]) -> TestApp {
    let app = TestApp::start_with(settings).await;
    app.agent("noor").await;
    app.upstream.answers(|request| {
        if last_text(request, "user").starts_with("Fail") {
            Reply::Plain(400, vec![], "{}".to_owned())
        } else {
            Reply::Stream(said("Done."))
        }
    });
    app
}

/// A server that begins nothing by itself: the test is the clock.
async fn still() -> TestApp {
    start(&["--role-of-test", "api"]).await
}

impl TestApp {
    /// A mission of one task.
    async fn small(&self, name: &str, words: &str) -> String {
        let task = json!({"title": "A", "description": words, "assignTo": "noor", "maxRetries": 0});
        self.mission(name, json!({"tasks": [task]})).await
    }

    async fn schedule(&self, mission: &str, others: Value) -> Value {
        let mut schedule =
            json!({"missionId": mission, "expression": "30 6 * * *", "recurring": true});
        schedule
            .as_object_mut()
            .unwrap()
            .extend(others.as_object().unwrap().clone());
        let (status, body) = answer(self.post("/v1/schedules", schedule)).await;
        assert_eq!(status, 201, "{body}");
        body
    }

    async fn read_schedule(&self, id: &str) -> Value {
        answer(self.get(&format!("/v1/schedules/{id}"))).await.1
    }

    pub(crate) async fn sql(&self, statement: String) {
        let mut database = PgConnection::connect(&self.database_url).await.unwrap();
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
            .execute(&mut database)
            .await
            .unwrap();
    }

    /// Has it be that every schedule has been due for so many seconds, and that the engine is to look at it.
    pub(crate) async fn make_due(&self, seconds: f64) {
        self.sql(format!(
            "begin;
            update production.schedules set next_run_at = clock_timestamp() - make_interval(secs => {seconds}) where enabled;
            update production.jobs set due_at = clock_timestamp() where kind = 'schedule';
            commit;"
        ))
        .await;
    }

    /// How many events there are of each name.
    async fn told(&self, filter: &str) -> HashMap<String, usize> {
        let mut told = HashMap::new();
        for (name, _) in self.events(filter).await {
            *told.entry(name).or_default() += 1;
        }
        told
    }

    /// The lease of a schedule's job, as if its time had come.
    async fn lease(&self, id: Id<ids::Schedule>) -> Option<Lease> {
        self.sql(format!(
            "update production.jobs set ready = true, holder = null where kind = 'schedule' and subject = '{}'",
            id.uuid()
        ))
        .await;
        let holder = Holder::new(rand::random());
        let claimed = self
            .app
            .db
            .claim(
                World::Live,
                Lane::Timers,
                holder,
                Uuid::nil(),
                &Room::of(100),
            )
            .await
            .unwrap();
        let mut leases = claimed.leases.into_iter();
        leases.find(|lease| lease.job == Job::Schedule(id))
    }

    /// Looks at a schedule at an instant, and says whether a run began.
    async fn fires(&self, schedule: &Value, now: DateTime<Utc>) -> bool {
        let id = schedule["scheduleId"].as_str().unwrap().parse().unwrap();
        let lease = self.lease(id).await.unwrap();
        let (mission, _) = lease.db.scheduled_mission(id).await.unwrap();
        matches!(
            fire(&lease, id, mission, now).await.unwrap(),
            Fired::Began(_)
        )
    }

    /// Has the run under way end, without success.
    async fn end_run(&self, mission: &str) {
        let (_, tasks) = answer(self.get(&format!("/v1/tasks?group={mission}"))).await;
        for task in tasks.as_array().unwrap() {
            if task["status"] == "pending" {
                let path = format!("/v1/tasks/{}/kill", task["id"].as_str().unwrap());
                assert_eq!(answer(self.post(&path, json!({}))).await.0, 200);
            }
        }
    }
}

#[tokio::test]
async fn a_schedule_is_made_read_listed_changed_and_deleted_under_both_of_its_ids() {
    let app = still().await;
    let mission = app.small("m", "Do it").await;
    let made = app
        .schedule(&mission, json!({"deadlineOffsetMs": 60_000}))
        .await;
    let id = made["scheduleId"].as_str().unwrap().to_owned();
    assert!(id.starts_with("sch_"), "{made}");
    for (member, value) in [
        ("missionId", json!(mission)),
        ("expression", json!("30 6 * * *")),
        ("timezone", json!("UTC")),
        ("recurring", json!(true)),
        ("enabled", json!(true)),
        ("deadlineOffsetMs", json!(60_000)),
        ("catchUp", json!("latest")),
        ("overlap", json!("skip")),
        ("lastRunAt", Value::Null),
    ] {
        assert_eq!(made[member], value, "{member}");
    }
    assert!(made.get("lastRunAt").is_some() && made.get("endDate").is_none());
    let runs: Vec<DateTime<Utc>> = made["nextRuns"]
        .as_array()
        .unwrap()
        .iter()
        .map(instant)
        .collect();
    assert_eq!(runs.len(), 5);
    assert_eq!(runs[0], instant(&made["nextRunAt"]));
    for (number, run) in (0..).zip(&runs) {
        assert_eq!(*run, runs[0] + chrono::Duration::days(number));
        assert_eq!(run.format("%H:%M:%S").to_string(), "06:30:00");
    }
    assert!(runs[0] > Utc::now());
    for name in [&id, &mission] {
        assert_eq!(app.read_schedule(name).await, made);
    }
    assert_eq!(answer(app.get("/v1/schedules")).await.1, json!([made]));
    let told = app.read_mission(&mission).await;
    assert_eq!(
        (&told["status"], &told["schedule"]),
        (&json!("recurring"), &json!("30 6 * * *"))
    );

    // What is absent stays; what is null goes.
    let change = json!({"timezone": "Asia/Kolkata", "endDate": "2099-01-01T00:00:00Z", "overlap": "queue", "catchUp": "skip"});
    let (status, changed) = answer(app.patch(&format!("/v1/schedules/{id}"), change)).await;
    assert_eq!(status, 200, "{changed}");
    assert_eq!(
        instant(&changed["nextRunAt"]).format("%H:%M").to_string(),
        "01:00"
    );
    assert_eq!(changed["deadlineOffsetMs"], 60_000);
    let change = json!({"timezone": null, "endDate": null, "deadlineOffsetMs": null});
    let (_, changed) = answer(app.patch(&format!("/v1/schedules/{mission}"), change)).await;
    assert_eq!(
        (
            &changed["timezone"],
            &changed["overlap"],
            &changed["catchUp"]
        ),
        (&json!("UTC"), &json!("queue"), &json!("skip"))
    );
    assert!(changed.get("endDate").is_none() && changed.get("deadlineOffsetMs").is_none());
    assert_eq!(changed["nextRunAt"], made["nextRunAt"]);
    let change = json!({"recurring": false, "expression": "2099-04-08T06:30:00Z"});
    let (_, changed) = answer(app.patch(&format!("/v1/schedules/{mission}"), change)).await;
    assert_eq!(changed["nextRuns"], json!(["2099-04-08T06:30:00.000Z"]));
    assert_eq!(app.read_mission(&mission).await["status"], "scheduled");

    let (status, deleted) = answer(app.delete(&format!("/v1/schedules/{mission}"))).await;
    assert_eq!(
        (status, deleted),
        (StatusCode::OK, json!({"deleted": true}))
    );
    let told = app.read_mission(&mission).await;
    assert_eq!(
        (&told["status"], told.get("schedule")),
        (&json!("draft"), None)
    );
    assert_eq!(answer(app.get(&format!("/v1/schedules/{id}"))).await.0, 404);
    assert_eq!(answer(app.get("/v1/schedules")).await.1, json!([]));
    // And by its own id.
    let made = app.schedule(&mission, json!({})).await;
    let own = format!("/v1/schedules/{}", made["scheduleId"].as_str().unwrap());
    assert_eq!(answer(app.delete(&own)).await.0, 200);
    assert_eq!(answer(app.delete(&own)).await.0, 404);
}

#[tokio::test]
async fn schedules_are_listed_oldest_first_a_page_at_a_time() {
    let app = still().await;
    let mut made = Vec::new();
    for number in 0..5 {
        let mission = app.small(&format!("m{number}"), "Do it").await;
        made.push(app.schedule(&mission, json!({})).await);
    }
    let response = app.get("/v1/schedules?limit=2").send().await.unwrap();
    let link = response.headers()["link"].to_str().unwrap().to_owned();
    assert_eq!(response.json::<Value>().await.unwrap(), json!(made[..2]));
    let next = link.strip_prefix('<').unwrap().split('>').next().unwrap();
    assert_eq!(answer(app.get(next)).await.1, json!(made[2..4]));
    // The sandbox has none of them.
    let sandbox = app
        .client
        .get(format!("{}/v1/schedules", app.url))
        .bearer_auth(&app.test);
    assert_eq!(answer(sandbox).await.1, json!([]));
}

#[tokio::test]
async fn a_mission_has_one_schedule_and_another_takes_its_place() {
    let app = still().await;
    let mission = app.small("m", "Do it").await;
    let first = app
        .schedule(
            &mission,
            json!({"overlap": "queue", "endDate": "2099-01-01T00:00:00Z"}),
        )
        .await;
    let once = json!({"expression": "2098-04-08T06:30:00Z", "recurring": false});
    let second = app.schedule(&mission, once).await;
    assert_eq!(
        (&second["overlap"], second.get("endDate")),
        (&json!("skip"), None)
    );
    assert_eq!(answer(app.get("/v1/schedules")).await.1, json!([second]));
    let old = first["scheduleId"].as_str().unwrap();
    assert_eq!(
        app.read_schedule(old).await["expression"],
        second["expression"]
    );
    assert_eq!(app.read_mission(&mission).await["status"], "scheduled");
    let again = app.schedule(&mission, json!({})).await;
    assert_eq!(again["recurring"], true);
    assert_eq!(app.read_mission(&mission).await["status"], "recurring");
    assert_eq!(app.told("schedule:*").await["schedule:created"], 3);
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let (jobs,): (i64,) = sqlx::query_as("select count(*) from production.jobs")
        .fetch_one(&mut database)
        .await
        .unwrap();
    assert_eq!(jobs, 1);
}

#[tokio::test]
async fn what_is_wrong_is_refused_with_the_field_at_fault_and_nothing_is_stored() {
    let app = still().await;
    let mission = app.small("m", "Do it").await;
    let events = app.events("*").await.len();
    let good = json!({"missionId": mission, "expression": "30 6 * * *", "recurring": true});
    let with = |change: Value| {
        let mut body = good.clone();
        for (member, value) in change.as_object().unwrap() {
            if value.is_null() {
                body.as_object_mut().unwrap().remove(member);
            } else {
                body[member] = value.clone();
            }
        }
        body
    };
    let faults = [
        (json!({"missionId": null}), "missionId"),
        (json!({"expression": null}), "expression"),
        (json!({"recurring": null}), "recurring"),
        (json!({"recurring": "yes"}), "recurring"),
        (json!({"enabled": "yes"}), "enabled"),
        (json!({"expression": ""}), "expression"),
        (json!({"expression": 5}), "expression"),
        (json!({"expression": "* * * *"}), "expression"),
        (json!({"expression": "0 30 6 * * *"}), "expression"),
        (json!({"expression": "@daily"}), "expression"),
        (json!({"expression": "0 0 * * MON"}), "expression"),
        (json!({"expression": "0 0 L * *"}), "expression"),
        (json!({"expression": "60 * * * *"}), "expression"),
        (json!({"expression": "0 0 31 2 *"}), "expression"),
        (json!({"expression": "2099-01-01T00:00:00Z"}), "expression"),
        (
            json!({"expression": "2020-01-01T00:00:00Z", "recurring": false}),
            "expression",
        ),
        (
            json!({"expression": "2099-02-30T00:00:00Z", "recurring": false}),
            "expression",
        ),
        (json!({"expression": "0".repeat(5000)}), "expression"),
        (json!({"timezone": "Mars/Olympus"}), "timezone"),
        (json!({"timezone": "+02:00"}), "timezone"),
        (json!({"endDate": "soon"}), "endDate"),
        (json!({"endDate": "2020-01-01T00:00:00Z"}), "endDate"),
        (
            json!({"expression": "0 0 1 1 *", "endDate": soon(1000)}),
            "endDate",
        ),
        (json!({"deadlineOffsetMs": 0}), "deadlineOffsetMs"),
        (json!({"deadlineOffsetMs": -5}), "deadlineOffsetMs"),
        (
            json!({"deadlineOffsetMs": 3_155_760_000_001_i64}),
            "deadlineOffsetMs",
        ),
        (json!({"deadlineOffsetMs": 1.5}), "deadlineOffsetMs"),
        (json!({"catchUp": "all"}), "catchUp"),
        (json!({"overlap": "both"}), "overlap"),
    ];
    for (change, part) in &faults {
        let (status, body) = answer(app.post("/v1/schedules", with(change.clone()))).await;
        assert_eq!(
            (status, &body["code"]),
            (StatusCode::BAD_REQUEST, &json!("bad_request")),
            "{change} {body}"
        );
        assert!(
            body["error"].as_str().unwrap().contains(part),
            "{change} {body}"
        );
    }
    for body in ["", "[]", "null", "{", "3"] {
        let request = app
            .request(reqwest::Method::POST, "/v1/schedules")
            .header("content-type", "application/json")
            .body(body);
        assert_eq!(answer(request).await.0, 400, "{body}");
    }
    for missing in ["msn_0", "x", "", &Id::<ids::Mission>::new().to_string()] {
        let (status, body) =
            answer(app.post("/v1/schedules", with(json!({"missionId": missing})))).await;
        assert_eq!(
            (status, &body["code"]),
            (StatusCode::NOT_FOUND, &json!("not_found")),
            "{missing} {body}"
        );
    }
    assert_eq!(answer(app.get("/v1/schedules")).await.1, json!([]));
    assert_eq!(app.read_mission(&mission).await["status"], "draft");
    assert_eq!(app.events("*").await.len(), events);

    // The same for changes to one that is there.
    let made = app.schedule(&mission, json!({})).await;
    let own = format!("/v1/schedules/{mission}");
    let before = app.events("*").await.len();
    for (change, part) in &faults {
        // An absent member stays as it is.
        if change.as_object().unwrap().values().any(Value::is_null) {
            continue;
        }
        let (status, body) = answer(app.patch(&own, change.clone())).await;
        assert_eq!(status, 400, "{change} {body}");
        assert!(
            body["error"].as_str().unwrap().contains(part),
            "{change} {body}"
        );
    }
    assert_eq!(app.read_schedule(&mission).await, made);
    assert_eq!(app.events("*").await.len(), before);
    let (others, none) = (
        Id::<ids::Schedule>::new().to_string(),
        Id::<ids::Mission>::new().to_string(),
    );
    for id in ["x", "sch_0", &others, &none] {
        let path = format!("/v1/schedules/{id}");
        for request in [
            app.get(&path),
            app.patch(&path, json!({"enabled": false})),
            app.delete(&path),
        ] {
            let (status, body) = answer(request).await;
            assert_eq!(
                (status, &body["code"]),
                (StatusCode::NOT_FOUND, &json!("not_found")),
                "{id} {body}"
            );
        }
    }
    for query in ["limit=0", "limit=x", "limit=5000", "after=x"] {
        let (status, body) = answer(app.get(&format!("/v1/schedules?{query}"))).await;
        assert_eq!(status, 400, "{query} {body}");
    }
}

#[tokio::test]
async fn a_single_run_begins_at_its_time_and_is_over_after_it() {
    let app = start(&[]).await;
    let mission = app.small("m", "Do it").await;
    let due = soon(700);
    let made = app
        .schedule(&mission, json!({"expression": due, "recurring": false}))
        .await;
    assert_eq!(app.read_mission(&mission).await["status"], "scheduled");
    assert_eq!(made["nextRuns"].as_array().unwrap().len(), 1);
    app.mission_until(&mission, "completed").await;
    let after = app.read_schedule(&mission).await;
    assert_eq!(
        (&after["enabled"], &after["nextRunAt"], &after["nextRuns"]),
        (&json!(false), &Value::Null, &json!([]))
    );
    let late = instant(&after["lastRunAt"]) - at(&due);
    assert!((0..2000).contains(&late.num_milliseconds()), "{late}");
    let told: Vec<String> = app
        .events("schedule:*")
        .await
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(
        told,
        [
            "schedule:created",
            "schedule:triggered",
            "schedule:completed"
        ]
    );
    for (_, event) in app.events("schedule:*").await {
        assert_eq!(
            (&event["scheduleId"], &event["missionId"]),
            (&made["scheduleId"], &json!(mission))
        );
    }
    assert_eq!(app.upstream.asked().len(), 1);
}

#[tokio::test]
async fn a_single_run_that_fails_is_not_begun_again() {
    let app = start(&[]).await;
    let mission = app.small("m", "Fail").await;
    app.schedule(
        &mission,
        json!({"expression": soon(300), "recurring": false}),
    )
    .await;
    let failed = app.mission_until(&mission, "failed").await;
    assert_eq!(failed["executionCount"], 1);
    assert_eq!(app.read_schedule(&mission).await["enabled"], false);
    // Nothing is owed that could begin it: there is nothing to wait for.
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let (jobs,): (i64,) = sqlx::query_as("select count(*) from production.jobs")
        .fetch_one(&mut database)
        .await
        .unwrap();
    assert_eq!(jobs, 0);
    assert_eq!(app.told("schedule:*").await["schedule:triggered"], 1);
}

#[tokio::test]
async fn a_recurring_mission_waits_for_its_next_time_whether_it_succeeded_or_not() {
    let app = start(&[]).await;
    let mut missions = Vec::new();
    for words in ["Do it", "Fail"] {
        let mission = app.small(words, words).await;
        app.schedule(&mission, json!({})).await;
        missions.push(mission);
    }
    for round in 1..=2 {
        app.make_due(1.0).await;
        for mission in &missions {
            eventually("the run ends", async || {
                let mission = app.read_mission(mission).await;
                mission["executionCount"] == round && mission["status"] == "recurring"
            })
            .await;
            let schedule = app.read_schedule(mission).await;
            assert_eq!(schedule["enabled"], true);
            assert!(instant(&schedule["nextRunAt"]) > Utc::now());
        }
    }
    let reports: Vec<bool> = app
        .events("mission:completed")
        .await
        .iter()
        .map(|(_, event)| event["allPassed"].as_bool().unwrap())
        .collect();
    assert_eq!(reports.iter().filter(|passed| **passed).count(), 2);
    assert_eq!(reports.len(), 4);
    let told = app.told("schedule:*").await;
    assert_eq!(
        (told["schedule:triggered"], told["schedule:completed"]),
        (4, 4)
    );
    assert_eq!(
        answer(app.get("/v1/tasks?group=Fail%20%232"))
            .await
            .1
            .as_array()
            .unwrap()
            .len(),
        1
    );
}

#[tokio::test]
async fn at_its_end_date_a_schedule_expires_and_its_mission_is_completed() {
    let app = start(&[]).await;
    let mission = app.small("m", "Do it").await;
    // It ends before it is due again: nothing but the end is left to wait for.
    app.schedule(&mission, json!({"endDate": "2099-01-01T00:00:00Z"}))
        .await;
    app.sql(
        "update production.schedules set end_date = clock_timestamp() + interval '3 seconds'"
            .to_owned(),
    )
    .await;
    app.make_due(1.0).await;
    let done = app.mission_until(&mission, "completed").await;
    assert_eq!(done["executionCount"], 1);
    assert_eq!(done["reason"], "Its schedule has ended.");
    let after = app.read_schedule(&mission).await;
    assert_eq!(
        (&after["enabled"], &after["nextRunAt"]),
        (&json!(false), &Value::Null)
    );
    assert_eq!(app.told("schedule:*").await["schedule:expired"], 1);
    // It stays listed.
    assert_eq!(answer(app.get("/v1/schedules")).await.1, json!([after]));
}

#[tokio::test]
async fn a_disabled_schedule_stays_listed_and_begins_nothing() {
    let app = start(&[]).await;
    let (mission, probe) = (
        app.small("m", "Do it").await,
        app.small("probe", "Do it").await,
    );
    let made = app
        .schedule(
            &mission,
            json!({"enabled": false, "expression": soon(100), "recurring": false}),
        )
        .await;
    assert_eq!(
        (&made["nextRunAt"], &made["nextRuns"]),
        (&Value::Null, &json!([]))
    );
    let (_, off) = (
        app.schedule(&mission, json!({})).await,
        answer(app.patch(
            &format!("/v1/schedules/{mission}"),
            json!({"enabled": false}),
        ))
        .await
        .1,
    );
    assert_eq!(
        (&off["enabled"], &off["nextRunAt"]),
        (&json!(false), &Value::Null)
    );
    // Whatever would have been due is long over when a later one has been done.
    app.schedule(&probe, json!({"expression": soon(300), "recurring": false}))
        .await;
    app.mission_until(&probe, "completed").await;
    app.schedule(&mission, json!({"enabled": false})).await;
    assert_eq!(app.read_mission(&mission).await["executionCount"], 0);
    assert_eq!(
        answer(app.get("/v1/schedules"))
            .await
            .1
            .as_array()
            .unwrap()
            .len(),
        2
    );
    // Enabled again, it waits for its next time and not for one that has passed.
    let (_, on) = answer(app.patch(
        &format!("/v1/schedules/{mission}"),
        json!({"enabled": true}),
    ))
    .await;
    assert!(instant(&on["nextRunAt"]) > Utc::now());
}

#[tokio::test]
async fn a_schedule_that_is_switched_off_says_what_its_mission_waits_for_all_the_same() {
    let app = still().await;
    let mission = app.small("m", "Do it").await;
    app.schedule(
        &mission,
        json!({"expression": "0 7 * * *", "recurring": true}),
    )
    .await;
    let change = async |change: Value| {
        let path = format!("/v1/schedules/{mission}");
        let (status, body) = answer(app.patch(&path, change)).await;
        assert_eq!(status, 200, "{body}");
        app.read_mission(&mission).await["status"].clone()
    };
    assert_eq!(change(json!({"enabled": false})).await, "recurring");
    assert_eq!(change(json!({"recurring": false})).await, "scheduled");
    assert_eq!(change(json!({"recurring": true})).await, "recurring");
}

#[tokio::test]
async fn while_a_project_has_its_scheduler_off_nothing_is_begun() {
    let app = start(&[]).await;
    let mission = app.small("m", "Do it").await;
    app.schedule(&mission, json!({})).await;
    let set = async |on: bool| {
        let (status, body) = answer(app.patch("/v1/config", json!({"enableScheduler": on}))).await;
        assert_eq!(status, 200, "{body}");
    };
    set(false).await;
    app.make_due(1.0).await;
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    eventually("the engine has looked", async || {
        let (parked,): (bool,) = sqlx::query_as(
            "select parked_on is not null from production.jobs where kind = 'schedule'",
        )
        .fetch_one(&mut database)
        .await
        .unwrap();
        parked
    })
    .await;
    // It is not looked at again because places come free, nor by the look that each process has every ten seconds at what is parked.
    let mut lease = async || -> i64 {
        sqlx::query_scalar("select lease from production.jobs where parked_on is not null")
            .fetch_one(&mut database)
            .await
            .unwrap()
    };
    let parked = lease().await;
    answer(app.patch("/v1/agents/noor", json!({"maxConcurrency": 5}))).await;
    app.app.db.wake_parked_jobs(World::Live).await.unwrap();
    assert_eq!(lease().await, parked);
    assert_eq!(app.read_mission(&mission).await["executionCount"], 0);
    // Switched on again, it makes up for what was missed.
    set(true).await;
    eventually("it begins", async || {
        app.read_mission(&mission).await["executionCount"] == 1
    })
    .await;
}

#[tokio::test]
async fn what_was_missed_is_made_up_for_once_or_left_out() {
    let app = still().await;
    for (policy, begins) in [("latest", true), ("skip", false)] {
        let mission = app.small(policy, "Do it").await;
        let made = app
            .schedule(
                &mission,
                json!({"catchUp": policy, "expression": "0 * * * *"}),
            )
            .await;
        let due = instant(&made["nextRunAt"]);
        // Not before its time.
        assert!(!app.fires(&made, due - chrono::Duration::seconds(1)).await);
        // Nobody was there for five hours and a half: five were missed, and they count as one.
        let now = due + chrono::Duration::minutes(330);
        assert_eq!(app.fires(&made, now).await, begins, "{policy}");
        let after = app.read_schedule(&mission).await;
        assert_eq!(
            instant(&after["nextRunAt"]),
            due + chrono::Duration::hours(6),
            "{policy}"
        );
        assert_eq!(
            app.read_mission(&mission).await["executionCount"],
            i32::from(begins)
        );
        app.end_run(&mission).await;
        assert_eq!(app.read_mission(&mission).await["status"], "recurring");
        // Up to a minute late is on time.
        let next = instant(&after["nextRunAt"]);
        assert!(app.fires(&made, next + chrono::Duration::seconds(59)).await);
        app.end_run(&mission).await;
        // After a gap the latest of the missed ones may be on time all the same.
        let next = instant(&app.read_schedule(&mission).await["nextRunAt"]);
        let now = next + chrono::Duration::minutes(180) + chrono::Duration::seconds(5);
        assert!(app.fires(&made, now).await, "{policy}");
        answer(app.post(&format!("/v1/missions/{mission}/abort"), json!({}))).await;
    }
    let skipped = app.events("schedule:skipped").await;
    assert_eq!(skipped.len(), 1);
    assert_eq!(skipped[0].1["reason"], "missed");
}

#[tokio::test]
async fn a_single_run_that_was_missed_and_is_not_made_up_for_fails_its_mission() {
    let app = still().await;
    let mission = app.small("m", "Do it").await;
    let once = json!({"expression": "2098-01-01T00:00:00Z", "recurring": false, "catchUp": "skip"});
    let made = app.schedule(&mission, once).await;
    assert!(!app.fires(&made, at("2098-01-01T00:02:00Z")).await);
    let told = app.read_mission(&mission).await;
    assert_eq!(
        (&told["status"], &told["executionCount"]),
        (&json!("failed"), &json!(0))
    );
    assert_eq!(app.read_schedule(&mission).await["enabled"], false);
}

#[tokio::test]
async fn a_time_that_comes_while_a_run_is_under_way_is_left_out_or_followed_by_one_run() {
    let app = still().await;
    let mut runs = HashMap::new();
    for policy in ["skip", "queue"] {
        let mission = app.small(policy, "Do it").await;
        let made = app
            .schedule(
                &mission,
                json!({"overlap": policy, "expression": "0 * * * *"}),
            )
            .await;
        let due = instant(&made["nextRunAt"]);
        assert!(app.fires(&made, due).await);
        // Three come while it runs.
        for hour in 1..=3 {
            assert!(!app.fires(&made, due + chrono::Duration::hours(hour)).await);
        }
        let after = app.read_schedule(&mission).await;
        assert_eq!(
            instant(&after["nextRunAt"]),
            due + chrono::Duration::hours(4)
        );
        assert_eq!(app.read_mission(&mission).await["executionCount"], 1);
        runs.insert(policy, (mission, made));
    }
    let skipped = app.events("schedule:skipped").await;
    assert_eq!(skipped.len(), 3);
    assert!(
        skipped.iter().all(|(_, event)| event["reason"] == "overlap"
            && event["missionId"] == json!(runs["skip"].0))
    );
    // An engine comes, and both runs end.
    let stop = app.another_process_with_stop().await;
    eventually("one run follows", async || {
        let mission = app.read_mission(&runs["queue"].0).await;
        mission["executionCount"] == 2 && mission["status"] == "recurring"
    })
    .await;
    app.mission_until(&runs["skip"].0, "recurring").await;
    for (policy, count) in [("skip", 1), ("queue", 2)] {
        let (mission, made) = &runs[policy];
        assert_eq!(
            app.read_mission(mission).await["executionCount"],
            count,
            "{policy}"
        );
        let after = app.read_schedule(mission).await;
        let due = instant(&made["nextRunAt"]);
        assert_eq!(
            instant(&after["nextRunAt"]),
            due + chrono::Duration::hours(4)
        );
    }
    assert_eq!(app.told("schedule:*").await["schedule:triggered"], 3);
    stop.cancel();
}

#[tokio::test]
async fn a_single_run_that_comes_while_a_person_runs_the_mission_follows_if_it_is_to() {
    let app = still().await;
    for (policy, standing) in [("skip", "failed"), ("queue", "scheduled")] {
        let mission = app.small(policy, "Do it").await;
        let once =
            json!({"expression": "2098-01-01T00:00:00Z", "recurring": false, "overlap": policy});
        let made = app.schedule(&mission, once).await;
        assert_eq!(app.execute(&mission).await.0, 200);
        assert!(!app.fires(&made, at("2098-01-01T00:00:01Z")).await);
        app.end_run(&mission).await;
        assert_eq!(
            app.read_mission(&mission).await["status"],
            standing,
            "{policy}"
        );
        if policy == "queue" {
            assert!(app.fires(&made, at("2098-01-01T00:00:09Z")).await);
            assert_eq!(app.read_schedule(&mission).await["enabled"], false);
            assert_eq!(app.read_mission(&mission).await["executionCount"], 2);
        }
    }
}

#[tokio::test]
async fn a_time_of_day_is_kept_when_the_clocks_change() {
    let app = still().await;
    let mission = app.small("m", "Do it").await;
    let made = app
        .schedule(
            &mission,
            json!({"expression": "30 2 * * *", "timezone": "Europe/Berlin"}),
        )
        .await;
    for days in [
        // 02:30 is skipped on the 28th of March: the run is at 03:00 of summer time, which is when the gap ends.
        [
            "2027-03-27T01:30:00Z",
            "2027-03-28T01:00:00Z",
            "2027-03-29T00:30:00Z",
            "2027-03-30T00:30:00Z",
        ],
        // 02:30 comes twice on the 31st of October: the run is at the first of them.
        [
            "2027-10-30T00:30:00Z",
            "2027-10-31T00:30:00Z",
            "2027-11-01T01:30:00Z",
            "2027-11-02T01:30:00Z",
        ],
    ] {
        app.sql(format!(
            "update production.schedules set next_run_at = '{}'",
            days[0]
        ))
        .await;
        for (day, next) in days.iter().zip(&days[1..]) {
            assert_eq!(
                app.read_schedule(&mission).await["nextRunAt"],
                json!(day.replace('Z', ".000Z"))
            );
            assert!(
                !app.fires(&made, at(day) - chrono::Duration::seconds(1))
                    .await,
                "{day}"
            );
            assert!(app.fires(&made, at(day)).await, "{day}");
            app.end_run(&mission).await;
            assert!(
                !app.fires(&made, at(next) - chrono::Duration::seconds(1))
                    .await,
                "{next}"
            );
        }
    }
    assert_eq!(app.read_mission(&mission).await["executionCount"], 6);
}

#[tokio::test]
async fn a_mission_that_cannot_be_executed_says_so_and_goes_on_waiting() {
    let app = start(&[]).await;
    answer(app.post(
        "/v1/agents",
        json!({"name": "gone", "model": "openai:scripted"}),
    ))
    .await;
    let mut missions = Vec::new();
    for (name, recurring, expression) in [
        ("again", true, "30 6 * * *"),
        ("once", false, "2098-01-01T00:00:00Z"),
    ] {
        let task = json!({"title": "A", "description": "Do it", "assignTo": "gone"});
        let mission = app.mission(name, json!({"tasks": [task]})).await;
        app.schedule(
            &mission,
            json!({"recurring": recurring, "expression": expression}),
        )
        .await;
        missions.push(mission);
    }
    assert_eq!(answer(app.delete("/v1/agents/gone")).await.0, 200);
    app.make_due(1.0).await;
    let once = app.mission_until(&missions[1], "failed").await;
    assert!(
        once["reason"].as_str().unwrap().contains("\"gone\""),
        "{once}"
    );
    eventually("both have said so", async || {
        app.events("schedule:failed").await.len() == 2
    })
    .await;
    let again = app.read_mission(&missions[0]).await;
    assert_eq!(
        (&again["status"], &again["executionCount"]),
        (&json!("recurring"), &json!(0))
    );
    assert!(
        again["reason"].as_str().unwrap().contains("\"gone\""),
        "{again}"
    );
    assert!(instant(&app.read_schedule(&missions[0]).await["nextRunAt"]) > Utc::now());
    assert_eq!(app.read_schedule(&missions[1]).await["enabled"], false);
    // As soon as it can be executed, it is.
    app.agent("gone").await;
    app.make_due(1.0).await;
    eventually("it runs", async || {
        app.read_mission(&missions[0]).await["executionCount"] == 1
    })
    .await;
    app.mission_until(&missions[0], "recurring").await;
    assert_eq!(app.events("schedule:failed").await.len(), 2);
}

#[tokio::test]
async fn a_schedule_ends_in_peace_though_its_mission_cannot_be_executed() {
    let app = start(&[]).await;
    let mission = app.small("m", "Do it").await;
    app.schedule(&mission, json!({"endDate": "2099-01-01T00:00:00Z"}))
        .await;
    // A model that cannot be asked is found out before anything is tried.
    let (status, body) =
        answer(app.patch("/v1/agents/noor", json!({"model": "nobody:nothing"}))).await;
    assert_eq!(status, 200, "{body}");
    app.sql(
        "update production.schedules set end_date = clock_timestamp() - interval '1 second'"
            .to_owned(),
    )
    .await;
    app.make_due(2.0).await;
    app.mission_until(&mission, "completed").await;
    let told = app.told("schedule:*").await;
    assert_eq!(
        (told["schedule:expired"], told.get("schedule:failed")),
        (1, None)
    );
}

#[tokio::test]
async fn a_run_that_takes_longer_than_its_schedule_allows_fails() {
    let app = start(&[]).await;
    app.upstream.answers(|_| Reply::Hang(vec![]));
    let mission = app.small("m", "Do it").await;
    let once = json!({"expression": soon(200), "recurring": false, "deadlineOffsetMs": 600});
    app.schedule(&mission, once).await;
    let failed = app.mission_until(&mission, "failed").await;
    assert_eq!(failed["reason"], "The mission's deadline has passed.");
    let violated = &app.events("sla:violated").await[0].1;
    let schedule = app.read_schedule(&mission).await;
    let took = instant(&violated["deadline"]) - instant(&schedule["lastRunAt"]);
    assert!((599..=601).contains(&took.num_milliseconds()), "{took}");
    // Those that a person begins have no such limit.
    app.upstream
        .answers(|_| Reply::Slow(Duration::from_millis(900), said("Done.")));
    assert_eq!(app.execute(&mission).await.0, 200);
    app.mission_until(&mission, "completed").await;
}

#[tokio::test]
async fn each_of_many_that_are_due_at_once_is_begun_once_by_several_processes() {
    const MANY: usize = 200;
    let app = start(&["--role-of-test", "api"]).await;
    let mut missions = Vec::new();
    for number in 0..MANY {
        let mission = app.small(&format!("m{number}"), "Do it").await;
        let once = json!({"expression": "2098-01-01T00:00:00Z", "recurring": false});
        let schedule = if number % 2 == 0 { json!({}) } else { once };
        app.schedule(&mission, schedule).await;
        missions.push(mission);
    }
    let mut stops = Vec::new();
    for _ in 0..3 {
        stops.push(app.another_process_with_stop().await);
    }
    app.make_due(0.5).await;
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let mut ended = (0, 0);
    for _ in 0..1200 {
        ended = sqlx::query_as(
            "select count(*) filter (where status in ('completed', 'recurring') and execution_count > 0), sum(execution_count) from production.missions",
        )
        .fetch_one(&mut database)
        .await
        .unwrap();
        if ended.0 == i64::try_from(MANY).unwrap() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    let many = i64::try_from(MANY).unwrap();
    assert_eq!(ended, (many, many));
    let told = app.told("*").await;
    for name in [
        "schedule:triggered",
        "schedule:completed",
        "mission:executed",
        "mission:completed",
        "task:created",
    ] {
        assert_eq!(told[name], MANY, "{name}");
    }
    assert_eq!(app.upstream.asked().len(), MANY);
    for stop in stops {
        stop.cancel();
    }
}
