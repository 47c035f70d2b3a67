//! The Selection Cache: when a selection serves again, and that forks, rollbacks and new sequences never
//! bring up tokens that are not theirs.

mod common;

use common::paged::{Pool, Storage, limits};
use common::problem::{Content, Problem, Row, cached, small_config};
use common::run::{Inputs, outputs, select_and_attend, selected_lists};
use common::{Random, cases, naive, naive_config, on_devices, tensor, values};
use proptest::prelude::*;
use tokenselect::{
    Batch, CacheConfig, DType, Device, Limits, Over, PagedKvCache, RowAction, SelectConfig, SelectionCache,
    SelectionStats, SequenceId, StepOutput, TokenSelect,
};

on_devices! {
    cpu:
        a_selection_serves_max_reuse_times, slow_drift_is_noticed,
        windows_are_current_when_a_selection_is_reused, nan_queries_are_never_similar,
        a_rollback_forgets_exactly_what_it_must, forks_inherit_and_part_ways,
        a_new_sequence_in_an_old_place_starts_afresh, short_sequences_are_complete_and_cache_nothing,
        rolled_back_tokens_are_never_selected, stands_alone_for_other_engines, rows_may_change_places,
        parts_of_sequences_are_not_cached, off_means_off, a_reused_selection_attends_like_the_same_list;
}

/// An owned cache with one layer, and the means to decode in it.
struct Decoder {
    cache: PagedKvCache,
    ts: TokenSelect,
    random: Random,
}

/// What one decode step did.
struct Step {
    action: RowAction,
    selected: Vec<usize>,
}

impl Decoder {
    fn new(device: &Device, config: &SelectConfig) -> Self {
        let cache_config =
            CacheConfig { num_pages: 512, page_size: 4, max_sequences: 4, ..Default::default() };
        let limits = Limits { max_rows: 1, max_block_len: 128, max_kv_tokens: 2048 };
        Decoder {
            cache: PagedKvCache::new(device, config, &cache_config).unwrap(),
            ts: TokenSelect::new(device, config.clone(), limits).unwrap(),
            random: Random(5),
        }
    }

    /// A sequence of `len` random tokens that were appended but never attended to.
    fn filled(&mut self, len: usize) -> SequenceId {
        let id = self.cache.create().unwrap();
        self.fill(id, len);
        id
    }

    fn fill(&mut self, id: SequenceId, len: usize) {
        let (k, v) = (self.keys(len), self.keys(len));
        common::paged::append(&self.ts, &mut self.cache, id, len, &k, &v);
    }

    fn keys(&mut self, len: usize) -> tokenselect::Tensor {
        let heads = self.ts.config().heads;
        let len_flat = len * heads.num_kv_heads * heads.head_dim;
        let data: Vec<f64> = (0..len_flat).map(|_| self.random.normal()).collect();
        tensor(DType::F32, &data, [len, heads.num_kv_heads, heads.head_dim])
    }

    /// Decodes one token whose queries all equal `query`.
    fn decode(&mut self, id: SequenceId, query: &[f64]) -> Step {
        let (k, v) = (self.keys(1), self.keys(1));
        let batch = self.cache.extend(&[(id, 1)]).unwrap();
        let heads = self.ts.config().heads;
        let shape = [1, heads.num_qo_heads, heads.head_dim];
        let q = tensor(DType::F32, query, shape);
        let mut out = tensor(DType::F32, &vec![0.0; query.len()], shape);
        let input = tokenselect::StepInput { q: q.view(), k: k.view(), v: v.view() };
        let output = StepOutput { out: out.view_mut(), lse: None };
        self.ts.step(&mut self.cache, 0, &batch, input, output).unwrap();
        let action = self.ts.workspace().actions().unwrap()[0];
        Step { action, selected: selected_lists(&self.ts, 1).remove(0) }
    }

    fn query(&mut self) -> Vec<f64> {
        let heads = self.ts.config().heads;
        (0..heads.num_qo_heads * heads.head_dim).map(|_| f64::from(self.random.normal() as f32)).collect()
    }

    fn stats(&self) -> SelectionStats {
        self.cache.selection_stats().unwrap()
    }
}

