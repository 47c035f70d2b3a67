//! The kernel: look-ups, copies and products of a tile, each a tile ahead of the next.

use super::params::*;
use crate::common::block::strided;
use crate::common::element::{Element, any_not_finite};
use crate::common::fragment::{A, Accumulator, B, Lane, lane};
use crate::common::softmax::Running;
use crate::ops::attend::AttendParams;
use crate::ops::attend::kernel::List;
use crate::ops::attend::kernel::rows::{QueryRows, as_operand, bound, query_fragments, scale};
use crate::simt::data::{V2, V4};
use crate::simt::shared::Shared;
use crate::simt::tensor::{cp_async_16, cp_async_commit, cp_async_wait, ldmatrix_x4, ldmatrix_x4_trans};
use crate::simt::{grid, thread, warp};

/// The lane's products, logits, then weights of a tile of `8 C` places: rows are query rows, columns places.
type Weights<const C: usize> = [Accumulator; C];

/// What a block works on, and what is the warp's own.
struct Work<'a, T> {
    rows: QueryRows<'a, T>,
    /// First query row of the block.
    block_row: u32,
    /// Query rows of the KV head.
    num_rows: u32,
    /// Ranks that all rows of the warp see.
    least_bound: u32,
    /// Tiles that the block goes through.
    num_tiles: u32,
}

/// See the module. `K` steps of 16 dimensions, `N = 2 K` column tiles of 8; `C` column tiles of a tile's places.
///
/// # Safety
/// - The buffers and tables are as [`AttendParams`] says, and 16-byte aligned; page numbers are those of the cache.
/// - `head_dim = 16 K`; `C` is [`tile_fragments`].
/// - Keys are gathered, or no rope table is given. The rope tables cover `last_position` and the longest block.
/// - Launched with [`AttendParams::prefill_dims`].
pub unsafe fn attend_prefill<T: Element, const K: usize, const N: usize, const C: usize>(
    params: AttendParams<T>,
) {
    const { assert!(C == tile_fragments((16 * K) as u32)) };
    grid::wait_for_previous();
    grid::launch_dependents();
    let layout = const { &Layout::new((16 * K) as u32) };
    let list = params.list(thread::block_idx_z());
    let num_rows = params.num_query_rows(&list);
    let block_row = thread::block_idx_x() * QUERY_ROWS;
    if block_row >= num_rows {
        return;
    }
    let work = plan(&params, list, block_row, num_rows, (8 * C) as u32);
    let mut out = [Accumulator::ZERO; N];
    let mut softmax = Running::EMPTY;
    if work.num_tiles == 0 {
        return work.rows.write(&out, &softmax);
    }
    look_up::<T, C>(&work, layout, 0);
    load_queries::<T, K>(&work, layout);
    thread::sync_threads();
    copy::<T, K, C>(&work, layout, 0);
    look_up::<T, C>(&work, layout, 1);
    let mut queries = [A([0; 4]); K];
    if const { keeps_queries((16 * K) as u32) } {
        let pitch = (16 * K) as u32 + PAD;
        queries = query_fragments(layout.queries.get().add(16 * warp::warp_id() * pitch), pitch);
    }
    for tile in 0..work.num_tiles {
        cp_async_wait::<0>();
        // Behind this the copies of all threads to this tile have arrived, and nobody works on the one before.
        thread::sync_threads();
        copy::<T, K, C>(&work, layout, tile + 1);
        look_up::<T, C>(&work, layout, tile + 2);
        attend_tile::<T, K, N, C>(&work, layout, tile, &queries, &mut softmax, &mut out);
    }
    work.rows.write(&out, &softmax);
}

unsafe fn plan<T: Element>(
    params: &AttendParams<T>,
    list: List,
    block_row: u32,
    num_rows: u32,
    tile: u32,
) -> Work<'_, T> {
    let first_row = block_row + 16 * warp::warp_id();
    let rows = QueryRows::new(params, list, thread::block_idx_y(), first_row, num_rows);
    let last_bound = bound(params, &list, block_row + QUERY_ROWS - 1, num_rows);
    Work {
        block_row,
        num_rows,
        least_bound: rows.least_bound(),
        rows,
        num_tiles: params.useful_places(&list, last_bound).div_ceil(tile),
    }
}

/// Looks up where the keys and values of a tile lie. The first threads look up keys, as many behind them values.
unsafe fn look_up<T: Element, const C: usize>(work: &Work<'_, T>, layout: &Layout, tile: u32) {
    let (params, list) = (work.rows.params, &work.rows.list);
    let (thread, places) = (thread::thread_idx_x(), (8 * C) as u32);
    if tile >= work.num_tiles || thread >= 2 * places {
        return;
    }
    let place = thread % places;
    let at = params.place(list, tile * places + place);
    let index = tile % 2 * places + place;
    if thread < places {
        let page = || unsafe { params.page(list, at.token) };
        let offset = params.key_offset(list, work.rows.kv_head, tile * places + place, page);
        layout.key_offsets.get().add(index).store(offset);
    } else {
        let (page, within) = params.page(list, at.token);
        layout.value_offsets.get().add(index).store(params.v_stride.offset(page, within, work.rows.kv_head));
        layout.ranks.get().add(tile % 4 * places + place).store(at.rank);
    }
}

