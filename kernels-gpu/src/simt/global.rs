//! Global memory: pointers, loads in the forms kernels need, stores, atomics.
//!
//! The pointers are 64-bit device addresses without `Deref`: a plain Rust dereference would become a generic access
//! instead of a global one on the GPU, and pass by the emulator's checks. They are as large as a raw pointer and go
//! into parameter structs as they are; a host makes them from a driver's address with [`GlobalPtr::from_addr`].

use core::fmt;
use core::marker::PhantomData;

#[cfg(feature = "kernels")]
mod access;

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
