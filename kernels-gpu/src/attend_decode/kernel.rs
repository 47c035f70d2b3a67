//! The kernel: a warp's way through its tiles.

use super::parts::merge_warps;
use super::*;
use crate::attention::{List, NOWHERE, add_low, any_not_finite, split, subtracted};
use crate::element::Element;
use crate::simt::data::V4;
use crate::simt::global::GlobalPtr;
use crate::simt::shared::Shared;
use crate::simt::{grid, math, thread, warp};

/// The lane's words of a key: `[chunk, word]`.
pub(crate) type Key<const W: usize, const C: usize> = [[u32; W]; C];
/// The lane's words of its four values: `[token, chunk, word]`.
pub(crate) type Values<const W: usize, const V: usize> = [[[u32; W]; V]; 4];
/// The lane's part of the output: `[chunk, word, (first row, columns 2t and 2t + 1; second row, the same)]`.
pub(crate) type Out<const W: usize, const V: usize> = [[[f32; 4]; W]; V];

/// What the blocks of a tile of query rows work on.
pub(crate) struct Work<'a, T> {
    pub(crate) params: &'a AttendParams<T>,
    pub(crate) list: List,
    pub(crate) kv_head: u32,
    /// First query row.
    pub(crate) first_row: u32,
    /// Query rows that there are, 1 to [`QUERY_ROWS`].
    pub(crate) num_rows: u32,
    /// Ranks that the lane's query rows `2t` and `2t + 1` see.
    bounds: [u32; 2],
}

/// The tiles of a warp.
#[derive(Clone, Copy)]
struct Tiles {
    first: u32,
    step: u32,
    /// Token of the lane's place in the first, read ahead.
    early: u32,
}

impl<'a, T> Work<'a, T> {
    #[inline(always)]
    pub(crate) fn new(
        params: &'a AttendParams<T>,
        list: List,
        kv_head: u32,
        first_row: u32,
        num_rows: u32,
    ) -> Self {
        let t = warp::lane_id() % 4;
        let bound = |i: u32| list.first_bound + (first_row + i.min(num_rows - 1)) / params.group.max(1);
        let bounds = [bound(2 * t), bound(2 * t + 1)];
        Work { params, list, kv_head, first_row, num_rows, bounds }
    }
}

/// Where the lane's place of a tile lies: element offset of its page and token in keys, and its rank.
#[derive(Clone, Copy)]
struct At {
    offset: u64,
    rank: u32,
}

/// Softmax of the lane's query rows `2t` and `2t + 1`: the largest logit of the row, the lane's part of the sum.
#[derive(Clone, Copy)]
pub(crate) struct Softmax {
    pub(crate) max: [f32; 2],
    pub(crate) sum: [f32; 2],
}

impl Softmax {
    pub(crate) const EMPTY: Softmax = Softmax { max: [f32::NEG_INFINITY; 2], sum: [0.0; 2] };
}

/// See the module. `W` words a piece, `C` chunks of keys, `V` chunks of values; `ROTATE`: [`NATIVE`],
/// [`HALVES`] or [`NEIGHBOURS`].
///
/// # Safety
/// - The buffers and tables are as [`AttendParams`] says, and 16-byte aligned; tokens lie in their rows, page numbers
///   in the pool.
/// - `head_dim = 8 W C = 16 W V`. Keys are not gathered; `k_stride` is `v_stride`.
/// - The rope tables cover every rank below the length of a whole list, and have the pairs that `ROTATE` says
///   ([`RopeTables::pairs_in_lane`](crate::rope::RopeTables::pairs_in_lane)).
/// - Launched with [`AttendParams::decode_dims`].
#[inline(always)]
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
    let layout = const { &Layout::new((8 * W * C) as u32, warps((8 * W * C) as u32, ROTATE != NATIVE)) };
    let row = thread::block_idx_z();
    // Tiles are dealt to shares, and then to warps.
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
    let num_rows = (all_rows - first_row).min(QUERY_ROWS);
    let work = Work::new(&params, list, kv_head, first_row, num_rows);
    if list.len == 0 {
        if thread::block_idx_x() == 0 {
            write_nothing::<T, W, C>(&work);
        }
        return;
    }
    let mine = Tiles { first: first_tile, step, early };
    let (out, softmax) = attend_share::<T, W, C, V, ROTATE>(&work, layout, mine);
    merge_warps::<T, W, C, V>(&work, layout, out, softmax);
}

