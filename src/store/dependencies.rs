//! What must be done before a task, and who waits for it.

use serde_json::Value;
use uuid::Uuid;

use super::{Job, ProjectDb, ProjectTx, Result};
use crate::ids::{self, Id};
use crate::task::{Status, Task};

/// Something that must be done before a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Its id.
    pub id: Id<ids::Task>,
    /// Where it stands; `None` when it was deleted.
    pub status: Option<Status>,
    /// What it is called.
    pub title: Option<String>,
}

impl Need {
    fn new(id: Uuid, status: Option<&str>, title: Option<String>) -> Self {
        Self {
            id: id.into(),
            status: status.and_then(Status::of),
            title,
        }
    }

    /// Whether it can only be done if someone does something about it: it has failed, or is not there any more.
    pub fn is_hopeless(&self) -> bool {
        matches!(self.status, None | Some(Status::Failed))
    }
}

/// What a task came to that another waited for.
#[derive(Debug, Clone)]
pub struct NeedResult {
    /// Its title.
    pub title: String,
    /// The beginning of its answer.
    pub stdout: Option<String>,
    /// What it left behind.
    pub outcomes: Option<Value>,
}

/// Those that wait. It is asked when they are held and not before: a draft may be queued, or a failed task tried again, while its need
/// ends, and one of both must see the other.
pub(super) fn pending(dependents: impl Iterator<Item = (Uuid, String)>) -> Vec<Uuid> {
    dependents
        .filter(|(_, status)| status == Status::Pending.as_str())
        .map(|(id, _)| id)
        .collect()
}

impl ProjectDb {
    /// What a task needs, in the order of ids.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn needs(&self, task: Id<ids::Task>) -> Result<Vec<Need>> {
        let rows = sqlx::query!(
            r#"select d.needs_id, n.status as "status?", n.title as "title?"
            from dependencies d
            left join tasks n on n.project_id = d.project_id and n.id = d.needs_id
            where d.project_id = $1 and d.task_id = $2
            order by d.needs_id"#,
            self.project,
            task.uuid()
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| Need::new(row.needs_id, row.status.as_deref(), row.title))
            .collect())
    }

    /// What the tasks came to that a task needs, in the order of their ids, at most `limit`; 16,000 characters of each.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn need_results(&self, task: Id<ids::Task>, limit: i64) -> Result<Vec<NeedResult>> {
        Ok(sqlx::query_as!(
            NeedResult,
            "select n.title, left(n.document -> 'result' ->> 'stdout', 16000) as stdout, n.document -> 'outcomes' as outcomes
            from dependencies d
            join tasks n on n.project_id = d.project_id and n.id = d.needs_id
            where d.project_id = $1 and d.task_id = $2 and n.status = 'done'
            order by n.id
            limit $3",
            self.project,
            task.uuid(),
            limit
        )
        .fetch_all(&self.pool)
        .await?)
    }
}

impl ProjectTx {
    /// The task that `dependsOn` means: an id, else the title of a task outside of missions, an unfinished one before finished ones.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn find_need(&mut self, id_or_title: &str) -> Result<Id<ids::Task>> {
        // One after the other, each by an index of its own: asked in one, Postgres reads all tasks of the project.
        if let Ok(id) = id_or_title.parse::<Id<ids::Task>>() {
            let found = sqlx::query_scalar!(
                "select id from tasks where project_id = $1 and id = $2",
                self.db.project,
                id.uuid()
            )
            .fetch_optional(self.open().await?)
            .await?;
            if let Some(found) = found {
                return Ok(found.into());
            }
        }
        let unfinished = sqlx::query_scalar!(
            "select id from tasks
            where project_id = $1 and title = $2 and status not in ('done', 'failed') and mission_id is null",
            self.db.project,
            id_or_title
        )
        .fetch_optional(self.open().await?)
        .await?;
        if let Some(found) = unfinished {
            return Ok(found.into());
        }
        let finished = sqlx::query_scalar!(
            "select id from tasks
            where project_id = $1 and title = $2 and status in ('done', 'failed') and mission_id is null
            order by id desc
            limit 1",
            self.db.project,
            id_or_title
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(finished.into())
    }

