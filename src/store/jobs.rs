//! Jobs: the work still owed, and the leases on it.
//!
//! A claim gives a job a new lease number and a time by which it must have come further. Whatever the claimer
//! writes is written only while the number is still the job's, so a job that someone else has taken
//! over, or that was called off, cannot be finished twice. A job whose claimer is gone becomes ready again: at once when the
//! claimer's advisory lock is free, and at the end of its lease in any case.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::{Db, ProjectDb, ProjectTx, Result, StoreError, Topic, World, to_micros};
use crate::ids::{Approval, Barrier, Id, Mission, Run, Schedule, Task, Webhook};

/// How long a claimer that says nothing keeps a job (design 0.1, Leases).
pub const LEASE: Duration = Duration::from_secs(10);
/// What is left of a lease, at least, after a claim, after each step on record and after each change that held the job: one with less is
/// extended. The heartbeat comes sooner. What was assumed ([`ProjectTx::assume`]) extends nothing.
pub const LONG_ENOUGH: Duration = Duration::from_secs(6);

/// Work to be done without a request: ids, not data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Job {
    /// Take a task further, through its run and its review.
    Task(Id<Task>),
    /// Judge a task that can never begin because of what it needs.
    Blocked(Id<Task>),
    /// Assess finished work again.
    Reassess(Id<Task>),
    /// Look at a task's deadline.
    Deadline(Id<Task>),
    /// Move an escalated task to the next level.
    Escalation(Id<Task>),
    /// Answer an approval that nobody answered.
    Approval(Id<Approval>),
    /// Let go of what a delay holds back.
    Delay(Id<Barrier>),
    /// Look at a mission's deadline.
    MissionDeadline(Id<Mission>),
    /// Begin a mission's next run.
    Schedule(Id<Schedule>),
    /// Carry a webhook's deliveries.
    Webhook(Id<Webhook>),
}

/// Jobs that share places. One lane's jobs never wait for another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// What the engine does.
    Engine,
    /// Deliveries to receivers, which may be slow or dead.
    Couriers,
    /// What is due at a time of its own and takes none: deadlines, delays, schedules.
    Timers,
}

impl Lane {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Engine, Self::Couriers, Self::Timers];

    fn number(self) -> i16 {
        match self {
            Self::Engine => 0,
            Self::Couriers => 1,
            Self::Timers => 2,
        }
    }

    /// What is rung when a lane has work in a world.
    pub fn topic(self, world: World) -> Topic {
        match self {
            Self::Engine => Topic::Jobs(world),
            Self::Couriers => Topic::Couriers(world),
            Self::Timers => Topic::Timers(world),
        }
    }
}

impl Job {
    /// The id of what it is about: a task, a request, a barrier, a mission, a schedule or a webhook.
    pub fn subject(self) -> Uuid {
        self.columns().1
    }

    pub(super) fn columns(self) -> (&'static str, Uuid) {
        match self {
            Self::Task(task) => ("task", task.uuid()),
            Self::Blocked(task) => ("blocked", task.uuid()),
            Self::Reassess(task) => ("reassess", task.uuid()),
            Self::Deadline(task) => ("deadline", task.uuid()),
            Self::Escalation(task) => ("escalation", task.uuid()),
            Self::Approval(approval) => ("approval", approval.uuid()),
            Self::Delay(barrier) => ("delay", barrier.uuid()),
            Self::MissionDeadline(mission) => ("mission_deadline", mission.uuid()),
            Self::Schedule(schedule) => ("schedule", schedule.uuid()),
            Self::Webhook(webhook) => ("webhook", webhook.uuid()),
        }
    }

    fn lane(self) -> Lane {
        match self {
            Self::Webhook(_) => Lane::Couriers,
            Self::Deadline(_)
            | Self::Escalation(_)
            | Self::Approval(_)
            | Self::Delay(_)
            | Self::MissionDeadline(_)
            | Self::Schedule(_) => Lane::Timers,
            Self::Task(_) | Self::Blocked(_) | Self::Reassess(_) => Lane::Engine,
        }
    }

    fn of(kind: &str, subject: Uuid) -> Option<Self> {
        Some(match kind {
            "task" => Self::Task(subject.into()),
            "blocked" => Self::Blocked(subject.into()),
            "reassess" => Self::Reassess(subject.into()),
            "deadline" => Self::Deadline(subject.into()),
            "escalation" => Self::Escalation(subject.into()),
            "approval" => Self::Approval(subject.into()),
            "delay" => Self::Delay(subject.into()),
            "mission_deadline" => Self::MissionDeadline(subject.into()),
            "schedule" => Self::Schedule(subject.into()),
            "webhook" => Self::Webhook(subject.into()),
            _ => return None,
        })
    }
}

