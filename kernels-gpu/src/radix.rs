//! Where the `k`-th largest vote of a row lies: one pass over the votes, with a histogram.
//!
//! A vote becomes a 32-bit key that ascends as votes do, with NaN below everything. Votes are sums of probabilities, so
//! keys are counted in bins of a 64th of an octave from 2^-31 to 2, and whatever is smaller or larger in the bins at the
//! ends. The last block of a row finds the bin in which the `k`-th key lies. [`top_k`](mod@crate::top_k) looks closer, with
//! another such pass where a bin has many keys.
//! Counts are integers, so the result has no order of additions in it, and no table limits how many keys share a bin.

use crate::launch::GpuInfo;
use crate::simt::data::V4;
use crate::simt::global::GlobalMut;
use crate::simt::shared::{Carve, Region};

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Bins.
pub const BINS: u32 = 1 << BINS_LOG2;
const BINS_LOG2: u32 = 11;
/// Bits of a key below those that tell its bin.
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub(crate) const BIN_SHIFT: u32 = 17;
/// The key of 2^-31, the smallest of bin 1 less one bin.
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
const LOWEST: u32 = 1 << 31 | (127 - 31) << 23;
/// Candidates that are a block's share at least, and a divisor of every share: what the warps of [`vote`](mod@crate::vote)
/// have under way.
const SHARE: u32 = 256;
/// Blocks of an SM.
const BLOCKS_PER_SM: u32 = 2;

/// Votes are not counted,
pub const NO_COUNTS: u32 = 0;
/// counted for a launch that finds the bin itself, or
pub const COUNTS: u32 = 1;
/// counted, and the bin is found.
pub const BIN: u32 = 2;

/// Whether the launch that chooses among so many tokens of so many rows finds the bin itself, or wants it found.
pub const fn wanted_counts(gpu: &GpuInfo, num_rows: u32, max_tokens: u32) -> u32 {
    if crate::top_k::cluster_dims(gpu, num_rows, max_tokens).is_some() { COUNTS } else { BIN }
}

/// Workspace of the search for a bin.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct RadixTables {
    /// \[num_rows, BINS\] u32, zero before and after a selection.
    pub histogram: GlobalMut<u32>,
    /// \[num_rows, 4\] u32: the smallest and the largest key between which the `k`-th largest lies, its rank (from 1, from
    /// the top) among the keys between them, and how many these are.
    pub state: GlobalMut<V4<u32>>,
    /// \[num_rows\] u32, zero before and after each launch.
    pub counters: GlobalMut<u32>,
}
const _: () = assert!(size_of::<RadixTables>() == 24);

/// Shared memory of a block.
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
pub(crate) struct Layout {
    histogram: Region<u32>,
    warps: Region<u32>,
    pub bytes: u32,
}

pub(crate) const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout { histogram: carve.array(BINS, 16), warps: carve.array(THREADS / 32, 16), bytes: carve.bytes() }
};

