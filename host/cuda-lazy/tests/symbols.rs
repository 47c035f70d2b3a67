//! The list of driver functions is that of the `cust_raw` in use, neither more nor less.
#![cfg(all(target_os = "linux", target_env = "gnu", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Folder of the `cust_raw` sources that this build uses. Only crates of this platform are asked for: those of others
/// need not be on the machine.
fn cust_raw() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    command.args(["metadata", "--format-version", "1", "--offline", "--filter-platform", &platform]);
    command.args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")]);
    let output = command.output().expect("run cargo");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("metadata is JSON");
    let packages = metadata["packages"].as_array().expect("a list of packages");
    let found: Vec<&str> = packages
        .iter()
        .filter(|package| package["name"] == "cust_raw")
        .filter_map(|package| package["manifest_path"].as_str())
        .collect();
    assert_eq!(found.len(), 1, "one cust_raw expected, found {found:?}");
    Path::new(found[0]).parent().expect("a manifest has a folder").join("src")
}

/// Names in `pub fn cu...(` inside the bindings.
fn declared(source: &str) -> impl Iterator<Item = &str> {
    source.lines().filter_map(|line| {
        let rest = line.trim_start().strip_prefix("pub fn ")?;
        rest.split_once('(').map(|(name, _)| name).filter(|name| name.starts_with("cu"))
    })
}

#[test]
fn the_list_is_what_cust_raw_declares() {
    let mut expected = BTreeSet::new();
    for entry in std::fs::read_dir(cust_raw()).expect("sources of cust_raw") {
        let source = std::fs::read_to_string(entry.expect("entry").path()).expect("source file");
        assert!(!source.contains("link_name"), "cust_raw renames symbols: this test reads the wrong names");
        expected.extend(declared(&source).map(str::to_owned));
    }
    assert!(expected.len() > 300, "only {} functions found: the bindings look different now", expected.len());
    let listed: BTreeSet<String> =
        tokenselect_cuda_lazy::symbols().iter().map(|name| (*name).to_owned()).collect();
    let missing: Vec<_> = expected.difference(&listed).collect();
    let unknown: Vec<_> = listed.difference(&expected).collect();
    assert!(missing.is_empty(), "declared by cust_raw, not in src/symbols.rs: {missing:?}");
    assert!(unknown.is_empty(), "in src/symbols.rs, not declared by cust_raw: {unknown:?}");
}

#[test]
fn the_list_is_sorted() {
    assert!(tokenselect_cuda_lazy::symbols().is_sorted());
}
