//! Global memory: pointers, loads in the forms kernels need, stores, atomics.
//!
//! The pointers are 64-bit device addresses without `Deref`: a plain Rust dereference would become a generic access
//! instead of a global one on the GPU, and pass by the emulator's checks. They are as large as a raw pointer and go
//! into parameter structs as they are; a host makes them from a driver's address with [`GlobalPtr::from_addr`].

use core::fmt;
use core::marker::PhantomData;

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
use super::{data::Pod, imp};

/// Where a launch reads elements of `T`.
#[repr(transparent)]
pub struct GlobalPtr<T> {
    addr: u64,
    element: PhantomData<fn() -> T>,
}

/// Where a launch reads and writes elements of `T`.
#[repr(transparent)]
pub struct GlobalMut<T> {
    addr: u64,
    element: PhantomData<fn() -> T>,
}

impl<T> GlobalPtr<T> {
    /// The pointer of a device address.
    #[inline(always)]
    pub const fn from_addr(addr: u64) -> Self {
        GlobalPtr { addr, element: PhantomData }
    }

    /// The device address.
    #[inline(always)]
    pub const fn addr(self) -> u64 {
        self.addr
    }

    /// `count` elements further.
    #[inline(always)]
    #[allow(clippy::should_implement_trait)] // as the raw pointers' `add`
    pub const fn add(self, count: u64) -> Self {
        Self::from_addr(self.addr.wrapping_add(count.wrapping_mul(size_of::<T>() as u64)))
    }

    /// The same address, read as another type.
    #[inline(always)]
    pub const fn cast<U>(self) -> GlobalPtr<U> {
        GlobalPtr::from_addr(self.addr)
    }
}

impl<T> GlobalMut<T> {
    /// The pointer of a device address.
    #[inline(always)]
    pub const fn from_addr(addr: u64) -> Self {
        GlobalMut { addr, element: PhantomData }
    }

    /// The device address.
    #[inline(always)]
    pub const fn addr(self) -> u64 {
        self.addr
    }

    /// `count` elements further.
    #[inline(always)]
    #[allow(clippy::should_implement_trait)] // as the raw pointers' `add`
    pub const fn add(self, count: u64) -> Self {
        Self::from_addr(self.addr.wrapping_add(count.wrapping_mul(size_of::<T>() as u64)))
    }

    /// The same address, taken as another type.
    #[inline(always)]
    pub const fn cast<U>(self) -> GlobalMut<U> {
        GlobalMut::from_addr(self.addr)
    }

    /// The same place, for reading alone.
    #[inline(always)]
    pub const fn as_const(self) -> GlobalPtr<T> {
        GlobalPtr::from_addr(self.addr)
    }
}

impl<T> Clone for GlobalPtr<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for GlobalPtr<T> {}

impl<T> Clone for GlobalMut<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for GlobalMut<T> {}

impl<T> fmt::Debug for GlobalPtr<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GlobalPtr({:#x})", self.addr)
    }
}

