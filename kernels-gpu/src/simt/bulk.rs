//! Bulk copies to shared memory, and the barriers in memory that tell of their arrival (Hopper).
//!
//! An [`MBarrier`] is 8 bytes of shared memory that count. A *phase* ends when as many threads have arrived as
//! [`init`](MBarrier::init) said and all bytes announced for it are there; the next phase then begins, with the same
//! number of arrivals. Phases are told apart by parity: the first has parity 0. What threads did before they arrived, and
//! the bytes of the copies, are visible to those that [`wait`](MBarrier::wait).
//!
//! ```text
//! producer, per stage:   empty.wait(parity ^ 1)          passes at once the first time
//!                        full.arrive_expecting(bytes); copy_to_shared(stage, source, bytes, full)
//! consumer, per stage:   full.wait(parity); read; sync_warp; one lane: empty.arrive()
//! ```
//! None of these is a collective.

use super::data::Pod;
use super::global::GlobalPtr;
use super::imp;
use super::shared::Shared;

/// Whether this machine has what is in this file. Where it has not, a call stops the launch.
pub const AVAILABLE: bool = imp::BULK_COPIES;

/// A barrier in shared memory (an *mbarrier object*).
#[derive(Clone, Copy, Debug)]
pub struct MBarrier {
    word: Shared<u64>,
}

impl MBarrier {
    /// The barrier that lies, or will lie, at `word`.
    #[inline(always)]
    pub fn at(word: Shared<u64>) -> MBarrier {
        MBarrier { word }
    }

    /// Makes the barrier, for `arrivals` arrivals a phase (`mbarrier.init.shared::cta.b64`).
    ///
    /// # Safety
    /// - The word lies inside its array, at a multiple of 8, and holds no barrier yet.
    /// - `1 <= arrivals < 2^20`.
    /// - Before any other use, the same thread calls [`publish`], and a barrier of the block follows.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn init(self, arrivals: u32) {
        imp::mbarrier_init(self.word, arrivals)
    }

    /// Arrives (`mbarrier.arrive.shared::cta.b64`): what this thread did before is visible to those that wait.
    ///
    /// # Safety
    /// - The barrier has been made, and no more than its number of arrivals fall into one phase.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn arrive(self) {
        imp::mbarrier_arrive(self.word)
    }

    /// Arrives once all copies that this thread has started with [`cp_async_16`](super::tensor::cp_async_16) have landed
    /// (`cp.async.mbarrier.arrive.noinc.shared::cta.b64`): they are visible to those that wait. (Nothing is said of its stores.)
    ///
    /// # Safety
    /// - As for [`arrive`](MBarrier::arrive).
    /// - Some thread waits for this phase before the block ends.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn arrive_with_copies(self) {
        imp::mbarrier_arrive_with_copies(self.word)
    }

    /// Announces `bytes` bytes of copies for this phase, then arrives (`mbarrier.arrive.expect_tx.shared::cta.b64`).
    ///
    /// # Safety
    /// - As for [`arrive`](MBarrier::arrive).
    /// - The copies announced for a phase are those made with this barrier in it, before or after; `bytes < 2^20`.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn arrive_expecting(self, bytes: u32) {
        imp::mbarrier_arrive_expecting(self.word, bytes)
    }

    /// Waits until the phase of `parity` has ended (`mbarrier.try_wait.parity.shared::cta.b64`, until it is true). Parity
    /// 1 passes at once in a fresh barrier, as if a phase had ended before the first.
    ///
    /// # Safety
    /// - The barrier has been made.
    /// - The phase waited for is the one under way or the one before it, also when the wait ends: a lane that nothing keeps
    ///   with its warp may fall two phases behind, and then waits for ever.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn wait(self, parity: u32) {
        imp::mbarrier_wait(self.word, parity)
    }
}

/// Makes barriers that this thread has initialised known to the copy engine, and what earlier launches wrote to global
/// memory if it follows [`wait_for_previous`](super::grid::wait_for_previous)
/// (`fence.mbarrier_init.release.cluster`, `fence.proxy.async`).
#[inline(always)]
pub fn publish() {
    imp::publish_mbarriers()
}

/// Starts a copy of `bytes` bytes by the copy engine, which `arrived` counts
/// (`cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes`).
///
/// The bytes are there for the threads that wait for the phase of `arrived` that is under way now.
///
/// # Safety
/// - `bytes` is a multiple of 16, not 0 and below 2^20; `src` and `dst` are multiples of 16.
/// - The bytes at `src` lie inside one allocation of the launch, and nothing writes them before the phase has ended.
/// - The bytes at `dst` lie inside its array. Accesses to them before are ordered before this call (through an
///   [`MBarrier`] or a barrier of the block), and no thread touches them before it has waited.
/// - `arrived` has been made and published; its phase does not end before this call, and some thread of the block waits
///   for it before the block ends.
#[inline(always)]
#[track_caller]
pub unsafe fn copy_to_shared<T: Pod>(dst: Shared<T>, src: GlobalPtr<T>, bytes: u32, arrived: MBarrier) {
    imp::copy_bulk(dst, src.addr(), bytes, arrived.word)
}
