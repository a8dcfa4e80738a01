//! What the kernel says of this machine's network: devices, addresses, routes, and the pods behind its interfaces.

pub mod devconf;
pub mod events;
pub mod filters;
pub mod firewall;
pub mod pods;
pub mod select;
pub mod socket;
pub mod sockets;
pub mod tables;
