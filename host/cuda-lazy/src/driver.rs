//! The loaded driver and the table that calls go through.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::Library;

use crate::LoadError;
use crate::symbols::SYMBOLS;

/// Where a driver is looked for: first as the dynamic linker finds it, then where distributions keep it out of its
/// sight (WSL 2, NixOS).
const LIBRARIES: [&str; 3] =
    ["libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1", "/run/opengl-driver/lib/libcuda.so.1"];

/// A library that lacks it is not a CUDA driver.
const REQUIRED: &str = "cuInit";

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 1;
const STUB_LIBRARY: c_int = 34;
const NOT_FOUND: c_int = 500;

unsafe extern "C" {
    /// Targets of the jumps, in the order of [`SYMBOLS`]. Defined in `trampolines`.
    #[link_name = "tokenselect_cuda_lazy_slots"]
    static SLOTS: [AtomicPtr<c_void>; SYMBOLS.len()];
}

/// Has the linker take the driver functions out of this crate's archive even where nothing calls [`load`].
#[used]
static KEEP: &[AtomicPtr<c_void>; SYMBOLS.len()] = {
    // SAFETY: the assembly defines the table with one pointer-sized, pointer-aligned slot for each symbol.
    unsafe { &SLOTS }
};

static DRIVER: OnceLock<Result<Driver, LoadError>> = OnceLock::new();

/// The loaded driver. It is never unloaded.
#[derive(Debug)]
pub struct Driver {
    library: PathBuf,
    handle: Library,
    missing: Vec<&'static str>,
}

impl Driver {
    /// The library that was loaded, as it was asked for.
    pub fn library(&self) -> &Path {
        &self.library
    }

    /// Functions of [`symbols`] that the driver lacks, an older or a newer one than the bindings know. They return 500,
    /// `CUDA_ERROR_NOT_FOUND`.
    pub fn missing(&self) -> &[&'static str] {
        &self.missing
    }

    /// Address of a function or variable of the driver, for what `cust_raw` does not declare: its bindings are those of
    /// CUDA 11.4.
    pub fn symbol(&self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: a pointer is a valid type for any symbol; nothing is read through it here.
        let found = unsafe { self.handle.get::<*mut c_void>(name) };
        found.ok().and_then(|symbol| NonNull::new(*symbol))
    }
}

/// Names of the driver functions that this crate defines.
pub fn symbols() -> &'static [&'static str] {
    SYMBOLS
}

/// Loads the driver, once: the first call of this function, of [`load_from`] or of any driver function decides for the
/// life of the process. Safe to call from several threads at once.
///
/// # Errors
/// [`LoadError::NotFound`] where there is no driver, [`LoadError::NotADriver`] where `libcuda.so.1` is something else.
pub fn load() -> Result<&'static Driver, LoadError> {
    let candidates = LIBRARIES.map(PathBuf::from);
    // SAFETY: loading a CUDA driver from where the system keeps it has no preconditions.
    let state = DRIVER.get_or_init(|| unsafe { open(&candidates) });
    state.as_ref().map_err(LoadError::clone)
}

/// Loads `library` as the driver, where it is not in any of the usual places. To be called before anything else of this
/// crate or any driver function.
///
/// # Errors
/// As [`load`], and [`LoadError::AlreadyLoaded`] if another library is the driver already. An earlier failure is
/// returned again.
///
/// # Safety
/// `library` must be a CUDA driver: every function of [`symbols`] that it defines has the signature and the meaning
/// that CUDA gives it.
pub unsafe fn load_from(library: &Path) -> Result<&'static Driver, LoadError> {
    // SAFETY: the caller's.
    let state = DRIVER.get_or_init(|| unsafe { open(&[library.to_path_buf()]) });
    let driver = state.as_ref().map_err(LoadError::clone)?;
    if driver.library != library {
        return Err(LoadError::AlreadyLoaded {
            asked: library.to_path_buf(),
            loaded: driver.library.clone(),
        });
    }
    Ok(driver)
}

