//! Where operations run.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use tokenselect_kernels::launch::Dims;

use crate::driver::{Captured, Driver, Event, while_capturing};
use crate::error::{Error, Result};

/// A place where operations run and memory lies. Cheap to clone; clones share memory and order of work.
#[derive(Clone)]
pub struct Device {
    /// A GPU; `None` for the processor.
    gpu: Option<Arc<Gpu>>,
}

struct Gpu {
    driver: Arc<dyn Driver>,
    recording: Mutex<Option<Recording>>,
}

/// What changes on the host when work is done.
type Change = Box<dyn Fn() + Send + Sync>;

/// What must hold before work is done.
type Check = Box<dyn Fn(&mut Pending) -> Result<()> + Send + Sync>;

/// What earlier parts of the same work will have written, while the later ones are checked: tokens, by ledger, layer and
/// sequence.
pub(crate) type Pending = HashMap<(usize, usize, usize), usize>;

/// What the host has to know of work that is being recorded.
struct Recording {
    /// The thread that records.
    by: ThreadId,
    /// What changes on the host each time that the work is done.
    changes: Vec<Change>,
    /// How things were, the last change first to be undone: recorded work was not done.
    before: Vec<Box<dyn FnOnce() + Send>>,
    /// What must hold each time that the work is done.
    checks: Vec<Check>,
    /// What holds from the end of the recording on, if it succeeds.
    at_end: Vec<Box<dyn FnOnce() + Send>>,
    /// Memory that the work uses.
    kept: Vec<Arc<dyn Any + Send + Sync>>,
}

impl Device {
    /// The processor: plain Rust, in parallel on the current rayon thread pool.
    pub fn cpu() -> Self {
        Device { gpu: None }
    }

    /// The first CUDA device, where the feature `cuda` is on and there are a driver and a device of compute capability 8.0
    /// or newer; else the processor.
    ///
    /// A GPU takes less than the processor: f16 and bf16, head dimensions 64, 96, 128 and 256, groups of up to 16 heads.
    /// `Device::cuda` tells why a GPU is not used.
    pub fn auto() -> Self {
        #[cfg(feature = "cuda")]
        if let Ok(device) = Device::cuda(0) {
            return device;
        }
        Device::cpu()
    }

