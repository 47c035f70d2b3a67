//! Whole steps: random batches against the definitions, runs of blocks through an owned cache, dense against
//! selected, determinism, and the two ways to spread a step over devices.

mod common;

use common::paged::{Pool, STORAGES, Storage, limits, owned};
use common::problem::{self, Content, Problem, Row, around, cached, small_config, some_heads};
use common::run::{
    Inputs, Outcome, assert_outcome, outputs, queries, select_and_attend, selected_lists, step, token_select,
};
use common::{attention_tolerance, bits, cases, naive, naive_config, on_devices, tensor, tolerance, values};
use proptest::prelude::*;
use tokenselect::{
    Batch, Buffer, CacheConfig, DType, Device, HeadShape, KvLayout, Limits, Over, PagedKvCache, Positions,
    Ranks, Rope, RowAction, SelectConfig, Selection, SequenceId, StepOutput, TokenSelect,
};

on_devices! {
    cpu:
        a_step_over_borrowed_memory, a_step_of_an_owned_cache, runs_of_blocks_through_all_layers,
        dense_equals_selected_where_all_is_selected, dense_blocks_equal_one_block,
        results_do_not_depend_on_threads_or_chance, tensor_parallel_equals_one_device,
        tensor_parallel_with_max_pool, sequence_parallel_equals_one_device;
}

fn a_step_over_borrowed_memory(device: &Device) {
    proptest!(cases(128), |(
        config in problem::config(512),
        lengths in problem::lengths(200),
        content in problem::content(),
        page_size in around(&[1, 16, 64]).prop_map(|size| size.max(1)),
        storage in prop::sample::select(STORAGES.to_vec()),
        seed in any::<u64>(),
    )| {
        let problem = Problem::new(&config, &lengths, content, seed);
        let mut pool = Pool::before_block(&problem, page_size, storage, seed);
        let batch = pool.batch(&problem);
        let mut ts = token_select(device, &problem, &batch);
        let inputs = Inputs::new(&problem);
        ts.append(&batch, pool.view_mut(), inputs.k.view(), inputs.v.view()).unwrap();
        let outcome = select_and_attend(&mut ts, &problem, &batch, pool.view(), None);
        assert_outcome(device.name(), &problem, &outcome);
    });
}

fn a_step_of_an_owned_cache(device: &Device) {
    proptest!(cases(128), |(
        config in problem::config(512),
        lengths in problem::lengths(200),
        content in problem::content(),
        page_size in around(&[1, 16, 64, 256]).prop_map(|size| size.clamp(1, 256)),
        layout in prop::sample::select(vec![KvLayout::Nhd, KvLayout::Hnd]),
        seed in any::<u64>(),
    )| {
        let problem = Problem::new(&config, &lengths, content, seed);
        let (mut cache, ids) = owned(device, &problem, page_size, layout, 1, seed);
        let growth: Vec<_> = ids.iter().copied().zip(problem.rows.iter().map(|row| row.t)).collect();
        let batch = cache.extend(&growth).unwrap();
        let mut ts = token_select(device, &problem, &batch);
        let outcome = step(&mut ts, &mut cache, 0, &batch, &problem);
        assert_outcome(device.name(), &problem, &outcome);
    });
}

/// The first `n` tokens of a row, the last `t` of which are the block. Queries stand for all tokens.
fn prefix(row: &Row, n: usize, t: usize, config: &SelectConfig) -> Row {
    let heads = config.heads;
    let (q, kv) = (heads.num_qo_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim);
    let part = |of: &[f64], from: usize, width: usize| of[from * width..n * width].to_vec();
    Row { n, t, q: part(&row.q, n - t, q), k: part(&row.k, 0, kv), v: part(&row.v, 0, kv) }
}

