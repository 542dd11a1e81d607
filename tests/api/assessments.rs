//! How finished work is judged (contract 2.7).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::harness::{Reply, TestApp, answer, eventually, last_text, said};

/// A reviewer's answer that gives every dimension this score.
pub(crate) fn scored(request: &Value, score: f64) -> Reply {
    let schema = request["response_format"]["json_schema"]["schema"].clone();
    let names = schema["properties"]["scores"]["items"]["properties"]["dimension"]["enum"].clone();
    let scores: Vec<Value> = names
        .as_array()
        .unwrap()
        .iter()
        .map(|name| json!({"dimension": name, "score": score, "reasoning": format!("it is worth {score}")}))
        .collect();
    Reply::Stream(said(
        &json!({"summary": format!("{score} in all"), "scores": scores}).to_string(),
    ))
}

pub(crate) fn is_review(request: &Value) -> bool {
    last_text(request, "system").starts_with("You review finished work")
}

/// A server whose reviewers give these scores, one after the other, the last for ever; 0 is a refusal.
async fn judged_by(scores: &'static [f64]) -> (TestApp, Arc<AtomicUsize>) {
    let app = TestApp::start_with(&["--retry-backoff-ms", "1"]).await;
    app.agent("noor").await;
    let reviews = Arc::new(AtomicUsize::new(0));
    let count = reviews.clone();
    app.upstream.answers(move |request| {
        if !is_review(request) {
            return Reply::Stream(said("Dark mode is new."));
        }
        let index = count.fetch_add(1, Ordering::SeqCst).min(scores.len() - 1);
        if scores[index] == 0.0 {
            Reply::Plain(
                400,
                vec![],
                json!({"error": {"message": "not today"}}).to_string(),
            )
        } else {
            scored(request, scores[index])
        }
    });
    answer(app.patch("/v1/config", json!({"judgeModel": "openai:judge"}))).await;
    (app, reviews)
}

fn by(criteria: &str) -> Value {
    json!({"expectations": [{"type": "llm_review", "criteria": criteria}]})
}

#[tokio::test]
async fn good_work_passes_three_reviewers_and_the_verdict_is_kept_whole() {
    let (app, reviews) = judged_by(&[4.0, 5.0, 4.0]).await;
    let id = app.task("notes", by("Is it short?")).await;
    let task = app.until(&id, "done").await;
    assert_eq!(reviews.load(Ordering::SeqCst), 3);
    let verdict = &task["result"]["assessment"];
    assert_eq!(
        (
            &verdict["passed"],
            &verdict["trigger"],
            &verdict["globalScore"],
            &verdict["metrics"]
        ),
        (&json!(true), &json!("initial"), &json!(4.0), &json!([]))
    );
    let check = &verdict["checks"][0];
    assert_eq!(
        (&check["type"], &check["passed"], &check["message"]),
        (&json!("llm_review"), &json!(true), &json!("Score 4.0/5"))
    );
    assert_eq!(check["reviewers"].as_array().unwrap().len(), 3);
    let dimensions: Vec<&str> = verdict["scores"]
        .as_array()
        .unwrap()
        .iter()
        .map(|score| score["dimension"].as_str().unwrap())
        .collect();
    assert_eq!(
        dimensions,
        ["correctness", "completeness", "code_quality", "edge_cases"]
    );
    assert!(verdict["timestamp"].is_string() && verdict["llmReview"].is_string());

    let review = app.upstream.asked().into_iter().find(is_review).unwrap();
    assert_eq!(review["model"], "judge");
    let shown = last_text(&review, "user");
    assert!(
        shown.contains("Dark mode is new.") && shown.contains("Do notes"),
        "{shown}"
    );
    assert!(last_text(&review, "system").contains("Is it short?"));

    let told: Vec<String> = app
        .events("assessment:*")
        .await
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(
        told,
        [
            "assessment:started",
            "assessment:check:started",
            "assessment:progress",
            "assessment:progress",
            "assessment:progress",
            "assessment:check:complete",
            "assessment:completed",
            "assessment:complete",
        ]
    );
}

