//! What copies queries, keys and values to shared memory.

use super::*;
use crate::common::layout::absent;
use crate::simt::data::V4;
use crate::simt::global::GlobalPtr;
use crate::simt::shared::Shared;
use crate::simt::{tensor, warp};

/// Where the lane's place of a tile lies: lane `i` of a warp looks up the `i`th of the [`warp_places`] that the warp copies (or the
/// `i - 16`th, where those are 16).
#[derive(Clone, Copy)]
struct Looked {
    page: u32,
    within: u32,
}

/// *Convergence:* the first warpgroup.
#[inline(always)]
pub(super) unsafe fn produce<T: Element, const K: usize>(params: &AttendParams<T>, layout: &Layout) {
    let mut progress = Progress::NONE;
    let mut index = thread::block_idx_x();
    // The lane's place of the tile before, whose values are copied behind this tile's keys: so they are needed.
    let mut values = absent::<T>();
    loop {
        if own_warp() == 0 {
            index = send::<T, K>(params, layout, index, progress.item());
        }
        // Who found it reads it, too: it need not be kept in registers on the way.
        layout.item_ring.wait(progress.item());
        let item = Item::load(Item::place(layout, progress.item()));
        layout.item_ring.release(progress.item());
        if (item.num_tiles == 0 || !const { keeps_queries((16 * K) as u32) }) && values.addr() != 0 {
            // They hear of two items at a time, and still wait for these. (Or they leave the queries, which are claimed below, behind the
            // last keys alone: these values would come late.)
            copy_values::<T, K>(layout, values, progress.tile(u32::MAX));
            values = absent();
        }
        if item.num_rows == 0 {
            break;
        }
        let mut ahead = look_up::<T, K>(params, &item, 0);
        copy_queries::<T, K>(params, layout, &item, progress.queries());
        for tile in 0..item.num_tiles {
            let at = ahead;
            ahead = look_up::<T, K>(params, &item, (tile + 1).min(item.num_tiles - 1));
            copy_keys::<T, K>(params, layout, &item, tile, at, progress.tile(tile));
            if values.addr() != 0 {
                copy_values::<T, K>(layout, values, progress.tile(tile.wrapping_sub(1)));
            }
            values = params.v_pages.add(params.v_stride.offset(at.page, at.within, item.kv_head));
        }
        progress = progress.next(&item);
    }
}

/// Tells of the first item from `index` on, or that there is none any more; returns where to look for the next.
///
/// *Convergence:* all 32 lanes of one warp.
unsafe fn send<T: Element, const K: usize>(
    params: &AttendParams<T>,
    layout: &Layout,
    mut index: u32,
    stage: Stage,
) -> u32 {
    let to = Item::place(layout, stage);
    layout.item_ring.claim(stage);
    loop {
        let is_end = index >= params.num_items();
        let found = !is_end && Item::find(params, index, tile((16 * K) as u32), to);
        index += thread::grid_dim_x();
        if is_end && warp::lane_id() == 0 {
            Item::store_end(to);
        }
        if found || is_end {
            break;
        }
    }
    if warp::lane_id() == 0 {
        layout.item_ring.arrived(stage).arrive();
    }
    index
}

/// Of a place beyond the end of the list: where the last token lies. Anything for an empty list.
unsafe fn look_up<T: Element, const K: usize>(params: &AttendParams<T>, item: &Item, tile: u32) -> Looked {
    if item.num_tiles == 0 {
        return Looked { page: 0, within: 0 };
    }
    let token = params.place(&item.list, own_place::<K>(tile)).token;
    let (page, within) = params.page(&item.list, token);
    Looked { page, within }
}

/// The lane's place of a tile.
fn own_place<const K: usize>(of: u32) -> u32 {
    let (tile, places) = const { (tile((16 * K) as u32), warp_places((16 * K) as u32)) };
    tile * of + places * own_warp() + warp::lane_id() % places
}

/// Rows that there are not are zero.
unsafe fn copy_queries<T: Element, const K: usize>(
    params: &AttendParams<T>,
    layout: &Layout,
    item: &Item,
    stage: Stage,
) {
    let last = item.num_rows - 1;
    layout.query_ring.claim(stage);
    // As for `Pieces`.
    let own = warp::shuffle_xor(warp::FULL, thread::thread_idx_x(), 0);
    let from = params.q_row(&item.list, item.kv_head, (item.first_row + own).min(last));
    let first = WARP_QUERIES * (own / 32) + own % 32 / 8;
    let bytes = |fourth| if item.first_row + first + 4 * fourth <= last { 16 } else { 0 };
    if const { keeps_queries((16 * K) as u32) } {
        let pitch = (16 * K) as u32 + PAD;
        let to = layout.queries.get().add(first * pitch + own % 8 * 8);
        let to = |fourth, chunk| to.add(4 * fourth * pitch + 64 * chunk).cast();
        copy_lines::<T, K>(from, WARP_QUERIES, bytes, to);
    } else {
        let to = Pieces::of(layout.queries.get(), WARP_QUERIES);
        copy_lines::<T, K>(from, WARP_QUERIES, bytes, |fourth, chunk| {
            to.at(fourth).byte_add(QUERY_ROWS * LINE_BYTES * chunk)
        });
    }
    layout.query_ring.arrived(stage).arrive_with_copies();
}

