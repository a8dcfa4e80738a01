//! Finding a compiler that can build for BPF and the linker that goes with it.
//!
//! Three things must come together: the compiler's library source (`core` is built for the target), unstable flags
//! (`-Z build-std`: a nightly, or `RUSTC_BOOTSTRAP`), and a `bpf-linker` made with the same LLVM as the compiler.
//! A rustup toolchain with rust-src is preferred, the distribution's own compiler is next.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Result, bail};
use object::{Object as _, ObjectSection as _};

use crate::{paths, process};

/// Where a distribution's packages put the compiler and its library source.
const SYSTEM: &str = "/usr";

/// A compiler with its library source.
#[derive(Debug, Clone)]
pub struct Compiler {
    /// Holds `bin/rustc`, `bin/cargo` and `lib/rustlib/src`.
    prefix: PathBuf,
    llvm: Option<u32>,
}

/// All that a BPF build needs.
#[derive(Debug, Clone)]
pub struct Toolchain {
    compiler: Compiler,
    linker: PathBuf,
}

impl Compiler {
    fn at(prefix: PathBuf) -> Option<Self> {
        let complete = prefix.join("bin/rustc").is_file()
            && prefix.join("bin/cargo").is_file()
            && prefix.join("lib/rustlib/src/rust/library/core").is_dir();
        complete.then(|| {
            let llvm = llvm_of_compiler(&prefix.join("bin/rustc"));
            Self { prefix, llvm }
        })
    }

    /// LLVM's major version.
    pub fn llvm(&self) -> Option<u32> {
        self.llvm
    }

    /// The lint driver, where it is installed beside the compiler.
    fn clippy(&self) -> Option<PathBuf> {
        Some(self.prefix.join("bin/cargo-clippy")).filter(|path| path.is_file())
    }
}

impl Toolchain {
    /// One line for people.
    pub fn describe(&self) -> String {
        let llvm = self
            .compiler
            .llvm
            .map(|major| format!(", LLVM {major}"))
            .unwrap_or_default();
        format!(
            "{}{llvm}, {}",
            self.compiler.prefix.join("bin/rustc").display(),
            self.linker.display()
        )
    }

    /// Whether `cargo clippy` of the same compiler is there.
    pub fn has_clippy(&self) -> bool {
        self.compiler.clippy().is_some()
    }

    /// Whether the distribution's packages brought the compiler.
    pub fn is_of_the_system(&self) -> bool {
        self.compiler.prefix == Path::new(SYSTEM)
    }

    /// `cargo SUBCOMMAND` for the kernel side. `flags` are the compiler's flags for it.
    ///
    /// The compiler is called by path, so that neither rustup's overrides nor the toolchain of the `cargo` around us matter.
    /// Flags go through `CARGO_ENCODED_RUSTFLAGS`: when set, even empty, it wins over every other way to give them.
    pub fn cargo(&self, subcommand: &str, flags: &[&str]) -> Command {
        self.prepared(
            Command::new(self.compiler.prefix.join("bin/cargo")),
            subcommand,
            flags,
        )
    }

    /// `cargo clippy` of the same compiler; none if it isn't installed.
    pub fn clippy(&self, flags: &[&str]) -> Option<Command> {
        // By path: `cargo clippy` would find rustup's proxy first.
        Some(self.prepared(Command::new(self.compiler.clippy()?), "clippy", flags))
    }

    fn prepared(&self, mut command: Command, subcommand: &str, flags: &[&str]) -> Command {
        let compiler_bin = self.compiler.prefix.join("bin");
        let linker_dir = self.linker.parent().unwrap_or(Path::new("/"));
        let own_path = env::var_os("PATH").unwrap_or_default();
        let search = env::join_paths(
            [linker_dir, &compiler_bin]
                .into_iter()
                .map(PathBuf::from)
                .chain(env::split_paths(&own_path)),
        )
        .unwrap_or(own_path);
        command
            .arg(subcommand)
            .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core"])
            .current_dir(paths::root().join("dataplane-ebpf"))
            .env("PATH", search)
            .env("CARGO", compiler_bin.join("cargo"))
            .env("RUSTC", compiler_bin.join("rustc"))
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
            .env("CARGO_TARGET_DIR", paths::ebpf_build());
        // Another compiler's libraries and wrappers, from the `cargo run` around us or a lint run.
        for name in [
            "RUSTFLAGS",
            "RUSTUP_TOOLCHAIN",
            "RUSTC_WORKSPACE_WRAPPER",
            "LD_LIBRARY_PATH",
            "CARGO_BUILD_TARGET",
        ] {
            command.env_remove(name);
        }
        command
    }
}

