//! Events: what happened to a project, numbered in the order of commits.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use uuid::Uuid;

use super::{Db, ProjectDb, ProjectTx, Result, Topic, World, to_micros};
use crate::event::Event;

/// An event as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    /// Its number in its project, from 1.
    pub seq: i64,
    /// Its name.
    pub name: String,
    /// Its payload, JSON text.
    pub payload: String,
}

/// Events that are read from the log at once.
const PAGE: i64 = 500;
/// And their bytes, but for one event that has more: those of a task show all of it.
const PAGE_BYTES: i64 = 1024 * 1024;

/// A page of the log.
#[derive(Debug)]
pub struct EventPage {
    /// The events, in order.
    pub rows: Vec<EventRow>,
    /// Whether there are no more for now.
    pub is_last: bool,
}

/// An event to those who listen to some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeardRow {
    /// Its number in its project.
    pub seq: i64,
    /// Its name.
    pub name: String,
    /// Its payload, if it is one of those.
    pub payload: Option<String>,
}

/// Which events of a project there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventRange {
    /// The number of the newest; 0 when there is none.
    pub last: i64,
    /// The highest number that was pruned; those after it are there.
    pub pruned: i64,
}

/// Events as the columns of a statement.
pub(super) struct EventColumns {
    pub(super) names: Vec<&'static str>,
    pub(super) payloads: Vec<String>,
    pub(super) at: DateTime<Utc>,
}

impl EventColumns {
    pub(super) fn new(events: Vec<Event>) -> Self {
        let at = to_micros(Utc::now());
        Self {
            names: events.iter().map(|event| event.name).collect(),
            payloads: events
                .into_iter()
                .map(|event| event.into_text(at).replace("\\u0000", "\\ufffd"))
                .collect(),
            at,
        }
    }

    pub(super) fn count(&self) -> i64 {
        i64::try_from(self.names.len()).unwrap_or(i64::MAX)
    }
}

