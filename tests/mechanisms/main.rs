//! The mechanisms that kernels share (`tokenselect_kernels::common`), each in the emulator beside plain Rust, under several schedules.
#![allow(unsafe_op_in_unsafe_fn)] // as in kernels

mod block;
mod fragment;
mod paged;
mod ring;
mod softmax;

use tokenselect_kernels::emu::{Launch, Memory, Options, Order, Report};
use tokenselect_kernels::launch::Dims;

fn schedules() -> impl Iterator<Item = Options> {
    let fixed = [Order::Forward, Order::Reverse].map(|order| Options { order, ..Options::default() });
    fixed.into_iter().chain((0..4).map(Options::random)).map(|options| Options { threads: 1, ..options })
}

fn run(dims: Dims, memory: &Memory, options: Options, kernel: impl Fn() + Sync) -> Result<(), Report> {
    Launch { kernel: "mechanism", dims, memory, options }.run(kernel).map(|_| ())
}

/// The kernel passes under every schedule; `check` looks at the memory after each.
#[track_caller]
fn passes(dims: Dims, memory: &mut Memory, kernel: impl Fn() + Sync, mut check: impl FnMut(&mut Memory)) {
    for options in schedules() {
        if let Err(report) = run(dims, memory, options, &kernel) {
            panic!("{:?}: {report}", options.order);
        }
        check(memory);
    }
}

/// A small generator (SplitMix64).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u32) -> u32 {
        (self.bits() % u64::from(limit)) as u32
    }

    /// From -`range` to `range`.
    fn number(&mut self, range: f32) -> f32 {
        ((self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * range
    }
}
