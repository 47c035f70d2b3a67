//! Blocks of longer rows (`Batch::in_blocks`): what each selects is what it would select alone.

mod common;

use std::ops::Range;

use common::paged::{Pool, STORAGES, Storage, limits};
use common::problem::{self, Content, Problem, Row, small_config};
use common::run::{Inputs, assert_selected, only, selected_lists, token_select};
use common::{assert_close, bits, cases, naive, naive_config, on_devices, tensor, values};
use proptest::prelude::*;
use tokenselect::{
    Batch, BatchSlot, Buffer, CacheConfig, DType, Device, Error, HeadShape, KvLayout, KvView, Limits,
    Operations, PageTables, PagedKvCache, Positions, Rope, RowAction, SelectConfig, SelectionCacheConfig,
    StepOutput, Tensor, TokenSelect,
};

on_devices! {
    all: random_rows_in_blocks, a_step_of_blocks_is_steps_one_by_one, what_adds_tokens_drops_cached_selections,
        an_infinite_key_under_any_query, an_infinite_key_under_an_infinite_query, a_short_block_behind_a_longer_one;
    gpus: kernel_instances, nan_and_infinities, logits_of_every_size, large_logits_that_tie, tiny_queries,
        votes_by_themselves, alone_or_in_a_group_the_same_bits, batch_after_batch_in_one_workspace,
        the_largest_scale;
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

/// A batch of exactly as many rows and places as the workspace has, then each of its blocks alone, then all again: nothing is left of
/// the batch before. Blocks without candidates, of few in the first tile, or of one tile with those of others; queries, keys and
/// numbers of heads that leave gaps.
fn batch_after_batch_in_one_workspace(device: &Device) {
    for (heads, page_size, content, n_init, rows, block_len) in [
        ([3, 3, 96], 3, Content::Wild, 65, [(100, 30), (0, 0), (131, 1)], 4),
        ([2, 5, 64], 1, Content::Tied, 3, [(90, 40), (9, 9), (130, 3)], 17),
        ([1, 11, 64], 24, Content::Wild, 1023, [(1040, 9), (70, 2), (2, 1)], 2),
        ([1, 7, 256], 64, Content::Peaked, 0, [(66, 4), (65, 2), (1, 1)], 1),
    ] {
        let [num_kv_heads, group, head_dim] = heads;
        let heads = HeadShape { num_qo_heads: num_kv_heads * group, num_kv_heads, head_dim };
        let config = SelectConfig { heads, dtype: DType::F16, n_init, n_local: 1, ..small_config() };
        let problem = Problem::new(&config, &rows, content, head_dim as u64);
        let pool = Pool::full(&problem, page_size, Storage::Hnd, 5).to(device);
        let all = pool.batch(&problem).in_blocks(block_len).unwrap();
        let q = Inputs::new(&problem).to(device).q;
        let mut ts = prefill(device, &config, &all);
        let mut select = |batch: &Batch, q: &Tensor| {
            ts.select(batch, pool.view(), q.view(), None).unwrap();
            (selected_lists(&ts, batch.num_rows()), bits(ts.workspace().buffer(Buffer::Votes)))
        };
        let (lists, votes) = select(&all, &q);
        let (naive, mut place) = (naive_config(&config), 0);
        let mut scored = Vec::new();
        for row in problem.rows.iter() {
            for tokens in cuts(row, block_len) {
                let of_row = all.row(place).unwrap();
                place += 1;
                if row.n == 0 {
                    continue;
                }
                let block = block(&problem, row, tokens.clone());
                let tables = PageTables {
                    indptr: vec![0, of_row.pages.len() as u32],
                    indices: of_row.pages.to_vec(),
                    last_page_len: vec![(block.n - page_size * (of_row.pages.len() - 1)) as u32],
                };
                let one = Problem { config: config.clone(), rows: vec![block.clone()] };
                let alone = Batch::new(page_size, vec![0, block.t as u32], tables).unwrap();
                let alone = alone.in_blocks(block_len).unwrap();
                let (list, own) = select(&alone, &Inputs::new(&one).to(device).q);
                let what = format!("{}: {heads:?}, block {tokens:?} of {}", device.name(), row.n);
                assert_eq!(lists[place - 1], list[0], "{what}");
                let range = naive::candidates(&naive, block.n, block.t);
                if range.len() > config.top_k {
                    let range = of_row.token_base + range.start..of_row.token_base + range.end;
                    let from = range.start - of_row.token_base;
                    assert!(votes[range.clone()] == own[from..from + range.len()], "{what}");
                    scored.push(range);
                }
            }
        }
        assert!(scored.len() > 2, "{heads:?}");
        let (again, votes_again) = select(&all, &q);
        assert_eq!(lists, again, "{}: {heads:?}", device.name());
        assert!(scored.into_iter().all(|range| votes[range.clone()] == votes_again[range]));
    }
}

/// Tokens of a sequence as inputs of a step.
fn inputs(device: &Device, problem: &Problem, tokens: Range<usize>) -> Inputs {
    let (row, heads) = (&problem.rows[0], problem.config.heads);
    let part = |data: &[f64], heads_of: usize| {
        let width = heads_of * heads.head_dim;
        let data = &data[tokens.start * width..tokens.end * width];
        tensor(problem.config.dtype, data, [tokens.len(), heads_of, heads.head_dim])
    };
    let [q, k, v] = [
        part(&row.q, heads.num_qo_heads),
        part(&row.k, heads.num_kv_heads),
        part(&row.v, heads.num_kv_heads),
    ];
    Inputs { q, k, v }.to(device)
}

/// An owned cache, a piece of a prompt in one step and block by block; and decoding after it.
fn a_step_of_blocks_is_steps_one_by_one(device: &Device) {
    let heads = HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 };
    for positions in [Positions::Native, Positions::Reassigned(Rope::default())] {
        let dtype = DType::Bf16;
        let config = SelectConfig { heads, dtype, positions, n_init: 3, n_local: 10, ..small_config() };
        let problem = Problem::new(&config, &[(190, 190)], Content::Peaked, 4);
        let limits = Limits { max_rows: 8, max_block_len: 60, max_kv_tokens: 8 * 192 };
        let pages = CacheConfig { num_layers: 1, num_pages: 16, page_size: 24, ..CacheConfig::default() };
        let [mut whole, mut single] = [0, 1].map(|_| PagedKvCache::new(device, &config, &pages).unwrap());
        let mut ts = TokenSelect::new(device, config.clone(), limits).unwrap();
        let mut step = |cache: &mut PagedKvCache, batch: &Batch, tokens: Range<usize>| {
            let inputs = inputs(device, &problem, tokens.clone());
            let shape = [tokens.len(), 4, 64];
            let mut out = Tensor::zeros_on(device, DType::F32, shape).unwrap();
            let output = StepOutput { out: out.view_mut(), lse: None };
            ts.step(cache, 0, batch, inputs.step(), output).unwrap();
            (selected_lists(&ts, batch.num_rows()), values(&out))
        };
        let (a, b) = (whole.create().unwrap(), single.create().unwrap());
        // A prefix, the piece of 100 tokens, and two tokens of decoding.
        let batch = whole.extend(&[(a, 60)]).unwrap();
        step(&mut whole, &batch, 0..60);
        let batch = single.extend(&[(b, 60)]).unwrap();
        step(&mut single, &batch, 0..60);
        let batch = whole.extend(&[(a, 100)]).unwrap().in_blocks(24).unwrap();
        assert_eq!((batch.num_rows(), batch.max_block_len(), batch.max_kv_len()), (5, 24, 160));
        let (lists, out) = step(&mut whole, &batch, 60..160);
        assert_eq!(whole.written_len(0, a).unwrap(), 160);
        for (i, begin) in (60..160).step_by(24).enumerate() {
            let tokens = begin..160.min(begin + 24);
            let batch = single.extend(&[(b, tokens.len())]).unwrap();
            let (list, alone) = step(&mut single, &batch, tokens.clone());
            let what = format!("{}: block {tokens:?}", device.name());
            assert_eq!(lists[i], list[0], "{what}");
            let of_block = &out[(begin - 60) * 256..][..alone.len()];
            assert_close(&what, of_block, &alone, 64, common::gpu_tolerance(DType::Bf16));
        }
        for token in 160..162 {
            let batch = whole.extend(&[(a, 1)]).unwrap();
            let got = step(&mut whole, &batch, token..token + 1);
            let batch = single.extend(&[(b, 1)]).unwrap();
            assert_eq!(got, step(&mut single, &batch, token..token + 1), "{}", device.name());
        }
    }
}

