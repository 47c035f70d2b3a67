//! Tensor parallelism with the Selection Cache: ranks that share the heads of a layer add their products and their votes, and
//! then do what one device with all heads does.

mod common;

use std::collections::BTreeSet;

use common::paged::{Pool, Storage, limits};
use common::problem::{Content, Problem, cached, some_heads};
use common::run::{Inputs, only, selected_lists};
use common::{Random, bits, on_devices, put, round, tensor, values};
use tokenselect::{
    Batch, Buffer, DType, Device, Error, HeadShape, Operations, PageTables, RowAction, SelectConfig,
    SelectionCache, SelectionStats, Tensor, TokenSelect,
};

on_devices! {
    all:
        ranks_act_as_one_device, sizes_of_queries_do_not_matter, one_rank_decides_as_pool_does,
        products_are_zero_where_nothing_is_usable, operations_follow_each_other;
}

const PAGE_SIZE: usize = 4;
const SEQUENCES: usize = 6;

fn config(threshold: f32, max_reuse: u32) -> SelectConfig {
    let base = SelectConfig {
        heads: HeadShape { num_qo_heads: 10, num_kv_heads: 5, head_dim: 64 },
        dtype: DType::Bf16,
        n_init: 2,
        n_local: 3,
        top_k: 8,
        ..SelectConfig::default()
    };
    cached(base, threshold, Some(max_reuse))
}

/// One device of several, or the only one.
struct Rank {
    /// Its KV heads.
    heads: (usize, usize),
    pool: Pool,
    ts: TokenSelect,
    cache: SelectionCache,
}

impl Rank {
    /// For batches of the first tokens of a problem's sequences.
    fn new(device: &Device, problem: &Problem, heads: (usize, usize)) -> Self {
        let part = some_heads(problem, heads.0, heads.1);
        let pool = Pool::full(&part, PAGE_SIZE, Storage::Nhd, 3).to(device);
        let ts = only(device, &part.config, limits(&pool.batch(&part)), Operations::SELECTION);
        let cache = SelectionCache::new(device, &part.config, 1, SEQUENCES).unwrap();
        Rank { heads, pool, ts, cache }
    }

    /// The rank's heads of the queries.
    fn q(&self, problem: &Problem) -> Tensor {
        Inputs::new(&some_heads(problem, self.heads.0, self.heads.1)).to(self.ts.device()).q
    }

    fn pool(&mut self, batch: &Batch, problem: &Problem, with_cache: bool) {
        let q = self.q(problem);
        let cached = with_cache.then(|| self.cache.layer_mut(0).unwrap());
        self.ts.pool(batch, q.view(), cached).unwrap();
    }

    fn compare(&mut self, batch: &Batch) {
        self.ts.compare(batch, Some(self.cache.layer_mut(0).unwrap())).unwrap();
    }

    fn decide(&mut self, batch: &Batch) {
        self.ts.decide(batch, Some(self.cache.layer_mut(0).unwrap())).unwrap();
    }

    fn vote(&mut self, batch: &Batch) {
        self.ts.score(batch, self.pool.view()).unwrap();
        self.ts.vote(batch).unwrap();
    }

    fn top_k(&mut self, batch: &Batch) {
        self.ts.top_k(batch, Some(self.cache.layer_mut(0).unwrap())).unwrap();
    }

    fn values(&self, buffer: Buffer) -> Vec<f64> {
        values(self.ts.workspace().buffer(buffer))
    }

    fn actions(&self) -> Vec<RowAction> {
        self.ts.workspace().actions().unwrap()
    }

    /// All that the Selection Cache holds.
    fn cached(&mut self) -> Vec<Vec<u64>> {
        let layer = self.cache.layer_mut(0).unwrap();
        let words = |view: tokenselect::TensorView<'_>| -> Vec<u64> {
            view.to_vec::<u32>().unwrap().into_iter().map(u64::from).collect()
        };
        let queries = layer.queries.as_view().to_vec::<f32>().unwrap();
        vec![
            queries.iter().map(|x| u64::from(x.to_bits())).collect(),
            words(layer.selections.as_view()),
            words(layer.ages.as_view()),
            words(layer.made_at.as_view()),
            layer.counters.as_view().to_vec::<u64>().unwrap(),
        ]
    }
}

