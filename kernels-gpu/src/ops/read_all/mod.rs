//! `read_all`: reads memory and does nothing else. Benchmarks measure with it how fast a device can be read.
//!
//! **Thread mapping.** Every thread has eight pieces of 16 bytes in flight at a time. Threads read adjacent pieces, and each its
//! next one a whole grid of threads further.
//!
//! **Bytes.** All once.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
