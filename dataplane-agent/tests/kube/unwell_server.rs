//! A server of plain HTTP that lists and watches a few objects as the API server does, and can be made to misbehave in ways that
//! a real one cannot be asked for.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::seen::NODE;

const STEP: Duration = Duration::from_millis(20);
/// What follows them is not there.
const PREFIXES: [&str; 3] = [
    "/api/v1/",
    "/apis/discovery.k8s.io/v1/",
    "/apis/networking.k8s.io/v1/",
];

/// How requests are answered. What is being answered goes on, but for [`Mood::Hushed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Well,
    /// With a status, and how many seconds to stay away.
    Refusing(u16, Option<u64>),
    /// A byte at a time, so many a second.
    Slow(u32),
    /// Never.
    Silent,
    /// To the middle of the body, and no further.
    Stuck,
    /// Watches that are there tell nothing any more, whatever comes later. All else is well.
    Hushed,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Asked {
    pub at: Instant,
    pub path: String,
}

/// The server. Dropping it ends its connections.
pub struct Unwell {
    port: u16,
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    mood: Mood,
    /// The only one that is good.
    token: String,
    version: u64,
    objects: BTreeMap<(String, String), Value>,
    /// With the version and the collection of each.
    changes: Vec<(u64, String, Value)>,
    asked: Vec<Asked>,
    connections: Vec<TcpStream>,
}

impl Unwell {
    pub fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Mutex::new(Shared {
            mood: Mood::Well,
            token: "first".to_owned(),
            version: 1,
            objects: BTreeMap::new(),
            changes: Vec::new(),
            asked: Vec::new(),
            connections: Vec::new(),
        }));
        let of_thread = shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = of_thread.clone();
                lock(&shared).connections.extend(stream.try_clone());
                // Whoever hangs up has what it wants.
                thread::spawn(move || serve(&stream, &shared).unwrap_or_default());
            }
        });
        let server = Self { port, shared };
        server.apply("nodes", "", NODE, &json!({}));
        server
    }

    /// A kubeconfig with a file for its token, which is good.
    pub fn kubeconfig(&self, dir: &Path) -> PathBuf {
        let path = dir.join("kubeconfig");
        let token = Self::token_file(dir);
        fs::write(&token, "first").unwrap();
        let (port, token) = (self.port, token.display());
        let text = format!(
            "apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: \"http://127.0.0.1:{port}\"}}}}]
users: [{{name: agent, user: {{tokenFile: {token}}}}}]
contexts: [{{name: test, context: {{cluster: test, user: agent}}}}]
current-context: test
"
        );
        fs::write(&path, text).unwrap();
        path
    }

    pub fn token_file(dir: &Path) -> PathBuf {
        dir.join("token")
    }

    pub fn be(&self, mood: Mood) {
        lock(&self.shared).mood = mood;
    }

    /// From now on another token is good.
    pub fn ask_for(&self, token: &str) {
        token.clone_into(&mut lock(&self.shared).token);
    }

    /// Cuts all connections; new ones are served.
    pub fn cut(&self) {
        for stream in lock(&self.shared).connections.drain(..) {
            // It may have ended by itself.
            let _gone = stream.shutdown(Shutdown::Both);
        }
    }

    pub fn apply(&self, collection: &str, namespace: &str, name: &str, spec: &Value) {
        let mut shared = lock(&self.shared);
        let key = (collection.to_owned(), format!("{namespace}/{name}"));
        let kind = if shared.objects.contains_key(&key) {
            "MODIFIED"
        } else {
            "ADDED"
        };
        let object = json!({"metadata": {"name": name, "namespace": namespace}, "spec": spec});
        let object = shared.change(collection, kind, object);
        shared.objects.insert(key, object);
    }

    pub fn delete(&self, collection: &str, namespace: &str, name: &str) {
        let mut shared = lock(&self.shared);
        let key = (collection.to_owned(), format!("{namespace}/{name}"));
        let object = shared.objects.remove(&key).unwrap();
        shared.change(collection, "DELETED", object);
    }

    /// What was asked since then of a collection.
    pub fn asked(&self, collection: &str, since: Instant) -> Vec<Asked> {
        let shared = lock(&self.shared);
        let path = format!("/{collection}?");
        let asked = shared.asked.iter();
        asked
            .filter(|one| one.at >= since && one.path.contains(&path))
            .cloned()
            .collect()
    }
}

