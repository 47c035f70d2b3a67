//! The GPU kernels of tokenselect, compiled to PTX.
//!
//! Two texts, checked in and embedded, so that a user needs neither a CUDA toolkit nor a particular compiler:
//!
//! | text | runs on | oldest driver |
//! |---|---|---|
//! | [`SM_80`] | every GPU of compute capability 8.0 or newer: the driver compiles it for the one at hand | CUDA 11.4 |
//! | [`SM_90A`] | compute capability 9.0 alone: the `a` stands for Hopper's own tensor-core instructions | CUDA 12.0 |
//!
//! ```
//! let ptx = tokenselect_ptx::for_compute_capability(8, 9).expect("8.0 or newer");
//! assert_eq!(ptx.name, "sm_80");
//! assert!(ptx.text().contains(".visible .entry"));
//! ```
//!
//! They are embedded [`packed`], and unpacked when a kernel is first asked for.
//!
//! `cargo ptx` regenerates the files from the kernel sources (feature `regenerate`). The feature `inspect` reads them:
//! entry points, parameter sizes and the hash of the sources that they were made from. The feature `conformance` adds the
//! kernels that only tests and benchmarks launch.

#![cfg_attr(docsrs, feature(doc_cfg))]

use std::fmt;
use std::sync::OnceLock;

#[cfg(feature = "inspect")]
pub mod inspect;
pub mod packed;
#[cfg(feature = "inspect")]
pub mod source;

/// The kernels for one architecture.
pub struct Ptx {
    /// The architecture as `ptxas` calls it.
    pub name: &'static str,
    kernels: Module,
    #[cfg(feature = "conformance")]
    conformance: Module,
}

/// An embedded file.
struct Module {
    packed: &'static [u8],
    text: OnceLock<String>,
}

impl Module {
    const fn new(packed: &'static [u8]) -> Module {
        Module { packed, text: OnceLock::new() }
    }

    fn text(&self) -> &str {
        // `cargo ptx` has packed it, and a test unpacks each: what fails here is the build.
        self.text.get_or_init(|| packed::unpack(self.packed).expect("the embedded PTX is intact"))
    }

    fn entry_text(&self, name: &str) -> Option<String> {
        let text = self.text();
        let header = text.find("\n.visible .entry ")? + 1;
        let begin = text.find(&format!("\n.visible .entry {name}("))? + 1;
        let end = begin + text[begin..].find("\n}")? + 2;
        Some([&text[..header], &text[begin..end], "\n"].concat())
    }
}

impl Ptx {
    /// The PTX, one module with the entry points of all operations. Unpacked by the first call, which takes some 50 ms,
    /// and kept.
    pub fn text(&self) -> &str {
        self.kernels.text()
    }

    /// The PTX of the kernels that only tests and benchmarks launch.
    #[cfg(feature = "conformance")]
    pub fn conformance_text(&self) -> &str {
        self.conformance.text()
    }

    /// A module with the entry point `name` alone: drivers compile a module as a whole, and all entries take them 19 s.
    ///
    /// ```
    /// let text = tokenselect_ptx::SM_80.entry_text("append").expect("an entry");
    /// assert_eq!(text.matches(".visible .entry").count(), 1);
    /// ```
    pub fn entry_text(&self, name: &str) -> Option<String> {
        let text = self.kernels.entry_text(name);
        #[cfg(feature = "conformance")]
        let text = text.or_else(|| self.conformance.entry_text(name));
        text
    }
}

impl fmt::Debug for Ptx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ptx({})", self.name)
    }
}

/// For every GPU of compute capability 8.0 or newer.
pub static SM_80: Ptx = Ptx {
    name: "sm_80",
    kernels: Module::new(include_bytes!("../sm_80.ptx.lz")),
    #[cfg(feature = "conformance")]
    conformance: Module::new(include_bytes!("../conformance_sm_80.ptx.lz")),
};

/// For compute capability 9.0, and no other: not for newer GPUs either.
pub static SM_90A: Ptx = Ptx {
    name: "sm_90a",
    kernels: Module::new(include_bytes!("../sm_90a.ptx.lz")),
    #[cfg(feature = "conformance")]
    conformance: Module::new(include_bytes!("../conformance_sm_90a.ptx.lz")),
};

/// All architectures there is PTX for.
pub static ALL: [&Ptx; 2] = [&SM_80, &SM_90A];

/// The PTX that runs fastest on a GPU of this compute capability; `None` below 8.0.
pub fn for_compute_capability(major: u32, minor: u32) -> Option<&'static Ptx> {
    match (major, minor) {
        (..=7, _) => None,
        (9, 0) => Some(&SM_90A),
        _ => Some(&SM_80),
    }
}
