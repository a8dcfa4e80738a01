//! The kernel build: programs run by `BPF_PROG_TEST_RUN`, and its tables.

use std::collections::HashMap as StdHashMap;
use std::hash::Hash;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, MapData, PerCpuArray, PerCpuValues, RingBuf};
use aya::programs::{Program, ProgramType, SchedClassifier, TestRun, TestRunOptions, Xdp};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfLoader};
use bytemuck::{Pod, Zeroable, bytes_of, cast_slice};
use dataplane_common::config::{self, Config, config_flags};
use dataplane_common::memory::{Frame, Memory};
use dataplane_common::parse::ETHERNET_LEN;
use dataplane_common::pipeline::Context;
use dataplane_common::policy::Hits;
use dataplane_common::verdict::{Action, Hook, Verdict};

/// Every hook and its program.
const PROGRAMS: [(Hook, &str); 6] = [
    (Hook::Xdp, "xdp"),
    (Hook::FromNetdev, "from_netdev"),
    (Hook::ToNetdev, "to_netdev"),
    (Hook::ToLo, "to_lo"),
    (Hook::FromPod, "from_pod"),
    (Hook::ToPod, "to_pod"),
];

/// Entries of each flow table: an episode needs a fraction, so nothing is evicted.
const FLOWS: u32 = 131_072;

/// `struct xdp_md`.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct XdpContext {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

/// `struct __sk_buff`, in words, and those of them that a test may set.
const SKB_WORDS: usize = 48;
const SKB_INGRESS_IFINDEX: usize = 9;
const SKB_IFINDEX: usize = 10;
const SKB_GSO_SEGS: usize = 41;
const SKB_GSO_SIZE: usize = 44;

/// What a program made of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub code: u32,
    pub bytes: Vec<u8>,
}

impl Outcome {
    /// What the kernel side's entry point returns for a verdict of the host build.
    pub fn of_host(verdict: Verdict, at: &Context, frame: Frame) -> Self {
        let code = if at.hook == Hook::Xdp {
            match verdict.action() {
                Action::Pass => 2,
                Action::Drop => 1,
                Action::Transmit if verdict.value() == at.ifindex => 3,
                Action::Transmit => 4,
                _ => 0,
            }
        } else {
            match verdict.action() {
                Action::Pass => u32::MAX,
                Action::Drop => 2,
                _ => 7,
            }
        };
        let bytes = frame.bytes;
        Self { code, bytes }
    }
}

/// The flags of [`Config`] that say what this kernel has.
pub fn config_flags() -> Result<u32> {
    let mut flags = 0;
    for (flag, program, helper) in [
        (
            config_flags::XDP_FRAGS,
            ProgramType::Xdp,
            BpfHelper::BPF_FUNC_xdp_get_buff_len,
        ),
        (
            config_flags::FIB_MTU,
            ProgramType::SchedClassifier,
            BpfHelper::BPF_FUNC_check_mtu,
        ),
    ] {
        if is_helper_supported(program, helper)? {
            flags |= flag;
        }
    }
    Ok(flags)
}

/// The loaded object.
pub struct Kernel {
    object: Ebpf,
    /// `xdp_frags`, or `xdp_linear` where the kernel knows no frames in several buffers.
    xdp: &'static str,
    buffer: Vec<u8>,
}

impl Kernel {
    pub fn load(object: &Path, config: &Config, memory: &Memory, debug_lines: bool) -> Result<Self> {
        let bytes = std::fs::read(object).with_context(|| format!("failed to read {}", object.display()))?;
        let xdp = if config.flags & config_flags::XDP_FRAGS == 0 {
            "xdp_linear"
        } else {
            "xdp_frags"
        };
        let mut loader = EbpfLoader::new();
        loader.override_global(config::SYMBOL, bytes_of(config), true);
        // Nobody reads the lines: when the ring buffer is full, they are lost.
        let level = if debug_lines { u8::MAX } else { 0 };
        loader.override_global("AYA_LOG_LEVEL", &level, true);
        for (names, entries) in [
            (["SERVICES", "SERVICES"], memory.services.len() as u32),
            (["BACKENDS", "BACKENDS"], memory.backends.len() as u32),
            (["MAGLEV", "MAGLEV"], memory.maglev.len() as u32),
            (["AFFINITY_V4", "AFFINITY_V6"], FLOWS),
            (["FLOWS_V4", "FLOWS_V6"], FLOWS),
            (["HALF_OPEN_V4", "HALF_OPEN_V6"], FLOWS),
            (["POLICY_FLOWS_V4", "POLICY_FLOWS_V6"], FLOWS),
            (["DATAGRAMS_V4", "DATAGRAMS_V6"], FLOWS),
            (["HELD", "HELD"], config.held),
            // Room for what an episode tells.
            (["VERDICTS", "VERDICTS"], 1 << 22),
        ] {
            for name in names {
                loader.map_max_entries(name, entries);
            }
        }
        let mut object = loader.load(&bytes).context("failed to load the object's maps")?;
        for name in PROGRAMS.map(|(_, name)| if name == "xdp" { xdp } else { name }) {
            match object.program_mut(name) {
                Some(Program::Xdp(program)) => program.load(),
                Some(Program::SchedClassifier(program)) => program.load(),
                _ => bail!("the object has no program {name}"),
            }
            .with_context(|| format!("failed to load {name}"))?;
        }
        Ok(Self {
            object,
            xdp,
            buffer: vec![0; 4096],
        })
    }

