//! The driving side of a worker process.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::protocol::{Answer, Call, Request, Response};

type Pending = Arc<Mutex<HashMap<u64, Sender<Response>>>>;

/// A worker process. Dropping it kills the process.
#[derive(Debug)]
pub struct Worker {
    name: String,
    child: Child,
    input: Mutex<(u64, ChildStdin)>,
    pending: Pending,
}

impl Worker {
    /// Starts a worker from [`crate::process::Helper::worker`].
    pub fn start(name: &str, mut command: Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("failed to start worker {name}"))?;
        let input = child.stdin.take().context("the worker has no input")?;
        let output = child.stdout.take().context("the worker has no output")?;
        let pending = Pending::default();
        let readers = Arc::clone(&pending);
        // Ends with the process: its output is closed then.
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let Ok(Answer { id, response }) = serde_json::from_str(&line) else {
                    continue;
                };
                if let Some(caller) = readers.lock().unwrap_or_else(PoisonError::into_inner).remove(&id) {
                    let _ = caller.send(response);
                }
            }
            readers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        });
        Ok(Self {
            name: name.to_owned(),
            child,
            input: Mutex::new((0, input)),
            pending,
        })
    }

    /// Asks the worker and waits for its answer. Calls from several threads run side by side.
    pub fn call(&self, request: Request, timeout: Duration) -> Result<Response> {
        let (sender, receiver) = channel();
        {
            let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
            input.0 += 1;
            let id = input.0;
            self.pending
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(id, sender);
            let mut line = serde_json::to_string(&Call { id, request })?;
            line.push('\n');
            input
                .1
                .write_all(line.as_bytes())
                .with_context(|| format!("worker {} has ended", self.name))?;
        }
        match receiver.recv_timeout(timeout) {
            Ok(Response::Failed(reason)) => bail!("{}: {reason}", self.name),
            Ok(response) => Ok(response),
            Err(_) => bail!("worker {} did not answer within {timeout:?}", self.name),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
