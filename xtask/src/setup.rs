//! `cargo xtask setup`: finds what building, testing and measuring need, installs what is missing where it can, and
//! says what to do where it can't. Every other command starts with the part of it that it needs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use crate::needs::{self, Need};
use crate::toolchain::{self, Compiler, Toolchain};
use crate::{paths, process, progress};

/// The linker's version that this repository is built with, and the LLVM versions it can be made for.
const LINKER_VERSION: &str = "0.13.0";
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;
const DENY_VERSION: &str = "0.20.2";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only say what is missing; exit status 1 if anything is
    #[arg(long)]
    check: bool,
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    if args.check {
        return check();
    }
    let toolchain = toolchain()?;
    lints(&toolchain)?;
    programs()?;
    if let Err(error) = cargo_deny() {
        progress::note(&format!("missing: cargo-deny (`cargo xtask lint`): {error:#}"));
    }
    progress::note(&format!("set up: {}", toolchain.describe()));
    Ok(())
}

/// The toolchain for the kernel side, installed if it is missing.
pub fn toolchain() -> Result<Toolchain> {
    if let Ok(found) = toolchain::find() {
        return Ok(found);
    }
    let _lock = lock()?;
    // Another clone's or terminal's set-up may have finished while we waited.
    let lack = match toolchain::find() {
        Ok(found) => return Ok(found),
        Err(lack) => lack,
    };
    progress::note(&format!("building the kernel side lacks something: {lack}"));
    if !toolchain::compilers().iter().any(has_linker) {
        install_compiler()?;
    }
    install_linker()?;
    toolchain::find().map_err(stuck)
}

/// The lint driver of the kernel side's compiler; nothing but `cargo xtask lint` fails without it.
pub fn lints(toolchain: &Toolchain) -> Result<()> {
    if toolchain.has_clippy() {
        return Ok(());
    }
    if toolchain.is_of_the_system() && can_use_apt() {
        let _lock = lock()?;
        return progress::step("installing rust-web-clippy", || apt_install(&["rust-web-clippy"]));
    }
    progress::note(
        "missing: the kernel side's clippy (`cargo xtask lint`): rustup component add clippy --toolchain nightly",
    );
    Ok(())
}

/// cargo-deny, of which nothing but `cargo xtask lint` makes use.
pub fn cargo_deny() -> Result<PathBuf> {
    let root = paths::tools().join(format!("cargo-deny-{DENY_VERSION}"));
    let program = root.join("bin/cargo-deny");
    if program.is_file() {
        return Ok(program);
    }
    let _lock = lock()?;
    // Another clone's or terminal's set-up may have finished while we waited.
    if !program.is_file() {
        let mut command = install("cargo-deny", DENY_VERSION, &root);
        command
            // It is built more often than it has much to do.
            .args(["--profile", "dev"])
            .env("CARGO_PROFILE_DEV_DEBUG", "0");
        let what = format!("building cargo-deny {DENY_VERSION} (about a minute, once)");
        progress::step(&what, || process::run_captured(&mut command))?;
    }
    Ok(program)
}

/// The programs of [`needs::PROGRAMS`]; what cannot be installed is said, and left to the command that needs it.
pub fn programs() -> Result<()> {
    let missing = needs::missing();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    if can_use_apt() {
        let _lock = lock()?;
        return progress::step(&format!("installing {}", packages.join(" ")), || {
            apt_install(&packages)
        });
    }
    report_missing(&missing);
    progress::note(&format!(
        "install them: apt-get install {} (or your system's packages of these programs)",
        packages.join(" ")
    ));
    Ok(())
}

/// Packages that one command alone needs, installed where they can be; what is still missing afterwards is the caller's to say.
pub fn packages(names: &[&str]) -> Result<()> {
    if !can_use_apt() {
        return Ok(());
    }
    let _lock = lock()?;
    progress::step(&format!("installing {}", names.join(" ")), || apt_install(names))
}

fn check() -> Result<()> {
    let missing = needs::missing();
    report_missing(&missing);
    let toolchain = toolchain::find().map_err(stuck)?;
    if !missing.is_empty() {
        bail!(
            "{} programs are missing: `cargo xtask setup` installs them where it can",
            missing.len()
        );
    }
    progress::note(&format!("nothing is missing: {}", toolchain.describe()));
    Ok(())
}

fn report_missing(missing: &[&Need]) {
    for Need {
        program,
        package: _,
        why,
    } in missing
    {
        progress::note(&format!("missing: {program} ({why})"));
    }
}

/// Whether a linker can be had for the compiler: a prebuilt one, or one made for its LLVM.
fn has_linker(compiler: &Compiler) -> bool {
    paths::program("cargo-binstall").is_some() || linkable_llvm(compiler).is_some()
}

/// The compiler's LLVM, if the linker can be made for it.
fn linkable_llvm(compiler: &Compiler) -> Option<u32> {
    compiler.llvm().filter(|major| LINKER_LLVM.contains(major))
}

