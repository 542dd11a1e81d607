//! Schedules: what people do to them, and what happens when one is due (contract 2.12).
//!
//! `now` is given: tests tell the time. A firing, the next due time and the run that it begins are one commit under the lease
//! of the schedule's job, so that of several processes one fires, once.

use chrono::{DateTime, Utc};
use serde_json::json;

use super::mission::{Begun, Execution, Occasion, begin_run, withdraw};
use super::{LifecycleError, Result};
use crate::event::timestamp;
use crate::ids::{self, Id};
use crate::mission::{
    CatchUp, Decision, Mission, Overlap, Schedule, SkipReason, Standing, Status, Timing,
};
use crate::store::{Job, Lease, ProjectDb, ProjectTx, ScheduleRow, StoreError, Withdrawn, until};

/// A schedule to be set.
#[derive(Debug, Clone)]
pub struct NewSchedule {
    /// Cron, or a date.
    pub expression: String,
    /// The zone of its clock; UTC when absent.
    pub timezone: Option<String>,
    /// Whether it is due again and again.
    pub recurring: bool,
    /// Whether it is due at all.
    pub enabled: bool,
    /// From when on it is not.
    pub end_date: Option<DateTime<Utc>>,
    /// How long a run that it begins may take, in milliseconds.
    pub deadline_offset_ms: Option<i64>,
    /// What becomes of missed occurrences.
    pub catch_up: CatchUp,
    /// What becomes of occurrences while a run is under way.
    pub overlap: Overlap,
}

/// A change to a schedule; `None` leaves a field as it is.
#[derive(Debug, Clone, Default)]
pub struct ScheduleChange {
    /// Another expression.
    pub expression: Option<String>,
    /// Another zone; UTC for `Some(None)`.
    pub timezone: Option<Option<String>>,
    /// Whether it is due again and again.
    pub recurring: Option<bool>,
    /// Whether it is due at all.
    pub enabled: Option<bool>,
    /// Another end; none for `Some(None)`.
    pub end_date: Option<Option<DateTime<Utc>>>,
    /// Another limit; none for `Some(None)`.
    pub deadline_offset_ms: Option<Option<i64>>,
    /// What becomes of missed occurrences.
    pub catch_up: Option<CatchUp>,
    /// What becomes of occurrences while a run is under way.
    pub overlap: Option<Overlap>,
}

/// Sets a mission's schedule, in place of an earlier one.
///
/// # Errors
/// [`LifecycleError::Invalid`] for an expression that cannot be used or is never due; [`StoreError::NotFound`] for no such mission.
pub async fn set(
    db: &ProjectDb,
    mission: Id<ids::Mission>,
    new: NewSchedule,
) -> Result<ScheduleRow> {
    let mut tx = db.begin();
    let mut mission = tx.lock_mission(mission).await?;
    let schedule = put(&mut tx, &mut mission, new, Utc::now()).await?;
    tx.save_mission(&mut mission).await?;
    tx.commit().await?;
    Ok(schedule)
}

/// Sets a schedule. The mission must be held, and stored after this.
pub(super) async fn put(
    tx: &mut ProjectTx,
    mission: &mut Mission,
    new: NewSchedule,
    now: DateTime<Utc>,
) -> Result<ScheduleRow> {
    let before = tx.schedule_of(mission.id).await?;
    let mut schedule = ScheduleRow {
        id: before.as_ref().map_or_else(Id::new, |before| before.id),
        mission: mission.id,
        expression: new.expression,
        timezone: new.timezone,
        recurring: new.recurring,
        enabled: new.enabled,
        end_date: new.end_date,
        deadline_offset_ms: new.deadline_offset_ms,
        catch_up: new.catch_up,
        overlap: new.overlap,
        queued: false,
        last_run_at: None,
        next_run_at: None,
        created_at: before.map_or(now, |before| before.created_at),
    };
    plan(tx, mission, &mut schedule, now).await?;
    mission.tell(
        "schedule:created",
        json!({"scheduleId": schedule.id, "nextRunAt": schedule.next_run_at.map(timestamp)}),
    );
    Ok(schedule)
}

/// Works out when a new or changed schedule is due, owes that, and puts the mission where it waits for it.
async fn plan(
    tx: &mut ProjectTx,
    mission: &mut Mission,
    schedule: &mut ScheduleRow,
    now: DateTime<Utc>,
) -> Result<()> {
    let timing = timing(schedule)?;
    let next = timed(schedule, timing).next_after(now);
    if next.is_none() {
        let (param, message) = match schedule.end_date {
            Some(_) => ("endDate", "`endDate` comes before the schedule is due."),
            None => ("expression", "`expression` is a date that has passed."),
        };
        return Err(invalid(param, message.to_owned()));
    }
    schedule.next_run_at = next.filter(|_| schedule.enabled);
    tx.save_schedule(schedule).await?;
    withdraw(tx, mission, Withdrawn::Of(schedule.id)).await?;
    match schedule.next_run_at {
        Some(next) => {
            tx.enqueue(Job::Schedule(schedule.id), 1.0, until(next, now))
                .await?;
        }
        None => tx.call_off(Job::Schedule(schedule.id)).await?,
    }
    let waits = waiting(schedule);
    // One that runs is put there when the run ends; one whose schedule is switched off waits for nothing.
    if schedule.enabled && !mission.status().is_running() && mission.status() != waits {
        mission.go(waits, None)?;
    }
    Ok(())
}

