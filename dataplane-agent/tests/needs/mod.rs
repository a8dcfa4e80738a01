//! What tests on the kernel need.

use dataplane_agent::bpf::{self, kernel};

/// Whether it is there; says what is not.
pub fn ready() -> bool {
    let missing = if bpf::OBJECT.is_empty() {
        "the BPF object (cargo xtask build-ebpf)".to_owned()
    } else if let Err(error) = kernel::check() {
        error.to_string()
    } else {
        return true;
    };
    println!("skipped: needs {missing}");
    false
}
