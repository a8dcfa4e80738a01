//! Loads the object: its maps are those pinned already, if they fit, or are filled with another version's entries (`upgrade`);
//! its programs are always new. Attaching them is `attach`'s task.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    panic::resume_unwind,
    thread,
};

use aya::{
    EbpfLoader,
    programs::{Program as AyaProgram, ProgramError},
};
use dataplane_common::{
    config::{self, Config, config_flags},
    policy::VARIABLES,
};

use super::{
    OBJECT, Program,
    debug_log::{self, DebugLog},
    kernel, map_names as names,
    maps::{self, Shape},
    pins::{PinError, Pins},
    sys,
    upgrade::{Step, Upgrade, UpgradeError, Wanted, pinned_layouts},
};
use crate::config::Sizes;

/// Begins the names of maps that are renewed with the programs: read-only data, those of aya-log, scratch space.
const RENEWED_MAPS: [&str; 3] = [".rodata", "AYA_", "WORK_"];

/// The name under which one of the object's maps is pinned: bpffs allows no dots.
pub(super) fn pinned_as(name: &str) -> &str {
    match name {
        VARIABLES => names::POLICY_REVISION,
        name => name,
    }
}

/// What is loaded.
#[derive(Clone, Copy, Debug)]
pub struct Release {
    pub object: &'static [u8],
    /// Is told how far a start has come.
    pub at: fn(Step),
}

impl Release {
    /// This agent's.
    pub const CURRENT: Self = Self {
        object: OBJECT,
        at: |_| {},
    };
}

/// How to load.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    pub sizes: Sizes,
    pub config: Config,
    /// Load the XDP program.
    pub xdp: bool,
    /// Load the socket hooks.
    pub socket_hooks: bool,
    /// Programs write debug lines. They have no instruction for it otherwise: the verifier takes those out.
    pub debug_log: bool,
}

