//! Parameters and launch dimensions.

use crate::common::layout::BatchTables;
use crate::common::radix;
use crate::launch::{Dims, GpuInfo};
use crate::simt::global::{GlobalMut, GlobalPtr};

/// Parameters of [`smooth`](super::kernel::smooth).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct SmoothParams {
    /// \[num_rows\] u32, read: rows with [`SCORE`](crate::ops::pool::SCORE) are smoothed.
    pub actions: GlobalPtr<u32>,
    /// \[max_tokens\] f32, read for candidates.
    pub votes: GlobalPtr<f32>,
    /// \[max_tokens\] f32, written for candidates.
    pub pooled: GlobalMut<f32>,
    /// Rows.
    pub batch: BatchTables,
    /// First tokens that are always selected.
    pub n_init: u32,
    /// Last tokens before the block that are always selected.
    pub n_local: u32,
    /// Tokens of the window, odd.
    pub window: u32,
    /// Slots of all rows' pages: no row has more tokens.
    pub max_tokens: u32,
}

const _: () = assert!(size_of::<SmoothParams>() == 96);

impl SmoothParams {
    /// A block for each share of a row's candidates.
    pub const fn dims(&self, gpu: &GpuInfo) -> Dims {
        let blocks = radix::blocks_of_row(gpu, self.batch.num_rows, self.max_tokens);
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [radix::THREADS, 1, 1],
            shared_bytes: 0,
            cluster: 1,
        }
    }
}