/// Blocks that share a row of up to `max_tokens` candidates, so that all rows together fill the device.
pub const fn blocks_of_row(gpu: &GpuInfo, num_rows: u32, max_tokens: u32) -> u32 {
    let fair = (gpu.num_sms * BLOCKS_PER_SM).div_ceil(num_rows);
    let useful = max_tokens.div_ceil(SHARE);
    let blocks = if fair < useful { fair } else { useful };
    if blocks == 0 { 1 } else { blocks }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub(crate) use machine::*;

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod machine {
    use super::*;
    use crate::layout::{LOGIT_TILE, Tokens};
    use crate::simt::shared::Shared;
    use crate::simt::{grid, thread, warp};

    /// Bits that ascend as votes do; equal for -0 and 0, 0 for NaN.
    #[inline(always)]
    pub fn key(vote: f32) -> u32 {
        if vote.is_nan() {
            return 0;
        }
        let bits = (vote + 0.0).to_bits(); // -0 becomes 0
        if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
    }

    /// The votes that reach a key other than 0, that of NaN, are those of at least this.
    #[inline(always)]
    pub fn least_vote(key: u32) -> f32 {
        /// That of the smallest number.
        const SMALLEST: u32 = !f32::NEG_INFINITY.to_bits();
        let key = key.max(SMALLEST);
        // Beyond the key of infinity this is NaN, which no vote reaches.
        f32::from_bits(if key >> 31 == 1 { key & !(1 << 31) } else { !key })
    }

    /// The bin of a key; ascends as keys do.
    #[inline(always)]
    pub fn bin(key: u32) -> u32 {
        (key.saturating_sub(LOWEST) >> BIN_SHIFT).min(BINS - 1)
    }

    /// A range of keys, both ends included.
    #[derive(Clone, Copy)]
    pub struct Keys {
        pub smallest: u32,
        pub largest: u32,
    }

    impl Keys {
        /// The keys of a bin.
        #[inline(always)]
        pub fn of_bin(bin: u32) -> Keys {
            let from = |bin: u32| LOWEST + (bin << BIN_SHIFT);
            Keys {
                smallest: if bin == 0 { 0 } else { from(bin) },
                largest: if bin == BINS - 1 { u32::MAX } else { from(bin + 1) - 1 },
            }
        }

        /// Whether `key` is one of them.
        #[inline(always)]
        pub fn contain(self, key: u32) -> bool {
            key >= self.smallest && key <= self.largest
        }

        /// Bits of a key below those that tell which of up to [`BINS`] parts of the range it lies in.
        #[inline(always)]
        pub fn part_shift(self) -> u32 {
            (32 - (self.largest - self.smallest).leading_zeros()).saturating_sub(BINS_LOG2)
        }

        /// The part of the range that a key of it lies in; ascends as keys do.
        #[inline(always)]
        pub fn part_of(self, key: u32) -> u32 {
            (key - self.smallest) >> self.part_shift()
        }

        /// The keys of a part.
        #[inline(always)]
        pub fn part(self, part: u32) -> Keys {
            let shift = self.part_shift();
            let smallest = self.smallest + (part << shift);
            Keys { smallest, largest: smallest.saturating_add((1 << shift) - 1).min(self.largest) }
        }
    }

    /// Part of a row's candidates that block `block` of `num_blocks` works on: ascending with the block. Shares begin at
    /// multiples of 16, but for the first.
    #[inline(always)]
    pub fn share(candidates: Tokens, block: u32, num_blocks: u32) -> Tokens {
        let first = candidates.begin / LOGIT_TILE * LOGIT_TILE;
        let len = (candidates.end - first).div_ceil(num_blocks).next_multiple_of(SHARE);
        let begin = first + (block * len).min(candidates.end - first);
        let end = (begin + len).min(candidates.end);
        Tokens { begin: begin.max(candidates.begin), end }
    }

    /// The counts of one block, in shared memory.
    #[derive(Clone, Copy)]
    pub struct Histogram(Shared<u32>);

    impl Histogram {
        /// All counts 0.
        ///
        /// *Convergence:* aligned; every thread of the block.
        ///
        /// # Safety
        /// - Every thread of the block calls it, and none uses the block's shared memory meanwhile.
        #[inline(always)]
        pub unsafe fn clear() -> Self {
            let bins = LAYOUT.histogram.get();
            let mut bin = thread::thread_idx_x();
            while bin < BINS {
                bins.add(bin).store(0);
                bin += THREADS;
            }
            thread::sync_threads();
            Histogram(bins)
        }

        /// Counts a key of bin, or part, `bin`.
        ///
        /// # Safety
        /// - After [`clear`](Self::clear), before [`finish`](Self::finish); `bin < BINS`.
        #[inline(always)]
        pub unsafe fn count(self, bin: u32) {
            self.0.add(bin).atomic_add(1);
        }

        /// Adds the block's counts to those of the row.
        ///
        /// *Convergence:* aligned; every thread of the block.
        ///
        /// # Safety
        /// - Every thread of the block calls it, once, with the same arguments.
        #[inline(always)]
        pub unsafe fn add_to_row(self, tables: &RadixTables, row: u32) {
            thread::sync_threads();
            let of_row = tables.histogram.add(row as u64 * BINS as u64);
            let mut bin = thread::thread_idx_x();
            while bin < BINS {
                let count = self.0.add(bin).load();
                if count > 0 {
                    of_row.add(bin as u64).atomic_add(count);
                }
                bin += THREADS;
            }
        }

        /// [`add_to_row`](Self::add_to_row) if `wanted` is [`COUNTS`], [`find_bin`](Self::find_bin) if it is [`BIN`].
        ///
        /// *Convergence:* aligned; every thread of the block.
        ///
        /// # Safety
        /// - As for [`find_bin`](Self::find_bin).
        #[inline(always)]
        pub unsafe fn finish(self, tables: &RadixTables, row: u32, rank: u32, wanted: u32) {
            match wanted {
                BIN => self.find_bin(tables, row, rank, Keys::of_bin),
                COUNTS => self.add_to_row(tables, row),
                _ => {}
            }
        }

        /// [`add_to_row`](Self::add_to_row); the row's last block finds the bin of the key of rank `rank`, writes the state,
        /// and sets the row's counts back to 0. `keys` tells the keys of a bin.
        ///
        /// *Convergence:* aligned; every thread of the block.
        ///
        /// # Safety
        /// - Every thread of the block calls it, once, with the same arguments, and so does every block of the row.
        /// - At least `rank > 0` keys are counted.
        #[inline(always)]
        pub unsafe fn find_bin(self, tables: &RadixTables, row: u32, rank: u32, keys: impl Fn(u32) -> Keys) {
            self.add_to_row(tables, row);
            let of_row = tables.histogram.add(row as u64 * BINS as u64);
            if grid::is_last_block(tables.counters.add(row as u64), thread::grid_dim_x()) {
                find(of_row, tables.state.add(row as u64), rank, keys);
            }
        }
    }

    /// Finds the bin, writes the state, and sets the row's counts back to 0. Each thread takes eight bins, the first thread
    /// the topmost.
    #[inline(always)]
    unsafe fn find(of_row: GlobalMut<u32>, state: GlobalMut<V4<u32>>, rank: u32, keys: impl Fn(u32) -> Keys) {
        const BINS_OF_THREAD: usize = (BINS / THREADS) as usize;
        let top = BINS - 1 - thread::thread_idx_x() * BINS_OF_THREAD as u32;
        let mut counts = [0; BINS_OF_THREAD];
        let mut sum = 0;
        let mut i = 0;
        while i < BINS_OF_THREAD {
            let bin = of_row.add((top - i as u32) as u64);
            counts[i] = bin.load();
            bin.store(0);
            sum += counts[i];
            i += 1;
        }
        let (mut above, _) = sums_before(LAYOUT.warps.get(), THREADS / warp::SIZE, sum);
        let mut i = 0;
        while i < BINS_OF_THREAD {
            if above < rank && rank <= above + counts[i] {
                let Keys { smallest, largest } = keys(top - i as u32);
                state.store(V4([smallest, largest, rank - above, counts[i]]));
            }
            above += counts[i];
            i += 1;
        }
    }

    /// The sum of `value` over the threads before this one, and over all, by way of `warps`, a word for each of the
    /// block's `num_warps` warps, at most 32.
    ///
    /// *Convergence:* aligned; every thread of the block.
    ///
    /// # Safety
    /// - Every thread of the block calls it, with the same arguments but for `value`; none uses `warps` otherwise.
    #[inline(always)]
    pub unsafe fn sums_before(warps: Shared<u32>, num_warps: u32, value: u32) -> (u32, u32) {
        let lane = warp::lane_id();
        let mut up_to = value;
        let mut distance = 1;
        while distance < warp::SIZE {
            let other = warp::shuffle_up(warp::FULL, up_to, distance);
            up_to += if lane >= distance { other } else { 0 };
            distance *= 2;
        }
        thread::sync_threads();
        if lane == warp::SIZE - 1 {
            warps.add(warp::warp_id()).store(up_to);
        }
        thread::sync_threads();
        let sum = if lane < num_warps { warps.add(lane).load() } else { 0 };
        let before = warp::reduce_add(warp::FULL, if lane < warp::warp_id() { sum } else { 0 });
        (before + up_to - value, warp::reduce_add(warp::FULL, sum))
    }
}
