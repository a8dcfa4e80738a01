//! Takes over what another version of the agent has left in the BPF filesystem: maps as they are where their layouts are equal,
//! their entries field by field where not, and links.
//!
//! # Order
//! 1. A folder is made under a name of its own (`…-new`), with the maps that can be taken over as they are. The loader makes
//!    the others in it, and [`Upgrade::fill`] fills them. Programs are loaded.
//! 2. [`Upgrade::commit`] gives the folder its name. This is the one step that counts: before it, the other version's
//!    folder is all there is, and whoever starts next begins anew. After it, both folders are complete.
//! 3. [`Upgrade::move_links`]: entries that packets have made or changed meanwhile are carried over, and pinned links change
//!    folders, each in one step. Their programs are then replaced in place.
//! 4. [`Upgrade::finish`]: what the last packets of the old programs have entered is carried over, and the other folder goes.
//!
//! Tables of other sizes are those of another version: their folder gets another name before all this.
//!
//! An agent of either version that finds both folders goes on from there: its own maps are complete, for the agent
//! writes none before the other folder is gone, and packets' entries are carried over from the other one's.

mod btf;
mod convert;
mod table;

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    os::fd::AsFd,
};

use anyhow::Context;

use super::{
    counters,
    loader::pinned_as,
    maps::{self, Shape},
    pins::{PinError, Pins},
    sys,
};
pub use btf::{BtfError, Layout, Layouts, Type, variable};
use table::{Pass, Table};

/// The pinned map that holds the BTF of the others, so that another version can read them.
pub const LAYOUTS: &str = "LAYOUTS";

/// How far a start has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The new folder has those maps that are taken over as they are.
    Begun,
    /// All maps are there, with their entries.
    Filled,
    /// The programs are loaded.
    Loaded,
    /// The new folder has its name.
    Committed,
    /// The links are in the new folder, with the programs that they had.
    Moved,
    /// The links have the new programs.
    Replaced,
    /// The other folder is gone.
    Finished,
}

impl Step {
    pub const ALL: [Step; 7] = [
        Step::Begun,
        Step::Filled,
        Step::Loaded,
        Step::Committed,
        Step::Moved,
        Step::Replaced,
        Step::Finished,
    ];
}

