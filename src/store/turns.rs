//! What one chat turn leaves behind, in one statement and so in one commit:
//! its session, its messages, its run, what each model call used, and what is to be told of it.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::types::Json;
use uuid::Uuid;

use super::events::EventColumns;
use super::{NewMessage, ProjectDb, Result, StoreError, to_micros};
use crate::event::Event;
use crate::ids::{Agent, Id, Message, Run, Session};

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunStatus {
    /// With a whole answer.
    Finished,
    /// Its caller left.
    Interrupted,
    /// The provider failed.
    Failed,
}

impl RunStatus {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Interrupted => "interrupted",
            Self::Failed => "failed",
        }
    }
}

/// What one call of a model used.
#[derive(Debug, Clone)]
pub struct CallUsage {
    /// The model as the agent names it.
    pub model: String,
    /// Tokens read.
    pub prompt_tokens: u64,
    /// Tokens written.
    pub completion_tokens: u64,
    /// How many of the read ones were cached.
    pub cached_tokens: u64,
    /// How many of the written ones were reasoning.
    pub reasoning_tokens: u64,
    /// Whether we estimated them.
    pub estimated: bool,
}

/// One turn to be recorded.
#[derive(Debug)]
pub struct TurnRecord<'a> {
    /// The run's id.
    pub run: Id<Run>,
    /// Whether anything is told of it.
    pub tells: bool,
    /// The session that the messages belong to.
    pub session: Id<Session>,
    /// Whether the turn continues a session rather than opening it.
    pub continues: bool,
    /// The session's title if it is new.
    pub title: Option<&'a str>,
    /// The agent that answered.
    pub agent: (Id<Agent>, &'a str),
    /// The caller's own user; replaces the session's when given.
    pub end_user: Option<&'a str>,
    /// The caller's own labels; added to the session's.
    pub metadata: &'a Value,
    /// What was said, in order. Empty when nothing is worth keeping: then no session is opened.
    pub messages: &'a [NewMessage],
    /// What the model calls used.
    pub calls: &'a [CallUsage],
    /// How it ended.
    pub status: RunStatus,
    /// When it began.
    pub started_at: DateTime<Utc>,
    /// When it ended.
    pub ended_at: DateTime<Utc>,
}

/// Tokens as the database counts them.
pub(super) fn token_column(tokens: u64) -> i64 {
    i64::try_from(tokens).unwrap_or(i64::MAX)
}

impl TurnRecord<'_> {
    /// What is told of it, with the ids of its messages.
    fn events(&self, messages: &[Uuid]) -> Vec<Event> {
        if !self.tells {
            return Vec::new();
        }
        let opened = (!self.continues && !messages.is_empty()).then(|| {
            let mut told = json!({"sessionId": self.session, "agent": self.agent.1});
            if let Some(title) = self.title {
                told["title"] = json!(title);
            }
            Event::new("session:created", told)
        });
        let added = self.messages.iter().zip(messages).map(|(message, id)| {
            let id = Id::<Message>::from(*id);
            let told =
                json!({"sessionId": self.session, "messageId": id, "role": message.body["role"]});
            Event::new("message:added", told)
        });
        opened.into_iter().chain(added).collect()
    }
}