/// What cannot be cut, and what blocks cannot do.
#[test]
fn what_cannot_be_cut_is_refused() {
    let tables = PageTables { indptr: vec![0, 2], indices: vec![4, 1], last_page_len: vec![3] };
    let whole = Batch::new(8, vec![0, 7], tables.clone()).unwrap();
    let text = |result: tokenselect::Result<Batch>| result.map(drop).unwrap_err().to_string();
    assert!(text(whole.in_blocks(0)).contains("block_len") && text(whole.in_blocks(0)).contains("got 0"));
    let cut = whole.in_blocks(4).unwrap();
    assert_eq!((cut.num_rows(), cut.qo_indptr()), (2, &[0, 4, 7][..]));
    assert_eq!(cut.tables().last_page_len, [8, 3]);
    assert_eq!(cut.tables().indices, [4, 4, 1]);
    for refused in [cut.in_blocks(2), cut.clone().padded(4, 1), cut.clone().with_sequence_indices(vec![0, 1])]
    {
        assert!(text(refused).contains("not cut into blocks"));
    }
    let candidates = std::iter::once(0..5).collect();
    let parts = Batch::partial(8, vec![0, 7], tables, candidates).unwrap();
    assert!(text(parts.in_blocks(4)).contains("whole sequences"));
    let device = Device::emulated();
    assert!(BatchSlot::new(&device, &cut, 8).unwrap_err().to_string().contains("not cut into blocks"));
    let mut slot = BatchSlot::new(&device, &whole, 8).unwrap();
    let uncut = slot.put(cut.clone()).map(drop).unwrap_err().to_string();
    assert!(uncut.contains("not cut into blocks"), "{uncut}");

    let config = SelectConfig { dtype: DType::Bf16, ..small_config() };
    let config = SelectConfig { heads: HeadShape { head_dim: 64, ..config.heads }, ..config };
    let only_rows = Operations { score_blocks: false, attend: false, ..Operations::ALL };
    for (operations, batch, needs) in [
        (only_rows, &cut, "`score_blocks`"),
        (Operations { attend: false, ..Operations::PREFILL }, &whole, "`score`"),
    ] {
        let mut ts = only(&device, &config, limits(batch), operations);
        let pages = Tensor::zeros_on(&device, DType::Bf16, [8, 8, 2, 64]).unwrap();
        let kv = KvView::new(pages.view(), pages.view(), KvLayout::Nhd).unwrap();
        let q = Tensor::zeros_on(&device, DType::Bf16, [7, 4, 64]).unwrap();
        let error = ts.select(batch, kv, q.view(), None).unwrap_err().to_string();
        assert!(error.contains(needs), "{error}");
    }
}

