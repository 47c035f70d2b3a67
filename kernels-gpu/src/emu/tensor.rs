//! `ldmatrix` and `mma`: the fragment layouts of the PTX ISA, gathered, computed and scattered.

use super::access::Access;
use super::block::{Block, Lane};
use super::report::Site;
use crate::simt::math;

impl Block {
    /// `ldmatrix.x4` of the warp that begins with thread `first`. Words: address and bounds of the lane's row.
    pub fn ldmatrix(&mut self, first: usize, trans: bool, site: Site) {
        let mut out = [[0u32; 4]; 32];
        for lane in 0..32 {
            let (tile, row) = (lane / 8, lane % 8);
            let [addr, begin, end, ..] = self.lanes[first + lane].words;
            let bounds = (begin, end);
            let host = self.shared_access(first + lane, addr, bounds, 16, Access::Read, site);
            // SAFETY: `shared_access` returned the address of 16 bytes, aligned to 16.
            let values = unsafe { host.cast::<[u16; 8]>().read() };
            for (column, value) in values.into_iter().enumerate() {
                let (r, c) = if trans { (column, row) } else { (row, column) };
                out[r * 4 + c / 2][tile] |= (value as u32) << (16 * (c % 2));
            }
        }
        for (lane, words) in out.into_iter().enumerate() {
            self.lanes[first + lane].words[..4].copy_from_slice(&words);
        }
    }
}

pub(crate) fn mma_f16(lanes: &mut [Lane]) {
    mma(lanes, math::unpack_f16)
}

pub(crate) fn mma_bf16(lanes: &mut [Lane]) {
    mma(lanes, math::unpack_bf16)
}

/// D += A·B for the 32 lanes of a warp. Words: d\[0..4\], a\[0..4\], b\[0..2\].
#[inline(always)]
fn mma(lanes: &mut [Lane], unpack: impl Fn(u32) -> [f32; 2]) {
    let (mut a, mut b, mut d) = ([[0f32; 16]; 16], [[0f32; 8]; 16], [[0f32; 8]; 16]);
    for (lane, Lane { words, .. }) in lanes.iter().enumerate() {
        let (g, t) = (lane / 4, lane % 4);
        for i in 0..4 {
            d[g + i / 2 * 8][2 * t + i % 2] = f32::from_bits(words[i]);
            let (row, column) = (g + i % 2 * 8, 2 * t + i / 2 * 8);
            [a[row][column], a[row][column + 1]] = unpack(words[4 + i]);
        }
        for i in 0..2 {
            [b[2 * t + i * 8][g], b[2 * t + i * 8 + 1][g]] = unpack(words[8 + i]);
        }
    }
    for (a_row, d_row) in a.iter().zip(&mut d) {
        for (a, b_row) in a_row.iter().zip(&b) {
            for (d, b) in d_row.iter_mut().zip(b_row) {
                *d += a * b;
            }
        }
    }
    for (lane, Lane { words, .. }) in lanes.iter_mut().enumerate() {
        for (i, word) in words[..4].iter_mut().enumerate() {
            *word = d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2].to_bits();
        }
    }
}
