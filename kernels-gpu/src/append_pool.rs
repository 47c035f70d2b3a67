//! `append_pool`: [`append`](mod@crate::append) and [`pool`](mod@crate::pool) of short blocks in one launch.
//!
//! ```text
//! block 0 of row r:    mean of the row's rotated queries, all heads; cosine with the cached one; action
//! the others of row r: keys and values of the row's block, to its pages
//! ```
//! In decoding, either operation is a chain of trips to memory and little else. Here the chain is two trips long: tables,
//! then everything they point to.
//!
//! **Thread mapping.** A thread of block 0 has the same two pairs of elements (that RoPE may rotate together) in two heads,
//! so that it needs two angles; each other thread copies 16 bytes of keys and of values. Sums are added in a fixed order,
//! so the result does not depend on the launch.
//!
//! **Bytes.** Those of the two operations.

use crate::append::{AppendParams, PIECE};
use crate::launch::Dims;
use crate::pool::PoolParams;
use crate::simt::shared::{Carve, Region};

/// Longest block of a row.
pub const MAX_BLOCK_LEN: u32 = 4;

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
    /// \[3, MAX_WARPS\]: products of each warp.
    products: Region<f32>,
    bytes: u32,
}

const MAX_WARPS: u32 = MAX_THREADS / 32;

const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout { products: carve.array(3 * MAX_WARPS, 16), bytes: carve.bytes() }
};

