//! The kernel.

use super::params::*;
use crate::common::block::strided;
use crate::ops::pool::kernel::Cached;
use crate::simt::data::V4;
use crate::simt::{grid, thread, warp};

/// See the module.
///
/// # Safety
/// - The buffers and tables are as [`CompareParams`] says; queries, cached ones too, are 16-byte aligned.
/// - Launched with [`CompareParams::dims`].
pub unsafe fn compare(params: CompareParams) {
    grid::wait_for_previous();
    grid::launch_dependents();
    let row = thread::block_idx_x();
    let tables = params.batch.row(row);
    let rules = &params.rules;
    let cached = Cached::load(&params.cached, rules.top_k, params.cached.entry(row, tables.kv_len));
    let candidates = params.batch.candidates_of(row, &tables, rules.n_init, rules.n_local);
    let mut sums = [0.0; 3];
    if cached.is_usable(&tables, candidates) {
        sums = sums_of_block(products(&params, row, cached.entry));
    }
    if thread::thread_idx_x() == 0 {
        for i in 0..3 {
            params.products.add(row as u64 * 3 + i as u64).store(sums[i]);
        }
    }
}

/// The thread's share of the products.
unsafe fn products(params: &CompareParams, row: u32, entry: u32) -> [f64; 3] {
    let query = params.queries.add(row as u64 * params.query_len as u64).cast::<V4<f32>>();
    let cached = params.cached.queries.add(entry as u64 * params.query_len as u64).cast::<V4<f32>>();
    let mut sums = [0.0; 3];
    for quad in strided(thread::thread_idx_x(), params.query_len / 4, THREADS) {
        let (own, other) = (query.add(quad as u64).load().0, cached.add(quad as u64).load().0);
        for i in 0..4 {
            let (x, y) = (own[i] as f64, other[i] as f64);
            sums[0] += x * y;
            sums[1] += x * x;
            sums[2] += y * y;
        }
    }
    sums
}

/// The sums over the block, lanes first, then warps in order; valid in thread 0.
unsafe fn sums_of_block(own: [f64; 3]) -> [f64; 3] {
    let scratch = LAYOUT.sums.get();
    for i in 0..3 {
        let sum = warp::reduce_add_f64(own[i]);
        if warp::lane_id() == 0 {
            scratch.add(warp::warp_id() * 3 + i as u32).store(sum);
        }
    }
    thread::sync_threads();
    let mut sums = [0.0; 3];
    if thread::thread_idx_x() == 0 {
        for w in 0..THREADS / warp::SIZE {
            for i in 0..3 {
                sums[i] += scratch.add(w * 3 + i as u32).load();
            }
        }
    }
    sums
}
