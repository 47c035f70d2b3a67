//! The hash of the kernel sources.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tokenselect_ptx::source::{HOST_ONLY, SourceError, files, hash, is_host_only};

/// A kernel crate whose files are created in the order given.
fn kernels(order: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().expect("temporary folder");
    for (name, contents) in order {
        write(folder.path(), name, contents);
    }
    folder
}

fn write(folder: &Path, name: &str, contents: &str) -> PathBuf {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().expect("a file has a folder")).expect("folder");
    fs::write(&path, contents).expect("file");
    path
}

const FILES: [(&str, &str); 4] = [
    ("Cargo.toml", "[package]\n"),
    ("src/lib.rs", "mod simt;\nmod score;\n"),
    ("src/score.rs", "fn score() {}\n"),
    ("src/simt/mod.rs", "fn lane() {}\n"),
];

fn of(folder: &TempDir) -> String {
    hash(folder.path()).expect("hash")
}

#[test]
fn place_and_order_of_creation_do_not_matter() {
    let mut reversed = FILES;
    reversed.reverse();
    let first = of(&kernels(&FILES));
    assert_eq!(first, of(&kernels(&reversed)));
    let hex = first.strip_prefix("sha256:").expect("says what it is");
    assert!(hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()), "{hex}");
}

#[test]
fn every_source_matters() {
    let before = of(&kernels(&FILES));
    for index in 0..FILES.len() {
        let mut changed = FILES;
        changed[index].1 = "changed";
        assert_ne!(of(&kernels(&changed)), before, "{}", FILES[index].0);
    }
    let folder = kernels(&FILES);
    let added = write(folder.path(), "src/vote.rs", "");
    let with = of(&folder);
    assert_ne!(with, before, "a file more");
    fs::rename(added, folder.path().join("src/pool.rs")).expect("rename");
    assert_ne!(of(&folder), with, "another name");
}

#[test]
fn contents_cannot_move_between_files() {
    let first = kernels(&[("Cargo.toml", ""), ("src/a.rs", "xy"), ("src/b.rs", "z")]);
    let second = kernels(&[("Cargo.toml", ""), ("src/a.rs", "x"), ("src/b.rs", "yz")]);
    assert_ne!(of(&first), of(&second));
}

#[test]
fn outputs_hidden_files_and_host_only_sources_do_not_matter() {
    let folder = kernels(&FILES);
    let before = of(&folder);
    for name in ["target/ptx/a.s", "README.md", "src/.lib.rs.swp", "src/emu/race.rs", "src/simt/emulated.rs"]
    {
        write(folder.path(), name, "anything");
        assert_eq!(of(&folder), before, "{name}");
    }
}

#[test]
fn line_endings_do_not_matter() {
    let unix = of(&kernels(&FILES));
    let windows = FILES.map(|(name, contents)| (name, contents.replace('\n', "\r\n")));
    let windows = windows.each_ref().map(|(name, contents)| (*name, contents.as_str()));
    assert_eq!(of(&kernels(&windows)), unix);
    // A lone carriage return is content.
    let mut lone = FILES;
    lone[1].1 = "mod simt;\r mod score;\n";
    assert_ne!(of(&kernels(&lone)), unix);
}

#[test]
fn only_whole_names_are_host_only() {
    for name in HOST_ONLY {
        assert!(is_host_only(name), "{name}");
    }
    assert!(is_host_only("src/emu/race.rs"));
    assert!(!is_host_only("src/emulate.rs"));
    assert!(!is_host_only("src/simt/emulated.rs.bak"));
    assert!(!is_host_only("src/simt/nvptx.rs"));
}

#[test]
fn files_are_relative_and_sorted() {
    let names = files(kernels(&FILES).path()).expect("list");
    assert_eq!(names, FILES.map(|(name, _)| name));
}

#[test]
fn what_cannot_be_read_is_named() {
    let folder = kernels(&FILES[1..]);
    let error = hash(folder.path()).expect_err("no manifest");
    assert!(matches!(&error, SourceError::Read { path, .. } if path.ends_with("Cargo.toml")), "{error}");
    let error = hash(Path::new("/nonexistent")).expect_err("no crate");
    assert!(error.to_string().starts_with("cannot read /nonexistent/src: "), "{error}");
}
