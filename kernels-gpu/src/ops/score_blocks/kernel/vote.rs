//! Second pass over the keys: votes of every block.

use super::stats::Sum;
use super::*;
use crate::simt::{grid, math};

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
    match (C > 4, WIDE) {
        (false, true) => thread::launch_bounds::<{ vote_threads(128, true) }, 1>(),
        (false, false) => thread::launch_bounds::<{ vote_threads(128, false) }, 2>(),
        (true, true) => thread::launch_bounds::<{ vote_threads(256, true) }, 1>(),
        (true, false) => thread::launch_bounds::<{ vote_threads(256, false) }, 1>(),
    }
    let most = const { most_heads(32 * C as u32, WIDE) };
    let layout = const { &Layout::vote(32 * C as u32, most_heads(32 * C as u32, WIDE), WIDE) };
    // Of the launch before, `fold`, only the sums are read; all before it have ended.
    let blocks = 4 * (SLOTS / G) as u32;
    let group = Group::new(&params, thread::block_idx_y(), blocks, layout.ranges.get());
    if group.is_idle() {
        grid::wait_for_previous();
        return;
    }
    let stages = Stages::<C>::new(layout.stages.get());
    let order = Order::new(&group, most);
    let mut place = order.first();
    let mut ahead = place;
    let mut page = group.load_page(ahead.tile);
    for stage in 0..STAGES {
        stages.start(&group, stage, ahead.tile, order.head_of(ahead), page);
        let before = ahead.tile;
        ahead = order.next(ahead);
        if ahead.tile != before {
            page = group.load_page(ahead.tile);
        }
    }
    let queries = layout.queries.get();
    let of_head = bytes_of_head(32 * C as u32);
    let mut votes = [[0.0; 2]; SLOTS];
    let mut products = [[0.0; 4]; SLOTS / 2];
    let mut stage = 0;
    for first_head in (0..params.num_kv_heads).step_by(order.heads_at_a_time as usize) {
        // Everyone is done with the queries and sums of the heads before.
        thread::sync_threads();
        let num_heads = order.heads_at_a_time.min(params.num_kv_heads - first_head);
        group.put_queries::<C, G>(queries, first_head, num_heads);
        if first_head == 0 {
            grid::wait_for_previous();
            grid::launch_dependents();
        }
        let is_plain = Sums::put::<T, G>(&group, layout, first_head, num_heads);
        let is_plain = !thread::sync_threads_or(!is_plain);
        let sums = Sums { minus: layout.minus.get(), inverses: layout.inverses.get(), is_plain };
        while place.head < first_head + num_heads {
            let keys = stages.take(stage);
            // The same in all lanes, and known to be: addresses of operands are for the whole warp.
            let head = warp::shuffle_idx(warp::FULL, place.head - first_head, 0);
            multiply::<T, C, WIDE>(&mut products, &keys, queries.byte_add(head * of_head));
            stages.start(&group, stage, ahead.tile, order.head_of(ahead), page);
            let before = ahead.tile;
            ahead = order.next(ahead);
            page = if ahead.tile != before { group.load_page(ahead.tile) } else { page };
            finish::<WIDE>(&mut products);
            sums.add::<T, G>(&group, &mut votes, &products, head);
            if head + 1 == num_heads {
                write::<T, G>(&group, &mut votes, place.tile, first_head == 0);
            }
            place = order.next(place);
            stage = (stage + 1) % STAGES;
        }
    }
    tensor::cp_async_wait::<0>();
}

/// A tile and KV head, and the first head of those whose queries are there at that time.
#[derive(Clone, Copy)]
struct Place {
    tile: u32,
    head: u32,
    first_head: u32,
}

/// The order of a warpgroup's places: of as many heads as there is room for at a time, all its tiles, one after the other.
struct Order {
    first_tile: u32,
    /// From one of the warpgroup's tiles to the next.
    step: u32,
    /// One past the last tile.
    last_tile: u32,
    num_kv_heads: u32,
    heads_at_a_time: u32,
}

impl Order {
    fn new<T: Element>(group: &Group<'_, T>, most_heads: u32) -> Order {
        let of_block = thread::block_dim_x() / WARPGROUP;
        let warpgroup = thread::block_idx_x() * of_block + thread::thread_idx_x() / WARPGROUP;
        let num_kv_heads = group.params.num_kv_heads;
        Order {
            first_tile: group.all.begin / TILE + warpgroup,
            step: thread::grid_dim_x() * of_block,
            last_tile: group.all.end.div_ceil(TILE),
            num_kv_heads,
            // Shares that differ by one at most.
            heads_at_a_time: num_kv_heads.div_ceil(num_kv_heads.div_ceil(most_heads).max(1)).max(1),
        }
    }

    /// The first place; one of no head where the warpgroup has no tile.
    fn first(&self) -> Place {
        let head = if self.first_tile < self.last_tile { 0 } else { self.num_kv_heads };
        Place { tile: self.first_tile, head, first_head: head }
    }

    /// The head of a place, of which there is one.
    fn head_of(&self, place: Place) -> u32 {
        place.head.min(self.num_kv_heads - 1)
    }

    /// The next place; behind the last one come places of no head.
    fn next(&self, place: Place) -> Place {
        let end = (place.first_head + self.heads_at_a_time).min(self.num_kv_heads);
        if place.head + 1 < end {
            Place { head: place.head + 1, ..place }
        } else if place.tile + self.step < self.last_tile {
            Place { tile: place.tile + self.step, head: place.first_head, ..place }
        } else {
            Place { tile: self.first_tile, head: end, first_head: end }
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
    unsafe fn put<T: Element, const G: usize>(
        group: &Group<'_, T>,
        layout: &Layout,
        first_head: u32,
        num_heads: u32,
    ) -> bool {
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
                let head = (first_head + head) * params.group + member;
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
        head: u32,
    ) {
        let scale = group.params.scale_log2;
        let first = (head * 4 + lane().t) * SLOTS as u32;
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

/// Writes the votes of a tile, or adds them to those of earlier heads, and sets them back to 0.
unsafe fn write<T: Element, const G: usize>(
    group: &Group<'_, T>,
    votes: &mut [[f32; 2]; SLOTS],
    tile: u32,
    is_first: bool,
) {
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
                    if is_first {
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
