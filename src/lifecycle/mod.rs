//! What people and the engine do to tasks: each deed one transaction, with its events and the work that follows.
//!
//! The API and the engine both act through here, so that a rule of contract 2.6 is written once.
//!
//! Rows are locked in one order, so that deeds wait for each other and never in a circle: tasks by their ids, then a mission's
//! run, the mission, its schedule and barriers, then approvals, jobs, agents, settings, and the head of the event log at the commit.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::json;

use crate::event;
use crate::ids::{self, Id};
use crate::store::{Job, ProjectDb, ProjectTx, StoreError, until};
use crate::task::{IllegalStep, Status, Task};

mod approve;
mod change;
mod create;
mod finish;
pub mod mission;
mod operate;
pub mod schedule;

pub use approve::{NotResolved, approve, expire, reject, time_out_escalation};
pub use change::{TaskChange, update};
pub use create::{NewTask, create};
pub use finish::{
    Aftermath, after_defect, after_failure, complete, escalate, hold_run,
    may_be_retried_for_others, retry_for_others, stop_at_deadline, stop_for_person, tell_run_ended,
    wait_for_person,
};
pub use operate::{delete, delete_all, force_fail, kill, pause, queue, reassess, retry, run};

/// Why a deed was not done.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// The database refuses or cannot be reached.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The status machine does not have this step.
    #[error(transparent)]
    Illegal(#[from] IllegalStep),
    /// A mission's status machine does not have this step.
    #[error(transparent)]
    IllegalForMission(#[from] crate::mission::IllegalStep),
    /// It clashes with what is there; a sentence.
    #[error("{0}")]
    Conflict(String),
    /// There is no such part of it; a sentence.
    #[error("{0}")]
    Missing(String),
    /// A definition cannot be used: every fault.
    #[error("the definition is faulty")]
    Faults(Vec<String>),
    /// A parameter is wrong.
    #[error("{message}")]
    Invalid {
        /// Which.
        param: &'static str,
        /// What to change; a sentence.
        message: String,
    },
}

/// The result of a deed.
pub type Result<T> = std::result::Result<T, LifecycleError>;

/// How long a job waits that is due at once.
const NOW: Duration = Duration::ZERO;

/// Stores a task, has its mission follow, and lets someone else have the place that it has left, or that it may have been
/// woken for.
///
/// # Errors
/// When the database refuses; constraint `tasks_title_key`.
pub async fn save(tx: &mut ProjectTx, db: &ProjectDb, task: &mut Task) -> Result<()> {
    let left = task.left_agent().map(str::to_owned);
    tx.save_task(task).await?;
    mission::follow(tx, db, task).await?;
    if let Some(agent) = left {
        leave(tx, db, &agent).await?;
    }
    Ok(())
}

/// One place of an agent and of the project is free. Only where there are limits does anyone wait for it.
///
/// # Errors
/// When the database refuses.
pub async fn leave(tx: &mut ProjectTx, db: &ProjectDb, agent: &str) -> Result<()> {
    let limited = match db.agent(agent).await {
        Ok(agent) => agent.definition.contains_key("maxConcurrency"),
        Err(StoreError::NotFound) => true,
        Err(error) => return Err(error.into()),
    };
    if limited {
        match tx.lock_agent(agent).await {
            Ok(_) | Err(StoreError::NotFound) => tx.unpark(agent, 1).await?,
            Err(error) => return Err(error.into()),
        }
    }
    if db.settings().await?.max_concurrency.is_some() {
        tx.lock_settings().await?;
        tx.unpark("", 1).await?;
    }
    Ok(())
}

/// Whether a failed task can be tried again: nobody else has its title by now, or its mission's run goes on, or can. The task must be held.
///
/// # Errors
/// When the database refuses.
pub async fn can_be_taken_up(tx: &mut ProjectTx, task: &Task) -> Result<bool> {
    match task.mission {
        Some(place) => mission::is_open(tx, place).await,
        None => Ok(!tx.is_title_taken(&task.title).await?),
    }
}

/// Owes a task its next step.
async fn owe(tx: &mut ProjectTx, task: &Task, after: Duration) -> Result<()> {
    tx.enqueue(Job::Task(task.id), task.document.priority, after)
        .await?;
    Ok(())
}

/// Calls off what no longer matters once a task has ended.
///
/// # Errors
/// When the database refuses.
pub async fn settle(tx: &mut ProjectTx, task: &mut Task) -> Result<()> {
    tx.call_off(Job::Task(task.id)).await?;
    if let Some(level) = task.document.escalation_level {
        tx.call_off(Job::Escalation(task.id)).await?;
        // A level that has acted has said so then.
        if task.status() == Status::Done && task.document.escalation_owed {
            task.tell(
                "escalation:resolved",
                json!({"level": level, "action": "completed"}),
            );
        }
    }
    if let Some(deadline) = task.document.deadline {
        tx.call_off(Job::Deadline(task.id)).await?;
        let now = Utc::now();
        if task.status() == Status::Done && now <= deadline {
            let met = event::Deadline {
                of: task.id.to_string(),
                kind: "task",
                at: deadline,
            };
            task.tell("sla:met", met.met(now));
        }
    }
    Ok(())
}

/// When a task's deadline is looked at next: at 80 % of its time, then at its end.
fn next_look(task: &Task, now: DateTime<Utc>) -> Option<Duration> {
    let deadline = task.document.deadline?;
    let warning = task.created_at + (deadline - task.created_at) * 4 / 5;
    if task.document.sla_violated {
        None
    } else if task.document.sla_warned {
        Some(until(deadline, now))
    } else {
        Some(until(warning.min(deadline), now))
    }
}

/// Watches a task's deadline again that was no longer of interest: it has failed, and is tried again.
///
/// # Errors
/// When the database refuses.
pub async fn renew_deadline(tx: &mut ProjectTx, task: &mut Task) -> Result<()> {
    let now = Utc::now();
    let deadline = task.document.deadline;
    task.document.sla_violated = deadline.is_some_and(|deadline| deadline < now);
    if let Some(pause) = next_look(task, now) {
        tx.enqueue(Job::Deadline(task.id), 1.0, pause).await?;
    }
    Ok(())
}

async fn locked(tx: &mut ProjectTx, id: Id<ids::Task>) -> Result<Task> {
    Ok(tx.lock_task(id).await?)
}
