//! What a device must be able to do: one method an operation, every buffer and shape explicit.
//!
//! [`TokenSelect`](crate::TokenSelect) checks shapes, types and limits before it calls a backend, so a
//! backend may rely on what is written here and each rule is checked in one place for all devices.

pub(crate) mod cpu;
#[cfg_attr(not(any(feature = "cuda", feature = "emulator")), allow(dead_code))]
pub(crate) mod gpu;
mod select;

pub(crate) use select::{SelectArgs, SelectedKv};

use std::fmt;
use std::sync::Arc;

use crate::backend::gpu::driver::Driver;
use crate::batch::Batch;
use crate::cache::{KvView, KvViewMut, PageCopy};
use crate::config::SelectConfig;
use crate::error::Result;
use crate::plan::Limits;
use crate::rope::RopeTable;
use crate::selection_cache::SelectionCacheLayer;
use crate::tensor::{TensorView, TensorViewMut};

/// Arguments of [`Backend::copy_pages`].
#[derive(Debug)]
pub struct CopyPagesArgs<'a> {
    /// Pages to copy; no page is both read and written.
    pub copies: &'a [PageCopy],
    /// One layer.
    pub kv: KvViewMut<'a>,
}

/// Arguments of [`Backend::copy_sequence`]: the tensors of a [`SelectionCache`](crate::SelectionCache), each
/// `[num_layers, num_sequences, ..]`.
#[derive(Debug)]
pub struct CopySequenceArgs<'a> {
    /// Sequence to read.
    pub src: usize,
    /// Sequence to write.
    pub dst: usize,
    /// Scoring queries.
    pub queries: TensorViewMut<'a>,
    /// Selected tokens.
    pub selections: TensorViewMut<'a>,
    /// Ages.
    pub ages: TensorViewMut<'a>,
    /// Tokens before the block at each selection.
    pub made_at: TensorViewMut<'a>,
}

/// Arguments of [`Backend::forget`].
#[derive(Debug)]
pub struct ForgetArgs<'a> {
    /// `[num_layers, num_sequences]` u32: tokens before the block at each selection; `u32::MAX` for none.
    pub made_at: TensorViewMut<'a>,
    /// Sequence whose selections are dropped.
    pub sequence: usize,
    /// Selections made with at least so many tokens before the block are dropped.
    pub from: usize,
}

/// Arguments of [`Backend::append`].
#[derive(Debug)]
pub struct AppendArgs<'a> {
    /// Rows and page tables, after the block was added.
    pub batch: &'a Batch,
    /// `[num_query_tokens, num_kv_heads, head_dim]`, the cache's type.
    pub k: TensorView<'a>,
    /// As `k`.
    pub v: TensorView<'a>,
    /// One layer; the last `T` tokens of every row are written.
    pub kv: KvViewMut<'a>,
}

/// Arguments of [`Backend::pool`].
#[derive(Debug)]
pub struct PoolArgs<'a> {
    /// Configuration.
    pub config: &'a SelectConfig,
    /// What the scratch memory was sized for.
    pub limits: &'a Limits,
    /// Angles of the scoring rotation; `None` for native positions.
    pub rope: Option<&'a RopeTable>,
    /// Rows.
    pub batch: &'a Batch,
    /// `[num_query_tokens, num_qo_heads, head_dim]`, the configuration's type.
    pub q: TensorView<'a>,
    /// The layer's cached selections, read; `None` to select anew.
    pub cached: Option<SelectionCacheLayer<'a>>,
    /// `[max_rows, num_qo_heads, head_dim]` f32, written: mean of the rotated queries of each block.
    pub queries: TensorViewMut<'a>,
    /// `[max_rows]` f32, written: cosine with the cached query, -1 where there is none.
    pub similarities: TensorViewMut<'a>,
    /// `[max_rows]` u32, written: a [`RowAction`](crate::RowAction).
    pub actions: TensorViewMut<'a>,
    /// [`Backend::scratch_words`] of the device's own.
    pub scratch: TensorViewMut<'a>,
}

/// Arguments of [`Backend::score`].
#[derive(Debug)]
pub struct ScoreArgs<'a> {
    /// Configuration.
    pub config: &'a SelectConfig,
    /// What the scratch memory was sized for.
    pub limits: &'a Limits,
    /// Rows and page tables.
    pub batch: &'a Batch,
    /// One layer; keys are read.
    pub kv: KvView<'a>,
    /// `[max_rows, num_qo_heads, head_dim]` f32: scoring queries.
    pub queries: TensorView<'a>,
    /// `[max_rows]` u32: only rows with `RowAction::Score` are scored.
    pub actions: TensorView<'a>,
    /// `[places, num_qo_heads]` f32, written for candidates, in the device's order.
    pub logits: TensorViewMut<'a>,
    /// `[max_rows, num_qo_heads, 2]` f32, written: largest logit, sum of `exp(logit - largest)`.
    pub stats: TensorViewMut<'a>,
    /// [`Backend::scratch_words`] of the device's own.
    pub scratch: TensorViewMut<'a>,
}

