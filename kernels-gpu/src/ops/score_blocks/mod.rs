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
//! 1. *Columns.* A product has 64 columns, 16 for each lane `t` of four: its *slots*. Slot `G q + g` is head `g` of block `t + 4 q`, so a
//!    lane has all heads of its blocks, and adds them up without a shuffle. Groups of up to `G` = 4, 8 or 16 heads leave room for
//!    16, 8 or 4 blocks. Slot `s` is column `8 (s / 2) + 2 t + s % 2`.
//! 2. *Halves.* The f32 query is split in two 16-bit numbers of its sign, `q = high + low`; the product has the keys once more for
//!    the low halves, and so adds them up. Neither half is 0 where `q` is not, so that an infinite key makes infinities of one
//!    sign.
//! 3. *Rows* are tokens. A warp copies its 16 keys to stages of its own, a line at a time, and loads them as A fragments. On Hopper a
//!    warpgroup multiplies ([`warpgroup`](crate::simt::warpgroup)), elsewhere each of its warps.
//! 4. *Statistics* have a reference in place of the largest logit, base 2: the larger of a lane's first two tokens, raised only
//!    where a sum reaches 2^63. Tokens that are no candidates of a block add 0. What is not plain takes the slow way: NaN, infinities,
//!    references so large that their rounding matters.
//! 5. *The same bits, however many blocks share a pass.* Statistics are those of chunks of [`CHUNK`] tokens, counted from token
//!    0, of each warp; they are folded in an order that depends on the row alone (`fold`). What a column computes does not
//!    depend on the others, nor on which way they take.
//! 6. Where the queries of all heads do not fit into shared memory, `vote` goes through all tokens with some heads after the others, in
//!    their order, and adds to the votes: twice with 8 KV heads of 128 on Hopper.
//! 7. *Chunks* are dealt out as warpgroups ask for them, the last of the tokens first: SMs are not equally fast, nor chunks equal.
//!
//! **Bytes.** Keys twice for a group, `2 * n * num_kv_heads * head_dim * 2`; votes, `4 n` a block, and again twice as many for
//! each further time that `vote` goes through the tokens; statistics, 4 bytes a head for every 128 tokens of a block.
//!
//! **Operations.** `2 * n * num_kv_heads * head_dim * 128` in each pass, and an exponential of each logit.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
