//! Arithmetic that `core` lacks or spells differently: fast exponentials, explicit fused multiply-add, packed
//! conversions.
//!
//! Results of the approximations may differ in the last bits between a GPU and the emulator; each function's bound
//! holds on both.

use super::imp;

/// 2^x, subnormal inputs and results flushed to 0; relative error below 2^-22 (`ex2.approx.ftz.f32`).
#[inline(always)]
pub fn ex2(x: f32) -> f32 {
    imp::ex2(x)
}

/// log2(x), subnormal inputs taken as 0; absolute error below 2^-22 for x in (0.5, 2), relative elsewhere
/// (`lg2.approx.ftz.f32`).
#[inline(always)]
pub fn lg2(x: f32) -> f32 {
    imp::lg2(x)
}

/// 1/x, subnormal inputs and results flushed to 0; at most 1 unit in the last place off (`rcp.approx.ftz.f32`).
#[inline(always)]
pub fn rcp(x: f32) -> f32 {
    imp::rcp(x)
}

/// The square root, rounded to nearest (`sqrt.rn.f32`).
#[inline(always)]
pub fn sqrt(x: f32) -> f32 {
    imp::sqrt(x)
}

/// The square root, rounded to nearest (`sqrt.rn.f64`).
#[inline(always)]
pub fn sqrt_f64(x: f64) -> f64 {
    imp::sqrt_f64(x)
}

/// a·b + c, rounded once (`fma.rn.f32`). The compiler never contracts `a * b + c` by itself.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    imp::fma(a, b, c)
}

/// Two values as f16, `lo` in the low half; round to nearest even, NaN becomes 0x7fff (`cvt.rn.f16x2.f32`).
#[inline(always)]
pub fn pack_f16(lo: f32, hi: f32) -> u32 {
    imp::pack_f16(lo, hi)
}

/// Two values as bf16, `lo` in the low half; round to nearest even, NaN becomes 0x7fff (`cvt.rn.bf16x2.f32`).
#[inline(always)]
pub fn pack_bf16(lo: f32, hi: f32) -> u32 {
    imp::pack_bf16(lo, hi)
}

/// `sum + 0 * pair` of two f16 each, where `sum` is 0 at first: NaN where one of the values so far was infinite or NaN, 0 elsewhere
/// (`fma.rn.f16x2`).
#[inline(always)]
pub fn add_times_zero_f16(sum: u32, pair: u32) -> u32 {
    imp::add_times_zero_f16(sum, pair)
}

/// [`add_times_zero_f16`] of bf16 (`fma.rn.bf16x2`).
#[inline(always)]
pub fn add_times_zero_bf16(sum: u32, pair: u32) -> u32 {
    imp::add_times_zero_bf16(sum, pair)
}

/// The two f16 of a word, low half first; exact (`cvt.f32.f16`).
#[inline(always)]
pub fn unpack_f16(pair: u32) -> [f32; 2] {
    imp::unpack_f16(pair)
}

/// The two bf16 of a word, low half first; exact (a shift and a mask).
#[inline(always)]
pub fn unpack_bf16(pair: u32) -> [f32; 2] {
    [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)]
}
