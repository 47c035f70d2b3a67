//! A shared library that links this crate and `cust`, as a Python extension module does.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::ffi::c_int;

use tokenselect_cuda_lazy::cust;
use tokenselect_cuda_lazy::load_from;

/// `cuInit` as this library sees it, with a driver path that does not exist.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_init() -> c_int {
    // SAFETY: nothing is loaded from a path that does not exist.
    let missing = unsafe { load_from("/nonexistent/libcuda.so.1".as_ref()) };
    assert!(missing.is_err());
    // SAFETY: may be called at any time.
    unsafe { cust::sys::cuInit(0) as c_int }
}
