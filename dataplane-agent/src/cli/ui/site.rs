//! Who may ask for what: hosts, methods and paths, and the headers of every answer.

use std::{net::IpAddr, sync::Arc};

use hyper::{
    Method, Response, StatusCode, Uri,
    header::{
        ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue,
        REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
    },
};

use super::{
    Places,
    api::{self, Reply},
};

const HTML: &str = "text/html; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

/// The page and what it loads; there is nothing else, from nowhere else.
const FILES: [(&str, &str, &str); 3] = [
    ("/", HTML, include_str!("index.html")),
    ("/ui.js", "text/javascript; charset=utf-8", include_str!("ui.js")),
    ("/ui.css", "text/css; charset=utf-8", include_str!("ui.css")),
];

/// Scripts, styles and data come from here alone, no script stands in the page, and no other page may frame it.
const HEADERS: [(HeaderName, &str); 6] = [
    (
        CONTENT_SECURITY_POLICY,
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (X_FRAME_OPTIONS, "DENY"),
    (REFERRER_POLICY, "no-referrer"),
    (CACHE_CONTROL, "no-store"),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
];

/// Where an answer is the tables': why no agent has given it.
const ALONE: HeaderName = HeaderName::from_static("x-dataplane-without-agent");

/// What is served, and to whom.
#[derive(Debug)]
pub struct Site {
    listen: IpAddr,
    /// In small letters, without ports.
    allowed: Vec<String>,
    places: Arc<Places>,
}

impl Site {
    pub fn new(listen: IpAddr, allowed: &[String], places: Places) -> Self {
        let allowed = allowed.iter().map(|host| name_of(host).to_lowercase());
        Self {
            listen,
            allowed: allowed.collect(),
            places: Arc::new(places),
        }
    }

    /// The answer to a request. `host`: what the client takes us for.
    pub async fn answer(&self, method: &Method, uri: &Uri, host: Option<&str>) -> Response<String> {
        // A request may name it twice.
        let of_uri = uri.host().unwrap_or("localhost");
        if !host.is_some_and(|host| self.is_ours(host)) || !self.is_ours(of_uri) {
            let text = format!(
                "the host {:?} is none of this page's: --allow-host allows it\n",
                host.unwrap_or_default()
            );
            return response(StatusCode::FORBIDDEN, TEXT, text);
        }
        if !matches!(*method, Method::GET | Method::HEAD) {
            let text = "this page is only read\n".to_owned();
            let mut response = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, text);
            let allow = HeaderValue::from_static("GET, HEAD");
            response.headers_mut().insert(ALLOW, allow);
            return response;
        }
        if let Some((_, content_type, text)) = FILES.iter().find(|(path, ..)| *path == uri.path()) {
            return response(StatusCode::OK, content_type, (*text).to_owned());
        }
        let (places, uri) = (self.places.clone(), uri.clone());
        // The agent's answer, or that of the kernel, is waited for.
        match tokio::task::spawn_blocking(move || api::answer(&places, &uri)).await {
            Ok(Some(Reply { status, json, alone })) => {
                let mut response = response(status, JSON, json);
                if let Some(why) = alone {
                    response.headers_mut().insert(ALONE, in_header(&why));
                }
                response
            }
            Ok(None) => response(
                StatusCode::NOT_FOUND,
                TEXT,
                "there is nothing of this name\n".to_owned(),
            ),
            Err(error) => response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error}\n")),
        }
    }

    /// A page of somebody else may lead its own name to this address, and would read here what its readers may. It cannot do that
    /// with `localhost` or an address.
    fn is_ours(&self, host: &str) -> bool {
        let name = name_of(host).to_lowercase();
        match name.parse::<IpAddr>().map(|addr| addr.to_canonical()) {
            Ok(addr) => {
                addr.is_loopback()
                    || addr == self.listen.to_canonical()
                    || self.listen.is_unspecified()
                    || self.allowed.contains(&name)
            }
            Err(_) => name == "localhost" || self.allowed.contains(&name),
        }
    }
}

/// Without its port, and an IPv6 address without brackets.
fn name_of(host: &str) -> &str {
    match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None if host.matches(':').count() == 1 => host.split(':').next().unwrap_or_default(),
        None => host,
    }
}

