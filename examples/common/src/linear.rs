//! `y = x Wᵀ + b`.

use gemm::Parallelism;

use crate::checkpoint::Checkpoint;
use crate::error::Result;

/// A linear layer.
#[derive(Debug)]
pub struct Linear {
    /// `[outputs, inputs]`.
    weight: Vec<f32>,
    /// `[outputs]`.
    bias: Option<Vec<f32>>,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    /// A layer without bias whose weight, `[outputs, inputs]`, was read already.
    pub fn from_weight(weight: Vec<f32>, inputs: usize, outputs: usize) -> Self {
        assert_eq!(weight.len(), inputs * outputs, "elements of a weight");
        Linear { weight, bias: None, inputs, outputs }
    }

    /// Reads `{name}.weight`, `[outputs, inputs]`.
    pub fn load(checkpoint: &Checkpoint<'_>, name: &str, inputs: usize, outputs: usize) -> Result<Self> {
        let weight = checkpoint.tensor(&format!("{name}.weight"), [outputs, inputs])?;
        Ok(Linear::from_weight(weight, inputs, outputs))
    }

    /// Reads `{name}.bias`, `[outputs]`, too if `has_bias`.
    pub fn with_bias(mut self, checkpoint: &Checkpoint<'_>, name: &str, has_bias: bool) -> Result<Self> {
        if has_bias {
            self.bias = Some(checkpoint.tensor(&format!("{name}.bias"), [self.outputs])?);
        }
        Ok(self)
    }

    /// `y = x Wᵀ + b`; `x` is `[rows, inputs]`, `y` `[rows, outputs]`, written.
    pub fn apply(&self, x: &[f32], y: &mut [f32]) {
        y.fill(0.0);
        self.add(x, y);
    }

    /// `y += x Wᵀ + b`; `x` is `[rows, inputs]`, `y` `[rows, outputs]`, read and written.
    pub fn add(&self, x: &[f32], y: &mut [f32]) {
        let rows = x.len() / self.inputs;
        assert_eq!(x.len(), rows * self.inputs, "elements of x");
        assert_eq!(y.len(), rows * self.outputs, "elements of y");
        if let Some(bias) = &self.bias {
            for row in y.chunks_exact_mut(self.outputs) {
                row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
        let (inputs, outputs) = (self.inputs as isize, self.outputs as isize);
        // SAFETY: the strides describe row-major matrices of exactly these sizes: `y` and `x` by the asserts
        // above, the weight by that of `from_weight`. `y` is borrowed mutably, so it overlaps neither.
        unsafe {
            gemm::gemm(
                rows,
                self.outputs,
                self.inputs,
                y.as_mut_ptr(),
                1,
                outputs,
                true,
                x.as_ptr(),
                1,
                inputs,
                self.weight.as_ptr(),
                inputs,
                1,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::Rayon(0),
            );
        }
    }
}
