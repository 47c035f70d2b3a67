//! The kernel.

use super::params::*;
use crate::ops::pool::EMPTY;
use crate::simt::{grid, thread};

/// See the module.
///
/// # Safety
/// - `made_at` is as [`ForgetParams`] says, and `sequence < num_sequences`.
/// - Launched with [`ForgetParams::dims`].
pub unsafe fn forget(params: ForgetParams) {
    grid::wait_for_previous();
    grid::launch_dependents();
    let layer = thread::block_idx_x() * THREADS + thread::thread_idx_x();
    if layer < params.num_layers {
        let index = layer as u64 * params.num_sequences as u64 + params.sequence as u64;
        let entry = params.made_at.add(index);
        if entry.load() >= params.from {
            entry.store(EMPTY);
        }
    }
}
