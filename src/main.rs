//! The `polpo` program: reads the command line and runs one role.

use std::process::ExitCode;

use clap::Parser;

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