    /// CUDA device `ordinal`, in its primary context, on a stream of its own.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) where there is no CUDA driver or no such device,
    /// [`Error::Unsupported`](crate::Error::Unsupported) below compute capability 8.0.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Device::gpu(Arc::new(crate::driver::cuda::CudaDriver::new(ordinal)?)))
    }

    /// CUDA device `ordinal`, with all work put in a stream of the caller's (a `CUstream`; null for the default
    /// stream), so that it is ordered with the caller's own.
    ///
    /// Uses the caller's current context if it belongs to that device, else the primary context.
    ///
    /// # Safety
    /// - `stream` is null or a stream of that context, not `CU_STREAM_PER_THREAD`, and lives as long as the device and all its
    ///   clones and memory.
    /// - A kernel of the caller's own that lets the next launch begin early (`griddepcontrol.launch_dependents`) has by then
    ///   written all that this device reads: queries, keys, values, pages, lists. Or [`separate`](Self::separate) is called between the two.
    ///
    /// # Errors
    /// As [`cuda`](Self::cuda).
    #[cfg(feature = "cuda")]
    pub unsafe fn cuda_on_stream(ordinal: usize, stream: *mut std::ffi::c_void) -> Result<Self> {
        // SAFETY: the caller's promise.
        let driver = unsafe { crate::driver::cuda::CudaDriver::on_stream(ordinal, stream)? };
        Ok(Device::gpu(Arc::new(driver)))
    }

    /// The GPU kernels, run on the processor by an emulator that reports races, out-of-bounds accesses and
    /// divergence. For tests: about a thousand times slower than the processor's own code.
    #[cfg(feature = "emulator")]
    pub fn emulated() -> Self {
        Device::emulated_with(tokenselect_kernels::emu::Options::default())
    }

    /// [`emulated`](Self::emulated), with the schedule of lanes drawn from `seed`.
    #[cfg(feature = "emulator")]
    pub fn emulated_random(seed: u64) -> Self {
        Device::emulated_with(tokenselect_kernels::emu::Options::random(seed))
    }

    /// [`emulated`](Self::emulated), as a GPU of compute capability 8.0 (A100) is: with less shared memory, without clusters, bulk
    /// copies and products of warpgroups.
    #[cfg(feature = "emulator")]
    pub fn emulated_sm_80() -> Self {
        Device::emulated_with(tokenselect_kernels::emu::Options { warpgroups: false, ..Default::default() })
    }

    /// [`emulated_sm_80`](Self::emulated_sm_80), as a GPU of compute capability 8.6 or 8.9 is: with still less shared memory.
    #[cfg(feature = "emulator")]
    pub fn emulated_sm_86() -> Self {
        let options = tokenselect_kernels::emu::Options { warpgroups: false, ..Default::default() };
        let limits = tokenselect_kernels::launch::Limits::SM_86;
        Device::gpu(Arc::new(crate::driver::emulated::EmulatedDriver::with_limits(options, limits)))
    }

    #[cfg(feature = "emulator")]
    fn emulated_with(options: tokenselect_kernels::emu::Options) -> Self {
        Device::gpu(Arc::new(crate::driver::emulated::EmulatedDriver::new(options)))
    }

    #[cfg_attr(not(any(feature = "cuda", feature = "emulator")), allow(dead_code))]
    fn gpu(driver: Arc<dyn Driver>) -> Self {
        Device { gpu: Some(Arc::new(Gpu { driver, recording: Mutex::default() })) }
    }

    /// Puts one kernel of the crate `tokenselect-kernels` into the device's order of work, with parameters of the caller's own:
    /// for tests and measurements of a single kernel, and for kernels that no operation uses. Addresses of tensors are
    /// given by [`TensorView::device_addr`](crate::TensorView::device_addr).
    ///
    /// Does not wait. On the emulated device the kernel has ended when this returns, and a broken rule is an error.
    ///
    /// # Safety
    /// - `P` is the parameter struct of `entry`, `repr(C)` without padding.
    /// - The kernel's own rules hold: its pointers name memory of this device with the stated shapes, which lives until
    ///   the kernel has ended, and `dims` are what the kernel is to be launched with.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the device has no such kernel, [`Error::Launch`] where the size of `P` or the
    /// launch dimensions are wrong, or the launch fails.
    pub unsafe fn launch<P: Copy>(&self, entry: &str, dims: Dims, params: &P) -> Result<()> {
        let Some(driver) = self.driver() else {
            let (device, what) = (self.name().to_owned(), format!("an entry `{entry}`"));
            return Err(Error::Unsupported { device, op: "launch", what });
        };
        let entry = driver.entry("launch", entry)?;
        // SAFETY: the caller's promise.
        unsafe { driver.launch_with(entry, dims, params) }
    }

    /// Short name: `cpu`, `emulated`, `cuda:0 (NVIDIA H200)`.
    pub fn name(&self) -> &str {
        self.driver().map_or("cpu", |driver| driver.name())
    }

    /// Whether this is the processor, whose tensors lie in the host's memory.
    pub fn is_cpu(&self) -> bool {
        self.driver().is_none()
    }

    /// Waits until everything queued on the device is done.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) where something failed.
    pub fn synchronize(&self) -> Result<()> {
        self.driver().map_or(Ok(()), |driver| driver.synchronize())
    }

    /// The next kernel begins when all work before it has ended, as kernels do elsewhere. Costs nothing but that.
    ///
    /// Without it a kernel of this library may begin while the one in front ends, if that lets the next begin early
    /// (`griddepcontrol.launch_dependents`), and reads what that one has written by then. Call it where a kernel of the caller's own in
    /// front does so before it has written queries, keys or values: those of SGLang that write keys, Triton's with programmatic launches.
    pub fn separate(&self) {
        if let Some(driver) = self.driver() {
            driver.order().separates();
        }
    }

    /// Marks this moment in the device's order of work.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing) while another library or another thread records what is put in the stream,
    /// [`Error::Driver`](crate::Error::Driver) where the device fails.
    pub fn record(&self) -> Result<Event> {
        self.driver().map_or_else(|| Ok(Event(Box::new(Instant::now()))), |driver| driver.record())
    }

    /// Whether all work before a moment of this device is done. Does not wait.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) where the device fails, [`Error::Missing`](crate::Error::Missing) for an
    /// event of another device.
    pub fn has_passed(&self, event: &Event) -> Result<bool> {
        self.driver().map_or(Ok(true), |driver| driver.has_passed(event))
    }

    /// The time between two moments of this device, by its own clock. Waits for the later one.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) where the device fails, [`Error::Missing`](crate::Error::Missing) for
    /// events of another device.
    pub fn elapsed(&self, from: &Event, to: &Event) -> Result<Duration> {
        if let Some(driver) = self.driver() {
            // No time where the later moment is the first one given.
            let milliseconds = f64::from(driver.elapsed(from, to)?).max(0.0);
            return Ok(Duration::from_secs_f64(milliseconds / 1e3));
        }
        match (from.0.downcast_ref::<Instant>(), to.0.downcast_ref::<Instant>()) {
            (Some(from), Some(to)) => Ok(to.saturating_duration_since(*from)),
            _ => Err(Error::Missing { op: "elapsed", needs: "events of this device" }),
        }
    }

    /// Records what `work` puts on the device, instead of doing it, as a CUDA graph: launching that costs the processor
    /// one call for the whole of it.
    ///
    /// Run the work once before: what it allocates at its first run (tables of a batch, angles) cannot be recorded.
    /// Batches come from a [`BatchSlot`](crate::BatchSlot), so that each launch reads the lengths and pages put there last.
    /// Meanwhile the device serves this thread alone: what another one asks of it is [`Error::Missing`].
    ///
    /// # Errors
    /// Whatever `work` returns, [`Error::Missing`] where it allocates, waits or copies from or to the host,
    /// [`Error::Unsupported`] on the processor. Then nothing was done.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let Some(gpu) = &self.gpu else {
            let device = self.name().to_owned();
            return Err(Error::Unsupported { device, op: "capture", what: "any work".into() });
        };
        gpu.driver.begin_capture()?;
        gpu.driver.order().forget();
        *gpu.recording() = Some(Recording::new());
        let capture = Capture { gpu, ended: false };
        let done = work();
        let (captured, recording) = capture.end();
        done?;
        let captured = captured?;
        let Recording { changes, checks, at_end, kept, .. } = recording;
        at_end.into_iter().for_each(|apply| apply());
        Ok(Graph { driver: Arc::clone(&gpu.driver), captured, changes, checks, _kept: kept })
    }

    /// Changes what the host knows of the device's work: now, and while work is recorded each time that it is done.
    pub(crate) fn note<S: Clone + Send + 'static>(
        &self,
        state: &Arc<Mutex<S>>,
        change: impl Fn(&mut S) + Send + Sync + 'static,
    ) {
        let of = |state: &Mutex<S>, change: &dyn Fn(&mut S)| {
            change(&mut state.lock().unwrap_or_else(PoisonError::into_inner));
        };
        let Some(mut recording) = self.own_recording() else { return of(state, &change) };
        let before = state.lock().unwrap_or_else(PoisonError::into_inner).clone();
        of(state, &change);
        if let Some(recording) = recording.as_mut() {
            let (restored, changed) = (Arc::clone(state), Arc::clone(state));
            recording.before.push(Box::new(move || {
                *restored.lock().unwrap_or_else(PoisonError::into_inner) = before;
            }));
            recording.changes.push(Box::new(move || of(&changed, &change)));
        }
    }

    /// Checks each time before recorded work is done.
    pub(crate) fn check_when_done(&self, check: impl Fn(&mut Pending) -> Result<()> + Send + Sync + 'static) {
        if let Some(recording) = self.own_recording().as_deref_mut().and_then(Option::as_mut) {
            recording.checks.push(Box::new(check));
        }
    }

    /// Does this at the end of a recording that succeeds.
    pub(crate) fn at_end_of_recording(&self, apply: impl FnOnce() + Send + 'static) {
        if let Some(recording) = self.own_recording().as_deref_mut().and_then(Option::as_mut) {
            recording.at_end.push(Box::new(apply));
        }
    }

    /// Keeps memory for as long as what is being recorded.
    pub(crate) fn keep(&self, memory: impl FnOnce() -> Option<Arc<dyn Any + Send + Sync>>) {
        if let Some(recording) = self.own_recording().as_deref_mut().and_then(Option::as_mut) {
            recording.kept.extend(memory());
        }
    }

    /// The error for what can be no part of recorded work, while work is recorded, by any thread.
    pub(crate) fn expect_no_recording(&self, op: &'static str) -> Result<()> {
        let is_recording = self.gpu.as_ref().is_some_and(|gpu| gpu.recording().is_some());
        if is_recording { Err(while_capturing(op)) } else { Ok(()) }
    }

    /// What this thread records.
    fn own_recording(&self) -> Option<MutexGuard<'_, Option<Recording>>> {
        let recording = self.gpu.as_ref()?.recording();
        let is_own = recording.as_ref().is_some_and(|recording| recording.by == thread::current().id());
        is_own.then_some(recording)
    }

    /// How long it took to load kernels so far, each once per context; zero for the processor.
    pub fn load_time(&self) -> Duration {
        self.driver().map_or(Duration::ZERO, |driver| driver.load_time())
    }

    pub(crate) fn driver(&self) -> Option<&Arc<dyn Driver>> {
        self.gpu.as_ref().map(|gpu| &gpu.driver)
    }
}

