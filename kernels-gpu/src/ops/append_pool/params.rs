//! Parameters, launch dimensions and shared memory.

use crate::launch::Dims;
use crate::ops::append::{AppendParams, PIECE};
use crate::ops::pool::PoolParams;
use crate::simt::shared::{Carve, Region};

/// Longest block of a row.
pub const MAX_BLOCK_LEN: u32 = 4;
/// Threads of a block at most.
pub(super) const MAX_THREADS: u32 = 1024;
/// Warps of a block at most.
pub(super) const MAX_WARPS: u32 = MAX_THREADS / 32;
/// Heads of a thread.
pub(super) const HEADS: u32 = 2;

/// Parameters of [`append_pool`](super::kernel::append_pool).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct AppendPoolParams<T> {
    /// Keys and values.
    pub append: AppendParams,
    /// Queries, of the same rows. Workspace and counters are unused.
    pub pool: PoolParams<T>,
    /// Query tokens of the longest block.
    pub max_block_len: u32,
    /// 0.
    pub reserved: u32,
}

const _: () = assert!(size_of::<AppendPoolParams<u16>>() == 384);

/// Shared memory of a block. A host without a machine needs the byte count alone.
pub(super) struct Layout {
    /// \[3, MAX_WARPS\]: products of each warp.
    pub(super) products: Region<f32>,
    pub(super) bytes: u32,
}

pub(super) const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout { products: carve.array(3 * MAX_WARPS, 16), bytes: carve.bytes() }
};

impl<T> AppendPoolParams<T> {
    /// Whether the kernel can do this: blocks are short, rows not too wide, the heads of a query adjacent, and rotated pairs even
    /// in number.
    pub const fn fits(&self) -> bool {
        self.max_block_len <= MAX_BLOCK_LEN
            && self.num_threads() <= MAX_THREADS
            && self.pool.q_stride.head == self.pool.head_dim
            && (self.pool.rope.coarse.addr() == 0
                || (self.pool.rope.pairs.is_multiple_of(2) && self.pool.rope.pairs != 0))
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
    pub(super) const fn num_threads(&self) -> u32 {
        (self.pool.num_qo_heads.div_ceil(HEADS) * (self.pool.head_dim / 4)).next_multiple_of(32)
    }
}
