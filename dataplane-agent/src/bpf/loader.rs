//! Loads the object: its maps are those pinned already, if they fit; its programs are always new. Attaching them is
//! `attach`'s task.

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
};
use crate::config::Sizes;

/// Begins the names of maps that are renewed with the programs: read-only data, those of aya-log, scratch space.
const RENEWED_MAPS: [&str; 4] = [".rodata", "AYA_", "WORK_", "ROUTE"];

/// The name under which one of the object's maps is pinned: bpffs allows no dots.
fn pinned_as(name: &str) -> &str {
    match name {
        VARIABLES => names::POLICY_REVISION,
        name => name,
    }
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
    #[error("failed to read the BPF object")]
    Parse(#[source] Box<dyn std::error::Error + Send + Sync>),
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
    options: LoadOptions,
    programs: BTreeMap<Program, OwnedFd>,
}

impl Loaded {
    pub fn program(&self, program: Program) -> Option<BorrowedFd<'_>> {
        self.programs.get(&program).map(AsFd::as_fd)
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
        let mut object = make_maps(OBJECT, &self.pins, &self.options)?;
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
    load_object(OBJECT, pins, options)
}

fn load_object(object: &[u8], pins: Pins, options: &LoadOptions) -> Result<Loaded, LoadError> {
    check_object()?;
    kernel::check()?;
    pins.create()?;
    let mut object = make_maps(object, &pins, options)?;

    let is_wanted = |program: &Program| match program {
        Program::Xdp => options.xdp,
        program if program.is_late() => options.debug_log,
        program => options.socket_hooks || !program.is_cgroup(),
    };
    let programs = load_programs(&mut object, options.config.flags, is_wanted)?;
    let debug_log = options
        .debug_log
        .then(|| DebugLog::of(&mut object))
        .transpose()
        .map_err(LoadError::DebugLog)?;
    Ok(Loaded {
        pins,
        debug_log,
        options: options.clone(),
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
fn make_maps(object: &[u8], pins: &Pins, options: &LoadOptions) -> Result<aya::Ebpf, LoadError> {
    let shapes = wanted_shapes(object, &options.sizes)?;
    for (name, shape) in &shapes {
        maps::check_pinned(pins, pinned_as(name), shape)?;
    }

    let mut loader = EbpfLoader::new();
    loader.override_global(config::SYMBOL, bytemuck::bytes_of(&options.config), true);
    for (name, shape) in &shapes {
        loader.map_max_entries(name, shape.max_entries);
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

/// What each map that is kept between starts should look like.
fn wanted_shapes(object: &[u8], sizes: &Sizes) -> Result<BTreeMap<String, Shape>, LoadError> {
    let object = aya_obj::Object::parse(object).map_err(|error| LoadError::Parse(Box::new(error)))?;
    let sizes: BTreeMap<&str, u32> = maps::sizes_by_name(sizes).into_iter().collect();
    Ok(object
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
            (name.clone(), shape)
        })
        .collect())
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
