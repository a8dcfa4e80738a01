//! The loop of the kernel side: looks at the machine when something may have changed, attaches, and publishes what it
//! saw as a [`HostState`].

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::{Attacher, early, unknown::UnknownInterfaces};
use crate::{
    bpf::{Program, pins::LinkName},
    config::{DatapathMode, FastPath},
    host::{HostDevice, HostState, PodInterface, Unknown, WantedPods},
    netlink::{
        events::{ChainEvents, Events},
        firewall,
        kube_proxy::{self, Rules},
        pods::{PodBinder, candidates},
        select::{self, DevicePatterns, Role},
        socket::RequestSocket,
        tables::{Link, Tables},
    },
};

/// One change of a device brings several notices: the others are waited for ...
const SETTLE: Duration = Duration::from_millis(10);
/// ... but not longer than this, also when the first look, which attaches everything, took long.
const SETTLE_AT_MOST: Duration = Duration::from_millis(500);
/// Between two looks this many times as long as a look takes, however many notices come.
const IDLE_SHARE: u32 = 5;
/// A look without any notice, and a check of what is attached.
const FULL_LOOK: Duration = Duration::from_secs(30);
/// While a pod's interface is wanted and not there: a new address in a pod's namespace may bring no notice here.
const SEARCH: Duration = Duration::from_millis(50);
/// The same, for a pod that has been searched for a while.
const LATE_SEARCH: Duration = Duration::from_secs(1);
const SEARCH_PATIENCE: Duration = Duration::from_secs(30);

/// What does not change while the agent runs.
#[derive(Clone, Debug)]
pub struct Settings {
    pub patterns: DevicePatterns,
    pub datapath: DatapathMode,
    pub socket_hooks: bool,
    pub fast_path: FastPath,
    pub localhost_node_ports: bool,
}

/// Everything that the loop owns.
#[derive(Debug)]
pub struct Observer {
    attacher: Arc<Mutex<Attacher>>,
    socket: RequestSocket,
    settings: Settings,
    pods: PodBinder,
    unknown: UnknownInterfaces,
    /// Packets between pods may skip netfilter.
    fast_path: bool,
    /// Where kube-proxy has rules; `None`: to be found out.
    kube_proxy: Option<Vec<Rules>>,
    search_since: Option<Instant>,
    reported: BTreeSet<String>,
}

impl Observer {
    pub fn new(attacher: Attacher, socket: RequestSocket, settings: Settings) -> Self {
        let left = attacher.record().left_interfaces.iter().copied();
        let unknown = UnknownInterfaces::new(left);
        Self {
            attacher: Arc::new(Mutex::new(attacher)),
            socket,
            settings,
            pods: PodBinder::default(),
            unknown,
            fast_path: false,
            kube_proxy: None,
            search_since: None,
            reported: BTreeSet::new(),
        }
    }

