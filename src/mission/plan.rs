//! The graph of a mission: what its tasks have to do with each other, checked and put in order.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use super::document::{Barrier, BarrierList, Document};

/// The most titles that one fault names.
const NAMED: usize = 3;
/// The most links between tasks, and between tasks and barriers.
const MOST_LINKS: usize = 50_000;

/// A document's graph. Tasks and barriers are named by their index in the document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The tasks, each after everything that it needs; else in the document's order.
    pub order: Vec<usize>,
    /// What each task needs, by the task's index.
    pub needs: Vec<Vec<usize>>,
    /// The barriers.
    pub barriers: Vec<Links>,
}

/// The tasks that a barrier has to do with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Links {
    /// Those that it follows.
    pub after: Vec<usize>,
    /// Those that it holds back.
    pub holds: Vec<usize>,
}

impl Plan {
    /// Checks a document's graph (contract 2.8.2).
    ///
    /// # Errors
    /// Every fault: no task, a title twice, an unknown title, a cycle, a barrier's name twice, or a task that a barrier holds
    /// back without needing what the barrier follows: it could begin before the barrier is reached.
    pub fn new(document: &Document) -> Result<Self, Vec<String>> {
        let mut faults = Vec::new();
        if document.tasks.is_empty() {
            faults.push("tasks: a mission needs at least one task".to_owned());
        }
        let mut titles: HashMap<&str, usize> = HashMap::new();
        for (index, task) in document.tasks.iter().enumerate() {
            // One without a title is a fault already.
            if !task.title.is_empty() && titles.insert(&task.title, index).is_some() {
                faults.push(format!(
                    "tasks[{index}].title: \"{}\" occurs twice",
                    task.title
                ));
            }
        }
        let links: usize = document
            .tasks
            .iter()
            .map(|task| task.depends_on.len())
            .sum();
        let held: usize = document
            .barriers
            .iter()
            .map(|barrier| barrier.after_tasks.len() + barrier.blocks_tasks.len())
            .sum();
        if links + held > MOST_LINKS {
            faults.push(format!(
                "tasks: at most {MOST_LINKS} links between tasks and barriers"
            ));
            return Err(faults);
        }
        let needs = needs(document, &titles, &mut faults);
        let barriers = barriers(document, &titles, &needs, &mut faults);
        let order = order(document, &needs, &mut faults);
        if faults.is_empty() {
            Ok(Self {
                order,
                needs,
                barriers,
            })
        } else {
            Err(faults)
        }
    }

    /// The tasks that can begin at once, in their order: they need nothing, and nothing holds them back.
    pub fn first(&self) -> Vec<usize> {
        let held: HashSet<usize> = self
            .barriers
            .iter()
            .flat_map(|barrier| barrier.holds.iter().copied())
            .collect();
        let free = |task: &usize| self.needs[*task].is_empty() && !held.contains(task);
        self.order.iter().copied().filter(free).collect()
    }
}

fn needs(
    document: &Document,
    titles: &HashMap<&str, usize>,
    faults: &mut Vec<String>,
) -> Vec<Vec<usize>> {
    let mut needs = Vec::with_capacity(document.tasks.len());
    for (index, task) in document.tasks.iter().enumerate() {
        let mut of_task = Vec::with_capacity(task.depends_on.len());
        for title in &task.depends_on {
            match titles.get(title.as_str()) {
                Some(need) if *need == index => faults.push(format!(
                    "tasks[{index}].dependsOn: \"{title}\" cannot need itself"
                )),
                Some(need) => of_task.push(*need),
                None => faults.push(format!(
                    "tasks[{index}].dependsOn: there is no task \"{title}\" in this mission"
                )),
            }
        }
        needs.push(of_task);
    }
    needs
}

fn barriers(
    document: &Document,
    titles: &HashMap<&str, usize>,
    needs: &[Vec<usize>],
    faults: &mut Vec<String>,
) -> Vec<Links> {
    let mut names: HashSet<(BarrierList, &str)> = HashSet::new();
    let mut all = Vec::with_capacity(document.barriers.len());
    for barrier in &document.barriers {
        let place = format!("{} \"{}\"", barrier.list().member(), barrier.name);
        if !barrier.name.is_empty() && !names.insert((barrier.list(), &barrier.name)) {
            faults.push(format!("{place}: the name occurs twice"));
        }
        let mut found = |member: &str, named: &[String]| -> Vec<usize> {
            let mut found = Vec::with_capacity(named.len());
            for title in named {
                match titles.get(title.as_str()) {
                    Some(index) => found.push(*index),
                    None => faults.push(format!(
                        "{place}.{member}: there is no task \"{title}\" in this mission"
                    )),
                }
            }
            found
        };
        let links = Links {
            after: found("afterTasks", &barrier.after_tasks),
            holds: found("blocksTasks", &barrier.blocks_tasks),
        };
        check_holds(document, barrier, &place, &links, needs, faults);
        all.push(links);
    }
    all
}

