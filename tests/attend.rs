//! `attend`: softmax attention over lists of tokens, over parts of lists, and over all tokens.

mod common;

use common::paged::{Pool, STORAGES, Storage};
use common::problem::{self, Content, Problem, Row, around, small_config};
use common::run::{Inputs, outputs, outputs_on, queries, token_select};
use common::{
    Random, assert_close, assert_lse, attention_tolerance, cases, gpu_tolerance, naive, naive_config,
    on_devices, tensor, to_device, values,
};
use proptest::prelude::*;
use tokenselect::{
    Batch, DType, Device, HeadShape, Over, Positions, Ranks, Rope, RopePairing, RopeScaling, SelectConfig,
    Selection, StepOutput, Tensor,
};

on_devices! {
    all:
        later_tokens_of_the_block_have_no_influence, a_query_that_sees_only_minus_infinity_gets_nothing,
        empty_lists_give_zero_and_minus_infinity, a_part_of_a_list_longer_than_what_is_held;
    cpu:
        lists_of_every_kind, parts_of_lists, list_lengths_around_every_cut, block_lengths_around_every_cut,
        causal_mask_across_parts, dense, a_single_token_returns_its_value,
        lse_may_be_left_out_and_padding_has_no_rows;
    gpus:
        gpu_lists_of_every_kind, gpu_list_lengths_around_every_cut, gpu_block_lengths_around_every_cut,
        gpu_values_that_are_not_finite, gpu_dense_decoding, gpu_streamed_lengths_around_every_cut,
        gpu_rotations_of_every_part, gpu_tiles_and_query_blocks_around_every_cut, gpu_large_heads;
}

/// The kernels of blocks of devices that are older than Hopper.
#[test]
fn emulated_sm_80_attends_to_blocks() {
    let device = Device::emulated_sm_80();
    gpu_block_lengths_around_every_cut(&device);
    gpu_tiles_and_query_blocks_around_every_cut(&device);
    gpu_values_that_are_not_finite(&device);
    gpu_rotations_of_every_part(&device);
    gpu_large_heads(&device);
    later_tokens_of_the_block_have_no_influence(&device);
}

/// Devices whose shared memory the kernels of blocks of larger heads do not fit.
#[test]
fn emulated_sm_86_attends_to_blocks() {
    let device = Device::emulated_sm_86();
    gpu_tiles_and_query_blocks_around_every_cut(&device);
    gpu_rotations_of_every_part(&device);
}

/// Launches have room on the devices that they are meant for, those of the decode kernel on every device.
#[test]
fn attention_has_room() {
    use tokenselect_kernels::limits::{SHARED_BYTES_SM_80, SHARED_BYTES_SM_86, SHARED_BYTES_SM_90};
    use tokenselect_kernels::ops::{attend_decode, attend_prefill, attend_warpgroups};
    for head_dim in [64, 96, 128, 256] {
        for rotates in [false, true] {
            assert!(attend_decode::shared_bytes(head_dim, rotates) <= SHARED_BYTES_SM_86, "{head_dim}");
        }
        assert!(attend_prefill::shared_bytes(head_dim) <= SHARED_BYTES_SM_80, "{head_dim}");
        assert!(attend_warpgroups::shared_bytes(head_dim) <= SHARED_BYTES_SM_90, "{head_dim}");
    }
}

/// Parts of lists: `(rank, token)` pairs of every row, and the length of each row's whole list.
struct Lists {
    parts: Vec<Vec<(usize, usize)>>,
    totals: Vec<usize>,
}

impl Lists {
    fn whole(lists: &[Vec<usize>]) -> Self {
        let parts = lists.iter().map(|list| naive::ranked(list)).collect();
        Lists { parts, totals: lists.iter().map(Vec::len).collect() }
    }
}

/// A `[rows, width]` buffer of lists; what lies beyond a list's end names no token and must not be read.
fn padded(lists: impl Iterator<Item = Vec<usize>>, width: usize) -> Tensor {
    let mut data = Vec::new();
    let mut rows = 0;
    for mut list in lists {
        list.resize(width, u32::MAX as usize);
        data.extend(list.into_iter().map(|x| x as f64));
        rows += 1;
    }
    tensor(DType::U32, &data, [rows, width])
}

