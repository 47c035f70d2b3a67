//! Tensor-core products of a warpgroup (Hopper): four adjacent warps, the first a multiple of four, multiply 64 rows at a time.
//!
//! D += A·B, where A is `[64, 16]` ([`WARPGROUP_ROWS`](crate::limits::WARPGROUP_ROWS)), of which warp `w` of the four holds rows `16 w ..` as the A fragment of
//! [`mma`](super::tensor), or all of it in shared memory ([`Rows`]), B is `[16, 8 N]` in shared memory ([`Columns`]), and each warp
//! has its 16 rows of D as `N` fragments of [`mma`](super::tensor).
//!
//! ```text
//! [fence_writes, a barrier]           B was written by plain stores or cp_async; or: a barrier, fence_writes
//! fence;  mma; mma; ...;  commit      the products run behind the warp's back
//! wait                                now D is there, and A, B and D may be written
//! ```
//! Products with several D may be under way at a time. They end in the order of their [`commit`]s, and each D is [waited](wait) for.
//!
//! *Convergence* of all but [`fence_writes`]: aligned; all threads of the warpgroup, in the same order.

use super::data::Pod;
use super::imp;
use super::shared::Shared;

/// Whether this machine has what is in this file. Where it has not, a call stops the launch. (On a GPU it is known when the kernel is
/// compiled.)
#[inline(always)]
pub fn available() -> bool {
    imp::has_warpgroup_products()
}

/// B, `[16, 8 N]` 16-bit values, in one of four layouts. In pieces of 16 bytes there are eight rows of one column, or, where a product
/// is said to be `BY_ROWS`, eight columns of one row.
///
/// - *Core matrices* of 8 rows and 8 columns, [`CORE_BYTES`](crate::limits::CORE_BYTES) each, their pieces one after the other. That
///   of rows `8 r ..` and columns `8 c ..` begins `row_bytes * r + column_bytes * c` bytes behind `start`.
/// - *Swizzled lines* of 128 bytes, 64 rows of a column (B is 16 of them), eight columns one after the other, the next eight
///   `column_bytes` behind. Or `BY_ROWS`, 64 columns of a row, eight rows one after the other, the next eight `row_bytes` behind,
///   the next 64 columns `column_bytes`. Bits 4 to 6 of every address are those of the place so found, xor its bits 7 to 9: a column
///   of pieces lies in different banks, and copies write whole lines.
#[derive(Clone, Copy)]
pub struct Columns<T> {
    /// The first piece, before any xor. Lines begin at a multiple of 1024.
    pub start: Shared<T>,
    /// From rows 0 to 7 to rows 8 to 15.
    pub row_bytes: u32,
    /// From eight columns to the next eight, or from 64 to the next 64.
    pub column_bytes: u32,
    /// Whether it is made of swizzled lines.
    pub is_swizzled: bool,
}

/// A, `[64, 16]` 16-bit values, in swizzled lines as those of [`Columns`]: 64 columns of a row (A is 16 of them), eight rows one after
/// the other, the next eight `row_bytes` behind.
#[derive(Clone, Copy)]
pub struct Rows<T> {
    /// The first piece, before any xor. Lines begin at a multiple of 1024.
    pub start: Shared<T>,
    /// From eight rows to the next eight.
    pub row_bytes: u32,
}

/// Makes known to products what the calling thread has stored to shared memory, or knows of through a barrier that it has waited at
/// (`fence.proxy.async.shared::cta`). Either who stored calls it, before the barrier, or all threads that multiply, behind it.
#[inline(always)]
pub fn fence_writes() {
    imp::fence_writes_for_products()
}

/// Orders the registers of A and D, written before, in front of the products behind (`wgmma.fence.sync.aligned`).
///
/// # Safety
/// - All threads of the warpgroup call it.
#[inline(always)]
#[track_caller]
pub unsafe fn fence() {
    imp::warpgroup_fence()
}

