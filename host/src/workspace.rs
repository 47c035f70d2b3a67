//! The buffers between the operations of a step, all reachable, so that a collective can run between two.

mod args;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::tensor::{DType, Shape, Tensor};

/// What a step does for a row of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RowAction {
    /// Nothing: the row has no queries, or no tokens.
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
    /// `[places, num_qo_heads]` f32, written by `score` for candidates: scaled dot products, in an order of the device's own
    /// ([`TokenSelect::logit_index`](crate::TokenSelect::logit_index)).
    pub logits: Tensor,
    /// `[max_rows, num_qo_heads, 2]` f32, written by `score`: the largest logit over the candidates, and the
    /// sum of `exp(logit - largest)`.
    pub stats: Tensor,
    /// `[max_kv_tokens]` f32, written by `vote` for candidates: sums of softmax probabilities over heads.
    pub votes: Tensor,
    /// `[max_kv_tokens]` f32, written by `top_k` where `vote_pool_window` is above 1 (else `[0]`): max-pooled votes.
    pub pooled_votes: Tensor,
    /// `[max_rows, top_k]` u32, written by `top_k`: chosen tokens, ascending; only for rows that were scored
    /// or reuse a selection. A row with fewer candidates than `top_k` fills its first places.
    pub top_k: Tensor,
    /// `[max_rows, n_init + top_k + n_local + max_block_len]` u32, written by `top_k`: selected tokens.
    pub selected: Tensor,
    /// `[max_rows]` u32, written by `top_k`: length of each selected list.
    pub selected_len: Tensor,
    /// What the device's kernels use among themselves.
    pub(crate) scratch: Tensor,
}

impl Workspace {
    /// Allocates the buffers of a plan where `device` works.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) where a size does not fit the address space.
    pub fn new(device: &Device, plan: &Plan) -> Result<Self> {
        let make = |dtype, shape| Tensor::zeros_on(device, dtype, shape);
        let [
            queries,
            similarities,
            actions,
            logits,
            stats,
            votes,
            pooled_votes,
            top_k,
            selected,
            selected_len,
            scratch,
        ] = Workspace::each_buffer(device, plan, make)?;
        Ok(Workspace {
            queries,
            similarities,
            actions,
            logits,
            stats,
            votes,
            pooled_votes,
            top_k,
            selected,
            selected_len,
            scratch,
        })
    }

    /// Bytes of the buffers that [`new`](Self::new) allocates. Allocates nothing.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) where they do not fit the address space.
    pub fn num_bytes(device: &Device, plan: &Plan) -> Result<usize> {
        let sizes = Workspace::each_buffer(device, plan, |dtype, shape| {
            let bytes = shape.checked_len().and_then(|len| len.checked_mul(dtype.size()));
            bytes.ok_or_else(|| Error::config("shape", "at most isize::MAX bytes in all", shape))
        })?;
        let sum = sizes.iter().try_fold(0usize, |sum, &bytes| sum.checked_add(bytes));
        sum.ok_or_else(|| {
            Error::config("limits", "of buffers that fit the address space", plan.logits_shape())
        })
    }

    /// Calls `make` with type and shape of each buffer, in the order of the fields.
    fn each_buffer<T>(
        device: &Device,
        plan: &Plan,
        mut make: impl FnMut(DType, Shape) -> Result<T>,
    ) -> Result<[T; 11]> {
        let scratch = device.backend().scratch_words(plan.config(), plan.limits());
        Ok([
            make(DType::F32, plan.query_shape())?,
            make(DType::F32, plan.row_shape())?,
            make(DType::U32, plan.row_shape())?,
            make(DType::F32, plan.logits_shape())?,
            make(DType::F32, plan.stats_shape())?,
            make(DType::F32, plan.votes_shape())?,
            make(DType::F32, plan.pooled_votes_shape())?,
            make(DType::U32, plan.top_k_shape())?,
            make(DType::U32, plan.selected_shape())?,
            make(DType::U32, plan.row_shape())?,
            make(DType::U32, [scratch].into())?,
        ])
    }

    /// Checks that the buffers, which are open to collectives, are still of the plan's types and shapes.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::DType`](crate::Error::DType).
    pub fn check(&self, plan: &Plan) -> Result<()> {
        let expect = |tensor: &Tensor, what, dtype, shape: Shape| tensor.view().expect(what, &[dtype], shape);
        expect(&self.queries, "workspace.queries", DType::F32, plan.query_shape())?;
        expect(&self.similarities, "workspace.similarities", DType::F32, plan.row_shape())?;
        expect(&self.actions, "workspace.actions", DType::U32, plan.row_shape())?;
        expect(&self.logits, "workspace.logits", DType::F32, plan.logits_shape())?;
        expect(&self.stats, "workspace.stats", DType::F32, plan.stats_shape())?;
        expect(&self.votes, "workspace.votes", DType::F32, plan.votes_shape())?;
        expect(&self.pooled_votes, "workspace.pooled_votes", DType::F32, plan.pooled_votes_shape())?;
        expect(&self.top_k, "workspace.top_k", DType::U32, plan.top_k_shape())?;
        expect(&self.selected, "workspace.selected", DType::U32, plan.selected_shape())?;
        expect(&self.selected_len, "workspace.selected_len", DType::U32, plan.row_shape())
    }

    /// The actions that `pool` decided on, a [`RowAction`] a row. Rows beyond the current batch are stale. Waits for
    /// earlier work of the device.
    ///
    /// # Errors
    /// None on a workspace made by [`new`](Self::new); the type is checked like any tensor's.
    pub fn actions(&self) -> Result<Vec<RowAction>> {
        let codes = self.actions.to_vec::<u32>()?;
        Ok(codes.into_iter().map(|code| RowAction::from_code(code).unwrap_or(RowAction::Skip)).collect())
    }

    /// The selected tokens of one row of the current batch, ascending. Waits for earlier work of the device.
    ///
    /// # Errors
    /// [`Error::Index`](crate::Error::Index) where the plan has no such row.
    pub fn selected(&self, row: usize) -> Result<Vec<u32>> {
        let lengths = self.selected_len.to_vec::<u32>()?;
        let limit = lengths.len();
        let len = lengths.get(row).ok_or(Error::Index { what: "row", limit, got: row })?;
        let width = self.selected.shape().dims()[1];
        Ok(self.selected.to_vec::<u32>()?[row * width..][..*len as usize].to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Limits, SelectConfig};

    #[test]
    fn num_bytes_is_what_new_allocates() {
        let config = SelectConfig { vote_pool_window: 3, ..SelectConfig::default() };
        let limits = Limits { max_rows: 3, max_block_len: 7, max_kv_tokens: 1000 };
        let (device, plan) = (Device::cpu(), Plan::new(config, limits).expect("a valid plan"));
        let w = Workspace::new(&device, &plan).expect("little memory");
        let bytes = |t: &Tensor| t.shape().checked_len().expect("allocated") * t.dtype().size();
        let tensors = [&w.queries, &w.similarities, &w.actions, &w.logits, &w.stats, &w.votes];
        let more = [&w.pooled_votes, &w.top_k, &w.selected, &w.selected_len, &w.scratch];
        let sum: usize = tensors.into_iter().chain(more).map(bytes).sum();
        assert_eq!(Workspace::num_bytes(&device, &plan), Ok(sum));
    }
}
