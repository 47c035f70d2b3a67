//! Merging: the outputs of a block's warps, of a cluster's blocks, and of a list's parts.

use super::kernel::{Out, Softmax, Work};
use super::{Layout, MAX_WARPS, QUERY_ROWS};
use crate::attention::subtracted;
use crate::element::Element;
use crate::simt::data::{V2, V4};
use crate::simt::global::GlobalMut;
use crate::simt::shared::Shared;
use crate::simt::{cluster, grid, math, thread, warp};

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
        if shares.cluster > 1 {
            layout.merged.get().cast::<V4<f32>>().add(i).store(V4(merged.out));
            if quad == 0 {
                layout.merged_stats.get().add(row).store(V2([merged.max, merged.sum]));
            }
        } else {
            shares.deliver(work, &merged, row, quad, head_dim);
        }
        i += thread::block_dim_x();
    }
    if cluster::AVAILABLE && shares.cluster > 1 {
        merge_cluster(work, layout, &shares, head_dim);
    }
    if shares.parts > 1 && grid::is_last_block(params.counters.add(shares.unit as u64), thread::grid_dim_x())
    {
        merge_parts(work, stats, &shares, head_dim);
    }
}

/// How a list is shared: in parts, each a cluster of blocks.
struct Shares {
    /// Number of the row, KV head and tile of query rows.
    unit: u32,
    part: u32,
    parts: u32,
    /// Blocks of a part.
    cluster: u32,
}

impl Shares {
    #[inline(always)]
    fn new() -> Shares {
        let cluster = cluster::num_blocks().max(1);
        Shares {
            unit: thread::block_idx_z() * thread::grid_dim_y() + thread::block_idx_y(),
            part: thread::block_idx_x() / cluster,
            parts: thread::grid_dim_x() / cluster,
            cluster,
        }
    }

    /// Place of query row `row` of a part in `partial_stats`, and times `head_dim` in `partial`.
    #[inline(always)]
    fn place(&self, part: u32, row: u32) -> u64 {
        (self.unit as u64 * self.parts as u64 + part as u64) * QUERY_ROWS as u64 + row as u64
    }

    /// Hands on four elements of the part: to the output where there is one part, else to the workspace.
    #[inline(always)]
    unsafe fn deliver<T: Element>(
        &self,
        work: &Work<'_, T>,
        merged: &Merged,
        row: u32,
        quad: u32,
        head_dim: u32,
    ) {
        if self.parts == 1 {
            return merged.finish(work, row, quad, head_dim);
        }
        let (params, at) = (work.params, self.place(self.part, row));
        params.partial.add(at * head_dim as u64).cast::<V4<f32>>().add(quad as u64).store(V4(merged.out));
        if quad == 0 {
            params.partial_stats.add(at).store(V2([merged.max, merged.sum]));
        }
    }
}

