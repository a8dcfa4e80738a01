//! `cleanup`: leaves the machine as it was before the first start.

use std::path::Path;

use anyhow::Context;

use crate::{attach::cleanup, bpf::kernel};

/// Removes all that agents with this `--bpffs` have made.
pub fn run(bpffs: &Path) -> anyhow::Result<()> {
    kernel::check_capabilities()?;
    cleanup::cleanup(bpffs).with_context(|| format!("failed to clean up {}", bpffs.display()))
}
