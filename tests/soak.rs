//! Thousands of random calls to one cache, beside a model that is nothing but the definitions: tokens, page tables, cached
//! selections, outputs and counters agree after each of them, and calls that fail change nothing.
//!
//! A run is made of lives: a new cache with another configuration after every [`LIFE`] steps. A failure names its life's seed and
//! step; `TOKENSELECT_SOAK_SEED` begins with that life, `TOKENSELECT_SOAK_STEPS` makes a run longer or shorter:
//!
//! ```text
//! TOKENSELECT_SOAK_STEPS=1000000 cargo test --test soak cpu::
//! TOKENSELECT_SOAK_SEED=17 TOKENSELECT_SOAK_STEPS=250 cargo test --test soak cpu::
//! ```

mod common;
#[path = "soak/model.rs"]
mod model;
#[path = "soak/work.rs"]
mod work;

use common::problem::{cached, small_config};
use common::{Random, bits, on_devices, tensor, to_device};
use model::{Model, Sequence};
use tokenselect::{
    Batch, CacheConfig, DType, Device, Error, HeadShape, KvLayout, Limits, PagedKvCache, Positions, Rope,
    RopePairing, SelectConfig, SelectionStats, SequenceId, StepInput, StepOutput, Tensor, TokenSelect,
};

on_devices! {
    all: random_calls_agree_with_the_model;
}

/// Steps of one cache.
const LIFE: usize = 250;
const NUM_LAYERS: usize = 2;
const MAX_SEQUENCES: usize = 5;
const MAX_BLOCK_LEN: usize = 24;
/// Tokens that the pages have room for.
const MAX_TOKENS: usize = 240;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

fn random_calls_agree_with_the_model(device: &Device) {
    // The emulator takes a hundred times as long.
    let default = if device.name() == "emulated" { 200 } else { 5000 };
    let mut left = number("TOKENSELECT_SOAK_STEPS").unwrap_or(default) as usize;
    let mut seed = number("TOKENSELECT_SOAK_SEED").unwrap_or(1);
    let mut done = Counts::default();
    while left > 0 {
        let steps = left.min(LIFE);
        let mut life = Life::new(device, seed);
        for step in 0..steps {
            life.at = step;
            life.step();
        }
        done.add(&life.done);
        left -= steps;
        seed += 1;
    }
    println!("{}: {done:?}", device.name());
    if default == 5000 && number("TOKENSELECT_SOAK_STEPS").is_none() {
        done.assert_varied();
    }
}

/// What happened, so that a run which does nothing does not pass.
#[derive(Debug, Default)]
struct Counts {
    calls: usize,
    failed: usize,
    copied_pages: usize,
    selections: SelectionStats,
}

impl Counts {
    fn add(&mut self, other: &Counts) {
        self.calls += other.calls;
        self.failed += other.failed;
        self.copied_pages += other.copied_pages;
        self.selections.reused += other.selections.reused;
        self.selections.scored += other.selections.scored;
        self.selections.complete += other.selections.complete;
    }

    fn assert_varied(&self) {
        let SelectionStats { reused, scored, complete } = self.selections;
        let least = reused.min(scored).min(complete);
        assert!(self.failed > 100 && self.copied_pages > 20 && least > 100, "{self:?}");
    }
}

/// A batch of an earlier step.
struct Held {
    batch: Batch,
    ids: Vec<SequenceId>,
    /// None of its sequences was truncated, freed or forked since, and no page of them moved.
    fresh: bool,
}

struct Life {
    seed: u64,
    at: usize,
    random: Random,
    cache: PagedKvCache,
    ts: TokenSelect,
    model: Model,
    held: Option<Held>,
    done: Counts,
}

impl Drop for Life {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!(
                "step {} of the life with seed {}: TOKENSELECT_SOAK_SEED={} TOKENSELECT_SOAK_STEPS={}",
                self.at,
                self.seed,
                self.seed,
                self.at + 1
            );
        }
    }
}

