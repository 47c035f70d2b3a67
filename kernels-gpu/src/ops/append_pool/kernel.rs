//! The kernel: one block of a row pools, the others append.

use super::params::*;
use crate::common::element::Element;
use crate::common::layout::Tokens;
use crate::common::rope::{HALF_SPLIT, TwoEntries};
use crate::ops::append::AppendParams;
use crate::ops::pool::kernel::{Cached, cached_entry, conclude};
use crate::ops::pool::{EMPTY, PoolParams};
use crate::simt::data::V2;
use crate::simt::{grid, thread, warp};

/// See the module.
///
/// # Safety
/// - The rules of [`append`](fn@crate::ops::append::kernel::append) and [`pool`](fn@crate::ops::pool::kernel::pool) hold but for their launches,
///   and both have the same batch.
/// - [`AppendPoolParams::fits`], and no block is longer than `max_block_len`.
/// - Launched with [`AppendPoolParams::dims`].
pub unsafe fn append_pool<T: Element>(params: AppendPoolParams<T>) {
    thread::launch_bounds::<MAX_THREADS, 1>();
    grid::wait_for_previous();
    grid::launch_dependents();
    let row = thread::block_idx_y();
    if thread::block_idx_x() == 0 {
        pool_row(&params.pool, row);
    } else {
        let before = (thread::block_idx_x() - 1) * thread::block_dim_x();
        append_piece(&params.append, row, before + thread::thread_idx_x());
    }
}

/// Copies piece `index` of the row's block.
unsafe fn append_piece(params: &AppendParams, row: u32, index: u32) {
    let pieces = params.pieces();
    core::hint::assert_unchecked(pieces != 0);
    let (t, piece) = (index / pieces, index % pieces);
    let row = params.batch.row(row);
    let query = row.queries.begin + t;
    if query >= row.queries.end {
        return;
    }
    if let Some(slot) = params.slot(row, query) {
        params.copy_piece(query, piece, slot);
    }
}

/// The whole of `pool` for a row.
unsafe fn pool_row<T: Element>(params: &PoolParams<T>, row: u32) {
    let tables = params.batch.row(row);
    let entry = cached_entry(params, row, tables.kv_len);
    let mut cached = Cached::NONE;
    let [dot, own, other] = sum_of_block(products(params, row, tables.queries, entry, &mut cached));
    if warp::warp_id() == 0 {
        conclude(params, row, &tables, &cached, (dot, own, other));
    }
}

/// What a thread loads of a token.
#[derive(Clone, Copy)]
struct Token {
    /// Two elements each.
    q: [[u32; 2]; HEADS as usize],
    entries: TwoEntries,
}

impl Token {
    const ZERO: Token = Token { q: [[0; 2]; HEADS as usize], entries: TwoEntries::ZERO };
}

/// Two pairs of a head: four elements, two by two.
#[derive(Clone, Copy)]
struct Unit {
    /// The first pair, even.
    pair: u32,
    /// First of either two elements.
    at: [u32; 2],
    /// Whether a pair has an element of either two; else each two are a pair.
    is_split: bool,
}

impl Unit {
    fn new<T>(params: &PoolParams<T>, pair: u32) -> Self {
        let is_split = params.rope.pairing == HALF_SPLIT && pair < params.rope.pairs;
        let at = if is_split { [pair, pair + params.rope.pairs] } else { [2 * pair, 2 * pair + 2] };
        Unit { pair, at, is_split }
    }

    /// Values in the order of their elements, brought to the order of pairs, or back.
    fn swap(self, [[a, b], [c, d]]: [[f32; 2]; 2]) -> [[f32; 2]; 2] {
        if self.is_split { [[a, c], [b, d]] } else { [[a, b], [c, d]] }
    }
}

