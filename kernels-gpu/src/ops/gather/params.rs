//! Parameters and launch dimensions.

use crate::common::rope::UNIT;
use crate::launch::Dims;
use crate::ops::attend::AttendParams;
use crate::simt::global::GlobalMut;

/// Threads of a block.
pub(super) const THREADS: u32 = 128;
/// KV heads of a thread, whose keys are all in flight at a time.
pub(super) const HEADS: u32 = 4;

/// Parameters of [`gather`](super::kernel::gather).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct GatherParams<T> {
    /// Lists, pages, tables and rotation; what concerns queries and outputs is unused.
    pub attend: AttendParams<T>,
    /// \[num_rows, num_kv_heads, max_places, head_dim\] T, written for the places of each list.
    pub gathered: GlobalMut<T>,
    /// Elements of a head, a multiple of 16, at most 2048.
    pub head_dim: u32,
    /// Places of a list at most.
    pub max_places: u32,
}

const _: () = assert!(size_of::<GatherParams<u16>>() == size_of::<AttendParams<u16>>() + 16);

impl<T> GatherParams<T> {
    /// Units of a head.
    pub(super) const fn units(&self) -> u32 {
        self.head_dim.div_ceil(UNIT)
    }

    /// Places of a block.
    pub(super) const fn places(&self) -> u32 {
        match THREADS.checked_div(self.units()) {
            Some(places) if places > 0 => places,
            _ => 1,
        }
    }

    /// Blocks for the places of the longest list of each row, and for each few of its heads.
    pub const fn dims(&self) -> Dims {
        let attend = &self.attend;
        Dims {
            grid: [
                attend.max_len.div_ceil(self.places()),
                attend.batch.num_rows,
                attend.num_kv_heads.div_ceil(HEADS),
            ],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            cluster: 1,
        }
    }
}
