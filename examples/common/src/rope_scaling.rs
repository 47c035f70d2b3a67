//! `rope_scaling` of `config.json`: how positions beyond the first training context were trained.

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenselect::RopeScaling;

use crate::config::{ConfigFile, Fields};
use crate::error::Result;

/// The base of the frequencies, where it is given, and their scaling, of a model for `training_context` tokens. What is written in
/// two places must be the same.
pub fn interpret(
    file: &ConfigFile,
    fields: &Fields,
    training_context: usize,
) -> Result<(Option<f64>, RopeScaling)> {
    let older = ScalingFields::parse(file, "rope_scaling", fields.rope_scaling.as_ref())?;
    let newer = ScalingFields::parse(file, "rope_parameters", fields.rope_parameters.as_ref())?;
    let mut theta = ("rope_theta", fields.rope_theta);
    let mut first_context = ("original_max_position_embeddings", fields.original_max_position_embeddings);
    for (part, names) in [
        (&newer, ["rope_parameters.rope_theta", "rope_parameters.original_max_position_embeddings"]),
        (&older, ["rope_scaling.rope_theta", "rope_scaling.original_max_position_embeddings"]),
    ] {
        let Some(part) = part else { continue };
        theta = file.same(theta, (names[0], part.rope_theta))?;
        first_context = file.same(first_context, (names[1], part.original_max_position_embeddings))?;
    }
    let first_context = first_context.1.unwrap_or(training_context as f64);
    let scaling = |part: &Option<ScalingFields>| match part {
        Some(part) => part.interpret(file, first_context),
        None => Ok(RopeScaling::None),
    };
    let (old, new) = (scaling(&older)?, scaling(&newer)?);
    if older.is_some() && new != RopeScaling::None && old != new {
        let value = |object: &Option<Map<String, Value>>| object.clone().map(Value::Object);
        let (old, new) = (value(&fields.rope_scaling), value(&fields.rope_parameters));
        file.same(("rope_scaling", old), ("rope_parameters", new))?;
    }
    Ok((theta.1, if old == RopeScaling::None { new } else { old }))
}

/// The fields of `rope_scaling` (or `rope_parameters`) that are read, as they are written there.
#[derive(Debug, Deserialize)]
struct ScalingFields {
    /// Base of the frequencies, where it is written here.
    rope_theta: Option<f64>,
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
    /// Those of an object. One without fields says as much as none.
    fn parse(
        file: &ConfigFile,
        name: &'static str,
        object: Option<&Map<String, Value>>,
    ) -> Result<Option<Self>> {
        let Some(object) = object.filter(|object| !object.is_empty()) else { return Ok(None) };
        match object.iter().find(|(_, value)| value.is_object()) {
            Some((layers, _)) => {
                let rule = "the same for all layers, not an object for each type of layer";
                Err(file.error(name, rule, format!("one for `{layers}`")))
            }
            None => file.parse(object).map(Some),
        }
    }

    /// The scaling that the fields describe, for a model that was first trained with `first_context` tokens.
    fn interpret(&self, file: &ConfigFile, first_context: f64) -> Result<RopeScaling> {
        file.only("rope_scaling.partial_rotary_factor", self.partial_rotary_factor, 1.0)?;
        let factor = || file.required("rope_scaling.factor", self.factor);
        match self.rope_type.as_deref().or(self.old_type.as_deref()) {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: factor()? }),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: file.required("rope_scaling.low_freq_factor", self.low_freq_factor)?,
                high_freq_factor: file.required("rope_scaling.high_freq_factor", self.high_freq_factor)?,
                original_max_position: first_context,
            }),
            Some("yarn") => {
                file.only("rope_scaling.truncate", self.truncate, true)?;
                let factor = factor()?;
                Ok(RopeScaling::Yarn {
                    factor,
                    original_max_position: first_context,
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
