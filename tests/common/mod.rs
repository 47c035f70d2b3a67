//! What the test files share: typed data, tolerances and comparisons, and:
//!
//! - `devices`: one test a device
//! - `naive`: the definitions in f64, sharing no code with the crate
//! - `cases`: the golden files
//! - `problem`: random ragged batches
//! - `paged`: their keys and values in pages, borrowed or in an owned cache
//! - `reader`: reads keys and values back out of an owned cache
//! - `run`: whole steps on a device, compared with `naive`

// Every test file is a crate of its own and uses a part of this.
#![allow(dead_code, unused_imports, unused_macros)]

pub mod cases;
pub mod devices;
pub mod naive;
pub mod naive_rope;
pub mod paged;
pub mod problem;
pub mod reader;
pub mod run;

use std::io::Write;

pub(crate) use devices::on_devices;
use half::{bf16, f16};
use proptest::prelude::ProptestConfig;
use tokenselect::{
    Buffer, DType, Device, Error, Positions, RopePairing, RopeScaling, SelectConfig, Shape, Tensor,
    TensorView, TokenSelect,
};

/// Prints past the test harness, which hides the output of tests that pass.
pub fn announce(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// `cases` random cases, unless `PROPTEST_CASES` says otherwise. Failures print their inputs, which are
/// small: sizes and a seed.
pub fn cases(cases: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { cases };
    ProptestConfig { cases, failure_persistence: None, ..default }
}

/// Whether `PROPTEST_CASES` asks for no more than 2 cases, as runs under compute-sanitizer do: tests of great lengths are
/// short then.
pub fn is_short_run() -> bool {
    std::env::var_os("PROPTEST_CASES").is_some() && ProptestConfig::default().cases <= 2
}

/// A small generator (SplitMix64), so that a case is given by its sizes and a seed.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit as u64) as usize
    }

    /// From 0 to 1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Mean 0, variance 1, bounded by 6: a sum of uniform numbers, without costly functions.
    pub fn normal(&mut self) -> f64 {
        let sum: u64 = (0..3).map(|_| self.bits()).map(|b| (b & 0xFFFF_FFFF) + (b >> 32)).sum();
        (sum as f64 / f64::from(u32::MAX) - 3.0) * std::f64::consts::SQRT_2
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Rounds to the nearest value of a type, back as f64. By way of f32: the `half` crate's conversion from f64
/// drops the low bits, so that it can round to the wrong side.
pub fn round(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F16 => f16::from_f32(x as f32).to_f64(),
        DType::Bf16 => bf16::from_f32(x as f32).to_f64(),
        _ => f64::from(x as f32),
    }
}

/// A tensor of `dtype` holding `values`, which it can represent.
pub fn tensor(dtype: DType, values: &[f64], shape: impl Into<Shape>) -> Tensor {
    let made = match dtype {
        DType::F16 => Tensor::from_vec(values.iter().map(|&x| f16::from_f32(x as f32)).collect(), shape),
        DType::Bf16 => Tensor::from_vec(values.iter().map(|&x| bf16::from_f32(x as f32)).collect(), shape),
        DType::F32 => Tensor::from_vec(values.iter().map(|&x| x as f32).collect(), shape),
        DType::U32 => Tensor::from_vec(values.iter().map(|&x| x as u32).collect(), shape),
        DType::F64 => Tensor::from_vec(values.to_vec(), shape),
        other => panic!("no test data of type {other}"),
    };
    made.expect("shape matches the values")
}

/// A copy of a tensor in the memory of a device.
pub fn to_device(device: &Device, tensor: &Tensor) -> Tensor {
    let mut copy = Tensor::zeros_on(device, tensor.dtype(), tensor.shape()).expect("room on the device");
    copy.copy_from(tensor.view()).expect("same shape");
    copy
}

/// Writes a buffer of the workspace.
pub fn put(ts: &mut TokenSelect, buffer: Buffer, values: &[f64]) {
    let shape = ts.workspace().buffer(buffer).shape();
    let values = to_device(&ts.device().clone(), &tensor(buffer.dtype(), values, shape));
    ts.buffer_mut(buffer).copy_from(values.view()).unwrap();
}

