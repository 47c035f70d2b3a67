//! Merging the shares.

use super::*;
use crate::attention::subtracted;
use crate::element::Element;
use crate::simt::{grid, math, thread, warp};

/// Four elements of an output that is not divided by its sum yet.
#[derive(Clone, Copy)]
struct Part {
    max: f32,
    sum: f32,
    out: [f32; 4],
}

impl Part {
    const EMPTY: Part = Part { max: f32::NEG_INFINITY, sum: 0.0, out: [0.0; 4] };

    #[inline(always)]
    fn join(self, other: Part) -> Part {
        let max = self.max.max(other.max);
        // A part that saw nothing counts nothing, whatever the maximum.
        let factor = |part: &Part| if part.sum == 0.0 { 0.0 } else { math::ex2(part.max - subtracted(max)) };
        let (own, others) = (factor(&self), factor(&other));
        let mut joined = Part { max, sum: own * self.sum + others * other.sum, out: [0.0; 4] };
        let mut i = 0;
        while i < 4 {
            joined.out[i] = own * self.out[i] + others * other.out[i];
            i += 1;
        }
        joined
    }

    /// Joined with that of the lane at `distance`.
    #[inline(always)]
    unsafe fn join_lane(self, distance: u32) -> Part {
        let get = |x: f32| warp::shuffle_xor(warp::FULL, x, distance);
        let [a, b, c, d] = self.out;
        let other = Part { max: get(self.max), sum: get(self.sum), out: [get(a), get(b), get(c), get(d)] };
        self.join(other)
    }
}

/// Merges what [`attend_stream`], the launch just before, has left in the workspace. Every share's part is joined in an
/// order that depends on the launch shape alone.
///
/// # Safety
/// - The parameters are those of that launch.
/// - Launched with [`AttendParams::stream_merge_dims`].
#[inline(always)]
pub unsafe fn attend_stream_merge<T: Element>(params: AttendParams<T>) {
    thread::launch_bounds::<MERGE_THREADS, 2>();
    let layout = const { &MergeLayout::new() };
    // The launch before writes no tables, and those before it have ended (see `entries`).
    let list = params.list(thread::block_idx_z());
    let rows = (params.max_block_len * params.group).max(1);
    let (kv_head, query_row) = (thread::block_idx_y() / rows, thread::block_idx_y() % rows);
    grid::wait_for_previous();
    grid::launch_dependents();
    if query_row >= params.num_query_rows(&list) {
        return;
    }
    let (thread, head_dim) = (thread::thread_idx_x(), thread::grid_dim_x() * 4 * MERGE_QUADS);
    let quad = thread::block_idx_x() * MERGE_QUADS + thread % MERGE_QUADS;
    let unit = list.row * params.num_kv_heads + kv_head;
    let mut merged = Part::EMPTY;
    if list.len != 0 {
        merged = merge_slice(&params, unit, query_row, thread / MERGE_QUADS, quad, head_dim);
    }
    merged = merged.join_lane(MERGE_QUADS).join_lane(2 * MERGE_QUADS);
    let (outs, stats) = (layout.out.get(), layout.stats.get());
    if warp::lane_id() < MERGE_QUADS {
        let place = warp::warp_id() * MERGE_QUADS + warp::lane_id();
        outs.add(place).store(V4(merged.out));
        stats.add(place).store(V2([merged.max, merged.sum]));
    }
    thread::sync_threads();
    if thread >= MERGE_QUADS {
        return;
    }
    let mut other = 1;
    while other < MERGE_THREADS / 32 {
        let place = other * MERGE_QUADS + thread;
        let [max, sum] = stats.add(place).load().0;
        merged = merged.join(Part { max, sum, out: outs.add(place).load().0 });
        other += 1;
    }
    let (at, _) = params.query_row(&list, kv_head, query_row);
    let inverse = 1.0 / merged.sum;
    let mut out = [0.0; 4];
    let mut i = 0;
    while i < 4 {
        out[i] = if merged.sum == 0.0 { 0.0 } else { merged.out[i] * inverse };
        i += 1;
    }
    params.store_out(at * head_dim as u64 + (4 * quad) as u64, out);
    if quad == 0 {
        params.store_lse(at, merged.max, merged.sum);
    }
}

/// Joins the shares `slice`, `slice + MERGE_SLICES`, ... of a query row. Several are under way at a time.
#[inline(always)]
unsafe fn merge_slice<T: Element>(
    params: &AttendParams<T>,
    unit: u32,
    query_row: u32,
    slice: u32,
    quad: u32,
    head_dim: u32,
) -> Part {
    const BATCH: usize = 5;
    let first = unit as u64 * params.num_shares as u64;
    let mut merged = Part::EMPTY;
    let mut share = slice;
    while share < params.num_shares {
        let mut batch = [Part::EMPTY; BATCH];
        let mut i = 0;
        while i < BATCH {
            let share = share + i as u32 * MERGE_SLICES;
            if share < params.num_shares {
                let at = (first + share as u64) * QUERY_ROWS as u64 + query_row as u64;
                let [max, sum] = params.partial_stats.add(at).load().0;
                let out = params.partial.add(at * head_dim as u64).cast::<V4<f32>>().add(quad as u64);
                batch[i] = Part { max, sum, out: out.load().0 };
            }
            i += 1;
        }
        let mut i = 0;
        while i < BATCH {
            merged = merged.join(batch[i]);
            i += 1;
        }
        share += BATCH as u32 * MERGE_SLICES;
    }
    merged
}
