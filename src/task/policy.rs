//! What follows a failure: mend, try again, hand over, ask a person, or give up (contract 2.6.4).

use std::time::Duration;

use serde_json::json;

use super::settings::{EscalationLevel, Handler, Settings};
use super::{Bypass, Phase, Status, Task};

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The run itself.
    Run,
    /// The review of finished work.
    Review,
}

/// What is to be done about a failed task.
#[derive(Debug, Clone, PartialEq)]
pub enum Follow {
    /// The agent mends its work, at once.
    Fix,
    /// Another attempt, after a pause.
    Retry,
    /// It touches the outside world: a person looks at it first.
    Blocked,
    /// The escalation policy has a level for it.
    Escalate(Level),
    /// It has failed.
    GiveUp,
}

/// A level of the escalation policy.
pub type Level = EscalationLevel;

/// The pause before the next attempt: `base`, doubled with each full retry up to a minute, and up to half of it
/// more or less by `chance`, which is from 0 to 1.
pub fn backoff(base: Duration, retries: u32, chance: f64) -> Duration {
    let doubled = base.saturating_mul(1 << retries.saturating_sub(1).min(16));
    doubled.min(Duration::from_secs(60)).mul_f64(0.5 + chance)
}

impl Task {
    /// Decides what follows a failure. Changes nothing.
    pub fn after(&self, failure: Failure, settings: &Settings) -> Follow {
        let document = &self.document;
        if document.side_effects {
            Follow::Blocked
        } else if failure == Failure::Review && document.fix_attempts < settings.max_fix_attempts {
            Follow::Fix
        } else if document.retries < document.max_retries {
            Follow::Retry
        } else {
            match self.next_level(settings) {
                Some(level) => Follow::Escalate(level),
                None => Follow::GiveUp,
            }
        }
    }

    /// The level of the escalation policy that comes next. It begins at the first that is not an agent's, because
    /// agents were tried already.
    pub fn next_level(&self, settings: &Settings) -> Option<Level> {
        let mut levels = settings.escalation_policy.as_ref()?.levels.clone();
        levels.sort_by_key(|level| level.level);
        match self.document.escalation_level {
            None => levels
                .into_iter()
                .find(|level| level.handler != Handler::Agent),
            Some(reached) => levels.into_iter().find(|level| level.level > reached),
        }
    }

