//! NVIDIA GPUs, through the raw layer of `cust` and a driver that is found at run time.
//!
//! The device's primary context is used, the one that the CUDA runtime and with it PyTorch and most engines use, or
//! the caller's current context if that belongs to the device; no other context is ever made. Every call makes the
//! context current for its own duration and leaves the thread as it was.

mod context;
mod event;
mod graph;
mod kernels;
mod launch;

use std::ffi::{CStr, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use cust::sys::{self, CUresult};
use tokenselect_kernels::entries::Entry;
use tokenselect_kernels::launch::{Dims, GpuInfo, Limits};
use tokenselect_kernels::ops::score_stream::STREAM_BYTES_OF_SM;
use tokenselect_ptx::Ptx;

use self::context::{Context, Entered, check, cuda};
use self::event::{CudaEvent, Relaxed};
use self::graph::CudaGraph;
use self::kernels::Kernels;
use self::launch::Launch;
use super::{
    Captured, Driver, Event, LaunchOrder, check_launch, out_of_memory, recorded_by_another, while_capturing,
};
use crate::error::{Error, Result};

/// One GPU and one stream on it.
pub(crate) struct CudaDriver {
    name: String,
    gpu: GpuInfo,
    /// Before the context, which must be there when they are unloaded.
    kernels: Arc<Kernels>,
    context: Context,
    stream: Stream,
    /// That of the stream.
    order: Arc<LaunchOrder>,
    capturing: Mutex<Capturing>,
}

/// The thread that records work, and what was freed meanwhile.
#[derive(Default)]
struct Capturing {
    by: Option<ThreadId>,
    freed: Vec<u64>,
}

// SAFETY: contexts, streams and functions of the driver API may be used from any thread.
unsafe impl Send for CudaDriver {}
// SAFETY: as above; calls on one stream are serialised by the driver.
unsafe impl Sync for CudaDriver {}

struct Stream {
    raw: sys::CUstream,
    owned: bool,
}

impl CudaDriver {
    /// Device `ordinal`, on a stream of its own.
    pub fn new(ordinal: usize) -> Result<Self> {
        CudaDriver::open(ordinal, None)
    }

    /// Device `ordinal`, on the caller's stream.
    ///
    /// # Safety
    /// - `stream` is null or a stream of the context that is used, and lives as long as the driver.
    pub unsafe fn on_stream(ordinal: usize, stream: *mut c_void) -> Result<Self> {
        CudaDriver::open(ordinal, Some(stream.cast()))
    }

    fn open(ordinal: usize, stream: Option<sys::CUstream>) -> Result<Self> {
        let short = format!("cuda:{ordinal}");
        if let Err(error) = tokenselect_cuda_lazy::load() {
            let (call, reason) = ("loading the driver".into(), error.to_string());
            return Err(Error::Driver { device: short, call, reason });
        }
        cuda!(&short, cuInit(0))?;
        let mut device = 0;
        cuda!(&short, cuDeviceGet(&mut device, i32::try_from(ordinal).unwrap_or(i32::MAX)))?;
        let name = format!("{short} ({})", model(&short, device)?);
        let (mut gpu, ptx) = capabilities(&name, device)?;
        let context = Context::of(&name, device)?;
        let entered = context.enter(&name)?;
        let kernels = Kernels::of(&name, &context, ptx, gpu.limits.shared_bytes)?;
        gpu.limits.cluster = kernels.largest_cluster(&name, &gpu)?;
        let stream = match stream {
            Some(raw) => Stream { raw, owned: false },
            None => {
                let mut raw = null_mut();
                let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
                cuda!(&name, cuStreamCreate(&mut raw, flags))?;
                Stream { raw, owned: true }
            }
        };
        drop(entered);
        let order = kernels.order(stream.raw);
        Ok(CudaDriver { name, gpu, kernels, context, stream, order, capturing: Mutex::default() })
    }

    fn enter(&self) -> Result<Entered> {
        self.context.enter(&self.name)
    }

    fn capturing(&self) -> MutexGuard<'_, Capturing> {
        self.capturing.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The error for `op` while anybody records what is put in the stream, another library among them: it would break that, or be
    /// done anew at every launch, with memory of the host that is gone by then.
    fn expect_nothing_recorded(&self, op: &'static str) -> Result<()> {
        self.expect_no_capture(op)?;
        let _entered = self.enter()?;
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        cuda!(&self.name, cuStreamIsCapturing(self.stream.raw, &mut status))?;
        let is_idle = status == sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        if is_idle { Ok(()) } else { Err(while_capturing(op)) }
    }

    /// The error for `op` while work is being recorded: CUDA would record it with an address of this moment.
    fn expect_no_capture(&self, op: &'static str) -> Result<()> {
        match self.capturing().by {
            None => Ok(()),
            Some(by) if by == thread::current().id() => Err(while_capturing(op)),
            Some(_) => Err(recorded_by_another(op)),
        }
    }

    /// The error for `op` while another thread records: it would be recorded, too, instead of done.
    fn expect_own_thread(&self, op: &'static str) -> Result<()> {
        match self.capturing().by {
            Some(by) if by != thread::current().id() => Err(recorded_by_another(op)),
            _ => Ok(()),
        }
    }
}

fn model(name: &str, device: sys::CUdevice) -> Result<String> {
    let mut text = [0; 128];
    cuda!(name, cuDeviceGetName(text.as_mut_ptr(), text.len() as i32, device))?;
    // SAFETY: the driver ends the name with a zero byte within the length given.
    Ok(unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned())
}

/// What the device can launch, and the kernels for it.
fn capabilities(name: &str, device: sys::CUdevice) -> Result<(GpuInfo, &'static Ptx)> {
    use sys::CUdevice_attribute as Attribute;
    let get = |attribute| {
        let mut value = 0;
        cuda!(name, cuDeviceGetAttribute(&mut value, attribute, device))?;
        Ok(value as u32)
    };
    let major = get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let Some(ptx) = tokenselect_ptx::for_compute_capability(major, minor) else {
        let what = format!("compute capability {major}.{minor}, only from 8.0 on");
        return Err(Error::Unsupported { device: name.to_owned(), op: "any operation", what });
    };
    // The other PTX has the entries that need clusters or bulk copies, but they stop the launch.
    let has_clusters = ptx.name == tokenselect_ptx::SM_90A.name;
    let limits = Limits {
        grid: [
            get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X)?,
            get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y)?,
            get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z)?,
        ],
        block: [
            get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X)?,
            get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y)?,
            get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z)?,
        ],
        threads: get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        shared_bytes: get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        cluster: 1, // until the kernels are loaded
    };
    let num_sms = get(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let score_stream_bytes = num_sms as u64 * STREAM_BYTES_OF_SM;
    Ok((GpuInfo { num_sms, limits, bulk_copies: has_clusters, score_stream_bytes }, ptx))
}