fn random_config(device: &Device, random: &mut Random) -> SelectConfig {
    let rope = |random: &mut Random| match device.name() {
        "cpu" => Rope {
            pairing: [RopePairing::HalfSplit, RopePairing::Interleaved][random.below(2)],
            rotary_dim: [None, Some(8)][random.below(2)],
            ..Rope::default()
        },
        _ => Rope::default(),
    };
    let (head_dim, dtypes) = match device.name() {
        "cpu" => (16, [DType::F32, DType::F16, DType::Bf16]),
        _ => (64, [DType::F16, DType::Bf16, DType::Bf16]),
    };
    let config = SelectConfig {
        heads: HeadShape { num_qo_heads: 4, num_kv_heads: 2, head_dim },
        dtype: dtypes[random.below(3)],
        n_init: random.below(4),
        n_local: [0, 3, 6, 16][random.below(4)],
        top_k: [1, 5, 11][random.below(3)],
        vote_pool_window: [1, 1, 3][random.below(3)],
        logits_soft_cap: [None, Some(20.0)][random.below(2)],
        positions: if random.below(2) == 0 { Positions::Native } else { Positions::Reassigned(rope(random)) },
        ..small_config()
    };
    match random.below(6) {
        0 => config,
        1 => cached(config, 0.9, None),
        _ => cached(config, 0.75, Some(1 + random.below(6) as u32)),
    }
}

impl Life {
    fn new(device: &Device, seed: u64) -> Self {
        let mut random = Random(seed);
        let config = random_config(device, &mut random);
        let page_size = [1, 3, 4, 8, 16, 16][random.below(6)];
        let num_pages = MAX_TOKENS / page_size;
        let layout = [KvLayout::Nhd, KvLayout::Hnd][random.below(2)];
        let size = CacheConfig {
            num_layers: NUM_LAYERS,
            num_pages,
            page_size,
            max_sequences: MAX_SEQUENCES,
            layout,
        };
        let limits = Limits {
            max_rows: MAX_SEQUENCES + 1,
            max_block_len: MAX_BLOCK_LEN,
            // Pages that forks share count for each row.
            max_kv_tokens: MAX_SEQUENCES * MAX_TOKENS,
        };
        Life {
            seed,
            at: 0,
            random,
            cache: PagedKvCache::new(device, &config, &size).unwrap(),
            ts: TokenSelect::new(device, config.clone(), limits).unwrap(),
            model: Model {
                config,
                page_size,
                num_pages,
                sequences: Vec::new(),
                stats: vec![SelectionStats::default(); NUM_LAYERS],
            },
            held: None,
            done: Counts::default(),
        }
    }

    fn step(&mut self) {
        self.done.calls += 1;
        match self.random.below(21) {
            0 => self.create(),
            1 | 9 => self.fork(),
            2 | 3 => self.truncate(),
            4 if self.random.below(2) == 0 => self.free(),
            5 => self.fail_to_extend(),
            6 => self.fail_to_step(),
            7 => self.try_held(),
            8 if self.random.below(4) == 0 => self.reset_stats(),
            _ => self.work(),
        }
        self.model.check(&self.cache);
    }

    /// A random sequence; one is made where there is none.
    fn any(&mut self) -> usize {
        if self.model.sequences.is_empty() {
            self.create();
        }
        self.random.below(self.model.sequences.len())
    }

    fn touch(&mut self, id: SequenceId) {
        if let Some(held) = self.held.as_mut().filter(|held| held.ids.contains(&id)) {
            held.fresh = false;
        }
    }

    fn create(&mut self) {
        if self.model.sequences.len() == MAX_SEQUENCES {
            let full = Error::TooManySequences { limit: MAX_SEQUENCES };
            return self.fails(|life| life.cache.create(), |error| *error == full);
        }
        let id = self.cache.create().unwrap();
        let heads = self.model.config.heads;
        self.model.sequences.push(Sequence::new(id, NUM_LAYERS, heads, &mut self.random));
    }

    fn fork(&mut self) {
        let place = self.any();
        let parent = self.model.sequences[place].id;
        if self.model.sequences.len() == MAX_SEQUENCES {
            let full = Error::TooManySequences { limit: MAX_SEQUENCES };
            return self.fails(|life| life.cache.fork(parent), |error| *error == full);
        }
        let id = self.cache.fork(parent).unwrap();
        let child = Sequence { id, ..self.model.sequences[place].clone() };
        self.model.sequences.push(child);
        self.touch(parent);
    }

