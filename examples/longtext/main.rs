//! Reads a long text with a language model, with token selection and with dense attention side by side.
//!
//! ```text
//! cargo run --release --example longtext
//! ```
//!
//! The model is a folder as Hugging Face has it; the one that comes with the project takes bytes for tokens. It predicts every
//! next token of the text; the bits per byte that it needs are reported by position. Dense attention falls apart past the
//! training context of the model. Token selection with reassigned positions does not, since no distance exceeds the length of
//! the selected list.
//!
//! | file | what it does |
//! |---|---|
//! | `options.rs` | the command line |
//! | `device.rs` | the device that attention runs on |
//! | `pass.rs` | one reading of the text: blocks, single tokens, what the model adds |
//! | `sampler.rs` | choice of the next token |
//! | `report.rs`, `table.rs`, `plot.rs` | JSON, a table that grows while the text is read, SVG and PNG |
//!
//! Models, their vocabularies and the forward pass are in `examples/common`.

mod device;
mod options;
mod pass;
mod plot;
mod report;
mod sampler;
mod table;

use std::fs::File;
use std::process::ExitCode;

use clap::Parser;
use tokenselect_examples::error::{Error, Result};
use tokenselect_examples::model::Model;
use tokenselect_examples::session::Attention;
use tokenselect_examples::terminal::Progress;
use tokenselect_examples::vocabulary::Vocabulary;
use tokenselect_examples::{plot as canvas, terminal};

use options::Options;
use pass::{Found, Pass};
use plot::Plot;
use report::{Report, bucket_ranges};
use table::Table;

fn main() -> ExitCode {
    terminal::exit(run(&Options::parse()))
}

/// The whole job.
fn run(options: &Options) -> Result<()> {
    options.validate()?;
    let model = Model::load(&options.model)?;
    let vocabulary = Vocabulary::load(&options.model, model.config.vocab_size)?;
    let text = File::open(&options.text).map_err(Error::read(&options.text))?;
    let tokens = vocabulary.encode(text, options.tokens, &options.text.display().to_string())?;
    options.validate_for(tokens.len())?;
    let device = device::open(&model, &tokens.ids, options)?;

    let table = Table { model: &model, options, tokens: &tokens, device: &device };
    let (selected, dense) = read(&table)?;
    let report = Report::new(&selected, dense.as_ref(), &table, &vocabulary)?;
    terminal::print(&if options.json { report.json()? } else { table.end(&report) })?;
    match &options.plot {
        Some(path) => {
            let format = canvas::Format::of("--plot", path)?;
            canvas::write(path, format, &Plot { model: &model, selected: &selected, dense: dense.as_ref() })
        }
        None => Ok(()),
    }
}

/// Reads the text, bucket by bucket with selection and then densely, so that results come while it is read.
fn read(table: &Table<'_>) -> Result<(Found, Option<Found>)> {
    let Table { model, options, tokens, device } = *table;
    let mut selected = Pass::new(model, tokens, device, Attention::Selected, options)?;
    let mut dense = match options.no_dense {
        true => None,
        false => Some(Pass::new(model, tokens, device, Attention::Dense, options)?),
    };
    let readings = 1 + usize::from(dense.is_some());
    let mut progress = Progress::new(readings * (tokens.len() + options.generate), "tokens");
    let tell = |progress: &Progress, line: &str| if options.json { Ok(()) } else { progress.print(line) };
    tell(&progress, &table.begin())?;
    for range in bucket_ranges(tokens.len()) {
        selected.read_to(range.end, &mut progress)?;
        if let Some(dense) = &mut dense {
            dense.read_to(range.end, &mut progress)?;
        }
        tell(&progress, &table.row(&range, selected.found(), dense.as_ref().map(Pass::found)))?;
    }
    let selected = selected.finish(options, &mut progress)?;
    Ok((selected, dense.map(|dense| dense.finish(options, &mut progress)).transpose()?))
}
