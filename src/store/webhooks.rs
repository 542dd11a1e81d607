//! Webhooks: who is told of a project's events, and their couriers' jobs.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::jobs::Lane;
use super::{Db, Job, Lease, ProjectDb, ProjectTx, Result, StoreError, World};
use crate::ids::{Id, Webhook};

/// A webhook as its owner may see it.
#[derive(Debug, Clone)]
pub struct WebhookRow {
    /// Its id.
    pub id: Id<Webhook>,
    /// Where it is.
    pub url: String,
    /// The patterns of events that it listens to.
    pub events: Vec<String>,
    /// Whether it is told of events.
    pub enabled: bool,
    /// Why it is not, if that was not its owner's will.
    pub disabled_reason: Option<String>,
    /// Since when nothing has been delivered, if the last try failed.
    pub failing_since: Option<DateTime<Utc>>,
    /// Until when the secret before signs as well.
    pub previous_until: Option<DateTime<Utc>>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it was changed last.
    pub updated_at: DateTime<Utc>,
}

/// A secret, sealed.
#[derive(Debug, Clone)]
pub struct SealedSecret {
    /// Which master key sealed it.
    pub sealed_with: String,
    /// The sealed secret.
    pub sealed: Vec<u8>,
}

/// A webhook to be made.
#[derive(Debug)]
pub struct NewWebhook<'a> {
    /// Its id.
    pub id: Id<Webhook>,
    /// Where it is.
    pub url: &'a str,
    /// The patterns of events that it listens to.
    pub events: &'a [String],
    /// What signs its deliveries.
    pub secret: &'a SealedSecret,
}

