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

/// Column tiles of eight places in a tile.
const COLUMNS: usize = (TILE / 8) as usize;

/// The lane's products, logits, then weights of a tile: rows are query rows, columns places.
type Weights = [Accumulator; COLUMNS];

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

/// See the module. `K` steps of 16 dimensions, `N = 2 K` column tiles of 8.
///
/// # Safety
/// - The buffers and tables are as [`AttendParams`] says, and 16-byte aligned; page numbers are those of the cache.
/// - `head_dim = 16 K`.
/// - Keys are gathered, or no rope table is given. The rope tables cover `last_position` and the longest block.
/// - Launched with [`AttendParams::prefill_dims`].
pub unsafe fn attend_prefill<T: Element, const K: usize, const N: usize>(params: AttendParams<T>) {
    grid::wait_for_previous();
    grid::launch_dependents();
    let layout = const { &Layout::new((16 * K) as u32) };
    let list = params.list(thread::block_idx_z());
    let num_rows = params.num_query_rows(&list);
    let block_row = thread::block_idx_x() * QUERY_ROWS;
    if block_row >= num_rows {
        return;
    }
    let work = plan(&params, list, block_row, num_rows);
    let mut out = [Accumulator::ZERO; N];
    let mut softmax = Running::EMPTY;
    if work.num_tiles == 0 {
        return work.rows.write(&out, &softmax);
    }
    look_up(&work, layout, 0);
    load_queries::<T, K>(&work, layout);
    thread::sync_threads();
    copy::<T, K>(&work, layout, 0);
    look_up(&work, layout, 1);
    let pitch = (16 * K) as u32 + PAD;
    let queries = query_fragments::<K>(layout.queries.get().add(16 * warp::warp_id() * pitch), pitch);
    for tile in 0..work.num_tiles {
        cp_async_wait::<0>();
        // Behind this the copies of all threads to this tile have arrived, and nobody works on the one before.
        thread::sync_threads();
        copy::<T, K>(&work, layout, tile + 1);
        look_up(&work, layout, tile + 2);
        attend_tile::<T, K, N>(&work, layout, tile, &queries, &mut softmax, &mut out);
    }
    work.rows.write(&out, &softmax);
}

unsafe fn plan<T: Element>(
    params: &AttendParams<T>,
    list: List,
    block_row: u32,
    num_rows: u32,
) -> Work<'_, T> {
    let first_row = block_row + 16 * warp::warp_id();
    let rows = QueryRows::new(params, list, thread::block_idx_y(), first_row, num_rows);
    let last_bound = bound(params, &list, block_row + QUERY_ROWS - 1, num_rows);
    Work {
        block_row,
        num_rows,
        least_bound: rows.least_bound(),
        rows,
        num_tiles: params.useful_places(&list, last_bound).div_ceil(TILE),
    }
}

/// Looks up where the keys and values of a tile lie. The first two warps look up keys, the next two values.
unsafe fn look_up<T: Element>(work: &Work<'_, T>, layout: &Layout, tile: u32) {
    let (params, list) = (work.rows.params, &work.rows.list);
    let thread = thread::thread_idx_x();
    if tile >= work.num_tiles || thread >= 2 * TILE {
        return;
    }
    let place = thread % TILE;
    let at = params.place(list, tile * TILE + place);
    let index = tile % 2 * TILE + place;
    if thread < TILE {
        let page = || unsafe { params.page(list, at.token) };
        let offset = params.key_offset(list, work.rows.kv_head, tile * TILE + place, page);
        layout.key_offsets.get().add(index).store(offset);
    } else {
        let (page, within) = params.page(list, at.token);
        layout.value_offsets.get().add(index).store(params.v_stride.offset(page, within, work.rows.kv_head));
        layout.ranks.get().add(tile % 4 * TILE + place).store(at.rank);
    }
}

