//! The table for people: its lines are printed as soon as they are known.

use std::ops::Range;

use tokenselect::Device;
use tokenselect_examples::model::Model;
use tokenselect_examples::vocabulary::Tokens;

use crate::options::Options;
use crate::pass::Found;
use crate::report::Report;

/// What a table is about.
#[derive(Clone, Copy)]
pub struct Table<'a> {
    /// Who reads.
    pub model: &'a Model,
    /// How.
    pub options: &'a Options,
    /// What.
    pub tokens: &'a Tokens,
    /// Where attention runs.
    pub device: &'a Device,
}

impl Table<'_> {
    /// What is read, by which model, how; heads of the columns.
    pub fn begin(&self) -> String {
        let Table { model, options, tokens, device } = self;
        let (config, heads) = (&model.config, model.config.heads);
        let mut lines = vec![
            format!(
                "model   {}: {:?}, {} layers, {} query heads, {} KV heads of {}, {} cache, trained on {} tokens",
                model.name,
                config.family,
                config.num_layers,
                heads.num_qo_heads,
                heads.num_kv_heads,
                heads.head_dim,
                config.dtype,
                config.training_context
            ),
            format!(
                "text    {}: {} tokens ({} bytes) in blocks of {}, on {}",
                options.text.display(),
                tokens.len(),
                tokens.bytes(0, tokens.len()),
                options.block,
                device.name()
            ),
        ];
        if tokens.len() < options.tokens {
            lines.push(format!("        shorter than the {} tokens asked for", options.tokens));
        }
        lines.push(format!(
            "select  the first {}, {} by vote, {} before the block; scores times {}",
            options.n_init,
            options.top_k,
            options.n_local,
            options.score_scale_of(model)
        ));
        if options.decode > 0 {
            lines.push(format!("decode  the last {}, one at a time", options.decode));
        }
        lines.push(String::new());
        let heads: &[_] = if options.no_dense { &["selection"] } else { &["selection", "dense"] };
        lines.push(row("bits per byte at", heads.iter().map(|&head| head.to_owned())));
        lines.join("\n")
    }

    /// A range of positions that every reading has read.
    pub fn row(&self, range: &Range<usize>, selected: &Found, dense: Option<&Found>) -> String {
        let numbers = [selected]
            .into_iter()
            .chain(dense)
            .map(|found| bits(found.bits_per_byte(range.start, range.end)));
        let line = row(&format!("{} to {}", range.start, range.end - 1), numbers);
        let beyond = range.end > self.model.config.training_context;
        if beyond { format!("{line}   past the training context") } else { line }
    }

    /// What is known at the end.
    pub fn end(&self, report: &Report<'_>) -> String {
        let readings = || report.readings();
        let mut lines =
            vec![row("all", readings().map(|reading| bits(reading.bits_per_byte))), String::new()];
        let speed = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.0}"));
        lines
            .push(row("tokens per second", readings().map(|reading| speed(Some(reading.tokens_per_second)))));
        if self.options.decode + self.options.generate > 0 {
            let decode = readings().map(|reading| speed(reading.decode_tokens_per_second));
            lines.push(row("one at a time", decode));
        }
        let made = report.selected.selections;
        lines.push(format!(
            "\nLists of tokens selected, summed over {} layers: {} for blocks; for single tokens {} made anew, {} from the \
             Selection Cache",
            self.model.layers.len(),
            made.for_blocks,
            made.for_tokens_anew,
            made.for_tokens_reused
        ));
        for (name, reading) in ["selection", "dense attention"].into_iter().zip(readings()) {
            if let Some(text) = &reading.generated {
                lines.push(format!("\nContinuation with {name}:\n{}", printable(text)));
            }
        }
        lines.join("\n")
    }
}

/// A name and a number for each reading.
fn row(name: &str, numbers: impl Iterator<Item = String>) -> String {
    numbers.fold(format!("{name:>19}"), |line, number| format!("{line}  {number:>10}"))
}

fn bits(value: f64) -> String {
    format!("{value:.3}")
}

/// Text without control characters, which a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}
