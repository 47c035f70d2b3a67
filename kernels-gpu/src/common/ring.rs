//! *Ring*: stages of shared memory that one warp fills by bulk copies and the others empty, round after round.
//!
//! ```text
//! producer, stage after stage:    acquire: wait until it is empty, announce its bytes;  start copies, which arrive at `full`
//! consumer, stage after stage:    wait until it is full;  read;  release
//!
//! stage   0  1  2  3  0  1  2  3  0 ..
//! round   0           1           2
//! parity  0  0  0  0  1  1  1  1  0 ..      of the phases that `full` and `empty` go through, one a round
//! ```
//! A stage has two barriers. `full` counts the producer's one arrival and the announced bytes; `empty` counts one arrival of each
//! consumer warp. The producer runs ahead of the consumers by up to as many stages as there are: those are what is in flight.
//!
//! Both sides go through the stages in the same order, [`Stage::next`] after [`Stage::next`] from [`Stage::FIRST`] on. None may
//! leave one out, or the parities of the two sides differ, and one waits for ever.

use crate::simt::shared::{Carve, Region};

/// The barriers of a ring. What its stages hold is the kernel's own.
#[derive(Clone, Copy)]
pub struct Ring {
    full: Region<u64>,
    empty: Region<u64>,
    num_stages: u32,
}

impl Ring {
    /// Bytes of the barriers of a stage.
    pub const STAGE_BYTES: u32 = 16;

    /// Barriers for `num_stages` stages.
    pub const fn carve(carve: &mut Carve, num_stages: u32) -> Ring {
        Ring { full: carve.array(num_stages, 8), empty: carve.array(num_stages, 8), num_stages }
    }

    /// Stages.
    pub const fn num_stages(&self) -> u32 {
        self.num_stages
    }
}

#[cfg(feature = "kernels")]
pub use ends::Stage;

#[cfg(feature = "kernels")]
mod ends {
    use super::Ring;
    use crate::simt::bulk::MBarrier;
    use crate::simt::warp;

    /// A stage in one round.
    #[derive(Clone, Copy)]
    pub struct Stage {
        /// Which of the ring's stages.
        pub index: u32,
        /// The parity of the round.
        parity: u32,
    }

    impl Stage {
        /// The first stage of the first round.
        pub const FIRST: Stage = Stage { index: 0, parity: 0 };

        /// The stage that is `index`th in a ring of `num_stages`, which is a power of two: what is left of it in a loop is the count.
        pub fn nth(index: u32, num_stages: u32) -> Stage {
            Stage { index: index % num_stages.max(1), parity: index / num_stages.max(1) % 2 }
        }

        /// The stage after it in a ring of `num_stages`.
        pub fn next(self, num_stages: u32) -> Stage {
            if self.index + 1 < num_stages {
                Stage { index: self.index + 1, ..self }
            } else {
                Stage { index: 0, parity: self.parity ^ 1 }
            }
        }
    }

    impl Ring {
        fn empty(&self, index: u32) -> MBarrier {
            MBarrier::at(self.empty.get().add(index))
        }

        fn full(&self, index: u32) -> MBarrier {
            MBarrier::at(self.full.get().add(index))
        }

        /// The barrier at which copies to a stage arrive, and who made them with [`claim`](Self::claim).
        pub fn arrived(&self, stage: Stage) -> MBarrier {
            self.full(stage.index)
        }

        /// Makes the barriers of all stages, for one producer warp and `consumers` consumer warps.
        ///
        /// # Safety
        /// - One thread calls it, once, and then [`publish`](crate::simt::bulk::publish); a barrier of the block follows.
        pub unsafe fn init(&self, consumers: u32) {
            self.init_for(1, consumers)
        }

        /// The same for stages that are full when `arrivals` threads have [arrived](Self::arrived), which [`claim`](Self::claim) them.
        ///
        /// # Safety
        /// - As for [`init`](Self::init).
        pub unsafe fn init_for(&self, arrivals: u32, consumers: u32) {
            for index in 0..self.num_stages {
                self.full(index).init(arrivals);
                self.empty(index).init(consumers);
            }
        }

        /// Producer: waits until the consumers have released the stage.
        ///
        /// *Convergence:* all 32 lanes of a producer warp.
        ///
        /// # Safety
        /// - The barriers are made; this is the warp's next stage.
        #[track_caller]
        pub unsafe fn claim(&self, stage: Stage) {
            self.empty(stage.index).wait(stage.parity ^ 1);
            // A lane with nothing to copy must not fall behind: two phases later the parity is the same again.
            warp::sync_warp(warp::FULL);
        }

        /// Producer: waits until the consumers have released the stage, and announces `bytes` bytes of copies to it.
        ///
        /// *Convergence:* all 32 lanes of the producer warp.
        ///
        /// # Safety
        /// - The barriers are made; this is the producer's next stage.
        /// - Copies of as many bytes follow, which arrive at [`arrived`](Self::arrived).
        #[track_caller]
        pub unsafe fn acquire(&self, stage: Stage, bytes: u32) {
            self.claim(stage);
            if warp::lane_id() == 0 {
                self.full(stage.index).arrive_expecting(bytes);
            }
        }

        /// Consumer: waits until the stage is full.
        ///
        /// # Safety
        /// - The barriers are made; this is the warp's next stage, and it has released the one before.
        #[track_caller]
        pub unsafe fn wait(&self, stage: Stage) {
            self.full(stage.index).wait(stage.parity);
        }

        /// Consumer: says that the warp has read what it wanted of the stage.
        ///
        /// *Convergence:* all 32 lanes of a consumer warp.
        ///
        /// # Safety
        /// - The warp has [waited](Self::wait) for the stage, and no lane reads it afterwards.
        #[track_caller]
        pub unsafe fn release(&self, stage: Stage) {
            warp::sync_warp(warp::FULL);
            if warp::lane_id() == 0 {
                self.empty(stage.index).arrive();
            }
        }

        /// Producer: waits for the stages filled before `end` in the first round, which nobody will read. A block must not end
        /// while copies to it are in flight.
        ///
        /// # Safety
        /// - No stage was filled twice, and no consumer waits for one.
        #[track_caller]
        pub unsafe fn drain(&self, end: Stage) {
            let filled = if end.parity == 0 { end.index } else { self.num_stages };
            for index in 0..filled {
                self.full(index).wait(0);
            }
        }
    }
}
