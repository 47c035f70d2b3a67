//! Rotary embedding in f64, written from the models' reference code; the other half of `naive.rs`.

use std::f64::consts::TAU;

#[derive(Clone, Copy, Debug)]
pub enum Scaling {
    None,
    Linear { factor: f64 },
    Llama3 { factor: f64, low: f64, high: f64, original: f64 },
    Yarn { factor: f64, original: f64, fast: f64, slow: f64, magnitude: Option<f64> },
}

#[derive(Clone, Copy, Debug)]
pub struct Rope {
    pub theta: f64,
    pub rotary_dim: usize,
    pub interleaved: bool,
    pub scaling: Scaling,
}

impl Rope {
    fn frequency(&self, pair: usize) -> f64 {
        let dim = self.rotary_dim as f64;
        let plain = self.theta.powf(-2.0 * pair as f64 / dim);
        match self.scaling {
            Scaling::None => plain,
            Scaling::Linear { factor } => plain / factor,
            Scaling::Llama3 { factor, low, high, original } => {
                let wavelength = TAU / plain;
                if wavelength < original / high {
                    return plain;
                }
                if wavelength > original / low {
                    return plain / factor;
                }
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 - smooth) * plain / factor + smooth * plain
            }
            Scaling::Yarn { factor, original, fast, slow, .. } => {
                let dim_of = |turns: f64| dim * (original / (turns * TAU)).ln() / (2.0 * self.theta.ln());
                let (from, to) = (dim_of(fast).floor().max(0.0), dim_of(slow).ceil().min(dim - 1.0));
                let width = if from == to { 0.001 } else { to - from };
                let ramp = ((pair as f64 - from) / width).clamp(0.0, 1.0);
                plain / factor * ramp + plain * (1.0 - ramp)
            }
        }
    }

    /// Factor on rotated elements.
    pub fn magnitude(&self) -> f64 {
        match self.scaling {
            Scaling::Yarn { magnitude: Some(given), .. } => given,
            Scaling::Yarn { factor, .. } if factor > 1.0 => 0.1 * factor.ln() + 1.0,
            _ => 1.0,
        }
    }

    pub fn rotate(&self, head: &mut [f64], position: usize) {
        let magnitude = self.magnitude();
        for pair in 0..self.rotary_dim / 2 {
            let (i, j) = match self.interleaved {
                true => (2 * pair, 2 * pair + 1),
                false => (pair, pair + self.rotary_dim / 2),
            };
            let (sin, cos) = (position as f64 * self.frequency(pair)).sin_cos();
            let (x, y) = (head[i], head[j]);
            head[i] = (x * cos - y * sin) * magnitude;
            head[j] = (y * cos + x * sin) * magnitude;
        }
    }
}
