//! The kernel: a block's queries, and a warp's way through its tiles.

mod merge;
mod products;

use self::merge::merge_warps;
use self::products::multiply;
use super::params::*;
use crate::common::block::strided;
use crate::common::element::Element;
use crate::common::fragment::{Accumulator, Lane, lane};
use crate::common::rope::{ANY_PAIRS, HALF_SPLIT, NATIVE};
use crate::common::softmax::Running;
use crate::common::words::{load_row, store_shared};
use crate::ops::attend::AttendParams;
use crate::ops::attend::kernel::NOWHERE;
use crate::ops::attend::kernel::tile::{
    Key, Out, Values, Work, add_seen, add_values, any_value_not_finite, transpose, weigh,
};
use crate::simt::data::V2;
use crate::simt::shared::Shared;
use crate::simt::{grid, thread, warp};

/// The tiles of a warp.
#[derive(Clone, Copy)]
struct Tiles {
    first: u32,
    step: u32,
    /// Token of the lane's place in the first, loaded before the list's length is known.
    early: u32,
}

/// Where the lane's place of a tile lies: element offset of its page and token in keys, and its rank.
#[derive(Clone, Copy)]
struct At {
    offset: u64,
    rank: u32,
}

/// See the module. `W` words a piece, `C` chunks of keys, `V` chunks of values; `ROTATE`: how keys are rotated, [`NATIVE`],
/// [`HALF_SPLIT`], [`INTERLEAVED`](crate::common::rope::INTERLEAVED) or [`ANY_PAIRS`].
///
/// # Safety
/// - The buffers and tables are as [`AttendParams`] says, and 16-byte aligned; page numbers are those of the cache.
/// - `head_dim = 8 W C = 16 W V`. Keys are not gathered; `k_stride` is `v_stride`.
/// - The rope tables cover `last_position` and the longest block, and have the pairs that `ROTATE` says (the meaning of each is at
///   [`Rotation`](crate::entries::Rotation)).
/// - Launched with [`AttendParams::decode_dims`].
pub unsafe fn attend_decode<T: Element, const W: usize, const C: usize, const V: usize, const ROTATE: u32>(
    params: AttendParams<T>,
) {
    let num_warps = const { warps((8 * W * C) as u32, ROTATE != NATIVE) };
    if num_warps == MAX_WARPS {
        thread::launch_bounds::<{ 32 * MAX_WARPS }, 1>();
    } else {
        thread::launch_bounds::<256, 1>();
    }
    grid::wait_for_previous();
    grid::launch_dependents();
    const { assert!(C as u32 <= warps((8 * W * C) as u32, ROTATE != NATIVE), "a warp for each chunk of a query") };
    let layout = const { &Layout::new((8 * W * C) as u32, warps((8 * W * C) as u32, ROTATE != NATIVE)) };
    let row = thread::block_idx_z();
    // Tiles are dealt to splits, and then to warps.
    let (first_tile, step) =
        (thread::block_idx_x() + thread::grid_dim_x() * warp::warp_id(), thread::grid_dim_x() * num_warps);
    let early = params.early_token(row, first_tile * TILE + warp::lane_id() % TILE);
    let list = params.list(row);
    let (kv_head, tile) = (
        thread::block_idx_y() % params.num_kv_heads.max(1),
        thread::block_idx_y() / params.num_kv_heads.max(1),
    );
    let first_row = tile * QUERY_ROWS;
    let all_rows = params.num_query_rows(&list);
    if first_row >= all_rows {
        return;
    }
    let work = Work::new(&params, list, kv_head, first_row, all_rows - first_row);
    if list.len == 0 {
        if thread::block_idx_x() == 0 {
            write_nothing::<T, W, C>(&work);
        }
        return;
    }
    let mine = Tiles { first: first_tile, step, early };
    let (out, softmax) = attend_split::<T, W, C, V, ROTATE>(&work, layout, mine);
    merge_warps::<T, W, C, V>(&work, layout, out, softmax);
}

/// Output of an empty list.
unsafe fn write_nothing<T: Element, const W: usize, const C: usize>(work: &Work<'_, T>) {
    let quads = (2 * W * C) as u32;
    for i in strided(thread::thread_idx_x(), work.num_rows() * quads, thread::block_dim_x()) {
        let (at, _) = work.params.query_row(&work.list, work.kv_head, work.first_row + i / quads);
        work.params.store_out(at * (4 * quads) as u64 + (i % quads * 4) as u64, [0.0; 4]);
        if i.is_multiple_of(quads) {
            work.params.store_lse(at, f32::NEG_INFINITY);
        }
    }
}

