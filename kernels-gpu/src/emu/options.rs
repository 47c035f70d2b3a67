//! What a launch checks, and in which order its lanes run.

/// In which order lanes run that could all run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Lowest lane of a warp first; a warp runs while it can.
    Forward,
    /// Highest lane of a warp first; a warp runs while it can.
    Reverse,
    /// Any warp, any lane, drawn anew at every switch. The same seed gives the same schedule, whatever
    /// [`Options::threads`] is.
    Random(u64),
}

/// How a launch runs. The default has every check on but those of launches that overlap.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// OS threads that run blocks; 0: as many as the machine has.
    pub threads: usize,
    /// Stack of a lane, in bytes. Pages are taken when first touched, so a large value costs little.
    pub stack_bytes: usize,
    /// The schedule within a block.
    pub order: Order,
    /// With [`Order::Random`]: a lane lets others go first before one in so many shared-memory accesses; 0: never.
    pub preempt: u32,
    /// Report unordered accesses of two threads to the same shared memory.
    pub races: bool,
    /// Report reads of shared memory that nothing has written.
    pub uninitialised: bool,
    /// Report unordered accesses to the same global memory, by two blocks or by two threads of one. Costs about 10 ns
    /// for every 2 bytes that move to or from writable allocations.
    pub global_races: bool,
    /// Launches on one [`Memory`](super::Memory) overlap, as programmatic dependent launch lets them, and keep the rules of
    /// [`overlap`](crate::common::overlap): a thread touches nothing that a launch before may still use until it has called
    /// [`wait_for_previous`](crate::simt::grid::wait_for_previous), nothing that one may write is read as a constant, and every
    /// block waits. Needs `races`. If off, a launch
    /// begins when those before it have ended, as one does behind [`Memory::synchronize`](super::Memory::synchronize). Keeps
    /// 16 bytes for every 4 that kernels touch in writable allocations.
    pub overlap: bool,
    /// The machine has products of warpgroups ([`warpgroup`](crate::simt::warpgroup)).
    pub warpgroups: bool,
    /// Switches of lanes and accesses to memory that a block may use before it is called a livelock.
    pub budget: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            threads: 0,
            stack_bytes: 128 << 10,
            order: Order::Forward,
            preempt: 0,
            races: true,
            uninitialised: true,
            global_races: true,
            overlap: false,
            warpgroups: true,
            budget: 1 << 30,
        }
    }
}

impl Options {
    /// The default, with the schedule drawn from `seed` and lanes interrupted between shared-memory accesses.
    pub fn random(seed: u64) -> Options {
        Options { order: Order::Random(seed), preempt: 8, ..Options::default() }
    }
}