    fn truncate(&mut self) {
        let place = self.any();
        let Sequence { id, len, .. } = self.model.sequences[place];
        if self.random.below(5) == 0 {
            let to = len + 1 + self.random.below(3);
            return self.fails(
                |life| life.cache.truncate(id, to),
                |error| *error == Error::TruncateBeyondEnd { id, len, to },
            );
        }
        // Mostly a few tokens, as speculative decoding does.
        let drop =
            if self.random.below(3) > 0 { self.random.below(6).min(len) } else { self.random.below(len + 1) };
        self.roll_back(id, len - drop);
    }

    fn roll_back(&mut self, id: SequenceId, to: usize) {
        let (place, page_size, width) = (self.model.place(id), self.model.page_size, self.model.width());
        self.cache.truncate(id, to).unwrap();
        if to < self.model.sequences[place].len {
            self.touch(id);
        }
        self.model.sequences[place].truncate(to, page_size, width);
    }

    fn free(&mut self) {
        let place = self.any();
        let id = self.model.sequences.swap_remove(place).id;
        self.cache.free(id).unwrap();
        self.touch(id);
        let unknown = |error: &Error| *error == Error::UnknownSequence(id);
        self.fails(|life| life.cache.free(id), unknown);
        self.fails(|life| life.cache.fork(id), unknown);
        self.fails(|life| life.cache.truncate(id, 0), unknown);
        self.fails(|life| life.cache.extend(&[(id, 1)]).map(drop), unknown);
    }

    fn reset_stats(&mut self) {
        if let Some(selections) = self.cache.selections_mut() {
            selections.reset_stats().unwrap();
            self.model.stats.fill(SelectionStats::default());
        }
    }

    /// Asserts that a call fails as it should and changes nothing.
    #[track_caller]
    fn fails<T>(
        &mut self,
        call: impl FnOnce(&mut Self) -> Result<T, Error>,
        expected: impl FnOnce(&Error) -> bool,
    ) {
        let before = self.fingerprint();
        match call(self) {
            Ok(_) => panic!("a call that must fail did not"),
            Err(error) => assert!(expected(&error), "another error than expected: {error}"),
        }
        assert!(self.fingerprint() == before, "a call that failed changed something");
        self.done.failed += 1;
    }

