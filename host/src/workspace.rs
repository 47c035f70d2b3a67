//! The buffers between the operations of a step, all reachable, so that a collective can run between two.

use crate::error::Result;
use crate::plan::Plan;
use crate::tensor::{DType, Tensor};

/// What a step does for a row of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RowAction {
    /// Nothing: the row has no queries.
    Skip = 0,
    /// There are at most `top_k` candidates: every token is selected and nothing is scored.
    Complete = 1,
    /// Score, vote and select.
    Score = 2,
    /// Use the cached selection again.
    Reuse = 3,
}

impl RowAction {
    /// The action with this code, as the `actions` buffer holds it.
    pub fn from_code(code: u32) -> Option<Self> {
        [RowAction::Skip, RowAction::Complete, RowAction::Score, RowAction::Reuse]
            .into_iter()
            .find(|action| *action as u32 == code)
    }
}

/// Buffers of one step, made once and used by every layer and step.
///
/// Rows are rows of the batch; tokens are placed at
/// [`Batch::token_base`](crate::Batch::token_base)` + token`. Entries that the current batch does not use
/// are undefined.
///
/// Tensor parallelism sums `votes` over ranks after `vote`; sequence parallelism combines `stats` over
/// ranks after `score`.
#[derive(Debug)]
pub struct Workspace {
    /// `[max_rows, num_qo_heads, head_dim]` f32, written by `pool`: the scoring queries.
    pub queries: Tensor,
    /// `[max_rows]` f32, written by `pool`: cosine with the cached scoring query; -1 where there is none.
    pub similarities: Tensor,
    /// `[max_rows]` u32, written by `pool`: a [`RowAction`].
    pub actions: Tensor,
    /// `[max_kv_tokens, num_qo_heads]` f32, written by `score` for candidates: scaled dot products.
    pub logits: Tensor,
    /// `[max_rows, num_qo_heads, 2]` f32, written by `score`: the largest logit over the candidates, and the
    /// sum of `exp(logit - largest)`.
    pub stats: Tensor,
    /// `[max_kv_tokens]` f32, written by `vote` for candidates: sums of softmax probabilities over heads.
    pub votes: Tensor,
    /// `[max_kv_tokens]` f32, written by `vote`: votes before the max-pool, where there is one.
    pub(crate) raw_votes: Tensor,
    /// `[max_rows, top_k]` u32, written by `top_k`: chosen tokens, ascending; only for rows that were scored
    /// or reuse a selection. A row with fewer candidates than `top_k` fills its first places.
    pub top_k: Tensor,
    /// `[max_rows, n_init + top_k + n_local + max_block_len]` u32, written by `top_k`: selected tokens.
    pub selected: Tensor,
    /// `[max_rows]` u32, written by `top_k`: length of each selected list.
    pub selected_len: Tensor,
}

impl Workspace {
    /// Allocates the buffers of a plan.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) where a size does not fit the address space.
    pub fn new(plan: &Plan) -> Result<Self> {
        let pooled = plan.config().vote_pool_window > 1;
        let raw_votes = if pooled { plan.votes_shape() } else { [0].into() };
        Ok(Workspace {
            queries: Tensor::zeros(DType::F32, plan.query_shape())?,
            similarities: Tensor::zeros(DType::F32, plan.row_shape())?,
            actions: Tensor::zeros(DType::U32, plan.row_shape())?,
            logits: Tensor::zeros(DType::F32, plan.logits_shape())?,
            stats: Tensor::zeros(DType::F32, plan.stats_shape())?,
            votes: Tensor::zeros(DType::F32, plan.votes_shape())?,
            raw_votes: Tensor::zeros(DType::F32, raw_votes)?,
            top_k: Tensor::zeros(DType::U32, plan.top_k_shape())?,
            selected: Tensor::zeros(DType::U32, plan.selected_shape())?,
            selected_len: Tensor::zeros(DType::U32, plan.row_shape())?,
        })
    }

    /// The actions that `pool` decided on, a [`RowAction`] a row. Rows beyond the current batch are stale.
    ///
    /// # Errors
    /// None on a workspace made by [`new`](Self::new); the type is checked like any tensor's.
    pub fn actions(&self) -> Result<Vec<RowAction>> {
        let codes = self.actions.as_slice::<u32>()?;
        Ok(codes.iter().map(|&code| RowAction::from_code(code).unwrap_or(RowAction::Skip)).collect())
    }

    /// The selected tokens of one row of the current batch, ascending.
    ///
    /// # Errors
    /// [`Error::Index`](crate::Error::Index) where the plan has no such row.
    pub fn selected(&self, row: usize) -> Result<&[u32]> {
        let lengths = self.selected_len.as_slice::<u32>()?;
        let limit = lengths.len();
        let len = lengths.get(row).ok_or(crate::Error::Index { what: "row", limit, got: row })?;
        let width = self.selected.shape().dims()[1];
        Ok(&self.selected.as_slice::<u32>()?[row * width..][..*len as usize])
    }
}
