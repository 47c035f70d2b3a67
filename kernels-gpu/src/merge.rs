//! `merge`: attention outputs over disjoint parts of a list, combined through their log-sum-exps.
//!
//! ```text
//! for each token and query head:
//!     lse = log sum over parts of exp(lse_i);    out = sum over parts of exp(lse_i - lse) out_i     parts with -inf left out
//! ```
//! **Thread mapping.** A warp per token and head; a lane per four elements. Parts are added in order.
//!
//! **Bytes.** The parts once: `num_parts * num_heads * head_dim * 4`, and the result.

use crate::launch::Dims;
use crate::simt::global::{GlobalMut, GlobalPtr};

/// Threads of a block.
const THREADS: u32 = 256;

/// Parameters of [`merge`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct MergeParams<T> {
    /// \[num_parts, num_heads, head_dim\] f32, read.
    pub parts: GlobalPtr<f32>,
    /// \[num_parts, num_heads\] f32, read.
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

/// See the module.
///
/// # Safety
/// - The buffers are as [`MergeParams`] says, and 16-byte aligned.
/// - Launched with [`MergeParams::dims`].
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub unsafe fn merge<T: crate::element::Element>(params: MergeParams<T>) {
    use crate::simt::data::{V2, V4};
    use crate::simt::{grid, math, thread, warp};
    use core::f32::consts::{LN_2, LOG2_E};

    grid::wait_for_previous();

    grid::launch_dependents();
    let head = thread::block_idx_x() * (THREADS / warp::SIZE) + warp::warp_id();
    if head >= params.num_heads {
        return;
    }
    let place = |part: u32| part as u64 * params.num_heads as u64 + head as u64;
    let mut max = f32::NEG_INFINITY;
    let mut part = 0;
    while part < params.num_parts {
        max = max.max(params.part_lses.add(place(part)).load_cached());
        part += 1;
    }
    let (mut sum, mut part) = (0.0, 0);
    while part < params.num_parts {
        let lse = params.part_lses.add(place(part)).load_cached();
        sum += if lse == f32::NEG_INFINITY { 0.0 } else { math::ex2((lse - max) * LOG2_E) };
        part += 1;
    }
    let mut quad = warp::lane_id();
    while quad < params.head_dim / 4 {
        let mut out = [0.0; 4];
        let mut part = 0;
        while part < params.num_parts {
            let lse = params.part_lses.add(place(part)).load_cached();
            if lse != f32::NEG_INFINITY {
                let weight = math::ex2((lse - max) * LOG2_E) / sum;
                let from = params.parts.add(place(part) * params.head_dim as u64).cast::<V4<f32>>();
                let values = from.add(quad as u64).load_cached().0;
                let mut i = 0;
                while i < 4 {
                    out[i] += weight * values[i];
                    i += 1;
                }
            }
            part += 1;
        }
        let at = params.out.cast::<f32>();
        let element = head as u64 * params.head_dim as u64 + (4 * quad) as u64;
        if params.out_is_f32 != 0 {
            at.add(element).cast::<V4<f32>>().store(V4(out));
        } else {
            let packed = V2([T::pack(out[0], out[1]), T::pack(out[2], out[3])]);
            params.out.add(element).cast::<V2<u32>>().store(packed);
        }
        quad += warp::SIZE;
    }
    if warp::lane_id() == 0 && params.lse.addr() != 0 {
        let lse = if sum == 0.0 { f32::NEG_INFINITY } else { max + math::lg2(sum) * LN_2 };
        params.lse.add(head as u64).store(lse);
    }
}
