//! The kernels: statistics of all heads of a group's blocks, what they fold to, and the votes.

mod fold;
mod stats;
mod vote;

pub use self::fold::fold;
pub use self::stats::stats;
pub use self::vote::vote;

use super::params::*;
use crate::common::block::strided;
use crate::common::element::{Element, split_towards_zero};
use crate::common::fragment::{A, Accumulator, B, Lane, lane};
use crate::common::layout::{LOGIT_TILE, Tokens};
use crate::limits::{CORE_BYTES, WARPGROUP};
use crate::ops::pool::SCORE;
use crate::simt::data::{V2, V4};
use crate::simt::global::GlobalPtr;
use crate::simt::shared::Shared;
use crate::simt::warpgroup::{self, Columns};
use crate::simt::{tensor, thread, warp};

const _: () = assert!(TILE == 4 * LOGIT_TILE);

/// A warp's 16 keys as A fragments of 16 dimensions, two for each chunk of 32.
type Keys<const C: usize> = [[A; 2]; C];

/// Whether each of the lane's two tokens is a candidate of its blocks, of which there are `SLOTS / G`.
type Seen = [[bool; 2]; SLOTS];

/// Products of a tile: [`Accumulator`]s of eight columns each.
type Products = [[f32; 4]; SLOTS / 2];

/// The blocks of a group, as a thread block sees them.
struct Group<'a, T> {
    params: &'a ScoreBlocksParams<T>,
    first_row: u32,
    /// Page table of the last row.
    pages: GlobalPtr<u32>,
    ranges: Shared<V2<u32>>,
    /// From the first candidate of any block to the last.
    all: Tokens,
    /// Candidates of every block that is scored.
    common: Tokens,
    /// Whether 16 tokens that a warp multiplies always lie in one page. Of those that are no candidates any keys may be read, of that page.
    has_runs: bool,
}

impl<'a, T: Element> Group<'a, T> {
    /// Group `index`; `B` blocks at most. Candidates of rows that are not scored are none.
    ///
    /// *Convergence:* aligned; every thread of the block.
    unsafe fn new(
        params: &'a ScoreBlocksParams<T>,
        index: u32,
        num_blocks: u32,
        ranges: Shared<V2<u32>>,
    ) -> Self {
        let [first_row, num_rows] = params.groups.add(index as u64).load().0;
        let block = thread::thread_idx_x();
        if block < num_blocks {
            let mut range = Tokens { begin: 0, end: 0 };
            if block < num_rows {
                let row = first_row + block;
                let candidates = params.batch.candidates(row, params.n_init, params.n_local);
                if params.actions.add(row as u64).load() == SCORE {
                    range = candidates;
                }
            }
            ranges.add(block).store(V2([range.begin, range.end]));
        }
        thread::sync_threads();
        let mut all = Tokens { begin: u32::MAX, end: 0 };
        let mut common = Tokens { begin: 0, end: u32::MAX };
        for block in 0..num_blocks {
            let [begin, end] = ranges.add(block).load().0;
            if begin < end {
                all = Tokens { begin: all.begin.min(begin), end: all.end.max(end) };
                common = Tokens { begin: common.begin.max(begin), end: common.end.min(end) };
            }
        }
        let last = params.batch.first_page(first_row + num_rows.max(1) - 1);
        let pages = params.batch.kv_indices.add(last as u64);
        let has_runs = params.batch.page_size.is_multiple_of(LOGIT_TILE);
        Group { params, first_row, pages, ranges, all, common, has_runs }
    }

    /// Whether no block is scored.
    fn is_idle(&self) -> bool {
        self.all.begin >= self.all.end
    }

    /// Candidates of a block.
    unsafe fn range(&self, block: u32) -> Tokens {
        let [begin, end] = self.ranges.add(block).load().0;
        Tokens { begin, end }
    }

    /// Whether every token of a tile is a candidate of every block.
    fn is_full(&self, tile: u32) -> bool {
        TILE * tile >= self.common.begin && TILE * (tile + 1) <= self.common.end
    }

