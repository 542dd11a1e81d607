//! The places of a process: how many jobs it does at once, and whose.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::{Notify, Semaphore};
use uuid::Uuid;

use super::POISONED;
use crate::store::{Claimed, Lane, Room, World};

/// How many times what is left free a project may have: with three, one alone has three quarters of all, another that comes then three
/// quarters of the rest, and so on; the last place is anyone's who has none. (Choudhury and Hahne, "Dynamic queue length thresholds in a shared-memory packet
/// switch", 1998.)
const SHARE: usize = 3;

/// The places of a lane.
#[derive(Debug)]
pub(super) struct Places {
    pub(super) lane: Lane,
    count: usize,
    pub(super) free: Arc<Semaphore>,
    /// How many each project has.
    taken: Mutex<HashMap<Uuid, usize>>,
    /// Held while jobs are claimed for the places that are free, so that both worlds do not claim for the same ones.
    pub(super) claiming: tokio::sync::Mutex<()>,
    /// Whether there may have been more in a world at the last claim than there was room for, of a project or in all.
    behind: [AtomicBool; 2],
    /// Told when a place comes free that someone waits for.
    pub(super) freed: Notify,
}

impl Places {
    pub(super) fn new(lane: Lane, count: usize) -> Arc<Self> {
        Arc::new(Self {
            lane,
            count,
            free: Arc::new(Semaphore::new(count)),
            taken: Mutex::default(),
            claiming: tokio::sync::Mutex::default(),
            behind: Default::default(),
            freed: Notify::new(),
        })
    }

    /// How many places must be free for a claim while there is more than there is room for. Timers are over so soon that to claim
    /// them one by one, as places come free, would cost more than they do.
    pub(super) fn batch(&self) -> usize {
        if self.lane == Lane::Timers {
            self.count / 4
        } else {
            1
        }
    }

    pub(super) fn behind(&self, world: World) -> &AtomicBool {
        match world {
            World::Live => &self.behind[0],
            World::Test => &self.behind[1],
        }
    }

    /// What a claim of up to so many jobs may take. Timers have their places for a moment, and need no shares.
    pub(super) fn room(&self, world: World, most: usize) -> Room {
        let taken = self.taken.lock().expect(POISONED);
        let free = self.free.available_permits();
        if self.lane == Lane::Timers {
            return Room::of(free.min(most));
        }
        let room = shares(free, most, &taken);
        if room.of_some.values().any(|most| *most == 0) {
            // While this is locked: whoever leaves from now on tells of it.
            self.behind(world).store(true, Ordering::Relaxed);
        }
        room
    }

    pub(super) fn take(&self, project: Uuid) {
        let mut taken = self.taken.lock().expect(POISONED);
        *taken.entry(project).or_default() += 1;
    }

    /// Gives back a place that a project had, after it was freed.
    pub(super) fn leave(&self, project: Uuid) {
        let mut taken = self.taken.lock().expect(POISONED);
        if let Some(count) = taken.get_mut(&project) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&project);
            }
        }
        drop(taken);
        let waited_for = World::ALL.iter().any(|world| self.is_crowded(*world));
        // Twice as many, as two may come free at the same time.
        if waited_for || self.free.available_permits() <= 2 * self.batch() {
            self.freed.notify_waiters();
        }
    }

    /// Whether there may be more of a world than there is room for.
    pub(super) fn is_crowded(&self, world: World) -> bool {
        self.behind(world).load(Ordering::Relaxed)
    }
}

/// Whether a claim has left nothing that is ready from its cursor on: no project had more than its share.
pub(super) fn is_drained(claimed: &Claimed, room: &Room) -> bool {
    let mut of_project: HashMap<Uuid, usize> = HashMap::new();
    for lease in &claimed.leases {
        *of_project.entry(lease.db.project()).or_default() += 1;
    }
    let share = (room.most / claimed.projects.max(1)).max(1);
    claimed.projects < room.most
        && of_project
            .iter()
            .all(|(project, count)| *count < share.min(room.of_project(*project)))
}

/// What of the free places a claim may take, and each project, so that afterwards nobody has more than [`SHARE`] times what is left.
fn shares(free: usize, most: usize, taken: &HashMap<Uuid, usize>) -> Room {
    let share = |taken: usize| (SHARE * free).saturating_sub(taken) / (SHARE + 1);
    let of_one = share(0).max(1);
    Room {
        most: most.min(of_one).min(free),
        of_one,
        of_some: taken
            .iter()
            .map(|(project, taken)| (*project, share(*taken)))
            .filter(|(_, share)| *share < of_one.min(most))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Claims, as often as anyone gets something, for projects that want as many places as they can have.
    fn fill(places: usize, taken: &mut HashMap<Uuid, usize>, projects: &[Uuid]) -> usize {
        loop {
            taken.retain(|_, count| *count > 0);
            let free = places - taken.values().sum::<usize>();
            let room = shares(free, 64, taken);
            let sharing = projects
                .iter()
                .filter(|id| room.of_project(**id) > 0)
                .count();
            let share = (room.most / sharing.max(1)).max(1);
            let mut left = room.most;
            for project in projects {
                let got = share.min(room.of_project(*project)).min(left);
                *taken.entry(*project).or_default() += got;
                left -= got;
            }
            if left == room.most {
                return free;
            }
        }
    }

    #[test]
    fn one_alone_has_three_quarters_and_keeps_to_them() {
        let project = Uuid::now_v7();
        for (places, expect) in [(256, 192), (100, 75), (10, 7), (4, 3), (1, 1)] {
            let mut taken = HashMap::new();
            fill(places, &mut taken, &[project]);
            assert_eq!(taken[&project], expect, "of {places}");
            for _ in 0..20 {
                *taken.entry(project).or_default() -= 1;
                fill(places, &mut taken, &[project]);
                assert_eq!(taken[&project], expect, "of {places}");
            }
        }
    }

    #[test]
    fn who_comes_later_finds_a_place() {
        let projects = [(); 4].map(|()| Uuid::now_v7());
        let mut taken = HashMap::new();
        // Two that came at once leave something too.
        let mut free = fill(256, &mut taken, &projects[..2]);
        assert!((16..=64).contains(&free), "{free}: {taken:?}");
        for count in 3..=4 {
            let before = free;
            free = fill(256, &mut taken, &projects[..count]);
            assert!(
                free < before && taken[&projects[count - 1]] > 0,
                "{taken:?}"
            );
        }
    }
}
