//! From configuration to a running kernel side: load, take over what is attached, and start the loop.

use std::{collections::BTreeMap, path::PathBuf, thread};

use anyhow::Context;
use dataplane_common::config::{self as datapath, Jiffies, config_flags};
use tokio::sync::watch;

use super::{
    Attacher,
    cleanup::cleanup,
    observe::{Observer, Settings},
    state::State,
    sysctl,
};
use crate::{
    bpf::{
        kernel,
        links::Cgroup,
        loader::{self, LoadOptions, Release},
        pins::Pins,
        sys,
    },
    config::{Config, DatapathMode, FastPath, PolicyChanges, PortRange, SocketLb, Verdicts},
    host::{Claim, HostState, Kernel, WantedPods},
    netlink::{select::DevicePatterns, socket::RequestSocket, tables},
    store::{bpf::BpfStore, left::LeftFlows, sockets::GivenSockets},
};

/// What was found out before anything is made, and the lock that keeps a second agent away.
#[derive(Debug)]
pub struct Prepared {
    kernel_flags: u32,
    cookie: u64,
    /// Where the socket hooks go; `None` without them.
    cgroup: Option<PathBuf>,
    pins: Pins,
    state: State,
}

impl Prepared {
    /// What CNI plugins have told an earlier process.
    pub fn claims(&self) -> BTreeMap<String, Claim> {
        self.state.record.claims.clone()
    }

    fn options(&self, config: &Config) -> anyhow::Result<LoadOptions> {
        let jiffies =
            kernel::jiffies().context("failed to read the resolution of the kernel's coarse clock")?;
        let socket_hooks = self.cgroup.is_some();
        Ok(LoadOptions {
            sizes: config.sizes,
            config: datapath_config(config, self.kernel_flags, self.cookie, jiffies, socket_hooks),
            xdp: config.datapath != DatapathMode::Tc,
            socket_hooks,
            debug_log: config.debug_log,
        })
    }
}

/// Checks everything that can be checked without changing the machine, and takes the lock. Must be called in the
/// network namespace of the host.
pub fn prepare(config: &Config) -> anyhow::Result<Prepared> {
    sys::keep_heap_small();
    kernel::check()?;
    warn_of_local_ports(config.snat_ports);
    let cookie = netns_cookie(config);
    let socket_hooks = config.socket_lb != SocketLb::Off && cookie.is_some();
    let cgroup = socket_hooks.then(|| cgroup_path(config)).transpose()?;
    let pins = Pins::new(&config.bpffs);
    loader::check_object()?;
    pins.check_bpffs()?;
    Ok(Prepared {
        kernel_flags: kernel::config_flags(kernel::version()?)
            .context("failed to try what this kernel has")?,
        cookie: cookie.unwrap_or(0),
        cgroup,
        pins,
        state: State::lock(&config.bpffs)?,
    })
}

/// Loads the datapath, takes over what a former run left attached, and starts to watch the machine. A first start that
/// fails leaves nothing behind.
pub fn start(
    prepared: Prepared,
    config: &Config,
    wanted: watch::Receiver<WantedPods>,
) -> anyhow::Result<Kernel> {
    let is_first = !prepared.pins.exists() && prepared.pins.others()?.is_empty();
    load_and_watch(prepared, config, wanted, is_first).inspect_err(|_| {
        if is_first && let Err(left) = cleanup(&config.bpffs) {
            tracing::warn!("failed to undo the start: {:#}", anyhow::Error::from(left));
        }
    })
}

/// Loads an object as that of a version, and gives what is attached its programs; nobody writes its tables or watches the
/// machine. So another version leaves a machine when it is killed: for tests, which have its object alone.
pub fn load_and_leave(
    prepared: Prepared,
    config: &Config,
    release: Release,
    schema: u32,
) -> anyhow::Result<()> {
    let pins = Pins::of(&config.bpffs, schema);
    let loaded = loader::load_release(release, pins, &prepared.options(config)?)?;
    let cgroup = prepared.cgroup.map(|path| Cgroup::open(&path)).transpose()?;
    let mut socket = RequestSocket::open().context("failed to open a netlink socket")?;
    let mut attacher = Attacher::new(loaded, prepared.state, cgroup, kernel::has_tcx());
    let links = tables::dump_links(&mut socket).context("failed to list devices")?;
    Ok(attacher.adopt(&mut socket, &links)?)
}

fn load_and_watch(
    prepared: Prepared,
    config: &Config,
    wanted: watch::Receiver<WantedPods>,
    is_first: bool,
) -> anyhow::Result<Kernel> {
    let options = prepared.options(config)?;
    let Prepared {
        cgroup,
        pins,
        mut state,
        ..
    } = prepared;
    let missing_folders = pins.missing_folders();
    state.change(|record| {
        if !missing_folders.is_empty() {
            record.made_folders = missing_folders;
        }
        record.cgroup.clone_from(&cgroup);
        record.socket = Some(config.socket.clone());
    })?;
    let mut loaded = loader::load(pins, &options)?;
    let store = BpfStore::open(&loaded.pins)?;
    let left_flows = LeftFlows::open(&loaded.pins).context("failed to open the tables of flows")?;
    if is_first {
        left_flows
            .begin()
            .context("failed to leave connections that began before to netfilter")?;
    }
    let given_sockets = options
        .socket_hooks
        .then(|| GivenSockets::open(&loaded.pins))
        .transpose()
        .context("failed to open the tables of the socket hooks")?;
    if let Some(lines) = loaded.debug_log.take() {
        tracing::info!("debug lines of the datapath are on: every packet that it touches costs one");
        lines
            .forward_until_gone(wanted.clone())
            .context("failed to start the thread that reads debug lines")?;
    }

    let localnet = sysctl::ROUTE_LOCALNET;
    let switches = [
        sysctl::ACCEPT_LOCAL.enable(&mut state),
        if config.localhost_node_ports {
            localnet.enable(&mut state)
        } else {
            localnet.restore(&mut state)
        },
    ];
    for error in switches.into_iter().filter_map(Result::err) {
        tracing::warn!("{:#}", anyhow::Error::from(error));
    }

    let cgroup = cgroup.map(|path| Cgroup::open(&path)).transpose()?;
    let mut socket = RequestSocket::open().context("failed to open a netlink socket")?;
    let mut attacher = Attacher::new(loaded, state, cgroup, kernel::has_tcx());
    let links = tables::dump_links(&mut socket).context("failed to list devices")?;
    attacher.adopt(&mut socket, &links)?;

    let settings = Settings {
        patterns: DevicePatterns::new(&config.devices),
        datapath: config.datapath,
        socket_hooks: options.socket_hooks,
        fast_path: config.fast_path,
        localhost_node_ports: config.localhost_node_ports,
    };
    let (publish, host) = watch::channel(None);
    spawn(Observer::new(attacher, socket, settings), wanted, publish)?;
    Ok(Kernel {
        store: Box::new(store),
        host,
        given_sockets,
        left_flows,
        constants: options.config,
    })
}

