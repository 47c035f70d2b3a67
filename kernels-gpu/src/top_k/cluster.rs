//! Choosing by a cluster of blocks, all of which see what the others have in shared memory.
//!
//! Each block has a share of the candidates, a warp takes 32 adjacent ones at a time, and a word of each of two masks says
//! which of them lie above a range of keys, and which in it. The range is the bin of the threshold at first; it is
//! narrowed, by histograms of its parts, until few keys lie in it or only one value. Few keys are brought together in every
//! block, which ranks them all; then the range is the threshold itself, and a token's place is the number of marks
//! before its own.

use super::TopKParams;
use crate::launch::{Dims, GpuInfo};
use crate::radix::BINS;
use crate::simt::shared::{Carve, Region};

/// Threads of a block.
const THREADS: u32 = 1024;
/// Words of a mask: a block has marks for 32 times as many tokens.
const WORDS: u32 = 8192;
/// Keys that are brought together at most. A bin has a few hundred, as a rule, of a million.
const FEW: u32 = 512;

/// Shared memory of a block.
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct Layout {
    /// Marks of the keys above the range, and of those in it.
    above: Region<u32>,
    within: Region<u32>,
    histogram: Region<u32>,
    /// Keys in the range: the block's own, and all.
    own: Region<u32>,
    all: Region<u32>,
    /// How many are the block's own; its tokens above the threshold and at it.
    counts: Region<u32>,
    warps: Region<u32>,
    /// What one thread has found for all.
    found: Region<u32>,
    bytes: u32,
}

const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout {
        above: carve.array(WORDS, 16),
        within: carve.array(WORDS, 16),
        histogram: carve.array(BINS, 16),
        own: carve.array(FEW, 16),
        all: carve.array(FEW, 16),
        counts: carve.array(3, 16),
        warps: carve.array(THREADS / 32, 16),
        found: carve.array(3, 16),
        bytes: carve.bytes(),
    }
};

impl TopKParams {
    /// The launch of [`choose_in_cluster`](super::choose_in_cluster): a cluster for each row. `None` where there are no
    /// clusters, or not of so many blocks as the longest row may need.
    pub const fn cluster_dims(&self, gpu: &GpuInfo) -> Option<Dims> {
        cluster_dims(gpu, self.batch.num_rows, self.max_tokens)
    }
}

