//! What was written into the layers of an owned cache, and which sequences there are: asked before each operation on them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::batch::{Batch, Block, Owned};
use crate::device::{Device, Pending};
use crate::error::{Error, Result};
use crate::sequence::{Revision, SequenceId};

/// What recorded work asks before it is done: which sequences there are, and how many leading tokens of each have keys and
/// values, by layer and index of the sequence; 0 beyond the end.
#[derive(Debug, Clone)]
pub(crate) struct Ledger {
    pub written: Vec<Vec<usize>>,
    /// Each sequence that is alive, its revision and its tokens.
    pub sequences: Vec<Option<(SequenceId, Revision, usize)>>,
}

impl Ledger {
    pub fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
        ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, layer: usize, sequence: usize) -> usize {
        self.written[layer].get(sequence).copied().unwrap_or(0)
    }

    /// Checks that the sequences of a batch are as they were when it was made.
    pub fn check_rows(&self, owned: &Owned) -> Result<()> {
        for (row, &(id, revision, expected)) in owned.rows.iter().enumerate() {
            let found = self.sequences.get(id.index()).copied().flatten();
            let (_, now, got) = found.filter(|found| found.0 == id).ok_or(Error::UnknownSequence(id))?;
            if now.number != revision {
                return Err(Error::StaleBatch { row, id, expected, got, change: now.change });
            }
        }
        Ok(())
    }

    /// Checks a batch of the layer, after what is `pending` of the same work.
    fn check(&self, layer: usize, owned: &Owned, access: Access, pending: &mut Pending) -> Result<()> {
        self.check_rows(owned)?;
        let own = std::ptr::from_ref(self) as usize;
        let written = |pending: &Pending, id: SequenceId| {
            let pending = pending.get(&(own, layer, id.index())).copied().unwrap_or(0);
            self.get(layer, id.index()).max(pending)
        };
        if access == Access::Read {
            for &(id, _, needed) in &owned.rows {
                let written = written(pending, id);
                if written < needed {
                    return Err(Error::Unwritten { layer, id, written, needed });
                }
            }
            return Ok(());
        }
        for &Block { id, begin, end } in &owned.blocks {
            let written = written(pending, id);
            if written < begin {
                return Err(Error::Unwritten { layer, id, written, needed: begin });
            }
            let pending = pending.entry((own, layer, id.index())).or_default();
            *pending = end.max(*pending);
        }
        Ok(())
    }

    /// The entry of a sequence in a layer.
    pub fn entry(layer: &mut Vec<usize>, sequence: usize) -> &mut usize {
        if layer.len() <= sequence {
            layer.resize(sequence + 1, 0);
        }
        &mut layer[sequence]
    }

    /// The blocks are there, but for those that begin where nothing was written yet.
    fn add(&mut self, layer: usize, blocks: &[Block]) {
        for block in blocks {
            let len = Ledger::entry(&mut self.written[layer], block.id.index());
            if *len >= block.begin {
                *len = block.end.max(*len);
            }
        }
    }
}

/// What an operation does with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Writes the block of each row; all tokens before it must be there.
    Append,
    /// Reads all tokens of each row.
    Read,
}

/// What the views of a cache's layers know of the cache.
#[derive(Debug)]
pub(crate) struct Owner {
    pub ledger: Arc<Mutex<Ledger>>,
    /// The cache's, which marks its batches.
    pub allocator: u64,
    pub num_layers: usize,
    /// Whether keys are those before RoPE.
    pub positions_are_reassigned: bool,
}

impl Owner {
    /// # Errors
    /// [`Error::Index`] where there is no such layer.
    pub fn layer(&self, layer: usize) -> Result<OwnedLayer<'_>> {
        let limit = self.num_layers;
        if layer < limit {
            Ok(OwnedLayer { owner: self, layer })
        } else {
            Err(Error::Index { what: "layer", limit, got: layer })
        }
    }

    /// The rows of a batch that the cache made.
    ///
    /// # Errors
    /// [`Error::Missing`].
    pub fn own(&self, op: &'static str, batch: &Batch) -> Result<Owned> {
        let owned = batch.owned();
        if owned.allocator == self.allocator {
            Ok(owned)
        } else {
            Err(Error::Missing { op, needs: "a batch made by this cache's `extend`" })
        }
    }
}

/// The layer of an owned cache whose memory a view shows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OwnedLayer<'a> {
    owner: &'a Owner,
    layer: usize,
}

impl OwnedLayer<'_> {
    /// Checks that the cache made the batch, that its sequences are as they were then, and that the layer has what the operation
    /// builds on; while work is recorded, also each time before it is done.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::UnknownSequence`], [`Error::StaleBatch`], [`Error::Unwritten`].
    pub fn check(&self, device: &Device, op: &'static str, batch: &Batch, access: Access) -> Result<()> {
        let (layer, recorded) = (self.layer, self.owner.own(op, batch)?);
        Ledger::lock(&self.owner.ledger).check(layer, &recorded, access, &mut Pending::new())?;
        let (identity, ledger) = (batch.identity().clone(), Arc::clone(&self.owner.ledger));
        device.check_when_done(move |pending| {
            let owned = identity.latest_owned().unwrap_or_else(|| recorded.clone());
            if owned.allocator != recorded.allocator {
                let needs = "a batch made by the recorded cache's `extend`";
                return Err(Error::Missing { op: "launch", needs });
            }
            Ledger::lock(&ledger).check(layer, &owned, access, pending)
        });
        Ok(())
    }

    /// Checks that positions are those of the cache's keys.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check_positions(&self, are_reassigned: bool) -> Result<()> {
        let expected = self.owner.positions_are_reassigned;
        if are_reassigned == expected {
            return Ok(());
        }
        let name = |reassigned| if reassigned { "reassigned" } else { "native" };
        let rule = format!("{}, as those of the cache", name(expected));
        Err(Error::config("positions", rule, name(are_reassigned)))
    }

    /// The layer has the blocks of a batch; where this is recorded, those of the batch in its slot, each time.
    pub fn wrote(&self, device: &Device, batch: &Batch) {
        let (layer, identity, owned) = (self.layer, batch.identity().clone(), batch.owned());
        device.note(&self.owner.ledger, move |ledger| match identity.latest_owned() {
            Some(latest) => ledger.add(layer, &latest.blocks),
            None => ledger.add(layer, &owned.blocks),
        });
    }
}
