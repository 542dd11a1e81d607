//! Jobs that wait for something else than their time: a place, a project or a mission that goes on, a scheduler that is switched on.

use super::jobs::held;
use super::{Db, Lane, Lease, ProjectDb, ProjectTx, Result, World};
use crate::ids::{self, Id};

/// What a suspended project's jobs are parked on; no agent's name.
pub const SUSPENDED: &str = "/suspended";
/// What due schedules are parked on whose project has its scheduler switched off; no agent's name either.
pub const SWITCHED_OFF: &str = "/scheduler-off";

/// Where a job of a mission's task waits while the mission is paused.
pub(super) fn parking(mission: Id<ids::Mission>) -> String {
    // No agent's name has a colon.
    format!("mission:{}", mission.uuid().simple())
}

impl Db {
    /// Makes ready as many of the parked jobs as there are free places, those of missions that are not paused any more, and the schedules
    /// of projects whose scheduler is on again: the net under those who leave and wake the next. Says how many there were.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn wake_parked_jobs(&self, world: World) -> Result<u64> {
        let woken = sqlx::query!(
            "with waiting as (
                select distinct project_id, parked_on from jobs where parked_on is not null and parked_on <> $1
            ), free as (
                select w.project_id, w.parked_on, case
                    when w.parked_on like 'mission:%' then (
                        case when exists (
                            select from missions
                            where project_id = w.project_id and id = substring(w.parked_on from 9)::uuid and status = 'paused'
                        ) then 0 else 1000 end)
                    when w.parked_on = $2 then (
                        case when exists (
                            select from settings
                            where project_id = w.project_id and body -> 'enableScheduler' = 'false'
                        ) then 0 else 1000 end)
                    else coalesce(case
                        when w.parked_on = '' then (
                            select (body ->> 'maxConcurrency')::numeric::bigint from settings
                            where project_id = w.project_id)
                        else (
                            select (definition ->> 'maxConcurrency')::numeric::bigint from agents
                            where project_id = w.project_id and name = w.parked_on)
                    end, 1000) - (
                        select count(*) from tasks
                        where project_id = w.project_id and status in ('assigned', 'in_progress', 'review')
                          and (w.parked_on = '' or assign_to = w.parked_on)
                    ) end as places
                from waiting w
            ), woken as (
                select j.project_id, j.kind, j.subject
                from free cross join lateral (
                    select project_id, kind, subject from jobs
                    where project_id = free.project_id and parked_on = free.parked_on
                    order by priority desc, created_at
                    limit greatest(0, free.places)
                    for update skip locked
                ) j
            )
            update jobs set ready = true, due_at = clock_timestamp(), parked_on = null
            from woken
            where jobs.project_id = woken.project_id and jobs.kind = woken.kind and jobs.subject = woken.subject",
            SUSPENDED,
            SWITCHED_OFF
        )
        .execute(self.claims(world))
        .await?;
        Ok(woken.rows_affected())
    }

    /// Wakes the jobs of projects that are active again.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn wake_resumed_projects(&self, world: World) -> Result<()> {
        let resting = sqlx::query_scalar!(
            "select distinct project_id from jobs where parked_on = $1",
            SUSPENDED
        )
        .fetch_all(self.claims(world))
        .await?;
        for project in resting {
            if !self.is_suspended(project).await? {
                self.project(project, world).wake_resumed().await?;
            }
        }
        Ok(())
    }
}

