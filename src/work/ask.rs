//! One question to a model, with an answer of a given form.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use serde_json::Value;

use super::execution::again;
use super::record::without_nul;
use super::task::{Model, named_model};
use super::{Held, Result, WorkError};
use crate::agent::{self, Course, OutputFormat, Repair, Toolbox, TurnError, TurnEvent};
use crate::app::call_usage;
use crate::ids::{self, Id};
use crate::llm::{
    Message, ModelRequest, Part, ProviderError, ResponseFormat, Tool, ToolCall, Usage,
};
use crate::seal::sha256;
use crate::store::{CallUsage, Topic};

/// How long an answer may take in all.
const LONGEST: Duration = Duration::from_secs(900);

/// A judge has no tools yet.
#[derive(Debug)]
struct NoTools;

#[async_trait]
impl Toolbox for NoTools {
    fn tools(&self) -> &[Arc<Tool>] {
        &[]
    }

    async fn call(&self, call: &ToolCall) -> std::result::Result<String, String> {
        Err(format!("There is no tool `{}`.", call.name))
    }

    fn is_repeatable(&self, _: &ToolCall) -> bool {
        true
    }

    fn is_at_hand(&self, _: &ToolCall) -> bool {
        true
    }
}

/// A question.
#[derive(Debug)]
pub(super) struct Question<'a> {
    /// What the answer is called, for the provider.
    pub(super) name: &'a str,
    /// Who is asked.
    pub(super) model: &'a str,
    /// What to do.
    pub(super) system: String,
    /// What it is about.
    pub(super) user: String,
    /// What the answer must be.
    pub(super) schema: Value,
}

impl Question<'_> {
    /// What a model is sent for it, and the form that its answer must have.
    fn request(self, model: String, held: &Held) -> Result<(ModelRequest, OutputFormat)> {
        let response_format = ResponseFormat::JsonSchema {
            name: self.name.to_owned(),
            description: None,
            schema: self.schema,
            strict: None,
        };
        let format =
            OutputFormat::new(&response_format).map_err(|error| WorkError::Defect(error.into()))?;
        let text = self.user;
        let content = vec![Part::Text { text }];
        let request = ModelRequest {
            model,
            system: Some(self.system),
            messages: vec![Message::User { content }],
            response_format,
            whole: true,
            permit: Some(held.proof.clone()),
            ..ModelRequest::default()
        };
        Ok((request, format))
    }

    /// Tells it from any other question: the same text has the same, in every process.
    pub(super) fn fingerprint(&self) -> String {
        let hash = sha256(&format!("{}\n\n{}", self.system, self.user));
        hash[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// What came of a question.
#[derive(Debug)]
pub(super) struct Answer {
    /// JSON text that the schema accepts, or why there is none.
    pub(super) text: std::result::Result<String, String>,
    /// What the calls used, if any was made. An answer that is of no use was paid for too.
    pub(super) usage: Option<CallUsage>,
}

impl Answer {
    fn none(reason: String) -> Self {
        Self {
            text: Err(reason),
            usage: None,
        }
    }
}

/// Asks, as [`pose`] does, and records what it used beside the last run of the task. The inner error says why there is
/// no answer.
pub(super) async fn ask(
    held: &Held,
    question: Question<'_>,
    about: Id<ids::Task>,
) -> Result<std::result::Result<String, String>> {
    let name = question.name;
    let answer = pose(held, question).await?;
    if let Some(usage) = &answer.usage
        && let Err(error) = held.lease.db.record_call(about, usage).await
    {
        // The answer was paid for, and counts without its entry in the account.
        tracing::error!(task = %about, "what a {name} used is not on the account: {error}");
    }
    Ok(answer.text)
}

/// What comes while a question is under way.
enum Heard {
    Event(Option<std::result::Result<TurnEvent, TurnError>>),
    /// Nothing, for too long.
    Nobody,
    /// The job is another's.
    Lost,
    /// The server stops.
    Stopping,
    /// Someone has killed, paused or deleted the task, perhaps.
    Stopped,
}

/// Asks, and checks the answer's form; asks once more if that is wrong.
pub(super) async fn pose(held: &Held, question: Question<'_>) -> Result<Answer> {
    // A question that is under way is answered; no other is begun.
    if held.should_rest().await {
        held.lease.db.hand_over(&held.lease, None).await?;
        return Err(WorkError::LeaseLost);
    }
    if !held.is_surely_ours().await? {
        return Err(WorkError::LeaseLost);
    }
    let mut stopped = held.app.db.wait(Topic::Stop(held.lease.job.subject()));
    let Model {
        provider,
        name,
        id: model,
    } = match named_model(held, question.model).await? {
        Ok(model) => model,
        Err(cause) => return Ok(Answer::none(cause)),
    };
    let asked = question.name;
    let (request, format) = question.request(model, held)?;
    let course = Course {
        again: again(held),
        ..Course::chat(format, Repair::Once)
    };
    let mut turn = std::pin::pin!(agent::turn(provider, request, course, Arc::new(NoTools)));
    let mut text = String::new();
    let mut used: Option<Usage> = None;
    let deadline = tokio::time::Instant::now() + LONGEST;
    loop {
        let heard = held.pulse.away(async {
            tokio::select! {
                () = tokio::time::sleep_until(deadline) => Heard::Nobody,
                event = turn.next() => Heard::Event(event),
                () = held.lost.cancelled() => Heard::Lost,
                () = held.app.stop_turns.cancelled() => Heard::Stopping,
                _ = stopped.changed() => Heard::Stopped,
            }
        });
        let event = match heard.await {
            Heard::Event(event) => event,
            Heard::Nobody => {
                return Ok(Answer::none(format!(
                    "nobody answered within {} s",
                    LONGEST.as_secs()
                )));
            }
            Heard::Lost => return Err(WorkError::LeaseLost),
            Heard::Stopping => {
                held.lease.db.hand_over(&held.lease, None).await?;
                return Err(WorkError::LeaseLost);
            }
            Heard::Stopped if held.is_known_to_be_lost().await? => {
                return Err(WorkError::LeaseLost);
            }
            Heard::Stopped => continue,
        };
        match event {
            Some(Ok(TurnEvent::Step(step))) => {
                text = without_nul(step.message.text().unwrap_or_default());
                *used.get_or_insert_default() += step.usage;
            }
            Some(Err(TurnError::Provider(ProviderError::NotPermitted))) => {
                return Err(WorkError::LeaseLost);
            }
            ended => {
                let text = match ended {
                    None => Ok(text),
                    Some(Err(error)) => {
                        let told = error.told();
                        tracing::warn!(
                            project = %held.lease.db.project(), job = ?held.lease.job, model = name,
                            "a {asked} has no answer: {told}"
                        );
                        Err(without_nul(&told))
                    }
                    Some(Ok(_)) => continue,
                };
                let usage = used.map(|used| call_usage(&name, used));
                return Ok(Answer { text, usage });
            }
        }
    }
}
