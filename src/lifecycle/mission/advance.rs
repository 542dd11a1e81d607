//! How a run advances: what a task's end wakes, and what happens when a barrier is reached (contract 2.8.4 to 2.8.6).

use chrono::Utc;
use serde_json::{Value, json};

use super::super::{LifecycleError, Result};
use super::execute::bring_team;
use super::finish::{Ended, finish};
use super::gate::{Operation, Particulars, ask_leave, tell_withdrawn, withdraw};
use super::steer::BY_HAND;
use super::{go_on_if_nothing_pauses, next_look};
use crate::event::timestamp;
use crate::ids::{self, Id};
use crate::mission::{Barrier, BarrierKind, BarrierList, Document, Mission, Status, TaskEnd};
use crate::store::{
    BarrierRow, BarrierState, DeletedTask, Job, MissionRunRow, ProjectDb, ProjectTx, Withdrawn,
    until,
};
use crate::task::{Hook, Place, Task};

/// What follows for its mission when a task has ended or was taken up again. To be called when the task is stored. What it costs
/// grows with what became ready, not with the size of the mission.
pub(in super::super) async fn follow(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &Task,
) -> Result<()> {
    let Some(place) = task.mission else {
        return Ok(());
    };
    if task.status().is_terminal() {
        ended(tx, db, task, place).await
    } else if task.was_taken_up_again() {
        taken_up_again(tx, db, task, place).await
    } else {
        Ok(())
    }
}

async fn ended(tx: &mut ProjectTx, db: &ProjectDb, task: &Task, place: Place) -> Result<()> {
    let run = tx.lock_mission_run(place).await?;
    if run.ended_at.is_some() {
        tx.wake_dependents(task).await?;
        return Ok(());
    }
    let outlook = tx.outlook(place, task.id).await?;
    if outlook.inside {
        tx.wake_tasks_of_run(place, Some(task.id), &[]).await?;
    }
    if outlook.outside {
        tx.wake_dependents(task).await?;
    }
    if outlook.barriers {
        reach(tx, db, &run, Some(task.id)).await?;
    }
    if !outlook.unfinished {
        finish(tx, db, run, Ended::ByItself(&[])).await?;
    }
    Ok(())
}

/// A failed task is tried again: its mission, if it had ended, is under way again, closed gates wait for the task, and what was not
/// reached because it held back nothing else is reached now.
async fn taken_up_again(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &Task,
    place: Place,
) -> Result<()> {
    let mut run = tx.lock_mission_run(place).await?;
    let mut mission = tx.lock_mission(place.mission).await?;
    let reopened = tx.reopen_gates(place, task.id).await?;
    for gate in &reopened {
        withdraw(tx, &mut mission, Withdrawn::For(place.run, *gate)).await?;
    }
    if run.ended_at.is_some() {
        if !can_be_opened(&run, &mission) {
            return Err(LifecycleError::Conflict(format!(
                "This task belongs to a run of the mission \"{}\", which is `{}`, that is over. Execute the mission again.",
                mission.name,
                mission.status()
            )));
        }
        open_again(tx, db, &mut run, &mut mission).await?;
    } else if !reopened.is_empty() {
        go_on_if_nothing_pauses(tx, &run, &mut mission).await?;
    }
    // It is not over any more, if a person was asked whether it is.
    let hook = Withdrawn::At(place.run, Hook::MissionComplete.as_str());
    let withdrawn = tx.withdraw_mission_approvals(mission.id, hook).await?;
    if !withdrawn.is_empty() && mission.status() == Status::Active {
        mission.reason = None;
    }
    tell_withdrawn(&mut mission, withdrawn);
    tx.save_mission(&mut mission).await?;
    reach(tx, db, &run, Some(task.id)).await
}

/// Whether a run that has ended can go on: the newest of a mission that waits for what comes next.
fn can_be_opened(run: &MissionRunRow, mission: &Mission) -> bool {
    let waits = matches!(
        mission.status(),
        Status::Failed | Status::Recurring | Status::Scheduled
    );
    waits && mission.execution_count == run.place.run
}

