//! A database that is gone without a word: its connections neither answer nor end, until the kernel gives them up a quarter of an hour later.
//!
//! Nothing that goes on beside the requests waits for so long, and no connection that nobody waits for keeps its place in a pool.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};

use super::{Db, Result, StoreError};

/// Whether connections may be dead. A pool asks each that is given back whether it lives, and waits for the answer for as long as the kernel
/// does; meanwhile its place is taken. To ask with a bound of our own costs a round trip more, so it is done after someone has given up waiting.
#[derive(Debug, Default)]
pub(super) struct Suspicion(Mutex<Option<Instant>>);

/// How long a suspicion lasts.
const LASTS: Duration = Duration::from_secs(60);
/// How long a connection that is given back has to answer meanwhile.
const ANSWER: Duration = Duration::from_secs(2);

const POISONED: &str = "nothing panics while it holds a time";

impl Suspicion {
    fn rouse(&self) {
        *self.0.lock().expect(POISONED) = Some(Instant::now());
    }

    fn is_roused(&self) -> bool {
        let roused = *self.0.lock().expect(POISONED);
        roused.is_some_and(|at| at.elapsed() < LASTS)
    }

    /// Whether a connection that is given back may be used again: always, or it is an error, after which the pool drops it without a farewell.
    pub(super) async fn check(
        &self,
        connection: &mut PgConnection,
    ) -> std::result::Result<bool, sqlx::Error> {
        if self.is_roused() {
            let answer = tokio::time::timeout(ANSWER, connection.ping());
            answer
                .await
                .map_err(|late| sqlx::Error::Io(late.into()))??;
        }
        Ok(true)
    }
}

impl Db {
    /// Waits for what a loop of the process asks of the database, but not for ever. What was asked may still be done.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when it takes too long; else whatever was asked fails with.
    pub async fn in_time<T>(&self, asked: impl Future<Output = Result<T>>) -> Result<T> {
        let mut asked = std::pin::pin!(asked);
        match tokio::time::timeout(self.patience, asked.as_mut()).await {
            Ok(answer) => answer,
            Err(late) => {
                // Before the connection is given back, which it is with what was asked.
                self.suspect();
                Err(StoreError::Unavailable(sqlx::Error::Io(late.into())))
            }
        }
    }

    /// Someone is about to give up waiting for the database.
    pub fn suspect(&self) {
        self.suspicion.rouse();
    }
}
