//! The Kubernetes API as a source: [`follow`] lists ([`pages`]) and watches each kind, [`collect`] makes batches of what comes,
//! [`api`] talks to the server, [`item`] decodes, [`state`] is what `status` shows, [`tell`] sends Events, [`annotate`] writes
//! what this node's Node object says.
//!
//! All of it runs in a thread of its own, so that a long write of tables keeps no watch waiting.

mod annotate;
mod api;
mod collect;
mod follow;
mod item;
mod pages;
mod resources;
pub mod state;
mod tell;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time,
};

use annotate::Annotator;
pub use annotate::STATUS;
pub use api::Address;
use api::{Api, ApiError, JSON};
use collect::{Collector, Held, Target};
use follow::{Follower, News};
use state::{Phase, State};
use tell::Teller;

use super::{Batch, Rescan, Source};
use crate::{events::Event, model::Kind};

/// After a change others are waited for so long: what belongs together often comes together.
const QUIET: Duration = Duration::from_millis(10);
/// Events that wait to be sent; more are dropped.
const EVENTS_AT_MOST: usize = 64;
/// Between looks for kinds that the cluster did not have.
const LOOK_FOR_KINDS: Duration = Duration::from_secs(30);

/// What to follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub address: Address,
    /// The name of this node's Node object.
    pub node_name: String,
}

/// What an agent will lack at a server that has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lack {
    /// Objects of a kind may not be read, as the server says.
    Right(Kind, String),
    /// There is no Node of the name.
    Node,
}

/// Asks a server for an object of each kind: what is lacking, or why it has not answered `within` this time. It may be down;
/// what says where it is must be there.
pub async fn ask_once(
    address: &Address,
    node: &str,
    state: State,
    within: Duration,
) -> anyhow::Result<Result<Vec<Lack>, String>> {
    let api = Api::new(address, state).await?;
    Ok(match time::timeout(within, lacks(&api, node)).await {
        Ok(Ok(lacks)) => Ok(lacks),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("it is silent for {} s", within.as_secs())),
    })
}

async fn lacks(api: &Api, node: &str) -> Result<Vec<Lack>, ApiError> {
    let mut lacks = Vec::new();
    for kind in Kind::ALL {
        let path = format!("{}limit=1", resources::collection(kind, Some(node)));
        let mut found = 0;
        let count = |_: &_| {
            found += 1;
            Ok(())
        };
        match pages::page(api, &path, api::NAMES, count).await {
            Ok(_) if kind == Kind::Node && found == 0 => lacks.push(Lack::Node),
            Ok(_) => {}
            Err(ApiError::NotFound { .. }) if resources::is_optional(kind) => {}
            Err(ApiError::Forbidden { message }) => lacks.push(Lack::Right(kind, message)),
            Err(error) => return Err(error),
        }
    }
    Ok(lacks)
}

/// Starts following the API server. It may be down; what says where it is must be there.
pub async fn start(settings: Settings, state: State) -> anyhow::Result<Source> {
    let (batches, outbox) = mpsc::unbounded_channel();
    let (asks, asked) = mpsc::unbounded_channel();
    let (events, to_tell) = mpsc::channel(EVENTS_AT_MOST);
    let (status, status_seen) = watch::channel(None);
    let (started, outcome) = oneshot::channel();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    let of_thread = state.clone();
    std::thread::Builder::new()
        .name("kube".to_owned())
        .spawn(move || {
            let outside = Outside {
                batches,
                asked,
                to_tell,
                status: status_seen,
                started,
            };
            runtime.block_on(run(settings, of_thread, outside));
        })
        .context("failed to start a thread")?;
    let servers = outcome.await.context("the source has ended")??;
    Ok(Source {
        batches: outbox,
        rescan: Rescan::Api(asks),
        state: super::State::Api(state),
        servers,
        events: Some(events),
        node_status: Some(status),
    })
}

/// The other ends of what a [`Source`] has.
struct Outside {
    batches: mpsc::UnboundedSender<Batch>,
    asked: mpsc::UnboundedReceiver<oneshot::Sender<u64>>,
    to_tell: mpsc::Receiver<Event>,
    status: watch::Receiver<Option<String>>,
    started: oneshot::Sender<anyhow::Result<Vec<SocketAddr>>>,
}

