//! What Debian packages and tests need, never installed: kernels of whichever release has a series, downloaded and unpacked below
//! `target/kernels`, and promtool among the tools. The package manager is asked with lists and a cache of its own there, so that the machine's stay as they are;
//! the mirror is the machine's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{paths, process, progress};

/// What packages of a kernel begin with; since 7.x there are four to one kernel.
const PARTS: [&str; 4] = ["linux-image-", "linux-modules-", "linux-binary-", "linux-base-"];

/// The newest kernel of a series in a release, unpacked; none if the machine has no mirror or that has none.
///
/// `series` is what the version begins with, such as `6.1.`.
pub fn kernel(release: &str, series: &str) -> Result<Option<PathBuf>> {
    let parent = paths::root().join("target/kernels");
    fs::create_dir_all(&parent).with_context(|| format!("failed to create {}", parent.display()))?;
    let Some(apt) = Apt::of(&parent, release)? else {
        return Ok(None);
    };
    let names = apt.names("linux-")?;
    let Some(version) = newest(&names, series) else {
        return Ok(None);
    };
    let dir = parent.join(version);
    if dir.is_dir() {
        return Ok(Some(dir));
    }
    let partial = parent.join(format!("{version}.partial"));
    make_anew(&partial)?;
    progress::step(&format!("downloading Linux {version}"), || {
        let parts = PARTS.map(|part| format!("{part}{version}"));
        for package in parts.iter().filter(|part| names.contains(*part)) {
            apt.unpack(package, &partial)?;
        }
        Ok(())
    })?;
    fs::rename(&partial, &dir).with_context(|| format!("failed to rename {}", partial.display()))?;
    Ok(Some(dir))
}

/// Prometheus' own judge of metrics and rules: the machine's, or else out of Debian's package; none if the machine has no mirror.
pub fn promtool() -> Result<Option<PathBuf>> {
    const NAME: &str = "promtool";
    let own = paths::tools().join("bin").join(NAME);
    if let Some(found) = paths::program(NAME).or_else(|| own.is_file().then(|| own.clone())) {
        return Ok(Some(found));
    }
    let partial = paths::root().join("target/promtool.partial");
    make_anew(&partial)?;
    let Some(apt) = Apt::of(&partial, "bookworm")? else {
        return Ok(None);
    };
    progress::step("downloading promtool", || apt.unpack("prometheus", &partial))?;
    if let Some(folder) = own.parent() {
        fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
    }
    // Copied beside its place and renamed: tools may be on another file system, and half a program is none.
    let half = own.with_extension("partial");
    fs::copy(partial.join("usr/bin").join(NAME), &half).context("the package has no promtool")?;
    fs::rename(&half, &own).with_context(|| format!("failed to rename {}", half.display()))?;
    fs::remove_dir_all(&partial).with_context(|| format!("failed to remove {}", partial.display()))?;
    Ok(Some(own))
}

/// An empty folder, whatever an interrupted run has left there.
fn make_anew(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("failed to remove {}", dir.display()))?;
    }
    fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))
}

/// The package manager, with one release as its only source.
#[derive(Debug)]
struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// None if the machine's own sources name no mirror of Debian.
    fn of(parent: &Path, release: &str) -> Result<Option<Self>> {
        let Some(mirror) = mirror()? else {
            return Ok(None);
        };
        let dir = parent.join("apt").join(release);
        for folder in ["lists/partial", "cache/archives/partial"] {
            let path = dir.join(folder);
            fs::create_dir_all(&path).with_context(|| format!("failed to create {}", path.display()))?;
        }
        let source = dir.join("sources.list");
        fs::write(&source, format!("deb {mirror} {release} main\n"))
            .with_context(|| format!("failed to write {}", source.display()))?;
        let set = |key: &str, path: &Path| [String::from("-o"), format!("{key}={}", path.display())];
        let options = [
            set("Dir::State::lists", &dir.join("lists")),
            set("Dir::Cache", &dir.join("cache")),
            set("Dir::Etc::sourcelist", &source),
            set("Dir::Etc::sourceparts", Path::new("/dev/null")),
            // Releases that are no longer maintained are not signed anew.
            set("Acquire::Check-Valid-Until", Path::new("false")),
        ];
        let apt = Self {
            options: options.concat(),
        };
        progress::step(&format!("reading what Debian's {release} has"), || {
            process::run_captured(&mut apt.command("apt-get", &["update"]))
        })?;
        Ok(Some(apt))
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options).args(args);
        command
    }

    /// Packages whose names begin so.
    fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let listed = process::stdout_of(&mut self.command("apt-cache", &["pkgnames", prefix]))?;
        Ok(listed.lines().map(str::to_owned).collect())
    }

    /// Downloads a package, and unpacks it into `dir`.
    fn unpack(&self, package: &str, dir: &Path) -> Result<()> {
        process::run_captured(self.command("apt-get", &["download", package]).current_dir(dir))?;
        let archive = fs::read_dir(dir)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get left no {package}"))?;
        process::run_captured(Command::new("dpkg").arg("-x").arg(&archive).arg(dir))?;
        fs::remove_file(&archive).with_context(|| format!("failed to remove {}", archive.display()))
    }
}

/// Where the machine has its own packages from.
fn mirror() -> Result<Option<String>> {
    let listed = process::stdout_of(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(LABEL) $(REPO_URI)",
        "Created-By: Packages",
    ]))?;
    let mirror = listed.lines().find_map(|line| line.strip_prefix("Debian "));
    ensure!(
        mirror.is_none_or(|uri| !uri.contains(char::is_whitespace)),
        "apt-get names a mirror with spaces: {listed}"
    );
    Ok(mirror.map(str::to_owned))
}

/// The newest version among signed images of ordinary kernels, `6.1.0-56-amd64` of `linux-image-6.1.0-56-amd64`.
fn newest<'a>(names: &'a [String], series: &str) -> Option<&'a str> {
    names
        .iter()
        .filter_map(|name| name.strip_prefix(PARTS[0]))
        .filter(|version| version.starts_with(series) && version.ends_with("-amd64"))
        .filter(|version| {
            !["-rt-", "-cloud-", "bpo"]
                .iter()
                .any(|part| version.contains(part))
        })
        .max_by_key(|version| numbers(version))
}

fn numbers(version: &str) -> Vec<u64> {
    version
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_signed_image_of_a_series_is_taken() {
        let names = [
            "linux-image-6.1.0-9-amd64",
            "linux-image-6.1.0-56-amd64",
            "linux-image-6.1.0-57-cloud-amd64",
            "linux-image-6.1.0-57-amd64-unsigned",
            "linux-image-6.1.0-57-rt-amd64",
            "linux-image-6.12.117+deb12-amd64",
            "linux-modules-6.1.0-58-amd64",
        ]
        .map(str::to_owned);
        assert_eq!(newest(&names, "6.1."), Some("6.1.0-56-amd64"));
        assert_eq!(newest(&names, "6.12."), Some("6.12.117+deb12-amd64"));
        assert_eq!(newest(&names, "5.10."), None);
    }
}
