//! `score`: scaled dot products of scoring queries with candidate keys, and the softmax statistics of each head.
//!
//! ```text
//! for each scored row r, candidate token j, query head h:
//!     logit[j, h] = scale * (q[r, h] . k[j, h / G])
//! for each head h:
//!     max = largest logit, sum = sum of exp(logit - max)          NaN passed over (docs/definitions.md)
//! ```
//! Departures from the loops:
//! 1. The products run on tensor cores: 16 tokens are the rows of A, heads the columns of B. The head dimension is
//!    permuted alike in both, so that the 16 bytes a lane loads from a key *are* its A fragment of two `mma`: no shared
//!    memory, every key byte is loaded once, straight to registers. Chunk `c` of 32 dimensions gives lane `t` (of 4) the
//!    dimensions `32 c + 8 t ..`.
//! 2. The f32 query is split in two 16-bit parts, `q = high + low`, which keeps 16 bits of mantissa (bf16) or 22 (f16):
//!    votes must be exact to 1e-3. With groups of up to 4 heads the low parts take columns 4 to 7 of the same `mma`.
//! 3. A warp works on one KV head. Tiles of `16 U` candidates are dealt to chunks in turn, tile `i` to chunk `i` modulo
//!    their number, which depends on the number of candidates alone: so the statistics have the same bits for every
//!    launch shape, and the warps, which take chunks in turn, read adjacent tiles at the same time. The last block of a
//!    row folds the chunks' statistics in order.
//! 4. Tiles are pipelined over chunk borders: as soon as half a tile's keys are multiplied, the same half of the next
//!    tile is loaded into their registers, at places whose page numbers were loaded before the products. Half of a warp's
//!    loads are always under way.
//! 5. Packed, the lanes that hold low parts would have nothing to do after the products; they take the lower eight
//!    tokens of the tile, and the others the upper eight.
//!
//! 6. Tiles begin at multiples of 16 tokens, as those of the logits do, so that a warp writes whole lines: pieces of 16
//!    bytes, in lines that eight warps share, cost the memory as much as a fifth of the keys.
//!
//! On Hopper, where contexts are long and the layout of the pages allows it, [`score_stream`] does the same with bulk copies.
//!
//! Within a selection either kernel leaves the chunks' statistics to [`vote`](mod@crate::vote), where every block folds
//! them for itself.
//!
//! **Bytes.** Keys once, `n * num_kv_heads * head_dim * 2`; logits `n * num_qo_heads * 4` written.

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub(crate) mod statistics;
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod steps;
mod stream;
pub use stream::STREAM_BYTES_OF_SM;

use crate::launch::{Dims, GpuInfo};
use crate::layout::{BatchTables, PageStrides};
use crate::simt::data::{V2, V4};
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Warps of a block.
const WARPS: u32 = THREADS / 32;
/// Blocks of an SM: two of 8 warps keep 128 KiB of loads under way with 128-element heads.
const BLOCKS_PER_SM: u32 = 2;
/// A row is cut into about so many pieces of work (a chunk for one KV head): two for each of the 1056 warps that an H200
/// runs at a time, and few enough that their statistics are folded in microseconds.
const PIECES: u32 = 2112;

/// Parameters of [`score`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ScoreParams<T> {
    /// Paged by `stride`, read.
    pub k_pages: GlobalPtr<T>,
    /// \[num_rows, num_qo_heads, head_dim\] f32, read: scoring queries.
    pub queries: GlobalPtr<f32>,
    /// \[num_rows\] u32, read: rows with [`SCORE`](crate::pool::SCORE) are scored.
    pub actions: GlobalPtr<u32>,
    /// \[tiles, num_kv_heads, LOGIT_TILE, group\] f32 (see [`LOGIT_TILE`](crate::layout::LOGIT_TILE)), written for
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
    /// Factor on the products.
    pub score_scale: f32,
    /// Elements of a head.
    pub head_dim: u32,
    /// 1: the last block of each row folds the statistics of its chunks, to `stats`. 0: they stay in `partial`.
    pub folds: u32,
    /// How many stages of keys [`score_stream`] asks for before it waits for the launch before it, in rows that may be
    /// scored. More than 0 only where that launch writes no candidate's key, and one before it has written the last.
    pub stages_ahead: u32,
    /// Rows with no more candidates are not scored; for `stages_ahead`.
    pub top_k: u32,
    /// 0.
    pub reserved: u32,
}
const _: () = assert!(size_of::<ScoreParams<u16>>() == 176);

