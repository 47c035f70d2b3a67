//! A library that exists and is no driver.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use tokenselect_cuda_lazy::{LoadError, cust, load_from};

#[test]
fn another_library_is_refused() {
    // SAFETY: the C library is loaded already; it defines no driver function.
    let error = unsafe { load_from("libc.so.6".as_ref()) }.expect_err("not a driver");
    assert_eq!(error, LoadError::NotADriver { library: "libc.so.6".into(), missing: "cuInit" });
    assert_eq!(error.to_string(), "no CUDA driver: libc.so.6 was loaded but does not define `cuInit`");
    assert!(cust::init(cust::CudaFlags::empty()).is_err());
}
