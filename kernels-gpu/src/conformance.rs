//! Kernels that exercise every primitive of [`simt`](crate::simt) and write down what came out.
//!
//! `tests/primitives` compares them with plain Rust, in the emulator and on a GPU: the same bits, but for the
//! approximations of [`simt::math`](crate::simt), whose bounds are documented there. No user's build has them: they are
//! behind the feature `conformance`, and in PTX files of their own.

use crate::launch::Dims;
use crate::simt::data::{V2, V4};
use crate::simt::global::{GlobalMut, GlobalPtr};
use crate::simt::shared::{Carve, Region};

pub mod entries;
#[cfg(feature = "kernels")]
mod kernels;
#[cfg(feature = "kernels")]
pub use kernels::*;

/// Parameters of [`indices`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct IndicesParams {
    /// \[threads of the grid, block after block, 16\] u32, written: thread, block, block size and grid size (three words
    /// each), lane, warp, linear index in the block, 0.
    pub out: GlobalMut<u32>,
}
const _: () = assert!(size_of::<IndicesParams>() == 8);

/// Parameters of [`shuffles`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ShufflesParams {
    /// \[32\] u32, read: the value of each lane.
    pub values: GlobalPtr<u32>,
    /// \[4, 32, 32\] u32, written: for idx, xor, up and down, each operand 0 to 31, each lane, the value received.
    pub words: GlobalMut<u32>,
    /// \[2, 32\] f32, written: sum and maximum over the warp of the values as f32.
    pub floats: GlobalMut<f32>,
    /// \[32\] i32, written: the negated value of the lane 7 further round.
    pub signed: GlobalMut<i32>,
    /// \[32\] f64, written: sum over the warp of the values as f64, each with 2^-30 of its lane.
    pub doubles: GlobalMut<f64>,
}
const _: () = assert!(size_of::<ShufflesParams>() == 40);

/// Parameters of [`masked`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MaskedParams {
    /// \[32\] u32, read: the value of each lane.
    pub values: GlobalPtr<u32>,
    /// \[32\] u32, read: the lane whose value each lane asks for; inside its part of the warp.
    pub sources: GlobalPtr<u32>,
    /// \[7, 32\] u32, written: the value received, ballot of odd values, any, all, sum, minimum, maximum.
    pub out: GlobalMut<u32>,
    /// The lanes of `mask` and the others work as two parts, at the same time.
    pub mask: u32,
    /// 0.
    pub reserved: u32,
}
const _: () = assert!(size_of::<MaskedParams>() == 32);

/// Parameters of [`barriers`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct BarriersParams {
    /// \[64\] u32, written: what each thread of the two consumer warps took from the two producer warps, summed.
    pub consumed: GlobalMut<u32>,
    /// \[128, 3\] u32, written: threads of the block with an odd value, whether any value is 5, whether any is 1000.
    pub counts: GlobalMut<u32>,
    /// \[128\] u32, read: the value of each thread.
    pub values: GlobalPtr<u32>,
}
const _: () = assert!(size_of::<BarriersParams>() == 24);

/// Parameters of [`shared`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct SharedParams {
    /// \[64\] u128 as 4 u32, read.
    pub input: GlobalPtr<V4<u32>>,
    /// \[64\] of the same, written: the input, taken through shared memory as 2-, 4-, 8- and 16-byte values.
    pub out: GlobalMut<V4<u32>>,
    /// \[4\] u32, written: sum and maximum by atomics of the first words, and what thread 0 got from an atomic of its
    /// own: before an addition of 5, before a maximum with 3.
    pub atomics: GlobalMut<u32>,
}
const _: () = assert!(size_of::<SharedParams>() == 24);

/// Parameters of [`global`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct GlobalParams {
    /// \[n\] u16, read through all four kinds of load in turn.
    pub halves: GlobalPtr<u16>,
    /// \[n\] f32, read likewise.
    pub words: GlobalPtr<f32>,
    /// \[n\] pairs, read likewise.
    pub pairs: GlobalPtr<V2<f32>>,
    /// \[n\] quads, read likewise.
    pub quads: GlobalPtr<V4<u32>>,
    /// \[n\] u16, copied, plain and evict-first stores in turn.
    pub out_halves: GlobalMut<u16>,
    /// \[n\] f32, copied likewise.
    pub out_words: GlobalMut<f32>,
    /// \[n\] pairs, copied likewise.
    pub out_pairs: GlobalMut<V2<f32>>,
    /// \[n\] quads, copied likewise.
    pub out_quads: GlobalMut<V4<u32>>,
    /// Number of elements.
    pub num_elements: u32,
    /// 0.
    pub reserved: u32,
}
const _: () = assert!(size_of::<GlobalParams>() == 72);

