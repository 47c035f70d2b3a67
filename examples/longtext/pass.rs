//! One reading of the text.

use std::time::Instant;

use tokenselect::{Device, SelectionStats};
use tokenselect_examples::error::{Error, Result};
use tokenselect_examples::model::Model;
use tokenselect_examples::ops::code_lengths;
use tokenselect_examples::terminal::progress_bar;

use crate::options::Options;
use crate::sampler::Sampler;
use crate::session::{Attention, Session};

/// What a reading found.
#[derive(Debug)]
pub struct Pass {
    /// Bits of the code of every byte but the first: byte `i` is at `i - 1`.
    pub bits: Vec<f32>,
    /// Tokens read in blocks.
    pub prefill: Speed,
    /// Tokens read one at a time.
    pub decode: Speed,
    /// How often single tokens used a cached selection again, summed over layers, generated ones included.
    pub stats: SelectionStats,
    /// Continuation of the text.
    pub generated: Vec<u8>,
}

/// Tokens and the time that they took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Speed {
    /// Tokens.
    pub tokens: usize,
    /// Seconds.
    pub seconds: f64,
}

impl Speed {
    /// Tokens per second; 0 where there were no tokens.
    pub fn tokens_per_second(self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.tokens as f64 / self.seconds.max(1e-9) }
    }
}

impl Pass {
    /// Mean bits of the bytes at positions from `from` to below `to`.
    pub fn bits_per_byte(&self, from: usize, to: usize) -> f64 {
        let bits = &self.bits[from.max(1) - 1..to - 1];
        bits.iter().map(|&bits| f64::from(bits)).sum::<f64>() / bits.len() as f64
    }

    /// Speed over the whole text.
    pub fn speed(&self) -> Speed {
        Speed {
            tokens: self.prefill.tokens + self.decode.tokens,
            seconds: self.prefill.seconds + self.decode.seconds,
        }
    }
}

/// Bytes that all layers read together, in blocks: matrix products of many rows are faster.
const PART: usize = 2048;

/// Reads `text`: blocks, then the last `options.decode` bytes one at a time, then what the model adds.
pub fn read(
    model: &Model,
    text: &[u8],
    device: &Device,
    attention: Attention,
    options: &Options,
) -> Result<Pass> {
    let mut session = Session::new(model, device, attention, text.len() + options.generate, options)?;
    let mut reader = Reader { text, bits: Vec::with_capacity(text.len()), position: 0 };
    let name = match attention {
        Attention::Selected => "selection",
        Attention::Dense => "dense",
    };
    let bar = progress_bar(name, text.len() + options.generate, "tokens");

    let start = Instant::now();
    let split = text.len() - options.decode;
    for part in text[..split].chunks(PART.max(options.block) / options.block * options.block) {
        let before = bar.position();
        let logits = session.prefill(part, &mut |done| bar.set_position(before + done as u64))?;
        reader.score(logits, model.config.vocab_size, part.len())?;
    }
    let prefill = Speed { tokens: split, seconds: start.elapsed().as_secs_f64() };

    let start = Instant::now();
    for &byte in &text[split..] {
        reader.score(session.decode(byte)?, model.config.vocab_size, 1)?;
        bar.inc(1);
    }
    let decode = Speed { tokens: options.decode, seconds: start.elapsed().as_secs_f64() };

    let mut generated = Vec::new();
    let mut sampler = Sampler::new(options.temperature, options.seed);
    while generated.len() < options.generate {
        let byte = sampler.draw(session.last_logits());
        generated.push(byte);
        session.decode(byte)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Pass { bits: reader.bits, prefill, decode, stats: session.selection_stats()?, generated })
}

/// Compares predictions with the text.
struct Reader<'a> {
    text: &'a [u8],
    bits: Vec<f32>,
    /// Bytes that the model has read.
    position: usize,
}

impl Reader<'_> {
    /// Takes the predictions after the next `len` bytes; the one after the last byte of all has nothing to
    /// be compared with.
    fn score(&mut self, logits: &[f32], vocab_size: usize, len: usize) -> Result<()> {
        let first = self.position + 1;
        self.position += len;
        let next = &self.text[first..self.text.len().min(first + len)];
        let bits = code_lengths(&logits[..next.len() * vocab_size], vocab_size, next);
        if let Some(offset) = bits.iter().position(|bits| !bits.is_finite()) {
            return Err(Error::NotFinite { position: first + offset });
        }
        self.bits.extend(bits);
        Ok(())
    }
}
