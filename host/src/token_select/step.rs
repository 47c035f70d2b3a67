//! Whole steps over an owned cache.

use super::{StepInput, StepOutput, TokenSelect};
use crate::batch::Batch;
use crate::cache::PagedKvCache;
use crate::error::Result;
use crate::plan::Operations;
use crate::tensor::TensorView;
use crate::token_select::Over;

impl TokenSelect {
    /// One step of one layer of an owned cache: append keys and values, select, attend.
    ///
    /// `batch` comes from [`PagedKvCache::extend`]. Selections are reused if both the configuration and the
    /// cache have a Selection Cache.
    ///
    /// # Errors
    /// A typed error for every wrong shape, type, layer, limit, or stale batch, and [`Error::Unwritten`](crate::Error::Unwritten) where the layer was
    /// left out of an earlier step; then nothing was written. After an error of the device the layer counts as not
    /// written: the same step may be done again.
    pub fn step(
        &mut self,
        cache: &mut PagedKvCache,
        layer: usize,
        batch: &Batch,
        input: StepInput<'_>,
        output: StepOutput<'_>,
    ) -> Result<()> {
        let needed = Operations { append: true, attend: true, ..Operations::selecting(batch) };
        self.plan.expect("step", needed)?;
        self.check_output(batch, &output)?;
        self.append_select_for("step", batch, cache.layer_mut(layer)?, input)?;
        self.run_attend(batch, cache.layer(layer)?, input.q, Over::Selected, output)
    }

    /// One step of one layer of an owned cache with dense attention: append keys and values, attend to all.
    ///
    /// Cached selections of rows that add more than one token are dropped: used again, they would pass over these. Rows of one
    /// token keep theirs, which is right as long as such tokens stay within the local window; after more dense steps than
    /// `n_local`, [`PagedKvCache::selections_mut`] has them cleared.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_dense(
        &mut self,
        cache: &mut PagedKvCache,
        layer: usize,
        batch: &Batch,
        input: StepInput<'_>,
        output: StepOutput<'_>,
    ) -> Result<()> {
        self.plan.expect("step_dense", Operations { append: true, ..Operations::ATTEND })?;
        self.check_queries(batch, &input.q)?;
        self.check_output(batch, &output)?;
        self.append_for("step_dense", batch, cache.layer_mut(layer)?.kv, input.k, input.v)?;
        self.drop_selections(batch, cache.layer_mut(layer)?.selections.as_mut())?;
        self.run_attend(batch, cache.layer(layer)?, input.q, Over::All, output)
    }

    /// The first part of a step alone: writes the keys and values of each row's block into a layer of an owned cache. For a
    /// prefix that is attended to elsewhere, or with [`select`](Self::select) and [`attend`](Self::attend) behind it. Cached selections are
    /// dropped as by [`step_dense`](Self::step_dense).
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn fill(
        &self,
        cache: &mut PagedKvCache,
        layer: usize,
        batch: &Batch,
        k: TensorView<'_>,
        v: TensorView<'_>,
    ) -> Result<()> {
        self.plan.expect("fill", Operations::APPEND)?;
        self.append_for("fill", batch, cache.layer_mut(layer)?.kv, k, v)?;
        self.drop_selections(batch, cache.layer_mut(layer)?.selections.as_mut())
    }
}
