//! That a clean-up leaves the machine as it was found, and everybody else's programs and filters alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use aya::{maps::loaded_maps, programs::loaded_programs};
use dataplane_agent::{
    attach::{Attacher, cleanup::cleanup, state::State},
    bpf::{
        Hook, Program,
        links::{Cgroup, Links as PinnedLinks},
        loader,
        pins::{LinkName, Pins},
        sys,
    },
    config::Config,
    netlink::{
        filters,
        kube_proxy::{self, RuleFamily, Rules},
        nat,
        socket::{RequestSocket, attributes, read_string, read_u32},
        tables::{self, Link},
    },
};

use super::{needs::ready, node::Node, small};

/// What a clean-up must leave alone.
#[derive(Debug, PartialEq)]
pub struct Found {
    /// With their XDP programs.
    links: Vec<Link>,
    /// Device, parent and kind.
    qdiscs: BTreeSet<(u32, u32, String)>,
    /// Programs by device or cgroup hook.
    programs: BTreeMap<(u32, u32), Vec<u32>>,
    /// Names and ids, by device and direction.
    filters: BTreeMap<(u32, bool), Vec<(String, u32)>>,
    sysctls: BTreeMap<PathBuf, String>,
    files: BTreeSet<PathBuf>,
    /// What the programs that are there say of netfilter's rules.
    rules: Vec<(&'static str, String)>,
}

/// Those that list rules, of either kind of iptables.
const RULES: [&str; 6] = [
    "nft",
    "iptables-save",
    "ip6tables-save",
    "iptables-legacy-save",
    "ip6tables-legacy-save",
    "iptables-nft-save",
];

/// What a program says of the rules of this network namespace; without dates and packet counts.
fn rules_by(program: &'static str) -> Option<(&'static str, String)> {
    let arguments: &[&str] = if program == "nft" {
        &["list", "ruleset"]
    } else {
        &[]
    };
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let lines = lines.map(|line| line.split(" [").next().unwrap_or_default());
    Some((program, lines.collect::<Vec<_>>().join("\n")))
}

impl Found {
    pub fn look(node: &Node) -> Result<Self> {
        let cgroup = Cgroup::open(&node.places.cgroup)?;
        let folders = [
            node.places.bpffs.clone(),
            Path::new("/run/dataplane").join(
                node.places
                    .bpffs
                    .to_string_lossy()
                    .trim_matches('/')
                    .replace('/', "-"),
            ),
        ];
        node.netns.enter(|| {
            let mut socket = RequestSocket::open()?;
            let links = tables::dump_links(&mut socket)?;
            let mut programs = BTreeMap::new();
            let mut named = BTreeMap::new();
            for link in &links {
                for hook in [Hook::TcIngress, Hook::TcEgress] {
                    let at = hook.attach_type();
                    programs.insert((link.ifindex, at), sys::prog_query(link.ifindex, at)?);
                    let filters = filters::list(&mut socket, link.ifindex, hook)?;
                    let filters = filters.into_iter().map(|filter| (filter.name, filter.prog_id));
                    named.insert((link.ifindex, hook == Hook::TcIngress), filters.collect());
                }
            }
            for program in Program::ALL.iter().filter(|program| program.is_cgroup()) {
                let at = program.hook().attach_type();
                programs.insert((0, at), sys::prog_query(cgroup.target(), at)?);
            }
            let mut sysctls = BTreeMap::new();
            read_all(Path::new("/proc/sys/net"), &mut |path| {
                // A gauge, not a setting.
                if !path.ends_with("nf_conntrack_count")
                    && let Ok(value) = fs::read_to_string(path)
                {
                    sysctls.insert(path.to_owned(), value);
                }
            });
            let mut files = BTreeSet::new();
            for folder in &folders {
                read_all(folder, &mut |path| {
                    files.insert(path.to_owned());
                });
            }
            Ok(Self {
                links,
                qdiscs: qdiscs(&mut socket)?,
                programs,
                filters: named,
                sysctls,
                files,
                rules: RULES.into_iter().filter_map(rules_by).collect(),
            })
        })
    }
}

fn read_all(folder: &Path, each: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        each(&entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            read_all(&entry.path(), each);
        }
    }
}

