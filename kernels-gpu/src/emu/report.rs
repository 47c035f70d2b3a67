//! What went wrong, and where.

use std::fmt;
use std::panic::Location;

/// A place in a kernel's source.
pub(crate) type Site = &'static Location<'static>;

/// Which rule a kernel broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// The launch dimensions break a limit; nothing ran.
    Dims,
    /// No lane can run, or the block used up its budget of switches.
    Deadlock,
    /// Lanes took part in a collective in ways that do not fit together.
    Divergence,
    /// Two threads touched the same shared memory, one of them writing, with nothing that orders them.
    Race,
    /// Shared memory was read that nothing had written.
    Uninitialised,
    /// Shared memory was touched while a `cp.async` or a bulk copy to it was under way, or the block ended meanwhile.
    AsyncCopy,
    /// A barrier in shared memory was used before it was made, made twice, or counted more than its phase has.
    MBarrier,
    /// A tensor-core product of a warpgroup without its fences or its commit, or an operand written while it is under way.
    Warpgroup,
    /// A shared-memory access left its array.
    SharedBounds,
    /// A global-memory access left its allocation.
    GlobalBounds,
    /// A write to an input, or a read through the read-only path of what the launch writes.
    ReadOnly,
    /// An access at an address that is no multiple of its size.
    Misaligned,
    /// Two blocks, or two threads of one, touched the same global memory, one of them writing, with nothing that orders
    /// them.
    GlobalRace,
    /// Launches overlap, and this one touched what an unfinished one before it uses, or ended without having waited.
    Overlap,
    /// The kernel panicked.
    Panic,
}

/// A failed launch: the first fault of the lowest block that had one.
#[derive(Clone, Debug)]
pub struct Report {
    /// Name of the kernel, as given to the launch.
    pub kernel: String,
    /// Index of the block.
    pub block: [u32; 3],
    /// Which rule was broken.
    pub kind: Kind,
    /// Warp, lanes, what happened, and the places in the source.
    pub message: String,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:?}] kernel `{}` block {:?}: {}", self.kind, self.kernel, self.block, self.message)
    }
}

impl std::error::Error for Report {}

/// What a faulting lane unwinds with.
pub(crate) struct Fault {
    pub kind: Kind,
    pub message: String,
}

/// The set bits of `mask` as ranges: `0-7,12`.
pub(crate) fn lanes(mask: u32) -> String {
    let mut ranges = Vec::new();
    let mut lane = 0;
    while lane < 32 {
        if mask >> lane & 1 == 0 {
            lane += 1;
            continue;
        }
        let first = lane;
        while lane < 32 && mask >> lane & 1 == 1 {
            lane += 1;
        }
        ranges.push(if lane - first == 1 { first.to_string() } else { format!("{first}-{}", lane - 1) });
    }
    ranges.join(",")
}

#[cfg(test)]
mod tests {
    use super::lanes;

    #[test]
    fn lane_ranges() {
        assert_eq!(lanes(0), "");
        assert_eq!(lanes(1), "0");
        assert_eq!(lanes(u32::MAX), "0-31");
        assert_eq!(lanes(0x8000_10ff), "0-7,12,31");
    }
}
