//! The hash of the kernel sources, by which a test without any toolchain notices PTX that is out of date.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Sources that only the host build compiles, relative to the kernel crate: the emulator. The PTX does not depend on
/// them, which `cargo ptx` checks against the compiler's own list.
pub const HOST_ONLY: [&str; 2] = ["src/emu", "src/simt/emulated.rs"];

/// Why the sources could not be hashed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// A file or folder could not be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file name is not UTF-8.
    #[error("the name of {} is not UTF-8", .path.display())]
    Name {
        /// The file.
        path: PathBuf,
    },
}

/// Hash of `Cargo.toml` and everything below `src/` of the crate in `folder` but [`HOST_ONLY`], as `sha256:<hex>`.
///
/// It covers relative names and contents alone: not the place of the crate, the order in which the file system lists
/// files, times, line endings (CRLF counts as LF), build outputs or hidden files.
///
/// # Errors
/// [`SourceError::Read`] and [`SourceError::Name`] name the file.
pub fn hash(folder: &Path) -> Result<String, SourceError> {
    let mut hasher = Sha256::new();
    for name in files(folder)? {
        let path = folder.join(&name);
        let contents = std::fs::read(&path).map_err(|source| SourceError::Read { path, source })?;
        let contents = unix_line_endings(&contents);
        // The lengths keep a name from running into a content.
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name);
        hasher.update((contents.len() as u64).to_le_bytes());
        hasher.update(contents);
    }
    let mut text = "sha256:".to_owned();
    for byte in hasher.finalize() {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

/// The files that [`hash`] covers, relative to `folder`, with `/`, sorted.
///
/// # Errors
/// As [`hash`].
pub fn files(folder: &Path) -> Result<Vec<String>, SourceError> {
    let mut names = vec!["Cargo.toml".to_owned()];
    collect(folder, "src", &mut names)?;
    names.sort_unstable();
    Ok(names)
}

/// Whether the file `name`, relative to the kernel crate, is one of [`HOST_ONLY`].
pub fn is_host_only(name: &str) -> bool {
    HOST_ONLY
        .iter()
        .any(|host| name.strip_prefix(host).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

fn collect(folder: &Path, below: &str, names: &mut Vec<String>) -> Result<(), SourceError> {
    let path = folder.join(below);
    let read = |source| SourceError::Read { path: path.clone(), source };
    for entry in std::fs::read_dir(&path).map_err(read)? {
        let entry = entry.map_err(read)?;
        let name = entry.file_name();
        let name = name.to_str().ok_or_else(|| SourceError::Name { path: entry.path() })?;
        let relative = format!("{below}/{name}");
        if name.starts_with('.') || is_host_only(&relative) {
            continue;
        }
        if entry.file_type().map_err(read)?.is_dir() {
            collect(folder, &relative, names)?;
        } else {
            names.push(relative);
        }
    }
    Ok(())
}

fn unix_line_endings(contents: &[u8]) -> Vec<u8> {
    let mut bytes = contents.to_vec();
    let mut index = 0;
    bytes.retain(|byte| {
        let next = contents.get(index + 1);
        index += 1;
        !(*byte == b'\r' && next == Some(&b'\n'))
    });
    bytes
}
