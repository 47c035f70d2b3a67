//! Choosing by a cluster of blocks, all of which see what the others have in shared memory.
//!
//! Each block has a share of the candidates, and two masks with a bit for each of them: which lie above a range of keys, and
//! which in it. The range is cut into bins, and narrowed to the one of the threshold, until few keys
//! lie in it or only one value. Few keys are brought together in every block, which ranks its own among them; then the
//! first mask says who is chosen, and the number of marks before a token's own is its index in the list.
//!
//! Votes are read once or twice. Where they have been counted, the range is the bin of the threshold at first. Else a part of them, spread
//! evenly, is counted, and the range begins where somewhat more than enough keys are to be expected. Keys from there on are kept in
//! shared memory, unless they are too many; if they turn out to be too few, or too many, all are counted: the choice is exact whatever the
//! sample says.

use super::lists::{self, Row};
use crate::common::block::{Gathered, bin_from_top, search_from_top, strided, sums_before};
use crate::common::radix::{self, BINS, COUNTS, Keys};
use crate::ops::top_k::TopKParams;
use crate::ops::top_k::cluster::*;
use crate::simt::data::V4;
use crate::simt::global::GlobalPtr;
use crate::simt::shared::Shared;
use crate::simt::{cluster, grid, thread, warp};

/// The block's share of a row's candidates.
struct Share<'a> {
    row: &'a Row<'a>,
    /// Votes of the row, by token.
    votes: GlobalPtr<f32>,
    /// First token, a multiple of 32, and one past the last. Those before the candidates are none.
    begin: u32,
    end: u32,
    /// Tokens of a share, but for the last ones.
    len: u32,
    /// How many contenders are kept: all keys from a bound on. None are, if that is `None`.
    kept: Option<u32>,
}

/// Votes that a thread has in flight: four from each of [`BATCH`] tokens on, NaN where there are none.
type Votes = [[f32; 4]; BATCH as usize];
/// From one of these tokens to the next.
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
/// - The buffers and tables are as [`TopKParams`] says; if `wanted` is [`COUNTS`], the votes have been counted.
/// - Launched with [`TopKParams::cluster_dims`].
pub unsafe fn choose_in_cluster(params: TopKParams) {
    thread::launch_bounds::<THREADS, BLOCKS_PER_SM>();
    let row = lists::row_of_block(&params);
    let prefetched = row.prefetch();
    let mut share = Share::of(&row);
    clear_marks(&share);
    grid::wait_for_previous();
    grid::launch_dependents();
    row.write_rest(&prefetched);
    if row.is_scored() {
        let mut range = Range::all(&share);
        if params.wanted == COUNTS {
            range = narrowed(&range, Keys::of_bin, find(load_counts(&params), range.rank));
        }
        let is_known = range.many <= KEPT;
        let stride = share.len.div_ceil(BLOCK_VOTES).max(1);
        if !is_known {
            put_sample(&share, stride);
            range = sampled_range(&share, stride);
        }
        let own = share.keep(range.keys.smallest);
        if !is_known && stride > 1 {
            range = checked_range(&mut share, range, own);
        }
        choose(&share, range);
    }
}

impl Range {
    /// That of all keys, of more than can be kept.
    fn all(share: &Share<'_>) -> Range {
        Range { keys: Keys { smallest: 0, largest: u32::MAX }, rank: share.row.chosen, many: u32::MAX }
    }
}

/// What is left of a range: its bin that has been found.
fn narrowed(range: &Range, keys: impl Fn(u32) -> Keys, (bin, rank, many): (u32, u32, u32)) -> Range {
    if many == 0 {
        return *range; // it has not so many keys
    }
    Range { keys: keys(bin), rank, many }
}

/// In place of the key of what is no candidate: no vote has it.
const NO_KEY: u32 = u32::MAX;

/// A place of the sample, which lies where contenders are kept later.
fn sample(i: u32) -> Shared<u32> {
    if i < KEPT { LAYOUT.own.get().add(i) } else { LAYOUT.tokens.get().add(i - KEPT) }
}