impl<T> fmt::Debug for GlobalMut<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GlobalMut({:#x})", self.addr)
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
impl<T: Pod> GlobalPtr<T> {
    /// Loads one value (`ld.global`).
    ///
    /// # Safety
    /// - The value lies inside an allocation of the launch, at a multiple of its size.
    /// - No other thread writes it meanwhile.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load(self) -> T {
        imp::load_global(self.addr)
    }

    /// Loads one value through the read-only path, kept in L1 (`ld.global.nc`): tables that many threads read.
    ///
    /// # Safety
    /// - The value lies inside an allocation of the launch, at a multiple of its size.
    /// - Nothing writes it during the whole launch.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_cached(self) -> T {
        imp::load_global_cached(self.addr)
    }

    /// Loads one value through the read-only path without a place in L1 (`ld.global.nc.L1::no_allocate`): data that is
    /// read once.
    ///
    /// # Safety
    /// - As for [`GlobalPtr::load_cached`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_stream(self) -> T {
        imp::load_global_stream(self.addr)
    }

    /// [`GlobalPtr::load_stream`] that also has the 256 bytes around it brought to L2 (`.L2::256B`): rows of at least
    /// 256 bytes, read by several lanes in turn.
    ///
    /// # Safety
    /// - As for [`GlobalPtr::load_cached`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_stream_row(self) -> T {
        imp::load_global_stream_row(self.addr)
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
impl<T: Pod> GlobalMut<T> {
    /// Loads one value (`ld.global`).
    ///
    /// # Safety
    /// - As for [`GlobalPtr::load`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load(self) -> T {
        imp::load_global(self.addr)
    }

    /// Stores one value (`st.global`).
    ///
    /// # Safety
    /// - The value lies inside a writable allocation of the launch, at a multiple of its size.
    /// - No other thread reads or writes it meanwhile.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store(self, value: T) {
        imp::store_global(self.addr, value)
    }

    /// Stores one value that this launch does not read again, first to leave the caches (`st.global.cs`).
    ///
    /// # Safety
    /// - As for [`GlobalMut::store`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store_evict_first(self, value: T) {
        imp::store_global_evict_first(self.addr, value)
    }
}

/// Atomics on the whole device. Those without an order in their name are relaxed: they order nothing but themselves;
/// see [`fence`](super::grid::fence).
///
/// # Safety
/// For each: the word lies inside a writable allocation of the launch, at a multiple of 4, and no thread accesses it
/// other than atomically meanwhile.
#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
impl GlobalMut<u32> {
    /// Adds `value`, wrapping; returns what was there (`atom.global.add.u32`).
    ///
    /// # Safety
    /// - As for all atomics.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn atomic_add(self, value: u32) -> u32 {
        imp::atomic_add_global(self.addr, value)
    }

    /// Replaces the value by the larger of it and `value`; returns what was there (`atom.global.max.u32`).
    ///
    /// # Safety
    /// - As for all atomics.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn atomic_max(self, value: u32) -> u32 {
        imp::atomic_max_global(self.addr, value)
    }

    /// Replaces the value; returns what was there (`atom.global.exch.b32`).
    ///
    /// # Safety
    /// - As for all atomics.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn atomic_exchange(self, value: u32) -> u32 {
        imp::atomic_exchange_global(self.addr, value)
    }

    /// Replaces the value by `new` if it is `expected`; returns what was there (`atom.global.cas.b32`).
    ///
    /// # Safety
    /// - As for all atomics.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn atomic_compare_exchange(self, expected: u32, new: u32) -> u32 {
        imp::atomic_cas_global(self.addr, expected, new)
    }

    /// Counts up to `last` and then starts again at 0; returns what was there (`atom.global.inc.u32`).
    ///
    /// # Safety
    /// - As for all atomics.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn atomic_inc(self, last: u32) -> u32 {
        imp::atomic_inc_global(self.addr, last)
    }

    /// Reads the value; what its writer did before [`store_release`](Self::store_release) is visible afterwards
    /// (`ld.acquire.gpu.global.u32`).
    ///
    /// # Safety
    /// - As for all atomics.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_acquire(self) -> u32 {
        imp::load_acquire_global(self.addr)
    }

    /// Writes the value, after everything this thread did before (`st.release.gpu.global.u32`).
    ///
    /// # Safety
    /// - As for all atomics.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store_release(self, value: u32) {
        imp::store_release_global(self.addr, value)
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulator"))]
impl GlobalMut<f32> {
    /// Adds `value`; returns what was there (`atom.global.add.f32`). The order of additions is not fixed, so neither
    /// are the last bits of the sum.
    ///
    /// # Safety
    /// - As for all atomics.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn atomic_add(self, value: f32) -> f32 {
        imp::atomic_add_global_f32(self.addr, value)
    }
}
