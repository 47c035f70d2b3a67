//! What is done for a row beside choosing: the windows of its list, its cached selection, its counters.

use crate::common::block::strided;
use crate::common::layout::Tokens;
use crate::ops::pool::{COMPLETE, EMPTY, REUSE, SCORE, SKIP};
use crate::ops::top_k::TopKParams;
use crate::simt::global::GlobalMut;
use crate::simt::{thread, warp};

/// The block's row. All that it reads was written by copies or by launches before the last one, so that it need not wait.
///
/// # Safety
/// - The buffers and tables are as [`TopKParams`] says; rows lie along the grid's second axis.
pub(super) unsafe fn row_of_block(params: &TopKParams) -> Row<'_> {
    let row = thread::block_idx_y();
    let action = params.actions.add(row as u64).load();
    let tables = params.batch.row(row);
    let candidates = params.batch.candidates_of(row, &tables, params.n_init, params.n_local);
    let caches = params.cached_queries.addr() != 0;
    let sequence = if caches { params.sequence_indices.add(row as u64).load() } else { EMPTY };
    // The list is too short only where a caller has changed the actions.
    let whole = tables.kv_len.min(params.max_selected);
    let (candidates, kv_len) = match action {
        SKIP => (Tokens { begin: 0, end: 0 }, 0),
        COMPLETE => (Tokens { begin: whole, end: whole }, whole),
        _ => (candidates, tables.kv_len),
    };
    let chosen = params.k.min(candidates.len());
    let before_block = tables.kv_len.wrapping_sub(tables.queries.len());
    let keeps = sequence != EMPTY;
    let sequence = sequence as u64;
    Row { params, row, action, candidates, kv_len, before_block, chosen, caches, keeps, sequence }
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
    /// Whether anything is cached.
    caches: bool,
    /// Whether this row has an entry in the cached tables.
    keeps: bool,
    /// That entry.
    sequence: u64,
}

impl Row<'_> {
    /// Whether its candidates are to be chosen.
    pub fn is_scored(&self) -> bool {
        self.action == SCORE
    }

    /// Prefetches what [`write_rest`](Self::write_rest) takes from the tables of cached selections. None of it depends on the
    /// launch before this one.
    ///
    /// # Safety
    /// - Every thread of every block of the row calls it.
    pub unsafe fn prefetch(&self) -> Prefetched {
        let mut prefetched = Prefetched { token: 0, query: 0.0, age: 0, count: 0 };
        let index = thread_of_row();
        if self.keeps && self.action == REUSE && index < self.params.k {
            prefetched.token = self.cached(index).load();
        }
        if self.keeps && self.action == REUSE && index == 0 {
            prefetched.age = self.params.cached_ages.add(self.sequence).load() + 1;
        }
        if self.keeps && self.action == SCORE && index < self.params.query_len {
            prefetched.query = self.query(index);
        }
        if self.counts_actions() {
            prefetched.count = count_actions(self.params);
        }
        prefetched
    }

    /// Whether the thread's warp counts the actions of all rows.
    fn counts_actions(&self) -> bool {
        self.caches && self.row == 0 && thread::block_idx_x() == 0 && warp::warp_id() == 0
    }

    /// Writes all but the tokens chosen by vote.
    ///
    /// # Safety
    /// - Every thread of every block of the row calls it, with what [`prefetch`](Self::prefetch) has given it.
    pub unsafe fn write_rest(&self, prefetched: &Prefetched) {
        if thread_of_row() == 0 {
            let len = self.candidates.begin + self.chosen + self.kv_len - self.candidates.end;
            self.params.selected_len.add(self.row as u64).store(len);
        }
        windows(self);
        if self.counts_actions() && warp::lane_id() < NUM_COUNTERS {
            self.params.cached_counters.add(warp::lane_id() as u64).store(prefetched.count);
        }
        match self.action {
            REUSE if self.keeps => reuse(self, prefetched), // else `pool` was given cached selections and `top_k` was not
            SCORE if self.keeps => keep_query(self, prefetched),
            _ => {}
        }
    }
}

/// What a thread has read of the tables of cached selections.
#[derive(Clone, Copy)]
pub(super) struct Prefetched {
    /// The cached token, or the element of the scoring query, at index [`thread_of_row`].
    token: u32,
    query: f32,
    /// How old the selection is, once it has been used again; the row's first thread has it.
    age: u32,
    /// See [`count_actions`].
    count: u64,
}