    /// The level of the escalation policy that it has reached, if the project still has it.
    pub fn level<'a>(&self, settings: &'a Settings) -> Option<&'a Level> {
        let reached = self.document.escalation_level?;
        let levels = &settings.escalation_policy.as_ref()?.levels;
        levels.iter().find(|level| level.level == reached)
    }

    /// The agent mends its work; no retry is used.
    pub fn begin_fix(&mut self, settings: &Settings, feedback: String) -> bool {
        self.document.fix_attempts += 1;
        let attempt = self.document.fix_attempts;
        self.tell(
            "task:fix",
            json!({"attempt": attempt, "maxFix": settings.max_fix_attempts}),
        );
        self.begin_again(Phase::Fix, Some(feedback), "fix");
        self.bypass(Bypass::Fix)
    }

    /// A full retry. `superior` is who takes over an escalated attempt when the policy names nobody: the agent that
    /// this one reports to, if there is one.
    ///
    /// # Errors
    /// When the task cannot fail from where it stands.
    pub fn begin_retry(
        &mut self,
        feedback: Option<String>,
        fallback: Option<String>,
    ) -> Result<(), super::IllegalStep> {
        let attempt = self.document.retries + 1;
        let max = self.document.max_retries;
        self.retry()?;
        self.document.fix_attempts = 0;
        self.tell("task:retry", json!({"attempt": attempt, "maxRetries": max}));
        if self.is_escalated(attempt) {
            if let Some(agent) = fallback {
                self.assign_to = agent;
            }
            let policy = self.document.retry_policy.as_ref();
            self.document.model = policy.and_then(|policy| policy.escalate_model.clone());
        }
        self.begin_again(Phase::Execution, feedback, "retry");
        Ok(())
    }

    /// Whether this attempt is someone else's.
    pub fn is_escalated(&self, attempt: u32) -> bool {
        let policy = self.document.retry_policy.as_ref();
        policy
            .and_then(|policy| policy.escalate_after)
            .is_some_and(|after| attempt >= after)
    }

    /// Forgets what belongs to the attempt before.
    pub fn begin_again(&mut self, phase: Phase, feedback: Option<String>, trigger: &str) {
        self.document.phase = Some(phase);
        self.document.feedback = feedback;
        self.document.trigger = Some(trigger.to_owned());
        self.document.outcomes.clear();
        self.document.passed_gates.clear();
        self.document.defects = 0;
        self.run = None;
    }

    /// Gives up: `failed`, for good.
    pub fn give_up(&mut self) {
        if !self.status().is_terminal() && self.go(Status::Failed).is_err() {
            self.bypass(Bypass::Stopped);
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::Utc;

    use super::super::settings::Escalation;
    use super::super::{Document, RetryPolicy};
    use super::*;

    fn task(max_retries: u32) -> Task {
        let document = Document {
            max_retries,
            ..Document::default()
        };
        Task::new("t".to_owned(), "a".to_owned(), document, Utc::now()).restored(Status::Review)
    }

    #[test]
    fn a_bad_review_is_mended_twice_then_retried_then_given_up() {
        let settings = Settings::default();
        let mut task = task(1);
        let mut seen = Vec::new();
        loop {
            let follow = task.after(Failure::Review, &settings);
            seen.push(follow.clone());
            match follow {
                Follow::Fix => assert!(task.begin_fix(&settings, "mend".to_owned())),
                Follow::Retry => task.begin_retry(None, None).unwrap(),
                _ => break,
            }
            task = task.restored(Status::Review);
        }
        use Follow::{Fix, GiveUp, Retry};
        assert_eq!(seen, [Fix, Fix, Retry, Fix, Fix, GiveUp]);
        assert_eq!(task.document.retries, 1);
    }

    #[test]
    fn a_failed_run_is_not_mended_and_one_with_side_effects_not_repeated() {
        let settings = Settings::default();
        assert_eq!(task(1).after(Failure::Run, &settings), Follow::Retry);
        assert_eq!(task(0).after(Failure::Run, &settings), Follow::GiveUp);
        let mut touching = task(3);
        touching.document.side_effects = true;
        for failure in [Failure::Run, Failure::Review] {
            assert_eq!(touching.after(failure, &settings), Follow::Blocked);
        }
    }

    #[test]
    fn an_escalated_attempt_changes_hands_and_model() {
        let mut task = task(5);
        task.document.retry_policy = Some(RetryPolicy {
            escalate_after: Some(2),
            fallback_agent: Some("b".to_owned()),
            escalate_model: Some("m".to_owned()),
        });
        task.begin_retry(None, Some("b".to_owned())).unwrap();
        assert_eq!(
            (task.assign_to.as_str(), task.document.model.as_deref()),
            ("a", None)
        );
        task = task.restored(Status::Review);
        task.begin_retry(None, Some("b".to_owned())).unwrap();
        assert_eq!(
            (task.assign_to.as_str(), task.document.model.as_deref()),
            ("b", Some("m"))
        );
    }

    #[test]
    fn escalation_begins_at_the_first_level_that_is_no_agents() {
        let level = |level, handler| EscalationLevel {
            level,
            handler,
            target: None,
            timeout_ms: None,
            notify_channels: None,
        };
        let levels = vec![
            level(3, Handler::Human),
            level(1, Handler::Agent),
            level(2, Handler::Orchestrator),
        ];
        let settings = Settings {
            escalation_policy: Some(Escalation { name: None, levels }),
            ..Settings::default()
        };
        let mut task = task(0);
        let mut reached = Vec::new();
        while let Follow::Escalate(level) = task.after(Failure::Run, &settings) {
            task.document.escalation_level = Some(level.level);
            reached.push(level.level);
        }
        assert_eq!(reached, [2, 3]);
    }

    #[test]
    fn pauses_double_up_to_a_minute_and_vary_by_half() {
        let base = Duration::from_secs(1);
        for (retries, chance, milliseconds) in [
            (1, 0.5, 1_000),
            (2, 0.5, 2_000),
            (3, 0.0, 2_000),
            (3, 1.0, 6_000),
            (40, 0.5, 60_000),
        ] {
            assert_eq!(
                backoff(base, retries, chance),
                Duration::from_millis(milliseconds),
                "{retries}"
            );
        }
    }
}
