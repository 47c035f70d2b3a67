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
        [first, second]: Pieces,
    ) -> Pieces {
        let (mut turned_first, mut turned_second) = ([0; 4], [0; 4]);
        let turn = |pair: u32, angle: Angle, x: f32, y: f32| {
            let (x, y) = if pair < self.pairs { angle.turn((x, y)) } else { (x, y) };
            [x * scale, y * scale]
        };
        if self.pairing == HALF_SPLIT {
            for word in 0..4 {
                let ([x0, x1], [y0, y1]) = (T::unpack(first[word]), T::unpack(second[word]));
                let pair = 8 * unit + 2 * word as u32;
                let [x0, y0] = turn(pair, angles.0[word][0], x0, y0);
                let [x1, y1] = turn(pair + 1, angles.0[word][1], x1, y1);
                turned_first[word] = T::pack(x0, x1);
                turned_second[word] = T::pack(y0, y1);
            }
        } else {
            for word in 0..4 {
                let pair = 8 * unit + word as u32;
                let ([x, y], [z, w]) = (T::unpack(first[word]), T::unpack(second[word]));
                let [x, y] = turn(pair, angles.0[word / 2][word % 2], x, y);
                let [z, w] = turn(pair + 4, angles.0[2 + word / 2][word % 2], z, w);
                turned_first[word] = T::pack(x, y);
                turned_second[word] = T::pack(z, w);
            }
        }
        [turned_first, turned_second]
    }
}
