//! Second pass over the keys: votes of every block.

use super::stats::Sum;
use super::*;
use crate::common::ring::Stage;
use crate::simt::{bulk, grid, math};

/// See the module. `C` chunks of 32 dimensions, `G` heads of a group.
///
/// # Safety
/// - As for [`stats`](super::stats()), behind [`fold`](super::fold()); launched with [`ScoreBlocksParams::vote_dims`].
#[inline(always)]
pub unsafe fn vote<T: Element, const C: usize, const G: usize>(params: ScoreBlocksParams<T>) {
    if warpgroup::available() { vote_as::<T, C, G, true>(params) } else { vote_as::<T, C, G, false>(params) }
}

/// `WIDE`: with products of a warpgroup.
#[inline(always)]
unsafe fn vote_as<T: Element, const C: usize, const G: usize, const WIDE: bool>(
    params: ScoreBlocksParams<T>,
) {
    launch_bounds::<C, WIDE>();
    let layout = const { &Layout::vote(32 * C as u32, WIDE) };
    if WIDE && thread::thread_idx_x() == 0 {
        layout.ring.init_for(thread::block_dim_x(), thread::block_dim_x() / warp::SIZE);
        bulk::publish();
    }
    // Of the launch before, `fold`, only the sums are read; all before it have ended.
    let group = Group::new(&params, thread::block_idx_y(), ROWS / G as u32, layout.ranges.get());
    if group.is_idle() {
        grid::wait_for_previous();
        return;
    }
    let order = Order::new(&group, const { threads(32 * C as u32, WIDE) / WARPGROUP }, layout.share);
    if order.num_rounds == 0 {
        grid::wait_for_previous();
        return;
    }
    let operands = Operands::<T, C, G, WIDE>::new(&group);
    let mut pass = Pass::<T, C, WIDE>::new(&group, layout, order);
    operands.start_queries(0, 0);
    grid::wait_for_previous();
    grid::launch_dependents();
    operands.start_sums(0, 0);
    let votes = Votes::new(layout);
    let mut turn = 0;
    for round in 0..order.num_rounds {
        let count = order.count(round);
        for kv_head in 0..params.num_kv_heads {
            operands.wait(turn);
            let head = operands.head(turn);
            for index in 0..order.per_round {
                if index < count {
                    let probabilities = pass.take(&head);
                    votes.add(index, kv_head == 0, &probabilities);
                }
                if index == 0 && operands.are_ahead() && turn + 1 < order.num_rounds * params.num_kv_heads {
                    operands.start(turn + 1);
                }
            }
            operands.release(turn);
            turn += 1;
            if !operands.are_ahead() && turn < order.num_rounds * params.num_kv_heads {
                operands.start(turn);
            }
        }
        for index in 0..count {
            votes.write::<T, G>(&group, index, order.first_of(round) + index * order.step);
        }
    }
    tensor::cp_async_wait::<0>();
}

/// A KV head's queries and sums, and the next one's on their way, copied by all threads.
struct Operands<'a, T, const C: usize, const G: usize, const WIDE: bool> {
    group: &'a Group<'a, T>,
}

impl<'a, T: Element, const C: usize, const G: usize, const WIDE: bool> Operands<'a, T, C, G, WIDE> {
    const LAYOUT: Layout = Layout::vote(32 * C as u32, WIDE);

    /// Buffers.
    const NUM: u32 = Self::LAYOUT.ring.num_stages();

    /// Whether the next head's queries are copied while one is read.
    fn are_ahead(&self) -> bool {
        Self::NUM > 1
    }

    /// The buffer of turn `turn`: heads are read round after round, one a turn.
    fn buffer(turn: u32) -> Stage {
        Stage::nth(turn, Self::NUM)
    }

    /// *Convergence:* every thread of the block.
    unsafe fn new(group: &'a Group<'a, T>) -> Self {
        let num_slabs = group.num_slabs::<G>();
        if num_slabs < ROWS / WARP_ROWS {
            // Rows that no block has: products of 0, which nobody votes with.
            let queries = Self::LAYOUT.queries.get().cast::<V4<u32>>();
            for item in strided(thread::thread_idx_x(), Self::LAYOUT.queries.len() / 8, thread::block_dim_x())
            {
                queries.add(item).store(V4([0; 4]));
            }
            for item in strided(thread::thread_idx_x(), Self::LAYOUT.sums.len(), thread::block_dim_x()) {
                Self::LAYOUT.sums.get().add(item).store(V2([0.0; 2]));
            }
            if WIDE {
                warpgroup::fence_writes();
            }
            thread::sync_threads();
        }
        Operands { group }
    }

    fn queries(turn: u32) -> Shared<u16> {
        Self::LAYOUT.queries.get().byte_add(Self::buffer(turn).index * const { bytes_of_head(32 * C as u32) })
    }

