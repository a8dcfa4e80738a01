//! Connections that have to stay, many at once: through floods of forged first packets, and through the replacement of
//! every backend. Real packets in a cluster of two nodes; needs root and the agent that `cargo xtask build` makes.

mod bpftool;
mod endpoints;
mod faults;
mod flood;
mod monitor;
mod page;
mod rollout;
mod seen;
mod stage;
