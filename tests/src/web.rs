//! Web servers in namespaces, and a client that keeps its connection: plain HTTP/1.1, so that curl works too.

use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::netns;
use anyhow::{Context, Result};

/// Starts a server on a thread inside a namespace; it ends with the process.
pub fn serve(netns: PathBuf, name: String, port: u16) -> Result<()> {
    let (ready, started) = mpsc::channel();
    thread::spawn(move || {
        let listener = netns::join(&netns).and_then(|()| {
            // Both families: IPv4 clients appear mapped.
            TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
                .with_context(|| format!("failed to listen on port {port}"))
        });
        match listener {
            Ok(listener) => {
                let _ = ready.send(Ok(()));
                for stream in listener.incoming().flatten() {
                    let name = name.clone();
                    // A connection that breaks is the client's to report.
                    thread::spawn(move || answer(&stream, &name).ok());
                }
            }
            Err(error) => drop(ready.send(Err(error))),
        }
    });
    started.recv().context("a web server ended before it listened")?
}

/// Answers requests until the client leaves: who this is, and which client it sees.
fn answer(stream: &TcpStream, name: &str) -> std::io::Result<()> {
    let client = stream.peer_addr()?.ip().to_canonical();
    let page = format!("{name} answers {client}\n");
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut close = request.contains("HTTP/1.0");
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
                break;
            }
            close |= header.trim().eq_ignore_ascii_case("connection: close");
        }
        let length = page.len();
        let answer =
            format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\r\n{page}");
        writer.write_all(answer.as_bytes())?;
        if close {
            return Ok(());
        }
    }
}

/// A connection that asks again and again.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<TcpStream>,
}

impl Client {
    /// Connects from the calling thread's namespace.
    pub fn connect(to: SocketAddr, patience: Duration) -> std::io::Result<Self> {
        let stream = TcpStream::connect_timeout(&to, patience)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        Ok(Self {
            reader: BufReader::new(stream),
        })
    }

    /// One request; the name of who answered.
    pub fn ask(&mut self) -> std::io::Result<String> {
        self.reader
            .get_mut()
            .write_all(b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n")?;
        let mut length = 0;
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line)? == 0 {
                return Err(Error::new(
                    ErrorKind::UnexpectedEof,
                    "the server closed the connection",
                ));
            }
            if line.trim().is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("Content-Length: ") {
                length = value
                    .trim()
                    .parse()
                    .map_err(|_| Error::new(ErrorKind::InvalidData, "no length"))?;
            }
        }
        let mut page = vec![0; length];
        self.reader.read_exact(&mut page)?;
        Ok(name_in(&String::from_utf8_lossy(&page)).to_owned())
    }
}

/// The server's name: the page's first word.
pub fn name_in(page: &str) -> &str {
    page.split_whitespace().next().unwrap_or_default()
}

/// Runs `work` on a new thread inside a namespace.
pub fn in_netns(netns: &Path, work: impl FnOnce() + Send + 'static) -> thread::JoinHandle<()> {
    let netns = netns.to_owned();
    thread::spawn(move || {
        if netns::join(&netns).is_ok() {
            work();
        }
    })
}

/// `10.96.0.80:80`, `[fd00:10:96::80]:80`.
pub fn address(ip: &str, port: u16) -> Result<SocketAddr> {
    let ip: IpAddr = ip.parse().with_context(|| format!("{ip} is no address"))?;
    Ok(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_kept_connection_is_answered_again_and_again() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        thread::spawn(move || answer(&listener.accept().unwrap().0, "web-9"));
        let mut client = Client::connect(to, Duration::from_secs(1)).unwrap();
        assert_eq!(client.ask().unwrap(), "web-9");
        assert_eq!(client.ask().unwrap(), "web-9");
    }
}
