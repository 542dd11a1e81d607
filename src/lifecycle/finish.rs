//! How an attempt ends: done, waiting for a person, tried again, handed over, or given up.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::json;

use super::approve::{gate_before_retry, request_approval, withdraw};
use super::{NOW, Result, save, settle};
use crate::ids::{self, Id};
use crate::store::{Job, Lease, ProjectDb, ProjectTx, RunStatus, StoreError};
use crate::task::{
    Bypass, Closed, EndReason, Failure, Follow, Gate, Handler, Hook, Level, Phase, Settings,
    Status, Task, TaskResult, Wrong,
};

/// What becomes of the job after a deed of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aftermath {
    /// The task goes on at once, under the same lease.
    GoesOn,
    /// It goes on after a pause.
    Later(Duration),
    /// It waits for something else, or has ended.
    Rests,
}

/// Finishes a task whose work is good, unless a gate stands in its way that nobody has opened yet: they are asked about one after the other.
///
/// # Errors
/// When the task is neither in review nor waiting for this, or the database refuses.
pub async fn complete(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &mut Task,
    settings: &Settings,
) -> Result<Aftermath> {
    let (gates, step) = (&settings.approval_gates, (Status::Review, Status::Done));
    let hooks = [Hook::TaskComplete, Hook::TaskTransition];
    let data = json!({"outcomes": task.document.outcomes});
    let closed = Gate::closed_at_step(gates, &hooks, task, step, &data);
    if let Some(closed) = closed {
        return wait_for_person(tx, db, task, &closed, Hook::TaskComplete).await;
    }
    let side_effects = Gate::side_effects();
    if task.document.side_effects && !task.document.passed_gates.contains(&side_effects.id) {
        return wait_for_person(tx, db, task, &side_effects.into(), Hook::TaskComplete).await;
    }
    task.go(Status::Done)?;
    settle(tx, task).await?;
    save(tx, db, task).await?;
    Ok(Aftermath::Rests)
}

/// Stops a task before a gate.
///
/// # Errors
/// When the database refuses.
pub async fn wait_for_person(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &mut Task,
    closed: &Closed,
    hook: Hook,
) -> Result<Aftermath> {
    let waits = task.status() == Status::AwaitingApproval;
    if !waits && task.go(Status::AwaitingApproval).is_err() {
        task.bypass(Bypass::HandedToPerson);
    }
    request_approval(tx, task, closed, hook).await?;
    save(tx, db, task).await?;
    Ok(Aftermath::Rests)
}

/// Stops an overdue task before a gate: whether it goes on all the same, from where it is, a person says.
///
/// # Errors
/// When the database refuses.
pub async fn stop_for_person(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &mut Task,
    closed: &Closed,
) -> Result<()> {
    interrupt(tx, task).await?;
    wait_for_person(tx, db, task, closed, Hook::QualitySla)
        .await
        .map(drop)
}

/// Decides what follows a failure, and does it (contract 2.6.4).
///
/// # Errors
/// When the database refuses.
pub async fn after_failure(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &mut Task,
    settings: &Settings,
    failure: Failure,
    wrong: &Wrong,
    pause: impl FnOnce(u32) -> Duration,
) -> Result<Aftermath> {
    let follow = task.after(failure, settings);
    if failure == Failure::Review && task.is_unjudged() && follow != Follow::Blocked {
        // The work may well be good: done again it would cost as much, and meet the same silence.
        return fail(tx, db, task, settings, wrong).await;
    }
    match follow {
        Follow::Fix => {
            task.learn(wrong);
            task.begin_fix(settings, wrong.sentence().to_owned());
            save(tx, db, task).await?;
            Ok(Aftermath::GoesOn)
        }
        Follow::Retry => {
            let closed = gate_before_retry(settings, task, wrong.sentence());
            task.learn(wrong);
            if let Some(closed) = closed {
                return wait_for_person(tx, db, task, &closed, Hook::TaskRetry).await;
            }
            let fallback = fallback(db, task).await?;
            let feedback = task.document.feedback.take();
            task.begin_retry(feedback, fallback)?;
            save(tx, db, task).await?;
            Ok(Aftermath::Later(pause(task.document.retries)))
        }
        Follow::Blocked => {
            task.tell("task:retry:blocked", json!({"reason": wrong.sentence()}));
            let feedback = match wrong {
                Wrong::Work(sentence) | Wrong::Limit(sentence) => format!(": {sentence}"),
                Wrong::Surroundings(_) => ".".to_owned(),
            };
            let description = format!(
                "{}\n\nAn earlier attempt did not succeed{feedback}\n\nIt may have acted on the outside world. Do not repeat such actions without checking what has been done.",
                task.document.description
            );
            task.rewrite(description);
            task.document.outcomes.clear();
            wait_for_person(tx, db, task, &Gate::side_effects().into(), Hook::TaskRetry).await
        }
        Follow::Escalate(level) => {
            task.tell("task:maxRetries", json!({}));
            task.learn(wrong);
            escalate(tx, db, task, settings, Some(level)).await
        }
        Follow::GiveUp => {
            task.tell("task:maxRetries", json!({}));
            fail(tx, db, task, settings, wrong).await
        }
    }
}