/// Output of a list without entries.
#[inline(always)]
unsafe fn write_nothing<T: Element, const W: usize, const C: usize>(work: &Work<'_, T>) {
    let quads = (2 * W * C) as u32;
    let mut i = thread::thread_idx_x();
    while i < work.num_rows * quads {
        let (at, _) = work.params.query_row(&work.list, work.kv_head, work.first_row + i / quads);
        work.params.store_out(at * (4 * quads) as u64 + (i % quads * 4) as u64, [0.0; 4]);
        if i.is_multiple_of(quads) {
            work.params.store_lse(at, 0.0, 0.0);
        }
        i += thread::block_dim_x();
    }
}

/// Writes the block's rotated query rows to shared memory. Rows that there are not are left out.
#[inline(always)]
unsafe fn rotate_queries<T: Element, const W: usize, const C: usize>(work: &Work<'_, T>, layout: &Layout) {
    let (params, head_dim) = (work.params, (8 * W * C) as u32);
    let pairs = head_dim / 2;
    let rotated = layout.rotated.get();
    let mut i = thread::thread_idx_x();
    while i < work.num_rows * pairs {
        let (row, pair) = (i / pairs, i % pairs);
        let (at, t) = params.query_row(&work.list, work.kv_head, work.first_row + row);
        let q = params.q.add(at * head_dim as u64);
        let (x, y) = params.rope.elements(pair);
        let position = (work.list.first_bound + t).saturating_sub(1);
        let values = (q.add(x as u64).load_cached().to_f32(), q.add(y as u64).load_cached().to_f32());
        let values = params.rope.rotate(pair, position, values);
        rotated.add(row * head_dim + x).store(values.0);
        rotated.add(row * head_dim + y).store(values.1);
        i += thread::block_dim_x();
    }
    thread::sync_threads();
}

/// The lane's words of the query fragments of a chunk, which the warp makes: of queries that are not rotated.
#[inline(always)]
unsafe fn load_queries<T: Element, const W: usize, const C: usize>(work: &Work<'_, T>) -> [u32; W] {
    let (g, chunk) = (warp::lane_id() / 4, warp::warp_id());
    if chunk >= C as u32 || g >= work.num_rows {
        return [0; W];
    }
    let params = work.params;
    let (at, _) = params.query_row(&work.list, work.kv_head, work.first_row + g);
    let first = 8 * W as u32 * chunk + 2 * W as u32 * (warp::lane_id() % 4);
    load_words(params.q.add(at * (8 * W * C) as u64 + first as u64))
}

/// Puts the query fragments in shared memory, `loaded` or rotated ones; there are no more chunks than warps. Returns where
/// the lane's lie.
#[inline(always)]
unsafe fn share_queries<T: Element, const W: usize, const C: usize, const ROTATE: u32>(
    work: &Work<'_, T>,
    layout: &Layout,
    loaded: [u32; W],
) -> Shared<u32> {
    let fragments = layout.queries.get();
    let (g, t, chunk) = (warp::lane_id() / 4, warp::lane_id() % 4, warp::warp_id());
    if chunk < C as u32 {
        let at = fragments.add((chunk * 32 + warp::lane_id()) * W as u32);
        if ROTATE == NATIVE {
            store_words(at, loaded);
        } else {
            let (mut high, mut low) = ([0; W], [0; W]);
            if g < work.num_rows {
                let first = 8 * W as u32 * chunk + 2 * W as u32 * t;
                let from = layout.rotated.get().add(g * (8 * W * C) as u32 + first);
                let mut w = 0;
                while w < W {
                    let pair = from.add(2 * w as u32).cast::<V2<f32>>().load().0;
                    (high[w], low[w]) = split::<T>(pair[0], pair[1]);
                    w += 1;
                }
            }
            store_words(at, high);
            store_words(at.add((C * 32 * W) as u32), low);
        }
    }
    thread::sync_threads();
    fragments.add(warp::lane_id() * W as u32)
}

