//! Steps that both kernels of `score` take.

use super::chunks::{Chunks, num_chunks};
use crate::common::element::{Element, add_low, split};
use crate::common::fragment::{A, Accumulator, B, lane};
use crate::common::layout::{LOGIT_TILE, Tokens};
use crate::common::softmax::VoteSoftmax;
use crate::ops::pool::SCORE;
use crate::ops::score::*;
use crate::simt::data::{V2, V4};
use crate::simt::global::GlobalPtr;
use crate::simt::shared::{Region, Shared};
use crate::simt::warp;

/// What a warp works on, the same in all its lanes.
pub(crate) struct Work<'a, T> {
    pub params: &'a ScoreParams<T>,
    /// The row's page table.
    pub pages: GlobalPtr<u32>,
    pub row: u32,
    pub kv_head: u32,
    pub candidates: Tokens,
    /// First token of the first tile: a multiple of 16, at or before the first candidate.
    pub first: u32,
    pub num_tiles: u32,
    pub num_chunks: u32,
    /// From one of the warp's chunks to the next.
    pub step: u32,
}

/// A tile of candidates, and the chunk that it counts in.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Tile {
    pub chunk: u32,
    pub index: u32,
}

impl<T> Work<'_, T> {
    /// A row whose tiles are of `tokens` tokens, for a warp or a block that takes every `step`-th chunk.
    #[inline(always)]
    pub unsafe fn new(
        params: &ScoreParams<T>,
        row: u32,
        tokens: u32,
        kv_head: u32,
        step: u32,
    ) -> Work<'_, T> {
        let tables = params.batch.row(row);
        let candidates = params.batch.candidates_of(row, &tables, params.n_init, params.n_local);
        let first = candidates.begin / LOGIT_TILE * LOGIT_TILE;
        let num_tiles = (candidates.end - first).div_ceil(tokens);
        Work {
            params,
            pages: params.batch.kv_indices.add(tables.first_page as u64),
            row,
            kv_head,
            candidates,
            first,
            num_tiles,
            num_chunks: num_chunks(candidates, tokens, params.num_kv_heads),
            step,
        }
    }

    /// The statistics of the row's chunks.
    #[inline(always)]
    pub fn chunks(&self) -> Chunks {
        let (params, count) = (self.params, self.num_chunks);
        Chunks::new(params.partial, self.row, params.num_kv_heads, params.group, count)
    }

    /// Whether there is nothing to do where the row's action is `action`. It depends on the candidates too, so that what
    /// they are computed from is in flight together with the action.
    #[inline(always)]
    pub fn is_idle(&self, action: u32) -> bool {
        (action != SCORE) | (self.candidates.end == u32::MAX)
    }

    /// The warp's tile after `tile`; `tile` itself if that is the last.
    #[inline(always)]
    pub fn next_tile(&self, tile: Tile) -> Tile {
        let (index, chunk) = (tile.index + self.num_chunks, tile.chunk + self.step);
        if index < self.num_tiles {
            Tile { index, ..tile }
        } else if chunk < self.num_chunks {
            Tile { chunk, index: chunk }
        } else {
            tile
        }
    }

    /// The lane's token of eight: token `16 u + 8 half + lane / 4` of the tile of `tokens` tokens. It may lie before the
    /// candidates or beyond them.
    #[inline(always)]
    pub fn token(&self, tile: Tile, tokens: u32, u: u32, half: u32) -> u32 {
        self.first + tile.index * tokens + 16 * u + 8 * half + lane().g
    }
}

/// A lane's words of the keys of 16 tokens: 16 bytes of each of its two tokens from each chunk of 32 dimensions.
pub(crate) type Keys<const C: usize> = [[[u32; 4]; C]; 2];

/// A lane's elements of the queries of a KV head's group: eight of each column tile and chunk.
pub(crate) type Queries<const C: usize, const N: usize> = [[[[f32; 4]; 2]; C]; N];