/// Runs until batches are not received any more.
async fn run(settings: Settings, state: State, outside: Outside) {
    let Outside {
        batches,
        mut asked,
        to_tell,
        status,
        started,
    } = outside;
    let Settings { address, node_name } = settings;
    let api = match Api::new(&address, state.clone()).await {
        Ok(api) => Arc::new(api),
        Err(error) => {
            let _gone = started.send(Err(error));
            return;
        }
    };
    let _gone = started.send(Ok(api.addresses()));
    let node: Arc<str> = node_name.into();
    let (news, mut inbox) = mpsc::unbounded_channel();
    let (all_nodes, all_nodes_seen) = watch::channel(false);
    let (kinds_came, kinds_came_seen) = watch::channel(0);
    let (node_came, node_came_seen) = watch::channel(0);
    let kinds_came = Arc::new(kinds_came);
    for kind in Kind::ALL {
        let follower = Follower {
            kind,
            node: node.clone(),
            api: api.clone(),
            news: news.clone(),
            all_nodes: all_nodes_seen.clone(),
            kinds_came: kinds_came_seen.clone(),
        };
        tokio::spawn(follower.run());
    }
    tokio::spawn(Teller::new(api.clone(), node.clone()).run(to_tell));
    let annotator = Annotator {
        api: api.clone(),
        node: node.clone(),
        text: status,
        node_came: node_came_seen,
    };
    tokio::spawn(annotator.run());
    tokio::spawn(look_for_kinds(api.clone(), kinds_came.clone()));
    let mut collector = Collector::new(node.clone(), state, all_nodes, node_came);
    let (found, mut targets) = mpsc::unbounded_channel();
    loop {
        tokio::select! {
            Some(news) = inbox.recv() => {
                collector.take(news);
                time::sleep(QUIET).await;
                drain(&mut inbox, &mut collector);
            }
            Some(reply) = asked.recv() => {
                kinds_came.send_modify(|times| *times += 1);
                let all_nodes = *all_nodes_seen.borrow();
                tokio::spawn(look(api.clone(), node.clone(), all_nodes, reply, found.clone()));
            }
            Some(target) = targets.recv() => collector.wait_for(target),
            () = batches.closed() => return,
        }
        if let Some(batch) = collector.batch()
            && batches.send(batch).is_err()
        {
            return;
        }
        collector.answer();
    }
}

fn drain(inbox: &mut mpsc::UnboundedReceiver<News>, collector: &mut Collector) {
    while let Ok(news) = inbox.try_recv() {
        collector.take(news);
    }
}

/// Asks the server what it holds now. When it does not say, whoever asked is not answered.
async fn look(
    api: Arc<Api>,
    node: Arc<str>,
    all_nodes: bool,
    reply: oneshot::Sender<u64>,
    found: mpsc::UnboundedSender<Target>,
) {
    let mut kinds = Vec::new();
    for kind in Kind::ALL {
        let collection = resources::collection(kind, (!all_nodes).then_some(&*node));
        match pages::names(&api, &collection).await {
            Ok((version, names)) => kinds.push((kind, Some(Held { version, names }))),
            Err(ApiError::NotFound { .. } | ApiError::Forbidden { .. }) if resources::is_optional(kind) => {
                kinds.push((kind, None));
            }
            Err(error) => {
                tracing::debug!(kind = kind.as_str(), %error, "failed to ask what there is");
                time::sleep(QUIET).await;
                return;
            }
        }
    }
    // The source has ended.
    let _ended = found.send(Target { kinds, reply });
}

/// Tells those who follow kinds that the cluster does not have when they may have come.
async fn look_for_kinds(api: Arc<Api>, kinds_came: Arc<watch::Sender<u64>>) {
    let [first, second] = resources::TIER_VERSIONS;
    let places = [resources::TIER_GROUP, first, second];
    let mut known: [Option<Vec<u8>>; 3] = [const { None }; 3];
    loop {
        time::sleep(follow::jittered(LOOK_FOR_KINDS)).await;
        let kinds = api.state().report().kinds;
        if !kinds.values().any(|kind| kind.phase == Phase::Absent) {
            continue;
        }
        let mut is_news = false;
        for (path, known) in places.into_iter().zip(&mut known) {
            let found = match api.get(path, JSON).await {
                Ok(text) => Some(text),
                Err(ApiError::NotFound { .. }) => None,
                Err(_) => continue,
            };
            let is_there = found.is_some();
            if *known != found {
                *known = found;
                is_news = true;
            }
            // Without the group there are no versions of it.
            if path == resources::TIER_GROUP && !is_there {
                break;
            }
        }
        if is_news {
            kinds_came.send_modify(|times| *times += 1);
        }
    }
}
