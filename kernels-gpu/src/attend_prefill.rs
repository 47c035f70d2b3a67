//! `attend` for whole blocks: attention of many queries over one list, tile by tile through shared memory.
//!
//! ```text
//! for each row, KV head, 128 query rows:                                            (a block; a warp has 16 of them)
//!     for each tile of 64 places that the last of these queries sees:
//!         s = logit(q k^T),  -inf where the rank is not seen
//!         p = exp(s - max so far);  out = out * correction + p v
//!     out / sum, lse
//! ```
//! Keys come rotated from [`gather`](mod@crate::gather), or as they are from the pages (native positions); values from the
//! pages. Departures from the loops:
//! 1. While a tile is multiplied, the next one's keys and values are copied to shared memory asynchronously (`cp.async`),
//!    at offsets that were looked up one tile earlier still.
//! 2. Queries are rotated and rounded once, and stay in registers as A fragments of `mma.m16n8k16`; `ldmatrix` makes B
//!    fragments of keys, and transposed ones of values. Rows of shared memory are 16 bytes apart in their banks.
//! 3. Only tiles with a rank that some query of the warp does not see are masked.
//!
//! **Bytes.** Keys and values of the list once for each 128 query rows: from L2, but for the first.

use crate::attention::AttendParams;
use crate::launch::Dims;
use crate::simt::shared::{Carve, Region};

/// Threads of a block.
const THREADS: u32 = 256;
/// Warps of a block.
const WARPS: u32 = THREADS / 32;
/// Query rows of a block: 16 a warp.
const QUERY_ROWS: u32 = 16 * WARPS;
/// Places of a tile.
const TILE: u32 = 64;
/// Elements between rows of shared memory beyond the head: 16 bytes, so that eight rows lie in different banks.
const PAD: u32 = 8;

/// Shared memory of a block.
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct Layout {
    /// `[QUERY_ROWS, head_dim + PAD]`.
    queries: Region<u16>,
    /// `[2, TILE, head_dim + PAD]`.
    keys: Region<u16>,
    /// As `keys`.
    values: Region<u16>,
    /// Element offsets of each place's key and value, `[2, TILE]`.
    key_offsets: Region<u64>,
    /// As `key_offsets`.
    value_offsets: Region<u64>,
    /// Rank of each place, `[4, TILE]`: a tile's ranks are needed until it is done.
    ranks: Region<u32>,
    bytes: u32,
}

impl Layout {
    const fn new(head_dim: u32) -> Layout {
        let pitch = head_dim + PAD;
        let mut carve = Carve::new();
        Layout {
            queries: carve.array(QUERY_ROWS * pitch, 16),
            keys: carve.array(2 * TILE * pitch, 16),
            values: carve.array(2 * TILE * pitch, 16),
            key_offsets: carve.array(2 * TILE, 16),
            value_offsets: carve.array(2 * TILE, 16),
            ranks: carve.array(4 * TILE, 16),
            bytes: carve.bytes(),
        }
    }
}

