//! The host-side interface that leads to a network namespace.

use std::{fs::File, os::fd::AsRawFd};

use super::error::{CniError, Code};
use crate::netlink::{
    pods::{InterfaceId, interface_id},
    socket::RequestSocket,
    tables,
};

/// The interface that leads to the namespace at a path. Where there are several it is one of `names`, else the oldest.
pub fn find(netns: &str, names: &[String]) -> Result<InterfaceId, CniError> {
    let file = File::open(netns).map_err(|error| {
        CniError::new(Code::Io, format!("failed to open namespace {netns}")).because(error)
    })?;
    let failed = |error| CniError::new(Code::Io, "failed to ask the kernel for devices").because(error);
    let mut socket = RequestSocket::open().map_err(failed)?;
    let links = tables::dump_links(&mut socket).map_err(failed)?;
    let namespace = tables::namespace_id(&mut socket, file.as_raw_fd()).map_err(failed)?;
    let leads_there = || {
        links.iter().filter_map(|link| {
            let interface = interface_id(link)?;
            (Some(interface.namespace) == namespace).then_some((link, interface))
        })
    };
    let found = leads_there()
        .find(|(link, _)| names.contains(&link.name))
        .or_else(|| leads_there().next());
    found.map(|(_, interface)| interface).ok_or_else(|| {
        CniError::new(
            Code::Config,
            format!("no veth of this node leads to {netns}: policies could not be enforced there"),
        )
    })
}