/// Parameters of [`atomics`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct AtomicsParams {
    /// \[6\] u32, zero before: sum of the values, their maximum, exchanged value, number of threads counted by
    /// compare-and-exchange, count modulo 100, flag set by a release store.
    pub words: GlobalMut<u32>,
    /// \[1\] f32, zero before: sum of the values.
    pub float: GlobalMut<f32>,
    /// \[1\] u32, written: a message that the flag announces.
    pub message: GlobalMut<u32>,
    /// \[1\] u32, written: the message as the block after the next received it.
    pub received: GlobalMut<u32>,
    /// \[threads of the grid\] u32, read: the values.
    pub values: GlobalPtr<u32>,
}
const _: () = assert!(size_of::<AtomicsParams>() == 40);

/// Parameters of [`last_block`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct LastBlockParams {
    /// \[num blocks * 64\] u32, read.
    pub values: GlobalPtr<u32>,
    /// \[num blocks * 2\] u32, workspace: the sum of each warp.
    pub partial: GlobalMut<u32>,
    /// \[1\] u32, 0 before and after.
    pub counter: GlobalMut<u32>,
    /// \[1\] u32, written by the last block: the sum of all.
    pub sum: GlobalMut<u32>,
}
const _: () = assert!(size_of::<LastBlockParams>() == 32);

/// Parameters of [`async_copy`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct AsyncCopyParams {
    /// \[4, 32\] quads, read: four groups of one 16-byte copy per lane.
    pub input: GlobalPtr<V4<u32>>,
    /// \[4, 32\] u32, read: bytes of each copy, 0 to 16.
    pub lengths: GlobalPtr<u32>,
    /// \[4, 32\] quads, written: what arrived, read by the lane opposite.
    pub out: GlobalMut<V4<u32>>,
}
const _: () = assert!(size_of::<AsyncCopyParams>() == 24);

/// Rounds of [`bulk_copy`].
pub const BULK_ROUNDS: u32 = 5;

/// Parameters of [`bulk_copy`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct BulkCopyParams {
    /// \[BULK_ROUNDS, 64\] quads, read.
    pub input: GlobalPtr<V4<u32>>,
    /// \[BULK_ROUNDS, 64\] quads, written where the machine has bulk copies: the input, each round in reverse.
    pub out: GlobalMut<V4<u32>>,
    /// \[1\] u32, written: whether it has.
    pub available: GlobalMut<u32>,
}
const _: () = assert!(size_of::<BulkCopyParams>() == 24);

/// Blocks of the clusters of [`cluster`].
pub const CLUSTER_BLOCKS: u32 = 4;

/// Parameters of [`cluster`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ClusterParams {
    /// \[clusters, CLUSTER_BLOCKS, 64\] u32, read.
    pub values: GlobalPtr<u32>,
    /// \[2, clusters, CLUSTER_BLOCKS, 64\] u32, written where the machine has clusters: for each block and thread the sum
    /// over the cluster's blocks of that thread's values, each times its block's rank + 1; then the same of these sums.
    pub out: GlobalMut<u32>,
    /// \[1\] u32, written: whether it has.
    pub available: GlobalMut<u32>,
}
const _: () = assert!(size_of::<ClusterParams>() == 24);

/// Parameters of [`ldmatrix`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct LdMatrixParams {
    /// \[32, 8\] u16 as quads, read: the rows of four 8x8 tiles.
    pub rows: GlobalPtr<V4<u32>>,
    /// \[2, 32\] quads, written: the words of each lane, plain and transposed.
    pub out: GlobalMut<V4<u32>>,
}
const _: () = assert!(size_of::<LdMatrixParams>() == 16);

/// Parameters of [`mma`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MmaParams {
    /// \[16, 16\] elements, row-major, read.
    pub a: GlobalPtr<u16>,
    /// \[16, 8\] elements, row-major, read.
    pub b: GlobalPtr<u16>,
    /// \[16, 8\] f32, row-major, read.
    pub c: GlobalPtr<f32>,
    /// \[16, 8\] f32, row-major, written: `a·b + c`.
    pub d: GlobalMut<f32>,
}
const _: () = assert!(size_of::<MmaParams>() == 32);

/// Parameters of [`warpgroup_mma`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct WarpgroupMmaParams {
    /// \[64, 32\] elements, row-major, read.
    pub a: GlobalPtr<u16>,
    /// \[32, 64\] elements, row-major, read.
    pub b: GlobalPtr<u16>,
    /// \[2, 64, 64\] f32, row-major, written: the product of the first 16 columns of `a` and rows of `b`, and that of all.
    pub d: GlobalMut<f32>,
    /// \[1\] u32, written: whether there are such products.
    pub available: GlobalMut<u32>,
}
const _: () = assert!(size_of::<WarpgroupMmaParams>() == 32);