/// Writes the thread's elements of the mean. Its products: mean times cached, mean squared, cached squared.
unsafe fn products<T: Element>(
    params: &PoolParams<T>,
    row: u32,
    queries: Tokens,
    entry: u32,
    cached: &mut Cached,
) -> [f32; 3] {
    let units = params.head_dim / 4;
    core::hint::assert_unchecked(units != 0);
    let unit = Unit::new(params, 2 * (thread::thread_idx_x() % units));
    let (first, step) = (thread::thread_idx_x() / units, params.num_qo_heads.div_ceil(HEADS));
    let head = |h: usize| first + h as u32 * step;
    let has = |h: usize| first < step && head(h) < params.num_qo_heads;
    let at = |h: usize, i: usize| (head(h) * params.head_dim + unit.at[i]) as u64;
    let width = params.num_qo_heads as u64 * params.head_dim as u64;
    let load = |t: u32| {
        let mut token = Token::ZERO;
        let q = params.q.add((queries.begin + t) as u64 * params.q_stride.token as u64);
        for h in 0..HEADS as usize {
            if has(h) {
                token.q[h] = [0, 1].map(|i| q.add(at(h, i)).cast::<u32>().load_constant_once());
            }
        }
        if params.rope.coarse.addr() != 0 {
            let pair = unit.pair.min(params.rope.pairs - 2);
            token.entries = params.rope.two_entries(pair, params.n_local + t);
        }
        token
    };
    // Loaded before anything is used: two tokens, the cached query and what is known of it.
    let mut ahead = [Token::ZERO; 2];
    for t in 0..2 {
        if (t as u32) < queries.len() {
            ahead[t] = load(t as u32);
        }
    }
    let mut olds = [[V2([0.0f32; 2]); 2]; HEADS as usize];
    if entry != EMPTY {
        let old = params.cached_queries.add(entry as u64 * width);
        for h in 0..HEADS as usize {
            if has(h) {
                olds[h] = [0, 1].map(|i| old.add(at(h, i)).cast::<V2<f32>>().load());
            }
        }
        *cached = Cached::load(params, entry);
    }
    let mut means = [[[0.0f32; 2]; 2]; HEADS as usize];
    for t in 0..MAX_BLOCK_LEN {
        if t < queries.len() {
            let token = ahead[t as usize % 2];
            let angles = token.entries.angles();
            for h in 0..HEADS as usize {
                let pairs = unit.swap(token.q[h].map(T::unpack));
                for i in 0..2 {
                    let (mut x, mut y) = (pairs[i][0], pairs[i][1]);
                    if unit.pair < params.rope.pairs {
                        (x, y) = angles[i].turn((x, y));
                    }
                    means[h][i][0] += x;
                    means[h][i][1] += y;
                }
            }
            if t + 2 < queries.len() {
                ahead[t as usize % 2] = load(t + 2);
            }
        }
    }
    let scale = 1.0 / queries.len().max(1) as f32;
    let out = params.queries.add(row as u64 * width);
    let mut products = [0.0; 3];
    for h in 0..HEADS as usize {
        if has(h) {
            let mean = unit.swap(means[h]);
            for i in 0..2 {
                let (mean, old) = ([mean[i][0] * scale, mean[i][1] * scale], olds[h][i].0);
                out.add(at(h, i)).cast::<V2<f32>>().store(V2(mean));
                products[0] += mean[0] * old[0] + mean[1] * old[1];
                products[1] += mean[0] * mean[0] + mean[1] * mean[1];
                products[2] += old[0] * old[0] + old[1] * old[1];
            }
        }
    }
    products
}

/// The sums over the block, lanes first, then warps; valid in warp 0.
unsafe fn sum_of_block(own: [f32; 3]) -> [f32; 3] {
    let products = LAYOUT.products.get();
    let (warp_id, lane) = (thread::thread_idx_x() / warp::SIZE, warp::lane_id());
    for i in 0..3 {
        let sum = warp::reduce_add_f32(own[i]);
        if lane == 0 {
            products.add(i as u32 * MAX_WARPS + warp_id).store(sum);
        }
    }
    thread::sync_threads();
    let mut sums = [0.0; 3];
    if warp_id == 0 {
        let has_warp = lane < thread::block_dim_x() / warp::SIZE;
        for i in 0..3 {
            let of_warp = if has_warp { products.add(i as u32 * MAX_WARPS + lane).load() } else { 0.0 };
            sums[i] = warp::reduce_add_f32(of_warp);
        }
    }
    sums
}