/// Sequences that grow block by block, in two layers with contents of their own, with the Selection Cache:
/// every step of every layer is checked, the reuse rule included.
fn run_blocks(device: &Device, config: &SelectConfig, blocks: &[Vec<usize>], layout: KvLayout, seed: u64) {
    let num_rows = blocks[0].len();
    let total = |row: usize| blocks.iter().map(|block| block[row]).sum::<usize>();
    let lengths: Vec<_> = (0..num_rows).map(|row| (total(row), total(row))).collect();
    let layers = [0, 1].map(|l| Problem::new(config, &lengths, Content::Peaked, seed + l));
    let naive_config = naive_config(config);
    let cache_config = CacheConfig { num_layers: 2, num_pages: 200, page_size: 7, max_sequences: 4, layout };
    let mut cache = PagedKvCache::new(device, config, &cache_config).unwrap();
    let ids: Vec<SequenceId> = (0..num_rows).map(|_| cache.create().unwrap()).collect();
    let limits = Limits { max_rows: num_rows, max_block_len: 64, max_kv_tokens: 1400 };
    let mut ts = TokenSelect::new(device, config.clone(), limits).unwrap();
    let mut kept: Vec<Vec<Option<naive::Cached>>> = vec![vec![None; num_rows]; 2];
    let (mut done, mut counted) = (vec![0; num_rows], [0; 3]);
    for (s, block) in blocks.iter().enumerate() {
        let growth: Vec<_> = ids.iter().copied().zip(block.iter().copied()).collect();
        let batch = cache.extend(&growth).unwrap();
        done.iter_mut().zip(block).for_each(|(done, t)| *done += t);
        for (l, layer) in layers.iter().enumerate() {
            let rows = (0..num_rows).map(|r| prefix(&layer.rows[r], done[r], block[r], config)).collect();
            let problem = Problem { config: config.clone(), rows };
            let outcome = step(&mut ts, &mut cache, l, &batch, &problem);
            let actions = ts.workspace().actions().unwrap();
            let similarities = values(ts.workspace().buffer(Buffer::Similarities));
            for (r, row) in problem.rows.iter().enumerate().filter(|(_, row)| row.t > 0) {
                let what = format!("step {s}, layer {l}, row {r} (n = {}, T = {})", row.n, row.t);
                let cached = &mut kept[l][r];
                let want = naive::select(&naive_config, &row.q, &row.k, cached);
                let (threshold, _) = naive_config.reuse.unwrap_or((2.0, 0));
                assert!(
                    (want.similarity - threshold).abs() > 1e-5,
                    "{what}: too close to call, choose a seed"
                );
                let (want_cos, got_cos) = (want.similarity, similarities[r]);
                assert!((want_cos - got_cos).abs() < 1e-5, "{what}: similarity {got_cos}, want {want_cos}");
                let action = match (want.reused, want.votes.is_some()) {
                    (true, _) => RowAction::Reuse,
                    (_, true) => RowAction::Score,
                    _ => RowAction::Complete,
                };
                assert_eq!(actions[r], action, "{what}");
                counted[action as usize % 3] += 1; // Complete 1, Score 2, Reuse 3
                if want.reused {
                    assert_eq!(outcome.selected[r], want.list, "{what}: the cached tokens, today's windows");
                } else if let (Some(cached), RowAction::Score) = (cached, action) {
                    // Votes too close to call: what is reused later is the device's own choice.
                    let range = naive::candidates(&naive_config, row.n, row.t);
                    cached.chosen =
                        outcome.selected[r].iter().copied().filter(|t| range.contains(t)).collect();
                }
            }
            let fresh: Vec<usize> = (0..num_rows).filter(|&r| actions[r] != RowAction::Reuse).collect();
            assert_rows(&format!("step {s}, layer {l}"), &problem, &outcome, &fresh);
        }
    }
    let stats = cache.selection_stats().unwrap();
    if config.selection_cache.is_some() {
        let counts = [stats.reused, stats.complete, stats.scored].map(|count| count as usize);
        assert_eq!(counts, counted, "reused, complete, scored");
        assert!(counted[0] > 0 && counted[2] > 0, "the run is to reuse and to score: {counted:?}");
    }
}

