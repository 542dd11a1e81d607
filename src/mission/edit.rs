//! Edits of a definition's parts (contract 2.8.9). Whatever they leave is checked as a whole, like a new one.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::document::{BarrierList, Document};
use super::plan::Plan;

/// Why an edit was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EditError {
    /// There is no such part; a sentence.
    #[error("{0}")]
    Missing(String),
    /// It clashes with what is there; a sentence.
    #[error("{0}")]
    Conflict(String),
    /// What it would leave is no mission: every fault.
    #[error("the definition would be faulty")]
    Faults(Vec<String>),
}

type Result<T> = std::result::Result<T, EditError>;

impl Document {
    /// Reads a definition and checks its graph.
    ///
    /// # Errors
    /// Every fault, of its members and of the graph.
    pub fn check(members: &Map<String, Value>) -> std::result::Result<(Self, Plan), Vec<String>> {
        let (document, mut faults) = Self::read(members);
        if document.tasks.is_empty() && !faults.is_empty() {
            return Err(faults);
        }
        match Plan::new(&document) {
            Ok(plan) if faults.is_empty() => Ok((document, plan)),
            Ok(_) => Err(faults),
            Err(found) => {
                faults.extend(found);
                Err(faults)
            }
        }
    }

    /// Adds a task.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn add_task(&self, task: Map<String, Value>) -> Result<Self> {
        self.add("tasks", "title", "Task", task)
    }

    /// Changes a task: what is absent stays, what is null goes. A new title is put in the place of the old one everywhere.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn change_task(&self, title: &str, change: Map<String, Value>) -> Result<Self> {
        let renamed = change
            .get("title")
            .and_then(Value::as_str)
            .filter(|new| *new != title)
            .map(str::to_owned);
        if let Some(new) = &renamed
            && self.tasks.iter().any(|task| task.title == *new)
        {
            return Err(EditError::Conflict(taken("Task", new)));
        }
        let mut members = self.members();
        merge(part(&mut members, "tasks", "title", "Task", title)?, change);
        if let Some(new) = renamed {
            each_title(&mut members, &mut |titles| {
                for other in titles.iter_mut().filter(|other| *other == title) {
                    *other = json!(new);
                }
            });
        }
        checked(&members)
    }

    /// Removes a task, and its title wherever it is named; barriers that follow or hold nothing any more vanish.
    ///
    /// # Errors
    /// [`EditError`]; the last task stays.
    pub fn remove_task(&self, title: &str) -> Result<Self> {
        if self.tasks.len() == 1 && self.tasks[0].title == title {
            return Err(EditError::Conflict(
                "A mission needs at least one task: add another before you remove this one."
                    .to_owned(),
            ));
        }
        let mut members = self.members();
        remove(&mut members, "tasks", "title", "Task", title)?;
        each_title(&mut members, &mut |titles| {
            titles.retain(|other| other != title)
        });
        for list in BarrierList::ALL {
            if let Some(barriers) = members.get_mut(list.member()).and_then(Value::as_array_mut) {
                barriers.retain(|barrier| {
                    barrier["afterTasks"] != json!([]) && barrier["blocksTasks"] != json!([])
                });
            }
        }
        checked(&members)
    }

    /// Puts the tasks in another order.
    ///
    /// # Errors
    /// When `titles` does not name every task once.
    pub fn reorder(&self, titles: &[String]) -> Result<Self> {
        let mut tasks = self.tasks.clone();
        let places: HashMap<&str, usize> = titles
            .iter()
            .enumerate()
            .map(|(place, title)| (title.as_str(), place))
            .collect();
        if places.len() != tasks.len()
            || titles.len() != tasks.len()
            || tasks
                .iter()
                .any(|task| !places.contains_key(task.title.as_str()))
        {
            return Err(EditError::Faults(vec![
                "titles: must name every task of the mission once".to_owned(),
            ]));
        }
        tasks.sort_by_key(|task| places.get(task.title.as_str()).copied());
        Ok(Self {
            tasks,
            ..self.clone()
        })
    }

    /// Adds a barrier.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn add_barrier(&self, list: BarrierList, barrier: Map<String, Value>) -> Result<Self> {
        self.add(list.member(), "name", list.noun(), barrier)
    }

    /// Changes a barrier: what is absent stays, what is null goes.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn change_barrier(
        &self,
        list: BarrierList,
        name: &str,
        change: Map<String, Value>,
    ) -> Result<Self> {
        self.change(list.member(), list.noun(), name, change)
    }

    /// Removes a barrier.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn remove_barrier(&self, list: BarrierList, name: &str) -> Result<Self> {
        let mut members = self.members();
        remove(&mut members, list.member(), "name", list.noun(), name)?;
        checked(&members)
    }

    /// Adds a member to the team.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn add_member(&self, member: Map<String, Value>) -> Result<Self> {
        self.in_team(|team| team.add("agents", "name", "Member", member))
    }

    /// Changes a member of the team: what is absent stays, what is null goes.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn change_member(&self, name: &str, change: Map<String, Value>) -> Result<Self> {
        self.in_team(|team| {
            let renamed = change.get("name").and_then(Value::as_str);
            if renamed.is_some_and(|new| new != name) {
                return Err(EditError::Faults(vec![
                    "name: a member is not renamed; remove it and add another".to_owned(),
                ]));
            }
            merge(part(&mut team.0, "agents", "name", "Member", name)?, change);
            Ok(())
        })
    }

    /// Removes a member of the team.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn remove_member(&self, name: &str) -> Result<Self> {
        self.in_team(|team| remove(&mut team.0, "agents", "name", "Member", name))
    }

    /// Puts other notification rules in place of the earlier ones.
    ///
    /// # Errors
    /// When they are no object.
    pub fn with_notifications(&self, rules: Option<Value>) -> Result<Self> {
        let mut members = self.members();
        members.insert("notifications".to_owned(), rules.unwrap_or_default());
        checked(&members)
    }

    fn in_team(&self, edit: impl FnOnce(&mut Members) -> Result<()>) -> Result<Self> {
        let mut members = self.members();
        let mut team = match members.remove("team") {
            Some(Value::Object(team)) => Members(team),
            _ => Members(Map::from_iter([("agents".to_owned(), json!([]))])),
        };
        edit(&mut team)?;
        members.insert("team".to_owned(), Value::Object(team.0));
        checked(&members)
    }

    fn add(&self, list: &str, key: &str, noun: &str, item: Map<String, Value>) -> Result<Self> {
        let mut members = Members(self.members());
        members.add(list, key, noun, item)?;
        checked(&members.0)
    }

    fn change(
        &self,
        list: &str,
        noun: &str,
        name: &str,
        change: Map<String, Value>,
    ) -> Result<Self> {
        let mut members = self.members();
        let renamed = change.get("name").and_then(Value::as_str);
        if let Some(new) = renamed.filter(|new| *new != name)
            && find(&members, list, "name", new).is_some()
        {
            return Err(EditError::Conflict(taken(noun, new)));
        }
        merge(part(&mut members, list, "name", noun, name)?, change);
        checked(&members)
    }
}