/// A claim on one job.
#[derive(Debug, Clone)]
pub struct Lease {
    /// What is to be done.
    pub job: Job,
    /// The door to the project whose job it is.
    pub db: ProjectDb,
    /// The fence.
    number: i64,
}

impl Lease {
    /// The number that fences the claimer's writes.
    pub fn number(&self) -> i64 {
        self.number
    }
}

/// What a claim may take.
#[derive(Debug, Clone)]
pub struct Room {
    /// The most jobs in all.
    pub most: usize,
    /// The most of a project that is not in `of_some`.
    pub of_one: usize,
    /// The most of some projects, which may be none.
    pub of_some: HashMap<Uuid, usize>,
}

impl Room {
    /// Room for so many jobs, whoever's they are.
    pub fn of(most: usize) -> Self {
        Self {
            most,
            of_one: most,
            of_some: HashMap::new(),
        }
    }

    /// The most jobs of a project.
    pub fn of_project(&self, project: Uuid) -> usize {
        self.of_some.get(&project).copied().unwrap_or(self.of_one)
    }
}

/// What a claim found.
#[derive(Debug)]
pub struct Claimed {
    /// The jobs.
    pub leases: Vec<Lease>,
    /// How many projects shared the places, without those that may have none; some may have got none because another process was quicker.
    pub projects: usize,
    /// Where the next claim goes on, so that projects take turns.
    pub cursor: Uuid,
}

/// The job of a lane that comes due first.
struct FirstDue {
    at: Option<DateTime<Utc>>,
    is_due: bool,
}

/// A process that claims jobs, by the advisory lock that it holds while it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder(i64);

impl Holder {
    /// A new one.
    pub fn new(random: u64) -> Self {
        // Two halves of 31 bits: `pg_locks` shows an advisory lock's number in two unsigned halves.
        Self(i64::try_from(random & 0x3fff_ffff_7fff_ffff).unwrap_or_default())
    }
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

impl Db {
    /// A connection that holds a process' lock for as long as it is kept. One of this process that holds it still is ended: it was lost without
    /// a word, and Postgres would not know for hours.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn hold(&self, holder: Holder) -> Result<Standing> {
        let mut connection = PgConnection::connect_with(&self.standing).await?;
        let tried = sqlx::query!(
            r#"select pg_try_advisory_lock($1) as "held!", pg_backend_pid() as "pid!""#,
            holder.0
        );
        let tried = tried.fetch_one(&mut connection).await?;
        if !tried.held {
            // It may end by itself at this moment, and then it is we who hold the lock.
            let end = sqlx::query_scalar!(
                "select pg_terminate_backend(pid) from pg_locks
                where locktype = 'advisory' and granted and objsubid = 1 and pid <> $2
                  and database = (select oid from pg_database where datname = current_database())
                  and (classid::bigint << 32) | objid::bigint = $1",
                holder.0,
                tried.pid
            )
            .fetch_all(&self.platform);
            let wait =
                sqlx::query_scalar!(r#"select pg_advisory_lock($1)::text as "locked""#, holder.0)
                    .fetch_one(&mut connection);
            // Who waits first has it at once: in between everyone would take this process for gone.
            tokio::try_join!(wait, end)?;
        }
        Ok(Standing(connection))
    }