/// Chosen tokens of a step: neither initial nor local.
fn chosen(config: &SelectConfig, step: &Step, n: usize) -> Vec<usize> {
    let range = naive::candidates(&naive_config(config), n, 1);
    step.selected.iter().copied().filter(|token| range.contains(token)).collect()
}

fn a_selection_serves_max_reuse_times(device: &Device) {
    for max_reuse in [0u32, 1, 2, 5] {
        let mut decoder = Decoder::new(device, &cached(small_config(), 0.9, Some(max_reuse)));
        let id = decoder.filled(40);
        let query = decoder.query();
        for step in 0..20 {
            let turn = step % (max_reuse + 1);
            let want = if turn == 0 { RowAction::Score } else { RowAction::Reuse };
            assert_eq!(decoder.decode(id, &query).action, want, "max_reuse {max_reuse}, step {step}");
        }
        let scored = 20u64.div_ceil(u64::from(max_reuse) + 1);
        assert_eq!(decoder.stats(), SelectionStats { reused: 20 - scored, scored, complete: 0 });
    }
}

/// Queries that turn by little are compared with the one that was scored, not with the last one.
fn slow_drift_is_noticed(device: &Device) {
    let config = cached(small_config(), 0.9, Some(1000));
    let mut decoder = Decoder::new(device, &config);
    let id = decoder.filled(40);
    let turned = |step: usize| {
        let mut query = vec![0.0; 64];
        (query[1], query[0]) = (step as f64 * 0.1).sin_cos(); // cos(0.1) = 0.995, cos(0.5) = 0.88
        query
    };
    let reused: Vec<bool> =
        (0..11).map(|step| decoder.decode(id, &turned(step)).action == RowAction::Reuse).collect();
    let again = [false, true, true, true, true];
    assert_eq!(reused, [&again[..], &again[..], &[false][..]].concat());
}

fn windows_are_current_when_a_selection_is_reused(device: &Device) {
    let config = cached(small_config(), -1.0, Some(1000));
    let mut decoder = Decoder::new(device, &config);
    let id = decoder.filled(40);
    let query = decoder.query();
    let first = decoder.decode(id, &query);
    let kept = chosen(&config, &first, 41);
    assert_eq!(kept.len(), 5);
    for n in 42..70 {
        let step = decoder.decode(id, &query);
        assert_eq!(step.action, RowAction::Reuse);
        let want: Vec<usize> = (0..3).chain(kept.iter().copied()).chain(n - 5..n).collect();
        assert_eq!(step.selected, want, "n = {n}");
    }
}

fn nan_queries_are_never_similar(device: &Device) {
    let mut decoder = Decoder::new(device, &cached(small_config(), -1.0, Some(1000)));
    let id = decoder.filled(40);
    let mut query = decoder.query();
    query[7] = f64::NAN;
    assert_eq!(decoder.decode(id, &query).action, RowAction::Score);
    assert_eq!(decoder.decode(id, &query).action, RowAction::Score, "NaN was cached");
    let number = decoder.query();
    assert_eq!(decoder.decode(id, &number).action, RowAction::Score, "NaN is still cached");
    assert_eq!(decoder.decode(id, &number).action, RowAction::Reuse);
}

fn a_rollback_forgets_exactly_what_it_must(device: &Device) {
    let config = cached(small_config(), -1.0, Some(1000));
    // The selection is made with 40 tokens before the block; it stays valid down to 40 tokens.
    for (to, want) in
        [(44, RowAction::Reuse), (41, RowAction::Reuse), (40, RowAction::Reuse), (39, RowAction::Score)]
    {
        let mut decoder = Decoder::new(device, &config);
        let id = decoder.filled(40);
        let query = decoder.query();
        assert_eq!(decoder.decode(id, &query).action, RowAction::Score);
        (0..3).for_each(|_| assert_eq!(decoder.decode(id, &query).action, RowAction::Reuse));
        decoder.cache.truncate(id, to).unwrap();
        assert_eq!(decoder.decode(id, &query).action, want, "after a rollback to {to}");
    }
    // Growing back by other tokens does not bring a forgotten selection back.
    for to in [20, 38, 39] {
        let mut decoder = Decoder::new(device, &config);
        let id = decoder.filled(40);
        let query = decoder.query();
        decoder.decode(id, &query);
        decoder.cache.truncate(id, to).unwrap();
        decoder.fill(id, 41 - to);
        assert_eq!(decoder.decode(id, &query).action, RowAction::Score, "after a rollback to {to}");
    }
}

