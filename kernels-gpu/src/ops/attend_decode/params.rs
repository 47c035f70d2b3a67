//! Splits of a list, launch dimensions and shared memory.

use crate::launch::{Dims, GpuInfo};
use crate::limits::{FRAGMENT_COLUMNS, TILE_TOKENS};
use crate::ops::attend::AttendParams;
use crate::simt::data::V2;
use crate::simt::shared::{Carve, Region};

/// Warps of a block, one of which runs on an SM at a time: 11 with up to 168 registers a thread, 8 with up to 255 where
/// rotated keys, larger heads, or pieces that are half as wide, need more.
pub(super) const fn warps(head_dim: u32, rotate: bool) -> u32 {
    if rotate || head_dim > 128 || !head_dim.is_multiple_of(64) { 8 } else { MAX_WARPS }
}

/// Warps of a block at most.
pub(super) const MAX_WARPS: u32 = 11;
/// Places of a tile: the depth of one product of the tensor cores.
pub(super) const TILE: u32 = TILE_TOKENS;
/// Query rows of a block: the columns of one `mma`.
pub const QUERY_ROWS: u32 = FRAGMENT_COLUMNS;
/// Splits of a list at most.
pub(super) const MAX_SPLITS: u32 = 128;

/// Shared memory of a block.
pub(super) struct Layout {
    /// Rotated queries, `[QUERY_ROWS, head_dim]`.
    pub(super) rotated: Region<f32>,
    /// Query fragments, `[high and low, chunk, lane, words]`.
    pub(super) queries: Region<u32>,
    /// Outputs of the warps, `[warps, QUERY_ROWS, head_dim]`.
    pub(super) out: Region<f32>,
    /// Largest logit and sum, `[warps, QUERY_ROWS]`.
    pub(super) stats: Region<V2<f32>>,
    pub(super) bytes: u32,
}

impl Layout {
    pub(super) const fn new(head_dim: u32, warps: u32) -> Layout {
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

/// Shared memory of a block.
pub const fn shared_bytes(head_dim: u32, rotates: bool) -> u32 {
    Layout::new(head_dim, warps(head_dim, rotates)).bytes
}

impl<T> AttendParams<T> {
    /// Tiles of query rows that the longest block needs.
    pub(super) const fn query_tiles(&self) -> u32 {
        (self.max_block_len * self.group).div_ceil(QUERY_ROWS)
    }

    /// Rows, KV heads and tiles of query rows: what [`AttendParams::counters`] counts for.
    pub const fn decode_units(&self) -> u32 {
        self.batch.num_rows * self.num_kv_heads * self.query_tiles()
    }

    /// Splits that each list is cut into: a block of each runs at a time, with a tile for each warp.
    pub(super) const fn decode_splits(&self, gpu: &GpuInfo, head_dim: u32) -> u32 {
        let units = self.decode_units();
        let fair = gpu.num_sms / if units == 0 { 1 } else { units };
        let useful = self.max_len.div_ceil(TILE * warps(head_dim, self.rotates()));
        let splits = if fair < useful { fair } else { useful };
        match splits {
            0 => 1,
            1..=MAX_SPLITS => splits,
            _ => MAX_SPLITS,
        }
    }

    /// Whether keys are rotated here.
    pub(super) const fn rotates(&self) -> bool {
        self.rope.coarse.addr() != 0
    }

    /// A block per split, KV head and tile of query rows, and row.
    pub const fn decode_dims(&self, gpu: &GpuInfo, head_dim: u32) -> Dims {
        let warps = warps(head_dim, self.rotates());
        Dims {
            grid: [
                self.decode_splits(gpu, head_dim),
                self.num_kv_heads * self.query_tiles(),
                self.batch.num_rows,
            ],
            block: [32 * warps, 1, 1],
            shared_bytes: shared_bytes(head_dim, self.rotates()),
            cluster: 1,
        }
    }
}

/// Units times splits at most wherever a list is cut into several: what the workspace must hold. Counters are no more.
pub const fn max_parts(gpu: &GpuInfo) -> u32 {
    gpu.num_sms
}
