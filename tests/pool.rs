//! `pool`: the scoring query of each block, its similarity to the cached one, and what follows for the row.

mod common;

use std::collections::BTreeSet;

use common::paged::{Pool, Storage, limits, owned};
use common::problem::{self, Content, Problem, cached, small_config};
use common::run::{Inputs, only};
use common::{assert_close, cases, naive, naive_config, on_devices, tensor, to_device, tolerance, values};
use proptest::prelude::*;
use tokenselect::{
    Batch, Buffer, DType, Device, Error, HeadShape, KvLayout, LayerMut, Operations, PagedKvCache, Plan,
    Positions, Rope, RopePairing, RowAction, SelectConfig, SelectionCache, SelectionCacheLayer, TensorView,
    TensorViewMut, TokenSelect,
};

on_devices! {
    all:
        similarity_is_the_cosine_over_all_heads_at_once, threshold_and_age_decide,
        few_candidates_come_before_reuse;
    cpu: queries_are_means_of_rotated_blocks, scoring_position_does_not_depend_on_the_length;
    gpus: gpu_queries, append_and_pool_in_one;
}

/// What `pool` decides without a cached selection.
fn plain_action(config: &naive::Config, n: usize, t: usize) -> RowAction {
    if t == 0 {
        return RowAction::Skip;
    }
    match naive::candidates(config, n, t).len() > config.top_k {
        true => RowAction::Score,
        false => RowAction::Complete,
    }
}

fn queries_are_means_of_rotated_blocks(device: &Device) {
    proptest!(cases(128), |(
        config in problem::config(1024),
        lengths in problem::lengths(80),
        seed in any::<u64>(),
    )| {
        check_queries(device, &Problem::new(&config, &lengths, Content::Peaked, seed), seed);
    });
}

/// Head dimensions, pairings, partial rotation and block lengths on GPU kernels, real and emulated.
fn gpu_queries(device: &Device) {
    let pairings = [RopePairing::HalfSplit, RopePairing::Interleaved];
    for (i, head_dim) in [8, 64, 96, 128, 256].into_iter().enumerate() {
        for (j, pairing) in pairings.into_iter().enumerate() {
            let heads = HeadShape { num_qo_heads: 6, num_kv_heads: 2, head_dim };
            let rotary_dim = [None, Some(head_dim / 4 * 2)][(i + j) % 2];
            let rope = Rope { pairing, rotary_dim, ..Rope::default() };
            let dtype = [DType::F16, DType::Bf16][j];
            let positions = Positions::Reassigned(rope);
            let config = SelectConfig { heads, dtype, positions, ..small_config() };
            let lengths = [(40, 1), (0, 0), (90, 37), (20, 0), (30, 30)];
            check_queries(device, &Problem::new(&config, &lengths, Content::Peaked, i as u64), 5);
        }
    }
}

fn check_queries(device: &Device, problem: &Problem, seed: u64) {
    let naive_config = naive_config(&problem.config);
    let batch = Pool::full(problem, 16, Storage::Nhd, seed).batch(problem);
    let mut ts = pool_only(device, &problem.config, &batch);
    ts.pool(&batch, Inputs::new(problem).to(device).q.view(), None).unwrap();
    let (queries, similarities) =
        (values(ts.workspace().buffer(Buffer::Queries)), values(ts.workspace().buffer(Buffer::Similarities)));
    let actions = ts.workspace().actions().unwrap();
    let width = naive_config.hq * naive_config.d;
    for (r, row) in problem.rows.iter().enumerate() {
        assert_eq!(actions[r], plain_action(&naive_config, row.n, row.t), "row {r}");
        if row.t == 0 {
            continue;
        }
        let want = naive::scoring_query(&naive_config, &row.q);
        let what = format!("{}: query of row {r}", device.name());
        let allowed = tolerance(DType::F32, row.t * 16);
        assert_close(&what, &queries[r * width..][..width], &want, naive_config.d, allowed);
        assert_eq!(similarities[r], -1.0, "nothing is cached");
    }
}

