//! Devices, and memory on them.

use std::ffi::{CString, c_char, c_void};

use tokenselect::{DType, Device, Error, Tensor, TensorViewMut};

use crate::config::{read_config, ts_config};
use crate::pointers::{Argument, answer, hand_out, reference, take_back};
use crate::status::{Result, fence, ts_status};

/// A place where operations run and memory lies, with one order of work: a stream.
///
/// Handles made on a device hold it: destroying a device before them is allowed. A device may be used by several
/// threads at once.
#[derive(Debug)]
pub struct ts_device {
    pub(crate) device: Device,
    name: CString,
}

impl ts_device {
    fn new(device: Device) -> Self {
        let name = CString::new(device.name()).unwrap_or_default();
        ts_device { device, name }
    }
}

/// The processor. Pointers given to its handles are the host's.
///
/// # Safety
/// - `device` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_device_cpu(device: *mut *mut ts_device) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { hand_out("device", device, || Ok(ts_device::new(Device::cpu()))) })
}

/// CUDA device `ordinal`, in its primary context (which the CUDA runtime and PyTorch use), on a stream of its own,
/// which does not wait for the default stream.
///
/// Errors: `TS_STATUS_DRIVER` without a driver or such a device, `TS_STATUS_UNSUPPORTED` below compute capability 8.0
/// or in a build without CUDA.
///
/// # Safety
/// - `device` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_device_cuda(ordinal: u32, device: *mut *mut ts_device) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { hand_out("device", device, || Ok(ts_device::new(cuda(ordinal)?))) })
}

/// CUDA device `ordinal`, with all work put in a stream of the caller's: a `CUstream` or `cudaStream_t`, null for the
/// default stream. Uses the current context if it belongs to that device, else the primary one.
///
/// Errors: those of `ts_device_cuda`.
///
/// # Safety
/// - `stream` is null or a stream of that context, not `CU_STREAM_PER_THREAD`, and lives until the device and all that
///   was made on it are destroyed.
/// - A kernel of the caller's own that lets the next launch begin early (`griddepcontrol.launch_dependents`) has by
///   then written all that this device reads: queries, keys, values, pages, lists.
/// - `device` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_device_cuda_on_stream(
    ordinal: u32,
    stream: *mut c_void,
    device: *mut *mut ts_device,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { hand_out("device", device, || Ok(ts_device::new(cuda_on_stream(ordinal, stream)?))) })
}

/// The GPU kernels, run on the processor by an emulator that reports races, accesses out of bounds and divergence as
/// `TS_STATUS_LAUNCH`: for tests. Memory comes from `ts_buffer_create`. `seed` is 0 for lanes in order, else it draws
/// the schedule.
///
/// Errors: `TS_STATUS_UNSUPPORTED` in a build without the emulator.
///
/// # Safety
/// - `device` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_device_emulated(seed: u64, device: *mut *mut ts_device) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { hand_out("device", device, || Ok(ts_device::new(emulated(seed)?))) })
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: u32) -> Result<Device> {
    Ok(Device::cuda(ordinal as usize)?)
}

#[cfg(not(feature = "cuda"))]
fn cuda(ordinal: u32) -> Result<Device> {
    Err(not_built(format!("cuda:{ordinal}"), "cuda"))
}

#[cfg(feature = "cuda")]
unsafe fn cuda_on_stream(ordinal: u32, stream: *mut c_void) -> Result<Device> {
    // SAFETY: the caller's promise.
    Ok(unsafe { Device::cuda_on_stream(ordinal as usize, stream)? })
}

#[cfg(not(feature = "cuda"))]
unsafe fn cuda_on_stream(ordinal: u32, _: *mut c_void) -> Result<Device> {
    cuda(ordinal)
}

#[cfg(feature = "emulator")]
fn emulated(seed: u64) -> Result<Device> {
    Ok(if seed == 0 { Device::emulated() } else { Device::emulated_random(seed) })
}

#[cfg(not(feature = "emulator"))]
fn emulated(_: u64) -> Result<Device> {
    Err(not_built("emulated".into(), "emulator"))
}

#[cfg(not(all(feature = "cuda", feature = "emulator")))]
fn not_built(device: String, feature: &str) -> crate::status::Failure {
    let what = format!("any configuration: the library was built without the feature `{feature}`");
    Error::Unsupported { device, op: "any operation", what }.into()
}

/// Short name: `cpu`, `emulated`, `cuda:0 (NVIDIA H200)`. Null for a null device.
///
/// # Safety
/// - `device` is null or a handle. The text lives as long as the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_device_name(device: *const ts_device) -> *const c_char {
    // SAFETY: the caller's promise.
    unsafe { device.as_ref() }.map_or(std::ptr::null(), |device| device.name.as_ptr())
}

/// Whether a device can run steps of a configuration: what `ts_context_create` would answer for all operations, without
/// its allocations. For some of them, ask `ts_workspace_bytes`.
///
/// Errors: `TS_STATUS_UNSUPPORTED` where the device has no kernels for it, with a text that says what it lacks;
/// `TS_STATUS_CONFIG`, `TS_STATUS_UNKNOWN_ENUM`, `TS_STATUS_STRUCT_SIZE`.
///
/// # Safety
/// - `device` is null or a handle; `config` is null or holds `config->struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_device_supports(device: *const ts_device, config: *const ts_config) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let (device, config) = unsafe { (reference("device", device)?, read_config(config)?) };
        Ok(device.device.supports(&config)?)
    })
}

