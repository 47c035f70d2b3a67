//! Parameters, launch dimensions and shared memory.

use crate::common::layout::{BatchTables, LOGIT_TILE, PageStrides};
use crate::common::ring::Ring;
use crate::launch::{Dims, GpuInfo};
use crate::limits::{COLUMNS, WARPGROUP, WARPGROUP_ROWS, columns};
use crate::simt::data::{V2, V4};
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Threads of a block of [`fold`](super::kernel::fold).
pub(super) const FOLD_THREADS: u32 = 128;
/// Stages of keys of a warpgroup: one is read while the others are in flight.
pub(super) const STAGES: u32 = 2;
// The kernels go from one to the other, and wait for all copies but those that come next.
const _: () = assert!(STAGES == 2);
/// Rows of a product: scoring queries of a group's blocks, one for each block and head.
pub(super) const ROWS: u32 = WARPGROUP_ROWS;
/// Rows that a warp multiplies.
pub(super) const WARP_ROWS: u32 = ROWS / 4;
/// Blocks of a group at most.
pub(super) const MAX_BLOCKS: u32 = ROWS / COLUMNS[0];
/// Tokens that a warpgroup multiplies at a time, columns of a product.
pub(super) const TILE: u32 = 4 * LOGIT_TILE;
/// [Fragments](crate::common::fragment) of eight tokens.
pub(super) const FRAGMENTS: usize = TILE as usize / 8;
/// Tokens of a chunk, the unit of statistics: few enough that 32 k tokens are work for every SM.
pub const CHUNK: u32 = 1024;
/// Bytes of a line, the unit of operands in shared memory: 64 dimensions.
pub(super) const LINE: u32 = 128;
/// Bytes from lines of one row to those of the next eight.
pub(super) const EIGHT_ROWS: u32 = 8 * LINE;

/// Of a tile's votes in shared memory: two for each thread of the warpgroup.
pub(super) const VOTES_OF_TILE: u32 = 2 * WARPGROUP;
/// Warpgroups of a block of [`stats`](super::kernel::stats) and [`vote`](super::kernel::vote), one on an SM: they share the queries, and their
/// products, exponentials and copies overlap.
const fn warpgroups(head_dim: u32, wide: bool) -> u32 {
    match (head_dim, wide) {
        (96, true) => 3, // for want of registers
        (..=128, true) => 4,
        (_, true) => 2,
        (_, false) => 1, // for want of shared memory; an SM with more has several blocks
    }
}

/// Tiles of a warpgroup that [`vote`](super::kernel::vote) takes for a head before the next head's queries, and whether these are copied
/// meanwhile: as there is room.
const fn share(head_dim: u32, wide: bool) -> (u32, bool) {
    match (head_dim > 128, wide) {
        (false, true) => (if head_dim > 64 { 2 } else { 4 }, true),
        _ => (4, false),
    }
}

/// Threads of a block of [`stats`](super::kernel::stats) and [`vote`](super::kernel::vote).
pub(super) const fn threads(head_dim: u32, wide: bool) -> u32 {
    warpgroups(head_dim, wide) * WARPGROUP
}