/// Attention of a problem over lists, with or without ranks: `(out, lse)`.
fn attend_to(
    device: &Device,
    problem: &Problem,
    pool: &Pool,
    lists: &Lists,
    with_ranks: bool,
    out_dtype: DType,
) -> (Vec<f64>, Vec<f64>) {
    let (pool, inputs) = (pool.to(device), Inputs::new(problem).to(device));
    let batch = pool.batch(problem);
    let ts = token_select(device, problem, &batch);
    let (mut out, mut lse) = outputs_on(device, problem, out_dtype);
    let width = lists.parts.iter().map(Vec::len).max().unwrap_or(0) + 2;
    let column = |of: fn(&(usize, usize)) -> usize| {
        to_device(device, &padded(lists.parts.iter().map(move |list| list.iter().map(of).collect()), width))
    };
    let (ranks, tokens) = (column(|pair| pair.0), column(|pair| pair.1));
    let rows = lists.parts.len();
    let lens: Vec<f64> = lists.parts.iter().map(|list| list.len() as f64).collect();
    let totals: Vec<f64> = lists.totals.iter().map(|&total| total as f64).collect();
    let of_rows = |values: &[f64]| to_device(device, &tensor(DType::U32, values, [rows]));
    let (len, total_len) = (of_rows(&lens), of_rows(&totals));
    let ranks = with_ranks.then(|| Ranks { ranks: ranks.view(), total_len: total_len.view() });
    let selection = Selection { tokens: tokens.view(), len: len.view(), ranks };
    let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
    ts.attend(&batch, pool.view(), inputs.q.view(), Over::Lists(&selection), output).unwrap();
    (values(&out), values(&lse))
}

/// The definitions for all rows: `(out, lse)`.
fn expected(problem: &Problem, lists: &Lists) -> (Vec<f64>, Vec<f64>) {
    let config = naive_config(&problem.config);
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for ((row, part), &total) in problem.rows.iter().zip(&lists.parts).zip(&lists.totals) {
        let (o, l) = naive::attend(&config, &row.q, &row.k, &row.v, part, total);
        out.extend(o);
        lse.extend(l);
    }
    (out, lse)
}

fn assert_same(
    device: &Device,
    what: &str,
    problem: &Problem,
    got: &(Vec<f64>, Vec<f64>),
    want: &(Vec<f64>, Vec<f64>),
    out_dtype: DType,
) {
    let config = naive_config(&problem.config);
    let least = if device.name() == "cpu" { 0.0 } else { gpu_tolerance(problem.config.dtype) };
    let allowed = |dtype: DType| {
        let of_row = |row: &Row| attention_tolerance(dtype, &config, &row.q, &row.k, row.n);
        problem.rows.iter().map(of_row).fold(least, f64::max)
    };
    let what = &format!("{}: {what}", device.name());
    assert_close(what, &got.0, &want.0, config.d, allowed(out_dtype));
    assert_lse(what, &got.1, &want.1, allowed(DType::F32));
}

/// A random ascending list of a row's tokens, at least as long as its block; or none at all, now and then.
fn random_list(row: &Row, random: &mut Random) -> Vec<usize> {
    if random.below(8) == 0 {
        return Vec::new();
    }
    let keep = [0.1, 0.5, 1.0][random.below(3)];
    let mut list: Vec<usize> = (0..row.n).filter(|_| random.unit() < keep).collect();
    let mut rest: Vec<usize> = (0..row.n).filter(|token| !list.contains(token)).collect();
    while list.len() < row.t {
        list.push(rest.swap_remove(random.below(rest.len())));
    }
    list.sort_unstable();
    list
}

/// Writes NaN over the keys and values of all tokens that are not in the row's list.
fn poison_others(row: &mut Row, list: &[usize]) {
    let width = row.k.len() / row.n.max(1);
    for token in (0..row.n).filter(|token| !list.contains(token)) {
        row.k[token * width..][..width].fill(f64::NAN);
        row.v[token * width..][..width].fill(f64::NAN);
    }
}

fn lists_of_every_kind(device: &Device) {
    proptest!(cases(128), |(
        config in problem::config(512),
        lengths in problem::lengths(150),
        content in problem::content(),
        page_size in around(&[1, 16, 64]).prop_map(|size| size.max(1)),
        storage in prop::sample::select(STORAGES.to_vec()),
        (with_ranks, narrow) in any::<(bool, bool)>(),
        seed in any::<u64>(),
    )| {
        let mut problem = Problem::new(&config, &lengths, content, seed);
        let mut random = Random(seed);
        let lists: Vec<Vec<usize>> = problem.rows.iter().map(|row| random_list(row, &mut random)).collect();
        problem.rows.iter_mut().zip(&lists).for_each(|(row, list)| poison_others(row, list));
        let pool = Pool::full(&problem, page_size, storage, seed);
        let lists = Lists::whole(&lists);
        let want = expected(&problem, &lists);
        let out_dtype = if narrow { config.dtype } else { DType::F32 };
        let got = attend_to(device, &problem, &pool, &lists, with_ranks, out_dtype);
        assert_same(device, "attention", &problem, &got, &want, out_dtype);
    });
}

