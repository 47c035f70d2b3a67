//! Numbers at the ends of their types: infinite logits, soft caps of every size, queries
//! whose squares leave the range of f32, f16 that rotates beyond its range.

mod common;

use common::paged::{Pool, Storage, limits};
use common::problem::{Content, Problem, cached, small_config};
use common::run::{Inputs, assert_selected, outputs_on, selected_lists};
use common::{
    Random, assert_close, assert_lse, attention_tolerance, gpu_tolerance, naive, naive_config, on_devices,
    tensor, to_device, tolerance, values,
};
use tokenselect::{
    Buffer, DType, Device, HeadShape, Limits, Operations, Over, Positions, Rope, RopePairing, RopeScaling,
    SelectConfig, Selection, SelectionCache, Shape, StepOutput, TokenSelect,
};

on_devices! {
    all: infinite_logits_share_the_mass, logits_beyond_the_range_share_the_mass, infinite_parts_are_merged_alike, soft_caps_of_every_size, similarity_of_queries_of_every_size, rotated_pairs_beyond_the_range_of_f16, rotated_scoring_queries_beyond_the_range_of_f16;
}

fn config(heads: (usize, usize, usize), dtype: DType, positions: Positions) -> SelectConfig {
    let (num_qo_heads, num_kv_heads, head_dim) = heads;
    // Lists of most lengths used here may be gathered.
    let heads = HeadShape { num_qo_heads, num_kv_heads, head_dim };
    SelectConfig { heads, dtype, positions, top_k: 400, ..small_config() }
}

/// Attention of a problem of one row: over all tokens by way of a list, or as dense attention.
fn attend(device: &Device, problem: &Problem, listed: bool) -> (Vec<f64>, Vec<f64>) {
    let pool = Pool::full(problem, 16, Storage::Nhd, 1).to(device);
    let (batch, inputs) = (pool.batch(problem), Inputs::new(problem).to(device));
    let ts = TokenSelect::new(device, problem.config.clone(), limits(&batch)).unwrap();
    let (mut out, mut lse) = outputs_on(device, problem, DType::F32);
    let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
    if listed {
        let n = problem.rows[0].n;
        let all: Vec<f64> = (0..n).map(|token| token as f64).collect();
        let tokens = to_device(device, &tensor(DType::U32, &all, [1, n]));
        let len = to_device(device, &tensor(DType::U32, &[n as f64], [1]));
        let selection = Selection { tokens: tokens.view(), len: len.view(), ranks: None };
        ts.attend(&batch, pool.view(), inputs.q.view(), Over::Lists(&selection), output).unwrap();
    } else {
        ts.attend(&batch, pool.view(), inputs.q.view(), Over::All, output).unwrap();
    }
    (values(&out), values(&lse))
}

/// Compares both ways to attend with the definitions.
fn check(device: &Device, what: &str, problem: &Problem) {
    let (config, row) = (naive_config(&problem.config), &problem.rows[0]);
    let all: Vec<usize> = (0..row.n).collect();
    let want = naive::attend(&config, &row.q, &row.k, &row.v, &naive::ranked(&all), row.n);
    let exact = attention_tolerance(DType::F32, &config, &row.q, &row.k, row.n).min(1e-3);
    let allowed = if device.is_cpu() { exact } else { exact.max(gpu_tolerance(problem.config.dtype)) };
    for listed in [true, false] {
        let what = format!("{what}, {}, n = {}, T = {}, listed: {listed}", device.name(), row.n, row.t);
        let (out, lse) = attend(device, problem, listed);
        assert_lse(&what, &lse, &want.1, allowed);
        assert_close(&what, &out, &want.0, config.d, allowed);
    }
}

/// Native positions, and pairs that are rotated in registers, gathered, or not rotated where the infinities are.
fn positions() -> [Positions; 3] {
    let some = |pairing| Rope { pairing, rotary_dim: Some(16), ..Rope::default() };
    let some = |pairing| Positions::Reassigned(some(pairing));
    [Positions::Native, some(RopePairing::Interleaved), some(RopePairing::HalfSplit)]
}