/// What is not ASCII, in the path of a socket for example, becomes a question mark.
fn in_header(text: &str) -> HeaderValue {
    let fits = |letter: char| {
        if matches!(letter, ' '..='~') { letter } else { '?' }
    };
    let text: String = text.chars().map(fits).collect();
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("?"))
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(listen: &str, allowed: &[&str]) -> Site {
        let allowed: Vec<String> = allowed.iter().map(|&host| host.to_owned()).collect();
        let nowhere = Places {
            socket: "/nowhere/agent.sock".into(),
            bpffs: "/nowhere/bpf".into(),
        };
        Site::new(listen.parse().unwrap(), &allowed, nowhere)
    }

    #[tokio::test]
    async fn only_our_own_names_are_answered() {
        let at_home = site("127.0.0.1", &["Node1.example:8090"]);
        let at_node = site("192.0.2.11", &[]);
        let anywhere = site("::", &[]);
        for (site, host, is_ours) in [
            (&at_home, "localhost:8090", true),
            (&at_home, "LOCALHOST", true),
            (&at_home, "127.0.0.1:8090", true),
            (&at_home, "127.8.9.10", true),
            (&at_home, "[::1]:8090", true),
            (&at_home, "node1.example", true),
            (&at_home, "node1.example:80", true),
            (&at_home, "192.0.2.11:8090", false),
            (&at_home, "evil.example", false),
            (&at_home, "localhost.evil.example", false),
            (&at_home, "127.0.0.1.evil.example:8090", false),
            (&at_home, "", false),
            (&at_home, "[", false),
            (&at_node, "192.0.2.11:8090", true),
            (&at_node, "[::ffff:192.0.2.11]:8090", true),
            (&at_node, "192.0.2.12", false),
            (&anywhere, "192.0.2.12:8090", true),
            (&anywhere, "evil.example:8090", false),
        ] {
            let answer = site
                .answer(&Method::GET, &Uri::from_static("/"), Some(host))
                .await;
            let expected = if is_ours {
                StatusCode::OK
            } else {
                StatusCode::FORBIDDEN
            };
            assert_eq!(answer.status(), expected, "{host}");
        }
        let root = Uri::from_static("/");
        let without = at_home.answer(&Method::GET, &root, None).await;
        assert_eq!(without.status(), StatusCode::FORBIDDEN);
        let twofold = Uri::from_static("http://evil.example/");
        let twofold = at_home.answer(&Method::GET, &twofold, Some("localhost")).await;
        assert_eq!(twofold.status(), StatusCode::FORBIDDEN);
    }

    #[tokio::test]
    async fn the_page_is_read_and_nothing_else() {
        let site = site("127.0.0.1", &[]);
        for (method, path, status) in [
            (Method::GET, "/", 200),
            (Method::HEAD, "/", 200),
            (Method::GET, "/ui.js", 200),
            (Method::GET, "/ui.css", 200),
            (Method::POST, "/", 405),
            (Method::DELETE, "/api/load", 405),
            (Method::OPTIONS, "/", 405),
            (Method::GET, "/index.html", 404),
            (Method::GET, "/../ui.rs", 404),
            (Method::GET, "/api", 404),
            (Method::GET, "/api/bind", 404),
            (Method::GET, "/api/load", 503),
            (Method::GET, "/api/flows", 503),
        ] {
            let uri: Uri = path.parse().unwrap();
            let answer = site.answer(&method, &uri, Some("localhost")).await;
            assert_eq!(answer.status(), status, "{method} {path}");
            for (name, value) in HEADERS {
                assert_eq!(answer.headers()[name], value, "{method} {path}");
            }
        }
    }

    #[test]
    fn any_reason_fits_into_a_header() {
        let why = "failed to reach an agent at /run/é\r\nX: y: no such file";
        assert_eq!(
            in_header(why),
            "failed to reach an agent at /run/???X: y: no such file"
        );
        assert_eq!(in_header(""), "");
    }

    #[test]
    fn the_page_has_no_script_of_its_own_and_names_nobody_else() {
        let (_, _, page) = FILES[0];
        assert_eq!(page.matches("<script").count(), 1);
        assert!(page.contains("<script src=\"ui.js\" defer></script>"));
        for inline in [
            "style=",
            "<style",
            "onclick=",
            "onload=",
            "onerror=",
            "javascript:",
        ] {
            assert!(!page.contains(inline), "{inline}");
        }
        for (path, _, text) in FILES {
            // The name of SVG is no address to load anything from.
            let names = text.matches("\"http://www.w3.org/2000/svg\"").count();
            assert_eq!(text.matches("://").count(), names, "{path}");
            assert!(
                !text.contains("\"//") && !text.replace("url(#", "").contains("url("),
                "{path}"
            );
            for dangerous in [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
            ] {
                assert!(!text.contains(dangerous), "{path}: {dangerous}");
            }
        }
    }
}
