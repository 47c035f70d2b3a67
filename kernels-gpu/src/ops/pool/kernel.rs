//! The kernel, and its steps, which `append_pool` takes too.

mod reuse;

pub(crate) use self::reuse::Cached;
use super::params::*;
use crate::common::block::strided;
use crate::common::element::Element;
use crate::common::layout::{Row, Tokens};
use crate::common::rope::{self, UNIT};
use crate::common::words::load_row;
use crate::simt::data::V4;
use crate::simt::shared::Shared;
use crate::simt::{grid, math, thread, warp};

/// See the module.
///
/// # Safety
/// - The buffers and tables are as [`PoolParams`] says.
/// - The rope tables cover `n_local` plus the longest block.
/// - Launched with [`PoolParams::dims`].
pub unsafe fn pool<T: Element>(params: PoolParams<T>) {
    thread::launch_bounds::<THREADS, 2>();
    if !params.overlap.waits_last() {
        grid::wait_for_previous();
    }
    grid::launch_dependents();
    let (head, row) = (thread::block_idx_x(), thread::block_idx_y());
    let tables = params.batch.row(row);
    let cached = load_cached(&params, cached_entry(&params, row, tables.kv_len));
    let sums = LAYOUT.sums.get();
    mean_query(&params, head, row, sums);
    thread::sync_threads();
    let (dot, own, other) = products(&params, head, cached.entry, sums);
    let partial = params.partial.add((row as u64 * params.num_qo_heads as u64 + head as u64) * 3);
    if thread::thread_idx_x() == 0 {
        partial.store(dot);
        partial.add(1).store(own);
        partial.add(2).store(other);
    }
    if grid::is_last_block(params.counters.add(row as u64), params.num_qo_heads) && warp::warp_id() == 0 {
        conclude(&params, row, &tables, &cached, sums_of_heads(&params, row));
    }
    if params.overlap.waits_last() {
        grid::wait_for_previous(); // the end of this launch says that the appended keys are there
    }
}

/// The row's entry in the cached tables; [`EMPTY`] for none.
pub(crate) unsafe fn cached_entry<T: Element>(params: &PoolParams<T>, row: u32, kv_len: u32) -> u32 {
    params.cached().entry(row, kv_len)
}

/// What is known of the cached selection at an entry.
pub(crate) unsafe fn load_cached<T: Element>(params: &PoolParams<T>, entry: u32) -> Cached {
    Cached::load(&params.cached(), params.top_k, entry)
}

/// Writes the mean of the rotated queries to `queries` and to the first `head_dim` of `sums`.
unsafe fn mean_query<T: Element>(params: &PoolParams<T>, head: u32, row: u32, sums: Shared<f32>) {
    let queries = params.batch.queries(row);
    let units = params.head_dim / UNIT;
    let turns = if units * UNIT != params.head_dim {
        sum_of_pairs(params, head, queries, sums)
    } else if params.rope.pairs == 0 {
        sum_of_units::<T, 8, false>(params, head, queries, units.max(1), sums)
    } else if params.rope.has_units() {
        // Angles take registers.
        sum_of_units::<T, 4, true>(params, head, queries, units.max(1), sums)
    } else {
        sum_of_pairs(params, head, queries, sums)
    };
    thread::sync_threads();
    let (element, mut sum) = (thread::thread_idx_x(), 0.0);
    if element < params.head_dim {
        for turn in 0..turns {
            sum += sums.add(turn * params.head_dim + element).load();
        }
    }
    thread::sync_threads();
    if element < params.head_dim {
        // As `append_pool` does.
        let mean = sum * (1.0 / queries.len().max(1) as f32);
        sums.add(element).store(mean);
        let out = (row as u64 * params.num_qo_heads as u64 + head as u64) * params.head_dim as u64;
        params.queries.add(out + element as u64).store(mean);
    }
}