impl<T> AppendPoolParams<T> {
    /// Whether the kernel can do this: blocks are short, rows not too wide, and rotated pairs even in number.
    pub const fn fits(&self) -> bool {
        self.max_block_len <= MAX_BLOCK_LEN
            && self.num_threads() <= MAX_THREADS
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

// Arrays are registers here; zipped iterators would put them in memory.
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
#[allow(clippy::needless_range_loop)]
mod kernel {
    use super::*;
    use crate::element::Element;
    use crate::layout::Tokens;
    use crate::pool::{Cached, EMPTY, cached_place, conclude, cosine};
    use crate::rope::{HALF_SPLIT, TwoRows};
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
        let products = sum_of_block(products(params, row, tables.queries, place, &mut cached));
        if thread::thread_idx_x() == 0 {
            conclude(params, row, &tables, &cached, cosine(products[0], products[1], products[2]));
        }
    }

    /// What a thread loads of a token.
    #[derive(Clone, Copy)]
    struct Token {
        /// Two elements each.
        q: [[u32; 2]; HEADS as usize],
        rows: TwoRows,
    }

    impl Token {
        const ZERO: Token = Token { q: [[0; 2]; HEADS as usize], rows: TwoRows::ZERO };
    }

    /// Two pairs of a head: four elements, two by two.
    #[derive(Clone, Copy)]
    struct Unit {
        /// The first pair, even.
        pair: u32,
        /// First of either two elements.
        at: [u32; 2],
        /// Whether a pair has an element of either two; else each two are a pair.
        is_split: bool,
    }

    impl Unit {
        #[inline(always)]
        fn new<T>(params: &PoolParams<T>, pair: u32) -> Self {
            let is_split = params.rope.pairing == HALF_SPLIT && pair < params.rope.pairs;
            let at = if is_split { [pair, pair + params.rope.pairs] } else { [2 * pair, 2 * pair + 2] };
            Unit { pair, at, is_split }
        }

        /// The elements' values at the place of their pairs, or back.
        #[inline(always)]
        fn swap(self, [[a, b], [c, d]]: [[f32; 2]; 2]) -> [[f32; 2]; 2] {
            if self.is_split { [[a, c], [b, d]] } else { [[a, b], [c, d]] }
        }
    }

    /// Writes the thread's part of the mean. Its products: mean times cached, mean squared, cached squared.
    #[inline(always)]
    unsafe fn products<T: Element>(
        params: &PoolParams<T>,
        row: u32,
        queries: Tokens,
        place: u32,
        cached: &mut Cached,
    ) -> [f32; 3] {
        let units = params.head_dim / 4;
        core::hint::assert_unchecked(units != 0);
        let unit = Unit::new(params, 2 * (thread::thread_idx_x() % units));
        let (first, step) = (thread::thread_idx_x() / units, params.num_qo_heads.div_ceil(HEADS));
        let head = |h: usize| first + h as u32 * step;
        let has = |h: usize| first < step && head(h) < params.num_qo_heads;
        let at = |h: usize, i: usize| (head(h) * params.head_dim + unit.at[i]) as u64;
        let width = params.num_qo_heads as u64 * params.head_dim as u64;
        let load = |t: u32| {
            let mut token = Token::ZERO;
            let q = params.q.add((queries.begin + t) as u64 * width);
            for h in 0..HEADS as usize {
                if has(h) {
                    token.q[h] = [0, 1].map(|i| q.add(at(h, i)).cast::<u32>().load_stream());
                }
            }
            if params.rope.coarse.addr() != 0 {
                let pair = unit.pair.min(params.rope.pairs - 2);
                token.rows = params.rope.two_rows(pair, params.n_local + t);
            }
            token
        };
        // Loaded before anything is used: two tokens, the cached query and what is known of it.
        let mut ahead = [Token::ZERO; 2];
        for t in 0..2 {
            if (t as u32) < queries.len() {
                ahead[t] = load(t as u32);
            }
        }
        let mut olds = [[V2([0.0f32; 2]); 2]; HEADS as usize];
        if place != EMPTY {
            let old = params.cached_queries.add(place as u64 * width);
            for h in 0..HEADS as usize {
                if has(h) {
                    olds[h] = [0, 1].map(|i| old.add(at(h, i)).cast::<V2<f32>>().load_cached());
                }
            }
            *cached = Cached::load(params, place);
        }
        let mut means = [[[0.0f32; 2]; 2]; HEADS as usize];
        for t in 0..MAX_BLOCK_LEN {
            if t < queries.len() {
                let token = ahead[t as usize % 2];
                let angles = token.rows.angles();
                for h in 0..HEADS as usize {
                    let pairs = unit.swap(token.q[h].map(T::unpack));
                    for i in 0..2 {
                        let (mut x, mut y) = (pairs[i][0], pairs[i][1]);
                        if unit.pair < params.rope.pairs {
                            (x, y) = angles[i].turn((x, y));
                        }
                        means[h][i][0] += x;
                        means[h][i][1] += y;
                    }
                }
                if t + 2 < queries.len() {
                    ahead[t as usize % 2] = load(t + 2);
                }
            }
        }
        let scale = 1.0 / queries.len().max(1) as f32;
        let out = params.queries.add(row as u64 * width);
        let mut products = [0.0; 3];
        for h in 0..HEADS as usize {
            if has(h) {
                let mean = unit.swap(means[h]);
                for i in 0..2 {
                    let (mean, old) = ([mean[i][0] * scale, mean[i][1] * scale], olds[h][i].0);
                    out.add(at(h, i)).cast::<V2<f32>>().store(V2(mean));
                    products[0] += mean[0] * old[0] + mean[1] * old[1];
                    products[1] += mean[0] * mean[0] + mean[1] * mean[1];
                    products[2] += old[0] * old[0] + old[1] * old[1];
                }
            }
        }
        products
    }

    /// The sums over the block, lanes first, then warps; valid in warp 0.
    #[inline(always)]
    unsafe fn sum_of_block(own: [f32; 3]) -> [f32; 3] {
        let products = LAYOUT.products.get();
        let (warp_id, lane) = (thread::thread_idx_x() / warp::SIZE, warp::lane_id());
        for i in 0..3 {
            let sum = warp::reduce_add_f32(own[i]);
            if lane == 0 {
                products.add(i as u32 * MAX_WARPS + warp_id).store(sum);
            }
        }
        thread::sync_threads();
        let mut sums = [0.0; 3];
        if warp_id == 0 {
            let has_warp = lane < thread::block_dim_x() / warp::SIZE;
            for i in 0..3 {
                let of_warp = if has_warp { products.add(i as u32 * MAX_WARPS + lane).load() } else { 0.0 };
                sums[i] = warp::reduce_add_f32(of_warp);
            }
        }
        sums
    }
}
