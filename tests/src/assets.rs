//! BPF objects of other versions, kept in `tests/assets`.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context, Result};
use flate2::read::GzDecoder;

/// The last release's, and the number of its tables' layout.
pub const RELEASED: (&str, u32) = ("dataplane-v6", 6);
/// One with other layouts.
pub const OTHER_LAYOUT: &str = "other-layout";

/// Reads an object. It stays in memory: loaded programs refer to it for as long as the process lives.
pub fn object(name: &str) -> Result<&'static [u8]> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("assets")
        .join(format!("{name}.o.gz"));
    let file = File::open(&path).with_context(|| format!("failed to open {}", path.display()))?;
    let mut bytes = Vec::new();
    GzDecoder::new(file)
        .read_to_end(&mut bytes)
        .with_context(|| format!("failed to unpack {}", path.display()))?;
    Ok(bytes.leak())
}
