//! Requests for a person's yes, and what each answer does (contract 2.11).

use std::time::Duration;

use chrono::Utc;
use serde_json::{Value, json};

use super::finish::{complete, fallback, give_up, wait_for_person};
use super::{LifecycleError, NOW, Result, locked, mission, owe, save};
use crate::event::Deadline;
use crate::ids::{self, Approval, Id};
use crate::store::{
    ApprovalRow, Job, Lease, NewApproval, ProjectDb, ProjectTx, StoreError, Waiting,
};
use crate::task::{Closed, Gate, Hook, ON_TIMEOUT, Phase, Settings, Status, Task};

/// Why a request was not answered.
#[derive(Debug, thiserror::Error)]
pub enum NotResolved {
    /// There is none with this id.
    #[error("not found")]
    Missing,
    /// It is answered already, or may not be answered so.
    #[error("{0}")]
    Conflict(String),
    /// Anything else.
    #[error(transparent)]
    Failed(LifecycleError),
}

impl<E: Into<LifecycleError>> From<E> for NotResolved {
    fn from(error: E) -> Self {
        match error.into() {
            LifecycleError::Store(StoreError::NotFound) => Self::Missing,
            LifecycleError::Conflict(sentence) => Self::Conflict(sentence),
            error => Self::Failed(error),
        }
    }
}

/// Asks a person, and sets the timer if the gate has one. The task must be stored after this.
///
/// # Errors
/// When the database refuses.
pub(super) async fn request_approval(
    tx: &mut ProjectTx,
    task: &mut Task,
    closed: &Closed,
    hook: Hook,
) -> Result<()> {
    let gate = &closed.gate;
    // `hook` is where the task was stopped: it tells a question about finished work from one about another attempt. A gate before
    // transitions stands at many such places, and what it saw says which step waits.
    let gate_hook = closed.data.as_ref().map_or(hook, |_| gate.hook);
    let data = closed.data.clone().unwrap_or_else(|| json!({}));
    let mut payload = json!({
        "taskId": task.id, "task": task.view(), "hook": hook.as_str(), "gateHook": gate_hook.as_str(), "data": data,
    });
    if gate.include_outcomes != Some(true) {
        for member in ["task", "data"] {
            if let Some(shown) = payload[member].as_object_mut() {
                shown.remove("outcomes");
            }
        }
    }
    let id = make_request(tx, closed, hook, Waiting::Task(task.id), payload).await?;
    let told = json!({"requestId": id, "gateId": gate.id, "gateName": gate.name});
    task.tell("approval:requested", told);
    Ok(())
}

/// Makes a request, and sets its timer if the gate has one.
pub(super) async fn make_request(
    tx: &mut ProjectTx,
    closed: &Closed,
    hook: Hook,
    waiting: Waiting<'_>,
    mut payload: Value,
) -> Result<Id<Approval>> {
    let gate = &closed.gate;
    if let Some(fault) = &closed.fault {
        payload["fault"] = json!(format!(
            "The gate is closed because its condition cannot be evaluated: {fault}."
        ));
    }
    let id = Id::<Approval>::new();
    let timeout_action = ON_TIMEOUT
        .iter()
        .find(|(action, _)| *action == gate.timeout_action)
        .map_or("reject", |(_, word)| *word);
    tx.create_approval(&NewApproval {
        id,
        waiting,
        gate_id: &gate.id,
        gate_name: &gate.name,
        hook: hook.as_str(),
        payload: &payload,
        timeout_action,
        max_revisions: i32::try_from(gate.revisions()).unwrap_or(i32::MAX),
    })
    .await?;
    if let Some(timeout) = gate.timeout_ms.filter(|timeout| *timeout > 0) {
        tx.enqueue(Job::Approval(id), 1.0, Duration::from_millis(timeout))
            .await?;
    }
    Ok(id)
}

/// Says yes.
///
/// # Errors
/// [`NotResolved`].
pub async fn approve(
    db: &ProjectDb,
    id: Id<Approval>,
    by: &str,
    note: Option<&str>,
) -> std::result::Result<ApprovalRow, NotResolved> {
    let asked = db.approval(id).await?;
    if let Some(mission) = asked.waiting_mission() {
        return mission::approve(db, &asked, mission, by, note).await;
    }
    let mut tx = db.begin();
    let task = task_of(&mut tx, &asked).await?;
    let row = resolve(&mut tx, id, "approved", by, note).await?;
    if let Some(mut task) = task {
        let told = json!({"requestId": row.id, "status": "approved", "resolvedBy": by});
        task.tell("approval:resolved", told);
        go_on(&mut tx, db, &mut task, &row).await?;
    }
    tx.commit().await?;
    Ok(row)
}

