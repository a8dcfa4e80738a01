//! `dataplane-scenarios`: the program of [`dataplane_tests::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    dataplane_tests::cli::main().unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::from(2)
    })
}
