//! The datapath's view of the world, over BPF maps and helpers.

use core::{ffi::c_void, marker::PhantomData, ptr};

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS,
        BPF_NOEXIST, bpf_fib_lookup, bpf_sock_addr, xdp_md,
    },
    btf_maps::{HashMap, LruHashMap, PerCpuArray, lpm_trie::Key},
    helpers::generated::{
        bpf_fib_lookup as fib_lookup, bpf_get_socket_cookie, bpf_jiffies64, bpf_ktime_get_ns,
    },
};
use dataplane_common::{
    addr::{Family, Mac, V4, V6},
    backend::{Backend, BackendHead},
    config::{Config, Jiffies, config_flags},
    device::Device,
    flow::{Flow4, Flow6, FlowEvent, FlowKey4, FlowKey6, FlowMeta},
    icmp,
    pipeline::Work,
    policy::{
        Counted, Judgement, PodPolicy, PolicyFlow, PolicyFlowKey4, PolicyFlowKey6, VerdictBudget,
        VerdictEvent,
    },
    service::{
        Affinity, AffinityKey4, AffinityKey6, Frontend, FrontendKey4, FrontendKey6, PortSet,
        RANGE_SERVICE_BITS, Service, ServiceHead, SourceRange4, SourceRange6,
    },
    sock::{SockBackend, SockKey4, SockKey6},
    source::source_place,
    tables::{Entry, Env, InsertError, PolicyEntry, Route, Router, Tables},
    traffic::Sample,
    unbound::PodRange,
};

use crate::{maps::*, policies, traffic};

/// Written by the agent before the object is loaded.
#[unsafe(no_mangle)]
static CONFIG: Config = Config::DEFAULT;

/// One of this load's constants.
#[inline(always)]
pub fn config<T: Copy>(field: impl FnOnce(&Config) -> &T) -> T {
    // SAFETY: a reference to a part of a static. Volatile: the value here is not the one that the agent sets.
    unsafe { ptr::read_volatile(field(&CONFIG)) }
}

/// In nanoseconds, in steps of a jiffy.
#[inline(always)]
fn since_boot_ns() -> u64 {
    // SAFETY: a helper without arguments. Before the constants are loaded, which would be kept over the call on the stack.
    let count = unsafe { bpf_jiffies64() };
    let jiffies = Jiffies {
        initial: config(|c| &c.jiffies.initial),
        length_ns: config(|c| &c.jiffies.length_ns),
    };
    jiffies.to_ns(count)
}

/// This CPU's [`Work`]; programs that use it do not nest.
#[inline(always)]
pub fn work<'a, F: Family>(map: &'static PerCpuArray<Work<F>, 1>) -> Option<&'a mut Work<F>> {
    // SAFETY: a per-CPU element; XDP and TC programs run with bottom halves off, so none interrupts another on its CPU.
    map.get_ptr_mut(0).map(|work| unsafe { &mut *work })
}

/// The maps and helpers, for a program whose context is `C`.
pub struct World<C> {
    ctx: *mut c_void,
    kind: PhantomData<C>,
}

impl<C> World<C> {
    #[inline(always)]
    pub fn new(ctx: *mut C) -> Self {
        Self {
            ctx: ctx.cast(),
            kind: PhantomData,
        }
    }
}

/// What a program's context tells of the socket that sends.
pub trait Sender {
    /// `bpf_get_socket_cookie`, 0 where there is no socket. A packet keeps that of a pod's process up to the first hook
    /// outside.
    ///
    /// # Safety
    /// `ctx` is the program's context.
    unsafe fn cookie(ctx: *mut Self) -> u64;
}

impl Sender for __sk_buff {
    #[inline(always)]
    unsafe fn cookie(ctx: *mut Self) -> u64 {
        // SAFETY: the caller's.
        unsafe { bpf_get_socket_cookie(ctx.cast()) }
    }
}

impl Sender for xdp_md {
    #[inline(always)]
    unsafe fn cookie(_: *mut Self) -> u64 {
        0
    }
}

