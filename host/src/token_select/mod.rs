//! The object that runs steps: plan and workspace in one.

mod attend;
mod checks;
mod prefill;
mod select;
mod step;

use tokenselect_kernels::common::layout::{LOGIT_TILE, logit_tile};

pub use self::attend::Over;
pub use self::prefill::{PrefillConfig, PrefillProgress};
use crate::backend::{self, Backend};
use crate::batch::Batch;
use crate::config::SelectConfig;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::plan::{Limits, Operations, Plan};
use crate::tensor::{Element, TensorView, TensorViewMut};
use crate::workspace::{Buffer, Workspace};

/// Inputs of a step of one layer: [`TokenSelect::input`], or tensors of one's own.
#[derive(Debug, Clone, Copy)]
pub struct StepInput<'a> {
    /// `[num_query_tokens, num_qo_heads, head_dim]`, the configuration's type: queries of all rows.
    pub q: TensorView<'a>,
    /// `[num_query_tokens, num_kv_heads, head_dim]`, the configuration's type: keys to append.
    pub k: TensorView<'a>,
    /// As `k`: values to append.
    pub v: TensorView<'a>,
}

/// Outputs of a step of one layer: [`TokenSelect::output`], or tensors of one's own.
#[derive(Debug)]
pub struct StepOutput<'a> {
    /// `[num_query_tokens, num_qo_heads, head_dim]`, the configuration's type or f32, written.
    pub out: TensorViewMut<'a>,
    /// `[num_query_tokens, num_qo_heads]` f32, written: natural log of the sum of exponentials.
    pub lse: Option<TensorViewMut<'a>>,
}

/// Runs token selection and attention on a device: whole steps ([`step`](Self::step)), or one operation at
/// a time with the [`workspace`](Self::workspace) between them.
///
/// One object serves all layers and sequences of a model in turn. Operations check shapes, types, limits and order first;
/// where one of these is wrong, nothing was written.
#[derive(Debug)]
pub struct TokenSelect {
    plan: Plan,
    workspace: Workspace,
}

impl TokenSelect {
    /// Checks the configuration, allocates a workspace for batches within `limits`, and loads the kernels of the
    /// configuration, which takes seconds the first time that a GPU's driver compiles them.
    ///
    /// # Errors
    /// [`Error::Config`], naming the field that breaks its rule; [`Error::Unsupported`] where the device cannot run the
    /// configuration ([`Device::supports`] tells before); [`Error::OutOfMemory`]; [`Error::Driver`].
    pub fn new(device: &Device, config: SelectConfig, limits: Limits) -> Result<Self> {
        TokenSelect::with_plan(Plan::new(device, config, limits, Operations::ALL)?)
    }

    /// The same for a plan, which may leave operations out.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn with_plan(plan: Plan) -> Result<Self> {
        let workspace = Workspace::new(&plan)?;
        if let Some(gpu) = plan.gpu() {
            gpu.prepare()?;
        }
        Ok(TokenSelect { plan, workspace })
    }

    /// The configuration.
    pub fn config(&self) -> &SelectConfig {
        self.plan.config()
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The device.
    pub fn device(&self) -> &Device {
        self.plan.device()
    }

    /// The buffers between operations.
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    /// One of the buffers between operations, writable: for a collective, or for results of one's own
    /// ([`provide`](Self::provide)).
    pub fn buffer_mut(&mut self, buffer: Buffer) -> TensorViewMut<'_> {
        self.workspace.buffer_mut(buffer)
    }

    /// Says that a buffer holds results of the caller's own for `batch`, written through [`buffer_mut`](Self::buffer_mut):
    /// votes of a policy of one's own, for [`top_k`](Self::top_k) to choose from, or lists for [`attend`](Self::attend).
    ///
    /// Queries, similarities and actions stand for what `pool` writes, products for what `compare` does, logits and statistics
    /// for what `score` does, the selected tokens and their lengths for what `top_k` does: all of them are to be there.
    ///
    /// # Errors
    /// [`Error::Order`] where the stage before was not done for this batch: logits, votes and products need `pool`;
    /// [`Error::Limit`] for a batch beyond the limits.
    pub fn provide(&mut self, buffer: Buffer, batch: &Batch) -> Result<()> {
        self.check_batch(batch)?;
        self.workspace.provide(buffer, batch)
    }

    /// Inputs of a step from slices of the host, whose shapes follow from batch and configuration.
    ///
    /// # Errors
    /// [`Error::Length`] where a slice holds another number of elements.
    pub fn input<'a, T: Element>(
        &self,
        batch: &Batch,
        q: &'a [T],
        k: &'a [T],
        v: &'a [T],
    ) -> Result<StepInput<'a>> {
        let (tokens, heads) = (batch.num_query_tokens(), self.config().heads);
        let kv = [tokens, heads.num_kv_heads, heads.head_dim];
        Ok(StepInput {
            q: TensorView::named("q", q, [tokens, heads.num_qo_heads, heads.head_dim])?,
            k: TensorView::named("k", k, kv)?,
            v: TensorView::named("v", v, kv)?,
        })
    }

    /// Outputs of a step in slices of the host, whose shapes follow from batch and configuration.
    ///
    /// # Errors
    /// As [`input`](Self::input).
    pub fn output<'a, T: Element>(
        &self,
        batch: &Batch,
        out: &'a mut [T],
        lse: Option<&'a mut [f32]>,
    ) -> Result<StepOutput<'a>> {
        let (tokens, heads) = (batch.num_query_tokens(), self.config().heads);
        let lse = lse.map(|lse| TensorViewMut::named("lse", lse, [tokens, heads.num_qo_heads]));
        Ok(StepOutput {
            out: TensorViewMut::named("out", out, [tokens, heads.num_qo_heads, heads.head_dim])?,
            lse: lse.transpose()?,
        })
    }

    /// Index into the elements of [`Buffer::Logits`](crate::Buffer::Logits) of a row's token and query head.
    ///
    /// On the processor they are `[token_base + token, num_qo_heads]`; on GPUs they lie in tiles `[num_kv_heads, 16 tokens,
    /// group]`, each row from a tile of its own on.
    ///
    /// # Errors
    /// [`Error::Index`] where the batch has no such row, the row no such token, or the configuration no such head.
    pub fn logit_index(&self, batch: &Batch, row: usize, token: usize, qo_head: usize) -> Result<usize> {
        let heads = self.config().heads;
        let check =
            |what, got, limit| if got < limit { Ok(()) } else { Err(Error::Index { what, limit, got }) };
        self.plan.check(batch)?;
        check("row", row, batch.num_rows())?;
        check("token", token, batch.kv_len(row))?;
        check("query head", qo_head, heads.num_qo_heads)?;
        let base = batch.token_base(row);
        if self.device().is_cpu() {
            return Ok((base + token) * heads.num_qo_heads + qo_head);
        }
        let (kv_head, member, size) = (qo_head / heads.group(), qo_head % heads.group(), LOGIT_TILE as usize);
        let tile = logit_tile(base as u64, row as u32) as usize + token / size;
        Ok(((tile * heads.num_kv_heads + kv_head) * size + token % size) * heads.group() + member)
    }

    fn backend(&self) -> &dyn Backend {
        backend::of(&self.plan)
    }
}
