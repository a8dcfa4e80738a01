//! HTTP for probes and for the agent's own commands: one request a connection, bounded in time and number.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use hyper::{
    Request, Response, StatusCode, Uri,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    task::JoinSet,
    time,
};

/// A client has so long to say what it wants.
const REQUEST_WITHIN: Duration = Duration::from_secs(5);
/// Connections of one listener; more wait in the kernel's queue.
const CONNECTIONS_AT_MOST: usize = 64;
/// After a failed accept (no file descriptor is left, for example).
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// The endpoints behind a load balancer's health check, as kube-proxy tells them.
pub const ENDPOINT_WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// The type of Prometheus' text format.
const PROMETHEUS_TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: StatusCode,
    /// The value of [`ENDPOINT_WEIGHT`].
    pub weight: Option<usize>,
    pub body: String,
    pub content_type: HeaderValue,
}

impl Answer {
    /// An answer in JSON.
    pub fn new(status: StatusCode, json: String) -> Self {
        Self {
            status,
            weight: None,
            body: json,
            content_type: JSON,
        }
    }

    /// A page of metrics.
    pub fn text(page: String) -> Self {
        Self {
            content_type: PROMETHEUS_TEXT,
            ..Self::new(StatusCode::OK, page)
        }
    }

    /// 200 or 503.
    pub fn of_health(good: bool, json: String) -> Self {
        let status = if good {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        Self::new(status, json)
    }

    pub fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "{}\n".to_owned())
    }

    pub fn into_response(self) -> Response<String> {
        let Self {
            status,
            weight,
            body,
            content_type,
        } = self;
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, content_type);
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if let Some(weight) = weight {
            headers.insert(ENDPOINT_WEIGHT, HeaderValue::from(weight));
        }
        response
    }
}

/// Something to accept connections on.
#[derive(Debug)]
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Listens on an address. `[::]` means IPv4 too, also on a machine without IPv6.
pub fn listen(addr: SocketAddr) -> io::Result<Listener> {
    let listener = match std::net::TcpListener::bind(addr) {
        Err(error)
            if addr.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
                && error.raw_os_error() == Some(libc::EAFNOSUPPORT) =>
        {
            std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, addr.port()))?
        }
        outcome => outcome?,
    };
    listener.set_nonblocking(true)?;
    Ok(Listener::Tcp(TcpListener::from_std(listener)?))
}

/// Answers requests, whatever their methods and headers, until it is dropped, which ends its connections too.
pub async fn serve<F, A>(listener: Listener, answer: F)
where
    F: Fn(Uri) -> A + Clone + Send + 'static,
    A: Future<Output = Answer> + Send + 'static,
{
    serve_requests(listener, move |request| {
        let answer = answer(request.uri().clone());
        async { answer.await.into_response() }
    })
    .await;
}

/// Answers requests until it is dropped, which ends its connections too.
pub async fn serve_requests<F, A>(listener: Listener, answer: F)
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Response<String>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= CONNECTIONS_AT_MOST {
            connections.join_next().await;
        }
        let answer = answer.clone();
        let accepted = match &listener {
            Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                connections.spawn(connection(stream, answer));
            }),
            Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| {
                connections.spawn(connection(stream, answer));
            }),
        };
        if accepted.is_err() {
            time::sleep(ACCEPT_AGAIN).await;
        }
    }
}

async fn connection<F, A>(stream: impl AsyncRead + AsyncWrite + Unpin, answer: F)
where
    F: Fn(Request<Incoming>) -> A,
    A: Future<Output = Response<String>>,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = answer(request);
        async { Ok::<_, Infallible>(answer.await) }
    });
    // A client that speaks no HTTP, or has gone: nobody else wants the answer.
    let _gone = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_WITHIN)
        .keep_alive(false)
        .title_case_headers(true)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}
