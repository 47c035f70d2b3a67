//! A model reading one sequence: the forward pass, with the cache and the attention of this crate on a device, and all
//! else on the processor.

use std::ops::ControlFlow;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use tokenselect::{
    Batch, CacheConfig, DType, Device, Limits, PagedKvCache, Pieces, Positions, PrefillConfig, SelectConfig,
    SelectionCacheConfig, SelectionStats, SequenceId, StepInput, StepOutput, Tensor, TensorView,
    TensorViewMut, TokenSelect,
};

use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::{Layer, Model};
use crate::ops::{rms_norm, swiglu};
use crate::options::Options;

/// Tokens in a page of the cache.
const PAGE_SIZE: usize = 16;

/// How queries attend to the tokens before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// To selected tokens, at reassigned positions.
    Selected,
    /// To all tokens. A token's rank among all tokens is its position, so this is ordinary RoPE.
    Dense,
}

/// A sequence that grows by parts of a text, read in blocks, and by single tokens.
pub struct Session<'a> {
    model: &'a Model,
    attention: Attention,
    cache: PagedKvCache,
    sequence: SequenceId,
    /// For blocks: selects anew for every block.
    prefill: TokenSelect,
    block_len: usize,
    /// For single tokens: goes through the Selection Cache.
    decode: TokenSelect,
    /// Selections made for blocks, which the Selection Cache does not see.
    scored_blocks: u64,
    buffers: Buffers,
    operands: Operands,
}

/// Activations of some tokens, all `[tokens, ...]` and as large as what was read last.
#[derive(Default)]
struct Buffers {
    /// Residual stream, `hidden_size` wide.
    x: Vec<f32>,
    /// After a norm, `hidden_size` wide.
    normed: Vec<f32>,
    /// Queries, then the output of attention, `num_qo_heads * head_dim` wide.
    q: Vec<f32>,
    /// Keys before RoPE, `num_kv_heads * head_dim` wide.
    k: Vec<f32>,
    /// Values, `num_kv_heads * head_dim` wide.
    v: Vec<f32>,
    /// Gate of the feed-forward part, `intermediate_size` wide.
    gate: Vec<f32>,
    /// What is gated, `intermediate_size` wide.
    up: Vec<f32>,
    /// Logits, `vocab_size` wide.
    logits: Vec<f32>,
}

/// What attention reads and writes, where the device works. Made for a number of tokens, and kept while that stays.
struct Operands {
    tokens: usize,
    /// `[tokens, num_qo_heads, head_dim]`, the type of the cache.
    q: Tensor,
    /// `[tokens, num_kv_heads, head_dim]`, the type of the cache.
    k: Tensor,
    /// As `k`.
    v: Tensor,
    /// `[tokens, num_qo_heads, head_dim]` f32.
    out: Tensor,
}

impl<'a> Session<'a> {
    /// An empty sequence with room for `capacity` tokens.
    pub fn new(
        model: &'a Model,
        device: &Device,
        attention: Attention,
        capacity: usize,
        options: &Options,
    ) -> Result<Self> {
        let config = SelectConfig {
            heads: model.config.heads,
            dtype: model.config.dtype,
            // Windows longer than the text change nothing, and need not be paid for.
            n_init: options.n_init.min(capacity),
            n_local: options.n_local.min(capacity),
            top_k: options.top_k.min(capacity),
            positions: Positions::Reassigned(model.config.rope),
            selection_cache: Some(SelectionCacheConfig::default()),
            ..SelectConfig::default()
        };
        let num_pages = capacity.div_ceil(PAGE_SIZE);
        let cache_config = CacheConfig {
            num_layers: model.layers.len(),
            num_pages,
            page_size: PAGE_SIZE,
            max_sequences: 1,
            ..CacheConfig::default()
        };
        let mut cache = PagedKvCache::new(device, &config, &cache_config)?;
        let sequence = cache.create()?;
        let block_len = options.block.min(capacity);
        let reading = PrefillConfig { block_len, max_kv_len: capacity, ..PrefillConfig::default() };
        let prefill = TokenSelect::for_prefill(device, config.clone(), &reading)?;
        let limits = Limits { max_rows: 1, max_block_len: 1, max_kv_tokens: num_pages * PAGE_SIZE };
        let decode = TokenSelect::new(device, config, limits)?;
        let operands = Operands::new(device, &model.config, 0)?;
        Ok(Session {
            model,
            attention,
            cache,
            sequence,
            prefill,
            block_len,
            decode,
            scored_blocks: 0,
            buffers: Buffers::default(),
            operands,
        })
    }