impl<T> AttendParams<T> {
    /// A block per 128 query rows, KV head, and row.
    pub const fn prefill_dims(&self, head_dim: u32) -> Dims {
        let tiles = (self.max_block_len * self.group).div_ceil(QUERY_ROWS);
        Dims {
            grid: [tiles, self.num_kv_heads, self.batch.num_rows],
            block: [THREADS, 1, 1],
            shared_bytes: Layout::new(head_dim).bytes,
            cluster: 1,
        }
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub use kernel::attend_prefill;

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
mod kernel {
    use super::*;
    use crate::attention::{List, any_not_finite, subtracted};
    use crate::element::Element;
    use crate::simt::data::V2;
    use crate::simt::global::GlobalPtr;
    use crate::simt::shared::Shared;
    use crate::simt::tensor::{cp_async_16, cp_async_commit, cp_async_wait, ldmatrix_x4, ldmatrix_x4_trans};
    use crate::simt::{grid, math, thread, warp};

    /// Column tiles of eight places in a tile.
    const COLUMNS: usize = (TILE / 8) as usize;

    /// What a block works on, and what is the warp's own.
    struct Work<'a, T> {
        params: &'a AttendParams<T>,
        list: List,
        kv_head: u32,
        /// First query row of the block, and of the warp.
        block_row: u32,
        first_row: u32,
        /// Query rows of the KV head.
        num_rows: u32,
        /// Ranks that the lane's rows `g` and `g + 8` see.
        bounds: [u32; 2],
        /// Ranks that all rows of the warp see.
        least_bound: u32,
        /// Tiles that the block goes through.
        num_tiles: u32,
    }

    /// The rows `g` and `g + 8` of a lane: largest logit of each, and the lane's part of the sum.
    struct Softmax {
        max: [f32; 2],
        sum: [f32; 2],
    }

    /// See the module. `K` steps of 16 dimensions, `N = 2 K` column tiles of 8.
    ///
    /// # Safety
    /// - The buffers and tables are as [`AttendParams`] says, and 16-byte aligned; tokens lie in their rows, page numbers
    ///   in the pool.
    /// - `head_dim = 16 K`.
    /// - Keys are gathered, or no rope table is given.
    /// - Launched with [`AttendParams::prefill_dims`].
    #[inline(always)]
    pub unsafe fn attend_prefill<T: Element, const K: usize, const N: usize>(params: AttendParams<T>) {
        grid::wait_for_previous();
        grid::launch_dependents();
        let layout = const { &Layout::new((16 * K) as u32) };
        let list = params.list(thread::block_idx_z());
        let num_rows = params.num_query_rows(&list);
        let block_row = thread::block_idx_x() * QUERY_ROWS;
        if block_row >= num_rows {
            return;
        }
        let work = plan(&params, list, block_row, num_rows);
        let mut out = [[0.0; 4]; N];
        let mut softmax = Softmax { max: [f32::NEG_INFINITY; 2], sum: [0.0; 2] };
        if work.num_tiles == 0 {
            return write::<T, K, N>(&work, out, softmax);
        }
        look_up(&work, layout, 0);
        load_queries::<T, K>(&work, layout);
        thread::sync_threads();
        copy::<T, K>(&work, layout, 0);
        look_up(&work, layout, 1);
        let queries = query_fragments::<K>(layout);
        let mut tile = 0;
        while tile < work.num_tiles {
            cp_async_wait::<0>();
            // Everybody's part of this tile has arrived, and nobody works on the one before.
            thread::sync_threads();
            copy::<T, K>(&work, layout, tile + 1);
            look_up(&work, layout, tile + 2);
            attend_tile::<T, K, N>(&work, layout, tile, &queries, &mut softmax, &mut out);
            tile += 1;
        }
        write::<T, K, N>(&work, out, softmax);
    }

    #[inline(always)]
    unsafe fn plan<T: Element>(
        params: &AttendParams<T>,
        list: List,
        block_row: u32,
        num_rows: u32,
    ) -> Work<'_, T> {
        let first_row = block_row + 16 * warp::warp_id();
        let g = warp::lane_id() / 4;
        let bound = |row: u32| list.first_bound + row.min(num_rows - 1) / params.group.max(1);
        let last_bound = bound(block_row + QUERY_ROWS - 1);
        // Where ranks are the places, those beyond the last bound are seen by none.
        let len = if params.ranks.addr() != 0 { list.len } else { list.len.min(last_bound) };
        Work {
            params,
            list,
            kv_head: thread::block_idx_y(),
            block_row,
            first_row,
            num_rows,
            bounds: [bound(first_row + g), bound(first_row + g + 8)],
            least_bound: bound(first_row),
            num_tiles: len.div_ceil(TILE),
        }
    }

    /// Looks up where the keys and values of a tile lie. The first two warps look up keys, the next two values.
    #[inline(always)]
    unsafe fn look_up<T: Element>(work: &Work<'_, T>, layout: &Layout, tile: u32) {
        let (params, thread) = (work.params, thread::thread_idx_x());
        if tile >= work.num_tiles || thread >= 2 * TILE {
            return;
        }
        let place = thread % TILE;
        let at = params.place(&work.list, tile * TILE + place);
        let slot = tile % 2 * TILE + place;
        if thread < TILE {
            let offset = if params.k_is_gathered != 0 {
                let place = (tile * TILE + place).min(work.list.len - 1);
                params.k_stride.offset(work.list.row, place, work.kv_head)
            } else {
                let (page, within) = params.page(&work.list, at.token);
                params.k_stride.offset(page, within, work.kv_head)
            };
            layout.key_offsets.get().add(slot).store(offset);
        } else {
            let (page, within) = params.page(&work.list, at.token);
            layout.value_offsets.get().add(slot).store(params.v_stride.offset(page, within, work.kv_head));
            layout.ranks.get().add(tile % 4 * TILE + place).store(at.rank);
        }
    }

