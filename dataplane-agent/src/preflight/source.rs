//! Where objects come from.

use std::{path::Path, time::Duration};

use super::Rows;
use crate::{
    config::{Config, SourceConfig},
    metrics::Metrics,
    source::kube::{self, Address, Lack, state::State},
};

/// How long a server may take.
const WITHIN: Duration = Duration::from_secs(10);

pub(super) fn look(rows: &mut Rows<'_>, config: &Config) {
    match &config.source {
        SourceConfig::Folder(folder) => of_folder(rows, folder),
        SourceConfig::Kube(address) => of_server(rows, address, &config.node_name),
    }
}

fn of_folder(rows: &mut Rows<'_>, folder: &Path) {
    let subject = folder.display().to_string();
    match folder.read_dir() {
        Ok(_) => rows.ok(subject, "a folder of manifests"),
        Err(error) => rows.problem(subject, error),
    }
}

/// What says where the server is must be there; the server itself may be down.
fn of_server(rows: &mut Rows<'_>, address: &Address, node: &str) {
    const SUBJECT: &str = "API server";
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let asked = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let state = State::new(Metrics::new().source);
        runtime.block_on(kube::ask_once(address, node, state, WITHIN))
    });
    match asked {
        Ok(Ok(lacks)) if lacks.is_empty() => {
            rows.ok(SUBJECT, format!("answers; knows the Node {node}, and all may be read"));
        }
        Ok(Ok(lacks)) => {
            for lack in lacks {
                match lack {
                    Lack::Right(kind, message) => rows.note(
                        kind.as_str(),
                        message,
                        "a rule of deploy/rbac.yaml is missing; until it is there tables stay as they are, and a new node serves nothing",
                    ),
                    Lack::Node => rows.note(
                        format!("Node {node}"),
                        "there is no such Node in the cluster",
                        "is --node-name right? until it is there tables stay as they are, and a new node serves nothing",
                    ),
                }
            }
        }
        Ok(Err(why)) => rows.note(
            SUBJECT,
            why,
            "the agent starts and waits for it; until then tables stay as they are, and a new node serves nothing",
        ),
        Err(error) => rows.problem(SUBJECT, error),
    }
}
