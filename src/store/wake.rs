//! Wake-ups: who waits for something to be committed is told when it is, in this process at once and in every
//! other by `NOTIFY`.
//!
//! A wake-up carries nothing and may be lost: whoever hears one looks into the database, and looks now and then
//! without one. They go out after the commit and together, because `NOTIFY` inside a transaction takes a lock
//! that all commits of the cluster queue on.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::sync::{Notify, watch};
use uuid::Uuid;

use super::{Db, Result, StoreError, World};

/// The channel that all processes listen on. Channels are per database.
const CHANNEL: &str = "polpo";
/// Wake-ups of so long a time go out together.
const GATHER: Duration = Duration::from_millis(3);
/// Chat turns of so long a time are told of together.
const GATHER_TURNS: Duration = Duration::from_millis(20);
/// Postgres takes payloads of less than 8,000 bytes.
const PAYLOAD: usize = 7_900;
/// What a process says to be heard of.
const HELLO: &str = "!";
/// What a process says when it begins to hear: who is there says so at once.
const WHO: &str = "?";
/// How long a process that has asked who is there waits before it takes itself to be alone.
const ANSWERED: Duration = Duration::from_secs(1);
/// How often it does.
const GREETS: Duration = Duration::from_secs(5);
/// How long a process that does not hear itself say so is taken to hear. Less than [`PRESENT`] by more than [`GREETS`]: who is deaf knows it
/// before it takes others to be gone.
const HEARS: Duration = Duration::from_secs(10);
/// How long a process that has said so is taken to be there.
const PRESENT: Duration = Duration::from_secs(16);
/// How soon what failed is tried again.
const AGAIN: Duration = Duration::from_millis(500);
/// How long it takes a newcomer's word to be heard by all, at most.
const HEARD: Duration = Duration::from_millis(100);
/// How long a task's words are written down after someone asked for them.
pub(super) const FOLLOWED: Duration = Duration::from_secs(15);

/// What can be waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Topic {
    /// Work of a world, due now or at a new time.
    Jobs(World),
    /// The same of couriers.
    Couriers(World),
    /// The same of timers.
    Timers(World),
    /// Events of a project.
    Events(World, Uuid),
    /// A task's unfinished words.
    Words(Uuid),
    /// Someone listens to a task.
    Listener(Uuid),
    /// A task's run is to stop.
    Stop(Uuid),
}

impl Topic {
    fn write(self, text: &mut String) {
        use std::fmt::Write;
        let written = match self {
            Self::Jobs(world) => write!(text, "j{}", letter(world)),
            Self::Couriers(world) => write!(text, "c{}", letter(world)),
            Self::Timers(world) => write!(text, "t{}", letter(world)),
            Self::Events(world, project) => write!(text, "e{}{}", letter(world), project.simple()),
            Self::Words(task) => write!(text, "w-{}", task.simple()),
            Self::Listener(task) => write!(text, "l-{}", task.simple()),
            Self::Stop(task) => write!(text, "s-{}", task.simple()),
        };
        written.expect("a String takes everything");
    }

    fn read(text: &str) -> Option<Self> {
        let world = match text.get(1..2)? {
            "p" => World::Live,
            "s" => World::Test,
            _ => World::Live,
        };
        let id = || Uuid::try_parse(text.get(2..)?).ok();
        Some(match text.get(..1)? {
            "j" => Self::Jobs(world),
            "c" => Self::Couriers(world),
            "t" => Self::Timers(world),
            "e" => Self::Events(world, id()?),
            "w" => Self::Words(id()?),
            "l" => Self::Listener(id()?),
            "s" => Self::Stop(id()?),
            _ => return None,
        })
    }
}

fn letter(world: World) -> char {
    match world {
        World::Live => 'p',
        World::Test => 's',
    }
}

/// Who waits in this process, and what other processes are still to be told.
#[derive(Debug)]
pub(super) struct Bell {
    waiting: Mutex<HashMap<Topic, watch::Sender<()>>>,
    /// Tasks that someone listens to, until when.
    followed: Mutex<HashMap<Uuid, Instant>>,
    outgoing: Mutex<HashSet<Topic>>,
    something: Notify,
    /// Projects of which this process has told events, for their couriers.
    told: Mutex<HashSet<(World, Uuid)>>,
    news: Notify,
    /// Projects whose chat turns have left events that are not in the log.
    untold: Mutex<HashSet<(World, Uuid)>>,
    turns: Notify,
    hearing: Mutex<Hearing>,
    listening: Notify,
    /// Someone has asked who is there.
    asked: Notify,
    /// Whether wake-ups are lost.
    muted: AtomicBool,
    /// Tells this process' own notifications from others'.
    origin: String,
}

