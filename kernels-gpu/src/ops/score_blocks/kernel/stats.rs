//! First pass over the keys: softmax statistics of every block and head.

use super::fold::Entries;
use super::*;
use crate::common::fragment::over_rows;
use crate::simt::global::GlobalMut;
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
    let counter = params.counters.add((thread::block_idx_z() * params.num_kv_heads + kv_head) as u64);
    let warpgroups = const { stats_threads(32 * C as u32, WIDE) / WARPGROUP };
    let mut ahead = Chunks::new(&group, counter, layout.tickets.get(), warpgroups);
    // Tiles whose keys are in flight, and their pages: all are asked for at once.
    let mut tiles = [0; STAGES as usize];
    let mut pages = [0; STAGES as usize];
    for stage in 0..STAGES as usize {
        tiles[stage] = ahead.take_tile();
        pages[stage] = group.load_page(tiles[stage]);
    }
    let mut next = ahead.take_tile();
    let mut page = group.load_page(next);
    for stage in 0..STAGES {
        stages.start(&group, stage, tiles[stage as usize], kv_head, pages[stage as usize]);
    }
    let queries = layout.queries.get();
    group.put_queries::<C, G>(queries, kv_head, 1);
    thread::sync_threads();
    let mut state = State::new(layout.references.get(), const { stats_threads(32 * C as u32, WIDE) });
    let mut products = [[0.0; 4]; SLOTS / 2];
    let mut stage = 0;
    while tiles[0] < ahead.last_tile {
        let keys = stages.take(stage);
        multiply::<T, C, WIDE>(&mut products, &keys, queries);
        stages.start(&group, stage, next, kv_head, page);
        let tile = tiles[0];
        tiles = [tiles[1], next];
        next = ahead.take_tile();
        page = group.load_page(next);
        finish::<WIDE>(&mut products);
        state.count::<T, G>(&group, &products, tile, ahead.ends_chunk(tile), kv_head);
        stage = (stage + 1) % STAGES;
    }
    tensor::cp_async_wait::<0>();
}

/// Tiles of a chunk.
const TILES: u32 = CHUNK / TILE;

/// Chunks that a warpgroup takes from those of its group of blocks and KV head, one after the other. A block whose SM is slower
/// takes fewer. Which warpgroup counts a chunk makes no difference to what is counted.
///
/// Number `i` is taken by warpgroup `i` of those that share the chunks; further numbers come from a counter, a chunk ahead of time. The last
/// chunk is number 0: its tiles, of which some blocks see only a part, take longest.
struct Chunks {
    counter: GlobalMut<u32>,
    /// The warpgroup's.
    barrier: u32,
    /// Two words of the warpgroup: the number that it takes next, and the one before.
    tickets: Shared<u32>,
    /// Which of the two.
    turn: u32,
    /// In the warpgroup's first thread: the number that it takes next.
    ticket: u32,
    /// Warpgroups that share the chunks.
    num_places: u32,
    first_chunk: u32,
    num_chunks: u32,
    /// The first tile, and one past the last.
    first_tile: u32,
    last_tile: u32,
    /// The tile that is taken next, and one past the last of its chunk.
    tile: u32,
    end: u32,
}

impl Chunks {
    unsafe fn new<T: Element>(
        group: &Group<'_, T>,
        counter: GlobalMut<u32>,
        tickets: Shared<u32>,
        of_block: u32,
    ) -> Chunks {
        // The same in all lanes, and known to be; so is the number of a barrier, where there is one warpgroup.
        let own = warp::shuffle_idx(warp::FULL, thread::thread_idx_x() / WARPGROUP, 0) % of_block;
        let (first_chunk, end) = (group.all.begin / CHUNK, group.all.end.div_ceil(CHUNK));
        let mut chunks = Chunks {
            counter,
            barrier: 1 + own,
            tickets: tickets.add(2 * own),
            turn: 0,
            ticket: 0,
            num_places: thread::grid_dim_x() * of_block,
            first_chunk,
            num_chunks: end - first_chunk,
            first_tile: group.all.begin / TILE,
            last_tile: group.all.end.div_ceil(TILE),
            tile: 0,
            end: 0,
        };
        chunks.begin(thread::block_idx_x() * of_block + own);
        chunks.ask();
        chunks
    }

    /// Goes to the first tile of chunk number `ticket`, or beyond the last tile.
    fn begin(&mut self, ticket: u32) {
        (self.tile, self.end) = (self.last_tile, u32::MAX);
        if ticket < self.num_chunks {
            let chunk = self.first_chunk + self.num_chunks - 1 - ticket;
            self.tile = (chunk * TILES).max(self.first_tile);
            self.end = ((chunk + 1) * TILES).min(self.last_tile);
        }
    }

    /// Asks for the number that is taken next.
    unsafe fn ask(&mut self) {
        if thread::thread_idx_x().is_multiple_of(WARPGROUP) {
            self.ticket = self.num_places + self.counter.atomic_add(1);
        }
    }

    /// The next tile; from some call on always one beyond the last.
    ///
    /// *Convergence:* aligned; the warpgroup.
    #[inline(always)]
    unsafe fn take_tile(&mut self) -> u32 {
        let tile = self.tile;
        self.tile += u32::from(tile < self.last_tile);
        if self.tile == self.end {
            let at = self.tickets.add(self.turn);
            if thread::thread_idx_x().is_multiple_of(WARPGROUP) {
                at.store(self.ticket);
            }
            thread::sync_named(self.barrier, WARPGROUP);
            self.begin(at.load());
            self.turn ^= 1;
            self.ask();
        }
        tile
    }

