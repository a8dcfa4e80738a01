//! The user side: watches Kubernetes objects and keeps the datapath's tables equal to what they say.
//!
//! Data flows one way: [`source`] → [`decode`] → [`model`] → [`compile`] → [`sync`] → [`store`]. [`agent`] is the
//! loop around it, [`host`] the seam to what finds out about this machine ([`attach`], [`netlink`], [`bpf`]).

pub mod agent;
pub mod args;
pub mod attach;
pub mod bpf;
pub mod cli;
pub mod cni;
pub mod compile;
pub mod config;
pub mod decode;
pub mod enforced;
pub mod events;
pub mod explain;
pub mod health;
pub mod host;
pub mod load;
pub mod logging;
pub mod metrics;
pub mod model;
pub mod netlink;
pub mod path_error;
pub mod preflight;
pub mod served;
pub mod source;
pub mod store;
pub mod sync;
pub mod takeover;
pub mod told;