/// What a process knows of who is there. While there are no others, nobody is told.
#[derive(Debug, Default)]
struct Hearing {
    /// Until when there are taken to be other processes; `None` while they could not be heard.
    others: Option<Instant>,
    /// When it last heard itself: who does not may be deaf.
    itself: Option<Instant>,
}

const POISONED: &str = "nothing panics while it holds the bell";

impl Default for Bell {
    fn default() -> Self {
        Self {
            waiting: Mutex::default(),
            followed: Mutex::default(),
            outgoing: Mutex::default(),
            something: Notify::new(),
            told: Mutex::default(),
            news: Notify::new(),
            untold: Mutex::default(),
            turns: Notify::new(),
            hearing: Mutex::default(),
            listening: Notify::new(),
            asked: Notify::new(),
            muted: AtomicBool::new(false),
            origin: Uuid::now_v7().simple().to_string(),
        }
    }
}

impl Bell {
    pub(super) fn wait(&self, topic: Topic) -> watch::Receiver<()> {
        let mut waiting = self.waiting.lock().expect(POISONED);
        if waiting.len() > 1024 && waiting.len().is_power_of_two() {
            waiting.retain(|_, sender| sender.receiver_count() > 0);
        }
        waiting
            .entry(topic)
            .or_insert_with(|| watch::Sender::new(()))
            .subscribe()
    }

    /// Wakes this process' waiters now and the others' in a moment.
    pub(super) fn ring(&self, topic: Topic) {
        if self.muted.load(Ordering::Relaxed) {
            return;
        }
        self.ring_here(topic);
        self.outgoing.lock().expect(POISONED).insert(topic);
        self.something.notify_one();
        if let Topic::Events(world, project) = topic {
            self.told.lock().expect(POISONED).insert((world, project));
            self.news.notify_one();
        }
    }

    /// A project's chat turns have left events that are to go into the log.
    pub(super) fn ring_for_untold(&self, world: World, project: Uuid) {
        if !self.muted.load(Ordering::Relaxed) {
            self.untold.lock().expect(POISONED).insert((world, project));
            self.turns.notify_one();
        }
    }

    /// Wakes those who listen to a task, if anyone does.
    pub(super) fn ring_if_followed(&self, task: Uuid) {
        if self.is_followed(task) {
            self.ring(Topic::Words(task));
        }
    }

    fn is_followed(&self, task: Uuid) -> bool {
        let followed = self.followed.lock().expect(POISONED);
        followed
            .get(&task)
            .is_some_and(|at| at.elapsed() < FOLLOWED)
    }

    fn ring_here(&self, topic: Topic) {
        if let Topic::Listener(task) = topic {
            let mut followed = self.followed.lock().expect(POISONED);
            if followed.len() > 10_000 {
                followed.retain(|_, at| at.elapsed() < FOLLOWED);
            }
            followed.insert(task, Instant::now());
        }
        let mut waiting = self.waiting.lock().expect(POISONED);
        if let Some(sender) = waiting.get(&topic) {
            if sender.receiver_count() == 0 {
                waiting.remove(&topic);
            } else {
                sender.send_replace(());
            }
        }
    }

    fn ring_all_here(&self) {
        for sender in self.waiting.lock().expect(POISONED).values() {
            sender.send_replace(());
        }
    }

    /// Another process has said something.
    fn hear(&self, now: Instant) {
        self.hearing.lock().expect(POISONED).others = Some(now + PRESENT);
    }

    /// This process has heard its own word.
    fn hear_itself(&self, now: Instant) {
        self.hearing.lock().expect(POISONED).itself = Some(now);
    }

    /// Others are heard from now on, and have been asked whether they are there.
    fn ask(&self, now: Instant) {
        let mut hearing = self.hearing.lock().expect(POISONED);
        hearing.others = Some(hearing.others.unwrap_or(now).max(now + ANSWERED));
    }

    /// Others are not heard any more.
    fn lose(&self) {
        *self.hearing.lock().expect(POISONED) = Hearing::default();
    }

    /// Whether this process has heard for long enough that there is no other.
    pub(super) fn is_alone(&self, now: Instant) -> bool {
        let hearing = self.hearing.lock().expect(POISONED);
        hearing.others.is_some_and(|until| until < now)
            && hearing.itself.is_some_and(|at| now < at + HEARS)
    }

