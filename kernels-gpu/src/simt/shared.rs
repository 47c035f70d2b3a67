//! Shared memory: a layout described once, typed arrays in it, loads, stores and atomics.
//!
//! A kernel's layout is a struct of [`Region`]s, made by a `const fn` from a [`Carve`]. The kernel takes its arrays
//! from it, the launch its byte count, so the two cannot disagree:
//! ```
//! use tokenselect_kernels::simt::shared::{Carve, Region};
//!
//! struct Layout {
//!     keys: Region<u32>,
//!     sums: Region<f32>,
//!     bytes: u32,
//! }
//!
//! impl Layout {
//!     const fn new(warps: u32) -> Layout {
//!         let mut carve = Carve::new();
//!         Layout {
//!             keys: carve.array(warps * 64, 128),
//!             sums: carve.array(warps, 4),
//!             bytes: carve.bytes(),
//!         }
//!     }
//! }
//!
//! const LAYOUT: Layout = Layout::new(8);
//! assert_eq!((LAYOUT.sums.offset(), LAYOUT.bytes), (2048, 2080));
//! ```

use core::fmt;
use core::marker::PhantomData;

use super::data::Pod;

#[cfg(feature = "kernels")]
mod access;

/// Alignment of the whole of shared memory, and the largest a [`Region`] can ask for (128-byte swizzled tiles of bulk
/// copies need 1024).
pub const MAX_ALIGN: u32 = 1024;

/// Hands out shared memory from offset 0 upwards.
#[derive(Clone, Copy, Debug, Default)]
pub struct Carve {
    bytes: u32,
}

impl Carve {
    /// Nothing handed out yet.
    pub const fn new() -> Carve {
        Carve { bytes: 0 }
    }

    /// The first `bytes` are somebody else's.
    pub const fn after(bytes: u32) -> Carve {
        Carve { bytes }
    }

    /// The next `len` elements, starting at a multiple of `align` bytes.
    ///
    /// # Panics
    /// If `align` is no power of two, smaller than the element or larger than [`MAX_ALIGN`], or if the sum passes 2³².
    /// In a `const` layout that is a compile error.
    pub const fn array<T: Pod>(&mut self, len: u32, align: u32) -> Region<T> {
        assert!(align.is_power_of_two() && align <= MAX_ALIGN, "not an alignment of shared memory");
        assert!(align as usize >= align_of::<T>(), "alignment smaller than the element's");
        let offset = self.bytes as u64 + (align as u64 - self.bytes as u64 % align as u64) % align as u64;
        let end = offset + len as u64 * size_of::<T>() as u64;
        assert!(end <= u32::MAX as u64, "shared memory larger than 4 GiB");
        self.bytes = end as u32;
        Region { offset: offset as u32, len, element: PhantomData }
    }

    /// Bytes handed out so far, padding included: the launch's `shared_bytes`.
    pub const fn bytes(&self) -> u32 {
        self.bytes
    }
}

/// The place of one array in shared memory.
pub struct Region<T> {
    offset: u32,
    len: u32,
    element: PhantomData<fn() -> T>,
}

impl<T: Pod> Region<T> {
    /// First byte, from the start of the launch's shared memory.
    pub const fn offset(&self) -> u32 {
        self.offset
    }

    /// Number of elements.
    pub const fn len(&self) -> u32 {
        self.len
    }

    /// Whether it holds no element.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of bytes.
    pub const fn bytes(&self) -> u32 {
        self.len * size_of::<T>() as u32
    }
}

impl<T> Clone for Region<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Region<T> {}

impl<T> fmt::Debug for Region<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region {{ offset: {}, len: {} }}", self.offset, self.len)
    }
}

/// A pointer into one array of shared memory.
///
/// It carries the bounds of its array. The GPU ignores them (the compiler drops the fields); the emulator checks every
/// access against them, so running from one array into the next is reported although the byte exists.
pub struct Shared<T> {
    addr: u32,
    begin: u32,
    end: u32,
    element: PhantomData<fn() -> T>,
}

impl<T> Clone for Shared<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<T> {}

impl<T> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shared({} in {}..{})", self.addr, self.begin, self.end)
    }
}
