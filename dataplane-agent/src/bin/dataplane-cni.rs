//! The chained CNI plugin, see `dataplane_agent::cni`.

use std::process::ExitCode;

fn main() -> ExitCode {
    dataplane_agent::cni::main()
}
