//! Peer classes: places that satisfy the same atoms share one.
//!
//! A class keeps its number while atoms come and go, as long as all its members agree about them; where they do not, the
//! smaller part moves. So a new policy about every pod moves none, and one about some moves no more than those.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use dataplane_common::policy::CLASS_ANY;
use ipnet::IpNet;

use super::atoms::AtomId;

pub type ClassId = u32;

/// Where a class is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// An address of a Pod or Node.
    Addr(IpAddr),
    /// The addresses of a range that are in no longer one.
    Range(IpNet),
}

#[derive(Debug)]
struct Class {
    /// Sorted.
    atoms: Arc<[AtomId]>,
    members: BTreeSet<Place>,
}

/// All classes.
#[derive(Debug, Default)]
pub struct Classes {
    by_id: BTreeMap<ClassId, Class>,
    by_atoms: HashMap<Arc<[AtomId]>, ClassId>,
    places: BTreeMap<Place, ClassId>,
    with_atom: HashMap<AtomId, BTreeSet<ClassId>>,
    last: ClassId,
    news: News,
}

/// What has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Places that have another class, or none.
    pub moved: BTreeSet<Place>,
    pub created: BTreeSet<ClassId>,
    pub gone: BTreeSet<ClassId>,
}

impl Classes {
    pub fn places(&self) -> impl Iterator<Item = (Place, ClassId)> {
        self.places.iter().map(|(place, class)| (*place, *class))
    }

    /// The places of one kind between two of them.
    pub fn between(&self, first: Place, last: Place) -> impl Iterator<Item = Place> {
        self.places.range(first..=last).map(|(place, _)| *place)
    }

    pub fn of(&self, place: Place) -> Option<ClassId> {
        self.places.get(&place).copied()
    }

    pub fn atoms(&self, class: ClassId) -> &[AtomId] {
        self.by_id.get(&class).map_or(&[], |class| &class.atoms)
    }

    /// The classes that satisfy an atom.
    pub fn with_atom(&self, atom: AtomId) -> impl Iterator<Item = ClassId> {
        self.with_atom.get(&atom).into_iter().flatten().copied()
    }

    /// What has changed since the last call. A class that came and went is in neither list.
    pub fn take_news(&mut self) -> News {
        std::mem::take(&mut self.news)
    }

    /// Says what a place satisfies, sorted.
    pub fn set(&mut self, place: Place, atoms: &[AtomId]) {
        let class = match self.by_atoms.get(atoms) {
            Some(class) => *class,
            None => self.create(atoms.into()),
        };
        self.move_to(place, class);
    }

    /// A place has gone.
    pub fn remove(&mut self, place: Place) {
        if let Some(class) = self.places.remove(&place) {
            self.news.moved.insert(place);
            self.leave(place, class);
        }
    }

    /// A new atom, and the places that satisfy it.
    pub fn add_atom(&mut self, atom: AtomId, places: impl IntoIterator<Item = Place>) {
        let mut by_class: BTreeMap<ClassId, Vec<Place>> = BTreeMap::new();
        for place in places {
            if let Some(class) = self.of(place) {
                by_class.entry(class).or_default().push(place);
            }
        }
        for (id, with) in by_class {
            let Some(class) = self.by_id.get(&id) else {
                continue;
            };
            let mut atoms = class.atoms.to_vec();
            if let Err(at) = atoms.binary_search(&atom) {
                atoms.insert(at, atom);
            }
            if with.len() == class.members.len() {
                self.retitle(id, &atoms.into());
            } else if with.len() * 2 <= class.members.len() {
                let new = self.create(atoms.into());
                for place in with {
                    self.move_to(place, new);
                }
            } else {
                let with: BTreeSet<Place> = with.into_iter().collect();
                let without: Vec<Place> = class.members.difference(&with).copied().collect();
                let before = class.atoms.clone();
                self.retitle(id, &atoms.into());
                let new = self.create(before);
                for place in without {
                    self.move_to(place, new);
                }
            }
        }
    }

    /// An atom that nobody asks for any more: what differed only in it becomes one.
    pub fn remove_atom(&mut self, atom: AtomId) {
        for id in self.with_atom.remove(&atom).unwrap_or_default() {
            let Some(class) = self.by_id.get(&id) else {
                continue;
            };
            let atoms: Arc<[AtomId]> = class.atoms.iter().copied().filter(|one| *one != atom).collect();
            let Some(twin) = self.by_atoms.get(&atoms).copied() else {
                self.retitle(id, &atoms);
                continue;
            };
            let is_larger = |a: ClassId, b: ClassId| {
                let members = |id: ClassId| self.by_id.get(&id).map_or(0, |class| class.members.len());
                members(a) > members(b)
            };
            let (to, from) = if is_larger(id, twin) {
                (id, twin)
            } else {
                (twin, id)
            };
            let members = self.by_id.get(&from).map(|class| class.members.clone());
            for place in members.unwrap_or_default() {
                self.move_to(place, to);
            }
            if to == id {
                self.retitle(id, &atoms);
            }
        }
    }

    fn create(&mut self, atoms: Arc<[AtomId]>) -> ClassId {
        self.last = if self.last == ClassId::MAX {
            CLASS_ANY + 1
        } else {
            self.last + 1
        };
        let id = self.last;
        self.enter(id, &atoms);
        let members = BTreeSet::new();
        self.by_id.insert(id, Class { atoms, members });
        self.news.created.insert(id);
        id
    }

    fn retitle(&mut self, id: ClassId, atoms: &Arc<[AtomId]>) {
        let Some(class) = self.by_id.get_mut(&id) else {
            return;
        };
        let before = std::mem::replace(&mut class.atoms, atoms.clone());
        self.withdraw(id, &before);
        self.enter(id, atoms);
    }

    fn enter(&mut self, id: ClassId, atoms: &Arc<[AtomId]>) {
        self.by_atoms.insert(atoms.clone(), id);
        for atom in atoms.iter() {
            self.with_atom.entry(*atom).or_default().insert(id);
        }
    }

    fn withdraw(&mut self, id: ClassId, atoms: &[AtomId]) {
        if self.by_atoms.get(atoms) == Some(&id) {
            self.by_atoms.remove(atoms);
        }
        for atom in atoms {
            if let Some(classes) = self.with_atom.get_mut(atom) {
                classes.remove(&id);
                if classes.is_empty() {
                    self.with_atom.remove(atom);
                }
            }
        }
    }

    fn move_to(&mut self, place: Place, class: ClassId) {
        let before = self.places.insert(place, class);
        if before == Some(class) {
            return;
        }
        self.news.moved.insert(place);
        if let Some(to) = self.by_id.get_mut(&class) {
            to.members.insert(place);
        }
        if let Some(before) = before {
            self.leave(place, before);
        }
    }

    fn leave(&mut self, place: Place, id: ClassId) {
        let Some(class) = self.by_id.get_mut(&id) else {
            return;
        };
        class.members.remove(&place);
        if class.members.is_empty()
            && let Some(class) = self.by_id.remove(&id)
        {
            self.withdraw(id, &class.atoms);
            if !self.news.created.remove(&id) {
                self.news.gone.insert(id);
            }
        }
    }
}
