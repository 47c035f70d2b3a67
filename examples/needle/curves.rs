//! Bits per byte and retrieval over block length and `top_k`.

use serde::Serialize;
use tokenselect_examples::error::{Error, Result};
use tokenselect_examples::ops::code_lengths;

use crate::policy::{Policy, Settings};
use crate::reader::{Reader, tokens};
use crate::retrieval::{Bench, Retrieval};

/// One point of the curves.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    /// Bits per byte of running text.
    pub bits_per_byte: f64,
    /// Keys found.
    pub retrieval: Retrieval,
}

/// The curves.
#[derive(Debug, Clone, Serialize)]
pub struct Curves {
    /// Bytes that were predicted.
    pub predicted: usize,
    /// Bits per byte of dense attention that has half the training context to the whole of it before each byte.
    pub dense_inside_context: f64,
    /// For each block length and `top_k`.
    pub points: Vec<Point>,
}

/// Bits per byte of `text` from its byte `from` on.
pub fn bits_per_byte(bench: &Bench<'_>, text: &[u8], from: usize, settings: Settings) -> Result<f64> {
    let vocab = bench.model.config.vocab_size;
    let mut reader = Reader::new(bench.model, bench.device, settings, text.len())?;
    let mut bits = Vec::with_capacity(text.len());
    reader.read(text, &mut |logits| {
        let next = &text[bits.len() + 1..text.len().min(bits.len() + 1 + logits.len() / vocab)];
        bits.extend(code_lengths(&logits[..next.len() * vocab], vocab, &tokens(next)));
        match bits.iter().position(|bits: &f32| !bits.is_finite()) {
            Some(at) => Err(Error::NotFinite { position: at + 1 }),
            None => Ok(()),
        }
    })?;
    let tail = &bits[from.max(1) - 1..];
    Ok(tail.iter().map(|&bits| f64::from(bits)).sum::<f64>() / tail.len() as f64)
}

/// Bits per byte of `text`, from half the training context on, of dense attention that never goes beyond that context: each half of a
/// context is predicted behind the half before it.
pub fn dense_inside_context(bench: &Bench<'_>, text: &[u8], settings: Settings) -> Result<f64> {
    let half = (bench.model.config.training_context / 2).max(1);
    let settings = Settings { policy: Policy::Dense, ..settings };
    let (mut sum, mut predicted) = (0.0, 0);
    for begin in (half..text.len()).step_by(half) {
        let end = text.len().min(begin + half);
        let bits = bits_per_byte(bench, &text[begin - half..end], half, settings)?;
        sum += bits * (end - begin) as f64;
        predicted += end - begin;
    }
    Ok(sum / f64::from(u32::try_from(predicted).unwrap_or(u32::MAX)).max(1.0))
}
