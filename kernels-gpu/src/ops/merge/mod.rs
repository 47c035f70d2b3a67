//! `merge`: *parts*, attention outputs over disjoint tokens of a list, combined through their log-sum-exps.
//!
//! ```text
//! for each token and query head:
//!     lse = log sum over parts of exp(lse_i);    out = sum over parts of exp(lse_i - lse) out_i     parts with -inf left out
//! ```
//! Parts with +inf share the mass equally: how many tokens of a part reached it is not known.
//!
//! **Thread mapping.** A warp per token and head; a lane per four elements. Parts are added in order.
//!
//! **Bytes.** The parts once: `num_parts * num_heads * head_dim * 4`, and the result.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
