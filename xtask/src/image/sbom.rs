//! The bill of materials, `CycloneDX` 1.5 in JSON: every crate that is linked into the agent and into its BPF object, by what
//! cargo says of the two workspaces, and the libraries of the compiler and of C, which a static program holds too.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::oci;
use crate::{paths, process};

/// A crate: name and version.
type Crate = (String, String);

/// Writes the bill of the agent for a target.
pub fn write(triple: &str, version: &str, commit: &str, seconds: u64) -> Result<Vec<u8>> {
    let root = paths::root();
    let mut crates = Crates::default();
    crates.add(&root.join("Cargo.toml"), "dataplane-agent", Some(triple))?;
    crates.add(&root.join("dataplane-ebpf/Cargo.toml"), "dataplane-ebpf", None)?;
    crates.read_checksums(&fs::read_to_string(root.join("Cargo.lock")).context("failed to read Cargo.lock")?);
    crates.read_checksums(
        &fs::read_to_string(root.join("dataplane-ebpf/Cargo.lock"))
            .context("failed to read dataplane-ebpf/Cargo.lock")?,
    );
    let mut document = crates.document(version, commit, seconds);
    if let Some(Value::Array(components)) = document.get_mut("components") {
        components.extend(libraries());
    }
    let mut bytes = serde_json::to_vec_pretty(&document)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// What is linked, with what it depends on.
#[derive(Debug, Default)]
struct Crates {
    /// Licence by crate.
    licences: BTreeMap<Crate, Option<String>>,
    dependencies: BTreeMap<Crate, BTreeSet<Crate>>,
    /// SHA-256 of the crate's archive.
    checksums: BTreeMap<Crate, String>,
}

impl Crates {
    /// A package of a workspace, and what it is linked with.
    fn add(&mut self, manifest: &Path, package: &str, triple: Option<&str>) -> Result<()> {
        let mut command = process::cargo("metadata");
        command
            .args(["--format-version", "1", "--locked", "--manifest-path"])
            .arg(manifest);
        if let Some(triple) = triple {
            command.args(["--filter-platform", triple]);
        }
        let text = process::stdout_of(&mut command)?;
        let metadata: Value =
            serde_json::from_str(&text).context("failed to read what cargo metadata says")?;
        self.take(&metadata, package)
    }

    fn take(&mut self, metadata: &Value, package: &str) -> Result<()> {
        let by_id: BTreeMap<&str, &Value> = values(metadata, "/packages")
            .filter_map(|package| Some((package["id"].as_str()?, package)))
            .collect();
        let nodes: BTreeMap<&str, &Value> = values(metadata, "/resolve/nodes")
            .filter_map(|node| Some((node["id"].as_str()?, node)))
            .collect();
        let first = by_id
            .iter()
            .find(|(_, value)| value["name"] == package)
            .with_context(|| format!("cargo knows no package {package}"))?;
        let mut todo = vec![*first.0];
        let mut seen = BTreeSet::new();
        while let Some(id) = todo.pop() {
            let Some((package, node)) = by_id.get(id).zip(nodes.get(id)) else {
                continue;
            };
            if !seen.insert(id) {
                continue;
            }
            let this = name_of(package);
            let licence = package["license"].as_str();
            // The older way of writing an alternative.
            let licence = licence.map(|text| text.replace(" / ", " OR ").replace('/', " OR "));
            self.licences.insert(this.clone(), licence);
            for dependency in values(node, "/deps").filter(|dependency| is_linked(dependency)) {
                let Some(id) = dependency["pkg"].as_str() else {
                    continue;
                };
                if let Some(package) = by_id.get(id).filter(|package| !is_macro(package)) {
                    let linked = self.dependencies.entry(this.clone()).or_default();
                    linked.insert(name_of(package));
                    todo.push(id);
                }
            }
        }
        Ok(())
    }

    /// The checksums of a lock file, whose tables cargo writes one key a line.
    fn read_checksums(&mut self, lock: &str) {
        for table in lock.split("[[package]]") {
            let value = |key: &str| {
                let line = table.lines().find_map(|line| line.strip_prefix(key));
                line.map(|value| value.trim_matches([' ', '=', '"']).to_owned())
            };
            if let (Some(name), Some(version), Some(checksum)) =
                (value("name ="), value("version ="), value("checksum ="))
            {
                self.checksums.insert((name, version), checksum);
            }
        }
    }

    fn document(&self, version: &str, commit: &str, seconds: u64) -> Value {
        let components: Vec<Value> = self
            .licences
            .iter()
            .map(|(this, licence)| self.component(this, licence.as_deref()))
            .collect();
        let dependencies = self.licences.keys().map(|this| {
            let linked: Vec<String> = self
                .dependencies
                .get(this)
                .into_iter()
                .flatten()
                .map(url_of)
                .collect();
            json!({ "ref": url_of(this), "dependsOn": linked })
        });
        json!({
            "bomFormat": "CycloneDX",
            "specVersion": "1.5",
            "version": 1,
            "metadata": {
                "timestamp": oci::rfc3339(seconds),
                "component": {
                    "type": "container",
                    "bom-ref": "dataplane",
                    "name": "dataplane",
                    "version": version,
                    "licenses": [{ "expression": "Apache-2.0 OR MIT" }],
                    "properties": [{ "name": "git.commit", "value": commit }],
                },
            },
            "components": components,
            "dependencies": dependencies.collect::<Vec<Value>>(),
        })
    }

    fn component(&self, this: &Crate, licence: Option<&str>) -> Value {
        let mut component = json!({
            "type": "library",
            "bom-ref": url_of(this),
            "name": this.0,
            "version": this.1,
            "purl": url_of(this),
        });
        if let Some(licence) = licence {
            component["licenses"] = json!([{ "expression": licence }]);
        }
        if let Some(checksum) = self.checksums.get(this) {
            component["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
        }
        component
    }
}

/// The libraries of the compiler and of C, by what these say of themselves.
fn libraries() -> Vec<Value> {
    let said = |program: &str, argument: &str, licence: &str, name: &str| {
        let text = process::stdout_of(Command::new(program).arg(argument)).ok()?;
        let version = text.split_whitespace().nth(1)?.to_owned();
        Some(json!({
            "type": "library",
            "bom-ref": format!("{name}-{version}"),
            "name": name,
            "version": version,
            "licenses": [{ "expression": licence }],
        }))
    };
    [
        said("rustc", "--version", "Apache-2.0 OR MIT", "rust-std"),
        said("getconf", "GNU_LIBC_VERSION", "LGPL-2.1-or-later", "glibc"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What build scripts and tests depend on is not in the program.
fn is_linked(dependency: &Value) -> bool {
    values(dependency, "/dep_kinds").any(|kind| kind["kind"].is_null())
}

/// The compiler runs it; what it writes is in the program, it itself is not.
fn is_macro(package: &Value) -> bool {
    values(package, "/targets").any(|target| values(target, "/kind").any(|kind| kind == "proc-macro"))
}

fn values<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

fn name_of(package: &Value) -> Crate {
    let text = |key: &str| package[key].as_str().unwrap_or_default().to_owned();
    (text("name"), text("version"))
}

/// The package URL.
fn url_of((name, version): &Crate) -> String {
    format!("pkg:cargo/{name}@{version}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Value {
        let package =
            |id: &str, licence: &str| json!({ "id": id, "name": id, "version": "1.0.0", "license": licence });
        let node = |id: &str, deps: &[(&str, Value)]| {
            let deps = deps
                .iter()
                .map(|(id, kind)| json!({ "pkg": id, "dep_kinds": [{ "kind": kind }] }));
            json!({ "id": id, "deps": deps.collect::<Vec<Value>>() })
        };
        json!({
            "packages": [
                package("agent", "MIT"), package("linked", "MIT/Apache-2.0"), package("behind", "ISC"),
                package("for-tests", "MIT"), package("somebody-else's", "MIT"),
                { "id": "macro", "name": "macro", "version": "1.0.0", "targets": [{ "kind": ["proc-macro"] }] },
            ],
            "resolve": { "nodes": [
                node("agent", &[("linked", Value::Null), ("for-tests", json!("dev"))]),
                node("linked", &[("behind", Value::Null), ("macro", Value::Null)]),
                node("behind", &[]), node("for-tests", &[]), node("somebody-else's", &[]),
            ]},
        })
    }

    #[test]
    fn what_is_linked_is_told_with_licence_and_checksum_and_nothing_else() {
        let mut crates = Crates::default();
        crates.take(&example(), "agent").unwrap();
        crates.read_checksums("[[package]]\nname = \"linked\"\nversion = \"1.0.0\"\nchecksum = \"abc\"\n");
        let bill = crates.document("2.0.0", "f00", 0);
        let names: Vec<&str> = values(&bill, "/components")
            .map(|c| c["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["agent", "behind", "linked"]);
        let linked = &bill["components"][2];
        assert_eq!(linked["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(linked["hashes"][0]["content"], "abc");
        assert_eq!(bill["dependencies"][0]["dependsOn"][0], "pkg:cargo/linked@1.0.0");
        assert_eq!(bill["metadata"]["component"]["version"], "2.0.0");
        assert!(crates.take(&example(), "nobody").is_err());
    }

    #[test]
    fn every_crate_of_a_registry_has_a_licence_and_a_checksum() {
        let mut crates = Crates::default();
        let root = paths::root();
        crates
            .add(&root.join("Cargo.toml"), "dataplane-agent", None)
            .unwrap();
        crates.read_checksums(&fs::read_to_string(root.join("Cargo.lock")).unwrap());
        assert!(crates.licences.len() > 50, "{}", crates.licences.len());
        for (this, licence) in &crates.licences {
            assert!(licence.is_some(), "{this:?} has no licence");
            let ours = this.0.starts_with("dataplane");
            assert!(
                ours || crates.checksums.contains_key(this),
                "{this:?} has no checksum"
            );
        }
    }
}
