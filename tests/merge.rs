//! `merge`: attention over disjoint parts of a list, combined through their log-sum-exps.

mod common;

use common::problem::small_config;
use common::{Random, assert_close, assert_lse, cases, on_devices, tensor, to_device, tolerance, values};
use proptest::prelude::*;
use tokenselect::{DType, Device, HeadShape, Limits, Operations, SelectConfig, Shape, StepOutput};

on_devices! {
    all: weighs_parts_by_their_sums, parts_without_tokens_do_not_count, nan_is_passed_on;
}

/// `parts` of `tokens * hq` rows of `d`, and their log-sum-exps.
struct Parts {
    heads: HeadShape,
    num_parts: usize,
    tokens: usize,
    outs: Vec<f64>,
    lses: Vec<f64>,
}

impl Parts {
    fn random(heads: HeadShape, num_parts: usize, tokens: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let rows = num_parts * tokens * heads.num_qo_heads;
        let outs = (0..rows * heads.head_dim).map(|_| f64::from(random.normal() as f32)).collect();
        let mut lse = || match random.below(5) {
            0 => f64::NEG_INFINITY,
            1 => f64::from((random.normal() * 60.0) as f32),
            _ => f64::from((random.normal() * 3.0) as f32),
        };
        let lses = (0..rows).map(|_| lse()).collect();
        Parts { heads, num_parts, tokens, outs, lses }
    }

    /// `lse = ln sum exp(lse_i)`, `out = sum exp(lse_i - lse) out_i`.
    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let (rows, d) = (self.tokens * self.heads.num_qo_heads, self.heads.head_dim);
        let (mut out, mut lse) = (vec![0.0; rows * d], vec![f64::NEG_INFINITY; rows]);
        for row in 0..rows {
            let counted = (0..self.num_parts)
                .map(|part| part * rows + row)
                .filter(|&i| self.lses[i] > f64::NEG_INFINITY);
            let max = counted.clone().map(|i| self.lses[i]).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = counted.clone().map(|i| (self.lses[i] - max).exp()).sum();
            if sum > 0.0 {
                lse[row] = max + sum.ln();
            }
            for i in counted {
                for x in 0..d {
                    out[row * d + x] += (self.lses[i] - lse[row]).exp() * self.outs[i * d + x];
                }
            }
        }
        (out, lse)
    }

    fn merge(&self, device: &Device, out_dtype: DType) -> (Vec<f64>, Vec<f64>) {
        let config = SelectConfig { heads: self.heads, ..small_config() };
        let ts = common::run::only(device, &config, Limits::default(), Operations::NONE);
        let (tokens, hq, d) = (self.tokens, self.heads.num_qo_heads, self.heads.head_dim);
        let on = |dtype, values: &[f64], shape: Shape| to_device(device, &tensor(dtype, values, shape));
        let outs = on(DType::F32, &self.outs, [self.num_parts, tokens, hq, d].into());
        let lses = on(DType::F32, &self.lses, [self.num_parts, tokens, hq].into());
        let mut out = on(out_dtype, &vec![-77.0; tokens * hq * d], [tokens, hq, d].into());
        let mut lse = on(DType::F32, &vec![-77.0; tokens * hq], [tokens, hq].into());
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        ts.merge(outs.view(), lses.view(), output).unwrap();
        (values(&out), values(&lse))
    }
}

fn weighs_parts_by_their_sums(device: &Device) {
    proptest!(cases(96), |(
        (group, kv) in (1usize..9, 1usize..4),
        d in prop::sample::select(vec![8usize, 24, 80, 256]),
        (num_parts, tokens) in (0usize..6, 0usize..5),
        out_dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16]),
        seed in any::<u64>(),
    )| {
        let heads = HeadShape { num_qo_heads: group * kv, num_kv_heads: kv, head_dim: d };
        let parts = Parts::random(heads, num_parts, tokens, seed);
        let want = parts.expected();
        let got = parts.merge(device, out_dtype);
        // A log-sum-exp near 100 has an error of 4e-6, which exp passes on to the weights.
        let allowed = tolerance(out_dtype, 16) + 1e-5;
        assert_close(device.name(), &got.0, &want.0, d, allowed);
        assert_lse(device.name(), &got.1, &want.1, tolerance(DType::F32, 16));
    });
}

const ONE_HEAD: HeadShape = HeadShape { num_qo_heads: 1, num_kv_heads: 1, head_dim: 8 };

/// What a part without tokens holds does not count, be it NaN.
fn parts_without_tokens_do_not_count(device: &Device) {
    let mut outs = vec![f64::NAN; 24];
    outs[8..16].copy_from_slice(&[1.0, -2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    let lses = vec![f64::NEG_INFINITY, 0.25, f64::NEG_INFINITY];
    let parts = Parts { heads: ONE_HEAD, num_parts: 3, tokens: 1, outs: outs.clone(), lses };
    assert_eq!(parts.merge(device, DType::F32), (outs[8..16].to_vec(), vec![0.25]), "the one part, exactly");
    let none = Parts { lses: vec![f64::NEG_INFINITY; 3], outs: outs.clone(), ..parts };
    assert_eq!(none.merge(device, DType::F32), (vec![0.0; 8], vec![f64::NEG_INFINITY]));
}

/// A NaN that counts stays NaN: an error elsewhere must not look like an answer.
fn nan_is_passed_on(device: &Device) {
    let outs = vec![1.0; 16];
    let parts = Parts { heads: ONE_HEAD, num_parts: 2, tokens: 1, outs, lses: vec![0.5, f64::NAN] };
    let (out, lse) = parts.merge(device, DType::F32);
    assert!(out.iter().chain(&lse).all(|x| x.is_nan()), "{out:?} {lse:?}");
}
