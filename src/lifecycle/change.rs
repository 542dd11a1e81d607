//! A change to a task's fields, and the steps of its machine that people can take by hand (contract 2.6.6, PATCH).

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use super::approve::{approve_by_hand, attempt_goes_on, gate_before_going_on, withdraw};
use super::finish::end_abruptly;
use super::operate::{
    begin_retry_by_hand, is_held_back, owe_if_ready, save_unless_taken, submit, wrong_state,
};
use super::{LifecycleError, NOW, Result, locked, next_look, owe};
use crate::event::timestamp;
use crate::ids::{self, Id};
use crate::store::{Job, ProjectDb, ProjectTx, RunStatus, StoreError};
use crate::task::{
    EndReason, Expectation, ExpectedOutcome, Gate, Hook, Phase, RetryPolicy, Status, Task,
};

/// A change to a task; `None` leaves a field as it is.
#[derive(Debug, Default)]
pub struct TaskChange {
    /// Other instructions.
    pub description: Option<String>,
    /// Another agent.
    pub assign_to: Option<String>,
    /// A step of the status machine.
    pub status: Option<Status>,
    /// Other expectations.
    pub expectations: Option<Vec<Expectation>>,
    /// Another count of retries used.
    pub retries: Option<u32>,
    /// Another limit of retries.
    pub max_retries: Option<u32>,
    /// Whether it touches the outside world.
    pub side_effects: Option<bool>,
    /// Another weight.
    pub priority: Option<f64>,
    /// Other outcomes, or none.
    pub expected_outcomes: Option<Option<Vec<ExpectedOutcome>>>,
    /// Another limit of a run, or the project's.
    pub max_duration: Option<Option<u64>>,
    /// Another policy, or none.
    pub retry_policy: Option<Option<RetryPolicy>>,
    /// Another date, or none.
    pub deadline: Option<Option<DateTime<Utc>>>,
    /// Members that are kept for others to read; null takes one away.
    pub extras: Map<String, Value>,
}

/// Changes a task.
///
/// # Errors
/// 409 for a step that the machine does not have, and for new expectations while the task is worked on; an unknown agent.
pub async fn update(db: &ProjectDb, id: Id<ids::Task>, mut change: TaskChange) -> Result<Task> {
    let mut tx = db.begin();
    let mut task = locked(&mut tx, id).await?;
    if let (Some(expectations), Some(place)) = (&mut change.expectations, task.mission) {
        let threshold = tx.mission_run_as_it_stands(place).await?.quality_threshold;
        set_thresholds(expectations, threshold);
    }
    // Who sends back what was read changes nothing of it: no verdict is lost, and nothing is told again.
    let document = &task.document;
    change.expectations = change
        .expectations
        .filter(|given| *given != document.expectations);
    let shown = |deadline: Option<DateTime<Utc>>| deadline.map(timestamp);
    change.deadline = change
        .deadline
        .filter(|given| shown(*given) != shown(document.deadline));
    let requeues = change.assign_to.is_some() || change.priority.is_some();
    if let Some(agent) = &change.assign_to {
        give_to(&mut tx, db, &mut task, agent).await?;
    }
    if change.expectations.is_some()
        && !matches!(
            task.status(),
            Status::Draft | Status::Pending | Status::Failed | Status::Done
        )
    {
        return Err(wrong_state(&task, "given other expectations"));
    }
    let (deadline, status) = (change.deadline, change.status);
    set(&mut task, change);
    if let Some(deadline) = deadline {
        watch(&mut tx, &mut task, deadline).await?;
    }
    if let Some(status) = status.filter(|status| *status != task.status()) {
        step(&mut tx, db, &mut task, status).await?;
    }
    if requeues {
        tx.requeue_task(task.id, task.document.priority).await?;
    }
    task.tell_updated();
    save_unless_taken(&mut tx, db, &mut task).await?;
    tx.commit().await?;
    Ok(task)
}

/// Gives a task that nobody works on to another agent.
async fn give_to(tx: &mut ProjectTx, db: &ProjectDb, task: &mut Task, agent: &str) -> Result<()> {
    let agent = match db.agent(agent).await {
        Ok(agent) => agent.name.clone(),
        Err(StoreError::NotFound) => {
            return Err(LifecycleError::Invalid {
                param: "assignTo",
                message: format!("`assignTo`: there is no agent \"{agent}\"."),
            });
        }
        Err(error) => return Err(error.into()),
    };
    if agent == task.assign_to {
        return Ok(());
    }
    if task.status().is_active() {
        let deed = "given to another agent; pause or kill it first";
        return Err(wrong_state(task, deed));
    }
    task.document.model = None;
    // What was finished stays what it was judged by.
    if !task.status().is_terminal()
        && let Some(run) = task.run.take()
    {
        // What another has begun is not gone on with.
        tx.end_run(run, RunStatus::Interrupted, None);
    }
    task.assign_to = agent;
    Ok(())
}

/// The mission's threshold is the default of its tasks' expectations (contract 2.7.3), of those that come later as of the first.
fn set_thresholds(expectations: &mut [Expectation], default: f64) {
    for expectation in expectations {
        let Expectation::LlmReview { threshold, .. } = expectation;
        threshold.get_or_insert(default);
    }
}