/// The object was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("built without the BPF object: run `cargo xtask build-ebpf`, then build the agent again")]
    NoObject,
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Map(#[from] maps::MapError),
    #[error(transparent)]
    Upgrade(#[from] UpgradeError),
    #[error("the BPF object has no type information")]
    NoBtf,
    #[error("failed to read the BPF object")]
    Parse(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("failed to read the variables of the programs that are attached")]
    Variables(#[source] io::Error),
    #[error("failed to make the BPF maps")]
    Maps(#[source] Box<aya::EbpfError>),
    #[error("the BPF object has no program {0}")]
    MissingProgram(&'static str),
    #[error("failed to load BPF program {program}{}", does_without(program))]
    Program {
        program: &'static str,
        #[source]
        source: Box<ProgramError>,
    },
    #[error(
        "the kernel refused BPF program {program}{}; the end of what it says:\n{log}",
        does_without(program)
    )]
    Refused {
        program: &'static str,
        log: String,
        #[source]
        source: io::Error,
    },
    #[error("failed to open the ring buffer of debug lines")]
    DebugLog(#[source] aya_log::Error),
    #[error("failed to keep a descriptor of BPF program {program}")]
    Descriptor {
        program: &'static str,
        #[source]
        source: io::Error,
    },
}

/// The way out of a kernel that does not take a program.
fn does_without(symbol: &str) -> &'static str {
    match Program::by_symbol(symbol) {
        Some(Program::Xdp) => " (--datapath tc does without it)",
        Some(program) if program.is_cgroup() => " (--socket-lb off does without it)",
        _ => "",
    }
}

/// Loaded programs, and the folder their maps are pinned in.
#[derive(Debug)]
pub struct Loaded {
    pub pins: Pins,
    /// The debug lines, if they were asked for.
    pub debug_log: Option<DebugLog>,
    release: Release,
    options: LoadOptions,
    upgrade: Upgrade,
    programs: BTreeMap<Program, OwnedFd>,
}

impl Loaded {
    pub fn program(&self, program: Program) -> Option<BorrowedFd<'_>> {
        self.programs.get(&program).map(AsFd::as_fd)
    }

    /// Moves other versions' links here, with the programs that they have.
    pub fn move_links(&mut self) -> Result<(), LoadError> {
        self.upgrade.move_links()?;
        (self.release.at)(Step::Moved);
        Ok(())
    }

    /// No link has another version's program any more: what these have left goes.
    pub fn finish(&mut self) -> Result<(), LoadError> {
        (self.release.at)(Step::Replaced);
        self.upgrade.finish()?;
        (self.release.at)(Step::Finished);
        Ok(())
    }

    /// Loads those programs that are left out at first, unless they are there. With debug lines none is left out: what
    /// is loaded now has a ring buffer that nobody reads.
    pub fn load_late(&mut self) -> Result<(), LoadError> {
        if Program::ALL
            .iter()
            .all(|program| !program.is_late() || self.programs.contains_key(program))
        {
            return Ok(());
        }
        let wanted = wanted(self.release.object, &self.options.sizes)?;
        let mut object = make_maps(self.release.object, &self.pins, &wanted, &self.options)?;
        self.programs.extend(load_programs(
            &mut object,
            self.options.config.flags,
            |program| program.is_late(),
        )?);
        Ok(())
    }
}

/// Fails when the agent was built without the object.
pub fn check_object() -> Result<(), LoadError> {
    if OBJECT.is_empty() {
        Err(LoadError::NoObject)
    } else {
        Ok(())
    }
}

/// Loads the embedded object.
pub fn load(pins: Pins, options: &LoadOptions) -> Result<Loaded, LoadError> {
    let loaded = load_release(Release::CURRENT, pins, options)?;
    sys::forget_read(OBJECT);
    Ok(loaded)
}

/// Loads an object, that of another version in tests.
pub fn load_release(release: Release, pins: Pins, options: &LoadOptions) -> Result<Loaded, LoadError> {
    check_object()?;
    kernel::check()?;
    pins.check_bpffs()?;
    let wanted = wanted(release.object, &options.sizes)?;
    let mut upgrade = Upgrade::begin(&pins, wanted.pinned(), &wanted.btf)?;
    (release.at)(Step::Begun);
    let mut object = make_maps(release.object, &upgrade.folder(), &wanted, options)?;
    upgrade.fill()?;
    (release.at)(Step::Filled);

    let is_wanted = |program: &Program| match program {
        Program::Xdp => options.xdp,
        program if program.is_late() => options.debug_log,
        program => options.socket_hooks || !program.is_cgroup(),
    };
    let programs = load_programs(&mut object, options.config.flags, is_wanted)?;
    (release.at)(Step::Loaded);
    upgrade.commit()?;
    (release.at)(Step::Committed);
    let debug_log = options
        .debug_log
        .then(|| DebugLog::of(&mut object))
        .transpose()
        .map_err(LoadError::DebugLog)?;
    Ok(Loaded {
        pins,
        debug_log,
        release,
        options: options.clone(),
        upgrade,
        programs,
    })
}

/// What the verifier says of each program, in words where it refuses one. Maps of the sizes that the object names, and
/// programs: all of them are gone when this returns, and nothing is pinned.
pub fn rehearse(options: &LoadOptions) -> Result<BTreeMap<Program, Result<(), String>>, LoadError> {
    check_object()?;
    kernel::check()?;
    let mut loader = EbpfLoader::new();
    loader.override_global(config::SYMBOL, bytemuck::bytes_of(&options.config), true);
    let level = debug_log::level(options.debug_log);
    loader.override_global(aya_log::LEVEL, &level, true);
    let mut object = loader
        .load(OBJECT)
        .map_err(|error| LoadError::Maps(Box::new(error)))?;
    Ok(thread::scope(|scope| {
        let loads: Vec<_> = object
            .programs_mut()
            .filter_map(|(name, loaded)| Some((program_of(name, options.config.flags)?, loaded)))
            .map(|(program, loaded)| {
                (
                    program,
                    scope.spawn(move || load_program(program, loaded).map(drop)),
                )
            })
            .collect();
        let outcome = |load: thread::ScopedJoinHandle<'_, Result<(), LoadError>>| {
            let result = load.join().unwrap_or_else(|panic| resume_unwind(panic));
            result.map_err(|error| format!("{:#}", anyhow::Error::from(error)))
        };
        loads
            .into_iter()
            .map(|(program, load)| (program, outcome(load)))
            .collect()
    }))
}

