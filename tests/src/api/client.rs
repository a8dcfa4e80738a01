//! Plain requests with plain documents, one after the other.

use std::error::Error;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use http::{Method, Request};
use kube::Config;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::Value;

const JSON: &str = "application/json";

/// What the server made of a request.
#[derive(Debug)]
pub enum Outcome {
    Done(Value),
    /// Its status and what it said.
    Refused(u16, String),
}

impl Outcome {
    /// The document, unless the server said no.
    pub fn done(self) -> Result<Value> {
        match self {
            Self::Done(value) => Ok(value),
            Self::Refused(code, message) => Err(Refused { code, message }.into()),
        }
    }

    #[must_use]
    pub fn is(&self, status: u16) -> bool {
        matches!(self, Self::Refused(code, _) if *code == status)
    }
}

/// The server said no.
#[derive(Debug)]
pub struct Refused {
    pub code: u16,
    message: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the API server answered {}: {}", self.code, self.message)
    }
}

impl Error for Refused {}

impl Refused {
    /// What the server said, if `result` failed because it does not take an object as it is: nothing of ours has seen
    /// it. Any other failure is one of the `problems`.
    pub fn or_problem(result: Result<()>, problems: &mut Vec<String>) -> Option<String> {
        let error = result.err()?;
        let refused = error.downcast_ref::<Self>().filter(|refused| refused.code == 422);
        if refused.is_none() {
            problems.push(format!("{error:#}"));
        }
        refused.map(ToString::to_string)
    }
}

/// A connection to a server.
pub struct Client {
    runtime: tokio::runtime::Runtime,
    client: kube::Client,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

impl Client {
    pub fn new(kubeconfig: &Path) -> Result<Self> {
        // A thread of its own keeps connections alive between requests.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let client = runtime.block_on(async {
            let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
            let mut config =
                Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
            config.default_retry = false;
            anyhow::Ok(kube::Client::try_from(config)?)
        })?;
        Ok(Self { runtime, client })
    }

    /// The text that a path leads to.
    pub fn text(&self, path: &str) -> Result<String> {
        let request = Request::get(path).body(Vec::new())?;
        Ok(self.runtime.block_on(self.client.request_text(request))?)
    }

    pub fn get(&self, path: &str) -> Result<Outcome> {
        self.send(Method::GET, path, JSON, None)
    }

    pub fn create(&self, path: &str, object: &Value) -> Result<Outcome> {
        self.send(Method::POST, path, JSON, Some(object))
    }

    pub fn put(&self, path: &str, object: &Value) -> Result<Outcome> {
        self.send(Method::PUT, path, JSON, Some(object))
    }

    /// Changes what a merge patch names.
    pub fn patch(&self, path: &str, changes: &Value) -> Result<Outcome> {
        self.send(Method::PATCH, path, "application/merge-patch+json", Some(changes))
    }

    /// Deletes at once: nobody is there who would end a pod gracefully.
    pub fn delete(&self, path: &str) -> Result<Outcome> {
        let options = serde_json::json!({
            "apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0, "propagationPolicy": "Background",
        });
        self.send(Method::DELETE, path, JSON, Some(&options))
    }

    fn send(&self, method: Method, path: &str, content_type: &str, body: Option<&Value>) -> Result<Outcome> {
        let body = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let what = format!("{method} {path}");
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::CONTENT_TYPE, content_type)
            .body(body)?;
        match self.runtime.block_on(self.client.request::<Value>(request)) {
            Ok(value) => Ok(Outcome::Done(value)),
            Err(kube::Error::Api(status)) => Ok(Outcome::Refused(status.code, status.message)),
            Err(error) => Err(error).context(what),
        }
    }
}
