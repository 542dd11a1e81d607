//! A database that is gone without a word: its connections neither answer nor end. Where nothing is under way on one the kernel never finds out, and
//! else after a quarter of an hour.
//!
//! So whoever waits for the database does it for a time ([`Db::in_time`]), and no connection that nobody waits for keeps its place in a pool.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};

use super::{Db, ProjectDb, Result, StoreError};

/// How long one waits for the database, and whether connections of it may be dead.
///
/// A pool asks each connection that is given back whether it lives, and waits for the answer for as long as the kernel does; meanwhile its place is taken.
/// To ask with a bound of our own costs a round trip more, so that is done after someone has given up waiting.
#[derive(Debug)]
pub(super) struct Silence {
    patience: Duration,
    suspected: Mutex<Option<Instant>>,
}

/// How long a suspicion lasts.
const LASTS: Duration = Duration::from_secs(60);
/// How long a connection has to show that it lives.
const ANSWER: Duration = Duration::from_secs(2);

const POISONED: &str = "nothing panics while it holds a time";

type Checked = std::result::Result<bool, sqlx::Error>;

impl Silence {
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            patience,
            suspected: Mutex::default(),
        }
    }

    fn suspect(&self) {
        *self.suspected.lock().expect(POISONED) = Some(Instant::now());
    }

    fn is_suspected(&self) -> bool {
        let suspected = *self.suspected.lock().expect(POISONED);
        suspected.is_some_and(|at| at.elapsed() < LASTS)
    }

    /// Whether a connection that is given back may be used again. Never false: an error has the pool drop it without a farewell, which it would not
    /// take.
    pub(super) async fn check_returned(&self, connection: &mut PgConnection) -> Checked {
        if self.is_suspected() {
            check(connection).await
        } else {
            Ok(true)
        }
    }

    /// The same of one that is about to be used after a rest.
    pub(super) async fn check_rested(&self, connection: &mut PgConnection) -> Checked {
        let checked = check(connection).await;
        if checked.is_err() {
            // Those beside it have rested too.
            self.suspect();
        }
        checked
    }

    async fn in_time<T>(&self, asked: impl Future<Output = Result<T>>) -> Result<T> {
        let mut asked = std::pin::pin!(asked);
        match tokio::time::timeout(self.patience, asked.as_mut()).await {
            Ok(answer) => {
                if let Err(StoreError::Unavailable(sqlx::Error::PoolTimedOut)) = answer {
                    self.suspect();
                }
                answer
            }
            Err(late) => {
                // Before the connection is given back, which it is with what was asked.
                self.suspect();
                Err(StoreError::Unavailable(sqlx::Error::Io(late.into())))
            }
        }
    }
}

async fn check(connection: &mut PgConnection) -> Checked {
    let answer = tokio::time::timeout(ANSWER, connection.ping()).await;
    answer.map_err(|late| sqlx::Error::Io(late.into()))??;
    Ok(true)
}

impl Db {
    /// Waits for what is asked of the database, but not for ever. What was asked may still be done.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when it takes too long; else whatever was asked fails with.
    pub async fn in_time<T>(&self, asked: impl Future<Output = Result<T>>) -> Result<T> {
        self.silence.in_time(asked).await
    }

    /// Someone is about to give up waiting for the database, and to leave a connection that may be dead.
    pub fn suspect(&self) {
        self.silence.suspect();
    }
}

impl ProjectDb {
    /// See [`Db::in_time`].
    ///
    /// # Errors
    /// As there.
    pub async fn in_time<T>(&self, asked: impl Future<Output = Result<T>>) -> Result<T> {
        self.silence.in_time(asked).await
    }
}