/// Shared memory of a block. A host without a machine needs the byte count alone.
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct Layout {
    /// Fragments of each warp's queries: `[warp, column tile, part, chunk of 32 dimensions, lane]`. Registers are for keys.
    queries: Region<V4<u32>>,
    /// Statistics of each thread while the chunks are folded.
    stats: Region<V2<f32>>,
    bytes: u32,
}

impl Layout {
    /// For instances with so many columns: 4 (packed), 8 or 16 heads.
    const fn new(head_dim: u32, columns: u32) -> Layout {
        Layout::carve(&mut Carve::new(), head_dim, columns)
    }

    /// As a part of a larger layout.
    const fn carve(carve: &mut Carve, head_dim: u32, columns: u32) -> Layout {
        // Packed, one column tile holds both parts; else each of the column tiles has two.
        let fragments = if columns == 4 { 1 } else { columns / 8 * 2 };
        Layout {
            queries: carve.array(WARPS * fragments * head_dim / 32 * 32, 16),
            stats: carve.array(THREADS, 16),
            bytes: carve.bytes(),
        }
    }
}

/// Columns of the instance that serves groups of so many heads: 4, 8 or 16; `None` for larger groups.
pub const fn columns(group: u32) -> Option<u32> {
    match group {
        0..=4 => Some(4),
        5..=8 => Some(8),
        9..=16 => Some(16),
        _ => None,
    }
}

/// Tokens of a tile of [`score`], of the instance for so many dimensions and columns: as many as registers allow.
pub const fn tile_tokens(head_dim: u32, columns: u32) -> u32 {
    match (head_dim, columns) {
        (64, 4 | 8) | (128, 4) => 32,
        _ => 16,
    }
}

/// Chunks of a row at most.
pub const fn max_chunks(num_kv_heads: u32) -> u32 {
    PIECES.div_ceil(num_kv_heads)
}

