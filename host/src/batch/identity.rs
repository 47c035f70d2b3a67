//! Which contents a batch has: to tell the results of one batch from those of another.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::sequence::SequenceId;

/// A number of its own for every batch that is made; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    number: u64,
    /// Where the batch lies in a slot.
    place: Option<Arc<Place>>,
}

/// The tokens that a row adds to a sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    pub id: SequenceId,
    /// Tokens before it.
    pub begin: usize,
    /// Tokens with it.
    pub end: usize,
}

/// What all batches of one slot share.
#[derive(Debug)]
pub(crate) struct Place {
    occupied: Arc<Mutex<Occupied>>,
    /// What a batch must keep to be used by recorded work.
    needs: Mutex<Needs>,
}

/// The batch that was put in a slot last.
#[derive(Debug, Clone, Default)]
pub(crate) struct Occupied {
    pub number: u64,
    /// Its rows, where a cache made it.
    pub owned: Owned,
}

/// The rows of a batch that a cache made.
#[derive(Debug, Clone, Default)]
pub(crate) struct Owned {
    /// The allocator of the cache; 0 where no cache made the batch.
    pub allocator: u64,
    /// Each row's sequence, its revision, and its tokens when the batch was made.
    pub rows: Vec<(SequenceId, u64, usize)>,
    /// The blocks that are not empty.
    pub blocks: Vec<Block>,
}

/// Limits of the work that was recorded with a slot's batches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Needs {
    /// Places for tokens.
    pub max_kv_tokens: usize,
    /// Pages in the pool.
    pub num_pages: usize,
    /// Entries of the Selection Cache.
    pub num_sequences: usize,
    /// Whether pages are written.
    pub appends: bool,
    /// For parts of sequences: the most tokens that a row selects, and how many of its candidates.
    pub max_selected: usize,
    pub top_k: usize,
}

impl Needs {
    /// None.
    pub const NONE: Needs = Needs {
        max_kv_tokens: usize::MAX,
        num_pages: usize::MAX,
        num_sequences: usize::MAX,
        appends: false,
        max_selected: usize::MAX,
        top_k: usize::MAX,
    };
}

impl Identity {
    /// Unlike any other of the process.
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Identity { number: NEXT.fetch_add(1, Ordering::Relaxed), place: None }
    }

    pub fn number(&self) -> u64 {
        self.number
    }

    /// The same batch in a slot.
    pub(super) fn placed(&self, place: &Arc<Place>) -> Self {
        Identity { number: self.number, place: Some(Arc::clone(place)) }
    }

    /// The number of the batch that recorded work reads when it is done now.
    pub fn latest(&self) -> u64 {
        self.place.as_ref().map_or(self.number, |place| place.occupied().number)
    }

    /// Rows of the batch that recorded work reads when it is done now; `None` without a slot.
    pub fn latest_owned(&self) -> Option<Owned> {
        self.place.as_ref().map(|place| place.occupied().owned.clone())
    }

    /// Checks that no other batch was put in the slot.
    pub fn expect_latest(&self) -> Result<()> {
        if self.latest() == self.number {
            return Ok(());
        }
        Err(Error::Missing { op: "batch", needs: "its slot, in which another batch was put since" })
    }

    /// Recorded work relies on these limits from now on.
    pub fn need(&self, needs: Needs) {
        if let Some(place) = &self.place {
            let mut now = place.needs.lock().unwrap_or_else(PoisonError::into_inner);
            now.max_kv_tokens = now.max_kv_tokens.min(needs.max_kv_tokens);
            now.num_pages = now.num_pages.min(needs.num_pages);
            now.num_sequences = now.num_sequences.min(needs.num_sequences);
            now.appends |= needs.appends;
            now.max_selected = now.max_selected.min(needs.max_selected);
            now.top_k = now.top_k.min(needs.top_k);
        }
    }
}

impl Place {
    /// With nothing in it.
    pub fn new() -> Arc<Self> {
        Arc::new(Place { occupied: Arc::default(), needs: Mutex::new(Needs::NONE) })
    }

    pub fn occupied(&self) -> MutexGuard<'_, Occupied> {
        self.occupied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The batch is there, each time that this is done where it is recorded.
    pub fn occupy(&self, device: &Device, number: u64, owned: Owned) {
        device.note(&self.occupied, move |occupied| {
            *occupied = Occupied { number, owned: owned.clone() };
        });
    }

    /// What was recorded so far.
    pub fn needs(&self) -> Needs {
        *self.needs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
