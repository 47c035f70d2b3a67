//! `vote`: softmax probabilities summed over heads, and the max-pool.

mod common;

use common::paged::{limits, shuffled_tables};
use common::problem::{around, small_config};
use common::{Random, assert_close, cases, naive, on_devices, tolerance, values};
use proptest::prelude::*;
use tokenselect::{Batch, Buffer, DType, Device, HeadShape, Operations, RowAction, SelectConfig};

on_devices! {
    all: rules_for_nan_and_infinities, max_pool_passes_over_nan, other_rows_are_left_alone;
    cpu: votes_and_max_pool, sizes_around_every_cut, votes_sum_to_the_number_of_heads;
    gpus: gpu_heads_and_sizes;
}

const UNTOUCHED: f64 = -77.0;

/// Logits of one row: `[heads][candidates]`, exactly representable in f32.
type Logits = Vec<Vec<f64>>;

/// Maximum over the numbers and sum of `exp(logit - max)`, as `score` leaves them.
fn statistics(logits: &[f64]) -> [f64; 2] {
    let numbers: Vec<f64> = logits.iter().copied().filter(|x| !x.is_nan()).collect();
    let max = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let term = |x: f64| if x == max { 1.0 } else { (x - max).exp() };
    [max, numbers.into_iter().map(term).sum()]
}

/// Runs `vote` over rows with the given logits, some of them not scored, and returns the votes of each row's
/// candidates; checks that nothing else was written.
fn run(device: &Device, window: usize, rows: &[Logits], actions: &[RowAction]) -> Vec<Vec<f64>> {
    let hq = rows[0].len();
    // Groups of every kind that the number of heads allows.
    let num_kv_heads = if hq.is_multiple_of(3) { 3 } else { 1 };
    let heads = HeadShape { num_qo_heads: hq, num_kv_heads, head_dim: 8 };
    let config = SelectConfig { heads, n_init: 2, n_local: 3, vote_pool_window: window, ..small_config() };
    let lens: Vec<usize> = rows.iter().map(|row| 2 + row[0].len() + 3 + 1).collect();
    let (tables, _) = shuffled_tables(&lens, 16, &mut Random(1));
    let batch = Batch::new(16, (0..=rows.len() as u32).collect(), tables).unwrap();
    let mut ts =
        common::run::only(device, &config, limits(&batch), Operations { vote: true, ..Operations::NONE });
    let mut logits = vec![f64::NAN; values(ts.workspace().buffer(Buffer::Logits)).len()];
    let mut stats = vec![f64::NAN; rows.len() * hq * 2];
    for (r, row) in rows.iter().enumerate() {
        for (h, head) in row.iter().enumerate() {
            stats[(r * hq + h) * 2..][..2].copy_from_slice(&statistics(head));
            for (j, &logit) in head.iter().enumerate() {
                logits[ts.logit_index(&batch, r, 2 + j, h).unwrap()] = logit;
            }
        }
    }
    let codes: Vec<f64> = actions.iter().map(|&action| f64::from(action as u32)).collect();
    let untouched = vec![UNTOUCHED; batch.num_token_places()];
    common::put(&mut ts, Buffer::Actions, &codes);
    common::put(&mut ts, Buffer::Logits, &logits);
    common::put(&mut ts, Buffer::Stats, &stats);
    common::put(&mut ts, Buffer::Votes, &untouched);
    if window > 1 {
        common::put(&mut ts, Buffer::PooledVotes, &untouched);
    }
    ts.provide(Buffer::Actions, &batch).unwrap();
    ts.provide(Buffer::Logits, &batch).unwrap();
    ts.vote(&batch).unwrap();
    if window > 1 {
        ts.top_k(&batch, None).unwrap();
    }

    let workspace = ts.workspace();
    let mut votes = values(if window > 1 {
        workspace.buffer(Buffer::PooledVotes)
    } else {
        workspace.buffer(Buffer::Votes)
    });
    let mut taken = Vec::new();
    for (r, row) in rows.iter().enumerate() {
        let place = &mut votes[batch.row(r).unwrap().token_base + 2..][..row[0].len()];
        taken.push(place.to_vec());
        if actions[r] == RowAction::Score {
            place.fill(UNTOUCHED);
        }
    }
    assert!(votes.iter().all(|&x| x == UNTOUCHED), "only candidates of scored rows are written");
    taken
}

fn check(device: &Device, window: usize, rows: &[Logits]) {
    let got = run(device, window, rows, &vec![RowAction::Score; rows.len()]);
    for (row, got) in rows.iter().zip(got) {
        let want = naive::max_pool(&naive::votes(row), window);
        let what = format!("{}: {} candidates, window {window}", device.name(), want.len());
        // Element by element: the smallest vote has to be as good as the largest.
        let visible: Vec<f64> = want.iter().map(|&x| if x < 1e-30 { 0.0 } else { x }).collect();
        let got: Vec<f64> = got.iter().map(|&x| if x < 1e-30 { 0.0 } else { x }).collect();
        assert_close(&what, &got, &visible, 1, tolerance(DType::F32, row[0].len().max(256)));
    }
}