impl ProjectDb {
    /// The next events after a number, in order: a page of [`PAGE`] events or [`PAGE_BYTES`], whichever is less.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn events_after(&self, after: i64) -> Result<EventPage> {
        // The length of a text is known without reading it.
        let rows = sqlx::query!(
            r#"select seq, name, payload, found as "found!"
            from (
                select seq, name, payload, count(*) over () as found,
                       sum(octet_length(payload)) over (order by seq) - octet_length(payload) as bytes_before
                from (select seq, name, payload from events where project_id = $1 and seq > $2 order by seq limit $3) page
            ) counted
            where bytes_before < $4
            order by seq"#,
            self.project,
            after,
            PAGE,
            PAGE_BYTES
        )
        .fetch_all(&self.pool)
        .await?;
        let found = rows.first().map_or(0, |row| row.found);
        let is_last = found < PAGE && usize::try_from(found).is_ok_and(|found| found == rows.len());
        let rows = rows
            .into_iter()
            .map(|row| EventRow {
                seq: row.seq,
                name: row.name,
                payload: row.payload,
            })
            .collect();
        Ok(EventPage { rows, is_last })
    }

    /// The events after a number, in order, at most `limit`; payloads of those alone whose names are like one of these.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn events_for(
        &self,
        likes: &[String],
        after: i64,
        limit: i64,
    ) -> Result<Vec<HeardRow>> {
        Ok(sqlx::query_as!(
            HeardRow,
            "select seq, name, case when name like any($4) then payload end as payload
            from events where project_id = $1 and seq > $2 order by seq limit $3",
            self.project,
            after,
            limit,
            likes
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Which events there are.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn event_range(&self) -> Result<EventRange> {
        let range = sqlx::query_as!(
            EventRange,
            "select last, pruned from event_heads where project_id = $1",
            self.project
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(range.unwrap_or(EventRange { last: 0, pruned: 0 }))
    }
}

/// Whose turn it is, in this process, to append to each project's log.
///
/// The head of a log is locked from the append to the commit, so that its numbers are in the order of the commits. Those who would wait
/// for it in Postgres wait here instead, where it costs less.
#[derive(Debug, Default)]
pub(super) struct Logs(Mutex<HashMap<Stream, Weak<Semaphore>>>);

/// How many of a process may be at a log: one that commits, and one that Postgres lets follow at once.
const AT_A_LOG: usize = 2;
/// How long a turn is waited for before one goes on without: longer than any queue that moves. A turn saves work, it protects nothing; and
/// someone who has one may be waiting in Postgres for a row that is held by someone who waits for one.
const PATIENCE: Duration = Duration::from_millis(100);

impl Logs {
    fn of(&self, stream: Stream) -> Arc<Semaphore> {
        let mut logs = self
            .0
            .lock()
            .expect("nothing panics while it holds the logs");
        if let Some(log) = logs.get(&stream).and_then(Weak::upgrade) {
            return log;
        }
        if logs.len() > 1024 && logs.len().is_power_of_two() {
            logs.retain(|_, log| log.strong_count() > 0);
        }
        let log = Arc::new(Semaphore::new(AT_A_LOG));
        logs.insert(stream, Arc::downgrade(&log));
        log
    }
}

impl ProjectDb {
    /// Waits for a turn to append to this project's log, but not for ever; the turn ends with what is returned. Whoever waits must have
    /// its connection: else those who have a turn would wait for connections, and those who have connections for a turn.
    pub(super) async fn turn_at_the_log(&self) -> Option<OwnedSemaphorePermit> {
        let stream = Stream {
            world: self.world,
            project: self.project,
        };
        let turn = self.logs.of(stream).acquire_owned();
        tokio::time::timeout(PATIENCE, turn).await.ok()?.ok()
    }
}

impl ProjectTx {
    /// Stores events. From here to the commit no other transaction of the project can.
    pub(super) async fn append(
        &self,
        connection: &mut PgConnection,
        events: &EventColumns,
    ) -> Result<()> {
        if events.names.is_empty() {
            return Ok(());
        }
        sqlx::query!(
            "with head as (
                insert into event_heads (project_id, last) values ($1, $2)
                on conflict (project_id) do update set last = event_heads.last + excluded.last
                returning last
            )
            insert into events (project_id, seq, name, payload, at)
            select $1, head.last - $2 + e.number, e.name, e.payload, $5
            from head cross join unnest($3::text[], $4::text[]) with ordinality as e (name, payload, number)",
            self.db.project,
            events.count(),
            &events.names as _,
            &events.payloads,
            events.at
        )
        .execute(connection)
        .await?;
        Ok(())
    }
}

/// Chat turns whose events go into the log in one commit.
const TOGETHER: i64 = 500;

impl ProjectDb {
    /// Puts the events that chat turns have left (`untold`) into the log, at most [`TOGETHER`] turns'; says whether there may be more.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub(super) async fn tell_untold(&self) -> Result<bool> {
        let mut tx = self.pool.begin().await?;
        let turn = self.turn_at_the_log().await;
        // The head first and by itself: a turn that another process is moving is in the log, or not there, once it is ours. Of two turns of a
        // session whoever sees the later sees the earlier.
        sqlx::query!(
            "insert into event_heads (project_id, last) values ($1, 0)
            on conflict (project_id) do update set last = event_heads.last",
            self.project
        )
        .execute(&mut *tx)
        .await?;
        let told = sqlx::query_scalar!(
            r#"with gone as (
                delete from untold
                where project_id = $1 and id in (select id from untold where project_id = $1 order by id limit $2)
                returning id, names, payloads, at
            ), told as (
                select row_number() over (order by g.id, e.number) as number, e.name, e.payload, g.at
                from gone g cross join unnest(g.names, g.payloads) with ordinality as e (name, payload, number)
            ), head as (
                update event_heads set last = last + (select count(*) from told)
                where project_id = $1
                returning last - (select count(*) from told) as before
            ), written as (
                insert into events (project_id, seq, name, payload, at)
                select $1, head.before + told.number, told.name, told.payload, told.at
                from head cross join told
            )
            select count(*) as "count!" from gone"#,
            self.project,
            TOGETHER
        )
        .fetch_one(&mut *tx)
        .await?;
        tx.commit().await?;
        drop(turn);
        if told > 0 {
            self.bell.ring(Topic::Events(self.world, self.project));
        }
        Ok(told >= TOGETHER)
    }
}

impl Db {
    /// Puts into the log what a process has left untold that is gone by now.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn tell_left_untold(&self, world: World) -> Result<()> {
        let left = sqlx::query_scalar!(
            "select distinct project_id from untold where at < clock_timestamp() - interval '2 seconds' order by project_id limit 1000"
        )
        .fetch_all(self.world(world))
        .await?;
        for project in left {
            while self.project(project, world).tell_untold().await? {}
        }
        Ok(())
    }
}

/// Events that one statement prunes.
const AT_ONCE: i64 = 5_000;

impl Db {
    /// Deletes some events from before `oldest` and says how many; to be called until there are none.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn prune_events(&self, world: World, oldest: DateTime<Utc>) -> Result<u64> {
        let pruned = sqlx::query!(
            "with old as (
                select project_id, seq from events where at < $1 order by at limit $2
            ), gone as (
                delete from events using old
                where events.project_id = old.project_id and events.seq = old.seq
                returning events.project_id, events.seq
            ), told as (
                update event_heads set pruned = greatest(pruned, highest)
                from (select project_id, max(seq) as highest from gone group by project_id) g
                where event_heads.project_id = g.project_id
            )
            select count(*) from gone",
            oldest,
            AT_ONCE
        )
        .fetch_one(self.world(world))
        .await?;
        Ok(pruned.count.unwrap_or_default().unsigned_abs())
    }
}

/// A project's events of a world, for whoever follows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stream {
    /// The world.
    pub world: World,
    /// The project.
    pub project: Uuid,
}
