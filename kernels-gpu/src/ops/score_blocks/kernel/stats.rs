//! First pass over the keys: softmax statistics of every block and head.

use super::fold::Entries;
use super::*;
use crate::common::fragment::over_columns;
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
    launch_bounds::<C, WIDE>();
    let layout = const { &Layout::stats(32 * C as u32, WIDE) };
    grid::wait_for_previous();
    grid::launch_dependents();
    let kv_head = thread::block_idx_y();
    let group = Group::new(&params, thread::block_idx_z(), ROWS / G as u32, layout.ranges.get());
    if group.is_idle() {
        return;
    }
    let stages = Stages::<C>::new(layout.stages.get());
    let counter = params.counters.add((thread::block_idx_z() * params.num_kv_heads + kv_head) as u64);
    let warpgroups = const { threads(32 * C as u32, WIDE) / WARPGROUP };
    let mut ahead = Chunks::new(&group, counter, layout.tickets.get(), warpgroups);
    let barrier = ahead.barrier;
    // The tile whose keys are in flight, and the next one, whose page is looked up.
    let mut tile = ahead.take_tile();
    let first_page = group.load_page(tile);
    let mut next = ahead.take_tile();
    let mut page = group.load_page(next);
    stages.start(&group, 0, tile, kv_head, first_page);
    let queries = layout.queries.get();
    group.put_queries::<C, G>(queries, kv_head);
    thread::sync_threads();
    if thread::block_idx_x() == 0 {
        keep::<T, C, G>(&group, queries, kv_head);
    }
    let mut state = State::new::<T, G>(&group);
    let mut products = [[0.0; 4]; FRAGMENTS];
    let mut stage = 0;
    while tile < ahead.last_tile {
        stages.meet(barrier);
        multiply::<T, C, WIDE>(&mut products, queries, stages.keys(stage));
        stage ^= 1;
        stages.start(&group, stage, next, kv_head, page);
        let current = tile;
        tile = next;
        next = ahead.take_tile();
        page = group.load_page(next);
        finish::<WIDE>(&mut products);
        state.count(&group, &products, current);
        if ahead.ends_chunk(current) {
            state.write(&group, current / TILES, kv_head);
        }
    }
    tensor::cp_async_wait::<0>();
}

/// Writes the queries of a KV head to memory as [`vote`](super::vote()) reads them, and sums of 0, for rows of no head.
///
/// *Convergence:* every thread of the block, behind a barrier.
unsafe fn keep<T: Element, const C: usize, const G: usize>(
    group: &Group<'_, T>,
    queries: Shared<u16>,
    kv_head: u32,
) {
    let slabs = group.slabs::<C, G>();
    for slab in 0..group.num_slabs::<G>() {
        let to = slabs.at(slab, kv_head);
        let end = Slabs::<C>::PIECES * Slabs::<C>::LINES;
        for item in strided(thread::thread_idx_x(), end, thread::block_dim_x()) {
            let (line, piece) = (item / Slabs::<C>::PIECES, item % Slabs::<C>::PIECES);
            let is_used = Slabs::<C>::dimension(line, piece) < 32 * C as u32;
            let at = Slabs::<C>::piece(queries, slab, line, piece);
            to.add(item as u64).store(if is_used { at.load() } else { V4([0; 4]) });
        }
        if thread::thread_idx_x() < WARP_ROWS / 2 {
            slabs.sums(slab, kv_head).add(thread::thread_idx_x() as u64).store(V4([0; 4]));
        }
    }
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
        let own = own_warpgroup() % of_block; // of one, the compiler knows the number
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

    /// The reference after a chunk's first logits: the largest; none where that is no finite number.
    fn first_reference(logits: &Row) -> f32 {
        let max = logits.as_flattened().iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x));
        if max.is_finite() { max } else { f32::NEG_INFINITY }
    }

    /// `exp2(x - reference)`: 1 where they are equal, infinite or not.
    pub fn ratio(x: f32, reference: f32) -> f32 {
        if x == reference { 1.0 } else { math::ex2(x - reference) }
    }

    /// Counts tokens whose logits lie anywhere; NaN is passed over.
    fn push(&mut self, logits: &Row) {
        let max = logits.as_flattened().iter().fold(self.reference, |max, &x| max.max(x));
        let is_first = self.reference == f32::NEG_INFINITY;
        if max == f32::INFINITY || is_first || max > self.reference + 63.0 {
            // Of no sum, or of logits of -inf that weigh nothing beside a number.
            self.sum *= Sum::ratio(self.reference, max);
            self.reference = max;
        }
        for &logit in logits.as_flattened() {
            let term = Sum::ratio(logit, self.reference);
            self.sum += if logit.is_nan() { 0.0 } else { term };
        }
    }

    /// Takes in another.
    pub fn merge(&mut self, other: Sum) {
        let max = self.reference.max(other.reference);
        self.sum = self.sum * Sum::ratio(self.reference, max) + other.sum * Sum::ratio(other.reference, max);
        self.reference = max;
    }
}

/// The lane's sums of its two rows.
struct State {
    place: Place,
    /// Candidates of the lane's block.
    range: Tokens,
    sums: [Sum; 2],
    /// Whether a reference may be [`far`](Sum::is_far).
    is_far: bool,
}

