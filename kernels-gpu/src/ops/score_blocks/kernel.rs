//! The kernels: statistics of all heads of a group's blocks, what they fold to, and the votes.

mod fold;
mod stats;
#[cfg(test)]
mod tests;
mod vote;

pub use self::fold::fold;
pub use self::stats::stats;
pub use self::vote::vote;

use super::params::*;
use crate::common::block::strided;
use crate::common::element::{Element, split_towards_zero};
use crate::common::fragment::{A, Accumulator, B, lane};
use crate::common::layout::{LOGIT_TILE, Tokens};
use crate::limits::WARPGROUP;
use crate::ops::pool::SCORE;
use crate::simt::data::{V2, V4};
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::Shared;
use crate::simt::warpgroup::{self, Columns, Rows};
use crate::simt::{tensor, thread, warp};

/// Products of a tile: [`Accumulator`]s of the warp's 16 rows and eight tokens each.
type Products = [[f32; 4]; FRAGMENTS];

/// Which of the lane's tokens of a tile, two of each fragment, are candidates of its block.
type Seen = [[bool; 2]; FRAGMENTS];

/// The lane's place in products: two rows, heads of one block.
#[derive(Clone, Copy)]
struct Place {
    /// The block, from the group's first.
    block: u32,
    /// The heads, from the KV head's first. There may be none of that number.
    members: [u32; 2],
}

impl Place {
    /// Of a row of the lane, `g` or `g + 8` of its warp's. `G` heads of a block lie in the two rows of `G / 2` adjacent `g`.
    const fn of_row<const G: usize>(row: u32) -> (u32, u32) {
        let half = G as u32 / 2;
        let (warp, within) = (row / WARP_ROWS, row % WARP_ROWS);
        let (g, upper) = (within % 8, within / 8);
        (warp * (WARP_ROWS / G as u32) + g / half, 2 * (g % half) + upper)
    }

    /// The row of a block's head.
    fn row(columns: u32, block: u32, member: u32) -> u32 {
        let blocks = (WARP_ROWS / columns.max(1)).max(1);
        let g = block % blocks * (columns / 2) + member / 2;
        WARP_ROWS * (block / blocks) + g + 8 * (member % 2)
    }

    fn own<const G: usize>() -> Place {
        let row = own_row();
        let (block, first) = Place::of_row::<G>(row);
        Place { block, members: [first, first + 1] }
    }
}

/// The lane's first row of a product; the second is eight behind.
fn own_row() -> u32 {
    WARP_ROWS * (warp::warp_id() % 4) + lane().g
}

/// Those of [`stats()`] and [`vote()`].
#[inline(always)]
fn launch_bounds<const C: usize, const WIDE: bool>() {
    match (C, WIDE) {
        (3, true) => thread::launch_bounds::<{ threads(96, true) }, 1>(),
        (0..=4, true) => thread::launch_bounds::<{ threads(128, true) }, 1>(),
        (0..=4, false) => thread::launch_bounds::<{ threads(128, false) }, 2>(),
        (_, true) => thread::launch_bounds::<{ threads(256, true) }, 1>(),
        (_, false) => thread::launch_bounds::<{ threads(256, false) }, 1>(),
    }
}

/// The number of the warpgroup in its block, the same in all lanes, and known to be.
unsafe fn own_warpgroup() -> u32 {
    warp::shuffle_idx(warp::FULL, thread::thread_idx_x() / WARPGROUP, 0)
}

/// The blocks of a group, as a thread block sees them.
struct Group<'a, T> {
    params: &'a ScoreBlocksParams<T>,
    index: u32,
    first_row: u32,
    num_rows: u32,
    /// Page table of the last row.
    pages: GlobalPtr<u32>,
    ranges: Shared<V2<u32>>,
    /// From the first candidate of any block to the last.
    all: Tokens,
    /// Candidates of every block that is scored.
    common: Tokens,
    /// Whether 16 tokens that a warp copies always lie in one page. Of those that are no candidates any keys may be read, of that page.
    has_runs: bool,
}

