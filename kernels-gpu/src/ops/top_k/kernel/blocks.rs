//! Choosing with blocks that do not meet: a pass of all, and a last one that has seen what the others wrote.

use super::lists::{self, Row};
use crate::common::block::{bin_from_top, search_from_top, strided, sums_before};
use crate::common::layout::{LOGIT_TILE, Tokens};
use crate::common::radix::{self, Histogram, Keys};
use crate::ops::pool::SCORE;
use crate::ops::top_k::*;
use crate::simt::data::V2;
use crate::simt::global::GlobalMut;
use crate::simt::shared::Shared;
use crate::simt::{grid, thread};

/// Keys of a bin from which on it is refined: with fewer, its contenders fit in a window beside any usual `k`.
const MANY: u32 = SHARE;

/// Calls `f` with the key of each vote of the block's share that this thread takes; the order does not matter.
unsafe fn each_key(params: &TopKParams, row: u32, candidates: Tokens, mut f: impl FnMut(u32)) {
    /// Votes that a thread has in flight.
    const VOTES: usize = 8;

    let share = radix::share(candidates, thread::block_idx_x(), thread::grid_dim_x());
    let votes = params.votes.add(params.batch.token_base(row));
    for begin in strided(share.begin + thread::thread_idx_x(), share.end, VOTES as u32 * radix::THREADS) {
        let mut batch = [0.0; VOTES];
        for i in 0..VOTES {
            let token = begin + i as u32 * radix::THREADS;
            if token < share.end {
                batch[i] = votes.add(token as u64).load();
            }
        }
        for i in 0..VOTES {
            if begin + (i as u32 * radix::THREADS) < share.end {
                f(radix::key(batch[i]));
            }
        }
    }
}

/// Counts the votes; finds the bin of the threshold if it is wanted.
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
    histogram.finish(&params.radix, row, params.k.min(candidates.len()), params.wanted);
}

/// Finds the bin, of those that a bin with many keys is cut into, that the threshold lies in.
///
/// # Safety
/// - As for [`count`], which has run, or [`vote`](mod@crate::ops::vote), for the same votes.
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
            histogram.count(keys.bin_of(key));
        }
    });
    histogram.find_bin(&params.radix, row, rank, |bin| keys.narrowed(bin));
}

/// Writes the lists.
///
/// # Safety
/// - As for [`refine`], which has run.
/// - Launched with [`TopKParams::choose_dims`].
pub unsafe fn choose(params: TopKParams) {
    let row = lists::row_of_block(&params);
    let prefetched = row.prefetch();
    grid::wait_for_previous();
    grid::launch_dependents();
    row.write_rest(&prefetched);
    if row.is_scored() {
        contend(&row);
    }
}

/// Writes down the contenders of the block's share; the row's last block chooses among all.
unsafe fn contend(row: &Row<'_>) {
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
        choose_among(row, &all, Keys { smallest, largest }, rank);
    }
}

