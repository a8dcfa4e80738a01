//! `cleanup`: leaves the machine as it was before the first start; or removes what kube-proxy has left.

use std::{io::Write, path::Path};

use anyhow::{Context, bail};

use crate::{
    attach::cleanup,
    bpf::kernel,
    netlink::{
        kube_proxy::{self, Rules},
        socket::RequestSocket,
        tables,
    },
};

/// Removes all that agents with this `--bpffs` have made.
pub fn run(bpffs: &Path) -> anyhow::Result<()> {
    kernel::check_capabilities()?;
    cleanup::cleanup(bpffs).with_context(|| format!("failed to clean up {}", bpffs.display()))
}

/// Removes kube-proxy's own nftables tables. Fails where kube-proxy has rules elsewhere too.
pub fn kube_proxy_rules() -> anyhow::Result<()> {
    kernel::check_net_admin()?;
    let removed = kube_proxy::remove().context("failed to remove kube-proxy's nftables tables")?;
    let mut out = std::io::stdout().lock();
    for family in &removed {
        writeln!(out, "removed the table {} kube-proxy", family.as_str()).context("failed to print")?;
    }
    let mut socket = RequestSocket::open().context("failed to open a netlink socket")?;
    let links = tables::dump_links(&mut socket).context("failed to list devices")?;
    let left = kube_proxy::find(&links).context("failed to list netfilter's chains")?;
    if !left.is_empty() {
        let left: Vec<String> = left.iter().map(Rules::to_string).collect();
        bail!(
            "kube-proxy has other rules here, which are not in a table of its own ({}): run `kube-proxy --cleanup` on this node (docs/migration.md)",
            left.join(", ")
        );
    }
    if removed.is_empty() {
        writeln!(out, "kube-proxy has no rules here").context("failed to print")?;
    }
    Ok(())
}
