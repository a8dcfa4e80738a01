//! The binary; everything is in the library.

use std::process::ExitCode;

use dataplane_agent::{args::Cli, cli};

/// The commit that this was built from, where `cargo xtask` built it. Asked for here, so that a commit links anew and compiles
/// nothing else.
const COMMIT: Option<&str> = option_env!("DATAPLANE_COMMIT");

fn main() -> ExitCode {
    cli::main(Cli::of_process(COMMIT))
}
