//! Missions and their definitions.

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use sqlx::types::Json;
use uuid::Uuid;

use super::{ProjectDb, ProjectTx, Result, StoreError, to_micros};
use crate::ids::{self, Id};
use crate::mission::{Document, Mission, Status};

/// A mission with its definition as it was saved.
#[derive(Debug, Clone)]
pub struct MissionRow {
    /// The mission.
    pub mission: Mission,
    /// The members of its definition; in lists without its largest.
    pub definition: Map<String, Value>,
    /// How many tasks it defines.
    pub task_count: i64,
    /// When it begins by itself.
    pub schedule: Option<String>,
    /// The last date of its schedule.
    pub end_date: Option<DateTime<Utc>>,
}

struct Stored {
    id: Uuid,
    name: String,
    status: String,
    reason: Option<String>,
    execution_count: i32,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl Stored {
    fn into_mission(self) -> Mission {
        let mut mission = Mission::new(self.name, self.created_at);
        mission.id = self.id.into();
        mission.reason = self.reason;
        mission.execution_count = self.execution_count;
        mission.updated_at = self.updated_at;
        // The column's check admits these words only.
        mission.restored(Status::of(&self.status).unwrap_or(Status::Failed))
    }
}

struct Whole {
    id: Uuid,
    name: String,
    status: String,
    reason: Option<String>,
    execution_count: i32,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    definition: Json<Map<String, Value>>,
    task_count: i64,
    schedule: Option<String>,
    end_date: Option<DateTime<Utc>>,
}

impl From<Whole> for MissionRow {
    fn from(whole: Whole) -> Self {
        let stored = Stored {
            id: whole.id,
            name: whole.name,
            status: whole.status,
            reason: whole.reason,
            execution_count: whole.execution_count,
            created_at: whole.created_at,
            updated_at: whole.updated_at,
        };
        Self {
            mission: stored.into_mission(),
            definition: whole.definition.0,
            task_count: whole.task_count,
            schedule: whole.schedule,
            end_date: whole.end_date,
        }
    }
}

impl ProjectDb {
    /// A mission with its definition.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn mission(&self, id: Id<ids::Mission>) -> Result<MissionRow> {
        let whole = sqlx::query_as!(
            Whole,
            r#"select m.id, m.name, m.status, m.reason, m.execution_count, m.created_at, m.updated_at,
                m.document as "definition: Json<Map<String, Value>>",
                jsonb_array_length(m.document -> 'tasks')::bigint as "task_count!",
                s.expression as "schedule?", s.end_date as "end_date?"
            from missions m
            left join schedules s on s.project_id = m.project_id and s.mission_id = m.id
            where m.project_id = $1 and m.id = $2"#,
            self.project,
            id.uuid()
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(whole.into())
    }

    /// Missions before `after`, newest first, at most `limit`, without the largest members of their definitions. Those that are
    /// `resumable` are under way or failed, with tasks of their newest run that are pending or failed.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn missions(
        &self,
        status: Option<Status>,
        resumable: bool,
        after: Option<Id<ids::Mission>>,
        limit: i64,
    ) -> Result<Vec<MissionRow>> {
        let rows = sqlx::query_as!(
            Whole,
            r#"select m.id, m.name, m.status, m.reason, m.execution_count, m.created_at, m.updated_at,
                m.document - '{tasks,team,data,checkpoints,qualityGates,delays,notifications}'::text[] as "definition!: Json<Map<String, Value>>",
                jsonb_array_length(m.document -> 'tasks')::bigint as "task_count!",
                s.expression as "schedule?", s.end_date as "end_date?"
            from missions m
            left join schedules s on s.project_id = m.project_id and s.mission_id = m.id
            where m.project_id = $1
              and ($2::text is null or m.status = $2)
              and ($3::uuid is null or m.id < $3)
              and (not $4::boolean or (m.status in ('active', 'paused', 'failed') and exists (
                select from tasks t
                where t.project_id = $1 and t.mission_id = m.id and t.mission_run = m.execution_count and t.status in ('pending', 'failed')
              )))
            order by m.id desc
            limit $5"#,
            self.project,
            status.map(Status::as_str),
            after.map(Id::uuid),
            resumable,
            limit
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(MissionRow::from).collect())
    }

    /// A mission without its definition.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn mission_status(&self, id: Id<ids::Mission>) -> Result<Mission> {
        let stored = sqlx::query_as!(
            Stored,
            "select id, name, status, reason, execution_count, created_at, updated_at
            from missions where project_id = $1 and id = $2",
            self.project,
            id.uuid()
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(stored.into_mission())
    }
}

impl ProjectTx {
    /// Stores a new mission.
    ///
    /// # Errors
    /// Constraint `missions_name_key`.
    pub async fn create_mission(
        &mut self,
        mission: &mut Mission,
        document: &Document,
    ) -> Result<()> {
        mission.created_at = to_micros(mission.created_at);
        mission.updated_at = mission.created_at;
        sqlx::query!(
            "insert into missions (project_id, id, name, status, reason, document, execution_count, created_at, updated_at)
            values ($1, $2, $3, $4, $5, $6, $7, $8, $8)",
            self.db.project,
            mission.id.uuid(),
            mission.name,
            mission.status().as_str(),
            mission.reason,
            Json(document.members()) as _,
            mission.execution_count,
            mission.created_at
        )
        .execute(self.open().await?)
        .await?;
        self.events.append(&mut mission.take_events());
        Ok(())
    }