    /// Starts copies of the queries of a turn.
    ///
    /// *Convergence:* aligned; every thread of the block. It does so turn after turn, [`start_sums`](Self::start_sums) behind each, and has
    /// [released](Self::release) what was in the buffer.
    unsafe fn start_queries(&self, turn: u32, kv_head: u32) {
        if WIDE {
            Self::LAYOUT.ring.claim(Self::buffer(turn));
        } else if Self::NUM == 1 {
            thread::sync_threads();
        }
        let queries = Self::queries(turn);
        // A warpgroup for each slab.
        for slab in strided(
            thread::thread_idx_x() / WARPGROUP,
            self.group.num_slabs::<G>(),
            thread::block_dim_x() / WARPGROUP,
        ) {
            let from = self.group.slabs::<C, G>().at(slab, kv_head);
            let piece = thread::thread_idx_x() % WARPGROUP;
            for line in 0..Slabs::<C>::LINES {
                let to = Slabs::<C>::piece(queries, slab, line, piece);
                let from = from.add((line * Slabs::<C>::PIECES + piece) as u64);
                tensor::cp_async_16(to, from.as_const(), 16);
            }
        }
    }

    /// Starts copies of its sums.
    ///
    /// *Convergence:* aligned; every thread of the block.
    unsafe fn start_sums(&self, turn: u32, kv_head: u32) {
        let sums = Self::LAYOUT.sums.get().add(Self::buffer(turn).index * ROWS).cast::<V4<u32>>();
        let thread = thread::thread_idx_x();
        let (slab, piece) = (thread / (WARP_ROWS / 2), thread % (WARP_ROWS / 2));
        if slab < self.group.num_slabs::<G>() {
            let from = self.group.slabs::<C, G>().sums(slab, kv_head).add(piece as u64);
            tensor::cp_async_16(sums.add(thread), from.as_const(), 16);
        }
        if WIDE {
            Self::LAYOUT.ring.arrived(Self::buffer(turn)).arrive_with_copies();
        } else {
            tensor::cp_async_commit();
        }
    }

    unsafe fn start(&self, turn: u32) {
        let kv_head = turn % self.group.params.num_kv_heads.max(1);
        self.start_queries(turn, kv_head);
        self.start_sums(turn, kv_head);
    }

    /// Waits for what was copied for a turn.
    ///
    /// *Convergence:* aligned; every thread of the block.
    unsafe fn wait(&self, turn: u32) {
        if WIDE {
            Self::LAYOUT.ring.wait(Self::buffer(turn));
        } else {
            tensor::cp_async_wait::<0>();
            thread::sync_threads();
        }
    }

    /// The head of a turn.
    unsafe fn head(&self, turn: u32) -> Head {
        let sums = Self::LAYOUT.sums.get().add(Self::buffer(turn).index * ROWS + own_row());
        Head { queries: Self::queries(turn), sums }
    }

    /// Says that the warp is done with a turn.
    unsafe fn release(&self, turn: u32) {
        if WIDE {
            Self::LAYOUT.ring.release(Self::buffer(turn));
        }
    }
}

/// A KV head, as a lane sees it.
struct Head {
    queries: Shared<u16>,
    /// Where the lane's sums lie.
    sums: Shared<V2<f32>>,
}

impl Head {
    /// Of the lane's two rows, the reference, base 2, negated, and the inverse sum; of no head, zeros.
    #[inline(always)]
    unsafe fn sums(&self) -> [[f32; 2]; 2] {
        [self.sums.load().0, self.sums.add(8).load().0]
    }
}

/// The warpgroup's tiles: every so many, in rounds of some, which it goes through for one head after the other.
#[derive(Clone, Copy)]
struct Order {
    first_tile: u32,
    /// From one of the warpgroup's tiles to the next.
    step: u32,
    /// One past the last tile.
    last_tile: u32,
    num_kv_heads: u32,
    /// Tiles of a round, the same for all warpgroups of the block; the last rounds may have fewer, or none.
    per_round: u32,
    num_rounds: u32,
}

impl Order {
    unsafe fn new<T: Element>(group: &Group<'_, T>, of_block: u32, share: u32) -> Order {
        let first_of_block = group.all.begin / TILE + thread::block_idx_x() * of_block;
        let last_tile = group.all.end.div_ceil(TILE);
        let step = thread::grid_dim_x() * of_block;
        let most = last_tile.saturating_sub(first_of_block).div_ceil(step.max(1));
        let num_rounds = most.div_ceil(share);
        Order {
            first_tile: first_of_block + own_warpgroup() % of_block,
            step,
            last_tile,
            num_kv_heads: group.params.num_kv_heads,
            per_round: most.div_ceil(num_rounds.max(1)),
            num_rounds,
        }
    }

