//! What copies queries, keys and values to shared memory.

use super::*;
use crate::common::layout::absent;
use crate::simt::data::V4;
use crate::simt::global::GlobalPtr;
use crate::simt::shared::Shared;
use crate::simt::{tensor, warp};

/// Where the lane's place of a tile lies: lane `i` of a warp looks up the `i`th of the [`WARP_PLACES`] that the warp copies.
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
            index = send(params, layout, index, progress.item());
        }
        // Who found it reads it, too: it need not be kept in registers on the way.
        layout.item_ring.wait(progress.item());
        let item = Item::load(Item::place(layout, progress.item()));
        layout.item_ring.release(progress.item());
        if item.num_tiles == 0 && values.addr() != 0 {
            // They hear of two items at a time, and still wait for these.
            copy_values::<T, K>(layout, values, progress.tile(u32::MAX));
            values = absent();
        }
        if item.num_rows == 0 {
            break;
        }
        let mut ahead = look_up(params, &item, 0);
        copy_queries::<T, K>(params, layout, &item, progress.queries());
        for tile in 0..item.num_tiles {
            let at = ahead;
            ahead = look_up(params, &item, (tile + 1).min(item.num_tiles - 1));
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
unsafe fn send<T: Element>(params: &AttendParams<T>, layout: &Layout, mut index: u32, stage: Stage) -> u32 {
    let to = Item::place(layout, stage);
    layout.item_ring.claim(stage);
    loop {
        let is_end = index >= params.num_items();
        let found = !is_end && Item::find(params, index, to);
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
unsafe fn look_up<T: Element>(params: &AttendParams<T>, item: &Item, tile: u32) -> Looked {
    if item.num_tiles == 0 {
        return Looked { page: 0, within: 0 };
    }
    let place = TILE * tile + WARP_PLACES * own_warp() + warp::lane_id();
    let token = params.place(&item.list, place).token;
    let (page, within) = params.page(&item.list, token);
    Looked { page, within }
}

/// Rows that there are not are zero.
unsafe fn copy_queries<T: Element, const K: usize>(
    params: &AttendParams<T>,
    layout: &Layout,
    item: &Item,
    stage: Stage,
) {
    let (pitch, last) = ((16 * K) as u32 + PAD, item.num_rows - 1);
    layout.query_ring.claim(stage);
    // As for `Pieces`.
    let own = warp::shuffle_xor(warp::FULL, thread::thread_idx_x(), 0);
    let from = params.q_row(&item.list, item.kv_head, (item.first_row + own).min(last));
    let first = WARP_PLACES * (own / 32) + own % 32 / 8;
    let to = layout.queries.get().add(first * pitch + own % 8 * 8);
    copy_lines::<T, K>(
        from,
        |fourth| if item.first_row + first + 4 * fourth <= last { 16 } else { 0 },
        |fourth, chunk| to.add(4 * fourth * pitch + 64 * chunk).cast(),
    );
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
    let place = TILE * tile + WARP_PLACES * own_warp() + warp::lane_id();
    let offset = params.key_offset(&item.list, item.kv_head, place, || (at.page, at.within));
    layout.key_ring.claim(stage);
    let to = Pieces::of::<K>(layout.keys.get(), stage);
    copy_lines::<T, K>(params.k_pages.add(offset), |_| 16, |fourth, chunk| to.at(fourth, chunk));
    layout.key_ring.arrived(stage).arrive_with_copies();
}

#[inline(always)]
unsafe fn copy_values<T: Element, const K: usize>(layout: &Layout, from: GlobalPtr<T>, stage: Stage) {
    layout.value_ring.claim(stage);
    let to = Pieces::of::<K>(layout.values.get(), stage);
    copy_lines::<T, K>(from, |_| 16, |fourth, chunk| to.at(fourth, chunk));
    layout.value_ring.arrived(stage).arrive_with_copies();
}

/// Where the lane's pieces lie: of every eighth of its warp's places, and of those four places behind these, whose lines are swizzled
/// otherwise. Eight lanes have eight adjacent pieces of one place.
#[derive(Clone, Copy)]
struct Pieces {
    even: Shared<V4<u32>>,
    odd: Shared<V4<u32>>,
}

impl Pieces {
    /// *Convergence:* all 32 lanes.
    unsafe fn of<const K: usize>(stages: Shared<u16>, stage: Stage) -> Pieces {
        // Behind a shuffle, so that no registers hold from copy to copy what follows from it.
        let own = warp::shuffle_xor(warp::FULL, thread::thread_idx_x(), 0);
        let (place, piece) = (own % 32 / 8, own % 8);
        let first = WARP_PLACES * (own / 32) + place;
        let line = stages.byte_add(stage.index * Layout::stage_bytes((16 * K) as u32) + LINE_BYTES * first);
        let even = piece ^ place;
        Pieces { even: line.byte_add(16 * even).cast(), odd: line.byte_add(16 * (even ^ 4)).cast() }
    }

    /// The piece of the `fourth`th place among every fourth of the warp's, of the dimensions `64 chunk ..`.
    fn at(&self, fourth: u32, chunk: u32) -> Shared<V4<u32>> {
        let half = if fourth.is_multiple_of(2) { self.even } else { self.odd };
        half.byte_add(4 * LINE_BYTES * fourth + LINES_BYTES * chunk)
    }
}

/// Starts copies of a warp's 32 heads of queries, keys or values, that of lane `i` from its `from`, eight lanes a line: `bytes` of
/// each piece of the `fourth`th head among every fourth, and zeros for the rest, to `to(fourth, chunk)`.
///
/// *Convergence:* all 32 lanes.
#[inline(always)]
unsafe fn copy_lines<T: Element, const K: usize>(
    from: GlobalPtr<T>,
    bytes: impl Fn(u32) -> u32,
    to: impl Fn(u32, u32) -> Shared<V4<u32>>,
) {
    let halves = [from.addr() as u32, (from.addr() >> 32) as u32];
    // In a loop that is not unrolled, since the compiler does not know the count: few registers are left for addresses.
    let pairs = warp::shuffle_idx(warp::FULL, WARP_PLACES / 8, 0);
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