/// Logits of every kind: peaked, tied, with NaN and infinities.
fn logits(hq: usize, candidates: usize, odd: usize, seed: u64) -> Logits {
    let mut random = Random(seed);
    let mut row: Logits = vec![vec![0.0; candidates]; hq];
    for head in &mut row {
        let spread = [0.0, 1.0, 8.0][random.below(3)];
        head.iter_mut().for_each(|x| *x = f64::from((random.normal() * spread) as f32));
        for _ in 0..odd {
            let place = random.below(candidates);
            head[place] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0][random.below(4)];
        }
    }
    row
}

fn votes_and_max_pool(device: &Device) {
    proptest!(cases(96), |(
        hq in prop::sample::select(vec![1usize, 2, 7, 8, 14, 33]),
        sizes in prop::collection::vec(around(&[64, 128]).prop_map(|n| n.max(1)), 1..4),
        window in prop::sample::select(vec![1usize, 1, 3, 5, 63, 65, 1001]),
        odd in prop::sample::select(vec![0usize, 0, 1, 9]),
        seed in any::<u64>(),
    )| {
        let rows: Vec<Logits> =
            sizes.iter().zip(seed..).map(|(&size, seed)| logits(hq, size, odd, seed)).collect();
        check(device, window, &rows);
    });
}

fn sizes_around_every_cut(device: &Device) {
    for candidates in [1, 2, 3, 511, 512, 513, 1021, 1023, 1024, 1025, 2047, 2048, 2049, 3001] {
        for window in [1, 3, 1023] {
            check(device, window, &[logits(3, candidates, candidates / 100, 4)]);
        }
    }
}

/// Every head has one vote to give.
fn votes_sum_to_the_number_of_heads(device: &Device) {
    for hq in [1, 8, 33] {
        let votes = run(device, 1, &[logits(hq, 5000, 0, 3)], &[RowAction::Score]);
        let sum: f64 = votes[0].iter().sum();
        assert!((sum / hq as f64 - 1.0).abs() < 1e-5, "{hq} heads gave {sum} votes");
    }
}

fn rules_for_nan_and_infinities(device: &Device) {
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    for (logits, want) in [
        // A NaN counts for no one else.
        (vec![nan, 0.0, 0.0, 0.0, 0.0], vec![nan, 0.25, 0.25, 0.25, 0.25]),
        // An infinite maximum takes all; several share.
        (vec![5.0, inf, 0.0, nan, -inf], vec![0.0, 1.0, 0.0, nan, 0.0]),
        (vec![inf, inf, 0.0, -inf, 7.0], vec![0.5, 0.5, 0.0, 0.0, 0.0]),
        // The limit of ever smaller equal logits.
        (vec![-inf, -inf, -inf, -inf, nan], vec![0.25, 0.25, 0.25, 0.25, nan]),
        (vec![-inf, 0.0, -inf, -inf, -inf], vec![0.0, 1.0, 0.0, 0.0, 0.0]),
        (vec![nan; 5], vec![nan; 5]),
    ] {
        assert_close("naive", &naive::votes(std::slice::from_ref(&logits)), &want, 1, 1e-12);
        let got = run(device, 1, &[Vec::from([logits.clone()])], &[RowAction::Score]);
        assert_close(device.name(), &got[0], &want, 1, 1e-6);
    }
}

/// The pool takes the largest number in reach; a NaN neither spreads nor heals.
fn max_pool_passes_over_nan(device: &Device) {
    // One head whose votes are 4/8, 2/8, 1/8, 1/8 around two NaNs.
    let ln = f64::ln;
    let row = [[f64::NAN, ln(4.0), ln(2.0), f64::NAN, 0.0, 0.0]];
    let row: Logits = row.iter().map(|head| head.iter().map(|&x| f64::from(x as f32)).collect()).collect();
    let want = [f64::NAN, 0.5, 0.5, f64::NAN, 0.125, 0.125];
    let got = run(device, 3, std::slice::from_ref(&row), &[RowAction::Score]);
    assert_close(device.name(), &got[0], &want, 1, 1e-6);
}

fn other_rows_are_left_alone(device: &Device) {
    let rows: Vec<Logits> = (0..4).map(|seed| logits(2, 70, 0, seed)).collect();
    // The pool is part of `top_k`, which reuses only what it is given.
    for (window, last) in [(1, RowAction::Reuse), (5, RowAction::Skip)] {
        let actions = [RowAction::Skip, RowAction::Score, RowAction::Complete, last];
        let got = run(device, window, &rows, &actions);
        let want = naive::max_pool(&naive::votes(&rows[1]), window);
        assert_close(device.name(), &got[1], &want, want.len(), 1e-5);
    }
}

/// Every mapping of heads to lanes, ragged rows, and shares of one token to several tiles.
fn gpu_heads_and_sizes(device: &Device) {
    for (i, hq) in [1usize, 2, 4, 7, 8, 12, 33, 40, 64, 96, 132].into_iter().enumerate() {
        let sizes = [1, 255, 256, 257, 700 + 13 * i, 2];
        let rows: Vec<Logits> =
            sizes.iter().zip(0..).map(|(&size, seed)| logits(hq, size, i % 3, seed)).collect();
        check(device, [1, 3][i % 2], &rows);
    }
}