    fn take_outgoing(&self) -> Vec<String> {
        let topics = std::mem::take(&mut *self.outgoing.lock().expect(POISONED));
        let mut payloads = vec![self.origin.clone()];
        for topic in topics {
            let mut last = payloads.last_mut().expect("there is always one");
            if last.len() + 40 > PAYLOAD {
                payloads.push(self.origin.clone());
                last = payloads.last_mut().expect("one was pushed");
            }
            last.push(' ');
            topic.write(last);
        }
        payloads
    }
}

impl Db {
    /// Waits for wake-ups of a topic; those before the call are not heard.
    pub fn wait(&self, topic: Topic) -> watch::Receiver<()> {
        self.bell.wait(topic)
    }

    /// Wakes whoever waits for a topic, in every process.
    pub fn ring(&self, topic: Topic) {
        self.bell.ring(topic);
    }

    /// Loses all wake-ups from here on, as a process does that dies after its commits. For tests.
    pub fn mute(&self) {
        self.bell.muted.store(true, Ordering::Relaxed);
    }

    /// Whether someone has asked for a task's words lately.
    pub fn is_followed(&self, task: Uuid) -> bool {
        self.bell.is_followed(task)
    }

    /// Carries wake-ups between processes, for as long as it is polled.
    pub async fn carry_wakeups(&self) {
        tokio::join!(
            self.send_wakeups(),
            self.hear_wakeups(),
            self.wake_couriers(),
            self.tell_turns(),
            self.greet()
        );
    }

    /// Makes ready the resting couriers of projects that this process has told events of. The commit itself does not:
    /// all that write events would queue on their project's couriers.
    async fn wake_couriers(&self) {
        loop {
            self.bell.news.notified().await;
            tokio::time::sleep(GATHER).await;
            let told = std::mem::take(&mut *self.bell.told.lock().expect(POISONED));
            for world in World::ALL {
                let projects = told.iter().filter(|(of, _)| *of == world);
                let projects: Vec<Uuid> = projects.map(|(_, project)| *project).collect();
                let readied = self.ready_couriers_of(world, projects);
                if let Err(error) = self.in_time(readied).await {
                    // The sweep finds them in some seconds.
                    tracing::debug!("couriers are not woken: {error}");
                }
            }
        }
    }

    /// Puts what chat turns of this process leave to be told into their projects' logs.
    async fn tell_turns(&self) {
        loop {
            self.bell.turns.notified().await;
            tokio::time::sleep(GATHER_TURNS).await;
            let untold = std::mem::take(&mut *self.bell.untold.lock().expect(POISONED));
            for (world, project) in untold {
                let door = self.project(project, world);
                match self.in_time(door.tell_untold()).await {
                    Ok(false) => {}
                    Ok(true) => self.bell.ring_for_untold(world, project),
                    // The sweep finds them in some seconds.
                    Err(error) => tracing::warn!(%project, "chat turns are told of later: {error}"),
                }
            }
        }
    }

    async fn send_wakeups(&self) {
        loop {
            self.bell.something.notified().await;
            tokio::time::sleep(GATHER).await;
            for payload in self.bell.take_outgoing() {
                if self.bell.is_alone(Instant::now()) {
                    continue;
                }
                if let Err(error) = self.in_time(self.notify(&payload)).await {
                    // The others look by themselves within half a second.
                    tracing::warn!("other processes are not woken: {error}");
                }
            }
        }
    }

    async fn notify(&self, payload: &str) -> Result<()> {
        sqlx::query_scalar!(
            r#"select pg_notify($1, $2)::text as "sent""#,
            CHANNEL,
            payload
        )
        .fetch_one(&self.platform)
        .await?;
        Ok(())
    }

    /// Says now and then that this process is there to be woken.
    async fn greet(&self) {
        loop {
            self.say(HELLO).await;
            tokio::select! {
                () = tokio::time::sleep(GREETS) => {}
                () = self.bell.asked.notified() => {}
                () = self.bell.listening.notified() => {
                    // Whoever was alone until now has told nobody: after it has heard of this one, everyone looks once more.
                    if !self.say(WHO).await {
                        tokio::time::sleep(AGAIN).await;
                        self.bell.listening.notify_one();
                        continue;
                    }
                    self.bell.ask(Instant::now());
                    tokio::time::sleep(HEARD).await;
                    self.bell.ring_all_here();
                }
            }
        }
    }

    /// Says a word to all other processes; false when it did not get out.
    async fn say(&self, word: &str) -> bool {
        let word = format!("{} {word}", self.bell.origin);
        let said = self.in_time(self.notify(&word)).await;
        if let Err(error) = &said {
            tracing::debug!("other processes do not hear of this one: {error}");
        }
        said.is_ok()
    }

