//! The operations of a selection.

use super::{StepInput, TokenSelect};
use crate::backend::{self, SelectedKv};
use crate::batch::Batch;
use crate::cache::LayerMut;
use crate::error::{Error, Result};
use crate::kv::{KvView, KvViewMut};
use crate::ledger::Access;
use crate::plan::Operations;
use crate::selection_cache::SelectionCacheLayer;
use crate::tensor::TensorView;
use crate::workspace::{RowAction, Stage};

impl TokenSelect {
    /// Writes the keys and values of each row's block into its pages.
    ///
    /// `k` and `v` are `[num_query_tokens, num_kv_heads, head_dim]` of the configuration's type: rotated by
    /// the model for native positions, not rotated for reassigned ones.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Limit`], [`Error::Index`] for a page number beyond the pool, or
    /// [`Error::Table`] for a page that is written and appears twice in the batch.
    pub fn append(
        &self,
        batch: &Batch,
        kv: KvViewMut<'_>,
        k: TensorView<'_>,
        v: TensorView<'_>,
    ) -> Result<()> {
        self.plan.expect("append", Operations::APPEND)?;
        self.append_for("append", batch, kv, k, v)
    }

    /// The append of the method called `op`.
    pub(super) fn append_for(
        &self,
        op: &'static str,
        batch: &Batch,
        kv: KvViewMut<'_>,
        k: TensorView<'_>,
        v: TensorView<'_>,
    ) -> Result<()> {
        self.check_batch(batch)?;
        self.check_append(op, batch, &kv, &k, &v)?;
        let owner = kv.owner;
        self.check_owner(op, batch, owner, Access::Append)?; // last: while work is recorded, it counts the block as written
        self.backend().append(batch, kv, k, v)?;
        self.wrote(batch, owner);
        Ok(())
    }

    /// [`append`](Self::append), then [`select`](Self::select), in fewer launches where blocks are short. With
    /// [`attend`](Self::attend) after it, a step over a borrowed cache.
    ///
    /// # Errors
    /// Those of the two; then nothing was written.
    pub fn append_select(&mut self, batch: &Batch, layer: LayerMut<'_>, input: StepInput<'_>) -> Result<()> {
        self.plan.expect("append_select", Operations { append: true, ..Operations::selecting(batch) })?;
        self.append_select_for("append_select", batch, layer, input)
    }

    /// The append and the selection of the method called `op`.
    pub(super) fn append_select_for(
        &mut self,
        op: &'static str,
        batch: &Batch,
        layer: LayerMut<'_>,
        input: StepInput<'_>,
    ) -> Result<()> {
        let LayerMut { kv, selections: cached } = layer;
        self.check_batch(batch)?;
        self.check_append(op, batch, &kv, &input.k, &input.v)?;
        self.check_queries(batch, &input.q)?;
        self.check_cached_tables(batch, cached.as_ref())?;
        let owner = kv.owner;
        self.check_owner(op, batch, owner, Access::Append)?; // behind what may fail, as in `append_for`
        self.check_named(op, batch, cached.as_ref())?; // batches of a cache are
        self.run_select(batch, SelectedKv::Append { kv, k: input.k, v: input.v }, input.q, cached)?;
        self.wrote(batch, owner);
        Ok(())
    }

    /// [`pool`](Self::pool), [`score`](Self::score), [`vote`](Self::vote) and [`top_k`](Self::top_k): the tokens to attend
    /// to, left in [`Workspace::selected`](crate::Workspace::selected).
    ///
    /// `q` is `[num_query_tokens, num_qo_heads, head_dim]` of the configuration's type; `cached` the layer's
    /// cached selections, `None` to select anew. They belong to sequences, which the batch must name
    /// ([`Batch::with_sequence_indices`]); parts of sequences, and a configuration without a Selection Cache, leave them alone.
    ///
    /// # Errors
    /// Those of the four operations.
    pub fn select(
        &mut self,
        batch: &Batch,
        kv: KvView<'_>,
        q: TensorView<'_>,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        self.plan.expect("select", Operations::selecting(batch))?;
        self.check_batch(batch)?;
        self.check_kv(batch, &kv)?;
        self.check_queries(batch, &q)?;
        self.check_cached("select", batch, cached.as_ref())?;
        self.check_owner("select", batch, kv.owner, Access::Read)?; // last: while work is recorded, it asks before each launch
        self.run_select(batch, SelectedKv::Read(kv), q, cached)
    }

