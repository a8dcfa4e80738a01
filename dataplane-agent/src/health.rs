//! What the agent tells of itself: `/healthz` and `/livez` as kube-proxy does at port 10256, `/readyz`, and, on its own
//! socket, what its commands ask for. [`http`] is the server, [`node_ports`] the health checks of load balancers.

pub mod http;
pub mod node_ports;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context;
use hyper::{
    Request, StatusCode, Uri,
    body::Incoming,
    header::{HeaderValue, SERVER},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot, watch},
    time,
};

use self::http::{Answer, Listener};
use crate::{
    enforced::{Enforced, OfPod},
    explain::{Answered, Port, tables::Query},
    host::Claim,
    load::Load,
    logging,
    metrics::{Metrics, services::OverServices},
    model::{Name, policy::Direction},
    served::{Condition, ConditionKind, Served},
    source::{self, Rescan},
    told::Told,
};

/// How long `/wait` lasts unless it says.
const WAIT: Duration = Duration::from_mins(1);
/// The loop shows a sign of life more often than this.
const ALIVE_WITHIN: Duration = Duration::from_secs(30);
/// Writes may fail for so long before this node asks load balancers for no more traffic (kube-proxy: twice its sync
/// period).
const STALE_AFTER: Duration = Duration::from_mins(1);
/// Between attempts to get an address that somebody else has.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);

/// The header `Server` of what commands are answered, before the version.
pub const PROGRAM: &str = "dataplane-agent/";
const SERVED_BY: &str = concat!("dataplane-agent/", env!("CARGO_PKG_VERSION"));

/// How far the agent's loop has come.
#[derive(Clone, Debug)]
pub struct Progress {
    pub alive: Instant,
    /// The source has been read completely once, the machine observed, and the result written.
    pub started: bool,
    /// The last revision that the loop has taken in.
    pub taken: u64,
    /// The last revision of which everything is programmed.
    pub revision: u64,
    /// The last look at the machine that is programmed.
    pub host_revision: u64,
    /// When the tables were last brought up to date.
    pub synced: Timestamp,
    /// Since when the kernel has refused writes. A full table is not meant: all else is served.
    pub failing_since: Option<Instant>,
    /// This node is about to be removed, so load balancers should look elsewhere.
    pub leaving: bool,
    pub rejected: Vec<String>,
    /// What could not be programmed, and is tried again.
    pub failed: Vec<String>,
    pub conditions: Vec<Condition>,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            alive: Instant::now(),
            started: false,
            taken: 0,
            revision: 0,
            host_revision: 0,
            synced: Timestamp::UNIX_EPOCH,
            failing_since: None,
            leaving: false,
            rejected: Vec::new(),
            failed: Vec::new(),
            conditions: Vec::new(),
        }
    }
}

impl Progress {
    /// Whether the loop runs and the kernel takes what it writes: a restart would not help.
    pub fn is_live(&self) -> bool {
        let is_stale = self
            .failing_since
            .is_some_and(|since| since.elapsed() >= STALE_AFTER);
        self.alive.elapsed() < ALIVE_WITHIN && !is_stale
    }

    /// Whether Services are served.
    pub fn is_healthy(&self) -> bool {
        self.started && self.is_live()
    }

    /// Why what the source holds is not known.
    fn unfollowed(&self) -> Option<&str> {
        let is_it = |one: &&Condition| one.kind == ConditionKind::SourceFollowed && !one.status;
        self.conditions.iter().find(is_it).map(|one| one.message.as_str())
    }
}

