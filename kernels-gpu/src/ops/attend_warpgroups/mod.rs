//! `attend` for whole blocks on Hopper: as [`attend_prefill`](mod@crate::ops::attend_prefill), with products of warpgroups.
//!
//! ```text
//! for each row, KV head, 128 query rows:                     (an item; a block takes one after the other, a warpgroup has 64 rows)
//!     for each tile of 128 places (64 of heads of 256) that the last of these queries sees:
//!         s = logit(q k^T),  -inf where the rank is not seen
//!         p = exp(s - max so far);  out = out * correction + p v
//!     out / sum, lse
//! ```
//! Departures from the loops:
//! 1. *A warpgroup copies, two multiply.* Keys, values and items go through rings of two stages each, queries
//!    through one of one stage, all of them item after item: those of the next item arrive while this one is worked on. Registers
//!    go to the two that multiply (`REGISTERS`).
//! 2. *Order.* The products of the next tile's keys are started before those of this tile's values, so that the weights of
//!    the next tile are computed while the latter run.
//! 3. *Shared memory.* 64 dimensions of a place are a swizzled line of 128 bytes ([`Columns`](crate::simt::warpgroup::Columns)), for keys
//!    (dimensions are rows of B) and values (places are). Copies that scatter the pieces of a line take twice as long.
//!    Of heads of 256 the output takes 128 registers of a thread and leaves none for the queries, so these are swizzled lines, too
//!    ([`Rows`](crate::simt::warpgroup::Rows)): both operands of the first product are read from shared memory.
//! 4. *The largest logit so far* is raised where another is larger by more than [`SLACK`](crate::common::softmax::SLACK), so
//!    that the output is hardly ever scaled.
//! 5. *Values that are not finite.* A query that does not see a value must not multiply it by its weight of 0. Tiles that not all
//!    queries see are searched for such values; where there are some, the values are added one by one, and zeros take their place
//!    in the product.
//!
//! **Bytes.** Keys and values of the list once for each 128 query rows: from L2, but for the first.
//!
//! **Operations.** `4 * head_dim` for each query row and place.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
