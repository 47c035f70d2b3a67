//! The kernels of a context: loaded once, when they are first needed.

use std::ffi::{CStr, CString, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use cust::sys::{self, CUresult};
use rayon::prelude::*;
use tokenselect_kernels::entries::{self, Entry, Key, Op};
use tokenselect_kernels::launch::{GpuInfo, Limits};
use tokenselect_kernels::limits::{MAX_CLUSTER, PORTABLE_CLUSTER};
use tokenselect_kernels::ops::top_k::cluster_dims;
use tokenselect_ptx::Ptx;

use super::context::{Context, cuda};
use super::launch::{LaunchAttribute, LaunchConfig, LaunchKernelEx};
use crate::driver::LaunchOrder;
use crate::error::{Error, Result};

/// `CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED`, which `cust`'s bindings lack.
const NON_PORTABLE_CLUSTER_SIZE_ALLOWED: u32 = 14;

/// `cuFuncSetAttribute`, for attributes that `cust`'s bindings lack.
type FuncSetAttribute = unsafe extern "C" fn(sys::CUfunction, u32, i32) -> CUresult;

/// `cuOccupancyMaxActiveClusters`.
type MaxActiveClusters = unsafe extern "C" fn(*mut i32, sys::CUfunction, *const LaunchConfig) -> CUresult;

/// The kernels of a context, each loaded once, when it is first needed, however many devices share it.
pub(super) struct Kernels {
    context: sys::CUcontext,
    ptx: &'static Ptx,
    /// Dynamic shared memory that each may use.
    shared_bytes: u32,
    /// By [`Entry::index`].
    loaded: [OnceLock<Kernel>; entries::COUNT],
    /// What loading took.
    pub(super) load_time: Mutex<Duration>,
    /// The driver's function for launches that overlap; `None` where the driver or the device has none.
    pub(super) overlapping: Option<LaunchKernelEx>,
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
    pub(super) fn of(
        name: &str,
        context: &Context,
        ptx: &'static Ptx,
        shared_bytes: u32,
    ) -> Result<Arc<Self>> {
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
    pub(super) fn order(&self, stream: sys::CUstream) -> Arc<LaunchOrder> {
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
    pub(super) fn find(&self, entry: &Entry) -> Option<sys::CUfunction> {
        self.loaded.get(entry.index)?.get().map(|kernel| kernel.function)
    }

    /// Loads those of `entries` that are not loaded yet, several at a time. A kernel that another thread loads meanwhile
    /// is loaded twice, and one of the two dropped: nobody waits for another thread's compiling.
    pub(super) fn load(&self, name: &str, entries: &[&'static Entry]) -> Result<()> {
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
    pub(super) fn largest_cluster(&self, name: &str, gpu: &GpuInfo) -> Result<u32> {
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