/// Puts keys of four votes of every `4 * stride` into the sample.
unsafe fn put_sample(share: &Share<'_>, stride: u32) {
    let first = share.first_of_thread(stride);
    let votes = share.load(first, stride * STEP);
    for b in 0..BATCH {
        for i in 0..4 {
            let is_there = share.is_candidate(first + b * stride * STEP + i);
            let key = if is_there { radix::key(votes[b as usize][i as usize]) } else { NO_KEY };
            sample((4 * b + i) * THREADS + thread::thread_idx_x()).store(key);
        }
    }
}

/// Where the threshold lies, as the blocks' samples tell, four votes of every `4 * stride`. Of all votes: a range of few keys, or of one
/// value. Else one that begins, as far as they tell, below the threshold, and has no end. All keys, if they cannot tell.
///
/// *Convergence:* aligned; every thread of the cluster.
unsafe fn sampled_range(share: &Share<'_>, stride: u32) -> Range {
    let all = Range::all(share);
    let (mut rank, mut few) = (all.rank, FEW);
    if stride > 1 {
        // A quarter more than enough, and what a sample of few may be off by.
        let expected = all.rank / stride;
        (rank, few) = (expected + expected / 4 + 32, expected / 8 + 32);
    }
    let histogram = LAYOUT.histogram.get();
    let mut range = Range { rank, ..all };
    let mut is_first = true;
    loop {
        clear(histogram);
        // A thread's own keys.
        for i in strided(thread::thread_idx_x(), BLOCK_VOTES, THREADS) {
            let key = sample(i).load();
            if key != NO_KEY && range.keys.contain(key) {
                let bin = if is_first { radix::bin(key) } else { range.keys.bin_of(key) };
                histogram.add(bin).atomic_add(1);
            }
        }
        let found = find(counts_of_cluster(), range.rank);
        let keys = range.keys;
        range = narrowed(&range, |bin| if is_first { Keys::of_bin(bin) } else { keys.narrowed(bin) }, found);
        if range.many <= few || range.many == u32::MAX || range.keys.smallest == range.keys.largest {
            break;
        }
        is_first = false;
    }
    thread::sync_threads(); // the sample is read no more
    if stride == 1 {
        range
    } else {
        Range { keys: Keys { smallest: range.keys.smallest, ..all.keys }, ..all }
    }
}

/// The range, with its end and the number of its keys, of which the block has `own`; or that of all keys, if the threshold lies below.
unsafe fn checked_range(share: &mut Share<'_>, range: Range, own: u32) -> Range {
    let (count, largest) = (LAYOUT.counts.get().add(3), LAYOUT.counts.get().add(4));
    if thread::thread_idx_x() == 0 {
        count.store(own);
    }
    cluster::sync();
    let num_blocks = cluster::num_blocks();
    let many = Gathered::load(count, num_blocks).before(num_blocks);
    let largest = Gathered::load(largest, num_blocks).max();
    if many >= range.rank && range.keys.smallest > 0 {
        return Range { many, keys: Keys { largest, ..range.keys }, ..range };
    }
    share.kept = None;
    Range::all(share)
}

/// Sets a histogram back to 0, before the block meets.
unsafe fn clear(histogram: Shared<u32>) {
    for bin in strided(thread::thread_idx_x(), BINS, THREADS) {
        histogram.add(bin).store(0);
    }
    thread::sync_threads();
}

/// Sums of the blocks' histograms in the thread's bins.
///
/// *Convergence:* aligned; every thread of the cluster.
unsafe fn counts_of_cluster() -> [u32; OWN_BINS] {
    /// Blocks whose counts a thread has in flight.
    const BLOCKS: usize = 4;
    const _: () = assert!(OWN_BINS == 4);

    // The thread's bins are adjacent, the last one first.
    let own = LAYOUT.histogram.get().add(bin_from_top::<OWN_BINS>(BINS, OWN_BINS - 1)).cast::<V4<u32>>();
    cluster::sync();
    let mut counts = [0; OWN_BINS];
    for first in strided(0, cluster::num_blocks(), BLOCKS as u32) {
        let mut of_blocks = [V4([0; 4]); BLOCKS];
        for i in 0..BLOCKS {
            if first + (i as u32) < cluster::num_blocks() {
                of_blocks[i] = own.of_block(first + i as u32).load();
            }
        }
        for i in 0..BLOCKS {
            for bin in 0..OWN_BINS {
                counts[bin] += of_blocks[i].0[OWN_BINS - 1 - bin];
            }
        }
    }
    cluster::sync();
    counts
}

