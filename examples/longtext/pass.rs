//! One reading of the text, part by part.

use std::time::Instant;

use tokenselect::Device;
use tokenselect_examples::error::{Error, Result};
use tokenselect_examples::model::Model;
use tokenselect_examples::ops::code_lengths;
use tokenselect_examples::session::{Attention, Selections, Session};
use tokenselect_examples::terminal::Progress;
use tokenselect_examples::vocabulary::Tokens;

use crate::options::Options;
use crate::sampler::Sampler;

/// A reading and what it has found so far.
pub struct Pass<'a> {
    tokens: &'a Tokens,
    session: Session<'a>,
    vocab_size: usize,
    name: &'static str,
    /// Tokens that are read in blocks; the others are read one at a time.
    in_blocks: usize,
    /// Tokens of a part.
    part: usize,
    /// Tokens that the model has read.
    position: usize,
    found: Found,
}

/// What a reading found.
#[derive(Debug)]
pub struct Found {
    /// Bits of the code of every token but the first: token `i` is at `i - 1`.
    pub bits: Vec<f32>,
    /// For each token, the bytes of the text up to its end.
    ends: Vec<usize>,
    /// Tokens read in blocks.
    pub prefill: Speed,
    /// Tokens read one at a time, generated ones included.
    pub decode: Speed,
    /// Selections that were made.
    pub selections: Selections,
    /// Continuation of the text.
    pub generated: Vec<u32>,
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
    /// Tokens per second; nothing where there were no tokens.
    pub fn tokens_per_second(self) -> Option<f64> {
        (self.tokens > 0).then(|| self.tokens as f64 / self.seconds.max(1e-9))
    }

    /// Adds the time since `start`.
    fn add(&mut self, tokens: usize, start: Instant) {
        self.tokens += tokens;
        self.seconds += start.elapsed().as_secs_f64();
    }
}

impl Found {
    /// Tokens read.
    pub fn tokens(&self) -> usize {
        self.bits.len() + 1
    }

    /// Bits of the tokens at positions from `from` to below `to`, by the bytes that they stand for. The first token is not
    /// predicted.
    pub fn bits_per_byte(&self, from: usize, to: usize) -> f64 {
        let from = from.max(1);
        let bits: f64 = self.bits[from - 1..to - 1].iter().map(|&bits| f64::from(bits)).sum();
        bits / (self.ends[to - 1] - self.ends[from - 1]).max(1) as f64
    }

    /// Speed over the whole text and its continuation.
    pub fn speed(&self) -> Speed {
        Speed {
            tokens: self.prefill.tokens + self.decode.tokens,
            seconds: self.prefill.seconds + self.decode.seconds,
        }
    }
}

/// Tokens that all layers read together, in blocks: matrix products of many rows are faster.
const PART: usize = 2048;

impl<'a> Pass<'a> {
    /// A reading that has not begun.
    pub fn new(
        model: &'a Model,
        tokens: &'a Tokens,
        device: &Device,
        attention: Attention,
        options: &Options,
    ) -> Result<Self> {
        let capacity = tokens.len() + options.generate;
        let found = Found {
            bits: Vec::with_capacity(tokens.len()),
            ends: tokens.ends.clone(),
            prefill: Speed::default(),
            decode: Speed::default(),
            selections: Selections::default(),
            generated: Vec::new(),
        };
        Ok(Pass {
            tokens,
            session: Session::new(model, device, attention, capacity, &options.settings())?,
            vocab_size: model.config.vocab_size,
            name: match attention {
                Attention::Selected => "selection",
                Attention::Dense => "dense",
            },
            in_blocks: tokens.len() - options.decode,
            part: PART.max(options.block) / options.block * options.block,
            position: 0,
            found,
        })
    }

    /// What was found so far.
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// Reads on until the tokens below `end` are predicted.
    pub fn read_to(&mut self, end: usize, progress: &mut Progress) -> Result<()> {
        progress.begin(self.name);
        while self.position < end {
            let (start, before) = (Instant::now(), progress.position());
            let part = if self.position < self.in_blocks {
                let end = self.in_blocks.min(self.position + self.part);
                let part = &self.tokens.ids[self.position..end];
                self.session.prefill(part, &mut |done| progress.set(before + done))?;
                part.len()
            } else {
                self.session.decode(self.tokens.ids[self.position])?;
                1
            };
            let is_block = self.position < self.in_blocks;
            self.score(part)?;
            let speed = if is_block { &mut self.found.prefill } else { &mut self.found.decode };
            speed.add(part, start);
            progress.set(before + part);
        }
        Ok(())
    }

    /// Goes on where the text ends, and closes the reading.
    pub fn finish(mut self, options: &Options, progress: &mut Progress) -> Result<Found> {
        progress.begin(self.name);
        let mut sampler = Sampler::new(options.temperature, options.seed);
        let start = Instant::now();
        for _ in 0..options.generate {
            let token = sampler.draw(self.session.last_prediction());
            self.found.generated.push(token);
            self.session.decode(token)?;
            progress.set(progress.position() + 1);
        }
        self.found.decode.add(options.generate, start);
        self.found.selections = self.session.selections()?;
        Ok(self.found)
    }

    /// Takes the predictions after the next `len` tokens; the one after the last token of all has nothing to be compared with.
    fn score(&mut self, len: usize) -> Result<()> {
        self.position += len;
        let Pass { tokens, session, vocab_size, position, found, .. } = self;
        let last = tokens.len().min(*position + 1);
        session.predictions(&mut |logits| {
            let first = found.bits.len() + 1;
            let next = &tokens.ids[first..last.min(first + logits.len() / *vocab_size)];
            let bits = code_lengths(&logits[..next.len() * *vocab_size], *vocab_size, next);
            if let Some(offset) = bits.iter().position(|bits| !bits.is_finite()) {
                return Err(Error::NotFinite { position: first + offset });
            }
            found.bits.extend(bits);
            Ok(())
        })
    }
}
