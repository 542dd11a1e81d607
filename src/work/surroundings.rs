//! What a task's agent is told of the work around it: the mission that it is part of (contract 2.6.3, step 3), and what the
//! tasks came to that it waited for.

use serde_json::{Value, json};

use super::Result;
use crate::store::{NeedResult, ProjectDb};
use crate::task::{Place, Task, cut};

/// The most tasks of a mission that are listed.
const SIBLINGS: i64 = 40;
/// The most results of other tasks that are shown, and the most bytes of all of them.
const RESULTS: i64 = 50;
const BYTES: usize = 64 * 1024;

/// Everything around a task, as paragraphs of its prompt.
pub(super) async fn surroundings(db: &ProjectDb, task: &Task) -> Result<Vec<String>> {
    let mut told = Vec::new();
    if let Some(place) = task.mission {
        told.push(mission(db, place).await?);
    }
    if !task.document.depends_on.is_empty() {
        told.extend(results(&db.need_results(task.id, RESULTS).await?));
    }
    Ok(told)
}

async fn mission(db: &ProjectDb, place: Place) -> Result<String> {
    let context = db.mission_context(place).await?;
    let name = context["name"].as_str().unwrap_or_default();
    let mut told = format!("The task is part of the mission \"{name}\".");
    if let Some(prompt) = context["prompt"].as_str() {
        told += &format!("\n<mission-goal>\n{prompt}\n</mission-goal>");
    }
    if context["data"].is_object() {
        told += &format!("\n<mission-data>\n{}\n</mission-data>", context["data"]);
    }
    let siblings = db.siblings(place, SIBLINGS + 1).await?;
    told += "\n<mission-tasks>";
    let shown = usize::try_from(SIBLINGS).unwrap_or_default();
    for sibling in siblings.iter().take(shown) {
        told += &format!("\n- {} ({})", sibling.title, sibling.status);
    }
    if siblings.len() > shown {
        told += "\n- and more";
    }
    told += "\n</mission-tasks>";
    Ok(told)
}

/// Each has its share, so that one that is long leaves the others theirs; what does not fit is cut, and said to be.
fn results(needs: &[NeedResult]) -> Option<String> {
    let share = BYTES / needs.len().max(1);
    let mut told = String::new();
    for need in needs {
        let outcomes = match &need.outcomes {
            Some(Value::Array(outcomes)) if !outcomes.is_empty() => {
                format!("\noutcomes: {}", json!(outcomes))
            }
            _ => String::new(),
        };
        let said = need.stdout.as_deref().unwrap_or_default();
        let one = cut(format!("{said}{outcomes}"), share);
        told += &format!("\n<result of=\"{}\">\n{one}\n</result>", need.title);
    }
    (!told.is_empty()).then(|| format!("The tasks that it waited for came to this:{told}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_shown_up_to_a_bound_and_the_rest_is_said_to_be_missing() {
        let need = |title: &str, stdout: &str| NeedResult {
            title: title.to_owned(),
            stdout: Some(stdout.to_owned()),
            outcomes: Some(json!([{"label": "Notes"}])),
        };
        assert_eq!(results(&[]), None);
        let told = results(&[need("A", "one")]).unwrap();
        assert!(
            told.contains("<result of=\"A\">\none\noutcomes: [{\"label\":\"Notes\"}]"),
            "{told}"
        );
        let long = "ö".repeat(BYTES);
        let told = results(&[need("A", &long), need("B", "two")]).unwrap();
        assert!(told.contains("[cut here: it is longer]") && told.contains("\ntwo\noutcomes:"));
        assert!(told.len() < BYTES + 500);
    }
}
