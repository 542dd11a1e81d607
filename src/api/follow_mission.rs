//! The words of a mission's tasks as one stream of chunks, whichever processes run them.
//!
//! The event log tells which tasks begin and end, in the order of commits, so nothing of a run is missed or looked for. Only
//! tasks that are worked on are looked at for their words.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use chrono::Utc;
use futures::Stream;
use futures::future::{BoxFuture, FutureExt, pending, select_all};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::auth::Presented;
use super::error::ApiError;
use super::follow::{Cursor, announce};
use super::patience::within;
use super::sse::event_stream;
use crate::app::App;
use crate::ids::{self, Id, Run};
use crate::mission::Status;
use crate::store::{EventRow, ProjectDb, StepRow, StoreError, Topic};
use crate::task::{Place, Status as TaskStatus};

/// Listeners say this often that they are there.
const PRESENCE: Duration = Duration::from_secs(5);
/// What comes within so short a time goes out together.
const GATHER: Duration = Duration::from_millis(20);
/// How often the caller's key is looked at again.
const RECHECK: Duration = Duration::from_secs(1);

/// Someone who will follow a run that is about to begin or to go on.
pub(super) struct Follower {
    app: App,
    db: ProjectDb,
    presented: Option<Presented>,
    /// The last event before it.
    after: i64,
    changed: watch::Receiver<()>,
}

impl Follower {
    /// Hears everything that is committed from here on.
    pub(super) async fn new(
        app: &App,
        db: &ProjectDb,
        presented: Option<Presented>,
    ) -> Result<Self, ApiError> {
        Ok(Self {
            app: app.clone(),
            db: db.clone(),
            presented,
            changed: app.db.wait(Topic::Events(db.world(), db.project())),
            after: db.event_range().await?.last,
        })
    }

    /// The stream of a run, until it ends or waits for a person.
    pub(super) fn stream(self, place: Place) -> Response {
        event_stream(Body::from_stream(words(self, place)))
    }
}

/// A task that is worked on.
struct Task {
    title: String,
    agent: String,
    status: TaskStatus,
    run: Option<Id<Run>>,
    cursor: Cursor,
    said: watch::Receiver<()>,
}

/// What is followed: the tasks that are worked on, and what was seen of the mission.
struct Following {
    app: App,
    db: ProjectDb,
    place: Place,
    tasks: BTreeMap<Id<ids::Task>, Task>,
    /// How much was sent of those that are not worked on any more: they may be again.
    left: BTreeMap<Id<ids::Task>, Cursor>,
    after: i64,
    /// Whether something may have ended or paused the mission.
    look_at_mission: bool,
}

fn words(follower: Follower, place: Place) -> impl Stream<Item = Result<Bytes, Infallible>> {
    async_stream::stream! {
        let Follower { app, db, presented, after, mut changed } = follower;
        let keep_alive = app.config.keep_alive();
        let mut following = Following {
            app: app.clone(), db, place, tasks: BTreeMap::new(), left: BTreeMap::new(), after, look_at_mission: true,
        };
        let mut presence = tokio::time::interval(PRESENCE);
        let mut checked = Instant::now();
        let mut silence = Box::pin(tokio::time::sleep(keep_alive));
        yield Ok(following.chunk("", &json!({"role": "assistant", "content": ""}), None, &json!({})));
        match following.join().await {
            Ok(()) => {}
            Err(error) => {
                yield Ok(failure(&error));
                return;
            }
        }
        loop {
            changed.borrow_and_update();
            let (pieces, ended) = match within(&app, following.look()).await {
                Ok(seen) => seen,
                Err(error) => {
                    yield Ok(failure(&error));
                    return;
                }
            };
            if !pieces.is_empty() {
                silence.as_mut().reset(Instant::now() + keep_alive);
            }
            for piece in pieces {
                yield Ok(piece);
            }
            if let Some(last) = ended {
                yield Ok(last);
                yield Ok(Bytes::from_static(b"data: [DONE]\n\n"));
                return;
            }
            tokio::select! {
                _ = changed.changed() => tokio::time::sleep(GATHER).await,
                () = following.said() => tokio::time::sleep(GATHER).await,
                _ = presence.tick() => following.announce(),
                () = tokio::time::sleep_until(checked + RECHECK), if presented.is_some() => {
                    checked = Instant::now();
                    if let Some(presented) = presented && presented.is_revoked(&app).await {
                        yield Ok(failure(&presented.refusal()));
                        return;
                    }
                }
                () = silence.as_mut() => {
                    yield Ok(Bytes::from_static(b": keep-alive\n\n"));
                    silence.as_mut().reset(Instant::now() + keep_alive);
                }
                // The mission goes on elsewhere.
                () = app.stop_turns.cancelled() => {
                    yield Ok(failure(&ApiError::Unavailable(anyhow::anyhow!("the server is stopping"))));
                    return;
                }
            }
        }
    }
}