/// What the loop is asked.
#[derive(Debug)]
pub enum Ask {
    /// For a fresh look at the machine; the answer is the number of that look.
    LookAgain(oneshot::Sender<u64>),
    /// What is served.
    Served(oneshot::Sender<Served>),
    /// What goes over Services, endpoints and Pods.
    Load(oneshot::Sender<Result<Load, String>>),
    /// What has gone over single Services, for `/metrics`; `None` where that is switched off.
    OverServices(oneshot::Sender<Option<OverServices>>),
    /// What the tables say of a flow.
    Explain(Query, oneshot::Sender<Answered>),
    /// Whose these addresses are.
    Names(Vec<IpAddr>, oneshot::Sender<BTreeMap<IpAddr, String>>),
    /// On which nodes the Pods with these addresses are.
    Nodes(Vec<IpAddr>, oneshot::Sender<BTreeMap<IpAddr, String>>),
    /// Which of these Pods there are.
    Pods(Vec<Name>, oneshot::Sender<Vec<String>>),
    /// Why nothing is served for a Service, where nothing is meant to be.
    Unserved(Name, oneshot::Sender<Option<String>>),
    /// The names of policies.
    PolicyNames(Policies, oneshot::Sender<Vec<String>>),
    /// Why the Pod with an address is closed in a direction, if something of its policies cannot be written.
    Closed(IpAddr, Direction, oneshot::Sender<Option<String>>),
    /// What policies do here.
    Enforced(oneshot::Sender<Enforced>),
    /// What policies say about a Pod of this node.
    EnforcedOf(Name, oneshot::Sender<Option<OfPod>>),
    /// What a CNI plugin tells of a pod; answered when its policies are in force.
    Bind(Name, Claim, watch::Sender<Binding>),
    /// What policies have decided after the verdict with a number.
    Verdicts(u64, oneshot::Sender<Vec<Told>>),
}

impl Ask {
    /// Whether the answer is made of what the source holds, so that there is none before all of it has been read.
    pub const fn is_about_objects(&self) -> bool {
        match self {
            Self::Served(_)
            | Self::Load(_)
            | Self::Explain(..)
            | Self::Names(..)
            | Self::Nodes(..)
            | Self::Pods(..)
            | Self::Unserved(..)
            | Self::PolicyNames(..)
            | Self::Closed(..)
            | Self::Enforced(_)
            | Self::EnforcedOf(..) => true,
            Self::LookAgain(_) | Self::OverServices(_) | Self::Bind(..) | Self::Verdicts(..) => false,
        }
    }
}

/// Why a question has no answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Refusal {
    pub error: String,
}

/// Policies that somebody wants to know the names of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policies {
    /// The one with this number in `RULES`.
    Numbered(u32),
    /// Those that isolate the Pod with this address.
    Isolating(IpAddr, Direction),
}

/// How far a pod is that a CNI plugin has told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// What it waits for.
    Waits(&'static str),
    Bound,
}

/// What the servers need of the agent.
#[derive(Clone, Debug)]
pub struct Health {
    pub progress: watch::Receiver<Progress>,
    pub rescan: Rescan,
    /// `None` for a folder.
    pub source: source::State,
    pub asks: mpsc::UnboundedSender<Ask>,
}

/// The answer of `/healthz` and `/livez`, by kube-proxy's names.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ProxyHealth {
    last_updated: Timestamp,
    current_time: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
}

/// The answer of `/bind` that is a no.
#[derive(Serialize)]
struct Refused<'a> {
    reason: &'a str,
}

/// The answer of `/readyz`.
#[derive(Serialize)]
struct Page<'a> {
    ready: bool,
    /// Everything up to this revision of the source is programmed.
    revision: u64,
    source_revision: u64,
    rejected: &'a [String],
    failed: &'a [String],
    /// Why what the source holds is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    unfollowed: Option<&'a str>,
}

/// The levels of the log, as the agent tells its command.
#[derive(Debug, Serialize, Deserialize)]
pub struct Levels {
    pub levels: String,
    /// Why they are not others.
    pub error: Option<String>,
}

impl Health {
    /// Serves probes at an address. While somebody else has it, it is tried again.
    pub async fn serve_tcp(self, addr: SocketAddr, metrics: Metrics) {
        let mut told = false;
        loop {
            match http::listen(addr) {
                Ok(listener) => {
                    tracing::debug!(%addr, "serving probes");
                    let answer = move |uri: Uri| {
                        let (health, metrics) = (self.clone(), metrics.clone());
                        async move {
                            let answer = health.probe(uri.path()).unwrap_or_else(Answer::not_found);
                            metrics.probed(uri.path(), answer.status.as_u16());
                            answer
                        }
                    };
                    return http::serve(listener, answer).await;
                }
                Err(error) if !told => {
                    told = true;
                    tracing::warn!(%addr, %error, "failed to listen for probes, trying again");
                }
                Err(_) => {}
            }
            time::sleep(LISTEN_AGAIN).await;
        }
    }

