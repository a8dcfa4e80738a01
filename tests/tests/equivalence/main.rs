//! The host build and the kernel build of the datapath are the same datapath: random packets, in sequences that make
//! flows and use them, get the same return code, the same bytes and leave the same flows behind.
//!
//! `DATAPLANE_EQUIVALENCE_PACKETS` says how many, `DATAPLANE_EQUIVALENCE_SEED` which. Needs root and kernel 5.18
//! (a test run of a program with a context of its own and fragments of XDP).

mod answers;
mod kernel;
mod packets;
mod policies;
mod setting;
mod stack;

use std::collections::HashMap;
use std::env;
use std::fmt::Write as _;
use std::hash::Hash;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use bytemuck::Pod;
use dataplane_common::addr::{AnyAddr, Family, V4, V6, ethertype, proto};
use dataplane_common::backend::backend_state;
use dataplane_common::datagram::{
    Datagram4, Datagram6, DatagramKey4, DatagramKey6, FragmentSource, HeldHead,
};
use dataplane_common::flow::{Flow4, Flow6, FlowEvent, FlowKey4, FlowKey6};
use dataplane_common::memory::{Frame, Memory};
use dataplane_common::packet::Packet;
use dataplane_common::parse::{ETHERNET_LEN, Headers, ParseIp, parse_l4};
use dataplane_common::pipeline::Context;
use dataplane_common::reason::Reason;
use dataplane_common::service::{
    Affinity, AffinityKey4, AffinityKey6, Frontend, RANGE_SERVICE_BITS, SourceRange4, SourceRange6,
    service_flags,
};
use dataplane_common::verdict::Hook;

use kernel::{Kernel, Outcome};
use packets::{Random, Talk};
use setting::Setting;

/// Packets between two comparisons of the tables, which begin anew then.
const EPISODE: usize = 5000;
/// Packets between two changes of services or backends.
const CHANGE: usize = 50;
/// Conversations that are remembered to go on with.
const TALKS: usize = 64;

#[test]
fn host_and_kernel_build_agree_on_every_packet() -> Result<()> {
    agree(1, false)
}

/// The programs are others to the verifier then.
#[test]
fn they_agree_with_debug_lines_too() -> Result<()> {
    agree(20, true)
}

/// Where the kernel build is.
fn object() -> PathBuf {
    env::var_os("DATAPLANE_EBPF_OBJECT").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/ebpf/dataplane.o"),
        PathBuf::from,
    )
}

