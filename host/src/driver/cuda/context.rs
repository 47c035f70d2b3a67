//! The context that work runs in, and calls of the driver API.

use std::ffi::CStr;
use std::ptr::null_mut;

use cust::sys::{self, CUresult};

use crate::error::{Error, Result};

/// Calls a function of the driver API and turns its answer into a `Result`.
macro_rules! cuda {
    ($name:expr, $function:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: arguments are as the driver API asks; each use says where that is not plain.
        let code = unsafe { sys::$function($($arg),*) };
        $crate::driver::cuda::context::check($name, stringify!($function), code)
    }};
}

pub(super) fn check(device: &str, call: &str, code: CUresult) -> Result<()> {
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

pub(super) use cuda;

/// The context that is used, and whether it was retained.
pub(super) struct Context {
    pub(super) raw: sys::CUcontext,
    /// The device whose primary context is to be released.
    pub(super) retained: Option<sys::CUdevice>,
}

impl Context {
    pub(super) fn of(name: &str, device: sys::CUdevice) -> Result<Self> {
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
    pub(super) fn enter(&self, name: &str) -> Result<Entered> {
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

pub(super) struct Entered {
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