    /// Serves the commands and the probes on a socket, and tells the version.
    pub async fn serve_unix(self, listener: UnixListener) {
        let answer = move |request: Request<Incoming>| {
            let health = self.clone();
            async move {
                let uri = request.uri();
                let answer = match health.probe(uri.path()) {
                    Some(answer) => answer,
                    None => health.command(uri).await,
                };
                let mut response = answer.into_response();
                response
                    .headers_mut()
                    .insert(SERVER, HeaderValue::from_static(SERVED_BY));
                response
            }
        };
        http::serve_requests(Listener::Unix(listener), answer).await;
    }

    fn probe(&self, path: &str) -> Option<Answer> {
        let progress = self.progress.borrow();
        match path {
            "/livez" => Some(proxy_health(&progress, true)),
            "/healthz" => Some(proxy_health(&progress, false)),
            "/readyz" => Some(answer(progress.started, &progress)),
            _ => None,
        }
    }

    async fn command(mut self, uri: &Uri) -> Answer {
        match uri.path() {
            "/conditions" => Answer::of_health(true, to_json(&self.progress.borrow().conditions)),
            "/source" => Answer::of_health(true, to_json(&self.source.report())),
            "/services" => self.told(self.ask(Ask::Served).await),
            "/load" => match self.ask(Ask::Load).await {
                Some(Err(error)) => Answer::of_health(false, to_json(&Refusal { error })),
                load => self.told(load.and_then(Result::ok)),
            },
            "/names" => self.of_addresses(uri, Ask::Names).await,
            "/nodes" => self.of_addresses(uri, Ask::Nodes).await,
            "/pods" => self.of_pods(uri).await,
            "/unserved" => self.unserved(uri).await,
            "/policy-names" => self.policy_names(uri).await,
            "/closed" => match end(uri) {
                Some((addr, direction)) => {
                    self.told(self.ask(|reply| Ask::Closed(addr, direction, reply)).await)
                }
                None => Answer::not_found(),
            },
            "/log" => log_levels(uri),
            "/log/lines" => Answer::of_health(true, logging::last_lines()),
            "/explain" => self.explain(uri).await,
            "/policies" if text(uri, "pod").is_some() => self.enforced_of(uri).await,
            "/policies" => self.told(self.enforced().await),
            "/verdicts" => {
                let after = query(uri, "after").unwrap_or(0);
                self.told(self.ask(|reply| Ask::Verdicts(after, reply)).await)
            }
            "/wait" => self.wait_for(uri).await,
            "/bind" => self.bind(uri).await,
            _ => Answer::not_found(),
        }
    }

    async fn explain(&self, uri: &Uri) -> Answer {
        let answered = match explain_query(uri) {
            Ok(query) => self.ask(|reply| Ask::Explain(query, reply)).await,
            Err(error) => Some(Answered {
                error: Some(error),
                ..Answered::default()
            }),
        };
        self.told(answered)
    }

    /// What is known of those addresses in a path that are Pods'.
    async fn of_addresses(
        &self,
        uri: &Uri,
        question: fn(Vec<IpAddr>, oneshot::Sender<BTreeMap<IpAddr, String>>) -> Ask,
    ) -> Answer {
        let list = text(uri, "of").unwrap_or_default().split(',');
        let addrs = list.filter_map(|addr| addr.parse().ok()).collect();
        self.told(self.ask(|reply| question(addrs, reply)).await)
    }

    /// Those of the Pods in a path that there are.
    async fn of_pods(&self, uri: &Uri) -> Answer {
        let list = text(uri, "of").unwrap_or_default().split(',');
        let pods = list.filter_map(|pod| pod.parse().ok()).collect();
        self.told(self.ask(|reply| Ask::Pods(pods, reply)).await)
    }

    /// Why nothing is served for the Service in a path.
    async fn unserved(&self, uri: &Uri) -> Answer {
        let Some(Ok(service)) = text(uri, "service").map(str::parse::<Name>) else {
            return Answer::not_found();
        };
        self.told(self.ask(|reply| Ask::Unserved(service, reply)).await)
    }

