//! The tasks of a mission's run, many at a time.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use sqlx::types::Json;
use uuid::Uuid;

use super::tasks::Stored as StoredTask;
use super::{ProjectDb, ProjectTx, Result, to_micros};
use crate::ids::{self, Id};
use crate::task::{Document as TaskDocument, Place, Task};

/// A task of a run, as others of the run are told of it.
#[derive(Debug, Clone)]
pub struct Sibling {
    /// Its title.
    pub title: String,
    /// Where it stands.
    pub status: String,
}

impl ProjectDb {
    /// The tasks of a run that agents are at.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn active_tasks_of_run(&self, place: Place) -> Result<Vec<Task>> {
        let stored = sqlx::query_as!(
            StoredTask,
            r#"select id, title, assign_to, status, held, group_label, run_id, mission_id, mission_run, document as "document: Json<TaskDocument>", created_at, updated_at
            from tasks
            where project_id = $1 and mission_id = $2 and mission_run = $3 and status in ('assigned', 'in_progress', 'review')
            order by id"#,
            self.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(stored.into_iter().map(StoredTask::into_task).collect())
    }

    /// The tasks of a run in their order, at most `limit`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn siblings(&self, place: Place, limit: i64) -> Result<Vec<Sibling>> {
        // A run that is asked for as a range can only be ordered by its own index; of a project that it knows little of, Postgres
        // would rather walk all tasks.
        Ok(sqlx::query_as!(
            Sibling,
            "select title, status from tasks
            where project_id = $1 and mission_id = $2 and mission_run between $3 and $3
            order by mission_run, id
            limit $4",
            self.project,
            place.mission.uuid(),
            place.run,
            limit
        )
        .fetch_all(&self.pool)
        .await?)
    }
}

