//! Reads a long text with a real model, once with token selection and once with dense attention.
//!
//! ```text
//! cargo run --release --example longtext
//! ```
//!
//! The model is a folder in the Hugging Face Llama format whose tokens are bytes. It predicts every next
//! byte of the text; the bits per byte that it needs are reported by position. Dense attention falls apart
//! past the training context of the model. Token selection with reassigned positions does not, since no
//! distance exceeds the length of the selected list.
//!
//! | file | what it does |
//! |---|---|
//! | `options.rs` | the command line |
//! | `session.rs` | a model reading one sequence: attention with this crate's cache, the rest from `examples/common` |
//! | `device.rs` | the device that attention runs on |
//! | `pass.rs` | one reading of the text: prefill, decode, generate |
//! | `sampler.rs` | choice of the next byte |
//! | `report.rs`, `plot.rs` | table, JSON, SVG and PNG |

mod device;
mod options;
mod pass;
mod plot;
mod report;
mod sampler;
mod session;

use std::process::ExitCode;

use clap::Parser;
use tokenselect_examples::error::Result;
use tokenselect_examples::model::Model;
use tokenselect_examples::{plot as canvas, terminal, text};

use options::Options;
use plot::Plot;
use report::Report;
use session::Attention;

fn main() -> ExitCode {
    terminal::exit(run(&Options::parse()))
}

/// The whole job.
fn run(options: &Options) -> Result<()> {
    options.validate()?;
    let text = text::read(options.text.as_deref(), options.tokens)?;
    options.validate_for(text.len())?;
    let model = Model::load(&options.model)?;
    let device = device::open(&model, &text, options)?;
    let selected = pass::read(&model, &text, &device, Attention::Selected, options)?;
    let dense = pass::read(&model, &text, &device, Attention::Dense, options)?;
    let report = Report::new(&device, text.len(), options, &selected, &dense);

    let output = if options.json { report.json()? } else { report.table(&model, options) };
    terminal::print(&output)?;
    match &options.plot {
        Some(path) => canvas::write(path, &Plot { model: &model, selected: &selected, dense: &dense }),
        None => Ok(()),
    }
}