/// The task fails, unless a gate stands before that.
async fn fail(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &mut Task,
    settings: &Settings,
    wrong: &Wrong,
) -> Result<Aftermath> {
    let (gates, step) = (&settings.approval_gates, (task.status(), Status::Failed));
    let hooks = [Hook::TaskFail, Hook::TaskTransition];
    let data = json!({"reason": wrong.sentence()});
    let closed = Gate::closed_at_step(gates, &hooks, task, step, &data);
    if let Some(closed) = closed {
        task.learn(wrong);
        return wait_for_person(tx, db, task, &closed, Hook::TaskFail).await;
    }
    give_up(tx, db, task, wrong.sentence().to_owned()).await
}

/// Whether a failed task may be tried again because others wait for it: nobody stopped it, it touches nothing outside, and it has retries left.
///
/// # Errors
/// When the database refuses.
pub async fn may_be_retried_for_others(tx: &mut ProjectTx, task: &Task) -> Result<bool> {
    let document = &task.document;
    let reason = document.result.as_ref().map(|result| result.reason);
    let was_stopped = matches!(reason, Some(EndReason::Killed | EndReason::Deadline));
    Ok(task.status() == Status::Failed
        && !was_stopped
        && !document.side_effects
        && document.retries < document.max_retries
        && super::can_be_taken_up(tx, task).await?)
}

/// Tries a failed task again because others wait for it. Where a gate stands before retries a person is asked.
///
/// # Errors
/// When the database refuses.
pub async fn retry_for_others(tx: &mut ProjectTx, db: &ProjectDb, task: &mut Task) -> Result<()> {
    let settings = db.settings().await?;
    let wrong = wrong_before(task);
    let reason = wrong.as_ref().map(Wrong::sentence).unwrap_or_default();
    let closed = gate_before_retry(&settings, task, reason);
    // It waits again, for a person or for its turn: its deadline counts again.
    super::renew_deadline(tx, task).await?;
    if let Some(wrong) = &wrong {
        task.learn(wrong);
    }
    if let Some(closed) = closed {
        return wait_for_person(tx, db, task, &closed, Hook::TaskRetry)
            .await
            .map(drop);
    }
    let fallback = fallback(db, task).await?;
    let feedback = task.document.feedback.take();
    task.begin_retry(feedback, fallback)?;
    save(tx, db, task).await?;
    super::owe(tx, task, NOW).await
}

/// What was wrong with a task that has failed, as far as its result says.
fn wrong_before(task: &Task) -> Option<Wrong> {
    let result = task.document.result.as_ref()?;
    if result.stderr.is_empty() {
        return None;
    }
    let sentence = result.stderr.clone();
    Some(
        if matches!(result.reason, EndReason::MaxTurns | EndReason::Timeout) {
            Wrong::Limit(sentence)
        } else if result.exit_code == 0 && !task.is_unjudged() {
            Wrong::Work(sentence)
        } else {
            Wrong::Surroundings(sentence)
        },
    )
}

/// The task fails, for good, and its result says why: an agent that has finished is not work that is good.
pub(super) async fn give_up(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &mut Task,
    cause: String,
) -> Result<Aftermath> {
    match &mut task.document.result {
        Some(result) if result.reason == EndReason::Finished => {
            // A verdict says by itself that finished work is not good; and it may be judged again, as finished work.
            match &result.assessment {
                Some(verdict) if verdict["passed"] == false => {}
                _ => result.reason = EndReason::Error,
            }
            result.stderr.clone_from(&cause);
            result.cause = Some(cause);
        }
        Some(_) => {}
        None => {
            let result =
                TaskResult::without_answer(EndReason::Error, &cause, Some(cause.clone()), None);
            task.document.result = Some(result);
        }
    }
    task.give_up();
    settle(tx, task).await?;
    save(tx, db, task).await?;
    Ok(Aftermath::Rests)
}

