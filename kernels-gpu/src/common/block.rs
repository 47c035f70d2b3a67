//! What the threads of a block, or the blocks of a cluster, do together: loops dealt to threads, prefix sums, the search of
//! a histogram from the top, and values gathered from every block.

use crate::simt::shared::Shared;
use crate::simt::{thread, warp};

/// `first`, `first + step`, … below `end`: the indices of one of `step` threads. (`Iterator::step_by` would divide to count its
/// steps, which costs a GPU some twenty instructions.) `end + step` is below 2^32.
pub fn strided(first: u32, end: u32, step: u32) -> Strided {
    Strided { next: first, end, step }
}

/// See [`strided`].
#[derive(Clone, Copy, Debug)]
pub struct Strided {
    next: u32,
    end: u32,
    step: u32,
}

impl Iterator for Strided {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let next = self.next;
        self.next = next + self.step;
        (next < self.end).then_some(next)
    }
}

/// The sum of `value` over the threads before this one, and over all, by way of `warps`, a word for each of the block's warps.
///
/// ```text
/// warp:   sums up to each lane by shuffles over 1, 2, 4, 8, 16 lanes;  the last lane writes the warp's
/// block:  lane i of every warp reads the sum of warp i;  a sum over those before the own warp, and over all
/// ```
/// *Convergence:* aligned; every thread of the block.
///
/// # Safety
/// - Every thread of the block, of up to 32 whole warps along the first axis, calls it with the same `warps`, which nobody uses
///   otherwise before the block has met again.
#[track_caller]
pub unsafe fn sums_before(warps: Shared<u32>, value: u32) -> (u32, u32) {
    let (lane, num_warps) = (warp::lane_id(), thread::block_dim_x() / warp::SIZE);
    let mut up_to = value;
    for step in 0..5 {
        let distance = 1 << step;
        let other = warp::shuffle_up(warp::FULL, up_to, distance);
        up_to += if lane >= distance { other } else { 0 };
    }
    thread::sync_threads();
    if lane == warp::SIZE - 1 {
        warps.add(warp::warp_id()).store(up_to);
    }
    thread::sync_threads();
    let sum = if lane < num_warps { warps.add(lane).load() } else { 0 };
    let before = warp::reduce_add(warp::FULL, if lane < warp::warp_id() { sum } else { 0 });
    (before + up_to - value, warp::reduce_add(warp::FULL, sum))
}

/// Bin `i` of the thread's, of a histogram of `bins` bins that is searched from the top: the first thread has the topmost, and
/// each `N` adjacent ones, downwards.
pub fn bin_from_top<const N: usize>(bins: u32, i: usize) -> u32 {
    bins - 1 - thread::thread_idx_x() * N as u32 - i as u32
}

/// Finds the bin at which the sum of a histogram's counts, from the top, reaches `rank`. The thread that has the bin calls `found`
/// with its index among the thread's own, the rank within the bin, and its count; the others do not.
///
/// *Convergence:* aligned; every thread of the block.
///
/// # Safety
/// - As for [`sums_before`]. `counts` are those of the bins that [`bin_from_top`] names.
#[track_caller]
pub unsafe fn search_from_top<const N: usize>(
    warps: Shared<u32>,
    counts: [u32; N],
    rank: u32,
    found: impl Fn(usize, u32, u32),
) {
    let mut sum = 0;
    for i in 0..N {
        sum += counts[i];
    }
    let (mut above, _) = sums_before(warps, sum);
    for i in 0..N {
        if above < rank && rank <= above + counts[i] {
            found(i, rank - above, counts[i]);
        }
        above += counts[i];
    }
}

/// A word of blocks of the cluster: lane `i` has that of block `i`.
#[derive(Clone, Copy)]
pub struct Gathered(u32);

impl Gathered {
    /// Reads the word at `from` in the first `blocks` blocks.
    ///
    /// # Safety
    /// - As for [`Remote::load`](crate::simt::cluster::Remote::load); all lanes of a warp call it, and `blocks` are
    ///   there, at most 32.
    #[track_caller]
    pub unsafe fn load(from: Shared<u32>, blocks: u32) -> Gathered {
        let lane = warp::lane_id();
        Gathered(if lane < blocks { from.of_block(lane).load() } else { 0 })
    }

    /// That of block `block`, which has been read.
    ///
    /// # Safety
    /// - All lanes of the warp call it.
    #[track_caller]
    pub unsafe fn of(self, block: u32) -> u32 {
        warp::shuffle_idx(warp::FULL, self.0, block)
    }

    /// The largest of those that have been read.
    ///
    /// # Safety
    /// - All lanes of the warp call it.
    #[track_caller]
    pub unsafe fn max(self) -> u32 {
        warp::reduce_max(warp::FULL, self.0)
    }

    /// The sum over the blocks before block `block`, which have been read.
    ///
    /// # Safety
    /// - All lanes of the warp call it.
    #[track_caller]
    pub unsafe fn before(self, block: u32) -> u32 {
        warp::reduce_add(warp::FULL, if warp::lane_id() < block { self.0 } else { 0 })
    }
}
