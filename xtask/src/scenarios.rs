//! `cargo xtask scenarios …`: builds, then runs the scenario runner on files of Services and of policies: once, once for
//! every configuration, or each scenario once with the configuration rotated. `--on host` judges policy scenarios without
//! packets.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::test::Counts;
use crate::{build, kube, paths, process, progress, setup};

/// Options of the runner that no value follows.
const WITHOUT_VALUE: [&str; 3] = ["--hold", "--help", "-h"];

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run with every combination of socket load balancing, datapath and network
    #[arg(long, conflicts_with = "rotate")]
    matrix: bool,

    /// Run each scenario once, with the combination rotated by its place in the order of ids
    #[arg(long)]
    rotate: bool,

    /// Judge the tables of policy scenarios by the host build of the datapath, without packets
    #[arg(long, value_enum, conflicts_with_all = ["matrix", "rotate"])]
    on: Option<On>,

    /// Folders or files (tests/scenarios/services if none), then the runner's own options: --filter EXPR, --socket-lb off|all, --datapath xdp|tc,
    /// --network routed|bridge|vxlan, --source folder|api, --as root|container, --agent PATH, --jobs N, -o json
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    passed_on: Vec<String>,
}

/// Where scenarios run, if not in a test cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum On {
    Host,
}

/// One configuration of the datapath under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Configuration {
    socket_lb: &'static str,
    datapath: &'static str,
    network: &'static str,
}

impl Configuration {
    /// All of them, in an order where neighbours differ in every part that allows it.
    fn all() -> Vec<Self> {
        let (socket, datapath, network) = (["off", "all"], ["xdp", "tc"], ["routed", "bridge", "vxlan"]);
        (0..12)
            .map(|index| Self {
                socket_lb: socket[index % 2],
                datapath: datapath[(index / 6 + index) % 2],
                network: network[index % 3],
            })
            .collect()
    }

    fn args(self) -> [&'static str; 6] {
        [
            "--socket-lb",
            self.socket_lb,
            "--datapath",
            self.datapath,
            "--network",
            self.network,
        ]
    }
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    let mut passed_on = args.passed_on.clone();
    // Options before the folders are ours; those after them went to the runner's list, and mean the same.
    let matrix = args.matrix | take(&mut passed_on, "--matrix");
    let rotate = args.rotate | take(&mut passed_on, "--rotate");
    if args.on.is_some() | take_pair(&mut passed_on, "--on", "host") {
        return on_host(&passed_on);
    }
    if places_and_options(&passed_on).0.is_empty() {
        passed_on.insert(0, default_folder());
    }
    if (matrix || rotate) && passed_on.iter().any(|arg| is_chosen_by_us(arg)) {
        bail!(
            "--matrix and --rotate choose --socket-lb, --datapath and --network themselves, and add up text, not json"
        );
    }
    setup::programs()?;
    let is_api = |pair: &[String]| pair == ["--source", "api"];
    if passed_on.windows(2).any(is_api) || passed_on.iter().any(|arg| arg == "--source=api") {
        kube::provide()?;
    }
    build::run()?;
    if rotate {
        return finish(rotated(&passed_on)?);
    }
    if matrix {
        let mut total = Counts::default();
        for configuration in Configuration::all() {
            total.add(run_with(configuration, &passed_on)?);
        }
        return finish(total);
    }
    let status = runner(&passed_on)?
        .status()
        .context("failed to start the scenario runner")?;
    process::finish_with(status)
}

fn take(args: &mut Vec<String>, flag: &str) -> bool {
    let before = args.len();
    args.retain(|arg| arg != flag);
    args.len() != before
}

fn take_pair(args: &mut Vec<String>, flag: &str, value: &str) -> bool {
    let place = args.windows(2).position(|pair| pair == [flag, value]);
    place.map(|at| args.drain(at..at + 2)).is_some()
}

/// The tables of policy scenarios against the host build: a test of the agent, which takes its files from the environment.
fn on_host(args: &[String]) -> Result<()> {
    let place = match args {
        [] => paths::root().join("tests/scenarios/netpol"),
        [place] if !place.starts_with('-') => {
            std::path::absolute(place).context("failed to find the folder")?
        }
        _ => bail!("--on host takes one folder or file, and no other options"),
    };
    let mut command = process::cargo("test");
    command.args([
        "--quiet",
        "--package",
        "dataplane-agent",
        "--test",
        "netpol",
        "--",
        "--nocapture",
    ]);
    let status = command
        .env("DATAPLANE_NETPOL_SCENARIOS", place)
        .status()
        .context("failed to start cargo test")?;
    if !status.success() {
        std::process::exit(1);
    }
    Ok(())
}

fn is_chosen_by_us(arg: &str) -> bool {
    ["--socket-lb", "--datapath", "--network", "-o", "--output"]
        .iter()
        .any(|flag| arg.split('=').next() == Some(flag))
}

fn runner(args: &[String]) -> Result<std::process::Command> {
    let mut command = process::as_root(&paths::release("dataplane-scenarios"))?;
    if !args
        .iter()
        .any(|arg| arg == "--agent" || arg.starts_with("--agent="))
    {
        command.arg("--agent").arg(paths::release("dataplane-agent"));
    }
    command.args(args);
    Ok(command)
}

