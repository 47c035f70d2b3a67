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
//! **Bytes.** Keys once, `n * num_kv_heads * head_dim * 2`; logits `n * num_qo_heads * 4` written.

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
}
const _: () = assert!(size_of::<ScoreParams<u16>>() == 160);

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
        // Packed, one column tile holds both parts; else each of the column tiles has two.
        let fragments = if columns == 4 { 1 } else { columns / 8 * 2 };
        let mut carve = Carve::new();
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
        Dims { grid: [blocks, self.batch.num_rows, 1], block: [THREADS, 1, 1], shared_bytes: layout.bytes }
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use kernel::score;

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod kernel {
    use super::*;
    use crate::attention::{add_low, split};
    use crate::element::Element;
    use crate::layout::{LOGIT_TILE, Tokens};
    use crate::pool::SCORE;
    use crate::simt::shared::Shared;
    use crate::simt::{grid, math, thread, warp};

    /// Running statistics of a head: the largest logit and the sum of exponentials below it.
    #[derive(Clone, Copy)]
    struct Stats {
        max: f32,
        sum: f32,
    }

    impl Stats {
        const EMPTY: Stats = Stats { max: f32::NEG_INFINITY, sum: 0.0 };

        /// `exp(x - max)` as it counts in a sum: NaN as absent, an infinite maximum as the limit of a large one.
        #[inline(always)]
        fn term(x: f32, max: f32) -> f32 {
            let e = math::ex2((x - max) * core::f32::consts::LOG2_E);
            let number = if x.is_nan() { 0.0 } else { e };
            if x == max { 1.0 } else { number }
        }

        /// Counts one logit.
        #[inline(always)]
        fn push(&mut self, logit: f32) {
            if logit > self.max {
                self.sum *= Stats::term(self.max, logit);
                self.max = logit;
            }
            self.sum += Stats::term(logit, self.max);
        }

        /// With the statistics of other logits taken in.
        #[inline(always)]
        fn merge(self, other: Stats) -> Stats {
            let max = self.max.max(other.max);
            Stats {
                max,
                sum: self.sum * Stats::term(self.max, max) + other.sum * Stats::term(other.max, max),
            }
        }

        /// Merged with those of the lane at `distance`.
        #[inline(always)]
        unsafe fn merge_lane(self, distance: u32) -> Stats {
            let max = warp::shuffle_xor(warp::FULL, self.max, distance);
            let sum = warp::shuffle_xor(warp::FULL, self.sum, distance);
            self.merge(Stats { max, sum })
        }
    }

    /// What a warp works on, the same in all its lanes.
    struct Work<'a, T> {
        params: &'a ScoreParams<T>,
        /// The row's page table.
        pages: GlobalPtr<u32>,
        row: u32,
        kv_head: u32,
        candidates: Tokens,
        /// First token of the first tile: a multiple of 16, at or before the first candidate.
        first: u32,
        num_tiles: u32,
        num_chunks: u32,
        /// From one of the warp's chunks to the next.
        step: u32,
    }

    /// A tile of candidates, and the chunk that it counts in.
    #[derive(Clone, Copy, PartialEq)]
    struct Tile {
        chunk: u32,
        index: u32,
    }

    impl<T> Work<'_, T> {
        /// The warp's tile after `tile`; `tile` itself if that is the last.
        #[inline(always)]
        fn next_tile(&self, tile: Tile) -> Tile {
            let (index, chunk) = (tile.index + self.num_chunks, tile.chunk + self.step);
            if index < self.num_tiles {
                Tile { index, ..tile }
            } else if chunk < self.num_chunks {
                Tile { chunk, index: chunk }
            } else {
                tile
            }
        }

        /// The lane's token of eight: token `16 u + 8 half + lane / 4` of the tile of `tokens` tokens. It may lie before the
        /// candidates or beyond them.
        #[inline(always)]
        fn token(&self, tile: Tile, tokens: u32, u: u32, half: u32) -> u32 {
            self.first + tile.index * tokens + 16 * u + 8 * half + warp::lane_id() / 4
        }
    }

    /// See the module. `C` chunks of 32 dimensions, `N` column tiles of 8 heads, `U` tiles of 16 tokens at a time;
    /// `PACKED`: groups of up to 4 heads, high and low parts in one column tile.
    ///
    /// # Safety
    /// - The buffers and tables are as [`ScoreParams`] says, and 16-byte aligned; every page number lies in the pool.
    /// - `head_dim = 32 C`; the group has at most `8 N` heads, 4 if packed.
    /// - Launched with [`ScoreParams::dims`].
    #[inline(always)]
    pub unsafe fn score<T: Element, const C: usize, const N: usize, const U: usize, const PACKED: bool>(
        params: ScoreParams<T>,
    ) {
        grid::wait_for_previous();
        grid::launch_dependents();
        let row = thread::block_idx_y();
        if params.actions.add(row as u64).load() != SCORE {
            return;
        }
        core::hint::assert_unchecked(params.num_kv_heads != 0);
        let candidates = params.batch.candidates(row, params.n_init, params.n_local);
        let first = candidates.begin / LOGIT_TILE * LOGIT_TILE;
        let num_tiles = (candidates.end - first).div_ceil(16 * U as u32);
        let warp_of_row = thread::block_idx_x() * WARPS + warp::warp_id();
        let work = Work {
            params: &params,
            pages: params.batch.kv_indices.add(params.batch.first_page(row) as u64),
            row,
            kv_head: warp_of_row % params.num_kv_heads,
            candidates,
            first,
            num_tiles,
            num_chunks: num_tiles.min(max_chunks(params.num_kv_heads)),
            step: thread::grid_dim_x() * WARPS / params.num_kv_heads,
        };
        let chunk = warp_of_row / params.num_kv_heads;
        if chunk < work.step && chunk < work.num_chunks {
            score_chunks::<T, C, N, U, PACKED>(&work, chunk);
        }
        if grid::is_last_block(params.counters.add(row as u64), thread::grid_dim_x()) {
            fold(&work, const { &Layout::new(32 * C as u32, if PACKED { 4 } else { 8 * N as u32 }) });
        }
    }

    /// The warp's chunks, from `chunk` on, as one stream of tiles.
    #[inline(always)]
    unsafe fn score_chunks<T: Element, const C: usize, const N: usize, const U: usize, const PACKED: bool>(
        work: &Work<'_, T>,
        chunk: u32,
    ) {
        let queries = load_queries::<T, C, N, PACKED>(work);
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

    /// Splits and packs the queries of a KV head's group as B fragments in shared memory: the lane's words of column
    /// tile `n`, part `p` (0 high, 1 low), chunk `c` are 32 * ((2 n + p) C + c) further, or 32 c packed. Columns
    /// beyond the group are zero. Each lane reads back only what it wrote itself.
    #[inline(always)]
    unsafe fn load_queries<T: Element, const C: usize, const N: usize, const PACKED: bool>(
        work: &Work<'_, T>,
    ) -> Shared<V4<u32>> {
        let layout = const { Layout::new(32 * C as u32, if PACKED { 4 } else { 8 * N as u32 }) };
        let of_warp = layout.queries.len() / WARPS;
        let fragments = layout.queries.get().add(warp::warp_id() * of_warp + warp::lane_id());
        let params = work.params;
        let (column, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
        let mut n = 0;
        while n < N {
            let member = if PACKED { column % 4 } else { n as u32 * 8 + column };
            let head = work.kv_head * params.group + member;
            let head = work.row as u64 * (params.num_kv_heads * params.group) as u64 + head as u64;
            let at = params.queries.add(head * (32 * C) as u64 + 8 * t as u64).cast::<V4<f32>>();
            let mut c = 0;
            while c < C {
                let (mut high, mut low) = ([0; 4], [0; 4]);
                if member < params.group {
                    let x = at.add(8 * c as u64).load_cached().0;
                    let y = at.add(8 * c as u64 + 1).load_cached().0;
                    (high[0], low[0]) = split::<T>(x[0], x[1]);
                    (high[1], low[1]) = split::<T>(x[2], x[3]);
                    (high[2], low[2]) = split::<T>(y[0], y[1]);
                    (high[3], low[3]) = split::<T>(y[2], y[3]);
                }
                if PACKED {
                    fragments.add(32 * c as u32).store(V4(if column >= 4 { low } else { high }));
                } else {
                    fragments.add(32 * (2 * n * C + c) as u32).store(V4(high));
                    fragments.add(32 * ((2 * n + 1) * C + c) as u32).store(V4(low));
                }
                c += 1;
            }
            n += 1;
        }
        fragments
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

    /// Products of 16 tokens with a column tile of queries; low parts added unless packed.
    #[inline(always)]
    unsafe fn multiply<T: Element, const C: usize, const PACKED: bool>(
        keys: &[[[u32; 4]; C]; 2],
        queries: Shared<V4<u32>>,
        n: u32,
    ) -> [f32; 4] {
        let (mut d, mut low_d) = ([0.0; 4], [0.0; 4]);
        let mut c = 0;
        while c < C {
            let (upper, lower) = (keys[0][c], keys[1][c]);
            let a0 = [upper[0], lower[0], upper[1], lower[1]];
            let a1 = [upper[2], lower[2], upper[3], lower[3]];
            let place = if PACKED { c as u32 } else { 2 * n * C as u32 + c as u32 };
            let high = queries.add(32 * place).load().0;
            T::mma(&mut d, a0, [high[0], high[1]]);
            T::mma(&mut d, a1, [high[2], high[3]]);
            if !PACKED {
                let low = queries.add(32 * (place + C as u32)).load().0;
                T::mma(&mut low_d, a0, [low[0], low[1]]);
                T::mma(&mut low_d, a1, [low[2], low[3]]);
            }
            c += 1;
        }
        if PACKED {
            return d;
        }
        let mut i = 0;
        while i < 4 {
            d[i] = add_low(d[i], low_d[i]);
            i += 1;
        }
        d
    }

    /// Scales, stores and counts the lane's products of 16 tokens with a column tile.
    #[inline(always)]
    unsafe fn write_products<T: Element, const U: usize, const PACKED: bool>(
        work: &Work<'_, T>,
        tile: Tile,
        u: u32,
        n: u32,
        d: [f32; 4],
        stats: &mut [Stats; 2],
    ) {
        let t = warp::lane_id() % 4;
        if PACKED {
            // Lanes with t = 0, 1 hold the high parts of columns 0 to 3, those with t = 2, 3 the low parts. The former
            // keep the upper eight tokens and give the lower; the latter the other way round.
            let lower = t >= 2;
            let (give0, give1) = if lower { (d[0], d[1]) } else { (d[2], d[3]) };
            let got0 = warp::shuffle_xor(warp::FULL, give0, 2);
            let got1 = warp::shuffle_xor(warp::FULL, give1, 2);
            let values = if lower {
                [add_low(got0, d[2]), add_low(got1, d[3])]
            } else {
                [add_low(d[0], got0), add_low(d[1], got1)]
            };
            write_pair(work, work.token(tile, 16 * U as u32, u, lower as u32), 2 * (t % 2), values, stats);
        } else {
            let column = 8 * n + 2 * t;
            write_pair(work, work.token(tile, 16 * U as u32, u, 0), column, [d[0], d[1]], stats);
            write_pair(work, work.token(tile, 16 * U as u32, u, 1), column, [d[2], d[3]], stats);
        }
    }

    /// Scales, stores and counts the products of one token with two adjacent heads of the group.
    #[inline(always)]
    unsafe fn write_pair<T: Element>(
        work: &Work<'_, T>,
        token: u32,
        column: u32,
        products: [f32; 2],
        stats: &mut [Stats; 2],
    ) {
        let params = work.params;
        let logits = [products[0] * params.score_scale, products[1] * params.score_scale];
        let tile = params.batch.logit_tile(work.row) + (token / LOGIT_TILE) as u64;
        let place = tile * params.num_kv_heads as u64 + work.kv_head as u64;
        let place = place * LOGIT_TILE as u64 + (token % LOGIT_TILE) as u64;
        let at = params.logits.add(place * params.group as u64 + column as u64);
        let inside = token >= work.candidates.begin && token < work.candidates.end;
        let valid = [inside && column < params.group, inside && column + 1 < params.group];
        if params.group.is_multiple_of(2) {
            if valid[0] {
                at.cast::<V2<f32>>().store(V2(logits));
            }
        } else {
            if valid[0] {
                at.store(logits[0]);
            }
            if valid[1] {
                at.add(1).store(logits[1]);
            }
        }
        let mut i = 0;
        while i < 2 {
            stats[i].push(if valid[i] { logits[i] } else { f32::NAN });
            i += 1;
        }
    }

    /// Merges the statistics of the lanes that hold the same columns, and stores them for the chunk.
    #[inline(always)]
    unsafe fn store_stats<T: Element, const N: usize, const PACKED: bool>(
        work: &Work<'_, T>,
        chunk: u32,
        stats: [[Stats; 2]; N],
    ) {
        let (lane, t) = (warp::lane_id(), warp::lane_id() % 4);
        let mut n = 0;
        while n < N {
            let mut i = 0;
            while i < 2 {
                let mut merged = stats[n][i];
                let (mut distance, holders) = if PACKED { (2, 2) } else { (4, 4) };
                while distance < 32 {
                    merged = merged.merge_lane(distance);
                    distance *= 2;
                }
                let member = 8 * n as u32 + 2 * t + i as u32;
                if lane < holders && member < work.params.group {
                    let head = work.kv_head * work.params.group + member;
                    partial(work, chunk, head).store(V2([merged.max, merged.sum]));
                }
                i += 1;
            }
            n += 1;
        }
    }

    /// Place of a head's statistics over one chunk.
    #[inline(always)]
    fn partial<T>(work: &Work<'_, T>, chunk: u32, head: u32) -> GlobalMut<V2<f32>> {
        let chunk = work.row as u64 * max_chunks(work.params.num_kv_heads) as u64 + chunk as u64;
        let num_qo_heads = work.params.num_kv_heads * work.params.group;
        work.params.partial.cast::<V2<f32>>().add(chunk * num_qo_heads as u64 + head as u64)
    }

    /// Folds the chunks' statistics of every head; run by the whole last block of a row. With 32 heads, eight threads
    /// share a head and each takes every eighth chunk.
    #[inline(always)]
    unsafe fn fold<T: Element>(work: &Work<'_, T>, layout: &Layout) {
        let num_qo_heads = work.params.num_kv_heads * work.params.group;
        core::hint::assert_unchecked(num_qo_heads != 0);
        let thread = thread::thread_idx_x();
        let parts = (THREADS / num_qo_heads).max(1);
        let shared = layout.stats.get();
        let (part, mut head) = (thread / num_qo_heads, thread % num_qo_heads);
        let rounds = num_qo_heads.div_ceil(THREADS);
        let mut round = 0;
        while round < rounds {
            let works = part < parts && head < num_qo_heads;
            let stats = if works { fold_part(work, head, part, parts) } else { Stats::EMPTY };
            shared.add(thread).store(V2([stats.max, stats.sum]));
            thread::sync_threads();
            if works && part == 0 {
                let mut merged = stats;
                let mut other = 1;
                while other < parts {
                    let [max, sum] = shared.add(other * num_qo_heads + thread).load().0;
                    merged = merged.merge(Stats { max, sum });
                    other += 1;
                }
                let at = work.params.stats.cast::<V2<f32>>().add((work.row * num_qo_heads + head) as u64);
                at.store(V2([merged.max, merged.sum]));
            }
            thread::sync_threads();
            head += THREADS;
            round += 1;
        }
    }

    /// Statistics of a head over the chunks `part`, `part + parts`, ... Many loads are under way at a time.
    #[inline(always)]
    unsafe fn fold_part<T: Element>(work: &Work<'_, T>, head: u32, part: u32, parts: u32) -> Stats {
        const BATCH: usize = 17;
        let mut stats = Stats::EMPTY;
        let mut chunk = part;
        while chunk < work.num_chunks {
            let mut batch = [Stats::EMPTY; BATCH];
            let mut i = 0;
            while i < BATCH {
                let at = chunk + i as u32 * parts;
                if at < work.num_chunks {
                    let [max, sum] = partial(work, at, head).load().0;
                    batch[i] = Stats { max, sum };
                }
                i += 1;
            }
            let mut i = 0;
            while i < BATCH {
                stats = stats.merge(batch[i]);
                i += 1;
            }
            chunk += BATCH as u32 * parts;
        }
        stats
    }
}
