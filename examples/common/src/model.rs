//! Weights of a Llama model, in f32.

use std::path::Path;

use crate::checkpoint::{Checkpoint, WeightFiles};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::linear::Linear;

/// A Llama model.
#[derive(Debug)]
pub struct Model {
    /// Name of its folder.
    pub name: String,
    /// Shape and constants.
    pub config: ModelConfig,
    /// `[vocab_size, hidden_size]`: a row for every token.
    pub embedding: Vec<f32>,
    /// The layers, first to last.
    pub layers: Vec<Layer>,
    /// `[hidden_size]`: weight of the last norm.
    pub final_norm: Vec<f32>,
    /// Residual stream to logits.
    pub output: Linear,
}

/// One layer: attention, then the feed-forward part.
#[derive(Debug)]
pub struct Layer {
    /// `[hidden_size]`: weight of the norm before attention.
    pub attention_norm: Vec<f32>,
    /// Residual stream to queries.
    pub q: Linear,
    /// Residual stream to keys.
    pub k: Linear,
    /// Residual stream to values.
    pub v: Linear,
    /// Attention output to residual stream.
    pub o: Linear,
    /// `[hidden_size]`: weight of the norm before the feed-forward part.
    pub mlp_norm: Vec<f32>,
    /// Residual stream to gate.
    pub gate: Linear,
    /// Residual stream to what is gated.
    pub up: Linear,
    /// Feed-forward part to residual stream.
    pub down: Linear,
}

impl Model {
    /// Reads a model folder.
    pub fn load(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::NoFolder { path: folder.to_owned() });
        }
        let config = ModelConfig::load(folder)?;
        let files = WeightFiles::read(folder)?;
        let checkpoint = files.parse()?;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = checkpoint.tensor("model.embed_tokens.weight", [vocab, hidden])?;
        let output = if config.tied_embeddings {
            Linear::from_weight(embedding.clone(), hidden, vocab)
        } else {
            Linear::load(&checkpoint, "lm_head", hidden, vocab)?
        };
        Ok(Model {
            name: folder.file_name().unwrap_or(folder.as_os_str()).display().to_string(),
            layers: (0..config.num_layers)
                .map(|layer| Layer::load(&checkpoint, &config, layer))
                .collect::<Result<_>>()?,
            final_norm: checkpoint.tensor("model.norm.weight", [hidden])?,
            embedding,
            output,
            config,
        })
    }

    /// Copies the embeddings of `bytes` to `x`, `[bytes.len(), hidden_size]`.
    pub fn embed(&self, bytes: &[u8], x: &mut [f32]) {
        let width = self.config.hidden_size;
        for (row, &byte) in x.chunks_exact_mut(width).zip(bytes) {
            row.copy_from_slice(&self.embedding[usize::from(byte) * width..][..width]);
        }
    }
}

impl Layer {
    fn load(checkpoint: &Checkpoint<'_>, config: &ModelConfig, layer: usize) -> Result<Self> {
        let hidden = config.hidden_size;
        let q_width = config.heads.num_qo_heads * config.heads.head_dim;
        let kv_width = config.heads.num_kv_heads * config.heads.head_dim;
        let norm = |part: &str| checkpoint.tensor(&format!("model.layers.{layer}.{part}.weight"), [hidden]);
        let linear = |part: &str, inputs: usize, outputs: usize, has_bias: bool| {
            let name = format!("model.layers.{layer}.{part}");
            Linear::load(checkpoint, &name, inputs, outputs)?.with_bias(checkpoint, &name, has_bias)
        };
        let attention = |part: &str, inputs, outputs| {
            linear(&format!("self_attn.{part}_proj"), inputs, outputs, config.attention_bias)
        };
        let mlp = |part: &str, inputs, outputs| {
            linear(&format!("mlp.{part}_proj"), inputs, outputs, config.mlp_bias)
        };
        Ok(Layer {
            attention_norm: norm("input_layernorm")?,
            q: attention("q", hidden, q_width)?,
            k: attention("k", hidden, kv_width)?,
            v: attention("v", hidden, kv_width)?,
            o: attention("o", q_width, hidden)?,
            mlp_norm: norm("post_attention_layernorm")?,
            gate: mlp("gate", hidden, config.intermediate_size)?,
            up: mlp("up", hidden, config.intermediate_size)?,
            down: mlp("down", config.intermediate_size, hidden)?,
        })
    }
}