/// What a mission is while it waits for its schedule.
fn waiting(schedule: &ScheduleRow) -> Status {
    if schedule.recurring {
        Status::Recurring
    } else {
        Status::Scheduled
    }
}

fn invalid(param: &'static str, message: String) -> LifecycleError {
    LifecycleError::Invalid { param, message }
}

fn timing(schedule: &ScheduleRow) -> Result<Timing> {
    Timing::parse(
        &schedule.expression,
        schedule.timezone.as_deref(),
        schedule.recurring,
    )
    .map_err(|error| invalid(error.parameter, error.message))
}

fn timed(schedule: &ScheduleRow, timing: Timing) -> Schedule {
    Schedule {
        timing,
        recurring: schedule.recurring,
        enabled: schedule.enabled,
        end_date: schedule.end_date,
        due: schedule.next_run_at,
        catch_up: schedule.catch_up,
        overlap: schedule.overlap,
    }
}

/// When a schedule is due next, at most `count` times.
pub fn upcoming(schedule: &ScheduleRow, now: DateTime<Utc>, count: usize) -> Vec<DateTime<Utc>> {
    if !schedule.enabled {
        return Vec::new();
    }
    let Ok(timing) = timing(schedule) else {
        return Vec::new();
    };
    let count = if schedule.recurring { count } else { 1 };
    timing.upcoming(now, schedule.end_date, count)
}

/// Changes a schedule.
///
/// # Errors
/// As [`set`]; [`StoreError::NotFound`] when there is none.
pub async fn update(
    db: &ProjectDb,
    mission: Id<ids::Mission>,
    change: ScheduleChange,
) -> Result<ScheduleRow> {
    let mut tx = db.begin();
    let mut mission = tx.lock_mission(mission).await?;
    let schedule = self::change(&mut tx, &mut mission, change).await?;
    tx.save_mission(&mut mission).await?;
    tx.commit().await?;
    Ok(schedule)
}

/// Changes a schedule. The mission must be held, and stored after this.
pub(super) async fn change(
    tx: &mut ProjectTx,
    mission: &mut Mission,
    change: ScheduleChange,
) -> Result<ScheduleRow> {
    let found = tx.schedule_of(mission.id).await?;
    let mut schedule = found.ok_or(StoreError::NotFound)?;
    schedule.expression = change.expression.unwrap_or(schedule.expression);
    schedule.timezone = change.timezone.unwrap_or(schedule.timezone);
    schedule.recurring = change.recurring.unwrap_or(schedule.recurring);
    schedule.enabled = change.enabled.unwrap_or(schedule.enabled);
    schedule.end_date = change.end_date.unwrap_or(schedule.end_date);
    schedule.deadline_offset_ms = change
        .deadline_offset_ms
        .unwrap_or(schedule.deadline_offset_ms);
    schedule.catch_up = change.catch_up.unwrap_or(schedule.catch_up);
    schedule.overlap = change.overlap.unwrap_or(schedule.overlap);
    if schedule.enabled {
        plan(tx, mission, &mut schedule, Utc::now()).await?;
    } else {
        timing(&schedule)?;
        schedule.next_run_at = None;
        schedule.queued = false;
        tx.save_schedule(&mut schedule).await?;
        withdraw(tx, mission, Withdrawn::Of(schedule.id)).await?;
        tx.call_off(Job::Schedule(schedule.id)).await?;
        let waits = waiting(&schedule);
        let waited = matches!(mission.status(), Status::Recurring | Status::Scheduled);
        if waited && mission.status() != waits {
            mission.go(waits, None)?;
        }
    }
    Ok(schedule)
}

/// Gives a mission another expression: a schedule that it has keeps its zone and its policies. The mission must be held, and
/// stored after this.
pub(super) async fn put_over(
    tx: &mut ProjectTx,
    mission: &mut Mission,
    new: NewSchedule,
    now: DateTime<Utc>,
) -> Result<()> {
    if tx.schedule_of(mission.id).await?.is_none() {
        return put(tx, mission, new, now).await.map(drop);
    }
    let change = ScheduleChange {
        expression: Some(new.expression),
        recurring: Some(new.recurring),
        enabled: Some(new.enabled),
        end_date: Some(new.end_date),
        ..ScheduleChange::default()
    };
    self::change(tx, mission, change).await.map(drop)
}

