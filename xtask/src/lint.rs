//! `cargo xtask lint`: formatting and lints, warnings are errors; the kernel side with its own compiler; and
//! what may be depended on.

use anyhow::{Context, Result, bail};

use crate::{deny, ebpf, paths, process, progress, setup};

type Check = fn() -> Result<()>;

/// The command: every check is made, whatever the ones before it found.
pub fn run() -> Result<()> {
    let checks: [(&str, Check); 5] = [
        ("formatting, user side", format_user_side),
        ("formatting, kernel side", format_kernel_side),
        ("clippy, user side", clippy_user_side),
        ("clippy, kernel side", clippy_kernel_side),
        ("dependencies", deny::run),
    ];
    let mut failed = Vec::new();
    for (what, check) in checks {
        if let Err(error) = progress::step(what, check) {
            progress::note(&format!("{error:#}"));
            failed.push(what);
        }
    }
    if !failed.is_empty() {
        bail!("not clean: {}", failed.join("; "));
    }
    Ok(())
}

fn format_user_side() -> Result<()> {
    process::run(process::cargo("fmt").args(["--all", "--check"]))
}

fn format_kernel_side() -> Result<()> {
    let manifest = paths::root().join("dataplane-ebpf/Cargo.toml");
    process::run(
        process::cargo("fmt")
            .args(["--check", "--manifest-path"])
            .arg(manifest),
    )
}

fn clippy_user_side() -> Result<()> {
    // The agent embeds the object: its build says so if there is none.
    ebpf::run(&ebpf::Args::default())?;
    let mut command = process::cargo("clippy");
    process::run(process::quiet_unless_watched(&mut command).args([
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))
}

fn clippy_kernel_side() -> Result<()> {
    let toolchain = setup::toolchain()?;
    setup::lints(&toolchain)?;
    let mut clippy = toolchain
        .clippy(ebpf::FLAGS)
        .context("the kernel side's compiler has no clippy")?;
    process::run(process::quiet_unless_watched(&mut clippy).args(["--release", "--", "-D", "warnings"]))
}
