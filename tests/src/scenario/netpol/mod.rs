//! Policy scenarios: tables of who reaches whom, probed with real packets after each step.

pub mod bed;
pub mod drops;
pub mod file;
pub mod layout;
pub mod objects;
pub mod run;