/// Whether the run at this place goes on, or can.
///
/// # Errors
/// When the database refuses.
pub(in super::super) async fn is_open(tx: &mut ProjectTx, place: Place) -> Result<bool> {
    let run = tx.lock_mission_run(place).await?;
    let mission = tx.lock_mission(place.mission).await?;
    Ok(run.ended_at.is_none() || can_be_opened(&run, &mission))
}

/// A run that had ended goes on, from where its barriers stand.
pub(super) async fn open_again(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    run: &mut MissionRunRow,
    mission: &mut Mission,
) -> Result<()> {
    let now = Utc::now();
    run.ended_at = None;
    run.report = None;
    // Whoever has it go on does not mean a pause that was before its end.
    run.held = false;
    // A deadline that has passed was told of.
    run.deadline = run.deadline.filter(|deadline| *deadline > now);
    tx.save_mission_run(run, None).await?;
    if let Some(deadline) = run.deadline {
        let pause = next_look(deadline, run.started_at, run.sla_warned, now);
        tx.enqueue(Job::MissionDeadline(mission.id), 1.0, pause)
            .await?;
    }
    let reached = tx.reached_barriers(run.place).await?;
    let begun = reached
        .iter()
        .filter(|barrier| barrier.list == BarrierList::Delays);
    for delay in begun {
        let left = delay.expires_at.map(|at| until(at, now));
        tx.enqueue(Job::Delay(delay.id), 1.0, left.unwrap_or_default())
            .await?;
    }
    if run.volatile_team {
        // It went when the run ended.
        let members = tx.mission_definition(mission.id).await?;
        if let Some(team) = Document::parse(&members)
            .ok()
            .and_then(|document| document.team)
        {
            bring_team(tx, &team, &run.group).await?;
        }
    }
    withdraw(tx, mission, Withdrawn::BeforeRuns).await?;
    mission.go(Status::Active, None)?;
    for barrier in reached.into_iter().filter(BarrierRow::pauses) {
        match barrier.list {
            // Whoever was asked about it when the run ended is asked again.
            BarrierList::Gates => judge_again(tx, db, run, mission, barrier, &[]).await?,
            _ => pause_for(mission, &barrier)?,
        }
    }
    Ok(())
}

/// Why a barrier pauses its mission, in a sentence.
pub(super) fn reason(barrier: &BarrierRow) -> String {
    match &barrier.reason {
        Some(reason) => format!("Quality gate \"{}\" is closed: {reason}", barrier.name),
        None => format!("Checkpoint \"{}\" was reached.", barrier.name),
    }
}

/// Whatever is reached now that a task has ended or was taken up again, or that some are gone. The run must be held.
async fn reach(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    run: &MissionRunRow,
    moved: Option<Id<ids::Task>>,
) -> Result<()> {
    let reached = tx.barriers_reached(run.place, moved).await?;
    if reached.is_empty() {
        return Ok(());
    }
    let mut mission = tx.lock_mission(run.place.mission).await?;
    for barrier in reached {
        match (barrier.list, barrier.state) {
            (BarrierList::Delays, _) => begin_delay(tx, &mut mission, barrier).await?,
            (BarrierList::Checkpoints, _) => stop_at_checkpoint(tx, &mut mission, barrier).await?,
            (BarrierList::Gates, _) => judge_again(tx, db, run, &mut mission, barrier, &[]).await?,
        }
    }
    tx.save_mission(&mut mission).await?;
    Ok(())
}

