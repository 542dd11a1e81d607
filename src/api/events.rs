//! `GET /v1/events`: what happens to a project, from any point of the past on (contract 2.9).
//!
//! One feed per project reads new events from the log, whoever wrote them, and hands each to all readers of this process as
//! one piece of text. A reader that falls behind reads the log itself; nothing is buffered for it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use axum::response::Response;
use bytes::Bytes;
use futures::Stream as Frames;
use serde::Deserialize;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;

use super::auth::Presented;
use super::error::{ApiError, ErrorBody};
use super::extract::{Door, Query};
use super::sse::event_stream;
use crate::app::App;
use crate::event::{id as event_id, passes};
use crate::store::{EventRow, ProjectDb, Result as StoreResult, Stream, Topic};

/// Events that a feed keeps for its readers.
const KEPT: usize = 256;
/// A reader that is further behind than this is dropped.
const BEHIND: i64 = 20_000;
/// How often a reader's key is looked at again. It is known without asking the database; the admin's project is not.
const RECHECK: Duration = Duration::from_secs(1);
/// The net under wake-ups.
const LOOK: Duration = Duration::from_secs(5);

/// An event as it goes out.
#[derive(Debug)]
struct Frame {
    seq: i64,
    name: String,
    text: Bytes,
}

impl From<EventRow> for Frame {
    fn from(row: EventRow) -> Self {
        Self {
            text: Bytes::from(format!(
                "event: {}\ndata: {}\nid: {}\n\n",
                row.name,
                row.payload,
                event_id(row.seq)
            )),
            seq: row.seq,
            name: row.name,
        }
    }
}

/// A project's new events, for all its readers in this process.
#[derive(Debug)]
struct Feed(broadcast::Sender<Arc<Frame>>);

/// The feeds that have readers.
#[derive(Debug, Default)]
pub struct Feeds(Mutex<HashMap<Stream, Weak<Feed>>>);

const POISONED: &str = "nothing panics while it holds the feeds";

impl Feeds {
    /// Joins a project's feed, whose first reader has seen all up to `after`; what is committed after this call is heard.
    fn join(
        &self,
        app: &App,
        db: &ProjectDb,
        after: i64,
    ) -> (Arc<Feed>, broadcast::Receiver<Arc<Frame>>) {
        let stream = Stream {
            world: db.world(),
            project: db.project(),
        };
        let mut feeds = self.0.lock().expect(POISONED);
        if let Some(feed) = feeds.get(&stream).and_then(Weak::upgrade) {
            let receiver = feed.0.subscribe();
            return (feed, receiver);
        }
        if feeds.len() > 1024 && feeds.len().is_power_of_two() {
            feeds.retain(|_, feed| feed.strong_count() > 0);
        }
        let (sender, receiver) = broadcast::channel(KEPT);
        let feed = Arc::new(Feed(sender));
        feeds.insert(stream, Arc::downgrade(&feed));
        tokio::spawn(fill(app.clone(), db.clone(), after, Arc::downgrade(&feed)));
        (feed, receiver)
    }
}

/// Reads new events into a feed for as long as it has readers.
async fn fill(app: App, db: ProjectDb, mut last: i64, feed: Weak<Feed>) {
    let mut woken = app.db.wait(Topic::Events(db.world(), db.project()));
    loop {
        match read_on(&db, &mut last, &feed).await {
            Ok(()) => {}
            Err(error) => {
                tracing::debug!("the event log cannot be read, trying again: {error}");
                tokio::time::sleep(Duration::from_millis(200)).await;
                if feed.strong_count() > 0 {
                    continue;
                }
            }
        }
        if feed.strong_count() == 0 {
            return;
        }
        // Either a wake-up or the net; both lead to a look.
        let _ = tokio::time::timeout(LOOK, woken.changed()).await;
    }
}

async fn read_on(db: &ProjectDb, last: &mut i64, feed: &Weak<Feed>) -> StoreResult<()> {
    loop {
        let page = db.in_time(db.events_after(*last)).await?;
        let Some(feed) = feed.upgrade() else {
            return Ok(());
        };
        for row in page.rows {
            *last = row.seq;
            // Nobody listens at the moment: they read the log when they come.
            let _ = feed.0.send(Arc::new(row.into()));
        }
        if page.is_last {
            return Ok(());
        }
    }
}

/// Which events, and from where.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(rename_all = "camelCase")]
pub struct EventQuery {
    /// Names, separated by commas; `*` at the end of one stands for any rest. All when absent.
    pub filter: Option<String>,
    /// The last event that was seen: those after it come first. The header `Last-Event-ID` goes before it.
    pub last_event_id: Option<String>,
    /// The same under a shorter name.
    pub after: Option<String>,
}

