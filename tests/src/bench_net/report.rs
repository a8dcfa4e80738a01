//! What came out: samples, medians, ratios of the same round, the promises, as tables and as JSON.

use comfy_table::{CellAlignment, Table, TableComponent, presets};
use serde::Serialize;

/// All measurements at one number of services.
#[derive(Debug, Default, Serialize)]
pub struct Section {
    pub services: u32,
    pub variants: Vec<Samples>,
}

/// One way to the server: a sample a round, the rounds in the same order for all.
#[derive(Debug, Serialize)]
pub struct Samples {
    pub name: &'static str,
    /// How long it took to program the services.
    pub load_seconds: f64,
    pub connections_per_second: Vec<f64>,
    pub exchanges_per_second: Vec<f64>,
}

/// A ratio that we promise, and what was measured.
#[derive(Debug, Serialize)]
pub struct Promise {
    pub text: String,
    pub at_least: f64,
    pub measured: f64,
    pub kept: bool,
}

/// The name of the variant that all others are compared with.
pub const PLAIN: &str = "plain routing";
/// Ours.
pub const OURS: &str = "dataplane";
/// Ours, with policies on client and server.
pub const POLICIES: &str = "dataplane, policies";
/// kube-proxy's faster mode.
pub const NFTABLES: &str = "nftables";

impl Section {
    fn find(&self, name: &str) -> Option<&Samples> {
        self.variants.iter().find(|samples| samples.name == name)
    }

    /// The median over the rounds of connections/s of one variant as a multiple of another's in the same round.
    fn connections_ratio(&self, name: &str, of: &str) -> Option<f64> {
        ratio(
            &self.find(name)?.connections_per_second,
            &self.find(of)?.connections_per_second,
        )
    }

    /// The same of exchanges/s, on connections that stay.
    fn exchanges_ratio(&self, name: &str, of: &str) -> Option<f64> {
        ratio(
            &self.find(name)?.exchanges_per_second,
            &self.find(of)?.exchanges_per_second,
        )
    }