impl Sender for bpf_sock_addr {
    #[inline(always)]
    unsafe fn cookie(_: *mut Self) -> u64 {
        0
    }
}

/// A key or value on the stack. The compiler joins stores to words as packets and maps allow it, at any address; the stack is
/// where the verifier insists on alignment.
#[repr(C, align(8))]
pub struct Aligned<T>(pub T);

impl<T> Aligned<T> {
    #[inline(always)]
    pub fn in_place(&self) -> &T {
        &self.0
    }
}

/// A flow entry in its map.
pub struct MapEntry<V>(*mut V);

impl PolicyEntry for MapEntry<PolicyFlow> {
    #[inline(always)]
    fn flow(&self) -> &PolicyFlow {
        // SAFETY: as of `Entry` below. It may be torn when it is reused meanwhile, for a flow that was allowed, too.
        unsafe { &*self.0 }
    }
    #[inline(always)]
    fn touch(&self, seen_ticks: u32) {
        // SAFETY: a single store of an aligned field of an element that exists.
        unsafe { ptr::write_volatile(&raw mut (*self.0).seen_ticks, seen_ticks) };
    }
}

macro_rules! family_tables {
    ($family:ty, $key:ty, $flow:ty, $frontend:ty, $client:ty, $flows:ident, $half_open:ident, $frontends:ident, $own:ident,
     $affinity:ident, $range:ident, $ranges:ident, $reverse:ident, $sock_key:expr,
     $policy_key:ty, $policy_flows:ident, $bound:ident, $sources:ident) => {
        impl Entry<$family> for MapEntry<$flow> {
            #[inline(always)]
            fn flow(&self) -> &$flow {
                // SAFETY: the pointer came from a successful lookup and stays readable while the program runs. Another
                // CPU may be writing; the parts that decide are checked against generations.
                unsafe { &*self.0 }
            }
            #[inline(always)]
            fn touch(&self, seen_ticks: u32, state: u8) {
                // SAFETY: as above; both are single stores of aligned fields.
                unsafe {
                    let meta: *mut FlowMeta = &raw mut (*self.0).meta;
                    ptr::write_volatile(&raw mut (*meta).seen_ticks, seen_ticks);
                    ptr::write_volatile(&raw mut (*meta).state, state);
                }
            }
            #[inline(always)]
            fn set_judged(&self, revision: u32) {
                // SAFETY: as above.
                unsafe { ptr::write_volatile(&raw mut (*self.0).meta.judged, revision) };
            }
        }

        impl<C: Sender> Tables<$family> for World<C> {
            type PolicyEntry<'a>
                = MapEntry<PolicyFlow>
            where
                Self: 'a;
            type Entry<'a>
                = MapEntry<$flow>
            where
                Self: 'a;

            #[inline(always)]
            fn flow(&self, key: &$key) -> Option<MapEntry<$flow>> {
                $flows.get_ptr_mut(Aligned(*key).in_place()).map(MapEntry)
            }
            #[inline(always)]
            fn half_open(&self, key: &$key) -> Option<MapEntry<$flow>> {
                $half_open
                    .get_ptr_mut(Aligned(*key).in_place())
                    .map(MapEntry)
            }
            #[inline(always)]
            fn put_flow(&self, key: &$key, flow: &$flow) -> Result<(), InsertError> {
                insert(&$flows, key, flow, 0)
            }
            #[inline(always)]
            fn put_half_open(&self, key: &$key, flow: &$flow, replace: bool) -> Result<(), InsertError> {
                insert(
                    &$half_open,
                    key,
                    flow,
                    if replace { 0 } else { u64::from(BPF_NOEXIST) },
                )
            }
            #[inline(always)]
            fn remove_flow(&self, key: &$key) {
                let _ = $flows.remove(Aligned(*key).in_place());
            }
            #[inline(always)]
            fn remove_half_open(&self, key: &$key) {
                let _ = $half_open.remove(Aligned(*key).in_place());
            }
            #[inline(always)]
            fn policy_flow(&self, key: &$policy_key) -> Option<MapEntry<PolicyFlow>> {
                $policy_flows
                    .get_ptr_mut(Aligned(*key).in_place())
                    .map(MapEntry)
            }
            #[inline(always)]
            fn put_policy_flow(&self, key: &$policy_key, flow: &PolicyFlow) {
                let _ = insert(&$policy_flows, key, flow, 0);
            }
            #[inline(always)]
            fn frontend(&self, key: &$frontend) -> Option<u32> {
                value::<_, Frontend, _, _>(&$frontends, key).map(|f| f.service)
            }
            #[inline(always)]
            fn own_address(&self, addr: <$family as Family>::Addr) -> u32 {
                value(&$own, &addr).unwrap_or(0)
            }
            #[inline(always)]
            fn bound(&self, addr: &<$family as Family>::Addr) -> Option<u32> {
                value(&$bound, addr)
            }
            #[inline(always)]
            fn has_source(&self, ifindex: u32, addr: &<$family as Family>::Addr) -> bool {
                let own = $sources.get(source_place(ifindex));
                own.is_some_and(|own| own.ifindex == ifindex && own.addr_be == *addr)
            }
            #[inline(always)]
            fn given(&self, addr: &<$family as Family>::Addr, port_be: u16) -> Option<SockBackend> {
                // SAFETY: the context is the program's.
                let cookie = unsafe { C::cookie(self.ctx.cast()) };
                if cookie == 0 {
                    return None;
                }
                let key = Aligned($sock_key(cookie, *addr, port_be));
                // SAFETY: what a torn value names is checked before it is believed.
                let asked = unsafe { $reverse.get(key.in_place()) }?;
                (asked.connected != 0).then_some(asked.given)
            }
            #[inline(always)]
            fn in_source_range(&self, service: u32, client: &<$family as Family>::Addr) -> bool {
                const BITS: u32 = RANGE_SERVICE_BITS + 8 * size_of::<<$family as Family>::Addr>() as u32;
                let addr_be = *client;
                let key = Aligned(Key::new(BITS, $range { service, addr_be }));
                $ranges.get(key.in_place()).is_some()
            }
            #[inline(always)]
            fn affinity(&self, key: &$client) -> Option<Affinity> {
                // SAFETY: may be torn when the entry is reused meanwhile; what it names is checked before it is believed.
                unsafe { $affinity.get(Aligned(*key).in_place()) }.copied()
            }
            #[inline(always)]
            fn touch_affinity(&self, key: &$client, seen_eighths: u32) {
                if let Some(affinity) = $affinity.get_ptr_mut(Aligned(*key).in_place()) {
                    // SAFETY: a single store of an aligned field of an element that exists.
                    unsafe { ptr::write_volatile(&raw mut (*affinity).seen_eighths, seen_eighths) };
                }
            }
            #[inline(always)]
            fn put_affinity(&self, key: &$client, affinity: &Affinity) {
                let (key, affinity) = (Aligned(*key), Aligned(*affinity));
                let _ = insert(&$affinity, key.in_place(), affinity.in_place(), 0);
            }
        }
    };
}

