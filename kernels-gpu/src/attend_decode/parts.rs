//! Merging: the outputs of a block's warps, then those of a list's shares.

use super::kernel::{Out, Softmax, Work};
use super::{Layout, QUERY_ROWS};
use crate::attention::subtracted;
use crate::element::Element;
use crate::simt::data::{V2, V4};
use crate::simt::shared::Shared;
use crate::simt::{grid, math, thread, warp};

/// Merges the warps' outputs, and those of all shares.
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
    let shares = Shares::new();
    let warps = thread::block_dim_x() / warp::SIZE;
    let (all, quads) = (work.num_rows * head_dim / 4, head_dim / 4);
    let mut i = thread::thread_idx_x();
    while i < all {
        let (row, quad) = (i / quads, i % quads);
        let merged = merge(warps, |warp| {
            let place = warp * QUERY_ROWS + row;
            (stats.add(place), outs.add(place * head_dim + 4 * quad).cast::<V4<f32>>())
        });
        shares.deliver(work, &merged, row, quad, head_dim);
        i += thread::block_dim_x();
    }
    if shares.count > 1 && grid::is_last_block(params.counters.add(shares.unit as u64), shares.count) {
        merge_shares(work, &shares, head_dim);
    }
}

/// The shares of a list.
struct Shares {
    /// Number of the row, KV head and tile of query rows.
    unit: u32,
    /// The block's own.
    own: u32,
    count: u32,
}

impl Shares {
    #[inline(always)]
    fn new() -> Shares {
        let unit = thread::block_idx_z() * thread::grid_dim_y() + thread::block_idx_y();
        Shares { unit, own: thread::block_idx_x(), count: thread::grid_dim_x() }
    }

    /// Place of query row `row` of a share in `partial_stats`, and times `head_dim` in `partial`.
    #[inline(always)]
    fn place(&self, share: u32, row: u32) -> u64 {
        (self.unit as u64 * self.count as u64 + share as u64) * QUERY_ROWS as u64 + row as u64
    }

    /// Hands on four elements of the block's share: to the output if it is the only one, else to the workspace.
    #[inline(always)]
    unsafe fn deliver<T: Element>(
        &self,
        work: &Work<'_, T>,
        merged: &Merged,
        row: u32,
        quad: u32,
        head_dim: u32,
    ) {
        if self.count == 1 {
            return merged.finish(work, row, quad, head_dim);
        }
        let (params, at) = (work.params, self.place(self.own, row));
        params.partial.add(at * head_dim as u64).cast::<V4<f32>>().add(quad as u64).store(V4(merged.out));
        if quad == 0 {
            params.partial_stats.add(at).store(V2([merged.max, merged.sum]));
        }
    }
}

/// Four elements of an output that is not divided by its sum yet.
#[derive(Clone, Copy)]
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

/// Merges the outputs of warps in shared memory, in order, four at a time.
#[inline(always)]
unsafe fn merge(parts: u32, part: impl Fn(u32) -> (Shared<V2<f32>>, Shared<V4<f32>>)) -> Merged {
    const BATCH: usize = 4;
    let mut merged = Merged { max: f32::NEG_INFINITY, sum: 0.0, out: [0.0; 4] };
    let mut first = 0;
    while first < parts {
        let mut loaded = [([f32::NEG_INFINITY, 0.0], [0.0; 4]); BATCH];
        let mut i = 0;
        while i < BATCH {
            if first + (i as u32) < parts {
                let (stats, out) = part(first + i as u32);
                loaded[i] = (stats.load().0, out.load().0);
            }
            i += 1;
        }
        merged.add_all(&loaded);
        first += BATCH as u32;
    }
    merged
}

impl Merged {
    /// Adds parts: their largest logits and sums, and outputs.
    #[inline(always)]
    fn add_all<const N: usize>(&mut self, parts: &[([f32; 2], [f32; 4]); N]) {
        let before = *self;
        let mut i = 0;
        while i < N {
            self.max = self.max.max(parts[i].0[0]);
            i += 1;
        }
        (self.sum, self.out) = (0.0, [0.0; 4]);
        self.add([before.max, before.sum], before.out);
        let mut i = 0;
        while i < N {
            self.add(parts[i].0, parts[i].1);
            i += 1;
        }
    }

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

/// Merges the shares of a list in order, up to 16 at a time, all of whose loads are under way together.
#[inline(always)]
unsafe fn merge_shares<T: Element>(work: &Work<'_, T>, shares: &Shares, head_dim: u32) {
    const BATCH: usize = 16;
    let (params, quads) = (work.params, head_dim / 4);
    let mut i = thread::thread_idx_x();
    while i < work.num_rows * quads {
        let (row, quad) = (i / quads, i % quads);
        let mut merged = Merged { max: f32::NEG_INFINITY, sum: 0.0, out: [0.0; 4] };
        let mut first = 0;
        while first < shares.count {
            let mut loaded = [([f32::NEG_INFINITY, 0.0], [0.0; 4]); BATCH];
            let mut b = 0;
            while b < BATCH {
                if first + (b as u32) < shares.count {
                    let at = shares.place(first + b as u32, row);
                    let out = params.partial.add(at * head_dim as u64).cast::<V4<f32>>().add(quad as u64);
                    loaded[b] = (params.partial_stats.add(at).load().0, out.load().0);
                }
                b += 1;
            }
            merged.add_all(&loaded);
            first += BATCH as u32;
        }
        merged.finish(work, row, quad, head_dim);
        i += thread::block_dim_x();
    }
}