    /// A table for people.
    pub fn table(&self) -> Table {
        let mut table = plain_table();
        table.set_header([
            &format!("{} services", self.services),
            "connections/s",
            "quartiles",
            "× plain",
            "exchanges/s",
            "quartiles",
            "× plain",
            "programmed in",
        ]);
        for samples in &self.variants {
            let Samples {
                name,
                load_seconds,
                connections_per_second,
                exchanges_per_second,
            } = samples;
            let against = |own: &[f64], plain: fn(&Samples) -> &Vec<f64>| {
                self.find(PLAIN)
                    .and_then(|samples| ratio(own, plain(samples)))
                    .map_or_else(String::new, two_digits)
            };
            table.add_row([
                (*name).to_owned(),
                thousands(median(connections_per_second)),
                quartiles(connections_per_second),
                against(connections_per_second, |samples| &samples.connections_per_second),
                thousands(median(exchanges_per_second)),
                quartiles(exchanges_per_second),
                against(exchanges_per_second, |samples| &samples.exchanges_per_second),
                if *load_seconds > 0.0 {
                    format!("{load_seconds:.2} s")
                } else {
                    String::new()
                },
            ]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

/// The promises that these sections can judge: connections/s against plain routing and nftables in the smallest
/// cluster, what policies leave of exchanges/s there, and how much of ours is left in the largest.
pub fn promises(sections: &[Section]) -> Vec<Promise> {
    let mut promises = Vec::new();
    let mut promise = |text: String, at_least: f64, measured: Option<f64>| {
        promises.extend(measured.map(|measured| Promise {
            text,
            at_least,
            measured,
            kept: measured >= at_least,
        }));
    };
    let (Some(least), Some(most)) = (sections.first(), sections.last()) else {
        return promises;
    };
    let at = |section: &Section| format!("at {} services", section.services);
    promise(
        format!("connections/s ÷ plain routing {}", at(least)),
        1.0,
        least.connections_ratio(OURS, PLAIN),
    );
    promise(
        format!("connections/s ÷ nftables rules {}", at(least)),
        1.15,
        least.connections_ratio(OURS, NFTABLES),
    );
    // No more than 1.05 times as long.
    promise(
        format!("exchanges/s with policies ÷ without {}", at(least)),
        1.0 / 1.05,
        least.exchanges_ratio(POLICIES, OURS),
    );
    if most.services > least.services {
        // Plain routing does not know of services: it carries the machine's mood from one section to the next.
        let kept = least
            .connections_ratio(OURS, PLAIN)
            .zip(most.connections_ratio(OURS, PLAIN))
            .map(|(a, b)| b / a);
        promise(format!("connections/s {} ÷ {}", at(most), at(least)), 0.95, kept);
    }
    promises
}

/// A table of promises for people.
pub fn promises_table(promises: &[Promise]) -> Table {
    let mut table = plain_table();
    table.set_header(["promise", "at least", "measured", ""]);
    for Promise {
        text,
        at_least,
        measured,
        kept,
    } in promises
    {
        let verdict = if *kept { "kept" } else { "MISSED" };
        table.add_row([
            text.clone(),
            two_digits(*at_least),
            two_digits(*measured),
            verdict.to_owned(),
        ]);
    }
    table
}

/// Lines above, below and under the header only.
fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    for between_rows in [
        TableComponent::HorizontalLines,
        TableComponent::MiddleIntersections,
        TableComponent::LeftBorderIntersections,
        TableComponent::RightBorderIntersections,
    ] {
        table.remove_style(between_rows);
    }
    table
}

fn two_digits(value: f64) -> String {
    format!("{value:.2}")
}

fn thousands(value: f64) -> String {
    format!("{:.1} k", value / 1000.0)
}

fn quartiles(values: &[f64]) -> String {
    format!(
        "{:.1}–{:.1}",
        quartile(values, 1) / 1000.0,
        quartile(values, 3) / 1000.0
    )
}

fn median(values: &[f64]) -> f64 {
    quartile(values, 2)
}

/// Round by round, then the median: what slows the machine for seconds slows both.
fn ratio(own: &[f64], of: &[f64]) -> Option<f64> {
    let ratios: Vec<f64> = own.iter().zip(of).map(|(own, of)| own / of).collect();
    (!ratios.is_empty()).then(|| median(&ratios))
}

/// Of the sorted values, the one that lies some quarters of the way; 0 for no values.
fn quartile(values: &[f64], quarters: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let steps = sorted.len().saturating_sub(1);
    let place = steps * quarters;
    let below = sorted.get(place / 4).copied().unwrap_or_default();
    let above = sorted.get(place.div_ceil(4)).copied().unwrap_or(below);
    below + (above - below) * f64::from((place % 4) as u8) / 4.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(name: &'static str, rates: [f64; 3]) -> Samples {
        Samples {
            name,
            load_seconds: 0.0,
            connections_per_second: rates.to_vec(),
            exchanges_per_second: rates.to_vec(),
        }
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // The machine halves its speed in the second round: the ratio stays.
        assert_eq!(ratio(&[30.0, 15.0, 30.0], &[20.0, 10.0, 20.0]), Some(1.5));
        assert_eq!(ratio(&[], &[]), None);
    }

    #[test]
    fn quartiles_are_interpolated() {
        assert!((quartile(&[4.0, 1.0, 3.0, 2.0], 2) - 2.5).abs() < 1e-9);
        assert!((quartile(&[7.0], 1) - 7.0).abs() < 1e-9);
    }

    #[test]
    fn promises_compare_with_the_smallest_cluster() {
        let section = |services, ours| Section {
            services,
            variants: vec![
                samples(PLAIN, [10.0; 3]),
                samples(OURS, ours),
                samples(POLICIES, ours.map(|rate| rate * 0.96)),
                samples(NFTABLES, [8.0; 3]),
            ],
        };
        let promises = promises(&[section(1, [11.0; 3]), section(10_000, [9.9; 3])]);
        let kept: Vec<bool> = promises.iter().map(|promise| promise.kept).collect();
        assert_eq!(kept, [true, true, true, false]);
    }
}
