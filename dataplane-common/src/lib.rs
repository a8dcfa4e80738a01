//! What the kernel side and the user side share: the layouts of map keys and values, and the datapath itself.
//!
//! The datapath ([`pipeline`]) is ordinary safe Rust, generic over the packet ([`packet::Packet`]), the tables
//! ([`tables::Tables`]) and the address family ([`addr::Family`]). The kernel side compiles it for BPF; the host
//! compiles the same source for unit tests, property tests and `explain`.
#![no_std]
#![forbid(unsafe_code)]

pub mod addr;
pub mod backend;
pub mod config;
pub mod datagram;
pub mod device;
pub mod enforce;
pub mod flow;
pub mod monitor;
pub mod policy;
pub mod reason;
pub mod service;
pub mod sock;
pub mod source;
pub mod traffic;

pub mod answer;
pub mod balance;
mod begin;
pub mod checksum;
mod exit;
#[cfg(test)]
mod fixtures;
pub mod fragment;
#[cfg(test)]
mod fragment_tests;
mod half_open;
pub mod icmp;
#[cfg(any(test, feature = "memory"))]
pub mod memory;
pub mod packet;
pub mod parse;
pub mod pipeline;
mod plan;
pub mod rewrite;
pub mod tables;
pub mod unbound;
pub mod verdict;