    /// Which of the lane's tokens of a tile are candidates of its blocks.
    #[inline(always)]
    unsafe fn seen<const G: usize>(&self, tile: u32) -> Seen {
        let mut seen = [[false; 2]; SLOTS];
        for q in 0..SLOTS / G {
            let range = self.range(block_of::<G>(lane(), q * G));
            for half in 0..2 {
                let token = Self::token(tile, half as u32);
                seen[q][half] = token >= range.begin && token < range.end;
            }
        }
        seen
    }

    /// The lane's token of a tile, of its warp's upper or lower eight.
    fn token(tile: u32, half: u32) -> u32 {
        TILE * tile + LOGIT_TILE * (warp::warp_id() % ENTRIES) + 8 * half + lane().g
    }

    /// A token of a tile, or the candidate next to it: the first, or the last of any block.
    fn clamped(&self, token: u32) -> u32 {
        token.min(self.all.end - 1).max(self.all.begin)
    }

    /// The page of the token that the lane looks up: one of its warp's 16.
    unsafe fn load_page(&self, tile: u32) -> u32 {
        let (page, _) = self.params.batch.split_token(self.looked_up(tile));
        self.pages.add(page as u64).load()
    }

    fn looked_up(&self, tile: u32) -> u32 {
        let of_warp = LOGIT_TILE * (warp::warp_id() % ENTRIES);
        self.clamped(TILE * tile + of_warp + warp::lane_id() % LOGIT_TILE)
    }

    /// Its key; where there are [runs](Self::has_runs), that of the first of the warp's 16 tokens.
    unsafe fn key(&self, tile: u32, kv_head: u32, page: u32) -> GlobalPtr<T> {
        let token = self.looked_up(tile);
        let token = if self.has_runs { token / LOGIT_TILE * LOGIT_TILE } else { token };
        let (_, token) = self.params.batch.split_token(token);
        self.params.k_pages.add(self.params.stride.offset(page, token, kv_head))
    }

    /// Four dimensions of the scoring query of a column of a KV head, from `first` on; 0 where the column has no query.
    #[inline(always)]
    unsafe fn load_four<const C: usize, const G: usize>(&self, four: &Four<C>, first: u32) -> [f32; 4] {
        let (params, dims) = (self.params, 32 * C as u64);
        let slot = four.column / 8 * 2 + four.column % 2;
        let (block, member) = (four.column % 8 / 2 + 4 * (slot / G as u32), slot % G as u32);
        let range = self.range(block);
        if member >= params.group || range.begin >= range.end {
            return [0.0; 4];
        }
        let head = (first + four.head) * params.group + member;
        let row = (self.first_row + block) as u64 * (params.num_kv_heads * params.group) as u64;
        let at = params.queries.add((row + head as u64) * dims + 4 * four.number as u64);
        let four = at.cast::<V4<f32>>().load().0;
        if T::IS_NARROW { four.map(|x| x * params.rotated_scale) } else { four }
    }

    /// Splits the queries of `num_heads` KV heads from `first` on, and puts them where products read them.
    ///
    /// *Convergence:* every thread of the block; a barrier must follow.
    unsafe fn put_queries<const C: usize, const G: usize>(
        &self,
        to: Shared<u16>,
        first: u32,
        num_heads: u32,
    ) {
        /// Fours of dimensions that a thread has in flight.
        const BATCH: usize = 8;

        let (step, end) = (thread::block_dim_x(), num_heads * COLUMNS * 8 * C as u32);
        for item in strided(thread::thread_idx_x(), end, step * BATCH as u32) {
            let mut fours = [[0.0; 4]; BATCH];
            for i in 0..BATCH {
                let four = Four::<C>::new(item + i as u32 * step);
                if item + (i as u32) * step < end {
                    fours[i] = self.load_four::<C, G>(&four, first);
                }
            }
            for i in 0..BATCH {
                let four = Four::<C>::new(item + i as u32 * step);
                if item + (i as u32) * step < end {
                    let halves = fours[i].map(split_towards_zero::<T>);
                    let word =
                        |half: usize, i: usize| halves[i][half] as u32 | (halves[i + 1][half] as u32) << 16;
                    let high = to.byte_add(four.place()).cast::<V2<u32>>();
                    high.store(V2([word(0, 0), word(0, 2)]));
                    high.byte_add(4 * C as u32 * ROW_BYTES).store(V2([word(1, 0), word(1, 2)]));
                }
            }
        }
        if warpgroup::available() {
            warpgroup::fence_writes();
        }
    }
}

