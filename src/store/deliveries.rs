//! Deliveries: events on their way to webhooks, and what became of each try.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::jobs::{LEASE, held};
use super::{Db, Lease, ProjectDb, ProjectTx, Result, SealedSecret, StoreError, World, to_micros};
use crate::ids::{Delivery, Id, Webhook};
use crate::webhook::Item;

/// What a courier must know of its webhook.
#[derive(Debug, Clone)]
pub struct Route {
    /// Where it is.
    pub url: String,
    /// The patterns of events that it listens to.
    pub events: Vec<String>,
    /// What signs.
    pub secret: SealedSecret,
    /// What signs as well, and until when.
    pub previous: Option<(SealedSecret, DateTime<Utc>)>,
    /// The number of the last event that was looked at.
    pub cursor: i64,
    /// Grows with each change.
    pub revision: i64,
    /// When the first failure since the last success was.
    pub failing_since: Option<DateTime<Utc>>,
    /// How many failures there were since.
    pub failures: i32,
    /// Until when all rests for them.
    pub resume_at: Option<DateTime<Utc>>,
}

/// A delivery to be made.
#[derive(Debug)]
pub struct NewDelivery {
    /// Its id.
    pub id: Id<Delivery>,
    /// The event's number.
    pub seq: i64,
    /// The event's name.
    pub event: String,
    /// What the event is about.
    pub resource: String,
    /// What is sent.
    pub body: String,
}

/// One try of a delivery, and what follows from it.
#[derive(Debug)]
pub struct NewAttempt {
    /// The delivery.
    pub id: Id<Delivery>,
    /// The how manieth try it was, from 1.
    pub number: i32,
    /// When.
    pub at: DateTime<Utc>,
    /// The receiver's status.
    pub status_code: Option<i32>,
    /// Why there was none.
    pub error: Option<String>,
    /// How long it took, in milliseconds.
    pub duration_ms: i32,
    /// The beginning of what the receiver said.
    pub response: Option<String>,
    /// `pending`, `delivered` or `failed`.
    pub status: &'static str,
    /// When it is tried next.
    pub next_at: Option<DateTime<Utc>>,
}

/// How a receiver stands after its last tries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Health {
    /// When the first failure since the last success was.
    pub failing_since: Option<DateTime<Utc>>,
    /// How many failures there were since.
    pub failures: i32,
    /// Until when all rests for them.
    pub resume_at: Option<DateTime<Utc>>,
}

/// Which deliveries of a webhook.
#[derive(Debug, Clone, Copy)]
pub struct DeliveryFilter<'a> {
    /// The webhook.
    pub webhook: Id<Webhook>,
    /// `pending`, `delivered` or `failed`.
    pub status: Option<&'a str>,
    /// Those before this one.
    pub before: Option<Id<Delivery>>,
    /// How many at most.
    pub limit: i64,
}

/// A delivery as its owner may see it.
#[derive(Debug, Clone)]
pub struct DeliveryRow {
    /// Its id.
    pub id: Id<Delivery>,
    /// The event's number.
    pub seq: i64,
    /// The event's name.
    pub event: String,
    /// `pending`, `delivered` or `failed`.
    pub status: String,
    /// How often it was tried.
    pub attempts: i32,
    /// When it is tried next.
    pub next_at: Option<DateTime<Utc>>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it was delivered or given up.
    pub ended_at: Option<DateTime<Utc>>,
}

/// One try as its owner may see it.
#[derive(Debug, Clone)]
pub struct AttemptRow {
    /// The delivery.
    pub delivery: Id<Delivery>,
    /// The how manieth try, from 1.
    pub number: i32,
    /// When.
    pub at: DateTime<Utc>,
    /// The receiver's status.
    pub status_code: Option<i32>,
    /// Why there was none.
    pub error: Option<String>,
    /// How long it took, in milliseconds.
    pub duration_ms: i32,
    /// The beginning of what the receiver said.
    pub response: Option<String>,
}

/// The tries that a delivery is shown with: the last ones.
const TRIES_SHOWN: i64 = 20;