/// Waits until everything put on the device is done.
///
/// Errors: `TS_STATUS_DRIVER` where something failed, `TS_STATUS_MISSING` while work is being captured.
///
/// # Safety
/// - `device` is null or a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_device_synchronize(device: *const ts_device) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| Ok(unsafe { reference("device", device)? }.device.synchronize()?))
}

/// Gives a device back. Null is nothing. What was made on it stays usable.
///
/// # Safety
/// - `device` is null or a handle, used for the last time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_device_destroy(device: *mut ts_device) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { take_back("device", device) })
}

/// Memory of a device that the library owns: for programs without an allocator of their own.
#[derive(Debug)]
pub struct ts_buffer {
    tensor: Tensor,
}

/// Allocates `num_bytes`, zeroed, aligned to at least 256 bytes on a GPU and 8 on the processor.
///
/// Errors: `TS_STATUS_OUT_OF_MEMORY`.
///
/// # Safety
/// - `device` is null or a handle.
/// - `buffer` is null or has room for a pointer, written: the new handle, null on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_buffer_create(
    device: *const ts_device,
    num_bytes: usize,
    buffer: *mut *mut ts_buffer,
) -> ts_status {
    fence(|| {
        // SAFETY: the caller's promise.
        let device = unsafe { reference("device", device)? };
        let words = num_bytes.div_ceil(DType::U64.size());
        let make = || Ok(ts_buffer { tensor: Tensor::zeros_on(&device.device, DType::U64, [words])? });
        // SAFETY: as above.
        unsafe { hand_out("buffer", buffer, make) }
    })
}

/// Address of the first byte: the device's, or the host's for the processor.
///
/// # Safety
/// - `buffer` is null or a handle; the memory lives as long as it.
/// - `data` is null or has room for a pointer, written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_buffer_data(buffer: *mut ts_buffer, data: *mut *mut c_void) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe {
        let buffer = crate::pointers::reference_mut("buffer", buffer)?;
        answer("data", data, || address(buffer.tensor.view_mut()))
    })
}

/// Frees a buffer, after the device's earlier work. Null is nothing.
///
/// # Safety
/// - `buffer` is null or a handle, used for the last time; no pointer into it is used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_buffer_destroy(buffer: *mut ts_buffer) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { take_back("buffer", buffer) })
}

/// Address of a tensor of the library's, for the caller to read and write.
pub(crate) fn address(tensor: TensorViewMut<'_>) -> Result<*mut c_void> {
    match tensor.as_view().device_addr() {
        Ok(addr) => Ok(std::ptr::without_provenance_mut(addr as usize)),
        Err(_) => Ok(match tensor.dtype() {
            DType::F16 => tensor.into_slice::<half::f16>()?.as_mut_ptr().cast(),
            DType::Bf16 => tensor.into_slice::<half::bf16>()?.as_mut_ptr().cast(),
            DType::F32 => tensor.into_slice::<f32>()?.as_mut_ptr().cast(),
            DType::U32 => tensor.into_slice::<u32>()?.as_mut_ptr().cast(),
            DType::F64 => tensor.into_slice::<f64>()?.as_mut_ptr().cast(),
            _ => tensor.into_slice::<u64>()?.as_mut_ptr().cast(),
        }),
    }
}

/// Elements of two bytes, the smallest there are, that make up `num_bytes`.
fn halves(num_bytes: usize) -> Result<usize> {
    if num_bytes.is_multiple_of(2) {
        return Ok(num_bytes / 2);
    }
    Err(Error::Argument { what: "num_bytes", rule: "even".into(), got: num_bytes.to_string() }.into())
}

/// Copies `num_bytes` from memory of one device to that of another.
///
/// # Safety
/// - `to` and `from` are memory of the device they stand with, as `ts_memory_write` asks.
unsafe fn copy(
    (to, to_device): (*mut c_void, &Device),
    (from, from_device): (*const c_void, &Device),
    num_bytes: usize,
) -> Result<()> {
    let shape = [halves(num_bytes)?];
    let (to, from) =
        (Argument::new("to", to, DType::F16, shape), Argument::new("from", from, DType::F16, shape));
    // SAFETY: the caller's promise.
    let (to, from) = unsafe { (to.view_mut(to_device)?, from.view(from_device)?) };
    Ok(to.copy_from(from)?)
}

/// Copies `num_bytes`, an even number, from the host to memory of the device, after the device's earlier work. The
/// host's bytes may be changed as soon as this returns.
///
/// Errors: `TS_STATUS_NULL_POINTER`, `TS_STATUS_MISALIGNED`, `TS_STATUS_CONFIG` for an odd size, `TS_STATUS_DRIVER`.
///
/// # Safety
/// - `device` is null or a handle.
/// - `to` is memory of the device (of the host for the processor) with room for `num_bytes`, aligned to 16 bytes on a
///   GPU and 2 on the processor.
/// - `from` holds `num_bytes` of host memory, aligned to 2 bytes, apart from `to`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_memory_write(
    device: *const ts_device,
    to: *mut c_void,
    from: *const c_void,
    num_bytes: usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { copy((to, &reference("device", device)?.device), (from, &Device::cpu()), num_bytes) })
}

/// Copies `num_bytes`, an even number, from memory of the device to the host. Waits for the device's earlier work.
///
/// Errors: as `ts_memory_write`.
///
/// # Safety
/// - As for `ts_memory_write`, with `from` on the device and `to` on the host.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ts_memory_read(
    device: *const ts_device,
    to: *mut c_void,
    from: *const c_void,
    num_bytes: usize,
) -> ts_status {
    // SAFETY: the caller's promise.
    fence(|| unsafe { copy((to, &Device::cpu()), (from, &reference("device", device)?.device), num_bytes) })
}
