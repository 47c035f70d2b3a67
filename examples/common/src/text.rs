//! Texts to read.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Folders of the project whose Rust sources make a text, in this order.
const SOURCES: [&str; 6] = ["benches", "examples", "host", "kernels-gpu", "ptx", "tests"];

/// At most `limit` bytes of a file, and whether it has more.
///
/// # Errors
/// [`Error::Read`].
pub fn read_file(path: &Path, limit: usize) -> Result<(Vec<u8>, bool)> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::read(path))?;
    file.take((limit as u64).saturating_add(1)).read_to_end(&mut bytes).map_err(Error::read(path))?;
    let is_cut = bytes.len() > limit;
    bytes.truncate(limit);
    Ok((bytes, is_cut))
}

/// At most `limit` bytes of the project's Rust sources, concatenated in the order of their paths.
///
/// # Errors
/// [`Error::Read`].
pub fn project_sources(limit: usize) -> Result<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut text = Vec::new();
    for folder in SOURCES.iter().map(|name| root.join(name)).filter(|folder| folder.is_dir()) {
        for file in rust_files(&folder)? {
            text.extend(read_file(&file, limit - text.len())?.0);
        }
    }
    Ok(text)
}

/// All `.rs` files below a folder, in the order of their paths.
fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(Error::read(&folder))? {
            let entry = entry.map_err(Error::read(&folder))?;
            let kind = entry.file_type().map_err(Error::read(&folder))?;
            let path = entry.path();
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() && path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort_unstable();
    Ok(found)
}
