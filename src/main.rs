//! The `polpo` program: reads the command line and runs one role.

use std::process::ExitCode;

use clap::Parser;

/// Steadier than the system's allocator under many streams.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = polpo::cli::Cli::parse();
    match polpo::cli::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("polpo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