/// What a collective does: every rank has the sum.
fn all_reduce(ranks: &mut [Rank], buffer: Buffer) {
    let mut sum = ranks[0].values(buffer);
    for rank in &ranks[1..] {
        // Beyond the tokens of the batch there may be anything.
        sum.iter_mut().zip(rank.values(buffer)).for_each(|(sum, x)| *sum += x);
    }
    ranks.iter_mut().for_each(|rank| put(&mut rank.ts, buffer, &sum));
}

/// The first `lens` tokens of the sequences, the last of which is the block; a sequence without tokens has no block.
fn batch_of(pool: &Pool, lens: &[usize]) -> Batch {
    let mut tables = PageTables { indptr: vec![0], ..PageTables::default() };
    let mut qo_indptr = vec![0];
    for (row, &len) in lens.iter().enumerate() {
        let pages = len.div_ceil(PAGE_SIZE);
        tables.indices.extend(&pool.tables.indices[pool.tables.indptr[row] as usize..][..pages]);
        tables.indptr.push(tables.indices.len() as u32);
        tables.last_page_len.push((len - pages.saturating_sub(1) * PAGE_SIZE) as u32);
        qo_indptr.push(qo_indptr[row] + u32::from(len > 0));
    }
    let sequences = (0..lens.len() as u32).map(|row| (row + 2) % SEQUENCES as u32).collect();
    Batch::new(PAGE_SIZE, qo_indptr, tables).unwrap().with_sequence_indices(sequences).unwrap()
}

/// Decoding, whose queries turn from step to step, each head at a speed of its own.
struct Decoding {
    problem: Problem,
    /// Two directions for each row.
    directions: Vec<[Vec<f64>; 2]>,
}

const STEPS: usize = 20;
/// Tokens before the first step: the second row's are few, so that all are selected at first; the fourth is padding.
const BEFORE: [usize; 5] = [40, 5, 33, 0, 61];

impl Decoding {
    fn new(config: &SelectConfig, seed: u64) -> Self {
        let lengths = BEFORE.map(|len| if len > 0 { (len + STEPS, 1) } else { (0, 0) });
        let problem = Problem::new(config, &lengths, Content::Peaked, seed);
        let mut random = Random(seed + 1);
        let width = config.heads.num_qo_heads * config.heads.head_dim;
        let mut direction = || (0..width).map(|_| random.normal()).collect();
        let directions = BEFORE.map(|_| [direction(), direction()]).to_vec();
        Decoding { problem, directions }
    }

    fn lens(&self, step: usize) -> Vec<usize> {
        BEFORE.iter().map(|&len| if len > 0 { len + step + 1 } else { 0 }).collect()
    }

    /// The problem with the queries of a step, of about this size.
    fn at(&self, step: usize, size: f64) -> Problem {
        let mut problem = self.problem.clone();
        let config = problem.config.clone();
        for (row, [u, v]) in problem.rows.iter_mut().zip(&self.directions) {
            for (i, q) in row.q.iter_mut().enumerate() {
                // The first KV head's queries turn fast, the others hardly.
                let head = i / config.heads.head_dim;
                let angle = step as f64 * if head < config.heads.group() { 0.45 } else { 0.02 };
                *q = round(config.dtype, size * (angle.cos() * u[i] + angle.sin() * v[i]));
            }
        }
        problem
    }
}

