//! Who am I, and the barriers of a block.

use super::imp;

/// Index of the thread in its block, first axis (`%tid.x`).
#[inline(always)]
pub fn thread_idx_x() -> u32 {
    imp::thread_idx(0)
}

/// Index of the thread in its block, second axis (`%tid.y`).
#[inline(always)]
pub fn thread_idx_y() -> u32 {
    imp::thread_idx(1)
}

/// Index of the thread in its block, third axis (`%tid.z`).
#[inline(always)]
pub fn thread_idx_z() -> u32 {
    imp::thread_idx(2)
}

/// Index of the block in the grid, first axis (`%ctaid.x`).
#[inline(always)]
pub fn block_idx_x() -> u32 {
    imp::block_idx(0)
}

/// Index of the block in the grid, second axis (`%ctaid.y`).
#[inline(always)]
pub fn block_idx_y() -> u32 {
    imp::block_idx(1)
}

/// Index of the block in the grid, third axis (`%ctaid.z`).
#[inline(always)]
pub fn block_idx_z() -> u32 {
    imp::block_idx(2)
}

/// Threads of a block, first axis (`%ntid.x`).
#[inline(always)]
pub fn block_dim_x() -> u32 {
    imp::block_dim(0)
}

/// Threads of a block, second axis (`%ntid.y`).
#[inline(always)]
pub fn block_dim_y() -> u32 {
    imp::block_dim(1)
}

/// Threads of a block, third axis (`%ntid.z`).
#[inline(always)]
pub fn block_dim_z() -> u32 {
    imp::block_dim(2)
}

/// Blocks of the grid, first axis (`%nctaid.x`).
#[inline(always)]
pub fn grid_dim_x() -> u32 {
    imp::grid_dim(0)
}

/// Blocks of the grid, second axis (`%nctaid.y`).
#[inline(always)]
pub fn grid_dim_y() -> u32 {
    imp::grid_dim(1)
}

/// Blocks of the grid, third axis (`%nctaid.z`).
#[inline(always)]
pub fn grid_dim_z() -> u32 {
    imp::grid_dim(2)
}

/// Index of the thread in its block, all axes taken together, the first running fastest.
#[inline(always)]
pub fn linear_thread_idx() -> u32 {
    thread_idx_x() + block_dim_x() * (thread_idx_y() + block_dim_y() * thread_idx_z())
}

/// Waits until all threads of the block have arrived, and orders their memory accesses (`bar.sync 0`).
///
/// *Convergence:* aligned; every thread of the block, also those with nothing left to do.
///
/// # Safety
/// - Every thread of the block calls it the same number of times, the lanes of a warp through the same instruction.
#[inline(always)]
#[track_caller]
pub unsafe fn sync_threads() {
    imp::sync_threads()
}

/// [`sync_threads`], and returns to all threads whether `predicate` was true for any (`bar.red.popc` on barrier 0).
///
/// *Convergence:* aligned; every thread of the block.
///
/// # Safety
/// - As for [`sync_threads`].
#[inline(always)]
#[track_caller]
pub unsafe fn sync_threads_or(predicate: bool) -> bool {
    imp::sync_threads_count(predicate) != 0
}

/// [`sync_threads`], and returns to all threads for how many `predicate` was true (`bar.red.popc` on barrier 0).
///
/// *Convergence:* aligned; every thread of the block.
///
/// # Safety
/// - As for [`sync_threads`].
#[inline(always)]
#[track_caller]
pub unsafe fn sync_threads_count(predicate: bool) -> u32 {
    imp::sync_threads_count(predicate)
}

/// Waits at barrier `id` until `threads` threads have arrived there, waiting or not, and orders the memory accesses of
/// those that arrived before those of the ones that waited (`bar.sync id, threads`).
///
/// *Convergence:* aligned; all lanes of each warp that takes part.
///
/// # Safety
/// - `1 <= id < 16`: barrier 0 belongs to [`sync_threads`].
/// - `threads` is a multiple of 32, and the same for all that meet at this phase of the barrier.
/// - No thread arrives twice in one phase.
#[inline(always)]
#[track_caller]
pub unsafe fn sync_named(id: u32, threads: u32) {
    imp::sync_named(id, threads)
}

/// [`sync_named`] of threads that all wait, and returns to them whether `predicate` was true for any (`bar.red.popc id, threads`).
///
/// *Convergence:* aligned; all lanes of each warp that takes part.
///
/// # Safety
/// - As for [`sync_named`].
#[inline(always)]
#[track_caller]
pub unsafe fn sync_named_or(id: u32, threads: u32, predicate: bool) -> bool {
    imp::sync_named_count(id, threads, predicate) != 0
}

/// Arrives at barrier `id` without waiting (`bar.arrive id, threads`): what came before is visible to those that wait
/// there with [`sync_named`].
///
/// *Convergence:* aligned; all lanes of each warp that takes part.
///
/// # Safety
/// - As for [`sync_named`].
/// - At least one warp waits at this phase with [`sync_named`].
#[inline(always)]
#[track_caller]
pub unsafe fn arrive_named(id: u32, threads: u32) {
    imp::arrive_named(id, threads)
}

/// Tells the assembler that blocks of this kernel have `THREADS` threads, and that an SM is to run at least `BLOCKS` of
/// them at a time: it fits registers to that (`.maxntid`, `.minnctapersm`, which `cargo ptx` puts at the head of the
/// entry). Without effect in the emulator.
#[inline(always)]
pub fn launch_bounds<const THREADS: u32, const BLOCKS: u32>() {
    imp::launch_bounds::<THREADS, BLOCKS>()
}