/// The way that an approved task goes on.
async fn go_on(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &mut Task,
    row: &ApprovalRow,
) -> Result<()> {
    if task.status() != Status::AwaitingApproval {
        return save(tx, db, task).await;
    }
    answer_escalation(tx, task, row, "approved").await?;
    task.document.passed_gates.push(row.gate_id.clone());
    let settings = db.settings().await?;
    if row.hook == Hook::TaskComplete.as_str() {
        return complete(tx, db, task, &settings).await.map(drop);
    }
    if let Some((gate, hook)) = next_gate(&settings, task, row) {
        return wait_for_person(tx, db, task, &gate, hook).await.map(drop);
    }
    if row.hook == Hook::QualitySla.as_str() {
        return go_on_overdue(tx, db, task).await;
    }
    // A blocked retry waits for its turn like any.
    if is_retry(row) {
        let feedback = task.document.feedback.take();
        let fallback = fallback(db, task).await?;
        task.begin_retry(feedback, fallback)?;
    } else if !attempt_goes_on(Hook::of(&row.hook)) {
        let feedback = task.document.feedback.take();
        let gates = std::mem::take(&mut task.document.passed_gates);
        task.begin_again(Phase::Execution, feedback, "retry");
        task.document.passed_gates = gates;
    }
    task.held = false;
    if row.gate_id == Gate::SIDE_EFFECTS {
        task.document.passed_gates.clear();
        task.go(Status::Pending)?;
    } else {
        task.go(Status::Assigned)?;
    }
    owe(tx, task, NOW).await?;
    save(tx, db, task).await
}

/// Whether the attempt that was stopped before a hook goes on from there: one that has not begun is not another one, an overdue one goes on as it was,
/// and work whose judgement was held up is not done again.
pub(super) fn attempt_goes_on(hook: Option<Hook>) -> bool {
    matches!(
        hook,
        Some(
            Hook::TaskCreate
                | Hook::TaskSpawn
                | Hook::QualitySla
                | Hook::AssessmentRun
                | Hook::AssessmentComplete
        )
    )
}

/// The next gate at the same hook, where nobody else asks there again: whoever takes a task up asks before it begins and before it is judged.
fn next_gate(settings: &Settings, task: &Task, row: &ApprovalRow) -> Option<(Closed, Hook)> {
    if is_retry(row) {
        gate_before_retry(settings, task, task.trouble()).map(|closed| (closed, Hook::TaskRetry))
    } else {
        gate_before_going_on(settings, task, Hook::of(&row.hook))
    }
}

/// The gate before what is not done unasked, at the hook where a task waits: the beginning of a new one, and the way on of one that is overdue still.
pub(super) fn gate_before_going_on(
    settings: &Settings,
    task: &Task,
    hook: Option<Hook>,
) -> Option<(Closed, Hook)> {
    let hook = hook?;
    let data = match hook {
        Hook::TaskCreate => json!({}),
        Hook::QualitySla => {
            let now = Utc::now();
            let deadline = Deadline {
                of: task.id.to_string(),
                kind: "task",
                at: task.document.deadline.filter(|at| *at <= now)?,
            };
            deadline.passed(now)
        }
        _ => return None,
    };
    Gate::closed(&settings.approval_gates, hook, task, &data).map(|closed| (closed, hook))
}

/// The gate before a full retry, if one stands there.
pub(super) fn gate_before_retry(settings: &Settings, task: &Task, reason: &str) -> Option<Closed> {
    let data = json!({"attempt": task.document.retries + 1, "reason": reason});
    let step = (Status::Failed, Status::Pending);
    let hooks = [Hook::TaskRetry, Hook::TaskTransition];
    Gate::closed_at_step(&settings.approval_gates, &hooks, task, step, &data)
}

/// An overdue task goes on as it was when it was stopped: from its last step, or waiting for its turn, or held.
async fn go_on_overdue(tx: &mut ProjectTx, db: &ProjectDb, task: &mut Task) -> Result<()> {
    let was_at_work = task.run.is_some() && !task.held;
    task.go(if was_at_work {
        Status::Assigned
    } else {
        Status::Pending
    })?;
    if !task.held {
        owe(tx, task, NOW).await?;
    }
    save(tx, db, task).await
}

