//! `attend` for few queries: attention of each row's block over its list, keys and values straight to tensor cores.
//!
//! ```text
//! for each row, KV head, 8 query rows, split of the list's tiles:                    (a block)
//!     for each tile of 16 places:                                                    (a warp)
//!         s = logit(rotate(k, rank) . q),  -inf where the rank is not seen
//!         p = exp(s - max so far);  out = out * correction + v^T p
//!     merge the warps
//! merge the splits                                                                   (the last block to finish)
//! ```
//! Departures from the loops:
//! 1. Everything is transposed, so that the 16 rows of `mma.m16n8k16` are tokens, then dimensions, and query rows, of
//!    which there are few, its 8 columns. The head dimension is permuted alike in queries and keys, so that the piece a
//!    lane loads from a key *is* its A fragment: chunk `c` of `8 W` dimensions gives lane `t` (of 4) the dimensions
//!    `8 W c + 2 W t ..`, `W` words. Of values a lane loads the same piece of four tokens, and pairs them by byte
//!    permutation: word `w` of chunk `v` holds rows `16 W v + 2 W g + 2 w` and the next. Nothing passes through shared
//!    memory but the queries.
//! 2. Keys are rotated in registers, where both elements of a pair lie in one lane: for half-split pairs of the whole
//!    head, chunk `c` pairs with chunk `c + C / 2`. (For `D = 96` pieces are 8 bytes, since 48 is no multiple of 32.)
//!    Where pairs are over a part of the head, or odd in number, `_any_pairs` permutes the head dimension once more, in queries
//!    and keys alike: first elements of all pairs, then second ones, so that they are apart by half a head again. Half-split
//!    pieces of the key remain pieces where the number of pairs is a multiple of `2 W`; elsewhere, and with neighbours, elements
//!    are loaded one by one, `2 W` times as many loads.
//!    Rotated queries and keys are split in high and low halves, as in [`score`](mod@crate::ops::score), so that rotation
//!    costs no precision. (High halves of f16 are scaled by a power of two, since a rotated pair may be beyond its range.)
//! 3. A tile's keys are multiplied while its values are in flight; both are replaced by the next tile's as soon as they
//!    are used, from pages that are looked up a tile ahead. (Of heads of 256, keys and values take 64 registers each: these are asked
//!    for when their keys are multiplied, and the next keys when they are added.)
//! 4. Tiles are dealt to splits and warps in turn, so that a warp can look up its first places before it knows how many
//!    there are: every look-up is a trip to memory, and a short list takes as long as the chain of them.
//! 5. Every warp keeps a softmax of its own over all 8 query rows. Warps and splits are merged in a fixed order: the bits
//!    of the result depend on the launch shape, not on timing.
//!
//! **Bytes.** Keys and values of the list once: `len * num_kv_heads * head_dim * 4` for up to 8 query rows a KV head.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
