//! An older object beside the new one: whether its tables can be filled as ours, and whether a row got slower.
//!
//! Noise is judged twice. A row's ratio is the median over its rounds, and the 95 % confidence interval of that median
//! (by order statistics, so without assuming a distribution) has to lie above the limit as a whole. And since the kernel
//! tells whole nanoseconds only, a difference of less than one says nothing.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::cases::{Case, Tables};
use crate::layout::{Btf, Layout};
use crate::median;

/// How many times as long as before a packet may take.
const LIMIT: f64 = 1.05;
/// What the kernel's answers can't tell from nothing, ns.
const RESOLUTION: f64 = 1.0;

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

/// What came out of the rounds of both objects.
#[derive(Debug, Serialize)]
pub struct Comparison {
    old_net: f64,
    ratio: f64,
    /// The confidence interval of the ratio's median.
    between: (f64, f64),
    pub slower: bool,
}

impl Comparison {
    /// From ns a packet, net, one element a round. `None` without rounds of the older object.
    pub fn of(old: &[f64], ours: &[f64]) -> Option<Self> {
        let ratios: Vec<f64> = ours.iter().zip(old).map(|(a, b)| a / b.max(1.0)).collect();
        let differences: Vec<f64> = ours.iter().zip(old).map(|(a, b)| a - b).collect();
        let between = interval(&ratios)?;
        Some(Self {
            old_net: median(old),
            ratio: median(&ratios),
            between,
            slower: between.0 > LIMIT && median(&differences) > RESOLUTION,
        })
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            old_net,
            ratio,
            between: (low, high),
            slower,
        } = self;
        let mark = if *slower { "  SLOWER" } else { "" };
        write!(f, " {old_net:>8.1}  {ratio:>8.3}  ({low:.3} to {high:.3}){mark}")
    }
}

/// The 95 % confidence interval of the median: as many of the smallest and of the largest are left out as a fair coin
/// would leave out in less than 2.5 % of all cases each. With fewer than six it is all there is.
fn interval(of: &[f64]) -> Option<(f64, f64)> {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rounds = u16::try_from(of.len()).ok()?;
    let (mut left_out, mut tail, mut ways) = (0, 0.0, 0.5f64.powi(rounds.into()));
    loop {
        tail += ways;
        if tail > 0.025 {
            break;
        }
        ways *= f64::from(rounds - left_out) / f64::from(left_out + 1);
        left_out += 1;
    }
    let first = usize::from(left_out.saturating_sub(1));
    Some((*sorted.get(first)?, *sorted.get(sorted.len() - 1 - first)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_leave_out_what_a_coin_would() {
        let values = |count: u32| (0..count).map(f64::from).collect::<Vec<_>>();
        // Tables of the sign test, two-sided, 5 %.
        for (count, first) in [(5, 0.0), (6, 0.0), (9, 1.0), (15, 3.0), (31, 9.0)] {
            let last = f64::from(count - 1) - first;
            assert_eq!(interval(&values(count)), Some((first, last)), "{count} rounds");
        }
        assert_eq!(interval(&[]), None);
    }

    #[test]
    fn slower_is_what_noise_does_not_explain() {
        let old: Vec<f64> = (0..15).map(|round| 100.0 + f64::from(round % 5)).collect();
        let scaled = |by: f64| old.iter().map(|ns| ns * by).collect::<Vec<_>>();
        let slower = |ours: &[f64]| Comparison::of(&old, ours).unwrap().slower;
        assert!(!slower(&old));
        assert!(!slower(&scaled(1.04)));
        assert!(slower(&scaled(1.06)));
        // Five rounds in which the machine was busy.
        let mut busy = scaled(1.0);
        busy[..5].iter_mut().for_each(|ns| *ns *= 2.0);
        assert!(!slower(&busy));
        // Less than the kernel's clock can tell.
        let few = vec![4.0; 15];
        assert!(!Comparison::of(&few, &[4.9; 15]).unwrap().slower);
        assert!(Comparison::of(&few, &[5.1; 15]).unwrap().slower);
    }
}