/// `W` words at once.
#[inline(always)]
pub(crate) unsafe fn load_words<T, const W: usize>(at: GlobalPtr<T>) -> [u32; W] {
    let mut words = [0; W];
    if W == 4 {
        let quad = at.cast::<V4<u32>>().load_stream_row().0;
        let mut w = 0;
        while w < W {
            words[w] = quad[w];
            w += 1;
        }
    } else {
        let pair = at.cast::<V2<u32>>().load_stream_row().0;
        let mut w = 0;
        while w < W {
            words[w] = pair[w];
            w += 1;
        }
    }
    words
}

#[inline(always)]
unsafe fn store_words<const W: usize>(at: Shared<u32>, words: [u32; W]) {
    if W == 4 {
        at.cast::<V4<u32>>().store(V4([words[0], words[1], words[2], words[W - 1]]));
    } else {
        at.cast::<V2<u32>>().store(V2([words[0], words[W - 1]]));
    }
}

#[inline(always)]
pub(crate) unsafe fn load_shared_words<const W: usize>(at: Shared<u32>) -> [u32; W] {
    let mut words = [0; W];
    if W == 4 {
        let quad = at.cast::<V4<u32>>().load().0;
        let mut w = 0;
        while w < W {
            words[w] = quad[w];
            w += 1;
        }
    } else {
        let pair = at.cast::<V2<u32>>().load().0;
        let mut w = 0;
        while w < W {
            words[w] = pair[w];
            w += 1;
        }
    }
    words
}

/// Attention of the warp over every fourth tile of the block's share.
#[inline(always)]
unsafe fn attend_share<T: Element, const W: usize, const C: usize, const V: usize, const ROTATE: u32>(
    work: &Work<'_, T>,
    layout: &Layout,
    mine: Tiles,
) -> (Out<W, V>, Softmax) {
    let scratch = layout.out.get().add(warp::warp_id() * QUERY_ROWS * (8 * W * C) as u32);
    let mut out = [[[0.0; 4]; W]; V];
    let mut softmax = Softmax::EMPTY;
    let end = work.list.len.div_ceil(TILE);
    let mut tile = mine.first;
    // Queries are asked for before the many keys and values, and arrive with the look-ups of these.
    let loaded = if ROTATE == NATIVE { load_queries::<T, W, C>(work) } else { [0; W] };
    // A share may have fewer tiles than warps; the first loads of the others are for nothing.
    let here = look_up_early(work, tile, mine.early);
    let mut ahead = here;
    let mut rank = here.rank;
    let (mut keys, mut values) = ([[[0; W]; C]; 2], [[[0; W]; V]; 4]);
    if ROTATE == NATIVE || W == 4 {
        keys = load_keys::<T, W, C>(work, here);
    }
    if ROTATE == NATIVE {
        values = load_values::<T, W, V>(work, here);
    } else {
        rotate_queries::<T, W, C>(work, layout);
    }
    let queries = share_queries::<T, W, C, ROTATE>(work, layout, loaded);
    if ROTATE != NATIVE && W != 4 {
        keys = load_keys::<T, W, C>(work, here);
    }
    if ROTATE != NATIVE {
        values = load_values::<T, W, V>(work, here);
    }
    if tile >= end {
        return (out, softmax);
    }
    if tile + mine.step < end {
        ahead = look_up(work, tile + mine.step);
    }
    loop {
        let next = tile + mine.step;
        let products = multiply::<T, W, C, ROTATE>(work, queries, rank, &keys);
        let followed = next < end;
        if followed {
            keys = load_keys::<T, W, C>(work, ahead);
        }
        let rank_at = |place: u32| warp::shuffle_idx(warp::FULL, rank, place + warp::lane_id() / 4);
        let weights = fold(work, [rank_at(0), rank_at(8)], products, &mut softmax, &mut out);
        accumulate::<T, W, V>(work, tile, rank, weights, &values, scratch, &mut out);
        if !followed {
            return (out, softmax);
        }
        values = load_values::<T, W, V>(work, ahead);
        (tile, rank) = (next, ahead.rank);
        ahead = look_up(work, next + mine.step); // late: there are no registers for it before
    }
}

