//! The kernel.

use super::params::*;
use crate::common::block::strided;
use crate::common::element::Element;
use crate::common::softmax::{Partial, bounded, log_sum_exp};
use crate::simt::data::{V2, V4};
use crate::simt::{grid, thread, warp};
use core::f32::consts::LOG2_E;

/// Parts in flight at a time.
const BATCH: usize = 4;

/// See the module.
///
/// # Safety
/// - The buffers are as [`MergeParams`] says, and 16-byte aligned.
/// - Launched with [`MergeParams::dims`].
pub unsafe fn merge<T: Element>(params: MergeParams<T>) {
    grid::wait_for_previous();
    grid::launch_dependents();
    let head = thread::block_idx_x() * (THREADS / warp::SIZE) + warp::warp_id();
    if head >= params.num_heads {
        return;
    }
    for quad in strided(warp::lane_id(), params.head_dim / 4, warp::SIZE) {
        // A part is what one logit equal to its log-sum-exp would leave.
        let merged = Partial::merged::<BATCH>(0, params.num_parts, 1, |part| {
            let at = part as u64 * params.num_heads as u64 + head as u64;
            let lse = params.part_lses.add(at).load();
            if lse == f32::NEG_INFINITY {
                return Partial::EMPTY; // its output may be anything
            }
            let from = params.parts.add(at * params.head_dim as u64).cast::<V4<f32>>();
            Partial { max: bounded(lse * LOG2_E), sum: 1.0, out: from.add(quad as u64).load().0 }
        });
        let out = merged.finish();
        let element = head as u64 * params.head_dim as u64 + (4 * quad) as u64;
        if params.out_is_f32 != 0 {
            params.out.cast::<f32>().add(element).cast::<V4<f32>>().store(V4(out));
        } else {
            let packed = V2([T::pack(out[0], out[1]), T::pack(out[2], out[3])]);
            params.out.add(element).cast::<V2<u32>>().store(packed);
        }
        if quad == 0 && params.lse.addr() != 0 {
            params.lse.add(head as u64).store(log_sum_exp(merged.max, merged.sum));
        }
    }
}
