//! `cargo xtask build`: everything that runs, in release.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{ebpf, paths, process, progress};

/// The kernel side, then the agent that embeds it and the programs of the tests. The CNI plugin is static, because the hosts that
/// it is for may have any libraries.
pub fn run() -> Result<()> {
    ebpf::run(&ebpf::Args::default())?;
    let mut command = process::cargo("build");
    command.args([
        "--release",
        "--package",
        "dataplane-agent",
        "--package",
        "dataplane-tests",
    ]);
    progress::step("building the agent and the test programs", || {
        process::run(process::quiet_unless_watched(&mut command))?;
        match lacking_for_static("cc") {
            Some(lacking) => progress::note(&format!(
                "dataplane-cni is for hosts with this one's libraries: {lacking}"
            )),
            None => link_static("dataplane-cni", None)?,
        }
        Ok(())
    })
}

/// Static, stripped programs of the agent's package, as copies below target/static. `foreign`: for another processor, by its
/// target and the compiler that links for it.
pub fn static_programs(names: &[&str], foreign: Option<(&str, &str)>) -> Result<Vec<PathBuf>> {
    ebpf::run(&ebpf::Args::default())?;
    let folder = paths::target()
        .join("static")
        .join(foreign.map_or(std::env::consts::ARCH, |(triple, _)| triple));
    fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
    let built = match foreign {
        Some((triple, _)) => paths::target().join(triple).join("release"),
        None => paths::target().join("release"),
    };
    progress::step("building static programs", || {
        let copies = names.iter().map(|name| {
            link_static(name, foreign)?;
            let copy = folder.join(name);
            // What runs from the old copy keeps it.
            let fresh = copy.with_extension("new");
            fs::copy(built.join(name), &fresh)
                .and_then(|_| fs::rename(&fresh, &copy))
                .with_context(|| format!("failed to copy {name} to {}", copy.display()))?;
            Ok(copy)
        });
        copies.collect()
    })
}

/// Why a C compiler cannot link static programs.
pub fn lacking_for_static(compiler: &str) -> Option<String> {
    if paths::program(compiler).is_none() {
        return Some(format!("there is no {compiler} to link with"));
    }
    // A name that is not found comes back as it is.
    let place = process::stdout_of(Command::new(compiler).arg("-print-file-name=libc.a")).unwrap_or_default();
    if Path::new(place.trim()).is_file() {
        return None;
    }
    Some(format!(
        "{compiler} has no static C library (the package libc6-dev or glibc-static)"
    ))
}

/// Only the program's own, small crate is compiled for it; all others are those of the ordinary build.
fn link_static(name: &str, foreign: Option<(&str, &str)>) -> Result<()> {
    let mut command = process::cargo("rustc");
    command.args(["--release", "--package", "dataplane-agent", "--bin", name]);
    if let Some((triple, compiler)) = foreign {
        let variable = triple.replace('-', "_");
        command
            .args(["--target", triple])
            .env(
                format!("CARGO_TARGET_{}_LINKER", variable.to_uppercase()),
                compiler,
            )
            .env(format!("CC_{variable}"), compiler);
    }
    process::quiet_unless_watched(&mut command);
    command.args(["--", "-C", "target-feature=+crt-static", "-C", "strip=symbols"]);
    process::run(&mut command)
}