family_tables!(
    V4,
    FlowKey4,
    Flow4,
    FrontendKey4,
    AffinityKey4,
    FLOWS_V4,
    HALF_OPEN_V4,
    FRONTENDS_V4,
    OWN_ADDRS_V4,
    AFFINITY_V4,
    SourceRange4,
    RANGES_V4,
    SOCK_REVERSE_V4,
    SockKey4::new,
    PolicyFlowKey4,
    POLICY_FLOWS_V4,
    BOUND_V4,
    SOURCES_V4
);
family_tables!(
    V6,
    FlowKey6,
    Flow6,
    FrontendKey6,
    AffinityKey6,
    FLOWS_V6,
    HALF_OPEN_V6,
    FRONTENDS_V6,
    OWN_ADDRS_V6,
    AFFINITY_V6,
    SourceRange6,
    RANGES_V6,
    SOCK_REVERSE_V6,
    SockKey6::new,
    PolicyFlowKey6,
    POLICY_FLOWS_V6,
    BOUND_V6,
    SOURCES_V6
);

/// `EEXIST`, as helpers return it.
const EXISTS: i32 = -17;

#[inline(always)]
pub fn insert<K, V, const M: usize, const F: usize>(
    map: &LruHashMap<K, V, M, F>,
    key: &K,
    value: &V,
    flags: u64,
) -> Result<(), InsertError> {
    map.insert(key, value, flags).map_err(|error| {
        if error == EXISTS {
            InsertError::Exists
        } else {
            InsertError::Failed
        }
    })
}