/// Looks up the lane's place of a tile, place `lane % 16`. Beyond the end it is the last one's.
#[inline(always)]
unsafe fn look_up<T: Element>(work: &Work<'_, T>, tile: u32) -> At {
    let params = work.params;
    let place = params.place(&work.list, tile * TILE + warp::lane_id() % TILE);
    let (page, within) = params.page(&work.list, place.token);
    At { offset: params.v_stride.offset(page, within, work.kv_head), rank: place.rank }
}

/// As [`look_up`] of a warp's first tile, whose tokens have been read ahead.
#[inline(always)]
unsafe fn look_up_early<T: Element>(work: &Work<'_, T>, tile: u32, early: u32) -> At {
    let (params, lane) = (work.params, warp::lane_id() % TILE);
    if params.selected.addr() == 0 || tile * TILE >= work.list.len {
        return look_up(work, tile);
    }
    let last = work.list.len - 1 - tile * TILE;
    let token = warp::shuffle_idx(warp::FULL, early, lane.min(last));
    let (page, within) = params.page(&work.list, token);
    let place = tile * TILE + lane;
    let mut rank = if lane <= last { place } else { NOWHERE };
    if params.ranks.addr() != 0 {
        rank = params.place(&work.list, place).rank;
    }
    At { offset: params.v_stride.offset(page, within, work.kv_head), rank }
}

/// Offset of place `place` of the tile, from the lane that has looked it up.
#[inline(always)]
unsafe fn offset_of(at: At, place: u32) -> u64 {
    let low = warp::shuffle_idx(warp::FULL, at.offset as u32, place);
    let high = warp::shuffle_idx(warp::FULL, (at.offset >> 32) as u32, place);
    (high as u64) << 32 | low as u64
}

/// The lane's pieces of the keys at places `g` and `g + 8` of the tile.
#[inline(always)]
unsafe fn load_keys<T: Element, const W: usize, const C: usize>(
    work: &Work<'_, T>,
    at: At,
) -> [Key<W, C>; 2] {
    let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let mut keys = [[[0; W]; C]; 2];
    let mut half = 0;
    while half < 2 {
        let offset = offset_of(at, 8 * half as u32 + g) + (2 * W as u32 * t) as u64;
        let from = work.params.k_pages.add(offset);
        let mut c = 0;
        while c < C {
            keys[half][c] = load_words(from.add((8 * W * c) as u64));
            c += 1;
        }
        half += 1;
    }
    keys
}

/// The lane's pieces of the values at places `2t`, `2t + 1`, `2t + 8` and `2t + 9` of the tile.
#[inline(always)]
unsafe fn load_values<T: Element, const W: usize, const V: usize>(
    work: &Work<'_, T>,
    at: At,
) -> Values<W, V> {
    let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let mut values = [[[0; W]; V]; 4];
    let mut i = 0;
    while i < 4 {
        let place = 2 * t + (i as u32 % 2) + 8 * (i as u32 / 2);
        let offset = offset_of(at, place) + (2 * W as u32 * g) as u64;
        let from = work.params.v_pages.add(offset);
        let mut v = 0;
        while v < V {
            values[i][v] = load_words(from.add((16 * W * v) as u64));
            v += 1;
        }
        i += 1;
    }
    values
}

