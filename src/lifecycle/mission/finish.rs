//! How a run ends (contract 2.8.3 and 2.8.7), by itself or at its deadline.

use chrono::{DateTime, Utc};
use serde_json::json;

use super::super::Result;
use super::super::approve::withdraw;
use super::super::finish::cut_short;
use super::advance::seen_of;
use super::gate::{Operation, Particulars, ask_leave, tell_withdrawn};
use super::next_look;
use crate::event::Deadline;
use crate::ids::{self, Id};
use crate::mission::{Mission, Status, TaskEnd, Verdict, mean_score, report};
use crate::store::{
    Job, Lease, MissionRunRow, ProjectDb, ProjectTx, ScheduleRow, StoreError, TaskFilter,
};
use crate::task::{Bypass, Cleanup, EndReason, Hook, Place, Status as TaskStatus, Task};

/// Why a run ends.
#[derive(Debug, Clone)]
pub(super) enum Ended<'a> {
    /// Its tasks have. A person may be asked first whether it is over; these gates are open for it.
    ByItself(&'a [String]),
    /// For another reason, a sentence, and without a question.
    For(String),
}

/// Ends a run whose tasks have all ended, unless a gate stands in its way. The run must be held.
pub(super) async fn finish(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    mut run: MissionRunRow,
    why: Ended<'_>,
) -> Result<()> {
    let place = run.place;
    let tasks = tx.tasks_of_run(place).await?;
    let ends: Vec<TaskEnd> = tasks.iter().map(TaskEnd::of).collect();
    let verdict = Verdict::of(&ends, run.quality_threshold);
    let mut mission = tx.lock_mission(place.mission).await?;
    let schedule = tx.schedule_of(place.mission).await?;
    let passed = verdict.passed() && matches!(why, Ended::ByItself(_));
    let trouble = match why {
        Ended::For(sentence) => Some(sentence),
        Ended::ByItself(open) => {
            if is_asked_first(tx, db, &run, &mut mission, &ends, open).await? {
                tx.save_mission(&mut mission).await?;
                return Ok(());
            }
            None
        }
    };
    let reason = trouble.or_else(|| verdict.trouble(&ends, run.quality_threshold));
    let now = Utc::now();
    let next = resting(schedule.as_ref(), passed, now);
    mission.go(next, reason)?;
    if let Some(mean) = verdict.below {
        let told = json!({"avgScore": mean, "threshold": run.quality_threshold});
        mission.tell("quality:threshold:failed", told);
    }
    if let Some(deadline) = run.deadline.filter(|deadline| passed && now <= *deadline) {
        let told = watched(&mission, deadline).met(now);
        mission.tell("sla:met", told);
    }
    let report = report(mission.id, &run.group, passed, &ends);
    let told = json!({"group": run.group, "status": next, "allPassed": passed, "report": report});
    mission.tell("mission:completed", told);
    if let Some(schedule) = run.schedule {
        mission.tell("schedule:completed", json!({"scheduleId": schedule}));
    }
    run.ended_at = Some(now);
    run.held = false;
    run.report = Some(report);
    tx.save_mission_run(&run, Some(passed)).await?;
    tell_withdrawn(&mut mission, tx.call_off_what_waits(place).await?);
    tx.save_mission(&mut mission).await?;
    if let Some(schedule) = schedule.filter(|schedule| schedule.queued) {
        // What waited for this end is begun under the lease of that job, which reads the mark.
        tx.enqueue(Job::Schedule(schedule.id), 1.0, super::super::NOW)
            .await?;
    }
    dismiss_team(tx, db, &run).await
}

/// Whether a person is asked before a run whose tasks have ended is over. The gates in `open` are open for it.
async fn is_asked_first(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    run: &MissionRunRow,
    mission: &mut Mission,
    ends: &[TaskEnd],
    open: &[String],
) -> Result<bool> {
    let settings = db.settings().await?;
    let hook = Hook::MissionComplete;
    if !settings.approval_gates.iter().any(|gate| gate.hook == hook) {
        return Ok(false);
    }
    let passed = Verdict::of(ends, run.quality_threshold).passed();
    let operation = Operation {
        hooks: &[hook],
        run: Some(run.place.run),
        mission: seen_of(tx, run, mission).await?,
        data: json!({"allPassed": passed, "avgScore": mean_score(ends), "taskCount": ends.len()}),
        particulars: Particulars {
            passed: open.to_vec(),
            ..Particulars::default()
        },
    };
    let asked = ask_leave(tx, &settings, mission, operation).await?;
    if let Some(asked) = &asked {
        mission.reason = Some(asked.sentence.clone());
    }
    Ok(asked.is_some())
}

/// Where a mission rests after a run.
fn resting(schedule: Option<&ScheduleRow>, passed: bool, now: DateTime<Utc>) -> Status {
    let over = |schedule: &ScheduleRow| schedule.end_date.is_some_and(|end| end <= now);
    match schedule {
        Some(schedule) if schedule.recurring && !over(schedule) => Status::Recurring,
        Some(schedule)
            if schedule.enabled && (schedule.next_run_at.is_some() || schedule.queued) =>
        {
            Status::Scheduled
        }
        _ if passed => Status::Completed,
        _ => Status::Failed,
    }
}

/// The agents that a run brought along go with it. One that another run has begun to use goes with that.
pub(super) async fn dismiss_team(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    run: &MissionRunRow,
) -> Result<()> {
    if !run.volatile_team || db.settings().await?.volatile_cleanup == Cleanup::Manual {
        return Ok(());
    }
    for agent in tx.volatile_agents(&run.group, run.place).await? {
        match tx.unfinished_group(&agent.name).await? {
            None => tx.delete_agent(&agent.name).await?,
            Some(group) => {
                let mut definition = agent.definition.clone();
                definition.insert("missionGroup".to_owned(), json!(group));
                tx.update_agent(agent.id, &agent.team, &definition).await?;
            }
        }
    }
    Ok(())
}

