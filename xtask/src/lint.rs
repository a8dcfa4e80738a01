//! `cargo xtask lint`: formatting and lints, warnings are errors; the kernel side with its own compiler.

use anyhow::{Result, bail};

use crate::{ebpf, paths, process, progress, setup};

/// The command.
pub fn run() -> Result<()> {
    progress::step("formatting", || {
        process::run(process::cargo("fmt").args(["--all", "--check"]))?;
        process::run(
            process::cargo("fmt")
                .args(["--check", "--manifest-path"])
                .arg(paths::root().join("dataplane-ebpf/Cargo.toml")),
        )
    })?;
    // The agent embeds the object: its build needs one to be there.
    ebpf::run(&ebpf::Args::default())?;
    progress::step("clippy, user side", || {
        let mut command = process::cargo("clippy");
        process::run(process::quiet_unless_watched(&mut command).args([
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]))
    })?;
    let toolchain = setup::toolchain()?;
    setup::lints(&toolchain)?;
    let Some(mut clippy) = toolchain.clippy(ebpf::FLAGS) else {
        bail!("the kernel side's compiler has no clippy");
    };
    progress::step("clippy, kernel side", || {
        process::run(process::quiet_unless_watched(&mut clippy).args(["--release", "--", "-D", "warnings"]))
    })
}
