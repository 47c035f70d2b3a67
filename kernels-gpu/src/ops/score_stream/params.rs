//! What can be streamed and is worth it, launch dimensions and shared memory.

use crate::common::paged::{self, Pages, TILE, TileLayout};
use crate::common::ring::Ring;
use crate::entries::{Entry, Op};
use crate::launch::{Dims, GpuInfo};
use crate::limits::SHARED_BYTES_SM_90;
use crate::ops::score::{Layout, ScoreParams, THREADS, WARPS};
use crate::simt::data::V4;
use crate::simt::shared::{Carve, Region};

const _: () = assert!(WARPS == paged::WARPS);

/// Bytes of keys for each SM from which on they are better streamed: [`GpuInfo::score_stream_bytes`] of a GPU. With fewer the
/// kernel that loads keys to registers is faster, since it has no stages left to work on when a block's last keys arrive: on an H100 a selection of 32 k tokens took 44 µs and not 48, of 256 k 230 and 232, of 512 k 444 and 438.
pub const STREAM_BYTES_OF_SM: u64 = 3 << 20;

/// Threads of a block: the consumers, and the producer warp.
pub(super) const STREAM_THREADS: u32 = THREADS + 32;
/// Blocks of an SM: one, with all of its shared memory.
pub(super) const STREAM_BLOCKS_PER_SM: u32 = 1;
/// Shared memory of a block at most.
pub(super) const BLOCK_BYTES: u32 = SHARED_BYTES_SM_90 / STREAM_BLOCKS_PER_SM;
/// Bytes of stages that are wanted: those in flight hide the latency of memory.
pub(super) const STAGES_BYTES: u32 = (192 << 10) / STREAM_BLOCKS_PER_SM;

/// Shared memory of a block. A host without a machine needs the byte count alone.
pub(super) struct StreamLayout {
    pub(super) base: Layout,
    /// \[num_stages, stage_tiles\] tiles, as [`TileLayout`] says.
    pub(super) keys: Region<V4<u32>>,
    pub(super) ring: Ring,
    pub(super) bytes: u32,
}

impl StreamLayout {
    /// For instances with so many columns, as [`Layout::new`].
    pub(super) const fn new(head_dim: u32, columns: u32) -> StreamLayout {
        let mut carve = Carve::new();
        let base = Layout::carve(&mut carve, head_dim, columns);
        let stage_bytes = WARPS * TILE * head_dim * 2;
        let room = (BLOCK_BYTES - carve.bytes().next_multiple_of(128)) / (stage_bytes + Ring::STAGE_BYTES);
        let wanted = STAGES_BYTES / stage_bytes;
        let num_stages = if room < wanted { room } else { wanted };
        StreamLayout {
            base,
            keys: carve.array(num_stages * stage_bytes / 16, 128),
            ring: Ring::carve(&mut carve, num_stages),
            bytes: carve.bytes(),
        }
    }
}

impl<T> ScoreParams<T> {
    /// The keys, as copies see them.
    pub(super) const fn pages(&self) -> Pages {
        Pages {
            page_size: self.batch.page_size,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            stride: self.stride,
        }
    }

    /// Where rows of keys lie in a stage.
    pub(super) const fn tile_layout(&self) -> TileLayout {
        TileLayout::new(&self.pages(), 0)
    }

    /// Whether [`score_stream`](super::kernel::score_stream) scores these pages of a batch, which have `num_slots` slots for tokens.
    pub fn streams(&self, gpu: &GpuInfo, num_slots: u64) -> bool {
        let bytes = num_slots * self.num_kv_heads as u64 * self.head_dim as u64 * 2;
        gpu.bulk_copies && bytes >= gpu.score_stream_bytes && self.can_stream()
    }

    /// Whether [`score_stream`](super::kernel::score_stream) can score these pages, and is worth it for long contexts.
    pub fn can_stream(&self) -> bool {
        self.pages().can_stream() && Entry::has_head_dim(Op::ScoreStream, self.head_dim)
    }

    /// Whether no copy of [`score_stream`](super::kernel::score_stream) reaches beyond a row's candidates and local tokens: keys may then be
    /// prefetched while a block is appended.
    pub const fn spares_block(&self) -> bool {
        self.n_local + 1 >= TILE
    }

    /// The launch of [`score_stream`](super::kernel::score_stream): a grid that fills the device, shared evenly by the rows.
    pub const fn stream_dims(&self, gpu: &GpuInfo) -> Dims {
        let layout = StreamLayout::new(self.head_dim, self.columns());
        // Not one block more than run at a time, as long as every row has one.
        let fair = gpu.num_sms * STREAM_BLOCKS_PER_SM / self.batch.num_rows;
        let blocks = if fair == 0 { 1 } else { fair };
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [STREAM_THREADS, 1, 1],
            shared_bytes: layout.bytes,
            cluster: 1,
        }
    }
}
