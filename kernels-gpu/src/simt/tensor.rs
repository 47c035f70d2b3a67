//! Asynchronous copies to shared memory, and tensor-core tiles.
//!
//! The tiles of `mma.m16n8k16` are spread over the lanes of a warp. With `g = lane / 4` and `t = lane % 4`:
//!
//! | operand | register | holds (row, column) |
//! |---|---|---|
//! | A, 16x16, two values a word | `a[0]`, `a[1]`, `a[2]`, `a[3]` | `(g, 2t..)`, `(g+8, 2t..)`, `(g, 2t+8..)`, `(g+8, 2t+8..)` |
//! | B, 16x8, two values a word | `b[0]`, `b[1]` | `(2t.., g)`, `(2t+8.., g)`, the pair running down a column |
//! | D, 16x8, f32 | `d[0]`, `d[1]`, `d[2]`, `d[3]` | `(g, 2t)`, `(g, 2t+1)`, `(g+8, 2t)`, `(g+8, 2t+1)` |

use super::data::Pod;
use super::global::GlobalPtr;
use super::imp;
use super::shared::Shared;

/// Starts a copy of 16 bytes to shared memory that passes by L1 and registers: `bytes` of them from `src`, zeros for
/// the rest (`cp.async.cg.shared.global`).
///
/// The bytes are there for the calling thread after [`cp_async_wait`], for others after a barrier behind that.
///
/// # Safety
/// - `bytes <= 16`; `src` and `dst` are multiples of 16.
/// - The `bytes` bytes at `src` lie inside one allocation of the launch, and nothing writes them before the wait. With
///   `bytes = 0`, `src` is not read and may be anything.
/// - The 16 bytes at `dst` lie inside its array, and no thread touches them before the wait.
#[inline(always)]
#[track_caller]
pub unsafe fn cp_async_16<T: Pod>(dst: Shared<T>, src: GlobalPtr<T>, bytes: u32) {
    imp::cp_async_16(dst, src.addr(), bytes)
}

/// Closes the group of the copies this thread started since the last call (`cp.async.commit_group`). An empty group
/// counts.
#[inline(always)]
#[track_caller]
pub fn cp_async_commit() {
    imp::cp_async_commit()
}

/// Waits until at most the `PENDING` youngest groups of this thread are under way (`cp.async.wait_group`).
#[inline(always)]
#[track_caller]
pub fn cp_async_wait<const PENDING: u32>() {
    imp::cp_async_wait::<PENDING>()
}

/// Loads four 8x8 tiles of 16-bit values (`ldmatrix.sync.aligned.m8n8.x4.shared.b16`). Lane `8m + r` gives the address
/// of row `r` of tile `m`; lane `4r + c / 2` receives row `r`, columns `c` and `c + 1`, of tile `m` in word `m`.
///
/// With the rows of an A operand (lane's row `lane % 16`, columns `lane / 16 * 8 ..`) the result is the A fragment.
///
/// *Convergence:* aligned; all 32 lanes.
///
/// # Safety
/// - All lanes of the warp call it through the same instruction.
/// - Each address is a multiple of 16, and its 16 bytes lie inside the pointer's array.
/// - They were written before, with a barrier or [`sync_warp`](super::warp::sync_warp) in between if another thread
///   did.
#[inline(always)]
#[track_caller]
pub unsafe fn ldmatrix_x4<T: Pod>(row: Shared<T>) -> [u32; 4] {
    imp::ldmatrix_x4(row, false)
}

/// [`ldmatrix_x4`] with each tile transposed (`.trans`): lane `4c + r / 2` receives column `c`, rows `r` and `r + 1`.
///
/// *Convergence:* aligned; all 32 lanes.
///
/// # Safety
/// - As for [`ldmatrix_x4`].
#[inline(always)]
#[track_caller]
pub unsafe fn ldmatrix_x4_trans<T: Pod>(row: Shared<T>) -> [u32; 4] {
    imp::ldmatrix_x4(row, true)
}

/// D += A·B for f16 operands (`mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32`); layouts in the module's table.
///
/// *Convergence:* aligned; all 32 lanes.
///
/// # Safety
/// - All lanes of the warp call it through the same instruction.
#[inline(always)]
#[track_caller]
pub unsafe fn mma_f16(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    imp::mma_f16(d, a, b)
}

/// D += A·B for bf16 operands (`mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32`); layouts in the module's table.
///
/// *Convergence:* aligned; all 32 lanes.
///
/// # Safety
/// - All lanes of the warp call it through the same instruction.
#[inline(always)]
#[track_caller]
pub unsafe fn mma_bf16(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    imp::mma_bf16(d, a, b)
}
