//! Tasks as a caller sees them (contract 2.6).

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::sync::Notify;

use crate::assessments::scored;
use crate::harness::{
    Reply, TestApp, answer, called, chunk, done_elsewhere, ending, eventually, frames, last_text,
    results, said, spoken,
};

pub(crate) async fn start() -> TestApp {
    let app = TestApp::start_with(&["--retry-backoff-ms", "1"]).await;
    app.agent("noor").await;
    app
}

/// The statuses that a task went through, from its transitions.
async fn way(app: &TestApp, id: &str) -> Vec<String> {
    let told = app.events("task:transition").await;
    told.iter()
        .filter(|(_, payload)| payload["taskId"] == id)
        .map(|(_, payload)| payload["to"].as_str().unwrap().to_owned())
        .collect()
}

pub(crate) async fn names(app: &TestApp, filter: &str) -> Vec<String> {
    app.events(filter)
        .await
        .into_iter()
        .map(|(name, _)| name)
        .collect()
}

#[tokio::test]
async fn a_task_is_done_and_every_step_of_its_way_is_told() {
    let app = start().await;
    for (path, memory) in [
        ("/v1/memory", "Dates are ISO"),
        ("/v1/memory/agent/noor", "Likes tea"),
    ] {
        answer(
            app.request(Method::PUT, path)
                .json(&json!({"content": memory})),
        )
        .await;
    }
    app.upstream.will_say("Three changes.");
    let id = app.task("Draft changelog", json!({"priority": 5})).await;
    let task = app.until(&id, "done").await;
    assert!(id.starts_with("task_"));
    let result = &task["result"];
    assert_eq!(
        (&result["exitCode"], &result["stdout"], &result["reason"]),
        (&json!(0), &json!("Three changes."), &json!("finished"))
    );
    assert!(result["duration"].is_i64() && task.get("phase").is_none());

    let asked = &app.upstream.asked()[0];
    assert_eq!(last_text(asked, "user"), "Do Draft changelog");
    let system = last_text(asked, "system");
    assert!(
        system.contains("<shared-memory>\nDates are ISO")
            && system.contains("<agent-memory>\nLikes tea"),
        "{system}"
    );
    let tools: Vec<&str> = asked["tools"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tool| tool["function"]["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        tools,
        [
            "memory_get",
            "memory_save",
            "memory_append",
            "memory_update",
            "register_outcome"
        ]
    );

    assert_eq!(
        names(&app, "*").await,
        [
            "task:created",
            "task:transition",
            "task:transition",
            "agent:spawned",
            "agent:completed",
            "agent:finished",
            "task:transition",
            "task:transition",
            "task:completed",
        ]
    );
    assert_eq!(
        way(&app, &id).await,
        ["assigned", "in_progress", "review", "done"]
    );
    for (name, payload) in app.events("*").await {
        assert_eq!(payload["taskId"], json!(id), "{name}");
        assert!(
            payload["timestamp"].as_str().unwrap().ends_with('Z'),
            "{name}"
        );
    }
    let (_, last) = app.events("task:transition").await.pop().unwrap();
    assert_eq!(
        (&last["from"], &last["agentName"], &last["task"]),
        (&json!("review"), &json!("noor"), &task)
    );
    let (_, completed) = app.events("task:completed").await.pop().unwrap();
    assert_eq!(completed["task"], task);
    for (_, step) in app.events("task:transition").await {
        assert_eq!(step["task"]["status"], step["to"]);
    }
}

#[tokio::test]
async fn every_field_is_kept_and_shown() {
    let app = start().await;
    let given = json!({
        "title": "All", "description": "Of it", "assignTo": "noor", "draft": true, "priority": 2.5, "maxRetries": 1,
        "sideEffects": true, "maxDuration": 60000, "group": "g", "deadline": "2099-01-01T00:00:00Z",
        "expectations": [{"type": "llm_review", "prompt": "Is it short?", "threshold": 4}],
        "expectedOutcomes": [{"type": "text", "label": "Notes"}],
        "retryPolicy": {"escalateAfter": 1, "fallbackAgent": "noor", "escalateModel": "echo"},
        "notifications": {"rules": []}, "user": "u", "sandbox": {"a": 1}, "unknown": "ignored",
    });
    let (status, task) = answer(app.post("/v1/tasks", given.clone())).await;
    assert_eq!(status, 201, "{task}");
    for key in [
        "title",
        "description",
        "assignTo",
        "priority",
        "maxRetries",
        "sideEffects",
        "maxDuration",
        "group",
        "retryPolicy",
        "notifications",
        "user",
        "sandbox",
    ] {
        assert_eq!(task[key], given[key], "{key}");
    }
    assert_eq!(task["status"], "draft");
    assert_eq!(
        task["expectations"][0],
        json!({"type": "llm_review", "criteria": "Is it short?", "threshold": 4.0, "confidence": "firm"})
    );
    assert_eq!(task["expectedOutcomes"][0]["required"], true);
    assert_eq!(task["deadline"], "2099-01-01T00:00:00.000Z");
    assert!(task.get("unknown").is_none() && task.get("result").is_none());
    let id = task["id"].as_str().unwrap();
    assert_eq!(app.read(id).await, task);
    let change = json!({"description": "Of that", "priority": 9, "maxRetries": 2, "retries": 1, "sideEffects": false, "expectations": []});
    let (status, changed) = answer(app.patch(&format!("/v1/tasks/{id}"), change.clone())).await;
    assert_eq!(status, 200, "{changed}");
    for (key, value) in change.as_object().unwrap() {
        let shown = if key == "priority" {
            json!(9.0)
        } else {
            value.clone()
        };
        assert_eq!(changed[key], shown, "{key}");
    }
    assert_eq!(names(&app, "task:updated").await.len(), 1);
}

#[tokio::test]
async fn what_is_wrong_is_refused_with_a_sentence_and_nothing_is_stored() {
    let app = start().await;
    let good = json!({"title": "t", "description": "d", "assignTo": "noor"});
    for (member, value, word) in [
        ("title", Value::Null, "title: required"),
        ("title", json!(" "), "title: required"),
        ("title", json!(7), "string"),
        ("title", json!("x".repeat(501)), "500"),
        ("description", Value::Null, "description: required"),
        ("assignTo", Value::Null, "assignTo: required"),
        ("assignTo", json!("ghost"), "ghost"),
        ("dependsOn", json!(["nothing"]), "nothing"),
        ("dependsOn", json!("t"), "array"),
        (
            "metrics",
            json!([{"name": "m", "command": "c", "threshold": 1}]),
            "shell",
        ),
        (
            "expectations",
            json!([{"type": "test", "command": "true"}]),
            "shell",
        ),
        (
            "expectations",
            json!([{"type": "file_exists", "path": "a"}]),
            "shell",
        ),
        ("expectations", json!([{"type": "llm_review"}]), "criteria"),
        ("expectations", json!({}), "list"),
        ("expectedOutcomes", json!([{"type": "text"}]), "label"),
        ("maxRetries", json!(-1), "whole number"),
        ("maxRetries", json!(101), "100"),
        ("maxDuration", json!("long"), "whole number"),
        ("priority", json!("high"), "a number"),
        ("deadline", json!("soon"), "2026-04-07T12:00:00Z"),
        ("retryPolicy", json!({"escalateAfter": -1}), "whole number"),
        ("title", json!("a\0b"), "NUL"),
        ("assignTo", json!("x".repeat(201)), "200"),
        ("group", json!("x".repeat(201)), "200"),
        ("dependsOn", json!(["x".repeat(501)]), "500"),
        ("maxDuration", json!(u64::MAX), "at most"),
        ("deadline", json!("+200000-01-01T00:00:00Z"), "9999"),
        ("notifications", json!(7), "object"),
        ("loop", json!([1]), "object"),
        (
            "sandbox",
            json!({"a": "x".repeat(33_000)}),
            "`sandbox` is too long",
        ),
        (
            "expectations",
            json!([{"type": "llm_review", "criteria": "x".repeat(33_000)}]),
            "`expectations` is too long",
        ),
        (
            "expectedOutcomes",
            json!([{"type": "text", "label": "x".repeat(33_000)}]),
            "`expectedOutcomes` is too long",
        ),
        (
            "retryPolicy",
            json!({"escalateModel": "x".repeat(1_100)}),
            "`retryPolicy` is too long",
        ),
        (
            "retryPolicy",
            json!({"escalateAfter": 1, "fallbackAgent": "ghost"}),
            "`retryPolicy.fallbackAgent`: there is no agent \"ghost\"",
        ),
        (
            "retryPolicy",
            json!({"escalateAfter": 1, "escalateModel": "nope:nope"}),
            "`retryPolicy.escalateModel` \"nope:nope\" names no known provider",
        ),
    ] {
        let mut task = good.clone();
        task[member] = value.clone();
        let (status, body) = answer(app.post("/v1/tasks", task)).await;
        assert_eq!(
            (status.as_u16(), &body["code"]),
            (400, &json!("bad_request")),
            "{member} {value}: {body}"
        );
        assert!(
            body["error"].as_str().unwrap().contains(word),
            "{member}: {body}"
        );
    }
    let malformed = app
        .request(Method::POST, "/v1/tasks")
        .header("content-type", "application/json")
        .body("{");
    assert_eq!(answer(malformed).await.0, 400);
    assert_eq!(answer(app.get("/v1/tasks")).await.1, json!([]));
    assert!(app.events("*").await.is_empty());

    let id = app.task("t", json!({"draft": true})).await;
    for (change, status) in [
        (json!({"description": ""}), 400),
        (json!({"assignTo": "ghost"}), 400),
        (json!({"status": "active"}), 400),
        (json!({"maxRetries": 101}), 400),
        (json!({"retries": 4_294_967_295_u32}), 400),
        (json!({"assignTo": "x".repeat(201)}), 400),
        (
            json!({"expectations": [{"type": "llm_review", "criteria": "x".repeat(33_000)}]}),
            400,
        ),
        (json!({"expectations": [{"type": "vibes"}]}), 400),
        (json!({"retryPolicy": {"fallbackAgent": "ghost"}}), 400),
        (json!({"retryPolicy": {"escalateModel": "nope:nope"}}), 400),
        (json!({"status": "done"}), 409),
        (json!({"status": "in_progress"}), 409),
        (json!({"status": "review"}), 409),
    ] {
        let (given, body) = answer(app.patch(&format!("/v1/tasks/{id}"), change.clone())).await;
        assert_eq!(given, status, "{change}: {body}");
    }
    for deed in ["kill", "force-fail"] {
        let reason = json!({"reason": "x".repeat(2_001)});
        let path = format!("/v1/tasks/{id}/{deed}");
        assert_eq!(answer(app.post(&path, reason)).await.0, 400, "{deed}");
    }
    let untouched = app.read(&id).await;
    assert_eq!(
        (&untouched["status"], &untouched["description"]),
        (&json!("draft"), &json!("Do t"))
    );
}

#[tokio::test]
async fn an_unknown_task_is_404_everywhere_and_a_wrong_state_409() {
    let app = start().await;
    let unknown = "task_01a20e9a7fa5709989a9da919772fa8a";
    for id in [unknown, "x"] {
        for (method, deed) in [
            (Method::GET, ""),
            (Method::PATCH, ""),
            (Method::DELETE, ""),
            (Method::GET, "/activity"),
            (Method::POST, "/run"),
            (Method::POST, "/execute"),
            (Method::POST, "/pause"),
            (Method::POST, "/kill"),
            (Method::POST, "/retry"),
            (Method::POST, "/reassess"),
            (Method::POST, "/queue"),
            (Method::POST, "/force-fail"),
        ] {
            let (status, body) = answer(
                app.request(method.clone(), &format!("/v1/tasks/{id}{deed}"))
                    .json(&json!({})),
            )
            .await;
            assert_eq!(
                (status.as_u16(), &body["code"]),
                (404, &json!("not_found")),
                "{method} {deed}"
            );
        }
    }
    app.upstream.will_say("Done.");
    let done = app.task("done", json!({})).await;
    app.until(&done, "done").await;
    let draft = app.task("draft", json!({"draft": true})).await;
    for (id, deed, status) in [
        (&done, "run", 409),
        (&done, "pause", 409),
        (&done, "retry", 409),
        (&done, "queue", 409),
        (&done, "reassess", 400),
        (&done, "kill", 200),
        (&done, "force-fail", 200),
        (&draft, "pause", 409),
        (&draft, "retry", 409),
        (&draft, "reassess", 409),
    ] {
        let (given, body) = answer(app.post(&format!("/v1/tasks/{id}/{deed}"), json!({}))).await;
        assert_eq!(given, status, "{deed}: {body}");
    }
    assert_eq!(app.read(&done).await["status"], "done");
}

#[tokio::test]
async fn a_title_is_taken_until_its_task_has_ended() {
    let app = start().await;
    let first = app.task("same", json!({"draft": true})).await;
    let again = json!({"title": "same", "description": "d", "assignTo": "noor"});
    let (status, body) = answer(app.post("/v1/tasks", again)).await;
    assert_eq!((status.as_u16(), &body["code"]), (409, &json!("conflict")));
    answer(app.post(
        &format!("/v1/tasks/{first}/kill"),
        json!({"reason": "not needed"}),
    ))
    .await;
    let killed = app.until(&first, "failed").await;
    assert_eq!(
        (&killed["result"]["reason"], &killed["result"]["stderr"]),
        (&json!("killed"), &json!("Killed: not needed"))
    );
    app.task("same", json!({"draft": true})).await;
    // The first cannot come back while the second is there.
    assert_eq!(
        answer(app.post(&format!("/v1/tasks/{first}/retry"), json!({})))
            .await
            .0,
        409
    );
}

#[tokio::test]
async fn tasks_are_listed_filtered_paged_and_deleted() {
    let app = start().await;
    let mut ids = Vec::new();
    for number in 0..5 {
        let group = if number < 3 { "one" } else { "two" };
        ids.push(
            app.task(
                &format!("t{number}"),
                json!({"draft": true, "group": group}),
            )
            .await,
        );
    }
    answer(app.post(&format!("/v1/tasks/{}/kill", ids[0]), json!({}))).await;
    let listed = async |query: &str| -> Vec<String> {
        let body = answer(app.get(&format!("/v1/tasks{query}"))).await.1;
        body.as_array()
            .unwrap()
            .iter()
            .map(|task| task["id"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(listed("").await, ids);
    assert_eq!(listed("?group=one").await, ids[..3]);
    assert_eq!(listed("?group=one&status=draft").await, ids[1..3]);
    assert_eq!(listed("?status=failed").await, ids[..1]);
    assert!(listed("?assignTo=nobody").await.is_empty());
    assert_eq!(answer(app.get("/v1/tasks?status=active")).await.0, 400);
    let page = app.get("/v1/tasks?limit=2&group=one").send().await.unwrap();
    let link = page.headers()["link"].to_str().unwrap().to_owned();
    assert_eq!(
        link,
        format!(
            "</v1/tasks?group=one&limit=2&after={}>; rel=\"next\"",
            ids[1]
        )
    );
    assert_eq!(
        listed(&format!("?limit=2&group=one&after={}", ids[1])).await,
        ids[2..3]
    );

    for refused in ["", "?all=true&status=draft", "?all=true&assignTo=noor"] {
        let deletion = app.delete(&format!("/v1/tasks{refused}"));
        assert_eq!(answer(deletion).await.0, 400, "{refused}");
    }
    assert_eq!(
        answer(app.delete("/v1/tasks?status=draft&assignTo=nobody"))
            .await
            .1,
        json!({"deleted": 0})
    );
    assert_eq!(
        answer(app.delete("/v1/tasks?group=one&status=draft"))
            .await
            .1,
        json!({"deleted": 2})
    );
    assert_eq!(
        answer(app.delete(&format!("/v1/tasks/{}", ids[0]))).await.1,
        json!({"removed": true})
    );
    assert_eq!(
        answer(app.delete("/v1/tasks?all=true")).await.1,
        json!({"deleted": 2})
    );
    assert!(listed("").await.is_empty());
    assert_eq!(names(&app, "task:removed").await.len(), 5);
}

#[tokio::test]
async fn an_agent_uses_its_tools_and_hands_over_outcomes() {
    let app = start().await;
    app.upstream.answers(|request| match results(request) {
        0 => Reply::Stream(called(&[
            ("c1", "memory_save", &[r#"{"content":"seen"}"#]),
            (
                "c2",
                "register_outcome",
                &[r#"{"type":"text","label":"Notes","text":"abc"}"#],
            ),
        ])),
        2 => Reply::Stream(called(&[(
            "c3",
            "http_fetch",
            &[r#"{"url":"http://127.0.0.1/"}"#],
        )])),
        _ => Reply::Stream(said("All done.")),
    });
    let id = app
        .task(
            "tools",
            json!({"expectedOutcomes": [{"type": "text", "label": "Notes"}]}),
        )
        .await;
    let task = app.until(&id, "done").await;
    let outcome = &task["outcomes"][0];
    assert_eq!(
        (&outcome["label"], &outcome["text"], &outcome["producedBy"]),
        (&json!("Notes"), &json!("abc"), &json!("register_outcome"))
    );
    assert!(outcome["id"].is_string() && outcome["producedAt"].is_string());
    assert_eq!(
        answer(app.get("/v1/memory/agent/noor")).await.1["content"],
        "seen"
    );
    let asked = app.upstream.asked();
    assert_eq!(asked.len(), 3);
    // What it may not use is answered as an error, and it goes on.
    assert!(last_text(&asked[2], "tool").contains("no tool `http_fetch`"));
    let activity = answer(app.get(&format!("/v1/tasks/{id}/activity"))).await.1;
    let entries: Vec<&str> = activity["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["event"].as_str().unwrap())
        .collect();
    assert_eq!(
        entries,
        [
            "assistant",
            "tool",
            "tool",
            "assistant",
            "tool",
            "assistant"
        ]
    );
    assert_eq!(activity["entries"][4]["data"]["state"], "error");
    assert_eq!(names(&app, "agent:activity").await.len(), 3);
    transcript_reads_like_a_session(&app, &task, &activity).await;
}

async fn transcript_reads_like_a_session(app: &TestApp, task: &Value, activity: &Value) {
    let session = &task["sessionId"];
    assert_eq!(activity["sessionId"], *session);
    assert_eq!(activity["sessionResolution"], "explicit");
    assert_eq!(
        app.events("agent:finished").await[0].1["sessionId"],
        *session
    );
    let path = format!("/v1/chat/sessions/{}/messages", session.as_str().unwrap());
    let (status, all) = answer(app.get(&path)).await;
    assert_eq!(status, 200, "{all}");
    assert_eq!(all["session"]["title"], task["title"]);
    assert_eq!(all["session"]["agent"], "noor");
    assert_eq!(all["session"]["metadata"]["taskId"], task["id"]);
    let messages = all["messages"].as_array().unwrap();
    let roles: Vec<&str> = messages
        .iter()
        .map(|message| message["role"].as_str().unwrap())
        .collect();
    assert_eq!(roles, ["user", "assistant", "assistant", "assistant"]);
    assert_eq!(messages[0]["content"], task["description"]);
    assert_eq!(messages[1]["toolCalls"].as_array().unwrap().len(), 2);
    assert!(messages[1]["toolCalls"][0]["result"].is_string());
    assert_eq!(messages[1]["toolCalls"][0]["state"], "completed");
    assert_eq!(messages[2]["toolCalls"][0]["state"], "error");
    let last = messages[3]["id"].as_str().unwrap();
    let (_, before) = answer(app.get(&format!("{path}?before={last}&limit=2"))).await;
    assert_eq!(before["messages"], json!([messages[2]]));
    let stranger = app
        .client
        .get(format!("{}{path}", app.url))
        .bearer_auth(&app.test);
    assert_eq!(answer(stranger).await.0, 404);
    // It is not among the chats.
    let (_, chats) = answer(app.get("/v1/chat/sessions")).await;
    assert_eq!(chats["sessions"], json!([]));
}

#[tokio::test]
async fn a_required_outcome_that_is_missing_is_asked_for_again() {
    let app = start().await;
    app.upstream.answers(|request| {
        let told = last_text(request, "user").contains("\"Notes\" (`text`).");
        if told && results(request) == 0 {
            Reply::Stream(called(&[(
                "c1",
                "register_outcome",
                &[r#"{"type":"text","label":"Notes","text":"abc"}"#],
            )]))
        } else {
            Reply::Stream(said("Here."))
        }
    });
    let id = app
        .task(
            "notes",
            json!({"expectedOutcomes": [{"type": "text", "label": "Notes"}]}),
        )
        .await;
    let task = app.until(&id, "done").await;
    assert_eq!(
        (&task["fixAttempts"], &task["retries"]),
        (&json!(1), &json!(0))
    );
    assert_eq!(names(&app, "task:fix").await.len(), 1);
}

#[tokio::test]
async fn the_words_of_a_run_are_streamed_as_they_come_to_every_listener_of_every_process() {
    let app = start().await;
    let elsewhere = app.another_process().await;
    let go_on = Arc::new(Notify::new());
    let mut before = vec![chunk(
        &json!({"role": "assistant", "content": "Good "}),
        None,
    )];
    before.push(chunk(&json!({"content": "morning"}), None));
    let mut after = vec![chunk(&json!({"content": " all"}), None)];
    after.extend(ending("stop"));
    app.upstream
        .will(Reply::Pause(before, go_on.clone(), after));
    let id = app.task("talk", json!({"draft": true})).await;
    let listen = async |url: &str, deed: &str| {
        let request = app
            .client
            .post(format!("{url}/v1/tasks/{id}/{deed}"))
            .bearer_auth(&app.live)
            .json(&json!({"stream": true}));
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(
            response.headers()["content-type"]
                .to_str()
                .unwrap()
                .starts_with("text/event-stream")
        );
        let mut body = response.bytes_stream();
        let mut text = String::new();
        while !text.contains("morning") {
            text += std::str::from_utf8(&body.next().await.unwrap().unwrap()).unwrap();
        }
        (text, body)
    };
    // The model is still speaking: a listener here, one in another process, and one that leaves.
    let (mut here, mut rest_here) = listen(&app.url, "run").await;
    let (mut there, mut rest_there) = listen(&elsewhere, "execute").await;
    drop(listen(&app.url, "run").await);
    assert_eq!(app.read(&id).await["status"], "in_progress");
    go_on.notify_waiters();
    while let Some(piece) = rest_here.next().await {
        here += std::str::from_utf8(&piece.unwrap()).unwrap();
    }
    while let Some(piece) = rest_there.next().await {
        there += std::str::from_utf8(&piece.unwrap()).unwrap();
    }
    for text in [here, there] {
        let frames = frames(&text);
        assert_eq!(spoken(&frames), "Good morning all");
        let last = frames.last().unwrap();
        assert_eq!(
            (
                &last["choices"][0]["finish_reason"],
                &last["task"]["status"]
            ),
            (&json!("stop"), &json!("done"))
        );
        for frame in &frames {
            assert_eq!(
                (&frame["object"], &frame["task"]["id"]),
                (&json!("chat.completion.chunk"), &json!(id))
            );
        }
    }
    assert_eq!(app.read(&id).await["status"], "done");
    assert_eq!(app.upstream.asked().len(), 1);
}

#[tokio::test]
async fn killing_pausing_and_deleting_stop_the_model_and_nothing_of_it_counts() {
    let app = start().await;
    let speaking = || Reply::Hang(vec![chunk(&json!({"content": "so far"}), None)]);
    for deed in ["kill", "force-fail", "pause", "delete"] {
        app.upstream.will(speaking());
        let asked = app.upstream.asked().len();
        let id = app.task(deed, json!({})).await;
        eventually("the model is asked", async || {
            app.upstream.asked().len() > asked
        })
        .await;
        let (status, _) = if deed == "delete" {
            answer(app.delete(&format!("/v1/tasks/{id}"))).await
        } else {
            answer(app.post(&format!("/v1/tasks/{id}/{deed}"), json!({}))).await
        };
        assert_eq!(status, 200, "{deed}");
        eventually("the model is left", async || app.upstream.was_left()).await;
        if deed == "pause" {
            let paused = app.read(&id).await;
            assert_eq!(
                (&paused["status"], &paused["held"]),
                (&json!("pending"), &json!(true))
            );
            app.upstream.will_say("Now.");
            let (status, _) = answer(app.post(&format!("/v1/tasks/{id}/run"), json!({}))).await;
            assert_eq!(status, 200);
            assert_eq!(app.until(&id, "done").await["result"]["stdout"], "Now.");
        } else if deed != "delete" {
            let failed = app.read(&id).await;
            assert_eq!(
                (
                    &failed["status"],
                    &failed["result"]["reason"],
                    &failed["retries"]
                ),
                (&json!("failed"), &json!("killed"), &json!(0))
            );
        }
    }
}

#[tokio::test]
async fn a_paused_task_goes_on_from_its_last_step() {
    let app = start().await;
    app.upstream
        .will(Reply::Stream(called(&[("c1", "memory_get", &["{}"])])));
    app.upstream.will(Reply::Hang(vec![]));
    let id = app.task("long", json!({})).await;
    eventually("it is asked again", async || {
        app.upstream.asked().len() == 2
    })
    .await;
    answer(app.post(&format!("/v1/tasks/{id}/pause"), json!({}))).await;
    eventually("the model is left", async || app.upstream.was_left()).await;
    app.upstream.will_say("Finished.");
    answer(app.post(&format!("/v1/tasks/{id}/run"), json!({}))).await;
    app.until(&id, "done").await;
    let asked = app.upstream.asked();
    assert_eq!((asked.len(), results(&asked[2])), (3, 1));
}

#[tokio::test]
async fn a_provider_that_asks_for_a_rest_gets_it_before_the_next_attempt() {
    let app = start().await;
    let wait = vec![("retry-after", "1800")];
    app.upstream.will(Reply::Plain(429, wait, String::new()));
    let id = app.task("t", json!({"maxRetries": 1})).await;
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    eventually("it rests", async || {
        let resting = "select exists (select from production.jobs
            where kind = 'task' and due_at > clock_timestamp() + interval '1700 s')";
        sqlx::query_scalar(resting)
            .fetch_one(&mut database)
            .await
            .unwrap()
    })
    .await;
    let task = app.read(&id).await;
    assert_eq!(
        (&task["status"], &task["retries"]),
        (&json!("pending"), &json!(1))
    );
}

#[tokio::test]
async fn the_last_chunk_of_a_task_says_how_it_ended() {
    let app = start().await;
    app.upstream
        .answers(|_| Reply::Plain(400, vec![], "{}".to_owned()));
    let id = app.task("t", json!({"draft": true, "maxRetries": 0})).await;
    let run = app.post(&format!("/v1/tasks/{id}/run"), json!({"stream": true}));
    let text = run.send().await.unwrap().text().await.unwrap();
    let last = frames(&text).pop().unwrap();
    assert_eq!(
        (&last["task"]["status"], &last["task"]["reason"]),
        (&json!("failed"), &json!("error"))
    );
    assert!(last["task"]["cause"].is_string(), "{last}");
}

#[tokio::test]
async fn a_run_that_is_stopped_tells_its_end_and_how_long_it_took() {
    let app = start().await;
    app.upstream.answers(|_| Reply::Hang(vec![]));
    let id = app.task("long", json!({})).await;
    eventually("it is asked", async || app.upstream.asked().len() == 1).await;
    answer(app.post(&format!("/v1/tasks/{id}/kill"), json!({}))).await;
    let task = app.read(&id).await;
    for name in ["agent:completed", "agent:finished"] {
        let told = app.events(name).await;
        assert_eq!(told.len(), 1, "{name}");
        assert_eq!(
            (
                &told[0].1["exitCode"],
                &told[0].1["reason"],
                &told[0].1["duration"]
            ),
            (&json!(1), &json!("killed"), &task["result"]["duration"])
        );
    }
    assert!(task["result"]["duration"].as_i64().unwrap() > 0, "{task}");
}

#[tokio::test]
async fn a_task_that_expects_outcomes_can_hand_them_over_whatever_its_agent_may_use() {
    let app = start().await;
    let allowed = json!({"allowedTools": ["http_fetch"]});
    answer(app.patch("/v1/agents/noor", allowed)).await;
    app.upstream.will(Reply::Stream(called(&[(
        "c1",
        "register_outcome",
        &[r#"{"type":"text","label":"Notes","text":"abc"}"#],
    )])));
    app.upstream.will_say("Done.");
    let expected = json!({"expectedOutcomes": [{"type": "text", "label": "Notes"}]});
    let id = app.task("t", expected).await;
    app.until(&id, "done").await;
    let tools = app.upstream.asked()[0]["tools"].clone();
    let names: Vec<&str> = tools
        .as_array()
        .unwrap()
        .iter()
        .map(|tool| tool["function"]["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["http_fetch", "register_outcome"]);
}

#[tokio::test]
async fn the_words_of_all_turns_are_streamed_once_each() {
    let app = start().await;
    let turn = |words: [&str; 2], call: &str| {
        let before = vec![chunk(
            &json!({"role": "assistant", "content": words[0]}),
            None,
        )];
        let mut after = vec![chunk(&json!({"content": words[1]}), None)];
        if call.is_empty() {
            after.extend(ending("stop"));
        } else {
            after.extend(called(&[(call, "memory_get", &["{}"])]));
        }
        (before, after)
    };
    let go_on = Arc::new(Notify::new());
    for (words, call) in [
        (["pre ", "x"], "c1"),
        (["mid ", "y"], "c2"),
        (["end ", "z"], ""),
    ] {
        let (before, after) = turn(words, call);
        app.upstream
            .will(Reply::Pause(before, go_on.clone(), after));
    }
    let id = app.task("talk", json!({"draft": true})).await;
    let run = app.post(&format!("/v1/tasks/{id}/run"), json!({"stream": true}));
    let mut body = run.send().await.unwrap().bytes_stream();
    let mut text = String::new();
    for shown in ["pre ", "mid ", "end "] {
        while !text.contains(shown) {
            text += std::str::from_utf8(&body.next().await.unwrap().unwrap()).unwrap();
        }
        go_on.notify_waiters();
    }
    while let Some(piece) = body.next().await {
        text += std::str::from_utf8(&piece.unwrap()).unwrap();
    }
    assert_eq!(spoken(&frames(&text)), "pre x\n\nmid y\n\nend z");
}

#[tokio::test]
async fn a_paused_run_that_is_not_gone_on_with_has_ended() {
    let app = start().await;
    app.agent("ada").await;
    app.upstream.answers(|_| Reply::Hang(vec![]));
    for deed in ["kill", "give"] {
        let id = app.task(deed, json!({})).await;
        app.until(&id, "in_progress").await;
        answer(app.post(&format!("/v1/tasks/{id}/pause"), json!({}))).await;
        let paused = answer(app.get(&format!("/v1/tasks/{id}/activity"))).await.1;
        assert_eq!(paused["run"]["status"], "running");
        if deed == "kill" {
            answer(app.post(&format!("/v1/tasks/{id}/kill"), json!({}))).await;
        } else {
            answer(app.patch(&format!("/v1/tasks/{id}"), json!({"assignTo": "ada"}))).await;
        }
        let run = paused["run"]["id"].as_str().unwrap();
        let mut database = PgConnection::connect(&app.database_url).await.unwrap();
        let status: String = sqlx::query_scalar("select status from production.runs where id = $1")
            .bind(
                run.parse::<polpo::ids::Id<polpo::ids::Run>>()
                    .unwrap()
                    .uuid(),
            )
            .fetch_one(&mut database)
            .await
            .unwrap();
        assert_eq!(status, "interrupted", "{deed}");
    }
}

#[tokio::test]
async fn what_postgres_cannot_store_costs_no_work() {
    let app = start().await;
    let arguments = r#"{"type":"text","label":"a\u0000b","text":"c\u0000d"}"#;
    app.upstream.will(Reply::Stream(called(&[(
        "c1",
        "register_outcome",
        &[arguments],
    )])));
    app.upstream.will_say("nul: \0.");
    let id = app.task("nul", json!({})).await;
    let task = app.until(&id, "done").await;
    assert_eq!(task["result"]["stdout"], "nul: \u{fffd}.");
    assert_eq!(task["outcomes"][0]["label"], "a\u{fffd}b");
}

#[tokio::test]
async fn people_and_the_engine_do_not_wait_for_each_other_in_a_circle() {
    let app = start().await;
    app.upstream
        .answers(|_| Reply::Slow(Duration::from_millis(3), said("Done.")));
    let mut ids = Vec::new();
    for number in 0..60 {
        ids.push(app.task(&format!("t{number}"), json!({})).await);
    }
    // Whatever the engine is doing to a task at the moment, each deed is done at once.
    let deeds = ids.iter().enumerate().map(|(number, id)| {
        let deed = ["kill", "pause", "force-fail"][number % 3];
        answer(app.post(&format!("/v1/tasks/{id}/{deed}"), json!({})))
    });
    for (status, body) in futures::future::join_all(deeds).await {
        assert!(status == 200 || status == 409, "{status}: {body}");
    }
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let count = "select deadlocks from pg_stat_database where datname = current_database()";
    // Postgres gives its counts out a moment later.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let circles: i64 = sqlx::query_scalar(count)
        .fetch_one(&mut database)
        .await
        .unwrap();
    assert_eq!(circles, 0);
}

#[tokio::test]
async fn a_failing_provider_is_tried_again_and_its_cause_is_told() {
    let app = start().await;
    let refusal = || {
        Reply::Plain(
            400,
            vec![],
            json!({"error": {"message": "no such model"}}).to_string(),
        )
    };
    app.upstream.answers(move |_| refusal());
    let id = app.task("hopeless", json!({"maxRetries": 2})).await;
    let task = app.until(&id, "failed").await;
    assert_eq!(task["retries"], 2);
    assert_eq!(
        (&task["result"]["reason"], &task["result"]["exitCode"]),
        (&json!("error"), &json!(1))
    );
    assert!(
        task["result"]["cause"]
            .as_str()
            .unwrap()
            .contains("no such model"),
        "{task}"
    );
    let retries: Vec<Value> = app
        .events("task:retry")
        .await
        .into_iter()
        .map(|(_, payload)| payload["attempt"].clone())
        .collect();
    assert_eq!(retries, [json!(1), json!(2)]);
    assert_eq!(names(&app, "task:maxRetries").await.len(), 1);
    // Between two attempts it is pending; it fails once.
    assert_eq!(
        way(&app, &id)
            .await
            .iter()
            .filter(|to| *to == "failed")
            .count(),
        1
    );
    app.upstream.will_say("Better.");
    assert_eq!(
        answer(app.post(&format!("/v1/tasks/{id}/retry"), json!({})))
            .await
            .1,
        json!({"retried": true})
    );
    assert_eq!(app.until(&id, "done").await["retries"], 3);
}

#[tokio::test]
async fn a_task_without_an_agent_or_a_model_fails_at_once() {
    let app = start().await;
    let (status, body) =
        answer(app.post("/v1/agents", json!({"name": "poor", "model": "groq:llama"}))).await;
    assert_eq!(status, 201, "{body}");
    let task = json!({"title": "t", "description": "d", "assignTo": "poor"});
    let id = answer(app.post("/v1/tasks", task)).await.1["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let failed = app.until(&id, "failed").await;
    assert!(
        failed["result"]["cause"]
            .as_str()
            .unwrap()
            .contains("no key for groq"),
        "{failed}"
    );
    assert_eq!(failed["retries"], 0);
    // An agent with unfinished tasks stays.
    let draft = app.task("waits", json!({"draft": true})).await;
    let (status, body) = answer(app.delete("/v1/agents/noor")).await;
    assert_eq!(status, 409, "{body}");
    answer(app.delete(&format!("/v1/tasks/{draft}"))).await;
    assert_eq!(answer(app.delete("/v1/agents/noor")).await.0, 200);
}

#[tokio::test]
async fn a_limit_is_never_a_silent_done() {
    let app = start().await;
    answer(app.patch("/v1/agents/noor", json!({"maxTurns": 3}))).await;
    let call = || Reply::Stream(called(&[("c", "memory_get", &["{}"])]));
    app.upstream.answers(move |_| call());
    let id = app.task("endless", json!({"maxRetries": 0})).await;
    assert_eq!(
        app.until(&id, "failed").await["result"]["reason"],
        "max_turns"
    );
    assert_eq!(app.upstream.asked().len(), 3);

    app.upstream.will(Reply::Hang(vec![chunk(
        &json!({"content": "so far"}),
        None,
    )]));
    let id = app
        .task("slow", json!({"maxRetries": 0, "maxDuration": 100}))
        .await;
    assert_eq!(
        app.until(&id, "failed").await["result"]["reason"],
        "timeout"
    );
    let (_, told) = app.events("task:timeout").await.pop().unwrap();
    assert_eq!(told["timeout"], 100);

    let mut cut = vec![chunk(&json!({"content": "half an ans"}), None)];
    cut.extend(ending("length"));
    app.upstream.will(Reply::Stream(cut));
    let id = app.task("long", json!({"maxRetries": 0})).await;
    let failed = app.until(&id, "failed").await;
    assert_eq!(
        (&failed["result"]["reason"], &failed["result"]["stdout"]),
        (&json!("error"), &json!("half an ans"))
    );
}

#[tokio::test]
async fn a_silent_run_is_warned_of_and_then_stopped() {
    let app = start().await;
    answer(app.patch("/v1/config", json!({"staleThreshold": 100}))).await;
    app.upstream.will(Reply::Hang(vec![]));
    let id = app.task("silent", json!({"maxRetries": 0})).await;
    app.until(&id, "failed").await;
    let actions: Vec<Value> = app
        .events("agent:stale")
        .await
        .into_iter()
        .map(|(_, payload)| payload["action"].clone())
        .collect();
    assert_eq!(actions, [json!("warning"), json!("killed")]);
    let (_, told) = app.events("task:timeout").await.pop().unwrap();
    assert_eq!(told["timeout"], 200);
}

#[tokio::test]
async fn an_escalated_attempt_goes_to_another_agent_with_another_model() {
    let app = start().await;
    app.agent("boss").await;
    answer(app.patch("/v1/agents/noor", json!({"reportsTo": "boss"}))).await;
    app.upstream.answers(|request| {
        if request["model"] == "better" {
            Reply::Stream(said("Solved."))
        } else {
            Reply::Plain(400, vec![], "{}".to_owned())
        }
    });
    let policy = json!({"escalateAfter": 2, "escalateModel": "openai:better"});
    let id = app.task("hard", json!({"retryPolicy": policy})).await;
    let task = app.until(&id, "done").await;
    assert_eq!(
        (&task["assignTo"], &task["retries"]),
        (&json!("boss"), &json!(2))
    );
}

#[tokio::test]
async fn work_on_the_outside_world_waits_for_a_yes_and_is_never_repeated_by_itself() {
    let app = start().await;
    app.upstream.will_say("Published.");
    let id = app.task("publish", json!({"sideEffects": true})).await;
    app.until(&id, "awaiting_approval").await;
    let request = answer(app.get(&format!("/v1/approvals?taskId={id}")))
        .await
        .1[0]
        .clone();
    assert_eq!(
        (&request["gateId"], &request["status"]),
        (&json!("side-effects"), &json!("pending"))
    );
    let approve = format!("/v1/approvals/{}/approve", request["id"].as_str().unwrap());
    assert_eq!(answer(app.post(&approve, json!({}))).await.0, 200);
    assert_eq!(
        app.until(&id, "done").await["result"]["stdout"],
        "Published."
    );

    app.upstream
        .will(Reply::Plain(400, vec![], "{}".to_owned()));
    let id = app.task("again", json!({"sideEffects": true})).await;
    let task = app.until(&id, "awaiting_approval").await;
    assert_eq!(task["retries"], 0);
    assert!(
        task["description"]
            .as_str()
            .unwrap()
            .contains("Do not repeat"),
        "{task}"
    );
    assert_eq!(task["originalDescription"], "Do again");
    assert_eq!(names(&app, "task:retry:blocked").await.len(), 1);
    // A yes to a blocked retry is another attempt.
    app.upstream.will_say("Published now.");
    let request = answer(app.get(&format!("/v1/approvals?taskId={id}")))
        .await
        .1[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    answer(app.post(&format!("/v1/approvals/{request}/approve"), json!({}))).await;
    eventually("it waits again", async || {
        app.read(&id).await["result"]["stdout"] == "Published now."
    })
    .await;
    assert_eq!(app.read(&id).await["status"], "awaiting_approval");
}

#[tokio::test]
async fn an_agent_that_asks_instead_of_working_is_answered() {
    let app = start().await;
    answer(app.patch("/v1/config", json!({"orchestratorModel": "openai:decider"}))).await;
    app.upstream.answers(|request| {
        if request["model"] == "decider" {
            let asked = last_text(request, "user").contains("<text>\nWhich colour?");
            Reply::Stream(said(
                &json!({"question": asked, "answer": "Blue."}).to_string(),
            ))
        } else if last_text(request, "user").contains("Blue.") {
            Reply::Stream(said("It is blue. Nice, isn't it?"))
        } else {
            Reply::Stream(said("Which colour?"))
        }
    });
    let id = app.task("paint", json!({})).await;
    let task = app.until(&id, "done").await;
    assert_eq!(
        (
            &task["questionRounds"],
            &task["retries"],
            &task["originalDescription"]
        ),
        (&json!(1), &json!(0), &json!("Do paint"))
    );
    let (_, told) = app.events("task:answered").await.pop().unwrap();
    assert_eq!(
        (&told["question"], &told["answer"]),
        (&json!("Which colour?"), &json!("Blue."))
    );
    assert_eq!(names(&app, "task:question").await.len(), 1);
}

#[tokio::test]
async fn a_project_escalates_to_a_rewriter_to_another_agent_and_to_a_person() {
    let app = start().await;
    app.agent("boss").await;
    let levels = json!([
        {"level": 1, "handler": "agent", "target": "boss"},
        {"level": 2, "handler": "orchestrator"},
        {"level": 3, "handler": "agent", "target": "boss"},
        {"level": 4, "handler": "human"},
    ]);
    let settings = json!({"escalationPolicy": {"name": "p", "levels": levels}, "orchestratorModel": "openai:decider"});
    assert_eq!(answer(app.patch("/v1/config", settings)).await.0, 200);
    app.upstream.answers(|request| {
        if request["model"] == "decider" {
            Reply::Stream(said(
                &json!({"description": "Do it again, but slowly this time."}).to_string(),
            ))
        } else {
            Reply::Plain(400, vec![], "{}".to_owned())
        }
    });
    let id = app.task("hard", json!({"maxRetries": 0})).await;
    let task = app.until(&id, "awaiting_approval").await;
    assert!(
        task["description"]
            .as_str()
            .unwrap()
            .starts_with("[Escalation: Reformulated by orchestrator]"),
        "{task}"
    );
    assert_eq!(task["assignTo"], "boss");
    let reached: Vec<Value> = app
        .events("escalation:triggered")
        .await
        .into_iter()
        .map(|(_, payload)| payload["level"].clone())
        .collect();
    assert_eq!(reached, [json!(2), json!(3), json!(4)]);
    assert_eq!(names(&app, "escalation:human").await.len(), 1);
    let request = answer(app.get(&format!("/v1/approvals?taskId={id}")))
        .await
        .1[0]
        .clone();
    assert_eq!(request["gateId"], "escalation");
    app.upstream.will_say("With help.");
    answer(app.post(
        &format!("/v1/approvals/{}/approve", request["id"].as_str().unwrap()),
        json!({}),
    ))
    .await;
    app.until(&id, "done").await;
}

#[tokio::test]
async fn a_conversation_that_outgrows_the_model_is_shortened_visibly() {
    let app = start().await;
    answer(app.patch("/v1/agents/noor", json!({"contextWindow": 4000}))).await;
    answer(
        app.request(Method::PUT, "/v1/memory/agent/noor")
            .json(&json!({"content": "x".repeat(2000)})),
    )
    .await;
    app.upstream.answers(|request| {
        if last_text(request, "system").contains("keep the memory of an agent") {
            Reply::Stream(said("It read its memory often."))
        } else if results(request) < 8 && !request.to_string().contains("was summarized") {
            Reply::Stream(called(&[("c", "memory_get", &["{}"])]))
        } else {
            Reply::Stream(said("Read."))
        }
    });
    let id = app.task("read", json!({})).await;
    app.until(&id, "done").await;
    let activity = answer(app.get(&format!("/v1/tasks/{id}/activity"))).await.1;
    let compactions: Vec<&Value> = activity["entries"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|entry| entry["event"] == "compaction")
        .collect();
    assert!(!compactions.is_empty(), "{activity}");
    for compaction in compactions {
        let (before, after) = (
            compaction["data"]["tokensBefore"].as_u64().unwrap(),
            compaction["data"]["tokensAfter"].as_u64().unwrap(),
        );
        assert!(after < before, "{compaction}");
    }
    assert!(
        app.upstream
            .asked()
            .iter()
            .any(|request| request.to_string().contains("taken out to save space"))
    );
}

#[tokio::test]
async fn processes_show_what_agents_are_at_and_hide_secrets() {
    let app = start().await;
    answer(app.patch("/v1/agents/noor", json!({"allowedTools": ["*"]}))).await;
    let arguments = r#"{"url":"http://127.0.0.1:9/","headers":{"Authorization":"Bearer hush"}}"#;
    app.upstream
        .will(Reply::Stream(called(&[("c", "http_fetch", &[arguments])])));
    app.upstream.will(Reply::Hang(vec![]));
    let id = app.task("fetch", json!({})).await;
    eventually("a tool was used", async || {
        answer(app.get("/v1/agents/processes")).await.1[0]["activity"]["lastTool"] == "http_fetch"
    })
    .await;
    let process = answer(app.get("/v1/agents/processes")).await.1[0].clone();
    assert_eq!(
        (&process["agentName"], &process["taskId"], &process["alive"]),
        (&json!("noor"), &json!(id), &json!(true))
    );
    let entries = answer(app.get(&format!("/v1/agents/processes/{id}/activity")))
        .await
        .1
        .to_string();
    assert!(
        entries.contains("REDACTED") && !entries.contains("hush"),
        "{entries}"
    );
    answer(app.post(&format!("/v1/tasks/{id}/kill"), json!({}))).await;
    assert_eq!(answer(app.get("/v1/agents/processes")).await.1, json!([]));
}

#[tokio::test]
async fn an_agent_that_is_named_by_its_id_is_the_same_agent() {
    let app = start().await;
    app.agent("boss").await;
    let id_of = async |name: &str| {
        let agent = answer(app.get(&format!("/v1/agents/{name}"))).await.1;
        agent["id"].as_str().unwrap().to_owned()
    };
    let (noor, boss) = (id_of("noor").await, id_of("boss").await);
    let task = app
        .task("t", json!({"assignTo": noor, "draft": true}))
        .await;
    assert_eq!(app.read(&task).await["assignTo"], "noor");
    for agent in ["noor", noor.as_str()] {
        let listed = answer(app.get(&format!("/v1/tasks?assignTo={agent}")))
            .await
            .1;
        assert_eq!(listed.as_array().unwrap().len(), 1, "{agent}");
    }
    let path = format!("/v1/tasks/{task}");
    let (_, changed) = answer(app.patch(&path, json!({"assignTo": boss}))).await;
    assert_eq!(changed["assignTo"], "boss");
    // Who has unfinished tasks is told by the same name.
    assert_eq!(answer(app.delete("/v1/agents/boss")).await.0, 409);
    let policy = json!({"escalateAfter": 1, "fallbackAgent": boss});
    app.upstream
        .will(Reply::Plain(400, vec![], "{}".to_owned()));
    app.upstream.will_say("Done.");
    let retried = app.task("retried", json!({"retryPolicy": policy})).await;
    assert_eq!(app.until(&retried, "done").await["assignTo"], "boss");
}

#[tokio::test]
async fn what_was_finished_and_is_not_good_does_not_look_like_a_success() {
    let app = start().await;
    answer(app.patch("/v1/config", json!({"maxFixAttempts": 0}))).await;
    app.upstream.will_say("Here.");
    let outcomes = json!([{"type": "text", "label": "Notes"}]);
    let id = app
        .task("t", json!({"maxRetries": 0, "expectedOutcomes": outcomes}))
        .await;
    let result = app.until(&id, "failed").await["result"].clone();
    assert_eq!(
        (&result["reason"], &result["exitCode"], &result["stdout"]),
        (&json!("error"), &json!(0), &json!("Here."))
    );
    for member in ["stderr", "cause"] {
        let said = result[member].as_str().unwrap();
        assert!(said.contains("\"Notes\""), "{result}");
    }
}

#[tokio::test]
async fn a_task_that_the_engine_fails_at_again_and_again_ends_and_says_so() {
    let app = start().await;
    app.upstream
        .will(Reply::Stream(called(&[("c1", "memory_get", &["{}"])])));
    app.upstream.will(Reply::Hang(vec![]));
    let id = app.task("long", json!({})).await;
    eventually("it is asked again", async || {
        app.upstream.asked().len() == 2
    })
    .await;
    answer(app.post(&format!("/v1/tasks/{id}/pause"), json!({}))).await;
    // What nothing of ours writes, and nothing of ours can read.
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    sqlx::raw_sql("update production.steps set body = '{}' where kind = 'model'")
        .execute(&mut database)
        .await
        .unwrap();
    answer(app.post(&format!("/v1/tasks/{id}/run"), json!({}))).await;
    let failed = app.until(&id, "failed").await;
    assert_eq!(failed["result"]["reason"], "error");
    assert!(
        failed["result"]["cause"]
            .as_str()
            .unwrap()
            .contains("5 times in a row"),
        "{failed}"
    );
    assert_eq!(app.upstream.asked().len(), 2);
}

/// What a task's stream says, followed from `run` on; the draft is made by this.
async fn streamed(app: &TestApp, title: &str, others: Value) -> (String, reqwest::Response) {
    let mut members = json!({"draft": true});
    members
        .as_object_mut()
        .unwrap()
        .extend(others.as_object().unwrap().clone());
    let id = app.task(title, members).await;
    let request = app.post(&format!("/v1/tasks/{id}/run"), json!({"stream": true}));
    (id, request.send().await.unwrap())
}

#[tokio::test]
async fn a_stream_has_the_last_words_of_a_run_that_is_mended_at_once() {
    let app = start().await;
    app.upstream.answers(|request| {
        let told = last_text(request, "user").contains("\"Notes\"");
        let arguments = r#"{"type":"text","label":"Notes","text":"abc"}"#;
        match (told, results(request)) {
            (false, _) => Reply::Stream(said("Here.")),
            (true, 0) => Reply::Stream(called(&[("c1", "register_outcome", &[arguments])])),
            (true, _) => Reply::Slow(Duration::from_millis(50), said("There.")),
        }
    });
    let outcomes = json!({"expectedOutcomes": [{"type": "text", "label": "Notes"}]});
    let (_, response) = streamed(&app, "notes", outcomes).await;
    let text = response.text().await.unwrap();
    assert!(spoken(&frames(&text)).ends_with("There."), "{text}");
}

#[tokio::test]
async fn a_task_stream_ends_when_its_key_is_revoked_and_the_task_goes_on() {
    let app = start().await;
    app.upstream.will(Reply::Hang(vec![]));
    let (id, response) = streamed(&app, "t", json!({})).await;
    app.until(&id, "in_progress").await;
    let keys = answer(app.admin(
        Method::GET,
        &format!("/v1/api-keys?projectId={}", app.project),
    ))
    .await
    .1;
    let live = |key: &&Value| key["name"] == "live";
    let key = keys.as_array().unwrap().iter().find(live).unwrap()["id"].clone();
    let path = format!("/v1/api-keys/{}", key.as_str().unwrap());
    assert!(
        answer(app.admin(Method::DELETE, &path))
            .await
            .0
            .is_success()
    );
    let text = tokio::time::timeout(Duration::from_secs(8), response.text());
    let text = text.await.expect("it goes on").unwrap();
    assert!(
        text.contains("invalid_api_key") || text.contains("API key"),
        "{text}"
    );
    assert!(!app.upstream.was_left());
}

#[tokio::test]
async fn a_killed_task_leaves_its_reviewers_at_once() {
    let app = start().await;
    app.upstream.will_say("Work.");
    app.upstream.answers(|_| Reply::Hang(vec![]));
    let expectations = json!([{"type": "llm_review", "criteria": "c"}]);
    let id = app.task("t", json!({"expectations": expectations})).await;
    eventually("reviewers are asked", async || {
        app.upstream.asked().len() == 4
    })
    .await;
    answer(app.post(&format!("/v1/tasks/{id}/kill"), json!({}))).await;
    let since = std::time::Instant::now();
    eventually("they are left", async || app.upstream.was_left()).await;
    assert!(since.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn a_server_that_stops_begins_no_review() {
    let app = start().await;
    app.upstream
        .will(Reply::Slow(Duration::from_millis(300), said("Work.")));
    app.upstream.answers(|request| scored(request, 5.0));
    let expectations = json!([{"type": "llm_review", "criteria": "c"}]);
    let id = app.task("t", json!({"expectations": expectations})).await;
    eventually("it is at work", async || app.upstream.asked().len() == 1).await;
    app.stop.cancel();
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let rests = "select count(*) from production.jobs j join production.tasks t on t.id = j.subject
        where t.status = 'review' and j.ready";
    loop {
        let count: i64 = sqlx::query_scalar(rests)
            .fetch_one(&mut database)
            .await
            .unwrap();
        if count == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(app.upstream.asked().len(), 1);
    let elsewhere = app.another_process().await;
    done_elsewhere(&app, &elsewhere, &id).await;
    assert_eq!(app.upstream.asked().len(), 4);
}

#[tokio::test]
async fn what_questions_rewrites_and_useless_reviews_used_is_recorded() {
    let app = start().await;
    let levels = json!([{"level": 1, "handler": "orchestrator"}]);
    let settings = json!({"escalationPolicy": {"levels": levels}, "orchestratorModel": "openai:decider",
        "judgeModel": "openai:judge", "maxFixAttempts": 0, "maxAssessmentRetries": 0});
    assert_eq!(answer(app.patch("/v1/config", settings)).await.0, 200);
    app.upstream.answers(|request| {
        let words = match request["model"].as_str() {
            // It is asked about the question, then to rewrite the description.
            Some("decider") => {
                r#"{"question":false,"answer":"","description":"Do it again, and better this time."}"#
            }
            Some("judge") if last_text(request, "system").contains("Is it short?") => {
                return scored(request, 1.0);
            }
            Some("judge") => "Hm.",
            _ => "Is it good?",
        };
        Reply::Stream(said(words))
    });
    let expectations = json!([
        {"type": "llm_review", "criteria": "Is it short?"},
        {"type": "llm_review", "criteria": "Is it new?"},
    ]);
    let id = app
        .task("t", json!({"maxRetries": 0, "expectations": expectations}))
        .await;
    app.until(&id, "failed").await;
    let mut database = PgConnection::connect(&app.database_url).await.unwrap();
    let recorded: Vec<(String, i64)> = sqlx::query_as(
        "select model, sum(prompt_tokens)::bigint from production.model_calls group by 1 order by 1",
    )
    .fetch_all(&mut database)
    .await
    .unwrap();
    // Each request of the upstream is 11 tokens long.
    let asked = |model: &str| {
        let asked = app.upstream.asked();
        let count = asked.iter().filter(|request| request["model"] == model);
        11 * i64::try_from(count.count()).unwrap()
    };
    assert_eq!(
        recorded,
        [
            ("openai:decider".to_owned(), asked("decider")),
            ("openai:judge".to_owned(), asked("judge")),
            ("openai:scripted".to_owned(), asked("scripted")),
        ]
    );
    assert!(asked("decider") > 0 && asked("judge") > 0);

    // What was used was used, whatever becomes of the task.
    let deleted = app.delete(&format!("/v1/tasks/{id}"));
    assert_eq!(answer(deleted).await.0, 200);
    let left: i64 =
        sqlx::query_scalar("select sum(prompt_tokens)::bigint from production.model_calls")
            .fetch_one(&mut database)
            .await
            .unwrap();
    assert_eq!(left, recorded.iter().map(|(_, tokens)| tokens).sum::<i64>());
}

#[tokio::test]
async fn an_outcome_of_another_kind_than_expected_is_refused_and_does_not_count() {
    let app = start().await;
    app.upstream.answers(|request| {
        let refused = last_text(request, "tool").contains("expected as `json`");
        let handed_over = if refused {
            r#"{"type":"json","label":"Changes","data":[1]}"#
        } else {
            r#"{"type":"text","label":"Changes","text":"one"}"#
        };
        if results(request) < 2 {
            Reply::Stream(called(&[("c", "register_outcome", &[handed_over])]))
        } else {
            Reply::Stream(said("Here."))
        }
    });
    let expected = json!([{"type": "json", "label": "Changes"}]);
    let id = app
        .task("changes", json!({"expectedOutcomes": expected}))
        .await;
    let task = app.until(&id, "done").await;
    let outcomes = task["outcomes"].as_array().unwrap();
    assert_eq!(outcomes.len(), 1);
    assert_eq!(
        (&outcomes[0]["type"], &outcomes[0]["data"]),
        (&json!("json"), &json!([1]))
    );
    assert_eq!(task["fixAttempts"], 0);
    let made = outcomes[0]["producedAt"].as_str().unwrap();
    assert_eq!(made.len(), "2026-04-07T12:00:00.000Z".len());
}

#[tokio::test]
async fn a_task_is_not_assigned_by_hand_before_what_it_needs() {
    let app = start().await;
    app.upstream.answers(|_| Reply::Hang(vec![]));
    let first = app.task("first", json!({})).await;
    let second = app.task("second", json!({"dependsOn": [first]})).await;
    let path = format!("/v1/tasks/{second}");
    let (status, body) = answer(app.patch(&path, json!({"status": "assigned"}))).await;
    assert_eq!((status.as_u16(), &body["code"]), (409, &json!("conflict")));
    assert_eq!(app.read(&second).await["status"], "pending");
}

#[tokio::test]
async fn a_paused_task_that_is_assigned_by_hand_goes_on() {
    let app = start().await;
    app.upstream.answers(|_| Reply::Hang(vec![]));
    let id = app.task("work", json!({})).await;
    app.until(&id, "in_progress").await;
    answer(app.post(&format!("/v1/tasks/{id}/pause"), json!({}))).await;
    app.upstream.answers(|_| Reply::Stream(said("Here.")));
    let assigned = app.patch(&format!("/v1/tasks/{id}"), json!({"status": "assigned"}));
    let (status, task) = answer(assigned).await;
    assert_eq!((status.as_u16(), task.get("held")), (200, None));
    app.until(&id, "done").await;
}

#[tokio::test]
async fn another_agent_works_with_its_own_model() {
    let app = start().await;
    app.agent("boss").await;
    app.upstream.answers(|request| {
        if request["model"] == "better" {
            Reply::Plain(400, vec![], "{}".to_owned())
        } else {
            Reply::Stream(said("Solved."))
        }
    });
    let policy = json!({"escalateAfter": 1, "escalateModel": "openai:better"});
    let task = json!({"retryPolicy": policy, "maxRetries": 1, "description": "refuse"});
    app.upstream
        .will(Reply::Plain(400, vec![], "{}".to_owned()));
    let id = app.task("hard", task).await;
    app.until(&id, "failed").await;
    answer(app.patch(&format!("/v1/tasks/{id}"), json!({"assignTo": "boss"}))).await;
    answer(app.post(&format!("/v1/tasks/{id}/retry"), json!({}))).await;
    app.until(&id, "done").await;
}

#[tokio::test]
async fn what_acted_on_the_world_and_then_asks_is_not_begun_anew() {
    let app = start().await;
    answer(app.patch("/v1/config", json!({"orchestratorModel": "openai:decider"}))).await;
    app.upstream.answers(|request| {
        if results(request) == 0 {
            Reply::Stream(called(&[(
                "c",
                "memory_append",
                &[r#"{"content":"sent"}"#],
            )]))
        } else {
            Reply::Stream(said("Which one?"))
        }
    });
    let id = app.task("send", json!({"sideEffects": true})).await;
    app.until(&id, "awaiting_approval").await;
    assert_eq!(app.upstream.asked().len(), 2);
}

#[tokio::test]
async fn everything_that_can_change_is_changed_and_the_rest_refused() {
    let app = start().await;
    let id = app.task("work", json!({"draft": true, "user": "u1"})).await;
    let path = format!("/v1/tasks/{id}");
    let change = json!({
        "maxDuration": 5000, "deadline": "2030-01-01T00:00:00Z", "retryPolicy": {"escalateAfter": 1},
        "expectedOutcomes": [{"type": "text", "label": "Notes"}], "user": null, "routing": "eu", "title": "work",
    });
    let (status, task) = answer(app.patch(&path, change)).await;
    assert_eq!(status, 200, "{task}");
    assert_eq!(app.read(&id).await, task);
    for (member, value) in [
        ("maxDuration", json!(5000)),
        ("deadline", json!("2030-01-01T00:00:00.000Z")),
        ("retryPolicy", json!({"escalateAfter": 1})),
        ("routing", json!("eu")),
    ] {
        assert_eq!(task[member], value, "{member}");
    }
    assert_eq!(
        (
            task["expectedOutcomes"][0]["label"].as_str(),
            task.get("user")
        ),
        (Some("Notes"), None)
    );
    assert_eq!(app.owed("deadline").await, 1);
    let nothing = json!({"maxDuration": null, "deadline": null, "retryPolicy": null, "expectedOutcomes": null});
    let (_, task) = answer(app.patch(&path, nothing)).await;
    for member in ["maxDuration", "deadline", "retryPolicy", "expectedOutcomes"] {
        assert_eq!(task.get(member), None, "{member}");
    }
    assert_eq!(app.owed("deadline").await, 0);
    for (member, value) in [
        ("title", json!("other")),
        ("dependsOn", json!(["other"])),
        ("group", json!("g")),
        ("maxDuration", json!(-1)),
        ("deadline", json!("soon")),
        ("retryPolicy", json!([1])),
        ("expectedOutcomes", json!([{"type": "smell", "label": "l"}])),
        ("metrics", json!([{"name": "m"}])),
        ("user", json!(7)),
    ] {
        let (status, body) = answer(app.patch(&path, json!({member: value}))).await;
        assert_eq!(
            (status.as_u16(), &body["code"]),
            (400, &json!("bad_request")),
            "{member}"
        );
        assert!(body["error"].as_str().unwrap().contains(member), "{body}");
    }
}

#[tokio::test]
async fn what_a_run_did_is_read_in_pages() {
    let app = start().await;
    app.upstream.answers(|request| {
        if results(request) < 2 {
            Reply::Stream(called(&[("c", "memory_get", &["{}"])]))
        } else {
            Reply::Stream(said("Here."))
        }
    });
    let id = app.task("work", json!({})).await;
    app.until(&id, "done").await;
    let whole = answer(app.get(&format!("/v1/tasks/{id}/activity"))).await.1;
    let whole = whole["entries"].as_array().unwrap().clone();
    assert_eq!(whole.len(), 5);
    let mut read = Vec::new();
    let mut next = Some(format!("/v1/tasks/{id}/activity?limit=2"));
    while let Some(path) = next {
        let page = app.get(&path).send().await.unwrap();
        next = page.headers().get("link").map(|link| {
            let link = link.to_str().unwrap();
            link.split(['<', '>']).nth(1).unwrap().to_owned()
        });
        let page: Value = page.json().await.unwrap();
        read.extend(page["entries"].as_array().unwrap().clone());
    }
    assert_eq!(read, whole);
    let path = format!("/v1/tasks/{id}/activity?after=soon");
    assert_eq!(answer(app.get(&path)).await.0, 400);
}

#[tokio::test]
async fn a_task_that_is_sent_back_as_it_was_read_is_not_changed() {
    let app = start().await;
    app.upstream.answers(|request| {
        if last_text(request, "user") == "Do work" {
            // No work: the next attempt is told so.
            Reply::Stream(said(""))
        } else {
            Reply::Hang(vec![])
        }
    });
    let task = json!({
        "maxRetries": 1, "deadline": "2099-01-01T00:00:00.123456Z",
        "expectations": [{"type": "llm_review", "criteria": "Is it good?"}],
        "expectedOutcomes": [{"type": "text", "label": "Notes"}], "user": "u",
    });
    let id = app.task("work", task).await;
    eventually("it is tried again", async || {
        let task = app.read(&id).await;
        task["retries"] == 1 && task["status"] == "in_progress"
    })
    .await;
    let task = app.read(&id).await;
    assert_eq!(task["originalDescription"], "Do work");
    let mut change = task.clone();
    change["priority"] = json!(7);
    let (status, changed) = answer(app.patch(&format!("/v1/tasks/{id}"), change.clone())).await;
    assert_eq!(status, 200, "{changed}");
    change["priority"] = json!(7.0);
    change["updatedAt"] = changed["updatedAt"].clone();
    assert_eq!(changed, change);
    let (_, changed) = answer(app.patch(
        &format!("/v1/tasks/{id}"),
        json!({"description": "Do it well"}),
    ))
    .await;
    assert_eq!(changed["description"], "Do it well");
    assert_eq!(changed.get("originalDescription"), None);
}

#[tokio::test]
async fn outcomes_of_one_label_may_be_of_several_kinds() {
    let app = start().await;
    app.upstream.answers(|request| match results(request) {
        0 => Reply::Stream(called(&[
            (
                "a",
                "register_outcome",
                &[r#"{"type":"text","label":"Report","text":"r"}"#],
            ),
            (
                "b",
                "register_outcome",
                &[r#"{"type":"url","label":"Report","url":"https://r"}"#],
            ),
            (
                "c",
                "register_outcome",
                &[r#"{"type":"json","label":"Report","data":1}"#],
            ),
        ])),
        _ => Reply::Stream(said("Here.")),
    });
    let kinds = ["text", "url"].map(|kind| json!({"type": kind, "label": "Report"}));
    let id = app.task("report", json!({"expectedOutcomes": kinds})).await;
    let task = app.until(&id, "done").await;
    assert_eq!(task["outcomes"].as_array().unwrap().len(), 2);
    let told = last_text(&app.upstream.asked()[1], "tool");
    assert!(told.contains("`text` or `url`"), "{told}");
}

#[tokio::test]
async fn a_run_without_a_word_or_a_deed_is_no_success() {
    let app = start().await;
    app.upstream.will_say(" ");
    app.upstream.will_say("");
    let id = app.task("work", json!({"maxRetries": 1})).await;
    let result = app.until(&id, "failed").await["result"].clone();
    assert_eq!(
        (&result["reason"], &result["cause"]),
        (&json!("error"), &json!("The model's answer was empty."))
    );
    // What was done with tools needs no words.
    app.upstream.answers(|request| match results(request) {
        0 => Reply::Stream(called(&[("c", "memory_append", &[r#"{"content":"x"}"#])])),
        _ => Reply::Stream(said("")),
    });
    answer(app.post(&format!("/v1/tasks/{id}/retry"), json!({}))).await;
    app.until(&id, "done").await;
}

#[tokio::test]
async fn without_an_orchestrator_an_agent_is_answered_by_the_model_that_it_has() {
    let app = start().await;
    app.upstream.answers(|request| {
        if last_text(request, "system").starts_with("An agent was given a task") {
            Reply::Stream(said(
                &json!({"question": true, "answer": "Blue."}).to_string(),
            ))
        } else if last_text(request, "user").contains("Blue.") {
            Reply::Stream(said("It is blue."))
        } else {
            Reply::Stream(said("Which colour?"))
        }
    });
    let id = app.task("paint", json!({})).await;
    let task = app.until(&id, "done").await;
    assert_eq!(
        (&task["questionRounds"], &task["result"]["stdout"]),
        (&json!(1), &json!("It is blue."))
    );
    let classifier = app.upstream.asked()[1].clone();
    assert_eq!(classifier["model"], "scripted");

    // What the project names goes before it.
    answer(app.patch("/v1/config", json!({"defaultModel": "openai:usual"}))).await;
    let id = app.task("paint again", json!({})).await;
    app.until(&id, "done").await;
    let asked = app.upstream.asked();
    let by_default = asked.iter().filter(|asked| asked["model"] == "usual");
    assert_eq!(by_default.count(), 1);
}

#[tokio::test]
async fn without_an_orchestrator_a_task_is_described_anew_by_the_model_that_it_has() {
    let app = start().await;
    let levels = json!([{"level": 1, "handler": "orchestrator"}]);
    answer(app.patch(
        "/v1/config",
        json!({"escalationPolicy": {"levels": levels}}),
    ))
    .await;
    app.upstream.answers(|request| {
        if last_text(request, "system").starts_with("A task has failed several times") {
            let better = json!({"description": "Do it slowly, and step by step."});
            Reply::Stream(said(&better.to_string()))
        } else if last_text(request, "user").contains("step by step") {
            Reply::Stream(said("Done."))
        } else {
            let refusal = json!({"error": {"message": "not so fast"}});
            Reply::Plain(400, vec![], refusal.to_string())
        }
    });
    let id = app.task("hard", json!({"maxRetries": 0})).await;
    app.until(&id, "done").await;
    let asked = app.upstream.asked();
    let rewriter = asked
        .iter()
        .find(|request| last_text(request, "system").starts_with("A task has failed"));
    // Whoever describes it anew knows what went wrong, whoever's fault it was.
    let told = last_text(rewriter.unwrap(), "user");
    assert!(told.contains("not so fast"), "{told}");
    // The agent hears nothing of it.
    let told = last_text(asked.last().unwrap(), "user");
    assert!(!told.contains("not so fast"), "{told}");
}

/// What an agent was told in its attempts.
fn told(app: &TestApp) -> Vec<String> {
    let asked = app.upstream.asked();
    asked
        .iter()
        .map(|request| last_text(request, "user"))
        .collect()
}

#[tokio::test]
async fn an_outage_of_the_provider_is_no_word_on_the_work() {
    let app = start().await;
    let refusal = || Reply::Plain(400, vec![], "{}".to_owned());
    app.upstream.will(refusal());
    app.upstream.will(Reply::Hang(vec![]));
    let id = app.task("work", json!({})).await;
    eventually("it is tried again", async || told(&app).len() == 2).await;
    let task = app.read(&id).await;
    assert_eq!(
        (
            &task["retries"],
            &task["description"],
            task.get("originalDescription")
        ),
        (&json!(1), &json!("Do work"), None)
    );
    assert_eq!(told(&app), ["Do work", "Do work"]);

    // What was wrong with the work before it is still to be mended.
    let app = start().await;
    app.upstream.will_say("");
    app.upstream.will(refusal());
    app.upstream.will(Reply::Hang(vec![]));
    app.task("work", json!({})).await;
    eventually("it is tried twice more", async || told(&app).len() == 3).await;
    let told = told(&app);
    assert!(
        told[1].ends_with("was not good enough: The model's answer was empty."),
        "{told:?}"
    );
    assert_eq!(told[1], told[2]);

    // What may have touched the world is looked at, but not because of bad work.
    let app = start().await;
    app.upstream.will(refusal());
    let id = app.task("work", json!({"sideEffects": true})).await;
    let task = app.until(&id, "awaiting_approval").await;
    let description = task["description"].as_str().unwrap();
    assert!(
        description.contains("did not succeed.\n\n") && description.contains("Do not repeat"),
        "{description}"
    );
}

#[tokio::test]
async fn a_run_that_came_to_a_limit_is_told_so_and_what_was_added_goes_when_it_is_done() {
    let app = start().await;
    let mut cut = vec![chunk(&json!({"content": "half an ans"}), None)];
    cut.extend(ending("length"));
    app.upstream.will(Reply::Stream(cut));
    let go_on = Arc::new(Notify::new());
    app.upstream
        .will(Reply::Pause(vec![], go_on.clone(), said("Short.")));
    let id = app.task("long", json!({})).await;
    eventually("it is tried again", async || told(&app).len() == 2).await;
    let task = app.read(&id).await;
    assert_eq!(
        (&task["description"], &task["originalDescription"]),
        (
            &json!(
                "Do long\n\nAn earlier attempt came to a limit before it was finished: The model's answer was cut off at its token limit."
            ),
            &json!("Do long")
        )
    );
    go_on.notify_one();
    let task = app.until(&id, "done").await;
    assert_eq!(
        (&task["description"], task.get("originalDescription")),
        (&json!("Do long"), None)
    );
}

#[tokio::test]
async fn a_policy_that_is_sent_back_as_it_was_read_is_no_other_one() {
    let app = start().await;
    app.agent("boss").await;
    let policy = json!({"escalateAfter": 1, "fallbackAgent": "boss"});
    let id = app
        .task("work", json!({"draft": true, "retryPolicy": policy}))
        .await;
    assert_eq!(answer(app.delete("/v1/agents/boss")).await.0, 200);
    let path = format!("/v1/tasks/{id}");
    let same = app.patch(&path, json!({"retryPolicy": policy, "priority": 2}));
    let (status, task) = answer(same).await;
    assert_eq!(status, 200, "{task}");
    let other = json!({"retryPolicy": {"escalateAfter": 2, "fallbackAgent": "boss"}});
    assert_eq!(answer(app.patch(&path, other)).await.0, 400);
}

#[tokio::test]
async fn an_empty_reason_is_none() {
    let app = start().await;
    for (deed, sentence) in [("kill", "Killed."), ("force-fail", "Failed by hand.")] {
        let id = app.task(deed, json!({"draft": true})).await;
        let stopped = app.post(&format!("/v1/tasks/{id}/{deed}"), json!({"reason": " "}));
        let (status, body) = answer(stopped).await;
        assert_eq!(status, 200, "{body}");
        let result = app.read(&id).await["result"].clone();
        assert_eq!(result["stderr"], sentence, "{result}");
    }
}

#[tokio::test]
async fn an_outcome_that_is_no_web_address_is_refused_and_the_model_told() {
    let app = start().await;
    let urls = ["javascript:alert(1)", "not a url", "https://example.com/a"];
    app.upstream.answers(move |request| {
        let Some(url) = urls.get(results(request)) else {
            return Reply::Stream(said("Here."));
        };
        let outcome = json!({"type": "url", "label": "Page", "url": url}).to_string();
        Reply::Stream(called(&[("c", "register_outcome", &[&outcome])]))
    });
    let id = app.task("publish", json!({})).await;
    let task = app.until(&id, "done").await;
    let outcomes = task["outcomes"].as_array().unwrap();
    assert_eq!(outcomes.len(), 1, "{task}");
    assert_eq!(outcomes[0]["url"], "https://example.com/a");
    for asked in &app.upstream.asked()[1..3] {
        let told = last_text(asked, "tool");
        assert!(told.contains("http or https"), "{told}");
    }
}

#[tokio::test]
async fn a_page_of_tasks_is_bounded_in_bytes_too_and_its_link_goes_on() {
    let app = TestApp::start_with(&["--role-of-test", "api"]).await;
    app.agent("noor").await;
    let description = "d".repeat(120_000);
    let mut made = Vec::new();
    for number in 0..100 {
        let long = json!({"description": description, "draft": true});
        made.push(app.task(&format!("t{number}"), long).await);
    }
    let (mut listed, mut sizes) = (Vec::new(), Vec::new());
    let mut next = Some("/v1/tasks?limit=1000".to_owned());
    while let Some(path) = next {
        let page = app.get(&path).send().await.unwrap();
        next = page.headers().get("link").map(|link| {
            let link = link.to_str().unwrap();
            link[1..link.find('>').unwrap()].to_owned()
        });
        let page: Vec<Value> = page.json().await.unwrap();
        sizes.push(page.len());
        listed.extend(
            page.iter()
                .map(|task| task["id"].as_str().unwrap().to_owned()),
        );
    }
    assert_eq!(listed, made);
    assert!(sizes.len() == 2 && sizes[0] < 75, "{sizes:?}");
}
