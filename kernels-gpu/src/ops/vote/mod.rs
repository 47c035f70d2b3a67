//! `vote`: softmax probabilities of each candidate, summed over heads, and how many sums lie in which bin.
//!
//! ```text
//! for each scored row, candidate token j:
//!     vote[j] = sum over heads h of exp(logit[j, h] - max[h]) / sum[h]        NaN and inf: docs/definitions.md
//! ```
//! **Thread mapping.** Logits lie in tiles of 16 tokens. A warp takes two tiles at a time: a lane a token of each, and
//! every other piece of its heads (4 adjacent ones, or 1 where the group is no multiple of 4); the two lanes of a token are
//! added at the end, in the same order for every launch.
//!
//! **Bytes.** `n * num_qo_heads * 4` read, `n * 4` written.
//!
//! **Statistics.** Every block puts those of all heads in shared memory: a step leaves them in chunks, which each block
//! folds for itself, in the order in which [`score`](mod@crate::ops::score) would.
//!
//! The histogram of the votes and the search in it are those of [`radix`](crate::common::radix).

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
