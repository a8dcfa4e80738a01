//! One object as the API server sends it, decoded: only the fields that are used outlive this file.

use serde_json::{Value, value::RawValue};

use super::api::ApiError;
use crate::{
    decode::{self, Decoded},
    model::{Kind, Object, ObjectRef, Problem},
};

/// An object and what came of decoding it.
#[derive(Debug)]
pub struct Item {
    pub key: ObjectRef,
    pub version: u64,
    /// `None`: it is refused as a whole.
    pub object: Option<Object>,
    pub problems: Vec<Problem>,
}

/// Decodes an object of a kind. Items of lists do not say what they are. `None`: it has no name that can be used, which
/// the API server never lets in.
pub fn read_item(kind: Kind, raw: &RawValue) -> Result<Option<Item>, ApiError> {
    let mut value: Value = serde_json::from_str(raw.get()).map_err(|error| ApiError::unreadable(&error))?;
    if let Value::Object(fields) = &mut value {
        fields.insert("kind".to_owned(), kind.as_str().into());
        fields.insert("apiVersion".to_owned(), kind.api_version().into());
    }
    let version = value["metadata"]["resourceVersion"].as_str();
    let version = version.and_then(|version| version.parse().ok()).unwrap_or(0);
    Ok(match decode::decode(&value) {
        Decoded::Object {
            key,
            object,
            problems,
        } => Some(Item {
            key,
            version,
            object: Some(object),
            problems,
        }),
        Decoded::Failed {
            key: Some(key),
            problems,
        } => Some(Item {
            key,
            version,
            object: None,
            problems,
        }),
        Decoded::Failed { key: None, problems } => {
            tracing::warn!(kind = kind.as_str(), ?problems, "an object without a usable name");
            None
        }
        Decoded::Ignored { .. } => None,
    })
}
