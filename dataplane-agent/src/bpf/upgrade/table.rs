//! One table of another version, and the same of this one: its entries are carried over, once and again.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    io,
    os::fd::{AsFd, OwnedFd},
};

use super::{
    btf::Layout,
    convert::{Misfit, Part, Plan},
};
use crate::bpf::sys::{self, RawMap, map_type};

/// When a table is carried over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// No program uses the new table: it becomes what the old one is.
    Before,
    /// Programs use it: what they have entered stays.
    After,
}

/// Why a table starts empty.
#[derive(Debug, thiserror::Error)]
pub enum Why {
    #[error("its layout is not known")]
    Unknown,
    #[error(transparent)]
    Misfit(#[from] Misfit),
    #[error("it has become another type of map")]
    MapType,
    #[error("its prefixes have another layout")]
    Prefix,
}

/// A table of two layouts.
#[derive(Debug)]
pub struct Table {
    pub name: String,
    old: RawMap,
    new: RawMap,
    key: Plan,
    value: Plan,
    hasher: RandomState,
    /// What has been carried over: the hash of its values, and in which pass it was last seen, by the old key.
    carried: HashMap<Box<[u8]>, (u64, u32)>,
    pass: u32,
    left_out: u64,
}

impl Table {
    /// `None` if there is nothing to do: both are one map, or it has no entries.
    pub fn new(
        name: &str,
        (old, new): (OwnedFd, OwnedFd),
        layouts: Option<(&Layout, &Layout)>,
        cpus: usize,
    ) -> io::Result<Result<Option<Self>, Why>> {
        let (old_info, new_info) = (sys::map_info(old.as_fd())?, sys::map_info(new.as_fd())?);
        if old_info.id == new_info.id || new_info.map_type == map_type::RING_BUFFER {
            return Ok(Ok(None));
        }
        if old_info.map_type != new_info.map_type {
            return Ok(Err(Why::MapType));
        }
        let plans = match plans(layouts, new_info.map_type == map_type::LPM_TRIE) {
            Ok(plans) => plans,
            Err(why) => return Ok(Err(why)),
        };
        Ok(Ok(Some(Self {
            name: name.to_owned(),
            old: RawMap::new(old, cpus)?,
            new: RawMap::new(new, cpus)?,
            key: plans.0,
            value: plans.1,
            hasher: RandomState::new(),
            carried: HashMap::new(),
            pass: 0,
            left_out: 0,
        })))
    }

    /// Whether packets make its entries. What else packets write, counters and the time of a last event, is not worth a second
    /// look.
    pub fn is_for_packets(&self) -> bool {
        self.old.info().map_type == map_type::LRU_HASH
    }

    /// Carries over what is new or has changed since the last pass.
    pub fn carry(&mut self, pass: Pass) -> io::Result<()> {
        self.pass += 1;
        let is_array = matches!(
            self.old.info().map_type,
            map_type::ARRAY | map_type::PER_CPU_ARRAY
        );
        let mut found = Vec::new();
        let (carried, hasher, number) = (&mut self.carried, &self.hasher, self.pass);
        self.old.for_each(|key, values| {
            // An element that nobody has written.
            if is_array && values.iter().all(|&byte| byte == 0) {
                return;
            }
            let hash = hasher.hash_one(values);
            match carried.get_mut(key) {
                Some((known, seen)) if *known == hash || pass == Pass::After => *seen = number,
                _ => {
                    carried.insert(key.into(), (hash, number));
                    found.push((Box::<[u8]>::from(key), Box::<[u8]>::from(values)));
                }
            }
        })?;
        for (key, values) in found {
            let Some((key, values)) = self.convert(&key, &values) else {
                self.left_out += 1;
                continue;
            };
            // What programs enter at the same moment is newer.
            let only_new = pass == Pass::After && !is_array;
            if let Err(error) = self.new.put(&key, &values, only_new) {
                match error.raw_os_error() {
                    // Full, or an index behind the end.
                    Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM) => self.left_out += 1,
                    _ => return Err(error),
                }
            }
        }
        if pass == Pass::Before && !is_array {
            let gone: Vec<Box<[u8]>> = self
                .carried
                .extract_if(|_, (_, seen)| *seen != number)
                .map(|(key, _)| key)
                .collect();
            for key in gone {
                if let Some(key) = self.key.convert(&key) {
                    self.new.delete(&key)?;
                }
            }
        }
        if self.left_out > 0 {
            tracing::warn!(
                "table {}: {} entries have no place in the new layout",
                self.name,
                self.left_out
            );
            self.left_out = 0;
        }
        tracing::debug!(table = self.name, entries = self.carried.len(), "carried over");
        Ok(())
    }

    /// A key and the values of all CPUs.
    fn convert(&self, key: &[u8], values: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        let (count, old_stride) = self.old.values();
        let (_, stride) = self.new.values();
        let mut converted = vec![0; count * stride];
        for (old, new) in values
            .chunks_exact(old_stride)
            .zip(converted.chunks_exact_mut(stride))
        {
            let value = self.value.convert(old)?;
            new.get_mut(..value.len())?.copy_from_slice(&value);
        }
        Some((self.key.convert(key)?, converted))
    }
}

fn plans(layouts: Option<(&Layout, &Layout)>, is_trie: bool) -> Result<(Plan, Plan), Why> {
    let (old, new) = layouts.ok_or(Why::Unknown)?;
    let (Some(old_key), Some(new_key)) = (&old.key, &new.key) else {
        return Err(Why::Unknown);
    };
    let (Some(old_value), Some(new_value)) = (&old.value, &new.value) else {
        return Err(Why::Unknown);
    };
    if is_trie && old_key != new_key {
        return Err(Why::Prefix);
    }
    Ok((
        Plan::new(old_key, new_key, Part::Key)?,
        Plan::new(old_value, new_value, Part::Value)?,
    ))
}