/// Writes the block's rotated query rows to shared memory. Rows that there are not are left out.
unsafe fn rotate_queries<T: Element, const W: usize, const C: usize>(work: &Work<'_, T>, layout: &Layout) {
    let (params, head_dim) = (work.params, (8 * W * C) as u32);
    let pairs = head_dim / 2;
    let rotated = layout.rotated.get();
    for i in strided(thread::thread_idx_x(), work.num_rows() * pairs, thread::block_dim_x()) {
        let (row, pair) = (i / pairs, i % pairs);
        let (_, t) = params.query_row(&work.list, work.kv_head, work.first_row + row);
        let q = params.q_row(&work.list, work.kv_head, work.first_row + row);
        let (x, y) = params.rope.elements(pair);
        let position = work.list.query_position(t);
        let values = (q.add(x as u64).load_constant().to_f32(), q.add(y as u64).load_constant().to_f32());
        let values = params.rope.rotate(pair, position, values);
        rotated.add(row * head_dim + x).store(values.0);
        rotated.add(row * head_dim + y).store(values.1);
    }
    thread::sync_threads();
}

/// The lane's words of the query fragments of a chunk, which the warp makes: of queries that are not rotated.
unsafe fn load_queries<T: Element, const W: usize, const C: usize>(work: &Work<'_, T>) -> [u32; W] {
    let (Lane { g, t }, chunk) = (lane(), warp::warp_id());
    if chunk >= C as u32 || g >= work.num_rows() {
        return [0; W];
    }
    let params = work.params;
    let q = params.q_row(&work.list, work.kv_head, work.first_row + g);
    let first = 8 * W as u32 * chunk + 2 * W as u32 * t;
    load_row(q.add(first as u64))
}

/// Puts the query fragments in shared memory, `loaded` or rotated ones, a chunk by each warp. Returns where the lane's lie.
unsafe fn put_queries<T: Element, const W: usize, const C: usize, const ROTATE: u32>(
    work: &Work<'_, T>,
    layout: &Layout,
    loaded: [u32; W],
) -> Shared<u32> {
    let fragments = layout.queries.get();
    let (Lane { g, t }, chunk) = (lane(), warp::warp_id());
    if chunk < C as u32 {
        let at = fragments.add((chunk * 32 + warp::lane_id()) * W as u32);
        if ROTATE == NATIVE {
            store_shared(at, loaded);
        } else {
            let (mut high, mut low) = ([0; W], [0; W]);
            if g < work.num_rows() {
                let first = 8 * W as u32 * chunk + 2 * W as u32 * t;
                let from = layout.rotated.get().add(g * (8 * W * C) as u32 + first);
                for w in 0..W {
                    let pair = if ROTATE == ANY_PAIRS {
                        let (row, half) = (layout.rotated.get().add(g * (8 * W * C) as u32), C as u32 / 2);
                        let element = |i: usize| {
                            let (x, y) = elements_of_pair::<T, W, C>(work, chunk % half, t, 2 * w + i);
                            row.add(if chunk < half { x } else { y }).load()
                        };
                        [element(0), element(1)]
                    } else {
                        from.add(2 * w as u32).cast::<V2<f32>>().load().0
                    };
                    (high[w], low[w]) = work.params.split_rotated(pair[0], pair[1]);
                }
            }
            store_shared(at, high);
            store_shared(at.add((C * 32 * W) as u32), low);
        }
    }
    thread::sync_threads();
    fragments.add(warp::lane_id() * W as u32)
}

/// In the order of pairs, first elements come before second ones: chunk `c` of keys and queries holds the first elements of the
/// pairs whose second ones are in chunk `c + C / 2`. These are the elements of lane `t`'s pair `i`.
fn elements_of_pair<T: Element, const W: usize, const C: usize>(
    work: &Work<'_, T>,
    c: u32,
    t: u32,
    i: usize,
) -> (u32, u32) {
    work.params.rope.elements_in_runs(8 * W as u32 * c + 2 * W as u32 * t + i as u32, (8 * W * C) as u32)
}

/// Looks up the lane's place of a tile, place `lane % 16`. Beyond the end it is the last one's.
unsafe fn look_up<T: Element>(work: &Work<'_, T>, tile: u32) -> At {
    let params = work.params;
    let place = params.place(&work.list, tile * TILE + warp::lane_id() % TILE);
    let (page, within) = params.page(&work.list, place.token);
    At { offset: params.v_stride.offset(page, within, work.kv_head), rank: place.rank }
}

