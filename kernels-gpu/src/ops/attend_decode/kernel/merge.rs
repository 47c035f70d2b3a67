//! Merging: the outputs of a block's warps, then those of a list's splits.

use crate::common::block::strided;
use crate::common::element::Element;
use crate::common::fragment::{lane, over_rows};
use crate::common::softmax::{Partial, Running};
use crate::ops::attend::kernel::splits::{Splits, finish};
use crate::ops::attend::kernel::tile::{Out, Work, each_quad};
use crate::ops::attend_decode::*;
use crate::simt::data::{V2, V4};
use crate::simt::{grid, thread, warp};

/// Merges the warps' outputs, and those of all splits.
pub(super) unsafe fn merge_warps<T: Element, const W: usize, const C: usize, const V: usize>(
    work: &Work<'_, T>,
    layout: &Layout,
    out: Out<W, V>,
    softmax: Running,
) {
    let (params, head_dim) = (work.params, (8 * W * C) as u32);
    let (outs, stats, at) = (layout.out.get(), layout.stats.get(), lane());
    for column in 0..2 {
        let sum = over_rows(softmax.sum[column], |a, b| a + b);
        let query_row = 2 * at.t + column as u32;
        let index = warp::warp_id() * QUERY_ROWS + query_row;
        if query_row < work.num_rows() {
            if at.g == 0 {
                stats.add(index).store(V2([softmax.max[column], sum]));
            }
            each_quad(&out, column, |dimension, quad| {
                outs.add(index * head_dim + dimension).cast::<V4<f32>>().store(V4(quad));
            });
        }
    }
    thread::sync_threads();
    let unit = thread::block_idx_z() * thread::grid_dim_y() + thread::block_idx_y();
    let splits = Splits { unit, count: thread::grid_dim_x() };
    let warps = thread::block_dim_x() / warp::SIZE;
    each(work, head_dim, |row, dimension| {
        let merged = Partial::merged::<4>(0, warps, 1, |warp| {
            let index = warp * QUERY_ROWS + row;
            let [max, sum] = stats.add(index).load().0;
            Partial { max, sum, out: outs.add(index * head_dim + dimension).cast::<V4<f32>>().load().0 }
        });
        if splits.count == 1 {
            let row = work.first_row + row;
            return finish(params, &work.list, work.kv_head, row, head_dim, dimension, &merged);
        }
        let own = thread::block_idx_x();
        splits.store_quad(params, own, row, head_dim, (dimension, merged.out));
        if dimension == 0 {
            splits.store_stats(params, own, row, merged.max, merged.sum);
        }
    });
    if splits.count > 1 && grid::is_last_block(params.counters.add(unit as u64), splits.count) {
        each(work, head_dim, |row, dimension| {
            let merged = splits.merge::<T, 16>(params, row, head_dim, dimension, (0, 1));
            let row = work.first_row + row;
            finish(params, &work.list, work.kv_head, row, head_dim, dimension, &merged);
        });
    }
}

/// Calls `f` with each query row and first of four dimensions that is the thread's.
unsafe fn each<T>(work: &Work<'_, T>, head_dim: u32, mut f: impl FnMut(u32, u32)) {
    let quads = head_dim / 4;
    for i in strided(thread::thread_idx_x(), work.num_rows() * quads, thread::block_dim_x()) {
        f(i / quads, i % quads * 4);
    }
}
