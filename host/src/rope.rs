//! Rotary position embedding (RoPE): frequencies with their scalings, and the rotation itself.

use std::f64::consts::TAU;
use std::fmt;
use std::sync::{Arc, OnceLock};

use tokenselect_kernels::common::rope::RopeTables;
use tokenselect_kernels::simt::global::GlobalPtr;

use crate::driver::Driver;
use crate::error::{Error, Result};
use crate::memory::DeviceMemory;

/// Which elements of a head form a rotated pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RopePairing {
    /// `i` with `i + rotary_dim / 2`: Llama and Qwen in the Hugging Face layout.
    #[default]
    HalfSplit,
    /// `2 i` with `2 i + 1`: GPT-J, GLM, and Llama in Meta's layout.
    Interleaved,
}

/// How frequencies are stretched for contexts beyond the training length.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum RopeScaling {
    /// Frequencies as trained.
    #[default]
    None,
    /// Position interpolation: every frequency divided by `factor`.
    Linear {
        /// Stretch, above 0.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Stretch of the low frequencies, above 0.
        factor: f64,
        /// Wavelengths above `original_max_position / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position / high_freq_factor` are kept; above `low_freq_factor`.
        high_freq_factor: f64,
        /// Training context in tokens.
        original_max_position: f64,
    },
    /// YaRN (arXiv 2309.00071): a ramp over dimensions between interpolation and extrapolation, and a
    /// factor on the rotated vectors.
    Yarn {
        /// Stretch, above 0.
        factor: f64,
        /// Training context in tokens.
        original_max_position: f64,
        /// Rotations over the training context above which a dimension is kept; usually 32.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated; usually 1.
        beta_slow: f64,
        /// Factor on rotated queries and keys; `None` stands for `0.1 ln(factor) + 1`.
        attention_factor: Option<f64>,
    },
}

/// Parameters of a model's rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequencies: pair `i` turns by `theta^(-2 i / rotary_dim)` radians a token.
    pub theta: f64,
    /// How many leading elements of a head are rotated, an even number; `None` for all.
    pub rotary_dim: Option<usize>,
    /// Which elements form a pair.
    pub pairing: RopePairing,
    /// Stretching of the frequencies.
    pub scaling: RopeScaling,
}

impl Default for Rope {
    fn default() -> Self {
        Rope {
            theta: 10_000.0,
            rotary_dim: None,
            pairing: RopePairing::default(),
            scaling: RopeScaling::default(),
        }
    }
}

