//! `top_k`: the exact choice in the total order, and the selected list around it.

mod common;

use common::paged::{limits, shuffled_tables};
use common::problem::small_config;
use common::{Random, cases, is_short_run, naive, on_devices, tensor, to_device};
use proptest::prelude::*;
use tokenselect::{
    Batch, Buffer, DType, Device, Operations, RowAction, SelectConfig, Tensor, TensorView, TokenSelect,
};

on_devices! {
    all: nan_is_chosen_last_and_by_index;
    cpu:
        chooses_in_the_total_order, k_around_the_number_of_candidates, a_hundred_thousand_equal_votes,
        a_million_votes;
    gpus: gpu_adversarial_votes, gpu_ragged_rows;
    cuda: a_million_votes, a_million_votes_in_the_same_bits;
}

/// Marks tokens in buffers where nothing may be written.
const UNTOUCHED: u32 = 7_000_000;

/// Up to so many votes are sorted by the definitions; of more, the choice is only checked to be theirs.
const SORTED: usize = 4096;

/// A row by its windows' filling: votes of the candidates, and the length of the block.
struct Row {
    votes: Vec<f64>,
    block: usize,
    action: RowAction,
}

/// Rows with their batch and their buffers: what stays when only `k` changes, or only the run. For one device.
struct Case {
    rows: Vec<Row>,
    config: SelectConfig,
    lens: Vec<usize>,
    batch: Batch,
    /// Beyond the candidates infinite, to be passed over.
    votes: Tensor,
    actions: Tensor,
}

impl Case {
    fn new(config: &SelectConfig, rows: Vec<Row>) -> Self {
        let lens: Vec<usize> =
            rows.iter().map(|row| config.n_init + row.votes.len() + config.n_local + row.block).collect();
        let (tables, _) = shuffled_tables(&lens, 16, &mut Random(2));
        let mut qo_indptr = vec![0];
        rows.iter().for_each(|row| qo_indptr.push(qo_indptr.last().unwrap() + row.block as u32));
        let batch = Batch::new(16, qo_indptr, tables).unwrap();
        let mut votes = vec![f64::INFINITY; batch.num_token_places()];
        for (r, row) in rows.iter().enumerate() {
            votes[batch.row(r).unwrap().token_base + config.n_init..][..row.votes.len()]
                .copy_from_slice(&row.votes);
        }
        let votes = tensor(DType::F32, &votes, [votes.len()]);
        let codes: Vec<f64> = rows.iter().map(|row| f64::from(row.action as u32)).collect();
        let actions = tensor(DType::U32, &codes, [codes.len()]);
        Case { rows, config: config.clone(), lens, batch, votes, actions }
    }

    /// Runs `top_k` and checks chosen tokens and lists of all rows.
    fn check(&self, device: &Device, top_k: usize) {
        let mut select = self.select(device, top_k);
        let results = self.run(&mut select);
        self.assert_results(device, top_k, &results);
    }

    fn select(&self, device: &Device, top_k: usize) -> TokenSelect {
        let config = SelectConfig { top_k, ..self.config.clone() };
        let mut select = common::run::only(
            device,
            &config,
            limits(&self.batch),
            Operations { vote: true, ..Operations::NONE },
        );
        assert_eq!(select.workspace().buffer(Buffer::Votes).shape(), self.votes.shape());
        select.buffer_mut(Buffer::Votes).copy_from(to_device(device, &self.votes).view()).unwrap();
        select.buffer_mut(Buffer::Actions).copy_from(to_device(device, &self.actions).view()).unwrap();
        select.provide(Buffer::Actions, &self.batch).unwrap();
        select.provide(Buffer::Votes, &self.batch).unwrap();
        select
    }

    /// The chosen tokens of all rows, and their lists.
    fn run(&self, select: &mut TokenSelect) -> (Vec<u32>, Vec<Vec<u32>>) {
        let shape = select.workspace().buffer(Buffer::TopK).shape();
        let blank = vec![UNTOUCHED; shape.checked_len().unwrap()];
        let blank = TensorView::new(&blank, shape).unwrap();
        select.buffer_mut(Buffer::TopK).copy_from(blank).unwrap();
        select.top_k(&self.batch, None).unwrap();
        let workspace = select.workspace();
        let lists = (0..self.rows.len()).map(|row| workspace.selected(row).unwrap()).collect();
        (workspace.buffer(Buffer::TopK).to_vec().unwrap(), lists)
    }

