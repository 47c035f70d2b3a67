//! Parameters, launch dimensions and shared memory.

use crate::common::layout::BatchTables;
use crate::launch::Dims;
use crate::ops::pool::{CachedTables, ReuseRules};
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Threads of a block.
pub(super) const THREADS: u32 = 256;

/// Parameters of [`compare`](super::kernel::compare).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct CompareParams {
    /// \[num_rows, query_len\] f32, read: scoring queries.
    pub queries: GlobalPtr<f32>,
    /// \[num_rows, 3\] f64, written: query times cached, query squared, cached squared.
    pub products: GlobalMut<f64>,
    /// Cached selections.
    pub cached: CachedTables,
    /// Rows.
    pub batch: BatchTables,
    /// Windows and `top_k`; the others are unused.
    pub rules: ReuseRules,
    /// Elements of all query heads, a multiple of 8.
    pub query_len: u32,
}

const _: () = assert!(size_of::<CompareParams>() == 136);

/// Shared memory of a block. A host without a machine needs the byte count alone.
pub(super) struct Layout {
    /// \[warps, 3\]: sums of each warp.
    pub(super) sums: Region<f64>,
    pub(super) bytes: u32,
}

pub(super) const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout { sums: carve.array(THREADS / 32 * 3, 8), bytes: carve.bytes() }
};

impl CompareParams {
    /// A block per row.
    pub const fn dims(&self) -> Dims {
        Dims::linear(self.batch.num_rows, THREADS, LAYOUT.bytes)
    }
}
