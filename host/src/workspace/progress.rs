//! Which batch the buffers hold the results of, so that an operation never works on those of another.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Buffer, Workspace};
use crate::batch::Batch;
use crate::device::Device;
use crate::error::{Error, Result};

/// Results that later operations work on, in the order in which they are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Scoring queries.
    Pooled,
    /// Products of these and the cached ones.
    Compared,
    /// Actions.
    Decided,
    /// Logits and statistics.
    Scored,
    /// Votes.
    Voted,
    /// Selected lists.
    Selected,
}

impl Stage {
    fn operation(self) -> &'static str {
        match self {
            Stage::Pooled => "pool",
            Stage::Compared => "compare",
            Stage::Decided => "decide",
            Stage::Scored => "score",
            Stage::Voted => "vote",
            Stage::Selected => "top_k",
        }
    }
}

/// The number of the batch that each stage was done for.
type Done = [Option<u64>; 6];

/// What was done. Recorded work changes it each time it is done.
#[derive(Debug)]
pub(crate) struct Progress {
    device: Device,
    done: Arc<Mutex<Done>>,
}

impl Progress {
    pub(super) fn new(device: &Device) -> Self {
        Progress { device: device.clone(), done: Arc::default() }
    }

    /// Checks that a stage was done for this batch, and not for another one since.
    ///
    /// `pool` decides, too, unless `compare` comes after it: who asks for decisions needs `pool`, or else `decide`.
    ///
    /// # Errors
    /// [`Error::Order`].
    pub fn expect(&self, op: &'static str, stage: Stage, batch: &Batch) -> Result<()> {
        if stage == Stage::Decided {
            self.expect(op, Stage::Pooled, batch)?;
        }
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner)[stage as usize];
        if done == Some(batch.number()) {
            return Ok(());
        }
        let holds = if done.is_some() { "the results of another batch" } else { "no such results" };
        Err(Error::Order { op, needs: stage.operation(), holds })
    }

    /// What a stage writes is about to be replaced, and what was made from it with it. Selected lists stay: they are read
    /// together with no other buffer.
    pub fn begin(&self, stage: Stage) {
        self.device.note(&self.done, move |done| {
            let lists = Stage::Selected as usize;
            let replaced = if stage == Stage::Selected { lists..lists + 1 } else { stage as usize..lists };
            done[replaced].fill(None);
        });
    }

    /// A stage is done; with `pool` decisions, too.
    pub fn finish(&self, stage: Stage, batch: &Batch) {
        let batch = batch.identity().clone();
        self.device.note(&self.done, move |done| {
            done[stage as usize] = Some(batch.latest());
            if stage == Stage::Pooled {
                done[Stage::Decided as usize] = Some(batch.latest());
            }
        });
    }
}

impl Workspace {
    /// Says that a buffer holds results of the caller's own for `batch`, written through [`buffer_mut`](Self::buffer_mut):
    /// votes of a policy of one's own, for [`top_k`](crate::TokenSelect::top_k) to choose from, or lists for
    /// [`attend`](crate::TokenSelect::attend).
    ///
    /// Queries, similarities and actions stand for what `pool` writes, products for what `compare` does, logits and statistics
    /// for what `score` does, the selected tokens and their lengths for what `top_k` does: all of them are to be there.
    ///
    /// # Errors
    /// [`Error::Order`] where the stage before was not done for this batch: products, logits and votes need `pool`, the latter two
    /// also `decide` where there was a `compare`.
    pub fn provide(&mut self, buffer: Buffer, batch: &Batch) -> Result<()> {
        let stage = match buffer {
            Buffer::Queries | Buffer::Similarities | Buffer::Actions => Stage::Pooled,
            Buffer::Products => Stage::Compared,
            Buffer::Logits | Buffer::Stats => Stage::Scored,
            Buffer::Votes => Stage::Voted,
            Buffer::PooledVotes | Buffer::TopK | Buffer::Selected | Buffer::SelectedLen => Stage::Selected,
        };
        batch.expect_latest()?;
        match stage {
            Stage::Compared => self.progress.expect("provide", Stage::Pooled, batch)?,
            Stage::Scored | Stage::Voted => self.progress.expect("provide", Stage::Decided, batch)?,
            _ => {}
        }
        self.progress.begin(stage);
        self.progress.finish(stage, batch);
        Ok(())
    }
}
