//! Parameters and launch dimensions.

use crate::launch::Dims;
use crate::simt::data::V4;
use crate::simt::global::{GlobalMut, GlobalPtr};

/// Threads of a block.
pub(super) const THREADS: u32 = 256;
/// Blocks: more than any device runs at a time.
pub(super) const BLOCKS: u32 = 2048;

/// Parameters of [`read_all`](super::kernel::read_all).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ReadAllParams {
    /// \[num_quads\] quads of words, read.
    pub from: GlobalPtr<V4<u32>>,
    /// \[1\] u32, hardly ever written: it keeps the loads from being optimised away.
    pub out: GlobalMut<u32>,
    /// Pieces of 16 bytes.
    pub num_quads: u64,
}

const _: () = assert!(size_of::<ReadAllParams>() == 24);

impl ReadAllParams {
    /// A grid that fills the device.
    pub const fn dims(&self) -> Dims {
        Dims::linear(BLOCKS, THREADS, 0)
    }
}
