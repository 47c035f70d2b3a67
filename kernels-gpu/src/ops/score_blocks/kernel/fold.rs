//! What the statistics of a row's chunks fold to.

use super::stats::Sum;
use super::*;
use crate::limits::{MAX_COLUMNS, columns};
use crate::simt::grid;
use crate::simt::shared::{Carve, Region};

/// Entries of a row and head in [`ScoreBlocksParams::partial`].
pub(super) struct Entries {
    first: GlobalMut<V2<f32>>,
}

impl Entries {
    /// Those of query head `head` of a row.
    pub unsafe fn of<T>(params: &ScoreBlocksParams<T>, row: u32, head: u32) -> Entries {
        let chunks = params.batch.token_base(row) / CHUNK as u64 + 2 * row as u64;
        let heads = (params.num_kv_heads * params.group) as u64;
        let of_head = params.batch.kv_len(row).div_ceil(CHUNK);
        let first = chunks * heads + head as u64 * of_head as u64;
        Entries { first: params.partial.add(first) }
    }

    /// That of a chunk.
    pub fn at(&self, chunk: u32) -> GlobalMut<V2<f32>> {
        self.first.add(chunk as u64)
    }
}

/// Shared memory: the sums of the warps.
const SUMS: Region<V2<f32>> = Carve::new().array(FOLD_THREADS / warp::SIZE, 16);

/// Sets the counters of [`stats`](super::stats()) back to 0, too.
///
/// Thread `i` takes entries `i`, `i + 128`, ..., counted from token 0; then lanes, then warps.
///
/// # Safety
/// - The buffers and tables are as [`ScoreBlocksParams`] says.
/// - Launched with [`ScoreBlocksParams::fold_dims`], behind [`stats`](super::stats()).
pub unsafe fn fold<T: Element>(params: ScoreBlocksParams<T>) {
    let (head, block, group) = (thread::block_idx_x(), thread::block_idx_y(), thread::block_idx_z());
    let [first_row, num_rows] = params.groups.add(group as u64).load().0;
    // Blocks that the group does not have read the tables of its last.
    let row = first_row + block.min(num_rows.max(1) - 1);
    let candidates = params.batch.candidates(row, params.n_init, params.n_local);
    grid::wait_for_previous();
    grid::launch_dependents();
    if block == 0 && head < params.num_kv_heads && thread::thread_idx_x() == 0 {
        params.counters.add((group * params.num_kv_heads + head) as u64).store(0);
    }
    let is_scored = block < num_rows && params.actions.add(row as u64).load() == SCORE;
    if !is_scored || candidates.end <= candidates.begin {
        return;
    }
    let entries = Entries::of(&params, row, head);
    let (first, end) = (candidates.begin / CHUNK, candidates.end.div_ceil(CHUNK));
    let mut entry = first / FOLD_THREADS * FOLD_THREADS + thread::thread_idx_x();
    let mut sum = Sum::EMPTY;
    while entry < end {
        if entry >= first {
            let [reference, part] = entries.at(entry).load().0;
            sum.merge(Sum { reference, sum: part });
        }
        entry += FOLD_THREADS;
    }
    let mut distance = warp::SIZE / 2;
    while distance > 0 {
        let reference = warp::shuffle_xor(warp::FULL, sum.reference, distance);
        let part = warp::shuffle_xor(warp::FULL, sum.sum, distance);
        sum.merge(Sum { reference, sum: part });
        distance /= 2;
    }
    let warps = SUMS.get();
    if warp::lane_id() == 0 {
        warps.add(warp::warp_id()).store(V2([sum.reference, sum.sum]));
    }
    thread::sync_threads();
    if thread::thread_idx_x() == 0 {
        for i in 1..FOLD_THREADS / warp::SIZE {
            let [reference, part] = warps.add(i).load().0;
            sum.merge(Sum { reference, sum: part });
        }
        let columns = columns(params.group).unwrap_or(MAX_COLUMNS);
        let group_heads = params.group.max(1);
        let row = Place::row(columns, block, head % group_heads);
        let slab = first_slab(group, first_row, columns) + row / WARP_ROWS;
        let number = slab as u64 * params.num_kv_heads as u64 + (head / group_heads) as u64;
        let bytes = bytes_of_slab(params.head_dim);
        let of_slab = params.operands.add(number * (bytes / 16) as u64).cast::<V2<f32>>();
        let first = bytes / 8 - WARP_ROWS; // sums come last
        of_slab.add((first + row % WARP_ROWS) as u64).store(V2([-sum.reference, 1.0 / sum.sum]));
    }
}