impl ProjectDb {
    /// The webhooks after `after`, oldest first, at most `limit`.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn webhooks(
        &self,
        after: Option<Id<Webhook>>,
        limit: i64,
    ) -> Result<Vec<WebhookRow>> {
        Ok(sqlx::query_as!(
            WebhookRow,
            "select id, url, events, enabled, disabled_reason, failing_since, previous_until, created_at, updated_at
            from webhooks
            where project_id = $1 and ($2::uuid is null or id > $2)
            order by id
            limit $3",
            self.project,
            after.map(Id::uuid),
            limit
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// One webhook.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn webhook(&self, id: Id<Webhook>) -> Result<WebhookRow> {
        Ok(sqlx::query_as!(
            WebhookRow,
            "select id, url, events, enabled, disabled_reason, failing_since, previous_until, created_at, updated_at
            from webhooks where project_id = $1 and id = $2",
            self.project,
            id.uuid()
        )
        .fetch_one(&self.pool)
        .await?)
    }
}

impl ProjectTx {
    /// How many webhooks there are; none is made by others until the commit.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn count_webhooks(&mut self) -> Result<i64> {
        self.lock_settings().await?;
        let count = sqlx::query_scalar!(
            r#"select count(*) as "count!" from webhooks where project_id = $1"#,
            self.db.project
        )
        .fetch_one(self.open().await?)
        .await?;
        Ok(count)
    }

    /// Makes a webhook that is told of what happens from now on.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn create_webhook(&mut self, new: &NewWebhook<'_>) -> Result<WebhookRow> {
        self.changes = true;
        let row = sqlx::query_as!(
            WebhookRow,
            "insert into webhooks (project_id, id, url, events, sealed_with, sealed_secret, cursor, created_at, updated_at)
            values ($1, $2, $3, $4, $5, $6, coalesce((select last from event_heads where project_id = $1), 0),
                    clock_timestamp(), clock_timestamp())
            returning id, url, events, enabled, disabled_reason, failing_since, previous_until, created_at, updated_at",
            self.db.project,
            new.id.uuid(),
            new.url,
            new.events,
            new.secret.sealed_with,
            new.secret.sealed
        )
        .fetch_one(self.open().await?)
        .await?;
        self.owe_courier(new.id).await?;
        Ok(row)
    }

    async fn owe_courier(&mut self, id: Id<Webhook>) -> Result<()> {
        self.enqueue(Job::Webhook(id), 1.0, std::time::Duration::ZERO)
            .await
    }

    /// Changes where a webhook is and what it listens to; `None` leaves a value as it is. Its courier, if one is at
    /// work, goes on with what is new.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn update_webhook(
        &mut self,
        id: Id<Webhook>,
        url: Option<&str>,
        events: Option<&[String]>,
    ) -> Result<WebhookRow> {
        self.changes = true;
        self.touch_courier(id).await?;
        Ok(sqlx::query_as!(
            WebhookRow,
            "update webhooks
            set url = coalesce($3, url), events = coalesce($4, events), revision = revision + 1,
                failures = 0, resume_at = null, updated_at = clock_timestamp()
            where project_id = $1 and id = $2
            returning id, url, events, enabled, disabled_reason, failing_since, previous_until, created_at, updated_at",
            self.db.project,
            id.uuid(),
            url,
            events as _
        )
        .fetch_one(self.open().await?)
        .await?)
    }

    /// A courier that rests looks at its webhook, one at work finds the new revision that follows in this transaction:
    /// this row is locked first by both.
    pub(super) async fn touch_courier(&mut self, id: Id<Webhook>) -> Result<()> {
        sqlx::query!(
            "update jobs
            set ready = holder is null, quiet = false,
                due_at = case when holder is null then clock_timestamp() else due_at end
            where project_id = $1 and kind = 'webhook' and subject = $2",
            self.db.project,
            id.uuid()
        )
        .execute(self.open().await?)
        .await?;
        self.rings(Lane::Couriers);
        // One at work listens for events.
        self.tells = true;
        Ok(())
    }

    /// Tells a webhook of what happens from now on, if it was disabled.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn enable_webhook(&mut self, id: Id<Webhook>) -> Result<()> {
        let enabled = sqlx::query!(
            "update webhooks
            set enabled = true, disabled_reason = null, failing_since = null, failures = 0, resume_at = null,
                revision = revision + 1, updated_at = clock_timestamp(),
                cursor = coalesce((select last from event_heads where project_id = $1), 0)
            where project_id = $1 and id = $2 and not enabled",
            self.db.project,
            id.uuid()
        )
        .execute(self.open().await?)
        .await?;
        if enabled.rows_affected() > 0 {
            self.changes = true;
            self.owe_courier(id).await?;
        }
        Ok(())
    }

    /// Tells a webhook of nothing more; what was on its way is given up. Returns where it is, if it was enabled.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn disable_webhook(
        &mut self,
        id: Id<Webhook>,
        reason: Option<&str>,
    ) -> Result<Option<String>> {
        self.changes = true;
        self.call_off(Job::Webhook(id)).await?;
        Ok(sqlx::query_scalar!(
            "with disabled as (
                update webhooks
                set enabled = false, disabled_reason = $3, revision = revision + 1, updated_at = clock_timestamp()
                where project_id = $1 and id = $2 and enabled
                returning url
            ), given_up as (
                update deliveries set status = 'failed', next_at = null, ended_at = clock_timestamp()
                from disabled
                where deliveries.project_id = $1 and deliveries.webhook_id = $2 and deliveries.status = 'pending'
            )
            select url from disabled",
            self.db.project,
            id.uuid(),
            reason
        )
        .fetch_optional(self.open().await?)
        .await?)
    }

    /// Puts a new secret in place; the one before signs as well until `overlap` is over.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn rotate_secret(
        &mut self,
        id: Id<Webhook>,
        secret: &SealedSecret,
        overlap: std::time::Duration,
    ) -> Result<WebhookRow> {
        self.touch_courier(id).await?;
        Ok(sqlx::query_as!(
            WebhookRow,
            "update webhooks
            set previous_sealed_with = sealed_with, previous_secret = sealed_secret,
                previous_until = clock_timestamp() + make_interval(secs => $5::double precision),
                sealed_with = $3, sealed_secret = $4, revision = revision + 1, updated_at = clock_timestamp()
            where project_id = $1 and id = $2
            returning id, url, events, enabled, disabled_reason, failing_since, previous_until, created_at, updated_at",
            self.db.project,
            id.uuid(),
            secret.sealed_with,
            secret.sealed,
            overlap.as_secs_f64()
        )
        .fetch_one(self.open().await?)
        .await?)
    }

    /// Removes a webhook and its deliveries.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn delete_webhook(&mut self, id: Id<Webhook>) -> Result<()> {
        self.changes = true;
        self.call_off(Job::Webhook(id)).await?;
        let deleted = sqlx::query!(
            "delete from webhooks where project_id = $1 and id = $2",
            self.db.project,
            id.uuid()
        )
        .execute(self.open().await?)
        .await?;
        if deleted.rows_affected() == 0 {
            Err(StoreError::NotFound)
        } else {
            Ok(())
        }
    }

    /// A courier rests, until it is woken or `until` has come; a quiet one is woken by no event. Returns the webhook's
    /// revision: if it is not the one that the courier knows, it must not commit this.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`].
    pub async fn rest_courier(
        &mut self,
        lease: &Lease,
        until: Option<DateTime<Utc>>,
        quiet: bool,
    ) -> Result<i64> {
        let (kind, subject) = lease.job.columns();
        let done = sqlx::query!(
            "update jobs
            set ready = false, due_at = coalesce($5::timestamptz, 'infinity'), quiet = $6, holder = null, lease = nextval('leases')
            where project_id = $1 and kind = $2 and subject = $3 and lease = $4",
            self.db.project,
            kind,
            subject,
            lease.number(),
            until,
            quiet
        )
        .execute(self.open().await?)
        .await?;
        super::jobs::held(done.rows_affected())?;
        self.rings(Lane::Couriers);
        Ok(sqlx::query_scalar!(
            "select revision from webhooks where project_id = $1 and id = $2",
            self.db.project,
            subject
        )
        .fetch_one(self.open().await?)
        .await?)
    }
}

