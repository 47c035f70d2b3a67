//! First pass over the keys: softmax statistics of every block and head.

use super::fold::Entries;
use super::*;
use crate::common::fragment::over_rows;
use crate::simt::{grid, math};

/// See the module. `C` chunks of 32 dimensions, `G` heads of a group.
///
/// # Safety
/// - The buffers and tables are as [`ScoreBlocksParams`] says, and 16-byte aligned; page numbers are those of the cache.
/// - `head_dim = 32 C`; the group has at most `G` heads.
/// - Launched with [`ScoreBlocksParams::stats_dims`].
#[inline(always)]
pub unsafe fn stats<T: Element, const C: usize, const G: usize>(params: ScoreBlocksParams<T>) {
    if warpgroup::available() {
        stats_as::<T, C, G, true>(params)
    } else {
        stats_as::<T, C, G, false>(params)
    }
}

/// `WIDE`: with products of a warpgroup.
#[inline(always)]
unsafe fn stats_as<T: Element, const C: usize, const G: usize, const WIDE: bool>(
    params: ScoreBlocksParams<T>,
) {
    match (C > 4, WIDE) {
        (false, _) if G == 16 => thread::launch_bounds::<WARPGROUP, { stats_blocks_per_sm(128, 16) }>(),
        (false, _) => thread::launch_bounds::<WARPGROUP, { stats_blocks_per_sm(128, 4) }>(),
        (true, true) => thread::launch_bounds::<{ stats_threads(256, true) }, 1>(),
        (true, false) => thread::launch_bounds::<{ stats_threads(256, false) }, 1>(),
    }
    let layout = const { &Layout::stats(32 * C as u32, WIDE) };
    grid::wait_for_previous();
    grid::launch_dependents();
    let kv_head = thread::block_idx_y();
    let blocks = 4 * (SLOTS / G) as u32;
    let group = Group::new(&params, thread::block_idx_z(), blocks, layout.ranges.get());
    if group.is_idle() {
        return;
    }
    let stages = Stages::<C>::new(layout.stages.get());
    let mut tiles = Tiles::new(&group);
    let mut ahead = tiles;
    for stage in 0..STAGES {
        stages.start(&group, stage, ahead.tile, kv_head, group.load_page(ahead.tile));
        ahead = ahead.next();
    }
    let mut page = group.load_page(ahead.tile);
    let queries = layout.queries.get();
    group.put_queries::<C, G>(queries, kv_head, 1);
    thread::sync_threads();
    let mut state = State::new(layout.references.get(), const { stats_threads(32 * C as u32, WIDE) });
    let mut products = [[0.0; 4]; SLOTS / 2];
    let mut stage = 0;
    while !tiles.is_over() {
        let keys = stages.take(stage);
        stages.start(&group, stage, ahead.tile, kv_head, page);
        multiply::<T, C, WIDE>(&mut products, &keys, queries);
        ahead = ahead.next();
        page = group.load_page(ahead.tile);
        finish::<WIDE>(&mut products);
        state.count::<T, G>(&group, &products, &tiles, kv_head);
        tiles = tiles.next();
        stage = (stage + 1) % STAGES;
    }
    tensor::cp_async_wait::<0>();
}

/// A place among the tiles of a warpgroup: its chunks, one after the other.
#[derive(Clone, Copy)]
struct Tiles {
    tile: u32,
    /// From the last tile of a chunk to the first of the warpgroup's next chunk.
    step: u32,
    /// One past the last tile of all.
    last: u32,
}

/// Tiles of a chunk.
const TILES: u32 = CHUNK / TILE;

impl Tiles {
    fn new<T: Element>(group: &Group<'_, T>) -> Tiles {
        let of_block = thread::block_dim_x() / WARPGROUP;
        let place = thread::block_idx_x() * of_block + thread::thread_idx_x() / WARPGROUP;
        let first = group.all.begin / TILE;
        let tile = if place == 0 { first } else { (first / TILES + place) * TILES };
        let step = thread::grid_dim_x() * of_block * TILES - (TILES - 1);
        Tiles { tile, step, last: group.all.end.div_ceil(TILE) }
    }

