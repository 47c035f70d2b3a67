//! `score`: logits of the candidates and the softmax statistics of each head.

mod common;

use common::paged::{Pool, STORAGES, Storage, limits};
use common::problem::{self, Content, Problem, around};
use common::{Random, assert_close, cases, largest_norm, naive, naive_config, on_devices, tolerance, values};
use proptest::prelude::*;
use tokenselect::{
    Batch, Buffer, DType, Device, HeadShape, Operations, RowAction, SelectConfig, TokenSelect,
};

on_devices! {
    cpu: logits_and_statistics, sizes_around_every_cut, chunks_of_nan_and_infinities;
    gpus: gpu_instances, gpu_streamed_pages, gpu_kernels_agree_in_every_bit, gpu_nan_and_infinities;
}

/// Stands where nothing may be written.
const UNTOUCHED: f64 = -77.0;

/// A workspace as `pool` would have left it, with queries of one's own; everything to be written is marked.
fn prepared(
    device: &Device,
    config: &SelectConfig,
    batch: &Batch,
    queries: &[f64],
    actions: &[RowAction],
) -> TokenSelect {
    let mut ts =
        common::run::only(device, config, limits(batch), Operations { score: true, ..Operations::NONE });
    let codes: Vec<f64> = actions.iter().map(|&action| f64::from(action as u32)).collect();
    common::put(&mut ts, Buffer::Queries, queries);
    common::put(&mut ts, Buffer::Actions, &codes);
    for buffer in [Buffer::Logits, Buffer::Stats] {
        let len = ts.workspace().buffer(buffer).shape().checked_len().unwrap();
        common::put(&mut ts, buffer, &vec![UNTOUCHED; len]);
    }
    ts.provide(Buffer::Queries, batch).unwrap();
    ts
}

/// Maximum over the numbers and the sum of `exp(logit - max)`.
fn statistics(logits: &[f64]) -> [f64; 2] {
    let numbers: Vec<f64> = logits.iter().copied().filter(|x| !x.is_nan()).collect();
    let max = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let term = |x: f64| if x == max { 1.0 } else { (x - max).exp() };
    [max, numbers.into_iter().map(term).sum()]
}

fn check(device: &Device, problem: &Problem, pool: &Pool, actions: &[RowAction], seed: u64) {
    let config = naive_config(&problem.config);
    let (hq, d) = (config.hq, config.d);
    let mut random = Random(seed);
    let queries: Vec<f64> =
        (0..problem.rows.len() * hq * d).map(|_| random.normal() as f32).map(f64::from).collect();
    let pool = pool.to(device);
    let batch = pool.batch(problem);
    let mut ts = prepared(device, &problem.config, &batch, &queries, actions);
    ts.score(&batch, pool.view()).unwrap();
    let (logits, stats) =
        (values(ts.workspace().buffer(Buffer::Logits)), values(ts.workspace().buffer(Buffer::Stats)));
    let mut written = vec![false; logits.len()];
    for (r, row) in problem.rows.iter().enumerate() {
        let what = format!("{}: row {r} of {} tokens", device.name(), row.n);
        let range = naive::candidates(&config, row.n, row.t);
        let stats = &stats[r * hq * 2..][..hq * 2];
        if actions[r] != RowAction::Score {
            assert!(stats.iter().all(|&x| x == UNTOUCHED), "{what}: only scored rows are written");
            continue;
        }
        for h in 0..hq {
            let query = &queries[r * hq * d..][..hq * d];
            let want = naive::logits(&config, query, &row.k, h, range.clone());
            let places: Vec<usize> =
                range.clone().map(|j| ts.logit_index(&batch, r, j, h).unwrap()).collect();
            let got: Vec<f64> = places.iter().map(|&place| logits[place]).collect();
            // Sums of products: the error is relative to the largest logit of the head, or to the products where few
            // logits cancel.
            let largest = want.iter().filter(|x| x.is_finite()).fold(1e-30, |max: f64, x| max.max(x.abs()));
            let of_head = &query[h * d..][..d];
            let products = largest_norm(of_head, d) * largest_norm(&row.k, d) * config.score_scale.abs();
            let allowed = tolerance(DType::F32, d) * (products / 4.0 / largest).max(1.0);
            assert_close(&what, &got, &want, want.len().max(1), allowed);
            // Statistics belong to this device's logits, whose error of 1e-6 is not theirs.
            let allowed = tolerance(DType::F32, row.n);
            assert_close(&what, &stats[2 * h..][..2], &statistics(&got), 1, allowed);
            places.into_iter().for_each(|place| written[place] = true);
        }
    }
    let others = logits.iter().zip(written).filter(|(_, written)| !written);
    assert!(others.into_iter().all(|(&x, _)| x == UNTOUCHED), "only candidates of scored rows are written");
}