/// Starts D += A·B for f16 operands, or D = A·B without `ADDS`
/// (`wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16`, and `n96`, `n128`, `n256`). `BY_ROWS`: see [`Columns`].
///
/// # Safety
/// - `N` is 8, 12, 16 or 32.
/// - All threads of the warpgroup call it, with the same `b`, behind a [`fence`].
/// - A, B and D are not touched before [`wait`], but by further products; 16-byte alignment, and strides below 2^18.
/// - B was written behind [`fence_writes`] and a barrier, or behind a barrier and [`fence_writes`].
#[inline(always)]
#[track_caller]
pub unsafe fn mma_f16<T: Pod, const N: usize, const ADDS: bool, const BY_ROWS: bool>(
    d: &mut [[f32; 4]; N],
    a: [u32; 4],
    b: Columns<T>,
) {
    imp::warpgroup_mma_f16::<T, N, ADDS, BY_ROWS>(d, a, b)
}

/// [`mma_f16`] for bf16 operands.
///
/// # Safety
/// - As there.
#[inline(always)]
#[track_caller]
pub unsafe fn mma_bf16<T: Pod, const N: usize, const ADDS: bool, const BY_ROWS: bool>(
    d: &mut [[f32; 4]; N],
    a: [u32; 4],
    b: Columns<T>,
) {
    imp::warpgroup_mma_bf16::<T, N, ADDS, BY_ROWS>(d, a, b)
}

/// [`mma_f16`] with A in shared memory.
///
/// # Safety
/// - As there, with the same `a` in all threads, of which holds what does of `b`.
#[inline(always)]
#[track_caller]
pub unsafe fn mma_from_shared_f16<T: Pod, const N: usize, const ADDS: bool, const BY_ROWS: bool>(
    d: &mut [[f32; 4]; N],
    a: Rows<T>,
    b: Columns<T>,
) {
    imp::warpgroup_mma_from_shared_f16::<T, N, ADDS, BY_ROWS>(d, a, b)
}

/// [`mma_from_shared_f16`] for bf16 operands.
///
/// # Safety
/// - As there.
#[inline(always)]
#[track_caller]
pub unsafe fn mma_from_shared_bf16<T: Pod, const N: usize, const ADDS: bool, const BY_ROWS: bool>(
    d: &mut [[f32; 4]; N],
    a: Rows<T>,
    b: Columns<T>,
) {
    imp::warpgroup_mma_from_shared_bf16::<T, N, ADDS, BY_ROWS>(d, a, b)
}

/// Closes the group of the products started since the last call (`wgmma.commit_group.sync.aligned`). An empty group counts.
///
/// # Safety
/// - All threads of the warpgroup call it.
#[inline(always)]
#[track_caller]
pub unsafe fn commit() {
    imp::warpgroup_commit()
}

/// Waits until no more than the last `PENDING` groups are under way, those of D not among them
/// (`wgmma.wait_group.sync.aligned`).
///
/// # Safety
/// - All threads of the warpgroup call it.
/// - `N` as for [`mma_f16`].
#[inline(always)]
#[track_caller]
pub unsafe fn wait<const N: usize, const PENDING: u32>(d: &mut [[f32; 4]; N]) {
    imp::warpgroup_wait::<N, PENDING>(d)
}

/// Takes registers for each thread of the warpgroup, until it has `REGISTERS` (`setmaxnreg.inc.sync.aligned.u32`); waits until others
/// have [given](give_registers) so many back. The kernel must have [`launch_bounds`](super::thread::launch_bounds).
///
/// # Safety
/// - All threads of the warpgroup call it, and none has called it or [`give_registers`] before.
/// - `REGISTERS` is a multiple of 8, from 24 to 256.
/// - What the warpgroups of the block have then is no more than the block was launched with: for each thread 2^16 by their number,
///   rounded down to a multiple of 8. (Else it waits for ever.)
#[inline(always)]
#[track_caller]
pub unsafe fn take_registers<const REGISTERS: u32>() {
    imp::warpgroup_registers::<REGISTERS, true>()
}

/// Gives registers back, so that each thread of the warpgroup has `REGISTERS` left (`setmaxnreg.dec.sync.aligned.u32`).
///
/// # Safety
/// - As for [`take_registers`].
#[inline(always)]
#[track_caller]
pub unsafe fn give_registers<const REGISTERS: u32>() {
    imp::warpgroup_registers::<REGISTERS, false>()
}
