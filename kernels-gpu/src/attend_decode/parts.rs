//! Merging: the outputs of a block's warps, then those of a list's shares.

use super::kernel::{Out, Softmax, Work};
use super::{Layout, QUERY_ROWS, THREADS, WARPS};
use crate::attention::subtracted;
use crate::element::Element;
use crate::simt::data::{V2, V4};
use crate::simt::global::GlobalMut;
use crate::simt::shared::Shared;
use crate::simt::{grid, math, thread, warp};

/// Merges the warps' outputs, and the shares' where there are several.
#[inline(always)]
pub(super) unsafe fn merge_warps<T: Element, const W: usize, const C: usize, const V: usize>(
    work: &Work<'_, T>,
    layout: &Layout,
    out: Out<W, V>,
    softmax: Softmax,
) {
    let (params, head_dim) = (work.params, (8 * W * C) as u32);
    let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let (outs, stats) = (layout.out.get(), layout.stats.get());
    let mut row = 0;
    while row < 2 {
        let sum = softmax.sum[row] + warp::shuffle_xor(warp::FULL, softmax.sum[row], 4);
        let sum = sum + warp::shuffle_xor(warp::FULL, sum, 8);
        let sum = sum + warp::shuffle_xor(warp::FULL, sum, 16);
        let query_row = 2 * t + row as u32;
        let place = warp::warp_id() * QUERY_ROWS + query_row;
        if query_row < work.num_rows {
            if g == 0 {
                stats.add(place).store(V2([softmax.max[row], sum]));
            }
            let mut v = 0;
            while v < V {
                let first = (16 * W * v) as u32 + 2 * W as u32 * g;
                let to = outs.add(place * head_dim + first).cast::<V4<f32>>();
                let mut w = 0;
                while w < W {
                    let (low, high) = (out[v][w], out[v][w + 1]);
                    to.add(w as u32 / 2).store(V4([low[row], low[row + 2], high[row], high[row + 2]]));
                    w += 2;
                }
                v += 1;
            }
        }
        row += 1;
    }
    thread::sync_threads();

    let (split, splits) = (thread::block_idx_x(), thread::grid_dim_x());
    let unit = thread::block_idx_z() * thread::grid_dim_y() + thread::block_idx_y();
    let part = (unit as u64 * splits as u64 + split as u64) * QUERY_ROWS as u64;
    let quads = head_dim / 4;
    let mut i = thread::thread_idx_x();
    while i < work.num_rows * quads {
        let (row, quad) = (i / quads, i % quads);
        let merged = merge(WARPS, |warp| {
            let place = warp * QUERY_ROWS + row;
            (stats.add(place), outs.add(place * head_dim + 4 * quad).cast::<V4<f32>>())
        });
        if splits == 1 {
            merged.finish(work, row, quad, head_dim);
        } else {
            let at = part + row as u64;
            params.partial.add(at * head_dim as u64).cast::<V4<f32>>().add(quad as u64).store(V4(merged.out));
            if quad == 0 {
                params.partial_stats.add(at).store(V2([merged.max, merged.sum]));
            }
        }
        i += THREADS;
    }
    if splits > 1 && grid::is_last_block(params.counters.add(unit as u64), splits) {
        merge_splits(work, stats, unit, splits, head_dim);
    }
}

/// Four elements of an output that is not divided by its sum yet.
struct Merged {
    max: f32,
    sum: f32,
    out: [f32; 4],
}

impl Merged {
    /// Divides, and writes the output of query row `row`.
    #[inline(always)]
    unsafe fn finish<T: Element>(&self, work: &Work<'_, T>, row: u32, quad: u32, head_dim: u32) {
        let (at, _) = work.params.query_row(&work.list, work.kv_head, work.first_row + row);
        let inverse = if self.sum == 0.0 { 0.0 } else { 1.0 / self.sum };
        let mut out = self.out;
        let mut i = 0;
        while i < 4 {
            out[i] = if self.sum == 0.0 { 0.0 } else { out[i] * inverse };
            i += 1;
        }
        work.params.store_out(at * head_dim as u64 + (4 * quad) as u64, out);
        if quad == 0 {
            work.params.store_lse(at, self.max, self.sum);
        }
    }
}

/// Merges parts in shared memory, in order.
#[inline(always)]
unsafe fn merge(parts: u32, part: impl Fn(u32) -> (Shared<V2<f32>>, Shared<V4<f32>>)) -> Merged {
    let mut max = f32::NEG_INFINITY;
    let mut i = 0;
    while i < parts {
        max = max.max(part(i).0.load().0[0]);
        i += 1;
    }
    let mut merged = Merged { max, sum: 0.0, out: [0.0; 4] };
    let mut i = 0;
    while i < parts {
        let (stats, out) = part(i);
        merged.add(stats.load().0, out.load().0);
        i += 1;
    }
    merged
}

impl Merged {
    /// Adds a part whose largest logit is at most `max`.
    #[inline(always)]
    fn add(&mut self, [max, sum]: [f32; 2], out: [f32; 4]) {
        // A part that saw nothing counts nothing, whatever the maximum.
        let factor = if sum == 0.0 { 0.0 } else { math::ex2(max - subtracted(self.max)) };
        self.sum += factor * sum;
        let mut i = 0;
        while i < 4 {
            self.out[i] += factor * out[i];
            i += 1;
        }
    }
}

/// Merges the shares of a list, many of which are under way at a time.
#[inline(always)]
unsafe fn merge_splits<T: Element>(
    work: &Work<'_, T>,
    stats: Shared<V2<f32>>,
    unit: u32,
    splits: u32,
    head_dim: u32,
) {
    const BATCH: usize = 17;
    let params = work.params;
    let first = unit as u64 * splits as u64 * QUERY_ROWS as u64;
    let mut i = thread::thread_idx_x();
    while i < splits * QUERY_ROWS {
        if i % QUERY_ROWS < work.num_rows {
            stats.add(i).store(params.partial_stats.add(first + i as u64).load());
        }
        i += THREADS;
    }
    thread::sync_threads();
    let quads = head_dim / 4;
    let mut i = thread::thread_idx_x();
    while i < work.num_rows * quads {
        let (row, quad) = (i / quads, i % quads);
        let of_split = |split: u32| stats.add(split * QUERY_ROWS + row).load().0;
        let mut merged = Merged { max: f32::NEG_INFINITY, sum: 0.0, out: [0.0; 4] };
        let mut split = 0;
        while split < splits {
            merged.max = merged.max.max(of_split(split)[0]);
            split += 1;
        }
        let from = |split: u32| -> GlobalMut<V4<f32>> {
            let at = first + (split * QUERY_ROWS + row) as u64;
            params.partial.add(at * head_dim as u64).cast::<V4<f32>>().add(quad as u64)
        };
        let mut split = 0;
        while split < splits {
            let mut batch = [[0.0; 4]; BATCH];
            let mut b = 0;
            while b < BATCH {
                if split + (b as u32) < splits {
                    batch[b] = from(split + b as u32).load().0;
                }
                b += 1;
            }
            let mut b = 0;
            while b < BATCH {
                if split + (b as u32) < splits {
                    merged.add(of_split(split + b as u32), batch[b]);
                }
                b += 1;
            }
            split += BATCH as u32;
        }
        merged.finish(work, row, quad, head_dim);
        i += THREADS;
    }
}
