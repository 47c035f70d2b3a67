//! `append`: the block's keys and values land in their pages, bit by bit, and nothing else changes.

mod common;

use common::paged::{Pool, STORAGES, Storage, limits};
use common::problem::{self, Content, Problem, around, heads};
use common::run::{Inputs, only};
use common::{bits, cases, on_devices};
use proptest::prelude::*;
use tokenselect::{DType, Device, HeadShape, Operations, SelectConfig};

on_devices! {
    cpu: writes_the_block_and_nothing_else;
    gpus: gpu_kernels;
}

fn writes_the_block_and_nothing_else(device: &Device) {
    proptest!(cases(128), |(
        heads in heads(1024),
        dtype in problem::dtype(),
        lengths in problem::lengths(150),
        page_size in around(&[1, 16, 64]).prop_map(|size| size.max(1)),
        storage in prop::sample::select(STORAGES.to_vec()),
        seed in any::<u64>(),
    )| {
        let config = SelectConfig { heads, dtype, ..SelectConfig::default() };
        let problem = Problem::new(&config, &lengths, Content::Wild, seed);
        check(device, &problem, page_size, storage, seed);
    });
}

/// Every layout, ragged blocks and head dimensions on GPU kernels, real and emulated.
fn gpu_kernels(device: &Device) {
    for (i, storage) in STORAGES.into_iter().enumerate() {
        for (num_kv_heads, head_dim) in [(1, 64), (2, 96), (3, 128), (8, 128), (2, 256), (5, 8)] {
            let heads = HeadShape { num_qo_heads: num_kv_heads, num_kv_heads, head_dim };
            let dtype = [DType::F16, DType::Bf16][i % 2];
            let config = SelectConfig { heads, dtype, ..SelectConfig::default() };
            let lengths = [(33, 1), (0, 0), (40, 17), (7, 0), (16, 16)];
            let problem = Problem::new(&config, &lengths, Content::Wild, i as u64);
            check(device, &problem, [1, 16, 7, 64, 3][i], storage, i as u64);
        }
    }
}

fn check(device: &Device, problem: &Problem, page_size: usize, storage: Storage, seed: u64) {
    let mut pool = Pool::before_block(problem, page_size, storage, seed).to(device);
    let batch = pool.batch(problem);
    let append = Operations { append: true, ..Operations::NONE };
    let ts = only(device, &problem.config, limits(&batch), append);
    let inputs = Inputs::new(problem).to(device);
    ts.append(&batch, pool.view_mut(), inputs.k.view(), inputs.v.view()).unwrap();
    // The same seed shuffles the same pages; slots without a token hold NaN in both.
    let want = Pool::full(problem, page_size, storage, seed);
    assert_eq!(first_difference(&bits(&pool.k), &bits(&want.k)), None, "keys on {}", device.name());
    assert_eq!(first_difference(&bits(&pool.v), &bits(&want.v)), None, "values on {}", device.name());
}

fn first_difference(got: &[u64], want: &[u64]) -> Option<usize> {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).position(|(got, want)| got != want)
}