impl ProjectDb {
    /// What a courier must know of an enabled webhook.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn route(&self, id: Id<Webhook>) -> Result<Route> {
        let row = sqlx::query!(
            "select url, events, sealed_with, sealed_secret, previous_sealed_with, previous_secret, previous_until,
                    cursor, revision, failing_since, failures, resume_at
            from webhooks where project_id = $1 and id = $2 and enabled",
            self.project,
            id.uuid()
        )
        .fetch_one(&self.pool)
        .await?;
        let previous = match (
            row.previous_sealed_with,
            row.previous_secret,
            row.previous_until,
        ) {
            (Some(sealed_with), Some(sealed), Some(until)) => Some((
                SealedSecret {
                    sealed_with,
                    sealed,
                },
                until,
            )),
            _ => None,
        };
        Ok(Route {
            url: row.url,
            events: row.events,
            secret: SealedSecret {
                sealed_with: row.sealed_with,
                sealed: row.sealed_secret,
            },
            previous,
            cursor: row.cursor,
            revision: row.revision,
            failing_since: row.failing_since,
            failures: row.failures,
            resume_at: row.resume_at,
        })
    }

    /// The deliveries of a webhook that are still to be made, in order, at most `limit`. Their bodies stay.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn undelivered(&self, webhook: Id<Webhook>, limit: i64) -> Result<Vec<Item>> {
        let rows = sqlx::query!(
            r#"select id, seq, resource, attempts, first_attempt_at, coalesce(next_at, created_at) as "next_at!"
            from deliveries
            where project_id = $1 and webhook_id = $2 and status = 'pending'
            order by seq
            limit $3"#,
            self.project,
            webhook.uuid(),
            limit
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| Item {
                id: row.id.into(),
                seq: row.seq,
                resource: row.resource,
                attempts: row.attempts,
                first_attempt_at: row.first_attempt_at,
                next_at: row.next_at,
                body: None,
            })
            .collect())
    }

    /// What some deliveries send; as many as are asked for.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn bodies(&self, ids: &[Id<Delivery>]) -> Result<Vec<(Id<Delivery>, String)>> {
        let ids: Vec<Uuid> = ids.iter().copied().map(Id::uuid).collect();
        let rows = sqlx::query!(
            "select id, body from deliveries where project_id = $1 and id = any($2)",
            self.project,
            &ids
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| (row.id.into(), row.body))
            .collect())
    }

    /// The number of a webhook's project's newest event, and the webhook's revision.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn news(&self, webhook: Id<Webhook>) -> Result<(i64, i64)> {
        let row = sqlx::query!(
            r#"select coalesce((select last from event_heads where project_id = $1), 0) as "last!", revision
            from webhooks where project_id = $1 and id = $2"#,
            self.project,
            webhook.uuid()
        )
        .fetch_one(&self.pool)
        .await?;
        Ok((row.last, row.revision))
    }

    /// Stores deliveries and moves the webhook's cursor past the events that were looked at for them, in one commit.
    /// Returns the webhook's revision.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`]; nothing is stored then.
    pub async fn add_deliveries(
        &self,
        lease: &Lease,
        new: &[NewDelivery],
        cursor: i64,
    ) -> Result<i64> {
        let (_, subject) = lease.job.columns();
        let ids: Vec<Uuid> = new.iter().map(|one| one.id.uuid()).collect();
        let seqs: Vec<i64> = new.iter().map(|one| one.seq).collect();
        let events: Vec<&str> = new.iter().map(|one| one.event.as_str()).collect();
        let resources: Vec<&str> = new.iter().map(|one| one.resource.as_str()).collect();
        let bodies: Vec<&str> = new.iter().map(|one| one.body.as_str()).collect();
        let revision = sqlx::query_scalar!(
            r#"with held as (
                update jobs set due_at = clock_timestamp() + make_interval(secs => $10)
                where project_id = $1 and kind = 'webhook' and subject = $2 and lease = $3
                returning project_id
            ), added as (
                insert into deliveries (project_id, id, webhook_id, seq, event, resource, body, status, next_at, created_at)
                select $1, n.id, $2, n.seq, n.event, n.resource, n.body, 'pending', clock_timestamp(), clock_timestamp()
                from held cross join unnest($4::uuid[], $5::bigint[], $6::text[], $7::text[], $8::text[])
                    as n (id, seq, event, resource, body)
            ), moved as (
                update webhooks set cursor = $9 from held where webhooks.project_id = $1 and webhooks.id = $2
                returning revision
            )
            select revision from moved"#,
            self.project,
            subject,
            lease.number(),
            &ids,
            &seqs,
            &events as _,
            &resources as _,
            &bodies as _,
            cursor,
            LEASE.as_secs_f64()
        )
        .fetch_optional(&self.pool)
        .await?;
        revision.ok_or(StoreError::LeaseLost)
    }

    /// Stores what became of some tries, and how the receiver stands after them, in one commit.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`]; nothing is stored then.
    pub async fn record_attempts(
        &self,
        lease: &Lease,
        tries: &[NewAttempt],
        health: Health,
    ) -> Result<()> {
        let (_, subject) = lease.job.columns();
        let ids: Vec<Uuid> = tries.iter().map(|one| one.id.uuid()).collect();
        let numbers: Vec<i32> = tries.iter().map(|one| one.number).collect();
        let times: Vec<DateTime<Utc>> = tries.iter().map(|one| to_micros(one.at)).collect();
        let codes: Vec<Option<i32>> = tries.iter().map(|one| one.status_code).collect();
        let errors: Vec<Option<&str>> = tries.iter().map(|one| one.error.as_deref()).collect();
        let durations: Vec<i32> = tries.iter().map(|one| one.duration_ms).collect();
        let responses: Vec<Option<&str>> =
            tries.iter().map(|one| one.response.as_deref()).collect();
        let statuses: Vec<&str> = tries.iter().map(|one| one.status).collect();
        let next: Vec<Option<DateTime<Utc>>> = tries.iter().map(|one| one.next_at).collect();
        let count = sqlx::query_scalar!(
            r#"with held as (
                update jobs set due_at = clock_timestamp() + make_interval(secs => $16)
                where project_id = $1 and kind = 'webhook' and subject = $2 and lease = $3
                returning project_id
            ), tried as (
                select t.*
                from held cross join unnest($4::uuid[], $5::int[], $6::timestamptz[], $7::int[], $8::text[], $9::int[],
                                            $10::text[], $11::text[], $12::timestamptz[])
                    as t (id, number, at, status_code, error, duration_ms, response, status, next_at)
            ), recorded as (
                insert into delivery_attempts (project_id, delivery_id, number, at, status_code, error, duration_ms, response)
                select $1, id, number, at, status_code, error, duration_ms, response from tried
            ), went as (
                update deliveries d
                set status = t.status, attempts = t.number, next_at = t.next_at,
                    first_attempt_at = coalesce(d.first_attempt_at, t.at),
                    ended_at = case when t.status = 'pending' then null else clock_timestamp() end
                from tried t
                where d.project_id = $1 and d.id = t.id
            ), stands as (
                update webhooks set failing_since = $13, failures = $14, resume_at = $15
                from held
                where webhooks.project_id = $1 and webhooks.id = $2
                  and (failing_since, failures, resume_at) is distinct from ($13, $14, $15)
            )
            select count(*) as "count!" from held"#,
            self.project,
            subject,
            lease.number(),
            &ids,
            &numbers,
            &times,
            &codes as _,
            &errors as _,
            &durations,
            &responses as _,
            &statuses as _,
            &next as _,
            health.failing_since.map(to_micros),
            health.failures,
            health.resume_at.map(to_micros),
            LEASE.as_secs_f64()
        )
        .fetch_one(&self.pool)
        .await?;
        held(count.unsigned_abs())
    }

    /// Deliveries of a webhook, newest first.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn deliveries(&self, which: DeliveryFilter<'_>) -> Result<Vec<DeliveryRow>> {
        Ok(sqlx::query_as!(
            DeliveryRow,
            "select id, seq, event, status, attempts, next_at, created_at, ended_at
            from deliveries
            where project_id = $1 and webhook_id = $2
              and ($3::text is null or status = $3)
              and ($4::uuid is null
                   or seq < (select seq from deliveries where project_id = $1 and webhook_id = $2 and id = $4))
            order by seq desc
            limit $5",
            self.project,
            which.webhook.uuid(),
            which.status,
            which.before.map(Id::uuid),
            which.limit
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// One delivery, and what it sends.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn delivery(
        &self,
        webhook: Id<Webhook>,
        id: Id<Delivery>,
    ) -> Result<(DeliveryRow, String)> {
        let row = sqlx::query!(
            "select id, seq, event, status, attempts, next_at, created_at, ended_at, body
            from deliveries
            where project_id = $1 and webhook_id = $2 and id = $3",
            self.project,
            webhook.uuid(),
            id.uuid()
        )
        .fetch_one(&self.pool)
        .await?;
        let delivery = DeliveryRow {
            id: row.id.into(),
            seq: row.seq,
            event: row.event,
            status: row.status,
            attempts: row.attempts,
            next_at: row.next_at,
            created_at: row.created_at,
            ended_at: row.ended_at,
        };
        Ok((delivery, row.body))
    }

    /// The last tries of some deliveries, in order.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn attempts(&self, deliveries: &[Id<Delivery>]) -> Result<Vec<AttemptRow>> {
        let ids: Vec<Uuid> = deliveries.iter().copied().map(Id::uuid).collect();
        Ok(sqlx::query_as!(
            AttemptRow,
            r#"select d.id as "delivery!", a.number, a.at, a.status_code, a.error, a.duration_ms, a.response
            from unnest($2::uuid[]) as d (id)
            cross join lateral (
                select * from delivery_attempts
                where project_id = $1 and delivery_id = d.id
                order by number desc
                limit $3
            ) a
            order by d.id, a.number"#,
            self.project,
            &ids,
            TRIES_SHOWN
        )
        .fetch_all(&self.pool)
        .await?)
    }
}

