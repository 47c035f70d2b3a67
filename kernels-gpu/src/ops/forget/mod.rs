//! `forget`: drops cached selections of one sequence that were made too late to survive a truncation.
//!
//! ```text
//! for each layer:
//!     if made_at[layer, sequence] >= from: made_at[layer, sequence] = EMPTY
//! ```
//! **Thread mapping.** A thread per layer.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
