//! What happens when a time has come: a deadline, an escalation that brought nothing, a request that nobody answered.

use std::time::Duration;

use chrono::Utc;

use super::{Held, Result};
use crate::event::Deadline;
use crate::ids::{self, Approval, Id};
use crate::lifecycle::{self, Aftermath};
use crate::store::{ProjectTx, until};
use crate::task::{Bypass, Gate, Hook, Status, Task, Violation};

/// Looks at a task's deadline: a warning at 80 % of its time, a violation at its end (contract 2.6.4, SLA).
pub(super) async fn deadline(held: &Held, id: Id<ids::Task>) -> Result<()> {
    let db = &held.lease.db;
    let settings = db.settings().await?;
    let mut tx = db.begin();
    let mut task = tx.lock_task_under(&held.lease, id).await?;
    let Some(deadline) = task
        .document
        .deadline
        .filter(|_| !task.status().is_terminal())
    else {
        tx.complete(&held.lease).await?;
        tx.commit().await?;
        return Ok(());
    };
    let now = Utc::now();
    let watched = Deadline {
        of: task.id.to_string(),
        kind: "task",
        at: deadline,
    };
    if now < deadline {
        if !std::mem::replace(&mut task.document.sla_warned, true) {
            let told = watched.nears(task.created_at, now);
            task.tell("sla:warning", told);
        }
        tx.put_off(&held.lease, until(deadline, now)).await?;
        lifecycle::save(&mut tx, db, &mut task).await?;
        tx.commit().await?;
        return Ok(());
    }
    tx.complete(&held.lease).await?;
    task.document.sla_violated = true;
    let data = watched.passed(now);
    task.tell("sla:violated", data.clone());
    let gate = Gate::closed(&settings.approval_gates, Hook::QualitySla, &task, &data);
    match (gate, settings.violation_action) {
        // A person is asked about it already, or has not handed it over yet.
        (Some(_), _) if matches!(task.status(), Status::AwaitingApproval | Status::Draft) => {
            lifecycle::save(&mut tx, db, &mut task).await?;
        }
        (Some(gate), _) => lifecycle::stop_for_person(&mut tx, db, &mut task, &gate).await?,
        (None, Violation::Notify) => lifecycle::save(&mut tx, db, &mut task).await?,
        (None, Violation::Fail) => {
            lifecycle::stop_at_deadline(&mut tx, db, &mut task).await?;
        }
    }
    tx.commit().await?;
    Ok(())
}

/// A level of the escalation policy has brought nothing in its time: the next one acts.
pub(super) async fn escalation(held: &Held, id: Id<ids::Task>) -> Result<()> {
    let db = &held.lease.db;
    let settings = db.settings().await?;
    let mut tx = db.begin();
    let mut task = tx.lock_task(id).await?;
    if task.held || is_asked_about_at_a_gate(&mut tx, &task).await? {
        // Nobody can bring anything meanwhile, and nobody takes the question away from whoever is asked, or the task from whoever paused it: its
        // level has its time anew.
        match task.level(&settings).and_then(|level| level.timeout_ms) {
            Some(again) if again > 0 => {
                tx.put_off(&held.lease, Duration::from_millis(again))
                    .await?;
            }
            _ => tx.complete(&held.lease).await?,
        }
        tx.commit().await?;
        return Ok(());
    }
    tx.complete(&held.lease).await?;
    let waits = matches!(
        task.status(),
        Status::Pending | Status::InProgress | Status::AwaitingApproval
    );
    if waits && task.document.escalation_level.is_some() {
        lifecycle::time_out_escalation(&mut tx, &mut task).await?;
        // Before its run, like whoever records a step.
        tx.call_off(crate::store::Job::Task(id)).await?;
        if let Some(run) = task.run.filter(|_| task.status() == Status::InProgress) {
            tx.end_run(run, crate::store::RunStatus::Interrupted, None);
            task.bypass(Bypass::Released);
        }
        tx.stop_run(id);
        task.document.escalation_owed = false;
        let next = task.next_level(&settings);
        let aftermath: Aftermath =
            lifecycle::escalate(&mut tx, db, &mut task, &settings, next).await?;
        aftermath.owe(&mut tx, &task).await?;
    }
    tx.commit().await?;
    Ok(())
}

/// Whether a person is asked about a task at a gate, and not by its escalation.
async fn is_asked_about_at_a_gate(tx: &mut ProjectTx, task: &Task) -> Result<bool> {
    if task.status() != Status::AwaitingApproval {
        return Ok(false);
    }
    let gate = tx.pending_gate(task.id).await?;
    Ok(gate.is_some_and(|(gate, _)| gate != Gate::ESCALATION))
}

/// Nobody has answered a request in its time.
pub(super) async fn approval(held: &Held, id: Id<Approval>) -> Result<()> {
    Ok(lifecycle::expire(&held.lease, id).await?)
}

/// A delay between a mission's tasks is over.
pub(super) async fn delay(held: &Held, id: Id<ids::Barrier>) -> Result<()> {
    let mut tx = held.lease.db.begin();
    lifecycle::mission::delay_over(&mut tx, id).await?;
    tx.complete(&held.lease).await?;
    tx.commit().await?;
    Ok(())
}