/// Starts copying a tile's keys and values; a group of copies in any case.
unsafe fn copy<T: Element, const K: usize>(work: &Work<'_, T>, layout: &Layout, tile: u32) {
    let pitch = (16 * K) as u32 + PAD;
    let pieces = (2 * K) as u32;
    if tile < work.num_tiles {
        let base = tile % 2 * TILE;
        for i in strided(thread::thread_idx_x(), TILE * pieces, THREADS) {
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
unsafe fn attend_tile<T: Element, const K: usize, const N: usize>(
    work: &Work<'_, T>,
    layout: &Layout,
    tile: u32,
    queries: &[A; K],
    softmax: &mut Running,
    out: &mut [Accumulator; N],
) {
    let pitch = (16 * K) as u32 + PAD;
    let (own, first) = (warp::lane_id(), tile % 2 * TILE);
    let ranks = layout.ranks.get().add(tile % 4 * TILE);
    // The ranks ascend, so the last tells whether all are seen.
    let masked = ranks.add(TILE - 1).load() >= work.least_bound;

    // Rows of two column tiles, upper and lower eight dimensions: lanes 0-7, 8-15 and 16-23, 24-31.
    let keys = layout.keys.get().add((first + own / 16 * 8 + own % 8) * pitch + own / 8 % 2 * 8);
    let mut weights = [Accumulator::ZERO; COLUMNS];
    for n in (0..COLUMNS).step_by(2) {
        for k in 0..K {
            let b = ldmatrix_x4(keys.add(8 * n as u32 * pitch + 16 * k as u32));
            T::mma(&mut weights[n], queries[k], B([b[0], b[1]]));
            T::mma(&mut weights[n + 1], queries[k], B([b[2], b[3]]));
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
    if masked && any_value_not_finite::<T, K>(of_tile) {
        let of_tile = of_tile.cast::<T>();
        return accumulate_seen::<T, K, N>(work, layout, ranks, of_tile, &weights, out);
    }
    // Rows are places: lanes 0-15 give 16 of them for the first eight dimensions, 16-31 for the next.
    let values = layout.values.get().add((first + own % 16) * pitch + own / 16 * 8);
    for k in 0..COLUMNS / 2 {
        let a = as_operand::<T>([weights[2 * k], weights[2 * k + 1]]);
        for n in (0..N).step_by(2) {
            let b = ldmatrix_x4_trans(values.add(16 * k as u32 * pitch + 8 * n as u32));
            T::mma(&mut out[n], a, B([b[0], b[1]]));
            T::mma(&mut out[n + 1], a, B([b[2], b[3]]));
        }
    }
}

/// Whether a value of the tile is infinite or NaN; the same in all lanes.
unsafe fn any_value_not_finite<T: Element, const K: usize>(values: Shared<u16>) -> bool {
    let (pitch, words) = ((16 * K) as u32 + PAD, (8 * K) as u32);
    let mut found = false;
    for i in strided(warp::lane_id(), TILE * words, warp::SIZE) {
        found |= any_not_finite::<T>(values.add(i / words * pitch + i % words * 2).cast::<u32>().load());
    }
    warp::any(warp::FULL, found)
}

/// `out += weights * values`, one place at a time: a value that a query does not see, infinite or NaN, is not
/// multiplied by its weight of 0 either. For the rare tile that has such a value among the block's own tokens. The
/// weights go by the shared memory of the warp's queries, which are in registers.
unsafe fn accumulate_seen<T: Element, const K: usize, const N: usize>(
    work: &Work<'_, T>,
    layout: &Layout,
    ranks: Shared<u32>,
    values: Shared<T>,
    weights: &Weights,
    out: &mut [Accumulator; N],
) {
    let pitch = (16 * K) as u32 + PAD;
    let Lane { g, t } = lane();
    let scratch = layout.queries.get().add(16 * warp::warp_id() * pitch).cast::<T>();
    warp::sync_warp(warp::FULL);
    for n in 0..COLUMNS {
        for i in 0..4 {
            let (row, place) = (g + 8 * (i as u32 / 2), 8 * n as u32 + 2 * t + i as u32 % 2);
            scratch.add(TILE * row + place).store(T::from_f32(weights[n].0[i]));
        }
    }
    warp::sync_warp(warp::FULL);
    for place in 0..TILE {
        let rank = ranks.add(place).load();
        let weight = [
            scratch.add(TILE * g + place).load().to_f32(),
            scratch.add(TILE * (g + 8) + place).load().to_f32(),
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
