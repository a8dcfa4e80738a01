//! The binary; everything is in the library.

use std::process::ExitCode;

use clap::Parser;
use dataplane_agent::{args::Cli, cli};

fn main() -> ExitCode {
    cli::main(Cli::parse())
}
