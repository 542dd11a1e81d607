//! The private Postgres of `polpo dev` and of the tests, made from the server programs on the machine.
//!
//! It listens on a unix socket only, in a directory that nobody else may enter. Postgres refuses to run as
//! root, so root's cluster runs as an unprivileged user, in a place that user can reach.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid};
use tokio::process::Child;

use crate::seal::sha256;

/// Why there is no cluster; a sentence that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// The machine has no Postgres server.
    #[error(
        "no PostgreSQL server programs were found: install the package `postgresql` (Debian) or set DATABASE_URL and use `polpo serve`"
    )]
    NoPrograms,
    /// Another process has the cluster.
    #[error("{} is in use by another polpo: stop that one, or choose another POLPO_HOME", .0.display())]
    InUse(PathBuf),
    /// The data belongs to another major version.
    #[error(
        "the data in {} is of PostgreSQL {found}, and this machine runs {installed}. Move it with:\n  \
         {old}/pg_ctl -D {} -w start -o \"-k {sockets}\" && {old}/pg_dumpall -h {sockets} -U postgres > polpo.sql && {old}/pg_ctl -D {} stop\n  \
         mv {} {}.old && polpo dev  # then: psql -h {sockets} -U postgres -f polpo.sql polpo",
        data.display(), data.display(), data.display(), data.display(), data.display()
    )]
    OtherVersion {
        /// Where the data is.
        data: PathBuf,
        /// Its version.
        found: String,
        /// The programs' version.
        installed: String,
        /// Where the old programs usually are.
        old: String,
        /// Where the sockets are.
        sockets: String,
    },
    /// There is no user to run it as.
    #[error(
        "Postgres may not run as root, and there is neither a user `postgres` nor `nobody` to run it as: create one"
    )]
    NoUser,
    /// A program failed.
    #[error("{program} failed: {said}")]
    Program {
        /// Which.
        program: String,
        /// The end of what it said.
        said: String,
    },
    /// A file or directory is in the way.
    #[error("{doing}: {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// What a crash of the machine may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Nothing.
    Full,
    /// Everything: for tests, which are faster for it.
    None,
}

/// A running cluster. Stop it with [`Cluster::stop`]; one that is merely dropped runs on, and the next start takes it over.
#[derive(Debug)]
pub struct Cluster {
    place: Place,
    server: Child,
    /// Held for as long as the cluster is ours.
    _lock: Flock<File>,
}

/// Where a cluster is, and who runs it.
#[derive(Debug, Clone)]
struct Place {
    programs: PathBuf,
    data: PathBuf,
    log: PathBuf,
    sockets: PathBuf,
    /// Whom root becomes.
    user: Option<User>,
}

/// Where root's clusters are whose user cannot pass through the home's parents. Beside each lies a file that names its home.
const ELSEWHERE: &str = "/var/lib/polpo";

/// How long the server may take to start or stop.
const PATIENCE: Duration = Duration::from_secs(60);

impl Cluster {
    /// Starts the cluster of this home, making it first if there is none.
    ///
    /// # Errors
    /// [`EmbeddedError`], a sentence that says what to do.
    pub async fn start(home: &Path, durability: Durability) -> Result<Self, EmbeddedError> {
        fs::create_dir_all(home).map_err(io_error("cannot create the home", home))?;
        let home = home
            .canonicalize()
            .map_err(io_error("cannot find the home", home))?;
        let lock = lock(&home)?;
        let place = Place::of(&home)?;
        place.create(durability)?;
        place.end_orphan().await?;
        let server = place.launch(durability).await?;
        Ok(Self {
            place,
            server,
            _lock: lock,
        })
    }

    /// The URL of one of its databases.
    pub fn url(&self, database: &str) -> String {
        format!(
            "postgres://postgres@localhost/{database}?host={}",
            self.place.sockets.display()
        )
    }