/// Every compiler that could build for BPF, the best first.
pub fn compilers() -> Vec<Compiler> {
    let mut prefixes: Vec<PathBuf> = paths::rustup_home()
        .and_then(|home| fs::read_dir(home.join("toolchains")).ok())
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    // A nightly before others, the undated before dated ones; a stable one with rust-src will do.
    prefixes.sort_by_key(|prefix| {
        let name = prefix
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        (
            !name.starts_with("nightly"),
            name.starts_with("nightly-2"),
            std::cmp::Reverse(name),
        )
    });
    prefixes.push(PathBuf::from(SYSTEM));
    prefixes.into_iter().filter_map(Compiler::at).collect()
}

/// Every `bpf-linker` of this machine, ours first.
fn linkers() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = [
        Some(paths::tools().join("bin")),
        paths::cargo_home().map(|home| home.join("bin")),
    ]
    .into_iter()
    .flatten()
    .map(|dir| dir.join("bpf-linker"))
    .filter(|path| path.is_file())
    .collect();
    found.extend(paths::program("bpf-linker"));
    found
}

/// A compiler and a linker that match. The error says which half is missing.
pub fn find() -> Result<Toolchain> {
    let linkers = linkers();
    let compilers = compilers();
    for compiler in &compilers {
        for linker in &linkers {
            if matches(compiler.llvm, llvm_of_linker(linker)) {
                return Ok(Toolchain {
                    compiler: compiler.clone(),
                    linker: linker.clone(),
                });
            }
        }
    }
    match (compilers.first(), linkers.first()) {
        (None, _) => bail!("no compiler with its library source (rust-src)"),
        (Some(_), None) => bail!("no bpf-linker"),
        (Some(compiler), Some(linker)) => bail!(
            "{} is made with LLVM {}, the compiler {} with LLVM {}",
            linker.display(),
            llvm_of_linker(linker).map_or_else(|| "?".to_owned(), |major| major.to_string()),
            compiler.prefix.display(),
            compiler
                .llvm
                .map_or_else(|| "?".to_owned(), |major| major.to_string()),
        ),
    }
}

/// Unknown versions (a statically linked linker names none) are taken to match: the build itself will tell.
fn matches(compiler: Option<u32>, linker: Option<u32>) -> bool {
    match (compiler, linker) {
        (Some(compiler), Some(linker)) => compiler == linker,
        _ => true,
    }
}

fn llvm_of_compiler(rustc: &Path) -> Option<u32> {
    // By path there is no rustup in between; the variable would only confuse a proxy.
    let text = process::stdout_of(Command::new(rustc).arg("-vV").env_remove("LD_LIBRARY_PATH")).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?
        .split('.')
        .next()?
        .parse()
        .ok()
}

/// The LLVM library that a linker was linked against, by the name its file asks for: `libLLVM.so.22.1`, `libLLVM-22.so`.
fn llvm_of_linker(linker: &Path) -> Option<u32> {
    let bytes = fs::read(linker).ok()?;
    let file = object::File::parse(&*bytes).ok()?;
    llvm_of_library_names(file.section_by_name(".dynstr")?.data().ok()?)
}

/// Searches a string table: names separated by zero bytes.
fn llvm_of_library_names(names: &[u8]) -> Option<u32> {
    names.split(|byte| *byte == 0).find_map(|name| {
        let rest = name
            .strip_prefix(b"libLLVM.so.")
            .or_else(|| name.strip_prefix(b"libLLVM-"))?;
        let digits: String = rest
            .iter()
            .map(|byte| char::from(*byte))
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_of_a_linker_is_read_from_the_library_it_names() {
        assert_eq!(llvm_of_library_names(b"\0libLLVM.so.22.1\0libc.so.6\0"), Some(22));
        assert_eq!(llvm_of_library_names(b"libLLVM-x\0libLLVM-19.so\0"), Some(19));
        assert_eq!(llvm_of_library_names(b"libc.so.6\0"), None);
    }

    #[test]
    fn only_known_and_different_versions_do_not_match() {
        assert!(matches(Some(22), Some(22)));
        assert!(matches(Some(22), None));
        assert!(!matches(Some(21), Some(22)));
    }
}