/// As [`look_up`] of a warp's first tile, whose tokens are loaded already.
unsafe fn look_up_early<T: Element>(work: &Work<'_, T>, tile: u32, early: u32) -> At {
    let (params, lane) = (work.params, warp::lane_id() % TILE);
    if params.selected.addr() == 0 || tile * TILE >= work.list.len {
        return look_up(work, tile);
    }
    let last = work.list.len - 1 - tile * TILE;
    let token = warp::shuffle_idx(warp::FULL, early, lane.min(last)).min(work.list.last_token);
    let (page, within) = params.page(&work.list, token);
    let place = tile * TILE + lane;
    let mut rank = if lane <= last { place } else { NOWHERE };
    if params.ranks.addr() != 0 {
        rank = params.place(&work.list, place).rank;
    }
    At { offset: params.v_stride.offset(page, within, work.kv_head), rank }
}

/// Offset of place `place` of the tile, from the lane that has looked it up.
unsafe fn offset_of(at: At, place: u32) -> u64 {
    let low = warp::shuffle_idx(warp::FULL, at.offset as u32, place);
    let high = warp::shuffle_idx(warp::FULL, (at.offset >> 32) as u32, place);
    (high as u64) << 32 | low as u64
}

/// The lane's pieces of the keys at places `g` and `g + 8` of the tile.
unsafe fn load_keys<T: Element, const W: usize, const C: usize, const ROTATE: u32>(
    work: &Work<'_, T>,
    at: At,
) -> [Key<W, C>; 2] {
    if !pieces_are_whole::<T, W, ROTATE>(work) {
        return load_keys_by_elements(work, at);
    }
    let Lane { g, t } = lane();
    let mut keys = [[[0; W]; C]; 2];
    if ROTATE == ANY_PAIRS {
        for half in 0..2 {
            let from = work.params.k_pages.add(offset_of(at, 8 * half as u32 + g));
            // As in `load_keys_by_elements`.
            let t =
                if const { 8 * W * C > 128 } { warp::shuffle_idx(warp::FULL, t, warp::lane_id()) } else { t };
            for c in 0..C / 2 {
                let (x, y) = elements_of_pair::<T, W, C>(work, c as u32, t, 0);
                keys[half][c] = load_row(from.add(x as u64));
                keys[half][c + C / 2] = load_row(from.add(y as u64));
            }
        }
        return keys;
    }
    for half in 0..2 {
        let offset = offset_of(at, 8 * half as u32 + g) + (2 * W as u32 * t) as u64;
        let from = work.params.k_pages.add(offset);
        for c in 0..C {
            keys[half][c] = load_row(from.add((8 * W * c) as u64));
        }
    }
    keys
}

/// Whether the lane's pieces of a key are pieces of it: in the order of pairs, if each lies in one run, at a multiple of its size.
fn pieces_are_whole<T: Element, const W: usize, const ROTATE: u32>(work: &Work<'_, T>) -> bool {
    let rope = &work.params.rope;
    ROTATE != ANY_PAIRS || (rope.pairing == HALF_SPLIT && rope.pairs.is_multiple_of(2 * W as u32))
}

/// As [`load_keys`] in the order of pairs, wherever their elements lie.
unsafe fn load_keys_by_elements<T: Element, const W: usize, const C: usize>(
    work: &Work<'_, T>,
    at: At,
) -> [Key<W, C>; 2] {
    let Lane { g, t } = lane();
    let mut keys = [[[0; W]; C]; 2];
    for half in 0..2 {
        let from = work.params.k_pages.add(offset_of(at, 8 * half as u32 + g)).cast::<u16>();
        // By way of a shuffle, whose result the compiler does not know: it would find the places of all elements once, before the
        // loop over tiles, and has no registers to keep them in.
        let t = warp::shuffle_idx(warp::FULL, t, warp::lane_id());
        let bits = |element: u32| from.add(element as u64).load_constant() as u32;
        for c in 0..C / 2 {
            let t = if const { 8 * W * C > 128 } { warp::shuffle_xor(warp::FULL, t, 0) } else { t };
            for i in 0..2 * W {
                let (x, y) = elements_of_pair::<T, W, C>(work, c as u32, t, i);
                keys[half][c][i / 2] |= bits(x) << (16 * (i % 2));
                keys[half][c + C / 2][i / 2] |= bits(y) << (16 * (i % 2));
            }
        }
    }
    keys
}

/// The lane's pieces of the values at places `2t`, `2t + 1`, `2t + 8` and `2t + 9` of the tile.
unsafe fn load_values<T: Element, const W: usize, const V: usize>(
    work: &Work<'_, T>,
    at: At,
) -> Values<W, V> {
    let Lane { g, t } = lane();
    let mut values = [[[0; W]; V]; 4];
    for i in 0..4 {
        let place = 2 * t + (i as u32 % 2) + 8 * (i as u32 / 2);
        let offset = offset_of(at, place) + (2 * W as u32 * g) as u64;
        let from = work.params.v_pages.add(offset);
        for v in 0..V {
            values[i][v] = load_row(from.add((16 * W * v) as u64));
        }
    }
    values
}

