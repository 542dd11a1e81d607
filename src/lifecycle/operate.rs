//! What people do to a task that exists (contract 2.6.6).

use serde_json::json;

use super::approve::request_approval;
use super::create::taken;
use super::finish::end_abruptly;
use super::{LifecycleError, NOW, Result, locked, owe, renew_deadline, save};
use crate::event::Event;
use crate::ids::{self, Id};
use crate::store::{Job, Need, ProjectDb, ProjectTx, StoreError, TaskFilter};
use crate::task::{Bypass, EndReason, Gate, Hook, Phase, Status, Task};

pub(super) fn wrong_state(task: &Task, deed: &str) -> LifecycleError {
    LifecycleError::Conflict(format!(
        "A task that is `{}` cannot be {deed}.",
        task.status()
    ))
}

/// Owes a pending task what it can have: its turn, a verdict, or nothing while its needs are not met.
pub(super) async fn owe_if_ready(tx: &mut ProjectTx, task: &Task) -> Result<()> {
    if is_held_back(tx, task).await? {
        return Ok(());
    }
    let unmet = tx.unmet_needs(task.id).await?;
    if unmet.is_empty() {
        owe(tx, task, NOW).await
    } else if unmet.iter().any(Need::is_hopeless) {
        tx.enqueue(Job::Blocked(task.id), 1.0, NOW).await?;
        Ok(())
    } else {
        Ok(())
    }
}

/// Whether something in its mission holds a task back. Asked under the run's lock, so that it cannot end or pass unseen.
pub(super) async fn is_held_back(tx: &mut ProjectTx, task: &Task) -> Result<bool> {
    let Some(place) = task.mission else {
        return Ok(false);
    };
    tx.lock_mission_run(place).await?;
    Ok(tx.is_held_back(task.id).await?)
}

/// Makes a draft wait for its turn.
///
/// # Errors
/// 409 for anything but a draft.
pub async fn queue(db: &ProjectDb, id: Id<ids::Task>) -> Result<Task> {
    let mut tx = db.begin();
    let mut task = locked(&mut tx, id).await?;
    if task.status() != Status::Draft {
        return Err(wrong_state(&task, "queued; only a draft can"));
    }
    submit(&mut tx, db, &mut task).await?;
    save(&mut tx, db, &mut task).await?;
    tx.commit().await?;
    Ok(task)
}

/// The one way from a draft to a task that waits for its turn: past the gate before its creation, as if it were new.
pub(super) async fn submit(tx: &mut ProjectTx, db: &ProjectDb, task: &mut Task) -> Result<()> {
    let settings = db.settings().await?;
    match Gate::closed(&settings.approval_gates, Hook::TaskCreate, task, &json!({})) {
        Some(gate) => {
            task.bypass(Bypass::GatedAtCreation);
            request_approval(tx, task, &gate, Hook::TaskCreate).await
        }
        None => {
            task.go(Status::Pending)?;
            owe_if_ready(tx, task).await
        }
    }
}

/// Has a task run: a draft is queued, a paused one goes on, one under way is left alone.
///
/// # Errors
/// 409 for a task that has ended.
pub async fn run(db: &ProjectDb, id: Id<ids::Task>) -> Result<Task> {
    let task = db.task(id).await?;
    match task.status() {
        Status::Draft => match queue(db, id).await {
            // Someone else was quicker, which is as good.
            Err(LifecycleError::Conflict(_)) => Ok(db.task(id).await?),
            result => result,
        },
        Status::Pending | Status::Assigned if task.held => {
            let mut tx = db.begin();
            let mut task = locked(&mut tx, id).await?;
            if std::mem::take(&mut task.held) {
                task.tell_updated();
                owe_if_ready(&mut tx, &task).await?;
                save(&mut tx, db, &mut task).await?;
                tx.commit().await?;
            }
            Ok(task)
        }
        Status::Done | Status::Failed => Err(wrong_state(&task, "run; retry or reassess it")),
        _ => Ok(task),
    }
}

/// Stops a task's run and holds it until it is run again: then it goes on from its last finished step.
///
/// # Errors
/// 409 for a task that is neither pending nor worked on.
pub async fn pause(db: &ProjectDb, id: Id<ids::Task>) -> Result<Task> {
    let mut tx = db.begin();
    let mut task = locked(&mut tx, id).await?;
    if task.status() != Status::Pending && !task.status().is_active() {
        return Err(wrong_state(&task, "paused"));
    }
    task.held = true;
    tx.call_off(Job::Task(task.id)).await?;
    tx.stop_run(task.id);
    if !task.bypass(Bypass::Released) {
        task.tell_updated();
    }
    save(&mut tx, db, &mut task).await?;
    tx.commit().await?;
    Ok(task)
}

