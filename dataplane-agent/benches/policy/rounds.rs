//! Contestants that take turns, and a row of what came out.

use anyhow::Result;
use aya::programs::ProgramFd;
use dataplane_tests::test_run::{Trampoline, stats::Comparison};
use serde::Serialize;

use crate::{Args, datapath::Datapath};

/// What is run in each slice of a round.
#[derive(Clone, Copy, Debug)]
pub enum Arm<'a> {
    /// The trampoline alone.
    Nothing,
    /// A floor program.
    Floor(&'a ProgramFd),
    /// The datapath's program. Each contestant has tables of its own: none finds what another has brought into the caches.
    Ours(&'a Datapath),
}

impl Arm<'_> {
    /// What the last of so many packets was answered, and ns a packet.
    pub fn run(
        self,
        trampoline: &mut Trampoline,
        packets: u32,
        out: Option<&mut [u8]>,
    ) -> Result<(u32, f64)> {
        let target = match self {
            Arm::Nothing => None,
            Arm::Floor(program) => Some(program),
            Arm::Ours(datapath) => Some(&datapath.from_pod),
        };
        trampoline.run(target, packets, out)
    }
}

/// ns a packet of each arm, one element a round, net of the first arm, which is left out: the means over slices. Each
/// arm meets the same flows, and they take turns in being first.
pub fn rounds(args: &Args, trampoline: &mut Trampoline, arms: &[Arm<'_>]) -> Result<Vec<Vec<f64>>> {
    let mut net = vec![Vec::new(); arms.len() - 1];
    let packets = args.packets_of_slice();
    // One round more: the first warms up.
    for round in 0..=args.rounds {
        let mut sums = vec![0.0; arms.len()];
        for slice in 0..args.slices as usize {
            for turn in 0..arms.len() {
                let place = (slice + turn) % arms.len();
                // Forwards and backwards: none always comes behind the same one.
                let arm = if slice % 2 == 0 {
                    place
                } else {
                    arms.len() - 1 - place
                };
                sums[arm] += arms[arm].run(trampoline, packets, None)?.1;
            }
            trampoline.walk.on(packets);
        }
        if round > 0 {
            for (of, sum) in net.iter_mut().zip(&sums[1..]) {
                of.push((sum - sums[0]) / f64::from(args.slices));
            }
        }
    }
    Ok(net)
}

/// One thing beside another, and what is aimed at.
#[derive(Debug, Serialize)]
pub struct Row {
    what: String,
    flows: u32,
    /// ns, one element a round.
    base: Vec<f64>,
    ours: Vec<f64>,
    pub comparison: Comparison,
    note: String,
}

impl Row {
    /// `None` without rounds.
    pub fn of(
        what: String,
        flows: u32,
        base: Vec<f64>,
        ours: Vec<f64>,
        aim: f64,
        note: String,
    ) -> Option<Self> {
        let comparison = Comparison::of(&base, &ours, aim)?;
        Some(Self {
            what,
            flows,
            base,
            ours,
            comparison,
            note,
        })
    }

    /// The columns, before which `title` says what the first of the two numbers of ns is, and the other one.
    pub fn header(title: &str, base: &str, ours: &str) -> String {
        format!(
            "{title:<46} {:>8} {base:>9} {ours:>9} {:>6}  (95 % of medians)  aim",
            "flows", "ratio"
        )
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let of = &self.comparison;
        let (low, high) = of.between;
        let aim = if of.limit.is_finite() {
            format!("<= {:.2}", of.limit)
        } else {
            "none".to_owned()
        };
        let judged = if of.limit.is_infinite() {
            ""
        } else if of.is_over {
            "MISSED"
        } else if of.ratio > of.limit {
            "above, within noise"
        } else {
            "met"
        };
        write!(
            f,
            "{:<46} {:>8} {:>9.1} {:>9.1} {:>6.2}  ({low:>6.2} to {high:<6.2})  {aim} {judged}{}",
            self.what, self.flows, of.base, of.ours, of.ratio, self.note
        )
    }
}
