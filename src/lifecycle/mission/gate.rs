//! Gates in a mission's way: what waits for a person's yes that is no single task (contract 2.11).
//!
//! A request keeps what it lets through; the answer does it, in one commit, as if it were done now. What has become pointless
//! meanwhile is withdrawn by whoever makes it so.

use chrono::Utc;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::super::approve::{NotResolved, make_request, resolve};
use super::super::schedule::leave_out_unanswered;
use super::super::{LifecycleError, NOW, Result};
use super::advance::{judge_again, reason, stay_closed};
use super::execute::{Begun, Occasion, begin_run};
use super::finish::{Ended, end_overdue, finish};
use crate::ids::{self, Approval, Id};
use crate::mission::Mission;
use crate::store::{
    ApprovalRow, BarrierState, Lease, MissionRunRow, ProjectDb, ProjectTx, Waiting, Withdrawn,
};
use crate::task::{Gate, Hook, Place, Settings};

/// What a request lets through, beside its mission and its run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(in super::super) struct Particulars {
    /// The schedule that begins the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in super::super) schedule: Option<Id<ids::Schedule>>,
    /// The quality gate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) barrier: Option<Id<ids::Barrier>>,
    /// The gates that are open for it already.
    #[serde(default)]
    pub(in super::super) passed: Vec<String>,
}

/// What a mission is about to do.
pub(super) struct Operation<'a> {
    /// Where gates may stand in its way, in their order.
    pub(super) hooks: &'a [Hook],
    /// The run that does it, if one has begun.
    pub(super) run: Option<i32>,
    /// What conditions see of the mission.
    pub(super) mission: Value,
    /// What they see of this.
    pub(super) data: Value,
    pub(super) particulars: Particulars,
}

impl Operation<'_> {
    /// Whether the settings have gates where it could be stopped.
    pub(super) fn is_gated(&self, settings: &Settings) -> bool {
        let mut gates = settings.approval_gates.iter();
        gates.any(|gate| self.hooks.contains(&gate.hook))
    }
}

/// A request that a mission waits for.
#[derive(Debug)]
pub(in super::super) struct Asked {
    /// The request.
    pub(in super::super) request: Id<Approval>,
    /// Whether it was made just now.
    pub(in super::super) new: bool,
    /// Why nothing goes on, in a sentence.
    pub(in super::super) sentence: String,
}

impl Asked {
    /// What whoever wanted more is told.
    pub(super) fn refusal(&self, mission: &Mission) -> LifecycleError {
        LifecycleError::Conflict(format!(
            "Mission \"{}\" ({}) begins when request {} is approved: POST /v1/approvals/{}/approve.",
            mission.name, mission.id, self.request, self.request
        ))
    }
}

/// Looks for a gate in the way of what a mission is about to do. Where one is closed, a person is asked, unless they are already. The
/// mission must be held, and stored after this.
pub(super) async fn ask_leave(
    tx: &mut ProjectTx,
    settings: &Settings,
    mission: &mut Mission,
    operation: Operation<'_>,
) -> Result<Option<Asked>> {
    let passed = &operation.particulars.passed;
    let closed = operation.hooks.iter().find_map(|hook| {
        let gates = &settings.approval_gates;
        Gate::closed_for_mission(gates, *hook, passed, &operation.mission, &operation.data)
            .map(|closed| (closed, *hook))
    });
    let Some((closed, hook)) = closed else {
        return Ok(None);
    };
    let barrier = operation.particulars.barrier;
    let hooks: Vec<&str> = operation.hooks.iter().map(|hook| hook.as_str()).collect();
    // Whoever is asked already may have been asked at a gate behind this one, which is open then.
    let pending = tx
        .pending_approval(mission.id, operation.run, &hooks, barrier)
        .await?;
    let request = match pending {
        Some(pending) => pending,
        None => {
            let waiting = Waiting::Mission {
                id: mission.id,
                run: operation.run,
                particulars: &json!(operation.particulars),
            };
            let payload = json!({
                "missionId": mission.id, "mission": operation.mission, "data": operation.data, "hook": hook.as_str(),
            });
            let request = make_request(tx, &closed, hook, waiting, payload).await?;
            let gate = &closed.gate;
            let told = json!({"requestId": request, "gateId": gate.id, "gateName": gate.name});
            mission.tell("approval:requested", told);
            request
        }
    };
    Ok(Some(Asked {
        request,
        new: pending.is_none(),
        sentence: format!("Request {request} waits for approval."),
    }))
}

