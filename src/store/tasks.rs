//! Tasks.

use std::io;

use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use serde_json::Value;
use sqlx::types::Json;
use uuid::Uuid;

use super::closing::TaskColumns;
use super::dependencies::pending;
use super::jobs::{LONG_ENOUGH, held};
use super::{LEASE, Lease, ProjectDb, ProjectTx, Result, StoreError, Topic, to_micros};
use crate::event::Event;
use crate::ids::{self, Id};
use crate::task::{Document, Place, Status, Task};

/// Which tasks are asked for; `None` asks for all.
#[derive(Debug, Clone, Copy, Default)]
pub struct TaskFilter<'a> {
    /// Those that stand there.
    pub status: Option<Status>,
    /// Those with this label.
    pub group: Option<&'a str>,
    /// Those of this agent.
    pub assign_to: Option<&'a str>,
    /// Those of this mission.
    pub mission: Option<Id<ids::Mission>>,
}

/// A task that was removed.
#[derive(Debug, Clone, Copy)]
pub struct DeletedTask {
    /// Its id.
    pub id: Id<ids::Task>,
    /// The mission's run that it belonged to.
    pub place: Option<Place>,
}

pub(super) struct Stored {
    pub(super) id: Uuid,
    pub(super) title: String,
    pub(super) assign_to: String,
    pub(super) status: String,
    pub(super) held: bool,
    pub(super) group_label: Option<String>,
    pub(super) run_id: Option<Uuid>,
    pub(super) mission_id: Option<Uuid>,
    pub(super) mission_run: Option<i32>,
    pub(super) document: Json<Document>,
    pub(super) created_at: DateTime<Utc>,
    pub(super) updated_at: DateTime<Utc>,
}

/// The most bytes of a page of tasks, but for the last one.
const PAGE_BYTES: usize = 8 * 1024 * 1024;

/// A page of a list of tasks.
#[derive(Debug)]
pub struct TaskPage {
    /// The tasks.
    pub tasks: Vec<Task>,
    /// Whether there may be others after them.
    pub may_be_more: bool,
}

/// How many bytes a document has as JSON.
fn written(document: &Document) -> usize {
    struct Count(usize);
    impl io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    // Nothing of a document that was read cannot be written.
    let _ = serde_json::to_writer(&mut count, document);
    count.0
}

impl Stored {
    pub(super) fn into_task(self) -> Task {
        let mut task = Task::new(self.title, self.assign_to, self.document.0, self.created_at);
        task.id = self.id.into();
        task.held = self.held;
        task.group = self.group_label;
        task.mission = self
            .mission_id
            .zip(self.mission_run)
            .map(|(mission, run)| Place {
                mission: mission.into(),
                run,
            });
        task.run = self.run_id.map(Id::from);
        task.updated_at = self.updated_at;
        // The column's check admits these words only.
        task.restored(Status::of(&self.status).unwrap_or(Status::Failed))
    }
}

impl ProjectDb {
    /// One task.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn task(&self, id: Id<ids::Task>) -> Result<Task> {
        let stored = sqlx::query_as!(
            Stored,
            r#"select id, title, assign_to, status, held, group_label, run_id, mission_id, mission_run, document as "document: Json<Document>", created_at, updated_at
            from tasks where project_id = $1 and id = $2"#,
            self.project,
            id.uuid()
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(stored.into_task())
    }

    /// Tasks after `after`, oldest first: at most `limit`, and no more once they have [`PAGE_BYTES`]. They are read as they come: what is left out takes no memory.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn tasks(
        &self,
        filter: TaskFilter<'_>,
        after: Option<Id<ids::Task>>,
        limit: i64,
    ) -> Result<TaskPage> {
        let mut rows = sqlx::query_as!(
            Stored,
            r#"select id, title, assign_to, status, held, group_label, run_id, mission_id, mission_run, document as "document: Json<Document>", created_at, updated_at
            from tasks
            where project_id = $1
              and ($2::text is null or status = $2)
              and ($3::text is null or group_label = $3)
              and ($4::text is null or assign_to = $4)
              and ($5::uuid is null or id > $5)
              and ($6::uuid is null or mission_id = $6)
            order by id
            limit $7"#,
            self.project,
            filter.status.map(Status::as_str),
            filter.group,
            filter.assign_to,
            after.map(Id::uuid),
            filter.mission.map(Id::uuid),
            limit
        )
        .fetch(&self.pool);
        let (mut tasks, mut bytes) = (Vec::new(), 0);
        while let Some(stored) = rows.try_next().await? {
            let task = stored.into_task();
            bytes += written(&task.document);
            tasks.push(task);
            if bytes >= PAGE_BYTES {
                break;
            }
        }
        let may_be_more =
            bytes >= PAGE_BYTES || i64::try_from(tasks.len()).is_ok_and(|count| count >= limit);
        Ok(TaskPage { tasks, may_be_more })
    }
}

