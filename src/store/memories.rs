//! Memories: free text that every run of an agent begins with.

use std::sync::Arc;
use std::time::Instant;

use super::{ProjectDb, Result, StoreError};

/// The most bytes that one memory holds; the constraint `memories_content_size` keeps it.
pub const MEMORY_LIMIT: usize = 256 * 1024;

/// Whose memory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryOwner<'a> {
    /// The project's: all its agents share it.
    Project,
    /// This agent's own, by its name. The agent need not exist (contract 2.13).
    Agent(&'a str),
}

/// The constraint that keeps [`MEMORY_LIMIT`].
pub(super) const SIZE: &str = "memories_content_size";
/// [`MEMORY_LIMIT`] as Postgres counts.
const LIMIT: i64 = MEMORY_LIMIT as i64;

impl<'a> MemoryOwner<'a> {
    /// No agent has an empty name.
    fn column(self) -> &'a str {
        match self {
            Self::Project => "",
            Self::Agent(name) => name,
        }
    }
}

/// What an agent remembers when it begins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Memories {
    /// What all agents of the project share.
    pub shared: Option<String>,
    /// Its own.
    pub own: Option<String>,
}

impl Memories {
    pub(super) fn size(&self) -> usize {
        [&self.shared, &self.own]
            .into_iter()
            .flatten()
            .map(String::len)
            .sum()
    }
}

impl ProjectDb {
    /// A memory's text; `None` when nothing was ever saved.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn memory(&self, owner: MemoryOwner<'_>) -> Result<Option<String>> {
        let content = sqlx::query_scalar!(
            "select content from memories where project_id = $1 and owner = $2",
            self.project,
            owner.column()
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(content)
    }

    /// What an agent remembers. No round trip on a warm path, where another process' change is seen within a second.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn memories(&self, agent: &str) -> Result<Arc<Memories>> {
        if let Some(memories) = self.warm.memories(self.project, self.world, agent) {
            return Ok(memories);
        }
        self.read_memories(agent).await
    }

    /// What an agent remembers at this moment. No round trip on a warm path of a process that is alone.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn memories_now(&self, agent: &str) -> Result<Arc<Memories>> {
        if let Some(memories) = self.memories_at_hand(agent) {
            return Ok(memories);
        }
        self.read_memories(agent).await
    }

    /// What an agent remembers at this moment, where this process knows it: nobody else is there who could change it.
    pub fn memories_at_hand(&self, agent: &str) -> Option<Arc<Memories>> {
        let alone = self.bell.is_alone(Instant::now());
        alone.then(|| self.warm.memories(self.project, self.world, agent))?
    }

    async fn read_memories(&self, agent: &str) -> Result<Arc<Memories>> {
        let generation = self.warm.generation();
        let rows = sqlx::query!(
            "select owner, content from memories where project_id = $1 and owner in ('', $2)",
            self.project,
            agent
        )
        .fetch_all(&self.pool)
        .await?;
        let mut memories = Memories::default();
        for row in rows {
            let text = Some(row.content).filter(|content| !content.is_empty());
            if row.owner.is_empty() {
                memories.shared = text;
            } else {
                memories.own = text;
            }
        }
        let memories = Arc::new(memories);
        self.warm.keep_memories(
            generation,
            self.project,
            self.world,
            agent,
            memories.clone(),
        );
        Ok(memories)
    }

    /// Puts a text in place of the whole memory.
    ///
    /// # Errors
    /// Constraint `memories_content_size`.
    pub async fn save_memory(&self, owner: MemoryOwner<'_>, content: &str) -> Result<()> {
        let saved = sqlx::query!(
            "with saved as (
                insert into memories (project_id, owner, content)
                values ($1, $2, $3)
                on conflict (project_id, owner) do update set content = excluded.content, updated_at = now()
            )
            insert into changes (project_id) values ($1)",
            self.project,
            owner.column(),
            content
        )
        .execute(&self.pool)
        .await;
        // Whatever the answer: it may have been lost after the commit.
        self.warm.forget(self.project);
        saved?;
        Ok(())
    }

    /// Adds a line at the end. Lines that are added at once all stay.
    ///
    /// # Errors
    /// Constraint `memories_content_size`.
    pub async fn append_memory(&self, owner: MemoryOwner<'_>, line: &str) -> Result<()> {
        let saved = sqlx::query!(
            "with appended as (
                insert into memories (project_id, owner, content)
                values ($1, $2, $3)
                on conflict (project_id, owner) do update
                set content = case
                        when memories.content = '' or right(memories.content, 1) = e'\\n' then memories.content || excluded.content
                        else memories.content || e'\\n' || excluded.content
                    end,
                    updated_at = now()
            )
            insert into changes (project_id) values ($1)",
            self.project,
            owner.column(),
            line
        )
        .execute(&self.pool)
        .await;
        // Whatever the answer: it may have been lost after the commit.
        self.warm.forget(self.project);
        saved?;
        Ok(())
    }

    /// Puts `with` in place of every `find`, which may not be empty.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when the memory does not hold `find`; constraint `memories_content_size`.
    pub async fn replace_in_memory(
        &self,
        owner: MemoryOwner<'_>,
        find: &str,
        with: &str,
    ) -> Result<()> {
        // Its size is known before it is made: what replaces every letter of a memory could be as large as Postgres' memory.
        let size = sqlx::query_scalar!(
            r#"with sized as (
                select octet_length(content) + (octet_length($4) - octet_length($3))::bigint
                    * ((length(content) - length(replace(content, $3, ''))) / length($3)) as size
                from memories
                where project_id = $1 and owner = $2 and strpos(content, $3) > 0
                for update
            ), replaced as (
                update memories
                set content = replace(content, $3, $4), updated_at = now()
                from sized
                where project_id = $1 and owner = $2 and sized.size <= $5
                returning project_id
            ), told as (
                insert into changes (project_id) select project_id from replaced
            )
            select size as "size!" from sized"#,
            self.project,
            owner.column(),
            find,
            with,
            LIMIT
        )
        .fetch_optional(&self.pool)
        .await;
        self.warm.forget(self.project);
        match size? {
            None => Err(StoreError::NotFound),
            Some(size) if size > LIMIT => Err(StoreError::Constraint(SIZE.to_owned())),
            Some(_) => Ok(()),
        }
    }
}
