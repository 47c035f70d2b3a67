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
/// Places of a tile: as many as shared memory has room for.
pub(super) const fn tile(head_dim: u32) -> u32 {
    if head_dim > 128 { 32 } else { 64 }
}

/// Fragments of eight places in a tile.
pub const fn tile_fragments(head_dim: u32) -> usize {
    (tile(head_dim) / 8) as usize
}

/// Whether registers hold a warp's queries from tile to tile; if not, every tile reads them from shared memory.
pub(super) const fn keeps_queries(head_dim: u32) -> bool {
    head_dim <= 128
}
/// Elements between rows of shared memory beyond the head: 16 bytes, so that eight rows lie in different banks.
pub(super) const PAD: u32 = 8;

/// Shared memory of a block.
pub(super) struct Layout {
    /// `[QUERY_ROWS, head_dim + PAD]`.
    pub(super) queries: Region<u16>,
    /// `[2, tile, head_dim + PAD]`.
    pub(super) keys: Region<u16>,
    /// As `keys`.
    pub(super) values: Region<u16>,
    /// Weights of each warp that are added one by one, `[WARPS, 16, tile]`. None where registers keep the queries: it is their memory,
    /// then.
    pub(super) weights: Region<u16>,
    /// Element offsets of each place's key and value, `[2, tile]`.
    pub(super) key_offsets: Region<u64>,
    /// As `key_offsets`.
    pub(super) value_offsets: Region<u64>,
    /// Rank of each place, `[4, tile]`: a tile's ranks are needed until it is done.
    pub(super) ranks: Region<u32>,
    pub(super) bytes: u32,
}

impl Layout {
    pub(super) const fn new(head_dim: u32) -> Layout {
        let (pitch, tile) = (head_dim + PAD, tile(head_dim));
        let mut carve = Carve::new();
        Layout {
            queries: carve.array(QUERY_ROWS * pitch, 16),
            keys: carve.array(2 * tile * pitch, 16),
            values: carve.array(2 * tile * pitch, 16),
            weights: carve.array(if keeps_queries(head_dim) { 0 } else { QUERY_ROWS * tile }, 16),
            key_offsets: carve.array(2 * tile, 16),
            value_offsets: carve.array(2 * tile, 16),
            ranks: carve.array(4 * tile, 16),
            bytes: carve.bytes(),
        }
    }
}

/// Shared memory of a block.
pub const fn shared_bytes(head_dim: u32) -> u32 {
    Layout::new(head_dim).bytes
}

impl<T> AttendParams<T> {
    /// A block per 128 query rows, KV head, and row.
    pub const fn prefill_dims(&self, head_dim: u32) -> Dims {
        let tiles = (self.max_block_len * self.group).div_ceil(QUERY_ROWS);
        Dims {
            grid: [tiles, self.num_kv_heads, self.batch.num_rows],
            block: [THREADS, 1, 1],
            shared_bytes: shared_bytes(head_dim),
            cluster: 1,
        }
    }
}