fn qdiscs(socket: &mut RequestSocket) -> Result<BTreeSet<(u32, u32, String)>> {
    const RTM_GETQDISC: u16 = 38;
    const TCMSG_LEN: usize = 20;
    const TCA_KIND: u16 = 1;
    let dumped = socket.dump(RTM_GETQDISC, &[0; TCMSG_LEN])?;
    let qdisc = |body: &[u8]| {
        let kind = attributes(body.get(TCMSG_LEN..)?).find(|&(attribute, _)| attribute == TCA_KIND)?;
        Some((read_u32(body, 4)?, read_u32(body, 12)?, read_string(kind.1)))
    };
    Ok(dumped.iter().filter_map(|one| qdisc(&one.body)).collect())
}

#[test]
fn a_clean_up_leaves_the_machine_as_it_was_found() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("traces")?;
    node.add_pod()?;
    let config = Config {
        localhost_node_ports: true,
        ..node.config()
    };
    for rules in [
        "nft add table ip kube-proxy { chain services { counter ; } ; }",
        "iptables -t nat -N KUBE-SERVICES",
        "iptables-legacy -N KUBE-SERVICES",
    ] {
        let (program, arguments) = rules.split_once(' ').unwrap_or((rules, ""));
        let arguments: Vec<&str> = arguments.split(' ').collect();
        // Those that this machine has.
        node.netns
            .enter(|| Ok(Command::new(program).args(arguments).output().is_ok()))?;
    }
    let before = Found::look(&node)?;
    let agent = node.start(&config)?;
    agent.wait("the uplink and the pod", |state| {
        state.devices.len() == 2 && !state.pod_interfaces.is_empty()
    })?;
    // What an agent does that takes over.
    node.netns.enter(|| Ok(nat::keep()?))?;
    let meanwhile = Found::look(&node)?;
    ensure!(meanwhile != before, "nothing was done");
    ensure!(
        meanwhile.rules != before.rules || before.rules.iter().all(|(program, _)| *program != "nft"),
        "no rule was made"
    );
    let pins = node.pins();
    let maps = pins.map_ids();
    let links = PinnedLinks::new(&pins);
    let pinned = pins.list_links()?.into_iter();
    let programs: BTreeSet<u32> = pinned.filter_map(|link| links.program_id(link)).collect();
    assert!(maps.len() > 10 && programs.len() > 10, "{maps:?} {programs:?}");

    agent.stop(&node)?;
    node.netns.enter(|| Ok(cleanup(&config.bpffs)?))?;
    assert_eq!(Found::look(&node)?, before);
    let programs_left = loaded_programs().flatten().map(|program| program.id());
    assert_eq!(programs_left.filter(|id| programs.contains(id)).count(), 0);
    let maps_left = loaded_maps().flatten().map(|map| map.id());
    assert_eq!(maps_left.filter(|id| maps.contains(id)).count(), 0);
    Ok(())
}