    /// Makes a database unless it is there.
    ///
    /// # Errors
    /// When `createdb` fails for another reason.
    pub fn ensure_database(&self, name: &str) -> Result<(), EmbeddedError> {
        let output = self.place.run("createdb", |command| {
            command
                .arg("-h")
                .arg(&self.place.sockets)
                .args(["-U", "postgres", name]);
        })?;
        if output.status.success()
            || String::from_utf8_lossy(&output.stderr).contains("already exists")
        {
            return Ok(());
        }
        Err(failure("createdb", &output))
    }

    /// The server's process id.
    pub fn pid(&self) -> Option<u32> {
        self.server.id()
    }

    /// Shuts the server down: connections are closed, and the data is left clean.
    ///
    /// # Errors
    /// When it has to be ended by force.
    pub async fn stop(mut self) -> Result<(), EmbeddedError> {
        for (signal, patience) in [
            (Signal::SIGINT, PATIENCE),
            (Signal::SIGQUIT, Duration::from_secs(5)),
        ] {
            if let Some(pid) = self.server.id() {
                // It may have ended by itself meanwhile; the wait tells.
                let _ = kill(process(pid), signal);
            }
            if tokio::time::timeout(patience, self.server.wait())
                .await
                .is_ok()
            {
                // The server has removed its socket. A directory that still holds something is left to whoever put it there.
                let _ = fs::remove_dir(&self.place.sockets);
                return Ok(());
            }
        }
        Err(EmbeddedError::Program {
            program: "postgres".to_owned(),
            said: "it does not stop".to_owned(),
        })
    }
}

/// The data that lies outside a home which is gone, for someone to remove: nothing else would ever tell them of it.
#[must_use]
pub fn abandoned() -> Vec<PathBuf> {
    abandoned_in(Path::new(ELSEWHERE))
}

fn abandoned_in(place: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(place) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|note| note.extension().is_some_and(|kind| kind == "home"))
        .filter(|note| {
            // Where it cannot be seen it is not gone.
            fs::read_to_string(note)
                .and_then(|home| Path::new(home.trim_end()).try_exists())
                .is_ok_and(|is_there| !is_there)
        })
        .map(|note| note.with_extension(""))
        .filter(|cluster| cluster.exists())
        .collect();
    found.sort();
    found
}

/// Writes a path into a file, with the directory that holds it.
fn note(file: &Path, path: &Path) -> Result<(), EmbeddedError> {
    if let Some(directory) = file.parent() {
        fs::create_dir_all(directory).map_err(io_error("cannot create", directory))?;
    }
    fs::write(file, format!("{}\n", path.display())).map_err(io_error("cannot write", file))
}