/// Lists dealt out to up to four ranks, some of which get nothing: each part alone, and merged.
fn parts_of_lists(device: &Device) {
    proptest!(cases(128), |(
        config in problem::config(512),
        lengths in problem::lengths(120),
        num_parts in 1usize..5,
        seed in any::<u64>(),
    )| {
        let problem = Problem::new(&config, &lengths, Content::Peaked, seed);
        let mut random = Random(seed);
        let whole = Lists::whole(
            &problem.rows.iter().map(|row| random_list(row, &mut random)).collect::<Vec<_>>());
        let pool = Pool::full(&problem, 16, Storage::Nhd, seed);
        let mut parts: Vec<Lists> = (0..num_parts)
            .map(|_| Lists { parts: vec![Vec::new(); lengths.len()], totals: whole.totals.clone() })
            .collect();
        for (row, list) in whole.parts.iter().enumerate() {
            for &pair in list {
                parts[random.below(num_parts)].parts[row].push(pair);
            }
        }
        let (tokens, heads) = (problem.num_query_tokens(), config.heads);
        let (mut outs, mut lses) = (Vec::new(), Vec::new());
        for part in &parts {
            let got = attend_to(device, &problem, &pool, part, true, DType::F32);
            assert_same(device, "part", &problem, &got, &expected(&problem, part), DType::F32);
            outs.extend(got.0);
            lses.extend(got.1);
        }
        let ts = token_select(device, &problem, &pool.batch(&problem));
        let outs = tensor(DType::F32, &outs, [num_parts, tokens, heads.num_qo_heads, heads.head_dim]);
        let lses = tensor(DType::F32, &lses, [num_parts, tokens, heads.num_qo_heads]);
        let (mut out, mut lse) = outputs(&problem, DType::F32);
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        ts.merge(outs.view(), lses.view(), output).unwrap();
        assert_same(device, "merged", &problem, &(values(&out), values(&lse)), &expected(&problem, &whole), DType::F32);
    });
}

/// Attention of a problem over all tokens, for a batch of its rows: `(out, lse)`.
fn attend_dense(
    device: &Device,
    problem: &Problem,
    pool: &Pool,
    batch: &Batch,
    out_dtype: DType,
) -> (Vec<f64>, Vec<f64>) {
    let (pool, q) = (pool.to(device), to_device(device, &queries(problem)));
    let ts = token_select(device, problem, batch);
    let (mut out, mut lse) = outputs_on(device, problem, out_dtype);
    let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
    ts.attend(batch, pool.view(), q.view(), Over::All, output).unwrap();
    (values(&out), values(&lse))
}

/// Dense attention of one row, checked against the definitions.
fn check_dense(device: &Device, config: &SelectConfig, n: usize, t: usize, content: Content) {
    let problem = Problem::new(config, &[(n, t)], content, (n * 131 + t) as u64);
    let pool = Pool::full(&problem, 16, STORAGES[n % STORAGES.len()], 3);
    let got = attend_dense(device, &problem, &pool, &pool.batch(&problem), DType::F32);
    let want = expected(&problem, &Lists::whole(&[(0..n).collect()]));
    let what = format!("dense, n = {n}, T = {t}, {config:?}");
    assert_same(device, &what, &problem, &got, &want, DType::F32);
}

fn tiny(group: usize) -> SelectConfig {
    SelectConfig {
        heads: HeadShape { num_qo_heads: group, num_kv_heads: 1, head_dim: 8 },
        dtype: DType::F32,
        ..SelectConfig::default()
    }
}

fn list_lengths_around_every_cut(device: &Device) {
    for n in [1, 2, 31, 63, 64, 65, 127, 128, 129, 191, 193, 4095, 4096, 4097, 4160, 8193] {
        for (group, t) in [(1, 1), (7, 1), (3, 3), (8, 2)] {
            check_dense(device, &tiny(group), n, t.min(n), Content::Peaked);
        }
    }
}

fn block_lengths_around_every_cut(device: &Device) {
    for group in [1, 3, 7, 8] {
        for t in [1, 2, 8, 9, 15, 16, 17, 18, 19, 42, 43, 63, 65, 127, 128, 129] {
            check_dense(device, &tiny(group), t, t, Content::Peaked);
            check_dense(device, &tiny(group), t + 61, t, Content::Wild);
        }
    }
}

/// A few queries whose last tokens begin in the second part of a list that is cut for parallelism.
fn causal_mask_across_parts(device: &Device) {
    for n in 4094..4102 {
        check_dense(device, &tiny(2), n, 4, Content::Peaked);
    }
}

fn dense(device: &Device) {
    proptest!(cases(24), |(
        config in problem::config(512),
        lengths in problem::lengths(150),
        content in problem::content(),
        seed in any::<u64>(),
    )| {
        let problem = Problem::new(&config, &lengths, content, seed);
        let pool = Pool::full(&problem, 16, Storage::Hnd, seed);
        let batch = pool.batch(&problem);
        let all: Vec<Vec<usize>> = problem.rows.iter().map(|row| (0..row.n).collect()).collect();
        let want = expected(&problem, &Lists::whole(&all));
        let ts = token_select(device, &problem, &batch);
        let (mut out, mut lse) = outputs(&problem, DType::F32);
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        ts.attend(&batch, pool.view(), Inputs::new(&problem).q.view(), Over::All, output).unwrap();
        assert_same(device, "attention", &problem, &(values(&out), values(&lse)), &want, DType::F32);
    });
}