/// Attention of all rows over the lists found; the choice itself of the `fresh` ones only.
fn assert_rows(what: &str, problem: &Problem, outcome: &Outcome, fresh: &[usize]) {
    let config = naive_config(&problem.config);
    let (out, width) = (values(&outcome.out), config.hq * config.d);
    let mut token = 0;
    for (r, row) in problem.rows.iter().enumerate() {
        let what = format!("{what}, row {r}");
        if fresh.contains(&r) && row.t > 0 {
            common::run::assert_selected(&what, &config, row, &outcome.selected[r]);
        }
        let list = naive::ranked(&outcome.selected[r]);
        let (want, _) = naive::attend(&config, &row.q, &row.k, &row.v, &list, list.len());
        let got = &out[token * width..][..want.len()];
        let allowed = attention_tolerance(DType::F32, &config, &row.q, &row.k, list.len());
        common::assert_close(&what, got, &want, config.d, allowed);
        token += row.t;
    }
}

fn runs_of_blocks_through_all_layers(device: &Device) {
    let decode = |steps: usize| vec![vec![1, 1, 0]; steps];
    let prefill = vec![vec![30, 7, 0], vec![30, 0, 64], vec![30, 13, 30], vec![1, 1, 1], vec![0, 64, 5]];
    let blocks = [prefill, decode(20), vec![vec![4, 17, 1]; 3], decode(20)].concat();
    // Heads of a random layer resemble each other over time by construction: cosines are about 0.75.
    let base = SelectConfig { n_init: 2, n_local: 6, top_k: 12, ..small_config() };
    for (positions, layout) in
        [(Positions::Native, KvLayout::Hnd), (Positions::Reassigned(Rope::default()), KvLayout::Nhd)]
    {
        for (config, seed) in
            [(cached(base.clone(), 0.7, Some(3)), 1), (cached(base.clone(), 0.8, None), 2), (base.clone(), 3)]
        {
            let config = SelectConfig { positions: positions.clone(), ..config };
            run_blocks(device, &config, &blocks, layout, seed);
        }
    }
}

/// Where everything is selected, selection changes nothing.
fn dense_equals_selected_where_all_is_selected(device: &Device) {
    proptest!(cases(32), |(
        config in problem::config(512),
        lengths in problem::lengths(150),
        scored in any::<bool>(),
        seed in any::<u64>(),
    )| {
        // Either too few candidates to score, or a first block whose window covers all.
        let config = match scored {
            true => SelectConfig { top_k: 200, ..config },
            false => SelectConfig { n_local: 200, ..config },
        };
        let problem = Problem::new(&config, &lengths, Content::Peaked, seed);
        let pool = Pool::full(&problem, 16, Storage::CombinedNhd, seed);
        let batch = pool.batch(&problem);
        let mut ts = token_select(device, &problem, &batch);
        let selected = select_and_attend(&mut ts, &problem, &batch, pool.view(), None);
        for (row, list) in problem.rows.iter().zip(&selected.selected) {
            prop_assert_eq!(list.len(), if row.t == 0 { 0 } else { row.n });
        }
        let (mut out, mut lse) = outputs(&problem, DType::F32);
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        ts.attend(&batch, pool.view(), Inputs::new(&problem).q.view(), Over::All, output).unwrap();
        let d = config.heads.head_dim;
        common::assert_close("out", &values(&selected.out), &values(&out), d, tolerance(DType::F32, 16));
        common::assert_lse("lse", &values(&selected.lse), &values(&lse), tolerance(DType::F32, 16));
    });
}

