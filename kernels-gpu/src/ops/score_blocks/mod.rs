//! `score_blocks`: votes for many blocks of one sequence, which read its keys together.
//!
//! ```text
//! for each group of blocks (rows that share their pages), KV head h, token j of any block's candidates:
//!     logit[b, g, j] = scale * sum over d of q[b, h, g, d] * k[h, j, d]      one product: rows are blocks and heads
//! stats:  max[b, h, g], sum[b, h, g] over the candidates of block b           first pass over the keys
//! vote:   vote[b, j] = sum over h, g of exp(logit - max) / sum                second pass; no logit is stored
//! ```
//! Departures from these loops:
//!
//! 1. *Rows and columns.* A product has the scoring queries of a KV head as its 64 rows, 16 of each warp, and 64 tokens as columns. Groups of
//!    up to `G` = 4, 8 or 16 heads leave room for 16, 8 or 4 blocks. Member `m` of a group is in rows `g` and `g + 8` (`m % 2`) of the
//!    `G / 2` adjacent `g` of its block, so a lane has two heads of one block and 16 tokens: references and sums are a few registers, and the
//!    heads' probabilities are added up within the lane, then by exchanges with its neighbours.
//! 2. *Halves.* The f32 query is split in two 16-bit numbers of its sign, `q = high + low`; the product has the keys once more for
//!    the low halves, and so adds them up. Neither half is 0 where `q` is not, so that an infinite key makes infinities of one
//!    sign. `stats` splits them; one of its blocks for each KV head writes them to memory for `vote`, as products read them.
//! 3. *Keys.* A warpgroup copies 64 tokens to a stage of its own, a line at a time, and multiplies from there, on Hopper as one
//!    ([`warpgroup`](crate::simt::warpgroup)), elsewhere each of its warps by itself. While it does, the next tile is in flight.
//! 4. *Statistics* have a reference in place of the largest logit, base 2: the largest of a lane's first tile, raised only
//!    where a sum reaches 2^63. Tokens that are no candidates of a block add 0. What is not plain takes the slow way: NaN, infinities,
//!    references so large that their rounding matters.
//! 5. *The same bits, however many blocks share a pass.* Statistics are those of chunks of [`CHUNK`] tokens, counted from token
//!    0; they are folded in an order that depends on the row alone (`fold`). What a row computes does not
//!    depend on the others, nor on which way they take.
//! 6. *Heads.* The queries of all heads do not fit into shared memory. A warpgroup of `vote` goes through a few of its tiles for one
//!    head after the other, whose queries are copied meanwhile, and keeps their votes in shared memory: each is written once.
//! 7. *Chunks* of `stats` are dealt out as warpgroups ask for them, the last of the tokens first: SMs are not equally fast, nor chunks equal.
//!
//! **Bytes.** Keys twice for a group, `2 * n * num_kv_heads * head_dim * 2`; votes, `4 n` a block; statistics, 8 bytes a head for every 1024
//! tokens of a block. From L2, in `vote`, a head's queries for every few tiles of a block: a quarter of the keys' bytes with heads of 128.
//!
//! **Operations.** `2 * n * num_kv_heads * head_dim * 128` in each pass, and an exponential of each logit.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