/// A selection appends and pools short blocks in one launch, which leaves what `append` and
/// `pool` leave, and what the processor leaves, while keys are asked for. What has no kernel is refused before anything is
/// written.
fn append_and_pool_in_one(device: &Device) {
    let rope = |pairing, rotary_dim| Positions::Reassigned(Rope { pairing, rotary_dim, ..Rope::default() });
    let (halves, neighbours) = (RopePairing::HalfSplit, RopePairing::Interleaved);
    let lengths: [&[(usize, usize)]; 4] = [
        &[(40, 1)],
        &[(33, 1), (0, 0), (50, 4), (1, 1), (20, 0), (3, 3)],
        &[(16, 2), (17, 1), (18, 3)],
        &[(0, 0), (4, 4)],
    ];
    let mut seen = BTreeSet::new();
    for (i, (num_kv_heads, group, head_dim, positions)) in [
        (1, 1, 64, Positions::Native),
        (1, 1, 8, rope(halves, None)),
        (3, 1, 96, rope(halves, Some(48))),
        (1, 7, 128, rope(neighbours, Some(64))),
        (2, 3, 64, rope(neighbours, None)),
        (1, 5, 24, rope(halves, Some(20))),
        (8, 4, 128, Positions::Native),
        (8, 5, 64, rope(halves, None)),
        (2, 4, 256, rope(halves, Some(128))),
        // Not for the kernel: an odd number of rotated pairs, and too many elements.
        (2, 2, 64, rope(halves, Some(2))),
        (40, 1, 256, rope(neighbours, None)),
    ]
    .into_iter()
    .enumerate()
    {
        let heads = HeadShape { num_qo_heads: num_kv_heads * group, num_kv_heads, head_dim };
        let dtype = [DType::Bf16, DType::F16][i % 2];
        // Keys are asked for early in pages of 16, unless copies may reach into a block for want of local tokens.
        for (page_size, n_local, caches) in [
            (7, 4, false),
            (7, 4, true),
            (16, 4, true),
            (16, 4, false),
            (16, 15, false),
            (16, 15, true),
            (16, 14, false),
        ] {
            let base = SelectConfig { heads, dtype, n_local, positions: positions.clone(), ..small_config() };
            let config = if caches { cached(base, 0.5, Some(3)) } else { base };
            let problem = Problem::new(&config, lengths[i % 4], Content::Peaked, i as u64);
            let of = |device: &Device, fused| pool_after_append(device, &problem, page_size, fused);
            let want = of(&Device::cpu(), false).expect("the processor does everything");
            seen.extend(want.actions.iter().map(|&action| action as u32));
            let (fused, apart) = (of(device, true), of(device, false).expect("pool has no limits"));
            let what = format!("{}, case {i}, pages of {page_size}", device.name());
            assert_eq!(fused.is_some(), head_dim >= 64, "{what}: a kernel scores such heads");
            for (got, of) in fused.iter().map(|fused| (fused, "in one")).chain([(&apart, "apart")]) {
                assert_eq!(got.actions, want.actions, "{what}: actions {of}");
                assert_eq!(got.kv, want.kv, "{what}: keys and values {of}");
                let allowed = tolerance(DType::F32, 64);
                assert_close(&what, &got.queries, &want.queries, head_dim, allowed);
                for (got, want) in got.similarities.iter().zip(&want.similarities) {
                    assert!((got - want).abs() < 1e-5 || got.is_nan() && want.is_nan(), "{what}: {of}");
                }
            }
        }
    }
    assert_eq!(seen.len(), 4, "every action");
}

struct Pooled {
    actions: Vec<RowAction>,
    similarities: Vec<f64>,
    queries: Vec<f64>,
    kv: [Vec<u16>; 2],
}