/// Whether values are asked for when their keys are multiplied, and the next keys when these are added: of large heads, of which there
/// are no registers for both.
const fn values_wait<const W: usize, const V: usize>() -> bool {
    16 * W * V > 128
}

/// Attention of the warp over its tiles of the block's split.
unsafe fn attend_split<T: Element, const W: usize, const C: usize, const V: usize, const ROTATE: u32>(
    work: &Work<'_, T>,
    layout: &Layout,
    mine: Tiles,
) -> (Out<W, V>, Running) {
    let mut out = [[Accumulator::ZERO; W]; V];
    let mut softmax = Running::EMPTY;
    let exists = |tile: u32| tile * TILE < work.list.len;
    let mut tile = mine.first;
    // Queries are loaded before the many keys and values, and arrive with the look-ups of these.
    let loaded = if ROTATE == NATIVE { load_queries::<T, W, C>(work) } else { [0; W] };
    // A split may have fewer tiles than warps; the first loads of the others are for nothing.
    let here = look_up_early(work, tile, mine.early);
    let (mut at, mut ahead) = (here, here);
    let mut rank = here.rank;
    let (mut keys, mut values) = ([[[0; W]; C]; 2], [[[0; W]; V]; 4]);
    if ROTATE == NATIVE || W == 4 {
        keys = load_keys::<T, W, C, ROTATE>(work, here);
    }
    if ROTATE == NATIVE {
        if !values_wait::<W, V>() {
            values = load_values::<T, W, V>(work, here);
        }
    } else {
        rotate_queries::<T, W, C>(work, layout);
    }
    let queries = put_queries::<T, W, C, ROTATE>(work, layout, loaded);
    if ROTATE != NATIVE && W != 4 {
        keys = load_keys::<T, W, C, ROTATE>(work, here);
    }
    if ROTATE != NATIVE && !values_wait::<W, V>() {
        values = load_values::<T, W, V>(work, here);
    }
    if !exists(tile) {
        return (out, softmax);
    }
    if exists(tile + mine.step) {
        ahead = look_up(work, tile + mine.step);
    }
    loop {
        let next = tile + mine.step;
        let products = multiply::<T, W, C, ROTATE>(work, queries, rank, &keys);
        let followed = exists(next);
        if values_wait::<W, V>() {
            values = load_values::<T, W, V>(work, at);
        } else if followed {
            keys = load_keys::<T, W, C, ROTATE>(work, ahead);
        }
        let rank_at = |place: u32| warp::shuffle_idx(warp::FULL, rank, place + lane().g);
        let weights = weigh(work, [rank_at(0), rank_at(8)], products, &mut softmax, &mut out);
        accumulate::<T, W, V>(work, tile, rank, weights, &values, &mut out);
        if !followed {
            return (out, softmax);
        }
        if values_wait::<W, V>() {
            keys = load_keys::<T, W, C, ROTATE>(work, ahead);
        } else {
            values = load_values::<T, W, V>(work, ahead);
        }
        (tile, rank, at) = (next, ahead.rank, ahead);
        ahead = look_up(work, next + mine.step); // late: there are no registers for it before
    }
}

/// `out += values^T * weights`. `rank` is that of the lane's place.
unsafe fn accumulate<T: Element, const W: usize, const V: usize>(
    work: &Work<'_, T>,
    tile: u32,
    rank: u32,
    weights: Accumulator,
    values: &Values<W, V>,
    out: &mut Out<W, V>,
) {
    // Whether some place of the tile is hidden from some query of the block, or lies beyond the end.
    let hides_some = warp::any(warp::FULL, rank >= work.list.first_bound);
    if hides_some && any_value_not_finite::<T, W, V>(values) {
        let at = look_up(work, tile);
        let places = work.list.len.saturating_sub(TILE * tile).min(TILE);
        let rank = |place| warp::shuffle_idx(warp::FULL, at.rank, place);
        let value = |place| {
            let from = work.params.v_pages.add(offset_of(at, place) + (2 * W as u32 * lane().g) as u64);
            move |element: u32| from.add(element as u64).cast::<u32>().load()
        };
        return add_seen::<T, W, V, _>(work, places, weights, |place| place, rank, value, out);
    }
    let t = lane().t;
    let weights = transpose::<T>(weights, [2 * t, 2 * t + 1]);
    add_values::<T, W, V>(weights, values, out);
}