    /// Makes ready what has come due in a lane, leases that have run out among it, but for what someone has hold of: that is due still.
    /// Returns when the next comes due.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn ready_due_jobs(&self, world: World, lane: Lane) -> Result<Option<DateTime<Utc>>> {
        let first = self.first_due(world, lane).await?;
        if !first.is_due {
            return Ok(first.at);
        }
        sqlx::query!(
            "with due as (
                select project_id, kind, subject from jobs
                where not ready and due_at <= clock_timestamp() and lane = $1
                for update skip locked
            )
            update jobs set ready = true, holder = null
            from due
            where jobs.project_id = due.project_id and jobs.kind = due.kind and jobs.subject = due.subject",
            lane.number()
        )
        .execute(self.claims(world))
        .await?;
        Ok(self.first_due(world, lane).await?.at)
    }

    /// Asked by itself, and not by the update that makes ready: this one walks the index in its order and leaves marks on entries whose jobs
    /// are gone, so that the next walk is short. The update would visit them all each time, until a vacuum takes them away.
    async fn first_due(&self, world: World, lane: Lane) -> Result<FirstDue> {
        Ok(sqlx::query_as!(
            FirstDue,
            r#"select min(due_at) as at, coalesce(min(due_at) <= clock_timestamp(), false) as "is_due!"
            from jobs where not ready and due_at < 'infinity' and lane = $1"#,
            lane.number()
        )
        .fetch_one(self.claims(world))
        .await?)
    }

    /// Makes ready what is held by processes that are gone, but for what someone has hold of, and says how many there were.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn free_orphaned_jobs(&self, world: World) -> Result<u64> {
        let freed = sqlx::query!(
            "with holders as (
                select distinct holder from jobs where holder is not null
            ), gone as (
                select holder from holders
                where not exists (
                    select from pg_locks
                    where locktype = 'advisory' and granted and objsubid = 1
                      and database = (select oid from pg_database where datname = current_database())
                      and (classid::bigint << 32) | objid::bigint = holders.holder
                )
            ), left_behind as (
                select jobs.project_id, jobs.kind, jobs.subject
                from gone join jobs on jobs.holder = gone.holder
                for update of jobs skip locked
            )
            update jobs set ready = true, holder = null, lease = nextval('leases')
            from left_behind l
            where jobs.project_id = l.project_id and jobs.kind = l.kind and jobs.subject = l.subject"
        )
        .execute(self.claims(world))
        .await?;
        Ok(freed.rows_affected())
    }

    /// Claims ready jobs of a lane, as many as there is room for. Projects take turns: the claim goes round all that have some, from
    /// `cursor` on, and takes of each its share; within a project the highest priority goes first, then the oldest.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn claim(
        &self,
        world: World,
        lane: Lane,
        holder: Holder,
        cursor: Uuid,
        room: &Room,
    ) -> Result<Claimed> {
        let column = |count| i64::try_from(count).unwrap_or(i64::MAX);
        let some: Vec<Uuid> = room.of_some.keys().copied().collect();
        let of_some: Vec<i64> = room.of_some.values().copied().map(column).collect();
        // A project that may have none is stepped over, which costs a step of the index as any other, and takes no other's turn.
        let rows = sqlx::query!(
            r#"with recursive allowed as materialized (
                select * from unnest($6::uuid[], $7::bigint[]) as a (project_id, most)
            ), turn as (
                (select next.project_id, coalesce(a.most, $8::bigint) as most, least(coalesce(a.most, $8::bigint), 1) as number
                 from (
                    select project_id from jobs
                    where lane = $5 and ready and project_id > $1 order by project_id limit 1
                 ) next
                 left join allowed a on a.project_id = next.project_id)
                union all
                select next.project_id, coalesce(a.most, $8::bigint), turn.number + least(coalesce(a.most, $8::bigint), 1)
                from turn cross join lateral (
                    select project_id from jobs
                    where lane = $5 and ready and project_id > turn.project_id order by project_id limit 1
                ) next
                left join allowed a on a.project_id = next.project_id
                where turn.number < $2::bigint
            ), sharing as (
                select count(*) as count from turn where most > 0
            ), picked as (
                select j.project_id, j.kind, j.subject
                from turn cross join lateral (
                    select project_id, kind, subject from jobs
                    where lane = $5 and ready and project_id = turn.project_id
                    order by priority desc, created_at
                    limit least(turn.most, greatest(1, $2::bigint / greatest(1, (select count from sharing))))
                    for update skip locked
                ) j
                limit $2::bigint
            )
            update jobs
            set ready = false, holder = $3, lease = nextval('leases'),
                due_at = clock_timestamp() + make_interval(secs => $4::double precision)
            from picked
            where jobs.project_id = picked.project_id and jobs.kind = picked.kind and jobs.subject = picked.subject
            returning jobs.project_id, jobs.kind, jobs.subject, jobs.lease, (select count from sharing) as "projects!""#,
            cursor,
            column(room.most),
            holder.0,
            seconds(LEASE),
            lane.number(),
            &some,
            &of_some,
            column(room.of_one)
        )
        .fetch_all(self.claims(world))
        .await?;
        let cursor = rows
            .iter()
            .map(|row| row.project_id)
            .max()
            .unwrap_or_default();
        let projects = rows.first().map_or(0, |row| row.projects);
        let leases = rows
            .into_iter()
            .filter_map(|row| {
                Some(Lease {
                    job: Job::of(&row.kind, row.subject)?,
                    db: self.project(row.project_id, world),
                    number: row.lease,
                })
            })
            .collect();
        Ok(Claimed {
            leases,
            projects: usize::try_from(projects).unwrap_or_default(),
            cursor,
        })
    }

    /// Extends a process' leases and returns those of the given ones that it still has. Whom someone has hold of is left for the next
    /// time: to wait for one would be to keep hold of the others meanwhile.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn extend_all(
        &self,
        world: World,
        holder: Holder,
        leases: &[i64],
    ) -> Result<Vec<i64>> {
        Ok(sqlx::query_scalar!(
            "with extended as (
                update jobs set due_at = clock_timestamp() + make_interval(secs => $3::double precision)
                from (
                    select project_id, kind, subject from jobs
                    where holder = $1 and lease = any($2)
                    for update skip locked
                ) mine
                where jobs.project_id = mine.project_id and jobs.kind = mine.kind and jobs.subject = mine.subject
            )
            select lease from jobs where holder = $1 and lease = any($2)",
            holder.0,
            leases,
            seconds(LEASE)
        )
        .fetch_all(self.claims(world))
        .await?)
    }

    /// Extends a lease, and says whether it was still the process'. Not through [`super::CLAIMS`]: it waits for whoever has hold of the job.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn extend(&self, holder: Holder, lease: &Lease) -> Result<bool> {
        let (kind, subject) = lease.job.columns();
        let extended = sqlx::query!(
            "update jobs set due_at = clock_timestamp() + make_interval(secs => $6::double precision)
            where project_id = $1 and kind = $2 and subject = $3 and holder = $4 and lease = $5",
            lease.db.project,
            kind,
            subject,
            holder.0,
            lease.number,
            seconds(LEASE)
        )
        .execute(self.world(lease.db.world))
        .await?;
        Ok(extended.rows_affected() > 0)
    }
}

