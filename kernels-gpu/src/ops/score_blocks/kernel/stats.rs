//! First pass over the keys: softmax statistics of every block and head.

use super::fold::Entries;
use super::*;
use crate::common::fragment::over_rows;
use crate::simt::{grid, math};

/// See the module. `C` chunks of 32 dimensions, `G` heads of a group, a warpgroup's products if `WIDE`.
///
/// # Safety
/// - The buffers and tables are as [`ScoreBlocksParams`] says, and 16-byte aligned; page numbers are those of the cache.
/// - `head_dim = 32 C`; the group has at most `G` heads.
/// - Launched with [`ScoreBlocksParams::stats_dims`].
#[inline(always)]
pub unsafe fn stats<T: Element, const C: usize, const G: usize, const WIDE: bool>(
    params: ScoreBlocksParams<T>,
) {
    thread::launch_bounds::<STATS_THREADS, 2>();
    let layout = const { &Layout::new(32 * C as u32, 1) };
    grid::wait_for_previous();
    grid::launch_dependents();
    let kv_head = thread::block_idx_y();
    let blocks = 4 * (SLOTS / G) as u32;
    let group = Group::new(&params, thread::block_idx_z(), blocks, layout.ranges.get());
    let mut tiles = Tiles::new(&group);
    if group.is_idle() || tiles.is_over() {
        return;
    }
    let queries = layout.queries.get();
    group.put_queries::<C, G>(queries, kv_head, 1);
    let mut pages = group.load_pages(tiles.tile);
    let mut keys = group.load_keys::<C>(tiles.tile, kv_head, pages);
    let mut next = tiles.next();
    pages = group.load_pages(next.tile);
    thread::sync_threads();
    let mut state = [Sum::EMPTY; SLOTS];
    let mut products = [[0.0; 4]; SLOTS];
    if !is_double::<C, WIDE>() {
        loop {
            multiply::<T, C, WIDE>(&mut products, &keys, queries);
            finish::<WIDE>(&mut products);
            keys = group.load_keys::<C>(next.tile, kv_head, pages);
            let after = next.next();
            pages = group.load_pages(after.tile);
            count::<T, G>(&group, &mut state, &products, &tiles, kv_head);
            if next.is_over() {
                return;
            }
            (tiles, next) = (next, after);
        }
    }
    loop {
        multiply::<T, C, WIDE>(&mut products, &keys, queries);
        let others = group.load_keys::<C>(next.tile, kv_head, pages);
        let after = next.next();
        pages = group.load_pages(after.tile);
        finish::<WIDE>(&mut products);
        count::<T, G>(&group, &mut state, &products, &tiles, kv_head);
        if next.is_over() {
            return;
        }
        multiply::<T, C, WIDE>(&mut products, &others, queries);
        keys = group.load_keys::<C>(after.tile, kv_head, pages);
        let then = after.next();
        pages = group.load_pages(then.tile);
        finish::<WIDE>(&mut products);
        count::<T, G>(&group, &mut state, &products, &next, kv_head);
        if after.is_over() {
            return;
        }
        (tiles, next) = (after, then);
    }
}

/// A place among the tiles of a thread block: its chunks, one after the other.
#[derive(Clone, Copy)]
struct Tiles {
    tile: u32,
    /// One past the chunk's last tile.
    end: u32,
    /// From a chunk's first tile to that of the block's next chunk.
    step: u32,
    /// One past the last tile of all.
    last: u32,
}

impl Tiles {
    fn new<T: Element>(group: &Group<'_, T>) -> Tiles {
        const TILES: u32 = CHUNK / TILE;
        let chunk = group.all.begin / CHUNK + thread::block_idx_x();
        let last = group.all.end.div_ceil(TILE);
        let tile = if thread::block_idx_x() == 0 { group.all.begin / TILE } else { chunk * TILES };
        Tiles { tile, end: (chunk + 1) * TILES, step: thread::grid_dim_x() * TILES, last }
    }

    /// Whether it is beyond the last tile.
    fn is_over(&self) -> bool {
        self.tile >= self.last
    }

    fn next(&self) -> Tiles {
        let tile = self.tile + 1;
        if tile < self.end {
            Tiles { tile, ..*self }
        } else {
            Tiles { tile: self.end - CHUNK / TILE + self.step, end: self.end + self.step, ..*self }
        }
    }

    /// Whether it is the last of its chunk.
    fn ends_chunk(&self) -> bool {
        self.tile + 1 == self.end || self.tile + 1 == self.last
    }
}

/// Sum of a head's exponentials over some tokens: `exp2(logit - reference)`, logits in base 2. The reference is -inf before the
/// first token, and some logit from then on, none of which lies far above it.
#[derive(Clone, Copy)]
pub(super) struct Sum {
    pub reference: f32,
    pub sum: f32,
}

