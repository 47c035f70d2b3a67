//! Tensor-core products of a warpgroup (Hopper): four adjacent warps, the first a multiple of four, multiply 64 rows at a time.
//!
//! D += A·B, where A is `[64, 16]` ([`WARPGROUP_ROWS`](crate::limits::WARPGROUP_ROWS)), of which warp `w` of the four holds rows `16 w ..` as the A fragment of
//! [`mma`](super::tensor), B is `[16, 64]` in shared memory ([`Columns`]), and each warp has its 16 rows of D as eight fragments
//! of [`mma`](super::tensor).
//!
//! ```text
//! [fence_writes, a barrier]           B was written by plain stores
//! fence;  mma; mma; ...;  commit      the products run behind the warp's back
//! wait                                now D is there, and A, B and D may be written
//! ```
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

/// B, `[16, 64]` 16-bit values: core matrices of 8 rows and 8 columns, [`CORE_BYTES`](crate::limits::CORE_BYTES) each. That of rows `8 r ..` and columns `8 c ..` begins
/// `row_bytes * r + column_bytes * c` bytes behind `start`; value `i` of its column `j` is value `8 j + i`.
#[derive(Clone, Copy)]
pub struct Columns<T> {
    /// The first core matrix.
    pub start: Shared<T>,
    /// From rows 0 to 7 to rows 8 to 15.
    pub row_bytes: u32,
    /// From eight columns to the next eight.
    pub column_bytes: u32,
}

/// Makes what the calling thread has stored to shared memory before known to products after a barrier
/// (`fence.proxy.async.shared::cta`).
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

/// Starts D += A·B for f16 operands, or D = A·B without `ADDS` (`wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16`).
///
/// # Safety
/// - All threads of the warpgroup call it, with the same `b`, behind a [`fence`].
/// - A, B and D are not touched before [`wait`], but by further products; 16-byte alignment, and strides below 2^18.
/// - B was written behind [`fence_writes`] and a barrier.
#[inline(always)]
#[track_caller]
pub unsafe fn mma_f16<T: Pod, const ADDS: bool>(d: &mut [[f32; 4]; 8], a: [u32; 4], b: Columns<T>) {
    imp::warpgroup_mma_f16::<T, ADDS>(d, a, b)
}

/// [`mma_f16`] for bf16 operands.
///
/// # Safety
/// - As there.
#[inline(always)]
#[track_caller]
pub unsafe fn mma_bf16<T: Pod, const ADDS: bool>(d: &mut [[f32; 4]; 8], a: [u32; 4], b: Columns<T>) {
    imp::warpgroup_mma_bf16::<T, ADDS>(d, a, b)
}

/// Closes the group of the products started since the last call (`wgmma.commit_group.sync.aligned`).
///
/// # Safety
/// - All threads of the warpgroup call it.
#[inline(always)]
#[track_caller]
pub unsafe fn commit() {
    imp::warpgroup_commit()
}

/// Waits until all committed products have ended, those of D among them (`wgmma.wait_group.sync.aligned 0`).
///
/// # Safety
/// - All threads of the warpgroup call it.
#[inline(always)]
#[track_caller]
pub unsafe fn wait(d: &mut [[f32; 4]; 8]) {
    imp::warpgroup_wait(d)
}
