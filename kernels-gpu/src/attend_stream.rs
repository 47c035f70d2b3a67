//! `attend` to all tokens for few queries, with keys and values streamed through shared memory by the copy engine
//! (Hopper).
//!
//! ```text
//! attend_stream, for each row and share of its tiles:                                              (a block)
//!     producer warp:    for each stage: wait until it is empty; copy keys, then values of 16 tokens, all heads
//!     consumer warps:   for each stage: wait for the keys; weights; wait for the values; add
//!                       write output and softmax of the share
//! attend_stream_merge, for each row, head, 32 dimensions: merge the shares                         (a block)
//! ```
//! What a warp does with a tile is what [`attend_decode`](mod@crate::attend_decode) does. Departures from it:
//! 1. A block serves all KV heads, a warp one of them, as in [`score_stream`](crate::score::score_stream). With fewer heads
//!    than warps stream `s` of a block takes every tile `s` of a stage, and is a share of its own.
//! 2. In shared memory each *part* of 4 tokens is followed by 32 unused bytes, where copies of 4 tokens are large enough.
//!    The tokens are permuted, place `4 p + 2 h + j` being row `g = r + 4 j` (`+ 8 h`) of the `mma`, `r` the two bits of `p`
//!    reversed: then the lanes that load at a time, be it keys or values, load from all parts, and from all banks.
//! 3. A second kernel merges: for one block, the shares of all SMs and heads would be work of 20 µs.
//!
//! **Bytes.** Keys and values once: `len * num_kv_heads * head_dim * 4`; each share's output written and read.

use crate::attend_decode::QUERY_ROWS;
use crate::attention::AttendParams;
use crate::launch::{Dims, GpuInfo};
use crate::simt::data::{V2, V4};
use crate::simt::shared::{Carve, Region};
use crate::stream::{MIN_COPY_BYTES, Pages, TILE, WARPS, streams};

/// Threads of a block: the consumers, and the producer warp.
const THREADS: u32 = (WARPS + 1) * 32;
/// Tokens of a part.
const PART: u32 = 4;
/// Unused bytes behind a part.
const PAD: u32 = 32;
/// Shared memory of a block at most.
const BLOCK_BYTES: u32 = 227 << 10;
/// Bytes of stages that are wanted: those under way hide the latency of memory.
const STAGES_BYTES: u32 = 192 << 10;

/// Threads of a block that merges: 8 for 32 dimensions of a share, so many shares at a time.
const MERGE_THREADS: u32 = 256;
const MERGE_QUADS: u32 = 8;
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
const MERGE_SLICES: u32 = MERGE_THREADS / MERGE_QUADS;

/// Shared memory of a block.
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct Layout {
    /// \[num_stages, keys and values, streams, tile\], as [`Places`] says.
    stages: Region<V4<u32>>,
    /// Barriers of keys and values of each stage: the copies have arrived; the consumers have read them.
    full: Region<u64>,
    empty: Region<u64>,
    /// Bytes of the keys of a stage.
    slot_bytes: u32,
    num_stages: u32,
    bytes: u32,
}

impl Layout {
    const fn new(head_dim: u32) -> Layout {
        let mut carve = Carve::new();
        // Two streams at most have parts that are large enough for a pad.
        let rows_bytes = WARPS * TILE * head_dim * 2;
        let slot_bytes = rows_bytes + 2 * TILE / PART * PAD;
        let num_stages = STAGES_BYTES / (2 * rows_bytes);
        let layout = Layout {
            stages: carve.array(num_stages * 2 * slot_bytes / 16, 128),
            full: carve.array(2 * num_stages, 8),
            empty: carve.array(2 * num_stages, 8),
            slot_bytes,
            num_stages,
            bytes: carve.bytes(),
        };
        assert!(layout.bytes <= BLOCK_BYTES, "more shared memory than a block has");
        layout
    }
}

/// Shared memory of a block that merges: output and statistics of each warp.
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct MergeLayout {
    out: Region<V4<f32>>,
    stats: Region<V2<f32>>,
    bytes: u32,
}

