//! The beginning of a run (contract 2.8.3): agents, tasks, barriers and the first jobs, in one commit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chrono::{DateTime, Duration, Utc};
use serde_json::json;

use super::super::approve::request_approval;
use super::super::{LifecycleError, Result};
use super::gate::{Asked, Operation, Particulars, ask_leave, tell_withdrawn};
use super::{next_look, wrong_state};
use crate::ids::{self, Id};
use crate::mission::{Document, Mission, Plan, Status, TaskDefinition, Team, group};
use crate::store::{Job, NewAgent, NewBarrier, NewMissionRun, ProjectDb, ProjectTx, ScheduleRow};
use crate::task::{
    Bypass, Closed, Document as TaskDocument, Expectation, Gate, Hook, Place, Settings,
    Status as TaskStatus, Task,
};

/// A run that has begun.
#[derive(Debug)]
pub struct Execution {
    /// Its tasks, each after what it needs.
    pub tasks: Vec<Task>,
    /// Their label.
    pub group: String,
    /// Which run it is.
    pub place: Place,
}

/// What came of an attempt to begin a run.
#[derive(Debug)]
pub(in super::super) enum Begun {
    /// It has begun.
    Run(Execution),
    /// A person is asked first.
    Waits(Asked),
}

/// On what occasion a run begins.
#[derive(Debug, Clone, Copy, Default)]
pub(in super::super) struct Occasion<'a> {
    /// The schedule that begins it.
    pub(in super::super) schedule: Option<&'a ScheduleRow>,
    /// The gates that are open for it already.
    pub(in super::super) passed: &'a [String],
}

/// Begins a run of a mission.
///
/// # Errors
/// 409 while it runs and when it is completed, and when a person is asked first; [`LifecycleError::Invalid`] for a task whose agent does
/// not exist.
pub async fn execute(db: &ProjectDb, id: Id<ids::Mission>) -> Result<Execution> {
    let mut tx = db.begin();
    let mut mission = tx.lock_mission(id).await?;
    let begun = begin_run(&mut tx, db, &mut mission, Occasion::default(), Utc::now()).await?;
    settle(tx, &mut mission, begun).await
}

/// Commits what came of an attempt: the request too, for which there is no run.
async fn settle(mut tx: ProjectTx, mission: &mut Mission, begun: Begun) -> Result<Execution> {
    let execution = match begun {
        Begun::Run(execution) => Ok(execution),
        Begun::Waits(asked) => {
            mission.reason = Some(asked.sentence.clone());
            Err(asked.refusal(mission))
        }
    };
    tx.save_mission(mission).await?;
    tx.commit().await?;
    execution
}

/// Makes a mission under a free name and executes it, in one commit.
///
/// # Errors
/// As [`execute`].
pub async fn launch(
    db: &ProjectDb,
    base: &str,
    document: &Document,
) -> Result<(Mission, Execution)> {
    let mut tx = db.begin();
    let name = tx.free_mission_name(base).await?;
    let mut mission = Mission::new(name, Utc::now());
    mission.tell_saved();
    tx.create_mission(&mut mission, document)
        .await
        .map_err(|error| super::taken(error, &mission.name))?;
    let begun = begin_run(&mut tx, db, &mut mission, Occasion::default(), Utc::now()).await?;
    let execution = settle(tx, &mut mission, begun).await?;
    Ok((mission, execution))
}

