//! How many requests a key may make in a second.

use std::num::NonZeroU32;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue};
use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::keyed::DefaultKeyedStateStore;
use governor::{Quota, RateLimiter};
use uuid::Uuid;

/// The request rate of every key, kept by each process for itself.
#[derive(Debug)]
pub struct Limits {
    per_second: u32,
    limiter: Option<
        RateLimiter<Uuid, DefaultKeyedStateStore<Uuid>, DefaultClock, StateInformationMiddleware>,
    >,
}

/// What is left of a key's rate.
#[derive(Debug)]
pub enum Allowance {
    /// There is no limit.
    Unlimited,
    /// Go on.
    Granted {
        /// Requests per second.
        limit: u32,
        /// How many more may come at once.
        remaining: u32,
    },
    /// Come back later.
    Refused {
        /// Requests per second.
        limit: u32,
        /// When one more may come.
        retry_after: Duration,
    },
}

impl Limits {
    /// At most `per_second` requests of one key in a second; 0 is no limit.
    pub fn new(per_second: u32) -> Self {
        let limiter = NonZeroU32::new(per_second).map(|rate| {
            RateLimiter::keyed(Quota::per_second(rate))
                .with_middleware::<StateInformationMiddleware>()
        });
        Self {
            per_second,
            limiter,
        }
    }

    /// Counts one request of a key.
    pub fn take(&self, key: Uuid) -> Allowance {
        let Some(limiter) = &self.limiter else {
            return Allowance::Unlimited;
        };
        match limiter.check_key(&key) {
            Ok(state) => Allowance::Granted {
                limit: self.per_second,
                remaining: state.remaining_burst_capacity(),
            },
            Err(refused) => Allowance::Refused {
                limit: self.per_second,
                retry_after: refused.wait_time_from(DefaultClock::default().now()),
            },
        }
    }

    /// Forgets keys that have been quiet, so that memory follows the keys in use.
    pub fn sweep(&self) {
        if let Some(limiter) = &self.limiter {
            limiter.retain_recent();
            limiter.shrink_to_fit();
        }
    }
}

impl Allowance {
    /// Writes the headers of contract 1.5.
    pub fn write(&self, headers: &mut HeaderMap) {
        let (limit, remaining) = match self {
            Self::Unlimited => return,
            Self::Granted { limit, remaining } => (*limit, *remaining),
            Self::Refused { limit, .. } => (*limit, 0),
        };
        headers.insert("x-ratelimit-limit", HeaderValue::from(limit));
        headers.insert("x-ratelimit-remaining", HeaderValue::from(remaining));
    }
}
