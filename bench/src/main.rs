//! Measures polpo beside two reference proxies, all in one run: absolute figures move with the machine,
//! the ratios between them do not.
//!
//! `direct` is the upstream itself, `pass` a bare pass-through proxy, and `reference` the same with every
//! event parsed as JSON and written again, one Postgres read before and one awaited durable insert after.

use clap::{Parser, Subcommand};

mod load;
mod missions;
mod process;
mod proxy;
mod report;
mod run;
mod tasks;
mod upstream;
mod webhooks;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure everything and print the table.
    Run(run::Options),
    /// Serve as the scripted upstream.
    Upstream {
        #[arg(long)]
        port: u16,
    },
    /// Serve as a proxy: bare, or as the reference when a database is given.
    Proxy {
        #[arg(long)]
        port: u16,
        #[arg(long)]
        upstream: String,
        #[arg(long)]
        database_url: Option<String>,
    },
}

fn main() -> anyhow::Result<()> {
    // Only an earlier call can make this fail, and then a provider is in place.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Runtime::new()?;
    match Cli::parse().command {
        Command::Run(options) => runtime.block_on(run::run(options)),
        Command::Upstream { port } => runtime.block_on(upstream::serve(port)),
        Command::Proxy {
            port,
            upstream,
            database_url,
        } => runtime.block_on(proxy::serve(port, upstream, database_url)),
    }
}