/// Loads the lane's elements of the queries. Columns beyond the group are zero. (The loads are plain ones: the assembler would
/// move `ld.global.nc` to where they are used.)
#[inline(always)]
pub(crate) unsafe fn load_queries<T: Element, const C: usize, const N: usize, const PACKED: bool>(
    work: &Work<'_, T>,
) -> Queries<C, N> {
    let params = work.params;
    let at = lane();
    let (column, t) = (B::column(at), at.t);
    let mut queries = [[[[0.0; 4]; 2]; C]; N];
    for n in 0..N {
        let member = if PACKED { column % 4 } else { n as u32 * 8 + column };
        let head = work.kv_head * params.group + member;
        let head = work.row as u64 * (params.num_kv_heads * params.group) as u64 + head as u64;
        let at = params.queries.add(head * (32 * C) as u64 + 8 * t as u64).cast::<V4<f32>>();
        if member < params.group {
            for c in 0..C {
                queries[n][c] = [at.add(8 * c as u64).load().0, at.add(8 * c as u64 + 1).load().0];
            }
        }
    }
    queries
}

/// Splits and packs the queries of a KV head's group as B fragments in shared memory: the lane's words of column
/// tile `n`, half `p` (0 high, 1 low), chunk `c` are 32 * ((2 n + p) C + c) further, or 32 c packed. Each lane reads back only
/// what it wrote itself.
#[inline(always)]
pub(crate) unsafe fn put_queries<T: Element, const C: usize, const N: usize, const PACKED: bool>(
    params: &ScoreParams<T>,
    queries: &Queries<C, N>,
    region: Region<V4<u32>>,
) -> Shared<V4<u32>> {
    let of_warp = region.len() / WARPS;
    let fragments = region.get().add(warp::warp_id() * of_warp + warp::lane_id());
    let column = B::column(lane());
    for n in 0..N {
        for c in 0..C {
            let (mut high, mut low) = ([0; 4], [0; 4]);
            let mut pieces = queries[n][c];
            if T::IS_NARROW {
                pieces = pieces.map(|piece| piece.map(|x| x * params.rotated_scale));
            }
            let [x, y] = pieces;
            (high[0], low[0]) = split::<T>(x[0], x[1]);
            (high[1], low[1]) = split::<T>(x[2], x[3]);
            (high[2], low[2]) = split::<T>(y[0], y[1]);
            (high[3], low[3]) = split::<T>(y[2], y[3]);
            if PACKED {
                fragments.add(32 * c as u32).store(V4(if column >= 4 { low } else { high }));
            } else {
                fragments.add(32 * (2 * n * C + c) as u32).store(V4(high));
                fragments.add(32 * ((2 * n + 1) * C + c) as u32).store(V4(low));
            }
        }
    }
    fragments
}

/// Products of 16 tokens with a column tile of queries; low halves added unless packed.
#[inline(always)]
pub(crate) unsafe fn multiply<T: Element, const C: usize, const PACKED: bool>(
    keys: &Keys<C>,
    queries: Shared<V4<u32>>,
    n: u32,
) -> Accumulator {
    let (mut d, mut low_d) = (Accumulator::ZERO, Accumulator::ZERO);
    for c in 0..C {
        let (upper, lower) = (keys[0][c], keys[1][c]);
        let a0 = A([upper[0], lower[0], upper[1], lower[1]]);
        let a1 = A([upper[2], lower[2], upper[3], lower[3]]);
        let first = if PACKED { c as u32 } else { 2 * n * C as u32 + c as u32 };
        let high = queries.add(32 * first).load().0;
        T::mma(&mut d, a0, B([high[0], high[1]]));
        if PACKED {
            T::mma(&mut low_d, a1, B([high[2], high[3]]));
        } else {
            T::mma(&mut d, a1, B([high[2], high[3]]));
            let low = queries.add(32 * (first + C as u32)).load().0;
            T::mma(&mut low_d, a0, B([low[0], low[1]]));
            T::mma(&mut low_d, a1, B([low[2], low[3]]));
        }
    }
    for i in 0..4 {
        d.0[i] = if PACKED { d.0[i] + low_d.0[i] } else { add_low(d.0[i], low_d.0[i]) };
    }
    d
}