fn forks_inherit_and_part_ways(device: &Device) {
    let config = cached(small_config(), -1.0, Some(3));
    let mut decoder = Decoder::new(device, &config);
    let parent = decoder.filled(40);
    let query = decoder.query();
    let kept = chosen(&config, &decoder.decode(parent, &query), 41);
    assert_eq!(decoder.decode(parent, &query).action, RowAction::Reuse);
    let child = decoder.cache.fork(parent).unwrap();
    // The child goes on where the parent stood, with two of three reuses left.
    for n in [43, 44] {
        let step = decoder.decode(child, &query);
        assert_eq!((step.action, chosen(&config, &step, n)), (RowAction::Reuse, kept.clone()));
    }
    assert_eq!(decoder.decode(child, &query).action, RowAction::Score);
    // The parent has not noticed.
    let step = decoder.decode(parent, &query);
    assert_eq!((step.action, chosen(&config, &step, 43)), (RowAction::Reuse, kept.clone()));
    // A rollback of the parent leaves the child's selection alone, and the other way round.
    decoder.cache.truncate(parent, 10).unwrap();
    assert_eq!(decoder.decode(child, &query).action, RowAction::Reuse);
}

fn a_new_sequence_in_an_old_place_starts_afresh(device: &Device) {
    let config = cached(small_config(), -1.0, Some(1000));
    let mut decoder = Decoder::new(device, &config);
    let old = decoder.filled(40);
    let query = decoder.query();
    decoder.decode(old, &query);
    decoder.cache.free(old).unwrap();
    let new = decoder.filled(60);
    assert_eq!(new.index(), old.index(), "the place is used again");
    assert_eq!(decoder.decode(new, &query).action, RowAction::Score);
}

fn short_sequences_are_complete_and_cache_nothing(device: &Device) {
    // n_init 3, n_local 4, top_k 5: up to 13 tokens with the block everything is selected.
    let mut decoder = Decoder::new(device, &cached(small_config(), -1.0, Some(1000)));
    let id = decoder.filled(10);
    let query = decoder.query();
    let actions: Vec<RowAction> = (0..5).map(|_| decoder.decode(id, &query).action).collect();
    use RowAction::{Complete, Reuse, Score};
    assert_eq!(actions, [Complete, Complete, Complete, Score, Reuse]);
    assert_eq!(decoder.stats(), SelectionStats { reused: 1, scored: 1, complete: 3 });
}

/// What a token was when it was written: its step, so that a token written anew at an old place differs.
type Written = Vec<usize>;

/// However a sequence grows and rolls back, every chosen token of a reused selection is the very token
/// that was chosen, not another one written at its place since.
fn rolled_back_tokens_are_never_selected(device: &Device) {
    proptest!(cases(64), |(
        n_local in 0usize..6,
        moves in prop::collection::vec((0usize..6, prop_oneof![1usize..3, 1usize..30]), 1..40),
    )| {
        let config = SelectConfig { n_local, ..cached(small_config(), -1.0, Some(1000)) };
        let mut decoder = Decoder::new(device, &config);
        let id = decoder.filled(30);
        let query = decoder.query();
        let mut written: Written = vec![0; 30];
        let mut kept: Vec<(usize, usize)> = Vec::new();
        for (now, &(kind, by)) in (1..).zip(&moves) {
            if kind == 0 {
                let len = written.len().saturating_sub(by);
                decoder.cache.truncate(id, len).unwrap();
                written.truncate(len);
                continue;
            }
            if kind == 1 {
                // Tokens that are never attended to, such as a prefix of which the dense path made use.
                decoder.fill(id, by);
                written.extend(vec![now; by]);
                continue;
            }
            written.push(now);
            let n = written.len();
            let step = decoder.decode(id, &query);
            prop_assert!(step.selected.iter().all(|&token| token < n), "a token that is no more");
            let tokens: Vec<(usize, usize)> =
                chosen(&config, &step, n).into_iter().map(|token| (token, written[token])).collect();
            match step.action {
                RowAction::Score => kept = tokens,
                RowAction::Reuse => prop_assert_eq!(&tokens, &kept, "other tokens than were chosen"),
                _ => {}
            }
        }
    });
}