    /// All that a cache holds, bit by bit.
    fn fingerprint(&mut self) -> (String, Vec<Vec<u64>>) {
        let tables = format!("{:?}", self.cache.pages());
        let mut all = Vec::new();
        for layer in 0..NUM_LAYERS {
            let mut copy = |view: tokenselect::TensorView<'_>| {
                let mut copy = Tensor::zeros_on(self.ts.device(), view.dtype(), view.shape()).unwrap();
                copy.copy_from(view).unwrap();
                all.push(bits(&copy));
            };
            let kv = self.cache.layer(layer).unwrap();
            copy(kv.k());
            copy(kv.v());
            let Some(selections) = self.cache.selections_mut() else { continue };
            let cached = selections.layer_mut(layer).unwrap();
            [&cached.queries, &cached.selections, &cached.ages, &cached.made_at, &cached.counters]
                .into_iter()
                .for_each(|view| copy(view.as_view()));
        }
        (tables, all)
    }

    fn fail_to_extend(&mut self) {
        let place = self.any();
        let Sequence { id, len, .. } = self.model.sequences[place];
        match self.random.below(3) {
            0 => {
                let growth = [(id, MAX_TOKENS + 1 + self.random.below(9))];
                let (needed, _) = self.model.needs(&growth);
                let free = self.model.num_free_pages();
                self.fails(
                    |life| life.cache.extend(&growth).map(drop),
                    |error| *error == Error::OutOfPages { needed, free },
                );
            }
            1 => {
                let (limit, t) = (tokenselect::MAX_SEQUENCE_LEN, tokenselect::MAX_SEQUENCE_LEN - len + 1);
                self.fails(
                    |life| life.cache.extend(&[(id, t)]).map(drop),
                    |error| *error == Error::SequenceTooLong { id, limit, got: limit + 1 },
                );
            }
            _ => self.fails(
                |life| life.cache.extend(&[(id, 1), (id, 0)]).map(drop),
                |error| *error == Error::DuplicateSequence { id, first: 0, second: 1 },
            ),
        }
    }

    /// A batch of an earlier step is stale if and only if one of its sequences was changed.
    fn try_held(&mut self) {
        let Some(held) = self.held.take() else { return };
        if held.fresh {
            assert_eq!(self.cache.check(&held.batch), Ok(()), "growth alone makes no batch stale");
        } else {
            let (q, kv) = self.inputs(held.batch.num_query_tokens(), &[]);
            let is_stale =
                |error: &Error| matches!(error, Error::StaleBatch { .. } | Error::UnknownSequence(_));
            self.fails(|life| life.run_step(0, &held.batch, [&q, &kv, &kv]), is_stale);
        }
        self.held = Some(held);
    }

    /// Queries of `tokens` tokens, and zeros for keys and values.
    fn inputs(&self, tokens: usize, queries: &[f64]) -> (Tensor, Tensor) {
        let SelectConfig { heads, dtype, .. } = self.model.config;
        let mut q = vec![0.25; tokens * heads.num_qo_heads * heads.head_dim];
        q[..queries.len()].copy_from_slice(queries);
        let kv = vec![0.0; tokens * self.model.width()];
        let make = |data: &[f64], num_heads| {
            to_device(self.ts.device(), &tensor(dtype, data, [tokens, num_heads, heads.head_dim]))
        };
        (make(&q, heads.num_qo_heads), make(&kv, heads.num_kv_heads))
    }

    fn outputs(&self, tokens: usize) -> (Tensor, Tensor) {
        let heads = self.model.config.heads;
        let make = |shape: &[usize]| {
            let marked = vec![-77.0; shape.iter().product()];
            let made = match *shape {
                [a, b] => tensor(DType::F32, &marked, [a, b]),
                _ => tensor(DType::F32, &marked, [shape[0], shape[1], shape[2]]),
            };
            to_device(self.ts.device(), &made)
        };
        (make(&[tokens, heads.num_qo_heads, heads.head_dim]), make(&[tokens, heads.num_qo_heads]))
    }

    fn run_step(&mut self, layer: usize, batch: &Batch, [q, k, v]: [&Tensor; 3]) -> Result<(), Error> {
        let (mut out, mut lse) = self.outputs(batch.num_query_tokens());
        let input = StepInput { q: q.view(), k: k.view(), v: v.view() };
        let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
        self.ts.step(&mut self.cache, layer, batch, input, output)
    }

    /// A step that is refused: too long a block, a layer that does not exist, inputs of the wrong shape or type.
    fn fail_to_step(&mut self) {
        let place = self.any();
        let Sequence { id, len, .. } = self.model.sequences[place];
        let kind = self.random.below(4);
        let t = if kind == 0 { MAX_BLOCK_LEN + 1 } else { 1 };
        let growth = [(id, t)];
        let (needed, moved) = self.model.needs(&growth);
        if needed > self.model.num_free_pages() {
            return;
        }
        let batch = self.extend(&growth, &moved);
        let ((q, kv), (wrong, _)) = (self.inputs(t, &[]), self.inputs(t + 1, &[]));
        let device = self.ts.device().clone();
        match kind {
            0 => self.fails(
                |life| life.run_step(0, &batch, [&q, &kv, &kv]),
                |error| matches!(error, Error::Limit { what: "max_block_len", .. }),
            ),
            1 => self.fails(
                |life| life.run_step(NUM_LAYERS, &batch, [&q, &kv, &kv]),
                |error| matches!(error, Error::Index { what: "layer", .. }),
            ),
            2 => self.fails(
                |life| life.run_step(1, &batch, [&wrong, &kv, &kv]),
                |error| matches!(error, Error::Shape { what: "q", .. }),
            ),
            _ => {
                let words = Tensor::zeros_on(&device, DType::U32, kv.shape()).unwrap();
                self.fails(
                    |life| life.run_step(0, &batch, [&q, &kv, &words]),
                    |error| matches!(error, Error::DType { what: "v", .. }),
                );
            }
        }
        // Nothing was written for the new tokens.
        self.roll_back(id, len);
    }

    /// Grows cache and model; their layers do not have the new tokens yet.
    fn extend(&mut self, growth: &[(SequenceId, usize)], moved: &[SequenceId]) -> Batch {
        let batch = self.cache.extend(growth).unwrap();
        moved.iter().for_each(|&id| self.touch(id));
        self.done.copied_pages += moved.len();
        self.model.extend(growth, moved, &self.cache);
        batch
    }
}