/// An object whose members hold lists.
struct Members(Map<String, Value>);

impl Members {
    fn add(&mut self, list: &str, key: &str, noun: &str, item: Map<String, Value>) -> Result<()> {
        if let Some(name) = item.get(key).and_then(Value::as_str)
            && find(&self.0, list, key, name).is_some()
        {
            return Err(EditError::Conflict(taken(noun, name)));
        }
        let items = self.0.entry(list).or_insert_with(|| json!([]));
        if let Value::Array(items) = items {
            items.push(Value::Object(item));
        }
        Ok(())
    }
}

fn taken(noun: &str, name: &str) -> String {
    format!("{noun} \"{name}\" is there already. Choose another name, or change that one.")
}

fn find(members: &Map<String, Value>, list: &str, key: &str, name: &str) -> Option<usize> {
    let items = members.get(list)?.as_array()?;
    items.iter().position(|item| item[key] == name)
}

fn part<'a>(
    members: &'a mut Map<String, Value>,
    list: &str,
    key: &str,
    noun: &str,
    name: &str,
) -> Result<&'a mut Map<String, Value>> {
    let found = find(members, list, key, name);
    let item = found.and_then(|index| members.get_mut(list)?.get_mut(index)?.as_object_mut());
    item.ok_or_else(|| missing(noun, name))
}

fn missing(noun: &str, name: &str) -> EditError {
    EditError::Missing(format!("{noun} \"{name}\" not found"))
}

fn remove(
    members: &mut Map<String, Value>,
    list: &str,
    key: &str,
    noun: &str,
    name: &str,
) -> Result<()> {
    let index = find(members, list, key, name).ok_or_else(|| missing(noun, name))?;
    if let Some(items) = members.get_mut(list).and_then(Value::as_array_mut) {
        items.remove(index);
    }
    Ok(())
}

fn merge(into: &mut Map<String, Value>, change: Map<String, Value>) {
    for (name, value) in change {
        if value.is_null() {
            into.remove(&name);
        } else {
            into.insert(name, value);
        }
    }
}

