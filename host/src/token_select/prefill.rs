//! Prompts of any length, piece by piece.

use std::ops::ControlFlow;

use super::{StepInput, StepOutput, TokenSelect};
use crate::batch::MAX_ROWS;
use crate::cache::LayerMut;
use crate::config::{MAX_SEQUENCE_LEN, SelectConfig};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ledger::Access;
use crate::pages::MAX_PAGE_SIZE;
use crate::pieces::Pieces;
use crate::plan::{Limits, Operations, Plan};
use crate::selection_cache::SelectionCacheLayer;
use crate::token_select::Over;
use crate::workspace::Workspace;

/// How prompts are read, and the memory for it: what [`TokenSelect::for_prefill`] is made for.
///
/// ```
/// # use tokenselect::*;
/// let long = PrefillConfig { max_kv_len: 4 << 20, ..PrefillConfig::default() }; // 4 million tokens
/// let limits = long.limits(&Device::cpu(), &SelectConfig::default())?;
/// assert_eq!((limits.max_rows, limits.max_block_len), (1, 512)); // one block at a time has room
/// # Ok::<(), tokenselect::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefillConfig {
    /// Tokens of a block. A dial, from about 4 to 512: short blocks are nearer to dense attention and cost more passes over the keys;
    /// long blocks pool many queries into one and are fastest. Default 512, the paper's
    /// ([`SelectConfig::paper`] has its other settings).
    pub block_len: usize,
    /// The most tokens that a sequence has when its prompt has been read. Default 131072.
    pub max_kv_len: usize,
    /// The most tokens of a piece, which is the work of one step and of one call of the progress function; where it is
    /// less than a block, a piece is one block.
    /// Default 8192.
    pub max_piece_len: usize,
    /// The most bytes of the workspace; where they have no room for a piece of `max_piece_len`, pieces are shorter. Default 1 GiB.
    pub max_workspace_bytes: usize,
}

impl Default for PrefillConfig {
    fn default() -> Self {
        PrefillConfig {
            block_len: 512,
            max_kv_len: 131_072,
            max_piece_len: 8192,
            max_workspace_bytes: 1 << 30,
        }
    }
}

impl PrefillConfig {
    /// The limits of steps: blocks of `block_len`, and as many in a step as the piece and the workspace have room for. Allocates
    /// nothing.
    ///
    /// # Errors
    /// [`Error::Config`] where a field is 0 or too large, and where the workspace has no room for one block, with the bytes that it
    /// needs; [`Error::Unsupported`] as [`TokenSelect::new`].
    pub fn limits(&self, device: &Device, config: &SelectConfig) -> Result<Limits> {
        // A row has a place for every slot of its pages, whatever the size of these.
        let padding = MAX_PAGE_SIZE - 1;
        for (field, most, got) in [
            ("block_len", MAX_SEQUENCE_LEN, self.block_len),
            ("max_kv_len", MAX_SEQUENCE_LEN - padding, self.max_kv_len),
        ] {
            if got == 0 || got > most {
                return Err(Error::config(field, format!("from 1 to {most}"), got));
            }
        }
        if self.max_piece_len == 0 {
            return Err(Error::config("max_piece_len", "at least 1", 0));
        }
        let places = self.max_kv_len + padding;
        let limits =
            |max_rows| Limits { max_rows, max_block_len: self.block_len, max_kv_tokens: max_rows * places };
        let bytes = |max_rows| {
            let plan = Plan::new(device, config.clone(), limits(max_rows), Operations::PREFILL)?;
            match Workspace::num_bytes(&plan) {
                Err(Error::OutOfMemory { bytes, .. }) => Ok(bytes),
                other => other,
            }
        };
        let needed = bytes(1)?;
        if needed > self.max_workspace_bytes {
            let rule = format!(
                "at least {needed}, for one block of {} tokens of a sequence of {}",
                self.block_len, self.max_kv_len
            );
            return Err(Error::config("max_workspace_bytes", rule, self.max_workspace_bytes));
        }
        // `fit` rows do, `beyond` do not or are not wanted.
        let most = (self.max_piece_len / self.block_len).min(MAX_ROWS).min(MAX_SEQUENCE_LEN / places).max(1);
        let (mut fit, mut beyond) = (1, most + 1);
        while beyond - fit > 1 {
            let middle = fit + (beyond - fit) / 2;
            if bytes(middle)? <= self.max_workspace_bytes {
                fit = middle;
            } else {
                beyond = middle;
            }
        }
        Ok(limits(fit))
    }
}

/// How far a [`prefill`](TokenSelect::prefill) of one layer has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefillProgress {
    /// Query tokens of the pieces that were read.
    pub done: usize,
    /// Query tokens of all pieces.
    pub total: usize,
}

impl TokenSelect {
    /// One that reads prompts, with a workspace of no more than [`PrefillConfig::max_workspace_bytes`]. It selects for blocks alone
    /// ([`Operations::PREFILL`]): decoding has a [`TokenSelect`] of its own, over the same cache.
    ///
    /// # Errors
    /// Those of [`PrefillConfig::limits`] and of [`new`](Self::new).
    pub fn for_prefill(device: &Device, config: SelectConfig, prefill: &PrefillConfig) -> Result<Self> {
        let limits = prefill.limits(device, &config)?;
        TokenSelect::with_plan(Plan::new(device, config, limits, Operations::PREFILL)?)
    }

