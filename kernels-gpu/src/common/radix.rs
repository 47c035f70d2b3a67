//! Where the `k`-th largest vote of a row lies: one pass over the votes, with a histogram.
//!
//! A vote becomes a 32-bit key that ascends as votes do, with NaN below everything. Votes are sums of probabilities, so
//! keys are counted in bins of a 64th of an octave from 2^-31 to 2, and whatever is smaller or larger in the bins at the
//! ends. The last block of a row finds the bin in which the `k`-th key lies. [`top_k`](mod@crate::ops::top_k) looks closer, with
//! another such pass where a bin has many keys.
//! Counts are integers, so the result has no order of additions in it, and no table limits how many keys share a bin.

use crate::launch::GpuInfo;
use crate::simt::data::V4;
use crate::simt::global::GlobalMut;
use crate::simt::shared::{Carve, Region};

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Bins.
pub const BINS: u32 = 1 << BINS_LOG2;
const BINS_LOG2: u32 = 11;
/// Bits of a key below those that tell its bin.
pub(crate) const BIN_SHIFT: u32 = 17;
/// The key of 2^-31, where bin 0 would begin if it did not take in all smaller keys, too.
const LOWEST: u32 = 1 << 31 | (127 - 31) << 23;
/// What the length of a share is a multiple of, in candidates: what the warps of a block of [`vote`](mod@crate::ops::vote) have in
/// flight.
const SHARE: u32 = 256;
/// Blocks of an SM.
const BLOCKS_PER_SM: u32 = 2;

/// How far votes are counted: not at all.
pub const NO_COUNTS: u32 = 0;
/// How far votes are counted: all, for a launch that finds the bin of the threshold itself.
pub const COUNTS: u32 = 1;
/// How far votes are counted: all, and the bin of the threshold is found.
pub const BIN: u32 = 2;

/// Whether the launch that chooses among so many tokens of so many rows finds the bin itself, or wants it found.
pub const fn wanted_counts(gpu: &GpuInfo, num_rows: u32, max_tokens: u32) -> u32 {
    if crate::ops::top_k::cluster_dims(gpu, num_rows, max_tokens).is_some() { COUNTS } else { BIN }
}

/// Workspace of the search for a bin.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct RadixTables {
    /// \[num_rows, BINS\] u32, zero before and after a selection.
    pub histogram: GlobalMut<u32>,
    /// \[num_rows, 4\] u32: the smallest and the largest key between which the `k`-th largest lies, its rank (from 1, from
    /// the top) among the keys between them, and how many these are.
    pub state: GlobalMut<V4<u32>>,
    /// \[num_rows\] u32, zero before and after each launch.
    pub counters: GlobalMut<u32>,
}
const _: () = assert!(size_of::<RadixTables>() == 24);

/// Shared memory of a block.
pub(crate) struct Layout {
    histogram: Region<u32>,
    warps: Region<u32>,
    pub bytes: u32,
}

pub(crate) const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout { histogram: carve.array(BINS, 16), warps: carve.array(THREADS / 32, 16), bytes: carve.bytes() }
};

/// Blocks that work on a row of up to `max_tokens` candidates, so that all rows together fill the device.
pub const fn blocks_of_row(gpu: &GpuInfo, num_rows: u32, max_tokens: u32) -> u32 {
    let fair = (gpu.num_sms * BLOCKS_PER_SM).div_ceil(num_rows);
    let useful = max_tokens.div_ceil(SHARE);
    let blocks = if fair < useful { fair } else { useful };
    if blocks == 0 { 1 } else { blocks }
}

#[cfg(feature = "kernels")]
mod histogram;
#[cfg(feature = "kernels")]
pub(crate) use histogram::*;
