//! Every primitive, in the emulator and on a GPU, against plain Rust: bit for bit, but for approximations, whose
//! documented bounds hold on both.
//!
//! The kernels are those of `tokenselect_kernels::conformance`, reached through their table of entries.

mod collectives;
#[path = "../common/mod.rs"]
mod common;
mod machine;
mod math;
mod memory;
mod tensor;

use half::{bf16, f16};
use machine::{Machine, On, on_machines};
use tokenselect_kernels::common::element::Element;
use tokenselect_kernels::conformance::*;
use tokenselect_kernels::emu::Options;
use tokenselect_kernels::simt::data::{V2, V4};
use tokenselect_kernels::simt::global::GlobalMut;
use tokenselect_kernels::simt::shared::{Carve, Region};

const FULL: u32 = u32::MAX;

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
