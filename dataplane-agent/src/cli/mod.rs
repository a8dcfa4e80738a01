//! The commands besides `run`.

pub mod cleanup;
pub mod status;