/// The connection whose lock says that this process lives.
#[derive(Debug)]
pub struct Standing(PgConnection);

impl Standing {
    /// Whether it is still there.
    ///
    /// # Errors
    /// When it is not.
    pub async fn check(&mut self) -> Result<()> {
        sqlx::query_scalar!(r#"select 1 as "one!""#)
            .fetch_one(&mut self.0)
            .await?;
        Ok(())
    }
}

impl ProjectTx {
    /// Owes a job, now or later; whoever has a lease on it loses it.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn enqueue(&mut self, job: Job, priority: f64, after: Duration) -> Result<()> {
        if self.is_fenced_by(job) {
            self.closing.done = false;
            self.fenced = None;
        }
        let (kind, subject) = job.columns();
        sqlx::query!(
            "insert into jobs (project_id, kind, subject, priority, ready, due_at, lease, lane)
            values ($1, $2, $3, $4, $5::double precision <= 0, clock_timestamp() + make_interval(secs => $5::double precision), nextval('leases'), $6)
            on conflict (project_id, kind, subject) do update
            set priority = excluded.priority, ready = excluded.ready, due_at = excluded.due_at,
                lease = excluded.lease, holder = null, parked_on = null, created_at = excluded.created_at",
            self.db.project,
            kind,
            subject,
            priority,
            seconds(after),
            job.lane().number()
        )
        .execute(self.open().await?)
        .await?;
        self.rings(job.lane());
        Ok(())
    }

    /// Whether the job's row is locked, under a lease.
    fn is_fenced_by(&self, job: Job) -> bool {
        self.fenced.is_some_and(|(fence, _)| fence == job)
    }

    /// There is work in a lane that was not there before.
    pub(super) fn rings(&mut self, lane: Lane) {
        match lane {
            Lane::Engine => self.rings_jobs = true,
            Lane::Couriers => self.rings_couriers = true,
            Lane::Timers => self.rings_timers = true,
        }
    }