/// The smallest configuration that a device has kernels for.
fn least(device: &Device, group: usize) -> SelectConfig {
    if device.name() == "cpu" {
        return tiny(group);
    }
    let heads = HeadShape { num_qo_heads: group, num_kv_heads: 1, head_dim: 64 };
    SelectConfig { heads, dtype: DType::Bf16, ..tiny(group) }
}

/// The last token of a block is NaN: no earlier query of the block may notice.
fn later_tokens_of_the_block_have_no_influence(device: &Device) {
    for (t, group) in [(2, 2), (9, 1), (40, 4), (130, 1)] {
        let config = least(device, group);
        let d = config.heads.head_dim;
        let mut problem = Problem::new(&config, &[(t + 70, t)], Content::Peaked, 4);
        let last = problem.rows[0].k.len() - d;
        problem.rows[0].k[last..].fill(f64::NAN);
        problem.rows[0].v[last..].fill(f64::NAN);
        let pool = Pool::full(&problem, 16, Storage::Nhd, 1);
        let list = Lists::whole(&[(0..t + 70).collect()]);
        let (out, lse) = attend_to(device, &problem, &pool, &list, false, DType::F32);
        let before_last = (t - 1) * group;
        assert!(out[..before_last * d].iter().all(|x| x.is_finite()), "T = {t}: NaN reached back");
        assert!(lse[..before_last].iter().all(|x| x.is_finite()), "T = {t}: NaN reached back");
        assert!(out[before_last * d..].iter().all(|x| x.is_nan()), "T = {t}: a NaN seen stays NaN");
        assert!(lse[before_last..].iter().all(|x| x.is_nan()), "T = {t}: a NaN seen stays NaN");
    }
}

/// Every logit of the first head is -inf; the second head is as usual.
fn a_query_that_sees_only_minus_infinity_gets_nothing(device: &Device) {
    let one = least(device, 1);
    let d = one.heads.head_dim;
    let heads = HeadShape { num_qo_heads: 2, num_kv_heads: 2, head_dim: d };
    let config = SelectConfig { heads, ..one };
    for (n, t) in [(5, 1), (100, 1), (100, 12), (5000, 1), (100, 70)] {
        let mut problem = Problem::new(&config, &[(n, t)], Content::Peaked, 4);
        let row = &mut problem.rows[0];
        (0..n).for_each(|token| row.k[token * 2 * d] = f64::NEG_INFINITY);
        (0..t).for_each(|t| row.q[t * 2 * d] = 1.0);
        let pool = Pool::full(&problem, 16, Storage::Nhd, 1);
        let lists = Lists::whole(&[(0..n).collect()]);
        let got = attend_to(device, &problem, &pool, &lists, false, DType::F32);
        for t in 0..t {
            assert!(got.0[t * 2 * d..][..d].iter().all(|&x| x == 0.0));
            assert_eq!(got.1[t * 2], f64::NEG_INFINITY);
        }
        assert_same(device, "attention", &problem, &got, &expected(&problem, &lists), DType::F32);
    }
}

/// An empty list is a padded row of a captured graph: nothing is attended to, nothing is read.
fn empty_lists_give_zero_and_minus_infinity(device: &Device) {
    let mut config =
        SelectConfig { positions: tokenselect::Positions::Reassigned(Default::default()), ..small_config() };
    if device.name() != "cpu" {
        let heads = HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 };
        config = SelectConfig { heads, dtype: DType::F16, ..config };
    }
    let mut problem = Problem::new(&config, &[(40, 3), (30, 1), (20, 2)], Content::Peaked, 4);
    for row in &mut problem.rows {
        row.k.fill(f64::NAN);
        row.v.fill(f64::NAN);
    }
    let pool = Pool::full(&problem, 16, Storage::Nhd, 1);
    for (with_ranks, totals) in [(false, vec![0; 3]), (true, vec![0; 3]), (true, vec![9, 7, 5])] {
        let lists = Lists { parts: vec![Vec::new(); 3], totals };
        let (out, lse) = attend_to(device, &problem, &pool, &lists, with_ranks, DType::F32);
        assert!(out.iter().all(|&x| x == 0.0));
        assert!(lse.iter().all(|&x| x == f64::NEG_INFINITY));
    }
}

