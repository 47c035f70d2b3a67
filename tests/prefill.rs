//! Prompts of any length (`TokenSelect::prefill`): the same as steps of their pieces, and as blocks one after the other.

mod common;

use std::borrow::Cow;
use std::ops::{ControlFlow, Range};

use common::paged::{Pool, STORAGES, Storage};
use common::problem::{self, Content, Problem, small_config};
use common::run::{Inputs, outputs_on, selected_lists};
use common::{assert_close, bits, cases, on_devices, tensor, to_device, values};
use proptest::prelude::*;
use tokenselect::{
    Batch, CacheConfig, DType, Device, Error, HeadShape, LayerMut, Limits, Operations, Over, PageTables,
    PagedKvCache, Pieces, Plan, Positions, PrefillConfig, PrefillProgress, Rope, RowAction, SelectConfig,
    SelectionCacheConfig, SequenceId, StepInput, StepOutput, Tensor, TensorView, TokenSelect, Workspace,
};

on_devices! {
    all: prefill_is_steps_of_its_pieces, prefill_is_blocks_one_by_one, a_function_that_stops,
        wrong_arguments_change_nothing, cached_selections_of_what_grows_are_dropped, over_borrowed_memory,
        the_workspace_is_bounded;
    cpu: random_prompts, four_million_tokens;
    gpus: nothing_is_recorded;
}

const HEADS: HeadShape = HeadShape { num_qo_heads: 6, num_kv_heads: 2, head_dim: 64 };

fn config(positions: Positions) -> SelectConfig {
    SelectConfig { heads: HEADS, dtype: DType::Bf16, positions, n_init: 3, n_local: 10, ..small_config() }
}

/// A sequence and the tokens that it has before and after a prefill.
type Growth = (usize, Range<usize>);

/// Tokens that five sequences have before and after: one has a prefix, one is shorter than a block, one does not grow.
fn growth() -> Vec<Growth> {
    vec![(0, 37..150), (1, 0..5), (2, 90..90), (3, 0..61), (4, 0..1)]
}

/// Pages of 8: what the sequences have, and some to spare.
const PAGES: CacheConfig = CacheConfig {
    num_layers: 2,
    num_pages: 48,
    page_size: 8,
    max_sequences: 5,
    layout: tokenselect::KvLayout::Nhd,
};

/// Blocks of up to 12 tokens, four of which are a piece unless they have more than 400 tokens.
const LIMITS: Limits = Limits { max_rows: 4, max_block_len: 12, max_kv_tokens: 400 };

/// All tokens of the sequences, for each of two layers.
fn layers(config: &SelectConfig) -> [Problem; 2] {
    let lengths: Vec<(usize, usize)> = growth().iter().map(|(_, tokens)| (tokens.end, tokens.end)).collect();
    [1, 2].map(|seed| Problem::new(config, &lengths, Content::Peaked, seed))
}

/// Some tokens of some sequences, one after the other.
fn inputs(device: &Device, problem: &Problem, parts: &[Growth]) -> Inputs {
    let heads = problem.config.heads;
    let count = parts.iter().map(|(_, tokens)| tokens.len()).sum::<usize>();
    let gather = |of: fn(&problem::Row) -> &Vec<f64>, num_heads: usize| {
        let width = num_heads * heads.head_dim;
        let of_part = |(row, tokens): &Growth| {
            of(&problem.rows[*row])[tokens.start * width..tokens.end * width].to_vec()
        };
        let data: Vec<f64> = parts.iter().flat_map(of_part).collect();
        tensor(problem.config.dtype, &data, [count, num_heads, heads.head_dim])
    };
    let (q, k) = (gather(|row| &row.q, heads.num_qo_heads), gather(|row| &row.k, heads.num_kv_heads));
    Inputs { q, k, v: gather(|row| &row.v, heads.num_kv_heads) }.to(device)
}

/// Outputs of so many tokens, filled with what nothing writes.
fn outputs(device: &Device, heads: HeadShape, tokens: usize) -> (Tensor, Tensor) {
    let (hq, d) = (heads.num_qo_heads, heads.head_dim);
    let out = tensor(DType::F32, &vec![-77.0; tokens * hq * d], [tokens, hq, d]);
    let lse = tensor(DType::F32, &vec![-77.0; tokens * hq], [tokens, hq]);
    (to_device(device, &out), to_device(device, &lse))
}

fn output<'a>(out: &'a mut Tensor, lse: &'a mut Tensor) -> StepOutput<'a> {
    StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) }
}

/// The parts of the sequences that are the query tokens of a piece.
fn parts_of(growth: &[Growth], piece: Range<usize>) -> Vec<Growth> {
    let (mut parts, mut first) = (Vec::new(), 0);
    for (row, tokens) in growth {
        let (begin, end) = (piece.start.max(first), piece.end.min(first + tokens.len()));
        if begin < end {
            parts.push((*row, tokens.start + begin - first..tokens.start + end - first));
        }
        first += tokens.len();
    }
    parts
}

fn plan(device: &Device, config: &SelectConfig, limits: Limits, operations: Operations) -> TokenSelect {
    TokenSelect::with_plan(Plan::new(device, config.clone(), limits, operations).unwrap()).unwrap()
}

/// A cache of both layers that has the tokens of the sequences before the prefill.
fn prepared(
    device: &Device,
    config: &SelectConfig,
    layers: &[Problem; 2],
) -> (PagedKvCache, Vec<SequenceId>) {
    let mut cache = PagedKvCache::new(device, config, &PAGES).unwrap();
    let ids: Vec<SequenceId> = growth().iter().map(|_| cache.create().unwrap()).collect();
    let before: Vec<Growth> = growth().into_iter().map(|(row, tokens)| (row, 0..tokens.start)).collect();
    let limits = Limits { max_rows: 5, max_block_len: 100, max_kv_tokens: 400 };
    let ts = plan(device, config, limits, Operations::ALL);
    let batch = cache.extend(&lengths(&ids, &before)).unwrap();
    for (layer, problem) in layers.iter().enumerate() {
        let given = inputs(device, problem, &before);
        ts.fill(&mut cache, layer, &batch, given.k.view(), given.v.view()).unwrap();
    }
    (cache, ids)
}