/// Every list of titles that names other tasks.
fn each_title(members: &mut Map<String, Value>, act: &mut dyn FnMut(&mut Vec<Value>)) {
    let lists = BarrierList::ALL.map(BarrierList::member);
    for list in ["tasks"].into_iter().chain(lists) {
        for item in members
            .get_mut(list)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            for member in ["dependsOn", "afterTasks", "blocksTasks"] {
                if let Some(titles) = item.get_mut(member).and_then(Value::as_array_mut) {
                    act(titles);
                }
            }
        }
    }
}

fn checked(members: &Map<String, Value>) -> Result<Document> {
    Document::check(members)
        .map(|(document, _)| document)
        .map_err(EditError::Faults)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document() -> Document {
        let given = json!({
            "tasks": [
                {"title": "A", "description": "a", "assignTo": "x"},
                {"title": "B", "description": "b", "assignTo": "x", "dependsOn": ["A"]},
                {"title": "C", "description": "c", "assignTo": "x", "dependsOn": ["A", "B"]},
            ],
            "checkpoints": [{"name": "c", "afterTasks": ["A"], "blocksTasks": ["B"]}],
            "delays": [{"name": "d", "afterTasks": ["A", "B"], "blocksTasks": ["C"], "duration": "PT1S"}],
        });
        Document::check(given.as_object().unwrap()).unwrap().0
    }

    fn object(value: Value) -> Map<String, Value> {
        let Value::Object(object) = value else {
            panic!("an object was meant");
        };
        object
    }

    #[test]
    fn removing_a_task_removes_its_title_everywhere_and_barriers_that_are_left_empty() {
        let left = document().remove_task("A").unwrap().members();
        assert!(left["tasks"][0].get("dependsOn").is_none());
        assert_eq!(left["tasks"][1]["dependsOn"], json!(["B"]));
        assert_eq!(left["checkpoints"], json!([]));
        assert_eq!(left["delays"][0]["afterTasks"], json!(["B"]));
        let one = document()
            .remove_task("A")
            .unwrap()
            .remove_task("B")
            .unwrap();
        assert!(matches!(one.remove_task("C"), Err(EditError::Conflict(_))));
        assert!(matches!(one.remove_task("A"), Err(EditError::Missing(_))));
    }

    #[test]
    fn a_renamed_task_is_renamed_everywhere() {
        let changed = document()
            .change_task(
                "A",
                object(json!({"title": "A2", "priority": 3, "maxRetries": null})),
            )
            .unwrap()
            .members();
        assert_eq!(changed["tasks"][0]["priority"], 3.0);
        assert_eq!(changed["tasks"][2]["dependsOn"], json!(["A2", "B"]));
        assert_eq!(changed["checkpoints"][0]["afterTasks"], json!(["A2"]));
        assert!(matches!(
            document().change_task("A", object(json!({"title": "B"}))),
            Err(EditError::Conflict(_))
        ));
    }

    #[test]
    fn an_edit_that_leaves_a_faulty_mission_is_refused_with_its_faults() {
        let document = document();
        let Err(EditError::Faults(faults)) =
            document.change_task("B", object(json!({"dependsOn": ["C"]})))
        else {
            panic!("it must be refused");
        };
        assert_eq!(faults.len(), 2, "{faults:?}");
        for (result, missing) in [
            (document.add_task(object(json!({"title": "A"}))), false),
            (
                document.add_barrier(BarrierList::Checkpoints, object(json!({"name": "c"}))),
                false,
            ),
            (
                document.change_barrier(BarrierList::Gates, "c", Map::new()),
                true,
            ),
            (document.remove_barrier(BarrierList::Delays, "c"), true),
            (document.change_member("x", Map::new()), true),
        ] {
            match result {
                Err(EditError::Missing(_)) => assert!(missing),
                Err(EditError::Conflict(_)) => assert!(!missing),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn the_team_begins_with_its_first_member_and_the_order_is_any_of_all_titles() {
        let document = document();
        let team = document
            .add_member(object(json!({"name": "n", "model": "echo"})))
            .unwrap();
        let team = team
            .change_member("n", object(json!({"role": "r", "model": null})))
            .unwrap();
        assert_eq!(
            json!(team.members()["team"]["agents"]),
            json!([{"name": "n", "role": "r"}])
        );
        assert!(
            team.remove_member("n")
                .unwrap()
                .team
                .unwrap()
                .agents
                .is_empty()
        );
        let order = |titles: &[&str]| {
            let titles: Vec<String> = titles.iter().map(|title| (*title).to_owned()).collect();
            document.reorder(&titles)
        };
        assert_eq!(order(&["C", "A", "B"]).unwrap().tasks[0].title, "C");
        assert!(
            order(&["C", "A"]).is_err()
                && order(&["C", "A", "A"]).is_err()
                && order(&["C", "A", "B", "A"]).is_err()
        );
    }
}