async fn begin_delay(
    tx: &mut ProjectTx,
    mission: &mut Mission,
    mut barrier: BarrierRow,
) -> Result<()> {
    let pause = Barrier::of_view(barrier.list, &barrier.document)
        .and_then(|barrier| barrier.pause())
        .unwrap_or_default();
    let now = Utc::now();
    let expires_at = now + pause;
    barrier.state = BarrierState::Active;
    barrier.reached_at = Some(now);
    barrier.expires_at = Some(expires_at);
    tx.save_barrier(&barrier).await?;
    tx.enqueue(Job::Delay(barrier.id), 1.0, pause).await?;
    let document = &barrier.document;
    mission.tell(
        "delay:started",
        json!({
            "group": barrier.group, "delayName": barrier.name, "duration": document["duration"],
            "message": document["message"], "afterTasks": document["afterTasks"], "blocksTasks": document["blocksTasks"],
            "startedAt": timestamp(now), "expiresAt": timestamp(expires_at),
        }),
    );
    Ok(())
}

async fn stop_at_checkpoint(
    tx: &mut ProjectTx,
    mission: &mut Mission,
    mut barrier: BarrierRow,
) -> Result<()> {
    let now = Utc::now();
    barrier.state = BarrierState::Active;
    barrier.reached_at = Some(now);
    tx.save_barrier(&barrier).await?;
    let document = &barrier.document;
    mission.tell(
        "checkpoint:reached",
        json!({
            "group": barrier.group, "checkpointName": barrier.name, "message": document["message"],
            "afterTasks": document["afterTasks"], "blocksTasks": document["blocksTasks"], "reachedAt": timestamp(now),
        }),
    );
    pause_for(mission, &barrier)
}

fn pause_for(mission: &mut Mission, barrier: &BarrierRow) -> Result<()> {
    match mission.status() {
        Status::Active => mission.go(Status::Paused, Some(reason(barrier)))?,
        // It may have been paused for an earlier question about the same.
        Status::Paused if mission.reason.as_deref() != Some(BY_HAND) => {
            mission.reason = Some(reason(barrier));
        }
        _ => {}
    }
    Ok(())
}

/// Judges a quality gate, for which the gates of the settings in `passed` are open. The run and the mission must be held, and the
/// mission stored after this.
pub(super) async fn judge_again(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    run: &MissionRunRow,
    mission: &mut Mission,
    mut barrier: BarrierRow,
    passed: &[String],
) -> Result<()> {
    let Some(BarrierKind::Gate(gate)) =
        Barrier::of_view(barrier.list, &barrier.document).map(|barrier| barrier.kind)
    else {
        return Ok(());
    };
    let ends: Vec<TaskEnd> = tx
        .followed_tasks(barrier.id)
        .await?
        .iter()
        .map(TaskEnd::of)
        .collect();
    let seen = seen_of(tx, run, mission).await?;
    let judgement = gate.judge(&ends, &seen);
    if let Some(reason) = judgement.closed {
        withdraw_for(tx, mission, &barrier).await?;
        stay_closed(tx, mission, &mut barrier, judgement.mean, reason).await?;
        return pause_for(mission, &barrier);
    }
    let operation = Operation {
        hooks: &[Hook::QualityGate],
        run: Some(run.place.run),
        mission: seen,
        data: json!({"gateName": barrier.name, "avgScore": judgement.mean}),
        particulars: Particulars {
            schedule: None,
            barrier: Some(barrier.id),
            passed: passed.to_vec(),
        },
    };
    let settings = db.settings().await?;
    if let Some(asked) = ask_leave(tx, &settings, mission, operation).await? {
        close(tx, &mut barrier, asked.sentence).await?;
        return pause_for(mission, &barrier);
    }
    pass(
        tx,
        mission,
        &mut barrier,
        json!({"avgScore": judgement.mean}),
    )
    .await?;
    go_on_if_nothing_pauses(tx, run, mission).await
}

/// A quality gate holds back what it holds, and says why if that is new.
pub(super) async fn stay_closed(
    tx: &mut ProjectTx,
    mission: &mut Mission,
    barrier: &mut BarrierRow,
    mean: Option<f64>,
    reason: String,
) -> Result<()> {
    if barrier.reason.as_ref() != Some(&reason) {
        mission.tell(
            "quality:gate:failed",
            json!({"group": barrier.group, "gateName": barrier.name, "avgScore": mean, "reason": reason}),
        );
    }
    close(tx, barrier, reason).await
}

