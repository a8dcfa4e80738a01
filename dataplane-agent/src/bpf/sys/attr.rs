//! Layouts of `linux/bpf.h`: the attribute block of each command, and what the kernel tells of its objects.

use bytemuck::{Pod, Zeroable};

/// The first fields of `BPF_MAP_CREATE`'s.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct MapCreateAttr {
    pub map_type: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub map_flags: u32,
    pub inner_map_fd: u32,
}

/// Attribute of a command on one map element.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ElementAttr {
    pub map_fd: u32,
    pub pad: u32,
    pub key: u64,
    pub value: u64,
    pub flags: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct BatchAttr {
    pub in_batch: u64,
    pub out_batch: u64,
    pub keys: u64,
    pub values: u64,
    pub count: u32,
    pub map_fd: u32,
    pub elem_flags: u64,
    pub flags: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ObjAttr {
    pub path: u64,
    pub fd: u32,
    pub flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct InfoAttr {
    pub fd: u32,
    pub len: u32,
    pub info: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct IdAttr {
    pub id: u32,
    pub next_id: u32,
    pub open_flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct LinkCreateAttr {
    pub prog_fd: u32,
    pub target: u32,
    pub attach_type: u32,
    pub flags: u32,
    pub relative_fd: u32,
    pub pad: u32,
    pub expected_revision: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct LinkUpdateAttr {
    pub link_fd: u32,
    pub new_prog_fd: u32,
    pub flags: u32,
    pub old_prog_fd: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct QueryAttr {
    pub target: u32,
    pub attach_type: u32,
    pub query_flags: u32,
    pub attach_flags: u32,
    pub prog_ids: u64,
    pub count: u32,
    pub pad: u32,
    pub prog_attach_flags: u64,
    pub link_ids: u64,
    pub link_attach_flags: u64,
    pub revision: u64,
}

/// What the kernel says of a map (the first fields of `struct bpf_map_info`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct MapInfo {
    pub map_type: u32,
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub map_flags: u32,
    name: [u8; 16],
    ifindex: u32,
    btf_vmlinux_value_type_id: u32,
    netns_dev: u64,
    netns_ino: u64,
    /// Of the BTF that the map was made with; 0: none.
    pub btf_id: u32,
    btf_key_type_id: u32,
    btf_value_type_id: u32,
    btf_vmlinux_id: u32,
}

impl MapInfo {
    pub fn name(&self) -> String {
        text(&self.name)
    }
}

/// Up to the first zero.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}

/// Numbers of `enum bpf_map_type` in `linux/bpf.h`.
pub mod map_type {
    pub const HASH: u32 = 1;
    pub const ARRAY: u32 = 2;
    pub const PER_CPU_HASH: u32 = 5;
    pub const PER_CPU_ARRAY: u32 = 6;
    pub const LRU_HASH: u32 = 9;
    pub const LRU_PER_CPU_HASH: u32 = 10;
    /// Has no batches before 5.14.
    pub const LPM_TRIE: u32 = 11;
    pub const RING_BUFFER: u32 = 27;

    /// As bpftool calls it.
    #[must_use]
    pub fn name(map_type: u32) -> &'static str {
        match map_type {
            HASH => "hash",
            ARRAY => "array",
            PER_CPU_HASH => "percpu_hash",
            PER_CPU_ARRAY => "percpu_array",
            LRU_HASH => "lru_hash",
            LRU_PER_CPU_HASH => "lru_percpu_hash",
            LPM_TRIE => "lpm_trie",
            RING_BUFFER => "ringbuf",
            _ => "other",
        }
    }
}

/// What the kernel says of a BTF object (the first fields of `struct bpf_btf_info`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct BtfInfo {
    /// Where it is to be copied to.
    pub btf: u64,
    pub btf_size: u32,
    pub id: u32,
}

/// What the kernel says of a program (the first fields of `struct bpf_prog_info`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct ProgInfo {
    pub prog_type: u32,
    pub id: u32,
    pub tag: [u8; 8],
    jited_prog_len: u32,
    xlated_prog_len: u32,
    jited_prog_insns: u64,
    xlated_prog_insns: u64,
    load_time: u64,
    created_by_uid: u32,
    pub(super) nr_map_ids: u32,
    /// Where they are to be copied to.
    map_ids: u64,
    name: [u8; 16],
    ifindex: u32,
    bits: u32,
    netns_dev: u64,
    netns_ino: u64,
    nr_jited_ksyms: u32,
    nr_jited_func_lens: u32,
    jited_ksyms: u64,
    jited_func_lens: u64,
    /// Of the BTF that the program was loaded with; 0: none.
    pub btf_id: u32,
    func_info_rec_size: u32,
}

impl ProgInfo {
    /// What is asked with, for so many ids of maps at an address.
    pub(super) fn for_map_ids(nr_map_ids: u32, map_ids: u64) -> Self {
        Self {
            nr_map_ids,
            map_ids,
            ..Self::default()
        }
    }

    pub fn name(&self) -> String {
        text(&self.name)
    }
}

/// What the kernel says of a link (`struct bpf_link_info`): type, ids, then two words that depend on the type.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct LinkInfo {
    pub link_type: u32,
    pub id: u32,
    pub prog_id: u32,
    pad: u32,
    /// XDP and TCX: ifindex, 0 once the device is gone.
    pub word0: u32,
    /// TCX: attach type.
    pub word1: u32,
    word2: u32,
    word3: u32,
}
