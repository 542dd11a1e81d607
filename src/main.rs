//! The `polpo` program: reads the command line and runs one role.

use std::process::ExitCode;

fn main() -> ExitCode {
    match polpo::cli::Cli::read().and_then(polpo::cli::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("polpo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
