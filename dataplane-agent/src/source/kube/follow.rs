//! Follows one kind: a list in pages, then a watch from where the list ends, and whatever goes wrong in between.
//!
//! The watch is the truth only as long as versions grow. Before a watch is opened again the server is asked for its
//! present version: one that is older than ours means that its data was restored from a backup, and such a server would
//! keep silent until its versions had caught up.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{
    sync::{mpsc, watch},
    time::{self, Instant},
};

use super::{
    api::{Api, ApiError, JSON, NAMES, Refusal},
    item::{Item, read_item},
    pages::{PAGE, page, pages, version},
    resources,
};
use crate::model::Kind;

/// A watch lasts so long and up to twice as long, in seconds; then the server ends it in good order.
const WATCH_S: u64 = 300;
/// Bookmarks come every minute, so a watch that is silent for longer is dead, or the server's version is one without (before
/// 1.21): either way a new one is opened on a new connection.
const SILENCE: Duration = Duration::from_secs(150);
/// The first pause after a failure; it doubles up to [`PAUSE_AT_MOST`].
const PAUSE: Duration = Duration::from_millis(200);
const PAUSE_AT_MOST: Duration = Duration::from_secs(30);
/// A server that asks for more patience is not taken at its word.
const RETRY_AFTER_AT_MOST: Duration = Duration::from_mins(5);
/// A watch that ends sooner did not work.
const SHORT: Duration = Duration::from_secs(1);

/// What has come of a kind.
#[derive(Debug)]
pub enum News {
    /// All that there is.
    Listed {
        kind: Kind,
        items: Vec<Item>,
        /// For Nodes: not this node's own alone.
        all: bool,
    },
    /// The cluster has no such kind.
    Absent(Kind),
    /// Changes, in their order.
    Changed { kind: Kind, changes: Vec<Changed> },
    /// It cannot be followed, and why. What is known of it stands.
    Failing(Kind, ApiError),
    /// It is followed again.
    Working(Kind),
}

/// One change that a watch tells.
#[derive(Debug)]
pub enum Changed {
    Applied(Item),
    Deleted(Item),
}

/// What the following of one kind needs.
#[derive(Debug)]
pub struct Follower {
    pub kind: Kind,
    pub node: Arc<str>,
    pub api: Arc<Api>,
    pub news: mpsc::UnboundedSender<News>,
    /// Whether policies look at all Nodes. Others than Nodes never ask.
    pub all_nodes: watch::Receiver<bool>,
    /// Changes when kinds may have come that were absent.
    pub kinds_came: watch::Receiver<u64>,
}

/// Why a watch or a list ended.
enum End {
    /// In good order: go on from this version.
    At(u64),
    /// List again: the version is gone, or something else is to be listed.
    ListAgain,
    Failed(ApiError),
}

impl From<ApiError> for End {
    fn from(error: ApiError) -> Self {
        match error {
            ApiError::Gone { .. } => End::ListAgain,
            error => End::Failed(error),
        }
    }
}

#[derive(Deserialize)]
struct WatchEvent<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Versioned {
    metadata: Version,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    resource_version: String,
}

impl Follower {
    /// Runs until nobody listens.
    pub async fn run(mut self) {
        let mut pause = Pause::default();
        let mut version: Option<u64> = None;
        while !self.news.is_closed() {
            let started = Instant::now();
            let end = match version {
                None => self.list_all().await,
                Some(version) => self.watch(version).await,
            };
            match end {
                Ok(End::At(now)) => {
                    let has_worked = version.is_none() || started.elapsed() >= SHORT;
                    version = Some(now);
                    if has_worked {
                        pause = Pause::default();
                    } else {
                        pause.wait(None).await;
                    }
                }
                Ok(End::ListAgain) => {
                    tracing::debug!(kind = self.kind.as_str(), "lists again");
                    version = None;
                    if started.elapsed() < SHORT {
                        pause.wait(None).await;
                    }
                }
                Ok(End::Failed(error)) | Err(error) => {
                    if let Some(others) = self.absence(&error).await {
                        self.absent(&others).await;
                        version = None;
                        continue;
                    }
                    self.api.state().failed(self.kind, &error.to_string());
                    tracing::debug!(kind = self.kind.as_str(), %error, "failed");
                    // A watch that ends badly and can be opened again at once is nobody's business.
                    let is_told = version.is_none() || pause.failures > 0;
                    let retry_after = error.retry_after();
                    if is_told {
                        self.tell(News::Failing(self.kind, error));
                    }
                    pause.wait(retry_after).await;
                }
            }
        }
    }

