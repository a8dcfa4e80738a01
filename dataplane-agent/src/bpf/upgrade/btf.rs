//! The layouts of an object's maps, from its BTF: what a key and a value are made of, field by field, with names.
//!
//! The format: `Documentation/bpf/btf.rst` of the kernel. Everything of ours is little endian.

use std::collections::BTreeMap;

/// How deep types may be nested; ours are four deep.
const DEPTH: u32 = 32;
/// The field of a Rust type that is nothing but another one's name.
const NEWTYPE: &str = "__0";

/// What keys and values are made of. Types are equal if the same bytes mean the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// An integer; its size in bytes.
    Number {
        size: u32,
        signed: bool,
    },
    Array {
        of: Box<Type>,
        len: u32,
    },
    /// Its size in bytes.
    Struct {
        size: u32,
        fields: Vec<Field>,
    },
    /// Bytes of which nothing is known.
    Bytes {
        size: u32,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    pub name: String,
    /// Bytes from the beginning of the struct.
    pub at: u32,
    pub of: Type,
}

impl Type {
    /// Bytes.
    pub fn size(&self) -> u32 {
        match self {
            Type::Number { size, .. } | Type::Struct { size, .. } | Type::Bytes { size } => *size,
            Type::Array { of, len } => of.size().saturating_mul(*len),
        }
    }
}

/// What a map's entries are made of; `None` where it has none (a ring buffer).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub key: Option<Type>,
    pub value: Option<Type>,
}

/// The maps of an object, by name; its variables by that of their section, if there is just one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layouts(pub BTreeMap<String, Layout>);

/// BTF that can't be read.
#[derive(Debug, thiserror::Error)]
#[error("malformed BTF: {0}")]
pub struct BtfError(&'static str);

type Result<T> = std::result::Result<T, BtfError>;

impl Layouts {
    /// Reads the content of a `.BTF` section.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let btf = Btf::parse(bytes)?;
        let mut maps = BTreeMap::new();
        for section in btf.types.iter().filter(|one| one.kind == kind::DATASEC) {
            let name = btf.name(section)?;
            let variables = section.words.chunks_exact(3).map(|variable| btf.get(variable[0]));
            let variables: Vec<&Raw> = variables.collect::<Result<_>>()?;
            match (name, variables.as_slice()) {
                (".maps", variables) => {
                    for variable in variables {
                        maps.insert(btf.name(variable)?.to_owned(), btf.map(variable.target)?);
                    }
                }
                // Where several stand, the linker says. Nobody asks for the types of constants.
                (".bss" | ".data", [variable]) => {
                    let of = btf.read(variable.target, 0)?;
                    let fields = vec![Field {
                        name: btf.name(variable)?.to_owned(),
                        at: 0,
                        of: of.clone(),
                    }];
                    let layout = Layout {
                        key: Some(Type::Number {
                            size: 4,
                            signed: false,
                        }),
                        value: Some(Type::Struct {
                            size: of.size(),
                            fields,
                        }),
                    };
                    maps.insert(name.to_owned(), layout);
                }
                _ => {}
            }
        }
        Ok(Self(maps))
    }
}

/// A variable of a section: where it begins, in bytes, and what it is made of.
pub fn variable(bytes: &[u8], section: &str, name: &str) -> Result<Option<(usize, Type)>> {
    let btf = Btf::parse(bytes)?;
    for one in btf.types.iter().filter(|one| one.kind == kind::DATASEC) {
        if btf.name(one)? != section {
            continue;
        }
        for found in one.words.chunks_exact(3) {
            let variable = btf.get(found[0])?;
            if btf.name(variable)? == name {
                return Ok(Some((found[1] as usize, btf.read(variable.target, 0)?)));
            }
        }
    }
    Ok(None)
}

/// Numbers of `enum BTF_KIND_…` in `linux/btf.h`.
mod kind {
    pub const INT: u32 = 1;
    pub const PTR: u32 = 2;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const FWD: u32 = 7;
    pub const TYPEDEF: u32 = 8;
    pub const VOLATILE: u32 = 9;
    pub const CONST: u32 = 10;
    pub const RESTRICT: u32 = 11;
    pub const FUNC: u32 = 12;
    pub const FUNC_PROTO: u32 = 13;
    pub const VAR: u32 = 14;
    pub const DATASEC: u32 = 15;
    pub const FLOAT: u32 = 16;
    pub const DECL_TAG: u32 = 17;
    pub const TYPE_TAG: u32 = 18;
    pub const ENUM64: u32 = 19;
}