    fn assert_results(&self, device: &Device, top_k: usize, (chosen, lists): &(Vec<u32>, Vec<Vec<u32>>)) {
        for (r, row) in self.rows.iter().enumerate() {
            let what =
                format!("{}: row {r} of {} candidates, {:?}", device.name(), row.votes.len(), row.action);
            let (chosen, list) = (&chosen[r * top_k..][..top_k], &lists[r]);
            let n = self.lens[r];
            match row.action {
                RowAction::Score => {
                    let chosen = &chosen[..top_k.min(row.votes.len())];
                    let n_init = self.config.n_init;
                    let places: Vec<usize> = chosen.iter().map(|&t| t as usize - n_init).collect();
                    assert_largest(&what, &row.votes, &places);
                    let end = n_init + row.votes.len();
                    let (first, last) = (0..n_init as u32, end as u32..n as u32);
                    let whole: Vec<u32> = first.chain(chosen.iter().copied()).chain(last).collect();
                    assert!(*list == whole, "{what}: the list is not windows and choice");
                }
                RowAction::Complete => assert!(list.iter().copied().eq(0..n as u32), "{what}"),
                _ => assert!(list.is_empty(), "{what}"),
            }
            if row.action != RowAction::Score {
                assert!(chosen.iter().all(|&t| t == UNTOUCHED), "{what}: only scored rows choose");
            }
        }
    }
}

/// A number for each vote and place that orders them as the definitions do, the largest first: no two are the same.
fn order(vote: f64, place: usize) -> u64 {
    let bits = (vote as f32 + 0.0).to_bits(); // both zeros alike
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    let descending = if vote.is_nan() { u32::MAX } else { !ascending };
    u64::from(descending) << 32 | place as u64
}

/// Asserts that `chosen` are the places of the largest votes, ascending. They are if they ascend and the last of them in
/// the total order is before the first of the others.
fn assert_largest(what: &str, votes: &[f64], chosen: &[usize]) {
    if votes.len() <= SORTED {
        assert_eq!(chosen, naive::largest(votes, chosen.len()), "{what}: chosen");
    }
    let (mut last_chosen, mut first_other) = (0, u64::MAX);
    let mut next = 0;
    for (place, &vote) in votes.iter().enumerate() {
        let order = order(vote, place);
        if chosen.get(next) == Some(&place) {
            last_chosen = last_chosen.max(order);
            next += 1;
        } else {
            first_other = first_other.min(order);
        }
    }
    assert_eq!(next, chosen.len(), "{what}: chosen places ascend and exist");
    assert!(last_chosen < first_other, "{what}: {last_chosen:#x} was chosen before {first_other:#x}");
}

/// The check of long rows is the definitions: it accepts their choice, and no other.
#[test]
fn order_is_the_total_order() {
    for kinds in 0..12 {
        let votes = votes(200, kinds, kinds as u64);
        let mut places: Vec<usize> = (0..votes.len()).collect();
        places.sort_by_key(|&place| order(votes[place], place));
        for k in [1, 77, 199] {
            let mut first = places[..k].to_vec();
            first.sort_unstable();
            assert_eq!(first, naive::largest(&votes, k), "{k} of {kinds} kinds");
        }
    }
    let mut votes = vec![0.5; SORTED + 10];
    votes[SORTED] = 0.75;
    assert_largest("the largest and the first", &votes, &[0, SORTED]);
    for wrong in [vec![0, 1], vec![1, SORTED], vec![SORTED, 0], vec![0, 0]] {
        let refused = std::panic::catch_unwind(|| assert_largest("", &votes, &wrong));
        assert!(refused.is_err(), "{wrong:?}");
    }
}

fn check(device: &Device, config: &SelectConfig, rows: Vec<Row>) {
    Case::new(config, rows).check(device, config.top_k);
}

fn scored(votes: Vec<f64>) -> Row {
    Row { votes, block: 1, action: RowAction::Score }
}

