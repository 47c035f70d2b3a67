//! The command line.

use std::path::{Path, PathBuf};

use clap::Parser;
use serde::{Serialize, Serializer};
use tokenselect_examples::device::DeviceName;
use tokenselect_examples::error::{Error, Result, expect_folder, expect_other};
use tokenselect_examples::model::Model;
use tokenselect_examples::plot::Format;
use tokenselect_examples::session::Settings;

/// Reads a text with a language model, with token selection and with dense attention, and reports the bits per byte by position.
#[derive(Debug, Parser, Serialize)]
#[command(name = "longtext")]
pub struct Options {
    /// Model folder as Hugging Face has it, of a Llama, Mistral, Qwen2 or Qwen3: config.json, tokenizer.json, model.safetensors in one file
    /// or several. Without tokenizer.json, tokens are bytes
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama"))]
    #[serde(serialize_with = "lossy")]
    pub model: PathBuf,
    /// Text to read. The default, the GNU GPL 3, is one that the default model was not trained on
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama/gpl-3.0.txt"))]
    #[serde(serialize_with = "lossy")]
    pub text: PathBuf,
    /// How many tokens of the text to read, at least 2
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
    /// Factor on the dot products that vote; attention has 1/√head_dim in any case [default: the same]
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    pub score_scale: Option<f32>,
    /// Leave out dense attention: its time, and a second cache
    #[arg(long)]
    pub no_dense: bool,
    /// Read the last N tokens one at a time, through the Selection Cache
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub decode: usize,
    /// Continue the text by N tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub generate: usize,
    /// Randomness of the continuation; 0 takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Seed of the continuation, where its temperature is above 0
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
    /// Where attention runs
    #[arg(long, value_enum, default_value_t = DeviceName::Auto)]
    pub device: DeviceName,
    /// Draw bits per byte over position; the name says as what
    #[arg(long, value_name = "FILE.svg|FILE.png")]
    #[serde(serialize_with = "lossy_if_given")]
    pub plot: Option<PathBuf>,
    /// Print one JSON object at the end, in place of the table
    #[arg(long)]
    pub json: bool,
}

/// A path for JSON, which is UTF-8: what is not is replaced.
fn lossy<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&path.display())
}

/// The same of an option.
fn lossy_if_given<S: Serializer>(path: &Option<PathBuf>, to: S) -> Result<S::Ok, S::Error> {
    path.as_ref().map(|path| path.display().to_string()).serialize(to)
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
        // What cannot be drawn should not be noticed after the work is done.
        if let Some(path) = &self.plot {
            Format::of("--plot", path)?;
            expect_folder("--plot", path)?;
            expect_other("--plot", path, "--text", &self.text)?;
        }
        Ok(())
    }

    /// The factor on the dot products that vote.
    pub fn score_scale_of(&self, model: &Model) -> f32 {
        self.score_scale.unwrap_or_else(|| (model.config.heads.head_dim as f32).sqrt().recip())
    }

    /// What is selected.
    pub fn settings(&self) -> Settings {
        Settings {
            block: self.block,
            n_init: self.n_init,
            n_local: self.n_local,
            top_k: self.top_k,
            score_scale: self.score_scale,
        }
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
