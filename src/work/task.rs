//! A task's way from pending to its end, as far as it goes under one lease.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::json;

use super::conclusion::gate_before_review;
use super::{Held, Result, WorkError, execution, judge, question};
use crate::app::{self, ModelError};
use crate::ids::{self, Id};
use crate::lifecycle::{self, Aftermath};
use crate::llm::Provider;
use crate::store::{AgentRow, Job, Need, ProjectDb, ProjectTx, StoreError};
use crate::task::{
    Bypass, Closed, EndReason, Gate, Hook, Phase, Settings, Status, Task, TaskResult, backoff,
};

/// Takes a task as far as it goes.
pub(super) async fn advance(held: &Held, id: Id<ids::Task>) -> Result<()> {
    let db = &held.lease.db;
    let mut next = Next::Look;
    // A run or a review that was there before us was someone's who is gone.
    let mut ours = false;
    loop {
        if held.lost.is_cancelled() {
            return Err(WorkError::LeaseLost);
        }
        if held.should_rest().await {
            return Ok(db.hand_over(&held.lease, None).await?);
        }
        next = match next {
            Next::Look => look(held, id, ours).await?,
            Next::Escalate(task) => after(question::rewrite(held, *task).await?),
            Next::Execute(task, begun) => after(execution::execute(held, *task, begun).await?),
            Next::Review(task) => after(judge::review(held, *task).await?),
            Next::Nothing => return Ok(()),
        };
        ours = true;
    }
}

/// What there is to do next for a task.
enum Next {
    /// See how it stands.
    Look,
    /// Have it described anew, by whom the escalation policy says.
    Escalate(Box<Task>),
    /// Run its agent; and when the run began, if nothing of it is on record yet.
    Execute(Box<Task>, Option<DateTime<Utc>>),
    /// Judge its work.
    Review(Box<Task>),
    /// Nothing: its job is settled.
    Nothing,
}

fn after(task: Option<Task>) -> Next {
    let Some(task) = task else {
        return Next::Nothing;
    };
    match task.status() {
        Status::InProgress => Next::Execute(Box::new(task), None),
        Status::Review => Next::Review(Box::new(task)),
        _ => Next::Look,
    }
}

/// How a task is taken into a change.
#[derive(Debug, Clone, Copy)]
pub(super) enum Hold {
    /// As it is known, in the hope that it is still so. If not, nothing is written.
    Later,
    /// As it is now, held until the commit.
    Now,
}

/// Sees how a task stands, and hands it to its agent if that is next and everything is there that it needs.
async fn look(held: &Held, id: Id<ids::Task>, ours: bool) -> Result<Next> {
    match try_look(held, id, ours, Hold::Later).await {
        Err(WorkError::Stale) => try_look(held, id, ours, Hold::Now).await,
        next => next,
    }
}

async fn try_look(held: &Held, id: Id<ids::Task>, ours: bool, hold: Hold) -> Result<Next> {
    let db = &held.lease.db;
    let settings = db.settings().await?;
    let mut tx = db.begin();
    let mut task = match hold {
        Hold::Later => {
            let task = db.task(id).await?;
            tx.assume(&held.lease, &task);
            task
        }
        Hold::Now => tx.lock_task_under(&held.lease, id).await?,
    };
    let next = match task.status() {
        Status::Pending if task.document.escalation_owed => Next::Escalate(Box::new(task)),
        Status::Pending | Status::Assigned => start(held, &mut tx, task, &settings).await?,
        Status::InProgress | Status::Review => {
            if !ours {
                recover(held, &mut tx, &mut task).await?;
            }
            after(Some(task))
        }
        Status::Draft | Status::AwaitingApproval | Status::Done | Status::Failed => {
            tx.complete(&held.lease).await?;
            Next::Nothing
        }
    };
    tx.commit().await?;
    Ok(next)
}

