//! Second pass over the keys: votes of every block.

use super::stats::Sum;
use super::*;
use crate::simt::{grid, math};

/// See the module. `C` chunks of 32 dimensions, `G` heads of a group.
///
/// # Safety
/// - As for [`stats`](super::stats()), behind [`fold`](super::fold()); launched with [`ScoreBlocksParams::votes`].
#[inline(always)]
pub unsafe fn vote<T: Element, const C: usize, const G: usize>(params: ScoreBlocksParams<T>) {
    if warpgroup::available() { vote_as::<T, C, G, true>(params) } else { vote_as::<T, C, G, false>(params) }
}

/// `WIDE`: with products of a warpgroup.
#[inline(always)]
unsafe fn vote_as<T: Element, const C: usize, const G: usize, const WIDE: bool>(
    params: ScoreBlocksParams<T>,
) {
    match (C > 4, WIDE) {
        (false, true) => thread::launch_bounds::<{ vote_threads(128, true) }, 1>(),
        (false, false) => thread::launch_bounds::<{ vote_threads(128, false) }, 2>(),
        (true, true) => thread::launch_bounds::<{ vote_threads(256, true) }, 1>(),
        (true, false) => thread::launch_bounds::<{ vote_threads(256, false) }, 1>(),
    }
    let layout = const { &Layout::vote(32 * C as u32, heads_of_launch(32 * C as u32, WIDE), WIDE) };
    grid::wait_for_previous();
    grid::launch_dependents();
    let blocks = 4 * (SLOTS / G) as u32;
    let group = Group::new(&params, thread::block_idx_y(), blocks, layout.ranges.get());
    if group.is_idle() {
        return;
    }
    let (first_head, num_heads) = (params.first_kv_head, params.launch_kv_heads);
    let stages = Stages::<C>::new(layout.stages.get());
    let mut place = Place::new(&group);
    let mut ahead = place;
    for stage in 0..STAGES {
        let page = group.load_page(ahead.tile);
        stages.start(&group, stage, ahead.tile, first_head + ahead.head, page);
        ahead = ahead.next(num_heads);
    }
    let mut page = group.load_page(ahead.tile);
    let queries = layout.queries.get();
    group.put_queries::<C, G>(queries, first_head, num_heads);
    let is_plain = Sums::put::<T, G>(&group, layout, num_heads);
    let is_plain = !thread::sync_threads_or(!is_plain);
    let sums = Sums { minus: layout.minus.get(), inverses: layout.inverses.get(), is_plain };
    let of_head = bytes_of_head(32 * C as u32);
    let mut votes = [[0.0; 2]; SLOTS];
    let mut products = [[0.0; 4]; SLOTS / 2];
    let mut stage = 0;
    while !place.is_over() {
        let keys = stages.take(stage);
        // The same in all lanes, and known to be: addresses of operands are for the whole warp.
        let head = warp::shuffle_idx(warp::FULL, place.head, 0);
        stages.start(&group, stage, ahead.tile, first_head + ahead.head, page);
        multiply::<T, C, WIDE>(&mut products, &keys, queries.byte_add(head * of_head));
        ahead = ahead.next(num_heads);
        page = if ahead.head == 0 { group.load_page(ahead.tile) } else { page };
        finish::<WIDE>(&mut products);
        sums.add::<T, G>(&group, &mut votes, &products, &place);
        if place.head + 1 == num_heads {
            write::<T, G>(&group, &mut votes, place.tile);
        }
        place = place.next(num_heads);
        stage = (stage + 1) % STAGES;
    }
    tensor::cp_async_wait::<0>();
}

/// A place among the tiles of a warpgroup, and the heads of each.
#[derive(Clone, Copy)]
struct Place {
    tile: u32,
    /// From the launch's first.
    head: u32,
    step: u32,
    last: u32,
}

impl Place {
    fn new<T: Element>(group: &Group<'_, T>) -> Place {
        let of_block = thread::block_dim_x() / WARPGROUP;
        let warpgroup = thread::block_idx_x() * of_block + thread::thread_idx_x() / WARPGROUP;
        Place {
            tile: group.all.begin / TILE + warpgroup,
            head: 0,
            step: thread::grid_dim_x() * of_block,
            last: group.all.end.div_ceil(TILE),
        }
    }

    fn is_over(&self) -> bool {
        self.tile >= self.last
    }

    fn next(&self, num_heads: u32) -> Place {
        if self.head + 1 < num_heads {
            Place { head: self.head + 1, ..*self }
        } else {
            Place { head: 0, tile: self.tile + self.step, ..*self }
        }
    }
}

