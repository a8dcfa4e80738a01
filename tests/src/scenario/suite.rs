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
use super::netpol::bed::Bed;
use super::netpol::file::Case;
use super::netpol::{self, layout};
use super::report::ScenarioReport;
use super::run::{RunOptions, run};
use super::select::Filter;
use crate::places;

/// A file that was read: a scenario, or the reason why it is none.
#[derive(Debug)]
pub struct Entry {
    file: String,
    scenario: Result<Any>,
}

/// A scenario of either schema.
#[derive(Debug)]
enum Any {
    Services(Box<Scenario>),
    Policies(Box<Case>),
}

impl Any {
    /// Decodes a file by the schema that it names.
    fn parse(text: &[u8]) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Head {
            schema: String,
        }
        let Head { schema } = serde_json::from_slice(text)?;
        Ok(match schema.as_str() {
            netpol::file::SCHEMA => Self::Policies(Box::new(Case::parse(text)?)),
            _ => Self::Services(Box::new(Scenario::parse(text)?)),
        })
    }

    /// What a filter may name, beside the file.
    fn names(&self) -> Vec<&str> {
        let (id, name, tags) = match self {
            Self::Services(scenario) => (&scenario.id, &scenario.name, &scenario.tags),
            Self::Policies(case) => (&case.id, &case.name, &case.tags),
        };
        [id, name].into_iter().chain(tags).map(String::as_str).collect()
    }
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
        let scenario = Any::parse(&text);
        let chosen = match &scenario {
            Ok(scenario) => filter.matches(&[scenario.names(), vec![&file]].concat()),
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
        let mut bed = None;
        loop {
            let next = next(
                &mut queue.lock().unwrap_or_else(PoisonError::into_inner),
                bed.as_ref(),
                options,
            );
            let Some(entry) = next else {
                return;
            };
            let name = job.to_string();
            let report = match &entry.scenario {
                Ok(Any::Services(scenario)) => {
                    bed = None;
                    run(scenario, &name, options)
                }
                Ok(Any::Policies(case)) => netpol::run::run(case, &mut bed, &name, options),
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

/// The first in the queue, but one that the cluster at hand serves before others.
fn next(queue: &mut VecDeque<Entry>, bed: Option<&Bed>, options: &RunOptions) -> Option<Entry> {
    let served = |entry: &Entry| match (&entry.scenario, bed) {
        (Ok(Any::Policies(case)), Some(bed)) => {
            let needs =
                layout::Layout::of(case).and_then(|found| layout::Needs::of(case, &found, options.network));
            needs.is_ok_and(|needs| bed.serves(&needs))
        }
        _ => false,
    };
    let at = queue.iter().position(served).unwrap_or_default();
    queue.remove(at)
}

/// Prints one report. A reader that has gone away does not stop the run, which has namespaces to remove.
pub fn print(report: &ScenarioReport) {
    let _ = writeln!(std::io::stdout().lock(), "{}", report.text());
}
