//! Child processes, and what the system says of them.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::process::{Child, Command};

/// A server that was started for the benchmark; ended when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) url: String,
    pub(crate) start_ms: f64,
}

impl Server {
    pub(crate) async fn start(
        program: &Path,
        arguments: &[&str],
        variables: &[(&str, String)],
        port: u16,
    ) -> anyhow::Result<Self> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(std::env::temp_dir().join("polpo-bench.log"))?;
        let began = Instant::now();
        let child = Command::new(program)
            .args(arguments)
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // Logging is on, as it would be: into a file.
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{} cannot be started", program.display()))?;
        let url = format!("http://127.0.0.1:{port}");
        let health = format!("{url}/health");
        let client = reqwest::Client::new();
        while client.get(&health).send().await.is_err() {
            if began.elapsed() > Duration::from_secs(30) {
                bail!("{} does not answer", program.display());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(Self {
            child,
            url,
            start_ms: began.elapsed().as_secs_f64() * 1000.0,
        })
    }

    pub(crate) fn pid(&self) -> anyhow::Result<u32> {
        self.child.id().context("a server ended early")
    }
}

/// Seconds of CPU that a process has used.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold spaces; user and system time are the 12th and 13th fields after it.
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let ticks = |index: usize| {
        fields
            .get(index)
            .and_then(|field| field.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    (ticks(11) + ticks(12)) / 100.0
}

/// Seconds of CPU of a server that forks, its present children included.
pub(crate) fn cpu_seconds_of_tree(pid: u32) -> f64 {
    let children =
        fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = children
        .split_whitespace()
        .filter_map(|child| child.parse().ok())
        .map(cpu_seconds);
    cpu_seconds(pid) + children.sum::<f64>()
}

/// Resident memory in MB.
pub(crate) fn resident_mb(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap_or_default();
    line.split_whitespace()
        .next()
        .and_then(|kb| kb.parse::<f64>().ok())
        .unwrap_or(0.0)
        / 1024.0
}