    fn tell(&self, news: News) {
        // Nobody listens: the source has ended.
        let _ended = self.news.send(news);
    }

    fn collection(&self) -> String {
        let only = (!*self.all_nodes.borrow()).then_some(&*self.node);
        resources::collection(self.kind, only)
    }

    async fn list_all(&mut self) -> Result<End, ApiError> {
        let all = *self.all_nodes.borrow_and_update();
        let mut items = Vec::new();
        let version = match self.list(Some(PAGE), &mut items).await {
            // It took too long to turn the pages.
            Err(ApiError::Gone { .. }) => {
                items.clear();
                self.list(None, &mut items).await?
            }
            other => other?,
        };
        self.api.state().listed(self.kind);
        let kind = self.kind;
        self.tell(News::Listed { kind, items, all });
        Ok(End::At(version))
    }

    /// Reads a list, in pages of so many objects or in one; returns its version.
    async fn list(&self, page: Option<usize>, items: &mut Vec<Item>) -> Result<u64, ApiError> {
        let take = |raw: &RawValue| {
            items.extend(read_item(self.kind, raw)?);
            Ok(())
        };
        pages(&self.api, &self.collection(), page, JSON, take).await
    }

    /// Follows changes after a version.
    async fn watch(&mut self, from: u64) -> Result<End, ApiError> {
        if self.present_version().await? < from {
            tracing::warn!(
                kind = self.kind.as_str(),
                "the API server has gone back to an older state: listing again"
            );
            return Ok(End::ListAgain);
        }
        let seconds = WATCH_S + random() % WATCH_S;
        let path = format!(
            "{}watch=true&allowWatchBookmarks=true&resourceVersion={from}&timeoutSeconds={seconds}",
            self.collection()
        );
        let api = self.api.clone();
        let mut answer = match api.stream(&path).await {
            Err(ApiError::Gone { .. }) => return Ok(End::ListAgain),
            other => other?,
        };
        api.state().heard(self.kind);
        self.tell(News::Working(self.kind));
        let mut lines = Lines::default();
        let mut now = from;
        loop {
            let part = tokio::select! {
                part = answer.part(SILENCE) => part,
                _changed = self.all_nodes.changed(), if self.kind == Kind::Node => return Ok(End::ListAgain),
            };
            // Whatever is wrong with this watch, the next begins where this one has come to.
            let Ok(part) = part else {
                return Ok(End::At(now));
            };
            let Some(part) = part else {
                return Ok(End::At(now));
            };
            lines.push(&part);
            let mut changes = Vec::new();
            let mut end = None;
            while let (Some(line), None) = (lines.next(), &end) {
                end = self.take_line(line, &mut now, &mut changes).err();
            }
            lines.forget();
            api.state().heard(self.kind);
            if !changes.is_empty() {
                let kind = self.kind;
                self.tell(News::Changed { kind, changes });
            }
            if let Some(end) = end {
                return Ok(end);
            }
        }
    }

    fn take_line(&self, line: &[u8], now: &mut u64, changes: &mut Vec<Changed>) -> Result<(), End> {
        if line.trim_ascii().is_empty() {
            return Ok(());
        }
        let unreadable = |error| End::Failed(ApiError::unreadable(&error));
        let event: WatchEvent<'_> = serde_json::from_slice(line).map_err(unreadable)?;
        if event.kind == "ERROR" {
            let refusal: Refusal = serde_json::from_str(event.object.get()).map_err(unreadable)?;
            return Err(refusal.error(None).into());
        }
        let object: Versioned = serde_json::from_str(event.object.get()).map_err(unreadable)?;
        let at = version(&object.metadata.resource_version)?;
        if at < *now {
            return Err(End::ListAgain);
        }
        if event.kind != "BOOKMARK" {
            let item = read_item(self.kind, event.object)?;
            changes.extend(item.map(|item| match event.kind {
                "DELETED" => Changed::Deleted(item),
                _ => Changed::Applied(item),
            }));
        }
        *now = at;
        Ok(())
    }

