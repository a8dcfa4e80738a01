//! A run over many files: reads and chooses them, keeps clusters side by side, prints as they finish.

use std::collections::VecDeque;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, ensure};

use super::file::Scenario;
use super::judge::Status;
use super::report::ScenarioReport;
use super::run::{RunOptions, run};
use super::select::{Filter, names};
use crate::places;

/// A file that was read: a scenario, or the reason why it is none.
#[derive(Debug)]
pub struct Entry {
    file: String,
    scenario: Result<Scenario>,
}

/// Reads every `*.json` of folders (deep) and single files, sorted, and keeps what the filter chooses. A file that
/// cannot be understood is kept whatever the filter says of its contents: it fails.
pub fn read(places: &[PathBuf], filter: &Filter) -> Result<Vec<Entry>> {
    let mut files = Vec::new();
    for place in places {
        collect(place, &mut files)?;
    }
    files.sort();
    files.dedup();
    let mut entries = Vec::new();
    for path in files {
        let file = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let text = fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        let scenario = Scenario::parse(&text);
        let chosen = match &scenario {
            Ok(scenario) => filter.matches(&names(scenario, &file)),
            Err(_) => matches_raw(filter, &text, &file),
        };
        if chosen {
            entries.push(Entry { file, scenario });
        }
    }
    ensure!(!entries.is_empty(), "no scenario was chosen");
    Ok(entries)
}

/// What a broken file says of itself, as far as it can be read.
fn matches_raw(filter: &Filter, text: &[u8], file: &str) -> bool {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(text) else {
        return filter.matches(&[file]);
    };
    let tags = value["tags"].as_array().map(Vec::as_slice).unwrap_or_default();
    let fields = [&value["id"], &value["name"]]
        .into_iter()
        .chain(tags)
        .filter_map(serde_json::Value::as_str);
    filter.matches(&fields.chain([file]).collect::<Vec<_>>())
}

fn collect(place: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !place.is_dir() {
        ensure!(place.exists(), "{} does not exist", place.display());
        files.push(place.to_path_buf());
        return Ok(());
    }
    for entry in fs::read_dir(place).with_context(|| format!("failed to list {}", place.display()))? {
        let path = entry?.path();
        if path.is_dir() || path.extension().is_some_and(|extension| extension == "json") {
            collect(&path, files)?;
        }
    }
    Ok(())
}

/// Runs all entries, `jobs` at a time, and tells each report to `done` as it comes.
pub fn run_all(
    entries: Vec<Entry>,
    jobs: usize,
    options: &RunOptions,
    done: &(dyn Fn(&ScenarioReport) + Sync),
) -> Vec<ScenarioReport> {
    let queue = Mutex::new(VecDeque::from(entries));
    let reports = Mutex::new(Vec::new());
    let work = |job: usize| {
        loop {
            let Some(entry) = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front() else {
                return;
            };
            let report = match &entry.scenario {
                Ok(scenario) => run(scenario, &job.to_string(), options),
                Err(error) => {
                    ScenarioReport::without_probes(&entry.file, "", Status::Failed, format!("{error:#}"))
                }
            };
            if places::check_open().is_err() {
                // The thread that caught the signal removes everything and ends the process: nothing more is said.
                loop {
                    thread::park();
                }
            }
            done(&report);
            reports
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(report);
        }
    };
    thread::scope(|scope| {
        for job in 0..jobs.max(1) {
            let work = &work;
            scope.spawn(move || work(job));
        }
    });
    reports.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Prints one report. A reader that has gone away does not stop the run, which has namespaces to remove.
pub fn print(report: &ScenarioReport) {
    let _ = writeln!(std::io::stdout().lock(), "{}", report.text());
}
