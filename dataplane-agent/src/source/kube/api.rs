//! Requests to the API server: with which credentials, at which of its addresses, and what came of it.

use std::{
    error::Error,
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use ::kube::{
    Client, Config,
    client::Body,
    config::{KubeConfigOptions, Kubeconfig},
};
use anyhow::Context;
use http_body_util::BodyExt;
use hyper::{
    Method, Request, Uri,
    body::Bytes,
    header::{self, HeaderValue},
};
use serde::Deserialize;
use tokio::time;

use super::state::State;

/// A server that accepts no connection within this time is given up.
const CONNECT: Duration = Duration::from_secs(5);
/// The answer to a request begins within this time, and so does every further part of a list.
const ANSWER: Duration = Duration::from_secs(30);
/// Of an answer that says no, this much is read.
const REFUSAL_AT_MOST: usize = 64 << 10;

/// Begins a certificate in a file (RFC 7468).
const CERTIFICATE: &[u8] = b"-----BEGIN CERTIFICATE-----";
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const USER_AGENT: &str = concat!("dataplane-agent/", env!("CARGO_PKG_VERSION"));

/// Where the API server is and who we are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Address {
    /// `None`: the service account of the pod that we run in.
    pub kubeconfig: Option<PathBuf>,
    /// Addresses to use in place of the kubeconfig's, or of what Kubernetes tells pods.
    pub servers: Vec<String>,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    #[error("failed to reach the API server at {server}: {reason}")]
    Unreachable { server: String, reason: String },
    #[error("failed to use the credentials: {reason}")]
    Credentials { reason: String },
    #[error("the API server at {server} was silent for {seconds} s")]
    Silent { server: String, seconds: u64 },
    #[error("the answer of the API server at {server} broke off: {reason}")]
    Broken { server: String, reason: String },
    #[error("the API server refuses the agent's credentials: {message}")]
    Unauthorized { message: String },
    #[error("the agent may not do this: {message}")]
    Forbidden { message: String },
    #[error("the API server knows no such thing: {message}")]
    NotFound { message: String },
    #[error("the API server has forgotten this version: {message}")]
    Gone { message: String },
    #[error("the API server answers with status {code}: {message}")]
    Status {
        code: u16,
        message: String,
        retry_after: Option<Duration>,
    },
    #[error("failed to read the API server's answer: {reason}")]
    Unreadable { reason: String },
}

impl ApiError {
    /// How long the server asks us to wait.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            ApiError::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// Whether it is about the server and not about what was asked.
    pub fn is_of_the_server(&self) -> bool {
        match self {
            ApiError::Unreachable { .. }
            | ApiError::Credentials { .. }
            | ApiError::Silent { .. }
            | ApiError::Unauthorized { .. } => true,
            ApiError::Broken { .. }
            | ApiError::Forbidden { .. }
            | ApiError::NotFound { .. }
            | ApiError::Gone { .. }
            | ApiError::Status { .. }
            | ApiError::Unreadable { .. } => false,
        }
    }

    pub fn unreadable(error: &serde_json::Error) -> Self {
        ApiError::Unreadable {
            reason: error.to_string(),
        }
    }
}

/// The API server.
#[derive(Debug)]
pub struct Api {
    config: Config,
    /// Holds a token that others may replace.
    token_file: Option<PathBuf>,
    servers: Vec<Uri>,
    current: Mutex<Current>,
    state: State,
}