/// Says that someone else goes on with it.
async fn recover(held: &Held, tx: &mut ProjectTx, task: &mut Task) -> Result<()> {
    if let Some(run) = task.run {
        tx.take_over_run(run).await?;
        let told = json!({"title": task.title, "previousStatus": task.status()});
        task.tell("task:recovered", told);
        lifecycle::save(tx, &held.lease.db, task).await?;
    }
    Ok(())
}

/// Has a task begin, or go on to its review, unless something keeps it from that; its job is settled then.
async fn start(
    held: &Held,
    tx: &mut ProjectTx,
    mut task: Task,
    settings: &Settings,
) -> Result<Next> {
    let db = &held.lease.db;
    if task.held {
        tx.complete(&held.lease).await?;
        return Ok(Next::Nothing);
    }
    if rests_in_mission(held, tx, &task).await? || waits_for_needs(held, tx, &task).await? {
        let_others(tx, db, &mut task).await?;
        return Ok(Next::Nothing);
    }
    // Only the judgement was held up: the work is there.
    if task.document.phase == Some(Phase::Review) && task.run.is_some() {
        return resume_review(held, tx, task, settings).await;
    }
    let agent = match agent_with_model(held, &task, settings).await? {
        Ok((agent, _)) => agent,
        Err(cause) => {
            fail_before_begin(held, tx, &mut task, cause).await?;
            return Ok(Next::Nothing);
        }
    };
    if let Some(whose) = occupied(tx, &task, &agent, settings).await? {
        if task.bypass(Bypass::Released) {
            lifecycle::save(tx, db, &mut task).await?;
        }
        tx.park(&held.lease, &whose).await?;
        if !whose.is_empty() && settings.max_concurrency.is_some() {
            // It may have been woken for a place of the project, which others can use.
            tx.unpark("", 1).await?;
        }
        return Ok(Next::Nothing);
    }
    if let Some(closed) = gate_before_begin(settings, &task) {
        return stop_at(held, tx, &mut task, &closed, Hook::TaskSpawn).await;
    }
    if task.status() == Status::Pending {
        illegal(task.go(Status::Assigned))?;
    }
    let begun = spawn(tx, &mut task, &agent).await?;
    lifecycle::save(tx, db, &mut task).await?;
    Ok(Next::Execute(Box::new(task), begun))
}

/// Whether a task cannot begin before what it needs. It is judged if that cannot come any more.
async fn waits_for_needs(held: &Held, tx: &mut ProjectTx, task: &Task) -> Result<bool> {
    if task.document.depends_on.is_empty() {
        return Ok(false);
    }
    let mut unmet = tx.unmet_needs(task.id).await?;
    if let Some(place) = task.mission.filter(|_| !unmet.is_empty()) {
        // Asked again under the run's lock, as what holds it back is.
        tx.lock_mission_run(place).await?;
        unmet = tx.unmet_needs(task.id).await?;
    }
    if unmet.is_empty() {
        return Ok(false);
    }
    if unmet.iter().any(Need::is_hopeless) {
        tx.enqueue(Job::Blocked(task.id), 1.0, Duration::ZERO)
            .await?;
    }
    tx.complete(&held.lease).await?;
    Ok(true)
}

/// Takes finished work on to its review, past whatever gate is behind the one that let it through.
async fn resume_review(
    held: &Held,
    tx: &mut ProjectTx,
    mut task: Task,
    settings: &Settings,
) -> Result<Next> {
    let db = &held.lease.db;
    if task.status() == Status::Pending {
        illegal(task.go(Status::Assigned))?;
    }
    illegal(task.go(Status::InProgress))?;
    if let Some(closed) = gate_before_review(settings, &task) {
        return stop_at(held, tx, &mut task, &closed, Hook::AssessmentRun).await;
    }
    illegal(task.go(Status::Review))?;
    lifecycle::save(tx, db, &mut task).await?;
    Ok(Next::Review(Box::new(task)))
}

/// Has a task wait for a person; its job is settled.
async fn stop_at(
    held: &Held,
    tx: &mut ProjectTx,
    task: &mut Task,
    closed: &Closed,
    hook: Hook,
) -> Result<Next> {
    lifecycle::wait_for_person(tx, &held.lease.db, task, closed, hook).await?;
    tx.complete(&held.lease).await?;
    Ok(Next::Nothing)
}

