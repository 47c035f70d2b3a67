//! Weights of a model, in f32.

use std::path::Path;

use crate::checkpoint::{Checkpoint, WeightFiles};
use crate::config::{ConfigFile, ModelConfig};
use crate::error::{Error, Result};
use crate::linear::Linear;

/// A model: Llama's forward pass, with the parts of its family.
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
    /// `[head_dim]` each: weights of the norms of every head of queries and of keys, where the family has them.
    pub head_norms: Option<[Vec<f32>; 2]>,
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
    ///
    /// # Errors
    /// Folders that are damaged, and models that have parts which are not implemented.
    pub fn load(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::NoFolder { path: folder.to_owned() });
        }
        let config = ModelConfig::load(folder)?;
        let files = WeightFiles::read(folder)?;
        let checkpoint = files.parse()?;
        config.check_layers(folder, checkpoint.num_layers())?;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = checkpoint.tensor("model.embed_tokens.weight", [vocab, hidden])?;
        let model = Model {
            name: folder.file_name().unwrap_or(folder.as_os_str()).display().to_string(),
            layers: (0..config.num_layers)
                .map(|layer| Layer::load(&checkpoint, &config, layer))
                .collect::<Result<_>>()?,
            final_norm: checkpoint.tensor("model.norm.weight", [hidden])?,
            output: output(folder, &checkpoint, &config, &embedding)?,
            embedding,
            config,
        };
        checkpoint.finish()?;
        Ok(model)
    }

    /// Copies the embeddings of `tokens` to `x`, `[tokens.len(), hidden_size]`.
    ///
    /// # Errors
    /// [`Error::Token`].
    pub fn embed(&self, tokens: &[u32], x: &mut [f32]) -> Result<()> {
        let (width, vocab_size) = (self.config.hidden_size, self.config.vocab_size);
        for (row, &id) in x.chunks_exact_mut(width).zip(tokens) {
            match self.embedding.chunks_exact(width).nth(id as usize) {
                Some(embedding) => row.copy_from_slice(embedding),
                None => return Err(Error::Token { id, vocab_size }),
            }
        }
        Ok(())
    }
}

/// The projection to logits: the embedding, where the two are tied.
fn output(
    folder: &Path,
    checkpoint: &Checkpoint<'_>,
    config: &ModelConfig,
    embedding: &[f32],
) -> Result<Linear> {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    if !config.tied_embeddings {
        return Linear::load(checkpoint, "lm_head", hidden, vocab);
    }
    // Some files hold a copy. Another matrix would mean that the two are not tied.
    if checkpoint.has("lm_head.weight") {
        let copy = checkpoint.tensor("lm_head.weight", [vocab, hidden])?;
        if copy.iter().zip(embedding).any(|(copy, element)| copy.to_bits() != element.to_bits()) {
            let rule = "false where lm_head.weight is not model.embed_tokens.weight";
            return Err(ConfigFile::of(folder).error("tie_word_embeddings", rule, true));
        }
    }
    Ok(Linear::from_weight(embedding.to_vec(), hidden, vocab))
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
        let parts = config.parts;
        let attention = |part: &str, inputs, outputs, has_bias| {
            linear(&format!("self_attn.{part}_proj"), inputs, outputs, has_bias)
        };
        let mlp = |part: &str, inputs, outputs| {
            linear(&format!("mlp.{part}_proj"), inputs, outputs, parts.mlp_bias)
        };
        let head_norm = |part: &str| {
            let name = format!("model.layers.{layer}.self_attn.{part}_norm.weight");
            checkpoint.tensor(&name, [config.heads.head_dim])
        };
        Ok(Layer {
            attention_norm: norm("input_layernorm")?,
            q: attention("q", hidden, q_width, parts.qkv_bias)?,
            k: attention("k", hidden, kv_width, parts.qkv_bias)?,
            v: attention("v", hidden, kv_width, parts.qkv_bias)?,
            head_norms: if parts.head_norms { Some([head_norm("q")?, head_norm("k")?]) } else { None },
            o: attention("o", q_width, hidden, parts.output_bias)?,
            mlp_norm: norm("post_attention_layernorm")?,
            gate: mlp("gate", hidden, config.intermediate_size)?,
            up: mlp("up", hidden, config.intermediate_size)?,
            down: mlp("down", config.intermediate_size, hidden)?,
        })
    }
}
