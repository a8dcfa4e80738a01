//! The annotation of this node's Node object: written when what it should say is something else, or the Node is another one,
//! and not often. It is an aid: where it may not be written, all else goes on.

use std::{sync::Arc, time::Duration};

use hyper::Method;
use serde_json::json;
use tokio::{sync::watch, time};

use super::{
    api::{Api, ApiError, MERGE_PATCH},
    follow::jittered,
    resources,
};

/// Its key.
pub const STATUS: &str = "dataplane/status";

/// What changes often comes together, and nodes that see the same change do not write at once.
const SETTLE: Duration = Duration::from_secs(2);
/// Between two writes.
const EVERY: Duration = Duration::from_secs(15);
/// After failures the pause doubles up to this.
const FAILING: Duration = Duration::from_mins(5);
/// After a refusal, which will not end by itself.
const REFUSED: Duration = Duration::from_mins(10);

/// Writes the annotation.
#[derive(Debug)]
pub struct Annotator {
    pub api: Arc<Api>,
    pub node: Arc<str>,
    /// What it should say; `None`: nothing is known yet.
    pub text: watch::Receiver<Option<String>>,
    /// Changes when the Node has come, or has come anew; 0 before.
    pub node_came: watch::Receiver<u64>,
}

impl Annotator {
    /// Runs until nobody has anything to say any more.
    pub async fn run(mut self) {
        let mut written = None;
        let mut failing = EVERY;
        let mut is_told = false;
        loop {
            let node = *self.node_came.borrow_and_update();
            let text = self.text.borrow_and_update().clone();
            let wanted = (node, text);
            if let (1.., Some(text)) = &wanted
                && written.as_ref() != Some(&wanted)
            {
                let pause = match self.write(text).await {
                    // One that is gone is written again when it comes.
                    Ok(()) | Err(ApiError::NotFound { .. }) => {
                        written = Some(wanted);
                        failing = EVERY;
                        EVERY
                    }
                    Err(error @ ApiError::Forbidden { .. }) => {
                        if !std::mem::replace(&mut is_told, true) {
                            tracing::info!("the Node's annotation {STATUS} is not written: {error}");
                        }
                        REFUSED
                    }
                    Err(error) => {
                        tracing::debug!(%error, "failed to write the Node's annotation");
                        failing = (failing * 2).min(FAILING);
                        failing.max(error.retry_after().unwrap_or_default().min(FAILING))
                    }
                };
                time::sleep(jittered(pause)).await;
                continue;
            }
            let changed = tokio::select! {
                changed = self.text.changed() => changed,
                changed = self.node_came.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
            time::sleep(jittered(SETTLE)).await;
        }
    }

    async fn write(&self, text: &str) -> Result<(), ApiError> {
        let node = resources::encoded(&self.node);
        let path = format!("/api/v1/nodes/{node}?fieldManager=dataplane-agent");
        let changes = json!({"metadata": {"annotations": {STATUS: text}}});
        self.api.send(Method::PATCH, &path, MERGE_PATCH, &changes).await
    }
}