#[inline(always)]
pub fn value<K: Copy, V: Copy, const M: usize, const F: usize>(
    map: &HashMap<K, V, M, F>,
    key: &K,
) -> Option<V> {
    let key = Aligned(*key);
    // SAFETY: values of these maps never change in place, see `dataplane_common::service::Frontend`.
    unsafe { map.get(key.in_place()) }.copied()
}

impl<C> Env for World<C> {
    #[inline(always)]
    fn config<T: Copy>(&self, field: impl FnOnce(&Config) -> &T) -> T {
        config(field)
    }

    #[inline(always)]
    fn now_ticks(&self) -> u32 {
        (since_boot_ns() >> 30) as u32
    }

    #[inline(always)]
    fn now_eighths(&self) -> u32 {
        (since_boot_ns() >> 27) as u32
    }

    #[inline(always)]
    fn service_affinity(&self, index: u32) -> u32 {
        let Some(service) = SERVICES.get_ptr(index) else {
            return 0;
        };
        // SAFETY: the element exists; a single load of an aligned field.
        unsafe { ptr::read_volatile(&raw const (*service.cast::<Service>()).affinity) }
    }

    #[inline(always)]
    fn service_head(&self, index: u32) -> Option<ServiceHead> {
        let service = SERVICES.get_ptr(index)?;
        // SAFETY: the element exists. Volatile and of 64 bits: the head is read at once.
        let head = unsafe { ptr::read_volatile(service.cast::<u64>()) };
        Some(bytemuck::cast(head))
    }

    #[inline(always)]
    fn backend_head(&self, id: u32) -> Option<BackendHead> {
        let backend = BACKENDS.get_ptr(id)?;
        // SAFETY: the element exists. Volatile and of 64 bits: the head is read at once.
        let head = unsafe { ptr::read_volatile(backend.cast::<u64>()) };
        Some(bytemuck::cast(head))
    }

    #[inline(always)]
    fn backend(&self, id: u32) -> Option<Backend> {
        let backend = BACKENDS.get_ptr(id)?;
        // SAFETY: the element exists; the head is read at once, and the rest does not change while a head of this
        // generation stands, except the interface, which is words of their own.
        unsafe {
            let head: BackendHead = bytemuck::cast(ptr::read_volatile(backend.cast::<u64>()));
            Some(Backend { head, ..*backend })
        }
    }

    #[inline(always)]
    fn maglev(&self, index: u32) -> Option<u64> {
        MAGLEV.get(index).copied()
    }

