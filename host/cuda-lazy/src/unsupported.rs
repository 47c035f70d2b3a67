//! Targets without trampolines: the same interface, and no driver ever.

use std::convert::Infallible;
use std::ffi::{CStr, c_void};
use std::path::Path;
use std::ptr::NonNull;

use crate::LoadError;

/// The loaded driver. On this target there is none, so no value of this type exists.
#[derive(Debug)]
pub struct Driver(Infallible);

impl Driver {
    /// The library that was loaded.
    pub fn library(&self) -> &Path {
        match self.0 {}
    }

    /// Functions of [`symbols`] that the driver lacks.
    pub fn missing(&self) -> &[&'static str] {
        match self.0 {}
    }

    /// Address of a driver function or variable.
    pub fn symbol(&self, _name: &CStr) -> Option<NonNull<c_void>> {
        match self.0 {}
    }
}

/// Names of the driver functions that this crate defines: none on this target.
pub fn symbols() -> &'static [&'static str] {
    &[]
}

/// Loads the driver: fails on this target.
///
/// # Errors
/// [`LoadError::UnsupportedTarget`], always.
pub fn load() -> Result<&'static Driver, LoadError> {
    Err(LoadError::UnsupportedTarget { os: std::env::consts::OS, arch: std::env::consts::ARCH })
}

/// Loads a library of your choice as the driver: fails on this target.
///
/// # Errors
/// [`LoadError::UnsupportedTarget`], always.
///
/// # Safety
/// None on this target; elsewhere the library must be a CUDA driver.
pub unsafe fn load_from(_library: &Path) -> Result<&'static Driver, LoadError> {
    load()
}
