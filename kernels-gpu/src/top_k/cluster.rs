//! Choosing by a cluster of blocks, all of which see what the others have in shared memory.
//!
//! Each block has a share of the candidates, and two masks, a bit for each: which of them lie above a range of keys, and
//! which in it. The range is the bin of the threshold at first; it is narrowed, by histograms of its parts, until few keys
//! lie in it or only one value. Few keys are brought together in every block, which ranks its own among them; then the
//! first mask says who is chosen, and a token's place is the number of marks before its own.

use super::TopKParams;
use crate::launch::{Dims, GpuInfo};
use crate::radix::BINS;
use crate::simt::shared::{Carve, Region};

/// Threads of a block.
const THREADS: u32 = 512;
/// Words of a mask: a block has marks for 32 times as many tokens.
const WORDS: u32 = 8192;
/// Tokens of a block from which on a cluster of 16 is faster than one of 8.
const FULL: u32 = 1 << 16;
/// Keys that are brought together at most. A bin has some hundreds, as a rule, of a million.
const FEW: u32 = 2048;

/// Shared memory of a block.
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct Layout {
    /// Marks of the keys above the range, and of those in it.
    above: Region<u32>,
    within: Region<u32>,
    histogram: Region<u32>,
    /// Few keys in the range: the block's own, their tokens, and those of all blocks.
    own: Region<u32>,
    tokens: Region<u32>,
    all: Region<u32>,
    /// How many are the block's own; its tokens above the range and in it.
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
        tokens: carve.array(FEW, 16),
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
    // As many blocks as run at a time; more than 8, which meet more slowly, where each has many tokens.
    let fair = gpu.num_sms / num_rows;
    let useful = max_tokens.div_ceil(if max_tokens > 8 * FULL { FULL } else { 4 * THREADS });
    let most = if max_tokens > 8 * FULL { 16 } else { 8 };
    let mut blocks = 1;
    while 2 * blocks <= limit
        && (blocks < needed || (2 * blocks <= fair && 2 * blocks <= most && blocks < useful))
    {
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
    use crate::simt::data::V4;
    use crate::simt::global::GlobalPtr;
    use crate::simt::{cluster, grid, thread, warp};

    /// Loads of four votes that a thread has under way.
    const BATCH: usize = 4;

    /// The block's share of a row's candidates.
    struct Share<'a> {
        row: &'a Row<'a>,
        /// Votes of the row, by token.
        votes: GlobalPtr<f32>,
        /// First token, a multiple of 32, and one past the last. Those before the candidates are none.
        begin: u32,
        end: u32,
        /// The thread's first votes.
        first_votes: Votes,
    }

    /// Votes that a thread has under way: four at each of [`BATCH`] places, NaN where there are none.
    type Votes = [[f32; 4]; BATCH];
    /// From one of the places to the next.
    const STEP: u32 = 4 * THREADS;

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
        let row = lists::row_of_block(&params);
        let asked = row.ask();
        let mut share = Share::of(&row);
        forget_marks(&share);
        grid::wait_for_previous();
        grid::launch_dependents();
        let mut counts = [0; OWN_BINS];
        if row.is_scored() {
            counts = load_counts(&params);
            share.first_votes = share.load(share.first_of_thread());
        }
        row.write_rest(&asked);
        if row.is_scored() {
            choose(&share, counts);
        }
    }

    #[inline(always)]
    unsafe fn choose(share: &Share<'_>, counts: [u32; OWN_BINS]) {
        let (bin, rank, many) = find(counts, share.row.chosen);
        let mut range = Range { keys: Keys::of_bin(bin), rank, many };
        mark(share, &range);
        while range.keys.smallest < range.keys.largest && range.many > FEW {
            range = narrow(share, &range);
            forget_marks(share);
            thread::sync_threads();
            mark(share, &range);
        }
        if range.keys.smallest < range.keys.largest {
            rank_few(share, &range);
            place(share, 0);
        } else {
            place(share, range.rank);
        }
    }

    impl<'a> Share<'a> {
        #[inline(always)]
        unsafe fn of(row: &'a Row<'a>) -> Share<'a> {
            let first = row.candidates.begin / 32 * 32;
            let all = row.candidates.end - first;
            let len = all.div_ceil(cluster::num_blocks().max(1)).div_ceil(32) * 32;
            let begin = first + (cluster::block_rank() * len).min(all.div_ceil(32) * 32);
            let votes = row.params.votes.add(row.params.batch.token_base(row.row));
            let end = (begin + len).min(row.candidates.end);
            Share { row, votes, begin, end, first_votes: [[f32::NAN; 4]; BATCH] }
        }

        /// The first token that the thread looks at.
        #[inline(always)]
        fn first_of_thread(&self) -> u32 {
            self.begin + 4 * thread::thread_idx_x()
        }

        /// Votes of the thread from token `first` on.
        #[inline(always)]
        unsafe fn load(&self, first: u32) -> Votes {
            let aligned = self.votes.addr().is_multiple_of(16);
            let mut votes = [[f32::NAN; 4]; BATCH];
            let mut b = 0;
            while b < BATCH {
                let token = first + b as u32 * STEP;
                let whole = token >= self.row.candidates.begin && token + 3 < self.end;
                if whole && aligned {
                    votes[b] = self.votes.add(token as u64).cast::<V4<f32>>().load_cached().0;
                } else if token < self.end {
                    let mut i = 0;
                    while i < 4 {
                        if self.is_candidate(token + i as u32) {
                            votes[b][i] = self.votes.add((token + i as u32) as u64).load_cached();
                        }
                        i += 1;
                    }
                }
                b += 1;
            }
            votes
        }

        /// Words of the share's masks.
        #[inline(always)]
        fn words(&self) -> u32 {
            self.end.saturating_sub(self.begin).div_ceil(32)
        }

        /// Calls `f` with each candidate of the share that is this thread's, and its key, if the key is no less than
        /// `smallest`.
        #[inline(always)]
        unsafe fn each(&self, smallest: u32, mut f: impl FnMut(u32, u32)) {
            let (least, all) = (radix::least_vote(smallest), smallest == 0);
            let mut votes = self.first_votes;
            let mut first = self.first_of_thread();
            while first < self.end {
                // What is not there is NaN, which has the smallest key. Few keys are large enough, and are loaded again.
                let mut found = 0u32;
                let mut b = 0;
                while b < BATCH {
                    let mut i = 0;
                    while i < 4 {
                        found |= ((all | (votes[b][i] >= least)) as u32) << (4 * b + i);
                        i += 1;
                    }
                    b += 1;
                }
                while found != 0 {
                    let place = found.trailing_zeros();
                    let token = first + place / 4 * STEP + place % 4;
                    if self.is_candidate(token) {
                        f(token, radix::key(self.votes.add(token as u64).load_cached()));
                    }
                    found &= found - 1;
                }
                first += BATCH as u32 * STEP;
                if first < self.end {
                    votes = self.load(first);
                }
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

    /// Bins of a thread: the first thread has the topmost.
    const OWN_BINS: usize = (BINS / THREADS) as usize;

    /// The first of the thread's bins; the others lie below it.
    #[inline(always)]
    fn top_bin() -> u32 {
        BINS - 1 - thread::thread_idx_x() * OWN_BINS as u32
    }

    /// Counts of the row's votes in the thread's bins.
    #[inline(always)]
    unsafe fn load_counts(params: &TopKParams) -> [u32; OWN_BINS] {
        let of_row = params.radix.histogram.add(thread::block_idx_y() as u64 * BINS as u64);
        let mut counts = [0; OWN_BINS];
        let mut i = 0;
        while i < OWN_BINS {
            counts[i] = of_row.add((top_bin() - i as u32) as u64).load();
            i += 1;
        }
        counts
    }

    /// The bin at which the sum of the counts from the top reaches `rank`, the rank within it, and its count.
    #[inline(always)]
    unsafe fn find(counts: [u32; OWN_BINS], rank: u32) -> (u32, u32, u32) {
        let mut sum = 0;
        let mut i = 0;
        while i < OWN_BINS {
            sum += counts[i];
            i += 1;
        }
        let (mut above, _) = sums_before(LAYOUT.warps.get(), sum);
        let found = LAYOUT.found.get();
        let mut i = 0;
        while i < OWN_BINS {
            if above < rank && rank <= above + counts[i] {
                found.store(top_bin() - i as u32);
                found.add(1).store(rank - above);
                found.add(2).store(counts[i]);
            }
            above += counts[i];
            i += 1;
        }
        thread::sync_threads();
        (found.load(), found.add(1).load(), found.add(2).load())
    }

    /// Sets all marks back, before the block meets and marks others.
    #[inline(always)]
    unsafe fn forget_marks(share: &Share<'_>) {
        let mut word = thread::thread_idx_x();
        while word < share.words() {
            LAYOUT.above.get().add(word).store(0);
            LAYOUT.within.get().add(word).store(0);
            word += THREADS;
        }
        if thread::thread_idx_x() == 0 {
            LAYOUT.counts.get().store(0);
        }
    }

    /// Marks the tokens above the range and in it, and writes down those in it if they are few. There are no marks yet.
    #[inline(always)]
    unsafe fn mark(share: &Share<'_>, range: &Range) {
        let (above, within, count) = (LAYOUT.above.get(), LAYOUT.within.get(), LAYOUT.counts.get());
        let (own, tokens) = (LAYOUT.own.get(), LAYOUT.tokens.get());
        let (keys, few) = (range.keys, range.many <= FEW);
        share.each(keys.smallest, |token, key| {
            let (word, bit) = ((token - share.begin) / 32, 1 << (token % 32));
            if key > keys.largest {
                above.add(word).atomic_add(bit);
            } else {
                within.add(word).atomic_add(bit);
                if few {
                    let i = count.atomic_add(1);
                    own.add(i).store(key);
                    tokens.add(i).store(token);
                }
            }
        });
        thread::sync_threads();
    }

    /// The part of the range that the threshold lies in. Its keys are counted by all blocks.
    #[inline(always)]
    unsafe fn narrow(share: &Share<'_>, range: &Range) -> Range {
        let (histogram, keys) = (LAYOUT.histogram.get(), range.keys);
        let mut bin = thread::thread_idx_x();
        while bin < BINS {
            histogram.add(bin).store(0);
            bin += THREADS;
        }
        thread::sync_threads();
        share.each(keys.smallest, |_, key| {
            if key <= keys.largest {
                histogram.add(keys.part_of(key)).atomic_add(1);
            }
        });
        cluster::sync();
        let mut counts = [0; OWN_BINS];
        let mut block = 0;
        while block < cluster::num_blocks() {
            let mut i = 0;
            while i < OWN_BINS {
                counts[i] += histogram.add(top_bin() - i as u32).of_block(block).load();
                i += 1;
            }
            block += 1;
        }
        cluster::sync();
        let (part, rank, many) = find(counts, range.rank);
        Range { keys: keys.part(part), rank, many }
    }

    /// Marks those chosen among few tokens in the range as if they were above it: every block brings the keys of all
    /// together, and ranks its own.
    #[inline(always)]
    unsafe fn rank_few(share: &Share<'_>, range: &Range) {
        let (own, tokens, all) = (LAYOUT.own.get(), LAYOUT.tokens.get(), LAYOUT.all.get());
        let count = LAYOUT.counts.get();
        cluster::sync();
        // Some warps copy the keys of a block, to behind those of the blocks before it.
        let (warp, lane, num_blocks) = (warp::warp_id(), warp::lane_id(), cluster::num_blocks().max(1));
        let of_lane = if lane < num_blocks { count.of_block(lane).load() } else { 0 };
        let before = |block: u32| warp::reduce_add(warp::FULL, if lane < block { of_lane } else { 0 });
        let (block, part) = (warp % num_blocks, warp / num_blocks);
        let (to, many) = (before(block), warp::shuffle_idx(warp::FULL, of_lane, block));
        let mut i = part * warp::SIZE + lane;
        while i < many {
            all.add(to + i).store(own.add(i).of_block(block).load());
            i += THREADS / num_blocks;
        }
        // Behind the last come keys below all others, up to a multiple of what a lane compares at a time.
        if thread::thread_idx_x() < FEW.min(range.many.next_multiple_of(4)) - range.many {
            all.add(range.many + thread::thread_idx_x()).store(0);
        }
        // Equal keys of blocks before this one come first.
        let (earlier, mine) = (before(cluster::block_rank()), count.load());
        thread::sync_threads();
        let mut i = warp;
        while i < mine {
            let (key, token) = (own.add(i).load(), tokens.add(i).load());
            let mut before = 0;
            let mut other = 4 * lane;
            while other < range.many {
                let others = all.add(other).cast::<V4<u32>>().load().0;
                let mut j = 0;
                while j < 4 {
                    before += (others[j] > key || (others[j] == key && other + (j as u32) < earlier)) as u32;
                    j += 1;
                }
                other += 4 * warp::SIZE;
            }
            let mut other = lane;
            while other < mine {
                before += (own.add(other).load() == key && tokens.add(other).load() < token) as u32;
                other += warp::SIZE;
            }
            let before = warp::reduce_add(warp::FULL, before);
            if lane == 0 && before < range.rank {
                LAYOUT.above.get().add((token - share.begin) / 32).atomic_add(1 << (token % 32));
            }
            i += THREADS / warp::SIZE;
        }
        thread::sync_threads();
    }

    /// Gives the marked tokens their places: all above the range, and the first `ties` in it.
    #[inline(always)]
    unsafe fn place(share: &Share<'_>, ties: u32) {
        let (above, within) = (LAYOUT.above.get(), LAYOUT.within.get());
        let (begin, end) = share.own_words();
        let (mut higher, mut equal) = (0, 0);
        let mut word = begin;
        while word < end {
            higher += above.add(word).load().count_ones();
            equal += if ties > 0 { within.add(word).load().count_ones() } else { 0 };
            word += 1;
        }
        let warps = LAYOUT.warps.get();
        let (higher_before, all_higher) = sums_before(warps, higher);
        let (equal_before, all_equal) = if ties > 0 { sums_before(warps, equal) } else { (0, 0) };
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
            let mut left = bits | if ties > 0 { within.add(word).load() } else { 0 };
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
        cluster::meet(); // no block ends while others read from it
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
