//! An older object beside the new one: whether its tables can be filled as ours, and what is printed of it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use dataplane_tests::test_run::stats::Comparison;

use crate::cases::{Case, Tables};
use crate::layout::{Btf, Layout};

/// How many times as long as before a packet may take.
pub const LIMIT: f64 = 1.05;

/// Behind the header of the rows.
pub const HEADER: &str = "      old  ours/old  (95 % of medians)";

/// Every table that rows fill. The datapath before the last three is refused: nothing could be measured.
const TABLES: [&str; 10] = [
    "SERVICES",
    "BACKENDS",
    "MAGLEV",
    "PORTS",
    "DEVICES",
    "FRONTENDS_V4",
    "FLOWS_V4",
    "HALF_OPEN_V4",
    "AFFINITY_V4",
    "RANGES_V4",
];
/// Those that are there for some rows only.
const OPTIONAL: [&str; 2] = ["AFFINITY_V4", "RANGES_V4"];

/// An older object whose tables can be filled.
#[derive(Debug)]
pub struct Baseline {
    pub object: PathBuf,
    /// The tables that it lacks.
    missing: BTreeSet<&'static str>,
}

impl Baseline {
    /// An error names the first table that has another layout: whose keys differ, or whose values are not the beginning
    /// of this build's. What a later build has appended, an older program does not look for.
    pub fn open(object: &Path, ours: &Path) -> Result<Self> {
        let (old, new) = (Btf::read(object)?, Btf::read(ours)?);
        let mut missing = BTreeSet::new();
        for name in TABLES {
            let Some(found) = old.table(name)? else {
                if !OPTIONAL.contains(&name) {
                    bail!("the baseline has no table {name}: it is too old, or no datapath");
                }
                missing.insert(name);
                continue;
            };
            let expected = new.table(name)?.with_context(|| format!("no map {name}"))?;
            check(name, &found, &expected)?;
        }
        Ok(Self {
            object: object.to_owned(),
            missing,
        })
    }

    /// Why a row has no column of the older object, if it lacks something that the row is about.
    pub fn lacks(&self, case: &Case) -> Option<String> {
        let needed = match case.tables {
            Tables::Affinity => "AFFINITY_V4",
            Tables::Ranges => "RANGES_V4",
            _ => return None,
        };
        self.missing
            .contains(needed)
            .then(|| format!("the baseline has no table {needed}"))
    }
}

fn check(name: &str, old: &Layout, ours: &Layout) -> Result<()> {
    if old.key == ours.key && old.value.begins(&ours.value) {
        return Ok(());
    }
    bail!(
        "the baseline's {name} has keys of {} and values of {} bytes, this build's {} and {}, and they are not the beginning of these: it can't be filled",
        old.key.size,
        old.value.size,
        ours.key.size,
        ours.value.size
    )
}

/// The columns of a comparison.
pub fn columns(of: &Comparison) -> String {
    let (low, high) = of.between;
    let mark = if of.is_over { "  SLOWER" } else { "" };
    format!(
        " {:>8.1}  {:>8.3}  ({low:.3} to {high:.3}){mark}",
        of.base, of.ratio
    )
}
