//! `gather`: the keys of each row's list, rotated at their ranks, one after the other.
//!
//! ```text
//! for each row r, KV head h, place j of the row's list:
//!     gathered[r, h, j] = rotate(key of the token at j, rank of j)
//! ```
//! Prefill reads each key once for every tile of queries; here it is looked up, rotated and rounded once.
//!
//! **Thread mapping.** A warp per place and KV head; a lane per pair of elements that RoPE may rotate together.
//!
//! **Bytes.** Keys once each way: `len * num_kv_heads * head_dim * 4`.

use crate::attention::AttendParams;
use crate::launch::Dims;
use crate::simt::global::GlobalMut;

/// Threads of a block.
const THREADS: u32 = 256;
/// Places of a block.
const PLACES: u32 = 16;

/// Parameters of [`gather`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct GatherParams<T> {
    /// Lists, pages, tables and rotation; what concerns queries and outputs is unused.
    pub attend: AttendParams<T>,
    /// \[num_rows, num_kv_heads, max_places, head_dim\] T, written for the places of each list.
    pub gathered: GlobalMut<T>,
    /// Elements of a head, a multiple of 8.
    pub head_dim: u32,
    /// Places of a list at most.
    pub max_places: u32,
}
const _: () = assert!(size_of::<GatherParams<u16>>() == size_of::<AttendParams<u16>>() + 16);

impl<T> GatherParams<T> {
    /// Blocks for the places of the longest list of each row.
    pub const fn dims(&self) -> Dims {
        let attend = &self.attend;
        Dims {
            grid: [attend.max_len.div_ceil(PLACES), attend.batch.num_rows, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            cluster: 1,
        }
    }
}

/// See the module.
///
/// # Safety
/// - The buffers and tables are as [`GatherParams`] and [`AttendParams`] say; tokens lie in their rows, page numbers in
///   the pool. Keys are not gathered yet.
/// - No list has more than `max_places` places.
/// - The rope tables cover every rank below the length of a whole list.
/// - Launched with [`GatherParams::dims`].
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub unsafe fn gather<T: crate::element::Element>(params: GatherParams<T>) {
    use crate::simt::{grid, thread, warp};

    grid::wait_for_previous();

    grid::launch_dependents();
    let attend = &params.attend;
    let row = thread::block_idx_y();
    let list = attend.list(row);
    let heads = attend.num_kv_heads;
    let begin = thread::block_idx_x() * PLACES;
    // Lists longer than the launch is shaped for go round again.
    let mut base = begin;
    while base < list.len {
        let mut i = warp::warp_id();
        while i < PLACES * heads {
            let (place, head) = (base + i / heads.max(1), i % heads.max(1));
            if place < list.len {
                let at = attend.place(&list, place);
                let (page, within) = attend.page(&list, at.token);
                let from = attend.k_pages.add(attend.k_stride.offset(page, within, head));
                let to = (row as u64 * heads as u64 + head as u64) * params.max_places as u64 + place as u64;
                let to = params.gathered.add(to * params.head_dim as u64);
                let mut pair = warp::lane_id();
                while pair < params.head_dim / 2 {
                    let (x, y) = attend.rope.elements(pair);
                    let values = (
                        from.add(x as u64).load_stream().to_f32(),
                        from.add(y as u64).load_stream().to_f32(),
                    );
                    let values = attend.rope.rotate(pair, at.rank, values);
                    to.add(x as u64).store(T::from_f32(values.0));
                    to.add(y as u64).store(T::from_f32(values.1));
                    pair += warp::SIZE;
                }
            }
            i += THREADS / warp::SIZE;
        }
        base += thread::grid_dim_x() * PLACES;
    }
}
