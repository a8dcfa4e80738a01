//! What the datapath's maps say, read when somebody asks: packets by reason, and how full the tables are.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use dataplane_common::reason::Reason;
use prometheus::{
    IntCounterVec, IntGaugeVec, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::{
    attach::inspect::{TableUse, table_use},
    bpf::{counters, pins::Pins},
};

/// Counting the entries of a flow table means to walk it: not for everybody who asks.
const COUNT_AGAIN: Duration = Duration::from_secs(30);

/// Reads the pinned maps of one agent.
#[derive(Debug)]
pub struct KernelSide {
    pins: Pins,
    counted: Mutex<Option<(Instant, Vec<TableUse>)>>,
}

impl KernelSide {
    pub fn new(bpffs: &Path) -> Self {
        Self {
            pins: Pins::new(bpffs),
            counted: Mutex::new(None),
        }
    }

    fn tables(&self) -> Vec<TableUse> {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, tables)) = &*counted
            && at.elapsed() < COUNT_AGAIN
        {
            return tables.clone();
        }
        let tables = table_use(&self.pins);
        *counted = Some((Instant::now(), tables.clone()));
        tables
    }
}

impl Collector for KernelSide {
    fn desc(&self) -> Vec<&Desc> {
        Vec::new()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        families(&counters::read(&self.pins).unwrap_or_default(), &self.tables())
    }
}

/// What happened to packets of a reason, in a word and in full: the first word of its text.
pub fn outcome(reason: Reason) -> (&'static str, &'static str) {
    let text = reason.text().trim();
    let (outcome, meaning) = text.split_once(": ").unwrap_or(("", text));
    let outcome = match outcome {
        "Passed" => "passed",
        "Dropped" => "dropped",
        "Refused" => "refused",
        "Answered" => "answered",
        "Held" => "held",
        "Sent on" => "released",
        "Judged" => "judged",
        "Not told" => "untold",
        _ => "other",
    };
    (outcome, meaning)
}

/// Packets that this node has dropped, or refused in an endpoint's place, by their reasons' labels.
pub fn drops(packets: &[(Reason, u64)]) -> BTreeMap<String, u64> {
    let is_ours = |reason: Reason| match outcome(reason).0 {
        "dropped" => true,
        "refused" => reason != Reason::BackendRefused,
        _ => false,
    };
    let ours = packets
        .iter()
        .filter(|(reason, count)| *count > 0 && is_ours(*reason));
    ours.map(|(reason, count)| (reason.label().to_owned(), *count))
        .collect()
}

/// The families, each with a series for every reason and every table.
pub fn families(packets: &[(Reason, u64)], tables: &[TableUse]) -> Vec<MetricFamily> {
    let of_packets = IntCounterVec::new(
        Opts::new(
            "dataplane_packets_total",
            "Packets that were dropped, refused, answered, held, released, judged, or passed though they looked like ours, by reason",
        ),
        &["outcome", "reason"],
    );
    let entries = IntGaugeVec::new(
        Opts::new(
            "dataplane_table_entries",
            "Entries of a table in use, counted every 30 s",
        ),
        &["table"],
    );
    let limits = IntGaugeVec::new(
        Opts::new("dataplane_table_limit", "Entries that fit into a table"),
        &["table"],
    );
    // Names and labels are constants, made by a test.
    let (Ok(of_packets), Ok(entries), Ok(limits)) = (of_packets, entries, limits) else {
        return Vec::new();
    };
    for reason in Reason::ALL {
        let count = packets
            .iter()
            .find(|(of, _)| of == reason)
            .map_or(0, |(_, count)| *count);
        of_packets
            .with_label_values(&[outcome(*reason).0, reason.label()])
            .inc_by(count);
    }
    for TableUse {
        name,
        entries: used,
        limit,
    } in tables
    {
        entries
            .with_label_values(&[name])
            .set(i64::try_from(*used).unwrap_or(i64::MAX));
        limits.with_label_values(&[name]).set(i64::from(*limit));
    }
    [of_packets.collect(), entries.collect(), limits.collect()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_says_what_became_of_the_packet() {
        for reason in Reason::ALL {
            assert_ne!(outcome(*reason).0, "other", "{}", reason.label());
        }
    }

    #[test]
    fn tables_and_reasons_have_their_series() {
        let table = TableUse {
            name: "SERVICES",
            entries: 7,
            limit: 9,
        };
        let families = families(&[(Reason::NoRoute, 3)], &[table]);
        let value = |name: &str, label: &str| {
            let family = families.iter().find(|family| family.name() == name)?;
            let has_label = |metric: &&prometheus::proto::Metric| {
                metric.get_label().iter().any(|pair| pair.value() == label)
            };
            let metric = family.get_metric().iter().find(has_label)?;
            Some(metric.get_counter().get_value() + metric.get_gauge().get_value())
        };
        assert_eq!(value("dataplane_packets_total", "no-route"), Some(3.0));
        assert_eq!(value("dataplane_packets_total", "truncated"), Some(0.0));
        assert_eq!(value("dataplane_table_entries", "SERVICES"), Some(7.0));
        assert_eq!(value("dataplane_table_limit", "SERVICES"), Some(9.0));
    }
}