/// The elements of a tensor as f64.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    match tensor.dtype() {
        DType::F16 => tensor.to_vec::<f16>().unwrap().iter().map(|x| x.to_f64()).collect(),
        DType::Bf16 => tensor.to_vec::<bf16>().unwrap().iter().map(|x| x.to_f64()).collect(),
        DType::F32 => tensor.to_vec::<f32>().unwrap().iter().map(|&x| f64::from(x)).collect(),
        DType::U32 => tensor.to_vec::<u32>().unwrap().iter().map(|&x| f64::from(x)).collect(),
        DType::F64 => tensor.to_vec::<f64>().unwrap(),
        other => panic!("no test data of type {other}"),
    }
}

/// The elements of a tensor bit by bit, for comparisons in which NaN equals itself.
pub fn bits(tensor: &Tensor) -> Vec<u64> {
    match tensor.dtype() {
        DType::F16 => tensor.to_vec::<f16>().unwrap().iter().map(|x| u64::from(x.to_bits())).collect(),
        DType::Bf16 => tensor.to_vec::<bf16>().unwrap().iter().map(|x| u64::from(x.to_bits())).collect(),
        DType::F32 => tensor.to_vec::<f32>().unwrap().iter().map(|x| u64::from(x.to_bits())).collect(),
        DType::U32 => tensor.to_vec::<u32>().unwrap().iter().map(|&x| u64::from(x)).collect(),
        DType::F64 => tensor.to_vec::<f64>().unwrap().iter().map(|x| x.to_bits()).collect(),
        _ => tensor.to_vec::<u64>().unwrap(),
    }
}

/// The bits of a view of 2-byte floats.
pub fn half_bits(view: &TensorView<'_>) -> Vec<u16> {
    match view.dtype() {
        DType::F16 => view.to_vec::<f16>().unwrap().iter().map(|x| x.to_bits()).collect(),
        _ => view.to_vec::<bf16>().unwrap().iter().map(|x| x.to_bits()).collect(),
    }
}

/// The same configuration for the naive definitions.
pub fn naive_config(config: &SelectConfig) -> naive::Config {
    let heads = config.heads;
    let scale = |given: Option<f32>| given.map_or((heads.head_dim as f64).powf(-0.5), f64::from);
    let reuse = config.selection_cache.map(|cache| {
        let max_reuse = cache.max_reuse.unwrap_or(config.n_local.max(1) as u32);
        (f64::from(cache.similarity_threshold), max_reuse)
    });
    let rope = match &config.positions {
        Positions::Native => None,
        Positions::Reassigned(rope) => Some(naive_rope(rope, heads.head_dim)),
    };
    naive::Config {
        hq: heads.num_qo_heads,
        hkv: heads.num_kv_heads,
        d: heads.head_dim,
        n_init: config.n_init,
        n_local: config.n_local,
        top_k: config.top_k,
        score_scale: scale(config.score_scale),
        sm_scale: scale(config.sm_scale),
        soft_cap: config.logits_soft_cap.map(f64::from),
        pool_window: config.vote_pool_window,
        rope,
        reuse,
    }
}

/// The same rotary embedding for the naive definitions.
pub fn naive_rope(rope: &tokenselect::Rope, head_dim: usize) -> naive_rope::Rope {
    use naive_rope::Scaling;
    naive_rope::Rope {
        theta: rope.theta,
        rotary_dim: rope.rotary_dim.unwrap_or(head_dim),
        interleaved: rope.pairing == RopePairing::Interleaved,
        scaling: match rope.scaling {
            RopeScaling::None => Scaling::None,
            RopeScaling::Linear { factor } => Scaling::Linear { factor },
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let (low, high, original) = (low_freq_factor, high_freq_factor, original_max_position);
                Scaling::Llama3 { factor, low, high, original }
            }
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor } => {
                Scaling::Yarn {
                    factor,
                    original: original_max_position,
                    fast: beta_fast,
                    slow: beta_slow,
                    magnitude: attention_factor,
                }
            }
        },
    }
}

/// Largest error allowed of f32 arithmetic over `len` terms whose result is stored as `dtype`, relative to
/// the largest element of the result's row.
///
/// Rounding errors of a sum grow with the root of its length; one unit in the last place of the stored type
/// covers the final rounding.
pub fn tolerance(dtype: DType, len: usize) -> f64 {
    let arithmetic = 8.0 * f64::from(f32::EPSILON) * (len.max(16) as f64).sqrt();
    let storage = match dtype {
        DType::F16 => 2f64.powi(-11),
        DType::Bf16 => 2f64.powi(-8),
        _ => 0.0,
    };
    arithmetic + storage
}

/// Whether a tensor lies in the memory of a GPU, real or emulated.
pub fn is_on_gpu(tensor: &Tensor) -> bool {
    matches!(tensor.as_slice::<f32>(), Err(Error::WrongDevice { .. }))
}

