//! The second kernel: merging the splits.

use crate::common::element::Element;
use crate::common::softmax::Partial;
use crate::ops::attend::AttendParams;
use crate::ops::attend::kernel::splits::{Splits, finish};
use crate::ops::attend_stream::*;
use crate::simt::data::{V2, V4};
use crate::simt::{grid, thread, warp};

/// Merges what [`attend_stream`](super::attend_stream), the launch just before, has left in the workspace, in an order that
/// depends on the launch shape alone.
///
/// # Safety
/// - The parameters are those of that launch.
/// - Launched with [`AttendParams::stream_merge_dims`].
pub unsafe fn attend_stream_merge<T: Element>(params: AttendParams<T>) {
    thread::launch_bounds::<MERGE_THREADS, 2>();
    let layout = const { &MergeLayout::new() };
    // The launch before writes no tables (rules: `common/overlap.rs`).
    let list = params.list(thread::block_idx_z());
    let rows = (params.max_block_len * params.group).max(1);
    let (kv_head, query_row) = (thread::block_idx_y() / rows, thread::block_idx_y() % rows);
    grid::wait_for_previous();
    grid::launch_dependents();
    if query_row >= params.num_query_rows(&list) {
        return;
    }
    let (thread, head_dim) = (thread::thread_idx_x(), thread::grid_dim_x() * 4 * MERGE_QUADS);
    let dimension = 4 * (thread::block_idx_x() * MERGE_QUADS + thread % MERGE_QUADS);
    let splits = Splits { unit: list.row * params.num_kv_heads + kv_head, count: params.num_splits };
    let mut merged = Partial::EMPTY;
    if list.len != 0 {
        let own = (thread / MERGE_QUADS, MERGE_SLICES);
        merged = splits.merge::<T, 5>(&params, query_row, head_dim, dimension, own);
    }
    merged.merge_lane(MERGE_QUADS);
    merged.merge_lane(2 * MERGE_QUADS);
    let (outs, stats) = (layout.out.get(), layout.stats.get());
    if warp::lane_id() < MERGE_QUADS {
        let index = warp::warp_id() * MERGE_QUADS + warp::lane_id();
        outs.add(index).store(V4(merged.out));
        stats.add(index).store(V2([merged.max, merged.sum]));
    }
    thread::sync_threads();
    if thread >= MERGE_QUADS {
        return;
    }
    let merged = Partial::merged::<4>(0, MERGE_THREADS / warp::SIZE, 1, |warp| {
        let index = warp * MERGE_QUADS + thread;
        let [max, sum] = stats.add(index).load().0;
        Partial { max, sum, out: outs.add(index).load().0 }
    });
    finish(&params, &list, kv_head, query_row, head_dim, dimension, &merged);
}