impl ProjectDb {
    /// Makes a courier ready that has gone to rest while events were told: to be asked after each rest.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn wake_if_behind(&self, id: Id<Webhook>) -> Result<()> {
        let woken = sqlx::query!(
            "update jobs set ready = true, due_at = clock_timestamp()
            from webhooks w join event_heads h on h.project_id = w.project_id
            where jobs.project_id = $1 and jobs.kind = 'webhook' and jobs.subject = $2
              and not jobs.ready and jobs.holder is null and not jobs.quiet
              and w.project_id = $1 and w.id = $2 and h.last > w.cursor",
            self.project,
            id.uuid()
        )
        .execute(&self.pool)
        .await?;
        if woken.rows_affected() > 0 {
            self.bell.ring(Lane::Couriers.topic(self.world));
        }
        Ok(())
    }
}

impl Db {
    /// Makes the resting couriers of these projects ready. Costs nothing for projects that are known to have no
    /// webhooks.
    pub(super) async fn ready_couriers_of(
        &self,
        world: World,
        mut projects: Vec<Uuid>,
    ) -> Result<()> {
        let unknown: Vec<Uuid> = projects
            .iter()
            .copied()
            .filter(|project| self.warm.has_webhooks(*project, world).is_none())
            .collect();
        if !unknown.is_empty() {
            let generation = self.warm.generation();
            let having = sqlx::query_scalar!(
                "select distinct project_id from webhooks where project_id = any($1) and enabled",
                &unknown
            )
            .fetch_all(self.world(world))
            .await?;
            projects.retain(|project| !unknown.contains(project) || having.contains(project));
            for project in unknown {
                let has_some = having.contains(&project);
                self.warm
                    .keep_has_webhooks(generation, project, world, has_some);
            }
        }
        projects.retain(|project| self.warm.has_webhooks(*project, world) != Some(false));
        if projects.is_empty() {
            return Ok(());
        }
        let woken = sqlx::query!(
            "update jobs set ready = true, due_at = clock_timestamp()
            where project_id = any($1) and kind = 'webhook' and not ready and holder is null and not quiet",
            &projects
        )
        .execute(self.world(world))
        .await?;
        if woken.rows_affected() > 0 {
            self.bell.ring(Lane::Couriers.topic(world));
        }
        Ok(())
    }

    /// Makes ready the resting couriers that are behind the event log: the net under wake-ups, which end with the
    /// process that owed them.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn ready_couriers_behind(&self, world: World) -> Result<()> {
        let woken = sqlx::query!(
            "update jobs set ready = true, due_at = clock_timestamp()
            from webhooks w join event_heads h on h.project_id = w.project_id
            where jobs.lane = 1 and not jobs.ready and jobs.due_at > clock_timestamp()
              and jobs.kind = 'webhook' and jobs.holder is null and not jobs.quiet
              and w.project_id = jobs.project_id and w.id = jobs.subject and h.last > w.cursor",
        )
        .execute(self.world(world))
        .await?;
        if woken.rows_affected() > 0 {
            self.bell.ring(Lane::Couriers.topic(world));
        }
        Ok(())
    }
}