impl ProjectTx {
    /// Stores the tasks of a new run, what each needs, and owes the ones in `ready`.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn create_tasks_of_run(
        &mut self,
        tasks: &mut [Task],
        needs: &[(Id<ids::Task>, Id<ids::Task>)],
        ready: &[Id<ids::Task>],
    ) -> Result<()> {
        for task in &mut *tasks {
            task.created_at = to_micros(task.created_at);
            task.updated_at = task.created_at;
            self.events.append(&mut task.take_events());
        }
        let column = |of: fn(&Task) -> String| -> Vec<String> { tasks.iter().map(of).collect() };
        let ids: Vec<Uuid> = tasks.iter().map(|task| task.id.uuid()).collect();
        let missions: Vec<Option<Uuid>> = tasks
            .iter()
            .map(|task| task.mission.map(|place| place.mission.uuid()))
            .collect();
        let runs: Vec<Option<i32>> = tasks
            .iter()
            .map(|task| task.mission.map(|place| place.run))
            .collect();
        let groups: Vec<Option<String>> = tasks.iter().map(|task| task.group.clone()).collect();
        let documents: Vec<Json<&TaskDocument>> =
            tasks.iter().map(|task| Json(&task.document)).collect();
        let at: Vec<DateTime<Utc>> = tasks.iter().map(|task| task.created_at).collect();
        let ready: BTreeSet<Id<ids::Task>> = ready.iter().copied().collect();
        let (owed, priorities): (Vec<Uuid>, Vec<f64>) = tasks
            .iter()
            .filter(|task| ready.contains(&task.id))
            .map(|task| (task.id.uuid(), task.document.priority))
            .unzip();
        sqlx::query!(
            "with made as (
                insert into tasks (project_id, id, title, assign_to, status, group_label, mission_id, mission_run, document, created_at, updated_at)
                select $1, t.id, t.title, t.assign_to, t.status, t.group_label, t.mission_id, t.mission_run, t.document, t.at, t.at
                from unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::uuid[], $8::integer[], $9::jsonb[], $10::timestamptz[])
                    as t (id, title, assign_to, status, group_label, mission_id, mission_run, document, at)
            )
            insert into jobs (project_id, kind, subject, priority, ready, due_at, lease)
            select $1, 'task', owed.id, owed.priority, true, clock_timestamp(), nextval('leases')
            from unnest($11::uuid[], $12::double precision[]) as owed (id, priority)",
            self.db.project,
            &ids,
            &column(|task| task.title.clone()),
            &column(|task| task.assign_to.clone()),
            &column(|task| task.status().as_str().to_owned()),
            &groups as _,
            &missions as _,
            &runs as _,
            &documents as _,
            &at,
            &owed,
            &priorities
        )
        .execute(self.open().await?)
        .await?;
        let (dependents, needed): (Vec<Uuid>, Vec<Uuid>) = needs
            .iter()
            .map(|(task, need)| (task.uuid(), need.uuid()))
            .unzip();
        if !dependents.is_empty() {
            sqlx::query!(
            "insert into dependencies (project_id, task_id, needs_id)
            select $1, d.task_id, d.needs_id from unnest($2::uuid[], $3::uuid[]) as d (task_id, needs_id)",
            self.db.project,
            &dependents,
            &needed
        )
        .execute(self.open().await?)
        .await?;
        }
        self.rings_jobs |= !owed.is_empty();
        Ok(())
    }

    /// Owes those of a run's tasks that can begin or can never begin now that one has ended or a barrier has passed: the tasks
    /// that need `ended`, or those in `freed`. The run must be held.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn wake_tasks_of_run(
        &mut self,
        place: Place,
        ended: Option<Id<ids::Task>>,
        freed: &[Uuid],
    ) -> Result<()> {
        let owed = sqlx::query!(
            "with named as (
                select task_id as id from dependencies where project_id = $1 and needs_id = $4
                union
                select unnest($5::uuid[])
            ), waiting as (
                select t.id, (t.document ->> 'priority')::double precision as priority, t.held,
                    exists (
                        select from dependencies d
                        left join tasks n on n.project_id = d.project_id and n.id = d.needs_id
                        where d.project_id = $1 and d.task_id = t.id and coalesce(n.status, 'failed') = 'failed'
                    ) as hopeless,
                    exists (
                        select from dependencies d
                        join tasks n on n.project_id = d.project_id and n.id = d.needs_id
                        where d.project_id = $1 and d.task_id = t.id and n.status not in ('done', 'failed')
                    ) as waits
                from named
                cross join lateral (
                    select id, mission_id, mission_run, status, held, document from tasks
                    where project_id = $1 and id = named.id limit 1
                ) t
                where t.mission_id = $2 and t.mission_run = $3 and t.status = 'pending'
                  and not exists (select from barrier_holds h where h.project_id = $1 and h.task_id = t.id)
            )
            insert into jobs (project_id, kind, subject, priority, ready, due_at, lease)
            select $1, case when hopeless then 'blocked' else 'task' end, id, priority, true, clock_timestamp(), nextval('leases')
            from waiting
            where hopeless or not (waits or held)
            order by id
            on conflict do nothing",
            self.db.project,
            place.mission.uuid(),
            place.run,
            ended.map(Id::uuid),
            freed
        )
        .execute(self.open().await?)
        .await?;
        self.rings_jobs |= owed.rows_affected() > 0;
        Ok(())
    }

    /// All tasks of a run, in their order.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn tasks_of_run(&mut self, place: Place) -> Result<Vec<Task>> {
        // A definition has a bounded number of tasks. For the range see `siblings`.
        let stored = sqlx::query_as!(
            StoredTask,
            r#"select id, title, assign_to, status, held, group_label, run_id, mission_id, mission_run, document as "document: Json<TaskDocument>", created_at, updated_at
            from tasks
            where project_id = $1 and mission_id = $2 and mission_run between $3 and $3
            order by mission_run, id"#,
            self.db.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(stored.into_iter().map(StoredTask::into_task).collect())
    }

    /// Those tasks of a run that have not ended, or those that failed; in the order of their ids, held until the commit.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn lock_tasks_of_run(&mut self, place: Place, failed: bool) -> Result<Vec<Task>> {
        let stored = sqlx::query_as!(
            StoredTask,
            r#"select id, title, assign_to, status, held, group_label, run_id, mission_id, mission_run, document as "document: Json<TaskDocument>", created_at, updated_at
            from tasks
            where project_id = $1 and mission_id = $2 and mission_run = $3
              and ((status = 'failed') = $4) and status <> 'done'
            order by id
            for no key update"#,
            self.db.project,
            place.mission.uuid(),
            place.run,
            failed
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(stored.into_iter().map(StoredTask::into_task).collect())
    }

    /// Stores tasks that were ended together, calls off what is owed for them, ends their runs and stops those under way. Their
    /// requests for approval are withdrawn before.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn save_ended_tasks(&mut self, tasks: &mut [Task]) -> Result<()> {
        // Later than before, whatever the clock says: it tells versions apart.
        let last = tasks.iter().map(|task| task.updated_at).max();
        let next = last.map(|at| at + chrono::TimeDelta::microseconds(1));
        let at = next.map_or_else(Utc::now, |next| to_micros(Utc::now()).max(next));
        for task in &mut *tasks {
            task.updated_at = at;
        }
        let ids: Vec<Uuid> = tasks.iter().map(|task| task.id.uuid()).collect();
        let statuses: Vec<String> = tasks
            .iter()
            .map(|task| task.status().as_str().to_owned())
            .collect();
        let documents: Vec<Json<&TaskDocument>> =
            tasks.iter().map(|task| Json(&task.document)).collect();
        sqlx::query!(
            "update tasks set status = t.status, document = t.document, held = false, updated_at = $5
            from unnest($2::uuid[], $3::text[], $4::jsonb[]) as t (id, status, document)
            where tasks.project_id = $1 and tasks.id = t.id",
            self.db.project,
            &ids,
            &statuses,
            &documents as _,
            at
        )
        .execute(self.open().await?)
        .await?;
        sqlx::query!(
            "with stopped as (
                update runs set status = 'interrupted', ended_at = clock_timestamp()
                where project_id = $1 and task_id = any($2) and status = 'running'
            )
            delete from jobs where project_id = $1 and subject = any($2)",
            self.db.project,
            &ids
        )
        .execute(self.open().await?)
        .await?;
        for task in tasks {
            self.events.append(&mut task.take_events());
        }
        self.stops.extend(ids);
        Ok(())
    }

    /// How many tasks of a run are pending.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn pending_tasks(&mut self, place: Place) -> Result<usize> {
        let pending = sqlx::query_scalar!(
            r#"select count(*) as "count!" from tasks
            where project_id = $1 and mission_id = $2 and mission_run = $3 and status = 'pending'"#,
            self.db.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(usize::try_from(pending).unwrap_or_default())
    }

    /// Whether a run has tasks that have not ended. The run must be held.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn has_unfinished(&mut self, place: Place) -> Result<bool> {
        Ok(sqlx::query_scalar!(
            r#"select exists (
                select from tasks
                where project_id = $1 and mission_id = $2 and mission_run = $3 and status not in ('done', 'failed')
            ) as "exists!""#,
            self.db.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_one(self.open().await?)
        .await?)
    }

    /// How many tasks of a run have not ended. The run must be held.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn count_unfinished(&mut self, place: Place) -> Result<usize> {
        let count = sqlx::query_scalar!(
            r#"select count(*) as "count!" from tasks
            where project_id = $1 and mission_id = $2 and mission_run = $3 and status not in ('done', 'failed')"#,
            self.db.project,
            place.mission.uuid(),
            place.run
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(usize::try_from(count).unwrap_or_default())
    }
}
