//! The command line.

use std::path::{Path, PathBuf};

use clap::Parser;
use tokenselect_examples::device::DeviceName;
use tokenselect_examples::error::{Error, Result, expect_folder, expect_other};

use crate::policy::{Policy, Settings};

/// Hides pass keys in long texts and asks a byte-level Llama model for them, under one attention policy after the other.
#[derive(Debug, Parser)]
#[command(name = "needle")]
pub struct Options {
    /// Model folder in the Hugging Face Llama format: config.json, model.safetensors
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama"))]
    pub model: PathBuf,
    /// Text that keys are hidden in [default: the project's own sources]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Bytes of the texts
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1024, 2048, 4096, 8192, 16384])]
    pub lengths: Vec<usize>,
    /// Keys of a text, at depths from 0 to 100 %
    #[arg(long, value_name = "N", default_value_t = 11)]
    pub depths: usize,
    /// Texts of each length
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub samples: usize,
    /// Seed of the texts, names and digits
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub seed: u64,
    /// Policies to run
    #[arg(long, value_name = "NAME,…", value_enum, value_delimiter = ',', num_args = 0.., default_values_t = PolicyName::ALL)]
    pub policies: Vec<PolicyName>,
    /// Tokens of a block, which share one list of selected tokens
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub block: usize,
    /// Bytes at the end of a question that are read one at a time, as an answer is
    #[arg(long, value_name = "N", default_value_t = 12)]
    pub singles: usize,
    /// The first tokens, always selected
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub n_init: usize,
    /// The last tokens before a block, always selected
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub n_local: usize,
    /// Tokens selected by vote among the rest
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub top_k: usize,
    /// Factor on the dot products that vote; attention has 1/√head_dim in any case
    #[arg(long, value_name = "S", default_value_t = 1.0, allow_negative_numbers = true)]
    pub score_scale: f32,
    /// Odd width of the max-pool over votes
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub vote_pool: usize,
    /// Values of top_k that are compared; none leaves the table out
    #[arg(long, value_name = "N,…", value_delimiter = ',', num_args = 0.., default_values_t = [16, 32, 64, 128, 256, 512, 1024])]
    pub ablate_top_k: Vec<usize>,
    /// Thresholds of the Selection Cache that are compared
    #[arg(long, value_name = "T,…", value_delimiter = ',', num_args = 0.., default_values_t = [0.5, 0.7, 0.8, 0.9, 0.95, 1.0])]
    pub ablate_threshold: Vec<f32>,
    /// Score scales that are compared
    #[arg(long, value_name = "S,…", value_delimiter = ',', num_args = 0.., default_values_t = [0.0625, 0.125, 0.25, 0.5, 1.0, 2.0])]
    pub ablate_scale: Vec<f32>,
    /// Windows of the max-pool that are compared
    #[arg(long, value_name = "N,…", value_delimiter = ',', num_args = 0.., default_values_t = [1, 3, 5, 9])]
    pub ablate_vote_pool: Vec<usize>,
    /// Lengths of parts of a block that vote for themselves, of which the largest vote counts
    #[arg(long, value_name = "N,…", value_delimiter = ',', num_args = 0..)]
    pub ablate_parts: Vec<usize>,
    /// Length of the texts of these comparisons
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub ablation_length: usize,
    /// Also show, layer by layer, where the votes go at the end of a question
    #[arg(long)]
    pub explain: bool,
    /// Also show bits per byte and retrieval over block length and top_k; takes minutes
    #[arg(long)]
    pub curves: bool,
    /// Block lengths of these curves
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 4, 16, 64, 128, 512])]
    pub curve_blocks: Vec<usize>,
    /// Values of top_k of these curves
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [64, 256, 1024])]
    pub curve_top_k: Vec<usize>,
    /// Bytes of the texts of these curves
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub curve_length: usize,
    /// Where attention runs. Votes of policies that are not the library's are made on the processor in any case
    #[arg(long, value_enum, default_value_t = DeviceName::Auto)]
    pub device: DeviceName,
    /// Draw the heat maps (and the curves, with `-curves` in the name): writes PATH.svg and PATH.png
    #[arg(long, value_name = "PATH")]
    pub plot: Option<PathBuf>,
    /// Print one JSON object in place of the tables
    #[arg(long)]
    pub json: bool,
}

/// A policy of the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PolicyName {
    /// All tokens
    Dense,
    /// The first and the last tokens alone (StreamingLLM)
    Windows,
    /// Pages of 16 by Quest's bound
    Quest,
    /// Sum of logits over heads
    Raw,
    /// How many heads have a token among their top_k
    Hard,
    /// Sum of softmax probabilities over heads
    Soft,
    /// The same through the Selection Cache, threshold 0.9
    Cached,
}

impl PolicyName {
    const ALL: [PolicyName; 7] = [
        PolicyName::Dense,
        PolicyName::Windows,
        PolicyName::Quest,
        PolicyName::Raw,
        PolicyName::Hard,
        PolicyName::Soft,
        PolicyName::Cached,
    ];

    /// The policy.
    pub fn policy(self) -> Policy {
        match self {
            PolicyName::Dense => Policy::Dense,
            PolicyName::Windows => Policy::Windows,
            PolicyName::Quest => Policy::Quest,
            PolicyName::Raw => Policy::Raw,
            PolicyName::Hard => Policy::Hard,
            PolicyName::Soft => Policy::Soft,
            PolicyName::Cached => Policy::Cached { threshold: 0.9 },
        }
    }
}

// As on the command line.
impl std::fmt::Display for PolicyName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let value = clap::ValueEnum::to_possible_value(self);
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// The SVG and the PNG of a drawing. An extension of either is no part of the name that is given.
pub fn plot_files(path: &Path, suffix: &str) -> [PathBuf; 2] {
    let is_ours = path.extension().is_some_and(|extension| extension == "svg" || extension == "png");
    let stem = if is_ours { path.with_extension("") } else { path.to_path_buf() };
    ["svg", "png"].map(|extension| {
        let mut name = stem.as_os_str().to_owned();
        name.push(format!("{suffix}.{extension}"));
        PathBuf::from(name)
    })
}

impl Options {
    /// A policy with the settings of the command line.
    pub fn settings(&self, policy: Policy) -> Settings {
        Settings {
            policy,
            block: self.block,
            n_init: self.n_init,
            n_local: self.n_local,
            top_k: self.top_k,
            score_scale: self.score_scale,
            vote_pool_window: self.vote_pool,
        }
    }

    /// Checks what can be checked before anything is read; configurations are the library's to refuse.
    pub fn validate(&self) -> Result<()> {
        let least = |option, least: usize, got: usize| {
            if got < least { Err(Error::option(option, format!("at least {least}"), got)) } else { Ok(()) }
        };
        least("--depths", 1, self.depths)?;
        least("--samples", 1, self.samples)?;
        least("--block", 1, self.block)?;
        self.curve_blocks.iter().try_for_each(|&block| least("--curve-blocks", 1, block))?;
        self.ablate_parts.iter().try_for_each(|&part| least("--ablate-parts", 1, part))?;
        least("--curve-length", 2, self.curve_length)?;
        if !(1..=32).contains(&self.singles) {
            return Err(Error::option("--singles", "from 1 to 32", self.singles));
        }
        let Some(path) = &self.plot else { return Ok(()) };
        expect_folder("--plot", path)?;
        for file in ["", "-curves"].into_iter().flat_map(|suffix| plot_files(path, suffix)) {
            expect_folder("--plot", &file)?;
            self.text.as_deref().map_or(Ok(()), |text| expect_other("--plot", &file, "--text", text))?;
        }
        Ok(())
    }
}