    /// Runs until the other side of a channel is gone.
    pub async fn run(
        mut self,
        mut wanted: watch::Receiver<WantedPods>,
        publish: watch::Sender<Option<HostState>>,
    ) -> io::Result<()> {
        let events = Events::open()?;
        early::spawn(
            Arc::downgrade(&self.attacher),
            self.settings.patterns.clone(),
            wanted.clone(),
        )?;
        // A kernel without nftables has no chains either.
        let chains = ChainEvents::open().ok();
        let mut full_look = Instant::now();
        self.fast_path = self.may_skip_netfilter();
        loop {
            if full_look.elapsed() >= FULL_LOOK {
                full_look = Instant::now();
                lock(&self.attacher).verify(&mut self.socket);
                self.fast_path = self.may_skip_netfilter();
                self.kube_proxy = None;
            }
            let began = Instant::now();
            let pods = wanted.borrow_and_update().clone();
            match self.look(&pods) {
                Ok(state) => {
                    publish.send_if_modified(|published| {
                        let differs = published.as_ref() != Some(&state);
                        if differs {
                            *published = Some(state);
                        }
                        differs
                    });
                }
                Err(error) => self.report(BTreeSet::from([format!("failed to list devices: {error}")])),
            }
            let took = began.elapsed();
            if publish.is_closed() {
                return Ok(());
            }
            let wait = self.pause().min(FULL_LOOK.saturating_sub(full_look.elapsed()));
            tokio::select! {
                changed = events.changed() => {
                    changed?;
                    // Whoever asks does not wait.
                    tokio::select! {
                        () = tokio::time::sleep((took * IDLE_SHARE).clamp(SETTLE, SETTLE_AT_MOST)) => {}
                        _ = wanted.changed() => {}
                    }
                }
                changed = chains_changed(chains.as_ref()) => {
                    changed?;
                    self.fast_path = self.may_skip_netfilter();
                    self.kube_proxy = None;
                }
                changed = wanted.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                }
                () = publish.closed() => return Ok(()),
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn pause(&self) -> Duration {
        match self.search_since {
            None => FULL_LOOK,
            Some(since) if since.elapsed() < SEARCH_PATIENCE => SEARCH,
            Some(_) => LATE_SEARCH,
        }
    }

    /// One complete observation, with everything attached that it calls for.
    fn look(&mut self, wanted: &WantedPods) -> io::Result<HostState> {
        lock(&self.attacher).begin_look();
        let tables = Tables::dump(&mut self.socket)?;
        if self.pods.update(&mut self.socket, &tables, wanted) {
            self.search_since.get_or_insert_with(Instant::now);
        } else {
            self.search_since = None;
        }
        let pods = self.pods.interfaces();
        let roles = select::devices(&tables, &self.settings.patterns, &wanted.node_addresses, &pods);

        let closed = self.closed(&tables, &roles, &pods, wanted.unknown);
        let mut links = self.wanted_links(&tables, &roles, pods.union(&closed));
        self.leave_to_tc(&tables, &mut links);
        // Until the first list of pods and the node's addresses have come, nobody knows which interfaces are no pod's
        // and no uplink any more.
        let keep = |_| wanted.revision == 0;
        let mut attacher = lock(&self.attacher);
        let mut errors = attacher.reconcile(&mut self.socket, &tables.links, &links, keep);
        if wanted.revision > 0 {
            attacher.settle(decided(&tables, &roles));
            errors.extend(
                attacher
                    .remember(self.unknown.left(), wanted.claims.clone())
                    .err(),
            );
        }
        let mut problems: BTreeSet<String> = errors.iter().map(chain).collect();
        for ifindex in self.unknown.closed_for_long(Instant::now()) {
            let name = tables.link(ifindex).map_or("?", |link| link.name.as_str());
            problems.insert(format!(
                "{name} is closed: nobody knows whose it is, while a Pod of this node that policies select has no interface"
            ));
        }
        for value in self.settings.patterns.absent(&tables.links) {
            let present: Vec<&str> = tables.links.iter().map(|link| link.name.as_str()).collect();
            problems.insert(format!(
                "--device {value}: no such device; it is attached to when it appears (present: {})",
                present.join(", ")
            ));
        }
        if self.settings.datapath == DatapathMode::Xdp {
            let refused = attacher
                .refused()
                .map(|(ifindex, reason)| (tables.link(ifindex), reason));
            problems.extend(refused.map(|(link, reason)| {
                let device = link.map_or("?", |link| link.name.as_str());
                format!("--datapath xdp: {device} is left to TC alone: {reason}")
            }));
        }
        if roles.is_empty() {
            problems.insert(
                "no uplink found: traffic from outside is not handled; name one with --device".to_owned(),
            );
        }
        drop(attacher);
        self.report(problems);
        if self.kube_proxy.is_none() {
            // What can't be listed is told by the fast path, which asks for the same.
            self.kube_proxy = Some(kube_proxy::find(&tables.links).unwrap_or_default());
        }
        Ok(self.state(&tables, &roles, wanted))
    }

    /// Takes XDP from devices where it could not be right.
    fn leave_to_tc(&mut self, tables: &Tables, links: &mut BTreeSet<LinkName>) {
        for device in &tables.links {
            let xdp = LinkName {
                program: Program::Xdp,
                ifindex: device.ifindex,
            };
            let is_asked_for = self.settings.datapath == DatapathMode::Xdp;
            let Some(reason) = select::unfit_for_xdp(tables, device, is_asked_for) else {
                continue;
            };
            if links.remove(&xdp) {
                lock(&self.attacher).leave_to_tc(device, reason);
            }
        }
    }

    /// The interfaces that may be a pod's, that nobody knows, and that are closed.
    fn closed(
        &mut self,
        tables: &Tables,
        roles: &BTreeMap<u32, Role>,
        pods: &BTreeSet<u32>,
        unknown: Unknown,
    ) -> BTreeSet<u32> {
        let mut found = candidates(tables);
        found.retain(|interface| {
            !roles.contains_key(&interface.ifindex) && !pods.contains(&interface.ifindex)
        });
        let attacher = lock(&self.attacher);
        let has_programs = |ifindex| attacher.is_attached(Program::ToPod, ifindex);
        let closed = self.unknown.update(&found, unknown, Instant::now(), has_programs);
        closed.iter().map(|interface| interface.ifindex).collect()
    }

    fn wanted_links<'a>(
        &self,
        tables: &Tables,
        roles: &BTreeMap<u32, Role>,
        pods: impl Iterator<Item = &'a u32>,
    ) -> BTreeSet<LinkName> {
        let mut links = BTreeSet::new();
        for (&ifindex, &role) in roles {
            let is_layer3 = tables.link(ifindex).is_some_and(Link::is_layer3);
            let programs: &[Program] = if is_layer3 {
                &[Program::FromL3dev, Program::ToL3dev]
            } else if role == Role::Uplink && self.settings.datapath != DatapathMode::Tc {
                &[Program::FromNetdev, Program::ToNetdev, Program::Xdp]
            } else {
                &[Program::FromNetdev, Program::ToNetdev]
            };
            links.extend(programs.iter().map(|&program| LinkName { program, ifindex }));
        }
        for &ifindex in pods {
            links.extend([Program::FromPod, Program::ToPod].map(|program| LinkName { program, ifindex }));
        }
        if let Some(lo) = tables.links.iter().find(|link| link.is_loopback()) {
            links.insert(LinkName {
                program: Program::ToLo,
                ifindex: lo.ifindex,
            });
        }
        if self.settings.socket_hooks {
            let hooks = Program::ALL.iter().copied().filter(|program| program.is_cgroup());
            links.extend(hooks.map(|program| LinkName { program, ifindex: 0 }));
        }
        links
    }

    fn state(&self, tables: &Tables, roles: &BTreeMap<u32, Role>, wanted: &WantedPods) -> HostState {
        let programs = lock(&self.attacher);
        let attached = |program, ifindex| programs.is_attached(program, ifindex);
        let has_both = |ifindex| attached(Program::FromPod, ifindex) && attached(Program::ToPod, ifindex);
        let lo = tables
            .links
            .iter()
            .find(|link| self.settings.localhost_node_ports && link.is_loopback());
        let lo = lo.map(|lo| {
            let entry = select::loopback_entry(&wanted.node_addresses);
            (
                lo.ifindex,
                HostDevice {
                    name: lo.name.clone(),
                    kind: lo.kind.clone(),
                    entry,
                },
            )
        });
        let devices = roles
            .iter()
            .filter_map(|(&ifindex, &role)| {
                let link = tables.link(ifindex)?;
                let xdp = attached(Program::Xdp, ifindex);
                let entry = select::device_entry(tables, link, role, xdp, &wanted.node_addresses);
                Some((
                    ifindex,
                    HostDevice {
                        name: link.name.clone(),
                        kind: link.kind.clone(),
                        entry,
                    },
                ))
            })
            .chain(lo)
            .collect();
        let interface = |addr: IpAddr, pod: &str| {
            let binding = self.pods.get(pod)?;
            let ifindex = binding.interface.ifindex;
            let interface = PodInterface {
                ifindex,
                name: binding.name.clone(),
                pod_mac: binding.pod_mac,
                host_mac: binding.host_mac,
                fast_path: has_both(ifindex) && self.fast_path,
            };
            Some((addr, interface))
        };
        let mut bound = self.pods.names();
        bound.retain(|ifindex, _| has_both(*ifindex));
        HostState {
            wanted_revision: wanted.revision,
            own_addresses: select::own_addresses(tables),
            devices,
            pod_interfaces: wanted
                .pods
                .iter()
                .filter_map(|(addr, pod)| interface(*addr, pod))
                .collect(),
            bound_pods: bound,
            kube_proxy: self.kube_proxy.clone().unwrap_or_default(),
        }
    }

    /// Whether packets between pods of this node may skip the kernel's FORWARD rules. New flows follow a change;
    /// those that began before stay on their way.
    fn may_skip_netfilter(&self) -> bool {
        let engine = match self.settings.fast_path {
            FastPath::On => return true,
            FastPath::Off => return false,
            FastPath::Auto => firewall::policy_engine(),
        };
        let may = matches!(engine, Ok(None));
        let because = match engine {
            Ok(None) => "no policy engine has rules".to_owned(),
            Ok(Some(chain)) => format!("{chain} is another policy engine's"),
            Err(error) => format!("failed to list netfilter's chains: {error}"),
        };
        if may != self.fast_path {
            tracing::info!("fast path {}: {because}", if may { "on" } else { "off" });
        }
        may
    }

    /// Says each problem once, and again after it had gone.
    fn report(&mut self, problems: BTreeSet<String>) {
        for problem in problems.difference(&self.reported) {
            tracing::warn!("{problem}");
        }
        self.reported = problems;
    }
}

fn lock(attacher: &Mutex<Attacher>) -> MutexGuard<'_, Attacher> {
    attacher.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The devices of which a look knows what they are. A veth whose other end is still here may become a pod's.
fn decided(tables: &Tables, roles: &BTreeMap<u32, Role>) -> BTreeSet<u32> {
    let decided = tables.links.iter().filter(|link| {
        link.kind != "veth" || link.peer_namespace.is_some() || roles.contains_key(&link.ifindex)
    });
    decided.map(|link| link.ifindex).collect()
}

async fn chains_changed(events: Option<&ChainEvents>) -> io::Result<()> {
    match events {
        Some(events) => events.changed().await,
        None => std::future::pending().await,
    }
}

fn chain(error: &super::AttachError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
