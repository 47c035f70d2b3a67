//! Actions, parameters, launch dimensions and shared memory.

use crate::common::layout::{BatchTables, HeadStrides};
use crate::common::overlap::Overlap;
use crate::common::rope::RopeTables;
use crate::launch::Dims;
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Threads of a block.
pub const THREADS: u32 = 256;

/// Action: the row has no queries, or no tokens: padding.
pub const SKIP: u32 = 0;
/// Action: the row has at most `top_k` candidates: all tokens are selected.
pub const COMPLETE: u32 = 1;
/// Action: the row is scored.
pub const SCORE: u32 = 2;
/// Action: the row uses its cached selection again.
pub const REUSE: u32 = 3;

/// `made_at` of a sequence without cached selection.
pub const EMPTY: u32 = u32::MAX;

/// Parameters of [`pool`](super::kernel::pool).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct PoolParams<T> {
    /// \[num_tokens, num_qo_heads, head_dim\] T by `q_stride`, read.
    pub q: GlobalPtr<T>,
    /// \[num_sequences, num_qo_heads * head_dim\] f32, read: cached scoring queries. Address 0: nothing is cached.
    pub cached_queries: GlobalPtr<f32>,
    /// \[num_sequences\] u32, read: how often each cached selection was used again.
    pub cached_ages: GlobalPtr<u32>,
    /// \[num_sequences\] u32, read: `n - T` when it was made, or [`EMPTY`].
    pub cached_made_at: GlobalPtr<u32>,
    /// \[num_sequences, top_k\] u32, read: cached selections, ascending.
    pub cached_selections: GlobalPtr<u32>,
    /// \[num_rows\] u32, read: the sequence of each row. Address 0 where nothing is cached.
    pub sequence_indices: GlobalPtr<u32>,
    /// \[num_rows, num_qo_heads, head_dim\] f32, written: scoring queries.
    pub queries: GlobalMut<f32>,
    /// \[num_rows\] f32, written: cosine with the cached query, -1 where no cached selection is usable.
    pub similarities: GlobalMut<f32>,
    /// \[num_rows\] u32, written: an action.
    pub actions: GlobalMut<u32>,
    /// \[num_rows, num_qo_heads, 3\] f32, workspace.
    pub partial: GlobalMut<f32>,
    /// \[num_rows\] u32, zero before and after.
    pub counters: GlobalMut<u32>,
    /// Rows.
    pub batch: BatchTables,
    /// Strides of the queries; multiples of 8.
    pub q_stride: HeadStrides,
    /// Rotation of the queries.
    pub rope: RopeTables,
    /// Query heads.
    pub num_qo_heads: u32,
    /// Elements of a head, a multiple of 8, at most 256.
    pub head_dim: u32,
    /// First tokens that are always selected.
    pub n_init: u32,
    /// Last tokens before the block that are always selected.
    pub n_local: u32,
    /// Tokens chosen by vote.
    pub top_k: u32,
    /// How often a selection may be used again.
    pub max_reuse: u32,
    /// Cosine from which on a selection is used again.
    pub similarity_threshold: f32,
    /// When the launch before is waited for.
    pub overlap: Overlap,
}

const _: () = assert!(size_of::<PoolParams<u16>>() == 208);

/// Shared memory of a block. A host without a machine needs the byte count alone.
pub(super) struct Layout {
    /// Sums of the turns; then the mean; then sums of the warps.
    pub(super) sums: Region<f32>,
    pub(super) bytes: u32,
}

pub(super) const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout { sums: carve.array(16 * THREADS, 16), bytes: carve.bytes() }
};

impl<T> PoolParams<T> {
    /// A block per row and query head.
    pub const fn dims(&self) -> Dims {
        Dims {
            grid: [self.num_qo_heads, self.batch.num_rows, 1],
            block: [THREADS, 1, 1],
            shared_bytes: LAYOUT.bytes,
            cluster: 1,
        }
    }
}
