//! Arithmetic as the GPU's instructions define it.

use half::{bf16, f16};

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// `ex2.approx.ftz.f32`
pub(crate) fn ex2(x: f32) -> f32 {
    flush(flush(x).exp2())
}

/// `lg2.approx.ftz.f32`
pub(crate) fn lg2(x: f32) -> f32 {
    flush(x).log2()
}

/// `rcp.approx.ftz.f32`
pub(crate) fn rcp(x: f32) -> f32 {
    flush(1.0 / flush(x))
}

/// `sqrt.rn.f32`
pub(crate) fn sqrt(x: f32) -> f32 {
    x.sqrt()
}

/// `sqrt.rn.f64`
pub(crate) fn sqrt_f64(x: f64) -> f64 {
    x.sqrt()
}

/// `fma.rn.f32`
pub(crate) fn fma(a: f32, b: f32, c: f32) -> f32 {
    a.mul_add(b, c)
}

/// The NaN that conversions to 16 bits give, whatever NaN went in.
const NAN_BITS: u16 = 0x7fff;

fn pack(lo: f32, hi: f32, convert: fn(f32) -> u16) -> u32 {
    let bits = |x: f32| if x.is_nan() { NAN_BITS } else { convert(x) } as u32;
    bits(lo) | bits(hi) << 16
}

/// `cvt.rn.f16x2.f32`
pub(crate) fn pack_f16(lo: f32, hi: f32) -> u32 {
    pack(lo, hi, |x| f16::from_f32(x).to_bits())
}

/// `cvt.rn.bf16x2.f32`
pub(crate) fn pack_bf16(lo: f32, hi: f32) -> u32 {
    pack(lo, hi, |x| bf16::from_f32(x).to_bits())
}

/// `fma.rn.f16x2` with a factor of 0; `sum` is of such.
pub(crate) fn add_times_zero_f16(sum: u32, pair: u32) -> u32 {
    add_times_zero(sum, pair, |bits| f16::from_bits(bits).is_finite())
}

/// `fma.rn.bf16x2` with a factor of 0.
pub(crate) fn add_times_zero_bf16(sum: u32, pair: u32) -> u32 {
    add_times_zero(sum, pair, |bits| bf16::from_bits(bits).is_finite())
}

fn add_times_zero(sum: u32, pair: u32, is_finite: fn(u16) -> bool) -> u32 {
    let half = |shift: u32| {
        let [sum, value] = [sum, pair].map(|word| (word >> shift) as u16);
        u32::from(if is_finite(value) { sum } else { 0x7fff }) << shift
    };
    half(0) | half(16)
}

/// `cvt.f32.f16`, twice
pub(crate) fn unpack_f16(pair: u32) -> [f32; 2] {
    [f16::from_bits(pair as u16).to_f32(), f16::from_bits((pair >> 16) as u16).to_f32()]
}