/// What makes probabilities of logits: the heads' references, base 2, negated, and the inverse sums.
struct Sums {
    minus: Shared<f32>,
    inverses: Shared<f32>,
    /// Whether no reference is far, or infinite.
    is_plain: bool,
}

impl Sums {
    /// Puts those of a group in shared memory; whether the thread's are all plain.
    unsafe fn put<T: Element, const G: usize>(group: &Group<'_, T>, layout: &Layout, num_heads: u32) -> bool {
        let params = group.params;
        let mut is_plain = true;
        let mut entry = thread::thread_idx_x();
        while entry < num_heads * 4 * SLOTS as u32 {
            let (slot, rest) = (entry % SLOTS as u32, entry / SLOTS as u32);
            let (t, head) = (rest % 4, rest / 4);
            let (block, member) = (t + 4 * (slot / G as u32), slot % G as u32);
            let range = group.range(block);
            // Slots of no head: a probability of 0.
            let (mut reference, mut inverse) = (0.0, 0.0);
            if member < params.group && range.begin < range.end {
                let heads = (params.num_kv_heads * params.group) as u64;
                let head = (params.first_kv_head + head) * params.group + member;
                let place = (group.first_row + block) as u64 * heads + head as u64;
                [reference, inverse] = params.sums.add(place).load().0;
                is_plain &= !Sum::is_far(reference);
            }
            layout.minus.get().add(entry).store(-reference);
            layout.inverses.get().add(entry).store(inverse);
            entry += thread::block_dim_x();
        }
        is_plain
    }

    /// Adds the probabilities of a head's products to the votes of the lane's blocks: `votes[q]` are those of block `t + 4 q`.
    #[inline(always)]
    unsafe fn add<T: Element, const G: usize>(
        &self,
        group: &Group<'_, T>,
        votes: &mut [[f32; 2]; SLOTS],
        products: &Products,
        place: &Place,
    ) {
        let scale = group.params.scale_log2;
        let first = (place.head * 4 + lane().t) * SLOTS as u32;
        let quads = [self.minus, self.inverses].map(|of_lane| of_lane.add(first).cast::<V4<f32>>());
        for q in 0..SLOTS / G {
            let mut sums = votes[q];
            for slot in G * q..G * (q + 1) {
                let [minus, inverse] = quads.map(|quads| quads.add(slot as u32 / 4).load().0[slot % 4]);
                for half in 0..2 {
                    let term = math::ex2(math::fma(product(products, slot, half), scale, minus));
                    sums[half] = math::fma(term, inverse, sums[half]);
                }
            }
            if self.is_plain && sums[0] + sums[1] < f32::INFINITY {
                votes[q] = sums;
            } else {
                self.add_any::<G>(scale, &mut votes[q], products, G * q, first);
            }
        }
    }

    /// The slow way: logits that are no numbers, references that are far or infinite.
    #[inline(always)]
    unsafe fn add_any<const G: usize>(
        &self,
        scale: f32,
        votes: &mut [f32; 2],
        products: &Products,
        first_slot: usize,
        first: u32,
    ) {
        for i in 0..G {
            let slot = first_slot + i;
            let place = first + slot as u32;
            let (reference, inverse) = (-self.minus.add(place).load(), self.inverses.add(place).load());
            if inverse == 0.0 {
                continue; // no head: its queries are zeros, whose products with infinities are NaN
            }
            for half in 0..2 {
                let product = product(products, slot, half);
                let term = if Sum::is_far(reference) {
                    Sum::ratio(product * scale, reference)
                } else {
                    math::ex2(math::fma(product, scale, -reference))
                };
                votes[half] = math::fma(term, inverse, votes[half]);
            }
        }
    }
}

/// Writes the votes of a tile, those of earlier heads added, and sets them back to 0.
unsafe fn write<T: Element, const G: usize>(group: &Group<'_, T>, votes: &mut [[f32; 2]; SLOTS], tile: u32) {
    let (params, at) = (group.params, lane());
    for q in 0..SLOTS / G {
        let block = at.t + 4 * q as u32;
        let range = group.range(block);
        if range.begin < range.end {
            let of_row = params.votes.add(params.batch.token_base(group.first_row + block));
            for half in 0..2 {
                let token = Group::<T>::token(tile, half as u32);
                if token >= range.begin && token < range.end {
                    let place = of_row.add(token as u64);
                    if params.first_kv_head == 0 {
                        place.store(votes[q][half]);
                    } else {
                        place.reduce_add(votes[q][half]);
                    }
                }
            }
        }
        votes[q] = [0.0; 2];
    }
}
