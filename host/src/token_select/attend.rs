//! Attention, and the merge of its parts.

use super::checks::{LISTS, OWN_LISTS};
use super::{StepOutput, TokenSelect};
use crate::backend::{AttendArgs, MergeArgs, Selection};
use crate::batch::Batch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::KvView;
use crate::ledger::Access;
use crate::plan::Operations;
use crate::tensor::TensorView;
use crate::workspace::Stage;

/// The tokens that a row attends to.
#[derive(Debug, Clone, Copy)]
pub enum Over<'a> {
    /// Those that were selected: the lists of the workspace.
    Selected,
    /// All of them: ordinary paged attention.
    All,
    /// Lists of one's own, which may be parts of longer lists ([`Selection::ranks`]).
    Lists(&'a Selection<'a>),
}

impl TokenSelect {
    /// Attention over some tokens of each row, or all.
    ///
    /// `q` is `[num_query_tokens, num_qo_heads, head_dim]` of the configuration's type. Query `t` of a block of `T` sees the
    /// tokens of rank up to `m - T + t`, `m` being the length of its row's list; for reassigned positions a token is rotated
    /// at its rank. Rows whose list is empty get `out = 0` and `lse = -inf`. Outputs over the parts of a list are combined
    /// by [`merge`](Self::merge).
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Limit`], [`Error::Index`].
    /// - Over [`Over::Selected`]: [`Error::Order`] without a selection of the same batch before it.
    /// - Over [`Over::Lists`]: [`Error::Table`] where a list is longer than its row, not ascending, names a token that the
    ///   row does not hold, or is shorter than the block. Lists in a device's memory are not looked at: for such lists that
    ///   break these rules, outputs are not specified.
    /// - Over [`Over::All`]: [`Error::Missing`] for parts of sequences.
    pub fn attend(
        &self,
        batch: &Batch,
        kv: KvView<'_>,
        q: TensorView<'_>,
        over: Over<'_>,
        output: StepOutput<'_>,
    ) -> Result<()> {
        self.plan.expect("attend", Operations::ATTEND)?;
        self.check_batch(batch)?;
        self.check_kv(batch, &kv)?;
        self.check_queries(batch, &q)?;
        self.check_output(batch, &output)?;
        match &over {
            Over::Selected => {
                self.workspace.progress.expect("attend", Stage::Selected, batch)?;
            }
            Over::Lists(lists) => self.check_lists(batch, lists, LISTS)?,
            Over::All if batch.is_partial() => {
                return Err(Error::Missing { op: "attend", needs: "a batch of whole sequences" });
            }
            Over::All => {}
        }
        self.check_owner("attend", batch, kv.owner, Access::Read)?;
        self.run_attend(batch, kv, q, over, output)
    }

    /// The lists of the workspace.
    fn own_lists(&self) -> Selection<'_> {
        let workspace = &self.workspace;
        Selection { tokens: workspace.selected.view(), len: workspace.selected_len.view(), ranks: None }
    }

    /// Attention of checked arguments.
    pub(super) fn run_attend(
        &self,
        batch: &Batch,
        kv: KvView<'_>,
        q: TensorView<'_>,
        over: Over<'_>,
        output: StepOutput<'_>,
    ) -> Result<()> {
        let lists = match over {
            Over::All => None,
            Over::Lists(lists) => Some(*lists),
            Over::Selected => {
                // A caller may have written what they are made of, cached selections among it.
                self.check_lists(batch, &self.own_lists(), OWN_LISTS)?;
                Some(self.own_lists())
            }
        };
        let args = AttendArgs { kv, q, lists, out: output.out, lse: output.lse };
        self.backend().attend(&self.plan, batch, &self.workspace, args)
    }

    /// Combines attention outputs over disjoint parts of a list through their log-sum-exps.
    ///
    /// `parts` is `[num_parts, num_query_tokens, num_qo_heads, head_dim]` f32, `part_lses`
    /// `[num_parts, num_query_tokens, num_qo_heads]` f32. Parts with `lse = -inf` do not count.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`].
    pub fn merge(
        &self,
        parts: TensorView<'_>,
        part_lses: TensorView<'_>,
        output: StepOutput<'_>,
    ) -> Result<()> {
        let heads = self.config().heads;
        let given = parts.shape();
        let (num_parts, tokens) = match given.dims() {
            &[num_parts, tokens, ..] => (num_parts, tokens),
            _ => (0, 0),
        };
        let (hq, d) = (heads.num_qo_heads, heads.head_dim);
        parts.expect("parts", &[DType::F32], [num_parts, tokens, hq, d])?;
        part_lses.expect("part_lses", &[DType::F32], [num_parts, tokens, hq])?;
        output.out.expect("out", &[DType::F32, DType::F16, DType::Bf16], [tokens, hq, d])?;
        if let Some(lse) = &output.lse {
            lse.expect("lse", &[DType::F32], [tokens, hq])?;
        }
        self.check_place("parts", &parts)?;
        self.check_place("part_lses", &part_lses)?;
        self.check_place("out", &output.out.as_view())?;
        if let Some(lse) = &output.lse {
            self.check_place("lse", &lse.as_view())?;
        }
        self.backend().merge(MergeArgs { parts, part_lses, out: output.out, lse: output.lse })
    }
}
