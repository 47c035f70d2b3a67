//! `score`: scaled dot products of scoring queries with candidate keys, and the softmax statistics of each head.
//!
//! ```text
//! for each scored row r, candidate token j, query head h:
//!     logit[j, h] = scale * (q[r, h] . k[j, h / G])
//! for each head h:
//!     max = largest logit, sum = sum of exp(logit - max)          NaN passed over (docs/definitions.md)
//! ```
//! Departures from the loops:
//! 1. The products run on tensor cores: 16 tokens are the rows of A, heads the columns of B. The head dimension is
//!    permuted alike in both, so that the 16 bytes a lane loads from a key *are* its A fragment of two `mma`: no shared
//!    memory, every key byte is loaded once, straight to registers. Chunk `c` of 32 dimensions gives lane `t` (of 4) the
//!    dimensions `32 c + 8 t ..`.
//! 2. The f32 query is split in two 16-bit halves, `q = high + low`, which keeps 16 bits of mantissa (bf16) or 22 (f16):
//!    votes must be exact to 1e-3. With groups of up to 4 heads the low halves take columns 4 to 7 of the same `mma`. (Of f16,
//!    the query is scaled by a power of two: rotation may have brought it out of its range.)
//! 3. A warp works on one KV head. Tiles of `16 U` candidates are dealt to chunks in turn, tile `i` to chunk `i` modulo
//!    their number, which depends on the number of candidates alone: so the statistics have the same bits for every
//!    launch shape, and the warps, which take chunks in turn, read adjacent tiles at the same time. The last block of a
//!    row folds the chunks' statistics in order.
//! 4. Tiles are pipelined over chunk borders: as soon as half a tile's keys are multiplied, the same half of the next
//!    tile is loaded into their registers, from pages whose numbers are loaded before the products. Half of a warp's loads
//!    are always in flight.
//! 5. Packed, the lanes that hold low halves would have nothing to do after the products; they take the lower eight
//!    tokens of the tile, and the others the upper eight.
//! 6. Tiles begin at multiples of 16 tokens, as those of the logits do, so that a warp writes whole lines: stores of 16
//!    bytes, to lines that eight warps write, cost the memory as much as a fifth of the keys.
//!
//! On Hopper, where contexts are long and the layout of the pages allows it,
//! [`score_stream`](mod@crate::ops::score_stream) does the same with bulk copies.
//!
//! Within a selection either kernel leaves the chunks' statistics to [`vote`](mod@crate::ops::vote), where every block folds
//! them for itself.
//!
//! **Bytes.** Keys once, `n * num_kv_heads * head_dim * 2`; logits `n * num_qo_heads * 4` written.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
