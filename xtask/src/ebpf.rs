//! `cargo xtask build-ebpf`: the kernel side, to the one place where the agent's build looks for it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use object::{Object as _, ObjectSection as _};

use crate::{paths, process, progress, setup};

/// Debug information is what BTF is made of; the linker turns it into `.BTF` and `.BTF.ext`.
///
/// The linker generates the code: version 3 of the instruction set (Linux 5.1) has 32-bit arithmetic and compares, and
/// without the permission for misaligned access, headers behind 14 bytes of Ethernet are read byte by byte. With copies expanded in order, which is the default for C,
/// memory is cleared by a loop over its bytes, of which the verifier follows every turn.
pub const FLAGS: &[&str] = &[
    "-C",
    "debuginfo=2",
    "-C",
    "link-arg=--btf",
    "-C",
    "target-cpu=v3",
    "-C",
    "link-arg=--cpu-features=+alu32,+allows-misaligned-mem-access",
    "-C",
    "link-arg=--disable-expand-memcpy-in-order",
];

#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Only check the types: no object is made
    #[arg(long)]
    check_only: bool,
}

/// The command: builds the object, and copies it only when its bytes have changed, so that the agent isn't rebuilt for nothing.
pub fn run(args: &Args) -> Result<()> {
    let toolchain = setup::toolchain()?;
    if args.check_only {
        let mut command = toolchain.cargo("check", FLAGS);
        command.arg("--release");
        return progress::step("checking the kernel side", || {
            process::run(process::quiet_unless_watched(&mut command))
        });
    }
    let mut command = toolchain.cargo("build", FLAGS);
    command.arg("--release");
    progress::step("building the kernel side", || {
        process::run(process::quiet_unless_watched(&mut command))
    })?;

    for (built, place) in [
        ("dataplane", paths::ebpf_object()),
        ("bench", paths::ebpf_bench_object()),
    ] {
        let built = paths::ebpf_build().join("bpfel-unknown-none/release").join(built);
        let bytes = fs::read(&built).with_context(|| format!("failed to read {}", built.display()))?;
        verify(&bytes).with_context(|| format!("{} can't be loaded", built.display()))?;
        let bytes = without_debug_info(&bytes).context("failed to strip the object")?;
        if install(&bytes, &place)? {
            progress::note(&format!(
                "new object: {} ({} KiB)",
                place.display(),
                bytes.len() / 1024
            ));
        }
    }
    Ok(())
}

/// The object has type information, and its maps are BTF maps: legacy ones can't be read by libbpf and show no field names.
fn verify(bytes: &[u8]) -> Result<()> {
    let file = object::File::parse(bytes).context("not an ELF object")?;
    for section in [".BTF", ".BTF.ext"] {
        if file
            .section_by_name(section)
            .is_none_or(|section| section.size() == 0)
        {
            bail!(
                "no {section} section: the compiler left out debug information, or the linker was not given --btf"
            );
        }
    }
    if file.section_by_name("maps").is_some() {
        bail!("a legacy `maps` section: declare maps with `#[btf_map]`");
    }
    Ok(())
}

/// Leaves DWARF out, most of the object: the kernel and bpftool read BTF. The full object stays where it was built, for
/// `llvm-objdump -S`.
fn without_debug_info(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut builder = object::build::elf::Builder::read(bytes)?;
    for section in &mut builder.sections {
        section.delete = section.name.starts_with(b".debug_") || section.name.starts_with(b".rel.debug_");
    }
    // LLVM keeps the names of sections and symbols in one table; the builder wants one for each.
    let names = builder.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.data = object::build::elf::SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped)?;
    Ok(stripped)
}

/// Writes the object beside its place and renames it, so that no build reads half of it. False if it was there already.
fn install(bytes: &[u8], place: &Path) -> Result<bool> {
    if fs::read(place).is_ok_and(|present| present == bytes) {
        return Ok(false);
    }
    let dir = place.parent().context("the object's place has no directory")?;
    fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
    let fresh = place.with_extension("o.new");
    fs::write(&fresh, bytes).with_context(|| format!("failed to write {}", fresh.display()))?;
    fs::rename(&fresh, place).with_context(|| format!("failed to move the object to {}", place.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_object_is_left_alone() {
        let dir = std::env::temp_dir().join(format!("xtask-install-{}", std::process::id()));
        let place = dir.join("ebpf/dataplane.o");
        assert!(install(b"one", &place).unwrap());
        assert!(!install(b"one", &place).unwrap());
        assert!(install(b"two", &place).unwrap());
        assert_eq!(fs::read(&place).unwrap(), b"two");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn what_is_no_object_with_btf_is_refused() {
        assert!(verify(b"\x7fELF").is_err());
        let own = fs::read("/proc/self/exe").unwrap();
        assert!(verify(&own).unwrap_err().to_string().contains(".BTF"));
    }
}