/// `(n, T)`: decoding, a few queries, blocks; lists in one part, and in many.
const LENGTHS: [(usize, usize); 6] = [(5, 1), (40, 1), (300, 2), (300, 40), (130, 70), (4700, 1)];

/// Tokens whose logit is +inf share the mass, wherever they lie; a NaN that is seen stays NaN.
fn infinite_logits_share_the_mass(device: &Device) {
    for (i, positions) in positions().into_iter().enumerate() {
        let dtype = [DType::F16, DType::Bf16][i % 2];
        let config = config((4, 2, 64), dtype, positions);
        let (d, width) = (64, 2 * 64);
        for (n, t) in LENGTHS {
            // Rotated keys are gathered for blocks, but for dense attention and lists as long as the last.
            if i > 0 && ![(40, 1), (300, 40), (4700, 1)].contains(&(n, t)) {
                continue;
            }
            let mut random = Random(n as u64);
            let mut problem = Problem::new(&config, &[(n, t)], Content::Peaked, i as u64);
            let row = &mut problem.rows[0];
            (0..4 * t).for_each(|head| row.q[head * d + 40] = 1.0 + (head % 8) as f64 / 8.0);
            // One KV head has infinite logits here and there, among them those of the block's last tokens.
            for token in (0..n).filter(|&token| token == n - 1 || token == 0 || random.below(9) == 0) {
                row.k[token * width + 40] = f64::INFINITY;
            }
            check(device, "infinite keys", &problem);
            let with_nan = |token: usize| {
                let mut problem = problem.clone();
                problem.rows[0].k[token * width + 3] = f64::NAN;
                problem
            };
            check(device, "and a NaN that some see", &with_nan(n - t / 2 - 1));
            check(device, "and a NaN that all see", &with_nan(0));
            // Infinite logits of both signs in one query.
            let mut problem = problem.clone();
            (0..n / 2).for_each(|token| problem.rows[0].k[token * width + 40] = f64::NEG_INFINITY);
            check(device, "of both signs", &problem);
            (0..n).for_each(|token| problem.rows[0].k[token * width + 40] = f64::INFINITY);
            check(device, "all of them", &problem);
        }
    }
}

/// Products of finite numbers that leave the range of f32.
fn logits_beyond_the_range_share_the_mass(device: &Device) {
    for (n, t) in LENGTHS {
        let config =
            SelectConfig { sm_scale: Some(1.0), ..config((2, 1, 64), DType::Bf16, Positions::Native) };
        let mut problem = Problem::new(&config, &[(n, t)], Content::Peaked, 1);
        let row = &mut problem.rows[0];
        let huge = common::round(DType::Bf16, 1e30);
        (0..2 * t).for_each(|head| row.q[head * 64 + 9] = huge);
        for token in 0..n {
            row.k[token * 64 + 9] = if token % 7 == 3 { huge * (1.0 + token as f64) } else { 0.0 };
            row.k[token * 64 + 9] = common::round(DType::Bf16, row.k[token * 64 + 9]);
        }
        check(device, "huge products", &problem);
    }
}

