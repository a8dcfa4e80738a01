//! Scenario files: read, chosen, run against a cluster, judged and reported.

pub mod file;
pub mod flows;
pub mod judge;
pub mod netpol;
pub mod plan;
pub mod probing;
pub mod report;
pub mod run;
pub mod select;
pub mod suite;
