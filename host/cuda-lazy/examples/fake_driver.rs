//! A shared library that looks like a CUDA driver to the tests: a handful of its functions, which record their
//! arguments and return something recognisable. All others are missing.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::ffi::{c_int, c_uint, c_void};
use std::sync::Mutex;

static RECORDED: Mutex<Vec<u64>> = Mutex::new(Vec::new());

fn record(arguments: &[u64]) {
    let mut recorded = RECORDED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    recorded.clear();
    recorded.extend_from_slice(arguments);
}

/// Copies the arguments of the last call out and returns their number.
///
/// # Safety
/// `out` is valid for `capacity` writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_recorded(out: *mut u64, capacity: usize) -> usize {
    let recorded = RECORDED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let count = recorded.len().min(capacity);
    // SAFETY: the caller's.
    unsafe { out.copy_from_nonoverlapping(recorded.as_ptr(), count) };
    recorded.len()
}

/// Succeeds only with flags 0, as the real one.
#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> c_int {
    record(&[u64::from(flags)]);
    if flags == 0 { 0 } else { 1 }
}

/// CUDA 42.0.
///
/// # Safety
/// `version` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: the caller's.
    unsafe { version.write(42_000) };
    0
}

/// Calls [`cuDriverGetVersion`] by name through the dynamic linker, as a library does that others may interpose on.
///
/// # Safety
/// `version` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_version_by_name(version: *mut c_int) -> c_int {
    // SAFETY: the caller's.
    unsafe { cuDriverGetVersion(version) }
}

/// Eleven arguments, five of them on the stack; returns `CUDA_ERROR_LAUNCH_TIMEOUT`.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
pub extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: *mut c_void,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> c_int {
    let dims = [grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes].map(u64::from);
    let mut arguments = vec![function as u64];
    arguments.extend(dims);
    arguments.extend([stream as u64, params as u64, extra as u64]);
    record(&arguments);
    702
}

/// A floating-point argument, which travels in a vector register.
#[unsafe(no_mangle)]
pub extern "C" fn cuTexRefSetMipmapLevelBias(texture: *mut c_void, bias: f32) -> c_int {
    record(&[texture as u64, u64::from(bias.to_bits())]);
    0
}
