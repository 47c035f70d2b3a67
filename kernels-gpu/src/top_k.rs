//! `top_k`: the exact choice by vote, and the selected list around it.
//!
//! ```text
//! for each scored row:
//!     threshold, ties = the k-th largest vote, and how many of its equals are chosen
//!     chosen = { j : vote[j] > threshold } ∪ the first `ties` j with vote[j] = threshold      larger, then earlier; NaN last
//! for each row: selected = [0, candidates.begin) ∪ chosen ∪ [candidates.end, n)                    ascending
//! ```
//! Four launches, none of which waits for another's blocks:
//! 1. [`refine`], once for each digit that [`vote`](mod@crate::vote) has not counted: see [`radix`].
//! 2. [`count`]: how many votes of each block's share lie above the threshold and at it; the last block adds them up, so
//!    that each share knows how many come before it.
//! 3. [`emit`]: every token chosen finds its place from these sums and the ballots of its block. It also copies lists
//!    that are used again, fills the windows, and keeps the cached selections.
//!
//! **Bytes.** The votes, four times, which an L2 holds: `n * 16`.

use crate::launch::{Dims, GpuInfo};
use crate::layout::BatchTables;
use crate::radix::{self, RadixTables};
use crate::simt::data::V2;
use crate::simt::global::{GlobalMut, GlobalPtr};

/// Parameters of [`refine`], [`count`] and [`emit`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TopKParams {
    /// \[num_rows\] u32, read: an action of [`pool`](mod@crate::pool).
    pub actions: GlobalPtr<u32>,
    /// \[max_tokens\] f32, read for candidates of scored rows.
    pub votes: GlobalPtr<f32>,
    /// \[num_rows, num_qo_heads * head_dim\] f32, read: scoring queries, to be cached.
    pub queries: GlobalPtr<f32>,
    /// \[num_rows\] u32, read: the sequence of each row. Address 0 where nothing is cached.
    pub sequence_indices: GlobalPtr<u32>,
    /// \[num_rows, top_k\] u32, written for scored and reused rows: chosen tokens, ascending.
    pub top_k: GlobalMut<u32>,
    /// \[num_rows, max_selected\] u32, written: the lists.
    pub selected: GlobalMut<u32>,
    /// \[num_rows\] u32, written: their lengths.
    pub selected_len: GlobalMut<u32>,
    /// \[num_sequences, num_qo_heads * head_dim\] f32, written for scored rows. Address 0: nothing is cached.
    pub cached_queries: GlobalMut<f32>,
    /// \[num_sequences, top_k\] u32, written for scored rows, read for reused ones.
    pub cached_selections: GlobalMut<u32>,
    /// \[num_sequences\] u32, read and written.
    pub cached_ages: GlobalMut<u32>,
    /// \[num_sequences\] u32, written for scored rows: `n - T`.
    pub cached_made_at: GlobalMut<u32>,
    /// \[3\] u64, read and written: rows reused, scored, complete.
    pub cached_counters: GlobalMut<u64>,
    /// \[num_rows, blocks\] pairs of u32, workspace: votes above the threshold, and at it; then their sums over the
    /// shares before.
    pub counts: GlobalMut<V2<u32>>,
    /// Workspace.
    pub radix: RadixTables,
    /// Rows.
    pub batch: BatchTables,
    /// First tokens that are always selected.
    pub n_init: u32,
    /// Last tokens before the block that are always selected.
    pub n_local: u32,
    /// Tokens chosen by vote.
    pub k: u32,
    /// Width of `selected`.
    pub max_selected: u32,
    /// `num_qo_heads * head_dim`.
    pub query_len: u32,
    /// Places for tokens of all rows: no row has more.
    pub max_tokens: u32,
    /// The digit that [`refine`] finds.
    pub level: u32,
    /// 0.
    pub reserved: u32,
}
const _: () = assert!(size_of::<TopKParams>() == 216);

