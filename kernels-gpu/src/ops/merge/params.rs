//! Parameters and launch dimensions.

use crate::launch::Dims;
use crate::simt::global::{GlobalMut, GlobalPtr};

/// Threads of a block.
pub(super) const THREADS: u32 = 256;

/// Parameters of [`merge`](super::kernel::merge).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct MergeParams<T> {
    /// \[num_parts, num_heads, head_dim\] f32, read: attention outputs.
    pub parts: GlobalPtr<f32>,
    /// \[num_parts, num_heads\] f32, read: natural logs of their sums of exponentials.
    pub part_lses: GlobalPtr<f32>,
    /// \[num_heads, head_dim\], written: T, or f32 where `out_is_f32`.
    pub out: GlobalMut<T>,
    /// \[num_heads\] f32, written. Address 0: not wanted.
    pub lse: GlobalMut<f32>,
    /// Parts.
    pub num_parts: u32,
    /// Tokens times query heads.
    pub num_heads: u32,
    /// Elements of a head, a multiple of 4.
    pub head_dim: u32,
    /// 1: `out` is f32.
    pub out_is_f32: u32,
}

const _: () = assert!(size_of::<MergeParams<u16>>() == 48);

impl<T> MergeParams<T> {
    /// A warp per token and head.
    pub const fn dims(&self) -> Dims {
        Dims::linear(self.num_heads.div_ceil(THREADS / 32), THREADS, 0)
    }
}
