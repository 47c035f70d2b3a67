//! Loads in the forms kernels need, stores, atomics.

use super::{GlobalMut, GlobalPtr};
use crate::simt::data::Pod;
use crate::simt::imp;

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

    /// [`load`](Self::load) without a place in L1 (`ld.global.L1::no_allocate`): data that is read once.
    ///
    /// # Safety
    /// - As for [`load`](Self::load).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_once(self) -> T {
        imp::load_global_once(self.addr)
    }

    /// [`load`](Self::load) of a value that is *settled*: written by nobody from when its address is known. The compiler may move
    /// it to any place behind the load that its address comes from, past stores and barriers.
    ///
    /// # Safety
    /// - As for [`load`](Self::load).
    /// - The address depends on a value that was loaded behind all that orders this load, such as
    ///   [`wait_for_previous`](crate::simt::grid::wait_for_previous).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_settled(self) -> T {
        imp::load_global_settled(self.addr)
    }

    /// Loads one value that is constant while the kernel runs, through the non-coherent path (`ld.global.nc`): tables that many
    /// threads read. The compiler may move it to before [`wait_for_previous`](crate::simt::grid::wait_for_previous).
    ///
    /// # Safety
    /// - The value lies inside an allocation of the launch, at a multiple of its size.
    /// - Nothing writes it from the kernel's first instruction to its last: neither this launch nor one that is still at work when
    ///   it begins ([`overlap`](crate::common::overlap)).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_constant(self) -> T {
        imp::load_global_constant(self.addr)
    }

    /// [`load_constant`](Self::load_constant) without a place in L1 (`ld.global.nc.L1::no_allocate`): data that is read once.
    ///
    /// # Safety
    /// - As for [`load_constant`](Self::load_constant).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_constant_once(self) -> T {
        imp::load_global_constant_once(self.addr)
    }

    /// [`load_constant_once`](Self::load_constant_once) that also has the 256 bytes around it brought to L2 (`.L2::256B`).
    ///
    /// # Safety
    /// - As for [`load_constant`](Self::load_constant).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_constant_row(self) -> T {
        imp::load_global_constant_row(self.addr)
    }
}

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
/// see [`fence`](crate::simt::grid::fence).
///
/// # Safety
/// For each: the word lies inside a writable allocation of the launch, at a multiple of 4, and no thread accesses it
/// other than atomically meanwhile.
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

impl GlobalMut<f32> {
    /// Adds `value`, rounding to nearest, and does not wait (`red.global.add.f32`).
    ///
    /// # Safety
    /// - As for all atomics.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn reduce_add(self, value: f32) {
        imp::reduce_add_global_f32(self.addr, value)
    }

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
