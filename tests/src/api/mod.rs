//! A real Kubernetes API server for tests: [`server`] runs it, [`client`] writes to it as an administrator would, [`objects`]
//! makes it hold what a scenario says, [`relay`] is the way on which agents reach it, [`account`] gives them their rights,
//! [`served`] is all of it together.

pub mod account;
pub mod client;
pub mod objects;
pub mod relay;
pub mod served;
pub mod server;

use std::path::{Path, PathBuf};

/// The programs that a server needs.
pub const PROGRAMS: [&str; 3] = ["etcd", "kube-apiserver", "kubectl"];

/// The folder with the server's programs: `KUBEBUILDER_ASSETS`, else what `cargo xtask kube` has built. Without one, nothing,
/// with a word why.
#[must_use]
pub fn binaries() -> Option<PathBuf> {
    let place = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let tools =
        place("DATAPLANE_TOOLS").unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools"));
    let folder = place("KUBEBUILDER_ASSETS").unwrap_or_else(|| tools.join("kube/bin"));
    let missing = PROGRAMS
        .into_iter()
        .find(|program| !folder.join(program).is_file());
    if let Some(program) = missing {
        println!(
            "skipped: there is no {program} in {}; `cargo xtask kube` builds what a real API server needs",
            folder.display()
        );
        return None;
    }
    Some(folder)
}
