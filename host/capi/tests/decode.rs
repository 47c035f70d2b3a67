//! Steps through the C functions give the same bits as through the Rust crate, on the processor.

mod common;

use std::ptr::null_mut;

use common::{
    Lie, Out, arrange, at, cache_config, config, context, cpu, input, limits, made, numbers, ok, one_row,
    selected, sized,
};
use tokenselect::{
    CacheConfig, Device, HeadShape, Limits, PagedKvCache, Positions, Rope, SelectConfig,
    SelectionCacheConfig, StepInput, StepOutput, TensorView, TensorViewMut, TokenSelect,
};
use tokenselect_c::*;

const HQ: usize = 4;
const HKV: usize = 2;
const D: usize = 16;

/// The same configuration in the Rust crate.
fn rust_config() -> SelectConfig {
    SelectConfig {
        heads: HeadShape { num_qo_heads: HQ, num_kv_heads: HKV, head_dim: D },
        dtype: tokenselect::DType::F32,
        n_init: 2,
        n_local: 3,
        top_k: 5,
        ..SelectConfig::default()
    }
}

/// Queries, keys and values of one step and layer. Queries change little from step to step, so that selections are
/// reused now and then.
fn inputs(step: u64, tokens: usize) -> [Vec<f32>; 3] {
    let mut q = numbers(1, tokens * HQ * D);
    let noise = numbers(2 + 3 * step, q.len());
    q.iter_mut().zip(noise).for_each(|(q, noise)| *q += 0.35 * noise);
    [q, numbers(3 + 3 * step, tokens * HKV * D), numbers(4 + 3 * step, tokens * HKV * D)]
}

/// What the Rust crate makes of the same steps: outputs and selected lists.
struct Reference {
    cache: PagedKvCache,
    select: TokenSelect,
    sequence: tokenselect::SequenceId,
}

impl Reference {
    fn new(config: SelectConfig) -> Self {
        let device = Device::cpu();
        let size = CacheConfig {
            num_layers: 2,
            num_pages: 32,
            page_size: 4,
            max_sequences: 4,
            ..CacheConfig::default()
        };
        let limits = Limits { max_rows: 2, max_block_len: 8, max_kv_tokens: 128 };
        let mut cache = PagedKvCache::new(&device, &config, &size).unwrap();
        let sequence = cache.create().unwrap();
        Reference { cache, select: TokenSelect::new(&device, config, limits).unwrap(), sequence }
    }

    fn step(&mut self, tokens: usize, layer_inputs: &[[Vec<f32>; 3]], dense: bool) -> Vec<Out> {
        let batch = self.cache.extend(&[(self.sequence, tokens)]).unwrap();
        let one = |(layer, [q, k, v]): (usize, &[Vec<f32>; 3])| {
            let mut got = Out::new(tokens, &config());
            let input = StepInput {
                q: TensorView::new(q, [tokens, HQ, D]).unwrap(),
                k: TensorView::new(k, [tokens, HKV, D]).unwrap(),
                v: TensorView::new(v, [tokens, HKV, D]).unwrap(),
            };
            let output = StepOutput {
                out: TensorViewMut::new(&mut got.out, [tokens, HQ, D]).unwrap(),
                lse: Some(TensorViewMut::new(&mut got.lse, [tokens, HQ]).unwrap()),
            };
            let (select, cache) = (&mut self.select, &mut self.cache);
            if dense {
                select.step_dense(cache, layer, &batch, input, output).unwrap();
            } else {
                select.step(cache, layer, &batch, input, output).unwrap();
            }
            got
        };
        layer_inputs.iter().enumerate().map(one).collect()
    }
}

fn assert_same(got: &Out, want: &Out, what: &str) {
    let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&got.out), bits(&want.out), "out, {what}");
    assert_eq!(bits(&got.lse), bits(&want.lse), "lse, {what}");
}

#[test]
fn owned_cache() {
    let reassigned = SelectConfig {
        positions: Positions::Reassigned(Rope { theta: 5e5, ..Rope::default() }),
        vote_pool_window: 3,
        logits_soft_cap: Some(30.0),
        score_scale: Some(1.0),
        selection_cache: Some(SelectionCacheConfig { similarity_threshold: 0.8, max_reuse: Some(2) }),
        ..rust_config()
    };
    let mut same = ts_config {
        positions: ts_positions::Reassigned as i32,
        vote_pool_window: 3,
        logits_soft_cap: 30.0,
        score_scale: 1.0,
        similarity_threshold: 0.8,
        max_reuse: 2,
        ..config()
    };
    same.rope.theta = 5e5;
    for (rust, c) in [(rust_config(), config()), (reassigned, same)] {
        Lie::ALL.iter().for_each(|&lie| owned_cache_with(rust.clone(), &c, lie));
    }
}