fn spawn(
    observer: Observer,
    wanted: watch::Receiver<WantedPods>,
    publish: watch::Sender<Option<HostState>>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    thread::Builder::new()
        .name("netlink".to_owned())
        .spawn(move || {
            if let Err(error) = runtime.block_on(observer.run(wanted, publish)) {
                tracing::error!("failed to watch devices: {error}");
            }
        })
        .context("failed to start the thread that watches devices")?;
    Ok(())
}

fn datapath_config(
    config: &Config,
    kernel_flags: u32,
    host_netns_cookie: u64,
    jiffies: Jiffies,
    socket_hooks: bool,
) -> datapath::Config {
    let mut flags = kernel_flags;
    for (flag, on) in [
        // Whether a pod takes part is told by its backend, and may change.
        (config_flags::FAST_PATH, config.fast_path != FastPath::Off),
        (config_flags::SOCKET_HOST_ONLY, config.socket_lb != SocketLb::All),
        (
            config_flags::SOCKET_PODS,
            socket_hooks && config.socket_lb == SocketLb::All,
        ),
        (
            config_flags::POLICY_NEW_FLOWS_ONLY,
            config.policy_changes == PolicyChanges::NewFlows,
        ),
        (config_flags::TELL_ALLOWED, config.verdicts == Verdicts::All),
        (config_flags::SOURCE_CHECK, config.source_check),
    ] {
        if on {
            flags |= flag;
        }
    }
    datapath::Config {
        jiffies,
        host_netns_cookie,
        flags,
        snat_port_min: config.snat_ports.min,
        snat_port_max: config.snat_ports.max,
        services: config.sizes.limits.services,
        backends: config.sizes.limits.backends,
        maglev: config.sizes.limits.maglev,
        held: config.sizes.held,
        ..datapath::Config::default()
    }
}

/// A socket of this host and a translated flow that take one port towards one backend would get each other's answers.
fn warn_of_local_ports(snat_ports: PortRange) {
    if let Some(shared) = sysctl::local_ports().and_then(|range| range.shared(snat_ports))
        && !sysctl::is_reserved(shared)
    {
        tracing::warn!(
            "this host's own connections may use {shared} too (net.ipv4.ip_local_port_range): keep them apart with --snat-ports or with net.ipv4.ip_local_reserved_ports={shared}"
        );
    }
}

/// None: the socket hooks cannot tell host processes from pods, and stay off.
fn netns_cookie(config: &Config) -> Option<u64> {
    match kernel::netns_cookie() {
        Ok(cookie) => Some(cookie),
        Err(_) if config.socket_lb == SocketLb::All => Some(0),
        Err(error) => {
            if config.socket_lb != SocketLb::Off {
                tracing::warn!(
                    "socket hooks stay off, the packet path does their work: no SO_NETNS_COOKIE ({error})"
                );
            }
            None
        }
    }
}

fn cgroup_path(config: &Config) -> anyhow::Result<PathBuf> {
    let path = match &config.cgroup {
        Some(path) => path.clone(),
        None => kernel::find_cgroup2()?,
    };
    kernel::check_cgroup2(&path)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;

    #[test]
    fn settings_of_policies_are_constants_of_the_datapath() {
        for (flags, expected) in [
            (&[][..], config_flags::SOURCE_CHECK),
            (
                &[
                    "--policy-changes",
                    "all",
                    "--verdicts",
                    "denied",
                    "--source-check",
                    "false",
                ],
                0,
            ),
            (
                &["--policy-changes", "new-flows"],
                config_flags::POLICY_NEW_FLOWS_ONLY | config_flags::SOURCE_CHECK,
            ),
            (
                &["--verdicts", "all"],
                config_flags::TELL_ALLOWED | config_flags::SOURCE_CHECK,
            ),
            (&["--source-check", "true"], config_flags::SOURCE_CHECK),
            (&["--source-check", "false"], 0),
        ] {
            let base = ["dataplane-agent", "run", "--node-name", "a", "--manifests", "/m"];
            let config = Cli::config_of(base.iter().chain(flags).copied()).unwrap();
            let of_policies =
                config_flags::POLICY_NEW_FLOWS_ONLY | config_flags::TELL_ALLOWED | config_flags::SOURCE_CHECK;
            let set = datapath_config(&config, 0, 0, Jiffies::of(4_000_000), false).flags & of_policies;
            assert_eq!(set, expected, "{flags:?}");
        }
    }
}
