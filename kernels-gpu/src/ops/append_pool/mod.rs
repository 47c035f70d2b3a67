//! `append_pool`: [`append`](mod@crate::ops::append) and [`pool`](mod@crate::ops::pool) of short blocks in one launch.
//!
//! ```text
//! block 0 of row r:    mean of the row's rotated queries, all heads; cosine with the cached one; action
//! the others of row r: keys and values of the row's block, to its pages
//! ```
//! In decoding, either operation is a chain of trips to memory and little else. Here the chain is two trips long: tables,
//! then everything they point to.
//!
//! **Thread mapping.** A thread of block 0 has the same two pairs of elements (that RoPE may rotate together) in two heads,
//! so that it needs two angles; each other thread copies 16 bytes of keys and of values. Sums are added in a fixed order,
//! so the result does not depend on the launch.
//!
//! **Bytes.** Those of the two operations.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
