//! A task's words as a stream of chunks, whichever process runs it.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use chrono::Utc;
use futures::Stream;
use serde_json::{Value, json};

use super::auth::Presented;
use super::error::ApiError;
use super::patience::within;
use super::sse::event_stream;
use crate::app::App;
use crate::ids::{self, Id, Run};
use crate::store::{ProjectDb, StepKind, StepRow, StoreError, Topic};
use crate::task::{Status, Task};

/// Listeners say this often that they are there.
const PRESENCE: Duration = Duration::from_secs(5);
/// A listener is known everywhere after so long.
const SETTLED: Duration = Duration::from_millis(250);
/// How often a listener's key is looked at again; it is known without asking the database.
const RECHECK: Duration = Duration::from_secs(1);
/// Steps that are read at once.
const AT_ONCE: i64 = 200;

/// Says that someone listens to a task: whoever runs it writes its words down as they come.
pub(super) fn announce(app: &App, task: Id<ids::Task>) {
    app.db.ring(Topic::Listener(task.uuid()));
}

/// The stream of a task's current run from its beginning, until the task ends or waits for a person.
pub(super) fn stream(
    app: App,
    db: ProjectDb,
    task: Task,
    presented: Option<Presented>,
) -> Response {
    event_stream(Body::from_stream(words(app, db, task, presented)))
}

/// How much of a task's words was sent.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    run: Option<Id<Run>>,
    step: i32,
    /// What was sent of the step, in bytes.
    sent: String,
    /// Whether the next words begin a new paragraph.
    follows: bool,
    /// Whether anything was sent at all.
    spoke: bool,
}

impl Cursor {
    /// The step that is to come.
    pub(super) fn step(&self) -> i32 {
        self.step
    }

    /// Goes over to a run; words of another follow in a paragraph of their own.
    pub(super) fn enter(&mut self, run: Id<Run>) {
        if self.run != Some(run) {
            self.begin(Some(run));
        }
    }

    /// What is new in a step's text so far. A step that was begun again says something else.
    pub(super) fn new_in(&mut self, text: &str) -> String {
        let new = match text.strip_prefix(self.sent.as_str()) {
            Some(new) => new.to_owned(),
            None => format!("\n\n{text}"),
        };
        if new.is_empty() {
            return new;
        }
        text.clone_into(&mut self.sent);
        self.spoke = true;
        if std::mem::take(&mut self.follows) {
            format!("\n\n{new}")
        } else {
            new
        }
    }

    /// Begins with a run.
    fn begin(&mut self, run: Option<Id<Run>>) {
        *self = Self {
            run,
            follows: self.spoke,
            spoke: self.spoke,
            ..Self::default()
        };
    }

    /// What is new in finished steps.
    pub(super) fn take(&mut self, steps: &[StepRow]) -> String {
        let mut new = String::new();
        for step in steps {
            if step.kind == StepKind::Model {
                if let Some(text) = step.body["message"]["content"].as_str() {
                    new += &self.new_in(text);
                }
                self.follows |= !self.sent.is_empty();
                self.sent.clear();
            }
            self.step = step.number + 1;
        }
        new
    }
}

fn ends(task: &Task) -> bool {
    task.status().is_terminal()
        || task.status() == Status::AwaitingApproval
        || task.status() == Status::Draft
        || (task.status() == Status::Pending && task.held)
}

fn words(
    app: App,
    db: ProjectDb,
    first: Task,
    presented: Option<Presented>,
) -> impl Stream<Item = Result<Bytes, Infallible>> {
    async_stream::stream! {
        let id = first.id;
        let mut said = app.db.wait(Topic::Words(id.uuid()));
        let mut cursor = Cursor::default();
        let mut presence = tokio::time::interval(PRESENCE);
        // By now every process has heard of us, and what went before is seen.
        let mut settled = Box::pin(tokio::time::sleep(SETTLED));
        let mut known = false;
        let mut recheck = tokio::time::interval(RECHECK);
        let mut silence = Box::pin(tokio::time::sleep(app.config.keep_alive()));
        yield Ok(chunk(&first, &json!({"role": "assistant", "content": ""}), None));
        loop {
            let (task, new) = match within(&app, look(&db, id, &mut cursor)).await {
                Ok(seen) => seen,
                Err(error) => {
                    yield Ok(broken_off(&error));
                    return;
                }
            };
            if !new.is_empty() {
                yield Ok(chunk(&task, &json!({"content": new}), None));
                silence.as_mut().reset(tokio::time::Instant::now() + app.config.keep_alive());
            }
            if ends(&task) {
                yield Ok(chunk(&task, &json!({}), Some("stop")));
                yield Ok(Bytes::from_static(b"data: [DONE]\n\n"));
                return;
            }
            loop {
                tokio::select! {
                    _ = said.changed() => break,
                    _ = presence.tick() => {
                        announce(&app, id);
                        break;
                    }
                    () = settled.as_mut(), if !known => {
                        known = true;
                        break;
                    }
                    // A stream must not outlive its key.
                    _ = recheck.tick(), if presented.is_some() => {
                        if let Some(presented) = presented && presented.is_revoked(&app).await {
                            yield Ok(broken_off(&presented.refusal()));
                            return;
                        }
                    }
                    () = silence.as_mut() => {
                        yield Ok(Bytes::from_static(b": keep-alive\n\n"));
                        silence.as_mut().reset(tokio::time::Instant::now() + app.config.keep_alive());
                    }
                    // The task goes on elsewhere; the client comes back for the rest.
                    () = app.stop_turns.cancelled() => {
                        yield Ok(broken_off(&ApiError::Unavailable(anyhow::anyhow!("the server is stopping"))));
                        return;
                    }
                }
            }
        }
    }
}