/// Sums from which on a larger reference is looked for: far from the end of the range, in both directions.
const LARGE: f32 = (1u64 << 63) as f32;

impl Sum {
    pub const EMPTY: Sum = Sum { reference: f32::NEG_INFINITY, sum: 0.0 };

    /// `exp2(x - reference)`: 1 where they are equal, infinite or not.
    fn ratio(x: f32, reference: f32) -> f32 {
        if x == reference { 1.0 } else { math::ex2(x - reference) }
    }

    /// Counts tokens whose logits lie anywhere; NaN is passed over.
    fn push<const N: usize>(&mut self, logits: [f32; N]) {
        let mut max = self.reference;
        for i in 0..N {
            max = max.max(logits[i]);
        }
        let is_first = self.reference == f32::NEG_INFINITY;
        if max == f32::INFINITY || is_first || max > self.reference + 63.0 {
            // Of no sum, or of logits of -inf that weigh nothing beside a number.
            self.sum *= Sum::ratio(self.reference, max);
            self.reference = max;
        }
        for i in 0..N {
            let term = Sum::ratio(logits[i], self.reference);
            self.sum += if logits[i].is_nan() { 0.0 } else { term };
        }
    }

    /// Takes in another.
    pub fn merge(&mut self, other: Sum) {
        let max = self.reference.max(other.reference);
        self.sum = self.sum * Sum::ratio(self.reference, max) + other.sum * Sum::ratio(other.reference, max);
        self.reference = max;
    }
}

/// Counts a tile's products, and writes the sums of a chunk that ends with it.
#[inline(always)]
unsafe fn count<T: Element, const G: usize>(
    group: &Group<'_, T>,
    state: &mut [Sum; SLOTS],
    products: &Products,
    tiles: &Tiles,
    kv_head: u32,
) {
    let scale = group.params.scale_log2;
    let mut sums = [0.0; SLOTS];
    let mut is_plain = group.is_full(tiles.tile);
    for slot in 0..SLOTS {
        let Sum { reference, sum } = state[slot];
        let upper = math::ex2(math::fma(product(products, slot, 0), scale, -reference));
        let lower = math::ex2(math::fma(product(products, slot, 1), scale, -reference));
        sums[slot] = sum + upper + lower;
        is_plain &= sums[slot] < LARGE;
    }
    if is_plain {
        for slot in 0..SLOTS {
            state[slot].sum = sums[slot];
        }
    } else {
        count_any::<T, G>(group, state, products, sums, tiles.tile);
    }
    if tiles.ends_chunk() {
        write::<T, G>(group, state, tiles.tile, kv_head);
        *state = [Sum::EMPTY; SLOTS];
    }
}

/// The slow way: tokens that are no candidates, references that are too small, logits that are no numbers. `sums` are those of the
/// fast way, which stand for slots of which they are right: what a slot counts must not depend on others.
#[inline(always)]
unsafe fn count_any<T: Element, const G: usize>(
    group: &Group<'_, T>,
    state: &mut [Sum; SLOTS],
    products: &Products,
    sums: [f32; SLOTS],
    tile: u32,
) {
    let (at, scale) = (lane(), group.params.scale_log2);
    let tokens = [Group::<T>::token(tile, 0), Group::<T>::token(tile, 1)];
    for slot in 0..SLOTS {
        let range = group.range(block_of::<G>(at, slot));
        let is_in = tokens.map(|token| token >= range.begin && token < range.end);
        if is_in[0] && is_in[1] && sums[slot] < LARGE {
            state[slot].sum = sums[slot];
            continue;
        }
        let mut logits = [f32::NAN; 2];
        for half in 0..2 {
            if is_in[half] {
                logits[half] = any_product(products, slot, half) * scale;
            }
        }
        state[slot].push(logits);
    }
}

/// Merges the sums of the lanes that hold the same slots, and writes those of blocks with candidates in the chunk.
unsafe fn write<T: Element, const G: usize>(
    group: &Group<'_, T>,
    state: &[Sum; SLOTS],
    tile: u32,
    kv_head: u32,
) {
    let (params, at) = (group.params, lane());
    let chunk = tile / (CHUNK / TILE);
    for slot in 0..SLOTS {
        let mut sum = state[slot];
        let reference = over_rows(sum.reference, f32::max);
        let part = sum.sum * Sum::ratio(sum.reference, reference);
        sum = Sum { reference, sum: over_rows(part, |x, y| x + y) };
        let (block, member) = (block_of::<G>(at, slot), (slot % G) as u32);
        let range = group.range(block);
        let has_some = CHUNK * chunk < range.end && CHUNK * (chunk + 1) > range.begin;
        if at.g == 0 && member < params.group && has_some && range.begin < range.end {
            let entries = Entries::of(params, group.first_row + block, kv_head * params.group + member);
            entries.at(chunk, warp::warp_id()).store(V2([sum.reference, sum.sum]));
        }
    }
}
