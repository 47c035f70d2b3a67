//! What multiplies.

use super::*;
use crate::common::block::strided;
use crate::common::fragment::{A, Accumulator, Lane, lane};
use crate::common::softmax::Running;
use crate::ops::attend::kernel::rows::{QueryRows, query_fragments, scale};
use crate::simt::warp;
use crate::simt::warpgroup::{Columns, Rows};

/// The barrier of the warpgroup's threads.
fn own_barrier() -> u32 {
    1 + consumer_warp() / 4
}

/// Products, then logits, then weights of a tile.
type Logits<const F: usize> = [Accumulator; F];

/// Packed weights of a tile: those of two adjacent fragments, of 16 places, are an operand. (Pairs would be kept as one of 64 bits.)
struct Weights<const F: usize> {
    /// Of rows `g`.
    upper: [u32; F],
    /// Of rows `g + 8`.
    lower: [u32; F],
}

impl<const F: usize> Weights<F> {
    fn operand(&self, step: usize) -> A {
        let (first, second) = (2 * step, 2 * step + 1);
        A([self.upper[first], self.lower[first], self.upper[second], self.lower[second]])
    }
}

/// The warp among those that multiply.
fn consumer_warp() -> u32 {
    own_warp() - WARPGROUP / 32
}

/// *Convergence:* the second and the third warpgroup.
#[inline(always)]
pub(super) unsafe fn consume<T: Element, const K: usize, const N: usize, const F: usize>(
    params: &AttendParams<T>,
    layout: &Layout,
) {
    let mut progress = Progress::NONE;
    loop {
        layout.item_ring.wait(progress.item());
        let item = Item::load(Item::place(layout, progress.item()));
        if item.num_rows == 0 {
            break;
        }
        attend_item::<T, K, N, F>(params, layout, &item, progress);
        layout.item_ring.release(progress.item());
        progress = progress.next(&item);
    }
}

fn rows_of<'a, T: Element>(params: &'a AttendParams<T>, item: &Item) -> QueryRows<'a, T> {
    let first_row = item.first_row + 16 * consumer_warp();
    QueryRows::new(params, item.list, item.kv_head, first_row, item.num_rows)
}

#[inline(always)]
unsafe fn attend_item<T: Element, const K: usize, const N: usize, const F: usize>(
    params: &AttendParams<T>,
    layout: &Layout,
    item: &Item,
    progress: Progress,
) {
    let rows = rows_of(params, item).in_places();
    let mut out = [Accumulator::ZERO; N];
    let mut softmax = Running::EMPTY;
    let queries = take_queries::<T, K>(params, layout, item, progress.queries());
    if item.num_tiles == 0 {
        leave_queries::<K>(layout, progress.queries());
        return rows.write(&out, &softmax);
    }
    let mut logits = [Accumulator::ZERO; F];
    layout.key_ring.wait(progress.tile(0));
    warpgroup::fence_writes();
    warpgroup::fence();
    multiply_keys::<T, K, F>(&mut logits, &queries, layout, progress.tile(0));
    warpgroup::wait::<_, 0>(Accumulator::values(&mut logits));
    layout.key_ring.release(progress.tile(0));
    if item.num_tiles == 1 {
        leave_queries::<K>(layout, progress.queries());
    }
    weigh(&rows, item.num_full == 0, 0, &mut logits, &mut softmax);
    let mut weights = pack::<T, F>(&logits);
    for tile in 1..item.num_tiles {
        // All waits come first: between products they would end them one after the other.
        let (stage, before) = (progress.tile(tile), progress.tile(tile - 1));
        layout.key_ring.wait(stage);
        let is_masked = tile > item.num_full;
        let values = take_values::<T, N, F>(&rows, layout, before, is_masked, tile - 1, &weights, &mut out);
        warpgroup::fence_writes();
        warpgroup::fence();
        multiply_keys::<T, K, F>(&mut logits, &queries, layout, stage);
        multiply_values::<T, N, F>(&mut out, &weights, values);
        warpgroup::wait::<_, 1>(Accumulator::values(&mut logits));
        layout.key_ring.release(stage);
        if tile + 1 == item.num_tiles {
            leave_queries::<K>(layout, progress.queries());
        }
        let correction = weigh(&rows, tile >= item.num_full, tile, &mut logits, &mut softmax);
        warpgroup::wait::<_, 0>(Accumulator::values(&mut out));
        layout.value_ring.release(before);
        scale(&mut out, correction);
        weights = pack::<T, F>(&logits);
    }
    let last = item.num_tiles - 1;
    let is_masked = item.num_tiles > item.num_full;
    let stage = progress.tile(last);
    let values = take_values::<T, N, F>(&rows, layout, stage, is_masked, last, &weights, &mut out);
    warpgroup::fence_writes();
    warpgroup::fence();
    multiply_values::<T, N, F>(&mut out, &weights, values);
    warpgroup::wait::<_, 0>(Accumulator::values(&mut out));
    layout.value_ring.release(stage);
    // Read again, so that no registers hold it meanwhile.
    rows_of(params, &Item::load(Item::place(layout, progress.item()))).write(&out, &softmax);
}