/// What the page limit counts.
#[test]
fn too_many_pages_are_refused() {
    // Every block has the pages up to its own end, no more.
    let tables =
        PageTables { indptr: vec![0, 66_000], indices: (0..66_000).collect(), last_page_len: vec![1] };
    let error = Batch::new(1, vec![0, 66_000], tables).unwrap().in_blocks(1).map(drop);
    let (what, limit, got) = ("pages of a batch", i32::MAX as usize, (1..=66_000).sum());
    assert_eq!(error, Err(Error::Limit { what, limit, got }));
}

/// A selection of blocks leaves no logits: what needs them is refused, and votes are not.
#[test]
fn blocks_leave_votes_and_no_logits() {
    let device = Device::emulated();
    let heads = HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 };
    let config = SelectConfig { heads, dtype: DType::Bf16, ..small_config() };
    let problem = Problem::new(&config, &[(60, 20)], Content::Peaked, 4);
    let pool = Pool::full(&problem, 8, Storage::Nhd, 5).to(&device);
    let batch = pool.batch(&problem).in_blocks(9).unwrap();
    let mut ts = token_select(&device, &problem, &batch);
    ts.select(&batch, pool.view(), Inputs::new(&problem).to(&device).q.view(), None).unwrap();
    let lists = selected_lists(&ts, batch.num_rows());
    assert!(matches!(ts.vote(&batch), Err(Error::Order { op: "vote", .. })));
    ts.top_k(&batch, None).unwrap();
    assert_eq!(lists, selected_lists(&ts, batch.num_rows()));
}