/// Called by the trampolines when a driver function is called before the table is filled.
pub(crate) extern "C" fn resolve() {
    // A failure is in the table: the function called returns an error code.
    let _ = load();
}

/// Opens the first of `candidates` that can be opened and fills the table, whatever comes of it.
///
/// # Safety
/// Each of `candidates` that exists must be a CUDA driver.
unsafe fn open(candidates: &[PathBuf]) -> Result<Driver, LoadError> {
    // SAFETY: the caller's.
    let driver = unsafe { open_library(candidates) };
    let loaded = driver.as_ref().ok();
    for (slot, name) in KEEP.iter().zip(SYMBOLS) {
        let found = loaded.and_then(|driver| find(driver, name));
        slot.store(found.map_or_else(|| fallback(name, loaded), NonNull::as_ptr), Ordering::Release);
    }
    driver
}

/// Opens the first of `candidates` that can be opened and notes what it lacks.
///
/// # Safety
/// As [`open`].
unsafe fn open_library(candidates: &[PathBuf]) -> Result<Driver, LoadError> {
    let mut tried = Vec::new();
    for library in candidates {
        // SAFETY: the caller's: the initialisers of a CUDA driver may run at any time.
        let handle = match unsafe { Library::new(library) } {
            Ok(handle) => handle,
            Err(error) => {
                tried.push((library.clone(), reason(library, &error)));
                continue;
            }
        };
        let mut driver = Driver { library: library.clone(), handle, missing: Vec::new() };
        driver.missing = SYMBOLS.iter().copied().filter(|name| find(&driver, name).is_none()).collect();
        if driver.missing.contains(&REQUIRED) {
            return Err(LoadError::NotADriver { library: library.clone(), missing: REQUIRED });
        }
        return Ok(driver);
    }
    Err(LoadError::NotFound { tried })
}

/// The dynamic linker's own words, less the name that they begin with.
fn reason(library: &Path, error: &libloading::Error) -> String {
    let text = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    let name = format!("{}: ", library.display());
    text.strip_prefix(&name).unwrap_or(&text).to_owned()
}

fn find(driver: &Driver, name: &str) -> Option<NonNull<c_void>> {
    let name = CString::new(name).ok()?;
    driver.symbol(&name)
}

/// What stands in for a function that is not there.
fn fallback(name: &str, loaded: Option<&Driver>) -> *mut c_void {
    // Every one may be called with more arguments than it takes: the C calling conventions of both targets leave
    // arguments to the caller.
    match name {
        "cuGetErrorName" => error_name as *mut c_void,
        "cuGetErrorString" => error_string as *mut c_void,
        _ if loaded.is_some() => not_found as *mut c_void,
        _ => stub_library as *mut c_void,
    }
}

extern "C" fn stub_library() -> c_int {
    STUB_LIBRARY
}

extern "C" fn not_found() -> c_int {
    NOT_FOUND
}

/// `cuGetErrorName` without a driver.
///
/// # Safety
/// `text` is null or valid for a write.
unsafe extern "C" fn error_name(code: c_int, text: *mut *const c_char) -> c_int {
    let name = match code {
        STUB_LIBRARY => c"CUDA_ERROR_STUB_LIBRARY",
        NOT_FOUND => c"CUDA_ERROR_NOT_FOUND",
        _ => c"CUDA_ERROR_UNKNOWN",
    };
    // SAFETY: the caller's.
    unsafe { answer(name, text) }
}

/// `cuGetErrorString` without a driver. `cust` formats its errors with it, and formatting panics if it fails.
///
/// # Safety
/// `text` is null or valid for a write.
unsafe extern "C" fn error_string(_code: c_int, text: *mut *const c_char) -> c_int {
    // SAFETY: the caller's.
    unsafe { answer(c"no CUDA driver is loaded that could name this error", text) }
}

/// # Safety
/// `text` is null or valid for a write.
unsafe fn answer(answer: &'static CStr, text: *mut *const c_char) -> c_int {
    if text.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: not null, so valid.
    unsafe { text.write(answer.as_ptr()) };
    SUCCESS
}