    /// Owes a job no longer; whoever has a lease on it loses it.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn call_off(&mut self, job: Job) -> Result<()> {
        self.called_off.push(job);
        if self.is_fenced_by(job) {
            self.closing.done = true;
            return Ok(());
        }
        let (kind, subject) = job.columns();
        sqlx::query!(
            "delete from jobs where project_id = $1 and kind = $2 and subject = $3",
            self.db.project,
            kind,
            subject
        )
        .execute(self.open().await?)
        .await?;
        Ok(())
    }

    /// A job that was called off in this very change is nobody's. Even if it was owed again since, it is another claim's.
    pub(super) fn is_still_owed(&self, lease: &Lease) -> Result<()> {
        held(u64::from(!self.called_off.contains(&lease.job)))
    }

    /// Keeps a lease for longer, if much of it is used up. First in a transaction, it fences all that follows.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`].
    pub async fn extend(&mut self, lease: &Lease) -> Result<()> {
        self.is_still_owed(lease)?;
        let (kind, subject) = lease.job.columns();
        // Locked rather than updated: most transactions end with the job's deletion, and a new version of its row costs an
        // entry in every index.
        let kept = sqlx::query_scalar!(
            r#"with held as (
                select due_at from jobs
                where project_id = $1 and kind = $2 and subject = $3 and lease = $4
                for update
            ), extended as (
                update jobs set due_at = clock_timestamp() + make_interval(secs => $5::double precision)
                from held
                where project_id = $1 and kind = $2 and subject = $3
                  and held.due_at < clock_timestamp() + make_interval(secs => $6::double precision)
            )
            select count(*) as "count!" from held"#,
            self.db.project,
            kind,
            subject,
            lease.number,
            seconds(LEASE),
            seconds(LONG_ENOUGH)
        )
        .fetch_one(self.open().await?)
        .await?;
        held(kept.unsigned_abs())?;
        self.fenced = Some((lease.job, lease.number));
        Ok(())
    }

    /// The job is done.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`].
    pub async fn complete(&mut self, lease: &Lease) -> Result<()> {
        self.is_still_owed(lease)?;
        if self.fenced == Some((lease.job, lease.number)) {
            self.closing.done = true;
            return Ok(());
        }
        let (kind, subject) = lease.job.columns();
        let done = sqlx::query!(
            "delete from jobs where project_id = $1 and kind = $2 and subject = $3 and lease = $4",
            self.db.project,
            kind,
            subject,
            lease.number
        )
        .execute(self.open().await?)
        .await?;
        held(done.rows_affected())
    }

    /// Gives a job back, to be claimed after a while.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`].
    pub async fn put_off(&mut self, lease: &Lease, after: Duration) -> Result<()> {
        self.is_still_owed(lease)?;
        let (kind, subject) = lease.job.columns();
        let done = sqlx::query!(
            "update jobs
            set ready = $5::double precision <= 0, due_at = clock_timestamp() + make_interval(secs => $5::double precision), holder = null,
                lease = nextval('leases')
            where project_id = $1 and kind = $2 and subject = $3 and lease = $4",
            self.db.project,
            kind,
            subject,
            lease.number,
            seconds(after)
        )
        .execute(self.open().await?)
        .await?;
        self.rings(lease.job.lane());
        held(done.rows_affected())
    }

    /// Gives a task's job another priority; if it waits for a place, which may be another's now, it looks again.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn requeue_task(&mut self, task: Id<Task>, priority: f64) -> Result<()> {
        let woken = sqlx::query!(
            "update jobs
            set priority = $3, ready = ready or parked_on is not null, parked_on = null,
                due_at = case when parked_on is null then due_at else clock_timestamp() end
            where project_id = $1 and kind = 'task' and subject = $2",
            self.db.project,
            task.uuid(),
            priority
        )
        .execute(self.open().await?)
        .await?;
        self.rings_jobs |= woken.rows_affected() > 0;
        Ok(())
    }
}

impl ProjectDb {
    /// Gives a job back unfinished, to be claimed at once by another process. `between_steps` is the run whose next tool call
    /// is on record and has not begun: whoever goes on with it need not fear that it was made.
    ///
    /// # Errors
    /// When the database cannot be reached; then the lease runs out.
    pub async fn hand_over(&self, lease: &Lease, between_steps: Option<Id<Run>>) -> Result<()> {
        let mut tx = self.begin();
        match tx.put_off(lease, Duration::ZERO).await {
            Ok(()) => {
                if let Some(run) = between_steps {
                    tx.nothing_under_way(run).await?;
                }
                tx.commit().await
            }
            Err(StoreError::LeaseLost) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

pub(super) fn held(rows: u64) -> Result<()> {
    if rows == 0 {
        Err(StoreError::LeaseLost)
    } else {
        Ok(())
    }
}

/// An instant that a job is due at, as a pause from now.
pub fn until(at: DateTime<Utc>, now: DateTime<Utc>) -> Duration {
    (to_micros(at) - now).to_std().unwrap_or_default()
}