/// Nobody need be asked about a quality gate any more.
async fn withdraw_for(
    tx: &mut ProjectTx,
    mission: &mut Mission,
    barrier: &BarrierRow,
) -> Result<()> {
    let which = Withdrawn::For(barrier.place.run, barrier.id);
    withdraw(tx, mission, which).await
}

async fn close(tx: &mut ProjectTx, barrier: &mut BarrierRow, reason: String) -> Result<()> {
    barrier.state = BarrierState::Failed;
    barrier.reason = Some(reason);
    barrier.reached_at.get_or_insert_with(Utc::now);
    tx.save_barrier(barrier).await?;
    Ok(())
}

/// What conditions can see of a mission.
pub(super) async fn seen_of(
    tx: &mut ProjectTx,
    run: &MissionRunRow,
    mission: &Mission,
) -> Result<Value> {
    let mut seen = json!({
        "id": mission.id, "name": mission.name, "group": run.group, "run": run.place.run, "status": mission.status(),
    });
    let context = tx.mission_context(run.place).await?;
    seen["data"] = context.get("data").cloned().unwrap_or_else(|| json!({}));
    Ok(seen)
}

/// A barrier holds nothing back any more, in this run. The run must be held, and the mission stored after this.
pub(super) async fn pass(
    tx: &mut ProjectTx,
    mission: &mut Mission,
    barrier: &mut BarrierRow,
    others: Value,
) -> Result<()> {
    barrier.state = BarrierState::Passed;
    barrier.reason = None;
    tx.save_barrier(barrier).await?;
    tx.free_held_tasks(barrier).await?;
    if barrier.list == BarrierList::Gates {
        withdraw_for(tx, mission, barrier).await?;
    }
    let (event, name) = match barrier.list {
        BarrierList::Checkpoints => ("checkpoint:resumed", "checkpointName"),
        BarrierList::Gates => ("quality:gate:passed", "gateName"),
        BarrierList::Delays => ("delay:expired", "delayName"),
    };
    let mut told = json!({"group": barrier.group, name: barrier.name});
    if let (Some(told), Value::Object(others)) = (told.as_object_mut(), others) {
        told.extend(others);
    }
    mission.tell(event, told);
    Ok(())
}

/// A delay's time is over. Nothing happens when it is not under way any more.
///
/// # Errors
/// When the database refuses.
pub async fn delay_over(tx: &mut ProjectTx, id: Id<ids::Barrier>) -> Result<()> {
    let place = tx.barrier(id).await?.place;
    let run = tx.lock_mission_run(place).await?;
    let mut barrier = tx.barrier(id).await?;
    if run.ended_at.is_some() || barrier.state != BarrierState::Active {
        return Ok(());
    }
    let mut mission = tx.lock_mission(place.mission).await?;
    pass(tx, &mut mission, &mut barrier, json!({})).await?;
    tx.save_mission(&mut mission).await?;
    Ok(())
}

/// Tasks of missions are gone: what waited for them is judged, and a run that has none left to wait for ends.
///
/// # Errors
/// When the database refuses.
pub async fn tasks_removed(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    removed: &[DeletedTask],
) -> Result<()> {
    let mut places: Vec<Place> = removed.iter().filter_map(|task| task.place).collect();
    places.sort_by_key(|place| (place.mission, place.run));
    places.dedup();
    for place in places {
        let run = tx.lock_mission_run(place).await?;
        if run.ended_at.is_some() {
            continue;
        }
        reach(tx, db, &run, None).await?;
        if !tx.has_unfinished(place).await? {
            finish(tx, db, run, Ended::ByItself(&[])).await?;
        }
    }
    Ok(())
}
