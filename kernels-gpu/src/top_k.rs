//! `top_k`: the exact choice by vote, and the selected list around it.
//!
//! ```text
//! for each scored row:
//!     threshold, ties = the k-th largest vote, and how many of its equals are chosen
//!     chosen = { j : vote[j] > threshold } ∪ the first `ties` j with vote[j] = threshold      larger, then earlier; NaN last
//! for each row: selected = [0, candidates.begin) ∪ chosen ∪ [candidates.end, n)                    ascending
//! ```
//! Three launches, none of which waits for another's blocks; the first only where [`vote`](mod@crate::vote) has not just done
//! the same:
//! 1. [`count`]: the bin in which the threshold lies, see [`radix`].
//! 2. [`refine`]: where that bin has many keys, the part of it.
//! 3. [`choose`]: each block writes down the *contenders* of its share, in order: the tokens in that bin, or part, or above.
//!    The last block of a row finds the threshold among those in the bin, and gives each token chosen its place.
//!    Contenders are `k` and a few more, and fit in shared memory; where votes tie by the thousands they pass through it
//!    window by window, as often as it takes. All blocks together fill the windows, copy lists that are used again, and
//!    keep the cached selections.
//!
//! **Bytes.** The votes, once or twice, which an L2 holds: `n * 4`.

use crate::launch::{Dims, GpuInfo};
use crate::layout::BatchTables;
use crate::radix::{self, RadixTables};
use crate::simt::data::V2;
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Parameters of [`count`], [`refine`] and [`choose`].
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
    /// \[shares of all rows\] u32, workspace: contenders of each share; see [`max_shares`].
    pub counts: GlobalMut<u32>,
    /// \[max_tokens\] pairs of u32, workspace: key and token of each share's contenders, ascending.
    pub contenders: GlobalMut<V2<u32>>,
    /// Workspace: [`vote`](mod@crate::vote) or [`count`] has written the state.
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
}
const _: () = assert!(size_of::<TopKParams>() == 216);

/// Threads of a block of [`choose`].
const THREADS: u32 = 512;
/// Tokens of a share: eight a thread.
const SHARE: u32 = 8 * THREADS;
/// Contenders in shared memory at a time; no fewer than a share may have.
const WINDOW: u32 = 2 * SHARE;

/// Keys of a bin from which on it is refined: with fewer, its contenders fit in a window beside any usual `k`.
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
const MANY: u32 = SHARE;

/// Shares that `num_rows` rows with `num_places` places for tokens may have.
pub const fn max_shares(num_places: u64, num_rows: u64) -> u64 {
    num_places / SHARE as u64 + 2 * num_rows + 1
}

/// Shared memory of a block of [`choose`].
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct Layout {
    /// Contenders of the window.
    keys: Region<u32>,
    tokens: Region<u32>,
    /// Where the contenders of each share of a round begin.
    begins: Region<u32>,
    histogram: Region<u32>,
    warps: Region<u32>,
    /// What one thread has found for all.
    found: Region<u32>,
    bytes: u32,
}

const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout {
        keys: carve.array(WINDOW, 16),
        tokens: carve.array(WINDOW, 16),
        begins: carve.array(THREADS + 1, 16),
        histogram: carve.array(radix::BINS, 16),
        warps: carve.array(THREADS / 32, 16),
        found: carve.array(2, 16),
        bytes: carve.bytes(),
    }
};

