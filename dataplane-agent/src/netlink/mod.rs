//! What the kernel says of this machine's network: devices, addresses, routes, and the pods behind its interfaces.

pub mod conntrack;
pub mod devconf;
pub mod events;
pub mod filters;
pub mod firewall;
pub mod kube_proxy;
pub mod nat;
pub mod pods;
pub mod select;
pub mod socket;
pub mod sockets;
pub mod tables;
pub mod way;
pub mod xdp_features;