/// Who takes over an escalated attempt: whom the policy names, else whom the agent reports to, if they exist.
pub(super) async fn fallback(db: &ProjectDb, task: &Task) -> Result<Option<String>> {
    let policy = task.document.retry_policy.as_ref();
    let named = match policy.and_then(|policy| policy.fallback_agent.clone()) {
        Some(named) => Some(named),
        None => match db.agent(&task.assign_to).await {
            Ok(agent) => agent
                .definition
                .get("reportsTo")
                .and_then(|name| name.as_str())
                .map(str::to_owned),
            Err(StoreError::NotFound) => None,
            Err(error) => return Err(error.into()),
        },
    };
    match named {
        Some(named) => name_of(db, &named).await,
        None => Ok(None),
    }
}

/// The name of the agent with this name or id, if it exists.
async fn name_of(db: &ProjectDb, agent: &str) -> Result<Option<String>> {
    match db.agent(agent).await {
        Ok(agent) => Ok(Some(agent.name.clone())),
        Err(StoreError::NotFound) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Takes a task to a level of the escalation policy, past those that cannot act; without one it fails.
///
/// # Errors
/// When the database refuses.
pub async fn escalate(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &mut Task,
    settings: &Settings,
    first: Option<Level>,
) -> Result<Aftermath> {
    let mut next = first;
    while let Some(level) = next {
        task.document.escalation_level = Some(level.level);
        let mut payload = json!({"level": level.level, "handler": level.handler});
        if let Some(target) = &level.target {
            payload["target"] = json!(target);
        }
        task.tell("escalation:triggered", payload);
        if let Some(timeout) = level.timeout_ms.filter(|timeout| *timeout > 0) {
            let pause = Duration::from_millis(timeout);
            tx.enqueue(Job::Escalation(task.id), task.document.priority, pause)
                .await?;
        } else {
            // The level before may have had a time, which is no longer of interest.
            tx.call_off(Job::Escalation(task.id)).await?;
        }
        match level.handler {
            Handler::Agent => {
                if let Some(target) = &level.target
                    && let Some(target) = name_of(db, target).await?
                {
                    let feedback = task.document.feedback.take();
                    hand_over(task);
                    task.begin_again(Phase::Execution, feedback, "retry");
                    task.document.model = None;
                    task.assign_to = target;
                    task.tell(
                        "escalation:resolved",
                        json!({"level": level.level, "action": "reassigned"}),
                    );
                    save(tx, db, task).await?;
                    return Ok(Aftermath::GoesOn);
                }
                next = task.next_level(settings);
            }
            Handler::Orchestrator => {
                let feedback = task.document.feedback.take();
                hand_over(task);
                task.begin_again(Phase::Execution, feedback, "retry");
                task.document.fix_attempts = 0;
                task.document.escalation_owed = true;
                save(tx, db, task).await?;
                return Ok(Aftermath::GoesOn);
            }
            Handler::Human => {
                let mut payload = json!({"message": task.trouble()});
                if let Some(channels) = &level.notify_channels {
                    payload["channels"] = json!(channels);
                }
                task.tell("escalation:human", payload);
                let gate = Gate {
                    id: Gate::ESCALATION.to_owned(),
                    name: "Escalation".to_owned(),
                    ..Gate::side_effects()
                };
                return wait_for_person(tx, db, task, &gate.into(), Hook::TaskRetry).await;
            }
        }
    }
    let cause = match task.trouble() {
        "" => "Nobody that it was escalated to could help.".to_owned(),
        cause => cause.to_owned(),
    };
    task.document.feedback = None;
    give_up(tx, db, task, cause).await
}

/// Makes an escalated task wait for its turn with whoever has it now; one that waits already has not moved.
fn hand_over(task: &mut Task) {
    if task.status() != Status::Pending {
        task.bypass(Bypass::Escalated);
    }
}

/// The deadline has passed and the project wants such tasks failed.
///
/// # Errors
/// When the database refuses.
pub async fn stop_at_deadline(tx: &mut ProjectTx, db: &ProjectDb, task: &mut Task) -> Result<()> {
    end_abruptly(
        tx,
        db,
        task,
        EndReason::Deadline,
        "The deadline has passed.",
    )
    .await
}

/// Defects in a row that a task is tried again after.
const MOST_DEFECTS: u32 = 5;

/// Something of ours broke while the engine was at a task: it is tried again after a pause, and ends when that does
/// not help. A task that can never go on is not to be gone on with for ever.
///
/// # Errors
/// When the database refuses, or the task cannot be read.
pub async fn after_defect(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    lease: &Lease,
    id: Id<ids::Task>,
    pause: impl FnOnce(u32) -> Duration,
) -> Result<()> {
    let mut task = tx.lock_task_under(lease, id).await?;
    task.document.defects += 1;
    let defects = task.document.defects;
    if defects < MOST_DEFECTS {
        tx.put_off(lease, pause(defects)).await?;
        return save(tx, db, &mut task).await;
    }
    hold_run(tx, &task).await?;
    tx.complete(lease).await?;
    if task.status().is_terminal() {
        return save(tx, db, &mut task).await;
    }
    let sentence = format!(
        "The server failed at it {defects} times in a row, through no fault of the task: its log says more."
    );
    end_abruptly(tx, db, &mut task, EndReason::Error, &sentence).await
}

/// Holds the mission's run of a task that may be waiting, before its job is touched: who lifts a barrier or ends a need has the run, and
/// owes jobs then.
///
/// # Errors
/// When the database refuses.
pub async fn hold_run(tx: &mut ProjectTx, task: &Task) -> Result<()> {
    if let Some(place) = task.mission {
        tx.lock_mission_run(place).await?;
    }
    Ok(())
}

/// Stops whoever is at a task. The task must be held, and stored after this.
async fn interrupt(tx: &mut ProjectTx, task: &Task) -> Result<()> {
    hold_run(tx, task).await?;
    // Before its run, like whoever records a step.
    tx.call_off(Job::Task(task.id)).await?;
    if let Some(run) = task.run {
        tx.end_run(run, RunStatus::Interrupted, None);
    }
    tx.stop_run(task.id);
    Ok(())
}

/// Ends a task from outside its run: whoever runs it stops, and nothing of the run counts any more.
pub(super) async fn end_abruptly(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &mut Task,
    reason: EndReason,
    sentence: &str,
) -> Result<()> {
    interrupt(tx, task).await?;
    let began = tx.runs_began(std::slice::from_ref(task)).await?;
    cut_short(task, reason, sentence, &began);
    withdraw(tx, task).await?;
    task.bypass(Bypass::Stopped);
    settle(tx, task).await?;
    tx.call_off(Job::Blocked(task.id)).await?;
    save(tx, db, task).await
}

/// Gives a task that is ended from outside its result, and tells the end of the run that its agent is at. `began` has that run, see
/// [`ProjectTx::runs_began`].
pub(super) fn cut_short(
    task: &mut Task,
    reason: EndReason,
    sentence: &str,
    began: &HashMap<Id<ids::Run>, DateTime<Utc>>,
) {
    let before = task.document.result.take();
    let cause = (reason == EndReason::Error).then(|| sentence.to_owned());
    let said = before.as_ref().map(|result| result.stdout.clone());
    let mut result = TaskResult::without_answer(reason, sentence, cause, before);
    // What is there stays there, though nobody says any more that it is good.
    if matches!(task.status(), Status::Review | Status::AwaitingApproval) {
        result.stdout = said.unwrap_or_default();
    }
    if let Some(run) = task.run
        && let Some(began) = began.get(&run)
    {
        result.duration = (Utc::now() - *began).num_milliseconds();
        tell_run_ended(task, run, &result);
    }
    task.document.result = Some(result);
}

/// Tells that an agent's run of a task has come to its end, and with what.
pub fn tell_run_ended(task: &mut Task, run: Id<ids::Run>, result: &TaskResult) {
    let told = json!({
        "agentName": task.assign_to, "exitCode": result.exit_code, "duration": result.duration,
        "reason": result.reason, "runId": run, "sessionId": Id::<ids::Session>::from(run),
    });
    task.tell("agent:completed", told.clone());
    task.tell("agent:finished", told);
}

impl Aftermath {
    /// Leaves the job as the deed says.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`].
    pub async fn settle_job(self, tx: &mut ProjectTx, lease: &Lease) -> Result<()> {
        match self {
            Self::GoesOn => tx.extend(lease).await?,
            Self::Later(pause) => tx.put_off(lease, pause).await?,
            // It may have been called off in this very transaction.
            Self::Rests => match tx.complete(lease).await {
                Ok(()) | Err(StoreError::LeaseLost) => {}
                Err(error) => return Err(error.into()),
            },
        }
        Ok(())
    }

    /// Owes the job that a deed outside the engine asks for.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn owe(self, tx: &mut ProjectTx, task: &Task) -> Result<()> {
        match self {
            Self::GoesOn => super::owe(tx, task, NOW).await,
            Self::Later(pause) => super::owe(tx, task, pause).await,
            Self::Rests => Ok(()),
        }
    }
}
