//! Fragments: the maps are those of the machine (`tests/primitives` multiplies by them), every element has one holder, and
//! reductions reach the lanes that they say.

use std::collections::BTreeSet;

use tokenselect_kernels::common::fragment::{A, Accumulator, B, Lane, lane, over_columns, over_rows};
use tokenselect_kernels::simt::warp;

use super::*;

fn lanes() -> impl Iterator<Item = Lane> {
    (0..32).map(|lane| Lane { g: lane / 4, t: lane % 4 })
}

#[test]
fn every_element_has_one_holder() {
    let all = |rows: u32, columns: u32| (0..rows).flat_map(move |r| (0..columns).map(move |c| (r, c)));
    let collect = |held: Vec<(u32, u32)>, rows, columns| {
        assert_eq!(held.len() as u32, rows * columns);
        assert_eq!(held.into_iter().collect::<BTreeSet<_>>(), all(rows, columns).collect());
    };
    let a = lanes().flat_map(|at| (0..4).map(move |i| (A::row(at, i), A::column(at, i))));
    collect(a.flat_map(|(r, c)| [(r, c), (r, c + 1)]).collect(), 16, 16);
    let b = lanes().flat_map(|at| (0..2).map(move |i| (B::row(at, i), B::column(at))));
    collect(b.flat_map(|(r, c)| [(r, c), (r + 1, c)]).collect(), 16, 8);
    let d = lanes().flat_map(|at| (0..4).map(move |i| (Accumulator::row(at, i), Accumulator::column(at, i))));
    collect(d.collect(), 16, 8);
}

#[test]
fn reductions() {
    let mut memory = Memory::new();
    let out = memory.buffer("out", &[0.0f32; 64]);
    let kernel = || unsafe {
        let own = warp::lane_id();
        let value = (own * own % 41) as f32;
        out.add(2 * own as u64).store(over_rows(value, f32::max));
        out.add(2 * own as u64 + 1).store(over_columns(value, |a, b| a + b));
    };
    passes(Dims::linear(1, 32, 0), &mut memory, kernel, |memory| {
        let value = |lane: u32| (lane * lane % 41) as f32;
        for (own, pair) in memory.read(out, 64).chunks(2).enumerate() {
            let (g, t) = (own as u32 / 4, own as u32 % 4);
            let largest = (0..8).map(|g| value(4 * g + t)).fold(0.0, f32::max);
            let sum: f32 = (0..4).map(|t| value(4 * g + t)).sum();
            assert_eq!(pair, [largest, sum], "lane {own}");
        }
    });
    // The lane's own place.
    let places = memory.buffer("places", &[0u32; 64]);
    let kernel = || unsafe {
        let own = warp::lane_id() as u64;
        places.add(2 * own).store(lane().g);
        places.add(2 * own + 1).store(lane().t);
    };
    passes(Dims::linear(1, 32, 0), &mut memory, kernel, |memory| {
        let flat: Vec<u32> = lanes().flat_map(|at| [at.g, at.t]).collect();
        assert_eq!(memory.read(places, 64), flat);
    });
}
