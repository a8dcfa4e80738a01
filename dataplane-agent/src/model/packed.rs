//! Values that are kept by the ten thousand and rarely looked at, in as few bytes as they can be.

use std::{fmt, marker::PhantomData};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A value in one piece. Equal values are equal in this form too.
#[derive(Clone, PartialEq, Eq)]
pub struct Packed<T> {
    bytes: Box<[u8]>,
    value: PhantomData<fn() -> T>,
}

impl<T: Serialize + DeserializeOwned> Packed<T> {
    /// # Panics
    ///
    /// For types whose `Serialize` fails.
    pub fn new(value: &T) -> Self {
        let bytes = postcard::to_allocvec(value).expect("plain data can be packed");
        Self {
            // A copy of its final size: what a list leaves that grows and shrinks, others seldom fit into.
            bytes: bytes.as_slice().into(),
            value: PhantomData,
        }
    }

    /// # Panics
    ///
    /// Never, for types whose `Deserialize` takes what their `Serialize` gives.
    pub fn unpack(&self) -> T {
        postcard::from_bytes(&self.bytes).expect("what was packed can be unpacked")
    }

    /// The first field alone, which is `F`.
    ///
    /// # Panics
    ///
    /// As [`Packed::unpack`].
    pub fn first<'a, F: Deserialize<'a>>(&'a self) -> F {
        let (first, _rest) = postcard::take_from_bytes(&self.bytes).expect("what was packed can be unpacked");
        first
    }
}

impl<T: fmt::Debug + Serialize + DeserializeOwned> fmt::Debug for Packed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.unpack().fmt(f)
    }
}
