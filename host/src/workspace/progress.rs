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

/// What was done.
#[derive(Debug, Clone, Default)]
struct Done {
    /// The number of the batch that each stage was done for.
    stages: [Option<u64>; 6],
    /// The cached selections that decided, by where they lie.
    cached: Option<usize>,
}

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
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner).stages[stage as usize];
        if done == Some(batch.number()) {
            return Ok(());
        }
        let holds = if done.is_some() { "the results of another batch" } else { "no such results" };
        Err(Error::Order { op, needs: stage.operation(), holds })
    }

    /// Checks that there are selected lists of some batch.
    ///
    /// # Errors
    /// [`Error::Order`].
    pub fn expect_selected(&self, op: &'static str) -> Result<()> {
        match self.done.lock().unwrap_or_else(PoisonError::into_inner).stages[Stage::Selected as usize] {
            Some(_) => Ok(()),
            None => Err(Error::Order { op, needs: "select", holds: "no selected lists" }),
        }
    }

    /// What a stage writes is about to be replaced, and what was made from it with it. Selected lists stay: they are read
    /// together with no other buffer.
    pub fn begin(&self, stage: Stage) {
        self.device.note(&self.done, move |done| {
            let lists = Stage::Selected as usize;
            let replaced = if stage == Stage::Selected { lists..lists + 1 } else { stage as usize..lists };
            done.stages[replaced].fill(None);
        });
    }

    /// A stage is done; with `pool` decisions, too.
    pub fn finish(&self, stage: Stage, batch: &Batch) {
        let batch = batch.identity().clone();
        self.device.note(&self.done, move |done| {
            done.stages[stage as usize] = Some(batch.latest());
            if stage == Stage::Pooled {
                done.stages[Stage::Decided as usize] = Some(batch.latest());
            }
        });
    }

    /// Decisions were made by these cached selections.
    pub fn decided_by(&self, cached: Option<usize>) {
        self.device.note(&self.done, move |done| done.cached = cached);
    }

    /// Checks that the cached selections are those that decisions were made by, if they were made by any.
    ///
    /// # Errors
    /// [`Error::Missing`].
    pub fn expect_decided_by(&self, op: &'static str, cached: Option<usize>) -> Result<()> {
        let decided = self.done.lock().unwrap_or_else(PoisonError::into_inner).cached;
        if decided.is_some() && decided != cached {
            return Err(Error::Missing { op, needs: "the cached selections that `pool` was given" });
        }
        Ok(())
    }
}

impl Workspace {
    /// See [`TokenSelect::provide`](crate::TokenSelect::provide).
    pub(crate) fn provide(&mut self, buffer: Buffer, batch: &Batch) -> Result<()> {
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
        if stage == Stage::Pooled {
            self.progress.decided_by(None);
        }
        Ok(())
    }
}