fn check_holds(
    document: &Document,
    barrier: &Barrier,
    place: &str,
    links: &Links,
    needs: &[Vec<usize>],
    faults: &mut Vec<String>,
) {
    for held in &links.holds {
        let missing: Vec<String> = links
            .after
            .iter()
            .filter(|after| *after != held && !needs[*held].contains(after))
            .map(|after| format!("\"{}\"", document.tasks[*after].title))
            .take(NAMED + 1)
            .collect();
        let more = if missing.len() > NAMED {
            " and more"
        } else {
            ""
        };
        let title = &document.tasks[*held].title;
        if barrier.after_tasks.contains(title) {
            faults.push(format!("{place}: \"{title}\" cannot wait for itself"));
        } else if !missing.is_empty() {
            faults.push(format!(
                "{place}.blocksTasks: \"{title}\" must list {}{more} in its `dependsOn`, or it would begin too early",
                missing[..missing.len().min(NAMED)].join(", ")
            ));
        }
    }
}

/// Kahn's algorithm; of the tasks that could come next the document's first does.
fn order(document: &Document, needs: &[Vec<usize>], faults: &mut Vec<String>) -> Vec<usize> {
    let mut missing: Vec<usize> = needs.iter().map(Vec::len).collect();
    let mut dependents: Vec<Vec<usize>> = vec![Vec::new(); needs.len()];
    for (task, of_task) in needs.iter().enumerate() {
        for need in of_task {
            dependents[*need].push(task);
        }
    }
    let mut free: BinaryHeap<Reverse<usize>> = (0..needs.len())
        .filter(|task| missing[*task] == 0)
        .map(Reverse)
        .collect();
    let mut order = Vec::with_capacity(needs.len());
    while let Some(Reverse(task)) = free.pop() {
        order.push(task);
        for dependent in &dependents[task] {
            missing[*dependent] -= 1;
            if missing[*dependent] == 0 {
                free.push(Reverse(*dependent));
            }
        }
    }
    if order.len() < needs.len() {
        let cycle: Vec<String> = cycle(needs, &missing)
            .into_iter()
            .map(|task| format!("\"{}\"", document.tasks[task].title))
            .collect();
        faults.push(format!(
            "tasks: {} need each other in a circle",
            cycle.join(" → ")
        ));
    }
    order
}

