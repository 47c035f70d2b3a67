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
/// Places of a tile.
pub(super) const TILE: u32 = 128;
/// Places of a tile that a warp copies.
pub(super) const WARP_PLACES: u32 = TILE / (WARPGROUP / 32);
/// Stages of keys, and of values: one is read while the other is in flight.
pub(super) const STAGES: u32 = 2;
/// Items: one is worked on, and the next is known.
pub(super) const ITEMS: u32 = 2;
/// Words of an item.
pub(super) const ITEM_WORDS: u32 = 12;
/// Bytes of a line, of 64 dimensions of a place, and of those of all places.
pub(super) const LINE_BYTES: u32 = 128;
pub(super) const LINES_BYTES: u32 = TILE * LINE_BYTES;
/// Elements between query rows beyond the head: 16 bytes, so that eight rows lie in different banks.
pub(super) const PAD: u32 = 8;
/// Registers of a thread that copies.
pub(super) const PRODUCER_REGISTERS: u32 = 56;
/// Registers of a thread that multiplies: weights, output, queries and weights as operands are 192 of them.
pub const CONSUMER_REGISTERS: u32 = 224;

const _: () = assert!(WARP_PLACES == 32 && QUERY_ROWS == TILE);
// A block is launched with 168 for each thread.
const _: () = assert!(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (1 + CONSUMERS) * 168);

/// Shared memory of a block.
pub(super) struct Layout {
    /// `[QUERY_ROWS, head_dim + PAD]`.
    pub(super) queries: Region<u16>,
    /// `[STAGES, head_dim / 64, TILE]` swizzled lines.
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
            queries: carve.array(QUERY_ROWS * (head_dim + PAD), 16),
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
        head_dim.div_ceil(64) * LINES_BYTES
    }
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
            shared_bytes: Layout::new(head_dim).bytes,
            cluster: 1,
        }
    }
}