/// One rank of several holds fewer tokens than the list has: the positions are those of the whole list all the same.
fn a_part_of_a_list_longer_than_what_is_held(device: &Device) {
    let base = SelectConfig { positions: Positions::Reassigned(Rope::default()), ..small_config() };
    let SelectConfig { heads, dtype, .. } = least(device, 2);
    // More than 256 positions, for which tables of angles have two levels.
    let config = SelectConfig { heads, dtype, top_k: 300, ..base };
    let whole = config.n_init + config.top_k + config.n_local + 1;
    let problem = Problem::new(&config, &[(8, 1)], Content::Peaked, 4);
    let pool = Pool::full(&problem, 8, Storage::Nhd, 1);
    let part = [0, 1, 2, 5, 6, 9, whole - 2, whole - 1].into_iter().zip(0..8).collect();
    let lists = Lists { parts: vec![part], totals: vec![whole] };
    let got = attend_to(device, &problem, &pool, &lists, true, DType::F32);
    assert_same(device, "a part", &problem, &got, &expected(&problem, &lists), DType::F32);
}

/// One token: its value, exactly, and its logit.
fn a_single_token_returns_its_value(device: &Device) {
    for dtype in [DType::F16, DType::Bf16, DType::F32] {
        let config = SelectConfig { dtype, sm_scale: Some(1.0), ..small_config() };
        let problem = Problem::new(&config, &[(40, 1)], Content::Peaked, 4);
        let pool = Pool::full(&problem, 4, Storage::Hnd, 1);
        let row = &problem.rows[0];
        for token in [0, 3, 4, 39] {
            let (out, _) = attend_to(device, &problem, &pool, &Lists::whole(&[vec![token]]), false, dtype);
            for head in 0..4 {
                assert_eq!(
                    out[head * 16..][..16],
                    row.v[(token * 2 + head / 2) * 16..][..16],
                    "token {token}"
                );
            }
        }
    }
}

fn lse_may_be_left_out_and_padding_has_no_rows(device: &Device) {
    let problem = Problem::new(&small_config(), &[(20, 0), (30, 2), (0, 0)], Content::Peaked, 4);
    let pool = Pool::full(&problem, 16, Storage::Nhd, 1);
    let batch: Batch = pool.batch(&problem);
    let ts = token_select(device, &problem, &batch);
    let inputs = Inputs::new(&problem);
    let [with, without] = [true, false].map(|with_lse| {
        let (mut out, mut lse) = outputs(&problem, DType::F32);
        let lse = with_lse.then(|| lse.view_mut());
        ts.attend(&batch, pool.view(), inputs.q.view(), Over::All, StepOutput { out: out.view_mut(), lse })
            .unwrap();
        values(&out)
    });
    assert_eq!(with, without);
}

/// A configuration that GPU kernels serve: their head dimensions and types, groups up to 16, every kind of position.
/// Logits stay moderate: rounded operands of tensor cores give them an error in proportion.
fn gpu_config() -> impl Strategy<Value = SelectConfig> {
    let heads = (prop::sample::select(vec![64usize, 96, 128, 256]), 1usize..=2, 1usize..=16);
    let scales = (prop::option::of(0.05f32..0.11), prop::option::of(3.0f32..40.0));
    let dtype = prop::sample::select(vec![DType::F16, DType::Bf16]);
    (heads, dtype, scales).prop_flat_map(|((head_dim, num_kv_heads, group), dtype, (sm_scale, cap))| {
        // Plans are for all operations, and heads of 256 are scored in groups of up to 8.
        let group = if head_dim == 256 { group.div_ceil(2) } else { group };
        let heads = HeadShape { num_qo_heads: num_kv_heads * group, num_kv_heads, head_dim };
        problem::positions(head_dim).prop_map(move |positions| SelectConfig {
            heads,
            dtype,
            sm_scale,
            logits_soft_cap: cap,
            positions,
            // Lists of any length may be gathered.
            top_k: 400,
            ..SelectConfig::default()
        })
    })
}

/// Few queries and many, lists and parts of lists, keys used as they are, rotated in registers and gathered.
fn gpu_lists_of_every_kind(device: &Device) {
    proptest!(cases(24), |(
        config in gpu_config(),
        lengths in problem::lengths(150),
        content in problem::content(),
        page_size in around(&[1, 16, 64]).prop_map(|size| size.max(1)),
        storage in prop::sample::select(STORAGES.to_vec()),
        (parted, with_ranks, narrow) in any::<(bool, bool, bool)>(),
        seed in any::<u64>(),
    )| {
        let mut problem = Problem::new(&config, &lengths, content, seed);
        let mut random = Random(seed);
        let lists: Vec<Vec<usize>> = problem.rows.iter().map(|row| random_list(row, &mut random)).collect();
        problem.rows.iter_mut().zip(&lists).for_each(|(row, list)| poison_others(row, list));
        let pool = Pool::full(&problem, page_size, storage, seed);
        let mut lists = Lists::whole(&lists);
        if parted {
            lists.parts.iter_mut().for_each(|part| part.retain(|_| random.below(3) > 0));
        }
        let want = expected(&problem, &lists);
        let out_dtype = if narrow { config.dtype } else { DType::F32 };
        let got = attend_to(device, &problem, &pool, &lists, with_ranks || parted, out_dtype);
        assert_same(device, "attention", &problem, &got, &want, out_dtype);
    });
}

