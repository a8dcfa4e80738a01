//! Starting other programs: the workspace's cargo, programs that need root, and noisy tools that are only heard when they fail.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::{env, fs};

use anyhow::{Context, Result, bail};

use crate::{paths, progress};

/// The cargo that runs this program, for the user side's packages.
pub fn cargo(subcommand: &str) -> Command {
    let mut command = cargo_tool(Path::new(&env::var_os("CARGO").unwrap_or_else(|| "cargo".into())));
    command
        .arg(subcommand)
        .env("CARGO_TARGET_DIR", paths::target())
        .env("DATAPLANE_COMMIT", commit());
    command
}

/// A program that runs cargo, in the repository.
pub fn cargo_tool(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(paths::root());
    // Set by the `cargo run` around us for this package; build scripts of others must not see them as a change.
    for (name, _) in env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("CARGO_PKG_") || name_text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// The commit that is checked out, marked where files differ from it; empty outside of a git repository.
pub fn commit() -> String {
    let git = |args: &[&str]| stdout_of(Command::new("git").args(args).current_dir(paths::root())).ok();
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return String::new();
    };
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|files| !files.trim().is_empty());
    format!("{}{}", commit.trim(), if changed { "-dirty" } else { "" })
}

/// `cargo build` and its like: the person's progress bar, or silence but for warnings and errors.
pub fn quiet_unless_watched(command: &mut Command) -> &mut Command {
    if !progress::watched() {
        command.arg("--quiet");
    }
    command
}

/// Runs a command with our own output; its failure is an error that names it.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("failed to start {}", name_of(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", name_of(command));
    }
    Ok(())
}

/// Runs a command silently; on failure its last lines are part of the error.
pub fn run_captured(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to start {}", name_of(command)))?;
    if output.status.success() {
        return Ok(());
    }
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let lines: Vec<&str> = text.lines().collect();
    let tail = &lines[lines.len().saturating_sub(40)..];
    bail!(
        "{} failed: {}\n{}",
        name_of(command),
        output.status,
        tail.join("\n")
    )
}

/// What a command prints on stdout.
pub fn stdout_of(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .with_context(|| format!("failed to start {}", name_of(command)))?;
    if !output.status.success() {
        bail!("{} failed: {}", name_of(command), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Hands over to a program whose exit status becomes ours.
pub fn finish_with(status: ExitStatus) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    // 128 + signal, as a shell reports it.
    let code = status.code().unwrap_or_else(|| {
        use std::os::unix::process::ExitStatusExt;
        128 + status.signal().unwrap_or(0)
    });
    std::process::exit(code)
}

/// A command that needs root: as it is for root, through sudo for others.
pub fn as_root(program: &Path) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    if paths::program("sudo").is_none() {
        bail!(
            "{} needs root (network namespaces, BPF programs), and there is no sudo here: run this command as root",
            program.display()
        );
    }
    progress::note(&format!("not root: running {} through sudo", program.display()));
    let mut command = Command::new("sudo");
    command.arg("-E").arg(program);
    Ok(command)
}

/// Whether we run as root.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

fn name_of(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args().map(OsStr::to_string_lossy).take(6) {
        let _ = write!(text, " {arg}");
    }
    text
}
