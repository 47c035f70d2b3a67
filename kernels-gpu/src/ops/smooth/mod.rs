//! `smooth`: max-pool of the votes.
//!
//! ```text
//! for each scored row, candidate j:
//!     pooled[j] = largest vote that is a number within window / 2 tokens of j;  NaN where vote[j] is NaN
//! ```
//! **Thread mapping.** A thread per candidate; adjacent threads read the same votes, which L1 holds. The cost is
//! `n * window` loads: windows are a handful of tokens.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
