//! The storage types of keys, values and queries.

use crate::simt::data::Pod;
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
use crate::simt::{math, tensor};

/// A 16-bit float that caches are kept in. Everything is computed in f32.
pub trait Element: Pod + PartialEq + core::fmt::Debug {
    /// The name in entry points: `f16`, `bf16`.
    const NAME: &str;

    /// The value, exactly.
    fn to_f32(self) -> f32;

    /// The nearest value, ties to even.
    fn from_f32(value: f32) -> Self;

    /// Two values as one word, `lo` in the low half; round to nearest even, NaN becomes 0x7fff.
    #[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
    fn pack(lo: f32, hi: f32) -> u32;

    /// The two values of a word, low half first.
    #[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
    fn unpack(pair: u32) -> [f32; 2];

    /// D += A·B on the tensor core; see [`tensor`] for the layouts.
    ///
    /// *Convergence:* aligned; all 32 lanes.
    ///
    /// # Safety
    /// - All lanes of the warp call it through the same instruction.
    #[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
    unsafe fn mma(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]);
}

impl Element for half::f16 {
    const NAME: &str = "f16";

    #[inline(always)]
    fn to_f32(self) -> f32 {
        #[cfg(target_arch = "nvptx64")]
        return math::unpack_f16(self.to_bits() as u32)[0];
        #[cfg(not(target_arch = "nvptx64"))]
        half::f16::to_f32(self)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        #[cfg(target_arch = "nvptx64")]
        return half::f16::from_bits(math::pack_f16(value, 0.0) as u16);
        #[cfg(not(target_arch = "nvptx64"))]
        half::f16::from_f32(value)
    }

    #[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
    #[inline(always)]
    fn pack(lo: f32, hi: f32) -> u32 {
        math::pack_f16(lo, hi)
    }

    #[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
    #[inline(always)]
    fn unpack(pair: u32) -> [f32; 2] {
        math::unpack_f16(pair)
    }

    #[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
    #[inline(always)]
    #[track_caller]
    unsafe fn mma(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
        tensor::mma_f16(d, a, b)
    }
}

impl Element for half::bf16 {
    const NAME: &str = "bf16";

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        #[cfg(target_arch = "nvptx64")]
        return half::bf16::from_bits(math::pack_bf16(value, 0.0) as u16);
        #[cfg(not(target_arch = "nvptx64"))]
        half::bf16::from_f32(value)
    }

    #[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
    #[inline(always)]
    fn pack(lo: f32, hi: f32) -> u32 {
        math::pack_bf16(lo, hi)
    }

    #[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
    #[inline(always)]
    fn unpack(pair: u32) -> [f32; 2] {
        math::unpack_bf16(pair)
    }

    #[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
    #[inline(always)]
    #[track_caller]
    unsafe fn mma(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
        tensor::mma_bf16(d, a, b)
    }
}