/// Starts copying a tile's keys and values; a group of copies in any case.
unsafe fn copy<T: Element, const K: usize, const C: usize>(work: &Work<'_, T>, layout: &Layout, tile: u32) {
    let pitch = (16 * K) as u32 + PAD;
    let (pieces, places) = ((2 * K) as u32, (8 * C) as u32);
    if tile < work.num_tiles {
        let base = tile % 2 * places;
        for i in strided(thread::thread_idx_x(), places * pieces, THREADS) {
            let (place, piece) = (i / pieces, i % pieces * 8);
            let to = (base + place) * pitch + piece;
            let from = layout.key_offsets.get().add(base + place).load() + piece as u64;
            cp_async_16(layout.keys.get().add(to), work.rows.params.k_pages.add(from).cast::<u16>(), 16);
            let from = layout.value_offsets.get().add(base + place).load() + piece as u64;
            cp_async_16(layout.values.get().add(to), work.rows.params.v_pages.add(from).cast::<u16>(), 16);
        }
    }
    cp_async_commit();
}

/// Puts the block's query rows in shared memory, rotated, a unit of a row at a time; rows that there are not are zero.
unsafe fn load_queries<T: Element, const K: usize>(work: &Work<'_, T>, layout: &Layout) {
    let (params, list, kv_head) = (work.rows.params, &work.rows.list, work.rows.kv_head);
    let rope = &params.rope;
    let has_units = rope.has_units();
    if !has_units && (rope.pairs > 0 || params.rotated_scale != 1.0) {
        return load_queries_by_elements::<T, K>(work, layout);
    }
    let (pitch, units) = ((16 * K) as u32 + PAD, K as u32);
    for i in strided(thread::thread_idx_x(), QUERY_ROWS * units, THREADS) {
        let (row, unit) = (i / units, i % units);
        let [first, second] = rope.unit_pieces(unit);
        let mut pieces = [[0; 4]; 2];
        if work.block_row + row < work.num_rows {
            let q = params.q_row(list, kv_head, work.block_row + row);
            let piece = |element: u32| q.add(element as u64).cast::<V4<u32>>().load_constant().0;
            pieces = [piece(first), piece(second)];
            if has_units {
                let (_, t) = params.query_row(list, kv_head, work.block_row + row);
                let angles = rope.unit_entries(unit, list.query_position(t)).angles();
                pieces = rope.turn_unit::<T>(unit, &angles, params.rotated_scale, pieces);
            }
        }
        let to = layout.queries.get().add(row * pitch);
        to.add(first).cast().store(V4(pieces[0]));
        to.add(second).cast().store(V4(pieces[1]));
    }
}

/// The same where pairs do not lie in pieces, element by element.
unsafe fn load_queries_by_elements<T: Element, const K: usize>(work: &Work<'_, T>, layout: &Layout) {
    let (params, list, kv_head) = (work.rows.params, &work.rows.list, work.rows.kv_head);
    let head_dim = (16 * K) as u32;
    let pairs = head_dim / 2;
    for i in strided(thread::thread_idx_x(), QUERY_ROWS * pairs, THREADS) {
        let (row, pair) = (i / pairs, i % pairs);
        let to = layout.queries.get().cast::<T>().add(row * (head_dim + PAD));
        let (x, y) = params.rope.elements(pair);
        let mut values = (0.0, 0.0);
        if work.block_row + row < work.num_rows {
            let (_, t) = params.query_row(list, kv_head, work.block_row + row);
            let q = params.q_row(list, kv_head, work.block_row + row);
            values = (q.add(x as u64).load_constant().to_f32(), q.add(y as u64).load_constant().to_f32());
            values = params.rope.rotate(pair, list.query_position(t), values);
        }
        to.add(x).store(T::from_f32(values.0 * params.rotated_scale));
        to.add(y).store(T::from_f32(values.1 * params.rotated_scale));
    }
}