fn failure(error: &ApiError) -> Bytes {
    Bytes::from(format!(
        "data: {}\n\ndata: [DONE]\n\n",
        error.stream_frame()
    ))
}

impl Following {
    /// Takes up what is worked on already.
    async fn join(&mut self) -> Result<(), ApiError> {
        for task in self.db.active_tasks_of_run(self.place).await? {
            self.take_up(
                task.id,
                task.title.clone(),
                task.assign_to.clone(),
                task.run,
            );
        }
        Ok(())
    }

    fn take_up(
        &mut self,
        id: Id<ids::Task>,
        title: String,
        agent: String,
        run: Option<Id<Run>>,
    ) -> &mut Task {
        announce(&self.app, id);
        let said = self.app.db.wait(Topic::Words(id.uuid()));
        let cursor = self.left.remove(&id).unwrap_or_default();
        self.tasks.entry(id).or_insert_with(|| Task {
            title,
            agent,
            status: TaskStatus::InProgress,
            run,
            cursor,
            said,
        })
    }

    fn announce(&self) {
        for task in self.tasks.keys() {
            announce(&self.app, *task);
        }
    }

    /// Resolves when a task that is worked on has said something.
    async fn said(&mut self) {
        let heard: Vec<BoxFuture<'_, ()>> = self
            .tasks
            .values_mut()
            .map(|task| {
                async {
                    // Its sender lives as long as the process.
                    let _ = task.said.changed().await;
                }
                .boxed()
            })
            .collect();
        if heard.is_empty() {
            pending::<()>().await;
        } else {
            select_all(heard).await;
        }
    }

    /// Everything that is new, and the last chunk if the mission has ended or waits for a person.
    async fn look(&mut self) -> Result<(Vec<Bytes>, Option<Bytes>), ApiError> {
        let mut pieces = Vec::new();
        loop {
            let page = self.db.events_after(self.after).await?;
            for row in page.rows {
                self.after = row.seq;
                self.hear(&row, &mut pieces).await?;
            }
            if page.is_last {
                break;
            }
        }
        let all: Vec<Id<ids::Task>> = self.tasks.keys().copied().collect();
        self.say(&all, false, &mut pieces).await?;
        let ended = if std::mem::take(&mut self.look_at_mission) {
            self.ended().await?
        } else {
            None
        };
        Ok((pieces, ended))
    }

