//! A courier: carries the events of a project to one webhook, in order and at least once (contract 2.10).
//!
//! It reads the event log after the webhook's cursor, stores what is to be delivered, sends it, and records what came of
//! that; each of these is fenced by its lease, so there is one courier for a webhook however many processes there are. What
//! it knows of the queue is what is stored: when a courier dies, the next repeats what was out, and nothing else.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use chrono::{DateTime, Utc};
use reqwest::header::{HeaderMap, HeaderValue};
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::post::Answer;
use super::{Held, Result, WorkError};
use crate::event::Event;
use crate::ids::{Id, Webhook};
use crate::store::{
    Health, NewAttempt, NewDelivery, ProjectDb, Route, SealedSecret, StoreError, Topic,
};
use crate::webhook::{self, Item, Queue, Signer};

/// Requests that are out at once, at most and at first: it is one more with each success and half with each failure, so
/// that many receivers that are dead do not take the process' sockets.
const AT_ONCE: usize = 16;
const AT_FIRST: usize = 4;
/// Deliveries of one webhook that wait. Beyond it events wait in the log.
const BACKLOG: usize = 10_000;
/// Deliveries that are ready to go out. Beyond it the log is not read on: a receiver that is slow or dead costs no more.
const AHEAD: usize = 512;
/// Events that are read from the log at once.
const PAGE: i64 = 500;
/// Events that may be looked at in vain before that is written down.
const VAIN: i64 = 2_000;
/// Events of so long a time are read together.
const READ: Duration = Duration::from_millis(5);
/// Answers of so long a time are recorded together.
const GATHER: Duration = Duration::from_millis(2);
/// How long a courier stays when there is nothing to do: longer than other processes take to learn of a new webhook.
const LINGER: Duration = Duration::from_secs(2);
/// The net under wake-ups.
const LOOK: Duration = Duration::from_secs(5);
/// How long requests that are out may take when the server stops.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// Bodies of so many bytes are kept between storing and sending; others are read again.
const BODIES: usize = 1024 * 1024;
/// How long a webhook rests whose secret cannot be opened.
const SEALED: Duration = Duration::from_mins(1);

/// Carries a webhook's deliveries until there is nothing more to do for a while.
pub(super) async fn carry(held: &Held, id: Id<Webhook>) -> Result<()> {
    // Listens before it looks.
    let db = &held.lease.db;
    let mut woken = held.app.db.wait(Topic::Events(db.world(), db.project()));
    match Courier::load(held, id).await? {
        Some(mut courier) => courier.work(&mut woken).await,
        None => Ok(()),
    }
}

/// What signs a webhook's deliveries.
#[derive(Debug)]
struct Signers {
    current: Signer,
    previous: Option<(Signer, DateTime<Utc>)>,
}

impl Signers {
    /// The headers of the Standard Webhooks.
    fn headers(&self, id: &str, at: DateTime<Utc>, body: &str) -> Option<HeaderMap> {
        let stamp = at.timestamp();
        let mut signatures = self.current.sign(id, stamp, body);
        if let Some((previous, until)) = &self.previous
            && at < *until
        {
            signatures = format!("{signatures} {}", previous.sign(id, stamp, body));
        }
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("webhook-id", id),
            ("webhook-timestamp", &stamp.to_string()),
            ("webhook-signature", &signatures),
        ] {
            headers.insert(name, HeaderValue::from_str(value).ok()?);
        }
        Some(headers)
    }
}

/// A request that is back.
#[derive(Debug)]
struct Landed {
    item: Item,
    at: DateTime<Utc>,
    answer: Answer,
}