#[tokio::test]
async fn bad_work_is_mended_then_done_anew_then_given_up() {
    let (app, _) = judged_by(&[2.0]).await;
    answer(app.patch("/v1/config", json!({"maxFixAttempts": 1}))).await;
    let mut task = by("Is it good?");
    task["maxRetries"] = json!(1);
    let id = app.task("notes", task).await;
    let task = app.until(&id, "failed").await;
    assert_eq!(
        (
            &task["retries"],
            &task["result"]["assessment"]["passed"],
            &task["result"]["reason"]
        ),
        (&json!(1), &json!(false), &json!("finished"))
    );
    let told: Vec<String> = app
        .events("task:fix,task:retry,task:maxRetries")
        .await
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(
        told,
        ["task:fix", "task:retry", "task:fix", "task:maxRetries"]
    );
    // The agent is told what was wrong, and what it had written.
    let second = app
        .upstream
        .asked()
        .into_iter()
        .filter(|request| !is_review(request))
        .nth(1)
        .unwrap();
    let (system, told) = (last_text(&second, "system"), last_text(&second, "user"));
    assert!(
        system.contains("<earlier-result>\nDark mode is new."),
        "{system}"
    );
    assert!(
        told.starts_with("Do notes\n\n") && told.contains("it is worth 2"),
        "{told}"
    );
    assert_eq!(
        (&task["description"], &task["originalDescription"]),
        (&json!(told), &json!("Do notes"))
    );
    let triggers: Vec<&Value> = task["result"]["assessmentHistory"]
        .as_array()
        .unwrap()
        .iter()
        .map(|verdict| &verdict["trigger"])
        .collect();
    assert_eq!(
        triggers,
        [&json!("initial"), &json!("fix"), &json!("retry")]
    );
    assert_eq!(task["result"]["assessment"]["trigger"], "fix");
}

#[tokio::test]
async fn outliers_and_reviewers_that_fail_do_not_count() {
    for (scores, passed, reviewers) in [
        (&[5.0, 5.0, 1.0, 1.0][..], true, 3),
        (&[4.0, 0.0, 4.0][..], true, 2),
        (&[0.0, 0.0, 2.0][..], false, 1),
    ] {
        let (app, _) = judged_by(scores).await;
        answer(app.patch("/v1/config", json!({"maxFixAttempts": 0}))).await;
        let mut task = by("Is it good?");
        task["maxRetries"] = json!(0);
        let id = app.task("notes", task).await;
        let task = app.until(&id, if passed { "done" } else { "failed" }).await;
        let check = &task["result"]["assessment"]["checks"][0];
        assert_eq!(
            check["reviewers"].as_array().unwrap().len(),
            reviewers,
            "{scores:?}: {check}"
        );
    }
}

#[tokio::test]
async fn when_all_reviewers_fail_they_are_asked_once_more() {
    let (app, reviews) = judged_by(&[0.0, 0.0, 0.0, 4.0]).await;
    let id = app.task("notes", by("Is it good?")).await;
    app.until(&id, "done").await;
    assert_eq!(reviews.load(Ordering::SeqCst), 6);

    let (app, reviews) = judged_by(&[0.0]).await;
    answer(app.patch("/v1/config", json!({"maxFixAttempts": 0}))).await;
    let mut task = by("Is it good?");
    task["maxRetries"] = json!(0);
    let id = app.task("notes", task).await;
    let task = app.until(&id, "failed").await;
    assert_eq!(reviews.load(Ordering::SeqCst), 6);
    let check = &task["result"]["assessment"]["checks"][0];
    assert_eq!(check["message"], "All evaluators failed");
    assert!(
        check["details"].as_str().unwrap().contains("not today"),
        "{check}"
    );
}

