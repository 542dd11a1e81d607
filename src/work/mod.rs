//! The engine: what goes on without a request.
//!
//! A process claims jobs (`store/jobs.rs`), does each under its lease, and writes only while it has that. Nothing here
//! polls to make progress: wake-ups and due times do that; a look every half second is the net under both.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::Utc;
use futures::FutureExt;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::app::App;
use crate::lifecycle::{self, LifecycleError};
use crate::store::{Holder, Job, Lane, Lease, SUSPENDED, StoreError, World, until};

mod ask;
mod blocked;
mod conclusion;
mod courier;
mod execution;
mod judge;
mod places;
mod post;
mod proof;
mod pulse;
mod question;
mod record;
mod schedule;
mod surroundings;
mod task;
mod timers;

use places::{Places, is_drained};
pub use post::Poster;
use proof::Proof;
use pulse::Pulse;

/// The net under wake-ups, and how soon jobs of a process that was killed are taken over.
const LOOK: Duration = Duration::from_millis(500);
/// How late a job may be that is due sooner than anything that was known of: so often, at most, is the clock compared with what is
/// owed, however many wake-ups there are.
const GLANCE: Duration = Duration::from_millis(20);
/// How far apart tasks begin beside a crowd of timers: each costs Postgres more than a firing does, most of all where both are one
/// project's.
const TRICKLE: Duration = Duration::from_millis(40);
/// How long the connection that holds the lock may take to answer before it counts as lost: a busy database is not a lost one, and leases are longer.
const CHECK: Duration = Duration::from_secs(5);
/// How long other processes have to come back to a database that was away before they count as gone.
const RETURN: Duration = Duration::from_secs(2);
/// How often leases are extended.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// The most jobs of one claim.
const CLAIM: usize = 64;
/// The most couriers at work, beside the engine's jobs.
const COURIERS: usize = 1_024;
/// The most timers at once, beside both: they take no time, and must not wait for work that does. So many that a crowd of them
/// gets its share of the database's connections beside a crowd of tasks.
const TIMERS: usize = 128;
/// How often couriers are looked for that rest though there is something for them: the net under wake-ups that were lost
/// with the process that owed them.
const SWEEP: Duration = Duration::from_secs(5);
/// How long a job rests that failed because of the database.
const REST: Duration = Duration::from_secs(2);
/// How long a job rests that failed because of us, if its task cannot end for it.
const LONG_REST: Duration = Duration::from_secs(60);

/// Why a job was not done.
#[derive(Debug, thiserror::Error)]
enum WorkError {
    /// It is someone else's now, or nobody's.
    #[error("the lease is lost")]
    LeaseLost,
    /// What it was decided from has changed since: look again.
    #[error("it has changed since it was read")]
    Stale,
    /// What it is about was deleted, or something that this needs.
    #[error("something of it is gone")]
    Gone,
    /// The database is away.
    #[error("{0:#}")]
    Unavailable(anyhow::Error),
    /// A defect of ours.
    #[error("the job failed")]
    Defect(#[source] anyhow::Error),
}

impl From<StoreError> for WorkError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::LeaseLost => Self::LeaseLost,
            StoreError::Stale => Self::Stale,
            StoreError::NotFound => Self::Gone,
            StoreError::Unavailable(_) => Self::Unavailable(error.into()),
            error => Self::Defect(error.into()),
        }
    }
}

impl From<LifecycleError> for WorkError {
    fn from(error: LifecycleError) -> Self {
        match error {
            LifecycleError::Store(error) => error.into(),
            error => Self::Defect(error.into()),
        }
    }
}

type Result<T> = std::result::Result<T, WorkError>;

/// A job under way in this process.
#[derive(Debug)]
struct Held {
    app: App,
    lease: Lease,
    /// Trips when the lease is lost.
    lost: CancellationToken,
    proof: Arc<Proof>,
    pulse: Pulse,
}

