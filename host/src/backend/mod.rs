//! What a device does: one method an operation, with plan, batch and workspace.
//!
//! [`TokenSelect`](crate::TokenSelect) checks shapes, types, limits and order before it calls a backend, so a backend may
//! rely on what is written here and each rule is checked in one place for all devices.

mod cpu;
#[cfg_attr(not(any(feature = "cuda", feature = "emulator")), allow(dead_code))]
mod gpu;

use crate::batch::Batch;
use crate::error::Result;
use crate::kv::{KvView, KvViewMut};
use crate::plan::Plan;
use crate::selection_cache::SelectionCacheLayer;
use crate::tensor::{TensorView, TensorViewMut};
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

/// Lists of tokens to attend to, one a row.
#[derive(Debug, Clone, Copy)]
pub struct Selection<'a> {
    /// `[max_rows, max_selected]` u32: tokens of each row, in the order of their ranks.
    pub tokens: TensorView<'a>,
    /// `[max_rows]` u32: length of each list.
    pub len: TensorView<'a>,
    /// Ranks where a list is part of a longer one.
    pub ranks: Option<Ranks<'a>>,
}

/// Places of the tokens of partial lists within the whole list, for sequence parallelism.
#[derive(Debug, Clone, Copy)]
pub struct Ranks<'a> {
    /// `[max_rows, max_selected]` u32: rank of each token in the whole list, ascending.
    pub ranks: TensorView<'a>,
    /// `[max_rows]` u32: length `m` of each whole list, at least the row's block length.
    pub total_len: TensorView<'a>,
}

/// Inputs and outputs of attention.
#[derive(Debug)]
pub(crate) struct AttendArgs<'a> {
    /// One layer.
    pub kv: KvView<'a>,
    /// `[num_query_tokens, num_qo_heads, head_dim]`, the configuration's type.
    pub q: TensorView<'a>,
    /// The tokens to attend to; `None` for all.
    pub lists: Option<Selection<'a>>,
    /// `[num_query_tokens, num_qo_heads, head_dim]`, the configuration's type or f32, written.
    pub out: TensorViewMut<'a>,
    /// `[num_query_tokens, num_qo_heads]` f32, written: natural log of the sum of exponentials.
    pub lse: Option<TensorViewMut<'a>>,
}

/// Inputs and outputs of a merge.
#[derive(Debug)]
pub(crate) struct MergeArgs<'a> {
    /// `[num_parts, num_query_tokens, num_qo_heads, head_dim]` f32: outputs over disjoint parts of a list.
    pub parts: TensorView<'a>,
    /// `[num_parts, num_query_tokens, num_qo_heads]` f32: their log-sum-exps.
    pub part_lses: TensorView<'a>,
    /// `[num_query_tokens, num_qo_heads, head_dim]` f16, bf16 or f32, written.
    pub out: TensorViewMut<'a>,
    /// `[num_query_tokens, num_qo_heads]` f32, written.
    pub lse: Option<TensorViewMut<'a>>,
}

/// The backend of a plan's device.
pub(crate) fn of(plan: &Plan) -> &dyn Backend {
    plan.gpu().map_or(&cpu::Cpu, |gpu| gpu)
}

/// The operations of a device. See `docs/definitions.md` for what each computes.
///
/// All of them fail with whatever stops the device.
pub(crate) trait Backend {
    /// Writes the keys and values of each row's block, `[num_query_tokens, num_kv_heads, head_dim]`, into its pages.
    fn append(&self, batch: &Batch, kv: KvViewMut<'_>, k: TensorView<'_>, v: TensorView<'_>) -> Result<()>;

    /// Means of the (rotated) queries of each block, compared with the cached ones; what is to be done for each row.
    /// Writes queries, similarities and actions.
    fn pool(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        q: TensorView<'_>,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()>;

    /// Products of scoring queries and cached ones, where the cached selection is usable. Writes products.
    fn compare(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()>;

    /// What is to be done for each row, by the cosines that the products make. Writes similarities and actions.
    fn decide(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()>;

    /// Scaled dot products of scoring queries and candidate keys of rows that are to be scored. Writes logits and
    /// statistics.
    fn score(&self, plan: &Plan, batch: &Batch, workspace: &mut Workspace, kv: KvView<'_>) -> Result<()>;

    /// Sums of softmax probabilities over heads. Writes votes; with `counts` they are also counted, for the
    /// [`top_k`](Self::top_k) that must follow.
    fn vote(&self, plan: &Plan, batch: &Batch, workspace: &mut Workspace, counts: bool) -> Result<()>;

    /// Max-pool of the votes with the configuration's window. Writes pooled votes.
    fn smooth(&self, plan: &Plan, batch: &Batch, workspace: &mut Workspace) -> Result<()>;

    /// The `top_k` largest votes (pooled ones, where the configuration pools) of every scored row in the total order, windows
    /// added. Writes chosen tokens, lists and their lengths; in `cached`, replaces what scored rows have and counts. With
    /// `votes_are_counted`, these are the votes that [`vote`](Self::vote) has just counted.
    fn top_k(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        cached: Option<SelectionCacheLayer<'_>>,
        votes_are_counted: bool,
    ) -> Result<()>;

    /// All of these: [`append`](Self::append) if there is something to append, [`pool`](Self::pool),
    /// [`score`](Self::score), [`vote`](Self::vote), [`smooth`](Self::smooth) if the configuration asks for it, and
    /// [`top_k`](Self::top_k).
    fn select(
        &self,
        plan: &Plan,
        batch: &Batch,
        workspace: &mut Workspace,
        mut kv: SelectedKv<'_>,
        q: TensorView<'_>,
        mut cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        if let SelectedKv::Append { kv, k, v } = &mut kv {
            self.append(batch, kv.reborrow(), *k, *v)?;
        }
        self.pool(plan, batch, workspace, q, cached.as_mut().map(SelectionCacheLayer::reborrow))?;
        self.score(plan, batch, workspace, kv.view()?)?;
        self.vote(plan, batch, workspace, plan.votes_are_chosen_from())?;
        if !plan.votes_are_chosen_from() {
            self.smooth(plan, batch, workspace)?;
        }
        self.top_k(plan, batch, workspace, cached, plan.votes_are_chosen_from())
    }

    /// Attention over lists of tokens, or over all.
    fn attend(&self, plan: &Plan, batch: &Batch, workspace: &Workspace, args: AttendArgs<'_>) -> Result<()>;

    /// Combines attention over disjoint parts of a list.
    fn merge(&self, args: MergeArgs<'_>) -> Result<()>;
}

impl SelectedKv<'_> {
    /// The layer, to read.
    ///
    /// # Errors
    /// None on a layer whose shape was checked.
    fn view(&self) -> Result<KvView<'_>> {
        match self {
            SelectedKv::Read(kv) => Ok(*kv),
            SelectedKv::Append { kv, .. } => kv.as_view(),
        }
    }
}