    /// The server's present version.
    async fn present_version(&self) -> Result<u64, ApiError> {
        let path = format!("{}limit=1", self.collection());
        let metadata = page(&self.api, &path, NAMES, |_| Ok(())).await?;
        version(&metadata.resource_version)
    }

    /// `Some` when an error means that the cluster has no such kind: the versions of its group in which it has it. A server
    /// that is about to start does not know its custom resources yet, so it is believed only when it says that it is ready.
    async fn absence(&self, error: &ApiError) -> Option<Vec<String>> {
        let may_be = matches!(error, ApiError::NotFound { .. } | ApiError::Forbidden { .. });
        if !may_be || !resources::is_optional(self.kind) {
            return None;
        }
        match self.api.get("/readyz", "*/*").await {
            // Servers that do not say are always taken for ready.
            Ok(_)
            | Err(ApiError::NotFound { .. } | ApiError::Forbidden { .. } | ApiError::Unauthorized { .. }) => {
            }
            Err(_) => return None,
        }
        let group = match self.api.get(resources::TIER_GROUP, JSON).await {
            Ok(text) => versions(&text)?,
            Err(ApiError::NotFound { .. }) => return Some(Vec::new()),
            Err(_) => return None,
        };
        let mut others = Vec::new();
        for version in group {
            let resources = match self.api.get(&format!("/apis/{version}"), JSON).await {
                Ok(text) => has_resource(&text, resources::plural(self.kind))?,
                Err(ApiError::NotFound { .. }) => false,
                Err(_) => return None,
            };
            match resources {
                true if version == self.kind.api_version() => return None,
                true => others.push(version),
                false => {}
            }
        }
        Some(others)
    }

    /// Waits until the kind may have come. `others`: versions in which it is there, and which are not read.
    async fn absent(&mut self, others: &[String]) {
        self.kinds_came.mark_unchanged();
        let elsewhere = (!others.is_empty()).then(|| {
            format!(
                "the cluster has it in {} alone, and {} is what is read: these policies are not enforced",
                others.join(", "),
                self.kind.api_version()
            )
        });
        self.api.state().absent(self.kind, elsewhere);
        self.tell(News::Absent(self.kind));
        // Without anybody to tell of new kinds the source has ended.
        let _ended = self.kinds_came.changed().await;
    }
}

/// Whether the discovery of a group's version names a resource; `None`: it is no such document.
fn has_resource(text: &[u8], plural: &str) -> Option<bool> {
    #[derive(Deserialize)]
    struct Resources {
        resources: Vec<Resource>,
    }
    #[derive(Deserialize)]
    struct Resource {
        name: String,
    }
    let found: Resources = serde_json::from_slice(text).ok()?;
    Some(found.resources.iter().any(|resource| resource.name == plural))
}

