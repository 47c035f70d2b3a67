//! Softmax statistics: of the logits of a head over a chunk of candidates, and over all chunks of a row.
//!
//! The chunks of a row depend on its candidates alone, and are folded in a fixed order, so the statistics have the same
//! bits for every launch shape, whichever kernel folds them.

use crate::common::block::strided;
use crate::common::layout::{LOGIT_TILE, Tokens};
use crate::common::softmax::VoteSoftmax;
use crate::ops::score::{THREADS, max_chunks};
use crate::simt::data::V2;
use crate::simt::global::GlobalMut;
use crate::simt::shared::Region;
use crate::simt::thread;

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
    pub unsafe fn store(&self, chunk: u32, head: u32, stats: VoteSoftmax) {
        self.of_row.add((chunk * self.num_qo_heads + head) as u64).store(V2([stats.max, stats.sum]));
    }

    /// Gives `store` each head and its statistics over all chunks, once, and returns true; or does nothing and returns
    /// false, if `is_wanted` says so, which is asked when the first loads are in flight. With 32 heads, eight threads share a
    /// head and each takes every eighth chunk. Threads beyond [`THREADS`] only meet the others. `scratch`: an entry for each of
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
        scratch: Region<V2<f32>>,
        is_wanted: impl Fn() -> bool,
        mut store: impl FnMut(u32, VoteSoftmax),
    ) -> bool {
        /// Threads beside the first that share a head of 32.
        const OTHERS: usize = 7;

        let num_qo_heads = self.num_qo_heads.max(1);
        let thread = thread::thread_idx_x();
        let turns = (THREADS / num_qo_heads).max(1);
        let scratch = scratch.get();
        let (turn, mut head) = (thread / num_qo_heads, thread % num_qo_heads);
        for _ in 0..num_qo_heads.div_ceil(THREADS) {
            let works = thread < THREADS && turn < turns && head < num_qo_heads;
            let Some(mut stats) = self.fold_turn(head, turn, turns, works, &is_wanted) else { return false };
            if thread < THREADS {
                scratch.add(thread).store(V2([stats.max, stats.sum]));
            }
            thread::sync_threads();
            if works && turn == 0 {
                for first in strided(1, turns, OTHERS as u32) {
                    let mut others = [VoteSoftmax::EMPTY; OTHERS];
                    for i in 0..OTHERS {
                        let other = first + i as u32;
                        if other < turns {
                            let [max, sum] = scratch.add(other * num_qo_heads + thread).load().0;
                            others[i] = VoteSoftmax { max, sum };
                        }
                    }
                    for i in 0..OTHERS {
                        stats.merge([others[i]]);
                    }
                }
                store(head, stats);
            }
            thread::sync_threads();
            head += THREADS;
        }
        true
    }

    /// Statistics of a head over the chunks `turn`, `turn + turns`, ... Many loads are in flight at a time. (The one loop has the
    /// only loads: were there others elsewhere, the compiler would keep all their addresses in registers.)
    #[inline(always)]
    unsafe fn fold_turn(
        &self,
        head: u32,
        turn: u32,
        turns: u32,
        works: bool,
        is_wanted: &impl Fn() -> bool,
    ) -> Option<VoteSoftmax> {
        const BATCH: usize = 34;
        // Offsets in the table, and not chunks, are counted: one sum serves the address and the test for the end.
        let (step, end) = (turns * self.num_qo_heads, if works { self.count * self.num_qo_heads } else { 0 });
        let mut offset = turn * self.num_qo_heads + head;
        let mut at = self.of_row.add(offset as u64);
        let mut stats = VoteSoftmax::EMPTY;
        loop {
            let mut batch = [VoteSoftmax::EMPTY; BATCH];
            for i in 0..BATCH {
                if offset < end {
                    let [max, sum] = at.load().0;
                    batch[i] = VoteSoftmax { max, sum };
                }
                (offset, at) = (offset + step, at.add(step as u64));
            }
            if !is_wanted() {
                return None;
            }
            stats.merge(batch);
            if offset >= end {
                return Some(stats);
            }
        }
    }
}