/// Begins a run, for a schedule or a person, unless a gate stands in its way. The mission must be held, and stored after this.
pub(in super::super) async fn begin_run(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    mission: &mut Mission,
    occasion: Occasion<'_>,
    now: DateTime<Utc>,
) -> Result<Begun> {
    if !mission.status().can_execute() {
        let deed = match mission.status() {
            Status::Completed => "executed; PATCH its `status` to `draft` to use it again",
            _ => "executed; it runs already",
        };
        return Err(wrong_state(mission, deed));
    }
    let members = tx.mission_definition(mission.id).await?;
    let (document, plan) = Document::check(&members).map_err(LifecycleError::Faults)?;
    let settings = db.settings().await?;
    let schedule = occasion.schedule;
    let place = Place {
        mission: mission.id,
        run: mission.execution_count + 1,
    };
    let group = group(&mission.name, place.run);
    let team = document
        .team
        .as_ref()
        .filter(|team| settings.enable_volatile_teams && !team.agents.is_empty());
    let operation = beginning(mission, &document, &occasion, &group, place);
    if operation.is_gated(&settings) {
        // Nobody is asked about what cannot be done.
        agents(tx, &document, team).await?;
        if let Some(asked) = ask_leave(tx, &settings, mission, operation).await? {
            return Ok(Begun::Waits(asked));
        }
    }
    if let Some(schedule) = schedule {
        mission.tell(
            "schedule:triggered",
            json!({"scheduleId": schedule.id, "expression": schedule.expression}),
        );
    }
    mission.execution_count = place.run;
    let deadline = deadline_of(&document, schedule, now);
    if let Some(team) = team {
        bring_team(tx, team, &group).await?;
    }
    let agents = agents(tx, &document, None).await?;
    let new = NewMissionRun {
        place,
        group: &group,
        schedule: schedule.map(|schedule| schedule.id),
        context: &json!({"name": mission.name, "prompt": document.prompt, "data": document.data}),
        quality_threshold: document.threshold(),
        volatile_team: team.is_some_and(|team| team.volatile),
        deadline,
        started_at: now,
    };
    tell_withdrawn(mission, tx.begin_mission_run(&new).await?);
    let made = Made {
        document: &document,
        plan: &plan,
        agents: &agents,
        settings: &settings,
        group: &group,
        place,
    };
    let tasks = made.create(tx, now).await?;
    if let Some(deadline) = deadline {
        let pause = next_look(deadline, now, false, now);
        tx.enqueue(Job::MissionDeadline(mission.id), 1.0, pause)
            .await?;
    }
    mission.go(Status::Active, None)?;
    mission.tell(
        "mission:executed",
        json!({"group": group, "taskCount": tasks.len()}),
    );
    Ok(Begun::Run(Execution {
        tasks,
        group,
        place,
    }))
}

/// The beginning of a run as gates see it.
fn beginning<'a>(
    mission: &Mission,
    document: &Document,
    occasion: &Occasion<'_>,
    group: &str,
    place: Place,
) -> Operation<'a> {
    let hooks: &[Hook] = match occasion.schedule {
        Some(_) => &[Hook::ScheduleTrigger, Hook::MissionExecute],
        None => &[Hook::MissionExecute],
    };
    let schedule = occasion.schedule.map(|schedule| schedule.id);
    Operation {
        hooks,
        run: None,
        mission: json!({
            "id": mission.id, "name": mission.name, "group": group, "run": place.run, "status": mission.status(),
            "data": document.data,
        }),
        data: json!({"taskCount": document.tasks.len(), "scheduleId": schedule}),
        particulars: Particulars {
            schedule,
            barrier: None,
            passed: occasion.passed.to_vec(),
        },
    }
}

/// The earlier of the mission's date, unless that has passed, and its schedule's time after the start.
fn deadline_of(
    document: &Document,
    schedule: Option<&ScheduleRow>,
    now: DateTime<Utc>,
) -> Option<DateTime<Utc>> {
    let offset = schedule
        .and_then(|schedule| schedule.deadline_offset_ms)
        .and_then(|offset| now.checked_add_signed(Duration::milliseconds(offset)));
    let own = document.deadline.filter(|deadline| *deadline > now);
    [offset, own].into_iter().flatten().min()
}

/// Makes those agents of a mission's team that do not exist.
pub(super) async fn bring_team(tx: &mut ProjectTx, team: &Team, group: &str) -> Result<()> {
    let names: Vec<String> = team
        .agents
        .iter()
        .map(|member| member.name.clone())
        .collect();
    let there = tx.agents_named(&names).await?;
    let first = tx.first_team().await?;
    for member in &team.agents {
        if there.iter().any(|(name, _)| *name == member.name) {
            continue;
        }
        let mut definition = member.fields.clone();
        definition.remove("team");
        if team.volatile {
            definition.insert("volatile".to_owned(), json!(true));
            definition.insert("missionGroup".to_owned(), json!(group));
        }
        let new = NewAgent {
            name: &member.name,
            team: &first,
            definition: &definition,
        };
        tx.create_agent_unless_there(&new).await?;
    }
    Ok(())
}

/// The agents that the tasks name, by what they are called there: a name, or an id. Those of a team that is to come are not missed.
async fn agents(
    tx: &mut ProjectTx,
    document: &Document,
    to_come: Option<&Team>,
) -> Result<BTreeMap<String, String>> {
    let comes = |name: &str| {
        to_come.is_some_and(|team| team.agents.iter().any(|member| member.name == name))
    };
    let named: BTreeSet<&str> = document
        .tasks
        .iter()
        .map(|task| task.assign_to.as_str())
        .collect();
    let named: Vec<String> = named.into_iter().map(str::to_owned).collect();
    let found: BTreeMap<String, String> = tx
        .agents_named(&named)
        .await?
        .into_iter()
        .flat_map(|(name, id)| [(id.to_string(), name.clone()), (name.clone(), name)])
        .collect();
    let missing: Vec<String> = named
        .iter()
        .filter(|name| !found.contains_key(*name) && !comes(name))
        .map(|name| format!("\"{name}\""))
        .collect();
    if missing.is_empty() {
        Ok(found)
    } else {
        Err(LifecycleError::Invalid {
            param: "assignTo",
            message: format!(
                "`assignTo`: there is no agent {}. Create it, or name it in the mission's `team`.",
                missing.join(", ")
            ),
        })
    }
}