/// Parts that are merged: those with an infinite log-sum-exp count alike, and alone.
fn infinite_parts_are_merged_alike(device: &Device) {
    const INF: f64 = f64::INFINITY;
    let heads = HeadShape { num_qo_heads: 1, num_kv_heads: 1, head_dim: 8 };
    let part = |x: f64| (0..8).map(move |i| x + i as f64);
    for (lses, want, lse) in [
        ([INF, 3.0, INF], 2.0, INF),
        ([INF, -INF, 1e38], 1.0, INF),
        ([-INF, INF, -INF], 2.0, INF),
        ([INF, INF, INF], 2.0, INF),
        ([INF, f64::NAN, 0.0], f64::NAN, f64::NAN),
        ([3.0, 3e38, -3e38], 2.0, f64::from(3e38f32).min(f64::from(f32::MAX))),
    ] {
        let ts = common::run::only(
            device,
            &SelectConfig { heads, ..small_config() },
            Limits::default(),
            Operations::NONE,
        );
        let on = |values: &[f64], shape: Shape| to_device(device, &tensor(DType::F32, values, shape));
        let outs =
            on(&[1.0, 2.0, 3.0].map(part).into_iter().flatten().collect::<Vec<_>>(), [3, 1, 1, 8].into());
        let lses = on(&lses, [3, 1, 1].into());
        let mut out = on(&[-77.0; 8], [1, 1, 8].into());
        let mut got = on(&[-77.0], [1, 1].into());
        let output = StepOutput { out: out.view_mut(), lse: Some(got.view_mut()) };
        ts.merge(outs.view(), lses.view(), output).unwrap();
        let what = format!("{}: {:?}", device.name(), values(&lses));
        let want: Vec<f64> = part(want).collect();
        assert_close(&what, &values(&out), &want, 8, tolerance(DType::F32, 16));
        if lse.is_finite() {
            continue; // in base 2, as GPUs have it, this one is infinite
        }
        assert_lse(&what, &values(&got), &[lse], 0.0);
    }
}

/// Soft caps of every size: a large one changes nothing.
fn soft_caps_of_every_size(device: &Device) {
    for (i, positions) in [Positions::Native, Positions::Reassigned(Rope::default())].into_iter().enumerate()
    {
        for cap in [1e-44, 0.5, 30.0, 1e3, 1e4, 1e5, 1e7, 1e10, 3e38] {
            for (n, t) in [(50, 1), (60, 40)] {
                let dtype = [DType::F16, DType::Bf16][i % 2];
                let logits_soft_cap = Some(cap as f32);
                let config = SelectConfig { logits_soft_cap, ..config((2, 1, 64), dtype, positions.clone()) };
                let problem = Problem::new(&config, &[(n, t)], Content::Peaked, n as u64);
                check(device, &format!("soft cap {cap}"), &problem);
            }
        }
    }
}

/// The cosine with the cached query does not depend on how large the two are, even where their squares leave the range of f32.
fn similarity_of_queries_of_every_size(device: &Device) {
    let config = cached(config((4, 2, 64), DType::Bf16, Positions::Native), -1.0, Some(1000));
    let config = SelectConfig { top_k: 20, ..config };
    const SIZES: [f64; 7] = [1e-40, 1e-36, 1e-30, 1.0, 1e19, 1e30, 1e37];
    // Short blocks are pooled by one kernel, long ones by another.
    for t in [1, 6] {
        let [old, new] = [1, 2].map(|seed| Problem::new(&config, &[(90, t)], Content::Peaked, seed));
        let pool = Pool::full(&old, 16, Storage::Nhd, 1);
        let on_device = pool.to(device);
        let batch = pool.batch(&old).with_sequence_indices(vec![0]).unwrap();
        let mut ts = TokenSelect::new(device, config.clone(), limits(&batch)).unwrap();
        let mut similarity = |old_size: f64, new_size: f64| {
            let mut cache = SelectionCache::new(device, &config, 1, 1).unwrap();
            let sized = |problem: &Problem, size: f64| {
                // The two resemble each other.
                let of = |i: usize| 0.5 * old.rows[0].q[i] + 0.5 * problem.rows[0].q[i];
                (0..old.rows[0].q.len())
                    .map(|i| common::round(DType::Bf16, of(i) * size))
                    .collect::<Vec<f64>>()
            };
            let queries = [sized(&old, old_size), sized(&new, new_size)];
            let [first, second] =
                [0, 1].map(|i| to_device(device, &tensor(DType::Bf16, &queries[i], [t, 4, 64])));
            ts.select(&batch, on_device.view(), first.view(), Some(cache.layer_mut(0).unwrap())).unwrap();
            ts.pool(&batch, second.view(), Some(cache.layer_mut(0).unwrap())).unwrap();
            let naive = naive_config(&config);
            let [a, b] = queries.map(|q| naive::scoring_query(&naive, &q));
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let want = dot(&a, &b) / (dot(&a, &a).sqrt() * dot(&b, &b).sqrt());
            (values(ts.workspace().buffer(Buffer::Similarities))[0], want)
        };
        for old_size in SIZES {
            for new_size in SIZES {
                let (got, want) = similarity(old_size, new_size);
                let what = format!("{}: {new_size} after {old_size}, T = {t}", device.name());
                // Elements near the end of the range have few digits.
                let allowed = if old_size.min(new_size) < 1e-35 { 1e-2 } else { 1e-5 };
                assert!((got - want).abs() < allowed, "{what}: got {got}, want {want}");
            }
            assert!(similarity(old_size, 0.0).0.is_nan() && similarity(0.0, old_size).0.is_nan());
        }
    }
}