/// Sums of every `turns`-th query, for each of the turns: `sums[turn, element]`. Threads take a [unit](crate::common::rope) of a query each;
/// returns `turns`. A thread has `BATCH` queries in flight.
unsafe fn sum_of_units<T: Element, const BATCH: usize, const ROTATES: bool>(
    params: &PoolParams<T>,
    head: u32,
    queries: Tokens,
    units: u32,
    sums: Shared<f32>,
) -> u32 {
    let turns = THREADS / units;
    let (unit, turn) = (thread::thread_idx_x() % units, thread::thread_idx_x() / units);
    if turn >= turns {
        return turns;
    }
    let rope = &params.rope;
    let elements = rope.unit_pieces(unit);
    let mut sum = [[0.0; 8]; 2];
    for first in strided(turn, queries.len(), turns * BATCH as u32) {
        let mut pieces = [[[0; 4]; 2]; BATCH];
        for b in 0..BATCH {
            let t = (first + b as u32 * turns).min(queries.len() - 1);
            let at = params.q.add(params.q_stride.offset(queries.begin + t, head));
            pieces[b] = elements.map(|element| load_row(at.add(element as u64)));
        }
        for b in 0..BATCH {
            let t = first + b as u32 * turns;
            if t < queries.len() {
                let values = if ROTATES {
                    let angles = rope.unit_entries(unit, params.n_local + t).angles();
                    rope.turned_values::<T>(unit, &angles, pieces[b])
                } else {
                    rope::values::<T>(pieces[b])
                };
                for piece in 0..2 {
                    for i in 0..8 {
                        sum[piece][i] += values[piece][i];
                    }
                }
            }
        }
    }
    for piece in 0..2 {
        let to = sums.add(turn * params.head_dim + elements[piece]).cast::<V4<f32>>();
        let [x, y, z, w, rest @ ..] = sum[piece];
        to.store(V4([x, y, z, w]));
        to.add(1).store(V4(rest));
    }
    turns
}

/// As [`sum_of_units`], a pair of elements that RoPE may rotate together a thread.
unsafe fn sum_of_pairs<T: Element>(
    params: &PoolParams<T>,
    head: u32,
    queries: Tokens,
    sums: Shared<f32>,
) -> u32 {
    let pairs = params.head_dim / 2;
    core::hint::assert_unchecked(pairs != 0);
    let turns = THREADS / pairs;
    let (pair, turn) = (thread::thread_idx_x() % pairs, thread::thread_idx_x() / pairs);
    if turn >= turns {
        return turns;
    }
    let (i, j) = params.rope.elements(pair);
    let (mut sum_x, mut sum_y) = (0.0, 0.0);
    for t in strided(turn, queries.len(), turns) {
        let at = params.q.add(params.q_stride.offset(queries.begin + t, head));
        let x = at.add(i as u64).load_constant_once().to_f32();
        let y = at.add(j as u64).load_constant_once().to_f32();
        let (x, y) = params.rope.rotate(pair, params.n_local + t, (x, y));
        sum_x += x;
        sum_y += y;
    }
    sums.add(turn * params.head_dim + i).store(sum_x);
    sums.add(turn * params.head_dim + j).store(sum_y);
    turns
}

/// Sums over the head of mean times cached, mean squared and cached squared; valid in thread 0.
unsafe fn products<T: Element>(
    params: &PoolParams<T>,
    head: u32,
    entry: u32,
    sums: Shared<f32>,
) -> (f32, f32, f32) {
    let i = thread::thread_idx_x();
    let (mut x, mut y) = (0.0, 0.0);
    if i < params.head_dim {
        x = sums.add(i).load();
        if entry != EMPTY {
            let width = params.num_qo_heads as u64 * params.head_dim as u64;
            let at = entry as u64 * width + (head * params.head_dim + i) as u64;
            y = params.cached_queries.add(at).load();
        }
    }
    let (dot, own, other) =
        (warp::reduce_add_f32(x * y), warp::reduce_add_f32(x * x), warp::reduce_add_f32(y * y));
    thread::sync_threads();
    if warp::lane_id() == 0 {
        let scratch = sums.add(3 * warp::warp_id());
        scratch.store(dot);
        scratch.add(1).store(own);
        scratch.add(2).store(other);
    }
    thread::sync_threads();
    let mut total = (0.0, 0.0, 0.0);
    if i == 0 {
        for w in 0..THREADS / warp::SIZE {
            let scratch = sums.add(3 * w);
            total.0 += scratch.load();
            total.1 += scratch.add(1).load();
            total.2 += scratch.add(2).load();
        }
    }
    total
}