fn lock(home: &Path) -> Result<Flock<File>, EmbeddedError> {
    let path = home.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(io_error("cannot open the lock", &path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| EmbeddedError::InUse(home.to_owned()))
}

impl Place {
    fn of(home: &Path) -> Result<Self, EmbeddedError> {
        let programs = find_programs().ok_or(EmbeddedError::NoPrograms)?;
        let user = if geteuid().is_root() {
            Some(unprivileged_user()?)
        } else {
            None
        };
        let name: String = sha256(&home.to_string_lossy())[..8]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let root = if user.is_none() || open_to_all(home) {
            home.join("postgres")
        } else {
            // The user cannot pass through the home's parents.
            let elsewhere = Path::new(ELSEWHERE).join(&name);
            note(&home.join("postgres.path"), &elsewhere)?;
            note(&elsewhere.with_extension("home"), home)?;
            elsewhere
        };
        let sockets = std::env::temp_dir().join(format!("polpo-{name}"));
        let place = Self {
            programs,
            data: root.join("data"),
            log: root.join("log"),
            sockets,
            user,
        };
        place.private_directory(&root)?;
        place.private_directory(&place.sockets)?;
        Ok(place)
    }

    /// Makes a directory that only the cluster's user may enter, or checks that it is one.
    fn private_directory(&self, path: &Path) -> Result<(), EmbeddedError> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_error("cannot create", parent))?;
        }
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => {
                if let Some(user) = &self.user {
                    chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
                        .map_err(io_error("cannot give away", path))?;
                }
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let found = fs::symlink_metadata(path).map_err(io_error("cannot read", path))?;
                let owner = self.user.as_ref().map_or(geteuid(), |user| user.uid);
                // Somebody else's directory in a shared place would let them in.
                if found.is_dir()
                    && found.uid() == owner.as_raw()
                    && found.permissions().mode() & 0o077 == 0
                {
                    return Ok(());
                }
                Err(EmbeddedError::Io {
                    doing: "another user's directory is in the way",
                    path: path.to_owned(),
                    source: io::ErrorKind::PermissionDenied.into(),
                })
            }
            Err(error) => Err(io_error("cannot create", path)(error)),
        }
    }

    /// Makes the data directory unless it is there: beside its place and then moved, so a half-made one is never taken for whole.
    fn create(&self, durability: Durability) -> Result<(), EmbeddedError> {
        let version = self.data.join("PG_VERSION");
        if let Ok(found) = fs::read_to_string(&version) {
            return self.check_version(found.trim());
        }
        let fresh = self.data.with_extension("new");
        if fresh.exists() {
            fs::remove_dir_all(&fresh).map_err(io_error("cannot remove", &fresh))?;
        }
        let output = self.run("initdb", |command| {
            command.arg("-D").arg(&fresh).args([
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C.UTF-8",
            ]);
            if durability == Durability::None {
                command.arg("--no-sync");
            }
        })?;
        if !output.status.success() {
            return Err(failure("initdb", &output));
        }
        fs::rename(&fresh, &self.data).map_err(io_error("cannot move into place", &self.data))
    }

    fn check_version(&self, found: &str) -> Result<(), EmbeddedError> {
        let output = self.run("postgres", |command| {
            command.arg("--version");
        })?;
        // "postgres (PostgreSQL) 15.18 (Debian …)"
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let installed = said
            .split_whitespace()
            .nth(2)
            .and_then(|version| version.split('.').next())
            .unwrap_or_default();
        if installed == found {
            return Ok(());
        }
        Err(EmbeddedError::OtherVersion {
            data: self.data.clone(),
            found: found.to_owned(),
            installed: installed.to_owned(),
            old: format!("/usr/lib/postgresql/{found}/bin"),
            sockets: self.sockets.display().to_string(),
        })
    }

    /// Ends the server that a killed polpo left behind.
    async fn end_orphan(&self) -> Result<(), EmbeddedError> {
        let Some(pid) = self.orphan() else {
            return Ok(());
        };
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let mut signal = Signal::SIGINT;
        while self.is_server(pid) {
            if tokio::time::Instant::now() > deadline {
                signal = Signal::SIGQUIT;
            }
            // It may be gone between the look and the signal.
            let _ = kill(process(pid), signal);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    fn orphan(&self) -> Option<u32> {
        let file = fs::read_to_string(self.data.join("postmaster.pid")).ok()?;
        let pid = file.lines().next()?.trim().parse().ok()?;
        self.is_server(pid).then_some(pid)
    }

    /// Whether the process is the server of this data: the number in a stale file may be anybody's by now.
    fn is_server(&self, pid: u32) -> bool {
        fs::read_link(format!("/proc/{pid}/cwd"))
            .is_ok_and(|cwd| Some(cwd) == self.data.canonicalize().ok())
    }

    async fn launch(&self, durability: Durability) -> Result<Child, EmbeddedError> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .map_err(io_error("cannot open the log", &self.log))?;
        let errors = log
            .try_clone()
            .map_err(io_error("cannot open the log", &self.log))?;
        let mut command = self.command("postgres");
        command
            .arg("-D")
            .arg(&self.data)
            .arg("-k")
            .arg(&self.sockets);
        for setting in [
            "listen_addresses=",
            "unix_socket_permissions=0700",
            "max_connections=300",
            "shared_buffers=64MB",
            "timezone=UTC",
        ] {
            command.args(["-c", setting]);
        }
        if durability == Durability::None {
            command.args([
                "-c",
                "fsync=off",
                "-c",
                "synchronous_commit=off",
                "-c",
                "full_page_writes=off",
            ]);
        }
        // A group of its own: Ctrl-C in the terminal reaches the program, which then stops the server when it is done with it.
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors);
        let mut server = tokio::process::Command::from(command)
            .spawn()
            .map_err(io_error("cannot start postgres in", &self.programs))?;
        let ready = async {
            while !self.is_ready(server.id()) {
                if let Ok(Some(_)) = server.try_wait() {
                    return false;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            true
        };
        match tokio::time::timeout(PATIENCE, ready).await {
            Ok(true) => Ok(server),
            Ok(false) | Err(_) => {
                let said = fs::read_to_string(&self.log).unwrap_or_default();
                Err(EmbeddedError::Program {
                    program: "postgres".to_owned(),
                    said: last_lines(&said),
                })
            }
        }
    }

    /// The server writes its state into the last line of its file when it takes connections, as `pg_ctl` waits for too.
    fn is_ready(&self, pid: Option<u32>) -> bool {
        let file = fs::read_to_string(self.data.join("postmaster.pid")).unwrap_or_default();
        let lines: Vec<&str> = file.lines().collect();
        pid.is_some_and(|pid| lines.first() == Some(&pid.to_string().as_str()))
            && lines.get(7).is_some_and(|state| state.trim() == "ready")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        // The user may not be allowed to stand where we stand.
        command.current_dir("/");
        if let Some(user) = &self.user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        command
    }

    fn run(
        &self,
        program: &str,
        arguments: impl FnOnce(&mut Command),
    ) -> Result<Output, EmbeddedError> {
        let mut command = self.command(program);
        arguments(&mut command);
        command
            .output()
            .map_err(io_error("cannot run a program of", &self.programs))
    }
}

fn process(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX))
}

