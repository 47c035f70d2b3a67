//! A process without a driver: typed errors, no crash. The driver is one that does not exist, so that the test says the
//! same on machines that have one.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::path::Path;

use tokenselect_cuda_lazy::cust::{self, CudaFlags};
use tokenselect_cuda_lazy::{LoadError, load, load_from};

const NOWHERE: &str = "/nonexistent/libcuda.so.1";

fn load_nothing() -> LoadError {
    // SAFETY: nothing is loaded from a path that does not exist.
    unsafe { load_from(Path::new(NOWHERE)) }.expect_err("nothing is there")
}

#[test]
fn the_error_names_what_was_tried() {
    let error = load_nothing();
    assert!(matches!(&error, LoadError::NotFound { tried } if tried.len() == 1), "{error:?}");
    let expected = "no CUDA driver: libcuda.so.1 could not be loaded; tried /nonexistent/libcuda.so.1 \
                    (cannot open shared object file: No such file or directory)";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn the_first_failure_stays() {
    assert_eq!(load_nothing(), load().expect_err("decided by the first call"));
}

#[test]
fn cust_returns_errors_that_can_be_printed() {
    load_nothing();
    let error = cust::init(CudaFlags::empty()).expect_err("no driver");
    assert!(error.to_string().contains("no CUDA driver"), "{error}");
    assert!(cust::quick_init().is_err());
    assert!(cust::CudaApiVersion::get().is_err());
}

#[test]
fn a_function_that_was_not_loaded_returns_stub_library() {
    load_nothing();
    // SAFETY: without a driver, no argument is looked at.
    let code = unsafe { cust::sys::cuCtxSynchronize() };
    assert_eq!(code as u32, 34);
}

#[test]
fn error_texts_check_their_argument() {
    load_nothing();
    // SAFETY: a null pointer is refused.
    let code = unsafe {
        cust::sys::cuGetErrorName(cust::sys::cudaError_enum::CUDA_ERROR_STUB_LIBRARY, std::ptr::null_mut())
    };
    assert_eq!(code as u32, 1);
}
