//! What blocks of a grid, and launches of a stream, can tell each other.

use super::global::GlobalMut;
use super::{imp, thread};

/// Orders this thread's memory accesses before it against those after it, for the whole device
/// (`fence.acq_rel.gpu`, CUDA's `__threadfence`).
///
/// With a relaxed atomic *after* the fence a thread publishes what it, and through a barrier its block, has written;
/// with an atomic *before* the fence it takes what others published through the same word.
#[inline(always)]
#[track_caller]
pub fn fence() {
    imp::fence()
}

/// True in all threads of the block that is the last of `num_blocks` to call it: everything the other blocks wrote
/// before is then visible to it. `counter` is 0 again afterwards, ready for the next launch.
///
/// ```text
/// sync_threads; thread 0: fence, n = atomic_inc(counter, num_blocks - 1), fence; broadcast n == num_blocks - 1
/// ```
///
/// *Convergence:* aligned; every thread of the block.
///
/// # Safety
/// - Every thread of the block calls it, with the same arguments.
/// - `counter` is 0 before the first block calls, and `num_blocks > 0` blocks call, once each.
#[inline(always)]
#[track_caller]
pub unsafe fn is_last_block(counter: GlobalMut<u32>, num_blocks: u32) -> bool {
    thread::sync_threads();
    let mut last = false;
    if thread::linear_thread_idx() == 0 {
        fence();
        last = counter.atomic_inc(num_blocks - 1) == num_blocks - 1;
        fence();
    }
    thread::sync_threads_or(last)
}

/// Lets the next launch of the stream start before this one ends, if it was launched so
/// (`griddepcontrol.launch_dependents`; nothing below sm_90).
///
/// It says nothing about memory: the dependent launch sees this one's writes only after [`wait_for_previous`].
#[inline(always)]
pub fn launch_dependents() {
    imp::launch_dependents()
}

/// Waits until the launches this one depends on have ended and their writes are visible (`griddepcontrol.wait`;
/// nothing below sm_90, and nothing to wait for where a launch starts only after its predecessor's end).
#[inline(always)]
pub fn wait_for_previous() {
    imp::wait_for_previous()
}
