//! `gather`: the keys of each row's list, rotated at their ranks, one after the other.
//!
//! ```text
//! for each row r, KV head h, place j of the row's list:
//!     gathered[r, h, j] = rotate(key of the token at j, rank of j) * rotated_scale      (a power of two: f16 stays in range)
//! ```
//! Prefill reads each key once for every tile of queries; here it is looked up, rotated and rounded once.
//!
//! **Thread mapping.** A thread per place, *unit* ([`rope`](crate::common::rope): two pieces of 16 bytes that are rotated together) and four
//! KV heads: their keys are in flight together, and rotated by the same angles. Where pairs do not lie in pieces (half-split ones whose
//! number is no multiple of 8, an odd number of neighbours), it loads its eight pairs element by element.
//!
//! **Bytes.** Keys once each way: `len * num_kv_heads * head_dim * 4`.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
