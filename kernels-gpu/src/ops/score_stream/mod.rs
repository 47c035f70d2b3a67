//! `score` with keys streamed through shared memory by the copy engine (Hopper).
//!
//! ```text
//! producer warp:    for each stage: wait until it is empty; copy its tiles, 16 tokens of all heads each
//! consumer warps:   for each stage: wait until it is full; load fragments; release it; multiply, write
//! ```
//! Departures from the kernel that loads keys to registers:
//! 1. A bulk copy is as large as the pages allow, up to 16 tokens of all heads: 32 KiB with 8 heads of 128. In a study in
//!    CUDA C++ on an H200, with a million tokens and logits of 16 bits, copies of 2 KiB took 545 µs, of 8 KiB 517, where
//!    loads to registers took 525 without writing anything; reading alone takes 511.
//! 2. A block serves all KV heads, a warp one of them. With fewer heads than warps a stage holds several tiles
//!    ([`stage_tiles`](crate::common::paged::stage_tiles)): tile `i` of a stage, and the chunk it counts in, are the `i`-th after
//!    those of the first, the *lead*.
//! 3. The lanes of the producer warp look up a page each, for a batch of up to 32 stages, while copies from the pages of the
//!    batch before are started ([`paged`](crate::common::paged)).
//! 4. The first stages of keys are prefetched while the launch before this one, which pools the queries, is still at work
//!    ([`Overlap::prefetching`](crate::common::overlap::Overlap::prefetching)); copies to the others start behind the loads of the
//!    queries, which would otherwise arrive behind these copies.
//!
//! Tiles are of 16 tokens; chunks, their statistics and the logits are those of the other kernel with such tiles, bit for
//! bit.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;

#[cfg(test)]
mod tests;
