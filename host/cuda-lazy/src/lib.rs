//! The CUDA driver, loaded when it is first needed.
//!
//! `cust` links `libcuda`: a program that uses it wants a CUDA toolkit when it is built and does not start where there
//! is no driver. With this crate in the program neither is so. It defines every driver function that `cust_raw`
//! declares as a two-instruction jump through a table:
//!
//! ```text
//! cuInit:  load  slot[cuInit]          slot, before the first call:  resolve   (loads the driver, fills the table,
//!          jump  there                                                          jumps again with the same arguments)
//!                                      with a driver:                the driver's own cuInit
//!                                      without one:                  returns 34, CUDA_ERROR_STUB_LIBRARY
//!                                      driver without it:            returns 500, CUDA_ERROR_NOT_FOUND
//! ```
//!
//! [`load`] loads the driver ahead of that and tells why it could not.
//!
//! ```
//! match tokenselect_cuda_lazy::load() {
//!     Ok(driver) => println!("driver {}", driver.library().display()),
//!     Err(error) => println!("staying on the CPU: {error}"),
//! }
//! ```
//!
//! The functions have hidden visibility: they are bound inside the executable or shared library that this crate is
//! linked into and do not appear in its dynamic symbol table. So another library of the process that uses the real
//! driver never calls them, and cannot replace them either.
//!
//! Linux on x86-64 and AArch64. Elsewhere the crate is empty but for [`load`], which fails with
//! [`LoadError::UnsupportedTarget`].

mod error;

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
#[macro_use]
mod symbols;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod driver;
#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
#[path = "unsupported.rs"]
mod driver;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
#[path = "trampolines_aarch64.rs"]
mod trampolines;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "trampolines_x86_64.rs"]
mod trampolines;

pub use driver::{Driver, load, load_from, symbols};
pub use error::LoadError;

/// The `cust` that the functions defined here belong to.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub use cust;
