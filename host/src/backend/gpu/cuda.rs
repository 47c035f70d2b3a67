//! NVIDIA GPUs, through the raw layer of `cust` and a driver that is found at run time.
//!
//! The device's primary context is used, the one that the CUDA runtime and with it PyTorch and most engines use, or
//! the caller's current context if that belongs to the device; no other context is ever made. Every call makes the
//! context current for its own duration and leaves the thread as it was.

use std::ffi::{CStr, CString, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use cust::sys::{self, CUresult};
use kernels_gpu::entries::{self, Entry, Key, Op};
use kernels_gpu::launch::{Dims, GpuInfo, Limits};
use kernels_gpu::limits::{MAX_CLUSTER, PORTABLE_CLUSTER};
use kernels_gpu::ops::score_stream::STREAM_BYTES_OF_SM;
use kernels_gpu::ops::top_k::cluster_dims;
use rayon::prelude::*;
use tokenselect_ptx::Ptx;

use super::driver::{Captured, Driver, Event, LaunchOrder, check_launch, while_capturing};
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

/// Whether work is being recorded, and what was freed meanwhile.
#[derive(Default)]
struct Capturing {
    active: bool,
    freed: Vec<u64>,
}

// SAFETY: contexts, streams and functions of the driver API may be used from any thread.
unsafe impl Send for CudaDriver {}
// SAFETY: as above; calls on one stream are serialised by the driver.
unsafe impl Sync for CudaDriver {}

/// Calls a function of the driver API and turns its answer into a `Result`.
macro_rules! cuda {
    ($name:expr, $function:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: arguments are as the driver API asks; each use says where that is not plain.
        let code = unsafe { sys::$function($($arg),*) };
        check($name, stringify!($function), code)
    }};
}

fn check(device: &str, call: &str, code: CUresult) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: `text` is valid for a write; the driver returns a static string or leaves it.
    let reason = unsafe {
        sys::cuGetErrorName(code, &mut text);
        if text.is_null() { "unknown error".into() } else { CStr::from_ptr(text).to_string_lossy() }
    };
    Err(Error::Driver {
        device: device.to_owned(),
        call: call.to_owned(),
        reason: format!("{} ({reason})", code as u32),
    })
}

/// The context that is used, and whether it was retained.
struct Context {
    raw: sys::CUcontext,
    /// The device whose primary context is to be released.
    retained: Option<sys::CUdevice>,
}

impl Context {
    fn of(name: &str, device: sys::CUdevice) -> Result<Self> {
        let mut current = null_mut();
        cuda!(name, cuCtxGetCurrent(&mut current))?;
        if !current.is_null() {
            let mut its_device = 0;
            cuda!(name, cuCtxGetDevice(&mut its_device))?;
            if its_device == device {
                return Ok(Context { raw: current, retained: None });
            }
        }
        let mut primary = null_mut();
        cuda!(name, cuDevicePrimaryCtxRetain(&mut primary, device))?;
        Ok(Context { raw: primary, retained: Some(device) })
    }

    /// Makes the context current until the guard is dropped.
    fn enter(&self, name: &str) -> Result<Entered> {
        let mut current = null_mut();
        cuda!(name, cuCtxGetCurrent(&mut current))?;
        if current == self.raw {
            return Ok(Entered { pushed: false });
        }
        cuda!(name, cuCtxPushCurrent_v2(self.raw))?;
        Ok(Entered { pushed: true })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Some(device) = self.retained {
            // SAFETY: retained in `of`. An error would mean that the process is ending.
            let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(device) };
        }
    }
}

struct Entered {
    pushed: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = null_mut();
            // SAFETY: pushed in `enter` by this thread.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
        }
    }
}

struct Stream {
    raw: sys::CUstream,
    owned: bool,
}