/// Logits of a row, or what they add to its sum: of the lane's tokens of a tile.
type Row = [[f32; 2]; FRAGMENTS];

impl State {
    unsafe fn new<T: Element, const G: usize>(group: &Group<'_, T>) -> State {
        let place = Place::own::<G>();
        State { place, range: group.range(place.block), sums: [Sum::EMPTY; 2], is_far: false }
    }

    /// Counts a tile's products.
    #[inline(always)]
    unsafe fn count<T: Element>(&mut self, group: &Group<'_, T>, products: &Products, tile: u32) {
        let (scale, starts) = (group.params.scale_log2, tile.is_multiple_of(TILES));
        if group.is_full(tile) {
            self.count_tile(scale, products, starts, &[[true; 2]; FRAGMENTS]);
        } else {
            self.count_tile(scale, products, starts, &Group::<T>::seen(tile, self.range));
        }
    }

    /// `starts`: the tile is the first of a chunk.
    #[inline(always)]
    unsafe fn count_tile(&mut self, scale: f32, products: &Products, starts: bool, seen: &Seen) {
        if starts {
            for half in 0..2 {
                self.sums[half].reference = Sum::first_reference(&logits(scale, products, half, seen));
                self.look_at(half);
            }
        }
        let mut sums = [0.0; 2];
        for half in 0..2 {
            let Sum { reference, sum } = self.sums[half];
            sums[half] = sum + total(&terms(scale, products, half, seen, -reference));
        }
        // Neither is negative: each is as small as both together.
        if sums[0] + sums[1] < LARGE && !self.is_far {
            for half in 0..2 {
                self.sums[half].sum = sums[half];
            }
            return;
        }
        for half in 0..2 {
            count_any(scale, &mut self.sums[half], products, half, sums[half], seen);
            self.look_at(half);
        }
    }

    /// Notes whether a reference is far. (Beside -inf the fast way finds no number, and is left.)
    fn look_at(&mut self, half: usize) {
        let reference = self.sums[half].reference;
        self.is_far |= Sum::is_far(reference) && reference != f32::NEG_INFINITY;
    }

    /// Merges the sums of the lanes that hold the same rows, writes those of a block with candidates in the chunk, and begins anew.
    #[inline(always)]
    unsafe fn write<T: Element>(&mut self, group: &Group<'_, T>, chunk: u32, kv_head: u32) {
        let (params, Tokens { begin, end }) = (group.params, self.range);
        for half in 0..2 {
            let Sum { reference: own, sum } = self.sums[half];
            let reference = over_columns(own, f32::max);
            let sum = over_columns(sum * Sum::ratio(own, reference), |x, y| x + y);
            let member = self.place.members[half];
            let has_some = CHUNK * chunk < end && CHUNK * (chunk + 1) > begin && begin < end;
            if lane().t == 0 && member < params.group && has_some {
                let head = kv_head * params.group + member;
                let entries = Entries::of(params, group.first_row + self.place.block, head);
                entries.at(chunk).store(V2([reference, sum]));
            }
        }
        self.sums = [Sum::EMPTY; 2];
        self.is_far = false;
    }
}

/// A row's logits, base 2: NaN for tokens that are no candidates of its block.
#[inline(always)]
fn logits(scale: f32, products: &Products, half: usize, seen: &Seen) -> Row {
    let mut logits = [[f32::NAN; 2]; FRAGMENTS];
    for f in 0..FRAGMENTS {
        for column in 0..2 {
            let logit = products[f][2 * half + column] * scale;
            logits[f][column] = if seen[f][column] { logit } else { f32::NAN };
        }
    }
    logits
}

/// What a row's tokens add to its sum, with its reference, negated: 0 for tokens that are no candidates of its block.
#[inline(always)]
fn terms(scale: f32, products: &Products, half: usize, seen: &Seen, minus: f32) -> Row {
    let mut terms = [[0.0; 2]; FRAGMENTS];
    for f in 0..FRAGMENTS {
        for column in 0..2 {
            let term = math::ex2(math::fma(products[f][2 * half + column], scale, minus));
            terms[f][column] = if seen[f][column] { term } else { 0.0 };
        }
    }
    terms
}

#[inline(always)]
fn total(terms: &Row) -> f32 {
    let mut sums = [0.0; 2];
    for f in 0..FRAGMENTS {
        for column in 0..2 {
            sums[column] += terms[f][column];
        }
    }
    sums[0] + sums[1]
}

/// The slow way: references that are too small or far, logits that are no numbers. `sum` is that of the fast way, which stands where it
/// is right: what a row counts must not depend on others.
#[inline(always)]
fn count_any(scale: f32, state: &mut Sum, products: &Products, half: usize, sum: f32, seen: &Seen) {
    if *seen == [[false; 2]; FRAGMENTS] {
        return;
    }
    if sum < LARGE && !Sum::is_far(state.reference) {
        state.sum = sum;
        return;
    }
    let logits = logits(scale, products, half, seen);
    if state.reference == f32::NEG_INFINITY && state.sum == 0.0 {
        // As the first tile of a chunk would.
        let reference = Sum::first_reference(&logits);
        let sum = total(&terms(scale, products, half, seen, -reference));
        if !Sum::is_far(reference) && sum < LARGE {
            *state = Sum { reference, sum };
            return;
        }
    }
    state.push(&logits);
}