/// A plan for blocks alone has no place for logits: what reads them is refused, whatever the caller provides.
#[test]
fn votes_without_logits_are_refused() {
    let device = Device::emulated();
    let heads = HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 };
    let config = SelectConfig { heads, dtype: DType::Bf16, ..small_config() };
    let problem = Problem::new(&config, &[(60, 20)], Content::Peaked, 4);
    let batch = Pool::full(&problem, 8, Storage::Nhd, 5).batch(&problem);
    let mut ts = prefill(&device, &config, &batch);
    assert_eq!(ts.workspace().buffer(Buffer::Logits).shape().dims()[0], 0);
    ts.provide(Buffer::Queries, &batch).unwrap();
    ts.provide(Buffer::Logits, &batch).unwrap();
    for (op, result) in [("vote", ts.vote(&batch)), ("vote_top_k", ts.vote_top_k(&batch, None))] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(op) && error.contains("`score`"), "{error}");
    }
}

/// Tokens that are added without a selection of their own row are no reason to use an old one again: it knows nothing of them.
fn what_adds_tokens_drops_cached_selections(device: &Device) {
    let heads = HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 };
    let cached = Some(SelectionCacheConfig { similarity_threshold: -1.0, max_reuse: None });
    let config = SelectConfig {
        heads,
        dtype: DType::Bf16,
        n_init: 3,
        n_local: 10,
        selection_cache: cached,
        ..small_config()
    };
    let problem = Problem::new(&config, &[(200, 200)], Content::Peaked, 4);
    let limits = Limits { max_rows: 8, max_block_len: 100, max_kv_tokens: 8 * 192 };
    let pages = CacheConfig { num_layers: 1, num_pages: 16, page_size: 16, ..CacheConfig::default() };
    for way in ["in_blocks", "step_dense", "fill", "step"] {
        let mut cache = PagedKvCache::new(device, &config, &pages).unwrap();
        let mut ts = TokenSelect::new(device, config.clone(), limits).unwrap();
        let id = cache.create().unwrap();
        let mut actions = Vec::new();
        for (begin, len) in [(0, 80), (80, 1), (81, 1), (82, 90), (172, 1), (173, 1)] {
            let batch = cache.extend(&[(id, len)]).unwrap();
            let batch = if len == 90 && way == "in_blocks" { batch.in_blocks(30).unwrap() } else { batch };
            let inputs = inputs(device, &problem, begin..begin + len);
            let mut out = Tensor::zeros_on(device, DType::F32, [len, 4, 64]).unwrap();
            let output = StepOutput { out: out.view_mut(), lse: None };
            match way {
                "step_dense" if len == 90 => ts.step_dense(&mut cache, 0, &batch, inputs.step(), output),
                "fill" if len == 90 => ts.fill(&mut cache, 0, &batch, inputs.k.view(), inputs.v.view()),
                _ => ts.step(&mut cache, 0, &batch, inputs.step(), output),
            }
            .unwrap();
            if len == 1 {
                actions.push(ts.workspace().actions().unwrap()[0]);
            }
        }
        // By a step, the selection of the block before is used: it was made over the new tokens' elders, and its age counts.
        let after = if way == "step" { RowAction::Reuse } else { RowAction::Score };
        let want = [RowAction::Score, RowAction::Reuse, after, RowAction::Reuse];
        assert_eq!(actions, want, "{}: {way}", device.name());
    }
}