/// `CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED`, which `cust`'s bindings lack.
const NON_PORTABLE_CLUSTER_SIZE_ALLOWED: u32 = 14;
/// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`.
const CLUSTER_DIMENSION: u32 = 4;
/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`: a launch may begin while the one before it ends.
const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;

/// `CUlaunchAttribute` of CUDA 11.8, which `cust`'s bindings lack.
#[repr(C)]
struct LaunchAttribute {
    id: u32,
    reserved: u32,
    value: [u64; 8],
}
const _: () = assert!(size_of::<LaunchAttribute>() == 72);

impl LaunchAttribute {
    fn overlapping() -> Self {
        LaunchAttribute {
            id: PROGRAMMATIC_STREAM_SERIALIZATION,
            reserved: 0,
            value: [1, 0, 0, 0, 0, 0, 0, 0],
        }
    }

    /// Clusters of so many blocks along the first axis: three words of 32 bits.
    fn cluster_of(blocks: u32) -> Self {
        let value = [u64::from(blocks) | 1 << 32, 1, 0, 0, 0, 0, 0, 0];
        LaunchAttribute { id: CLUSTER_DIMENSION, reserved: 0, value }
    }
}

/// `CUlaunchConfig`.
#[repr(C)]
struct LaunchConfig {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: sys::CUstream,
    attributes: *mut LaunchAttribute,
    num_attributes: u32,
}
const _: () = assert!(size_of::<LaunchConfig>() == 56);

/// `cuLaunchKernelEx`.
type LaunchKernelEx = unsafe extern "C" fn(
    *const LaunchConfig,
    sys::CUfunction,
    *mut *mut c_void,
    *mut *mut c_void,
) -> CUresult;

/// `cuFuncSetAttribute`, for attributes that `cust`'s bindings lack.
type FuncSetAttribute = unsafe extern "C" fn(sys::CUfunction, u32, i32) -> CUresult;

/// `cuOccupancyMaxActiveClusters`.
type MaxActiveClusters = unsafe extern "C" fn(*mut i32, sys::CUfunction, *const LaunchConfig) -> CUresult;

/// The kernels of a context, each loaded once, when it is first needed, however many devices share it.
struct Kernels {
    context: sys::CUcontext,
    ptx: &'static Ptx,
    /// Dynamic shared memory that each may use.
    shared_bytes: u32,
    /// By [`Entry::index`].
    loaded: [OnceLock<Kernel>; entries::COUNT],
    /// What loading took.
    load_time: Mutex<Duration>,
    /// The driver's function for launches that overlap; `None` where the driver or the device has none.
    overlapping: Option<LaunchKernelEx>,
    /// What was launched last on each stream, which several devices may share.
    orders: Mutex<Vec<(usize, Weak<LaunchOrder>)>>,
}

/// A kernel in a module of its own.
struct Kernel {
    context: sys::CUcontext,
    module: sys::CUmodule,
    function: sys::CUfunction,
}

// SAFETY: contexts, modules and functions may be used from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}
// SAFETY: as above.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

/// Kernels by the address of their context. A context of the caller's may end when its devices are gone, and another
/// one may get its address; so nothing is kept of it beyond them.
static LOADED: Mutex<Vec<(usize, Weak<Kernels>)>> = Mutex::new(Vec::new());

impl Kernels {
    /// The kernels of a context.
    fn of(name: &str, context: &Context, ptx: &'static Ptx, shared_bytes: u32) -> Result<Arc<Self>> {
        let mut loaded = LOADED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        loaded.retain(|(_, kernels)| kernels.strong_count() > 0);
        let key = context.raw as usize;
        let found = loaded.iter().find(|(context, _)| *context == key);
        if let Some(kernels) = found.and_then(|(_, kernels)| kernels.upgrade()) {
            return Ok(kernels);
        }
        let kernels = Arc::new(Kernels {
            context: context.raw,
            ptx,
            shared_bytes,
            loaded: [const { OnceLock::new() }; entries::COUNT],
            load_time: Mutex::default(),
            overlapping: overlapping(ptx),
            orders: Mutex::default(),
        });
        if let Some(device) = context.retained {
            // A primary context and its kernels are held for good: loading them again would take longer than a step.
            let mut primary = null_mut();
            cuda!(name, cuDevicePrimaryCtxRetain(&mut primary, device))?;
            std::mem::forget(Arc::clone(&kernels));
        }
        loaded.push((key, Arc::downgrade(&kernels)));
        Ok(kernels)
    }

    /// What was launched last on a stream.
    fn order(&self, stream: sys::CUstream) -> Arc<LaunchOrder> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        orders.retain(|(_, order)| order.strong_count() > 0);
        // The default stream has two handles: null and `CU_STREAM_LEGACY`.
        let stream = if stream as usize == 1 { 0 } else { stream as usize };
        let found = orders.iter().find(|(other, _)| *other == stream);
        if let Some(order) = found.and_then(|(_, order)| order.upgrade()) {
            return order;
        }
        let order = Arc::new(LaunchOrder::default());
        orders.push((stream, Arc::downgrade(&order)));
        order
    }

    /// The function of an entry, if it is loaded.
    fn find(&self, entry: &Entry) -> Option<sys::CUfunction> {
        self.loaded.get(entry.index)?.get().map(|kernel| kernel.function)
    }

    /// Loads those of `entries` that are not loaded yet, several at a time. A kernel that another thread loads meanwhile
    /// is loaded twice, and one of the two dropped: nobody waits for another thread's compiling.
    fn load(&self, name: &str, entries: &[&'static Entry]) -> Result<()> {
        let begin = Instant::now();
        let missing: Vec<_> = entries.iter().filter(|entry| self.find(entry).is_none()).collect();
        missing.par_iter().try_for_each(|entry| {
            let kernel = self.compile(name, entry)?;
            if let Some(place) = self.loaded.get(entry.index) {
                let _ = place.set(kernel); // refused and dropped where another thread was faster
            }
            Ok(())
        })?;
        *self.load_time.lock().unwrap_or_else(PoisonError::into_inner) += begin.elapsed();
        Ok(())
    }

    fn compile(&self, name: &str, entry: &'static Entry) -> Result<Kernel> {
        let fail = |reason: &str| Error::Launch {
            device: name.to_owned(),
            kernel: entry.name,
            reason: reason.to_owned(),
        };
        let text = self.ptx.entry_text(entry.name).ok_or_else(|| fail("not in the PTX"))?;
        let text = CString::new(text).map_err(|_| fail("a zero byte in the PTX"))?;
        let symbol = CString::new(entry.name).map_err(|_| fail("a zero byte in its name"))?;
        let context = Context { raw: self.context, retained: None };
        let _entered = context.enter(name)?;
        let (mut module, function) = (null_mut(), null_mut());
        cuda!(name, cuModuleLoadData(&mut module, text.as_ptr().cast()))?;
        let mut kernel = Kernel { context: self.context, module, function };
        cuda!(name, cuModuleGetFunction(&mut kernel.function, module, symbol.as_ptr()))?;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        cuda!(name, cuFuncSetAttribute(kernel.function, attribute, self.shared_bytes as i32))?;
        if self.overlapping.is_some() {
            allow_large_clusters(kernel.function); // `largest_cluster` asks whether it can be
        }
        Ok(kernel)
    }
}

/// A function of the driver that `cust`'s bindings lack, or know less of.
///
/// # Safety
/// - `F` is the function's type.
unsafe fn driver_function<F>(name: &CStr) -> Option<F> {
    let symbol = tokenselect_cuda_lazy::load().ok()?.symbol(name)?;
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: a function pointer, as the caller says.
    Some(unsafe { std::mem::transmute_copy::<*mut c_void, F>(&symbol.as_ptr()) })
}

/// The driver's `cuLaunchKernelEx`, where the kernels are compiled to wait for those before them: from sm_90 on.
fn overlapping(ptx: &Ptx) -> Option<LaunchKernelEx> {
    if ptx.name != tokenselect_ptx::SM_90A.name {
        return None;
    }
    // SAFETY: the driver's function of that name has this signature.
    unsafe { driver_function(c"cuLaunchKernelEx") }
}

/// Lets a function be launched in clusters of more blocks than every device with clusters has. False where the driver
/// does not know of it.
fn allow_large_clusters(function: sys::CUfunction) -> bool {
    // SAFETY: the driver's function of that name has this signature.
    let set = unsafe { driver_function::<FuncSetAttribute>(c"cuFuncSetAttribute") };
    // SAFETY: a function of a loaded module, in whose context we are.
    set.is_some_and(
        |set| unsafe { set(function, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1) } == CUresult::CUDA_SUCCESS,
    )
}

impl Kernels {
    /// Blocks of a cluster at most: those that every device with clusters has, or as many as `top_k`, whose launches they
    /// are, finds side by side. Loads its kernel.
    fn largest_cluster(&self, name: &str, gpu: &GpuInfo) -> Result<u32> {
        if self.overlapping.is_none() {
            return Ok(1);
        }
        // SAFETY: the driver's function of that name has this signature.
        let count = unsafe { driver_function::<MaxActiveClusters>(c"cuOccupancyMaxActiveClusters") };
        let with_clusters = GpuInfo { limits: Limits { cluster: MAX_CLUSTER, ..gpu.limits }, ..*gpu };
        let (Some(count), Ok(entry), Some(dims)) =
            (count, Entry::find(Op::TopKChooseInCluster, Key::NONE), cluster_dims(&with_clusters, 1, 1))
        else {
            return Ok(PORTABLE_CLUSTER);
        };
        self.load(name, &[entry])?;
        let Some(function) = self.find(entry) else { return Ok(PORTABLE_CLUSTER) };
        let mut cluster = LaunchAttribute::cluster_of(MAX_CLUSTER);
        let config = LaunchConfig {
            grid: [MAX_CLUSTER, 1, 1],
            block: dims.block,
            shared_bytes: dims.shared_bytes,
            stream: null_mut(),
            attributes: &mut cluster,
            num_attributes: 1,
        };
        let mut clusters = 0;
        // SAFETY: `clusters` and `config` live through the call.
        let counted = unsafe { count(&mut clusters, function, &config) } == CUresult::CUDA_SUCCESS;
        let fits = allow_large_clusters(function) && counted && clusters > 0;
        Ok(if fits { MAX_CLUSTER } else { PORTABLE_CLUSTER })
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // SAFETY: the context lives as long as its devices, which hold the kernels. An error would mean that the
        // process is ending.
        unsafe {
            if sys::cuCtxPushCurrent_v2(self.context) == CUresult::CUDA_SUCCESS {
                let _ = sys::cuModuleUnload(self.module);
                let _ = sys::cuCtxPopCurrent_v2(&mut null_mut());
            }
        }
    }
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

    /// The error for `op` while anybody records what is put in the stream, which it would break.
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
        if self.capturing().active { Err(while_capturing(op)) } else { Ok(()) }
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
        self.expect_no_capture("allocating")?;
        let _entered = self.enter()?;
        let mut addr = 0;
        cuda!(&self.name, cuMemAllocAsync(&mut addr, bytes, self.stream.raw))?;
        Ok(addr)
    }

    fn free(&self, addr: u64) {
        let mut capturing = self.capturing();
        if capturing.active {
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
        let _entered = self.enter()?;
        cuda!(&self.name, cuMemsetD8Async(addr, 0, bytes, self.stream.raw))
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<()> {
        self.expect_no_capture("copying from the host")?;
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
        let _entered = self.enter()?;
        cuda!(&self.name, cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream.raw))
    }

    fn order(&self) -> &LaunchOrder {
        &self.order
    }

    unsafe fn launch(&self, entry: &'static Entry, dims: Dims, params: &[u8], overlaps: bool) -> Result<()> {
        check_launch(self, entry, &dims, params)?;
        let _entered = self.enter()?;
        let fail = |reason: String| Error::Launch { device: self.name.clone(), kernel: entry.name, reason };
        let Some(function) = self.kernels.find(entry) else { return Err(fail("not loaded".into())) };
        let mut arguments = [params.as_ptr().cast_mut().cast::<c_void>()];
        let ([gx, gy, gz], [bx, by, bz]) = (dims.grid, dims.block);
        if let Some(launch) = self.kernels.overlapping {
            let mut attributes = [LaunchAttribute::overlapping(), LaunchAttribute::cluster_of(dims.cluster)];
            // The first of the two, the second, both or none.
            let attributes = &mut attributes[usize::from(!overlaps)..1 + usize::from(dims.cluster > 1)];
            let config = LaunchConfig {
                grid: dims.grid,
                block: dims.block,
                shared_bytes: dims.shared_bytes,
                stream: self.stream.raw,
                attributes: attributes.as_mut_ptr(),
                num_attributes: attributes.len() as u32,
            };
            // SAFETY: as below; kernels wait for those before them, as `overlap` of the kernels demands, before they read or write
            // what those have written.
            let code = unsafe { launch(&config, function, arguments.as_mut_ptr(), null_mut()) };
            return check(&self.name, "cuLaunchKernelEx", code).map_err(|error| fail(error.to_string()));
        }
        // SAFETY: one argument, the parameter struct, of the size that the entry has; the kernel's rules are the
        // caller's promise.
        let code = unsafe {
            let (shared, stream) = (dims.shared_bytes, self.stream.raw);
            let arguments = arguments.as_mut_ptr();
            sys::cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, arguments, null_mut())
        };
        check(&self.name, "cuLaunchKernel", code).map_err(|error| fail(error.to_string()))
    }

    fn synchronize(&self) -> Result<()> {
        self.expect_no_capture("waiting")?;
        let _entered = self.enter()?;
        cuda!(&self.name, cuStreamSynchronize(self.stream.raw))
    }

    fn record(&self) -> Result<Event> {
        let _entered = self.enter()?;
        let mut raw = null_mut();
        cuda!(&self.name, cuEventCreate(&mut raw, 0))?;
        let event = CudaEvent(raw);
        cuda!(&self.name, cuEventRecord(event.0, self.stream.raw))?;
        Ok(Event(Box::new(event)))
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
        self.capturing().active = true;
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
        let _one_at_a_time = self.capturing();
        let _entered = self.enter()?;
        cuda!(&self.name, cuGraphLaunch(graph.exec, self.stream.raw))
    }
}

/// A graph of the driver API, and the same made ready to launch.
struct CudaGraph {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

// SAFETY: graphs may be used from any thread, one at a time; launches of one graph are serialised by its stream.
unsafe impl Send for CudaGraph {}
// SAFETY: as above.
unsafe impl Sync for CudaGraph {}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: made by `end_capture`; a launch under way ends first.
        unsafe {
            if !self.exec.is_null() {
                let _ = sys::cuGraphExecDestroy(self.exec);
            }
            if !self.graph.is_null() {
                let _ = sys::cuGraphDestroy(self.graph);
            }
        }
    }
}

/// An event of the driver API.
struct CudaEvent(sys::CUevent);

// SAFETY: events may be used from any thread.
unsafe impl Send for CudaEvent {}
// SAFETY: as above.
unsafe impl Sync for CudaEvent {}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        // SAFETY: made by `record`; destroying needs no current context.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
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
