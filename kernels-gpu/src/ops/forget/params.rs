//! Parameters and launch dimensions.

use crate::launch::Dims;
use crate::simt::global::GlobalMut;

/// Threads of a block.
pub(super) const THREADS: u32 = 64;

/// Parameters of [`forget`](super::kernel::forget).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ForgetParams {
    /// \[num_layers, num_sequences\] u32, read and written: `n - T` at each selection, or [`EMPTY`](crate::ops::pool::EMPTY).
    pub made_at: GlobalMut<u32>,
    /// Layers.
    pub num_layers: u32,
    /// Sequences.
    pub num_sequences: u32,
    /// The sequence whose selections are dropped.
    pub sequence: u32,
    /// Selections made with at least so many tokens before the block are dropped.
    pub from: u32,
}

const _: () = assert!(size_of::<ForgetParams>() == 24);

impl ForgetParams {
    /// A thread per layer.
    pub const fn dims(&self) -> Dims {
        Dims::linear(self.num_layers.div_ceil(THREADS), THREADS, 0)
    }
}