impl Drop for Unwell {
    fn drop(&mut self) {
        self.be(Mood::Silent);
        self.cut();
    }
}

impl Shared {
    fn change(&mut self, collection: &str, kind: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let event = json!({"type": kind, "object": object});
        self.changes.push((self.version, collection.to_owned(), event));
        object
    }

    fn list(&self, collection: &str) -> String {
        let of_collection = self.objects.iter().filter(|((of, _), _)| of == collection);
        let items: Vec<&Value> = of_collection.map(|(_, object)| object).collect();
        json!({"metadata": {"resourceVersion": self.version.to_string()}, "items": items}).to_string()
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers requests until the client hangs up.
fn serve(mut stream: &TcpStream, shared: &Mutex<Shared>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if line == "\r\n" {
                break;
            }
            head.push(line.trim_end().to_owned());
        }
        let path = head[0].split(' ').nth(1).unwrap_or_default().to_owned();
        let (mood, token) = {
            let mut shared = lock(shared);
            let at = Instant::now();
            let path = path.clone();
            shared.asked.push(Asked { at, path });
            (shared.mood, shared.token.clone())
        };
        let is_good = head
            .iter()
            .any(|line| line.to_lowercase() == format!("authorization: bearer {token}"));
        let found = PREFIXES.iter().find_map(|prefix| path.strip_prefix(prefix));
        let (status, body, retry_after) = match (mood, found) {
            (Mood::Silent, _) => {
                // Until the other side gives up.
                reader.read_exact(&mut [0])?;
                return Ok(());
            }
            (Mood::Refusing(status, retry_after), _) => (status, "out of order".to_owned(), retry_after),
            _ if !is_good => (401, "who is that?".to_owned(), None),
            (_, Some(found)) => {
                let (collection, query) = found.split_once('?').unwrap_or((found, ""));
                let from = |query: &str| {
                    let part = query
                        .split('&')
                        .find_map(|part| part.strip_prefix("resourceVersion="));
                    part?.parse().ok()
                };
                if let (true, Some(from)) = (query.contains("watch=true"), from(query)) {
                    return watch(stream, shared, collection, from);
                }
                (200, lock(shared).list(collection), None)
            }
            (_, None) => (404, "there is no such thing".to_owned(), None),
        };
        let asks = retry_after.map_or_else(String::new, |seconds| format!("Retry-After: {seconds}\r\n"));
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 {status} Status\r\nContent-Length: {length}\r\n{asks}\r\n"
        )?;
        match mood {
            Mood::Slow(bytes) => {
                for byte in body.bytes() {
                    stream.write_all(&[byte])?;
                    thread::sleep(Duration::from_secs(1) / bytes);
                }
            }
            Mood::Stuck => {
                stream.write_all(&body.as_bytes()[..length / 2])?;
                reader.read_exact(&mut [0])?;
                return Ok(());
            }
            _ => stream.write_all(body.as_bytes())?,
        }
    }
}

/// Tells changes behind a version, each in two parts, until the client hangs up.
fn watch(
    mut stream: &TcpStream,
    shared: &Mutex<Shared>,
    collection: &str,
    mut from: u64,
) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    let mut is_hushed = false;
    loop {
        is_hushed |= lock(shared).mood == Mood::Hushed;
        let news: Vec<(u64, String)> = lock(shared)
            .changes
            .iter()
            .filter(|(version, of, _)| *version > from && of == collection && !is_hushed)
            .map(|(version, _, event)| (*version, format!("{event}\n")))
            .collect();
        for (version, line) in news {
            let (first, second) = line.split_at(line.len() / 2);
            write!(stream, "{:x}\r\n{first}\r\n", first.len())?;
            thread::sleep(STEP);
            write!(stream, "{:x}\r\n{second}\r\n", second.len())?;
            from = version;
        }
        thread::sleep(STEP);
        // An end that was cut is seen at the next write at the latest, by its shutdown.
        if stream.take_error()?.is_some() || is_over(stream)? {
            return Ok(());
        }
    }
}

/// Whether the other side has hung up.
fn is_over(stream: &TcpStream) -> std::io::Result<bool> {
    stream.set_nonblocking(true)?;
    let peeked = stream.peek(&mut [0]);
    stream.set_nonblocking(false)?;
    match peeked {
        Ok(0) => Ok(true),
        Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(false),
    }
}
