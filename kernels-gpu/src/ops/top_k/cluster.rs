//! Launch dimensions and shared memory.

use crate::common::radix::BINS;
use crate::launch::{Dims, GpuInfo};
use crate::ops::top_k::TopKParams;
use crate::simt::shared::{Carve, Region};

/// Threads of a block.
pub(super) const THREADS: u32 = 512;
/// Words of a mask: a block has marks for 32 times as many tokens.
pub(super) const WORDS: u32 = 8192;
/// Tokens of a block from which on a cluster of 16 is faster than one of 8.
pub(super) const FULL: u32 = 1 << 16;
/// Keys that are brought together at most. A bin has some hundreds, as a rule, of a million.
pub(super) const FEW: u32 = 2048;

/// Contenders that a block keeps at most, so that it reads the votes no second time; no fewer than [`FEW`].
pub(super) const KEPT: u32 = 4096;
/// Blocks of an SM. Of 132 SMs no more than 120 run clusters of 8 blocks, one an SM: where rows are 16, the last would wait for the others.
pub(super) const BLOCKS_PER_SM: u32 = 2;
/// Loads of four votes that a thread has in flight.
pub(super) const BATCH: u32 = 4;
/// Votes of a block in flight, or in a sample: there is room for them where contenders are kept.
pub(super) const BLOCK_VOTES: u32 = 4 * BATCH * THREADS;
const _: () = assert!(BLOCK_VOTES <= 2 * KEPT);

/// Shared memory of a block.
pub(super) struct Layout {
    /// Marks of the keys above the range, and of those in it.
    pub(super) above: Region<u32>,
    pub(super) within: Region<u32>,
    pub(super) histogram: Region<u32>,
    /// Contenders of the block: keys from some bound on, and their tokens. At last those in the range, if they are few.
    pub(super) own: Region<u32>,
    pub(super) tokens: Region<u32>,
    /// Few keys in the range, of all blocks.
    pub(super) all: Region<u32>,
    /// How many are the block's own; its tokens above the range and in it; its keys from some bound on, and the largest
    /// of them.
    pub(super) counts: Region<u32>,
    pub(super) warps: Region<u32>,
    /// What one thread has found for all.
    pub(super) found: Region<u32>,
    pub(super) bytes: u32,
}

pub(super) const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout {
        above: carve.array(WORDS, 16),
        within: carve.array(WORDS, 16),
        histogram: carve.array(BINS, 16),
        own: carve.array(KEPT, 16),
        tokens: carve.array(KEPT, 16),
        all: carve.array(FEW, 16),
        counts: carve.array(5, 16),
        warps: carve.array(THREADS / 32, 16),
        found: carve.array(3, 16),
        bytes: carve.bytes(),
    }
};

const _: () = assert!(LAYOUT.bytes <= SHARED_BYTES_OF_SM / BLOCKS_PER_SM - 1024);
/// Shared memory of an SM with clusters; a block takes 1024 bytes more than it asks for.
const SHARED_BYTES_OF_SM: u32 = 228 << 10;

impl TopKParams {
    /// The launch of [`choose_in_cluster`](super::kernel::choose_in_cluster): a cluster for each row. `None` where there are no
    /// clusters, or not of so many blocks as the longest row may need.
    pub const fn cluster_dims(&self, gpu: &GpuInfo) -> Option<Dims> {
        cluster_dims(gpu, self.batch.num_rows, self.max_tokens)
    }
}

/// See [`TopKParams::cluster_dims`].
pub const fn cluster_dims(gpu: &GpuInfo, num_rows: u32, max_tokens: u32) -> Option<Dims> {
    let limit = gpu.limits.cluster;
    let needed = max_tokens.div_ceil(32).div_ceil(WORDS - 1);
    if limit == 1 || needed > limit {
        return None;
    }
    // As many blocks as run at a time; more than 8, which meet more slowly, where each has many tokens.
    let fair = gpu.num_sms / num_rows;
    let useful = max_tokens.div_ceil(if max_tokens > 8 * FULL { FULL } else { 4 * THREADS });
    let most = if max_tokens > 8 * FULL { 16 } else { 8 };
    let mut blocks = 1;
    while 2 * blocks <= limit
        && (blocks < needed || (2 * blocks <= fair && 2 * blocks <= most && blocks < useful))
    {
        blocks *= 2;
    }
    if blocks < needed {
        return None;
    }
    Some(Dims {
        grid: [blocks, num_rows, 1],
        block: [THREADS, 1, 1],
        shared_bytes: LAYOUT.bytes,
        cluster: blocks,
    })
}
