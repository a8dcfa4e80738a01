//! `scenarios/COVERAGE.md` says for every behaviour of the checklist what shows it, and says the truth.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use dataplane_tests::scenario::file::Scenario;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The cells of the table rows that begin with an id such as `c001`.
fn rows(text: &str) -> impl Iterator<Item = (&str, Vec<&str>)> {
    text.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| ")?.split('|').map(str::trim);
        let id = cells.next()?;
        let number = id.strip_prefix('c')?;
        (number.len() == 3 && number.bytes().all(|byte| byte.is_ascii_digit())).then(|| (id, cells.collect()))
    })
}

/// The rows that a file's source names.
fn named(scenario: &Scenario) -> Vec<String> {
    let texts = scenario.source.as_array().into_iter().flatten();
    let texts = texts
        .filter_map(|text| text.as_str())
        .filter(|text| text.starts_with("CHECKLIST"));
    texts
        .flat_map(|text| text.split([' ', ',']))
        .filter(|word| word.len() == 4 && word.starts_with('c'))
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_behaviour_of_the_checklist_is_shown_by_something_that_exists() -> Result<()> {
    let folder = repository().join("tests/scenarios");
    let read =
        |path: &Path| fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()));

    let mut scenarios = BTreeMap::new();
    for entry in fs::read_dir(folder.join("services"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let scenario =
                Scenario::parse(read(&path)?.as_bytes()).with_context(|| path.display().to_string())?;
            let name = path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            ensure!(
                name == format!("{}-{}", scenario.id, scenario.name),
                "{name} holds {} {}",
                scenario.id,
                scenario.name
            );
            ensure!(
                scenarios.insert(scenario.id.clone(), scenario).is_none(),
                "{name}: the id is taken"
            );
        }
    }

    let checklist = read(&folder.join("services/CHECKLIST.md"))?;
    let coverage = read(&folder.join("COVERAGE.md"))?;
    let table: BTreeMap<&str, BTreeSet<&str>> = rows(&coverage)
        .map(|(id, cells)| {
            (
                id,
                cells
                    .get(1)
                    .copied()
                    .unwrap_or_default()
                    .split_whitespace()
                    .collect(),
            )
        })
        .collect();
    let mut behaviours = 0;
    for (id, _) in rows(&checklist) {
        behaviours += 1;
        let shown = table.get(id).with_context(|| format!("{id} has no row"))?;
        ensure!(!shown.is_empty(), "nothing shows {id}");
        for by in shown {
            let exists = match by.strip_prefix('`') {
                Some(path) => repository().join(path.trim_end_matches('`')).exists(),
                None => scenarios.contains_key(*by),
            };
            ensure!(exists, "{id}: there is no {by}");
        }
    }
    ensure!(
        behaviours == table.len(),
        "{behaviours} behaviours, {} rows",
        table.len()
    );
    for (id, scenario) in &scenarios {
        for row in named(scenario) {
            let listed = table
                .get(row.as_str())
                .is_some_and(|shown| shown.contains(id.as_str()));
            ensure!(listed, "{id} names {row}, whose row does not name it");
        }
    }
    Ok(())
}