impl<'a, T: Element> Group<'a, T> {
    /// Group `index`, of `num_blocks` blocks at most. Candidates of rows that are not scored are none.
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
        Group { params, index, first_row, num_rows, pages, ranges, all, common, has_runs }
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

    /// Which of the lane's tokens of a tile lie in a range.
    #[inline(always)]
    fn seen(tile: u32, range: Tokens) -> Seen {
        let mut seen = [[false; 2]; FRAGMENTS];
        for f in 0..FRAGMENTS {
            for column in 0..2 {
                let token = Self::token(tile, f as u32, column as u32);
                seen[f][column] = token >= range.begin && token < range.end;
            }
        }
        seen
    }

    /// The lane's token of a tile: one of two of a fragment.
    fn token(tile: u32, fragment: u32, column: u32) -> u32 {
        TILE * tile + 8 * fragment + 2 * lane().t + column
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
        let of_warp = LOGIT_TILE * (warp::warp_id() % 4);
        self.clamped(TILE * tile + of_warp + warp::lane_id() % LOGIT_TILE)
    }

    /// Its key; where there are [runs](Self::has_runs), that of the first of the warp's 16 tokens.
    unsafe fn key(&self, tile: u32, kv_head: u32, page: u32) -> GlobalPtr<T> {
        let token = self.looked_up(tile);
        let token = if self.has_runs { token / LOGIT_TILE * LOGIT_TILE } else { token };
        let (_, token) = self.params.batch.split_token(token);
        self.params.k_pages.add(self.params.stride.offset(page, token, kv_head))
    }

    /// Four dimensions of the scoring query of a row of a KV head; 0 where the row has no query.
    #[inline(always)]
    unsafe fn load_four<const C: usize, const G: usize>(&self, four: &Four<C>, kv_head: u32) -> [f32; 4] {
        let (params, dims) = (self.params, 32 * C as u64);
        let (block, member) = Place::of_row::<G>(four.row);
        let range = self.range(block);
        if member >= params.group || range.begin >= range.end {
            return [0.0; 4];
        }
        let head = kv_head * params.group + member;
        let row = (self.first_row + block) as u64 * (params.num_kv_heads * params.group) as u64;
        let at = params.queries.add((row + head as u64) * dims + 4 * four.number as u64);
        let four = at.cast::<V4<f32>>().load().0;
        if T::IS_NARROW { four.map(|x| x * params.rotated_scale) } else { four }
    }

    /// Splits the queries of a KV head, and puts them where products read them.
    ///
    /// *Convergence:* every thread of the block; a barrier must follow.
    unsafe fn put_queries<const C: usize, const G: usize>(&self, to: Shared<u16>, kv_head: u32) {
        /// Fours of dimensions that a thread has in flight.
        const BATCH: usize = 8;

        let (step, end) = (thread::block_dim_x(), ROWS * 8 * C as u32);
        for item in strided(thread::thread_idx_x(), end, step * BATCH as u32) {
            let mut fours = [[0.0; 4]; BATCH];
            for i in 0..BATCH {
                let four = Four::<C>::new(item + i as u32 * step);
                if item + (i as u32) * step < end {
                    fours[i] = self.load_four::<C, G>(&four, kv_head);
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
                    high.byte_add(const { bytes_of_head(32 * C as u32) / 2 })
                        .store(V2([word(1, 0), word(1, 2)]));
                }
            }
        }
        if warpgroup::available() {
            warpgroup::fence_writes();
        }
    }

    /// The group's slabs in memory: its rows, as far as it has blocks.
    fn slabs<const C: usize, const G: usize>(&self) -> Slabs<C> {
        let num_kv_heads = self.params.num_kv_heads;
        let before = first_slab(self.index, self.first_row, G as u32) as u64 * num_kv_heads as u64;
        let first = self.params.operands.add(before * (Slabs::<C>::BYTES / 16) as u64);
        Slabs { first, num_kv_heads }
    }

    /// Slabs that hold its blocks.
    fn num_slabs<const G: usize>(&self) -> u32 {
        self.num_rows.div_ceil(WARP_ROWS / G as u32)
    }
}