struct Current {
    place: usize,
    /// Grows when something is wrong with the client, so that of many requests that fail together one counts.
    generation: u64,
    client: Option<Client>,
}

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Current")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl Api {
    /// Reads what says where the server is. It may be down.
    pub async fn new(address: &Address, state: State) -> anyhow::Result<Self> {
        let servers = address
            .servers
            .iter()
            .map(|server| parse_server(server, "--apiserver"));
        let mut servers = servers.collect::<anyhow::Result<Vec<Uri>>>()?;
        let mut config = match &address.kubeconfig {
            Some(path) => {
                let failed = || format!("failed to read the kubeconfig {}", path.display());
                let kubeconfig = Kubeconfig::read_from(path).with_context(failed)?;
                let options = KubeConfigOptions::default();
                let config = Config::from_custom_kubeconfig(kubeconfig, &options)
                    .await
                    .with_context(failed)?;
                let believes_nobody = config.root_cert.as_ref().is_some_and(Vec::is_empty);
                anyhow::ensure!(
                    !believes_nobody,
                    "the certificate authority of {} holds no certificate",
                    path.display()
                );
                config
            }
            None if servers.is_empty() => Config::incluster_env().context(
                "there is no API server: give --kubeconfig, or --apiserver, or run in a pod with a service account",
            )?,
            None => of_service_account(servers.first().cloned().unwrap_or_default()),
        };
        if servers.is_empty() {
            let of = address.kubeconfig.as_ref();
            let of = of.map_or_else(
                || "KUBERNETES_SERVICE_HOST".to_owned(),
                |path| path.display().to_string(),
            );
            servers.push(parse_server(
                config.cluster_url.to_string().trim_end_matches('/'),
                &of,
            )?);
        }
        // It is read for each request, and goes before a token beside it, as with kubectl.
        let token_file = config.auth_info.token_file.take().map(PathBuf::from);
        if token_file.is_some() {
            config.auth_info.token = None;
        }
        if config.accept_invalid_certs {
            // Nobody is asked, so the system's store need not be there.
            config.root_cert.get_or_insert_default();
        }
        config.connect_timeout = Some(CONNECT);
        config.read_timeout = None;
        config.default_retry = false;
        Ok(Self {
            config,
            token_file,
            servers,
            current: Mutex::new(Current {
                place: 0,
                generation: 0,
                client: None,
            }),
            state,
        })
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    /// The servers' addresses, of those that are told by their addresses.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.servers.iter().filter_map(address).collect()
    }

    /// Reads a path to the end.
    pub async fn get(&self, path: &str, accept: &'static str) -> Result<Vec<u8>, ApiError> {
        self.open(Method::GET, path, accept, None).await?.whole().await
    }

    /// Sends a document of a type; the answer is of no interest, so what can be left out of it is.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: &'static str,
        document: &serde_json::Value,
    ) -> Result<(), ApiError> {
        let body = Some((content_type, document.to_string()));
        self.open(method, path, METADATA, body)
            .await?
            .whole()
            .await
            .map(drop)
    }

    /// Begins to read a path, which may never end.
    pub async fn stream(&self, path: &str) -> Result<Answer<'_>, ApiError> {
        self.open(Method::GET, path, JSON, None).await
    }

    async fn open(
        &self,
        method: Method,
        path: &str,
        accept: &'static str,
        body: Option<(&'static str, String)>,
    ) -> Result<Answer<'_>, ApiError> {
        let (client, generation, server) = self.client()?;
        let answered = |status| self.state.answered(&server, method.as_str(), status);
        let mut request = Request::builder()
            .method(method.clone())
            .uri(path)
            .header(header::ACCEPT, accept)
            .header(header::USER_AGENT, USER_AGENT);
        if let Some(token) = self.token()? {
            request = request.header(header::AUTHORIZATION, token);
        }
        let mut content = Body::empty();
        if let Some((content_type, document)) = body {
            request = request.header(header::CONTENT_TYPE, content_type);
            content = Body::from(document.into_bytes());
        }
        let request = request.body(content).map_err(|error| ApiError::Unreadable {
            reason: format!("{path}: {error}"),
        })?;
        self.state.requested(&server);
        let response = match time::timeout(ANSWER, client.send(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => {
                answered(None);
                self.failed(generation, true);
                let reason = deepest(&error);
                return Err(ApiError::Unreachable { server, reason });
            }
            Err(_) => {
                answered(None);
                self.failed(generation, true);
                let seconds = ANSWER.as_secs();
                return Err(ApiError::Silent { server, seconds });
            }
        };
        let status = response.status();
        answered(Some(status.as_u16()));
        let retry_after = response.headers().get(header::RETRY_AFTER);
        let retry_after = retry_after.and_then(|value| value.to_str().ok()?.parse().ok());
        let mut answer = Answer {
            api: self,
            server,
            generation,
            body: response.into_body(),
        };
        if status.is_success() {
            return Ok(answer);
        }
        // The next try takes the credentials anew.
        if status.as_u16() == 401 || status.is_server_error() {
            self.failed(generation, status.is_server_error());
        }
        let text = answer.beginning(REFUSAL_AT_MOST).await;
        Err(refusal(
            status.as_u16(),
            &text,
            retry_after.map(Duration::from_secs),
        ))
    }

    fn client(&self) -> Result<(Client, u64, String), ApiError> {
        let mut current = self.lock();
        let server = self.servers.get(current.place).cloned().unwrap_or_default();
        let shown = server.to_string().trim_end_matches('/').to_owned();
        if let Some(client) = &current.client {
            return Ok((client.clone(), current.generation, shown));
        }
        if let Some(path) = &self.config.root_cert_file {
            let refused = |reason: &str| ApiError::Credentials {
                reason: format!("the certificates' file {}: {reason}", path.display()),
            };
            let text = fs::read(path).map_err(|error| refused(&error.to_string()))?;
            if !text.windows(CERTIFICATE.len()).any(|part| part == CERTIFICATE) {
                return Err(refused("it holds no certificate"));
            }
        }
        let mut config = self.config.clone();
        config.cluster_url = server;
        let client = Client::try_from(config).map_err(|error| ApiError::Credentials {
            reason: error.to_string(),
        })?;
        current.client = Some(client.clone());
        Ok((client, current.generation, shown))
    }

    /// What the token's file says now.
    fn token(&self) -> Result<Option<HeaderValue>, ApiError> {
        let Some(path) = &self.token_file else {
            return Ok(None);
        };
        let refused = |reason: &str| ApiError::Credentials {
            reason: format!("the token's file {}: {reason}", path.display()),
        };
        let text = fs::read_to_string(path).map_err(|error| refused(&error.to_string()))?;
        let token = text.trim();
        if token.is_empty() {
            return Err(refused("it is empty"));
        }
        let mut value = HeaderValue::try_from(format!("Bearer {token}"))
            .map_err(|_| refused("it holds more than a token"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    /// Makes the next request use a new connection, of the next server when this one is to blame.
    fn failed(&self, generation: u64, next: bool) {
        let mut current = self.lock();
        if current.generation == generation {
            current.generation += 1;
            current.client = None;
            if next {
                current.place = (current.place + 1) % self.servers.len().max(1);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The type of ordinary answers.
pub const JSON: &str = "application/json";
/// The type of an object without its contents, where the server knows it.
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json";
/// The type of documents that name what changes.
pub const MERGE_PATCH: &str = "application/merge-patch+json";
/// The type of lists without the objects' contents.
pub const NAMES: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";

/// An answer that is being read.
#[derive(Debug)]
pub struct Answer<'a> {
    api: &'a Api,
    server: String,
    generation: u64,
    body: Body,
}

impl Answer<'_> {
    /// The next part; `None` at the end. The server may be silent for `within`.
    pub async fn part(&mut self, within: Duration) -> Result<Option<Bytes>, ApiError> {
        loop {
            match time::timeout(within, self.body.frame()).await {
                Ok(None) => return Ok(None),
                Ok(Some(Ok(frame))) => {
                    if let Ok(bytes) = frame.into_data() {
                        self.api.state.received(bytes.len());
                        return Ok(Some(bytes));
                    }
                }
                Ok(Some(Err(error))) => {
                    return Err(ApiError::Broken {
                        server: self.server.clone(),
                        reason: deepest(&error),
                    });
                }
                Err(_) => {
                    return Err(ApiError::Silent {
                        server: self.server.clone(),
                        seconds: within.as_secs(),
                    });
                }
            }
        }
    }

    async fn whole(mut self) -> Result<Vec<u8>, ApiError> {
        let mut whole = Vec::new();
        loop {
            match self.part(ANSWER).await {
                Ok(Some(part)) => whole.extend_from_slice(&part),
                Ok(None) => return Ok(whole),
                Err(error) => {
                    self.api.failed(self.generation, true);
                    return Err(error);
                }
            }
        }
    }

    /// As much as comes of the first so many bytes.
    async fn beginning(&mut self, at_most: usize) -> Vec<u8> {
        let mut text = Vec::new();
        while let Ok(Some(part)) = self.part(ANSWER).await {
            text.extend_from_slice(&part);
            if text.len() >= at_most {
                break;
            }
        }
        text
    }
}

/// What the API server says when it says no.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Refusal {
    pub code: u16,
    pub message: String,
    details: Option<Details>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Details {
    retry_after_seconds: Option<u64>,
}

impl Refusal {
    pub fn error(self, retry_after: Option<Duration>) -> ApiError {
        let Refusal {
            code,
            message,
            details,
        } = self;
        let seconds = details.and_then(|details| details.retry_after_seconds);
        match code {
            401 => ApiError::Unauthorized { message },
            403 => ApiError::Forbidden { message },
            404 => ApiError::NotFound { message },
            410 => ApiError::Gone { message },
            code => ApiError::Status {
                code,
                message,
                retry_after: retry_after.or(seconds.map(Duration::from_secs)),
            },
        }
    }
}

fn refusal(code: u16, text: &[u8], retry_after: Option<Duration>) -> ApiError {
    let refusal: Refusal = serde_json::from_slice(text).unwrap_or_default();
    let message = if refusal.message.is_empty() {
        // Whoever answers in its place, a proxy perhaps, says it in other ways.
        let text = String::from_utf8_lossy(text);
        text.lines()
            .next()
            .unwrap_or_default()
            .chars()
            .take(200)
            .collect()
    } else {
        refusal.message
    };
    let refusal = Refusal {
        code,
        message,
        details: refusal.details,
    };
    refusal.error(retry_after)
}

/// `of`: what says so.
fn parse_server(text: &str, of: &str) -> anyhow::Result<Uri> {
    let no_address = || format!("{of}: `{text}` is no address such as https://192.0.2.1:6443");
    let uri: Uri = text.parse().with_context(no_address)?;
    let has_host = uri.host().is_some_and(|host| !host.is_empty());
    let ends_with_host = uri
        .authority()
        .zip(uri.host())
        .is_some_and(|(authority, host)| authority.as_str().ends_with(host));
    anyhow::ensure!(
        matches!(uri.scheme_str(), Some("https" | "http"))
            && has_host
            && (ends_with_host || uri.port_u16().is_some()),
        no_address()
    );
    Ok(uri)
}

/// A server's address and port, if it is told by its address.
fn address(server: &Uri) -> Option<SocketAddr> {
    let host = server.host()?;
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse().ok()?;
    let port = if server.scheme_str() == Some("http") {
        80
    } else {
        443
    };
    Some(SocketAddr::new(ip, server.port_u16().unwrap_or(port)))
}

/// What every pod is given, but for the address: it leads to the API server through a Service, which we may have to
/// serve first.
fn of_service_account(server: Uri) -> Config {
    let mut config = Config::new(server);
    // The file alone says whom to believe. With no list at all the system's store would be asked for, which an image may lack.
    config.root_cert = Some(Vec::new());
    config.root_cert_file = Some(format!("{SERVICE_ACCOUNT}/ca.crt").into());
    config.auth_info.token_file = Some(format!("{SERVICE_ACCOUNT}/token"));
    config
}

/// The cause of causes: what wraps it says little more than that there was an error.
fn deepest(error: &(dyn Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    let text = error.to_string();
    // What tokio says of the time that a connection may take, which holds the question for a name too.
    if text == "deadline has elapsed" {
        return format!("no connection within {} s", CONNECT.as_secs());
    }
    text
}

#[cfg(test)]
mod tests {
    use prometheus::Registry;

    use super::*;
    use crate::metrics::source::SourceMetrics;

    fn state() -> State {
        State::new(SourceMetrics::new(&Registry::new()).unwrap())
    }

    #[test]
    fn refusals_are_told_apart() {
        let status =
            br#"{"kind":"Status","code":403,"message":"pods is forbidden","details":{"kind":"pods"}}"#;
        let forbidden = refusal(403, status, None);
        assert_eq!(
            forbidden.to_string(),
            "the agent may not do this: pods is forbidden"
        );
        let busy = refusal(
            429,
            br#"{"message":"slow down","details":{"retryAfterSeconds":3}}"#,
            None,
        );
        assert_eq!(busy.retry_after(), Some(Duration::from_secs(3)));
        let proxy = refusal(502, b"<html>bad gateway\n</html>", Some(Duration::from_secs(7)));
        assert_eq!(
            proxy.to_string(),
            "the API server answers with status 502: <html>bad gateway"
        );
        assert_eq!(proxy.retry_after(), Some(Duration::from_secs(7)));
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for right in [
            "https://[2001:db8::1]:6443",
            "https://[2001:db8::1]",
            "http://a",
            "https://a:1/path",
        ] {
            assert!(parse_server(right, "--apiserver").is_ok(), "{right}");
        }
        let wrongs = [
            "192.0.2.1:6443",
            "192.0.2.1",
            "ftp://a",
            "https://",
            "a b",
            "https://a:99999",
            "https://a:",
        ];
        for wrong in wrongs {
            let error = parse_server(wrong, "--apiserver").unwrap_err().to_string();
            assert!(error.contains("--apiserver"), "{wrong}: {error}");
        }
    }

    #[test]
    fn servers_have_addresses_and_ports() {
        for (server, expected) in [
            ("https://192.0.2.1:6443", Some("192.0.2.1:6443")),
            ("https://192.0.2.1", Some("192.0.2.1:443")),
            ("http://[2001:db8::1]", Some("[2001:db8::1]:80")),
            ("https://api.example.org:6443", None),
        ] {
            let found = address(&server.parse().unwrap());
            assert_eq!(found, expected.map(|addr| addr.parse().unwrap()), "{server}");
        }
    }

    #[tokio::test]
    async fn a_kubeconfigs_server_without_a_scheme_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config");
        let config = "{clusters: [{name: c, cluster: {server: '192.0.2.1:6443'}}], \
            users: [{name: u, user: {}}], \
            contexts: [{name: x, context: {cluster: c, user: u}}], current-context: x}";
        fs::write(&path, config).unwrap();
        let address = Address {
            kubeconfig: Some(path.clone()),
            servers: Vec::new(),
        };
        let error = Api::new(&address, state()).await.unwrap_err().to_string();
        assert!(
            error.contains("192.0.2.1:6443") && error.contains(&*path.to_string_lossy()),
            "{error}"
        );
    }

    #[tokio::test]
    async fn an_authority_without_a_certificate_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let authority = folder.path().join("ca.crt");
        fs::write(&authority, "hello").unwrap();
        let path = folder.path().join("config");
        let config = format!(
            "{{clusters: [{{name: c, cluster: {{server: 'https://192.0.2.1', certificate-authority: '{}'}}}}], \
            users: [{{name: u, user: {{}}}}], \
            contexts: [{{name: x, context: {{cluster: c, user: u}}}}], current-context: x}}",
            authority.display()
        );
        fs::write(&path, config).unwrap();
        let address = Address {
            kubeconfig: Some(path),
            servers: Vec::new(),
        };
        let error = Api::new(&address, state()).await.unwrap_err().to_string();
        assert!(error.contains("holds no certificate"), "{error}");
    }

    #[tokio::test]
    async fn a_token_may_end_its_line_and_must_be_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let mut config = Config::new("https://192.0.2.1".parse().unwrap());
        config.auth_info.token_file = None;
        let api = Api {
            config,
            token_file: Some(path.clone()),
            servers: Vec::new(),
            current: Mutex::new(Current {
                place: 0,
                generation: 0,
                client: None,
            }),
            state: state(),
        };
        for (text, expected) in [
            (None, Err("No such file")),
            (Some("abc.def\n"), Ok("Bearer abc.def")),
            (Some(" \n"), Err("empty")),
            (Some("two\nlines"), Err("more than a token")),
        ] {
            if let Some(text) = text {
                fs::write(&path, text).unwrap();
            }
            match (api.token(), expected) {
                (Ok(token), Ok(expected)) => assert_eq!(token.unwrap(), expected),
                (Err(error), Err(expected)) => {
                    let error = error.to_string();
                    assert!(error.contains(expected) && error.contains("token"), "{error}");
                }
                (token, _) => panic!("{text:?}: {token:?}"),
            }
        }
    }
}
