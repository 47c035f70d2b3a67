//! A whole selection: what it is given, and its operations one by one.

use super::{AppendArgs, PoolArgs, ScoreArgs, SmoothArgs, TopKArgs, VoteArgs};
use crate::batch::Batch;
use crate::cache::{KvView, KvViewMut};
use crate::error::Result;
use crate::plan::Plan;
use crate::selection_cache::SelectionCacheLayer;
use crate::tensor::TensorView;
use crate::workspace::Workspace;

/// The layer that is selected from.
#[derive(Debug)]
pub(crate) enum SelectedKv<'a> {
    /// As it is.
    Read(KvView<'a>),
    /// After the blocks' keys and values, `[num_query_tokens, num_kv_heads, head_dim]` of the cache's type, have been
    /// appended.
    Append {
        /// One layer.
        kv: KvViewMut<'a>,
        /// Keys.
        k: TensorView<'a>,
        /// Values.
        v: TensorView<'a>,
    },
}

/// Arguments of [`Backend::select`](super::Backend::select).
#[derive(Debug)]
pub(crate) struct SelectArgs<'a> {
    /// Configuration, limits, angles.
    pub plan: &'a Plan,
    /// Written by each operation in turn.
    pub workspace: &'a mut Workspace,
    /// Rows and page tables.
    pub batch: &'a Batch,
    /// One layer.
    pub kv: SelectedKv<'a>,
    /// As in [`PoolArgs`].
    pub q: TensorView<'a>,
    /// As in [`PoolArgs`] and [`TopKArgs`].
    pub cached: Option<SelectionCacheLayer<'a>>,
}

impl SelectArgs<'_> {
    /// Of the operation that appends, if there is something to append.
    pub fn append(&mut self) -> Option<AppendArgs<'_>> {
        match &mut self.kv {
            SelectedKv::Read(_) => None,
            SelectedKv::Append { kv, k, v } => {
                Some(AppendArgs { batch: self.batch, k: *k, v: *v, kv: kv.reborrow() })
            }
        }
    }

    /// Of the operation that pools.
    pub fn pool(&mut self) -> PoolArgs<'_> {
        let cached = self.cached.as_mut().map(SelectionCacheLayer::reborrow);
        self.workspace.pool_args(self.plan, self.batch, self.q, cached)
    }

    /// Of the operation that scores.
    ///
    /// # Errors
    /// None on a layer whose shape was checked.
    pub fn score(&mut self) -> Result<ScoreArgs<'_>> {
        let kv = match &self.kv {
            SelectedKv::Read(kv) => *kv,
            SelectedKv::Append { kv, .. } => kv.as_view()?,
        };
        Ok(self.workspace.score_args(self.plan, self.batch, kv))
    }

    /// Of the operation that votes.
    pub fn vote(&mut self) -> VoteArgs<'_> {
        self.workspace.vote_args(self.plan, self.batch, self.plan.votes_are_chosen_from())
    }

    /// Of the max-pool of votes, if the configuration asks for it.
    pub fn smooth(&mut self) -> Option<SmoothArgs<'_>> {
        let pools = !self.plan.votes_are_chosen_from();
        pools.then(|| self.workspace.smooth_args(self.plan, self.batch))
    }

    /// Of the operation that chooses.
    pub fn top_k(&mut self) -> TopKArgs<'_> {
        let cached = self.cached.as_mut().map(SelectionCacheLayer::reborrow);
        let counted = self.plan.votes_are_chosen_from();
        self.workspace.top_k_args(self.plan, self.batch, cached, counted)
    }
}
