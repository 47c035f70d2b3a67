//! What the GPU backend asks of a driver: memory, copies, launches and events, all in the order of one stream.

use std::fmt;
use std::time::Duration;

use kernels_gpu::entries::Entry;
use kernels_gpu::launch::{Dims, GpuInfo};

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

    /// Loads kernels, so that [`launch`](Self::launch) need not.
    fn prepare(&self, entries: &[&'static Entry]) -> Result<()> {
        let _ = entries;
        Ok(())
    }

    /// Allocates `bytes > 0` bytes, aligned to 256.
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

    /// Starts a kernel, which is loaded first if it must. `params` are the bytes of the entry's parameter struct.
    ///
    /// # Safety
    /// - The entry's own rules hold for the parameters: its pointers name memory of this device with the stated
    ///   shapes, which lives until the launch has ended.
    unsafe fn launch(&self, entry: &'static Entry, dims: Dims, params: &[u8]) -> Result<()>;

    /// Waits until everything is done.
    fn synchronize(&self) -> Result<()>;

    /// Marks this moment.
    fn record(&self) -> Result<Event>;

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

/// The error for what cannot be recorded.
pub(crate) fn while_capturing(op: &'static str) -> Error {
    Error::Missing { op, needs: "to happen before the capture: run the work once first" }
}

impl dyn Driver {
    /// The entry called `name`, or the error that the device has no such kernel.
    pub fn entry(&self, op: &'static str, name: &str) -> Result<&'static Entry> {
        Entry::find(name).ok_or_else(|| {
            let what = format!("an entry `{name}`");
            Error::Unsupported { device: self.name().to_owned(), op, what }
        })
    }

    /// [`launch`](Self::launch) with a parameter struct.
    ///
    /// # Safety
    /// - `P` is the entry's parameter struct, without padding, and the entry's own rules hold for it.
    pub unsafe fn launch_with<P: Copy>(&self, entry: &'static Entry, dims: Dims, params: &P) -> Result<()> {
        // SAFETY: no padding, so all bytes are initialised.
        let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(params).cast(), size_of::<P>()) };
        // SAFETY: the caller's promise.
        unsafe { self.launch(entry, dims, bytes) }
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