    #[inline(always)]
    fn ports(&self, index: u32) -> PortSet {
        PORTS.get(index).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn device(&self, ifindex: u32) -> Option<Device> {
        value(&DEVICES, &ifindex)
    }

    #[inline(always)]
    fn policy_revision(&self) -> u32 {
        // SAFETY: one aligned load; nobody makes a reference to it.
        unsafe { ptr::read_volatile(&raw const POLICY_REVISION) }
    }

    #[inline(always)]
    fn pod_range(&self, index: u32) -> Option<PodRange> {
        POD_RANGES.get(index).copied()
    }

    #[inline(always)]
    fn is_source_checked(&self, ifindex: u32) -> bool {
        value(&SOURCE_CHECKED, &ifindex).is_some()
    }

    #[inline(always)]
    fn pod_policy(&self, ifindex: u32) -> Option<PodPolicy> {
        value(&POD_POLICY, &ifindex)
    }

    #[inline(always)]
    fn judge(&self, set: u32, class: u32, proto: u8, port_be: u16) -> Judgement {
        policies::judge(set, class, proto, port_be)
    }

    #[inline(always)]
    fn may_tell(&self, ifindex: u32, allows: bool) -> Option<u32> {
        let most = config(|c| &c.verdicts_per_tick) >> u32::from(allows);
        if most == 0 {
            return None;
        }
        let now = self.now_ticks();
        let key = Aligned(ifindex);
        let Some(budget) = VERDICTS_TOLD.get_ptr_mut(key.in_place()) else {
            let first = Aligned(VerdictBudget {
                ticks: now,
                told: 1,
                ..VerdictBudget::default()
            });
            let _ = insert(&VERDICTS_TOLD, key.in_place(), first.in_place(), 0);
            return Some(0);
        };
        // SAFETY: an element that exists. CPUs that add to it at once may tell a few too many, or lose count of some.
        unsafe {
            if (*budget).ticks != now {
                (*budget).ticks = now;
                (*budget).told = 0;
            }
            if (*budget).told >= most {
                (*budget).untold += 1;
                return None;
            }
            (*budget).told += 1;
            let untold = (*budget).untold;
            (*budget).untold = 0;
            Some(untold)
        }
    }

    #[inline(always)]
    fn tell(&self, event: &mut VerdictEvent) {
        // SAFETY: a helper without arguments.
        event.at_ns = unsafe { bpf_ktime_get_ns() };
        // Full: nobody reads, or not fast enough.
        let _ = VERDICTS.output_untyped::<VerdictEvent>(&*event, 0);
    }

    #[inline(always)]
    fn count_verdict(&self, set: u32, judgement: Judgement, is_dry_run: bool) {
        let hits = match judgement.counted_at(set) {
            Counted::Rule(rule) => RULE_HITS.get_ptr_mut(rule),
            Counted::Set(set) => SET_HITS.get_ptr_mut(set),
        };
        if let Some(hits) = hits {
            // SAFETY: as in `count`.
            unsafe {
                if is_dry_run {
                    (*hits).dry_run += 1;
                } else {
                    (*hits).decided += 1;
                }
            }
        }
    }

    #[inline(always)]
    fn count(&self, reason: u32) {
        if let Some(counter) = COUNTERS.get_ptr_mut(reason) {
            // SAFETY: a per-CPU element, and programs do not migrate while they run.
            unsafe { *counter += 1 };
        }
    }

    #[inline(always)]
    fn count_flow(&self, event: FlowEvent) {
        if let Some(counter) = FLOW_EVENTS.get_ptr_mut(event as u32) {
            // SAFETY: as in `count`.
            unsafe { *counter += 1 };
        }
    }

    #[inline(always)]
    fn count_pod_drop(&self, ifindex: u32) {
        traffic::count_pod_drop(ifindex);
    }

    #[inline(always)]
    fn count_connection(&self, service: u32, backend: u32) {
        traffic::count_connection(service, backend);
    }

    #[inline(always)]
    fn count_refused(&self, service: u32, backend: u32) {
        traffic::count_refused(service, backend);
    }

    #[inline(always)]
    fn count_dropped(&self, service: u32, backend: u32) {
        traffic::count_dropped(service, backend);
    }

    #[inline(always)]
    fn is_sampled(&self) -> bool {
        let Some(scratch) = WORK_SCRATCH.get_ptr_mut(0) else {
            return false;
        };
        // SAFETY: as in `count`.
        unsafe {
            let until = (*scratch).until_sample;
            (*scratch).until_sample = until.wrapping_sub(1);
            until == 0
        }
    }

    #[inline(always)]
    fn count_sample(&self, service: u32, backend: u32, sample: Sample) {
        traffic::count_sample(service.into(), backend.into(), sample.to_raw());
    }

    #[inline(always)]
    fn take_refusal(&self) -> bool {
        let Some(scratch) = WORK_SCRATCH.get_ptr_mut(0) else {
            return false;
        };
        let now = self.now_ticks();
        // SAFETY: as in `count`.
        unsafe {
            let refusals = &raw mut (*scratch).refusals;
            if (*refusals).ticks != now {
                (*refusals).ticks = now;
                (*refusals).sent = 0;
            }
            (*refusals).sent += 1;
            (*refusals).sent <= config(|c| &c.refusals_per_tick)
        }
    }

    #[inline(always)]
    fn midstream_ticks(&self) -> u32 {
        MIDSTREAM.get(0).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn forget(&self, number: u32) -> u32 {
        // The verifier follows this way too, though an element of an array is always there.
        let Some(scratch) = WORK_SCRATCH.get_ptr_mut(0) else {
            return 0;
        };
        // SAFETY: a per-CPU element, all of whose fields are integers. Nobody needs the source of a query behind it. Volatile: the
        // number has to come from memory.
        unsafe {
            let query = &raw mut (*scratch).route;
            let word = &raw mut (*query.cast::<bpf_fib_lookup>()).__bindgen_anon_3.ipv4_src;
            ptr::write_volatile(word, number);
            ptr::read_volatile(word)
        }
    }

    #[inline(always)]
    fn set_midstream_ticks(&self, ticks: u32) {
        if let Some(cell) = MIDSTREAM.get_ptr_mut(0) {
            // SAFETY: an array element; one aligned store.
            unsafe { ptr::write_volatile(cell, ticks) };
        }
    }
}

const _: () = assert!(size_of::<bpf_fib_lookup>() == size_of::<RouteQuery>());

/// `AF_INET` and `AF_INET6`.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

impl<F: Family, C> Router<F> for World<C> {
    #[inline(always)]
    fn route(&self, ifindex: u32, src: &F::Addr, dst: &F::Addr, proto: u8, len: u16) -> Route {
        let Some(scratch) = WORK_SCRATCH.get_ptr_mut(0) else {
            return Route::None;
        };
        // SAFETY: a per-CPU element of the helper's size and alignment, all of whose fields are integers.
        let params = unsafe {
            let query = &raw mut (*scratch).route;
            *query = RouteQuery([0; 8]);
            &mut *query.cast::<bpf_fib_lookup>()
        };
        params.family = if F::VERSION == 4 { AF_INET } else { AF_INET6 };
        params.l4_protocol = proto;
        params.ifindex = ifindex;
        // Without a length, the helper would compare the whole frame with the MTU at TC hooks.
        params.__bindgen_anon_1.tot_len = len.max(1);
        if F::VERSION == 4 {
            params.__bindgen_anon_3.ipv4_src = F::words(src)[0];
            params.__bindgen_anon_4.ipv4_dst = F::words(dst)[0];
        } else {
            params.__bindgen_anon_3.ipv6_src = F::to_any(*src);
            params.__bindgen_anon_4.ipv6_dst = F::to_any(*dst);
        }
        // SAFETY: the context is valid while the program runs, and the size is that of the parameters.
        let result = unsafe { fib_lookup(self.ctx, params, size_of::<bpf_fib_lookup>() as i32, 0) };
        match result as u32 {
            BPF_FIB_LKUP_RET_SUCCESS => Route::Found {
                ifindex: params.ifindex,
                mac_dst: Mac(params.dmac),
                mac_src: Mac(params.smac),
            },
            BPF_FIB_LKUP_RET_NO_NEIGH => Route::NoNeighbour {
                ifindex: params.ifindex,
            },
            BPF_FIB_LKUP_RET_FRAG_NEEDED => Route::TooBig {
                mtu: if config(|c| &c.flags) & config_flags::FIB_MTU == 0 {
                    icmp::plateau::<F>(len)
                } else {
                    // SAFETY: a plain integer in either reading.
                    unsafe { params.__bindgen_anon_1.mtu_result }
                },
            },
            _ => Route::None,
        }
    }
}
