//! Progress on stderr: what is being done, and how long it took. Data (counts, tables, JSON) goes to stdout.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

/// Whether a person is watching: then cargo's own progress is shown, otherwise one line a step.
pub fn watched() -> bool {
    stderr().is_terminal()
}

/// A remark.
pub fn note(text: &str) {
    eprintln!("xtask: {text}");
}

/// Runs one step and says how long it took; steps below a quarter of a second stay silent.
pub fn step<T>(what: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let started = Instant::now();
    note(&format!("{what} …"));
    let result = work();
    let took = started.elapsed();
    match &result {
        Ok(_) if took < Duration::from_millis(250) => {}
        Ok(_) => note(&format!("{what}: done in {:.1} s", took.as_secs_f64())),
        Err(error) => note(&format!(
            "{what}: failed after {:.1} s: {error:#}",
            took.as_secs_f64()
        )),
    }
    result
}
