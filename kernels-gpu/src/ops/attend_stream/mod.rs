//! `attend` to all tokens for few queries, with keys and values streamed through shared memory by the copy engine
//! (Hopper).
//!
//! ```text
//! attend_stream, for each row and split of its tiles:                                              (a block)
//!     producer warp:    for each tile: copy its keys to a stage, then its values to the next, all heads, once these are empty
//!     consumer warps:   for each tile: wait for the keys; weights; wait for the values; add
//!                       write output and softmax of the split
//! attend_stream_merge, for each row, head, 32 dimensions: merge the splits                         (a block)
//! ```
//! What a warp does with a tile is what [`attend_decode`](mod@crate::ops::attend_decode) does. Departures from it:
//! 1. A block serves all KV heads, a warp one of them, as in [`score_stream`](mod@crate::ops::score_stream). With fewer heads than
//!    warps a stage holds several tiles ([`stage_tiles`](crate::common::paged::stage_tiles)); each tile of a stage has warps of its
//!    own, which take the same tile of every stage: a split of its own.
//! 2. In shared memory each *segment* of 4 tokens is followed by 32 unused bytes, where copies of 4 tokens are large enough.
//!    The tokens are permuted, place `4 s + 2 h + j` being row `g = r + 4 j` (`+ 8 h`) of the `mma`, `r` the two bits of `s`
//!    reversed: then the lanes that load at a time, be it keys or values, load from all segments, and from all banks.
//! 3. Of heads of 256, keys are multiplied as they are loaded, before their stage is released, and values loaded a chunk at a time: output
//!    and queries leave no registers for more.
//! 4. A second kernel merges: for one block, the splits of all SMs and heads would be work of 20 µs.
//!
//! **Bytes.** Keys and values once: `len * num_kv_heads * head_dim * 4`; each split's output written and read.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;

#[cfg(test)]
mod tests;