/// A batch of blocks beyond the limits is refused before anything grows; one within them is what `in_blocks` makes.
#[test]
fn extend_in_blocks_knows_the_limits() {
    let config = SelectConfig { dtype: DType::F32, ..small_config() };
    let pages = CacheConfig { num_layers: 1, num_pages: 40, page_size: 16, ..CacheConfig::default() };
    let mut cache = PagedKvCache::new(&Device::cpu(), &config, &pages).unwrap();
    let ids = [cache.create().unwrap(), cache.create().unwrap()];
    // 64 + 128 + 192 + 256 + 304 places for tokens, and 16 of the other sequence.
    let limits = Limits { max_rows: 6, max_block_len: 64, max_kv_tokens: 960 };
    let growth = [(ids[0], 300), (ids[1], 1)];
    for (what, less) in [
        ("max_rows", Limits { max_rows: 5, ..limits }),
        ("max_block_len", Limits { max_block_len: 63, ..limits }),
        ("max_kv_tokens", Limits { max_kv_tokens: 959, ..limits }),
    ] {
        let error = cache.extend_in_blocks(&less, &growth, 64).unwrap_err();
        assert!(matches!(error, Error::Limit { what: named, .. } if named == what), "{error}");
    }
    let error = cache.extend_in_blocks(&limits, &growth, 0).unwrap_err();
    assert!(matches!(error, Error::Argument { what: "block_len", .. }), "{error}");
    // Blocks that no batch has room for, at once, whatever the limits.
    let any = Limits { max_rows: usize::MAX, max_block_len: usize::MAX, max_kv_tokens: usize::MAX };
    for tokens in [usize::MAX, 1 << 40, 1 << 31] {
        let error = cache.extend_in_blocks(&any, &[(ids[0], tokens)], 1).unwrap_err();
        assert!(matches!(error, Error::SequenceTooLong { got, .. } if got == tokens), "{error}");
    }
    let error = cache.extend_in_blocks(&any, &[(ids[0], 1 << 30)], 1).unwrap_err();
    assert_eq!(error, Error::Limit { what: "rows of a batch", limit: 1 << 24, got: 1 << 30 });
    let got = (1..=1usize << 20).map(|tokens| tokens.div_ceil(16)).sum();
    let error = cache.extend_in_blocks(&any, &[(ids[0], 1 << 20)], 1).unwrap_err();
    assert_eq!(error, Error::Limit { what: "pages of a batch", limit: i32::MAX as usize, got });
    assert_eq!(cache.len(ids[0]), Ok(0));
    let batch = cache.extend_in_blocks(&limits, &growth, 64).unwrap();
    assert_eq!((batch.num_rows(), batch.num_token_places()), (6, 960));
    assert_eq!(batch.qo_indptr(), [0, 64, 128, 192, 256, 300, 301]);
}

/// What compute capability 8.0 runs: less shared memory, no products of warpgroups.
#[test]
fn the_same_without_warpgroups() {
    let device = Device::emulated_sm_80();
    kernel_instances(&device);
    nan_and_infinities(&device);
    large_logits_that_tie(&device);
    alone_or_in_a_group_the_same_bits(&device);
    batch_after_batch_in_one_workspace(&device);
    an_infinite_key_under_an_infinite_query(&device);
}

/// Many equal large logits of one head, small ones of another: the former share the mass, however large they are.
fn large_logits_that_tie(device: &Device) {
    let heads = HeadShape { num_qo_heads: 2, num_kv_heads: 2, head_dim: 64 };
    for scale in [1e3, 1e5, 1e7, 1e9, 1e30] {
        let config = SelectConfig {
            heads,
            dtype: DType::Bf16,
            n_init: 0,
            n_local: 0,
            top_k: 2,
            score_scale: Some(scale),
            ..small_config()
        };
        let mut problem = Problem::new(&config, &[(100, 1)], Content::Peaked, 4);
        let row = &mut problem.rows[0];
        row.q.fill(0.0);
        row.k.fill(0.0);
        (row.q[0], row.q[64]) = (1.0, 1.0);
        (10..90).for_each(|token| row.k[token * 128] = 3.0);
        for (token, logit) in [(95, 6.0), (97, 5.0)] {
            row.k[token * 128 + 64] = common::round(DType::Bf16, logit / f64::from(scale));
        }
        check(device, &problem, 16, Storage::Nhd, 1);
    }
}