/// Runs one in `share` of the packets that are asked for.
fn agree(share: usize, debug_lines: bool) -> Result<()> {
    let object = object();
    if !nix::unistd::Uid::effective().is_root() {
        println!("skipped: not root");
        return Ok(());
    }
    if !object.exists() {
        println!("skipped: no {}, run `cargo xtask build-ebpf`", object.display());
        return Ok(());
    }
    let packets: usize = number("DATAPLANE_EQUIVALENCE_PACKETS")?.unwrap_or(1_000_000) as usize / share;
    let seed = number("DATAPLANE_EQUIVALENCE_SEED")?.unwrap_or_else(|| fastrand::u64(..));
    println!("{packets} packets, DATAPLANE_EQUIVALENCE_SEED={seed}");
    let started = Instant::now();

    let (_netns, mut links) = setting::enter()?;
    let mut setting = Setting::new(&mut links)?;
    let mut kernel = Kernel::load(&object, &setting.memory.config, &setting.memory, debug_lines)?;
    links.attach_xdp("up0", &kernel.xdp()?)?;
    let (at_xdp, has_ingress) = kernel.takes_places(setting.indexes.up0);
    if !at_xdp || !has_ingress {
        println!(
            "this kernel's tests are without: XDP ({}), the device that a packet came by ({})",
            !at_xdp, !has_ingress
        );
    }
    let mut random = Random(seed);
    setting.add_policies(&mut random);
    fill(&mut kernel, &setting.memory)?;
    let mut run = Run {
        setting,
        kernel,
        random,
        talks: Vec::new(),
        at_xdp,
        has_ingress,
        codes: [[0; 8]; 6],
        refused: 0,
        remembered: 0,
        held: 0,
        judged: 0,
    };
    for number in 0..packets {
        if number % CHANGE == 0 {
            run.change()?;
        }
        run.packet()
            .with_context(|| format!("packet {number} of seed {seed}"))?;
        if number % EPISODE == EPISODE - 1 {
            run.compare_tables()
                .with_context(|| format!("after packet {number} of seed {seed}"))?;
        }
    }
    run.report();
    println!("{packets} packets in {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn number(name: &str) -> Result<Option<u64>> {
    let Ok(text) = env::var(name) else {
        return Ok(None);
    };
    let number = text
        .parse()
        .with_context(|| format!("failed to read {name}={text}"))?;
    Ok(Some(number))
}

/// The tables that packets do not change.
fn fill(kernel: &mut Kernel, memory: &Memory) -> Result<()> {
    kernel.set_array::<_, 32>("SERVICES", &memory.services)?;
    kernel.set_array::<_, 48>("BACKENDS", &memory.backends)?;
    kernel.set_array::<_, 8>("MAGLEV", &memory.maglev)?;
    kernel.set_array::<_, 16>("PORTS", &memory.ports)?;
    kernel.insert::<_, _, 4, 32>("DEVICES", memory.devices.iter())?;
    kernel.insert::<_, _, 4, 4>("OWN_ADDRS_V4", memory.v4.own_addresses.iter())?;
    kernel.insert::<_, _, 16, 4>("OWN_ADDRS_V6", memory.v6.own_addresses.iter())?;
    for range in &memory.v4.ranges {
        let data = SourceRange4 {
            service: range.service,
            addr_be: range.network[0],
        };
        let length = RANGE_SERVICE_BITS + u32::from(range.length);
        kernel.insert_prefix::<_, 8>("RANGES_V4", length, &data, 1)?;
    }
    for range in &memory.v6.ranges {
        let data = SourceRange6 {
            service: range.service,
            addr_be: range.network,
        };
        let length = RANGE_SERVICE_BITS + u32::from(range.length);
        kernel.insert_prefix::<_, 20>("RANGES_V6", length, &data, 1)?;
    }
    let (v4, v6) = (values(&memory.v4.frontends), values(&memory.v6.frontends));
    kernel.insert::<_, _, 8, 8>("FRONTENDS_V4", v4.iter())?;
    kernel.insert::<_, _, 20, 8>("FRONTENDS_V6", v6.iter())?;
    policies::fill(kernel, memory)
}

/// Frontends as the kernel's tables have them.
fn values<K: Copy + Eq + Hash>(frontends: &HashMap<K, u32>) -> HashMap<K, Frontend> {
    let value = |service: u32| Frontend { service, owner: 0 };
    frontends
        .iter()
        .map(|(key, service)| (*key, value(*service)))
        .collect()
}

const HOOKS: [Hook; 6] = [
    Hook::Xdp,
    Hook::FromNetdev,
    Hook::ToNetdev,
    Hook::ToLo,
    Hook::FromPod,
    Hook::ToPod,
];

/// Both builds in step.
struct Run {
    setting: Setting,
    kernel: Kernel,
    random: Random,
    talks: Vec<Talk>,
    /// What this kernel's tests take, see [`Kernel::takes_places`].
    at_xdp: bool,
    has_ingress: bool,
    /// How often each hook returned each code.
    codes: [[u64; 8]; 6],
    /// Frames that the kernel would not test with.
    refused: u64,
    /// Clients that services with affinity have remembered.
    remembered: usize,
    /// Fragments that were still held when tables were compared.
    held: usize,
    judged: usize,
}

impl Run {
    fn packet(&mut self) -> Result<()> {
        let talk = self.talk();
        let (at, ingress) = self.place();
        let mut macs = [2; 12];
        macs[5] = self.random.below(4) as u8;
        let mut frame = Frame::new(packets::frame(&mut self.random, talk, macs));
        if at.hook != Hook::Xdp && self.random.percent(3) {
            // Some fit into the devices' MTU, some don't.
            frame.gso_size = 900 + self.random.below(900) as u32;
        }
        let Some(by_kernel) = self.kernel.run(&frame, &at, ingress)? else {
            self.refused += 1;
            return Ok(());
        };
        let mut out = frame.clone();
        let verdict = self.setting.memory.run(&mut out, &at);
        if out != frame {
            self.remember(talk);
            if let Some(new) = talk_of(&out) {
                self.remember(new.reversed());
            }
        }
        let by_host = Outcome::of_host(verdict, &at, out);
        if by_host != by_kernel {
            self.tell_counters()?;
        }
        ensure!(
            by_host == by_kernel,
            "{at:?}, gso size {}, {talk:?}\n   in  {}\n host  {} {verdict:?}\n       {}\nkernel {}\n       {}",
            frame.gso_size,
            hex(&frame.bytes),
            by_host.code.cast_signed(),
            hex(&by_host.bytes),
            by_kernel.code.cast_signed(),
            hex(&by_kernel.bytes),
        );
        let hook = HOOKS.iter().position(|hook| *hook == at.hook).unwrap_or(0);
        self.codes[hook][by_host.code.min(6) as usize] += 1;
        if by_host.code == u32::MAX {
            self.codes[hook][6] -= 1;
            self.codes[hook][7] += 1;
        }
        Ok(())
    }

    /// What both builds have counted, and the policies at hand.
    fn tell_counters(&mut self) -> Result<()> {
        let of_host = self.setting.memory.counters.borrow().clone();
        for (reason, of_host) in Reason::ALL.iter().zip(of_host) {
            let of_kernel = self.kernel.take_count("COUNTERS", *reason as u32)?;
            if of_kernel != of_host {
                println!("{}: host {of_host}, kernel {of_kernel}", reason.label());
            }
        }
        let policies = &self.setting.memory.policies;
        println!("revision {}, pods {:?}", policies.revision, policies.pods);
        Ok(())
    }

    /// A conversation that has been, or a new one.
    fn talk(&mut self) -> Talk {
        let random = &mut self.random;
        if !self.talks.is_empty() && random.percent(60) {
            return random.pick(&self.talks);
        }
        let pool = if random.percent(50) {
            &self.setting.addresses4
        } else {
            &self.setting.addresses6
        };
        Talk {
            src: random.pick(pool),
            dst: random.pick(pool),
            sport: random.pick(&self.setting.ports),
            dport: random.pick(&self.setting.ports),
            proto: match random.below(40) {
                0 => proto::SCTP,
                1..=20 => proto::TCP,
                _ => proto::UDP,
            },
        }
    }

    fn remember(&mut self, talk: Talk) {
        if self.talks.len() < TALKS {
            self.talks.push(talk);
        } else {
            let at = self.random.below(TALKS);
            self.talks[at] = talk;
        }
    }

    /// A hook, and the device by which the packet has entered.
    fn place(&mut self) -> (Context, u32) {
        let random = &mut self.random;
        let indexes = self.setting.indexes;
        let hook = loop {
            match random.pick(&HOOKS) {
                Hook::Xdp if !self.at_xdp => {}
                hook => break hook,
            }
        };
        let ifindex = match hook {
            Hook::Xdp => indexes.up0,
            Hook::FromNetdev | Hook::ToNetdev => random.pick(&[
                indexes.up0,
                indexes.up0,
                indexes.up0,
                indexes.up1,
                indexes.up2,
                indexes.up3,
                indexes.tun0,
            ]),
            Hook::ToLo => 1,
            Hook::FromPod | Hook::ToPod => random.pick(&[indexes.pod0, indexes.pod0, indexes.pod1]),
        };
        let is_egress = matches!(hook, Hook::ToNetdev | Hook::ToLo | Hook::ToPod);
        let ingress = match hook {
            _ if !self.has_ingress => 0,
            Hook::Xdp | Hook::FromNetdev | Hook::FromPod => ifindex,
            _ if random.percent(70) => 0,
            _ => indexes.pod1,
        };
        let at = Context {
            hook,
            ifindex,
            // As at the hooks: what a device has handed in has entered by one.
            from_host: is_egress && ingress == 0,
            l3: ETHERNET_LEN,
        };
        (at, ingress)
    }

    /// Changes one service and one backend, in both builds.
    fn change(&mut self) -> Result<()> {
        let random = &mut self.random;
        let memory = &mut self.setting.memory;
        let id = random.below(memory.backends.len());
        let head = &mut memory.backends[id].head;
        if random.percent(30) {
            head.generation = head.generation.wrapping_add(1);
        }
        head.state = random.pick(&[
            backend_state::ACTIVE,
            backend_state::ACTIVE,
            backend_state::GONE,
            backend_state::DRAINING,
            backend_state::SERVING,
        ]);
        self.kernel
            .set_element::<_, 48>("BACKENDS", id as u32, &memory.backends[id])?;
        let index = random.below(memory.services.len());
        let head = &mut memory.services[index].head;
        if random.percent(30) {
            head.generation = head.generation.wrapping_add(1);
        }
        head.flags &= !service_flags::DELETED;
        if random.percent(20) && head.size_class != 0 {
            head.flags ^= service_flags::AFFINITY;
        }
        if random.percent(20) {
            head.flags ^= service_flags::RANGES;
        }
        if random.percent(20) {
            head.flags |= service_flags::DELETED;
        }
        self.kernel
            .set_element::<_, 32>("SERVICES", index as u32, &memory.services[index])?;
        policies::change(&mut self.setting, &mut self.kernel, &mut self.random)
    }

    /// Both builds remember the same flows; forgets them.
    fn compare_tables(&mut self) -> Result<()> {
        self.compare::<V4, FlowKey4, Flow4, 16, 56>("FLOWS_V4", "HALF_OPEN_V4", |memory| &mut memory.v4)?;
        self.compare::<V6, FlowKey6, Flow6, 40, 80>("FLOWS_V6", "HALF_OPEN_V6", |memory| &mut memory.v6)?;
        self.compare_affinity::<V4, AffinityKey4, 12>("AFFINITY_V4", |memory| &mut memory.v4)?;
        self.compare_affinity::<V6, AffinityKey6, 24>("AFFINITY_V6", |memory| &mut memory.v6)?;
        self.compare_datagrams::<V4, DatagramKey4, Datagram4, 16, 68>("DATAGRAMS_V4", |memory| {
            &mut memory.v4
        })?;
        self.compare_datagrams::<V6, DatagramKey6, Datagram6, 40, 92>("DATAGRAMS_V6", |memory| {
            &mut memory.v6
        })?;
        self.compare_held()?;
        self.judged += policies::compare(&mut self.setting, &mut self.kernel)?;
        self.talks.clear();
        Ok(())
    }

    fn compare<F, A, B, const K: usize, const V: usize>(
        &mut self,
        flows: &str,
        half_open: &str,
        tables: fn(&mut Memory) -> &mut dataplane_common::memory::FamilyTables<F>,
    ) -> Result<()>
    where
        F: Family<FlowKey = A, Flow = B>,
        A: Pod + Eq + std::hash::Hash + std::fmt::Debug,
        B: Pod + std::fmt::Debug,
    {
        let own = tables(&mut self.setting.memory);
        for (name, own) in [(flows, &mut own.flows), (half_open, &mut own.half_open)] {
            let mut of_kernel = self.kernel.drain::<A, B, K, V>(name)?;
            for (key, mut flow) in own.get_mut().drain() {
                let Some(mut other) = of_kernel.remove(&key) else {
                    bail!("only the host build has in {name} {key:?} {flow:?}");
                };
                // The host build's clock stands still.
                F::meta_mut(&mut flow).seen_ticks = 0;
                F::meta_mut(&mut other).seen_ticks = 0;
                ensure!(
                    bytemuck::bytes_of(&flow) == bytemuck::bytes_of(&other),
                    "{name} {key:?}: host {flow:?}, kernel {other:?}"
                );
            }
            if let Some(entry) = of_kernel.iter().next() {
                bail!("only the kernel build has in {name} {entry:?}");
            }
        }
        Ok(())
    }

    fn compare_affinity<F, A, const K: usize>(
        &mut self,
        name: &str,
        tables: fn(&mut Memory) -> &mut dataplane_common::memory::FamilyTables<F>,
    ) -> Result<()>
    where
        F: Family<AffinityKey = A>,
        A: Pod + Eq + std::hash::Hash + std::fmt::Debug,
    {
        let mut of_kernel = self.kernel.drain::<A, Affinity, K, 12>(name)?;
        let own = tables(&mut self.setting.memory).affinity.get_mut();
        self.remembered += own.len();
        for (key, affinity) in own.drain() {
            let other = of_kernel.remove(&key);
            let is_same = other.is_some_and(|other| {
                (other.backend, other.backend_generation) == (affinity.backend, affinity.backend_generation)
            });
            ensure!(is_same, "{name} {key:?}: host {affinity:?}, kernel {other:?}");
        }
        ensure!(
            of_kernel.is_empty(),
            "only the kernel build has in {name} {of_kernel:?}"
        );
        Ok(())
    }

    fn compare_datagrams<F, A, B, const K: usize, const V: usize>(
        &mut self,
        name: &str,
        tables: fn(&mut Memory) -> &mut dataplane_common::memory::FamilyTables<F>,
    ) -> Result<()>
    where
        F: Family<DatagramKey = A, Datagram = B>,
        A: Pod + Eq + Hash + std::fmt::Debug,
        B: Pod + std::fmt::Debug,
    {
        let mut of_kernel = self.kernel.drain::<A, B, K, V>(name)?;
        for (key, mut datagram) in tables(&mut self.setting.memory).datagrams.get_mut().drain() {
            let Some(mut other) = of_kernel.remove(&key) else {
                bail!("only the host build has in {name} {key:?} {datagram:?}");
            };
            for datagram in [&mut datagram, &mut other] {
                F::datagram_head_mut(datagram).seen_ticks = 0;
                F::meta_mut(F::datagram_flow_mut(datagram)).seen_ticks = 0;
            }
            ensure!(
                bytemuck::bytes_of(&datagram) == bytemuck::bytes_of(&other),
                "{name} {key:?}: host {datagram:?}, kernel {other:?}"
            );
        }
        ensure!(
            of_kernel.is_empty(),
            "only the kernel build has in {name} {of_kernel:?}"
        );
        Ok(())
    }

    /// Both builds hold the same fragments, in the same places.
    fn compare_held(&mut self) -> Result<()> {
        let mut of_kernel = self.kernel.drain_bytes::<u32, 4, 2048>("HELD")?;
        let fragments = &mut self.setting.memory.fragments;
        for (place, (mut head, frame)) in fragments.held.get_mut().drain() {
            self.held += 1;
            let other = of_kernel
                .remove(&place)
                .context("only the host build holds a fragment")?;
            let (bytes, other) = other.split_at(size_of::<HeldHead>());
            let mut kept: HeldHead = bytemuck::pod_read_unaligned(bytes);
            (head.seen_ticks, kept.seen_ticks) = (0, 0);
            ensure!(head == kept, "in place {place}: host {head:?}, kernel {kept:?}");
            ensure!(other[..frame.len()] == frame, "in place {place}: other bytes");
        }
        ensure!(of_kernel.is_empty(), "only the kernel build holds fragments");
        fragments.sent_again.get_mut().clear();
        let mut of_kernel = self
            .kernel
            .drain::<AnyAddr, FragmentSource, 16, 8>("FRAGMENT_SOURCES")?;
        for (source, own) in fragments.sources.get_mut().drain() {
            let other = of_kernel.remove(&source);
            let is_same = other.is_some_and(|other| other.held == own.held);
            ensure!(
                is_same,
                "FRAGMENT_SOURCES {source:?}: host {own:?}, kernel {other:?}"
            );
        }
        ensure!(
            of_kernel.is_empty(),
            "only the kernel build has in FRAGMENT_SOURCES {of_kernel:?}"
        );
        Ok(())
    }

    /// What the packets have met, so that nobody takes a run of passes for a test.
    fn report(&self) {
        for (hook, codes) in HOOKS.iter().zip(&self.codes) {
            println!(
                "{hook:?}: codes 0 to 5 {:?}, redirect {}, next {}",
                &codes[..6],
                codes[6],
                codes[7]
            );
        }
        for (reason, count) in Reason::ALL
            .iter()
            .zip(self.setting.memory.counters.borrow().iter())
        {
            println!("{}: {count}", reason.label());
        }
        let events = self.setting.memory.flow_events.borrow();
        for (event, count) in FlowEvent::ALL.iter().zip(events.iter()) {
            println!("flows {}: {count}", event.label());
        }
        println!("clients remembered: {}", self.remembered);
        println!("fragments held at the end of an episode: {}", self.held);
        println!("flows that policies allowed: {}", self.judged);
        println!("refused as too short: {}", self.refused);
    }
}

/// Who talks to whom in a frame.
fn talk_of(frame: &Frame) -> Option<Talk> {
    let kind: u16 = frame.load(12)?;
    if u16::from_be(kind) == ethertype::IPV4 {
        read::<V4>(frame, |[addr, ..]| addr.to_ne_bytes().into())
    } else {
        read::<V6>(frame, |addr| bytemuck::cast::<_, [u8; 16]>(addr).into())
    }
}

fn read<F: ParseIp>(frame: &Frame, ip: fn(AnyAddr) -> IpAddr) -> Option<Talk> {
    let mut headers = Headers::default();
    F::parse_ip(frame, ETHERNET_LEN, &mut headers).ok()?;
    if headers.proto != proto::TCP && headers.proto != proto::UDP {
        return None;
    }
    parse_l4::<F, _>(frame, ETHERNET_LEN, &mut headers).ok()?;
    let tuple = headers.tuple;
    Some(Talk {
        src: ip(F::to_any(tuple.src)),
        dst: ip(F::to_any(tuple.dst)),
        sport: u16::from_be(tuple.sport_be),
        dport: u16::from_be(tuple.dport_be),
        proto: headers.proto,
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