impl Rope {
    /// Checks every field for heads of `head_dim` elements.
    ///
    /// # Errors
    /// [`Error::Config`], naming the field.
    pub fn validate(&self, head_dim: usize) -> Result<()> {
        positive("rope.theta", self.theta)?;
        if self.theta <= 1.0 {
            return Err(Error::config("rope.theta", "above 1", self.theta));
        }
        let rotary_dim = self.rotary_dim(head_dim);
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim {
            let rule = format!("even, from 2 to head_dim = {head_dim}");
            return Err(Error::config("rope.rotary_dim", rule, rotary_dim));
        }
        match self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("rope.scaling.factor", factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                positive("rope.scaling.factor", factor)?;
                positive("rope.scaling.low_freq_factor", low_freq_factor)?;
                positive("rope.scaling.high_freq_factor", high_freq_factor)?;
                positive("rope.scaling.original_max_position", original_max_position)?;
                if high_freq_factor <= low_freq_factor {
                    let rule = format!("above low_freq_factor = {low_freq_factor}");
                    return Err(Error::config("rope.scaling.high_freq_factor", rule, high_freq_factor));
                }
                Ok(())
            }
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor } => {
                positive("rope.scaling.factor", factor)?;
                positive("rope.scaling.original_max_position", original_max_position)?;
                positive("rope.scaling.beta_slow", beta_slow)?;
                positive("rope.scaling.beta_fast", beta_fast)?;
                positive("rope.scaling.attention_factor", attention_factor.unwrap_or(1.0))?;
                if beta_fast < beta_slow {
                    let rule = format!("at least beta_slow = {beta_slow}");
                    return Err(Error::config("rope.scaling.beta_fast", rule, beta_fast));
                }
                Ok(())
            }
        }
    }

    /// Elements of a head that are rotated.
    pub fn rotary_dim(&self, head_dim: usize) -> usize {
        self.rotary_dim.unwrap_or(head_dim)
    }

    /// Radians a token by which each pair turns, `[rotary_dim / 2]`, scaling applied.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        let dim = self.rotary_dim(head_dim) as f64;
        let plain = (0..self.rotary_dim(head_dim) / 2).map(|i| self.theta.powf(-2.0 * i as f64 / dim));
        match self.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => plain
                .map(|f| {
                    let rotations = original_max_position * f / TAU;
                    let keep = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let keep = keep.clamp(0.0, 1.0);
                    f * (keep + (1.0 - keep) / factor)
                })
                .collect(),
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, .. } => {
                let dim_of = |rotations: f64| {
                    dim * (original_max_position / (rotations * TAU)).ln() / (2.0 * self.theta.ln())
                };
                let low = dim_of(beta_fast).floor().max(0.0);
                let high = dim_of(beta_slow).ceil().min(dim - 1.0);
                let width = if high == low { 0.001 } else { high - low };
                plain
                    .enumerate()
                    .map(|(i, f)| {
                        let interpolate = ((i as f64 - low) / width).clamp(0.0, 1.0);
                        f * (1.0 - interpolate + interpolate / factor)
                    })
                    .collect()
            }
        }
    }

    /// Factor on rotated vectors: 1 but for YaRN.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor: Some(given), .. } => given,
            RopeScaling::Yarn { factor, .. } if factor > 1.0 => 0.1 * factor.ln() + 1.0,
            _ => 1.0,
        }
    }
}

fn positive(field: &'static str, got: f64) -> Result<()> {
    if got.is_finite() && got > 0.0 { Ok(()) } else { Err(Error::config(field, "finite and above 0", got)) }
}

/// Cosines and sines of every position below a maximum, in two levels.
///
/// `angle(p) = angle(256 * (p / 256)) + angle(p % 256)`, and the rotation of a sum is the product of the
/// rotations, so two short tables serve a million positions; both are made in f64 and kept in f32, which
/// costs a relative error of about 2e-7.
#[derive(Clone)]
pub struct RopeTable {
    pairs: usize,
    pairing: RopePairing,
    max_positions: usize,
    /// `[ceil(max_positions / 256), pairs]` (cos, sin) of positions that are multiples of 256.
    coarse: Vec<(f32, f32)>,
    /// `[256, pairs]` (cos, sin) of positions below 256, times the attention factor.
    fine: Vec<(f32, f32)>,
    on_device: OnceLock<Arc<DeviceMemory>>,
}

/// Positions covered by the fine level of a [`RopeTable`].
const FINE: usize = tokenselect_kernels::common::rope::FINE as usize;