/// Removes a schedule; its mission is a draft again.
///
/// # Errors
/// [`StoreError::NotFound`] when there is none.
pub async fn delete(db: &ProjectDb, mission: Id<ids::Mission>) -> Result<()> {
    let mut tx = db.begin();
    let mut mission = tx.lock_mission(mission).await?;
    if tx.schedule_of(mission.id).await?.is_none() {
        return Err(StoreError::NotFound.into());
    }
    remove(&mut tx, &mut mission).await?;
    tx.save_mission(&mut mission).await?;
    tx.commit().await?;
    Ok(())
}

/// Removes a schedule, if there is one. The mission must be held, and stored after this.
pub(super) async fn remove(tx: &mut ProjectTx, mission: &mut Mission) -> Result<()> {
    if let Some(schedule) = tx.schedule_of(mission.id).await? {
        withdraw(tx, mission, Withdrawn::Of(schedule.id)).await?;
    }
    tx.delete_schedule_of(mission.id).await?;
    if matches!(mission.status(), Status::Scheduled | Status::Recurring) {
        mission.go(Status::Draft, None)?;
    }
    Ok(())
}

/// What was done about a schedule that was due.
#[derive(Debug)]
pub enum Fired {
    /// A run of its mission has begun.
    Began(Execution),
    /// No run has begun.
    Nothing,
}

/// Looks at a schedule whose time may have come, and does what its policies say for its mission. Everything that it does is one commit.
///
/// # Errors
/// [`StoreError::LeaseLost`] when another process has the job. [`LifecycleError::Invalid`] and [`LifecycleError::Faults`] when the
/// mission cannot be executed: then nothing is done, see [`skip_failed`].
pub async fn fire(
    lease: &Lease,
    id: Id<ids::Schedule>,
    mission: Id<ids::Mission>,
    now: DateTime<Utc>,
) -> Result<Fired> {
    let db = &lease.db;
    let mut tx = db.begin();
    let mut mission = tx.lock_mission(mission).await?;
    let found = tx.schedule_of(mission.id).await?;
    let mut schedule = found
        .filter(|schedule| schedule.id == id)
        .ok_or(StoreError::NotFound)?;
    let standing = standing(&mission);
    let timed = timed(&schedule, timing(&schedule)?);
    if schedule.queued && standing != Standing::Busy {
        schedule.queued = false;
        // An occurrence that waited for the run under way is due now.
        if standing == Standing::Ready && !timed.is_over(now) {
            let next = schedule.next_run_at.filter(|next| *next > now);
            let next = next.or_else(|| timed.next_after(now).filter(|_| schedule.recurring));
            let fired = begin(&mut tx, db, &mut mission, &mut schedule, next, now).await?;
            return settle(tx, lease, mission, schedule, now, fired).await;
        }
    }
    let fired = match timed.decide(now, standing) {
        Decision::Wait => Fired::Nothing,
        Decision::Fire { next } => {
            begin(&mut tx, db, &mut mission, &mut schedule, next, now).await?
        }
        Decision::Queue { next } => {
            schedule.queued = true;
            schedule.next_run_at = next;
            Fired::Nothing
        }
        Decision::Skip { reason, next } => {
            leave_out(&mut mission, &mut schedule, reason, next)?;
            Fired::Nothing
        }
        Decision::Expire => {
            expire(&mut mission, &mut schedule)?;
            withdraw(&mut tx, &mut mission, Withdrawn::BeforeRuns).await?;
            Fired::Nothing
        }
    };
    settle(tx, lease, mission, schedule, now, fired).await
}

fn standing(mission: &Mission) -> Standing {
    match mission.status() {
        Status::Scheduled | Status::Recurring => Standing::Ready,
        Status::Active | Status::Paused => Standing::Busy,
        _ => Standing::Elsewhere,
    }
}

async fn begin(
    tx: &mut ProjectTx,
    db: &ProjectDb,
    mission: &mut Mission,
    schedule: &mut ScheduleRow,
    next: Option<DateTime<Utc>>,
    now: DateTime<Utc>,
) -> Result<Fired> {
    let due = schedule.next_run_at;
    let occasion = Occasion {
        schedule: Some(schedule),
        passed: &[],
    };
    let begun = begin_run(tx, db, mission, occasion, now).await?;
    schedule.next_run_at = next;
    schedule.enabled &= schedule.recurring;
    Ok(match begun {
        Begun::Run(execution) => {
            schedule.last_run_at = Some(now);
            Fired::Began(execution)
        }
        Begun::Waits(asked) => {
            if !asked.new {
                // One that waits is enough.
                tell_skipped(mission, schedule.id, due, SkipReason::AwaitingApproval);
            }
            mission.reason = Some(asked.sentence);
            Fired::Nothing
        }
    })
}

