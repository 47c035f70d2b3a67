//! Names of sequences.

use std::fmt;

/// Names a sequence of one [`PageAllocator`](crate::PageAllocator). An identifier is never used twice, by no allocator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl SequenceId {
    /// Place of the sequence among those alive, below the allocator's `max_sequences`; free places are used
    /// again. The row of per-sequence tables such as the [`SelectionCache`](crate::SelectionCache).
    pub fn index(self) -> usize {
        self.index as usize
    }

    /// The identifier as one number, for interfaces to other languages.
    pub fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// The identifier with this number. One that no sequence has is unknown to every allocator, like a freed one.
    pub fn from_bits(bits: u64) -> Self {
        SequenceId { index: bits as u32, generation: (bits >> 32) as u32 }
    }
}

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sequence {}.{}", self.index, self.generation)
    }
}