/// Another version's tables can't be taken over.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Map(#[from] maps::MapError),
    #[error("failed to carry table {name} over from {from}")]
    Table {
        name: String,
        from: String,
        #[source]
        source: io::Error,
    },
    #[error("failed to keep the layouts of the tables")]
    Layouts(#[source] io::Error),
    #[error("failed to read the type information of the BPF object")]
    Btf(#[from] BtfError),
    #[error("failed to read how many CPUs there can be")]
    Cpus(#[source] io::Error),
}

impl UpgradeError {
    fn table(name: &str, from: &Pins, source: io::Error) -> Self {
        Self::Table {
            name: name.to_owned(),
            from: from.folder().to_owned(),
            source,
        }
    }
}

/// A pinned map as it is wanted.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub shape: Shape,
    pub layout: Option<Layout>,
}

/// What a start finds, and makes of it.
#[derive(Debug)]
pub struct Upgrade {
    pins: Pins,
    /// Whether the folder is still to get its name.
    is_unfinished: bool,
    /// The name that a folder with tables of other sizes has got.
    former: Option<Pins>,
    others: Vec<Other>,
    wanted: BTreeMap<String, Wanted>,
    cpus: usize,
}

#[derive(Debug)]
struct Other {
    pins: Pins,
    layouts: Layouts,
    /// Tables that are carried over, once both are there.
    tables: Vec<Table>,
    /// How, until there are new programs.
    pass: Pass,
}

impl Drop for Upgrade {
    fn drop(&mut self) {
        // What panics leaves all as it is, as who is killed does.
        if self.is_unfinished && !std::thread::panicking() {
            // Whoever starts next does it otherwise.
            let _removed = self.pins.unfinished().remove();
            if let Some(former) = &self.former {
                // By the other name it is found too.
                let _renamed = self.pins.take_name_of(former);
            }
        }
    }
}

impl Upgrade {
    /// Looks for other versions, and makes the folder. `wanted`: by the names under which maps are pinned. `btf`: of the
    /// object.
    pub fn begin(pins: &Pins, wanted: BTreeMap<String, Wanted>, btf: &[u8]) -> Result<Self, UpgradeError> {
        for left in Pins::all(pins.bpffs())? {
            if !left.is_complete() {
                left.remove()?;
            }
        }
        let former = if is_resized(pins, &wanted)? {
            Some(pins.give_way()?)
        } else {
            None
        };
        let others = pins.others()?.into_iter().map(Other::read).collect();
        let mut upgrade = Self {
            pins: pins.clone(),
            is_unfinished: former.is_some(),
            former,
            others,
            wanted,
            cpus: counters::possible_cpus().map_err(UpgradeError::Cpus)?,
        };
        if !upgrade.others.is_empty() && !pins.exists() {
            upgrade.is_unfinished = true;
        }
        let folder = upgrade.folder();
        folder.create()?;
        if upgrade.is_unfinished {
            upgrade.take_equal(&folder)?;
        }
        upgrade.check(&folder)?;
        if folder.open_map(LAYOUTS).is_err() {
            sys::map_of_bytes(btf)
                .and_then(|map| sys::pin(map.as_fd(), &folder.map(LAYOUTS)))
                .map_err(UpgradeError::Layouts)?;
        }
        Ok(upgrade)
    }

    /// Where maps are until [`Self::commit`].
    pub fn folder(&self) -> Pins {
        if self.is_unfinished {
            self.pins.unfinished()
        } else {
            self.pins.clone()
        }
    }

    /// Pins those maps of the first other version that are as they are wanted. All complete folders hold the same but for what
    /// packets have entered.
    fn take_equal(&self, folder: &Pins) -> Result<(), UpgradeError> {
        let Some(other) = self.others.first() else {
            return Ok(());
        };
        for (name, wanted) in &self.wanted {
            let error = |source| UpgradeError::table(name, &other.pins, source);
            let Some(map) = other.pins.find_map(name).map_err(error)? else {
                continue;
            };
            let shape = Shape::of(&sys::map_info(map.as_fd()).map_err(error)?);
            if shape == wanted.shape && other.has_layout(name, wanted) {
                sys::pin(map.as_fd(), &folder.map(name)).map_err(error)?;
            }
        }
        Ok(())
    }

    /// Compares the maps that are there already with those that are wanted.
    fn check(&self, folder: &Pins) -> Result<(), UpgradeError> {
        // What has just been taken over has been compared.
        let own = if self.is_unfinished {
            Layouts::default()
        } else {
            Other::read(folder.clone()).layouts
        };
        for (name, wanted) in &self.wanted {
            maps::check_pinned(folder, name, &wanted.shape)?;
            let found = own.0.get(name);
            if let (Some(found), Some(wanted)) = (found, &wanted.layout)
                && found != wanted
            {
                return Err(maps::MapError::OtherLayout(name.clone()).into());
            }
        }
        Ok(())
    }

    /// Carries over the entries of all maps that the loader has made anew.
    pub fn fill(&mut self) -> Result<(), UpgradeError> {
        let folder = self.folder();
        for (place, other) in self.others.iter_mut().enumerate() {
            for (name, wanted) in &self.wanted {
                let error = |source| UpgradeError::table(name, &other.pins, source);
                let Some(old) = other.pins.find_map(name).map_err(error)? else {
                    continue;
                };
                let new = folder.open_map(name).map_err(error)?;
                let layouts = other.layouts.0.get(name).zip(wanted.layout.as_ref());
                let table = match Table::new(name, (old, new), layouts, self.cpus).map_err(error)? {
                    Ok(Some(table)) => table,
                    Ok(None) => continue,
                    Err(why) => {
                        tracing::warn!("table {name} of {} starts empty: {why}", other.pins.folder());
                        continue;
                    }
                };
                // What the agent alone writes was complete when the folder got its name.
                if table.is_for_packets() || self.is_unfinished && place == 0 {
                    other.tables.push(table);
                }
            }
            // An earlier start has not come to where its programs could run.
            let is_unused = self.pins.list_links()?.is_empty() && !other.pins.list_links()?.is_empty();
            // Where there are several, the first one's entries count.
            let pass = if place == 0 && (self.is_unfinished || is_unused) {
                Pass::Before
            } else {
                Pass::After
            };
            // Those last that it matters most to be up to date with.
            other.tables.sort_by_key(|table| is_of_connections(&table.name));
            other.pass = pass;
            other.carry(pass, |_| true)?;
            tracing::info!(
                "{} of {} tables of {} are carried over entry by entry, the others as they are",
                other.tables.len(),
                self.wanted.len(),
                other.pins.folder()
            );
        }
        Ok(())
    }

    /// Gives the folder its name.
    pub fn commit(&mut self) -> Result<(), UpgradeError> {
        if self.is_unfinished {
            self.pins.complete()?;
            self.is_unfinished = false;
        }
        Ok(())
    }

    /// Moves the links of other versions here, with the programs that they have.
    pub fn move_links(&mut self) -> Result<(), UpgradeError> {
        for other in &mut self.others {
            // The second time there is little, and the old programs have had little time to enter more.
            for _ in 0..2 {
                other.carry(other.pass, Table::is_for_packets)?;
            }
            self.pins.move_links(&other.pins)?;
        }
        Ok(())
    }

    /// The links have new programs: what the last packets of the old ones have entered is carried over, and the other
    /// folders go.
    pub fn finish(&mut self) -> Result<(), UpgradeError> {
        for mut other in self.others.drain(..) {
            other.tables.reverse();
            other.carry(Pass::After, Table::is_for_packets)?;
            other.pins.remove()?;
            tracing::info!("{} is taken over", other.pins.folder());
        }
        Ok(())
    }
}

impl Other {
    fn read(pins: Pins) -> Self {
        let layouts = layouts(&pins)
            .inspect_err(|error| tracing::warn!("{}: {error:#}", pins.folder()))
            .unwrap_or_default();
        Self {
            pins,
            layouts,
            tables: Vec::new(),
            pass: Pass::After,
        }
    }

    fn has_layout(&self, name: &str, wanted: &Wanted) -> bool {
        let found = self.layouts.0.get(name);
        found.is_some() && found == wanted.layout.as_ref()
    }

    fn carry(&mut self, pass: Pass, which: impl Fn(&Table) -> bool) -> Result<(), UpgradeError> {
        for table in self.tables.iter_mut().filter(|table| which(table)) {
            table
                .carry(pass)
                .map_err(|source| UpgradeError::table(&table.name, &self.pins, source))?;
        }
        Ok(())
    }
}

/// Whether a pinned table has another size than is wanted.
fn is_resized(pins: &Pins, wanted: &BTreeMap<String, Wanted>) -> Result<bool, UpgradeError> {
    for (name, wanted) in wanted {
        let found =
            maps::pinned_shape(pins, name).map_err(|source| UpgradeError::table(name, pins, source))?;
        if let Some(found) = found.filter(|found| wanted.shape.is_resized(found)) {
            tracing::info!(
                "table {name} has room for {} entries, and gets {}",
                found.max_entries,
                wanted.shape.max_entries
            );
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_of_connections(table: &str) -> bool {
    table.starts_with("FLOWS_") || table.starts_with("HALF_OPEN_")
}

/// The layouts of maps by the names under which they are pinned, from the BTF of their object.
pub fn pinned_layouts(btf: &[u8]) -> Result<Layouts, BtfError> {
    let Layouts(maps) = Layouts::parse(btf)?;
    let pinned = maps
        .into_iter()
        .map(|(name, layout)| (pinned_as(&name).to_owned(), layout));
    Ok(Layouts(pinned.collect()))
}

/// The layouts of a folder's maps: what their agent has left there, else what the kernel knows of each.
fn layouts(pins: &Pins) -> anyhow::Result<Layouts> {
    let Some(map) = pins.find_map(LAYOUTS)? else {
        return layouts_by_kernel(pins);
    };
    let found = sys::RawMap::new(map, 1)?.first()?;
    Ok(pinned_layouts(&found.unwrap_or_default())?)
}

/// Each map by its own: what has been taken over from a third version may have that one's BTF. Variables have none of their own,
/// and those of the programs are in all.
fn layouts_by_kernel(pins: &Pins) -> anyhow::Result<Layouts> {
    let mut found = Layouts::default();
    let mut read: BTreeMap<u32, Layouts> = BTreeMap::new();
    let mut without = Vec::new();
    for name in pins.list_maps()? {
        let id = sys::map_info(pins.open_map(&name)?.as_fd())?.btf_id;
        if id == 0 {
            without.push(name);
            continue;
        }
        let all = match read.entry(id) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let bytes =
                    sys::btf_by_id(id).context("failed to ask the kernel for the layouts of tables")?;
                place.insert(pinned_layouts(&bytes)?)
            }
        };
        let layout = all.0.get(&name).cloned();
        found.0.extend(layout.map(|layout| (name, layout)));
    }
    for name in without {
        let layout = read.values().find_map(|all| all.0.get(&name)).cloned();
        found.0.extend(layout.map(|layout| (name, layout)));
    }
    Ok(found)
}