fn tell_skipped(
    mission: &mut Mission,
    schedule: Id<ids::Schedule>,
    due: Option<DateTime<Utc>>,
    reason: SkipReason,
) {
    mission.tell(
        "schedule:skipped",
        json!({"scheduleId": schedule, "dueAt": due.map(timestamp), "reason": reason}),
    );
}

/// Nobody approved of a run in time. Where a schedule was to begin it, it is left out; and a mission that waits for a date and has no
/// other fails. The mission must be held, with the
/// reason, and stored after this.
pub(super) async fn leave_out_unanswered(
    tx: &mut ProjectTx,
    mission: &mut Mission,
    schedule: Option<Id<ids::Schedule>>,
) -> Result<()> {
    if let Some(schedule) = schedule {
        tell_skipped(mission, schedule, None, SkipReason::NotApproved);
    }
    let found = tx.schedule_of(mission.id).await?;
    let last = found.is_none_or(|schedule| schedule.next_run_at.is_none());
    if last && mission.status() == Status::Scheduled {
        let reason = mission.reason.take();
        mission.go(Status::Failed, reason)?;
    }
    Ok(())
}

fn leave_out(
    mission: &mut Mission,
    schedule: &mut ScheduleRow,
    reason: SkipReason,
    next: Option<DateTime<Utc>>,
) -> Result<()> {
    tell_skipped(mission, schedule.id, schedule.next_run_at, reason);
    schedule.next_run_at = next;
    schedule.enabled &= schedule.recurring;
    if !schedule.recurring && mission.status() == Status::Scheduled {
        let reason = "Its time had passed before a process could execute it.".to_owned();
        mission.go(Status::Failed, Some(reason))?;
    }
    Ok(())
}

fn expire(mission: &mut Mission, schedule: &mut ScheduleRow) -> Result<()> {
    schedule.enabled = false;
    schedule.next_run_at = None;
    mission.tell(
        "schedule:expired",
        json!({"scheduleId": schedule.id, "endDate": schedule.end_date.map(timestamp)}),
    );
    if matches!(mission.status(), Status::Scheduled | Status::Recurring) {
        mission.go(
            Status::Completed,
            Some("Its schedule has ended.".to_owned()),
        )?;
    }
    Ok(())
}

/// Stores what was decided, with the job's next time, and commits.
async fn settle(
    mut tx: ProjectTx,
    lease: &Lease,
    mut mission: Mission,
    mut schedule: ScheduleRow,
    now: DateTime<Utc>,
    fired: Fired,
) -> Result<Fired> {
    tx.save_schedule(&mut schedule).await?;
    tx.save_mission(&mut mission).await?;
    // Without another occurrence there is still the end to tell of.
    let due = schedule.next_run_at.or(schedule.end_date);
    match due.filter(|_| schedule.enabled) {
        Some(due) => tx.put_off(lease, until(due, now)).await?,
        None => tx.complete(lease).await?,
    }
    tx.commit().await?;
    Ok(fired)
}

/// A mission could not be executed when it was due: the occurrence is left out, and both say why.
///
/// # Errors
/// As [`fire`].
pub async fn skip_failed(
    lease: &Lease,
    id: Id<ids::Schedule>,
    of: Id<ids::Mission>,
    sentence: &str,
    now: DateTime<Utc>,
) -> Result<()> {
    let mut tx = lease.db.begin();
    let mut mission = tx.lock_mission(of).await?;
    let found = tx.schedule_of(mission.id).await?;
    let mut schedule = found
        .filter(|schedule| schedule.id == id)
        .ok_or(StoreError::NotFound)?;
    let timed = timed(&schedule, timing(&schedule)?);
    let standing = standing(&mission);
    let begins = matches!(timed.decide(now, standing), Decision::Fire { .. })
        || (schedule.queued && standing == Standing::Ready && !timed.is_over(now));
    if !begins {
        // Whatever is to be done about it executes nothing.
        drop(tx);
        return fire(lease, id, of, now).await.map(drop);
    }
    let next = timed.next_after(now);
    mission.tell(
        "schedule:failed",
        json!({"scheduleId": id, "dueAt": schedule.next_run_at.map(timestamp), "reason": sentence}),
    );
    schedule.queued = false;
    schedule.next_run_at = next.filter(|_| schedule.recurring);
    schedule.enabled &= schedule.recurring;
    mission.reason = Some(sentence.to_owned());
    if mission.status() == Status::Scheduled && !schedule.recurring {
        mission.go(Status::Failed, Some(sentence.to_owned()))?;
    }
    settle(tx, lease, mission, schedule, now, Fired::Nothing).await?;
    Ok(())
}
