//! What can be streamed, splits of a list, launch dimensions and shared memory.

use crate::common::paged::{MIN_COPY_BYTES, Pages, SEGMENT, TILE, WARPS, stage_tiles};
use crate::common::ring::Ring;
use crate::entries::{Entry, Op};
use crate::launch::{Dims, GpuInfo};
use crate::limits::SHARED_BYTES_SM_90;
use crate::ops::attend::AttendParams;
use crate::ops::attend_decode::QUERY_ROWS;
use crate::simt::data::{V2, V4};
use crate::simt::shared::{Carve, Region};

/// Threads of a block: the consumers, and the producer warp.
pub(super) const THREADS: u32 = (WARPS + 1) * 32;
/// Unused bytes behind a segment of 4 tokens.
pub(super) const PAD: u32 = 32;
/// Bytes of stages that are wanted: those in flight hide the latency of memory.
pub(super) const STAGES_BYTES: u32 = 192 << 10;

/// Threads of a block that merges: 8 for 32 dimensions of a split, so many splits at a time.
pub(super) const MERGE_THREADS: u32 = 256;
/// Of these, for one split: each merges four dimensions.
pub(super) const MERGE_QUADS: u32 = 8;
/// Splits at a time.
pub(super) const MERGE_SLICES: u32 = MERGE_THREADS / MERGE_QUADS;

/// Shared memory of a block.
pub(super) struct Layout {
    /// \[num_stages, stage_tiles\] tiles, as [`TileLayout`](crate::common::paged::TileLayout) says: keys in one stage, the values
    /// of the same tokens in the next.
    pub(super) stages: Region<V4<u32>>,
    pub(super) ring: Ring,
    /// Bytes of a stage.
    pub(super) stage_bytes: u32,
    pub(super) bytes: u32,
}

impl Layout {
    pub(super) const fn new(head_dim: u32) -> Layout {
        let mut carve = Carve::new();
        let rows_bytes = WARPS * TILE * head_dim * 2;
        // Heads that make segments large enough for a pad, and tiles of a stage that have so many.
        let padded_heads = (MIN_COPY_BYTES as u32).div_ceil(SEGMENT * head_dim * 2);
        let stage_bytes = rows_bytes + WARPS / padded_heads * TILE / SEGMENT * PAD;
        let num_stages = STAGES_BYTES / rows_bytes;
        let layout = Layout {
            stages: carve.array(num_stages * stage_bytes / 16, 128),
            ring: Ring::carve(&mut carve, num_stages),
            stage_bytes,
            bytes: carve.bytes(),
        };
        assert!(layout.bytes <= SHARED_BYTES_SM_90, "more shared memory than a block has");
        layout
    }
}

/// Shared memory of a block that merges: output and statistics of each warp.
pub(super) struct MergeLayout {
    pub(super) out: Region<V4<f32>>,
    pub(super) stats: Region<V2<f32>>,
    pub(super) bytes: u32,
}

impl MergeLayout {
    pub(super) const fn new() -> MergeLayout {
        let mut carve = Carve::new();
        MergeLayout {
            out: carve.array(MERGE_THREADS / 32 * MERGE_QUADS, 16),
            stats: carve.array(MERGE_THREADS / 32 * MERGE_QUADS, 8),
            bytes: carve.bytes(),
        }
    }
}

impl<T> AttendParams<T> {
    /// Keys (and values) as copies see them.
    pub(super) const fn pages(&self, head_dim: u32) -> Pages {
        Pages {
            page_size: self.batch.page_size,
            num_kv_heads: self.num_kv_heads,
            head_dim,
            stride: self.k_stride,
        }
    }

    /// Whether [`attend_stream`](super::kernel::attend_stream) can do it, and is worth it: a grid of one block an SM that keeps the device
    /// busy.
    pub fn can_stream(&self, gpu: &GpuInfo, head_dim: u32) -> bool {
        let alike = self.k_stride == self.v_stride;
        let is_dense = self.selected.addr() == 0 && self.rope.coarse.addr() == 0 && self.k_is_gathered == 0;
        let few = self.max_block_len * self.group <= QUERY_ROWS;
        if !(gpu.bulk_copies && alike && is_dense && few) {
            return false;
        }
        let (rows, sms) = (self.batch.num_rows, gpu.num_sms);
        let is_busy = rows > 0 && rows <= sms && 8 * (sms % rows) <= sms;
        is_busy && self.pages(head_dim).can_stream() && Entry::has_head_dim(Op::AttendStream, head_dim)
    }

    /// Blocks of a row: as many as run at a time, and no more than there are steps.
    pub(super) const fn stream_blocks(&self, gpu: &GpuInfo) -> u32 {
        let fair = gpu.num_sms / self.batch.num_rows;
        let useful = self.max_len.div_ceil(TILE * stage_tiles(self.num_kv_heads));
        let blocks = if fair < useful { fair } else { useful };
        if blocks == 0 { 1 } else { blocks }
    }

    /// What `num_splits` must be.
    pub const fn stream_splits(&self, gpu: &GpuInfo) -> u32 {
        self.stream_blocks(gpu) * stage_tiles(self.num_kv_heads)
    }

    /// The launch of [`attend_stream`](super::kernel::attend_stream): a block per split (or several, for as many tiles of a stage) and row.
    pub const fn stream_dims(&self, gpu: &GpuInfo, head_dim: u32) -> Dims {
        Dims {
            grid: [self.stream_blocks(gpu), self.batch.num_rows, 1],
            block: [THREADS, 1, 1],
            shared_bytes: Layout::new(head_dim).bytes,
            cluster: 1,
        }
    }

    /// The launch of [`attend_stream_merge`](super::kernel::attend_stream_merge): a block per 32 dimensions, query row of a KV head, and
    /// row.
    pub const fn stream_merge_dims(&self, head_dim: u32) -> Dims {
        Dims {
            grid: [
                head_dim / (4 * MERGE_QUADS),
                self.num_kv_heads * self.max_block_len * self.group,
                self.batch.num_rows,
            ],
            block: [MERGE_THREADS, 1, 1],
            shared_bytes: MergeLayout::new().bytes,
            cluster: 1,
        }
    }
}

/// Rows times KV heads times splits at most: what the workspace must hold.
pub const fn max_parts(gpu: &GpuInfo) -> u32 {
    gpu.num_sms * WARPS
}