/// Products of the tile's keys with all query rows: the fragment has places `g` and `g + 8` in its rows.
#[inline(always)]
unsafe fn multiply<T: Element, const W: usize, const C: usize, const ROTATE: u32>(
    work: &Work<'_, T>,
    queries: Shared<u32>,
    rank: u32,
    keys: &[Key<W, C>; 2],
) -> [f32; 4] {
    let mut d = [0.0; 4];
    if ROTATE == NATIVE {
        let mut c = 0;
        while c < C {
            dot::<T, W>(&mut d, queries, c, [&keys[0][c], &keys[1][c]]);
            c += 1;
        }
        return d;
    }
    let position = |half: u32| {
        let rank = warp::shuffle_idx(warp::FULL, rank, 8 * half + warp::lane_id() / 4);
        if rank == NOWHERE { 0 } else { rank }
    };
    let positions = [position(0), position(1)];
    // Of high parts with high parts, and of either with the other's low parts.
    let mut rest = [0.0; 4];
    let lane = 2 * W as u32 * (warp::lane_id() % 4);
    let rope = &work.params.rope;
    let mut c = 0;
    while c < if ROTATE == HALVES { C / 2 } else { C } {
        let (mut x, mut y) = ([Parts::<W>::ZERO; 2], [Parts::<W>::ZERO; 2]);
        let mut half = 0;
        while half < 2 {
            let mut w = 0;
            if ROTATE == HALVES {
                while w < W {
                    let angles = rope.two_angles((8 * W * c + 2 * w) as u32 + lane, positions[half]);
                    let own = T::unpack(keys[half][c][w]);
                    let partner = T::unpack(keys[half][c + C / 2][w]);
                    let (x0, y0) = angles[0].turn((own[0], partner[0]));
                    let (x1, y1) = angles[1].turn((own[1], partner[1]));
                    x[half].set::<T>(w, (x0, x1));
                    y[half].set::<T>(w, (y0, y1));
                    w += 1;
                }
            } else {
                while w < W {
                    let pair = (4 * W * c + w) as u32 + lane / 2;
                    // Pairs that are not rotated have no angles.
                    let angles = rope.two_angles(pair.min(rope.pairs.saturating_sub(2)), positions[half]);
                    let mut i = 0;
                    while i < 2 {
                        let own = T::unpack(keys[half][c][w + i]);
                        let turned = angles[i].turn((own[0], own[1]));
                        x[half].set::<T>(w + i, if pair < rope.pairs { turned } else { (own[0], own[1]) });
                        i += 1;
                    }
                    w += 2;
                }
            }
            half += 1;
        }
        dot_parts::<T, W, C>(&mut d, &mut rest, queries, c, &x);
        if ROTATE == HALVES {
            dot_parts::<T, W, C>(&mut d, &mut rest, queries, c + C / 2, &y);
        }
        c += 1;
    }
    let mut i = 0;
    while i < 4 {
        d[i] = add_low(d[i], rest[i]);
        i += 1;
    }
    d
}

/// A rotated piece of a key.
#[derive(Clone, Copy)]
struct Parts<const W: usize> {
    high: [u32; W],
    low: [u32; W],
}

impl<const W: usize> Parts<W> {
    const ZERO: Self = Parts { high: [0; W], low: [0; W] };

    #[inline(always)]
    fn set<T: Element>(&mut self, w: usize, (x, y): (f32, f32)) {
        (self.high[w], self.low[w]) = split::<T>(x, y);
    }
}

/// `d += k q^T` over chunk `c`, for the pieces of the keys at places `g` and `g + 8`.
#[inline(always)]
unsafe fn dot<T: Element, const W: usize>(
    d: &mut [f32; 4],
    queries: Shared<u32>,
    c: usize,
    [upper, lower]: [&[u32; W]; 2],
) {
    let query = load_shared_words::<W>(queries.add((c * 32 * W) as u32));
    let mut w = 0;
    while w < W {
        T::mma(d, [upper[w], lower[w], upper[w + 1], lower[w + 1]], [query[w], query[w + 1]]);
        w += 2;
    }
}

/// [`dot`] of queries and keys that are both in high and low parts.
#[inline(always)]
unsafe fn dot_parts<T: Element, const W: usize, const C: usize>(
    d: &mut [f32; 4],
    rest: &mut [f32; 4],
    queries: Shared<u32>,
    c: usize,
    keys: &[Parts<W>; 2],
) {
    dot::<T, W>(d, queries, c, [&keys[0].high, &keys[1].high]);
    dot::<T, W>(rest, queries, c, [&keys[0].low, &keys[1].low]);
    dot::<T, W>(rest, queries.add((C * 32 * W) as u32), c, [&keys[0].high, &keys[1].high]);
}