/// Parameters of [`stats`](super::kernel::stats), [`fold`](super::kernel::fold) and [`vote`](super::kernel::vote).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ScoreBlocksParams<T> {
    /// Paged by `stride`, read.
    pub k_pages: GlobalPtr<T>,
    /// \[num_rows, num_qo_heads, head_dim\] f32, read: scoring queries.
    pub queries: GlobalPtr<f32>,
    /// \[num_rows\] u32, read: rows with [`SCORE`](crate::ops::pool::SCORE) are scored.
    pub actions: GlobalPtr<u32>,
    /// \[num_groups, 2\] u32, read: first row and number of rows of each group, at most [`blocks_of_group`]. The pages of its last row
    /// begin with those of every other.
    pub groups: GlobalPtr<V2<u32>>,
    /// \[[`num_entries`]\] pairs of f32, workspace: reference and sum of each chunk and head.
    pub partial: GlobalMut<V2<f32>>,
    /// \[num_rows\] times [`operand_bytes`], workspace: queries as products read them, and sums.
    pub operands: GlobalMut<V4<u32>>,
    /// \[num_groups, num_kv_heads\] u32, zero before and after: chunks that have been asked for.
    pub counters: GlobalMut<u32>,
    /// \[max_tokens\] f32, written for candidates.
    pub votes: GlobalMut<f32>,
    /// Rows and page tables.
    pub batch: BatchTables,
    /// Strides of the pages; multiples of 8.
    pub stride: PageStrides,
    /// Groups of rows.
    pub num_groups: u32,
    /// KV heads.
    pub num_kv_heads: u32,
    /// Query heads that share a KV head.
    pub group: u32,
    /// First tokens that are always selected.
    pub n_init: u32,
    /// Last tokens before the block that are always selected.
    pub n_local: u32,
    /// Factor on the products, times log2(e), divided by `rotated_scale`.
    pub scale_log2: f32,
    /// Queries of a narrow type, which rotation may have brought out of its range, are multiplied by this power of two.
    pub rotated_scale: f32,
    /// Elements of a head.
    pub head_dim: u32,
}

const _: () = assert!(size_of::<ScoreBlocksParams<u16>>() == 176);

/// Blocks of a group at most, whose KV heads have `group` query heads each; `None` where there is no kernel for so many.
pub const fn blocks_of_group(group: u32) -> Option<u32> {
    match columns(group) {
        Some(columns) => Some(ROWS / columns),
        None => None,
    }
}

/// Entries of [`ScoreBlocksParams::partial`] for `num_rows` rows whose pages have `num_slots` slots for tokens.
pub const fn num_entries(num_slots: u64, num_rows: u64, num_qo_heads: u64) -> u64 {
    (num_slots / CHUNK as u64 + 2 * num_rows) * num_qo_heads
}

/// Bytes of [`ScoreBlocksParams::operands`] for each row of a batch.
pub const fn operand_bytes(head_dim: u32, num_kv_heads: u64) -> u64 {
    bytes_of_slab(head_dim) as u64 * num_kv_heads
}

/// Lines that a row has.
pub(super) const fn lines(head_dim: u32) -> u32 {
    (2 * head_dim).div_ceil(LINE)
}

/// Bytes of the queries of a KV head, high and low halves.
pub(super) const fn bytes_of_head(head_dim: u32) -> u32 {
    2 * lines(head_dim) * ROWS * LINE
}

/// Bytes of a *slab*, a warp's rows of a KV head: `[high and low, lines, WARP_ROWS]` lines, then `[WARP_ROWS]` sums.
pub(super) const fn bytes_of_slab(head_dim: u32) -> u32 {
    bytes_of_head(head_dim) / ROWS * WARP_ROWS + 8 * WARP_ROWS
}

/// Bytes of a stage of keys.
pub(super) const fn bytes_of_stage(head_dim: u32) -> u32 {
    lines(head_dim) * TILE * LINE
}

/// Shared memory of a block.
pub(super) struct Layout {
    /// \[buffers, high and low, lines, ROWS\] lines of a KV head's queries, [swizzled](crate::simt::warpgroup::Rows).
    pub(super) queries: Region<u16>,
    /// \[warpgroups, STAGES, lines, TILE\] lines of keys, [swizzled](crate::simt::warpgroup::Columns).
    pub(super) stages: Region<u16>,
    /// \[buffers, ROWS\]: reference, negated, and inverse sum.
    pub(super) sums: Region<V2<f32>>,
    /// Of the buffers.
    pub(super) ring: Ring,
    /// \[warpgroups, share, 2, threads of one\]: votes of tiles, in [`vote`](super::kernel::vote).
    pub(super) votes: Region<V4<f32>>,
    /// Tiles of a warpgroup there.
    pub(super) share: u32,
    /// Candidates of each block.
    pub(super) ranges: Region<V2<u32>>,
    /// \[warpgroups, 2\]: numbers of chunks, in [`stats`](super::kernel::stats).
    pub(super) tickets: Region<u32>,
    pub(super) bytes: u32,
}