    /// Whether a tile is the last of its chunk.
    fn ends_chunk(&self, tile: u32) -> bool {
        (tile + 1).is_multiple_of(TILES) || tile + 1 == self.last_tile
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
        tile: u32,
        ends_chunk: bool,
        kv_head: u32,
    ) {
        let scale = group.params.scale_log2;
        if group.is_full(tile) {
            self.count_tile::<G>(scale, products, tile, &[[true; 2]; SLOTS]);
        } else {
            self.count_tile::<G>(scale, products, tile, &group.seen::<G>(tile));
        }
        if ends_chunk {
            self.write::<T, G>(group, tile, kv_head);
            self.clear();
        }
    }

    #[inline(always)]
    unsafe fn count_tile<const G: usize>(&mut self, scale: f32, products: &Products, tile: u32, seen: &Seen) {
        if tile.is_multiple_of(TILES) {
            self.refer_to::<G>(scale, products, seen);
        }
        self.count_half::<G, 0>(scale, products, seen);
        self.count_half::<G, HALF>(scale, products, seen);
    }

    /// Notes whether a reference is far. (Beside -inf the fast way finds no number, and is left.)
    fn look_at(&mut self, reference: f32) {
        self.is_far |= Sum::is_far(reference) && reference != f32::NEG_INFINITY;
    }

    /// The larger logits of the first two tokens become the references, as far as they are finite.
    #[inline(always)]
    unsafe fn refer_to<const G: usize>(&mut self, scale: f32, products: &Products, seen: &Seen) {
        for quad in 0..SLOTS / 4 {
            let mut references = [0.0; 4];
            for i in 0..4 {
                let reference = Sum::first_reference(logits::<G>(scale, products, 4 * quad + i, seen));
                self.look_at(reference);
                references[i] = -reference;
            }
            self.references.add(quad as u32 * self.stride).store(V4(references));
        }
    }

    /// Counts the products of the slots from `FIRST` on.
    #[inline(always)]
    unsafe fn count_half<const G: usize, const FIRST: usize>(
        &mut self,
        scale: f32,
        products: &Products,
        seen: &Seen,
    ) {
        let at = self.references.add((FIRST / 4) as u32 * self.stride);
        let mut references = [at.load().0, at.add(self.stride).load().0];
        let (mut sums, mut all) = ([0.0; HALF], 0.0);
        for i in 0..HALF {
            let terms = terms::<G>(scale, products, FIRST + i, seen, references[i / 4][i % 4]);
            sums[i] = self.sums[FIRST + i] + (terms[0] + terms[1]);
            all += sums[i];
        }
        // None of them is negative: each is as small as all together.
        if all < LARGE && !self.is_far {
            for i in 0..HALF {
                self.sums[FIRST + i] = sums[i];
            }
            return;
        }
        for i in 0..HALF {
            let (slot, reference) = (FIRST + i, -references[i / 4][i % 4]);
            let mut sum = Sum { reference, sum: self.sums[slot] };
            count_any::<G>(scale, &mut sum, products, slot, sums[i], seen);
            self.look_at(sum.reference);
            (references[i / 4][i % 4], self.sums[slot]) = (-sum.reference, sum.sum);
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

/// A slot's logits, base 2: NaN for tokens that are no candidates of its block.
#[inline(always)]
fn logits<const G: usize>(scale: f32, products: &Products, slot: usize, seen: &Seen) -> [f32; 2] {
    [0, 1].map(|half| if seen[slot / G][half] { product(products, slot, half) * scale } else { f32::NAN })
}

/// What a slot's tokens add to its sum, with its reference, negated: 0 for tokens that are no candidates of its block.
#[inline(always)]
fn terms<const G: usize>(scale: f32, products: &Products, slot: usize, seen: &Seen, minus: f32) -> [f32; 2] {
    [0, 1].map(|half| {
        let term = math::ex2(math::fma(product(products, slot, half), scale, minus));
        if seen[slot / G][half] { term } else { 0.0 }
    })
}

/// The slow way: references that are too small or far, logits that are no numbers. `sum` is that of the fast way, which stands where it
/// is right: what a slot counts must not depend on others.
#[inline(always)]
fn count_any<const G: usize>(
    scale: f32,
    state: &mut Sum,
    products: &Products,
    slot: usize,
    sum: f32,
    seen: &Seen,
) {
    if seen[slot / G] == [false; 2] {
        return;
    }
    if sum < LARGE && !Sum::is_far(state.reference) {
        state.sum = sum;
        return;
    }
    let logits = logits::<G>(scale, products, slot, seen);
    if state.reference == f32::NEG_INFINITY && state.sum == 0.0 {
        // As `refer_to` and the fast way would.
        let reference = Sum::first_reference(logits);
        let terms = terms::<G>(scale, products, slot, seen, -reference);
        if !Sum::is_far(reference) && terms[0] + terms[1] < LARGE {
            *state = Sum { reference, sum: terms[0] + terms[1] };
            return;
        }
    }
    state.push(logits);
}
