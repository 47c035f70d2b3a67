//! A Llama model in f64, one loop after the other, with dense attention and nothing of the crate.

use crate::tiny_model::{
    EPSILON, HEAD_DIM, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, QO_HEADS, THETA, TinyModel, VOCAB,
};

/// Mean of `-log2 p(next byte)` over `text`; positions are divided by `position_divisor`.
pub fn bits_per_byte(model: &TinyModel, text: &[u8], position_divisor: f64) -> f64 {
    let get = |name: &str| model.elements(name).iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let linear = |x: &[Vec<f64>], name: &str, outputs: usize| -> Vec<Vec<f64>> {
        let (weight, bias) = (get(&format!("{name}.weight")), get(&format!("{name}.bias")));
        x.iter().map(|x| (0..outputs).map(|o| dot(&weight[o * x.len()..], x) + bias[o]).collect()).collect()
    };
    let embedding = get("model.embed_tokens.weight");
    let mut x: Vec<Vec<f64>> =
        text.iter().map(|&byte| embedding[usize::from(byte) * HIDDEN..][..HIDDEN].to_vec()).collect();
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let normed = norm(&x, &get(&name("input_layernorm.weight")));
        let mut q = linear(&normed, &name("self_attn.q_proj"), QO_HEADS * HEAD_DIM);
        let mut k = linear(&normed, &name("self_attn.k_proj"), KV_HEADS * HEAD_DIM);
        let v = linear(&normed, &name("self_attn.v_proj"), KV_HEADS * HEAD_DIM);
        for rows in [&mut q, &mut k] {
            for (position, row) in rows.iter_mut().enumerate() {
                row.chunks_exact_mut(HEAD_DIM)
                    .for_each(|head| rotate(head, position as f64 / position_divisor));
            }
        }
        add(&mut x, linear(&attention(&q, &k, &v), &name("self_attn.o_proj"), HIDDEN));
        let normed = norm(&x, &get(&name("post_attention_layernorm.weight")));
        let mut gated = linear(&normed, &name("mlp.up_proj"), INTERMEDIATE);
        for (up, gate) in gated.iter_mut().zip(linear(&normed, &name("mlp.gate_proj"), INTERMEDIATE)) {
            up.iter_mut().zip(gate).for_each(|(up, gate)| *up *= gate / (1.0 + (-gate).exp()));
        }
        add(&mut x, linear(&gated, &name("mlp.down_proj"), HIDDEN));
    }
    let output = get("lm_head.weight");
    let mut bits = 0.0;
    for (x, &next) in norm(&x, &get("model.norm.weight")).iter().zip(&text[1..]) {
        let logits: Vec<f64> = (0..VOCAB).map(|token| dot(&output[token * HIDDEN..], x)).collect();
        let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
        bits += (sum.ln() - logits[usize::from(next)]) / std::f64::consts::LN_2;
    }
    bits / (text.len() - 1) as f64
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(x: &[Vec<f64>], weight: &[f64]) -> Vec<Vec<f64>> {
    let scale = |x: &[f64]| 1.0 / (dot(x, x) / x.len() as f64 + EPSILON).sqrt();
    x.iter().map(|x| x.iter().zip(weight).map(|(v, w)| v * scale(x) * w).collect()).collect()
}

fn add(x: &mut [Vec<f64>], y: Vec<Vec<f64>>) {
    for (x, y) in x.iter_mut().zip(y) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

/// RoPE: element `i` turns with element `i + HEAD_DIM / 2`.
fn rotate(head: &mut [f64], position: f64) {
    for i in 0..HEAD_DIM / 2 {
        let (sin, cos) = (position * THETA.powf(-2.0 * i as f64 / HEAD_DIM as f64)).sin_cos();
        let (a, b) = (head[i], head[i + HEAD_DIM / 2]);
        (head[i], head[i + HEAD_DIM / 2]) = (a * cos - b * sin, b * cos + a * sin);
    }
}

fn attention(q: &[Vec<f64>], k: &[Vec<f64>], v: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let mut out = vec![vec![0.0; QO_HEADS * HEAD_DIM]; q.len()];
    for (t, out) in out.iter_mut().enumerate() {
        for head in 0..QO_HEADS {
            let (own, shared) = (head * HEAD_DIM, head / (QO_HEADS / KV_HEADS) * HEAD_DIM);
            let query = &q[t][own..own + HEAD_DIM];
            let weights: Vec<f64> =
                k[..=t].iter().map(|k| (dot(query, &k[shared..]) / (HEAD_DIM as f64).sqrt()).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (weight, v) in weights.iter().zip(v) {
                for i in 0..HEAD_DIM {
                    out[own + i] += weight / sum * v[shared + i];
                }
            }
        }
    }
    out
}
