//! What a warm request needs without asking the database: its key, its agent with
//! its memories, its credentials.
//!
//! A change is seen at once by the process that made it, which calls [`Warm::forget`], and
//! within a second by every other, which reads the `changes` tables every
//! [`POLL`]. A process that cannot read them trusts nothing it knows after [`TRUST`]:
//! a lost database must not keep a revoked key alive.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::task::Settings;

use super::{AgentRow, Db, KeyHash, KeyRow, Memories, Result, SealedCredential, World};

/// How often the `changes` tables are read.
pub(super) const POLL: Duration = Duration::from_millis(300);
/// How long after the last good read the entries are believed.
const TRUST: Duration = Duration::from_millis(900);
/// The most bytes of an agent's memories that are kept; larger ones are read each time.
const MEMORIES_KEPT: usize = 16 * 1024;
/// Entries of each kind; past it they are all dropped, which is rarer and simpler than picking one.
const MOST: usize = 10_000;

#[derive(Debug, Default)]
pub(super) struct Warm {
    entries: RwLock<Entries>,
    keys_used: RwLock<HashSet<Uuid>>,
}

/// Things that have a name in a world of a project.
#[derive(Debug)]
struct Named<T>(HashMap<(Uuid, World), HashMap<String, Arc<T>>>);

impl<T> Default for Named<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T> Named<T> {
    fn get(&self, project: Uuid, world: World, name: &str) -> Option<&Arc<T>> {
        self.0.get(&(project, world))?.get(name)
    }

    fn insert(&mut self, project: Uuid, world: World, name: &str, thing: Arc<T>) {
        if self.0.len() >= MOST {
            self.0.clear();
        }
        let things = self.0.entry((project, world)).or_default();
        if things.len() >= MOST {
            things.clear();
        }
        things.insert(name.to_owned(), thing);
    }

    fn forget(&mut self, project: Uuid) {
        for world in World::ALL {
            self.0.remove(&(project, world));
        }
    }
}

#[derive(Debug, Default)]
struct Entries {
    /// Grows with every forgetting, so that what was read before one is not kept after it.
    generation: u64,
    confirmed: Option<Instant>,
    keys: HashMap<KeyHash, Arc<KeyRow>>,
    agents: Named<AgentRow>,
    memories: Named<Memories>,
    settings: Named<Settings>,
    credentials: HashMap<Uuid, Arc<Vec<SealedCredential>>>,
    /// Whether a project has webhooks that are told of events.
    webhooks: HashMap<(Uuid, World), bool>,
    suspended: HashMap<Uuid, bool>,
    /// Numbers of the changes already acted on, per schema.
    seen: HashSet<(String, i64)>,
}

impl Entries {
    fn trusted(&self) -> bool {
        self.confirmed.is_some_and(|at| at.elapsed() < TRUST)
    }

    fn forget(&mut self, project: Uuid) {
        self.generation += 1;
        self.keys.retain(|_, key| key.project_id != project);
        self.agents.forget(project);
        self.memories.forget(project);
        self.settings.forget(project);
        self.credentials.remove(&project);
        for world in World::ALL {
            self.webhooks.remove(&(project, world));
        }
        self.suspended.remove(&project);
    }
}

const POISONED: &str = "nothing panics while it holds the warm entries";

impl Warm {
    pub(super) fn generation(&self) -> u64 {
        self.entries.read().expect(POISONED).generation
    }

    pub(super) fn forget(&self, project: Uuid) {
        self.entries.write().expect(POISONED).forget(project);
    }

    pub(super) fn key(&self, hash: &KeyHash) -> Option<Arc<KeyRow>> {
        let entries = self.entries.read().expect(POISONED);
        entries
            .keys
            .get(hash)
            .filter(|_| entries.trusted())
            .cloned()
    }

    pub(super) fn agent(&self, project: Uuid, world: World, name: &str) -> Option<Arc<AgentRow>> {
        let entries = self.entries.read().expect(POISONED);
        entries
            .agents
            .get(project, world, name)
            .filter(|_| entries.trusted())
            .cloned()
    }