/// Two sequences in another engine's memory, with a Selection Cache that stands alone.
fn borrowed() -> (Problem, Pool) {
    let config = cached(small_config(), 0.9, Some(1000));
    let problem = Problem::new(&config, &[(60, 1), (50, 1)], Content::Peaked, 11);
    let pool = Pool::full(&problem, 16, Storage::Hnd, 4);
    (problem, pool)
}

fn stands_alone_for_other_engines(device: &Device) {
    let (problem, pool) = borrowed();
    let plain = pool.batch(&problem);
    let mut ts = TokenSelect::new(device, problem.config.clone(), limits(&plain)).unwrap();
    let mut cache = SelectionCache::new(&Device::cpu(), &problem.config, 3, 9).unwrap();
    let mut run = |cache: &mut SelectionCache, layer: usize, indices: [u32; 2]| {
        let batch = plain.clone().with_sequence_indices(indices.to_vec()).unwrap();
        select_and_attend(&mut ts, &problem, &batch, pool.view(), Some(cache.layer_mut(layer).unwrap()));
        ts.workspace().actions().unwrap()
    };
    use RowAction::{Reuse, Score};
    assert_eq!(run(&mut cache, 1, [8, 3]), [Score, Score]);
    assert_eq!(run(&mut cache, 1, [8, 3]), [Reuse, Reuse]);
    assert_eq!(run(&mut cache, 1, [8, 4]), [Reuse, Score], "sequences are apart");
    assert_eq!(run(&mut cache, 2, [8, 3]), [Score, Score], "layers are apart");
    assert_eq!(cache.layer_stats(0).unwrap(), SelectionStats::default());
    assert_eq!(cache.layer_stats(1).unwrap(), SelectionStats { reused: 3, scored: 3, complete: 0 });
    assert_eq!(cache.stats().unwrap(), SelectionStats { reused: 3, scored: 5, complete: 0 });

    cache.clear(8).unwrap();
    assert_eq!(run(&mut cache, 1, [8, 3]), [Score, Reuse], "forgotten");
    assert_eq!(run(&mut cache, 2, [8, 3]), [Score, Reuse], "in all layers");
    cache.fork(3, 5).unwrap();
    assert_eq!(run(&mut cache, 1, [8, 5]), [Reuse, Reuse]);
    assert_eq!(run(&mut cache, 2, [8, 5]), [Reuse, Reuse]);
    // Row 0 has 59 tokens before its block.
    cache.truncate(8, 59).unwrap();
    assert_eq!(run(&mut cache, 1, [8, 5]), [Reuse, Reuse]);
    cache.truncate(8, 58).unwrap();
    assert_eq!(run(&mut cache, 1, [8, 5]), [Score, Reuse]);
    assert_eq!(run(&mut cache, 2, [8, 5]), [Score, Reuse]);
    cache.reset_stats().unwrap();
    assert_eq!(cache.stats().unwrap(), SelectionStats::default());
    assert_eq!(run(&mut cache, 2, [8, 5]), [Reuse, Reuse], "counters alone were reset");
}