/// A group's slabs in [`ScoreBlocksParams::operands`]. With `b` blocks in a slab, those of group `i`, whose first row is `r`, begin at
/// `(r + i (b - 1)) / b`, rounded down: groups do not overlap, and there are no more slabs than rows.
struct Slabs<const C: usize> {
    first: GlobalMut<V4<u32>>,
    num_kv_heads: u32,
}

impl<const C: usize> Slabs<C> {
    const BYTES: u32 = bytes_of_slab(32 * C as u32);

    /// Pieces of 16 bytes of one half's line of all rows.
    const PIECES: u32 = WARP_ROWS * LINE / 16;

    /// Those pieces, one line after the other.
    const LINES: u32 = 2 * lines(32 * C as u32);

    fn at(&self, slab: u32, kv_head: u32) -> GlobalMut<V4<u32>> {
        let number = (slab * self.num_kv_heads + kv_head) as u64;
        self.first.add(number * (Self::BYTES / 16) as u64)
    }

    /// The sums of a slab.
    fn sums(&self, slab: u32, kv_head: u32) -> GlobalMut<V4<u32>> {
        self.at(slab, kv_head).add((Self::PIECES * Self::LINES) as u64)
    }

    /// The first dimension of a piece of a line.
    fn dimension(line: u32, piece: u32) -> u32 {
        let of_line = (piece % 8) ^ (piece / 8 % 8);
        line % const { lines(32 * C as u32) } * (LINE / 2) + 8 * of_line
    }

    /// Where a piece of a line of a slab lies in shared memory.
    fn piece(queries: Shared<u16>, slab: u32, line: u32, piece: u32) -> Shared<V4<u32>> {
        queries.byte_add((line * ROWS + slab * WARP_ROWS) * LINE).cast::<V4<u32>>().add(piece)
    }
}

/// The first slab of a group; see [`Slabs`].
fn first_slab(group: u32, first_row: u32, columns: u32) -> u32 {
    let blocks = (WARP_ROWS / columns.max(1)).max(1);
    (first_row + group * (blocks - 1)) / blocks
}

/// The keys of a warpgroup's tiles on their way: stages of shared memory, of which each warp fills 16 tokens.
///
/// A lane copies 16 bytes at a time, eight lanes a whole line, so that memory is asked for lines.
#[derive(Clone, Copy)]
struct Stages<const C: usize> {
    /// The warpgroup's first.
    first: Shared<u16>,
    /// Where the lane's copies go: of the warp's tokens `lane / 8` and `lane / 8 + 4`, piece `lane % 8`.
    copied: [Shared<V4<u32>>; 2],
}

impl<const C: usize> Stages<C> {
    /// Bytes of a token's key.
    const ROW: u32 = 64 * C as u32;
    /// Bytes of a stage.
    const STAGE: u32 = bytes_of_stage(32 * C as u32);

    unsafe fn new(all: Shared<u16>) -> Self {
        let first = all.byte_add(own_warpgroup() * STAGES * Self::STAGE);
        let lane = warp::lane_id();
        let copied = [0, 4].map(|more| {
            let token = lane / 8 + more;
            let line = LOGIT_TILE * (warp::warp_id() % 4) + token;
            first.byte_add(LINE * line + 16 * ((lane % 8) ^ token)).cast()
        });
        Stages { first, copied }
    }

    /// Starts copies of the keys of the warp's tokens of a tile, whose pages the lanes have looked up ([`Group::load_page`]).
    ///
    /// *Convergence:* aligned; all 32 lanes.
    ///
    /// # Safety
    /// - The warpgroup is done with what was in the stage.
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
        for line in 0..const { lines(32 * C as u32) } {
            if Self::ROW.is_multiple_of(LINE) || LINE * line + 16 * piece < Self::ROW {
                let to = self.copied[i as usize % 2].byte_add(i / 2 * EIGHT_ROWS + line * TILE * LINE);
                tensor::cp_async_16(to.byte_add(stage * Self::STAGE), from.add((8 * line) as u64), 16);
            }
        }
    }

    /// Waits for the keys of the last stage that was started: they are there for the warpgroup, which is done with the others, if it
    /// has waited for its products with them.
    ///
    /// *Convergence:* aligned; the warpgroup. `barrier` is its own.
    #[inline(always)]
    unsafe fn meet(&self, barrier: u32) {
        tensor::cp_async_wait::<0>();
        if warpgroup::available() {
            warpgroup::fence_writes();
        }
        thread::sync_named(barrier, WARPGROUP);
    }

    fn keys(&self, stage: u32) -> Shared<u16> {
        self.first.byte_add(stage * Self::STAGE)
    }
}