/// Each scenario once: as many runs as there are configurations, each with its share of the ids.
fn rotated(args: &[String]) -> Result<Counts> {
    let (folders, options) = places_and_options(args);
    if options.iter().any(|arg| arg.starts_with("--filter")) {
        bail!("--rotate runs every scenario of the folders: leave --filter out");
    }
    let ids = ids(&folders)?;
    if ids.is_empty() {
        bail!("there is no scenario in {}", folders.join(" "));
    }
    let configurations = Configuration::all();
    let mut total = Counts::default();
    for (index, configuration) in configurations.iter().enumerate() {
        let share: Vec<&str> = ids
            .iter()
            .skip(index)
            .step_by(configurations.len())
            .map(String::as_str)
            .collect();
        if share.is_empty() {
            continue;
        }
        let mut args = folders.clone();
        args.extend(options.iter().cloned());
        args.extend(["--filter".to_owned(), share.join(",")]);
        total.add(run_with(*configuration, &args)?);
    }
    Ok(total)
}

fn default_folder() -> String {
    paths::root()
        .join("tests/scenarios/services")
        .display()
        .to_string()
}

/// Tells folders and files from options and their values.
fn places_and_options(args: &[String]) -> (Vec<String>, Vec<String>) {
    let (mut places, mut options) = (Vec::new(), Vec::new());
    let mut is_value = false;
    for arg in args {
        let is_option = arg.starts_with('-');
        let list = if is_option || is_value {
            &mut options
        } else {
            &mut places
        };
        list.push(arg.clone());
        is_value = is_option && !arg.contains('=') && !WITHOUT_VALUE.contains(&arg.as_str());
    }
    (places, options)
}

/// One run of the runner: its lines are ours, but for the last, which is counted.
fn run_with(configuration: Configuration, args: &[String]) -> Result<Counts> {
    progress::note(&format!("scenarios with {}", configuration.args().join(" ")));
    let mut command = runner(args)?;
    let mut child = command
        .args(configuration.args())
        .stdout(Stdio::piped())
        .spawn()
        .context("failed to start the scenario runner")?;
    let stdout = child.stdout.take().context("the scenario runner has no output")?;
    let mut counts = None;
    for line in BufReader::new(stdout).lines() {
        let line = line.context("failed to read the scenario runner's output")?;
        match summary_line(&line) {
            Some(found) => counts = Some(found),
            None => println!("{line}"),
        }
    }
    let status = child.wait().context("failed to wait for the scenario runner")?;
    let Some(counts) = counts else {
        bail!("the scenario runner ended without its summary: {status}");
    };
    if !status.success() && counts.failed == 0 {
        bail!("the scenario runner failed: {status}");
    }
    Ok(counts)
}

fn finish(total: Counts) -> Result<()> {
    println!("{total}");
    if total.failed > 0 {
        std::process::exit(1);
    }
    if total.passed == 0 {
        bail!("no scenario was run");
    }
    Ok(())
}

fn summary_line(line: &str) -> Option<Counts> {
    let mut parts = line.split(", ");
    let mut number = |word: &str| parts.next()?.strip_suffix(word)?.trim().parse().ok();
    Some(Counts {
        passed: number("passed")?,
        failed: number("failed")?,
        skipped: number("skipped")?,
    })
}

/// Ids, sorted, of the scenario files.
fn ids(folders: &[String]) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for folder in folders {
        collect(Path::new(folder), &mut files)?;
    }
    let mut ids = Vec::new();
    for file in files {
        let text = fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?;
        let scenario: serde_json::Value =
            serde_json::from_slice(&text).with_context(|| format!("failed to decode {}", file.display()))?;
        ids.extend(scenario["id"].as_str().map(str::to_owned));
    }
    ids.sort();
    Ok(ids)
}

fn collect(place: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if place.is_dir() {
        let entries = fs::read_dir(place).with_context(|| format!("failed to list {}", place.display()))?;
        for entry in entries {
            collect(
                &entry
                    .with_context(|| format!("failed to list {}", place.display()))?
                    .path(),
                files,
            )?;
        }
    } else if place.extension().is_some_and(|extension| extension == "json") {
        files.push(place.to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_is_there_once() {
        let all = Configuration::all();
        for (index, configuration) in all.iter().enumerate() {
            assert!(!all[..index].contains(configuration), "{configuration:?} twice");
        }
        assert_eq!(all.len(), 12);
    }

    #[test]
    fn the_value_of_an_option_is_no_folder() {
        let args = ["a", "--agent", "/bin/true", "--hold", "b", "--jobs=2", "c"].map(str::to_owned);
        let (places, options) = places_and_options(&args);
        assert_eq!(places, ["a", "b", "c"]);
        assert_eq!(options, ["--agent", "/bin/true", "--hold", "--jobs=2"]);
    }

    #[test]
    fn a_flag_with_its_value_is_taken_wherever_it_stands() {
        let mut args = ["a", "--on", "host", "b"].map(str::to_owned).to_vec();
        assert!(take_pair(&mut args, "--on", "host"));
        assert_eq!(args, ["a", "b"]);
        assert!(!take_pair(&mut args, "--on", "host"));
    }

    #[test]
    fn only_the_summary_is_taken_for_one() {
        assert_eq!(
            summary_line("12 passed, 1 failed, 3 skipped"),
            Some(Counts {
                passed: 12,
                failed: 1,
                skipped: 3
            })
        );
        assert_eq!(summary_line("s018 passed, nodeport-cluster"), None);
    }
}
