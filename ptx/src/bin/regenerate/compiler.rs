//! Finding a compiler that can build `core` for the GPU: it needs the sources of the library, and unstable flags.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Options;
use crate::error::{Error, Result};

/// A cargo and a rustc with the library's sources.
#[derive(Debug)]
pub(crate) struct Compiler {
    /// Version of rustc and of its LLVM, as it goes into the header.
    pub(crate) version: String,
    /// Where it is from, for a human.
    pub(crate) origin: String,
    cargo: PathBuf,
    rustc: PathBuf,
    /// Not a nightly: unstable flags have to be switched on.
    bootstrap: bool,
}

impl Compiler {
    /// The first that is usable: the rustup toolchain, then the distribution's compiler. If one of them is `version`, that
    /// one.
    pub(crate) fn find(options: &Options, version: Option<&str>) -> Result<Self> {
        let rustup = Self::from_rustup(&options.toolchain);
        let distribution = Self::from_distribution(&options.distribution);
        match (rustup, distribution) {
            (Ok(rustup), Ok(distribution)) => {
                let wanted = version == Some(distribution.version.as_str());
                Ok(if wanted { distribution } else { rustup })
            }
            (Ok(found), Err(_)) | (Err(_), Ok(found)) => Ok(found),
            (Err(rustup), Err(distribution)) => {
                Err(Error::NoCompiler { rustup, distribution, toolchain: options.toolchain.clone() })
            }
        }
    }

    /// The rustup toolchain called `toolchain`, or why it cannot be used.
    fn from_rustup(toolchain: &str) -> std::result::Result<Self, String> {
        let mut command = Command::new("rustup");
        let found = command.args(["which", "--toolchain", toolchain, "rustc"]).output();
        let output = found.map_err(|error| format!("`rustup` cannot be run: {error}"))?;
        if !output.status.success() {
            return Err(format!("there is no toolchain `{toolchain}`"));
        }
        let rustc = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        let bin = rustc.parent().ok_or_else(|| format!("{} has no folder", rustc.display()))?;
        let bootstrap = !toolchain.starts_with("nightly");
        Self::usable(rustc.clone(), bin.join("cargo"), bootstrap, format!("rustup toolchain `{toolchain}`"))
    }

    /// The compiler installed below `prefix`, or why it cannot be used.
    fn from_distribution(prefix: &Path) -> std::result::Result<Self, String> {
        let bin = prefix.join("bin");
        Self::usable(bin.join("rustc"), bin.join("cargo"), true, format!("distribution, {}", bin.display()))
    }

    fn usable(
        rustc: PathBuf,
        cargo: PathBuf,
        bootstrap: bool,
        origin: String,
    ) -> std::result::Result<Self, String> {
        for program in [&rustc, &cargo] {
            if !program.is_file() {
                return Err(format!("{} does not exist", program.display()));
            }
        }
        let sysroot = PathBuf::from(answer(&rustc, &["--print", "sysroot"])?.trim());
        let sources = sysroot.join("lib/rustlib/src/rust/library");
        if !sources.join("core/src/lib.rs").is_file() {
            return Err(format!("{} has no library sources in {}", rustc.display(), sources.display()));
        }
        let version = version(&answer(&rustc, &["-vV"])?);
        Ok(Self { version, origin, cargo, rustc, bootstrap })
    }

    /// A cargo that uses this compiler, whatever the caller's environment says.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = Command::new(&self.cargo);
        for (name, _) in std::env::vars_os() {
            if steers_the_build(&name.to_string_lossy()) {
                command.env_remove(name);
            }
        }
        command.env("RUSTC", &self.rustc).env("RUSTC_WRAPPER", "").env("RUSTC_WORKSPACE_WRAPPER", "");
        if self.bootstrap {
            command.env("RUSTC_BOOTSTRAP", "1");
        }
        command
    }

    pub(crate) fn cargo_path(&self) -> &Path {
        &self.cargo
    }
}

/// Variables that change what cargo builds: those of an outer `cargo run`, and the user's own flags.
fn steers_the_build(name: &str) -> bool {
    let kept = ["CARGO_HOME", "RUSTUP_HOME"];
    let kept_groups = ["CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRY_", "CARGO_REGISTRIES_"];
    (name.starts_with("CARGO") || name.starts_with("RUST"))
        && !kept.contains(&name)
        && !kept_groups.iter().any(|group| name.starts_with(group))
}

fn answer(program: &Path, arguments: &[&str]) -> std::result::Result<String, String> {
    // A rustup proxy must not be steered to the toolchain that this tool was built with.
    let output = Command::new(program).args(arguments).env_remove("RUSTUP_TOOLCHAIN").output();
    let output = output.map_err(|error| format!("{} cannot be run: {error}", program.display()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{} fails: {}", program.display(), text.trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.4` from the answer to `rustc -vV`.
fn version(verbose: &str) -> String {
    let rustc = verbose.lines().next().unwrap_or_default();
    let llvm = verbose.lines().find_map(|line| line.strip_prefix("LLVM version: ")).unwrap_or("unknown");
    format!("{rustc}, LLVM {llvm}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_names_rustc_and_llvm() {
        let verbose = "rustc 1.96.0 (ac68faa20 2026-05-25)\nbinary: rustc\nLLVM version: 22.1.4\n";
        assert_eq!(version(verbose), "rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.4");
    }

    #[test]
    fn flags_of_the_caller_are_dropped_and_its_registry_kept() {
        for name in
            ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTUP_TOOLCHAIN", "CARGO_BUILD_TARGET", "CARGO"]
        {
            assert!(steers_the_build(name), "{name}");
        }
        for name in ["CARGO_HOME", "RUSTUP_HOME", "CARGO_HTTP_PROXY", "PATH"] {
            assert!(!steers_the_build(name), "{name}");
        }
    }
}
