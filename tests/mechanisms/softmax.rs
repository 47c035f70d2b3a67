//! Softmax states against one pass in f64.

use tokenselect_kernels::common::softmax::{Partial, Running, VoteSoftmax, log_sum_exp};
use tokenselect_kernels::simt::warp;

use super::*;

const LOG2_E: f64 = std::f64::consts::LOG2_E;

fn close(got: f32, want: f64) {
    assert!(f64::from(got) == want || (f64::from(got) / want - 1.0).abs() < 1e-5, "{got}, expected {want}");
}

/// Largest and sum of exponentials of numbers; a logit equal to the largest counts 1, NaN nothing.
fn naive(logits: &[f32]) -> (f32, f64) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let term = |x: f32| if x == max { 1.0 } else { f64::from(x - max).exp() };
    let numbers = logits.iter().filter(|x| !x.is_nan());
    (max, if max == f32::NEG_INFINITY && logits.is_empty() { 0.0 } else { numbers.map(|&x| term(x)).sum() })
}

fn pushed(logits: &[f32]) -> VoteSoftmax {
    let mut stats = VoteSoftmax::EMPTY;
    logits.iter().for_each(|&x| stats.push(x));
    stats
}

#[test]
fn votes() {
    let mut random = Random(1);
    let mut numbers: Vec<f32> = (0..200).map(|_| random.number(30.0)).collect();
    let inf = f32::INFINITY;
    let odd: [&[f32]; 6] =
        [&[], &[f32::NAN], &[1.0, f32::NAN, 2.0], &[inf, 3.0, inf], &[-inf, -inf], &[-inf, 5.0]];
    for logits in odd.into_iter().chain([&numbers[..]]) {
        let (max, sum) = if logits.iter().all(|x| x.is_nan()) { (-inf, 0.0) } else { naive(logits) };
        let stats = pushed(logits);
        assert_eq!(stats.max, max, "{logits:?}");
        close(stats.sum, sum);
        // In two halves, with an empty one between, one after the other or all at once.
        let (first, second) = logits.split_at(logits.len() / 2);
        let mut merged = pushed(first);
        merged.merge([VoteSoftmax::EMPTY]);
        merged.merge([pushed(second)]);
        let mut at_once = VoteSoftmax::EMPTY;
        at_once.merge([pushed(first), VoteSoftmax::EMPTY, pushed(second)]);
        for merged in [merged, at_once] {
            assert_eq!(merged.max, max, "{logits:?}");
            close(merged.sum, sum);
        }
    }
    numbers.reverse();
    close(pushed(&numbers).sum, naive(&numbers).1);
}

/// Attention of one query over values of one number, tile by tile.
#[test]
fn attention() {
    let mut random = Random(2);
    let logits: Vec<f32> = (0..96).map(|_| random.number(20.0)).collect();
    let values: Vec<f32> = (0..96).map(|_| random.number(1.0)).collect();
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let terms: Vec<f64> = logits.iter().map(|x| f64::from(x - largest).exp2()).collect();
    let sum: f64 = terms.iter().sum();
    let out: f64 = terms.iter().zip(&values).map(|(term, &value)| term * f64::from(value)).sum();

    let mut softmax = Running::EMPTY;
    let mut running = 0.0;
    for (logits, values) in logits.chunks(16).zip(values.chunks(16)) {
        let max = logits.iter().copied().fold(softmax.max[1], f32::max);
        running *= softmax.raise(1, max);
        for (&logit, value) in logits.iter().zip(values) {
            running += softmax.weigh(1, logit) * value;
        }
    }
    close(softmax.sum[1], sum);
    close(running, out);
    assert_eq!((softmax.max[0], softmax.sum[0]), (f32::NEG_INFINITY, 0.0), "the other row");
    close(log_sum_exp(softmax.max[1], softmax.sum[1]), (f64::from(largest) + sum.log2()) / LOG2_E);

    // Each logit a partial of its own, among some over nothing; two batches and a rest.
    let partial = |i: u32| match i {
        0 | 50 => Partial::EMPTY,
        _ => {
            let value = values[i as usize];
            Partial { max: logits[i as usize], sum: 1.0, out: [value, 2.0 * value, 0.0, -value] }
        }
    };
    let merged = Partial::merged::<40>(0, 96, 1, partial);
    let left_out = terms[0] * f64::from(values[0]) + terms[50] * f64::from(values[50]);
    let expected = (out - left_out) / (sum - terms[0] - terms[50]);
    for (got, factor) in merged.finish().into_iter().zip([1.0, 2.0, 0.0, -1.0]) {
        close(got, factor * expected);
    }
    // Every third from the second on.
    let third = Partial::merged::<3>(1, 96, 3, partial);
    let sum: f64 = (1..96).step_by(3).map(|i| terms[i] * f64::from(largest - third.max).exp2()).sum();
    close(third.sum, sum);
    // Nothing seen: no output, and -inf.
    let nothing = Partial::merged::<4>(0, 0, 1, partial);
    assert_eq!((nothing.finish(), log_sum_exp(nothing.max, nothing.sum)), ([0.0; 4], f32::NEG_INFINITY));
}

#[test]
fn of_other_lanes() {
    let mut random = Random(3);
    let logits: Vec<f32> = (0..32).map(|_| random.number(9.0)).collect();
    let mut memory = Memory::new();
    let input = memory.input("logits", &logits);
    let out = memory.buffer("out", &[0.0f32; 4]);
    let kernel = || unsafe {
        let logit = input.add(warp::lane_id() as u64).load();
        let mut votes = VoteSoftmax { max: logit, sum: 1.0 };
        let mut partial = Partial { max: logit, sum: 1.0, out: [logit, 0.0, 0.0, 1.0] };
        for step in 0..5 {
            votes.merge_lane(1 << step);
            partial.merge_lane(1 << step);
        }
        if warp::lane_id() == 0 {
            for (at, value) in
                [votes.sum, partial.sum, partial.out[0], partial.out[3]].into_iter().enumerate()
            {
                out.add(at as u64).store(value);
            }
        }
    };
    let (max, sum) = naive(&logits);
    let base_2: Vec<f64> = logits.iter().map(|x| f64::from(x - max).exp2()).collect();
    let sum_2: f64 = base_2.iter().sum();
    let weighed: f64 = base_2.iter().zip(&logits).map(|(term, &x)| term * f64::from(x)).sum();
    passes(Dims::linear(1, 32, 0), &mut memory, kernel, |memory| {
        let got = memory.read(out, 4);
        for (got, want) in got.into_iter().zip([sum, sum_2, weighed, sum_2]) {
            close(got, want);
        }
    });
}
