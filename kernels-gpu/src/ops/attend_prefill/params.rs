//! Launch dimensions and shared memory.

use crate::launch::Dims;
use crate::ops::attend::AttendParams;
use crate::simt::shared::{Carve, Region};

/// Threads of a block.
pub(super) const THREADS: u32 = 256;
/// Warps of a block.
pub(super) const WARPS: u32 = THREADS / 32;
/// Query rows of a block: 16 a warp.
pub(super) const QUERY_ROWS: u32 = 16 * WARPS;
/// Places of a tile.
pub(super) const TILE: u32 = 64;
/// Elements between rows of shared memory beyond the head: 16 bytes, so that eight rows lie in different banks.
pub(super) const PAD: u32 = 8;

/// Shared memory of a block.
pub(super) struct Layout {
    /// `[QUERY_ROWS, head_dim + PAD]`.
    pub(super) queries: Region<u16>,
    /// `[2, TILE, head_dim + PAD]`.
    pub(super) keys: Region<u16>,
    /// As `keys`.
    pub(super) values: Region<u16>,
    /// Element offsets of each place's key and value, `[2, TILE]`.
    pub(super) key_offsets: Region<u64>,
    /// As `key_offsets`.
    pub(super) value_offsets: Region<u64>,
    /// Rank of each place, `[4, TILE]`: a tile's ranks are needed until it is done.
    pub(super) ranks: Region<u32>,
    pub(super) bytes: u32,
}

impl Layout {
    pub(super) const fn new(head_dim: u32) -> Layout {
        let pitch = head_dim + PAD;
        let mut carve = Carve::new();
        Layout {
            queries: carve.array(QUERY_ROWS * pitch, 16),
            keys: carve.array(2 * TILE * pitch, 16),
            values: carve.array(2 * TILE * pitch, 16),
            key_offsets: carve.array(2 * TILE, 16),
            value_offsets: carve.array(2 * TILE, 16),
            ranks: carve.array(4 * TILE, 16),
            bytes: carve.bytes(),
        }
    }
}

impl<T> AttendParams<T> {
    /// A block per 128 query rows, KV head, and row.
    pub const fn prefill_dims(&self, head_dim: u32) -> Dims {
        let tiles = (self.max_block_len * self.group).div_ceil(QUERY_ROWS);
        Dims {
            grid: [tiles, self.num_kv_heads, self.batch.num_rows],
            block: [THREADS, 1, 1],
            shared_bytes: Layout::new(head_dim).bytes,
            cluster: 1,
        }
    }
}
