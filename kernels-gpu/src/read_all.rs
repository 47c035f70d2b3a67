//! `read_all`: reads memory and does nothing else. Benchmarks measure with it how fast a device can be read.
//!
//! **Thread mapping.** Every thread reads 16 bytes of each of eight adjacent pieces of memory at a time, a piece being as
//! long as the grid is wide.
//!
//! **Bytes.** All once.

use crate::launch::Dims;
use crate::simt::data::V4;
use crate::simt::global::{GlobalMut, GlobalPtr};

/// Threads of a block.
const THREADS: u32 = 256;
/// Blocks: more than any device runs at a time.
const BLOCKS: u32 = 2048;

/// Parameters of [`read_all`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ReadAllParams {
    /// \[num_quads\] quads of words, read.
    pub from: GlobalPtr<V4<u32>>,
    /// \[1\] u32, hardly ever written: it keeps the loads from being optimised away.
    pub out: GlobalMut<u32>,
    /// Pieces of 16 bytes.
    pub num_quads: u64,
}
const _: () = assert!(size_of::<ReadAllParams>() == 24);

impl ReadAllParams {
    /// A grid that fills the device.
    pub const fn dims(&self) -> Dims {
        Dims::linear(BLOCKS, THREADS, 0)
    }
}

/// See the module.
///
/// # Safety
/// - The buffers are as [`ReadAllParams`] says.
/// - Launched with [`ReadAllParams::dims`].
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
pub unsafe fn read_all(params: ReadAllParams) {
    use crate::simt::{grid, thread};

    /// Pieces that a thread has under way.
    const BATCH: usize = 8;

    grid::wait_for_previous();

    grid::launch_dependents();
    let step = thread::grid_dim_x() as u64 * THREADS as u64;
    let mut at = thread::block_idx_x() as u64 * THREADS as u64 + thread::thread_idx_x() as u64;
    let mut seen = 0;
    while at < params.num_quads {
        let mut batch = [[0; 4]; BATCH];
        let mut i = 0;
        while i < BATCH {
            let at = at + i as u64 * step;
            if at < params.num_quads {
                batch[i] = params.from.add(at).load_stream().0;
            }
            i += 1;
        }
        let mut i = 0;
        while i < BATCH {
            seen ^= batch[i][0] ^ batch[i][1] ^ batch[i][2] ^ batch[i][3];
            i += 1;
        }
        at += BATCH as u64 * step;
    }
    if seen == 0x9e37_79b9 {
        params.out.store(seen);
    }
}
