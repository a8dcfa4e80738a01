//! What is attached on this machine, by the kernel's own queries: ours and everybody else's, in the order in which
//! they run.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

use bytemuck::Pod;
use dataplane_common::backend::backend_state;
use serde::Serialize;

use super::{room, state::State};
use crate::{
    bpf::{
        Hook, Program, counters, kernel,
        links::{Cgroup, Links},
        map_names as names,
        pins::Pins,
        purposes::purpose,
        sys::{self, MapFd},
    },
    netlink::{
        filters,
        socket::RequestSocket,
        sockets,
        tables::{Link, Tables},
    },
    served::Condition,
    source::Report,
    store::{Store, bpf::BpfStore, left::LeftFlows},
    sync::{encode, find_slice},
};

/// Everything that `status` shows.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Status {
    pub versions: Versions,
    pub agent_running: bool,
    /// The pin folder is there.
    pub installed: bool,
    pub bpffs: String,
    /// How TC programs are attached: `tcx` or `clsact`.
    pub tc: &'static str,
    pub attachments: Vec<Attachment>,
    /// Devices that are left to TC alone.
    pub xdp_fallbacks: Vec<Fallback>,
    pub tables: Vec<TableUse>,
    /// What has happened to flows, all of it.
    pub flows: Vec<FlowCounter>,
    /// Reasons that have occurred.
    pub counters: Vec<Counter>,
    pub warnings: Vec<String>,
    /// What a running agent says of its work.
    pub conditions: Vec<Condition>,
    /// What it has read of its source, and when.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Report>,
    /// Where it is asked.
    #[serde(skip)]
    pub socket: Option<PathBuf>,
}

/// What works together here.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Versions {
    /// Of this command.
    pub command: &'static str,
    /// Of the agent that has answered. Absent: none runs, or one that is older than any that tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    pub kernel: String,
}