/// Dense attention block by block through an owned cache is dense attention over the whole.
fn dense_blocks_equal_one_block(device: &Device) {
    let rope = Rope::default();
    for config in [small_config(), SelectConfig { positions: Positions::Reassigned(rope), ..small_config() }]
    {
        let whole = Problem::new(&config, &[(90, 90)], Content::Peaked, 5);
        let naive_config = naive_config(&config);
        let mut cache = PagedKvCache::new(device, &config, &CacheConfig::default()).unwrap();
        let id = cache.create().unwrap();
        let mut ts = TokenSelect::new(device, config.clone(), Limits::default()).unwrap();
        let mut n = 0;
        for t in [1, 40, 0, 16, 32, 1] {
            n += t;
            let rows = vec![prefix(&whole.rows[0], n, t, &config)];
            let problem = Problem { config: config.clone(), rows };
            let batch = cache.extend(&[(id, t)]).unwrap();
            let (mut out, mut lse) = outputs(&problem, DType::F32);
            let inputs = Inputs::new(&problem);
            let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
            ts.step_dense(&mut cache, 0, &batch, inputs.step(), output).unwrap();
            let (row, all) = (&problem.rows[0], naive::ranked(&(0..n).collect::<Vec<_>>()));
            let (want, want_lse) = naive::attend(&naive_config, &row.q, &row.k, &row.v, &all, n);
            let allowed = attention_tolerance(DType::F32, &naive_config, &row.q, &row.k, n);
            common::assert_close("out", &values(&out), &want, 16, allowed);
            common::assert_lse("lse", &values(&lse), &want_lse, allowed);
        }
        assert_eq!(cache.selection_stats().unwrap().scored, 0, "dense steps select nothing");
    }
}

/// The same bits from run to run and for every number of threads.
fn results_do_not_depend_on_threads_or_chance(device: &Device) {
    let heads = HeadShape { num_qo_heads: 14, num_kv_heads: 2, head_dim: 24 };
    let positions = Positions::Reassigned(Rope::default());
    let config = SelectConfig {
        heads,
        dtype: DType::Bf16,
        n_local: 40,
        top_k: 1000,
        vote_pool_window: 3,
        positions,
        ..small_config()
    };
    let lengths = [(9000, 1), (2500, 3), (1300, 70), (40, 0)];
    let problem = Problem::new(&config, &lengths, Content::Peaked, 77);
    let pool = Pool::full(&problem, 16, Storage::Nhd, 1);
    let batch = pool.batch(&problem);
    let run = || {
        let mut ts = token_select(device, &problem, &batch);
        let outcome = select_and_attend(&mut ts, &problem, &batch, pool.view(), None);
        let dense = {
            let (mut out, mut lse) = outputs(&problem, DType::F32);
            let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
            ts.attend(&batch, pool.view(), Inputs::new(&problem).q.view(), Over::All, output).unwrap();
            [bits(&out), bits(&lse)]
        };
        let workspace = ts.workspace();
        let between = [
            workspace.buffer(Buffer::Queries),
            workspace.buffer(Buffer::Stats),
            workspace.buffer(Buffer::Votes),
        ]
        .map(bits);
        (outcome.selected, bits(&outcome.out), bits(&outcome.lse), dense, between)
    };
    let first = run();
    assert!(first == run(), "{}: from run to run", device.name());
    for threads in [1, 2, 3, 8] {
        let threads_pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert!(first == threads_pool.install(run), "{}: {threads} threads", device.name());
    }
}