/// What one device does with all heads at each step, and what ranks do that share them.
fn compare_with_ranks(device: &Device, seed: u64, splits: &[usize], size: fn(usize) -> f64) -> Seen {
    let decoding = Decoding::new(&config(0.8, 4), seed);
    let mut whole = Rank::new(device, &decoding.problem, (0, 5));
    let mut ranks: Vec<Rank> =
        splits.windows(2).map(|cut| Rank::new(device, &decoding.problem, (cut[0], cut[1]))).collect();
    let mut seen = Seen::default();
    for step in 0..STEPS {
        let problem = decoding.at(step, size(step));
        let lens = decoding.lens(step);
        let batch = batch_of(&whole.pool, &lens);
        whole.pool(&batch, &problem, true);
        whole.vote(&batch);
        whole.top_k(&batch);

        let batches: Vec<Batch> = ranks.iter().map(|rank| batch_of(&rank.pool, &lens)).collect();
        for (rank, batch) in ranks.iter_mut().zip(&batches) {
            let before = rank.cached();
            rank.pool(batch, &problem, true);
            seen.own_actions_differ |= rank.actions() != whole.actions();
            rank.pool(batch, &problem, false);
            rank.compare(batch);
            assert_eq!(rank.cached(), before, "nothing is written");
        }
        all_reduce(&mut ranks, Buffer::Products);
        for (rank, batch) in ranks.iter_mut().zip(&batches) {
            let before = rank.cached();
            rank.decide(batch);
            assert_eq!(rank.cached(), before, "nothing is written");
            assert_eq!(rank.actions(), whole.actions(), "{}: step {step}", device.name());
            let (got, want) = (rank.values(Buffer::Similarities), whole.values(Buffer::Similarities));
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() < 1e-5, "step {step}: similarity {got}, not {want}");
            }
            rank.vote(batch);
        }
        all_reduce(&mut ranks, Buffer::Votes);
        let rows = lens.len();
        let want = selected_lists(&whole.ts, rows);
        for (rank, batch) in ranks.iter_mut().zip(&batches) {
            rank.top_k(batch);
            assert_eq!(selected_lists(&rank.ts, rows), want, "{}: step {step}", device.name());
            assert_eq!(rank.cache.stats().unwrap(), whole.cache.stats().unwrap());
        }
        seen.actions.extend(whole.actions().into_iter().map(|action| action as u32));
        seen.stats = whole.cache.stats().unwrap();
    }
    seen
}

#[derive(Default)]
struct Seen {
    actions: BTreeSet<u32>,
    /// Some rank would have decided otherwise by its own heads.
    own_actions_differ: bool,
    stats: SelectionStats,
}

fn ranks_act_as_one_device(device: &Device) {
    for (seed, splits) in [(1, &[0, 2, 5][..]), (2, &[0, 1, 3, 5])] {
        let seen = compare_with_ranks(device, seed, splits, |_| 1.0);
        assert_eq!(seen.actions.len(), 4, "every action");
        assert!(seen.own_actions_differ, "the test is too easy");
        assert!(seen.stats.reused > 10 && seen.stats.scored > 10, "{:?}", seen.stats);
    }
}

/// Squares of such queries leave the range of f32, and so do products of two of different sizes.
fn sizes_of_queries_do_not_matter(device: &Device) {
    let sizes: [fn(usize) -> f64; 3] = [|_| 1e-30, |_| 1e25, |step| if step % 2 == 0 { 1e-30 } else { 1e25 }];
    for size in sizes {
        let seen = compare_with_ranks(device, 3, &[0, 2, 5], size);
        assert!(seen.stats.reused > 10 && seen.stats.scored > 10, "{:?}", seen.stats);
    }
}

