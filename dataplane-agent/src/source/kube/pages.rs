//! Lists, page by page: what is in them, and the version that they are of.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    api::{Api, ApiError, NAMES},
    resources,
};
use crate::model::Name;

/// Objects of one page of a list.
pub const PAGE: usize = 500;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Page<'a> {
    metadata: PageMetadata,
    #[serde(borrow, default)]
    items: Option<Vec<&'a RawValue>>,
}

/// What a page says of its list.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PageMetadata {
    pub resource_version: String,
    #[serde(rename = "continue", default)]
    next: String,
}

/// Reads a list to its end, in pages of so many objects or in one; returns its version.
pub async fn pages(
    api: &Api,
    collection: &str,
    limit: Option<usize>,
    accept: &'static str,
    mut take: impl FnMut(&RawValue) -> Result<(), ApiError>,
) -> Result<u64, ApiError> {
    let limit = limit.map_or_else(String::new, |limit| format!("limit={limit}"));
    let mut next = String::new();
    loop {
        let metadata = page(api, &format!("{collection}{limit}{next}"), accept, &mut take).await?;
        if metadata.next.is_empty() {
            return version(&metadata.resource_version);
        }
        next = format!("&continue={}", resources::encoded(&metadata.next));
    }
}

/// Reads one page.
pub async fn page(
    api: &Api,
    path: &str,
    accept: &'static str,
    mut take: impl FnMut(&RawValue) -> Result<(), ApiError>,
) -> Result<PageMetadata, ApiError> {
    let text = api.get(path, accept).await?;
    let page: Page<'_> = serde_json::from_slice(&text).map_err(|error| ApiError::unreadable(&error))?;
    page.items.into_iter().flatten().try_for_each(&mut take)?;
    Ok(page.metadata)
}

/// Names and versions of all objects of a kind, as the server has them now, and the version of the list.
pub async fn names(api: &Api, collection: &str) -> Result<(u64, Vec<(Name, u64)>), ApiError> {
    #[derive(Deserialize)]
    struct Named {
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Metadata {
        name: String,
        #[serde(default)]
        namespace: String,
        resource_version: String,
    }
    let mut found = Vec::new();
    let take = |raw: &RawValue| {
        let named = serde_json::from_str(raw.get()).map_err(|error| ApiError::unreadable(&error))?;
        let Named { metadata } = named;
        let name = Name::new(&metadata.namespace, &metadata.name);
        found.push((name, version(&metadata.resource_version)?));
        Ok(())
    };
    let version = pages(api, collection, Some(PAGE), NAMES, take).await?;
    Ok((version, found))
}

/// Versions are opaque to clients by the letter of the API, but numbers that grow by the word of KEP-5504.
pub fn version(text: &str) -> Result<u64, ApiError> {
    text.parse().map_err(|_| ApiError::Unreadable {
        reason: format!("`{text}` is no version of an object"),
    })
}
