//! The steps that a life is made of: sequences grow, every layer appends, selects and attends, and all of it is compared with
//! the definitions.

use std::ops::ControlFlow;

use tokenselect::{
    Batch, Buffer, DType, Error, LayerMut, Over, Pieces, RowAction, SelectionStats, SequenceId, StepInput,
    StepOutput, Tensor,
};

use crate::common::problem::Row;
use crate::common::run::{assert_selected, selected_lists};
use crate::common::{
    Random, assert_close, assert_lse, attention_tolerance, gpu_tolerance, naive, naive_config, tensor,
    to_device, values,
};
use crate::{Held, Life, MAX_BLOCK_LEN, NUM_LAYERS};

/// A similarity so close to the threshold may be taken for either side of it.
const CLOSE: f64 = 1e-4;

/// The ways to work through a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Step,
    /// `append_select`, then `attend`.
    AppendSelect,
    /// `append`, `select`, `attend`.
    Apart,
    /// The operations of a selection one by one.
    OneByOne,
    /// `append`, a `select` that is not given the cached selections, `attend`.
    Uncached,
    Dense,
    AppendOnly,
    /// In short blocks, several of which are a piece.
    Prefill,
}

impl Life {
    /// Several sequences grow by blocks of all lengths, nothing among them, and each layer is worked through.
    pub fn work(&mut self) {
        self.any();
        let mut ids: Vec<SequenceId> = self.model.sequences.iter().map(|sequence| sequence.id).collect();
        self.random.shuffle(&mut ids);
        ids.truncate(1 + self.random.below(ids.len()));
        let block = |random: &mut Random| match random.below(10) {
            0 | 1 => 0,
            2 => 2 + random.below(4),
            3 => 1 + random.below(MAX_BLOCK_LEN),
            _ => 1,
        };
        let growth: Vec<_> = ids.iter().map(|&id| (id, block(&mut self.random))).collect();
        let (needed, moved) = self.model.needs(&growth);
        let free = self.model.num_free_pages();
        if needed > free {
            self.fails(
                |life| life.cache.extend(&growth).map(drop),
                |error| *error == Error::OutOfPages { needed, free },
            );
            // The longest makes room.
            let longest = self.model.sequences.iter().max_by_key(|sequence| sequence.len).unwrap();
            let (id, to) = (longest.id, longest.len / 4);
            return self.roll_back(id, to);
        }
        let mut batch = self.extend(&growth, &moved);
        if self.random.below(5) == 0 {
            batch = batch.padded(growth.len() + 1, self.random.below(3)).unwrap();
        }
        let ways = [
            Way::Step,
            Way::Step,
            Way::Step,
            Way::AppendSelect,
            Way::Apart,
            Way::OneByOne,
            Way::Uncached,
            Way::Dense,
            Way::AppendOnly,
            Way::Prefill,
        ];
        let way = ways[self.random.below(ways.len())];
        let block_len = 1 + self.random.below(6);
        let pieces = batch.in_pieces(self.ts.plan().limits(), block_len).unwrap();
        for layer in 0..NUM_LAYERS {
            self.work_on(layer, &batch, &pieces, &growth, way);
        }
        self.held = Some(Held { batch, ids, fresh: true });
    }

