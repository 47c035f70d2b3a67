//! `attend` for whole blocks: attention of many queries over one list, tile by tile through shared memory.
//!
//! ```text
//! for each row, KV head, 128 query rows:                                            (a block; a warp has 16 of them)
//!     for each tile of 64 places (32 of heads of 256) that the last of these queries sees:
//!         s = logit(q k^T),  -inf where the rank is not seen
//!         p = exp(s - max so far);  out = out * correction + p v
//!     out / sum, lse
//! ```
//! Keys come rotated from [`gather`](mod@crate::ops::gather), or as they are from the pages (native positions); values from the
//! pages. Departures from the loops:
//! 1. While a tile is multiplied, the next one's keys and values are copied to shared memory asynchronously (`cp.async`),
//!    at offsets that were looked up one tile earlier still.
//! 2. Queries are rotated and rounded once, and stay in registers as A fragments of `mma.m16n8k16` (of heads of 256 in shared memory, since
//!    the output fills half of the registers); `ldmatrix` makes B fragments of keys, and transposed ones of values. Rows of shared memory are 16 bytes apart in their banks.
//! 3. Only tiles with a rank that some query of the warp does not see are masked.
//!
//! **Bytes.** Keys and values of the list once for each 128 query rows: from L2, but for the first.

mod params;
pub use params::{shared_bytes, tile_fragments};

#[cfg(feature = "kernels")]
pub mod kernel;
