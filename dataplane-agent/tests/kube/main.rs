//! The Kubernetes API as a source, against a real server: what is followed, and what stands when the server, the way to it
//! or the agent's rights fail. Needs etcd and kube-apiserver (`cargo xtask kube`), but for
//! [`unwell`]; no root.

mod annotated;
mod controllers;
mod faults;
mod load;
mod rights;
mod seen;
mod telling;
mod unwell;
mod unwell_server;
