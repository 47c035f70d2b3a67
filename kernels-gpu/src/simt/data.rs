//! What can lie in memory and in a register: [`Pod`] for loads and stores, [`Word`] for shuffles.

mod sealed {
    pub trait Sealed {}
}
use sealed::Sealed;

/// A value of 2, 4, 8 or 16 bytes, aligned to its size, for which every bit pattern is valid: what one load or store
/// instruction moves.
///
/// # Safety
/// Sealed: implemented here for the types that keep this promise.
pub unsafe trait Pod: Copy + Sealed + 'static {}

/// A 32-bit register, what a shuffle moves. Sealed.
pub trait Word: Pod {
    /// The bits of the value.
    fn to_word(self) -> u32;
    /// The value of the bits.
    fn from_word(bits: u32) -> Self;
}

/// Two 4-byte values, moved by one 8-byte access.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(8))]
pub struct V2<T>(pub [T; 2]);

/// Four 4-byte values, moved by one 16-byte access.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(16))]
pub struct V4<T>(pub [T; 4]);

macro_rules! pod {
    ($($t:ty)*) => { $(
        impl Sealed for $t {}
        // SAFETY: plain bits, and the size is one that a single instruction moves.
        unsafe impl Pod for $t {}
        const _: () = assert!(matches!(size_of::<$t>(), 2 | 4 | 8 | 16) && align_of::<$t>() == size_of::<$t>());
    )* };
}
pod!(u16 i16 half::f16 half::bf16 u32 i32 f32 u64 i64 f64 V2<u32> V2<f32> V4<u32> V4<f32>);

impl Word for u32 {
    #[inline(always)]
    fn to_word(self) -> u32 {
        self
    }
    #[inline(always)]
    fn from_word(bits: u32) -> u32 {
        bits
    }
}

impl Word for i32 {
    #[inline(always)]
    fn to_word(self) -> u32 {
        self as u32
    }
    #[inline(always)]
    fn from_word(bits: u32) -> i32 {
        bits as i32
    }
}

impl Word for f32 {
    #[inline(always)]
    fn to_word(self) -> u32 {
        self.to_bits()
    }
    #[inline(always)]
    fn from_word(bits: u32) -> f32 {
        f32::from_bits(bits)
    }
}
