//! What dependencies may be: licences, bans and sources, by `deny.toml` in cargo-deny's format and by what cargo itself says of
//! the lock files. cargo-deny would take longer to build than all of the project, and its advisories come from a repository.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use spdx::{Expression, LicenseReq, ParseMode};

use crate::{paths, process};

const PLATFORM: &str = "x86_64-unknown-linux-gnu";

#[derive(Debug, Deserialize)]
struct Policy {
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}

#[derive(Debug, Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Bans {
    deny: Vec<Banned>,
}

#[derive(Debug, Deserialize)]
struct Banned {
    name: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: Vec<String>,
}

/// What `cargo metadata` says, as far as it is looked at.
#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    /// None: a path in this repository.
    source: Option<String>,
}

/// Fails, naming each package that may not be there.
pub fn run() -> Result<()> {
    let file = paths::root().join("deny.toml");
    let text = fs::read_to_string(&file).with_context(|| format!("failed to read {}", file.display()))?;
    let policy: Policy =
        toml::from_str(&text).with_context(|| format!("failed to read {}", file.display()))?;
    let mut wrong = Vec::new();
    for manifest in ["Cargo.toml", "dataplane-ebpf/Cargo.toml"] {
        let packages = packages(&paths::root().join(manifest))?;
        ensure!(packages.len() > 1, "{manifest}: cargo names no dependencies");
        wrong.extend(packages.iter().flat_map(|package| policy.against(package)));
    }
    wrong.sort();
    wrong.dedup();
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn packages(manifest: &Path) -> Result<Vec<Package>> {
    // What other systems would need is never built, and need not be downloaded to be looked at.
    let mut command = process::cargo("metadata");
    command
        .args([
            "--locked",
            "--format-version",
            "1",
            "--filter-platform",
            PLATFORM,
            "--manifest-path",
        ])
        .arg(manifest);
    let output = command.output().context("failed to run cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let metadata: Metadata =
        serde_json::from_slice(&output.stdout).context("failed to read what cargo metadata says")?;
    Ok(metadata.packages)
}

impl Policy {
    /// What speaks against a package.
    fn against(&self, package: &Package) -> Vec<String> {
        let Package {
            name,
            version,
            license,
            source,
        } = package;
        let mut wrong = Vec::new();
        if self.bans.deny.iter().any(|banned| banned.name == *name) {
            wrong.push(format!("{name} {version} is banned"));
        }
        if let Some(source) = source {
            let registry = source.strip_prefix("registry+");
            if !registry.is_some_and(|registry| self.sources.allow_registry.iter().any(|one| one == registry))
            {
                wrong.push(format!("{name} {version} comes from {source}"));
            }
        }
        let license = license.as_deref().unwrap_or_default();
        if !self.allows(license) {
            wrong.push(format!(
                "{name} {version} has a licence that is not listed: `{license}`"
            ));
        }
        wrong
    }

    fn allows(&self, license: &str) -> bool {
        // Old manifests have a slash for OR, and names that have become others.
        Expression::parse_mode(license, ParseMode::LAX).is_ok_and(|expression| {
            expression.evaluate(|wanted: &LicenseReq| self.licenses.allow.contains(&wanted.to_string()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_built_in_may_be() {
        run().unwrap();
    }

    #[test]
    fn a_package_may_be_there_by_name_source_and_licence() {
        let policy = Policy {
            licenses: Licenses {
                allow: vec![
                    "MIT".to_owned(),
                    "Apache-2.0".to_owned(),
                    "Apache-2.0 WITH LLVM-exception".to_owned(),
                ],
            },
            bans: Bans {
                deny: vec![Banned {
                    name: "bad".to_owned(),
                }],
            },
            sources: Sources {
                allow_registry: vec!["https://index".to_owned()],
            },
        };
        let wrong = |name: &str, source: Option<&str>, license: Option<&str>| {
            let package = Package {
                name: name.to_owned(),
                version: "1.0.0".to_owned(),
                license: license.map(str::to_owned),
                source: source.map(str::to_owned),
            };
            policy.against(&package).len()
        };
        let index = Some("registry+https://index");
        for license in [
            "MIT",
            "GPL-2.0 OR MIT",
            "MIT/Apache-2.0",
            "(MIT OR Zlib) AND Apache-2.0",
            "Apache-2.0 WITH LLVM-exception",
        ] {
            assert_eq!(wrong("good", index, Some(license)), 0, "{license}");
        }
        for license in ["GPL-2.0-only", "MIT AND Zlib", "nonsense", ""] {
            assert_eq!(wrong("good", index, Some(license)), 1, "{license}");
        }
        assert_eq!(wrong("good", index, None), 1);
        assert_eq!(wrong("bad", index, Some("MIT")), 1);
        assert_eq!(wrong("good", Some("registry+https://other"), Some("MIT")), 1);
        assert_eq!(wrong("good", Some("git+https://index"), Some("MIT")), 1);
        assert_eq!(wrong("ours", None, Some("MIT")), 0);
    }
}
