//! The command line.

use std::path::PathBuf;

use clap::Parser;
use tokenselect_examples::device::DeviceName;
use tokenselect_examples::error::{Error, Result, expect_folder};

/// Reads a text with a byte-level Llama model, with token selection and with dense attention, and reports
/// the bits per byte by position.
#[derive(Debug, Parser)]
#[command(name = "longtext")]
pub struct Options {
    /// Model folder in the Hugging Face Llama format: config.json, model.safetensors
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama"))]
    pub model: PathBuf,
    /// Text to read [default: the project's own sources]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// How many bytes of the text to read, at least 2
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub tokens: usize,
    /// Tokens of a block, which share one list of selected tokens
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub block: usize,
    /// The first tokens, always selected
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub n_init: usize,
    /// The last tokens before a block, always selected
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub n_local: usize,
    /// Tokens selected by vote among the rest
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub top_k: usize,
    /// Read the last N tokens one at a time, through the Selection Cache
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub decode: usize,
    /// Continue the text by N bytes
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub generate: usize,
    /// Randomness of the continuation; 0 takes the most probable byte
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f64,
    /// Seed of the continuation, where its temperature is above 0
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
    /// Where attention runs
    #[arg(long, value_enum, default_value_t = DeviceName::Auto)]
    pub device: DeviceName,
    /// Draw bits per byte over position, as SVG or PNG
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Print one JSON object in place of the table
    #[arg(long)]
    pub json: bool,
}

impl Options {
    /// Checks what can be checked before anything is read.
    pub fn validate(&self) -> Result<()> {
        for (option, least, got) in
            [("--tokens", 2, self.tokens), ("--block", 1, self.block), ("--top-k", 1, self.top_k)]
        {
            if got < least {
                return Err(Error::option(option, format!("at least {least}"), got));
            }
        }
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::option("--temperature", "finite and not negative", self.temperature));
        }
        // A missing folder should not be noticed after the work is done.
        self.plot.as_deref().map_or(Ok(()), |path| expect_folder("--plot", path))
    }

    /// Checks what depends on the length of the text.
    pub fn validate_for(&self, tokens: usize) -> Result<()> {
        if self.decode > tokens {
            return Err(Error::option("--decode", format!("at most {tokens}, the tokens read"), self.decode));
        }
        match tokens.checked_add(self.generate) {
            Some(all) if all <= tokenselect::MAX_SEQUENCE_LEN => Ok(()),
            _ => {
                let rule = format!("at most {} less the tokens read", tokenselect::MAX_SEQUENCE_LEN);
                Err(Error::option("--generate", rule, self.generate))
            }
        }
    }
}
