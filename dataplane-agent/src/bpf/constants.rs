//! The constants of the programs that are attached, asked of the kernel: for commands, which no agent tells them. Needs
//! `CAP_SYS_ADMIN`.

use std::{io, os::fd::AsFd};

use dataplane_common::config::{self, Config};

use super::{
    OBJECT,
    sys::{self, RawMap},
    upgrade::{BtfError, Type, variable},
};

/// The section of the object, and the map, in which they are.
const SECTION: &str = ".rodata";

/// Constants that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum ConstantsError {
    #[error("no program of ours is attached")]
    NoProgram,
    #[error(
        "missing capability CAP_SYS_ADMIN, without which only an agent knows the constants of the programs that are attached"
    )]
    Capability,
    #[error("failed to ask the kernel for the constants of program {id}")]
    Kernel {
        id: u32,
        #[source]
        source: io::Error,
    },
    #[error("failed to read the type information of the programs")]
    Btf(#[from] BtfError),
    #[error(
        "program {0} is another version's, with other constants than this one knows: ask with the version that has attached it"
    )]
    Other(u32),
    #[error("built without the BPF object: run `cargo xtask build-ebpf`, then build the agent again")]
    NoObject,
}

/// The constants of the first of these programs that is there. All programs of an agent have the same.
pub fn of_programs(ids: impl IntoIterator<Item = u32>) -> Result<Config, ConstantsError> {
    let mut outcome = Err(ConstantsError::NoProgram);
    for id in ids {
        match of_program(id) {
            // It was replaced this very moment.
            Err(ConstantsError::Kernel { id, source }) if source.kind() == io::ErrorKind::NotFound => {
                outcome = Err(ConstantsError::Kernel { id, source });
            }
            Err(ConstantsError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => {
                return Err(ConstantsError::Capability);
            }
            other => return other,
        }
    }
    outcome
}

fn of_program(id: u32) -> Result<Config, ConstantsError> {
    let (btf, bytes) = read(id).map_err(|source| ConstantsError::Kernel { id, source })?;
    let found = variable(&btf, SECTION, config::SYMBOL)?;
    let (at, of) = found.ok_or(ConstantsError::Other(id))?;
    if of != own_type()? {
        return Err(ConstantsError::Other(id));
    }
    let bytes = bytes.get(at..).and_then(|rest| rest.get(..size_of::<Config>()));
    let bytes = bytes.ok_or(ConstantsError::Other(id))?;
    Ok(bytemuck::pod_read_unaligned(bytes))
}

/// A program's BTF, and its read-only data.
fn read(id: u32) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let program = sys::prog_by_id(id)?;
    let btf = sys::btf_by_id(sys::prog_info(program.as_fd())?.btf_id)?;
    for map in sys::prog_map_ids(program.as_fd())? {
        let map = sys::map_by_id(map)?;
        if sys::map_info(map.as_fd())?.name() == SECTION {
            let data = RawMap::new(map, 1)?.first()?;
            return Ok((btf, data.unwrap_or_default()));
        }
    }
    Err(io::Error::from(io::ErrorKind::NotFound))
}

/// What this version's constants are made of.
fn own_type() -> Result<Type, ConstantsError> {
    if OBJECT.is_empty() {
        return Err(ConstantsError::NoObject);
    }
    let object = aya_obj::Object::parse(OBJECT).ok();
    let btf = object.and_then(|object| Some(object.btf?.to_bytes()));
    let of = variable(&btf.ok_or(ConstantsError::NoObject)?, SECTION, config::SYMBOL)?;
    of.map(|(_, of)| of).ok_or(ConstantsError::NoObject)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_of_nobody_are_an_error() {
        assert!(matches!(of_programs([]), Err(ConstantsError::NoProgram)));
        assert!(OBJECT.is_empty() || own_type().unwrap().size() as usize == size_of::<Config>());
    }
}
