//! `forget`: drops cached selections of one sequence that were made too late to survive a truncation.
//!
//! ```text
//! for each layer:
//!     if made_at[layer, sequence] >= from: made_at[layer, sequence] = EMPTY
//! ```
//! **Thread mapping.** A thread per layer.

use crate::launch::Dims;
use crate::simt::global::GlobalMut;

/// Threads of a block.
const THREADS: u32 = 64;

/// Parameters of [`forget`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ForgetParams {
    /// \[num_layers, num_sequences\] u32, read and written: `n - T` at each selection, or [`EMPTY`](crate::pool::EMPTY).
    pub made_at: GlobalMut<u32>,
    /// Layers.
    pub num_layers: u32,
    /// Sequences.
    pub num_sequences: u32,
    /// The sequence whose selections are dropped.
    pub sequence: u32,
    /// Selections made with at least so many tokens before the block are dropped.
    pub from: u32,
}
const _: () = assert!(size_of::<ForgetParams>() == 24);

impl ForgetParams {
    /// A thread per layer.
    pub const fn dims(&self) -> Dims {
        Dims::linear(self.num_layers.div_ceil(THREADS), THREADS, 0)
    }
}

/// See the module.
///
/// # Safety
/// - `made_at` is as [`ForgetParams`] says, and `sequence < num_sequences`.
/// - Launched with [`ForgetParams::dims`].
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub unsafe fn forget(params: ForgetParams) {
    use crate::simt::{grid, thread};

    grid::wait_for_previous();

    grid::launch_dependents();
    let layer = thread::block_idx_x() * THREADS + thread::thread_idx_x();
    if layer < params.num_layers {
        let place = layer as u64 * params.num_sequences as u64 + params.sequence as u64;
        let entry = params.made_at.add(place);
        if entry.load() >= params.from {
            entry.store(crate::pool::EMPTY);
        }
    }
}