fn owned_cache_with(rust: SelectConfig, config: &ts_config, lie: Lie) {
    let mut reference = Reference::new(rust);
    let device = cpu();
    // SAFETY: all handles are alive until they are destroyed, all arrays have the shapes asked for.
    unsafe {
        let cache = made(|to| ts_cache_create(device, config, &cache_config(), to));
        let context = context(device, config, &limits(2, 8, 128));
        ok(ts_device_destroy(device)); // the others hold it
        let sequence = made(|to| ts_cache_sequence_create(cache, to));
        for (step, tokens) in [8, 7, 1, 1, 1, 1, 1, 1, 8, 1].into_iter().enumerate() {
            let layers = [inputs(step as u64, tokens), inputs(step as u64 + 100, tokens)];
            let dense = step == 5;
            let want = reference.step(tokens, &layers, dense);
            let batch = made(|to| ts_cache_extend(cache, &sequence, &tokens, 1, to));
            for (layer, [q, k, v]) in layers.iter().enumerate() {
                let mut got = Out::new(tokens, config);
                let (memory, input) = arrange(lie, [HQ, HKV, D], [q, k, v]);
                let input = input(at(&memory));
                let run = if dense { ts_step_dense } else { ts_step };
                ok(run(context, cache, layer, batch, &input, &got.as_output()));
                assert_same(&got, &want[layer], &format!("{lie:?}, step {step}, layer {layer}"));
            }
            assert_eq!(selected(context, 0), reference.select.workspace().selected(0).unwrap());
            let info: ts_batch_info = made(|to| ts_batch_get_info(batch, to));
            assert_eq!((info.num_rows, info.num_query_tokens, info.page_size), (1, tokens, 4));
            ok(ts_batch_destroy(batch));
        }
        let len: usize = made(|to| ts_cache_sequence_len(cache, sequence, to));
        assert_eq!(len, 30);
        let stats: ts_selection_stats = made(|to| ts_cache_stats(cache, to));
        let want = reference.cache.selection_stats().unwrap();
        assert_eq!((stats.reused, stats.scored, stats.complete), (want.reused, want.scored, want.complete));
        assert!(stats.reused > 0 && stats.scored > 0 && stats.complete > 0, "{stats:?}");
        ok(ts_context_destroy(context));
        ok(ts_cache_destroy(cache));
    }
}

#[test]
fn sequences() {
    let device = cpu();
    // SAFETY: all handles are alive until they are destroyed.
    unsafe {
        let cache = made(|to| ts_cache_create(device, &config(), &cache_config(), to));
        let parent = made(|to| ts_cache_sequence_create(cache, to));
        ok(ts_batch_destroy(made(|to| ts_cache_extend(cache, &parent, &9, 1, to))));
        let child = made(|to| ts_cache_sequence_fork(cache, parent, to));
        assert_ne!(parent, child);
        ok(ts_cache_sequence_truncate(cache, child, 5));
        let len = |sequence| made(|to| ts_cache_sequence_len(cache, sequence, to));
        let free = || made(|to| ts_cache_num_free_pages(cache, to));
        assert_eq!((len(parent), len(child), free()), (9, 5, 29));
        ok(ts_cache_sequence_free(cache, parent));
        assert_eq!(free(), 30);
        let gone = format!("{} is not in this cache", tokenselect::SequenceId::from_bits(parent));
        common::fails(ts_cache_sequence_free(cache, parent), ts_status::UnknownSequence, &gone);
        ok(ts_cache_destroy(cache));
        ok(ts_device_destroy(device));
    }
}

/// Where keys and values lie: elements before the first of each, and strides of page, token and head.
type Places = [(usize, [usize; 3]); 2];

