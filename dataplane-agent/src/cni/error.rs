//! Errors in the words of the CNI specification.

use std::fmt;

use serde_json::json;

/// The specification's numbers; from 100 on our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    Version = 1,
    Environment = 4,
    Io = 5,
    Decode = 6,
    Config = 7,
    TryAgainLater = 11,
    NotAvailable = 50,
    /// The agent said something else than yes or not yet.
    Refused = 100,
}

/// Why the plugin does not succeed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct CniError {
    pub code: Code,
    pub message: String,
    pub details: String,
}

impl CniError {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: String::new(),
        }
    }

    #[must_use]
    pub fn because(mut self, cause: impl fmt::Display) -> Self {
        self.details = cause.to_string();
        self
    }

    /// What the runtime reads.
    pub fn to_json(&self, version: &str) -> String {
        let Self {
            code,
            message,
            details,
        } = self;
        json!({"cniVersion": version, "code": *code as u32, "msg": message, "details": details}).to_string()
    }
}