impl MergeLayout {
    const fn new() -> MergeLayout {
        let mut carve = Carve::new();
        MergeLayout {
            out: carve.array(MERGE_THREADS / 32 * MERGE_QUADS, 16),
            stats: carve.array(MERGE_THREADS / 32 * MERGE_QUADS, 8),
            bytes: carve.bytes(),
        }
    }
}

/// Where the rows of a tile lie in shared memory, in bytes.
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
#[derive(Clone, Copy)]
struct Places {
    /// Tokens of a copy.
    copy_tokens: u32,
    /// Whether a copy is of all heads.
    heads_are_adjacent: bool,
    /// From a token to the next of its part, from a part to the next, from a head to the next.
    token: u32,
    part: u32,
    head: u32,
    /// From a tile to that of the next stream.
    tile: u32,
}

#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
impl Places {
    const fn new(pages: &Pages) -> Places {
        let (heads, row, tokens) = (pages.num_kv_heads, pages.head_dim * 2, pages.copy_tokens());
        if !pages.heads_are_adjacent() {
            let head = TILE * row;
            return Places {
                copy_tokens: tokens,
                heads_are_adjacent: false,
                token: row,
                part: PART * row,
                head,
                tile: heads * head,
            };
        }
        let token = heads * row;
        let pads = PART as u64 * token as u64 >= MIN_COPY_BYTES;
        let part = PART * token + if pads { PAD } else { 0 };
        Places {
            copy_tokens: if pads && tokens > PART { PART } else { tokens },
            heads_are_adjacent: true,
            token,
            part,
            head: row,
            tile: TILE / PART * part,
        }
    }
}

impl<T> AttendParams<T> {
    /// Keys (and values) as copies see them.
    const fn pages(&self, head_dim: u32) -> Pages {
        Pages {
            page_size: self.batch.page_size,
            num_kv_heads: self.num_kv_heads,
            head_dim,
            stride: self.k_stride,
        }
    }

    /// Whether [`attend_stream`] can do it, and is worth it: a grid of one block an SM that keeps the device busy.
    pub const fn can_stream(&self, gpu: &GpuInfo, head_dim: u32) -> bool {
        let (k, v) = (&self.k_stride, &self.v_stride);
        let alike = k.page == v.page && k.token == v.token && k.head == v.head;
        let is_dense = self.selected.addr() == 0 && self.rope.coarse.addr() == 0 && self.k_is_gathered == 0;
        let has_instance = matches!(head_dim, 64 | 96 | 128);
        let few = self.max_block_len * self.group <= QUERY_ROWS;
        if !(gpu.bulk_copies && alike && is_dense && has_instance && few) {
            return false;
        }
        let (rows, sms) = (self.batch.num_rows, gpu.num_sms);
        let is_busy = rows > 0 && rows <= sms && 8 * (sms % rows) <= sms;
        is_busy && self.pages(head_dim).can_stream()
    }

    /// Blocks of a row: as many as run at a time, and no more than there are stages.
    const fn stream_blocks(&self, gpu: &GpuInfo) -> u32 {
        let fair = gpu.num_sms / self.batch.num_rows;
        let useful = self.max_len.div_ceil(TILE * streams(self.num_kv_heads));
        let blocks = if fair < useful { fair } else { useful };
        if blocks == 0 { 1 } else { blocks }
    }

    /// What `num_shares` must be.
    pub const fn stream_shares(&self, gpu: &GpuInfo) -> u32 {
        self.stream_blocks(gpu) * streams(self.num_kv_heads)
    }

    /// The launch of [`attend_stream`]: a block per share (or several, for as many streams) and row.
    pub const fn stream_dims(&self, gpu: &GpuInfo, head_dim: u32) -> Dims {
        Dims {
            grid: [self.stream_blocks(gpu), self.batch.num_rows, 1],
            block: [THREADS, 1, 1],
            shared_bytes: Layout::new(head_dim).bytes,
            cluster: 1,
        }
    }

    /// The launch of [`attend_stream_merge`]: a block per 32 dimensions, query row of a KV head, and row.
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

/// Rows times KV heads times shares at most: what the workspace must hold.
pub const fn max_parts(gpu: &GpuInfo) -> u32 {
    gpu.num_sms * WARPS
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use self::{kernel::attend_stream, merge::attend_stream_merge};

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod kernel;
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod merge;

#[cfg(test)]
mod tests;