impl ProjectTx {
    /// Adds an event to what the commit tells.
    pub fn emit(&mut self, event: Event) {
        self.events.push(event);
    }

    /// Whether an unfinished task outside of missions has this title: those of missions may be called alike.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn is_title_taken(&mut self, title: &str) -> Result<bool> {
        Ok(sqlx::query_scalar!(
            r#"select exists (
                select from tasks
                where project_id = $1 and title = $2 and mission_id is null and status not in ('done', 'failed')
            ) as "exists!""#,
            self.db.project,
            title
        )
        .fetch_one(self.open().await?)
        .await?)
    }

    /// Stores a new task with what it needs, and owes it its first step if there is nothing to wait for (`owed`).
    ///
    /// # Errors
    /// Constraint `tasks_title_key`.
    pub async fn create_task(
        &mut self,
        task: &mut Task,
        needs: &[Id<ids::Task>],
        owed: bool,
    ) -> Result<()> {
        task.created_at = to_micros(task.created_at);
        task.updated_at = task.created_at;
        sqlx::query!(
            "with made as (
                insert into tasks (project_id, id, title, assign_to, status, held, group_label, run_id, document, created_at, updated_at)
                values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $10)
            )
            insert into jobs (project_id, kind, subject, priority, ready, due_at, lease)
            select $1, 'task', $2, $12, true, clock_timestamp(), nextval('leases') where $11::boolean",
            self.db.project,
            task.id.uuid(),
            task.title,
            task.assign_to,
            task.status().as_str(),
            task.held,
            task.group,
            task.run.map(Id::uuid),
            Json(&task.document) as _,
            task.created_at,
            owed,
            task.document.priority
        )
        .execute(self.open().await?)
        .await?;
        self.rings_jobs |= owed;
        if !needs.is_empty() {
            let needs: Vec<Uuid> = needs.iter().map(|need| need.uuid()).collect();
            sqlx::query!(
                "insert into dependencies (project_id, task_id, needs_id) select $1, $2, unnest($3::uuid[]) on conflict do nothing",
                self.db.project,
                task.id.uuid(),
                &needs
            )
            .execute(self.open().await?)
            .await?;
        }
        self.events.append(&mut task.take_events());
        Ok(())
    }

    /// The same of a task that needs nothing. Written with the commit, which fails with what [`ProjectTx::create_task`] does.
    pub fn create_task_last(&mut self, task: &mut Task, owed: bool) {
        task.created_at = to_micros(task.created_at);
        task.updated_at = task.created_at;
        self.rings_jobs |= owed;
        self.events.append(&mut task.take_events());
        self.closing.made = Some(Box::new((TaskColumns::of(task, false), owed)));
    }

    /// One task, held against other changes until the commit.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn lock_task(&mut self, id: Id<ids::Task>) -> Result<Task> {
        let stored = sqlx::query_as!(
            Stored,
            r#"select id, title, assign_to, status, held, group_label, run_id, mission_id, mission_run, document as "document: Json<Document>", created_at, updated_at
            from tasks where project_id = $1 and id = $2
            for no key update"#,
            self.db.project,
            id.uuid()
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(stored.into_task())
    }

    /// The task that a lease is about, held against other changes until the commit, and the lease kept as [`ProjectTx::extend`] does:
    /// first in a transaction, it fences all that follows.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::LeaseLost`].
    pub async fn lock_task_under(&mut self, lease: &Lease, id: Id<ids::Task>) -> Result<Task> {
        let (kind, subject) = lease.job.columns();
        // The task first, then the job, like everyone; `held` is not looked at before the task is there to be returned.
        let row = sqlx::query!(
            r#"with task as (
                select id, title, assign_to, status, held, group_label, run_id, mission_id, mission_run, document, created_at, updated_at
                from tasks where project_id = $1 and id = $2
                for no key update
            ), held as (
                select due_at from jobs
                where project_id = $1 and kind = $3 and subject = $4 and lease = $5
                for update
            ), extended as (
                update jobs set due_at = clock_timestamp() + make_interval(secs => $6::double precision)
                from held
                where project_id = $1 and kind = $3 and subject = $4
                  and held.due_at < clock_timestamp() + make_interval(secs => $7::double precision)
            )
            select id, title, assign_to, status, held, group_label, run_id, mission_id, mission_run,
                document as "document: Json<Document>", created_at, updated_at,
                (select count(*) from held) as "leases!"
            from task"#,
            self.db.project,
            id.uuid(),
            kind,
            subject,
            lease.number(),
            LEASE.as_secs_f64(),
            LONG_ENOUGH.as_secs_f64()
        )
        .fetch_one(self.open().await?)
        .await?;
        held(row.leases.unsigned_abs())?;
        self.fenced = Some((lease.job, lease.number()));
        let stored = Stored {
            id: row.id,
            title: row.title,
            assign_to: row.assign_to,
            status: row.status,
            held: row.held,
            group_label: row.group_label,
            run_id: row.run_id,
            mission_id: row.mission_id,
            mission_run: row.mission_run,
            document: row.document,
            created_at: row.created_at,
            updated_at: row.updated_at,
        };
        Ok(stored.into_task())
    }

    /// Stores a changed task with what has happened to it. When it has ended, those outside of missions that need it are woken. With the
    /// begin or the end of its run it is written with the commit.
    ///
    /// # Errors
    /// Constraint `tasks_title_key`.
    pub async fn save_task(&mut self, task: &mut Task) -> Result<()> {
        // Later than before, whatever the clock says: it tells versions apart, see [`ProjectTx::assume`].
        let next = task.updated_at + chrono::TimeDelta::microseconds(1);
        task.updated_at = to_micros(Utc::now()).max(next);
        let events = task.take_events();
        let moved = events.iter().any(|event| event.name == "task:transition");
        self.events.extend(events);
        self.changed.push(task.id.uuid());
        // Within a mission there is more to it: `lifecycle::save`.
        let ends = moved && task.status().is_terminal() && task.mission.is_none();
        let mut columns = TaskColumns::of(task, ends);
        let last = task.mission.is_none() && self.closing.takes(&columns);
        // A change that saves twice has ended the task if the first time has.
        if let Some(kept) = &self.closing.saved
            && kept.id == columns.id
        {
            columns.ends |= kept.ends;
        }
        if last {
            self.closing.saved = Some(Box::new(columns));
            return Ok(());
        }
        self.write_task(&columns).await
    }

    /// Writes a task. Who waits for its end is held until the commit: of two needs that end at once, the second to get here sees the first.
    pub(super) async fn write_task(&mut self, task: &TaskColumns) -> Result<()> {
        // `ended` comes out of the update, where the planner cannot see it: it would plan anew each time.
        let dependents = sqlx::query!(
            "with saved as (
                update tasks
                set assign_to = $3, status = $4, held = $5, run_id = $6, document = $7, updated_at = $8
                where project_id = $1 and id = $2
                returning $9::boolean as ended
            )
            select t.id, t.status from saved
            join dependencies d on saved.ended and d.project_id = $1 and d.needs_id = $2
            join tasks t on t.project_id = d.project_id and t.id = d.task_id
            where t.status <> 'done' and t.mission_id is null
            order by t.id
            for no key update of t",
            self.db.project,
            task.id,
            task.assign_to,
            task.status,
            task.held,
            task.run,
            Json(&task.document) as _,
            task.updated_at,
            task.ends
        )
        .fetch_all(self.open().await?)
        .await?;
        let dependents = dependents.into_iter().map(|row| (row.id, row.status));
        let failed = task.status == Status::Failed.as_str();
        self.wake_waiting(failed, pending(dependents)).await
    }

    /// How many other tasks are being worked on, by one agent or by all.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn active_tasks(&mut self, agent: Option<&str>, but: Id<ids::Task>) -> Result<i64> {
        let count = sqlx::query_scalar!(
            r#"select count(*) as "count!" from tasks
            where project_id = $1 and status in ('assigned', 'in_progress', 'review')
              and ($2::text is null or assign_to = $2) and id <> $3"#,
            self.db.project,
            agent,
            but.uuid()
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(count)
    }

    /// How many others are about to ask for a place and have a better claim to it, by priority and then by age: an agent's tasks, or all. At most
    /// `most` are counted.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn tasks_ahead(
        &mut self,
        agent: Option<&str>,
        task: Id<ids::Task>,
        most: i64,
    ) -> Result<i64> {
        let count = sqlx::query_scalar!(
            r#"with this as (
                select priority, created_at from jobs where project_id = $1 and kind = 'task' and subject = $2
            ), asking as (
                select subject, priority, created_at from jobs where project_id = $1 and kind = 'task' and ready
                union all
                select subject, priority, created_at from jobs where project_id = $1 and kind = 'task' and holder is not null
            ), ahead as (
                select from this
                join asking a on a.priority > this.priority or (a.priority = this.priority and a.created_at < this.created_at)
                join tasks t on t.project_id = $1 and t.id = a.subject
                where t.status = 'pending' and not t.held and ($3::text is null or t.assign_to = $3) and t.id <> $2
                  -- Its instructions are written anew before it asks.
                  and not coalesce((t.document ->> 'escalationOwed')::boolean, false)
                limit $4
            )
            select count(*) as "count!" from ahead"#,
            self.db.project,
            task.uuid(),
            agent,
            most
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(count)
    }

    /// Whether an agent has tasks that are not finished.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn has_unfinished_tasks(&mut self, agent: &str) -> Result<bool> {
        Ok(sqlx::query_scalar!(
            r#"select exists (
                select from tasks where project_id = $1 and assign_to = $2 and status not in ('done', 'failed')
            ) as "exists!""#,
            self.db.project,
            agent
        )
        .fetch_one(self.open().await?)
        .await?)
    }

    /// Removes tasks with everything of theirs, at most 1,000, and returns which; what needed one of them gets a verdict.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn delete_tasks(
        &mut self,
        filter: TaskFilter<'_>,
        only: Option<Id<ids::Task>>,
    ) -> Result<Vec<DeletedTask>> {
        let gone = sqlx::query!(
            "select id, mission_id, mission_run from tasks
            where project_id = $1
              and ($2::uuid is null or id = $2)
              and ($3::text is null or status = $3)
              and ($4::text is null or group_label = $4)
              and ($5::uuid is null or mission_id = $5)
              and ($6::text is null or assign_to = $6)
            order by id
            limit 1000
            for update",
            self.db.project,
            only.map(Id::uuid),
            filter.status.map(Status::as_str),
            filter.group,
            filter.mission.map(Id::uuid),
            filter.assign_to
        )
        .fetch_all(self.open().await?)
        .await?;
        if gone.is_empty() {
            return Ok(Vec::new());
        }
        let deleted: Vec<DeletedTask> = gone
            .iter()
            .map(|row| DeletedTask {
                id: row.id.into(),
                place: row
                    .mission_id
                    .zip(row.mission_run)
                    .map(|(mission, run)| Place {
                        mission: mission.into(),
                        run,
                    }),
            })
            .collect();
        let gone: Vec<Uuid> = gone.into_iter().map(|row| row.id).collect();
        let mut waiting = self.hold_dependents(&gone, false).await?;
        waiting.retain(|id| !gone.contains(id));
        // In the order of all: tasks, then their runs, then what goes with the tasks. Whoever passes a barrier holds the run too.
        let mut places: Vec<Place> = deleted.iter().filter_map(|task| task.place).collect();
        places.sort_by_key(|place| (place.mission, place.run));
        places.dedup();
        for place in places {
            self.lock_mission_run(place).await?;
        }
        sqlx::query!(
            "delete from jobs
            where project_id = $1
              and (subject = any($2)
                or subject in (select id from approvals where project_id = $1 and task_id = any($2)))",
            self.db.project,
            &gone
        )
        .execute(self.open().await?)
        .await?;
        sqlx::query!(
            "delete from words where project_id = $1 and task_id = any($2)",
            self.db.project,
            &gone
        )
        .execute(self.open().await?)
        .await?;
        sqlx::query!(
            "delete from tasks where project_id = $1 and id = any($2)",
            self.db.project,
            &gone
        )
        .execute(self.open().await?)
        .await?;
        self.judge_blocked(waiting).await?;
        self.stops.extend(&gone);
        self.changed.extend(&gone);
        Ok(deleted)
    }

    /// Tells whichever process runs a task to stop that run, after the commit.
    pub fn stop_run(&mut self, task: Id<ids::Task>) {
        self.stops.push(task.uuid());
    }

    pub(super) fn topics(&self) -> impl Iterator<Item = Topic> {
        let (world, project) = (self.db.world, self.db.project);
        let jobs = self.rings_jobs.then_some(Topic::Jobs(world));
        let couriers = self.rings_couriers.then_some(Topic::Couriers(world));
        let timers = self.rings_timers.then_some(Topic::Timers(world));
        let events = self.tells.then_some(Topic::Events(world, project));
        let stops: Vec<Topic> = self.stops.iter().copied().map(Topic::Stop).collect();
        jobs.into_iter()
            .chain(couriers)
            .chain(timers)
            .chain(events)
            .chain(stops)
    }
}

/// Nothing of a task can hold a NUL character.
pub fn storable(value: &mut Value) {
    match value {
        Value::String(text) if text.contains('\0') => *text = text.replace('\0', "\u{fffd}"),
        Value::Array(items) => items.iter_mut().for_each(storable),
        Value::Object(members) => members.values_mut().for_each(storable),
        _ => {}
    }
}

impl StoreError {
    /// Whether an unfinished task has the title already.
    pub fn is_title_taken(&self) -> bool {
        self.is_constraint("tasks_title_key")
    }
}