    /// The names of the policies in a path.
    async fn policy_names(&self, uri: &Uri) -> Answer {
        let number = text(uri, "number").and_then(|number| number.parse().ok());
        let policies = match (number, end(uri)) {
            (Some(number), _) => Policies::Numbered(number),
            (None, Some((address, direction))) => Policies::Isolating(address, direction),
            (None, None) => return Answer::not_found(),
        };
        self.told(self.ask(|reply| Ask::PolicyNames(policies, reply)).await)
    }

    /// What policies say about the Pod in a path.
    async fn enforced_of(&self, uri: &Uri) -> Answer {
        let Some(Ok(pod)) = text(uri, "pod").map(str::parse::<Name>) else {
            return Answer::not_found();
        };
        match self.ask(|reply| Ask::EnforcedOf(pod, reply)).await {
            Some(None) => Answer::not_found(),
            of_pod => self.told(of_pod.flatten()),
        }
    }

    /// What policies do here; `None`: the loop does not say.
    pub async fn enforced(&self) -> Option<Enforced> {
        self.ask(Ask::Enforced).await
    }

    /// What has gone over single Services; `None`: that is switched off, or the loop has ended.
    pub async fn over_services(&self) -> Option<OverServices> {
        self.ask(Ask::OverServices).await.flatten()
    }

    /// What the loop has said; where it said nothing, why.
    fn told(&self, said: Option<impl Serialize>) -> Answer {
        match said {
            Some(said) => Answer::of_health(true, to_json(&said)),
            None => Answer::of_health(
                false,
                to_json(&Refusal {
                    error: self.silence(),
                }),
            ),
        }
    }

    /// Why the loop does not answer, as the agent's commands go on after `the agent`.
    fn silence(&self) -> String {
        if self.asks.is_closed() {
            return "ends".to_owned();
        }
        let unread = "has not read all Services, Pods and policies yet";
        match self.progress.borrow().unfollowed() {
            Some(why) => format!("{unread}: {why}"),
            None => unread.to_owned(),
        }
    }

    /// Asks the loop; `None`: it does not answer, see [`Self::silence`].
    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(question(reply)).ok()?;
        answer.await.ok()
    }

    /// Answers when a pod's policies are in force.
    async fn bind(&self, uri: &Uri) -> Answer {
        let refused = |status, reason: &str| Answer::new(status, to_json(&Refused { reason }));
        let Some((pod, claim)) = claim(uri) else {
            return refused(
                StatusCode::BAD_REQUEST,
                "the question lacks a pod or its interface",
            );
        };
        let timeout = query(uri, "timeout_ms").map_or(WAIT, Duration::from_millis);
        let (binding, mut state) = watch::channel(Binding::Waits("the agent is busy"));
        if self.asks.send(Ask::Bind(pod, claim, binding)).is_err() {
            return refused(StatusCode::SERVICE_UNAVAILABLE, "the agent ends");
        }
        let bound = state.wait_for(|state| *state == Binding::Bound);
        match time::timeout(timeout, bound).await {
            Ok(Ok(_)) => return Answer::of_health(true, "{}\n".to_owned()),
            Ok(Err(_)) => return refused(StatusCode::SERVICE_UNAVAILABLE, "the agent ends"),
            Err(_) => {}
        }
        match *state.borrow() {
            Binding::Bound => Answer::of_health(true, "{}\n".to_owned()),
            Binding::Waits(reason) => refused(StatusCode::GATEWAY_TIMEOUT, reason),
        }
    }

    async fn wait_for(&mut self, uri: &Uri) -> Answer {
        let timeout = query(uri, "timeout_ms").map_or(WAIT, Duration::from_millis);
        let done = time::timeout(timeout, self.wait()).await;
        let progress = self.progress.borrow();
        match done {
            Ok(Some(())) => answer(true, &progress),
            _ => Answer {
                status: StatusCode::GATEWAY_TIMEOUT,
                ..answer(false, &progress)
            },
        }
    }

    /// Returns when all that the source holds and the machine has at this moment is programmed.
    async fn wait(&mut self) -> Option<()> {
        let revision = loop {
            if let Some(revision) = self.rescan.now().await {
                break revision;
            }
            // The folder cannot be read at the moment.
            time::sleep(Duration::from_millis(50)).await;
        };
        // The loop's look at the machine must know the pods of this revision.
        self.progress
            .wait_for(|progress| progress.taken >= revision)
            .await
            .ok()?;
        let look = self.ask(Ask::LookAgain).await?;
        self.progress
            .wait_for(|progress| {
                progress.started && progress.revision >= revision && progress.host_revision >= look
            })
            .await
            .ok()?;
        Some(())
    }
}