impl<T> ScoreParams<T> {
    /// A grid that fills the device, shared evenly by the rows.
    pub const fn dims(&self, gpu: &GpuInfo) -> Dims {
        let columns = match columns(self.group) {
            Some(columns) => columns,
            None => 16,
        };
        let layout = Layout::new(self.head_dim, columns);
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

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use self::kernel::score;
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use self::stream::score_stream;

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod kernel {
    use super::statistics::Stats;
    use super::steps::{
        Tile, Work, ask_for_queries, fold, multiply, put_queries, store_stats, write_products,
    };
    use super::*;
    use crate::element::Element;
    use crate::simt::{grid, thread, warp};

    /// See the module. `C` chunks of 32 dimensions, `N` column tiles of 8 heads, `U` tiles of 16 tokens at a time;
    /// `PACKED`: groups of up to 4 heads, high and low parts in one column tile.
    ///
    /// # Safety
    /// - The buffers and tables are as [`ScoreParams`] says, and 16-byte aligned; every page number lies in the pool.
    /// - `head_dim = 32 C`; the group has at most `8 N` heads, 4 if packed; `16 U` is [`tile_tokens`].
    /// - Launched with [`ScoreParams::dims`].
    #[inline(always)]
    pub unsafe fn score<T: Element, const C: usize, const N: usize, const U: usize, const PACKED: bool>(
        params: ScoreParams<T>,
    ) {
        const { assert!(16 * U as u32 == tile_tokens(32 * C as u32, if PACKED { 4 } else { 8 * N as u32 })) };
        let row = thread::block_idx_y();
        core::hint::assert_unchecked(params.num_kv_heads != 0);
        let warp_of_row = thread::block_idx_x() * WARPS + warp::warp_id();
        let kv_head = warp_of_row % params.num_kv_heads;
        let step = thread::grid_dim_x() * WARPS / params.num_kv_heads;
        let work = Work::new(&params, row, 16 * U as u32, kv_head, step);
        grid::wait_for_previous();
        grid::launch_dependents();
        let layout = const { &Layout::new(32 * C as u32, if PACKED { 4 } else { 8 * N as u32 }) };
        let action = params.actions.add(row as u64).load();
        if work.is_idle(action) {
            return;
        }
        let chunk = warp_of_row / params.num_kv_heads;
        if chunk < work.step && chunk < work.num_chunks {
            score_chunks::<T, C, N, U, PACKED>(&work, layout.queries, chunk);
        }
        if params.folds != 0 && grid::is_last_block(params.counters.add(row as u64), thread::grid_dim_x()) {
            fold(&work, layout.stats);
        }
    }

    /// The warp's chunks, from `chunk` on, as one stream of tiles.
    #[inline(always)]
    unsafe fn score_chunks<T: Element, const C: usize, const N: usize, const U: usize, const PACKED: bool>(
        work: &Work<'_, T>,
        queries: Region<V4<u32>>,
        chunk: u32,
    ) {
        let queries = put_queries::<T, C, N, PACKED>(&ask_for_queries::<T, C, N, PACKED>(work), queries);
        let mut tile = Tile { chunk, index: chunk };
        let pages = load_pages::<T, U>(work, tile);
        let mut keys = [[[[0; 4]; C]; 2]; U];
        let mut u = 0;
        while u < U {
            keys[u] = load_keys::<T, C, U>(work, tile, u as u32, pages[u]);
            u += 1;
        }
        let mut next = work.next_tile(tile);
        let mut pages = load_pages::<T, U>(work, next);
        let mut stats = [[Stats::EMPTY; 2]; N];
        loop {
            let mut u = 0;
            while u < U {
                let mut products = [[0.0; 4]; N];
                let mut n = 0;
                while n < N {
                    products[n] = multiply::<T, C, PACKED>(&keys[u], queries, n as u32);
                    n += 1;
                }
                keys[u] = load_keys::<T, C, U>(work, next, u as u32, pages[u]);
                let mut n = 0;
                while n < N {
                    write_products::<T, U, PACKED>(
                        work,
                        tile,
                        u as u32,
                        n as u32,
                        products[n],
                        &mut stats[n],
                    );
                    n += 1;
                }
                u += 1;
            }
            if next.chunk != tile.chunk || next == tile {
                store_stats::<T, N, PACKED>(work, tile.chunk, stats);
                stats = [[Stats::EMPTY; 2]; N];
            }
            if next == tile {
                return;
            }
            tile = next;
            next = work.next_tile(tile);
            pages = load_pages::<T, U>(work, next);
        }
    }

    /// Page numbers of the tokens whose keys the lane loads. Tokens beyond the candidates become the last.
    #[inline(always)]
    unsafe fn load_pages<T: Element, const U: usize>(work: &Work<'_, T>, tile: Tile) -> [[u32; 2]; U] {
        let mut pages = [[0; 2]; U];
        let mut u = 0;
        while u < U {
            let mut half = 0;
            while half < 2 {
                let token = work.token(tile, 16 * U as u32, u as u32, half as u32);
                let token = token.min(work.candidates.end - 1);
                let (page, _) = work.params.batch.split_token(token);
                // Not `load_cached`: the assembler would move such a load behind the products, next to its use.
                pages[u][half] = work.pages.add(page as u64).load();
                half += 1;
            }
            u += 1;
        }
        pages
    }

    /// The lane's A fragments of 16 tokens: 16 bytes of each of its two tokens from each chunk of 32 dimensions.
    #[inline(always)]
    unsafe fn load_keys<T: Element, const C: usize, const U: usize>(
        work: &Work<'_, T>,
        tile: Tile,
        u: u32,
        pages: [u32; 2],
    ) -> [[[u32; 4]; C]; 2] {
        let within = 8 * (warp::lane_id() % 4) as u64;
        let mut keys = [[[0; 4]; C]; 2];
        let mut half = 0;
        while half < 2 {
            let token = work.token(tile, 16 * U as u32, u, half as u32).min(work.candidates.end - 1);
            let (_, token_in_page) = work.params.batch.split_token(token);
            let offset = work.params.stride.offset(pages[half], token_in_page, work.kv_head) + within;
            let at = work.params.k_pages.add(offset).cast::<V4<u32>>();
            let mut c = 0;
            while c < C {
                keys[half][c] = at.add(4 * c as u64).load_stream_row().0;
                c += 1;
            }
            half += 1;
        }
        keys
    }
}