impl RopeTable {
    /// Tables for heads of `head_dim` elements and positions below `max_positions`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(rope: &Rope, head_dim: usize, max_positions: usize) -> Result<Self> {
        let frequencies = rope.inverse_frequencies(head_dim);
        let level = |count: usize, step: usize, factor: f64| {
            let mut level = Vec::new();
            let len = count.saturating_mul(frequencies.len());
            level.try_reserve_exact(len).map_err(|_| Error::OutOfMemory {
                device: "cpu".into(),
                what: "the angles of positions",
                bytes: len.saturating_mul(8),
            })?;
            for i in 0..count {
                level.extend(frequencies.iter().map(|f| {
                    let (sin, cos) = ((i * step) as f64 * f).sin_cos();
                    ((cos * factor) as f32, (sin * factor) as f32)
                }));
            }
            Ok(level)
        };
        Ok(RopeTable {
            pairs: frequencies.len(),
            pairing: rope.pairing,
            max_positions,
            coarse: level(max_positions.div_ceil(FINE).max(1), FINE, 1.0)?,
            fine: level(FINE, 1, rope.attention_factor())?,
            on_device: OnceLock::new(),
        })
    }

    /// Bytes of the tables that [`new`](Self::new) would make. `None` where they cannot be counted.
    pub(crate) fn num_bytes(rope: &Rope, head_dim: usize, max_positions: usize) -> Option<usize> {
        let entries = max_positions.div_ceil(FINE).max(1).checked_add(FINE)?;
        entries.checked_mul(rope.rotary_dim(head_dim) / 2)?.checked_mul(size_of::<(f32, f32)>())
    }

    /// Bytes of the tables.
    #[cfg(test)]
    pub(crate) fn table_bytes(&self) -> usize {
        (self.coarse.len() + self.fine.len()) * size_of::<(f32, f32)>()
    }

    /// The first position that the table does not cover.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Rotated pairs of a head, `rotary_dim / 2`.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// Writes cosine and sine of every pair at `position`, each `[pairs]`.
    #[inline(always)]
    pub(crate) fn fill(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        let coarse = &self.coarse[position / FINE * self.pairs..][..self.pairs];
        let fine = &self.fine[position % FINE * self.pairs..][..self.pairs];
        for (((c, s), a), b) in cos.iter_mut().zip(sin.iter_mut()).zip(coarse).zip(fine) {
            *c = a.0 * b.0 - a.1 * b.1;
            *s = a.1 * b.0 + a.0 * b.1;
        }
    }

    /// Rotates the leading elements of one head by the angles that [`fill`](Self::fill) wrote.
    #[inline(always)]
    pub(crate) fn apply(&self, head: &mut [f32], cos: &[f32], sin: &[f32]) {
        match self.pairing {
            RopePairing::HalfSplit => {
                let (low, rest) = head.split_at_mut(self.pairs);
                for (((x, y), c), s) in low.iter_mut().zip(rest).zip(cos).zip(sin) {
                    (*x, *y) = (*x * c - *y * s, *y * c + *x * s);
                }
            }
            RopePairing::Interleaved => {
                for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                    (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s);
                }
            }
        }
    }

    /// The tables in the memory of a GPU, copied there at the first call.
    pub(crate) fn device_tables(&self, driver: &Arc<dyn Driver>) -> Result<RopeTables> {
        let memory = match self.on_device.get() {
            Some(memory) => memory,
            None => {
                let angles = self.coarse.iter().chain(&self.fine);
                let bytes: Vec<u8> =
                    angles.flat_map(|(cos, sin)| [cos.to_ne_bytes(), sin.to_ne_bytes()]).flatten().collect();
                let fresh = Arc::new(DeviceMemory::from_bytes(driver, &bytes)?);
                self.on_device.get_or_init(|| fresh)
            }
        };
        memory.slice().expect_on(driver, "rope table")?;
        let coarse = memory.slice().addr();
        Ok(RopeTables {
            coarse: GlobalPtr::from_addr(coarse),
            fine: GlobalPtr::from_addr(coarse + 8 * self.coarse.len() as u64),
            pairs: self.pairs as u32,
            pairing: match self.pairing {
                RopePairing::HalfSplit => tokenselect_kernels::common::rope::HALF_SPLIT,
                RopePairing::Interleaved => tokenselect_kernels::common::rope::INTERLEAVED,
            },
        })
    }

    /// Rotates one head (`[head_dim]` f32) as at `position`.
    ///
    /// # Errors
    /// [`Error::Index`] where `position` is not below [`max_positions`](Self::max_positions),
    /// [`Error::Length`] where the head is shorter than the rotated part.
    pub fn rotate(&self, head: &mut [f32], position: usize) -> Result<()> {
        if position >= self.max_positions {
            return Err(Error::Index { what: "position", limit: self.max_positions, got: position });
        }
        if head.len() < 2 * self.pairs {
            let shape = [2 * self.pairs].into();
            return Err(Error::Length { what: "head", shape, needed: 2 * self.pairs, got: head.len() });
        }
        let (mut cos, mut sin) = (vec![0.0; self.pairs], vec![0.0; self.pairs]);
        self.fill(position, &mut cos, &mut sin);
        self.apply(head, &cos, &sin);
        Ok(())
    }
}

