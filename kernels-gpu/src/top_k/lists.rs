//! What is done for a row beside choosing: the windows of its list, its cached selection, its counters.

use super::TopKParams;
use crate::layout::Tokens;
use crate::pool::{COMPLETE, REUSE, SCORE, SKIP};
use crate::radix;
use crate::simt::global::GlobalMut;
use crate::simt::shared::Shared;
use crate::simt::{thread, warp};

/// The block's row.
///
/// # Safety
/// - The buffers and tables are as [`TopKParams`] says; rows lie along the grid's second axis.
#[inline(always)]
pub(super) unsafe fn row_of_block(params: &TopKParams) -> Row<'_> {
    let row = thread::block_idx_y();
    let action = params.actions.add(row as u64).load();
    let tables = params.batch.row(row);
    let candidates = params.batch.candidates_of(row, &tables, params.n_init, params.n_local);
    let caches = params.cached_queries.addr() != 0;
    let sequence = if caches { params.sequence_indices.add(row as u64).load() } else { 0 };
    // The list is too short only where a caller has changed the actions.
    let whole = tables.kv_len.min(params.max_selected);
    let (candidates, kv_len) = match action {
        SKIP => (Tokens { begin: 0, end: 0 }, 0),
        COMPLETE => (Tokens { begin: whole, end: whole }, whole),
        _ => (candidates, tables.kv_len),
    };
    let chosen = params.k.min(candidates.len());
    let before_block = tables.kv_len.wrapping_sub(tables.queries.len());
    Row { params, row, action, candidates, kv_len, before_block, chosen, caches, sequence: sequence as u64 }
}

/// A row, its cached selection, and where its lists lie.
pub(super) struct Row<'a> {
    pub params: &'a TopKParams,
    pub row: u32,
    action: u32,
    pub candidates: Tokens,
    kv_len: u32,
    /// Tokens before its block.
    before_block: u32,
    /// Candidates to be chosen.
    pub chosen: u32,
    caches: bool,
    /// Its place in the cached tables, where anything is cached.
    sequence: u64,
}

impl Row<'_> {
    /// Whether its candidates are to be chosen.
    pub fn is_scored(&self) -> bool {
        self.action == SCORE
    }

    /// Writes all but the tokens chosen by vote. `warps`: a word of shared memory for each warp.
    ///
    /// *Convergence:* aligned; every thread of the block.
    ///
    /// # Safety
    /// - Every thread of every block of the row calls it.
    #[inline(always)]
    pub unsafe fn write_rest(&self, warps: Shared<u32>) {
        if self.caches && self.row == 0 && thread::block_idx_x() == 0 {
            count_actions(self.params, warps);
        }
        if thread::block_idx_x() == 0 && thread::thread_idx_x() == 0 {
            let len = self.candidates.begin + self.chosen + self.kv_len - self.candidates.end;
            self.params.selected_len.add(self.row as u64).store(len);
        }
        windows(self);
        match self.action {
            REUSE => reuse(self),
            SCORE if self.caches => keep_query(self),
            _ => {}
        }
    }
}

/// Adds what is done for all rows to the counters; run by one block. `warps`: a word for each of its warps.
#[inline(always)]
unsafe fn count_actions(params: &TopKParams, warps: Shared<u32>) {
    let (mut reused, mut scored, mut complete) = (0, 0, 0);
    let mut row = thread::thread_idx_x();
    while row < params.batch.num_rows {
        let action = params.actions.add(row as u64).load();
        reused += (action == REUSE) as u32;
        scored += (action == SCORE) as u32;
        complete += (action == COMPLETE) as u32;
        row += thread::block_dim_x();
    }
    let (_, reused) = sums_before(warps, reused);
    let (_, scored) = sums_before(warps, scored);
    let (_, complete) = sums_before(warps, complete);
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
        let mut i = thread::block_idx_x() * thread::block_dim_x() + thread::thread_idx_x();
        while i < len {
            f(i);
            i += thread::grid_dim_x() * thread::block_dim_x();
        }
    }

    /// Gives candidate `token` place `place` among those chosen.
    #[inline(always)]
    pub unsafe fn choose(&self, place: u32, token: u32) {
        self.list(self.candidates.begin + place).store(token);
        self.chosen_at(place).store(token);
        if self.caches {
            self.cached(place).store(token);
        }
    }

    /// Place `i` of the row's list.
    #[inline(always)]
    fn list(&self, i: u32) -> GlobalMut<u32> {
        self.params.selected.add(self.row as u64 * self.params.max_selected as u64 + i as u64)
    }

    /// Place `i` of the row's chosen tokens.
    #[inline(always)]
    fn chosen_at(&self, i: u32) -> GlobalMut<u32> {
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
unsafe fn windows(row: &Row<'_>) {
    let Tokens { begin, end } = row.candidates;
    row.each(begin, |i| row.list(i).store(i));
    row.each(row.kv_len - end, |i| row.list(begin + row.chosen + i).store(end + i));
}

/// Takes the cached tokens again.
#[inline(always)]
unsafe fn reuse(row: &Row<'_>) {
    if !row.caches {
        return; // `pool` was given cached selections and `top_k` was not
    }
    row.each(row.params.k, |i| {
        let token = row.cached(i).load();
        row.chosen_at(i).store(token);
        row.list(row.candidates.begin + i).store(token);
    });
    if thread::block_idx_x() == 0 && thread::thread_idx_x() == 0 {
        let age = row.params.cached_ages.add(row.sequence);
        age.store(age.load() + 1);
    }
}

/// Keeps the query of a selection that was made anew, and when that was.
#[inline(always)]
unsafe fn keep_query(row: &Row<'_>) {
    let len = row.params.query_len as u64;
    row.each(row.params.query_len, |i| {
        let value = row.params.queries.add(row.row as u64 * len + i as u64).load_cached();
        row.params.cached_queries.add(row.sequence * len + i as u64).store(value);
    });
    if thread::block_idx_x() == 0 && thread::thread_idx_x() == 0 {
        row.params.cached_ages.add(row.sequence).store(0);
        row.params.cached_made_at.add(row.sequence).store(row.before_block);
    }
}

/// See [`radix::sums_before`].
#[inline(always)]
pub(super) unsafe fn sums_before(warps: Shared<u32>, value: u32) -> (u32, u32) {
    radix::sums_before(warps, thread::block_dim_x() / warp::SIZE, value)
}