fn failure(program: &str, output: &Output) -> EmbeddedError {
    EmbeddedError::Program {
        program: program.to_owned(),
        said: last_lines(&String::from_utf8_lossy(&output.stderr)),
    }
}

fn last_lines(said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("; ")
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> EmbeddedError {
    let path = path.to_owned();
    move |source| EmbeddedError::Io {
        doing,
        path,
        source,
    }
}

/// The directory of `initdb` and `postgres`: the newest version that Debian's packages hold, else what `PATH` finds.
fn find_programs() -> Option<PathBuf> {
    let mut packaged: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            Some((
                entry.file_name().to_str()?.parse().ok()?,
                entry.path().join("bin"),
            ))
        })
        .collect();
    packaged.sort_unstable_by(|a, b| b.cmp(a));
    let elsewhere = [
        "/usr/local/pgsql/bin",
        "/usr/local/bin",
        "/usr/bin",
        "/opt/homebrew/bin",
    ]
    .map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    packaged
        .into_iter()
        .map(|(_, directory)| directory)
        .chain(std::env::split_paths(&path))
        .chain(elsewhere)
        .find(|directory| directory.join("initdb").exists() && directory.join("postgres").exists())
}

fn unprivileged_user() -> Result<User, EmbeddedError> {
    ["postgres", "nobody"]
        .into_iter()
        .find_map(|name| User::from_name(name).ok().flatten())
        .ok_or(EmbeddedError::NoUser)
}