/// The gate before an agent begins, if one stands there. Whoever was let through another gate is asked about at these all the same.
fn gate_before_begin(settings: &Settings, task: &Task) -> Option<Closed> {
    let hooks = [Hook::TaskSpawn, Hook::TaskTransition];
    let steps = [
        (Status::Pending, Status::Assigned),
        (Status::Assigned, Status::InProgress),
    ];
    let gates = &settings.approval_gates;
    let closed = |step| Gate::closed_at_step(gates, &hooks, task, step, &json!({}));
    steps.into_iter().find_map(closed)
}

/// Whether a task of a mission cannot begin: something holds it back, or the mission is paused. Its job is settled then.
pub(super) async fn rests_in_mission(held: &Held, tx: &mut ProjectTx, task: &Task) -> Result<bool> {
    let Some(place) = task.mission else {
        return Ok(false);
    };
    if !tx.may_rest(task.id, place.mission).await? {
        return Ok(false);
    }
    if tx.is_held_back(task.id).await? {
        // Asked again under the run's lock: whatever lets it go from here on owes the job again.
        tx.lock_mission_run(place).await?;
        if tx.is_held_back(task.id).await? {
            tx.complete(&held.lease).await?;
            return Ok(true);
        }
    }
    let paused = tx.is_paused(place.mission).await?;
    if paused {
        tx.park_for_mission(&held.lease, place.mission).await?;
    }
    Ok(paused)
}

/// An approved task waits for what it needs like any other; and a place that it was woken for is another's.
async fn let_others(tx: &mut ProjectTx, db: &ProjectDb, task: &mut Task) -> Result<()> {
    if task.bypass(Bypass::Released) {
        lifecycle::save(tx, db, task).await?;
    } else {
        lifecycle::leave(tx, db, &task.assign_to).await?;
    }
    Ok(())
}

fn illegal<T>(step: std::result::Result<T, crate::task::IllegalStep>) -> Result<T> {
    step.map_err(|error| WorkError::Defect(error.into()))
}

/// Puts an agent to work, and says when its run began if it is a new one.
async fn spawn(
    tx: &mut ProjectTx,
    task: &mut Task,
    agent: &AgentRow,
) -> Result<Option<DateTime<Utc>>> {
    let phase = task
        .document
        .phase
        .filter(|phase| matches!(phase, Phase::Fix | Phase::Clarification));
    task.document.phase = Some(phase.unwrap_or(Phase::Execution));
    let begun = match task.run {
        // It was paused.
        Some(run) => {
            tx.go_on_with_run(run, &task.instructions()).await?;
            None
        }
        None => {
            task.document.outcomes.clear();
            let (run, now) = (Id::new(), Utc::now());
            task.run = Some(run);
            task.document.session = Some(run.into());
            tx.begin_run(run, task.id, agent.id, &task.instructions(), now);
            Some(now)
        }
    };
    // With its run in place, so that who hears of it knows what to follow.
    illegal(task.go(Status::InProgress))?;
    let told = json!({"agentName": agent.name, "taskTitle": task.title});
    task.tell("agent:spawned", told);
    Ok(begun)
}

/// A model that a task runs with.
pub(super) struct Model {
    /// Who serves it.
    pub(super) provider: Arc<dyn Provider>,
    /// Its name in the project.
    pub(super) name: String,
    /// Its name with its provider.
    pub(super) id: String,
}

/// The task's agent with a model that can be asked, or why there is none.
pub(super) async fn agent_with_model(
    held: &Held,
    task: &Task,
    settings: &Settings,
) -> Result<std::result::Result<(Arc<AgentRow>, Model), String>> {
    let agent = match held.lease.db.agent(&task.assign_to).await {
        Ok(agent) => agent,
        Err(StoreError::NotFound) => {
            return Ok(Err(format!(
                "There is no agent \"{}\" any more.",
                task.assign_to
            )));
        }
        Err(error) => return Err(error.into()),
    };
    let own = task.document.model.as_deref();
    let name = own.unwrap_or_else(|| app::model_of(&agent, settings));
    let model = named_model(held, name).await?;
    Ok(model.map(|model| (agent, model)))
}

