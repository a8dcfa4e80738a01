//! Tells the agent where the BPF object is that it embeds: `DATAPLANE_EBPF_OBJECT`, else `target/ebpf/dataplane.o` of
//! the workspace. Without one the agent is built with an empty object, and `run` says so.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=DATAPLANE_EBPF_OBJECT");
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let object = env::var_os("DATAPLANE_EBPF_OBJECT")
        .map_or_else(|| manifest.join("../target/ebpf/dataplane.o"), PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());

    let copy = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo")).join("dataplane.o");
    let bytes = fs::read(&object).unwrap_or_default();
    if bytes.is_empty() {
        println!(
            "cargo::warning=no BPF object at {}: run `cargo xtask build-ebpf`",
            object.display()
        );
    }
    fs::write(&copy, bytes).expect("OUT_DIR is writable");
    println!("cargo::rustc-env=DATAPLANE_OBJECT={}", copy.display());
}
