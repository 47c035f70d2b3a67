//! Rotation of pairs.

use super::*;
use crate::simt::data::V4;

impl RopeTables {
    /// `(x, y)`, the elements of pair `pair`, rotated as at `position`.
    ///
    /// # Safety
    /// - The tables are as described and cover `position`.
    #[track_caller]
    pub unsafe fn rotate(&self, pair: u32, position: u32, (x, y): (f32, f32)) -> (f32, f32) {
        if pair >= self.pairs {
            return (x, y);
        }
        let entry = |position: u32| position as u64 * self.pairs as u64 + pair as u64;
        let coarse = self.coarse.add(entry(position / FINE)).load_constant().0;
        let fine = self.fine.add(entry(position % FINE)).load_constant().0;
        Angle::sum(coarse, fine).turn((x, y))
    }

    /// Angles of the pairs `pair`, which is even, and `pair + 1` at `position`. Beyond the pairs that are rotated: of the
    /// last.
    ///
    /// # Safety
    /// - As for [`two_entries`](Self::two_entries).
    #[track_caller]
    pub unsafe fn two_angles(&self, pair: u32, position: u32) -> [Angle; 2] {
        self.two_entries(pair, position).angles()
    }

    /// Angles of the pairs `pair`, which is even, and `pair + 1` at `position`, of any number of pairs. Beyond those that are
    /// rotated: some angles.
    ///
    /// # Safety
    /// - The tables are as described, 16-byte aligned, cover `position`, and have a pair.
    #[track_caller]
    pub unsafe fn two_angles_of_any(&self, pair: u32, position: u32) -> [Angle; 2] {
        if self.pairs.is_multiple_of(2) {
            return self.two_angles(pair.min(self.pairs.saturating_sub(2)), position);
        }
        // Every other row of the tables is not aligned for two entries.
        let last = self.pairs.saturating_sub(1);
        [self.angle(pair.min(last), position), self.angle((pair + 1).min(last), position)]
    }

    /// Angle of a pair at `position`.
    #[track_caller]
    unsafe fn angle(&self, pair: u32, position: u32) -> Angle {
        let entry = |position: u32| position as u64 * self.pairs as u64 + pair as u64;
        let coarse = self.coarse.add(entry(position / FINE)).load_constant().0;
        let fine = self.fine.add(entry(position % FINE)).load_constant().0;
        Angle::sum(coarse, fine)
    }

    /// Entries of both tables for the pairs `pair`, which is even, and `pair + 1` at `position`.
    ///
    /// # Safety
    /// - The tables are as described, 16-byte aligned, cover `position`, and have an even number of pairs, at least two.
    #[track_caller]
    pub unsafe fn two_entries(&self, pair: u32, position: u32) -> TwoEntries {
        let entry = |position: u32| (position as u64 * self.pairs as u64 + pair as u64) / 2;
        TwoEntries {
            coarse: self.coarse.cast::<V4<f32>>().add(entry(position / FINE)).load_constant().0,
            fine: self.fine.cast::<V4<f32>>().add(entry(position % FINE)).load_constant().0,
        }
    }
}

/// Entries of both tables for two pairs, (cos, sin) each, as they are loaded.
#[derive(Clone, Copy)]
pub struct TwoEntries {
    coarse: [f32; 4],
    fine: [f32; 4],
}

impl TwoEntries {
    /// Of no angle.
    pub const ZERO: TwoEntries = TwoEntries { coarse: [0.0; 4], fine: [0.0; 4] };

    /// The two angles.
    pub fn angles(&self) -> [Angle; 2] {
        let ([c0, s0, c1, s1], fine) = (self.coarse, self.fine);
        [Angle::sum([c0, s0], [fine[0], fine[1]]), Angle::sum([c1, s1], [fine[2], fine[3]])]
    }
}

/// Cosine and sine.
#[derive(Clone, Copy)]
pub struct Angle {
    cos: f32,
    sin: f32,
}

impl Angle {
    /// The sum of two angles given as (cos, sin).
    fn sum([c0, s0]: [f32; 2], [c1, s1]: [f32; 2]) -> Self {
        Angle { cos: c0 * c1 - s0 * s1, sin: s0 * c1 + c0 * s1 }
    }

    /// A pair, rotated.
    pub fn turn(self, (x, y): (f32, f32)) -> (f32, f32) {
        (x * self.cos - y * self.sin, y * self.cos + x * self.sin)
    }
}
