//! The kernel: items, and what the warpgroups do.

mod consumer;
mod producer;

use super::params::*;
use crate::common::element::Element;
use crate::common::layout::Tokens;
use crate::common::ring::Stage;
use crate::limits::{WARPGROUP, WARPGROUP_ROWS};
use crate::ops::attend::AttendParams;
use crate::ops::attend::kernel::List;
use crate::ops::attend::kernel::rows::bound;
use crate::simt::data::V4;
use crate::simt::shared::Shared;
use crate::simt::{bulk, grid, thread, warp, warpgroup};

/// See the module. `K` steps of 16 dimensions, `N = 2 K` fragments of 8; `F` fragments of a tile's places.
///
/// # Safety
/// - The buffers and tables are as [`AttendParams`] says, and 16-byte aligned; page numbers are those of the cache.
/// - `head_dim = 16 K`; `F` is [`tile_fragments`].
/// - Keys are gathered, or no rope table is given. The rope tables cover `last_position` and the longest block.
/// - Launched with [`AttendParams::warpgroups_dims`].
pub unsafe fn attend_warpgroups<T: Element, const K: usize, const N: usize, const F: usize>(
    params: AttendParams<T>,
) {
    const { assert!(F == tile_fragments((16 * K) as u32)) };
    const { assert!(matches!(N, 8 | 12 | 16 | 32), "no product of warpgroups is so wide") };
    thread::launch_bounds::<THREADS, 1>();
    let layout = const { &Layout::new((16 * K) as u32) };
    if thread::thread_idx_x() == 0 {
        layout.item_ring.init_for(1, THREADS / 32);
        layout.query_ring.init_for(WARPGROUP, CONSUMERS * 4);
        layout.key_ring.init_for(WARPGROUP, CONSUMERS * 4);
        layout.value_ring.init_for(WARPGROUP, CONSUMERS * 4);
        bulk::publish();
    }
    if thread::thread_idx_x() < layout.zeros.len() {
        layout.zeros.get().add(thread::thread_idx_x()).store(0);
    }
    thread::sync_threads();
    grid::wait_for_previous();
    grid::launch_dependents();
    if thread::thread_idx_x() < WARPGROUP {
        if const { keeps_queries((16 * K) as u32) } {
            warpgroup::give_registers::<{ REGISTERS[0] }>();
        } else {
            warpgroup::give_registers::<{ REGISTERS_OF_LARGE_HEADS[0] }>();
        }
        producer::produce::<T, K>(&params, layout);
    } else {
        if const { keeps_queries((16 * K) as u32) } {
            warpgroup::take_registers::<{ REGISTERS[1] }>();
        } else {
            warpgroup::take_registers::<{ REGISTERS_OF_LARGE_HEADS[1] }>();
        }
        consumer::consume::<T, K, N, F>(&params, layout);
    }
}

/// The warp in its block, which has one axis.
fn own_warp() -> u32 {
    thread::thread_idx_x() / warp::SIZE
}

/// How far a thread has come, which tells its stages.
#[derive(Clone, Copy)]
struct Progress {
    /// Items before this one.
    items: u32,
    /// Their tiles.
    tiles: u32,
}

impl Progress {
    const NONE: Progress = Progress { items: 0, tiles: 0 };

    /// Of the item.
    fn item(&self) -> Stage {
        Stage::nth(self.items, ITEMS)
    }

    /// Of its queries.
    fn queries(&self) -> Stage {
        Stage::nth(self.items, 1)
    }

    /// Of its tile `tile`, keys or values; `u32::MAX`: of the last tile before.
    fn tile(&self, tile: u32) -> Stage {
        Stage::nth(self.tiles.wrapping_add(tile), STAGES)
    }

    fn next(self, item: &Item) -> Progress {
        Progress { items: self.items + 1, tiles: self.tiles + item.num_tiles }
    }
}

/// 128 query rows of a KV head of a row.
struct Item {
    list: List,
    kv_head: u32,
    /// The first query row, and those of the KV head; none: there is no item any more.
    first_row: u32,
    num_rows: u32,
    /// Tiles that all the query rows see.
    num_full: u32,
    /// Tiles that some of them may see.
    num_tiles: u32,
}

impl Item {
    /// Stores item `index`, in tiles of `tile` places, unless its row has not so many query rows; whether it has.
    ///
    /// *Convergence:* one lane stores for all.
    unsafe fn find<T: Element>(params: &AttendParams<T>, index: u32, tile: u32, to: Shared<V4<u32>>) -> bool {
        let (blocks, heads) = (params.query_blocks().max(1), params.num_kv_heads.max(1));
        let (block, head_of_row) = (index % blocks, index / blocks);
        let (kv_head, row) = (head_of_row % heads, head_of_row / heads);
        let list = params.list(row);
        let (first_row, num_rows) = (block * QUERY_ROWS, params.num_query_rows(&list));
        if first_row >= num_rows {
            return false;
        }
        let bound = |row| bound(params, &list, row, num_rows);
        let places = params.useful_places(&list, bound(first_row + QUERY_ROWS - 1));
        let num_full = params.places_below(&list, bound(first_row)) / tile;
        if warp::lane_id() == 0 {
            let List { row, queries, len, last_token, first_page, first_bound } = list;
            to.store(V4([row, queries.begin, queries.end, len]));
            to.add(1).store(V4([last_token, first_page, first_bound, kv_head]));
            to.add(2).store(V4([first_row, num_rows, num_full, places.div_ceil(tile)]));
        }
        true
    }

    /// Stores that there is no item any more.
    unsafe fn store_end(to: Shared<V4<u32>>) {
        for i in 0..ITEM_WORDS / 4 {
            to.add(i).store(V4([0; 4]));
        }
    }

    /// Where the item of a stage lies.
    fn place(layout: &Layout, stage: Stage) -> Shared<V4<u32>> {
        layout.items.get().add(ITEM_WORDS / 4 * stage.index)
    }

    /// One without rows if there is none any more.
    unsafe fn load(from: Shared<V4<u32>>) -> Item {
        let [row, begin, end, len] = from.load().0;
        let [last_token, first_page, first_bound, kv_head] = from.add(1).load().0;
        let [first_row, num_rows, num_full, num_tiles] = from.add(2).load().0;
        let list = List { row, queries: Tokens { begin, end }, len, last_token, first_page, first_bound };
        Item { list, kv_head, first_row, num_rows, num_full, num_tiles }
    }
}