fn lengths(ids: &[SequenceId], growth: &[Growth]) -> Vec<(SequenceId, usize)> {
    growth.iter().map(|(row, tokens)| (ids[*row], tokens.len())).collect()
}

fn pieces_of(cache: &mut PagedKvCache, ids: &[SequenceId]) -> Pieces {
    cache.extend_in_pieces(&LIMITS, &lengths(ids, &growth()), 12).unwrap()
}

fn ranges(pieces: &Pieces) -> Vec<Range<usize>> {
    (0..pieces.len()).map(|piece| pieces.tokens(piece).unwrap()).collect()
}

fn go_on(_: PrefillProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Both layers of a prefill: outputs of each.
fn prefilled(
    ts: &mut TokenSelect,
    cache: &mut PagedKvCache,
    layers: &[Problem; 2],
    pieces: &Pieces,
) -> Vec<[Vec<u64>; 2]> {
    let of_layer = |(layer, problem): (usize, &Problem)| {
        let given = inputs(ts.device(), problem, &growth());
        let (mut out, mut lse) = outputs(ts.device(), HEADS, pieces.whole().num_query_tokens());
        let (mut seen, total) = (Vec::new(), pieces.whole().num_query_tokens());
        let note = |at| {
            seen.push(at);
            ControlFlow::Continue(())
        };
        let layer = cache.layer_mut(layer).unwrap();
        let end = ts.prefill(layer, pieces, given.step(), output(&mut out, &mut lse), note).unwrap();
        assert_eq!(end, PrefillProgress { done: total, total });
        let each: Vec<usize> = ranges(pieces).iter().map(|tokens| tokens.end).collect();
        assert_eq!(seen.iter().map(|at| at.done).collect::<Vec<_>>(), each, "one call a piece");
        [bits(&out), bits(&lse)]
    };
    layers.iter().enumerate().map(of_layer).collect()
}

/// The pieces by hand, in a cache that has nothing behind each: the same bits.
fn prefill_is_steps_of_its_pieces(device: &Device) {
    for positions in [Positions::Native, Positions::Reassigned(Rope::default())] {
        let config = config(positions);
        let layers = layers(&config);
        let mut ts = plan(device, &config, LIMITS, Operations::PREFILL);
        let (mut cache, ids) = prepared(device, &config, &layers);
        let pieces = pieces_of(&mut cache, &ids);
        // Four blocks, or fewer where they have many tokens: 104 + 112 + 128 places, and 136 + 152. The end of the first prompt, the
        // second and the beginning of the next are one piece.
        assert_eq!(ranges(&pieces), [0..48, 48..84, 84..108, 108..142, 142..179, 179..180]);
        let got = prefilled(&mut ts, &mut cache, &layers, &pieces);

        let (mut by_hand, own) = prepared(device, &config, &layers);
        let mut want = vec![[Vec::new(), Vec::new()]; 2];
        for tokens in ranges(&pieces) {
            let parts = parts_of(&growth(), tokens.clone());
            let batch = by_hand.extend_in_blocks(&LIMITS, &lengths(&own, &parts), 12).unwrap();
            for (layer, problem) in layers.iter().enumerate() {
                let given = inputs(device, problem, &parts);
                let (mut out, mut lse) = outputs(device, HEADS, tokens.len());
                let output = output(&mut out, &mut lse);
                ts.step(&mut by_hand, layer, &batch, given.step(), output).unwrap();
                want[layer][0].extend(bits(&out));
                want[layer][1].extend(bits(&lse));
            }
        }
        assert!(got == want, "{}", device.name());

        // A token more of each, which sees all keys and values.
        let limits = Limits { max_rows: 5, max_block_len: 1, max_kv_tokens: 400 };
        let mut decode = plan(device, &config, limits, Operations::ALL);
        let last: Vec<Growth> =
            growth().into_iter().map(|(row, tokens)| (row, 0..1.min(tokens.end))).collect();
        let mut token = |cache: &mut PagedKvCache, ids: &[SequenceId]| {
            let batch = cache.extend(&lengths(ids, &last)).unwrap();
            let given = inputs(device, &layers[1], &last);
            let (mut out, mut lse) = outputs(device, HEADS, last.len());
            decode.step_dense(cache, 1, &batch, given.step(), output(&mut out, &mut lse)).unwrap();
            bits(&out)
        };
        assert!(token(&mut cache, &ids) == token(&mut by_hand, &own), "{}", device.name());
    }
}

/// Each block by a step of its own, of a row that is no block: what the definitions say.
fn prefill_is_blocks_one_by_one(device: &Device) {
    for positions in [Positions::Native, Positions::Reassigned(Rope::default())] {
        let config = config(positions);
        let layers = layers(&config);
        let mut ts = plan(device, &config, LIMITS, Operations::PREFILL);
        let (mut cache, ids) = prepared(device, &config, &layers);
        let pieces = pieces_of(&mut cache, &ids);
        let got = prefilled(&mut ts, &mut cache, &layers, &pieces);
        let last = pieces.batch(pieces.len() - 1).unwrap();
        let last_lists = selected_lists(&ts, last.num_rows());

        let (mut single, own) = prepared(device, &config, &layers);
        let limits = Limits { max_rows: 1, max_block_len: 12, max_kv_tokens: 160 };
        let mut one = plan(device, &config, limits, Operations::ALL);
        let (mut lists, mut want) = (Vec::new(), [(); 2].map(|()| [Vec::new(), Vec::new()]));
        for (row, tokens) in growth() {
            for begin in tokens.clone().step_by(12) {
                let part = [(row, begin..tokens.end.min(begin + 12))];
                let batch = single.extend(&lengths(&own, &part)).unwrap();
                for (layer, problem) in layers.iter().enumerate() {
                    let given = inputs(device, problem, &part);
                    let (mut out, mut lse) = outputs(device, HEADS, part[0].1.len());
                    let output = output(&mut out, &mut lse);
                    one.step(&mut single, layer, &batch, given.step(), output).unwrap();
                    want[layer][0].extend(bits(&out));
                    want[layer][1].extend(bits(&lse));
                }
                lists.push(selected_lists(&one, 1).remove(0)); // of the second layer
            }
        }
        assert_eq!(lists.len(), pieces.num_blocks());
        assert_eq!(last_lists, lists[lists.len() - last.num_rows()..], "{}", device.name());
        if device.is_cpu() {
            assert!(got == want, "the same bits");
        }
        let floats =
            |bits: &[u64]| bits.iter().map(|&x| f64::from(f32::from_bits(x as u32))).collect::<Vec<_>>();
        for (got, want) in got.iter().zip(&want) {
            let tolerance = common::gpu_tolerance(DType::Bf16);
            assert_close(device.name(), &floats(&got[0]), &floats(&want[0]), 64, tolerance);
            common::assert_lse(device.name(), &floats(&got[1]), &floats(&want[1]), tolerance);
        }
    }
}

/// What was read before is there and nothing of the rest; the layer is behind until it is read again, from the beginning.
fn a_function_that_stops(device: &Device) {
    let config = config(Positions::Native);
    let layers = layers(&config);
    let mut ts = plan(device, &config, LIMITS, Operations::PREFILL);
    let (mut cache, ids) = prepared(device, &config, &layers);
    let pieces = pieces_of(&mut cache, &ids);
    let given = inputs(device, &layers[0], &growth());
    let (mut out, mut lse) = outputs(device, HEADS, 180);
    let mut calls = 0;
    let stop = |_| {
        calls += 1;
        if calls == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let layer = cache.layer_mut(0).unwrap();
    let end = ts.prefill(layer, &pieces, given.step(), output(&mut out, &mut lse), stop).unwrap();
    assert_eq!((end, calls), (PrefillProgress { done: 84, total: 180 }, 2));
    assert_eq!((cache.written_len(0, ids[0]), cache.len(ids[0])), (Ok(37 + 84), Ok(150)));
    assert_eq!(cache.written_len(0, ids[3]), Ok(0));
    let untouched = bits(&tensor(DType::F32, &[-77.0], [1]))[0];
    let (stopped, stopped_lse) = (bits(&out), bits(&lse));
    assert!(
        stopped[84 * 384..].iter().all(|&x| x == untouched)
            && stopped_lse[84 * 6..].iter().all(|&x| x == untouched)
    );
    assert!(!stopped[..84 * 384].contains(&untouched) && !stopped_lse[..84 * 6].contains(&untouched));

    let next = cache.extend_in_pieces(&LIMITS, &[(ids[0], 1)], 12).unwrap();
    let (mut one, mut one_lse) = outputs(device, HEADS, 1);
    let token = inputs(device, &layers[0], &[(0, 0..1)]);
    let layer = cache.layer_mut(0).unwrap();
    let error = ts.prefill(layer, &next, token.step(), output(&mut one, &mut one_lse), go_on).unwrap_err();
    assert!(matches!(error, Error::Unwritten { layer: 0, written: 121, needed: 150, .. }), "{error}");

    let again = prefilled(&mut ts, &mut cache, &layers, &pieces);
    assert!(again[0][0][..84 * 384] == stopped[..84 * 384], "{}", device.name());
    let (mut fresh, own) = prepared(device, &config, &layers);
    let pieces = pieces_of(&mut fresh, &own);
    assert!(again == prefilled(&mut ts, &mut fresh, &layers, &pieces), "{}", device.name());
}

/// The error of a prefill that reads nothing.
fn refused(
    ts: &mut TokenSelect,
    cache: &mut PagedKvCache,
    pieces: &Pieces,
    input: StepInput<'_>,
    output: StepOutput<'_>,
) -> Error {
    let none = |_| panic!("nothing may be read");
    ts.prefill(cache.layer_mut(0).unwrap(), pieces, input, output, none).unwrap_err()
}

/// All that can be found wrong is found before the first piece.
fn wrong_arguments_change_nothing(device: &Device) {
    let config = config(Positions::Native);
    let layers = layers(&config);
    let mut ts = plan(device, &config, LIMITS, Operations::PREFILL);
    let (mut cache, ids) = prepared(device, &config, &layers);
    let pieces = pieces_of(&mut cache, &ids);
    let given = inputs(device, &layers[0], &growth());
    let short = inputs(device, &layers[0], &[(0, 37..150), (1, 0..5), (3, 0..61)]);
    let (mut out, mut lse) = outputs(device, HEADS, 180);
    let (mut short_out, mut short_lse) = outputs(device, HEADS, 179);
    let (mut other, others) = prepared(device, &config, &layers);
    let (q, k, v) = (given.q.view(), given.k.view(), given.v.view());
    for (name, input) in [
        ("q", StepInput { q: short.q.view(), k, v }),
        ("k", StepInput { q, k: short.k.view(), v }),
        ("v", StepInput { q, k, v: short.v.view() }),
    ] {
        let error = refused(&mut ts, &mut cache, &pieces, input, output(&mut out, &mut lse));
        assert!(matches!(error, Error::Shape { what, .. } if what == name), "{error}");
    }
    let error = refused(&mut ts, &mut cache, &pieces, given.step(), output(&mut short_out, &mut lse));
    assert!(matches!(error, Error::Shape { what: "out", .. }), "{error}");
    let error = refused(&mut ts, &mut cache, &pieces, given.step(), output(&mut out, &mut short_lse));
    assert!(matches!(error, Error::Shape { what: "lse", .. }), "{error}");

    let error = refused(&mut ts, &mut other, &pieces, given.step(), output(&mut out, &mut lse));
    assert!(matches!(error, Error::Missing { op: "prefill", .. }), "{error}");
    for (name, less) in [
        ("max_rows", Limits { max_rows: 3, ..LIMITS }),
        ("max_block_len", Limits { max_block_len: 11, ..LIMITS }),
        ("max_kv_tokens", Limits { max_kv_tokens: 343, ..LIMITS }),
    ] {
        let mut less = plan(device, &config, less, Operations::PREFILL);
        let error = refused(&mut less, &mut cache, &pieces, given.step(), output(&mut out, &mut lse));
        assert!(matches!(error, Error::Limit { what, .. } if what == name), "{error}");
    }
    for (name, less) in [
        ("append", Operations { append: false, ..Operations::PREFILL }),
        ("score_blocks", Operations { score_blocks: false, ..Operations::ALL }),
        ("attend", Operations { attend: false, ..Operations::PREFILL }),
    ] {
        let mut less = plan(device, &config, LIMITS, less);
        let error = refused(&mut less, &mut cache, &pieces, given.step(), output(&mut out, &mut lse));
        assert!(
            error
                .to_string()
                .contains(&format!("`prefill` needs the operation `{name}`, which this was made without")),
            "{error}"
        );
    }
    assert_eq!(cache.written_len(0, ids[0]), Ok(37));
    let untouched = bits(&tensor(DType::F32, &[-77.0], [1]))[0];
    assert!(bits(&out).into_iter().chain(bits(&lse)).all(|x| x == untouched));

    // Neither does growing by what has no room.
    let len = |cache: &PagedKvCache| others.iter().map(|&id| cache.len(id).unwrap()).collect::<Vec<_>>();
    let before = len(&other);
    let grown = lengths(&others, &growth());
    for (name, less) in [
        ("max_block_len", Limits { max_block_len: 11, ..LIMITS }),
        ("max_kv_tokens", Limits { max_kv_tokens: 151, ..LIMITS }),
    ] {
        let error = other.extend_in_pieces(&less, &grown, 12).unwrap_err();
        assert!(matches!(error, Error::Limit { what, .. } if what == name), "{error}");
    }
    let error = other.extend_in_pieces(&LIMITS, &grown, 0).unwrap_err();
    assert!(matches!(error, Error::Argument { what: "block_len", .. }), "{error}");
    let error = other.extend_in_pieces(&LIMITS, &[(others[0], 63), (others[3], 300)], 12).unwrap_err();
    assert!(matches!(error, Error::OutOfPages { .. }), "{error}");
    assert_eq!(len(&other), before);
    let least = Limits { max_rows: 1, max_block_len: 12, max_kv_tokens: 152 };
    assert_eq!(other.extend_in_pieces(&least, &grown, 12).unwrap().len(), 18, "a piece for each block");

    cache.truncate(ids[0], 149).unwrap();
    let error = refused(&mut ts, &mut cache, &pieces, given.step(), output(&mut out, &mut lse));
    assert!(matches!(error, Error::StaleBatch { row: 0, .. }), "{error}");
}

/// A sequence whose prompt is read selects anew after it; one that does not grow keeps what it has.
fn cached_selections_of_what_grows_are_dropped(device: &Device) {
    let cached = Some(SelectionCacheConfig { similarity_threshold: -1.0, max_reuse: None });
    let config = SelectConfig { selection_cache: cached, ..config(Positions::Native) };
    let problem = Problem::new(&config, &[(150, 150), (100, 100)], Content::Peaked, 4);
    let pages = CacheConfig { num_layers: 1, ..PAGES };
    let mut cache = PagedKvCache::new(device, &config, &pages).unwrap();
    let ids = [cache.create().unwrap(), cache.create().unwrap()];
    let mut read = plan(device, &config, LIMITS, Operations::PREFILL);
    let mut decode = plan(device, &config, Limits { max_rows: 2, ..LIMITS }, Operations::ALL);
    let mut prefill = |cache: &mut PagedKvCache, growth: &[Growth]| {
        let pieces = cache.extend_in_pieces(&LIMITS, &lengths(&ids, growth), 12).unwrap();
        let given = inputs(device, &problem, growth);
        let (mut out, mut lse) = outputs(device, HEADS, pieces.whole().num_query_tokens());
        let layer = cache.layer_mut(0).unwrap();
        read.prefill(layer, &pieces, given.step(), output(&mut out, &mut lse), go_on).unwrap();
    };
    let mut token = |cache: &mut PagedKvCache, at: [usize; 2]| {
        let growth = [(0, at[0]..at[0] + 1), (1, at[1]..at[1] + 1)];
        let batch = cache.extend(&lengths(&ids, &growth)).unwrap();
        let given = inputs(device, &problem, &growth);
        let (mut out, mut lse) = outputs(device, HEADS, 2);
        decode.step(cache, 0, &batch, given.step(), output(&mut out, &mut lse)).unwrap();
        decode.workspace().actions().unwrap()
    };
    prefill(&mut cache, &[(0, 0..60), (1, 0..70)]);
    assert_eq!(token(&mut cache, [60, 70]), [RowAction::Score, RowAction::Score]);
    assert_eq!(token(&mut cache, [61, 71]), [RowAction::Reuse, RowAction::Reuse]);
    prefill(&mut cache, &[(1, 72..72), (0, 62..100)]);
    assert_eq!(token(&mut cache, [100, 72]), [RowAction::Score, RowAction::Reuse], "{}", device.name());
}

/// Another engine's memory, in every storage, with slices of a fused projection: what the operations do piece by piece.
fn over_borrowed_memory(device: &Device) {
    let config = config(Positions::Reassigned(Rope::default()));
    // A padding row without tokens has queries nevertheless, for which zeros are written.
    let problem = Problem::new(&config, &[(90, 53), (0, 15), (33, 33), (40, 0), (41, 1)], Content::Peaked, 6);
    for storage in STORAGES {
        let mut pool = Pool::before_block(&problem, 8, storage, 3).to(device);
        let mut by_hand = Pool::before_block(&problem, 8, storage, 3).to(device);
        let batch = pool.batch(&problem);
        let pieces = batch.in_pieces(&LIMITS, 12).unwrap();
        assert_eq!(ranges(&pieces), [0..48, 48..80, 80..102], "5 + 12 + 3 + 12, then 12 + 9 + 1");
        let dense = Inputs::new(&problem);
        let fused = fuse(&dense).map(|tensor| to_device(device, &tensor));
        let given = StepInput {
            q: fused[0].view().heads(0..6).unwrap(),
            k: fused[0].view().heads(6..8).unwrap(),
            v: fused[0].view().heads(8..10).unwrap(),
        };
        let mut ts = plan(device, &config, LIMITS, Operations::PREFILL);
        let (mut out, mut lse) = outputs_on(device, &problem, DType::Bf16);
        let layer = LayerMut { kv: pool.view_mut(), selections: None };
        ts.prefill(layer, &pieces, given, output(&mut out, &mut lse), go_on).unwrap();

        let dense = dense.to(device);
        let (mut want, mut want_lse) = (Vec::new(), Vec::new());
        for piece in 0..pieces.len() {
            let (batch, tokens) = (pieces.batch(piece).unwrap(), pieces.tokens(piece).unwrap());
            let [q, k, v] = [&dense.q, &dense.k, &dense.v].map(|x| x.view().tokens(tokens.clone()).unwrap());
            let layer = LayerMut { kv: by_hand.view_mut(), selections: None };
            ts.append_select(&batch, layer, StepInput { q, k, v }).unwrap();
            let zeros = |dtype, shape: tokenselect::Shape| Tensor::zeros_on(device, dtype, shape).unwrap();
            let mut out = zeros(DType::Bf16, [tokens.len(), 6, 64].into());
            let mut lse = zeros(DType::F32, [tokens.len(), 6].into());
            ts.attend(&batch, by_hand.view(), q, Over::Selected, output(&mut out, &mut lse)).unwrap();
            want.extend(bits(&out));
            want_lse.extend(bits(&lse));
        }
        assert!(bits(&out) == want && bits(&lse) == want_lse, "{}: {storage:?}", device.name());
        assert!(bits(&pool.k) == bits(&by_hand.k) && bits(&pool.v) == bits(&by_hand.v));
        assert!(values(&out)[53 * 384..68 * 384].iter().all(|&x| x == 0.0));
    }
}

/// Queries, keys and values of each token one after the other.
fn fuse(dense: &Inputs) -> [Tensor; 1] {
    let parts = [(values(&dense.q), 6), (values(&dense.k), 2), (values(&dense.v), 2)];
    let tokens = dense.q.shape().dims()[0];
    let token = |t: usize| {
        parts.iter().flat_map(move |(data, heads)| data[t * heads * 64..(t + 1) * heads * 64].to_vec())
    };
    let all: Vec<f64> = (0..tokens).flat_map(token).collect();
    [tensor(dense.q.dtype(), &all, [tokens, 10, 64])]
}

/// As many blocks as fit, none where none does, and long sequences.
fn the_workspace_is_bounded(device: &Device) {
    let reassigned = SelectConfig { dtype: DType::Bf16, ..SelectConfig::paper(HEADS, Rope::default(), 512) };
    for config in [config(Positions::Native), reassigned] {
        let bytes = |prefill: &PrefillConfig| {
            let limits = prefill.limits(device, &config)?;
            let plan = Plan::new(device, config.clone(), limits, Operations::PREFILL)?;
            Ok::<_, Error>((Workspace::num_bytes(&plan)?, limits.max_rows))
        };
        let small =
            PrefillConfig { block_len: 12, max_kv_len: 5000, max_piece_len: 600, ..Default::default() };
        let (all, rows) = bytes(&small).unwrap();
        assert_eq!(rows, 50, "a whole piece of 600 tokens");
        let (mut last, mut counts) = (0, Vec::new());
        let error = bytes(&PrefillConfig { max_workspace_bytes: 1000, ..small }).unwrap_err();
        let Error::Config { field: "max_workspace_bytes", rule, got } = &error else { panic!("{error}") };
        let least: usize = rule.split(&[' ', ','][..]).find_map(|word| word.parse().ok()).expect("the bytes");
        assert_eq!((got.as_str(), rule.contains("12 tokens")), ("1000", true), "{error}");
        assert!(bytes(&PrefillConfig { max_workspace_bytes: least - 1, ..small }).is_err());
        for max_workspace_bytes in [least, least + (all - least) / 3, all - 1, all] {
            let (needed, rows) = bytes(&PrefillConfig { max_workspace_bytes, ..small }).unwrap();
            assert!(needed <= max_workspace_bytes && needed > last, "{}", device.name());
            (last, counts) = (needed, [counts, vec![rows]].concat());
        }
        assert!(
            counts[0] == 1 && counts[2] == 49 && counts[3] == 50 && (2..49).contains(&counts[1]),
            "{counts:?}"
        );

        // 4 million tokens, in blocks of the paper's length and in the shortest.
        for block_len in [512, 4] {
            let long = PrefillConfig { block_len, max_kv_len: 4 << 20, ..PrefillConfig::default() };
            let (needed, rows) = bytes(&long).unwrap();
            assert!(needed <= 1 << 30 && rows >= 2, "{}: {needed} bytes, {rows} blocks", device.name());
        }
        let fails = |prefill: PrefillConfig, name: &str| match prefill.limits(device, &config) {
            Err(Error::Config { field, .. }) => assert_eq!(field, name),
            other => panic!("{other:?}"),
        };
        fails(PrefillConfig { block_len: 0, ..small }, "block_len");
        fails(PrefillConfig { max_kv_len: 0, ..small }, "max_kv_len");
        fails(PrefillConfig { max_kv_len: usize::MAX, ..small }, "max_kv_len");
        fails(PrefillConfig { max_piece_len: 0, ..small }, "max_piece_len");
        let one = PrefillConfig { max_piece_len: 11, ..small }.limits(device, &config).unwrap();
        assert_eq!((one.max_rows, one.max_block_len), (1, 12), "no less than a block");
        let ts = TokenSelect::for_prefill(device, config.clone(), &small).unwrap();
        assert_eq!((ts.plan().limits().max_rows, ts.plan().limits().max_block_len), (50, 12));
    }
}

/// Recorded work would read the same pieces at every launch, and no function would hear of it.
fn nothing_is_recorded(device: &Device) {
    let config = config(Positions::Native);
    let layers = layers(&config);
    let mut ts = plan(device, &config, LIMITS, Operations::PREFILL);
    let (mut cache, ids) = prepared(device, &config, &layers);
    let pieces = pieces_of(&mut cache, &ids);
    prefilled(&mut ts, &mut cache, &layers, &pieces);
    let given = inputs(device, &layers[0], &growth());
    let (mut out, mut lse) = outputs(device, HEADS, 180);
    let recorded = device.capture(|| {
        let output = output(&mut out, &mut lse);
        ts.prefill(cache.layer_mut(0)?, &pieces, given.step(), output, go_on).map(drop)
    });
    let error = recorded.map(drop).unwrap_err();
    assert!(matches!(error, Error::Missing { op: "prefill", .. }), "{error}");
}

/// Prompts of any lengths, blocks and limits: pieces are what fits, and outputs those of blocks one after the other.
fn random_prompts(device: &Device) {
    proptest!(cases(64), |(
        config in problem::config(256),
        lengths in problem::lengths(120),
        page_size in prop::sample::select(vec![1usize, 5, 16]),
        block_len in prop::sample::select(vec![1usize, 4, 9, 64, 1000]),
        max_rows in 1usize..9,
        room in 0usize..300,
        seed in any::<u64>(),
    )| {
        let problem = Problem::new(&config, &lengths, Content::Peaked, seed);
        let mut pool = Pool::before_block(&problem, page_size, Storage::Nhd, 5).to(device);
        let batch = pool.batch(&problem);
        let longest = problem.rows.iter().filter(|row| row.t > 0).map(|row| row.n.next_multiple_of(page_size));
        let max_kv_tokens = (longest.max().unwrap_or(0) + room).max(1);
        let limits = Limits { max_rows, max_block_len: block_len, max_kv_tokens };
        let pieces = batch.in_pieces(&limits, block_len).unwrap();
        let of_piece: Vec<Cow<'_, Batch>> = (0..pieces.len()).map(|i| pieces.batch(i).unwrap()).collect();
        prop_assert!(ranges(&pieces).windows(2).all(|pair| pair[0].end == pair[1].start));
        prop_assert_eq!(pieces.tokens(0).map_or(0, |tokens| tokens.start), 0);
        prop_assert_eq!(ranges(&pieces).last().map_or(0, |tokens| tokens.end), problem.num_query_tokens());
        for (at, piece) in of_piece.iter().enumerate() {
            prop_assert!(piece.num_rows() <= max_rows && piece.num_token_places() <= max_kv_tokens);
            let Some(next) = of_piece.get(at + 1) else { break };
            let more = next.row(0).unwrap().kv_len.next_multiple_of(page_size) + piece.num_token_places();
            prop_assert!(piece.num_rows() == max_rows || more > max_kv_tokens, "another block has room");
        }

        let given = Inputs::new(&problem).to(device);
        let (mut out, mut lse) = outputs_on(device, &problem, DType::F32);
        let mut ts = plan(device, &config, limits, Operations::PREFILL);
        let layer = LayerMut { kv: pool.view_mut(), selections: None };
        ts.prefill(layer, &pieces, given.step(), output(&mut out, &mut lse), go_on).unwrap();
        prop_assert_eq!(pieces.block_len(), block_len);

        let mut alone = Pool::before_block(&problem, page_size, Storage::Nhd, 5).to(device);
        let mut want = Vec::new();
        for piece in of_piece {
            for row in 0..piece.num_rows() {
                let of_row = piece.row(row).unwrap();
                let last = of_row.kv_len - of_row.pages.len().saturating_sub(1) * page_size;
                let tables = PageTables {
                    indptr: vec![0, of_row.pages.len() as u32],
                    indices: of_row.pages.to_vec(),
                    last_page_len: vec![last as u32],
                };
                let one = Batch::new(page_size, vec![0, of_row.block_len() as u32], tables).unwrap();
                let first = want.len() / (config.heads.num_qo_heads * config.heads.head_dim);
                let tokens = first..first + of_row.block_len();
                let [q, k, v] = [&given.q, &given.k, &given.v].map(|x| x.view().tokens(tokens.clone()).unwrap());
                let mut ts = plan(device, &config, limits, Operations::ALL);
                ts.append_select(&one, LayerMut { kv: alone.view_mut(), selections: None }, StepInput { q, k, v }).unwrap();
                let (mut out, mut lse) = outputs(device, config.heads, tokens.len());
                ts.attend(&one, alone.view(), q, Over::Selected, output(&mut out, &mut lse)).unwrap();
                want.extend(bits(&out));
            }
        }
        prop_assert!(bits(&out) == want);
    });
}

/// The end of a prompt of four million tokens, in a workspace of the default size.
fn four_million_tokens(device: &Device) {
    let heads = HeadShape { num_qo_heads: 2, num_kv_heads: 1, head_dim: 8 };
    let config =
        SelectConfig { heads, dtype: DType::F32, n_init: 4, n_local: 16, top_k: 40, ..small_config() };
    let len = 4 << 20;
    let (before, new) = (len - 600, 600);
    let pages = CacheConfig { num_pages: len / 256, page_size: 256, ..PAGES };
    let mut cache = PagedKvCache::new(device, &config, &CacheConfig { num_layers: 1, ..pages }).unwrap();
    let id = cache.create().unwrap();
    cache.extend(&[(id, before)]).unwrap();
    cache.mark_written(0).unwrap(); // zeros
    let prefill = PrefillConfig { max_kv_len: len, ..PrefillConfig::default() };
    let mut ts = TokenSelect::for_prefill(device, config, &prefill).unwrap();
    let limits = *ts.plan().limits();
    let pieces = cache.extend_in_pieces(&limits, &[(id, new)], prefill.block_len).unwrap();
    assert_eq!((pieces.len(), pieces.num_blocks()), (1, 2));
    let (q, kv) = (vec![1.0f32; new * 16], vec![3.0f32; new * 8]);
    let mut out = vec![0.0f32; q.len()];
    let (input, output) =
        (ts.input(pieces.whole(), &q, &kv, &kv).unwrap(), ts.output(pieces.whole(), &mut out, None).unwrap());
    ts.prefill(cache.layer_mut(0).unwrap(), &pieces, input, output, go_on).unwrap();
    // The first block sees zeros and itself; for the second, the first is the best of all candidates.
    let list = ts.workspace().selected(1).unwrap();
    let want = (0..4).chain(before..before + 40).chain(before + 512 - 16..len);
    assert_eq!(list, want.map(|token| token as u32).collect::<Vec<_>>());
    assert!(out[512 * 16..].iter().all(|&x| x > 2.99), "values of 3 outweigh four of 0");
}

/// Tables of long prompts in short blocks are not kept, and are what they would be.
#[test]
fn tables_that_are_not_kept() {
    let len = 14_000u32;
    let tables =
        PageTables { indptr: vec![0, len], indices: (0..len).rev().collect(), last_page_len: vec![1] };
    let batch = Batch::new(1, vec![0, len], tables).unwrap();
    let limits = Limits { max_rows: 500, max_block_len: 4, max_kv_tokens: 1 << 30 };
    let pieces = batch.in_pieces(&limits, 4).unwrap();
    assert_eq!((pieces.len(), pieces.num_blocks()), (7, 3500));
    let kept = |piece| matches!(pieces.batch(piece).unwrap(), Cow::Borrowed(_));
    // The first five pieces have pages of 50 million bytes, the first six of 72 million.
    assert_eq!((0..7).map(kept).collect::<Vec<_>>(), [true, true, true, true, true, false, false]);
    for piece in 0..7 {
        let (made, tokens) = (pieces.batch(piece).unwrap(), pieces.tokens(piece).unwrap());
        assert!(made.is_in_blocks() && made.num_query_tokens() == tokens.len());
        for row in [0, 1, made.num_rows() - 1] {
            let of_row = made.row(row).unwrap();
            assert_eq!(of_row.kv_len, tokens.start + 4 * (row + 1));
            assert_eq!(of_row.pages, &batch.tables().indices[..of_row.kv_len]);
        }
    }
    let error = pieces.tokens(7).unwrap_err();
    assert_eq!(error, Error::Index { what: "piece", limit: 7, got: 7 });
    assert!(pieces.batch(7).is_err());
}

/// More pieces than anybody reads are refused, before there is a list of them; and then nothing grew.
#[test]
fn more_pieces_than_a_list_may_have() {
    let len = 1u32 << 31;
    let pages = len / 256;
    let tables =
        PageTables { indptr: vec![0, pages], indices: (0..pages).collect(), last_page_len: vec![255] };
    let batch = Batch::new(256, vec![0, len - 1], tables).unwrap();
    let limits = Limits { max_rows: 3, max_block_len: 1, max_kv_tokens: 3 << 31 };
    let error = batch.in_pieces(&limits, 1).unwrap_err();
    assert_eq!(error, Error::Limit { what: "pieces of a batch", limit: 1 << 24, got: 715_827_883 });

    // Zeros that nobody looks at take no memory.
    let heads = HeadShape { num_qo_heads: 1, num_kv_heads: 1, head_dim: 8 };
    let config = SelectConfig { heads, ..config(Positions::Native) };
    let pages = CacheConfig { num_layers: 1, num_pages: (1 << 16) + 2, page_size: 256, ..PAGES };
    let mut cache = PagedKvCache::new(&Device::cpu(), &config, &pages).unwrap();
    let ids = [cache.create().unwrap(), cache.create().unwrap()];
    let before = cache.extend(&[(ids[0], 3)]).unwrap();
    let limits = Limits { max_rows: 1, max_block_len: 1, max_kv_tokens: 1 << 31 };
    let error = cache.extend_in_pieces(&limits, &[(ids[1], 1 << 24), (ids[0], 1)], 1).unwrap_err();
    assert_eq!(error, Error::Limit { what: "pieces of a batch", limit: 1 << 24, got: (1 << 24) + 1 });
    assert_eq!((cache.len(ids[0]), cache.len(ids[1])), (Ok(3), Ok(0)));
    assert_eq!(cache.pages().num_free_pages(), (1 << 16) + 1);
    let (q, kv, mut out) = (vec![half::bf16::ONE; 24], vec![half::bf16::ONE; 24], vec![0.0f32; 24]);
    let limits = Limits { max_rows: 1, max_block_len: 3, max_kv_tokens: 256 };
    let mut ts = plan(&Device::cpu(), &config, limits, Operations::ALL);
    let (input, output) =
        (ts.input(&before, &q, &kv, &kv).unwrap(), ts.output(&before, &mut out, None).unwrap());
    ts.step(&mut cache, 0, &before, input, output).unwrap(); // not stale
}

/// Nothing to read is no piece.
#[test]
fn no_tokens_are_no_pieces() {
    let config = SelectConfig { heads: HEADS, ..small_config() };
    let mut cache = PagedKvCache::new(&Device::cpu(), &config, &PAGES).unwrap();
    let id = cache.create().unwrap();
    let mut ts = plan(&Device::cpu(), &config, LIMITS, Operations::PREFILL);
    for growth in [vec![], vec![(id, 0)]] {
        let pieces = cache.extend_in_pieces(&LIMITS, &growth, 12).unwrap();
        assert!(pieces.is_empty());
        let input = ts.input::<f32>(pieces.whole(), &[], &[], &[]).unwrap();
        let mut none: [f32; 0] = [];
        let output = ts.output(pieces.whole(), &mut none, None).unwrap();
        let end = ts.prefill(cache.layer_mut(0).unwrap(), &pieces, input, output, go_on).unwrap();
        assert_eq!(end, PrefillProgress { done: 0, total: 0 });
    }
}

/// What cannot be cut, as in `Batch::in_blocks`.
#[test]
fn what_cannot_be_cut_is_refused() {
    let tables = PageTables { indptr: vec![0, 2], indices: vec![4, 1], last_page_len: vec![3] };
    let whole = Batch::new(8, vec![0, 7], tables.clone()).unwrap();
    let text =
        |batch: &Batch, block_len| batch.in_pieces(&LIMITS, block_len).map(drop).unwrap_err().to_string();
    assert_eq!(text(&whole, 0), "argument `block_len` must be at least 1, got 0");
    assert_eq!(text(&whole.in_blocks(4).unwrap(), 4), "`in_pieces` needs rows that are not cut into blocks");
    let parts = Batch::partial(8, vec![0, 7], tables, std::iter::once(0..5).collect()).unwrap();
    assert_eq!(text(&parts, 4), "`in_pieces` needs rows that are whole sequences");
    let error = whole.in_pieces(&Limits { max_kv_tokens: 15, ..LIMITS }, 4).map(drop);
    assert_eq!(error, Err(Error::Limit { what: "max_kv_tokens", limit: 15, got: 16 }));
}

/// Queries that lie head by head, of which each piece takes some tokens.
#[test]
fn queries_with_heads_outermost() {
    let (config, tokens) = (small_config(), 10); // 4 query heads, 2 KV heads of 16
    let data: Vec<f32> = (0..tokens * 4 * 16).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
    let head_by_head: Vec<f32> = (0..4)
        .flat_map(|head| data.chunks(4 * 16).flat_map(move |token| &token[head * 16..][..16]).copied())
        .collect();
    let kv: Vec<f32> = data[..tokens * 2 * 16].iter().rev().copied().collect();
    let limits = Limits { max_rows: 1, max_block_len: 3, max_kv_tokens: 16 };
    let out = |q: TensorView<'_>| {
        let mut cache = PagedKvCache::new(&Device::cpu(), &config, &PAGES).unwrap();
        let id = cache.create().unwrap();
        let mut ts = plan(&Device::cpu(), &config, limits, Operations::PREFILL);
        let pieces = cache.extend_in_pieces(&limits, &[(id, tokens)], 3).unwrap();
        assert_eq!(pieces.len(), 4);
        let mut out = vec![0.0f32; data.len()];
        let input = StepInput { q, ..ts.input(pieces.whole(), &data, &kv, &kv).unwrap() };
        let output = ts.output(pieces.whole(), &mut out, None).unwrap();
        ts.prefill(cache.layer_mut(0).unwrap(), &pieces, input, output, go_on).unwrap();
        out
    };
    let strided = TensorView::strided(&head_by_head, [tokens, 4, 16], [16, tokens * 16]).unwrap();
    assert_eq!(out(strided), out(TensorView::new(&data, [tokens, 4, 16]).unwrap()));
}

/// Some tokens of a dense tensor.
#[test]
fn tokens_of_a_tensor() {
    let data: Vec<f32> = (0..60).map(|i| i as f32).collect();
    let dense = TensorView::new(&data, [5, 3, 4]).unwrap();
    let part = dense.tokens(1..3).unwrap();
    assert_eq!((part.shape().dims(), part.as_slice::<f32>().unwrap()), (&[2, 3, 4][..], &data[12..36]));
    assert_eq!(dense.tokens(5..5).unwrap().shape().dims(), [0, 3, 4]);
    let text = |range| dense.tokens(range).map(drop).unwrap_err().to_string();
    assert_eq!(text(4..6), "`last token` must be below 5, got 5");
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = text(3..2);
    assert_eq!(reversed, "argument `tokens` must be a range that ends where it begins or later, got 3..2");
    assert!(TensorView::new(&data[..1], []).unwrap().tokens(0..0).is_err());
    let mut lse = data.clone();
    let part = tokenselect::TensorViewMut::new(&mut lse, [20, 3]).unwrap().tokens(19..20).unwrap();
    part.into_slice::<f32>().unwrap().fill(-1.0);
    assert_eq!((lse[56], &lse[57..]), (56.0, &[-1.0; 3][..]));
    assert!(tokenselect::TensorViewMut::new(&mut lse, [20, 3]).unwrap().tokens(0..21).is_err());
}