/// Cached selections of all kinds, and queries of all kinds.
fn one_rank_decides_as_pool_does(device: &Device) {
    let decoding = Decoding::new(&config(0.8, 4), 5);
    let mut rank = Rank::new(device, &decoding.problem, (0, 5));
    let batch = batch_of(&rank.pool, &decoding.lens(5));
    let (reference, other) = (decoding.at(0, 1.0), decoding.at(1, 1.0));
    let mut zero = reference.clone();
    zero.rows.iter_mut().for_each(|row| row.q.fill(0.0));
    let mut nan = reference.clone();
    nan.rows.iter_mut().filter_map(|row| row.q.get_mut(7)).for_each(|x| *x = f64::NAN);
    let mut seen = BTreeSet::new();
    for problem in [&reference, &other, &zero, &nan] {
        // Usable; made after more tokens than there are; a first token or a last one that is no candidate; used too often.
        let layer = |rank: &mut Rank, made_at: u32, age: u32, first: u32, last: u32| {
            rank.pool(&batch, &reference, false);
            let queries = rank.values(Buffer::Queries);
            let width = queries.len() / BEFORE.len();
            let layer = rank.cache.layer_mut(0).unwrap();
            let mut all = vec![0.0; SEQUENCES * width];
            for row in 0..BEFORE.len() {
                all[(row + 2) % SEQUENCES * width..][..width]
                    .copy_from_slice(&queries[row * width..][..width]);
            }
            let set = |view: tokenselect::TensorViewMut<'_>, values: &[f64]| {
                let shape = view.shape();
                view.copy_from(tensor(DType::U32, values, shape).view()).unwrap();
            };
            let shape = layer.queries.shape();
            { layer.queries }.copy_from(tensor(DType::F32, &all, shape).view()).unwrap();
            set(layer.made_at, &[f64::from(made_at); SEQUENCES]);
            set(layer.ages, &[f64::from(age); SEQUENCES]);
            let tokens = [first, 3, 4, 5, 6, 7, 8, last].map(f64::from);
            set(layer.selections, &tokens.repeat(SEQUENCES));
        };
        for (made_at, age, first, last) in [
            (30, 0, 2, 9),
            (30, 3, 2, 9),
            (30, 4, 2, 9),
            (39, 0, 2, 30),
            (u32::MAX, 0, 2, 9),
            (30, 0, 1, 9),
            (30, 0, 2, 62),
        ] {
            layer(&mut rank, made_at, age, first, last);
            rank.pool(&batch, problem, true);
            let (actions, want) = (rank.actions(), rank.values(Buffer::Similarities));
            rank.pool(&batch, problem, false);
            rank.compare(&batch);
            rank.decide(&batch);
            assert_eq!(rank.actions(), actions, "{}: {made_at} {age} {first} {last}", device.name());
            seen.extend(actions.into_iter().map(|action| action as u32));
            for (got, want) in rank.values(Buffer::Similarities).iter().zip(want) {
                let same = (got - want).abs() < 1e-6 || got.is_nan() && want.is_nan();
                assert!(same, "{}: similarity {got}, not {want}", device.name());
            }
        }
    }
    assert_eq!(seen.len(), 4, "every action");
}

fn products_are_zero_where_nothing_is_usable(device: &Device) {
    let decoding = Decoding::new(&config(0.8, 4), 6);
    let mut rank = Rank::new(device, &decoding.problem, (0, 5));
    let problem = decoding.at(0, 1.0);
    let batch = batch_of(&rank.pool, &decoding.lens(0));
    let junk = vec![7.0; 3 * BEFORE.len()];
    rank.pool(&batch, &problem, false);
    put(&mut rank.ts, Buffer::Products, &junk);
    rank.compare(&batch);
    assert_eq!(rank.values(Buffer::Products), vec![0.0; junk.len()], "nothing was selected");
    rank.decide(&batch);
    rank.vote(&batch);
    rank.top_k(&batch);
    // The same queries again: the sums of their squares, to the last bit but for the order of additions.
    rank.pool(&batch, &problem, false);
    rank.compare(&batch);
    let queries = rank.values(Buffer::Queries);
    let width = queries.len() / BEFORE.len();
    for (row, products) in rank.values(Buffer::Products).chunks(3).enumerate() {
        let is_scored = BEFORE[row] > 20;
        let squares = queries[row * width..][..width].iter().map(|x| x * x).sum::<f64>();
        let want = if is_scored { squares } else { 0.0 };
        for got in products {
            assert!((got - want).abs() <= 1e-13 * want, "row {row}: {got}, not {want}");
        }
    }
    rank.decide(&batch);
    let want = BEFORE.map(|len| match len {
        0 => RowAction::Skip,
        1..20 => RowAction::Complete,
        _ => RowAction::Reuse,
    });
    assert_eq!(rank.actions(), want);
    // Without cached selections, and for parts of sequences, nothing is compared.
    let tables = batch.tables().clone();
    let qo_indptr = problem.qo_indptr();
    let candidates = decoding.lens(0).into_iter().map(|len| 0..len as u32).collect();
    let parts = Batch::partial(PAGE_SIZE, qo_indptr, tables, candidates).unwrap();
    let parts = parts.with_sequence_indices(vec![2, 3, 4, 5, 0]).unwrap();
    for (batch, with_cache) in [(&batch, false), (&parts, true)] {
        rank.pool(batch, &problem, with_cache);
        let (actions, similarities) = (rank.actions(), rank.values(Buffer::Similarities));
        put(&mut rank.ts, Buffer::Products, &junk);
        rank.ts.compare(batch, with_cache.then(|| rank.cache.layer_mut(0).unwrap())).unwrap();
        assert_eq!(rank.values(Buffer::Products), vec![0.0; junk.len()]);
        rank.ts.decide(batch, with_cache.then(|| rank.cache.layer_mut(0).unwrap())).unwrap();
        assert_eq!((rank.actions(), rank.values(Buffer::Similarities)), (actions, similarities));
    }
}