/// A circle among the tasks that still miss something: from any of them, following needs leads into one.
fn cycle(needs: &[Vec<usize>], missing: &[usize]) -> Vec<usize> {
    let Some(mut task) = (0..needs.len()).find(|task| missing[*task] > 0) else {
        return Vec::new();
    };
    let mut path: Vec<usize> = Vec::new();
    let mut place: HashMap<usize, usize> = HashMap::new();
    loop {
        if let Some(begin) = place.insert(task, path.len()) {
            path.push(task);
            return path.split_off(begin);
        }
        path.push(task);
        match needs[task].iter().find(|need| missing[**need] > 0) {
            Some(need) => task = *need,
            None => return path,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn document(value: &Value) -> Document {
        Document::parse(value.as_object().unwrap()).unwrap()
    }

    fn tasks(needs: &[(&str, &[&str])]) -> Value {
        let task = |(title, needs): &(&str, &[&str])| json!({"title": title, "description": "d", "assignTo": "a", "dependsOn": needs});
        json!(needs.iter().map(task).collect::<Vec<_>>())
    }

    #[test]
    fn every_fault_of_a_graph_is_reported() {
        let faults = Plan::new(&document(&json!({
            "tasks": tasks(&[("a", &["d"]), ("b", &["a"]), ("d", &["b"]), ("b", &[]), ("e", &["e", "x"]), ("f", &[])]),
            "checkpoints": [
                {"name": "c", "afterTasks": ["f"], "blocksTasks": ["b", "e"]},
                {"name": "c", "afterTasks": ["y"], "blocksTasks": ["f"]},
            ],
            "delays": [{"name": "c", "afterTasks": ["f"], "blocksTasks": ["f"], "duration": "PT1S"}],
        })))
        .unwrap_err();
        for words in [
            "tasks[3].title: \"b\" occurs twice",
            "tasks[4].dependsOn: \"e\" cannot need itself",
            "tasks[4].dependsOn: there is no task \"x\"",
            "checkpoints \"c\".blocksTasks: \"e\" must list \"f\"",
            "checkpoints \"c\": the name occurs twice",
            "checkpoints \"c\".afterTasks: there is no task \"y\"",
            "delays \"c\": \"f\" cannot wait for itself",
        ] {
            assert!(
                faults.iter().any(|fault| fault.starts_with(words)),
                "{words} is missing in {faults:#?}"
            );
        }
        let none = Plan::new(&document(&json!({"tasks": []}))).unwrap_err();
        assert_eq!(none, ["tasks: a mission needs at least one task"]);
    }

    #[test]
    fn a_circle_is_named() {
        let document = document(
            &json!({"tasks": tasks(&[("start", &[]), ("a", &["start", "c"]), ("b", &["a"]), ("c", &["b"]), ("end", &["c"])])}),
        );
        assert_eq!(
            Plan::new(&document).unwrap_err(),
            ["tasks: \"a\" → \"c\" → \"b\" → \"a\" need each other in a circle"]
        );
    }

    #[test]
    fn the_order_is_the_documents_where_it_can_be() {
        let plan = Plan::new(&document(&json!({
            "tasks": tasks(&[("late", &["early"]), ("free", &[]), ("early", &[]), ("held", &["free"])]),
            "checkpoints": [{"name": "c", "afterTasks": ["free"], "blocksTasks": ["held"]}],
        })))
        .unwrap();
        assert_eq!(plan.order, [1, 2, 0, 3]);
        assert_eq!(plan.first(), [1, 2]);
    }

    /// A document without a circle: each task needs some of those before it, under a shuffled order; barriers follow what
    /// the tasks that they hold back need.
    fn acyclic() -> impl Strategy<Value = Document> {
        (1_usize..40)
            .prop_flat_map(|size| {
                let needs = prop::collection::vec(prop::collection::vec(any::<prop::sample::Index>(), 0..4), size);
                let shuffle = Just((0..size).collect::<Vec<_>>()).prop_shuffle();
                let held = prop::collection::vec((any::<prop::sample::Index>(), 0_usize..3), 0..6);
                (needs, shuffle, held)
            })
            .prop_map(|(needs, shuffle, held)| {
                let size = shuffle.len();
                let mut tasks = vec![Value::Null; size];
                let mut depends: Vec<Vec<String>> = vec![Vec::new(); size];
                for (rank, place) in shuffle.iter().enumerate() {
                    let mut of_task: Vec<String> = needs[rank]
                        .iter()
                        .filter(|_| rank > 0)
                        .map(|need| format!("t{}", shuffle[need.index(rank)]))
                        .collect();
                    of_task.sort();
                    of_task.dedup();
                    depends[*place].clone_from(&of_task);
                    tasks[*place] = json!({"title": format!("t{place}"), "description": "d", "assignTo": "a", "dependsOn": of_task});
                }
                let mut lists = json!({"checkpoints": [], "qualityGates": [], "delays": []});
                for (number, (task, kind)) in held.iter().enumerate() {
                    let task = task.index(size);
                    if depends[task].is_empty() {
                        continue;
                    }
                    let list = ["checkpoints", "qualityGates", "delays"][*kind];
                    lists[list].as_array_mut().unwrap().push(json!({
                        "name": format!("b{number}"), "afterTasks": depends[task], "blocksTasks": [format!("t{task}")], "duration": "PT1S",
                    }));
                }
                let mut whole = json!({"tasks": tasks});
                whole.as_object_mut().unwrap().extend(lists.as_object().unwrap().clone());
                document(&whole)
            })
    }

    proptest! {
        /// For any document without a circle: every task runs once and never before its needs or through a barrier,
        /// in whatever order tasks end and fail, and the mission ends. A task whose need failed is resolved by failing.
        #[test]
        fn any_acyclic_mission_ends_with_every_task_run_at_most_once(
            document in acyclic(),
            choices in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 200),
        ) {
            let plan = Plan::new(&document).unwrap();
            let mut ended: HashMap<usize, bool> = HashMap::new();
            let mut begun: HashSet<usize> = HashSet::new();
            let mut lifted: HashSet<usize> = HashSet::new();
            let mut under_way: Vec<usize> = plan.first();
            begun.extend(&under_way);
            let mut choices = choices.into_iter();
            while !under_way.is_empty() {
                let (place, well) = choices.next().map_or((0, true), |(which, well)| (which.index(under_way.len()), well));
                let task = under_way.swap_remove(place);
                prop_assert!(plan.needs[task].iter().all(|need| ended.get(need) == Some(&true)), "{task} began before its needs");
                prop_assert!(ended.insert(task, well).is_none(), "{task} ran twice");
                loop {
                    let before = (ended.len(), lifted.len(), begun.len());
                    for (number, barrier) in plan.barriers.iter().enumerate() {
                        if barrier.after.iter().all(|after| ended.contains_key(after)) {
                            lifted.insert(number);
                        }
                    }
                    for next in 0..plan.needs.len() {
                        let held = plan.barriers.iter().enumerate().any(|(number, barrier)| !lifted.contains(&number) && barrier.holds.contains(&next));
                        if begun.contains(&next) || ended.contains_key(&next) || held {
                            continue;
                        }
                        if plan.needs[next].iter().any(|need| ended.get(need) == Some(&false)) {
                            ended.insert(next, false);
                        } else if plan.needs[next].iter().all(|need| ended.get(need) == Some(&true)) {
                            begun.insert(next);
                            under_way.push(next);
                        }
                    }
                    if before == (ended.len(), lifted.len(), begun.len()) {
                        break;
                    }
                }
            }
            prop_assert_eq!(ended.len(), plan.needs.len(), "the mission hangs");
            let place: HashMap<usize, usize> = plan.order.iter().enumerate().map(|(place, task)| (*task, place)).collect();
            prop_assert_eq!(place.len(), plan.needs.len());
            for (task, needs) in plan.needs.iter().enumerate() {
                prop_assert!(needs.iter().all(|need| place[need] < place[&task]));
            }
        }
    }
}