/// See [`TopKParams::cluster_dims`].
pub(crate) const fn cluster_dims(gpu: &GpuInfo, num_rows: u32, max_tokens: u32) -> Option<Dims> {
    let limit = gpu.limits.cluster;
    let needed = max_tokens.div_ceil(32).div_ceil(WORDS - 1);
    if limit == 1 || needed > limit {
        return None;
    }
    // As many blocks as run at a time, but no emptier than two candidates a thread.
    let fair = gpu.num_sms / num_rows;
    let useful = max_tokens.div_ceil(2 * THREADS);
    let mut blocks = 1;
    while 2 * blocks <= limit && (blocks < needed || (2 * blocks <= fair && blocks < useful)) {
        blocks *= 2;
    }
    if blocks < needed {
        return None;
    }
    Some(Dims {
        grid: [blocks, num_rows, 1],
        block: [THREADS, 1, 1],
        shared_bytes: LAYOUT.bytes,
        cluster: blocks,
    })
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use kernel::choose_in_cluster;

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod kernel {
    use super::super::lists::{self, Row, sums_before};
    use super::*;
    use crate::radix::{self, Keys};
    use crate::simt::global::GlobalPtr;
    use crate::simt::{cluster, grid, thread, warp};

    /// Words of a mask that a warp has under way.
    const BATCH: usize = 8;

    /// The block's share of a row's candidates.
    struct Share<'a> {
        row: &'a Row<'a>,
        /// Votes of the row, by token.
        votes: GlobalPtr<f32>,
        /// First token, a multiple of 32, and one past the last. Those before the candidates are none.
        begin: u32,
        end: u32,
    }

    /// Where the threshold lies.
    #[derive(Clone, Copy)]
    struct Range {
        keys: Keys,
        /// Rank of the threshold among the keys in the range, from 1, from the top.
        rank: u32,
        /// How many they are.
        many: u32,
    }

    /// Writes the lists.
    ///
    /// # Safety
    /// - The buffers and tables are as [`TopKParams`] says; the votes have been counted.
    /// - Launched with [`TopKParams::cluster_dims`].
    pub unsafe fn choose_in_cluster(params: TopKParams) {
        thread::launch_bounds::<THREADS, 1>();
        grid::wait_for_previous();
        grid::launch_dependents();
        if let Some(row) = lists::begin(&params, LAYOUT.warps.get()) {
            choose(&row);
        }
    }

    #[inline(always)]
    unsafe fn choose(row: &Row<'_>) {
        let share = Share::of(row);
        let mut range = find_bin(row);
        let mut collects = range.many <= FEW;
        mark(&share, &range, collects);
        while range.keys.smallest < range.keys.largest && range.many > FEW {
            range = narrow(&share, &range);
            collects = range.many <= FEW;
            mark(&share, &range, collects);
        }
        if range.keys.smallest < range.keys.largest {
            range = rank_few(&range);
            mark_threshold(&share, &range);
        }
        place(&share, range.rank);
    }

    impl<'a> Share<'a> {
        #[inline(always)]
        unsafe fn of(row: &'a Row<'a>) -> Share<'a> {
            let first = row.candidates.begin / 32 * 32;
            let all = row.candidates.end - first;
            let len = all.div_ceil(cluster::num_blocks().max(1)).div_ceil(32) * 32;
            let begin = first + (cluster::block_rank() * len).min(all.div_ceil(32) * 32);
            let votes = row.params.votes.add(row.params.batch.token_base(row.row));
            Share { row, votes, begin, end: (begin + len).min(row.candidates.end) }
        }

        /// Words of the share's masks.
        #[inline(always)]
        fn words(&self) -> u32 {
            self.end.saturating_sub(self.begin).div_ceil(32)
        }

        /// Calls `f`, in whole warps, with each word of the masks and the key of the lane's token in it, 0 and `false`
        /// where there is no such candidate.
        #[inline(always)]
        unsafe fn each(&self, mut f: impl FnMut(u32, u32, bool)) {
            let words = self.words();
            let mut first = warp::warp_id() * BATCH as u32;
            while first < words {
                let mut votes = [0.0; BATCH];
                let mut i = 0;
                while i < BATCH {
                    let token = self.begin + (first + i as u32) * 32 + warp::lane_id();
                    if self.is_candidate(token) {
                        votes[i] = self.votes.add(token as u64).load_cached();
                    }
                    i += 1;
                }
                let mut i = 0;
                while i < BATCH {
                    let word = first + i as u32;
                    if word < words {
                        let is_candidate = self.is_candidate(self.begin + word * 32 + warp::lane_id());
                        f(word, if is_candidate { radix::key(votes[i]) } else { 0 }, is_candidate);
                    }
                    i += 1;
                }
                first += BATCH as u32 * (THREADS / warp::SIZE);
            }
        }

        #[inline(always)]
        fn is_candidate(&self, token: u32) -> bool {
            token >= self.row.candidates.begin && token < self.end
        }

        /// The words of the masks that are this thread's: adjacent ones, in the order of the threads.
        #[inline(always)]
        fn own_words(&self) -> (u32, u32) {
            let words = self.words();
            let run = words.div_ceil(THREADS);
            let begin = (thread::thread_idx_x() * run).min(words);
            (begin, (begin + run).min(words))
        }
    }

    /// The bin of the threshold, from the counts of all votes.
    #[inline(always)]
    unsafe fn find_bin(row: &Row<'_>) -> Range {
        const OWN: usize = (BINS / THREADS) as usize;
        let of_row = row.params.radix.histogram.add(row.row as u64 * BINS as u64);
        let top = BINS - 1 - thread::thread_idx_x() * OWN as u32;
        let mut counts = [0; OWN];
        let mut i = 0;
        while i < OWN {
            counts[i] = of_row.add((top - i as u32) as u64).load();
            i += 1;
        }
        let (bin, rank, many) = find(counts, row.chosen);
        Range { keys: Keys::of_bin(bin), rank, many }
    }

    /// The bin at which the sum of the counts from the top reaches `rank`, the rank within it, and its count. Thread `i` has
    /// the counts of the bins from `BINS - 1 - N i` down.
    #[inline(always)]
    unsafe fn find<const N: usize>(counts: [u32; N], rank: u32) -> (u32, u32, u32) {
        let top = BINS - 1 - thread::thread_idx_x() * N as u32;
        let mut sum = 0;
        let mut i = 0;
        while i < N {
            sum += counts[i];
            i += 1;
        }
        let (mut above, _) = sums_before(LAYOUT.warps.get(), sum);
        let found = LAYOUT.found.get();
        let mut i = 0;
        while i < N {
            if above < rank && rank <= above + counts[i] {
                found.store(top - i as u32);
                found.add(1).store(rank - above);
                found.add(2).store(counts[i]);
            }
            above += counts[i];
            i += 1;
        }
        read_found()
    }

    /// What one thread has just stored for all.
    #[inline(always)]
    unsafe fn read_found() -> (u32, u32, u32) {
        let found = LAYOUT.found.get();
        thread::sync_threads();
        let all = (found.load(), found.add(1).load(), found.add(2).load());
        thread::sync_threads();
        all
    }

    /// Marks the tokens above the range and in it; `collects`: writes down the keys in it, of which there are few.
    #[inline(always)]
    unsafe fn mark(share: &Share<'_>, range: &Range, collects: bool) {
        let (above, within, own) = (LAYOUT.above.get(), LAYOUT.within.get(), LAYOUT.own.get());
        let count = LAYOUT.counts.get();
        if thread::thread_idx_x() == 0 {
            count.store(0);
        }
        thread::sync_threads();
        let keys = range.keys;
        share.each(|word, key, is_candidate| {
            let contained = is_candidate && keys.contain(key);
            let bits = (
                warp::ballot(warp::FULL, is_candidate && key > keys.largest),
                warp::ballot(warp::FULL, contained),
            );
            if warp::lane_id() == 0 {
                above.add(word).store(bits.0);
                within.add(word).store(bits.1);
            }
            if contained && collects {
                own.add(count.atomic_add(1)).store(key);
            }
        });
        thread::sync_threads();
    }

    /// The part of the range that the threshold lies in. Its keys are counted by all blocks.
    #[inline(always)]
    unsafe fn narrow(share: &Share<'_>, range: &Range) -> Range {
        const OWN: usize = (BINS / THREADS) as usize;
        let (histogram, keys) = (LAYOUT.histogram.get(), range.keys);
        let mut bin = thread::thread_idx_x();
        while bin < BINS {
            histogram.add(bin).store(0);
            bin += THREADS;
        }
        thread::sync_threads();
        share.each(|_, key, is_candidate| {
            if is_candidate && keys.contain(key) {
                histogram.add(keys.part_of(key)).atomic_add(1);
            }
        });
        cluster::sync();
        let top = BINS - 1 - thread::thread_idx_x() * OWN as u32;
        let mut counts = [0; OWN];
        let mut block = 0;
        while block < cluster::num_blocks() {
            let mut i = 0;
            while i < OWN {
                counts[i] += histogram.add(top - i as u32).of_block(block).load();
                i += 1;
            }
            block += 1;
        }
        cluster::sync();
        let (part, rank, many) = find(counts, range.rank);
        Range { keys: keys.part(part), rank, many }
    }

    /// The threshold, and its rank among its equals: every block brings all keys of the range together, and ranks them.
    #[inline(always)]
    unsafe fn rank_few(range: &Range) -> Range {
        let (own, all, count) = (LAYOUT.own.get(), LAYOUT.all.get(), LAYOUT.counts.get());
        cluster::sync();
        // A warp copies the keys of a block.
        let (block, lane) = (warp::warp_id(), warp::lane_id());
        let of_lane = if lane < cluster::num_blocks() { count.of_block(lane).load() } else { 0 };
        let before = warp::reduce_add(warp::FULL, if lane < block { of_lane } else { 0 });
        let many = warp::shuffle_idx(warp::FULL, of_lane, block);
        if block < cluster::num_blocks() {
            let mut i = lane;
            while i < many {
                all.add(before + i).store(own.add(i).of_block(block).load());
                i += warp::SIZE;
            }
        }
        thread::sync_threads();
        let i = thread::thread_idx_x();
        if i < range.many {
            let key = all.add(i).load();
            let (mut above, mut equal, mut earlier) = (0, 0, 0);
            let mut other = 0;
            while other < range.many {
                let another = all.add(other).load();
                above += (another > key) as u32;
                equal += (another == key) as u32;
                earlier += (another == key && other < i) as u32;
                other += 1;
            }
            // The first of several equals speaks for all.
            if earlier == 0 && above < range.rank && range.rank <= above + equal {
                let found = LAYOUT.found.get();
                found.store(key);
                found.add(1).store(range.rank - above);
                found.add(2).store(equal);
            }
        }
        let (threshold, rank, many) = read_found();
        Range { keys: Keys { smallest: threshold, largest: threshold }, rank, many }
    }

    /// Marks the tokens above the threshold and at it, of which all were marked as in a range around it.
    #[inline(always)]
    unsafe fn mark_threshold(share: &Share<'_>, range: &Range) {
        let threshold = range.keys.smallest;
        let (mut word, end) = share.own_words();
        while word < end {
            let (above, within) = (LAYOUT.above.get().add(word), LAYOUT.within.get().add(word));
            let mut left = within.load();
            let (mut higher, mut equal) = (0, 0);
            while left != 0 {
                let bit = left.trailing_zeros();
                let token = share.begin + word * 32 + bit;
                let key = radix::key(share.votes.add(token as u64).load_cached());
                higher |= ((key > threshold) as u32) << bit;
                equal |= ((key == threshold) as u32) << bit;
                left &= left - 1;
            }
            above.store(above.load() | higher);
            within.store(equal);
            word += 1;
        }
    }

    /// Gives the marked tokens their places: all above the threshold, and the first `ties` at it.
    #[inline(always)]
    unsafe fn place(share: &Share<'_>, ties: u32) {
        let (above, within) = (LAYOUT.above.get(), LAYOUT.within.get());
        let (begin, end) = share.own_words();
        let (mut higher, mut equal) = (0, 0);
        let mut word = begin;
        while word < end {
            higher += above.add(word).load().count_ones();
            equal += within.add(word).load().count_ones();
            word += 1;
        }
        let warps = LAYOUT.warps.get();
        let (higher_before, all_higher) = sums_before(warps, higher);
        let (equal_before, all_equal) = sums_before(warps, equal);
        let counts = LAYOUT.counts.get();
        if thread::thread_idx_x() == 0 {
            counts.add(1).store(all_higher);
            counts.add(2).store(all_equal);
        }
        cluster::sync();
        let (lane, rank) = (warp::lane_id(), cluster::block_rank());
        let of_lane = |count: u32| if lane < rank { counts.add(count).of_block(lane).load() } else { 0 };
        let (higher, equal) = (of_lane(1), of_lane(2));
        let mut higher = higher_before + warp::reduce_add(warp::FULL, higher);
        let mut equal = equal_before + warp::reduce_add(warp::FULL, equal);
        if rank == 0 {
            forget_counts(share.row);
        }
        let mut word = begin;
        while word < end {
            let bits = above.add(word).load();
            let mut left = bits | within.add(word).load();
            while left != 0 {
                let bit = left.trailing_zeros();
                let is_higher = bits >> bit & 1 == 1;
                if is_higher || equal < ties {
                    let place = higher + equal.min(ties);
                    share.row.choose(place, share.begin + word * 32 + bit);
                }
                higher += is_higher as u32;
                equal += !is_higher as u32;
                left &= left - 1;
            }
            word += 1;
        }
        cluster::sync(); // no block ends while others read from it
    }

    /// Sets the row's counts of votes back to 0, when every block has read them.
    #[inline(always)]
    unsafe fn forget_counts(row: &Row<'_>) {
        let of_row = row.params.radix.histogram.add(row.row as u64 * BINS as u64);
        let mut bin = thread::thread_idx_x();
        while bin < BINS {
            of_row.add(bin as u64).store(0);
            bin += THREADS;
        }
    }
}