/// Follow what happens to the project.
#[utoipa::path(get, path = "/events", tag = "Events", params(EventQuery, ("Last-Event-ID" = Option<String>, Header, description = "The last event that was seen")),
    responses(
        (status = 200, description = "Server-sent events", content((String = "text/event-stream"))),
        (status = 400, description = "That is no event's id", body = ErrorBody),
        (status = 410, description = "The log does not go back so far", body = ErrorBody),
    ))]
pub async fn read_events(
    State(app): State<App>,
    Door(db): Door,
    Query(query): Query<EventQuery>,
    presented: Option<Extension<Presented>>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let header = headers
        .get("last-event-id")
        .map(|value| value.to_str().unwrap_or("?"));
    // A client that has seen nothing yet may send an empty one.
    let said = [
        header,
        query.last_event_id.as_deref(),
        query.after.as_deref(),
    ];
    let mut said = said.into_iter().flatten().map(str::trim);
    let asked = said.find(|id| !id.is_empty());
    let range = db.event_range().await?;
    let after = match asked {
        None => range.last,
        Some(id) => {
            let seq = id
                .strip_prefix("evt_")
                .unwrap_or(id)
                .parse::<i64>()
                .ok()
                .filter(|seq| (0..=range.last).contains(seq));
            let seq = seq.ok_or_else(|| {
                ApiError::invalid(
                    "lastEventId",
                    format!(
                        "`{id}` is no event of this project: the newest is {}.",
                        event_id(range.last)
                    ),
                )
            })?;
            if seq < range.pruned {
                let oldest = event_id(range.pruned);
                return Err(ApiError::Gone(format!(
                    "The events after {} are not kept any more. The oldest id that can be asked for is {oldest}.",
                    event_id(seq)
                )));
            }
            seq
        }
    };
    let filter = query.filter.unwrap_or_default();
    let presented = presented.map(|Extension(presented)| presented);
    Ok(event_stream(Body::from_stream(frames(Reader {
        app,
        db,
        filter,
        after,
        told: after,
        presented,
        checked: Instant::now(),
    }))))
}

/// Follow what happens to the project, by the older path.
#[utoipa::path(get, path = "/events/stream", tag = "Events", params(EventQuery, ("Last-Event-ID" = Option<String>, Header, description = "The last event that was seen")),
    responses(
        (status = 200, description = "Server-sent events", content((String = "text/event-stream"))),
        (status = 400, description = "That is no event's id", body = ErrorBody),
        (status = 410, description = "The log does not go back so far", body = ErrorBody),
    ))]
pub async fn stream_events(
    app: State<App>,
    door: Door,
    query: Query<EventQuery>,
    presented: Option<Extension<Presented>>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    read_events(app, door, query, presented, headers).await
}

/// A text that goes out, and the last event that its reader has seen with it.
type Piece = (i64, Bytes);

/// Someone who follows a project's events.
struct Reader {
    app: App,
    db: ProjectDb,
    filter: String,
    /// The last event that was seen, whether the filter let it through or not.
    after: i64,
    /// The last one that the reader knows of.
    told: i64,
    presented: Option<Presented>,
    checked: Instant,
}

impl Reader {
    /// Takes an event in; its text if the filter lets it through.
    fn admit(&mut self, frame: &Frame) -> Option<Piece> {
        self.after = frame.seq;
        passes(&self.filter, &frame.name).then(|| {
            self.told = frame.seq;
            (frame.seq, frame.text.clone())
        })
    }