/// Votes of few distinct values, with zeros of both signs, subnormal numbers, infinities and NaN.
fn votes(len: usize, kinds: usize, seed: u64) -> Vec<f64> {
    let mut random = Random(seed);
    let odd = [0.0, -0.0, 1e-40, f64::NAN, f64::INFINITY, 1.0, 1.0 + f64::from(f32::EPSILON)];
    let kind = |random: &mut Random| match kinds {
        0 => random.unit(),
        _ if kinds <= odd.len() => odd[random.below(kinds)],
        _ => random.below(kinds) as f64 / 8.0,
    };
    (0..len).map(|_| f64::from(kind(&mut random) as f32)).collect()
}

fn chooses_in_the_total_order(device: &Device) {
    proptest!(cases(128), |(
        n_init in 0usize..5,
        n_local in 0usize..5,
        top_k in prop::sample::select(vec![1usize, 2, 3, 15, 16, 17, 64, 127]),
        rows in prop::collection::vec((1usize..300, 0usize..12, 1usize..4, any::<u64>()), 1..4),
        others in prop::sample::select(vec![None, Some(RowAction::Skip), Some(RowAction::Complete)]),
    )| {
        let config = SelectConfig { n_init, n_local, top_k, ..small_config() };
        let mut rows: Vec<Row> = rows
            .into_iter()
            .map(|(len, kinds, block, seed)| Row { votes: votes(len, kinds, seed), block, action: RowAction::Score })
            .collect();
        if let Some(action) = others {
            let len = if action == RowAction::Complete { top_k } else { 9 };
            let block = if action == RowAction::Complete { 2 } else { 0 };
            rows.insert(rows.len() / 2, Row { votes: vec![1.0; len], block, action });
        }
        let case = Case::new(&config, rows);
        case.check(device, top_k);
    });
}

fn k_around_the_number_of_candidates(device: &Device) {
    for top_k in [1, 2, 31, 32, 33, 1023, 1024, 1025] {
        let config = SelectConfig { top_k, ..small_config() };
        for candidates in [top_k - 1, top_k, top_k + 1, 2 * top_k, 3 * top_k + 1] {
            for kinds in [0, 2, 9] {
                let votes = votes(candidates, kinds, top_k as u64);
                check(device, &config, vec![scored(votes.clone())]);
            }
        }
    }
}

/// More equal votes than any table of a clever algorithm may hold.
fn a_hundred_thousand_equal_votes(device: &Device) {
    // The single larger vote is last.
    let mut larger = vec![0.5; 100_000];
    larger[99_999] = 0.75;
    // All votes differ in their last bits only.
    let bits = |j: u32| f64::from(f32::from_bits(0.5f32.to_bits() + j.wrapping_mul(2_654_435_761) % 3000));
    for votes in [vec![0.5; 100_000], larger, (0..100_000).map(bits).collect()] {
        let case = Case::new(&small_config(), vec![scored(votes)]);
        [1, 2048, 99_999].into_iter().for_each(|top_k| case.check(device, top_k));
    }
}

fn nan_is_chosen_last_and_by_index(device: &Device) {
    let config = SelectConfig { top_k: 4, ..small_config() };
    let nan = f64::NAN;
    for votes in [
        vec![nan, nan, 0.0, nan, 0.0, nan, 0.0],
        vec![nan, 1.0, nan, f64::NEG_INFINITY, nan, 0.0, nan],
        vec![nan; 9],
        vec![-nan, nan, 0.0, -nan, -0.0, nan],
    ] {
        check(device, &config, vec![scored(votes.clone())]);
    }
}

/// Votes that are hard on a radix select, by name.
fn adversarial(len: usize) -> Vec<(&'static str, Vec<f64>)> {
    let f32s = |f: &dyn Fn(usize) -> f32| (0..len).map(|j| f64::from(f(j))).collect::<Vec<f64>>();
    // Visits every place once, so that nothing is sorted by accident.
    let mixed = |j: usize| (j * 7919 + 13) % len;
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-40, -1.0, -f32::NAN];
    vec![
        ("all equal", f32s(&|_| 0.25)),
        (
            "90 % equal at the cut",
            f32s(&|j| {
                if mixed(j) % 20 == 0 {
                    0.75
                } else if mixed(j) % 20 == 1 {
                    0.125
                } else {
                    0.5
                }
            }),
        ),
        (
            "geometric decay over 40 orders",
            f32s(&|j| 10f64.powf(-40.0 * mixed(j) as f64 / len as f64) as f32),
        ),
        (
            "NaN and inf mixed in",
            f32s(&|j| if j % 3 == 0 { odd[mixed(j) % odd.len()] } else { mixed(j) as f32 / len as f32 }),
        ),
        ("one bit apart", f32s(&|j| f32::from_bits(0.5f32.to_bits() + mixed(j) as u32 % 3000))),
        ("all distinct", f32s(&|j| mixed(j) as f32)),
    ]
}