/// Dense attention around the places where lists are cut: into tiles, and into shares for the blocks.
fn gpu_list_lengths_around_every_cut(device: &Device) {
    for (i, n) in [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 250, 1030].into_iter().enumerate() {
        for (group, t) in [(1, 1), (7, 1), (3, 3), (8, 2), (16, 5)] {
            let head_dim = [64, 128, 96, 256][(i + i / 4) % 4];
            // Heads of 256 are scored in groups of up to 8.
            let group = if head_dim == 256 { group.min(8) } else { group };
            let heads = HeadShape { num_qo_heads: group, num_kv_heads: 1, head_dim };
            let dtype = [DType::F16, DType::Bf16][i % 2];
            let positions = match i % 3 {
                0 => Positions::Reassigned(Rope::default()),
                _ => Positions::Native,
            };
            let config = SelectConfig { heads, dtype, positions, ..SelectConfig::default() };
            check_dense(device, &config, n, t.min(n), Content::Peaked);
        }
    }
}

/// Blocks around the places where query rows are cut, and where the prefill kernel takes over.
fn gpu_block_lengths_around_every_cut(device: &Device) {
    for (i, t) in [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 129].into_iter().enumerate() {
        for group in [1, 4, 5] {
            let heads = HeadShape {
                num_qo_heads: group,
                num_kv_heads: 1,
                head_dim: [128, 64, 96, 256][(i + i / 4) % 4],
            };
            let dtype = [DType::F16, DType::Bf16][i % 2];
            let config = SelectConfig { heads, dtype, ..SelectConfig::default() };
            check_dense(device, &config, t + [0, 61][group % 2], t, Content::Peaked);
        }
    }
}

/// Lists around tiles of 64 and 128 places, and query rows around the 64 of a warpgroup and the 128 of a block, so many that a block of
/// the launch has several, and some see parts of two tiles alone.
fn gpu_tiles_and_query_blocks_around_every_cut(device: &Device) {
    let sizes = [
        (127, 33, 4),
        (128, 32, 4),
        (129, 64, 4),
        (191, 13, 5),
        (256, 129, 1),
        (257, 40, 4),
        (384, 300, 1),
        (385, 17, 8),
        (63, 33, 4),
        (65, 65, 2),
    ];
    for (i, (n, t, group)) in sizes.into_iter().enumerate() {
        let heads =
            HeadShape { num_qo_heads: 2 * group, num_kv_heads: 2, head_dim: [128, 64, 96, 256, 256][i % 5] };
        let dtype = [DType::F16, DType::Bf16][i % 2];
        let logits_soft_cap = (i % 4 == 3).then_some(30.0);
        let config = SelectConfig { heads, dtype, logits_soft_cap, ..SelectConfig::default() };
        check_dense(device, &config, n, t, Content::Peaked);
    }
}

/// Values of the block's own tokens that are infinite or NaN here and there: each query has those that it sees.
fn gpu_values_that_are_not_finite(device: &Device) {
    for (t, group, head_dim) in [
        (3, 4, 128),
        (6, 1, 96),
        (20, 4, 64),
        (40, 2, 128),
        (2, 4, 128),
        (7, 1, 128),
        (150, 1, 64),
        (3, 2, 256),
        (20, 4, 256),
        (70, 2, 256),
    ] {
        let heads = HeadShape { num_qo_heads: group, num_kv_heads: 1, head_dim };
        let config = SelectConfig { heads, dtype: DType::F16, ..SelectConfig::default() };
        let n = t + 45;
        let mut problem = Problem::new(&config, &[(n, t)], Content::Peaked, 5);
        let mut random = Random(t as u64);
        for _ in 0..t {
            let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][random.below(3)];
            let token = n - 1 - random.below(t);
            problem.rows[0].v[token * head_dim + random.below(head_dim)] = odd;
        }
        let pool = Pool::full(&problem, 16, Storage::Nhd, 1);
        let lists = Lists::whole(&[(0..n).collect()]);
        let want = expected(&problem, &lists);
        let got = attend_to(device, &problem, &pool, &lists, false, DType::F32);
        assert_same(device, "odd values", &problem, &got, &want, DType::F32);
        let got = attend_dense(device, &problem, &pool, &pool.batch(&problem), DType::F32);
        assert_same(device, "odd values, dense", &problem, &got, &want, DType::F32);
    }
}

