//! A model reading one sequence: the forward pass with the cache and the attention of the library.

use std::ops::ControlFlow;

use tokenselect::{
    Batch, CacheConfig, Device, Limits, PagedKvCache, Pieces, Positions, PrefillConfig, SelectConfig,
    SelectionCacheConfig, SelectionStats, SequenceId, StepInput, StepOutput, TokenSelect,
};
use tokenselect_examples::error::Result;
use tokenselect_examples::forward::Forward;
use tokenselect_examples::model::Model;

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
    forward: Forward<'a>,
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
        Ok(Session {
            forward: Forward::new(model, device)?,
            attention,
            cache,
            sequence,
            prefill,
            block_len,
            decode,
            scored_blocks: 0,
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

    /// The prediction after the last byte.
    pub fn last_logits(&self) -> &[f32] {
        self.forward.last_logits()
    }

    /// How often a selection was used again and made anew, summed over layers. Blocks always select anew.
    pub fn selection_stats(&self) -> Result<SelectionStats> {
        let cached = self.cache.selection_stats()?;
        Ok(SelectionStats { scored: cached.scored + self.scored_blocks, ..cached })
    }

    fn forward(&mut self, text: &[u8], work: &Work, progress: &mut dyn FnMut(usize)) -> Result<&[f32]> {
        let num_layers = self.forward.model().layers.len();
        let Session { forward, attention, cache, prefill, decode, scored_blocks, .. } = self;
        forward.run(text, &mut |index, input, output| {
            let done_before = index * text.len();
            let progress = &mut |done: usize| progress((done_before + done) / num_layers);
            match (work, *attention) {
                (Work::Decode(batch), Attention::Selected) => {
                    decode.step(cache, index, batch, input, output)?;
                }
                (Work::Decode(batch), Attention::Dense) => {
                    decode.step_dense(cache, index, batch, input, output)?;
                }
                (Work::Prefill(pieces), Attention::Selected) => {
                    *scored_blocks += self::scored_blocks(pieces, prefill.config())?;
                    prefill.prefill(cache.layer_mut(index)?, pieces, input, output, |at| {
                        progress(at.done);
                        ControlFlow::Continue(())
                    })?;
                }
                (Work::Prefill(pieces), Attention::Dense) => {
                    let StepOutput { mut out, .. } = output;
                    for piece in 0..pieces.len() {
                        let tokens = pieces.tokens(piece)?;
                        let [q, k, v] =
                            [input.q, input.k, input.v].map(|tensor| tensor.tokens(tokens.clone()));
                        let input = StepInput { q: q?, k: k?, v: v? };
                        let output = StepOutput { out: out.reborrow().tokens(tokens.clone())?, lse: None };
                        prefill.step_dense(cache, index, &*pieces.batch(piece)?, input, output)?;
                        progress(tokens.end);
                    }
                }
            }
            Ok(())
        })
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

/// Tokens to read, and the selector that they go through.
enum Work {
    /// A part of the text, in blocks.
    Prefill(Pieces),
    /// One token.
    Decode(Batch),
}
