//! The storage types of keys, values and queries.

use super::fragment::{A, Accumulator, B};
use crate::simt::data::Pod;
use crate::simt::warpgroup::{self, Columns, Rows};
use crate::simt::{math, tensor};

/// A 16-bit float that caches are kept in. Everything is computed in f32.
pub trait Element: Pod + PartialEq + core::fmt::Debug {
    /// The name in entry points: `f16`, `bf16`.
    const NAME: &str;

    /// Whether the range is so narrow that rotated pairs of values may leave it: they are scaled by a power of two, then.
    const IS_NARROW: bool;

    /// The value, exactly.
    fn to_f32(self) -> f32;

    /// The nearest value, ties to even.
    fn from_f32(value: f32) -> Self;

    /// Two values as one word, `lo` in the low half; round to nearest even, NaN becomes 0x7fff.
    fn pack(lo: f32, hi: f32) -> u32;

    /// The two values of a word, low half first.
    fn unpack(pair: u32) -> [f32; 2];

    /// `sum + 0 * pair`, where `sum` is 0 at first: no longer 0 in the halves where a value so far was not finite.
    fn add_times_zero(sum: u32, pair: u32) -> u32;

    /// D += A·B on the tensor core; see [`fragment`](crate::common::fragment) for the layouts.
    ///
    /// *Convergence:* aligned; all 32 lanes.
    ///
    /// # Safety
    /// - All lanes of the warp call it through the same instruction.
    unsafe fn mma(d: &mut Accumulator, a: A, b: B);

    /// Starts D += A·B on the tensor cores of a warpgroup, or D = A·B without `ADDS`; see
    /// [`warpgroup`], and [`Columns`] for `BY_ROWS`.
    ///
    /// *Convergence:* aligned; all threads of the warpgroup.
    ///
    /// # Safety
    /// - As for [`warpgroup::mma_f16`].
    unsafe fn mma_of_warpgroup<const N: usize, const ADDS: bool, const BY_ROWS: bool>(
        d: &mut [[f32; 4]; N],
        a: A,
        b: Columns<Self>,
    );

    /// [`mma_of_warpgroup`](Self::mma_of_warpgroup) with A in shared memory.
    ///
    /// *Convergence:* aligned; all threads of the warpgroup.
    ///
    /// # Safety
    /// - As for [`warpgroup::mma_from_shared_f16`].
    unsafe fn mma_of_warpgroup_from_shared<const N: usize, const ADDS: bool, const BY_ROWS: bool>(
        d: &mut [[f32; 4]; N],
        a: Rows<Self>,
        b: Columns<Self>,
    );
}

impl Element for half::f16 {
    const NAME: &str = "f16";
    const IS_NARROW: bool = true;

    fn to_f32(self) -> f32 {
        #[cfg(target_arch = "nvptx64")]
        return math::unpack_f16(self.to_bits() as u32)[0];
        #[cfg(not(target_arch = "nvptx64"))]
        half::f16::to_f32(self)
    }

    fn from_f32(value: f32) -> Self {
        #[cfg(target_arch = "nvptx64")]
        return half::f16::from_bits(math::pack_f16(value, 0.0) as u16);
        #[cfg(not(target_arch = "nvptx64"))]
        half::f16::from_f32(value)
    }

    fn pack(lo: f32, hi: f32) -> u32 {
        math::pack_f16(lo, hi)
    }

    fn unpack(pair: u32) -> [f32; 2] {
        math::unpack_f16(pair)
    }

    fn add_times_zero(sum: u32, pair: u32) -> u32 {
        math::add_times_zero_f16(sum, pair)
    }

    #[track_caller]
    unsafe fn mma(d: &mut Accumulator, a: A, b: B) {
        tensor::mma_f16(&mut d.0, a.0, b.0)
    }

    #[inline(always)]
    #[track_caller]
    unsafe fn mma_of_warpgroup<const N: usize, const ADDS: bool, const BY_ROWS: bool>(
        d: &mut [[f32; 4]; N],
        a: A,
        b: Columns<Self>,
    ) {
        warpgroup::mma_f16::<Self, N, ADDS, BY_ROWS>(d, a.0, b)
    }

    #[inline(always)]
    #[track_caller]
    unsafe fn mma_of_warpgroup_from_shared<const N: usize, const ADDS: bool, const BY_ROWS: bool>(
        d: &mut [[f32; 4]; N],
        a: Rows<Self>,
        b: Columns<Self>,
    ) {
        warpgroup::mma_from_shared_f16::<Self, N, ADDS, BY_ROWS>(d, a, b)
    }
}

