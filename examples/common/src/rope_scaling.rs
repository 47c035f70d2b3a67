//! `rope_scaling` of `config.json`: how positions beyond the first training context were trained.

use serde::Deserialize;
use tokenselect::RopeScaling;

use crate::config::ConfigFile;
use crate::error::Result;

/// The fields of `rope_scaling` (or `rope_parameters`) that are read, as they are written there.
#[derive(Debug, Deserialize)]
pub struct ScalingFields {
    /// Base of the frequencies, where it is written here.
    pub rope_theta: Option<f64>,
    rope_type: Option<String>,
    /// Older name of `rope_type`.
    #[serde(rename = "type")]
    old_type: Option<String>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    partial_rotary_factor: Option<f64>,
}

impl ScalingFields {
    /// The scaling that the fields describe, for a model of `training_context` tokens.
    pub fn interpret(&self, file: &ConfigFile, training_context: usize) -> Result<RopeScaling> {
        file.only("rope_scaling.partial_rotary_factor", self.partial_rotary_factor, 1.0)?;
        let factor = || file.required("rope_scaling.factor", self.factor);
        match self.rope_type.as_deref().or(self.old_type.as_deref()) {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: factor()? }),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: file.required("rope_scaling.low_freq_factor", self.low_freq_factor)?,
                high_freq_factor: file.required("rope_scaling.high_freq_factor", self.high_freq_factor)?,
                original_max_position: file.required(
                    "rope_scaling.original_max_position_embeddings",
                    self.original_max_position_embeddings,
                )?,
            }),
            Some("yarn") => {
                file.only("rope_scaling.truncate", self.truncate, true)?;
                let factor = factor()?;
                Ok(RopeScaling::Yarn {
                    factor,
                    original_max_position: self
                        .original_max_position_embeddings
                        .unwrap_or(training_context as f64),
                    beta_fast: self.beta_fast.unwrap_or(32.0),
                    beta_slow: self.beta_slow.unwrap_or(1.0),
                    attention_factor: self.attention_factor.or(self.attention_factor_of_mscale(factor)),
                })
            }
            Some(other) => {
                Err(file.error("rope_scaling.rope_type", "default, linear, llama3 or yarn", other))
            }
        }
    }

    /// YaRN's factor on rotated vectors where it is given as the quotient of two.
    fn attention_factor_of_mscale(&self, factor: f64) -> Option<f64> {
        let scale = |weight: f64| if factor > 1.0 { 0.1 * weight * factor.ln() + 1.0 } else { 1.0 };
        match (self.mscale, self.mscale_all_dim) {
            (Some(one), Some(all)) if one != 0.0 && all != 0.0 => Some(scale(one) / scale(all)),
            _ => None,
        }
    }
}