/// A whole selection, or the two operations alone, after cached selections of all kinds were put in place. `None` where the
/// device has no kernels for the selection.
fn pool_after_append(device: &Device, problem: &Problem, page_size: usize, fused: bool) -> Option<Pooled> {
    let (mut cache, ids) = owned(device, problem, page_size, KvLayout::Nhd, 1, 5);
    let growth: Vec<_> = ids.iter().copied().zip(problem.rows.iter().map(|row| row.t)).collect();
    let batch = cache.extend(&growth).unwrap().padded(problem.rows.len() + 1, 2).unwrap();
    let apart = Operations { append: true, pool: true, ..Operations::NONE };
    let operations = if fused { Operations::SELECTION } else { apart };
    let plan = match Plan::new(device, problem.config.clone(), limits(&batch), operations) {
        Ok(plan) => plan,
        Err(error) => {
            assert!(matches!(error, Error::Unsupported { op: "score", .. }), "{error}");
            return None;
        }
    };
    let mut ts = TokenSelect::with_plan(plan).unwrap();
    let naive_config = naive_config(&problem.config);
    for (r, row) in problem.rows.iter().enumerate().filter(|(_, row)| row.t > 0) {
        let mut query = naive::scoring_query(&naive_config, &row.q);
        if r % 3 == 1 {
            query.iter_mut().for_each(|x| *x = -*x);
        }
        let Some(selections) = cache.layer_mut(0).unwrap().selections else { break };
        let (age, made_at) = [(0, 0), (0, 0), (3, 0), (0, row.n as u32)][r % 4];
        put(selections, batch.row(r).unwrap().sequence_index.unwrap(), &query, age, made_at);
    }
    let heads = problem.config.heads;
    let padded = |values: Vec<f64>, heads: usize, head_dim: usize| {
        let shape = [batch.num_query_tokens(), heads, head_dim];
        let padding = vec![0.5; 2 * heads * head_dim];
        to_device(device, &tensor(problem.config.dtype, &[values, padding].concat(), shape))
    };
    let inputs = Inputs {
        q: padded(problem.q(), heads.num_qo_heads, heads.head_dim),
        k: padded(problem.blocks(|row| &row.k), heads.num_kv_heads, heads.head_dim),
        v: padded(problem.blocks(|row| &row.v), heads.num_kv_heads, heads.head_dim),
    };
    let bits = |cache: &PagedKvCache| {
        let kv = cache.layer(0).unwrap();
        [kv.k(), kv.v()].map(|tensor| common::half_bits(&tensor))
    };
    let LayerMut { kv, selections } = cache.layer_mut(0).unwrap();
    if !fused {
        ts.append(&batch, kv, inputs.k.view(), inputs.v.view()).unwrap();
        ts.pool(&batch, inputs.q.view(), selections).unwrap();
    } else {
        ts.append_select(&batch, LayerMut { kv, selections }, inputs.step()).unwrap();
    }
    Some(Pooled {
        actions: ts.workspace().actions().unwrap(),
        similarities: values(ts.workspace().buffer(Buffer::Similarities)),
        queries: values(ts.workspace().buffer(Buffer::Queries)),
        kv: bits(&cache),
    })
}

/// A batch of one row of `n` tokens and a block of `t`, with place `index` in the Selection Cache.
fn one_row(n: usize, t: usize, index: u32) -> Batch {
    let (tables, _) = common::paged::shuffled_tables(&[n], 16, &mut common::Random(1));
    Batch::new(16, vec![0, t as u32], tables).unwrap().with_sequence_indices(vec![index]).unwrap()
}

/// The small configuration, in a type that the device takes.
fn small_config_for(device: &Device) -> SelectConfig {
    let dtype = if device.name() == "cpu" { DType::F32 } else { DType::Bf16 };
    SelectConfig { dtype, ..small_config() }
}

