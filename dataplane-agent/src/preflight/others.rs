//! Who else is at work on this node: kube-proxy, policy engines, BPF programs at the same hooks, owners of the agent's ports.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use super::Rows;
use crate::{
    attach::{inspect, state::State},
    config::Config,
    netlink::{
        firewall,
        kube_proxy::{self, Rules},
        tables::Tables,
    },
};

/// Where kube-proxy tells its mode.
const PROXY_MODE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
const PROXY_PATIENCE: Duration = Duration::from_secs(1);

pub(super) fn look(rows: &mut Rows<'_>, config: &Config, tables: &Tables, may_load: bool) {
    match kube_proxy::find(&tables.links) {
        Ok(found) if found.is_empty() => rows.ok("kube-proxy's rules", "none"),
        Ok(found) => {
            let places: Vec<String> = found.iter().map(Rules::to_string).collect();
            let mut modes: Vec<&str> = found.iter().map(|rules| rules.mode()).collect();
            modes.dedup();
            rows.note(
                "kube-proxy's rules",
                format!("{} mode: {}", modes.join(" and "), places.join(", ")),
                "connections that it has begun go on, new ones are the agent's; then end its DaemonSet and remove them (docs/migration.md)",
            );
        }
        Err(error) => rows.note(
            "kube-proxy's rules",
            error.to_string(),
            "failed to list netfilter's chains",
        ),
    }
    let running = State::is_running(&config.bpffs);
    match proxy_mode(PROXY_MODE) {
        Some(mode) if !running => rows.note(
            "kube-proxy",
            format!("runs in {mode} mode"),
            "it has ports 10249 and 10256 until it ends; the agent starts beside it (docs/migration.md)",
        ),
        _ => rows.ok("kube-proxy", "does not run, or does not tell its mode"),
    }
    if !running {
        for (subject, addr) in [
            ("--health-addr", config.health_addr),
            ("--metrics-bind-address", config.metrics_addr),
        ] {
            let Some(addr) = addr else { continue };
            match TcpListener::bind(addr) {
                Ok(_) => rows.ok(subject, format!("{addr} is free")),
                Err(error) => rows.note(
                    subject,
                    format!("{addr}: {error}"),
                    "tried again until it is free; probes fail meanwhile, packets do not",
                ),
            }
        }
    }
    match firewall::policy_engine() {
        Ok(None) => rows.ok("policy engines", "none"),
        Ok(Some(chain)) => rows.note(
            "policy engines",
            chain,
            "packets between Pods of this node pass netfilter too while it is there (--fast-path auto); two engines mean that both have to allow",
        ),
        Err(error) => rows.note("policy engines", error.to_string(), "failed to list netfilter's chains"),
    }
    if may_load {
        programs(rows, config);
    }
}

/// What `/proxyMode` says.
fn proxy_mode(addr: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&addr, PROXY_PATIENCE).ok()?;
    stream.set_read_timeout(Some(PROXY_PATIENCE)).ok()?;
    stream
        .write_all(b"GET /proxyMode HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .ok()?;
    let mut answer = String::new();
    stream.take(4096).read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    // Other servers may be there; kube-proxy answers with a word.
    let is_word = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric());
    let body = body
        .lines()
        .map(str::trim)
        .find(|line| line.len() > 2 && is_word(line))?;
    head.starts_with("HTTP/1.1 200").then(|| body.to_owned())
}

/// Programs of others at the hooks that the agent uses.
fn programs(rows: &mut Rows<'_>, config: &Config) {
    let attachments = match inspect::attachments(&config.bpffs, config.cgroup.as_deref()) {
        Ok(attachments) => attachments,
        Err(error) => {
            rows.note(
                "BPF programs",
                error.to_string(),
                "failed to query what is attached",
            );
            return;
        }
    };
    let mut any = false;
    for other in attachments.iter().filter(|one| !one.ours) {
        any = true;
        let meaning = match other.hook.as_str() {
            "xdp" => "a device has one XDP program: TC does the agent's work there",
            "tc ingress" | "tc egress" => {
                "the agent's run before it, and what they hand on directly does not pass it"
            }
            _ => "both run; what it rewrites, the agent's hooks see as it does or does not, by their order",
        };
        rows.note(
            format!("{} {}", other.target, other.hook),
            format!("{} (id {}, {})", other.program, other.program_id, other.mode),
            meaning,
        );
    }
    if !any {
        rows.ok("BPF programs", "none of others at the agent's hooks");
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// What [`proxy_mode`] makes of an answer.
    fn told(answer: &'static str) -> Option<String> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let read = stream.read(&mut request).unwrap();
            assert!(request[..read].starts_with(b"GET /proxyMode "));
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let told = proxy_mode(addr);
        server.join().unwrap();
        told
    }

    #[test]
    fn the_mode_is_the_word_that_kube_proxy_says() {
        assert_eq!(
            told("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\niptables").as_deref(),
            Some("iptables")
        );
        assert_eq!(told("HTTP/1.1 404 Not Found\r\n\r\nnothing"), None);
        assert_eq!(told("HTTP/1.1 200 OK\r\n\r\n<html>a page</html>"), None);
        assert_eq!(told(""), None);
    }
}