impl Driver for CudaDriver {
    fn name(&self) -> &str {
        &self.name
    }

    fn gpu(&self) -> &GpuInfo {
        &self.gpu
    }

    fn load_time(&self) -> Duration {
        *self.kernels.load_time.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn prepare(&self, entries: &[&'static Entry]) -> Result<()> {
        if entries.iter().all(|entry| self.kernels.find(entry).is_some()) {
            return Ok(());
        }
        self.expect_nothing_recorded("loading kernels")?;
        self.kernels.load(&self.name, entries)
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.expect_nothing_recorded("allocating")?;
        let _entered = self.enter()?;
        let mut addr = 0;
        // SAFETY: `addr` is valid for a write.
        let code = unsafe { sys::cuMemAllocAsync(&mut addr, bytes, self.stream.raw) };
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY || code == CUresult::CUDA_ERROR_INVALID_VALUE {
            return Err(out_of_memory(&self.name, bytes)); // the latter for more than any device has
        }
        check(&self.name, "cuMemAllocAsync", code)?;
        Ok(addr)
    }

    fn free(&self, addr: u64) {
        let mut capturing = self.capturing();
        if capturing.by.is_some() {
            capturing.freed.push(addr); // to be freed once, not at every launch
            return;
        }
        drop(capturing);
        if let Ok(_entered) = self.enter() {
            // An error here stems from earlier work, and the next call that can say so will.
            let _ = cuda!(&self.name, cuMemFreeAsync(addr, self.stream.raw));
        }
    }

    fn zero(&self, addr: u64, bytes: usize) -> Result<()> {
        self.expect_own_thread("zeroing")?;
        let _entered = self.enter()?;
        cuda!(&self.name, cuMemsetD8Async(addr, 0, bytes, self.stream.raw))
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<()> {
        self.expect_nothing_recorded("copying from the host")?;
        let _entered = self.enter()?;
        // The driver copies pageable memory to a buffer of its own before it returns.
        cuda!(&self.name, cuMemcpyHtoDAsync_v2(addr, from.as_ptr().cast(), from.len(), self.stream.raw))
    }

    fn read(&self, addr: u64, to: &mut [u8]) -> Result<()> {
        self.expect_no_capture("copying to the host")?;
        let _entered = self.enter()?;
        cuda!(&self.name, cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), addr, to.len(), self.stream.raw))?;
        cuda!(&self.name, cuStreamSynchronize(self.stream.raw))
    }

    fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.expect_own_thread("copying")?;
        let _entered = self.enter()?;
        cuda!(&self.name, cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream.raw))
    }

    fn order(&self) -> &LaunchOrder {
        &self.order
    }

    unsafe fn launch(&self, entry: &'static Entry, dims: Dims, params: &[u8], overlaps: bool) -> Result<()> {
        check_launch(self, entry, &dims, params)?;
        self.expect_own_thread("launching")?;
        let _entered = self.enter()?;
        let fail = |reason: String| Error::Launch { device: self.name.clone(), kernel: entry.name, reason };
        let Some(function) = self.kernels.find(entry) else { return Err(fail("not loaded".into())) };
        let launch = Launch { function, dims, params, stream: self.stream.raw };
        // SAFETY: the parameter struct has the size that the entry has; the kernel's rules are the caller's promise.
        let (call, code) = unsafe { launch.put(self.kernels.overlapping, overlaps) };
        check(&self.name, call, code).map_err(|error| fail(error.to_string()))
    }

    fn synchronize(&self) -> Result<()> {
        self.expect_no_capture("waiting")?;
        let _entered = self.enter()?;
        cuda!(&self.name, cuStreamSynchronize(self.stream.raw))
    }

    fn record(&self) -> Result<Event> {
        self.expect_own_thread("recording an event")?;
        if self.capturing().by.is_none() {
            // An event in another library's capture would never pass, and asking for it would end the capture.
            self.expect_nothing_recorded("recording an event")?;
        }
        let _entered = self.enter()?;
        let mut raw = null_mut();
        cuda!(&self.name, cuEventCreate(&mut raw, 0))?;
        let event = CudaEvent(raw);
        cuda!(&self.name, cuEventRecord(event.0, self.stream.raw))?;
        Ok(Event(Box::new(event)))
    }

    fn has_passed(&self, event: &Event) -> Result<bool> {
        let Some(event) = event.0.downcast_ref::<CudaEvent>() else {
            return Err(Error::Missing { op: "has_passed", needs: "an event of this device" });
        };
        let _entered = self.enter()?;
        let _relaxed = Relaxed::begin();
        // SAFETY: the event is alive.
        match unsafe { sys::cuEventQuery(event.0) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check(&self.name, "cuEventQuery", code).map(|()| true),
        }
    }

    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32> {
        let events = (from.0.downcast_ref::<CudaEvent>(), to.0.downcast_ref::<CudaEvent>());
        let (Some(from), Some(to)) = events else {
            return Err(Error::Missing { op: "elapsed", needs: "events of this device" });
        };
        let _entered = self.enter()?;
        cuda!(&self.name, cuEventSynchronize(to.0))?;
        let mut milliseconds = 0.0;
        cuda!(&self.name, cuEventElapsedTime(&mut milliseconds, from.0, to.0))?;
        Ok(milliseconds)
    }

    fn begin_capture(&self) -> Result<()> {
        self.expect_no_capture("capture")?;
        let _entered = self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        cuda!(&self.name, cuStreamBeginCapture_v2(self.stream.raw, mode))?;
        self.capturing().by = Some(thread::current().id());
        Ok(())
    }

    fn end_capture(&self) -> Result<Captured> {
        let _entered = self.enter()?;
        let mut graph = CudaGraph { graph: null_mut(), exec: null_mut() };
        let ended = cuda!(&self.name, cuStreamEndCapture(self.stream.raw, &mut graph.graph));
        let freed = std::mem::take(&mut *self.capturing()).freed;
        freed.into_iter().for_each(|addr| self.free(addr));
        ended?;
        cuda!(&self.name, cuGraphInstantiate_v2(&mut graph.exec, graph.graph, null_mut(), null_mut(), 0))?;
        Ok(Captured(Box::new(graph)))
    }

    unsafe fn replay(&self, captured: &Captured) -> Result<()> {
        let Some(graph) = captured.0.downcast_ref::<CudaGraph>() else {
            return Err(Error::Missing { op: "launch", needs: "a graph of this device" });
        };
        self.expect_no_capture("replaying")?;
        let _one_at_a_time = self.capturing();
        let _entered = self.enter()?;
        cuda!(&self.name, cuGraphLaunch(graph.exec, self.stream.raw))
    }
}

impl Drop for CudaDriver {
    fn drop(&mut self) {
        if self.stream.owned
            && let Ok(_entered) = self.enter()
        {
            // SAFETY: made by `open`; work still queued is finished first.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.stream.raw) };
        }
    }
}

impl std::fmt::Debug for CudaDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaDriver({})", self.name)
    }
}
