//! The small operations of a model, in parallel over rows.

use rayon::prelude::*;

/// RMS norm of every row: `y = x / sqrt(mean(x²) + epsilon) * weight`; `x` and `y` are `[rows, width]`,
/// `weight` is `[width]`.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, y: &mut [f32]) {
    let width = weight.len();
    y.par_chunks_exact_mut(width).zip(x.par_chunks_exact(width)).for_each(|(y, x)| {
        let scale = rms_scale(x, epsilon);
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * scale * w;
        }
    });
}

/// The same in place, over the heads of every row: `x` is `[rows, num_heads, width]`, `weight` `[width]`.
pub fn rms_norm_heads(x: &mut [f32], weight: &[f32], epsilon: f32) {
    x.par_chunks_exact_mut(weight.len()).for_each(|x| {
        let scale = rms_scale(x, epsilon);
        for (x, w) in x.iter_mut().zip(weight) {
            *x *= scale * w;
        }
    });
}

/// `1 / sqrt(mean(x²) + epsilon)`.
fn rms_scale(x: &[f32], epsilon: f32) -> f32 {
    let mean_square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    (mean_square + epsilon).sqrt().recip()
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

/// Bits that a code built on the prediction needs for the token that came: `-log2 softmax(logits)[token]`, for
/// every row of `logits`, `[tokens.len(), vocab_size]`. Tokens are below `vocab_size`.
pub fn code_lengths(logits: &[f32], vocab_size: usize, tokens: &[u32]) -> Vec<f32> {
    let rows = logits.par_chunks_exact(vocab_size).zip(tokens);
    rows.map(|(logits, &token)| {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&logit| f64::from((logit - largest).exp())).sum();
        let nats = sum.ln() + f64::from(largest) - f64::from(logits[token as usize]);
        (nats / std::f64::consts::LN_2) as f32
    })
    .collect()
}