#[test]
fn what_others_attached_outlives_us() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("aliens")?;
    node.add_pod()?;
    let config = node.config();
    let (eth0, veth1) = (node.links.index("eth0")?, node.links.index("veth1")?);
    let other = Pins::new(&node.places.bpffs.join("other"));
    let options = loader::LoadOptions {
        socket_hooks: true,
        ..small(&config)
    };
    let foreign = node.netns.enter(|| Ok(loader::load(other, &options)?))?;
    let cgroup = Cgroup::open(&node.places.cgroup)?;
    let program = |program| foreign.program(program).context("not loaded");
    let attach = |what, target: u32, flags| {
        let at = Program::hook(what).attach_type();
        node.netns
            .enter(|| Ok(sys::link_create(program(what)?, target, at, flags)?))
    };
    let _xdp = attach(Program::Xdp, veth1, 1 << 2)?;
    let _tcx = attach(Program::FromNetdev, eth0, 0)?;
    let _hook = attach(Program::Connect4, cgroup.target(), 0)?;
    let tc = |arguments: &str| -> Result<()> {
        let run = || Ok(Command::new("tc").args(arguments.split(' ')).status()?);
        let status = node.netns.enter(run)?;
        ensure!(status.success(), "tc {arguments}: {status}");
        Ok(())
    };
    if let Err(error) = tc("qdisc show") {
        println!("skipped: {error:#}");
        return Ok(());
    }
    tc("qdisc add dev eth0 clsact")?;
    tc("filter add dev eth0 ingress prio 7 u32 match u32 0 0 flowid 1:1")?;

    // By TCX, as a whole.
    let before = Found::look(&node)?;
    let agent = node.start(&config)?;
    agent.wait("the uplink and the pod", |state| {
        !state.devices.is_empty() && !state.pod_interfaces.is_empty()
    })?;
    agent.stop(&node)?;
    node.netns.enter(|| Ok(cleanup(&config.bpffs)?))?;
    assert_eq!(Found::look(&node)?, before);

    // By filters: one device has a qdisc already, the other gets one from us, and a stranger's filter later.
    node.netns.enter(|| {
        let loaded = loader::load(node.pins(), &small(&config))?;
        let mut attacher = Attacher::new(loaded, State::lock(&config.bpffs)?, None, false);
        let mut socket = RequestSocket::open()?;
        let devices = tables::dump_links(&mut socket)?;
        let wanted = [eth0, veth1].map(|ifindex| LinkName {
            program: Program::ToNetdev,
            ifindex,
        });
        let errors = attacher.reconcile(&mut socket, &devices, &wanted.into(), |_| false);
        assert!(errors.is_empty(), "{errors:?}");
        Ok(())
    })?;
    tc("filter add dev veth1 egress prio 9 u32 match u32 0 0 flowid 1:1")?;
    node.netns.enter(|| Ok(cleanup(&config.bpffs)?))?;
    let after = Found::look(&node)?;
    assert_eq!(after.filters, before.filters);
    let clsact: Vec<u32> = after
        .qdiscs
        .iter()
        .filter(|(.., kind)| kind == "clsact")
        .map(|(ifindex, ..)| *ifindex)
        .collect();
    assert_eq!(clsact, [eth0, veth1]);
    tc("filter del dev eth0 ingress prio 7")?;
    tc("filter del dev veth1 egress prio 9")?;
    drop(foreign);
    Ok(())
}

#[test]
fn kube_proxys_own_tables_are_found_and_removed_and_nothing_else() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let node = Node::build("kproxy")?;
    let run = |text: &str| {
        let (program, arguments) = text.split_once(' ').unwrap_or((text, ""));
        let arguments: Vec<&str> = arguments.split(' ').collect();
        node.netns
            .enter(|| Ok(Command::new(program).args(arguments).output()?))
    };
    if let Err(error) = run("nft list ruleset") {
        println!("skipped: needs nft ({error:#})");
        return Ok(());
    }
    let find = || node.netns.enter(|| Ok(kube_proxy::find(&[])?));
    run("nft add table inet kube-proxy { chain services { counter ; } ; }")?;
    run("nft add table ip other { chain services { counter ; } ; }")?;
    assert_eq!(find()?, []);
    let before = node.netns.enter(|| Ok(rules_by("nft")))?;
    for family in ["ip", "ip6"] {
        run(&format!(
            "nft add table {family} kube-proxy {{ chain services {{ counter ; }} ; chain nat {{ type nat hook prerouting priority 0 ; jump services ; }} ; }}"
        ))?;
    }
    let tables = [RuleFamily::Ip, RuleFamily::Ip6];
    assert_eq!(find()?, tables.map(Rules::Nftables));
    assert_eq!(node.netns.enter(|| Ok(kube_proxy::remove()?))?, tables);
    assert_eq!(node.netns.enter(|| Ok(rules_by("nft")))?, before);
    assert_eq!(node.netns.enter(|| Ok(kube_proxy::remove()?))?, []);

    let (nft, legacy) = (
        "iptables-nft -t nat -N KUBE-SERVICES",
        "iptables-legacy -N KUBE-SERVICES",
    );
    if run(nft).is_ok_and(|output| output.status.success()) {
        assert_eq!(find()?, [Rules::IptablesNft(RuleFamily::Ip)]);
        assert_eq!(
            node.netns.enter(|| Ok(kube_proxy::remove()?))?,
            [],
            "it is in a table of others"
        );
        run("iptables-nft -t nat -X KUBE-SERVICES")?;
    }
    if run(legacy).is_ok_and(|output| output.status.success()) {
        assert_eq!(find()?, [Rules::IptablesLegacy(RuleFamily::Ip)]);
    }
    Ok(())
}
