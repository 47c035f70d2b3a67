//! Whether a row's cached selection may serve again, and what is to be done for the row.

use crate::common::layout::{Row, Tokens};
use crate::ops::pool::*;

/// What is known of a row's cached selection.
#[derive(Clone, Copy)]
pub(crate) struct Cached {
    /// Its entry in the cached tables; [`EMPTY`] for none.
    pub entry: u32,
    made_at: u32,
    age: u32,
    /// Its first token and its last.
    first: u32,
    last: u32,
}

impl Cached {
    pub const NONE: Cached = Cached { entry: EMPTY, made_at: EMPTY, age: EMPTY, first: EMPTY, last: EMPTY };

    /// What there is at an entry.
    pub unsafe fn load(tables: &CachedTables, top_k: u32, entry: u32) -> Self {
        if entry == EMPTY {
            return Cached::NONE;
        }
        let made_at = tables.made_at.add(entry as u64).load();
        let age = tables.ages.add(entry as u64).load();
        let tokens = tables.selections.add(entry as u64 * top_k as u64);
        let first = tokens.load();
        let last = tokens.add(top_k as u64 - 1).load();
        Cached { entry, made_at, age, first, last }
    }

    /// Whether the selection may serve the row as it is now. Its tokens ascend. Where a configuration with other windows made
    /// it, some may be in this one's windows.
    pub fn is_usable(&self, row: &Row, candidates: Tokens) -> bool {
        let before_block = row.kv_len.wrapping_sub(row.queries.len());
        self.entry != EMPTY
            && self.made_at <= before_block
            && self.first >= candidates.begin
            && self.last < candidates.end
    }
}

impl CachedTables {
    /// The row's entry in the tables; [`EMPTY`] for none.
    ///
    /// # Safety
    /// - The tables are as described, and the batch has the row, with `kv_len` tokens.
    pub(crate) unsafe fn entry(&self, row: u32, kv_len: u32) -> u32 {
        if self.queries.addr() == 0 {
            return EMPTY;
        }
        let sequence = self.sequence_indices.add(row as u64).load();
        if kv_len == 0 { EMPTY } else { sequence }
    }
}

impl ReuseRules {
    /// Similarity and action of a row, whose cached selection has this cosine if it is usable.
    pub(crate) fn decide(
        &self,
        row: &Row,
        candidates: Tokens,
        is_partial: bool,
        cached: &Cached,
        cosine: impl FnOnce() -> f32,
    ) -> (f32, u32) {
        let is_usable = cached.is_usable(row, candidates);
        let similarity = if is_usable { cosine() } else { -1.0 };
        let is_similar = is_usable && similarity >= self.similarity_threshold;
        let can_reuse = is_similar && cached.age < self.max_reuse;
        (similarity, self.action(row, candidates, is_partial, can_reuse))
    }

    fn action(&self, row: &Row, candidates: Tokens, is_partial: bool, can_reuse: bool) -> u32 {
        if row.queries.is_empty() || (row.kv_len == 0 && !is_partial) {
            return SKIP;
        }
        if candidates.is_empty() || (candidates.len() <= self.top_k && !is_partial) {
            COMPLETE
        } else if can_reuse {
            REUSE
        } else {
            SCORE
        }
    }
}
