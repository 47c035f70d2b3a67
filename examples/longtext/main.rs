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
//! | `text.rs` | the text to read |
//! | `config.rs`, `rope_scaling.rs` | `config.json` |
//! | `checkpoint.rs` | tensors of one or more safetensors files, as f32 |
//! | `linear.rs`, `ops.rs` | matrix product, norm, activation, cross entropy |
//! | `model.rs` | weights of a Llama model |
//! | `session.rs` | the forward pass: attention on the device, with this crate's cache, the rest on the processor |
//! | `device.rs` | the device that attention runs on |
//! | `pass.rs` | one reading of the text: prefill, decode, generate |
//! | `sampler.rs` | choice of the next byte |
//! | `report.rs`, `plot.rs` | table, JSON, SVG |
//! | `error.rs` | what can go wrong |

mod checkpoint;
mod config;
mod device;
mod error;
mod linear;
mod model;
mod ops;
mod options;
mod pass;
mod plot;
mod report;
mod rope_scaling;
mod sampler;
mod session;
mod text;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use error::{Error, Result};
use model::Model;
use options::Options;
use report::Report;
use session::Attention;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If even stderr is closed, the exit code has to do.
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
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
    print(&output)?;
    match &options.plot {
        Some(path) => plot::write(path, &model, &selected, &dense),
        None => Ok(()),
    }
}

/// Writes to stdout. A reader that went away, such as `head`, is no error.
fn print(output: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{output}").and_then(|()| stdout.flush()) {
        Err(source) if source.kind() != io::ErrorKind::BrokenPipe => Err(Error::Stdout { source }),
        _ => Ok(()),
    }
}