    /// These tasks as they stand, in the order of their ids, held until the commit so that none can end unnoticed.
    /// What is gone by now is `None`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn hold_needs(&mut self, needs: &[Id<ids::Task>]) -> Result<Vec<Need>> {
        let ids: Vec<Uuid> = needs.iter().map(|need| need.uuid()).collect();
        let rows = sqlx::query!(
            "select id, status, title from tasks where project_id = $1 and id = any($2) order by id for no key update",
            self.db.project,
            &ids
        )
        .fetch_all(self.open().await?)
        .await?;
        // Whoever ends one without holding it must notice.
        sqlx::query!(
            "update tasks set needed = true where project_id = $1 and id = any($2) and not needed",
            self.db.project,
            &ids
        )
        .execute(self.open().await?)
        .await?;
        let mut held: Vec<Need> = rows
            .into_iter()
            .map(|row| Need {
                id: row.id.into(),
                status: Status::of(&row.status),
                title: Some(row.title),
            })
            .collect();
        for id in needs {
            if !held.iter().any(|need| need.id == *id) {
                held.push(Need {
                    id: *id,
                    status: None,
                    title: None,
                });
            }
        }
        Ok(held)
    }

    /// Owes the tasks outside of missions that can begin now, or a verdict on those that cannot any more.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn wake_dependents(&mut self, task: &Task) -> Result<()> {
        let waiting = self.hold_dependents(&[task.id.uuid()], true).await?;
        let failed = task.status() == Status::Failed;
        self.wake_waiting(failed, waiting).await
    }

    /// Those that wait and need one of these, of all tasks or of those outside of missions. They and all who may come to wait are held
    /// until the commit.
    pub(super) async fn hold_dependents(
        &mut self,
        needs: &[Uuid],
        outside: bool,
    ) -> Result<Vec<Uuid>> {
        let dependents = sqlx::query!(
            "select t.id, t.status
            from (select distinct task_id from dependencies where project_id = $1 and needs_id = any($2)) d
            join tasks t on t.project_id = $1 and t.id = d.task_id
            where t.status <> 'done' and (t.mission_id is null or not $3)
            order by t.id
            for no key update of t",
            self.db.project,
            needs,
            outside
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(pending(
            dependents.into_iter().map(|row| (row.id, row.status)),
        ))
    }

    /// Owes a verdict on tasks that can never begin because of what they need.
    pub(super) async fn judge_blocked(&mut self, tasks: Vec<Uuid>) -> Result<()> {
        for id in tasks {
            self.enqueue(Job::Blocked(id.into()), 1.0, std::time::Duration::ZERO)
                .await?;
        }
        Ok(())
    }

    /// What a task still waits for.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn unmet_needs(&mut self, task: Id<ids::Task>) -> Result<Vec<Need>> {
        let rows = sqlx::query!(
            r#"select d.needs_id, n.status as "status?", n.title as "title?"
            from dependencies d
            left join tasks n on n.project_id = d.project_id and n.id = d.needs_id
            where d.project_id = $1 and d.task_id = $2 and n.status is distinct from 'done'
            order by d.needs_id"#,
            self.db.project,
            task.uuid()
        )
        .fetch_all(self.open().await?)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| Need::new(row.needs_id, row.status.as_deref(), row.title))
            .collect())
    }

    /// Takes needs away from a task.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn drop_needs(&mut self, task: Id<ids::Task>, needs: &[Id<ids::Task>]) -> Result<()> {
        let needs: Vec<Uuid> = needs.iter().map(|need| need.uuid()).collect();
        sqlx::query!(
            "delete from dependencies where project_id = $1 and task_id = $2 and needs_id = any($3)",
            self.db.project,
            task.uuid(),
            &needs
        )
        .execute(self.open().await?)
        .await?;
        Ok(())
    }

    /// Owes a verdict on the tasks outside of missions that wait for one of these, which have failed.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn judge_dependents_outside(&mut self, failed: &[Id<ids::Task>]) -> Result<()> {
        let failed: Vec<Uuid> = failed.iter().map(|id| id.uuid()).collect();
        let waiting = self.hold_dependents(&failed, true).await?;
        self.judge_blocked(waiting).await
    }

    /// Owes those that wait, and are held, what they can have once something that they need has failed or is done.
    pub(super) async fn wake_waiting(&mut self, failed: bool, waiting: Vec<Uuid>) -> Result<()> {
        if waiting.is_empty() {
            return Ok(());
        }
        if failed {
            return self.judge_blocked(waiting).await;
        }
        // Of several needs one may be done and another have failed long ago: it was judged then, and is again.
        sqlx::query!(
            "insert into jobs (project_id, kind, subject, priority, ready, due_at, lease)
            select t.project_id, case when needs.hopeless then 'blocked' else 'task' end, t.id,
                case when needs.hopeless then 1 else (t.document ->> 'priority')::double precision end, true, clock_timestamp(), nextval('leases')
            from tasks t
            cross join lateral (
                select coalesce(bool_or(n.status is null or n.status = 'failed'), false) as hopeless,
                    coalesce(bool_or(n.status not in ('done', 'failed')), false) as waits
                from dependencies d
                left join tasks n on n.project_id = d.project_id and n.id = d.needs_id
                where d.project_id = $1 and d.task_id = t.id
            ) needs
            where t.project_id = $1 and t.id = any($2) and not t.held and (needs.hopeless or not needs.waits)
            order by t.id
            on conflict do nothing",
            self.db.project,
            &waiting
        )
        .execute(self.open().await?)
        .await?;
        self.rings_jobs = true;
        Ok(())
    }
}