/// The object with its maps, those that are pinned already among them.
fn make_maps(
    object: &[u8],
    pins: &Pins,
    wanted: &WantedMaps,
    options: &LoadOptions,
) -> Result<aya::Ebpf, LoadError> {
    // Loading writes the object's variables, also those of a map that is in use.
    let revision = pins
        .find_map(names::POLICY_REVISION)
        .and_then(|map| map.map_or(Ok(None), |map| sys::RawMap::new(map, 1)?.first()))
        .map_err(LoadError::Variables)?;
    let mut loader = EbpfLoader::new();
    loader.override_global(config::SYMBOL, bytemuck::bytes_of(&options.config), true);
    if let Some(revision) = &revision {
        loader.override_global(names::POLICY_REVISION, revision.as_slice(), true);
    }
    for (name, map) in &wanted.maps {
        loader.map_max_entries(name, map.shape.max_entries);
        loader.map_pin_path(name, pins.map(pinned_as(name)));
    }
    let level = debug_log::level(options.debug_log);
    loader.override_global(aya_log::LEVEL, &level, true);
    if options.debug_log {
        loader.map_max_entries(debug_log::MAP, debug_log::BYTES);
    }
    loader
        .load(object)
        .map_err(|error| LoadError::Maps(Box::new(error)))
}

/// What the maps that are kept between starts should look like, by their names in the object, and its BTF.
struct WantedMaps {
    maps: BTreeMap<String, Wanted>,
    btf: Vec<u8>,
}

impl WantedMaps {
    /// By the names under which they are pinned.
    fn pinned(&self) -> BTreeMap<String, Wanted> {
        let maps = self.maps.iter();
        maps.map(|(name, map)| (pinned_as(name).to_owned(), map.clone()))
            .collect()
    }
}

fn wanted(object: &[u8], sizes: &Sizes) -> Result<WantedMaps, LoadError> {
    let object = aya_obj::Object::parse(object).map_err(|error| LoadError::Parse(Box::new(error)))?;
    let btf = object.btf.as_ref().ok_or(LoadError::NoBtf)?.to_bytes();
    let layouts = pinned_layouts(&btf).map_err(UpgradeError::from)?;
    let sizes: BTreeMap<&str, u32> = maps::sizes_by_name(sizes).into_iter().collect();
    let maps = object
        .maps
        .iter()
        .filter(|(name, _)| !RENEWED_MAPS.iter().any(|prefix| name.starts_with(prefix)))
        .map(|(name, map)| {
            let shape = Shape {
                map_type: map.map_type(),
                key_size: map.key_size(),
                value_size: map.value_size(),
                max_entries: sizes
                    .get(name.as_str())
                    .copied()
                    .unwrap_or_else(|| map.max_entries()),
                flags: map.map_flags(),
            };
            let layout = layouts.0.get(pinned_as(name)).cloned();
            (name.clone(), Wanted { shape, layout })
        })
        .collect();
    Ok(WantedMaps { maps, btf })
}

/// The program that a symbol of the object is, on a kernel with these [`config_flags`].
fn program_of(symbol: &str, flags: u32) -> Option<Program> {
    let has_frags = flags & config_flags::XDP_FRAGS != 0;
    match symbol {
        "xdp_frags" => has_frags.then_some(Program::Xdp),
        "xdp_linear" => (!has_frags).then_some(Program::Xdp),
        _ => Program::by_symbol(symbol),
    }
}