/// The keys of a warp's 16 tokens on their way: stages of shared memory that belong to the warp alone.
///
/// A lane copies 16 bytes at a time, eight lanes a whole line, so that memory is asked for lines. Pieces trade places within 128 bytes of a
/// token, or 64 where rows are no multiple of 128 bytes, by the token's number: so the eight pieces of a column, of which A fragments are made,
/// lie in different banks.
#[derive(Clone, Copy)]
struct Stages<const C: usize> {
    /// Where the lane's copies go: of tokens `lane / 8` and `lane / 8 + 4`, piece `lane % 8`.
    copied: [Shared<V4<u32>>; 2],
    /// The row of the lane's token of a fragment, and what is added up (xor) with the place of its pieces.
    row: Shared<V4<u32>>,
    trade: u32,
    /// The fragments' second eight dimensions.
    half: u32,
}

impl<const C: usize> Stages<C> {
    /// Bytes of a token's key.
    const ROW: u32 = 64 * C as u32;
    /// Bytes of a stage.
    const STAGE: u32 = LOGIT_TILE * Self::ROW;
    /// Lines that a key lies in.
    const LINES: u32 = Self::ROW.div_ceil(128);

    /// What pieces of a token trade places by.
    fn trade(token: u32) -> u32 {
        if Self::ROW.is_multiple_of(128) { token % 8 } else { token / 2 % 4 }
    }

    fn new(all: Shared<V4<u32>>) -> Self {
        let of_warp = all.byte_add(warp::warp_id() * STAGES * Self::STAGE);
        let lane = warp::lane_id();
        let copied = [0, 4].map(|more| {
            let token = lane / 8 + more;
            of_warp.byte_add(token * Self::ROW + 16 * ((lane % 8) ^ Self::trade(token)))
        });
        let token = lane % LOGIT_TILE;
        Stages {
            copied,
            row: of_warp.byte_add(token * Self::ROW),
            trade: Self::trade(token),
            half: lane / LOGIT_TILE,
        }
    }

    /// Starts copies of the keys of a tile, whose pages the lanes have looked up ([`Group::load_page`]).
    ///
    /// *Convergence:* aligned; all 32 lanes.
    ///
    /// # Safety
    /// - All lanes have read what was in the stage.
    #[inline(always)]
    unsafe fn start<T: Element>(&self, group: &Group<'_, T>, stage: u32, tile: u32, kv_head: u32, page: u32) {
        let lane = warp::lane_id();
        let key = group.key(tile, kv_head, page);
        if group.has_runs {
            // One page has all.
            let own = key.add(lane as u64 / 8 * group.params.stride.token);
            for i in 0..LOGIT_TILE / 4 {
                self.copy_row(stage, i, own.add((4 * i) as u64 * group.params.stride.token));
            }
        } else {
            for i in 0..LOGIT_TILE / 4 {
                let [low, high] = [key.addr() as u32, (key.addr() >> 32) as u32]
                    .map(|half| warp::shuffle_idx(warp::FULL, half, 4 * i + lane / 8));
                self.copy_row(stage, i, GlobalPtr::<T>::from_addr((high as u64) << 32 | low as u64));
            }
        }
        tensor::cp_async_commit();
    }

    /// Starts the lane's copies of the key of token `4 i + lane / 8`.
    #[inline(always)]
    unsafe fn copy_row<T: Element>(&self, stage: u32, i: u32, key: GlobalPtr<T>) {
        let piece = warp::lane_id() % 8;
        let from = key.cast::<V4<u32>>().add(piece as u64);
        for line in 0..Self::LINES {
            if Self::ROW.is_multiple_of(128) || 128 * line + 16 * piece < Self::ROW {
                let to = self.copied[i as usize % 2].byte_add(i / 2 * 8 * Self::ROW + 128 * line);
                tensor::cp_async_16(to.byte_add(stage * Self::STAGE), from.add((8 * line) as u64), 16);
            }
        }
    }