    /// The first tile of a round.
    fn first_of(&self, round: u32) -> u32 {
        self.first_tile + round * self.per_round * self.step
    }

    /// Tiles of the warpgroup in a round.
    fn count(&self, round: u32) -> u32 {
        self.last_tile.saturating_sub(self.first_of(round)).div_ceil(self.step.max(1)).min(self.per_round)
    }
}

/// A tile and a head that it is taken for.
#[derive(Clone, Copy)]
struct Work {
    tile: u32,
    kv_head: u32,
    /// The first tile of the round, and how many come before this one.
    first: u32,
    index: u32,
}

/// The warpgroup's way through its work.
struct Pass<'a, T, const C: usize, const WIDE: bool> {
    group: &'a Group<'a, T>,
    stages: Stages<C>,
    barrier: u32,
    order: Order,
    /// The work behind that whose keys are in flight, and the page that the lane has looked up for it.
    ahead: Work,
    page: u32,
    stage: u32,
    products: Products,
}

impl<'a, T: Element, const C: usize, const WIDE: bool> Pass<'a, T, C, WIDE> {
    /// Starts copies of the first keys.
    unsafe fn new(group: &'a Group<'a, T>, layout: &Layout, order: Order) -> Self {
        let stages = Stages::<C>::new(layout.stages.get());
        let barrier = 1 + own_warpgroup() % const { threads(32 * C as u32, WIDE) / WARPGROUP };
        let ahead = Work { tile: order.first_tile, kv_head: 0, first: order.first_tile, index: 0 };
        let page = group.load_page(ahead.tile);
        let products = [[0.0; 4]; FRAGMENTS];
        let mut pass = Pass { group, stages, barrier, order, ahead, page, stage: 0, products };
        pass.start(0);
        pass
    }

    /// Starts copies of the keys ahead, and looks up the page of those behind them.
    #[inline(always)]
    unsafe fn start(&mut self, stage: u32) {
        let Work { tile, kv_head, .. } = self.ahead;
        self.stages.start(self.group, stage, tile, kv_head, self.page);
        self.go_ahead();
        self.page = self.group.load_page(self.ahead.tile);
    }

    /// Behind the last work comes some of no tokens.
    #[inline(always)]
    fn go_ahead(&mut self) {
        let (order, ahead) = (&self.order, &mut self.ahead);
        ahead.index += 1;
        ahead.tile += order.step;
        if ahead.index >= order.per_round || ahead.tile >= order.last_tile {
            ahead.index = 0;
            ahead.kv_head += 1;
            if ahead.kv_head >= order.num_kv_heads {
                ahead.kv_head = 0;
                ahead.first += order.per_round * order.step;
            }
            ahead.tile = ahead.first;
        }
    }

    /// A head's probabilities of the next tile.
    ///
    /// *Convergence:* aligned; the warpgroup.
    #[inline(always)]
    unsafe fn take(&mut self, head: &Head) -> TileVotes {
        self.stages.meet(self.barrier);
        multiply::<T, C, WIDE>(&mut self.products, head.queries, self.stages.keys(self.stage));
        self.stage ^= 1;
        self.start(self.stage);
        finish::<WIDE>(&mut self.products);
        probabilities(head, self.group.params.scale_log2, &self.products)
    }
}

/// The lane's share of a tile's votes: of two lanes that are neighbours by `g`, one has fragments 0 to 3, the other the rest.
type TileVotes = [[f32; 2]; FRAGMENTS / 2];

/// Votes of the tiles of a round.
struct Votes {
    /// The thread's own.
    tiles: Shared<V4<f32>>,
}

impl Votes {
    fn new(layout: &Layout) -> Votes {
        let (warpgroup, thread) = (thread::thread_idx_x() / WARPGROUP, thread::thread_idx_x() % WARPGROUP);
        Votes { tiles: layout.votes.get().add(warpgroup * layout.share * VOTES_OF_TILE + thread) }
    }

    fn tile(&self, index: u32) -> [Shared<V4<f32>>; 2] {
        let first = self.tiles.add(index * VOTES_OF_TILE);
        [first, first.add(WARPGROUP)]
    }

    /// Adds to a tile's votes. The first are stored.
    #[inline(always)]
    unsafe fn add(&self, index: u32, is_first: bool, votes: &TileVotes) {
        let tile = self.tile(index);
        for quad in 0..2 {
            let [[a, b], [c, d]] = [votes[2 * quad], votes[2 * quad + 1]];
            let mut sums = [a, b, c, d];
            if !is_first {
                let before = tile[quad].load().0;
                for i in 0..4 {
                    sums[i] += before[i];
                }
            }
            tile[quad].store(V4(sums));
        }
    }