/// The versions that the discovery of a group names, each with the group; `None`: it is no such document.
fn versions(text: &[u8]) -> Option<Vec<String>> {
    #[derive(Deserialize)]
    struct Group {
        versions: Vec<Version>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Version {
        group_version: String,
    }
    let group: Group = serde_json::from_slice(text).ok()?;
    let versions = group.versions.into_iter();
    Some(versions.map(|version| version.group_version).collect())
}

/// Lines of a text that comes in parts.
#[derive(Default)]
struct Lines {
    text: Vec<u8>,
    /// Up to here lines were taken.
    taken: usize,
    /// Up to here there is no end of a line.
    searched: usize,
}

impl Lines {
    fn push(&mut self, part: &[u8]) {
        self.text.extend_from_slice(part);
    }

    fn next(&mut self) -> Option<&[u8]> {
        let rest = self.text.get(self.searched..)?;
        let Some(length) = rest.iter().position(|byte| *byte == b'\n') else {
            self.searched = self.text.len();
            return None;
        };
        let line = self.taken..self.searched + length;
        self.taken = line.end + 1;
        self.searched = self.taken;
        self.text.get(line)
    }

    /// Forgets the lines that were taken.
    fn forget(&mut self) {
        self.text.drain(..self.taken);
        self.searched -= self.taken;
        self.taken = 0;
        if self.text.is_empty() {
            // A long line or a burst came once; it need not be paid for ever after.
            self.text = Vec::new();
        }
    }
}

/// Growing pauses between tries.
#[derive(Default)]
struct Pause {
    failures: u32,
}

impl Pause {
    /// Waits for at least as long as the server asks. No two nodes come back at the same time.
    async fn wait(&mut self, at_least: Option<Duration>) {
        time::sleep(self.next(at_least)).await;
    }

    fn next(&mut self, at_least: Option<Duration>) -> Duration {
        let pause = PAUSE
            .saturating_mul(1 << self.failures.min(10))
            .min(PAUSE_AT_MOST);
        self.failures += 1;
        match at_least {
            Some(at_least) => at_least.min(RETRY_AFTER_AT_MOST) + jittered(pause),
            None => jittered(pause),
        }
    }
}

/// A time between half and one and a half of this one.
pub fn jittered(time: Duration) -> Duration {
    let share = (random() % 1000) as u32;
    time / 2 + time / 1000 * share
}

/// For spreading load, not for secrets.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_however_they_come() {
        let text = b"one\n\ntwo and more\nrest";
        for size in 1..text.len() {
            let mut lines = Lines::default();
            let mut found = Vec::new();
            for part in text.chunks(size) {
                lines.push(part);
                while let Some(line) = lines.next() {
                    found.push(String::from_utf8_lossy(line).into_owned());
                }
                lines.forget();
            }
            assert_eq!(found, ["one", "", "two and more"], "{size}");
            assert_eq!(lines.text, b"rest");
        }
    }

    #[test]
    fn a_kind_is_absent_only_by_a_document_that_says_so() {
        let text = br#"{"kind":"APIResourceList","resources":[{"name":"adminnetworkpolicies"}]}"#;
        assert_eq!(has_resource(text, "adminnetworkpolicies"), Some(true));
        assert_eq!(has_resource(text, "clusternetworkpolicies"), Some(false));
        assert_eq!(has_resource(b"<html>", "clusternetworkpolicies"), None);
    }

    #[test]
    fn the_versions_of_a_group_are_read() {
        let group = br#"{"kind":"APIGroup","name":"g","versions":[{"groupVersion":"g/v1alpha1","version":"v1alpha1"},{"groupVersion":"g/v1beta1","version":"v1beta1"}]}"#;
        assert_eq!(versions(group).unwrap(), ["g/v1alpha1", "g/v1beta1"]);
        assert_eq!(versions(b"<html>"), None);
    }

    #[test]
    fn no_pause_is_shorter_than_the_server_asks() {
        let mut pause = Pause::default();
        let asked = Duration::from_secs(7);
        for _ in 0..20 {
            assert!(pause.next(Some(asked)) >= asked);
        }
        assert!(pause.next(None) <= PAUSE_AT_MOST * 3 / 2);
        let longest = RETRY_AFTER_AT_MOST + PAUSE_AT_MOST * 3 / 2;
        assert!(pause.next(Some(Duration::from_hours(9))) <= longest);
    }

    #[test]
    fn pauses_spread() {
        let pause = Duration::from_secs(2);
        let spread: std::collections::BTreeSet<Duration> = (0..100).map(|_| jittered(pause)).collect();
        assert!(spread.len() > 50);
        assert!(
            spread
                .iter()
                .all(|time| (pause / 2..=pause * 3 / 2).contains(time))
        );
    }
}
