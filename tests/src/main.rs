//! `dataplane-scenarios`: runs scenario files against a test cluster.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use dataplane_tests::{process, worker};

#[derive(Debug, Parser)]
enum Args {
    Worker {
        #[arg(long)]
        netns: PathBuf,
        #[arg(long)]
        cgroup: Option<PathBuf>,
        #[arg(long)]
        name: String,
    },
    Enter {
        #[arg(long)]
        netns: PathBuf,
        #[arg(long)]
        cgroup: Option<PathBuf>,
        #[arg(last = true)]
        command: Vec<String>,
    },
}

fn main() -> Result<()> {
    match Args::parse() {
        Args::Worker { netns, cgroup, name } => {
            process::settle(&netns, cgroup.as_deref())?;
            worker::serve(&name)
        }
        Args::Enter {
            netns,
            cgroup,
            command,
        } => {
            process::settle(&netns, cgroup.as_deref())?;
            process::become_program(&command)
        }
    }
}
