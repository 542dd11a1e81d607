//! What people do to a mission that runs: pause, resume, let it past a checkpoint, call it off, remove it.

use serde_json::json;

use super::super::{LifecycleError, Result, operate, save};
use super::advance::{open_again, pass};
use super::finish::{dismiss_newest_team, dismiss_team, end_tasks, remove_tasks};
use super::gate::{tell_withdrawn, withdraw};
use super::{go_on_if_nothing_pauses, hold, newest, read, wrong_state};
use crate::event::Event;
use crate::ids::{self, Id};
use crate::mission::{BarrierList, Status};
use crate::store::{BarrierRow, ProjectDb, StoreError, Withdrawn};
use crate::task::EndReason;

/// Why a mission is paused that a person paused.
pub(super) const BY_HAND: &str = "Paused by hand.";

/// What a resumed mission has before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resumed {
    /// Failed tasks that are tried again.
    pub retried: usize,
    /// Tasks that are pending.
    pub pending: usize,
}

/// Has a mission go on: past the checkpoints and gates that pause it, and, if it failed, from where it was. With `retry_failed`
/// its failed tasks are tried again. A failed mission that has nothing left to do stays as it is.
///
/// # Errors
/// 409 for a mission that is neither under way, paused nor failed.
pub async fn resume(db: &ProjectDb, id: Id<ids::Mission>, retry_failed: bool) -> Result<Resumed> {
    let mut tx = db.begin();
    let place = newest(&read(&mut tx, id).await?, "resumed; execute it")?;
    let mut failed = if retry_failed {
        tx.lock_tasks_of_run(place, true).await?
    } else {
        Vec::new()
    };
    let (mut run, mut mission) = hold(&mut tx, place).await?;
    if !mission.status().is_running() && mission.status() != Status::Failed {
        return Err(wrong_state(&mission, "resumed; execute it"));
    }
    if failed.is_empty() && !tx.has_unfinished(place).await? {
        return Ok(Resumed {
            retried: 0,
            pending: 0,
        });
    }
    let reached = tx.reached_barriers(place).await?;
    for mut barrier in reached.into_iter().filter(BarrierRow::pauses) {
        let others = match barrier.list {
            BarrierList::Gates => json!({"overridden": true}),
            _ => json!({}),
        };
        pass(&mut tx, &mut mission, &mut barrier, others).await?;
    }
    run.held = false;
    if run.ended_at.is_some() {
        open_again(&mut tx, db, &mut run, &mut mission).await?;
    } else {
        tx.save_mission_run(&run, None).await?;
        go_on_if_nothing_pauses(&mut tx, &run, &mut mission).await?;
    }
    tx.save_mission(&mut mission).await?;
    // In the order of their ids, which is one in which each comes after what it needs.
    for task in &mut failed {
        operate::begin_retry_by_hand(&mut tx, task).await?;
        save(&mut tx, db, task).await?;
    }
    let resumed = Resumed {
        retried: failed.len(),
        pending: tx.pending_tasks(place).await?,
    };
    let told = json!({
        "missionId": id, "name": mission.name, "retried": resumed.retried, "pending": resumed.pending,
    });
    tx.emit(Event::new("mission:resumed", told));
    tx.commit().await?;
    Ok(resumed)
}

/// Lets a mission past a checkpoint that it has reached.
///
/// # Errors
/// [`LifecycleError::Missing`] when there is none of this name that it waits at.
pub async fn resume_checkpoint(db: &ProjectDb, id: Id<ids::Mission>, name: &str) -> Result<()> {
    let mut tx = db.begin();
    let mission = read(&mut tx, id).await?;
    let missing = || {
        LifecycleError::Missing(format!(
            "Mission \"{}\" does not wait at a checkpoint \"{name}\". GET /v1/missions/checkpoints lists those that are reached.",
            mission.name
        ))
    };
    let place = newest(&mission, "resumed").map_err(|_| missing())?;
    let missing = missing();
    let (run, mut mission) = hold(&mut tx, place).await?;
    let reached = tx.reached_barriers(place).await?;
    let mut found = reached
        .into_iter()
        .filter(|barrier| barrier.list == BarrierList::Checkpoints && barrier.name == name);
    let Some(mut barrier) = found.next().filter(|_| run.ended_at.is_none()) else {
        return Err(missing);
    };
    pass(&mut tx, &mut mission, &mut barrier, json!({})).await?;
    go_on_if_nothing_pauses(&mut tx, &run, &mut mission).await?;
    tx.save_mission(&mut mission).await?;
    tx.commit().await?;
    Ok(())
}

