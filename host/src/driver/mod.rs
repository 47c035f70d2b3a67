//! What this crate asks of a GPU's driver: memory, copies, launches and events, all in the order of one stream.

// Without a driver nothing is asked of one.
#![cfg_attr(not(any(feature = "cuda", feature = "emulator")), allow(dead_code))]

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "emulator")]
pub(crate) mod emulated;
mod order;

use std::fmt;
use std::time::Duration;

use tokenselect_kernels::entries::{Entry, Key, Op};
use tokenselect_kernels::launch::{Dims, GpuInfo};

pub(crate) use self::order::LaunchOrder;
use crate::error::{Error, Result};

/// A moment in a device's order of work: see [`Device::record`](crate::Device::record).
pub struct Event(pub(crate) Box<dyn std::any::Any + Send + Sync>);

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Event")
    }
}

/// Work that was recorded instead of done.
pub(crate) struct Captured(pub(crate) Box<dyn std::any::Any + Send + Sync>);

/// A device with one stream. Everything is done in the order of the calls; only [`read`](Self::read),
/// [`synchronize`](Self::synchronize) and [`elapsed`](Self::elapsed) wait.
pub(crate) trait Driver: fmt::Debug + Send + Sync {
    /// Name for messages: `cuda:0 (NVIDIA H200)`, `emulated`.
    fn name(&self) -> &str;

    /// What launch shapes depend on.
    fn gpu(&self) -> &GpuInfo;

    /// How long it took to load kernels so far.
    fn load_time(&self) -> Duration {
        Duration::ZERO
    }

    /// Loads kernels, so that [`launch`](Self::launch) can start them.
    fn prepare(&self, entries: &[&'static Entry]) -> Result<()> {
        let _ = entries;
        Ok(())
    }

    /// Allocates `bytes > 0` bytes, aligned to 256.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where the device has too little.
    fn alloc(&self, bytes: usize) -> Result<u64>;

    /// Frees an allocation once the work that uses it is done.
    fn free(&self, addr: u64);

    /// Sets bytes to 0.
    fn zero(&self, addr: u64, bytes: usize) -> Result<()>;

    /// Copies from the host; `from` may be reused at once.
    fn write(&self, addr: u64, from: &[u8]) -> Result<()>;

    /// Copies to the host, and waits for it.
    fn read(&self, addr: u64, to: &mut [u8]) -> Result<()>;

    /// Copies within the device; the ranges do not overlap.
    fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()>;

    /// What was launched last.
    fn order(&self) -> &LaunchOrder;

    /// Starts a kernel that was [prepared](Self::prepare). `params` are the bytes of the entry's parameter struct. With
    /// `overlaps` it may begin before the launch before it has ended (see [`tokenselect_kernels::common::overlap`]).
    ///
    /// # Safety
    /// - The entry's own rules hold for the parameters: its pointers name memory of this device with the stated
    ///   shapes, which lives until the launch has ended.
    /// - `overlaps` is what [`LaunchOrder`] says.
    unsafe fn launch(&self, entry: &'static Entry, dims: Dims, params: &[u8], overlaps: bool) -> Result<()>;

    /// Waits until everything is done.
    fn synchronize(&self) -> Result<()>;

    /// Marks this moment.
    fn record(&self) -> Result<Event>;

    /// Whether the work before a moment is done. Does not wait.
    fn has_passed(&self, event: &Event) -> Result<bool>;

    /// Milliseconds between two moments; waits for the later one.
    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32>;

    /// From now on launches, copies within the device and zeroing are recorded instead of done. What cannot be recorded
    /// (allocating, loading kernels, copies from and to the host, waiting) fails meanwhile.
    fn begin_capture(&self) -> Result<()>;

    /// Ends the recording, also where it failed.
    fn end_capture(&self) -> Result<Captured>;

    /// Does what was recorded by this driver.
    ///
    /// # Safety
    /// - As for each [`launch`](Self::launch) that was recorded.
    unsafe fn replay(&self, captured: &Captured) -> Result<()>;
}

/// The error for what another thread asks of a device that records.
pub(crate) fn recorded_by_another(op: &'static str) -> Error {
    Error::Missing { op, needs: "the device, which records the work of another thread" }
}

/// The error for an allocation that failed.
pub(crate) fn out_of_memory(device: &str, bytes: usize) -> Error {
    Error::OutOfMemory { device: device.to_owned(), what: "an allocation", bytes }
}

/// The error for what cannot be recorded.
pub(crate) fn while_capturing(op: &'static str) -> Error {
    Error::Missing { op, needs: "to happen before the capture: run the work once first" }
}

impl dyn Driver {
    /// The kernel for what `op` needs done, compiled for these values, or the error that the device has none.
    pub fn find(&self, op: &'static str, kernel: Op, key: Key) -> Result<&'static Entry> {
        Entry::find(kernel, key).map_err(|missing| {
            let (device, what) = (self.name().to_owned(), missing.to_string());
            Error::Unsupported { device, op, what }
        })
    }

    /// The entry called `name`, or the error that the device has no such kernel. For launches by name, which no step makes.
    pub fn entry(&self, op: &'static str, name: &str) -> Result<&'static Entry> {
        Entry::named(name).ok_or_else(|| {
            let what = format!("an entry `{name}`");
            Error::Unsupported { device: self.name().to_owned(), op, what }
        })
    }

    /// [`launch`](Self::launch) with a parameter struct.
    ///
    /// # Safety
    /// - `P` is the entry's parameter struct, without padding, and the entry's own rules hold for it.
    pub unsafe fn launch_with<P: Copy>(&self, entry: &'static Entry, dims: Dims, params: &P) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_ordered(entry, dims, params, false) }
    }

    /// The same for a kernel that reads no page's token that the launches before it write.
    ///
    /// # Safety
    /// - As for [`launch_with`](Self::launch_with).
    pub unsafe fn launch_on_older_pages<P: Copy>(
        &self,
        entry: &'static Entry,
        dims: Dims,
        params: &P,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_ordered(entry, dims, params, true) }
    }

    unsafe fn launch_ordered<P: Copy>(
        &self,
        entry: &'static Entry,
        dims: Dims,
        params: &P,
        pages_are_older: bool,
    ) -> Result<()> {
        self.prepare(&[entry])?; // before others on this stream have to wait
        // SAFETY: no padding, so all bytes are initialised.
        let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(params).cast(), size_of::<P>()) };
        // SAFETY: the caller's promise.
        let launch = |overlaps| unsafe { self.launch(entry, dims, bytes, overlaps) };
        self.order().launch(entry.op, pages_are_older, launch)
    }
}

/// Checks what every launch must keep: the entry's parameter size and the device's limits.
pub(crate) fn check_launch(
    driver: &dyn Driver,
    entry: &'static Entry,
    dims: &Dims,
    params: &[u8],
) -> Result<()> {
    let fail =
        |reason: String| Err(Error::Launch { device: driver.name().to_owned(), kernel: entry.name, reason });
    if params.len() != entry.param_bytes {
        return fail(format!("takes {} bytes of parameters, got {}", entry.param_bytes, params.len()));
    }
    match dims.check(entry.name, &driver.gpu().limits) {
        Ok(()) => Ok(()),
        Err(error) => fail(error.fault.to_string()),
    }
}