impl ProjectTx {
    /// Makes a delivery once more, and soon. One that had ended waits for no other, and none waits for it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn redeliver(&mut self, webhook: Id<Webhook>, id: Id<Delivery>) -> Result<()> {
        self.touch_courier(webhook).await?;
        let touched = sqlx::query!(
            "with wanted as (
                update deliveries
                set resource = case when status = 'pending' then resource else 'again ' || id end,
                    first_attempt_at = case when status = 'pending' then first_attempt_at end,
                    status = 'pending', next_at = clock_timestamp(), ended_at = null
                where project_id = $1 and webhook_id = $2 and id = $3
                returning webhook_id
            )
            update webhooks set revision = revision + 1, resume_at = null
            from wanted where webhooks.project_id = $1 and webhooks.id = wanted.webhook_id",
            self.db.project,
            webhook.uuid(),
            id.uuid()
        )
        .execute(self.open().await?)
        .await?;
        if touched.rows_affected() == 0 {
            Err(StoreError::NotFound)
        } else {
            Ok(())
        }
    }
}

/// Deliveries that one statement prunes.
const AT_ONCE: i64 = 2_000;

impl Db {
    /// Deletes some deliveries that ended before `oldest` and says how many; to be called until there are none.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn prune_deliveries(&self, world: World, oldest: DateTime<Utc>) -> Result<u64> {
        let pruned = sqlx::query!(
            "with old as (
                select project_id, id from deliveries
                where ended_at < $1 order by ended_at limit $2
                for update skip locked
            )
            delete from deliveries using old
            where deliveries.project_id = old.project_id and deliveries.id = old.id and deliveries.ended_at < $1",
            oldest,
            AT_ONCE
        )
        .execute(self.world(world))
        .await?;
        Ok(pruned.rows_affected())
    }
}