/// Arguments of [`Backend::vote`].
#[derive(Debug)]
pub struct VoteArgs<'a> {
    /// Configuration.
    pub config: &'a SelectConfig,
    /// What the scratch memory was sized for.
    pub limits: &'a Limits,
    /// Rows and page tables.
    pub batch: &'a Batch,
    /// `[max_rows]` u32: only rows with `RowAction::Score` vote.
    pub actions: TensorView<'a>,
    /// `[places, num_qo_heads]` f32, in the device's order.
    pub logits: TensorView<'a>,
    /// `[max_rows, num_qo_heads, 2]` f32: over all candidates of the sequence, wherever they lie.
    pub stats: TensorView<'a>,
    /// `[max_kv_tokens]` f32, written for candidates.
    pub votes: TensorViewMut<'a>,
    /// Whether the votes are to be counted, in `scratch`, for the [`Backend::top_k`] that follows.
    pub counts: bool,
    /// [`Backend::scratch_words`] of the device's own.
    pub scratch: TensorViewMut<'a>,
}

/// Arguments of [`Backend::smooth`].
#[derive(Debug)]
pub struct SmoothArgs<'a> {
    /// Configuration.
    pub config: &'a SelectConfig,
    /// Rows and page tables.
    pub batch: &'a Batch,
    /// `[max_rows]` u32: only rows with `RowAction::Score` are smoothed.
    pub actions: TensorView<'a>,
    /// `[max_kv_tokens]` f32, read for candidates.
    pub votes: TensorView<'a>,
    /// `[max_kv_tokens]` f32, written for candidates: the largest vote within the window.
    pub pooled: TensorViewMut<'a>,
}

/// Arguments of [`Backend::top_k`].
#[derive(Debug)]
pub struct TopKArgs<'a> {
    /// Configuration.
    pub config: &'a SelectConfig,
    /// What the scratch memory was sized for.
    pub limits: &'a Limits,
    /// Rows.
    pub batch: &'a Batch,
    /// `[max_rows]` u32: a [`RowAction`](crate::RowAction) each.
    pub actions: TensorView<'a>,
    /// `[max_kv_tokens]` f32, read for the candidates of scored rows.
    pub votes: TensorView<'a>,
    /// Whether these are the votes of the last [`Backend::vote`], which has counted them.
    pub votes_are_counted: bool,
    /// `[max_rows, num_qo_heads, head_dim]` f32: scoring queries, to be cached.
    pub queries: TensorView<'a>,
    /// The layer's cached selections: read for reused rows, replaced for scored ones, counted.
    pub cached: Option<SelectionCacheLayer<'a>>,
    /// `[max_rows, top_k]` u32, written: chosen tokens, ascending.
    pub top_k: TensorViewMut<'a>,
    /// `[max_rows, max_selected]` u32, written: initial, chosen and local tokens and the block, ascending.
    pub selected: TensorViewMut<'a>,
    /// `[max_rows]` u32, written: length of each list.
    pub selected_len: TensorViewMut<'a>,
    /// [`Backend::scratch_words`] of the device's own.
    pub scratch: TensorViewMut<'a>,
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

/// Arguments of [`Backend::attend`].
#[derive(Debug)]
pub struct AttendArgs<'a> {
    /// Configuration.
    pub config: &'a SelectConfig,
    /// What the scratch memory was sized for.
    pub limits: &'a Limits,
    /// Angles of reassigned positions; `None` for native ones.
    pub rope: Option<&'a RopeTable>,
    /// Rows and page tables.
    pub batch: &'a Batch,
    /// One layer.
    pub kv: KvView<'a>,
    /// `[num_query_tokens, num_qo_heads, head_dim]`, the configuration's type.
    pub q: TensorView<'a>,
    /// The tokens to attend to; `None` for all.
    pub selection: Option<Selection<'a>>,
    /// `[num_query_tokens, num_qo_heads, head_dim]`, the configuration's type or f32, written.
    pub out: TensorViewMut<'a>,
    /// `[num_query_tokens, num_qo_heads]` f32, written: natural log of the sum of exponentials.
    pub lse: Option<TensorViewMut<'a>>,
    /// [`Backend::scratch_words`] of the device's own, written; steps of one device use it in turn.
    pub scratch: TensorView<'a>,
}

