//! The GPU kernels of tokenselect, compiled to PTX.
//!
//! Two files, checked in and embedded as text, so that a user needs neither a CUDA toolkit nor a particular compiler:
//!
//! | file | runs on | oldest driver |
//! |---|---|---|
//! | [`SM_80`] | every GPU of compute capability 8.0 or newer: the driver compiles it for the one at hand | CUDA 11.4 |
//! | [`SM_90A`] | compute capability 9.0 alone: the `a` stands for Hopper's own tensor-core instructions | CUDA 12.0 |
//!
//! ```
//! let ptx = tokenselect_ptx::for_compute_capability(8, 9).expect("8.0 or newer");
//! assert_eq!(ptx.name, "sm_80");
//! assert!(ptx.text.contains(".visible .entry"));
//! ```
//!
//! `cargo ptx` regenerates both files from the kernel sources (feature `regenerate`). The feature `inspect` reads them:
//! entry points, parameter sizes and the hash of the sources that they were made from.
#![cfg_attr(not(feature = "inspect"), no_std)]

extern crate alloc;

use alloc::format;
use alloc::string::String;

#[cfg(feature = "inspect")]
pub mod inspect;
#[cfg(feature = "inspect")]
pub mod source;

/// The kernels for one architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ptx {
    /// The architecture as `ptxas` calls it.
    pub name: &'static str,
    /// The PTX, one module with all entry points.
    pub text: &'static str,
}

impl Ptx {
    /// A module with the entry point `name` alone: drivers compile a module as a whole, and all entries take them 19 s.
    ///
    /// ```
    /// let text = tokenselect_ptx::SM_80.entry_text("append").expect("an entry");
    /// assert_eq!(text.matches(".visible .entry").count(), 1);
    /// ```
    pub fn entry_text(&self, name: &str) -> Option<String> {
        let header = self.text.find("\n.visible .entry ")? + 1;
        let begin = self.text.find(&format!("\n.visible .entry {name}("))? + 1;
        let end = begin + self.text[begin..].find("\n}")? + 2;
        Some([&self.text[..header], &self.text[begin..end], "\n"].concat())
    }
}

/// For every GPU of compute capability 8.0 or newer.
pub const SM_80: Ptx = Ptx { name: "sm_80", text: include_str!("../sm_80.ptx") };

/// For compute capability 9.0, and no other: not for newer GPUs either.
pub const SM_90A: Ptx = Ptx { name: "sm_90a", text: include_str!("../sm_90a.ptx") };

/// All architectures there is PTX for.
pub const ALL: [Ptx; 2] = [SM_80, SM_90A];

/// The PTX that runs fastest on a GPU of this compute capability; `None` below 8.0.
pub const fn for_compute_capability(major: u32, minor: u32) -> Option<Ptx> {
    match (major, minor) {
        (..=7, _) => None,
        (9, 0) => Some(SM_90A),
        _ => Some(SM_80),
    }
}
