//! Parameters, launch dimensions and shared memory.

use crate::common::layout::BatchTables;
use crate::common::radix::{self, RadixTables};
use crate::launch::{Dims, GpuInfo};
use crate::simt::data::V2;
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Parameters of [`count`](super::kernel::count), [`refine`](super::kernel::refine), [`choose`](super::kernel::choose) and
/// [`choose_in_cluster`](super::kernel::choose_in_cluster).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TopKParams {
    /// \[num_rows\] u32, read: an action of [`pool`](mod@crate::ops::pool).
    pub actions: GlobalPtr<u32>,
    /// \[max_tokens\] f32, read for candidates of scored rows.
    pub votes: GlobalPtr<f32>,
    /// \[num_rows, num_qo_heads * head_dim\] f32, read: scoring queries, to be cached.
    pub queries: GlobalPtr<f32>,
    /// \[num_rows\] u32, read: the sequence of each row. Address 0 where nothing is cached.
    pub sequence_indices: GlobalPtr<u32>,
    /// \[num_rows, top_k\] u32, written for scored and reused rows: chosen tokens, ascending.
    pub top_k: GlobalMut<u32>,
    /// \[num_rows, max_selected\] u32, written: the lists.
    pub selected: GlobalMut<u32>,
    /// \[num_rows\] u32, written: their lengths.
    pub selected_len: GlobalMut<u32>,
    /// \[num_sequences, num_qo_heads * head_dim\] f32, written for scored rows. Address 0: nothing is cached.
    pub cached_queries: GlobalMut<f32>,
    /// \[num_sequences, top_k\] u32, written for scored rows, read for reused ones.
    pub cached_selections: GlobalMut<u32>,
    /// \[num_sequences\] u32, read and written.
    pub cached_ages: GlobalMut<u32>,
    /// \[num_sequences\] u32, written for scored rows: `n - T`.
    pub cached_made_at: GlobalMut<u32>,
    /// \[3\] u64, read and written: rows reused, scored, complete.
    pub cached_counters: GlobalMut<u64>,
    /// \[shares of all rows\] u32, workspace: contenders of each share; see [`max_shares`].
    pub counts: GlobalMut<u32>,
    /// \[max_tokens\] pairs of u32, workspace: key and token of each share's contenders, ascending.
    pub contenders: GlobalMut<V2<u32>>,
    /// Workspace: counts of the votes, as `wanted` says.
    pub radix: RadixTables,
    /// Rows.
    pub batch: BatchTables,
    /// First tokens that are always selected.
    pub n_init: u32,
    /// Last tokens before the block that are always selected.
    pub n_local: u32,
    /// Tokens chosen by vote.
    pub k: u32,
    /// Width of `selected`.
    pub max_selected: u32,
    /// `num_qo_heads * head_dim`.
    pub query_len: u32,
    /// Slots of all rows' pages: no row has more tokens.
    pub max_tokens: u32,
    /// How far votes are counted, or by [`count`](super::kernel::count): [`BIN`](radix::BIN). Of a cluster: [`COUNTS`](radix::COUNTS) or
    /// [`NO_COUNTS`](radix::NO_COUNTS).
    pub wanted: u32,
    /// 0.
    pub reserved: u32,
}

const _: () = assert!(size_of::<TopKParams>() == 224);

/// Threads of a block of [`choose`](super::kernel::choose).
pub(super) const THREADS: u32 = 512;
/// Tokens of a share: eight a thread.
pub(super) const SHARE: u32 = 8 * THREADS;
/// Contenders in shared memory at a time; no fewer than a share may have.
pub(super) const WINDOW: u32 = 2 * SHARE;

/// Shares that `num_rows` rows may have, whose pages have `num_slots` slots for tokens.
pub const fn max_shares(num_slots: u64, num_rows: u64) -> u64 {
    num_slots / SHARE as u64 + 2 * num_rows + 1
}

/// Shared memory of a block of [`choose`](super::kernel::choose).
pub(super) struct Layout {
    /// Contenders of the window.
    pub(super) keys: Region<u32>,
    pub(super) tokens: Region<u32>,
    /// Where the contenders of each share of a round begin.
    pub(super) begins: Region<u32>,
    pub(super) histogram: Region<u32>,
    pub(super) warps: Region<u32>,
    /// What one thread has found for all.
    pub(super) found: Region<u32>,
    pub(super) bytes: u32,
}

pub(super) const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout {
        keys: carve.array(WINDOW, 16),
        tokens: carve.array(WINDOW, 16),
        begins: carve.array(THREADS + 1, 16),
        histogram: carve.array(radix::BINS, 16),
        warps: carve.array(THREADS / 32, 16),
        found: carve.array(2, 16),
        bytes: carve.bytes(),
    }
};

impl TopKParams {
    /// Launch dimensions of [`choose`](super::kernel::choose): a block for each share that the longest row may have.
    pub const fn choose_dims(&self) -> Dims {
        let blocks = self.max_tokens.div_ceil(SHARE) + 1;
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [THREADS, 1, 1],
            shared_bytes: LAYOUT.bytes,
            cluster: 1,
        }
    }

    /// Launch dimensions of [`count`](super::kernel::count) and [`refine`](super::kernel::refine): a block for each share of a row's candidates.
    pub const fn count_dims(&self, gpu: &GpuInfo) -> Dims {
        let blocks = radix::blocks_of_row(gpu, self.batch.num_rows, self.max_tokens);
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [radix::THREADS, 1, 1],
            shared_bytes: radix::LAYOUT.bytes,
            cluster: 1,
        }
    }
}