/// The products of all heads, which are added in order.
///
/// *Convergence:* aligned; all 32 lanes.
unsafe fn sums_of_heads<T: Element>(params: &PoolParams<T>, row: u32) -> (f32, f32, f32) {
    let (mut dot, mut own, mut other) = (0.0, 0.0, 0.0);
    for first in strided(0, params.num_qo_heads, warp::SIZE) {
        // A head a lane: all are asked for at once.
        let head = (first + warp::lane_id()).min(params.num_qo_heads - 1);
        let partial = params.partial.add((row as u64 * params.num_qo_heads as u64 + head as u64) * 3);
        let of_lane = [partial.load(), partial.add(1).load(), partial.add(2).load()];
        for lane in 0..warp::SIZE.min(params.num_qo_heads - first) {
            let of_head = of_lane.map(|sum| warp::shuffle_idx(warp::FULL, sum, lane));
            dot += of_head[0];
            own += of_head[1];
            other += of_head[2];
        }
    }
    (dot, own, other)
}

/// Sums of squares that are less, or infinite, may have lost what counts of their terms.
const LEAST: f32 = 1.0 / (1u128 << 90) as f32;

/// The cosine of the row's scoring query and the cached one, of whose products these are the sums: mean times cached, mean squared,
/// cached squared. NaN for a zero vector.
///
/// # Safety
/// - All lanes of a warp call it, with the same values; the row's scoring query has been written, and that is visible.
unsafe fn cosine<T: Element>(params: &PoolParams<T>, row: u32, entry: u32, sums: (f32, f32, f32)) -> f32 {
    let leaves_range = |sum: f32| sum < LEAST || sum == f32::INFINITY;
    let (_, own, other) = sums;
    let far = leaves_range(own) || leaves_range(other);
    let (dot, own, other) = if far { scaled_products(params, row, entry) } else { sums };
    dot / (math::sqrt(own) * math::sqrt(other))
}

/// The sums of products anew, of vectors scaled by powers of two that bring their largest elements to about 1. For the rare query
/// whose squares leave the range of f32.
unsafe fn scaled_products<T: Element>(params: &PoolParams<T>, row: u32, entry: u32) -> (f32, f32, f32) {
    let width = params.num_qo_heads * params.head_dim;
    let own = params.queries.add(row as u64 * width as u64);
    let other = params.cached_queries.add(entry as u64 * width as u64);
    // Bits of absolute values are ordered as the values are.
    let bits = |x: f32| x.abs().to_bits();
    let mut largest = [0; 2];
    for i in strided(warp::lane_id(), width, warp::SIZE) {
        largest[0] = largest[0].max(bits(own.add(i as u64).load()));
        largest[1] = largest[1].max(bits(other.add(i as u64).load()));
    }
    let scale = |bits: u32| f32::from_bits((254 - (bits >> 23).min(253)) << 23);
    let scales =
        [scale(warp::reduce_max(warp::FULL, largest[0])), scale(warp::reduce_max(warp::FULL, largest[1]))];
    let mut sums = (0.0, 0.0, 0.0);
    for i in strided(warp::lane_id(), width, warp::SIZE) {
        let x = own.add(i as u64).load() * scales[0];
        let y = other.add(i as u64).load() * scales[1];
        sums.0 += x * y;
        sums.1 += x * x;
        sums.2 += y * y;
    }
    (warp::reduce_add_f32(sums.0), warp::reduce_add_f32(sums.1), warp::reduce_add_f32(sums.2))
}

/// Writes the similarity, and the action that follows.
///
/// # Safety
/// - As for [`cosine`].
pub(crate) unsafe fn conclude<T: Element>(
    params: &PoolParams<T>,
    row: u32,
    tables: &Row,
    cached: &Cached,
    sums: (f32, f32, f32),
) {
    let candidates = params.batch.candidates_of(row, tables, params.n_init, params.n_local);
    let is_partial = params.batch.is_partial();
    let (similarity, action) = params
        .rules()
        .decide(tables, candidates, is_partial, cached, || cosine(params, row, cached.entry, sums));
    if warp::lane_id() == 0 {
        params.similarities.add(row as u64).store(similarity);
        params.actions.add(row as u64).store(action);
    }
}