impl Element for half::bf16 {
    const NAME: &str = "bf16";
    const IS_NARROW: bool = false;

    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }

    fn from_f32(value: f32) -> Self {
        #[cfg(target_arch = "nvptx64")]
        return half::bf16::from_bits(math::pack_bf16(value, 0.0) as u16);
        #[cfg(not(target_arch = "nvptx64"))]
        half::bf16::from_f32(value)
    }

    fn pack(lo: f32, hi: f32) -> u32 {
        math::pack_bf16(lo, hi)
    }

    fn unpack(pair: u32) -> [f32; 2] {
        math::unpack_bf16(pair)
    }

    fn add_times_zero(sum: u32, pair: u32) -> u32 {
        math::add_times_zero_bf16(sum, pair)
    }

    #[track_caller]
    unsafe fn mma(d: &mut Accumulator, a: A, b: B) {
        tensor::mma_bf16(&mut d.0, a.0, b.0)
    }

    #[inline(always)]
    #[track_caller]
    unsafe fn mma_of_warpgroup<const N: usize, const ADDS: bool, const BY_ROWS: bool>(
        d: &mut [[f32; 4]; N],
        a: A,
        b: Columns<Self>,
    ) {
        warpgroup::mma_bf16::<Self, N, ADDS, BY_ROWS>(d, a.0, b)
    }

    #[inline(always)]
    #[track_caller]
    unsafe fn mma_of_warpgroup_from_shared<const N: usize, const ADDS: bool, const BY_ROWS: bool>(
        d: &mut [[f32; 4]; N],
        a: Rows<Self>,
        b: Columns<Self>,
    ) {
        warpgroup::mma_from_shared_bf16::<Self, N, ADDS, BY_ROWS>(d, a, b)
    }
}

/// Two values split in packed high halves and packed low halves, the remainders: together they keep 16 bits of mantissa (bf16) or
/// 22 (f16).
pub fn split<T: Element>(x: f32, y: f32) -> (u32, u32) {
    let high = T::pack(x, y);
    let [hx, hy] = T::unpack(high);
    // Beyond the type's range the high half is infinite, and there is no remainder.
    let rest = |x: f32, high: f32| if (x - high).is_finite() { x - high } else { 0.0 };
    (high, T::pack(rest(x, hx), rest(y, hy)))
}

/// As [`split`] of values that may leave the type's range: the high halves are those of the values times `scale`, a power of two
/// whose inverse is `inverse`; the low halves are not scaled, so that they lose nothing.
pub fn split_scaled<T: Element>(x: f32, y: f32, [scale, inverse]: [f32; 2]) -> (u32, u32) {
    let high = T::pack(x * scale, y * scale);
    let [hx, hy] = T::unpack(high);
    // Of an infinite value it is infinite or NaN, and so are its products, which `add_low` leaves out.
    (high, T::pack(math::fma(-hx, inverse, x), math::fma(-hy, inverse, y)))
}

/// `x` as a sum of two numbers of its sign, bits of each: one below it in magnitude, and the rest, nearest. Neither is 0, but for
/// the smallest numbers: so products of both with an infinite number are infinities of one sign, and can be added up together.
pub fn split_towards_zero<T: Element>(x: f32) -> [u16; 2] {
    let rest = |high: u16| T::pack(x - T::unpack(high as u32)[0], 0.0) as u16;
    let mut high = T::pack(x, 0.0) as u16;
    if !x.is_finite() {
        return [high, high];
    }
    // The magnitude's last bit. Where `high` is `x`, too, or so near that the rest would round to 0: the rest is then that bit and more.
    let is_too_large = T::unpack(high as u32)[0].abs() >= x.abs();
    if high & 0x7fff > 1 && (is_too_large || rest(high) & 0x7fff == 0) {
        high -= 1;
    }
    [high, rest(high)]
}

/// A product of high halves with that of low halves added. Where a key is infinite or NaN, the low halves (0, or of the
/// other sign) would say something else than the high ones, which decide alone.
pub fn add_low(high: f32, low: f32) -> f32 {
    high + if low.is_finite() { low } else { 0.0 }
}

/// Whether one of two packed values is infinite or NaN.
pub fn any_not_finite<T: Element>(pair: u32) -> bool {
    let [x, y] = T::unpack(pair);
    !(x.is_finite() && y.is_finite())
}
