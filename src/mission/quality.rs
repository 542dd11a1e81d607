//! How good the tasks of a run were: quality gates, the mission's threshold, and its report (contract 2.8.3, 2.8.5, 2.8.7).

use serde_json::{Map, Value, json};

use super::document::Gate;
use crate::ids::{self, Id};
use crate::task::{Outcome, Status as TaskStatus, Task, holds};

/// What a task came to.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskEnd {
    /// Its id.
    pub id: Id<ids::Task>,
    /// Its title.
    pub title: String,
    /// Where it stands.
    pub status: TaskStatus,
    /// Its score, 1 to 5, if reviewers gave one.
    pub score: Option<f64>,
    /// How much it counts.
    pub priority: f64,
    /// Milliseconds that its last run took.
    pub duration: i64,
    /// Why it failed, in a sentence.
    pub trouble: Option<String>,
    /// What it left behind.
    pub outcomes: Vec<Outcome>,
}

impl TaskEnd {
    /// What a task came to.
    pub fn of(task: &Task) -> Self {
        let result = task.document.result.as_ref();
        let score = result
            .and_then(|result| result.assessment.as_ref())
            .and_then(|assessment| assessment.get("globalScore"))
            .and_then(Value::as_f64);
        let trouble = result
            .map(|result| result.stderr.as_str())
            .filter(|trouble| !trouble.is_empty());
        Self {
            id: task.id,
            title: task.title.clone(),
            status: task.status(),
            score,
            priority: task.document.priority,
            duration: result.map_or(0, |result| result.duration),
            trouble: trouble.map(str::to_owned),
            outcomes: task.document.outcomes.clone(),
        }
    }
}

/// The mean of those scores that there are.
pub fn mean_score(ends: &[TaskEnd]) -> Option<f64> {
    let scores: Vec<f64> = ends.iter().filter_map(|end| end.score).collect();
    #[expect(
        clippy::cast_precision_loss,
        reason = "there are at most some thousand"
    )]
    let count = scores.len() as f64;
    (!scores.is_empty()).then(|| scores.iter().sum::<f64>() / count)
}

/// What a gate made of the tasks that it follows.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// The mean score, if there was any.
    pub mean: Option<f64>,
    /// Why it is closed, in a sentence; `None` when it is open.
    pub closed: Option<String>,
}

impl Gate {
    /// Judges the tasks that the gate follows. `mission` is what its condition can see of the mission. A condition that cannot be
    /// evaluated closes the gate: better a look too many than bad work that goes on.
    pub fn judge(&self, ends: &[TaskEnd], mission: &Value) -> Judgement {
        let mean = mean_score(ends);
        let failed = ends.iter().find(|end| end.status == TaskStatus::Failed);
        let closed = if let Some(failed) = failed.filter(|_| self.require_all_passed) {
            Some(format!("\"{}\" failed.", failed.title))
        } else if let Some(least) = self
            .min_score
            .filter(|least| mean.is_none_or(|mean| mean < *least))
        {
            Some(mean.map_or_else(
                || format!("No task was scored, and the mean score must be at least {least}."),
                |mean| format!("The mean score is {mean:.2}, and must be at least {least}."),
            ))
        } else {
            self.condition.as_deref().and_then(|condition| {
                match holds(
                    condition,
                    &json!({"data": seen(ends, mean), "task": {}, "mission": mission}),
                ) {
                    Ok(true) => None,
                    Ok(false) => Some(format!("Its condition does not hold: {condition}")),
                    Err(reason) => Some(format!("Its condition cannot be evaluated: {reason}.")),
                }
            })
        };
        Judgement { mean, closed }
    }
}

/// What a gate's condition sees as `data`: `avgScore`, and by title `scores`, `statuses` and `outcomes` (by label).
fn seen(ends: &[TaskEnd], mean: Option<f64>) -> Value {
    let (mut scores, mut statuses, mut outcomes) = (Map::new(), Map::new(), Map::new());
    for end in ends {
        if let Some(score) = end.score {
            scores.insert(end.title.clone(), json!(score));
        }
        statuses.insert(end.title.clone(), json!(end.status));
        let of_task = end
            .outcomes
            .iter()
            .map(|outcome| (outcome.label.clone(), json!(outcome)))
            .collect();
        outcomes.insert(end.title.clone(), Value::Object(of_task));
    }
    json!({"avgScore": mean, "scores": scores, "statuses": statuses, "outcomes": outcomes})
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// Whether every task is done.
    pub all_passed: bool,
    /// The mean score weighted by priority, when it is below the threshold.
    pub below: Option<f64>,
}

