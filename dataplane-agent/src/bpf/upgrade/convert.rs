//! From one layout to another: bytes in, bytes out. Fields are found by their names, so nothing here knows a version.
//!
//! A field that only the old layout has is left out, one that only the new one has is zero. A number that became wider is
//! extended; where it became narrower, or an array shorter, only what fits is carried over. What a key has lost must have been
//! zero, or two entries would become one.

use super::btf::{Field, Type};

/// Ends the names of numbers in network byte order, which do not grow at their end.
const NETWORK_ORDER: &str = "_be";

/// What is converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Key,
    Value,
}

/// Two layouts have nothing in common.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {new} and was {old}")]
pub struct Misfit {
    /// With those that it is within.
    field: String,
    old: &'static str,
    new: &'static str,
}

/// What is to be done with each entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    steps: Vec<Step>,
    old: usize,
    new: usize,
}

/// Offsets and lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Copy {
        from: usize,
        to: usize,
        len: usize,
    },
    Number {
        from: usize,
        len: usize,
        to: usize,
        new_len: usize,
        signed: bool,
    },
    /// These bytes must be zero.
    Absent {
        from: usize,
        len: usize,
    },
}

impl Plan {
    pub fn new(old: &Type, new: &Type, part: Part) -> Result<Self, Misfit> {
        let mut plan = Self {
            steps: Vec::new(),
            old: old.size() as usize,
            new: new.size() as usize,
        };
        let name = match part {
            Part::Key => "key",
            Part::Value => "value",
        };
        plan.add(part, name, (old, 0), (new, 0))?;
        Ok(plan)
    }

    /// The bytes in the new layout; `None` if they do not fit there, or `bytes` are too few.
    pub fn convert(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let bytes = bytes.get(..self.old)?;
        let mut new = vec![0; self.new];
        for step in &self.steps {
            match *step {
                Step::Copy { from, to, len } => new[to..to + len].copy_from_slice(&bytes[from..from + len]),
                Step::Number {
                    from,
                    len,
                    to,
                    new_len,
                    signed,
                } => {
                    let number = &bytes[from..from + len];
                    let both = len.min(new_len);
                    let is_negative = signed && number[both - 1] >> 7 == 1;
                    let filler = if is_negative { 0xff } else { 0 };
                    if number[both..].iter().any(|&byte| byte != filler) {
                        return None;
                    }
                    new[to..to + both].copy_from_slice(&number[..both]);
                    new[to + both..to + new_len].fill(filler);
                }
                Step::Absent { from, len } => {
                    if bytes[from..from + len].iter().any(|&byte| byte != 0) {
                        return None;
                    }
                }
            }
        }
        Some(new)
    }

    fn add(
        &mut self,
        part: Part,
        name: &str,
        old: (&Type, usize),
        new: (&Type, usize),
    ) -> Result<(), Misfit> {
        let ((old, from), (new, to)) = (old, new);
        match (old, new) {
            (Type::Number { size: len, signed }, Type::Number { size: new_len, .. })
                if len != new_len && *len > 0 && *new_len > 0 && !name.ends_with(NETWORK_ORDER) =>
            {
                self.steps.push(Step::Number {
                    from,
                    len: *len as usize,
                    to,
                    new_len: *new_len as usize,
                    signed: *signed,
                });
            }
            (Type::Number { size, .. }, Type::Number { size: new_size, .. })
            | (Type::Bytes { size }, Type::Bytes { size: new_size })
                if size == new_size =>
            {
                self.copy(from, to, *size as usize);
            }
            (
                Type::Array { of, len },
                Type::Array {
                    of: new_of,
                    len: new_len,
                },
            ) => {
                let (size, new_size) = (of.size() as usize, new_of.size() as usize);
                let both = (*len).min(*new_len) as usize;
                if of == new_of {
                    self.copy(from, to, both * size);
                } else {
                    for place in 0..both {
                        let (from, to) = (from + place * size, to + place * new_size);
                        self.add(part, &format!("{name}[{place}]"), (of, from), (new_of, to))?;
                    }
                }
                self.absent(from + both * size, (*len as usize - both) * size);
            }
            (
                Type::Struct { fields, .. },
                Type::Struct {
                    fields: new_fields, ..
                },
            ) => {
                let find = |fields: &[Field], name: &str| fields.iter().position(|field| field.name == name);
                for field in fields {
                    let from = from + field.at as usize;
                    match find(new_fields, &field.name) {
                        Some(place) => {
                            let new = &new_fields[place];
                            let name = format!("{name}.{}", field.name);
                            self.add(part, &name, (&field.of, from), (&new.of, to + new.at as usize))?;
                        }
                        None if part == Part::Key => self.absent(from, field.of.size() as usize),
                        None => {}
                    }
                }
            }
            _ => {
                return Err(Misfit {
                    field: name.to_owned(),
                    old: describe(old),
                    new: describe(new),
                });
            }
        }
        Ok(())
    }

    fn copy(&mut self, from: usize, to: usize, len: usize) {
        if let Some(Step::Copy {
            from: last,
            to: last_to,
            len: last_len,
        }) = self.steps.last_mut()
            && *last + *last_len == from
            && *last_to + *last_len == to
        {
            *last_len += len;
        } else if len > 0 {
            self.steps.push(Step::Copy { from, to, len });
        }
    }

    fn absent(&mut self, from: usize, len: usize) {
        if len > 0 {
            self.steps.push(Step::Absent { from, len });
        }
    }
}

fn describe(of: &Type) -> &'static str {
    match of {
        Type::Number { size: 1, .. } => "a number of 1 byte",
        Type::Number { size: 2, .. } => "a number of 2 bytes",
        Type::Number { size: 4, .. } => "a number of 4 bytes",
        Type::Number { .. } => "a number",
        Type::Array { .. } => "an array",
        Type::Struct { .. } => "a struct",
        Type::Bytes { .. } => "something else",
    }
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
