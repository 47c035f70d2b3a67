//! The kernel.

use super::params::*;
use crate::common::element::Element;
use crate::common::rope::UNIT;
use crate::common::words::load_row;
use crate::ops::attend::kernel::{List, Place};
use crate::simt::data::V4;
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::{grid, thread};

/// See the module.
///
/// # Safety
/// - The buffers and tables are as [`GatherParams`] and [`AttendParams`](crate::ops::attend::AttendParams) say, and 16-byte aligned;
///   page numbers are those of the cache. `k_is_gathered` is 0.
/// - Lists are no wider than `max_places`.
/// - The rope tables cover `last_position`.
/// - Launched with [`GatherParams::dims`].
pub unsafe fn gather<T: Element>(params: GatherParams<T>) {
    thread::launch_bounds::<THREADS, 4>();
    grid::wait_for_previous();
    grid::launch_dependents();
    let (attend, units, row) = (&params.attend, params.units().max(1), thread::block_idx_y());
    let (own_place, unit) = (thread::thread_idx_x() / units, thread::thread_idx_x() % units);
    if own_place >= params.places() {
        return;
    }
    let mut place = thread::block_idx_x() * params.places() + own_place;
    // Looked up before it is known how many there are: a look-up is a trip to memory.
    let mut token = attend.early_token(row, place);
    let list = attend.list(row);
    while place < list.len {
        let token_or_place = if attend.selected.addr() != 0 { token.min(list.last_token) } else { place };
        let rank = attend.rank(&list, place).min(attend.last_position);
        let at = Place { token: token_or_place, rank };
        if attend.rope.has_units() {
            gather_unit(&params, &list, place, at, unit);
        } else {
            gather_elements(&params, &list, place, at, unit);
        }
        // Lists longer than the launch is shaped for go round again.
        place = place.saturating_add(thread::grid_dim_x() * params.places());
        token = attend.early_token(row, place);
    }
}

/// The first of the block's KV heads, and how many they are.
fn own_heads<T>(params: &GatherParams<T>) -> (u32, u32) {
    let first = thread::block_idx_z() * HEADS;
    (first, params.attend.num_kv_heads.saturating_sub(first).min(HEADS))
}

/// Where the key of a place lies for the first of the block's heads, and where it is gathered to.
unsafe fn ends<T>(
    params: &GatherParams<T>,
    list: &List,
    place: u32,
    token: u32,
) -> (GlobalPtr<T>, GlobalMut<T>) {
    let (attend, (first, _)) = (&params.attend, own_heads(params));
    let (page, within) = attend.page(list, token);
    let to = (list.row as u64 * attend.num_kv_heads as u64 + first as u64) * params.max_places as u64;
    (
        attend.k_pages.add(attend.k_stride.offset(page, within, first)),
        params.gathered.add((to + place as u64) * params.head_dim as u64),
    )
}

/// One unit of the block's heads at a place: all their keys are asked for before the first is rotated.
unsafe fn gather_unit<T: Element>(params: &GatherParams<T>, list: &List, place: u32, at: Place, unit: u32) {
    let (attend, (_, heads)) = (&params.attend, own_heads(params));
    let (from, to) = ends(params, list, place, at.token);
    let elements = attend.rope.unit_pieces(unit).map(u64::from);
    let mut pieces = [[[0; 4]; 2]; HEADS as usize];
    for head in 0..HEADS {
        if head < heads {
            let from = from.add(head as u64 * attend.k_stride.head);
            pieces[head as usize] = [load_row(from.add(elements[0])), load_row(from.add(elements[1]))];
        }
    }
    let angles = attend.rope.unit_entries(unit, at.rank).angles();
    let head_elements = params.max_places as u64 * params.head_dim as u64;
    for head in 0..HEADS {
        if head < heads {
            let turned =
                attend.rope.turn_unit::<T>(unit, &angles, attend.rotated_scale, pieces[head as usize]);
            for i in 0..2 {
                let to = to.add(head as u64 * head_elements + elements[i]);
                to.cast::<V4<u32>>().store(V4(turned[i]));
            }
        }
    }
}

/// As [`gather_unit`] where pairs do not lie in pieces: eight of the head's pairs, one after the other.
unsafe fn gather_elements<T: Element>(
    params: &GatherParams<T>,
    list: &List,
    place: u32,
    at: Place,
    unit: u32,
) {
    let (attend, (_, heads)) = (&params.attend, own_heads(params));
    let (from, to) = ends(params, list, place, at.token);
    let head_elements = params.max_places as u64 * params.head_dim as u64;
    for head in 0..heads as u64 {
        let (from, to) = (from.add(head * attend.k_stride.head), to.add(head * head_elements));
        for pair in UNIT / 2 * unit..(UNIT / 2 * (unit + 1)).min(params.head_dim / 2) {
            let (x, y) = attend.rope.elements(pair);
            let values = (
                from.add(x as u64).load_constant_once().to_f32(),
                from.add(y as u64).load_constant_once().to_f32(),
            );
            let values = attend.rope.rotate(pair, at.rank, values);
            to.add(x as u64).store(T::from_f32(values.0 * attend.rotated_scale));
            to.add(y as u64).store(T::from_f32(values.1 * attend.rotated_scale));
        }
    }
}
