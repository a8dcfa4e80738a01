//! `cargo xtask image`: the agent and the CNI plugin, each one static program, in an image FROM scratch. No daemon and no
//! registry: an OCI archive in target/image, with its SBOM beside it. The same programs give the same bytes.

mod oci;
mod sbom;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{build, paths, process, progress};

/// What the chart asks for when nothing else is said: a name that no runtime looks for in a registry.
pub const NAME: &str = "localhost/dataplane";
const SBOM_PLACE: &str = "usr/share/doc/dataplane/sbom.cdx.json";
const TITLE: &str = "dataplane";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// For which processors; by default this machine's, and the other one if the compiler and a linker for it are there
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// The image's name in the archive
    #[arg(long, default_value = NAME)]
    name: String,
    /// Its tag [default: the version]
    #[arg(long)]
    tag: Option<String>,
}

/// A processor, by the names that images use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    const ALL: [Self; 2] = [Arch::Amd64, Arch::Arm64];

    fn of_this_machine() -> Option<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Arch::Amd64),
            "aarch64" => Some(Arch::Arm64),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Arch::Amd64 => "amd64",
            Arch::Arm64 => "arm64",
        }
    }

    fn triple(self) -> &'static str {
        match self {
            Arch::Amd64 => "x86_64-unknown-linux-gnu",
            Arch::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// The C compiler that links for it.
    fn compiler(self) -> &'static str {
        if Self::of_this_machine() == Some(self) {
            return "cc";
        }
        match self {
            Arch::Amd64 => "x86_64-linux-gnu-gcc",
            Arch::Arm64 => "aarch64-linux-gnu-gcc",
        }
    }
}

/// The command: prints the path of each archive.
pub fn run(args: &Args) -> Result<()> {
    let own = Arch::of_this_machine();
    for arch in Arch::ALL {
        match args.arch {
            Some(wanted) if wanted != arch => continue,
            _ => {}
        }
        if let Some(lacking) = lacking(arch)? {
            if args.arch == Some(arch) || own == Some(arch) {
                bail!("there can be no image for {}: {lacking}", arch.name());
            }
            progress::note(&format!("no image for {}: {lacking}", arch.name()));
            continue;
        }
        let made = make(arch, &args.name, args.tag.as_deref())?;
        println!("{}", made.display());
    }
    Ok(())
}

/// Where the archive of this version for this machine is, made anew.
pub fn of_this_machine() -> Result<PathBuf> {
    let arch = Arch::of_this_machine().context("images are for amd64 and arm64")?;
    if let Some(lacking) = lacking(arch)? {
        bail!("there can be no image: {lacking}");
    }
    make(arch, NAME, None)
}

fn make(arch: Arch, name: &str, tag: Option<&str>) -> Result<PathBuf> {
    let version = env!("CARGO_PKG_VERSION");
    let tag = tag.unwrap_or(version);
    let commit = process::commit();
    let built = build::static_programs(
        &["dataplane-agent", "dataplane-cni"],
        foreign(arch).then(|| (arch.triple(), arch.compiler())),
    )?;
    let seconds = seconds_of_commit();
    let bill = sbom::write(arch.triple(), version, &commit, seconds)?;
    let content = content(&built, &bill)?;
    let labels = labels(version, &commit, &oci::rfc3339(seconds));
    let image = oci::Image {
        architecture: arch.name(),
        reference: format!("{name}:{tag}"),
        tag,
        entrypoint: vec!["/usr/bin/dataplane-agent"],
        labels,
        seconds,
        files: content,
    };
    let folder = paths::root().join("target/image");
    fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
    let stem = format!("dataplane-{version}-{}", arch.name());
    let place = folder.join(format!("{stem}.tar"));
    let archive = oci::archive(&image)?;
    write(&place, &archive.bytes)?;
    write(&folder.join(format!("{stem}.cdx.json")), &bill)?;
    let size_of = |name: &str| image.files.get(name).map_or(0, |file| file.content.len());
    progress::note(&format!(
        "{} for {}: {} (agent {}, CNI plugin {}, SBOM {}), packed {}, {}",
        image.reference,
        arch.name(),
        mib(image.files.values().map(|file| file.content.len()).sum()),
        mib(size_of("usr/bin/dataplane-agent")),
        mib(size_of("usr/bin/dataplane-cni")),
        mib(bill.len()),
        mib(archive.bytes.len()),
        archive.digest,
    ));
    Ok(place)
}