/// A scale at the end of its type makes no NaN of products that are 0.
fn the_largest_scale(device: &Device) {
    let heads = HeadShape { num_qo_heads: 2, num_kv_heads: 2, head_dim: 64 };
    for scale in [f32::MAX, -f32::MAX] {
        let score_scale = Some(scale);
        let config =
            SelectConfig { heads, dtype: DType::Bf16, n_init: 0, n_local: 0, score_scale, ..small_config() };
        let mut problem = Problem::new(&config, &[(100, 1)], Content::Peaked, 4);
        let row = &mut problem.rows[0];
        row.q.fill(0.0);
        row.k.fill(0.0);
        row.q[0] = 1.0;
        (10..90).for_each(|token| row.k[token * 128] = 3.0);
        check(device, &problem, 16, Storage::Nhd, 1);
    }
}

/// Queries whose halves are few units of their type.
fn tiny_queries(device: &Device) {
    let heads = HeadShape { num_qo_heads: 2, num_kv_heads: 1, head_dim: 64 };
    for (dtype, size, scale) in [
        (DType::F16, 1e-5, 1e4),
        (DType::F16, 1e-6, 1e5),
        (DType::F16, 2e-7, 1e6),
        (DType::Bf16, 1e-30, 1e30),
    ] {
        let config =
            SelectConfig { heads, dtype, n_init: 0, n_local: 0, score_scale: Some(scale), ..small_config() };
        let mut problem = Problem::new(&config, &[(100, 1)], Content::Peaked, 3);
        problem.rows[0].q.iter_mut().for_each(|x| *x = common::round(dtype, *x * size));
        check(device, &problem, 16, Storage::Nhd, 1);
    }
}

/// The operations one by one, over blocks of so many places that their sum would want other kernels than the longest of them.
fn votes_by_themselves(device: &Device) {
    let heads = HeadShape { num_qo_heads: 2, num_kv_heads: 1, head_dim: 64 };
    let config = SelectConfig { heads, dtype: DType::Bf16, ..small_config() };
    let problem = Problem::new(&config, &[(300, 40)], Content::Peaked, 1);
    let pool = Pool::full(&problem, 16, Storage::Nhd, 5).to(device);
    let batch = pool.batch(&problem).in_blocks(10).unwrap();
    let q = Inputs::new(&problem).to(device).q;
    let limits = Limits { max_kv_tokens: 4_300_000, ..limits(&batch) };
    let mut ts = only(device, &config, limits, Operations::SELECTION);
    ts.select(&batch, pool.view(), q.view(), None).unwrap();
    let want = selected_lists(&ts, batch.num_rows());
    ts.pool(&batch, q.view(), None).unwrap();
    ts.score(&batch, pool.view()).unwrap();
    ts.vote_top_k(&batch, None).unwrap();
    assert_eq!(want, selected_lists(&ts, batch.num_rows()), "{}", device.name());
}

/// Launches have room on every device that they are meant for: compute capability 8.6 and 8.9 have the least, and head dimension 256
/// more than that.
#[test]
fn blocks_have_room() {
    use tokenselect_kernels::limits::{SHARED_BYTES_SM_80, SHARED_BYTES_SM_86, SHARED_BYTES_SM_90};
    use tokenselect_kernels::ops::score_blocks::shared_bytes;
    for (head_dim, least) in [
        (64, SHARED_BYTES_SM_86),
        (96, SHARED_BYTES_SM_86),
        (128, SHARED_BYTES_SM_86),
        (256, SHARED_BYTES_SM_80),
    ] {
        assert!(shared_bytes(head_dim, false) <= least, "{head_dim}");
        assert!(shared_bytes(head_dim, true) <= SHARED_BYTES_SM_90, "{head_dim}");
    }
}