/// Loads programs side by side: what the verifier takes for them is nearly all the time that a start takes.
fn load_programs(
    object: &mut aya::Ebpf,
    flags: u32,
    is_wanted: impl Fn(&Program) -> bool,
) -> Result<BTreeMap<Program, OwnedFd>, LoadError> {
    let found: BTreeMap<Program, &mut AyaProgram> = object
        .programs_mut()
        .filter_map(|(name, loaded)| Some((program_of(name, flags)?, loaded)))
        .filter(|(program, _)| is_wanted(program))
        .collect();
    let missing = |program: &&Program| is_wanted(program) && !found.contains_key(program);
    if let Some(program) = Program::ALL.iter().find(missing) {
        return Err(LoadError::MissingProgram(program.symbol()));
    }
    thread::scope(|scope| {
        let loads: Vec<_> = found
            .into_iter()
            .map(|(program, loaded)| scope.spawn(move || Ok((program, load_program(program, loaded)?))))
            .collect();
        loads
            .into_iter()
            .map(|load| load.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    })
}

fn load_program(program: Program, loaded: &mut AyaProgram) -> Result<OwnedFd, LoadError> {
    let symbol = program.symbol();
    let fd = match loaded {
        AyaProgram::Xdp(xdp) => xdp.load().and_then(|()| xdp.fd()),
        AyaProgram::SchedClassifier(classifier) => classifier.load().and_then(|()| classifier.fd()),
        AyaProgram::CgroupSockAddr(hook) => hook.load().and_then(|()| hook.fd()),
        _ => return Err(LoadError::MissingProgram(symbol)),
    }
    .map_err(|error| program_error(symbol, error))?;
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(|source| LoadError::Descriptor {
            program: symbol,
            source,
        })
}

fn program_error(program: &'static str, error: ProgramError) -> LoadError {
    const LINES: usize = 12;
    match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            let log = verifier_log.to_string();
            tracing::debug!(program, "{log}");
            let lines: Vec<&str> = log.lines().collect();
            let log = lines[lines.len().saturating_sub(LINES)..].join("\n");
            LoadError::Refused {
                program,
                log,
                source: io_error,
            }
        }
        error => LoadError::Program {
            program,
            source: Box::new(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;

    #[test]
    fn every_table_says_what_it_is_for() {
        if OBJECT.is_empty() {
            println!("there is no object");
            return;
        }
        let run = ["dataplane-agent", "run", "--node-name", "a", "--manifests", "/m"];
        let sizes = Cli::config_of(run).unwrap().sizes;
        for name in wanted(OBJECT, &sizes).unwrap().pinned().keys() {
            assert!(super::super::purposes::purpose(name).is_some(), "{name}");
        }
    }

    #[test]
    fn a_layout_that_changes_gets_a_number() {
        use dataplane_tests::assets::{RELEASED, object};
        if OBJECT.is_empty() || RELEASED.1 != super::super::pins::SCHEMA_VERSION {
            println!("nothing of this layout has been released, or there is no object");
            return;
        }
        let run = ["dataplane-agent", "run", "--node-name", "a", "--manifests", "/m"];
        let sizes = Cli::config_of(run).unwrap().sizes;
        let maps = |object| wanted(object, &sizes).unwrap().maps;
        let (now, then) = (maps(OBJECT), maps(object(RELEASED.0).unwrap()));
        for (name, now) in &now {
            let then = then.get(name);
            assert!(
                then.is_some_and(|then| then.shape == now.shape && then.layout == now.layout),
                "{name} is not what was released as layout {}: raise SCHEMA_VERSION (CONTRIBUTING.md)",
                RELEASED.1
            );
        }
        assert_eq!(now.len(), then.len());
    }
}
