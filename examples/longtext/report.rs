//! Results as one JSON object.

use std::ops::Range;

use serde::Serialize;
use tokenselect_examples::error::{Error, Result};
use tokenselect_examples::session::Selections;
use tokenselect_examples::vocabulary::Vocabulary;

use crate::options::Options;
use crate::pass::Found;
use crate::table::Table;

/// Results of the readings.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    /// Name of the model's folder.
    model: String,
    device: String,
    /// Tokens that were read.
    tokens: usize,
    /// Bytes that they stand for.
    bytes: usize,
    options: &'a Options,
    /// Token selection.
    pub selected: Reading,
    /// Dense attention, unless it was left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    dense: Option<Reading>,
}

/// Results of one reading.
#[derive(Debug, Serialize)]
pub struct Reading {
    /// Bits of all tokens but the first, which is not predicted, by the bytes that they stand for.
    pub bits_per_byte: f64,
    buckets: Vec<Bucket>,
    /// Over the whole text and its continuation.
    pub tokens_per_second: f64,
    /// Of what is read in blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    prefill_tokens_per_second: Option<f64>,
    /// Of what is read one at a time, the continuation included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_second: Option<f64>,
    /// Lists of selected tokens that were made, summed over layers.
    pub selections: SelectionCounts,
    /// Continuation of the text, where one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generated: Option<String>,
}

/// Lists of selected tokens, summed over layers.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct SelectionCounts {
    /// For blocks with more tokens before them than may be chosen.
    pub for_blocks: u64,
    /// For single tokens, made anew.
    pub for_tokens_anew: u64,
    /// For single tokens, taken from the Selection Cache.
    pub for_tokens_reused: u64,
}

/// The tokens at positions from `from` to below `to`.
#[derive(Debug, Serialize)]
struct Bucket {
    from: usize,
    to: usize,
    bits_per_byte: f64,
}

/// Ranges of positions: 0 to 1024, then each as long as all before it, the last clipped to `tokens`.
pub fn bucket_ranges(tokens: usize) -> impl Iterator<Item = Range<usize>> {
    let next = |range: &Range<usize>| Some(range.end..range.end.saturating_mul(2));
    std::iter::successors(Some(0..1024), next)
        .take_while(move |range| range.start < tokens)
        .map(move |range| range.start..range.end.min(tokens))
}

impl Reading {
    fn new(found: &Found, vocabulary: &Vocabulary, options: &Options) -> Result<Self> {
        let bucket = |Range { start: from, end: to }| Bucket {
            from,
            to,
            bits_per_byte: found.bits_per_byte(from, to),
        };
        let Selections { for_blocks, for_tokens, reused } = found.selections;
        let generated = (options.generate > 0).then(|| vocabulary.decode(&found.generated)).transpose()?;
        Ok(Reading {
            bits_per_byte: found.bits_per_byte(0, found.tokens()),
            buckets: bucket_ranges(found.tokens()).map(bucket).collect(),
            tokens_per_second: found.speed().tokens_per_second().unwrap_or(0.0),
            prefill_tokens_per_second: found.prefill.tokens_per_second(),
            decode_tokens_per_second: found.decode.tokens_per_second(),
            selections: SelectionCounts {
                for_blocks,
                for_tokens_anew: for_tokens,
                for_tokens_reused: reused,
            },
            generated,
        })
    }
}

impl<'a> Report<'a> {
    /// Summarises the readings: with selection, and densely if that was not left out.
    pub fn new(
        selected: &Found,
        dense: Option<&Found>,
        table: &Table<'a>,
        vocabulary: &Vocabulary,
    ) -> Result<Self> {
        let options = table.options;
        let reading = |found| Reading::new(found, vocabulary, options);
        Ok(Report {
            model: table.model.name.clone(),
            device: table.device.name().to_owned(),
            tokens: table.tokens.len(),
            bytes: table.tokens.bytes(0, table.tokens.len()),
            options,
            selected: reading(selected)?,
            dense: dense.map(reading).transpose()?,
        })
    }

    /// The readings, selection first.
    pub fn readings(&self) -> impl Iterator<Item = &Reading> {
        std::iter::once(&self.selected).chain(&self.dense)
    }

    /// One JSON object.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|source| Error::ReportJson { source })
    }
}