    /// Reads prompts in one layer: for each piece in turn, appends its keys and values, selects for its blocks, attends, and calls
    /// `progress`. A block selects from the tokens before it with its own windows, so nothing leaks from the future, and the result is
    /// that of a [`step`](Self::step) with [`batch`](Pieces::batch) of each piece, bit by bit.
    ///
    /// `layer` is an owned cache's ([`PagedKvCache::layer_mut`](crate::PagedKvCache::layer_mut)) or another engine's. Tensors have the
    /// query tokens of all pieces, as [`Pieces::whole`] has. `progress` is called once a piece, on a GPU when its work is in the stream,
    /// and may stop; what is returned then has fewer tokens done than there are. Cached selections of the sequences that grow are
    /// dropped.
    ///
    /// ```
    /// # use std::ops::ControlFlow;
    /// # use tokenselect::*;
    /// # let device = Device::cpu();
    /// # let heads = HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 16 };
    /// # let config = SelectConfig { heads, top_k: 64, n_local: 32, dtype: DType::F32, ..SelectConfig::default() };
    /// # let pages = CacheConfig { num_pages: 64, num_layers: 2, ..CacheConfig::default() };
    /// # let mut cache = PagedKvCache::new(&device, &config, &pages)?;
    /// # let (a, b) = (cache.create()?, cache.create()?);
    /// # let (q, kv) = (vec![0.5f32; 400 * 4 * 16], vec![0.25f32; 400 * 2 * 16]);
    /// # let mut out = vec![0.0f32; q.len()];
    /// let prefill = PrefillConfig { block_len: 64, max_kv_len: 1000, max_piece_len: 256, ..PrefillConfig::default() };
    /// let mut select = TokenSelect::for_prefill(&device, config, &prefill)?;
    /// let limits = *select.plan().limits();
    /// let pieces = cache.extend_in_pieces(&limits, &[(a, 300), (b, 100)], prefill.block_len)?; // two prompts
    /// for layer in 0..2 {
    ///     let input = select.input(pieces.whole(), &q, &kv, &kv)?; // of 400 tokens
    ///     let output = select.output(pieces.whole(), &mut out, None)?;
    ///     select.prefill(cache.layer_mut(layer)?, &pieces, input, output, |at| {
    ///         println!("layer {layer}: {} of {} tokens", at.done, at.total); // 256 of 400, 400 of 400
    ///         ControlFlow::Continue(())
    ///     })?;
    /// }
    /// # Ok::<(), tokenselect::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`step`](Self::step), and [`Error::Missing`] while work is recorded. All of these are found before the first piece, and then
    /// nothing was written.
    ///
    /// After a stop, or an error of the device, the layer and the outputs have the pieces before it
    /// ([`PagedKvCache::written_len`](crate::PagedKvCache::written_len)). The same call may be made again, and begins anew; or
    /// [`truncate`](crate::PagedKvCache::truncate) the sequences to what all layers have.
    pub fn prefill(
        &mut self,
        layer: LayerMut<'_>,
        pieces: &Pieces,
        input: StepInput<'_>,
        output: StepOutput<'_>,
        mut progress: impl FnMut(PrefillProgress) -> ControlFlow<()>,
    ) -> Result<PrefillProgress> {
        self.check_prefill(&layer, pieces, &input, &output)?;
        let LayerMut { mut kv, mut selections } = layer;
        let StepOutput { mut out, mut lse } = output;
        let mut at = PrefillProgress { done: 0, total: pieces.whole().num_query_tokens() };
        for piece in 0..pieces.len() {
            let (batch, tokens) = (pieces.batch(piece)?, pieces.tokens(piece)?);
            let [q, k, v] = [input.q, input.k, input.v].map(|tensor| tensor.tokens(tokens.clone()));
            let input = StepInput { q: q?, k: k?, v: v? };
            let layer = LayerMut {
                kv: kv.reborrow(),
                selections: selections.as_mut().map(SelectionCacheLayer::reborrow),
            };
            let output = StepOutput {
                out: out.reborrow().tokens(tokens.clone())?,
                lse: lse.as_mut().map(|lse| lse.reborrow().tokens(tokens.clone())).transpose()?,
            };
            self.append_select_for("prefill", &batch, layer, input)?;
            self.run_attend(&batch, kv.as_view()?, input.q, Over::Selected, output)?;
            at.done = tokens.end;
            if progress(at).is_break() {
                break;
            }
        }
        Ok(at)
    }

    /// What can be found wrong before the first piece.
    fn check_prefill(
        &self,
        layer: &LayerMut<'_>,
        pieces: &Pieces,
        input: &StepInput<'_>,
        output: &StepOutput<'_>,
    ) -> Result<()> {
        let (op, batch) = ("prefill", pieces.whole());
        self.plan.expect(op, Operations::PREFILL)?;
        self.device().expect_no_recording(op)?;
        pieces.check(self.plan.limits())?;
        self.check_append(op, batch, &layer.kv, &input.k, &input.v)?;
        self.check_queries(batch, &input.q)?;
        self.check_output(batch, output)?;
        self.check_cached_tables(batch, layer.selections.as_ref())?;
        self.check_owner(op, batch, layer.kv.owner, Access::Append)
    }
}
