//! Where things are: the repository, its build outputs, and programs on this machine.

use std::env;
use std::path::{Path, PathBuf};

/// The repository's root: the parent of this crate.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

/// Where cargo puts the user side: `CARGO_TARGET_DIR` if set (relative to the caller's directory, as cargo reads it).
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => env::current_dir().unwrap_or_default().join(dir),
        None => root().join("target"),
    }
}

/// A program of the release build.
pub fn release(program: &str) -> PathBuf {
    target().join("release").join(program)
}

/// The kernel side's own build directory: another compiler and target, so never shared with the user side's.
pub fn ebpf_build() -> PathBuf {
    root().join("target/ebpf-build")
}

/// The object that the agent embeds. Its place is fixed: the agent's build script looks here.
pub fn ebpf_object() -> PathBuf {
    root().join("target/ebpf/dataplane.o")
}

/// What `cargo xtask bench datapath` measures against; it looks here.
pub fn ebpf_bench_object() -> PathBuf {
    root().join("target/ebpf/bench.o")
}

/// Tools that set-up builds for this repository alone; `DATAPLANE_TOOLS` lets several clones share them.
pub fn tools() -> PathBuf {
    env::var_os("DATAPLANE_TOOLS")
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| root().join(".tools"), PathBuf::from)
}

/// Cargo's home, where `cargo install` puts programs.
pub fn cargo_home() -> Option<PathBuf> {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(home()?.join(".cargo")))
}

/// Rustup's home, where toolchains are.
pub fn rustup_home() -> Option<PathBuf> {
    env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(home()?.join(".rustup")))
}

fn home() -> Option<PathBuf> {
    env::var_os("HOME").map(PathBuf::from)
}

/// A program's path: PATH first, then the system directories that an unprivileged PATH often lacks.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
}