impl Held {
    /// Whether the job is certainly ours still.
    async fn is_surely_ours(&self) -> Result<bool> {
        Ok(self.proof.is_fresh().await?)
    }

    /// Whether the project is suspended, so that its work rests. Who cannot ask goes on.
    async fn is_suspended(&self) -> bool {
        let project = self.lease.db.project();
        self.app.db.is_suspended(project).await.unwrap_or(false)
    }

    /// Whether work on the job should end at the next chance: this process stops, or the project is suspended.
    async fn should_rest(&self) -> bool {
        self.app.stopping.is_cancelled() || self.is_suspended().await
    }

    /// Whether the job is certainly not ours any more; asked when someone says that it may not be. Who cannot ask goes on with what is under way:
    /// an answer that is being paid for is not thrown away for a database that is away, and nothing new is begun without a proof.
    async fn is_known_to_be_lost(&self) -> Result<bool> {
        match self.proof.renew().await {
            Ok(ours) => Ok(!ours),
            Err(StoreError::Unavailable(error)) => {
                tracing::debug!("it is not known whose a job is: {error}");
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// One process' part in the engine.
#[derive(Debug)]
struct Engine {
    app: App,
    holder: Holder,
    /// Since when this process has its lock, if it has: what it claims without one looks like a dead process' work.
    standing: watch::Sender<Option<Instant>>,
    /// By world and number: each world counts its leases for itself.
    running: Mutex<HashMap<(World, i64), CancellationToken>>,
    timers: Arc<Places>,
    jobs: TaskTracker,
}

/// How far a lane of a world has been seen to.
#[derive(Debug)]
struct Rota {
    /// Whose turn it is: projects after this one.
    cursor: Uuid,
    /// When the clock is next compared with what is owed.
    due: Instant,
    /// When the next task may begin beside a crowd of timers. They are quick and are to be on time, so tasks begin one by one until
    /// the crowd is gone; projects take turns at that as always.
    trickles_at: Instant,
}

impl Rota {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            cursor: Uuid::nil(),
            due: now,
            trickles_at: now,
        }
    }
}

const POISONED: &str = "nothing panics while it holds the list of jobs";

/// Works until the server stops, then until every job has been handed over.
pub async fn run(app: App) {
    let places = Places::new(Lane::Engine, app.config.worker_slots);
    let couriers = Places::new(Lane::Couriers, COURIERS);
    let engine = Arc::new(Engine {
        holder: Holder::new(rand::random()),
        standing: watch::Sender::new(None),
        running: Mutex::default(),
        timers: Places::new(Lane::Timers, TIMERS),
        jobs: TaskTracker::new(),
        app,
    });
    let working = async {
        tokio::join!(
            engine.stand(),
            engine.attend(World::Live, &places),
            engine.attend(World::Test, &places),
            engine.attend(World::Live, &couriers),
            engine.attend(World::Test, &couriers),
            engine.attend(World::Live, &engine.timers),
            engine.attend(World::Test, &engine.timers),
            engine.sweep(),
            engine.beat(),
        );
    };
    let ending = async {
        engine.app.stopping.cancelled().await;
        engine.jobs.close();
        engine.jobs.wait().await;
    };
    tokio::select! {
        () = working => {}
        () = ending => {}
    }
}

impl Engine {
    /// Keeps the lock that says that this process lives, and takes over from processes that do not.
    async fn stand(&self) {
        // Who has lost the database looks at others only when they have had the time to come back to it as well.
        let mut others_are_back = Instant::now();
        loop {
            let db = &self.app.db;
            let lost = match db.in_time(db.hold(self.holder)).await {
                Ok(mut standing) => {
                    self.standing.send_replace(Some(Instant::now()));
                    loop {
                        if Instant::now() >= others_are_back
                            && let Err(error) = self.take_over().await
                        {
                            tracing::debug!("the jobs of other processes cannot be seen: {error}");
                        }
                        tokio::time::sleep(LOOK).await;
                        match tokio::time::timeout(CHECK, standing.check()).await {
                            Ok(Ok(())) => {}
                            Ok(Err(error)) => break error.to_string(),
                            Err(elapsed) => break elapsed.to_string(),
                        }
                    }
                }
                Err(error) => error.to_string(),
            };
            self.standing.send_replace(None);
            tracing::warn!("the engine has lost its database, trying again: {lost}");
            tokio::time::sleep(LOOK).await;
            others_are_back = Instant::now() + RETURN;
        }
    }

    async fn take_over(&self) -> std::result::Result<(), StoreError> {
        for world in World::ALL {
            let db = &self.app.db;
            let freed = db.in_time(db.free_orphaned_jobs(world)).await?;
            if freed > 0 {
                tracing::info!(jobs = freed, "taking over from a process that is gone");
                for lane in Lane::ALL {
                    db.ring(lane.topic(world));
                }
            }
        }
        Ok(())
    }

    /// Wakes couriers that were not woken when there was something for them.
    async fn sweep(&self) {
        loop {
            tokio::time::sleep(SWEEP).await;
            for world in World::ALL {
                let db = &self.app.db;
                if let Err(error) = db.in_time(db.ready_couriers_behind(world)).await {
                    tracing::debug!("resting couriers cannot be seen: {error}");
                }
            }
        }
    }

    /// Claims a lane's jobs of a world as they become ready.
    async fn attend(self: &Arc<Self>, world: World, places: &Arc<Places>) {
        let mut woken = self.app.db.wait(places.lane.topic(world));
        let mut standing = self.standing.subscribe();
        let mut rota = Rota::new();
        while !self.app.stopping.is_cancelled() {
            standing.borrow_and_update();
            let mut freed = pin!(places.freed.notified());
            // From here on: a place that comes free during the look is heard of.
            freed.as_mut().enable();
            if let Err(error) = self.look(world, places, &mut rota).await {
                tracing::debug!("no jobs can be claimed, trying again: {error}");
                rota.due = Instant::now() + LOOK;
            }
            tokio::select! {
                changed = woken.changed() => {
                    changed.expect("the bell outlives the engine");
                    rota.due = rota.due.min(Instant::now() + GLANCE);
                }
                () = freed => {}
                _ = standing.changed() => rota.due = Instant::now(),
                () = tokio::time::sleep_until(rota.due) => {}
                () = self.app.stopping.cancelled() => {}
            }
        }
    }

    /// Claims what is ready and there is room for; before it, makes ready what has come due, if something may have.
    async fn look(
        self: &Arc<Self>,
        world: World,
        places: &Arc<Places>,
        rota: &mut Rota,
    ) -> std::result::Result<(), StoreError> {
        let now = Instant::now();
        if self.standing.borrow().is_none() {
            rota.due = now + LOOK;
            return Ok(());
        }
        let db = &self.app.db;
        if rota.due <= now {
            let next = db.in_time(db.ready_due_jobs(world, places.lane)).await?;
            let pause = match next.map(|next| until(next, Utc::now())) {
                None => LOOK,
                // Someone has hold of it, or it has come due this moment.
                Some(Duration::ZERO) => GLANCE,
                Some(pause) => pause.clamp(Duration::from_millis(1), LOOK),
            };
            rota.due = now + pause;
        }
        let crowded = places.lane == Lane::Engine && self.timers.is_crowded(world);
        if crowded {
            rota.due = rota.due.min(now + GLANCE);
            if now < rota.trickles_at {
                return Ok(());
            }
            rota.trickles_at = now + TRICKLE;
        }
        loop {
            let _claiming = places.claiming.lock().await;
            let room = places.room(world, if crowded { 1 } else { CLAIM });
            let behind = places.behind(world);
            let least = if behind.load(Ordering::Relaxed) {
                places.batch()
            } else {
                1
            };
            if room.most < least || self.app.stopping.is_cancelled() {
                break;
            }
            let from_the_start = rota.cursor.is_nil();
            let asked = Instant::now();
            let claim = db.claim(world, places.lane, self.holder, rota.cursor, &room);
            let claimed = db.in_time(claim).await?;
            let drained = is_drained(&claimed, &room);
            let left_out = room.of_some.values().any(|most| *most == 0);
            behind.store(left_out || !(drained && from_the_start), Ordering::Relaxed);
            // All projects from the cursor on have had their turn, unless there are more than there was room for.
            rota.cursor = if drained || claimed.projects < room.most {
                Uuid::nil()
            } else {
                claimed.cursor
            };
            let none = claimed.leases.is_empty();
            for lease in claimed.leases {
                let permit = places.free.clone().acquire_owned().await;
                let permit = permit.expect("the places are never closed");
                self.begin(lease, asked, places.clone(), permit);
            }
            // The one task of a crowded round may be found only from the start again.
            if (crowded && !none) || (drained && from_the_start) {
                break;
            }
        }
        Ok(())
    }

    fn begin(
        self: &Arc<Self>,
        lease: Lease,
        asked: Instant,
        places: Arc<Places>,
        place: OwnedSemaphorePermit,
    ) {
        let lost = CancellationToken::new();
        let number = lease.number();
        let (world, project) = (lease.db.world(), lease.db.project());
        places.take(project);
        self.running
            .lock()
            .expect(POISONED)
            .insert((world, number), lost.clone());
        let engine = self.clone();
        self.jobs.spawn(async move {
            let db = engine.app.db.clone();
            let standing = engine.standing.subscribe();
            let proof = Proof::new(db, engine.holder, lease.clone(), asked, standing);
            let held = Held {
                app: engine.app.clone(),
                proof: Arc::new(proof),
                lease,
                lost,
                pulse: Pulse::new(),
            };
            held.work_while_it_lives().await;
            let mut running = engine.running.lock().expect(POISONED);
            running.remove(&(world, number));
            drop(running);
            drop(place);
            places.leave(project);
        });
    }

    /// Extends the leases of what is under way, and stops what is no longer ours.
    async fn beat(&self) {
        loop {
            tokio::time::sleep(HEARTBEAT).await;
            for world in World::ALL {
                let numbers: Vec<i64> = {
                    let running = self.running.lock().expect(POISONED);
                    let of_world = running.keys().filter(|(of, _)| *of == world);
                    of_world.map(|(_, number)| *number).collect()
                };
                if numbers.is_empty() {
                    continue;
                }
                let db = &self.app.db;
                let extended = db.extend_all(world, self.holder, &numbers);
                match db.in_time(extended).await {
                    Ok(kept) => {
                        let running = self.running.lock().expect(POISONED);
                        for number in numbers.iter().filter(|number| !kept.contains(number)) {
                            if let Some(lost) = running.get(&(world, *number)) {
                                lost.cancel();
                            }
                        }
                    }
                    // Whatever is written is fenced; and the lease is longer than a short outage.
                    Err(error) => tracing::warn!("leases cannot be extended: {error}"),
                }
            }
        }
    }
}

impl Held {
    /// Does the job, unless it waits for an answer of the database that does not come: then it is dropped where it stands, and whoever has it when its lease
    /// has run out does what is not on record.
    async fn work_while_it_lives(&self) {
        let patience = self.app.config.database_patience() * 2;
        tokio::select! {
            () = self.work() => {}
            () = self.pulse.stopped(patience) => {
                tracing::warn!(job = ?self.lease.job, "a job waits for a database that does not answer: it is left for another try");
                self.app.db.suspect();
            }
        }
    }

    /// Does the job. Whatever goes wrong, it is done, given back, or someone else's in the end.
    async fn work(&self) {
        let done = AssertUnwindSafe(self.dispatch()).catch_unwind().await;
        let returned = match done {
            Ok(Ok(()) | Err(WorkError::LeaseLost)) => return,
            Ok(Err(WorkError::Gone)) => self.drop_if_gone().await,
            Ok(Err(WorkError::Stale)) => {
                self.put_off(Duration::ZERO).await.map_err(WorkError::from)
            }
            Ok(Err(WorkError::Unavailable(error))) => {
                tracing::warn!(job = ?self.lease.job, "a job must wait for the database: {error:#}");
                self.put_off(REST).await.map_err(WorkError::from)
            }
            Ok(Err(WorkError::Defect(error))) => {
                tracing::error!(job = ?self.lease.job, "a job failed: {error:#}");
                self.count_defect().await
            }
            Err(_panic) => {
                tracing::error!(job = ?self.lease.job, "a job panicked");
                self.count_defect().await
            }
        };
        if let Err(unreturned) = returned {
            tracing::debug!("the job comes back when its lease runs out: {unreturned}");
        }
    }

    /// Drops the job if what it is about was deleted at the moment in which someone owed it: nobody else would, and it would be
    /// claimed for ever.
    async fn drop_if_gone(&self) -> Result<()> {
        let db = &self.lease.db;
        let mut tx = db.begin();
        let found = match self.lease.job {
            Job::Task(id)
            | Job::Blocked(id)
            | Job::Reassess(id)
            | Job::Deadline(id)
            | Job::Escalation(id) => tx.lock_task(id).await.map(drop),
            Job::MissionDeadline(id) => tx.mission_as_it_stands(id).await.map(drop),
            Job::Delay(id) => tx.barrier(id).await.map(drop),
            // These go with what they are about, under its lock.
            Job::Approval(_) | Job::Schedule(_) | Job::Webhook(_) => Ok(()),
        };
        match found {
            Err(StoreError::NotFound) => tx.complete(&self.lease).await?,
            found => return Ok(found?),
        }
        Ok(tx.commit().await?)
    }

    /// Has a job tried again that failed because of us, but not for ever.
    async fn count_defect(&self) -> Result<()> {
        let counted = match self.lease.job {
            Job::Task(id) | Job::Blocked(id) => {
                let mut tx = self.lease.db.begin();
                let pause = task::pause(self);
                lifecycle::after_defect(&mut tx, &self.lease.db, &self.lease, id, pause)
                    .await
                    .map_err(WorkError::from)
                    .map(|()| tx)
            }
            _ => Err(WorkError::Defect(anyhow::anyhow!("it is no task's job"))),
        };
        match counted {
            Ok(tx) => Ok(tx.commit().await?),
            // A row that cannot be read can be mended; until then it costs little.
            Err(WorkError::Defect(_)) => Ok(self.put_off(LONG_REST).await?),
            Err(error) => Err(error),
        }
    }

    async fn put_off(&self, pause: Duration) -> std::result::Result<(), StoreError> {
        let mut tx = self.lease.db.begin();
        tx.put_off(&self.lease, pause).await?;
        tx.commit().await
    }

    async fn dispatch(&self) -> Result<()> {
        if self.is_suspended().await {
            let mut tx = self.lease.db.begin();
            tx.park(&self.lease, SUSPENDED).await?;
            return Ok(tx.commit().await?);
        }
        match self.lease.job {
            Job::Task(id) => task::advance(self, id).await,
            Job::Blocked(id) => blocked::resolve(self, id).await,
            Job::Reassess(id) => judge::reassess(self, id).await,
            Job::Deadline(id) => timers::deadline(self, id).await,
            Job::Escalation(id) => timers::escalation(self, id).await,
            Job::Approval(id) => timers::approval(self, id).await,
            Job::Delay(id) => timers::delay(self, id).await,
            Job::MissionDeadline(id) => Ok(lifecycle::mission::deadline(&self.lease, id).await?),
            Job::Schedule(id) => schedule::fire(self, id).await,
            Job::Webhook(id) => courier::carry(self, id).await,
        }
    }
}
