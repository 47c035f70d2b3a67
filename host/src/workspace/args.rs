//! The arguments of each operation on a workspace.

use super::Workspace;
use crate::backend::{PoolArgs, ScoreArgs, SmoothArgs, TopKArgs, VoteArgs};
use crate::batch::Batch;
use crate::cache::KvView;
use crate::plan::Plan;
use crate::selection_cache::SelectionCacheLayer;
use crate::tensor::TensorView;

impl Workspace {
    /// Of [`Backend::pool`](crate::backend::Backend::pool).
    pub(crate) fn pool_args<'a>(
        &'a mut self,
        plan: &'a Plan,
        batch: &'a Batch,
        q: TensorView<'a>,
        cached: Option<SelectionCacheLayer<'a>>,
    ) -> PoolArgs<'a> {
        PoolArgs {
            config: plan.config(),
            limits: plan.limits(),
            rope: plan.rope(),
            batch,
            q,
            cached,
            queries: self.queries.view_mut(),
            similarities: self.similarities.view_mut(),
            actions: self.actions.view_mut(),
            scratch: self.scratch.view_mut(),
        }
    }

    /// Of [`Backend::score`](crate::backend::Backend::score).
    pub(crate) fn score_args<'a>(
        &'a mut self,
        plan: &'a Plan,
        batch: &'a Batch,
        kv: KvView<'a>,
    ) -> ScoreArgs<'a> {
        ScoreArgs {
            config: plan.config(),
            limits: plan.limits(),
            batch,
            kv,
            queries: self.queries.view(),
            actions: self.actions.view(),
            logits: self.logits.view_mut(),
            stats: self.stats.view_mut(),
            scratch: self.scratch.view_mut(),
        }
    }

    /// Of [`Backend::vote`](crate::backend::Backend::vote).
    pub(crate) fn vote_args<'a>(
        &'a mut self,
        plan: &'a Plan,
        batch: &'a Batch,
        counts: bool,
    ) -> VoteArgs<'a> {
        VoteArgs {
            config: plan.config(),
            limits: plan.limits(),
            batch,
            actions: self.actions.view(),
            logits: self.logits.view(),
            stats: self.stats.view(),
            votes: self.votes.view_mut(),
            counts,
            scratch: self.scratch.view_mut(),
        }
    }

    /// Of [`Backend::smooth`](crate::backend::Backend::smooth).
    pub(crate) fn smooth_args<'a>(&'a mut self, plan: &'a Plan, batch: &'a Batch) -> SmoothArgs<'a> {
        SmoothArgs {
            config: plan.config(),
            batch,
            actions: self.actions.view(),
            votes: self.votes.view(),
            pooled: self.pooled_votes.view_mut(),
        }
    }

    /// Of [`Backend::top_k`](crate::backend::Backend::top_k): from the pooled votes, where the configuration pools.
    pub(crate) fn top_k_args<'a>(
        &'a mut self,
        plan: &'a Plan,
        batch: &'a Batch,
        cached: Option<SelectionCacheLayer<'a>>,
        votes_are_counted: bool,
    ) -> TopKArgs<'a> {
        let votes = if plan.votes_are_chosen_from() { &self.votes } else { &self.pooled_votes };
        TopKArgs {
            config: plan.config(),
            limits: plan.limits(),
            batch,
            actions: self.actions.view(),
            votes: votes.view(),
            votes_are_counted,
            queries: self.queries.view(),
            cached,
            top_k: self.top_k.view_mut(),
            selected: self.selected.view_mut(),
            selected_len: self.selected_len.view_mut(),
            scratch: self.scratch.view_mut(),
        }
    }
}