    /// Reads a part of the text in blocks and returns the predictions after each of its bytes: logits, `[text.len(), vocab_size]`.
    /// `progress` is told how many bytes' worth of it is done.
    pub fn prefill(&mut self, text: &[u8], progress: &mut dyn FnMut(usize)) -> Result<&[f32]> {
        let limits = self.prefill.plan().limits();
        let pieces = self.cache.extend_in_pieces(limits, &[(self.sequence, text.len())], self.block_len)?;
        self.forward(text, &Work::Prefill(pieces), progress)
    }

    /// Reads one byte, through the Selection Cache, and returns the prediction after it: `[vocab_size]`.
    pub fn decode(&mut self, byte: u8) -> Result<&[f32]> {
        let batch = self.cache.extend(&[(self.sequence, 1)])?;
        self.forward(&[byte], &Work::Decode(batch), &mut |_| ())
    }

    /// The predictions that were returned last.
    pub fn logits(&self) -> &[f32] {
        &self.buffers.logits
    }

    /// How often a selection was used again and made anew, summed over layers. Blocks always select anew.
    pub fn selection_stats(&self) -> Result<SelectionStats> {
        let cached = self.cache.selection_stats()?;
        Ok(SelectionStats { scored: cached.scored + self.scored_blocks, ..cached })
    }

    fn forward(&mut self, text: &[u8], work: &Work, progress: &mut dyn FnMut(usize)) -> Result<&[f32]> {
        let model = self.model;
        let epsilon = model.config.norm_epsilon;
        self.buffers.resize(model, text.len());
        model.embed(text, &mut self.buffers.x);
        for (index, layer) in model.layers.iter().enumerate() {
            let b = &mut self.buffers;
            rms_norm(&b.x, &layer.attention_norm, epsilon, &mut b.normed);
            let done_before = index * text.len();
            self.attend(work, index, layer, &mut |done| progress((done_before + done) / model.layers.len()))?;
            let b = &mut self.buffers;
            layer.o.add(&b.q, &mut b.x);
            rms_norm(&b.x, &layer.mlp_norm, epsilon, &mut b.normed);
            layer.gate.apply(&b.normed, &mut b.gate);
            layer.up.apply(&b.normed, &mut b.up);
            swiglu(&b.gate, &mut b.up);
            layer.down.add(&b.up, &mut b.x);
        }
        let b = &mut self.buffers;
        rms_norm(&b.x, &model.final_norm, epsilon, &mut b.normed);
        model.output.apply(&b.normed, &mut b.logits);
        Ok(&b.logits)
    }

    /// Queries, keys and values of the normed stream, then attention; its output replaces the queries. `progress` is told how many
    /// tokens are done.
    fn attend(
        &mut self,
        work: &Work,
        index: usize,
        layer: &Layer,
        progress: &mut dyn FnMut(usize),
    ) -> Result<()> {
        let b = &mut self.buffers;
        layer.q.apply(&b.normed, &mut b.q);
        layer.k.apply(&b.normed, &mut b.k);
        layer.v.apply(&b.normed, &mut b.v);

        let tokens = work.num_tokens();
        if self.operands.tokens != tokens {
            self.operands = Operands::new(self.decode.device(), &self.model.config, tokens)?;
        }
        let Operands { q, k, v, out, .. } = &mut self.operands;
        copy_rounded(&b.q, q)?;
        copy_rounded(&b.k, k)?;
        copy_rounded(&b.v, v)?;
        let input = StepInput { q: q.view(), k: k.view(), v: v.view() };
        let output = StepOutput { out: out.view_mut(), lse: None };
        let cache = &mut self.cache;
        match (work, self.attention) {
            (Work::Decode(batch), Attention::Selected) => {
                self.decode.step(cache, index, batch, input, output)?;
            }
            (Work::Decode(batch), Attention::Dense) => {
                self.decode.step_dense(cache, index, batch, input, output)?;
            }
            (Work::Prefill(pieces), Attention::Selected) => {
                self.scored_blocks += scored_blocks(pieces, self.prefill.config())?;
                self.prefill.prefill(cache.layer_mut(index)?, pieces, input, output, |at| {
                    progress(at.done);
                    ControlFlow::Continue(())
                })?;
            }
            (Work::Prefill(pieces), Attention::Dense) => {
                let StepOutput { mut out, .. } = output;
                for piece in 0..pieces.len() {
                    let tokens = pieces.tokens(piece)?;
                    let [q, k, v] = [input.q, input.k, input.v].map(|tensor| tensor.tokens(tokens.clone()));
                    let input = StepInput { q: q?, k: k?, v: v? };
                    let output = StepOutput { out: out.reborrow().tokens(tokens.clone())?, lse: None };
                    self.prefill.step_dense(cache, index, &*pieces.batch(piece)?, input, output)?;
                    progress(tokens.end);
                }
            }
        }
        TensorViewMut::new(&mut b.q, out.shape())?.copy_from(out.view())?;
        Ok(())
    }
}

