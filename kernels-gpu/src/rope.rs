//! Rotary position embedding from two short tables.
//!
//! `angle(p) = angle(FINE * (p / FINE)) + angle(p % FINE)`, and the rotation of a sum is the product of the rotations:
//! two table rows give any position's cosines and sines, for a million positions within 2e-7 of exact ones. The host
//! makes the tables in f64, with every frequency scaling and attention factor already in them.

use crate::simt::data::V2;
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
use crate::simt::data::V4;
use crate::simt::global::GlobalPtr;

/// Positions that the fine table covers.
pub const FINE: u32 = 256;

/// Which elements form a rotated pair.
pub const HALF_SPLIT: u32 = 0;
/// `2 i` with `2 i + 1`; [`HALF_SPLIT`] is `i` with `i + pairs`.
pub const INTERLEAVED: u32 = 1;

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
    /// [`HALF_SPLIT`] or [`INTERLEAVED`].
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
            pairing: HALF_SPLIT,
        }
    }

    /// Whether [`attend_decode`](mod@crate::attend_decode) finds both elements of every pair in one lane, two pairs at a
    /// time: neighbours, or the halves of the whole head. Nothing to rotate will do, too.
    #[inline(always)]
    pub const fn pairs_in_lane(&self, head_dim: u32) -> bool {
        let whole = 2 * self.pairs == head_dim;
        let even = self.pairs.is_multiple_of(2) && self.pairs != 0;
        self.coarse.addr() == 0 || (even && (whole || self.pairing == INTERLEAVED))
    }

    /// The two elements of pair `pair` of a head; beyond the rotated pairs, neighbours.
    #[inline(always)]
    pub fn elements(&self, pair: u32) -> (u32, u32) {
        if pair < self.pairs && self.pairing == HALF_SPLIT {
            (pair, pair + self.pairs)
        } else {
            (2 * pair, 2 * pair + 1)
        }
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
impl RopeTables {
    /// `(x, y)`, the elements of pair `pair`, rotated as at `position`.
    ///
    /// # Safety
    /// - The tables are as described and cover `position`.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn rotate(&self, pair: u32, position: u32, (x, y): (f32, f32)) -> (f32, f32) {
        if pair >= self.pairs {
            return (x, y);
        }
        let row = |position: u32| position as u64 * self.pairs as u64 + pair as u64;
        let coarse = self.coarse.add(row(position / FINE)).load_cached().0;
        let fine = self.fine.add(row(position % FINE)).load_cached().0;
        Angle::sum(coarse, fine).turn((x, y))
    }

    /// Angles of the pairs `pair`, which is even, and `pair + 1` at `position`. Beyond the pairs that are rotated: of the
    /// last.
    ///
    /// # Safety
    /// - As for [`two_rows`](Self::two_rows).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn two_angles(&self, pair: u32, position: u32) -> [Angle; 2] {
        self.two_rows(pair, position).angles()
    }

    /// What the tables say of the pairs `pair`, which is even, and `pair + 1` at `position`.
    ///
    /// # Safety
    /// - The tables are as described, 16-byte aligned, cover `position`, and have an even number of pairs, at least two.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn two_rows(&self, pair: u32, position: u32) -> TwoRows {
        let row = |position: u32| (position as u64 * self.pairs as u64 + pair as u64) / 2;
        TwoRows {
            coarse: self.coarse.cast::<V4<f32>>().add(row(position / FINE)).load_cached().0,
            fine: self.fine.cast::<V4<f32>>().add(row(position % FINE)).load_cached().0,
        }
    }
}

/// Entries of both tables for two pairs, (cos, sin) each: loaded, and not yet used.
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
#[derive(Clone, Copy)]
pub struct TwoRows {
    coarse: [f32; 4],
    fine: [f32; 4],
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
impl TwoRows {
    /// Of no angle.
    pub const ZERO: TwoRows = TwoRows { coarse: [0.0; 4], fine: [0.0; 4] };

    /// The two angles.
    #[inline(always)]
    pub fn angles(&self) -> [Angle; 2] {
        let ([c0, s0, c1, s1], fine) = (self.coarse, self.fine);
        [Angle::sum([c0, s0], [fine[0], fine[1]]), Angle::sum([c1, s1], [fine[2], fine[3]])]
    }
}

/// Cosine and sine.
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
#[derive(Clone, Copy)]
pub struct Angle {
    cos: f32,
    sin: f32,
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
impl Angle {
    /// The sum of two angles given as (cos, sin).
    #[inline(always)]
    fn sum([c0, s0]: [f32; 2], [c1, s1]: [f32; 2]) -> Self {
        Angle { cos: c0 * c1 - s0 * s1, sin: s0 * c1 + c0 * s1 }
    }

    /// A pair, rotated.
    #[inline(always)]
    pub fn turn(self, (x, y): (f32, f32)) -> (f32, f32) {
        (x * self.cos - y * self.sin, y * self.cos + x * self.sin)
    }
}