/// Arguments of [`Backend::merge`].
#[derive(Debug)]
pub struct MergeArgs<'a> {
    /// `[num_parts, num_query_tokens, num_qo_heads, head_dim]` f32: outputs over disjoint parts of a list.
    pub parts: TensorView<'a>,
    /// `[num_parts, num_query_tokens, num_qo_heads]` f32: their log-sum-exps.
    pub part_lses: TensorView<'a>,
    /// `[num_query_tokens, num_qo_heads, head_dim]` f16, bf16 or f32, written.
    pub out: TensorViewMut<'a>,
    /// `[num_query_tokens, num_qo_heads]` f32, written.
    pub lse: Option<TensorViewMut<'a>>,
}

/// The operations of a device. See `docs/definitions.md` for what each computes.
pub(crate) trait Backend: fmt::Debug + Send + Sync {
    /// Short name of the device.
    fn name(&self) -> &str;

    /// The driver of a GPU.
    fn driver(&self) -> Option<&Arc<dyn Driver>> {
        None
    }

    /// 32-bit words of scratch memory, zero at first, that operations on batches within `limits` need.
    fn scratch_words(&self, config: &SelectConfig, limits: &Limits) -> usize {
        let _ = (config, limits);
        0
    }

    /// Makes ready what operations on this configuration need, so that no step waits for it.
    ///
    /// # Errors
    /// Whatever stops the device.
    fn prepare(&self, config: &SelectConfig) -> Result<()> {
        let _ = config;
        Ok(())
    }

    /// Copies the cached selections of one sequence to another, in all layers.
    ///
    /// # Errors
    /// Whatever stops the device.
    fn copy_sequence(&self, args: CopySequenceArgs<'_>) -> Result<()>;

    /// Drops cached selections of one sequence, in all layers.
    ///
    /// # Errors
    /// Whatever stops the device.
    fn forget(&self, args: ForgetArgs<'_>) -> Result<()>;

    /// Copies leading tokens of pages, keys and values: the copy of copy-on-write.
    ///
    /// # Errors
    /// Whatever stops the device.
    fn copy_pages(&self, args: CopyPagesArgs<'_>) -> Result<()>;

    /// Writes the keys and values of each row's block into its pages.
    ///
    /// # Errors
    /// Whatever stops the device.
    fn append(&self, args: AppendArgs<'_>) -> Result<()>;

    /// Means of the (rotated) queries of each block, compared with the cached ones.
    ///
    /// # Errors
    /// Whatever stops the device.
    fn pool(&self, args: PoolArgs<'_>) -> Result<()>;

    /// Scaled dot products of scoring queries and candidate keys, with softmax statistics.
    ///
    /// # Errors
    /// Whatever stops the device.
    fn score(&self, args: ScoreArgs<'_>) -> Result<()>;

    /// Sums of softmax probabilities over heads.
    ///
    /// # Errors
    /// Whatever stops the device.
    fn vote(&self, args: VoteArgs<'_>) -> Result<()>;

    /// Max-pool of the votes with the configuration's window.
    ///
    /// # Errors
    /// Whatever stops the device.
    fn smooth(&self, args: SmoothArgs<'_>) -> Result<()>;

    /// The `top_k` largest votes of every scored row in the total order, windows added.
    ///
    /// # Errors
    /// Whatever stops the device.
    fn top_k(&self, args: TopKArgs<'_>) -> Result<()>;

    /// [`append`](Self::append) if it is asked for, [`pool`](Self::pool), [`score`](Self::score), [`vote`](Self::vote),
    /// [`smooth`](Self::smooth) if it is asked for, and [`top_k`](Self::top_k).
    ///
    /// # Errors
    /// Whatever stops the device.
    fn select(&self, mut args: SelectArgs<'_>) -> Result<()> {
        if let Some(append) = args.append() {
            self.append(append)?;
        }
        self.pool(args.pool())?;
        self.score(args.score()?)?;
        self.vote(args.vote())?;
        if let Some(smooth) = args.smooth() {
            self.smooth(smooth)?;
        }
        self.top_k(args.top_k())
    }

    /// Attention over lists of tokens, or over all.
    ///
    /// # Errors
    /// Whatever stops the device.
    fn attend(&self, args: AttendArgs<'_>) -> Result<()>;

    /// Combines attention over disjoint parts of a list.
    ///
    /// # Errors
    /// Whatever stops the device.
    fn merge(&self, args: MergeArgs<'_>) -> Result<()>;
}
