//! The command line: what commands there are, and what each takes. Those of `run` are [`settings`].

mod settings;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, error::ErrorKind, value_parser};

pub use self::settings::Run;
#[cfg(test)]
use crate::config::Config;
use crate::{
    cli::{
        alone::Places,
        flows::Filter,
        monitor,
        output::Output,
        services::{Listing, Which},
    },
    explain::{End, Port},
};

const BPFFS: &str = "/sys/fs/bpf";
const SOCKET: &str = "/run/dataplane/agent.sock";

/// An eBPF dataplane for Kubernetes: one small program a node.
#[derive(Debug, Parser)]
#[command(name = "dataplane-agent", version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// This process's command line. `--version` tells the commit too.
    pub fn of_process(commit: Option<&str>) -> Self {
        const VERSION: &str = env!("CARGO_PKG_VERSION");
        let version: &'static str = match commit.filter(|commit| !commit.is_empty()) {
            Some(commit) => format!("{VERSION} (commit {commit})").leak(),
            None => VERSION,
        };
        let matches = Self::command().version(version).get_matches();
        Self::from_arg_matches(&matches)
            .and_then(Self::checked)
            .unwrap_or_else(|error| error.exit())
    }

    /// What is wrong only beside another value.
    fn checked(self) -> Result<Self, clap::Error> {
        if let Command::Explain {
            port: Port { proto: None, .. },
            source_port: Some(_),
            ..
        } = self.command
        {
            let text = "`--source-port` cannot be used with `--port ICMP`, which has no ports";
            return Err(Self::command().error(ErrorKind::ArgumentConflict, text));
        }
        Ok(self)
    }
}