impl TopKParams {
    /// Launch dimensions of [`choose`]: a block for each share that the longest row may have.
    pub const fn choose_dims(&self) -> Dims {
        let blocks = self.max_tokens.div_ceil(SHARE) + 1;
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [THREADS, 1, 1],
            shared_bytes: LAYOUT.bytes,
            cluster: 1,
        }
    }

    /// Launch dimensions of [`count`] and [`refine`]: shares of the candidates of each row.
    pub const fn count_dims(&self, gpu: &GpuInfo) -> Dims {
        let blocks = radix::blocks_of_row(gpu, self.batch.num_rows, self.max_tokens);
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [radix::THREADS, 1, 1],
            shared_bytes: radix::LAYOUT.bytes,
            cluster: 1,
        }
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use kernel::{choose, count, refine};

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod kernel {
    use super::*;
    use crate::layout::{LOGIT_TILE, Tokens};
    use crate::pool::{COMPLETE, REUSE, SCORE, SKIP};
    use crate::radix::{Histogram, Keys};
    use crate::simt::shared::Shared;
    use crate::simt::{grid, thread, warp};

    /// Calls `f` with the key of each vote of the block's share that this thread takes; the order does not matter.
    #[inline(always)]
    unsafe fn each_key(params: &TopKParams, row: u32, candidates: Tokens, mut f: impl FnMut(u32)) {
        /// Votes that a thread has under way.
        const VOTES: usize = 8;

        let share = radix::share(candidates, thread::block_idx_x(), thread::grid_dim_x());
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

    /// Finds the bin of the threshold.
    ///
    /// # Safety
    /// - The buffers and tables are as [`TopKParams`] says.
    /// - Launched with [`TopKParams::count_dims`].
    pub unsafe fn count(params: TopKParams) {
        grid::wait_for_previous();
        grid::launch_dependents();
        let row = thread::block_idx_y();
        if params.actions.add(row as u64).load() != SCORE {
            return;
        }
        let candidates = params.batch.candidates(row, params.n_init, params.n_local);
        let histogram = Histogram::clear();
        each_key(&params, row, candidates, |key| histogram.count(radix::bin(key)));
        histogram.finish(&params.radix, row, params.k.min(candidates.len()), Keys::of_bin);
    }

    /// Finds the part of a bin with many keys that the threshold lies in.
    ///
    /// # Safety
    /// - As for [`count`], which has run, or [`vote`](mod@crate::vote), for the same votes.
    /// - Launched with [`TopKParams::count_dims`].
    pub unsafe fn refine(params: TopKParams) {
        grid::wait_for_previous();
        grid::launch_dependents();
        let row = thread::block_idx_y();
        if params.actions.add(row as u64).load() != SCORE {
            return;
        }
        let [smallest, largest, rank, many] = params.radix.state.add(row as u64).load().0;
        if many <= MANY {
            return;
        }
        let keys = Keys { smallest, largest };
        let candidates = params.batch.candidates(row, params.n_init, params.n_local);
        let histogram = Histogram::clear();
        each_key(&params, row, candidates, |key| {
            if keys.contain(key) {
                histogram.count(keys.part_of(key));
            }
        });
        histogram.finish(&params.radix, row, rank, |part| keys.part(part));
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
    /// - As for [`refine`], which has run.
    /// - Launched with [`TopKParams::choose_dims`].
    pub unsafe fn choose(params: TopKParams) {
        grid::wait_for_previous();
        grid::launch_dependents();
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
            if caches {
                keep_query(&row, kv_len);
            }
            contend(&row, chosen, caches);
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
            row += THREADS;
        }
        let (_, reused) = sums_before(reused);
        let (_, scored) = sums_before(scored);
        let (_, complete) = sums_before(complete);
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
            let mut i = thread::block_idx_x() * THREADS + thread::thread_idx_x();
            while i < len {
                f(i);
                i += thread::grid_dim_x() * THREADS;
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

    /// See [`radix::sums_before`].
    #[inline(always)]
    unsafe fn sums_before(value: u32) -> (u32, u32) {
        radix::sums_before(LAYOUT.warps.get(), THREADS / warp::SIZE, value)
    }

    /// Writes down the contenders of the block's share; the row's last block chooses among all.
    #[inline(always)]
    unsafe fn contend(row: &Row<'_>, chosen: u32, caches: bool) {
        let params = row.params;
        let first = row.candidates.begin / LOGIT_TILE * LOGIT_TILE;
        let num_shares = (row.candidates.end - first).div_ceil(SHARE);
        let share = thread::block_idx_x();
        if share >= num_shares {
            return;
        }
        let base = params.batch.token_base(row.row);
        let [smallest, largest, rank, _] = params.radix.state.add(row.row as u64).load().0;
        let counts = params.counts.add(base / SHARE as u64 + 2 * row.row as u64);
        let contenders = params.contenders.add(base);
        write_contenders(row, first, share, smallest, counts, contenders);
        if grid::is_last_block(params.radix.counters.add(row.row as u64), num_shares) {
            let all = Contenders { first, num_shares, counts, contenders };
            choose_among(row, &all, Keys { smallest, largest }, rank, chosen, caches);
        }
    }

    /// The contenders of a share, in the order of their tokens, from the place of its first token on.
    #[inline(always)]
    unsafe fn write_contenders(
        row: &Row<'_>,
        first: u32,
        share: u32,
        smallest: u32,
        counts: GlobalMut<u32>,
        contenders: GlobalMut<V2<u32>>,
    ) {
        const VOTES: usize = (SHARE / THREADS) as usize;
        let begin = (first + share * SHARE).max(row.candidates.begin);
        let own = first + share * SHARE + thread::thread_idx_x() * VOTES as u32;
        let votes = row.params.votes.add(row.params.batch.token_base(row.row));
        let mut keys = [0; VOTES];
        let mut contends = [false; VOTES];
        let mut count = 0;
        let mut i = 0;
        while i < VOTES {
            let token = own + i as u32;
            if token >= row.candidates.begin && token < row.candidates.end {
                keys[i] = radix::key(votes.add(token as u64).load_cached());
                contends[i] = keys[i] >= smallest;
            }
            i += 1;
        }
        let mut i = 0;
        while i < VOTES {
            count += contends[i] as u32;
            i += 1;
        }
        let (mut place, all) = sums_before(count);
        let mut i = 0;
        while i < VOTES {
            if contends[i] {
                contenders.add((begin + place) as u64).store(V2([keys[i], own + i as u32]));
                place += 1;
            }
            i += 1;
        }
        if thread::thread_idx_x() == 0 {
            counts.add(share as u64).store(all);
        }
    }

    /// The contenders of all shares of a row.
    struct Contenders {
        /// First token of the first share.
        first: u32,
        num_shares: u32,
        counts: GlobalMut<u32>,
        contenders: GlobalMut<V2<u32>>,
    }

    /// Contenders that lie in shared memory: those of the shares `begin..end`.
    #[derive(Clone, Copy)]
    struct Window {
        begin: u32,
        end: u32,
        len: u32,
    }

    impl Contenders {
        /// Brings the contenders of the next shares to shared memory, as many shares as fit: at least one.
        #[inline(always)]
        unsafe fn load(&self, row: &Row<'_>, begin: u32) -> Window {
            let (thread, begins, found) = (thread::thread_idx_x(), LAYOUT.begins.get(), LAYOUT.found.get());
            let share = begin + thread;
            let count = if share < self.num_shares { self.counts.add(share as u64).load() } else { 0 };
            let (before, _) = sums_before(count);
            begins.add(thread).store(before);
            if thread == THREADS - 1 {
                begins.add(THREADS).store(before + count);
            }
            // The last share that fits, of those that are there.
            let fits = before + count <= WINDOW && share < self.num_shares;
            let num_shares = thread::sync_threads_count(fits);
            if thread == num_shares - 1 {
                found.store(before + count);
            }
            thread::sync_threads();
            let window = Window { begin, end: begin + num_shares, len: found.load() };
            let mut i = thread;
            while i < window.len {
                // The last share that begins at or before place i.
                let (mut low, mut high) = (0, num_shares);
                while low + 1 < high {
                    let middle = (low + high) / 2;
                    if begins.add(middle).load() <= i {
                        low = middle;
                    } else {
                        high = middle;
                    }
                }
                let of_share = (self.first + (begin + low) * SHARE).max(row.candidates.begin);
                let [key, token] =
                    self.contenders.add((of_share + i - begins.add(low).load()) as u64).load().0;
                LAYOUT.keys.get().add(i).store(key);
                LAYOUT.tokens.get().add(i).store(token);
                i += THREADS;
            }
            thread::sync_threads();
            window
        }

        /// Calls `f` with one window after the other. If one holds all, it stays in shared memory and is not loaded
        /// again: `held` says so, and is brought up to date.
        #[inline(always)]
        unsafe fn each_window(&self, row: &Row<'_>, held: &mut Option<Window>, mut f: impl FnMut(Window)) {
            if let Some(window) = *held {
                f(window);
                return;
            }
            let mut begin = 0;
            while begin < self.num_shares {
                let window = self.load(row, begin);
                f(window);
                if window.begin == 0 && window.end == self.num_shares {
                    *held = Some(window);
                }
                thread::sync_threads();
                begin = window.end;
            }
        }
    }

    /// Finds the threshold and writes the tokens that are chosen; run by one block.
    #[inline(always)]
    unsafe fn choose_among(
        row: &Row<'_>,
        all: &Contenders,
        mut among: Keys,
        rank: u32,
        chosen: u32,
        caches: bool,
    ) {
        let (mut held, mut ties) = (None, rank);
        while among.smallest < among.largest {
            let histogram = LAYOUT.histogram.get();
            let mut i = thread::thread_idx_x();
            while i < radix::BINS {
                histogram.add(i).store(0);
                i += THREADS;
            }
            thread::sync_threads();
            all.each_window(row, &mut held, |window| {
                let mut i = thread::thread_idx_x();
                while i < window.len {
                    let key = LAYOUT.keys.get().add(i).load();
                    if among.contain(key) {
                        histogram.add(among.part_of(key)).atomic_add(1);
                    }
                    i += THREADS;
                }
            });
            thread::sync_threads();
            let (part, left) = find_part(histogram, ties);
            among = among.part(part);
            ties = left;
        }
        let threshold = among.smallest;
        let (mut above, mut equal) = (0, 0);
        all.each_window(row, &mut held, |window| {
            write_chosen(row, window, threshold, ties.min(chosen), &mut above, &mut equal, caches);
        });
    }

    /// The part at which the sum of a histogram, from the top, reaches `rank`, and the rank within it.
    #[inline(always)]
    unsafe fn find_part(histogram: Shared<u32>, rank: u32) -> (u32, u32) {
        const BINS: usize = (radix::BINS / THREADS) as usize;
        let top = radix::BINS - 1 - thread::thread_idx_x() * BINS as u32;
        let (mut counts, mut sum) = ([0; BINS], 0);
        let mut i = 0;
        while i < BINS {
            counts[i] = histogram.add(top - i as u32).load();
            sum += counts[i];
            i += 1;
        }
        let (mut above, _) = sums_before(sum);
        let found = LAYOUT.found.get();
        let mut i = 0;
        while i < BINS {
            if above < rank && rank <= above + counts[i] {
                found.store(top - i as u32);
                found.add(1).store(rank - above);
            }
            above += counts[i];
            i += 1;
        }
        thread::sync_threads();
        let part = (found.load(), found.add(1).load());
        thread::sync_threads();
        part
    }

    /// Writes the tokens of a window that are chosen, each thread those of a run of contenders. `above` and `equal` count
    /// the contenders before the window that lie above the threshold and at it.
    #[inline(always)]
    unsafe fn write_chosen(
        row: &Row<'_>,
        window: Window,
        threshold: u32,
        ties: u32,
        above: &mut u32,
        equal: &mut u32,
        caches: bool,
    ) {
        let run = window.len.div_ceil(THREADS);
        let begin = (thread::thread_idx_x() * run).min(window.len);
        let end = (begin + run).min(window.len);
        let (keys, tokens) = (LAYOUT.keys.get(), LAYOUT.tokens.get());
        let mut counted = 0;
        let mut i = begin;
        while i < end {
            let key = keys.add(i).load();
            counted += (key > threshold) as u32 | ((key == threshold) as u32) << 16;
            i += 1;
        }
        let (before, all) = sums_before(counted);
        let (mut own_above, mut own_equal) = (*above + (before & 0xffff), *equal + (before >> 16));
        let mut i = begin;
        while i < end {
            let key = keys.add(i).load();
            let is_equal = key == threshold;
            if key > threshold || (is_equal && own_equal < ties) {
                let place = own_above + own_equal.min(ties);
                let token = tokens.add(i).load();
                row.list(row.candidates.begin + place).store(token);
                row.chosen(place).store(token);
                if caches {
                    row.cached(place).store(token);
                }
            }
            own_above += (key > threshold) as u32;
            own_equal += is_equal as u32;
            i += 1;
        }
        *above += all & 0xffff;
        *equal += all >> 16;
    }
}
