//! Blocks of a cluster: a barrier over them, and each other's shared memory (compute capability 9.0).
//!
//! The blocks of a cluster run at the same time. [`Dims::cluster`](crate::launch::Dims::cluster) says how many blocks,
//! adjacent along the grid's first axis, are one; the grid's blocks without it are clusters of one.

use core::marker::PhantomData;

use super::data::Pod;
use super::imp;
use super::shared::Shared;

/// Whether the machine has clusters. Where it has none, everything that needs them stops the launch.
pub const AVAILABLE: bool = imp::BULK_COPIES;

/// Index of the block in its cluster (`%cluster_ctarank`).
#[inline(always)]
pub fn block_rank() -> u32 {
    imp::cluster_block_rank()
}

/// Blocks of the cluster (`%cluster_nctarank`).
#[inline(always)]
pub fn num_blocks() -> u32 {
    imp::cluster_num_blocks()
}

/// Waits until all threads of the cluster have arrived, and orders their memory accesses (`barrier.cluster.arrive` and
/// `.wait`). A block must not end while others use its shared memory: the last such access comes before a `sync`.
///
/// *Convergence:* aligned; every thread of every block of the cluster.
///
/// # Safety
/// - Every thread of the cluster calls it the same number of times, the lanes of a warp through the same instruction.
#[inline(always)]
#[track_caller]
pub unsafe fn sync() {
    imp::cluster_sync()
}

/// Waits until all threads of the cluster have arrived, which orders nothing (`barrier.cluster.arrive.relaxed` and
/// `.wait`): before the first access to another block's shared memory it says that the block has begun, and after the last
/// one that the block may end. It costs less than a [`sync`], which waits for memory.
///
/// *Convergence:* aligned; every thread of every block of the cluster.
///
/// # Safety
/// - As for [`sync`].
#[inline(always)]
#[track_caller]
pub unsafe fn meet() {
    imp::cluster_meet()
}

/// A pointer into an array of shared memory of some block of the cluster.
pub struct Remote<T> {
    /// In the block itself: where the bounds are, and what the address is made from.
    own: Shared<T>,
    rank: u32,
    element: PhantomData<fn() -> T>,
}

impl<T> Clone for Remote<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Remote<T> {}

impl<T: Pod> Shared<T> {
    /// The same place in the shared memory of block `rank` of the cluster.
    #[inline(always)]
    pub fn of_block(self, rank: u32) -> Remote<T> {
        Remote { own: self, rank, element: PhantomData }
    }
}

impl<T: Pod> Remote<T> {
    /// Loads one value (`mapa`, `ld.shared::cluster`; up to 16 bytes).
    ///
    /// # Safety
    /// - The value lies inside the array, at a multiple of its size, and `rank` is that of a block of the cluster.
    /// - Every block of the cluster has begun ([`sync`] or [`meet`]), and none ends before another.
    /// - It was written before, and a [`sync`] lies between that and this, and another between this and whatever
    ///   overwrites it or the end of that block.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load(self) -> T {
        imp::load_remote(self.own, self.rank)
    }

    /// Stores one value (`mapa`, `st.shared::cluster`; up to 16 bytes).
    ///
    /// # Safety
    /// - The place lies inside the array, at a multiple of its size, and every block of the cluster has begun and does not end
    ///   before a [`sync`] or [`meet`].
    /// - A [`sync`] lies between this and any other access to the place, before and after.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store(self, value: T) {
        imp::store_remote(self.own, self.rank, value)
    }
}