/// Parameters of [`warpgroup_layouts`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct WarpgroupLayoutsParams {
    /// \[64, 16\] elements, row-major, read.
    pub a: GlobalPtr<u16>,
    /// \[16, 128\] elements, row-major, read.
    pub b: GlobalPtr<u16>,
    /// \[16, 256\] elements, row-major, read.
    pub wide: GlobalPtr<u16>,
    /// \[3, 64, 128\] f32, row-major, written: `a·b` with core matrices by rows, with swizzled lines, and 96 columns of it with swizzled
    /// lines by rows.
    pub d: GlobalMut<f32>,
    /// \[64, 256\] f32, row-major, written: twice `a·wide`, both in swizzled lines.
    pub from_shared: GlobalMut<f32>,
    /// \[1\] u32, written: whether there are such products.
    pub available: GlobalMut<u32>,
}
const _: () = assert!(size_of::<WarpgroupLayoutsParams>() == 48);

/// Parameters of [`math`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MathParams {
    /// \[n\] f32, read.
    pub x: GlobalPtr<f32>,
    /// \[n\] f32, read.
    pub y: GlobalPtr<f32>,
    /// \[n, 8\] f32, written: 2^x, log2 x, 1/x, x·y + x, and the f16 and bf16 pairs (x, y) converted back.
    pub floats: GlobalMut<f32>,
    /// \[n, 4\] u32, written: (x, y) as f16 and as bf16, x as `Element` of each.
    pub packed: GlobalMut<u32>,
    /// \[n, 3\] f64, written: x·y + x, √x and x / √y, every operation in f64.
    pub doubles: GlobalMut<f64>,
    /// \[n\] f32, written: the last of these, rounded.
    pub rounded: GlobalMut<f32>,
    /// Number of values.
    pub num_values: u32,
    /// 0.
    pub reserved: u32,
}
const _: () = assert!(size_of::<MathParams>() == 56);

/// Shared memory of these kernels. A host that cannot run them needs the byte count alone.
#[cfg_attr(not(any(target_arch = "nvptx64", feature = "emulator")), allow(dead_code))]
struct Layout {
    halves: Region<u16>,
    words: Region<u32>,
    pairs: Region<u64>,
    quads: Region<V4<u32>>,
    counters: Region<u32>,
    /// Operand B of a warpgroup's product, 32 rows of 64 columns.
    columns: Region<u16>,
    /// One of 16 rows of 128 columns, in lines of 64 rows, of 64 columns.
    lines: Region<u16>,
    lines_by_rows: Region<u16>,
    /// One of 16 rows of 256 columns, and A, of 64 rows, in such lines.
    wide_lines: Region<u16>,
    rows: Region<u16>,
    bytes: u32,
}

impl Layout {
    const fn new() -> Layout {
        let mut carve = Carve::new();
        Layout {
            counters: carve.array(4, 4),
            halves: carve.array(64 * 8, 16),
            words: carve.array(64 * 4, 16),
            pairs: carve.array(64 * 2, 16),
            quads: carve.array(128, 128),
            columns: carve.array(32 * 64, 128),
            lines: carve.array(128 * 64, 1024),
            lines_by_rows: carve.array(2 * 16 * 64, 1024),
            wide_lines: carve.array(256 * 64, 1024),
            rows: carve.array(64 * 64, 1024),
            bytes: carve.bytes(),
        }
    }
}

const LAYOUT: Layout = Layout::new();

/// Launch of [`indices`]: every axis in use, no two sizes alike.
pub const INDICES_DIMS: Dims = Dims { grid: [2, 3, 4], block: [8, 6, 2], shared_bytes: 0, cluster: 1 };
/// Launch of the kernels that one warp runs: [`shuffles`], [`masked`], [`mma`].
pub const WARP_DIMS: Dims = Dims::linear(1, 32, 0);
/// Launch of the kernels that one warp with shared memory runs: [`async_copy`], [`ldmatrix`].
pub const WARP_SHARED_DIMS: Dims = Dims::linear(1, 32, LAYOUT.bytes);
/// Launch of [`barriers`].
pub const BARRIERS_DIMS: Dims = Dims::linear(1, 128, LAYOUT.bytes);
/// Launch of [`bulk_copy`].
pub const BULK_COPY_DIMS: Dims = Dims::linear(1, 96, LAYOUT.bytes);
/// Launch of [`warpgroup_mma`] and [`warpgroup_layouts`].
pub const WARPGROUP_DIMS: Dims = Dims::linear(1, 128, LAYOUT.bytes);
/// Launch of [`shared`].
pub const SHARED_DIMS: Dims = Dims::linear(1, 64, LAYOUT.bytes);
/// Launch of [`global`] and [`math`].
pub const GRID_DIMS: Dims = Dims::linear(3, 96, 0);
/// Launch of [`atomics`].
pub const ATOMICS_DIMS: Dims = Dims::linear(5, 64, 0);

/// Launch of [`cluster`] over `clusters` clusters.
pub const fn cluster_dims(clusters: u32) -> Dims {
    Dims { cluster: CLUSTER_BLOCKS, ..Dims::linear(clusters * CLUSTER_BLOCKS, 64, LAYOUT.bytes) }
}

/// Launch of [`last_block`] over `num_blocks` blocks.
pub const fn last_block_dims(num_blocks: u32) -> Dims {
    Dims::linear(num_blocks, 64, 0)
}