    /// Drops the cached selections of rows that add tokens without selecting by themselves: used again, they would pass over these.
    pub(super) fn drop_selections(
        &self,
        batch: &Batch,
        cached: Option<&mut SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        let Some(cached) = cached else { return Ok(()) };
        batch.growing_sequences().try_for_each(|sequence| cached.forget(self.device(), sequence))
    }

    /// A selection of checked arguments.
    pub(super) fn run_select(
        &mut self,
        batch: &Batch,
        kv: SelectedKv<'_>,
        q: TensorView<'_>,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        let mut cached = cached;
        if batch.is_in_blocks() {
            self.drop_selections(batch, cached.as_mut())?;
        }
        let cached = cached.filter(|_| self.caches(batch));
        let (plan, workspace) = (&self.plan, &mut self.workspace);
        let place = cached.as_ref().map(SelectionCacheLayer::place);
        workspace.progress.begin(Stage::Pooled);
        workspace.progress.begin(Stage::Selected);
        backend::of(plan).select(plan, batch, workspace, kv, q, cached)?;
        workspace.progress.decided_by(place);
        for stage in [Stage::Pooled, Stage::Scored, Stage::Voted, Stage::Selected] {
            // Blocks leave no logits.
            if stage != Stage::Scored || !batch.is_in_blocks() {
                workspace.progress.finish(stage, batch);
            }
        }
        Ok(())
    }

