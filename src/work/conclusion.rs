//! How a run ended, and what follows from it: its last step, its result and the task's next state are one commit.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::json;

use super::record::{Recorder, without_nul};
use super::task::{Hold, commit, pause};
use super::{Held, Result, WorkError};
use crate::agent::{Step, TurnError};
use crate::lifecycle::{self, Aftermath, after_failure};
use crate::llm::{FinishReason, ProviderError};
use crate::store::{NewStep, ProjectTx, RunStatus};
use crate::task::{
    Closed, EndReason, ExpectedOutcome, Failure, Gate, Hook, Outcome, Phase, Settings, Status,
    Task, TaskResult, Wrong,
};

/// The longest rest that a provider can ask for between two attempts.
const LONGEST_REST: Duration = Duration::from_secs(3_600);

/// How a run ended.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) reason: EndReason,
    /// What went wrong, in a sentence.
    pub(super) sentence: String,
    /// What broke.
    cause: Option<String>,
    /// What the next attempt is to make of it.
    wrong: fn(String) -> Wrong,
    /// The milliseconds that it had, where they were used up.
    most: Option<u64>,
    /// How long the provider wants to be left alone.
    rest: Duration,
}

impl Ending {
    fn finished() -> Self {
        Self::limit(EndReason::Finished, String::new())
    }

    fn limit(reason: EndReason, sentence: String) -> Self {
        Self {
            reason,
            sentence,
            cause: None,
            wrong: Wrong::Limit,
            most: None,
            rest: Duration::ZERO,
        }
    }

    /// It used up the milliseconds that it had.
    pub(super) fn timeout(most: u64, sentence: String) -> Self {
        Self {
            most: Some(most),
            ..Self::limit(EndReason::Timeout, sentence)
        }
    }

    /// Something broke that is none of the agent's doing.
    pub(super) fn error(cause: String) -> Self {
        Self {
            cause: Some(cause.clone()),
            wrong: Wrong::Surroundings,
            ..Self::limit(EndReason::Error, cause)
        }
    }

    /// A turn that came to no end of its own.
    pub(super) fn broken(error: &TurnError) -> Self {
        match error {
            TurnError::TooManyCalls(_) => Self::limit(EndReason::MaxTurns, error.to_string()),
            error => Self {
                rest: rest_after(error),
                wrong: match error {
                    TurnError::Provider(ProviderError::ContextTooLong) => Wrong::Limit,
                    TurnError::Provider(_) | TurnError::TooManyCalls(_) => Wrong::Surroundings,
                    TurnError::Format(_) => Wrong::Work,
                },
                ..Self::error(without_nul(&error.told()))
            },
        }
    }

    /// A whole answer, or one that was cut off: that is no success.
    pub(super) fn of(step: &Step) -> Self {
        match step.reason {
            FinishReason::Stop | FinishReason::ToolCalls => Self::finished(),
            FinishReason::Length => Self {
                wrong: Wrong::Limit,
                ..Self::error("The model's answer was cut off at its token limit.".to_owned())
            },
            FinishReason::ContentFilter => Self {
                wrong: Wrong::Limit,
                ..Self::error("The provider's filter cut the model's answer off.".to_owned())
            },
        }
    }

    /// The same, unless nothing came of the run: neither a word nor a deed is no work.
    pub(super) fn unless_empty(self, answer: &str, tool_calls: usize) -> Self {
        if self.is_success() && tool_calls == 0 && answer.trim().is_empty() {
            return Self {
                wrong: Wrong::Work,
                ..Self::error("The model's answer was empty.".to_owned())
            };
        }
        self
    }

    fn is_success(&self) -> bool {
        self.reason == EndReason::Finished
    }
}

/// How long the provider asks for, within reason: what it refuses meanwhile would use the retries up.
fn rest_after(error: &TurnError) -> Duration {
    match error {
        TurnError::Provider(ProviderError::RateLimited { retry_after }) => {
            retry_after.unwrap_or_default().min(LONGEST_REST)
        }
        _ => Duration::ZERO,
    }
}