/// Whether any user may pass through this directory and all its parents.
fn open_to_all(path: &Path) -> bool {
    path.ancestors()
        .all(|directory| fs::metadata(directory).is_ok_and(|found| found.mode() & 0o001 != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn start(home: &Path) -> Cluster {
        Cluster::start(home, Durability::None).await.unwrap()
    }

    fn psql(cluster: &Cluster, statement: &str) -> String {
        let output = cluster
            .place
            .run("psql", |command| {
                command
                    .arg("-h")
                    .arg(&cluster.place.sockets)
                    .args(["-U", "postgres", "-qtAc", statement, "polpo"]);
            })
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Removes what lies outside the home.
    struct Swept(PathBuf);

    impl Drop for Swept {
        fn drop(&mut self) {
            let _ = fs::remove_file(self.0.with_extension("home"));
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// The directory is 0700, so root's Postgres cannot reach it and must live elsewhere.
    #[tokio::test]
    async fn data_outlives_a_stop_and_a_kill_of_either_process() {
        let home = tempfile::tempdir().unwrap();
        let cluster = start(home.path()).await;
        let _swept = Swept(cluster.place.data.parent().unwrap().to_owned());
        cluster.ensure_database("polpo").unwrap();
        cluster.ensure_database("polpo").unwrap();
        psql(
            &cluster,
            "create table kept (n int); insert into kept values (1)",
        );
        assert!(matches!(
            Cluster::start(home.path(), Durability::None).await,
            Err(EmbeddedError::InUse(_))
        ));
        cluster.stop().await.unwrap();

        let cluster = start(home.path()).await;
        assert_eq!(psql(&cluster, "select n from kept"), "1");
        // The program is killed: its server stays behind, and the next start must get past it.
        let orphan = cluster.pid().unwrap();
        let Cluster {
            server,
            _lock: lock,
            place,
        } = cluster;
        drop(lock);
        let reaped = tokio::spawn(async move {
            let mut server = server;
            server.wait().await
        });
        assert!(place.is_server(orphan));
        let cluster = start(home.path()).await;
        reaped.await.unwrap().unwrap();
        assert!(!place.is_server(orphan));
        assert_eq!(psql(&cluster, "select n from kept"), "1");

        // The server is killed.
        kill(process(cluster.pid().unwrap()), Signal::SIGKILL).unwrap();
        drop(cluster);
        let cluster = start(home.path()).await;
        assert_eq!(psql(&cluster, "select n from kept"), "1");
        cluster.stop().await.unwrap();
        assert!(!place.sockets.exists());

        let version = place.data.join("PG_VERSION");
        let now = fs::read_to_string(&version).unwrap();
        fs::write(&version, "9").unwrap();
        let refused = Cluster::start(home.path(), Durability::None)
            .await
            .unwrap_err()
            .to_string();
        fs::write(&version, now).unwrap();
        assert!(
            refused.contains("PostgreSQL 9")
                && refused.contains("pg_dumpall")
                && refused.contains("psql"),
            "{refused}"
        );
        fs::remove_dir(&place.sockets).unwrap();
    }

    #[test]
    fn data_whose_home_is_gone_is_found() {
        let place = tempfile::tempdir().unwrap();
        let home = tempfile::tempdir().unwrap();
        for cluster in ["kept", "left"] {
            fs::create_dir(place.path().join(cluster)).unwrap();
        }
        note(&place.path().join("kept.home"), home.path()).unwrap();
        note(&place.path().join("left.home"), &home.path().join("gone")).unwrap();
        note(
            &place.path().join("removed.home"),
            &home.path().join("gone"),
        )
        .unwrap();
        assert_eq!(abandoned_in(place.path()), [place.path().join("left")]);
    }

    #[test]
    fn a_stale_pid_is_not_taken_for_the_server() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place {
            programs: PathBuf::new(),
            data: directory.path().to_owned(),
            log: PathBuf::new(),
            sockets: PathBuf::new(),
            user: None,
        };
        fs::write(
            directory.path().join("postmaster.pid"),
            format!("{}\n", std::process::id()),
        )
        .unwrap();
        assert_eq!(place.orphan(), None);
    }
}