/// The end of a stream that did not come to its end.
fn broken_off(error: &ApiError) -> Bytes {
    Bytes::from(format!(
        "data: {}\n\ndata: [DONE]\n\n",
        error.stream_frame()
    ))
}

/// How the task stands, and what it has said since the last look.
async fn look(
    db: &ProjectDb,
    id: Id<ids::Task>,
    cursor: &mut Cursor,
) -> Result<(Task, String), ApiError> {
    // Its status first: what a task has said is committed before it ends.
    let task = match db.task(id).await {
        Err(StoreError::NotFound) => return Err(ApiError::missing("Task", &id.to_string())),
        task => task?,
    };
    let mut new = String::new();
    if cursor.run != task.run {
        // The run before ended with words that were recorded when it was left.
        if let Some(left) = cursor.run {
            new += &finished(db, left, cursor).await?;
        }
        cursor.begin(task.run);
    }
    let Some(run) = task.run else {
        return Ok((task, new));
    };
    new += &finished(db, run, cursor).await?;
    if !ends(&task)
        && let Some((step, text)) = db.words(id, run).await?
        && step == cursor.step
    {
        new += &cursor.new_in(&text);
    }
    Ok((task, new))
}

/// What is new in the finished steps of a run.
async fn finished(db: &ProjectDb, run: Id<Run>, cursor: &mut Cursor) -> Result<String, ApiError> {
    let mut new = String::new();
    loop {
        let steps = db.steps(run, cursor.step, AT_ONCE).await?;
        new += &cursor.take(&steps);
        if i64::try_from(steps.len()).is_ok_and(|count| count < AT_ONCE) {
            return Ok(new);
        }
    }
}

fn chunk(task: &Task, delta: &Value, finish: Option<&str>) -> Bytes {
    let mut told = json!({"id": task.id, "title": task.title, "status": task.status()});
    if let (Some(_), Some(result)) = (finish, &task.document.result) {
        // A client that looks at the last chunk alone can tell how it ended.
        told["reason"] = json!(result.reason);
        if let Some(cause) = &result.cause {
            told["cause"] = json!(cause);
        }
    }
    let chunk = json!({
        "id": format!("chatcmpl-{}", task.id.uuid().simple()),
        "object": "chat.completion.chunk",
        "created": Utc::now().timestamp(),
        "model": task.assign_to,
        "choices": [{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}],
        "task": told,
    });
    Bytes::from(format!("data: {chunk}\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(number: i32, text: &str) -> StepRow {
        StepRow {
            number,
            kind: StepKind::Model,
            body: json!({"message": {"content": text}}),
            under_way: None,
            created_at: Utc::now(),
        }
    }

    #[test]
    fn words_are_sent_once_whether_they_come_early_or_with_their_step() {
        let mut cursor = Cursor::default();
        assert_eq!(cursor.new_in("Good"), "Good");
        assert_eq!(cursor.new_in("Good"), "");
        assert_eq!(cursor.new_in("Good mor"), " mor");
        assert_eq!(
            cursor.take(&[step(0, "Good morning"), step(1, "again")]),
            "ning\n\nagain"
        );
        assert_eq!((cursor.step, cursor.new_in("and").as_str()), (2, "\n\nand"));
        assert_eq!(cursor.new_in("or"), "\n\nor");
        cursor.enter(Id::new());
        assert_eq!(cursor.new_in("anew"), "\n\nanew");
    }

    #[test]
    fn words_after_a_run_without_any_are_the_first() {
        let mut cursor = Cursor::default();
        cursor.enter(Id::new());
        cursor.enter(Id::new());
        assert_eq!(cursor.new_in("Here"), "Here");
    }
}