impl fmt::Debug for RopeTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RopeTable({} pairs, {} positions)", self.pairs, self.max_positions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, want: f64) {
        assert!((got - want).abs() <= 1e-9 * want.abs(), "{got} is not {want}");
    }

    #[test]
    fn two_levels_equal_one_angle() {
        let rope = Rope { theta: 500_000.0, ..Rope::default() };
        let table = RopeTable::new(&rope, 64, 3_000_000).expect("memory");
        for position in [0usize, 1, 255, 256, 257, 100_003, 2_999_999] {
            for (i, f) in rope.inverse_frequencies(64).iter().enumerate() {
                let mut head = vec![0.0f32; 64];
                head[i] = 1.0;
                table.rotate(&mut head, position).expect("in range");
                let (sin, cos) = (position as f64 * f).sin_cos();
                assert!((head[i] as f64 - cos).abs() < 3e-7, "cos of pair {i} at {position}");
                assert!((head[i + 32] as f64 - sin).abs() < 3e-7, "sin of pair {i} at {position}");
            }
        }
        let text = table.rotate(&mut [0.0; 64], 3_000_000).expect_err("one too far").to_string();
        assert_eq!(text, "`position` must be below 3000000, got 3000000");
    }

    #[test]
    fn interleaved_pairs_are_neighbours() {
        let rope = Rope { pairing: RopePairing::Interleaved, rotary_dim: Some(4), ..Rope::default() };
        let table = RopeTable::new(&rope, 8, 16).expect("memory");
        let mut head = [0.0, 0.0, 1.0, 0.0, 5.0, 6.0, 7.0, 8.0];
        table.rotate(&mut head, 3).expect("in range");
        let (sin, cos) = (3.0 * 10_000f64.powf(-0.5)).sin_cos();
        assert!((head[2] as f64 - cos).abs() < 1e-6 && (head[3] as f64 - sin).abs() < 1e-6);
        assert_eq!(head[4..], [5.0, 6.0, 7.0, 8.0], "beyond rotary_dim nothing moves");
    }

    /// Frequencies computed by hand from the definitions in the models' reference code.
    #[test]
    fn scalings_stretch_low_frequencies_only() {
        let base = Rope { theta: 500_000.0, ..Rope::default() };
        let plain = base.inverse_frequencies(128);
        let llama3 = Rope {
            scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position: 8192.0,
            },
            ..base
        };
        let scaled = llama3.inverse_frequencies(128);
        close(scaled[0], 1.0);
        close(scaled[63], plain[63] / 8.0);
        // Pair 30: wavelength 2 pi / 2.13e-3 = 2948 tokens, 2.778 rotations, so 59 % is kept.
        let keep = (8192.0 * plain[30] / TAU - 1.0) / 3.0;
        assert!((0.5..0.7).contains(&keep));
        close(scaled[30], (1.0 - keep) * plain[30] / 8.0 + keep * plain[30]);

        let yarn = Rope {
            theta: 1_000_000.0,
            scaling: RopeScaling::Yarn {
                factor: 4.0,
                original_max_position: 32_768.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor: None,
            },
            ..base
        };
        close(yarn.attention_factor(), 0.1 * 4f64.ln() + 1.0);
        let plain = Rope { scaling: RopeScaling::None, ..yarn }.inverse_frequencies(128);
        let scaled = yarn.inverse_frequencies(128);
        // Correction dims: 128 ln(32768 / (32 tau)) / (2 ln 1e6) = 23.6 and, for 1 rotation, 39.7.
        close(scaled[23], plain[23]);
        close(scaled[40], plain[40] / 4.0);
        close(scaled[31], plain[31] * (1.0 - 8.0 / 17.0 + 8.0 / 17.0 / 4.0));
    }
}
