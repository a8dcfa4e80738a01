//! The user side: watches Kubernetes objects and keeps the datapath's tables equal to what they say.
//!
//! Data flows one way: [`source`] → [`decode`] → [`model`] → [`compile`] → [`sync`] → [`store`]. [`agent`] is the
//! loop around it, [`host`] the seam to what finds out about this machine ([`attach`], [`netlink`], [`bpf`]).

pub mod attach;
pub mod bpf;
pub mod cli;
pub mod compile;
pub mod config;
pub mod decode;
pub mod host;
pub mod model;
pub mod netlink;
pub mod source;
pub mod store;
pub mod sync;