/// The largest of a query row's logits, the same bits in the eight lanes that hold the row.
#[inline(always)]
unsafe fn max_of_row(own: f32) -> f32 {
    let max = own.max(warp::shuffle_xor(warp::FULL, own, 4));
    let max = max.max(warp::shuffle_xor(warp::FULL, max, 8));
    max.max(warp::shuffle_xor(warp::FULL, max, 16))
}

/// Turns products into weights, `exp(logit - max)`, with the softmax and the output so far brought up to date. `ranks` are
/// those of rows `g` and `g + 8` of the fragment.
#[inline(always)]
pub(crate) unsafe fn fold<T: Element, const W: usize, const V: usize>(
    work: &Work<'_, T>,
    ranks: [u32; 2],
    products: [f32; 4],
    softmax: &mut Softmax,
    out: &mut Out<W, V>,
) -> [f32; 4] {
    let mut weights = [0.0; 4];
    let mut largest = softmax.max;
    let mut i = 0;
    while i < 4 {
        let seen = ranks[i / 2] < work.bounds[i % 2];
        weights[i] = if seen { work.params.logit(products[i]) } else { f32::NEG_INFINITY };
        largest[i % 2] = largest[i % 2].max(weights[i]);
        i += 1;
    }
    let mut row = 0;
    while row < 2 {
        let max = max_of_row(largest[row]);
        let correction = math::ex2(softmax.max[row] - subtracted(max));
        softmax.max[row] = max;
        softmax.sum[row] *= correction;
        let mut v = 0;
        while v < V {
            let mut w = 0;
            while w < W {
                out[v][w][row] *= correction;
                out[v][w][row + 2] *= correction;
                w += 1;
            }
            v += 1;
        }
        row += 1;
    }
    let mut i = 0;
    while i < 4 {
        weights[i] = math::ex2(weights[i] - subtracted(softmax.max[i % 2]));
        softmax.sum[i % 2] += weights[i];
        i += 1;
    }
    weights
}

/// Weights of eight places as a B fragment: from lanes with a place and two query rows to lanes with a query row and
/// two places, those of the lanes `4 rows[0] ..` and `4 rows[1] ..`.
#[inline(always)]
pub(crate) unsafe fn transpose<T: Element>(first: f32, second: f32, rows: [u32; 2]) -> u32 {
    let g = warp::lane_id() / 4;
    let pair = T::pack(first, second);
    let upper = warp::shuffle_idx(warp::FULL, pair, 4 * rows[0] + g / 2);
    let lower = warp::shuffle_idx(warp::FULL, pair, 4 * rows[1] + g / 2);
    if g.is_multiple_of(2) { low_halves(upper, lower) } else { high_halves(upper, lower) }
}

#[inline(always)]
fn low_halves(a: u32, b: u32) -> u32 {
    a & 0xffff | b << 16
}

#[inline(always)]
fn high_halves(a: u32, b: u32) -> u32 {
    a >> 16 | b & 0xffff_0000
}

/// `out += values^T * weights`.
#[inline(always)]
unsafe fn accumulate<T: Element, const W: usize, const V: usize>(
    work: &Work<'_, T>,
    tile: u32,
    rank: u32,
    weights: [f32; 4],
    values: &Values<W, V>,
    scratch: Shared<f32>,
    out: &mut Out<W, V>,
) {
    if work.hides_some(rank) && any_value_not_finite::<T, W, V>(values) {
        return accumulate_seen::<T, W, V>(work, tile, weights, scratch, out);
    }
    let t = warp::lane_id() % 4;
    let rows = [2 * t, 2 * t + 1];
    let b = [transpose::<T>(weights[0], weights[1], rows), transpose::<T>(weights[2], weights[3], rows)];
    add_values::<T, W, V>(b, values, out);
}

