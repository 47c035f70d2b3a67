//! A model reading one sequence: the forward pass with the cache and the attention of the library.

use std::ops::ControlFlow;

use tokenselect::{
    Batch, CacheConfig, Device, Limits, PagedKvCache, Pieces, Positions, PrefillConfig, SelectConfig,
    SelectionCacheConfig, SequenceId, StepInput, StepOutput, TokenSelect,
};

use crate::error::Result;
use crate::forward::Forward;
use crate::model::Model;

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

/// What is selected.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Tokens of a block, which share one list of selected tokens.
    pub block: usize,
    /// The first tokens, always selected.
    pub n_init: usize,
    /// The last tokens before a block, always selected.
    pub n_local: usize,
    /// Tokens selected by vote among the rest.
    pub top_k: usize,
    /// Factor on the dot products that vote; that of attention where it is not given.
    pub score_scale: Option<f32>,
}

/// Selections made, summed over layers. Where there are no more tokens than may be chosen, none is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Selections {
    /// For blocks: always anew.
    pub for_blocks: u64,
    /// For single tokens, anew.
    pub for_tokens: u64,
    /// For single tokens, those of an earlier one used again: the Selection Cache.
    pub reused: u64,
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
    /// Selections made for blocks, summed over layers: the cache's own counts are of single tokens.
    selected_blocks: u64,
}

impl<'a> Session<'a> {
    /// An empty sequence with room for `capacity` tokens, at least 1.
    ///
    /// # Errors
    /// [`Error::Library`](crate::error::Error::Library): what the device cannot run, or has no memory for.
    pub fn new(
        model: &'a Model,
        device: &Device,
        attention: Attention,
        capacity: usize,
        settings: &Settings,
    ) -> Result<Self> {
        let config = SelectConfig {
            heads: model.config.heads,
            dtype: model.config.dtype,
            // Windows longer than the text change nothing, and need not be paid for.
            n_init: settings.n_init.min(capacity),
            n_local: settings.n_local.min(capacity),
            top_k: settings.top_k.min(capacity),
            positions: Positions::Reassigned(model.config.rope),
            score_scale: settings.score_scale,
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
        let block_len = settings.block.min(capacity);
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
            selected_blocks: 0,
        })
    }

    /// Reads a part of the text in blocks. `progress` is told how many tokens' worth of it is done.
    ///
    /// # Errors
    /// [`Error::Library`](crate::error::Error::Library) beyond the capacity, [`Error::Token`](crate::error::Error::Token).
    pub fn prefill(&mut self, tokens: &[u32], progress: &mut dyn FnMut(usize)) -> Result<()> {
        let limits = self.prefill.plan().limits();
        let pieces = self.cache.extend_in_pieces(limits, &[(self.sequence, tokens.len())], self.block_len)?;
        self.forward(tokens, &Work::Prefill(pieces), progress)
    }

    /// Reads one token, through the Selection Cache.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill).
    pub fn decode(&mut self, token: u32) -> Result<()> {
        let batch = self.cache.extend(&[(self.sequence, 1)])?;
        self.forward(&[token], &Work::Decode(batch), &mut |_| ())
    }

    /// The predictions after each of the tokens that were read last, as [`Forward::predictions`].
    ///
    /// # Errors
    /// Those of `each`.
    pub fn predictions(&mut self, each: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        self.forward.predictions(each)
    }

    /// The prediction after the last token: `[vocab_size]`.
    pub fn last_prediction(&mut self) -> &[f32] {
        self.forward.last_prediction()
    }

    /// Selections made so far.
    ///
    /// # Errors
    /// [`Error::Library`](crate::error::Error::Library) where the device fails.
    pub fn selections(&self) -> Result<Selections> {
        let single = self.cache.selection_stats()?;
        Ok(Selections { for_blocks: self.selected_blocks, for_tokens: single.scored, reused: single.reused })
    }

    fn forward(&mut self, tokens: &[u32], work: &Work, progress: &mut dyn FnMut(usize)) -> Result<()> {
        let num_layers = self.forward.model().layers.len();
        let Session { forward, attention, cache, prefill, decode, selected_blocks, .. } = self;
        forward.run(tokens, &mut |index, input, output| {
            let done_before = index * tokens.len();
            let progress = &mut |done: usize| progress((done_before + done) / num_layers);
            match (work, *attention) {
                (Work::Decode(batch), Attention::Selected) => {
                    decode.step(cache, index, batch, input, output)?;
                }
                (Work::Decode(batch), Attention::Dense) => {
                    decode.step_dense(cache, index, batch, input, output)?;
                }
                (Work::Prefill(pieces), Attention::Selected) => {
                    *selected_blocks += self::selected_blocks(pieces, prefill.config())?;
                    prefill.prefill(cache.layer_mut(index)?, pieces, input, output, |at| {
                        progress(at.done);
                        ControlFlow::Continue(())
                    })?;
                }
                (Work::Prefill(pieces), Attention::Dense) => {
                    let StepOutput { mut out, .. } = output;
                    for piece in 0..pieces.len() {
                        let part = pieces.tokens(piece)?;
                        let [q, k, v] = [input.q, input.k, input.v].map(|tensor| tensor.tokens(part.clone()));
                        let input = StepInput { q: q?, k: k?, v: v? };
                        let output = StepOutput { out: out.reborrow().tokens(part.clone())?, lse: None };
                        prefill.step_dense(cache, index, &*pieces.batch(piece)?, input, output)?;
                        progress(part.end);
                    }
                }
            }
            Ok(())
        })
    }
}

/// Blocks that select among more tokens than they may choose.
fn selected_blocks(pieces: &Pieces, config: &SelectConfig) -> Result<u64> {
    let mut selected = 0;
    for piece in 0..pieces.len() {
        let batch = pieces.batch(piece)?;
        for row in 0..batch.num_rows() {
            selected += u64::from(batch.row(row)?.candidates(config).len() > config.top_k);
        }
    }
    Ok(selected)
}

/// Tokens to read, and the selector that they go through.
enum Work {
    /// A part of the text, in blocks.
    Prefill(Pieces),
    /// One token.
    Decode(Batch),
}