    fn work_on(
        &mut self,
        layer: usize,
        batch: &Batch,
        pieces: &Pieces,
        growth: &[(SequenceId, usize)],
        way: Way,
    ) {
        let config = self.model.config.clone();
        let (heads, width) = (config.heads, self.model.width());
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        for &(id, t) in growth {
            let place = self.model.place(id);
            let of = &mut self.model.sequences[place].layers[layer];
            q.extend(of.queries(t, &config, &mut self.random));
            let before = of.k.len();
            of.grow(t, &config, &mut self.random);
            k.extend_from_slice(&of.k[before..]);
            v.extend_from_slice(&of.v[before..]);
        }
        let tokens = batch.num_query_tokens();
        let padded = |data: &mut Vec<f64>, num_heads: usize| {
            data.resize(tokens * num_heads * heads.head_dim, 0.5);
            let shape = [tokens, num_heads, heads.head_dim];
            to_device(self.ts.device(), &tensor(config.dtype, data, shape))
        };
        let unpadded = q.clone();
        let [q, k, v] = [
            padded(&mut q, heads.num_qo_heads),
            padded(&mut k, heads.num_kv_heads),
            padded(&mut v, heads.num_kv_heads),
        ];
        let (mut out, mut lse) = self.outputs(tokens);
        self.run(layer, (batch, pieces), way, [&q, &k, &v], (&mut out, &mut lse));
        if way == Way::AppendOnly {
            return;
        }
        // What adds more than one token without selecting drops what is cached, and so do blocks of any length.
        let kept = match way {
            Way::Dense => 1,
            Way::Prefill => 0,
            _ => usize::MAX,
        };
        for &(id, _) in growth.iter().filter(|&&(_, t)| t > kept) {
            let place = self.model.place(id);
            self.model.sequences[place].layers[layer].cached = None;
        }
        let (out, lse) = (values(&out), values(&lse));
        if way == Way::Prefill {
            return self.check_prefill(layer, pieces, growth, (&q, &unpadded), (&out, &lse));
        }
        let selected = (way != Way::Dense).then(|| self.check_selections(layer, growth, way, &unpadded));
        let (qo_width, hq) = (heads.num_qo_heads * heads.head_dim, heads.num_qo_heads);
        let naive_config = naive_config(&config);
        let mut token = 0;
        for (r, &(id, t)) in growth.iter().enumerate() {
            let of = &self.model.sequences[self.model.place(id)].layers[layer];
            let q = &unpadded[token * qo_width..][..t * qo_width];
            let all = || (0..of.k.len() / width).collect::<Vec<_>>();
            let list = selected.as_ref().map_or_else(all, |lists| lists[r].clone());
            let (want, want_lse) =
                naive::attend(&naive_config, q, &of.k, &of.v, &naive::ranked(&list), list.len());
            let what = format!("{way:?}, layer {layer}, row {r} (n = {}, T = {t})", of.k.len() / width);
            let exact = attention_tolerance(DType::F32, &naive_config, q, &of.k, list.len());
            let on_gpu = !self.ts.device().is_cpu();
            let allowed = if on_gpu { exact.max(gpu_tolerance(config.dtype)) } else { exact };
            assert_close(&what, &out[token * qo_width..][..t * qo_width], &want, heads.head_dim, allowed);
            assert_lse(&what, &lse[token * hq..][..t * hq], &want_lse, allowed);
            token += t;
        }
        assert!(out[token * qo_width..].iter().all(|&x| x == 0.0), "{way:?}: padding attends to nothing");
        assert!(lse[token * hq..].iter().all(|&x| x == f64::NEG_INFINITY), "{way:?}: padding sees nothing");
    }

    /// Compares each block with the definitions: a row that ends with its own last token.
    fn check_prefill(
        &mut self,
        layer: usize,
        pieces: &Pieces,
        growth: &[(SequenceId, usize)],
        (q, queries): (&Tensor, &[f64]),
        (out, lse): (&[f64], &[f64]),
    ) {
        let config = naive_config(&self.model.config);
        let (width, qo_width, hq) = (self.model.width(), config.hq * config.d, config.hq);
        let mut lists = Vec::new();
        for piece in 0..pieces.len() {
            // The workspace has the last piece's alone; selected again, they are the same.
            let (batch, tokens) = (pieces.batch(piece).unwrap(), pieces.tokens(piece).unwrap());
            let q = q.view().tokens(tokens).unwrap();
            self.ts.select(&batch, self.cache.layer(layer).unwrap(), q, None).unwrap();
            lists.extend(selected_lists(&self.ts, batch.num_rows()));
        }
        let (mut lists, mut token) = (lists.into_iter(), 0);
        for (r, &(id, t)) in growth.iter().enumerate() {
            let of = &self.model.sequences[self.model.place(id)].layers[layer];
            let before = of.k.len() / width - t;
            for begin in (0..t).step_by(pieces.block_len()) {
                let end = t.min(begin + pieces.block_len());
                let (n, t) = (before + end, end - begin);
                let what = format!("Prefill, layer {layer}, row {r}, block of {t} that ends at {n}");
                let q = queries[token * qo_width..][..t * qo_width].to_vec();
                let (k, v) = (of.k[..n * width].to_vec(), of.v[..n * width].to_vec());
                let row = Row { n, t, q, k, v };
                let list = lists.next().expect("a list for each block");
                assert_selected(&what, &config, &row, &list);
                let ranked = naive::ranked(&list);
                let (want, want_lse) = naive::attend(&config, &row.q, &row.k, &row.v, &ranked, list.len());
                let exact = attention_tolerance(DType::F32, &config, &row.q, &row.k, list.len());
                let on_gpu = !self.ts.device().is_cpu();
                let allowed = if on_gpu { exact.max(gpu_tolerance(self.model.config.dtype)) } else { exact };
                assert_close(&what, &out[token * qo_width..][..t * qo_width], &want, config.d, allowed);
                assert_lse(&what, &lse[token * hq..][..t * hq], &want_lse, allowed);
                token += t;
            }
        }
        assert!(lists.all(|list| list.is_empty()), "blocks of padding select nothing");
        assert!(out[token * qo_width..].iter().all(|&x| x == 0.0), "padding attends to nothing");
        assert!(lse[token * hq..].iter().all(|&x| x == f64::NEG_INFINITY), "padding sees nothing");
    }

