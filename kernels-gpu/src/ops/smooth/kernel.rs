//! The kernel.

use super::params::*;
use crate::common::block::strided;
use crate::common::radix;
use crate::ops::pool::SCORE;
use crate::simt::{grid, thread};

/// See the module.
///
/// # Safety
/// - The buffers and tables are as [`SmoothParams`] says.
/// - Launched with [`SmoothParams::dims`].
pub unsafe fn smooth(params: SmoothParams) {
    grid::wait_for_previous();
    grid::launch_dependents();
    let row = thread::block_idx_y();
    if params.actions.add(row as u64).load() != SCORE {
        return;
    }
    let candidates = params.batch.candidates(row, params.n_init, params.n_local);
    let share = radix::share(candidates, thread::block_idx_x(), thread::grid_dim_x());
    let votes = params.votes.add(params.batch.token_base(row));
    let reach = params.window / 2;
    for token in strided(share.begin + thread::thread_idx_x(), share.end, radix::THREADS) {
        let from = token.saturating_sub(reach).max(candidates.begin);
        let to = (token + reach + 1).min(candidates.end);
        let mut largest = f32::NEG_INFINITY;
        for other in from..to {
            largest = largest.max(votes.add(other as u64).load()); // passes over NaN
        }
        let own = votes.add(token as u64).load();
        let pooled = if own.is_nan() { own } else { largest };
        params.pooled.add(params.batch.token_base(row) + token as u64).store(pooled);
    }
}