/// Tensor parallel: two ranks hold half of the heads each, and sum their votes before `top_k`.
fn tensor_parallel(device: &Device, problem: &Problem, split: usize, seed: u64) -> Outcome {
    let HeadShape { num_qo_heads, num_kv_heads, head_dim } = problem.config.heads;
    let halves = [some_heads(problem, 0, split), some_heads(problem, split, num_kv_heads)];
    let pools = halves.each_ref().map(|half| Pool::full(half, 16, Storage::Nhd, seed));
    let batches = [pools[0].batch(&halves[0]), pools[1].batch(&halves[1])];
    let mut ranks = [0, 1].map(|i| token_select(device, &halves[i], &batches[i]));
    for i in 0..2 {
        ranks[i].pool(&batches[i], Inputs::new(&halves[i]).q.view(), None).unwrap();
        ranks[i].score(&batches[i], pools[i].view()).unwrap();
        ranks[i].vote(&batches[i]).unwrap();
    }
    let votes = ranks
        .each_ref()
        .map(|rank| rank.workspace().buffer(Buffer::Votes).as_slice::<f32>().unwrap().to_vec());
    let sum: Vec<f32> = votes[0].iter().zip(&votes[1]).map(|(a, b)| a + b).collect();
    let mut parts = Vec::new();
    for i in 0..2 {
        ranks[i].buffer_mut(Buffer::Votes).into_slice::<f32>().unwrap().copy_from_slice(&sum);
        ranks[i].top_k(&batches[i], None).unwrap();
        let (mut out, mut lse) = outputs(&halves[i], DType::F32);
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        ranks[i]
            .attend(&batches[i], pools[i].view(), Inputs::new(&halves[i]).q.view(), Over::Selected, output)
            .unwrap();
        parts.push((selected_lists(&ranks[i], problem.rows.len()), values(&out), values(&lse)));
    }
    assert_eq!(parts[0].0, parts[1].0, "both ranks choose the same");
    let group = num_qo_heads / num_kv_heads;
    let widths = [split * group, (num_kv_heads - split) * group];
    let join = |a: &[f64], b: &[f64], unit: usize| -> Vec<f64> {
        let chunks = a.chunks(widths[0] * unit).zip(b.chunks(widths[1] * unit));
        chunks.flat_map(|(a, b)| a.iter().chain(b).copied()).collect()
    };
    let tokens = problem.num_query_tokens();
    let out = join(&parts[0].1, &parts[1].1, head_dim);
    let lse = join(&parts[0].2, &parts[1].2, 1);
    Outcome {
        selected: parts.swap_remove(0).0,
        out: tensor(DType::F32, &out, [tokens, num_qo_heads, head_dim]),
        lse: tensor(DType::F32, &lse, [tokens, num_qo_heads]),
    }
}

/// The tokens `[from, to)` of every row, as one rank of sequence parallelism holds them.
fn some_tokens(problem: &Problem, cuts: &[(usize, usize)]) -> Problem {
    let width = problem.config.heads.num_kv_heads * problem.config.heads.head_dim;
    let rows = problem.rows.iter().zip(cuts).map(|(row, &(from, to))| Row {
        n: to - from,
        t: row.t,
        q: row.q.clone(),
        k: row.k[from * width..to * width].to_vec(),
        v: row.v[from * width..to * width].to_vec(),
    });
    Problem { config: problem.config.clone(), rows: rows.collect() }
}

/// One rank of sequence parallelism.
struct Rank {
    ts: TokenSelect,
    part: Problem,
    pool: Pool,
    batch: Batch,
    /// First token of each row that this rank holds.
    from: Vec<usize>,
}

