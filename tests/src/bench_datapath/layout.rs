//! What the tables of an object look like, from its BTF: `bpftool` prints it. Keys and values are taken apart into numbers,
//! each with offset and size; names say nothing, fields are renamed.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

/// One type of `bpftool btf dump`. Which fields are there depends on its kind.
#[derive(Debug, Deserialize)]
struct Type {
    id: u32,
    kind: String,
    #[serde(default)]
    name: String,
    /// Bytes.
    #[serde(default)]
    size: u32,
    /// What it points at, is an array of, or is the type of.
    #[serde(default, rename = "type_id")]
    target: u32,
    #[serde(default)]
    nr_elems: u32,
    #[serde(default)]
    members: Vec<Member>,
}

#[derive(Debug, Deserialize)]
struct Member {
    name: String,
    type_id: u32,
    bits_offset: u32,
}

/// The BTF of an object.
#[derive(Debug)]
pub struct Btf(BTreeMap<u32, Type>);

/// Keys and values of a table.
#[derive(Debug, PartialEq, Eq)]
pub struct Layout {
    pub key: Record,
    pub value: Record,
}

/// A key or a value.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Bytes.
    pub size: u32,
    /// Size by offset of each number, in bytes.
    numbers: BTreeMap<u32, u32>,
}

impl Record {
    /// Whether a longer or equal value begins with this one's numbers.
    pub fn begins(&self, other: &Self) -> bool {
        self.size <= other.size && other.numbers.range(..self.size).eq(&self.numbers)
    }
}

impl Btf {
    pub fn read(object: &Path) -> Result<Self> {
        let output = Command::new("bpftool")
            .args(["--json", "btf", "dump", "file"])
            .arg(object)
            .output()
            .context("failed to start bpftool (`cargo xtask setup` installs it)")?;
        if !output.status.success() {
            bail!(
                "bpftool failed on {}: {}",
                object.display(),
                String::from_utf8_lossy(&output.stdout).trim()
            );
        }
        Self::parse(&output.stdout).with_context(|| format!("failed to read the BTF of {}", object.display()))
    }

    fn parse(json: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Dump {
            types: Vec<Type>,
        }
        let dump: Dump = serde_json::from_slice(json)?;
        Ok(Self(dump.types.into_iter().map(|of| (of.id, of)).collect()))
    }

    /// `None` if there is no such table.
    pub fn table(&self, name: &str) -> Result<Option<Layout>> {
        let Some(variable) = self.0.values().find(|of| of.kind == "VAR" && of.name == name) else {
            return Ok(None);
        };
        let definition = self.get(variable.target)?;
        let record = |field: &str| -> Result<Record> {
            let member = definition.members.iter().find(|member| member.name == field);
            let pointer = self.get(member.with_context(|| format!("{name} has no {field}"))?.type_id)?;
            let mut record = Record::default();
            record.size = self.take_apart(pointer.target, 0, &mut record.numbers)?;
            Ok(record)
        };
        Ok(Some(Layout {
            key: record("key")?,
            value: record("value")?,
        }))
    }

    /// Adds the numbers of a type that is at an offset; its size.
    fn take_apart(&self, id: u32, offset: u32, into: &mut BTreeMap<u32, u32>) -> Result<u32> {
        let of = self.get(id)?;
        match of.kind.as_str() {
            "INT" | "ENUM" | "ENUM64" => {
                into.insert(offset, of.size);
                Ok(of.size)
            }
            "STRUCT" => {
                for member in &of.members {
                    ensure!(member.bits_offset % 8 == 0, "{} has a bit field", of.name);
                    self.take_apart(member.type_id, offset + member.bits_offset / 8, into)?;
                }
                Ok(of.size)
            }
            "ARRAY" => (0..of.nr_elems).try_fold(0, |size, _| {
                Ok(size + self.take_apart(of.target, offset + size, into)?)
            }),
            kind => bail!("a table has a {kind} in it"),
        }
    }

    fn get(&self, id: u32) -> Result<&Type> {
        self.0.get(&id).with_context(|| format!("there is no type {id}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table with a `u32` key and a value of the given members, of types 1 (u32), 2 (u16) and 3 ([u16; 2]).
    fn table(size: u32, members: &[(u32, u32)]) -> Layout {
        let members: Vec<String> = members
            .iter()
            .map(|(bytes, id)| format!(r#"{{"name":"m","type_id":{id},"bits_offset":{}}}"#, bytes * 8))
            .collect();
        let members = members.join(",");
        let json = format!(
            r#"{{"types":[
                {{"id":1,"kind":"INT","name":"u32","size":4,"bits_offset":0,"nr_bits":32,"encoding":"(none)"}},
                {{"id":2,"kind":"INT","name":"u16","size":2,"bits_offset":0,"nr_bits":16,"encoding":"(none)"}},
                {{"id":3,"kind":"ARRAY","name":"(anon)","type_id":2,"index_type_id":1,"nr_elems":2}},
                {{"id":4,"kind":"STRUCT","name":"V","size":{size},"vlen":2,"members":[{members}]}},
                {{"id":5,"kind":"PTR","name":"(anon)","type_id":1}},
                {{"id":6,"kind":"PTR","name":"(anon)","type_id":4}},
                {{"id":7,"kind":"STRUCT","name":"Array","size":16,"vlen":2,"members":[
                    {{"name":"key","type_id":5,"bits_offset":0}},{{"name":"value","type_id":6,"bits_offset":64}}]}},
                {{"id":8,"kind":"VAR","name":"T","type_id":7,"linkage":"global"}}]}}"#
        );
        let btf = Btf::parse(json.as_bytes()).unwrap();
        assert!(btf.table("V").unwrap().is_none());
        btf.table("T").unwrap().unwrap()
    }

    #[test]
    fn appended_fields_leave_the_beginning() {
        let old = table(8, &[(0, 1), (4, 3)]);
        assert_eq!((old.key.size, old.value.size), (4, 8));
        assert!(old.value.begins(&old.value));
        let appended = table(12, &[(0, 1), (4, 3), (8, 1)]);
        assert!(old.value.begins(&appended.value));
        assert!(!appended.value.begins(&old.value));
    }

    #[test]
    fn moved_split_and_joined_fields_do_not() {
        let old = table(8, &[(0, 1), (4, 3)]).value;
        for (what, other) in [
            ("joined", table(12, &[(0, 1), (4, 1), (8, 1)])),
            ("split", table(12, &[(0, 3), (4, 3), (8, 1)])),
            ("moved", table(12, &[(0, 3), (4, 1), (8, 1)])),
            ("left out", table(12, &[(0, 1), (8, 1)])),
        ] {
            assert!(!old.begins(&other.value), "{what}");
        }
        // What was padding has become a field.
        let padded = table(8, &[(0, 1), (4, 2)]).value;
        assert!(!padded.begins(&old));
    }
}
