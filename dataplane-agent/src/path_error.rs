//! A file or folder that cannot be used as it should.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

/// What was tried with which path, and why it failed.
#[derive(Debug)]
pub struct PathError {
    pub verb: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

impl PathError {
    /// For `map_err`.
    pub fn new(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { verb, path, source }
    }
}

impl fmt::Display for PathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "failed to {} {}", self.verb, self.path.display())?;
        match self.source.kind() {
            io::ErrorKind::PermissionDenied => f.write_str(" (run as root, or give this user access)"),
            io::ErrorKind::ReadOnlyFilesystem => f.write_str(" (mount it writable)"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for PathError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}