    /// Starts copying a tile's keys and values; a group of copies in any case.
    #[inline(always)]
    unsafe fn copy<T: Element, const K: usize>(work: &Work<'_, T>, layout: &Layout, tile: u32) {
        let pitch = (16 * K) as u32 + PAD;
        let pieces = (2 * K) as u32;
        if tile < work.num_tiles {
            let base = tile % 2 * TILE;
            let mut i = thread::thread_idx_x();
            while i < TILE * pieces {
                let (place, piece) = (i / pieces, i % pieces * 8);
                let to = (base + place) * pitch + piece;
                let from = layout.key_offsets.get().add(base + place).load() + piece as u64;
                cp_async_16(layout.keys.get().add(to), work.params.k_pages.add(from).cast::<u16>(), 16);
                let from = layout.value_offsets.get().add(base + place).load() + piece as u64;
                cp_async_16(layout.values.get().add(to), work.params.v_pages.add(from).cast::<u16>(), 16);
                i += THREADS;
            }
        }
        cp_async_commit();
    }

    /// Puts the block's query rows in shared memory, rotated; rows that there are not are zero.
    #[inline(always)]
    unsafe fn load_queries<T: Element, const K: usize>(work: &Work<'_, T>, layout: &Layout) {
        let (params, head_dim) = (work.params, (16 * K) as u32);
        let pairs = head_dim / 2;
        let mut i = thread::thread_idx_x();
        while i < QUERY_ROWS * pairs {
            let (row, pair) = (i / pairs, i % pairs);
            let to = layout.queries.get().cast::<T>().add(row * (head_dim + PAD));
            let (x, y) = params.rope.elements(pair);
            let mut values = (0.0, 0.0);
            if work.block_row + row < work.num_rows {
                let (at, t) = params.query_row(&work.list, work.kv_head, work.block_row + row);
                let q: GlobalPtr<T> = params.q.add(at * head_dim as u64);
                values = (q.add(x as u64).load_cached().to_f32(), q.add(y as u64).load_cached().to_f32());
                values = params.rope.rotate(pair, (work.list.first_bound + t).saturating_sub(1), values);
            }
            to.add(x).store(T::from_f32(values.0));
            to.add(y).store(T::from_f32(values.1));
            i += THREADS;
        }
    }

    /// The warp's A fragments.
    #[inline(always)]
    unsafe fn query_fragments<const K: usize>(layout: &Layout) -> [[u32; 4]; K] {
        let pitch = (16 * K) as u32 + PAD;
        let lane = warp::lane_id();
        let row = 16 * warp::warp_id() + lane % 16;
        let from = layout.queries.get().add(row * pitch + lane / 16 * 8);
        let mut fragments = [[0; 4]; K];
        let mut k = 0;
        while k < K {
            fragments[k] = ldmatrix_x4(from.add(16 * k as u32));
            k += 1;
        }
        fragments
    }