/// Whether registers hold the queries.
const fn keeps<const K: usize>() -> bool {
    keeps_queries((16 * K) as u32)
}

/// The warp's A fragments, rotated, if registers keep them. A warpgroup rotates its own 64 rows.
#[inline(always)]
unsafe fn take_queries<T: Element, const K: usize>(
    params: &AttendParams<T>,
    layout: &Layout,
    item: &Item,
    stage: Stage,
) -> [A; K] {
    let pitch = (16 * K) as u32 + PAD;
    if params.rope.has_units() {
        rotate_queries::<T, K>(params, layout, item, stage);
    } else {
        layout.query_ring.wait(stage);
        if params.rope.pairs > 0 || params.rotated_scale != 1.0 {
            rotate_elements_of_queries::<T, K>(params, layout, item);
        }
    }
    let mut fragments = [A([0; 4]); K];
    if keeps::<K>() {
        fragments = query_fragments(layout.queries.get().add(16 * consumer_warp() * pitch), pitch);
        layout.query_ring.release(stage);
    }
    fragments
}

/// Leaves queries that no registers have kept, behind the last product with them.
///
/// *Convergence:* all 32 lanes.
unsafe fn leave_queries<const K: usize>(layout: &Layout, stage: Stage) {
    if !keeps::<K>() {
        layout.query_ring.release(stage);
    }
}

/// Adjacent query rows that a thread rotates: they often are one token's, at one position.
const ROTATED_ROWS: u32 = 4;

/// Waits for the queries and rotates those of the warpgroup: a thread has a unit of four rows. The first angles are asked for before the
/// wait.
#[inline(always)]
unsafe fn rotate_queries<T: Element, const K: usize>(
    params: &AttendParams<T>,
    layout: &Layout,
    item: &Item,
    stage: Stage,
) {
    let units = K as u32;
    // Behind shuffles, so that no registers hold from item to item what follows from it, and the loop over rows is not unrolled.
    let own = warp::shuffle_xor(warp::FULL, thread::thread_idx_x() % WARPGROUP, 0);
    let num_rows = warp::shuffle_xor(warp::FULL, ROTATED_ROWS, 0);
    let first_row = |i: u32| WARPGROUP_ROWS * (consumer_warp() / 4) + ROTATED_ROWS * (i / units);
    let position = |row: u32| {
        let row = (item.first_row + row).min(item.num_rows - 1);
        item.list.query_position(row / params.group.max(1))
    };
    let mut at = position(first_row(own));
    let mut entries = params.rope.unit_entries(own % units, at);
    layout.query_ring.wait(stage);
    for i in strided(own, WARPGROUP_ROWS / ROTATED_ROWS * units, WARPGROUP) {
        let unit = i % units;
        if i != own {
            at = position(first_row(i));
            entries = params.rope.unit_entries(unit, at);
        }
        let mut angles = entries.angles();
        for row in first_row(i)..first_row(i) + num_rows {
            if item.first_row + row >= item.num_rows {
                break;
            }
            if position(row) != at {
                at = position(row);
                angles = params.rope.unit_entries(unit, at).angles();
            }
            let places = params.rope.unit_pieces(unit).map(|element| query_piece::<K>(layout, row, element));
            let pieces = [places[0].load().0, places[1].load().0];
            let turned = params.rope.turn_unit::<T>(unit, &angles, params.rotated_scale, pieces);
            places[0].store(V4(turned[0]));
            places[1].store(V4(turned[1]));
        }
    }
    thread::sync_named(own_barrier(), WARPGROUP);
}

/// Where eight elements of a query row lie, from `element` on.
fn query_piece<const K: usize>(layout: &Layout, row: u32, element: u32) -> Shared<V4<u32>> {
    let queries = layout.queries.get();
    if keeps::<K>() {
        return queries.add(row * ((16 * K) as u32 + PAD) + element).cast();
    }
    let line = queries.byte_add(LINE_BYTES * (QUERY_ROWS * (element / 64) + row));
    line.byte_add(16 * ((element / 8 % 8) ^ (row % 8))).cast()
}

