//! The text to read.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Folders of the project whose Rust sources make the default text, in this order.
const SOURCES: [&str; 6] = ["benches", "examples", "host", "kernels-gpu", "ptx", "tests"];

/// At most `limit` bytes of the file at `path`, or of the project's own sources.
///
/// # Errors
/// [`Error::Read`], and [`Error::ShortText`] for fewer than two bytes.
pub fn read(path: Option<&Path>, limit: usize) -> Result<Vec<u8>> {
    let (text, what) = match path {
        Some(path) => (read_file(path, limit)?, path.display().to_string()),
        None => (project_sources(limit)?, "the text of the project's own sources".to_owned()),
    };
    if text.len() < 2 {
        return Err(Error::ShortText { what, got: text.len() });
    }
    Ok(text)
}

fn read_file(path: &Path, limit: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::read(path))?;
    file.take(limit as u64).read_to_end(&mut bytes).map_err(Error::read(path))?;
    Ok(bytes)
}

/// The project's Rust sources, concatenated in the order of their paths.
fn project_sources(limit: usize) -> Result<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut text = Vec::new();
    for folder in SOURCES.iter().map(|name| root.join(name)).filter(|folder| folder.is_dir()) {
        for file in rust_files(&folder)? {
            text.extend(read_file(&file, limit - text.len())?);
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