#[tokio::test]
async fn every_expectation_must_pass_by_its_own_dimensions_and_threshold() {
    let (app, reviews) = judged_by(&[3.0]).await;
    answer(app.patch("/v1/config", json!({"maxFixAttempts": 0}))).await;
    let dimension = json!({"name": "brevity", "description": "Is it brief?", "weight": 1, "rubric": {"5": "one line"}});
    let expectations = json!([
        {"type": "llm_review", "dimensions": [dimension], "threshold": 3},
        {"type": "llm_review", "criteria": "Is it good?", "threshold": 3.5},
    ]);
    let id = app
        .task(
            "notes",
            json!({"maxRetries": 0, "expectations": expectations}),
        )
        .await;
    let task = app.until(&id, "failed").await;
    assert_eq!(reviews.load(Ordering::SeqCst), 6);
    let checks = &task["result"]["assessment"]["checks"];
    assert_eq!(
        (&checks[0]["passed"], &checks[1]["passed"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(checks[0]["scores"][0]["dimension"], "brevity");
    assert!(
        app.upstream
            .asked()
            .iter()
            .any(|request| last_text(request, "system").contains("5 = one line"))
    );
}

#[tokio::test]
async fn a_threshold_that_was_only_estimated_may_be_corrected() {
    let (app, _) = judged_by(&[3.0]).await;
    app.upstream.answers(|request| {
        if is_review(request) {
            scored(request, 3.0)
        } else if last_text(request, "system").contains("only an estimate") {
            Reply::Stream(said(&json!({"correct": true, "threshold": 3}).to_string()))
        } else {
            Reply::Stream(said("Dark mode is new."))
        }
    });
    let expectation = json!({"type": "llm_review", "criteria": "Is it good?", "threshold": 4, "confidence": "estimated"});
    let id = app
        .task("notes", json!({"expectations": [expectation]}))
        .await;
    let task = app.until(&id, "done").await;
    assert_eq!(task["expectations"][0]["threshold"], 3.0);
    assert_eq!(task["result"]["assessment"]["trigger"], "auto-correct");
    let history = task["result"]["assessmentHistory"].as_array().unwrap();
    assert_eq!(history.len(), 1);
    assert_eq!(
        (&history[0]["trigger"], &history[0]["passed"]),
        (&json!("initial"), &json!(false))
    );
    let (_, told) = app.events("assessment:corrected").await.pop().unwrap();
    assert_eq!(
        told["corrections"],
        json!([{"index": 0, "field": "threshold", "from": 4.0, "to": 3.0}])
    );
    // The reviewers were not asked again.
    assert_eq!(
        app.upstream
            .asked()
            .iter()
            .filter(|request| is_review(request))
            .count(),
        3
    );
}

#[tokio::test]
async fn finished_work_can_be_judged_again_both_ways() {
    let (app, _) = judged_by(&[4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 5.0]).await;
    let id = app.task("notes", by("Is it good?")).await;
    app.until(&id, "done").await;
    let again = || app.post(&format!("/v1/tasks/{id}/reassess"), json!({}));
    assert_eq!(answer(again()).await.1, json!({"reassessed": true}));
    let failed = app.until(&id, "failed").await;
    assert_eq!(
        (
            &failed["result"]["assessment"]["trigger"],
            &failed["retries"]
        ),
        (&json!("reassess"), &json!(0))
    );
    assert_eq!(
        failed["result"]["assessmentHistory"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(answer(again()).await.0, 200);
    let done = app.until(&id, "done").await;
    assert_eq!(done["retries"], 1);
    let way = app.events("task:transition").await;
    let way: Vec<&Value> = way
        .iter()
        .map(|(_, told)| &told["to"])
        .rev()
        .take(6)
        .collect();
    assert_eq!(
        way,
        [
            "done",
            "review",
            "in_progress",
            "assigned",
            "pending",
            "failed"
        ]
    );
    assert_eq!(
        done["result"]["assessmentHistory"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
}

#[tokio::test]
async fn expectations_that_are_changed_while_work_is_judged_again_stay_changed() {
    let (app, _) = judged_by(&[4.0]).await;
    let id = app.task("notes", by("Is it good?")).await;
    app.until(&id, "done").await;
    app.upstream.answers(|request| {
        let Reply::Stream(words) = scored(request, 4.0) else {
            unreachable!("a review is a stream")
        };
        Reply::Slow(std::time::Duration::from_millis(300), words)
    });
    let asked = app.upstream.asked().len();
    answer(app.post(&format!("/v1/tasks/{id}/reassess"), json!({}))).await;
    eventually("reviewers are asked", async || {
        app.upstream.asked().len() > asked
    })
    .await;
    answer(app.patch(&format!("/v1/tasks/{id}"), by("Is it short?"))).await;
    eventually("it is judged again", async || {
        app.read(&id).await["result"]["assessment"]["trigger"] == "reassess"
    })
    .await;
    assert_eq!(
        app.read(&id).await["expectations"][0]["criteria"],
        "Is it short?"
    );
}

/// What reviewers were asked about.
fn shown(app: &TestApp) -> Vec<String> {
    let asked = app.upstream.asked();
    let reviews = asked.iter().filter(|request| is_review(request));
    reviews.map(|request| last_text(request, "user")).collect()
}

async fn reassess(app: &TestApp, id: &str) {
    let (status, body) = answer(app.post(&format!("/v1/tasks/{id}/reassess"), json!({}))).await;
    assert_eq!(status, 200, "{body}");
    eventually("it is judged again", async || {
        app.owed("reassess").await == 0
    })
    .await;
}

#[tokio::test]
async fn each_reassessment_asks_anew() {
    let (app, reviews) = judged_by(&[5.0, 5.0, 5.0, 1.0]).await;
    let id = app.task("notes", json!({})).await;
    app.until(&id, "done").await;
    let path = format!("/v1/tasks/{id}");
    for (criteria, status, asked) in [("Is it good?", "done", 3), ("Is it short?", "failed", 6)] {
        // Neither another agent nor other expectations take away what there is to judge.
        app.agent(&format!("agent{asked}")).await;
        let mut change = by(criteria);
        change["assignTo"] = json!(format!("agent{asked}"));
        assert_eq!(answer(app.patch(&path, change)).await.0, 200);
        reassess(&app, &id).await;
        assert_eq!(app.read(&id).await["status"], status);
        assert_eq!(reviews.load(Ordering::SeqCst), asked);
    }
    let failed = app.read(&id).await;
    assert!(
        failed["result"]["cause"]
            .as_str()
            .unwrap()
            .contains("it is worth 1")
    );
    let (_, told) = app.events("assessment:completed").await.pop().unwrap();
    assert_eq!(told["passed"], false);
}

#[tokio::test]
async fn a_reassessment_that_passes_says_no_more_why_the_work_was_bad() {
    let (app, _) = judged_by(&[1.0, 1.0, 1.0, 5.0]).await;
    let mut task = by("Is it good?");
    task["maxRetries"] = json!(0);
    answer(app.patch("/v1/config", json!({"maxFixAttempts": 0}))).await;
    let id = app.task("notes", task).await;
    let failed = app.until(&id, "failed").await;
    assert!(failed["result"]["cause"].is_string());
    reassess(&app, &id).await;
    let done = app.read(&id).await;
    assert_eq!(
        (
            &done["status"],
            &done["result"]["stderr"],
            &done["result"]["cause"]
        ),
        (&json!("done"), &json!(""), &Value::Null)
    );
}

#[tokio::test]
async fn reviewers_who_say_nothing_undo_no_finished_work() {
    let (app, _) = judged_by(&[4.0, 4.0, 4.0, 0.0]).await;
    let id = app.task("notes", by("Is it good?")).await;
    let before = app.until(&id, "done").await;
    reassess(&app, &id).await;
    let task = app.read(&id).await;
    assert_eq!(task["status"], "done");
    assert_eq!(task["result"]["assessment"], before["result"]["assessment"]);
    let history = task["result"]["assessmentHistory"].as_array().unwrap();
    assert_eq!(
        (history.len(), &history[0]["trigger"]),
        (1, &json!("reassess"))
    );
}

#[tokio::test]
async fn a_verdict_on_earlier_work_says_nothing_of_the_next() {
    let (app, _) = judged_by(&[1.0]).await;
    let mut task = by("Is it good?");
    task["maxRetries"] = json!(0);
    answer(app.patch("/v1/config", json!({"maxFixAttempts": 0}))).await;
    let id = app.task("notes", task).await;
    app.until(&id, "failed").await;
    app.upstream.answers(|request| {
        if !is_review(request) {
            return Reply::Plain(400, vec![], "{}".to_owned());
        }
        let Reply::Stream(words) = scored(request, 5.0) else {
            unreachable!("a review is a stream")
        };
        Reply::Slow(std::time::Duration::from_millis(600), words)
    });
    let asked = app.upstream.asked().len();
    answer(app.post(&format!("/v1/tasks/{id}/reassess"), json!({}))).await;
    eventually("reviewers are asked", async || {
        app.upstream.asked().len() > asked
    })
    .await;
    answer(app.post(&format!("/v1/tasks/{id}/retry"), json!({}))).await;
    eventually("both are over", async || app.owed("reassess").await == 0).await;
    let task = app.until(&id, "failed").await;
    assert_eq!(
        (&task["result"]["exitCode"], &task["result"]["assessment"]),
        (&json!(1), &Value::Null)
    );
}

#[tokio::test]
async fn reviewers_see_the_task_as_it_stands_and_as_it_was_given() {
    let (app, _) = judged_by(&[5.0]).await;
    let mut task = by("Is it good?");
    task["sideEffects"] = json!(true);
    let id = app.task("notes", task).await;
    app.until(&id, "awaiting_approval").await;
    let request = answer(app.get(&format!("/v1/approvals?taskId={id}")))
        .await
        .1[0]
        .clone();
    let path = format!("/v1/approvals/{}/reject", request["id"].as_str().unwrap());
    answer(app.post(&path, json!({"feedback": "In German, please"}))).await;
    eventually("the new work is judged", async || shown(&app).len() == 6).await;
    let shown = shown(&app);
    assert!(!shown[0].contains("first-description"));
    assert!(
        shown[5].contains("In German, please")
            && shown[5].contains("<first-description>\nDo notes\n"),
        "{}",
        shown[5]
    );
}

#[tokio::test]
async fn what_is_asked_anew_while_a_task_is_paused_is_not_answered_from_before() {
    let (app, _) = judged_by(&[5.0]).await;
    app.upstream.answers(|request| {
        if !is_review(request) {
            Reply::Stream(said("Dark mode is new."))
        } else if last_text(request, "system").contains("Is it old?") {
            Reply::Hang(vec![])
        } else {
            scored(request, 5.0)
        }
    });
    let expectations = json!([
        {"type": "llm_review", "criteria": "Is it good?"},
        {"type": "llm_review", "criteria": "Is it old?"},
    ]);
    let id = app
        .task("notes", json!({"expectations": expectations}))
        .await;
    eventually("one check is complete", async || {
        app.events("assessment:check:complete").await.len() == 1
    })
    .await;
    answer(app.post(&format!("/v1/tasks/{id}/pause"), json!({}))).await;
    answer(app.patch(&format!("/v1/tasks/{id}"), by("Is it new?"))).await;
    answer(app.post(&format!("/v1/tasks/{id}/run"), json!({}))).await;
    app.until(&id, "done").await;
    let asked = app.upstream.asked();
    let anew = asked
        .iter()
        .filter(|request| last_text(request, "system").contains("Is it new?"));
    assert_eq!(anew.count(), 3);
}

#[tokio::test]
async fn good_work_that_nobody_judges_fails_with_the_cause_and_is_not_done_again() {
    let (app, reviews) = judged_by(&[0.0]).await;
    let levels = json!([{"level": 1, "handler": "orchestrator"}]);
    answer(app.patch(
        "/v1/config",
        json!({"escalationPolicy": {"levels": levels}}),
    ))
    .await;
    let id = app.task("notes", by("Is it good?")).await;
    let task = app.until(&id, "failed").await;
    let cause = task["result"]["cause"].as_str().unwrap();
    assert!(
        cause.starts_with("All evaluators failed: ") && cause.contains("not today"),
        "{cause}"
    );
    assert_eq!(
        (
            &task["retries"],
            &task["fixAttempts"],
            &task["result"]["reason"],
            &task["result"]["stdout"]
        ),
        (
            &json!(0),
            &json!(0),
            &json!("finished"),
            &json!("Dark mode is new.")
        )
    );
    let again = "task:fix,task:retry,task:maxRetries,escalation:*";
    assert!(app.events(again).await.is_empty());
    // Its agent was asked once, the reviewers twice.
    assert_eq!(reviews.load(Ordering::SeqCst), 6);
    assert_eq!(app.upstream.asked().len(), 7);

    // The work is there: it only has to be judged.
    app.upstream.answers(|request| scored(request, 5.0));
    reassess(&app, &id).await;
    assert_eq!(app.read(&id).await["status"], "done");
}

#[tokio::test]
async fn silence_about_one_expectation_is_no_reason_beside_a_bad_verdict_on_another() {
    let (app, _) = judged_by(&[0.0]).await;
    app.upstream.answers(|request| {
        if !is_review(request) {
            return Reply::Stream(said("Dark mode is new."));
        }
        if last_text(request, "system").contains("Is it short?") {
            return scored(request, 1.0);
        }
        Reply::Plain(400, vec![], "{}".to_owned())
    });
    answer(app.patch(
        "/v1/config",
        json!({"maxFixAttempts": 1, "maxAssessmentRetries": 0}),
    ))
    .await;
    let expectations = json!([
        {"type": "llm_review", "criteria": "Is it good?"},
        {"type": "llm_review", "criteria": "Is it short?"},
    ]);
    let task = json!({"maxRetries": 0, "expectations": expectations});
    let id = app.task("notes", task).await;
    let task = app.until(&id, "failed").await;
    assert_eq!(task["fixAttempts"], 1);
    let description = task["description"].as_str().unwrap();
    assert!(
        description.contains("it is worth 1") && !description.contains("All evaluators"),
        "{description}"
    );
}

#[tokio::test]
async fn whoever_corrects_a_threshold_sees_the_task_the_work_and_the_scores() {
    let app = TestApp::start_with(&["--retry-backoff-ms", "1"]).await;
    app.agent("noor").await;
    app.upstream.answers(|request| {
        if is_review(request) {
            scored(request, 3.0)
        } else if last_text(request, "system").contains("only an estimate") {
            Reply::Stream(said(&json!({"correct": true, "threshold": 3}).to_string()))
        } else {
            Reply::Stream(said("Dark mode is new."))
        }
    });
    let expectation = json!({"type": "llm_review", "criteria": "Is it good?", "threshold": 4, "confidence": "estimated"});
    let id = app
        .task("notes", json!({"expectations": [expectation]}))
        .await;
    app.until(&id, "done").await;
    let asked = app.upstream.asked();
    let correction = asked
        .iter()
        .find(|request| last_text(request, "system").contains("only an estimate"))
        .unwrap();
    // Where the project names no model it is that of the agent.
    assert_eq!(correction["model"], "scripted");
    let shown = last_text(correction, "user");
    for part in [
        "Do notes",
        "<work>\nDark mode is new.\n</work>",
        "Is it good?",
        "Threshold: 4",
        "- completeness (weight 0.3): 3/5. it is worth 3",
        "3 in all",
    ] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
}

#[tokio::test]
async fn of_many_assessments_the_newest_are_kept_and_few_of_them_whole() {
    let (app, reviews) = judged_by(&[4.0]).await;
    let id = app.task("notes", by("Is it good?")).await;
    app.until(&id, "done").await;
    let mut first_left = Value::Null;
    for round in 1..=23 {
        reassess(&app, &id).await;
        // Each asks anew, also when the oldest are forgotten.
        assert_eq!(reviews.load(Ordering::SeqCst), 3 * (round + 1));
        if round == 3 {
            first_left = app.read(&id).await["result"]["assessment"]["timestamp"].clone();
        }
    }
    let task = app.read(&id).await;
    let history = task["result"]["assessmentHistory"].as_array().unwrap();
    assert_eq!((history.len(), &history[0]["timestamp"]), (20, &first_left));
    for (place, verdict) in history.iter().enumerate() {
        let is_whole = place >= 17;
        assert_eq!(verdict.get("llmReview").is_some(), is_whole, "{place}");
        let check = &verdict["checks"][0];
        let reviewers = check["reviewers"].as_array().unwrap();
        assert_eq!(
            (&verdict["globalScore"], reviewers.len()),
            (&json!(4.0), 3),
            "{place}"
        );
        assert_eq!(reviewers[0]["scores"][0]["score"], 4);
        let words = [
            &reviewers[0]["summary"],
            &reviewers[0]["scores"][0]["reasoning"],
            &check["scores"][0]["reasoning"],
            &verdict["scores"][0]["reasoning"],
        ];
        assert!(
            words.iter().all(|word| (**word != "") == is_whole),
            "{place}: {verdict}"
        );
    }
    assert_eq!(
        task["result"]["assessment"]["llmReview"],
        "4 in all\n4 in all\n4 in all"
    );
}