/// Blocks that select among more tokens than they may choose.
fn scored_blocks(pieces: &Pieces, config: &SelectConfig) -> Result<u64> {
    let mut scored = 0;
    for piece in 0..pieces.len() {
        let batch = pieces.batch(piece)?;
        for row in 0..batch.num_rows() {
            scored += u64::from(batch.row(row)?.candidates(config).len() > config.top_k);
        }
    }
    Ok(scored)
}

impl Operands {
    fn new(device: &Device, config: &ModelConfig, tokens: usize) -> Result<Self> {
        let heads = config.heads;
        let zeros = |dtype, num_heads| Tensor::zeros_on(device, dtype, [tokens, num_heads, heads.head_dim]);
        Ok(Operands {
            tokens,
            q: zeros(config.dtype, heads.num_qo_heads)?,
            k: zeros(config.dtype, heads.num_kv_heads)?,
            v: zeros(config.dtype, heads.num_kv_heads)?,
            out: zeros(DType::F32, heads.num_qo_heads)?,
        })
    }
}

/// Tokens to read, and the selector that they go through.
enum Work {
    /// A part of the text, in blocks.
    Prefill(Pieces),
    /// One token.
    Decode(Batch),
}

impl Work {
    fn num_tokens(&self) -> usize {
        match self {
            Work::Prefill(pieces) => pieces.whole().num_query_tokens(),
            Work::Decode(batch) => batch.num_query_tokens(),
        }
    }
}

impl Buffers {
    fn resize(&mut self, model: &Model, tokens: usize) {
        let config = &model.config;
        let q_width = config.heads.num_qo_heads * config.heads.head_dim;
        let kv_width = config.heads.num_kv_heads * config.heads.head_dim;
        self.x.resize(tokens * config.hidden_size, 0.0);
        self.normed.resize(tokens * config.hidden_size, 0.0);
        self.q.resize(tokens * q_width, 0.0);
        self.k.resize(tokens * kv_width, 0.0);
        self.v.resize(tokens * kv_width, 0.0);
        self.gate.resize(tokens * config.intermediate_size, 0.0);
        self.up.resize(tokens * config.intermediate_size, 0.0);
        self.logits.resize(tokens * config.vocab_size, 0.0);
    }
}

/// Copies `data` to where `to` lies, rounded to its type.
fn copy_rounded(data: &[f32], to: &mut Tensor) -> tokenselect::Result<()> {
    let shape = to.shape();
    match to.dtype() {
        DType::F16 => {
            let mut rounded = vec![f16::ZERO; data.len()];
            rounded.convert_from_f32_slice(data);
            to.copy_from(TensorView::new(&rounded, shape)?)
        }
        DType::Bf16 => {
            let mut rounded = vec![bf16::ZERO; data.len()];
            rounded.convert_from_f32_slice(data);
            to.copy_from(TensorView::new(&rounded, shape)?)
        }
        _ => to.copy_from(TensorView::new(data, shape)?),
    }
}