impl Recording {
    fn new() -> Self {
        Recording {
            by: thread::current().id(),
            changes: Vec::new(),
            before: Vec::new(),
            checks: Vec::new(),
            at_end: Vec::new(),
            kept: Vec::new(),
        }
    }
}

impl Gpu {
    fn recording(&self) -> MutexGuard<'_, Option<Recording>> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A capture under way. It ends when this is dropped, also by a panic.
struct Capture<'a> {
    gpu: &'a Gpu,
    ended: bool,
}

impl Capture<'_> {
    fn end(mut self) -> (Result<Captured>, Recording) {
        self.stop()
    }

    fn stop(&mut self) -> (Result<Captured>, Recording) {
        self.ended = true;
        let captured = self.gpu.driver.end_capture();
        self.gpu.driver.order().forget();
        let mut recording = self.gpu.recording().take().unwrap_or_else(Recording::new);
        recording.before.drain(..).rev().for_each(|restore| restore());
        (captured, recording)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if !self.ended {
            drop(self.stop());
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.name())
    }
}

/// Work recorded by [`Device::capture`].
pub struct Graph {
    driver: Arc<dyn Driver>,
    captured: Captured,
    /// What the host knows when the work was done.
    changes: Vec<Change>,
    /// What must hold before.
    checks: Vec<Check>,
    /// Memory that the work uses.
    _kept: Vec<Arc<dyn Any + Send + Sync>>,
}

impl Graph {
    /// Does the work, after the device's earlier work. Does not wait for it.
    ///
    /// # Safety
    /// - Every tensor, cache, workspace and [`BatchSlot`](crate::BatchSlot) that the recorded work used is alive, and none
    ///   of its tensors has been replaced.
    ///
    /// # Errors
    /// What a step would answer for the batch that lies in the slot now: [`Error::StaleBatch`], [`Error::UnknownSequence`],
    /// [`Error::Unwritten`], [`Error::Missing`]; then nothing was done. [`Error::Driver`], or [`Error::Launch`] in the emulator.
    pub unsafe fn launch(&self) -> Result<()> {
        let mut pending = Pending::new();
        self.checks.iter().try_for_each(|check| check(&mut pending))?;
        self.driver.order().forget();
        // SAFETY: the arguments were checked when the work was recorded; the memory is there, by the caller's promise.
        unsafe { self.driver.replay(&self.captured)? };
        self.changes.iter().for_each(|change| change());
        Ok(())
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph({})", self.driver.name())
    }
}
