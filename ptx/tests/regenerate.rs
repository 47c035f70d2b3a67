//! The tool `cargo ptx`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;
use tokenselect_ptx::inspect::{Header, entries};
use tokenselect_ptx::packed::{pack, unpack};

const STAND_IN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernels");

fn tool() -> Command {
    Command::new(env!("CARGO_BIN_EXE_regenerate"))
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("temporary folder")
}

/// Text of the failure.
fn failure(output: &Output) -> String {
    assert!(!output.status.success(), "succeeded: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// An executable script `name` in `folder`.
fn script(folder: &Path, name: &str, body: &str) {
    let path = folder.join(name);
    fs::create_dir_all(folder).expect("folder");
    fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("permissions");
}

#[test]
fn without_a_compiler_it_says_what_to_install() {
    let output = tool().env("PATH", "").args(["--distribution", "/nonexistent"]).output().expect("run");
    let text = failure(&output);
    for line in [
        "error: no compiler found that can build the kernels",
        "  rustup: `rustup` cannot be run: ",
        "  distribution: /nonexistent/bin/rustc does not exist",
        "  rustup toolchain install nightly --profile minimal --component rust-src",
        "  apt-get install rustc-web cargo-web rust-web-src    (Debian 12)",
    ] {
        assert!(text.lines().any(|found| found.starts_with(line)), "{line:?} is not in\n{text}");
    }
}

#[test]
fn a_compiler_without_library_sources_is_passed_over_and_named() {
    let prefix = folder();
    let bin = prefix.path().join("bin");
    script(&bin, "cargo", "exit 1");
    script(&bin, "rustc", &format!("echo {}", prefix.path().display()));
    // A rustup that knows the toolchain, which has no rust-src.
    script(&bin, "rustup", &format!("echo {}/bin/rustc", prefix.path().display()));
    let output = tool().env("PATH", &bin).arg("--distribution").arg(prefix.path()).output().expect("run");
    let text = failure(&output);
    let reason = format!(
        "{0}/bin/rustc has no library sources in {0}/lib/rustlib/src/rust/library",
        prefix.path().display()
    );
    assert!(text.contains(&format!("  rustup: {reason}\n  distribution: {reason}\n")), "{text}");
}

#[test]
fn an_unknown_toolchain_is_named() {
    let bin = folder();
    script(bin.path(), "rustup", "exit 1");
    let mut command = tool();
    command.env("PATH", bin.path()).args([
        "--toolchain",
        "nightly-1999-01-01",
        "--distribution",
        "/nonexistent",
    ]);
    let text = failure(&command.output().expect("run"));
    assert!(text.contains("  rustup: there is no toolchain `nightly-1999-01-01`\n"), "{text}");
    assert!(text.contains("rustup toolchain install nightly-1999-01-01 "), "{text}");
}

#[test]
fn without_an_assembler_the_check_says_what_to_install() {
    let text = failure(&tool().args(["--check", "--ptxas", "/nonexistent"]).output().expect("run"));
    assert!(text.contains("no ptxas found at /nonexistent; looked at /nonexistent\n"), "{text}");
    assert!(text.contains("pip install --target target/nvcc nvidia-cuda-nvcc==13.0.88"), "{text}");
}

#[test]
fn texts_are_written_to_be_read() {
    let folder = folder();
    let output = tool().arg("--text").arg(folder.path().join("texts")).output().expect("run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for ptx in tokenselect_ptx::ALL {
        let read =
            |name: String| fs::read_to_string(folder.path().join("texts").join(name)).expect("written");
        assert_eq!(read(format!("{}.ptx", ptx.name)), ptx.text());
        assert_eq!(read(format!("conformance_{}.ptx", ptx.name)), ptx.conformance_text());
    }
}

#[test]
fn options_of_the_check_need_the_check() {
    let text = failure(&tool().arg("--require-same-compiler").output().expect("run"));
    assert!(text.contains("--check"), "{text}");
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("folder");
    for entry in fs::read_dir(from).expect("folder") {
        let entry = entry.expect("entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("type").is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copy");
        }
    }
}

const FILES: [&str; 4] =
    ["sm_80.ptx.lz", "conformance_sm_80.ptx.lz", "sm_90a.ptx.lz", "conformance_sm_90a.ptx.lz"];

/// A copy of the stand-in crate at `place` in a folder of its own, which takes the PTX as well.
struct Site {
    folder: TempDir,
    kernels: PathBuf,
}

impl Site {
    fn new(place: &str) -> Self {
        let folder = folder();
        let kernels = folder.path().join(place);
        copy(Path::new(STAND_IN), &kernels);
        Self { folder, kernels }
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = tool();
        command.arg("--kernels").arg(&self.kernels).arg("--out").arg(self.folder.path());
        command.arg("--target-dir").arg(self.kernels.join("build")).args(arguments).output().expect("run")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The text of a packed file.
    fn text(&self, name: &str) -> String {
        unpack(&fs::read(self.file(name)).expect("written")).expect("intact")
    }

    fn regenerate(&self) -> [String; 4] {
        let output = self.run(&[]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        FILES.map(|name| self.text(name))
    }

    /// Replaces text in a file for the time of a check, and returns what the check says.
    fn check_with(&self, name: &str, from: &str, to: &str, arguments: &[&str]) -> Output {
        let path = self.file(name);
        let packed = fs::read(&path).expect("file");
        let before = self.text(name);
        assert!(before.contains(from), "{name}: no {from:?}");
        fs::write(&path, pack(&before.replace(from, to)).expect("packed")).expect("file");
        let ptxas = self.file("ptxas");
        let output = self.run(&[&["--check", "--ptxas", ptxas.to_str().expect("UTF-8")], arguments].concat());
        fs::write(&path, packed).expect("file");
        output
    }
}

/// Answers as `ptxas` does to `-v`, and refuses what is older than the architecture's lowest version.
const PTXAS: &str = r#"
case "$*" in *--version*) echo "release 0.0"; exit;; esac
for file; do :; done
if grep -q '^.version 7.[38]' "$file"; then echo "requires PTX ISA"; exit 1; fi
for entry in $(sed -n 's/^.visible .entry \([a-z]*\)(.*/\1/p' "$file"); do
    echo "ptxas info    : Compiling entry function '$entry' for 'sm'"
    echo "ptxas info    : Function properties for $entry"
    echo "    $(cat "$(dirname "$0")/stack") bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    echo "ptxas info    : Used 21 registers, used 0 barriers, 16 bytes smem, 376 bytes cmem[0]"
done
"#;

/// One test, because compiling `core` takes so long.
#[test]
#[ignore = "compiles `core` four times, and needs a compiler with library sources"]
fn regenerate_and_check() {
    let site = Site::new("kernels");
    let first = site.regenerate();
    the_same_bytes_elsewhere(&first);

    script(site.folder.path(), "ptxas", PTXAS);
    fs::write(site.file("stack"), "0").expect("file");
    let output = site.check_with("sm_80.ptx.lz", "", "", &["--require-same-compiler"]);
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(table.contains("streamed |        21     16"), "{table}");

    let says = |output: Output, expected: &str| {
        let text = failure(&output);
        assert!(text.contains(expected), "{expected:?} is not in\n{text}");
    };
    let differs = site.check_with("sm_90a.ptx.lz", "ld.global.nc.L1::no_allocate", "ld.global.nc", &[]);
    says(differs, "  sm_90a: entry `streamed` differs in line ");
    let renamed = site.check_with("sm_80.ptx.lz", ".entry checked(", ".entry renamed(", &[]);
    says(renamed, "  sm_80: entry `checked` is not in the checked-in file\n");
    says(
        site.check_with("sm_80.ptx.lz", "sha256:", "sha256:0", &[]),
        "  sm_80: out of date, made from sources ",
    );

    let other = site.check_with("sm_80.ptx.lz", "LLVM", "LLVM of tomorrow", &[]);
    assert!(other.status.success());
    let notice = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(notice.contains("NOTICE sm_80: made by rustc ") && notice.contains("NOT compared"), "{notice}");
    let other = site.check_with("sm_80.ptx.lz", "LLVM", "LLVM of tomorrow", &["--require-same-compiler"]);
    says(other, "  sm_80: made by rustc ");

    fs::write(site.file("stack"), "8").expect("file");
    says(
        site.check_with("sm_80.ptx.lz", "", "", &[]),
        "  sm_80: entry `checked` uses local memory: 8 bytes of stack",
    );

    let library = site.kernels.join("src/lib.rs");
    let source = fs::read_to_string(&library).expect("source");
    let panics = source.replace("values.get(index).copied().unwrap_or(0.0)", "values[index]");
    fs::write(&library, panics).expect("source");
    let refused = failure(&site.run(&[]));
    assert!(
        refused.contains("sm_80: there is a function `") && refused.contains("panic_bounds_check"),
        "{refused}"
    );

    // The hash leaves this file out, so the compiler must not read it.
    fs::write(&library, source.replace("#[cfg(not(target_arch = \"nvptx64\"))]\n", "")).expect("source");
    says(site.run(&[]), "the compiler read `src/emu/mod.rs`, which the source hash does not cover");
}

fn the_same_bytes_elsewhere(first: &[String; 4]) {
    let second = Site::new("some/other/place/crate").regenerate();
    for ((first, second), name) in first.iter().zip(&second).zip(FILES) {
        assert_eq!(first, second, "{name}");
        let names: Vec<_> = entries(first).expect("readable").iter().map(|entry| entry.name).collect();
        assert_eq!(
            names,
            if name.starts_with("conformance") { &["tested"][..] } else { &["checked", "streamed"] }
        );
        let expected = tokenselect_ptx::source::hash(Path::new(STAND_IN)).expect("hash");
        assert_eq!(Header::parse(first).expect("header").sources, expected);
    }
}
