//! `top_k`: the exact choice by vote, and the selected list around it.
//!
//! ```text
//! for each scored row:
//!     threshold, ties = the k-th largest vote, and how many of its equals are chosen
//!     chosen = { j : vote[j] > threshold } ∪ the first `ties` j with vote[j] = threshold      larger, then earlier; NaN last
//! for each row: selected = [0, candidates.begin) ∪ chosen ∪ [candidates.end, n)                    ascending
//! ```
//! Votes may have been counted in bins ([`radix`](crate::common::radix)) by [`vote`](mod@crate::ops::vote) as it wrote them.
//!
//! On Hopper a cluster of blocks does everything for a row, [`choose_in_cluster`](kernel::choose_in_cluster): it finds the bin in which the
//! threshold lies, marks the tokens above and in that bin, brings the keys in the bin together, finds the threshold among
//! them, and writes the tokens chosen in order. The blocks tell each other counts and keys through shared memory.
//!
//! Elsewhere, and for more tokens than a cluster has marks for, [`count`](kernel::count) counts what is not counted, and two launches
//! follow, neither of which waits for another's blocks:
//! 1. [`refine`](kernel::refine): where the bin has many keys, cuts it into bins, and finds the one that the threshold lies in.
//! 2. [`choose`](kernel::choose): each block writes down the *contenders* of its share, in order: the tokens in that bin, or above.
//!    The last block of a row finds the threshold among those in the bin, and writes the tokens chosen in order.
//!    Contenders are `k` and a few more, and fit in shared memory; where votes tie by the thousands they pass through it
//!    window by window, as often as it takes.
//!
//! All blocks of a row together fill the windows, copy lists that are used again, and keep the cached selections.
//!
//! **Bytes.** The votes, once or twice, which an L2 holds: `n * 4`.

mod cluster;
mod params;
pub use cluster::cluster_dims;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
