//! Parameters, launch dimensions and shared memory.

use crate::common::layout::{BatchTables, PageStrides};
use crate::launch::{Dims, GpuInfo};
use crate::limits::{CORE_BYTES, SHARED_BYTES_SM_80, WARPGROUP_ROWS, columns};
use crate::simt::data::V2;
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Threads of a block of [`stats`](super::kernel::stats): a warpgroup.
pub(super) const STATS_THREADS: u32 = 128;
/// Threads of a block of [`vote`](super::kernel::vote): warpgroups that share the queries.
pub(super) const VOTE_THREADS: u32 = 256;
/// Threads of a block of [`fold`](super::kernel::fold).
pub(super) const FOLD_THREADS: u32 = 128;
/// Blocks of [`stats`](super::kernel::stats) on an SM.
const BLOCKS_PER_SM: u32 = 2;
/// Tokens that a warpgroup multiplies at a time.
pub(super) const TILE: u32 = WARPGROUP_ROWS;
/// Columns of a product, eight a slot.
pub(super) const COLUMNS: u32 = 8 * SLOTS as u32;
/// Slots of a product.
pub(super) const SLOTS: usize = 16;
/// Tokens of a chunk, the unit of statistics: few enough that 32 k tokens are work for every SM.
pub const CHUNK: u32 = 1024;
/// Entries of statistics of a chunk: one for each warp of a warpgroup.
pub(super) const ENTRIES: u32 = 4;

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
    /// \[[`num_entries`]\] pairs of f32, workspace: reference and sum of each chunk, warp and head.
    pub partial: GlobalMut<V2<f32>>,
    /// \[num_rows, num_qo_heads\] pairs of f32, workspace: logarithm of the sum, base 2, and the inverse sum.
    pub sums: GlobalMut<V2<f32>>,
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
    /// First KV head of a launch of [`vote`](super::kernel::vote); the votes of those before are there already.
    pub first_kv_head: u32,
    /// KV heads of that launch.
    pub launch_kv_heads: u32,
}

const _: () = assert!(size_of::<ScoreBlocksParams<u16>>() == 176);

/// Blocks of a group at most, whose KV heads have `group` query heads each; `None` where there is no kernel for so many.
pub const fn blocks_of_group(group: u32) -> Option<u32> {
    match columns(group) {
        Some(columns) => Some(4 * SLOTS as u32 / columns),
        None => None,
    }
}

/// Entries of [`ScoreBlocksParams::partial`] for `num_rows` rows whose pages have `num_slots` slots for tokens.
pub const fn num_entries(num_slots: u64, num_rows: u64, num_qo_heads: u64) -> u64 {
    (num_slots / CHUNK as u64 + 2 * num_rows) * (ENTRIES as u64) * num_qo_heads
}

/// Shared memory of a block.
pub(super) struct Layout {
    /// Queries of `heads` KV heads: `[head, head_dim / 8, slot]` core matrices.
    pub(super) queries: Region<u16>,
    /// \[heads, 4, SLOTS\]: for each lane of four, logarithms of the sums, then the inverse sums.
    pub(super) sums: Region<f32>,
    pub(super) inverses: Region<f32>,
    /// Candidates of each block.
    pub(super) ranges: Region<V2<u32>>,
    pub(super) bytes: u32,
}

impl Layout {
    pub(super) const fn new(head_dim: u32, heads: u32) -> Layout {
        let mut carve = Carve::new();
        Layout {
            queries: carve.array(heads * head_dim / 8 * SLOTS as u32 * CORE_BYTES / 2, 128),
            sums: carve.array(heads * 4 * SLOTS as u32, 16),
            inverses: carve.array(heads * 4 * SLOTS as u32, 16),
            ranges: carve.array(4 * SLOTS as u32, 16),
            bytes: carve.bytes(),
        }
    }
}

/// KV heads of a launch of [`vote`](super::kernel::vote) at most: as many as there is shared memory for, on every device, up to 8.
pub(super) const fn heads_of_launch(head_dim: u32) -> u32 {
    let mut heads = 8;
    while Layout::new(head_dim, heads).bytes > SHARED_BYTES_SM_80 {
        heads -= 1;
    }
    heads
}

impl<T> ScoreBlocksParams<T> {
    /// The launch of [`stats`](super::kernel::stats): blocks that fill the device, each for one KV head of a group.
    pub const fn stats_dims(&self, gpu: &GpuInfo) -> Dims {
        let blocks = gpu.num_sms * BLOCKS_PER_SM / (self.num_kv_heads * self.num_groups);
        Dims {
            grid: [if blocks == 0 { 1 } else { blocks }, self.num_kv_heads, self.num_groups],
            block: [STATS_THREADS, 1, 1],
            shared_bytes: Layout::new(self.head_dim, 1).bytes,
            cluster: 1,
        }
    }

    /// The launch of [`fold`](super::kernel::fold): a block for each row and query head.
    pub const fn fold_dims(&self) -> Dims {
        Dims {
            grid: [self.num_kv_heads * self.group, self.batch.num_rows, 1],
            block: [FOLD_THREADS, 1, 1],
            shared_bytes: FOLD_THREADS / 32 * 8,
            cluster: 1,
        }
    }

    /// The launches of [`vote`](super::kernel::vote), one after the other: their parameters and dimensions.
    pub fn votes(self, gpu: &GpuInfo) -> impl Iterator<Item = (Self, Dims)> {
        let most = heads_of_launch(self.head_dim);
        // Shares that differ by one head at most.
        let heads = self.num_kv_heads.div_ceil(self.num_kv_heads.div_ceil(most).max(1)).max(1);
        let blocks = (gpu.num_sms / self.num_groups.max(1)).max(1);
        let dims = Dims {
            grid: [blocks, self.num_groups, 1],
            block: [VOTE_THREADS, 1, 1],
            shared_bytes: Layout::new(self.head_dim, most).bytes,
            cluster: 1,
        };
        (0..self.num_kv_heads).step_by(heads as usize).map(move |first_kv_head| {
            let launch_kv_heads = heads.min(self.num_kv_heads - first_kv_head);
            (ScoreBlocksParams { first_kv_head, launch_kv_heads, ..self }, dims)
        })
    }
}