fn foreign(arch: Arch) -> bool {
    Arch::of_this_machine() != Some(arch)
}

/// What is missing here for static programs of an architecture.
fn lacking(arch: Arch) -> Result<Option<String>> {
    if foreign(arch) {
        let libraries = process::stdout_of(Command::new("rustc").args([
            "--print",
            "target-libdir",
            "--target",
            arch.triple(),
        ]))?;
        if !Path::new(libraries.trim()).is_dir() {
            return Ok(Some(format!(
                "the compiler has no library for it (rustup target add {})",
                arch.triple()
            )));
        }
    }
    Ok(build::lacking_for_static(arch.compiler()))
}

/// Everything that is in the image, by its path.
fn content(programs: &[PathBuf], bill: &[u8]) -> Result<BTreeMap<String, oci::File>> {
    let mut files = BTreeMap::new();
    for program in programs {
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        let bytes = fs::read(program).with_context(|| format!("failed to read {}", program.display()))?;
        refuse_dynamic(&bytes).with_context(|| program.display().to_string())?;
        files.insert(format!("usr/bin/{name}"), oci::File::program(bytes));
    }
    for licence in ["LICENSE-APACHE", "LICENSE-MIT", "LICENSE-GPL-2.0"] {
        let path = paths::root().join(licence);
        let bytes = fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        files.insert(
            format!("usr/share/doc/dataplane/{licence}"),
            oci::File::text(bytes),
        );
    }
    files.insert(SBOM_PLACE.to_owned(), oci::File::text(bill.to_vec()));
    Ok(files)
}

/// FROM scratch there is no loader that a dynamic program could name.
fn refuse_dynamic(bytes: &[u8]) -> Result<()> {
    use object::read::elf::{ElfFile64, ProgramHeader as _};
    let file = ElfFile64::<object::Endianness>::parse(bytes).context("not an ELF program")?;
    let endian = file.endian();
    let interpreted = file
        .elf_program_headers()
        .iter()
        .any(|header| header.p_type(endian) == object::elf::PT_INTERP);
    if interpreted {
        bail!("the program is not static: it names a loader");
    }
    Ok(())
}

fn labels(version: &str, commit: &str, created: &str) -> BTreeMap<String, String> {
    let labels = [
        ("title", TITLE),
        (
            "description",
            "An eBPF dataplane for Kubernetes: Services and network policies, one small program a node",
        ),
        ("version", version),
        ("revision", commit),
        ("created", created),
        ("licenses", "Apache-2.0 OR MIT"),
    ];
    let key = |name| format!("org.opencontainers.image.{name}");
    labels
        .map(|(name, value)| (key(name), value.to_owned()))
        .into_iter()
        .chain([("dataplane.sbom".to_owned(), format!("/{SBOM_PLACE}"))])
        .collect()
}

/// The time that everything in the image bears: `SOURCE_DATE_EPOCH`, else the commit's, in seconds since 1970.
fn seconds_of_commit() -> u64 {
    let given = std::env::var("SOURCE_DATE_EPOCH").ok();
    let of_commit = || {
        let mut git = Command::new("git");
        git.args(["log", "-1", "--format=%ct"]).current_dir(paths::root());
        process::stdout_of(&mut git).ok()
    };
    given
        .or_else(of_commit)
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("failed to write {}", path.display()))
}

fn mib(bytes: usize) -> String {
    let tenths = (bytes * 10).div_ceil(1 << 20);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_refused() {
        let own = fs::read("/proc/self/exe").unwrap();
        let error = refuse_dynamic(&own).unwrap_err().to_string();
        assert!(error.contains("not static"), "{error}");
        assert!(refuse_dynamic(b"#!/bin/sh").is_err());
    }
}