/// Whether the request was for one of a task's retries.
fn is_retry(row: &ApprovalRow) -> bool {
    let by_gate = ![Gate::ESCALATION, Gate::SIDE_EFFECTS].contains(&row.gate_id.as_str());
    row.hook == Hook::TaskRetry.as_str() && by_gate
}

/// A person has acted on a task that was escalated to them: no other level does.
async fn answer_escalation(
    tx: &mut ProjectTx,
    task: &mut Task,
    row: &ApprovalRow,
    action: &str,
) -> Result<()> {
    if row.gate_id == Gate::ESCALATION {
        tx.call_off(Job::Escalation(task.id)).await?;
        let level = task.document.escalation_level;
        let told = json!({"level": level, "action": action});
        task.tell("escalation:resolved", told);
    }
    Ok(())
}

/// Says no, with what is to be done better.
///
/// # Errors
/// [`NotResolved`].
pub async fn reject(
    db: &ProjectDb,
    id: Id<Approval>,
    by: &str,
    feedback: &str,
) -> std::result::Result<ApprovalRow, NotResolved> {
    let asked = db.approval(id).await?;
    let mut tx = db.begin();
    let Some(mut task) = task_of(&mut tx, &asked).await? else {
        // Before anything is held: nothing of it will be changed.
        return Err(NotResolved::Conflict(if asked.status == "pending" {
            "This request belongs to no task and cannot be rejected. Approve it, or leave it as it is."
                .to_owned()
        } else {
            already(&asked.status)
        }));
    };
    let row = resolve(&mut tx, id, "rejected", by, Some(feedback)).await?;
    let most = u32::try_from(row.max_revisions).unwrap_or_default();
    if task.document.revision_count >= most {
        return Err(NotResolved::Conflict(format!(
            "Its gate allows that a task is rejected {most} times, and that is used up. Approve it, or fail it."
        )));
    }
    task.document.revision_count += 1;
    let told = json!({
        "requestId": row.id, "feedback": feedback,
        "rejectionCount": task.document.revision_count, "resolvedBy": by,
    });
    task.tell("approval:rejected", told);
    let resolved = json!({"requestId": row.id, "status": "rejected", "resolvedBy": by});
    task.tell("approval:resolved", resolved);
    send_back(&mut tx, db, &mut task, &row, feedback).await?;
    tx.commit().await?;
    Ok(row)
}

/// The way that a rejected task goes: it is done again, with what is to be done better. What may not begin, or go on overdue, without a yes is
/// not begun by a no: the gate is asked about again.
async fn send_back(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &mut Task,
    row: &ApprovalRow,
    feedback: &str,
) -> Result<()> {
    if task.status() != Status::AwaitingApproval {
        return save(tx, db, task).await;
    }
    answer_escalation(tx, task, row, "rejected").await?;
    let description = format!(
        "{}\n\nFeedback from review: {feedback}",
        task.document.description
    );
    task.rewrite(description);
    task.begin_again(Phase::Execution, None, "retry");
    task.go(Status::Pending)?;
    let settings = db.settings().await?;
    if let Some((gate, hook)) = gate_before_going_on(&settings, task, Hook::of(&row.hook)) {
        return wait_for_person(tx, db, task, &gate, hook).await.map(drop);
    }
    owe(tx, task, NOW).await?;
    save(tx, db, task).await
}

/// Withdraws the requests of a task that ends or goes on without them. The task must be stored after this.
///
/// # Errors
/// When the database refuses.
pub(super) async fn withdraw(tx: &mut ProjectTx, task: &mut Task) -> Result<()> {
    let note = "The task has ended, or goes on, without an answer.";
    close_requests(tx, task, "rejected", "engine", note).await
}

/// A person has let a task past its gate without answering the request: that is a yes. The task must be stored after this.
///
/// # Errors
/// When the database refuses.
pub(super) async fn approve_by_hand(tx: &mut ProjectTx, task: &mut Task) -> Result<()> {
    let note = "The task was let past its gate by hand.";
    close_requests(tx, task, "approved", "user", note).await
}