/// The error that a call in the wrong order gives.
#[track_caller]
fn early<T: std::fmt::Debug>(result: Result<T, Error>, wanted: (&str, &str)) {
    match result {
        Err(Error::Order { op, needs, .. }) => assert_eq!((op, needs), wanted),
        other => panic!("wanted {wanted:?}, got {other:?}"),
    }
}

fn operations_follow_each_other(device: &Device) {
    let decoding = Decoding::new(&config(0.8, 4), 7);
    let problem = decoding.at(0, 1.0);
    let mut rank = Rank::new(device, &decoding.problem, (0, 5));
    let (batch, other) = (batch_of(&rank.pool, &decoding.lens(0)), batch_of(&rank.pool, &decoding.lens(0)));
    early(rank.ts.compare(&batch, None), ("compare", "pool"));
    early(rank.ts.decide(&batch, None), ("decide", "compare"));
    early(rank.ts.provide(Buffer::Products, &batch), ("provide", "pool"));
    rank.pool(&batch, &problem, false);
    early(rank.ts.decide(&batch, None), ("decide", "compare"));
    early(rank.ts.compare(&other, None), ("compare", "pool"));
    rank.vote(&batch);
    // What was scored by other actions is void, and nothing goes on before there are new ones.
    rank.compare(&batch);
    let kv = rank.pool.view();
    early(rank.ts.decide(&other, None), ("decide", "compare"));
    early(rank.ts.score(&batch, kv), ("score", "decide"));
    early(rank.ts.score(&other, kv), ("score", "pool"));
    early(rank.ts.vote(&batch), ("vote", "decide"));
    early(rank.ts.top_k(&batch, None), ("top_k", "decide"));
    early(rank.ts.vote_top_k(&batch, None), ("vote_top_k", "decide"));
    for buffer in [Buffer::Logits, Buffer::Votes] {
        early(rank.ts.provide(buffer, &batch), ("provide", "decide"));
    }
    rank.decide(&batch);
    early(rank.ts.vote(&batch), ("vote", "score"));
    rank.vote(&batch);
    rank.top_k(&batch);
    // The next layer begins again.
    rank.pool(&batch, &problem, false);
    early(rank.ts.decide(&batch, None), ("decide", "compare"));
    rank.vote(&batch);
    // A failed call changes nothing.
    let mut small = SelectionCache::new(device, rank.ts.config(), 1, 1).unwrap();
    let before = bits(rank.ts.workspace().buffer(Buffer::Products));
    assert!(matches!(rank.ts.compare(&batch, Some(small.layer_mut(0).unwrap())), Err(Error::Index { .. })));
    assert_eq!(bits(rank.ts.workspace().buffer(Buffer::Products)), before);
    rank.top_k(&batch);
    // Products and decisions of one's own.
    rank.pool(&batch, &problem, false);
    rank.ts.provide(Buffer::Products, &batch).unwrap();
    early(rank.ts.score(&batch, rank.pool.view()), ("score", "decide"));
    rank.decide(&batch);
    rank.vote(&batch);
    rank.compare(&batch);
    rank.ts.provide(Buffer::Actions, &batch).unwrap();
    early(rank.ts.decide(&batch, None), ("decide", "compare"));
    rank.vote(&batch);

    let vote = Operations { vote: true, ..Operations::NONE };
    let mut without = only(device, &config(0.8, 4), limits(&batch), vote);
    let text = |result: Result<(), Error>| result.unwrap_err().to_string();
    assert_eq!(
        text(without.compare(&batch, None)),
        "`compare` needs the operation `pool`, which this was made without"
    );
    assert_eq!(
        text(without.decide(&batch, None)),
        "`decide` needs the operation `pool`, which this was made without"
    );
}