/// Sequence parallel: rank `i` holds the tokens `[cuts[i], cuts[i + 1])` of every row.
fn sequence_parallel(device: &Device, problem: &Problem, cuts: &[Vec<usize>], seed: u64) -> Outcome {
    let config = naive_config(&problem.config);
    let (hq, num_rows) = (config.hq, problem.rows.len());
    let windows: Vec<_> = problem.rows.iter().map(|row| naive::candidates(&config, row.n, row.t)).collect();
    let mut ranks: Vec<Rank> = cuts
        .windows(2)
        .map(|cut| {
            let spans: Vec<(usize, usize)> = cut[0].iter().copied().zip(cut[1].iter().copied()).collect();
            let part = some_tokens(problem, &spans);
            let pool = Pool::full(&part, 16, Storage::Hnd, seed);
            let candidates = windows.iter().zip(&spans).map(|(window, &(from, to))| {
                let start = window.start.clamp(from, to) - from;
                start as u32..(window.end.clamp(from, to) - from).max(start) as u32
            });
            let candidates = candidates.collect();
            let batch = Batch::partial(16, problem.qo_indptr(), pool.tables.clone(), candidates).unwrap();
            // The length of the whole list counts for positions, and a part may hold more than the windows.
            let longest = problem.rows.iter().map(|row| row.n).sum::<usize>();
            let limits = Limits { max_kv_tokens: longest + 16 * num_rows, ..limits(&batch) };
            let ts = TokenSelect::new(device, problem.config.clone(), limits).unwrap();
            Rank { ts, part, pool, batch, from: cut[0].clone() }
        })
        .collect();

    for rank in &mut ranks {
        rank.ts.pool(&rank.batch, queries(&rank.part).view(), None).unwrap();
        rank.ts.score(&rank.batch, rank.pool.view()).unwrap();
    }
    all_reduce_stats(&mut ranks, hq, num_rows);
    let mut chosen: Vec<Vec<(f64, usize)>> = vec![Vec::new(); num_rows];
    for rank in &mut ranks {
        rank.ts.vote(&rank.batch).unwrap();
        rank.ts.top_k(&rank.batch, None).unwrap();
        let (votes, top_k) = (
            values(rank.ts.workspace().buffer(Buffer::Votes)),
            values(rank.ts.workspace().buffer(Buffer::TopK)),
        );
        let actions = rank.ts.workspace().actions().unwrap();
        for r in (0..num_rows).filter(|&r| actions[r] == RowAction::Score) {
            let count = rank.batch.row(r).unwrap().candidates(&problem.config).len().min(config.top_k);
            for &token in &top_k[r * config.top_k..][..count] {
                let vote = votes[rank.batch.row(r).unwrap().token_base + token as usize];
                chosen[r].push((vote, rank.from[r] + token as usize));
            }
        }
    }
    let selected: Vec<Vec<usize>> = (0..num_rows)
        .map(|r| {
            let row = &problem.rows[r];
            if row.t == 0 {
                return Vec::new();
            }
            let of_ranks = &mut chosen[r];
            of_ranks.sort_by_key(|&(_, token)| token);
            let votes: Vec<f64> = of_ranks.iter().map(|&(vote, _)| vote).collect();
            let best: Vec<usize> =
                naive::largest(&votes, config.top_k).into_iter().map(|i| of_ranks[i].1).collect();
            naive::selected_list(&config, row.n, row.t, &best)
        })
        .collect();
    attend_in_parts(problem, &ranks, selected)
}

/// Every rank's maximum and sum become those over all ranks; ranks without candidates have none.
fn all_reduce_stats(ranks: &mut [Rank], hq: usize, num_rows: usize) {
    for place in (0..num_rows * hq).map(|i| i * 2) {
        let row = place / (2 * hq);
        let scored: Vec<usize> = (0..ranks.len())
            .filter(|&i| ranks[i].ts.workspace().actions().unwrap()[row] == RowAction::Score)
            .collect();
        let stat = |i: usize| {
            let stats = ranks[i].ts.workspace().buffer(Buffer::Stats).as_slice::<f32>().unwrap();
            (stats[place], stats[place + 1])
        };
        let max = scored.iter().map(|&i| stat(i).0).fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = scored.iter().map(|&i| stat(i)).map(|(m, sum)| sum * (m - max).exp()).sum();
        for &i in &scored {
            let stats = ranks[i].ts.buffer_mut(Buffer::Stats).into_slice::<f32>().unwrap();
            (stats[place], stats[place + 1]) = (max, sum);
        }
    }
}