/// The socket of the commands; a stale one of a killed agent is replaced.
pub fn bind_unix(path: &Path) -> anyhow::Result<UnixListener> {
    let failed = || format!("failed to listen on {}", path.display());
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(failed)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).with_context(failed),
        _ => {}
    }
    UnixListener::bind(path).with_context(failed)
}

/// A number in a query.
fn query(uri: &Uri, name: &str) -> Option<u64> {
    text(uri, name)?.parse().ok()
}

fn text<'a>(uri: &'a Uri, name: &str) -> Option<&'a str> {
    let mut pairs = uri.query()?.split('&').filter_map(|pair| pair.split_once('='));
    Some(pairs.find(|(key, _)| *key == name)?.1)
}

/// The end of flows that a path asks about.
fn end(uri: &Uri) -> Option<(IpAddr, Direction)> {
    let address = text(uri, "address")?.parse().ok()?;
    let direction = text(uri, "direction")?;
    let mut directions = Direction::ALL.into_iter();
    Some((address, directions.find(|one| one.as_str() == direction)?))
}

/// The flow that a path asks about. Names and addresses have no character that would have to be escaped.
fn explain_query(uri: &Uri) -> Result<Query, String> {
    let part = |name| text(uri, name).ok_or_else(|| format!("there is no `{name}`"));
    let source_port = text(uri, "source_port").map(str::parse::<NonZeroU16>).transpose();
    let source_port = source_port.map_err(|_| "`source_port` is no port".to_owned())?;
    let asked: Port = part("port")?.parse()?;
    if asked.proto.is_none() && source_port.is_some() {
        return Err("ICMP has no source port".to_owned());
    }
    Ok(Query {
        from: part("from")?.parse()?,
        to: part("to")?.parse()?,
        port: asked,
        source_port: source_port.map(NonZeroU16::get),
    })
}

/// What a CNI plugin tells.
fn claim(uri: &Uri) -> Option<(Name, Claim)> {
    let pod: Name = text(uri, "pod")?.parse().ok()?;
    let addrs = text(uri, "addrs")?.split(',').filter(|addr| !addr.is_empty());
    let claim = Claim {
        ifindex: text(uri, "ifindex")?.parse().ok()?,
        namespace: text(uri, "netns")?.parse().ok()?,
        addrs: addrs.map(|addr| addr.parse().ok()).collect::<Option<_>>()?,
        uid: text(uri, "uid")?.to_owned(),
    };
    (!pod.namespace().is_empty()).then_some((pod, claim))
}

/// What is asked of the log.
fn log_levels(uri: &Uri) -> Answer {
    let outcome = match (text(uri, "levels"), text(uri, "reset")) {
        (None, None) => Ok(()),
        (levels, _) => logging::set_levels(levels),
    };
    let levels = Levels {
        levels: logging::levels(),
        error: outcome.err(),
    };
    Answer::of_health(true, to_json(&levels))
}

/// `/livez` is about this process alone, `/healthz` about what load balancers should send here.
fn proxy_health(progress: &Progress, only_live: bool) -> Answer {
    let healthy = if only_live {
        progress.is_live()
    } else {
        progress.is_healthy()
    };
    let now = Timestamp::now();
    let page = ProxyHealth {
        // As kube-proxy: recent while healthy, whether or not there was anything to do.
        last_updated: if healthy { now } else { progress.synced },
        current_time: now,
        node_eligible: (!only_live).then_some(!progress.leaving),
    };
    let good = healthy && (only_live || !progress.leaving);
    Answer::of_health(good, to_json(&page))
}

fn answer(good: bool, progress: &Progress) -> Answer {
    let page = Page {
        ready: good,
        revision: progress.revision,
        source_revision: progress.taken,
        rejected: &progress.rejected,
        failed: &progress.failed,
        unfollowed: progress.unfollowed(),
    };
    Answer::of_health(good, to_json(&page))
}

