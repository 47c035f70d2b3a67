//! Lists in the memory of a GPU, which the host cannot look at: whatever they hold, kernels access nothing out of bounds, and
//! rows with right lists get what is theirs. (The emulated devices report every access that is out of bounds.)

mod common;

use common::paged::{Pool, STORAGES, Storage, limits};
use common::problem::{Content, Problem, rope, small_config};
use common::run::{Inputs, outputs_on};
use common::{
    Random, assert_close, assert_lse, attention_tolerance, cases, gpu_tolerance, naive, naive_config,
    on_devices, tensor, to_device, values,
};
use proptest::prelude::*;
use tokenselect::{
    DType, Device, HeadShape, Limits, Over, Positions, Ranks, Rope, RopePairing, SelectConfig, Selection,
    StepOutput, TokenSelect,
};

on_devices! {
    gpus: hold_anything, a_wrong_list_spoils_its_own_row_alone;
}

/// Lists of a batch as they lie in memory: tokens and ranks `[rows, width]`.
#[derive(Clone, Debug)]
struct Lists {
    width: usize,
    tokens: Vec<u32>,
    ranks: Vec<u32>,
    len: Vec<u32>,
    total_len: Vec<u32>,
}

/// A number that has no business in a list: near `limit`, near the end of u32, or anything.
fn garbage(limit: usize, random: &mut Random) -> u32 {
    match random.below(5) {
        0 => random.bits() as u32,
        1 => u32::MAX - random.below(3) as u32,
        2 => (1 << 31) - 1 + random.below(3) as u32,
        3 => (limit + random.below(3)) as u32,
        _ => random.below(limit + 1) as u32,
    }
}

impl Lists {
    /// All tokens of each row.
    fn whole(problem: &Problem, width: usize) -> Self {
        let each =
            |word: fn(usize) -> u32| problem.rows.iter().map(move |row| word(row.n)).collect::<Vec<u32>>();
        let places = problem
            .rows
            .iter()
            .flat_map(|row| (0..width).map(|i| if i < row.n { i as u32 } else { u32::MAX }));
        let places: Vec<u32> = places.collect();
        let len = each(|n| n as u32);
        Lists { width, tokens: places.clone(), ranks: places, total_len: len.clone(), len }
    }

    /// Writes garbage over one list in two, or over parts of it.
    fn spoil(&mut self, problem: &Problem, random: &mut Random) {
        for (r, row) in problem.rows.iter().enumerate() {
            let kinds = random.below(16);
            let often = [0.05, 1.0][random.below(2)];
            for i in r * self.width..(r + 1) * self.width {
                if kinds & 1 != 0 && random.unit() < often {
                    self.tokens[i] = garbage(row.n, random);
                }
                if kinds & 2 != 0 && random.unit() < often {
                    self.ranks[i] = garbage(self.width, random);
                }
            }
            if kinds & 4 != 0 {
                self.len[r] = garbage(self.width, random);
            }
            if kinds & 8 != 0 {
                self.total_len[r] =
                    [garbage(self.width, random), random.below(row.t + 2) as u32][random.below(2)];
            }
        }
    }
}

fn attend_to(
    device: &Device,
    problem: &Problem,
    limits: Limits,
    pool: &Pool,
    lists: &Lists,
    with_ranks: bool,
) -> (Vec<f64>, Vec<f64>) {
    let (pool, inputs) = (pool.to(device), Inputs::new(problem).to(device));
    let batch = pool.batch(problem);
    let ts = TokenSelect::new(device, problem.config.clone(), limits).unwrap();
    let (mut out, mut lse) = outputs_on(device, problem, DType::F32);
    let rows = problem.rows.len();
    let put = |words: &[u32], width: Option<usize>| {
        let words: Vec<f64> = words.iter().map(|&word| f64::from(word)).collect();
        to_device(
            device,
            &match width {
                Some(width) => tensor(DType::U32, &words, [rows, width]),
                None => tensor(DType::U32, &words, [rows]),
            },
        )
    };
    let (tokens, ranks) = (put(&lists.tokens, Some(lists.width)), put(&lists.ranks, Some(lists.width)));
    let (len, total_len) = (put(&lists.len, None), put(&lists.total_len, None));
    let ranks = with_ranks.then(|| Ranks { ranks: ranks.view(), total_len: total_len.view() });
    let selection = Selection { tokens: tokens.view(), len: len.view(), ranks };
    let output = StepOutput { out: out.view_mut(), lse: Some(lse.view_mut()) };
    ts.attend(&batch, pool.view(), inputs.q.view(), Over::Lists(&selection), output).unwrap();
    (values(&out), values(&lse))
}

fn config(head_dim: usize, group: usize, positions: Positions, dtype: DType) -> SelectConfig {
    let heads = HeadShape { num_qo_heads: group, num_kv_heads: 1, head_dim };
    SelectConfig { heads, dtype, positions, ..small_config() }
}