/// Every rank attends to the tokens of the lists that it holds; the outputs are merged.
fn attend_in_parts(problem: &Problem, ranks: &[Rank], selected: Vec<Vec<usize>>) -> Outcome {
    let heads = problem.config.heads;
    let num_rows = problem.rows.len();
    let width = selected.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let totals: Vec<f64> = selected.iter().map(|list| list.len() as f64).collect();
    let total_len = tensor(DType::U32, &totals, [num_rows]);
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for rank in ranks {
        let (mut tokens, mut places) = (vec![0.0; num_rows * width], vec![0.0; num_rows * width]);
        let mut lens = vec![0.0; num_rows];
        for (r, list) in selected.iter().enumerate() {
            let held = rank.from[r]..rank.from[r] + rank.part.rows[r].n;
            let mine = list.iter().enumerate().filter(|(_, token)| held.contains(token));
            for (i, (place, token)) in mine.enumerate() {
                tokens[r * width + i] = (token - rank.from[r]) as f64;
                places[r * width + i] = place as f64;
                lens[r] += 1.0;
            }
        }
        let tokens = tensor(DType::U32, &tokens, [num_rows, width]);
        let places = tensor(DType::U32, &places, [num_rows, width]);
        let len = tensor(DType::U32, &lens, [num_rows]);
        let selection = Selection {
            tokens: tokens.view(),
            len: len.view(),
            ranks: Some(Ranks { ranks: places.view(), total_len: total_len.view() }),
        };
        let (mut out, mut lse) = outputs(&rank.part, DType::F32);
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        let q = queries(&rank.part);
        rank.ts.attend(&rank.batch, rank.pool.view(), q.view(), Over::Lists(&selection), output).unwrap();
        outs.extend(values(&out));
        lses.extend(values(&lse));
    }
    let tokens = problem.num_query_tokens();
    let outs = tensor(DType::F32, &outs, [ranks.len(), tokens, heads.num_qo_heads, heads.head_dim]);
    let lses = tensor(DType::F32, &lses, [ranks.len(), tokens, heads.num_qo_heads]);
    let (mut out, mut lse) = outputs(problem, DType::F32);
    let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
    ranks[0].ts.merge(outs.view(), lses.view(), output).unwrap();
    Outcome { selected, out, lse }
}

fn tensor_parallel_equals_one_device(device: &Device) {
    proptest!(cases(48), |(
        config in problem::config(512).prop_filter("two KV heads", |config| config.heads.num_kv_heads > 1),
        lengths in problem::lengths(150),
        content in prop::sample::select(vec![Content::Peaked, Content::Tied]),
        split in 1usize..4,
        seed in any::<u64>(),
    )| {
        let split = split.min(config.heads.num_kv_heads - 1);
        let config = SelectConfig { vote_pool_window: 1, ..config };
        let problem = Problem::new(&config, &lengths, content, seed);
        assert_outcome("two ranks", &problem, &tensor_parallel(device, &problem, split, seed));
    });
}

fn tensor_parallel_with_max_pool(device: &Device) {
    proptest!(cases(48), |(
        config in problem::config(512).prop_filter("two KV heads", |config| config.heads.num_kv_heads > 1),
        lengths in problem::lengths(150),
        seed in any::<u64>(),
    )| {
        let config = SelectConfig { vote_pool_window: 3, ..config };
        let problem = Problem::new(&config, &lengths, Content::Peaked, seed);
        assert_outcome("two ranks", &problem, &tensor_parallel(device, &problem, 1, seed));
    });
}

fn sequence_parallel_equals_one_device(device: &Device) {
    proptest!(cases(48), |(
        config in problem::config(512),
        lengths in problem::lengths(150),
        content in prop::sample::select(vec![Content::Peaked, Content::Tied]),
        num_ranks in 2usize..4,
        seed in any::<u64>(),
    )| {
        // A max-pool would have to look across the cuts.
        let config = SelectConfig { vote_pool_window: 1, ..config };
        let problem = Problem::new(&config, &lengths, content, seed);
        let mut random = common::Random(seed);
        let mut cuts = vec![vec![0; lengths.len()]];
        for _ in 1..num_ranks {
            let last = cuts.last().unwrap();
            cuts.push(last.iter().zip(&lengths).map(|(&cut, &(n, _))| cut + random.below(n - cut + 1)).collect());
        }
        cuts.push(lengths.iter().map(|&(n, _)| n).collect());
        assert_outcome("ranks", &problem, &sequence_parallel(device, &problem, &cuts, seed));
    });
}
