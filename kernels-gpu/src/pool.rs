//! `pool`: the scoring query of each row, its cosine with the cached one, and what is to be done for the row.
//!
//! ```text
//! for each row r, query head h:
//!     mean[h] = mean over t of rotate(q[t, h], n_local + t)
//!     partial[r, h] = (mean[h] . cached[h], |mean[h]|^2, |cached[h]|^2)
//! the last block of row r:
//!     similarity = sum of partial[r, ..].0 / sqrt(sum of .1 * sum of .2)      heads in order
//!     action[r]  = Skip, Complete, Reuse or Score                             (docs/definitions.md)
//! ```
//! **Thread mapping.** A block per row and query head; a thread per pair of elements (that RoPE may rotate together)
//! and part of the block's tokens. The parts are added in a fixed order, so the result does not depend on the launch.
//!
//! **Overlap.** In a step, `append` comes before, and has nothing to do with it: both run at the same time. Short blocks
//! have [`append_pool`](mod@crate::append_pool) instead.
//!
//! **Bytes.** `q` once: `num_tokens * num_qo_heads * head_dim * 2`; the cached query where there is one.

use crate::launch::Dims;
use crate::layout::BatchTables;
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
use crate::layout::Row;
use crate::rope::RopeTables;
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Threads of a block.
pub const THREADS: u32 = 256;

/// The row has no queries, or no tokens: padding.
pub const SKIP: u32 = 0;
/// The row has at most `top_k` candidates: all tokens are selected.
pub const COMPLETE: u32 = 1;
/// The row is scored.
pub const SCORE: u32 = 2;
/// The row uses its cached selection again.
pub const REUSE: u32 = 3;

/// `made_at` of a sequence without cached selection.
pub const EMPTY: u32 = u32::MAX;

/// Parameters of [`pool`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct PoolParams<T> {
    /// \[num_tokens, num_qo_heads, head_dim\] T, read.
    pub q: GlobalPtr<T>,
    /// \[num_sequences, num_qo_heads * head_dim\] f32, read: cached scoring queries. Address 0: nothing is cached.
    pub cached_queries: GlobalPtr<f32>,
    /// \[num_sequences\] u32, read: how often each cached selection was used again.
    pub cached_ages: GlobalPtr<u32>,
    /// \[num_sequences\] u32, read: `n - T` when it was made, or [`EMPTY`].
    pub cached_made_at: GlobalPtr<u32>,
    /// \[num_rows\] u32, read: the sequence of each row. Address 0 where nothing is cached.
    pub sequence_indices: GlobalPtr<u32>,
    /// \[num_rows, num_qo_heads, head_dim\] f32, written: scoring queries.
    pub queries: GlobalMut<f32>,
    /// \[num_rows\] f32, written: cosine with the cached query, -1 where there is none.
    pub similarities: GlobalMut<f32>,
    /// \[num_rows\] u32, written: an action.
    pub actions: GlobalMut<u32>,
    /// \[num_rows, num_qo_heads, 3\] f32, workspace.
    pub partial: GlobalMut<f32>,
    /// \[num_rows\] u32, zero before and after.
    pub counters: GlobalMut<u32>,
    /// Rows.
    pub batch: BatchTables,
    /// Rotation of the queries.
    pub rope: RopeTables,
    /// Query heads.
    pub num_qo_heads: u32,
    /// Elements of a head, a multiple of 8, at most 256.
    pub head_dim: u32,
    /// First tokens that are always selected.
    pub n_init: u32,
    /// Last tokens before the block that are always selected.
    pub n_local: u32,
    /// Tokens chosen by vote.
    pub top_k: u32,
    /// How often a selection may be used again.
    pub max_reuse: u32,
    /// Cosine from which on a selection is used again.
    pub similarity_threshold: f32,
    /// 1: the launch before is [`append`](mod@crate::append), on which nothing here depends: it is waited for at the end.
    pub follows_append: u32,
}
const _: () = assert!(size_of::<PoolParams<u16>>() == 192);

/// Shared memory of a block. A host without a machine needs the byte count alone.
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct Layout {
    /// Sums of the parts, and later of the warps.
    sums: Region<f32>,
    bytes: u32,
}

const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout { sums: carve.array(2 * THREADS, 16), bytes: carve.bytes() }
};