struct Courier<'a> {
    held: &'a Held,
    id: Id<Webhook>,
    route: Route,
    /// What it listens to, for the database.
    likes: Vec<String>,
    signers: Arc<Signers>,
    queue: Queue,
    /// The events that were looked at; those of no interest are written down now and then.
    seen: i64,
    /// Bytes of the bodies in the queue.
    bodies: usize,
    flights: JoinSet<Landed>,
    health: Health,
    /// Requests that may be out at once.
    allowed: usize,
    /// When to read the log.
    read_at: Option<Instant>,
    read_last: Instant,
    /// Whether there may be events that were left for later.
    behind: bool,
    /// Whether the webhook has changed: when nothing is out any more, all is loaded anew.
    stale: bool,
    /// Since when there is nothing to do.
    idle_since: Instant,
}

/// What comes while a courier waits.
enum Heard {
    Landed(std::result::Result<Landed, tokio::task::JoinError>),
    Woken(std::result::Result<(), tokio::sync::watch::error::RecvError>),
    Time,
    /// The job is another's.
    Lost,
    /// The server stops.
    Stopping,
}

/// What a courier does next.
enum Next {
    Wait(Option<Instant>),
    Rest(Option<DateTime<Utc>>, bool),
}

impl<'a> Courier<'a> {
    /// Reads what is stored; `None` when there is no such webhook to be told of anything.
    async fn load(held: &'a Held, id: Id<Webhook>) -> Result<Option<Self>> {
        let db = &held.lease.db;
        let route = match db.route(id).await {
            Err(StoreError::NotFound) => {
                let mut tx = db.begin();
                tx.complete(&held.lease).await?;
                tx.commit().await?;
                return Ok(None);
            }
            route => route?,
        };
        let Some(signers) = signers(held, id, &route) else {
            tracing::error!(webhook = %id, "the secret of a webhook was sealed under another master key: it is told of nothing");
            held.put_off(SEALED).await?;
            return Ok(None);
        };
        let mut queue = Queue::default();
        let most = i64::try_from(BACKLOG).unwrap_or(i64::MAX);
        for item in db.undelivered(id, most).await? {
            queue.push(item);
        }
        Ok(Some(Self {
            held,
            id,
            signers: Arc::new(signers),
            queue,
            seen: route.cursor,
            bodies: 0,
            flights: JoinSet::new(),
            health: Health {
                failing_since: route.failing_since,
                failures: route.failures,
                resume_at: route.resume_at,
            },
            allowed: if route.failures > 0 { 1 } else { AT_FIRST },
            read_at: Some(Instant::now()),
            read_last: Instant::now(),
            behind: false,
            stale: false,
            idle_since: Instant::now(),
            likes: route
                .events
                .iter()
                .map(|one| webhook::as_like(one))
                .collect(),
            route,
        }))
    }