fn positions(head_dim: usize) -> impl Strategy<Value = Positions> {
    prop_oneof![Just(Positions::Native), rope(head_dim).prop_map(Positions::Reassigned)]
}

/// Decoding, gathered and plain blocks; rows without tokens or queries among the others. Tables of angles end where the
/// longest list of the plan does.
fn hold_anything(device: &Device) {
    proptest!(cases(96), |(
        (config, dim) in prop::sample::select(vec![64usize, 96, 128]).prop_flat_map(|dim| {
            (positions(dim), 1usize..=4, any::<bool>()).prop_map(move |(positions, group, is_bf16)| {
                (config(dim, group, positions, if is_bf16 { DType::Bf16 } else { DType::F16 }), dim)
            })
        }),
        mut lengths in prop::collection::vec((0usize..70, 0usize..5), 1..=3),
        long_blocks in any::<bool>(),
        page_size in prop::sample::select(vec![1usize, 7, 16]),
        storage in prop::sample::select(STORAGES.to_vec()),
        (with_ranks, wide) in any::<(bool, bool)>(),
        seed in any::<u64>(),
    )| {
        for (n, t) in &mut lengths {
            if long_blocks {
                *t *= 13;
            }
            *t = if *n == 0 { (*t).min(4) } else { (*t).min(*n) };
        }
        let problem = Problem::new(&config, &lengths, Content::Peaked, seed);
        let pool = Pool::full(&problem, page_size, storage, seed);
        let limits = limits(&pool.batch(&problem));
        let longest = config.max_selected(limits.max_block_len);
        // A wide list is longer than the workspace has room for, and than the tables of angles.
        let width = if wide { 300 + longest } else { longest };
        let mut lists = Lists::whole(&problem, width);
        let mut random = Random(seed);
        lists.spoil(&problem, &mut random);
        let got = attend_to(device, &problem, limits, &pool, &lists, with_ranks);
        let (hq, mut query) = (config.heads.num_qo_heads, 0);
        for row in &problem.rows {
            let rows = query * hq..(query + row.t) * hq;
            if row.n == 0 {
                assert!(got.0[rows.start * dim..rows.end * dim].iter().all(|&x| x == 0.0), "no tokens: nothing");
                assert!(got.1[rows].iter().all(|&x| x == f64::NEG_INFINITY), "no tokens: nothing");
            }
            query += row.t;
        }
    });
}

/// One list of several is wrong, in every way: the rows beside it get what they would get without it.
fn a_wrong_list_spoils_its_own_row_alone(device: &Device) {
    let interleaved = Rope { pairing: RopePairing::Interleaved, ..Rope::default() };
    let some = Rope { rotary_dim: Some(32), ..Rope::default() };
    for (i, positions) in [
        Positions::Native,
        Positions::Reassigned(Rope::default()),
        Positions::Reassigned(interleaved),
        Positions::Reassigned(some),
    ]
    .into_iter()
    .enumerate()
    {
        for t in [1, 40] {
            let config =
                SelectConfig { top_k: 200, ..config([64, 128][i % 2], 2, positions.clone(), DType::F16) };
            let problem = Problem::new(&config, &[(50, t), (60, t), (45, t)], Content::Peaked, 3);
            let pool = Pool::full(&problem, 16, Storage::Nhd, 1);
            let limits = limits(&pool.batch(&problem));
            let right = Lists::whole(&problem, 80);
            let mut random = Random(i as u64);
            for wrong in 0..8 {
                let mut lists = right.clone();
                let at = lists.width..2 * lists.width;
                match wrong {
                    0 => lists.len[1] = u32::MAX,
                    1 => lists.tokens[at].fill(60),
                    2 => lists.tokens[at].fill(u32::MAX),
                    3 => lists.tokens[at].reverse(),
                    4 => lists.ranks[at].fill(u32::MAX),
                    5 => lists.total_len[1] = u32::MAX,
                    6 => lists.total_len[1] = 0,
                    _ => lists.tokens[at].fill_with(|| random.bits() as u32),
                }
                let got = attend_to(device, &problem, limits, &pool, &lists, true);
                let config = naive_config(&problem.config);
                for r in [0, 2] {
                    let row = &problem.rows[r];
                    let list: Vec<usize> = (0..row.n).collect();
                    let want = naive::attend(&config, &row.q, &row.k, &row.v, &naive::ranked(&list), row.n);
                    let exact = attention_tolerance(DType::F32, &config, &row.q, &row.k, row.n);
                    let allowed = exact.max(gpu_tolerance(DType::F16));
                    let rows = r * t * config.hq..(r + 1) * t * config.hq;
                    let what = format!("{}, row {r}, fault {wrong}", device.name());
                    let out = &got.0[rows.start * config.d..rows.end * config.d];
                    assert_close(&what, out, &want.0, config.d, allowed);
                    assert_lse(&what, &got.1[rows], &want.1, allowed);
                }
            }
        }
    }
}