/// The same where pairs do not lie in pieces, element by element.
unsafe fn rotate_elements_of_queries<T: Element, const K: usize>(
    params: &AttendParams<T>,
    layout: &Layout,
    item: &Item,
) {
    let pairs = (8 * K) as u32;
    let consumer = consumer_warp() / 4;
    // As in `rotate_queries`.
    let own = warp::shuffle_xor(warp::FULL, thread::thread_idx_x() % WARPGROUP, 0);
    for i in strided(own, WARPGROUP_ROWS * pairs, WARPGROUP) {
        let (row, pair) = (WARPGROUP_ROWS * consumer + i / pairs, i % pairs);
        let (x, y) = params.rope.elements(pair);
        if item.first_row + row < item.num_rows {
            let [x, y] = [x, y]
                .map(|element| query_piece::<K>(layout, row, element / 8 * 8).cast::<T>().add(element % 8));
            let (_, t) = params.query_row(&item.list, item.kv_head, item.first_row + row);
            let values = (x.load().to_f32(), y.load().to_f32());
            let values = params.rope.rotate(pair, item.list.query_position(t), values);
            x.store(T::from_f32(values.0 * params.rotated_scale));
            y.store(T::from_f32(values.1 * params.rotated_scale));
        }
    }
    thread::sync_named(own_barrier(), WARPGROUP);
}

/// Starts the products of the queries with a tile's keys. `queries` are those that registers keep.
///
/// *Convergence:* aligned; the warpgroup, behind a fence.
#[inline(always)]
unsafe fn multiply_keys<T: Element, const K: usize, const F: usize>(
    logits: &mut Logits<F>,
    queries: &[A; K],
    layout: &Layout,
    stage: Stage,
) {
    let keys = layout.keys.get().byte_add(stage.index * Layout::stage_bytes((16 * K) as u32)).cast::<T>();
    let mut warpgroup = consumer_warp() / 4;
    if !keeps::<K>() {
        // Behind a shuffle, so that no registers hold from tile to tile where the queries lie.
        warpgroup = warp::shuffle_xor(warp::FULL, warpgroup, 0);
    }
    let own_queries = layout.queries.get().byte_add(WARPGROUP_ROWS * LINE_BYTES * warpgroup).cast();
    for k in 0..K {
        let (chunk, within) = (k as u32 / 4, k as u32 % 4 * 32);
        let start = keys.byte_add(chunk * Layout::lines_bytes((16 * K) as u32) + within);
        // Dimensions are rows of B, places columns.
        let b = Columns { start, row_bytes: 0, column_bytes: 8 * LINE_BYTES, is_swizzled: true };
        let logits = Accumulator::values(logits);
        let start = own_queries.byte_add(chunk * QUERY_ROWS * LINE_BYTES + within);
        let a = Rows { start, row_bytes: 8 * LINE_BYTES };
        match (keeps::<K>(), k) {
            (true, 0) => T::mma_of_warpgroup::<_, false, false>(logits, queries[k], b),
            (true, _) => T::mma_of_warpgroup::<_, true, false>(logits, queries[k], b),
            (false, 0) => T::mma_of_warpgroup_from_shared::<_, false, false>(logits, a, b),
            (false, _) => T::mma_of_warpgroup_from_shared::<_, true, false>(logits, a, b),
        }
    }
    warpgroup::commit();
}

/// Values as a product reads them: the first line, and bytes from 16 places to the next, from eight, and from 64 dimensions.
#[derive(Clone, Copy)]
struct Values<T> {
    start: Shared<T>,
    step_bytes: u32,
    row_bytes: u32,
    column_bytes: u32,
}

/// Starts adding a tile's weighted values to the output.
///
/// *Convergence:* aligned; the warpgroup, behind a fence.
#[inline(always)]
unsafe fn multiply_values<T: Element, const N: usize, const F: usize>(
    out: &mut [Accumulator; N],
    weights: &Weights<F>,
    values: Values<T>,
) {
    let Values { row_bytes, column_bytes, .. } = values;
    for step in 0..F / 2 {
        let start = values.start.byte_add(step as u32 * values.step_bytes);
        // Places are rows of B, dimensions columns.
        let b = Columns { start, row_bytes, column_bytes, is_swizzled: true };
        T::mma_of_warpgroup::<_, true, true>(Accumulator::values(out), weights.operand(step), b);
    }
    warpgroup::commit();
}