/// Pairs of f16 that are in range, and are not when they are rotated: of keys, or of queries.
fn rotated_pairs_beyond_the_range_of_f16(device: &Device) {
    let yarn = |attention_factor| RopeScaling::Yarn {
        factor: 4.0,
        original_max_position: 512.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: Some(attention_factor),
    };
    let rope = Rope::default();
    let interleaved = Rope { pairing: RopePairing::Interleaved, ..rope };
    for rope in [
        rope,
        interleaved,
        Rope { rotary_dim: Some(32), ..rope },
        Rope { rotary_dim: Some(32), ..interleaved },
        Rope { scaling: yarn(1.5), ..rope },
        Rope { scaling: yarn(40.0), ..interleaved },
    ] {
        let magnitude = rope.attention_factor() as f32;
        for (n, t) in [(24, 1), (70, 40)] {
            for large_keys in [true, false] {
                let sm_scale = Some(0.0003 / (magnitude * magnitude));
                let config = config((2, 1, 64), DType::F16, Positions::Reassigned(rope));
                let config = SelectConfig { sm_scale, ..config };
                let mut problem = Problem::new(&config, &[(n, t)], Content::Peaked, n as u64);
                let row = &mut problem.rows[0];
                let mut random = Random(7);
                let scales = if large_keys { [0.05, 50_000.0] } else { [50_000.0, 0.05] };
                for (numbers, scale) in [&mut row.q, &mut row.k].into_iter().zip(scales) {
                    for x in numbers.iter_mut() {
                        *x = common::round(DType::F16, scale * [-1.0, 1.0, 1.3, 0.1][random.below(4)]);
                    }
                }
                check(device, &format!("{rope:?}, large keys: {large_keys}"), &problem);
            }
        }
    }
}

/// Scoring queries of f16 that are in range, and are not when they are rotated: the lists are those of the definitions.
fn rotated_scoring_queries_beyond_the_range_of_f16(device: &Device) {
    for (group, n) in [(1, 90), (4, 200), (8, 90)] {
        for rope in [Rope::default(), Rope { pairing: RopePairing::Interleaved, ..Rope::default() }] {
            let config = config((group, 1, 64), DType::F16, Positions::Reassigned(rope));
            // Rotated by 4 radians at least, a pair of equal elements is in one of them somewhere.
            let config = SelectConfig { top_k: 20, n_local: 4, score_scale: Some(1e-5), ..config };
            let mut problem = Problem::new(&config, &[(n, 1)], Content::Peaked, 5);
            problem.rows[0].q.fill(common::round(DType::F16, 60_000.0));
            let pool = Pool::full(&problem, 16, Storage::Nhd, 1);
            let (pool, inputs) = (pool.to(device), Inputs::new(&problem).to(device));
            let batch = pool.batch(&problem);
            let mut ts = TokenSelect::new(device, config.clone(), limits(&batch)).unwrap();
            ts.select(&batch, pool.view(), inputs.q.view(), None).unwrap();
            let what = format!("{}, groups of {group}, {rope:?}", device.name());
            let list = selected_lists(&ts, 1).remove(0);
            assert_selected(&what, &naive_config(&config), &problem.rows[0], &list);
        }
    }
}
