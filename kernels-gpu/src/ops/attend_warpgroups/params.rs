//! Launch dimensions and shared memory.

use crate::common::ring::Ring;
use crate::launch::{Dims, GpuInfo};
use crate::limits::{WARPGROUP, WARPGROUP_ROWS};
use crate::ops::attend::AttendParams;
use crate::simt::data::V4;
use crate::simt::shared::{Carve, Region};

/// Warpgroups that multiply.
pub(super) const CONSUMERS: u32 = 2;
/// Threads of a block.
pub(super) const THREADS: u32 = (1 + CONSUMERS) * WARPGROUP;
/// Query rows of an item.
pub(super) const QUERY_ROWS: u32 = CONSUMERS * WARPGROUP_ROWS;
/// Places of a tile: as many as registers have room for their logits, beside the output.
pub(super) const fn tile(head_dim: u32) -> u32 {
    if keeps_queries(head_dim) { 128 } else { 64 }
}

/// Fragments of eight places in a tile.
pub const fn tile_fragments(head_dim: u32) -> usize {
    (tile(head_dim) / 8) as usize
}

/// Whether registers hold a warp's queries; if not, the tensor cores read them from shared memory, as the keys.
pub(super) const fn keeps_queries(head_dim: u32) -> bool {
    head_dim <= 128
}

/// Places of a tile that a warp copies.
pub(super) const fn warp_places(head_dim: u32) -> u32 {
    tile(head_dim) / (WARPGROUP / 32)
}

/// Query rows that a warp copies.
pub(super) const WARP_QUERIES: u32 = QUERY_ROWS / (WARPGROUP / 32);
/// Stages of keys, and of values: one is read while the other is in flight.
pub(super) const STAGES: u32 = 2;
/// Items: one is worked on, and the next is known.
pub(super) const ITEMS: u32 = 2;
/// Words of an item.
pub(super) const ITEM_WORDS: u32 = 12;
/// Bytes of a line, of 64 dimensions of a place or a query row.
pub(super) const LINE_BYTES: u32 = 128;
/// Elements between query rows beyond the head: 16 bytes, so that eight rows lie in different banks.
pub(super) const PAD: u32 = 8;
/// Registers of a thread that copies, and of one that multiplies: weights, output, queries and weights as operands are 192 of them.
pub(super) const REGISTERS: [u32; 2] = [56, 224];
/// The same where registers do not keep the queries: a line of a place more is copied at a time, and 176 are enough.
pub(super) const REGISTERS_OF_LARGE_HEADS: [u32; 2] = [72, 216];

// A lane has a query row, or a place, of its warp.
const _: () = assert!(WARP_QUERIES == 32 && warp_places(128) == 32 && warp_places(256) == 16);
// A block is launched with 168 for each thread.
const _: () = assert!(REGISTERS[0] + CONSUMERS * REGISTERS[1] <= (1 + CONSUMERS) * 168);
const _: () =
    assert!(REGISTERS_OF_LARGE_HEADS[0] + CONSUMERS * REGISTERS_OF_LARGE_HEADS[1] <= (1 + CONSUMERS) * 168);

/// Shared memory of a block.
pub(super) struct Layout {
    /// `[QUERY_ROWS, head_dim + PAD]`; where registers do not keep them, `[head_dim / 64, QUERY_ROWS]` swizzled lines.
    pub(super) queries: Region<u16>,
    /// `[STAGES, head_dim / 64, tile]` swizzled lines.
    pub(super) keys: Region<u16>,
    /// As `keys`.
    pub(super) values: Region<u16>,
    /// Eight lines of zeros, which stand for all of a tile's values.
    pub(super) zeros: Region<u32>,
    /// `[ITEMS]` items.
    pub(super) items: Region<V4<u32>>,
    pub(super) item_ring: Ring,
    pub(super) query_ring: Ring,
    pub(super) key_ring: Ring,
    pub(super) value_ring: Ring,
    pub(super) bytes: u32,
}

impl Layout {
    pub(super) const fn new(head_dim: u32) -> Layout {
        let mut carve = Carve::new();
        Layout {
            queries: carve.array(
                if keeps_queries(head_dim) { QUERY_ROWS * (head_dim + PAD) } else { QUERY_ROWS * head_dim },
                1024,
            ),
            keys: carve.array(STAGES * Layout::stage_bytes(head_dim) / 2, 1024),
            values: carve.array(STAGES * Layout::stage_bytes(head_dim) / 2, 1024),
            zeros: carve.array(8 * LINE_BYTES / 4, 1024),
            items: carve.array(ITEMS * ITEM_WORDS / 4, 16),
            item_ring: Ring::carve(&mut carve, ITEMS),
            query_ring: Ring::carve(&mut carve, 1),
            key_ring: Ring::carve(&mut carve, STAGES),
            value_ring: Ring::carve(&mut carve, STAGES),
            bytes: carve.bytes(),
        }
    }

    /// Bytes of a tile's keys, or values.
    pub(super) const fn stage_bytes(head_dim: u32) -> u32 {
        head_dim.div_ceil(64) * Layout::lines_bytes(head_dim)
    }

    /// Bytes of the lines of 64 dimensions of a tile.
    pub(super) const fn lines_bytes(head_dim: u32) -> u32 {
        tile(head_dim) * LINE_BYTES
    }
}

/// Shared memory of a block.
pub const fn shared_bytes(head_dim: u32) -> u32 {
    Layout::new(head_dim).bytes
}

impl<T> AttendParams<T> {
    /// Items of a KV head of a row.
    pub(super) const fn query_blocks(&self) -> u32 {
        (self.max_block_len * self.group).div_ceil(QUERY_ROWS)
    }

    /// Items of a launch, those of rows with fewer query rows among them. More than the kernel can count are `u32::MAX`.
    pub(super) const fn num_items(&self) -> u32 {
        let of_row = self.query_blocks() as u64 * self.num_kv_heads as u64;
        let items = of_row.saturating_mul(self.batch.num_rows as u64);
        if items < u32::MAX as u64 { items as u32 } else { u32::MAX }
    }

    /// A block for each item, as many as run at a time; the others come after them. Too many items are refused as too large a grid.
    pub const fn warpgroups_dims(&self, gpu: &GpuInfo, head_dim: u32) -> Dims {
        let blocks = match self.num_items() {
            u32::MAX => u32::MAX,
            items if items < gpu.num_sms => items,
            _ => gpu.num_sms,
        };
        Dims {
            grid: [blocks, 1, 1],
            block: [THREADS, 1, 1],
            shared_bytes: shared_bytes(head_dim),
            cluster: 1,
        }
    }
}
