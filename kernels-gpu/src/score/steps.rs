//! Steps that both kernels of `score` take.

use super::statistics::{Chunks, Stats, num_chunks};
use super::{ScoreParams, WARPS};
use crate::attention::{add_low, split};
use crate::element::Element;
use crate::layout::{LOGIT_TILE, Tokens};
use crate::pool::SCORE;
use crate::simt::data::{V2, V4};
use crate::simt::global::GlobalPtr;
use crate::simt::shared::{Region, Shared};
use crate::simt::warp;

/// What a warp works on, the same in all its lanes.
pub(super) struct Work<'a, T> {
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
pub(super) struct Tile {
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

    /// Whether there is nothing to do where the row's action is `action`. The candidates are asked for too, so that their
    /// look-ups are under way together with the action's.
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
        self.first + tile.index * tokens + 16 * u + 8 * half + warp::lane_id() / 4
    }
}

/// A lane's part of the queries of a KV head's group: eight elements of each column tile and chunk.
pub(super) type Queries<const C: usize, const N: usize> = [[[[f32; 4]; 2]; C]; N];

/// Asks for the lane's part of the queries. Columns beyond the group are zero. (The loads are plain ones: the assembler would
/// move `ld.global.nc` to where they are used.)
#[inline(always)]
pub(super) unsafe fn ask_for_queries<T: Element, const C: usize, const N: usize, const PACKED: bool>(
    work: &Work<'_, T>,
) -> Queries<C, N> {
    let params = work.params;
    let (column, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let mut queries = [[[[0.0; 4]; 2]; C]; N];
    let mut n = 0;
    while n < N {
        let member = if PACKED { column % 4 } else { n as u32 * 8 + column };
        let head = work.kv_head * params.group + member;
        let head = work.row as u64 * (params.num_kv_heads * params.group) as u64 + head as u64;
        let at = params.queries.add(head * (32 * C) as u64 + 8 * t as u64).cast::<V4<f32>>();
        let mut c = 0;
        while c < C && member < params.group {
            queries[n][c] = [at.add(8 * c as u64).load().0, at.add(8 * c as u64 + 1).load().0];
            c += 1;
        }
        n += 1;
    }
    queries
}

/// Splits and packs the queries of a KV head's group as B fragments in shared memory: the lane's words of column
/// tile `n`, part `p` (0 high, 1 low), chunk `c` are 32 * ((2 n + p) C + c) further, or 32 c packed. Each lane reads back only
/// what it wrote itself.
#[inline(always)]
pub(super) unsafe fn put_queries<T: Element, const C: usize, const N: usize, const PACKED: bool>(
    queries: &Queries<C, N>,
    place: Region<V4<u32>>,
) -> Shared<V4<u32>> {
    let of_warp = place.len() / WARPS;
    let fragments = place.get().add(warp::warp_id() * of_warp + warp::lane_id());
    let column = warp::lane_id() / 4;
    let mut n = 0;
    while n < N {
        let mut c = 0;
        while c < C {
            let (mut high, mut low) = ([0; 4], [0; 4]);
            let [x, y] = queries[n][c];
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
            c += 1;
        }
        n += 1;
    }
    fragments
}

/// Products of 16 tokens with a column tile of queries; low parts added unless packed.
#[inline(always)]
pub(super) unsafe fn multiply<T: Element, const C: usize, const PACKED: bool>(
    keys: &[[[u32; 4]; C]; 2],
    queries: Shared<V4<u32>>,
    n: u32,
) -> [f32; 4] {
    let (mut d, mut low_d) = ([0.0; 4], [0.0; 4]);
    let mut c = 0;
    while c < C {
        let (upper, lower) = (keys[0][c], keys[1][c]);
        let a0 = [upper[0], lower[0], upper[1], lower[1]];
        let a1 = [upper[2], lower[2], upper[3], lower[3]];
        let place = if PACKED { c as u32 } else { 2 * n * C as u32 + c as u32 };
        let high = queries.add(32 * place).load().0;
        T::mma(&mut d, a0, [high[0], high[1]]);
        if PACKED {
            T::mma(&mut low_d, a1, [high[2], high[3]]);
        } else {
            T::mma(&mut d, a1, [high[2], high[3]]);
            let low = queries.add(32 * (place + C as u32)).load().0;
            T::mma(&mut low_d, a0, [low[0], low[1]]);
            T::mma(&mut low_d, a1, [low[2], low[3]]);
        }
        c += 1;
    }
    let mut i = 0;
    while i < 4 {
        d[i] = if PACKED { d[i] + low_d[i] } else { add_low(d[i], low_d[i]) };
        i += 1;
    }
    d
}

/// Scales, stores and counts the lane's products of 16 tokens with a column tile.
#[inline(always)]
pub(super) unsafe fn write_products<T: Element, const U: usize, const PACKED: bool>(
    work: &Work<'_, T>,
    tile: Tile,
    u: u32,
    n: u32,
    d: [f32; 4],
    stats: &mut [Stats; 2],
) {
    let t = warp::lane_id() % 4;
    if PACKED {
        // Lanes with t = 0, 1 hold the high parts of columns 0 to 3, those with t = 2, 3 the low parts. The former
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
    stats: &mut [Stats; 2],
) {
    let params = work.params;
    let logits = [products[0] * params.score_scale, products[1] * params.score_scale];
    let tile = params.batch.logit_tile(work.row) + (token / LOGIT_TILE) as u64;
    let place = tile * params.num_kv_heads as u64 + work.kv_head as u64;
    let place = place * LOGIT_TILE as u64 + (token % LOGIT_TILE) as u64;
    let at = params.logits.add(place * params.group as u64 + column as u64);
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
    let mut i = 0;
    while i < 2 {
        stats[i].push(if valid[i] { logits[i] } else { f32::NAN });
        i += 1;
    }
}

/// Merges the statistics of the lanes that hold the same columns, and stores them for the chunk.
#[inline(always)]
pub(super) unsafe fn store_stats<T: Element, const N: usize, const PACKED: bool>(
    work: &Work<'_, T>,
    chunk: u32,
    stats: [[Stats; 2]; N],
) {
    let (lane, t) = (warp::lane_id(), warp::lane_id() % 4);
    let mut n = 0;
    while n < N {
        let mut i = 0;
        while i < 2 {
            let mut merged = stats[n][i];
            let (mut distance, holders) = if PACKED { (2, 2) } else { (4, 4) };
            while distance < 32 {
                merged = merged.merge_lane(distance);
                distance *= 2;
            }
            let member = 8 * n as u32 + 2 * t + i as u32;
            if lane < holders && member < work.params.group {
                let head = work.kv_head * work.params.group + member;
                work.chunks().store(chunk, head, merged);
            }
            i += 1;
        }
        n += 1;
    }
}

/// Folds the chunks' statistics of every head; run by the whole last block of a row.
#[inline(always)]
pub(super) unsafe fn fold<T: Element>(work: &Work<'_, T>, place: Region<V2<f32>>) {
    let chunks = work.chunks();
    let of_row = work.params.stats.cast::<V2<f32>>().add((work.row * chunks.num_qo_heads) as u64);
    chunks.fold(place, || true, |head, stats| of_row.add(head as u64).store(V2([stats.max, stats.sum])));
}