fn to_json(page: &impl Serialize) -> String {
    serde_json::to_string(page).unwrap_or_default() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(progress: &Progress) -> (u16, u16) {
        let status = |only_live| proxy_health(progress, only_live).status.as_u16();
        (status(false), status(true))
    }

    #[test]
    fn what_a_cni_plugin_tells_is_read() {
        let uri = |text: &str| text.parse::<Uri>().unwrap();
        let told =
            uri("/bind?pod=shop/db-0&uid=u-1&ifindex=12&netns=3&addrs=10.244.1.5,fd00::5&timeout_ms=1");
        let (pod, claim) = claim(&told).unwrap();
        assert_eq!(pod.to_string(), "shop/db-0");
        assert_eq!((claim.ifindex, claim.namespace, &*claim.uid), (12, 3, "u-1"));
        assert_eq!(claim.addrs.len(), 2);
        for wrong in [
            "/bind",
            "/bind?pod=shop&uid=&ifindex=12&netns=3&addrs=",
            "/bind?pod=a/b&uid=&ifindex=12&netns=3&addrs=10.244.1",
        ] {
            assert!(super::claim(&uri(wrong)).is_none(), "{wrong}");
        }
    }

    /// What commands are told while the loop is silent, and what of it `wait` gets.
    #[tokio::test]
    async fn who_is_not_answered_hears_what_of_the_source_is_not_read() {
        let (progress, seen) = watch::channel(Progress::default());
        let (asks, mut asked) = mpsc::unbounded_channel();
        let (requests, _ended) = std::sync::mpsc::channel();
        let health = Health {
            progress: seen,
            rescan: Rescan::Folder(requests),
            source: source::State::Folder(std::sync::Arc::default()),
            asks,
        };
        tokio::spawn(async move { while asked.recv().await.is_some() {} });
        let ask = async |path: &'static str| {
            let answer = health.clone().command(&Uri::from_static(path)).await;
            (answer.status.as_u16(), answer.body)
        };
        let unread = "has not read all Services, Pods and policies yet";
        let refused = |error: String| (503, to_json(&Refusal { error }));
        assert_eq!(ask("/services").await, refused(unread.to_owned()));
        let down = "failed to reach the API server at https://192.0.2.1:6443: refused";
        let source = Condition {
            kind: ConditionKind::SourceFollowed,
            status: false,
            message: down.to_owned(),
        };
        progress.send_modify(|progress| progress.conditions = vec![source]);
        for path in [
            "/services",
            "/load",
            "/policies",
            "/policies?pod=a/b",
            "/verdicts",
            "/names?of=",
        ] {
            assert_eq!(ask(path).await, refused(format!("{unread}: {down}")), "{path}");
        }
        let (status, page) = ask("/wait?timeout_ms=0").await;
        assert!(status == 504 && page.contains(down), "{page}");
    }

    #[test]
    fn a_node_that_is_leaving_fails_healthz_alone() {
        let mut progress = Progress::default();
        assert_eq!(status(&progress), (503, 200), "nothing is programmed yet");
        progress.started = true;
        assert_eq!(status(&progress), (200, 200));
        progress.leaving = true;
        assert_eq!(status(&progress), (503, 200));
        let page: serde_json::Value = serde_json::from_str(&proxy_health(&progress, false).body).unwrap();
        assert_eq!(page["nodeEligible"], false);
        assert_eq!(page["lastUpdated"], page["currentTime"]);
    }

    #[test]
    fn writes_that_keep_failing_and_a_stuck_loop_are_told() {
        let ago = |age| Instant::now().checked_sub(age).unwrap();
        let mut progress = Progress {
            started: true,
            failing_since: Some(ago(STALE_AFTER / 2)),
            ..Progress::default()
        };
        assert_eq!(status(&progress), (200, 200));
        progress.failing_since = Some(ago(STALE_AFTER));
        assert_eq!(status(&progress), (503, 503));
        progress.failing_since = None;
        progress.alive = ago(ALIVE_WITHIN);
        assert_eq!(status(&progress), (503, 503));
    }
}