/// A model by its name, or why it cannot be asked.
pub(super) async fn named_model(
    held: &Held,
    name: &str,
) -> Result<std::result::Result<Model, String>> {
    match held.app.resolve(&held.lease.db, name).await {
        Ok((provider, id)) => Ok(Ok(Model {
            provider,
            name: name.to_owned(),
            id,
        })),
        Err(ModelError::Unusable(error)) => Ok(Err(format!(
            "The model \"{name}\" cannot be used: {error}."
        ))),
        Err(ModelError::Credentials(app::CredentialsError::Store(error))) => Err(error.into()),
        Err(ModelError::Credentials(error)) => {
            tracing::error!("a task's model cannot be asked: {error:#}");
            Ok(Err(format!(
                "The key for the model \"{name}\" cannot be opened."
            )))
        }
    }
}

/// Whose places are all taken, if anyone's are.
async fn occupied(
    tx: &mut ProjectTx,
    task: &Task,
    agent: &AgentRow,
    settings: &Settings,
) -> Result<Option<String>> {
    let most = agent.number("maxConcurrency");
    if let Some(most) = most.and_then(|most| i64::try_from(most).ok()) {
        // Held until the commit, so that two cannot take the last place.
        tx.lock_agent(&agent.name).await?;
        if is_taken(tx, task, Some(&agent.name), most).await? {
            return Ok(Some(agent.name.clone()));
        }
    }
    if let Some(most) = settings.max_concurrency {
        tx.lock_settings().await?;
        if is_taken(tx, task, None, i64::from(most)).await? {
            return Ok(Some(String::new()));
        }
    }
    Ok(None)
}

/// Whether none of an agent's places, or of the project's, is left for a task. Those who were claimed together come here in any order; the last
/// places are for those with the better claim, who are on their way, and who wake the next if they do not use them.
async fn is_taken(tx: &mut ProjectTx, task: &Task, agent: Option<&str>, most: i64) -> Result<bool> {
    let free = most - tx.active_tasks(agent, task.id).await?;
    if free <= 0 || task.status() != Status::Pending {
        return Ok(free <= 0);
    }
    Ok(tx.tasks_ahead(agent, task.id, free).await? >= free)
}

/// Neither a retry nor a review helps a task whose agent or model does not exist (contract 2.6.3).
async fn fail_before_begin(
    held: &Held,
    tx: &mut ProjectTx,
    task: &mut Task,
    cause: String,
) -> Result<()> {
    let before = task.document.result.take();
    let result = TaskResult::without_answer(EndReason::Error, &cause, Some(cause.clone()), before);
    task.document.result = Some(result);
    task.bypass(Bypass::Stopped);
    lifecycle::hold_run(tx, task).await?;
    lifecycle::settle(tx, task).await?;
    lifecycle::save(tx, &held.lease.db, task).await?;
    Ok(())
}

/// The pause before an attempt.
pub(super) fn pause(held: &Held) -> impl FnOnce(u32) -> Duration {
    let base = Duration::from_millis(held.app.config.retry_backoff_ms);
    let chance: f64 = rand::random();
    move |retries| backoff(base, retries, chance)
}

/// Commits a deed with what it leaves of the job, and says whether the task goes on.
pub(super) async fn commit(
    held: &Held,
    mut tx: ProjectTx,
    task: Task,
    aftermath: Aftermath,
) -> Result<Option<Task>> {
    aftermath.settle_job(&mut tx, &held.lease).await?;
    tx.commit().await?;
    Ok(match aftermath {
        Aftermath::GoesOn => Some(held.lease.db.task(task.id).await?),
        Aftermath::Later(_) | Aftermath::Rests => None,
    })
}