    fn run(
        &mut self,
        layer: usize,
        (batch, pieces): (&Batch, &Pieces),
        way: Way,
        [q, k, v]: [&Tensor; 3],
        (out, lse): (&mut Tensor, &mut Tensor),
    ) {
        let Life { ts, cache, .. } = self;
        let input = StepInput { q: q.view(), k: k.view(), v: v.view() };
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        match way {
            Way::Step => return ts.step(cache, layer, batch, input, output).unwrap(),
            Way::Dense => return ts.step_dense(cache, layer, batch, input, output).unwrap(),
            Way::Prefill => {
                let layer = cache.layer_mut(layer).unwrap();
                ts.prefill(layer, pieces, input, output, |_| ControlFlow::Continue(())).unwrap();
                return;
            }
            Way::AppendSelect => {
                let LayerMut { kv, selections } = cache.layer_mut(layer).unwrap();
                ts.append_select(batch, LayerMut { kv, selections }, input).unwrap();
            }
            Way::AppendOnly | Way::Apart | Way::OneByOne | Way::Uncached => {
                let LayerMut { mut kv, selections: mut cached } = cache.layer_mut(layer).unwrap();
                ts.append(batch, kv.reborrow(), k.view(), v.view()).unwrap();
                let kv = kv.as_view().unwrap();
                match way {
                    Way::Apart => ts.select(batch, kv, q.view(), cached).unwrap(),
                    Way::Uncached => ts.select(batch, kv, q.view(), None).unwrap(),
                    Way::OneByOne => {
                        ts.pool(batch, q.view(), cached.as_mut().map(|cached| cached.reborrow())).unwrap();
                        ts.score(batch, kv).unwrap();
                        ts.vote(batch).unwrap();
                        ts.top_k(batch, cached).unwrap();
                    }
                    _ => return,
                }
            }
        }
        ts.attend(batch, cache.layer(layer).unwrap(), q.view(), Over::Selected, output).unwrap();
    }

    /// Compares actions, similarities and lists with the definitions, and returns the lists.
    fn check_selections(
        &mut self,
        layer: usize,
        growth: &[(SequenceId, usize)],
        way: Way,
        queries: &[f64],
    ) -> Vec<Vec<usize>> {
        let config = naive_config(&self.model.config);
        let lists = selected_lists(&self.ts, growth.len());
        let actions = self.ts.workspace().actions().unwrap();
        let similarities = values(self.ts.workspace().buffer(Buffer::Similarities));
        let mut token = 0;
        for (r, &(id, t)) in growth.iter().enumerate() {
            let q = queries[token * config.hq * config.d..][..t * config.hq * config.d].to_vec();
            token += t;
            if t == 0 {
                assert!(actions[r] == RowAction::Skip && lists[r].is_empty(), "a row without queries");
                continue;
            }
            let place = self.model.place(id);
            let of = &mut self.model.sequences[place].layers[layer];
            let n = of.k.len() / (config.hkv * config.d);
            let what = format!("{way:?}, layer {layer}, row {r} (n = {n}, T = {t})");
            let uses_cache = way != Way::Uncached && config.reuse.is_some();
            let mut own = if uses_cache { of.cached.take() } else { None };
            let mut rule = config.clone();
            rule.reuse = config.reuse.filter(|_| uses_cache);
            if let (Some((threshold, _)), Some(cached)) = (&mut rule.reuse, &own)
                && (cosine(&cached.query, &naive::scoring_query(&config, &q)) - *threshold).abs() < CLOSE
            {
                // Too close to call: the device's word counts.
                *threshold = if actions[r] == RowAction::Reuse { -2.0 } else { 2.0 };
            }
            let want = naive::select(&rule, &q, &of.k, &mut own);
            assert!(
                (want.similarity - similarities[r]).abs() < 1e-5,
                "{what}: similarity {}, want {}",
                similarities[r],
                want.similarity
            );
            let action = match (want.reused, want.votes.is_some()) {
                (true, _) => RowAction::Reuse,
                (_, true) => RowAction::Score,
                _ => RowAction::Complete,
            };
            assert_eq!(actions[r], action, "{what}");
            if want.reused {
                assert_eq!(lists[r], want.list, "{what}: the cached tokens, today's windows");
            } else {
                let row = Row { n, t, q, k: of.k.clone(), v: Vec::new() };
                assert_selected(&what, &config, &row, &lists[r]);
            }
            let counters = &mut self.done.selections;
            count(counters, action);
            if !uses_cache {
                continue;
            }
            count(&mut self.model.stats[layer], action);
            if action == RowAction::Score {
                // Votes too close to call: what is reused later is the device's own choice.
                let range = naive::candidates(&config, n, t);
                if let Some(own) = &mut own {
                    own.chosen = lists[r].iter().copied().filter(|token| range.contains(token)).collect();
                }
                of.made_at = n - t;
            }
            of.cached = own;
        }
        lists
    }
}

fn count(stats: &mut SelectionStats, action: RowAction) {
    match action {
        RowAction::Reuse => stats.reused += 1,
        RowAction::Score => stats.scored += 1,
        RowAction::Complete => stats.complete += 1,
        _ => {}
    }
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