/// Withdraws requests of a mission. It must be held, and stored after this.
pub(in super::super) async fn withdraw(
    tx: &mut ProjectTx,
    mission: &mut Mission,
    which: Withdrawn<'_>,
) -> Result<()> {
    let withdrawn = tx.withdraw_mission_approvals(mission.id, which).await?;
    tell_withdrawn(mission, withdrawn);
    Ok(())
}

/// Tells of requests that were withdrawn because the mission goes on without them.
pub(super) fn tell_withdrawn(mission: &mut Mission, requests: Vec<Id<Approval>>) {
    for id in requests {
        let told = json!({"requestId": id, "status": "rejected", "resolvedBy": "engine"});
        mission.tell("approval:resolved", told);
    }
}

/// A request with what it is about, held.
struct Held {
    mission: Mission,
    run: Option<MissionRunRow>,
    particulars: Particulars,
}

impl Held {
    async fn of(
        tx: &mut ProjectTx,
        asked: &ApprovalRow,
        mission: Id<ids::Mission>,
    ) -> Result<Self> {
        let run = match asked.mission_run {
            Some(run) => Some(tx.lock_mission_run(Place { mission, run }).await?),
            None => None,
        };
        let kept = asked.particulars.clone().unwrap_or_else(|| json!({}));
        let particulars = serde_json::from_value(kept).map_err(|error| {
            LifecycleError::Conflict(format!(
                "What the request lets through cannot be read: {error}."
            ))
        })?;
        Ok(Self {
            mission: tx.lock_mission(mission).await?,
            run,
            particulars,
        })
    }

    /// Its run, if that is under way still.
    fn running(&self) -> Option<&MissionRunRow> {
        self.run.as_ref().filter(|run| run.ended_at.is_none())
    }

    /// The gates that are open once this request is granted.
    fn passed(&self, row: &ApprovalRow) -> Vec<String> {
        let mut passed = self.particulars.passed.clone();
        passed.push(row.gate_id.clone());
        passed
    }
}

/// Says yes to a mission's request: what it stood in the way of is done, unless another gate does too.
///
/// # Errors
/// [`NotResolved`]; also where it cannot be done any more.
pub(in super::super) async fn approve(
    db: &ProjectDb,
    asked: &ApprovalRow,
    mission: Id<ids::Mission>,
    by: &str,
    note: Option<&str>,
) -> std::result::Result<ApprovalRow, NotResolved> {
    let mut tx = db.begin();
    let mut held = Held::of(&mut tx, asked, mission).await?;
    let row = resolve(&mut tx, asked.id, "approved", by, note).await?;
    let told = json!({"requestId": row.id, "status": "approved", "resolvedBy": by});
    held.mission.tell("approval:resolved", told);
    go_on(&mut tx, db, held, &row).await?;
    tx.commit().await?;
    Ok(row)
}

/// Does what the request stood in the way of, and stores the mission.
async fn go_on(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    mut held: Held,
    row: &ApprovalRow,
) -> Result<()> {
    let passed = held.passed(row);
    match Hook::of(&row.hook) {
        Some(Hook::MissionExecute | Hook::ScheduleTrigger) => begin(tx, db, held, &passed).await,
        Some(Hook::MissionComplete) => {
            let run = held.run.take().filter(|run| run.ended_at.is_none());
            tx.save_mission(&mut held.mission).await?;
            match run {
                Some(run) if !tx.has_unfinished(run.place).await? => {
                    finish(tx, db, run, Ended::ByItself(&passed)).await
                }
                _ => Ok(()),
            }
        }
        Some(Hook::QualityGate) => {
            if let (Some(run), Some(barrier)) = (held.running(), held.particulars.barrier) {
                let run = run.clone();
                let barrier = tx.barrier(barrier).await?;
                if barrier.state != BarrierState::Failed {
                    return Err(LifecycleError::Conflict(format!(
                        "The quality gate \"{}\" is judged again first. Approve it then.",
                        barrier.name
                    )));
                }
                judge_again(tx, db, &run, &mut held.mission, barrier, &passed).await?;
            }
            tx.save_mission(&mut held.mission).await?;
            Ok(())
        }
        _ => {
            tx.save_mission(&mut held.mission).await?;
            Ok(())
        }
    }
}

