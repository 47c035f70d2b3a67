//! `config.json` of a Hugging Face model folder.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tokenselect::{DType, HeadShape, Rope};

use crate::error::{Error, Result};
use crate::rope_scaling::ScalingFields;

/// Shape and constants of a Llama model.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Tokens; those below 256 are bytes.
    pub vocab_size: usize,
    /// Elements of the residual stream.
    pub hidden_size: usize,
    /// Elements between the two halves of the feed-forward part.
    pub intermediate_size: usize,
    /// Layers.
    pub num_layers: usize,
    /// Attention heads.
    pub heads: HeadShape,
    /// Added to the mean square in every norm.
    pub norm_epsilon: f32,
    /// Position embedding.
    pub rope: Rope,
    /// Type of the KV cache: the type that the model was trained in.
    pub dtype: DType,
    /// Whether the output projection is the embedding.
    pub tied_embeddings: bool,
    /// Whether the four projections of attention have biases.
    pub attention_bias: bool,
    /// Whether the three projections of the feed-forward part have biases.
    pub mlp_bias: bool,
    /// Longest context of the training.
    pub training_context: usize,
}

/// The fields of `config.json` that are read, as they are written there.
#[derive(Debug, Deserialize)]
struct Fields {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: Option<f32>,
    rope_theta: Option<f64>,
    rope_scaling: Option<ScalingFields>,
    /// Newer name of `rope_scaling`, which also holds `rope_theta`.
    rope_parameters: Option<ScalingFields>,
    partial_rotary_factor: Option<f64>,
    max_position_embeddings: Option<usize>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    torch_dtype: Option<String>,
    /// Newer name of `torch_dtype`.
    dtype: Option<String>,
}

/// Sizes above this are taken for damage, so that products of two of them cannot overflow.
const MAX_SIZE: usize = 1 << 24;

impl ModelConfig {
    /// Reads `config.json` in `folder`.
    pub fn load(folder: &Path) -> Result<Self> {
        let file = ConfigFile { path: folder.join("config.json") };
        let bytes = fs::read(&file.path).map_err(Error::read(&file.path))?;
        let fields: Fields = serde_json::from_slice(&bytes)
            .map_err(|source| Error::Json { path: file.path.clone(), source })?;
        file.check_architecture(&fields)?;
        file.interpret(&fields)
    }
}

/// Where errors come from.
#[derive(Debug)]
pub struct ConfigFile {
    path: PathBuf,
}

impl ConfigFile {
    /// The error of a field.
    pub fn error(&self, field: &'static str, rule: impl Into<String>, got: impl ToString) -> Error {
        Error::Config { path: self.path.clone(), field, rule: rule.into(), got: got.to_string() }
    }

    /// The value of a field that must be there.
    pub fn required<T>(&self, field: &'static str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(field, "given", "nothing"))
    }

    /// Checks that a field, where it is given, has the only value that is supported.
    pub fn only<T: PartialEq + Display>(&self, field: &'static str, value: Option<T>, only: T) -> Result<()> {
        match value {
            Some(got) if got != only => Err(self.error(field, only.to_string(), got)),
            _ => Ok(()),
        }
    }

    /// Checks a size.
    fn size(&self, field: &'static str, value: usize) -> Result<usize> {
        if (1..=MAX_SIZE).contains(&value) {
            Ok(value)
        } else {
            Err(self.error(field, format!("from 1 to {MAX_SIZE}"), value))
        }
    }

    /// A size that must be there.
    fn required_size(&self, field: &'static str, value: Option<usize>) -> Result<usize> {
        self.size(field, self.required(field, value)?)
    }