/// A compiler that can build `core` for BPF: the distribution's, else rustup's nightly. One that is too old is upgraded.
fn install_compiler() -> Result<()> {
    let debian = ["rustc-web", "cargo-web", "rust-web-src", "rust-web-clippy"];
    if can_use_apt() {
        let installed = progress::step(
            "installing the distribution's Rust compiler with its library source",
            || {
                // Lists from before the distribution's last compiler still name one that no linker can be had for.
                if let Err(error) = apt(&["update"]) {
                    progress::note(&format!("the package lists stay as they are: {error:#}"));
                }
                apt_install(&debian)
            },
        );
        match installed {
            Ok(()) => return Ok(()),
            Err(error) => progress::note(&format!("the distribution has no such packages: {error:#}")),
        }
    }
    if let Some(rustup) = paths::program("rustup") {
        let mut command = Command::new(rustup);
        command.args([
            "toolchain",
            "install",
            "nightly",
            "--profile",
            "minimal",
            "--component",
            "rust-src,clippy",
        ]);
        return progress::step("installing rustup's nightly toolchain with rust-src", || {
            process::run_captured(&mut command)
        })
        .with_context(instructions);
    }
    Err(stuck(anyhow!("no way to install it was found here")))
}

/// A linker for the first compiler that one can be had for.
fn install_linker() -> Result<()> {
    for compiler in &toolchain::compilers() {
        if let Some(prefix) = llvm_for(compiler) {
            return build_linker(compiler, &prefix);
        }
    }
    if paths::program("cargo-binstall").is_some() {
        let mut command = process::cargo("binstall");
        command
            .args(["--no-confirm", "bpf-linker", "--root"])
            .arg(paths::tools());
        return progress::step("installing bpf-linker", || process::run_captured(&mut command));
    }
    Err(stuck(anyhow!("no way to install it was found here")))
}

/// Where the development files of the compiler's LLVM are, installed if they can be.
fn llvm_for(compiler: &Compiler) -> Option<PathBuf> {
    let major = linkable_llvm(compiler)?;
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{major}"));
    let complete = || prefix.join("bin/llvm-config").is_file() && prefix.join("include/llvm-c").is_dir();
    if !complete() && can_use_apt() {
        let packages = [format!("llvm-{major}-dev"), format!("libpolly-{major}-dev")];
        let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
        if let Err(error) = progress::step(&format!("installing LLVM {major}"), || apt_install(&packages)) {
            progress::note(&format!("{error:#}"));
        }
    }
    complete().then_some(prefix)
}

fn build_linker(compiler: &Compiler, llvm: &Path) -> Result<()> {
    let feature = format!("llvm-{}", compiler.llvm().unwrap_or_default());
    let mut command = install("bpf-linker", LINKER_VERSION, &paths::tools());
    command
        .args(["--no-default-features", "--features"])
        .arg(&feature)
        .env("LLVM_PREFIX", llvm);
    let what = format!("building bpf-linker {LINKER_VERSION} with {feature} (about a minute, once)");
    progress::step(&what, || process::run_captured(&mut command))
}

/// `cargo install` of one version of a program, into `root`.
fn install(package: &str, version: &str, root: &Path) -> Command {
    let mut command = process::cargo("install");
    command
        .args([package, "--version", version, "--locked", "--force", "--root"])
        .arg(root)
        .current_dir("/")
        // A temporary directory: its objects are of no use to anybody else.
        .env_remove("CARGO_TARGET_DIR");
    command
}

fn can_use_apt() -> bool {
    process::is_root() && paths::program("apt-get").is_some()
}

/// Installs packages; the package lists are fetched only when the first try fails (none yet, or too old).
fn apt_install(packages: &[&str]) -> Result<()> {
    let mut install = vec!["install", "-y", "--no-install-recommends"];
    install.extend(packages);
    if apt(&install).is_ok() {
        return Ok(());
    }
    apt(&["update"])?;
    apt(&install)
}

fn apt(args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .args(["-o", "DPkg::Lock::Timeout=300"])
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive");
    process::run_captured(&mut command)
}

/// One set-up at a time: terminals and CI may share the tools directory.
fn lock() -> Result<File> {
    let dir = paths::tools();
    fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    file.lock()
        .with_context(|| format!("failed to lock {}", path.display()))?;
    Ok(file)
}

/// The error of a set-up that cannot go on: the cause, and the way out.
#[expect(clippy::needless_pass_by_value, reason = "it stands in `map_err`")]
fn stuck(cause: anyhow::Error) -> anyhow::Error {
    anyhow!("{cause:#}\n\n{}", instructions())
}

/// What a person does where we cannot install.
fn instructions() -> String {
    let tools = paths::tools();
    let packages: Vec<&str> = needs::PROGRAMS.iter().map(|need| need.package).collect();
    format!(
        "\
Set-up cannot go on by itself here. Any one of these, then run the command again:

  with rustup, on any Linux:
    rustup toolchain install nightly --component rust-src,clippy
    cargo install cargo-binstall && cargo binstall bpf-linker     (a prebuilt linker; or build it:)
    cargo install bpf-linker --no-default-features --features llvm-NN --root {tools}
                                                                 (NN: `rustc +nightly -vV`, with that LLVM's development files)
  on Debian 12 and later, as root:
    cargo xtask setup
    which does: apt-get install rustc-web cargo-web rust-web-src rust-web-clippy llvm-22-dev libpolly-22-dev
                LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker --version {LINKER_VERSION} \\
                    --no-default-features --features llvm-22 --root {tools}

  and the programs that tests, benchmarks and the demo use: {programs}",
        tools = tools.display(),
        programs = packages.join(" "),
    )
}