unsafe fn choose(share: &Share<'_>, mut range: Range) {
    while range.keys.smallest < range.keys.largest && range.many > FEW {
        range = narrow(share, &range);
    }
    mark(share, &range);
    if range.keys.smallest < range.keys.largest {
        rank_few(share, &range);
        write_chosen(share, 0);
    } else {
        write_chosen(share, range.rank);
    }
}

impl<'a> Share<'a> {
    unsafe fn of(row: &'a Row<'a>) -> Share<'a> {
        let first = row.candidates.begin / 32 * 32;
        let all = row.candidates.end - first;
        let len = all.div_ceil(cluster::num_blocks().max(1)).div_ceil(32) * 32;
        let begin = first + (cluster::block_rank() * len).min(all.div_ceil(32) * 32);
        let votes = row.params.votes.add(row.params.batch.token_base(row.row));
        let end = (begin + len).min(row.candidates.end);
        Share { row, votes, begin, end, len, kept: None }
    }

    /// The first token that the thread looks at, of four in `4 * stride`.
    fn first_of_thread(&self, stride: u32) -> u32 {
        self.begin + 4 * stride * thread::thread_idx_x()
    }

    /// Four votes from token `first` on, from `first + step` on, and so on.
    unsafe fn load(&self, first: u32, step: u32) -> Votes {
        let aligned = self.votes.addr().is_multiple_of(16);
        let mut votes = [[f32::NAN; 4]; BATCH as usize];
        for b in 0..BATCH as usize {
            let token = first + b as u32 * step;
            let whole = token >= self.row.candidates.begin && token + 3 < self.end;
            if whole && aligned {
                votes[b] = self.votes.add(token as u64).cast::<V4<f32>>().load().0;
            } else if token < self.end {
                for i in 0..4 {
                    if self.is_candidate(token + i as u32) {
                        votes[b][i] = self.votes.add((token + i as u32) as u64).load();
                    }
                }
            }
        }
        votes
    }

    /// Words of the share's masks.
    fn words(&self) -> u32 {
        self.end.saturating_sub(self.begin).div_ceil(32)
    }

    /// Keeps all keys from `smallest` on, if that is not the smallest of all and there is room, and says how many they are.
    /// The largest of them is word 4 of [`counts`](Layout::counts).
    ///
    /// *Convergence:* aligned; every thread of the block.
    unsafe fn keep(&mut self, smallest: u32) -> u32 {
        let (keys, tokens) = (LAYOUT.own.get(), LAYOUT.tokens.get());
        let count = LAYOUT.counts.get();
        if smallest == 0 {
            self.kept = None;
            return 0;
        }
        let mut largest = 0;
        self.each_vote(smallest, |token, key| {
            largest = largest.max(key);
            let place = count.atomic_add(1);
            if place < KEPT {
                keys.add(place).store(key);
                tokens.add(place).store(token);
            }
        });
        let largest = warp::reduce_max(warp::FULL, largest);
        if warp::lane_id() == 0 {
            count.add(4).atomic_max(largest);
        }
        thread::sync_threads();
        let own = count.load();
        thread::sync_threads();
        if thread::thread_idx_x() == 0 {
            count.store(0);
        }
        thread::sync_threads();
        self.kept = (own <= KEPT).then_some(own);
        own
    }

    /// Calls `f` with each candidate of the share that is this thread's, and its key, if the key is no less than
    /// `smallest`; no less than that of [`keep`](Self::keep).
    #[inline(always)]
    unsafe fn each(&self, smallest: u32, mut f: impl FnMut(u32, u32)) {
        let Some(kept) = self.kept else { return self.each_vote(smallest, f) };
        for i in strided(thread::thread_idx_x(), kept, THREADS) {
            let key = LAYOUT.own.get().add(i).load();
            if key >= smallest {
                f(LAYOUT.tokens.get().add(i).load(), key);
            }
        }
    }

    /// As [`each`](Self::each), of the votes themselves.
    #[inline(always)]
    unsafe fn each_vote(&self, smallest: u32, mut f: impl FnMut(u32, u32)) {
        let (least, all) = (radix::least_vote(smallest), smallest == 0);
        let mut first = self.first_of_thread(1);
        while first < self.end {
            let votes = self.load(first, STEP);
            // What is not there is NaN, which has the smallest key. Few keys are large enough, and are loaded again.
            let mut found = 0u32;
            for b in 0..BATCH as usize {
                for i in 0..4 {
                    found |= ((all | (votes[b][i] >= least)) as u32) << (4 * b + i);
                }
            }
            while found != 0 {
                let bit = found.trailing_zeros();
                let token = first + bit / 4 * STEP + bit % 4;
                if self.is_candidate(token) {
                    // Its address comes from the votes themselves.
                    f(token, radix::key(self.votes.add(token as u64).load_settled()));
                }
                found &= found - 1;
            }
            first += BATCH * STEP;
        }
    }

    fn is_candidate(&self, token: u32) -> bool {
        token >= self.row.candidates.begin && token < self.end
    }

    /// The words of the masks that are this thread's: adjacent ones, in the order of the threads.
    fn own_words(&self) -> (u32, u32) {
        let words = self.words();
        let run = words.div_ceil(THREADS);
        let begin = (thread::thread_idx_x() * run).min(words);
        (begin, (begin + run).min(words))
    }
}