impl ProjectDb {
    /// Records a turn. To record it twice is refused, see [`StoreError::is_recorded_turn`].
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when the session it continues has been deleted meanwhile; nothing is stored then.
    pub async fn record_turn(&self, turn: &TurnRecord<'_>) -> Result<()> {
        let opened = i32::try_from(turn.messages.len()).unwrap_or(i32::MAX);
        let ids: Vec<Uuid> = turn
            .messages
            .iter()
            .map(|_| Id::<Message>::new().uuid())
            .collect();
        let bodies: Vec<Json<&Value>> = turn
            .messages
            .iter()
            .map(|message| Json(&message.body))
            .collect();
        let interrupted: Vec<bool> = turn
            .messages
            .iter()
            .map(|message| message.interrupted)
            .collect();
        let times: Vec<DateTime<Utc>> = turn
            .messages
            .iter()
            .map(|message| to_micros(message.created_at))
            .collect();
        let call_ids: Vec<Uuid> = turn.calls.iter().map(|_| Uuid::now_v7()).collect();
        let models: Vec<&str> = turn.calls.iter().map(|call| call.model.as_str()).collect();
        let prompt: Vec<i64> = turn
            .calls
            .iter()
            .map(|call| token_column(call.prompt_tokens))
            .collect();
        let completion: Vec<i64> = turn
            .calls
            .iter()
            .map(|call| token_column(call.completion_tokens))
            .collect();
        let cached: Vec<i64> = turn
            .calls
            .iter()
            .map(|call| token_column(call.cached_tokens))
            .collect();
        let reasoning: Vec<i64> = turn
            .calls
            .iter()
            .map(|call| token_column(call.reasoning_tokens))
            .collect();
        let estimated: Vec<bool> = turn.calls.iter().map(|call| call.estimated).collect();
        let events = EventColumns::new(turn.events(&ids));
        // The update locks the session's row, so the turns of one session queue here and each gets
        // the positions after the one before.
        let sessions = sqlx::query_scalar!(
            r#"with opened as (
                insert into sessions (project_id, id, title, agent, end_user, metadata, message_count, created_at, updated_at)
                select $1, $2, $4, $5, $6, $7, $8, $9, $10
                where not $3 and $8 > 0
                returning id, message_count
            ), continued as (
                update sessions
                set message_count = message_count + $8, updated_at = greatest(updated_at, $10),
                    end_user = coalesce($6, end_user), metadata = metadata || $7
                where $3 and project_id = $1 and id = $2
                returning id, message_count
            ), session as (
                select id, message_count from opened union all select id, message_count from continued
            ), said as (
                insert into messages (project_id, session_id, position, id, body, interrupted, created_at)
                select $1, s.id, s.message_count - $8 + (m.number - 1)::int, m.id, m.body, m.interrupted, m.at
                from session s
                cross join unnest($11::uuid[], $12::jsonb[], $13::boolean[], $14::timestamptz[])
                    with ordinality as m (id, body, interrupted, at, number)
            ), ran as (
                insert into runs (project_id, id, session_id, agent_id, status, started_at, ended_at)
                values ($1, $15, (select id from session), $16, $17, $9, $10)
                returning id
            ), called as (
                insert into model_calls (project_id, run_id, number, id, model, prompt_tokens, completion_tokens,
                                         cached_tokens, reasoning_tokens, estimated)
                select $1, ran.id, c.number::int, c.id, c.model, c.prompt, c.completion, c.cached, c.reasoning, c.estimated
                from ran
                cross join unnest($18::uuid[], $19::text[], $20::bigint[], $21::bigint[], $22::bigint[], $23::bigint[], $24::boolean[])
                    with ordinality as c (id, model, prompt, completion, cached, reasoning, estimated, number)
            ), told as (
                insert into untold (project_id, names, payloads, at)
                select $1, $25::text[], $26::text[], $27 from session where cardinality($25::text[]) > 0
            )
            select count(*) as "count!" from session"#,
            self.project,
            turn.session.uuid(),
            turn.continues,
            turn.title,
            turn.agent.1,
            turn.end_user,
            turn.metadata,
            opened,
            to_micros(turn.started_at),
            to_micros(turn.ended_at),
            &ids,
            &bodies as _,
            &interrupted,
            &times,
            turn.run.uuid(),
            turn.agent.0.uuid(),
            turn.status.as_str(),
            &call_ids,
            &models as _,
            &prompt,
            &completion,
            &cached,
            &reasoning,
            &estimated,
            &events.names as _,
            &events.payloads,
            events.at
        )
        .fetch_one(&self.pool)
        .await?;
        if sessions == 0 && !turn.messages.is_empty() {
            return Err(StoreError::NotFound);
        }
        if sessions > 0 && turn.tells {
            self.bell.ring_for_untold(self.world, self.project);
        }
        Ok(())
    }
}
