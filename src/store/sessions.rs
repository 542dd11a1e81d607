//! Sessions: conversations with an agent, and their messages.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::types::Json;
use uuid::Uuid;

use super::{ProjectDb, ProjectTx, Result, StoreError, to_micros};
use crate::event::Event;
use crate::ids::{self, Id};

/// A conversation.
#[derive(Debug, Clone)]
pub struct SessionRow {
    /// Its id.
    pub id: Id<ids::Session>,
    /// What it is called.
    pub title: Option<String>,
    /// The name of the agent that answered first.
    pub agent: Option<String>,
    /// The caller's own user.
    pub end_user: Option<String>,
    /// The caller's own labels, text to text.
    pub metadata: Value,
    /// How many messages it has.
    pub message_count: i32,
    /// When it was opened.
    pub created_at: DateTime<Utc>,
    /// When something was last said.
    pub updated_at: DateTime<Utc>,
}

struct StoredSession {
    id: Uuid,
    title: Option<String>,
    agent: Option<String>,
    end_user: Option<String>,
    metadata: Value,
    message_count: i32,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl From<StoredSession> for SessionRow {
    fn from(stored: StoredSession) -> Self {
        Self {
            id: stored.id.into(),
            title: stored.title,
            agent: stored.agent,
            end_user: stored.end_user,
            metadata: stored.metadata,
            message_count: stored.message_count,
            created_at: stored.created_at,
            updated_at: stored.updated_at,
        }
    }
}

/// A message of a conversation.
#[derive(Debug, Clone)]
pub struct MessageRow {
    /// Its id.
    pub id: Id<ids::Message>,
    /// The message, in the form that the conversation was led in.
    pub body: Value,
    /// Whether the answer was cut short.
    pub interrupted: bool,
    /// When it was said.
    pub created_at: DateTime<Utc>,
}

struct StoredMessage {
    id: Uuid,
    body: Value,
    interrupted: bool,
    created_at: DateTime<Utc>,
}

impl From<StoredMessage> for MessageRow {
    fn from(stored: StoredMessage) -> Self {
        Self {
            id: stored.id.into(),
            body: stored.body,
            interrupted: stored.interrupted,
            created_at: stored.created_at,
        }
    }
}

/// A message to be stored.
#[derive(Debug, Clone)]
pub struct NewMessage {
    /// The message.
    pub body: Value,
    /// Whether it was cut short.
    pub interrupted: bool,
    /// When it was said.
    pub created_at: DateTime<Utc>,
}

/// Which sessions to list.
#[derive(Debug, Default)]
pub struct SessionFilter<'a> {
    /// Only of this end user.
    pub end_user: Option<&'a str>,
    /// Only with all of these labels: an object of text to text.
    pub metadata: Option<Value>,
    /// Only after this session in the list's order.
    pub after: Option<Id<ids::Session>>,
}