impl TopKParams {
    /// Shares of the candidates of each row; the same for all three kernels.
    pub const fn dims(&self, gpu: &GpuInfo) -> Dims {
        let blocks = radix::blocks_of_row(gpu, self.batch.num_rows, self.max_tokens);
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [radix::THREADS, 1, 1],
            shared_bytes: radix::LAYOUT.bytes,
        }
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use kernel::{count, emit, refine};

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod kernel {
    use super::*;
    use crate::layout::Tokens;
    use crate::pool::{COMPLETE, REUSE, SCORE, SKIP};
    use crate::radix::Histogram;
    use crate::simt::{grid, thread};

    /// Votes that a thread has under way.
    const VOTES: usize = 8;

    /// Calls `f` with the key of each vote of the block's share that this thread takes; the order does not matter.
    #[inline(always)]
    unsafe fn each_key(params: &TopKParams, row: u32, share: Tokens, mut f: impl FnMut(u32)) {
        let votes = params.votes.add(params.batch.token_base(row));
        let mut begin = share.begin + thread::thread_idx_x();
        while begin < share.end {
            let mut batch = [0.0; VOTES];
            let mut i = 0;
            while i < VOTES {
                let token = begin + i as u32 * radix::THREADS;
                if token < share.end {
                    batch[i] = votes.add(token as u64).load_cached();
                }
                i += 1;
            }
            let mut i = 0;
            while i < VOTES {
                if begin + (i as u32 * radix::THREADS) < share.end {
                    f(radix::key(batch[i]));
                }
                i += 1;
            }
            begin += VOTES as u32 * radix::THREADS;
        }
    }

    /// Finds one digit of the threshold.
    ///
    /// # Safety
    /// - The buffers and tables are as [`TopKParams`] says; digits are found in order.
    /// - Launched with [`TopKParams::dims`].
    pub unsafe fn refine(params: TopKParams) {
        grid::launch_dependents();
        grid::wait_for_previous();
        let row = thread::block_idx_y();
        if params.actions.add(row as u64).load() != SCORE {
            return;
        }
        let candidates = params.batch.candidates(row, params.n_init, params.n_local);
        let share = radix::share(candidates, thread::block_idx_x(), thread::grid_dim_x());
        let found = if params.level == 0 { 0 } else { params.radix.state.add(row as u64).load().0[0] };
        let histogram = Histogram::clear();
        each_key(&params, row, share, |key| {
            if radix::agrees(key, found, params.level) {
                histogram.count(key, params.level);
            }
        });
        histogram.finish(&params.radix, row, params.level, params.k.min(candidates.len()));
    }

    /// Counts the votes above the threshold and at it.
    ///
    /// # Safety
    /// - As for [`refine`], which has found all digits.
    /// - Launched with [`TopKParams::dims`].
    pub unsafe fn count(params: TopKParams) {
        grid::launch_dependents();
        grid::wait_for_previous();
        let row = thread::block_idx_y();
        if params.actions.add(row as u64).load() != SCORE {
            return;
        }
        let candidates = params.batch.candidates(row, params.n_init, params.n_local);
        let (block, blocks) = (thread::block_idx_x(), thread::grid_dim_x());
        let share = radix::share(candidates, block, blocks);
        let [threshold, _] = params.radix.state.add(row as u64).load().0;
        let (mut above, mut equal) = (0, 0);
        each_key(&params, row, share, |key| {
            above += (key > threshold) as u32;
            equal += (key == threshold) as u32;
        });
        let (_, above) = radix::sums_before(above);
        let (_, equal) = radix::sums_before(equal);
        let counts = params.counts.add(row as u64 * blocks as u64);
        if thread::thread_idx_x() == 0 {
            counts.add(block as u64).store(V2([above, equal]));
        }
        if grid::is_last_block(params.radix.counters.add(row as u64), blocks) {
            sum_counts(counts, blocks);
        }
    }

    /// Replaces the counts of each share by their sums over the shares before it.
    #[inline(always)]
    unsafe fn sum_counts(counts: GlobalMut<V2<u32>>, blocks: u32) {
        let (mut above, mut equal) = (0, 0);
        let mut begin = 0;
        while begin < blocks {
            let block = begin + thread::thread_idx_x();
            let own = if block < blocks { counts.add(block as u64).load().0 } else { [0, 0] };
            let (before_above, all_above) = radix::sums_before(own[0]);
            let (before_equal, all_equal) = radix::sums_before(own[1]);
            if block < blocks {
                counts.add(block as u64).store(V2([above + before_above, equal + before_equal]));
            }
            above += all_above;
            equal += all_equal;
            begin += radix::THREADS;
        }
    }

    /// A row, its cached selection, and where its lists lie.
    struct Row<'a> {
        params: &'a TopKParams,
        row: u32,
        candidates: Tokens,
        /// Its place in the cached tables, where anything is cached.
        sequence: u64,
    }