impl ProjectDb {
    /// Has the jobs of the project go on that rested while it was suspended.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn wake_resumed(&self) -> Result<()> {
        let mut tx = self.begin();
        tx.unpark(SUSPENDED, i64::MAX).await?;
        for lane in Lane::ALL {
            tx.rings(lane);
        }
        tx.commit().await
    }

    /// The same as [`ProjectTx::unpark_mission`] for those jobs that someone else had hold of, and may have left as they were. After the
    /// commit and one by one, so that nobody waits for us whom we wait for.
    pub(super) async fn unpark_rest(&self, mission: Id<ids::Mission>) -> Result<()> {
        let parked = sqlx::query!(
            "select kind, subject from jobs where project_id = $1 and parked_on = $2 order by kind, subject limit 1000",
            self.project,
            parking(mission)
        )
        .fetch_all(&self.pool)
        .await?;
        for job in parked {
            sqlx::query!(
                "update jobs set ready = true, due_at = clock_timestamp(), parked_on = null
                where project_id = $1 and kind = $2 and subject = $3 and parked_on = $4
                  and not exists (select from missions where project_id = $1 and id = $5 and status = 'paused')",
                self.project,
                job.kind,
                job.subject,
                parking(mission),
                mission.uuid()
            )
            .execute(&self.pool)
            .await?;
        }
        self.bell.ring(super::Topic::Jobs(self.world));
        Ok(())
    }
}

impl ProjectTx {
    /// Lays a job aside until whoever knows of it wakes it: for a place of an agent's (by its name) or of the project's (`""`), or under what holds it
    /// up, as [`SUSPENDED`].
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`].
    pub async fn park(&mut self, lease: &Lease, whose: &str) -> Result<()> {
        self.is_still_owed(lease)?;
        let (kind, subject) = lease.job.columns();
        let done = sqlx::query!(
            "update jobs set ready = false, due_at = 'infinity', holder = null, lease = nextval('leases'), parked_on = $5
            where project_id = $1 and kind = $2 and subject = $3 and lease = $4",
            self.db.project,
            kind,
            subject,
            lease.number(),
            whose
        )
        .execute(self.open().await?)
        .await?;
        held(done.rows_affected())
    }

    /// A place of `whose` is free: the first of those that wait for one is ready, but for those that someone else is
    /// waking or calling off.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn unpark(&mut self, whose: &str, places: i64) -> Result<()> {
        let woken = sqlx::query!(
            "update jobs set ready = true, due_at = clock_timestamp(), parked_on = null
            from (
                select kind, subject from jobs
                where project_id = $1 and parked_on = $2
                order by priority desc, created_at
                limit $3
                for update skip locked
            ) first
            where jobs.project_id = $1 and jobs.kind = first.kind and jobs.subject = first.subject",
            self.db.project,
            whose,
            places
        )
        .execute(self.open().await?)
        .await?;
        self.rings_jobs |= woken.rows_affected() > 0;
        Ok(())
    }

    /// Everyone who waits for a place looks again. Whom someone else is waking or calling off is left to them: to wait
    /// for it would be to wait in a circle.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn unpark_all(&mut self) -> Result<()> {
        let woken = sqlx::query!(
            "update jobs set ready = true, due_at = clock_timestamp(), parked_on = null
            from (
                select kind, subject from jobs
                where project_id = $1 and parked_on <> $2
                for update skip locked
            ) waiting
            where jobs.project_id = $1 and jobs.kind = waiting.kind and jobs.subject = waiting.subject",
            self.db.project,
            SWITCHED_OFF
        )
        .execute(self.open().await?)
        .await?;
        self.rings_jobs |= woken.rows_affected() > 0;
        Ok(())
    }

    /// The project's scheduler is on: what came due while it was not looks again.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn unpark_schedules(&mut self) -> Result<()> {
        self.rings(Lane::Timers);
        self.unpark(SWITCHED_OFF, i64::MAX).await
    }

    /// Everything of a mission that waits for the end of a pause looks again.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn unpark_mission(&mut self, mission: Id<ids::Mission>) -> Result<()> {
        let parked = parking(mission);
        self.unpark(&parked, i64::MAX).await?;
        let left = sqlx::query_scalar!(
            r#"select exists (select from jobs where project_id = $1 and parked_on = $2) as "left!""#,
            self.db.project,
            parked
        )
        .fetch_one(self.open().await?)
        .await?;
        if left {
            self.left_parked.push(mission);
        }
        Ok(())
    }

    /// Lays a job aside until its mission's pause ends.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`].
    pub async fn park_for_mission(
        &mut self,
        lease: &super::Lease,
        mission: Id<ids::Mission>,
    ) -> Result<()> {
        self.park(lease, &parking(mission)).await
    }
}
