//! *Fragments*: what a lane holds of the operands of the tensor-core product `mma.m16n8k16`, D += A·B.
//!
//! With `g = lane / 4` and `t = lane % 4` ([`Lane`]); a word is two 16-bit values, of adjacent columns in A, adjacent rows in B:
//! ```text
//!  A, 16 x 16                             B, 16 x 8                   accumulator, 16 x 8, f32
//!  columns    2t ..     2t + 8 ..         column       g              columns     2t     2t + 1
//!  row g      word 0    word 2            row 2t ..    word 0         row g       0      1
//!  row g + 8  word 1    word 3            row 2t + 8   word 1         row g + 8   2      3
//! ```
//! So the four lanes of one `g` together hold two rows of an accumulator ([`over_columns`]), the eight lanes of one `t` two of
//! its columns ([`over_rows`]). An accumulator of 16-bit weights, packed pair by pair, is half an A fragment.

use crate::simt::warp;

/// Which rows and columns of every fragment the lane holds.
#[derive(Clone, Copy)]
pub struct Lane {
    /// Row of A and of the accumulator, with `g + 8`; column of B.
    pub g: u32,
    /// Columns `2 t ..` of A and of the accumulator, rows `2 t ..` of B.
    pub t: u32,
}

/// The calling lane.
pub fn lane() -> Lane {
    let lane = warp::lane_id();
    Lane { g: lane / 4, t: lane % 4 }
}

/// A lane's words of A.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct A(pub [u32; 4]);

impl A {
    /// Row of word `i`.
    pub const fn row(lane: Lane, i: usize) -> u32 {
        lane.g + 8 * (i as u32 % 2)
    }

    /// Column of the low half of word `i`; the high half is the next.
    pub const fn column(lane: Lane, i: usize) -> u32 {
        2 * lane.t + 8 * (i as u32 / 2)
    }
}

/// A lane's words of B.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct B(pub [u32; 2]);

impl B {
    /// Row of the low half of word `i`; the high half is the next.
    pub const fn row(lane: Lane, i: usize) -> u32 {
        2 * lane.t + 8 * i as u32
    }

    /// Column of every word.
    pub const fn column(lane: Lane) -> u32 {
        lane.g
    }
}

/// A lane's values of the accumulator.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Accumulator(pub [f32; 4]);

impl Accumulator {
    /// Of zeros.
    pub const ZERO: Accumulator = Accumulator([0.0; 4]);

    /// The values of several.
    #[inline(always)]
    pub fn values<const N: usize>(all: &mut [Accumulator; N]) -> &mut [[f32; 4]; N] {
        // SAFETY: an `Accumulator` is its four values.
        unsafe { &mut *(all as *mut [Accumulator; N]).cast() }
    }

    /// Which of the lane's two rows value `i` lies in: 0 for `g`, 1 for `g + 8`.
    pub const fn row_half(i: usize) -> usize {
        i / 2
    }

    /// Which of the lane's two columns value `i` lies in: 0 for `2 t`, 1 for `2 t + 1`.
    pub const fn column_half(i: usize) -> usize {
        i % 2
    }

    /// Row of value `i`.
    pub const fn row(lane: Lane, i: usize) -> u32 {
        lane.g + 8 * Accumulator::row_half(i) as u32
    }

    /// Column of value `i`.
    pub const fn column(lane: Lane, i: usize) -> u32 {
        2 * lane.t + Accumulator::column_half(i) as u32
    }
}

/// `x` of the eight lanes that hold a column, reduced by `f`; the same bits in all of them.
///
/// *Convergence:* all 32 lanes.
///
/// # Safety
/// - All lanes of the warp call it.
#[track_caller]
pub unsafe fn over_rows(x: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let x = f(x, warp::shuffle_xor(warp::FULL, x, 4));
    let x = f(x, warp::shuffle_xor(warp::FULL, x, 8));
    f(x, warp::shuffle_xor(warp::FULL, x, 16))
}

/// `x` of the four lanes that hold a row, reduced by `f`; the same bits in all of them.
///
/// *Convergence:* all 32 lanes.
///
/// # Safety
/// - All lanes of the warp call it.
#[track_caller]
pub unsafe fn over_columns(x: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let x = f(x, warp::shuffle_xor(warp::FULL, x, 1));
    f(x, warp::shuffle_xor(warp::FULL, x, 2))
}