impl<T> PoolParams<T> {
    /// A block per row and query head.
    pub const fn dims(&self) -> Dims {
        Dims {
            grid: [self.num_qo_heads, self.batch.num_rows, 1],
            block: [THREADS, 1, 1],
            shared_bytes: LAYOUT.bytes,
            cluster: 1,
        }
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use kernel::pool;
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub(crate) use kernel::{Cached, cached_place, conclude, cosine};

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod kernel {
    use super::*;
    use crate::element::Element;
    use crate::simt::shared::Shared;
    use crate::simt::{grid, math, thread, warp};

    /// See the module.
    ///
    /// # Safety
    /// - The buffers and tables are as [`PoolParams`] says.
    /// - The rope tables cover `n_local` plus the longest block.
    /// - Launched with [`PoolParams::dims`].
    pub unsafe fn pool<T: Element>(params: PoolParams<T>) {
        if params.follows_append == 0 {
            grid::wait_for_previous();
        }
        grid::launch_dependents();
        let (head, row) = (thread::block_idx_x(), thread::block_idx_y());
        let tables = params.batch.row(row);
        let cached = Cached::load(&params, cached_place(&params, row, tables.kv_len));
        let sums = LAYOUT.sums.get();
        mean_query(&params, head, row, sums);
        thread::sync_threads();
        let (dot, own, other) = products(&params, head, cached.place, sums);
        let partial = params.partial.add((row as u64 * params.num_qo_heads as u64 + head as u64) * 3);
        if thread::thread_idx_x() == 0 {
            partial.store(dot);
            partial.add(1).store(own);
            partial.add(2).store(other);
        }
        if grid::is_last_block(params.counters.add(row as u64), params.num_qo_heads)
            && thread::thread_idx_x() == 0
        {
            let (dot, own, other) = sums_of_heads(&params, row);
            conclude(&params, row, &tables, &cached, cosine(dot, own, other));
        }
        if params.follows_append != 0 {
            grid::wait_for_previous(); // the end of this launch says that the appended keys are there
        }
    }

    /// The row's place in the cached tables; [`EMPTY`] for none.
    #[inline(always)]
    pub(crate) unsafe fn cached_place<T: Element>(params: &PoolParams<T>, row: u32, kv_len: u32) -> u32 {
        if params.cached_queries.addr() == 0 {
            return EMPTY;
        }
        let sequence = params.sequence_indices.add(row as u64).load();
        if kv_len == 0 { EMPTY } else { sequence }
    }

    /// What is known of a row's cached selection.
    #[derive(Clone, Copy)]
    pub(crate) struct Cached {
        /// In the cached tables; [`EMPTY`] for none.
        pub place: u32,
        made_at: u32,
        age: u32,
    }

    impl Cached {
        pub const NONE: Cached = Cached { place: EMPTY, made_at: EMPTY, age: EMPTY };

        #[inline(always)]
        pub unsafe fn load<T: Element>(params: &PoolParams<T>, place: u32) -> Self {
            if place == EMPTY {
                return Cached::NONE;
            }
            let made_at = params.cached_made_at.add(place as u64).load();
            let age = params.cached_ages.add(place as u64).load();
            Cached { place, made_at, age }
        }
    }

    /// Writes the mean of the rotated queries to `queries` and to the first `head_dim` of `sums`.
    #[inline(always)]
    unsafe fn mean_query<T: Element>(params: &PoolParams<T>, head: u32, row: u32, sums: Shared<f32>) {
        let queries = params.batch.queries(row);
        let pairs = params.head_dim / 2;
        core::hint::assert_unchecked(pairs != 0);
        let parts = THREADS / pairs;
        let (pair, part) = (thread::thread_idx_x() % pairs, thread::thread_idx_x() / pairs);
        let (i, j) = params.rope.elements(pair);
        let (mut sum_x, mut sum_y) = (0.0, 0.0);
        if part < parts {
            let mut t = part;
            while t < queries.len() {
                let token = (queries.begin + t) as u64;
                let at =
                    params.q.add((token * params.num_qo_heads as u64 + head as u64) * params.head_dim as u64);
                let x = at.add(i as u64).load_stream().to_f32();
                let y = at.add(j as u64).load_stream().to_f32();
                let (x, y) = params.rope.rotate(pair, params.n_local + t, (x, y));
                sum_x += x;
                sum_y += y;
                t += parts;
            }
        }
        let place = sums.add(2 * thread::thread_idx_x());
        place.store(sum_x);
        place.add(1).store(sum_y);
        thread::sync_threads();
        let (mut x, mut y) = (0.0, 0.0);
        if part == 0 {
            let mut other = 0;
            while other < parts {
                let place = sums.add(2 * (other * pairs + pair));
                x += place.load();
                y += place.add(1).load();
                other += 1;
            }
        }
        thread::sync_threads();
        if part == 0 {
            let count = queries.len().max(1) as f32;
            let (x, y) = (x / count, y / count);
            sums.add(i).store(x);
            sums.add(j).store(y);
            let out = (row as u64 * params.num_qo_heads as u64 + head as u64) * params.head_dim as u64;
            params.queries.add(out + i as u64).store(x);
            params.queries.add(out + j as u64).store(y);
        }
    }

    /// Sums over the head of mean times cached, mean squared and cached squared; valid in thread 0.
    #[inline(always)]
    unsafe fn products<T: Element>(
        params: &PoolParams<T>,
        head: u32,
        place: u32,
        sums: Shared<f32>,
    ) -> (f32, f32, f32) {
        let i = thread::thread_idx_x();
        let (mut x, mut y) = (0.0, 0.0);
        if i < params.head_dim {
            x = sums.add(i).load();
            if place != EMPTY {
                let width = params.num_qo_heads as u64 * params.head_dim as u64;
                let at = place as u64 * width + (head * params.head_dim + i) as u64;
                y = params.cached_queries.add(at).load_cached();
            }
        }
        let (dot, own, other) =
            (warp::reduce_add_f32(x * y), warp::reduce_add_f32(x * x), warp::reduce_add_f32(y * y));
        thread::sync_threads();
        if warp::lane_id() == 0 {
            let place = sums.add(3 * warp::warp_id());
            place.store(dot);
            place.add(1).store(own);
            place.add(2).store(other);
        }
        thread::sync_threads();
        let mut total = (0.0, 0.0, 0.0);
        if i == 0 {
            let mut w = 0;
            while w < THREADS / warp::SIZE {
                let place = sums.add(3 * w);
                total.0 += place.load();
                total.1 += place.add(1).load();
                total.2 += place.add(2).load();
                w += 1;
            }
        }
        total
    }

    /// The products of all heads, which are added in order.
    #[inline(always)]
    unsafe fn sums_of_heads<T: Element>(params: &PoolParams<T>, row: u32) -> (f32, f32, f32) {
        let (mut dot, mut own, mut other) = (0.0, 0.0, 0.0);
        let mut head = 0;
        while head < params.num_qo_heads {
            let partial = params.partial.add((row as u64 * params.num_qo_heads as u64 + head as u64) * 3);
            dot += partial.load();
            own += partial.add(1).load();
            other += partial.add(2).load();
            head += 1;
        }
        (dot, own, other)
    }

    /// NaN for a zero vector.
    #[inline(always)]
    pub(crate) fn cosine(dot: f32, own: f32, other: f32) -> f32 {
        dot / (math::sqrt(own) * math::sqrt(other))
    }

    /// Writes the similarity, and the action that follows.
    #[inline(always)]
    pub(crate) unsafe fn conclude<T: Element>(
        params: &PoolParams<T>,
        row: u32,
        tables: &Row,
        cached: &Cached,
        cosine: f32,
    ) {
        let has_cached = cached.place != EMPTY && cached.made_at <= tables.kv_len - tables.queries.len();
        let similarity = if has_cached { cosine } else { -1.0 };
        let is_similar = has_cached && similarity >= params.similarity_threshold;
        let action = decide(params, row, tables, is_similar && cached.age < params.max_reuse);
        params.similarities.add(row as u64).store(similarity);
        params.actions.add(row as u64).store(action);
    }

    #[inline(always)]
    unsafe fn decide<T: Element>(params: &PoolParams<T>, row: u32, tables: &Row, can_reuse: bool) -> u32 {
        let is_partial = params.batch.is_partial();
        if tables.queries.is_empty() || (tables.kv_len == 0 && !is_partial) {
            return SKIP;
        }
        let candidates = params.batch.candidates_of(row, tables, params.n_init, params.n_local);
        if candidates.is_empty() || (candidates.len() <= params.top_k && !is_partial) {
            COMPLETE
        } else if can_reuse {
            REUSE
        } else {
            SCORE
        }
    }
}