    /// Writes the votes of a tile.
    ///
    /// *Convergence:* all 32 lanes.
    #[inline(always)]
    unsafe fn write<T: Element, const G: usize>(&self, group: &Group<'_, T>, index: u32, tile: u32) {
        let Place { block, .. } = Place::own::<G>();
        let range = group.range(block);
        // A block of no candidates may be no row at all.
        let row = group.first_row + block.min(group.num_rows - 1);
        let of_row = group.params.votes.add(group.params.batch.token_base(row));
        let [[a, b, c, d], [e, f, g, h]] = self.tile(index).map(|quad| quad.load().0);
        let votes = [[a, b], [c, d], [e, f], [g, h]];
        // The first fragment that the lane has of those that are left.
        let own = lane().g;
        let first = own % 2 * 4;
        if G == 4 {
            write_fragments::<T, 4>(of_row, range, tile, first, &votes);
            return;
        }
        let (votes, first) = (exchange::<4, 2>(&votes, 2), first + own / 2 % 2 * 2);
        if G == 8 {
            write_fragments::<T, 2>(of_row, range, tile, first, &votes);
            return;
        }
        let (votes, first) = (exchange::<2, 1>(&votes, 4), first + own / 4);
        write_fragments::<T, 1>(of_row, range, tile, first, &votes);
    }
}

/// Writes those votes of a tile, from the lane's `first` fragment on, that are in a range.
#[inline(always)]
unsafe fn write_fragments<T: Element, const N: usize>(
    of_row: GlobalMut<f32>,
    range: Tokens,
    tile: u32,
    first: u32,
    votes: &[[f32; 2]; N],
) {
    for f in 0..N {
        for column in 0..2 {
            let token = Group::<T>::token(tile, first + f as u32, column as u32);
            if token >= range.begin && token < range.end {
                of_row.add(token as u64).store(votes[f][column]);
            }
        }
    }
}

/// Adds up fragments of the lane and of the one whose `g` is `distance` more or less: the lower of the two gets the first half
/// of them, the upper the rest.
///
/// *Convergence:* all 32 lanes.
#[inline(always)]
unsafe fn exchange<const N: usize, const HALF: usize>(
    votes: &[[f32; 2]; N],
    distance: u32,
) -> [[f32; 2]; HALF] {
    const { assert!(N == 2 * HALF) };
    let is_upper = lane().g & distance != 0;
    let mut sums = [[0.0; 2]; HALF];
    for f in 0..HALF {
        for column in 0..2 {
            let (low, high) = (votes[f][column], votes[f + HALF][column]);
            let (kept, given) = if is_upper { (high, low) } else { (low, high) };
            sums[f][column] = kept + warp::shuffle_xor(warp::FULL, given, 4 * distance);
        }
    }
    sums
}

/// The probabilities of products, of both rows added up.
///
/// *Convergence:* all 32 lanes.
#[inline(always)]
unsafe fn probabilities(head: &Head, scale: f32, products: &Products) -> TileVotes {
    let sums = head.sums();
    let terms = if Sum::is_far(sums[0][0]) || Sum::is_far(sums[1][0]) {
        terms_by(products, |half, product| {
            let [minus, _] = sums[half];
            if Sum::is_far(minus) {
                Sum::ratio(product * scale, -minus)
            } else {
                math::ex2(math::fma(product, scale, minus))
            }
        })
    } else {
        terms_by(products, |half, product| math::ex2(math::fma(product, scale, sums[half][0])))
    };
    let mut all = [[0.0; 2]; FRAGMENTS];
    let mut total = [0.0; 2];
    for f in 0..FRAGMENTS {
        for column in 0..2 {
            for half in 0..2 {
                all[f][column] = math::fma(terms[f][2 * half + column], sums[half][1], all[f][column]);
            }
            total[column] += all[f][column];
        }
    }
    let are_numbers = total[0] + total[1] < f32::INFINITY;
    if !are_numbers {
        // Maybe of no head: its queries are zeros, whose products with infinities are NaN.
        for f in 0..FRAGMENTS {
            for column in 0..2 {
                all[f][column] = 0.0;
                for half in 0..2 {
                    let [_, inverse] = sums[half];
                    let with = math::fma(terms[f][2 * half + column], inverse, all[f][column]);
                    all[f][column] = if inverse == 0.0 { all[f][column] } else { with };
                }
            }
        }
    }
    exchange::<FRAGMENTS, { FRAGMENTS / 2 }>(&all, 1)
}

/// What each product makes in its row.
#[inline(always)]
fn terms_by(products: &Products, term: impl Fn(usize, f32) -> f32) -> Products {
    let mut terms = [[0.0; 4]; FRAGMENTS];
    for f in 0..FRAGMENTS {
        for i in 0..4 {
            terms[f][i] = term(i / 2, products[f][i]);
        }
    }
    terms
}