    /// Writes the lists.
    ///
    /// # Safety
    /// - As for [`refine`]; [`count`] has run.
    /// - Launched with [`TopKParams::dims`].
    pub unsafe fn emit(params: TopKParams) {
        grid::launch_dependents();
        grid::wait_for_previous();
        let row = thread::block_idx_y();
        let action = params.actions.add(row as u64).load();
        let caches = params.cached_queries.addr() != 0;
        if caches && row == 0 && thread::block_idx_x() == 0 {
            count_actions(&params);
        }
        let first_thread = thread::block_idx_x() == 0 && thread::thread_idx_x() == 0;
        if action == SKIP {
            if first_thread {
                params.selected_len.add(row as u64).store(0);
            }
            return;
        }
        let kv_len = params.batch.kv_len(row);
        // The list is too short only where a caller has changed the actions.
        let whole = kv_len.min(params.max_selected);
        let (candidates, kv_len) = if action == COMPLETE {
            (Tokens { begin: whole, end: whole }, whole)
        } else {
            (params.batch.candidates(row, params.n_init, params.n_local), kv_len)
        };
        let sequence = if caches { params.sequence_indices.add(row as u64).load_cached() } else { 0 };
        let row = Row { params: &params, row, candidates, sequence: sequence as u64 };
        let chosen = params.k.min(candidates.len());
        if first_thread {
            params
                .selected_len
                .add(row.row as u64)
                .store(candidates.begin + chosen + kv_len - candidates.end);
        }
        windows(&row, chosen, kv_len);
        if action == REUSE {
            reuse(&row, caches);
        } else if action == SCORE {
            choose(&row, caches);
            if caches {
                keep_query(&row, kv_len);
            }
        }
    }

    /// Adds what is done for all rows to the counters; run by one block.
    #[inline(always)]
    unsafe fn count_actions(params: &TopKParams) {
        let (mut reused, mut scored, mut complete) = (0, 0, 0);
        let mut row = thread::thread_idx_x();
        while row < params.batch.num_rows {
            let action = params.actions.add(row as u64).load();
            reused += (action == REUSE) as u32;
            scored += (action == SCORE) as u32;
            complete += (action == COMPLETE) as u32;
            row += radix::THREADS;
        }
        let (_, reused) = radix::sums_before(reused);
        let (_, scored) = radix::sums_before(scored);
        let (_, complete) = radix::sums_before(complete);
        if thread::thread_idx_x() == 0 {
            add_to(params.cached_counters, reused);
            add_to(params.cached_counters.add(1), scored);
            add_to(params.cached_counters.add(2), complete);
        }
    }

    #[inline(always)]
    unsafe fn add_to(counter: GlobalMut<u64>, count: u32) {
        counter.store(counter.load() + count as u64);
    }

    impl Row<'_> {
        /// Calls `f` with this thread's part of `0..len`, shared by all threads of the row.
        #[inline(always)]
        unsafe fn each(&self, len: u32, mut f: impl FnMut(u32)) {
            let mut i = thread::block_idx_x() * radix::THREADS + thread::thread_idx_x();
            while i < len {
                f(i);
                i += thread::grid_dim_x() * radix::THREADS;
            }
        }

