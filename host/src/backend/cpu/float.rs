//! Widening of stored elements to f32 and narrowing of results.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::tensor::Element;

/// An element type that keys, values and queries may have.
pub(super) trait Float: Element {
    /// Converts exactly; the slices have the same length.
    fn widen(from: &[Self], to: &mut [f32]);

    /// Rounds to nearest, ties to even; the slices have the same length.
    fn narrow(from: &[f32], to: &mut [Self]);
}

impl Float for f32 {
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
}

impl Float for bf16 {
    /// A shift, which vectorises where the library's conversion, quieting NaN, does not.
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }

    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

impl Float for f16 {
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}
