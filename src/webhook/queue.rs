//! The deliveries of one webhook that are still to be made, and which of them may go out now.

use std::collections::{BTreeSet, HashMap, VecDeque};

use chrono::{DateTime, Utc};

use crate::ids::{Delivery, Id};

/// A delivery that is still to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its id.
    pub id: Id<Delivery>,
    /// The number of its event.
    pub seq: i64,
    /// What its event is about.
    pub resource: String,
    /// How often it was tried.
    pub attempts: i32,
    /// When it was tried first.
    pub first_attempt_at: Option<DateTime<Utc>>,
    /// When it may be tried next.
    pub next_at: DateTime<Utc>,
    /// What is sent, if it is at hand.
    pub body: Option<String>,
}

/// Deliveries in order: of one resource, one at a time, the earliest first; resources do not wait for each other.
#[derive(Debug, Default)]
pub struct Queue {
    resources: HashMap<String, Resource>,
    /// The first of each resource that is not out, by when it may go.
    waiting: BTreeSet<(DateTime<Utc>, i64, String)>,
    count: usize,
    /// Those of resources whose first has failed.
    held_up: usize,
}

#[derive(Debug, Default)]
struct Resource {
    items: VecDeque<Item>,
    /// Whether the first is out.
    is_out: bool,
}

impl Resource {
    /// How many wait because the first has failed.
    fn held_up(&self) -> usize {
        let has_failed = self.items.front().is_some_and(|first| first.attempts > 0);
        if has_failed { self.items.len() } else { 0 }
    }
}

impl Queue {
    /// How many deliveries are still to be made, those that are out among them.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is nothing left.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many are not held up by a failure.
    pub fn ready(&self) -> usize {
        self.count - self.held_up
    }

    /// Adds a delivery that comes after all of its resource that were added before.
    pub fn push(&mut self, item: Item) {
        let resource = self.resources.entry(item.resource.clone()).or_default();
        if resource.items.is_empty() {
            self.waiting
                .insert((item.next_at, item.seq, item.resource.clone()));
        }
        let before = resource.held_up();
        resource.items.push_back(item);
        self.held_up += resource.held_up() - before;
        self.count += 1;
    }

    /// When the next one may go out; `None` when nothing is left that is not out.
    pub fn next_at(&self) -> Option<DateTime<Utc>> {
        self.waiting.first().map(|(at, _, _)| *at)
    }

    /// Takes one that may go out; its resource waits until it is [`Queue::done`] or [`Queue::again`].
    pub fn take(&mut self, now: DateTime<Utc>) -> Option<Item> {
        if self.next_at()? > now {
            return None;
        }
        let (_, _, name) = self.waiting.pop_first()?;
        let resource = self.resources.get_mut(&name)?;
        resource.is_out = true;
        // The queue keeps all but the body, which may be large.
        let first = resource.items.front_mut()?;
        let body = first.body.take();
        Some(Item {
            body,
            ..first.clone()
        })
    }

    /// The one that is out of this resource was delivered or given up: the next may go.
    pub fn done(&mut self, name: &str) {
        let Some(resource) = self.resources.get_mut(name).filter(|one| one.is_out) else {
            return;
        };
        resource.is_out = false;
        self.held_up -= resource.held_up();
        resource.items.pop_front();
        self.held_up += resource.held_up();
        self.count -= 1;
        match resource.items.front() {
            Some(next) => {
                self.waiting
                    .insert((next.next_at, next.seq, name.to_owned()));
            }
            None => {
                self.resources.remove(name);
            }
        }
    }

    /// The one that is out of this resource is to be tried again.
    pub fn again(&mut self, name: &str, tried_at: DateTime<Utc>, next_at: DateTime<Utc>) {
        let Some(resource) = self.resources.get_mut(name).filter(|one| one.is_out) else {
            return;
        };
        resource.is_out = false;
        self.held_up -= resource.held_up();
        if let Some(first) = resource.items.front_mut() {
            first.attempts += 1;
            first.first_attempt_at.get_or_insert(tried_at);
            first.next_at = next_at;
            self.waiting.insert((next_at, first.seq, name.to_owned()));
        }
        self.held_up += resource.held_up();
    }
}

#[cfg(test)]
mod tests {
    use chrono::Duration;
    use proptest::prelude::*;

    use super::*;

    fn item(seq: i64, resource: u8, now: DateTime<Utc>) -> Item {
        Item {
            id: Id::new(),
            seq,
            resource: resource.to_string(),
            attempts: 0,
            first_attempt_at: None,
            next_at: now,
            body: None,
        }
    }

    proptest! {
        /// Whatever fails and however often: each is delivered once, in order within its resource, with one of a
        /// resource out at a time, and none before its time.
        #[test]
        fn all_are_delivered_in_the_order_of_their_resource(
            resources in prop::collection::vec(0u8..5, 1..60),
            failures in prop::collection::vec(any::<bool>(), 0..80),
            most in 1usize..8,
        ) {
            let mut now = DateTime::UNIX_EPOCH;
            let mut queue = Queue::default();
            for (seq, resource) in (0..).zip(&resources) {
                queue.push(item(seq, *resource, now));
            }
            let mut failures = failures.into_iter();
            let mut out: VecDeque<Item> = VecDeque::new();
            let mut delivered: HashMap<String, Vec<i64>> = HashMap::new();
            while !queue.is_empty() {
                while out.len() < most && let Some(item) = queue.take(now) {
                    prop_assert!(item.next_at <= now);
                    prop_assert!(out.iter().all(|other| other.resource != item.resource));
                    out.push_back(item);
                }
                match out.pop_front() {
                    Some(item) if failures.next() == Some(true) => {
                        queue.again(&item.resource, now, now + Duration::seconds(item.seq % 7));
                    }
                    Some(item) => {
                        queue.done(&item.resource);
                        delivered.entry(item.resource).or_default().push(item.seq);
                    }
                    None => now = queue.next_at().unwrap(),
                }
            }
            prop_assert_eq!((queue.next_at(), queue.ready()), (None, 0));
            prop_assert_eq!(delivered.values().map(Vec::len).sum::<usize>(), resources.len());
            prop_assert!(delivered.values().all(|seqs| seqs.is_sorted()));
        }
    }

    #[test]
    fn a_failed_one_holds_up_its_own_resource_alone() {
        let now = DateTime::UNIX_EPOCH;
        let mut queue = Queue::default();
        for (seq, resource) in [(1, 1), (2, 1), (3, 2)] {
            queue.push(item(seq, resource, now));
        }
        let first = queue.take(now).unwrap();
        queue.again(&first.resource, now, now + Duration::seconds(5));
        assert_eq!(queue.take(now).unwrap().seq, 3);
        assert_eq!(queue.take(now), None);
        assert_eq!((queue.len(), queue.ready()), (3, 1));
        let again = queue.take(now + Duration::seconds(5)).unwrap();
        assert_eq!(
            (again.seq, again.attempts, again.first_attempt_at),
            (1, 1, Some(now))
        );
        queue.done("1");
        assert_eq!(queue.take(now).unwrap().seq, 2);
        assert_eq!((queue.len(), queue.ready()), (2, 2));
    }
}