#[cfg(test)]
impl Cli {
    /// The configuration that a command line of `run` gives.
    pub fn config_of<'a>(arguments: impl IntoIterator<Item = &'a str>) -> anyhow::Result<Config> {
        match Self::try_parse_from(arguments)?.command {
            Command::Run(run) => run.resolve(),
            _ => anyhow::bail!("another command"),
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Keep this node's datapath equal to what Kubernetes says.
    Run(Box<Run>),
    /// Say what this machine has and lacks for `run` with the same flags, and who else is at work on it; exit status 1 if the agent
    /// would not start. Changes nothing, and needs neither a source nor the node's name.
    Preflight {
        #[command(flatten)]
        run: Box<Run>,
        /// Where the container runtime looks for the CNI configuration.
        #[arg(long, default_value = "/etc/cni/net.d")]
        cni_conf_dir: PathBuf,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Say what in a folder of manifests would not be served, without touching the kernel.
    Check {
        /// The folder of manifests.
        folder: PathBuf,
    },
    /// Say whether policies allow a new flow, and which rule decides. Exit status: 0 where all that this node decides allows it, 1 where
    /// something denies it or a Service is not served, 3 where nothing of it is decided on this node: ask on the one that is named. A packet is led through the pinned
    /// tables, without a trace, by a running agent, which knows names, else by addresses; with --manifests, what they say is compiled,
    /// and no agent is asked.
    Explain {
        /// Who begins: namespace/pod or an address.
        #[arg(long)]
        from: End,
        /// Who is reached: namespace/pod, svc/namespace/service or an address. Of a Service it is each endpoint, at its own port; for a
        /// client outside, by each address that such a client can ask.
        #[arg(long)]
        to: End,
        /// The destination port, such as 80/TCP or 53/UDP, or ICMP; of a Service a node port too.
        #[arg(long)]
        port: Port,
        /// The source's port, by which a Service chooses its endpoint; all of them are explained without it.
        #[arg(long, conflicts_with = "manifests", value_parser = value_parser!(u16).range(1..))]
        source_port: Option<u16>,
        /// A folder of manifests to explain from, instead of the tables of the agent.
        #[arg(long)]
        manifests: Option<PathBuf>,
        #[command(flatten)]
        tables: Tables,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Wait until a running agent has programmed all that its source holds now.
    Wait {
        /// The agent's socket.
        #[arg(long, env = "DATAPLANE_SOCKET", default_value = SOCKET)]
        socket: PathBuf,
        /// Give up after so many seconds.
        #[arg(long, default_value = "60", value_parser = seconds)]
        timeout: Duration,
    },
    /// Say what is served and where it leads, and which objects are refused, wholly or in part. Without a running agent: what the
    /// pinned tables serve, without names.
    Services {
        /// Only this Service: namespace/name, or those of an address; node ports are at this node's own.
        service: Option<Which>,
        #[command(flatten)]
        tables: Tables,
        /// Only what is not served, and why.
        #[arg(long)]
        problems: bool,
        /// `wide`: each endpoint with its state, its share of new connections and its flows.
        #[arg(short, long, value_enum, default_value = "table")]
        output: Listing,
    },
    /// Show each endpoint of each Service: where it is, its state and share of new connections, and how many connections have begun there
    /// and how many it has refused, because nothing listens at its port. Without a running agent: by addresses.
    Endpoints {
        /// Only those of this Service: namespace/name, or of the one that has an address; node ports are at this node's own.
        service: Option<Which>,
        #[command(flatten)]
        tables: Tables,
        /// `wide`: with its node, its share of connections from outside, and packets and bytes, of which one packet in 64 is counted.
        #[arg(short, long, value_enum, default_value = "table")]
        output: Listing,
    },
    /// Say what policies have denied lately and by which rule, and what dry runs would have changed; with `--verdicts all` of
    /// `run`, what they have allowed too. Without a running agent: what waits for one, by addresses, and stays.
    Verdicts {
        #[command(flatten)]
        tables: Tables,
        /// Go on with what comes.
        #[arg(short, long)]
        follow: bool,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Say which policies select Pods of this node, how often each rule has decided and what dry runs would have changed, and
    /// what of policies is not honoured; or of one Pod, the rules of both directions in the order in which they are asked. Without a
    /// running agent: what the pinned tables say of each Pod, by addresses.
    Policies {
        /// A Pod of this node: `NAMESPACE/NAME`, or one of its addresses.
        pod: Option<String>,
        #[command(flatten)]
        tables: Tables,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Show what goes over Services, endpoints and Pods now, and what is dropped; on a screen that keeps up, or where stdout is no
    /// terminal, once.
    Top {
        #[command(flatten)]
        tables: Tables,
        /// Seconds between two answers, of which rates are made.
        #[arg(long, default_value = "1s", value_parser = interval)]
        interval: Duration,
        /// Print plain tables after one interval, and end.
        #[arg(long)]
        once: bool,
    },
    /// Serve a page for a browser: the map of Services, flows, denials, and the policies of each Pod. It shows, and changes nothing.
    Ui {
        /// Where; port 0 takes a free one. Whoever reaches it reads the names and addresses of Pods and Services.
        #[arg(long, env = "DATAPLANE_UI_LISTEN", default_value = "127.0.0.1:8090")]
        listen: SocketAddr,
        /// Names in the browser's address line by which the page may be asked for, beside `localhost`, loopback addresses and that
        /// of --listen.
        #[arg(long, env = "DATAPLANE_UI_ALLOW_HOST", value_delimiter = ',')]
        allow_host: Vec<String>,
        /// The agent's socket.
        #[arg(long, env = "DATAPLANE_SOCKET", default_value = SOCKET)]
        socket: PathBuf,
        /// The BPF file system of the agent.
        #[arg(long, env = "DATAPLANE_BPFFS", default_value = BPFFS)]
        bpffs: PathBuf,
    },
    /// Say what is attached and how full the tables are.
    Status {
        /// The BPF file system of the agent.
        #[arg(long, env = "DATAPLANE_BPFFS", default_value = BPFFS)]
        bpffs: PathBuf,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Show the flows of the pinned tables, with the names that a running agent knows; without one, by addresses.
    Flows {
        #[command(flatten)]
        filter: Filter,
        #[command(flatten)]
        tables: Tables,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Show what happens to single packets, as it happens: drops and refusals with their reasons, policies and rules, translations, and
    /// what policies have allowed where the agent is told so; with the names that a running agent knows. One reader at a time. While
    /// nobody watches it costs nothing; while somebody does, it shows some 25,000 packets a second at the most, and says how many it has missed.
    Monitor {
        #[command(flatten)]
        filter: monitor::Filter,
        #[command(flatten)]
        tables: Tables,
        #[arg(short, long, value_enum, default_value = "text")]
        output: monitor::Format,
    },
    /// Say what each pinned table is for, how full it is and what memory it takes; with or without a running agent.
    Maps {
        /// The BPF file system of the agent.
        #[arg(long, env = "DATAPLANE_BPFFS", default_value = BPFFS)]
        bpffs: PathBuf,
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Write an archive of what the other commands say, the agent's last log lines and what the machine is. It holds names and
    /// addresses of Pods, Services and nodes, and no credentials.
    Bugreport {
        /// Where to, `-` for stdout [default: dataplane-bugreport-TIME.tar.gz in the current folder].
        to: Option<PathBuf>,
        #[command(flatten)]
        tables: Tables,
    },
    /// Show or change the levels of a running agent's log.
    Log {
        /// Levels by module, as in `DATAPLANE_LOG`: `debug`, or `info,dataplane_agent::sync=trace`.
        levels: Option<String>,
        /// Back to those that the agent has started with.
        #[arg(long, conflicts_with = "levels")]
        reset: bool,
        /// The agent's socket.
        #[arg(long, env = "DATAPLANE_SOCKET", default_value = SOCKET)]
        socket: PathBuf,
    },
    /// Print what a shell needs to complete this command line: `source <(dataplane-agent completions bash)`.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual, a page for each command.
    Man {
        /// The folder for the pages; made if absent.
        folder: PathBuf,
    },
    /// Remove everything that agents have made on this node.
    Cleanup {
        /// The BPF file system of the agent.
        #[arg(long, env = "DATAPLANE_BPFFS", default_value = BPFFS)]
        bpffs: PathBuf,
        /// Remove kube-proxy's own nftables tables instead, and nothing else.
        #[arg(long)]
        kube_proxy_rules: bool,
    },
}

/// Where a running agent is asked, and where its tables are.
#[derive(Debug, Args)]
pub struct Tables {
    /// The BPF file system of the agent.
    #[arg(long, env = "DATAPLANE_BPFFS", default_value = BPFFS)]
    bpffs: PathBuf,
    /// The agent's socket.
    #[arg(long, env = "DATAPLANE_SOCKET", default_value = SOCKET)]
    socket: PathBuf,
}

impl Tables {
    pub fn places(&self) -> Places<'_> {
        let Self { bpffs, socket } = self;
        Places { bpffs, socket }
    }
}

/// Seconds, with or without `s` behind.
fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text
        .strip_suffix('s')
        .unwrap_or(text)
        .parse()
        .map_err(|_| format!("`{text}` is no number of seconds"))?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

/// Seconds that are long enough for a rate, and end some day.
fn interval(text: &str) -> Result<Duration, String> {
    let time = match text.strip_suffix("ms").map(str::parse) {
        Some(Ok(milliseconds)) => Duration::from_millis(milliseconds),
        _ => seconds(text)?,
    };
    let fits = (Duration::from_millis(100)..=Duration::from_hours(1)).contains(&time);
    fits.then_some(time)
        .ok_or_else(|| format!("`{text}` is not from 0.1 to 3600 seconds"))
}

#[cfg(test)]
mod tests {
    const EXPLAIN: [&str; 6] = [
        "dataplane-agent",
        "explain",
        "--from",
        "10.244.1.10",
        "--to",
        "shop/web",
    ];

    #[test]
    fn a_source_port_is_a_port_of_a_protocol_that_has_some() {
        let parsed = |port, source_port| {
            let arguments = ["--port", port, "--source-port", source_port];
            let cli = super::Cli::try_parse_from(EXPLAIN.into_iter().chain(arguments));
            cli.and_then(super::Cli::checked).map(|_| ())
        };
        assert!(parsed("80/TCP", "40000").is_ok());
        for (port, source_port, expected) in [
            ("80/TCP", "0", "0 is not in 1..=65535"),
            ("ICMP", "40000", "cannot be used with `--port ICMP`"),
        ] {
            let error = parsed(port, source_port).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn a_range_is_no_end_of_a_flow() {
        for range in ["10.244.1.10/32", "fd00::1/128"] {
            let arguments = ["dataplane-agent", "explain", "--from", range, "--to", "shop/web"];
            let error = super::Cli::try_parse_from(arguments.into_iter().chain(["--port", "80"]));
            let error = error.unwrap_err().to_string();
            assert!(error.contains("is a range: give one address, without"), "{error}");
        }
    }

    use super::*;

    #[test]
    fn an_interval_is_some_seconds() {
        for (text, milliseconds) in [("1s", 1000), ("2", 2000), ("0.5s", 500), ("250ms", 250)] {
            assert_eq!(interval(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in [
            "",
            "s",
            "0",
            "-1s",
            "NaN",
            "1e9",
            "5ms",
            "ms",
            "1m",
            "99999999999999999999ms",
        ] {
            assert!(interval(text).is_err(), "{text}");
        }
    }
}