/// Pages of 4 tokens in a pool: one after the other, and among each other in either order.
fn pools() -> [(&'static str, Places); 6] {
    let (page, (nhd, hnd)) = (4 * HKV * D, ([HKV * D, D], [D, 4 * D]));
    let strides = |page, [token, head]: [usize; 2]| [page, token, head];
    let behind = 20 * page;
    let rows = [2 * page, 2 * D, 8 * D];
    [
        ("two pools", [(0, strides(page, nhd)), (behind, strides(page, nhd))]),
        ("two pools, keys NHD, values HND", [(0, strides(page, nhd)), (behind, strides(page, hnd))]),
        ("[pages, 2, ...], values first", [(page, strides(2 * page, nhd)), (0, strides(2 * page, nhd))]),
        (
            "[pages, 2, ...], keys HND, values NHD",
            [(0, strides(2 * page, hnd)), (page, strides(2 * page, nhd))],
        ),
        ("[pages, heads, tokens, 2 D]", [(0, rows), (D, rows)]),
        ("[pages, heads, tokens, 2 D], values first", [(D, rows), (0, rows)]),
    ]
}

/// The operations one by one over borrowed memory, wherever pages and inputs lie, with a Selection Cache of its own: the same
/// as the steps of an owned cache.
#[test]
fn borrowed_cache() {
    for (what, places) in pools() {
        Lie::ALL.iter().for_each(|&lie| borrowed_cache_at(what, places, lie));
    }
}

fn borrowed_cache_at(what: &str, [k_place, v_place]: Places, lie: Lie) {
    let config = config();
    let mut reference = Reference::new(rust_config());
    let device = cpu();
    // Pages in reverse order.
    let (num_pages, page_size) = (16, 4);
    let mut pool = vec![f32::NAN; 40 * page_size * HKV * D];
    let base = pool.as_mut_ptr();
    // SAFETY: within the pool; all handles are alive until they are destroyed, all arrays have the shapes asked for.
    unsafe {
        let kv = ts_kv_view {
            k: base.add(k_place.0).cast(),
            v: base.add(v_place.0).cast(),
            num_pages,
            page_size,
            num_kv_heads: HKV,
            head_dim: D,
            k_stride_page: k_place.1[0],
            k_stride_token: k_place.1[1],
            k_stride_head: k_place.1[2],
            v_stride_page: v_place.1[0],
            v_stride_token: v_place.1[1],
            v_stride_head: v_place.1[2],
            ..sized()
        };
        let context = context(device, &config, &limits(1, 8, 64));
        let selections = made(|to| ts_selection_cache_create(device, &config, 1, 3, to));
        let mut len = 0;
        for (step, tokens) in [8, 7, 1, 1, 1, 8, 1].into_iter().enumerate() {
            let [q, k, v] = inputs(step as u64, tokens);
            let want =
                reference.step(tokens, std::slice::from_ref(&[q.clone(), k.clone(), v.clone()]), false);
            len += tokens;
            let pages = len.div_ceil(page_size);
            let indices: Vec<i32> = (0..pages as i32).map(|page| num_pages as i32 - 1 - page).collect();
            let batch = one_row(page_size, &indices, len, tokens, Some(&2));
            let mut got = Out::new(tokens, &config);
            let (memory, input) = arrange(lie, [HQ, HKV, D], [&q, &k, &v]);
            let input = &input(at(&memory));
            if step % 4 == 3 {
                ok(ts_append_select(context, batch, &kv, input, selections, 0));
            } else {
                ok(ts_append(context, batch, &kv, input));
            }
            match step % 4 {
                0 => ok(ts_select(context, batch, &kv, input, selections, 0)),
                3 => {}
                pooled => {
                    ok(ts_pool(context, batch, input, selections, 0));
                    ok(ts_score(context, batch, &kv));
                    if pooled == 1 {
                        ok(ts_vote(context, batch));
                        ok(ts_top_k(context, batch, selections, 0));
                    } else {
                        ok(ts_vote_top_k(context, batch, selections, 0));
                    }
                }
            }
            ok(ts_attend(context, batch, &kv, input, &got.as_output()));
            assert_same(&got, &want[0], &format!("{what}, {lie:?}, step {step}"));
            let list = selected(context, 0);
            assert_eq!(list, reference.select.workspace().selected(0).unwrap(), "{what}, step {step}");
            attends_to_lists(context, batch, (&kv, input), &list, &mut got);
            let row: ts_batch_row = made(|to| ts_batch_get_row(batch, 0, to));
            assert_eq!((row.query_begin, row.block_len, row.kv_len, row.token_base), (0, tokens, len, 0));
            ok(ts_batch_destroy(batch));
        }
        let stats: ts_selection_stats = made(|to| ts_selection_cache_stats(selections, to));
        let want = reference.cache.selection_stats().unwrap();
        assert_eq!((stats.reused, stats.scored), (want.reused, want.scored));
        ok(ts_selection_cache_reset_stats(selections));
        let layer: ts_selection_stats = made(|to| ts_selection_cache_layer_stats(selections, 0, to));
        assert_eq!((layer.reused, layer.scored, layer.complete), (0, 0, 0));
        ok(ts_selection_cache_fork(selections, 2, 0));
        ok(ts_selection_cache_truncate(selections, 0, 4));
        ok(ts_selection_cache_clear(selections, 2));
        ok(ts_selection_cache_destroy(selections));
        ok(ts_context_destroy(context));
        ok(ts_device_destroy(device));
    }
}

/// Attention over a list in two parts, merged, is attention over the whole.
unsafe fn attends_to_lists(
    context: *mut ts_context,
    batch: *const ts_batch,
    (kv, input): (&ts_kv_view, &ts_step_input),
    list: &[u32],
    whole: &mut Out,
) {
    let (tokens, width) = (whole.lse.len() / HQ, list.len());
    let cut = width / 3;
    let (mut parts, mut lses) = (Vec::new(), Vec::new());
    for range in [0..cut, cut..width] {
        let ranks: Vec<u32> = range.clone().map(|rank| rank as u32).collect();
        let part = ts_selection {
            num_rows: 1,
            width: ranks.len(),
            tokens: list[range.clone()].as_ptr(),
            len: &(ranks.len() as u32),
            ranks: ranks.as_ptr(),
            total_len: &(width as u32),
            ..sized()
        };
        let mut got = Out::new(tokens, &config());
        // SAFETY: the lists have the lengths stated.
        ok(unsafe { ts_attend_to(context, batch, kv, input, &part, &got.as_output()) });
        parts.extend(got.out);
        lses.extend(got.lse);
    }
    let (num_parts, num_query_tokens) = (2, tokens);
    let (parts, part_lses) = (parts.as_ptr(), lses.as_ptr());
    let given = ts_parts { num_parts, num_query_tokens, parts, part_lses, ..sized() };
    let mut got = Out::new(tokens, &config());
    // SAFETY: two parts of the shape stated.
    ok(unsafe { ts_merge(context, &given, &got.as_output()) });
    let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0));
    assert!(close(&got.out, &whole.out) && close(&got.lse, &whole.lse));
}