/// A type as it stands there.
struct Raw {
    name: u32,
    kind: u32,
    /// Bytes, or the type that this one is about.
    target: u32,
    /// Bit fields have another meaning of members' offsets.
    has_bit_fields: bool,
    /// What follows the head.
    words: Vec<u32>,
}

struct Btf<'a> {
    /// From id 1.
    types: Vec<Raw>,
    strings: &'a [u8],
}

impl<'a> Btf<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        const MAGIC: u32 = 0xeb9f;
        let word = |at: usize| word(bytes, at);
        if word(0)? & 0xffff != MAGIC {
            return Err(BtfError("no magic number"));
        }
        let header = word(4)? as usize;
        let part = |at: usize| -> Result<&'a [u8]> {
            let start = header.saturating_add(word(at)? as usize);
            let end = start.saturating_add(word(at + 4)? as usize);
            bytes
                .get(start..end)
                .ok_or(BtfError("a part ends behind the end"))
        };
        let (mut rest, strings) = (part(8)?, part(16)?);
        let mut types = Vec::new();
        while !rest.is_empty() {
            let info = self::word(rest, 4)?;
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let words = match kind {
                kind::INT | kind::VAR | kind::DECL_TAG => 1,
                kind::ARRAY => 3,
                kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 3 * count,
                kind::ENUM | kind::FUNC_PROTO => 2 * count,
                kind::PTR
                | kind::FWD
                | kind::TYPEDEF
                | kind::VOLATILE
                | kind::CONST
                | kind::RESTRICT
                | kind::FUNC
                | kind::FLOAT
                | kind::TYPE_TAG => 0,
                _ => return Err(BtfError("an unknown kind of type")),
            };
            types.push(Raw {
                name: self::word(rest, 0)?,
                kind,
                target: self::word(rest, 8)?,
                has_bit_fields: info >> 31 == 1,
                words: (0..words)
                    .map(|place| self::word(rest, 12 + 4 * place))
                    .collect::<Result<_>>()?,
            });
            rest = &rest[12 + 4 * words..];
        }
        Ok(Self { types, strings })
    }

    fn get(&self, id: u32) -> Result<&Raw> {
        (id as usize)
            .checked_sub(1)
            .and_then(|place| self.types.get(place))
            .ok_or(BtfError("a type that is not there"))
    }

    fn name(&self, of: &Raw) -> Result<&'a str> {
        self.string(of.name)
    }

    fn string(&self, at: u32) -> Result<&'a str> {
        self.strings
            .get(at as usize..)
            .and_then(|rest| rest.split(|&byte| byte == 0).next())
            .and_then(|text| std::str::from_utf8(text).ok())
            .ok_or(BtfError("a name that is not there"))
    }

    /// What the struct says that declares a map: pointers to its key's and its value's type.
    fn map(&self, id: u32) -> Result<Layout> {
        let declaration = self.get(id)?;
        let mut layout = Layout {
            key: None,
            value: None,
        };
        for member in declaration.words.chunks_exact(3) {
            let place = match self.string(member[0])? {
                "key" => &mut layout.key,
                "value" => &mut layout.value,
                _ => continue,
            };
            let pointer = self.get(member[1])?;
            if pointer.kind == kind::PTR && pointer.target != 0 {
                *place = Some(self.read(pointer.target, 0)?);
            }
        }
        Ok(layout)
    }

    fn read(&self, id: u32, depth: u32) -> Result<Type> {
        if depth > DEPTH {
            return Err(BtfError("a type within itself"));
        }
        let of = self.get(id)?;
        Ok(match of.kind {
            kind::INT => Type::Number {
                size: of.target,
                signed: of.words[0] >> 24 & 1 == 1,
            },
            kind::ENUM | kind::ENUM64 => Type::Number {
                size: of.target,
                signed: of.has_bit_fields,
            },
            kind::ARRAY => Type::Array {
                of: Box::new(self.read(of.words[0], depth + 1)?),
                len: of.words[2],
            },
            kind::STRUCT if !of.has_bit_fields => {
                let fields = of.words.chunks_exact(3).map(|member| {
                    Ok(Field {
                        name: self.string(member[0])?.to_owned(),
                        at: member[2] / 8,
                        of: self.read(member[1], depth + 1)?,
                    })
                });
                let mut fields: Vec<Field> = fields.collect::<Result<_>>()?;
                let is_inside = |field: &Field| field.at.saturating_add(field.of.size()) <= of.target;
                if !fields.iter().all(is_inside) {
                    return Err(BtfError("a field that ends behind its struct"));
                }
                match fields.as_slice() {
                    [field] if field.name == NEWTYPE && field.of.size() == of.target => fields.remove(0).of,
                    _ => Type::Struct {
                        size: of.target,
                        fields,
                    },
                }
            }
            kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                self.read(of.target, depth + 1)?
            }
            kind::STRUCT | kind::UNION | kind::FLOAT => Type::Bytes { size: of.target },
            kind::PTR => Type::Bytes { size: 8 },
            _ => return Err(BtfError("a table of something that is no data")),
        })
    }
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk());
    bytes
        .map(|bytes| u32::from_le_bytes(*bytes))
        .ok_or(BtfError("it ends in the middle"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::OBJECT;

    fn of_object() -> Option<Vec<u8>> {
        if OBJECT.is_empty() {
            println!("skipped: built without the BPF object");
            return None;
        }
        let object = aya_obj::Object::parse(OBJECT).unwrap();
        Some(object.btf.unwrap().to_bytes())
    }

    #[test]
    fn layouts_are_those_of_the_types_that_the_agent_writes() {
        use dataplane_common::{
            backend::Backend,
            flow::{Flow6, FlowKey6},
        };
        use std::mem::offset_of;
        let Some(bytes) = of_object() else { return };
        let Layouts(maps) = Layouts::parse(&bytes).unwrap();
        let flows = &maps["FLOWS_V6"];
        assert_eq!(flows.key.as_ref().unwrap().size() as usize, size_of::<FlowKey6>());
        let Some(Type::Struct { size, fields }) = &flows.value else {
            panic!("{flows:?}")
        };
        assert_eq!(*size as usize, size_of::<Flow6>());
        let meta = fields.iter().find(|field| field.name == "meta").unwrap();
        assert_eq!(meta.at as usize, offset_of!(Flow6, meta));
        let Some(Type::Struct { fields, .. }) = &maps["BACKENDS"].value else {
            panic!("{:?}", maps["BACKENDS"])
        };
        let mac = fields.iter().find(|field| field.name == "host_mac").unwrap();
        assert_eq!(mac.at as usize, offset_of!(Backend, host_mac));
        // A newtype is what it holds.
        assert!(matches!(mac.of, Type::Array { len: 6, .. }), "{mac:?}");
        assert_eq!(maps["VERDICTS"].value.as_ref().map_or(0, Type::size), 0);
        assert!(matches!(&maps[".bss"].value, Some(Type::Struct { size: 4, .. })));
    }

    #[test]
    fn a_constant_is_found_with_what_it_is_made_of() {
        use dataplane_common::config::{Config, SYMBOL};
        let Some(bytes) = of_object() else { return };
        let (_, of) = variable(&bytes, ".rodata", SYMBOL).unwrap().unwrap();
        let Type::Struct { size, fields } = of else {
            panic!("{of:?}")
        };
        assert_eq!(size as usize, size_of::<Config>());
        let flags = fields.iter().find(|field| field.name == "flags").unwrap();
        assert_eq!(flags.at as usize, std::mem::offset_of!(Config, flags));
        assert_eq!(variable(&bytes, ".rodata", "NOBODY").unwrap(), None);
        assert_eq!(variable(&bytes, ".data", SYMBOL).unwrap(), None);
    }

    #[test]
    fn what_is_cut_or_changed_is_an_error_or_another_layout_and_no_more() {
        let Some(bytes) = of_object() else { return };
        for length in (0..bytes.len()).step_by(997) {
            assert!(Layouts::parse(&bytes[..length]).is_err(), "{length}");
        }
        for at in (0..bytes.len()).step_by(499) {
            let mut changed = bytes.clone();
            changed[at] ^= 0x55;
            // It may still be valid.
            let _ = Layouts::parse(&changed);
        }
    }
}