/// Stops a task for good.
///
/// # Errors
/// When there is no such task. One that has ended stays as it is.
pub async fn kill(db: &ProjectDb, id: Id<ids::Task>, reason: Option<&str>) -> Result<Task> {
    stop(
        db,
        id,
        reason.map_or_else(
            || "Killed.".to_owned(),
            |reason| format!("Killed: {reason}"),
        ),
    )
    .await
}

/// Fails a task by hand.
///
/// # Errors
/// As [`kill`].
pub async fn force_fail(db: &ProjectDb, id: Id<ids::Task>, reason: Option<&str>) -> Result<Task> {
    stop(
        db,
        id,
        reason.map_or_else(
            || "Failed by hand.".to_owned(),
            |reason| format!("Failed by hand: {reason}"),
        ),
    )
    .await
}

async fn stop(db: &ProjectDb, id: Id<ids::Task>, sentence: String) -> Result<Task> {
    let mut tx = db.begin();
    let mut task = locked(&mut tx, id).await?;
    if !task.status().is_terminal() {
        end_abruptly(&mut tx, db, &mut task, EndReason::Killed, &sentence).await?;
        tx.commit().await?;
    }
    Ok(task)
}

/// Tries a failed task again, whatever its limit.
///
/// # Errors
/// 409 for anything but a failed task, and when its title is taken by now.
pub async fn retry(db: &ProjectDb, id: Id<ids::Task>) -> Result<Task> {
    let mut tx = db.begin();
    let mut task = locked(&mut tx, id).await?;
    if task.status() != Status::Failed {
        return Err(wrong_state(&task, "retried; only a failed one can"));
    }
    begin_retry_by_hand(&mut tx, &mut task).await?;
    save_unless_taken(&mut tx, db, &mut task).await?;
    tx.commit().await?;
    Ok(task)
}

/// Stores a task that may have been taken up again: 409 where another has its title by now.
pub(super) async fn save_unless_taken(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &mut Task,
) -> Result<()> {
    match save(tx, db, task).await {
        Err(LifecycleError::Store(error)) => Err(taken(error, &task.title)),
        result => result,
    }
}

/// Takes a failed task up again, whatever its limit. It must be stored after this.
pub(super) async fn begin_retry_by_hand(tx: &mut ProjectTx, task: &mut Task) -> Result<()> {
    task.go(Status::Pending)?;
    let told = json!({"attempt": task.document.retries, "maxRetries": task.document.max_retries});
    task.tell("task:retry", told);
    task.document.fix_attempts = 0;
    task.document.escalation_level = None;
    task.document.escalation_owed = false;
    task.document.model = None;
    task.begin_again(Phase::Execution, None, "retry");
    renew_deadline(tx, task).await?;
    owe_if_ready(tx, task).await
}

/// Has finished work judged again.
///
/// # Errors
/// 409 while it is not finished; [`LifecycleError::Invalid`] when there is nothing to judge it by.
pub async fn reassess(db: &ProjectDb, id: Id<ids::Task>) -> Result<()> {
    let mut tx = db.begin();
    let task = locked(&mut tx, id).await?;
    if !task.status().is_terminal() {
        return Err(wrong_state(&task, "reassessed; only a finished one can"));
    }
    if task.document.expectations.is_empty() {
        return Err(LifecycleError::Invalid {
            param: "expectations",
            message: "This task has no expectations to be assessed by. PATCH some first."
                .to_owned(),
        });
    }
    tx.enqueue(Job::Reassess(task.id), task.document.priority, NOW)
        .await?;
    tx.commit().await?;
    Ok(())
}

/// Removes a task.
///
/// # Errors
/// When there is no such task.
pub async fn delete(db: &ProjectDb, id: Id<ids::Task>) -> Result<()> {
    match remove(db, TaskFilter::default(), Some(id)).await? {
        0 => Err(StoreError::NotFound.into()),
        _ => Ok(()),
    }
}

/// Removes all tasks that a filter admits, and says how many there were.
///
/// # Errors
/// When the database refuses; some may be gone then.
pub async fn delete_all(db: &ProjectDb, filter: TaskFilter<'_>) -> Result<u64> {
    let mut deleted = 0;
    loop {
        match remove(db, filter, None).await? {
            0 => return Ok(deleted),
            some => deleted += some,
        }
    }
}

async fn remove(
    db: &ProjectDb,
    filter: TaskFilter<'_>,
    only: Option<Id<ids::Task>>,
) -> Result<u64> {
    let mut tx = db.begin();
    let gone = tx.delete_tasks(filter, only).await?;
    for task in &gone {
        tx.emit(Event::new("task:removed", json!({"taskId": task.id})));
    }
    super::mission::tasks_removed(&mut tx, db, &gone).await?;
    if !gone.is_empty() {
        // Places may have come free; who waits looks for itself.
        tx.unpark_all().await?;
    }
    tx.commit().await?;
    Ok(gone.len() as u64)
}