async fn begin(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    mut held: Held,
    passed: &[String],
) -> Result<()> {
    let now = Utc::now();
    let mut schedule = match held.particulars.schedule {
        // Changes to a schedule withdraw the requests that it has made.
        Some(_) => tx.schedule_of(held.mission.id).await?,
        None => None,
    };
    let occasion = Occasion {
        schedule: schedule.as_ref(),
        passed,
    };
    match begin_run(tx, db, &mut held.mission, occasion, now).await? {
        Begun::Run(_) => {
            if let Some(schedule) = &mut schedule {
                schedule.last_run_at = Some(now);
                tx.save_schedule(schedule).await?;
            }
        }
        Begun::Waits(asked) => held.mission.reason = Some(asked.sentence),
    }
    tx.save_mission(&mut held.mission).await?;
    Ok(())
}

/// Nobody answered a mission's request in time: it is as the gate says, and the job is done. What can be done no more is not done.
///
/// # Errors
/// When the database refuses, or the lease is lost.
pub(in super::super) async fn expire(
    lease: &Lease,
    asked: &ApprovalRow,
    mission: Id<ids::Mission>,
) -> Result<()> {
    if asked.timeout_action == "approve" {
        match try_expire(lease, asked, mission, None).await {
            Err(LifecycleError::Store(error)) => return Err(error.into()),
            Ok(()) => return Ok(()),
            Err(error) => {
                let sentence = match error {
                    LifecycleError::Faults(faults) => faults.join("; "),
                    error => error.to_string(),
                };
                return try_expire(lease, asked, mission, Some(sentence)).await;
            }
        }
    }
    let sentence = format!(
        "Nobody answered the request \"{}\" in time.",
        asked.gate_name
    );
    try_expire(lease, asked, mission, Some(sentence)).await
}

/// With a sentence nothing is done, because of that.
async fn try_expire(
    lease: &Lease,
    asked: &ApprovalRow,
    mission: Id<ids::Mission>,
    refused: Option<String>,
) -> Result<()> {
    let db = &lease.db;
    let mut tx = db.begin();
    let ends_tasks = refused.is_some() && asked.hook == Hook::QualitySla.as_str();
    let mut tasks = match asked.mission_run.filter(|_| ends_tasks) {
        Some(run) => tx.lock_tasks_of_run(Place { mission, run }, false).await?,
        None => Vec::new(),
    };
    let mut held = Held::of(&mut tx, asked, mission).await?;
    if ends_tasks
        && let Some(run) = held.running()
        && tx.count_unfinished(run.place).await? != tasks.len()
    {
        // One was taken up again meanwhile, and is not among those that are held.
        tx.put_off(lease, NOW).await?;
        tx.commit().await?;
        return Ok(());
    }
    let answered = tx
        .resolve_approval(asked.id, "timeout", "timeout", refused.as_deref())
        .await?;
    tx.complete(lease).await?;
    let Some(row) = answered else {
        tx.commit().await?;
        return Ok(());
    };
    let action = if refused.is_none() {
        "approve"
    } else {
        "reject"
    };
    let told = json!({"requestId": row.id, "action": action});
    held.mission.tell("approval:timeout", told);
    match refused {
        None => go_on(&mut tx, db, held, &row).await?,
        Some(sentence) if ends_tasks => {
            tx.save_mission(&mut held.mission).await?;
            if let Some(run) = held.run.filter(|run| run.ended_at.is_none()) {
                end_overdue(&mut tx, db, run, &mut tasks, &sentence).await?;
            }
        }
        Some(sentence) => refuse(&mut tx, db, held, &row, sentence).await?,
    }
    tx.commit().await?;
    Ok(())
}

/// What the request stood in the way of is not done, and the mission says why.
async fn refuse(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    mut held: Held,
    row: &ApprovalRow,
    sentence: String,
) -> Result<()> {
    match Hook::of(&row.hook) {
        Some(Hook::MissionComplete) => {
            tx.save_mission(&mut held.mission).await?;
            match held.run.filter(|run| run.ended_at.is_none()) {
                Some(run) if !tx.has_unfinished(run.place).await? => {
                    finish(tx, db, run, Ended::For(sentence)).await
                }
                _ => Ok(()),
            }
        }
        Some(Hook::QualityGate) => {
            if let (Some(_), Some(barrier)) = (held.running(), held.particulars.barrier) {
                let mut barrier = tx.barrier(barrier).await?;
                if barrier.state == BarrierState::Failed {
                    stay_closed(tx, &mut held.mission, &mut barrier, None, sentence).await?;
                    held.mission.reason = Some(reason(&barrier));
                }
            }
            tx.save_mission(&mut held.mission).await?;
            Ok(())
        }
        _ => {
            held.mission.reason = Some(sentence);
            let schedule = held.particulars.schedule;
            leave_out_unanswered(tx, &mut held.mission, schedule).await?;
            tx.save_mission(&mut held.mission).await?;
            Ok(())
        }
    }
}