    fn db(&self) -> &'a ProjectDb {
        &self.held.lease.db
    }

    async fn work(&mut self, woken: &mut watch::Receiver<()>) -> Result<()> {
        loop {
            if self.stale && self.flights.is_empty() {
                match Self::load(self.held, self.id).await? {
                    Some(anew) => *self = anew,
                    None => return Ok(()),
                }
            }
            if self.read_at.is_some_and(|at| at <= Instant::now()) {
                self.read_on().await?;
            }
            self.launch().await?;
            let wait = match self.next() {
                Next::Rest(until, quiet) => {
                    if self.rest(until, quiet).await? {
                        return Ok(());
                    }
                    continue;
                }
                Next::Wait(until) => until,
            };
            let look = self.read_last + LOOK;
            let wait = wait.map_or(look, |until| until.min(look));
            let held = self.held;
            let heard = held.pulse.away(async {
                tokio::select! {
                    Some(landed) = self.flights.join_next() => Heard::Landed(landed),
                    changed = woken.changed() => Heard::Woken(changed),
                    () = tokio::time::sleep_until(wait) => Heard::Time,
                    () = held.lost.cancelled() => Heard::Lost,
                    () = held.app.stopping.cancelled() => Heard::Stopping,
                }
            });
            match heard.await {
                Heard::Landed(landed) => self.land(landed).await?,
                Heard::Woken(changed) => {
                    changed.map_err(|error| WorkError::Defect(error.into()))?;
                    self.read_at.get_or_insert(self.read_last + READ);
                }
                Heard::Time if look <= Instant::now() => {
                    self.read_at.get_or_insert(look);
                }
                Heard::Time => {}
                Heard::Lost => return Err(WorkError::LeaseLost),
                Heard::Stopping => return self.stop().await,
            }
        }
    }

    /// Whether to wait for something, and until when, or to rest.
    fn next(&self) -> Next {
        let now = Utc::now();
        if !self.flights.is_empty() {
            let due = self
                .queue
                .next_at()
                .map(|due| due.max(self.health.resume_at.unwrap_or(due)));
            let may_go = !self.stale && self.flights.len() < self.allowed;
            let due = due.filter(|_| may_go).map(|due| instant(due, now));
            return Next::Wait([due, self.read_at].into_iter().flatten().min());
        }
        if self.stale {
            return Next::Wait(Some(Instant::now()));
        }
        if let Some(resume_at) = self.health.resume_at.filter(|at| *at > now) {
            return Next::Rest(Some(resume_at), true);
        }
        let due = self.queue.next_at();
        if self.queue.len() >= BACKLOG {
            return match due {
                Some(due) if due > now => Next::Rest(Some(due), true),
                _ => Next::Wait(Some(Instant::now())),
            };
        }
        let end = self.idle_since + LINGER;
        if end <= Instant::now() && self.read_at.is_none() {
            return Next::Rest(due, false);
        }
        let due = due.map(|due| instant(due, now));
        let soonest = [due, self.read_at].into_iter().flatten().min();
        Next::Wait(Some(soonest.map_or(end, |soonest| soonest.min(end))))
    }

    /// Looks at the next events of the log, and stores what is to be delivered.
    async fn read_on(&mut self) -> Result<()> {
        self.read_at = None;
        self.read_last = Instant::now();
        self.behind = self.queue.len() >= BACKLOG || self.queue.ready() >= AHEAD;
        if self.behind {
            return Ok(());
        }
        let rows = self.db().events_for(&self.likes, self.seen, PAGE).await?;
        let Some(last) = rows.last().map(|row| row.seq) else {
            return self.look().await;
        };
        if rows.first().is_some_and(|row| row.seq > self.seen + 1) {
            tracing::warn!(webhook = %self.id, "the event log was pruned before a webhook was told of all");
        }
        if i64::try_from(rows.len()).is_ok_and(|count| count == PAGE) {
            self.read_at = Some(Instant::now());
        }
        let new: Vec<NewDelivery> = rows
            .into_iter()
            .filter_map(|row| Some(delivery(row.seq, row.name, &row.payload?)))
            .collect();
        self.seen = last;
        if !new.is_empty() || last - self.route.cursor > VAIN {
            self.store(new).await?;
        }
        Ok(())
    }

    /// There were no events: the webhook may have changed, or the log does not go back so far.
    async fn look(&mut self) -> Result<()> {
        let (last, revision) = self.db().news(self.id).await?;
        self.stale |= revision != self.route.revision;
        if last > self.seen {
            let rows = self.db().events_for(&[], self.seen, 1).await?;
            if rows.is_empty() {
                tracing::warn!(webhook = %self.id, "the event log was pruned before a webhook was told of all");
                self.seen = last;
                self.store(Vec::new()).await?;
            } else {
                self.read_at = Some(Instant::now());
            }
        }
        Ok(())
    }

    /// Stores deliveries, and how far the log was looked at.
    async fn store(&mut self, new: Vec<NewDelivery>) -> Result<()> {
        let lease = &self.held.lease;
        let revision = self.db().add_deliveries(lease, &new, self.seen).await?;
        self.route.cursor = self.seen;
        self.stale |= revision != self.route.revision;
        let now = Utc::now();
        for one in new {
            let fits = self.bodies + one.body.len() <= BODIES;
            if fits {
                self.bodies += one.body.len();
            }
            self.queue.push(Item {
                id: one.id,
                seq: one.seq,
                resource: one.resource,
                attempts: 0,
                first_attempt_at: None,
                next_at: now,
                body: fits.then_some(one.body),
            });
        }
        Ok(())
    }

    /// Sends what may go out now.
    async fn launch(&mut self) -> Result<()> {
        let now = Utc::now();
        if self.stale || self.health.resume_at.is_some_and(|at| at > now) {
            return Ok(());
        }
        let mut ready = Vec::new();
        while self.flights.len() + ready.len() < self.allowed
            && let Some(item) = self.queue.take(now)
        {
            ready.push(item);
        }
        if ready.is_empty() {
            return Ok(());
        }
        self.fetch_bodies(&mut ready).await?;
        for item in ready {
            self.send(item)?;
        }
        Ok(())
    }

    async fn fetch_bodies(&mut self, items: &mut [Item]) -> Result<()> {
        let mut lacking = Vec::new();
        for item in items.iter() {
            match &item.body {
                Some(body) => self.bodies -= body.len(),
                None => lacking.push(item.id),
            }
        }
        if lacking.is_empty() {
            return Ok(());
        }
        for (id, body) in self.db().bodies(&lacking).await? {
            if let Some(item) = items.iter_mut().find(|item| item.id == id) {
                item.body = Some(body);
            }
        }
        Ok(())
    }

    fn send(&mut self, mut item: Item) -> Result<()> {
        // Deliveries go only with their webhook, and then the job is gone too.
        let body = item.body.take().ok_or(WorkError::LeaseLost)?;
        let (poster, url) = (self.held.app.poster.clone(), self.route.url.clone());
        let at = Utc::now();
        let headers = self.signers.headers(&item.id.to_string(), at, &body);
        let headers = headers.context("a delivery cannot be signed");
        let headers = headers.map_err(WorkError::Defect)?;
        self.flights.spawn(async move {
            let answer = poster.post(&url, headers, body).await;
            Landed { item, at, answer }
        });
        Ok(())
    }

    /// Records a request that is back, with those that come back right after it.
    async fn land(
        &mut self,
        first: std::result::Result<Landed, tokio::task::JoinError>,
    ) -> Result<()> {
        let mut landed = vec![first.map_err(|error| WorkError::Defect(error.into()))?];
        let end = Instant::now() + GATHER;
        while let Ok(Some(next)) = tokio::time::timeout_at(end, self.flights.join_next()).await {
            landed.push(next.map_err(|error| WorkError::Defect(error.into()))?);
        }
        self.record(&landed).await?;
        self.idle_since = Instant::now();
        if self.behind {
            self.read_at.get_or_insert(self.idle_since);
        }
        Ok(())
    }

    async fn record(&mut self, landed: &[Landed]) -> Result<()> {
        let mut health = self.health;
        let tries: Vec<NewAttempt> = landed
            .iter()
            .map(|one| self.judge(one, &mut health))
            .collect();
        let lease = &self.held.lease;
        self.db().record_attempts(lease, &tries, health).await?;
        self.health = health;
        for (one, tried) in landed.iter().zip(&tries) {
            self.allowed = if one.answer.error.is_none() {
                (self.allowed + 1).min(AT_ONCE)
            } else {
                (self.allowed / 2).max(1)
            };
            match tried.next_at {
                Some(next_at) => self.queue.again(&one.item.resource, one.at, next_at),
                None => self.queue.done(&one.item.resource),
            }
        }
        if landed.iter().any(|one| one.answer.status_code == Some(410)) {
            return self
                .disable("It answered 410 Gone: it wants to be told of nothing more.")
                .await;
        }
        let patience = self.held.app.config.webhook_patience();
        let failing = health.failing_since.map(|since| Utc::now() - since);
        if failing.is_some_and(|failing| failing.to_std().is_ok_and(|time| time >= patience)) {
            let hours = patience.as_secs_f64() / 3600.0;
            return self
                .disable(&format!("Every delivery has failed for {hours} hours."))
                .await;
        }
        Ok(())
    }

    /// What follows from an answer.
    fn judge(&self, landed: &Landed, health: &mut Health) -> NewAttempt {
        let (item, answer) = (&landed.item, &landed.answer);
        let config = &self.held.app.config;
        let first_pause = Duration::from_millis(config.webhook_pause_ms);
        let number = item.attempts + 1;
        let now = Utc::now();
        let (status, next_at) = if answer.error.is_none() {
            *health = Health::default();
            ("delivered", None)
        } else {
            health.failures += 1;
            health.failing_since.get_or_insert(landed.at);
            let rest = webhook::rest(first_pause, health.failures);
            health.resume_at = (!rest.is_zero()).then(|| now + rest);
            let end = item.first_attempt_at.unwrap_or(landed.at) + config.webhook_patience();
            let pause = webhook::backoff(first_pause, number, rand::random());
            if now >= end || answer.status_code == Some(410) {
                ("failed", None)
            } else {
                ("pending", Some((now + pause).min(end)))
            }
        };
        NewAttempt {
            id: item.id,
            number,
            at: landed.at,
            status_code: answer.status_code.map(i32::from),
            error: answer.error.clone(),
            duration_ms: i32::try_from(answer.took.as_millis()).unwrap_or(i32::MAX),
            response: answer.response.clone(),
            status,
            next_at,
        }
    }

    /// Tells the webhook of nothing more, and the project that it is so.
    async fn disable(&mut self, reason: &str) -> Result<()> {
        let mut tx = self.db().begin();
        tx.extend(&self.held.lease).await?;
        if let Some(url) = tx.disable_webhook(self.id, Some(reason)).await? {
            let told = json!({"webhookId": self.id, "url": url, "reason": reason});
            tx.emit(Event::new("webhook:disabled", told));
        }
        tx.commit().await?;
        // The job is gone.
        Err(WorkError::LeaseLost)
    }

    /// Goes to rest, unless the webhook has changed in the meantime.
    async fn rest(&mut self, until: Option<DateTime<Utc>>, quiet: bool) -> Result<bool> {
        if self.route.cursor < self.seen {
            self.store(Vec::new()).await?;
        }
        let mut tx = self.db().begin();
        let revision = tx.rest_courier(&self.held.lease, until, quiet).await?;
        if revision != self.route.revision {
            self.stale = true;
            return Ok(false);
        }
        tx.commit().await?;
        // Events that were told before this commit have woken nobody.
        if !quiet {
            self.db().wake_if_behind(self.id).await?;
        }
        Ok(true)
    }

    /// Records what comes back soon, and leaves the rest to another process.
    async fn stop(&mut self) -> Result<()> {
        let end = Instant::now() + LAST_ANSWERS;
        while let Ok(Some(landed)) = tokio::time::timeout_at(end, self.flights.join_next()).await {
            self.land(landed).await?;
        }
        self.db().hand_over(&self.held.lease, None).await?;
        Ok(())
    }
}

fn instant(at: DateTime<Utc>, now: DateTime<Utc>) -> Instant {
    Instant::now() + (at - now).to_std().unwrap_or_default()
}

fn signers(held: &Held, id: Id<Webhook>, route: &Route) -> Option<Signers> {
    let project = held.lease.db.project();
    let open = |sealed: &SealedSecret| {
        let secret = held.app.open_webhook_secret(project, id, sealed).ok()?;
        Signer::new(&secret)
    };
    let previous = route.previous.as_ref();
    Some(Signers {
        current: open(&route.secret)?,
        previous: previous.and_then(|(sealed, until)| Some((open(sealed)?, *until))),
    })
}

fn delivery(seq: i64, event: String, payload: &str) -> NewDelivery {
    NewDelivery {
        id: Id::new(),
        seq,
        resource: webhook::resource(&event, payload),
        body: webhook::body(seq, &event, payload),
        event,
    }
}