/// For pooling alone, which GPUs do for heads of all sizes.
fn pool_only(device: &Device, config: &SelectConfig, batch: &Batch) -> TokenSelect {
    only(device, config, limits(batch), Operations { pool: true, ..Operations::NONE })
}

/// Fills the entry of sequence `index` as a scored row would, with the first candidates.
fn put(layer: SelectionCacheLayer<'_>, index: usize, query: &[f64], age: u32, made_at: u32) {
    fn change<T: tokenselect::Element>(mut view: TensorViewMut<'_>, at: usize, new: &[T]) {
        let mut all = view.as_view().to_vec::<T>().unwrap();
        all[at..at + new.len()].copy_from_slice(new);
        let shape = view.shape();
        view.reborrow().copy_from(TensorView::new(&all, shape).unwrap()).unwrap();
    }
    let query: Vec<f32> = query.iter().map(|&x| x as f32).collect();
    change(layer.queries, index * query.len(), &query);
    change(layer.ages, index, &[age]);
    change(layer.made_at, index, &[made_at]);
    let SelectConfig { n_init, top_k, .. } = small_config();
    let tokens: Vec<u32> = (n_init..n_init + top_k).map(|token| token as u32).collect();
    change(layer.selections, index * top_k, &tokens);
}

/// Action and similarity for a query against one cached query.
fn decide(
    ts: &mut TokenSelect,
    cache: &mut SelectionCache,
    batch: &Batch,
    query: &[f64],
) -> (RowAction, f64) {
    let heads = ts.config().heads;
    let q = tensor(ts.config().dtype, query, [1, heads.num_qo_heads, heads.head_dim]);
    let q = to_device(ts.device(), &q);
    ts.pool(batch, q.view(), Some(cache.layer_mut(0).unwrap())).unwrap();
    (ts.workspace().actions().unwrap()[0], values(ts.workspace().buffer(Buffer::Similarities))[0])
}

fn similarity_is_the_cosine_over_all_heads_at_once(device: &Device) {
    let config = cached(small_config_for(device), 0.9, Some(100));
    let width = config.heads.num_qo_heads * config.heads.head_dim;
    let batch = one_row(60, 1, 2);
    let mut ts = pool_only(device, &config, &batch);
    let mut cache = SelectionCache::new(device, &config, 1, 4).unwrap();
    // One head opposite, the other three equal: (3 - 1) / 4, though the mean of the heads' cosines
    // weighted otherwise would differ: the opposite head is twice as long.
    let head = |h: usize| if h == 0 { 2.0 } else { 1.0 };
    let old: Vec<f64> = (0..width).map(|i| head(i / 16)).collect();
    let new: Vec<f64> = old.iter().enumerate().map(|(i, x)| if i < 16 { -x } else { *x }).collect();
    put(cache.layer_mut(0).unwrap(), 2, &old, 0, 50);
    let (action, similarity) = decide(&mut ts, &mut cache, &batch, &new);
    assert!((similarity - (3.0 - 4.0) / 7.0).abs() < 1e-6, "{similarity}");
    assert_eq!(action, RowAction::Score);
    let (action, similarity) =
        decide(&mut ts, &mut cache, &batch, &old.iter().map(|x| x * 3.0).collect::<Vec<_>>());
    assert!((similarity - 1.0).abs() < 1e-6, "length does not matter: {similarity}");
    assert_eq!(action, RowAction::Reuse);
}