    /// Mean of the queries of each block (after the scoring rotation, for reassigned positions), its cosine
    /// with the cached one, and what is to be done for the row.
    ///
    /// Writes `Queries`, `Similarities` and `Actions` of the workspace. Changes nothing in `cached`, which is as for
    /// [`select`](Self::select).
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Limit`], [`Error::Index`]; [`Error::Missing`] for a batch without sequence
    /// indices where `cached` is given.
    pub fn pool(
        &mut self,
        batch: &Batch,
        q: TensorView<'_>,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        self.plan.expect("pool", Operations::POOL)?;
        self.check_batch(batch)?;
        self.check_queries(batch, &q)?;
        self.check_cached("pool", batch, cached.as_ref())?;
        let cached = cached.filter(|_| self.caches(batch));
        let (plan, workspace) = (&self.plan, &mut self.workspace);
        let place = cached.as_ref().map(SelectionCacheLayer::place);
        workspace.progress.begin(Stage::Pooled);
        backend::of(plan).pool(plan, batch, workspace, q, cached)?;
        workspace.progress.decided_by(place);
        workspace.progress.finish(Stage::Pooled, batch);
        Ok(())
    }

    /// What the cosines are made of, where ranks share the heads of a layer (tensor parallelism): for each row the sums over
    /// this rank's heads of `q̄ · q̄_cached`, `q̄ · q̄` and `q̄_cached · q̄_cached`; zeros where no cached selection is usable. They are
    /// f64, in which no sum of queries leaves its range, and which any collective adds.
    ///
    /// ```text
    /// pool(batch, q, None);  compare(batch, cached);  all-reduce `Products`, sum;  decide(batch, cached)
    /// score(batch, kv);      vote(batch);             all-reduce `Votes`, sum;     top_k(batch, cached)
    /// ```
    /// Every rank then takes the same action, and chooses the same tokens, as one device with all heads would (up to rounding).
    /// Each rank has a Selection Cache of its own, for its own heads.
    ///
    /// Reads `Queries` of the workspace, writes `Products`. Changes nothing in `cached`. Actions are void until
    /// [`decide`](Self::decide).
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Limit`], [`Error::Index`]; [`Error::Order`] without [`pool`](Self::pool) of the
    /// same batch before it.
    pub fn compare(&mut self, batch: &Batch, cached: Option<SelectionCacheLayer<'_>>) -> Result<()> {
        self.plan.expect("compare", Operations::POOL)?;
        self.check_batch(batch)?;
        self.check_cached("compare", batch, cached.as_ref())?;
        let cached = cached.filter(|_| self.caches(batch));
        let (plan, workspace) = (&self.plan, &mut self.workspace);
        workspace.progress.expect("compare", Stage::Pooled, batch)?;
        let place = cached.as_ref().map(SelectionCacheLayer::place);
        workspace.progress.begin(Stage::Compared);
        backend::of(plan).compare(plan, batch, workspace, cached)?;
        workspace.progress.decided_by(place);
        workspace.progress.finish(Stage::Compared, batch);
        Ok(())
    }

    /// What is to be done for each row, as [`pool`](Self::pool) decides, by the products of [`compare`](Self::compare) that were
    /// added over all ranks: their cosine is the first over the roots of the other two. Where there is one rank, `pool` with
    /// `cached` does the same.
    ///
    /// Reads `Products` of the workspace, writes `Similarities` and `Actions`. Changes nothing in `cached`; pass what was passed
    /// to `compare`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Limit`], [`Error::Index`]; [`Error::Order`] without
    /// [`compare`](Self::compare) of the same batch before it.
    pub fn decide(&mut self, batch: &Batch, cached: Option<SelectionCacheLayer<'_>>) -> Result<()> {
        self.plan.expect("decide", Operations::POOL)?;
        self.check_batch(batch)?;
        self.check_cached("decide", batch, cached.as_ref())?;
        let cached = cached.filter(|_| self.caches(batch));
        let (plan, workspace) = (&self.plan, &mut self.workspace);
        workspace.progress.expect("decide", Stage::Compared, batch)?;
        let place = cached.as_ref().map(SelectionCacheLayer::place);
        workspace.progress.expect_decided_by("decide", place)?;
        workspace.progress.begin(Stage::Decided);
        backend::of(plan).decide(plan, batch, workspace, cached)?;
        workspace.progress.finish(Stage::Decided, batch);
        Ok(())
    }

    /// Scaled dot products of the scoring queries with the candidates' keys, and softmax statistics.
    ///
    /// Reads `Queries` and `Actions` of the workspace, writes `Logits` and `Stats`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Limit`], [`Error::Index`]; [`Error::Order`] without
    /// [`pool`](Self::pool) of the same batch before it, or after [`compare`](Self::compare) without [`decide`](Self::decide).
    pub fn score(&mut self, batch: &Batch, kv: KvView<'_>) -> Result<()> {
        self.plan.expect("score", Operations::SCORE)?;
        self.check_batch(batch)?;
        self.check_kv(batch, &kv)?;
        self.workspace.progress.expect("score", Stage::Decided, batch)?;
        self.check_owner("score", batch, kv.owner, Access::Read)?; // last, as in `select`
        let (plan, workspace) = (&self.plan, &mut self.workspace);
        workspace.progress.begin(Stage::Scored);
        backend::of(plan).score(plan, batch, workspace, kv)?;
        workspace.progress.finish(Stage::Scored, batch);
        Ok(())
    }

    /// Votes: softmax probabilities of the candidates, summed over heads. (The max-pool, where there is one, is part of
    /// [`top_k`](Self::top_k): it comes after the votes of tensor-parallel ranks are summed.)
    ///
    /// Reads `Actions`, `Logits` and `Stats` of the workspace, writes `Votes`.
    ///
    /// # Errors
    /// [`Error::Limit`]; [`Error::Order`] without [`score`](Self::score) of the same batch before it.
    pub fn vote(&mut self, batch: &Batch) -> Result<()> {
        self.plan.expect("vote", Operations::VOTE)?;
        self.plan.expect_logits("vote")?;
        self.check_batch(batch)?;
        self.check_order("vote", Stage::Scored, batch)?;
        self.run_vote(batch, false)
    }

    /// Votes of a batch that was scored; if `counts`, they are also counted, for the choice that must follow.
    fn run_vote(&mut self, batch: &Batch, counts: bool) -> Result<()> {
        let (plan, workspace) = (&self.plan, &mut self.workspace);
        workspace.progress.begin(Stage::Voted);
        backend::of(plan).vote(plan, batch, workspace, counts)?;
        workspace.progress.finish(Stage::Voted, batch);
        Ok(())
    }

    /// The `top_k` largest votes of each row, max-pooled if the configuration says so (larger first, equal votes by
    /// smaller index, NaN last), and the selected list: initial tokens, chosen tokens, local tokens and block, ascending.
    ///
    /// Reads `Actions`, `Votes` and `Queries` of the workspace, writes `PooledVotes`, `TopK`, `Selected` and
    /// `SelectedLen`. With `cached`, reused rows take their tokens from it, scored rows replace what it
    /// holds, and every row is counted; pass what was passed to [`pool`](Self::pool) or [`decide`](Self::decide).
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Limit`], [`Error::Index`]; [`Error::Order`] without [`pool`](Self::pool) and
    /// [`vote`](Self::vote) of the same batch before it.
    pub fn top_k(&mut self, batch: &Batch, cached: Option<SelectionCacheLayer<'_>>) -> Result<()> {
        self.plan.expect("top_k", Operations::VOTE)?;
        self.check_batch(batch)?;
        self.check_cached("top_k", batch, cached.as_ref())?;
        self.check_order("top_k", Stage::Voted, batch)?;
        self.check_reuse("top_k", batch, cached.as_ref())?;
        self.run_top_k(batch, cached, false)
    }

    /// [`vote`](Self::vote), then [`top_k`](Self::top_k) of these votes, which takes less than the two one by one.
    ///
    /// # Errors
    /// As the two; then nothing was written.
    pub fn vote_top_k(&mut self, batch: &Batch, cached: Option<SelectionCacheLayer<'_>>) -> Result<()> {
        self.plan.expect("vote_top_k", Operations::VOTE)?;
        self.plan.expect_logits("vote_top_k")?;
        self.check_batch(batch)?;
        self.check_cached("vote_top_k", batch, cached.as_ref())?;
        self.check_order("vote_top_k", Stage::Scored, batch)?;
        self.check_reuse("vote_top_k", batch, cached.as_ref())?; // so that nothing is counted that is not chosen from
        let counts = self.plan.votes_are_chosen_from();
        self.run_vote(batch, counts)?;
        self.run_top_k(batch, cached, counts)
    }

    /// [`top_k`](Self::top_k) of checked arguments; `votes_are_counted` if [`run_vote`](Self::run_vote) has just done so.
    fn run_top_k(
        &mut self,
        batch: &Batch,
        cached: Option<SelectionCacheLayer<'_>>,
        votes_are_counted: bool,
    ) -> Result<()> {
        let cached = cached.filter(|_| self.caches(batch));
        let (plan, workspace) = (&self.plan, &mut self.workspace);
        let backend = backend::of(plan);
        workspace.progress.begin(Stage::Selected);
        if !plan.votes_are_chosen_from() {
            backend.smooth(plan, batch, workspace)?;
        }
        backend.top_k(plan, batch, workspace, cached, votes_are_counted)?;
        workspace.progress.finish(Stage::Selected, batch);
        Ok(())
    }

    /// What choosing needs of the workspace: actions of this batch, and the stage that it begins with.
    fn check_order(&self, op: &'static str, stage: Stage, batch: &Batch) -> Result<()> {
        self.workspace.progress.expect(op, Stage::Decided, batch)?;
        self.workspace.progress.expect(op, stage, batch)
    }

    /// Checks that rows which reuse their selections are given these, as far as that is known without waiting for a device.
    fn check_reuse(
        &self,
        op: &'static str,
        batch: &Batch,
        cached: Option<&SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        let cached = cached.filter(|_| self.caches(batch));
        let place = cached.map(SelectionCacheLayer::place);
        self.workspace.progress.expect_decided_by(op, place)?;
        if cached.is_some() || !self.device().is_cpu() {
            return Ok(());
        }
        if self.workspace.actions()?[..batch.num_rows()].contains(&RowAction::Reuse) {
            return Err(Error::Missing { op, needs: "the cached selections that `pool` was given" });
        }
        Ok(())
    }

    /// Whether selections of this batch may be cached.
    fn caches(&self, batch: &Batch) -> bool {
        self.config().selection_cache.is_some() && batch.has_sequences() && !batch.is_partial()
    }
}
