//! Rotation of whole pieces: 16 bytes of a head at a time.
//!
//! A *unit* is two pieces of eight elements whose pairs lie all among themselves, so that whoever holds both can rotate them. Unit
//! `u` has the pairs `8 u ..`: of half-split ones a piece of first elements and the piece of their partners, of neighbours two
//! adjacent pieces; beyond the pairs that are rotated, two adjacent pieces. Together the units are the head.

use super::*;
use crate::common::element::Element;

/// Two pieces of a unit, four words each.
pub type Pieces = [[u32; 4]; 2];

/// Angles of a unit's pairs at a position, as they are loaded.
#[derive(Clone, Copy)]
pub struct UnitEntries([TwoEntries; 4]);

impl UnitEntries {
    /// Of no angles.
    pub const ZERO: UnitEntries = UnitEntries([TwoEntries::ZERO; 4]);

    /// The angles.
    #[inline(always)]
    pub fn angles(&self) -> UnitAngles {
        UnitAngles(self.0.map(|two| two.angles()))
    }
}

/// Angles of a unit's pairs.
#[derive(Clone, Copy)]
pub struct UnitAngles([[Angle; 2]; 4]);

impl RopeTables {
    /// Whether heads are rotated in units: there are pairs, and no piece or row of the tables is cut.
    pub fn has_units(&self) -> bool {
        let cut = if self.pairing == HALF_SPLIT { 8 } else { 2 };
        self.pairs > 0 && self.pairs.is_multiple_of(cut)
    }

    /// First elements of a unit's pieces.
    pub fn unit_pieces(&self, unit: u32) -> [u32; 2] {
        if self.pairing == HALF_SPLIT && 8 * unit < self.pairs {
            [8 * unit, 8 * unit + self.pairs]
        } else {
            [UNIT * unit, UNIT * unit + 8]
        }
    }

    /// Angles of a unit's pairs at `position`. Beyond the pairs that are rotated: some angles.
    ///
    /// # Safety
    /// - The tables are as described, 16-byte aligned, and cover `position`; [`has_units`](Self::has_units).
    #[track_caller]
    #[inline(always)]
    pub unsafe fn unit_entries(&self, unit: u32, position: u32) -> UnitEntries {
        let mut entries = UnitEntries::ZERO;
        for i in 0..4 {
            let pair = (8 * unit + 2 * i as u32).min(self.pairs.saturating_sub(2));
            entries.0[i] = self.two_entries(pair, position);
        }
        entries
    }

    /// A unit, rotated, times `scale`. Every element is computed in f32 and rounded once.
    #[inline(always)]
    pub fn turn_unit<T: Element>(
        &self,
        unit: u32,
        angles: &UnitAngles,
        scale: f32,
        pieces: Pieces,
    ) -> Pieces {
        let mut packed = [[0; 4]; 2];
        let turned = self.turned_values::<T>(unit, angles, pieces);
        for piece in 0..2 {
            for word in 0..4 {
                let [x, y] = [turned[piece][2 * word], turned[piece][2 * word + 1]];
                packed[piece][word] = T::pack(x * scale, y * scale);
            }
        }
        packed
    }

    /// The elements of a unit, rotated.
    #[inline(always)]
    pub fn turned_values<T: Element>(&self, unit: u32, angles: &UnitAngles, pieces: Pieces) -> [[f32; 8]; 2] {
        let [mut first, mut second] = values::<T>(pieces);
        let turn = |pair: u32, angle: Angle, x: f32, y: f32| {
            if pair < self.pairs { angle.turn((x, y)) } else { (x, y) }
        };
        if self.pairing == HALF_SPLIT {
            for i in 0..8 {
                let angle = angles.0[i / 2][i % 2];
                (first[i], second[i]) = turn(8 * unit + i as u32, angle, first[i], second[i]);
            }
        } else {
            for i in 0..4 {
                let (pair, [near, far]) =
                    (8 * unit + i as u32, [i / 2, 2 + i / 2].map(|j| angles.0[j][i % 2]));
                (first[2 * i], first[2 * i + 1]) = turn(pair, near, first[2 * i], first[2 * i + 1]);
                (second[2 * i], second[2 * i + 1]) = turn(pair + 4, far, second[2 * i], second[2 * i + 1]);
            }
        }
        [first, second]
    }
}

/// The elements of a unit.
#[inline(always)]
pub fn values<T: Element>(pieces: Pieces) -> [[f32; 8]; 2] {
    let mut values = [[0.0; 8]; 2];
    for piece in 0..2 {
        for word in 0..4 {
            [values[piece][2 * word], values[piece][2 * word + 1]] = T::unpack(pieces[piece][word]);
        }
    }
    values
}
