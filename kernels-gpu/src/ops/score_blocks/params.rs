//! Parameters, launch dimensions and shared memory.

use crate::common::layout::{BatchTables, LOGIT_TILE, PageStrides};
use crate::launch::{Dims, GpuInfo};
use crate::limits::{
    CORE_BYTES, MAX_COLUMNS, SHARED_BYTES_SM_86, SHARED_BYTES_SM_90, WARPGROUP, WARPGROUP_ROWS, columns,
};
use crate::simt::data::{V2, V4};
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Threads of a block of [`fold`](super::kernel::fold).
pub(super) const FOLD_THREADS: u32 = 128;
/// Stages of keys of a warp: one is read while the others are in flight.
pub(super) const STAGES: u32 = 2;
/// Warpgroups that run on an SM at a time, for which registers and shared memory are shared out: their products, exponentials and
/// copies overlap.
const fn warpgroups(head_dim: u32, wide: bool) -> u32 {
    match (head_dim > 128, wide) {
        (false, true) => 3,
        (true, true) => 2,
        (_, false) => 1, // for want of shared memory; an SM with more has several blocks
    }
}
/// Blocks of [`stats`](super::kernel::stats) on an SM, of one warpgroup each, with so many heads of a group; one of all, which share the
/// queries, where these are large. (Of 16 heads a third would cost spills.)
pub(super) const fn stats_blocks_per_sm(head_dim: u32, columns: u32) -> u32 {
    match (head_dim > 128, columns) {
        (true, _) => 1,
        (false, 16) => 2,
        _ => 3,
    }
}
/// Threads of a block of [`stats`](super::kernel::stats).
pub(super) const fn stats_threads(head_dim: u32, wide: bool) -> u32 {
    if head_dim > 128 { vote_threads(head_dim, wide) } else { WARPGROUP }
}
/// Threads of a block of [`vote`](super::kernel::vote), one on an SM.
pub(super) const fn vote_threads(head_dim: u32, wide: bool) -> u32 {
    warpgroups(head_dim, wide) * WARPGROUP
}
/// Tokens that a warpgroup multiplies at a time.
pub(super) const TILE: u32 = WARPGROUP_ROWS;
/// Columns of a product: four lanes with [`SLOTS`] each.
pub(super) const COLUMNS: u32 = 4 * SLOTS as u32;
/// Columns of a lane.
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
    /// \[num_rows, num_qo_heads\] pairs of f32, workspace: reference and inverse sum.
    pub sums: GlobalMut<V2<f32>>,
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
        Some(columns) => Some(4 * SLOTS as u32 / columns),
        None => None,
    }
}

/// Entries of [`ScoreBlocksParams::partial`] for `num_rows` rows whose pages have `num_slots` slots for tokens.
pub const fn num_entries(num_slots: u64, num_rows: u64, num_qo_heads: u64) -> u64 {
    (num_slots / CHUNK as u64 + 2 * num_rows) * (ENTRIES as u64) * num_qo_heads
}

/// Bytes from high halves of eight dimensions' queries to those of the next eight.
pub(super) const ROW_BYTES: u32 = COLUMNS / 8 * CORE_BYTES;

/// Bytes of the queries of a KV head, high and low halves.
pub(super) const fn bytes_of_head(head_dim: u32) -> u32 {
    2 * head_dim / 8 * ROW_BYTES
}

/// Shared memory of a block.
pub(super) struct Layout {
    /// Queries of `heads` KV heads: `[head, high and low, head_dim / 8, COLUMNS / 8]` core matrices.
    pub(super) queries: Region<u16>,
    /// \[heads, 4, SLOTS\]: for each lane of four, references, negated, then the inverse sums.
    pub(super) minus: Region<f32>,
    pub(super) inverses: Region<f32>,
    /// \[SLOTS / 4, threads\]: each thread's references, negated, in [`stats`](super::kernel::stats).
    pub(super) references: Region<V4<f32>>,
    /// \[warps, STAGES, 16\] keys.
    pub(super) stages: Region<V4<u32>>,
    /// Candidates of each block.
    pub(super) ranges: Region<V2<u32>>,
    /// \[warpgroups, 2\]: numbers of chunks, in [`stats`](super::kernel::stats).
    pub(super) tickets: Region<u32>,
    pub(super) bytes: u32,
}