/// Bins of a thread.
const OWN_BINS: usize = (BINS / THREADS) as usize;

/// Counts of the row's votes in the thread's bins.
unsafe fn load_counts(params: &TopKParams) -> [u32; OWN_BINS] {
    let of_row = params.radix.histogram.add(thread::block_idx_y() as u64 * BINS as u64);
    let mut counts = [0; OWN_BINS];
    for i in 0..OWN_BINS {
        counts[i] = of_row.add(bin_from_top::<OWN_BINS>(BINS, i) as u64).load();
    }
    counts
}

/// The bin at which the sum of the counts from the top reaches `rank`, the rank within it, and its count: 0 if the sum does not.
///
/// *Convergence:* aligned; every thread of the block, which has met since the last call.
unsafe fn find(counts: [u32; OWN_BINS], rank: u32) -> (u32, u32, u32) {
    let found = LAYOUT.found.get();
    if thread::thread_idx_x() < 3 {
        found.add(thread::thread_idx_x()).store(0);
    }
    search_from_top(LAYOUT.warps.get(), counts, rank, |i, rank, count| {
        found.store(bin_from_top::<OWN_BINS>(BINS, i));
        found.add(1).store(rank);
        found.add(2).store(count);
    });
    thread::sync_threads();
    (found.load(), found.add(1).load(), found.add(2).load())
}

/// Sets all marks back to 0, before the block meets and marks others.
unsafe fn clear_marks(share: &Share<'_>) {
    for word in strided(thread::thread_idx_x(), share.words(), THREADS) {
        LAYOUT.above.get().add(word).store(0);
        LAYOUT.within.get().add(word).store(0);
    }
    if thread::thread_idx_x() == 0 {
        LAYOUT.counts.get().store(0);
        LAYOUT.counts.get().add(4).store(0);
    }
}

/// Marks the tokens above the range and in it, and writes down those in it if they are few. There are no marks yet.
unsafe fn mark(share: &Share<'_>, range: &Range) {
    let (above, within, count) = (LAYOUT.above.get(), LAYOUT.within.get(), LAYOUT.counts.get());
    let (own, tokens) = (LAYOUT.own.get(), LAYOUT.tokens.get());
    let (keys, few) = (range.keys, range.many <= FEW);
    let mark = |token: u32, key: u32| {
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
    };
    let Some(kept) = share.kept else {
        share.each_vote(keys.smallest, mark);
        return thread::sync_threads();
    };
    // Round by round, since what is written down takes the places of those that have been read.
    for first in strided(0, kept, THREADS) {
        let i = first + thread::thread_idx_x();
        let (mut key, mut token) = (0, 0);
        if i < kept {
            (key, token) = (own.add(i).load(), tokens.add(i).load());
        }
        thread::sync_threads();
        if i < kept && key >= keys.smallest {
            mark(token, key);
        }
        thread::sync_threads();
    }
}

