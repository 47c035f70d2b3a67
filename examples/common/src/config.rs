//! `config.json` of a Hugging Face model folder.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use tokenselect::{DType, HeadShape, Rope};

use crate::error::{Error, Result};
use crate::family::{Family, Parts};
use crate::rope_scaling;

/// Shape and constants of a model.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Which of the families it is.
    pub family: Family,
    /// Where it has biases and norms beyond the usual ones.
    pub parts: Parts,
    /// Tokens.
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
    /// Longest context of the training.
    pub training_context: usize,
}

/// The fields of `config.json` that are read, as they are written there.
#[derive(Debug, Deserialize)]
pub struct Fields {
    /// Names of classes.
    pub architectures: Option<Vec<String>>,
    /// Name of a family.
    pub model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: Option<f32>,
    /// Base of the frequencies of RoPE.
    pub rope_theta: Option<f64>,
    /// How positions beyond the first training context were trained.
    pub rope_scaling: Option<Map<String, Value>>,
    /// Newer name of `rope_scaling`, which also holds `rope_theta`.
    pub rope_parameters: Option<Map<String, Value>>,
    /// The first training context; mostly in `rope_scaling`.
    pub original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
    max_position_embeddings: Option<usize>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    /// Whether the projections of attention have biases; Llama's and Qwen3's.
    pub attention_bias: Option<bool>,
    /// Whether those of the feed-forward part have; Llama's.
    pub mlp_bias: Option<bool>,
    /// Tokens of an attention window. The outer level says whether the field is there: `null` and nothing differ.
    #[serde(default, deserialize_with = "there")]
    pub sliding_window: Option<Option<u64>>,
    /// Whether there are attention windows; Qwen's.
    pub use_sliding_window: Option<bool>,
    /// The first layer with a window; Qwen's.
    pub max_window_layers: Option<usize>,
    /// Kind of attention of each layer.
    pub layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
    torch_dtype: Option<String>,
    /// Newer name of `torch_dtype`.
    dtype: Option<String>,
}

/// A field that is there, be it `null`.
fn there<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}

/// Sizes above this are taken for damage, so that products of two of them cannot overflow.
pub(crate) const MAX_SIZE: usize = 1 << 24;

impl ModelConfig {
    /// Reads `config.json` in `folder`.
    pub fn load(folder: &Path) -> Result<Self> {
        let file = ConfigFile::of(folder);
        let bytes = fs::read(&file.path).map_err(Error::read(&file.path))?;
        let fields: Fields = serde_json::from_slice(&bytes)
            .map_err(|source| Error::Json { path: file.path.clone(), source })?;
        let family = Family::find(&file, &fields)?;
        file.check_forms(&fields)?;
        file.interpret(family, &fields)
    }

    /// Checks that the weights in `folder` are of as many layers: with fewer it is another model.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check_layers(&self, folder: &Path, in_weights: usize) -> Result<()> {
        // Where there is none, the first tensor that is missing says more.
        if self.num_layers == in_weights || in_weights == 0 {
            return Ok(());
        }
        let rule = format!("{in_weights}, the layers of the weights");
        Err(ConfigFile::of(folder).error("num_hidden_layers", rule, self.num_layers))
    }
}

/// Where errors come from.
#[derive(Debug)]
pub struct ConfigFile {
    path: PathBuf,
}

impl ConfigFile {
    /// That of a model folder.
    pub fn of(folder: &Path) -> Self {
        ConfigFile { path: folder.join("config.json") }
    }

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

    /// The one of two fields that is given. Where both are, they must have the same value.
    pub fn same<T: PartialEq + Display>(
        &self,
        one: (&'static str, Option<T>),
        other: (&'static str, Option<T>),
    ) -> Result<(&'static str, Option<T>)> {
        match (one, other) {
            ((field, Some(got)), (other, Some(other_got))) if got != other_got => {
                let (got, other_got) = (got.to_string(), other_got.to_string());
                Err(Error::ConfigFields { path: self.path.clone(), field, got, other, other_got })
            }
            ((_, None), other) => Ok(other),
            (one, _) => Ok(one),
        }
    }

    /// The fields of an object.
    pub fn parse<T: DeserializeOwned>(&self, object: &Map<String, Value>) -> Result<T> {
        let parsed = serde_json::from_value(Value::Object(object.clone()));
        parsed.map_err(|source| Error::Json { path: self.path.clone(), source })
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

    /// Refuses what every family may have and none is implemented with.
    fn check_forms(&self, fields: &Fields) -> Result<()> {
        self.only("hidden_act", fields.hidden_act.as_deref(), "silu")?;
        self.only("partial_rotary_factor", fields.partial_rotary_factor, 1.0)?;
        match &fields.quantization_config {
            Some(quantization) => {
                let method = quantization.get("quant_method").and_then(|method| method.as_str());
                let rule = "left out, since quantised weights are not read";
                Err(self.error("quantization_config", rule, method.unwrap_or("a method without a name")))
            }
            None => Ok(()),
        }
    }

    fn interpret(&self, family: Family, fields: &Fields) -> Result<ModelConfig> {
        let hidden_size = self.required_size("hidden_size", fields.hidden_size)?;
        let heads = self.heads(family, fields, hidden_size)?;
        let norm_epsilon = fields.rms_norm_eps.unwrap_or(1e-6);
        if !(norm_epsilon.is_finite() && norm_epsilon > 0.0) {
            return Err(self.error("rms_norm_eps", "finite and above 0", norm_epsilon));
        }
        let training_context = self.size(
            "max_position_embeddings",
            fields.max_position_embeddings.unwrap_or(family.default_context()),
        )?;
        let num_layers = self.required_size("num_hidden_layers", fields.num_hidden_layers)?;
        family.check_windows(self, fields, num_layers)?;
        let (theta, scaling) = rope_scaling::interpret(self, fields, training_context)?;
        let rope = Rope { theta: theta.unwrap_or(10_000.0), scaling, ..Rope::default() };
        Ok(ModelConfig {
            family,
            parts: family.parts(fields),
            vocab_size: self.required_size("vocab_size", fields.vocab_size)?,
            hidden_size,
            intermediate_size: self.required_size("intermediate_size", fields.intermediate_size)?,
            num_layers,
            heads,
            norm_epsilon,
            rope,
            dtype: self.dtype(fields)?,
            tied_embeddings: fields.tie_word_embeddings.unwrap_or(false),
            training_context,
        })
    }

    /// Head geometry. What is not given is an equal share of the residual stream, and Llama's KV heads are as many as its query
    /// heads; other families have other defaults, which real models give.
    fn heads(&self, family: Family, fields: &Fields, hidden_size: usize) -> Result<HeadShape> {
        let num_qo_heads = self.required_size("num_attention_heads", fields.num_attention_heads)?;
        let num_kv_heads = match (family, fields.num_key_value_heads) {
            (Family::Llama, None) => num_qo_heads,
            (_, given) => self.required_size("num_key_value_heads", given)?,
        };
        if !num_qo_heads.is_multiple_of(num_kv_heads) {
            let rule = format!("a divisor of num_attention_heads = {num_qo_heads}");
            return Err(self.error("num_key_value_heads", rule, num_kv_heads));
        }
        let head_dim = match fields.head_dim {
            Some(head_dim) => self.size("head_dim", head_dim)?,
            None if family == Family::Qwen3 => self.required_size("head_dim", None)?,
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
