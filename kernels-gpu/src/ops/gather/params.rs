//! Parameters and launch dimensions.

use crate::launch::Dims;
use crate::ops::attend::AttendParams;
use crate::simt::global::GlobalMut;

/// Threads of a block.
pub(super) const THREADS: u32 = 256;
/// Places of a block.
pub(super) const PLACES: u32 = 16;

/// Parameters of [`gather`](super::kernel::gather).
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
