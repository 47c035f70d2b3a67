//! `attend` for few queries: attention of each row's block over its list, keys and values straight to tensor cores.
//!
//! ```text
//! for each row, KV head, 8 query rows, share of the list's tiles:                    (a block)
//!     for each tile of 16 places:                                                    (a warp)
//!         s = logit(rotate(k, rank) . q),  -inf where the rank is not seen
//!         p = exp(s - max so far);  out = out * correction + v^T p
//!     merge the warps
//! merge the shares                                                                   (the last block to finish)
//! ```
//! Departures from the loops:
//! 1. Everything is transposed, so that the 16 rows of `mma.m16n8k16` are tokens, then dimensions, and query rows, of
//!    which there are few, its 8 columns. The head dimension is permuted alike in queries and keys, so that the piece a
//!    lane loads from a key *is* its A fragment: chunk `c` of `8 W` dimensions gives lane `t` (of 4) the dimensions
//!    `8 W c + 2 W t ..`, `W` words. Of values a lane loads the same piece of four tokens, and pairs them by byte
//!    permutation: word `w` of chunk `v` holds rows `16 W v + 2 W g + 2 w` and the next. Nothing passes through shared
//!    memory but the queries.
//! 2. Keys are rotated in registers, where both elements of a pair lie in one lane: for half-split pairs over the whole
//!    head, chunk `c` pairs with chunk `c + C / 2`. (For `D = 96` pieces are 8 bytes, since 48 is no multiple of 32.)
//!    Rotated queries and keys are split in high and low parts, as in [`score`](mod@crate::score), so that rotation
//!    costs no precision. (Half-split pairs over a part of the head are left to [`gather`](mod@crate::gather).)
//! 3. A tile's keys are multiplied while its values are under way; both are replaced by the next tile's as soon as they
//!    are used, at places that were looked up a tile ahead.
//! 4. Tiles are dealt to shares and warps in turn, so that a warp can look up its first places before it knows how many
//!    there are: every look-up is a trip to memory, and a short list takes as long as the chain of them.
//! 5. Every warp keeps a softmax of its own over all 8 query rows. Warps and shares are merged in a fixed order: the bits
//!    of the result depend on the launch shape, not on timing.
//!
//! **Bytes.** Keys and values of the list once: `len * num_kv_heads * head_dim * 4` for up to 8 query rows a KV head.

use crate::attention::AttendParams;
use crate::launch::{Dims, GpuInfo};
use crate::simt::data::V2;
use crate::simt::shared::{Carve, Region};

/// Instances for keys that are used as they are,
pub const NATIVE: u32 = 0;
/// rotated in pairs of one half of the head with the other, or
pub const HALVES: u32 = 1;
/// rotated in pairs of neighbours.
pub const NEIGHBOURS: u32 = 2;

/// Warps of a block, one of which runs on an SM at a time: 11 with up to 168 registers a thread, 8 with up to 255 where
/// rotated keys, or pieces that are half as wide, need more.
const fn warps(head_dim: u32, rotate: bool) -> u32 {
    if rotate || !head_dim.is_multiple_of(64) { 8 } else { MAX_WARPS }
}
/// Warps of a block at most.
const MAX_WARPS: u32 = 11;
/// Places of a tile: the depth of one `mma`.
const TILE: u32 = 16;
/// Query rows of a block: the columns of one `mma`.
pub const QUERY_ROWS: u32 = 8;
/// Shares of a list at most.
const MAX_SHARES: u32 = 128;

/// Shared memory of a block.
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct Layout {
    /// Rotated queries, `[QUERY_ROWS, head_dim]`.
    rotated: Region<f32>,
    /// Query fragments, `[high and low, chunk, lane, words]`.
    queries: Region<u32>,
    /// Outputs of the warps, `[warps, QUERY_ROWS, head_dim]`.
    out: Region<f32>,
    /// Largest logit and sum, `[warps, QUERY_ROWS]`.
    stats: Region<V2<f32>>,
    bytes: u32,
}

impl Layout {
    const fn new(head_dim: u32, warps: u32) -> Layout {
        let mut carve = Carve::new();
        Layout {
            rotated: carve.array(QUERY_ROWS * head_dim, 16),
            queries: carve.array(2 * QUERY_ROWS * head_dim / 2, 16),
            out: carve.array(warps * QUERY_ROWS * head_dim, 16),
            stats: carve.array(warps * QUERY_ROWS, 16),
            bytes: carve.bytes(),
        }
    }
}

impl<T> AttendParams<T> {
    /// Tiles of query rows that the longest block needs.
    const fn query_tiles(&self) -> u32 {
        (self.max_block_len * self.group).div_ceil(QUERY_ROWS)
    }

    /// Rows, KV heads and tiles of query rows: what [`AttendParams::counters`] counts for.
    pub const fn decode_units(&self) -> u32 {
        self.batch.num_rows * self.num_kv_heads * self.query_tiles()
    }

    /// Shares that each list is cut into: a block of each runs at a time, with a tile for each warp.
    const fn decode_shares(&self, gpu: &GpuInfo, head_dim: u32) -> u32 {
        let units = self.decode_units();
        let fair = gpu.num_sms / if units == 0 { 1 } else { units };
        let useful = self.max_len.div_ceil(TILE * warps(head_dim, self.rotates()));
        let shares = if fair < useful { fair } else { useful };
        match shares {
            0 => 1,
            1..=MAX_SHARES => shares,
            _ => MAX_SHARES,
        }
    }

    /// Whether keys are rotated here.
    const fn rotates(&self) -> bool {
        self.rope.coarse.addr() != 0
    }

    /// A block per share, KV head and tile of query rows, and row.
    pub const fn decode_dims(&self, gpu: &GpuInfo, head_dim: u32) -> Dims {
        let warps = warps(head_dim, self.rotates());
        Dims {
            grid: [
                self.decode_shares(gpu, head_dim),
                self.num_kv_heads * self.query_tiles(),
                self.batch.num_rows,
            ],
            block: [32 * warps, 1, 1],
            shared_bytes: Layout::new(head_dim, warps).bytes,
            cluster: 1,
        }
    }
}

/// Units times shares at most wherever a list is cut into several: what the workspace must hold. Counters are no more.
pub const fn max_parts(gpu: &GpuInfo) -> u32 {
    gpu.num_sms
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use kernel::attend_decode;

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub(crate) mod kernel;
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod parts;