/// The layers and selections of an owned cache serve the single operations.
#[test]
fn owned_cache_one_operation_at_a_time() {
    let (config, device) = (config(), cpu());
    let mut reference = Reference::new(rust_config());
    // SAFETY: all handles are alive until they are destroyed, all arrays have the shapes asked for.
    unsafe {
        let cache = made(|to| ts_cache_create(device, &config, &cache_config(), to));
        let context = context(device, &config, &limits(1, 8, 64));
        let selections = made(|to| ts_cache_selections(cache, to));
        let sequence = made(|to| ts_cache_sequence_create(cache, to));
        for (step, tokens) in [8, 8, 1].into_iter().enumerate() {
            let [q, k, v] = inputs(step as u64, tokens);
            let want =
                reference.step(tokens, std::slice::from_ref(&[q.clone(), k.clone(), v.clone()]), false);
            let batch = made(|to| ts_cache_extend(cache, &sequence, &tokens, 1, to));
            let mut got = Out::new(tokens, &config);
            let (memory, input) = arrange(Lie::ALL[step], [HQ, HKV, D], [&q, &k, &v]);
            let input = input(at(&memory));
            ok(ts_cache_append(context, cache, 0, batch, &input));
            let kv: ts_kv_view = made(|to| ts_cache_layer(cache, 0, to, size_of::<ts_kv_view>()));
            ok(ts_select(context, batch, &kv, &input, selections, 0));
            ok(ts_attend(context, batch, &kv, &input, &got.as_output()));
            assert_same(&got, &want[0], &format!("step {step}"));
            let mut dense = Out::new(tokens, &config);
            ok(ts_attend_dense(context, batch, &kv, &input, &dense.as_output()));
            assert!(dense.lse.iter().zip(&got.lse).all(|(dense, chosen)| dense >= &(chosen - 1e-5)));
            ok(ts_batch_destroy(batch));
        }
        let votes: ts_tensor = made(|to| ts_context_workspace(context, ts_workspace::Votes as i32, to));
        assert_eq!((votes.dtype, votes.rank, votes.shape), (ts_dtype::F32 as i32, 1, [64, 1, 1, 1]));
        // 17 tokens were scored last: the sum of the votes for [2, 17 - 1 - 3) is the number of heads.
        let of_candidates = &std::slice::from_raw_parts(votes.data.cast::<f32>(), 64)[2..13];
        assert!((of_candidates.iter().sum::<f32>() - HQ as f32).abs() < 1e-4);
        // Softmax of the logits, summed over heads, is the votes.
        let logits: ts_tensor = made(|to| ts_context_workspace(context, ts_workspace::Logits as i32, to));
        let logits = std::slice::from_raw_parts(logits.data.cast::<f32>(), logits.shape[0] * logits.shape[1]);
        let batch = made(|to| ts_cache_extend(cache, &sequence, &0, 1, to));
        let logit =
            |token, head| logits[made(|to| ts_context_logit_index(context, batch, 0, token, head, to))];
        let weights = |head| (2..13).map(move |token| f64::from(logit(token, head)).exp());
        for token in 2..13 {
            let vote: f64 =
                (0..HQ).map(|head| f64::from(logit(token, head)).exp() / weights(head).sum::<f64>()).sum();
            assert!((f64::from(of_candidates[token - 2]) - vote).abs() < 1e-5);
        }
        ok(ts_batch_destroy(batch));
        let top_k: ts_tensor = made(|to| ts_context_workspace(context, ts_workspace::TopK as i32, to));
        assert_eq!((top_k.dtype, top_k.rank, top_k.shape), (ts_dtype::U32 as i32, 2, [1, 5, 1, 1]));
        ok(ts_selection_cache_destroy(selections));
        ok(ts_context_destroy(context));
        ok(ts_cache_destroy(cache));
        ok(ts_device_destroy(device));
    }
}