fn logits_and_statistics(device: &Device) {
    proptest!(cases(128), |(
        config in problem::config(1024),
        lengths in problem::lengths(200),
        content in problem::content(),
        page_size in around(&[1, 16, 64]).prop_map(|size| size.max(1)),
        storage in prop::sample::select(STORAGES.to_vec()),
        skipped in 0usize..6,
        seed in any::<u64>(),
    )| {
        let problem = Problem::new(&config, &lengths, content, seed);
        let pool = Pool::full(&problem, page_size, storage, seed);
        let others = [RowAction::Skip, RowAction::Complete, RowAction::Reuse];
        let actions: Vec<RowAction> = (0..lengths.len())
            .map(|r| if r == skipped { others[skipped % 3] } else { RowAction::Score })
            .collect();
        check(device, &problem, &pool, &actions, seed);
    });
}

/// The number of candidates around the places where work is cut.
fn sizes_around_every_cut(device: &Device) {
    let config = SelectConfig { n_init: 2, n_local: 3, ..problem::small_config() };
    for candidates in [1, 2, 63, 64, 65, 511, 512, 513, 1021, 1023, 1024, 1025, 1536, 2053] {
        let problem =
            Problem::new(&config, &[(2 + candidates + 3 + 1, 1)], Content::Peaked, candidates as u64);
        let pool = Pool::full(&problem, 16, STORAGES[candidates % STORAGES.len()], 1);
        check(device, &problem, &pool, &[RowAction::Score], 5);
    }
}

/// Whole chunks without a number, or whose largest logit is infinite.
fn chunks_of_nan_and_infinities(device: &Device) {
    let config = SelectConfig { n_init: 0, n_local: 0, ..problem::small_config() };
    let n = 1600;
    let width = config.heads.num_kv_heads * config.heads.head_dim;
    for (from, to) in [(0, 512), (512, 1024), (1024, 1599), (0, 1599)] {
        for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut problem = Problem::new(&config, &[(n, 1)], Content::Peaked, 8);
            for token in from..to {
                problem.rows[0].k[token * width + token % width] = odd;
            }
            let pool = Pool::full(&problem, 16, Storage::Nhd, 1);
            check(device, &problem, &pool, &[RowAction::Score], 6);
        }
    }
}

/// Every instance of the GPU kernel, real and emulated: type, head dimension and columns, with ragged batches, pages of
/// every kind and numbers of candidates around tile and chunk borders.
fn gpu_instances(device: &Device) {
    let groups = [(1, 8), (3, 2), (4, 2), (5, 1), (7, 2), (8, 1), (16, 1), (12, 3)];
    for (i, (group, num_kv_heads)) in groups.into_iter().enumerate() {
        for (j, head_dim) in [64, 96, 128, 256].into_iter().enumerate() {
            if head_dim == 256 && group > 8 {
                continue; // no such instance
            }
            let heads = HeadShape { num_qo_heads: group * num_kv_heads, num_kv_heads, head_dim };
            let dtype = [DType::F16, DType::Bf16][(i + j) % 2];
            let config = SelectConfig { heads, dtype, n_init: 2, n_local: 3, ..problem::small_config() };
            let lengths = [(6 + 15, 1), (6 + 16, 1), (5, 1), (5 + 133, 1), (0, 0), (6 + 65, 1)];
            let problem = Problem::new(&config, &lengths, Content::Peaked, i as u64);
            let pool = Pool::full(&problem, [16, 1, 7, 64][(i + j) % 4], STORAGES[(i + 2 * j) % 5], 3);
            let mut actions = [RowAction::Score; 6];
            (actions[2], actions[4]) = (RowAction::Reuse, RowAction::Skip);
            check(device, &problem, &pool, &actions, 9);
        }
    }
}

