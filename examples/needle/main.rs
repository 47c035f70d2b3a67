//! Hides pass keys in long texts and asks for them, under one attention policy after the other.
//!
//! ```text
//! cargo run --release --example needle
//! ```
//!
//! A line `# The pass key of ABCDE is 12345.` lies at each of eleven depths of a text. The text is read once, and every question,
//! `# What is the pass key of ABCDE? The pass key of ABCDE is `, goes on from there in a fork of the sequence. A key counts as found
//! where the most probable bytes are its five digits.
//!
//! The policies that are not the library's are a few lines each, between its operations `pool` and `top_k`: `steps.rs` shows how one
//! writes a policy of one's own.
//!
//! | file | what it does |
//! |---|---|
//! | `options.rs` | the command line |
//! | `haystack.rs` | texts with keys in them |
//! | `policy.rs` | the policies and their settings |
//! | `steps.rs` | a step of one layer under each policy, from the library's operations |
//! | `votes.rs` | votes of the policies that are not the library's |
//! | `reader.rs` | a text in the cache, and questions about it |
//! | `retrieval.rs` | which keys are found |
//! | `explain.rs` | where the votes go at the end of a question |
//! | `curves.rs` | bits per byte and retrieval over block length and `top_k` |
//! | `jobs.rs` | what is measured, in which order |
//! | `report.rs`, `heatmap.rs`, `curve_plot.rs` | tables and JSON, SVG and PNG |

mod curve_plot;
mod curves;
mod explain;
mod haystack;
mod heatmap;
mod jobs;
mod options;
mod policy;
mod reader;
mod report;
mod retrieval;
mod steps;
mod votes;

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use tokenselect::Device;
use tokenselect_examples::error::{Error, Result};
use tokenselect_examples::model::Model;
use tokenselect_examples::plot::{self, Drawing, Format};
use tokenselect_examples::vocabulary::Vocabulary;
use tokenselect_examples::{terminal, text};

use curve_plot::CurvePlot;
use heatmap::HeatMaps;
use options::{Options, plot_files};
use policy::Policy;
use reader::Reader;
use report::Report;

/// The most bytes of a source of texts that are read.
const SOURCE_LIMIT: usize = 1 << 26;

fn main() -> ExitCode {
    terminal::exit(run(&Options::parse()))
}

/// The whole job.
fn run(options: &Options) -> Result<()> {
    options.validate()?;
    let source = match &options.text {
        Some(path) => text::read_file(path, SOURCE_LIMIT)?.0,
        None => text::project_sources(SOURCE_LIMIT)?,
    };
    if source.is_empty() {
        let what = options.text.as_deref().unwrap_or(Path::new("the project's own sources"));
        return Err(Error::ShortText { what: what.display().to_string(), got: 0, unit: "bytes" });
    }
    let model = Model::load(&options.model)?;
    Vocabulary::load(&options.model, model.config.vocab_size)?
        .expect_bytes(&options.model, "the hunt for pass keys")?;
    let device = options.device.open(|device| probe(&model, device, &source, options))?;
    let report = jobs::run(options, &source, &model, &device)?;
    let output = if options.json { report.json()? } else { report.tables(&model, options) };
    terminal::print(&output)?;
    match &options.plot {
        Some(path) => draw(path, &model, options, &report),
        None => Ok(()),
    }
}

/// Reads a first block and one more byte: both ways that texts are read.
fn probe(model: &Model, device: &Device, text: &[u8], options: &Options) -> Result<()> {
    let block = options.block.min(text.len());
    for policy in [Policy::Soft, Policy::Cached { threshold: 1.0 }] {
        Reader::new(model, device, options.settings(policy), block)?.read(&text[..block], &mut |_| Ok(()))?;
    }
    Ok(())
}

/// Writes the plots.
fn draw(path: &Path, model: &Model, options: &Options, report: &Report) -> Result<()> {
    let title = format!(
        "{} (trained on {} bytes): pass keys found, {} of {} tokens selected by vote",
        model.name,
        model.config.training_context,
        options.top_k,
        options.n_init + options.top_k + options.n_local
    );
    if !report.policies.is_empty() {
        let maps = HeatMaps { policies: &report.policies, num_lengths: options.lengths.len(), title };
        write_both(path, "", &maps)?;
    }
    match &report.curves {
        Some(curves) => write_both(path, "-curves", &CurvePlot { curves }),
        None => Ok(()),
    }
}

/// Writes a drawing as SVG and as PNG.
fn write_both(path: &Path, suffix: &str, drawing: &impl Drawing) -> Result<()> {
    for (path, format) in plot_files(path, suffix).into_iter().zip([Format::Svg, Format::Png]) {
        plot::write(&path, format, drawing)?;
        eprintln!("wrote {}", path.display());
    }
    Ok(())
}