/// Rows may change places from step to step: the index names the sequence.
fn rows_may_change_places(device: &Device) {
    let (problem, pool) = borrowed();
    let swapped = Problem {
        config: problem.config.clone(),
        rows: problem.rows.iter().rev().cloned().collect::<Vec<Row>>(),
    };
    let other = Pool::full(&swapped, 16, Storage::Nhd, 9);
    let batch = pool.batch(&problem).with_sequence_indices(vec![0, 1]).unwrap();
    let turned = other.batch(&swapped).with_sequence_indices(vec![1, 0]).unwrap();
    let mut ts = TokenSelect::new(device, problem.config.clone(), limits(&turned)).unwrap();
    let mut cache = SelectionCache::new(&Device::cpu(), &problem.config, 1, 2).unwrap();
    let first = select_and_attend(&mut ts, &problem, &batch, pool.view(), Some(cache.layer_mut(0).unwrap()));
    let second =
        select_and_attend(&mut ts, &swapped, &turned, other.view(), Some(cache.layer_mut(0).unwrap()));
    assert_eq!(ts.workspace().actions().unwrap(), [RowAction::Reuse; 2]);
    assert_eq!(first.selected.iter().rev().collect::<Vec<_>>(), second.selected.iter().collect::<Vec<_>>());
    let width = 4 * 16;
    let (a, b) = (values(&first.out), values(&second.out));
    common::assert_close("row 0", &a[..width], &b[width..], 16, 1e-6);
}

/// A rank that holds a part of a sequence knows neither the whole choice nor what may be dropped from it: it does not cache.
fn parts_of_sequences_are_not_cached(device: &Device) {
    let (problem, pool) = borrowed();
    let candidates = vec![3..55, 3..45];
    let part = Batch::partial(pool.shape.page_size, problem.qo_indptr(), pool.tables.clone(), candidates);
    let part = part.unwrap().with_sequence_indices(vec![0, 1]).unwrap();
    let mut ts = TokenSelect::new(device, problem.config.clone(), limits(&part)).unwrap();
    let mut cache = SelectionCache::new(device, &problem.config, 1, 2).unwrap();
    let q = Inputs::new(&problem).q;
    for _ in 0..2 {
        ts.select(&part, pool.view(), q.view(), Some(cache.layer_mut(0).unwrap())).unwrap();
        assert_eq!(ts.workspace().actions().unwrap(), [RowAction::Score; 2]);
    }
    assert_eq!(cache.stats().unwrap(), SelectionStats::default());
}

/// A configuration without Selection Cache does not touch one that is passed.
fn off_means_off(device: &Device) {
    let (problem, pool) = borrowed();
    let off = SelectConfig { selection_cache: None, ..problem.config.clone() };
    let batch = pool.batch(&problem).with_sequence_indices(vec![0, 1]).unwrap();
    let mut ts = TokenSelect::new(device, off.clone(), limits(&batch)).unwrap();
    let mut cache = SelectionCache::new(&Device::cpu(), &problem.config, 1, 2).unwrap();
    for _ in 0..2 {
        let layer = cache.layer_mut(0).unwrap();
        select_and_attend(&mut ts, &problem, &batch, pool.view(), Some(layer));
        assert_eq!(ts.workspace().actions().unwrap(), [RowAction::Score; 2]);
    }
    assert_eq!(cache.stats().unwrap(), SelectionStats::default());
    // A cache that was made without one has none.
    let owned = PagedKvCache::new(device, &off, &CacheConfig::default()).unwrap();
    assert!(owned.selections().is_none());
}

/// Reused selections attend like fresh ones: the operations after `pool` are not special.
fn a_reused_selection_attends_like_the_same_list(device: &Device) {
    let (problem, pool) = borrowed();
    let batch = pool.batch(&problem).with_sequence_indices(vec![0, 1]).unwrap();
    let mut ts = TokenSelect::new(device, problem.config.clone(), limits(&batch)).unwrap();
    let mut cache = SelectionCache::new(&Device::cpu(), &problem.config, 1, 2).unwrap();
    let fresh = select_and_attend(&mut ts, &problem, &batch, pool.view(), Some(cache.layer_mut(0).unwrap()));
    let reused = select_and_attend(&mut ts, &problem, &batch, pool.view(), Some(cache.layer_mut(0).unwrap()));
    assert_eq!(ts.workspace().actions().unwrap(), [RowAction::Reuse; 2]);
    assert_eq!(fresh.selected, reused.selected);
    assert_eq!(values(&fresh.out), values(&reused.out));
    let (mut out, _) = outputs(&problem, DType::F32);
    let q = Inputs::new(&problem).q;
    ts.attend(&batch, pool.view(), q.view(), Over::Selected, StepOutput { out: out.view_mut(), lse: None })
        .unwrap();
    assert_eq!(values(&fresh.out), values(&out));
}
