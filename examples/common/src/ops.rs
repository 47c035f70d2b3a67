//! The small operations of a Llama model, in parallel over rows.

use rayon::prelude::*;

/// RMS norm of every row: `y = x / sqrt(mean(x²) + epsilon) * weight`; `x` and `y` are `[rows, width]`,
/// `weight` is `[width]`.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, y: &mut [f32]) {
    let width = weight.len();
    y.par_chunks_exact_mut(width).zip(x.par_chunks_exact(width)).for_each(|(y, x)| {
        let mean_square = x.iter().map(|x| x * x).sum::<f32>() / width as f32;
        let scale = (mean_square + epsilon).sqrt().recip();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * scale * w;
        }
    });
}

/// The gate of SwiGLU: `up = silu(gate) * up` with `silu(x) = x / (1 + exp(-x))`, element by element.
pub fn swiglu(gate: &[f32], up: &mut [f32]) {
    /// Elements of one parallel task, about 10 µs.
    const TASK: usize = 4096;
    up.par_chunks_mut(TASK).zip(gate.par_chunks(TASK)).for_each(|(up, gate)| {
        for (up, gate) in up.iter_mut().zip(gate) {
            *up *= gate / (1.0 + (-gate).exp());
        }
    });
}

/// Bits that a code built on the prediction needs for the byte that came: `-log2 softmax(logits)[byte]`, for
/// every row of `logits`, `[bytes.len(), vocab_size]`.
pub fn code_lengths(logits: &[f32], vocab_size: usize, bytes: &[u8]) -> Vec<f32> {
    let rows = logits.par_chunks_exact(vocab_size).zip(bytes);
    rows.map(|(logits, &byte)| {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&logit| f64::from((logit - largest).exp())).sum();
        let nats = sum.ln() + f64::from(largest) - f64::from(logits[usize::from(byte)]);
        (nats / std::f64::consts::LN_2) as f32
    })
    .collect()
}
