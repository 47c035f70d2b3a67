//! The kernel.

use super::params::*;
use crate::common::block::strided;
use crate::common::element::Element;
use crate::simt::{grid, thread, warp};

/// See the module.
///
/// # Safety
/// - The buffers and tables are as [`GatherParams`] and [`AttendParams`](crate::ops::attend::AttendParams) say; page numbers
///   are those of the cache. `k_is_gathered` is 0.
/// - Lists are no wider than `max_places`.
/// - The rope tables cover `last_position`.
/// - Launched with [`GatherParams::dims`].
pub unsafe fn gather<T: Element>(params: GatherParams<T>) {
    grid::wait_for_previous();
    grid::launch_dependents();
    let attend = &params.attend;
    let row = thread::block_idx_y();
    let list = attend.list(row);
    let heads = attend.num_kv_heads;
    let begin = thread::block_idx_x() * PLACES;
    // Lists longer than the launch is shaped for go round again.
    for base in strided(begin, list.len, thread::grid_dim_x() * PLACES) {
        for i in strided(warp::warp_id(), PLACES * heads, THREADS / warp::SIZE) {
            let (place, head) = (base + i / heads.max(1), i % heads.max(1));
            if place < list.len {
                let at = attend.place(&list, place);
                let (page, within) = attend.page(&list, at.token);
                let from = attend.k_pages.add(attend.k_stride.offset(page, within, head));
                let to = (row as u64 * heads as u64 + head as u64) * params.max_places as u64 + place as u64;
                let to = params.gathered.add(to * params.head_dim as u64);
                for pair in strided(warp::lane_id(), params.head_dim / 2, warp::SIZE) {
                    let (x, y) = attend.rope.elements(pair);
                    let values = (
                        from.add(x as u64).load_constant_once().to_f32(),
                        from.add(y as u64).load_constant_once().to_f32(),
                    );
                    let values = attend.rope.rotate(pair, at.rank.min(attend.last_position), values);
                    to.add(x as u64).store(T::from_f32(values.0 * attend.rotated_scale));
                    to.add(y as u64).store(T::from_f32(values.1 * attend.rotated_scale));
                }
            }
        }
    }
}
