//! Parameters, tiles and chunks, launch dimensions and shared memory.

use crate::common::layout::{BatchTables, PageStrides};
use crate::common::overlap::Overlap;
use crate::launch::{Dims, GpuInfo};
use crate::limits::{MAX_COLUMNS, columns};
use crate::simt::data::{V2, V4};
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Warps of a block.
pub(crate) const WARPS: u32 = THREADS / 32;
/// Blocks of an SM: two of 8 warps keep 128 KiB of loads in flight with 128-element heads.
pub(crate) const BLOCKS_PER_SM: u32 = 2;
/// Chunks of a row, times KV heads, at most, but for rounding: on an H200 one for each of the 2112 warps that run at a time,
/// two for each consumer warp of `score_stream`, and few enough that their statistics are folded in microseconds.
pub(crate) const HEAD_CHUNKS: u32 = 2112;

/// Parameters of [`score`](super::kernel::score) and [`score_stream`](crate::ops::score_stream::kernel::score_stream).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ScoreParams<T> {
    /// Paged by `stride`, read.
    pub k_pages: GlobalPtr<T>,
    /// \[num_rows, num_qo_heads, head_dim\] f32, read: scoring queries.
    pub queries: GlobalPtr<f32>,
    /// \[num_rows\] u32, read: rows with [`SCORE`](crate::ops::pool::SCORE) are scored.
    pub actions: GlobalPtr<u32>,
    /// \[tiles, num_kv_heads, LOGIT_TILE, group\] f32 (see [`LOGIT_TILE`](crate::common::layout::LOGIT_TILE)), written for
    /// candidates.
    pub logits: GlobalMut<f32>,
    /// \[num_rows, num_qo_heads, 2\] f32, written: largest logit, sum of exponentials.
    pub stats: GlobalMut<f32>,
    /// \[num_rows, max_chunks(num_kv_heads), num_qo_heads, 2\] f32, workspace: statistics of each chunk.
    pub partial: GlobalMut<f32>,
    /// \[num_rows\] u32, zero before and after.
    pub counters: GlobalMut<u32>,
    /// Rows and page tables.
    pub batch: BatchTables,
    /// Strides of the pages; multiples of 8.
    pub stride: PageStrides,
    /// KV heads.
    pub num_kv_heads: u32,
    /// Query heads that share a KV head.
    pub group: u32,
    /// First tokens that are always selected.
    pub n_init: u32,
    /// Last tokens before the block that are always selected.
    pub n_local: u32,
    /// Factor on the products, divided by `rotated_scale`.
    pub score_scale: f32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Who folds the statistics of chunks, which otherwise stay in `partial`; stages of keys that `score_stream` prefetches.
    pub overlap: Overlap,
    /// No key is prefetched for rows with no more candidates: they are not scored, unless they are partial.
    pub top_k: u32,
    /// Queries of a narrow type, which rotation may have brought out of its range, are multiplied by this power of two.
    pub rotated_scale: f32,
    /// 0.
    pub reserved: u32,
}

const _: () = assert!(size_of::<ScoreParams<u16>>() == 176);

/// Shared memory of a block. A host without a machine needs the byte count alone.
pub(crate) struct Layout {
    /// Fragments of each warp's queries: `[warp, column tile, high and low, chunk of 32 dimensions, lane]`. Registers are for keys.
    pub(crate) queries: Region<V4<u32>>,
    /// Statistics of each thread while the chunks are folded.
    pub(crate) stats: Region<V2<f32>>,
    pub(crate) bytes: u32,
}

impl Layout {
    /// For instances with so many columns: 4 (packed), 8 or 16 heads.
    pub(crate) const fn new(head_dim: u32, columns: u32) -> Layout {
        Layout::carve(&mut Carve::new(), head_dim, columns)
    }

    /// Within a larger layout.
    pub(crate) const fn carve(carve: &mut Carve, head_dim: u32, columns: u32) -> Layout {
        // Packed, one column tile holds both halves; else each of the column tiles has two.
        let fragments = if columns == 4 { 1 } else { columns / 8 * 2 };
        Layout {
            queries: carve.array(WARPS * fragments * head_dim / 32 * 32, 16),
            stats: carve.array(THREADS, 16),
            bytes: carve.bytes(),
        }
    }
}

/// Tokens of a tile of [`score`](super::kernel::score), of the instance for so many dimensions and columns: as many as registers allow.
pub const fn tile_tokens(head_dim: u32, columns: u32) -> u32 {
    match (head_dim, columns) {
        (64, 4 | 8) | (128, 4) => 32,
        _ => 16,
    }
}

/// Chunks of a row at most.
pub const fn max_chunks(num_kv_heads: u32) -> u32 {
    HEAD_CHUNKS.div_ceil(num_kv_heads)
}

impl<T> ScoreParams<T> {
    /// Columns of the instance that serves the group; the most where there is none.
    pub(crate) const fn columns(&self) -> u32 {
        match columns(self.group) {
            Some(columns) => columns,
            None => MAX_COLUMNS,
        }
    }

    /// A grid that fills the device, shared evenly by the rows.
    pub const fn dims(&self, gpu: &GpuInfo) -> Dims {
        let layout = Layout::new(self.head_dim, self.columns());
        let blocks = (gpu.num_sms * BLOCKS_PER_SM).div_ceil(self.batch.num_rows);
        // A warp keeps its KV head, so a row needs at least as many warps as there are KV heads.
        let least = self.num_kv_heads.div_ceil(WARPS);
        let blocks = if blocks < least { least } else { blocks };
        Dims {
            grid: [blocks, self.batch.num_rows, 1],
            block: [THREADS, 1, 1],
            shared_bytes: layout.bytes,
            cluster: 1,
        }
    }
}