    /// Takes in an event, if it is one of the run's.
    async fn hear(&mut self, row: &EventRow, pieces: &mut Vec<Bytes>) -> Result<(), ApiError> {
        let of_mission = row.name == "mission:transition" || row.name == "mission:deleted";
        if !of_mission && row.name != "task:transition" {
            return Ok(());
        }
        // Looked at as text first: other missions' events are not worth parsing.
        if !row.payload.contains(&self.place.mission.to_string()) {
            return Ok(());
        }
        if of_mission {
            self.look_at_mission = true;
            return Ok(());
        }
        let Ok(payload) = serde_json::from_str::<Value>(&row.payload) else {
            return Ok(());
        };
        let task = &payload["task"];
        if task["missionId"] != json!(self.place.mission) {
            return Ok(());
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (Ok(id), Some(status)) = (
            text(&payload["taskId"]).parse::<Id<ids::Task>>(),
            TaskStatus::of(&text(&payload["to"])),
        ) else {
            return Ok(());
        };
        self.move_task(id, status, task, pieces).await
    }

    async fn move_task(
        &mut self,
        id: Id<ids::Task>,
        status: TaskStatus,
        view: &Value,
        pieces: &mut Vec<Bytes>,
    ) -> Result<(), ApiError> {
        let text = |member: &str| view[member].as_str().unwrap_or_default().to_owned();
        if !self.tasks.contains_key(&id) {
            self.take_up(id, text("title"), text("assignTo"), None);
        }
        if let Some(task) = self.tasks.get_mut(&id) {
            task.agent = text("assignTo");
            // A retry has no run yet; what the one before said last is still to come.
            task.run = text("runId").parse().ok().or(task.run);
        }
        let leaves = !status.is_active();
        if leaves {
            self.say(&[id], true, pieces).await?;
        }
        if let Some(task) = self.tasks.get_mut(&id) {
            task.status = status;
        }
        pieces.push(self.task_chunk(id, &json!({})));
        if leaves && let Some(task) = self.tasks.remove(&id) {
            self.left.insert(id, task.cursor);
        }
        self.look_at_mission |= leaves;
        Ok(())
    }

    /// The new words of some tasks: those of finished steps, and, unless they have left, of the step under way.
    async fn say(
        &mut self,
        ids: &[Id<ids::Task>],
        finished_only: bool,
        pieces: &mut Vec<Bytes>,
    ) -> Result<(), ApiError> {
        let mut asked = Vec::new();
        for id in ids {
            let Some(task) = self.tasks.get_mut(id) else {
                continue;
            };
            if let Some(run) = task.run {
                task.cursor.enter(run);
                asked.push((*id, run, task.cursor.step()));
            }
        }
        if asked.is_empty() {
            return Ok(());
        }
        let mut new: BTreeMap<Id<ids::Task>, String> = BTreeMap::new();
        let mut from: Vec<(Id<Run>, i32)> =
            asked.iter().map(|(_, run, step)| (*run, *step)).collect();
        while !from.is_empty() {
            let (steps, more) = self.db.steps_of_runs(&from).await?;
            for (id, run, _) in &asked {
                let of_run: Vec<StepRow> = steps
                    .iter()
                    .filter(|(of, _)| of == run)
                    .map(|(_, step)| step.clone())
                    .collect();
                if let Some(task) = self.tasks.get_mut(id) {
                    *new.entry(*id).or_default() += &task.cursor.take(&of_run);
                }
            }
            let step_of = |run: &Id<Run>| {
                let mut found = asked.iter().filter(|(_, of, _)| of == run);
                found
                    .next()
                    .and_then(|(id, _, _)| self.tasks.get(id))
                    .map_or(0, |task| task.cursor.step())
            };
            from = if more {
                from.iter().map(|(run, _)| (*run, step_of(run))).collect()
            } else {
                Vec::new()
            };
        }
        if !finished_only {
            let tasks: Vec<Id<ids::Task>> = asked.iter().map(|(id, _, _)| *id).collect();
            for words in self.db.words_of_tasks(&tasks).await? {
                if let Some(task) = self.tasks.get_mut(&words.task)
                    && task.run == Some(words.run)
                    && task.cursor.step() == words.step
                {
                    *new.entry(words.task).or_default() += &task.cursor.new_in(&words.text);
                }
            }
        }
        for (id, text) in new.into_iter().filter(|(_, text)| !text.is_empty()) {
            pieces.push(self.task_chunk(id, &json!({"content": text})));
        }
        Ok(())
    }

    /// The last chunk, if the mission has ended or waits for a person.
    async fn ended(&mut self) -> Result<Option<Bytes>, ApiError> {
        let mission = match self.db.mission_status(self.place.mission).await {
            Ok(mission) => mission,
            Err(StoreError::NotFound) => {
                return Err(ApiError::NotFound("The mission was deleted.".to_owned()));
            }
            Err(error) => return Err(error.into()),
        };
        let over = match mission.status() {
            // What is under way goes on while it is paused; its words are not cut off.
            Status::Paused => self.tasks.is_empty(),
            _ if mission.execution_count != self.place.run => true,
            Status::Active => self.db.waits_for_people(self.place).await?,
            _ => true,
        };
        if !over {
            self.look_at_mission = mission.status() == Status::Paused;
            return Ok(None);
        }
        let told = json!({
            "mission": {"id": mission.id, "name": mission.name, "status": mission.status(), "reason": mission.reason},
        });
        Ok(Some(self.chunk(
            &mission.name,
            &json!({}),
            Some("stop"),
            &told,
        )))
    }

    fn task_chunk(&self, id: Id<ids::Task>, delta: &Value) -> Bytes {
        match self.tasks.get(&id) {
            Some(task) => {
                let told = json!({"task": {"id": id, "title": task.title, "status": task.status}});
                self.chunk(&task.agent, delta, None, &told)
            }
            None => Bytes::new(),
        }
    }

    fn chunk(&self, model: &str, delta: &Value, finish: Option<&str>, others: &Value) -> Bytes {
        let mut chunk = json!({
            "id": format!("chatcmpl-{}", self.place.mission.uuid().simple()),
            "object": "chat.completion.chunk",
            "created": Utc::now().timestamp(),
            "model": model,
            "choices": [{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}],
        });
        if let (Some(chunk), Some(others)) = (chunk.as_object_mut(), others.as_object()) {
            chunk.extend(others.clone());
        }
        Bytes::from(format!("data: {chunk}\n\n"))
    }
}