fn threshold_and_age_decide(device: &Device) {
    let threshold = 0.5;
    let config = cached(small_config_for(device), threshold, Some(3));
    let width = config.heads.num_qo_heads * config.heads.head_dim;
    // Cosine c to the first unit vector: (c, sqrt(1 - c^2)).
    let at = |cosine: f64| {
        let mut query = vec![0.0; width];
        (query[0], query[1]) = (cosine, (1.0 - cosine * cosine).sqrt());
        query
    };
    let batch = one_row(60, 1, 0);
    let mut ts = pool_only(device, &config, &batch);
    let mut cache = SelectionCache::new(device, &config, 1, 1).unwrap();
    for (cosine, age, made_at, want) in [
        (0.51, 0, 59, RowAction::Reuse),
        (0.49, 0, 59, RowAction::Score),
        (-1.0, 0, 59, RowAction::Score),
        (1.0, 2, 59, RowAction::Reuse),
        (1.0, 3, 59, RowAction::Score),
        (1.0, 4, 59, RowAction::Score),
        (1.0, 0, 20, RowAction::Reuse),
        // Made for more tokens than there are now before the block, and never made.
        (1.0, 0, 60, RowAction::Score),
        (1.0, 0, u32::MAX, RowAction::Score),
    ] {
        put(cache.layer_mut(0).unwrap(), 0, &at(1.0), age, made_at);
        let (action, _) = decide(&mut ts, &mut cache, &batch, &at(cosine));
        assert_eq!(action, want, "cosine {cosine}, age {age}, made at {made_at}");
    }
    // Exactly at the threshold: cos = 1/2 in exact arithmetic.
    let mut half = vec![0.0; width];
    half[..4].fill(1.0);
    put(cache.layer_mut(0).unwrap(), 0, &at(1.0), 0, 59);
    assert_eq!(decide(&mut ts, &mut cache, &batch, &half), (RowAction::Reuse, 0.5));
    // A query of zeros resembles nothing.
    let (action, similarity) = decide(&mut ts, &mut cache, &batch, &vec![0.0; width]);
    assert_eq!(action, RowAction::Score);
    assert!(similarity.is_nan(), "{similarity}");
}

fn few_candidates_come_before_reuse(device: &Device) {
    let config = cached(small_config_for(device), -1.0, Some(100));
    let width = config.heads.num_qo_heads * config.heads.head_dim;
    let query = vec![1.0; width];
    // n_init 3, n_local 4, top_k 5: with 13 tokens there are 5 candidates, with 14 there are 6.
    for (n, want) in [(1, RowAction::Complete), (13, RowAction::Complete), (14, RowAction::Reuse)] {
        let batch = one_row(n, 1, 0);
        let mut ts = pool_only(device, &config, &batch);
        let mut cache = SelectionCache::new(device, &config, 1, 1).unwrap();
        put(cache.layer_mut(0).unwrap(), 0, &query, 0, 0);
        assert_eq!(decide(&mut ts, &mut cache, &batch, &query).0, want, "{n} tokens");
    }
}

#[test]
fn max_reuse_defaults_to_the_local_window() {
    for (n_local, want) in [(0, 1), (1, 1), (7, 7), (512, 512)] {
        let config = SelectConfig { n_local, ..cached(small_config(), 0.9, None) };
        assert_eq!(config.max_reuse(), want);
    }
    assert_eq!(SelectConfig { selection_cache: None, ..small_config() }.max_reuse(), 0);
}

/// Reassigned positions rotate the scoring query at `n_local + t`, wherever the block stands in the text.
fn scoring_position_does_not_depend_on_the_length(device: &Device) {
    let positions = Positions::Reassigned(tokenselect::Rope::default());
    let config = SelectConfig { positions, ..small_config() };
    let pooled = [30, 90].map(|n| {
        let mut problem = Problem::new(&config, &[(n, 4)], Content::Peaked, 3);
        problem.rows[0].q = Problem::new(&config, &[(30, 4)], Content::Peaked, 9).rows[0].q.clone();
        let pool = Pool::full(&problem, 16, Storage::Nhd, 1);
        let batch = pool.batch(&problem);
        let mut ts = pool_only(device, &problem.config, &batch);
        ts.pool(&batch, Inputs::new(&problem).q.view(), None).unwrap();
        values(ts.workspace().buffer(Buffer::Queries))
    });
    assert_eq!(pooled[0], pooled[1]);
}