fn check_adversarial(device: &Device, len: usize, top_ks: &[usize]) {
    let config = SelectConfig { n_init: 3, n_local: 5, ..small_config() };
    for (name, votes) in adversarial(len) {
        let case = Case::new(&config, vec![Row { votes, block: 2, action: RowAction::Score }]);
        for &top_k in top_ks {
            println!("{name}, k = {top_k}"); // shown where the test fails
            case.check(device, top_k);
        }
    }
}

/// Shares of every size, and `k` at both ends.
fn gpu_adversarial_votes(device: &Device) {
    for len in [257, 3001] {
        check_adversarial(device, len, &[1, 64, len - 1]);
    }
}

/// More contenders than a block holds in shared memory: they pass through it window by window.
#[test]
fn emulated_contenders_in_several_windows() {
    let device = Device::emulated();
    for len in [4096 + 3, 3 * 4096 - 1] {
        check_adversarial(&device, len, &[1, 9000.min(len - 1)]);
    }
}

/// More votes than the blocks of a cluster have in flight: of every eight tokens the first four are counted, and tell where to look.
/// They may tell too few, or too many.
#[test]
fn emulated_votes_of_which_a_part_is_counted() {
    let device = Device::emulated();
    let len = 40_000;
    let config = SelectConfig { n_init: 3, n_local: 5, ..small_config() };
    let is_counted = |j: usize| ((config.n_init + j) / 4).is_multiple_of(2);
    let large = |j: usize| 1.0 + f64::from(j as f32 / len as f32);
    let small = |j: usize| f64::from((j * 7919 % len) as f32 / len as f32);
    // 1500 large votes, all of them counted: 2048 are expected to be as large.
    let too_few = (0..len).map(|j| if j < 3000 && is_counted(j) { large(j) } else { small(j) }).collect();
    // None of 20 000 large votes is counted.
    let too_many = (0..len).map(|j| if is_counted(j) { small(j) } else { large(j) }).collect();
    let even = (0..len).map(small).collect();
    for (name, votes) in [("too few", too_few), ("too many", too_many), ("even", even)] {
        let case = Case::new(&config, vec![Row { votes, block: 2, action: RowAction::Score }]);
        println!("{name}"); // shown where the test fails
        case.check(&device, 2048);
    }
    check_adversarial(&device, len, &[1, 2048]);
}

fn gpu_ragged_rows(device: &Device) {
    let config = SelectConfig { top_k: 40, n_local: 3, ..small_config() };
    let mut rows: Vec<Row> = [41, 40, 39, 1, 255, 256, 257, 1025]
        .into_iter()
        .zip(0..)
        .map(|(len, seed)| scored(votes(len, seed as usize % 4, seed)))
        .collect();
    rows.insert(2, Row { votes: vec![1.0; 12], block: 2, action: RowAction::Complete });
    rows.insert(5, Row { votes: vec![1.0; 9], block: 0, action: RowAction::Skip });
    check(device, &config, rows);
}

/// As many candidates as the largest tests have, but for runs under slow tools.
fn a_million() -> usize {
    if is_short_run() { (1 << 13) + 3 } else { (1 << 20) + 3 }
}

/// A million votes and three, exact.
fn a_million_votes(device: &Device) {
    let len = a_million();
    check_adversarial(device, len, &[1, 2048, 8192, len - 1]);
}

/// The same bits in 20 runs.
fn a_million_votes_in_the_same_bits(device: &Device) {
    let config = SelectConfig { top_k: 2048, ..small_config() };
    for seed in [0, 2] {
        let case = Case::new(&config, vec![scored(votes(a_million(), seed, 5))]);
        let mut select = case.select(device, config.top_k);
        let first = case.run(&mut select);
        case.assert_results(device, config.top_k, &first);
        for run in 1..20 {
            assert!(case.run(&mut select) == first, "run {run} differs");
        }
    }
}