/// Largest error allowed of attention on a GPU, whose tensor cores multiply probabilities and rotated keys rounded to
/// the type of the cache.
pub fn gpu_tolerance(dtype: DType) -> f64 {
    if dtype == DType::F16 { 4e-3 } else { 2e-2 }
}

/// As [`tolerance`], for attention: a logit has an error in proportion to the products it sums, which the
/// exponential passes on to the weights as it is. Large where the scale on the logits is.
pub fn attention_tolerance(dtype: DType, config: &naive::Config, q: &[f64], k: &[f64], len: usize) -> f64 {
    let magnitude = config.rope.map_or(1.0, |rope| rope.magnitude());
    let norms = largest_norm(q, config.d) * largest_norm(k, config.d);
    let logit = norms * magnitude * magnitude * config.sm_scale.abs();
    tolerance(dtype, len) + 4.0 * f64::from(f32::EPSILON) * logit
}

/// The largest norm of the rows of `width` elements, over those that are numbers.
pub fn largest_norm(rows: &[f64], width: usize) -> f64 {
    let norms = rows.chunks(width).map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt());
    norms.filter(|norm| norm.is_finite()).fold(0.0, f64::max)
}

/// Compares row by row of `width` elements: no element may be off by more than `tolerance` times the largest
/// finite element of its row (a mean error would hide outliers, an element's own size would ask the
/// impossible of sums that cancel). NaN and infinities must stand where they are expected. Returns the
/// largest error found, in units of the tolerance.
pub fn assert_close(what: &str, got: &[f64], want: &[f64], width: usize, tolerance: f64) -> f64 {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    let mut worst: f64 = 0.0;
    for (row, (got, want)) in got.chunks(width).zip(want.chunks(width)).enumerate() {
        let scale = want.iter().filter(|x| x.is_finite()).fold(1e-30, |max: f64, x| max.max(x.abs()));
        for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
            if !want.is_finite() || !got.is_finite() {
                let same = got == want || (got.is_nan() && want.is_nan());
                assert!(same, "{what}: row {row}, element {i}: got {got}, want {want}");
                continue;
            }
            let error = (got - want).abs() / (scale * tolerance);
            assert!(
                error <= 1.0,
                "{what}: row {row}, element {i}: got {got}, want {want}, {error:.2} times the tolerance"
            );
            worst = worst.max(error);
        }
    }
    worst
}

/// Compares log-sum-exps: they are sums of order 1 and more, so the error is relative to at least 1.
pub fn assert_lse(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        if !want.is_finite() || !got.is_finite() {
            let same = got == want || (got.is_nan() && want.is_nan());
            assert!(same, "{what}: {i}: got {got}, want {want}");
            continue;
        }
        let error = (got - want).abs() / want.abs().max(1.0);
        assert!(error <= tolerance, "{what}: {i}: got {got}, want {want}, relative error {error:.1e}");
    }
}

/// Votes closer than this to the last one chosen may fall on either side of the cut in lower precision.
pub const VOTE_TOLERANCE: f64 = 1e-3;
/// Votes below the normal range of f32 keep few digits or none.
const VOTE_FLOOR: f64 = 1e-36;

/// Asserts that `chosen` (places among the candidates) are what `votes` choose: ascending, `k` of them, the
/// same as in the total order but for places whose votes cannot be told from the last one chosen.
pub fn assert_chosen(what: &str, chosen: &[usize], votes: &[f64], k: usize) {
    assert_eq!(chosen.len(), k.min(votes.len()), "{what}: number of chosen tokens");
    assert!(chosen.is_sorted_by(|a, b| a < b), "{what}: not ascending: {chosen:?}");
    let want = naive::largest(votes, k);
    if chosen == want {
        return;
    }
    let numbers = votes.iter().filter(|vote| !vote.is_nan()).count();
    assert!(numbers >= k, "{what}: all {numbers} numbers and the first NaNs: got {chosen:?}, want {want:?}");
    let last = want.iter().map(|&j| votes[j]).fold(f64::INFINITY, f64::min);
    let differing =
        chosen.iter().filter(|&j| !want.contains(j)).chain(want.iter().filter(|&j| !chosen.contains(j)));
    for &j in differing {
        assert!(
            (votes[j] - last).abs() <= VOTE_TOLERANCE * last + VOTE_FLOOR,
            "{what}: place {j} with vote {} is on the wrong side of the cut at {last}",
            votes[j]
        );
    }
}
