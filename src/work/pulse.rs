//! Whether a job comes further.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::POISONED;

/// When a job last came further, and whether it waits for a model, a tool or a receiver, which have times of their own. Whenever it waits for none of them it waits
/// for the database, and if that takes long, for a connection that is dead.
#[derive(Debug)]
pub(super) struct Pulse(Mutex<Beat>);

#[derive(Debug)]
struct Beat {
    at: Instant,
    /// For how many the job waits.
    away: usize,
}

impl Pulse {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Beat {
            at: Instant::now(),
            away: 0,
        }))
    }

    /// The job comes further.
    pub(super) fn beat(&self) {
        self.0.lock().expect(POISONED).at = Instant::now();
    }

    /// Waits for something other than the database.
    pub(super) async fn away<T>(&self, waited_for: impl Future<Output = T>) -> T {
        self.0.lock().expect(POISONED).away += 1;
        let _away = Away(self);
        waited_for.await
    }

    /// Waits until the job has not come further for so long.
    pub(super) async fn stopped(&self, patience: Duration) {
        loop {
            let now = Instant::now();
            let next = self.next(now, patience);
            if next <= now {
                return;
            }
            sleep_until(next).await;
        }
    }

    /// When the job will have stopped, or it is time to look again.
    fn next(&self, now: Instant, patience: Duration) -> Instant {
        let beat = self.0.lock().expect(POISONED);
        let since = if beat.away > 0 { now } else { beat.at };
        since + patience
    }
}

/// A wait, until it is dropped.
struct Away<'a>(&'a Pulse);

impl Drop for Away<'_> {
    fn drop(&mut self) {
        let mut beat = self.0.0.lock().expect(POISONED);
        beat.away -= 1;
        beat.at = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_job_that_waits_for_the_database_alone_stops_and_another_does_not() {
        let patience = Duration::from_secs(60);
        let pulse = Pulse::new();
        let later = Instant::now() + patience * 2;
        assert!(pulse.next(later, patience) < later);
        let mut away = Box::pin(pulse.away(std::future::pending::<()>()));
        assert!(futures::poll!(away.as_mut()).is_pending());
        assert_eq!(pulse.next(later, patience), later + patience);
        let before = Instant::now();
        drop(away);
        assert!(pulse.next(later, patience) >= before + patience);
        assert!(pulse.next(later, patience) < later);
        let before = Instant::now();
        pulse.beat();
        assert!(pulse.next(later, patience) >= before + patience);
    }
}