/// Ends all of a run's tasks that have not, from outside their runs. They must be held, and the run after them.
pub(super) async fn end_tasks(
    tx: &mut ProjectTx,
    tasks: &mut [Task],
    reason: EndReason,
    sentence: &str,
) -> Result<()> {
    if tasks.is_empty() {
        return Ok(());
    }
    let began = tx.runs_began(tasks).await?;
    for task in &mut *tasks {
        cut_short(task, reason, sentence, &began);
        if task.status() == TaskStatus::AwaitingApproval {
            withdraw(tx, task).await?;
        }
        task.bypass(Bypass::Stopped);
    }
    tx.save_ended_tasks(tasks).await?;
    let ids: Vec<Id<ids::Task>> = tasks.iter().map(|task| task.id).collect();
    tx.judge_dependents_outside(&ids).await?;
    // Places have come free; whoever waits for one looks for itself.
    tx.unpark_all().await?;
    Ok(())
}

/// Looks at a mission's deadline: a warning at 80 % of its time; at its end the mission fails, unless a person is asked first
/// (contract 2.8.1, 2.12).
///
/// # Errors
/// When the database refuses.
pub async fn deadline(lease: &Lease, id: Id<ids::Mission>) -> Result<()> {
    let db = &lease.db;
    let mut tx = db.begin();
    let mission = super::read(&mut tx, id).await?;
    let place = Place {
        mission: id,
        run: mission.execution_count,
    };
    let now = Utc::now();
    let run = tx.mission_run_as_it_stands(place).await?;
    let over = run.deadline.is_some_and(|deadline| deadline <= now);
    let mut tasks = if over && run.ended_at.is_none() {
        tx.lock_tasks_of_run(place, false).await?
    } else {
        Vec::new()
    };
    let (mut run, mut mission) = super::hold(&mut tx, place).await?;
    let Some(deadline) = run.deadline.filter(|_| run.ended_at.is_none()) else {
        tx.complete(lease).await?;
        tx.commit().await?;
        return Ok(());
    };
    if over {
        if tx.count_unfinished(place).await? != tasks.len() {
            // One was taken up again meanwhile, and is not among those that are held.
            tx.put_off(lease, super::super::NOW).await?;
            tx.commit().await?;
            return Ok(());
        }
        let told = watched(&mission, deadline).passed(now);
        mission.tell("sla:violated", told.clone());
        let operation = Operation {
            hooks: &[Hook::QualitySla],
            run: Some(place.run),
            mission: seen_of(&mut tx, &run, &mission).await?,
            data: told,
            particulars: Particulars::default(),
        };
        let settings = db.settings().await?;
        let asked = ask_leave(&mut tx, &settings, &mut mission, operation).await?;
        tx.save_mission(&mut mission).await?;
        match asked {
            // It goes on until someone says that it ends.
            Some(_) => tx.complete(lease).await?,
            // The end calls the job off.
            None => {
                let sentence = "The mission's deadline has passed.";
                end_overdue(&mut tx, db, run, &mut tasks, sentence).await?;
            }
        }
        tx.commit().await?;
        return Ok(());
    }
    warn(&mut mission, &run, deadline, now);
    run.sla_warned = true;
    tx.save_mission_run(&run, None).await?;
    tx.save_mission(&mut mission).await?;
    let pause = next_look(deadline, run.started_at, true, now);
    tx.put_off(lease, pause).await?;
    tx.commit().await?;
    Ok(())
}

/// Ends a run whose deadline has passed, with those of its tasks that have not. All must be held.
pub(super) async fn end_overdue(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    run: MissionRunRow,
    tasks: &mut [Task],
    sentence: &str,
) -> Result<()> {
    end_tasks(tx, tasks, EndReason::Deadline, sentence).await?;
    finish(tx, db, run, Ended::For(sentence.to_owned())).await
}

fn warn(mission: &mut Mission, run: &MissionRunRow, deadline: DateTime<Utc>, now: DateTime<Utc>) {
    if run.sla_warned {
        return;
    }
    let told = watched(mission, deadline).nears(run.started_at, now);
    mission.tell("sla:warning", told);
}

fn watched(mission: &Mission, deadline: DateTime<Utc>) -> Deadline {
    Deadline {
        of: mission.id.to_string(),
        kind: "mission",
        at: deadline,
    }
}

/// Removes a mission's tasks, those of all its runs, some at a time; says how many there were.
pub(super) async fn remove_tasks(db: &ProjectDb, mission: Id<ids::Mission>) -> Result<u64> {
    let mut removed = 0;
    loop {
        let mut tx = db.begin();
        let filter = TaskFilter {
            mission: Some(mission),
            ..TaskFilter::default()
        };
        let gone = tx.delete_tasks(filter, None).await?;
        if gone.is_empty() {
            return Ok(removed);
        }
        for task in &gone {
            let told = json!({"taskId": task.id});
            tx.emit(crate::event::Event::new("task:removed", told));
        }
        super::tasks_removed(&mut tx, db, &gone).await?;
        tx.commit().await?;
        removed += gone.len() as u64;
    }
}

/// Removes agents that a mission's newest run left behind.
pub(super) async fn dismiss_newest_team(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    place: Place,
) -> Result<()> {
    match tx.mission_run_as_it_stands(place).await {
        Ok(run) => dismiss_team(tx, db, &run).await,
        Err(StoreError::NotFound) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