impl Layout {
    /// Of [`stats`](super::kernel::stats).
    pub(super) const fn stats(head_dim: u32, wide: bool) -> Layout {
        let threads = stats_threads(head_dim, wide);
        Layout::new(head_dim, 1, threads, SLOTS as u32 / 4 * threads)
    }

    /// Of [`vote`](super::kernel::vote), for so many KV heads.
    pub(super) const fn vote(head_dim: u32, heads: u32, wide: bool) -> Layout {
        Layout::new(head_dim, heads, vote_threads(head_dim, wide), 0)
    }

    const fn new(head_dim: u32, heads: u32, threads: u32, references: u32) -> Layout {
        let mut carve = Carve::new();
        Layout {
            queries: carve.array(heads * bytes_of_head(head_dim) / 2, 128),
            minus: carve.array(heads * 4 * SLOTS as u32, 16),
            inverses: carve.array(heads * 4 * SLOTS as u32, 16),
            references: carve.array(references, 16),
            stages: carve.array(threads / 32 * STAGES * LOGIT_TILE * head_dim / 8, 128),
            ranges: carve.array(4 * SLOTS as u32, 16),
            tickets: carve.array(2 * threads / WARPGROUP, 16),
            bytes: carve.bytes(),
        }
    }
}

/// KV heads at most whose queries [`vote`](super::kernel::vote) has in shared memory at a time: as many as there is room for, up to 8.
/// `wide`: on Hopper.
pub(super) const fn most_heads(head_dim: u32, wide: bool) -> u32 {
    let room = if wide { SHARED_BYTES_SM_90 } else { SHARED_BYTES_SM_86 };
    let mut heads = 8;
    while heads > 1 && Layout::vote(head_dim, heads, wide).bytes > room {
        heads -= 1;
    }
    heads
}

/// Shared memory of a block at most, of all launches.
pub fn shared_bytes(head_dim: u32, wide: bool) -> u32 {
    let vote = Layout::vote(head_dim, most_heads(head_dim, wide), wide).bytes;
    vote.max(Layout::stats(head_dim, wide).bytes)
}

impl<T> ScoreBlocksParams<T> {
    /// The launch of [`stats`](super::kernel::stats): blocks that fill the device, each for one KV head of a group.
    pub const fn stats_dims(&self, gpu: &GpuInfo) -> Dims {
        let columns = match columns(self.group) {
            Some(columns) => columns,
            None => MAX_COLUMNS,
        };
        let resident = gpu.num_sms * stats_blocks_per_sm(self.head_dim, columns);
        let blocks = resident / (self.num_kv_heads * self.num_groups);
        Dims {
            grid: [if blocks == 0 { 1 } else { blocks }, self.num_kv_heads, self.num_groups],
            block: [stats_threads(self.head_dim, gpu.bulk_copies), 1, 1],
            shared_bytes: Layout::stats(self.head_dim, gpu.bulk_copies).bytes,
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

    /// The launch of [`vote`](super::kernel::vote): blocks that fill the device.
    pub const fn vote_dims(&self, gpu: &GpuInfo) -> Dims {
        let wide = gpu.bulk_copies;
        // Of small blocks, as many as may have room.
        let resident = if wide { gpu.num_sms } else { 2 * gpu.num_sms };
        let blocks = resident / self.num_groups;
        Dims {
            grid: [if blocks == 0 { 1 } else { blocks }, self.num_groups, 1],
            block: [vote_threads(self.head_dim, wide), 1, 1],
            shared_bytes: Layout::vote(self.head_dim, most_heads(self.head_dim, wide), wide).bytes,
            cluster: 1,
        }
    }
}