/// The contenders of a share, in the order of their tokens, from the index of its first token on.
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
    for i in 0..VOTES {
        let token = own + i as u32;
        if token >= row.candidates.begin && token < row.candidates.end {
            keys[i] = radix::key(votes.add(token as u64).load());
            contends[i] = keys[i] >= smallest;
        }
    }
    for i in 0..VOTES {
        count += contends[i] as u32;
    }
    let (mut index, all) = sums_before(LAYOUT.warps.get(), count);
    for i in 0..VOTES {
        if contends[i] {
            contenders.add((begin + index) as u64).store(V2([keys[i], own + i as u32]));
            index += 1;
        }
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
    unsafe fn load(&self, row: &Row<'_>, begin: u32) -> Window {
        let (thread, begins, found) = (thread::thread_idx_x(), LAYOUT.begins.get(), LAYOUT.found.get());
        let share = begin + thread;
        let count = if share < self.num_shares { self.counts.add(share as u64).load() } else { 0 };
        let (before, _) = sums_before(LAYOUT.warps.get(), count);
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
        for i in strided(thread, window.len, THREADS) {
            // The last share that begins at or before contender i.
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
            let [key, token] = self.contenders.add((of_share + i - begins.add(low).load()) as u64).load().0;
            LAYOUT.keys.get().add(i).store(key);
            LAYOUT.tokens.get().add(i).store(token);
        }
        thread::sync_threads();
        window
    }

    /// Calls `f` with one window after the other. If one holds all, it stays in shared memory and is not loaded
    /// again: `held` says so, and is brought up to date.
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
unsafe fn choose_among(row: &Row<'_>, all: &Contenders, mut among: Keys, rank: u32) {
    let (mut held, mut ties) = (None, rank);
    while among.smallest < among.largest {
        let histogram = LAYOUT.histogram.get();
        for i in strided(thread::thread_idx_x(), radix::BINS, THREADS) {
            histogram.add(i).store(0);
        }
        thread::sync_threads();
        all.each_window(row, &mut held, |window| {
            for i in strided(thread::thread_idx_x(), window.len, THREADS) {
                let key = LAYOUT.keys.get().add(i).load();
                if among.contain(key) {
                    histogram.add(among.bin_of(key)).atomic_add(1);
                }
            }
        });
        thread::sync_threads();
        let (bin, left) = find_bin(histogram, ties);
        among = among.narrowed(bin);
        ties = left;
    }
    let threshold = among.smallest;
    let (mut above, mut equal) = (0, 0);
    all.each_window(row, &mut held, |window| {
        write_chosen(row, window, threshold, ties.min(row.chosen), &mut above, &mut equal);
    });
}

/// The bin at which the sum of a histogram, from the top, reaches `rank`, and the rank within it.
unsafe fn find_bin(histogram: Shared<u32>, rank: u32) -> (u32, u32) {
    const OWN_BINS: usize = (radix::BINS / THREADS) as usize;
    let mut counts = [0; OWN_BINS];
    for i in 0..OWN_BINS {
        counts[i] = histogram.add(bin_from_top::<OWN_BINS>(radix::BINS, i)).load();
    }
    let found = LAYOUT.found.get();
    search_from_top(LAYOUT.warps.get(), counts, rank, |i, rank, _| {
        found.store(bin_from_top::<OWN_BINS>(radix::BINS, i));
        found.add(1).store(rank);
    });
    thread::sync_threads();
    let bin = (found.load(), found.add(1).load());
    thread::sync_threads();
    bin
}

/// Writes the tokens of a window that are chosen, each thread those of a run of contenders. `above` and `equal` count
/// the contenders before the window that lie above the threshold and at it.
unsafe fn write_chosen(
    row: &Row<'_>,
    window: Window,
    threshold: u32,
    ties: u32,
    above: &mut u32,
    equal: &mut u32,
) {
    let run = window.len.div_ceil(THREADS);
    let begin = (thread::thread_idx_x() * run).min(window.len);
    let end = (begin + run).min(window.len);
    let (keys, tokens) = (LAYOUT.keys.get(), LAYOUT.tokens.get());
    let mut counted = 0;
    for i in begin..end {
        let key = keys.add(i).load();
        counted += (key > threshold) as u32 | ((key == threshold) as u32) << 16;
    }
    let (before, all) = sums_before(LAYOUT.warps.get(), counted);
    let (mut own_above, mut own_equal) = (*above + (before & 0xffff), *equal + (before >> 16));
    for i in begin..end {
        let key = keys.add(i).load();
        let is_equal = key == threshold;
        if key > threshold || (is_equal && own_equal < ties) {
            let index = own_above + own_equal.min(ties);
            row.choose(index, tokens.add(i).load());
        }
        own_above += (key > threshold) as u32;
        own_equal += is_equal as u32;
    }
    *above += all & 0xffff;
    *equal += all >> 16;
}
