//! Second pass over the keys: votes of every block.

use super::*;
use crate::simt::{grid, math};

/// See the module. `C` chunks of 32 dimensions, `G` heads of a group, a warpgroup's products if `WIDE`.
///
/// # Safety
/// - As for [`stats`](super::stats()), behind [`fold`](super::fold()); launched with [`ScoreBlocksParams::votes`].
#[inline(always)]
pub unsafe fn vote<T: Element, const C: usize, const G: usize, const WIDE: bool>(
    params: ScoreBlocksParams<T>,
) {
    thread::launch_bounds::<VOTE_THREADS, 1>();
    let layout = const { &Layout::new(32 * C as u32, heads_of_launch(32 * C as u32)) };
    grid::wait_for_previous();
    grid::launch_dependents();
    let blocks = 4 * (SLOTS / G) as u32;
    let group = Group::new(&params, thread::block_idx_y(), blocks, layout.ranges.get());
    if group.is_idle() {
        return;
    }
    let num_heads = params.launch_kv_heads;
    let queries = layout.queries.get();
    group.put_queries::<C, G>(queries, params.first_kv_head, num_heads);
    let is_plain = Logs::put::<T, G>(&group, layout, num_heads);
    let mut place = Place::new(&group);
    let mut keys = [[[0; 4]; C]; 2];
    let mut pages = [0; 2];
    if !place.is_over() {
        pages = group.load_pages(place.tile);
        keys = group.load_keys::<C>(place.tile, params.first_kv_head, pages);
    }
    let is_plain = !thread::sync_threads_or(!is_plain);
    if place.is_over() {
        return;
    }
    let logs = Logs { logs: layout.sums.get(), inverses: layout.inverses.get(), is_plain };
    let of_head = 32 * C as u32 / 8 * SLOTS as u32 * CORE_BYTES;
    let mut votes = [[0.0; 2]; SLOTS];
    let mut products = [[0.0; 4]; SLOTS];
    let mut next = place.next(num_heads);
    pages = if next.head == 0 { group.load_pages(next.tile) } else { pages };
    if !is_double::<C, WIDE>() {
        loop {
            multiply::<T, C, WIDE>(&mut products, &keys, queries.byte_add(place.head * of_head));
            finish::<WIDE>(&mut products);
            keys = group.load_keys::<C>(next.tile, params.first_kv_head + next.head, pages);
            let after = next.next(num_heads);
            pages = if after.head == 0 { group.load_pages(after.tile) } else { pages };
            logs.add::<T, G>(&group, &mut votes, &products, &place);
            if place.head + 1 == num_heads {
                write::<T, G>(&group, &mut votes, place.tile);
            }
            if next.is_over() {
                return;
            }
            (place, next) = (next, after);
        }
    }
    loop {
        multiply::<T, C, WIDE>(&mut products, &keys, queries.byte_add(place.head * of_head));
        let others = group.load_keys::<C>(next.tile, params.first_kv_head + next.head, pages);
        let after = next.next(num_heads);
        pages = if after.head == 0 { group.load_pages(after.tile) } else { pages };
        finish::<WIDE>(&mut products);
        logs.add::<T, G>(&group, &mut votes, &products, &place);
        if place.head + 1 == num_heads {
            write::<T, G>(&group, &mut votes, place.tile);
        }
        if next.is_over() {
            return;
        }
        multiply::<T, C, WIDE>(&mut products, &others, queries.byte_add(next.head * of_head));
        keys = group.load_keys::<C>(after.tile, params.first_kv_head + after.head, pages);
        let then = after.next(num_heads);
        pages = if then.head == 0 { group.load_pages(then.tile) } else { pages };
        finish::<WIDE>(&mut products);
        logs.add::<T, G>(&group, &mut votes, &products, &next);
        if next.head + 1 == num_heads {
            write::<T, G>(&group, &mut votes, next.tile);
        }
        if after.is_over() {
            return;
        }
        (place, next) = (after, then);
    }
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
        const WARPGROUPS: u32 = VOTE_THREADS / 128;
        let warpgroup = thread::block_idx_x() * WARPGROUPS + thread::thread_idx_x() / 128;
        Place {
            tile: group.all.begin / TILE + warpgroup,
            head: 0,
            step: thread::grid_dim_x() * WARPGROUPS,
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

/// What makes probabilities of logits: logarithms of the heads' sums, base 2, and the inverses, where the former are infinite.
struct Logs {
    logs: Shared<f32>,
    inverses: Shared<f32>,
    /// Whether all are finite.
    is_plain: bool,
}

impl Logs {
    /// Puts those of a group in shared memory; whether the thread's are all finite.
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
            let (mut log, mut inverse) = (f32::MAX, 0.0);
            if member < params.group && range.begin < range.end {
                let heads = (params.num_kv_heads * params.group) as u64;
                let head = (params.first_kv_head + head) * params.group + member;
                let place = (group.first_row + block) as u64 * heads + head as u64;
                [log, inverse] = params.sums.add(place).load().0;
                is_plain &= log.is_finite();
            }
            layout.sums.get().add(entry).store(log);
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
        let logs = self.logs.add(first).cast::<V4<f32>>();
        let mut sums = *votes;
        let mut total = 0.0;
        for slot in 0..SLOTS {
            let log = logs.add(slot as u32 / 4).load().0[slot % 4];
            for half in 0..2 {
                let p = math::ex2(math::fma(product(products, slot, half), scale, -log));
                sums[slot / G][half] += p;
            }
        }
        for q in 0..SLOTS / G {
            total += sums[q][0] + sums[q][1];
        }
        if self.is_plain && total < f32::INFINITY {
            *votes = sums;
        } else {
            self.add_any::<G>(scale, votes, products, first);
        }
    }

    /// The slow way: logits that are no numbers, sums that are infinite.
    #[inline(always)]
    unsafe fn add_any<const G: usize>(
        &self,
        scale: f32,
        votes: &mut [[f32; 2]; SLOTS],
        products: &Products,
        first: u32,
    ) {
        for slot in 0..SLOTS {
            let (log, inverse) =
                (self.logs.add(first + slot as u32).load(), self.inverses.add(first + slot as u32).load());
            if inverse == 0.0 {
                continue; // no head: its queries are zeros, whose products with infinities are NaN
            }
            for half in 0..2 {
                let product = any_product(products, slot, half);
                let p = if log.is_finite() {
                    math::ex2(math::fma(product, scale, -log))
                } else if product * scale == log {
                    inverse
                } else {
                    math::ex2(product * scale - log)
                };
                votes[slot / G][half] += p;
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
                    let before = if params.first_kv_head > 0 { place.load() } else { 0.0 };
                    place.store(before + votes[q][half]);
                }
            }
        }
        votes[q] = [0.0; 2];
    }
}