/// A run that has come to its end.
pub(super) struct Conclusion<'a> {
    pub(super) held: &'a Held,
    pub(super) settings: &'a Settings,
    pub(super) recorder: Recorder<'a>,
    pub(super) ending: Ending,
    pub(super) started_at: DateTime<Utc>,
}

impl Conclusion<'_> {
    /// Records the end of a task's run, and says whether the task goes on under the same lease. A database that is away is waited for.
    pub(super) async fn record(mut self, task: Task) -> Result<Option<Task>> {
        self.recorder.write().await?;
        let last = self.recorder.last_step();
        let mut patience = Patience::default();
        // What a mission's task leads to is read from what is held.
        let mut hold = match task.mission {
            None => Hold::Later,
            Some(_) => Hold::Now,
        };
        loop {
            match self.attempt(hold, &task, last.clone()).await {
                Err(WorkError::Stale) => hold = Hold::Now,
                Err(WorkError::Unavailable(error)) => patience.wait(self.held, error).await?,
                concluded => return concluded,
            }
        }
    }

    async fn attempt(
        &self,
        hold: Hold,
        before: &Task,
        last: Option<NewStep>,
    ) -> Result<Option<Task>> {
        let lease = &self.held.lease;
        let mut tx = lease.db.begin();
        let mut task = match hold {
            Hold::Later => {
                tx.assume(lease, before);
                before.clone().restored(before.status())
            }
            Hold::Now => tx.lock_task_under(lease, before.id).await?,
        };
        if task.status() != Status::InProgress || task.run != before.run {
            return Err(WorkError::LeaseLost);
        }
        let status = if self.ending.is_success() {
            RunStatus::Finished
        } else {
            RunStatus::Failed
        };
        tx.end_run(self.recorder.run, status, last);
        self.tell_end(&mut task);
        if self.ending.is_success() {
            self.succeed(tx, task, before).await
        } else {
            self.fail(tx, task).await
        }
    }

    /// Work that was finished is judged, if there is anything to judge it by.
    async fn succeed(
        &self,
        mut tx: ProjectTx,
        mut task: Task,
        before: &Task,
    ) -> Result<Option<Task>> {
        let (db, settings) = (&self.held.lease.db, self.settings);
        let recorder = &self.recorder;
        // What has acted on the outside world is not begun anew by itself.
        let acted = task.document.side_effects && recorder.tool_calls > 0;
        task.document.may_be_question = may_be_question(&recorder.answer, recorder.tool_calls)
            && !acted
            && task.document.question_rounds < settings.max_question_rounds;
        task.document.phase = Some(Phase::Review);
        // What it was told to hand over: whatever was changed since is for its next run.
        let expected = before.document.expected_outcomes.as_deref();
        let missing = missing_outcomes(expected.unwrap_or_default(), &task.document.outcomes);
        if missing.is_empty()
            && let Some(closed) = gate_before_review(settings, &task)
        {
            let hook = Hook::AssessmentRun;
            let rests = lifecycle::wait_for_person(&mut tx, db, &mut task, &closed, hook).await?;
            return commit(self.held, tx, task, rests).await;
        }
        task.go(Status::Review)
            .map_err(|error| WorkError::Defect(error.into()))?;
        let aftermath = if !missing.is_empty() {
            let wrong = Wrong::Work(format!(
                "These required outcomes were not handed over with `register_outcome`: {}.",
                missing.join(", ")
            ));
            let (failure, pause) = (Failure::Review, pause(self.held));
            after_failure(&mut tx, db, &mut task, settings, failure, &wrong, pause).await?
        } else if task.document.expectations.is_empty() && !task.document.may_be_question {
            lifecycle::complete(&mut tx, db, &mut task, settings).await?
        } else {
            lifecycle::save(&mut tx, db, &mut task).await?;
            tx.commit().await?;
            return Ok(Some(task));
        };
        commit(self.held, tx, task, aftermath).await
    }

    async fn fail(&self, mut tx: ProjectTx, mut task: Task) -> Result<Option<Task>> {
        if let Some(timeout) = self.ending.most {
            let result = task.document.result.as_ref();
            let elapsed = result.map_or(0, |result| result.duration);
            let told = json!({"elapsed": elapsed, "timeout": timeout});
            task.tell("task:timeout", told);
        }
        let (db, settings) = (&self.held.lease.db, self.settings);
        let wrong = (self.ending.wrong)(self.ending.sentence.clone());
        let backoff = pause(self.held);
        let pause = |retries| backoff(retries).max(self.ending.rest);
        let failure = Failure::Run;
        let aftermath: Aftermath =
            after_failure(&mut tx, db, &mut task, settings, failure, &wrong, pause).await?;
        commit(self.held, tx, task, aftermath).await
    }

    fn tell_end(&self, task: &mut Task) {
        let history = TaskResult::history(task.document.result.take());
        let result = TaskResult {
            exit_code: i32::from(!self.ending.is_success()),
            stdout: self.recorder.answer.clone(),
            stderr: self.ending.sentence.clone(),
            duration: (Utc::now() - self.started_at).num_milliseconds(),
            reason: self.ending.reason,
            cause: self.ending.cause.clone(),
            assessment: None,
            assessment_history: history,
        };
        let outcomes = &mut task.document.outcomes;
        outcomes.clone_from(&self.recorder.outcomes);
        task.document.defects = 0;
        lifecycle::tell_run_ended(task, self.recorder.run, &result);
        task.document.result = Some(result);
    }
}