/// Four adjacent dimensions of a row, `4 number ..`.
struct Four<const C: usize> {
    number: u32,
    row: u32,
}

impl<const C: usize> Four<C> {
    /// Adjacent ones of eight are adjacent in memory.
    fn new(item: u32) -> Self {
        let (within, rest) = (item % 8, item / 8);
        Four { number: rest / ROWS * 8 + within, row: rest % ROWS }
    }

    /// Where the high halves go, in bytes.
    fn place(&self) -> u32 {
        let (piece, of_piece) = (self.number / 2, self.number % 2 * 8);
        piece / 8 * ROWS * LINE + self.row * LINE + 16 * ((piece ^ self.row) % 8) + of_piece
    }
}

/// Starts the products of a KV head's queries, high and low halves added up, with a tile's keys; [`finish`] must follow. `WIDE`: the
/// warpgroup multiplies.
///
/// *Convergence:* aligned; the warpgroup.
#[inline(always)]
unsafe fn multiply<T: Element, const C: usize, const WIDE: bool>(
    products: &mut Products,
    queries: Shared<u16>,
    keys: Shared<u16>,
) {
    if WIDE {
        warpgroup::fence();
    }
    for half in 0..2 {
        for step in 0..2 * C as u32 {
            let is_first = half == 0 && step == 0;
            let (line, piece) = (step / 4, 2 * (step % 4));
            let rows =
                queries.byte_add(half * const { bytes_of_head(32 * C as u32) / 2 } + line * ROWS * LINE);
            let columns = keys.byte_add(line * TILE * LINE);
            if WIDE {
                let a = Rows { start: rows.byte_add(16 * piece).cast::<T>(), row_bytes: EIGHT_ROWS };
                let b = Columns {
                    start: columns.byte_add(16 * piece).cast::<T>(),
                    row_bytes: 0,
                    column_bytes: EIGHT_ROWS,
                    is_swizzled: true,
                };
                if is_first {
                    T::mma_of_warpgroup_from_shared::<_, false, false>(products, a, b);
                } else {
                    T::mma_of_warpgroup_from_shared::<_, true, false>(products, a, b);
                }
            } else {
                multiply_of_warp::<T>(products, rows, columns, piece, is_first);
            }
        }
    }
    if WIDE {
        warpgroup::commit();
    }
}

/// D += A·B of the warp's rows and a tile, 16 dimensions from piece `piece` of lines; D = A·B if `is_first`.
#[inline(always)]
unsafe fn multiply_of_warp<T: Element>(
    products: &mut Products,
    rows: Shared<u16>,
    columns: Shared<u16>,
    piece: u32,
    is_first: bool,
) {
    let lane = warp::lane_id();
    // Eight lanes give the rows of each 8 x 8 tile: those of A rows first, those of B dimensions first.
    let at = |line: u32, piece: u32| LINE * line + 16 * ((piece ^ line) % 8);
    let row = WARP_ROWS * (warp::warp_id() % 4) + lane % 16;
    let a = A(tensor::ldmatrix_x4(rows.byte_add(at(row, piece + lane / 16)).cast::<T>()));
    for pair in 0..FRAGMENTS / 2 {
        let token = 16 * pair as u32 + lane / 16 * 8 + lane % 8;
        let words = tensor::ldmatrix_x4(columns.byte_add(at(token, piece + lane / 8 % 2)).cast::<T>());
        for of_pair in 0..2 {
            let f = 2 * pair + of_pair;
            let mut sum = if is_first { Accumulator::ZERO } else { Accumulator(products[f]) };
            T::mma(&mut sum, a, B([words[2 * of_pair], words[2 * of_pair + 1]]));
            products[f] = sum.0;
        }
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
