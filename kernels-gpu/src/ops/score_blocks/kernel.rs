//! The kernels: statistics of all heads of a group's blocks, what they fold to, and the votes.

mod fold;
mod stats;
mod vote;

pub use self::fold::fold;
pub use self::stats::stats;
pub use self::vote::vote;

use super::params::*;
use crate::common::element::{Element, add_low, split};
use crate::common::fragment::{A, Accumulator, B, Lane, lane};
use crate::common::layout::{LOGIT_TILE, Tokens};
use crate::limits::CORE_BYTES;
use crate::ops::pool::SCORE;
use crate::simt::data::{V2, V4};
use crate::simt::global::GlobalPtr;
use crate::simt::shared::Shared;
use crate::simt::warpgroup::{self, Columns};
use crate::simt::{thread, warp};

const _: () = assert!(TILE == 4 * LOGIT_TILE);

/// A lane's words of the keys of its two tokens of a warp's 16: 16 bytes of each from each chunk of 32 dimensions.
type Keys<const C: usize> = [[[u32; 4]; C]; 2];

/// Products of a tile: of each slot, [`Accumulator`] values.
type Products = [[f32; 4]; SLOTS];

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
        Group { params, first_row, pages, ranges, all, common }
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

    /// The lane's token of a tile, of its warp's upper or lower eight.
    fn token(tile: u32, half: u32) -> u32 {
        TILE * tile + LOGIT_TILE * (warp::warp_id() % ENTRIES) + 8 * half + lane().g
    }

    /// The page of a token of a tile. Tokens that no block has are the last candidate, or the first.
    fn clamped(&self, token: u32) -> u32 {
        token.min(self.all.end - 1).max(self.all.begin)
    }

    /// Page numbers of the lane's tokens of a tile.
    unsafe fn load_pages(&self, tile: u32) -> [u32; 2] {
        let mut pages = [0; 2];
        for half in 0..2 {
            let (page, _) = self.params.batch.split_token(self.clamped(Self::token(tile, half as u32)));
            pages[half] = self.pages.add(page as u64).load();
        }
        pages
    }

    /// The lane's A fragments of a tile.
    unsafe fn load_keys<const C: usize>(&self, tile: u32, kv_head: u32, pages: [u32; 2]) -> Keys<C> {
        let within = 8 * lane().t as u64;
        let mut keys = [[[0; 4]; C]; 2];
        for half in 0..2 {
            let (_, token) = self.params.batch.split_token(self.clamped(Self::token(tile, half as u32)));
            let offset = self.params.stride.offset(pages[half], token, kv_head) + within;
            let at = self.params.k_pages.add(offset).cast::<V4<u32>>();
            for c in 0..C {
                keys[half][c] = at.add(4 * c as u64).load_constant_row().0;
            }
        }
        keys
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
        let params = self.params;
        let dims = 32 * C as u32;
        // A piece is a column's eight values of one core matrix, high and low halves together: two columns.
        let pieces = num_heads * (dims / 8) * COLUMNS / 2;
        let mut piece = thread::thread_idx_x();
        while piece < pieces {
            let (pair, rest) = (piece % 4, piece / 4);
            let (slot, rest) = (rest % SLOTS as u32, rest / SLOTS as u32);
            let (rows, head) = (rest % (dims / 8), rest / (dims / 8));
            let (block, member) = (pair + 4 * (slot / G as u32), slot % G as u32);
            let range = self.range(block);
            let mut x = [0.0; 8];
            if member < params.group && range.begin < range.end {
                let head = (first + head) * params.group + member;
                let row = (self.first_row + block) as u64 * (params.num_kv_heads * params.group) as u64;
                let at = params.queries.add((row + head as u64) * dims as u64);
                for i in 0..8 {
                    x[i] = at.add(dimension(8 * rows + i as u32) as u64).load();
                }
                if T::IS_NARROW {
                    x = x.map(|x| x * params.rotated_scale);
                }
            }
            let (mut high, mut low) = ([0; 4], [0; 4]);
            for i in 0..4 {
                (high[i], low[i]) = split::<T>(x[2 * i], x[2 * i + 1]);
            }
            let core = (head * (dims / 8) + rows) * SLOTS as u32 + slot;
            let at = to.byte_add(core * CORE_BYTES + 2 * pair * 16).cast::<V4<u32>>();
            at.store(V4(high));
            at.add(1).store(V4(low));
            piece += thread::block_dim_x();
        }
        if warpgroup::AVAILABLE {
            warpgroup::fence_writes();
        }
    }
}

/// Whether the keys of a tile are loaded to registers of their own while those of the one before are multiplied: products of a
/// warpgroup leave the warp free to wait for them, and there must be room.
const fn is_double<const C: usize, const WIDE: bool>() -> bool {
    WIDE && C <= 4
}

/// The dimension that row `row` of the product holds: lane `t` has dimensions `8 t ..` of a chunk of 32 in its four words of two
/// A fragments.
fn dimension(row: u32) -> u32 {
    let (step, row) = (row / 16, row % 16);
    32 * (step / 2) + 8 * (row % 8 / 2) + 4 * (step % 2) + 2 * (row / 8) + row % 2
}

/// Starts the products of a tile's keys with a KV head's queries; [`finish`] must follow. `WIDE`: the warpgroup multiplies.
///
/// *Convergence:* aligned; the warpgroup.
#[inline(always)]
unsafe fn multiply<T: Element, const C: usize, const WIDE: bool>(
    products: &mut Products,
    keys: &Keys<C>,
    queries: Shared<u16>,
) {
    const ROW_BYTES: u32 = SLOTS as u32 * CORE_BYTES;
    if WIDE {
        warpgroup::fence();
    }
    for c in 0..C {
        let (upper, lower) = (keys[0][c], keys[1][c]);
        for i in 0..2 {
            let a = A([upper[2 * i], lower[2 * i], upper[2 * i + 1], lower[2 * i + 1]]);
            let start = queries.byte_add((2 * c + i) as u32 * 2 * ROW_BYTES).cast::<T>();
            if WIDE {
                let b = Columns { start, row_bytes: ROW_BYTES, column_bytes: CORE_BYTES };
                if c == 0 && i == 0 {
                    T::mma_of_warpgroup::<false>(products, a, b);
                } else {
                    T::mma_of_warpgroup::<true>(products, a, b);
                }
            } else {
                let at = lane();
                let column = start.byte_add(B::column(at) * 16 + 4 * at.t).cast::<u32>();
                for slot in 0..SLOTS {
                    let core = column.byte_add(slot as u32 * CORE_BYTES);
                    let b = B([core.load(), core.byte_add(ROW_BYTES).load()]);
                    let mut sum =
                        if c == 0 && i == 0 { Accumulator::ZERO } else { Accumulator(products[slot]) };
                    T::mma(&mut sum, a, b);
                    products[slot] = sum.0;
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
        warpgroup::wait(products);
    }
}

/// A slot's product for one of the lane's two tokens, high and low halves added.
#[inline(always)]
fn product(products: &Products, slot: usize, half: usize) -> f32 {
    products[slot][2 * half] + products[slot][2 * half + 1]
}

/// The same where the high half may be infinite, which then decides alone.
#[inline(always)]
fn any_product(products: &Products, slot: usize, half: usize) -> f32 {
    add_low(products[slot][2 * half], products[slot][2 * half + 1])
}

/// The lane's block of a slot: `G` slots belong to four blocks.
#[inline(always)]
fn block_of<const G: usize>(at: Lane, slot: usize) -> u32 {
    at.t + 4 * (slot / G) as u32
}
