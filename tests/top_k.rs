//! `top_k`: the exact choice in the total order, and the selected list around it.

mod common;

use common::paged::{limits, shuffled_tables};
use common::problem::small_config;
use common::{
    Random, all_devices, cases, cuda, devices, gpus, naive, naive_config, tensor, to_device, values,
};
use proptest::prelude::*;
use tokenselect::{Batch, DType, Device, RowAction, SelectConfig, TokenSelect};

/// Marks tokens in buffers where nothing may be written.
const UNTOUCHED: f64 = 7e6;

/// A row by its windows' filling: votes of the candidates, and the length of the block.
struct Row {
    votes: Vec<f64>,
    block: usize,
    action: RowAction,
}

/// Runs `top_k` on votes of one's own and checks chosen tokens and lists of all rows.
fn check(device: &Device, config: &SelectConfig, rows: &[Row]) {
    let naive_config = naive_config(config);
    let len = |row: &Row| config.n_init + row.votes.len() + config.n_local + row.block;
    let lens: Vec<usize> = rows.iter().map(len).collect();
    let (tables, _) = shuffled_tables(&lens, 16, &mut Random(2));
    let mut qo_indptr = vec![0];
    rows.iter().for_each(|row| qo_indptr.push(qo_indptr.last().unwrap() + row.block as u32));
    let batch = Batch::new(16, qo_indptr, tables).unwrap();
    let mut ts = TokenSelect::new(device, config.clone(), limits(&batch)).unwrap();

    let workspace = ts.workspace_mut();
    let mut votes = vec![f64::INFINITY; batch.num_token_places()]; // beyond the candidates, to be passed over
    for (r, row) in rows.iter().enumerate() {
        votes[batch.token_base(r) + config.n_init..][..row.votes.len()].copy_from_slice(&row.votes);
    }
    let put = |dtype, values: &[f64], shape| to_device(device, &tensor(dtype, values, shape));
    workspace.votes = put(DType::F32, &votes, workspace.votes.shape());
    let codes: Vec<f64> = rows.iter().map(|row| f64::from(row.action as u32)).collect();
    workspace.actions = put(DType::U32, &codes, workspace.actions.shape());
    let blank = vec![UNTOUCHED; rows.len() * config.top_k];
    workspace.top_k = put(DType::U32, &blank, workspace.top_k.shape());
    ts.top_k(&batch, None).unwrap();

    let chosen = values(&ts.workspace().top_k);
    for (r, row) in rows.iter().enumerate() {
        let what = format!("{}: row {r} of {} candidates, {:?}", device.name(), row.votes.len(), row.action);
        let chosen = &chosen[r * config.top_k..][..config.top_k];
        let selected: Vec<usize> = ts.workspace().selected(r).unwrap().iter().map(|&t| t as usize).collect();
        match row.action {
            RowAction::Score => {
                let want: Vec<usize> =
                    naive::largest(&row.votes, config.top_k).iter().map(|j| config.n_init + j).collect();
                let got: Vec<usize> = chosen[..want.len()].iter().map(|&t| t as usize).collect();
                assert_eq!(got, want, "{what}: chosen");
                let list = naive::selected_list(&naive_config, lens[r], row.block, &want);
                assert_eq!(selected, list, "{what}: selected");
            }
            RowAction::Complete => assert_eq!(selected, (0..lens[r]).collect::<Vec<_>>(), "{what}"),
            _ => assert!(selected.is_empty(), "{what}"),
        }
        if row.action != RowAction::Score {
            assert!(chosen.iter().all(|&t| t == UNTOUCHED), "{what}: only scored rows choose");
        }
    }
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

proptest! {
    #![proptest_config(cases(128))]

    #[test]
    fn chooses_in_the_total_order(
        n_init in 0usize..5,
        n_local in 0usize..5,
        top_k in prop::sample::select(vec![1usize, 2, 3, 15, 16, 17, 64, 127]),
        rows in prop::collection::vec((1usize..300, 0usize..12, 1usize..4, any::<u64>()), 1..4),
        others in prop::sample::select(vec![None, Some(RowAction::Skip), Some(RowAction::Complete)]),
    ) {
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
        for device in devices() {
            check(&device, &config, &rows);
        }
    }
}

#[test]
fn k_around_the_number_of_candidates() {
    for top_k in [1, 2, 31, 32, 33, 1023, 1024, 1025] {
        let config = SelectConfig { top_k, ..small_config() };
        for candidates in [top_k - 1, top_k, top_k + 1, 2 * top_k, 3 * top_k + 1] {
            for kinds in [0, 2, 9] {
                let votes = votes(candidates, kinds, top_k as u64);
                devices().iter().for_each(|device| check(device, &config, &[scored(votes.clone())]));
            }
        }
    }
}

/// More equal votes than any table of a clever algorithm may hold.
#[test]
fn a_hundred_thousand_equal_votes() {
    for device in devices() {
        for top_k in [1, 2048, 99_999] {
            let config = SelectConfig { top_k, ..small_config() };
            check(&device, &config, &[scored(vec![0.5; 100_000])]);
            // The single larger vote is last.
            let mut votes = vec![0.5; 100_000];
            votes[99_999] = 0.75;
            check(&device, &config, &[scored(votes)]);
            // All votes differ in their last bits only.
            let bits =
                |j: u32| f64::from(f32::from_bits(0.5f32.to_bits() + j.wrapping_mul(2_654_435_761) % 3000));
            check(&device, &config, &[scored((0..100_000).map(bits).collect())]);
        }
    }
}

#[test]
fn nan_is_chosen_last_and_by_index() {
    let config = SelectConfig { top_k: 4, ..small_config() };
    let nan = f64::NAN;
    for votes in [
        vec![nan, nan, 0.0, nan, 0.0, nan, 0.0],
        vec![nan, 1.0, nan, f64::NEG_INFINITY, nan, 0.0, nan],
        vec![nan; 9],
        vec![-nan, nan, 0.0, -nan, -0.0, nan],
    ] {
        all_devices().iter().for_each(|device| check(device, &config, &[scored(votes.clone())]));
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
    for (name, votes) in adversarial(len) {
        for &top_k in top_ks {
            let config = SelectConfig { n_init: 3, n_local: 5, top_k, ..small_config() };
            println!("{name}, k = {top_k}"); // shown where the test fails
            check(device, &config, &[Row { votes: votes.clone(), block: 2, action: RowAction::Score }]);
        }
    }
}

/// Shares of every size, and `k` at both ends.
#[test]
fn gpu_adversarial_votes() {
    for device in gpus() {
        for len in [257, 3001] {
            check_adversarial(&device, len, &[1, 64, len - 1]);
        }
    }
}

#[test]
fn gpu_ragged_rows() {
    let config = SelectConfig { top_k: 40, n_local: 3, ..small_config() };
    for device in gpus() {
        let mut rows: Vec<Row> = [41, 40, 39, 1, 255, 256, 257, 1025]
            .into_iter()
            .zip(0..)
            .map(|(len, seed)| scored(votes(len, seed as usize % 4, seed)))
            .collect();
        rows.insert(2, Row { votes: vec![1.0; 12], block: 2, action: RowAction::Complete });
        rows.insert(5, Row { votes: vec![1.0; 9], block: 0, action: RowAction::Skip });
        check(&device, &config, &rows);
    }
}

/// A million votes and three, exact, and the same bits in 20 runs.
#[test]
fn cuda_a_million_votes() {
    let Some(device) = cuda() else { return };
    let len = (1 << 20) + 3;
    check_adversarial(&device, len, &[1, 2048, 8192, len - 1]);
    let config = SelectConfig { top_k: 2048, ..small_config() };
    let rows = [scored(votes(len, 0, 5))];
    for _ in 0..20 {
        check(&device, &config, &rows);
    }
}