    /// The lane's A fragments of the tile that was started before the last one.
    ///
    /// *Convergence:* aligned; all 32 lanes. The stage may be filled again.
    #[inline(always)]
    unsafe fn take(&self, stage: u32) -> Keys<C> {
        tensor::cp_async_wait::<{ STAGES - 1 }>();
        warp::sync_warp(warp::FULL);
        let row = self.row.byte_add(stage * Self::STAGE);
        let mut keys = [[A([0; 4]); 2]; C];
        for c in 0..C {
            for step in 0..2 {
                let piece = (4 * c + 2 * step) as u32;
                keys[c][step] = A(tensor::ldmatrix_x4(row.byte_add(16 * ((piece | self.half) ^ self.trade))));
            }
        }
        warp::sync_warp(warp::FULL);
        keys
    }
}

/// Four adjacent dimensions of a column, `4 number ..`.
struct Four<const C: usize> {
    number: u32,
    column: u32,
    /// From the first head.
    head: u32,
}

impl<const C: usize> Four<C> {
    /// Adjacent ones of eight are adjacent in memory.
    fn new(item: u32) -> Self {
        let (within, rest) = (item % 8, item / 8);
        let (column, rest) = (rest % COLUMNS, rest / COLUMNS);
        Four { number: rest % C as u32 * 8 + within, column, head: rest / C as u32 }
    }

    /// Where the high halves go, in bytes.
    fn place(&self) -> u32 {
        let of_column = self.column / 8 * CORE_BYTES + self.column % 8 * 16;
        self.head * bytes_of_head(32 * C as u32)
            + self.number / 2 * ROW_BYTES
            + of_column
            + self.number % 2 * 8
    }
}

/// Starts the products of a tile's keys with a KV head's queries, high and low halves added up; [`finish`] must follow. `WIDE`: the
/// warpgroup multiplies.
///
/// *Convergence:* aligned; the warpgroup.
#[inline(always)]
unsafe fn multiply<T: Element, const C: usize, const WIDE: bool>(
    products: &mut Products,
    keys: &Keys<C>,
    queries: Shared<u16>,
) {
    if WIDE {
        warpgroup::fence();
    }
    for low in 0..2 {
        for step in 0..2 * C {
            let a = keys[step / 2][step % 2];
            let rows = (2 * (2 * C * low + step)) as u32;
            let start = queries.byte_add(rows * ROW_BYTES).cast::<T>();
            let is_first = low == 0 && step == 0;
            if WIDE {
                let b = Columns { start, row_bytes: ROW_BYTES, column_bytes: CORE_BYTES, is_swizzled: false };
                if is_first {
                    T::mma_of_warpgroup::<_, false, false>(products, a, b);
                } else {
                    T::mma_of_warpgroup::<_, true, false>(products, a, b);
                }
            } else {
                let at = lane();
                let column = start.byte_add(B::column(at) * 16 + 4 * at.t).cast::<u32>();
                for tile in 0..SLOTS / 2 {
                    let core = column.byte_add(tile as u32 * CORE_BYTES);
                    let b = B([core.load(), core.byte_add(ROW_BYTES).load()]);
                    let mut sum = if is_first { Accumulator::ZERO } else { Accumulator(products[tile]) };
                    T::mma(&mut sum, a, b);
                    products[tile] = sum.0;
                }
            }
        }
    }
    if WIDE {
        warpgroup::commit();
    }
}

/// Waits for the products that [`multiply`] has started.
///
/// *Convergence:* aligned; the warpgroup.
#[inline(always)]
unsafe fn finish<const WIDE: bool>(products: &mut Products) {
    if WIDE {
        warpgroup::wait::<_, 0>(products);
    }
}

/// The product of a slot for one of the lane's two tokens.
#[inline(always)]
fn product(products: &Products, slot: usize, half: usize) -> f32 {
    products[slot / 2][2 * half + slot % 2]
}

/// The lane's block of a slot: `G` slots belong to four blocks.
#[inline(always)]
fn block_of<const G: usize>(at: Lane, slot: usize) -> u32 {
    at.t + 4 * (slot / G) as u32
}
