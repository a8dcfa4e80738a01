//! The user side: watches Kubernetes objects and keeps the datapath's tables equal to what they say.
//!
//! Data flows one way: [`source`] → [`decode`] → [`model`] → [`compile`] → [`sync`] → [`store`].

pub mod attach;
pub mod bpf;
pub mod cli;
pub mod config;
pub mod host;
pub mod netlink;
pub mod store;
pub mod decode;
pub mod model;
pub mod source;
pub mod compile;
