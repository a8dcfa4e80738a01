//! A Kubernetes-like cluster on one machine, made of network namespaces, and the runner that sends real packets
//! through it.
//!
//! * [`cluster`] builds nodes, pods, a router and clients outside, and removes them again.
//! * [`worker`] is a process in one of those namespaces that answers, connects and keeps flows.
//! * [`web`] are servers on threads, and [`traffic`] clients that keep asking them while something happens.
//! * [`flood`] sends first packets from very many addresses.
//! * [`test_run`] runs programs of the datapath by `BPF_PROG_TEST_RUN`, for benchmarks.
//! * [`api`] runs a real Kubernetes API server, which agents may read in place of a folder.
//! * [`scenario`] reads scenario files, drives a cluster by them and judges what was seen.
//!
//! Everything made here carries its owner's process id in its name ([`places`]), so that what a killed run left behind
//! is found and removed by the next one.

pub mod agent;
pub mod api;
pub mod assets;
pub mod cgroup;
pub mod cli;
pub mod cluster;
mod container;
pub mod facing_xdp;
pub mod flood;
pub mod links;
pub mod manifests;
pub mod netlink;
pub mod netns;
pub mod ping;
pub mod places;
pub mod pod_network;
pub mod process;
pub mod scenario;
pub mod shape;
pub mod test_run;
pub mod traffic;
pub mod tun;
pub mod underlay;
pub mod web;
pub mod wireguard;
pub mod worker;