/// Sets the fields that ask for nothing else to be done.
fn set(task: &mut Task, change: TaskChange) {
    fn put<T>(field: &mut T, value: Option<T>) {
        if let Some(value) = value {
            *field = value;
        }
    }
    let document = &mut task.document;
    if let Some(description) = change.description {
        document.description = description;
        document.original_description = None;
        document.feedback = None;
    }
    if change.expectations.is_some()
        && document.phase == Some(Phase::Review)
        && let Some(result) = &mut document.result
    {
        // A verdict that is still to be acted on was another question's.
        let verdict = result.assessment.take();
        result.remember(verdict);
    }
    put(&mut document.expectations, change.expectations);
    put(&mut document.expected_outcomes, change.expected_outcomes);
    put(&mut document.retries, change.retries);
    put(&mut document.max_retries, change.max_retries);
    put(&mut document.side_effects, change.side_effects);
    put(&mut document.priority, change.priority);
    put(&mut document.max_duration, change.max_duration);
    put(&mut document.retry_policy, change.retry_policy);
    for (member, value) in change.extras {
        if value.is_null() {
            document.extras.remove(&member);
        } else {
            document.extras.insert(member, value);
        }
    }
}

/// Watches another date, or none, from the beginning.
async fn watch(tx: &mut ProjectTx, task: &mut Task, deadline: Option<DateTime<Utc>>) -> Result<()> {
    task.document.deadline = deadline;
    task.document.sla_warned = false;
    task.document.sla_violated = false;
    tx.call_off(Job::Deadline(task.id)).await?;
    let next = next_look(task, Utc::now()).filter(|_| !task.status().is_terminal());
    if let Some(pause) = next {
        tx.enqueue(Job::Deadline(task.id), 1.0, pause).await?;
    }
    Ok(())
}

/// A step by hand. What only the engine can bring about is not to be claimed: an agent that works, a review.
async fn step(tx: &mut ProjectTx, db: &ProjectDb, task: &mut Task, to: Status) -> Result<()> {
    let from = task.status();
    match to {
        Status::Pending => {
            if from == Status::Draft {
                return submit(tx, db, task).await;
            }
            if from == Status::Failed {
                return begin_retry_by_hand(tx, task).await;
            }
            leave_gate(tx, db, task, to).await?;
            task.go(to)?;
            withdraw(tx, task).await?;
            owe_if_ready(tx, task).await
        }
        Status::Failed => {
            if !from.allows(to) {
                task.go(to)?;
            }
            end_abruptly(tx, db, task, EndReason::Killed, "Failed by hand.").await
        }
        Status::Done => {
            leave_gate(tx, db, task, to).await?;
            task.go(to)?;
            approve_by_hand(tx, task).await?;
            tx.stop_run(task.id);
            super::settle(tx, task).await
        }
        Status::Assigned => {
            if !tx.unmet_needs(task.id).await?.is_empty() || is_held_back(tx, task).await? {
                return Err(wrong_state(
                    task,
                    "assigned before what it waits for is over",
                ));
            }
            leave_gate(tx, db, task, to).await?;
            task.go(to)?;
            task.held = false;
            approve_by_hand(tx, task).await?;
            owe(tx, task, NOW).await
        }
        Status::Draft | Status::AwaitingApproval | Status::InProgress | Status::Review => {
            Err(LifecycleError::Conflict(format!(
                "A task cannot be made `{to}` by hand. Use run, pause, kill, retry or reassess."
            )))
        }
    }
}

/// Takes a task from whoever is asked about it, by hand. What goes on as it was goes past the gate if it is assigned; what is done anew is asked
/// about anew, and what may not begin or go on unasked stays where it is.
async fn leave_gate(tx: &mut ProjectTx, db: &ProjectDb, task: &mut Task, to: Status) -> Result<()> {
    if task.status() != Status::AwaitingApproval {
        return Ok(());
    }
    let Some((gate, hook)) = tx.pending_gate(task.id).await? else {
        return Ok(());
    };
    if gate == Gate::ESCALATION {
        // A person has acted: no other level does.
        tx.call_off(Job::Escalation(task.id)).await?;
        let action = match to {
            Status::Done => "completed",
            other => other.as_str(),
        };
        let told = json!({"level": task.document.escalation_level, "action": action});
        task.tell("escalation:resolved", told);
    }
    if to == Status::Done {
        // Its work stays what it is.
        return Ok(());
    }
    let hook = Hook::of(&hook);
    if to == Status::Pending {
        let settings = db.settings().await?;
        if let Some((closed, _)) = gate_before_going_on(&settings, task, hook) {
            return Err(LifecycleError::Conflict(format!(
                "A person is asked at the gate \"{}\" whether this task may go on. Approve its request (GET /v1/approvals?taskId={}&status=pending), or make it `assigned`, which is a yes.",
                closed.gate.name, task.id
            )));
        }
    }
    let judged = matches!(hook, Some(Hook::AssessmentRun | Hook::AssessmentComplete));
    if attempt_goes_on(hook) && (to == Status::Assigned || !judged) {
        if to == Status::Assigned {
            task.document.passed_gates.push(gate);
        }
        return Ok(());
    }
    let feedback = task.document.feedback.take();
    task.begin_again(Phase::Execution, feedback, "retry");
    Ok(())
}