/// Lets nothing more of a mission begin; what is under way goes on.
///
/// # Errors
/// 409 for a mission that is not under way.
pub async fn pause(db: &ProjectDb, id: Id<ids::Mission>) -> Result<()> {
    let mut tx = db.begin();
    let place = newest(&read(&mut tx, id).await?, "paused")?;
    let (mut run, mut mission) = hold(&mut tx, place).await?;
    if mission.status() == Status::Paused && run.held {
        return Ok(());
    }
    if !mission.status().is_running() {
        return Err(wrong_state(&mission, "paused"));
    }
    run.held = true;
    tx.save_mission_run(&run, None).await?;
    if mission.status() == Status::Active {
        mission.go(Status::Paused, Some(BY_HAND.to_owned()))?;
    }
    tx.save_mission(&mut mission).await?;
    tx.commit().await?;
    Ok(())
}

/// Calls a mission off: what is under way is stopped, its schedule goes, and it is `cancelled`. Says how many tasks were stopped.
///
/// # Errors
/// 409 for a mission that neither runs nor is to run.
pub async fn abort(db: &ProjectDb, id: Id<ids::Mission>) -> Result<usize> {
    for _ in 0..TRIES {
        if let Some(aborted) = try_abort(db, id).await? {
            return Ok(aborted);
        }
    }
    Err(LifecycleError::Conflict(
        "The mission moves too fast to be aborted. Pause it first, then try again.".to_owned(),
    ))
}

/// How often a deed begins again whose tasks changed while it waited for them.
const TRIES: u32 = 10;

/// Aborts a mission, unless its run or its tasks are not any more what was held.
async fn try_abort(db: &ProjectDb, id: Id<ids::Mission>) -> Result<Option<usize>> {
    let mut tx = db.begin();
    let seen = read(&mut tx, id).await?;
    let place = newest(&seen, "")
        .ok()
        .filter(|_| seen.status().is_running());
    let mut tasks = match place {
        Some(place) => tx.lock_tasks_of_run(place, false).await?,
        None => Vec::new(),
    };
    let mut run = match place {
        Some(place) => Some(tx.lock_mission_run(place).await?),
        None => None,
    };
    let mut mission = tx.lock_mission(id).await?;
    if mission.status() != seen.status() || mission.execution_count != seen.execution_count {
        return Ok(None);
    }
    if !mission.status().allows(Status::Cancelled) {
        return Err(wrong_state(&mission, "aborted; it does not run"));
    }
    if let Some(run) = &mut run {
        // A task that was taken up again meanwhile is not among those that are held.
        if tx.count_unfinished(run.place).await? != tasks.len() {
            return Ok(None);
        }
        let sentence = "The mission was aborted.";
        end_tasks(&mut tx, &mut tasks, EndReason::Killed, sentence).await?;
        run.ended_at = Some(chrono::Utc::now());
        run.held = false;
        tx.save_mission_run(run, Some(false)).await?;
    }
    withdraw(&mut tx, &mut mission, Withdrawn::BeforeRuns).await?;
    if let Some(run) = &run {
        tell_withdrawn(&mut mission, tx.call_off_what_waits(run.place).await?);
    }
    mission.go(Status::Cancelled, Some("Aborted.".to_owned()))?;
    let told = json!({"name": mission.name, "aborted": tasks.len()});
    mission.tell("mission:aborted", told);
    tx.save_mission(&mut mission).await?;
    tx.delete_schedule_of(id).await?;
    if let Some(run) = &run {
        dismiss_team(&mut tx, db, run).await?;
    }
    tx.commit().await?;
    Ok(Some(tasks.len()))
}

/// Removes a mission with all that belongs to it.
///
/// # Errors
/// [`StoreError::NotFound`].
pub async fn delete(db: &ProjectDb, id: Id<ids::Mission>) -> Result<()> {
    let found = db.mission(id).await?.mission;
    if found.status().allows(Status::Cancelled) {
        match abort(db, id).await {
            // It has ended by itself meanwhile, or begun again: the removal of its tasks ends it all the same.
            Ok(_) | Err(LifecycleError::Conflict(_)) => {}
            Err(error) => return Err(error),
        }
    }
    let removed = remove_tasks(db, id).await?;
    let mut tx = db.begin();
    let mission = tx.lock_mission(id).await?;
    if mission.status().is_running() {
        return Err(LifecycleError::Conflict(
            "The mission was executed while it was being deleted. Try again.".to_owned(),
        ));
    }
    if mission.execution_count > 0 {
        let place = newest(&mission, "")?;
        dismiss_newest_team(&mut tx, db, place).await?;
    }
    tx.delete_mission(id).await?;
    let told = json!({"missionId": id, "name": mission.name, "deletedTasks": removed});
    tx.emit(Event::new("mission:deleted", told));
    match tx.commit().await {
        Err(StoreError::Constraint(_)) => Err(LifecycleError::Conflict(
            "The mission was executed while it was being deleted. Try again.".to_owned(),
        )),
        result => Ok(result?),
    }
}
