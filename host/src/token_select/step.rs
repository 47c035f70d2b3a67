//! Whole steps over an owned cache.

use super::{StepInput, StepOutput, TokenSelect};
use crate::backend::SelectedKv;
use crate::batch::Batch;
use crate::cache::PagedKvCache;
use crate::error::Result;
use crate::ledger::Access;
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
        self.plan.expect("step", Operations::ALL)?;
        self.check_step("step", cache, layer, batch, &input.k, &input.v)?;
        self.check_queries(batch, &input.q)?;
        self.check_output(batch, &output)?;
        let parts = cache.layer_mut(layer)?;
        self.check_cached("step", batch, parts.selections.as_ref())?;
        let kv = SelectedKv::Append { kv: parts.kv, k: input.k, v: input.v };
        self.run_select(batch, kv, input.q, parts.selections)?;
        cache.owned_layer(layer)?.wrote(self.device(), batch);
        self.run_attend(batch, cache.layer(layer)?, input.q, Over::Selected, output)
    }

    /// One step of one layer of an owned cache with dense attention: append keys and values, attend to all.
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
        self.check_step("step_dense", cache, layer, batch, &input.k, &input.v)?;
        self.check_queries(batch, &input.q)?;
        self.check_output(batch, &output)?;
        self.backend().append(batch, cache.layer_mut(layer)?.kv, input.k, input.v)?;
        cache.owned_layer(layer)?.wrote(self.device(), batch);
        self.run_attend(batch, cache.layer(layer)?, input.q, Over::All, output)
    }

    /// The first part of a step alone: writes the keys and values of each row's block into a layer of an owned cache. For a
    /// prefix that is attended to elsewhere, or with [`select`](Self::select) and [`attend`](Self::attend) behind it.
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
        self.check_step("fill", cache, layer, batch, &k, &v)?;
        self.backend().append(batch, cache.layer_mut(layer)?.kv, k, v)?;
        cache.owned_layer(layer)?.wrote(self.device(), batch);
        Ok(())
    }

    /// What the batch, the layer and the block's keys and values must be.
    fn check_step(
        &self,
        op: &'static str,
        cache: &mut PagedKvCache,
        layer: usize,
        batch: &Batch,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
    ) -> Result<()> {
        let owner = cache.owned_layer(layer)?;
        owner.check(self.device(), op, batch, Access::Append)?;
        owner.check_positions(self.config().positions.are_reassigned())?;
        self.check_batch(batch)?;
        self.check_append(op, batch, &cache.layer_mut(layer)?.kv, k, v)
    }
}
