//! The kernel.

use super::params::*;
use crate::ops::pool::kernel::Cached;
use crate::simt::{grid, math, thread};

/// See the module.
///
/// # Safety
/// - The buffers and tables are as [`DecideParams`] says.
/// - Launched with [`DecideParams::dims`].
pub unsafe fn decide(params: DecideParams) {
    grid::wait_for_previous();
    grid::launch_dependents();
    let row = thread::block_idx_x() * THREADS + thread::thread_idx_x();
    if row >= params.batch.num_rows {
        return;
    }
    let tables = params.batch.row(row);
    let rules = &params.rules;
    let cached = Cached::load(&params.cached, rules.top_k, params.cached.entry(row, tables.kv_len));
    let candidates = params.batch.candidates_of(row, &tables, rules.n_init, rules.n_local);
    let is_partial = params.batch.is_partial();
    let cosine = || cosine(&params, row);
    let (similarity, action) = rules.decide(&tables, candidates, is_partial, &cached, cosine);
    params.similarities.add(row as u64).store(similarity);
    params.actions.add(row as u64).store(action);
}

/// The cosine that the row's products make. NaN for a zero vector.
unsafe fn cosine(params: &DecideParams, row: u32) -> f32 {
    let products = params.products.add(row as u64 * 3);
    let (dot, own, other) = (products.load(), products.add(1).load(), products.add(2).load());
    (dot / (math::sqrt_f64(own) * math::sqrt_f64(other))) as f32
}
