//! Every fault the emulator knows, planted and reported; each beside a correct twin that passes.
#![allow(unsafe_op_in_unsafe_fn)] // as in kernels

mod bulk;
mod clusters;
mod collectives;
mod global;
mod launches;
mod overlap;
mod shared;
mod warpgroup;

use tokenselect_kernels::emu::{Kind, Launch, Memory, Options, Order, Report, Stats};
use tokenselect_kernels::launch::Dims;
use tokenselect_kernels::simt::data::V4;
use tokenselect_kernels::simt::global::{GlobalMut, GlobalPtr};
use tokenselect_kernels::simt::shared::{Carve, Region};
use tokenselect_kernels::simt::thread::*;
use tokenselect_kernels::simt::warp::{self, FULL, lane_id, warp_id};
use tokenselect_kernels::simt::{grid, tensor};

/// Shared memory of the kernels below: two neighbouring arrays of 64 words.
struct Layout {
    a: Region<u32>,
    b: Region<u32>,
    bytes: u32,
}

const LAYOUT: Layout = {
    let mut carve = Carve::new();
    Layout { a: carve.array(64, 16), b: carve.array(64, 16), bytes: carve.bytes() }
};

fn schedules() -> impl Iterator<Item = Options> {
    let fixed = [Order::Forward, Order::Reverse].map(|order| Options { order, ..Options::default() });
    fixed.into_iter().chain((0..4).map(Options::random)).map(|options| Options { threads: 2, ..options })
}

/// Without the check that would find the same bug first in some orders.
fn races_alone() -> impl Iterator<Item = Options> {
    schedules().map(|options| Options { uninitialised: false, ..options })
}

fn run(dims: Dims, memory: &Memory, options: Options, kernel: impl Fn() + Sync) -> Result<Stats, Report> {
    Launch { kernel: "planted", dims, memory, options }.run(kernel)
}

fn block(threads: u32) -> Dims {
    Dims::linear(1, threads, LAYOUT.bytes)
}

/// The kernel passes under every schedule.
#[track_caller]
fn passes(dims: Dims, memory: &Memory, kernel: impl Fn() + Sync) {
    for options in schedules() {
        if let Err(report) = run(dims, memory, options, &kernel) {
            panic!("{:?}: {report}", options.order);
        }
    }
}

/// The kernel fails under every schedule with a report of `kind` that contains all `words`, and names the kernel, and a
/// line of this file not far behind the call.
#[track_caller]
fn fails_in(dims: Dims, memory: &Memory, kind: Kind, words: &[&str], kernel: impl Fn() + Sync) {
    let call = std::panic::Location::caller();
    for options in schedules() {
        let report = run(dims, memory, Options { budget: 100_000, ..options }, &kernel).unwrap_err();
        assert_eq!(report.kind, kind, "{report}");
        let text = report.to_string();
        assert!(text.contains("kernel `planted` block ["), "{text}");
        for word in words {
            assert!(text.contains(word), "no `{word}` in: {text}");
        }
        // The last place named is where the fault is: `<file>:<line>:<column>`.
        let mut place = text.rsplit(" at ").next().into_iter().flat_map(|at| at.split(':'));
        assert_eq!(place.next(), Some(call.file()), "{text}");
        let line = place.next().and_then(|line| line.parse().ok());
        let near = call.line()..call.line() + 25;
        assert!(line.is_some_and(|line| near.contains(&line)), "called at {call}: {text}");
    }
}

#[track_caller]
fn fails(threads: u32, kind: Kind, words: &[&str], kernel: impl Fn() + Sync) {
    fails_in(block(threads), &Memory::new(), kind, words, kernel)
}

#[track_caller]
fn is_fine(threads: u32, kernel: impl Fn() + Sync) {
    passes(block(threads), &Memory::new(), kernel)
}