/// Votes and lists of the caller's own take the place of what operations write.
#[test]
fn results_of_ones_own() {
    let (config, device) = (config(), cpu());
    // SAFETY: all handles are alive until they are destroyed, all arrays have the shapes asked for.
    unsafe {
        let cache = made(|to| ts_cache_create(device, &config, &cache_config(), to));
        let context = context(device, &config, &limits(1, 17, 64));
        let sequence = made(|to| ts_cache_sequence_create(cache, to));
        let [q, k, v] = inputs(1, 16);
        let batch = made(|to| ts_cache_extend(cache, &sequence, &16, 1, to));
        ok(ts_cache_append(context, cache, 0, batch, &input(at(&q), at(&k), at(&v))));
        ok(ts_batch_destroy(batch));
        let [q, k, v] = inputs(2, 1);
        let batch = made(|to| ts_cache_extend(cache, &sequence, &1, 1, to));
        let input = input(at(&q), at(&k), at(&v));
        ok(ts_cache_append(context, cache, 0, batch, &input));
        let kv: ts_kv_view = made(|to| ts_cache_layer(cache, 0, to, size_of::<ts_kv_view>()));
        let mut got = Out::new(1, &config);

        let buffer = |buffer: ts_workspace| -> *mut std::ffi::c_void {
            made::<ts_tensor>(|to| ts_context_workspace(context, buffer as i32, to)).data
        };
        let (votes, lists) = (ts_workspace::Votes as i32, ts_workspace::Selected as i32);
        assert_eq!(ts_context_provide(context, votes, batch), ts_status::Order);
        ok(ts_pool(context, batch, &input, null_mut(), 0));
        assert_eq!(ts_top_k(context, batch, null_mut(), 0), ts_status::Order);
        let places = std::slice::from_raw_parts_mut(buffer(ts_workspace::Votes).cast::<f32>(), 64);
        (0..17).for_each(|token| places[token] = (token * 5 % 17) as f32);
        ok(ts_context_provide(context, votes, batch));
        ok(ts_top_k(context, batch, null_mut(), 0));
        // 0, 1; the five of 2..13 with the largest 5 t mod 17; 13.. .
        let mut chosen: Vec<u32> = (2..13).collect();
        chosen.sort_by_key(|token| std::cmp::Reverse(token * 5 % 17));
        chosen.truncate(5);
        chosen.sort_unstable();
        assert_eq!(selected(context, 0), [&[0, 1], &chosen[..], &[13, 14, 15, 16]].concat());
        ok(ts_attend(context, batch, &kv, &input, &got.as_output()));

        let other = made(|to| ts_batch_padded(batch, 1, 0, to));
        let output = got.as_output();
        assert_eq!(ts_attend(context, other, &kv, &input, &output), ts_status::Order);
        let all = std::slice::from_raw_parts_mut(buffer(ts_workspace::Selected).cast::<u32>(), 17);
        (0..17).for_each(|token| all[token as usize] = token);
        *buffer(ts_workspace::SelectedLen).cast::<u32>() = 17;
        ok(ts_context_provide(context, lists, other));
        ok(ts_attend(context, other, &kv, &input, &output));
        let mut dense = Out::new(1, &config);
        ok(ts_attend_dense(context, other, &kv, &input, &dense.as_output()));
        assert_same(&got, &dense, "a list of all tokens");
        all[3] = 2;
        assert_eq!(ts_attend(context, other, &kv, &input, &output), ts_status::Table);
        for batch in [batch, other] {
            ok(ts_batch_destroy(batch));
        }
        ok(ts_context_destroy(context));
        ok(ts_cache_destroy(cache));
        ok(ts_device_destroy(device));
    }
}