/// A run's tasks and barriers in the making.
struct Made<'a> {
    document: &'a Document,
    plan: &'a Plan,
    agents: &'a BTreeMap<String, String>,
    settings: &'a Arc<Settings>,
    group: &'a str,
    place: Place,
}

impl Made<'_> {
    async fn create(&self, tx: &mut ProjectTx, now: DateTime<Utc>) -> Result<Vec<Task>> {
        let mut ids: Vec<Option<Id<ids::Task>>> = vec![None; self.document.tasks.len()];
        let mut tasks = Vec::with_capacity(ids.len());
        let mut gated = Vec::new();
        for index in &self.plan.order {
            let (task, gate) = self.task(&self.document.tasks[*index], now)?;
            ids[*index] = Some(task.id);
            if let Some(gate) = gate {
                gated.push((tasks.len(), gate));
            }
            tasks.push(task);
        }
        // The order holds every task, so that each has its id by now.
        let ids: Vec<Id<ids::Task>> = ids.into_iter().flatten().collect();
        let named = |indices: &[usize]| -> Vec<Id<ids::Task>> {
            indices.iter().map(|index| ids[*index]).collect()
        };
        let needs: Vec<(Id<ids::Task>, Id<ids::Task>)> = self
            .plan
            .needs
            .iter()
            .enumerate()
            .flat_map(|(task, needs)| needs.iter().map(move |need| (task, *need)))
            .map(|(task, need)| (ids[task], ids[need]))
            .collect();
        let waiting: BTreeSet<Id<ids::Task>> =
            gated.iter().map(|(task, _)| tasks[*task].id).collect();
        let mut ready = named(&self.plan.first());
        ready.retain(|task| !waiting.contains(task));
        tx.create_tasks_of_run(&mut tasks, &needs, &ready).await?;
        let barriers: Vec<NewBarrier<'_>> = self
            .document
            .barriers
            .iter()
            .zip(&self.plan.barriers)
            .map(|(barrier, links)| NewBarrier {
                barrier,
                follows: named(&links.after),
                holds: named(&links.holds),
            })
            .collect();
        tx.create_barriers(self.place, &barriers).await?;
        for (index, gate) in gated {
            let task = &mut tasks[index];
            request_approval(tx, task, &gate, Hook::TaskCreate).await?;
            tx.save_task(task).await?;
        }
        Ok(tasks)
    }

    fn task(
        &self,
        definition: &TaskDefinition,
        now: DateTime<Utc>,
    ) -> Result<(Task, Option<Closed>)> {
        let mut expectations = definition.expectations.clone();
        for expectation in &mut expectations {
            let Expectation::LlmReview { threshold, .. } = expectation;
            // The mission's threshold is the default of its tasks (contract 2.8.7).
            threshold.get_or_insert(self.document.threshold());
        }
        let extras = definition
            .notifications
            .iter()
            .map(|rules| ("notifications".to_owned(), rules.clone()))
            .collect();
        let document = TaskDocument {
            description: definition.description.clone(),
            depends_on: definition.depends_on.clone(),
            expectations,
            expected_outcomes: definition.expected_outcomes.clone(),
            priority: definition.priority.unwrap_or(1.0),
            max_retries: definition.max_retries.unwrap_or(self.settings.max_retries),
            side_effects: definition.side_effects,
            max_duration: definition.max_duration,
            retry_policy: definition.retry_policy.clone(),
            extras,
            ..TaskDocument::default()
        };
        let agent = self.agents.get(&definition.assign_to).cloned();
        let agent = agent.unwrap_or_else(|| definition.assign_to.clone());
        let mut task = Task::new(definition.title.clone(), agent, document, now);
        task.group = Some(self.group.to_owned());
        task.mission = Some(self.place);
        let gates = &self.settings.approval_gates;
        let gate = Gate::closed(gates, Hook::TaskCreate, &task, &json!({}));
        if gate.is_some() {
            task.bypass(Bypass::GatedAtCreation);
        } else {
            task.go(TaskStatus::Pending)?;
        }
        task.tell_created();
        Ok((task, gate))
    }
}