    /// Whether the kernel lets a test say where a packet comes from: at XDP (5.15), and at TC which device it came by. `up` is
    /// one that is up.
    pub fn takes_places(&mut self, up: u32) -> (bool, bool) {
        let frame = Frame::new(vec![0; 64]);
        let mut takes = |hook, ingress| {
            let at = Context {
                hook,
                ifindex: up,
                from_host: false,
                l3: ETHERNET_LEN,
            };
            self.run(&frame, &at, ingress).is_ok()
        };
        (takes(Hook::Xdp, up), takes(Hook::FromNetdev, up))
    }

    /// A descriptor of the XDP program: a device has receive queues for XDP only while a program is attached.
    pub fn xdp(&self) -> Result<OwnedFd> {
        let Some(Program::Xdp(program)) = self.object.program(self.xdp) else {
            bail!("the object has no program {}", self.xdp);
        };
        Ok(program.fd()?.as_fd().try_clone_to_owned()?)
    }

    /// Runs one packet. `None`: the kernel refuses to test with such a frame.
    pub fn run(&mut self, frame: &Frame, at: &Context, ingress: u32) -> Result<Option<Outcome>> {
        let name = PROGRAMS.iter().find(|(hook, _)| *hook == at.hook);
        let name = name.context("no such hook")?.1;
        let program = self.object.program(if name == "xdp" { self.xdp } else { name });
        let mut skb = [0u32; SKB_WORDS];
        skb[SKB_INGRESS_IFINDEX] = ingress;
        skb[SKB_IFINDEX] = at.ifindex;
        if frame.gso_size != 0 {
            skb[SKB_GSO_SIZE] = frame.gso_size;
            skb[SKB_GSO_SEGS] = 2;
        }
        let xdp = XdpContext {
            data_end: frame.bytes.len() as u32,
            ingress_ifindex: at.ifindex,
            ..XdpContext::default()
        };
        let mut options = TestRunOptions::new();
        options.data_in = Some(&frame.bytes);
        options.data_out = Some(&mut self.buffer);
        let result = match program {
            Some(Program::Xdp(program)) => {
                options.ctx_in = Some(bytes_of(&xdp));
                Xdp::test_run(program, options)
            }
            Some(Program::SchedClassifier(program)) => {
                options.ctx_in = Some(cast_slice(&skb));
                SchedClassifier::test_run(program, options)
            }
            _ => bail!("the object lacks a program"),
        };
        match result {
            Ok(result) => Ok(Some(Outcome {
                code: result.return_value,
                bytes: self.buffer[..result.data_size_out as usize].to_vec(),
            })),
            // It wants the IP header whole.
            Err(_) if frame.bytes.len() < 54 => Ok(None),
            Err(error) => {
                Err(error).with_context(|| format!("failed to run {:?} with {:02x?}", at.hook, frame.bytes))
            }
        }
    }

    /// Writes an array's elements.
    pub fn set_array<T: Pod, const N: usize>(&mut self, name: &str, values: &[T]) -> Result<()> {
        ensure!(size_of::<T>() == N, "{name} has elements of another size");
        let map = self
            .object
            .map_mut(name)
            .with_context(|| format!("no map {name}"))?;
        let mut array: Array<&mut MapData, [u8; N]> = Array::try_from(map)?;
        for (index, value) in values.iter().enumerate() {
            array.set(index as u32, to_array::<T, N>(value), 0)?;
        }
        Ok(())
    }

    /// Writes one element of an array.
    pub fn set_element<T: Pod, const N: usize>(&mut self, name: &str, index: u32, value: &T) -> Result<()> {
        let map = self
            .object
            .map_mut(name)
            .with_context(|| format!("no map {name}"))?;
        let mut array: Array<&mut MapData, [u8; N]> = Array::try_from(map)?;
        Ok(array.set(index, to_array::<T, N>(value), 0)?)
    }