/// How far each layer is written, and how a layer that was left behind catches up.
#[test]
fn layers_that_missed_a_step() {
    let (config, device) = (config(), cpu());
    // SAFETY: all handles are alive until they are destroyed, all arrays have the shapes asked for.
    unsafe {
        let cache = made(|to| ts_cache_create(device, &config, &cache_config(), to));
        let context = context(device, &config, &limits(1, 8, 64));
        let sequence = made(|to| ts_cache_sequence_create(cache, to));
        let [q, k, v] = inputs(1, 8);
        let input = input(at(&q), at(&k), at(&v));
        let mut got = Out::new(8, &config);
        let output = got.as_output();
        let written = |layer| made(|to| ts_cache_written_len(cache, layer, sequence, to));
        let first = made(|to| ts_cache_extend(cache, &sequence, &8, 1, to));
        assert_eq!((written(0), written(1)), (0, 0));
        ok(ts_step(context, cache, 0, first, &input, &output));
        assert_eq!((written(0), written(1)), (8, 0));
        let second = made(|to| ts_cache_extend(cache, &sequence, &8, 1, to));
        ok(ts_step(context, cache, 0, second, &input, &output));
        for step in [ts_step, ts_step_dense] {
            assert_eq!(step(context, cache, 1, second, &input, &output), ts_status::Unwritten);
        }
        assert_eq!(ts_cache_append(context, cache, 1, second, &input), ts_status::Unwritten);
        ok(ts_cache_append(context, cache, 1, first, &input));
        ok(ts_step_dense(context, cache, 1, second, &input, &output));
        assert_eq!((written(0), written(1)), (16, 16));
        let third = made(|to| ts_cache_extend(cache, &sequence, &8, 1, to));
        let _: ts_kv_view = made(|to| ts_cache_layer_mut(cache, 1, to, size_of::<ts_kv_view>()));
        assert_eq!((written(0), written(1)), (16, 24));
        ok(ts_cache_sequence_truncate(cache, sequence, 12));
        assert_eq!((written(0), written(1)), (12, 12));
        let mut len = 7;
        assert_eq!(ts_cache_written_len(cache, 2, sequence, &mut len), ts_status::Index);
        assert_eq!(ts_cache_written_len(cache, 0, sequence + 1, &mut len), ts_status::UnknownSequence);
        assert_eq!(len, 7);
        for batch in [first, second, third] {
            ok(ts_batch_destroy(batch));
        }
        ok(ts_context_destroy(context));
        ok(ts_cache_destroy(cache));
        ok(ts_device_destroy(device));
    }
}

#[test]
fn workspace_bytes_are_those_of_the_buffers() {
    let (config, device, limits) = (config(), cpu(), limits(3, 8, 100));
    // SAFETY: all handles are alive until they are destroyed.
    unsafe {
        let bytes: usize = made(|to| ts_workspace_bytes(device, &config, &limits, to));
        let context = context(device, &config, &limits);
        let sum: usize = (0..=ts_workspace::Products as i32)
            .map(|buffer| made::<ts_tensor>(|to| ts_context_workspace(context, buffer, to)))
            .map(|tensor| (if tensor.dtype == ts_dtype::F64 as i32 { 8 } else { 4 }, tensor))
            .map(|(size, tensor)| size * tensor.shape.iter().product::<usize>())
            .sum();
        assert_eq!(bytes, sum, "the processor needs no scratch memory");
        ok(ts_context_destroy(context));
        ok(ts_device_destroy(device));
        ok(ts_context_destroy(null_mut()));
    }
}
