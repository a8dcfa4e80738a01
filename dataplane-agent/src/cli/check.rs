//! `check`: what in a folder of manifests would not be served, and why.

use std::{collections::BTreeMap, io::Write, path::Path, process::ExitCode};

use anyhow::Context;

use crate::{
    compile::Compiler,
    model::{Dirty, Index, ObjectRef, Origin, Rejected},
    source::{Change, manifests::Folder},
};

/// Prints a line for each problem; fails when there is any.
pub fn run(folder: &Path) -> anyhow::Result<ExitCode> {
    let rejected = check(folder);
    let mut out = std::io::stdout().lock();
    for one in &rejected {
        writeln!(out, "{one}").context("failed to print")?;
    }
    Ok(if rejected.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Everything that is rejected in a folder.
pub fn check(folder: &Path) -> Vec<Rejected> {
    let mut folder = Folder::new(folder.to_owned());
    let batch = folder.scan(true);
    let mut rejected = batch.rejected;
    // No node has an empty name, so this looks at the folder from outside the cluster.
    let mut index = Index::new("");
    let mut dirty = Dirty::default();
    let mut origins: BTreeMap<ObjectRef, Origin> = BTreeMap::new();
    for change in batch.changes {
        if let Change::Apply { key, object, origin } = change {
            origins.extend(origin.map(|origin| (key, origin)));
            dirty.merge(index.apply(object));
        }
    }
    let mut compiler = Compiler::default();
    compiler.update(&index, &dirty);
    rejected.extend(compiler.rejected(|object| origins.get(object).cloned()));
    rejected.sort();
    rejected
}
