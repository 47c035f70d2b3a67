//! `score_blocks`: votes for many blocks of one sequence, which read its keys together.
//!
//! ```text
//! for each group of blocks (rows that share their pages), KV head h, token j of any block's candidates:
//!     logit[b, g, j] = scale * sum over d of q[b, h, g, d] * k[h, j, d]      one product: columns are blocks and heads
//! stats:  max[b, h, g], sum[b, h, g] over the candidates of block b           first pass over the keys
//! vote:   vote[b, j] = sum over h, g of exp(logit - max) / sum                second pass; no logit is stored
//! ```
//! Departures from these loops:
//!
//! 1. *Columns.* A product has 128 columns: 16 *slots* of eight. Lane `t` (of four) holds columns `2 t` and `2 t + 1` of each
//!    slot, so slot `G q + g` has there head `g` of block `t + 4 q`: its high halves in the first column, its low halves in
//!    the second (the f32 query is split in two 16-bit ones, `q = high + low`). A lane has whole logits, and all heads of its
//!    blocks, without a shuffle. Groups of `G` = 4, 8 or 16 heads leave room for 16, 8 or 4 blocks.
//! 2. *Rows* are tokens: a lane loads 16 bytes of a key at a time, straight into the registers of the A fragment, as
//!    [`score`](mod@crate::ops::score) does; the dimensions of the queries in shared memory are permuted likewise. On Hopper a
//!    warpgroup multiplies ([`warpgroup`](crate::simt::warpgroup)), elsewhere each of its warps.
//! 3. *Statistics* have a reference in place of the largest logit, base 2: the largest of a lane's first two tokens, raised only
//!    where a logit lies 2^64 above it. Such tokens, NaN, infinities and tiles at the ends of the candidates take the slow way.
//! 4. *The same bits, however many blocks share a pass.* Statistics are those of chunks of [`CHUNK`] tokens, counted from token
//!    0, of each warp; they are folded in an order that depends on the row alone (`fold`). What a column computes does not
//!    depend on the others.
//! 5. Where the queries of all heads do not fit into shared memory, `vote` is launched for some heads after the others, and adds
//!    to the votes.
//!
//! **Bytes.** Keys twice for a group, `2 * n * num_kv_heads * head_dim * 2`; votes, `4 n` a block, and again twice as many for
//! each further launch of `vote`; statistics, 1/32 of the votes a head.
//!
//! **Operations.** `n * num_kv_heads * head_dim * 128 * 2` a pass, a logit's exponential in each.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