/// Merges the outputs of a cluster's blocks, each block some of the elements: adjacent lanes take the same four elements
/// of one block after the other.
#[inline(always)]
unsafe fn merge_cluster<T: Element>(work: &Work<'_, T>, layout: &Layout, shares: &Shares, head_dim: u32) {
    cluster::sync();
    let (all, quads) = (work.num_rows * head_dim / 4, head_dim / 4);
    let (outs, stats) = (layout.merged.get().cast::<V4<f32>>(), layout.merged_stats.get());
    let rank = thread::thread_idx_x() % shares.cluster;
    let groups = thread::block_dim_x() / shares.cluster;
    let mut first = cluster::block_rank() * groups;
    while first < all {
        let i = first + thread::thread_idx_x() / shares.cluster;
        let (row, quad) = (i.min(all - 1) / quads, i.min(all - 1) % quads);
        let [max, sum] = stats.add(row).of_block(rank).load().0;
        let out = outs.add(row * quads + quad).of_block(rank).load().0;
        let merged = Merged { max, sum, out }.over_lanes(shares.cluster);
        if i < all && rank == 0 {
            shares.deliver(work, &merged, row, quad, head_dim);
        }
        first += shares.cluster * groups;
    }
    cluster::sync(); // no block ends while others read from it
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

/// Merges the outputs of warps in shared memory, in order; all are loaded at once.
#[inline(always)]
unsafe fn merge(parts: u32, part: impl Fn(u32) -> (Shared<V2<f32>>, Shared<V4<f32>>)) -> Merged {
    const MOST: usize = MAX_WARPS as usize;
    let mut loaded = [([f32::NEG_INFINITY, 0.0], [0.0; 4]); MOST];
    let mut i = 0;
    while i < MOST {
        if (i as u32) < parts {
            let (stats, out) = part(i as u32);
            loaded[i] = (stats.load().0, out.load().0);
        }
        i += 1;
    }
    let mut merged = Merged { max: f32::NEG_INFINITY, sum: 0.0, out: [0.0; 4] };
    let mut i = 0;
    while i < MOST {
        merged.max = merged.max.max(loaded[i].0[0]);
        i += 1;
    }
    let mut i = 0;
    while i < MOST {
        merged.add(loaded[i].0, loaded[i].1);
        i += 1;
    }
    merged
}

impl Merged {
    /// Merged with those of the `lanes` lanes, a power of two, that begin at a multiple of it; the same in all of them.
    #[inline(always)]
    unsafe fn over_lanes(self, lanes: u32) -> Merged {
        let mut merged = Merged { max: self.max, sum: 0.0, out: [0.0; 4] };
        let mut distance = 1;
        while distance < lanes {
            merged.max = merged.max.max(warp::shuffle_xor(warp::FULL, merged.max, distance));
            distance *= 2;
        }
        merged.add([self.max, self.sum], self.out);
        let mut distance = 1;
        while distance < lanes {
            merged.sum += warp::shuffle_xor(warp::FULL, merged.sum, distance);
            let mut i = 0;
            while i < 4 {
                merged.out[i] += warp::shuffle_xor(warp::FULL, merged.out[i], distance);
                i += 1;
            }
            distance *= 2;
        }
        merged
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

/// Merges the parts of a list, many of which are under way at a time.
#[inline(always)]
unsafe fn merge_parts<T: Element>(
    work: &Work<'_, T>,
    stats: Shared<V2<f32>>,
    shares: &Shares,
    head_dim: u32,
) {
    const BATCH: usize = 16;
    let params = work.params;
    let mut i = thread::thread_idx_x();
    while i < shares.parts * QUERY_ROWS {
        let (part, row) = (i / QUERY_ROWS, i % QUERY_ROWS);
        if row < work.num_rows {
            stats.add(i).store(params.partial_stats.add(shares.place(part, row)).load());
        }
        i += thread::block_dim_x();
    }
    thread::sync_threads();
    let quads = head_dim / 4;
    let mut i = thread::thread_idx_x();
    while i < work.num_rows * quads {
        let (row, quad) = (i / quads, i % quads);
        let of_part = |part: u32| stats.add(part * QUERY_ROWS + row).load().0;
        let mut merged = Merged { max: f32::NEG_INFINITY, sum: 0.0, out: [0.0; 4] };
        let mut part = 0;
        while part < shares.parts {
            merged.max = merged.max.max(of_part(part)[0]);
            part += 1;
        }
        let from = |part: u32| -> GlobalMut<V4<f32>> {
            let at = shares.place(part, row);
            params.partial.add(at * head_dim as u64).cast::<V4<f32>>().add(quad as u64)
        };
        let mut part = 0;
        while part < shares.parts {
            let mut batch = [[0.0; 4]; BATCH];
            let mut b = 0;
            while b < BATCH {
                if part + (b as u32) < shares.parts {
                    batch[b] = from(part + b as u32).load().0;
                }
                b += 1;
            }
            let mut b = 0;
            while b < BATCH {
                if part + (b as u32) < shares.parts {
                    merged.add(of_part(part + b as u32), batch[b]);
                }
                b += 1;
            }
            part += BATCH as u32;
        }
        merged.finish(work, row, quad, head_dim);
        i += thread::block_dim_x();
    }
}
