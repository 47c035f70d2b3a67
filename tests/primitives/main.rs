//! Every primitive in the emulator against plain Rust.
//!
//! The kernels are those of `kernels_gpu::conformance`, reached through the table of entries, as on a GPU.

mod collectives;
mod math;
mod memory;
mod tensor;

use half::{bf16, f16};
use kernels_gpu::conformance::*;
use kernels_gpu::element::Element;
use kernels_gpu::emu::{Launch, Memory, Options, Order};
use kernels_gpu::entries::{ENTRIES, Entry};
use kernels_gpu::launch::Dims;
use kernels_gpu::simt::data::{V2, V4};
use kernels_gpu::simt::global::GlobalMut;
use kernels_gpu::simt::shared::{Carve, Region};

const FULL: u32 = u32::MAX;

/// Launches an entry by name, under a schedule of its own.
#[track_caller]
fn launch_with<P: Copy + Sync>(name: &str, dims: Dims, memory: &Memory, params: P, options: Options) {
    let entry = Entry::find(name).unwrap();
    assert_eq!(entry.param_bytes, size_of::<P>(), "the parameters of another entry");
    let run = || unsafe { (entry.run)((&raw const params).cast()) };
    let launch = Launch { kernel: name, dims, memory, options };
    launch.run(run).unwrap_or_else(|report| panic!("{:?}: {report}", options.order));
}

fn schedules() -> impl Iterator<Item = Options> {
    let fixed = [Order::Forward, Order::Reverse].map(|order| Options { order, ..Options::default() });
    fixed.into_iter().chain((0..3).map(Options::random)).map(|options| Options { threads: 2, ..options })
}

/// Small numbers without a pattern.
fn numbers(seed: u64, below: u64) -> impl Iterator<Item = u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (((state >> 32) * below) >> 32) as u32
    })
}

fn take<const N: usize>(seed: u64, below: u64) -> [u32; N] {
    let mut numbers = numbers(seed, below);
    std::array::from_fn(|_| numbers.next().unwrap())
}

#[test]
fn entry_names_are_unique() {
    for (i, entry) in ENTRIES.iter().enumerate() {
        assert!(ENTRIES[..i].iter().all(|other| other.name != entry.name), "{}", entry.name);
    }
    assert!(Entry::find("nothing").is_none());
}