/// The gate between an agent that has finished and the judgement of its work, if one stands there. Those at `assessment:run` are asked about
/// when it is about to be judged, which not all work is.
pub(super) fn gate_before_review(settings: &Settings, task: &Task) -> Option<Closed> {
    let (gates, step) = (
        &settings.approval_gates,
        (Status::InProgress, Status::Review),
    );
    Gate::closed_at_step(gates, &[Hook::TaskTransition], task, step, &json!({}))
}

/// A database that is away for a moment must not cost an answer that was paid for.
#[derive(Debug, Default)]
pub(super) struct Patience(u32);

impl Patience {
    pub(super) async fn wait(&mut self, held: &Held, error: anyhow::Error) -> Result<()> {
        self.0 += 1;
        held.pulse.beat();
        if self.0 > 150 || held.lost.is_cancelled() || held.app.stop_turns.is_cancelled() {
            return Err(WorkError::Unavailable(error));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        Ok(())
    }
}

/// Whether an answer may be a question instead of work (contract 2.6.3, step 5).
fn may_be_question(answer: &str, tool_calls: usize) -> bool {
    let lines: Vec<&str> = answer
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let last = &lines[lines.len().saturating_sub(3)..];
    answer.chars().count() <= 2_000 && tool_calls < 5 && last.iter().any(|line| line.contains('?'))
}

/// The required outcomes that were not handed over, neither under their label nor as what they are to be.
fn missing_outcomes(expected: &[ExpectedOutcome], there: &[Outcome]) -> Vec<String> {
    expected
        .iter()
        .filter(|expected| expected.required && !there.iter().any(|one| expected.is_met_by(one)))
        .map(|expected| format!("\"{}\" (`{}`)", expected.label, expected.kind.as_str()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_answer_that_ends_in_a_question_may_be_one() {
        let long = format!("{}?", "ö".repeat(2_000));
        for (answer, tool_calls, expected) in [
            ("Which colour?", 0, true),
            ("Which colour?\n\n", 4, true),
            ("Which colour?", 5, false),
            ("Why?\na\nb\nc", 0, false),
            ("It is blue.", 0, false),
            (long.as_str(), 0, false),
            ("", 0, false),
        ] {
            assert_eq!(
                may_be_question(answer, tool_calls),
                expected,
                "{answer:.20}"
            );
        }
    }
}