    /// The next events of the log as text, and whether there are no more; or why the reader must not go on.
    async fn next_page(&mut self) -> Result<(Vec<Piece>, bool), &'static str> {
        if self.app.stopping.is_cancelled() {
            return Err("the server is stopping");
        }
        if self.checked.elapsed() >= RECHECK {
            self.recheck().await?;
        }
        let page = self.db.events_after(self.after);
        let page = self.db.in_time(page).await.map_err(|error| {
            tracing::warn!("an event reader is dropped: {error}");
            "the log cannot be read at the moment"
        })?;
        let mut pieces = Vec::new();
        for row in page.rows {
            // Numbers have no gaps: what is missing was pruned since. What stands before it goes out first.
            if row.seq > self.after + 1 {
                return match pieces.is_empty() {
                    true => Err("the events that follow are not kept any more"),
                    false => Ok((pieces, false)),
                };
            }
            pieces.extend(self.admit(&row.into()));
        }
        Ok((pieces, page.is_last))
    }

    /// A stream must not outlive its key.
    async fn recheck(&mut self) -> Result<(), &'static str> {
        self.checked = Instant::now();
        let Some(presented) = self.presented else {
            return Ok(());
        };
        match presented {
            presented if !presented.is_revoked(&self.app).await => Ok(()),
            Presented::Key { .. } => Err("the key was revoked"),
            Presented::Admin(_) => Err("the project is suspended or gone"),
        }
    }

    /// Whether the log still has what the feed was too quick for.
    async fn can_catch_up(&self) -> bool {
        match self.db.in_time(self.db.event_range()).await {
            Ok(range) => range.last - self.after <= BEHIND,
            Err(_unreachable) => false,
        }
    }

    /// A sign of life. It names the last event where the filter let none through since: whoever comes back after a quiet week has missed nothing.
    fn heartbeat(&mut self) -> Piece {
        if self.told == self.after {
            let text = Bytes::from_static(b"event: heartbeat\ndata: \n\n");
            return (self.after, text);
        }
        self.told = self.after;
        let id = event_id(self.after);
        let text = format!("event: heartbeat\ndata: \nid: {id}\n\n");
        (self.after, Bytes::from(text))
    }
}

/// A reader's stream. One that takes nothing for longer than `patience` is cut off elsewhere; one that is nearly as slow is told so.
fn frames(mut reader: Reader) -> impl Frames<Item = Result<Bytes, Infallible>> {
    let patience = Duration::from_millis(reader.app.config.stall_ms) / 2;
    async_stream::stream! {
        let heartbeat = Duration::from_millis(reader.app.config.heartbeat_ms);
        let stopping = reader.app.stopping.clone();
        let mut beat = Box::pin(tokio::time::sleep(heartbeat));
        let (mut feed, mut at_the_end, mut ending) = (None, false, None);
        // Something at once, so that the reader knows that it is heard.
        let mut pieces = vec![(reader.after, Bytes::from_static(b": connected\n\n"))];
        let (reason, seen) = 'open: loop {
            for (seen, text) in std::mem::take(&mut pieces) {
                let offered = Instant::now();
                yield Ok(text);
                if offered.elapsed() > patience {
                    break 'open ("too slow", seen);
                }
            }
            if let Some(reason) = ending {
                break (reason, reader.after);
            }
            let Some((_feed, news)) = &mut feed else {
                // What was missed comes from the log. The feed is joined before the last look into it, so that nothing falls between the two.
                let page = reader.next_page().await;
                let joined = matches!(page, Ok((_, true)))
                    .then(|| reader.app.feeds.join(&reader.app, &reader.db, reader.after));
                let rest = match joined {
                    Some(_) => reader.next_page().await,
                    None => Ok((Vec::new(), false)),
                };
                for page in [page, rest] {
                    match page {
                        Ok((page, caught_up)) => {
                            pieces.extend(page);
                            at_the_end = caught_up;
                        }
                        Err(reason) => ending = Some(reason),
                    }
                }
                feed = joined.filter(|_| at_the_end);
                continue;
            };
            tokio::select! {
                () = tokio::time::sleep_until(reader.checked + RECHECK) => {
                    ending = reader.recheck().await.err();
                }
                frame = news.recv() => match frame {
                    Ok(frame) if frame.seq <= reader.after => {}
                    Ok(frame) if frame.seq == reader.after + 1 => pieces.extend(reader.admit(&frame)),
                    // The feed skips nothing; a gap means that it began later than we did.
                    Ok(_) | Err(RecvError::Closed) => feed = None,
                    Err(RecvError::Lagged(_)) => {
                        if !reader.can_catch_up().await {
                            ending = Some("too slow");
                        }
                        feed = None;
                    }
                },
                () = beat.as_mut() => {
                    beat.as_mut().reset(Instant::now() + heartbeat);
                    pieces.push(reader.heartbeat());
                }
                () = stopping.cancelled() => ending = Some("the server is stopping"),
            }
        };
        yield Ok(farewell(reason, seen));
    }
}

/// The last comment of a stream that we end: where to go on.
fn farewell(reason: &str, after: i64) -> Bytes {
    Bytes::from(format!(
        ": closed: {reason}; go on with Last-Event-ID: {}\n\n",
        event_id(after)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_has_its_lines_in_the_published_order() {
        let row = EventRow {
            seq: 317,
            name: "task:created".to_owned(),
            payload: "{}".to_owned(),
        };
        assert_eq!(
            Frame::from(row).text,
            "event: task:created\ndata: {}\nid: evt_00317\n\n"
        );
        assert_eq!(event_id(1_234_567), "evt_1234567");
    }
}
