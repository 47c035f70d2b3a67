//! `append_pool`: [`append`](mod@crate::append) and [`pool`](mod@crate::pool) of short blocks in one launch.
//!
//! ```text
//! block 0 of row r:    mean of the row's rotated queries, all heads; cosine with the cached one; action
//! the others of row r: keys and values of the row's block, to its pages
//! ```
//! In decoding, either operation is a chain of trips to memory and little else. Here the chain is two trips long: tables,
//! then everything they point to.
//!
//! **Thread mapping.** A thread of block 0 has two pairs of elements in two heads ([`short_block`](crate::short_block));
//! each other thread copies 16 bytes of keys and of values. Sums are added in a fixed order, so the result does not depend
//! on the launch.
//!
//! A selection anew does both in [`score`](mod@crate::score), where it can.
//!
//! **Bytes.** Those of the two operations.

use crate::append::{AppendParams, PIECE};
use crate::launch::Dims;
use crate::layout::BatchTables;
use crate::pool::PoolParams;
use crate::short_block::MAX_BLOCK_LEN;
use crate::simt::shared::{Carve, Region};

/// Most threads of a block.
const MAX_THREADS: u32 = 1024;

/// Heads of a thread.
const HEADS: u32 = 2;

/// Parameters of [`append_pool`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct AppendPoolParams<T> {
    /// Keys and values.
    pub append: AppendParams,
    /// Queries, of the same rows. Neither its workspace nor its counters are used.
    pub pool: PoolParams<T>,
    /// Query tokens of the longest block.
    pub max_block_len: u32,
    /// 0.
    pub reserved: u32,
}
const _: () = assert!(size_of::<AppendPoolParams<u16>>() == 328);

/// Shared memory of a block. A host without a machine needs the byte count alone.
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct Layout {
    /// \[3, warps\]: products of each warp.
    products: Region<f32>,
    bytes: u32,
}

const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout { products: carve.array(3 * MAX_THREADS / 32, 16), bytes: carve.bytes() }
};

impl<T> AppendPoolParams<T> {
    /// Nothing to append, nothing to pool.
    pub const fn none(batch: BatchTables) -> Self {
        AppendPoolParams {
            append: AppendParams::none(batch),
            pool: PoolParams::none(batch),
            max_block_len: 0,
            reserved: 0,
        }
    }

    /// Whether the kernel can do this: blocks are short, rows not too wide, and rotated pairs even in number.
    pub const fn fits(&self) -> bool {
        self.is_short() && self.num_threads() <= MAX_THREADS
    }

    /// Whether blocks are short, and rotated pairs even in number.
    pub const fn is_short(&self) -> bool {
        self.max_block_len <= MAX_BLOCK_LEN
            && (self.pool.rope.coarse.addr() == 0 || self.pool.rope.pairs.is_multiple_of(2))
    }

    /// A block for each row's queries, and as many as its keys and values need.
    pub const fn dims(&self) -> Dims {
        let pieces = self.append.num_kv_heads * (self.append.head_dim / PIECE) * self.max_block_len;
        Dims {
            grid: [1 + pieces.div_ceil(self.num_threads()), self.pool.batch.num_rows, 1],
            block: [self.num_threads(), 1, 1],
            shared_bytes: LAYOUT.bytes,
            cluster: 1,
        }
    }

    /// Of a block: one for four elements of every [`HEADS`] heads, in whole warps.
    const fn num_threads(&self) -> u32 {
        (self.pool.num_qo_heads.div_ceil(HEADS) * (self.pool.head_dim / 4)).next_multiple_of(32)
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use kernel::append_pool;

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod kernel {
    use super::*;
    use crate::element::Element;
    use crate::pool::{Cached, cached_place, conclude, cosine};
    use crate::short_block::{Share, products, sum_of_block};
    use crate::simt::data::V2;
    use crate::simt::{grid, thread, warp};

    /// See the module.
    ///
    /// # Safety
    /// - The rules of [`append`](fn@crate::append::append) and [`pool`](fn@crate::pool::pool) hold but for their launches,
    ///   and both have the same batch.
    /// - [`AppendPoolParams::fits`], and no block is longer than `max_block_len`.
    /// - Launched with [`AppendPoolParams::dims`].
    pub unsafe fn append_pool<T: Element>(params: AppendPoolParams<T>) {
        thread::launch_bounds::<MAX_THREADS, 1>();
        grid::wait_for_previous();
        grid::launch_dependents();
        let row = thread::block_idx_y();
        if thread::block_idx_x() == 0 {
            pool_row(&params.pool, row);
        } else {
            let before = (thread::block_idx_x() - 1) * thread::block_dim_x();
            append_piece(&params.append, row, before + thread::thread_idx_x());
        }
    }

    /// Copies piece `index` of the row's block.
    #[inline(always)]
    unsafe fn append_piece(params: &AppendParams, row: u32, index: u32) {
        let pieces = params.pieces();
        core::hint::assert_unchecked(pieces != 0);
        let (t, piece) = (index / pieces, index % pieces);
        let row = params.batch.row(row);
        let query = row.queries.begin + t;
        if query >= row.queries.end {
            return;
        }
        if let Some(place) = params.place(row, query) {
            params.copy_piece(query, piece, place);
        }
    }

    /// The whole of `pool` for a row.
    #[inline(always)]
    unsafe fn pool_row<T: Element>(params: &PoolParams<T>, row: u32) {
        let tables = params.batch.row(row);
        let place = cached_place(params, row, tables.kv_len);
        let mut cached = Cached::NONE;
        let units = params.head_dim / 4;
        core::hint::assert_unchecked(units != 0);
        let share = Share {
            unit: thread::thread_idx_x() % units,
            first: thread::thread_idx_x() / units,
            step: params.num_qo_heads.div_ceil(HEADS),
            begin: 0,
        };
        let out = params.queries.add((row * params.num_qo_heads) as u64 * params.head_dim as u64);
        let own = products::<T, { HEADS as usize }, 2>(
            params,
            tables.queries,
            place,
            &share,
            &mut cached,
            |head, element, mean| {
                let at = (head * params.head_dim + element) as u64;
                out.add(at).cast::<V2<f32>>().store(V2(mean));
            },
        );
        let sums = sum_of_block(LAYOUT.products.get(), thread::block_dim_x() / warp::SIZE, own);
        if thread::thread_idx_x() == 0 {
            conclude(params, row, &tables, &cached, cosine(sums[0], sums[1], sums[2]));
        }
    }
}
