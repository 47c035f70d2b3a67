//! Keys of votes, shares of candidates, and the histogram of a block.

use super::{BIN, BIN_SHIFT, BINS, BINS_LOG2, COUNTS, LAYOUT, LOWEST, RadixTables, SHARE, THREADS};
use crate::common::block::{bin_from_top, search_from_top, strided};
use crate::common::layout::{LOGIT_TILE, Tokens};
use crate::simt::data::V4;
use crate::simt::global::GlobalMut;
use crate::simt::shared::Shared;
use crate::simt::{grid, thread};

/// Bits that ascend as votes do; equal for -0 and 0, 0 for NaN.
pub fn key(vote: f32) -> u32 {
    if vote.is_nan() {
        return 0;
    }
    let bits = (vote + 0.0).to_bits(); // -0 becomes 0
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// The votes that reach a key other than 0, that of NaN, are those of at least this.
pub fn least_vote(key: u32) -> f32 {
    /// That of the smallest number.
    const SMALLEST: u32 = !f32::NEG_INFINITY.to_bits();
    let key = key.max(SMALLEST);
    // Beyond the key of infinity this is NaN, which no vote reaches.
    f32::from_bits(if key >> 31 == 1 { key & !(1 << 31) } else { !key })
}

/// The bin of a key; ascends as keys do.
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
    pub fn of_bin(bin: u32) -> Keys {
        let from = |bin: u32| LOWEST + (bin << BIN_SHIFT);
        Keys {
            smallest: if bin == 0 { 0 } else { from(bin) },
            largest: if bin == BINS - 1 { u32::MAX } else { from(bin + 1) - 1 },
        }
    }

    /// Whether `key` is one of them.
    pub fn contain(self, key: u32) -> bool {
        key >= self.smallest && key <= self.largest
    }

    /// Bits of a key below those that tell which of up to [`BINS`] bins of the range it lies in.
    fn shift(self) -> u32 {
        (32 - (self.largest - self.smallest).leading_zeros()).saturating_sub(BINS_LOG2)
    }

    /// The bin of the range that a key of it lies in; ascends as keys do.
    pub fn bin_of(self, key: u32) -> u32 {
        (key - self.smallest) >> self.shift()
    }

    /// The keys of a bin of the range.
    pub fn narrowed(self, bin: u32) -> Keys {
        let shift = self.shift();
        let smallest = self.smallest + (bin << shift);
        Keys { smallest, largest: smallest.saturating_add((1 << shift) - 1).min(self.largest) }
    }
}

/// *Share*: the candidates of a row that block `block` of `num_blocks` works on: ascending with the block. Shares begin at
/// multiples of 16, but for the first.
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
    pub unsafe fn clear() -> Self {
        let bins = LAYOUT.histogram.get();
        for bin in strided(thread::thread_idx_x(), BINS, THREADS) {
            bins.add(bin).store(0);
        }
        thread::sync_threads();
        Histogram(bins)
    }

    /// Counts a key of bin `bin`.
    ///
    /// # Safety
    /// - After [`clear`](Self::clear), before [`finish`](Self::finish); `bin < BINS`.
    pub unsafe fn count(self, bin: u32) {
        self.0.add(bin).atomic_add(1);
    }

    /// Adds the block's counts to those of the row.
    ///
    /// *Convergence:* aligned; every thread of the block.
    ///
    /// # Safety
    /// - Every thread of the block calls it, once, with the same arguments.
    pub unsafe fn add_to_row(self, tables: &RadixTables, row: u32) {
        thread::sync_threads();
        let of_row = tables.histogram.add(row as u64 * BINS as u64);
        for bin in strided(thread::thread_idx_x(), BINS, THREADS) {
            let count = self.0.add(bin).load();
            if count > 0 {
                of_row.add(bin as u64).atomic_add(count);
            }
        }
    }

    /// [`add_to_row`](Self::add_to_row) if `wanted` is [`COUNTS`], [`find_bin`](Self::find_bin) if it is [`BIN`].
    ///
    /// *Convergence:* aligned; every thread of the block.
    ///
    /// # Safety
    /// - As for [`find_bin`](Self::find_bin).
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
    pub unsafe fn find_bin(self, tables: &RadixTables, row: u32, rank: u32, keys: impl Fn(u32) -> Keys) {
        self.add_to_row(tables, row);
        let of_row = tables.histogram.add(row as u64 * BINS as u64);
        if grid::is_last_block(tables.counters.add(row as u64), thread::grid_dim_x()) {
            find(of_row, tables.state.add(row as u64), rank, keys);
        }
    }
}

/// Finds the bin, writes the state, and sets the row's counts back to 0.
unsafe fn find(of_row: GlobalMut<u32>, state: GlobalMut<V4<u32>>, rank: u32, keys: impl Fn(u32) -> Keys) {
    const OWN_BINS: usize = (BINS / THREADS) as usize;
    let mut counts = [0; OWN_BINS];
    for i in 0..OWN_BINS {
        let bin = of_row.add(bin_from_top::<OWN_BINS>(BINS, i) as u64);
        counts[i] = bin.load();
        bin.store(0);
    }
    search_from_top(LAYOUT.warps.get(), counts, rank, |i, rank, count| {
        let Keys { smallest, largest } = keys(bin_from_top::<OWN_BINS>(BINS, i));
        state.store(V4([smallest, largest, rank, count]));
    });
}