    fn hash<const K: usize, const V: usize>(
        &mut self,
        name: &str,
    ) -> Result<HashMap<&mut MapData, [u8; K], [u8; V]>> {
        let map = self
            .object
            .map_mut(name)
            .with_context(|| format!("no map {name}"))?;
        Ok(HashMap::try_from(map)?)
    }

    /// Adds entries to a hash.
    pub fn insert<'a, A: Pod, B: Pod, const K: usize, const V: usize>(
        &mut self,
        name: &str,
        entries: impl Iterator<Item = (&'a A, &'a B)>,
    ) -> Result<()> {
        let mut map = self.hash::<K, V>(name)?;
        for (key, value) in entries {
            map.insert(to_array::<A, K>(key), to_array::<B, V>(value), 0)?;
        }
        Ok(())
    }

    /// Adds a prefix to a trie.
    pub fn insert_prefix<A: Pod, const N: usize>(
        &mut self,
        name: &str,
        length: u32,
        prefix: &A,
        value: u32,
    ) -> Result<()> {
        let map = self
            .object
            .map_mut(name)
            .with_context(|| format!("no map {name}"))?;
        let mut trie: LpmTrie<&mut MapData, [u8; N], u32> = LpmTrie::try_from(map)?;
        Ok(trie.insert(&Key::new(length, to_array::<A, N>(prefix)), value, 0)?)
    }

    /// Removes an entry of a hash.
    pub fn remove<A: Pod, const K: usize, const V: usize>(&mut self, name: &str, key: &A) -> Result<()> {
        Ok(self.hash::<K, V>(name)?.remove(&to_array::<A, K>(key))?)
    }

    /// Sums up an element of a per-CPU array, and sets it to 0.
    pub fn take_count(&mut self, name: &str, index: u32) -> Result<u64> {
        self.take(name, index).map(|[count]| count)
    }

    /// The same of verdicts.
    pub fn take_hits(&mut self, name: &str, index: u32) -> Result<Hits> {
        let [decided, dry_run] = self.take(name, index)?;
        Ok(Hits { decided, dry_run })
    }

    fn take<const N: usize>(&mut self, name: &str, index: u32) -> Result<[u64; N]> {
        let map = self
            .object
            .map_mut(name)
            .with_context(|| format!("no map {name}"))?;
        let mut counts: PerCpuArray<&mut MapData, [u64; N]> = PerCpuArray::try_from(map)?;
        let values = counts.get(&index, 0)?;
        counts.set(index, PerCpuValues::try_from(vec![[0; N]; values.len()])?, 0)?;
        Ok(std::array::from_fn(|at| {
            values.iter().map(|value| value[at]).sum()
        }))
    }

    /// Takes every record out of a ring buffer.
    pub fn take_records<T: Pod>(&mut self, name: &str) -> Result<Vec<T>> {
        let map = self
            .object
            .map_mut(name)
            .with_context(|| format!("no map {name}"))?;
        let mut ring: RingBuf<&mut MapData> = RingBuf::try_from(map)?;
        let mut records = Vec::new();
        while let Some(record) = ring.next() {
            let bytes = record.get(..size_of::<T>()).context("a short record")?;
            records.push(bytemuck::pod_read_unaligned(bytes));
        }
        Ok(records)
    }

    /// Takes every entry out of a hash.
    pub fn drain<A: Pod + Eq + Hash, B: Pod, const K: usize, const V: usize>(
        &mut self,
        name: &str,
    ) -> Result<StdHashMap<A, B>> {
        let entries = self.drain_bytes::<A, K, V>(name)?;
        let value = |(key, value): (A, [u8; V])| (key, bytemuck::pod_read_unaligned(&value));
        Ok(entries.into_iter().map(value).collect())
    }

    /// As [`Self::drain`], for values of any kind.
    pub fn drain_bytes<A: Pod + Eq + Hash, const K: usize, const V: usize>(
        &mut self,
        name: &str,
    ) -> Result<StdHashMap<A, [u8; V]>> {
        let mut map = self.hash::<K, V>(name)?;
        let entries = map.iter().collect::<Result<Vec<_>, _>>()?;
        for (key, _) in &entries {
            map.remove(key)?;
        }
        Ok(entries
            .iter()
            .map(|(key, value)| (bytemuck::pod_read_unaligned(key), *value))
            .collect())
    }
}

fn to_array<T: Pod, const N: usize>(value: &T) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(bytes_of(value));
    bytes
}
