//! Blocks of longer rows (`Batch::in_blocks`): what each selects is what it would select alone.

mod common;

use std::ops::Range;

use common::paged::{Pool, STORAGES, Storage, limits};
use common::problem::{self, Content, Problem, Row, small_config};
use common::run::{Inputs, assert_selected, only, selected_lists};
use common::{bits, cases, naive, naive_config, on_devices, values};
use proptest::prelude::*;
use tokenselect::{
    Batch, Buffer, DType, Device, HeadShape, Operations, PageTables, Positions, Rope, SelectConfig,
    TokenSelect,
};

on_devices! {
    all: random_rows_in_blocks;
    gpus: kernel_instances, nan_and_infinities, logits_of_every_size, alone_or_in_a_group_the_same_bits;
}

/// A block as a row of its own.
fn block(problem: &Problem, row: &Row, tokens: Range<usize>) -> Row {
    let HeadShape { num_qo_heads, num_kv_heads, head_dim } = problem.config.heads;
    let before = row.n - row.t;
    let end = before + tokens.end;
    Row {
        n: end,
        t: tokens.len(),
        q: row.q[tokens.start * num_qo_heads * head_dim..tokens.end * num_qo_heads * head_dim].to_vec(),
        k: row.k[..end * num_kv_heads * head_dim].to_vec(),
        v: row.v[..end * num_kv_heads * head_dim].to_vec(),
    }
}

/// Tokens of each block of a row, from the row's first query.
fn cuts(row: &Row, block_len: usize) -> Vec<Range<usize>> {
    (0..row.t.div_ceil(block_len).max(1)).map(|i| i * block_len..row.t.min((i + 1) * block_len)).collect()
}

fn prefill(device: &Device, config: &SelectConfig, batch: &Batch) -> TokenSelect {
    let operations = Operations { attend: false, ..Operations::PREFILL };
    only(device, config, limits(batch), operations)
}

/// Lists and votes of every block of a problem's rows against the definitions.
fn check(device: &Device, problem: &Problem, page_size: usize, storage: Storage, block_len: usize) {
    let config = naive_config(&problem.config);
    let pool = Pool::full(problem, page_size, storage, 5).to(device);
    let batch = pool.batch(problem).in_blocks(block_len).unwrap();
    let q = Inputs::new(problem).to(device).q;
    let mut ts = prefill(device, &problem.config, &batch);
    ts.select(&batch, pool.view(), q.view(), None).unwrap();
    let lists = selected_lists(&ts, batch.num_rows());
    let votes = values(ts.workspace().buffer(Buffer::Votes));
    let mut place = 0;
    for (r, row) in problem.rows.iter().enumerate() {
        for tokens in cuts(row, block_len) {
            let what = format!("{}: row {r} of {}, block {tokens:?}", device.name(), row.n);
            let (list, of_row) = (&lists[place], batch.row(place).unwrap());
            place += 1;
            if row.n == 0 || row.t == 0 {
                assert!(list.is_empty(), "{what}: padding selects nothing");
                continue;
            }
            let block = block(problem, row, tokens);
            assert_eq!((of_row.kv_len, of_row.block_len()), (block.n, block.t), "{what}");
            assert_selected(&what, &config, &block, list);
            let range = naive::candidates(&config, block.n, block.t);
            let unpooled = naive::Config { pool_window: 1, ..config.clone() };
            let Some(want) = naive::select(&unpooled, &block.q, &block.k, &mut None).votes else { continue };
            let got = &votes[of_row.token_base..][range];
            for (j, (&got, &want)) in got.iter().zip(&want).enumerate() {
                let allowed = 1e-3 * want.max(1e-7);
                assert!(
                    got.is_nan() && want.is_nan() || (got - want).abs() <= allowed,
                    "{what}: vote {j} is {got}, {want} by the definitions"
                );
            }
        }
    }
    assert_eq!(place, batch.num_rows());
}

fn random_rows_in_blocks(device: &Device) {
    proptest!(cases(48), |(
        config in problem::config(768),
        lengths in problem::lengths(180),
        content in problem::content(),
        page_size in prop::sample::select(vec![1usize, 5, 16]),
        storage in prop::sample::select(STORAGES.to_vec()),
        block_len in prop::sample::select(vec![1usize, 3, 16, 64]),
        seed in any::<u64>(),
    )| {
        let problem = Problem::new(&config, &lengths, content, seed);
        if device.supports(&config).is_ok() {
            check(device, &problem, page_size, storage, block_len);
        }
    });
}