    fn check_architecture(&self, fields: &Fields) -> Result<()> {
        match fields.architectures.as_deref() {
            Some([]) | None => match fields.model_type.as_deref() {
                Some("llama") => Ok(()),
                other => Err(self.error("model_type", "llama", other.unwrap_or("nothing"))),
            },
            Some(names) if names.iter().any(|name| name == "LlamaForCausalLM") => Ok(()),
            Some(names) => Err(self.error("architectures", "LlamaForCausalLM", names.join(", "))),
        }?;
        self.only("hidden_act", fields.hidden_act.as_deref(), "silu")?;
        self.only("partial_rotary_factor", fields.partial_rotary_factor, 1.0)
    }

    fn interpret(&self, fields: &Fields) -> Result<ModelConfig> {
        let vocab_size = self.required_size("vocab_size", fields.vocab_size)?;
        if vocab_size < 256 {
            return Err(self.error("vocab_size", "at least 256, a token for every byte", vocab_size));
        }
        let hidden_size = self.required_size("hidden_size", fields.hidden_size)?;
        let heads = self.heads(fields, hidden_size)?;
        let norm_epsilon = fields.rms_norm_eps.unwrap_or(1e-6);
        if !(norm_epsilon.is_finite() && norm_epsilon > 0.0) {
            return Err(self.error("rms_norm_eps", "finite and above 0", norm_epsilon));
        }
        let training_context =
            self.size("max_position_embeddings", fields.max_position_embeddings.unwrap_or(2048))?;
        let scaling = fields.rope_parameters.as_ref().or(fields.rope_scaling.as_ref());
        let theta = fields.rope_theta.or(scaling.and_then(|fields| fields.rope_theta));
        let rope = Rope {
            theta: theta.unwrap_or(10_000.0),
            scaling: match scaling {
                Some(fields) => fields.interpret(self, training_context)?,
                None => tokenselect::RopeScaling::None,
            },
            ..Rope::default()
        };
        Ok(ModelConfig {
            vocab_size,
            hidden_size,
            intermediate_size: self.required_size("intermediate_size", fields.intermediate_size)?,
            num_layers: self.required_size("num_hidden_layers", fields.num_hidden_layers)?,
            heads,
            norm_epsilon,
            rope,
            dtype: self.dtype(fields)?,
            tied_embeddings: fields.tie_word_embeddings.unwrap_or(false),
            attention_bias: fields.attention_bias.unwrap_or(false),
            mlp_bias: fields.mlp_bias.unwrap_or(false),
            training_context,
        })
    }

    /// Head geometry; `head_dim` defaults to an equal share of the residual stream.
    fn heads(&self, fields: &Fields, hidden_size: usize) -> Result<HeadShape> {
        let num_qo_heads = self.required_size("num_attention_heads", fields.num_attention_heads)?;
        let num_kv_heads =
            self.size("num_key_value_heads", fields.num_key_value_heads.unwrap_or(num_qo_heads))?;
        if !num_qo_heads.is_multiple_of(num_kv_heads) {
            let rule = format!("a divisor of num_attention_heads = {num_qo_heads}");
            return Err(self.error("num_key_value_heads", rule, num_kv_heads));
        }
        let head_dim = match fields.head_dim {
            Some(head_dim) => self.size("head_dim", head_dim)?,
            None if hidden_size.is_multiple_of(num_qo_heads) => hidden_size / num_qo_heads,
            None => {
                let rule = format!("a divisor of hidden_size = {hidden_size} where head_dim is not given");
                return Err(self.error("num_attention_heads", rule, num_qo_heads));
            }
        };
        Ok(HeadShape { num_qo_heads, num_kv_heads, head_dim })
    }

    fn dtype(&self, fields: &Fields) -> Result<DType> {
        let (field, name) = match (&fields.torch_dtype, &fields.dtype) {
            (Some(name), _) => ("torch_dtype", name.as_str()),
            (None, Some(name)) => ("dtype", name.as_str()),
            (None, None) => ("torch_dtype", "float32"),
        };
        match name {
            "bfloat16" => Ok(DType::Bf16),
            "float16" => Ok(DType::F16),
            "float32" => Ok(DType::F32),
            other => Err(self.error(field, "bfloat16, float16 or float32", other)),
        }
    }
}