    pub(super) fn memories(
        &self,
        project: Uuid,
        world: World,
        agent: &str,
    ) -> Option<Arc<Memories>> {
        let entries = self.entries.read().expect(POISONED);
        entries
            .memories
            .get(project, world, agent)
            .filter(|_| entries.trusted())
            .cloned()
    }

    pub(super) fn settings(&self, project: Uuid, world: World) -> Option<Arc<Settings>> {
        let entries = self.entries.read().expect(POISONED);
        entries
            .settings
            .get(project, world, "")
            .filter(|_| entries.trusted())
            .cloned()
    }

    pub(super) fn keep_settings(
        &self,
        generation: u64,
        project: Uuid,
        world: World,
        settings: Arc<Settings>,
    ) {
        self.keep(generation, |entries| {
            entries.settings.insert(project, world, "", settings);
        });
    }

    pub(super) fn credentials(&self, project: Uuid) -> Option<Arc<Vec<SealedCredential>>> {
        let entries = self.entries.read().expect(POISONED);
        entries
            .credentials
            .get(&project)
            .filter(|_| entries.trusted())
            .cloned()
    }

    pub(super) fn suspended(&self, project: Uuid) -> Option<bool> {
        let entries = self.entries.read().expect(POISONED);
        entries
            .suspended
            .get(&project)
            .filter(|_| entries.trusted())
            .copied()
    }

    pub(super) fn keep_suspended(&self, generation: u64, project: Uuid, suspended: bool) {
        self.keep(generation, |entries| {
            if entries.suspended.len() >= MOST {
                entries.suspended.clear();
            }
            entries.suspended.insert(project, suspended);
        });
    }

    pub(super) fn keep_key(&self, generation: u64, hash: KeyHash, key: Arc<KeyRow>) {
        self.keep(generation, |entries| {
            if entries.keys.len() >= MOST {
                entries.keys.clear();
            }
            entries.keys.insert(hash, key);
        });
    }

    pub(super) fn keep_agent(
        &self,
        generation: u64,
        project: Uuid,
        world: World,
        name: &str,
        agent: Arc<AgentRow>,
    ) {
        self.keep(generation, |entries| {
            entries.agents.insert(project, world, name, agent);
        });
    }

    pub(super) fn keep_memories(
        &self,
        generation: u64,
        project: Uuid,
        world: World,
        agent: &str,
        memories: Arc<Memories>,
    ) {
        if memories.size() > MEMORIES_KEPT {
            return;
        }
        self.keep(generation, |entries| {
            entries.memories.insert(project, world, agent, memories);
        });
    }

    pub(super) fn keep_credentials(
        &self,
        generation: u64,
        project: Uuid,
        credentials: Arc<Vec<SealedCredential>>,
    ) {
        self.keep(generation, |entries| {
            if entries.credentials.len() >= MOST {
                entries.credentials.clear();
            }
            entries.credentials.insert(project, credentials);
        });
    }

    pub(super) fn has_webhooks(&self, project: Uuid, world: World) -> Option<bool> {
        let entries = self.entries.read().expect(POISONED);
        entries
            .webhooks
            .get(&(project, world))
            .filter(|_| entries.trusted())
            .copied()
    }

    pub(super) fn keep_has_webhooks(
        &self,
        generation: u64,
        project: Uuid,
        world: World,
        has_some: bool,
    ) {
        self.keep(generation, |entries| {
            if entries.webhooks.len() >= MOST {
                entries.webhooks.clear();
            }
            entries.webhooks.insert((project, world), has_some);
        });
    }

    fn keep(&self, generation: u64, insert: impl FnOnce(&mut Entries)) {
        let mut entries = self.entries.write().expect(POISONED);
        if entries.generation == generation {
            insert(&mut entries);
        }
    }

    /// Notes that a key opened a request, for [`Db::record_key_use`].
    pub(super) fn note_use(&self, key: Uuid) {
        if !self.keys_used.read().expect(POISONED).contains(&key) {
            self.keys_used.write().expect(POISONED).insert(key);
        }
    }
}

