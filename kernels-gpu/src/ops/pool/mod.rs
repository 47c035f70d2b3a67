//! `pool`: the scoring query of each row, its cosine with the cached one, and what is to be done for the row.
//!
//! ```text
//! for each row r, query head h:
//!     mean[h] = mean over t of rotate(q[t, h], n_local + t)
//!     partial[r, h] = (mean[h] . cached[h], |mean[h]|^2, |cached[h]|^2)
//! the last block of row r:
//!     similarity = sum of partial[r, ..].0 / sqrt(sum of .1 * sum of .2)      heads in order; -1 if none is usable
//!     action[r]  = Skip, Complete, Reuse or Score                             (docs/definitions.md)
//! ```
//! **Thread mapping.** A block per row and query head; several threads per [unit](crate::common::rope) of 16 elements (or, where pairs do not lie
//! in units, per pair of elements), which take the row's query tokens in turn. Their sums are added in a fixed order, so the result does not depend on the
//! launch. Where the squares leave the range of f32, one warp makes the sums anew, of scaled vectors.
//!
//! **Overlap.** In a step, [`append`](mod@crate::ops::append) comes before, and neither depends on the other: both run at the
//! same time. Short blocks have [`append_pool`](mod@crate::ops::append_pool) instead.
//!
//! **Bytes.** `q` once: `num_tokens * num_qo_heads * head_dim * 2`; the cached query where there is one.

mod params;
mod reuse;
pub use params::*;
pub use reuse::*;

#[cfg(feature = "kernels")]
pub mod kernel;