    /// A name for another mission of a playbook: the playbook's, or that with the next number. `base` holds letters, digits and
    /// hyphens only. Whoever asks for the same until the commit waits.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn free_mission_name(&mut self, base: &str) -> Result<String> {
        sqlx::query_scalar!(
            r#"select pg_advisory_xact_lock(hashtextextended($1::uuid::text || '/' || $2::text, 0))::text as "locked""#,
            self.db.project,
            base
        )
        .fetch_one(self.open().await?)
        .await?;
        let number = sqlx::query_scalar!(
            r#"select case
                when exists (select from missions where project_id = $1 and name = $2)
                then (
                    select (coalesce(max(substring(name from length($2) + 2)::numeric), 1) + 1)::text from missions
                    where project_id = $1 and name ~ ('^' || $2 || '-[0-9]{1,100}$')
                )
            end as "number""#,
            self.db.project,
            base
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(number.map_or_else(|| base.to_owned(), |number| format!("{base}-{number}")))
    }

    /// A mission, held against other changes until the commit.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn lock_mission(&mut self, id: Id<ids::Mission>) -> Result<Mission> {
        let stored = sqlx::query_as!(
            Stored,
            "select id, name, status, reason, execution_count, created_at, updated_at
            from missions where project_id = $1 and id = $2
            for no key update",
            self.db.project,
            id.uuid()
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(stored.into_mission())
    }

    /// A mission as it stands, not held.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn mission_as_it_stands(&mut self, id: Id<ids::Mission>) -> Result<Mission> {
        let stored = sqlx::query_as!(
            Stored,
            "select id, name, status, reason, execution_count, created_at, updated_at
            from missions where project_id = $1 and id = $2",
            self.db.project,
            id.uuid()
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(stored.into_mission())
    }

    /// Whether a mission is paused; while one is, its row is held against the end of the pause until the commit.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn is_paused(&mut self, id: Id<ids::Mission>) -> Result<bool> {
        let status = sqlx::query_scalar!(
            "select status from missions where project_id = $1 and id = $2",
            self.db.project,
            id.uuid()
        )
        .fetch_one(self.open().await?)
        .await?;
        if status != Status::Paused.as_str() {
            return Ok(false);
        }
        let status = sqlx::query_scalar!(
            "select status from missions where project_id = $1 and id = $2 for share",
            self.db.project,
            id.uuid()
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(status == Status::Paused.as_str())
    }

    /// A mission's definition.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn mission_definition(&mut self, id: Id<ids::Mission>) -> Result<Map<String, Value>> {
        let definition = sqlx::query_scalar!(
            r#"select document as "document: Json<Map<String, Value>>" from missions where project_id = $1 and id = $2"#,
            self.db.project,
            id.uuid()
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(definition.0)
    }

    /// Stores a changed mission with what has happened to it; its definition stays.
    ///
    /// # Errors
    /// Constraint `missions_name_key`.
    pub async fn save_mission(&mut self, mission: &mut Mission) -> Result<()> {
        mission.updated_at = to_micros(Utc::now()).max(mission.updated_at);
        sqlx::query!(
            "update missions set name = $3, status = $4, reason = $5, execution_count = $6, updated_at = $7
            where project_id = $1 and id = $2",
            self.db.project,
            mission.id.uuid(),
            mission.name,
            mission.status().as_str(),
            mission.reason,
            mission.execution_count,
            mission.updated_at
        )
        .execute(self.open().await?)
        .await?;
        self.events.append(&mut mission.take_events());
        Ok(())
    }

    /// Puts a definition in place of the earlier one.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn save_definition(
        &mut self,
        mission: Id<ids::Mission>,
        document: &Document,
    ) -> Result<()> {
        sqlx::query!(
            "update missions set document = $3 where project_id = $1 and id = $2",
            self.db.project,
            mission.uuid(),
            Json(document.members()) as _
        )
        .execute(self.open().await?)
        .await?;
        Ok(())
    }

    /// Removes a mission with its runs and its schedule. Its tasks must be gone.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn delete_mission(&mut self, mission: Id<ids::Mission>) -> Result<()> {
        sqlx::query!(
            "delete from jobs
            where project_id = $1
              and (subject = $2
                or subject in (select id from schedules where project_id = $1 and mission_id = $2)
                or subject in (select id from barriers where project_id = $1 and mission_id = $2)
                or subject in (select id from approvals where project_id = $1 and mission_id = $2))",
            self.db.project,
            mission.uuid()
        )
        .execute(self.open().await?)
        .await?;
        sqlx::query!(
            "delete from missions where project_id = $1 and id = $2",
            self.db.project,
            mission.uuid()
        )
        .execute(self.open().await?)
        .await?;
        Ok(())
    }
}

impl StoreError {
    /// Whether a mission has the name already.
    pub fn is_mission_name_taken(&self) -> bool {
        self.is_constraint("missions_name_key")
    }
}