        /// Place `i` of the row's list.
        #[inline(always)]
        fn list(&self, i: u32) -> GlobalMut<u32> {
            self.params.selected.add(self.row as u64 * self.params.max_selected as u64 + i as u64)
        }

        /// Place `i` of the row's chosen tokens.
        #[inline(always)]
        fn chosen(&self, i: u32) -> GlobalMut<u32> {
            self.params.top_k.add(self.row as u64 * self.params.k as u64 + i as u64)
        }

        /// Place `i` of the row's cached tokens.
        #[inline(always)]
        fn cached(&self, i: u32) -> GlobalMut<u32> {
            self.params.cached_selections.add(self.sequence * self.params.k as u64 + i as u64)
        }
    }

    /// The tokens before the candidates, and those behind them.
    #[inline(always)]
    unsafe fn windows(row: &Row<'_>, chosen: u32, kv_len: u32) {
        let Tokens { begin, end } = row.candidates;
        row.each(begin, |i| row.list(i).store(i));
        row.each(kv_len - end, |i| row.list(begin + chosen + i).store(end + i));
    }

    /// Takes the cached tokens again.
    #[inline(always)]
    unsafe fn reuse(row: &Row<'_>, caches: bool) {
        if !caches {
            return; // `pool` was given cached selections and `top_k` was not
        }
        row.each(row.params.k, |i| {
            let token = row.cached(i).load();
            row.chosen(i).store(token);
            row.list(row.candidates.begin + i).store(token);
        });
        if thread::block_idx_x() == 0 && thread::thread_idx_x() == 0 {
            let age = row.params.cached_ages.add(row.sequence);
            age.store(age.load() + 1);
        }
    }

    /// Keeps the query of a selection that was made anew, and when that was.
    #[inline(always)]
    unsafe fn keep_query(row: &Row<'_>, kv_len: u32) {
        let len = row.params.query_len as u64;
        row.each(row.params.query_len, |i| {
            let value = row.params.queries.add(row.row as u64 * len + i as u64).load_cached();
            row.params.cached_queries.add(row.sequence * len + i as u64).store(value);
        });
        if thread::block_idx_x() == 0 && thread::thread_idx_x() == 0 {
            row.params.cached_ages.add(row.sequence).store(0);
            let before_block = kv_len - row.params.batch.queries(row.row).len();
            row.params.cached_made_at.add(row.sequence).store(before_block);
        }
    }

    /// Writes the tokens of the block's share that are chosen, a tile of as many tokens as there are threads at a time.
    #[inline(always)]
    unsafe fn choose(row: &Row<'_>, caches: bool) {
        let params = row.params;
        let (block, blocks) = (thread::block_idx_x(), thread::grid_dim_x());
        let share = radix::share(row.candidates, block, blocks);
        let [threshold, ties] = params.radix.state.add(row.row as u64).load().0;
        let [mut above, mut equal] =
            params.counts.add(row.row as u64 * blocks as u64 + block as u64).load().0;
        let votes = params.votes.add(params.batch.token_base(row.row));
        let mut begin = share.begin;
        while begin < share.end {
            let token = begin + thread::thread_idx_x();
            let key = if token < share.end { radix::key(votes.add(token as u64).load_cached()) } else { 0 };
            let is_above = token < share.end && key > threshold;
            let is_equal = token < share.end && key == threshold;
            // A block has at most THREADS of either, so one sum carries both.
            let (before, all) = radix::sums_before(is_above as u32 | (is_equal as u32) << 16);
            let (before_above, before_equal) = (above + (before & 0xffff), equal + (before >> 16));
            if is_above || (is_equal && before_equal < ties) {
                let place = before_above + before_equal.min(ties);
                row.list(row.candidates.begin + place).store(token);
                row.chosen(place).store(token);
                if caches {
                    row.cached(place).store(token);
                }
            }
            above += all & 0xffff;
            equal += all >> 16;
            begin += radix::THREADS;
        }
    }
}
