//! Softmax statistics: of the logits of a head over a chunk of candidates, and over all chunks of a row.
//!
//! The chunks of a row depend on its candidates alone, and are folded in a fixed order, so the statistics have the same
//! bits for every launch shape, whoever folds them.

use super::{THREADS, max_chunks};
use crate::layout::{LOGIT_TILE, Tokens};
use crate::simt::data::V2;
use crate::simt::global::GlobalMut;
use crate::simt::shared::Region;
use crate::simt::{math, thread, warp};

/// Running statistics of a head: the largest logit and the sum of exponentials below it.
#[derive(Clone, Copy)]
pub(crate) struct Stats {
    pub max: f32,
    pub sum: f32,
}

impl Stats {
    pub const EMPTY: Stats = Stats { max: f32::NEG_INFINITY, sum: 0.0 };

    /// `exp(x - max)` as it counts in a sum: NaN as absent, an infinite maximum as the limit of a large one.
    #[inline(always)]
    fn term(x: f32, max: f32) -> f32 {
        let e = math::ex2((x - max) * core::f32::consts::LOG2_E);
        let number = if x.is_nan() { 0.0 } else { e };
        if x == max { 1.0 } else { number }
    }

    /// [`term`](Self::term) of a maximum, which is a number.
    #[inline(always)]
    fn ratio(x: f32, max: f32) -> f32 {
        if x == max { 1.0 } else { math::ex2((x - max) * core::f32::consts::LOG2_E) }
    }

    /// Counts one logit.
    #[inline(always)]
    pub fn push(&mut self, logit: f32) {
        if logit > self.max {
            self.sum *= Stats::ratio(self.max, logit);
            self.max = logit;
        }
        self.sum += Stats::term(logit, self.max);
    }

    /// With the statistics of other logits taken in.
    #[inline(always)]
    pub fn merge(self, other: Stats) -> Stats {
        let max = self.max.max(other.max);
        Stats { max, sum: self.sum * Stats::ratio(self.max, max) + other.sum * Stats::ratio(other.max, max) }
    }

    /// Merged with those of the lane at `distance`.
    #[inline(always)]
    pub unsafe fn merge_lane(self, distance: u32) -> Stats {
        let max = warp::shuffle_xor(warp::FULL, self.max, distance);
        let sum = warp::shuffle_xor(warp::FULL, self.sum, distance);
        self.merge(Stats { max, sum })
    }
}

/// The statistics of a row's chunks, `[chunk, num_qo_heads]` in device memory.
#[derive(Clone, Copy)]
pub(crate) struct Chunks {
    of_row: GlobalMut<V2<f32>>,
    count: u32,
    pub num_qo_heads: u32,
}

/// How many chunks candidates form whose tiles are of `tokens` tokens.
#[inline(always)]
pub(crate) fn num_chunks(candidates: Tokens, tokens: u32, num_kv_heads: u32) -> u32 {
    let first = candidates.begin / LOGIT_TILE * LOGIT_TILE;
    (candidates.end - first).div_ceil(tokens).min(max_chunks(num_kv_heads.max(1)))
}

impl Chunks {
    /// Those of row `row`, `count` of them, within `partial`, which has room for [`max_chunks`] of each row.
    #[inline(always)]
    pub fn new(partial: GlobalMut<f32>, row: u32, num_kv_heads: u32, group: u32, count: u32) -> Chunks {
        let num_qo_heads = num_kv_heads * group;
        let before = row as u64 * max_chunks(num_kv_heads.max(1)) as u64 * num_qo_heads as u64;
        Chunks { of_row: partial.cast::<V2<f32>>().add(before), count, num_qo_heads }
    }

    /// Writes those of a head over one chunk.
    ///
    /// # Safety
    /// - The chunk is one of the row's, the head one of the query heads.
    #[inline(always)]
    pub unsafe fn store(&self, chunk: u32, head: u32, stats: Stats) {
        self.of_row.add((chunk * self.num_qo_heads + head) as u64).store(V2([stats.max, stats.sum]));
    }

    /// Gives `store` each head and its statistics over all chunks, once, and returns true; or does nothing and returns
    /// false, if `is_wanted` says so, which is asked when the first loads are under way. With 32 heads, eight threads share a
    /// head and each takes every eighth chunk. Threads beyond [`THREADS`] only meet the others. `place`: a place for each of
    /// those.
    ///
    /// *Convergence:* aligned; every thread of the block.
    ///
    /// # Safety
    /// - Every thread of the block, of at least [`THREADS`], calls it, and `is_wanted` says the same to all.
    /// - The statistics of all chunks are there, if they are wanted.
    #[inline(always)]
    pub unsafe fn fold(
        &self,
        place: Region<V2<f32>>,
        is_wanted: impl Fn() -> bool,
        mut store: impl FnMut(u32, Stats),
    ) -> bool {
        let num_qo_heads = self.num_qo_heads.max(1);
        let thread = thread::thread_idx_x();
        let parts = (THREADS / num_qo_heads).max(1);
        let shared = place.get();
        let (part, mut head) = (thread / num_qo_heads, thread % num_qo_heads);
        let rounds = num_qo_heads.div_ceil(THREADS);
        let mut round = 0;
        while round < rounds {
            let works = thread < THREADS && part < parts && head < num_qo_heads;
            let Some(stats) = self.fold_part(head, part, parts, works, &is_wanted) else { return false };
            if thread < THREADS {
                shared.add(thread).store(V2([stats.max, stats.sum]));
            }
            thread::sync_threads();
            if works && part == 0 {
                let mut merged = stats;
                let mut other = 1;
                while other < parts {
                    let [max, sum] = shared.add(other * num_qo_heads + thread).load().0;
                    merged = merged.merge(Stats { max, sum });
                    other += 1;
                }
                store(head, merged);
            }
            thread::sync_threads();
            head += THREADS;
            round += 1;
        }
        true
    }

    /// Statistics of a head over the chunks `part`, `part + parts`, ... Many loads are under way at a time, and their sums
    /// wait for the largest of their maxima alone, not for each other. (The one loop has the only loads: were there others
    /// elsewhere, the compiler would keep all their places in registers.)
    #[inline(always)]
    unsafe fn fold_part(
        &self,
        head: u32,
        part: u32,
        parts: u32,
        works: bool,
        is_wanted: &impl Fn() -> bool,
    ) -> Option<Stats> {
        const BATCH: usize = 34;
        // Places in the table, and not chunks, are counted: one sum serves the address and the test for the end.
        let (step, end) = (parts * self.num_qo_heads, if works { self.count * self.num_qo_heads } else { 0 });
        let mut place = part * self.num_qo_heads + head;
        let mut at = self.of_row.add(place as u64);
        let mut stats = Stats::EMPTY;
        loop {
            let mut batch = [Stats::EMPTY; BATCH];
            let mut i = 0;
            while i < BATCH {
                if place < end {
                    let [max, sum] = at.load().0;
                    batch[i] = Stats { max, sum };
                }
                (place, at) = (place + step, at.add(step as u64));
                i += 1;
            }
            if !is_wanted() {
                return None;
            }
            let mut max = stats.max;
            let mut i = 0;
            while i < BATCH {
                max = max.max(batch[i].max);
                i += 1;
            }
            let mut sum = stats.sum * Stats::ratio(stats.max, max);
            let mut i = 0;
            while i < BATCH {
                sum += batch[i].sum * Stats::ratio(batch[i].max, max);
                i += 1;
            }
            stats = Stats { max, sum };
            if place >= end {
                return Some(stats);
            }
        }
    }
}