/// Few queries with keys as they are, in pages most of which can be streamed: heads, groups and lengths around the cuts.
fn decode_config() -> impl Strategy<Value = SelectConfig> {
    let dims = prop::sample::select(vec![64usize, 96, 128, 256]);
    let kv_heads = prop::sample::select(vec![1usize, 2, 3, 4, 8]);
    let groups = prop::sample::select(vec![1usize, 2, 4, 7, 8, 9]);
    let scales = (prop::option::of(0.05f32..0.11), prop::option::of(3.0f32..40.0));
    let dtype = prop::sample::select(vec![DType::F16, DType::Bf16]);
    (dims, kv_heads, groups, dtype, scales)
        .prop_filter("too large", |(dim, kv_heads, group, ..)| dim * kv_heads * group <= 4096)
        .prop_filter("not scored", |&(dim, _, group, ..)| dim < 256 || group <= 8)
        .prop_map(|(head_dim, num_kv_heads, group, dtype, (sm_scale, logits_soft_cap))| SelectConfig {
            heads: HeadShape { num_qo_heads: num_kv_heads * group, num_kv_heads, head_dim },
            dtype,
            sm_scale,
            logits_soft_cap,
            ..SelectConfig::default()
        })
}

/// One to three rows `(n, t)`, some without tokens or queries, and rows of padding behind them. The emulated device streams
/// for one row or three: it has three SMs.
fn decode_lengths() -> impl Strategy<Value = (Vec<(usize, usize)>, usize)> {
    let n = prop_oneof![prop::sample::select(vec![0usize, 1, 15, 16, 17, 47, 48, 49]), 100usize..420];
    let row = (n, prop::sample::select(vec![0usize, 1, 1, 2, 4, 7]));
    let rows = |count| prop::collection::vec(row.clone(), count);
    prop_oneof![
        (rows(1), Just(0)),
        (rows(2), Just(1)),
        (rows(3), Just(0)),
        (prop::collection::vec(row, 1..=3), 0usize..=2)
    ]
}

/// Dense decoding by both kernels that do it: streamed, or loaded to registers.
fn gpu_dense_decoding(device: &Device) {
    proptest!(cases(32), |(
        config in decode_config(),
        (mut lengths, padding) in decode_lengths(),
        content in problem::content(),
        page_size in prop::sample::select(vec![1usize, 2, 7, 8, 16, 16, 16, 32, 32, 32]),
        storage in prop::sample::select([&STORAGES[..], &[Storage::Nhd, Storage::CombinedNhd]].concat()),
        (narrow, odd_values, few_queries) in (any::<bool>(), any::<bool>(), prop::bool::weighted(0.9)),
        seed in any::<u64>(),
    )| {
        let HeadShape { num_qo_heads, num_kv_heads, head_dim } = config.heads;
        let most = if few_queries { (8 * num_kv_heads / num_qo_heads).max(1) } else { 7 };
        lengths.iter_mut().for_each(|(n, t)| *t = (*t).min(*n).min(most));
        let num_rows = lengths.len();
        lengths.resize(num_rows + padding, (0, 1));
        let mut problem = Problem::new(&config, &lengths, content, seed);
        let mut random = Random(seed);
        let width = num_kv_heads * head_dim;
        // Weights in f16 may be 0, and an infinite value then NaN.
        let kinds = if config.dtype == DType::F16 { 1 } else { 3 };
        for row in problem.rows.iter_mut().filter(|row| odd_values && row.n > 0 && row.t > 0) {
            let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][random.below(kinds)];
            let token = row.n - 1 - random.below(row.t);
            row.v[token * width + random.below(width)] = odd;
        }
        let pool = Pool::full(&problem, page_size, storage, seed);
        let mut tables = pool.tables.clone();
        tables.indptr.truncate(num_rows + 1);
        tables.last_page_len.truncate(num_rows);
        let all: Vec<Vec<usize>> = problem.rows.iter().map(|row| (0..row.n).collect()).collect();
        let want = expected(&problem, &Lists::whole(&all));
        let out_dtype = if narrow { config.dtype } else { DType::F32 };
        let batch = Batch::new(page_size, problem.qo_indptr()[..=num_rows].to_vec(), tables.clone());
        let batch = batch.unwrap().padded(lengths.len(), 1).unwrap();
        let got = attend_dense(device, &problem, &pool, &batch, out_dtype);
        assert_same(device, "dense decoding", &problem, &got, &want, out_dtype);
    });
}

/// The lengths around every cut of the stages and shares that stream, for one stream and for eight.
fn gpu_streamed_lengths_around_every_cut(device: &Device) {
    for (num_kv_heads, head_dim) in [(1, 128), (2, 64), (3, 96), (8, 64), (2, 256), (8, 256)] {
        let heads = HeadShape { num_qo_heads: num_kv_heads, num_kv_heads, head_dim };
        let config = SelectConfig { heads, dtype: DType::F16, ..SelectConfig::default() };
        let stage = 16 * (8 / num_kv_heads);
        for edge in [16, stage, 3 * stage, 12 * stage] {
            for n in [edge - 1, edge, edge + 1] {
                check_dense(device, &config, n, 1 + n % 2, Content::Peaked);
            }
        }
    }
}

