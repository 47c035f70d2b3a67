//! Why there is no driver.

use std::path::PathBuf;

/// Why the driver could not be loaded. It stays so for the life of the process.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// None of the libraries tried could be opened.
    #[error("no CUDA driver: libcuda.so.1 could not be loaded; tried {}", list(.tried))]
    NotFound {
        /// Each library tried and the dynamic linker's answer.
        tried: Vec<(PathBuf, String)>,
    },
    /// A library was opened, but it is no CUDA driver.
    #[error("no CUDA driver: {} was loaded but does not define `{missing}`", .library.display())]
    NotADriver {
        /// The library.
        library: PathBuf,
        /// The function looked for.
        missing: &'static str,
    },
    /// Another library was loaded as the driver before.
    #[error("{} cannot become the CUDA driver: {} already is, and it stays for the life of the process",
        .asked.display(), .loaded.display())]
    AlreadyLoaded {
        /// The library asked for.
        asked: PathBuf,
        /// The one in use.
        loaded: PathBuf,
    },
    /// The crate has no trampolines for this target.
    #[error("no CUDA driver: {os} on {arch} is not supported, only linux on x86_64 and aarch64")]
    UnsupportedTarget {
        /// Operating system of the target.
        os: &'static str,
        /// Architecture of the target.
        arch: &'static str,
    },
}

fn list(tried: &[(PathBuf, String)]) -> String {
    let lines: Vec<String> =
        tried.iter().map(|(library, reason)| format!("{} ({reason})", library.display())).collect();
    lines.join(", ")
}
