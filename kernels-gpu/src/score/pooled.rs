//! What [`append_pool`](mod@crate::append_pool) does, done by every block of `score` for itself: the scoring query is then
//! in shared memory where it is needed, and a step has one launch less.
//!
//! All blocks of a row come to the same action. The first one writes it down, with the queries; appended keys and values
//! are shared by the blocks, and are no candidates, so that nobody waits for them.

use super::{Layout, ScoreParams, THREADS, WARPS};
use crate::element::Element;
use crate::layout::{Row, Tokens};
use crate::pool::{Cached, EMPTY, cached_place, cosine, judge};
use crate::short_block::{self, Share};
use crate::simt::data::V2;
use crate::simt::thread;

/// Heads of a thread at a time.
const HEADS: usize = 4;

/// What the tables say of a row that is pooled.
pub(super) struct Pooled {
    tables: Row,
    /// In the cached tables; [`EMPTY`] for none.
    place: u32,
}

impl Pooled {
    const NONE: Pooled = Pooled {
        tables: Row { queries: Tokens { begin: 0, end: 0 }, first_page: 0, kv_len: 0 },
        place: EMPTY,
    };

    /// Reads tables alone, which no launch writes.
    ///
    /// # Safety
    /// - The tables are as [`ScoreParams`] says.
    #[inline(always)]
    pub unsafe fn look_up<T: Element>(params: &ScoreParams<T>, row: u32) -> Pooled {
        if params.pools == 0 {
            return Pooled::NONE;
        }
        let tables = params.batch.row(row);
        Pooled { tables, place: cached_place(&params.pooled.pool, row, tables.kv_len) }
    }

    /// Appends the pieces `first`, `first + step`, ... of the row's keys and values.
    ///
    /// # Safety
    /// - As for [`append`](fn@crate::append::append); `params` pools.
    #[inline(always)]
    pub unsafe fn append<T: Element>(&self, params: &ScoreParams<T>, first: u32, step: u32) {
        let append = &params.pooled.append;
        let pieces = append.pieces();
        let mut i = first;
        while i < pieces * self.tables.queries.len() {
            core::hint::assert_unchecked(pieces != 0);
            let query = self.tables.queries.begin + i / pieces;
            if let Some(place) = append.place(self.tables, query) {
                append.copy_piece(query, i % pieces, place);
            }
            i += step;
        }
    }

    /// The row's action. Leaves the scoring queries of the KV heads that the block's warps serve, `first_kv_head` and
    /// those after it in turn, in `layout.queries`: each warp's part of that begins with `[group, head_dim]` f32.
    ///
    /// *Convergence:* aligned; every thread of the block, of which the first [`THREADS`] do the work.
    ///
    /// # Safety
    /// - As for [`pool`](fn@crate::pool::pool), and blocks are short; `params` pools.
    /// - Every thread of the block calls it; none uses `layout` otherwise before the block has met again.
    #[inline(always)]
    pub unsafe fn pool<T: Element>(
        &self,
        params: &ScoreParams<T>,
        row: u32,
        layout: &Layout,
        first_kv_head: u32,
    ) -> u32 {
        let pool = &params.pooled.pool;
        let mut cached = Cached::NONE;
        let mut own = [0.0; 3];
        let (thread, is_first) = (thread::thread_idx_x(), thread::block_idx_x() == 0);
        if thread < THREADS {
            let units = pool.head_dim / 4;
            core::hint::assert_unchecked(units != 0);
            let step = THREADS / units;
            let mut share = Share { unit: thread % units, first: thread / units, step, begin: 0 };
            let out = pool.queries.add((row * pool.num_qo_heads) as u64 * pool.head_dim as u64);
            while share.begin < pool.num_qo_heads {
                let store = |head: u32, element: u32, mean: [f32; 2]| {
                    share_mean(params, layout, first_kv_head, head, element, mean);
                    if is_first {
                        let at = (head * pool.head_dim + element) as u64;
                        out.add(at).cast::<V2<f32>>().store(V2(mean));
                    }
                };
                let (queries, place) = (self.tables.queries, self.place);
                let part =
                    short_block::products::<T, HEADS, 1>(pool, queries, place, &share, &mut cached, store);
                own = [own[0] + part[0], own[1] + part[1], own[2] + part[2]];
                share.begin += HEADS as u32 * step;
            }
        } else {
            cached = Cached::load(pool, self.place);
        }
        let sums = short_block::sum_of_block(layout.stats.get().cast::<f32>(), WARPS, own);
        let cosine = cosine(sums[0], sums[1], sums[2]);
        let (similarity, action) = judge(pool, row, &self.tables, &cached, cosine);
        if is_first && thread == 0 {
            pool.similarities.add(row as u64).store(similarity);
            pool.actions.add(row as u64).store(action);
        }
        action
    }
}

/// Gives two elements of a head's mean to the warps that serve its KV head.
#[inline(always)]
unsafe fn share_mean<T: Element>(
    params: &ScoreParams<T>,
    layout: &Layout,
    first_kv_head: u32,
    head: u32,
    element: u32,
    mean: [f32; 2],
) {
    core::hint::assert_unchecked(params.group != 0);
    let (kv_head, member) = (head / params.group, head % params.group);
    let of_warp = layout.queries.len() / WARPS;
    let at = (member * params.head_dim + element) / 2;
    let mut warp = kv_head + if kv_head < first_kv_head { params.num_kv_heads } else { 0 } - first_kv_head;
    while warp < WARPS {
        layout.queries.get().add(warp * of_warp).cast::<V2<f32>>().add(at).store(V2(mean));
        warp += params.num_kv_heads;
    }
}