/// Pairs of both kinds, an even number and an odd one, over every part of a head: decoding, a few queries and blocks, over all
/// tokens, over lists, and over lists longer than the plan has room to gather.
fn gpu_rotations_of_every_part(device: &Device) {
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position: 128.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: Some(1.3),
    };
    let pairings = [RopePairing::HalfSplit, RopePairing::Interleaved];
    let mut i = 0;
    for head_dim in [64, 96, 128, 256] {
        for rotary_dim in [2, 6, 16, 20, 24, 32, 48, 64, head_dim - 2, head_dim] {
            for (j, pairing) in pairings.into_iter().enumerate() {
                let (n, t, group) =
                    [(45, 1, 8), (300, 2, 3), (70, 33, 2), (1, 1, 1), (131, 1, 4)][(i + i / 20) % 5];
                let rope = Rope {
                    rotary_dim: Some(rotary_dim),
                    pairing,
                    scaling: [RopeScaling::None, yarn][(i / 2 + i / 20) % 2],
                    ..Rope::default()
                };
                // `gather` takes four KV heads at a time.
                let num_kv_heads = if i % 8 == 3 { 5 } else { 2 };
                let config = SelectConfig {
                    heads: HeadShape { num_qo_heads: num_kv_heads * group, num_kv_heads, head_dim },
                    dtype: [DType::F16, DType::Bf16][(i / 4 + j) % 2],
                    positions: Positions::Reassigned(rope),
                    top_k: [5, 400][i / 3 % 2],
                    ..small_config()
                };
                let problem =
                    Problem::new(&config, &[(n, t), (n / 2, t.min(n / 2))], Content::Peaked, i as u64);
                let pool = Pool::full(&problem, [1, 7, 16][i % 3], STORAGES[i % STORAGES.len()], 3);
                let what = format!("n = {n}, T = {t}, {config:?}");
                let all =
                    Lists::whole(&problem.rows.iter().map(|row| (0..row.n).collect()).collect::<Vec<_>>());
                let got = attend_dense(device, &problem, &pool, &pool.batch(&problem), DType::F32);
                let want = expected(&problem, &all);
                assert_same(device, &format!("dense, {what}"), &problem, &got, &want, DType::F32);
                let mut random = Random(i as u64);
                let lists = Lists::whole(
                    &problem.rows.iter().map(|row| random_list(row, &mut random)).collect::<Vec<_>>(),
                );
                let got = attend_to(device, &problem, &pool, &lists, i % 4 == 0, config.dtype);
                let want = expected(&problem, &lists);
                assert_same(device, &format!("listed, {what}"), &problem, &got, &want, config.dtype);
                i += 1;
            }
        }
    }
}

/// Heads of 256, the most that there are: every kernel, type and group, keys as they are and rotated, over lists and over all tokens.
fn gpu_large_heads(device: &Device) {
    let kinds = [Positions::Native, Positions::Reassigned(Rope::default())];
    for (i, group) in [1, 2, 4, 8, 1, 2, 4, 8].into_iter().enumerate() {
        for (j, positions) in kinds.iter().enumerate() {
            let config = SelectConfig {
                heads: HeadShape { num_qo_heads: 2 * group, num_kv_heads: 2, head_dim: 256 },
                dtype: [DType::F16, DType::Bf16][(i / 4 + j) % 2],
                logits_soft_cap: (i % 3 == 1).then_some(30.0),
                positions: positions.clone(),
                top_k: 400,
                ..small_config()
            };
            // Somewhat more query rows than the 64 of a warpgroup.
            let t = 72 / group;
            for (n, t) in [(50, 1), (t + 30 + 9 * i, t)] {
                let problem = Problem::new(&config, &[(n, t)], Content::Peaked, (n + j) as u64);
                let pool = Pool::full(&problem, 16, STORAGES[(i + j) % STORAGES.len()], 3);
                let mut random = Random(n as u64);
                let lists = Lists::whole(&[random_list(&problem.rows[0], &mut random)]);
                let got = attend_to(device, &problem, &pool, &lists, i % 4 == 3, config.dtype);
                let what = format!("n = {n}, T = {t}, {config:?}");
                let want = expected(&problem, &lists);
                assert_same(device, &format!("listed, {what}"), &problem, &got, &want, config.dtype);
                let got = attend_dense(device, &problem, &pool, &pool.batch(&problem), DType::F32);
                let want = expected(&problem, &Lists::whole(&[(0..n).collect()]));
                assert_same(device, &format!("dense, {what}"), &problem, &got, &want, DType::F32);
            }
        }
    }
}
