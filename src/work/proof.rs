//! Whether a job is certainly this process' still, so that what is now done for it is done once.
//!
//! What is written is fenced by the lease; what leaves for a model or a tool is not, so it leaves only on a fresh proof of the lease.

use std::sync::Mutex;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;

use super::POISONED;
use crate::llm::Permit;
use crate::store::{Db, Holder, LONG_ENOUGH, Lease, StoreError};

/// The last proof of a lease, and how to get another.
#[derive(Debug)]
pub(super) struct Proof {
    db: Db,
    holder: Holder,
    lease: Lease,
    /// When something was asked of the database that it would not have done without the lease, and did.
    asked: Mutex<Instant>,
    /// Since when this process has its lock, if it has: without it others take its jobs at once.
    standing: watch::Receiver<Option<Instant>>,
}

impl Proof {
    pub(super) fn new(
        db: Db,
        holder: Holder,
        lease: Lease,
        asked: Instant,
        standing: watch::Receiver<Option<Instant>>,
    ) -> Self {
        Self {
            db,
            holder,
            lease,
            asked: Mutex::new(asked),
            standing,
        }
    }

    /// The database did, under the lease, what it was asked to at this time.
    pub(super) fn is_from(&self, asked: Instant) {
        *self.asked.lock().expect(POISONED) = asked;
    }

    /// After each proof so much of the lease is left that another is needed only if this process was stopped since, or held up for as long, or
    /// has lost its lock meanwhile.
    pub(super) async fn is_fresh(&self) -> Result<bool, StoreError> {
        let known = *self.asked.lock().expect(POISONED);
        let stood = self.standing.borrow().is_some_and(|since| since <= known);
        if stood && known.elapsed() < LONG_ENOUGH {
            return Ok(true);
        }
        let asked = Instant::now();
        let ours = self.renew().await?;
        if ours {
            self.is_from(asked);
        }
        Ok(ours)
    }

    /// Asks whether the lease is there, and for more of it.
    pub(super) async fn renew(&self) -> Result<bool, StoreError> {
        let extended = self.db.extend(self.holder, &self.lease);
        self.db.in_time(extended).await
    }
}

#[async_trait]
impl Permit for Proof {
    async fn is_valid(&self) -> bool {
        let fresh = self.is_fresh().await;
        if let Err(error) = &fresh {
            tracing::warn!("a lease cannot be proven, nothing is asked under it: {error}");
        }
        fresh.unwrap_or(false)
    }
}