impl Verdict {
    /// Judges a run whose tasks have all ended: all of them must be done, and Σ(score × priority) ÷ Σ(priority) over those
    /// with a score must reach the threshold (contract 2.8.7).
    pub fn of(ends: &[TaskEnd], threshold: f64) -> Self {
        let scored = ends
            .iter()
            .filter(|end| end.status == TaskStatus::Done)
            .filter_map(|end| end.score.map(|score| (score, end.priority)));
        let (sum, weight) = scored.fold((0.0, 0.0), |(sum, weight), (score, priority)| {
            (sum + score * priority, weight + priority)
        });
        let mean = (weight > 0.0).then(|| sum / weight);
        Self {
            // A run whose tasks were all removed came to nothing.
            all_passed: !ends.is_empty() && ends.iter().all(|end| end.status == TaskStatus::Done),
            below: mean.filter(|mean| *mean < threshold),
        }
    }

    /// Whether the run came to what it should.
    pub fn passed(&self) -> bool {
        self.all_passed && self.below.is_none()
    }

    /// Why it did not, in a sentence.
    pub fn trouble(&self, ends: &[TaskEnd], threshold: f64) -> Option<String> {
        let failed: Vec<&TaskEnd> = ends
            .iter()
            .filter(|end| end.status == TaskStatus::Failed)
            .collect();
        if let Some(first) = failed.first() {
            let why = first.trouble.as_deref().unwrap_or("it gave no reason");
            let others = match failed.len() - 1 {
                0 => String::new(),
                others => format!(" So did {others} more."),
            };
            return Some(format!("Task \"{}\" failed: {why}{others}", first.title));
        }
        if ends.is_empty() {
            return Some("All of its tasks were removed.".to_owned());
        }
        self.below.map(|mean| {
            format!(
                "The weighted score is {mean:.2}, below the mission's threshold of {threshold}."
            )
        })
    }
}

/// Larger texts and data of outcomes are left out of reports: they are with the task.
const INLINE: usize = 2_048;

/// The report of a run (contract 2.8.3).
pub fn report(mission: Id<ids::Mission>, group: &str, passed: bool, ends: &[TaskEnd]) -> Value {
    let tasks: Vec<Value> = ends.iter().map(line).collect();
    let outcomes: Vec<Value> = ends
        .iter()
        .flat_map(|end| end.outcomes.iter().map(brief))
        .collect();
    let mut report = json!({
        "missionId": mission, "group": group, "allPassed": passed,
        "totalDuration": ends.iter().map(|end| end.duration).sum::<i64>(),
        "tasks": tasks, "filesCreated": [], "filesEdited": [],
    });
    if !outcomes.is_empty() {
        report["outcomes"] = json!(outcomes);
    }
    if let Some(mean) = mean_score(ends) {
        report["avgScore"] = json!(mean);
    }
    report
}

fn line(end: &TaskEnd) -> Value {
    let mut line = json!({
        "taskId": end.id, "title": end.title, "status": end.status, "duration": end.duration,
        "filesCreated": [], "filesEdited": [],
    });
    if let Some(score) = end.score {
        line["score"] = json!(score);
    }
    if let Some(trouble) = end
        .trouble
        .as_ref()
        .filter(|_| end.status == TaskStatus::Failed)
    {
        line["reason"] = json!(trouble);
    }
    if !end.outcomes.is_empty() {
        line["outcomes"] = json!(end.outcomes.iter().map(brief).collect::<Vec<_>>());
    }
    line
}