/// One program at one hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Attachment {
    /// A device's name or a cgroup's path.
    pub target: String,
    /// 0 for a cgroup.
    pub ifindex: u32,
    /// `xdp`, `tc ingress`, `tc egress`, or the name of a cgroup hook.
    pub hook: String,
    /// `driver`, `generic`, `hardware`, `tcx`, `clsact` or `cgroup`.
    pub mode: String,
    /// Place among the programs of the hook, from 1.
    pub position: usize,
    pub program: String,
    pub program_id: u32,
    pub ours: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct Fallback {
    pub device: String,
    pub ifindex: u32,
    pub reason: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct TableUse {
    pub name: &'static str,
    pub entries: usize,
    pub limit: u32,
}

/// One pinned table.
#[derive(Clone, Debug, Serialize)]
pub struct TableInfo {
    pub name: String,
    /// As bpftool calls it.
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub purpose: &'static str,
    /// Where entries come and go.
    pub entries: Option<usize>,
    pub limit: u32,
    pub key_bytes: u32,
    pub value_bytes: u32,
    /// Of the kernel's memory; `None`: it does not say.
    pub bytes: Option<u64>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Counter {
    pub reason: &'static str,
    pub meaning: &'static str,
    pub count: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct FlowCounter {
    pub event: &'static str,
    pub meaning: &'static str,
    pub count: u64,
}

/// Looks at the machine. Must be called in the network namespace of the host.
pub fn inspect(bpffs: &Path) -> io::Result<Status> {
    let state = State::read(bpffs);
    let pins = Pins::new(bpffs);
    let mut socket = RequestSocket::open()?;
    let tables = Tables::dump(&mut socket)?;
    let cgroup = state.record.cgroup.as_deref();
    let attachments = attached(&mut socket, &tables, &pins, cgroup)?;
    let tcx = kernel::has_tcx();
    let installed = pins.try_exists().map_err(io::Error::other)?;
    let mut warnings = warnings(&tables, &attachments, state.record.cgroup.is_some());
    let uses = table_use(&pins);
    if installed {
        warnings.extend(room::warnings(&pins, &uses));
        warnings.extend(unreadable(&pins));
        warnings.extend(unguarded(&pins, &tables, &attachments));
    }
    Ok(Status {
        versions: Versions {
            command: env!("CARGO_PKG_VERSION"),
            agent: None,
            kernel: kernel::release(),
        },
        agent_running: State::is_running(bpffs),
        installed,
        bpffs: bpffs.display().to_string(),
        tc: if tcx { "tcx" } else { "clsact" },
        warnings,
        attachments,
        xdp_fallbacks: fallbacks(&state, &tables),
        tables: uses,
        flows: flow_events(&pins),
        counters: occurred(&pins),
        source: None,
        conditions: Vec::new(),
        socket: state.record.socket.clone(),
    })
}

/// What is attached to devices and to a cgroup: that which an agent has used with this `bpffs`, else `cgroup`, else the root.
pub fn attachments(bpffs: &Path, cgroup: Option<&Path>) -> io::Result<Vec<Attachment>> {
    let state = State::read(bpffs);
    let pins = Pins::new(bpffs);
    let mut socket = RequestSocket::open()?;
    let tables = Tables::dump(&mut socket)?;
    let root = kernel::find_cgroup2().ok();
    let cgroup = state.record.cgroup.as_deref().or(cgroup).or(root.as_deref());
    attached(&mut socket, &tables, &pins, cgroup)
}

fn attached(
    socket: &mut RequestSocket,
    tables: &Tables,
    pins: &Pins,
    cgroup: Option<&Path>,
) -> io::Result<Vec<Attachment>> {
    let tcx = kernel::has_tcx();
    let links = Links::new(pins);
    let ours = pins
        .list_links()
        .unwrap_or_default()
        .into_iter()
        .filter_map(|link| Some((links.program_id(link)?, link.program)))
        .collect();
    let mut look = Look {
        ours,
        attachments: Vec::new(),
    };
    for link in &tables.links {
        look.xdp(link);
        for hook in [Hook::TcIngress, Hook::TcEgress] {
            if tcx {
                look.tcx(link, hook);
            }
            look.clsact(socket, link, hook)?;
        }
    }
    if let Some(path) = cgroup {
        look.cgroup(path);
    }
    Ok(look.attachments)
}

struct Look {
    /// The programs of our pinned links, by id.
    ours: BTreeMap<u32, Program>,
    attachments: Vec<Attachment>,
}

impl Look {
    fn xdp(&mut self, link: &Link) {
        let Some(xdp) = link.xdp else { return };
        let mode = match xdp.mode {
            1 => "driver",
            2 => "generic",
            3 => "hardware",
            _ => "several",
        };
        self.push(&link.name, link.ifindex, "xdp", mode, 1, xdp.prog_id, None);
    }

    fn tcx(&mut self, link: &Link, hook: Hook) {
        for (place, id) in sys::prog_query(link.ifindex, hook.attach_type())
            .unwrap_or_default()
            .into_iter()
            .enumerate()
        {
            self.push(
                &link.name,
                link.ifindex,
                tc_name(hook),
                "tcx",
                place + 1,
                id,
                None,
            );
        }
    }

    /// Filters run behind every TCX program.
    fn clsact(&mut self, socket: &mut RequestSocket, link: &Link, hook: Hook) -> io::Result<()> {
        let before = self
            .attachments
            .iter()
            .filter(|other| other.ifindex == link.ifindex && other.hook == tc_name(hook))
            .count();
        for (place, filter) in filters::list(socket, link.ifindex, hook)?.iter().enumerate() {
            let place = before + place + 1;
            self.push(
                &link.name,
                link.ifindex,
                tc_name(hook),
                "clsact",
                place,
                filter.prog_id,
                filter.program(),
            );
        }
        Ok(())
    }

    fn cgroup(&mut self, path: &Path) {
        let Ok(cgroup) = Cgroup::open(path) else { return };
        for program in Program::ALL.iter().filter(|program| program.is_cgroup()) {
            let ids = sys::prog_query(cgroup.target(), program.hook().attach_type()).unwrap_or_default();
            for (place, id) in ids.into_iter().enumerate() {
                self.push(
                    &path.display().to_string(),
                    0,
                    program.symbol(),
                    "cgroup",
                    place + 1,
                    id,
                    None,
                );
            }
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the columns of a row, each a plain value"
    )]
    fn push(
        &mut self,
        target: &str,
        ifindex: u32,
        hook: &str,
        mode: &str,
        position: usize,
        id: u32,
        own: Option<Program>,
    ) {
        let own = own.or_else(|| self.ours.get(&id).copied());
        let name = match own {
            Some(program) => program.symbol().to_owned(),
            // Needs CAP_SYS_ADMIN.
            None => sys::prog_by_id(id)
                .and_then(|fd| sys::prog_info(fd.as_fd()))
                .map_or_else(|_| "?".to_owned(), |info| info.name()),
        };
        self.attachments.push(Attachment {
            target: target.to_owned(),
            ifindex,
            hook: hook.to_owned(),
            mode: mode.to_owned(),
            position,
            program: name,
            program_id: id,
            ours: own.is_some(),
        });
    }
}

fn tc_name(hook: Hook) -> &'static str {
    if hook == Hook::TcIngress {
        "tc ingress"
    } else {
        "tc egress"
    }
}

fn fallbacks(state: &State, tables: &Tables) -> Vec<Fallback> {
    let name = |ifindex| {
        tables
            .link(ifindex)
            .map_or_else(String::new, |link| link.name.clone())
    };
    state
        .record
        .xdp_fallback
        .iter()
        .map(|(&ifindex, reason)| Fallback {
            device: name(ifindex),
            ifindex,
            reason: reason.clone(),
        })
        .collect()
}

fn warnings(tables: &Tables, attachments: &[Attachment], socket_hooks: bool) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut before: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for attachment in attachments {
        let others = before.entry((&attachment.target, &attachment.hook)).or_default();
        if !attachment.ours {
            others.push(&attachment.program);
        } else if !others.is_empty() && attachment.mode != "cgroup" {
            warnings.push(format!(
                "{} {}: {} runs before {} and may take packets from it",
                attachment.target,
                attachment.hook,
                others.join(", "),
                attachment.program
            ));
        }
    }
    let covered: BTreeSet<u32> = attachments
        .iter()
        .filter(|one| one.ours)
        .map(|one| one.ifindex)
        .collect();
    if !covered.is_empty() {
        warnings.extend(tables.links.iter().filter(|link| !covered.contains(&link.ifindex)).filter_map(|link| {
            let gateway = tables.routes.iter().any(|route| route.ifindex == link.ifindex && route.has_gateway);
            gateway.then(|| {
                format!("{} has a route by a gateway and is not covered: replies that leave by it are not translated back; name it with --device", link.name)
            })
        }));
    }
    if kernel::version().is_ok_and(|version| version < TUNNELS_SINCE) {
        let tunnels = tables
            .links
            .iter()
            .filter(|link| covered.contains(&link.ifindex) && link.is_ip_tunnel());
        warnings.extend(tunnels.map(|link| {
            format!(
                "{}: kernels before 5.14 leave the outer headers before what comes out of such a tunnel, so answers that come by it are not translated back: what Services send there hangs; WireGuard and VXLAN are not concerned",
                link.name
            )
        }));
    }
    if socket_hooks {
        let able = RequestSocket::open_sock_diag().and_then(|mut socket| sockets::probe(&mut socket));
        warnings.extend(able.err().map(|error| sockets::unable(&error)));
    }
    warnings
}

/// Since then what comes out of a tunnel of IP in IP begins with its own header: Linux 7ad136fd288c and others of that series.
const TUNNELS_SINCE: (u32, u32) = (5, 14);

/// Interfaces of this node's Pods, each with one of the addresses that it leads to; none where the tables cannot be read.
pub fn bound(pins: &Pins) -> BTreeMap<u32, IpAddr> {
    let ipv4 = bound_in(pins, names::BOUND_V4, |addr_be: u32| {
        encode::ip([addr_be, 0, 0, 0], false)
    });
    let mut bound = bound_in(pins, names::BOUND_V6, |addr_be| encode::ip(addr_be, true));
    bound.extend(ipv4);
    bound
}

fn bound_in<K: Pod>(pins: &Pins, table: &str, ip: impl Fn(K) -> IpAddr) -> BTreeMap<u32, IpAddr> {
    let mut bound = BTreeMap::new();
    if let Ok(map) = pins.open_map(table).and_then(MapFd::<K, u32>::new) {
        let _unread = map.for_each(|addr_be, ifindex| {
            bound.insert(*ifindex, ip(*addr_be));
        });
    }
    bound
}

/// Interfaces of Pods that lack one of our programs: what passes there is neither translated nor judged.
fn unguarded(pins: &Pins, tables: &Tables, attachments: &[Attachment]) -> Vec<String> {
    let has = |ifindex: u32, hook: Hook| {
        let at = |one: &&Attachment| one.ours && one.ifindex == ifindex && one.hook == tc_name(hook);
        attachments.iter().any(|one| at(&one))
    };
    let mut lacking = Vec::new();
    for (ifindex, addr) in bound(pins) {
        // One that is gone leads nowhere, and its addresses are about to go too.
        let Some(link) = tables.link(ifindex) else {
            continue;
        };
        for (hook, program) in [(Hook::TcIngress, "from_pod"), (Hook::TcEgress, "to_pod")] {
            if !has(ifindex, hook) {
                lacking.push(format!(
                    "{}, the interface of the Pod with {addr}, has no {program}: its packets are not translated and not judged; a running agent attaches it again within half a minute",
                    link.name
                ));
            }
        }
    }
    lacking
}

/// Every pinned table, by name.
pub fn tables(pins: &Pins) -> io::Result<Vec<TableInfo>> {
    let uses = table_use(pins);
    let mut names = pins.list_maps()?;
    names.sort_unstable();
    names
        .into_iter()
        .map(|name| {
            let fd = pins.open_map(&name)?;
            let info = sys::map_info(fd.as_fd())?;
            let counted = uses.iter().find(|one| one.name == name);
            Ok(TableInfo {
                kind: sys::map_type::name(info.map_type),
                purpose: purpose(&name).unwrap_or_default(),
                entries: counted.map(|one| one.entries),
                limit: info.max_entries,
                key_bytes: info.key_size,
                value_bytes: info.value_size,
                bytes: memory(fd.as_fd()),
                name,
            })
        })
        .collect()
}

/// What the kernel says that a map takes.
fn memory(map: BorrowedFd<'_>) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd())).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("memlock:"))?;
    line.trim().parse().ok()
}

/// Tables that are not there, or not for this process, each with the reason: what commands say of the others is not all.
pub fn unreadable(pins: &Pins) -> Vec<String> {
    let failed = names::ALL.iter().filter_map(|name| {
        let error = anyhow::Error::from(pins.open_map(name).err()?);
        Some(format!("table {name} is left out: {error:#}"))
    });
    failed.collect()
}

/// Tables whose entries come and go.
const COUNTED: [&str; 32] = [
    names::FRONTENDS_V4,
    names::FRONTENDS_V6,
    names::RANGES_V4,
    names::RANGES_V6,
    names::AFFINITY_V4,
    names::AFFINITY_V6,
    names::FLOWS_V4,
    names::FLOWS_V6,
    names::HALF_OPEN_V4,
    names::HALF_OPEN_V6,
    names::DATAGRAMS_V4,
    names::DATAGRAMS_V6,
    names::HELD,
    names::FRAGMENT_SOURCES,
    names::SOCK_CHOSEN,
    names::SOCK_REVERSE_V4,
    names::SOCK_REVERSE_V6,
    names::OWN_ADDRS_V4,
    names::OWN_ADDRS_V6,
    names::DEVICES,
    names::BOUND_V4,
    names::BOUND_V6,
    names::SOURCE_CHECKED,
    names::POD_POLICY,
    names::PEERS_V4,
    names::PEERS_V6,
    names::CIDRS_V4,
    names::CIDRS_V6,
    names::PEER_RULES,
    names::PORT_RULES,
    names::POLICY_FLOWS_V4,
    names::POLICY_FLOWS_V6,
];

/// How full the tables are.
pub fn table_use(pins: &Pins) -> Vec<TableUse> {
    let mut uses = Vec::new();
    for name in COUNTED {
        let Ok(fd) = pins.open_map(name) else { continue };
        if let (Ok(info), Ok(entries)) = (sys::map_info(fd.as_fd()), sys::count_entries(fd.as_fd())) {
            uses.push(TableUse {
                name,
                entries,
                limit: info.max_entries,
            });
        }
    }
    if let Ok(store) = BpfStore::open(pins) {
        let limits = store.limits();
        // Those that no frontend leads to are gone, or stay for their flows: others may get their places. Not what they have of
        // MAGLEV, which they give back first: who has some and no frontend waits for room for that.
        let frontends = store.frontends().unwrap_or_default();
        let mut services: BTreeSet<u32> = frontends.iter().map(|(_, value)| value.service).collect();
        let mut elements = 0;
        for index in 1..limits.services {
            let head = store.read_service(index).map(|service| service.head);
            let slice = head.and_then(|head| find_slice(&store, head));
            if let Ok(Some(slice)) = slice {
                elements += slice.len as usize;
                services.insert(index);
            }
        }
        uses.push(TableUse {
            name: names::SERVICES,
            entries: services.len(),
            limit: limits.services,
        });
        uses.push(TableUse {
            name: names::MAGLEV,
            entries: elements,
            limit: limits.maglev,
        });
        let backends = (0..limits.backends).filter(|&id| {
            // Those that leave or have left keep their places, for their connections, until others get them.
            store.read_backend(id).is_ok_and(|backend| {
                matches!(backend.head.state, backend_state::ACTIVE | backend_state::SERVING)
            })
        });
        uses.push(TableUse {
            name: names::BACKENDS,
            entries: backends.count(),
            limit: limits.backends,
        });
    }
    uses
}

fn flow_events(pins: &Pins) -> Vec<FlowCounter> {
    let events = counters::flow_events(pins).unwrap_or_default();
    let counted = events.into_iter().map(|(event, count)| FlowCounter {
        event: event.label(),
        meaning: event.text().trim(),
        count,
    });
    let left = LeftFlows::open(pins).and_then(|flows| flows.count()).ok();
    let left = left.map(|count| FlowCounter {
        event: "left",
        meaning: "Connections that began before the datapath and that netfilter translates, now.",
        count: count as u64,
    });
    counted.chain(left).collect()
}

fn occurred(pins: &Pins) -> Vec<Counter> {
    let counters = counters::read(pins).unwrap_or_default();
    counters
        .into_iter()
        .filter(|&(_, count)| count > 0)
        .map(|(reason, count)| Counter {
            reason: reason.label(),
            meaning: reason.text().trim(),
            count,
        })
        .collect()
}
