//! Parameters and launch dimensions.

use crate::common::layout::BatchTables;
use crate::launch::Dims;
use crate::ops::pool::{CachedTables, ReuseRules};
use crate::simt::global::{GlobalMut, GlobalPtr};

/// Threads of a block.
pub(super) const THREADS: u32 = 64;

/// Parameters of [`decide`](super::kernel::decide).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct DecideParams {
    /// \[num_rows, 3\] f64, read: query times cached, query squared, cached squared, over all heads of all devices.
    pub products: GlobalPtr<f64>,
    /// \[num_rows\] f32, written: cosine with the cached query, -1 where no cached selection is usable.
    pub similarities: GlobalMut<f32>,
    /// \[num_rows\] u32, written: an action.
    pub actions: GlobalMut<u32>,
    /// Cached selections.
    pub cached: CachedTables,
    /// Rows.
    pub batch: BatchTables,
    /// What decides.
    pub rules: ReuseRules,
    /// 0.
    pub reserved: u32,
}

const _: () = assert!(size_of::<DecideParams>() == 144);

impl DecideParams {
    /// A thread per row.
    pub const fn dims(&self) -> Dims {
        Dims::linear(self.batch.num_rows.div_ceil(THREADS), THREADS, 0)
    }
}