    async fn hear_wakeups(&self) {
        loop {
            if let Err(error) = self.listen().await {
                tracing::warn!("wake-ups of other processes are not heard, trying again: {error}");
            }
            self.bell.lose();
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn listen(&self) -> Result<()> {
        let begun = async {
            // A listener that is dropped says so to its connection first: one that is dead keeps the place in its pool.
            let own = PgPoolOptions::new().max_connections(1);
            let own = own.connect_lazy_with(self.standing.clone());
            let mut listener = PgListener::connect_with(&own).await?;
            listener.listen(CHANNEL).await?;
            Ok(listener)
        };
        let mut listener = self.in_time(begun).await?;
        loop {
            // What was said while there was no connection is lost: everyone looks.
            self.bell.ring_all_here();
            self.bell.listening.notify_one();
            // This process hears itself too, so silence is a connection that is gone without a word.
            let silence = PRESENT + GREETS;
            while let Some(notification) = tokio::time::timeout(silence, listener.try_recv())
                .await
                .map_err(|late| StoreError::Unavailable(sqlx::Error::Io(late.into())))??
            {
                let mut words = notification.payload().split(' ');
                if words.next() == Some(&self.bell.origin) {
                    self.bell.hear_itself(Instant::now());
                } else {
                    self.bell.hear(Instant::now());
                    for word in words {
                        if word == WHO {
                            self.bell.asked.notify_one();
                        } else if let Some(topic) = Topic::read(word) {
                            self.bell.ring_here(topic);
                        }
                    }
                }
            }
            // The connection was lost; the listener makes another.
            self.bell.lose();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_reads_back_what_it_writes() {
        let id = Uuid::now_v7();
        for topic in [
            Topic::Jobs(World::Live),
            Topic::Jobs(World::Test),
            Topic::Couriers(World::Test),
            Topic::Timers(World::Live),
            Topic::Events(World::Live, id),
            Topic::Events(World::Test, id),
            Topic::Words(id),
            Topic::Listener(id),
            Topic::Stop(id),
        ] {
            let mut text = String::new();
            topic.write(&mut text);
            assert_eq!(Topic::read(&text), Some(topic), "{text}");
        }
        for text in ["", "x", "w", "w-", "e", "epnonsense"] {
            assert_eq!(Topic::read(text), None, "{text}");
        }
    }

    #[test]
    fn a_process_that_hears_of_no_other_is_alone_after_a_while() {
        let bell = Bell::default();
        let now = Instant::now();
        let moment = Duration::from_millis(1);
        assert!(!bell.is_alone(now + PRESENT * 2), "nobody could be heard");
        bell.ask(now);
        assert!(!bell.is_alone(now + ANSWERED), "others may answer yet");
        assert!(
            !bell.is_alone(now + ANSWERED + moment),
            "who does not hear itself may be deaf"
        );
        bell.hear_itself(now + ANSWERED);
        assert!(bell.is_alone(now + ANSWERED + moment));
        bell.hear(now);
        bell.hear_itself(now + GREETS);
        assert!(!bell.is_alone(now + PRESENT));
        assert!(!bell.is_alone(now + PRESENT + moment), "it went deaf");
        bell.hear_itself(now + PRESENT);
        assert!(bell.is_alone(now + PRESENT + moment));
        bell.hear(now);
        bell.ask(now + moment);
        assert!(!bell.is_alone(now + PRESENT), "one was heard before");
        bell.lose();
        assert!(!bell.is_alone(now + PRESENT * 2), "nobody can be heard");
    }

    #[tokio::test]
    async fn whoever_waits_is_woken_and_many_topics_go_out_in_several_payloads() {
        let bell = Bell::default();
        let task = Uuid::now_v7();
        let mut waiting = bell.wait(Topic::Stop(task));
        bell.ring(Topic::Stop(Uuid::now_v7()));
        assert!(!waiting.has_changed().unwrap());
        bell.ring(Topic::Stop(task));
        waiting.changed().await.unwrap();
        for _ in 0..500 {
            bell.ring(Topic::Stop(Uuid::now_v7()));
        }
        let payloads = bell.take_outgoing();
        assert!(payloads.len() > 1 && payloads.iter().all(|payload| payload.len() < 8_000));
        assert_eq!(
            payloads
                .iter()
                .map(|payload| payload.split(' ').count() - 1)
                .sum::<usize>(),
            502
        );
    }
}
