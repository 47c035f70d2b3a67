//! An array of the block that runs: loads, stores and atomics.

use core::marker::PhantomData;

use super::{Region, Shared};
use crate::simt::data::Pod;
use crate::simt::imp;

impl<T: Pod> Region<T> {
    /// The array itself, for the block that runs.
    #[inline(always)]
    pub fn get(self) -> Shared<T> {
        let base = imp::shared_base();
        let addr = base + self.offset;
        Shared { addr, begin: addr, end: addr + self.bytes(), element: PhantomData }
    }
}

impl<T: Pod> Shared<T> {
    /// The address in the shared window, as instructions take it.
    #[inline(always)]
    pub fn addr(self) -> u32 {
        self.addr
    }

    /// The array's first and last byte + 1, in the shared window.
    #[cfg(feature = "emulator")]
    #[inline(always)]
    pub(in crate::simt) fn bounds(self) -> (u32, u32) {
        (self.begin, self.end)
    }

    /// `count` elements further.
    #[inline(always)]
    #[allow(clippy::should_implement_trait)] // as the raw pointers' `add`
    pub fn add(self, count: u32) -> Shared<T> {
        Shared { addr: self.addr.wrapping_add(count.wrapping_mul(size_of::<T>() as u32)), ..self }
    }

    /// `count` bytes further: for swizzled tiles, whose rows are counted in bytes.
    #[inline(always)]
    pub fn byte_add(self, count: u32) -> Shared<T> {
        Shared { addr: self.addr.wrapping_add(count), ..self }
    }

    /// The same address, read as another type.
    #[inline(always)]
    pub fn cast<U: Pod>(self) -> Shared<U> {
        Shared { addr: self.addr, begin: self.begin, end: self.end, element: PhantomData }
    }

    /// Loads one value (`ld.shared`, one instruction up to 16 bytes).
    ///
    /// # Safety
    /// - The value lies inside the pointer's array, at a multiple of its size.
    /// - It was written before, and a barrier or [`sync_warp`](crate::simt::warp::sync_warp) lies between that and this if
    ///   another thread wrote it.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load(self) -> T {
        imp::load_shared(self)
    }

    /// Stores one value (`st.shared`, one instruction up to 16 bytes).
    ///
    /// # Safety
    /// - The value lies inside the pointer's array, at a multiple of its size.
    /// - A barrier or [`sync_warp`](crate::simt::warp::sync_warp) lies between this and any access by another thread.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store(self, value: T) {
        imp::store_shared(self, value)
    }
}

impl Shared<u32> {
    /// Adds `value`, wrapping, and returns what was there (`atom.shared.add.u32`).
    ///
    /// # Safety
    /// - As for [`Shared::load`], but other threads' atomics need no barrier in between.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn atomic_add(self, value: u32) -> u32 {
        imp::atomic_add_shared(self, value)
    }

    /// Replaces the value by the larger of it and `value`; returns what was there (`atom.shared.max.u32`).
    ///
    /// # Safety
    /// - As for [`Shared::atomic_add`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn atomic_max(self, value: u32) -> u32 {
        imp::atomic_max_shared(self, value)
    }
}