/// One tile: logits, weights, output.
unsafe fn attend_tile<T: Element, const K: usize, const N: usize, const C: usize>(
    work: &Work<'_, T>,
    layout: &Layout,
    tile: u32,
    queries: &[A; K],
    softmax: &mut Running,
    out: &mut [Accumulator; N],
) {
    let pitch = (16 * K) as u32 + PAD;
    let places = (8 * C) as u32;
    let (own, first) = (warp::lane_id(), tile % 2 * places);
    let ranks = layout.ranks.get().add(tile % 4 * places);
    // The ranks ascend, so the last tells whether all are seen.
    let masked = ranks.add(places - 1).load() >= work.least_bound;

    // Rows of two column tiles, upper and lower eight dimensions: lanes 0-7, 8-15 and 16-23, 24-31.
    let keys = layout.keys.get().add((first + own / 16 * 8 + own % 8) * pitch + own / 8 % 2 * 8);
    let mut weights = [Accumulator::ZERO; C];
    let mut multiply = |n: usize, k: usize, query: A| {
        let b = ldmatrix_x4(keys.add(8 * n as u32 * pitch + 16 * k as u32));
        T::mma(&mut weights[n], query, B([b[0], b[1]]));
        T::mma(&mut weights[n + 1], query, B([b[2], b[3]]));
    };
    if const { keeps_queries((16 * K) as u32) } {
        for n in (0..C).step_by(2) {
            for k in 0..K {
                multiply(n, k, queries[k]);
            }
        }
    } else {
        let rows = layout.queries.get().add(16 * warp::warp_id() * pitch);
        for k in 0..K {
            let [query] = query_fragments(rows.add(16 * k as u32), pitch);
            for n in (0..C).step_by(2) {
                multiply(n, k, query);
            }
        }
    }
    let of_fragment = |n: usize| ranks.add(8 * n as u32 + 2 * lane().t).cast::<V2<u32>>().load().0;
    let scale_left = work.rows.scale_left(&mut weights);
    if masked {
        work.rows.hide_ranks(&mut weights, of_fragment);
    }
    let correction = work.rows.weigh(scale_left, &mut weights, softmax);
    scale(out, correction);

    let of_tile = layout.values.get().add(first * pitch);
    if masked && any_value_not_finite::<T, K, C>(of_tile) {
        let of_tile = of_tile.cast::<T>();
        return accumulate_seen::<T, K, N, C>(work, layout, ranks, of_tile, &weights, out);
    }
    // Rows are places: lanes 0-15 give 16 of them for the first eight dimensions, 16-31 for the next.
    let values = layout.values.get().add((first + own % 16) * pitch + own / 16 * 8);
    for k in 0..C / 2 {
        let a = as_operand::<T>([weights[2 * k], weights[2 * k + 1]]);
        for n in (0..N).step_by(2) {
            let b = ldmatrix_x4_trans(values.add(16 * k as u32 * pitch + 8 * n as u32));
            T::mma(&mut out[n], a, B([b[0], b[1]]));
            T::mma(&mut out[n + 1], a, B([b[2], b[3]]));
        }
    }
}

/// Whether a value of the tile is infinite or NaN; the same in all lanes.
unsafe fn any_value_not_finite<T: Element, const K: usize, const C: usize>(values: Shared<u16>) -> bool {
    let (pitch, words) = ((16 * K) as u32 + PAD, (8 * K) as u32);
    let mut found = false;
    for i in strided(warp::lane_id(), 8 * C as u32 * words, warp::SIZE) {
        found |= any_not_finite::<T>(values.add(i / words * pitch + i % words * 2).cast::<u32>().load());
    }
    warp::any(warp::FULL, found)
}

/// `out += weights * values`, one place at a time: a value that a query does not see, infinite or NaN, is not
/// multiplied by its weight of 0 either. For the rare tile that has such a value among the block's own tokens. The
/// weights go by shared memory: that of the warp's queries, where these are in registers.
unsafe fn accumulate_seen<T: Element, const K: usize, const N: usize, const C: usize>(
    work: &Work<'_, T>,
    layout: &Layout,
    ranks: Shared<u32>,
    values: Shared<T>,
    weights: &Weights<C>,
    out: &mut [Accumulator; N],
) {
    let (pitch, places) = ((16 * K) as u32 + PAD, (8 * C) as u32);
    let Lane { g, t } = lane();
    let scratch = if const { keeps_queries((16 * K) as u32) } {
        layout.queries.get().add(16 * warp::warp_id() * pitch)
    } else {
        layout.weights.get().add(16 * warp::warp_id() * places)
    };
    let scratch = scratch.cast::<T>();
    warp::sync_warp(warp::FULL);
    for n in 0..C {
        for i in 0..4 {
            let (row, place) = (g + 8 * (i as u32 / 2), 8 * n as u32 + 2 * t + i as u32 % 2);
            scratch.add(places * row + place).store(T::from_f32(weights[n].0[i]));
        }
    }
    warp::sync_warp(warp::FULL);
    for place in 0..places {
        let rank = ranks.add(place).load();
        let weight = [
            scratch.add(places * g + place).load().to_f32(),
            scratch.add(places * (g + 8) + place).load().to_f32(),
        ];
        let from = values.add(place * pitch + 2 * t);
        for n in 0..N {
            for e in 0..2 {
                let x = from.add((8 * n + e) as u32).load().to_f32();
                for row in 0..2 {
                    if rank < work.rows.bounds[row] {
                        out[n].0[2 * row + e] += weight[row] * x;
                    }
                }
            }
        }
    }
}