#[inline(always)]
unsafe fn copy_keys<T: Element, const K: usize>(
    params: &AttendParams<T>,
    layout: &Layout,
    item: &Item,
    tile: u32,
    at: Looked,
    stage: Stage,
) {
    let offset = params.key_offset(&item.list, item.kv_head, own_place::<K>(tile), || (at.page, at.within));
    layout.key_ring.claim(stage);
    copy_tile::<T, K>(params.k_pages.add(offset), layout.keys.get(), stage);
    layout.key_ring.arrived(stage).arrive_with_copies();
}

#[inline(always)]
unsafe fn copy_values<T: Element, const K: usize>(layout: &Layout, from: GlobalPtr<T>, stage: Stage) {
    layout.value_ring.claim(stage);
    copy_tile::<T, K>(from, layout.values.get(), stage);
    layout.value_ring.arrived(stage).arrive_with_copies();
}

/// Starts copies of the warp's places of a tile, that of lane `i` from its `from`, to a stage.
#[inline(always)]
unsafe fn copy_tile<T: Element, const K: usize>(from: GlobalPtr<T>, stages: Shared<u16>, stage: Stage) {
    let head_dim = (16 * K) as u32;
    let to = Pieces::of(stages.byte_add(stage.index * Layout::stage_bytes(head_dim)), warp_places(head_dim));
    copy_lines::<T, K>(
        from,
        warp_places(head_dim),
        |_| 16,
        |fourth, chunk| to.at(fourth).byte_add(Layout::lines_bytes(head_dim) * chunk),
    );
}

/// Where the lane's pieces lie, of the first 64 dimensions: of every eighth of its warp's places, and of those four places behind these,
/// whose lines are swizzled otherwise. Eight lanes have eight adjacent pieces of one place.
#[derive(Clone, Copy)]
struct Pieces {
    even: Shared<V4<u32>>,
    odd: Shared<V4<u32>>,
}

impl Pieces {
    /// In lines from `lines` on, of which each warp has `places`.
    ///
    /// *Convergence:* all 32 lanes.
    unsafe fn of(lines: Shared<u16>, places: u32) -> Pieces {
        // Behind a shuffle, so that no registers hold from copy to copy what follows from it.
        let own = warp::shuffle_xor(warp::FULL, thread::thread_idx_x(), 0);
        let (place, piece) = (own % 32 / 8, own % 8);
        let line = lines.byte_add(LINE_BYTES * (places * (own / 32) + place));
        let even = piece ^ place;
        Pieces { even: line.byte_add(16 * even).cast(), odd: line.byte_add(16 * (even ^ 4)).cast() }
    }

    /// The piece of the `fourth`th place among every fourth of the warp's.
    fn at(&self, fourth: u32) -> Shared<V4<u32>> {
        let half = if fourth.is_multiple_of(2) { self.even } else { self.odd };
        half.byte_add(4 * LINE_BYTES * fourth)
    }
}

/// Starts copies of a warp's `heads` heads of queries, keys or values, that of lane `i` from its `from`, eight lanes a line: `bytes` of
/// each piece of the `fourth`th head among every fourth, and zeros for the rest, to `to(fourth, chunk)`.
///
/// *Convergence:* all 32 lanes.
#[inline(always)]
unsafe fn copy_lines<T: Element, const K: usize>(
    from: GlobalPtr<T>,
    heads: u32,
    bytes: impl Fn(u32) -> u32,
    to: impl Fn(u32, u32) -> Shared<V4<u32>>,
) {
    let halves = [from.addr() as u32, (from.addr() >> 32) as u32];
    // In a loop that is not unrolled, since the compiler does not know the count: few registers are left for addresses.
    let pairs = warp::shuffle_idx(warp::FULL, heads / 8, 0);
    for pair in 0..pairs {
        for side in 0..2 {
            let fourth = 2 * pair + side;
            let lane = 4 * fourth + warp::lane_id() / 8;
            let [low, high] = halves.map(|half| warp::shuffle_idx(warp::FULL, half, lane));
            let from = GlobalPtr::<V4<u32>>::from_addr((high as u64) << 32 | low as u64);
            for chunk in 0..K.div_ceil(4) as u32 {
                let piece = 8 * chunk + warp::lane_id() % 8;
                if K.is_multiple_of(4) || piece < 2 * K as u32 {
                    tensor::cp_async_16(to(fourth, chunk), from.add(piece as u64), bytes(fourth));
                }
            }
        }
    }
}
