//! Two configurations with different windows over one Selection Cache, as the paper's settings for prefill and for decoding
//! are: a cached selection is used again only where all its tokens are candidates of the row as it is now.

mod common;

use common::problem::{Row, cached, small_config};
use common::run::{assert_selected, selected_lists};
use common::{Random, cases, naive, naive_config, on_devices, round, tensor, to_device};
use proptest::prelude::*;
use tokenselect::{
    CacheConfig, DType, Device, HeadShape, Limits, PagedKvCache, RowAction, SelectConfig, SequenceId,
    StepInput, StepOutput, TokenSelect,
};

on_devices! {
    all: take_turns, windows_that_overlap_the_cached_selection;
}

/// One sequence of one layer, configurations that take turns, and what the definitions say the cache holds.
struct Reader {
    cache: PagedKvCache,
    id: SequenceId,
    configs: Vec<TokenSelect>,
    model: Option<naive::Cached>,
    k: Vec<f64>,
    random: Random,
}

impl Reader {
    fn new(device: &Device, windows: &[(usize, usize)], max_reuse: u32, seed: u64) -> Self {
        let config = |&(n_init, n_local): &(usize, usize)| {
            let heads = HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim: 64 };
            let base = SelectConfig { heads, dtype: DType::F16, n_init, n_local, ..small_config() };
            cached(base, 0.5, Some(max_reuse))
        };
        let limits = Limits { max_rows: 1, max_block_len: 16, max_kv_tokens: 1024 };
        let make = |window| TokenSelect::new(device, config(window), limits).unwrap();
        let cache_config =
            CacheConfig { num_pages: 128, page_size: 4, max_sequences: 2, ..Default::default() };
        let mut cache = PagedKvCache::new(device, &config(&windows[0]), &cache_config).unwrap();
        let id = cache.create().unwrap();
        let configs = windows.iter().map(make).collect();
        Reader { cache, id, configs, model: None, k: Vec::new(), random: Random(seed) }
    }

    /// One block of `t` tokens by configuration `which`, whose queries resemble those of their `kind` alone. Checks the list,
    /// and says what was done.
    fn step(&mut self, which: usize, t: usize, kind: u64) -> RowAction {
        let ts = &mut self.configs[which];
        let device = ts.device().clone();
        let config = naive_config(ts.config());
        let (width, kv_width) = (config.hq * config.d, config.hkv * config.d);
        let mut common = Random(kind);
        let common: Vec<f64> = (0..width).map(|_| common.normal()).collect();
        let random = &mut self.random;
        let q: Vec<f64> =
            (0..t * width).map(|i| round(DType::F16, common[i % width] + 0.1 * random.normal())).collect();
        let mut numbers =
            || (0..t * kv_width).map(|_| round(DType::F16, random.normal())).collect::<Vec<_>>();
        let (k, v) = (numbers(), numbers());
        self.k.extend(&k);
        let n = self.k.len() / kv_width;

        let batch = self.cache.extend(&[(self.id, t)]).unwrap();
        let put =
            |values: &[f64], heads| to_device(&device, &tensor(DType::F16, values, [t, heads, config.d]));
        let (q_in, k_in, v_in) = (put(&q, config.hq), put(&k, config.hkv), put(&v, config.hkv));
        let mut out = put(&q, config.hq);
        let input = StepInput { q: q_in.view(), k: k_in.view(), v: v_in.view() };
        let output = StepOutput { out: out.view_mut(), lse: None };
        ts.step(&mut self.cache, 0, &batch, input, output).unwrap();
        let action = ts.workspace().actions().unwrap()[0];
        let list = selected_lists(ts, 1).remove(0);

        let what = format!("{}: window {which}, n = {n}, T = {t}", device.name());
        assert!(list.is_sorted_by(|a, b| a < b), "{what}: not ascending, or twice the same: {list:?}");
        let want = naive::select(&config, &q, &self.k, &mut self.model);
        if want.votes.is_some() {
            assert_eq!(action, RowAction::Score, "{what}");
            assert_selected(&what, &config, &Row { n, t, q, k: self.k.clone(), v: Vec::new() }, &list);
            // Votes may be too close to call: the cache holds what the device chose.
            let range = naive::candidates(&config, n, t);
            let model = self.model.as_mut().unwrap();
            model.chosen = list.into_iter().filter(|token| range.contains(token)).collect();
        } else {
            assert_eq!(action, if want.reused { RowAction::Reuse } else { RowAction::Complete }, "{what}");
            assert_eq!(list, want.list, "{what}");
        }
        action
    }
}

fn take_turns(device: &Device) {
    proptest!(cases(24), |(
        windows in prop::collection::vec((0usize..8, prop_oneof![Just(0usize), 1usize..24]), 2..=3),
        steps in prop::collection::vec((0usize..3, 1usize..=8, prop::sample::select(vec![1u64, 1, 1, 2])), 8..40),
        max_reuse in 1u32..9,
        seed in any::<u64>(),
    )| {
        let mut reader = Reader::new(device, &windows, max_reuse, seed);
        for &(which, t, kind) in &steps {
            reader.step(which % windows.len(), t, kind);
        }
    });
}

/// A selection that begins in the initial window, or ends in the local one, of the configuration that would use it.
fn windows_that_overlap_the_cached_selection(device: &Device) {
    // All candidates but a few are chosen: they lie on both edges.
    for (narrow, wide) in [((0, 0), (0, 4)), ((0, 0), (4, 0)), ((1, 2), (3, 9))] {
        let mut reader = Reader::new(device, &[narrow, wide], 100, 3);
        while reader.k.len() < 20 * 2 * 64 {
            reader.step(0, 1, 1);
        }
        for n in 20..60 {
            reader.step(n % 2, 1, 1);
        }
        let again = (0..4).filter(|_| reader.step(1, 1, 1) == RowAction::Reuse).count();
        assert!(again >= 3, "{}: a selection of one's own is used again", device.name());
    }
}
