//! Rotary position embedding from two short tables.
//!
//! `angle(p) = angle(FINE * (p / FINE)) + angle(p % FINE)`, and the rotation of a sum is the product of the rotations:
//! an entry of each table gives any position's cosines and sines, for a million positions within 2e-7 of exact ones. The
//! host makes the tables in f64, with every frequency scaling and attention factor already in them.

use crate::simt::data::V2;
use crate::simt::global::GlobalPtr;

#[cfg(feature = "kernels")]
mod rotate;
#[cfg(feature = "kernels")]
mod units;
#[cfg(feature = "kernels")]
pub use {rotate::*, units::*};

/// Positions that the fine table covers.
pub const FINE: u32 = 256;

/// Elements that are rotated together where 16 bytes are moved at a time: two pieces of eight.
pub const UNIT: u32 = 16;

/// Pairing: nothing is rotated.
pub const NATIVE: u32 = 0;
/// Pairing: element `i` is rotated with `i + pairs` (Llama, Qwen).
pub const HALF_SPLIT: u32 = 1;
/// Pairing: element `2 i` is rotated with `2 i + 1` (GPT-J).
pub const INTERLEAVED: u32 = 2;
/// No pairing, but what a kernel does that serves either, of any number of pairs.
pub const ANY_PAIRS: u32 = 3;

/// The tables, and what is rotated.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct RopeTables {
    /// \[positions / FINE, pairs\] (cos, sin) of positions that are multiples of `FINE`. Address 0: nothing is rotated.
    pub coarse: GlobalPtr<V2<f32>>,
    /// \[FINE, pairs\] (cos, sin), times the attention factor.
    pub fine: GlobalPtr<V2<f32>>,
    /// Rotated pairs of a head, at most `head_dim / 2`.
    pub pairs: u32,
    /// [`NATIVE`], [`HALF_SPLIT`] or [`INTERLEAVED`].
    pub pairing: u32,
}
const _: () = assert!(size_of::<RopeTables>() == 24);

impl RopeTables {
    /// Tables that rotate nothing.
    pub const fn none() -> Self {
        RopeTables {
            coarse: GlobalPtr::from_addr(0),
            fine: GlobalPtr::from_addr(0),
            pairs: 0,
            pairing: NATIVE,
        }
    }

    /// The two elements of pair `pair` of a head; beyond the rotated pairs, adjacent elements.
    pub fn elements(&self, pair: u32) -> (u32, u32) {
        if pair < self.pairs && self.pairing == HALF_SPLIT {
            (pair, pair + self.pairs)
        } else {
            (2 * pair, 2 * pair + 1)
        }
    }

    /// The same, but of half-split pairs, elements beyond the rotated ones are paired half-split, too: the pairs `0..pairs` and
    /// `pairs..head_dim / 2` are two runs, in which both elements ascend by one.
    pub fn elements_in_runs(&self, pair: u32, head_dim: u32) -> (u32, u32) {
        match self.pairing {
            HALF_SPLIT if pair < self.pairs => (pair, pair + self.pairs),
            HALF_SPLIT => (pair + self.pairs, pair + head_dim / 2),
            _ => (2 * pair, 2 * pair + 1),
        }
    }
}