/// Selects for the blocks of a problem.
fn selected_for_blocks(device: &Device, problem: &Problem, block_len: usize) -> TokenSelect {
    let pool = Pool::full(problem, 16, Storage::Nhd, 5).to(device);
    let batch = pool.batch(problem).in_blocks(block_len).unwrap();
    let q = Inputs::new(problem).to(device).q;
    let operations = Operations { attend: false, ..Operations::PREFILL };
    let mut ts = only(device, &problem.config, limits(&batch), operations);
    ts.select(&batch, pool.view(), q.view(), None).unwrap();
    ts
}

/// An infinite key has an infinite logit, however little of the query is left beside its high half.
fn an_infinite_key_under_any_query(device: &Device) {
    let heads = HeadShape { num_qo_heads: 1, num_kv_heads: 1, head_dim: 64 };
    let config = SelectConfig { heads, dtype: DType::F16, n_init: 0, n_local: 0, top_k: 2, ..small_config() };
    let mut problem = Problem::new(&config, &[(40, 2)], Content::Peaked, 4);
    let row = &mut problem.rows[0];
    row.q.fill(1.0);
    (row.q[0], row.q[64]) = (0.125, 2f64.powi(-24)); // their mean: 2^-4 + 2^-25
    row.k.fill(0.0);
    row.k[7 * 64] = f64::INFINITY;
    let ts = selected_for_blocks(device, &problem, 2);
    assert_eq!(values(ts.workspace().buffer(Buffer::Votes))[7], 1.0, "{}", device.name());
    assert_eq!(ts.workspace().selected(0).unwrap(), [0, 7, 38, 39]);
}

/// An infinite query and an infinite key have an infinite logit, too: of both halves.
fn an_infinite_key_under_an_infinite_query(device: &Device) {
    let heads = HeadShape { num_qo_heads: 1, num_kv_heads: 1, head_dim: 64 };
    for dtype in [DType::F16, DType::Bf16] {
        let config = SelectConfig { heads, dtype, n_init: 0, n_local: 0, top_k: 2, ..small_config() };
        let mut problem = Problem::new(&config, &[(40, 2)], Content::Peaked, 4);
        let row = &mut problem.rows[0];
        row.q.fill(1.0);
        (row.q[0], row.q[1]) = (f64::INFINITY, f64::NEG_INFINITY);
        for token in 0..40 {
            (row.k[token * 64], row.k[token * 64 + 1]) = (-1.0, 1.0);
        }
        (row.k[7 * 64], row.k[7 * 64 + 1]) = (f64::INFINITY, -1.0);
        (row.k[9 * 64], row.k[9 * 64 + 1]) = (1.0, f64::NEG_INFINITY);
        let ts = selected_for_blocks(device, &problem, 2);
        let votes = values(ts.workspace().buffer(Buffer::Votes));
        assert_eq!((votes[7], votes[9], votes[8]), (0.5, 0.5, 0.0), "{}: {dtype}", device.name());
        assert_eq!(ts.workspace().selected(0).unwrap(), [7, 9, 38, 39]);
    }
}

/// A short block by itself is pooled by another kernel than behind a longer one: to the same bits.
fn a_short_block_behind_a_longer_one(device: &Device) {
    let heads = HeadShape { num_qo_heads: 18, num_kv_heads: 2, head_dim: 64 };
    let positions = Positions::Reassigned(Rope::default());
    let config = SelectConfig {
        heads,
        dtype: DType::F16,
        positions,
        n_init: 4,
        n_local: 7,
        top_k: 5,
        ..small_config()
    };
    let whole = Problem::new(&config, &[(112, 12)], Content::Peaked, 4);
    let mut last = whole.clone();
    let row = &mut last.rows[0];
    row.t = 3;
    row.q.drain(..9 * 18 * 64);
    let of_block = |ts: &TokenSelect, row: usize| {
        bits(ts.workspace().buffer(Buffer::Queries))[row * 18 * 64..][..18 * 64].to_vec()
    };
    let (together, alone) = (selected_for_blocks(device, &whole, 9), selected_for_blocks(device, &last, 9));
    assert!(of_block(&together, 1) == of_block(&alone, 0), "{}", device.name());
}