    /// Whether it is beyond the last tile.
    fn is_over(&self) -> bool {
        self.tile >= self.last
    }

    /// Whether no tile of its chunk comes before it.
    fn begins_chunk(&self) -> bool {
        self.tile.is_multiple_of(TILES)
    }

    fn next(&self) -> Tiles {
        let is_last = (self.tile + 1).is_multiple_of(TILES);
        Tiles { tile: self.tile + if is_last { self.step } else { 1 }, ..*self }
    }

    /// Whether it is the last of its chunk.
    fn ends_chunk(&self) -> bool {
        (self.tile + 1).is_multiple_of(TILES) || self.tile + 1 == self.last
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

    /// Whether a reference is so large, or infinite, that a logit of its size must be rounded before it is subtracted: else products
    /// that are equal would differ from it. (Below, a fused product is off by 2^-13 of an octave at most.)
    pub fn is_far(reference: f32) -> bool {
        reference.abs() >= 4096.0
    }

    /// The reference after the first two logits; none where the larger is no finite number.
    fn first_reference([x, y]: [f32; 2]) -> f32 {
        let max = x.max(y);
        if max.is_finite() { max } else { f32::NEG_INFINITY }
    }

    /// `exp2(x - reference)`: 1 where they are equal, infinite or not.
    pub fn ratio(x: f32, reference: f32) -> f32 {
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

/// The lane's sums of every slot. Registers are scarce: the references, negated, lie in shared memory, and half of the slots are counted at a
/// time.
struct State {
    sums: [f32; SLOTS],
    references: Shared<V4<f32>>,
    /// Threads of the block.
    stride: u32,
    /// Whether a reference may be [`far`](Sum::is_far).
    is_far: bool,
}

/// Half of the slots.
const HALF: usize = SLOTS / 2;

impl State {
    unsafe fn new(references: Shared<V4<f32>>, stride: u32) -> State {
        let mut state = State {
            sums: [0.0; SLOTS],
            references: references.add(thread::thread_idx_x()),
            stride,
            is_far: false,
        };
        state.clear();
        state
    }

    unsafe fn clear(&mut self) {
        for quad in 0..SLOTS / 4 {
            self.references.add(quad as u32 * self.stride).store(V4([-Sum::EMPTY.reference; 4]));
        }
        self.sums = [0.0; SLOTS];
        self.is_far = false;
    }

    /// Counts a tile's products, and writes the sums of a chunk that ends with it.
    #[inline(always)]
    unsafe fn count<T: Element, const G: usize>(
        &mut self,
        group: &Group<'_, T>,
        products: &Products,
        tiles: &Tiles,
        kv_head: u32,
    ) {
        let is_full = group.is_full(tiles.tile);
        if is_full && tiles.begins_chunk() {
            self.refer_to::<T>(group, products);
        }
        self.count_half::<T, G, 0>(group, products, tiles.tile, is_full);
        self.count_half::<T, G, HALF>(group, products, tiles.tile, is_full);
        if tiles.ends_chunk() {
            self.write::<T, G>(group, tiles.tile, kv_head);
            self.clear();
        }
    }

    /// The larger logits of the first two tokens become the references, as far as they are finite.
    #[inline(always)]
    unsafe fn refer_to<T: Element>(&mut self, group: &Group<'_, T>, products: &Products) {
        for quad in 0..SLOTS / 4 {
            let mut references = [0.0; 4];
            for i in 0..4 {
                let logits =
                    [0, 1].map(|half| product(products, 4 * quad + i, half) * group.params.scale_log2);
                references[i] = -Sum::first_reference(logits);
                self.is_far |= Sum::is_far(references[i]);
            }
            self.references.add(quad as u32 * self.stride).store(V4(references));
        }
    }

    /// Counts the products of the slots from `FIRST` on.
    #[inline(always)]
    unsafe fn count_half<T: Element, const G: usize, const FIRST: usize>(
        &mut self,
        group: &Group<'_, T>,
        products: &Products,
        tile: u32,
        is_full: bool,
    ) {
        let scale = group.params.scale_log2;
        let at = self.references.add((FIRST / 4) as u32 * self.stride);
        let mut references = [at.load().0, at.add(self.stride).load().0];
        let (mut sums, mut all) = ([0.0; HALF], 0.0);
        for i in 0..HALF {
            let minus = references[i / 4][i % 4];
            let upper = math::ex2(math::fma(product(products, FIRST + i, 0), scale, minus));
            let lower = math::ex2(math::fma(product(products, FIRST + i, 1), scale, minus));
            sums[i] = self.sums[FIRST + i] + (upper + lower);
            all += sums[i];
        }
        // None of them is negative: each is as small as all together.
        if is_full && all < LARGE && !self.is_far {
            for i in 0..HALF {
                self.sums[FIRST + i] = sums[i];
            }
            return;
        }
        for i in 0..HALF {
            let (slot, reference) = (FIRST + i, -references[i / 4][i % 4]);
            let mut sum = Sum { reference, sum: self.sums[slot] };
            count_any::<T, G>(group, &mut sum, products, slot, sums[i], tile);
            (references[i / 4][i % 4], self.sums[slot]) = (-sum.reference, sum.sum);
            self.is_far |= Sum::is_far(sum.reference);
        }
        at.store(V4(references[0]));
        at.add(self.stride).store(V4(references[1]));
    }

    /// Merges the sums of the lanes that hold the same slots, and writes those of blocks with candidates in the chunk.
    unsafe fn write<T: Element, const G: usize>(&self, group: &Group<'_, T>, tile: u32, kv_head: u32) {
        let (params, at) = (group.params, lane());
        let chunk = tile / TILES;
        for slot in 0..SLOTS {
            let own = -self.references.add((slot / 4) as u32 * self.stride).load().0[slot % 4];
            let reference = over_rows(own, f32::max);
            let sum = over_rows(self.sums[slot] * Sum::ratio(own, reference), |x, y| x + y);
            let (block, member) = (block_of::<G>(at, slot), (slot % G) as u32);
            let range = group.range(block);
            let has_some = CHUNK * chunk < range.end && CHUNK * (chunk + 1) > range.begin;
            if at.g == 0 && member < params.group && has_some && range.begin < range.end {
                let entries = Entries::of(params, group.first_row + block, kv_head * params.group + member);
                entries.at(chunk, warp::warp_id() % ENTRIES).store(V2([reference, sum]));
            }
        }
    }
}

/// The slow way: tokens that are no candidates, references that are too small, logits that are no numbers. `sum` is that of the
/// fast way, which stands where it is right: what a slot counts must not depend on others.
#[inline(always)]
unsafe fn count_any<T: Element, const G: usize>(
    group: &Group<'_, T>,
    state: &mut Sum,
    products: &Products,
    slot: usize,
    sum: f32,
    tile: u32,
) {
    let range = group.range(block_of::<G>(lane(), slot));
    let is_in = [0, 1].map(|half| {
        let token = Group::<T>::token(tile, half);
        token >= range.begin && token < range.end
    });
    let scale = group.params.scale_log2;
    let products = [0, 1].map(|half| product(products, slot, half));
    if is_in[0] && is_in[1] {
        if sum < LARGE && !Sum::is_far(state.reference) {
            state.sum = sum;
            return;
        }
        if state.reference == f32::NEG_INFINITY && state.sum == 0.0 {
            // As `refer_to` and the fast way would.
            let reference = Sum::first_reference(products.map(|x| x * scale));
            let terms = products.map(|x| math::ex2(math::fma(x, scale, -reference)));
            if !Sum::is_far(reference) && terms[0] + terms[1] < LARGE {
                *state = Sum { reference, sum: terms[0] + terms[1] };
                return;
            }
        }
    }
    let mut logits = [f32::NAN; 2];
    for half in 0..2 {
        if is_in[half] {
            logits[half] = products[half] * scale;
        }
    }
    state.push(logits);
}