impl Layout {
    /// Of [`stats`](super::kernel::stats).
    pub(super) const fn stats(head_dim: u32, wide: bool) -> Layout {
        Layout::new(head_dim, 1, threads(head_dim, wide) / WARPGROUP, 0)
    }

    /// Of [`vote`](super::kernel::vote).
    pub(super) const fn vote(head_dim: u32, wide: bool) -> Layout {
        let (share, ahead) = share(head_dim, wide);
        Layout::new(head_dim, if ahead { 2 } else { 1 }, threads(head_dim, wide) / WARPGROUP, share)
    }

    const fn new(head_dim: u32, buffers: u32, warpgroups: u32, share: u32) -> Layout {
        let mut carve = Carve::new();
        Layout {
            queries: carve.array(buffers * bytes_of_head(head_dim) / 2, EIGHT_ROWS),
            stages: carve.array(warpgroups * STAGES * bytes_of_stage(head_dim) / 2, EIGHT_ROWS),
            sums: carve.array(buffers * ROWS, 16),
            ring: Ring::carve(&mut carve, buffers),
            votes: carve.array(warpgroups * share * VOTES_OF_TILE, 16),
            share,
            ranges: carve.array(MAX_BLOCKS, 16),
            tickets: carve.array(2 * warpgroups, 16),
            bytes: carve.bytes(),
        }
    }
}

/// Shared memory of a block at most, of all launches.
pub const fn shared_bytes(head_dim: u32, wide: bool) -> u32 {
    Layout::vote(head_dim, wide).bytes
}

impl<T> ScoreBlocksParams<T> {
    /// The launch of [`stats`](super::kernel::stats): blocks that fill the device, each for one KV head of a group.
    pub const fn stats_dims(&self, gpu: &GpuInfo) -> Dims {
        let blocks = self.resident(gpu) / (self.num_kv_heads * self.num_groups);
        Dims {
            grid: [if blocks == 0 { 1 } else { blocks }, self.num_kv_heads, self.num_groups],
            block: [threads(self.head_dim, gpu.bulk_copies), 1, 1],
            shared_bytes: Layout::stats(self.head_dim, gpu.bulk_copies).bytes,
            cluster: 1,
        }
    }

    /// The launch of [`fold`](super::kernel::fold): a block for each query head of each block of a group.
    pub const fn fold_dims(&self) -> Dims {
        let blocks = match blocks_of_group(self.group) {
            Some(blocks) => blocks,
            None => 1,
        };
        Dims {
            grid: [self.num_kv_heads * self.group, blocks, self.num_groups],
            block: [FOLD_THREADS, 1, 1],
            shared_bytes: FOLD_THREADS / 32 * 8,
            cluster: 1,
        }
    }

    /// The launch of [`vote`](super::kernel::vote): blocks that fill the device.
    pub const fn vote_dims(&self, gpu: &GpuInfo) -> Dims {
        let blocks = self.resident(gpu) / self.num_groups;
        Dims {
            grid: [if blocks == 0 { 1 } else { blocks }, self.num_groups, 1],
            block: [threads(self.head_dim, gpu.bulk_copies), 1, 1],
            shared_bytes: Layout::vote(self.head_dim, gpu.bulk_copies).bytes,
            cluster: 1,
        }
    }

    /// Blocks that run at a time; of small ones, as many as may have room.
    const fn resident(&self, gpu: &GpuInfo) -> u32 {
        if gpu.bulk_copies { gpu.num_sms } else { 2 * gpu.num_sms }
    }
}