fn brief(outcome: &Outcome) -> Value {
    let mut brief = json!(outcome);
    if let Some(members) = brief.as_object_mut() {
        let too_large = |member: &str| {
            outcome
                .text
                .as_ref()
                .filter(|_| member == "text")
                .is_some_and(|text| text.len() > INLINE)
                || outcome
                    .data
                    .as_ref()
                    .filter(|_| member == "data")
                    .is_some_and(|data| data.to_string().len() > INLINE)
        };
        members.retain(|member, _| !too_large(member));
    }
    brief
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(title: &str, status: TaskStatus, score: Option<f64>, priority: f64) -> TaskEnd {
        TaskEnd {
            id: Id::new(),
            title: title.to_owned(),
            status,
            score,
            priority,
            duration: 10,
            trouble: (status == TaskStatus::Failed).then(|| "It broke.".to_owned()),
            outcomes: Vec::new(),
        }
    }

    #[test]
    fn a_gate_is_closed_by_failures_scores_and_conditions() {
        use TaskStatus::{Done, Failed};
        let good = [end("a", Done, Some(4.0), 1.0), end("b", Done, None, 1.0)];
        let bad = [end("a", Done, Some(4.0), 1.0), end("b", Failed, None, 1.0)];
        let none = [end("a", Done, None, 1.0)];
        let gate = |min_score, require_all_passed, condition: &str| Gate {
            min_score,
            require_all_passed,
            condition: (!condition.is_empty()).then(|| condition.to_owned()),
        };
        for (gate, ends, closed) in [
            (gate(None, false, ""), &bad[..], false),
            (gate(None, true, ""), &bad, true),
            (gate(None, true, ""), &good, false),
            (gate(Some(4.0), false, ""), &good, false),
            (gate(Some(4.1), false, ""), &good, true),
            (gate(Some(1.0), false, ""), &none, true),
            (
                gate(
                    None,
                    false,
                    "data.scores['a'] >= 4.0 && data.statuses['b'] == 'done'",
                ),
                &good,
                false,
            ),
            (
                gate(None, false, "data.statuses['b'] == 'done'"),
                &bad,
                true,
            ),
            (gate(None, false, "mission.data.strict"), &good, false),
            (gate(None, false, "data.nothing.there"), &good, true),
            (gate(Some(3.0), true, "data.avgScore < 3.0"), &good, true),
        ] {
            let judgement = gate.judge(ends, &json!({"data": {"strict": true}}));
            assert_eq!(judgement.closed.is_some(), closed, "{gate:?} {judgement:?}");
        }
    }

    #[test]
    fn a_run_passes_when_all_is_done_and_the_weighted_score_reaches_the_threshold() {
        use TaskStatus::{Done, Failed};
        let ends = [
            end("a", Done, Some(5.0), 1.0),
            end("b", Done, Some(3.0), 3.0),
            end("c", Done, None, 9.0),
        ];
        assert!(Verdict::of(&ends, 3.5).passed());
        let verdict = Verdict::of(&ends, 3.6);
        assert_eq!(verdict.below, Some(3.5));
        assert!(verdict.trouble(&ends, 3.6).unwrap().contains("3.50"));
        assert!(Verdict::of(&[end("a", Done, None, 1.0)], 5.0).passed());
        assert!(Verdict::of(&[end("a", Done, Some(1.0), 0.0)], 5.0).passed());
        let failed = [end("a", Failed, None, 1.0), end("b", Failed, None, 1.0)];
        let verdict = Verdict::of(&failed, 3.0);
        assert!(!verdict.passed());
        assert_eq!(
            verdict.trouble(&failed, 3.0).unwrap(),
            "Task \"a\" failed: It broke. So did 1 more."
        );
    }

    #[test]
    fn a_report_adds_up_what_the_tasks_came_to() {
        let mut ends = [
            end("a", TaskStatus::Done, Some(4.0), 1.0),
            end("b", TaskStatus::Failed, None, 1.0),
        ];
        let outcome = json!({"id": "o", "type": "text", "label": "Notes", "text": "x".repeat(INLINE + 1), "producedAt": "2026-04-07T12:00:00Z"});
        ends[0]
            .outcomes
            .push(serde_json::from_value(outcome).unwrap());
        let verdict = Verdict::of(&ends, 3.0);
        let report = report(Id::new(), "g", verdict.passed(), &ends);
        assert_eq!(report["totalDuration"], 20);
        assert_eq!(report["avgScore"], 4.0);
        assert_eq!(report["allPassed"], false);
        assert_eq!(report["tasks"][1]["reason"], "It broke.");
        assert_eq!(report["outcomes"][0]["label"], "Notes");
        assert!(report["outcomes"][0].get("text").is_none());
    }
}
