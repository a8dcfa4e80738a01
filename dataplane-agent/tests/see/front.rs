//! What stands before a page of `ui`, and gives some of its answers: here are no tables that it could read.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::Arc,
    thread,
};

use serde_json::Value;

/// An answer of JSON.
#[derive(Clone, Debug)]
pub struct Canned {
    head: String,
    body: String,
}

impl Canned {
    pub fn agent(value: &Value) -> Self {
        Self {
            head: String::new(),
            body: value.to_string(),
        }
    }

    /// What the tables say, and why they do.
    pub fn tables(value: &Value, why: &str) -> Self {
        Self {
            head: format!("x-dataplane-without-agent: {why}\r\n"),
            ..Self::agent(value)
        }
    }
}

/// It answers as long as the test runs.
pub struct Front {
    /// `127.0.0.1:PORT`.
    pub at: String,
}

impl Front {
    /// Before the page at `ui`, with the answers that `canned` has for a path with its query.
    pub fn start(ui: &str, canned: impl Fn(&str) -> Option<Canned> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap().to_string();
        let (ui, canned) = (ui.to_owned(), Arc::new(canned));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (ui, canned) = (ui.clone(), canned.clone());
                // A browser may go whenever it likes, and connects for nothing too.
                thread::spawn(move || stream.and_then(|stream| answer(stream, &ui, &*canned)));
            }
        });
        Self { at }
    }
}

fn answer(mut browser: TcpStream, ui: &str, canned: &dyn Fn(&str) -> Option<Canned>) -> io::Result<()> {
    let lines = BufReader::new(&browser).lines().map_while(Result::ok);
    let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let path = head.first().and_then(|line| line.split(' ').nth(1));
    let Some(path) = path else { return Ok(()) };
    if let Some(Canned { head, body }) = canned(path) {
        write!(
            browser,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n{head}\r\n{body}"
        )?;
        return browser.shutdown(Shutdown::Write);
    }
    let mut page = TcpStream::connect(ui)?;
    write!(page, "{}\r\n\r\n", head.join("\r\n"))?;
    let mut answer = Vec::new();
    page.read_to_end(&mut answer)?;
    browser.write_all(&answer)?;
    browser.shutdown(Shutdown::Write)
}