/// Each head dimension and number of heads that has kernels; more blocks than a group, and more than one row.
fn kernel_instances(device: &Device) {
    for (heads, dtype, reassigned) in [
        ([2, 4, 64], DType::Bf16, false),
        ([9, 1, 64], DType::F16, true),
        ([1, 7, 64], DType::F16, false),
        ([1, 16, 64], DType::Bf16, true),
        ([1, 3, 96], DType::Bf16, false),
        ([5, 4, 128], DType::Bf16, true),
        ([2, 8, 128], DType::F16, false),
        ([3, 2, 256], DType::Bf16, false),
        ([1, 12, 256], DType::F16, true),
    ] {
        let [num_kv_heads, group, head_dim] = heads;
        let heads = HeadShape { num_qo_heads: num_kv_heads * group, num_kv_heads, head_dim };
        let positions = if reassigned { Positions::Reassigned(Rope::default()) } else { Positions::Native };
        let config = SelectConfig { heads, dtype, positions, n_init: 3, n_local: 5, ..small_config() };
        let rows = [(330, 90), (150, 1), (0, 0), (71, 40)];
        let problem = Problem::new(&config, &rows, Content::Peaked, head_dim as u64);
        check(device, &problem, 16, Storage::Nhd, 5);
    }
}

fn nan_and_infinities(device: &Device) {
    let heads = HeadShape { num_qo_heads: 8, num_kv_heads: 2, head_dim: 64 };
    let config = SelectConfig { heads, dtype: DType::Bf16, n_init: 0, n_local: 0, ..small_config() };
    for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for tokens in [7..8, 0..32, 60..199, 0..200] {
            let mut problem = Problem::new(&config, &[(200, 20)], Content::Peaked, 8);
            for token in tokens {
                problem.rows[0].k[token * 128 + token % 128] = odd;
            }
            check(device, &problem, 16, Storage::Nhd, 6);
        }
    }
}

/// Logits that grow along the row, so that references must be raised again and again, or fall; and large ones of few tokens.
fn logits_of_every_size(device: &Device) {
    let heads = HeadShape { num_qo_heads: 4, num_kv_heads: 1, head_dim: 64 };
    let config = SelectConfig {
        heads,
        dtype: DType::Bf16,
        n_init: 0,
        n_local: 0,
        score_scale: Some(1.0),
        ..small_config()
    };
    for slope in [-20.0, -0.5, 0.0, 0.5, 20.0] {
        let mut problem = Problem::new(&config, &[(400, 17)], Content::Peaked, 9);
        let row = &mut problem.rows[0];
        row.q.iter_mut().for_each(|x| *x = x.abs().max(0.25));
        for (i, x) in row.k.iter_mut().enumerate() {
            *x = common::round(
                DType::Bf16,
                slope * (i / 64) as f64 / 16.0 + if i % 64 == 0 { 0.125 } else { 0.0 },
            );
        }
        check(device, &problem, 16, Storage::Nhd, 17);
        check(device, &problem, 16, Storage::Nhd, 4);
    }
}

/// The blocks of a row in one batch, and each in a batch of its own, the others not yet there; on one row and on several.
fn alone_or_in_a_group_the_same_bits(device: &Device) {
    for (seed, content) in [(1, Content::Peaked), (2, Content::Tied), (3, Content::Wild)] {
        let heads = HeadShape { num_qo_heads: 10, num_kv_heads: 2, head_dim: 64 };
        let config = SelectConfig { heads, dtype: DType::Bf16, n_init: 4, n_local: 7, ..small_config() };
        let problem = Problem::new(&config, &[(1300, 70), (230, 33)], content, seed);
        let pool = Pool::full(&problem, 8, Storage::Nhd, 5).to(device);
        let batch = pool.batch(&problem).in_blocks(9).unwrap();
        let q = Inputs::new(&problem).to(device).q;
        let mut ts = prefill(device, &config, &batch);
        ts.select(&batch, pool.view(), q.view(), None).unwrap();
        let lists = selected_lists(&ts, batch.num_rows());
        let votes = bits(ts.workspace().buffer(Buffer::Votes));
        let naive = naive_config(&config);
        let mut place = 0;
        for row in &problem.rows {
            for tokens in cuts(row, 9) {
                let block = block(&problem, row, tokens.clone());
                let of_row = batch.row(place).unwrap();
                let tables = PageTables {
                    indptr: vec![0, of_row.pages.len() as u32],
                    indices: of_row.pages.to_vec(),
                    last_page_len: vec![(block.n - 8 * (of_row.pages.len() - 1)) as u32],
                };
                let one = Problem { config: config.clone(), rows: vec![block.clone()] };
                let alone = Batch::new(8, vec![0, block.t as u32], tables).unwrap().in_blocks(9).unwrap();
                let mut other = prefill(device, &config, &alone);
                other.select(&alone, pool.view(), Inputs::new(&one).to(device).q.view(), None).unwrap();
                let what = format!("{}: block {tokens:?} of {}", device.name(), row.n);
                assert_eq!(lists[place], selected_lists(&other, 1)[0], "{what}");
                let range = naive::candidates(&naive, block.n, block.t);
                if range.len() > config.top_k {
                    let own = bits(other.workspace().buffer(Buffer::Votes));
                    assert!(votes[of_row.token_base..][range.clone()] == own[range], "{what}");
                }
                place += 1;
            }
        }
    }
}
