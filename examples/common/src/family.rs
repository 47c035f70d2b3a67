//! The families of models that are read, what tells them apart, and which of their forms are refused.

use crate::config::{ConfigFile, Fields};
use crate::error::Result;

/// A family of models, all of which are Llama's forward pass with small differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Biases where the configuration says so.
    Llama,
    /// No biases; sliding windows in early models, which are refused.
    Mistral,
    /// Biases of queries, keys and values.
    Qwen2,
    /// A norm of each query's and each key's head.
    Qwen3,
}

/// Where biases and norms are, beyond the weights that every family has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts {
    /// Biases of the projections to queries, keys and values.
    pub qkv_bias: bool,
    /// Bias of the projection behind attention.
    pub output_bias: bool,
    /// Biases of the three projections of the feed-forward part.
    pub mlp_bias: bool,
    /// RMS norm of every head of queries and keys, before RoPE.
    pub head_norms: bool,
}

impl Family {
    /// All of them.
    pub const ALL: [Family; 4] = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];

    /// Its name in `architectures`.
    pub fn architecture(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// Its name in `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }

    /// What `max_position_embeddings` is where it is not given.
    pub fn default_context(self) -> usize {
        match self {
            Family::Llama => 2048,
            Family::Mistral => 131_072,
            Family::Qwen2 | Family::Qwen3 => 32_768,
        }
    }

    /// The family of a configuration. Others are refused: they have parts that are not implemented.
    pub fn find(file: &ConfigFile, fields: &Fields) -> Result<Self> {
        let names = |name: fn(Family) -> &'static str| Family::ALL.map(name).join(" or ");
        let by_type = |name: &str| Family::ALL.into_iter().find(|family| family.model_type() == name);
        let by_name = |name: &String| Family::ALL.into_iter().find(|family| family.architecture() == name);
        let model_type = fields.model_type.as_deref();
        let family = match fields.architectures.as_deref() {
            Some([]) | None => match model_type.and_then(by_type) {
                Some(family) => return Ok(family),
                None => {
                    let got = model_type.unwrap_or("nothing");
                    return Err(file.error("model_type", names(Family::model_type), got));
                }
            },
            Some(given) => match given.iter().find_map(by_name) {
                Some(family) => family,
                None => {
                    return Err(file.error("architectures", names(Family::architecture), given.join(", ")));
                }
            },
        };
        // Whatever else it is, it computes something else.
        file.only("model_type", model_type, family.model_type())?;
        Ok(family)
    }

    /// Which biases and norms the model has.
    pub fn parts(self, fields: &Fields) -> Parts {
        let attention_bias = fields.attention_bias.unwrap_or(false);
        let none = Parts { qkv_bias: false, output_bias: false, mlp_bias: false, head_norms: false };
        match self {
            Family::Llama => Parts {
                qkv_bias: attention_bias,
                output_bias: attention_bias,
                mlp_bias: fields.mlp_bias.unwrap_or(false),
                ..none
            },
            Family::Mistral => none,
            Family::Qwen2 => Parts { qkv_bias: true, ..none },
            Family::Qwen3 => {
                Parts { qkv_bias: attention_bias, output_bias: attention_bias, head_norms: true, ..none }
            }
        }
    }

    /// Refuses models whose layers attend to a window alone: dense attention would be another model.
    pub fn check_windows(self, file: &ConfigFile, fields: &Fields, num_layers: usize) -> Result<()> {
        let mut types = fields.layer_types.iter().flatten();
        if let Some(other) = types.find(|name| *name != "full_attention") {
            return Err(file.error("layer_types", "full_attention in every layer", other));
        }
        const RULE: &str = "null, since sliding windows are not implemented";
        match (self, fields.sliding_window) {
            (_, Some(None)) => Ok(()),
            (Family::Llama, None) => Ok(()),
            (Family::Mistral, None) => {
                Err(file.error("sliding_window", RULE, "nothing, which stands for 4096 in this family"))
            }
            (Family::Llama | Family::Mistral, Some(Some(window))) => {
                Err(file.error("sliding_window", RULE, window))
            }
            (Family::Qwen2 | Family::Qwen3, _) => {
                // Layers from this one on have windows, unless their types say that none has.
                let first = fields.max_window_layers.unwrap_or(28);
                let slides = fields.layer_types.is_none() && first < num_layers;
                if fields.use_sliding_window.unwrap_or(false) && slides {
                    let rule = "false, since sliding windows are not implemented";
                    return Err(file.error("use_sliding_window", rule, true));
                }
                Ok(())
            }
        }
    }
}