    /// One tile: logits, weights, output.
    #[inline(always)]
    unsafe fn attend_tile<T: Element, const K: usize, const N: usize>(
        work: &Work<'_, T>,
        layout: &Layout,
        tile: u32,
        queries: &[[u32; 4]; K],
        softmax: &mut Softmax,
        out: &mut [[f32; 4]; N],
    ) {
        let pitch = (16 * K) as u32 + PAD;
        let (lane, first) = (warp::lane_id(), tile % 2 * TILE);
        let ranks = layout.ranks.get().add(tile % 4 * TILE);
        // The ranks ascend, so the last tells whether all are seen.
        let masked = ranks.add(TILE - 1).load() >= work.least_bound;

        // Rows of two column tiles, upper and lower eight dimensions: lanes 0-7, 8-15 and 16-23, 24-31.
        let keys = layout.keys.get().add((first + lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
        let mut weights = [[0.0; 4]; COLUMNS];
        let mut n = 0;
        while n < COLUMNS {
            let mut k = 0;
            while k < K {
                let b = ldmatrix_x4(keys.add(8 * n as u32 * pitch + 16 * k as u32));
                T::mma(&mut weights[n], queries[k], [b[0], b[1]]);
                T::mma(&mut weights[n + 1], queries[k], [b[2], b[3]]);
                k += 1;
            }
            n += 2;
        }
        if masked {
            fold::<T, N, true>(work, ranks, &mut weights, softmax, out);
        } else {
            fold::<T, N, false>(work, ranks, &mut weights, softmax, out);
        }

        let of_tile = layout.values.get().add(first * pitch);
        if masked && any_value_not_finite::<T, K>(of_tile) {
            let of_tile = of_tile.cast::<T>();
            return accumulate_seen::<T, K, N>(work, layout, ranks, of_tile, &weights, out);
        }
        // Rows are places: lanes 0-15 give 16 of them for the first eight dimensions, 16-31 for the next.
        let values = layout.values.get().add((first + lane % 16) * pitch + lane / 16 * 8);
        let mut k = 0;
        while k < COLUMNS / 2 {
            let [upper, lower] = [weights[2 * k], weights[2 * k + 1]];
            let a = [
                T::pack(upper[0], upper[1]),
                T::pack(upper[2], upper[3]),
                T::pack(lower[0], lower[1]),
                T::pack(lower[2], lower[3]),
            ];
            let mut n = 0;
            while n < N {
                let b = ldmatrix_x4_trans(values.add(16 * k as u32 * pitch + 8 * n as u32));
                T::mma(&mut out[n], a, [b[0], b[1]]);
                T::mma(&mut out[n + 1], a, [b[2], b[3]]);
                n += 2;
            }
            k += 1;
        }
    }

    /// Whether a value of the tile is infinite or NaN; the same in all lanes.
    #[inline(always)]
    unsafe fn any_value_not_finite<T: Element, const K: usize>(values: Shared<u16>) -> bool {
        let (pitch, words) = ((16 * K) as u32 + PAD, (8 * K) as u32);
        let mut found = false;
        let mut i = warp::lane_id();
        while i < TILE * words {
            found |= any_not_finite::<T>(values.add(i / words * pitch + i % words * 2).cast::<u32>().load());
            i += warp::SIZE;
        }
        warp::any(warp::FULL, found)
    }

    /// `out += weights * values`, one place at a time: a value that a query does not see, infinite or NaN, is not
    /// multiplied by its weight of 0 either. For the rare tile that has such a value among the block's own tokens. The
    /// weights go by the shared memory of the warp's queries, which are in registers.
    #[inline(always)]
    unsafe fn accumulate_seen<T: Element, const K: usize, const N: usize>(
        work: &Work<'_, T>,
        layout: &Layout,
        ranks: Shared<u32>,
        values: Shared<T>,
        weights: &[[f32; 4]; COLUMNS],
        out: &mut [[f32; 4]; N],
    ) {
        let pitch = (16 * K) as u32 + PAD;
        let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
        let scratch = layout.queries.get().add(16 * warp::warp_id() * pitch).cast::<T>();
        warp::sync_warp(warp::FULL);
        let mut n = 0;
        while n < COLUMNS {
            let mut i = 0;
            while i < 4 {
                let (row, place) = (g + 8 * (i as u32 / 2), 8 * n as u32 + 2 * t + i as u32 % 2);
                scratch.add(TILE * row + place).store(T::from_f32(weights[n][i]));
                i += 1;
            }
            n += 1;
        }
        warp::sync_warp(warp::FULL);
        let mut place = 0;
        while place < TILE {
            let rank = ranks.add(place).load();
            let weight = [
                scratch.add(TILE * g + place).load().to_f32(),
                scratch.add(TILE * (g + 8) + place).load().to_f32(),
            ];
            let from = values.add(place * pitch + 2 * t);
            let mut n = 0;
            while n < N {
                let mut e = 0;
                while e < 2 {
                    let x = from.add((8 * n + e) as u32).load().to_f32();
                    let mut row = 0;
                    while row < 2 {
                        if rank < work.bounds[row] {
                            out[n][2 * row + e] += weight[row] * x;
                        }
                        row += 1;
                    }
                    e += 1;
                }
                n += 1;
            }
            place += 1;
        }
    }

    /// Turns products into weights, `exp(logit - max)`, with the softmax and the output so far brought up to date.
    #[inline(always)]
    unsafe fn fold<T: Element, const N: usize, const MASKED: bool>(
        work: &Work<'_, T>,
        ranks: Shared<u32>,
        weights: &mut [[f32; 4]; COLUMNS],
        softmax: &mut Softmax,
        out: &mut [[f32; 4]; N],
    ) {
        let t = warp::lane_id() % 4;
        let mut largest = softmax.max;
        let mut n = 0;
        while n < COLUMNS {
            let ranks =
                if MASKED { ranks.add(8 * n as u32 + 2 * t).cast::<V2<u32>>().load().0 } else { [0; 2] };
            let mut i = 0;
            while i < 4 {
                let seen = !MASKED || ranks[i % 2] < work.bounds[i / 2];
                weights[n][i] = if seen { work.params.logit(weights[n][i]) } else { f32::NEG_INFINITY };
                largest[i / 2] = largest[i / 2].max(weights[n][i]);
                i += 1;
            }
            n += 1;
        }
        let mut row = 0;
        while row < 2 {
            let max = largest[row].max(warp::shuffle_xor(warp::FULL, largest[row], 1));
            let max = max.max(warp::shuffle_xor(warp::FULL, max, 2));
            let correction = math::ex2(softmax.max[row] - subtracted(max));
            softmax.max[row] = max;
            softmax.sum[row] *= correction;
            let mut n = 0;
            while n < N {
                out[n][2 * row] *= correction;
                out[n][2 * row + 1] *= correction;
                n += 1;
            }
            row += 1;
        }
        let less = [subtracted(softmax.max[0]), subtracted(softmax.max[1])];
        let mut n = 0;
        while n < COLUMNS {
            let mut i = 0;
            while i < 4 {
                weights[n][i] = math::ex2(weights[n][i] - less[i / 2]);
                softmax.sum[i / 2] += weights[n][i];
                i += 1;
            }
            n += 1;
        }
    }

    /// Divides by the sums and writes the warp's rows.
    #[inline(always)]
    unsafe fn write<T: Element, const K: usize, const N: usize>(
        work: &Work<'_, T>,
        out: [[f32; 4]; N],
        softmax: Softmax,
    ) {
        let (params, t) = (work.params, warp::lane_id() % 4);
        let mut half = 0;
        while half < 2 {
            let sum = softmax.sum[half] + warp::shuffle_xor(warp::FULL, softmax.sum[half], 1);
            let sum = sum + warp::shuffle_xor(warp::FULL, sum, 2);
            let row = work.first_row + warp::lane_id() / 4 + 8 * half as u32;
            let exists = row < work.num_rows;
            let (at, _) = params.query_row(&work.list, work.kv_head, row.min(work.num_rows - 1));
            let inverse = 1.0 / sum;
            let mut n = 0;
            while n < N {
                // Neighbouring lanes' pairs make four adjacent elements: even lanes write those of the first column tile.
                let scaled = |x: f32| if sum == 0.0 { 0.0 } else { x * inverse };
                let own = [
                    [scaled(out[n][2 * half]), scaled(out[n][2 * half + 1])],
                    [scaled(out[n + 1][2 * half]), scaled(out[n + 1][2 * half + 1])],
                ];
                let odd = t % 2 == 1;
                let give = if odd { own[0] } else { own[1] };
                let got =
                    [warp::shuffle_xor(warp::FULL, give[0], 1), warp::shuffle_xor(warp::FULL, give[1], 1)];
                let (quad, column) = if odd {
                    ([got[0], got[1], own[1][0], own[1][1]], 8 * (n as u32 + 1) + 2 * (t - 1))
                } else {
                    ([own[0][0], own[0][1], got[0], got[1]], 8 * n as u32 + 2 * t)
                };
                if exists {
                    params.store_out(at * (16 * K) as u64 + column as u64, quad);
                }
                n += 2;
            }
            if exists && t == 0 {
                params.store_lse(at, softmax.max[half], sum);
            }
            half += 1;
        }
    }
}
