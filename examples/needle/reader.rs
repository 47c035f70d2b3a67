//! A sequence that is read under one policy, and questions about it.

use std::ops::ControlFlow;

use tokenselect::{
    CacheConfig, Device, Limits, PagedKvCache, Pieces, PrefillConfig, SequenceId, StepInput, StepOutput,
    TokenSelect,
};
use tokenselect_examples::error::Result;
use tokenselect_examples::forward::Forward;
use tokenselect_examples::model::Model;

use crate::haystack::Key;
use crate::policy::{Policy, Settings};
use crate::steps::{self, Votes};

/// Tokens in a page of the cache, which are also Quest's pages.
const PAGE_SIZE: usize = 16;
/// Tokens that all layers read together where a policy lets them: matrix products of many rows are faster.
const PART: usize = 2048;
/// Bytes of a question and its answer, at most.
const QUESTION: usize = 128;

/// Sees the votes of a layer.
pub type Observer<'a> = dyn FnMut(usize, &Votes) + 'a;

/// A text in the cache.
pub struct Reader<'a> {
    settings: Settings,
    forward: Forward<'a>,
    cache: PagedKvCache,
    sequence: SequenceId,
    /// Steps of a block or of a token.
    select: TokenSelect,
    /// Whole parts of a text, in blocks that share passes over the keys.
    prefill: Option<TokenSelect>,
}

impl<'a> Reader<'a> {
    /// An empty sequence with room for a text of `len` bytes and a question.
    pub fn new(model: &'a Model, device: &Device, settings: Settings, len: usize) -> Result<Self> {
        // A question goes on where the last whole block of the text ended.
        let capacity = len + settings.block + QUESTION;
        let config = settings.config(model, capacity);
        let num_pages = capacity.div_ceil(PAGE_SIZE) + (settings.block + QUESTION).div_ceil(PAGE_SIZE) + 1;
        let cache_config = CacheConfig {
            num_layers: model.layers.len(),
            num_pages,
            page_size: PAGE_SIZE,
            max_sequences: 2,
            ..CacheConfig::default()
        };
        let mut cache = PagedKvCache::new(device, &config, &cache_config)?;
        let sequence = cache.create()?;
        let in_pieces = matches!(settings.policy, Policy::Soft | Policy::Dense);
        let prefill = in_pieces.then(|| {
            let reading =
                PrefillConfig { block_len: settings.block, max_kv_len: capacity, ..PrefillConfig::default() };
            TokenSelect::for_prefill(device, config.clone(), &reading)
        });
        let limits = Limits {
            max_rows: 1,
            max_block_len: settings.block,
            max_kv_tokens: capacity.next_multiple_of(PAGE_SIZE),
        };
        Ok(Reader {
            settings,
            forward: Forward::new(model, device)?,
            cache,
            sequence,
            select: TokenSelect::new(device, config, limits)?,
            prefill: prefill.transpose()?,
        })
    }

    /// Reads a part of the text. `each` is given the predictions after each of its bytes, `[bytes, vocab_size]`, a few bytes at a
    /// time.
    pub fn read(&mut self, text: &[u8], each: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        let block = self.settings.block;
        if self.prefill.is_some() {
            for part in text.chunks(PART.max(block) / block * block) {
                self.read_in_pieces(part)?;
                self.forward.predictions(each)?;
            }
        } else {
            for part in text.chunks(block) {
                self.step(part, None)?;
                self.forward.predictions(each)?;
            }
        }
        Ok(())
    }

    /// Asks for a key behind the `rest` of the text, and returns whether the most probable bytes are its digits. The last `singles`
    /// bytes of the question are read one at a time, as those of an answer are. `observer` sees the votes at the last of them.
    pub fn ask(
        &mut self,
        rest: &[u8],
        key: &Key,
        singles: usize,
        mut observer: Option<&mut Observer<'_>>,
    ) -> Result<bool> {
        let text = self.sequence;
        self.sequence = self.cache.fork(text)?;
        let asked = [rest, &key.question()].concat();
        let (blocks, last) = asked.split_at(asked.len() - singles);
        for block in blocks.chunks(self.settings.block) {
            self.step(block, None)?;
        }
        for (index, byte) in last.iter().enumerate() {
            let observer = if index + 1 == last.len() { observer.take() } else { None };
            self.step(&[*byte], observer)?;
        }
        let mut found = true;
        for (index, &digit) in key.digits.iter().enumerate() {
            let likeliest = most_probable(self.forward.last_prediction());
            if likeliest != usize::from(digit) {
                found = false;
                break;
            }
            if index + 1 < key.digits.len() {
                self.step(&[digit], None)?;
            }
        }
        self.cache.free(self.sequence)?;
        self.sequence = text;
        Ok(found)
    }

    /// One step of a block or a token.
    fn step(&mut self, text: &[u8], observer: Option<&mut Observer<'_>>) -> Result<()> {
        let limits = *self.select.plan().limits();
        let batch = self.cache.extend_within(&limits, &[(self.sequence, text.len())])?;
        let Reader { settings, forward, cache, select, .. } = self;
        let mut observer = observer;
        forward.run(&tokens(text), &mut |layer, input, output| {
            match settings.policy {
                Policy::Dense => select.step_dense(cache, layer, &batch, input, output)?,
                Policy::Cached { .. } => select.step(cache, layer, &batch, input, output)?,
                Policy::Soft if observer.is_none() => select.step(cache, layer, &batch, input, output)?,
                policy => {
                    let votes = steps::step(policy, select, cache, layer, &batch, input, output)?;
                    if let (Some(observer), Some(votes)) = (&mut observer, votes) {
                        observer(layer, &votes);
                    }
                }
            }
            Ok(())
        })?;
        Ok(())
    }

    /// A part of the text under the library's own policies.
    fn read_in_pieces(&mut self, text: &[u8]) -> Result<()> {
        let Reader { settings, forward, cache, prefill: Some(prefill), .. } = self else { return Ok(()) };
        let limits = *prefill.plan().limits();
        let pieces = cache.extend_in_pieces(&limits, &[(self.sequence, text.len())], settings.block)?;
        forward.run(&tokens(text), &mut |layer, input, output| {
            if settings.policy == Policy::Dense {
                return read_densely(prefill, cache, layer, &pieces, input, output);
            }
            prefill.prefill(
                cache.layer_mut(layer)?,
                &pieces,
                input,
                output,
                |_| ControlFlow::Continue(()),
            )?;
            Ok(())
        })?;
        Ok(())
    }
}

/// A token is a byte.
pub fn tokens(text: &[u8]) -> Vec<u32> {
    text.iter().map(|&byte| u32::from(byte)).collect()
}

/// One layer of dense attention, piece by piece.
fn read_densely(
    select: &mut TokenSelect,
    cache: &mut PagedKvCache,
    layer: usize,
    pieces: &Pieces,
    input: StepInput<'_>,
    output: StepOutput<'_>,
) -> Result<()> {
    let StepOutput { mut out, .. } = output;
    for piece in 0..pieces.len() {
        let tokens = pieces.tokens(piece)?;
        let [q, k, v] = [input.q, input.k, input.v].map(|tensor| tensor.tokens(tokens.clone()));
        let input = StepInput { q: q?, k: k?, v: v? };
        let output = StepOutput { out: out.reborrow().tokens(tokens)?, lse: None };
        select.step_dense(cache, layer, &*pieces.batch(piece)?, input, output)?;
    }
    Ok(())
}

/// Index of the largest.
fn most_probable(logits: &[f32]) -> usize {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    best
}
