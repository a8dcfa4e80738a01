//! The measurements in words, with what is promised.

use crate::{
    policies::{self, Sample},
    services::Outcome,
};

/// What is promised of the large fleet, and of changes of the crowd.
const SYNC_AT_MOST_S: f64 = 2.0;
const CHANGE_AT_MOST_MS: f64 = 10.0;
const RESIDENT_AT_MOST: u64 = 60 << 20;
/// 99 of 100 changes of a policy, or of what one is about.
const POLICY_CHANGE_AT_MOST_MS: f64 = 10.0;
/// A start without changes.
pub fn print_start(outcome: &Outcome, what: &str) {
    println!("  {what}");
    let row = |name: &str, value: String| println!("    {name:<48} {value}");
    if outcome.restore_s > 0.01 {
        row("tables read", format!("{:8.2} s", outcome.restore_s));
    }
    row("decoded", format!("{:8.2} s", outcome.decode_s));
    let (sync_s, cpu_s) = (outcome.sync_s, outcome.sync_cpu_s);
    row(
        "compiled and written",
        format!("{sync_s:8.2} s ({cpu_s:.2} s on a CPU)"),
    );
    let own = outcome.full.own;
    row(
        "resident, maps left out (smaps)",
        format!("{:8.1} MiB", mebibytes(own)),
    );
}

/// Services and endpoints.
pub fn print_services(outcome: &Outcome, what: &str, is_promised: bool) {
    println!("  {what}");
    let row = |name: &str, value: String, promise: Option<(bool, String)>| {
        let promise = promise
            .filter(|_| is_promised)
            .map(|(kept, at_most)| format!("at most {at_most}: {}", if kept { "kept" } else { "NOT KEPT" }));
        println!("    {name:<48} {value:>14}  {}", promise.unwrap_or_default());
    };
    let Outcome {
        restore_s: _,
        decode_s,
        sync_s,
        sync_cpu_s,
        usage,
        empty,
        full,
        changed,
        map_bytes,
        changes,
    } = outcome;
    row("decoded", format!("{decode_s:.2} s"), None);
    let kept = *sync_s <= SYNC_AT_MOST_S;
    let promise = Some((kept, format!("{SYNC_AT_MOST_S} s")));
    row("compiled and written", format!("{sync_s:.2} s"), promise);
    row("of it on a CPU", format!("{sync_cpu_s:.2} s"), None);
    for (kind, samples) in changes {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |percent: usize| {
            let place = sorted.len().saturating_sub(1) * percent / 100;
            sorted.get(place).copied().unwrap_or(0.0)
        };
        row(
            &format!("{kind}, median / 95 %"),
            format!("{:.2} / {:.2} ms", at(50), at(95)),
            Some((at(50) <= CHANGE_AT_MOST_MS, format!("{CHANGE_AT_MOST_MS} ms"))),
        );
    }
    for (name, resident) in [
        ("without maps, before the first object", empty),
        ("without maps, after the first sync", full),
        ("without maps, after the changes", changed),
    ] {
        let kept = resident.own <= RESIDENT_AT_MOST;
        let promise = (name != "without maps, before the first object")
            .then(|| (kept, format!("{} MiB", RESIDENT_AT_MOST >> 20)));
        row(
            &format!("{name} (heap; in use)"),
            format!(
                "{:.1} ({:.1}; {:.1}) MiB",
                mebibytes(resident.own),
                mebibytes(resident.anonymous),
                mebibytes(resident.allocated)
            ),
            promise,
        );
    }
    row(
        "maps of services and endpoints",
        format!("{:.1} MiB", mebibytes(*map_bytes)),
        None,
    );
    let (services, backends, maglev) = usage;
    println!(
        "    in use: {services} service entries, {backends} backends, {maglev} elements of Maglev tables"
    );
}

/// Policies, and the pods that they are about.
pub fn print_policies(outcome: &policies::Outcome) {
    let policies::Outcome {
        read_s,
        sync_s,
        sync_cpu_s,
        full,
        changed,
        map_bytes,
        writes,
        changes,
    } = outcome;
    let row = |name: &str, value: String| println!("    {name:<48} {value}");
    row("read", format!("{read_s:8.2} s"));
    row(
        "compiled and written",
        format!("{sync_s:8.2} s ({sync_cpu_s:.2} s on a CPU), {writes} writes"),
    );
    for (name, resident) in [("after the first sync", full), ("after the changes", changed)] {
        let (own, allocated) = (mebibytes(resident.own), mebibytes(resident.allocated));
        row(
            &format!("without maps, {name} (in use)"),
            format!("{own:8.1} ({allocated:.1}) MiB"),
        );
    }
    row("maps of policies", format!("{:8.1} MiB", mebibytes(*map_bytes)));
    println!(
        "    {:<44} {:>6} {:>6} {:>8} {:>7} {:>7} {:>9} {:>7}",
        "ms from the source's event to the last write",
        "median",
        "99 %",
        "99 % CPU",
        "most",
        "writes",
        "from file",
        "let go"
    );
    let all: Vec<Sample> = changes
        .iter()
        .flat_map(|(_, samples)| samples.iter().copied())
        .collect();
    for (kind, samples) in changes {
        print_samples(kind, samples);
    }
    let kept = print_samples("all of these", &all) <= POLICY_CHANGE_AT_MOST_MS;
    let verdict = if kept { "kept" } else { "NOT KEPT" };
    println!("    99 % at most {POLICY_CHANGE_AT_MOST_MS} ms: {verdict}");
}

/// One line; returns what 99 of 100 took at the most.
fn print_samples(kind: &str, samples: &[Sample]) -> f64 {
    let at = |field: fn(&Sample) -> f64, percent: usize| {
        let mut sorted: Vec<f64> = samples.iter().map(field).collect();
        sorted.sort_by(f64::total_cmp);
        let place = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
        sorted.get(place).copied().unwrap_or(0.0)
    };
    let writes: u64 = samples.iter().map(|sample| sample.writes).sum();
    println!(
        "    {kind:<44} {:>6.2} {:>6.2} {:>8.2} {:>7.2} {:>7} {:>9.1} {:>7.1}",
        at(|sample| sample.ms, 50),
        at(|sample| sample.ms, 99),
        at(|sample| sample.cpu_ms, 99),
        at(|sample| sample.ms, 100),
        writes / (samples.len() as u64).max(1),
        at(|sample| sample.from_file_ms, 50),
        at(|sample| sample.after_ms, 50),
    );
    at(|sample| sample.ms, 99)
}

fn mebibytes(bytes: u64) -> f64 {
    f64::from((bytes >> 10) as u32) / 1024.0
}