impl ProjectDb {
    /// The project's sessions, latest activity first, at most `limit`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn sessions(
        &self,
        filter: &SessionFilter<'_>,
        limit: i64,
    ) -> Result<Vec<SessionRow>> {
        let stored = sqlx::query_as!(
            StoredSession,
            "select id, title, agent, end_user, metadata, message_count, created_at, updated_at
            from sessions
            where project_id = $1
              and ($2::text is null or end_user = $2)
              and ($3::jsonb is null or (metadata <> '{}' and metadata @> $3))
              and ($4::uuid is null
                   or (updated_at, id) < (select updated_at, id from sessions where project_id = $1 and id = $4))
            order by updated_at desc, id desc
            limit $5",
            self.project,
            filter.end_user,
            filter.metadata.clone(),
            filter.after.map(Id::uuid),
            limit
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(stored.into_iter().map(SessionRow::from).collect())
    }

    /// One session.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn session(&self, id: Id<ids::Session>) -> Result<SessionRow> {
        let stored = sqlx::query_as!(
            StoredSession,
            "select id, title, agent, end_user, metadata, message_count, created_at, updated_at
            from sessions
            where project_id = $1 and id = $2",
            self.project,
            id.uuid()
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(stored.into())
    }

    /// The newest `limit` messages of a session, or the newest before message `before`; oldest first.
    ///
    /// A session that does not exist has none: ask for [`ProjectDb::session`] where that matters.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn messages(
        &self,
        session: Id<ids::Session>,
        before: Option<Id<ids::Message>>,
        limit: i64,
    ) -> Result<Vec<MessageRow>> {
        let mut newest_first = sqlx::query_as!(
            StoredMessage,
            "select id, body, interrupted, created_at
            from messages
            where project_id = $1
              and session_id = $2
              and ($3::uuid is null
                   or position < (select position from messages where project_id = $1 and session_id = $2 and id = $3))
            order by position desc
            limit $4",
            self.project,
            session.uuid(),
            before.map(Id::uuid),
            limit
        )
        .fetch_all(&self.pool)
        .await?;
        newest_first.reverse();
        Ok(newest_first.into_iter().map(MessageRow::from).collect())
    }

    /// Gives a session another title.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn rename_session(&self, id: Id<ids::Session>, title: &str) -> Result<()> {
        let renamed = sqlx::query!(
            "update sessions set title = $3 where project_id = $1 and id = $2",
            self.project,
            id.uuid(),
            title
        )
        .execute(&self.pool)
        .await?;
        if renamed.rows_affected() == 0 {
            Err(StoreError::NotFound)
        } else {
            Ok(())
        }
    }

    /// Removes a session with its messages. What its runs used stays on record.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn delete_session(&self, id: Id<ids::Session>) -> Result<()> {
        let deleted = sqlx::query!(
            "delete from sessions where project_id = $1 and id = $2",
            self.project,
            id.uuid()
        )
        .execute(&self.pool)
        .await?;
        if deleted.rows_affected() == 0 {
            Err(StoreError::NotFound)
        } else {
            Ok(())
        }
    }
}

impl ProjectTx {
    /// Stores a whole conversation that was led elsewhere.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn import_session(
        &mut self,
        title: Option<&str>,
        agent: Option<&str>,
        messages: &[NewMessage],
    ) -> Result<Id<ids::Session>> {
        let id = Id::<ids::Session>::new();
        let now = to_micros(Utc::now());
        let count = i32::try_from(messages.len()).unwrap_or(i32::MAX);
        sqlx::query!(
            "insert into sessions (project_id, id, title, agent, message_count, created_at, updated_at)
            values ($1, $2, $3, $4, $5, $6, $6)",
            self.db.project,
            id.uuid(),
            title,
            agent,
            count,
            now
        )
        .execute(self.open().await?)
        .await?;
        let ids: Vec<Uuid> = messages
            .iter()
            .map(|_| Id::<ids::Message>::new().uuid())
            .collect();
        let bodies: Vec<Json<&Value>> =
            messages.iter().map(|message| Json(&message.body)).collect();
        let times: Vec<DateTime<Utc>> = messages
            .iter()
            .map(|message| to_micros(message.created_at))
            .collect();
        sqlx::query!(
            "insert into messages (project_id, session_id, position, id, body, created_at)
            select $1, $2, (m.number - 1)::int, m.id, m.body, m.at
            from unnest($3::uuid[], $4::jsonb[], $5::timestamptz[]) with ordinality as m (id, body, at, number)",
            self.db.project,
            id.uuid(),
            &ids,
            &bodies as _,
            &times
        )
        .execute(self.open().await?)
        .await?;
        let mut told = json!({"sessionId": id, "messageCount": count});
        for (key, value) in [("title", title), ("agent", agent)] {
            if let Some(value) = value {
                told[key] = json!(value);
            }
        }
        self.emit(Event::new("session:created", told));
        Ok(id)
    }
}
