//! Parameters, launch dimensions and shared memory.

use crate::common::layout::BatchTables;
use crate::common::overlap::Overlap;
use crate::common::radix::{self, RadixTables};
use crate::launch::{Dims, GpuInfo};
use crate::ops::score;
use crate::simt::data::V2;
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Query heads at most.
pub const MAX_HEADS: u32 = 512;

/// Parameters of [`vote`](super::kernel::vote).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct VoteParams {
    /// \[num_rows\] u32, read: rows with [`SCORE`](crate::ops::pool::SCORE) vote.
    pub actions: GlobalPtr<u32>,
    /// \[tiles, num_kv_heads, LOGIT_TILE, group\] f32 (see [`LOGIT_TILE`](crate::common::layout::LOGIT_TILE)), read for candidates.
    pub logits: GlobalPtr<f32>,
    /// \[num_rows, num_qo_heads, 2\] f32: largest logit, sum of exponentials. Read, or written where chunks are folded here.
    pub stats: GlobalMut<f32>,
    /// Statistics of chunks, as [`ScoreParams::partial`](score::ScoreParams::partial). Read where chunks are folded here.
    pub partial: GlobalMut<f32>,
    /// \[max_tokens\] f32, written for candidates.
    pub votes: GlobalMut<f32>,
    /// Workspace; the state is written.
    pub radix: RadixTables,
    /// Rows.
    pub batch: BatchTables,
    /// KV heads.
    pub num_kv_heads: u32,
    /// Query heads that share a KV head.
    pub group: u32,
    /// First tokens that are always selected.
    pub n_init: u32,
    /// Last tokens before the block that are always selected.
    pub n_local: u32,
    /// Tokens chosen by vote.
    pub top_k: u32,
    /// Slots of all rows' pages: no row has more tokens.
    pub max_tokens: u32,
    /// How far votes are counted: [`NO_COUNTS`](radix::NO_COUNTS), [`COUNTS`](radix::COUNTS) or [`BIN`](radix::BIN).
    pub wanted: u32,
    /// Who folds the statistics of chunks.
    pub overlap: Overlap,
}

const _: () = assert!(size_of::<VoteParams>() == 152);

/// Shared memory of a block, behind that of [`radix`].
pub(super) struct Layout {
    /// Of each head, largest logit and inverse sum of exponentials.
    pub(super) heads: Region<V2<f32>>,
    /// Statistics of each thread while the chunks are folded.
    pub(super) fold: Region<V2<f32>>,
    pub(super) bytes: u32,
}

pub(super) const LAYOUT: Layout = {
    let mut carve = Carve::after(radix::LAYOUT.bytes);
    Layout { heads: carve.array(MAX_HEADS, 16), fold: carve.array(score::THREADS, 16), bytes: carve.bytes() }
};

const _: () = assert!(radix::THREADS == score::THREADS);

impl VoteParams {
    /// A block for each share of a row's candidates.
    pub const fn dims(&self, gpu: &GpuInfo) -> Dims {
        let blocks = radix::blocks_of_row(gpu, self.batch.num_rows, self.max_tokens);
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [radix::THREADS, 1, 1],
            shared_bytes: LAYOUT.bytes,
            cluster: 1,
        }
    }
}