/// Scales, stores and counts the lane's products of 16 tokens with a column tile.
#[inline(always)]
pub(crate) unsafe fn write_products<T: Element, const U: usize, const PACKED: bool>(
    work: &Work<'_, T>,
    tile: Tile,
    u: u32,
    n: u32,
    Accumulator(d): Accumulator,
    stats: &mut [VoteSoftmax; 2],
) {
    let t = lane().t;
    if PACKED {
        // Lanes with t = 0, 1 hold the high halves of columns 0 to 3, those with t = 2, 3 the low halves. The former
        // keep the upper eight tokens and give the lower; the latter the other way round.
        let lower = t >= 2;
        let (give0, give1) = if lower { (d[0], d[1]) } else { (d[2], d[3]) };
        let got0 = warp::shuffle_xor(warp::FULL, give0, 2);
        let got1 = warp::shuffle_xor(warp::FULL, give1, 2);
        let values = if lower {
            [add_low(got0, d[2]), add_low(got1, d[3])]
        } else {
            [add_low(d[0], got0), add_low(d[1], got1)]
        };
        write_pair(work, work.token(tile, 16 * U as u32, u, lower as u32), 2 * (t % 2), values, stats);
    } else {
        let column = 8 * n + 2 * t;
        write_pair(work, work.token(tile, 16 * U as u32, u, 0), column, [d[0], d[1]], stats);
        write_pair(work, work.token(tile, 16 * U as u32, u, 1), column, [d[2], d[3]], stats);
    }
}

/// Scales, stores and counts the products of one token with two adjacent heads of the group.
#[inline(always)]
unsafe fn write_pair<T: Element>(
    work: &Work<'_, T>,
    token: u32,
    column: u32,
    products: [f32; 2],
    stats: &mut [VoteSoftmax; 2],
) {
    let params = work.params;
    let logits = [products[0] * params.score_scale, products[1] * params.score_scale];
    let tile = params.batch.logit_tile(work.row) + (token / LOGIT_TILE) as u64;
    let line = tile * params.num_kv_heads as u64 + work.kv_head as u64;
    let line = line * LOGIT_TILE as u64 + (token % LOGIT_TILE) as u64;
    let at = params.logits.add(line * params.group as u64 + column as u64);
    let inside = token >= work.candidates.begin && token < work.candidates.end;
    let valid = [inside && column < params.group, inside && column + 1 < params.group];
    if params.group.is_multiple_of(2) {
        if valid[0] {
            at.cast::<V2<f32>>().store(V2(logits));
        }
    } else {
        if valid[0] {
            at.store(logits[0]);
        }
        if valid[1] {
            at.add(1).store(logits[1]);
        }
    }
    for i in 0..2 {
        stats[i].push(if valid[i] { logits[i] } else { f32::NAN });
    }
}

/// Merges the statistics of the lanes that hold the same columns, and stores them for the chunk.
#[inline(always)]
pub(crate) unsafe fn store_stats<T: Element, const N: usize, const PACKED: bool>(
    work: &Work<'_, T>,
    chunk: u32,
    stats: [[VoteSoftmax; 2]; N],
) {
    let (lane, t) = (warp::lane_id(), lane().t);
    for n in 0..N {
        for i in 0..2 {
            let mut merged = stats[n][i];
            let (mut distance, holders) = if PACKED { (2, 2) } else { (4, 4) };
            while distance < 32 {
                merged.merge_lane(distance);
                distance *= 2;
            }
            let member = 8 * n as u32 + 2 * t + i as u32;
            if lane < holders && member < work.params.group {
                let head = work.kv_head * work.params.group + member;
                work.chunks().store(chunk, head, merged);
            }
        }
    }
}

/// Folds the chunks' statistics of every head; run by the whole last block of a row.
#[inline(always)]
pub(crate) unsafe fn fold<T: Element>(work: &Work<'_, T>, scratch: Region<V2<f32>>) {
    let chunks = work.chunks();
    let of_row = work.params.stats.cast::<V2<f32>>().add((work.row * chunks.num_qo_heads) as u64);
    chunks.fold(scratch, || true, |head, stats| of_row.add(head as u64).store(V2([stats.max, stats.sum])));
}