/// The bin of the range that the threshold lies in. Its keys are counted by all blocks.
unsafe fn narrow(share: &Share<'_>, range: &Range) -> Range {
    let (histogram, keys) = (LAYOUT.histogram.get(), range.keys);
    clear(histogram);
    share.each(keys.smallest, |_, key| {
        if key <= keys.largest {
            histogram.add(keys.bin_of(key)).atomic_add(1);
        }
    });
    let counts = counts_of_cluster();
    narrowed(range, |bin| keys.narrowed(bin), find(counts, range.rank))
}

/// Marks those chosen among few tokens in the range as if they were above it: every block brings the keys of all
/// together, and ranks its own.
unsafe fn rank_few(share: &Share<'_>, range: &Range) {
    let (own, tokens, all) = (LAYOUT.own.get(), LAYOUT.tokens.get(), LAYOUT.all.get());
    let count = LAYOUT.counts.get();
    cluster::sync();
    // Some warps copy the keys of a block, to behind those of the blocks before it.
    let (warp, lane, num_blocks) = (warp::warp_id(), warp::lane_id(), cluster::num_blocks().max(1));
    let counts = Gathered::load(count, num_blocks);
    let (block, turn) = (warp % num_blocks, warp / num_blocks);
    let (to, many) = (counts.before(block), counts.of(block));
    for i in strided(turn * warp::SIZE + lane, many, THREADS / num_blocks) {
        all.add(to + i).store(own.add(i).of_block(block).load());
    }
    // Behind the last come keys below all others, up to a multiple of what a lane compares at a time.
    if thread::thread_idx_x() < FEW.min(range.many.next_multiple_of(4)) - range.many {
        all.add(range.many + thread::thread_idx_x()).store(0);
    }
    // Equal keys of blocks before this one come first.
    let (earlier, mine) = (counts.before(cluster::block_rank()), count.load());
    thread::sync_threads();
    for i in strided(warp, mine, THREADS / warp::SIZE) {
        let (key, token) = (own.add(i).load(), tokens.add(i).load());
        let mut before = 0;
        for other in strided(4 * lane, range.many, 4 * warp::SIZE) {
            let others = all.add(other).cast::<V4<u32>>().load().0;
            for j in 0..4 {
                before += (others[j] > key || (others[j] == key && other + (j as u32) < earlier)) as u32;
            }
        }
        for other in strided(lane, mine, warp::SIZE) {
            before += (own.add(other).load() == key && tokens.add(other).load() < token) as u32;
        }
        let before = warp::reduce_add(warp::FULL, before);
        if lane == 0 && before < range.rank {
            LAYOUT.above.get().add((token - share.begin) / 32).atomic_add(1 << (token % 32));
        }
    }
    thread::sync_threads();
}

/// Writes the marked tokens in order: all above the range, and the first `ties` in it.
unsafe fn write_chosen(share: &Share<'_>, ties: u32) {
    let (above, within) = (LAYOUT.above.get(), LAYOUT.within.get());
    let (begin, end) = share.own_words();
    let (mut higher, mut equal) = (0, 0);
    for word in begin..end {
        higher += above.add(word).load().count_ones();
        equal += if ties > 0 { within.add(word).load().count_ones() } else { 0 };
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
    let rank = cluster::block_rank();
    let (higher, equal) = (Gathered::load(counts.add(1), rank), Gathered::load(counts.add(2), rank));
    let (mut higher, mut equal) = (higher_before + higher.before(rank), equal_before + equal.before(rank));
    if rank == 0 {
        clear_counts(share.row);
    }
    for word in begin..end {
        let bits = above.add(word).load();
        let mut left = bits | if ties > 0 { within.add(word).load() } else { 0 };
        while left != 0 {
            let bit = left.trailing_zeros();
            let is_higher = bits >> bit & 1 == 1;
            if is_higher || equal < ties {
                let index = higher + equal.min(ties);
                share.row.choose(index, share.begin + word * 32 + bit);
            }
            higher += is_higher as u32;
            equal += !is_higher as u32;
            left &= left - 1;
        }
    }
    cluster::meet(); // no block ends while others read from it
}

/// Sets the row's counts of votes back to 0, when every block has read them.
unsafe fn clear_counts(row: &Row<'_>) {
    let of_row = row.params.radix.histogram.add(row.row as u64 * BINS as u64);
    for bin in strided(thread::thread_idx_x(), BINS, THREADS) {
        of_row.add(bin as u64).store(0);
    }
}