impl Db {
    /// Keeps the warm entries true until the future is dropped: reads the `changes` tables and forgets
    /// the projects they name.
    pub async fn follow_changes(&self) {
        let mut interval = tokio::time::interval(POLL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            if let Err(error) = self.in_time(self.read_changes()).await {
                tracing::warn!(
                    "the changes of other processes cannot be read, answering from the database: {error}"
                );
            }
        }
    }

    async fn read_changes(&self) -> Result<()> {
        let asked = Instant::now();
        // Looks back further than any change takes to commit: `at` is taken before the commit.
        let changes = sqlx::query!(
            r#"select 'platform' as "schema!", seq as "seq!", project_id as "project_id!" from platform.changes where at > clock_timestamp() - interval '30 s'
            union all
            select 'production', seq, project_id from production.changes where at > clock_timestamp() - interval '30 s'
            union all
            select 'sandbox', seq, project_id from sandbox.changes where at > clock_timestamp() - interval '30 s'
            order by 1, 2"#
        )
        .fetch_all(&self.platform)
        .await?;
        let mut entries = self.warm.entries.write().expect(POISONED);
        let current: HashSet<(String, i64)> = changes
            .iter()
            .map(|change| (change.schema.clone(), change.seq))
            .collect();
        for change in changes {
            if !entries.seen.contains(&(change.schema, change.seq)) {
                entries.forget(change.project_id);
            }
        }
        entries.seen = current;
        entries.confirmed = Some(asked);
        Ok(())
    }

    /// Deletes changes that every process has long seen.
    ///
    /// # Errors
    /// When the database cannot be reached; the next call catches up.
    pub async fn prune_changes(&self) -> Result<()> {
        for pool in [&self.platform, &self.live, &self.test] {
            sqlx::query!("delete from changes where at < clock_timestamp() - interval '5 min'")
                .execute(pool)
                .await?;
        }
        Ok(())
    }

    /// Writes down when the keys noted since the last call were used.
    ///
    /// # Errors
    /// When the database cannot be reached; these uses are then not recorded.
    pub async fn record_key_use(&self) -> Result<()> {
        let used: Vec<Uuid> = self
            .warm
            .keys_used
            .write()
            .expect(POISONED)
            .drain()
            .collect();
        if used.is_empty() {
            return Ok(());
        }
        sqlx::query!(
            "update api_keys set last_used_at = now() where id = any($1)",
            &used
        )
        .execute(&self.platform)
        .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(project_id: Uuid) -> Arc<KeyRow> {
        Arc::new(KeyRow {
            id: Uuid::now_v7(),
            project_id,
            name: String::new(),
            environment: "live".to_owned(),
            prefix: String::new(),
            last_four: String::new(),
            created_at: chrono::Utc::now(),
            last_used_at: None,
        })
    }

    #[test]
    fn what_is_known_is_believed_only_while_changes_are_heard_of() {
        let warm = Warm::default();
        warm.keep_key(warm.generation(), [1; 32], key(Uuid::now_v7()));
        assert!(warm.key(&[1; 32]).is_none(), "nothing was heard yet");
        for (age, believed) in [(Duration::ZERO, true), (POLL, true), (TRUST, false)] {
            warm.entries.write().unwrap().confirmed = Instant::now().checked_sub(age);
            assert_eq!(warm.key(&[1; 32]).is_some(), believed, "{age:?}");
        }
    }

    #[test]
    fn what_was_read_before_a_change_is_not_kept_after_it() {
        let warm = Warm::default();
        warm.entries.write().unwrap().confirmed = Some(Instant::now());
        let project = Uuid::now_v7();
        let before = warm.generation();
        warm.forget(project);
        warm.keep_key(before, [1; 32], key(project));
        assert!(warm.key(&[1; 32]).is_none());
        warm.keep_key(warm.generation(), [1; 32], key(project));
        assert!(warm.key(&[1; 32]).is_some());
    }
}