async fn close_requests(
    tx: &mut ProjectTx,
    task: &mut Task,
    status: &str,
    by: &str,
    note: &str,
) -> Result<()> {
    for id in tx.close_approvals(task.id, status, by, note).await? {
        let told = json!({"requestId": id, "status": status, "resolvedBy": by});
        task.tell("approval:resolved", told);
    }
    Ok(())
}

/// The time of a person's level of the escalation policy is over: its request is not answered any more, and the next level acts. The task must
/// be stored after this.
///
/// # Errors
/// When the database refuses.
pub async fn time_out_escalation(tx: &mut ProjectTx, task: &mut Task) -> Result<()> {
    let note = "The next level of the escalation policy acts.";
    for id in tx
        .close_approvals(task.id, "timeout", "timeout", note)
        .await?
    {
        let told = json!({"requestId": id, "action": "reject"});
        task.tell("approval:timeout", told);
    }
    Ok(())
}

/// Nobody answered in time, and the job that says so is done. Nothing happens to a request that was answered meanwhile.
///
/// # Errors
/// When the database refuses, or the lease is lost.
pub async fn expire(lease: &Lease, id: Id<Approval>) -> Result<()> {
    let db = &lease.db;
    let asked = db.approval(id).await?;
    if let Some(mission) = asked.waiting_mission() {
        return mission::expire(lease, &asked, mission).await;
    }
    let mut tx = db.begin();
    let task = task_of(&mut tx, &asked).await?;
    if let (Some(row), Some(mut task)) = (
        tx.resolve_approval(id, "timeout", "timeout", None).await?,
        task,
    ) {
        time_out(&mut tx, db, &mut task, &row).await?;
    }
    tx.complete(lease).await?;
    tx.commit().await?;
    Ok(())
}

async fn time_out(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    task: &mut Task,
    row: &ApprovalRow,
) -> Result<()> {
    let told = json!({"requestId": row.id, "action": row.timeout_action});
    task.tell("approval:timeout", told);
    if task.status() != Status::AwaitingApproval {
        return save(tx, db, task).await;
    }
    if row.timeout_action == "approve" {
        go_on(tx, db, task, row).await
    } else {
        let cause = format!("Nobody answered the request \"{}\" in time.", row.gate_name);
        give_up(tx, db, task, cause).await.map(drop)
    }
}

/// The task that a request is about, held until the commit.
async fn task_of(tx: &mut ProjectTx, asked: &ApprovalRow) -> Result<Option<Task>> {
    match asked.task_id {
        Some(task) => Ok(Some(locked(tx, task.into()).await?)),
        None => Ok(None),
    }
}

fn already(status: &str) -> String {
    format!("This request is {status} already.")
}

/// Answers a request and calls its timer off; says why not where it is answered already.
pub(super) async fn resolve(
    tx: &mut ProjectTx,
    id: Id<Approval>,
    status: &str,
    by: &str,
    note: Option<&str>,
) -> std::result::Result<ApprovalRow, NotResolved> {
    let Some(row) = tx.resolve_approval(id, status, by, note).await? else {
        let status = tx.approval_status(id).await?;
        return Err(NotResolved::Conflict(already(&status)));
    };
    tx.call_off(Job::Approval(id)).await?;
    Ok(row)
}

impl ApprovalRow {
    /// The mission that waits, where it is no task that does.
    fn waiting_mission(&self) -> Option<Id<ids::Mission>> {
        self.mission_id
            .filter(|_| self.task_id.is_none())
            .map(Id::from)
    }

    /// The request object of contract 2.11.
    pub fn view(&self) -> Value {
        use crate::event::timestamp;
        let mut view = json!({
            "id": self.id, "gateId": self.gate_id, "gateName": self.gate_name,
            "status": self.status, "payload": self.payload, "requestedAt": timestamp(self.requested_at),
        });
        let members = view.as_object_mut().expect("it was made as an object");
        let optional = [
            ("taskId", json!(self.task_id.map(Id::<ids::Task>::from))),
            (
                "missionId",
                json!(self.mission_id.map(Id::<ids::Mission>::from)),
            ),
            ("resolvedAt", json!(self.resolved_at.map(timestamp))),
            ("resolvedBy", json!(self.resolved_by)),
            ("note", json!(self.note)),
        ];
        for (key, value) in optional {
            if !value.is_null() {
                members.insert(key.to_owned(), value);
            }
        }
        view
    }
}
