//! What is printed: a table for people, or one JSON object.

use std::ops::Range;

use serde::Serialize;
use tokenselect::Device;
use tokenselect_examples::error::{Error, Result};
use tokenselect_examples::model::Model;

use crate::options::Options;
use crate::pass::Pass;

/// Results of both readings.
#[derive(Debug, Serialize)]
pub struct Report {
    device: String,
    tokens: usize,
    block: usize,
    selected: PassReport,
    dense: PassReport,
}

/// Results of one reading.
#[derive(Debug, Serialize)]
struct PassReport {
    /// Mean over all bytes but the first, which is not predicted.
    bits_per_byte: f64,
    buckets: Vec<Bucket>,
    tokens_per_second: f64,
    /// Selections of single tokens taken from the Selection Cache, summed over layers.
    reused: u64,
    /// Selections of single tokens made anew, summed over layers.
    scored: u64,
    /// Continuation of the text, where one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    generated: Option<String>,
    #[serde(skip)]
    decode_tokens_per_second: f64,
}

/// Mean over the bytes at positions from `from` to below `to`.
#[derive(Debug, Serialize)]
struct Bucket {
    from: usize,
    to: usize,
    bits_per_byte: f64,
}

/// Ranges of positions: 0 to 1024, then each as long as all before it, the last clipped to `tokens`.
fn bucket_ranges(tokens: usize) -> impl Iterator<Item = Range<usize>> {
    let next = |range: &Range<usize>| Some(range.end..range.end.saturating_mul(2));
    std::iter::successors(Some(0..1024), next)
        .take_while(move |range| range.start < tokens)
        .map(move |range| range.start..range.end.min(tokens))
}

impl PassReport {
    fn new(pass: &Pass, tokens: usize, options: &Options) -> Self {
        let bucket =
            |Range { start: from, end: to }| Bucket { from, to, bits_per_byte: pass.bits_per_byte(from, to) };
        PassReport {
            bits_per_byte: pass.bits_per_byte(0, tokens),
            buckets: bucket_ranges(tokens).map(bucket).collect(),
            tokens_per_second: pass.speed().tokens_per_second(),
            reused: pass.stats.reused,
            scored: pass.stats.scored,
            generated: (options.generate > 0).then(|| String::from_utf8_lossy(&pass.generated).into_owned()),
            decode_tokens_per_second: pass.decode.tokens_per_second(),
        }
    }
}

impl Report {
    /// Summarises both readings of `tokens` bytes.
    pub fn new(device: &Device, tokens: usize, options: &Options, selected: &Pass, dense: &Pass) -> Self {
        Report {
            device: device.name().to_owned(),
            tokens,
            block: options.block,
            selected: PassReport::new(selected, tokens, options),
            dense: PassReport::new(dense, tokens, options),
        }
    }

    /// One JSON object.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|source| Error::ReportJson { source })
    }

    /// A table to read.
    pub fn table(&self, model: &Model, options: &Options) -> String {
        let mut lines = self.header(model, options);
        let row =
            |name: &str, selected: String, dense: String| format!("{name:>19}  {selected:>10}  {dense:>10}");
        let number = |value: f64| format!("{value:.3}");
        lines.push(row("bits per byte at", "selection".into(), "dense".into()));
        for (selected, dense) in self.selected.buckets.iter().zip(&self.dense.buckets) {
            let name = format!("{} to {}", selected.from, selected.to - 1);
            let line = row(&name, number(selected.bits_per_byte), number(dense.bits_per_byte));
            let beyond = selected.to > model.config.training_context;
            lines.push(if beyond { format!("{line}   past the training context") } else { line });
        }
        lines.push(row("all", number(self.selected.bits_per_byte), number(self.dense.bits_per_byte)));
        lines.push(String::new());

        let speed = |value: f64| format!("{value:.0}");
        let (selected, dense) = (&self.selected, &self.dense);
        lines.push(row(
            "tokens per second",
            speed(selected.tokens_per_second),
            speed(dense.tokens_per_second),
        ));
        if options.decode > 0 {
            let (selected, dense) = (selected.decode_tokens_per_second, dense.decode_tokens_per_second);
            lines.push(row("one at a time", speed(selected), speed(dense)));
        }
        if options.decode + options.generate > 0 {
            lines.push(format!(
                "\nSelection Cache: {} selections reused, {} made anew",
                selected.reused, selected.scored
            ));
        }
        for (name, pass) in [("selection", selected), ("dense attention", dense)] {
            if let Some(text) = &pass.generated {
                lines.push(format!("\nContinuation with {name}:\n{}", printable(text)));
            }
        }
        lines.join("\n")
    }

    /// What was read, by which model, how.
    fn header(&self, model: &Model, options: &Options) -> Vec<String> {
        let config = &model.config;
        let heads = config.heads;
        let text = match &options.text {
            Some(path) => path.display().to_string(),
            None => "the project's own sources".to_owned(),
        };
        let mut lines = vec![
            format!(
                "model   {}: {} layers, {} query heads, {} KV heads of {}, {} cache, trained on {} tokens",
                model.name,
                config.num_layers,
                heads.num_qo_heads,
                heads.num_kv_heads,
                heads.head_dim,
                config.dtype,
                config.training_context
            ),
            format!("text    {text}: {} bytes in blocks of {}, on {}", self.tokens, self.block, self.device),
        ];
        if self.tokens < options.tokens {
            lines.push(format!("        shorter than the {} tokens asked for", options.tokens));
        }
        lines.push(format!(
            "select  the first {}, {} by vote, {} before the block",
            options.n_init, options.top_k, options.n_local
        ));
        if options.decode > 0 {
            lines.push(format!("decode  the last {}, one at a time", options.decode));
        }
        lines.push(String::new());
        lines
    }
}

/// Text without control characters, which a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}