/// Waits for a tile's values. Where some query must not multiply one of them, adds those that it sees, and returns zeros.
///
/// *Convergence:* the warpgroup.
#[inline(always)]
unsafe fn take_values<T: Element, const N: usize, const F: usize>(
    rows: &QueryRows<'_, T>,
    layout: &Layout,
    stage: Stage,
    is_masked: bool,
    tile: u32,
    weights: &Weights<F>,
    out: &mut [Accumulator; N],
) -> Values<T> {
    let stage_bytes = Layout::stage_bytes(8 * N as u32);
    let start = layout.values.get().byte_add(stage.index * stage_bytes).cast::<T>();
    layout.value_ring.wait(stage);
    if is_masked {
        let is_any_not =
            thread::sync_named_or(own_barrier(), WARPGROUP, any_not_finite_value::<T, N, F>(start));
        if is_any_not {
            add_seen(rows, tile, start, weights, out);
            let start = layout.zeros.get().cast();
            return Values { start, step_bytes: 0, row_bytes: 0, column_bytes: 0 };
        }
    }
    let column_bytes = Layout::lines_bytes(8 * N as u32);
    Values { start, step_bytes: 16 * LINE_BYTES, row_bytes: 8 * LINE_BYTES, column_bytes }
}

/// Whether one of the thread's values of a tile is infinite or NaN: a place's, or half of them.
unsafe fn any_not_finite_value<T: Element, const N: usize, const F: usize>(values: Shared<T>) -> bool {
    let (places, lines) = (8 * F as u32, Layout::lines_bytes(8 * N as u32));
    let (mut thread, parts) = (thread::thread_idx_x() % WARPGROUP, WARPGROUP / places);
    if parts > 1 {
        // As in `multiply_keys`.
        thread = warp::shuffle_xor(warp::FULL, thread, 0);
    }
    let own_pieces = N as u32 / parts;
    // Parts, where there are two, are whole lines.
    let line = values.byte_add(thread % places * LINE_BYTES + thread / places * (own_pieces / 8) * lines);
    let mut sums = [0; 4];
    for piece in 0..own_pieces {
        let at = line.byte_add(piece / 8 * lines).cast::<V4<u32>>();
        let V4(words) = at.add((piece % 8) ^ (thread % 8)).load();
        for i in 0..4 {
            sums[i] = T::add_times_zero(sums[i], words[i]);
        }
    }
    sums != [0; 4]
}

/// `out += weights * values`, one place at a time, of those that each row sees.
unsafe fn add_seen<T: Element, const N: usize, const F: usize>(
    rows: &QueryRows<'_, T>,
    tile: u32,
    values: Shared<T>,
    weights: &Weights<F>,
    out: &mut [Accumulator; N],
) {
    let Lane { g, t } = lane();
    let places = 8 * F as u32;
    for place in 0..places {
        let mut pairs = [0; 2];
        for i in 0..F {
            // Of all words but one nothing is left. (A choice among them would be a look-up in an array, in memory.)
            let own = u32::from(i as u32 == place / 8).wrapping_neg();
            pairs[0] |= weights.upper[i] & own;
            pairs[1] |= weights.lower[i] & own;
        }
        let from = 4 * g + place % 8 / 2;
        let weights = pairs.map(|pair| {
            let [even, odd] = T::unpack(warp::shuffle_idx(warp::FULL, pair, from));
            if place.is_multiple_of(2) { even } else { odd }
        });
        let line = values.byte_add(place * LINE_BYTES + 4 * t);
        for n in 0..N {
            let piece = (n % 8) as u32 ^ (place % 8);
            let at = line.byte_add(n as u32 / 8 * Layout::lines_bytes(8 * N as u32) + 16 * piece);
            let value = T::unpack(at.cast::<u32>().load());
            for i in 0..4 {
                let row = Accumulator::row_half(i);
                if places * tile + place < rows.bounds[row] {
                    out[n].0[i] += weights[row] * value[Accumulator::column_half(i)];
                }
            }
        }
    }
}

/// Turns a tile's products into weights; returns what the output is to be scaled by.
#[inline(always)]
unsafe fn weigh<T: Element, const F: usize>(
    rows: &QueryRows<'_, T>,
    is_masked: bool,
    tile: u32,
    logits: &mut Logits<F>,
    softmax: &mut Running,
) -> [f32; 2] {
    let scale_left = rows.scale_left(logits);
    if is_masked {
        rows.hide_places(logits, 8 * F as u32 * tile);
    }
    rows.weigh(scale_left, logits, softmax)
}

#[inline(always)]
fn pack<T: Element, const F: usize>(weights: &Logits<F>) -> Weights<F> {
    let mut packed = Weights { upper: [0; F], lower: [0; F] };
    for n in 0..F {
        let Accumulator(w) = weights[n];
        packed.upper[n] = T::pack(w[0], w[1]);
        packed.lower[n] = T::pack(w[2], w[3]);
    }
    packed
}