/// The kernel that streams pages, real and emulated: every layout and page size that it takes, streams of one warp to all,
/// columns, and candidates that begin and end within a tile, a page and a copy.
fn gpu_streamed_pages(device: &Device) {
    let storages = [Storage::Nhd, Storage::Hnd, Storage::CombinedNhd, Storage::CombinedHnd];
    let shapes = [(4, 8), (1, 4), (5, 2), (2, 1), (9, 3), (16, 1), (8, 5), (3, 7), (4, 6), (12, 2)];
    for (i, page_size) in [1, 2, 4, 8, 16, 32, 64].into_iter().enumerate() {
        for (j, storage) in storages.into_iter().enumerate() {
            for (k, head_dim) in [64, 96, 128].into_iter().enumerate() {
                // Small pages are streamed only where they have many heads.
                let (group, num_kv_heads) = match (page_size, storage) {
                    (1 | 2, _) => [(4, 8), (1, 8), (2, 6)][(i + j + k) % 3],
                    _ => shapes[(12 * i + 3 * j + k) % shapes.len()],
                };
                let heads = HeadShape { num_qo_heads: group * num_kv_heads, num_kv_heads, head_dim };
                let dtype = [DType::F16, DType::Bf16][(i + j + k) % 2];
                let n_init = [0, 2, 16, 37][(j + k) % 4];
                let config = SelectConfig { heads, dtype, n_init, n_local: 3, ..problem::small_config() };
                let around = 4 + n_init;
                let lengths =
                    [(around + 13, 1), (around + 45, 1), (0, 0), (around + 96, 1), (around + 227, 1)];
                let seed = (i * 16 + j * 4 + k) as u64;
                let problem = Problem::new(&config, &lengths, Content::Peaked, seed);
                let pool = Pool::full(&problem, page_size, storage, seed);
                let mut actions = [RowAction::Score; 5];
                (actions[2], actions[1]) = (RowAction::Skip, [RowAction::Score, RowAction::Reuse][k % 2]);
                check(device, &problem, &pool, &actions, seed);
            }
        }
    }
}

/// Pages that are streamed and pages that are not give the same bits where the tiles are of one size: 16 tokens, as in most
/// instances.
fn gpu_kernels_agree_in_every_bit(device: &Device) {
    for (group, head_dim) in [(7, 128), (16, 64), (4, 96), (8, 256)] {
        let heads = HeadShape { num_qo_heads: 4 * group, num_kv_heads: 4, head_dim };
        let config =
            SelectConfig { heads, dtype: DType::Bf16, n_init: 5, n_local: 3, ..problem::small_config() };
        let problem = Problem::new(&config, &[(9 + 777, 1), (400, 1)], Content::Peaked, 3);
        let mut random = Random(4);
        let queries: Vec<f64> =
            (0..2 * 4 * group * head_dim).map(|_| random.normal() as f32).map(f64::from).collect();
        let [streamed, loaded] = [Storage::Nhd, Storage::Gaps].map(|storage| {
            let pool = Pool::full(&problem, 16, storage, 5).to(device);
            let batch = pool.batch(&problem);
            let mut ts = prepared(device, &config, &batch, &queries, &[RowAction::Score; 2]);
            ts.score(&batch, pool.view()).unwrap();
            [values(ts.workspace().buffer(Buffer::Logits)), values(ts.workspace().buffer(Buffer::Stats))]
        });
        assert_eq!(streamed, loaded, "{}", device.name());
    }
}

/// NaN and infinities on the GPU kernel: each token's own, and whole tiles of them.
fn gpu_nan_and_infinities(device: &Device) {
    let heads = HeadShape { num_qo_heads: 8, num_kv_heads: 2, head_dim: 64 };
    let config = SelectConfig { heads, dtype: DType::Bf16, n_init: 0, n_local: 0, ..problem::small_config() };
    for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for tokens in [7..8, 0..32, 0..199] {
            let mut problem = Problem::new(&config, &[(200, 1)], Content::Peaked, 8);
            for token in tokens {
                problem.rows[0].k[token * 128 + token % 128] = odd;
            }
            let pool = Pool::full(&problem, 16, Storage::Nhd, 1);
            check(device, &problem, &pool, &[RowAction::Score], 6);
        }
    }
}
