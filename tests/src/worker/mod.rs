//! One process in one namespace that answers, connects and keeps flows, driven over its standard input and output by a
//! JSON document a line.

mod arrivals;
pub mod flow;
mod handle;
mod herd;
pub mod probe;
pub mod protocol;
mod responder;
pub mod sctp;
mod serve;
mod stream;
mod sweep;
mod transfer;

pub use handle::Worker;
pub use serve::serve;
pub use sweep::PORTS;