/// `out += values^T * weights`, the weights being a B fragment.
#[inline(always)]
pub(crate) unsafe fn add_values<T: Element, const W: usize, const V: usize>(
    b: [u32; 2],
    values: &Values<W, V>,
    out: &mut Out<W, V>,
) {
    let mut v = 0;
    while v < V {
        let mut w = 0;
        while w < W {
            let [first, second] = [[values[0][v][w], values[1][v][w]], [values[2][v][w], values[3][v][w]]];
            let a = [
                low_halves(first[0], first[1]),
                high_halves(first[0], first[1]),
                low_halves(second[0], second[1]),
                high_halves(second[0], second[1]),
            ];
            T::mma(&mut out[v][w], a, b);
            w += 1;
        }
        v += 1;
    }
}

impl<T: Element> Work<'_, T> {
    /// Whether some place of a tile is hidden from some query of the block, or lies beyond the end; the same in all lanes.
    /// `rank` is that of the lane's place.
    #[inline(always)]
    unsafe fn hides_some(&self, rank: u32) -> bool {
        warp::any(warp::FULL, rank >= self.list.first_bound)
    }
}

/// Whether a value of the tile is infinite or NaN; the same in all lanes.
#[inline(always)]
pub(crate) unsafe fn any_value_not_finite<T: Element, const W: usize, const V: usize>(
    values: &Values<W, V>,
) -> bool {
    let mut found = false;
    let mut i = 0;
    while i < 4 {
        let mut v = 0;
        while v < V {
            let mut w = 0;
            while w < W {
                found |= any_not_finite::<T>(values[i][v][w]);
                w += 1;
            }
            v += 1;
        }
        i += 1;
    }
    warp::any(warp::FULL, found)
}

/// As [`accumulate`], one place at a time, so that a value a query does not see is not multiplied by its weight of 0
/// either: it may be infinite or NaN. For the rare tile that has such a value among the block's own tokens. `scratch`
/// is the warp's own, for 8 times 16 numbers.
#[inline(always)]
unsafe fn accumulate_seen<T: Element, const W: usize, const V: usize>(
    work: &Work<'_, T>,
    tile: u32,
    weights: [f32; 4],
    scratch: Shared<f32>,
    out: &mut Out<W, V>,
) {
    let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let mut i = 0;
    while i < 4 {
        let (row, place) = (2 * t + i as u32 % 2, 8 * (i as u32 / 2) + g);
        scratch.add(TILE * row + place).store(weights[i]);
        i += 1;
    }
    warp::sync_warp(warp::FULL);
    let at = look_up(work, tile);
    // A count that is not constant keeps the loop from being unrolled.
    let places = work.list.len.saturating_sub(TILE * tile).min(TILE);
    let mut place = 0;
    while place < places {
        let rank = warp::shuffle_idx(warp::FULL, at.rank, place);
        let value = work.params.v_pages.add(offset_of(at, place) + (2 * W as u32 * g) as u64);
        let weight = |row: u32| scratch.add(TILE * (2 * t + row) + place).load();
        let pair = |element: u32| value.add(element as u64).cast::<u32>().load_cached();
        add_seen::<T, W, V>(work, rank, [weight(0), weight(1)], pair, out);
        place += 1;
    }
    warp::sync_warp(warp::FULL); // the scratch memory is free again
}

/// Adds the value of one place, times the weights of the lane's query rows, to those that see it. `pair` loads two
/// elements, counted from the lane's first.
#[inline(always)]
pub(crate) unsafe fn add_seen<T: Element, const W: usize, const V: usize>(
    work: &Work<'_, T>,
    rank: u32,
    weights: [f32; 2],
    pair: impl Fn(u32) -> u32,
    out: &mut Out<W, V>,
) {
    let mut v = 0;
    while v < V {
        let mut w = 0;
        while w < W {
            let [x, y] = T::unpack(pair((16 * W * v + 2 * w) as u32));
            let mut row = 0;
            while row < 2 {
                if rank < work.bounds[row] {
                    out[v][w][row] += weights[row] * x;
                    out[v][w][row + 2] += weights[row] * y;
                }
                row += 1;
            }
            w += 1;
        }
        v += 1;
    }
}
