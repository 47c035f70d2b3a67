//! `smooth`: max-pool of the votes.
//!
//! ```text
//! for each scored row, candidate j:
//!     pooled[j] = largest vote that is a number within window / 2 places of j;  NaN where vote[j] is NaN
//! ```
//! **Thread mapping.** A thread per candidate; neighbours read the same places, which the L1 holds. The cost is
//! `n * window` loads: windows are a handful of tokens.

use crate::launch::{Dims, GpuInfo};
use crate::layout::BatchTables;
use crate::radix;
use crate::simt::global::{GlobalMut, GlobalPtr};

/// Parameters of [`smooth`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct SmoothParams {
    /// \[num_rows\] u32, read: rows with [`SCORE`](crate::pool::SCORE) are smoothed.
    pub actions: GlobalPtr<u32>,
    /// \[max_tokens\] f32, read for candidates.
    pub votes: GlobalPtr<f32>,
    /// \[max_tokens\] f32, written for candidates.
    pub pooled: GlobalMut<f32>,
    /// Rows.
    pub batch: BatchTables,
    /// First tokens that are always selected.
    pub n_init: u32,
    /// Last tokens before the block that are always selected.
    pub n_local: u32,
    /// Places of the window, odd.
    pub window: u32,
    /// Places for tokens of all rows: no row has more.
    pub max_tokens: u32,
}
const _: () = assert!(size_of::<SmoothParams>() == 96);

impl SmoothParams {
    /// Shares of the candidates of each row.
    pub const fn dims(&self, gpu: &GpuInfo) -> Dims {
        let blocks = radix::blocks_of_row(gpu, self.batch.num_rows, self.max_tokens);
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [radix::THREADS, 1, 1],
            shared_bytes: 0,
            cluster: 1,
        }
    }
}

/// See the module.
///
/// # Safety
/// - The buffers and tables are as [`SmoothParams`] says.
/// - Launched with [`SmoothParams::dims`].
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub unsafe fn smooth(params: SmoothParams) {
    use crate::simt::{grid, thread};

    grid::wait_for_previous();

    grid::launch_dependents();
    let row = thread::block_idx_y();
    if params.actions.add(row as u64).load() != crate::pool::SCORE {
        return;
    }
    let candidates = params.batch.candidates(row, params.n_init, params.n_local);
    let share = radix::share(candidates, thread::block_idx_x(), thread::grid_dim_x());
    let votes = params.votes.add(params.batch.token_base(row));
    let reach = params.window / 2;
    let mut token = share.begin + thread::thread_idx_x();
    while token < share.end {
        let from = token.saturating_sub(reach).max(candidates.begin);
        let to = (token + reach + 1).min(candidates.end);
        let mut largest = f32::NEG_INFINITY;
        let mut other = from;
        while other < to {
            largest = largest.max(votes.add(other as u64).load_cached()); // passes over NaN
            other += 1;
        }
        let own = votes.add(token as u64).load_cached();
        let pooled = if own.is_nan() { own } else { largest };
        params.pooled.add(params.batch.token_base(row) + token as u64).store(pooled);
        token += radix::THREADS;
    }
}
