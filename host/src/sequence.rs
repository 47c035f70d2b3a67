//! Names of sequences, and what happens to them.

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

/// What was done to a sequence that makes batches stale which were made before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SequenceChange {
    /// It lost the tokens from `to` on.
    Truncated {
        /// Tokens that it kept.
        to: usize,
    },
    /// It was forked: the fork has the page that a block may be written into, too.
    Forked,
    /// It was extended after a fork: its last page, which the two had shared, is now a copy.
    PageCopied,
}

impl fmt::Display for SequenceChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SequenceChange::Truncated { to } => write!(f, "truncated to length {to}"),
            SequenceChange::Forked => write!(f, "forked"),
            SequenceChange::PageCopied => {
                write!(f, "extended into a copy of the page that it shared with a fork")
            }
        }
    }
}

/// How often a sequence was changed so that earlier batches are stale, and how at last.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Revision {
    pub number: u64,
    pub change: SequenceChange,
}

impl Revision {
    /// Of a sequence that nothing has happened to.
    pub const FIRST: Revision = Revision { number: 0, change: SequenceChange::Truncated { to: 0 } };

    pub fn changed(&mut self, change: SequenceChange) {
        *self = Revision { number: self.number + 1, change };
    }
}

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sequence {}", self.to_bits()) // the number that interfaces to other languages hold
    }
}