/// Counters of a table of cached selections: rows reused, scored, complete.
const NUM_COUNTERS: u32 = 3;

/// The counters as they are to be once what is done for all rows has been added; lane `i` has the `i`-th.
///
/// # Safety
/// - The lanes of one warp call it.
unsafe fn count_actions(params: &TopKParams) -> u64 {
    let lane = warp::lane_id();
    let (mut reused, mut scored, mut complete) = (0, 0, 0);
    for row in strided(lane, params.batch.num_rows, warp::SIZE) {
        let action = params.actions.add(row as u64).load();
        reused += (action == REUSE) as u32;
        scored += (action == SCORE) as u32;
        complete += (action == COMPLETE) as u32;
    }
    let [reused, scored, complete] =
        [reused, scored, complete].map(|count| warp::reduce_add(warp::FULL, count) as u64);
    let before = if lane < NUM_COUNTERS { params.cached_counters.add(lane as u64).load() } else { 0 };
    before
        + match lane {
            0 => reused,
            1 => scored,
            _ => complete,
        }
}

/// The thread's index among all threads of its row.
fn thread_of_row() -> u32 {
    thread::block_idx_x() * thread::block_dim_x() + thread::thread_idx_x()
}

impl Row<'_> {
    /// Calls `f` with this thread's indices of `0..len`, which are dealt to all threads of the row.
    unsafe fn each(&self, len: u32, mut f: impl FnMut(u32)) {
        for i in strided(thread_of_row(), len, thread::grid_dim_x() * thread::block_dim_x()) {
            f(i);
        }
    }

    /// Element `i` of the scoring query.
    unsafe fn query(&self, i: u32) -> f32 {
        self.params.queries.add(self.row as u64 * self.params.query_len as u64 + i as u64).load()
    }

    /// Writes candidate `token` at index `index` of those chosen.
    pub unsafe fn choose(&self, index: u32, token: u32) {
        self.list(self.candidates.begin + index).store(token);
        self.chosen_at(index).store(token);
        if self.keeps {
            self.cached(index).store(token);
        }
    }

    /// Entry `i` of the row's list.
    fn list(&self, i: u32) -> GlobalMut<u32> {
        self.params.selected.add(self.row as u64 * self.params.max_selected as u64 + i as u64)
    }

    /// Entry `i` of the row's chosen tokens.
    fn chosen_at(&self, i: u32) -> GlobalMut<u32> {
        self.params.top_k.add(self.row as u64 * self.params.k as u64 + i as u64)
    }

    /// Entry `i` of the row's cached tokens.
    fn cached(&self, i: u32) -> GlobalMut<u32> {
        self.params.cached_selections.add(self.sequence * self.params.k as u64 + i as u64)
    }
}

/// The tokens before the candidates, and those behind them.
unsafe fn windows(row: &Row<'_>) {
    let Tokens { begin, end } = row.candidates;
    row.each(begin, |i| row.list(i).store(i));
    row.each(row.kv_len - end, |i| row.list(begin + row.chosen + i).store(end + i));
}

/// Takes the cached tokens again.
unsafe fn reuse(row: &Row<'_>, prefetched: &Prefetched) {
    row.each(row.params.k, |i| {
        let token = if i == thread_of_row() { prefetched.token } else { row.cached(i).load() };
        row.chosen_at(i).store(token);
        row.list(row.candidates.begin + i).store(token);
    });
    if thread_of_row() == 0 {
        row.params.cached_ages.add(row.sequence).store(prefetched.age);
    }
}

/// Keeps the query of a selection that was made anew, and when that was.
unsafe fn keep_query(row: &Row<'_>, prefetched: &Prefetched) {
    let len = row.params.query_len as u64;
    row.each(row.params.query_len, |i| {
        let value = if i == thread_of_row() { prefetched.query } else { row.query(i) };
        row.params.cached_queries.add(row.sequence * len + i as u64).store(value);
    });
    if thread_of_row() == 0 {
        row.params.cached_ages.add(row.sequence).store(0);
        row.params.cached_made_at.add(row.sequence).store(row.before_block);
    }
}
